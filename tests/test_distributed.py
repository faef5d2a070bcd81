"""Several processes with parts of a batch end where one process with the whole batch ends."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters

STEPS = 10
CLASSES = 3
CONFIG = {
    "image_size": 8,
    "latent_dim": 6,
    "stage_channels": [4, 5],
    "kernel_sizes": [4, 4, 2],
    "strides": [2, 2, 1],
    "paddings": [1, 1, 0],
    "sparsity": 0.05,
}
# Images of each process: the last step's batch is uneven, and with labels sorted some process lacks a class.
SIZES = {2: [(8, 8)] * (STEPS - 1) + [(5, 2)], 3: [(8, 4, 4)] * (STEPS - 1) + [(3, 2, 1)]}
# fmt: off
RUNS: list[dict[str, Any]] = [
    {"objective": "binary", "decoder_consistency": 10.0},
    {"objective": "binary", "energy": 2.0},
    {"objective": "multi", "num_classes": CLASSES, "decoder_consistency": 1.0},
    {"objective": "unsupervised"},
    {"low_pass": True, "code_reduction": [0.3, 0.5], "code_consistency": 0.7, "pixel_error": 2.0},
    {"objective": "binary", "share_dictionaries": True},
]
# fmt: on
MODEL = ("share_dictionaries", "low_pass")


def batches(sizes: list[tuple[int, ...]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of all processes, by rank."""
    generator = torch.Generator().manual_seed(1)
    for parts in sizes:
        images = torch.rand(sum(parts), 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
        labels = torch.arange(sum(parts)) * (CLASSES - 1) // sum(parts)  # the last class has none, the first rank one
        yield images, labels


def play(options: dict[str, Any], dtype: torch.dtype, sizes: list[tuple[int, ...]], rank: int | None) -> dict[str, Any]:
    """Ten steps of the whole batches, or of one rank's parts -> weights, buffers and the last step's figures."""
    torch.manual_seed(0)
    config = CONFIG | {name: options[name] for name in MODEL if name in options}
    model = CtrlCscModel(CtrlCscConfig(**config)).to(dtype).train()
    objective = ClosedLoopObjective(**{k: v for k, v in options.items() if k not in MODEL})
    optimizers = [torch.optim.Adam(player, 1e-3) for player in player_parameters(model)]
    loop = ClosedLoop(model, objective, *optimizers)
    figures = None
    for parts, (images, labels) in zip(sizes, batches(sizes), strict=True):
        mine = slice(None)
        if rank is not None:
            mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        figures = loop.step(images[mine].to(dtype), labels[mine])
    return {"weights": model.state_dict(), "figures": vars(figures)}


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What this file's main saves in each of 2 and of 3 processes."""
    world_size, folder = request.param, tmp_path_factory.mktemp("processes")
    outputs = [folder / f"rank-{rank}.pt" for rank in range(world_size)]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / "rendezvous"), str(output)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"},
        )
        for rank, output in enumerate(outputs)
    ]
    assert [process.wait(timeout=300) for process in started] == [0] * world_size
    found = [torch.load(output, weights_only=False) for output in outputs]
    assert [(results["rank"], results["world size"]) for results in found] == [
        (r, world_size) for r in range(world_size)
    ]
    return found


@pytest.mark.parametrize("index", range(len(RUNS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ten_steps_of_several_processes_are_those_of_one(index: int, dtype: torch.dtype, found: list[Any]) -> None:
    expected = play(RUNS[index], dtype, SIZES[len(found)], None)
    for results in found:
        for kind in ("weights", "figures"):
            for name, tensor in expected[kind].items():
                difference = results[index, dtype][kind][name] - tensor
                if dtype == torch.float64:
                    assert difference.abs().max() <= 1e-9, name
                else:
                    assert difference.norm() <= 1e-5 * max(1, tensor.norm()), name


def test_processes_send_second_moments_or_features_whichever_are_fewer(found: list[Any]) -> None:
    dim = 6
    for results in found:
        for (objective, images, classes), sent in results["sent"].items():
            moments, features = 2 * classes * dim**2, 2 * images * dim
            least = min(moments, features) if objective == "multi" else moments
            bookkeeping = classes + images + 3 * len(found)  # sizes of classes, labels, sizes of the parts
            assert least <= sent <= least + bookkeeping, (objective, images, classes)
        assert results["sent"]["binary", 12, 1] == results["sent"]["binary", 240, 1]
        assert results["step"][4] == results["step"][40]


@contextmanager
def counting() -> Iterator[list[int]]:
    """The numbers that one process sends within, as a list of each exchange's."""
    sent: list[int] = []
    functions = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def all_reduce(tensor: torch.Tensor) -> None:
        sent.append(tensor.numel())
        functions["all_reduce"](tensor)

    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor) -> None:
        sent.append(sum(part.numel() for part in parts))  # every process's, as all_reduce's tensors are
        functions["all_gather"](parts, tensor)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    yield sent
    dist.all_reduce, dist.all_gather = functions["all_reduce"], functions["all_gather"]


def numbers_sent_for_utility(objective: str, images: int, classes: int) -> int:
    """For J of so many images of all processes, backward pass included."""
    z, zh = torch.nn.functional.normalize(torch.randn(2, images // dist.get_world_size(), 6), dim=2).requires_grad_()
    labels = torch.arange(len(z)) % classes
    with counting() as sent:
        ClosedLoopObjective(objective, num_classes=classes).utility(z, zh, labels)[0].backward()
    return sum(sent)


def numbers_sent_in_a_step(images: int) -> int:
    """Of the game `binary`, all of it, with so many images on each process."""
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(**CONFIG)).train()
    optimizers = [torch.optim.Adam(player, 1e-3) for player in player_parameters(model)]
    loop = ClosedLoop(model, ClosedLoopObjective(decoder_consistency=1.0), *optimizers)
    with counting() as sent:
        loop.step(torch.rand(images, 3, 8, 8))
    gradients = sum(parameter.numel() for player in player_parameters(model) for parameter in player)
    assert sent.count(gradients) == 1  # the gradients go in one exchange
    return sum(sent)


def main() -> None:
    rendezvous, output = sys.argv[1:]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results: dict[Any, Any] = {"rank": rank, "world size": world_size}
    for index, options in enumerate(RUNS):
        for dtype in (torch.float64, torch.float32):
            results[index, dtype] = play(options, dtype, SIZES[world_size], rank)
    settings = [("binary", 12, 1), ("binary", 240, 1), ("unsupervised", 240, 1), ("multi", 12, 3), ("multi", 240, 3)]
    results["sent"] = {setting: numbers_sent_for_utility(*setting) for setting in settings}
    results["step"] = {images: numbers_sent_in_a_step(images) for images in (4, 40)}
    torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
