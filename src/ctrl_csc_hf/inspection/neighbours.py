"""Samples beside the training images nearest to them, so that a copied one would be seen."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..latents.encoding import EncodedBatch
from .visualization import image_table

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
    return image_table(
        torch.stack([samples, nearest.by_pixels, nearest.by_latents]),
        row_labels=["sample", "nearest by pixels,\nRMS difference", "nearest by latents,\ncosine"],
        image_labels=[
            [""] * len(samples),
            [f"{difference:.2f}" for difference in nearest.pixel_distances],
            [f"{cosine:.2f}" for cosine in nearest.cosines],
        ],
    )


__all__ = ["NearestImages", "nearest_images", "neighbours_figure"]
