"""Every code block of README.md and docs/use.md runs: Python as it stands, commands with data and steps that CI has.

So does the Python of the pages in PYTHON_PAGES.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import TRAINING
from hub_server import HubServer
from PIL import Image
from typer.main import get_command

from ctrl_csc_cli import app
from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.models.sampling import LatentSampler

ROOT = Path(__file__).parents[1]
README = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/use.md"))
PYTHON_PAGES = ("README.md", "docs/use.md", "docs/metrics.md", "docs/start.md", "docs/train.md", "docs/results.md")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


# Each block in a process of its own, which has imported nothing of this package; the others' imports take time.
RUN_BLOCKS = """
import os, sys, traceback
import diffusers, torch, transformers.models.auto
for block in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(block, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"this block failed: {block}")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What README's blocks find: the demo's data, its model folder with examples and sampler, and another model."""
    torch.manual_seed(0)
    config = CtrlCscConfig(latent_dim=16, stage_channels=[8, 16])
    for name in ("demo/model", "cifar10"):
        CtrlCscModel(config).save_pretrained(tmp_path / name)
        CtrlCscImageProcessor(image_size=32).save_pretrained(tmp_path / name)
    for shared in ("checkpoints", "spaces"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (70, 40), "red").save(tmp_path / "photographs" / "0.png")
    (tmp_path / "demo" / "model" / "examples").mkdir()
    sampler = LatentSampler(torch.full((10,), 0.1), torch.eye(16)[:10], [torch.ones(1, 16)] * 10, torch.arange(10))
    sampler.save_pretrained(tmp_path / "demo" / "model" / "sampler")
    runpy.run_path(str(TRAINING / "demo.py"))["write_digits"](tmp_path / "demo" / "data")
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "demo" / "model" / "examples" / f"{index}.png")
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run_each_by_itself(page: str, folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    run([sys.executable, "-c", RUN_BLOCKS, *blocks], folder)


def test_the_two_commands_are_the_first_thing_and_make_knows_them() -> None:
    assert [command.split("#")[0].split() for command in COMMANDS[:2]] == [["make", "demo"], ["make", "test"]]
    for target in ("demo", "test"):
        planned = run(["make", "--dry-run", target], ROOT).stdout
        assert "training/demo.py" in planned if target == "demo" else "pytest" in planned


def test_reconstruct_command_runs(folder: Path) -> None:
    for command in (command for command in COMMANDS if command.startswith("ctrl-csc reconstruct")):
        assert "dB" in run(shlex.split(command), folder).stdout
    assert (folder / "reconstructions.png").exists()


def test_inspect_command_writes_pictures_and_the_page(folder: Path) -> None:
    (command,) = (command for command in COMMANDS if command.startswith("ctrl-csc inspect"))
    run([*shlex.split(command), "--num_images=20"], folder)
    assert (folder / "report.html").exists() and (folder / "inspection" / "atoms_1.png").exists()


def test_fit_sampler_command_fits_a_component_for_each_digit(folder: Path) -> None:
    (command,) = (command for command in COMMANDS if command.startswith("ctrl-csc fit-sampler"))
    run([*shlex.split(command), "--num_images=100"], folder)
    sampler = LatentSampler.from_pretrained(folder / "demo" / "model" / "sampler")
    assert sampler.labels is not None and sampler.labels.tolist() == list(range(10))
    assert not torch.equal(sampler.means, torch.eye(16)[:10])


def test_publish_commands_write_and_upload_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dry, real = (command for command in COMMANDS if command.startswith("ctrl-csc publish"))
    assert "Written, not uploaded: repository" in run(shlex.split(dry), folder).stdout
    written = folder / "repository"
    assert 'AutoModel.from_pretrained("org/ctrl-csc-digits", trust_remote_code=True)' in (
        written / "README.md"
    ).read_text(encoding="utf-8")
    with HubServer() as server:
        for name, value in server.environment(folder / "cache").items():
            monkeypatch.setenv(name, value)
        assert f"Published: {server.url}/org/ctrl-csc-digits" in run(shlex.split(real), folder).stdout
        uploaded = server.files("org/ctrl-csc-digits")
    del uploaded[".gitattributes"]
    assert uploaded == {
        str(path.relative_to(written)): path.read_bytes() for path in written.rglob("*") if path.is_file()
    }


def test_training_and_evaluation_commands_run_on_local_copies(folder: Path, cifar10: str) -> None:
    short_forms = {
        "train": [
            "--max_train_steps=1",
            "--train_batch_size=64",
            "--num_validation_images=64",
            "--energy_warmup_steps=1",
            "--deconvolution_warmup_steps=1",
            "--use_ema=false",
        ],
        "evaluate": ["--num_images=20", "--num_probe_images=100"],
    }
    for split in ("train", "test"):
        part = datasets.load_dataset(cifar10, split=split, streaming=True).take(500)
        path = folder / "cifar10-part" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(list(part), features=part.features).to_parquet(path)
    (folder / "images").mkdir()
    for index in range(20):
        Image.new("RGB", (40, 32), (12 * index, 100, 200)).save(folder / "images" / f"{index}.png")
    commands = [command for command in COMMANDS if "training/" in command]
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command.replace("uoft-cs/cifar10", "cifar10-part"))
        (script,) = (Path(word).stem for word in words if word.startswith("training/"))
        words = [str(ROOT / word) if word.startswith("training/") else word for word in words]
        if script == "evaluate" and "CTRL_CSC_RESNET" in os.environ:
            words += ["--feature_model", os.environ["CTRL_CSC_RESNET"]]
        if "images" in words:
            words += ["--resolution", "16"]
        run([*words, *short_forms[script]], folder)


def test_commands_in_docs_are_such_commands_with_settings_that_exist() -> None:
    from ctrl_csc_hf.training.evaluate import EvaluationSettings
    from ctrl_csc_hf.training.settings import SettingsParser, parse_settings

    parsers = {
        "train": parse_settings,
        "evaluate": SettingsParser(EvaluationSettings).parse_args,
    }
    launches = launch_command_parser()
    described = cache(lambda script, *words: run([sys.executable, str(ROOT / script), *words, "--help"], ROOT).stdout)
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "training" / "README.md"):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for command in block.replace("\\\n", " ").splitlines():
                if command.startswith("make bench"):  # tests/test_benchmarks.py
                    continue
                program, launch, *words = shlex.split(command)
                if program == "pip":
                    (extras,) = re.findall(r"^\.\[([\w,]+)\]$", words[0])
                    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
                    assert launch == "install" and set(extras.split(",")) <= set(project["optional-dependencies"])
                    continue
                if program == "ctrl-csc":
                    subcommand = get_command(app).commands[launch]
                    context = subcommand.context_class(subcommand)
                    subcommand.make_parser(context).parse_args(words)  # raises at an option that does not exist
                    continue
                if program == "python":
                    known = described(launch, *words[: not words[0].startswith("-")])
                    assert set(re.findall(r"--\w+", command)) <= set(re.findall(r"--\w+", known)), command
                    continue
                assert (program, launch) == ("accelerate", "launch"), command
                launched = launches.parse_args(words)
                parsers[Path(launched.training_script).stem](launched.training_script_args)
                if launched.config_file:
                    machines = load_config_from_file(str(ROOT / launched.config_file))
                    assert machines.num_processes % machines.num_machines == 0


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_ignores_what_the_blocks_write() -> None:
    pages = [ROOT / "README.md", ROOT / "training" / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = "\n".join(re.findall(r"```(?:bash|python)\n(.*?)```", text, re.DOTALL))
    found = re.findall(r"--(?:output_dir|output|report|dry_run)[ =](\S+)", blocks)
    found += re.findall(r"\.save(?:_pretrained)?\(\"([^\"]+)", blocks)
    assert {"repository", "report.html", "reconstruction.png", "sample.png", "cifar10"} <= set(found)
    written = {name if Path(name).suffix else f"{name}/file" for name in (*found, "inspection", "evaluation")}
    command = ["git", "check-ignore", "--no-index", *sorted(written)]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert set(ignored) == written


def test_no_command_is_left_out() -> None:
    tested = (
        "pip install",
        "make demo",
        "make test",
        "ctrl-csc reconstruct",
        "ctrl-csc inspect",
        "ctrl-csc fit-sampler",
        "ctrl-csc publish",
        "ctrl-csc demo",
        "accelerate launch training/train.py",
        "accelerate launch training/evaluate.py",
    )
    assert all(command.startswith(tested) for command in COMMANDS), COMMANDS
