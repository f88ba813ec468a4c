"""SD-LoRA's tasks: outputs when the task changes, and directions that can be absorbed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import ops
from rasa_research import methods, training
from tests.helpers.methods import base, inputs, randomize, rasa_linears

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def patched(**options):
    config = methods.SdLoraConfig(rank=3, alpha=6.0, adapter_dtype=torch.float64, **options)
    model = rasa_ext.patch_model(base(), config=config)
    randomize(model, 1)
    return model


def deltas(model) -> dict[str, torch.Tensor]:
    packs = {
        name: ops.differentiable_pack(layer.adapter().factors(), torch.float64)
        for name, layer in rasa_linears(model).items()
    }
    return {name: (Bp.t() @ Ap).detach() for name, (Ap, Bp) in packs.items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": False}, {"norm": "frobenius"}, {"tied": False, "norm": "frobenius"}],
    ids=str,
)
def test_nothing_jumps_at_a_switch(options):
    model, x = patched(**options), inputs()
    for seed in (2, 3):
        before = model(x)
        training.next_task(model)
        torch.testing.assert_close(model(x), before, **EXACT)
        randomize(model, seed)


class Published(nn.Module):
    """SD-LoRA over up-projections: one pair per task and layer, one magnitude per task.

    The official code divides former pairs by the norms of both factors; the paper divides all pairs
    by the norm of the product.
    """

    def __init__(self, official: bool) -> None:
        super().__init__()
        self.blocks, self.official, self.pairs = base(), official, []
        self.m = []

    def begin(self, model) -> list[nn.Parameter]:
        """Start a task with ``model``'s fresh A, and return the trained parameters."""
        start = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.m = (
            [nn.Parameter(torch.full_like(m, 0.8)) for m in self.m] if self.official else self.m
        )
        self.m.append(start)
        layers = rasa_linears(model).values()
        pair = [tuple(nn.Parameter(t.detach().clone()) for t in (x.B, x.A)) for x in layers]
        self.pairs.append(pair)
        return [*self.m, *(t for each in pair for t in each)]

    def size(self, B, A, former: bool) -> torch.Tensor | float:
        if self.official:
            return B.norm() * A.norm() if former else 1.0
        return (B @ A).norm() if B.any() else 1.0

    def forward(self, x):
        last = len(self.m) - 1
        for i, block in enumerate(self.blocks):
            y = block.up_proj(x)
            for task, m in enumerate(self.m):
                B, A = self.pairs[task][i]
                if task < last:
                    B, A = B.detach(), A.detach()
                y = y + m * (x @ A.t() @ B.t()) / self.size(B, A, task < last)
            x = x + block.down_proj(torch.tanh(y))
        return x


@pytest.mark.parametrize("norm", ["product", "frobenius"])
def test_three_tasks_are_the_published_ones(norm):
    """Twelve SGD steps per task, each from B = 0, equal the published method."""
    config = methods.SdLoraConfig(
        rank=3, alpha=2.4, norm=norm, target_modules=["up_proj"], adapter_dtype=torch.float64
    )
    model, official = rasa_ext.patch_model(base(), config=config), norm == "product"
    plain, x = Published(official), inputs(20)
    for task in range(3):
        ours = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
        theirs = torch.optim.SGD(plain.begin(model), lr=0.1)
        for _ in range(12):
            for each, optimizer in ((model, ours), (plain, theirs)):
                optimizer.zero_grad()
                (each(x) - x.roll(task, 1)).square().mean().backward()
                optimizer.step()
        torch.testing.assert_close(model(x), plain(x), **EXACT)
        m = next(iter(rasa_linears(model).values())).pool_tensors()["m"]
        torch.testing.assert_close(m, torch.stack(plain.m), **EXACT)
        assert (m - 0.8).abs().min() > 1e-4
        training.next_task(model, start="official" if official else "continuous")


def test_the_official_start():
    """The official start divides by the factors' norms and resets every magnitude to 0.8."""
    model = patched(norm="product")
    training.next_task(model, start="official")
    randomize(model, 2)
    parts = {
        n: [(t["stack_B"], t["stack_A"]), (t["B"].detach(), t["A"].detach())]
        for n, t in ((n, layer.own_tensors()) for n, layer in rasa_linears(model).items())
    }
    training.next_task(model, start="official")
    for name, dW in deltas(model).items():
        expected = sum(0.8 * B @ A / (B.norm() * A.norm()) for B, A in parts[name])
        torch.testing.assert_close(dW, expected, **EXACT)


