"""Generate the parts of the documentation that come from the sources: ``python docs/generate.py``.

A generated part is between a comment and ``<!-- end -->``. The comment names the content:
``<!-- options PACKAGE -->`` for commands, ``<!-- fields CONFIG -->`` for a config,
``<!-- reference NAME ... -->`` for docstrings, or ``<!-- file PATH -->`` for a file, whole.
Pictures, the tutorial's notebook and the changelog's page are generated too. ``--check`` writes
nothing, and fails with the names of outdated files.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "research")]

import notebook  # noqa: E402
import pictures  # noqa: E402
import typer  # noqa: E402
from peft import PeftConfig  # noqa: E402

from rasa_ext import RasaConfig  # noqa: E402
from rasa_ext.commands.app import app  # noqa: E402
from rasa_ext.commands.options import (  # noqa: E402
    HELP,
    SHORT,
    TASKS,
    BaseOptions,
    Data,
    Rewards,
    help_of,
    short,
)
from rasa_ext.methods import AdapterConfig  # noqa: E402

PART = re.compile(
    r"(<!-- (options|fields|reference|file)\b(.*?)\s-->\n).*?(?=<!-- end -->)", re.DOTALL
)


def options(package: str) -> str:
    """List the commands of a package, with help text, arguments and options."""
    group = typer.main.get_command(app)
    index, parts = [], []
    for name, command in group.commands.items():
        if not command.callback.__module__.startswith(f"{package}."):
            continue
        text = inspect.cleandoc(command.help)
        if name in (*TASKS, "finetune"):
            if name in TASKS:
                index.append(entry(f"[`rasa-ext {name}`](#{name})", text))
                parts += [f"## {name}", text, task(name)]
            continue
        index.append(entry(f"[`rasa-ext {name}`](#{name})", text.splitlines()[0]))
        rows = [option(each) for each in command.params if each.name != "help"]
        parts += [f"## {name}", text, *([folded("Options", "\n".join(rows))] if rows else [])]
    return "\n\n".join(["\n".join(index), *filter(None, parts)])


def task(name: str) -> str:
    """List the options of a training task that are not TRL's own; sft has those of all."""
    kind = TASKS[name]
    head = f"TRL's `{kind.kind}Trainer`. Rows have {kind.rows}. The rate is {kind.lr:g} by default."
    if name != "sft":
        more = "".join(f"\n{field_entry(each)}" for each in dataclasses.fields(Rewards))
        more = f" Also:\n{more}" if name in ("grpo", "rloo") else ""
        return f"{head} Options are as for [sft](#sft).{more}"
    parts = [f"{head} `rasa-ext finetune` is the same command."]
    for group, rows in help_of(name).items():
        parts += [f"**{group}**", "\n".join(entry(f"`{n}`", text) for n, text in rows.items())]
    shown = {each for rows in HELP.values() for each in rows}
    own = [each for kind in (Data, BaseOptions) for each in dataclasses.fields(kind)]
    more = [each for each in own if dashed(short(each.name)) not in shown]
    parts.append(folded("More options", "\n".join(map(field_entry, more))))
    parts.append(
        "Every other field of TRL's config is an option, and so is every field of the method's "
        "config: `rasa-ext sft --help-all` lists them. Names may have `_` or `-`. Second names: "
        + ", ".join(f"`{dashed(short(n))}` for `--{n}`" for n in SHORT if short(n) != n)
        + "; and PEFT's, such as `--lora_r`."
    )
    return "\n\n".join(parts)


def field_entry(field: dataclasses.Field) -> str:
    """Write the entry of a field that is an option."""
    default = "" if field.default in (None, False, "", dataclasses.MISSING) else field.default
    name = f"`{dashed(short(field.name))}`"
    return entry(f"{name} (default: {default})" if default else name, field.metadata["help"])


def dashed(name: str) -> str:
    """Return an option as people type it."""
    return f"--{name.replace('_', '-')}"


def option(parameter: typer.core.TyperOption | typer.core.TyperArgument) -> str:
    """Write the entry of an option or argument.

    The help of ``--help`` is not used, because typer's additions to it change with its releases.
    """
    names, default = [*parameter.opts, *parameter.secondary_opts], parameter.default
    if default is False:
        names = parameter.opts
    elif default is True:
        default = names[0]
    text, *notes = re.split(r"\s*\[(default: [^]]*)\]$", parameter.help or "No description.")
    if parameter.required:
        notes = ["required"]
    elif default not in (None, "") and default is not False:
        notes = [f"default: {default}"]
    head = " / ".join(f"`{name}`" for name in names)
    return entry(f"{head} ({notes[0]})" if notes else head, text)


def fields(name: str) -> str:
    """List a config's own fields, and for ``rasa_ext.RasaConfig`` also those that methods share.

    Of PEFT's config, list what neither it nor PEFT's own base class has.
    """
    shared = {each.name for each in dataclasses.fields(AdapterConfig)}
    every = [each for each in dataclasses.fields(located(name)) if "help" in each.metadata]
    rows = [each for each in every if each.name not in shared]
    if name == "rasa_ext.RasaConfig":
        rows += [each for each in every if each.name in shared]
    elif issubclass(located(name), PeftConfig):
        known = {each.name for each in dataclasses.fields(RasaConfig)} | {"r"}
        known |= {each.name for each in dataclasses.fields(PeftConfig)}
        rows = [each for each in rows if not {each.name, each.name.removeprefix("rasa_")} & known]
    return "\n".join(
        entry(f"`{each.name}` (default: `{each.default!r}`)", each.metadata["help"])
        for each in rows
    )


