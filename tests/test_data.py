"""Images from any source, decoded: what cannot be is a clear error; a large JPEG costs a fraction."""

import os
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BROKEN, NUM_IMAGES, READABLE, SIZE, encoded, random_image
from data import ImageDataset, ImageSource, decode, hold_out, load_images, take_images, to_pixel_values
from PIL import Image, ImageOps
from stream import ImageLoader, ImageStream

from ctrl_csc_hf.image_processing_ctrl_csc import CtrlCscImageProcessor


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> str:
    """PNGs and JPEGs in class folders `bird` and `cat`, one of them no image at all."""
    root = tmp_path_factory.mktemp("images")
    for index in range(6):
        folder = root / ("bird", "cat")[index % 2]
        folder.mkdir(exist_ok=True)
        random_image(index).save(folder / f"{index}.{('png', 'jpg')[index // 3]}")
    (root / "cat" / "broken.jpg").write_bytes(b"not an image")
    return str(root)


@pytest.fixture(params=[False, True], ids=["map", "streamed"])
def images(request, parquet_folder, tmp_path):
    return load_images(ImageSource(train_data_dir=parquet_folder, streaming=request.param, cache_dir=str(tmp_path)))


def loader_of(dataset: ImageDataset, *, batch_size: int = 4, num_workers: int = 0, **options) -> ImageLoader:
    defaults = {"label_column": None, "image_size": SIZE, "augmentation": "none", "shuffle_buffer": 6, "seed": 0}
    images = ImageStream(dataset, image_column="image", **(defaults | options))
    return ImageLoader(images, batch_size=batch_size, num_workers=num_workers)


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_become_labels(image_folder, tmp_path, streaming):
    images = load_images(ImageSource(train_data_dir=image_folder, streaming=streaming, cache_dir=str(tmp_path)))
    assert images.features["label"].names == ["bird", "cat"]
    loader = loader_of(images, label_column="label")
    assert sorted(label for batch in loader.epoch() for label in batch["labels"].tolist()) == [0, 0, 0, 1, 1, 1]
    assert [Path(name).name for name in loader.place.unreadable_names] == ["broken.jpg"]


def test_without_a_label_column_there_are_no_labels(parquet_folder, tmp_path):
    source = ImageSource(train_data_dir=parquet_folder, label_column=None, cache_dir=str(tmp_path))
    assert set(next(iter(loader_of(load_images(source))))) == {"pixels"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "picture"}, "image_column must be one of .*'image', 'label', 'caption'.*'picture'"),
        ({"label_column": "class"}, "label_column must be one of .*'image', 'label', 'caption'.*'class'"),
        ({"image_column": "caption"}, "image_column must hold images, but 'caption' holds"),
        ({"label_column": "caption"}, "label_column must hold integers, but 'caption' holds"),
    ],
)
def test_a_wrong_column_is_an_error(parquet_folder, tmp_path, streaming, columns, message):
    source = ImageSource(train_data_dir=parquet_folder, streaming=streaming, cache_dir=str(tmp_path), **columns)
    with pytest.raises(ValueError, match=message):
        load_images(source)


def test_a_wrong_source_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got neither"):
        ImageSource()
    with pytest.raises(ValueError, match="must be a folder"):
        load_images(ImageSource(train_data_dir=str(tmp_path / "missing")))


def test_held_out_images_are_the_first_readable_ones(images):
    taken = take_images(images, 6, image_column="image", image_size=SIZE)
    expected = [np.asarray(random_image(index)) for index in READABLE[:6]]
    assert np.array_equal(((taken + 1) * 127.5).round().permute(0, 2, 3, 1), expected)
    broken = images.filter(lambda row: row["label"] == BROKEN)
    with pytest.raises(ValueError, match="none of the 1 images"):
        take_images(broken, 3, image_column="image", image_size=SIZE)


def test_no_more_images_can_be_held_out_than_there_are(images):
    with pytest.raises(ValueError, match=f"less than the number of images, {NUM_IMAGES}, got"):
        hold_out(images, NUM_IMAGES, image_column="image")


def transposed(image: Image.Image) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = 6
    return exif


