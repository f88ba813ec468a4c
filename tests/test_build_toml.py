"""build.toml, which kernel-builder reads, lists the files that setup.py compiles."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_support import extension  # noqa: E402

tomllib = pytest.importorskip("tomllib")  # Python 3.11


@pytest.fixture(scope="module")
def build() -> dict:
    return tomllib.loads((ROOT / "build.toml").read_text())


def listed(build: dict) -> list[str]:
    return [*build["torch"]["src"], *build["kernel"]["rasa"]["src"]]


def test_it_lists_what_is_compiled(build):
    compiled = [path for path in listed(build) if path.endswith((".cpp", ".cu"))]
    assert Counter(compiled) == Counter(extension.sources(ROOT))


def test_it_lists_every_header(build):
    headers = [path for path in listed(build) if path.endswith((".h", ".cuh"))]
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")]
    assert Counter(headers) == Counter(found)


def test_what_it_says_twice_is_the_same(build):
    assert tuple(build["kernel"]["rasa"]["cuda-capabilities"]) == extension.ARCHS
    major, minor = map(int, build["torch"]["stable-abi"]["cuda"].split("."))
    assert int(extension.TARGET, 16) == major << 56 | minor << 48
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert build["general"]["name"] == metadata["name"]
    assert build["general"]["license"] == metadata["license"]
