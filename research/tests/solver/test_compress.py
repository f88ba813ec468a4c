"""compress makes adapters from full fine-tunings, and reads the weights one by one."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rasa_ext
from rasa_research import solver
from tests.helpers import oracle
from tests.helpers.adapters import adapters
from tests.helpers.models import BERT, FAMILIES, GPT2, LLAMA, SEQUENTIAL, TIED, ids
from tests.helpers.tiny_lm import make_model


def finetuned(entry, base, others=True, rank=3, seed=0):
    """Copy a model, add matrices of ``rank`` to its linear layers and noise to the rest."""
    g = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base)
    targets = entry.targets(base)
    with torch.no_grad():
        for name in targets:
            weight = model.get_submodule(name).weight
            left, right = (torch.randn(n, rank, generator=g) for n in weight.shape)
            weight.add_(0.05 * left @ right.T)
        if others:
            for name, parameter in model.named_parameters():
                owner, _, kind = name.rpartition(".")
                if owner not in targets or kind == "bias":
                    parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return model


def deltas(entry, base, changed):
    """Return finetuned - base by layer, (out, in) float64."""
    found = {}
    for name in entry.targets(base):
        before, after = base.get_submodule(name), changed.get_submodule(name)
        change = after.weight.detach().double() - before.weight.detach().double()
        found[name] = change.T if oracle.is_transposed(before) else change
    return found


def outside(entry, base, changed):
    """Return {name: ||change||} of the parameters that are not weights of adapted layers."""
    adapted = {f"{name}.weight" for name in entry.targets(base)}
    after = dict(changed.named_parameters())
    return {
        name: (after[name] - parameter).norm().item()
        for name, parameter in base.named_parameters()
        if name not in adapted and not torch.equal(after[name], parameter)
    }


def on_meta(entry):
    with torch.device("meta"):
        return entry.make()


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("entry", [*FAMILIES, SEQUENTIAL], ids=ids)
def test_it_is_the_fit_of_the_changes_and_tells_what_is_lost(entry, k, tmp_path):
    base = entry.build()
    changed = finetuned(entry, base, rank=9)
    skeleton = on_meta(entry)
    modules = {name: id(module) for name, module in skeleton.named_modules()}
    found = solver.compress(skeleton, base.state_dict(), changed.state_dict(), 4, k, iterations=6)
    assert {name: id(module) for name, module in skeleton.named_modules()} == modules
    targets = deltas(entry, base, changed)
    fitted = copy.deepcopy(base)
    expected = solver.fit_adapter(fitted, targets, 4, k, iterations=6)
    for group, result in found.groups.items():
        assert result.errors == pytest.approx(expected[group].errors, abs=1e-12)
        assert result.lora_error == pytest.approx(expected[group].lora_error, abs=1e-12)
    equal = sum(result.lora_error_equal * result.norm**2 for result in expected.values())
    total = sum(d.square().sum().item() for d in targets.values())
    found.save(skeleton, tmp_path)
    model = rasa_ext.load_adapter(copy.deepcopy(base), tmp_path)
    made = {name: oracle.delta(adapter) for name, adapter in adapters(model).items()}
    rest = sum((targets[name] - made[name]).square().sum().item() for name in targets)
    assert made.keys() == targets.keys()
    assert found.error == pytest.approx(rest / total, abs=1e-6)
    tails = (torch.linalg.svdvals(d)[4:].square().sum().item() for d in targets.values())
    assert found.lora_error == pytest.approx(sum(tails) / total, abs=1e-12)
    assert found.lora_error_equal == pytest.approx(equal / total, abs=1e-12)
    lost = outside(entry, base, changed)
    assert {name: each.change for name, each in found.lost.items()} == pytest.approx(lost, rel=1e-4)
    squares = sum(change**2 for change in lost.values())
    assert found.residual_share == pytest.approx(squares / (squares + total), rel=1e-4)
    assert found.num_parameters == sum(p.numel() for p in rasa_ext.adapter_parameters(model))
    plain = rasa_ext.patch_model(copy.deepcopy(base), 4, 0)
    without_d = (p for p in rasa_ext.adapter_parameters(plain) if p.dim() == 2)
    assert found.lora_num_parameters == sum(p.numel() for p in without_d)


@pytest.mark.parametrize("entry", [LLAMA, GPT2, TIED], ids=ids)
def test_with_what_else_changed_the_adapter_is_the_whole_fine_tuning(entry, tmp_path):
    """At the rank of the changes, with norms, embeddings and head in full, nothing is lost."""
    base = entry.build()
    changed = finetuned(entry, base)
    with torch.no_grad():  # an adapter cannot store biases of adapted layers
        for name in entry.targets(base):
            if (bias := base.get_submodule(name).bias) is not None:
                changed.get_submodule(name).bias.copy_(bias)
    weights = base.state_dict(), changed.state_dict()
    found = solver.compress(on_meta(entry), *weights, 4, 1, modules_to_save="changed")
    assert not found.lost
    assert found.residual_share == 0
    assert found.error < 1e-10
    found.save(on_meta(entry), tmp_path)
    loaded = rasa_ext.load_adapter(copy.deepcopy(base), tmp_path)
    installed = found.install(copy.deepcopy(base))
    inputs = entry.inputs(0)
    with torch.no_grad():
        expected, before = (entry.loss(m.eval(), inputs)[0] for m in (changed, base))
        for model in (loaded, installed):
            torch.testing.assert_close(
                entry.loss(model.eval(), inputs)[0], expected, rtol=1e-4, atol=1e-4
            )
    assert (expected - before).abs().max() > 1e-2


def test_some_of_what_changed_is_kept():
    base = LLAMA.build()
    changed = finetuned(LLAMA, base)
    weights = base.state_dict(), changed.state_dict()
    found = solver.compress(base, *weights, 4, 1, modules_to_save=["norm"], iterations=0)
    assert found.plan.modules_to_save == ("model.norm",)
    assert torch.equal(
        found.tensors["base_model.model.model.norm.weight"], changed.model.norm.weight
    )
    assert found.lost.keys() == outside(LLAMA, base, changed).keys() - {"model.norm.weight"}


def test_biases_of_adapted_layers_are_lost_whatever_is_kept():
    base = BERT.build()
    changed = finetuned(BERT, base)
    weights = base.state_dict(), changed.state_dict()
    found = solver.compress(base, *weights, 2, 1, modules_to_save="changed", iterations=0)
    assert found.lost.keys() == {f"{name}.bias" for name in BERT.targets(base)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    base = LLAMA.build().to(dtype)
    changed = finetuned(LLAMA, base)
    found = solver.compress(
        on_meta(LLAMA), base.state_dict(), changed.state_dict(), 4, 1, dtype=torch.float32
    )
    targets = deltas(LLAMA, base, changed)
    total = sum(d.square().sum().item() for d in targets.values())
    tails = (torch.linalg.svdvals(d)[4:].square().sum().item() for d in targets.values())
    assert found.lora_error == pytest.approx(sum(tails) / total, abs=1e-5)
    assert {t.dtype for key, t in found.tensors.items() if ".rasa_" in key} == {torch.float32}


class Watched(Mapping):
    """A mapping that returns copies of tensors and counts their elements that are in use."""

    def __init__(self, tensors):
        self.tensors, self.alive, self.most = tensors, 0, 0

    def __getitem__(self, key):
        tensor = self.tensors[key].clone()
        self.alive += tensor.numel()
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._gone, tensor.numel())
        return tensor

    def _gone(self, numel):
        self.alive -= numel

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_one_weight_of_each_model_is_held_at_a_time():
    base = LLAMA.build()
    weights = Watched(base.state_dict()), Watched(finetuned(LLAMA, base).state_dict())
    solver.compress(on_meta(LLAMA), *weights, 4, 1, iterations=1)
    largest = max(p.numel() for p in base.parameters())
    assert all(0 < each.most <= largest for each in weights)


def save_shards(model, directory, drop="", skip=()):
    """Write a sharded checkpoint in the format of the Hub by hand."""
    import json

    state = {k.removeprefix(drop): v for k, v in model.state_dict().items() if k not in skip}
    directory.mkdir()
    index = {}
    for i, key in enumerate(state):
        name = f"model-{i % 3}.safetensors"
        index[key] = name
    for name in set(index.values()):
        save_file({k: state[k].clone() for k in state if index[k] == name}, directory / name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("entry", "drop", "skip"),
    [(LLAMA, "", ()), (GPT2, "transformer.", ("lm_head.weight",)), (TIED, "", ("embed.weight",))],
    ids=["as saved", "without the prefix", "tied under the other name"],
)
def test_folders(entry, drop, skip, tmp_path):
    base = entry.build()
    changed = finetuned(entry, base)
    folders = [
        solver.SafetensorsFolder(save_shards(model, tmp_path / name, drop, skip))
        for name, model in (("base", base), ("changed", changed))
    ]
    found = solver.compress(on_meta(entry), *folders, 2, 1, iterations=2)
    weights = base.state_dict(), changed.state_dict()
    expected = solver.compress(on_meta(entry), *weights, 2, 1, iterations=2)
    assert found.error == pytest.approx(expected.error, abs=1e-12)
    assert found.lost == expected.lost
    assert len(folders[0]) == len(base.state_dict()) - len(skip)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
        solver.SafetensorsFolder(tmp_path)
    folder = save_shards(LLAMA.build(), tmp_path / "m")
    (folder / "model-1.safetensors").write_bytes(b"damaged")
    weights = solver.SafetensorsFolder(folder)
    broken = next(key for i, key in enumerate(weights) if i % 3 == 1)
    with pytest.raises(ValueError, match=r"model-1\.safetensors: damaged or cut"):
        weights[broken]
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors, but it is missing"):
        weights[broken]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        "{}",
        '{"weight_map": [1]}',
        '{"weight_map": {"x": 1}}',
        '{"weight_map": {"x": "../model.safetensors"}}',
        '{"weight_map": {"x": "/model.safetensors"}}',
    ],
    ids=lambda text: text[:40],
)
def test_an_index_of_another_form_is_refused(text, tmp_path):
    """An index must be a weight_map of files in its own folder."""
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: expected a weight_map.*files in its"):
        solver.SafetensorsFolder(tmp_path)


def test_a_tensor_that_its_shard_has_not(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "one")
    index = {"weight_map": {"x": "one", "y": "one"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = solver.SafetensorsFolder(tmp_path)
    assert weights["x"].shape == (1,)
    with pytest.raises(ValueError, match="one: expected a tensor y"):
        weights["y"]


def widened(weights):
    weights["model.embed_tokens.weight"] = torch.ones(33, 24)


def holed(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def quantized(weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(40, 24, dtype=torch.int8)


def spoiled(weights):
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (widened, ValueError, r"finetuned: expected model\.embed_tokens\.weight .* \(33, 24\)"),
        (holed, ValueError, r"finetuned: expected the weights .* 1 are missing: .*1\.mlp\.up_proj"),
        (quantized, TypeError, r"finetuned: expected floating-point .*up_proj.*int8"),
        (spoiled, ValueError, "finite"),
    ],
)
def test_fine_tunings_that_do_not_fit(spoil, error, message):
    base = LLAMA.build()
    changed = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    spoil(changed)
    with pytest.raises(error, match=message):
        solver.compress(base, base.state_dict(), changed, 2, 1, iterations=0)


def test_a_head_that_is_tied_in_the_model_only():
    base = TIED.build()
    changed = dict(base.state_dict())
    changed["readout.weight"] = changed["readout.weight"] + 1
    with pytest.raises(ValueError, match="finetuned: expected equal weights for embed"):
        solver.compress(base, base.state_dict(), changed, 2, 1)


def test_a_saved_module_without_a_value():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    base = Counter()
    weights = dict(base.named_parameters())
    with pytest.raises(ValueError, match=r"finetuned: expected a value for norm\.running_mean"):
        solver.compress(base, weights, weights, 2, 1, modules_to_save=["norm"])
    state = base.state_dict()
    found = solver.compress(base, state, state, 2, 1, modules_to_save=["norm"])
    assert "base_model.model.norm.running_mean" in found.tensors


def test_a_fine_tuning_that_changed_nothing(tmp_path):
    base = LLAMA.build()
    found = solver.compress(base, base.state_dict(), base.state_dict(), 2, 1, iterations=2)
    assert (found.error, found.lora_error, found.lost, found.residual_share) == (0, 0, {}, 0)
    found.save(base, tmp_path)
    assert all(
        t.isfinite().all() for t in load_file(tmp_path / "adapter_model.safetensors").values()
    )


def test_a_patched_model_is_refused():
    base = LLAMA.build()
    weights = base.state_dict()
    with pytest.raises(ValueError, match="already"):
        solver.compress(rasa_ext.patch_model(base), weights, weights)


def test_a_compressed_adapter_has_a_card(tmp_path):
    base = make_model()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    found = solver.compress(base, base.state_dict(), tuned.state_dict(), 4, 1, iterations=1)
    found.save(base, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| `model.layers.*.mlp.down_proj` | 2 | 32 x 48 | 5 |" in card
