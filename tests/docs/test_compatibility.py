"""The page of what was run where, and that its tests are for who asks for them."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest

from tests.readers.report import PAGE, PART, READERS, measured, table, versions_of

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


def test_what_was_measured_becomes_a_table():
    xml = (
        "<testsuites><testsuite><testcase><properties>"
        '<property name="mlx-lm, float32" value="0.00027"/>'
        '<property name="figure" value="mlx-lm: 3"/>'
        "</properties></testcase></testsuite></testsuites>"
    )
    found = measured(xml)
    assert found == {"mlx-lm, float32": 0.00027}
    text = table(found, datetime.date(2026, 11, 26))
    assert f"| mlx-lm | float32 | 2.7e-04 | {versions_of('mlx')} |" in text
    assert "Measured on 2026-11-26." in text


@pytest.mark.parametrize(
    ("options", "run"), [((), ["plain"]), (("-m", "readers"), ["read"]), (("-m", "gpu"), [])]
)
def test_readers_are_run_for_who_asks(pytester, options, run):
    shutil.copy(ROOT / "tests" / "conftest.py", pytester.path)
    pytester.makeini("[pytest]\nmarkers =\n  readers\n  gpu\n")
    pytester.makepyfile(
        "import pytest\n@pytest.mark.readers\ndef test_read(): pass\ndef test_plain(): pass\n"
    )
    done = pytester.runpytest_inprocess(*options)
    done.assert_outcomes(passed=len(run), deselected=2 - len(run))
    assert done.ret == (0 if run else pytest.ExitCode.NO_TESTS_COLLECTED)
