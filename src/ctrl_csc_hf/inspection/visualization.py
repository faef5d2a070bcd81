"""Pictures: grids of images, the curves of a training run, and what is inside a model. Needs matplotlib for figures.

Images are (3, H, W), pixels in [-1, 1]. What a figure of the inside shows comes from `anatomy`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..models.configuration_ctrl_csc import CtrlCscConfig
from .anatomy import energy_shares, leading_atoms, spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARING = {
    True: "share the dictionaries A",
    "last": "share the last stage's dictionary A",
    False: "have dictionaries A of their own",
}
GAP = 2  # pixels between the images of a grid
GROUP_GAP = 8  # pixels between two pairs of rows
ENCODER_COLOR, DECODER_COLOR = "#1f5fa8", "#b5541c"
WIDTH = 7.2  # inches, of the figures of the inside: wide enough for 9 tiles, and text that a phone still shows
SMALL = 7  # points, of text at tiles
ATLAS = 128  # atoms
MAPS = 7  # of codes, a stage
REGION_COLORS = ("#e41a1c", "#377eb8", "#4daf4a", "#984ea3", "#ff7f00")


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
    sharing = SHARING[config.share_dictionaries]

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
                backward = ["A", *(["tanh"] if index == 0 else ["norm", "relu"])]
                write((left + right) / 2, middle - 6, "\n".join(forward if encodes else backward), color, "md")
                kernel, stride = config.kernel_sizes[index], config.strides[index]
                write((left + right) / 2, middle + 8, f"{kernel}x{kernel}, /{stride}")
    note = f"f and g {sharing}. The game compares what f makes of x and of xh."
    write(picture.width / 2, picture.height - 34, note)
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
            axes.set_ylim(0, 1.04)  # 1 is not hidden by the frame
    return figure


def atom_atlas(atoms: Tensor, use: Tensor | None = None, *, title: str) -> "Figure":
    """Atoms in pixels, row by row from the most used on, and the curve of the use of all.

    Each atom is scaled by its largest magnitude; grey is zero.

    Args:
        atoms: (atoms, 3, a, a), of `anatomy.atoms_in_pixels`.
        use: (atoms,), shares of the code energy, of `anatomy.atom_use`; without it atoms are sorted by norm.
        title: of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    measure = atoms.flatten(1).norm(dim=1) if use is None else use
    order = measure.argsort(descending=True)
    shown = atoms[order[:ATLAS]]
    columns = min(16, len(shown))
    side = atoms.shape[-1] + 1
    rows = math.ceil(len(shown) / columns)
    sheet = np.ones((rows * side - 1, columns * side - 1, 3))
    for index, picture in enumerate(_scaled(shown)):
        top, left = index // columns * side, index % columns * side
        sheet[top : top + side - 1, left : left + side - 1] = picture
    height = WIDTH * rows / columns
    figure = Figure(figsize=(WIDTH, height + 2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[height, 1.4])
    number = f"{len(atoms)} atoms" if len(shown) == len(atoms) else f"the first {len(shown)} of {len(atoms)} atoms"
    above.imshow(sheet, interpolation="nearest")
    above.set_title(f"{title}: {number}, {'largest norm' if use is None else 'most used'} first", fontsize=10)
    above.axis("off")
    below.plot(range(1, len(order) + 1), measure[order].tolist(), color=DECODER_COLOR)
    below.set(xlabel="atom, in this order", ylabel="norm in pixels" if use is None else "share of energy")
    if use is not None:
        below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_ylim(bottom=0)
    below.grid(alpha=0.3)
    return figure


def code_maps(image: Tensor, codes: Sequence[Tensor], atoms: Sequence[Tensor]) -> "Figure":
    """Of every stage the maps of the codes of one image, for the atoms that hold most of its code energy.

    Args:
        image: (3, H, W).
        codes: of every stage (atoms, h, w), non-negative.
        atoms: of every stage (atoms, 3, a, a), of `anatomy.atoms_in_pixels`; drawn above their maps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.25 * len(codes)), layout="constrained")
    parts = figure.subfigures(len(codes), 1, squeeze=False)[:, 0]
    for stage, (part, maps, pictures) in enumerate(zip(parts, codes, atoms, strict=True), 1):
        use = energy_shares(maps[None])
        channels, height, width = maps.shape
        active = (maps != 0).float().mean().item()
        part.suptitle(
            f"stage {stage}: {channels} atoms at {height} x {width} places, {active:.0%} of the codes are not zero",
            fontsize=9,
        )
        axes = part.subplots(2, MAPS + 1)
        for each in axes.flat:
            _bare(each)
        axes[0, 0].imshow(_to_hwc(image[None])[0])
        axes[0, 0].set_title("image", fontsize=SMALL)
        total = maps.sum(dim=0)
        axes[1, 0].imshow(total.cpu().numpy(), cmap="Greys", vmin=0)
        axes[1, 0].set_xlabel("all atoms", fontsize=SMALL)
        order = use.argsort(descending=True)[:MAPS].tolist()
        largest = max(maps[order].max().item(), 1e-12)
        for column, index in enumerate(order, 1):
            axes[0, column].imshow(_scaled(pictures[index : index + 1])[0])
            axes[0, column].set_title(f"atom {index}", fontsize=SMALL)
            drawn = axes[1, column].imshow(maps[index].cpu().numpy(), cmap="Blues", vmin=0, vmax=largest)
            axes[1, column].set_xlabel(f"{use[index]:.1%}", fontsize=SMALL)
        bar = part.colorbar(drawn, ax=axes, aspect=30, pad=0.01)
        bar.set_label("code", fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
    return figure


def region_maps(reconstruction: Tensor, contributions: Sequence[Tensor], atoms: Sequence[Tensor]) -> "Figure":
    """Of every stage, which atom contributes most around each pixel; those that lead most pixels have a colour.

    Args:
        reconstruction: (3, H, W).
        contributions: of every stage (atoms, 3, H, W), of `anatomy.contributions`.
        atoms: of every stage (atoms, 3, a, a), of the decoder.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.2 * len(contributions) + 0.2), layout="constrained")
    axes = figure.subplots(len(contributions), len(REGION_COLORS) + 2, squeeze=False)
    for row, (parts, pictures) in enumerate(zip(contributions, atoms, strict=True)):
        for each in axes[row]:
            _bare(each)
        leading = leading_atoms(parts)
        pixels = torch.bincount(leading.flatten(), minlength=len(parts))
        order = pixels.argsort(descending=True)[: min(len(REGION_COLORS), int((pixels > 0).sum()))].tolist()
        number = torch.full((len(parts),), len(REGION_COLORS))
        number[order] = torch.arange(len(order))
        axes[row, 0].imshow(_to_hwc(reconstruction[None])[0])
        axes[row, 0].set_ylabel(f"stage {row + 1}", fontsize=SMALL + 1)
        palette = ListedColormap([*REGION_COLORS, "#e6e6e6"])
        axes[row, 1].imshow(
            number[leading.cpu()].numpy(), cmap=palette, vmin=0, vmax=len(REGION_COLORS), interpolation="nearest"
        )
        for column, (index, color) in enumerate(zip(order, REGION_COLORS, strict=False), 2):
            axes[row, column].imshow(_scaled(pictures[index : index + 1])[0])
            axes[row, column].set_xlabel(f"{index}: {pixels[index] / leading.numel():.0%}", fontsize=SMALL)
            for spine in axes[row, column].spines.values():
                spine.set(visible=True, color=color, linewidth=3)
    axes[0, 0].set_title("reconstruction", fontsize=SMALL)
    axes[0, 1].set_title("regions", fontsize=SMALL)
    return figure


