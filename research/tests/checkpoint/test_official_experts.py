"""Checkpoints of the official code over experts, which were single layers in transformers 4."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch

import rasa_ext
from rasa_ext.checkpoint import read_adapter
from rasa_ext.commands.inspection import read_groups
from rasa_ext.patching.state import patch_state
from rasa_research.checkpoint import load_official_experts
from tests.helpers import oracle
from tests.helpers.adapter_folders import changes_in
from tests.helpers.adapters import adapters, same_bits
from tests.helpers.expert_files import build, changes, logits, stacks
from tests.helpers.experts import EXPERTS, HIDDEN, INNER
from tests.helpers.refusals import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*stacked.*untouched", "ignore:groups:")

base = functools.cache(build)
RANK, LAYERS = 4, 2
FOLDERS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
GATE = {"mixtral": "w1", "qwen3_moe": "gate_proj"}
UP = {"mixtral": "w3", "qwen3_moe": "up_proj"}
DOWN = {"mixtral": "w2", "qwen3_moe": "down_proj"}
EVERY = {family: [GATE[family], UP[family], DOWN[family]] for family in FOLDERS}


def official(family, k, parts, layers=range(LAYERS), dtype=torch.float64):
    """Make random adapters by name; adapters with equal paths in all layers share a pool."""
    generator = torch.Generator().manual_seed(5)
    found, pools = {}, {}

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.4

    def make(layer, path, out, width):
        count = k * len(layers)
        if path not in pools:
            pools[path] = (draw(count, width), draw(out, count)) if k else (None, None)
        A_pool, B_pool = pools[path]
        own = RANK - k
        found[f"model.layers.{layer}.{path}"] = oracle.Adapter(
            draw(own, width), A_pool, draw(out, own), B_pool, draw(own + count)
        )

    for layer in layers:
        make(layer, "self_attn.q_proj", HIDDEN, HIDDEN)
        for expert in range(EXPERTS):
            for part in parts:
                shape = (HIDDEN, INNER) if part == DOWN[family] else (INNER, HIDDEN)
                make(layer, f"{FOLDERS[family]}.experts.{expert}.{part}", *shape)
    return found


def write(directory, found, k, targets, dtype="float64", change=lambda tensors: None):
    tensors = oracle.official_tensors(found)
    change(tensors)
    oracle.write_official(directory, tensors, rank=RANK, k=k, alpha=8, target_modules=targets)
    file = directory / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "adapter_dtype": dtype, "rasa_dropout": 0.0}))


def stacked(family, found):
    """Compute dW (E, out, in) of the stacked weights by hand, gate's rows before up's."""
    dW = {name: oracle.delta(adapter) for name, adapter in found.items() if ".experts." in name}
    expected = {}
    for layer in {int(name.split(".")[2]) for name in dW}:
        there = f"model.layers.{layer}.{FOLDERS[family]}.experts"
        here = f"model.layers.{layer}.mlp.experts"
        zeros = torch.zeros(INNER, HIDDEN, dtype=torch.float64)
        halves = [
            torch.cat([dW.get(f"{there}.{e}.{part}", zeros) for part in (GATE[family], UP[family])])
            for e in range(EXPERTS)
        ]
        if any(half.any() for half in halves):
            expected[f"{here}.gate_up_proj"] = torch.stack(halves)
        if f"{there}.0.{DOWN[family]}" in dW:
            expected[f"{here}.down_proj"] = torch.stack(
                [dW[f"{there}.{e}.{DOWN[family]}"] for e in range(EXPERTS)]
            )
    return expected


def assert_loaded(model, family, found):
    expected = stacked(family, found)
    got = changes(model)
    assert got.keys() == expected.keys()
    for name, change in got.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-13, atol=1e-14)
    linears = {name: adapter for name, adapter in found.items() if ".experts." not in name}
    assert adapters(model).keys() == linears.keys()
    for name, adapter in adapters(model).items():
        torch.testing.assert_close(oracle.delta(adapter), oracle.delta(linears[name]))


@pytest.mark.parametrize("k", [0, 1, 2, RANK])
@pytest.mark.parametrize("family", FOLDERS)
def test_every_experts_change_is_the_official_formulas(family, k, tmp_path):
    found = official(family, k, EVERY[family])
    write(tmp_path, found, k, ["q_proj", *EVERY[family]])
    model = copy.deepcopy(base(family))
    assert load_official_experts(model, tmp_path) is model
    assert_loaded(model, family, found)
    own, pooled = RANK - k, k * LAYERS
    for name, stack in stacks(model).items():
        double = 2 if name.endswith("gate_up_proj") else 1
        assert stack.A.shape[1] == double * own
        assert stack.d.shape == (EXPERTS, double * (own + pooled))
        if k:
            assert stack.pool.A.shape[:2] == (EXPERTS, double * pooled)
    first, second = (
        stacks(model)[f"model.layers.{layer}.mlp.experts.down_proj"] for layer in range(LAYERS)
    )
    assert first.pool is second.pool


@pytest.mark.parametrize("k", [0, 1])
def test_outputs_are_those_of_the_merged_model(k, tmp_path):
    found = official("mixtral", k, EVERY["mixtral"])
    write(tmp_path, found, k, ["q_proj", *EVERY["mixtral"]])
    plain = base("mixtral")
    model = load_official_experts(copy.deepcopy(plain), tmp_path)
    merged = copy.deepcopy(plain)
    for name, change in stacked("mixtral", found).items():
        merged.get_parameter(name).data += change.float()
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.q_proj"
        merged.get_parameter(f"{name}.weight").data += oracle.delta(found[name]).float()
    torch.testing.assert_close(logits(model), logits(merged), rtol=0, atol=1e-5)
    assert (logits(plain) - logits(merged)).abs().max() > 0.1


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "w1", "w3"], ["q_proj", "w2"], ["q_proj", "w1", "w2"], ["q_proj", "w3"]],
    ids="-".join,
)
def test_some_of_the_matrices(targets, tmp_path):
    """If only gate or only up is adapted, its ranks are as usual and the other's rows unchanged."""
    found = official("mixtral", 1, targets[1:])
    write(tmp_path, found, 1, targets)
    model = load_official_experts(copy.deepcopy(base("mixtral")), tmp_path)
    assert_loaded(model, "mixtral", found)
    kept = {name for name, _ in getattr(patch_state(model).config, "kept", ())}
    both = {"w1", "w3"} <= set(targets)
    assert kept == {n for n in changes(model) if n.endswith("gate_up_proj") and both}


