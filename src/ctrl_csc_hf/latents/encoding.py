"""The images of a data set: found, sampled, and encoded as pixels and latents, batch by batch. Needs `datasets`."""

import glob
import heapq
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.utils.file_utils import xopen
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from ..models.image_processing_ctrl_csc import check_sides
from ..models.modeling_ctrl_csc import CtrlCscModel

logger = logging.getLogger(__name__)

ImageDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset
Row: TypeAlias = dict[str, Any]

ROWS_AT_ONCE = 32  # read together from Arrow, several times as fast as one by one
# A sample of a stream is drawn from all of its rows, or from those of at least so many shards, chosen at random, that
# hold at least so many times the rows that are wanted.
SAMPLED_SHARDS = 64
SAMPLED_ROWS = 2
SPARE_ROWS = 16  # that a sample has, and a tenth more, in place of images that cannot be read
# Folders of a local folder of images that are splits, by their lower-case names.
SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
OWN_FOLDERS = ("examples", "samples")  # of a model's folder, for pictures
TABLES = (".parquet", ".arrow", ".tar")  # files of many images each
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar")  # unpacked by `datasets`
UNREAD = (".avif", ".avifs", ".heic", ".heif", ".jxl", ".qoi", ".mpo")  # images that `datasets` passes over


@dataclass(frozen=True)
class EncodedBatch:
    """
    pixel_values: (n, 3, image_size, image_size), in [-1, 1].
    latents: (n, latent_dim), unit vectors, float32 on the CPU.
    labels: (n,), integers; None where none were asked for.
    """

    pixel_values: Tensor
    latents: Tensor
    labels: Tensor | None = None


def find_data(name: str) -> dict[str, Any]:
    """The arguments by which `datasets.load_dataset` and `datasets.get_dataset_split_names` find a data set.

    In a local folder of image files, splits and labels are the names of folders, never parts of names. If all images
    lie in folders that are called train, training, validation, valid, val, dev, test or testing, and some of them in
    one of the first two, these folders are the splits; otherwise all images are the split "train". If all images of
    all splits lie equally deep in folders of more than one name, these names are the labels; otherwise there are none.
    Where there are metadata files (metadata.csv, metadata.jsonl or metadata.parquet), images are those they list, with
    their columns instead of such labels. A folder of Parquet, Arrow or tar files, or one whose README.md says which
    files are which split, is read as `datasets` reads it.

    Args:
        name: a Hub id, or a local folder.

    Raises:
        OSError: for a folder without data.
        ValueError: for what `datasets` would pass over or read twice: a link to a folder or to nothing, a file of many
            images whose name puts it into no split or into several, image files beside files of many images or beside
            archives, image files of a format that it does not know, and a metadata file that lies above the folders of
            splits, or images beside those of a metadata file.
    """
    root = Path(name)
    if not root.is_dir():
        return {"path": name}
    if not root.name:  # of ".", which `datasets` cannot name
        name = str(root.resolve())
    escaped = glob.escape(str(root.resolve()))
    images, tables, metadata, others = ([], [], [], []) if _names_its_files(root / "README.md") else _files_in(root)
    if images and (mixed := tables + others):
        raise ValueError(
            f"{name} must hold either image files of formats that `datasets` reads or files of many images, got "
            f"{len(images)} image files, such as {images[0]}, and {len(mixed)} others, such as {mixed[0]}, which would "
            "be read in their place, in addition or not at all: convert or unpack these files, or move one kind away"
        )
    if tables or not images:
        is_literal = escaped == str(root.resolve())
        if is_literal and not tables:
            return {"path": name}
        patterns = get_data_patterns(escaped)
        splits_of = Counter(chain(*DataFilesDict.from_patterns(patterns, base_path=escaped).values()))
        if wrong := [str(path) for path in tables if splits_of[str(root.resolve() / path)] != 1]:
            raise ValueError(
                f"each Parquet, Arrow or tar file of {name} must belong to one of its splits by its name, but of "
                f"{[str(split) for split in patterns]}, {wrong} belong to none or to several: call the files "
                "train-1.parquet, test-1.parquet and so on, put them into folders of such names, or list those of each "
                "split in README.md, under configs"
            )
        if is_literal:
            return {"path": name}
        return {"path": name, "data_files": {s: [f"{escaped}/{p}" for p in paths] for s, paths in patterns.items()}}
    shared = os.path.commonpath([image.parent for image in images])
    inner = [image.relative_to(shared).parts for image in images]
    splits = {parts[0]: SPLIT_FOLDERS.get(parts[0].lower()) for parts in inner}
    top = 0  # of the folders of a path, how many lie above the images of its split, or hold them
    if "train" in splits.values() and None not in splits.values():
        inner = [parts[1:] for parts in inner]
        top = len(Path(shared).parts) + 1
        data_files: dict[str, list[str]] = {}
        for folder, split in sorted(splits.items(), key=lambda found: list(SPLIT_FOLDERS).index(found[0].lower())):
            data_files.setdefault(str(split), []).append(os.path.join(escaped, glob.escape(shared), folder, "**"))
    else:
        data_files = {"train": [os.path.join(escaped, "**")]}
    described = {path.parent.parts for path in metadata}
    for parts in (image.parts for image in images if metadata):
        if described.isdisjoint(parts[:depth] for depth in range(top, len(parts))):
            raise ValueError(
                f"{name} has {metadata[0]}, but no metadata file in {Path(*parts[:top])} or below for {Path(*parts)}, "
                "which would lack its columns or be passed over: put one there, with file_name relative to its own "
                "folder, or remove all metadata files"
            )
    depths = {len(parts) for parts in inner}
    labelled = len(depths) == 1 and depths != {1} and len({parts[-2] for parts in inner}) > 1
    return {"path": name, "data_files": data_files, "drop_labels": not labelled}


