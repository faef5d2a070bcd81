"""The nearest class subspace, and the groups of the shortest coding, against calculations of their own."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ctrl_csc_hf import coding_rate
from ctrl_csc_hf.latents.segmentation import coding_length, segment
from ctrl_csc_hf.latents.subspace import ClassMoments, NearestSubspace


def latents_and_labels(count: int = 240, dim: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of the labels 1, 4 and 6, each with a mean and two main directions, which overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([1, 4, 6])[torch.randint(3, (count,), generator=generator)]
    bases, means = torch.randn(7, 2, dim, generator=generator), torch.randn(7, dim, generator=generator) / 2
    noise = torch.randn(count, 1, 2, generator=generator)
    latents = means[labels] + (noise @ bases[labels])[:, 0] + torch.randn(count, dim, generator=generator) / 2
    return normalize(latents, dim=1), labels


# ---- nearest subspace


def test_residuals_are_those_of_least_squares_on_the_principal_components() -> None:
    latents, labels = latents_and_labels()
    classifier = NearestSubspace(rank=3).fit(latents, labels)
    columns = []
    for label in (1, 4, 6):
        rows = latents[labels == label].double().numpy()
        _, _, directions = np.linalg.svd(rows - rows.mean(axis=0))
        centred = latents.double().numpy() - rows.mean(axis=0)
        shares, *_ = np.linalg.lstsq(directions[:3].T, centred.T, rcond=None)
        columns.append(((centred - (directions[:3].T @ shares).T) ** 2).sum(axis=1))
    np.testing.assert_allclose(classifier.residuals(latents), np.stack(columns, axis=1), atol=1e-5)
    expected = np.array([1, 4, 6])[np.stack(columns, axis=1).argmin(axis=1)]
    assert classifier.predict(latents).tolist() == expected.tolist()


def test_classes_in_subspaces_of_their_own_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(100)
    latents = torch.zeros(300, 12)
    for label in range(3):  # as MCR^2 makes them: orthogonal, and without a mean
        latents[labels == label, 4 * label : 4 * label + 3] = torch.randn(100, 3, generator=generator)
    latents = normalize(latents + 0.05 * torch.randn(300, 12, generator=generator), dim=1)
    classifier = NearestSubspace().fit(latents[:150], labels[:150])
    assert (classifier.predict(latents[150:]) == labels[150:]).all()


def test_batches_in_any_order_give_what_the_whole_set_gives_and_fit_forgets() -> None:
    latents, labels = latents_and_labels()
    whole = NearestSubspace(rank=2).fit(latents, labels).residuals(latents)
    streamed = NearestSubspace(rank=2)
    for rows in torch.arange(240).flip(0).split(37):
        streamed.partial_fit(latents[rows], labels[rows])
        streamed.predict(latents)
    torch.testing.assert_close(streamed.residuals(latents), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(streamed.fit(latents, labels).residuals(latents), whole, atol=1e-6, rtol=0)


def test_a_class_of_few_images_has_no_more_directions_than_they_span() -> None:
    latents, _ = latents_and_labels(8)
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    residuals = NearestSubspace(rank=4).fit(latents, labels).residuals(latents)
    torch.testing.assert_close(residuals[:, 0], (latents - latents[0]).square().sum(dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: NearestSubspace(-1), "rank must not be negative, got -1"),
        (lambda z, y: NearestSubspace(10).fit(z, y), "rank must be below d = 10, got 10"),
        (lambda z, y: NearestSubspace().predict(z), "must have been given to fit before, got none"),
        (lambda z, y: NearestSubspace().fit(z, y).predict(z[:, :4]), r"latents must have shape \(n, 10\)"),
        (lambda z, y: NearestSubspace().fit(z, y).partial_fit(z[:, :4], y), r"latents must have shape \(n, 10\)"),
        (lambda z, y: NearestSubspace().fit(z[0], y), r"latents must have shape \(n, d\), got \(10,\)"),
        (lambda z, y: NearestSubspace().fit(z, y[:3]), r"labels must have shape \(240,\), got \(3,\)"),
        (lambda z, y: NearestSubspace().fit(z, y.float()), r"labels must be integers, got torch\.float32"),
        (lambda z, y: NearestSubspace().fit(z, y - 2), "labels must not be negative, got -1"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*latents_and_labels())


def test_moments_agree_with_numpy() -> None:
    latents, labels = latents_and_labels()
    moments = ClassMoments()
    for rows in torch.arange(240).split(50):
        moments.update(latents[rows], labels[rows])
    assert moments.labels.tolist() == [1, 4, 6] and moments.counts.sum() == 240
    for label, mean, covariance in zip((1, 4, 6), moments.means, moments.covariances(), strict=True):
        rows = latents[labels == label].double().numpy()
        np.testing.assert_allclose(mean, rows.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(rows.T), atol=1e-12)


# ---- segmentation


def length_by_hand(rows: np.ndarray, total: int, distortion: float) -> float:
    """In nats, from the definition of Ma et al., with the bits that say whose the rows are."""
    count, dim = rows.shape
    mean = rows.mean(axis=0)
    scatter = (rows - mean).T @ (rows - mean)
    rate = np.linalg.slogdet(np.eye(dim) + dim / (distortion * count) * scatter)[1] / 2
    return (count + dim) * rate + dim / 2 * math.log(1 + mean @ mean / distortion) + count * math.log(total / count)


def test_the_length_of_latents_around_zero_is_that_of_the_coding_rate() -> None:
    latents, _ = latents_and_labels(50)
    latents = torch.cat([latents, -latents])
    covariance = latents.T @ latents / 100
    length = coding_length(torch.tensor([100.0]), torch.zeros(1, 10), covariance[None], distortion=0.3)
    torch.testing.assert_close(length[0], (100 + 10) * coding_rate(latents, distortion=0.3))


def test_a_length_is_exact_or_refused() -> None:
    rows = 50 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double() @ torch.eye(3, 12).double()
    sigma = np.linalg.svd(rows.numpy(), compute_uv=False)  # of rank 3, so that the determinant rests on the identity
    arguments = torch.tensor([40.0]), torch.zeros(1, 12).double(), (rows.T @ rows / 40)[None]
    expected = (40 + 12) * 0.5 * np.log1p(12 / (1e-6 * 40) * sigma**2).sum()
    assert coding_length(*arguments, distortion=1e-6).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"distortion=1e-06 is too small for covariances in torch.float32"):
        coding_length(*(argument.float() for argument in arguments), distortion=1e-6)
    with pytest.raises(ValueError, match=r"distortion=1e-12 is too small for latents of d = 12"):
        segment(rows, distortion=1e-12)


def test_it_merges_as_the_paper_does_from_single_latents() -> None:
    rows = latents_and_labels(30, 4)[0].double().numpy()
    distortion = 0.02
    groups = [[index] for index in range(30)]
    while True:
        gains = {
            (a, b): sum(length_by_hand(rows[groups[one]], 30, distortion) for one in (a, b))
            - length_by_hand(rows[groups[a] + groups[b]], 30, distortion)
            for a, b in itertools.combinations(range(len(groups)), 2)
        }
        (a, b), gain = max(gains.items(), key=lambda item: item[1])
        if gain <= 0:
            break
        groups[a] += groups.pop(b)
    found = segment(torch.from_numpy(rows), distortion=distortion)
    assert 1 < len(groups) < 30
    assert {frozenset(group) for group in groups} == {
        frozenset((found == group).nonzero().flatten().tolist()) for group in range(int(found.max()) + 1)
    }


@pytest.mark.parametrize("num_subspaces", [1, 4])
def test_it_finds_as_many_subspaces_as_there_are(num_subspaces: int) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(800) % num_subspaces
    bases = torch.linalg.qr(torch.randn(num_subspaces, 32, 6, generator=generator))[0].mT
    latents = (torch.randn(800, 1, 6, generator=generator) @ bases[truth])[:, 0]
    latents = normalize(latents + 0.02 * torch.randn(800, 32, generator=generator), dim=1)
    found = segment(latents)
    assert int(found.max()) + 1 == num_subspaces
    purity = sum(truth[found == group].bincount().max() for group in range(num_subspaces)) / 800
    assert purity > 0.99
    assert torch.equal(found, segment(latents))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.randn(4)}, r"latents must have shape \(n, d\) with n > 0, got \(4,\)"),
        ({"latents": torch.randn(0, 4)}, r"latents must have shape \(n, d\) with n > 0, got \(0, 4\)"),
        ({"distortion": 0.0}, "distortion must be positive, got 0.0"),
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
    ],
)
def test_what_it_cannot_segment_is_said(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment(**({"latents": torch.randn(5, 4)} | arguments))
