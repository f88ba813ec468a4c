"""The comparison on a tiny model: the plan, resuming, sharing between processes, the report."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import rasa_ext
from benchmarks.batches import collate, encoded
from rasa_ext.nn.rasa_experts import RasaExpertWeight
from rasa_research.optim import LoraPro
from rasa_research.ranks import hidden_dimensions, intrinsic_ranks
from research.experiments.compare import config as compare_config
from research.experiments.compare import curves, report, run, step_time
from research.experiments.compare.config import BASE, REFERENCE, Key, only, pending, read_config
from research.experiments.compare.methods import (
    between,
    groups,
    optimizer,
    planned,
    prepared,
    targets,
)
from research.experiments.compare.run import make_run
from research.experiments.experts.upcycled import made, upcycled
from research.experiments.table import Table
from research.experiments.training import Recipe, Run
from tests.helpers.adapters import same_adapters
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base, sums

pytest.importorskip("peft")

PAD = 0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows():
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token
    return [encoded(p["prompt"], p["completion"] + end, tokenizer, 64) for p in sums(12)]


@pytest.fixture
def small(tmp_path):
    """The config file of a comparison that takes seconds."""
    given = {
        "steps": 2,
        "batch_size": 2,
        "train": 6,
        "dev": 2,
        "test": 3,
        "other_text": 1,
        "bfloat16": False,
        "tasks": ["maths"],
        "best": 2,
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


def test_every_checked_in_run_is_of_a_config():
    """A renamed method or option changes the settings' hash; the report then ignores the run."""
    rows = Table(compare_config.RESULTS / "runs.csv", run.COLUMNS).rows()
    configs = [read_config(path) for path in compare_config.HERE.glob("*.yaml")]
    known = {id(row) for config in configs for row in compare_config.of_config(config, rows)}
    assert len(rows) > 300
    assert [row for row in rows if id(row) not in known] == []


def test_every_method_of_the_family_trains(rows):
    """Each method trains with the steps of its config: gates move, boosters are stacked."""
    config = read_config(compare_config.HERE / "family.yaml")
    assert {spec["kind"] for spec in config.methods.values()} == {"rasa", "lora", "ours"}
    assert config.best == 1
    numbers = {}
    for name, spec in config.methods.items():
        if spec["kind"] != "ours":
            continue
        model = prepared(make_model(), spec, 1, bfloat16=False)
        recipe = Recipe(9, 4, 1e-2, bfloat16=False)
        steps, made = between(model, spec, 1), optimizer(model, spec)
        run = Run(model, rows, PAD, recipe, groups(model, spec, 1e-2), steps, made)
        numbers[name] = run.trainable
        while run.going:
            run.advance()
        assert run.losses[-1] < run.losses[0], name
        ranks = {row.R for row in rasa_ext.summary(model)}
        assert isinstance(run._optimizer, LoraPro) == name.startswith("lora-pro")
        if name == "xgblora":
            assert ranks == {2}
        if name == "rasa-r8-k1-gates":
            d = next(m.d for m in model.modules() if isinstance(m, rasa_ext.RasaLinear))
            plain = prepared(make_model(), {**spec, "steps": {}}, 1, bfloat16=False)
            other = Run(plain, rows, PAD, recipe, groups(plain, spec, 1e-2))
            while other.going:
                other.advance()
            its = next(m.d for m in plain.modules() if isinstance(m, rasa_ext.RasaLinear))
            assert d[7:].abs().sum() < its[7:].abs().sum()
    alike = ("sora-r8", "block-lora-r16-n2", "lora-pro-r8", "lora-pro-factors-r8")
    sizes = [numbers[name] for name in alike]
    assert max(sizes) < 1.05 * min(sizes)


def test_ranks_are_planned_once(small, tmp_path, monkeypatch):
    bench = run.Bench(read_config(small), make_model(), make_tokenizer(), tmp_path)
    task = bench.task("maths")
    found = bench.ranks(task, 4)
    monkeypatch.delattr(run, "planned")
    assert run.Bench(bench.config, None, bench.tokenizer, tmp_path).ranks(task, 4) == found
    with pytest.raises(NameError):
        bench.ranks(task, 5)


