"""Figures of merit of reconstructions and latents, batch by batch. Pixels are in [-1, 1].

Each class adds batches with `update` and gives its figures with `compute`.
"""

from .distributions import FeatureMoments, FrechetDistance, InceptionScore, KernelDistance, frechet_distance
from .features import InceptionFeatures, VisionFeatures
from .images import (
    LearnedPerceptualSimilarity,
    PeakSignalToNoiseRatio,
    StructuralSimilarity,
    peak_signal_to_noise_ratio,
)
from .latents import ClosedLoopConsistency, CodeSparsity, LatentProbe, LatentSpectrum, nearest_latent_match

__all__ = [
    "ClosedLoopConsistency",
    "CodeSparsity",
    "FeatureMoments",
    "FrechetDistance",
    "InceptionFeatures",
    "InceptionScore",
    "KernelDistance",
    "LatentProbe",
    "LatentSpectrum",
    "LearnedPerceptualSimilarity",
    "PeakSignalToNoiseRatio",
    "StructuralSimilarity",
    "VisionFeatures",
    "frechet_distance",
    "nearest_latent_match",
    "peak_signal_to_noise_ratio",
]
