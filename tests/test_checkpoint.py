"""The models in checkpoints/, Hub folders in this repository."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscPipeline
from ctrl_csc_hf.hub.publishing import export
from ctrl_csc_hf.metrics import peak_signal_to_noise_ratio

FOLDER = Path(__file__).parents[1] / "checkpoints"
CIFAR10, TINY_IMAGENET = ("uoft-cs/cifar10", "test"), ("zh-plus/tiny-imagenet", "valid")
MEASURED_ON = {
    "ctrl-csc-cifar10": CIFAR10, "ctrl-csc-cifar10-512": CIFAR10, "ctrl-csc-tiny-imagenet": TINY_IMAGENET,
}  # fmt: skip
COPIES = {"uoft-cs/cifar10": "CTRL_CSC_CIFAR10", "zh-plus/tiny-imagenet": "CTRL_CSC_TINY_IMAGENET"}
with_each = pytest.mark.parametrize("checkpoint", [FOLDER / name for name in MEASURED_ON], ids=MEASURED_ON)


@with_each
def test_code_and_card_in_it_are_what_export_writes_today(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(checkpoint)
    written = export(
        model,
        tmp_path / "out",
        repo_id=f"checkpoints/{checkpoint.name}",
        checkpoint=checkpoint,
        license=ModelCard.load(checkpoint / "README.md").data.license,
        half=True,
    )
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    for name in names:
        if name.endswith((".py", ".md", ".json")) and name != "config.json":  # which names transformers' version
            assert (written / name).read_text(encoding="utf-8") == (checkpoint / name).read_text(encoding="utf-8"), name


def test_each_is_at_most_16_mebibytes_and_all_are_36() -> None:
    sizes = [sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in FOLDER.iterdir()]
    assert max(sizes) <= 16 * 2**20 and sum(sizes) <= 36 * 2**20


@with_each
def test_its_card_holds_the_figures_of_its_metrics(checkpoint: Path) -> None:
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
    figure = psnr_figure(metrics, checkpoint)
    dataset, split = MEASURED_ON[checkpoint.name]
    assert f"On `{dataset}`, split {split}, by {figure['measured_by']}" in card
    assert f"| PSNR, mean over images, dB | {figure['value']:.2f} | {figure['num_images']} |" in card


def psnr_figure(metrics: dict, checkpoint: Path) -> dict:
    of = ("psnr", *MEASURED_ON[checkpoint.name])
    (figure,) = [f for f in metrics["figures"] if (f["name"], f["dataset"], f["split"]) == of]
    return figure


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
def test_its_figures_come_out_again(checkpoint: Path) -> None:
    from ctrl_csc_hf.training.data import ImageSource, load_images, take_images

    dataset, split = MEASURED_ON[checkpoint.name]
    copy = os.environ.get(COPIES[dataset])
    if not copy:
        pytest.skip(f"{COPIES[dataset]} names no local copy of {dataset}")
    model = AutoModel.from_pretrained(checkpoint).eval()
    source = ImageSource(dataset_name=copy, split=split, streaming=True, label_column="none")
    images = take_images(load_images(source), 400, image_column="image", image_size=model.config.image_size)
    with torch.inference_mode():
        psnr = [peak_signal_to_noise_ratio(batch, model(batch).reconstruction) for batch in images.split(100)]
    figure = psnr_figure(json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8")), checkpoint)
    assert torch.cat(psnr).mean().item() == pytest.approx(figure["value"], abs=0.4)  # of 400 of its images
