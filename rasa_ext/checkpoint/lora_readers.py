"""Readers of exported LoRAs: how to serve with them, and what they drop, refuse or need."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rasa_ext.base_layers.experts import expert_weight_names
from rasa_ext.base_layers.linear import is_conv1d
from rasa_ext.checkpoint.expert_names import is_stacked
from rasa_ext.checkpoint.lora_experts import PEFT, PER_EXPERT
from rasa_ext.checkpoint.lora_view import Export

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""

VLLM_HEADS = ("score", "classifier")
"""Names of trained heads that vLLM takes, for models that classify."""

GGUF = "adapter.gguf"
"""File name of a LoRA for llama.cpp."""

BASE_FOLDER = "BASE_FOLDER"
"""Placeholder in cards and commands for the folder of a base without a name on the Hub."""

INSTEAD = "save what rasa_ext.merge_and_unload(model) returns"


def serving_help(
    base: str,
    lora: Path,
    rank: int,
    *,
    float32: bool,
    expert_layout: str | None = None,
    format: str = "peft",
) -> str:
    """Explain how to serve a LoRA over ``base``: a Hub id, a directory or a .gguf file.

    The text ends with the commands, one per line, after two spaces. They contain the path ``lora``
    as given, and `BASE_FOLDER` if the folder of the model behind a .gguf is unknown.

    ``float32`` states that the base has that dtype, which vLLM only serves on request.
    ``expert_layout`` is None if the LoRA has no experts.
    """
    of_gguf, named = base.endswith(".gguf"), f"{lora.name or 'rasa'}={lora}"
    if format == "gguf":
        return _llama_cpp(base, lora, float32=float32)
    if format == "mlx":
        model = BASE_FOLDER if of_gguf else base
        return _lines(
            "mlx-lm, which reads rope_theta; if the base's config.json has only rope_parameters, "
            "add rope_theta there",
            ["mlx_lm.server", "--model", model, "--adapter-path", str(lora)],
        )
    if expert_layout == "peft":
        return (
            "PEFT loads it, and so does vLLM if it stores the model's experts in three dimensions, "
            "such as gpt-oss's. For vLLM with other models, SGLang and llama.cpp, export with "
            "--expert-layout per-expert."
        )
    if expert_layout == "shared-outer":
        words = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
        words += ["--max-lora-rank", str(rank), "--experts-shared-outer-loras", "--lora-paths"]
        return _lines("SGLang", [*words, named])
    if of_gguf:
        return "vLLM reads no .gguf; for llama.cpp, export with --format gguf."
    limit = next((r for r in VLLM_RANKS if r >= rank), None)
    if limit is None:
        return (
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}; for this adapter use `rasa-ext merge`, or "
            "a lower --rank."
        )
    # By default, vLLM rounds a float32 model to bfloat16.
    words = ["vllm", "serve", base, *(["--dtype", "float32"] if float32 else [])]
    # One slot more than adapters: on a CPU, vLLM uses the last slot for rows without an adapter.
    words += ["--enable-lora", "--max-lora-rank", str(limit), "--max-loras", "2"]
    return _lines("vLLM", [*words, "--lora-modules", named])


def _lines(server: str, *commands: list[str]) -> str:
    return "\n  ".join([f"Serve it with {server}:", *map(shlex.join, commands)])


def _llama_cpp(base: str, lora: Path, *, float32: bool) -> str:
    of_gguf = base.endswith(".gguf")
    gguf = base if of_gguf else str(lora / "base.gguf")
    # The cache in memory ignores adapters, so it mixes up requests with and without one.
    serve = ["llama-server", "-m", gguf, "--lora", str(lora / GGUF), "--cache-ram", "0"]
    if of_gguf:
        return _lines("llama.cpp", serve)
    remote = [] if base == BASE_FOLDER or Path(base).is_dir() else ["--remote"]
    # By default, the converter chooses float16.
    dtype = ["--outtype", "f32"] if float32 else []
    convert = ["python", "convert_hf_to_gguf.py", *remote, base, "--outfile", gguf, *dtype]
    return _lines("llama.cpp, whose source has the script that converts the base", convert, serve)


def warn_of_readers(
    export: Export, layout: str | None, parameters: list[str], *, default: bool, allow_dropped: bool
) -> None:
    """Warn, three callers up, about what some reader does not support, or raise ValueError.

    ``parameters`` are PEFT's ``target_parameters``. ``default`` states that nobody chose the layout
    of experts.
    """
    dropped = list(_dropped(export))
    if dropped and not allow_dropped:
        raise ValueError(
            f"model: {dropped[0]}; {INSTEAD}, or pass allow_dropped=True (--allow-dropped) to "
            "write it for other readers."
        )
    texts = [f"{text}; for that reader, {INSTEAD}." for text in dropped]
    for text in (*texts, *_limits(export, layout, parameters, default)):
        warnings.warn(text, stacklevel=4)


def _dropped(export: Export) -> Iterator[str]:
    """Yield what a reader drops without an error, so that it computes something else."""
    if norms := [key for key in export.saved if "_layernorm" in key or ".norm" in f".{key}"]:
        names = f"{', '.join(norms[:3])}{', ...' if len(norms) > 3 else ''}"
        yield f"llama.cpp reads the trained norms of modules_to_save ({names}) but leaves them out"
    for part, other in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        if alone := _without_sibling(part, other, export):
            yield (
                f"{part} is adapted without {other} in {alone} layers, and SGLang, which computes "
                f"them together, leaves {part} out (older versions refuse it)"
            )
            break
    if export.tokens:
        table = export.tokens[0].names[0]
        yield (
            f"SGLang would silently ignore the trained rows of {table} (vLLM and llama.cpp refuse "
            "them)"
        )
    for name in (name for rows in export.tokens for name in rows.names):
        if getattr(export.root.get_submodule(name), "bias", None) is not None:
            yield f"PEFT leaves out the bias of {name}, a head with trained rows"
    tied = [rows.names for rows in export.tokens if len(rows.names) > 1]
    if tied and not peft_ties(export.root, [names[0] for names in tied]):
        yield (
            f"PEFT does not use the trained rows of {tied[0][0]} in {tied[0][1]}, since the "
            "model's config does not state that the input embedding is tied"
        )


def _limits(
    export: Export, layout: str | None, parameters: list[str], default: bool
) -> Iterator[str]:
    """Yield what some reader refuses, or reads only with an option."""
    if any(is_conv1d(linear.base) for linear in export.linears.values()):
        yield f"the model has Conv1D layers, whose LoRA vLLM cannot serve; for vLLM, {INSTEAD}."
    if names := ", ".join(name for name in export.modules_to_save if name not in VLLM_HEADS):
        yield (
            f"vLLM refuses modules_to_save ({names}), and llama.cpp refuses all of them but norms; "
            f"for these readers, {INSTEAD}."
        )
    elif names := ", ".join(export.modules_to_save):
        yield f"llama.cpp refuses modules_to_save ({names}); for that reader, {INSTEAD}."
    if alone := _without_sibling("q_proj", "v_proj", export):
        yield (
            f"q_proj is adapted without v_proj in {alone} layers. SGLang computes them together "
            f"and refuses such a LoRA; for SGLang, adapt both, or {INSTEAD}."
        )
    if layout is None and parameters:
        yield (
            f"PEFT needs {', '.join(parameters[:3])} in target_parameters, but SGLang reads only "
            "target_modules; start SGLang with --lora-target-modules all."
        )
    if tied := export.tied_to_embedding():
        yield (
            f"{tied} is tied to the embedding, and llama.cpp refuses its LoRA; for llama.cpp, "
            "leave it out of target_modules, or untie the two and merge."
        )
    if export.fast_path:
        yield (
            "the adapted layers are in an nn.TransformerEncoder, whose fast path in eval mode "
            "skips the adapters in PEFT; after loading the LoRA, call "
            f"torch.backends.mha.set_fastpath_enabled(False), or {INSTEAD}."
        )
    if default:
        yield (
            "the experts are written in PEFT's layout, which vLLM reads if it stores them in three "
            f"dimensions (gpt-oss) and misreads otherwise; pass expert_layout={PER_EXPERT!r} "
            f"(--expert-layout {PER_EXPERT}) for vLLM, SGLang and llama.cpp, or "
            f"expert_layout={PEFT!r} to confirm PEFT's layout."
        )
    if layout == PER_EXPERT and any(is_stacked(stack.base) for stack in export.experts.values()):
        yield (
            "the model's own checkpoints stack its experts, with gate and up in one matrix; for "
            f"such a model vLLM reads expert_layout={PEFT!r} (--expert-layout {PEFT}), and "
            f"llama.cpp reads no LoRA of the experts; for llama.cpp, {INSTEAD}."
        )
    for path, (base, factors) in export.experts.items():
        if len(factors) < len(expert_weight_names(base)):
            yield (
                f"{path}.{next(iter(factors))} is adapted without the other weight of its "
                "experts, and vLLM and llama.cpp refuse such a LoRA; for these readers, adapt "
                f"both, or {INSTEAD}."
            )
            break


def _without_sibling(part: str, other: str, export: Export) -> int:
    """Count the adapted layers named ``part`` whose sibling ``other`` is not adapted."""
    beside = [n[: -len(part)] + other for n in export.linears if n.endswith(f".{part}")]
    modules = {name for name, _ in export.root.named_modules()}
    return sum(name in modules and name not in export.linears for name in beside)


def peft_ties(root: Any, owners: list[str]) -> bool:
    """Return whether PEFT knows the modules that share the weights of ``owners``."""
    config = getattr(root, "config", None)
    said = getattr(config, "tie_word_embeddings", False) and hasattr(root, "_tied_weights_keys")
    if not said or not hasattr(root, "get_input_embeddings"):
        return False
    inputs = root.get_input_embeddings()
    return all(root.get_submodule(name) is inputs for name in owners)
