"""Streams other than the default one, and devices other than the current one."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rasa_ext
from tests.gpu.steps import check_evaluation, check_model
from tests.helpers.adapters import adapters, patched, randomize
from tests.helpers.cuda import assert_close
from tests.helpers.models import LLAMA
from tests.helpers.refusals import Snapshot

pytestmark = pytest.mark.usefixtures("streams")


def new_streams(count: int) -> list[torch.cuda.Stream]:
    """Return new streams, after waiting for all earlier work."""
    torch.cuda.synchronize()
    return [torch.cuda.Stream() for _ in range(count)]


def hold_up(stream: torch.cuda.Stream) -> None:
    """Delay a stream, so that a few later steps are launched before any of them runs."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)


def step(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    logits = LLAMA.call(model, input_ids=tokens)
    loss = logits.float().square().mean()
    return [logits.detach(), *torch.autograd.grad(loss, rasa_ext.adapter_parameters(model))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_models_on_two_streams(dtype, device, fused):
    """Models on two streams do not share workspaces or freed memory."""
    base = LLAMA.build().to(device, dtype)
    models = [patched(base, seed=seed).train() for seed in (3, 4)]
    tokens = LLAMA.inputs(0, device=device)["input_ids"]
    expected = [step(model, tokens) for model in models]
    found: list[list] = [[], []]
    pair = new_streams(2)
    for stream in pair:
        hold_up(stream)
    for _ in range(4):
        for model, stream, its in zip(models, pair, found, strict=True):
            with torch.cuda.stream(stream):
                its.append(step(model, tokens))
    torch.cuda.synchronize()
    for its, value in zip(found, expected, strict=True):
        for each in its:
            assert_close(each, value)


@pytest.mark.parametrize("tokens", [4, 64])
def test_a_pack_made_on_one_stream_and_read_on_another(tokens, device):
    """A pack stays valid for a waiting stream after the stream that made it drops it."""
    base = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).to(device)
    model = patched(base).eval()
    x = torch.randn(tokens, 64, device=device)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        maker, reader = new_streams(2)
        with torch.cuda.stream(maker):
            model(x)
        reader.wait_stream(maker)
        hold_up(reader)
        with torch.cuda.stream(reader):
            found = model(x)
        with torch.cuda.stream(maker):
            model.train()
            # Tensors of the packs' shape (16, 64), to reuse the memory of the dropped packs.
            others = [torch.full((16, 64), float("nan"), device=device) for _ in range(64)]
    torch.cuda.synchronize()
    assert_close([found], [expected])
    assert all(other.isnan().all() for other in others)


def test_a_pack_is_read_by_a_stream_that_nobody_orders_behind_its_maker(device):
    """A stream waits for a pack that another stream is still making, as in two serving threads."""
    model = patched(nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).to(device)).eval()
    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        maker, reader = new_streams(2)
        hold_up(maker)
        with torch.cuda.stream(maker):
            model(x)
        with torch.cuda.stream(reader):
            found = model(x)
    torch.cuda.synchronize()
    assert_close([found], [expected])


def test_a_device_that_is_not_the_current_one(device, fused):
    """A model on another device trains and merges there, and allocates none on the current one."""
    if device == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one GPU")
        device = "cuda:1"
        before = torch.cuda.memory_allocated(0)
    base = LLAMA.build().to(device)
    model = patched(base, dropout=0.25)
    check_model(LLAMA, base, model.eval())
    tokens = LLAMA.inputs(0, device=device)["input_ids"]
    for rows, columns in ((1, 1), (2, 7), (8, 7)):
        check_evaluation(LLAMA, base, model, {"input_ids": tokens[:rows, :columns]})
    step(model.train(), tokens)
    snapshot = Snapshot(model)
    rasa_ext.merge(model)
    rasa_ext.unmerge(model)
    snapshot.assert_unchanged()
    randomize(model, 5)
    assert {str(t.device) for a in adapters(model).values() for t in a} == {device}
    if device == "cuda:1":
        assert torch.cuda.memory_allocated(0) <= before
