"""Reconstruction of a fine-tune's weight changes, on a tiny model and on random matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rasa_ext
from rasa_research import solver
from rasa_research.solver import decompose
from research.experiments.reconstruction import (
    compress,
    equal_numbers,
    figures,
    half_steps,
    reconstruct,
)
from research.experiments.reconstruction import deltas as deltas_module
from research.experiments.reconstruction.compress import ADAPTER, BASE, LAYERS, WHOLE, Judge, Key
from research.experiments.reconstruction.deltas import deltas_of
from research.experiments.reconstruction.finetune import finetune
from research.experiments.table import Table
from research.experiments.tasks import make_task
from research.experiments.training import Recipe, Run, mean_loss
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base


def test_a_cut_fine_tune_ends_up_with_the_same_weights(tmp_path, monkeypatch):
    tokenizer, recipe = make_tokenizer(), Recipe(6, 4, 3e-3, bfloat16=False)
    task = make_task("maths", tokenizer, train=12, dev=0, test=4)

    def tuned(folder: Path):
        said: list[str] = []
        found = finetune(make_model(), tokenizer, task, recipe, folder, every=2, say=said.append)
        return found, said, type(make_model()).from_pretrained(folder / "tuned")

    found, _, whole = tuned(tmp_path / "whole")
    advance = Run.advance

    def break_down(self):
        if self.step == 5:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Run, "advance", break_down)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "cut")
    monkeypatch.setattr(Run, "advance", advance)
    again, said, cut = tuned(tmp_path / "cut")
    assert said[0] == "resuming after step 4"
    assert not (tmp_path / "cut" / "run.pt").exists()
    assert again["before"] == found["before"]
    assert again["after"] == found["after"]
    assert found["after"]["loss"] < found["before"]["loss"]
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(weight, cut.state_dict()[name], rtol=0, atol=0)

    changes = deltas_of(make_model(), whole)
    assert list(changes) == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert all(len(group) == 2 and min(d.norm() for d in group) > 0 for group in changes.values())
    layer = make_model().model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(
        changes["up_proj"][1], whole.model.layers[1].mlp.up_proj.weight.detach() - layer.detach()
    )


@pytest.fixture
def deltas():
    generator = torch.Generator().manual_seed(3)
    return {
        name: [torch.randn(20, 16, generator=generator) for _ in range(3)] for name in ("a", "b")
    }


def test_reconstruction_resumes_and_draws(deltas, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reconstruct, "CURVE", (4, 1, 6))
    monkeypatch.setattr(reconstruct, "RANKS", (4, 6))
    monkeypatch.setattr(reconstruct, "KS", (2, 0))
    monkeypatch.setattr(reconstruct, "SWEEP", 3)
    monkeypatch.setattr(reconstruct, "LONG", (("b", "not there"), 9))
    for name in ("CURVE", "RANKS", "SWEEP", "LONG"):
        monkeypatch.setattr(figures, name, getattr(reconstruct, name))
    monkeypatch.setattr(figures, "_COLOURS", {4: "tab:blue", 6: "tab:green"})
    table = Table(tmp_path / "errors.csv", reconstruct.COLUMNS)
    runs = reconstruct.planned(deltas)
    assert len(runs) == 4 + 2 * 2 * 2 * 2 + 2
    assert reconstruct.fill(table, deltas, seconds=-1) == len(runs)
    assert reconstruct.fill(table, deltas, runs=runs[:3], dtype=torch.float64) == 0
    early = table.rows()
    assert reconstruct.fill(table, deltas, dtype=torch.float64) == 0
    rows = table.rows()
    assert rows[: len(early)] == early
    assert len({tuple(row.values())[:5] for row in rows}) == len(rows)
    assert reconstruct.fill(table, {"a": [], "b": []}) == 0  # no run is repeated
    assert rows == table.rows()

    found, lora = figures.curves(rows)
    assert {key: len(errors) - 1 for key, errors in found.items()} == dict(
        sorted(runs, key=lambda run: run[1])
    )
    for (module, rank), minimum in lora.items():
        squares = [torch.linalg.svdvals(d.double()).square() for d in deltas[module]]
        dense = sum(s[rank:].sum() for s in squares) / sum(s.sum() for s in squares)
        assert minimum == pytest.approx(dense.item(), rel=1e-6)
        for init in ("svd", "random"):
            ended = figures.against_k(found, module, rank, init)
            assert list(ended) == ([0, 1, 2] if rank == 4 else [0, 2])
            assert ended[0] == pytest.approx(minimum, rel=1e-6)
        assert figures.against_k(found, module, rank, "svd")[2] < minimum
    monkeypatch.setattr("sys.argv", ["figures", "--results", str(tmp_path)])
    figures.main()
    for name in ("iterations.png", "k.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| a | svd |" in printed
    assert "| 6 | random |" in printed


def test_a_random_start_depends_on_its_run_alone(deltas):
    key = reconstruct.Key("a", 4, 2, "random")
    first = reconstruct.reconstruct(key, deltas["a"], 2, torch.float32)
    torch.randn(5)
    assert reconstruct.reconstruct(key, deltas["a"], 2, torch.float32) == first


def test_half_steps_are_checked_on_real_changes(tmp_path, monkeypatch, capsys):
    base, tuned = make_model(), make_model()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    monkeypatch.setattr(deltas_module, "find_smollm2", lambda: str(tmp_path / "base"))
    words = ["half_steps", "--weights", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--iterations", "3"])
    half_steps.main()
    rows = Table(tmp_path / "half_steps.csv", half_steps.COLUMNS).rows()
    assert len(rows) == 7 * 3 * 2
    changes = deltas_of(base, tuned)
    for row in rows:
        assert row["half_steps"] == "12"
        assert float(row["last"]) < float(row["first"])
        found = decompose(changes[row["module"]], 8, int(row["k"]), iterations=3)
        assert float(row["lora_error"]) == pytest.approx(found.lora_error, abs=2e-8)
        if row["start"] == "svd":
            assert float(row["last"]) == pytest.approx(found.errors[-1], abs=2e-8)

    def worse(self):
        self.d = self.d * 1.5

    monkeypatch.setattr(half_steps.CoordinateDescent, "update_d", worse)
    with pytest.raises(SystemExit, match="q_proj k=1 svd: a half-step raised the error by"):
        half_steps.main()
    last = {"start": "svd", "largest_rise": "0", "last": "0.5", "lora_error": "0.4"}
    assert "above LoRA's minimum" in half_steps.broken(last)


def test_lora_at_the_same_numbers(deltas):
    """The error is the mean over all choices of the layers that get one more rank."""
    values = [torch.linalg.svdvals(delta.double()).square() for delta in deltas["a"]]
    total = sum(v.sum() for v in values)

    def lora(ranks):
        return (sum(v[r:].sum() for v, r in zip(values, ranks, strict=True)) / total).item()

    spectrum = equal_numbers.spectrum(deltas["a"])
    at, equal = equal_numbers.lora_errors(spectrum, 4, 1.0)
    assert at == pytest.approx(lora([4, 4, 4]), rel=1e-5)
    assert equal == pytest.approx(lora([5, 5, 5]), rel=1e-5)
    third = sum(lora([4 + (i == j) for i in range(3)]) for j in range(3)) / 3
    assert equal_numbers.lora_errors(spectrum, 4, 1 / 3)[1] == pytest.approx(third, rel=1e-5)
    assert equal_numbers.lora_errors(spectrum, 4, 2.5)[1] == pytest.approx(
        (lora([6, 6, 6]) + lora([7, 7, 7])) / 2, rel=1e-5
    )
    rows = equal_numbers.compare("a", deltas["a"], {4: {0: 0.9, 2: 0.5}, 6: {1: 0.3}})
    assert [(row["rank"], row["k"]) for row in rows] == [(4, 2), (6, 1)]
    for row, numbers in zip(rows, (4 - 2 + 3 * 2, 6 - 1 + 3), strict=True):
        adapter = solver.decompose(deltas["a"], row["rank"], row["k"], iterations=0)
        assert adapter.d[0].numel() == numbers
        assert float(row["lora_error_equal"]) == pytest.approx(adapter.lora_error_equal, abs=1e-5)
        assert float(row["extra_ranks"]) == pytest.approx(numbers / (20 + 16), abs=1e-4)
    assert equal_numbers.shown(rows) == [
        {"module": "a", "r": 4, "k=2": f"{0.5 / float(rows[0]['lora_error_equal']):.4f}"},
        {"module": "a", "r": 6, "k=1": f"{0.3 / float(rows[1]['lora_error_equal']):.4f}"},
    ]


# Compress


@pytest.fixture(scope="module")
def judge():
    """A base, and a fine-tune that changed every parameter, embeddings and norms included."""
    base, tuned = make_model(), make_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    tokenizer = make_tokenizer()
    task = make_task("maths", tokenizer, train=0, dev=0, test=4)
    return Judge(base, tuned, tokenizer, task, bfloat16=False)


def test_adapters_are_judged_as_written(judge, monkeypatch):
    """Every row's loss equals the loss of its weights computed with dense matrices."""
    installed = []
    real = compress.scores
    monkeypatch.setattr(
        compress, "scores", lambda model, *rest: installed.append(model) or real(model, *rest)
    )
    base, tuned = judge.base.state_dict(), judge.tuned.state_dict()
    before = {name: value.clone() for name, value in base.items()}
    keys = [Key(BASE), Key(WHOLE), Key(LAYERS), Key(ADAPTER, 4, 0), Key(ADAPTER, 4, 2)]
    rows = {key: judge.row(key, iterations=5) for key in keys}
    adapted = [name for name in base if "_proj.weight" in name]

    def loss(weights):
        model = make_model()
        model.load_state_dict(base | weights)
        return mean_loss(model, judge.task.test, 0, bfloat16=False)

    def cut(delta, rank):
        u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
        return ((u[:, :rank] * s[:rank]) @ v[:rank]).float()

    lora = {name: base[name] + cut(tuned[name] - base[name], 4) for name in adapted}
    expected = {
        Key(BASE): loss({}),
        Key(WHOLE): loss(tuned),
        Key(LAYERS): loss({name: tuned[name] for name in adapted}),
        Key(ADAPTER, 4, 0): loss(lora),
    }
    for key, value in expected.items():
        assert float(rows[key]["loss"]) == pytest.approx(value, abs=2e-5), key
    assert len({row["loss"] for row in rows.values()}) == len(rows)
    squares = sum((tuned[name] - base[name]).square().sum() for name in adapted)
    missed = sum((tuned[name] - lora[name]).square().sum() for name in adapted)
    for key in keys[3:]:
        assert float(rows[key]["lora_error"]) == pytest.approx((missed / squares).item(), abs=2e-6)
        assert 0 < rows[key]["bytes"] - 4 * rows[key]["numbers"] < 8000  # the header
    assert rows[keys[3]]["error"] == rows[keys[3]]["lora_error"]
    assert float(rows[keys[4]]["error"]) < float(rows[keys[4]]["lora_error"])
    assert rows[keys[3]]["numbers"] == sum(4 * sum(base[name].shape) for name in adapted)
    merged = rasa_ext.merge_and_unload(installed[-1]).state_dict()
    missed = sum((tuned[name] - merged[name]).square().sum() for name in adapted)
    assert float(rows[keys[4]]["error"]) == pytest.approx((missed / squares).item(), abs=2e-6)
    assert all(torch.equal(value, before[name]) for name, value in base.items())


def test_compress_resumes_and_prints(judge, tmp_path, monkeypatch, capsys):
    folder = save_base(tmp_path / "base")
    judge.tuned.save_pretrained(tmp_path / "tuned")
    monkeypatch.setattr(compress, "find_smollm2", lambda: str(folder))
    monkeypatch.setattr(compress, "RANKS", (8,))
    words = ["compress", "--weights", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--held-out", "3"])
    real, calls = Judge.row, []

    def stop_after_four(self, key):
        calls.append(key)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, key, iterations=2)

    monkeypatch.setattr(Judge, "row", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        compress.main()
    compress.main()
    assert calls[5:] == compress.planned()[4:]
    assert [key.k for key in compress.planned()[3:]] == [0, 1, 2]
    printed = capsys.readouterr().out
    for name in (BASE, WHOLE, LAYERS, "LoRA r=8, truncated SVD", "RaSA r=8 k=2"):
        assert f"| {name} |" in printed