def test_planned_ranks_are_in_proportion_and_of_the_wanted_size(rows):
    base = make_model()
    batch = {k: v for k, v in collate(rows, PAD).items() if k != "labels"}
    found, dimensions = planned(base, [batch], 8), hidden_dimensions(base, [batch])
    gains = [max(after - before, 0) for before, after in itertools.pairwise(dimensions)]
    by_gain = sorted(range(len(gains)), key=gains.__getitem__)
    ranks = [found[f"model.layers.{block}.self_attn.q_proj"] for block in by_gain]
    assert ranks == sorted(ranks)
    assert found.keys() == intrinsic_ranks(base, [batch]).keys()
    spec = {"kind": "lora", "rank": 8, "alpha": 8, "ranks": "gelora"}
    model = prepared(base, spec, 1, bfloat16=False, ranks=found)
    plain = prepared(base, spec, 1, bfloat16=False)
    trained, wanted = (
        sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (model, plain)
    )
    assert trained == pytest.approx(wanted, rel=0.1)
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            assert module.lora_A["default"].weight.shape[0] == found[name]


def test_equal_time_shares_its_methods_and_most_of_its_runs_with_the_family():
    family = read_config(compare_config.HERE / "family.yaml")
    config = read_config(compare_config.HERE / "equal_time.yaml")
    assert config.methods.keys() == family.methods.keys()
    for name, spec in config.methods.items():
        same = {k: v for k, v in spec.items() if k not in ("rates", "share")}
        assert same == {k: v for k, v in family.methods[name].items() if k != "rates"}
        assert set(spec["rates"]) <= set(family.methods[name]["rates"])
        marks = [each.settings("maths", name) for each in (family, config)]
        assert (marks[0] == marks[1]) == ("share" not in spec)


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
        ({"tasks": ["chess"]}, "tasks: expected some of maths, docstrings, gsm8k, got 'chess'"),
        ({"methods": {"x": {"kind": "dora", "rates": [1]}}}, "methods: x: expected a kind"),
        ({"methods": {"x": {"kind": "lora", "rates": [1]}}}, "methods: x: expected alpha, kind"),
        (
            {"methods": {"x": {"kind": "full", "rates": [1], "optimizer": {}}}},
            "methods: x: expected kind, rates, got kind, optimizer, rates",
        ),
        ({"stepz": 1}, "expected the keys"),
        (
            {"methods": {"x": {"kind": "ours", "method": "lora", "options": {}}}},
            "methods: x: expected kind, method, options, rates, steps, got",
        ),
        (
            {
                "every": 5,
                "methods": {
                    "x": {
                        **{"kind": "ours", "method": "sora", "options": {}, "rates": [1]},
                        "steps": {"gates": {}},
                    }
                },
            },
            "every: expected 0 with x, whose state between steps is not saved, got 5",
        ),
        ({"steps": {"docstrings": 3}}, "steps: expected a number, or one for each of maths, got"),
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
        "settings": config.settings(key.task, key.method),
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
    # Rates that only another config sweeps do not count.
    less = read_config(small)
    less.methods["lora"]["rates"] = [3.0]
    assert {line["rates"] for line in report.methods_table(less, rows, "maths")[1:]} == {"1 of 1"}
    # Rows with another number of steps do not count.
    small.write_text(yaml.safe_dump(given | {"steps": 3}))
    assert len(pending(read_config(small), rows)) == 5

    line = report.methods_table(config, rows, "maths")[1]
    assert (line["best"], line["seeds"], line["rates"]) == ("3", 2, "4 of 4")
    assert line["held-out loss"] == "0.300 ± 0.141"
    assert line["loss gained on other text"] == "0.000 ± 0.000"
    assert report.sweep_table(config, rows, "maths") == [
        {"method": "lora", "1": 0.5, "2": math.inf, "3": 0.2, "4": 0.6}
    ]


