"""Training of adapted experts: dropout, checkpointing, autocast, copies, casts, torch.compile."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext.nn.rasa_experts import RasaExperts
from tests.helpers import experts, oracle
from tests.helpers.adapters import through_file
from tests.helpers.experts import FAMILIES, GROUPINGS, UNLIKE, stack_adapters
from tests.helpers.refusals import Snapshot

P = 0.25


def module_of(
    family: str = "mixtral", grouping: str = "shared", dtype=torch.float64, **options
) -> RasaExperts:
    """Return the adapted experts of the second of two layers, whose pool is in the first."""
    options = ({"adapter_dtype": dtype} if dtype == torch.float64 else {}) | options
    model = experts.patched(experts.model(family).to(dtype), grouping, **options)
    return experts.adapted(model)[1]


def entry_step(model: nn.Module, entry, seed: int = 11) -> dict[str, Tensor]:
    """Return logits and the gradients of all trainable parameters, under a seed."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits, loss = entry.loss(model, entry.inputs(0))
    loss.backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in trained.items()}}


def concatenated(module: RasaExperts, name: str) -> Tensor:
    """Return [W | dW] (E, out, 2 in) of one weight."""
    base, weight = module.base_layer, getattr(module.base_layer, name).detach()
    weight = weight.transpose(1, 2) if base.is_transposed else weight
    adapter = stack_adapters(module).get(name)
    nothing = torch.zeros_like(weight)
    change = nothing if adapter is None else oracle.stacked_weight(nothing, adapter)
    return torch.cat((weight, change), 2)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", UNLIKE)
def test_dropout_is_on_the_adapters_inputs_alone(family, grouping):
    """Dropout has one mask over x and one over h, and does not change the base's inputs.

    The rows of h are sorted by expert. Gradients use the same masks.
    """
    module = module_of(family, grouping, dropout=P).train()
    x, chosen, shares = experts.inputs()
    x.requires_grad_()
    torch.manual_seed(7)
    y = module(x, chosen, shares)
    torch.manual_seed(7)
    of_x = nn.functional.dropout(torch.ones_like(x), P)
    of_h = nn.functional.dropout(torch.ones(chosen.numel(), experts.INNER).double(), P)
    pairs = sorted(range(chosen.numel()), key=lambda i: chosen.view(-1)[i])  # stable
    masks = iter([of_h[pairs.index(i)] for i in range(chosen.numel())])
    base = module.base_layer

    def act(rows: Tensor) -> Tensor:
        h = base._apply_gate(rows) if base.has_gate else base.act_fn(rows)
        return torch.cat((h, h * next(masks)), 1)

    parts = []
    for name in experts.weight_names(base):
        bias = getattr(base, f"{name}_bias") if base.has_bias else None
        parts.append((concatenated(module, name), bias))
    expected = oracle.experts(torch.cat((x, x * of_x), 1), chosen, shares, *parts, act)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    probe = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(out, leaves, probe) for out in (y, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_dropout_draws_without_grad_too_and_not_in_eval():
    """A re-entrant checkpoint first runs without grad."""
    module, inputs = module_of(dropout=P).train(), experts.inputs()
    with torch.no_grad():
        assert not torch.equal(module(*inputs), module(*inputs))
    assert torch.equal(module.eval()(*inputs), module_of()(*inputs))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("family", UNLIKE)
def test_gradient_checkpointing(family, dropout, use_reentrant):
    """Checkpointing repeats the dropout masks and the router's choices."""
    entry = experts.entry(family)
    options = {"target_modules": "all-linear", "dropout": dropout}
    model = experts.patched(entry.build(), "slot", **options).train()
    expected = entry_step(model, entry)
    again = entry_step(model, entry, 12)["logits"]
    assert torch.equal(again, expected["logits"]) == (not dropout)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(entry_step(model, entry), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, incoming):
    """Experts compute in the base's dtype even under autocast, like transformers' grouped_mm."""
    module = module_of(dtype=dtype)
    x, chosen, shares = experts.inputs(dtype=torch.float32)
    x = x.to(incoming).requires_grad_()
    expected = module(x, chosen, shares)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, chosen, shares)
    assert y.dtype == incoming
    assert torch.equal(y, expected)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    probe = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(each, leaves, probe) for each in (y, expected))
    assert all(map(torch.equal, mine, theirs))
    assert all(grad.any() for grad in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_train_under_autocast(family, dtype):
    entry = experts.entry(family)
    options = {"target_modules": "all-linear", "exclude_modules": ("shared_expert_gate",)}
    model = experts.patched(entry.build().to(dtype), "shared", **options).train()
    with torch.autocast("cpu", torch.bfloat16):
        found = entry_step(model, entry)
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        assert grad.any(), name


@pytest.mark.parametrize("copied", [copy.deepcopy, through_file])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_copies(grouping, copied):
    """Layers of a copy share a pool, and share nothing with the original; outputs are equal."""
    model = experts.patched(experts.model(), grouping)
    twin, inputs, before = copied(model), experts.inputs(dtype=torch.float32), Snapshot(model)
    first, second = experts.adapted(twin)
    assert (first.down_proj.pool is second.down_proj.pool) == (grouping != "layer")
    expected = [module(*inputs) for module in experts.adapted(model)]
    for module, y in zip((first, second), expected, strict=True):
        assert torch.equal(module(*inputs), y)
    experts.randomize(twin, 9)
    for module, y in zip((first, second), expected, strict=True):
        assert not torch.allclose(module(*inputs), y)
    rasa_ext.unpatch(twin)
    before.assert_unchanged()


COMPILED = [
    ("gpt_oss", torch.bfloat16, "aot_eager"),
    ("nemotron_h", torch.float32, "aot_eager"),
    ("mixtral", torch.bfloat16, "inductor"),
]


@pytest.mark.parametrize(("family", "dtype", "backend"), COMPILED, ids=str)
def test_compile(family, dtype, backend):
    """Experts compile as one graph, with and without grad, and read changed parameters."""
    torch._dynamo.reset()
    module = module_of(family, "shared", dtype)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    trained = [p for p in module.parameters() if p.requires_grad]
    for seed in (1, 2):
        x, chosen, shares = experts.inputs(16, seed=seed, dtype=torch.float32)
        inputs = x.to(dtype).requires_grad_(), chosen, shares
        found, expected = (
            [y.detach(), *torch.autograd.grad(y.float().square().sum(), [inputs[0], *trained])]
            for y in (compiled(*inputs), module(*inputs))
        )
        with torch.no_grad():
            found.append(compiled(*inputs))
            expected.append(module(*inputs))
        for mine, theirs in zip(found, expected, strict=True):
            scale = theirs.abs().max().item()
            tolerance = 16 * torch.finfo(dtype).eps * scale
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
        with torch.no_grad():
            for parameter in trained:
                parameter.mul_(0.9)
