"""Denoising and completion: a stage's codes of other problems on its dictionary, and what the pipeline makes of it."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from sklearn.linear_model import Lasso

from ctrl_csc_hf import (
    ConvolutionalSparseCoding,
    CtrlCscConfig,
    CtrlCscImageProcessor,
    CtrlCscModel,
    CtrlCscPipeline,
)
from ctrl_csc_hf.models.restoration import (
    DEFAULT_RATIO,
    RATIOS,
    calibrate_denoising,
    denoise,
    denoising_sparsity,
    explain,
    inpaint,
    psnr,
)

CONFIG = {
    "image_size": 16,
    "latent_dim": 8,
    "stage_channels": [16, 8],
    "kernel_sizes": [4, 4, 4],
    "strides": [2, 2, 1],
    "paddings": [1, 1, 0],
    "sparsity": 0.02,
}


@pytest.fixture
def pipe() -> CtrlCscPipeline:
    torch.manual_seed(0)
    pipe = CtrlCscPipeline(CtrlCscModel(CtrlCscConfig(**CONFIG)), CtrlCscImageProcessor(image_size=16))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_outputs_that_are_tuples_by_configuration_change_nothing(pipe):
    images, mask = smooth_images(2), random_mask(2)
    results = []
    for return_dict in (True, False):
        pipe.model.config.return_dict = return_dict
        results.append([pipe(images, output_type="pt").images, pipe.denoise(images, 0.2, output_type="pt")])
        results[-1] += [pipe.inpaint(images, mask, output_type="pt"), pipe.encode(images)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def smooth_images(count: int, seed: int = 0) -> torch.Tensor:
    """Gradients of colour (count, 3, 16, 16), in [0, 1]."""
    corners = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(corners, size=16, mode="bilinear", align_corners=True)


def random_mask(count: int, share: float = 0.5) -> torch.Tensor:
    return torch.rand(count, 16, 16, generator=torch.Generator().manual_seed(1)) < share


def pixels(images: torch.Tensor) -> torch.Tensor:
    return CtrlCscImageProcessor(image_size=16)(images, return_tensors="pt").pixel_values


# A stage


@pytest.fixture
def stage() -> ConvolutionalSparseCoding:
    torch.manual_seed(0)
    return ConvolutionalSparseCoding(2, 4, 3, 1, 1, sparsity=0.05).double()


def test_codes_of_known_pixels_minimise_the_energy_of_these_alone_as_scikit_learn_finds_it(stage):
    signal, known = torch.randn(1, 2, 5, 6).double(), torch.rand(1, 1, 5, 6) < 0.6
    unit_codes = torch.eye(4 * 30).double().reshape(-1, 4, 5, 6)
    operator = stage.synthesize(unit_codes).detach().flatten(1).T.numpy()
    rows = known.expand(1, 2, 5, 6).flatten().numpy()
    lasso = Lasso(alpha=0.1 / rows.sum(), positive=True, fit_intercept=False, tol=1e-10, max_iter=100_000)
    lasso.fit(operator[rows], signal.flatten().numpy()[rows])

    codes = stage.solve(signal, known=known, sparsity=0.1, num_iterations=2000).detach()

    def energy(codes: np.ndarray) -> float:
        residual = operator[rows] @ codes - signal.flatten().numpy()[rows]
        return 0.1 * np.abs(codes).sum() + residual @ residual / 2

    assert codes.min() >= 0
    assert energy(codes.flatten().numpy()) == pytest.approx(energy(lasso.coef_), rel=1e-6)


def test_masked_operator_has_the_masked_signals_adjoint_and_no_larger_norm(stage):
    known = torch.rand(1, 1, 7, 8) < 0.5
    codes, signal = torch.randn(1, 4, 7, 8).double(), torch.randn(1, 2, 7, 8).double()
    stage.update_operator_norm((7, 8))
    masked = stage.synthesize(codes) * known
    torch.testing.assert_close((masked * signal).sum(), (codes * stage.adjoint(signal * known)).sum())
    operator = (stage.synthesize(torch.eye(4 * 56).double().reshape(-1, 4, 7, 8)) * known).detach().flatten(1)
    assert torch.linalg.matrix_norm(operator, 2) <= stage.operator_norm * 1.01


def test_all_known_is_the_plain_code_and_what_is_missing_does_not_matter(stage):
    signal, known = torch.randn(2, 2, 6, 6).double(), torch.rand(2, 1, 6, 6) < 0.5
    assert torch.equal(stage.solve(signal, known=torch.ones_like(known)), stage.encode(signal))
    damaged = signal.where(known, float("nan"))
    assert torch.equal(stage.solve(damaged, known=known), stage.solve(signal, known=known))


def test_another_lambda_and_number_of_steps_code_as_a_stage_of_these(stage):
    other = ConvolutionalSparseCoding(2, 4, 3, 1, 1, sparsity=0.3, num_iterations=5).double()
    other.load_state_dict(stage.state_dict())
    signal = torch.randn(2, 2, 6, 6).double()
    assert torch.equal(stage.solve(signal, sparsity=0.3, num_iterations=5), other.encode(signal))
    assert (stage.sparsity, stage.num_iterations) == (0.05, 2)
    gentle, strict = (stage.solve(signal, sparsity=sparsity, num_iterations=50) for sparsity in (0.05, 0.5))
    assert (strict > 0).sum() < (gentle > 0).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": -0.1}, "sparsity must be a finite number of at least 0, got -0.1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"known": torch.ones(1, 1, 6, 6)}, r"known must be bool and of the signal's shape \(1, 2, 6, 6\).*float32"),
        ({"known": torch.ones(1, 1, 6, 5, dtype=torch.bool)}, r"known must .* got torch.bool of shape \(1, 1, 6, 5\)"),
    ],
)
def test_a_stages_wrong_arguments_are_named(stage, options, message):
    with pytest.raises(ValueError, match=message):
        stage.solve(torch.randn(1, 2, 6, 6).double(), **options)


# Denoising


def test_denoised_image_is_the_reconstruction_and_the_code_of_the_rest(pipe):
    images = smooth_images(3)
    noisy = pixels(images)
    reconstruction = pipe.model(noisy).reconstruction
    reference = ConvolutionalSparseCoding(3, 16, 4, 2, 1, sparsity=DEFAULT_RATIO * 0.04, num_iterations=32)
    reference.load_state_dict(pipe.model.encoder.stages[0].state_dict())
    expected = reconstruction + reference.synthesize(reference.encode(noisy - reconstruction))
    got = pipe.denoise(images, noise_std=0.2, output_type="pt")
    torch.testing.assert_close(got, ((expected + 1) / 2).clamp(0, 1).detach())


def test_a_lambda_above_all_that_the_residual_holds_gives_the_reconstruction(pipe):
    noisy = pixels(smooth_images(2))
    reconstruction = pipe.model(noisy).reconstruction
    stage = pipe.model.encoder.stages[0]
    largest = stage.adjoint(noisy - reconstruction).max().item()
    assert torch.equal(denoise(pipe.model, noisy, 1.001 * largest), reconstruction)
    assert not torch.equal(denoise(pipe.model, noisy, 0.9 * largest), reconstruction)


def test_with_impulses_as_atoms_the_residual_is_soft_thresholded():
    stage = ConvolutionalSparseCoding(3, 24, 4, 2, 1)
    with torch.no_grad():  # of either sign, in each of 2 x 2 pixels and 3 channels: every pixel is reached once
        impulses = torch.eye(12).reshape(12, 3, 2, 2)
        stage.dictionary.copy_(torch.nn.functional.pad(torch.cat([impulses, -impulses]), (1, 1, 1, 1)))
        noisy, estimate = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        got = explain(stage, noisy, estimate, sparsity=0.3, num_iterations=100)
    rest = noisy - estimate
    torch.testing.assert_close(got, estimate + rest.sign() * (rest.abs() - 0.3).clamp(min=0), atol=1e-4, rtol=0)


def test_lambda_is_interpolated_between_calibrated_levels_as_a_multiple_of_the_variance():
    config = CtrlCscConfig(**CONFIG, denoising_sparsity=[[0.1, 0.02], [0.3, 0.36]])
    expected = {0.05: 2 * 0.05**2, 0.1: 0.02, 0.2: 3 * 0.2**2, 0.3: 0.36, 0.6: 4 * 0.6**2}
    for noise_std, sparsity in expected.items():
        assert denoising_sparsity(config, noise_std) == pytest.approx(sparsity)
    assert denoising_sparsity(CtrlCscConfig(**CONFIG), 0.2) == pytest.approx(DEFAULT_RATIO * 0.04)


def test_calibration_takes_the_best_lambda_of_its_grid_and_is_saved_with_the_model(pipe, tmp_path: Path):
    images = smooth_images(4)
    pairs = pipe.calibrate_denoising(images, noise_std=(0.1, 0.4))
    clean = pixels(images)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for noise_std, sparsity in pairs:
        noisy = (clean + noise_std * noise).clamp(-1, 1)
        errors = {r: (denoise(pipe.model, noisy, r * noise_std**2).clamp(-1, 1) - clean).square() for r in RATIOS}
        mean_psnr = {r: -10 * (e.mean(dim=(1, 2, 3)) / 4).log10().mean() for r, e in errors.items()}
        assert sparsity == pytest.approx(max(mean_psnr, key=mean_psnr.get) * noise_std**2)
    pipe.model.save_pretrained(tmp_path)
    assert CtrlCscModel.from_pretrained(tmp_path).config.denoising_sparsity == pairs


def test_psnr_is_that_of_scikit_image_on_the_pixels_that_count():
    from skimage.metrics import peak_signal_noise_ratio

    clean, images = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
    where = random_mask(2)[:, None]
    for index in range(2):
        a, b = clean[index].numpy(), images[index].numpy()
        assert psnr(images, clean)[index] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2), abs=1e-4)
        kept = where[index, 0].numpy()
        expected = peak_signal_noise_ratio(a[:, kept], b[:, kept], data_range=2)
        assert psnr(images, clean, where)[index] == pytest.approx(expected, abs=1e-4)


def test_one_model_serves_several_threads_and_comes_out_as_it_went_in(pipe):
    images = smooth_images(2)
    before = {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}
    stage = pipe.model.encoder.stages[0]
    settings = stage.extra_repr()
    alone = {level: pipe.denoise(images, level, output_type="pt") for level in (0.05, 0.1, 0.3, 0.5)}
    together: dict[float, list[torch.Tensor]] = {level: [] for level in alone}

    def serve(level: float) -> None:
        for _ in range(5):
            together[level].append(pipe.denoise(images, level, output_type="pt"))

    threads = [threading.Thread(target=serve, args=(level,)) for level in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(got) == 5 for got in together.values())
    assert all(torch.equal(image, alone[level]) for level, got in together.items() for image in got)
    pipe.inpaint(images, random_mask(1))
    after = pipe.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert stage.extra_repr() == settings and not pipe.model.training


@pytest.mark.parametrize(
    "pairs", [[], [[0.1]], [[0.0, 0.1]], [[0.1, -1.0]], [[0.2, 0.1], [0.1, 0.1]], [[0.1, float("inf")]], [["a", 0.1]]]
)
def test_a_wrong_calibration_is_no_configuration(pairs):
    with pytest.raises(ValueError, match="denoising_sparsity"):
        CtrlCscConfig(**CONFIG, denoising_sparsity=pairs)


# Completion


def test_an_empty_mask_gives_the_plain_reconstruction_exactly(pipe):
    images = smooth_images(3)
    completed = pipe.inpaint(images, np.zeros((16, 16), dtype=bool), output_type="pt")
    assert torch.equal(completed, pipe(images, output_type="pt").images)


def test_completion_codes_with_the_first_stage_s_lambda_in_units_of_pixels():
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(**CONFIG | {"sparsity": 0.3, "low_pass": True})).eval()
    stage, seen = model.encoder.stages[0], []
    solve = stage.solve
    stage.solve = lambda signal, **options: (seen.append(options), solve(signal, **options))[1]
    images, mask = pixels(smooth_images(2)), random_mask(2)[:, None]
    with torch.no_grad():
        inpaint(model, images, mask)
    # Such a stage codes details over 0.2, so a lambda of 0.3 is one of 0.06 for pixels: |x / 0.2 - A(z / 0.2)|.
    of_pixels = [options["sparsity"] for options in seen if options.get("known") is not None]
    assert of_pixels == pytest.approx([0.06, 0.06])
    detail = 0.1 * torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        0.2 * solve(detail / 0.2, num_iterations=8), solve(detail, sparsity=0.06, num_iterations=8)
    )


def test_what_lies_under_the_mask_does_not_matter(pipe):
    images, mask = smooth_images(2), random_mask(2)
    others = images.where(~mask[:, None], smooth_images(2, seed=9))
    for keep_known in (False, True):
        first, second = (pipe.inpaint(i, mask, keep_known, output_type="pt") for i in (images, others))
        assert torch.equal(first, second)


def test_known_pixels_stay_where_asked_for_and_missing_ones_are_the_same(pipe):
    images, mask = smooth_images(2), random_mask(2)[:, None]
    everywhere = pipe.inpaint(images, mask, output_type="pt")
    kept = pipe.inpaint(images, mask, keep_known=True, output_type="pt")
    assert torch.equal(kept[mask.expand_as(kept)], everywhere[mask.expand_as(kept)])
    known = ~mask.expand_as(kept)
    torch.testing.assert_close(kept[known], images[known], atol=1e-6, rtol=0)
    assert (everywhere[known] - images[known]).abs().max() > 0.01


def test_masks_mean_the_same_in_every_form(pipe):
    images, mask = smooth_images(2), random_mask(2)
    expected = pipe.inpaint(images, mask, output_type="pt")
    forms = [
        mask.numpy(),
        mask[:, None].to(torch.uint8),
        mask.float(),
        [mask[0].numpy(), mask[1]],
        [Image.fromarray((one.numpy() * 255).astype(np.uint8)) for one in mask],
        [Image.fromarray(one.numpy()) for one in mask],
    ]
    for form in forms:
        assert torch.equal(pipe.inpaint(images, form, output_type="pt"), expected)
    same = pipe.inpaint(images, torch.stack([mask[0]] * 2), output_type="pt")
    assert torch.equal(pipe.inpaint(images, mask[0], output_type="pt"), same)


def test_a_mask_of_the_images_own_size_is_cropped_and_resized_like_the_image(pipe):
    """By hand: the centre is cut out, and of each block of 3x3 pixels that become one any missing pixel counts."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (48, 66, 3), dtype=np.uint8)
    mask = generator.random((48, 66)) < 0.05
    box = CtrlCscPipeline(pipe.model, CtrlCscImageProcessor(image_size=16, resample=Image.Resampling.BOX))
    box.set_progress_bar_config(disable=True)
    blocks = mask[:, 9:57].reshape(16, 3, 16, 3).any(axis=(1, 3))
    expected = box.inpaint(image, blocks, output_type="pt")
    assert 0.2 < blocks.mean() < 0.8
    for form in (mask, torch.from_numpy(mask)[None, None], Image.fromarray(mask), [mask]):
        assert torch.equal(box.inpaint(image, form, output_type="pt"), expected)
    # Several images, one mask each, of its size or of the model's.
    pair = box.inpaint([image, image[:, 9:57]], [mask, blocks], output_type="pt")
    torch.testing.assert_close(pair, expected.expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    uncropped = CtrlCscPipeline(pipe.model, CtrlCscImageProcessor(image_size=16, do_resize=False))
    cropped = uncropped.inpaint(image, mask, output_type="pt")
    by_hand = uncropped.inpaint(image[16:32, 25:41], mask[16:32, 25:41], output_type="pt")
    torch.testing.assert_close(cropped, by_hand, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(40, 60), (12, 9)])  # larger and smaller than the model's
