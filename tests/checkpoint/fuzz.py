"""Fuzz the loaders: a damaged folder must raise a clear error or load completely.

    pytest tests/checkpoint/test_fuzz.py --walks 3000    # three times as many cases

Each case damages a written folder and loads it into a fresh base, in a forked process with
limits on time and memory.
"""

import copy
import json
import linecache
import os
import pickle
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

import rasa_ext
import rasa_ext.peft
from rasa_ext.checkpoint.files import digest
from tests.helpers import experts, methods, oracle
from tests.helpers.adapters import adapters, patched, trainable_copies
from tests.helpers.models import LLAMA
from tests.helpers.refusals import Snapshot

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SECONDS, MEMORY = 3, 2 << 30
PACKAGE = str(Path(rasa_ext.__file__).parent)

OWN, OTHERS, RAW = "the package's sentence", "another's error", "raw error"
EQUAL, OTHER_NUMBERS, HALF = "equal", "other numbers", "half-loaded"
CRASH, OUTSIDE, HANG, OUT_OF_MEMORY = "crash", "written outside", "hang", "memory"
NEVER = (RAW, HALF, CRASH, OUTSIDE, HANG, OUT_OF_MEMORY)


@dataclass(frozen=True)
class Kind:
    """How to write a folder, build a base, load the folder into it, and compute an output."""

    write: Callable[[Path], Any]
    base: Callable[[], nn.Module]
    read: Callable[[nn.Module, Path], Any] = rasa_ext.load_adapter
    run: Callable[[Any], torch.Tensor] = lambda model: model(methods.inputs())


def _logits(model: nn.Module) -> torch.Tensor:
    return LLAMA.loss(model.eval(), LLAMA.inputs(0))[0]


def _llama(**options: Any) -> nn.Module:
    return patched(LLAMA.build(), 4, options.pop("k", 1), seed=1, **options)


def _official(folder: Path, pickled: bool = False) -> None:
    targets = ["q_proj", "down_proj"]
    found = trainable_copies(adapters(_llama(target_modules=targets)))
    tensors = oracle.official_tensors(found)
    options = {"rank": 4, "k": 1, "alpha": 8, "target_modules": targets, "pickled": pickled}
    oracle.write_official(folder, tensors, **options)


