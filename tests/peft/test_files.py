"""Adapter folders of PEFT, rasa_ext and the official code: reading and writing."""

import copy
import os

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
)
from safetensors.torch import load_file, save_file

import rasa_ext
import rasa_ext.peft
from tests.helpers import oracle
from tests.helpers.adapter_folders import read
from tests.helpers.adapters import RANK, patched, same_adapters, same_bits, same_tensors
from tests.helpers.models import LLAMA
from tests.helpers.peft import (
    TOKENS,
    WEIGHTS,
    adapted,
    layers,
    logits,
    named,
    plain,
    tiny,
    trained,
)
from tests.helpers.tiny_lm import make_model, save_base


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("k", "dtype"), [(0, "float32"), (1, "bfloat16"), (RANK, "float32")])
def test_a_round_trip_keeps_every_bit(k, dtype, low_cpu_mem_usage, tmp_path):
    """low_cpu_mem_usage replaces parameters; all users of the pool must see the new ones."""
    base, little = make_model().to(getattr(torch, dtype)), {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = adapted(base, rasa_k=k, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **little)
    assert type(again) is PeftModelForCausalLM
    assert not trained(again)
    assert torch.equal(logits(again), logits(model))
    assert same_adapters(again, model)
    again.load_adapter(tmp_path, "second", **little)
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(model))
    trainable = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert trained(trainable).keys() == trained(model).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_writes_what_save_adapter_writes(dtype, tmp_path):
    """Names, shapes and numbers are equal, so each side reads the other's files."""
    rasa_ext.save_adapter(patched(make_model(), adapter_dtype=dtype), tmp_path / "ours")
    tiny(adapter_dtype=dtype).save_pretrained(tmp_path / "peft")
    configs, tensors = zip(*(read(tmp_path / side) for side in ("ours", "peft")), strict=True)
    assert same_tensors(*tensors)
    differing = {"target_modules", "base_model_name_or_path"}  # by order; by None or ""
    common = (configs[0].keys() & configs[1].keys()) - differing
    assert {key: configs[0][key] for key in common} == {key: configs[1][key] for key in common}
    assert configs[0].keys() <= configs[1].keys()


