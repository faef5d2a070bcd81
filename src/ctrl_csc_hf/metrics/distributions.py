"""Two sets of images against each other, through a network's features: Fréchet and kernel distance, Inception score."""

import math
import random

import torch
from torch import Tensor

from .statistic import Statistic, check_matrix, check_same_shape

SAMPLE_SIZE = 5000  # pairs of features that KernelDistance keeps
CHUNK = 1000  # rows of a block of kernel values


class FeatureMoments:
    """Count, mean and covariance of features, summed batch by batch in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds features (n, dim)."""
        features = features.detach().cpu().double()
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


class FeaturePairStatistic(Statistic):
    """A figure of the features of images and of those of their reconstructions, (n, dim) each."""

    def __init__(self) -> None:
        super().__init__()
        self.dim: int | None = None  # of the first batch

    def _check(self, features: Tensor, reconstructed_features: Tensor) -> None:
        check_matrix("features", features, self.dim)
        check_same_shape("reconstructed_features", reconstructed_features, "features", features)
        self.dim = features.shape[1]


class FrechetDistance(FeaturePairStatistic):
    """`frechet_distance` of Gaussians fitted to the features of images and of their reconstructions; 0 if they agree.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017; the FID where the features are those
    of `InceptionFeatures`. It keeps count, mean and second moment: 16 dim^2 bytes for both sets.
    """

    def update(self, features: Tensor, reconstructed_features: Tensor) -> None:
        """Adds features (n, dim) of images and of their reconstructions; ValueError for other or unequal shapes."""
        first = self.dim is None
        self._check(features, reconstructed_features)
        if first:
            self.moments = FeatureMoments(features.shape[1]), FeatureMoments(features.shape[1])
        for moments, batch in zip(self.moments, (features, reconstructed_features), strict=True):
            moments.update(batch)
        self.count += len(features)

    def compute(self) -> dict[str, float]:
        """The distance, >= 0; ValueError where fewer than two images were added."""
        self._require(2)
        return {"frechet_distance": frechet_distance(*self.moments)}


class KernelDistance(FeaturePairStatistic):
    """`kernel_distance`: the squared maximum mean discrepancy of the features, kernel k(x, y) = (x^T y / dim + 1)^3.

    Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", ICLR 2018, section 4.2; the KID where the features
    are those of `InceptionFeatures`. The estimate is unbiased, hence negative at times. It leaves the pairs of an image
    and its own reconstruction out of the mean of k(x, xh), as out of those of k(x, x) and k(xh, xh): these two are not
    independent (the U-statistic of Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, equation 4).

    It is exact for up to 5,000 images, in whatever order. Of more, 5,000 enter, a uniform sample by a generator of
    fixed seed ("algorithm R", Vitter 1985), which depends on the order of the images but not on the batches. That is
    40,000 dim bytes for both sets: 10 MB for dim 256, 82 MB for Inception's 2,048.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)

    def update(self, features: Tensor, reconstructed_features: Tensor) -> None:
        """Adds features (n, dim) of images and of their reconstructions; ValueError for other or unequal shapes."""
        first = self.dim is None
        self._check(features, reconstructed_features)
        if first:
            self.sample = torch.empty(2, SAMPLE_SIZE, features.shape[1])
        batch = torch.stack([features, reconstructed_features]).detach().cpu().float()
        for row in range(len(features)):
            place = self.count if self.count < SAMPLE_SIZE else self.random.randrange(self.count + 1)
            if place < SAMPLE_SIZE:
                self.sample[:, place] = batch[:, row]
            self.count += 1

    def compute(self) -> dict[str, float]:
        """The estimate, in units of the kernel; ValueError where fewer than two images were added."""
        self._require(2)
        x, xh = self.sample[:, : self.count]
        total = _kernel_sum(x, x) + _kernel_sum(xh, xh) - 2 * _kernel_sum(x, xh)
        return {"kernel_distance": total / (len(x) * (len(x) - 1))}


def _kernel_sum(first: Tensor, second: Tensor) -> float:
    """The sum of the cubic kernel over all pairs of rows of different index, in float64 block by block."""
    total = 0.0
    for i, rows in enumerate(first.split(CHUNK)):
        for j, columns in enumerate(second.split(CHUNK)):
            kernel = (rows.double() @ columns.double().T / first.shape[1] + 1).pow(3)
            total += kernel.sum().item() - (kernel.trace().item() if i == j else 0.0)
    return total


class InceptionScore(Statistic):
    """`inception_score`: exp of the mean of KL(p(y | x) || p(y)) over images x, from 1 to the number of classes.

    Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016, section 4, on all the images at once (there:
    the mean over ten splits, whose p(y) are rougher and whose score is therefore lower). It is a figure of one set, so
    give that of the images beside that of their reconstructions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sum = torch.zeros(0, dtype=torch.float64)  # of p(y | x)
        self.negative_entropy = 0.0  # the sum of p log p

    def update(self, logits: Tensor) -> None:
        """Adds a classifier's logits (n, num_classes); ValueError for another shape."""
        check_matrix("logits", logits, self.sum.numel() or None)
        log_p = logits.detach().cpu().double().log_softmax(dim=1)
        p = log_p.exp()
        self.sum = self.sum + p.sum(dim=0) if self.count else p.sum(dim=0)
        self.negative_entropy += torch.special.xlogy(p, p).sum().item()
        self.count += len(logits)

    def compute(self) -> dict[str, float]:
        """The score; ValueError where no image was added."""
        self._require()
        marginal = self.sum / self.count
        divergence = self.negative_entropy / self.count - torch.special.xlogy(marginal, marginal).sum().item()
        return {"inception_score": math.exp(divergence)}
