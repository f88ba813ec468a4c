"""Dimensions of point sets and of hidden states, and the ranks that follow from them."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rasa_ext
from rasa_research.ranks import (
    block_ranks,
    find_blocks,
    hidden_dimensions,
    intrinsic,
    intrinsic_ranks,
    rank_pattern,
    twonn,
)
from tests.helpers.adapters import LargestTensor, adapted_layers, patched
from tests.helpers.models import BERT, GPT2, LLAMA, ids

POINTS = 2000


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q


def cube(dimension: int, width: int = 50) -> torch.Tensor:
    return torch.rand(POINTS, dimension, dtype=torch.float64) @ rotation(width)[:dimension]


def sphere(dimension: int) -> torch.Tensor:
    x = torch.randn(POINTS, dimension + 1, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def swiss_roll() -> torch.Tensor:
    t, y = torch.rand(2, POINTS, dtype=torch.float64)
    t = 1.5 * math.pi * (1 + 2 * t)
    return torch.stack([t * t.cos(), 21 * y, t * t.sin()], 1)


def by_numpy(x: torch.Tensor) -> float:
    """Compute TwoNN from all distances between distinct points."""
    points = x.double().numpy()
    distances = np.sort([np.sqrt(((points - p) ** 2).sum(1)) for p in points], axis=1)
    mu = np.sort(distances[:, 2] / distances[:, 1])
    F = np.arange(1, len(mu) + 1) / len(mu)
    kept = int(0.9 * len(mu))
    line = np.linalg.lstsq(np.log(mu[:kept, None]), -np.log(1 - F[:kept]), rcond=None)
    return line[0][0]


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_cubes_in_50_dimensions(dimension, figure):
    found = twonn(cube(dimension))
    figure(f"TwoNN of a cube of dimension {dimension}: {found:.2f}")
    assert found == pytest.approx(dimension, rel=0.1)


@pytest.mark.parametrize(
    ("make", "dimension"),
    [(functools.partial(sphere, 1), 1), (functools.partial(sphere, 2), 2), (swiss_roll, 2)],
    ids=["circle", "sphere", "swiss roll"],
)
def test_what_is_curved(make, dimension):
    assert twonn(make()) == pytest.approx(dimension, rel=0.1)


@pytest.mark.parametrize("make", [functools.partial(cube, 3), swiss_roll, lambda: torch.rand(7, 2)])
def test_agrees_with_all_distances_by_numpy(make):
    x = make()
    assert twonn(x) == pytest.approx(by_numpy(x), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_no_change_by_scale_rotation_and_place(scale):
    x = cube(3, width=20)
    moved = scale * (x @ rotation(20) + 5)
    assert twonn(moved) == pytest.approx(twonn(x), rel=1e-6)


def test_points_far_from_the_origin_and_from_one_another():
    """Distances stay accurate here, where float64 products alone would leave few digits."""
    x = cube(3, width=20)
    for far in (x + 1e5, torch.cat([x[:1000] - 1e4, x[1000:] + 1e4])):
        assert twonn(far) == pytest.approx(by_numpy(far), rel=1e-9)


def test_of_equal_points_one_is_kept():
    x = cube(2)
    again = torch.cat([x, x[:700], x[:100]])[torch.randperm(POINTS + 800)]
    assert twonn(again) == twonn(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computed_in_float64(dtype):
    x = cube(2).to(dtype)
    assert twonn(x) == twonn(x.double())


def test_pieces_change_nothing_and_bound_the_memory(monkeypatch):
    x = torch.rand(3000, 4)
    whole = twonn(x)
    monkeypatch.setattr(intrinsic, "_AT_ONCE", 2**16)
    with LargestTensor() as largest:
        assert twonn(x) == pytest.approx(whole, rel=1e-12)
    assert largest.numel <= 2**16 < 3000**2


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x: expected a floating-point tensor, got list"),
        (torch.ones(4, 4, dtype=torch.int64), TypeError, "floating-point tensor, got torch.int64"),
        (torch.ones(5), ValueError, r"x: expected points of shape \(N, width\), got \(5,\)"),
        (torch.ones(0, 3), ValueError, r"got \(0, 3\)"),
        (torch.tensor([[1.0], [torch.nan], [2.0]]), ValueError, "x: expected finite numbers"),
        (torch.ones(9, 3), ValueError, "x: expected at least 3 different points, got 1 of 9"),
        (torch.eye(6), ValueError, "neighbours at two distances"),
    ],
)
def test_bad_points(x, error, message):
    with pytest.raises(error, match=message):
        twonn(x)


def test_the_formula():
    dimensions = [4.0, 6.4, 6.4, 2.0, 2.5, 2.99]
    assert block_ranks(dimensions) == [3, 1, 1, 2, 1]
    assert block_ranks(dimensions, k=3) == [5, 3, 3, 4, 3]
    for message, words in (
        ("k: expected at least 1, since no rank may be 0, got 0", (dimensions, 0)),
        (
            "dimensions: expected finite numbers, one before every block and one after the last",
            ([1.0],),
        ),
        ("dimensions: expected finite numbers", ([1.0, math.inf],)),
    ):
        with pytest.raises(ValueError, match=message):
            block_ranks(*words)


class Sum(nn.Module):
    """A block that adds every token to all later tokens."""

    def forward(self, hidden_states):
        return hidden_states.cumsum(1)


class Flatten(nn.Module):
    """A block that sets all but two coordinates to zero."""

    def forward(self, hidden_states):
        return (hidden_states * (torch.arange(hidden_states.shape[2]) < 2),)


class Known(nn.Module):
    """A model of known dimensions: token t is a point on axis t.

    The last tokens have dimension 1 before the blocks, one per token after ``Sum``, and 2 at the
    end.
    """

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Sum(), Flatten())

    def forward(self, places, attention_mask=None):
        x = torch.diag_embed(places)
        for block in self.blocks:
            x = block(hidden_states=x)
        raise AssertionError("the head is needed for nothing")


def test_a_model_of_known_dimensions():
    model = Known()
    batches = [{"places": torch.rand(250, 4)} for _ in range(8)]
    dimensions = hidden_dimensions(model, batches, model.blocks, "last")
    assert dimensions == pytest.approx([1, 4, 2], rel=0.1)
    assert block_ranks(dimensions) == [4, 1]


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The points that hidden_dimensions passes to twonn."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(intrinsic, "twonn", lambda x: found.append(x) or 1.0)
    return found


REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
def test_pooling_takes_tokens_with_a_one_alone(pooling, seen):
    model = Known()
    places = torch.rand(4, 5)
    places[~REAL.bool()] = 1e30  # masked values must not matter
    hidden_dimensions(
        model, [{"places": places, "attention_mask": REAL}], [model.blocks[0]], pooling
    )
    states = torch.diag_embed(places)
    kept = [state[mask.bool()] for state, mask in zip(states, REAL, strict=True)]
    take = {"last": lambda s: s[-1], "first": lambda s: s[0], "mean": lambda s: s.mean(0)}[pooling]
    torch.testing.assert_close(seen[0], torch.stack([take(each) for each in kept]))


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
@pytest.mark.parametrize("entry", [LLAMA, GPT2, BERT], ids=ids)
def test_states_are_those_that_the_model_tells(entry, pooling, seen):
    model = entry.build().eval()
    batches = [entry.inputs(i) for i in range(3)]
    hidden_dimensions(model, batches, pooling=pooling)
    told = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    states = [torch.cat(each) for each in zip(*told, strict=True)]
    take = {"last": lambda s: s[:, -1], "first": lambda s: s[:, 0], "mean": lambda s: s.mean(1)}
    assert len(seen) == len(states)
    norm = model.base_model.norm if entry is LLAMA else getattr(model.base_model, "ln_f", None)
    for i, (found, state) in enumerate(zip(seen, states, strict=True)):
        if i == len(states) - 1 and norm is not None:
            if pooling == "mean":  # a norm of the mean is not a mean of norms
                continue
            found = norm(found)
        torch.testing.assert_close(found, take[pooling](state))


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("entry", [LLAMA, GPT2], ids=ids)
def test_padding_is_left_out(entry, pooling, seen):
    model = entry.build().eval()
    tokens = entry.inputs(0)["input_ids"][:3]
    lengths = [7, 4, 2]
    mask = torch.stack([(torch.arange(7) < n).long() for n in lengths])
    hidden_dimensions(model, [{"input_ids": tokens, "attention_mask": mask}], pooling=pooling)
    alone = [{"input_ids": row[None, :n]} for row, n in zip(tokens, lengths, strict=True)]
    hidden_dimensions(model, alone, pooling=pooling)
    half = len(seen) // 2
    for padded, single in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(padded, single)


@pytest.mark.parametrize("entry", [LLAMA, GPT2, BERT], ids=ids)
def test_the_model_is_left_as_it_was(entry, monkeypatch):
    model = entry.build().train()
    first = next(iter(find_blocks(model).values()))
    first.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    heads = [getattr(model, name) for name in ("lm_head", "classifier") if hasattr(model, name)]
    assert heads
    for head in heads:
        monkeypatch.setattr(head, "forward", None)  # a call would fail
    hidden_dimensions(model, [entry.inputs(0)])
    tokens = entry.inputs(0)["input_ids"]
    short = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens[:, 1:])}
    with pytest.raises(ValueError, match="attention_mask: expected the shape"):
        hidden_dimensions(model, [short])
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_dropout_is_off(seen):
    model = patched(LLAMA.build(), dropout=0.5).train()
    for _ in range(2):
        hidden_dimensions(model, [LLAMA.inputs(0)])
    for one, other in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(one, other)


def test_a_warning_where_most_states_are_equal():
    model = Known()
    places = torch.rand(9, 2)
    few = [{"places": places[torch.arange(19) % 9]}]
    with pytest.warns(UserWarning, match=r"only 9 of 19 hidden states \w+ blocks.0") as told:
        hidden_dimensions(model, few, [model.blocks[0]], "last")
    assert {warning.filename for warning in told} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden_dimensions(model, [{"places": places[torch.arange(18) % 9]}], [model.blocks[0]])


def test_a_choice_of_points(seen):
    model = Known()
    batches = [{"places": torch.rand(size, 2)} for size in (3, 1, 6, 2)]
    rows = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["places"])), with_kwargs=True
    )
    for points, seed in ((5, 0), (5, 0), (5, 1), (12, 0), (99, 0)):
        hidden_dimensions(model, batches, [model.blocks[0]], "last", points, seed)
    few, same, other, *whole = seen[::2]  # points before the block, without those after it
    assert torch.equal(few, same)
    assert len(few) == len(other) == 5
    assert not torch.equal(few, other)
    every = torch.cat([torch.diag_embed(batch["places"])[:, -1] for batch in batches])
    assert all(torch.equal(each, every) for each in whole)
    assert all((every == point).all(1).any() for point in few)
    assert sum(rows) == 5 + 5 + 5 + 12 + 12


def test_blocks_that_are_found():
    assert list(find_blocks(GPT2.build())) == [f"transformer.h.{i}" for i in range(3)]
    experts = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(9)) for _ in range(3))
    unlike = nn.ModuleList([nn.Linear(2, 2), *(nn.Identity() for _ in range(7))])
    model = nn.ModuleDict({"unlike": unlike, "two": experts[:2], "three": experts})
    assert list(find_blocks(model)) == ["three.0", "three.1", "three.2"]
    with pytest.raises(ValueError, match="blocks: expected a model with a ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_a_rank_pattern_names_the_adapted_layers_of_the_blocks():
    model = GPT2.build()
    found = rank_pattern(model, [5, 1, 2])
    assert len(found) == 12
    assert found["transformer.h.0.attn.c_attn"] == found["transformer.h.0.mlp.c_proj"] == 5
    assert rank_pattern(model, [2], [model.transformer.h[1]], ["c_fc"]) == {
        "transformer.h.1.mlp.c_fc": 2
    }
    for message, words in (
        ("ranks: expected one for each of 3 blocks, got 2", ([1, 2],)),
        ("blocks: expected modules of the model", ([1], [nn.Identity()])),
        ("blocks: expected modules of the model", ([], [])),
        ("target_modules: .* no linear layer's name ends in 'q'", ([1, 2, 3], None, ["q"])),
    ):
        with pytest.raises(ValueError, match=message):
            rank_pattern(model, *words)


def test_peft_gives_every_layer_its_rank():
    peft = pytest.importorskip("peft")
    model = LLAMA.make(layers=12)
    pattern = rank_pattern(model, list(range(1, 13)), target_modules=["q_proj", "down_proj"])
    config = peft.LoraConfig(
        r=99, target_modules=["q_proj", "down_proj", "v_proj"], rank_pattern=pattern
    )
    adapted = peft.get_peft_model(model, config).base_model.model
    found = {n: m.r["default"] for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert len(found) == 36
    for name, rank in found.items():
        block = int(name.split(".")[2])
        assert rank == (99 if "v_proj" in name else block + 1)


def test_rasa_takes_the_pattern_and_keeps_its_pool():
    model = LLAMA.build()
    pattern = rank_pattern(model, block_ranks([3.0, 5.2, 1.0, 2.0], k=2))
    config = rasa_ext.RasaConfig(rank=8, k=2, rank_pattern=pattern)
    layers = adapted_layers(rasa_ext.patch_model(model, config=config))
    for name, layer in layers.items():
        private = {"0": 2, "1": 0, "2": 1}[name.split(".")[2]]
        assert (layer.A.shape[0], layer.pool.A.shape[0]) == (private, 6)


def test_intrinsic_ranks_are_the_three_steps_in_one():
    model = LLAMA.build()
    batches = [{"input_ids": torch.randint(32, (60, 9))} for _ in range(4)]
    dimensions = hidden_dimensions(model, batches, None, "mean", 100, 3)
    assert max(dimensions) - min(dimensions) > 0.5
    found = intrinsic_ranks(model, batches, None, "mean", 100, 3, k=2, target_modules=["q_proj"])
    assert found == rank_pattern(model, block_ranks(dimensions, 2), None, ["q_proj"])
    blocks = iter(model.model.layers[1:])
    tail = intrinsic_ranks(model, batches, blocks, "mean", 100, 3, k=2, target_modules=["q_proj"])
    assert tail == {name: rank for name, rank in found.items() if ".0." not in name}


def test_bad_arguments():
    model = LLAMA.build()
    batch = LLAMA.inputs(0)
    for error, message, options in (
        (ValueError, r"pooling: expected one of \('mean', 'last', 'first'\), got 'cls'", "cls"),
        (ValueError, "points: expected at least 3, got 2", ("last", 2)),
        (TypeError, "points: expected an integer, got 9.0", ("last", 9.0)),
    ):
        words = (options,) if isinstance(options, str) else options
        with pytest.raises(error, match=message):
            hidden_dimensions(model, [batch], None, *words)
    with pytest.raises(TypeError, match=r"batches: expected mappings .* got a Tensor"):
        hidden_dimensions(model, [batch["input_ids"]])
    with pytest.raises(ValueError, match="batches: expected tensors among"):
        hidden_dimensions(model, [{"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match="batches: expected at least one"):
        hidden_dimensions(model, [])
    same = {"input_ids": torch.cat([batch["input_ids"][:1]] * 4)}
    with pytest.raises(ValueError, match=r"before model.layers.0 cannot be estimated: .* 1 of 4"):
        hidden_dimensions(model, [same])
    none = torch.ones_like(batch["input_ids"])
    none[2] = 0
    with pytest.raises(ValueError, match="attention_mask: expected a token in every sequence"):
        hidden_dimensions(model, [{**batch, "attention_mask": none}])
    with pytest.raises(ValueError, match="blocks: expected each to run once per batch, in this"):
        hidden_dimensions(model, [batch], [model.model.layers[1], model.model.layers[0]])
    model.unused = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match=r"in this order, but states were found 0 times before"):
        hidden_dimensions(model, [batch], model.unused)
    with pytest.raises(ValueError, match=r"blocks: expected hidden states .* before model.embed"):
        hidden_dimensions(model, [batch], [model.model.embed_tokens])
