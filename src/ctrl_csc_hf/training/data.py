"""Images: any source of `datasets`, undecoded; and from encoded images to pixels."""

import hashlib
import logging
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ctrl_csc_hf.latents.encoding import (
    ImageDataset,
    draw_images,
    draw_rows,
    find_columns,
    find_data,
    image_bytes,
    open_image,
    reservoir,
    rows_of,
    split_names,
    undecoded,
)
from ctrl_csc_hf.models.image_processing_ctrl_csc import CtrlCscImageProcessor

logger = logging.getLogger(__name__)

# datasets 5 sleeps 5 s after every shuffled epoch of Parquet files, against a crash of Arrow at the exit of
# programs that leave a stream half read; here every epoch has an owner that closes it first.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0

HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")  # of train.py, in this order, where none is named
AUGMENTATIONS = ("none", "flip", "crop_and_flip")
RESAMPLE = CtrlCscImageProcessor.resample
HELD_OUT_OF = 10  # images, one at most is held out
IDENTIFYING = 128  # images, at most, that with their labels tell a data set from others
PLACES = 16  # where these are read in a stream
CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


@dataclass
class TrainingImages:
    """What a run keeps of its images: pixels in [-1, 1], drawn by the seed.

    held_out: (n, C, H, W), of the data set's `split`.
    calibration: training images (n, C, H, W), for the statistics of batch norms.
    identity: what identifies the training images.
    earlier_runs: of a model that goes on from another, what is known of that one's runs.
    """

    held_out: Tensor
    split: str
    calibration: Tensor
    identity: dict[str, Any]
    earlier_runs: list[dict[str, Any]]


