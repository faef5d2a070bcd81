"""Training images: each seen once, in an order that can be repeated; a broken one costs a warning."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

datasets = pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from data import (  # noqa: E402
    ImageSource,
    ImageStream,
    build_dataloader,
    collate,
    hold_out,
    load_images,
    take_images,
)

from ctrl_csc_hf.image_processing_ctrl_csc import CtrlCscImageProcessor  # noqa: E402

SIZE = 8
NUM_IMAGES = 23
BROKEN = 5
READABLE = [index for index in range(NUM_IMAGES) if index != BROKEN]
COLUMNS = {"image_column": "image", "label_column": "label"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


def random_image(index: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, path: Path, **options) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory) -> str:
    """Three shards of PNGs, labelled by their number; one of them is cut short."""
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


def stream_of(dataset, **options) -> ImageStream:
    defaults = {"image_size": SIZE, "augmentation": "none", "shuffle": True, "shuffle_buffer": 6, "seed": 0}
    return ImageStream(dataset, **(COLUMNS | defaults | options))


def epoch_of(stream: ImageStream, epoch: int = 0, num_workers: int = 0) -> tuple[list[int], int]:
    """Labels in order, and the number of unreadable images."""
    loader = build_dataloader(stream, batch_size=4, num_workers=num_workers, drop_last=False)
    stream.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([batch["labels"] for batch in batches]).tolist(), sum(batch["unreadable"] for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_sees_every_image_once(images, world_size, num_workers, shuffle):
    epochs = [
        epoch_of(stream_of(images, shuffle=shuffle, rank=rank, world_size=world_size), 1, num_workers)
        for rank in range(world_size)
    ]
    assert sorted(label for labels, _ in epochs for label in labels) == READABLE
    assert sum(unreadable for _, unreadable in epochs) == 1


def test_more_workers_than_shards_see_every_image_once(images):
    labels, unreadable = epoch_of(stream_of(images), num_workers=4)
    assert sorted(labels) == READABLE
    assert unreadable == 1


def test_the_order_is_a_function_of_seed_and_epoch(images):
    first, second = stream_of(images), stream_of(images)
    orders = [epoch_of(first, epoch)[0] for epoch in range(3)]
    assert len({tuple(order) for order in [*orders, READABLE]}) == 4
    assert [epoch_of(second, epoch)[0] for epoch in (2, 0, 1)] == [orders[2], orders[0], orders[1]]
    assert epoch_of(stream_of(images, seed=1))[0] != orders[0]


def test_without_shuffling_every_epoch_has_the_order_of_the_source(images):
    stream = stream_of(images, shuffle=False)
    assert [epoch_of(stream, epoch)[0] for epoch in (0, 1)] == [READABLE, READABLE]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_that_live_on_follow_the_epoch(images, num_workers):
    stream = stream_of(images)
    loader = build_dataloader(stream, batch_size=4, num_workers=num_workers, drop_last=False)
    orders = []
    for epoch in (0, 1, 0, 1):
        stream.set_epoch(epoch)
        orders.append(torch.cat([batch["labels"] for batch in loader]).tolist())
    assert orders[:2] == orders[2:]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == READABLE


@pytest.mark.parametrize("augmentation", ["flip", "crop_and_flip"])
def test_augmentation_is_a_function_of_seed_and_epoch(images, augmentation):
    def pixels(seed: int, epoch: int) -> torch.Tensor:
        stream = stream_of(images, shuffle=False, augmentation=augmentation, seed=seed)
        stream.set_epoch(epoch)
        torch.rand(1), np.random.rand()  # global generators have no say
        return torch.stack([example["pixel_values"] for example in stream])

    assert torch.equal(pixels(0, 1), pixels(0, 1))
    assert not torch.equal(pixels(0, 1), pixels(0, 2))
    assert not torch.equal(pixels(0, 1), pixels(1, 1))


def test_a_flip_mirrors_about_half_of_the_images(images):
    plain = [example["pixel_values"] for example in stream_of(images, shuffle=False)]
    flipped = [example["pixel_values"] for example in stream_of(images, shuffle=False, augmentation="flip")]
    mirrored = [torch.equal(one.flip(-1), other) for one, other in zip(plain, flipped, strict=True)]
    same = [torch.equal(one, other) for one, other in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 5 <= sum(mirrored) <= len(plain) - 5


def test_an_unreadable_image_is_named_in_a_warning(images, caplog):
    _, unreadable = epoch_of(stream_of(images))
    assert unreadable == 1
    assert [record.getMessage() for record in caplog.records if f"{BROKEN}.png" in record.getMessage()]


def test_unreadable_images_at_the_end_are_counted(images):
    last = images.take(BROKEN + 1)
    assert epoch_of(stream_of(last, shuffle=False)) == (READABLE[:BROKEN], 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_without_a_readable_image_is_an_error(images, num_workers):
    broken = images.filter(lambda row: row["label"] == BROKEN)
    with pytest.raises(ValueError, match="no batch"):
        epoch_of(stream_of(broken), num_workers=num_workers)
    with pytest.raises(ValueError, match="none of the 1 images"):
        take_images(broken, 3, image_size=SIZE, **COLUMNS)


def test_an_empty_data_set_is_an_error(images):
    empty = images.filter(lambda row: False)
    with pytest.raises(ValueError, match="empty"):
        epoch_of(stream_of(empty))


def test_an_epoch_shorter_than_a_batch_is_an_error_where_the_last_is_dropped(images):
    loader = build_dataloader(stream_of(images), batch_size=100, num_workers=0, drop_last=True)
    with pytest.raises(ValueError, match="100 images"):
        next(iter(loader))


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_become_labels(image_folder, tmp_path, streaming):
    images = load_images(ImageSource(train_data_dir=image_folder, streaming=streaming, cache_dir=str(tmp_path)))
    assert images.features["label"].names == ["bird", "cat"]
    labels, unreadable = epoch_of(stream_of(images), num_workers=1)
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    assert unreadable == 1


def test_without_a_label_column_there_are_no_labels(parquet_folder, tmp_path):
    source = ImageSource(train_data_dir=parquet_folder, label_column=None, cache_dir=str(tmp_path))
    stream = stream_of(load_images(source), label_column=None)
    batch = next(iter(build_dataloader(stream, batch_size=4, num_workers=0, drop_last=False)))
    assert set(batch) == {"pixel_values", "unreadable"}


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


def test_a_wrong_source_is_an_error(tmp_path, images):
    with pytest.raises(ValueError, match="got neither"):
        ImageSource()
    with pytest.raises(ValueError, match="must be a folder"):
        load_images(ImageSource(train_data_dir=str(tmp_path / "missing")))
    with pytest.raises(ValueError, match="augmentation must be one of"):
        stream_of(images, augmentation="rotate")
    with pytest.raises(ValueError, match="rank must be in"):
        stream_of(images, rank=2, world_size=2)


def test_held_out_images_are_the_first_readable_ones(images):
    batch = take_images(images, 6, image_size=SIZE, **COLUMNS)
    assert batch["labels"].tolist() == READABLE[:6]
    assert batch["unreadable"] == 1
    expected = [np.asarray(random_image(index)) for index in READABLE[:6]]
    assert np.array_equal(((batch["pixel_values"] + 1) * 127.5).round().permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_held_out_images_are_not_trained_on(images, num_workers):
    rest, held_out = hold_out(images, 10, image_column="image")
    assert [row["label"] for row in held_out] == list(range(10))
    assert sorted(epoch_of(stream_of(rest), num_workers=num_workers)[0]) == list(range(10, NUM_IMAGES))
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
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    pixels = collate(list(stream_of(dataset, label_column=None)))["pixel_values"]
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_a_large_jpeg_is_decoded_reduced_and_looks_the_same(tmp_path):
    rows, columns = np.mgrid[:300, :400]
    smooth = np.stack([127 + 120 * np.sin(rows / 40), 127 + 120 * np.cos(columns / 50), rows * 0.8], -1)
    path = tmp_path / "large.jpg"
    data = encoded(Image.fromarray(smooth.astype(np.uint8)), path, quality=95)
    with Image.open(path) as opened:
        expected = CtrlCscImageProcessor(image_size=32)(opened, return_tensors="pt").pixel_values
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    pixels = take_images(dataset, 1, image_column="image", label_column=None, image_size=32)["pixel_values"]
    assert (pixels - expected).abs().mean() < 1 / 127.5


def test_cifar10_streams():
    folder = os.environ.get("CTRL_CSC_CIFAR10")
    if folder is None:
        pytest.skip("CTRL_CSC_CIFAR10 does not name a local copy of CIFAR-10")
    images = load_images(ImageSource(dataset_name=folder, streaming=True))
    assert len(images.features["label"].names) == 10
    loader = build_dataloader(
        stream_of(images, image_size=32, shuffle_buffer=500, augmentation="flip"),
        batch_size=256,
        num_workers=2,
        drop_last=True,
    )
    batch = next(iter(loader))
    assert batch["pixel_values"].shape == (256, 3, 32, 32)
    assert batch["pixel_values"].min() >= -1 and batch["pixel_values"].max() <= 1
    assert batch["labels"].unique().tolist() == list(range(10))
    assert batch["unreadable"] == 0
