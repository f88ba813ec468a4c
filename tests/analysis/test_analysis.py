"""Spectra and pool use, against dense weight changes and values computed by hand."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rasa_ext
from rasa_ext import methods
from rasa_ext.analysis import analyze, analyze_adapter, analyze_lora
from tests.helpers import oracle
from tests.helpers.adapters import adapters, patched
from tests.helpers.cli import invoke
from tests.helpers.expert_files import adapted, build, of_experts, stacks
from tests.helpers.models import FAMILIES, LLAMA, TIED, ids
from tests.helpers.outside import VeraConfig


def linear(entry, k):
    return patched(entry.build(), 3, k)


def mixture(family, grouping, k):
    return adapted(base(family), grouping, k)


def name_of(make) -> str:
    first, *others = make.args
    return ", ".join([getattr(first, "name", first), *others])


base = functools.cache(build)
MODELS = [functools.partial(linear, entry) for entry in FAMILIES]
MODELS += [
    functools.partial(mixture, family, grouping)
    for family in ("mixtral", "gpt_oss")
    for grouping in ("slot", "layer", "shared")
]


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("make", MODELS, ids=name_of)
def test_agrees_with_the_dense_changes(make, k, tmp_path):
    model = make(k)
    rasa_ext.save_adapter(model, tmp_path)
    groups = analyze(model)
    plan = [(row.pattern, row.L, row.shape, row.experts) for row in rasa_ext.summary(model)]
    assert [(g.pattern, len(g.weights), g.shape, g.experts) for g in groups] == plan
    found = {(layer.name, layer.expert): layer for g in groups for layer in g.layers}
    expected = {(name, None): adapter for name, adapter in adapters(model).items()}
    for name, stack in stacks(model).items():
        expected |= {(name, i): each for i, each in enumerate(of_experts(stack))}
    assert found.keys() == expected.keys()
    for key, adapter in expected.items():
        check(found[key], adapter)
    for group in groups:
        assert all(len(of) == (group.experts or 1) for of in group.weights)
        assert group.pool_use.tolist() == [layer.pool_use.tolist() for layer in group.layers]
    of_file = {(layer.name, layer.expert): layer for layer in layers_in(tmp_path)}
    assert of_file.keys() == found.keys()
    for key, layer in found.items():
        assert torch.equal(of_file[key].singular_values, layer.singular_values)
        assert torch.equal(of_file[key].pool_use, layer.pool_use)


def check(layer, adapter):
    """Compare a layer's figures with its dense weight change."""
    down, up, d = adapter.stacked()
    change = oracle.delta(adapter)
    S = torch.linalg.svdvals(change)[: len(layer.singular_values)]
    assert len(S) == min(len(d), *change.shape)
    torch.testing.assert_close(layer.singular_values, S)
    assert layer.norm == pytest.approx(change.norm().item())
    p = S / S.sum()
    p = p[p > 0]
    assert layer.effective_rank == pytest.approx(math.exp(-(p * p.log()).sum().item()))
    own = adapter.A.shape[0]
    private = ((up[:, :own] * d[:own]) @ down[:own]).square().sum()
    pooled = ((up[:, own:] * d[own:]) @ down[own:]).square().sum()
    assert layer.private_share == pytest.approx((private / (private + pooled)).item())
    one_by_one = [(up[:, [j]] * d[j] @ down[[j]]).norm().item() for j in range(own, len(d))]
    assert layer.pool_use.tolist() == pytest.approx(one_by_one)


def layers_in(folder):
    return [layer for group in analyze_adapter(folder) for layer in group.layers]


def test_layers_of_a_file_stand_in_the_models_order(tmp_path):
    layers = [torch.nn.Linear(3, 3) for _ in range(12)]
    model = patched(torch.nn.Sequential(*layers), 2, 1)
    rasa_ext.save_adapter(model, tmp_path)
    (group,) = analyze_adapter(tmp_path)
    assert [layer.name for layer in group.layers] == [str(i) for i in range(12)]
    assert torch.equal(group.pool_use, analyze(model)[0].pool_use)


