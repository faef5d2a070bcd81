"""How fast a whole training step is, how its time divides, and how far that is from what the device can do."""

from collections.abc import Callable
from functools import partial

import torch
from pairs import Bench, Row
from torch.utils.flop_counter import FlopCounterMode

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters
from ctrl_csc_hf.training.presets import load_preset

# Dense bfloat16 operations a second, by the makers' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}
IMAGENET_IMAGES = 1_281_167


def throughput(bench: Bench) -> list[Row]:
    """Images a second of a step, bfloat16 against float32, with model FLOP utilisation where the peak is known."""
    gpu = bench.device.type == "cuda"
    peak = next((flops for name, flops in PEAKS.items() if gpu and name in torch.cuda.get_device_name()), None)
    rows = []
    for preset, batch_size in (
        ("cifar10", 1024 if gpu else 64),
        ("imagenet64", 512 if gpu else 16),
        ("imagenet128", 256 if gpu else 4),
    ):
        fields = load_preset(preset)["model"]
        if bench.short:
            fields |= {"stage_channels": [4] * len(fields["stage_channels"])}
        config = CtrlCscConfig(**fields)
        model = CtrlCscModel(config).to(bench.device).train()
        optimizers = [torch.optim.Adam(part, 1e-4) for part in player_parameters(model)]
        loop = ClosedLoop(model, ClosedLoopObjective(), *optimizers)
        size = config.image_size
        images = torch.rand(4 if bench.short else batch_size, 3, size, size, device=bench.device) * 2 - 1
        with FlopCounterMode(display=False) as counter:
            loop.backward(images)
        flops = counter.get_total_flops() / len(images)
        if gpu:
            model.encoder.compile(fullgraph=True)
            model.decoder.compile(fullgraph=True)
        times = bench.pair(partial(_autocast, bench, loop.step, images), partial(loop.step, images))
        images_per_second = len(images) / times["ours_s"]
        figures = {
            "images/s": images_per_second,
            "GFLOP an image": flops / 1e9,
            "TFLOP/s": flops * images_per_second / 1e12,
        }
        if preset.startswith("imagenet"):
            figures["hours an epoch"] = IMAGENET_IMAGES / images_per_second / 3600
        if peak:
            figures["model FLOP utilisation"] = flops * images_per_second / peak
        figures |= _parts(bench, loop, images)
        rows.append(Row("step in bfloat16 / float32", f"{preset}, batch {len(images)}", **times, figures=figures))
    return rows


def _parts(bench: Bench, loop: ClosedLoop, images: torch.Tensor) -> dict[str, float]:
    """Shares of a bfloat16 step: the gradients of both players, and the optimisers with the projection."""
    gradients = partial(_autocast, bench, loop.backward, images)
    projection = partial(loop.model.project_parameters, refine=False)
    gradients()
    whole = bench.pair(gradients, projection)
    step = bench.pair(partial(_autocast, bench, loop.step, images), projection)
    return {
        "share of gradients": whole["ours_s"] / step["ours_s"],
        "share of projection": step["rival_s"] / step["ours_s"],
    }


def _autocast(bench: Bench, function: Callable[[torch.Tensor], object], images: torch.Tensor) -> None:
    with torch.autocast(bench.device.type, torch.bfloat16):
        function(images)
