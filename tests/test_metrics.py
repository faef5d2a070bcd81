"""Figures of merit against independent calculations, and the same whatever the batches."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel, coding_rate, rate_reduction
from ctrl_csc_hf.metrics import (
    ClosedLoopConsistency,
    CodeSparsity,
    FeatureMoments,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    LatentProbe,
    LatentSpectrum,
    LearnedPerceptualSimilarity,
    PeakSignalToNoiseRatio,
    StructuralSimilarity,
    frechet_distance,
    nearest_latent_match,
    peak_signal_to_noise_ratio,
)
from ctrl_csc_hf.metrics.latents import logistic_regression
from ctrl_csc_hf.metrics.statistic import Statistic


def pair(*shape: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Something normal and the same with noise."""
    generator = torch.Generator().manual_seed(0)
    first, change = torch.randn(2, *shape, generator=generator)
    return first, first + noise * change


def pixels(count: int, size: int = 12) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and reconstructions that leave that range at places."""
    images, reconstructions = pair(count, 3, size, size)
    return images.tanh(), images.tanh() + 0.3 * (reconstructions - images)


def filled(statistic: Statistic, *data: Any, batch: int) -> Statistic:
    """With `data` added in batches; a tuple among them is of a stage each."""
    count = len(data[0][0] if isinstance(data[0], tuple) else data[0])
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        statistic.update(
            *(tuple(v[part] for v in value) if isinstance(value, tuple) else value[part] for value in data)
        )
    assert statistic.count == count
    return statistic


def filled_probe(training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], batch: int = 1000) -> LatentProbe:
    probe = LatentProbe(int(training[1].max()) + 1)
    for start in range(0, len(training[0]), batch):
        probe.fit_update(*(values[start : start + batch] for values in training))
    filled(probe, *test, batch=batch)
    return probe


def moments_of(features: np.ndarray, batches: int = 3) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    for batch in np.array_split(features, batches):
        moments.update(torch.from_numpy(batch))
    return moments


def classes(count: int, dim: int = 6, num_classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents of overlapping classes, whose directions differ much in scale and offset."""
    centres = np.random.default_rng(9).normal(size=(num_classes, dim))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, count)
    latents = (centres[labels] + generator.normal(size=(count, dim))) * 10.0 ** np.arange(dim)[:] * 0.01 + 3
    return torch.from_numpy(latents).float(), torch.from_numpy(labels)


# Images


def test_psnr_agrees_with_its_definition_on_8_bit_pixels_and_clips() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 256, (2, 4, 3, 5, 5))
    expected = [10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(first, second, strict=True)]
    images, reconstructions = (torch.from_numpy(levels / 127.5 - 1) for levels in (first, second))
    torch.testing.assert_close(
        peak_signal_to_noise_ratio(images, reconstructions).double(), torch.tensor(expected), rtol=1e-5, atol=1e-5
    )
    assert filled(PeakSignalToNoiseRatio(), images, reconstructions, batch=3).compute() == {
        "psnr": pytest.approx(np.mean(expected), rel=1e-6)
    }
    white = torch.ones(1, 3, 4, 4)
    assert peak_signal_to_noise_ratio(white, 3 * white).isinf().all()


def test_ssim_agrees_with_the_paper_s_equation_by_gaussian_filters_of_scipy() -> None:
    images, reconstructions = pixels(3)

    def blurred(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, truncate=3.5, mode="mirror")

    expected = []
    for image, reconstruction in zip(images, reconstructions.clamp(-1, 1), strict=True):
        for x, y in zip(image.double().numpy() / 2 + 0.5, reconstruction.double().numpy() / 2 + 0.5, strict=True):
            mean_x, mean_y = blurred(x), blurred(y)
            var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
            covariance = blurred(x * y) - mean_x * mean_y
            luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
            expected.append((luminance * (2 * covariance + 9e-4) / (var_x + var_y + 9e-4)).mean())
    got = filled(StructuralSimilarity(), images, reconstructions, batch=2).compute()["ssim"]
    assert got == pytest.approx(np.mean(expected), abs=1e-5) and 0.1 < got < 0.99
    assert filled(StructuralSimilarity(), images, images, batch=2).compute()["ssim"] == pytest.approx(1)


