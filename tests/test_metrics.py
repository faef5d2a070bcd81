"""Figures of merit against independent calculations."""

import numpy as np
import pytest
import torch

from ctrl_csc_hf.metrics import FeatureMoments, frechet_distance, nearest_latent_match, peak_signal_to_noise_ratio


def moments_of(features: np.ndarray, batches: int = 3) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    for batch in np.array_split(features, batches):
        moments.update(torch.from_numpy(batch))
    return moments


def test_psnr_agrees_with_its_definition_on_8_bit_pixels_and_clips() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 256, (2, 4, 3, 5, 5))
    expected = [10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(first, second, strict=True)]
    images, reconstructions = (torch.from_numpy(pixels / 127.5 - 1) for pixels in (first, second))
    torch.testing.assert_close(
        peak_signal_to_noise_ratio(images, reconstructions).double(), torch.tensor(expected), rtol=1e-5, atol=1e-5
    )
    white = torch.ones(1, 3, 4, 4)
    assert peak_signal_to_noise_ratio(white, 3 * white).isinf().all()


def test_moments_do_not_depend_on_how_features_are_batched_and_agree_with_numpy() -> None:
    features = np.random.default_rng(0).normal(3, 2, (50, 4))
    for batches in (1, 7):
        moments = moments_of(features, batches)
        np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-10)


def test_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    first = generator.normal(size=(200, 5)) @ generator.normal(size=(5, 5))
    second = generator.normal(1, 2, (300, 5)) @ generator.normal(size=(5, 5))
    covariances = [np.cov(features.T) for features in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_a_shifted_one_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(20, 30))  # fewer than dimensions: a singular covariance
    assert frechet_distance(moments_of(features), moments_of(features)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moments_of(features), moments_of(features + 0.5)) == pytest.approx(30 * 0.25, rel=1e-9)


def test_match_counts_the_reconstructions_whose_nearest_latent_is_their_own() -> None:
    z = torch.eye(4)
    zh = torch.tensor([[1.0, 0.1, 0, 0], [0.9, 1.0, 0, 0], [1.0, 0, 0.2, 0], [0, 0, 0, 7.0]])  # the third is lost
    for chunk in (1, 3, 1024):
        assert nearest_latent_match(z, zh, chunk=chunk) == 0.75
