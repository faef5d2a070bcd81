"""What `make bench` compares: one function each, from how to measure to the rows of the table.

One more comparison is one more function and one more line in `COMPARISONS`.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from accelerator import throughput
from diffusers import AutoencoderKL, AutoencoderTiny
from loader import HEIGHT, IMAGE_SIZE, WIDTH, our_loader, plain_loader, write_photographs
from pairs import Bench, Row
from rivals import (
    bare_convolutions,
    encode_plainly,
    looped_multiclass_objective,
    two_phase_step,
    with_plain_stages,
)
from torch import Tensor

from ctrl_csc_hf import ConvolutionalSparseCoding, CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters
from ctrl_csc_hf.objectives.rate_reduction import multiclass_objective
from ctrl_csc_hf.training.presets import load_preset

# (C_signal, C_code, side of the signal) of the stages of the CIFAR-10 net; k = 4, stride 2, padding 1
STAGES = [(3, 64, 32), (64, 128, 16), (128, 256, 8)]
# Of Stable Diffusion's autoencoder, whose class has smaller defaults.
STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def coding_rates(bench: Bench) -> list[Row]:
    """Objective "multi", forward and backward, against one logdet a class in a loop."""
    count, dim = (60, 8) if bench.short else (1600, 128)
    rows = []
    for classes, goal in ((10, 1.5), (100, 10.0), (1000, 80.0)):
        z, zh = (F.normalize(torch.randn(count, dim, device=bench.device)).requires_grad_() for _ in range(2))
        labels = torch.randint(classes, (count,), device=bench.device)

        def ours(z: Tensor = z, zh: Tensor = zh, labels: Tensor = labels, classes: int = classes) -> Tensor:
            value = multiclass_objective(z, zh, labels, classes)
            torch.autograd.grad(value, (z, zh))
            return value

        def rival(z: Tensor = z, zh: Tensor = zh, labels: Tensor = labels, classes: int = classes) -> Tensor:
            value = looped_multiclass_objective(z, zh, labels, classes)
            torch.autograd.grad(value, (z, zh))
            return value

        difference = abs(ours().item() / rival().item() - 1)
        setting = f"n {count}, d {dim}, {classes} classes"
        rows.append(Row("coding rates", setting, **bench.pair(ours, rival), goal=goal, difference=difference))
    return rows


def training_step(bench: Bench) -> list[Row]:
    """A step of both players against two phases, these once with our stages and once with plain ones."""
    gpu = bench.device.type == "cuda"
    rows = []
    for preset, name, batch_size in (
        ("cifar10", "multi", 1600 if gpu else 64),
        ("imagenet64", "binary", 256 if gpu else 16),
    ):
        config = CtrlCscConfig(**load_preset(preset)["model"] | _tiny(bench))
        objective = ClosedLoopObjective(name, num_classes=10 if name == "multi" else None)
        size = config.image_size
        images = torch.rand(4 if bench.short else batch_size, 3, size, size, device=bench.device) * 2 - 1
        labels = torch.randint(10, (len(images),), device=bench.device)
        models = [CtrlCscModel(config).to(bench.device).train()]
        models += [copy.deepcopy(models[0]), with_plain_stages(copy.deepcopy(models[0]))]
        optimizers = [
            tuple(torch.optim.Adam(part, 1e-4, betas=(0.5, 0.999)) for part in player_parameters(model))
            for model in models
        ]
        loop = ClosedLoop(models[0], objective, *optimizers[0])
        if gpu:
            models[0].encoder.compile(fullgraph=True)
            models[0].decoder.compile(fullgraph=True)

        def ours(loop: ClosedLoop = loop, images: Tensor = images, labels: Tensor = labels) -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                loop.step(images, labels)

        for model, optimizer, stages, goal in (
            (models[1], optimizers[1], "our stages", 1.5),
            (models[2], optimizers[2], "plain stages", 2.0),
        ):

            def rival(model=model, objective=objective, optimizer=optimizer, images=images, labels=labels) -> None:
                two_phase_step(model, objective, optimizer, images, labels)

            setting = f"{preset}, batch {len(images)}, two phases with {stages}"
            rows.append(Row("training step", setting, **bench.pair(ours, rival), goal=4.0 if gpu else goal))
    return rows


def plain_stage(bench: Bench) -> list[Row]:
    """A stage, forward and backward, against the same iteration as a plain loop."""
    rows = []
    for iterations, goal in ((2, 1.2), (8, 1.1)):
        for shape in STAGES:
            stage, signal, gradient, setting = _stage(bench, shape, num_iterations=iterations)
            weights = (signal, stage.dictionary)
            codes, plain_codes = stage.encode(signal), encode_plainly(stage, signal)[0]

            def ours(stage=stage, signal=signal, weights=weights, gradient=gradient) -> None:
                torch.autograd.grad(stage.encode(signal), weights, gradient)

            def rival(stage=stage, signal=signal, weights=weights, gradient=gradient) -> None:
                torch.autograd.grad(encode_plainly(stage, signal)[0], weights, gradient)

            difference = (codes - plain_codes).abs().max().item()
            rows.append(Row("stage / loop", setting, **bench.pair(ours, rival), goal=goal, difference=difference))
    return rows


def bare_stage(bench: Bench) -> list[Row]:
    """A stage, forward and backward, against its convolutions alone: a ratio of 1 / 1.08 is the goal."""
    rows = []
    for shape in STAGES:
        stage, signal, gradient, setting = _stage(bench, shape, num_iterations=2)

        def ours(stage=stage, signal=signal, gradient=gradient) -> None:
            torch.autograd.grad(stage.encode(signal), (signal, stage.dictionary), gradient)

        times = bench.pair(ours, bare_convolutions(stage, signal, gradient))
        figures = {"ours of theirs": 1 / times["ratio"]}
        rows.append(
            Row("stage / convolutions", setting, **times, goal=1 / 1.08 if shape[0] >= 64 else None, figures=figures)
        )
    return rows


def reconstruction(bench: Bench) -> list[Row]:
    """Images a second, encoded and decoded, against autoencoders of diffusers with random weights."""
    model = CtrlCscModel(CtrlCscConfig(**load_preset("cifar10")["model"] | _tiny(bench))).to(bench.device).eval()
    size = model.config.image_size
    small = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    small_kl = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    tiny = AutoencoderTiny(**small if bench.short else {})
    kl = AutoencoderKL(**STABLE_DIFFUSION | (small_kl if bench.short else {}))
    rows = []
    for rival in (tiny.to(bench.device).eval(), kl.to(bench.device).eval()):
        for batch_size in (1, 2) if bench.short else (1, 64):
            images = torch.rand(batch_size, 3, size, size, device=bench.device) * 2 - 1

            def run(autoencoder, images=images) -> None:
                with torch.inference_mode():
                    autoencoder(images)

            times = bench.pair(lambda r=run: r(model), lambda m=rival, r=run: r(m))
            figures = {"ours images/s": batch_size / times["ours_s"], "rival images/s": batch_size / times["rival_s"]}
            setting = f"{size} px, batch {batch_size}, {type(rival).__name__}"
            rows.append(Row("reconstruction", setting, **times, goal=1.0, figures=figures))
    return rows


def image_loader(bench: Bench) -> list[Row]:
    """Images a second of the loader alone, at 64 pixels from ImageNet-sized JPEGs, in one process."""
    count = 8 if bench.short else 256
    with TemporaryDirectory() as folder:
        write_photographs(Path(folder), count)
        times = bench.pair(our_loader(Path(folder)), plain_loader(Path(folder)))
    figures = {"ours images/s": count / times["ours_s"], "rival images/s": count / times["rival_s"]}
    return [Row("loader", f"{WIDTH}x{HEIGHT} JPEGs to {IMAGE_SIZE} px", **times, goal=2.0, figures=figures)]


COMPARISONS: dict[str, Callable[[Bench], list[Row]]] = {
    "rates": coding_rates,
    "step": training_step,
    "stage": plain_stage,
    "bare": bare_stage,
    "reconstruction": reconstruction,
    "loader": image_loader,
    "throughput": throughput,
}


def _tiny(bench: Bench) -> dict[str, object]:
    """Fields of a model that any machine runs in a moment, where that is asked for."""
    sizes = {"kernel_sizes": [4, 4, 2], "strides": [2, 2, 1], "paddings": [1, 1, 0]}
    return {"image_size": 8, "latent_dim": 4, "stage_channels": [4, 4], **sizes} if bench.short else {}


def _stage(
    bench: Bench, shape: tuple[int, int, int], **options: float
) -> tuple[ConvolutionalSparseCoding, Tensor, Tensor, str]:
    """A stage, signals (n, C_signal, H, H), a gradient of the codes, and what the table says of them."""
    signal_channels, code_channels, side = shape
    batch_size = 4 if bench.short else 128
    stage = ConvolutionalSparseCoding(signal_channels, code_channels, 4, 2, 1, **options).to(bench.device)
    signal = torch.randn(batch_size, signal_channels, side, side, device=bench.device)
    signal = signal.contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(stage.encode(signal))
    setting = f"{signal_channels} -> {code_channels}, {side} px, batch {batch_size}, {stage.num_iterations} iterations"
    return stage, signal, gradient, setting


def _kept_for_backward(stage: ConvolutionalSparseCoding, signal: Tensor) -> int:
    """Bytes that an encoding keeps until its backward pass, its input included."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        codes = stage.encode(signal)  # held while counting, lest another tensor take its place
    kept.pop(stage.dictionary.data_ptr(), None)
    return sum(kept.values()) if codes.requires_grad else 0
