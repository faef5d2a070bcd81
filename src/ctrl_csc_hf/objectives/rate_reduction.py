"""Coding rates, their reductions, and the objectives of the closed loop. Functions only: no modules, no state.

Features are rows: Z of shape (n, d). Rates are in nats. Dai et al., "CTRL: Closed-Loop Transcription to an LDR
via Minimaxing Rate Reduction", Entropy 24(4):456, 2022 (doi 10.3390/e24040456).

Gram matrices and their Cholesky factors are float64 (float32 on MPS devices, which have no float64): in float32 the
identity in I + d/(n eps^2) Z^T Z is lost to rounding where eps^2 is small or rows are long. Where float64 would lose it
too, the public functions raise a ValueError. Features that are not finite give rates that are not finite.
"""

from typing import Any

import torch
from torch import Tensor

SMALL_CLASS = 8  # images; below it the unweighted sum of `multiclass_objective` swamps the rest
LARGEST_ROUNDING = 3e-4  # of the matrix I + d/(n eps^2) Z^T Z; rates are then right to 0.001 nats


def coding_rate(features: Tensor, *, distortion: float = 0.5) -> Tensor:
    """R(Z) = 1/2 logdet(I + d / (n eps^2) Z^T Z), in nats: the rate that codes Z up to the distortion.

    Args:
        features: Z (n, d), of any lengths. R of no features is 0.
        distortion: eps^2.

    Returns:
        Scalar of the features' dtype, float32 or better whatever the autocast.

    Raises:
        ValueError: for features that are not (n, d), a distortion that is not positive, or one that is too small for
            the longest row.
    """
    _check_features(features, distortion)
    check_precision("features", features, distortion)
    return _coding_rate(features, distortion).to(_result_type(features))


def rate_reduction(features: Tensor, reconstructed: Tensor, *, distortion: float = 0.5) -> Tensor:
    """dR(Z, Zh) = R(Z u Zh) - R(Z)/2 - R(Zh)/2 >= 0, in nats; 0 where the second moments agree.

    Args:
        features, reconstructed: Z and Zh (n, d), of equal size.
        distortion: eps^2.

    Raises:
        ValueError: for shapes that differ or are not (n, d), and as `coding_rate` for the distortion.
    """
    _check_pair(features, reconstructed, distortion)
    return rates_of_pair(features, reconstructed, distortion=distortion)[0].to(_result_type(features))


def class_rate_reduction(features: Tensor, labels: Tensor, num_classes: int, *, distortion: float = 0.5) -> Tensor:
    """dR(Z | y) = R(Z) - sum_k (n_k / n) R(Z_k), in nats, over the classes k.

    Args:
        features: Z (n, d).
        labels: y (n,), integers in [0, num_classes).
        num_classes: K.
        distortion: eps^2.

    Raises:
        ValueError: for wrong shapes, labels outside [0, num_classes), and as `coding_rate` for the distortion.
    """
    _check_features(features, distortion)
    check_precision("features", features, distortion)
    labels = _checked_labels(features, labels, num_classes)
    by_class, counts = _group_by_class(features, labels, num_classes)
    rates = _coding_rates(by_class, counts, distortion)
    within = (counts.to(rates.dtype) * rates).sum() / max(len(labels), 1)
    return (_coding_rate(features, distortion) - within).to(_result_type(features))


def multiclass_objective(
    features: Tensor, reconstructed: Tensor, labels: Tensor, num_classes: int, *, distortion: float = 0.5
) -> Tensor:
    """CTRL-Multi: dR(Z | y) + dR(Zh | y) + sum_k dR(Z_k, Zh_k), in nats.

    The sum over classes is unweighted: with fewer than some `SMALL_CLASS` images a class it swamps the rest.

    Args:
        features, reconstructed: Z and Zh (n, d).
        labels: y (n,), of both, integers in [0, num_classes).
        num_classes: K.
        distortion: eps^2.

    Raises:
        ValueError: for wrong shapes, labels outside [0, num_classes), and as `coding_rate` for the distortion.
    """
    _check_pair(features, reconstructed, distortion)
    objective = multiclass_objective_of_pair(features, reconstructed, labels, num_classes, distortion=distortion)
    return objective.to(_result_type(features))


# What a training step computes, of features that the model has scaled: in float64, without looking at their values.
# Labels are looked at: where they are on the CPU, this makes no GPU wait.


