"""Figures of merit of reconstructions and latents. Pixels are in [-1, 1]."""

import math

import torch
from torch import Tensor


def peak_signal_to_noise_ratio(images: Tensor, reconstructions: Tensor) -> Tensor:
    """PSNR of each image in dB, peak to peak 2: (n, C, H, W) pixels in [-1, 1], clipped -> (n,)."""
    error = (images.float() - reconstructions.float().clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


def nearest_latent_match(latents: Tensor, reconstructed_latents: Tensor, chunk: int = 1024) -> float:
    """Share of the reconstructions whose nearest latent, by cosine, is their own original's: z, zh (n, d) -> [0, 1]."""
    z = torch.nn.functional.normalize(latents.float(), dim=1)
    zh = torch.nn.functional.normalize(reconstructed_latents.float(), dim=1)
    hits = 0
    for start in range(0, len(zh), chunk):
        nearest = (zh[start : start + chunk] @ z.T).argmax(dim=1)
        hits += int((nearest == torch.arange(start, start + len(nearest), device=z.device)).sum())
    return hits / len(zh)


class FeatureMoments:
    """Count, mean and covariance of features, summed batch by batch in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds features (n, dim)."""
        features = features.detach().double().cpu()
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer += features.T @ features

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate, (dim, dim)."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """Fréchet distance of two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017. The trace of the root is the sum of
    the singular values of C1^(1/2) C2^(1/2), which stays real and accurate where the covariances are singular.
    """
    roots = []
    for moments in (first, second):
        values, vectors = torch.linalg.eigh(moments.covariance)
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    trace = first.covariance.trace() + second.covariance.trace() - 2 * cross
    distance = float((first.mean - second.mean).square().sum() + trace)
    return max(distance, 0.0) if math.isfinite(distance) else distance


__all__ = ["FeatureMoments", "frechet_distance", "nearest_latent_match", "peak_signal_to_noise_ratio"]
