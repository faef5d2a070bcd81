"""Pictures: grids of images, and the curves of a training run. Needs matplotlib for the curves alone."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .configuration_ctrl_csc import CtrlCscConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 2  # pixels between the images of a grid
GROUP_GAP = 8  # pixels between two pairs of rows
ENCODER_COLOR, DECODER_COLOR = "#1f5fa8", "#b5541c"


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


def architecture_figure(config: CtrlCscConfig) -> Image.Image:
    """What an image goes through, with all shapes: encoder f above, from left to right, decoder g below, backwards."""
    last = len(config.stage_channels)
    shapes = list(zip([config.num_channels, *config.stage_channels], config.signal_sizes, strict=False))
    column, row, square = 200, 175, 84  # pixels; the square is an image's
    picture = Image.new("RGB", (column * (last + 1) + square + 60, 2 * row + 60), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    sharing = "share the dictionaries A" if config.share_dictionaries else "have dictionaries A of their own"
    norm = "norm" if config.decoder_normalization == "batch_norm" else "inverse norm"

    def write(x: float, y: float, text: str, color: str = "black", anchor: str = "ma") -> None:
        draw.multiline_text((x, y), text, fill=color, font=font, anchor=anchor, align="center", spacing=3)

    for top, color, title in ((20, ENCODER_COLOR, "encoder f"), (20 + row, DECODER_COLOR, "decoder g")):
        encodes = color == ENCODER_COLOR
        write(20, top, title, color, "la")
        middle = top + 75
        for index, (channels, side) in enumerate([*shapes, (config.latent_dim, 1)]):
            centre = 30 + square // 2 + column * index
            half = round(square / 2 * (1 + math.log2(side)) / (1 + math.log2(config.image_size)))
            draw.rectangle((centre - half, middle - half, centre + half, middle + half), outline=color, width=3)
            name = {0: "image x" if encodes else "xh = g(z)", last + 1: "z"}.get(index, f"codes {index}")
            write(centre, middle + square // 2 + 6, f"{name}\n{channels} x {side} x {side}")
            if index <= last:
                left, right = centre + square // 2 + 6, centre + column - square // 2 - 6
                tip, tail = (right, -8) if encodes else (left, 8)
                draw.line((left, middle, right, middle), fill=color, width=2)
                draw.polygon([(tip, middle), (tip + tail, middle - 5), (tip + tail, middle + 5)], fill=color)
                forward = [*(["norm"] if index else []), "A*, |z| = 1" if index == last else "sparse coding"]
                backward = ["A", *(["tanh"] if index == 0 else [norm, "relu"])]
                write((left + right) / 2, middle - 6, "\n".join(forward if encodes else backward), color, "md")
                kernel, stride = config.kernel_sizes[index], config.strides[index]
                write((left + right) / 2, middle + 8, f"{kernel}x{kernel}, /{stride}")
    write(picture.width / 2, picture.height - 34, f"f and g {sharing}. The game compares z with zh = f(xh).")
    return picture


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
