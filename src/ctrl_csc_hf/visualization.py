"""Pictures: grids of images, and the curves of a training run. Needs matplotlib for the curves alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 2  # pixels between the images of a grid
GROUP_GAP = 8  # pixels between two pairs of rows


def reconstruction_grid(
    originals: Tensor, reconstructions: Tensor, *, columns: int = 10, scale: int = 1
) -> Image.Image:
    """Originals above their reconstructions, in as many pairs of rows as they need.

    Args:
        originals, reconstructions: (n, 3, H, W), pixels in [-1, 1].
        columns: images a row.
        scale: side of a pixel in the picture, for small images.

    Raises:
        ValueError: if the shapes differ.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"reconstructions must have the shape of originals, {tuple(originals.shape)}, "
            f"got {tuple(reconstructions.shape)}"
        )
    pair = torch.stack([originals, reconstructions]).float().clamp(-1, 1)
    pixels = ((pair + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    count, height, width = pixels.shape[1:4]
    columns = min(columns, count)
    rows = -(-count // columns)
    pair_height = 2 * height + GAP + GROUP_GAP
    canvas = np.full((rows * pair_height - GROUP_GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index in range(count):
        left = index % columns * (width + GAP)
        for version in range(2):
            top = index // columns * pair_height + version * (height + GAP)
            canvas[top : top + height, left : left + width] = pixels[version, index]
    return Image.fromarray(canvas)


def training_curves(records: Sequence[Mapping[str, float]]) -> "Figure":
    """Rates, self-consistency and match, and PSNR against the step.

    Args:
        records: one a logged step: "step" and any of the figures of `ClosedLoopFigures` (of training batches) and
            of "held_out_psnr", "held_out_match".
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    panels = (
        ("nats", {"rate": "R(Z)", "reconstructed_rate": "R(Ẑ)"}),
        ("nats", {"rate_reduction": "ΔR(Z, Ẑ)"}),
        ("share of held-out images", {"held_out_match": "nearest latent is their own"}),
        ("dB", {"psnr": "PSNR, training batches", "held_out_psnr": "PSNR, held-out images"}),
    )
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (unit, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for key, label in lines.items():
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axes.set(xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
        if unit.startswith("share"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(0, 1)
    return figure