def test_what_lies_under_a_mask_of_the_images_own_size_does_not_matter(pipe, size):
    generator = np.random.default_rng(0)
    image, other = generator.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    mask = np.zeros(size, dtype=bool)
    mask[size[0] // 3 : size[0] // 2, size[1] // 3 : size[1] // 2] = True
    first, second = (
        pipe.inpaint(Image.fromarray(np.where(mask[..., None], hidden, image)), mask, keep_known=True, output_type="pt")
        for hidden in (image, other)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, pipe.inpaint(Image.fromarray(image), np.zeros(size), True, output_type="pt"))


def test_missing_pixels_of_what_atoms_make_up_are_found():
    stage = ConvolutionalSparseCoding(3, 6, 4, 4, 0)
    flat = torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4) / 4
    known = ~random_mask(4)[:, None]
    with torch.no_grad():
        stage.dictionary.copy_(torch.cat([flat, -flat]))
        image = torch.rand(4, 3, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        got = explain(stage, image, torch.zeros_like(image), known=known, sparsity=0.0, num_iterations=300)
    torch.testing.assert_close(got, image, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda pipe, image: pipe.denoise(image, -0.1),
            ValueError,
            "noise_std must be a finite .* above 0.*, got -0.1",
        ),
        (lambda pipe, image: pipe.denoise(image, 0), ValueError, "noise_std must .*, got 0"),
        (lambda pipe, image: pipe.denoise(image, float("nan")), ValueError, "noise_std must .*, got nan"),
        (lambda pipe, image: pipe.denoise(image, 0.1, 0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda pipe, image: pipe.denoise(image, 0.1, output_type="x"), ValueError, "output_type must be one of"),
        (lambda pipe, image: pipe.calibrate_denoising(image, [0.2, 0.1]), ValueError, "noise_std must be .* rising"),
        (
            lambda pipe, image: pipe.inpaint(image, np.zeros((8, 16))),
            ValueError,
            r"mask must have the size of image 0, \(16, 16\), or the model's, \(16, 16\), got \(8, 16\)",
        ),
        (lambda pipe, image: pipe.inpaint(image, np.zeros((3, 16, 16))), ValueError, "one for each of 1, got 3"),
        (lambda pipe, image: pipe.inpaint(image, []), ValueError, "one for each of 1, got 0"),
        (lambda pipe, image: pipe.inpaint(image, np.full((16, 16), 0.5)), ValueError, "0 and 1 alone, got .*0.5"),
        (lambda pipe, image: pipe.inpaint(image, torch.full((16, 16), float("nan"))), ValueError, "0 and 1 alone"),
        (lambda pipe, image: pipe.inpaint(image, Image.new("L", (16, 16), 9)), ValueError, "black and white, got .*9"),
        (lambda pipe, image: pipe.inpaint(image, np.ones((16, 16))), ValueError, "mask 0 marks all as missing"),
        (lambda pipe, image: pipe.inpaint(image, "mask.png"), TypeError, "mask must be .* got str"),
    ],
)
def test_wrong_arguments_are_named(pipe, call, error, message):
    with pytest.raises(error, match=message):
        call(pipe, Image.new("RGB", (16, 16), "orange"))