def file(path: str) -> str:
    """Show a file of the repository whole, folded."""
    language = {".py": "py", ".yaml": "yml"}[Path(path).suffix]
    code = f"```{language}\n{(DOCS.parent / path).read_text().rstrip()}\n```"
    return folded(f"<code>{path}</code>", code)


def folded(summary: str, text: str) -> str:
    """Fold a text, with a line that is always shown."""
    return f'<details markdown="1"><summary>{summary}</summary>\n\n{text}\n\n</details>'


def located(name: str) -> Any:
    """Return what a dotted name means; from Python 3.13, pydoc.locate prefers submodules."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def reference(names: str) -> str:
    """Write an index of the names, then each name with its signature and docstring."""
    index, parts = [], []
    for name in names.split():
        thing, short = located(name), name.rpartition(".")[2]
        text, *sections = re.split(r"^(\w+):\n", inspect.getdoc(thing), flags=re.MULTILINE)
        index.append(entry(f"[`{short}`](#{short.lower()})", text.partition("\n\n")[0]))
        parts += [f"### {short}", f"```py\n{signature(name, thing)}\n```", escape(text.strip())]
        if inspect.isclass(thing):
            parts.append("\n".join(attributes(thing, "Args" in sections)))
        for title, body in zip(sections[::2], sections[1::2], strict=True):
            if not (title == "Args" and is_config(thing)):  # `fields` has them, with defaults
                parts += [f"**{title}**", section(title, textwrap.dedent(body).strip())]
    return "\n\n".join(["\n".join(index), *filter(None, parts)])


def section(title: str, body: str) -> str:
    """Format one section of a docstring."""
    if title == "Example":
        text, _, code = body.partition(">>>")
        return f"{escape(text)}\n```pycon\n>>>{code}\n```".strip()
    if title in ("Returns", "Yields"):
        return escape(body)
    items = (item.partition(": ") for item in re.split(r"\n(?=\S)", body))
    return "\n".join(entry(f"`{name}`", text) for name, _, text in items)


def is_config(thing: Any) -> bool:
    """Return whether ``thing`` is the config class of a method."""
    return inspect.isclass(thing) and issubclass(thing, AdapterConfig) and thing != AdapterConfig


def signature(name: str, thing: Any) -> str:
    """Return the signature from the source code, broken into lines if it is long."""
    own = "__init__" in vars(thing) and not dataclasses.is_dataclass(thing)
    if inspect.isclass(thing) and (not own or issubclass(thing, tuple)):
        return f"class {name}"
    source = textwrap.dedent(inspect.getsource(thing.__init__ if own else thing))
    (node,) = ast.parse(source).body
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    text = re.sub(r"^def \w+", name, "\n".join(lines).removesuffix(":"))
    if own:
        text = re.sub(r"\bself(, |,\n    )?", "", text, count=1).removesuffix(" -> None")
    if len(text.partition("\n")[0]) > 100:
        text = re.sub(r"\((.*)\)", r"(\n    \1\n)", text)
    return text


def attributes(cls: type, only_methods: bool) -> list[str]:
    """List a class's fields and methods with the first lines of their docstrings.

    A config's methods are skipped, because the base class lists them.
    """
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    found = []
    for line, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and not only_methods:
            text = after.value.value if isinstance(after, ast.Expr) else ""
            if not isinstance(line.value, ast.Call):  # a call declares a config's field
                name, kind = ast.unparse(line.target), ast.unparse(line.annotation)
                found.append(entry(f"`{name}: {kind}`", text))
        elif isinstance(line, ast.FunctionDef) and not is_config(cls):
            text = ast.get_docstring(line)
            if text and line.name[0] != "_" and line.name not in ("extra_repr", "train"):
                is_property = "property" in "".join(map(ast.unparse, line.decorator_list))
                arguments = [*line.args.args[1:], *line.args.kwonlyargs]
                names = ", ".join(each.arg for each in arguments)
                head = line.name if is_property else f"{line.name}({names})"
                found.append(entry(f"`{head}`", text.partition("\n\n")[0]))
    return found


def entry(head: str, text: str) -> str:
    """Write one line of a list."""
    return f"- {head}: {escape(' '.join(text.split()))}" if text else f"- {head}"


def escape(text: str) -> str:
    """Text whose stars and angles stand for themselves, outside code."""
    parts = re.split(r"(`+.*?`+)", text, flags=re.DOTALL)
    parts[::2] = [part.replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def generated() -> dict[Path, str]:
    """Return the new text of every file with generated parts."""
    files = {DOCS / "pictures" / f"{name}.svg": svg for name, svg in pictures.draw_all().items()}
    make = {"options": options, "fields": fields, "reference": reference, "file": file}
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        if PART.search(text):
            files[page] = PART.sub(
                lambda part: f"{part[1]}\n{make[part[2]](part[3].strip())}\n\n", text
            )
    files[DOCS / "tutorial.ipynb"] = notebook.from_markdown((DOCS / "tutorial.md").read_text())
    files[DOCS / "changelog.md"] = (DOCS.parent / "CHANGELOG.md").read_text()
    return files


def comparable(text: str) -> str | list[str]:
    """Return a picture's texts only, because matplotlib's releases place lines differently.

    Return any other file whole.
    """
    return re.findall(r"<!--(.*?)-->", text, re.DOTALL) if "<svg" in text else text


def main() -> None:
    """Write the files, or check them with ``--check``."""
    files = generated()
    if "--check" not in sys.argv:
        for path, text in files.items():
            path.write_text(text)
        return
    stale = [
        str(path.relative_to(DOCS))
        for path, text in files.items()
        if not path.is_file() or comparable(path.read_text()) != comparable(text)
    ]
    if stale:
        raise SystemExit(f"out of date: {', '.join(stale)}; run: python docs/generate.py")


if __name__ == "__main__":
    main()