def test_lpips_says_what_to_install_where_its_package_lacks_and_elsewhere_is_the_package_s_own() -> None:
    """Where lpips is not installed, as in CI, only the message is tested."""
    if importlib.util.find_spec("lpips") is None:
        with pytest.raises(ImportError, match="pip install lpips"):
            LearnedPerceptualSimilarity()
        return
    import lpips

    images, reconstructions = pixels(3, 64)
    network = lpips.LPIPS(net="alex", verbose=False)
    expected = network(images, reconstructions.clamp(-1, 1)).mean().item()
    got = filled(LearnedPerceptualSimilarity(), images, reconstructions, batch=2).compute()["lpips"]
    assert got == pytest.approx(expected, rel=1e-5)


# Features


def test_moments_do_not_depend_on_how_features_are_batched_and_agree_with_numpy() -> None:
    features = np.random.default_rng(0).normal(3, 2, (50, 4))
    for batches in (1, 7):
        moments = moments_of(features, batches)
        np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-10)


def test_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(200, 5)) @ generator.normal(size=(5, 5))
    second = generator.normal(1, 2, (200, 5)) @ generator.normal(size=(5, 5))
    covariances = [np.cov(features.T) for features in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-8)
    streamed = filled(FrechetDistance(), torch.from_numpy(first), torch.from_numpy(second), batch=70)
    assert streamed.compute() == {"frechet_distance": pytest.approx(expected, rel=1e-8)}


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_a_shifted_one_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(20, 30))  # fewer than dimensions: a singular covariance
    assert frechet_distance(moments_of(features), moments_of(features)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moments_of(features), moments_of(features + 0.5)) == pytest.approx(30 * 0.25, rel=1e-9)


def test_kernel_distance_is_the_mean_of_the_kernel_over_pairs_of_different_images() -> None:
    x, xh = pair(40, 6)
    kernels = [
        polynomial_kernel(a.double(), b.double(), degree=3, gamma=1 / 6, coef0=1)
        for a, b in ((x, x), (xh, xh), (x, xh))
    ]
    means = [(kernel.sum() - np.trace(kernel)) / (40 * 39) for kernel in kernels]
    expected = means[0] + means[1] - 2 * means[2]
    assert filled(KernelDistance(), x, xh, batch=7).compute()["kernel_distance"] == pytest.approx(expected, rel=1e-9)
    assert filled(KernelDistance(), x, x, batch=7).compute()["kernel_distance"] == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_reconstructions_with_the_images_distribution_is_zero_on_average() -> None:
    """A reconstruction depends on its image here; with their pair in the mean the estimates would be some -0.6."""
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(300):
        x, noise = torch.randn(2, 20, 4, generator=generator)
        estimates.append(filled(KernelDistance(), x, 0.8 * x + 0.6 * noise, batch=20).compute()["kernel_distance"])
    assert abs(np.mean(estimates)) < 3 * np.std(estimates) / 300**0.5 < 0.05


def test_kernel_distance_of_many_images_is_that_of_a_uniform_sample_whatever_the_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ctrl_csc_hf.metrics.distributions.SAMPLE_SIZE", 50)
    x = torch.arange(2000.0)[:, None]
    samples = [filled(KernelDistance(), x, -x, batch=batch).sample for batch in (2000, 49, 50, 7)]
    assert all(torch.equal(sample, samples[0]) for sample in samples)
    kept = samples[0][0, :, 0]
    assert len(set(kept.tolist())) == 50 and torch.equal(samples[0][1, :, 0], -kept)
    assert abs(kept.mean() - 1000) < 3 * 2000 / 12**0.5 / 50**0.5 and kept.max() > 1500


def test_inception_score_is_that_of_its_definition() -> None:
    logits, _ = pair(60, 5)
    p = torch.softmax(2 * logits, dim=1).double().numpy()
    divergences = [(row * np.log(row / p.mean(axis=0))).sum() for row in p]
    got = filled(InceptionScore(), 2 * logits, batch=7).compute()["inception_score"]
    assert got == pytest.approx(np.exp(np.mean(divergences)), rel=1e-6)
    certain = 1e4 * torch.eye(5).repeat(3, 1)
    assert filled(InceptionScore(), certain, batch=4).compute()["inception_score"] == pytest.approx(5)
    assert filled(InceptionScore(), certain[:1], batch=4).compute()["inception_score"] == pytest.approx(1)


# Latents and codes


def test_match_counts_the_reconstructions_whose_nearest_latent_is_their_own() -> None:
    z = torch.eye(4)
    zh = torch.tensor([[1.0, 0.1, 0, 0], [0.9, 1.0, 0, 0], [1.0, 0, 0.2, 0], [0, 0, 0, 7.0]])  # the third is lost
    for chunk in (1, 3, 1024):
        assert nearest_latent_match(z, zh, chunk=chunk) == 0.75
    assert filled(ClosedLoopConsistency(), z, zh, batch=3).compute()["match"] == 0.75


