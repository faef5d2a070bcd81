"""`make demo`: trains on scikit-learn's handwritten digits for minutes, then reconstructs digits it has not seen.

The digits become a local data set in Parquet, and train.py does the rest with the preset demo.yaml beside this file.
`python training/demo.py --folder DEMO` writes into another folder; all other flags go to train.py.
"""

if __name__ == "__main__":
    import startup  # noqa: F401

import argparse
import json
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.inspection.visualization import reconstruction_grid
from ctrl_csc_hf.latents.encoding import find_data
from ctrl_csc_hf.metrics import FeatureMoments, frechet_distance, peak_signal_to_noise_ratio
from ctrl_csc_hf.training.run import one_line_errors
from ctrl_csc_hf.training.settings import parse_settings
from ctrl_csc_hf.training.train import main as train

TRAINING_DIGITS = 1500  # of the 1,797, drawn at random; the others are held out
SHOWN = 40  # of those
PRESET = Path(__file__).with_name("demo.yaml")
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "ctrl-csc-cifar10-512"


def write_digits(folder: Path) -> None:
    """The digits as grey 8x8 images with labels: folder/train.parquet and folder/test.parquet."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows.shuffle(seed=0)
    rows.select(range(TRAINING_DIGITS)).to_parquet(folder / "train.parquet")
    rows.select(range(TRAINING_DIGITS, len(rows))).to_parquet(folder / "test.parquet")


def read_digits(folder: Path, split: str) -> Tensor:
    """What `write_digits` wrote, as pixels in [-1, 1], (n, 3, 8, 8)."""
    rows = datasets.load_dataset(**find_data(str(folder)), split=split, streaming=True)
    pixels = np.stack([np.array(row["image"].convert("RGB")) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def pixel_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance of two sets of images (n, C, H, W), their pixels taken as features."""
    moments = []
    for images in (first, second):
        moments.append(FeatureMoments(images[0].numel()))
        moments[-1].update(images.flatten(1))
    return frechet_distance(*moments)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    arguments, flags = parser.parse_known_args()
    folder = arguments.folder
    data = folder / "data"

    datasets.disable_progress_bars()
    write_digits(data)
    paths = {"train_data_dir": data, "cache_dir": folder / "cache", "output_dir": folder / "model"}
    path_flags = [f"--{name}={path}" for name, path in paths.items()]
    settings, config = parse_settings(["--config", str(PRESET), *path_flags, *flags])
    start = time.perf_counter()
    output_dir = train(settings, config)
    minutes = (time.perf_counter() - start) / 60

    model = CtrlCscModel.from_pretrained(output_dir).eval()
    held_out = read_digits(data, "test")
    mean_image = read_digits(data, "train").mean(dim=0).expand_as(held_out)
    with torch.no_grad():
        reconstructions = model(held_out, return_dict=True).reconstruction
        examples = [Image.open(path) for path in sorted(CHECKPOINT.glob("examples/*.png"))]
        photographs = CtrlCscImageProcessor.from_pretrained(CHECKPOINT)(examples, return_tensors="pt").pixel_values
        of_photographs = CtrlCscModel.from_pretrained(CHECKPOINT).eval()(photographs).reconstruction
    save_enlarged(folder / "reconstructions.png", held_out, reconstructions, 8)
    save_enlarged(folder / "photographs.png", photographs, of_photographs, 4)
    shutil.copy(output_dir / "training_curve.png", folder)

    records = json.loads((output_dir / "history.json").read_text(encoding="utf-8"))
    before, *_, after = (record for record in records if "held_out_psnr" in record)
    mean_psnr = peak_signal_to_noise_ratio(held_out, mean_image).mean()
    distance, mean_distance = (pixel_distance(held_out, images) for images in (reconstructions, mean_image))
    print(f"""
{settings.max_train_steps} steps of the game in {minutes:.1f} minutes; on {len(held_out)} held-out digits:

                             before      after    mean image
PSNR                       {before["held_out_psnr"]:5.2f} dB   {after["held_out_psnr"]:5.2f} dB      {mean_psnr:5.2f} dB
nearest latent their own      {before["held_out_match"]:4.0%}       {after["held_out_match"]:4.0%}
Fréchet distance, pixels                 {distance:5.1f}         {mean_distance:5.1f}

{folder / "reconstructions.png"}: held-out digits above their reconstructions
{folder / "training_curve.png"}: rates, match and PSNR over the steps
{output_dir}: the checkpoint, for AutoModel.from_pretrained
{folder / "photographs.png"}: CIFAR-10 test images above what {CHECKPOINT.name} makes of them, trained before""")


def save_enlarged(path: Path, originals: Tensor, reconstructions: Tensor, scale: int) -> None:
    """Originals above reconstructions, enlarged smoothly: the eye reads blocks badly."""
    shown = [
        F.interpolate(images[:SHOWN], scale_factor=scale, mode="bicubic") for images in (originals, reconstructions)
    ]
    reconstruction_grid(*shown).save(path)


if __name__ == "__main__":
    with one_line_errors():
        main()
