"""What is compared: the YAML, checked, and the runs that follow from it and from what is done."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from research.experiments.tasks import NAMES, SEQ_LEN

HERE = Path(__file__).parent
CONFIG, RESULTS = HERE / "config.yaml", HERE / "results"
KINDS = {
    "lora": ("rank", "alpha"),
    "rasa": ("rank", "k", "alpha"),
    "vera": ("rank",),
    "peft": ("method", "options"),
    "full": (),
    "ours": ("method", "options", "steps"),
}
"""Kinds of methods and what each needs besides its rates.

"peft" is a method of PEFT by name, with the options of its config, over all linear layers.
"ours" is a method of ``rasa_ext.methods`` by name, with the options of its config and those of what
it does between the steps: see ``methods.between``.
"""
OPTIONS = {"lora": ("ranks",), "ours": ("optimizer",)}
"""What some kinds may have besides "share" and "against", which all may.

"ranks" are planned, by ``methods.planned``; "optimizer" is for ``methods.optimizer``; "share" is
the part of a task's steps that the method gets, 1 unless given; "against" the methods that
the report takes from this one, ``REFERENCE`` unless given.
"""
REFERENCE = "lora-r8"


@dataclasses.dataclass(frozen=True)
class Config:
    """The choices of a comparison; see ``config.yaml``."""

    steps: Mapping[str, int]
    """Of every task."""
    batch_size: int
    train: int
    dev: int
    test: int
    other_text: int
    bfloat16: bool
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    best: int
    """Rates of a method that get the further seeds."""
    methods: Mapping[str, Mapping[str, Any]]
    ladder: tuple[float, ...] = ()
    """Rates beyond a method's own, tried one by one while the best is the lowest or the highest."""
    seq_len: int = SEQ_LEN
    questions: int | None = None
    """Of exact match; as many as ``test`` unless given."""
    every: int = 0
    """Steps after which the loss to choose by is measured and the run saved; 0: never."""

    def settings(self, task: str, method: str) -> str:
        """A short mark of all that makes runs of a method comparable, rate and seed left out."""
        left_out = ("tasks", "seeds", "best", "methods", "ladder", "every")
        # A field that is left at its default came after the first results, and changes none.
        default = {field.name: field.default for field in dataclasses.fields(self)}
        same = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in left_out and value != default[name]
        }
        same["steps"] = self.steps[task]
        if method != BASE:
            spec = self.methods[method]
            same["method"] = {k: v for k, v in spec.items() if k not in ("rates", "against")}
        return f"{zlib.crc32(json.dumps(same, sort_keys=True).encode()):08x}"


BASE = "base"
"""The model before any training stands in the table as a method."""


class Key(NamedTuple):
    """What tells one run from another."""

    task: str
    method: str
    lr: float
    seed: int


def read_config(path: Path | str = CONFIG, names: Collection[str] = NAMES) -> Config:
    """Read and check a YAML whose tasks are some of ``names``.

    Raises ValueError naming the key, what was expected and what came.
    """
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    fields = dataclasses.fields(Config)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    optional = {field.name for field in fields} - needed
    if not isinstance(given, dict) or set(given) - optional != needed:
        got = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{path}: expected the keys {', '.join(sorted(needed))}, got {got}.")
    for task in given["tasks"]:
        if task not in names:
            raise ValueError(f"tasks: expected some of {', '.join(names)}, got {task!r}.")
    for name, spec in given["methods"].items():
        kind = spec.get("kind")
        if kind not in KINDS:
            raise ValueError(f"methods: {name}: expected a kind of {tuple(KINDS)}, got {kind!r}.")
        needed = {"kind", "rates", *KINDS[kind]}
        options = {*OPTIONS.get(kind, ()), "share", "against"}
        if set(spec) - options != needed or not spec["rates"]:
            raise ValueError(
                f"methods: {name}: expected {', '.join(sorted(needed))}, got "
                f"{', '.join(sorted(spec))}."
            )
        if given.get("every") and (spec.get("steps") or "optimizer" in spec):
            raise ValueError(
                f"every: expected 0 with {name}, whose state between steps is not saved, got "
                f"{given['every']}."
            )
    tasks, steps = tuple(given["tasks"]), given["steps"]
    if isinstance(steps, int):
        steps = dict.fromkeys(tasks, steps)
    if set(steps) != set(tasks):
        raise ValueError(
            f"steps: expected a number, or one for each of {', '.join(tasks)}, got {steps}."
        )
    lists = {name: tuple(given.get(name, ())) for name in ("seeds", "ladder")}
    return Config(**given | lists | {"tasks": tasks, "steps": steps})


