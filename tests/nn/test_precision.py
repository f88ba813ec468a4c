"""An adapter that other code has cast still trains in the dtype of the config."""

import pytest
import torch

import rasa_ext
from tests.helpers import experts
from tests.helpers.adapters import patched, same_tensors
from tests.helpers.peft import TOKENS, tiny, trained
from tests.helpers.tiny_lm import make_model

CAST = "cast to torch.bfloat16.* is torch.float32 again"


def ours(**options):
    return patched(make_model(), config=rasa_ext.RasaConfig(rank=4, k=1, **options))


def stacked(**options):
    return experts.patched(experts.model(), "shared", **options)


@pytest.fixture(params=[tiny, ours, stacked])
def build(request):
    return request.param


def cast(model, dtype=torch.bfloat16) -> None:
    """Cast like TRL, by writes to ``.data`` that modules cannot see."""
    for parameter in trained(model).values():
        parameter.data = parameter.data.to(dtype)


def dtypes(model) -> set[torch.dtype]:
    return {parameter.dtype for parameter in trained(model).values()}


def backward(model) -> float:
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_the_first_forward_with_grad_restores(build, warm):
    """A forward restores dtypes, also in layers that earlier forwards made to compute together."""
    model = build().train()
    for _ in range(3 * warm):
        backward(model)
        torch.optim.SGD(trained(model).values(), lr=1e-3).step()
    model.zero_grad()
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=5e-4)
    cast(model)
    rounded = [parameter.detach().clone() for parameter in parameters]
    with pytest.warns(UserWarning, match=CAST):
        backward(model)
    assert dtypes(model) == {torch.float32}
    assert all(a is b for a, b in zip(trained(model).values(), parameters, strict=True))
    for parameter, before in zip(parameters, rounded, strict=True):
        assert torch.equal(parameter, before.float())
        assert parameter.grad.dtype == torch.float32
    optimizer.step()
    assert all((p != b.float()).any() for p, b in zip(parameters, rounded, strict=True))


def test_training_mode_restores_parameters_and_gradients(build):
    model = build().train()
    backward(model)
    model.eval().bfloat16()  # casts gradients, too
    with pytest.warns(UserWarning, match=CAST):
        model.train()
    assert {each.dtype for p in trained(model).values() for each in (p, p.grad)} == {torch.float32}


def test_a_cast_holds_without_training(build):
    model = build().eval().to(torch.bfloat16)
    with torch.no_grad():
        model(input_ids=TOKENS)
    assert dtypes(model) == {torch.bfloat16}


def test_a_finer_dtype_stays(build):
    model = build().double().train()
    backward(model)
    assert dtypes(model) == {torch.float64}


def test_the_configs_own_dtype_stays(build):
    model = build(adapter_dtype="bfloat16").train()
    backward(model)
    assert dtypes(model) == {torch.bfloat16}


def test_what_is_frozen_stays(build):
    model = build()
    parameters = trained(model).values()
    cast(model)
    for parameter in parameters:
        parameter.requires_grad_(False)
    model.train()
    model(input_ids=TOKENS)
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}


def test_loading_does_not_round(build):
    model = build()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast(model)
    with pytest.warns(UserWarning, match=CAST):
        model.load_state_dict(state)
    assert same_tensors(model.state_dict(), state)


def test_several_processes_are_refused(build, monkeypatch):
    """After a cast, DistributedDataParallel would not average gradients of wrapped parameters."""
    model = build().eval()
    cast(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"cast to torch.bfloat16.* before any process wraps"):
        model.train()
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    model.train()
    assert dtypes(model) == {torch.float32}
