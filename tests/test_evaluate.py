"""training/evaluate.py against scikit-learn's PCA and the definitions, and the rivals it measures."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image
from sklearn.decomposition import PCA
from transformers import ResNetConfig, ResNetForImageClassification


@pytest.fixture
def evaluate() -> ModuleType:
    return load_script("evaluate")


@pytest.fixture
def settings(evaluate: ModuleType, image_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def fill(**changes: Any) -> Any:
        options = {
            "train_data_dir": str(image_folder),
            "num_images": 40,
            "num_frechet_images": 6,
            "num_probe_images": 60,
            "output_dir": str(tmp_path / "evaluation"),
        }
        return evaluate.EvaluationSettings(**options | changes)

    return fill


def classifier(folder: Path) -> str:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder)
    return str(folder)


def autoencoder_of_diffusers(folder: Path) -> str:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=[4], norm_num_groups=2, latent_channels=2, sample_size=16).save_pretrained(folder)
    return str(folder)


def test_evaluation_measures_the_model_and_its_rivals_on_the_same_images(
    evaluate: ModuleType,
    settings: Callable[..., Any],
    train: Callable[..., Path],
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    model = train("--max_train_steps", "1")
    written_by_train = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    convolutional = train("--max_train_steps", "1", "--encoder", "convolution", output="convolutional")
    kl = autoencoder_of_diffusers(tmp_path / "kl")
    results = evaluate.main(
        settings(
            model=str(model),
            rivals=[f"ordinary convolutions={convolutional}"],
            diffusers_autoencoders=[kl],
            feature_model=classifier(tmp_path / "resnet"),
            feature_size=32,
            unseen_dataset_name=str(image_folder),
            unseen_split="train",
            num_unseen_images=20,
            output_dir=str(model),
        )
    )
    assert list(results) == ["CTRL-CSC", "ordinary convolutions", kl, "PCA, 8 numbers", "mean image"]
    table = capsys.readouterr().out
    assert "|  | CTRL-CSC | ordinary convolutions |" in table
    assert f"| psnr | {results['CTRL-CSC']['psnr']:.4g} |" in table

    saved = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    assert saved["evaluation"]["results"] == results
    assert saved["held_out_psnr"] == results["CTRL-CSC"]["psnr"]
    assert saved["held_out_images"] == 40
    assert written_by_train.keys() < saved.keys()
    for name in ("reconstructions", "rivals", "neighbours", "correlations"):
        assert Image.open(model / f"{name}.png").width > 100

    from data import take_images

    images = take_images(evaluate.source(settings(model=""), "train", None), 80, image_column="image", image_size=16)
    pixels = images.flatten(1).double().numpy()
    pca = PCA(8).fit(pixels)
    error = pixels[:40] - pca.inverse_transform(pca.transform(pixels[:40])).clip(-1, 1)
    expected = np.mean(10 * np.log10(4 / (error**2).mean(axis=1)))
    assert results["PCA, 8 numbers"]["psnr"] == pytest.approx(expected, abs=0.01)
    error = pixels[:40] - pixels.mean(axis=0)
    assert results["mean image"]["psnr"] == pytest.approx(np.mean(10 * np.log10(4 / (error**2).mean(axis=1))), abs=0.01)
    assert results["PCA, 8 numbers"]["match@40"] > 0.9
    assert results["PCA, 8 numbers"]["frechet_distance"] < results["mean image"]["frechet_distance"]
    # The unseen images are the first of the seen ones here.
    for figures in results.values():
        assert figures["unseen_psnr"] == figures["seen_psnr"]
    assert "nonzero_1" in results["CTRL-CSC"] and "nonzero_1" not in results["ordinary convolutions"]
    assert (
        "rate" in results["CTRL-CSC"] and "rate" not in results["PCA, 8 numbers"]
    )  # whose latents are no unit vectors
    assert 0 <= results["CTRL-CSC"]["linear_probe"] <= 1 and "linear_probe" not in results["mean image"]


def test_images_without_labels_are_measured_too(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path]
) -> None:
    figures = evaluate.main(settings(model=str(train("--max_train_steps", "1")), label_column="none"))["CTRL-CSC"]
    assert "psnr" in figures and "linear_probe" not in figures


def test_the_nearest_training_images_of_training_images_are_themselves(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path]
) -> None:
    from autoencoders import autoencoder, load_model
    from data import take_images

    options = settings(model="")
    ours = autoencoder(load_model(str(train("--max_train_steps", "1")), "cpu"))
    images = take_images(evaluate.source(options, "train", None), 80, image_column="image", image_size=16)
    with torch.inference_mode():
        z = ours.encode(images)
        neighbours, cosines = evaluate.nearest_training_images(ours, z, options, 16, torch.device("cpu"))
    torch.testing.assert_close(neighbours[:, 0], images)
    expected = (z @ z.T).sort(descending=True).values[:, : evaluate.NEIGHBOURS]
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rival", ["path", "=path", "CTRL-CSC=path", "name="])
def test_a_rival_without_a_name_of_its_own_is_refused(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path], rival: str
) -> None:
    with pytest.raises(ValueError, match="rivals must be NAME=PATH"):
        evaluate.main(settings(model=str(train("--max_train_steps", "1")), rivals=[rival]))


def test_what_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    from autoencoders import diffusers_autoencoder, load_model

    with pytest.raises(ValueError, match=r"must hold a model of train\.py, got ResNet"):
        load_model(classifier(tmp_path / "resnet"), "cpu")
    with pytest.raises(ValueError, match="must hold an autoencoder of diffusers"):
        diffusers_autoencoder(str(tmp_path), "cpu")