def grey_ramp(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, size[0] * size[1]).astype(np.uint16).reshape(size[::-1]))


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (random_image(0), {}),
        (random_image(0, (20, 13)), {}),
        (random_image(0, (5, 11)), {}),
        (random_image(0).convert("L"), {}),
        (random_image(0, (12, 9)).convert("LA"), {}),
        (random_image(0).convert("P"), {"transparency": 3}),
        (random_image(0, (9, 14)).quantize(8), {}),
        (grey_ramp((8, 8)), {}),
        (random_image(0, (12, 9)), {"exif": transposed(random_image(0))}),
    ],
    ids=["rgb", "wide", "tall", "grey", "grey-alpha", "palette-transparent", "palette", "16-bit", "exif"],
)
def test_pixels_are_the_image_processors(image, options, tmp_path):
    path = tmp_path / "image.png"
    data = encoded(image, path, **options)
    with Image.open(path) as opened:
        expected = CtrlCscImageProcessor(image_size=SIZE)(opened, return_tensors="pt").pixel_values
    pixels = to_pixel_values(torch.from_numpy(np.stack([decode({"bytes": data, "path": None}, SIZE)])))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def large_jpeg(path: Path, **options) -> dict:
    rows, columns = np.mgrid[:300, :400]
    smooth = np.stack([127 + 120 * np.sin(rows / 40), 127 + 120 * np.cos(columns / 50), rows * 0.8], -1)
    data = encoded(Image.fromarray(smooth.astype(np.uint8)), path, quality=95, **options)
    return {"bytes": data, "path": str(path)}


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_reduced_and_looks_the_same(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = large_jpeg(tmp_path / "large.jpg", exif=exif)
    with Image.open(image["path"]) as opened:
        expected = CtrlCscImageProcessor(image_size=32)(opened, return_tensors="pt").pixel_values
    difference = (to_pixel_values(torch.from_numpy(np.stack([decode(image, 32)]))) - expected).abs()
    assert difference.mean() < 1 / 127.5
    # Decoded whole, it would be the same but for rounding; one that has to be turned is.
    assert (difference.max() > 1e-6) == (orientation == 1)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_of_a_reduced_jpeg_is_that_of_the_whole_one(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = large_jpeg(tmp_path / "large.jpg", exif=exif)
    with Image.open(image["path"]) as opened:
        whole = ImageOps.exif_transpose(opened).convert("RGB")
    scratch = tmp_path / "whole.png"
    lossless = {"bytes": encoded(whole, scratch), "path": str(scratch)}  # a PNG is never decoded reduced
    for seed in range(5):
        crops = [decode(i, 32, "crop_and_flip", random.Random(seed)).astype(int) for i in (image, lossless)]
        assert abs(crops[0] - crops[1]).mean() < 1


def test_photographs_decoded_reduced_are_those_decoded_whole():
    folder = os.environ.get("CTRL_CSC_IMAGENET_SAMPLE")
    if folder is None:
        pytest.skip("CTRL_CSC_IMAGENET_SAMPLE does not name a local sample of ImageNet")
    images = load_images(ImageSource(dataset_name=folder, split="validation", streaming=True, label_column=None))
    for row in images.take(20):
        whole = Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")
        lossless = BytesIO()
        whole.save(lossless, "PNG")
        reduced, full = (
            decode(i, 32).astype(float) for i in (row["image"], {"bytes": lossless.getvalue(), "path": ""})
        )
        assert 10 * np.log10(255**2 / np.square(reduced - full).mean()) > 30  # dB


def test_cifar10_streams():
    folder = os.environ.get("CTRL_CSC_CIFAR10")
    if folder is None:
        pytest.skip("CTRL_CSC_CIFAR10 does not name a local copy of CIFAR-10")
    images = load_images(ImageSource(dataset_name=folder, streaming=True))
    assert len(images.features["label"].names) == 10
    options = {"label_column": "label", "image_size": 32, "shuffle_buffer": 500, "augmentation": "flip"}
    batch = next(iter(loader_of(images, batch_size=256, num_workers=2, **options)))
    assert batch["pixels"].shape == (256, 3, 32, 32)
    assert batch["labels"].unique().tolist() == list(range(10))
