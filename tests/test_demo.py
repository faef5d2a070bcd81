"""`make demo` in a short form."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import AutoModel

import ctrl_csc_hf  # noqa: F401  registers the model with AutoModel

DEMO = Path(__file__).parents[1] / "training" / "demo.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo of few steps, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    short = ["--energy_warmup_steps", "50", "--deconvolution_warmup_steps", "100", "--max_train_steps", "50"]
    command = [sys.executable, str(DEMO), "--folder", str(folder), *short]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def test_the_demo_writes_its_pictures_and_says_where(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for name in ("reconstructions.png", "training_curve.png", "photographs.png"):
        assert str(folder / name) in printed
        assert min(Image.open(folder / name).size) > 200
    assert str(folder / "model") in printed


@torch.no_grad()
def test_held_out_digits_are_matched_and_beat_the_mean_image(demo: tuple[Path, str]) -> None:
    training, held_out = (pixels(demo[0] / "data" / f"{split}.parquet") for split in ("train", "test"))
    digits = torch.from_numpy(load_digits().images).float() / 8 - 1
    assert len(training) == 1500 and len(held_out) == 297
    together = torch.cat([training, held_out])[:, 0].flatten(1)
    for pixel in (20, 29, 43):  # the same digits, in another order
        torch.testing.assert_close(
            together[:, pixel].sort().values, digits.flatten(1)[:, pixel].sort().values, atol=0.01, rtol=0
        )
    model = AutoModel.from_pretrained(demo[0] / "model").eval()
    output = model(held_out, output_reconstructed_latents=True)

    cosines = output.reconstructed_latents @ output.latents.T
    match = (cosines.argmax(dim=1) == torch.arange(len(held_out))).float().mean()
    assert match > 0.5
    assert psnr(held_out, output.reconstruction) > psnr(held_out, training.mean(dim=0))


def pixels(path: Path) -> Tensor:
    """Of a Parquet file: (n, 3, 8, 8), in [-1, 1]."""
    rows = [np.asarray(image.convert("RGB")) for image in datasets.Dataset.from_parquet(str(path))["image"]]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Mean over images, in dB."""
    error = (images - reconstructions).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()