def test_some_of_the_layers(tmp_path):
    found = official("mixtral", 1, ["w1", "w2", "w3"], layers=[1])
    write(tmp_path, found, 1, r".*layers\.1\.(self_attn\.q_proj|.*experts\.\d+\.w\d)")
    model = load_official_experts(copy.deepcopy(base("mixtral")), tmp_path)
    assert_loaded(model, "mixtral", found)


def test_saved_loaded_and_exported(tmp_path):
    found = official("mixtral", 1, EVERY["mixtral"], dtype=torch.float32)
    write(tmp_path / "official", found, 1, ["q_proj", "w1", "w2", "w3"], dtype="float32")
    model = load_official_experts(copy.deepcopy(base("mixtral")), tmp_path / "official")
    rasa_ext.save_adapter(model, tmp_path / "ours")
    again = rasa_ext.load_adapter(copy.deepcopy(base("mixtral")), tmp_path / "ours")
    trained = sum(p.numel() for p in rasa_ext.adapter_parameters(again))
    groups, _ = read_groups(*read_adapter(tmp_path / "ours"), tmp_path)  # and the integers "slots"
    assert sum(group.parameters for group in groups) == trained
    left, right = again.state_dict(), model.state_dict()
    assert left.keys() == right.keys()
    assert all(same_bits(left[key], right[key]) for key in right)
    rank = rasa_ext.export_lora(again, tmp_path / "lora", expert_layout="per-expert")
    assert rank == 2 * (RANK - 1 + LAYERS)
    written = changes_in(tmp_path / "lora")
    for name, adapter in found.items():
        torch.testing.assert_close(written[name], oracle.delta(adapter), rtol=1e-5, atol=1e-5)


