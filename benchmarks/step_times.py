"""Milliseconds of a step of the fit and of the game, nothing compiled, bfloat16 autocast: docs/performance.md.

python benchmarks/step_times.py [--device cuda] [--repeats 20]
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "training"))
from warmup import deconvolution_error

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters
from ctrl_csc_hf.presets import load_preset

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
    options = parser.parse_args(arguments)
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
            steps = (partial(fit, images), partial(game, images), model.project_parameters)
            times = [f"{milliseconds(step, options.repeats, options.device):.1f}" for step in steps]
            print(f"| {name} | {batch} | {' | '.join(times)} |", flush=True)


def steps_of(model: CtrlCscModel) -> tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]:
    """A step of the fit and one of the game, as train.py makes them: of images (n, C, H, W), pixels in [-1, 1]."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    players = [torch.optim.Adam(part, 1e-4, fused=True) for part in player_parameters(model)]
    loop = ClosedLoop(
        model, ClosedLoopObjective(decoder_consistency=20.0), *players, reconstruction_statistics="images"
    )

    def fit(images: torch.Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = deconvolution_error(model, images).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.project_parameters()
        loss.item()  # as the progress bar does

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
