"""Class subspaces of latents: their second moments, summed as they come, and the nearest of them.

Yu et al., "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate Reduction",
NeurIPS 2020 (arXiv 2006.08558): a latent belongs to the class whose principal subspace leaves the smallest residual.
"""

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor


class ClassMoments:
    """Count, sum and second moment of the latents of each class, batch by batch in float64.

    d^2 numbers a class, whatever the number of latents. `labels` of what follows are those seen so far, ascending.
    """

    def __init__(self) -> None:
        self._of_class: dict[int, tuple[int, Tensor, Tensor]] = {}

    def update(self, latents: Tensor, labels: Tensor) -> None:
        """Adds latents (n, d) with labels (n,).

        Raises:
            ValueError: for other shapes, another d than before, and labels that are no integers or negative, as those
                of a split without labels are.
        """
        if latents.ndim != 2:
            raise ValueError(f"latents must have shape (n, d), got {tuple(latents.shape)}")
        if self._of_class and latents.shape[1] != self.dim:
            raise ValueError(f"latents must have shape (n, {self.dim}), got {tuple(latents.shape)}")
        if labels.shape != latents.shape[:1]:
            raise ValueError(f"labels must have shape ({len(latents)},), got {tuple(labels.shape)}")
        if labels.is_floating_point():
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        labels = labels.long()
        if len(labels) and labels.min() < 0:
            raise ValueError(
                f"labels must not be negative, got {int(labels.min())}: do without labels (--label_column none)"
            )
        latents = latents.detach().double().cpu()
        for label in labels.unique().tolist():
            rows = latents[(labels == label).cpu()]
            count, total, outer = self._of_class.get(label, (0, 0, 0))
            self._of_class[label] = (count + len(rows), total + rows.sum(dim=0), outer + rows.mT @ rows)

    @property
    def dim(self) -> int:
        return len(next(iter(self._of_class.values()))[1])

    @property
    def labels(self) -> Tensor:
        """(K,)"""
        return torch.tensor(sorted(self._of_class))

    @property
    def counts(self) -> Tensor:
        """(K,)"""
        return torch.tensor([self._of_class[label][0] for label in sorted(self._of_class)])

    @property
    def means(self) -> Tensor:
        """(K, d)"""
        moments = (self._of_class[label] for label in sorted(self._of_class))
        return torch.stack([total / count for count, total, _ in moments])

    def covariances(self) -> Iterator[Tensor]:
        """(d, d) of each class, one at a time: their largest eigenvectors span its principal subspace."""
        for label in sorted(self._of_class):
            count, total, outer = self._of_class[label]
            yield (outer - torch.outer(total, total) / count) / max(count - 1, 1)


class NearestSubspace:
    """The class k with the smallest |(I - U_k U_k^T)(z - mu_k)|^2, U_k its first principal directions.

    Args:
        rank: principal directions of each class, fewer where a class has no more images than that; d // 4 by default.
            All classes have as many, since each direction makes a residual smaller.

    ```python
    >>> classifier = NearestSubspace().fit(latents, labels)
    >>> accuracy = (classifier.predict(other_latents) == other_labels).float().mean()
    ```
    """

    def __init__(self, rank: int | None = None) -> None:
        if rank is not None and rank < 0:
            raise ValueError(f"rank must not be negative, got {rank!r}")
        self.rank = rank
        self.moments = ClassMoments()
        self._subspaces: list[Tensor] = []

    def fit(self, latents: Tensor, labels: Tensor) -> Self:
        """Latents (n, d) and their labels (n,), non-negative integers; forgets what was fitted before.

        Raises:
            ValueError: for other shapes or labels, and a `rank` that is not below d.
        """
        self.moments = ClassMoments()
        return self.partial_fit(latents, labels)

    def partial_fit(self, latents: Tensor, labels: Tensor) -> Self:
        """`fit` on these besides those before; any split into batches gives the same."""
        if self.rank is not None and latents.ndim == 2 and self.rank >= latents.shape[1]:
            raise ValueError(f"rank must be below d = {latents.shape[1]}, got {self.rank}")
        self.moments.update(latents, labels)
        self._subspaces = []
        return self

    def residuals(self, latents: Tensor) -> Tensor:
        """|(I - U_k U_k^T)(z - mu_k)|^2 of latents (n, d) -> (n, K), classes by ascending label.

        Raises:
            ValueError: before any `fit`, and for latents of another shape.
        """
        if len(self.moments.labels) == 0:
            raise ValueError("latents must have been given to fit before, got none")
        if latents.ndim != 2 or latents.shape[1] != self.moments.dim:
            raise ValueError(f"latents must have shape (n, {self.moments.dim}), got {tuple(latents.shape)}")
        if not self._subspaces:
            rank = self.moments.dim // 4 if self.rank is None else self.rank
            self._subspaces = [
                torch.linalg.eigh(covariance)[1].flip(1)[:, : min(rank, int(count) - 1)].float()
                for covariance, count in zip(self.moments.covariances(), self.moments.counts, strict=True)
            ]
        columns = []
        for mean, subspace in zip(self.moments.means.float(), self._subspaces, strict=True):
            centred = latents.float() - mean.to(latents.device)
            within = centred @ subspace.to(latents.device)
            columns.append(centred.square().sum(dim=1) - within.square().sum(dim=1))
        return torch.stack(columns, dim=1)

    def predict(self, latents: Tensor) -> Tensor:
        """Labels (n,) of latents (n, d); errors as of `residuals`."""
        return self.moments.labels.to(latents.device)[self.residuals(latents).argmin(dim=1)]


__all__ = ["ClassMoments", "NearestSubspace"]