def _save_peft(folder: Path, config: Any) -> None:
    model = peft.get_peft_model(LLAMA.build(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(folder)


def _lora(folder: Path, pickled: bool = False) -> None:
    _save_peft(folder, peft.LoraConfig(r=3, target_modules=["q_proj"], alpha_pattern={"x": 3}))
    if pickled:
        torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
        (folder / WEIGHTS).unlink()


def _plug_in(folder: Path) -> None:
    _save_peft(folder, rasa_ext.peft.RasaConfig(r=4, rasa_k=1, target_modules=r".*\.(q|v)_proj"))


def _whole(folder: Path) -> None:
    folder.mkdir()
    save_file(dict(_llama().state_dict()), folder / "model.safetensors")


def _killed(folder: Path) -> None:
    rasa_ext.save_adapter(_llama(), folder)
    old = folder / ".saving.1.part" / "old"
    old.mkdir(parents=True)
    (folder / CONFIG).rename(old / CONFIG)
    shutil.copytree(old, old.with_name("new"))


def _of_method(name: str) -> Kind:
    return Kind(lambda folder: rasa_ext.save_adapter(methods.case(name), folder), methods.base)


def _patched_before() -> nn.Module:
    return patched(LLAMA.build(), 4, 1, seed=2)


def _of_llama(read: Callable = rasa_ext.load_adapter, write: Any = None, **options: Any) -> Kind:
    def saved(folder: Path) -> None:
        rasa_ext.save_adapter(_llama(**options), folder)

    return Kind(write or saved, LLAMA.build, read, _logits)


def _imported(base: nn.Module, folder: Path) -> nn.Module:
    rasa_ext.import_lora(base, folder)
    return base


_METHODS = ("rasa", "rasa, ranks", "lora", "lora-fa")
KINDS = {
    **{name: _of_method(name) for name in _METHODS},
    "trained in full, and rows": _of_llama(
        target_modules=r".*\.(q|down)_proj",
        modules_to_save=["lm_head"],
        trainable_token_indices=[1, 3],
    ),
    "patched before": replace(_of_llama(), base=_patched_before),
    "experts": Kind(
        lambda folder: rasa_ext.save_adapter(
            experts.patched(experts.normed_stack(), "shared"), folder
        ),
        experts.normed_stack,
        run=lambda model: torch.cat(
            [each.double().flatten() for _, each in rasa_ext.delta_weights(model)]
        ),
    ),
    "official": _of_llama(rasa_ext.load_official, _official),
    "official, .bin": _of_llama(rasa_ext.load_official, lambda folder: _official(folder, True)),
    "LoRA": _of_llama(_imported, _lora),
    "LoRA, .bin": _of_llama(_imported, lambda folder: _lora(folder, True)),
    "PEFT": _of_llama(peft.PeftModel.from_pretrained, _plug_in),
    "whole model": replace(_of_llama(write=_whole), base=_patched_before),
    "killed save": _of_llama(write=_killed),
}

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**8, 2**31, 2**63, 10**30, 10**400),
    *(0.5, 1.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "no", "float64", "lora", "LORA", "RASA", "../x", "/x", "é" * 1000),
    *("(.*)*x$", "(a|a)*$", ".*" * 30, "(", "a{99999999999}", "(" * 3000, r"(a)\1", "q_proj"),
    *([], {}, [0], [None], ["q_proj"], [["q_proj"]], ["../x"], [10**8], {"": 1}, {"a": None}),
    *({"(.*)*x$": 4}, {"q_proj": 10**8}, {"q_proj": [1]}, {"0.up_proj": [10**8] * 3}, {"a": "b"}),
    *({"0.up_proj": 10**8}, {"0.up_proj": [1, 2]}, {"0.up_proj": -1}, ["(.*)*x$"]),
)
_ENDLESS = ("(.*)*x$", "(a|a|.)*$x", ".*" * 30, r"(.*)*\1")
HOSTILE: dict[str, tuple[Any, ...]] = {
    "target_modules": (*_ENDLESS, list(_ENDLESS)),
    "exclude_modules": (*_ENDLESS, list(_ENDLESS)),
    "modules_to_save": ([_ENDLESS[0]], [_ENDLESS[1]]),
    "rank_pattern": tuple({each: 10**8} for each in _ENDLESS),
    "alpha_pattern": tuple({each: 10**8} for each in _ENDLESS),
    "r": (10**5, 10**6, 10**8, 2**31),
    "rasa_k": (10**5, 10**6, 10**8, 2**31),
}
"""Values that take all time or memory where they are believed."""

FIELDS = (
    *("r", "rasa_k", "rasa_alpha", "rasa_dropout", "target_modules", "exclude_modules"),
    *("peft_type", "modules_to_save", "rasa_groups", "rasa_method", "rank_pattern", "bias"),
    *("trainable_token_indices", "adapter_dtype", "layers_to_transform", "rasa_experts", "lora"),
    *("lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "use_dora", "rasa_train_A"),
    *("fan_in_fan_out", "base_model_name_or_path", "weight_map"),
)


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch ../outside/bomb",)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")


def _flip(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_files(folder))
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 8, 200))):
        at = draw.randrange(draw.choice((len(data), min(len(data), 400))))
        data[at] = data[at] ^ 1 << draw.randrange(8) if draw.random() < 0.5 else draw.randrange(256)
    path.write_bytes(data)


def _cut(draw: random.Random, folder: Path) -> None:
    """Cut a file, and put other bytes behind what is left."""
    path = draw.choice(_files(folder))
    data = path.read_bytes()
    kept = data[: draw.choice((0, 1, 8, len(data) - 1, draw.randrange(len(data))))]
    path.write_bytes(kept + draw.choice((b"", b"", bytes(draw.randrange(1000)), data[:50])))


def _field(draw: random.Random, folder: Path) -> None:
    path = draw.choice([path for path in _files(folder) if path.suffix == ".json"] or [None])
    if path is None:
        return _flip(draw, folder)
    content = json.loads(path.read_text())
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        owner = content
        while True:
            key = draw.choice([*owner, *owner, *FIELDS])
            if not isinstance(owner.get(key), dict) or not owner[key] or draw.random() < 0.5:
                break
            owner = owner[key]
        if (chance := draw.random()) < 0.15:
            owner.pop(key, None)
        elif chance < 0.4 and owner is content:
            key = draw.choice(tuple(HOSTILE))
            owner[key] = draw.choice(HOSTILE[key])
        else:
            owner[key] = draw.choice(VALUES)
    path.write_text(json.dumps(content))


