"""Samples beside the training images nearest to them, so that a copied one would be seen."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .encoding import EncodedBatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class NearestImages:
    """
    by_pixels: (n, 3, H, W), in [-1, 1]: of each sample the image with the smallest root-mean-square difference.
    pixel_distances: (n,), these differences, of pixels in [-1, 1].
    by_latents: (n, 3, H, W), in [-1, 1]: the image whose latent has the largest cosine.
    cosines: (n,), these cosines.
    """

    by_pixels: Tensor
    pixel_distances: Tensor
    by_latents: Tensor
    cosines: Tensor


def nearest_images(samples: Tensor, latents: Tensor, batches: Iterable[EncodedBatch]) -> NearestImages:
    """The nearest of a training set's images to each sample, in one pass over them.

    Args:
        samples: (n, 3, H, W), pixels in [-1, 1].
        latents: (n, d), that they were decoded from.
        batches: the training set, as `encode_dataset` gives it.

    Raises:
        ValueError: for no batches, and for samples of another shape than the images.
    """
    by_pixels, by_latents = torch.empty_like(samples), torch.empty_like(samples)
    distances = torch.full((len(samples),), float("inf"))
    cosines = torch.full((len(samples),), float("-inf"))
    for batch in batches:
        if batch.pixel_values.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"samples must have shape (n, {', '.join(map(str, batch.pixel_values.shape[1:]))}), "
                f"got {tuple(samples.shape)}"
            )
        values, indices = torch.cdist(samples.flatten(1), batch.pixel_values.flatten(1)).min(dim=1)
        nearer = values < distances
        distances[nearer], by_pixels[nearer] = values[nearer], batch.pixel_values[indices[nearer]]
        values, indices = (latents @ batch.latents.T).max(dim=1)
        nearer = values > cosines
        cosines[nearer], by_latents[nearer] = values[nearer], batch.pixel_values[indices[nearer]]
    if distances.isinf().any():
        raise ValueError("batches must hold at least one image, got none")
    return NearestImages(by_pixels, distances / samples[0].numel() ** 0.5, by_latents, cosines)


def neighbours_figure(samples: Tensor, nearest: NearestImages) -> "Figure":
    """Samples (n, 3, H, W), a column each, above their nearest images by pixels and by latents, with both figures."""
    from matplotlib.figure import Figure

    rows = (
        ("sample", samples, [""] * len(samples)),
        (
            "nearest by pixels,\nRMS difference",
            nearest.by_pixels,
            [f"{rms:.2f}" for rms in nearest.pixel_distances],
        ),
        ("nearest by latents,\ncosine", nearest.by_latents, [f"{cosine:.2f}" for cosine in nearest.cosines]),
    )
    figure = Figure(figsize=(1.6 + 0.9 * len(samples), 3.5), layout="constrained")
    grid = figure.subplots(3, len(samples), squeeze=False)
    for (title, images, captions), axes_row in zip(rows, grid, strict=True):
        for axes, image, caption in zip(axes_row, images, captions, strict=True):
            axes.imshow((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(caption, fontsize=8, labelpad=2)
            axes.spines[:].set_visible(False)
        axes_row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return figure


__all__ = ["NearestImages", "nearest_images", "neighbours_figure"]
