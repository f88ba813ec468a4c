"""Exports of adapted experts: each layout against dense weight changes."""

import copy
import functools
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rasa_ext
from rasa_ext.checkpoint.expert_names import _FAMILIES, _STACKED
from tests.helpers import oracle
from tests.helpers.adapter_folders import changes_in, read
from tests.helpers.adapters import adapters, content
from tests.helpers.expert_files import FAMILIES, RANK, adapted, build, changes, logits
from tests.helpers.experts import BESIDE, EXPERTS, INNER
from tests.helpers.oracle import delta
from tests.helpers.peft import load_in_peft
from tests.helpers.refusals import refused

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing", "ignore:.*_pattern keys did not match"
)

base = functools.cache(build)
MATRICES = {
    "mixtral": ("block_sparse_moe", {"w1": slice(0, INNER), "w3": slice(INNER, None)}, "w2"),
    "qwen3_moe": (
        "mlp",
        {"gate_proj": slice(0, INNER), "up_proj": slice(INNER, None)},
        "down_proj",
    ),
    "gpt_oss": ("mlp", {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}, "down_proj"),
    "nemotron_h": ("mixer", {"up_proj": slice(None)}, "down_proj"),
}
"""By hand: where experts are in checkpoints, and which rows of a stacked weight are whose."""
POOL_ONLY = {"experts": "shared", "k": RANK}


def export(directory, model, **options):
    rasa_ext.export_lora(model, directory, **options)
    return read(directory)


def single(family, model):
    """Return dW of each expert's matrices, by their names in a checkpoint."""
    folder, rows, down = MATRICES[family]
    found = {}
    for name, change in changes(model).items():
        path = name.rpartition(".")[0].replace(".mlp.", f".{folder}.")
        parts = {down: slice(None)} if name.endswith("down_proj") else rows
        for expert, each in enumerate(change):
            found.update({f"{path}.{expert}.{part}": each[at] for part, at in parts.items()})
    return found