@dataclass(frozen=True)
class ImageSource:
    """Where images come from.

    Args:
        dataset_name: a Hub id, or a local folder; see `ctrl_csc_hf.latents.encoding.find_data`.
        dataset_config_name: its configuration.
        train_data_dir: a local folder, in place of `dataset_name`.
        split: name of the split.
        streaming: read the source as it comes, instead of preparing it on disk first.
        image_column, label_column: see `ctrl_csc_hf.latents.encoding.find_columns`.
        cache_dir: where `datasets` keeps what it prepares.

    Raises:
        ValueError: if there is neither `dataset_name` nor `train_data_dir`, and if the latter is no folder.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    split: str = "train"
    streaming: bool = False
    image_column: str | None = None
    label_column: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.dataset_name is None:
            if self.train_data_dir is None:
                raise ValueError("dataset_name or train_data_dir must be given, got neither")
            if not Path(self.train_data_dir).is_dir():
                raise ValueError(f"train_data_dir must be a folder, got {self.train_data_dir!r}")

    @property
    def place(self) -> str:
        """Path or Hub id."""
        place = self.dataset_name or self.train_data_dir
        assert place is not None
        return place


def load_images(source: ImageSource, *others: str | None) -> ImageDataset:
    """The images and labels of a source, and its columns `others`; images not yet decoded.

    Raises:
        ValueError: if a split or column does not exist, or a column holds something else.
    """
    dataset = datasets.load_dataset(
        **find_data(source.place),
        name=source.dataset_config_name,
        split=source.split,
        streaming=source.streaming,
        cache_dir=source.cache_dir,
    )
    return undecoded(dataset, source.image_column, source.label_column, *others)[0]


def find_held_out_split(source: ImageSource, validation_split: str | None, preferred: Sequence[str]) -> str:
    """`validation_split`, or else the first of `preferred` that the source has, or else its own split."""
    names = split_names(source.place, source.dataset_config_name)
    return validation_split or next((name for name in preferred if name in names), source.split)


def load_splits(
    source: ImageSource,
    validation_split: str | None,
    num_held_out: int,
    *,
    seed: int,
    preferred: Sequence[str],
    class_source: ImageSource | None = None,
) -> tuple[ImageDataset, ImageDataset, str]:
    """Training images, held-out images, and the name of the split that the latter are from.

    Args:
        source: of the training images.
        validation_split, preferred: see `find_held_out_split`. Of the training split a part is held out, see
            `hold_out`.
        num_held_out: size of that part.
        seed: of that part.
        class_source: whose column of labels decides that part; by default that of `source`.

    Raises:
        ValueError: see `load_images`, for a split that does not exist, and if both splits have images in common.
    """
    validation_split = find_held_out_split(source, validation_split, preferred)
    if validation_split == source.split:
        class_column = None
        if class_source:
            features = load_images(class_source).features
            _, class_column = find_columns(features, class_source.image_column, class_source.label_column)
        images = load_images(source, class_column)
        image_column, label_column = find_columns(images.features, source.image_column, source.label_column)
        if class_source:
            label_column = class_column
        rest, held_out = hold_out(images, num_held_out, image_column=image_column, label_column=label_column, seed=seed)
        return rest, held_out, source.split
    images, names = load_images(source), split_names(source.place, source.dataset_config_name)
    if unknown := set(re.split(r"\[.*?\]|\+", validation_split)) - {"", *names}:
        raise ValueError(f"the split of the held-out images must be one of {names}, got {sorted(unknown)}")
    infos = images.info.splits or {}
    sizes = {name: infos[name].num_examples if name in infos else 1 for name in names}
    parts = [datasets.ReadInstruction.from_spec(s).to_absolute(sizes) for s in (source.split, validation_split)]
    for first, second in product(*parts):
        if first.splitname == second.splitname and max(first.from_, second.from_) < min(first.to, second.to):
            raise ValueError(
                f"the split of the held-out images, {validation_split!r}, must have no image of the split to train on, "
                f"{source.split!r}: name another one, or the same, of which a part is held out"
            )
    return images, load_images(replace(source, split=validation_split)), validation_split


def identify(
    training: ImageDataset, held_out: ImageDataset, image_column: str, label_column: str | None
) -> dict[str, Any]:
    """What tells the images of a run from others, without naming where they lie, for its checkpoints.

    The digests are of images, as encoded, and labels that are drawn from all rows. Of a stream, whose rows cannot be
    reached one by one, they are of the first rows of row groups, or of other shards, drawn from all: what changes
    elsewhere goes unnoticed.
    """
    identity: dict[str, Any] = {
        "image column": image_column,
        "label column": label_column,
        "class names": getattr(training.features.get(label_column), "names", None),
    }
    parts = {"training": training, "held-out": held_out}
    for kind, images in parts.items():
        if isinstance(images, datasets.IterableDataset):
            identity[f"number of {kind} shards"] = images.num_shards
        else:
            identity[f"number of {kind} images"] = len(images)
    for kind, images in parts.items():
        digest = hashlib.blake2b(digest_size=16)
        for row in _identifying_rows(images):
            digest.update(repr(row.get(label_column) if label_column else None).encode())
            with suppress(Exception):  # what cannot be read identifies nothing
                digest.update(image_bytes(row[image_column]))
        identity[f"digest of sampled {kind} images and labels"] = digest.hexdigest()
    return identity


def identify_as_trained(source: ImageSource, trained_with: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """`identify`, if the source is divided as an earlier run divided its images, and the split of the held-out part.

    Args:
        source: with the training split, the streaming and the column of labels that the run had.
        trained_with: what train.py wrote about the run.

    Raises:
        ValueError: see `load_splits`.
    """
    training, held_out, split = load_splits(
        source,
        trained_with["validation_split"],
        trained_with["num_validation_images"],
        seed=trained_with["seed"],
        preferred=HELD_OUT_SPLITS,
    )
    return identify(
        training, held_out, *find_columns(training.features, source.image_column, source.label_column)
    ), split


def _identifying_rows(images: ImageDataset) -> Iterator[dict[str, Any]]:
    if isinstance(images, datasets.Dataset):
        yield from (row for _, row in islice(draw_rows(images, IDENTIFYING, seed=0), IDENTIFYING))
        return
    generator = np.random.default_rng(0)

    def part_of(stream: datasets.IterableDataset) -> datasets.IterableDataset:
        return stream.shard(stream.num_shards, int(generator.integers(stream.num_shards)))

    for _ in range(PLACES):
        row_group = part_of(part_of(images).reshard())
        yield from rows_of(next(iter(row_group.iter(IDENTIFYING // PLACES)), {}))


def number_classes(label_column: str, *parts: Sequence[int | None]) -> tuple[list[int], list[Tensor]]:
    """The values of labels in order, and the labels of each part as their places among these, (n,), int64.

    Raises:
        ValueError: for labels that are null or negative, which stand for unknown ones, and if all are the same.
    """
    labels = [label for part in parts for label in part]
    unknown = {label for label in labels if label is None or label < 0}
    values = sorted({label for label in labels if label is not None})
    if unknown:
        raise ValueError(f"label_column={label_column!r} holds {'null' if None in unknown else values[0]}")
    if len(values) < 2:
        raise ValueError(f"label_column={label_column!r} holds no value but {values[0]}")
    places: dict[int | None, int] = {value: place for place, value in enumerate(values)}
    return values, [torch.tensor([places[label] for label in part]) for part in parts]


def to_pixel_values(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """8-bit pixels (n, 3, H, W) as float32 in [-1, 1] on the device: what the image processor gives, up to rounding."""
    moved = pixels.to(device, memory_format=torch.channels_last, non_blocking=True)
    return moved.float().div_(127.5).sub_(1)


def take_images(dataset: ImageDataset, count: int, *, image_column: str, image_size: int, seed: int = 0) -> Tensor:
    """The images of `take_examples`."""
    return take_examples(dataset, count, image_column=image_column, image_size=image_size, seed=seed)[0]


def take_examples(
    dataset: ImageDataset,
    count: int,
    *,
    image_column: str,
    image_size: int,
    label_column: str | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """A uniform sample of the readable images, or all if there are fewer, not augmented, in random order, with labels.

    Args:
        seed: of the sample.

    Returns:
        (n, 3, s, s), pixels in [-1, 1]; (n,), or None without a column of labels.

    Raises:
        ValueError: for a column that does not exist or holds something else, for a label that is null, and if no image
            can be read.
    """
    pixels, labels = draw_images(
        dataset,
        count,
        image_column=image_column,
        label_column=label_column or "none",
        seed=seed,
        read=lambda encoded: decode(encoded, image_size),
    )
    if labels is not None and None in labels:
        raise ValueError(f"label_column={label_column!r} must hold integers, but some labels are null")
    return to_pixel_values(torch.from_numpy(np.stack(pixels))), None if labels is None else torch.tensor(labels)


def hold_out(
    dataset: ImageDataset, count: int, *, image_column: str, label_column: str | None = None, seed: int = 0
) -> tuple[ImageDataset, datasets.Dataset]:
    """A data set that `load_images` gives, without a uniform sample of its images, and that sample.

    The sample is at most a tenth of the images, or one, and leaves at least one image of each class. A stream leaves it
    out by content, with every copy of it: its own `skip` leaves out other images as soon as loader workers divide the
    shards.

    Args:
        count: size of the sample. A warning says how many are held out where that is less.
        seed: the same seed and data set give the same sample.

    Raises:
        ValueError: if too few images are there to hold one out.
    """
    contents: defaultdict[Any, set[Any]] = defaultdict(set)  # by class, what tells its images apart
    rows: Iterable[tuple[str, dict[str, Any]]]
    if isinstance(dataset, datasets.IterableDataset):

        def content(key: str, row: dict[str, Any]) -> Any:
            return _digest(row[image_column])

        def visit(row: dict[str, Any]) -> None:
            contents[row.get(label_column) if label_column else None].add(content("", row))

        rows, size = reservoir(dataset, count, seed, visit, at_least=HELD_OUT_OF * count)
    else:

        def content(key: str, row: dict[str, Any]) -> Any:
            return int(key)

        rows, size = draw_rows(dataset, count, seed), len(dataset)
        for index, label in enumerate(dataset[label_column] if label_column else [None] * size):
            contents[label].add(index)
    allowed = min(count, max(1, size // HELD_OUT_OF))
    held: list[tuple[str, dict[str, Any]]] = []
    for key, row in rows:
        if len(held) == allowed:
            break
        image = content(key, row)
        classes = [images for images in contents.values() if image in images]  # none for the copy of one held out
        if classes and all(len(images) > 1 for images in classes):
            for images in classes:
                images.remove(image)
            held.append((key, row))
    if not held:
        raise ValueError(
            f"no image can be held out of {size}, as one of each class has to be left to train on: name another split "
            "(--validation_split of train.py, --split of evaluate.py), or do without labels (--label_column none)"
        )
    if len(held) < count:
        logger.warning("%d images are held out instead of %d, of %d in all", len(held), count, size)
    if isinstance(dataset, datasets.Dataset):
        chosen = [int(key) for key, _ in held]
        rest = np.delete(np.arange(size), chosen)
        return dataset.select(rest), dataset.select(chosen)
    digests = frozenset(_digest(row[image_column]) for _, row in held)
    rest = dataset.filter(_is_not_in, input_columns=image_column, fn_kwargs={"digests": digests})
    table = pa.Table.from_pylist([row for _, row in held], schema=dataset.features.arrow_schema)
    return rest, datasets.Dataset(table, info=datasets.DatasetInfo(features=dataset.features))


def _is_not_in(encoded: dict[str, Any], digests: frozenset[bytes]) -> bool:
    return _digest(encoded) not in digests


def _digest(encoded: dict[str, Any] | None) -> bytes:
    data = ((encoded or {}).get("path") or "").encode()
    with suppress(Exception):  # what cannot be read is told by its path
        data = image_bytes(encoded)
    return hashlib.blake2b(data, digest_size=16).digest()


def decode(
    encoded: dict[str, Any] | None,
    image_size: int,
    augmentation: str = "none",
    generator: random.Random | None = None,
) -> np.ndarray:
    """An encoded image as a square RGB one, (3, image_size, image_size), uint8.

    Without a crop, the shorter side is resized and the centre taken, as the image processor does it. A JPEG is decoded
    at 1/2, 1/4 or 1/8 of its size, at a fraction of the cost, where that still has the pixels that are asked for.

    Args:
        augmentation: "none"; "flip", left to right for half of the images; or "crop_and_flip", that and a crop of
            half to all of the area.
        generator: of the augmentation, which needs one.

    Raises:
        Exception: what PIL raises, of nearly every kind, for what it cannot read.
    """
    image = open_image(encoded)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        ImageOps.exif_transpose(image, in_place=True)  # decodes it, at its full size
    if image.mode not in ("RGB", "L") or image.has_transparency_data:
        image = as_rgb(image)
    width, height = image.size
    if augmentation == "crop_and_flip":
        assert generator is not None
        box, size = _random_box(width, height, generator), (image_size, image_size)
    else:
        box, size = (0.0, 0.0, width, height), _shorter_side(width, height, image_size)
    wanted = (math.ceil(width * size[0] / (box[2] - box[0])), math.ceil(height * size[1] / (box[3] - box[1])))
    if draft := image.draft(None, wanted):
        _, (_, _, drafted_width, drafted_height) = draft  # a fraction: the last pixels may reach over the image's edge
        across, down = drafted_width / width, drafted_height / height
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    image = image.convert("RGB")
    if size != image.size or box != (0, 0, *image.size):
        image = image.resize(size, RESAMPLE, box)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    image = image.crop((left, top, left + image_size, top + image_size))
    if augmentation != "none":
        assert generator is not None
        if generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).transpose(2, 0, 1)


def as_rgb(image: Image.Image) -> Image.Image:
    """Of any mode, in its own size, as the image processor sees it."""
    return Image.fromarray(_to_rgb(image).pixel_values[0].round().astype(np.uint8).transpose(1, 2, 0))


# Decides about transparency, 16 bits and the like, for the images of all programs alike.
_to_rgb = CtrlCscImageProcessor(do_resize=False, do_center_crop=False, rescale_factor=1.0, do_normalize=False)


def _shorter_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height with the shorter one brought to `size`, as the image processor does it."""
    short, long = sorted((width, height))
    scaled = int(size * long / short)
    return (size, scaled) if width == short else (scaled, size)


def _random_box(width: int, height: int, generator: random.Random) -> tuple[float, float, float, float]:
    """Left, upper, right and lower of a part of the image."""
    area = generator.uniform(*CROP_AREA) * width * height
    ratio = math.exp(generator.uniform(*map(math.log, CROP_RATIO)))
    across, down = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = generator.uniform(0, width - across), generator.uniform(0, height - down)
    return left, top, left + across, top + down