def pending(config: Config, rows: Iterable[Mapping[str, str]]) -> list[Key]:
    """The runs that are known to be needed and not in ``rows``, the most telling first.

    At the first seed: of every task the untrained model and every method's first rate, then every
    method's second, and so on, and rates of the ladder; then, seed by seed, the rates that were
    best on the rows to choose by, for every method whose rates are all done.
    """
    have = {key_of(row): row for row in of_config(config, rows)}
    first, *others = config.seeds
    wanted = []
    for place in range(max(len(spec["rates"]) for spec in config.methods.values())):
        for task in config.tasks:
            wanted += [Key(task, BASE, 0.0, first)] if place == 0 else []
            wanted += [
                Key(task, method, float(spec["rates"][place]), first)
                for method, spec in config.methods.items()
                if place < len(spec["rates"])
            ]
    for task in config.tasks:
        for method in config.methods:
            wanted += [Key(task, method, lr, first) for lr in further(config, have, task, method)]
    for seed in others:
        for task in config.tasks:
            for method in config.methods:
                wanted += [Key(task, method, lr, seed) for lr in best(config, have, task, method)]
    return [key for key in wanted if key not in have]


def best(
    config: Config, have: Mapping[Key, Mapping[str, str]], task: str, method: str
) -> list[float]:
    """The best rates of a method by the loss to choose by; none until all rates are done."""
    losses = _swept(config, have, task, method)
    rates = set(map(float, config.methods[method]["rates"]))
    if not rates <= losses.keys() or further(config, have, task, method):
        return []
    finite = (lr for lr in losses if math.isfinite(losses[lr]))
    return sorted(finite, key=losses.__getitem__)[: config.best]


def further(
    config: Config, have: Mapping[Key, Mapping[str, str]], task: str, method: str
) -> list[float]:
    """The next rate of the ladder, where the best so far is at the end of those that are done."""
    losses = _swept(config, have, task, method)
    rates = set(map(float, config.methods[method]["rates"]))
    if not rates <= losses.keys():
        return []
    top = min(losses, key=losses.__getitem__)
    lower = [lr for lr in config.ladder if lr < min(losses)]
    higher = [lr for lr in config.ladder if lr > max(losses)]
    if top == min(losses):
        return [max(lower)] if lower else []
    return [min(higher)] if higher and top == max(losses) else []


def _swept(
    config: Config, have: Mapping[Key, Mapping[str, str]], task: str, method: str
) -> dict[float, float]:
    """Loss to choose by at the first seed, by rate."""
    rates = {*map(float, config.methods[method]["rates"]), *config.ladder}
    keys = (Key(task, method, lr, config.seeds[0]) for lr in sorted(rates))
    return {key.lr: number(have[key]["dev_loss"]) for key in keys if key in have}


def of_config(config: Config, rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The rows whose settings are those of ``config``, and whose rates are among its method's."""
    marks = {
        (task, method): config.settings(task, method)
        for task in config.tasks
        for method in (*config.methods, BASE)
    }
    rates = {
        method: {*map(float, spec["rates"]), *config.ladder}
        for method, spec in config.methods.items()
    }
    return [
        row
        for row in rows
        if marks.get((row["task"], row["method"])) == row["settings"]
        and float(row["lr"]) in rates.get(row["method"], {0.0})
    ]


def file_of(results: Path, config: Path, name: str) -> Path:
    """The place of what belongs to one YAML alone; the rows of all stand in one file."""
    return results / (name if config.stem == CONFIG.stem else f"{config.stem}-{name}")


def key_of(row: Mapping[str, str]) -> Key:
    """The run that a row of the table is about."""
    return Key(row["task"], row["method"], float(row["lr"]), int(row["seed"]))


def number(text: str) -> float:
    """A cell of the table; infinity for an empty one, which a run that diverged leaves."""
    return float(text) if text else math.inf