def test_match_of_no_latents_and_sparsity_of_no_codes_are_errors() -> None:
    with pytest.raises(ValueError, match=r"latents must hold at least one image, got shape \(0, 4\)"):
        nearest_latent_match(torch.zeros(0, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="codes must hold at least one stage, got none"):
        CodeSparsity().update(())


def test_consistency_agrees_with_all_cosines_at_once() -> None:
    z, zh = pair(600, 5)
    cosines = (z.numpy() @ zh.numpy().T) / np.outer(np.linalg.norm(z, axis=1), np.linalg.norm(zh, axis=1))
    got = filled(ClosedLoopConsistency(), z, zh, batch=70).compute()
    assert got["cosine"] == pytest.approx(np.diag(cosines).mean(), rel=1e-5)
    assert got["match"] == np.mean(cosines.argmax(axis=0) == np.arange(600)) and 0.05 < got["match"] < 0.9


def test_consistency_goes_on_after_figures_were_asked_for() -> None:
    z, zh = pair(30, 5)
    consistency = filled(ClosedLoopConsistency(), z[:20], zh[:20], batch=7)
    consistency.compute()
    consistency.update(z[20:], zh[20:])
    assert consistency.compute() == filled(ClosedLoopConsistency(), z, zh, batch=30).compute()


def test_sparsity_counts_entries_and_atoms_that_are_used_anywhere() -> None:
    first, second = torch.zeros(4, 3, 2, 2), torch.zeros(4, 2, 1, 1)
    first[0, 0, 0, 1], first[3, 0, 1, 1], first[2, 2, 0, 0] = 1.0, -1.0, 0.5
    second[:, 1] = 2.0
    assert filled(CodeSparsity(), (first, second), batch=3).compute() == {
        "nonzero_1": 3 / 48,
        "active_atoms_1": pytest.approx(2 / 3),
        "nonzero_2": 0.5,
        "active_atoms_2": 0.5,
    }


def test_sparsity_takes_the_model_s_codes() -> None:
    config = CtrlCscConfig(
        image_size=16,
        latent_dim=8,
        stage_channels=[8, 8],
        kernel_sizes=[4, 4, 4],
        strides=[2, 2, 1],
        paddings=[1, 1, 0],
    )
    images, _ = pixels(4, 16)
    codes = CtrlCscModel(config).eval().encode(images, output_codes=True).codes
    got = filled(CodeSparsity(), tuple(codes), batch=3).compute()
    assert got["nonzero_2"] == np.mean(codes[1].detach().numpy() != 0)
    assert got["active_atoms_1"] == np.mean((codes[0].detach().numpy() != 0).any(axis=(0, 2, 3)))


def test_spectrum_and_rates_agree_with_singular_values_and_the_rates_of_all_latents() -> None:
    z, zh = (torch.nn.functional.normalize(latents, dim=1) for latents in pair(50, 6))
    got = filled(LatentSpectrum(distortion=0.3), z, zh, batch=7).compute()
    for key, latents in (("spectrum", z), ("reconstructed_spectrum", zh)):
        np.testing.assert_allclose(got[key], np.linalg.svd(latents.double().numpy())[1] ** 2 / 50, rtol=1e-6)
        assert sum(got[key]) == pytest.approx(1)
    assert got["rate"] == pytest.approx(coding_rate(z.double(), distortion=0.3).item(), rel=1e-6)
    assert got["reconstructed_rate"] == pytest.approx(coding_rate(zh.double(), distortion=0.3).item(), rel=1e-6)
    assert got["rate_reduction"] == pytest.approx(
        rate_reduction(z.double(), zh.double(), distortion=0.3).item(), rel=1e-5
    )
    share = np.array(got["spectrum"]) / sum(got["spectrum"])
    assert got["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_rates_of_long_latents_at_a_tiny_distortion_are_exact_or_refused() -> None:
    z, zh = (30 * latents @ torch.randn(3, 12) for latents in pair(50, 3))  # of rank 3
    got = filled(LatentSpectrum(distortion=1e-4), z, zh, batch=7).compute()
    rates = []
    for latents in (z, zh, torch.cat([z, zh])):
        sigma = np.linalg.svd(latents.double().numpy(), compute_uv=False)
        rates.append(0.5 * np.log1p(12 / (len(latents) * 1e-4) * sigma**2).sum())
    assert [got["rate"], got["reconstructed_rate"]] == pytest.approx(rates[:2], abs=1e-3)
    assert got["rate_reduction"] == pytest.approx(rates[2] - (rates[0] + rates[1]) / 2, abs=1e-3)
    with pytest.raises(ValueError, match="distortion=1e-12 is too small for latents of d = 12"):
        LatentSpectrum(distortion=1e-12).update(z, zh)


def test_effective_rank_is_the_number_of_directions_that_are_used_alike() -> None:
    z = torch.eye(6)[torch.arange(30) % 3]
    assert filled(LatentSpectrum(), z, z, batch=8).compute()["effective_rank"] == pytest.approx(3)


def test_linear_probe_finds_the_coefficients_of_scikit_learn() -> None:
    latents, labels = classes(200)
    scaled = StandardScaler().fit_transform(latents.double())
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(scaled, labels)
    weight, bias = logistic_regression(torch.from_numpy(scaled), labels, 4)
    np.testing.assert_allclose(weight.T, reference.coef_, atol=1e-3)
    # The biases are determined up to a constant, as no ridge is on them.
    np.testing.assert_allclose(bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=1e-3)


def test_probe_accuracies_are_those_of_scikit_learn_on_latents_of_any_scale_and_in_inference_mode() -> None:
    training, test = classes(300), classes(200, seed=1)
    scaler = StandardScaler().fit(training[0].double())
    linear = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(scaler.transform(training[0].double()), training[1])
    expected = linear.score(scaler.transform(test[0].double()), test[1])
    got = filled_probe(training, test, batch=70).compute()
    assert got["linear_probe"] == expected and 0.4 < expected < 0.95
    with torch.inference_mode():
        moved = [(latents * 1.0, labels * 1) for latents, labels in (training, test)]
        assert filled_probe(*moved).compute() == got


def test_neighbours_vote_as_in_scikit_learn_where_no_vote_is_tied() -> None:
    training, test = (pair(*shape) for shape in ((300, 4), (200, 4)))
    labels = [(latents[0][:, 0] > 0).long() for latents in (training, test)]
    # Normalised rows order by distance as by cosine; nine neighbours of two classes cannot tie, of ten ties are ours.
    unit = [torch.nn.functional.normalize(latents[1], dim=1) for latents in (training, test)]
    probe = KNeighborsClassifier(n_neighbors=10).fit(unit[0], labels[0])
    votes = probe.predict_proba(unit[1])[:, 1]
    nearest = labels[0][torch.from_numpy(probe.kneighbors(unit[1], 10)[1])].numpy()
    predicted = np.where(votes == 0.5, nearest[:, 0], votes > 0.5)  # a tie goes to the nearest of all, as there are two
    expected = np.mean(predicted == labels[1].numpy())
    got = filled_probe((training[1], labels[0]), (test[1], labels[1])).compute()["knn"]
    assert (votes == 0.5).any() and got == pytest.approx(expected)


def test_a_tied_vote_goes_to_the_tied_class_with_the_nearest_latent() -> None:
    """Ten training latents: one of class 2 the nearest, then of classes 0 and 1 by turns, 1 before 0."""
    angles = torch.tensor([0.0, 0.2, 0.1, 0.4, 0.3, 0.6, 0.5, 0.8, 0.7])
    training = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([2, 0, 1, 0, 1, 0, 1, 0, 1])
    probe = filled_probe((training, labels), (torch.tensor([[2.0, 0.0]]), torch.tensor([1])))
    assert probe.compute()["knn"] == 1.0


def test_a_collapsed_encoder_leaves_the_probe_the_largest_class() -> None:
    labels = torch.tensor([1, 1, 0, 1])
    constant = torch.full((4, 3), 0.1)
    assert filled_probe((constant, labels), (constant, labels)).compute()["linear_probe"] == 0.75


# All


def test_figures_do_not_depend_on_the_batches() -> None:
    training, test = classes(60), classes(40, seed=1)
    cases: list[tuple[Callable[[], Statistic], tuple]] = [
        (PeakSignalToNoiseRatio, pixels(5)),
        (StructuralSimilarity, pixels(5)),
        (FrechetDistance, pair(50, 4)),
        (KernelDistance, pair(50, 4)),
        (InceptionScore, pair(50, 4)[:1]),
        (ClosedLoopConsistency, pair(50, 4)),
        (CodeSparsity, (pair(50, 3, 2, 2),)),
        (LatentSpectrum, pair(50, 4)),
    ]
    for statistic, data in cases:
        whole, parts = (filled(statistic(), *data, batch=batch).compute() for batch in (50, 3))
        assert whole.keys() == parts.keys()
        for key, value in whole.items():
            assert parts[key] == pytest.approx(value, rel=1e-6), (statistic, key)
    assert filled_probe(training, test, batch=7).compute() == filled_probe(training, test).compute()


@pytest.mark.parametrize(
    "statistic",
    [
        PeakSignalToNoiseRatio,
        StructuralSimilarity,
        FrechetDistance,
        KernelDistance,
        InceptionScore,
        ClosedLoopConsistency,
        CodeSparsity,
        LatentSpectrum,
        lambda: LatentProbe(2),
    ],
)
def test_without_images_there_are_no_figures(statistic: Callable[[], Statistic]) -> None:
    with pytest.raises(ValueError, match=r"needs . or more images added by update, got 0"):
        statistic().compute()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PeakSignalToNoiseRatio().update(*pixels(2)[:1], torch.zeros(2, 3, 4, 4)), "the shape of images"),
        (lambda: PeakSignalToNoiseRatio().update(torch.zeros(3, 4), torch.zeros(3, 4)), r"shape \(n, C, H, W\)"),
        (
            lambda: PeakSignalToNoiseRatio().update(*[torch.full((1, 3, 4, 4), 255)] * 2),
            r"in \[-1, 1\], got torch.int64",
        ),
        (lambda: StructuralSimilarity().update(*pixels(1, 5)), "6 or more pixels a side, got"),
        (lambda: FrechetDistance().update(torch.zeros(3), torch.zeros(3)), r"features must have shape \(n, dim\)"),
        (lambda: FrechetDistance().update(torch.zeros(3, 2), torch.zeros(2, 2)), "the shape of features"),
        (
            lambda: filled(KernelDistance(), *pair(3, 2), batch=3).update(*pair(3, 4)),
            r"features must have shape \(n, 2\)",
        ),
        (
            lambda: filled(FrechetDistance(), *pair(1, 2), batch=3).compute(),
            "needs 2 or more images added by update, got 1",
        ),
        (lambda: filled(InceptionScore(), pair(3, 2)[0], batch=3).update(torch.zeros(1, 3)), r"logits must .*\(n, 2\)"),
        (lambda: ClosedLoopConsistency().update(torch.zeros(3, 2), torch.zeros(2, 2)), "the shape of latents"),
        (
            lambda: filled(LatentSpectrum(), *pair(3, 2), batch=3).update(*pair(3, 4)),
            r"latents must have shape \(n, 2\)",
        ),
        (lambda: LatentSpectrum(distortion=0), "distortion must be positive, got 0"),
        (lambda: CodeSparsity().update((torch.zeros(2, 3),)), r"codes\[0\] must have shape \(2, C, h, w\)"),
        (
            lambda: CodeSparsity().update(tuple(torch.zeros(n, 3, 1, 1) for n in (2, 1))),
            r"codes\[1\] must have shape \(2",
        ),
        (lambda: filled(CodeSparsity(), (torch.ones(1, 3, 1, 1),), batch=1).update(()), "codes must have 1 stages"),
        (
            lambda: filled(CodeSparsity(), (torch.ones(1, 3, 1, 1),), batch=1).update((torch.ones(1, 2, 1, 1),)),
            "must have 3 atoms as before, got 2",
        ),
        (lambda: LatentProbe(1), "num_classes must be at least 2, got 1"),
        (
            lambda: LatentProbe(2).update(torch.zeros(2, 3), torch.tensor([0, 2])),
            r"labels must be in \[0, 2\), got 0 to 2",
        ),
        (lambda: LatentProbe(2).update(torch.zeros(2, 3), torch.zeros(2)), r"labels must be integers of shape \(2,\)"),
        (
            lambda: filled(LatentProbe(2), torch.zeros(1, 3), torch.tensor([0]), batch=1).compute(),
            "added by fit_update",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_the_classes_brings_no_package_of_the_extras_along() -> None:
    code = (
        "import sys; import ctrl_csc_hf; before = set(sys.modules); import ctrl_csc_hf.metrics\n"
        "print(sorted({'evaluate', 'datasets', 'diffusers', 'torchmetrics', 'sklearn', 'lpips', 'torch_fidelity'} & "
        "(set(sys.modules) - before)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
