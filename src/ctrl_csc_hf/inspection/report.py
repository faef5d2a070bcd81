"""What `ctrl-csc inspect` shows of a model, picture by picture with captions, and all of it as one HTML page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..metrics import peak_signal_to_noise_ratio
from ..models.modeling_ctrl_csc import CtrlCscModel
from . import anatomy
from .visualization import SHARING, atom_atlas, code_maps, correlation_map, image_table, region_maps, singular_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.01, 0.05, 0.2, 0.5, 1.0)  # of the codes that are not zero, from which an image is rebuilt
SHOWN_ATOMS = 6  # whose contributions are drawn
DIRECTIONS = 4  # that are walked
ANGLES = (-75, -50, -25, 0, 25, 50, 75)  # degrees
MAX_CLASSES = 10  # with a curve and walks of their own, the largest
SMALLEST_CLASS = 5  # images, of these
MAX_CORRELATED = 300  # images in the heat map: each is a row of pixels
ALL = "all images"
RESOLUTION = 100  # dots per inch

STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem; color: #222 }
h2 { margin-top: 3rem; border-bottom: 1px solid #ccc } h3 { margin: 2rem 0 .5rem }
figure { margin: 0 } .picture { overflow-x: auto } img { display: block; width: 100%; min-width: 32rem }
figcaption { color: #444; margin-top: .5rem } td { padding: .1rem 1rem .1rem 0; vertical-align: top }
"""


@dataclass(frozen=True)
class Picture:
    """
    name: of its file, without the ending.
    title: a heading.
    caption: how to read it.
    """

    name: str
    title: str
    caption: str
    figure: "Figure"

    @cached_property
    def png(self) -> bytes:
        """As a file, with 128 colours, which takes far less room."""
        drawn, file = io.BytesIO(), io.BytesIO()
        self.figure.savefig(drawn, format="png", dpi=RESOLUTION)
        Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return file.getvalue()


@torch.no_grad()
def dictionary_pictures(model: CtrlCscModel, images: Tensor | None) -> list[Picture]:
    """Of every stage the decoder's atoms in pixels.

    Args:
        images: (n, 3, image_size, image_size), on which their use is measured; without them they are sorted by norm.
    """
    uses: Sequence[Tensor | None] = [None] * anatomy.num_stages(model.decoder)
    order = "sorted by their norm in pixels"
    if images is not None:
        uses = anatomy.atom_use(model.decoder, _encode(model, images))
        order = f"sorted by their share of the decoder's code energy on {_count(len(images), 'image')}"
    pictures = []
    for stage, use in enumerate(uses, 1):
        atoms = anatomy.atoms_in_pixels(model.decoder, stage)
        carried = "" if stage == 1 else " carried down to pixels through the dictionaries alone, without norm and relu,"
        side = atoms.shape[-1]
        caption = (
            f"The decoder's atoms of stage {stage}, each {side} x {side} pixels,{carried} {order}: row by row from the "
            "top left. Each is scaled for itself; grey is zero. Below, how unequally they are used."
        )
        if stage == len(uses):
            caption += " This is the last stage: each atom stands for one number of the latents."
        pictures.append(
            Picture(
                f"atoms_{stage}", f"Atoms of stage {stage}", caption, atom_atlas(atoms, use, title=f"stage {stage}")
            )
        )
    return pictures


@torch.no_grad()
def image_pictures(model: CtrlCscModel, image: Tensor, name: str) -> list[Picture]:
    """Of one image: the codes, what they rebuild, what each atom adds, and where.

    Args:
        image: (3, image_size, image_size).
        name: of the image, in names of files and titles.
    """
    encoder, decoder = model.encoder, model.decoder
    encoded = model.encode(image[None], output_codes=True)
    assert encoded.codes is not None
    reconstruction = model.decode(encoded.latents).reconstruction[0]
    psnr = peak_signal_to_noise_ratio(image[None], reconstruction[None]).item()
    last = anatomy.num_stages(decoder)
    decoder_atoms = [anatomy.atoms_in_pixels(decoder, stage) for stage in range(1, last + 1)]
    summands = [anatomy.contributions(decoder, encoded.latents, stage) for stage in range(1, last + 1)]

    maps = code_maps(
        image,
        [codes[0] for codes in encoded.codes],
        [anatomy.atoms_in_pixels(encoder, stage) for stage in range(1, last)],
    )
    return [
        Picture(
            f"{name}_codes",
            f"{name}: codes",
            "For each stage the encoder's atoms that hold most of the code energy of this image (their share stands "
            "below), and above them the atom in pixels. Blue is where an atom is active; white is zero. On the left "
            "the image, and the sum of the codes of all atoms.",
            maps,
        ),
        _rebuilt(model, image, (*encoded.codes, encoded.latents[:, :, None, None]), name),
        Picture(
            f"{name}_regions",
            f"{name}: which atoms explain which region",
            "For each stage of the decoder the regions in which one atom contributes more to the reconstruction than "
            "any other atom of its stage. The atoms that lead the largest regions have colours, as their frames show; "
            "below each, its number and the share of the image where it leads; light grey is led by others.",
            region_maps(reconstruction, [parts for parts, _ in summands], decoder_atoms),
        ),
        Picture(
            f"{name}_contributions",
            f"{name}: what each atom adds",
            f"For each stage of the decoder the {SHOWN_ATOMS} atoms that add most to the reconstruction "
            f"({psnr:.1f} dB), with the relus and norms of this image frozen: then everything adds up. Left to right: "
            "these atoms, times the factor on the left; all other atoms together; the bias, which needs no code; and "
            "the sum of all, which is the reconstruction before tanh. Grey is zero; what exceeds [-1, 1] is clipped.",
            _contributions(summands),
        ),
    ]