CONFIGS = [
    {"r": 6, "rasa_k": 2, "rasa_alpha": 3.0, "target_modules": ["q_proj", "down_proj"]},
    {"target_modules": r".*\.1\..*_proj", "rasa_dropout": 0.1, "adapter_dtype": "bfloat16"},
    {"exclude_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]},
    {"target_modules": ["q_proj", "c_attn"], "modules_to_save": ["lm_head", "classifier"]},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_from_peft_to_load_adapter_and_back(options, tmp_path, recwarn):
    model = tiny(**options).eval()
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.add_(0.5 * ("modules_to_save" in name))
    model.save_pretrained(tmp_path / "peft")
    ours = rasa_ext.load_adapter(make_model(), tmp_path / "peft")
    assert torch.equal(logits(ours), logits(model))
    written = sum(tensor.numel() for tensor in load_file(tmp_path / "peft" / WEIGHTS).values())
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == written
    rasa_ext.save_adapter(ours, tmp_path / "ours")
    recwarn.clear()
    again = PeftModel.from_pretrained(make_model(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    configs = model.peft_config["default"].core(), again.peft_config["default"].core()
    spec = next(iter(layers(plain(model)).values())).adapter().spec
    assert torch.equal(*(config.diagonal(spec) for config in configs))
    assert not [w for w in recwarn if "keyword" in str(w.message) or "missing" in str(w.message)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", ["new", "second", "trained", "subfolder"])
def test_numbers_that_are_not_finite(value, way, tmp_path):
    path = tmp_path / "inner" / WEIGHTS
    tiny().save_pretrained(path.parent)
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("rasa_B"))
    tensors[key][0, 0] = value
    save_file(tensors, path)
    model = tiny()
    before = logits(model)
    ways = {
        "new": lambda: PeftModel.from_pretrained(make_model(), path.parent),
        "second": lambda: model.load_adapter(path.parent, "second"),
        "trained": lambda: model.load_adapter(path.parent, "default"),
        "subfolder": lambda: PeftModel.from_pretrained(make_model(), tmp_path, subfolder="inner"),
    }
    with pytest.raises(ValueError, match="NaN or infinity") as raised:
        ways[way]()
    said = str(raised.value)
    assert said.startswith(f"adapter {'second' if way == 'second' else 'default'!r}: ")
    assert key in said
    assert torch.equal(logits(model), before)


def test_a_state_dict_with_nan_is_its_owners_affair():
    model = tiny()
    state = model.state_dict()
    next(value for key, value in state.items() if "down_proj.rasa_B" in key).fill_(float("nan"))
    model.load_state_dict(state)
    assert logits(model).isnan().all()


def test_auto_peft_model(tmp_path):
    base = type(make_model()).from_pretrained(save_base(tmp_path / "base"))
    model = patched(base).eval()
    rasa_ext.save_adapter(model, tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert layers(again)
    assert torch.equal(logits(again), logits(model))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("k", "targets", "pickled"),
    [(1, ALL, False), (RANK // 2, ["q_proj", "down_proj"], True), (RANK, ALL, True)],
)
def test_a_published_checkpoint(k, targets, pickled, tmp_path, recwarn):
    """All tensors load, under any adapter name, and PEFT then saves our format."""
    source = adapted(LLAMA.build(), rasa_k=k, target_modules=targets)
    expected = named(source, "default")
    tensors, options = oracle.official_tensors(expected), {"rank": RANK, "k": k, "alpha": 8}
    options |= {"target_modules": targets, "pickled": pickled}
    oracle.write_official(tmp_path / "published", tensors, **options)
    inputs = LLAMA.inputs(0)
    model = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "published")
    model.load_adapter(tmp_path / "published", "again")
    assert not [w for w in recwarn if "issing" in str(w.message) or "keyword" in str(w.message)]
    for name in ("default", "again"):
        found = named(model, name)
        assert found.keys() == expected.keys()
        for layer, adapter in expected.items():
            for left, right in zip(found[layer], adapter, strict=True):
                assert same_bits(left.detach(), right.detach()), layer
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), logits(source, inputs))
    model.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    ours = rasa_ext.load_adapter(LLAMA.build(), tmp_path / "saved").eval()
    assert torch.equal(logits(ours, inputs), logits(source, inputs))


def test_peft_s_card_says_what_a_reader_needs(tmp_path):
    model = tiny()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import rasa_ext.peft") == 1
    assert card.startswith("---\n")
    assert card.index("import rasa_ext.peft") < card.index("# Model Card")
    assert card.index("library_name: peft") < card.index("import rasa_ext.peft")


def test_a_classifiers_head_is_trained_and_saved(tmp_path):
    """load_adapter accepts PEFT's list of usual head names, of which a model has only one."""
    from transformers import LlamaForSequenceClassification

    def build():
        torch.manual_seed(0)
        config = make_model().config
        config.num_labels = 3
        return LlamaForSequenceClassification(config)

    model = adapted(build(), task_type="SEQ_CLS").eval()
    assert isinstance(model, PeftModelForSequenceClassification)
    with torch.no_grad():
        model.base_model.model.score.weight.add_(1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    ours = rasa_ext.load_adapter(build(), tmp_path).eval()
    assert torch.equal(logits(ours), logits(model))


def test_generate():
    model = tiny().eval()
    prompt = TOKENS[:, :4]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(input_ids=prompt, **options)
    assert tokens.shape == (2, 12)
    greedy = model(tokens[:, :-1]).logits[:, 3:].argmax(-1)  # without the KV cache
    running = tokens[:, 4:] != 0
    assert (greedy == tokens[:, 4:])[running].all()
    with model.disable_adapter():
        base = model.generate(input_ids=prompt, **options)
    assert torch.equal(base, make_model().generate(input_ids=prompt, **options))
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=prompt, **options), tokens)
    assert not torch.equal(base, tokens)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_pipe_is_refused_not_waited_for(name, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: expected a file"):
        PeftModel.from_pretrained(make_model(), tmp_path)
