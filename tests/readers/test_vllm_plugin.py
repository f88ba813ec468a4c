"""vLLM with the plug-in: adapters as they were saved, expanded or with their pools shared."""

import shutil

import pytest
import torch
import transformers

import rasa_ext
from rasa_ext.commands.models import load_model
from rasa_ext.serving.vllm import POOLS
from tests.readers import likeliest
from tests.readers.commands import exported
from tests.readers.conftest import fill, log_probabilities
from tests.readers.environments import ask
from tests.readers.likeliest import COUNT, prompts
from tests.readers.servers import complete, served

pytestmark = pytest.mark.readers
LIMIT = 1e-4  # in nats; measured: 5.7e-5
LOADS = 20


@pytest.fixture(scope="module")
def more(case, tmp_path_factory):
    """SmolLM2 with adapters of other kinds: folders and log-probabilities by name."""
    halves = {"first half": [f"layers.{i}.mlp.up_proj" for i in range(15)]}
    model = load_model(str(case.gguf))
    options = {
        "no pool": {"rank": 8, "k": 0},
        "only a pool": {"rank": 1, "k": 1},
        "two pools of a kind": {"rank": 8, "k": 1, "groups": halves},
    }
    return saved(model, options, case.prompts, tmp_path_factory.mktemp("more"))


def saved(model, options, prompts, folder):
    """Save random adapters, and one without a pool as a LoRA, too."""
    folders, expected = {}, {"base": log_probabilities(model, prompts)}
    for seed, (name, each) in enumerate(options.items(), 10):
        rasa_ext.patch_model(model, **each)
        fill(model, seed)
        folders[name] = folder / name
        rasa_ext.save_adapter(model, folders[name])
        expected[name] = log_probabilities(model, prompts)
        if name == "no pool":
            folders["a LoRA"], expected["a LoRA"] = folder / "a LoRA", expected[name]
            rasa_ext.export_lora(model, folders["a LoRA"])
        model = rasa_ext.unpatch(model)
    return folders, expected


def off(expected, asked, told) -> dict[str, float]:
    """Return the largest error of a log-probability by adapter."""
    found: dict[str, float] = {}
    for (name, i, length), answer in zip(asked, told, strict=True):
        assert len(answer) >= COUNT
        right = expected[name][i][length - 1]
        errors = [abs(value - right[int(token)].item()) for token, value in answer.items()]
        found[name] = max(found.get(name, 0.0), *errors)
    return found


def answers(plugin, place, base, folders, expected, batches, shared="", **question):
    """Ask for batches of (adapter, prompt) and return the errors by adapter, and what was told."""
    asked = [[(name, i, len(tokens)) for name, i, tokens in batch] for batch in batches]
    question = {
        "base": str(base),
        "count": COUNT,
        "adapters": {name: str(path) for name, path in folders.items()},
        "batches": [[(name, tokens) for name, _, tokens in batch] for batch in batches],
        "refused": {},
        "loads": 0,
        **question,
    }
    told = ask("vllm", "ask_vllm_plugin.py", question, place, **plugin, **{POOLS: shared})
    errors = [off(expected, *each) for each in zip(asked, told["told"], strict=True)]
    return {name: max(e.get(name, 0.0) for e in errors) for e in errors for name in e}, told


def all_prompts(case, names):
    return [(name, i, case.prompts[i][:n]) for i, n in prompts(case) for name in names]


def check_memory(told, figure):
    """After a few loads the memory stays, though every load reads megabytes."""
    memory = told["memory"]
    assert len(memory) == LOADS
    growth = (memory[-1] - memory[4]) / 1e6
    figure(f"memory after {LOADS} loads: {growth:+.1f} MB")
    assert growth < 5, memory  # a file has 9.9


def test_folders_as_saved_beside_loras_and_the_base(case, plugin, tmp_path, measured, figure):
    """Level 1, with every adapter expanded in the worker."""
    loras = {f"{name} as a LoRA": path for name, (path, _) in exported(case, tmp_path).items()}
    folders = {**case.adapters, **loras}
    expected = {name: case.expected[name.removesuffix(" as a LoRA")] for name in ("base", *folders)}
    batch = all_prompts(case, ["base", *folders])[:20]  # slow at this rank
    found, told = answers(
        plugin, tmp_path, case.base, folders, expected, [batch], rank=64, slots=5, loads=LOADS
    )
    measured("vLLM, folders as saved, LoRAs and the base in one batch", found)
    figure(f"a slot of rank 64: {told['slot'] / 1e6:.1f} MB")
    assert max(found.values()) < LIMIT
    check_memory(told, figure)


def test_pools_that_stay_shared(case, more, plugin, tmp_path, measured, figure):
    """Level 2: pools of one or two groups, no pool, only a pool, a LoRA and the base at once."""
    folders, expected = (
        mine | theirs for mine, theirs in zip((case.adapters, case.expected), more, strict=True)
    )
    wide = tmp_path / "wide"
    rasa_ext.save_adapter(rasa_ext.patch_model(load_model(str(case.gguf)), 8, 2), wide)
    batch = all_prompts(case, ["base", *folders])
    found, told = answers(
        plugin, tmp_path, case.base, folders, expected, [batch], "shared",
        rank=8, slots=len(folders) + 1, loads=LOADS, refused={"wide": str(wide)},
    )  # fmt: skip
    measured("vLLM, pools shared, a LoRA and the base in one batch", found)
    figure(f"a slot with pools: {told['slot'] / 1e6:.2f} MB")
    assert max(found.values()) < LIMIT
    assert told["slot"] < 11.5e6
    assert (
        "got 60 in the adapter 'wide'; start vLLM with RASA_EXT_VLLM_POOLS=shared:2"
        in (told["refused"]["wide"])
    )
    check_memory(told, figure)


SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(("family", "tensor_parallel"), [("phi3", 1), ("llama", 2)])
def test_more_adapters_than_slots(family, tensor_parallel, plugin, tmp_path, figure):
    """Pools of k up to 2, in a model whose files pack q, k and v (phi3) or whose server does."""
    torch.manual_seed(0)
    options = {"original_max_position_embeddings": 512} if family == "phi3" else {}
    config = transformers.AutoConfig.for_model(family, **SIZES, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path / "base")
    tokens = [list(range(3 + i, 40 + 5 * i)) for i in range(3)]
    kinds = {
        "no pool": {"rank": 4, "k": 0},
        "k=1": {"rank": 8, "k": 1},
        "k=2": {"rank": 6, "k": 2},
        "only a pool": {"rank": 2, "k": 2},
        "some layers": {"rank": 4, "k": 2, "target_modules": ["o_proj", "down_proj"]},
    }
    folders, expected = saved(model, kinds, tokens, tmp_path)
    batches = [
        [(name, i, each) for i, each in enumerate(tokens) for name in names]
        # On a CPU the base needs a slot that was never used, as docs/serving.md says.
        for names in (["base", "k=2"], folders, ["k=1", "no pool"], folders)
    ]
    threads = {"OMP_NUM_THREADS": "1"}
    found, _ = answers(
        plugin | threads, tmp_path, tmp_path / "base", folders, expected, batches, "shared:2",
        rank=8, slots=2, tensor_parallel=tensor_parallel,
    )  # fmt: skip
    figure(f"vLLM, {family}, {tensor_parallel} processes, 6 adapters in 2 slots: {found}")
    assert max(found.values()) < LIMIT, found
    for name in folders:
        difference = max(
            (a - b).abs().max() for a, b in zip(expected[name], expected["base"], strict=True)
        )
        assert difference > 1000 * LIMIT, name


def test_a_trained_head_of_a_classifier(plugin, tmp_path, figure):
    """In the folder as saved, and in a LoRA of it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", **SIZES, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config).float().eval()
    model.save_pretrained(tmp_path / "base")
    tokens = list(range(3, 40))
    expected = {"base": classes(model, tokens)}
    rasa_ext.patch_model(model, 4, 1, modules_to_save=["score"])
    fill(model, 0)
    torch.nn.init.normal_(model.score.weight)
    expected |= dict.fromkeys(("saved", "a LoRA"), classes(model, tokens))
    rasa_ext.save_adapter(model, tmp_path / "saved")
    with pytest.warns(UserWarning, match=r"llama\.cpp refuses modules_to_save \(score\); for that"):
        rasa_ext.export_lora(model, tmp_path / "a LoRA")
    folders = {name: str(tmp_path / name) for name in expected if name != "base"}
    question = {"base": str(tmp_path / "base"), "adapters": folders, "tokens": tokens}
    told = ask("vllm", "ask_vllm_classifier.py", question, tmp_path, **plugin, **{POOLS: "shared"})
    found = {name: (torch.tensor(told[name]) - expected[name]).abs().max() for name in expected}
    figure(f"vLLM, a trained head: {found}")
    assert max(found.values()) < 1e-5, found
    assert (expected["saved"] - expected["base"]).abs().max() > 0.1


@torch.no_grad()
def classes(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].softmax(-1)


def test_a_server_goes_on_after_a_damaged_folder(case, plugin, tmp_path, measured):
    damaged, normed = tmp_path / "damaged", tmp_path / "normed"
    shutil.copytree(case.adapters["first"], damaged)
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    model = load_model(str(case.gguf))
    rasa_ext.save_adapter(rasa_ext.patch_model(model, modules_to_save=["norm"]), normed)
    words = ["vllm", "serve", str(case.base), "--dtype", "float32", "--max-model-len", "256"]
    words += ["--enforce-eager", "--enable-lora", "--max-lora-rank", "64", "--max-loras", "3"]
    words += ["--lora-modules", f"first={case.adapters['first']}"]
    errors = {
        damaged: "adapter_model.safetensors: damaged or cut",
        normed: r"model\.norm\.weight were trained as well",
        tmp_path / "absent": "No adapter found",
    }
    names = {"first": "first", "second": "pushed", "base": str(case.base)}
    snapshot = tmp_path / "hub" / "models--me--second"
    shutil.copytree(case.adapters["second"], snapshot / "snapshots" / "0")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("0")
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    with served("vllm", words, tmp_path / "log", **plugin, **hub) as post:
        found = {"first": of_server(post, case, "first", "first")}
        for path, message in errors.items():
            body = {"lora_name": "wrong", "lora_path": str(path)}
            with pytest.raises(AssertionError, match=message):
                post("/v1/load_lora_adapter", body)
        post("/v1/load_lora_adapter", {"lora_name": "pushed", "lora_path": "me/second"})
        found |= {name: of_server(post, case, name, model) for name, model in names.items()}
    measured("vLLM, the server, folders as saved", found)
    assert max(found.values()) < LIMIT


def of_server(post, case, name, model) -> float:
    told = [complete(post, model, case.prompts[i][:n]) for i, n in prompts(case)]
    return likeliest.off(case, name, told, 20)
