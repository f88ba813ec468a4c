"""The experiments on a tiny model: what they compute, and that a cut run goes on where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tiny_lm import make_model, make_tokenizer, save_base, sums

from experiments import docstrings
from experiments.compare import config as compare_config
from experiments.compare import report, run, step_time
from experiments.compare.config import BASE, Key, pending, read_config
from experiments.compare.methods import prepared
from experiments.metamathqa import run as metamathqa
from experiments.reconstruction import figures, reconstruct
from experiments.reconstruction.deltas import deltas_of
from experiments.reconstruction.finetune import finetune
from experiments.table import Table
from experiments.tasks import make_task, other_text
from experiments.training import Recipe, Run, batches, mean_loss, trained_losses
from rasa_ext.train.data import parse_example
from rasa_ext.train.encoding import Collator, encode_all

pytest.importorskip("peft")

PAD = 0


@pytest.fixture(scope="module")
def rows():
    examples = [parse_example(pair, "here") for pair in sums(12)]
    return encode_all(examples, make_tokenizer(), 64).rows


@pytest.fixture
def library(tmp_path):
    """A small standard library: modules of every split, a test, and a file that does not parse."""
    folder = tmp_path / "library"
    folder.mkdir()
    for name in map("module{}".format, range(30)):
        lines = [
            f"def {name}_{i}(x):\n    '''{name} does thing {i} to x.'''\n    return x + {i}\n"
            for i in range(3)
        ]
        (folder / f"{name}.py").write_text("\n".join([*lines, "def bare(x):\n    return x\n"]))
    (folder / "test").mkdir()
    (folder / "test" / "module.py").write_text(
        "def f():\n    '''A test that is not taken.'''\n    g()\n"
    )
    (folder / "broken.py").write_text("def f(:\n")
    return folder


# Tables


def test_rows_come_back_and_other_columns_are_refused(tmp_path):
    path = tmp_path / "folder" / "t.csv"
    Table(path, ["a", "b"]).append([{"a": 1, "b": "x,\ny"}, {"a": 2}])
    Table(path, ["a", "b"]).append([{"a": 3, "b": 0.5}])
    assert Table(path, ["a", "b"]).rows() == [
        {"a": "1", "b": "x,\ny"},
        {"a": "2", "b": ""},
        {"a": "3", "b": "0.5"},
    ]
    with pytest.raises(ValueError, match=r"expected the columns a, c, got a, b"):
        Table(path, ["a", "c"])
    with pytest.raises(ValueError, match="dict contains fields"):
        Table(path, ["a", "b"]).append([{"a": 4}, {"z": 1}])
    assert len(Table(path, ["a", "b"]).rows()) == 3  # all of a run's rows or none


# Training


def test_losses_are_those_of_the_whole_model(rows):
    model, batch = make_model(), Collator(PAD)(rows[:5])
    losses = trained_losses(model, batch)
    assert losses.shape[0] == sum(label != -100 for row in rows[:5] for label in row["labels"][1:])
    torch.testing.assert_close(losses.mean(), model(**batch).loss)
    each = torch.cat([trained_losses(model, Collator(PAD)([row])) for row in rows])
    found = mean_loss(model, rows, PAD, bfloat16=False, batch_size=5)
    assert found == pytest.approx(each.mean().item(), rel=1e-5)


def test_the_rate_rises_and_falls():
    recipe = Recipe(steps=20, batch_size=1, lr=2.0)
    rates = [recipe.rate(step) for step in range(20)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 / 18)


def test_every_row_is_met_once_a_pass():
    order = batches(6, 4, 6, seed=1)
    flat = [i for step in order for i in step]
    assert [len(step) for step in order] == [4] * 6
    assert all(sorted(flat[i : i + 6]) == list(range(6)) for i in range(0, 24, 6))
    assert order != batches(6, 4, 6, seed=2)


def test_a_run_goes_on_as_if_it_had_not_been_cut(rows):
    recipe = Recipe(steps=6, batch_size=4, lr=1e-2, bfloat16=False)
    whole, first, second = (Run(make_model(), rows, PAD, recipe) for _ in range(3))
    while whole.going:
        whole.advance()
    for _ in range(3):
        first.advance()
    second.load_state_dict(first.state_dict())
    while second.going:
        second.advance()
    assert second.losses == whole.losses
    assert whole.losses[-1] < whole.losses[0] - 0.5
    with pytest.raises(ValueError, match="expected one of Recipe"):
        Run(make_model(), rows, PAD, Recipe(7, 4, 1e-2)).load_state_dict(first.state_dict())


def test_a_loss_that_is_no_number_ends_a_run(rows):
    run = Run(make_model(), rows, PAD, Recipe(50, 4, 1e30, bfloat16=False))
    while run.going:
        run.advance()
    assert run.diverged
    assert run.step < 50


# Tasks


def test_maths_rows_share_no_question_and_their_answers_are_the_last_numbers():
    tokenizer = make_tokenizer()
    task = make_task("maths", tokenizer, train=8, dev=6, test=8)
    texts = {
        split: {tokenizer.decode(row["input_ids"]) for row in getattr(task, split)}
        for split in ("train", "dev", "test")
    }
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & texts["test"]
    assert (len(texts["train"]), len(texts["dev"]), len(texts["test"])) == (8, 6, 8)
    for prompt, answer, row in zip(task.prompts, task.answers, task.test, strict=True):
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith(prompt)
        assert f"={answer}<|im_end|>" in text
    with pytest.raises(ValueError, match="task: expected one of maths, docstrings, got 'chess'"):
        make_task("chess", tokenizer, train=1, dev=1, test=1)


def test_docstrings_are_split_by_module_and_leave_the_code(library):
    found = {split: docstrings.functions(split, library) for split in ("train", "dev", "test")}
    modules = [{f.module for f in found[split]} for split in found]
    assert not modules[0] & modules[1] | modules[0] & modules[2] | modules[1] & modules[2]
    assert set.union(*modules) == {f"module{i}" for i in range(30)}
    assert sum(map(len, found.values())) == 90
    one = found["train"][0]
    assert one.code.startswith(f"def {one.module}_")
    assert one.summary.startswith(f"{one.module} does thing ")
    assert "does thing" not in one.code


def test_a_task_of_docstrings_and_the_other_text(library, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(library))
    tokenizer = make_tokenizer()
    task = make_task("docstrings", tokenizer, train=10, dev=2, test=3)
    assert (len(task.train), len(task.dev), len(task.test)) == (10, 2, 3)
    assert task.prompts == ()
    learnt = [label for label in task.train[0]["labels"] if label != -100]
    assert "does thing" in tokenizer.decode(learnt)
    assert "return" not in tokenizer.decode(learnt)
    windows = other_text(tokenizer, 3, length=40)
    assert [len(row["input_ids"]) for row in windows] == [40] * 3
    assert windows[0]["labels"] == windows[0]["input_ids"]


# Reconstruction


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
    assert said[0] == "going on after step 4"
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
    assert reconstruct.fill(table, {"a": [], "b": []}) == 0  # nothing is done twice
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


# Comparison


@pytest.fixture
def small(tmp_path):
    """A comparison of seconds, in a file."""
    given = {
        "steps": 2,
        "batch_size": 2,
        "train": 6,
        "dev": 2,
        "test": 3,
        "other_text": 1,
        "bfloat16": False,
        "tasks": ["maths"],
        "seeds": [0, 5],
        "methods": {
            "rasa": {"kind": "rasa", "rank": 4, "k": 1, "alpha": 4, "rates": [1e-3, 1e-2]},
            "lora": {"kind": "lora", "rank": 4, "alpha": 4, "rates": [1e-2]},
            "vera": {"kind": "vera", "rank": 8, "rates": [1e-2]},
            "full": {"kind": "full", "rates": [1e-3]},
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def test_the_shipped_config_is_valid_and_covers_what_it_should():
    config = read_config()
    kinds = [spec["kind"] for spec in config.methods.values()]
    assert set(kinds) == {"lora", "rasa", "vera", "full"}
    assert all(len(spec["rates"]) >= 4 for spec in config.methods.values())
    assert len(config.seeds) >= 3
    assert len(config.tasks) == 2
    assert {spec["k"] for spec in config.methods.values() if spec["kind"] == "rasa"} == {1, 2, 4}
    todo = pending(config, [])
    assert len(todo) == 2 * (1 + sum(len(spec["rates"]) for spec in config.methods.values()))
    assert [key.method for key in todo[:3]] == [BASE, "rasa-r8-k1", "lora-r8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["chess"]}, "tasks: expected some of maths, docstrings, got 'chess'"),
        ({"methods": {"x": {"kind": "dora", "rates": [1]}}}, "methods: x: expected a kind"),
        ({"methods": {"x": {"kind": "lora", "rates": [1]}}}, "methods: x: expected alpha, kind"),
        ({"stepz": 1}, "expected the keys"),
    ],
)
def test_a_wrong_config_is_named(small, change, message):
    small.write_text(yaml.safe_dump(yaml.safe_load(small.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_config(small)


def row(key: Key, config, loss: float | str) -> dict[str, str]:
    same = {"exact_match": "0.5", "other_text_loss": "3", "trainable": "7", "steps": "2"}
    values = {
        "dev_loss": str(loss),
        "test_loss": str(loss),
        "settings": config.settings(key.method),
    }
    return {**{name: str(value) for name, value in key._asdict().items()}, **same, **values}


def test_further_seeds_go_to_the_best_two_rates_of_complete_sweeps(small):
    given = yaml.safe_load(small.read_text())
    given["methods"] = {"lora": {"kind": "lora", "rank": 4, "alpha": 4, "rates": [1, 2, 3, 4]}}
    small.write_text(yaml.safe_dump(given))
    config = read_config(small)
    rows = [row(Key("maths", BASE, 0.0, 0), config, 9)]
    for lr, loss in ((1.0, 0.5), (2.0, ""), (3.0, 0.2)):
        rows.append(row(Key("maths", "lora", lr, 0), config, loss))
    assert pending(config, rows) == [Key("maths", "lora", 4.0, 0)]
    rows.append(row(Key("maths", "lora", 4.0, 0), config, 0.6))
    assert pending(config, rows) == [Key("maths", "lora", lr, 5) for lr in (3.0, 1.0)]
    rows.append(row(Key("maths", "lora", 3.0, 5), config, 0.4))
    assert pending(config, rows) == [Key("maths", "lora", 1.0, 5)]
    # Another number of steps: none of these rows counts.
    small.write_text(yaml.safe_dump(given | {"steps": 3}))
    assert len(pending(read_config(small), rows)) == 5

    line = report.methods_table(config, rows, "maths")[1]
    assert (line["best"], line["seeds"], line["rates"]) == ("3", 2, "4 of 4")
    assert line["held-out loss"] == "0.300 ± 0.141"
    assert line["loss gained on other text"] == "0.000 ± 0.000"
    assert report.sweep_table(config, rows, "maths") == [
        {"method": "lora", "1": 0.5, "2": math.inf, "3": 0.2, "4": 0.6}
    ]


def test_the_comparison_runs_resumes_and_is_reported(small, tmp_path, monkeypatch, capsys):
    base = str(save_base(tmp_path / "base"))
    monkeypatch.setattr(run, "find_model", lambda: base)
    words = ["run", "--config", str(small), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--minutes", "0"])
    run.main()
    assert not (tmp_path / "runs.csv").exists()
    monkeypatch.setattr("sys.argv", words)
    real, calls = run.Bench.do, []

    def stop_after_two(self, key):
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, key)

    monkeypatch.setattr(run.Bench, "do", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run.main()
    monkeypatch.setattr(run.Bench, "do", real)
    run.main()
    rows = Table(tmp_path / "runs.csv", run.COLUMNS).rows()
    config = read_config(small)
    assert [compare_config.key_of(r) for r in rows[:3]] == calls
    assert len(rows) == 1 + 5 + 5  # the base, the sweep, the other seed at every rate
    assert pending(config, rows) == []
    for found in rows:
        assert 0 <= float(found["exact_match"]) <= 1
        assert all(float(found[n]) > 0 for n in ("dev_loss", "test_loss", "other_text_loss"))
        assert found["timing"] in ("quiet", "under load") or found["method"] == BASE
    trained = {found["method"]: int(found["trainable"]) for found in rows}
    shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    shapes |= {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}
    lora = sum(2 * 4 * (out + width) for out, width in shapes.values())
    assert trained["lora"] == lora
    assert trained["rasa"] == lora + 7 * 2 * (4 - 1 + 2 * 1)
    assert trained["vera"] == sum(2 * (8 + out) for out, _ in shapes.values())
    assert trained["full"] == make_model().num_parameters()
    assert trained[BASE] == 0

    monkeypatch.setattr("sys.argv", ["report", *words[1:]])
    report.main()
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    assert "| before training |" in capsys.readouterr().out


def test_methods_begin_where_the_base_is_and_leave_it_alone(small, rows):
    base, batch = make_model(), Collator(PAD)(rows[:2])
    before = {name: value.clone() for name, value in base.state_dict().items()}
    expected = base(**batch).logits
    for spec in read_config(small).methods.values():
        model = prepared(base, spec, 1, bfloat16=False)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        one = Run(model, rows, PAD, Recipe(2, 4, 1e-2, bfloat16=True))
        one.advance()
        one.advance()
        assert (model(**batch).logits - expected).abs().max() > 1e-4
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_steps_of_all_methods_are_timed_together(small, rows):
    runs = step_time.make_runs(
        make_model(), rows, PAD, read_config(small).methods, Recipe(5, 2, 1e-4, bfloat16=False)
    )
    found = step_time.measure(runs, rounds=2)
    assert [line["method"] for line in found] == ["rasa", "lora", "vera", "full"]
    assert found[0][f"over_{step_time.REFERENCE}"] == "1.000"
    assert all(one.step == 5 for one in runs.values())


# PEFT's benchmark


def test_pefts_runner_is_started_with_rasa_registered(tmp_path):
    folder = tmp_path / "method_comparison" / "MetaMathQA"
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text("ANSWER = 42\n")
    (folder / "run.py").write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from peft import PeftConfig\n"
        "from utils import ANSWER\n"
        "assert __name__ == '__main__' and sys.argv[1] == '-v' and ANSWER == 42\n"
        "assert len(sys.argv[2].split('/')) == 3\n"
        "config = PeftConfig.from_pretrained(sys.argv[2])\n"
        "out = {'type': type(config).__module__, 'r': config.r, 'k': config.rasa_k}\n"
        "(Path(__file__).parent / 'found.json').write_text(json.dumps(out))\n"
    )
    names = metamathqa.entries()
    assert "experiments/rasa/llama-3.2-3B-rank32-k4" in names
    metamathqa.run(tmp_path, names[0])
    found = json.loads((folder / "found.json").read_text())
    assert found == {"type": "rasa_ext.peft.config", "r": 32, "k": 4}
    with pytest.raises(ValueError, match="entry: expected one of"):
        metamathqa.run(tmp_path, "experiments/rasa/none")
    with pytest.raises(ValueError, match="PEFT_CHECKOUT: expected a clone"):
        metamathqa.run(tmp_path / "nowhere", names[0])


def test_the_entries_have_all_fields_of_the_config():
    from rasa_ext.peft import RasaConfig

    for name in metamathqa.entries():
        given = json.loads((metamathqa.HERE / name / "adapter_config.json").read_text())
        known = set(RasaConfig().to_dict())
        assert set(given) <= known
        assert {"r", "rasa_k", "rasa_alpha", "rasa_dropout", "target_modules"} <= set(given)