def test_a_tied_magnitudes_gradient_is_the_sum_of_its_layers():
    def draw(model):
        for name, parameter in model.named_parameters():
            if name.endswith((".A", ".B")):
                generator = torch.Generator().manual_seed(len(name))
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.copy_(0.3 * noise)
            elif name.endswith((".m", "_m")):
                parameter.data.fill_(0.7)

    tied, apart = patched(), patched(tied=False)
    for model in (tied, apart):
        draw(model)
        training.next_task(model)
        draw(model)
        model(inputs()).square().sum().backward()
    sums = {}
    for layer in rasa_linears(apart).values():
        key = layer.spec.name.rpartition(".")[2]
        sums[key] = sums.get(key, 0) + layer.own_tensors()["m"].grad
    for layer in rasa_linears(tied).values():
        key = layer.spec.name.rpartition(".")[2]
        torch.testing.assert_close(layer.pool_tensors()["m"].grad, sums[key], **EXACT)


def test_ranks_follow_the_schedule():
    model = patched(rank_schedule={2: 2, 4: 1})
    found = []
    for _ in range(5):
        found.append(next(iter(rasa_linears(model).values())).A.shape[0])
        training.next_task(model)
    assert found == [3, 2, 2, 1, 1]
    assert {layer.effective_rank for layer in rasa_linears(model).values()} == {10}


def third_task(kind: str, **options):
    """Make two directions, and a third that is a combination of them, nearly one, or new."""
    model = patched(rank_schedule={3: 6}, **options)
    training.next_task(model)
    randomize(model, 2)
    training.next_task(model)
    randomize(model, 4)
    with torch.no_grad():
        for layer in rasa_linears(model).values() if kind != "new" else ():
            own = layer.own_tensors()
            weights = torch.tensor([1.0, -0.5], dtype=torch.float64) / own["norms"]
            layer.A.copy_(own["stack_A"])
            layer.B.copy_(own["stack_B"] * weights.repeat_interleave(3))
            if kind == "nearly":
                layer.B.add_(0.01 * torch.randn(layer.B.shape, dtype=torch.float64))
    training.next_task(model)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["none", "frobenius"])
def test_what_the_others_express_goes(tied, norm):
    # If each layer has its own norm, one m cannot express the sum in all layers.
    model, x = third_task("sum", tied=tied, norm=norm), inputs()
    before = model(x)
    if tied and norm == "frobenius":
        assert not training.absorb(model, threshold=1e-9)
        return
    assert training.absorb(model, threshold=1e-9)
    torch.testing.assert_close(model(x), before, rtol=1e-7, atol=1e-8)
    assert next(iter(rasa_linears(model).values())).config.past == (3, 3)
    training.next_task(model)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("kind", ["nearly", "new"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_residual_is_that_of_dense_least_squares(kind, tied):
    """A direction is absorbed if and only if every dense residual is below the threshold."""
    model = third_task(kind, tied=tied)
    groups = {}
    for name, layer in rasa_linears(model).items():
        own = layer.own_tensors()
        A, B = own["stack_A"].split((3, 3, 6)), own["stack_B"].split((3, 3, 6), 1)
        columns = torch.stack([(b @ a).flatten() for a, b in zip(A, B, strict=True)], 1)
        groups.setdefault(name.rpartition(".")[2] if tied else name, []).append(columns)
    residuals = []
    for parts in groups.values():
        columns = torch.cat(parts)
        c = torch.linalg.lstsq(columns[:, :2], columns[:, 2:]).solution
        left = (columns[:, 2:] - columns[:, :2] @ c).square().sum() / columns[:, 2].square().sum()
        residuals.append(left.item())
    assert not training.absorb(model, threshold=0.999 * max(residuals))
    assert training.absorb(model, threshold=min(1.0, 1.001 * max(residuals)))


def test_saved_with_its_tasks(tmp_path):
    model = third_task("new")
    rasa_ext.save_adapter(model, tmp_path)
    again = rasa_ext.load_adapter(base(), tmp_path)
    for each in (model, again):
        torch.manual_seed(5)
        training.next_task(each)
        randomize(each, 9)
    assert torch.equal(again(inputs()), model(inputs()))


def test_former_directions_stay():
    model, x = patched(), inputs(20)
    training.next_task(model)
    before = {n: layer.own_tensors()["stack_A"].clone() for n, layer in rasa_linears(model).items()}
    optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=1e-2)
    for _ in range(3):
        (model(x) - x).square().mean().backward()
        optimizer.step()
    for name, layer in rasa_linears(model).items():
        assert torch.equal(layer.own_tensors()["stack_A"], before[name])
        assert (layer.pool_tensors()["m"] != 1).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda m: training.next_task(m, start="again"), "start"),
        (lambda m: training.absorb(m), "two former tasks"),
        (lambda m: training.absorb(m, threshold=2.0), "threshold"),
        (lambda m: training.next_task(rasa_ext.patch_model(base(), 4, 1)), "SdLoraConfig"),
        (lambda m: methods.SdLoraConfig(norm="l2"), "norm"),
        (lambda m: methods.SdLoraConfig(rank_schedule={1: 4}), "rank_schedule"),
        (lambda m: methods.SdLoraConfig(rank_schedule={3: 0}), "rank_schedule"),
    ],
)
def test_bad_input(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make(patched())


def test_not_while_merged():
    model = patched()
    rasa_ext.merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        training.next_task(model)
