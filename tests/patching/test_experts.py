"""Patching of stacked expert weights: targets, reasons for skipped weights, unpatch, errors."""

import copy
import warnings

import pytest
import torch
from torch import nn

import rasa_ext
from tests.helpers import experts
from tests.helpers.adapters import same_bits
from tests.helpers.expert_files import stacks
from tests.helpers.experts import EXPERTS, FAMILIES, GROUPINGS, HIDDEN, INNER
from tests.helpers.models import EXPERTS as UNMARKED
from tests.helpers.models import LLAMA
from tests.helpers.refusals import Snapshot, refused

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def named(*parts: str) -> list[str]:
    return [f"model.layers.{layer}.{part}" for layer in range(2) for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_takes_every_expert_weight_beside_the_linear_layers(family):
    entry = experts.entry(family)
    base = entry.build()
    gates = [name for name, _ in base.named_modules() if name.endswith("shared_expert_gate")]
    options = {"exclude_modules": gates}
    with warnings.catch_warnings(action="error"):
        model = rasa_ext.patch_model(entry.build(), 3, 1, experts="shared", **options)
    expected = [
        f"{name}.{weight}"
        for name, module in experts.experts_of(base).items()
        for weight in experts.weight_names(module)
    ]
    assert len(expected) == 4
    assert list(stacks(model)) == expected
    linears = [n for n, m in model.named_modules() if isinstance(m, rasa_ext.RasaLinear)]
    assert linears == [n for n in entry.targets(base) if n not in gates]
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "B", "d"}


SOME = [
    ({"target_modules": ["gate_up_proj"]}, named(UP)),
    ({"target_modules": ["experts.down_proj", "q_proj"]}, named(DOWN)),
    ({"target_modules": r".*layers\.1.*experts.*"}, named(UP, DOWN)[2:]),
    ({"exclude_modules": ["down_proj"]}, named(UP)),
    ({"exclude_modules": r".*layers\.0.*"}, named(UP, DOWN)[2:]),
    ({"modules_to_save": ["layers.1.mlp.experts"]}, named(UP, DOWN)[:2]),
]