def image_table(
    images: Tensor,
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    image_labels: Sequence[Sequence[str]] = (),
) -> "Figure":
    """Images in rows and columns, with labels.

    Args:
        images: (rows, columns, 3, H, W).
        row_labels, column_labels: on the left and above.
        image_labels: of every row, below each image.
    """
    from matplotlib.figure import Figure

    rows, columns = images.shape[:2]
    tile = WIDTH / (columns + 0.5)
    figure = Figure(figsize=(WIDTH, (tile + (0.2 if image_labels else 0.05)) * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column, picture in enumerate(_to_hwc(images[row])):
            _bare(axes[row, column])
            axes[row, column].imshow(picture, interpolation="nearest")
            if image_labels:
                axes[row, column].set_xlabel(image_labels[row][column], fontsize=SMALL)
        axes[row, 0].set_ylabel(row_labels[row], fontsize=SMALL + 1)
    for column, label in enumerate(column_labels):
        axes[0, column].set_title(label, fontsize=SMALL + 1)
    return figure


def singular_values(sets: Mapping[str, Tensor]) -> "Figure":
    """Singular values of Z / sqrt(n) of sets of latents (n, d), such as all and each class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, latents) in enumerate(sets.items()):
        values = spectrum(latents).tolist()
        style = {"color": "black", "linewidth": 2} if index == 0 else {"linewidth": 1}
        axes.plot(range(1, len(values) + 1), values, label=f"{name}, n = {len(latents)}", **style)
    axes.set(xlabel="index", ylabel="singular value of Z / √n", xscale="log", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=SMALL + 1)
    return figure


def correlation_map(
    latents: Tensor,
    labels: Tensor | None = None,
    reconstructed_latents: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """|Z^T Z|, or |Z^T Zh|, as a heat map, images ordered by class; latents are columns of Z in this notation.

    Args:
        latents: (n, d), unit vectors; n of some hundreds, as every image is a row of the picture.
        labels: (n,), integers; without them images stay in their order.
        reconstructed_latents: zh (n, d); without them the latents are compared with themselves.
        class_names: of label 0, 1, ...; by default the numbers.

    Raises:
        ValueError: if labels or reconstructed latents do not belong to as many images.
    """
    from matplotlib.figure import Figure

    other = latents if reconstructed_latents is None else reconstructed_latents
    if other.shape != latents.shape:
        raise ValueError(
            f"reconstructed_latents must have the shape of latents, {tuple(latents.shape)}, got {tuple(other.shape)}"
        )
    if labels is not None and labels.shape != latents.shape[:1]:
        raise ValueError(f"labels must have shape ({len(latents)},), got {tuple(labels.shape)}")
    order = torch.arange(len(latents)) if labels is None else labels.cpu().argsort(stable=True)
    values = (latents[order].float() @ other[order].float().T).abs().cpu()
    name = "ZᵀZ" if reconstructed_latents is None else "ZᵀẐ"
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1)
    bar = figure.colorbar(drawn, label=f"|{name}|, the cosine's magnitude")
    bar.ax.tick_params(labelsize=SMALL + 1)
    if labels is None:
        axes.set(xlabel="image", ylabel="image")
        return figure
    classes, counts = labels.cpu().unique(return_counts=True)
    ends = counts.cumsum(dim=0)
    names = [str(label) if class_names is None else class_names[label] for label in classes.tolist()]
    middles = (ends - counts / 2 - 0.5).tolist()
    axes.set_xticks(middles, names, rotation=45, ha="right", fontsize=SMALL + 1)
    axes.set_yticks(middles, names, fontsize=SMALL + 1)
    for end in ends[:-1].tolist():
        axes.axhline(end - 0.5, color="white", linewidth=0.4)
        axes.axvline(end - 0.5, color="white", linewidth=0.4)
    return figure


def _to_hwc(images: Tensor) -> np.ndarray:
    """(n, 3, H, W) in [-1, 1] as (n, H, W, 3) in [0, 1]."""
    return (images.detach().float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()


def _scaled(atoms: Tensor) -> np.ndarray:
    """Atoms (n, 3, a, a), each divided by its largest magnitude, as images."""
    return _to_hwc(atoms / atoms.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12))


def _bare(axes: "Axes") -> None:
    """No ticks and no frame."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
