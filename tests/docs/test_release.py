"""The checks before a release."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import rasa_ext

ROOT = Path(__file__).resolve().parents[2]
notes = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))["notes"]
CHANGELOG = (
    "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n- new\n\n**Of both**\n\n- a\n\n"
    "## 0.1.0 (2026-11-01)\n\n- old\n"
)


@pytest.fixture
def tree(tmp_path):
    """Return a folder with the files that the check reads, ready for v0.2.0."""
    (tmp_path / "rasa_ext").mkdir()
    for name in ("rasa_ext/_version.py", "CITATION.cff"):
        text = (ROOT / name).read_text()
        assert rasa_ext.__version__ in text
        (tmp_path / name).write_text(text.replace(rasa_ext.__version__, "0.2.0"))
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def test_notes_are_the_section_of_the_version(tree):
    assert notes("v0.2.0", tree) == "- new\n\n**Of both**\n\n- a"
    (tree / "CHANGELOG.md").write_text("## 0.2.0 (2026-12-01)\n\n- first\n")
    assert notes("v0.2.0", tree) == "- first"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("rasa_ext/_version.py", "0.2.0", "0.3.0", r"expected v0\.3\.0, the version of rasa_ext"),
        ("CITATION.cff", "0.2.0", "0.1.0", r"expected v0\.1\.0, the version of CITATION"),
        ("CHANGELOG.md", "(2026-12-01)", "(unreleased)", r"got '## 0\.2\.0 \(unreleased\)'"),
        ("CHANGELOG.md", "## 0.2.0", "## 0.2.1", r"expected '## 0\.2\.0 \(YYYY-MM-DD\)'"),
        ("CHANGELOG.md", "## ", "### ", "got 'none'"),
    ],
)
def test_what_does_not_fit_the_tag_is_refused(tree, name, old, new, message):
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match=message):
        notes("v0.2.0", tree)


def test_the_changelog_begins_with_this_version():
    (first, *_) = re.findall(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == rasa_ext.__version__