def _json(draw: random.Random, folder: Path) -> None:
    files = _files(folder)
    path = draw.choice([path for path in files if path.suffix == ".json"] or files)
    texts = (b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"null", b"{}", b"\xff\xfe{}", b"7" * 9999)
    path.write_bytes(draw.choice(texts))


def _other(draw: random.Random, folder: Path, written: Path) -> None:
    """Replace a file with a file from a folder of any kind."""
    other = draw.choice([path for path in sorted(written.iterdir()) if path.name[0] != "."])
    path = draw.choice(_files(folder))
    choices = [each for each in _files(other) if each.suffix == path.suffix]
    shutil.copyfile(draw.choice(choices or _files(other)), path)


def _move(draw: random.Random, folder: Path) -> None:
    """Remove, rename or lock a file, or replace it by a folder or a link."""
    path, outside = draw.choice(_files(folder)), folder.parent / "outside"
    what = draw.randrange(8)
    if what == 0:
        path.rename(path.with_name(draw.choice((PICKLE, WEIGHTS, CONFIG, "model.safetensors"))))
    elif what == 1:
        path.chmod(0)
    else:
        path.unlink()
    if what == 2:
        path.mkdir()
    elif what > 3:
        targets = (outside / "mine", outside, path, "/dev/zero", "/dev/null", "/nowhere")
        path.symlink_to(draw.choice(targets))


def _tensors(draw: random.Random, folder: Path) -> None:
    """Change names, shapes, dtypes or values; the digest then fits, does not fit, or is missing."""
    paths = [path for path in _files(folder) if path.suffix in (".safetensors", ".bin")]
    path = draw.choice(paths)
    binary = path.suffix == ".bin"
    tensors = torch.load(path, weights_only=True) if binary else load_file(path)
    old = digest(tensors)
    for _ in range(draw.choice((1, 1, 2, 10))):
        key = draw.choice(list(tensors))
        tensor, what = tensors[key], draw.randrange(12)
        if what == 0:
            del tensors[key]
            if not tensors:
                break
        elif what == 1:
            tensors[draw.choice(("x", "../x", key[:-1], f"{key}.rasa_A", "", "a" * 5000))] = tensor
        elif what in (2, 3, 8, 10):
            flat, empty = tensor.reshape(-1), torch.empty(0, *tensor.shape[1:], dtype=tensor.dtype)
            turned = tensor.t().contiguous() if tensor.dim() == 2 else tensor[None]
            tensors[key] = draw.choice((flat, turned, empty, torch.tensor(1.0)))
        elif what == 4:
            kinds = (torch.int64, torch.float64, torch.bool, torch.complex64, torch.float8_e4m3fn)
            tensors[key] = tensor.to(draw.choice(kinds))
        elif what in (5, 6) and tensor.numel():
            flat = tensor.clone().reshape(-1)
            large = torch.iinfo if not tensor.is_floating_point() else torch.finfo
            value = draw.choice((0, -1, 7, large(tensor.dtype).max, large(tensor.dtype).min))
            flat[draw.randrange(flat.numel())] = value
            tensors[key] = flat.reshape(tensor.shape)
        elif what == 7 and tensor.is_floating_point():
            tensors[key] = tensor * draw.choice((torch.nan, torch.inf, 0, 2))
        elif what == 9:
            tensors.update((f"extra.{i}", torch.zeros(1)) for i in range(draw.choice((1, 2000))))
        else:
            other = draw.choice(list(tensors))
            tensors[key], tensors[other] = tensors[other], tensors[key]
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    if binary:
        data: Any = {**tensors, "x": _Bomb()} if draw.random() < 0.2 else tensors
        with open(path, "wb") as file:
            torch.save(data, file) if draw.random() < 0.7 else pickle.dump(data, file)
        return
    metadata = {"format": "pt", "sha256": digest(tensors)}
    chosen = draw.choice(({"format": "pt"}, metadata, metadata, {"sha256": old}, {"sha256": "x"}))
    path.write_bytes(save(tensors, chosen))


def _header(draw: random.Random, folder: Path) -> None:
    paths = [path for path in _files(folder) if path.suffix == ".safetensors"]
    if not paths:
        return _tensors(draw, folder)
    path = draw.choice(paths)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[draw.choice(list(header))]
    key = draw.choice(list(entry))
    dtypes = ("F4", "F8_E8M0", "U16", "I64", "F64", "BOOL", "X", 7)
    entry[key] = draw.choice((*dtypes, *VALUES, [0, 0], [-1, 8], [2**63, 2**63], [8, 0]))
    text = json.dumps(header).encode()
    length = draw.choice((len(text), len(text), len(text), 2**62, 0, len(text) + 8))
    path.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])


