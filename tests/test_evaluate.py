"""training/evaluate.py against scikit-learn's PCA and the definitions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image
from sklearn.decomposition import PCA
from transformers import ResNetConfig, ResNetModel


def test_evaluation_prints_and_writes_the_model_beside_pca_and_the_mean_image(
    train: Callable[..., Path], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    evaluate = load_script("evaluate")
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(resnet).save_pretrained(tmp_path / "resnet")
    settings = evaluate.EvaluationSettings(
        model=str(train("--max_train_steps", "1")),
        train_data_dir=str(image_folder),
        split="train",
        num_images=40,
        num_frechet_images=30,
        feature_model=str(tmp_path / "resnet"),
        feature_size=32,
        output_dir=str(tmp_path / "evaluation"),
    )
    results = evaluate.main(settings)
    assert "| PCA, 8 numbers |" in capsys.readouterr().out
    saved = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert saved["CTRL-CSC"] == results["CTRL-CSC"]
    assert Image.open(tmp_path / "evaluation" / "reconstructions.png").width > 100

    from data import take_images

    images = take_images(evaluate.source(settings, "train"), 80, image_column="image", image_size=16)
    pixels = images.flatten(1).double().numpy()
    pca = PCA(8).fit(pixels)
    error = pixels[:40] - pca.inverse_transform(pca.transform(pixels[:40])).clip(-1, 1)
    expected = np.mean(10 * np.log10(4 / (error**2).mean(axis=1)))
    assert results["PCA, 8 numbers"]["PSNR"] == pytest.approx(expected, abs=0.01)
    error = pixels[:40] - pixels.mean(axis=0)
    assert results["mean image"]["PSNR"] == pytest.approx(np.mean(10 * np.log10(4 / (error**2).mean(axis=1))), abs=0.01)
    assert results["PCA, 8 numbers"]["match@40"] > 0.9
    assert results["PCA, 8 numbers"]["Fréchet distance"] < results["mean image"]["Fréchet distance"]
