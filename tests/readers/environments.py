"""Create a permanent environment for each reader on first use; readers.ini pins versions.

The environments are in $RASA_EXT_READERS, by default in ~/.cache/rasa_ext/readers. To create them
in advance, with any Python of the version that will run the tests:

    python -m tests.readers.environments [NAME ...]
"""

import configparser
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

PINS = Path(__file__).parents[1] / "requirements" / "readers.ini"
HERE = Path(__file__).parent
PARTS = {
    "llama-cpp-python": ("/vendor/llama.cpp/", ("convert", "conversion/", "gguf-py/gguf/")),
    "peft": ("/", ("tests/",)),
}
"""The folder in a source distribution, and what in it is wanted."""
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Variables for vLLM on a CPU."""


def all_pins() -> dict[str, dict[str, str]]:
    found = configparser.ConfigParser()
    found.read(PINS)
    return {name: dict(found[name]) for name in found.sections()}


def pins(reader: str) -> dict[str, str]:
    return all_pins()[reader]


def folder(reader: str) -> Path:
    """Return the path of a reader's environment, which depends on all pinned versions."""
    cache = os.environ.get("RASA_EXT_READERS", "~/.cache/rasa_ext/readers")
    told = json.dumps([pins(reader), sys.version_info[:2]], sort_keys=True)
    name = f"{reader}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return Path(cache).expanduser().resolve() / name


def environment(reader: str) -> Path:
    """Create a reader's environment if it is missing; return its folder of programs."""
    place = folder(reader)
    if not (place / "whole").exists():
        wanted = pins(reader)
        run(sys.executable, "-m", "venv", "--clear", place)
        pip = [place / "bin" / "python", "-m", "pip", "-q", "--disable-pip-version-check"]
        # Most modules are never imported; Python compiles the others on import.
        install = [*pip, "install", "--no-compile"]
        if "install" in wanted:
            run(*install, *wanted["install"].split())
        if "remove" in wanted:
            run(*pip, "uninstall", "-y", *wanted["remove"].split())
        if "named" in wanted:
            _name(wanted["named"], place)
        if "source" in wanted:
            _unpack(wanted["source"], place, pip)
        if "beside" in wanted:
            run(*install, "--no-deps", "--target", place / "beside", *wanted["beside"].split())
        (place / "whole").touch()
    return place / "bin"


def beside(reader: str) -> Path:
    """Return a folder of packages that the tests' own Python may also import."""
    environment(reader)
    return folder(reader) / "beside"


def _name(wanted: str, place: Path) -> None:
    """Write metadata of a distribution that is not installed, for importlib.metadata."""
    name, _, version = wanted.partition("==")
    (packages,) = place.glob("lib/python*/site-packages")
    there = packages / f"{name}-{version}.dist-info"
    there.mkdir()
    (there / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _unpack(source: str, place: Path, pip: list) -> None:
    """Unpack the wanted part of a source distribution."""
    name = source.partition("==")[0]
    run(*pip, "download", "--no-deps", "--no-binary", name, source, "-d", place / "sdist")
    (archive,) = (place / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            within, wanted = PARTS[name]
            _, _, path = member.name.partition(within)
            if path.startswith(wanted):
                member.name = path
                file.extract(member, place / "source")


def convert(*words: object) -> None:
    """Run a converter of llama.cpp with this Python and the folder of its missing dependency."""
    variables = {**os.environ, "PYTHONPATH": str(beside("llama.cpp"))}
    run(sys.executable, *words, cwd=folder("llama.cpp") / "source", env=variables)


def run(*command: object, **options) -> str:
    """Run a command and return its output; raise AssertionError with the output if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def ask(reader: str, script: str, question: object, place: Path, **variables: str):
    """Run a script of this folder in a reader's environment, with JSON input and output."""
    given, told = place / f"{script}.in.json", place / f"{script}.out.json"
    given.write_text(json.dumps(question))
    told.unlink(missing_ok=True)
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    run(environment(reader) / "python", HERE / script, given, told, env=environ)
    return json.loads(told.read_text())


def main() -> None:
    """Create the named environments, or all of them, and print the time for each."""
    for reader in sys.argv[1:] or all_pins():
        start = time.monotonic()
        environment(reader)
        print(f"{folder(reader)}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