def test_effective_rank_and_slots_by_hand():
    model = rasa_ext.patch_model(
        torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(2)]), 3, 1
    )
    one, two = model
    with torch.no_grad():
        for layer in model:
            layer.A.copy_(torch.eye(6)[:2])
            layer.B.copy_(torch.eye(6)[:, :2])
        one.pool.A.copy_(2 * torch.eye(6)[2:4])
        one.pool.B.copy_(torch.eye(6)[:, 2:4])
        one.d.copy_(torch.tensor([1.0, 1.0, 0.5, -0.5]))
        two.d.copy_(torch.tensor([0.0, 0.0, 3.0, 0.0]))
    (group,) = analyze(model)
    first, second = group.layers
    assert first.effective_rank == pytest.approx(4)
    assert first.private_share == pytest.approx(0.5)
    assert first.slots_used == pytest.approx(2)
    assert second.effective_rank == pytest.approx(1)
    assert second.private_share == 0
    assert second.slots_used == pytest.approx(1)
    assert group.pool_use.tolist() == [[1.0, 1.0], [6.0, 0.0]]


class Undiagonal(rasa_ext.RasaConfig):
    """A method without a diagonal, which means a diagonal of ones."""

    def factors(self, own, pool, place):
        return super().factors(own, pool, place)._replace(d=None)


@pytest.mark.parametrize("k", [0, 1])
def test_no_diagonal_is_one_of_ones(k):
    layers = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(2)])
    model = rasa_ext.patch_model(layers, config=Undiagonal(rank=3, k=k))
    for parameter in rasa_ext.adapter_parameters(model):
        torch.nn.init.normal_(parameter)
    (group,) = analyze(model)
    for found, (_, dW) in zip(group.layers, rasa_ext.delta_weights(model), strict=True):
        S, eps = torch.linalg.svdvals(dW.double()), torch.finfo(dW.dtype).eps
        error = ((torch.linalg.svdvals(dW) - S).abs().max() + eps * S[0]).item()
        oracle.assert_close(found.singular_values, S[: len(found.singular_values)], error)
        assert found.pool_use.shape == (2 * k,)


def test_an_untrained_adapter_has_rank_zero():
    for layer in analyze(rasa_ext.patch_model(LLAMA.build(), 4, 1))[0].layers:
        assert (layer.effective_rank, layer.private_share, layer.slots_used) == (0, 0, 0)
        assert layer.norm == 0


WIDE = torch.nn.Sequential(*[torch.nn.Linear(300, 400) for _ in range(2)])


@pytest.mark.parametrize(
    "make", [lambda: patched(WIDE, 3, 1), lambda: adapted(base("mixtral"), "slot")]
)
def test_no_out_x_in_matrix_is_formed(make, monkeypatch):
    model, shapes, svdvals = make(), [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda t: shapes.append(t.shape) or svdvals(t))
    analyze(model)
    assert shapes
    assert max(max(shape) for shape in shapes) <= 4


def test_what_is_not_an_adapter_or_no_lora(tmp_path):
    invoke("inspect", "--spectrum", tmp_path, code=1)
    with pytest.raises(FileNotFoundError, match="is missing"):
        analyze_lora(tmp_path)
    rasa_ext.export_lora(patched(LLAMA.build()), tmp_path)
    with pytest.raises(ValueError, match="convert this LoRA with"):
        analyze_adapter(tmp_path)
    rasa_ext.save_adapter(patched(LLAMA.build()), tmp_path)
    with pytest.raises(ValueError, match="expected peft_type 'LORA'"):
        analyze_lora(tmp_path)
    with pytest.raises(ValueError, match="unpatched"):
        analyze(LLAMA.build())


@pytest.fixture(
    params=[
        rasa_ext.RasaConfig(rank=4, k=1, rank_pattern={r"layers\.0\..*": 1, "v_proj": 6}),
        methods.LoraConfig(rank=3, alpha=12),
    ],
    ids=lambda config: config.method,
)
def config(request) -> methods.AdapterConfig:
    return request.param


