"""checkpoints/ctrl-csc-denoiser, the Hub folder in this repository."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscDenoiser
from ctrl_csc_hf.models import denoiser_ctrl_csc

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "ctrl-csc-denoiser"


@pytest.fixture(scope="module")
def denoiser() -> CtrlCscDenoiser:
    return CtrlCscDenoiser.from_pretrained(CHECKPOINT).eval()


def shapes() -> torch.Tensor:
    """A picture of edges and slopes (1, 3, 75, 110), pixels in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(75.0), torch.arange(110.0), indexing="ij")
    disc = ((y - 35) ** 2 + (x - 50) ** 2 < 25**2).float()
    return torch.stack([disc - 0.5, x / 110 - disc / 2, 0.6 * torch.sin(x / 6) * (y > 20)])[None]


def psnr(images: torch.Tensor, clean: torch.Tensor) -> float:
    return -10 * ((images - clean) / 2).square().mean().log10().item()


def test_its_code_is_the_packages_and_its_figures_are_on_the_card(denoiser):
    code = Path(denoiser_ctrl_csc.__file__).read_text(encoding="utf-8")
    assert (CHECKPOINT / "denoiser_ctrl_csc.py").read_text(encoding="utf-8") == code
    figures = json.loads((CHECKPOINT / "denoiser.json").read_text(encoding="utf-8"))
    row = " | ".join(f"{figures[f'PSNR at {level} of 68']:.2f}" for level in (15, 25, 50))
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    assert f"| this denoiser | {row} |" in card
    assert f"{sum(p.numel() for p in denoiser.parameters()):,} parameters" in card
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 1.2e6


def test_the_hub_shows_no_snippet_of_a_pipeline_and_the_one_that_it_shows_runs():
    """transformers 5 has no pipeline for image-to-image; without a task the Hub shows AutoModel alone."""
    card = ModelCard.load(CHECKPOINT / "README.md").data
    assert card.get("library_name") == "transformers" and card.pipeline_tag is None
    assert not set(card.tags) & {"image-to-image", "diffusers"}
    loaded = AutoModel.from_pretrained(CHECKPOINT, trust_remote_code=True, device_map="auto")
    assert loaded.denoise(shapes().to(loaded.device), 0.2).isfinite().all()


@pytest.mark.parametrize("level", [15, 25, 50])
def test_it_removes_most_of_the_noise(denoiser, level):
    noise_std = level / 127.5
    noisy = shapes() + noise_std * torch.randn(shapes().shape, generator=torch.Generator().manual_seed(0))
    assert psnr(denoiser.denoise(noisy, noise_std), shapes()) > psnr(noisy, shapes()) + 8


def test_without_noise_the_image_is_nearly_unchanged(denoiser):
    assert psnr(denoiser.denoise(shapes(), 1e-5), shapes()) > 75


def test_it_completes_missing_pixels(denoiser):
    missing = torch.rand(1, 1, 75, 110, generator=torch.Generator().manual_seed(0)) < 0.5
    missing[:, :, 30:40, 70:80] = True
    completed = denoiser.inpaint(shapes().where(~missing, 7.0), missing)
    assert psnr(completed, shapes()) > 25
    assert torch.equal(completed.where(~missing, 0), shapes().where(~missing, 0))


def test_tiles_leave_no_seams(denoiser, monkeypatch):
    noisy = shapes() + 0.2 * torch.randn(shapes().shape, generator=torch.Generator().manual_seed(0))
    whole = denoiser.denoise(noisy, 0.2)
    monkeypatch.setattr(denoiser_ctrl_csc, "TILE", 32)
    assert (denoiser.denoise(noisy, 0.2) - whole).abs().max() < 2 / 255
