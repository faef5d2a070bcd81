"""The images of a data set as pixels and latents, batch by batch. Needs `datasets`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import datasets
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from .modeling_ctrl_csc import CtrlCscModel

ImageDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset


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


def encode_dataset(
    dataset: ImageDataset,
    model: CtrlCscModel,
    image_processor: BaseImageProcessor,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    batch_size: int = 250,
) -> Iterator[EncodedBatch]:
    """All rows in their order, a stream's too, in batches of at most `batch_size`.

    Raises:
        ValueError: for a column that does not exist or holds no images, and for labels that are no integers.
    """
    dataset = select_images(dataset, image_column, label_column)
    return _batches(dataset, model, image_processor, image_column, label_column, batch_size)


def select_images(dataset: ImageDataset, image_column: str, label_column: str | None) -> ImageDataset:
    """The columns of the images and, where there is one, of the labels.

    Raises:
        ValueError: for a column that does not exist or holds no images, and for labels that are no integers.
    """
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
    return dataset.select_columns(list(columns.values()))


def _batches(
    dataset: ImageDataset,
    model: CtrlCscModel,
    image_processor: BaseImageProcessor,
    image_column: str,
    label_column: str | None,
    batch_size: int,
) -> Iterator[EncodedBatch]:
    for rows in tqdm(dataset.iter(batch_size), desc="batches of images encoded"):
        pixel_values = image_processor(rows[image_column], return_tensors="pt").pixel_values
        with torch.inference_mode():
            latents = model.encode(pixel_values.to(model.device)).latents.float().cpu()
        labels = None if label_column is None else torch.tensor(rows[label_column])
        yield EncodedBatch(pixel_values, latents, labels)


__all__ = ["EncodedBatch", "ImageDataset", "encode_dataset", "select_images"]