def split_names(name: str, config_name: str | None = None) -> list[str]:
    """The names of a data set's splits, see `find_data`.

    Raises:
        OSError, ValueError: see `find_data`, and for a data set that cannot be read.
    """
    source = find_data(name)
    try:
        return datasets.get_dataset_split_names(**source, config_name=config_name)
    except (ValueError, RuntimeError) as error:  # of files, and of data sets that are programs
        raise ValueError(f"the data set {name} cannot be read: {error.__cause__ or error}") from error


def check_output(output: str | Path, data: str | None) -> None:
    """Refuses an output in a local data set, where pictures of it would be read as images the next time, and a data set
    in a folder that the output has for pictures of its own, which replace what is there.

    Args:
        output: a folder.
        data: a Hub id, or a local folder; None for none.

    Raises:
        ValueError: if one lies in the other.
    """
    if data is None or not Path(data).is_dir():
        return
    if any(Path(data).resolve().is_relative_to(Path(output).resolve() / own) for own in OWN_FOLDERS):
        raise ValueError(
            f"must not be above the folder of the images, {data}, in which pictures of the model would take the place "
            f"of images, got {output}"
        )
    if Path(output).resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(
            f"must lie outside of the folder of the images, {data}, where the pictures written into it would be read "
            f"as images the next time, got {output}"
        )


def _files_in(root: Path) -> tuple[list[Path], list[Path], list[Path], list[Path]]:
    """Image files below a folder, `TABLES`, metadata files, and archives or images of formats that `datasets` does not
    know, relative to it, without hidden ones."""
    images: list[Path] = []
    tables: list[Path] = []
    metadata: list[Path] = []
    others: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        files = [name for name in files if not name.startswith(".")]
        for link in (os.path.join(folder, name) for name in (*folders, *files)):
            if os.path.islink(link) and not os.path.isfile(link):
                target = "a folder" if os.path.isdir(link) else "nothing"
                raise ValueError(
                    f"{root} holds {link}, a link to {target}, which would be passed over: put a folder in its place, "
                    "whose files may be links (`cp -rs` makes one), or remove it"
                )
        if "::" in folder[len(str(root)) :] or any("::" in name for name in files):  # which joins URLs for `datasets`
            wrong = next((os.path.join(folder, name) for name in files if "::" in name), folder)
            raise ValueError(f"{root} holds {wrong}, which `datasets` cannot read: rename it, '::' must not be in it")
        for name in files:
            suffix, path = os.path.splitext(name)[1].lower(), Path(folder, name).relative_to(root)
            if suffix in ImageFolder.EXTENSIONS:
                images.append(path)
            elif name in ImageFolder.METADATA_FILENAMES:
                metadata.append(path)
            elif suffix in TABLES:
                tables.append(path)
            elif suffix in (*ARCHIVES, *UNREAD):
                others.append(path)
    return images, tables, metadata, others


def _names_its_files(card: Path) -> bool:
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return re.match(r"---\n(?:(?!---).*\n)*?configs:", text) is not None


def encode_dataset(
    dataset: ImageDataset,
    model: CtrlCscModel,
    image_processor: BaseImageProcessor,
    *,
    image_column: str | None = None,
    label_column: str | None = "none",
    batch_size: int = 250,
    num_images: int | None = None,
    seed: int = 0,
) -> Iterator[EncodedBatch]:
    """All rows in their order, a stream's too, or a uniform sample of them, in batches of at most `batch_size`.

    Images that cannot be read are skipped with a warning. The model encodes in evaluation mode.

    Args:
        image_column, label_column: see `find_columns`; by default there are no labels.
        num_images: size of the sample; by default all images are encoded.
        seed: of the sample.

    Raises:
        ValueError: see `find_columns`, and for a label that is null.
    """
    dataset, image_column, label_column = undecoded(dataset, image_column, label_column)
    return _batches(dataset, model, image_processor, image_column, label_column, batch_size, num_images, seed)


