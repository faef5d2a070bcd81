"""A sampler of latents: a mixture of low-rank Gaussians, brought to the unit sphere.

    component k with probability pi_k;  s = mu_k + F_k^T e,  e ~ N(0, I_r);  z = s / |s|

F_k holds the principal directions of component k, scaled by their standard deviations. This file also runs from a Hub
repository, without the rest of the package, as the pipeline's optional component `sampler`.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"  # diffusers fetches a component's weights under this name alone

Generators = torch.Generator | list[torch.Generator] | None


class LatentSampler:
    """Draws latents; `CtrlCscPipeline.sample` decodes them. It stays on the CPU, in float32, wherever the model is.

    Args:
        weights: pi (K,), positive, sum 1.
        means: mu (K, d).
        factors: F_k (r_k, d) of each component. Kept in half precision.
        labels: class of each component (K,), integers; None where components are no classes.
    """

    def __init__(self, weights: Tensor, means: Tensor, factors: list[Tensor], labels: Tensor | None = None) -> None:
        self.weights = weights.float()
        self.means = means.float()
        self.factors = [factor.half() for factor in factors]
        self.labels = labels

    @classmethod
    def of_gaussians(
        cls, counts: Tensor, means: Tensor, covariances: Iterable[Tensor], labels: Tensor | None = None
    ) -> Self:
        """The sampler of groups of latents, each as probable as it is large and of the rank of `low_rank_factor`.

        Args:
            counts: latents in each group (K,).
            means: (K, d).
            covariances: (d, d) of each group.
            labels: class of each group (K,); None where they are no classes.

        Raises:
            ValueError: for a group of fewer than 2 latents: its samples would be a copy.
        """
        if counts.min() < 2:
            raise ValueError(f"counts must be at least 2, got {int(counts.min())} for component {int(counts.argmin())}")
        factors = [
            low_rank_factor(covariance, int(count)) for covariance, count in zip(covariances, counts, strict=True)
        ]
        return cls(counts / counts.sum(), means, factors, labels)

    def sample(
        self,
        num_images: int = 1,
        label: int | None = None,
        component: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Latents (num_images, d), unit vectors, float32 on the CPU.

        Args:
            num_images: how many.
            label: draws from the components of this class alone.
            component: draws from this component alone.
            generator: of the noise, on any device; or one an image, each of which then depends on its own alone.

        Raises:
            ValueError: for `num_images` below 1, a label or component that there is none of, both at once, and another
                number of generators than of images.
        """
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images!r}")
        allowed = self._allowed(label, component)
        if isinstance(generator, list):
            if len(generator) != num_images:
                raise ValueError(f"generator must be one or {num_images} generators, got {len(generator)}")
            return torch.cat([self.sample(1, label, component, one) for one in generator])
        device = "cpu" if generator is None else generator.device
        choice = torch.multinomial(self.weights[allowed].to(device), num_images, replacement=True, generator=generator)
        noise = torch.randn(num_images, max(self.ranks), generator=generator, device=device).cpu()
        drawn = allowed[choice.cpu()]
        latents = self.means[drawn]
        for index in drawn.unique().tolist():
            rows, factor = drawn == index, self.factors[index].float()
            latents[rows] += noise[rows, : len(factor)] @ factor
        return torch.nn.functional.normalize(latents, dim=1)

    @property
    def ranks(self) -> list[int]:
        return [len(factor) for factor in self.factors]

    def _allowed(self, label: int | None, component: int | None) -> Tensor:
        """Indices of the components to draw from."""
        if label is not None and component is not None:
            raise ValueError(f"label and component must not both be given, got {label!r} and {component!r}")
        if label is not None:
            if self.labels is None:
                raise ValueError(f"label must be None, as this sampler was fitted without labels, got {label!r}")
            allowed = (self.labels == label).nonzero().flatten()
            if len(allowed) == 0:
                raise ValueError(f"label must be one of {self.labels.unique().tolist()}, got {label!r}")
            return allowed
        if component is not None:
            if not 0 <= component < len(self.weights):
                raise ValueError(f"component must be in [0, {len(self.weights)}), got {component!r}")
            return torch.tensor([component])
        return torch.arange(len(self.weights))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors into the folder, which lies as `sampler` beside the model's weights.

        Raises:
            OSError: if it cannot be written; an older one is as it was.
        """
        tensors = {
            "weights": self.weights,
            "means": self.means,
            "factors": torch.cat(self.factors),
            "ranks": torch.tensor(self.ranks),
        }
        if self.labels is not None:
            tensors["labels"] = self.labels
        path = Path(folder) / WEIGHTS
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        try:
            save_file(tensors, unfinished)
            unfinished.replace(path)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written and is as it was: {error}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The sampler that `save_pretrained` wrote into this folder.

        Raises:
            OSError: if there is none, or a damaged one.
        """
        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise OSError(f"folder must hold a sampler as {WEIGHTS}, which `ctrl-csc fit-sampler` writes, got {folder}")
        try:
            tensors = load_file(path)
            factors = list(tensors["factors"].split(tensors["ranks"].tolist()))
            return cls(tensors["weights"], tensors["means"], factors, tensors.get("labels"))
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise OSError(f"{path} must be a sampler's file, but it is damaged or another's: {error}") from error


def low_rank_factor(covariance: Tensor, count: int) -> Tensor:
    """F (r, d): the principal directions that stand out of noise, scaled by their standard deviations.

    r is the number of eigenvalues above trace/d (1 + sqrt(d/n))^2, the largest that n latents without any preferred
    direction would show (Marchenko and Pastur, "Distribution of eigenvalues for some sets of random matrices", 1967);
    at least 1. So few latents give few directions, and no choice is left.

    Args:
        covariance: (d, d), of a group of latents.
        count: their number n.
    """
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    dim = len(variances)
    edge = variances.sum() / dim * (1 + math.sqrt(dim / count)) ** 2
    rank = max(1, int((variances > edge).sum()))
    return (directions[:, -rank:] * variances[-rank:].clamp(min=0).sqrt()).mT.flip(0)


__all__ = ["LatentSampler"]
