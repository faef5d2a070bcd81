"""Runs of train.py that are killed, stopped or out of disk space, and go on to the same bits.

The short forms always run; `pytest -m slow tests/test_resume.py` kills ten times, one process and two.
"""

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
from conftest import TRAINING, random_image
from safetensors.torch import load_file

from ctrl_csc_hf.training.checkpoints import checkpoints

WORKERS = (0, 2, 1, 3)  # of the loader, another number after each kill
START = 120  # seconds until the first step, at most


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of 40 images each, of 20x16 pixels."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(5):
        rows = {"image": [random_image(40 * shard + row, (20, 16)) for row in range(40)]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features).to_parquet(str(folder / f"train-{shard}.parquet"))
    return folder


class Run:
    """A run of train.py in processes of its own, and its folder."""

    def __init__(self, preset: Path, shards: Path, folder: Path, processes: int) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        self.processes = processes
        self.arguments = [
            f"--config={preset}", f"--train_data_dir={shards}", f"--output_dir={folder}", "--streaming=true",
            "--shuffle_buffer=64", "--augmentation=crop_and_flip", "--validation_steps=100000",
        ]  # fmt: skip

    def start(self, *flags: str, **options: Any) -> subprocess.Popen:
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        if any(self.folder.glob("checkpoint-*")):
            flags = (*flags, "--resume_from_checkpoint=latest")
        with self.log.open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                [*launcher, str(TRAINING / "train.py"), *self.arguments, *flags],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
                **options,
            )

    def to_the_end(self, *flags: str) -> dict[str, torch.Tensor]:
        assert self.start(*flags).wait(timeout=300) == 0, self.log.read_text(encoding="utf-8")
        return load_file(self.folder / "model.safetensors")

    def wait_for_a_step(self, process: subprocess.Popen) -> None:
        self.wait_for(process, "images/s")  # of the first step; the evaluation before it can be killed

    def wait_for(self, process: subprocess.Popen, printed: str) -> None:
        deadline = time.monotonic() + START
        while printed not in self.log.read_text(encoding="utf-8"):
            assert process.poll() is None and time.monotonic() < deadline, self.log.read_text(encoding="utf-8")
            time.sleep(0.05)

    def newest_step(self) -> int:
        return int(checkpoints(self.folder)[-1].name.removeprefix("checkpoint-"))

    def kill(self, process: subprocess.Popen) -> None:
        everyone = psutil.Process(process.pid).children(recursive=True)  # torchrun's are in groups of their own
        for one in (process, *everyone):
            one.kill()
        process.wait()
        psutil.wait_procs(everyone)


@pytest.fixture
def new_run(tiny_preset: Path, shards: Path, tmp_path: Path) -> Callable[..., Run]:
    def new(name: str, processes: int = 1, shared: bool = False) -> Run:
        model = "model:\n" + shared * "  share_dictionaries: true\n"
        preset = tmp_path / f"{name}.yaml"
        preset.write_text(tiny_preset.read_text(encoding="utf-8").replace("model:\n", model), encoding="utf-8")
        return Run(preset, shards, tmp_path / name, processes)

    return new


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("processes", "kills", "shared"),
    [
        pytest.param(1, 3, True, marks=pytest.mark.slow),
        (1, 1, False),
        pytest.param(2, 1, False, marks=pytest.mark.slow),
        pytest.param(1, 10, False, marks=pytest.mark.slow),
        pytest.param(2, 10, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_never_stopped(
    new_run: Callable[..., Run], processes: int, kills: int, shared: bool
) -> None:
    flags = (f"--max_train_steps={60 * kills}", "--checkpointing_steps=3", "--energy_warmup_steps=3")
    killed, moment = new_run("killed", processes, shared), random.Random(kills)
    for index in range(kills):
        process = killed.start(*flags, f"--dataloader_num_workers={WORKERS[index % len(WORKERS)]}")
        killed.wait_for_a_step(process)
        time.sleep(moment.uniform(0, 1))  # a third of this is spent saving checkpoints
        assert process.poll() is None, "it ended before it could be killed"
        killed.kill(process)
    got = killed.to_the_end(*flags, "--dataloader_num_workers=1")
    assert_same_bits(got, new_run("whole", processes, shared).to_the_end(*flags))
    assert not list(killed.folder.glob(".checkpoint-*"))  # what a kill left half written is gone


@pytest.mark.parametrize(("killed", "shared"), [pytest.param(False, False, marks=pytest.mark.slow), (True, True)])
def test_a_run_that_ends_before_the_game_goes_on_from_there(
    new_run: Callable[..., Run], killed: bool, shared: bool
) -> None:
    run = new_run("stopped", shared=shared)
    flags = ("--energy_warmup_steps=2", "--deconvolution_warmup_steps=200", "--max_train_steps=2")
    process = run.start(*flags, f"--checkpointing_steps={3 if killed else 100000}")
    run.wait_for(process, "deconvolution error")
    if killed:
        while run.newest_step() < -195:  # some steps of the fit are kept
            assert process.poll() is None, run.log.read_text(encoding="utf-8")
            time.sleep(0.05)
        run.kill(process)
    else:
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert -200 < run.newest_step() < 0
    assert_same_bits(run.to_the_end(*flags), new_run("whole", shared=shared).to_the_end(*flags))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_a_checkpoint_and_ends_the_run_cleanly(new_run: Callable[..., Run], processes: int) -> None:
    run = new_run("stopped", processes)
    flags = ("--max_train_steps=100000", "--checkpointing_steps=100000", "--dataloader_num_workers=2")
    process = run.start(*flags)
    run.wait_for_a_step(process)
    process.terminate()  # torchrun passes it on, and has an exit code of its own
    assert process.wait(timeout=60) == 0 or processes > 1
    (checkpoint,) = run.folder.glob("checkpoint-*")
    assert f"Stopped; go on with --resume_from_checkpoint {checkpoint}" in run.log.read_text(encoding="utf-8")
    steps = int(checkpoint.name.split("-")[1]) + 2
    whole = new_run("whole", processes).to_the_end(f"--max_train_steps={steps}", "--checkpointing_steps=100000")
    assert_same_bits(run.to_the_end(f"--max_train_steps={steps}", "--checkpointing_steps=100000"), whole)


def test_a_full_disk_while_saving_leaves_the_last_checkpoint_to_go_on_from(new_run: Callable[..., Run]) -> None:
    run = new_run("full")
    flags = ("--max_train_steps=4", "--checkpointing_steps=2")
    run.to_the_end(*flags)
    before = {path: path.read_bytes() for path in run.folder.rglob("checkpoint-*/*")}
    longer = ("--max_train_steps=8", "--checkpointing_steps=2")
    limit = 8192  # bytes of a file: the kernel refuses to write more, as it does on a full disk
    process = run.start(*longer, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.wait(timeout=120) != 0
    log = run.log.read_text(encoding="utf-8")
    assert "checkpoint-6 cannot be written, earlier checkpoints are as they were: " in log
    assert {path: path.read_bytes() for path in run.folder.rglob("*checkpoint-*/*")} == before
    assert_same_bits(run.to_the_end(*longer), new_run("whole").to_the_end(*longer))