@torch.no_grad()
def latent_pictures(
    model: CtrlCscModel, images: Tensor, labels: Tensor | None = None, class_names: Sequence[str] | None = None
) -> list[Picture]:
    """Of a set of images: singular values, correlations, and walks along principal directions, by class.

    Args:
        images: (n, 3, image_size, image_size), at least 2.
        labels: (n,), integers.
        class_names: of label 0, 1, ...; by default the numbers.

    Raises:
        ValueError: for fewer than 2 images or 2 latent dimensions, and for latents whose mean is zero.
    """
    latents = _encode(model, images)
    if min(latents.shape) < 2:
        raise ValueError(
            f"images must be at least 2, of at least 2 latent dimensions, got latents {tuple(latents.shape)}"
        )
    sets = {ALL: latents}
    if labels is not None:
        classes, counts = labels.unique(return_counts=True)
        for position in counts.argsort(descending=True, stable=True)[:MAX_CLASSES].sort().values.tolist():
            if counts[position] >= SMALLEST_CLASS:
                label = int(classes[position])
                sets[str(label) if class_names is None else class_names[label]] = latents[labels == label]
    cosines = (latents @ latents.T).abs()
    pairs = ~torch.eye(len(latents), dtype=torch.bool)
    correlation = f"Between two different images it is {cosines[pairs].mean():.3f} on average"
    if labels is not None:
        same = labels[:, None] == labels
        correlation += (
            f", {_mean(cosines[pairs & same])} within classes and {_mean(cosines[~same])} between different ones"
        )
    isotropic = min(latents.shape) ** -0.5
    return [
        Picture(
            "latents_singular_values",
            "Singular values of the latents",
            "Of all latents and of each class. Their squares add up to 1: a steep curve means that few directions hold "
            f"the set, a flat one that all are used alike (at {isotropic:.3f}, had those of all images no preference). "
            "A set of n images has no more than n.",
            singular_values(sets),
        ),
        Picture(
            "latents_correlation",
            f"Correlation of {_count(min(MAX_CORRELATED, len(latents)), 'image')}",
            "|Zᵀ Z|: how much the latents of two images point along one line, images "
            f"{'in their order' if labels is None else 'ordered by class'}. {correlation}; on the diagonal, where an "
            "image meets itself, it is 1. Classes with subspaces of their own show as bright squares on the diagonal.",
            correlation_map(
                latents[:MAX_CORRELATED], None if labels is None else labels[:MAX_CORRELATED], class_names=class_names
            ),
        ),
        *(_walks(model, name, chosen) for name, chosen in sets.items()),
    ]


