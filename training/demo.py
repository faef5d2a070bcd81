"""`make demo`: trains on scikit-learn's handwritten digits in a few minutes and reconstructs digits never seen.

The digits become a local data set, in Parquet, and train.py does the rest with the preset configs/demo.yaml. Flags
of train.py override that; `python training/demo.py --output_dir FOLDER` writes elsewhere than into demo/.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from settings import parse_settings
from sklearn.datasets import load_digits
from train import main as train

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.metrics import FeatureMoments, frechet_distance, peak_signal_to_noise_ratio
from ctrl_csc_hf.visualization import reconstruction_grid

TRAINING_DIGITS = 1500  # the first ones of the 1,797; the other 297 are held out
SHOWN = 40


def write_digits(folder: Path) -> None:
    """The digits as train-*.parquet and test-*.parquet, 8x8 grey PNGs with labels."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}, features
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows.select(range(TRAINING_DIGITS)).to_parquet(folder / "train-00000-of-00001.parquet")
    rows.select(range(TRAINING_DIGITS, len(rows))).to_parquet(folder / "test-00000-of-00001.parquet")


def read_digits(folder: Path, split: str) -> torch.Tensor:
    """(n, 3, 8, 8), pixels in [-1, 1]."""
    parquet = folder / f"{split}-00000-of-00001.parquet"
    rows = datasets.Dataset.from_parquet(str(parquet), cache_dir=str(folder / "cache"))
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in rows["image"]])
    return (pixels.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