def test_half_precision_checkpoints_become_float32(tmp_path):
    found = official("mixtral", 1, EVERY["mixtral"], dtype=torch.bfloat16)
    write(tmp_path, found, 1, ["q_proj", "w1", "w2", "w3"], dtype="float32")
    model = load_official_experts(copy.deepcopy(base("mixtral")).bfloat16(), tmp_path)
    assert {p.dtype for p in rasa_ext.adapter_parameters(model)} == {torch.float32}
    assert_loaded(model, "mixtral", found)


def test_into_a_patched_model(tmp_path):
    found = official("mixtral", 1, EVERY["mixtral"])
    write(tmp_path, found, 1, ["q_proj", "w1", "w2", "w3"])
    model = load_official_experts(copy.deepcopy(base("mixtral")), tmp_path)
    for parameter in rasa_ext.adapter_parameters(model):
        torch.nn.init.zeros_(parameter)
    load_official_experts(model, tmp_path)
    assert_loaded(model, "mixtral", found)
    other = rasa_ext.patch_model(copy.deepcopy(base("mixtral")), RANK, 1, experts="slot")
    before = Snapshot(other)
    with pytest.raises(ValueError, match=r"method: RasaConfig, GatedRasa.*rasa_ext\.unpatch"):
        load_official_experts(other, tmp_path)
    before.assert_unchanged()


def _drop(key):
    return lambda tensors: tensors.pop(key)


def _shorten(key):
    return lambda tensors: tensors.update({key: tensors[key][1:].clone()})


_W1 = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w1.rasa_"
_POOL = "base_model.rasa_shared_B.block_sparse_moe__experts__3__w2.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_drop(f"{_W1}B.weight"), f"1 missing: {_W1}B.weight"),
        (_drop(f"{_W1}mixing.weight"), f"1 missing: {_W1}mixing.weight"),
        (_drop(_POOL), f"1 missing: {_POOL}"),
        (_shorten(f"{_W1}A.weight"), rf"{_W1}A.weight \(expected \(3, 16\), got \(2, 16\)"),
        (_shorten(_POOL), rf"{_POOL} \(expected \(16, 2\), got \(15, 2\)"),
        (lambda tensors: tensors.update(stray=torch.zeros(2)), "1 unexpected: stray"),
        (
            lambda tensors: tensors.update(
                {_W1.replace("experts.3", "experts.9") + "A.weight": torch.zeros(2)}
            ),
            r"unexpected: .*experts\.9\.w1",
        ),
    ],
)
def test_strict(change, named, tmp_path):
    """Errors use the tensor names of the file."""
    write(tmp_path, official("mixtral", 1, EVERY["mixtral"]), 1, ["q_proj", "w1", "w2", "w3"],
          change=change)  # fmt: skip
    model = copy.deepcopy(base("mixtral"))
    before = Snapshot(model)
    with pytest.raises(ValueError, match=named):
        load_official_experts(model, tmp_path)
    before.assert_unchanged()


def test_a_file_that_adapts_the_router(tmp_path):
    """The router was a linear layer in transformers 4, so the official code could adapt it."""
    found = official("mixtral", 1, EVERY["mixtral"])
    like = found["model.layers.0.self_attn.q_proj"]
    router = {"model.layers.0.block_sparse_moe.gate": like, **found}
    write(tmp_path, router, 1, ["q_proj", "gate", "w1", "w2", "w3"])
    model = copy.deepcopy(base("mixtral"))
    before = Snapshot(model)
    said = r"adapts 'model\.layers\.0\.block_sparse_moe\.gate', the router .*merge this adapter wi"
    with pytest.raises(ValueError, match=said):
        load_official_experts(model, tmp_path)
    before.assert_unchanged()


def test_a_model_of_other_sizes(tmp_path):
    write(tmp_path, official("mixtral", 1, ["w1", "w2", "w3"]), 1, ["q_proj", "w1", "w2", "w3"])
    model = build("mixtral", num_local_experts=EXPERTS + 1)
    with pytest.raises(ValueError, match=r"does not fit the model. .* missing: .*experts\.5\.w1"):
        load_official_experts(model, tmp_path)