def linear_changes(model):
    return {name: delta(adapter) for name, adapter in adapters(model).items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, change in found.items():
        torch.testing.assert_close(change.double(), expected[name], rtol=1e-5, atol=1e-5)


def wrappers(loaded):
    """Return the plain-model names of the stacked parameters that PEFT adapts."""
    return {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in loaded.base_model.model.named_modules()
        if hasattr(module, "parameter_name") and module.parameter_name != "weight"
    }


@pytest.mark.parametrize("grouping", ["slot", "layer", "shared"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_peft_computes_the_adapter(family, grouping, tmp_path, figure):
    plain = base(family)
    model = adapted(plain, grouping)
    config, _ = export(tmp_path, model, expert_layout="peft", rank=8)  # padded with zeros
    assert config["r"] == config["lora_alpha"] == 8
    up = "up_proj" if family == "nemotron_h" else "gate_up_proj"
    stacked = [n for n in config["target_parameters"] if not n.endswith(".weight")]
    assert [name.rpartition(".")[2] for name in stacked] == [up, "down_proj"]
    loaded = load_in_peft(plain, tmp_path)
    assert wrappers(loaded) == set(changes(model))
    found, expected = logits(loaded), logits(model)
    oracle.assert_close(found, expected, oracle.rounding(loaded, logits))
    difference = (found - expected).abs().max().item()
    assert (logits(plain) - expected).abs().max() > 1e-2
    figure(f"experts of {family} {grouping} in PEFT: difference of logits {difference:.1e}")


@pytest.mark.filterwarnings("ignore:.*stay untouched", "ignore:.*in target_parameters")
@pytest.mark.parametrize(
    ("family", "grouping"),
    [*((family, None) for family in BESIDE), ("deepseek_v3", "shared"), ("qwen2_moe", "shared")],
)
def test_peft_computes_the_adapter_of_linear_mlps_beside_the_experts(family, grouping, tmp_path):
    """PEFT would mistake their names in target_modules for the former names of experts."""
    plain = build(family, beside=True)
    model = adapted(plain, grouping)
    _, tensors = export(tmp_path, model, expert_layout=grouping and "peft")
    linears = linear_changes(model).keys()
    assert any(name.endswith(("down_proj", "w2")) for name in linears)
    assert {f"base_model.model.{name}.lora_A.weight" for name in linears} <= tensors.keys()
    loaded = load_in_peft(plain, tmp_path)
    expected = logits(model)
    oracle.assert_close(logits(loaded), expected, oracle.rounding(loaded, logits))
    assert (logits(plain) - expected).abs().max() > 1e-1


@pytest.mark.filterwarnings("ignore:.*stay untouched")
def test_sglang_is_told_of_linear_mlps_that_stand_as_parameters(tmp_path):
    """SGLang allocates buffers only for target_modules, so layouts for servers use that field."""
    model = adapted(build("deepseek_v3", beside=True), None)
    with pytest.warns(UserWarning, match="in target_parameters.*--lora-target-modules all"):
        config, _ = export(tmp_path, model)
    assert "gate_proj" not in config["target_modules"]
    model = adapted(build("deepseek_v3", beside=True), "shared")
    config, _ = export(tmp_path, model, expert_layout="per-expert")
    assert "gate_proj" in config["target_modules"]
    assert "target_parameters" not in config


SOME = [
    (["gate_up_proj"], ["gate_up_proj"]),
    (["down_proj", "q_proj"], ["down_proj"]),
    (r".*layers\.0\..*", ["0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj"]),
    (r".*layers\.1\.mlp\.experts\.down_proj", ["1.mlp.experts.down_proj"]),
]


@pytest.mark.parametrize(("targets", "parameters"), SOME, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_peft_with_some_of_the_weights(family, targets, parameters, tmp_path):
    """If only one of two weights is adapted, its keys contain no base_layer."""
    plain = base(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about untouched weights and other readers
        model = adapted(plain, target_modules=targets)
        config, tensors = export(tmp_path, model, expert_layout="peft")
    assert config["target_parameters"] == parameters
    both = len({name.rpartition(".")[2] for name in parameters}) == 2
    assert any(".base_layer." in key for key in tensors) == both
    loaded = load_in_peft(plain, tmp_path)
    assert wrappers(loaded) == set(changes(model))
    oracle.assert_close(logits(loaded), logits(model), oracle.rounding(loaded, logits))


@pytest.mark.parametrize("grouping", ["slot", "layer", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*stack its experts")
def test_single_experts(family, grouping, tmp_path):
    """Gate and up have one A, which SGLang expects."""
    model = adapted(base(family), grouping)
    _, tensors = export(tmp_path, model, expert_layout="per-expert")
    assert_close(changes_in(tmp_path), {**linear_changes(model), **single(family, model)})
    gate, up = {"mixtral": ("w1", "w3")}.get(family, ("gate_proj", "up_proj"))
    for key in [key for key in tensors if f".{gate}.lora_A" in key]:
        assert torch.equal(tensors[key], tensors[key.replace(f".{gate}.", f".{up}.")])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_single_experts_are_what_peft_converts(family, tmp_path):
    """PEFT converts them like LoRAs of transformers 4: stacked, with twice the rank."""
    from peft import PeftModel

    plain = base(family)
    model = adapted(plain)
    rasa_ext.export_lora(model, tmp_path, expert_layout="per-expert")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert wrappers(loaded) == set(changes(model))
    oracle.assert_close(logits(loaded), logits(model), oracle.rounding(loaded, logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_share_their_outer_sides(family, tmp_path):
    model = adapted(base(family), **POOL_ONLY)
    _, tensors = export(tmp_path, model, expert_layout="shared-outer")
    folder, rows, _ = MATRICES[family]
    expected = linear_changes(model)
    for name, change in changes(model).items():
        path, _, part = name.replace(".mlp.", f".{folder}.").rpartition(".")
        if family == "gpt_oss" and part == "gate_up_proj":  # whose rows take turns
            expected.update({f"{path}.{each}": change[:, at] for each, at in rows.items()})
        else:
            expected[f"{path}.{part}"] = change
    assert_close(changes_in(tmp_path), expected)
    outer = {key: t.shape[0] for key, t in tensors.items() if t.dim() == 3}
    for key, count in outer.items():
        shared = key.endswith("A.weight") != ("down_proj" in key)
        assert count == (1 if shared else EXPERTS)
    assert len(outer) == 2 * (3 if family == "gpt_oss" else 2) * 2
    whole = rasa_ext.export_size(model, expert_layout="peft")
    assert rasa_ext.export_size(model, expert_layout="shared-outer") < whole


ONE_WEIGHT = {"target_modules": r".*\.experts\.down_proj"}
BESIDE_ONE = "down_proj is adapted without the other weight .*vLLM and llama.cpp"
WARNED = [
    ("qwen3_moe", {}, None, "PEFT's layout.*vLLM.*misreads.*layout='per-expert'"),
    ("gpt_oss", {}, "per-expert", "stack its experts.*layout='peft'.*llama.cpp"),
    ("mixtral", ONE_WEIGHT, "peft", BESIDE_ONE),
    ("mixtral", ONE_WEIGHT, "per-expert", BESIDE_ONE),
]


@pytest.mark.parametrize(("family", "options", "layout", "said"), WARNED)
@pytest.mark.filterwarnings("ignore:.*stay untouched", "ignore:groups")
def test_what_servers_misread_or_refuse_is_warned_of(family, options, layout, said, tmp_path):
    model = adapted(base(family), **options)
    with pytest.warns(UserWarning, match=said):
        rasa_ext.export_lora(model, tmp_path, expert_layout=layout)


class OnMeta(TorchDispatchMode):
    """A mode that fails if an operator allocates memory for a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            assert made.is_meta or made.data_ptr() == args[0].data_ptr(), function
        return made


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("layout", ["peft", "per-expert", "shared-outer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_is_that_of_the_file(family, layout, rank, tmp_path):
    options = POOL_ONLY if layout == "shared-outer" else {"experts": "layer"}
    model = adapted(base(family).to(torch.float32), modules_to_save=["norm"], **options)
    with OnMeta():
        size = rasa_ext.export_size(model, rank=rank, expert_layout=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, tensors = export(tmp_path, model, rank=rank, expert_layout=layout, allow_dropped=True)
    assert size == sum(tensor.nbytes for tensor in tensors.values())


def test_a_lower_rank_is_refused(tmp_path):
    """A higher rank loses nothing and is accepted."""
    model = adapted(base("mixtral"), experts="layer")
    effective = export(tmp_path / "whole", model, expert_layout="peft")[0]["r"]
    assert rasa_ext.export_error(model, effective).error == 0
    for call in (
        lambda: rasa_ext.export_error(model, effective - 1),
        lambda: rasa_ext.export_lora(model, tmp_path, rank=effective - 1, expert_layout="peft"),
    ):
        with pytest.raises(ValueError, match=r"^rank: expected at least"):
            call()


@pytest.mark.parametrize("layout", ["peft", "per-expert", "shared-outer"])
def test_half_precision_bases_export_in_float32(layout, tmp_path, recwarn):
    """A layout that is asked for is not warned of."""
    model = adapted(copy.deepcopy(base("mixtral")).bfloat16(), **POOL_ONLY)
    recwarn.clear()
    _, tensors = export(tmp_path, model, expert_layout=layout)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_ranks_of_single_weights(tmp_path):
    """All weights are exported at one rank; lower ranks are padded with zeros."""
    ranks = {r"layers\.1\.mlp\.experts\.down_proj": 5}
    config = rasa_ext.RasaConfig(rank=RANK, k=1, experts="slot", rank_pattern=ranks)
    model = rasa_ext.patch_model(copy.deepcopy(base("mixtral")), config=config)
    for parameter in rasa_ext.adapter_parameters(model):
        torch.nn.init.normal_(parameter)
    config, _ = export(tmp_path, model, expert_layout="per-expert")
    assert config["r"] == 5 - 1 + 2
    assert_close(changes_in(tmp_path), {**linear_changes(model), **single("mixtral", model)})


BAD = [
    (3, {}, "expert_layout: expected 'peft' or 'per-expert' or 'shared-outer', got 3"),
    ("shared-outer", {"experts": "shared", "k": 1}, "expert_layout: .*k = rank"),
    ("shared-outer", {"experts": "slot", "k": RANK}, "expert_layout: expected experts that"),
    ("peft", {"experts": None}, "expert_layout: expected a model with adapted experts"),
]


@pytest.mark.parametrize(("layout", "options", "said"), BAD)
@pytest.mark.filterwarnings("ignore:.*stay untouched")
def test_bad_layouts(layout, options, said, tmp_path):
    model = adapted(base("mixtral"), **options)
    for call in (
        lambda: rasa_ext.export_lora(model, tmp_path, expert_layout=layout),
        lambda: rasa_ext.export_size(model, expert_layout=layout),
    ):
        refused(call, model, said)
    assert not content(tmp_path)


@pytest.mark.parametrize("kind", _FAMILIES)
def test_names_of_checkpoints_are_transformers_own(kind):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    inside, outside, names = _FAMILIES[kind]
    found = get_checkpoint_conversion_mapping(kind)
    sources = [
        pattern.removesuffix(".weight").rpartition(".")[2]
        for each in found
        if isinstance(each, WeightConverter)
        for pattern in each.source_patterns
        if ".experts." in pattern
    ]
    assert tuple(sources) == names
    renamed = {
        tuple(side[0].replace("\\", "") for side in (each.source_patterns, each.target_patterns))
        for each in found
        if not isinstance(each, WeightConverter)
    }
    pairs = {(outside, inside), (f"{outside}experts.", f"{inside}experts.")}
    assert bool(pairs & renamed) == bool(outside)


@pytest.mark.parametrize("kind", sorted(_STACKED))
def test_checkpoints_that_stack_experts_are_known(kind, tmp_path):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for each in (kind, kind.removesuffix("_text")):
        for found in get_checkpoint_conversion_mapping(each) or []:
            assert not any(".experts.*" in pattern for pattern in found.source_patterns)
    model = adapted(base("mixtral"))
    for _, module in model.named_modules():
        if hasattr(module, "is_concatenated"):
            module.config.model_type = kind
    with pytest.warns(UserWarning, match="own checkpoints stack its experts"):
        rasa_ext.export_lora(model, tmp_path, expert_layout="per-expert")
