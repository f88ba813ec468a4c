"""Run the tests of readers and DeepSpeed, and write their results to docs/compatibility.md.

    python -m tests.readers.report

One run replaces the whole part of the page between the two marks. If a test fails, the page stays
unchanged.
"""

import datetime
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tests.readers.environments import pins

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
PART = re.compile(r"(?<=<!-- readers -->\n).*?(?=<!-- end of readers -->)", re.DOTALL)
READERS = {
    # First part of a property's name: section of readers.ini.
    "llama.cpp": "llama.cpp",
    "mlx-lm": "mlx",
    "vLLM": "vllm",
    "DeepSpeed": "deepspeed",
}
TESTS = ("-m", "readers or engines", "--figures", "tests/readers", "tests/distributed")
REPORT = ("-o", "junit_family=xunit1")  # the report format with properties


def main() -> int:
    """Run the tests; write the page if all of them pass."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.xml"
        words = ["-m", "pytest", *REPORT, f"--junitxml={path}", *TESTS]
        done = subprocess.run([sys.executable, *words], cwd=ROOT)
        if done.returncode:
            return done.returncode
        found = measured(path.read_text())
    text = PAGE.read_text()
    PAGE.write_text(PART.sub(lambda _: table(found, datetime.date.today()), text))
    return 0


def measured(xml: str) -> dict[str, float]:
    """Return the largest difference that each test recorded, by property name."""
    properties = ElementTree.fromstring(xml).iter("property")
    given = {each.attrib["name"]: each.attrib["value"] for each in properties}
    return {
        name: float(value)
        for name, value in given.items()
        if any(name.startswith(f"{reader}, ") for reader in READERS)
    }


def table(found: dict[str, float], day: datetime.date) -> str:
    """Return the table of results, with the installed versions."""
    lines = ["", "| program | what was run | largest difference | versions |", "| --- " * 4 + "|"]
    for name, value in found.items():
        reader, _, what = name.partition(", ")
        versions = versions_of(READERS[reader])
        lines.append(f"| {reader} | {what} | {value:.1e} | {versions} |")
    return "\n".join([*lines, "", f"Measured on {day.isoformat()}.", "", ""])


def versions_of(reader: str) -> str:
    given = pins(reader)
    named = [each for name in ("install", "source") for each in given.get(name, "").split()]
    named = named or given["beside"].split()[:1]
    return ", ".join(each.replace("==", " ") for each in named)


if __name__ == "__main__":
    sys.exit(main())
