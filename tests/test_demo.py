"""`make demo` in a short form."""

import os
import subprocess
import sys
from pathlib import Path

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
    """The folder of a demo of 150 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    short = ["--max_train_steps", "150", "--lr_scheduler", "constant"]
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
    digits = torch.from_numpy(load_digits().images).float() / 8 - 1
    training, held_out = digits[:, None].expand(-1, 3, -1, -1).split([1500, 297])
    model = AutoModel.from_pretrained(demo[0] / "model").eval()
    output = model(held_out, output_reconstructed_latents=True)

    cosines = output.reconstructed_latents @ output.latents.T
    match = (cosines.argmax(dim=1) == torch.arange(len(held_out))).float().mean()
    assert match > 0.5
    assert psnr(held_out, output.reconstruction) > psnr(held_out, training.mean(dim=0))


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Mean over images, in dB."""
    error = (images - reconstructions).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()
