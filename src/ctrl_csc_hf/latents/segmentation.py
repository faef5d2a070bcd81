"""Groups in unlabelled latents, by the coding length: as many as make the whole shortest to code.

Ma, Derksen, Hong and Wright, "Segmentation of multivariate mixed data via lossy data coding and compression", PAMI
29(9), 2007. A group of n latents of mean mu and covariance C costs, in nats,

    L = (n + d)/2 logdet(I + d/eps^2 C) + d/2 log(1 + |mu|^2/eps^2):

the latents themselves (n R, with R the coding rate), the principal directions they are written in (d R), and the mean.
A segmentation costs the sum of L over its groups and, to say whose each latent is, sum_k n_k log(n/n_k).
"""

import torch
from torch import Tensor

from ..objectives.rate_reduction import LARGEST_ROUNDING, check_precision

CHUNK = 16  # pairs whose union is coded at once: (CHUNK, d, d) numbers
NUM_ITERATIONS = 10  # of k-means


def coding_length(counts: Tensor, means: Tensor, covariances: Tensor, *, distortion: float = 0.5) -> Tensor:
    """L of each of K groups, in nats: (K,), (K, d), (K, d, d) -> (K,). Covariances divide by n, not n - 1.

    Args:
        distortion: eps^2.

    Raises:
        ValueError: for a distortion that is too small for the covariances' dtype.
    """
    dim = means.shape[1]
    least = dim * covariances.diagonal(dim1=-2, dim2=-1).sum(dim=-1) * torch.finfo(covariances.dtype).eps
    if distortion < least.max() / LARGEST_ROUNDING:
        raise ValueError(
            f"distortion={distortion!r} is too small for covariances in {covariances.dtype}, whose coding length would "
            f"lose digits: it must be at least {least.max() / LARGEST_ROUNDING:.3g}, less in torch.float64"
        )
    identity = torch.eye(dim, dtype=covariances.dtype, device=covariances.device)
    factor = torch.linalg.cholesky(identity + dim / distortion * covariances)
    rates = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    return (counts + dim) * rates + dim / 2 * (1 + means.square().sum(dim=1) / distortion).log()


def segment(latents: Tensor, *, distortion: float = 0.5, num_groups: int = 128, seed: int = 0) -> Tensor:
    """The group of each latent, (n, d) -> (n,) from 0 on; how many groups there are, the coding length decides.

    Starts from many small groups, and while any merge of two shortens the whole makes the one that shortens it most.
    With `num_groups` >= n that is the paper's algorithm, which starts from single latents, n^2/2 unions to code. Else
    k-means makes the first groups, and the unions are some num_groups^2, whatever n.

    Args:
        distortion: eps^2: finer, and more latents, tell more groups apart.
        num_groups: of the start.
        seed: of k-means.

    Raises:
        ValueError: for no latents, or another shape, a distortion that is not positive or too small for the longest
            latents, and less than 1 group.
    """
    if latents.ndim != 2 or len(latents) == 0:
        raise ValueError(f"latents must have shape (n, d) with n > 0, got {tuple(latents.shape)}")
    if not distortion > 0:
        raise ValueError(f"distortion must be positive, got {distortion!r}")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups!r}")
    check_precision("latents", latents, distortion)
    latents = latents.cpu().double()
    start = torch.arange(len(latents)) if num_groups >= len(latents) else k_means(latents, num_groups, seed)
    groups = _Groups(latents, start, distortion)
    while groups.merge_best():
        pass
    return groups.index[start].unique(return_inverse=True)[1]


class _Groups:
    """Groups of latents and, for each pair, what its merge gains; -inf on and below the diagonal and for what is gone.

    `index` tells for each of the first groups the group that it has come to.
    """

    def __init__(self, latents: Tensor, start: Tensor, distortion: float) -> None:
        self.distortion, self.total = distortion, len(latents)
        members = [latents[start == group] for group in range(int(start.max()) + 1)]
        self.counts = torch.tensor([len(rows) for rows in members], dtype=latents.dtype)
        self.sums = torch.stack([rows.sum(dim=0) for rows in members])
        self.outers = torch.stack([rows.mT @ rows for rows in members])
        self.index = torch.arange(len(members))
        self.lengths = torch.cat([self._lengths(part, part[:0]) for part in self.index.split(CHUNK)])
        self.gains = latents.new_full((len(members), len(members)), float("-inf"))
        for first in range(len(members)):
            self.gains[first, first + 1 :] = self._gains(first, self.index[first + 1 :])

    def merge_best(self) -> bool:
        """Makes the merge that gains most; False where none gains."""
        first, second = divmod(int(self.gains.argmax()), len(self.gains))
        if not self.gains[first, second] > 0:
            return False
        self.lengths[first] = self._lengths(torch.tensor([first]), torch.tensor([second]))[0]
        for moments in (self.counts, self.sums, self.outers):
            moments[first] += moments[second]
        self.index[self.index == second] = first
        self.gains[second, :] = self.gains[:, second] = float("-inf")
        others = self.index.unique()
        others = others[others != first]
        gains = self._gains(first, others)
        self.gains[first, others[others > first]] = gains[others > first]
        self.gains[others[others < first], first] = gains[others < first]
        return True

    def _gains(self, group: int, others: Tensor) -> Tensor:
        """What merging the group with each of the others gains, in nats."""
        unions = [self._lengths(part, torch.tensor([group])) for part in others.split(CHUNK) if len(part)]
        return self.lengths[group] + self.lengths[others] - torch.cat(unions) if unions else self.lengths[:0]

    def _lengths(self, groups: Tensor, other: Tensor) -> Tensor:
        """Coding length of each of the groups together with the other, of which there may be none."""
        counts, sums, outers = (
            moments[groups] + moments[other].sum(dim=0) for moments in (self.counts, self.sums, self.outers)
        )
        means = sums / counts[:, None]
        covariances = outers / counts[:, None, None] - means[:, :, None] * means[:, None, :]
        lengths = coding_length(counts, means, covariances, distortion=self.distortion)
        return lengths + counts * (self.total / counts).log()


def k_means(latents: Tensor, num_groups: int, seed: int) -> Tensor:
    """Lloyd's algorithm from randomly chosen latents: (n, d) -> (n,), groups from 0 on, none of them empty."""
    generator = torch.Generator().manual_seed(seed)
    centres = latents[torch.randperm(len(latents), generator=generator)[:num_groups]]
    for _ in range(NUM_ITERATIONS):
        nearest = torch.cdist(latents, centres).argmin(dim=1).unique(return_inverse=True)[1]
        sums = latents.new_zeros(int(nearest.max()) + 1, latents.shape[1]).index_add_(0, nearest, latents)
        centres = sums / nearest.bincount()[:, None]
    return nearest


__all__ = ["coding_length", "k_means", "segment"]