@pytest.mark.parametrize(
    "images", [Image.new("RGB", (20, 18), "teal"), np.zeros((2, 16, 16, 3)), [smooth_images(2)[0]]]
)
def test_images_of_every_form_give_as_many_pil_images_in_batches_of_any_size(pipe, images):
    count = len(pipe(images).images)
    for got in (pipe.denoise(images, 0.1, 1), pipe.inpaint(images, random_mask(1), batch_size=1)):
        assert len(got) == count and all(image.size == (16, 16) for image in got)


def test_bfloat16(pipe):
    images, mask = smooth_images(2), random_mask(1)
    exact = pipe.denoise(images, 0.2, output_type="pt"), pipe.inpaint(images, mask, output_type="pt")
    pipe.to(torch.bfloat16)
    got = pipe.denoise(images, 0.2, output_type="pt"), pipe.inpaint(images, mask, output_type="pt")
    assert all((a - b).abs().mean() < 0.05 for a, b in zip(exact, got, strict=True))


def test_a_published_pipeline_denoises_and_completes_by_the_code_beside_it(pipe, tmp_path: Path):
    images, mask = smooth_images(2), random_mask(2)
    pipe.calibrate_denoising(images, noise_std=(0.2,))
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    code = sys.modules[type(loaded).__module__]
    assert not any(name.startswith("ctrl_csc_hf") for name in (code.__name__, code.denoise.__module__))
    assert loaded.model.config.denoising_sparsity == pipe.model.config.denoising_sparsity
    for method, argument in (("denoise", 0.3), ("inpaint", mask)):
        got, expected = (getattr(p, method)(images, argument, output_type="np") for p in (loaded, pipe))
        assert np.array_equal(got, expected)


def test_calibration_is_repeatable(pipe):
    clean = pixels(smooth_images(2))
    assert calibrate_denoising(pipe.model, clean, [0.2]) == calibrate_denoising(pipe.model, clean, [0.2])