def draw_images(
    dataset: ImageDataset,
    count: int | None,
    *,
    image_column: str | None = None,
    label_column: str | None = "none",
    seed: int = 0,
    read: Callable[[Any], Any] | None = None,
) -> tuple[list[Any], list[Any] | None]:
    """A uniform sample without replacement of the readable images of a whole split, in random order; see `draw_rows`.

    Images that cannot be read are skipped with a warning.

    Args:
        count: size of the sample; all images if there are fewer. None for all in their own order.
        image_column, label_column: see `find_columns`; by default there are no labels.
        seed: the same seed gives the same sample.
        read: of an undecoded image {"bytes", "path"}; by default it gives a PIL image.

    Returns:
        What `read` gave, and the labels, None without a column of labels.

    Raises:
        ValueError: see `find_columns`, and if no image can be read.
    """
    dataset, image_column, label_column = undecoded(dataset, image_column, label_column)
    images: list[Any] = []
    labels: list[Any] = []
    in_order = ((str(key), row) for key, row in enumerate(dataset))
    rows = in_order if count is None else draw_rows(dataset, count, seed)
    for image, row in _readable(rows, image_column, read or load_image):
        images.append(image)
        labels.append(row[label_column] if label_column else None)
        if len(images) == count:
            break
    if not images:
        raise ValueError(f"image_column={image_column!r} must hold images that can be read, but none of them can")
    return images, None if label_column is None else labels


def draw_rows(dataset: ImageDataset, count: int, seed: int) -> Iterator[tuple[str, Row]]:
    """A uniform sample of a data set's rows in random order, and what names each: `count` at least, if there are.

    Of a stream, whose rows cannot be reached one by one, a reservoir takes the sample from all rows of shards in a
    random order: all shards, or, where there are more than `SAMPLED_SHARDS`, as many as hold enough rows. A row group
    of a Parquet file counts as a shard. Then any row is as likely to be drawn as any other, if shards are of one size.
    """
    if isinstance(dataset, datasets.Dataset):
        order = np.random.default_rng(seed).permutation(len(dataset))
        for first in range(0, len(order), ROWS_AT_ONCE):
            indices = order[first : first + ROWS_AT_ONCE].tolist()
            yield from zip(map(str, indices), rows_of(dataset[indices]), strict=True)
    else:
        yield from reservoir(dataset, count, seed)[0]


def reservoir(
    dataset: datasets.IterableDataset,
    count: int,
    seed: int,
    visit: Callable[[Row], None] | None = None,
    at_least: int = 0,
) -> tuple[list[tuple[str, Row]], int]:
    """`draw_rows` of a stream, and the number of rows that it was drawn from, `at_least` so many, if there are.

    `visit` is called with each of these.
    """
    shards = dataset.reshard()
    generator = np.random.default_rng(seed)
    size = count + count // 10 + SPARE_ROWS
    drawn: list[tuple[float, str, Row]] = []  # a heap, the largest random number first
    seen = 0
    order = generator.permutation(shards.num_shards).tolist()
    for visited, shard in enumerate(tqdm(order, desc="shards read for a sample")):
        if visited >= SAMPLED_SHARDS and seen >= max(at_least, SAMPLED_ROWS * size):
            break
        batches = shards.shard(shards.num_shards, shard).iter(ROWS_AT_ONCE)
        for position, row in enumerate(row for batch in batches for row in rows_of(batch)):
            entry = (-generator.random(), f"{shard}:{position}", row)
            heapq.heappush(drawn, entry) if len(drawn) < size else heapq.heappushpop(drawn, entry)
            seen += 1
            if visit:
                visit(row)
    return [(key, row) for _, key, row in sorted(drawn, reverse=True, key=lambda entry: entry[0])], seen


def rows_of(columns: dict[str, list[Any]]) -> Iterator[Row]:
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def find_columns(
    features: datasets.Features, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str | None]:
    """The columns of images and of labels.

    Args:
        features: of the data set.
        image_column: by default the only column of images.
        label_column: integers. "none" if labels are not wanted. By default the only column of the type ClassLabel,
            or else the integers of "label" or "labels"; None where there is none.

    Raises:
        ValueError: for a column that does not exist or holds something else, and where several columns hold images.
    """
    if image_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not found:
            raise ValueError(
                f"image_column must hold images, but no column is of the type datasets.Image: {dict(features)}; "
                "cast_column(NAME, datasets.Image()) makes one of files, paths or bytes"
            )
        if len(found) > 1:
            raise ValueError(f"image_column must name the column of images, one of {found}, got None")
        (image_column,) = found
    if label_column is None:
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        found = classes if len(classes) == 1 else [name for name in ("label", "labels") if _is_integer(features, name)]
        label_column = found[0] if found else None
    elif label_column == "none":
        label_column = None
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            raise ValueError(f"{argument} must be one of {list(features)}, got {column!r}")
    if not isinstance(features[image_column], datasets.Image):
        raise ValueError(f"image_column must hold images, but {image_column!r} holds {features[image_column]}")
    if label_column is not None and not _is_integer(features, label_column):
        raise ValueError(f"label_column must hold integers, but {label_column!r} holds {features[label_column]}")
    return image_column, label_column


