"""The loader alone, at 64 pixels from JPEGs of ImageNet's usual size: training's ImageStream against the plain path.

The rival is what a script of `datasets` and PIL does: the shuffled stream decodes whole images, each is resized and its
centre cut out, and a DataLoader stacks them. Both run in one process on one core, without augmentation.
"""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import skimage.data
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from ctrl_csc_hf.training.data import ImageSource, load_images
from ctrl_csc_hf.training.stream import ImageLoader, ImageStream

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "cat")
WIDTH, HEIGHT, QUALITY = 500, 375, 95  # some 80 kB each
SHARDS = 4
IMAGE_SIZE, BATCH_SIZE, SHUFFLE_BUFFER = 64, 64, 64


def write_photographs(folder: Path, count: int) -> None:
    """Crops of scikit-image's photographs as JPEGs, in Parquet files."""
    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    generator = np.random.default_rng(0)
    encoded = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        scale = generator.uniform(0.7, 1) * min(photograph.width / WIDTH, photograph.height / HEIGHT)
        left, top = generator.uniform(0, (photograph.width - scale * WIDTH, photograph.height - scale * HEIGHT))
        box = (left, top, left + scale * WIDTH, top + scale * HEIGHT)
        file = BytesIO()
        photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box).save(file, "JPEG", quality=QUALITY)
        encoded.append({"bytes": file.getvalue(), "path": None})
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        rows = datasets.Dataset.from_dict(
            {"image": encoded[shard::SHARDS]}, datasets.Features({"image": datasets.Image()})
        )
        rows.to_parquet(str(folder / f"train-{shard}.parquet"))


def our_loader(folder: Path) -> Callable[[], int]:
    """One epoch -> number of images."""
    source = ImageSource(train_data_dir=str(folder), streaming=True, label_column="none")

    def epoch() -> int:
        stream = ImageStream(
            load_images(source), image_column="image", label_column=None, image_size=IMAGE_SIZE, augmentation="none",
            shuffle_buffer=SHUFFLE_BUFFER, seed=0,
        )  # fmt: skip
        loader = ImageLoader(stream, batch_size=BATCH_SIZE, num_workers=0)
        return sum(len(batch["pixels"]) for batch in loader.epoch())

    return epoch


def plain_loader(folder: Path) -> Callable[[], int]:
    """One epoch -> number of images."""

    def epoch() -> int:
        images = datasets.load_dataset(str(folder), split="train", streaming=True)
        loader = DataLoader(_Plain(images.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)), batch_size=BATCH_SIZE)
        return sum(len(batch) for batch in loader)

    return epoch


class _Plain(IterableDataset):
    def __init__(self, rows: datasets.IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        for row in self.rows:
            image = row["image"].convert("RGB")
            scale = IMAGE_SIZE / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
            left, top = (image.width - IMAGE_SIZE) // 2, (image.height - IMAGE_SIZE) // 2
            image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
            yield torch.from_numpy(np.array(image)).permute(2, 0, 1)
