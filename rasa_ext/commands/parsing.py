"""Options that several commands share, and their checks.

Nothing here imports torch, so ``--help`` and the documentation do not need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from rasa_ext.writing import STALE, check_output

__all__ = ["Output", "Overwrite", "check_differs", "parse_targets"]

DTYPES = ("auto", "float32", "bfloat16", "float16")

# The options of a command that writes a directory.
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")]
Overwrite = Annotated[
    bool, typer.Option(help="Replace an earlier model in the output directory; other files stay.")
]


def parse_targets(text: str, option: str = "target_modules") -> str | list[str]:
    """Parse `--target-modules`: "all-linear", comma-separated suffixes, or `regex:` and a pattern.

    Args:
        text: the option's value.
        option: the option's name, for errors.

    Returns:
        The value for the field ``target_modules`` of a config.

    Raises:
        ValueError: ``text`` has none of these forms.

    Example:
        >>> from rasa_ext.commands.parsing import parse_targets
        >>> parse_targets("q_proj, v_proj")
        ['q_proj', 'v_proj']
    """
    if text == "all-linear":
        return text
    if text.startswith("regex:"):
        return text.removeprefix("regex:")  # the config checks the expression
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or any(set("[]\"'") & set(name) for name in names):
        forms = "names such as q_proj,v_proj, 'all-linear', or 'regex:' and an expression"
        raise ValueError(f"{option}: expected {forms}, got {text!r}.")
    return names


def check_least(**numbers: tuple[float | None, float]) -> None:
    """Raise ValueError if an option is below its minimum; None always passes."""
    for name, (value, least) in numbers.items():
        if value is not None and not value >= least:  # also rejects NaN
            raise ValueError(f"{name}: expected at least {least}, got {value}.")


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless ``dtype`` is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")


def check_seed(seed: int) -> None:
    """Raise ValueError unless all random generators take the seed; numpy's range is smallest."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer from 0 to 2**32 - 1, got {seed}.")


def check_differs(
    sources: Iterable[str | Path], output: Path, *, overwrite: bool, beside: Iterable[str] = STALE
) -> None:
    """Check that ``output`` can be written and is none of the sources.

    Args:
        sources: folders that the command reads; hub ids may be among them.
        output: the folder to write.
        overwrite: whether ``output`` may contain files.
        beside: patterns of files that readers would load together with the new ones. By default a
            model's weights, since transformers puts an adapter on top of a model in one folder.

    Raises:
        ValueError: ``output`` is one of the sources or a file, or contains files, or with
            ``overwrite`` a file of ``beside``.
        OSError: ``output`` cannot be written (a ``WriteError``).

    Example:
        >>> from pathlib import Path
        >>> from rasa_ext.commands.parsing import check_differs
        >>> check_differs(["checkpoint"], Path("new"), overwrite=False)
    """
    for source in sources:
        if Path(source).resolve() == output.resolve():
            raise ValueError(f"output: expected another directory than the inputs', got {output}.")
    if output.is_file() or output.suffix == ".gguf":
        raise ValueError(f"output: expected a folder, but {output} is a file.")
    check_output(output, overwrite=overwrite)
    if names := [path.name for pattern in beside for path in output.glob(pattern)]:
        why = "since readers would load it with the new files; choose another --output"
        raise ValueError(f"output: expected no {names[0]} in {output}, {why}.")
