"""Imports of the package run downward through its rooms, and no modules import one another in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import BENCHMARKS

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "ctrl_csc_hf"
ROOMS = ("models", "objectives", "metrics", "latents", "inspection", "hub", "training")  # each may import those before


def modules(root: Path) -> dict[str, Path]:
    """Dotted names and files of all modules below a folder; a package has the name of its folder."""
    paths = {path.relative_to(root).with_suffix(""): path for path in sorted(root.rglob("*.py"))}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """What a module imports of the known ones, anywhere in its code; names are resolved to the module they are of."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {part if part in known else source for part in inner}
    return {module for module in found if module in known}


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: imports(name, path, known) for name, path in known.items()}


def circle(imported: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def is_downward(name: str, target: str) -> bool:
    if not name.startswith(PACKAGE):  # the command line, which may import all
        return True
    if not target.startswith(PACKAGE):
        return False
    room, other = (module.removeprefix(PACKAGE).strip(".").partition(".")[0] for module in (name, target))
    if room in ("", other):
        return True
    if not other:  # the package's public names, which are of the first two rooms
        return room != "models"
    return ROOMS.index(other) < ROOMS.index(room)


def wrong_imports(imported: dict[str, set[str]]) -> list[str]:
    """The imports that do not run downward, as "module -> module"."""
    pairs = [(name, target) for name, targets in imported.items() for target in targets]
    return sorted(f"{name} -> {target}" for name, target in pairs if not is_downward(name, target))


def test_every_module_lies_in_a_room() -> None:
    rooms = {tuple(name.split(".")[1:2]) for name in modules(SOURCE) if name.startswith(PACKAGE)}
    assert rooms == {(), *((room,) for room in ROOMS)}


def test_imports_run_downward() -> None:
    assert not wrong_imports(graph(SOURCE))


@pytest.mark.parametrize("root", [SOURCE, BENCHMARKS], ids=["src", "benchmarks"])
def test_no_modules_import_one_another_in_a_circle(root: Path) -> None:
    assert not circle(graph(root))


def test_upward_imports_and_circles_are_found(tmp_path: Path) -> None:
    for name, code in {
        "ctrl_csc_cli.py": "from ctrl_csc_hf.models import low",
        "ctrl_csc_hf/__init__.py": "from .models.low import name",
        "ctrl_csc_hf/models/__init__.py": "",
        "ctrl_csc_hf/models/low.py": "def f():\n    from ..hub import high",
        "ctrl_csc_hf/models/other.py": "import ctrl_csc_hf\nimport ctrl_csc_cli",
        "ctrl_csc_hf/hub/__init__.py": "",
        "ctrl_csc_hf/hub/high.py": "from ctrl_csc_hf import name\nfrom ctrl_csc_hf.models.low import f",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    imported = graph(tmp_path)
    assert wrong_imports(imported) == [
        "ctrl_csc_hf.models.low -> ctrl_csc_hf.hub.high",
        "ctrl_csc_hf.models.other -> ctrl_csc_cli",
        "ctrl_csc_hf.models.other -> ctrl_csc_hf",
    ]
    assert set(circle(imported)) >= {"ctrl_csc_hf.models.low", "ctrl_csc_hf.hub.high"}
