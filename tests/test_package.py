"""The package as it is installed: its wheel, what it needs, and what importing it brings along."""

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS_ONLY = ("accelerate", "datasets", "diffusers", "evaluate")


def core_closure() -> list[metadata.Distribution]:
    """The installed distributions that the core dependencies need, themselves included."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(text) for text in metadata.requires("ctrl-csc-hf") or []]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = metadata.distribution(name)
        waiting += [Requirement(text) for text in found[name].requires or []]
    return list(found.values())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def core_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees the wheel and what its core dependencies need, and nothing else."""
    folder = tmp_path_factory.mktemp("core") / "env"
    venv.create(folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for distribution in core_closure():
        for entry in {Path(str(file)).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(entry)))
            if target.exists() and not (site_packages / entry).exists():
                (site_packages / entry).symlink_to(target)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    return folder / "bin" / "python"


def run(python: Path, code: str, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_holds_all_modules_types_and_presets(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert {"ctrl_csc_hf/training/train.py", "ctrl_csc_hf/metrics/psnr/psnr.py"} <= modules <= set(names)
    assert "ctrl_csc_hf/py.typed" in names
    presets = {f"ctrl_csc_hf/training/configs/{path.name}" for path in (ROOT / "training/configs").glob("*.yaml")}
    assert "ctrl_csc_hf/training/configs/cifar10.yaml" in presets <= set(names)
    assert not [name for name in names if not name.startswith(("ctrl_csc_hf/", "ctrl_csc_hf-", "ctrl_csc_cli.py"))]


def test_the_wheel_imports_and_runs_one_stage_with_the_core_dependencies_alone(
    core_python: Path, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", page.split("## One stage alone")[1], re.DOTALL)[0]
    check = f"import sys; assert not [name for name in {EXTRAS_ONLY} if name in sys.modules]"
    lookup = (
        "import ctrl_csc_hf.training.presets as p; assert 'cifar10' in p.preset_names(); print(ctrl_csc_hf.__file__)"
    )
    where = run(core_python, f"import ctrl_csc_hf\n{check}\n{lookup}", tmp_path)
    assert "core" in where and str(ROOT) not in where
    versions = "import ctrl_csc_hf, ctrl_csc_cli; print(ctrl_csc_hf.__version__); ctrl_csc_cli.app(['--version'])"
    first, second = run(core_python, versions, tmp_path).splitlines()
    assert second == f"ctrl-csc-hf {first}" and first == metadata.version("ctrl-csc-hf")
    assert "torch.Size([2, 3, 32, 32])" in run(core_python, block, tmp_path)
    for name in EXTRAS_ONLY:
        assert "None" in run(core_python, f"import importlib.util; print(importlib.util.find_spec({name!r}))", tmp_path)


def test_importing_adds_nothing_of_the_extras(tmp_path: Path) -> None:
    """transformers loads accelerate with its models where it is installed; this package adds nothing to that."""
    code = (
        f"import sys; from transformers import PreTrainedModel; from transformers.image_processing_backends "
        f"import PilBackend; before = set(sys.modules); import ctrl_csc_hf; "
        f"print([name for name in {EXTRAS_ONLY} if name in set(sys.modules) - before])"
    )
    assert run(Path(sys.executable), code, tmp_path).strip() == "[]"


def text_without_encoding(code: str) -> list[int]:
    """Lines whose calls read or write text in the locale's encoding."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    lines = []
    for call in calls:
        function = ast.unparse(call.func)
        name, keywords = function.rsplit(".", 1)[-1], {keyword.arg: keyword.value for keyword in call.keywords}
        if name not in ("read_text", "write_text", "open") or function in ("Image.open", "os.open"):
            continue
        modes = call.args[name == function :][:1] if name == "open" else []  # the builtin's first argument is a path
        mode = keywords.get("mode", modes[0] if modes else None)
        if "encoding" not in keywords and "b" not in getattr(mode, "value", ""):
            lines.append(call.lineno)
    return lines


def test_text_files_are_read_and_written_as_utf_8_whatever_the_locale() -> None:
    wrong = ["path.read_text()", "path.write_text(text)", "open(path)", "open(path, 'w')", "path.open(mode='a')"]
    right = ["path.read_text(encoding='utf-8')", "open(path, 'rb')", "path.open('wb')", "Image.open(path)"]
    assert text_without_encoding("\n".join(wrong + right)) == [1, 2, 3, 4, 5]
    for folder in ("src", "training", "model_cards", "spaces", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not text_without_encoding(path.read_text(encoding="utf-8")), path


def test_lower_bounds_are_the_ones_that_were_tried() -> None:
    """constraints-lowest.txt holds what CONTRIBUTING.md's command installs; pyproject.toml must not promise less."""
    tried = dict(
        line.split("==")
        for line in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    for text in metadata.requires("ctrl-csc-hf") or []:
        requirement = Requirement(text)
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if requirement.name in tried and requirement.name != "torch":  # torch: see CONTRIBUTING.md
            assert bounds and tried[requirement.name].startswith(bounds[0]), text
