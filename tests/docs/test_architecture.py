"""Imports between the package's folders go in one direction."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]

# From the lowest level to the highest. A folder may import from itself and from earlier lines, but
# not from other folders in its line. "" is the package's root, from which users import.
ORDER = [
    {"_version", "base_layers", "linalg", "ops", "writing"},
    {"nn"},
    {"methods"},
    {"patching"},
    {"checkpoint"},
    {"peft", "analysis", "training"},
    {"api", "serving"},
    {""},
    {"commands"},
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "rasa_ext").rglob("*.py")
}


def folder(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def names(path: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions and for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
    return found


def imported(module: str) -> set[str]:
    """Return the package's modules that a module imports."""
    found = names(MODULES[module])
    found = {name if name in MODULES else name.rpartition(".")[0] for name in found}
    return found & set(MODULES) - {module}


IMPORTS = {module: imported(module) for module in MODULES}


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the level of each node above its imports. Raises CycleError if there is a cycle."""
    found: dict[str, int] = {}
    for each in TopologicalSorter(graph).static_order():
        found[each] = 1 + max((found[below] for below in graph[each]), default=0)
    return found


def test_no_circle_among_modules():
    assert levels(IMPORTS)


def test_arrows_point_down():
    height = {name: level for level, names in enumerate(ORDER) for name in names}
    assert {folder(module) for module in MODULES} == set(height)
    wrong = [
        f"{module} -> {other}"
        for module, others in IMPORTS.items()
        for other in others
        if folder(module) != folder(other) and height[folder(module)] <= height[folder(other)]
    ]
    graph: dict[str, set[str]] = {name: set() for name in height}
    for module, others in IMPORTS.items():
        graph[folder(module)] |= {folder(other) for other in others} - {folder(module)}
    assert not wrong, f"against the order: {wrong}"
    count, modules = (max(levels(each).values()) for each in (graph, IMPORTS))
    assert count <= 8, f"expected at most 8 levels of folders, got {count}, {modules} of modules"


def test_only_tests_are_imported_from_test_modules():
    """research/tests runs tests of the core over its methods; what else is shared is in helpers."""
    files = [path for part in ("tests", "research/tests") for path in (ROOT / part).rglob("*.py")]
    shared = re.compile(r"((?!test_)\w+\.)+test_\w+(\.(?!test_)\w+)?")
    wrong = [
        f"{path} -> {name}" for path in files for name in names(path) if shared.fullmatch(name)
    ]
    assert not wrong


def test_contributing_lists_every_part():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    part = text.partition("## Where things are")[2].partition("\n## ")[0]
    package, others = (
        {name.rstrip("/") for name in re.findall(r"`([\w./]+)`", table)}
        for table in part.split("| folder |")
    )
    modules = {path.name for path in (ROOT / "rasa_ext").glob("[!_]*.py")}
    assert modules | children("rasa_ext") <= package
    assert children("research/rasa_research") <= others
    assert children("tests") <= {name.removeprefix("tests/") for name in others}
    assert {"csrc", "csrc/cuda", "benchmarks", "build_support", "docs", "examples"} <= others


def test_contributing_names_what_is_there():
    """Tables of files name files that exist, and names that one of a row's files has."""
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    checked = 0
    for first, second in rows:
        texts, folder = [], ROOT
        for name in re.findall(r"`([^`]+)`", first):
            near = (ROOT, ROOT / "rasa_ext", folder, folder.parent)
            path = next((each / name for each in near if (each / name).exists()), None)
            if path is None:
                assert name.isupper() or re.search(r"[A-Z]{2}", name), f"{name} in {first!r}"
                continue
            folder = path.parent
            files = path.rglob("*.py") if path.is_dir() else [path]
            texts += [file.read_text() for file in files]
        for name in re.findall(r"`(\w+)`", second) if texts else ():
            checked += 1
            found = any(re.search(rf"\b{name}\b", text) for text in texts)
            assert found or (ROOT / "docs" / f"{name}.md").exists(), f"{name} of {first!r}"
    assert checked > 25


def children(path: str) -> set[str]:
    """Return the names of the subfolders that contain Python files."""
    return {file.parent.name for file in (ROOT / path).glob("*/*.py")}
