"""Coding rates and objectives against numpy's slogdet, one class and one sample at a time."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from ctrl_csc_hf import class_rate_reduction, coding_rate, multiclass_objective, rate_reduction
from ctrl_csc_hf.objectives.rate_reduction import class_moments, cosine_distance

SIZES = [(3, 8), (8, 8), (20, 8), (1, 8), (5, 1), (1, 1), (40, 3)]


def unit_rows(n: int, d: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).to(dtype)


def reference_rate(features, distortion=0.5) -> float:
    """1/2 logdet(I + d / (n eps^2) Z^T Z), by the d x d determinant."""
    z = np.asarray(features, dtype=np.float64)
    n, d = z.shape
    if n == 0:
        return 0.0
    sign, logdet = np.linalg.slogdet(np.eye(d) + d / (n * distortion) * z.T @ z)
    assert sign == 1
    return logdet / 2


def reference_rate_reduction(z, zh, distortion=0.5) -> float:
    union = reference_rate(np.concatenate([z, zh]), distortion)
    return union - reference_rate(z, distortion) / 2 - reference_rate(zh, distortion) / 2


def reference_class_rate_reduction(z, labels, num_classes, distortion=0.5) -> float:
    z, labels = np.asarray(z), np.asarray(labels)
    within = sum((labels == k).sum() / len(z) * reference_rate(z[labels == k], distortion) for k in range(num_classes))
    return reference_rate(z, distortion) - within


def reference_multiclass_objective(z, zh, labels, num_classes, distortion=0.5) -> float:
    z, zh, labels = np.asarray(z), np.asarray(zh), np.asarray(labels)
    whole = [reference_class_rate_reduction(features, labels, num_classes, distortion) for features in (z, zh)]
    pairs = [reference_rate_reduction(z[labels == k], zh[labels == k], distortion) for k in range(num_classes)]
    return sum(whole) + sum(pairs)


# ---- the coding rate


@pytest.mark.parametrize("distortion", [0.5, 0.1])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_coding_rate_is_half_the_log_determinant(n, d, distortion):
    z = 1.7 * unit_rows(n, d)
    expected = reference_rate(z, distortion)
    assert coding_rate(z, distortion=distortion).item() == pytest.approx(expected, rel=1e-12)
    assert coding_rate(z.float(), distortion=distortion).item() == pytest.approx(expected, rel=1e-5)


def rate_by_singular_values(features, distortion) -> float:
    """1/2 sum log(1 + d/(n eps^2) sigma^2): exact where the determinant of a Gram matrix loses its identity."""
    n, d = features.shape
    sigma = np.linalg.svd(features.double().numpy(), compute_uv=False)
    return 0.5 * np.log1p(d / (n * distortion) * sigma**2).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [2, 9])
@pytest.mark.parametrize(("n", "d"), [(12, 30), (30, 12)])
@pytest.mark.parametrize(
    ("length", "distortion"), [(1, 1e-9), (1, 1e-6), (1e-4, 1e-12), (1e3, 0.5), (30, 1e-3), (1e-4, 10)]
)
def test_coding_rates_of_rows_of_any_length_are_exact(length, distortion, n, d, rank, dtype):
    lengths = torch.linspace(0.1, 1, n)[:, None] * length
    sets = []
    for seed in (0, 1):  # of low rank, so that the determinant rests on the identity
        rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, rank)) @ unit_rows(rank, d, seed).numpy())
        sets.append((rows / rows.norm(dim=1, keepdim=True) * lengths).to(dtype).requires_grad_())
    z, zh = sets
    rates = [rate_by_singular_values(rows.detach(), distortion) for rows in (*sets, torch.cat(sets))]
    rate, reduction = coding_rate(z, distortion=distortion), rate_reduction(z, zh, distortion=distortion)
    assert rate.dtype == dtype
    assert rate.item() == pytest.approx(rates[0], rel=1e-5, abs=1e-3)
    assert reduction.item() == pytest.approx(rates[2] - (rates[0] + rates[1]) / 2, rel=1e-5, abs=2e-3)
    (gradient,) = torch.autograd.grad(rate, z)
    # d/dZ of 1/2 sum log(1 + a sigma^2) = U diag(a sigma / (1 + a sigma^2)) V^T
    u, sigma, vt = np.linalg.svd(z.detach().double().numpy(), full_matrices=False)
    alpha = d / (n * distortion)
    expected = torch.from_numpy((u * (alpha * sigma / (1 + alpha * sigma**2))) @ vt).to(dtype)
    assert (gradient - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("rate", [coding_rate, lambda z, **o: rate_reduction(z, z, **o)])
@pytest.mark.parametrize(("length", "distortion"), [(1, 1e-12), (1e7, 0.5), (1e-3, 1e-20)])
def test_rates_that_would_lose_digits_are_refused_with_what_would_do(rate, length, distortion):
    z = length * unit_rows(40, 16)
    with pytest.raises(ValueError, match=r"distortion=.* is too small for .* at most \S+, or the .* at least") as error:
        rate(z, distortion=distortion)
    least = float(str(error.value).split("at least ")[1])
    expected = rate_by_singular_values(z, 1.1 * least)
    if rate is coding_rate:
        assert rate(z, distortion=1.1 * least).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [1e155, 1e200, 1e308])
def test_rows_whose_squares_overflow_are_refused_with_what_would_do(length):
    z = length * torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"distortion=1e\+300 is too small .* must be at most ") as error:
        coding_rate(z, distortion=1e300)
    most = float(str(error.value).split("at most ")[1])
    expected = np.log1p((0.9 * most) ** 2 / 1e300)  # two equal eigenvalues
    assert coding_rate(z / length * 0.9 * most, distortion=1e300).item() == pytest.approx(expected, rel=1e-12)


def test_a_distortion_whose_inverse_overflows_is_refused_with_what_would_do():
    z = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"distortion must be at least .*, got 1e-310") as error:
        coding_rate(z, distortion=1e-310)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert coding_rate(z, distortion=1.1 * least).item() == 0


def test_coding_rate_of_fewer_samples_than_dimensions_is_the_one_of_the_large_determinant():
    z = unit_rows(4, 32)
    assert coding_rate(z).item() == pytest.approx(reference_rate(z), rel=1e-12)
    # The same vectors, written with more dimensions than they span: only d in the formula differs.
    basis = torch.linalg.qr(z.T).Q
    assert coding_rate(z @ basis, distortion=0.5 * 4 / 32).item() == pytest.approx(coding_rate(z).item(), rel=1e-12)


def test_coding_rate_of_one_unit_vector_is_known_in_closed_form():
    assert coding_rate(unit_rows(1, 128)).item() == pytest.approx(0.5 * np.log(1 + 128 / 0.5), rel=1e-12)


def test_coding_rate_of_orthonormal_vectors_is_known_in_closed_form():
    d = 16
    assert coding_rate(torch.eye(d, dtype=torch.float64)).item() == pytest.approx(d / 2 * np.log(3), rel=1e-12)


def test_coding_rate_of_no_features_is_zero_with_zero_gradient():
    z = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    whole = torch.ones(3, 8, requires_grad=True)
    rate = coding_rate(z) + coding_rate(whole[:0])
    assert rate.item() == 0
    rate.backward()
    assert z.grad.shape == (0, 8)
    assert torch.equal(whole.grad, torch.zeros(3, 8))


def test_coding_rate_does_not_depend_on_order_rotation_or_sign():
    z = unit_rows(20, 8)
    rotation = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).normal(size=(8, 8)))).Q
    for same in (z.flip(0), z @ rotation, -z, torch.cat([z, z])):
        torch.testing.assert_close(coding_rate(same), coding_rate(z))


# ---- rate reduction between two sets


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_rate_reduction_is_the_rate_of_the_union_less_the_mean_rate(n, d):
    z, zh = unit_rows(n, d, 1), unit_rows(n, d, 2)
    assert rate_reduction(z, zh).item() == pytest.approx(reference_rate_reduction(z, zh), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("n", "d"), [*SIZES, (0, 4)])
def test_rate_reduction_of_two_sets_is_never_negative_and_zero_for_equal_ones(n, d, seed):
    scale = 10.0 ** np.random.default_rng(seed).uniform(-2, 2)
    z, zh = unit_rows(n, d, 2 * seed), scale * unit_rows(n, d, 2 * seed + 1)
    assert rate_reduction(z, zh).item() >= -1e-12
    assert rate_reduction(z, z).item() == pytest.approx(0, abs=1e-12)
    assert rate_reduction(z.float(), z.float()).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("n", "d"), [(3, 8), (20, 8)])
def test_rate_reduction_is_zero_where_second_moments_agree(n, d):
    z = unit_rows(n, d)
    mixing = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).normal(size=(n, n)))).Q
    for same_moments in (z[torch.randperm(n)], -z, mixing @ z):
        assert rate_reduction(z, same_moments).item() == pytest.approx(0, abs=1e-12)
    other = torch.linalg.qr(torch.from_numpy(np.random.default_rng(2).normal(size=(d, d)))).Q
    assert rate_reduction(z, z @ other).item() > 0.01


def test_rate_reduction_grows_from_equal_sets_to_orthogonal_ones():
    basis = torch.eye(8, dtype=torch.float64)
    turned = [
        rate_reduction(basis[:4], np.cos(a) * basis[:4] + np.sin(a) * basis[4:]).item() for a in (0, 0.5, 1, np.pi / 2)
    ]
    assert turned == sorted(turned)
    assert turned[0] == pytest.approx(0, abs=1e-12)
    # Eight orthonormal vectors against four: alpha = d / (n eps^2) is 2 in the union and 4 in each.
    assert turned[-1] == pytest.approx(8 / 2 * np.log(3) - 4 / 2 * np.log(5), rel=1e-12)


# ---- with labels

LABELS = {
    "balanced": ([0, 1, 2] * 8, 3),
    "one class": ([0] * 10, 1),
    "unbalanced": ([0] * 17 + [1] * 4 + [2], 3),
    "classes missing": ([4] * 5 + [1] * 9, 7),
    "one sample a class": (list(range(6)), 6),
    "one sample": ([2], 4),
    "shuffled": ([3, 0, 3, 1, 0, 3, 3, 2, 1, 0, 3, 3, 0], 4),
}


@pytest.mark.parametrize("distortion", [0.5, 0.2])
@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize(("labels", "num_classes"), LABELS.values(), ids=LABELS)
def test_objectives_of_labelled_sets_equal_a_loop_over_the_classes(labels, num_classes, dim, distortion):
    z, zh = unit_rows(len(labels), dim, 1), 0.8 * unit_rows(len(labels), dim, 2)
    y = torch.tensor(labels)
    got = class_rate_reduction(z, y, num_classes, distortion=distortion)
    expected = reference_class_rate_reduction(z, labels, num_classes, distortion)
    assert got.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)
    got = multiclass_objective(z, zh, y, num_classes, distortion=distortion)
    expected = reference_multiclass_objective(z, zh, labels, num_classes, distortion)
    assert got.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("dtype", ["int32", "int16", "int8", "uint8", "uint16", "bool"])
def test_labels_of_every_integer_type_give_the_same(dtype):
    z, zh, y = unit_rows(10, 3, 1), unit_rows(10, 3, 2), torch.tensor([0, 1] * 5)
    labels = y.to(getattr(torch, dtype))
    assert torch.equal(class_rate_reduction(z, labels, 2), class_rate_reduction(z, y, 2))
    assert torch.equal(multiclass_objective(z, zh, labels, 2), multiclass_objective(z, zh, y, 2))
    assert torch.equal(class_moments(z, labels, 2), class_moments(z, y, 2))


def test_class_rate_reduction_is_zero_for_one_class_and_never_negative():
    z = unit_rows(30, 6)
    assert class_rate_reduction(z, torch.zeros(30, dtype=torch.long), 1).item() == pytest.approx(0, abs=1e-12)
    for seed in range(10):
        labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, 30))
        assert class_rate_reduction(z, labels, 5).item() >= -1e-12


def test_objectives_of_the_empty_set_are_zero():
    z, y = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert class_rate_reduction(z, y, 3).item() == 0
    assert multiclass_objective(z, z, y, 3).item() == 0


# ---- of single samples


def test_cosine_distance_is_zero_one_and_two_for_equal_orthogonal_and_opposite_vectors():
    z = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    zh = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    torch.testing.assert_close(cosine_distance(z, zh), torch.tensor([0.0, 1, 2]))
    a, b = unit_rows(7, 5, 1).numpy(), unit_rows(7, 5, 2).numpy()
    np.testing.assert_allclose(cosine_distance(torch.from_numpy(a), torch.from_numpy(b)), 1 - (a * b).sum(axis=1))


# ---- precision


def all_objectives(z, zh, y, num_classes) -> list[torch.Tensor]:
    return [
        coding_rate(z),
        rate_reduction(z, zh),
        class_rate_reduction(z, y, num_classes),
        multiclass_objective(z, zh, y, num_classes),
        cosine_distance(z, zh).mean(),
    ]


@pytest.mark.parametrize(("n", "d"), [(10, 32), (200, 32), (257, 16)])
def test_autocast_leaves_every_objective_as_accurate_as_float32(n, d):
    z, zh = unit_rows(n, d, 1, torch.float32), unit_rows(n, d, 2, torch.float32)
    y = torch.from_numpy(np.random.default_rng(0).integers(0, 4, n))
    expected = all_objectives(z.double(), zh.double(), y, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = all_objectives(z, zh, y, 4)
    for value, exact in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("n", [10, 200, 257, 1001])
def test_features_in_bfloat16_are_rated_in_float32(n):
    z, zh = unit_rows(n, 32, 1).bfloat16(), unit_rows(n, 32, 2).bfloat16()
    y = torch.from_numpy(np.random.default_rng(0).integers(0, 4, n))
    expected = all_objectives(z.double(), zh.double(), y, 4)
    for value, exact in zip(all_objectives(z, zh, y, 4), expected, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("n", "d"), [(4, 9), (30, 9)])
def test_not_a_number_comes_out_where_it_goes_in_without_an_exception(n, d, value):
    z, zh = unit_rows(n, d, 1), unit_rows(n, d, 2)
    z[n // 2, 3] = value
    y = torch.arange(n) % 3
    assert not any(torch.isfinite(result) for result in all_objectives(z, zh, y, 3))


# ---- gradients


@pytest.mark.parametrize(("n", "d"), [(3, 5), (5, 5), (9, 4), (1, 4)])
def test_gradients_of_every_objective_are_those_of_finite_differences(n, d):
    z, zh = unit_rows(n, d, 1).requires_grad_(), unit_rows(n, d, 2).requires_grad_()
    y = torch.tensor([0, 3, 3, 1, 1, 3, 0, 1, 1][:n])  # of classes 2 and 4 there is none
    assert gradcheck(coding_rate, (z,))
    assert gradcheck(rate_reduction, (z, zh))
    assert gradcheck(lambda a: class_rate_reduction(a, y, 5), (z,))
    assert gradcheck(lambda a, b: multiclass_objective(a, b, y, 5), (z, zh))
    assert gradcheck(cosine_distance, (z, zh))


def test_gradients_of_the_empty_set_are_empty_and_finite():
    z = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(0, dtype=torch.long)
    value = class_rate_reduction(z, y, 3) + multiclass_objective(z, z, y, 3)
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient.shape == (0, 4)


def test_gradient_at_equal_sets_is_zero():
    z = unit_rows(12, 5)
    zh = z.clone().requires_grad_()
    rate_reduction(z, zh).backward()
    np.testing.assert_allclose(zh.grad.numpy(), 0, atol=1e-14)


# ---- errors

Z, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coding_rate(torch.zeros(4)), r"features must have shape \(n, d\), got \(4,\)"),
        (lambda: coding_rate(torch.zeros(2, 4, 3)), r"features must have shape \(n, d\), got \(2, 4, 3\)"),
        (lambda: coding_rate(Z, distortion=0.0), "distortion must be positive, got 0.0"),
        (lambda: coding_rate(Z, distortion=float("nan")), "distortion must be positive, got nan"),
        (lambda: rate_reduction(Z, Z[:3]), r"reconstructed must have the shape of features, \(4, 3\), got \(3, 3\)"),
        (lambda: rate_reduction(Z, Z, distortion=-1), "distortion must be positive, got -1"),
        (lambda: rate_reduction(Z, Z[:, :2]), r"reconstructed must .* \(4, 3\), got \(4, 2\)"),
        (lambda: multiclass_objective(Z, Z[:3], Y, 3), r"reconstructed must .* \(4, 3\), got \(3, 3\)"),
        (lambda: class_rate_reduction(Z, Y[:3], 3), r"labels must have shape \(4,\), got \(3,\)"),
        (lambda: class_rate_reduction(Z, Y[:, None], 3), r"labels must have shape \(4,\), got \(4, 1\)"),
        (lambda: class_rate_reduction(Z, Y, 2), r"labels must be in \[0, 2\), got values from 0 to 2"),
        (lambda: class_rate_reduction(Z, Y - 1, 3), r"labels must be in \[0, 3\), got values from -1 to 1"),
        (lambda: multiclass_objective(Z, Z, Y, 2), r"labels must be in \[0, 2\), got values from 0 to 2"),
        (lambda: multiclass_objective(Z, Z, Y.float(), 3), "labels must be integers, got torch.float32"),
        (lambda: class_rate_reduction(Z, Y, 3, distortion=0), "distortion must be positive, got 0"),
        (lambda: multiclass_objective(Z, Z, Y, 3, distortion=0), "distortion must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_errors_that_name_argument_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