def html_report(model: CtrlCscModel, name: str, chapters: dict[str, list[Picture]]) -> str:
    """One page that needs no other file.

    Args:
        name: of the model.
        chapters: pictures by the heading above them.
    """
    config = model.config
    sizes = config.signal_sizes
    stages = "; ".join(
        f"{stage}: {atoms} atoms of {kernel} x {kernel} at {size} x {size} places"
        for stage, ((_, atoms, kernel, *_), size) in enumerate(zip(config.stage_shapes, sizes[1:], strict=True), 1)
    )
    facts = {
        "Images": f"{sizes[0]} x {sizes[0]} pixels, coded by {config.latent_dim} numbers",
        "Stages": stages,
        "Sparse coding": "; ".join(
            f"{stage}: λ = {sparsity:g}, {_count(steps, 'step')} of FISTA"
            for stage, (sparsity, steps) in enumerate(
                zip(config.of_stages("sparsity"), config.of_stages("num_iterations"), strict=True), 1
            )
        ),
        "Dictionaries": f"both halves {SHARING[config.share_dictionaries]}",
        "Parameters": f"{model.num_parameters():,}",
    }
    rows = "".join(f"<tr><td>{key}</td><td>{escape(value)}</td></tr>\n" for key, value in facts.items())
    contents = " · ".join(f'<a href="#{index}">{escape(title)}</a>' for index, title in enumerate(chapters))
    body = "".join(
        f'<h2 id="{index}">{escape(title)}</h2>\n' + "".join(_html(picture) for picture in pictures)
        for index, (title, pictures) in enumerate(chapters.items())
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Inside {escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Inside {escape(name)}</h1>\n<p>An image as a multi-stage sparse deconvolution: the encoder finds codes "
        "stage by stage and ends at the latents; the decoder makes an image of these alone.</p>\n"
        f"<table>\n{rows}</table>\n<p>{contents}</p>\n{body}</body>\n</html>\n"
    )


def _html(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<h3>{escape(picture.title)}</h3>\n<figure>\n<div class="picture"><img alt="{escape(picture.title)}" '
        f'src="data:image/png;base64,{data}"></div>\n<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n'
    )


def _encode(model: CtrlCscModel, images: Tensor) -> Tensor:
    return torch.cat([model.encode(batch).latents for batch in images.split(anatomy.IMAGES_AT_ONCE)])


def _rebuilt(model: CtrlCscModel, image: Tensor, all_codes: Sequence[Tensor], name: str) -> Picture:
    tables, labels = [], []
    for stage, codes in enumerate(all_codes, 1):
        active = int((codes != 0).sum())
        counts = [max(1, round(share * active)) for share in SHARES]
        kept = torch.cat([anatomy.keep_largest(codes, count) for count in counts])
        rebuilt = anatomy.decode_from(model.decoder, kept, stage)
        psnr = peak_signal_to_noise_ratio(image.expand_as(rebuilt), rebuilt)
        tables.append(torch.cat([image[None], rebuilt]))
        labels.append(["", *(f"{count:,}: {value:.1f} dB" for count, value in zip(counts, psnr.tolist(), strict=True))])
    *stages, last = (f"stage {stage}" for stage in range(1, len(all_codes) + 1))
    shared = model.config.share_dictionaries is True
    return Picture(
        f"{name}_rebuilt",
        f"{name}: rebuilt from each stage alone",
        "Each row takes the encoder's codes of one stage, and the decoder's stages from there on; the last row takes "
        "the latents, so its last picture is the reconstruction. From left to right, the largest codes alone, by their "
        "share of those that are not zero, and all of them. Below, how many codes that are, and the PSNR."
        + ("" if shared else " The decoder has dictionaries of its own, which training need not make the encoder's."),
        image_table(
            torch.stack(tables),
            row_labels=[*stages, f"{last}, latents"],
            column_labels=["image", *(f"{share:.0%}" for share in SHARES)],
            image_labels=labels,
        ),
    )


def _contributions(summands: Sequence[tuple[Tensor, Tensor]]) -> "Figure":
    tables, labels, names = [], [], []
    shown = min(SHOWN_ATOMS, *(len(parts) for parts, _ in summands))
    for stage, (parts, bias) in enumerate(summands, 1):
        order = parts.square().sum(dim=(1, 2, 3)).argsort(descending=True)
        leading, others = parts[order[:shown]], parts[order[shown:]].sum(dim=0)
        factor = 1 / leading.abs().max().clamp(min=1e-12)
        tables.append(torch.stack([*(leading * factor), others, bias, parts.sum(dim=0) + bias]))
        labels.append([*(f"atom {index}" for index in order[:shown].tolist()), "others", "bias", "sum"])
        names.append(f"stage {stage}\natoms ×{factor:.1f}")
    return image_table(torch.stack(tables), row_labels=names, image_labels=labels)


def _walks(model: CtrlCscModel, name: str, latents: Tensor) -> Picture:
    mean, directions, shares = anatomy.principal_directions(latents, min(DIRECTIONS, min(latents.shape) - 1))
    angles = torch.tensor(ANGLES).deg2rad()
    rows = torch.stack([model.decode(anatomy.walk(mean, v, angles)).reconstruction for v in directions])
    whose = ALL if name == ALL else f"the class {name}"
    return Picture(
        f"latents_walk_{name}",
        f"Walks through {whose}",
        f"In the middle the decoded mean direction of {whose} (n = {len(latents):,}); to the left and right, along the "
        "sphere, each of the directions in which the latents spread most around it, with its share of that spread.",
        image_table(
            rows,
            row_labels=[f"{index}: {share:.1%}" for index, share in enumerate(shares.tolist(), 1)],
            column_labels=[f"{angle}°" for angle in ANGLES],
        ),
    )


def _mean(values: Tensor) -> str:
    return f"{values.mean():.3f}" if len(values) else "none"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
