"""checkpoints/ctrl-csc-cifar10 and ctrl-csc-cifar10-512, Hub folders in this repository."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscPipeline
from ctrl_csc_hf.hub.publishing import export
from ctrl_csc_hf.metrics import peak_signal_to_noise_ratio

FOLDER = Path(__file__).parents[1] / "checkpoints"
CHECKPOINTS = [FOLDER / "ctrl-csc-cifar10", FOLDER / "ctrl-csc-cifar10-512"]
with_each = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=[path.name for path in CHECKPOINTS])


@with_each
def test_code_and_card_in_it_are_what_export_writes_today(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(checkpoint)
    written = export(
        model,
        tmp_path / "out",
        repo_id=f"ORGANIZATION/{checkpoint.name}",
        checkpoint=checkpoint,
        license="apache-2.0",
        half=True,
    )
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    for name in names:
        if name.endswith((".py", ".md", ".json")) and name != "config.json":  # which names transformers' version
            assert (written / name).read_text(encoding="utf-8") == (checkpoint / name).read_text(encoding="utf-8"), name


def test_each_is_at_most_16_megabytes_and_all_are_32() -> None:
    sizes = [sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in FOLDER.iterdir()]
    assert max(sizes) <= 16e6 and sum(sizes) <= 32e6


@with_each
def test_its_card_holds_the_figures_of_its_metrics(checkpoint: Path) -> None:
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
    (figure,) = psnr_figures(metrics)
    assert f"On `uoft-cs/cifar10`, split test, by {figure['measured_by']}" in card
    assert f"| PSNR, mean over images, dB | {figure['value']:.2f} | {figure['num_images']} |" in card


def psnr_figures(metrics: dict) -> list[dict]:
    of = ("psnr", "uoft-cs/cifar10", "test")
    return [f for f in metrics["figures"] if (f["name"], f["dataset"], f["split"]) == of]


def test_it_reconstructs_denoises_completes_and_samples() -> None:
    checkpoint = FOLDER / "ctrl-csc-cifar10-512"  # the one with a sampler
    pipe = CtrlCscPipeline.from_pretrained(checkpoint)
    examples = [str(path) for path in sorted(checkpoint.glob("examples/*.png"))]
    images = [Image.open(path) for path in examples]
    ships = [
        pipe.sample(2, label, generator=torch.Generator().manual_seed(0), output_type="pt") for label in ("ship", 8)
    ]
    assert torch.equal(*ships) and ships[0].shape == (2, 3, 32, 32)
    assert len(pipe.denoise(images, noise_std=0.1)) == len(images)
    mask = torch.zeros(32, 32)
    for plain, completed in zip(pipe(images).images, pipe.inpaint(images, mask), strict=True):
        assert plain.tobytes() == completed.tobytes()


@with_each
def test_its_figures_come_out_again(checkpoint: Path, cifar10: str) -> None:
    from ctrl_csc_hf.training.data import ImageSource, load_images, take_images

    source = ImageSource(dataset_name=cifar10, split="test", streaming=True, label_column=None)
    images = take_images(load_images(source), 500, image_column="image", image_size=32)
    with torch.inference_mode():
        reconstructions = AutoModel.from_pretrained(checkpoint).eval()(images).reconstruction
    psnr = peak_signal_to_noise_ratio(images, reconstructions).mean().item()
    (figure,) = psnr_figures(json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8")))
    assert psnr == pytest.approx(figure["value"], abs=0.3)  # of 500 of its images
