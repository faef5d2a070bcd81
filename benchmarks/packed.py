"""Images in one file, for a GPU that holds them all: JPEG or PNG as the data set has them, without what they repeat."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctrl_csc_hf import CtrlCscImageProcessor

# Decides about transparency, 16 bits and the like.
AS_RGB = CtrlCscImageProcessor(do_resize=False, do_center_crop=False, rescale_factor=1.0, do_normalize=False)
DECODED_AT_ONCE = 256


def pack(dataset: str, splits: dict[str, str], half: int | None, output: Path) -> None:
    """Writes the splits of "train" and "held_out" to one file: the images' own files, compressed together, and labels.

    JPEG files of one data set have the same tables, most of a small image's bytes.

    Args:
        dataset: a Hub id, or a folder.
        half: 0 or 1 for every other image of "train".

    Raises:
        ValueError: for an image that cannot be read.
    """
    from ctrl_csc_hf.latents.encoding import find_columns, image_bytes, load_image, name_of
    from ctrl_csc_hf.training.data import ImageSource, load_images

    tensors, metadata = {}, {}
    for part, split in splits.items():
        rows = load_images(ImageSource(dataset_name=dataset, split=split, streaming=True))
        image_column, label_column = find_columns(rows.features)
        halved = part == "train" and half is not None
        files, labels = [], []
        for index, row in enumerate(rows):
            if not halved or index % 2 == half:
                try:
                    load_image(row[image_column])
                except Exception as error:  # PIL's decoders raise nearly everything on broken files
                    name = name_of(row[image_column], str(index))
                    raise ValueError(f"{split}, {name} cannot be read, {error!r}: leave it out") from error
                files.append(image_bytes(row[image_column]))
                labels.append(row[label_column] if label_column else -1)
        tensors |= {
            f"{part}.bytes": torch.frombuffer(bytearray(zlib.compress(b"".join(files))), dtype=torch.uint8),
            f"{part}.sizes": torch.tensor([len(file) for file in files], dtype=torch.int32),
            f"{part}.labels": torch.tensor(labels, dtype=torch.int32),
        }
        metadata[part] = f"{len(files)} images of {split}" + (f", half {half}" if halved else "")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, metadata)
    print(f"{output}: {metadata}, {output.stat().st_size / 2**20:.1f} MiB")


def check_packed(path: Path) -> None:
    """ValueError for a file that `pack` did not write."""
    wanted = {f"{part}.{name}" for part in ("train", "held_out") for name in ("bytes", "sizes")}
    try:
        with safe_open(path, "pt") as file:
            missing = wanted.difference(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--data must be a file that pack wrote, got {path}: {error}") from error
    if missing:
        raise ValueError(f"--data must be a file that pack wrote, but {path} lacks {', '.join(sorted(missing))}")


def read_pixels(path: Path, part: str, size: int) -> Tensor:
    """The images of "train" or "held_out" of a packed file, the middle square of each: (n, 3, size, size), uint8."""
    with safe_open(path, "pt") as file:
        data = memoryview(zlib.decompress(file.get_tensor(f"{part}.bytes").numpy()))
        ends = file.get_tensor(f"{part}.sizes").cumsum(0).tolist()
    pixels = np.empty((len(ends), size, size, 3), np.uint8)

    def decode(first: int) -> None:
        for index in range(first, min(first + DECODED_AT_ONCE, len(ends))):
            image = Image.open(BytesIO(data[ends[index - 1] if index else 0 : ends[index]]))
            if image.mode != "RGB" or image.has_transparency_data:
                image = Image.fromarray(AS_RGB(image).pixel_values[0].round().astype(np.uint8).transpose(1, 2, 0))
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), CtrlCscImageProcessor.resample)
            pixels[index] = image

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(decode, range(0, len(ends), DECODED_AT_ONCE)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def to_pixel_values(pixels: Tensor) -> Tensor:
    """(n, 3, H, W), uint8 -> float32 in [-1, 1], channels last."""
    return pixels.contiguous(memory_format=torch.channels_last).float().div_(127.5).sub_(1)