def test_a_file_is_analyzed_by_its_method(config, tmp_path):
    model = rasa_ext.patch_model(LLAMA.build(), config=config)
    for parameter in rasa_ext.adapter_parameters(model):
        torch.nn.init.normal_(parameter)
    rasa_ext.save_adapter(model, tmp_path)
    found = {layer.name: layer for layer in layers_in(tmp_path)}
    for name, change in rasa_ext.delta_weights(model):
        S = torch.linalg.svdvals(change.double())
        layer = found.pop(name)
        values = layer.singular_values
        torch.testing.assert_close(values, S[: len(values)], rtol=1e-4, atol=1e-4)
        assert layer.norm == pytest.approx(change.norm().item(), rel=1e-4)
    assert not found


@pytest.fixture
def shapeless() -> methods.AdapterConfig:
    """A config whose files do not contain the layers' shapes."""
    return VeraConfig(rank=3)


def test_a_file_that_does_not_tell_shapes_wants_the_base(shapeless, tmp_path):
    model = rasa_ext.patch_model(LLAMA.build(), config=shapeless)
    rasa_ext.save_adapter(model, tmp_path)
    said = f"'{shapeless.method}' do not contain the shapes .* pass the base as mod"
    with pytest.raises(ValueError, match=said):
        analyze_adapter(tmp_path)
    expected, found = analyze(model), analyze_adapter(tmp_path, LLAMA.build())
    assert [group.pattern for group in found] == [group.pattern for group in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for layer, other in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(layer.singular_values, other.singular_values)
    with pytest.raises(ValueError, match=r"model: expected the base that .* was trained on"):
        analyze_adapter(tmp_path, TIED.build())


def write(directory, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """Write a LoRA from pairs (B, A) by layer name."""
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(told))
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": factor.clone().contiguous()
        for name, pair in pairs.items()
        for part, factor in zip("BA", pair, strict=True)
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def random_pair(rank: int, out: int = 10, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(out, rank), torch.randn(rank, width)


@pytest.mark.parametrize("rank", [1, 3, 7, 9])
def test_agrees_with_numpys_svd_of_the_dense_product(rank, tmp_path):
    B, A = random_pair(rank)
    ((found,),) = (group.layers for group in analyze_lora(write(tmp_path, {"a.0.q": (B, A)})))
    S = np.linalg.svd(8 / rank * B.double().numpy() @ A.double().numpy(), compute_uv=False)
    S = S[: min(rank, 7)]
    assert found.singular_values.tolist() == pytest.approx(S.tolist(), rel=1e-9, abs=1e-9)
    p = S / S.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert 1 <= found.effective_rank <= min(rank, 7)
    assert found.norm == pytest.approx(np.sqrt((S**2).sum()))
    assert (found.private_share, found.slots_used, len(found.pool_use)) == (1, 0, 0)


@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_an_exported_adapter_is_what_it_was(entry, tmp_path):
    model = patched(entry.build(), 4, 1)
    rasa_ext.export_lora(model, tmp_path, allow_dropped=True)
    before, after = analyze(model), analyze_lora(tmp_path)
    assert {(g.pattern, g.shape) for g in before} == {(g.pattern, g.shape) for g in after}
    layers = {layer.name: layer for group in before for layer in group.layers}
    for layer in (layer for group in after for layer in group.layers):
        expected = layers.pop(layer.name)
        count = len(expected.singular_values)
        torch.testing.assert_close(
            layer.singular_values[:count], expected.singular_values, rtol=1e-5, atol=1e-5
        )
        assert layer.effective_rank == pytest.approx(expected.effective_rank, rel=1e-4)
    assert not layers


def test_layers_stand_in_the_models_order(tmp_path):
    pairs = {f"a.{i}.q": random_pair(2) for i in range(12)}
    pairs["a.3.v"] = random_pair(2, out=5)
    q, v = analyze_lora(write(tmp_path, pairs))
    assert [layer.name for layer in q.layers] == [f"a.{i}.q" for i in range(12)]
    assert (q.shape, v.shape, v.pattern) == ((10, 7), (5, 7), "a.*.v")
