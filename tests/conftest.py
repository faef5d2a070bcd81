"""What several test files need: the benchmarks on the path, tiny image folders, a run of train.py."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TRAINING = Path(__file__).parents[1] / "training"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

# A command of a test is interrupted as in a terminal, also where the shell that began the tests ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Images of `parquet_folder`
SIZE = 8
NUM_IMAGES = 23
BROKEN = 5
READABLE = [index for index in range(NUM_IMAGES) if index != BROKEN]

TINY_PRESET = """
model:
  image_size: 16
  latent_dim: 8
  stage_channels: [8, 8]
  kernel_sizes: [4, 4, 4]
  strides: [2, 2, 1]
  paddings: [1, 1, 0]
training:
  train_batch_size: 16
  num_validation_images: 16
  max_train_steps: 4
  validation_steps: 2
  checkpointing_steps: 2
  logging_steps: 1
  lr_scheduler: constant
  report_to: none
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests first: theirs are whole runs, the longest, and would keep one of the processes to the end."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


@pytest.fixture
def tiny_preset(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_PRESET, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images of 20x16 pixels, coloured gradients, in two class folders."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:16, 0:20] / 20
    for index in range(80):
        colors = generator.random((3, 3))
        pixels = colors[0] + rows[..., None] * (colors[1] - 0.5) + columns[..., None] * (colors[2] - 0.5)
        path = folder / "train" / f"class{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(path)
    return folder


def random_image(index: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, path: Path, **options: Any) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


@pytest.fixture(scope="session")
def parquet_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of PNGs, labelled by their number; one of them is cut short."""
    import datasets

    root = tmp_path_factory.mktemp("parquet")
    scratch = tmp_path_factory.mktemp("scratch") / "image.png"
    data = [encoded(random_image(index), scratch) for index in range(NUM_IMAGES)]
    data[BROKEN] = data[BROKEN][:60]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "caption": datasets.Value("string")}
    )
    for shard, indices in enumerate(np.array_split(np.arange(NUM_IMAGES), 3)):
        rows = {
            "image": [{"bytes": data[index], "path": f"{index}.png"} for index in indices],
            "label": indices.tolist(),
            "caption": ["noise"] * len(indices),
        }
        shard_path = root / f"train-{shard:05d}-of-00003.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(shard_path))
    return str(root)


@pytest.fixture
def train(tiny_preset: Path, image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """train("--flag", "value", ..., output="name") runs train.py's main in this process on the image folder."""
    for needed in ("accelerate", "datasets"):  # which tests/test_cuda.py may have to do without
        pytest.importorskip(needed)
    from accelerate.state import AcceleratorState

    from ctrl_csc_hf.training.settings import parse_settings
    from ctrl_csc_hf.training.train import main

    def run(*flags: str, output: str = "model", data: Path = image_folder) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = [
            "--config",
            str(tiny_preset),
            "--train_data_dir",
            str(data),
            "--output_dir",
            str(tmp_path / output),
        ]
        return main(*parse_settings([*arguments, "--cache_dir", str(tmp_path / "cache"), *flags]))

    return run


@pytest.fixture
def cifar10() -> str:
    folder = os.environ.get("CTRL_CSC_CIFAR10")
    if not folder:
        pytest.skip("CTRL_CSC_CIFAR10 names no local copy of CIFAR-10")
    return folder