@pytest.mark.parametrize(("options", "expected"), SOME, ids=str)
def test_some_of_the_expert_weights(options, expected):
    """Other experts compute as before. Only the summary mentions them, no warning does."""
    base = experts.model()
    model = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*untouched")
        rasa_ext.patch_model(model, 3, 1, experts="slot", **options)
    said = rasa_ext.summary(model).skipped
    reasons = {"target_modules": "not named by", "exclude_modules": "named by"}
    reasons["modules_to_save"] = "trained in full, named by"
    for name in set(named(UP, DOWN)) - set(expected):
        assert any(said[name] == f"{reasons[each]} {each}" for each in options)
    assert list(stacks(model)) == expected
    experts.randomize(model)
    inputs = experts.inputs(dtype=torch.float32)
    for name, plain in experts.experts_of(base).items():
        same = torch.equal(model.get_submodule(name)(*inputs), plain(*inputs))
        assert same == (not any(each.startswith(name) for each in expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_argument_a_warning_says_how(family):
    model = experts.model(family)
    said = r"weights of experts, \d\d % of .* stay untouched, .*\(5, .*experts='shared'"
    with pytest.warns(UserWarning, match=said):
        rasa_ext.patch_model(model, 1, 1)
    assert not stacks(model)
    table = str(rasa_ext.summary(model))
    assert table.count("(2 layers): weights of shape (5, ") >= 2
    assert table.count("the argument experts adapts them") == 2


def test_weights_that_do_not_say_how_they_lie():
    base = UNMARKED.build()
    model = copy.deepcopy(base)
    with pytest.warns(UserWarning, match=r"experts\.down_proj \(4, 8, 8\)\.$"):
        rasa_ext.patch_model(model, 2, 1)
    assert not model.experts.down_proj.requires_grad
    assert same_bits(model.experts.down_proj, base.experts.down_proj)
    said = rasa_ext.summary(model).skipped["experts.down_proj"]
    assert said == "weights of shape (4, 8, 8): not a linear layer"
    refused(lambda: rasa_ext.patch_model(base, 2, 1, experts="shared"), base, "^experts: ")


def test_a_model_without_experts():
    model = LLAMA.build()
    refused(lambda: rasa_ext.patch_model(model, experts="slot"), model, "^experts: ")


BAD = [
    ("experts", {"experts": "expert"}),
    ("experts", {"experts": True}),
    ("experts", {"experts": "slot", "target_modules": ["q_proj"]}),
    ("experts", {"experts": "slot", "modules_to_save": ["experts"]}),
    ("target_modules", {"target_modules": ["gate_up_proj"]}),
    (
        "modules_to_save",
        {"target_modules": ["down_proj"], "modules_to_save": ["experts"], "experts": "layer"},
    ),
]


@pytest.mark.parametrize(("argument", "options"), BAD, ids=str)
def test_arguments_that_do_not_fit(argument, options):
    model = experts.model()
    refused(lambda: rasa_ext.patch_model(model, 3, 1, **options), model, f"^{argument}: ")


def parallel(module: nn.Module) -> None:
    module._is_expert_parallel = True


class Params4bit(nn.Parameter):
    """A stand-in for bitsandbytes' class of this name."""


def quantized(module: nn.Module) -> None:
    module.down_proj = Params4bit(module.down_proj.data)


def emptied(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(torch.empty(0, HIDDEN, INNER))


@pytest.mark.parametrize(
    ("change", "said"),
    [(parallel, "gate_up_proj' is spread"), (quantized, "Params4bit"), (emptied, r"\(0, 16, 24\)")],
)
def test_weights_that_cannot_be_adapted(change, said):
    """The error is raised before any change, although earlier weights could be adapted."""
    model = experts.model()
    change(list(experts.experts_of(model).values())[1])
    where = r"^experts: 'model\.layers\.1\.mlp\.experts\."
    refused(lambda: rasa_ext.patch_model(model, 3, 1, experts="slot"), model, where, said)
    with warnings.catch_warnings(action="ignore"):
        skipped = rasa_ext.summary(rasa_ext.patch_model(model, 3, 1)).skipped
    advised = [name for name, reason in skipped.items() if "the argument experts" in reason]
    assert 2 <= len(advised) < 4  # not for weights that it would refuse


def test_a_second_patch():
    model = experts.patched(experts.model(), "slot")
    refused(lambda: rasa_ext.patch_model(model, 3, 1), model, "experts' is a RasaExperts already")


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_gives_the_model_back(family, grouping):
    model = experts.model(family)
    model.get_input_embeddings().requires_grad_(False)
    before = Snapshot(model)
    experts.patched(model, grouping, target_modules="all-linear", rank=1)
    assert rasa_ext.unpatch(model) is model
    before.assert_unchanged()
    rasa_ext.patch_model(model, 1, 1, experts=grouping)


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_summary(grouping, k):
    """Rows, counts and text agree with an independent count."""
    rank, layers = 3, 2
    model = experts.patched(experts.model(), grouping, rank, k)
    found = rasa_ext.summary(model)
    given = {"slot": layers, "layer": EXPERTS, "shared": layers}[grouping] * k
    rows = []
    for name, out, width in ((UP, 2 * INNER, HIDDEN), (DOWN, HIDDEN, INNER)):
        own = EXPERTS * ((rank - k) * (out + width) + rank - k + given)
        pool = given * (out + width) * (EXPERTS if grouping == "slot" else 1)
        pattern = [f"model.layers.*.{name}"]
        each, members = layers * own + pool, layers
        if grouping == "layer":
            pattern = [f"model.layers.{i}.{name}" for i in range(layers)]
            each, members = own + pool, 1
        rows += [(p, members, (out, width), rank - k + given, each, EXPERTS) for p in pattern]
    assert sorted((r.pattern, r.L, r.shape, r.R, r.trainable, r.experts) for r in found) == sorted(
        rows
    )
    total = sum(p.numel() for p in rasa_ext.adapter_parameters(model))
    assert found.adapter == found.trainable == total == sum(row.trainable for row in found)
    assert f"{EXPERTS} x {2 * INNER} x {HIDDEN}" in str(found)
    assert not any("experts" in name for name in found.skipped)


def test_groups_of_ones_own():
    """``groups`` splits pools of "slot" and "shared"; with "layer", layers are separate anyway."""
    options = {"groups": {"first": ["layers.0.mlp.experts.gate_up_proj"]}}
    for grouping, expected in (("shared", 3), ("slot", 3), ("layer", 4)):
        model = experts.patched(experts.model(), grouping, **options)
        found = rasa_ext.summary(model)
        assert len(found) == expected
        first, second = (module.gate_up_proj.pool for module in experts.adapted(model))
        assert first is not second


def test_ranks_of_ones_own():
    config = rasa_ext.RasaConfig(
        3, 1, experts="slot", rank_pattern={r"1\.mlp\.experts\.down_proj": 5}
    )
    model = rasa_ext.patch_model(experts.model(), config=config)
    shapes = [tuple(module.down_proj.A.shape) for module in experts.adapted(model)]
    assert shapes == [(EXPERTS, 2, INNER), (EXPERTS, 4, INNER)]
    (row,) = (r for r in rasa_ext.summary(model) if r.pattern.endswith("down_proj"))
    assert (row.R_min, row.R) == (4, 6)


def test_a_router_that_is_trained_in_full():
    """A router trained in full gets a gradient through the shares of the chosen experts."""
    model = experts.patched(experts.model(), "shared", modules_to_save=["gate"])
    tokens = torch.arange(12).view(2, 6)
    model(tokens, labels=tokens).loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.any()
        assert layer.mlp.experts.base_layer.down_proj.grad is None
    assert len(rasa_ext.summary(model).modules_to_save) == 2


def test_experts_of_two_shapes_have_pools_of_their_own():
    both = {"a": experts.model(), "b": experts.model("qwen3_moe", num_experts=6)}
    model = nn.ModuleDict(both)
    rasa_ext.patch_model(model, 3, 1, experts="shared", target_modules=["gate_up_proj"])
    assert [(row.L, row.experts) for row in rasa_ext.summary(model)] == [(2, 5), (2, 6)]
