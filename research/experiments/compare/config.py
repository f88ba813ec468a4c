"""The config of a comparison: read and check the YAML, and list the runs still to do."""

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
    "started": ("rank", "k", "start"),
    "vera": ("rank",),
    "peft": ("method", "options"),
    "full": (),
    "ours": ("method", "options", "steps"),
    "experts": ("rank", "k"),
    "continued": ("rank", "before", "as"),
}
"""Kinds of methods and the keys that each needs besides "rates".

"started" is RaSA with "start": the initial entries of d, for private ranks and for pooled ranks; or
for private ranks, for the k ranks that the layer gave to the pool, and for the ranks of others.
"peft" is a method of PEFT by name, with the options of its config, over all linear layers.
"ours" is a method of ``rasa_ext.methods`` by name. Its "options" are those of its config, and its
"steps" configure the work between optimizer steps: see ``methods.between``.
"experts" is RaSA over the experts of each layer, with a base that is ``upcycled``. Its "fixed"
keeps d at LoRA's scale: k = 0 is a LoRA for each expert, k = r one LoRA for all experts of the
layer, of rank r times their number, and a k between has both.
"continued" trains on a LoRA of "rank", which had "before" as its steps and rate: "as" a "lora", a
"rasa" with k = r, or a "wider" LoRA of twice the rank. Only known_rank has such bases.
"""
OPTIONS = {
    "lora": ("ranks", "blocks"),
    "rasa": ("start",),
    "started": ("blocks", "targets", "d_lr_ratio"),
    "ours": ("optimizer",),
    "experts": ("fixed",),
}
"""Optional keys of some kinds; every kind may also have "share" and "against".

"ranks": plan the ranks by ``methods.planned``. "blocks": adapt these blocks only. "start": that of
``patch_model``, by default "paper". "optimizer": options for ``methods.optimizer``. "d_lr_ratio":
the rate of d over that of the rest. "share": the share of the task's steps that the method trains
for, by default 1. "against": the methods that the report subtracts from this one, by default
``REFERENCE``.
"""
REFERENCE = "lora-r8"


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of a comparison; see ``config.yaml``."""

    steps: Mapping[str, int]
    """Training steps by task."""
    batch_size: int
    train: int
    dev: int
    test: int
    other_text: int
    bfloat16: bool
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    best: int
    """How many of a method's best rates also run with the other seeds."""
    methods: Mapping[str, Mapping[str, Any]]
    ladder: tuple[float, ...] = ()
    """Further rates, tried one by one while the best rate is the lowest or highest so far."""
    seq_len: int = SEQ_LEN
    questions: int | None = None
    """Number of questions for exact match; defaults to ``test``."""
    every: int = 0
    """Steps between measurements of the dev loss, each of which saves the run; 0 means never."""
    upcycled: Mapping[str, Any] | None = None
    """Arguments of ``made``, which gives the base's last blocks experts."""

    def settings(self, task: str, method: str) -> str:
        """Return a short hash of all settings that must agree for runs to be comparable.

        Rate and seed are not part of it.
        """
        left_out = ("tasks", "seeds", "best", "methods", "ladder", "every")
        # Fields with defaults were added after the first results; defaults leave old hashes valid.
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
"""Name of the untrained model, which the table lists as a method."""


class Key(NamedTuple):
    """The values that identify a run."""

    task: str
    method: str
    lr: float
    seed: int


def read_config(path: Path | str = CONFIG, names: Collection[str] = NAMES) -> Config:
    """Read and check a YAML config with tasks from ``names``.

    Raises ValueError if a key or value is wrong; the message names the key.
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


def only(config: Config, methods: Collection[str] = (), rates: Collection[float] = ()) -> Config:
    """Return ``config`` with these methods alone, and with every seed at each of these rates.

    Empty ``methods`` keeps all methods, and empty ``rates`` keeps the config's rates and choice.
    The settings' hashes stay. Raises ValueError if a method is not in the config.
    """
    for name in methods:
        if name not in config.methods:
            known = ", ".join(config.methods)
            raise ValueError(f"methods: expected some of {known}, got {name!r}.")
    chosen = {name: config.methods[name] for name in methods or config.methods}
    if not rates:
        return dataclasses.replace(config, methods=chosen)
    chosen = {name: {**spec, "rates": [*rates]} for name, spec in chosen.items()}
    return dataclasses.replace(config, methods=chosen, best=len(rates), ladder=())


def pending(config: Config, rows: Iterable[Mapping[str, str]]) -> list[Key]:
    """Return the runs that are known to be needed and are not in ``rows``, in order of running.

    First come the runs with the first seed: the untrained model on every task, every method's first
    rate, then every method's second rate, and so on, then rates of the ladder. Then, for each other
    seed, come the rates with the best dev loss of every method that has run at all its rates.
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
    """Return a method's rates with the best dev loss, or no rate until all rates are done."""
    losses = _swept(config, have, task, method)
    rates = set(map(float, config.methods[method]["rates"]))
    if not rates <= losses.keys() or further(config, have, task, method):
        return []
    finite = (lr for lr in losses if math.isfinite(losses[lr]))
    return sorted(finite, key=losses.__getitem__)[: config.best]


def further(
    config: Config, have: Mapping[Key, Mapping[str, str]], task: str, method: str
) -> list[float]:
    """Return the next rate of the ladder if the best rate is the lowest or highest done."""
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
    """Return the dev loss with the first seed, by rate."""
    rates = {*map(float, config.methods[method]["rates"]), *config.ladder}
    keys = (Key(task, method, lr, config.seeds[0]) for lr in sorted(rates))
    return {key.lr: number(have[key]["dev_loss"]) for key in keys if key in have}


def of_config(config: Config, rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return the rows with the settings and rates of ``config``."""
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
    """Return the path of a result file of one YAML, unlike runs.csv, which all YAMLs share."""
    return results / (name if config.stem == CONFIG.stem else f"{config.stem}-{name}")


def key_of(row: Mapping[str, str]) -> Key:
    """Return the run of a table row."""
    return Key(row["task"], row["method"], float(row["lr"]), int(row["seed"]))


def number(text: str) -> float:
    """Convert a table cell to a number; an empty cell (a diverged run) becomes infinity."""
    return float(text) if text else math.inf
