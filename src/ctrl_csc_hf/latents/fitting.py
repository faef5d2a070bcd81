"""A `LatentSampler` for the latents of a training set, in one pass over them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..models.sampling import LatentSampler
from .encoding import EncodedBatch
from .segmentation import segment
from .subspace import ClassMoments

RESERVOIR = 10_000  # latents that the groups are sought in


def fit_sampler(
    batches: Iterable[EncodedBatch],
    *,
    distortion: float = 0.5,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> LatentSampler:
    """A component for each class, or, of batches without labels, for each group that the coding length finds.

    Classes are counted, averaged and their second moments summed over all latents. Groups are sought by `segment` in a
    reservoir of at most 10,000 latents, of which any is as likely to be there as any other; a group of a single latent
    is left out.

    Args:
        batches: of latents, all with labels or none, as `encode_dataset` gives them.
        distortion: eps^2 of the coding length; classes need none.
        seed: of the reservoir and of the first groups.
        class_names: what an error calls the classes; by default their numbers.

    Raises:
        ValueError: for no latents, labels in some batches only, a class of a single image, and groups that are all of a
            single latent.
    """
    moments, reservoir = ClassMoments(), _Reservoir(seed)
    for batch in batches:
        if batch.labels is None:
            reservoir.update(batch.latents)
        else:
            moments.update(batch.latents, batch.labels)
    labelled = len(moments.labels) > 0
    if labelled == (len(reservoir.latents) > 0):
        received = "both" if labelled else "no latents"
        raise ValueError(f"batches must hold latents, all with labels or all without, got {received}")
    if labelled:
        if small := moments.labels[moments.counts < 2].tolist():
            names = [class_names[label] if class_names else label for label in small]
            raise ValueError(
                f"batches must hold at least 2 images of each class, got 1 of {names}: leave these classes out, give "
                "them more images, or do without labels (--label_column none)"
            )
        return LatentSampler.of_gaussians(moments.counts, moments.means, moments.covariances(), moments.labels)
    groups = segment(reservoir.latents, distortion=distortion, seed=seed)
    large = groups.bincount()[groups] > 1
    if not large.any():
        raise ValueError(f"batches must hold groups of latents, got {len(groups)} latents each of its own")
    moments.update(reservoir.latents[large], groups[large])
    return LatentSampler.of_gaussians(moments.counts, moments.means, moments.covariances())


class _Reservoir:
    """At most RESERVOIR latents of a stream: those that drew the largest random numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.keys, self.latents = torch.empty(0), torch.empty(0, 0)

    def update(self, latents: Tensor) -> None:
        keys = torch.cat([self.keys, torch.rand(len(latents), generator=self.generator)])
        latents = torch.cat([self.latents, latents]) if len(self.latents) else latents
        kept = keys.topk(min(RESERVOIR, len(keys))).indices
        self.keys, self.latents = keys[kept], latents[kept]


__all__ = ["fit_sampler"]
