"""Images for training: any source of `datasets`, decoded here, divided over processes and loader workers."""

import hashlib
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ctrl_csc_hf.image_processing_ctrl_csc import CtrlCscImageProcessor

logger = logging.getLogger(__name__)

# datasets 5 sleeps 5 s after every shuffled epoch of Parquet files, against a crash of Arrow at the exit of
# programs that leave a stream half read; here every epoch has an owner that closes it first.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0

Augmentation = Literal["none", "flip", "crop_and_flip"]
ImageDataset = datasets.Dataset | datasets.IterableDataset

AUGMENTATIONS = ("none", "flip", "crop_and_flip")
RESAMPLE = CtrlCscImageProcessor.resample
CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
ROWS_AT_ONCE = 32  # read together from Arrow, several times as fast as one by one


@dataclass(frozen=True)
class ImageSource:
    """Where images come from.

    Args:
        dataset_name: a Hub id, or a local folder that `datasets.load_dataset` reads.
        dataset_config_name: its configuration.
        train_data_dir: a local folder of images, whose class folders become labels, or of Parquet files; with
            `dataset_name`, the `data_dir` of that data set.
        split: name of the split.
        streaming: read the source as it comes, instead of preparing it on disk first.
        image_column: column of the images.
        label_column: column of the labels, integers; None for images without labels.
        cache_dir: where `datasets` keeps what it prepares.

    Raises:
        ValueError: if there is neither `dataset_name` nor `train_data_dir`.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    split: str = "train"
    streaming: bool = False
    image_column: str = "image"
    label_column: str | None = "label"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_data_dir is None:
            raise ValueError("dataset_name or train_data_dir must be given, got neither")


def load_images(source: ImageSource) -> ImageDataset:
    """The rows of a source, images not yet decoded.

    Raises:
        ValueError: if a folder, split or column does not exist, or a column holds something else.
    """
    if source.dataset_name is None:
        if not Path(source.train_data_dir).is_dir():
            raise ValueError(f"train_data_dir must be a folder, got {source.train_data_dir!r}")
        path, data_dir = source.train_data_dir, None
    else:
        path, data_dir = source.dataset_name, source.train_data_dir
    dataset = datasets.load_dataset(
        path,
        source.dataset_config_name,
        data_dir=data_dir,
        split=source.split,
        streaming=source.streaming,
        cache_dir=source.cache_dir,
    )
    return _undecoded(dataset, source.image_column, source.label_column)


class ImageStream(IterableDataset):
    """Decoded images of a data set, one pass an epoch, divided over processes and a `DataLoader`'s workers.

    Every image is seen exactly once an epoch by one worker of one process, whatever their numbers. The order
    is a pure function of seed, epoch and the numbers of processes and workers. A map-style data set is mixed
    as a whole. A streamed one is shuffled by `datasets`: the order of its shards, then a buffer of images.

    An image that cannot be read is skipped, logged and counted.

    Args:
        dataset: what `load_images` gives.
        image_column: column of the images.
        label_column: column of the labels, or None.
        image_size: side of the square results, in pixels.
        augmentation: "none"; "flip", left to right for half of the images; or "crop_and_flip", that and a
            crop of half to all of the area. Drawn from seed, epoch and position, not from a global generator.
        shuffle: another order in every epoch, instead of that of the source.
        shuffle_buffer: images in the buffer of a streamed data set, in each worker.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.

    Yields:
        dicts of `pixel_values`, uint8 (3, image_size, image_size); `label`, int, if there are labels; and
        `unreadable`, the number of images skipped just before this one, and just after it if it is the last.

    Raises:
        ValueError: for a column that does not exist or holds something else, an empty data set, and arguments
            other than the above.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        image_column: str,
        label_column: str | None,
        image_size: int,
        augmentation: Augmentation,
        shuffle: bool,
        shuffle_buffer: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation must be one of {AUGMENTATIONS}, got {augmentation!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank={rank} and world_size={world_size}")
        dataset = _undecoded(dataset, image_column, label_column)
        if isinstance(dataset, datasets.IterableDataset):
            if shuffle:
                dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer)
            dataset = split_dataset_by_node(dataset, rank, world_size)
        elif len(dataset) == 0:
            raise ValueError("the data set is empty: there must be at least one image")
        self.dataset = dataset
        self.image_column = image_column
        self.label_column = label_column
        self.image_size = image_size
        self.augmentation = augmentation
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentation of the passes that start from now on."""
        self._epoch.fill_(epoch)
        if self.shuffle and isinstance(self.dataset, datasets.IterableDataset):
            self.dataset.set_epoch(epoch)  # in shared memory as well

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = int(self._epoch)
        last, skipped = None, 0
        for position, row in self._rows(epoch):
            image = _open(row[self.image_column], self.image_size, position[-1])
            if image is None:
                skipped += 1
                continue
            if last is not None:
                yield last
            pixels = self._augmented(image, random.Random(f"{self.seed} {epoch} {position}"))
            last, skipped = _example(pixels, row, self.label_column, skipped), 0
        if last is not None:
            last["unreadable"] += skipped
            yield last

    def _rows(self, epoch: int) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
        """Rows of this process and worker, and what tells each from all others of the epoch."""
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if isinstance(self.dataset, datasets.IterableDataset):
            # In a worker this gives the worker's shards alone, although it is not the DataLoader's data set.
            for position, row in enumerate(self.dataset):
                yield (self.rank, index, position), row
        else:
            order = np.arange(len(self.dataset))
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch)).permutation(order)
            order = order[self.rank :: self.world_size][index::count]
            for start in range(0, len(order), ROWS_AT_ONCE):
                positions = order[start : start + ROWS_AT_ONCE].tolist()
                columns = self.dataset[positions]
                for offset, position in enumerate(positions):
                    yield (position,), {name: values[offset] for name, values in columns.items()}

    def _augmented(self, image: Image.Image, generator: random.Random) -> Image.Image:
        """An RGB image of any size, augmented, as a square one."""
        if self.augmentation == "crop_and_flip":
            box = _random_box(image.size, generator)
            image = image.resize((self.image_size, self.image_size), RESAMPLE, box)
        else:
            image = _square(image, self.image_size)
        if self.augmentation != "none" and generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of what `ImageStream` yields.

    Returns:
        `pixel_values`, float32 (n, 3, image_size, image_size) in [-1, 1], what the image processor gives for
        the same 8-bit pixels, up to rounding; `labels`, int64 (n,), if there are labels; `unreadable`, int.
    """
    pixels = torch.stack([example["pixel_values"] for example in examples])
    batch: dict[str, Any] = {
        "pixel_values": pixels.float().div_(127.5).sub_(1),
        "unreadable": sum(example["unreadable"] for example in examples),
    }
    if "label" in examples[0]:
        batch["labels"] = torch.tensor([example["label"] for example in examples])
    return batch


