"""The order of training images: each once an epoch, whatever the processes and workers, and resumed to the image."""

import copy
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from conftest import BROKEN, NUM_IMAGES, READABLE, SIZE, random_image

from ctrl_csc_hf.training import stream
from ctrl_csc_hf.training.data import ImageDataset, ImageSource, hold_out, load_images
from ctrl_csc_hf.training.stream import ImageLoader, ImageStream, Place

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


@pytest.fixture(params=[False, True], ids=["map", "streamed"])
def images(request: pytest.FixtureRequest, parquet_folder: str, tmp_path: Path) -> ImageDataset:
    """Of READABLE numbers as labels, and one that is broken."""
    return load_images(ImageSource(train_data_dir=parquet_folder, streaming=request.param, cache_dir=str(tmp_path)))


def numbered(folder: Path, sizes: list[int]) -> ImageDataset:
    """A streamed data set of shards of these sizes, whose images are labelled by their number."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    scratch, first = folder / "image.png", 0
    for shard, size in enumerate(sizes):
        rows: dict[str, list] = {"image": [], "label": list(range(first, first + size))}
        for label in rows["label"]:
            random_image(label).save(scratch)
            rows["image"].append({"bytes": scratch.read_bytes(), "path": f"{label}.png"})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"train-{shard:05d}.parquet"))
        first += size
    scratch.unlink(missing_ok=True)
    return load_images(ImageSource(train_data_dir=str(folder), streaming=True))


def loader_of(
    dataset: ImageDataset, *, batch_size: int = 4, num_workers: int = 0, share: float = 0.5, **options
) -> ImageLoader:
    defaults = {"image_size": SIZE, "augmentation": "none", "shuffle_buffer": 6, "seed": 0}
    columns = {"image_column": "image", "label_column": "label"}
    images = ImageStream(dataset, **(columns | defaults | options))
    return ImageLoader(images, batch_size=batch_size, num_workers=num_workers, max_unreadable_share=share)


def labels_of(batches: Iterator[dict[str, torch.Tensor]]) -> list[int]:
    return [label for batch in batches for label in batch["labels"].tolist()]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_sees_every_image_once(images: ImageDataset, world_size: int, num_workers: int) -> None:
    loaders = [
        loader_of(images, rank=rank, world_size=world_size, num_workers=num_workers) for rank in range(world_size)
    ]
    for _ in range(2):
        assert sorted(label for loader in loaders for label in labels_of(loader.epoch())) == READABLE
    assert [sum(loader.place.epoch for loader in loaders), sum(loader.place.unreadable for loader in loaders)] == [
        2 * world_size,
        2,
    ]
    assert sum(loader.place.images for loader in loaders) == 2 * len(READABLE)


@pytest.mark.parametrize("sizes", [[200], [3, 90, 1], [37] * 5, [9] * 40])
@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_shards_of_any_number_and_size_are_divided_without_loss(
    sizes: list[int], world_size: int, tmp_path: Path
) -> None:
    dataset = numbered(tmp_path, sizes)
    loaders = [loader_of(dataset, rank=rank, world_size=world_size, shuffle_buffer=50) for rank in range(world_size)]
    for _ in range(2):
        assert sorted(label for loader in loaders for label in labels_of(loader.epoch())) == list(range(sum(sizes)))


def test_batches_go_on_over_the_end_of_an_epoch_and_leave_no_image_out(images: ImageDataset) -> None:
    epoch, size = len(READABLE), 5
    batches = list(islice(loader_of(images, batch_size=size), epoch))
    assert [len(batch["labels"]) for batch in batches] == [size] * epoch
    labels = labels_of(iter(batches))
    epochs = [labels[first : first + epoch] for first in range(0, len(labels), epoch)]
    assert all(sorted(labels) == READABLE for labels in epochs)
    assert len({tuple(labels) for labels in epochs}) == len(epochs) == size


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 40])
def test_the_order_does_not_depend_on_the_number_of_workers(num_workers: int, images: ImageDataset) -> None:
    def order(num_workers: int) -> list[int]:
        return labels_of(islice(loader_of(images, num_workers=num_workers), 3 * NUM_IMAGES))

    assert order(num_workers) == order(0)


def test_the_order_is_a_function_of_seed_epoch_and_processes(images: ImageDataset) -> None:
    def epoch(number: int, **options: int) -> tuple[int, ...]:
        loader = loader_of(images, **options)
        loader.place.epoch = number
        return tuple(labels_of(loader.epoch()))

    orders = [epoch(number) for number in range(3)]
    assert len({*orders, tuple(READABLE), epoch(0, seed=1), epoch(0, world_size=2)}) == 6
    assert [epoch(number) for number in (2, 0, 1)] == [orders[2], orders[0], orders[1]]


def test_images_of_all_shards_are_mixed(tmp_path: Path) -> None:
    labels = torch.tensor(labels_of(loader_of(numbered(tmp_path, [160] * 4), shuffle_buffer=320).epoch()))
    assert len((labels[:64] // 160).unique()) == 4
    neighbours = (labels[1:] - labels[:-1]).abs() == 1
    assert neighbours.float().mean() < 0.1


@pytest.mark.parametrize("workers", [(0, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("sizes", [None, [70, 70, 40], [9] * 40])
def test_a_loader_goes_on_at_any_place_with_any_number_of_workers(
    workers: tuple[int, int], sizes: list[int] | None, tmp_path: Path, parquet_folder: str
) -> None:
    options = {"shuffle_buffer": 64, "augmentation": "crop_and_flip", "batch_size": 7}
    if sizes is None:
        dataset = load_images(ImageSource(train_data_dir=parquet_folder, cache_dir=str(tmp_path)))
    else:
        dataset = numbered(tmp_path, sizes)
    whole, places = [], [Place(list(loader_of(dataset).place.lanes))]
    loader = loader_of(dataset, num_workers=workers[0], **options)
    for batch in islice(loader, 60):
        whole.append(batch)
        places.append(Place(**copy.deepcopy(asdict(loader.place))))  # as from a checkpoint
    for start in (0, 1, 2, 5, 13, 29, 51, 59) if workers == (0, 0) else (3, 26):
        resumed = loader_of(dataset, num_workers=workers[1], **options)
        resumed.place = places[start]
        for batch, expected in zip(islice(resumed, 60 - start), whole[start:], strict=True):
            assert torch.equal(batch["pixels"], expected["pixels"])
            assert torch.equal(batch["labels"], expected["labels"])
        assert asdict(resumed.place) == asdict(places[-1])


@pytest.mark.parametrize("augmentation", ["flip", "crop_and_flip"])
def test_augmentation_is_a_function_of_seed_epoch_and_image(images: ImageDataset, augmentation: str) -> None:
    def pixels(epoch: int, **options: int) -> dict[int, torch.Tensor]:
        loader = loader_of(images, augmentation=augmentation, **options)
        loader.place.epoch = epoch
        batches = list(loader.epoch())
        torch.rand(1)  # global generators have no say
        return {
            label: pixels
            for batch in batches
            for label, pixels in zip(batch["labels"].tolist(), batch["pixels"], strict=True)
        }

    def same(first: dict[int, torch.Tensor], second: dict[int, torch.Tensor]) -> int:
        return sum(torch.equal(first[label], second[label]) for label in first)

    first = pixels(0)
    halves = pixels(0, rank=0, world_size=2) | pixels(0, rank=1, world_size=2)  # in another order
    assert same(first, pixels(0)) == same(first, halves) == len(READABLE)
    most = len(READABLE) - 5  # half of the images are not flipped, or flipped both times
    assert same(first, pixels(1)) < most and same(first, pixels(0, seed=1)) < most


def test_a_flip_mirrors_about_half_of_the_images(images: ImageDataset) -> None:
    pairs = zip(loader_of(images).epoch(), loader_of(images, augmentation="flip").epoch(), strict=True)
    mirrored, same = [], []
    for plain, flipped in pairs:
        for one, other in zip(plain["pixels"], flipped["pixels"], strict=True):
            mirrored.append(torch.equal(one.flip(-1), other))
            same.append(torch.equal(one, other))
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 5 <= sum(mirrored) <= len(READABLE) - 5


def test_an_unreadable_image_is_counted_and_named(images: ImageDataset, caplog: pytest.LogCaptureFixture) -> None:
    loader = loader_of(images)
    labels_of(loader.epoch())
    assert loader.place.unreadable == 1
    assert [Path(name).name for name in loader.place.unreadable_names] == [f"{BROKEN}.png"]
    assert [record.getMessage() for record in caplog.records if f"{BROKEN}.png" in record.getMessage()]


def test_too_many_unreadable_images_stop_the_run_with_their_names(
    images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels_of(loader_of(images, share=1e-3).epoch())  # one in at least a thousand is allowed
    monkeypatch.setattr(stream, "FEW_IMAGES", 10)
    with pytest.raises(ValueError, match=rf"1 of \d+ images .* max_unreadable_share=0.01 allows: .*{BROKEN}.png"):
        labels_of(loader_of(images, share=0.01).epoch())
    labels_of(loader_of(images, share=0.1).epoch())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_without_a_readable_image_is_an_error(images: ImageDataset, num_workers: int) -> None:
    broken = images.filter(lambda row: row["label"] == BROKEN)
    with pytest.raises(ValueError, match="found no image that can be read in 5 epochs"):
        next(iter(loader_of(broken, num_workers=num_workers)))


def test_an_empty_data_set_is_an_error(images: ImageDataset) -> None:
    with pytest.raises(ValueError, match="empty"):
        next(iter(loader_of(images.filter(lambda row: False))))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_held_out_images_are_not_trained_on(images: ImageDataset, num_workers: int) -> None:
    rest, held_out = hold_out(images, 2, image_column="image")
    held = {row["label"] for row in held_out}
    assert len(held) == 2
    trained_on = sorted(labels_of(loader_of(rest, num_workers=num_workers).epoch()))
    assert trained_on == [label for label in READABLE if label not in held]


def test_wrong_arguments_are_errors(images: ImageDataset) -> None:
    with pytest.raises(ValueError, match="augmentation must be one of"):
        loader_of(images, augmentation="rotate")
    with pytest.raises(ValueError, match="rank must be in"):
        loader_of(images, rank=2, world_size=2)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        loader_of(images, seed=-1)


class Flaky:
    """Rows of two shards, the second of which fails at row 50 as often as the file says, which is then one less."""

    def __init__(self, failures: Path) -> None:
        self.failures = failures

    def __call__(self, shards: list[int]) -> Iterator[dict]:
        for shard in shards:
            for row in range(80):
                left = int(self.failures.read_text(encoding="utf-8"))
                if (shard, row) == (1, 50) and left:
                    new = self.failures.with_name(f"{os.getpid()}")  # several workers read and write it
                    new.write_text(str(left - 1), encoding="utf-8")
                    os.replace(new, self.failures)
                    raise ConnectionError("the line is dead")
                yield {"image": random_image(80 * shard + row), "label": 80 * shard + row}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_fails_is_read_again_and_reported_when_it_stays_so(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "FIRST_PAUSE", 1e-3)
    failures = tmp_path / "failures"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.IterableDataset.from_generator(Flaky(failures), features, {"shards": [0, 1]})

    def epoch() -> list[int]:
        return labels_of(loader_of(dataset, num_workers=num_workers).epoch())

    failures.write_text("0", encoding="utf-8")
    undisturbed = epoch()
    assert sorted(undisturbed) == list(range(160))
    failures.write_text("3", encoding="utf-8")
    assert epoch() == undisturbed
    if not num_workers:
        assert "shard 1 of 2 cannot be read at row 3" in caplog.text  # rows are read 32 at a time
    failures.write_text("100", encoding="utf-8")
    with pytest.raises(OSError, match=r"shard 1 of 2 cannot be read at row 3\d, tried 6 times: .*the line is dead"):
        epoch()
