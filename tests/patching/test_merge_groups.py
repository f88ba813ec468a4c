"""Merging layers of a group together: in chunks, for mixed layers, all or none."""

from unittest import mock

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.patching import merge as merging
from rasa_ext.patching import parts
from tests.helpers import oracle
from tests.helpers.adapters import adapters, patched, same_bits
from tests.helpers.models import GPT2
from tests.helpers.refusals import Snapshot, refused

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def chunks(monkeypatch) -> mock.Mock:
    """The calls that merge a chunk of layers."""
    monkeypatch.setattr(ops, "merge_group", mock.Mock(wraps=ops.merge_group))
    return ops.merge_group


def lengths(chunks: mock.Mock) -> list[int]:
    return [len(call.args[0]) for call in chunks.call_args_list]


@pytest.mark.parametrize(
    ("size", "counts"),
    [(0, [1] * 5), (4 * 48, [1] * 5), (8 * 48 - 1, [1] * 5), (8 * 48, [2, 2, 1]), (1 << 20, [5])],
)
def test_layers_are_merged_in_chunks(size, counts, monkeypatch, chunks):
    """A chunk has the layers that fit CHUNK_BYTES of float32 dW, or one; results do not change."""
    base = nn.Sequential(*(nn.Linear(8, 6) for _ in range(5))).bfloat16()
    alone, model = patched(base), patched(base)
    monkeypatch.setattr(parts, "CHUNK_BYTES", 0)
    largest = rasa_ext.merge(alone)
    monkeypatch.setattr(parts, "CHUNK_BYTES", size)
    chunks.reset_mock()
    assert rasa_ext.merge(model) == pytest.approx(largest, rel=1e-6)
    assert lengths(chunks) == counts
    for mine, theirs in zip(model, alone, strict=True):
        assert same_bits(mine.base_layer.weight, theirs.base_layer.weight)
    rasa_ext.unmerge(model)
    for mine, theirs in zip(model, base, strict=True):
        assert same_bits(mine.base_layer.weight, theirs.weight)


def mixed_group() -> nn.Module:
    """Return layers with one group's names and shapes, in every dtype and both layouts."""
    layers = [kind().to(dtype) for dtype in DTYPES for kind in (lambda: nn.Linear(6, 6), conv1d)]
    return nn.Sequential(*layers, nn.Linear(6, 6), nn.Linear(6, 2))


def conv1d() -> nn.Module:
    return GPT2.build().transformer.h[0].mlp.c_proj.__class__(6, 6)


@pytest.mark.parametrize("call", [rasa_ext.merge, rasa_ext.merge_and_unload])
def test_layers_of_a_group_may_differ(call, chunks):
    base = mixed_group()
    model = patched(base)
    assert len({id(layer.pool) for layer in model}) == 2
    found, before = adapters(model), Snapshot(model)
    expected = [oracle.merged_weight(b, found[str(i)]) for i, b in enumerate(base)]
    call(model)
    looks = 1 if call is rasa_ext.merge else 2
    assert sorted(lengths(chunks)) == [1] * 8 * looks + [2] * looks
    for layer, value in zip(model, expected, strict=True):
        weight = getattr(layer, "base_layer", layer).weight
        rounding = max(torch.finfo(weight.dtype).eps / 2, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(weight.double(), value, rtol=1.01 * rounding, atol=1e-6)
    if call is rasa_ext.merge:
        rasa_ext.unmerge(model)
        before.assert_unchanged()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("call", [rasa_ext.merge, rasa_ext.merge_and_unload])
def test_an_interrupted_merge_changes_nothing(call, when, error, monkeypatch):
    """merge restores weights when interrupted; merge_and_unload first checks copies."""
    model = patched(nn.Sequential(*(nn.Linear(8, 6) for _ in range(3))))
    direct = ops.merge_group

    def failing(*args):
        direct(*args)
        if merge.call_count == when:
            raise error

    merge = mock.Mock(side_effect=failing)
    monkeypatch.setattr(parts, "CHUNK_BYTES", 0)
    monkeypatch.setattr(ops, "merge_group", merge)
    refused(lambda: call(model), model, kind=error)
    assert not any(layer.merged for layer in model)


def disabled(model):
    with rasa_ext.disable_adapter(model):
        return model(torch.ones(3, 8))


CAPTURED = [
    (False, rasa_ext.merge),
    (False, rasa_ext.merge_and_unload),
    (True, rasa_ext.unmerge),
    (True, rasa_ext.unpatch),
    (True, disabled),
]


@pytest.mark.parametrize(("merged", "call"), CAPTURED)
def test_weights_are_not_changed_while_a_graph_is_captured(merged, call, monkeypatch):
    model = patched(nn.Sequential(nn.Linear(8, 6)))
    if merged:
        rasa_ext.merge(model)
    monkeypatch.setattr(merging, "_is_capturing", lambda: True)
    said = "a CUDA graph is being captured"
    refused(lambda: call(model), model, said, kind=RuntimeError)
    assert model[0].merged == merged
    assert not model[0].disabled


def test_what_changes_no_weight_may_be_captured(monkeypatch):
    model = patched(nn.Sequential(nn.Linear(8, 6)))
    monkeypatch.setattr(merging, "_is_capturing", lambda: True)
    rasa_ext.unmerge(model)
    disabled(model)


def test_a_backward_through_weights_from_before_a_merge_is_refused():
    model = patched(nn.Sequential(nn.Linear(8, 6)))
    y = model(torch.randn(3, 8, requires_grad=True))
    rasa_ext.merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