class ImageLoader(DataLoader):
    """A `DataLoader` for which an epoch without a batch is an error, lest a training loop wait for ever.

    Raises:
        ValueError: at the end of such an epoch.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        is_empty = True
        for batch in super().__iter__():
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError(
                f"an epoch gave no batch of {self.batch_size} images: the data set is empty, none of its "
                "images can be read (see the warnings), or drop_last leaves no whole batch to any of "
                f"{max(1, self.num_workers)} workers"
            )


def build_dataloader(stream: ImageStream, *, batch_size: int, num_workers: int, drop_last: bool) -> ImageLoader:
    """Batches of a stream, see `collate`. As the stream divides itself over processes, Accelerate must not.

    Every worker fills batches of its own: with `drop_last`, each may leave out some images of an epoch.
    """
    return ImageLoader(
        stream,
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=drop_last,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def take_images(
    dataset: ImageDataset, count: int, *, image_column: str, label_column: str | None, image_size: int
) -> dict[str, Any]:
    """The first `count` readable images, or all if there are fewer, not augmented, as one batch of `collate`.

    Raises:
        ValueError: for a column that does not exist or holds something else, and if no image can be read.
    """
    examples: list[dict[str, Any]] = []
    skipped = 0
    for position, row in enumerate(_undecoded(dataset, image_column, label_column)):
        image = _open(row[image_column], image_size, position)
        if image is None:
            skipped += 1
            continue
        examples.append(_example(_square(image, image_size), row, label_column, skipped))
        skipped = 0
        if len(examples) == count:
            break
    if not examples:
        raise ValueError(f"none of the {skipped} images of the data set can be read")
    return collate(examples)


def hold_out(dataset: ImageDataset, count: int, *, image_column: str) -> tuple[ImageDataset, ImageDataset]:
    """A data set that `load_images` gives, without its first `count` images, and those.

    A stream leaves them out by content, with every copy of theirs: its own `skip` leaves out other images as
    soon as loader workers divide the shards.

    Raises:
        ValueError: if there are no more than `count` images.
    """
    if isinstance(dataset, datasets.IterableDataset):
        first = [_digest(row[image_column]) for row in dataset.take(count + 1)]
        size = len(first)
    else:
        size = len(dataset)
    if size <= count:
        raise ValueError(f"count must be less than the number of images, {size}, got {count}")
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(range(count, size)), dataset.select(range(count))
    digests = frozenset(first[:count])
    rest = dataset.filter(_is_not_in, input_columns=image_column, fn_kwargs={"digests": digests})
    return rest, dataset.take(count)


def _is_not_in(encoded: dict[str, Any], digests: frozenset[bytes]) -> bool:
    return _digest(encoded) not in digests


def _digest(encoded: dict[str, Any]) -> bytes:
    data = (encoded["bytes"] or encoded["path"].encode()) if encoded else b""
    return hashlib.blake2b(data, digest_size=16).digest()


def _undecoded(dataset: ImageDataset, image_column: str, label_column: str | None) -> ImageDataset:
    """The columns asked for, images as {"bytes", "path"}."""
    if dataset.features is None:  # a stream whose columns show in its first rows only
        dataset = dataset._resolve_features()
    columns = {"image_column": image_column}
    if label_column is not None:
        columns["label_column"] = label_column
    for argument, column in columns.items():
        if column not in dataset.features:
            raise ValueError(f"{argument} must be one of {list(dataset.features)}, got {column!r}")
    if not isinstance(dataset.features[image_column], datasets.Image):
        raise ValueError(f"image_column must hold images, but {image_column!r} holds {dataset.features[image_column]}")
    if label_column is not None and "int" not in getattr(dataset.features[label_column], "dtype", ""):
        raise ValueError(
            f"label_column must hold integers, but {label_column!r} holds {dataset.features[label_column]}"
        )
    dataset = dataset.select_columns(list(columns.values()))
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def _open(encoded: dict[str, Any], image_size: int, position: int) -> Image.Image | None:
    """An RGB image, or None. A large JPEG is decoded reduced, to sides of at least twice `image_size`."""
    try:
        data = encoded["bytes"]
        if data is None:
            with xopen(encoded["path"], "rb") as file:
                data = file.read()
        image = Image.open(BytesIO(data))
        image.draft(None, (2 * image_size, 2 * image_size))  # to 1/2, 1/4 or 1/8 at a fraction of the cost
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        if image.mode in ("RGB", "L") and not image.has_transparency_data:
            return image.convert("RGB")
        return Image.fromarray(_to_rgb(image).pixel_values[0].round().astype(np.uint8).transpose(1, 2, 0))
    except Exception as error:  # PIL's decoders raise nearly everything on broken files
        path = encoded["path"] if encoded else None
        logger.warning("unreadable image skipped, at position %d, path %s: %r", position, path, error)
        return None


# Decides about transparency, 16 bits and the like, for the images of all programs alike.
_to_rgb = CtrlCscImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)


def _square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to `size`, then the centre, as the image processor does it."""
    short, long = sorted(image.size)
    if short != size:
        scaled = int(size * long / short)
        image = image.resize((size, scaled) if image.width == short else (scaled, size), RESAMPLE)
    if image.size == (size, size):
        return image
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _random_box(size: tuple[int, int], generator: random.Random) -> tuple[float, float, float, float]:
    """Left, upper, right and lower of a part of the image."""
    area = generator.uniform(*CROP_AREA) * size[0] * size[1]
    ratio = math.exp(generator.uniform(*map(math.log, CROP_RATIO)))
    width, height = min(size[0], math.sqrt(area * ratio)), min(size[1], math.sqrt(area / ratio))
    left, top = generator.uniform(0, size[0] - width), generator.uniform(0, size[1] - height)
    return left, top, left + width, top + height


def _example(image: Image.Image, row: dict[str, Any], label_column: str | None, skipped: int) -> dict[str, Any]:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    label = {} if label_column is None else {"label": int(row[label_column])}
    return {"pixel_values": pixels, **label, "unreadable": skipped}
