"""Sharing among experts: the base, a run of every method, the plan, the tables, real sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from research.experiments.experts import base as base_module
from research.experiments.experts import run, sizes
from research.experiments.experts.base import (
    experts_used,
    make_base,
    make_model,
    make_tokenizer,
    text_rows,
)
from research.experiments.experts.run import METHODS, Key, best_rate, do, pending, prepared, report
from research.experiments.table import Table
from research.experiments.tasks import make_task
from research.experiments.training import Recipe, Run

pytest.importorskip("peft")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


@pytest.fixture(scope="module")
def small():
    return make_model(**SMALL).requires_grad_(False)


# The base


def test_a_cut_base_goes_on_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(base_module, "HELD_OUT", 4)
    monkeypatch.setattr(base_module, "EVERY", 2)
    recipe = Recipe(6, 2, 1e-2, bfloat16=False)
    whole, loss = make_base(tmp_path / "whole.pt", recipe, **SMALL)
    advance = Run.advance

    def break_down(self):
        if self.step == 5:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Run, "advance", break_down)
    with pytest.raises(KeyboardInterrupt):
        make_base(tmp_path / "cut.pt", recipe, **SMALL)
    steps = []
    monkeypatch.setattr(Run, "advance", lambda self: (steps.append(self.step), advance(self)))
    for expected in ([4, 5], []):  # the second call reads the finished base
        steps.clear()
        again, other = make_base(tmp_path / "cut.pt", recipe, **SMALL)
        assert steps == expected
        assert other == loss
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), name
    untrained = base_module.mean_loss(
        make_model(**SMALL), text_rows("test", make_tokenizer())[:4], 0, bfloat16=False
    )
    assert loss < untrained - 0.1


def test_a_router_that_always_chooses_the_same_uses_as_many_experts(small):
    rows = text_rows("test", make_tokenizer())[:4]
    pad = make_tokenizer().pad_token_id
    assert 2 < experts_used(small, rows, pad) <= 4

    class Same(torch.nn.Module):
        def forward(self, hidden):
            tokens = hidden.reshape(-1, hidden.shape[-1])
            index = torch.tensor([[0, 1]]).expand(len(tokens), 2)
            return tokens.new_zeros(len(tokens), 4), torch.full(index.shape, 0.5), index

    model = make_model(**SMALL)
    for layer in model.model.layers:
        layer.mlp.gate = Same()
    assert experts_used(model, rows, pad) == pytest.approx(2)


# Runs


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_attention_alike_and_begins_as_the_base(method, small):
    model = prepared(small, method, seed=0)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(ids).logits, small(ids).logits)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    attention = {name for name in trained if ".self_attn." in name}
    assert len(attention) == 2 * 4 * 2  # layers, projections, A and B
    assert all(min(trained[name].shape) == run.ATTENTION_RANK for name in attention)
    rest = set(trained) - attention
    assert all(".experts." in name or "rasa_pool_" in name for name in rest)
    assert bool(rest) == (METHODS[method] is not None)


def test_lora_and_slot_and_layer_train_as_many_numbers(small):
    def count(method):
        named = prepared(small, method, seed=0).named_parameters()
        return sum(p.numel() for n, p in named if p.requires_grad and n.rpartition(".")[2] != "d")

    reference = count("PEFT LoRA r2")
    for method in ("LoRA with a diagonal r2", "slot r2 k1", "layer r2 k1"):
        assert count(method) == reference


def test_a_run_is_a_row_of_the_table(small, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "STEPS", 3)
    monkeypatch.setattr(run, "BATCH_SIZE", 2)
    task = make_task("maths", make_tokenizer(), train=6, dev=2, test=2)
    before = {"base_steps": 1, "base_loss": 6, "loss_before": 6, "experts_used": 4}
    table = Table(tmp_path / "runs.csv", run.COLUMNS)
    expected = {"PEFT LoRA r2": "2", "slot r2 k1": "3", "layer r2 k1": "5", "shared r3 k1": "4"}
    for method, rank in expected.items():
        table.append([do(small, before, task, Key(method, 1e-2, 0))])
        row = table.rows()[-1]
        assert all(row.values())
        assert row["R"] == rank
        assert 0 < int(row["trained_in_experts"]) < int(row["trained"])
    assert Key("PEFT LoRA r2", 1e-2, 0) not in pending(table.rows())


def rows_of(losses: dict[tuple[str, float, int], str]) -> list[dict[str, str]]:
    return [
        {
            **dict.fromkeys(run.COLUMNS, "1"),
            **{"method": method, "lr": repr(lr), "seed": str(seed)},
            **{"dev_loss": loss, "test_loss": loss},
        }
        for (method, lr, seed), loss in losses.items()
    ]


def test_other_seeds_wait_for_the_best_rate():
    first = pending([])
    assert len(first) == len(run.RATES) * len(METHODS)
    assert {key.seed for key in first} == {0}
    method = "slot r2 k1"
    losses = zip(run.RATES, ("2", "1", "3", ""), strict=True)
    rows = rows_of({(method, lr, 0): loss for lr, loss in losses})
    assert best_rate(rows[:3], method) is None
    assert best_rate(rows, method) == run.RATES[1]  # the last rate diverged
    further = [key for key in pending(rows) if key.seed]
    assert further == [Key(method, run.RATES[1], seed) for seed in (1, 2)]


def test_the_tables_by_hand():
    losses = {("slot r2 k1", lr, 0): "1.5" for lr in run.RATES}
    losses |= {("PEFT LoRA r2", lr, 0): "1.25" for lr in run.RATES}
    losses |= {("slot r2 k1", run.RATES[0], 1): "1.7", ("PEFT LoRA r2", run.RATES[0], 1): "1.35"}
    lines = list(report(rows_of(losses)))
    slot = next(line for line in lines if line.startswith("| slot r2 k1 |"))
    assert "| 1.600 ± 0.141 | +0.300 (-0.335 to +0.935) |" in slot
    assert f"| slot r2 k1 |{' 1.5 |' * len(run.RATES)}" in lines
    assert any(line.startswith("| layer r2 k1 | - |") for line in lines)


# Sizes of real models


EXPECTED = {  # millions of parameters, R
    "Mixtral-8x7B": {"slot": (52.45, 35), "layer": (52.43, 11), "shared": (40.98, 35)},
    "Qwen3-30B-A3B": {"slot": (79.25, 49), "layer": (80.23, 129), "shared": (40.23, 49)},
    "gpt-oss-20b": {"slot": (44.28, 27), "layer": (44.29, 35), "shared": (33.56, 27)},
}
POOL_ONLY = {"Mixtral-8x7B": (1.65, 32), "Qwen3-30B-A3B": (0.90, 48), "gpt-oss-20b": (0.38, 24)}


@pytest.mark.parametrize("name", sizes.SHAPES)
def test_sizes_of_a_public_model(name):
    """Sizes equal formulas by hand, such as E r (in + out) for a LoRA of one layer's weight."""
    shape = sizes.SHAPES[name]
    sides = (shape.hidden + 2 * shape.intermediate) + (shape.intermediate + shape.hidden)
    lora = sizes.lora_size(shape).trained
    assert lora == shape.layers * shape.experts * shape.rank * sides
    found = {way: sizes.size(shape, way) for way in sizes.WAYS}
    for way, (millions, rank) in {**EXPECTED[name], "pool only": POOL_ONLY[name]}.items():
        assert (found[way].R, round(found[way].trained / 1e6, 2)) == (rank, millions)
        d = 2 * shape.layers * shape.experts * rank
        pool = 1 if way in ("shared", "pool only") else shape.experts
        private = (shape.rank - 1) * shape.experts if way != "pool only" else 0
        assert found[way].trained == shape.layers * (private + pool) * sides + d
        assert found[way].written_out == shape.layers * shape.experts * rank * sides
    with pytest.raises(ValueError, match="way: expected one of slot, layer, shared, pool only"):
        sizes.size(shape, "none")


def test_the_page_has_the_table_of_the_command():
    page = Path(sizes.__file__).with_name("README.md").read_text()
    shape = sizes.SHAPES["gpt-oss-20b"]
    lines = list(sizes.table({"gpt-oss-20b": shape}))
    assert all(line in page for line in lines)