DAMAGES = (_flip, _flip, _cut, _field, _field, _field, _json, _other, _move, _move)
DAMAGES += (_tensors, _tensors, _tensors, _header)


def _damage(draw: random.Random, folder: Path, written: Path) -> str:
    names = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        if not _files(folder):
            break
        damage = draw.choice(DAMAGES)
        names.append(damage.__name__.strip("_"))
        try:
            damage(draw, folder, written) if damage is _other else damage(draw, folder)
        except Exception:  # an earlier damage made the file unreadable
            names[-1] += "?"
    return "+".join(names)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"/"
            for p in folder.rglob("*")}  # fmt: skip


def _whose(error: BaseException, kind: str) -> str:
    """Return OWN if the package raised the error itself, OTHERS if PEFT did, and RAW otherwise."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    ours = last.filename.startswith(PACKAGE)
    if ours and line.startswith("raise"):
        return OWN
    return OTHERS if kind == "PEFT" and not ours else RAW


def _outcome(kind: str, folder: Path, base: nn.Module, expected: torch.Tensor) -> tuple[str, str]:
    """Load a folder and return the outcome and the error text."""
    what, before = KINDS[kind], Snapshot(base)
    try:
        model = what.read(base, folder)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            return OUT_OF_MEMORY, text
        whose = _whose(error, kind)
        if kind != "PEFT":  # PEFT leaves the base wrapped
            try:
                before.assert_unchanged()
            except AssertionError:
                return HALF, text
        if whose == RAW:
            text = "".join(traceback.format_exception(error)[-4:])
        return whose, text
    try:
        found = what.run(model)
    except Exception as error:
        return RAW, "in use: " + "".join(traceback.format_exception(error)[-4:])
    same = found.shape == expected.shape and torch.equal(found, expected)
    return (EQUAL if same else OTHER_NUMBERS), ""


def _drawn(seed: int, number: int) -> tuple[random.Random, str]:
    """Return a case's random numbers, and the kind of folder."""
    draw = random.Random(seed * 1_000_003 + number)
    return draw, draw.choice(sorted(KINDS))


def _case(root: Path, seed: int, number: int, numbers: dict[str, Any]) -> tuple[str, ...]:
    """Damage and load one folder below ``root``; return kind, damage, outcome and error text."""
    draw, kind = _drawn(seed, number)
    folder, outside = root / "case" / "adapter", root / "case" / "outside"
    shutil.rmtree(root / "case", ignore_errors=True)
    outside.mkdir(parents=True)
    (outside / "mine").write_text("mine")
    shutil.copytree(root / "written" / kind, folder, symlinks=True)
    damage = _damage(draw, folder, root / "written")
    base, expected = copy.deepcopy(numbers[kind][0]), numbers[kind][1]
    before = _tree(outside)
    os.chdir(folder)
    outcome, words = _outcome(kind, folder, base, expected)
    os.chdir(root)
    if _tree(outside) != before:
        outcome = OUTSIDE
    return kind, damage, outcome, words


def _worker(root: Path, seed: int, numbers: range, write: int, made: dict[str, Any]) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    with os.fdopen(write, "w") as out:
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)  # waiting uses no CPU time
            result = _case(root, seed, number, made)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            out.write(json.dumps([number, *result]) + "\n")
            out.flush()


def fuzz(cases: int, seed: int, root: Path, batch: int = 250) -> list[list[Any]]:
    """Run the cases; return (number, kind, damage, outcome, error text) for each."""
    warnings.simplefilter("ignore")
    (root / "written").mkdir()
    made = {}
    for name, kind in KINDS.items():
        kind.write(root / "written" / name)
        base = kind.base()
        made[name] = base, kind.run(kind.read(copy.deepcopy(base), root / "written" / name))
    found: list[list[Any]] = []
    while len(found) < cases:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(read)
                numbers = range(len(found), min(cases, len(found) + batch))
                _worker(root, seed, numbers, write, made)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as lines:
            found += [json.loads(line) for line in lines]
        status = os.waitpid(pid, 0)[1]
        if status:
            timers = (signal.SIGPROF, signal.SIGALRM)
            slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in timers
            _, kind = _drawn(seed, len(found))
            found.append([len(found), kind, "", HANG if slow else CRASH, f"status {status}"])
    return found
