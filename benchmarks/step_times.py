"""Milliseconds of a step of the fit and of the game, nothing compiled, bfloat16 autocast: docs/performance.md.

python benchmarks/step_times.py [--device cuda] [--repeats 20] [--against COMMIT]

Against a commit of this repository, on one core of a CPU: steps of both alternately, each in a process of its own, by
the processor time they use; medians, and the median of the ratios of neighbouring steps.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters
from ctrl_csc_hf.training.presets import load_preset
from ctrl_csc_hf.training.steps import make_adam
from ctrl_csc_hf.training.warmup import Descent, deconvolution_error

ROOT = Path(__file__).parents[1]
AGAINST = [("cifar10", 64), ("imagenet64", 16), ("imagenet128", 4)]  # preset, batch
# Makes the steps that it is asked for and tells their processor time. It has to serve earlier commits, too.
WORKER = """
import sys, time
root, preset, batch = sys.argv[1:]
sys.path[:0] = [f"{root}/src", f"{root}/benchmarks"]
import torch
from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from step_times import steps_of
torch.set_num_threads(1)
config = CtrlCscConfig(**eval(preset))
model = CtrlCscModel(config).train().to(memory_format=torch.channels_last)
images = torch.rand(int(batch), 3, config.image_size, config.image_size) * 2 - 1
images = images.contiguous(memory_format=torch.channels_last)
steps = dict(zip(("fit", "game"), steps_of(model)))
for step in steps.values():
    step(images)
for line in sys.stdin:
    start = time.process_time()
    steps[line.strip()](images)
    print(time.process_time() - start, flush=True)
"""

NETS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [  # preset, what is changed of it, batches
    ("cifar10", {}, (64, 256, 1024)),
    ("cifar10", {"num_iterations": 4}, (1024,)),
    ("cifar10_512", {}, (1024,)),
    ("imagenet64", {}, (64,)),
    ("imagenet128", {}, (16,)),
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=20, help="steps timed, after two that are not")
    parser.add_argument("--against", metavar="COMMIT", help="time the steps of this commit beside the present ones")
    options = parser.parse_args(arguments)
    if options.against:
        compare(options.against, options.repeats)
        return
    print("| net | batch | fit, ms | game, ms | of these, projection |\n| --- | --- | --- | --- | --- |")
    for preset, changes, batches in NETS:
        config = CtrlCscConfig(**load_preset(preset)["model"] | changes)
        model = CtrlCscModel(config).train().to(options.device, memory_format=torch.channels_last)
        fit, game = steps_of(model)
        name = ", ".join([preset, *(f"{key} {value}" for key, value in changes.items())])
        for batch in batches:
            shape = (batch, config.num_channels, config.image_size, config.image_size)
            images = torch.rand(shape, device=options.device) * 2 - 1
            images = images.contiguous(memory_format=torch.channels_last)
            steps = (partial(fit, images), partial(game, images), partial(model.project_parameters, refine=False))
            times = [f"{milliseconds(step, options.repeats, options.device):.1f}" for step in steps]
            print(f"| {name} | {batch} | {' | '.join(times)} |", flush=True)


def compare(commit: str, repeats: int) -> None:
    """Prints the table of the steps before and now."""
    print(f"| step | batch | at {commit}, ms | now, ms | ratio |\n| --- | --- | --- | --- | --- |")
    with TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        for preset, batch in AGAINST:
            config = repr(load_preset(preset)["model"])
            workers = [
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, str(root), config, str(batch)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for root in (folder, ROOT)
            ]
            for name in ("fit", "game"):
                times = [[ask(worker, name) for worker in workers] for _ in range(repeats)]
                before, now = (statistics.median(pair[side] for pair in times) * 1e3 for side in (0, 1))
                ratio = statistics.median(first / second for first, second in times)
                print(f"| {preset}, {name} | {batch} | {before:.0f} | {now:.0f} | {ratio:.2f} |", flush=True)
            for worker in workers:
                worker.communicate()


def ask(worker: subprocess.Popen[str], step: str) -> float:
    """Seconds of a step in a worker."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{step}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def steps_of(model: CtrlCscModel) -> tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]:
    """A step of the fit and one of the game, as train.py makes them: of images (n, C, H, W), pixels in [-1, 1]."""
    descent = Descent(deconvolution_error, model, 1, 1e-3)
    players = [make_adam(part, 1e-4) for part in player_parameters(model)]
    loop = ClosedLoop(model, ClosedLoopObjective(decoder_consistency=20.0), *players)

    def fit(images: torch.Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            descent.step(images)

    def game(images: torch.Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loop.step(images)

    return fit, game


def milliseconds(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The mean of `repeats` steps, to the end of what they started on a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - start) / repeats * 1e3


if __name__ == "__main__":
    main()