def test_chosen_methods_run_at_every_chosen_rate_with_every_seed(small):
    config = read_config(small)
    chosen = only(config, ["lora", "full"], [1.0, 2.0, 3.0])
    for method in ("lora", "full"):
        assert chosen.settings("maths", method) == config.settings("maths", method)
    rows, runs = [], pending(chosen, [])
    while left := pending(chosen, rows):
        runs += [key for key in left if key not in runs]
        rows.append(row(left[0], chosen, 2 - left[0].lr / 2 + left[0].seed))
    assert set(runs) == {Key("maths", BASE, 0.0, 0)} | {
        Key("maths", method, lr, seed)
        for method in ("lora", "full")
        for lr in (1.0, 2.0, 3.0)
        for seed in (0, 5)
    }
    assert only(config) == config
    assert list(only(config, ["full"]).methods) == ["full"]
    with pytest.raises(ValueError, match=r"^methods: .*'nothing'"):
        only(config, ["nothing"])


def test_the_ladder_goes_on_while_the_best_rate_is_at_an_end(small):
    given = yaml.safe_load(small.read_text()) | {"ladder": [0.5, 1, 2, 3, 4], "best": 1}
    given["methods"] = {"lora": {"kind": "lora", "rank": 4, "alpha": 4, "rates": [2, 3]}}
    small.write_text(yaml.safe_dump(given))
    config, rows = read_config(small), []

    def after(lr: float, loss: float) -> list[float]:
        rows.append(row(Key("maths", "lora", lr, 0), config, loss))
        return [(key.lr, key.seed) for key in pending(config, rows) if key.method != BASE]

    assert after(2.0, 0.5) == [(3.0, 0)]
    assert after(3.0, 0.6) == [(1.0, 0)]
    assert after(1.0, 0.4) == [(0.5, 0)]
    assert after(0.5, 0.45) == [(1.0, 5)]
    assert report.methods_table(config, rows, "maths")[0]["rates"] == "4 of 4"


