"""The stages of .ci/run, the commands that it reads from the README, and a release's checks."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

import rasa_ext

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / ".ci" / "run"
SCRIPT = ROOT / ".ci" / "readme_commands.py"
README = (ROOT / "README.md").read_text()
read = runpy.run_path(str(SCRIPT))["read"]


def test_the_readme_s_two_commands_are_found():
    found = read(README)
    assert list(found) == ["demo", "tests"]
    for command in found.values():
        assert README.count(f"```bash\n{command}\n```\n") == 1
    assert found["demo"].startswith('pip install ".[train]" && ')
    assert found["tests"].startswith('pip install ".[test]" && ')


READMES = [
    ("## Two commands", "## Commands", 'expected a section "## Two commands"'),
    ("\nThe tests:\n", "```bash\nls\n```\n", "expected two commands"),
    ("rasa-ext demo\n```", "rasa-ext demo\nls\n```", "expected two commands"),
    ("&& rasa-ext demo", "&& rasa-ext env", "installs and then runs rasa-ext demo"),
    ('```bash\npip install ".[test]" && ', "```bash\n", "installs and then runs pytest"),
]


@pytest.mark.parametrize(("old", "new", "message"), READMES)
def test_a_readme_without_them_is_refused(old, new, message):
    assert old in README
    with pytest.raises(SystemExit, match=message):
        read(README.replace(old, new))


def test_what_the_type_checker_is_not_shown_says_why():
    research = (ROOT / "research" / "rasa_research").rglob("*.py")
    for path in [*(ROOT / "rasa_ext").rglob("*.py"), *research]:
        for line in path.read_text().splitlines():
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[\w, -]+\]  # \w", line), (path, line)


def test_what_a_plain_run_of_the_tests_leaves_out_has_a_stage():
    """Every marker except gpu needs a stage in .ci/run."""
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    stages = re.findall(r"stage .* marked (\w+) (tests/\w+)", RUN.read_text())
    assert {name for name, _ in stages} == set(markers) - {"gpu"}
    for name, folder in stages:
        assert any(f"mark.{name}\n" in path.read_text() for path in (ROOT / folder).glob("*.py"))


def test_the_oldest_versions_are_those_of_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(each for name in extras for each in extras[name])]
    floors = dict(re.findall(r"^(\w+)>=([\d.]+)", "\n".join(asked), re.MULTILINE))
    pins = (ROOT / "tests" / "requirements" / "oldest.txt").read_text()
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)", pins, re.MULTILINE))
    # transformers needs a newer huggingface_hub than the metadata's floor.
    del pinned["huggingface_hub"], floors["huggingface_hub"]
    assert pinned.keys() >= {"torch", "safetensors", "transformers", "peft", "trl", "typer"}
    for name, version in pinned.items():
        assert f"{version}.".startswith(f"{floors[name]}."), (name, version)


def test_a_run_ends_with_the_summary_of_the_second_command():
    *_, others, last = RUN.read_text().splitlines()
    for name in ("research", "readers", "engines"):
        assert f"$(summary {name})" in others
    assert last == "summary tests"


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


UNFIT = [
    ("rasa_ext/_version.py", "0.2.0", "0.3.0", r"expected v0\.3\.0, the version of rasa_ext"),
    ("CITATION.cff", "0.2.0", "0.1.0", r"expected v0\.1\.0, the version of CITATION"),
    ("CHANGELOG.md", "(2026-12-01)", "(unreleased)", r"got '## 0\.2\.0 \(unreleased\)'"),
    ("CHANGELOG.md", "## 0.2.0", "## 0.2.1", r"expected '## 0\.2\.0 \(YYYY-MM-DD\)'"),
    ("CHANGELOG.md", "## ", "### ", "got 'none'"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), UNFIT)
def test_what_does_not_fit_the_tag_is_refused(tree, name, old, new, message):
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match=message):
        notes("v0.2.0", tree)


def test_the_changelog_begins_with_this_version():
    (first, *_) = re.findall(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == rasa_ext.__version__
