"""The denoiser: its mathematics, photographs of any size, its repository, and its training in short form."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from test_hub import WITHOUT_THE_PACKAGE
from transformers import AutoModel

from ctrl_csc_hf import (
    ConvolutionalSparseCoding,
    CtrlCscConfig,
    CtrlCscDenoiser,
    CtrlCscDenoiserConfig,
    CtrlCscImageProcessor,
    CtrlCscModel,
    CtrlCscPipeline,
)
from ctrl_csc_hf.models import denoiser_ctrl_csc


def a_denoiser(iterations: int = 3, dictionaries: int = 1, atoms: int = 8) -> CtrlCscDenoiser:
    torch.manual_seed(0)
    config = CtrlCscDenoiserConfig(num_atoms=atoms, num_iterations=iterations, num_dictionaries=dictionaries)
    return CtrlCscDenoiser(config).eval()


@pytest.fixture
def pipe() -> CtrlCscPipeline:
    sizes = {"stage_channels": [4, 4], "kernel_sizes": [4, 4, 4], "strides": [2, 2, 1], "paddings": [1, 1, 0]}
    model = CtrlCscModel(CtrlCscConfig(image_size=16, latent_dim=8, **sizes))
    pipe = CtrlCscPipeline(model, CtrlCscImageProcessor(image_size=16), denoiser=a_denoiser())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Mathematics


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 1), (2, 3)])
def test_with_pixels_as_atoms_the_image_less_its_mean_is_soft_thresholded(size):
    denoiser = CtrlCscDenoiser(CtrlCscDenoiserConfig(num_atoms=12, kernel_size=2, num_iterations=4, num_dictionaries=2))
    with torch.no_grad():
        impulses = torch.eye(12).reshape(12, 3, 2, 2)
        for atoms in (denoiser.analysis, denoiser.synthesis, denoiser.dictionary):
            atoms.copy_(impulses.expand_as(atoms))
        denoiser.thresholds[:, 0], denoiser.thresholds[:, 1] = 0.0, 0.7
        # Each step shrinks z - (z - y) = y, so all steps make the same of y.
        noisy, noise_std = torch.randn(2, 3, *size), torch.tensor([0.1, 0.5])
        got = denoiser(noisy, noise_std)
        mean = noisy.mean(dim=(2, 3), keepdim=True)
        rest, threshold = noisy - mean, 0.7 * noise_std[:, None, None, None]
        torch.testing.assert_close(got, mean + rest.sign() * (rest.abs() - threshold).clamp(min=0))
        nearly = denoiser(noisy, torch.full((2,), 1e-6))
        torch.testing.assert_close(nearly, noisy, atol=1e-5, rtol=0)  # no noise: the image as it was


def test_with_one_dictionary_a_step_is_one_of_the_first_stages_program_and_lowers_its_energy():
    """A new denoiser has |D| = 1, so its steps have the size 1 / |D|^2, and tau is lambda."""
    torch.manual_seed(0)
    noisy, sparsity = torch.randn(1, 3, 12, 12) * 0.3, 0.05
    energies, codes = [], []
    for iterations in (1, 2, 4, 16, 64):
        denoiser = a_denoiser(iterations, atoms=16)
        with torch.no_grad():
            denoiser.thresholds[:, 0], denoiser.thresholds[:, 1] = 0.0, sparsity
            low = noisy.mean(dim=(2, 3), keepdim=True)
            framed = denoiser_ctrl_csc._framed(noisy - low, 2)
            stage = ConvolutionalSparseCoding(3, 16, 6, 2, 0, sparsity=sparsity, nonnegative=False, num_iterations=999)
            stage.dictionary.copy_(denoiser.dictionary)
            detail = denoiser(noisy, torch.ones(1)) - low
            z = codes_of(denoiser, noisy, torch.ones(1))
            energies.append(stage.energy(framed, z).item())
            torch.testing.assert_close(stage.synthesize(z)[..., 4:16, 4:16], detail)
            codes.append(z)
    assert energies == sorted(energies, reverse=True)
    best = stage.energy(framed, stage.solve(framed)).item()
    assert best <= energies[-1] < best + 0.01 * (energies[0] - best)


def codes_of(denoiser: CtrlCscDenoiser, noisy: torch.Tensor, noise_std: torch.Tensor) -> torch.Tensor:
    """z_T: what the last dictionary synthesises."""
    kept = []
    original = denoiser_ctrl_csc._SoftThreshold.apply
    try:
        denoiser_ctrl_csc._SoftThreshold.apply = lambda *args: kept.append(original(*args)) or kept[-1]
        denoiser(noisy, noise_std)
    finally:
        denoiser_ctrl_csc._SoftThreshold.apply = original
    return kept[-1]


def test_the_gradient_of_the_soft_threshold_is_the_right_one():
    codes = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    threshold = torch.rand(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(denoiser_ctrl_csc._SoftThreshold.apply(codes, threshold).sin().sum(), (codes, threshold))
    plain = (codes - torch.clamp(codes, -threshold, threshold)).sin().sum()
    expected = torch.autograd.grad(plain, (codes, threshold))
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_a_brighter_image_is_denoised_to_a_brighter_one():
    denoiser, noisy = a_denoiser(), torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        got, brighter = (denoiser.denoise(image, 0.2) for image in (noisy, noisy + 0.25))
    torch.testing.assert_close(brighter, got + 0.25, atol=1e-5, rtol=0)


def test_more_noise_means_fewer_codes():
    denoiser = a_denoiser(dictionaries=3)
    with torch.no_grad():
        denoiser.thresholds[:, 1] = 0.1
        noisy = torch.randn(1, 3, 16, 16)
        active = [(codes_of(denoiser, noisy, torch.tensor([level])) != 0).sum() for level in (0.1, 0.5, 2.0)]
    assert active[0] > active[1] > active[2]


# Images of any size


def test_large_images_in_tiles_are_as_whole(monkeypatch):
    denoiser, noisy = a_denoiser(iterations=2), torch.randn(1, 3, 61, 45)
    whole = denoiser.denoise(noisy, 0.3)
    monkeypatch.setattr(denoiser_ctrl_csc, "TILE", 20)
    monkeypatch.setattr(denoiser_ctrl_csc, "MARGIN", 24)  # beyond which two steps do not see
    torch.testing.assert_close(denoiser.denoise(noisy, 0.3), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 17), (64, 64)])
def test_the_pipeline_denoises_in_the_images_own_size_and_without_gradients(pipe, size):
    image = photograph(*size)
    (got,) = pipe.denoise(image, noise_std=0.2)
    assert got.size == image.size
    tensor = pipe.denoise(image, noise_std=0.2, output_type="pt")
    assert tensor.shape == (1, 3, *size) and not tensor.requires_grad
    expected = pipe.denoiser.denoise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1, 0.2)
    torch.testing.assert_close(tensor, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_images_alone_in_batches_and_among_others_of_other_sizes_are_denoised_alike(pipe):
    images = [photograph(12, 18, seed) for seed in range(3)]
    together = pipe.denoise(images, 0.2, output_type="pt")
    assert together.shape == (3, 3, 12, 18)
    torch.testing.assert_close(pipe.denoise(images, 0.2, 2, output_type="pt"), together, atol=1e-6, rtol=0)
    mixed = pipe.denoise([images[0], photograph(7, 7), images[2]], 0.2, output_type="np")
    assert [one.shape for one in mixed] == [(12, 18, 3), (7, 7, 3), (12, 18, 3)]
    for index in (0, 2):
        np.testing.assert_allclose(mixed[index], together[index].permute(1, 2, 0).numpy(), atol=1e-6)
    assert [one.size for one in pipe.denoise([images[0], photograph(7, 9)], 0.2)] == [(18, 12), (9, 7)]


@pytest.mark.parametrize("noise_std", [0, -0.1, float("nan"), float("inf")])
def test_a_wrong_noise_level_is_named(pipe, noise_std):
    with pytest.raises(ValueError, match=rf"noise_std must be a finite number above 0, .* got {noise_std}"):
        pipe.denoise(photograph(8, 8), noise_std)


# Completion


def test_the_pipeline_completes_in_the_images_own_size_and_known_pixels_stay(pipe):
    image, mask = photograph(13, 22), np.zeros((13, 22), dtype=bool)
    mask[4:9, 3:12] = True
    got = pipe.inpaint(image, mask, output_type="np")[0]
    original = np.asarray(image) / 255
    np.testing.assert_allclose(got[~mask], original[~mask], atol=1e-6)
    other = np.where(mask[..., None], np.asarray(photograph(13, 22, 9)), np.asarray(image))
    np.testing.assert_array_equal(pipe.inpaint(Image.fromarray(other), mask, output_type="np")[0], got)
    two = pipe.inpaint([image, photograph(7, 7)], [mask, np.eye(7)], output_type="np")
    np.testing.assert_allclose(two[0], got, atol=1e-5)
    assert two[1].shape == (7, 7, 3)
    batch = pipe.inpaint([image, image], Image.fromarray(mask), batch_size=1, output_type="np")
    np.testing.assert_allclose(batch, np.stack([got, got]), atol=1e-5)


def test_of_a_flat_image_nothing_is_lost_by_missing_pixels(pipe):
    mask = np.ones((9, 9), dtype=bool)
    mask[2, 3] = False
    (completed,) = pipe.inpaint(Image.new("RGB", (9, 9), "teal"), mask)
    assert np.array_equal(np.asarray(completed), np.asarray(Image.new("RGB", (9, 9), "teal")))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((16, 16)), r"mask must have the size of image 0, \(9, 8\), got \(16, 16\)"),
        (np.ones((9, 8)), "mask 0 marks all as missing"),
        (np.zeros((3, 9, 8)), "one for each of 1, got 3"),
    ],
)
def test_wrong_masks_of_images_in_their_own_size_are_named(pipe, mask, message):
    with pytest.raises(ValueError, match=message):
        pipe.inpaint(photograph(9, 8), mask)


# Its repository


def test_what_is_saved_loads_equal_by_every_class(tmp_path):
    denoiser = a_denoiser(dictionaries=3)
    denoiser.save_pretrained(tmp_path)
    noisy = torch.randn(1, 3, 10, 11)
    for loaded in (CtrlCscDenoiser.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded.denoise(noisy, 0.2), denoiser.denoise(noisy, 0.2))
    half = {name: tensor.half() for name, tensor in denoiser.state_dict().items()}
    denoiser.save_pretrained(tmp_path / "half", state_dict=half)
    loaded = CtrlCscDenoiser.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.denoise(noisy, 0.2), denoiser.denoise(noisy, 0.2), atol=1e-2, rtol=0)


def test_its_folder_works_without_the_package(tmp_path):
    denoiser = a_denoiser()
    denoiser.save_pretrained(tmp_path / "denoiser")
    code = (
        "import sys, torch\nfrom transformers import AutoModel\n"
        "denoiser = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.save(denoiser.denoise(torch.linspace(-1, 1, 3 * 9 * 9).view(1, 3, 9, 9), 0.2), sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE + code, str(tmp_path / "denoiser"), str(tmp_path / "found.pt")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")},
        check=True,
    )
    expected = denoiser.denoise(torch.linspace(-1, 1, 3 * 9 * 9).view(1, 3, 9, 9), 0.2)
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected, atol=1e-6, rtol=0)


def test_pipelines_take_a_denoiser_where_they_are_loaded_and_save_none(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert "denoiser" not in json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    image = photograph(9, 20)
    (expected,) = pipe.denoise(image, 0.2, output_type="np")
    for load in (
        CtrlCscPipeline.from_pretrained,
        lambda folder, **parts: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **parts),
    ):
        assert np.array_equal(load(tmp_path, denoiser=pipe.denoiser).denoise(image, 0.2, output_type="np")[0], expected)
        assert load(tmp_path).denoise(image, 0.2)[0].size == (16, 16)


@pytest.mark.parametrize(
    "wrong", [{"stride": 3}, {"kernel_size": 7}, {"kernel_size": 10}, {"num_iterations": 0}, {"num_dictionaries": 0}]
)
def test_wrong_numbers_of_a_configuration_are_named(wrong, tmp_path):
    ((field, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{field}={value} is not allowed: it must be"):
        CtrlCscDenoiserConfig(**wrong)
    a_denoiser().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{field}={value} is not allowed: it must be"):
        CtrlCscDenoiser.from_pretrained(tmp_path, **wrong)


def test_the_folder_of_another_model_gives_no_untrained_denoiser(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='ctrl_csc' is not allowed: it must be 'ctrl_csc_denoiser'"):
        CtrlCscDenoiser.from_pretrained(tmp_path)


def test_exported_to_onnx_it_takes_any_number_of_images_of_any_size(tmp_path):
    denoiser, path = a_denoiser(), tmp_path / "denoiser.onnx"
    example = torch.randn(3, 3, 20, 26), torch.full((3,), 0.1)
    sizes = {"noisy": {0: "n", 2: "height", 3: "width"}, "noise_std": {0: "n"}}
    torch.onnx.export(denoiser, example, path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for size in ((1, 31, 44), (2, 5, 6)):
        noisy, noise_std = torch.randn(size[0], 3, *size[1:]), torch.full((size[0],), 0.2)
        (got,) = session.run(None, {"noisy": noisy.numpy(), "noise_std": noise_std.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), denoiser(noisy, noise_std), atol=1e-5, rtol=1e-4)


# Its training


def test_its_training_packs_photographs_and_leaves_a_denoiser_and_its_figures(tmp_path, capsys):
    training = importlib.import_module("ctrl_csc_hf.training.denoiser")
    for split, count in (("train", 6), ("test", 2)):
        for index in range(count):
            path = tmp_path / "images" / split / f"{index}.{'png' if index % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(*((20, 25) if index % 3 else (26, 20)), index).save(path)
    packed = tmp_path / "packed.safetensors"
    training.main(["pack", "--dataset", str(tmp_path / "images"), "--output", str(packed)])
    photographs = training.read_photographs(packed, "test")
    assert sorted(p.shape for p in photographs) == [(3, 20, 25), (3, 26, 20)]
    originals = [np.array(Image.open(path)) for path in sorted((tmp_path / "images" / "test").iterdir())]
    for original in originals:
        assert any(np.array_equal(original, p.permute(1, 2, 0)) for p in photographs)

    sizes = ["--batch", "2", "--crop", "12", "--atoms", "4", "--iterations", "2", "--held_out", "1"]
    command = ["train", "--data", str(packed), "--output", str(tmp_path / "out"), "--seconds", "3", *sizes]
    training.main(command)
    figures = json.loads((tmp_path / "out" / "denoiser.json").read_text(encoding="utf-8"))
    assert figures["steps"] > 0 and all(figures[f"PSNR at {level} of 2"] > 5 for level in (15, 25, 50))
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.config.num_atoms == 4 and "25/255" in capsys.readouterr().out
    assert loaded.denoise(torch.randn(1, 3, 9, 9), 0.2).isfinite().all()


def test_16_bits_and_hidden_colours_are_packed_as_the_processor_sees_them_and_unreadable_images_are_left_out(
    tmp_path, caplog
):
    training = importlib.import_module("ctrl_csc_hf.training.denoiser")
    for split in ("train", "test"):
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        Image.fromarray(np.full((9, 9), 100 * 257, dtype=np.uint16)).save(folder / "0.png")
        Image.new("RGBA", (9, 9), (200, 0, 0, 0)).save(folder / "1.png")
        photograph(40, 40).save(folder / "2.jpg")
        (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:900])
    training.main(["pack", "--dataset", str(tmp_path / "images"), "--output", str(tmp_path / "packed")])
    packed = training.read_photographs(tmp_path / "packed", "train")
    assert [torch.unique(p).tolist() for p in packed] == [[100], [255]]
    assert f"unreadable image skipped, {tmp_path / 'images' / 'train' / '2.jpg'}" in caplog.text


def test_photographs_are_drawn_from_a_whole_split(tmp_path):
    training, benchmark = importlib.import_module("ctrl_csc_hf.training.denoiser"), importlib.import_module("denoising")
    for index in range(40):
        path = tmp_path / "images" / ("test" if index % 2 else "train") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (index, 0, 0)).save(path)
    command = ["pack", "--dataset", str(tmp_path / "images"), "--output", str(tmp_path / "packed")]
    training.main([*command, "--train_images", "8"])
    drawn = [int(p[0, 0, 0]) for p in training.read_photographs(tmp_path / "packed", "train")]
    assert len(set(drawn)) == 8 and max(drawn) > 16 and all(value % 2 == 0 for value in drawn)
    levels = [round(float(p[0, 0, 0, 0] + 1) * 127.5) for p in benchmark.read(str(tmp_path / "images"), "test", 8)]
    assert len(set(levels)) == 8 and max(levels) > 16
    everything = [int(p[0, 0, 0]) for p in training.read_photographs(tmp_path / "packed", "test")]
    assert everything == list(range(1, 40, 2))  # in their order, on which the seeds of the noise depend


def test_what_its_training_cannot_use_is_named(tmp_path):
    training = importlib.import_module("ctrl_csc_hf.training.denoiser")
    for index in range(3):
        path = tmp_path / "images" / "train" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(10, 12, index).save(path)
    pack = ["pack", "--dataset", str(tmp_path / "images"), "--output", str(tmp_path / "packed")]
    with pytest.raises(ValueError, match=r"must have the splits train and test, .* has train, not test"):
        training.main(pack)
    (tmp_path / "images" / "test").mkdir()
    photograph(10, 12).save(tmp_path / "images" / "test" / "0.png")
    training.main(pack)
    a_denoiser().save_pretrained(tmp_path / "model")
    for flags, message in (
        (["--held_out", "3"], "--held_out must be above 0 and below .* 3, got 3"),
        (["--held_out", "0"], "--held_out must be above 0 and below .* 3, got 0"),
        (["--held_out", "1", "--crop", "11"], "--crop must be positive and at most 10, .* got 11"),
        (["--data", str(tmp_path / "model" / "model.safetensors")], "--data must be a file that pack wrote, .* train"),
        (["--data", str(tmp_path / "model" / "config.json")], "--data must be a file that pack wrote"),
    ):
        command = ["train", "--data", str(tmp_path / "packed"), "--output", str(tmp_path / "out"), *flags]
        with pytest.raises(ValueError, match=message):
            training.main(command)
    assert not (tmp_path / "out").exists()
    result = subprocess.run([sys.executable, "-m", training.__name__, *command], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("ValueError: --data") and "\n" not in result.stderr[:-1]


def test_a_card_and_figures_of_other_weights_do_not_stay_beside_new_ones(tmp_path):
    training, denoiser = importlib.import_module("ctrl_csc_hf.training.denoiser"), a_denoiser()
    shutil.copytree(Path(__file__).parents[1] / "checkpoints" / "ctrl-csc-denoiser", tmp_path / "model")
    training.save(denoiser, denoiser.state_dict(), tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "denoiser_ctrl_csc.py",
        "model.safetensors",
    }


def test_its_benchmark_prints_a_table(tmp_path, capsys):
    benchmark = importlib.import_module("denoising")
    threads = torch.get_num_threads()
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        photograph(12, 14).save(tmp_path / "images" / split / "0.png")
    a_denoiser().save_pretrained(tmp_path / "denoiser")
    benchmark.main(["--denoiser", str(tmp_path / "denoiser"), "--dataset", str(tmp_path / "images")])
    torch.set_num_threads(threads)
    *_, noisy, denoiser, variation, means = capsys.readouterr().out.strip().splitlines()
    assert noisy.startswith("| noisy image |") and denoiser.startswith("| `CtrlCscDenoiser` |")
    assert variation.startswith("| total variation |") and means.startswith("| non-local means |")
    assert [float(cell) for cell in noisy.split("|")[2:-1]] == pytest.approx([24.6, 20.4, 15.0], abs=0.8)


def test_crops_are_pieces_of_photographs_in_all_eight_positions():
    training = importlib.import_module("ctrl_csc_hf.training.denoiser")
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(30), indexing="ij")
    ramp = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    torch.manual_seed(0)
    crops = training.Crops([ramp, ramp.transpose(1, 2)], 8, torch.device("cpu")).draw(64)
    levels = ((crops + 1) * training.PIXEL_STD).round()
    steps = {
        (int(one[0, 1, 0] - one[0, 0, 0]), int(one[0, 0, 1] - one[0, 0, 0]), int(one[1, 1, 0] - one[1, 0, 0]),
         int(one[1, 0, 1] - one[1, 0, 0]))
        for one in levels
    }  # fmt: skip
    assert {tuple(map(abs, one)) for one in steps} <= {(1, 0, 0, 1), (0, 1, 1, 0)} and len(steps) == 8
    assert levels[:, :2].max() <= 29 and levels.min() == 0
