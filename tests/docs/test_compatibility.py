"""The compatibility page matches its data, and its tests run only if they are selected."""

import datetime
import re
import shutil
from pathlib import Path

import pytest

from tests.readers import environments
from tests.readers.report import PAGE, PART, READERS, REPORT, measured, table, versions_of

pytest_plugins = "pytester"

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_versions_that_are_pinned():
    rows = [line for line in PART.search(PAGE.read_text())[0].splitlines() if " | " in line][2:]
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows} == set(READERS)
    for row in rows:
        reader, what, difference, versions = row.strip("| ").split(" | ")
        assert versions == versions_of(READERS[reader])
        assert what
        assert float(difference) > 0


def test_what_was_measured_becomes_a_table(pytester):
    pytester.makepyfile(
        "def test_it(record_property):\n"
        "    record_property('mlx-lm, float32', 0.00027)\n"
        "    record_property('figure', 'mlx-lm: 3')\n"
    )
    done = pytester.runpytest_inprocess(*REPORT, "--junitxml=report.xml")
    done.assert_outcomes(passed=1, warnings=0)
    found = measured((pytester.path / "report.xml").read_text())
    assert found == {"mlx-lm, float32": 0.00027}
    text = table(found, datetime.date(2026, 11, 26))
    assert f"| mlx-lm | float32 | 2.7e-04 | {versions_of('mlx')} |" in text
    assert "Measured on 2026-11-26." in text


@pytest.mark.parametrize(
    ("options", "run"),
    [((), ["plain"]), (("-m", "readers", "--figures", "-n", "1"), ["read"]), (("-m", "gpu"), [])],
)
def test_readers_are_run_and_figures_printed_for_who_asks(pytester, options, run):
    shutil.copy(ROOT / "tests" / "conftest.py", pytester.path)
    pytester.makeini("[pytest]\nmarkers =\n  readers\n  gpu\n")
    pytester.makepyfile(
        "import pytest\n@pytest.mark.readers\ndef test_read(figure): figure('seven of nine')\n"
        "def test_plain(figure): figure('eight of nine')\n"
    )
    done = pytester.runpytest_inprocess(*options)
    done.assert_outcomes(passed=len(run), deselected=0 if "-n" in options else 2 - len(run))
    assert ("seven of nine" in done.outlines) == ("--figures" in options)
    assert "eight of nine" not in done.outlines
    assert done.ret == (0 if run else pytest.ExitCode.NO_TESTS_COLLECTED)


def test_every_version_is_pinned():
    for name, wanted in environments.all_pins().items():
        for spec in " ".join(wanted[key] for key in wanted if key != "remove").split():
            assert re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.+]+", spec), (name, spec)