def rates_of_pair(features: Tensor, reconstructed: Tensor, *, distortion: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """dR(Z, Zh), R(Z) and R(Zh) of two sets (n, d), in nats."""
    pair = torch.stack([features, reconstructed])
    count, dim = features.shape
    if 2 * count >= dim > 0:
        return rates_of_moments(second_moments(pair), count, distortion=distortion)
    rate, reconstructed_rate = _coding_rates(pair, count, distortion)
    union = _coding_rates(pair.flatten(0, 1)[None], 2 * count, distortion)[0]
    return union - (rate + reconstructed_rate) / 2, rate, reconstructed_rate


def multiclass_objective_of_pair(
    features: Tensor, reconstructed: Tensor, labels: Tensor, num_classes: int, *, distortion: float = 0.5
) -> Tensor:
    """`multiclass_objective`; ValueError for labels outside [0, num_classes)."""
    labels = _checked_labels(features, labels, num_classes)
    pairs, counts = _group_by_class(_exact(torch.stack([features, reconstructed], dim=1)), labels, num_classes)
    rows, _, dim = pairs.shape[1:]
    with torch.autocast(features.device.type, enabled=False):
        if 2 * rows >= dim:
            moments = torch.stack([_Gram.apply(pairs[:, :, player].mT) for player in (0, 1)])
            return multiclass_objective_of_moments(moments, counts, distortion=distortion)
        grams = _Gram.apply(pairs.flatten(1, 2))  # of z and zh by turns, so it holds those of either
        rates_z = _rates_of_grams(grams[:, ::2, ::2], counts, distortion, dim)
        rates_zh = _rates_of_grams(grams[:, 1::2, 1::2], counts, distortion, dim)
        rates_union = _rates_of_grams(grams, 2 * counts, distortion, dim)
    share = counts.to(rates_z.dtype) / max(len(labels), 1)
    whole = _coding_rate(features, distortion) + _coding_rate(reconstructed, distortion)
    within = (share * (rates_z + rates_zh)).sum()
    between = (rates_union - rates_z / 2 - rates_zh / 2).sum()
    return whole - within + between


# And from second moments, which add up over the parts of a batch.


def second_moments(sets: Tensor) -> Tensor:
    """Z^T Z of each set Z: (..., n, d) -> (..., d, d)."""
    with torch.autocast(sets.device.type, enabled=False):
        return _Gram.apply(_exact(sets).mT)


def class_moments(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Z_k^T Z_k of each class k: (n, d), (n,) -> (K, d, d); errors as `class_rate_reduction`."""
    labels = _checked_labels(features, labels, num_classes)
    return second_moments(_group_by_class(_exact(features), labels, num_classes)[0])


def rates_of_moments(moments: Tensor, count: Tensor | int, *, distortion: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """`rates_of_pair` from the second moments of Z and Zh (2, d, d) and their number of rows."""
    sets = torch.cat([moments, moments.mean(dim=0, keepdim=True)])  # the union has their sum, and twice the rows
    rate, reconstructed_rate, union = _rates_of_grams(sets, count, distortion)
    return union - (rate + reconstructed_rate) / 2, rate, reconstructed_rate


def multiclass_objective_of_moments(moments: Tensor, counts: Tensor, *, distortion: float = 0.5) -> Tensor:
    """`multiclass_objective` from the second moments of Z and Zh by class (2, K, d, d) and the classes' sizes (K,)."""
    _, rate, reconstructed_rate = rates_of_moments(moments.sum(dim=1), counts.sum(), distortion=distortion)
    rates_z, rates_zh = (_rates_of_grams(part, counts, distortion) for part in moments)
    rates_union = _rates_of_grams(moments.sum(dim=0), 2 * counts, distortion)
    within = (counts.to(rates_z.dtype) / counts.sum().clamp(min=1) * (rates_z + rates_zh)).sum()
    return rate + reconstructed_rate - within + (rates_union - rates_z / 2 - rates_zh / 2).sum()


def cosine_distance(features: Tensor, reconstructed: Tensor) -> Tensor:
    """1 - cos(z_i, zh_i) = |z_i - zh_i|^2 / 2 of unit vectors: (n, d), (n, d) -> (n,)."""
    dtype = _result_type(features)
    return (features.to(dtype) - reconstructed.to(dtype)).square().sum(dim=1) / 2


def check_precision(name: str, features: Tensor, distortion: float) -> None:
    """Raises ValueError if rounding or overflow would show in coding rates of rows (n, d) of this length."""
    if features.numel() == 0:
        return
    rows = _exact(features.detach())
    (count, dim), limits = rows.shape, torch.finfo(rows.dtype)
    if dim / distortion > limits.max:
        raise ValueError(
            f"distortion must be at least {dim / limits.max:.3g} for {name} of d = {dim}, got {distortion!r}"
        )
    scale = rows.abs().max().item()
    if not 0 < scale < float("inf"):
        return
    length = scale * torch.linalg.vector_norm(rows / scale, dim=1).max().item()  # whose squares may overflow
    most = (limits.max / (4 * count)) ** 0.5  # so that sums of squares over two sets are finite
    least = dim * limits.eps / LARGEST_ROUNDING  # of the distortion, for rows of norm 1
    exact = (distortion / least) ** 0.5
    if length > min(most, exact):
        remedy = f", or the distortion at least {least * length**2:.3g}" if length < most else ""
        raise ValueError(
            f"distortion={distortion!r} is too small for {name} of d = {dim} whose longest row has the norm "
            f"{length:.3g}: the coding rate would lose digits. The norms must be at most {min(most, exact):.3g}{remedy}"
        )


def _coding_rate(features: Tensor, distortion: float) -> Tensor:
    """R of (n, d)."""
    return _coding_rates(features[None], len(features), distortion)[0]


def _coding_rates(sets: Tensor, counts: Tensor | int, distortion: float) -> Tensor:
    """R of each of K sets: (K, m, d), rows past a set's count (K,) zero -> (K,)."""
    sets = _exact(sets)
    if sets.numel() == 0:
        return sets.sum(dim=(1, 2))  # zeros that hang on to the graph, so that their gradient is zero too
    with torch.autocast(sets.device.type, enabled=False):
        rows, dim = sets.shape[1:]
        # I + alpha Z Z^T has the determinant of I + alpha Z^T Z; the smaller one is cheaper.
        return _rates_of_grams(_Gram.apply(sets if rows < dim else sets.mT), counts, distortion, dim)


class _Gram(torch.autograd.Function):
    """S S^T of matrices S (K, m, d) -> (K, m, m), with one product in the backward pass where autograd takes two."""

    @staticmethod
    def forward(ctx: Any, sets: Tensor) -> Tensor:
        ctx.save_for_backward(sets)
        return sets @ sets.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (sets,) = ctx.saved_tensors
        return (gradients[0] + gradients[0].mT) @ sets


class _HalfLogDet(torch.autograd.Function):
    """1/2 logdet M of positive definite M (..., m, m) -> (...), whose gradient 1/2 M^-1 needs no other products."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        # The variant that does not raise: NaN in, NaN out, and no wait for a GPU's answer.
        factor, _ = torch.linalg.cholesky_ex(matrices)
        ctx.save_for_backward(factor)
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        if factor.is_cuda:  # where the routine below cannot be captured in a CUDA graph
            identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            root = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
            inverse = root.mT @ root
        else:
            inverse = torch.cholesky_inverse(factor)
        return inverse * (gradients[0] / 2)[..., None, None]


def _rates_of_grams(grams: Tensor, counts: Tensor | int, distortion: float, dim: int | None = None) -> Tensor:
    """R of sets of `counts` rows, (K,) or one number for all, from each one's Z^T Z (K, d, d), or Z Z^T with d as `dim`
    -> (K,).
    """
    with torch.autocast(grams.device.type, enabled=False):
        rows = counts.clamp(min=1).to(grams.dtype)[..., None, None] if isinstance(counts, Tensor) else max(counts, 1)
        identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        return _HalfLogDet.apply(identity + grams * ((dim or grams.shape[-1]) / (rows * distortion)))


def _group_by_class(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """(n, ...), (n,) -> the classes' features, padded by zeros to the largest class (K, m, ...), and counts (K,)."""
    largest = int(torch.bincount(labels).max()) if len(labels) else 0  # no wait for a GPU, if labels are on the CPU
    labels = labels.to(features.device, non_blocking=True)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(0, labels, torch.ones_like(labels))
    order = torch.argsort(labels, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    padded = features.new_zeros(num_classes, largest, *features.shape[1:])
    return padded.index_put((labels, rank), features), counts


def _exact(features: Tensor) -> Tensor:
    return features.to(torch.float32 if features.device.type == "mps" else torch.float64)


def _result_type(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _check_features(features: Tensor, distortion: float) -> None:
    if features.ndim != 2:
        raise ValueError(f"features must have shape (n, d), got {tuple(features.shape)}")
    if not distortion > 0:
        raise ValueError(f"distortion must be positive, got {distortion!r}")


def _check_pair(features: Tensor, reconstructed: Tensor, distortion: float) -> None:
    _check_features(features, distortion)
    if features.shape != reconstructed.shape:
        raise ValueError(
            f"reconstructed must have the shape of features, {tuple(features.shape)}, got {tuple(reconstructed.shape)}"
        )
    check_precision("features", features, distortion)
    check_precision("reconstructed", reconstructed, distortion)


def _checked_labels(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The labels as int64, of any type of integers or bool."""
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape ({features.shape[0]},), got {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    labels = labels.long()
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"labels must be in [0, {num_classes}), got values from {labels.min().item()} to {labels.max().item()}"
        )
    return labels