def undecoded(
    dataset: ImageDataset, image_column: str | None, label_column: str | None, *others: str | None
) -> tuple[ImageDataset, str, str | None]:
    """The columns of images, as {"bytes", "path"}, of labels, and `others`, alone; the first two's names.

    See `find_columns`.
    """
    if dataset.features is None:  # a stream whose columns show in its first rows only
        dataset = dataset._resolve_features()
    image_column, label_column = find_columns(dataset.features, image_column, label_column)
    kept = dict.fromkeys(name for name in (image_column, label_column, *others) if name is not None)
    dataset = dataset.select_columns(list(kept))
    return dataset.cast_column(image_column, datasets.Image(decode=False)), image_column, label_column


def image_bytes(encoded: dict[str, Any] | None) -> bytes:
    """The file of {"bytes", "path"}; ValueError for a null image, and what file systems raise."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise ValueError("the image is null")
    if encoded["bytes"] is not None:
        return encoded["bytes"]
    with xopen(encoded["path"], "rb") as file:
        return file.read()


def open_image(encoded: dict[str, Any] | None) -> Image.Image:
    """A PIL image, its pixels not yet read, of {"bytes", "path"}.

    Raises:
        ValueError: for a null image, and for sides that `check_sides` refuses.
        Exception: what PIL and file systems raise, of nearly every kind, for what they cannot read.
    """
    image = Image.open(BytesIO(image_bytes(encoded)))
    check_sides(image.height, image.width)
    return image


def load_image(encoded: dict[str, Any] | None) -> Image.Image:
    """`open_image`, with the pixels read."""
    image = open_image(encoded)
    image.load()
    return image


def name_of(encoded: dict[str, Any] | None, key: str) -> str:
    """What a message calls an image: its path, or else its place in the data set."""
    return (encoded["path"] if encoded else None) or f"image {key}"


def _is_integer(features: datasets.Features, column: str) -> bool:
    return "int" in getattr(features.get(column), "dtype", "")


def _readable(
    rows: Iterator[tuple[str, Row]], image_column: str, read: Callable[[Any], Any]
) -> Iterator[tuple[Any, Row]]:
    for key, row in rows:
        try:
            image = read(row[image_column])
        except Exception as error:  # PIL's decoders raise nearly everything on broken files
            logger.warning("unreadable image skipped, %s: %r", name_of(row[image_column], key), error)
            continue
        yield image, row


def _batches(
    dataset: ImageDataset,
    model: CtrlCscModel,
    image_processor: BaseImageProcessor,
    image_column: str,
    label_column: str | None,
    batch_size: int,
    num_images: int | None,
    seed: int,
) -> Iterator[EncodedBatch]:
    def pixels(encoded: dict[str, Any] | None) -> Tensor:
        return image_processor(open_image(encoded), return_tensors="pt").pixel_values

    rows: Iterator[tuple[str, Row]]
    if num_images is None:
        rows = ((str(index), row) for index, row in enumerate(r for b in dataset.iter(batch_size) for r in rows_of(b)))
    else:
        rows = draw_rows(dataset, num_images, seed)
    readable = islice(_readable(rows, image_column, pixels), num_images)
    with tqdm(desc="images encoded", total=num_images) as progress:
        while chunk := list(islice(readable, batch_size)):
            pixel_values = torch.cat([image for image, _ in chunk])
            was_training = model.training
            with torch.inference_mode():
                latents = model.eval().encode(pixel_values.to(model.device)).latents.float().cpu()
            model.train(was_training)
            progress.update(len(chunk))
            yield EncodedBatch(pixel_values, latents, _labels(chunk, label_column))


def _labels(chunk: list[tuple[Any, Row]], label_column: str | None) -> Tensor | None:
    if label_column is None:
        return None
    labels = [row[label_column] for _, row in chunk]
    if None in labels:
        raise ValueError(f"label_column={label_column!r} must hold integers, but some labels are null")
    return torch.tensor(labels)


__all__ = ["EncodedBatch", "ImageDataset", "draw_images", "draw_rows", "encode_dataset", "find_columns", "find_data"]