def test_a_run_that_is_cut_goes_on_from_its_last_loss(small, tmp_path, monkeypatch):
    given = yaml.safe_load(small.read_text()) | {"steps": 5, "every": 2}
    small.write_text(yaml.safe_dump(given))
    config, key = read_config(small), Key("maths", "rasa", 1e-2, 5)
    whole, cut = (
        run.Bench(config, make_model(), make_tokenizer(), tmp_path / name, tmp_path / "state")
        for name in ("whole", "cut")
    )
    expected = whole.do(key)
    advance, done = Run.advance, []

    def cut_in_the_fourth_step(self):
        done.append(self.step)
        if len(done) == 4:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Run, "advance", cut_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        cut.do(key)
    found = cut.do(key)
    assert done == [0, 1, 2, 3, 2, 3, 4]
    for name in ("dev_loss", "test_loss", "last_training_loss", "trainable", "steps"):
        assert found[name] == expected[name]
    paths = [curves.curve_path(b.results, key, found["settings"]) for b in (whole, cut)]
    records = [json.loads(path.read_text()) for path in paths]
    assert records[0]["curve"] == records[1]["curve"]
    assert [point["step"] for point in records[0]["curve"]] == [2, 4, 5]
    assert f"{records[0]['curve'][-1]['loss']:.5f}" == expected["dev_loss"]
    assert records[0]["peak_memory_bytes"] > 2**20
    assert list((tmp_path / "state").iterdir()) == []

    rows = [{name: str(value) for name, value in expected.items()}]
    losses = curves.losses_of(whole.results, rows)
    table = curves.curve_table({"rasa": losses, "none": {}})
    assert table[0].keys() == {"method", "2", "4", "5"}
    curves.draw_curves(config, {"maths": {"rasa": losses}}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_long_comparisons_of_two_tasks_are_alike():
    first, second = (
        read_config(compare_config.HERE / f"{name}.yaml") for name in ("gsm8k", "docstrings_long")
    )
    for name in ("lora-r8", "default-r8-k1"):  # the control of forgetting, on GSM8K alone
        first.methods[name]["rates"].remove(2e-3)
    changed = {"tasks": second.tasks, "steps": second.steps}
    assert dataclasses.replace(first, **changed) == second


def test_rates_are_compared_at_the_default_start():
    methods = read_config(compare_config.HERE / "gsm8k_own_start.yaml").methods
    started = [spec for spec in methods.values() if spec["kind"] == "started"]
    assert len(started) == 14
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    for spec in started:
        blocks = {"blocks": [1, 2]} if "blocks" in spec else {}
        found = prepared(base, spec | blocks, 0, bfloat16=False)
        torch.manual_seed(0)
        config = rasa_ext.RasaConfig(
            rank=spec["rank"], k=spec["k"], target_modules=targets(spec | blocks)
        )
        expected = rasa_ext.patch_model(copy.deepcopy(base), config=config)
        assert same_adapters(found, expected)


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_small"])
def test_methods_of_a_long_comparison_train_as_many_numbers(name, rows):
    config = read_config(compare_config.HERE / f"{name}.yaml")
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 64}
    with torch.device("meta"):
        smollm2 = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    trained, losses = {}, {}
    for method, spec in config.methods.items():
        model = prepared(smollm2, spec, 0, bfloat16=False)
        trained[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tiny = make_run(make_model(), spec, rows, PAD, Recipe(6, 4, 1e-2, bfloat16=False))
        while tiny.going:
            tiny.advance()
        losses[method] = (tiny.losses[-1], tiny.losses[0])
    assert all(last < first for last, first in losses.values())
    for method, spec in config.methods.items():
        for against in spec.get("against", [REFERENCE] if spec["kind"] != "lora" else []):
            assert trained[method] == pytest.approx(trained[against], rel=0.021)


def test_differences_are_taken_seed_by_seed(small, monkeypatch):
    monkeypatch.setattr(report, "REFERENCE", "lora")
    config = read_config(small)
    assert report.interval([1.0, 2.0, 3.0], 2) == "+2.00 (-0.48 to +4.48)"
    rows = [row(key, config, 1) for key in pending(config, [])]
    assert report.paired_table(config, rows, "maths") == []  # each method has one seed
    rows += [row(key, config, 1) for key in pending(config, rows)]
    losses = {("lora", "0"): 0.5, ("lora", "5"): 0.9, ("rasa", "0"): 0.6, ("rasa", "5"): 1.2}
    for each in rows:
        if each["lr"] != "0.001" or each["method"] == "full":  # rasa's other rate stays at 1
            each["test_loss"] = str(losses.get((each["method"], each["seed"]), 1))
        each["dev_loss"] = "0.1" if each["lr"] == "0.01" else "0.2"
        if each["method"] == "vera":
            each["exact_match"] = ""
    found = {line["method"]: line for line in report.paired_table(config, rows, "maths")}
    assert set(found) == {"rasa", "vera", "full"}
    assert found["rasa"]["seeds"] == 2
    assert found["rasa"]["held-out loss"] == "+0.200 (-1.071 to +1.471)"
    assert found["rasa"]["lower at"] == "0 of 2"
    assert found["rasa"]["exact match, %"] == "+0 (+0 to +0)"
    assert found["vera"]["held-out loss"] == "+0.300 (-2.241 to +2.841)"
    assert "exact match, %" not in found["vera"]


def test_lion_moves_every_parameter_by_its_rate():
    spec = {"kind": "ours", "method": "rasa", "options": {"rank": 4}, "optimizer": {"lion": {}}}
    model = prepared(make_model(), spec, 0, bfloat16=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    lion = optimizer(model, spec)(trained, lr=1e-2, weight_decay=0.0, fused=True)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    lion.step()
    for was, parameter in zip(before, trained, strict=True):
        torch.testing.assert_close(parameter, was - 1e-2)


def test_the_comparison_runs_resumes_and_is_reported(small, tmp_path, monkeypatch, capsys):
    base = str(save_base(tmp_path / "base"))
    monkeypatch.setattr(run, "find_smollm2", lambda: base)
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


def test_a_run_that_another_process_is_at_is_left_to_it(small, tmp_path):
    """The first run waits while another process claims it; this process does the second."""
    config, table = read_config(small), Table(tmp_path / "runs.csv", run.COLUMNS)
    first, second, *_ = pending(config, [])
    code = (
        "import sys; from research.experiments.table import Table\n"
        f"with Table({str(table.path)!r}, {run.COLUMNS!r}).claim({first!r}) as mine:\n"
        "    print(mine, flush=True); sys.stdin.readline()"
    ).replace(repr(first), repr(repr(first)))
    words = [sys.executable, "-c", code]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == "True\n"

        class Bench:
            def do(self, key):
                return row(key, config, 1)

        bench = Bench()
        bench.config = config
        assert run.advance(bench, table)
        assert [compare_config.key_of(r) for r in table.rows()] == [second]
        other.communicate("\n")
    assert run.advance(bench, table)
    assert compare_config.key_of(table.rows()[1]) == first


def test_a_share_of_the_steps_is_a_run_of_its_own(small, tmp_path):
    """A method with a share has its own settings hash, and the table shows its steps."""
    given = yaml.safe_load(small.read_text())
    given |= {"steps": 10, "seeds": [0]}
    given["methods"] = {name: given["methods"][name] for name in ("rasa", "lora")}
    small.write_text(yaml.safe_dump(given, sort_keys=False))
    rows = [row(key, read_config(small), 1) for key in pending(read_config(small), [])]
    given["methods"]["rasa"] |= {"share": 0.84, "rates": [1e-3]}
    small.write_text(yaml.safe_dump(given, sort_keys=False))
    config = read_config(small)
    assert pending(config, rows) == [Key("maths", "rasa", 1e-3, 0)]
    bench = run.Bench(config, make_model(), make_tokenizer(), tmp_path)
    done = bench.do(pending(config, rows)[0])
    assert done["steps"] == 8
    rows = [{**r, "steps": "10"} for r in rows] + [{k: str(v) for k, v in done.items()}]
    table = report.methods_table(config, rows, "maths", {"rasa": "1.19"})
    shown = [(line["method"], line["steps"], line["step time"]) for line in table[1:]]
    assert shown == [("rasa", "8", "1.19"), ("lora", "10", None)]
    whole = report.summary_table(config, rows, {"rasa": "1.19"})
    assert [line["maths: loss"] for line in whole] == [line["held-out loss"] for line in table]
    assert list(whole[1])[:3] == ["method", "trainable parameters", "step time"]


def test_other_steps_of_one_task_leave_the_other_tasks_rows(small):
    given = yaml.safe_load(small.read_text()) | {"tasks": ["maths", "docstrings"]}
    rows, left = [], []
    for docstrings in (2, 3):
        small.write_text(yaml.safe_dump(given | {"steps": {"maths": 2, "docstrings": docstrings}}))
        config = read_config(small)
        rows = rows or [row(key, config, 1) for key in pending(config, [])]
        left += [{key.task for key in pending(config, rows)}]
    assert left[0] == {"maths", "docstrings"}  # only the other seed is left
    done = {key.task for key in map(compare_config.key_of, compare_config.of_config(config, rows))}
    assert done == {"maths"}


def test_methods_begin_where_the_base_is_and_leave_it_alone(small, rows):
    base, batch = make_model(), collate(rows[:2], PAD)
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


SHAPE = {"blocks": 1, "experts": 3, "top": 2}


def test_copies_of_an_mlp_compute_what_it_computes(rows):
    batch = collate(rows[:2], PAD)
    expected = make_model()(**batch).logits
    same = upcycled(make_model(), **SHAPE, noise=0.0)
    torch.testing.assert_close(same(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    other = upcycled(make_model(), **SHAPE, noise=0.1)
    assert (other(**batch).logits - expected).abs().max() > 1e-2
    assert not hasattr(other.model.layers[0].mlp, "experts")


def test_an_upcycled_base_is_trained_once(rows, tmp_path):
    given = {"steps": 2, "lr": 1e-2, "rows": rows, **SHAPE, "noise": 0.1}
    first = made(make_model(), make_tokenizer(), tmp_path, **given).state_dict()
    before = upcycled(make_model(), **SHAPE, noise=0.1).state_dict()
    moved = {name for name in first if not torch.equal(first[name], before[name])}
    assert moved == {name for name in first if ".layers.1.mlp." in name}
    again = made(make_model(), make_tokenizer(), tmp_path, **given | {"rows": []})
    assert not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(value, first[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(("k", "fixed"), [(0, True), (1, True), (2, True), (2, False)])
def test_experts_have_loras_of_their_own_or_share_them(k, fixed, rows):
    base = upcycled(make_model(), **SHAPE, noise=0.1)
    spec = {"kind": "experts", "rank": 2, "k": k, "fixed": fixed}
    model = prepared(base, spec, 1, bfloat16=False)
    one = Run(model, rows, PAD, Recipe(2, 4, 1e-1, bfloat16=False))
    one.advance()
    one.advance()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    diagonals = [m.d for m in model.modules() if isinstance(m, RasaExpertWeight)]
    assert len(diagonals) == 2
    assert all(torch.equal(d, torch.ones_like(d)) == fixed for d in diagonals)
    learnt = 0 if fixed else sum(d.numel() for d in diagonals)
    assert trained == 3 * 2 * (96 + 32 + 32 + 48) + learnt
    experts = rasa_ext.merge_and_unload(model).model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        change = getattr(experts, name) - getattr(base.model.layers[1].mlp.experts, name)
        alike = torch.allclose(change, change[:1].expand_as(change), rtol=1e-3, atol=1e-5)
        assert alike == (k == 2 and fixed)
        used = torch.linalg.matrix_rank(change, rtol=1e-4).max()  # of an expert that got tokens
        assert used == 2 - k + 3 * k


def test_the_diagonal_starts_where_the_config_says_in_the_blocks_it_names():
    spec = {"kind": "started", "rank": 4, "k": 1, "start": [1.0, 0.25], "blocks": [1]}
    model = prepared(make_model(), spec, 0, bfloat16=False)
    started = {name: p for name, p in model.named_parameters() if name.endswith(".d")}
    assert len(started) == 7
    assert all(".layers.1." in name for name in started)
    assert all(d.tolist() == [1.0, 1.0, 1.0, 0.25] for d in started.values())
    lora = prepared(make_model(), {**spec, "kind": "lora", "alpha": 4}, 0, bfloat16=False)
    adapted = [name for name, p in lora.named_parameters() if p.requires_grad and "lora_A" in name]
    assert len(adapted) == 7
    assert all(".layers.1." in name for name in adapted)


def test_steps_of_all_methods_are_timed_together(small, rows, tmp_path):
    runs = step_time.make_runs(
        make_model(), rows, PAD, read_config(small).methods, Recipe(5, 2, 1e-4, bfloat16=False)
    )
    found = step_time.measure(runs, rounds=2)
    assert [line["method"] for line in found] == ["rasa", "lora", "vera", "full"]
    assert found[0][f"over_{step_time.REFERENCE}"] == "1.000"
    assert all(one.step == 5 for one in runs.values())
    again = {"full": runs["full"]}
    runs["full"].losses.clear()
    assert step_time.measure(again, 2, reference="full", processor=True)[0]["over_full"] == "1.000"
    assert report.step_table(tmp_path / "step_time.csv") == []
    step_time.write(tmp_path / "step_time.csv", found)
    shown = report.step_table(tmp_path / "step_time.csv")
    assert {line["method"] for line in shown} == {"rasa", "lora", "vera", "full"}
    times = [float(line["seconds a step (quartiles)"].split()[0]) for line in shown]
    assert times == sorted(times)
    assert next(line for line in shown if line["method"] == "rasa")["/ rasa-r8-k1"] == "1.000"
