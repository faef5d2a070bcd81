"""checkpoints/ctrl-csc-cifar10, the Hub folder in this repository."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscPipeline
from ctrl_csc_hf.hub import export
from ctrl_csc_hf.metrics import peak_signal_to_noise_ratio

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "ctrl-csc-cifar10"


def test_code_and_card_in_it_are_what_export_writes_today(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(CHECKPOINT)
    written = export(
        model,
        tmp_path / "out",
        repo_id="ORGANIZATION/ctrl-csc-cifar10",
        checkpoint=CHECKPOINT,
        license="apache-2.0",
        half=True,
    )
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(CHECKPOINT)) for path in CHECKPOINT.rglob("*") if path.is_file())
    for name in names:
        if name.endswith((".py", ".md", ".json")) and name != "config.json":  # which names transformers' version
            assert (written / name).read_text(encoding="utf-8") == (CHECKPOINT / name).read_text(encoding="utf-8"), name


def test_it_is_below_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 25e6


def test_its_card_holds_the_figures_of_its_metrics() -> None:
    card, metrics = (
        (CHECKPOINT / "README.md").read_text(encoding="utf-8"),
        json.loads((CHECKPOINT / "metrics.json").read_text(encoding="utf-8")),
    )
    assert "On `uoft-cs/cifar10`, split test, by training/evaluate.py" in card
    assert f"| PSNR, mean over images, dB | {held_out_psnr(metrics):.2f} | 10000 |" in card


def held_out_psnr(metrics: dict) -> float:
    (value,) = (
        figure["value"]
        for figure in metrics["figures"]
        if (figure["name"], figure["dataset"], figure["split"]) == ("psnr", "uoft-cs/cifar10", "test")
    )
    return value


def test_it_reconstructs_denoises_completes_and_samples() -> None:
    pipe = CtrlCscPipeline.from_pretrained(CHECKPOINT)
    examples = [str(path) for path in sorted(CHECKPOINT.glob("examples/*.png"))]
    images = [Image.open(path) for path in examples]
    ships = [
        pipe.sample(2, label, generator=torch.Generator().manual_seed(0), output_type="pt") for label in ("ship", 8)
    ]
    assert torch.equal(*ships) and ships[0].shape == (2, 3, 32, 32)
    assert len(pipe.denoise(images, noise_std=0.1)) == len(images)
    mask = torch.zeros(32, 32)
    for plain, completed in zip(pipe(images).images, pipe.inpaint(images, mask), strict=True):
        assert plain.tobytes() == completed.tobytes()


def test_its_figures_come_out_again(cifar10: str) -> None:
    from data import ImageSource, load_images, take_images

    source = ImageSource(dataset_name=cifar10, split="test", streaming=True, label_column=None)
    images = take_images(load_images(source), 500, image_column="image", image_size=32)
    with torch.inference_mode():
        reconstructions = AutoModel.from_pretrained(CHECKPOINT).eval()(images).reconstruction
    psnr = peak_signal_to_noise_ratio(images, reconstructions).mean().item()
    metrics = json.loads((CHECKPOINT / "metrics.json").read_text(encoding="utf-8"))
    assert psnr == pytest.approx(held_out_psnr(metrics), abs=0.3)  # of 500 of its 10,000 images
