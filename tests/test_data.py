"""Images from any source, decoded: what cannot be is a clear error; a large JPEG costs a fraction."""

import os
import random
import re
from collections import Counter
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import BROKEN, NUM_IMAGES, READABLE, SIZE, encoded, random_image
from PIL import Image, ImageOps

from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.latents import encoding
from ctrl_csc_hf.latents.encoding import ImageDataset, encode_dataset, find_columns, find_data, split_names
from ctrl_csc_hf.training.data import (
    ImageSource,
    decode,
    hold_out,
    identify,
    load_images,
    load_splits,
    take_examples,
    take_images,
    to_pixel_values,
)
from ctrl_csc_hf.training.stream import ImageLoader, ImageStream


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


@pytest.mark.parametrize(
    ("files", "splits", "labels"),
    [
        (["boat/1.png", "bus/1.png", "train/1.png"], {"train": 3}, ["boat", "bus", "train"]),
        (["cat/1.png", "test/1.png", "dev board/1.png"], {"train": 3}, ["cat", "dev board", "test"]),
        (["train station.png", "my train.png", "test shot.png", "bird.png"], {"train": 4}, None),
        (["test/1.png", "val/1.png"], {"train": 2}, ["test", "val"]),  # no images to train on
        (["train/1.png", "test/1.png"], {"train": 1, "test": 1}, None),
        (["train/train/1.png", "train/b/1.png", "test/b/1.png"], {"train": 2, "test": 1}, ["b", "train"]),
        (["train/a/1.png", "test/a/1.png", "test/b/1.png"], {"train": 1, "test": 2}, ["a", "b"]),
        (["train/a/1.png", "train/b/1.png", "test/1.png"], {"train": 2, "test": 1}, None),
        (["Training/1.PNG", "val/1.png", "dev/2.png"], {"train": 1, "validation": 2}, None),
        (["data/train/a/1.png", "data/testing/b/1.png"], {"train": 1, "test": 1}, ["a", "b"]),
        (["a/1.png", "b/c/1.png", ".hidden/1.png", "__MACOSX/1.png"], {"train": 2}, None),
        (["a/1.png", "a/2.png"], {"train": 2}, None),
    ],
)
@pytest.mark.parametrize("folder", ["photos", "a[1] *?é"])
def test_only_whole_names_of_folders_are_splits_and_labels(files, splits, labels, folder, tmp_path):
    for name in files:
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(0).save(path)
    found = find_data(str(tmp_path / folder))
    assert datasets.get_dataset_split_names(**found) == list(splits)
    for split, count in splits.items():
        images = datasets.load_dataset(**found, split=split, streaming=True)
        rows = list(images)
        assert len(rows) == count and getattr(images.features.get("label"), "names", None) == labels
        assert labels is None or None not in [row["label"] for row in rows]


@pytest.mark.parametrize("name", ["a/1::2.png", "a::b/1.png", "a::b/c/1.png"])
def test_names_that_datasets_takes_apart_are_told(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True)
    random_image(0).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds .*::.*, which `datasets` cannot read: rename it"):
        find_data(str(tmp_path))


@pytest.mark.parametrize("files", [("cat/1.png", "dog/2.png"), ("train.parquet", "test.parquet")])
def test_the_folder_that_one_works_in_is_a_data_set_too(files, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_dict({"image": [random_image(0)]}, datasets.Features({"image": datasets.Image()}))
    for path in (tmp_path / "photos" / name for name in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(0).save(path) if path.suffix == ".png" else rows.to_parquet(path)
    monkeypatch.chdir(tmp_path / "photos")
    for folder in (".", "./"):
        assert "train" in datasets.get_dataset_split_names(**find_data(folder))
        images = load_images(ImageSource(train_data_dir=folder, streaming=folder == ".", cache_dir=str(tmp_path)))
        assert len(list(images)) == (2 if "cat/1.png" in files else 1)


@pytest.mark.parametrize(
    ("files", "metadata", "bare"),
    [  # of metadata files the images that they list
        (["train/1", "train/2", "test/3"], {"": ["train/1", "train/2", "test/3"]}, r"(train|test)/\d"),
        (["data/train/1", "data/test/2"], {"data": ["train/1", "test/2"]}, r"data/(train|test)/\d"),
        (["train/1", "test/2"], {"train": ["1"]}, "test/2"),
        (["cat/1", "dog/2"], {"cat": ["1"]}, "dog/2"),
        (["train/1", "train/2", "test/3"], {"train": ["1", "2"], "test": ["3"]}, None),
        (["train/cat/1", "train/dog/2", "test/3"], {"train/cat": ["1"], "train/dog": ["2"], "test": ["3"]}, None),
        (["data/cat/1", "data/dog/2", "3"], {"": ["data/cat/1", "data/dog/2", "3"]}, None),
    ],
)
def test_metadata_files_describe_all_images_of_their_split_or_are_told(files, metadata, bare, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(0).save(tmp_path / f"{name}.png")
    for folder, names in metadata.items():
        lines = ["file_name,kind", *(f"{name}.png,{name[-1]}" for name in names)]
        (tmp_path / folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    if bare:
        with pytest.raises(ValueError, match=rf"metadata.csv, but no metadata file in .* for {bare}\.png"):
            find_data(str(tmp_path))
    else:
        found = find_data(str(tmp_path))
        for split in datasets.get_dataset_split_names(**found):
            rows = load_images(ImageSource(dataset_name=str(tmp_path), split=split, streaming=True), "kind")
            kinds = {Path(row["image"]["path"]).stem: row["kind"] for row in rows}
            expected = {name[-1]: int(name[-1]) for name in files if name.startswith("test") == (split == "test")}
            assert kinds == expected


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_links_to_files_are_followed_and_others_are_told(kind, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [random_image(0)]}, datasets.Features({"image": datasets.Image()}))
    for name in ("cat/1", "bird/1"):
        path = tmp_path / "originals" / f"{name}.{kind}"
        path.parent.mkdir(parents=True)
        rows.to_parquet(path) if kind == "parquet" else random_image(0).save(path)
        link = tmp_path / "linked" / f"{name}.{kind}"
        link.parent.mkdir(parents=True)
        link.symlink_to(path)
    images = datasets.load_dataset(**find_data(str(tmp_path / "linked")), split="train", streaming=True)
    assert len(list(images)) == 2
    link = tmp_path / "linked" / "dog"
    for target, said in ((tmp_path / "originals" / "cat", "a folder"), (tmp_path / "gone", "nothing")):
        link.symlink_to(target)
        with pytest.raises(ValueError, match=f"linked holds .*dog, a link to {said}, which would be passed over: put"):
            find_data(str(tmp_path / "linked"))
        link.unlink()
    (tmp_path / "linked" / ".dog").symlink_to(tmp_path / "originals")  # hidden, as in any folder
    assert find_data(str(tmp_path / "linked"))


def test_a_folder_of_parquet_files_or_with_configurations_of_its_own_is_left_to_datasets(tmp_path):
    folder = tmp_path / "b[1]"
    rows = datasets.Dataset.from_dict({"image": [random_image(0)] * 3}, datasets.Features({"image": datasets.Image()}))
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        rows.to_parquet(folder / "data" / f"{name}.parquet")
    images = load_images(ImageSource(dataset_name=str(folder), streaming=True))
    assert len(list(images)) == 6 and datasets.get_dataset_split_names(**find_data(str(folder))) == ["train", "test"]
    for name in ("left/1.png", "right/1.png"):
        (tmp_path / "named" / name).parent.mkdir(parents=True)
        random_image(0).save(tmp_path / "named" / name)
    card = "---\nlicense: mit\nconfigs:\n- config_name: d\n  data_files:\n  - {split: odd, path: left/*}\n---\n"
    (tmp_path / "named" / "README.md").write_text(card, encoding="utf-8")
    assert datasets.get_dataset_split_names(**find_data(str(tmp_path / "named"))) == ["odd"]


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        (["boat", "train station"], "boat"),
        (["train", "test", "extra"], "extra"),
        (["data/train-00000-of-00001", "data/extra"], "data/extra"),
        (["cat/0", "test/0"], "cat/0"),
        (["train", "train test"], "train test"),  # in both
        (["0", "boat"], None),
        (["train-0", "train-1", "test station"], None),
        (["train/0", "test/0", ".hidden/0"], None),
    ],
)
@pytest.mark.parametrize("folder", ["tables", "b[1]"])
def test_a_parquet_file_in_no_split_or_in_two_is_told(files, wrong, folder, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [random_image(0)]}, datasets.Features({"image": datasets.Image()}))
    for name in files:
        rows.to_parquet(tmp_path / folder / f"{name}.parquet")
    if wrong:
        with pytest.raises(ValueError, match=rf"\['{wrong}.parquet'\] belong to none or to several: call the files"):
            find_data(str(tmp_path / folder))
    else:
        found = find_data(str(tmp_path / folder))
        splits = datasets.get_dataset_split_names(**found)
        counts = [len(list(datasets.load_dataset(**found, split=split, streaming=True))) for split in splits]
        assert sum(counts) == sum(not name.startswith(".") for name in files)


@pytest.mark.parametrize(
    "other", ["photos.zip", "dog/photos.ZIP", "train.parquet", "train.tar", "dog/3.avif", "cat/4.png.gz"]
)
def test_what_would_be_read_beside_image_files_in_their_place_or_not_at_all_is_told(other, tmp_path):
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / name).parent.mkdir()
        random_image(0).save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("other files stay unread", encoding="utf-8")
    assert len(load_images(ImageSource(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / ".cache")))) == 2
    (tmp_path / other).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"got 2 image files, such as .*, and 1 others, such as {other}, .*: convert"):
        find_data(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.csv", b"image,label\n0.png,1\n", "`file_name`"),
        ("metadata.csv", b"file_name,text\n0.png,\xe9\n", "codec can't decode"),
        ("metadata.jsonl", b"{", "JSON parse error"),
        ("train-0.parquet", b"PAR1", "[Pp]arquet"),
        ("DATA.py", b"", "Dataset scripts are no longer supported"),
    ],
)
def test_a_data_set_that_cannot_be_read_tells_why(name, content, reason, tmp_path):
    if not name.endswith(".parquet"):
        random_image(0).save(tmp_path / "0.png")
    (tmp_path / name.replace("DATA", tmp_path.name)).write_bytes(content)
    with pytest.raises(ValueError, match=rf"the data set {re.escape(str(tmp_path))} cannot be read: .*{reason}"):
        split_names(str(tmp_path))


def test_without_a_label_column_there_are_no_labels(parquet_folder, tmp_path):
    source = ImageSource(train_data_dir=parquet_folder, label_column="none", cache_dir=str(tmp_path))
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


def indices_of(taken: torch.Tensor) -> list[int]:
    """Which of the random images these are."""
    known = {np.asarray(random_image(index)).tobytes(): index for index in range(NUM_IMAGES)}
    pixels = ((taken + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [known[np.ascontiguousarray(image).tobytes()] for image in pixels]


def test_a_sample_of_all_images_is_all_readable_ones_with_their_labels_in_random_order(images):
    taken, labels = take_examples(images, 100, image_column="image", image_size=SIZE, label_column="label")
    assert indices_of(taken) == labels.tolist() != READABLE
    assert sorted(labels.tolist()) == READABLE


def test_samples_are_drawn_from_the_whole_split_and_belong_to_their_seed(images):
    form = {"image_column": "image", "image_size": SIZE}
    drawn = Counter()
    for seed in range(200):
        sample = indices_of(take_images(images, 5, seed=seed, **form))
        assert len(set(sample)) == 5
        drawn.update(sample)
    assert indices_of(take_images(images, 5, seed=7, **form)) == indices_of(take_images(images, 5, seed=7, **form))
    # 22 readable images, each in a sample with probability 5/22: 45.5 expected, standard deviation 5.9
    assert set(drawn) == set(READABLE) and all(20 < count < 75 for count in drawn.values())


def test_where_no_image_can_be_read_a_sample_is_an_error(images):
    broken = images.filter(lambda row: row["label"] == BROKEN)
    with pytest.raises(ValueError, match="image_column='image' must hold images that can be read, but none"):
        take_images(broken, 3, image_column="image", image_size=SIZE)


@pytest.mark.parametrize("broken", [None, {"bytes": None, "path": None}, {"bytes": b"no image", "path": None}])
@pytest.mark.parametrize("streaming", [False, True])
def test_null_and_truncated_images_are_skipped_by_samples_held_out_parts_and_encoding(broken, streaming, tmp_path):
    scratch = tmp_path / "scratch.png"
    rows = [{"bytes": encoded(random_image(index), scratch), "path": None} for index in range(40)]
    rows[0::10] = [broken] * 4
    pyarrow_rows = pa.array(rows, type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": pyarrow_rows, "label": list(range(40))})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset(table).cast(features).to_parquet(tmp_path / "data" / "train.parquet")
    source = ImageSource(train_data_dir=str(tmp_path / "data"), streaming=streaming, cache_dir=str(tmp_path / "cache"))
    images = load_images(source)
    rest, held = hold_out(images, 4, image_column="image")
    assert len(list(rest)) in (36, 33) and len(held) == 4  # a stream leaves out all copies of a broken one
    assert len(take_images(images, 40, image_column="image", image_size=SIZE)) == 36
    model, processor = CtrlCscModel(CtrlCscConfig(image_size=8)).eval(), CtrlCscImageProcessor(image_size=8)
    (batch,) = encode_dataset(images, model, processor, label_column="label")
    assert batch.labels.tolist() == [index for index in range(40) if index % 10]


def sorted_by_class(folder: Path, streaming: bool, sizes: list[int]) -> ImageDataset:
    """Noise with labels, one class after the other; of class k there are sizes[k] images."""
    if not folder.exists():
        labels = [label for label, size in enumerate(sizes) for _ in range(size)]
        rows = {"image": [random_image(index, (2, 2)) for index in range(len(labels))], "label": labels}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=len(sizes))})
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet", batch_size=20)
    return load_images(
        ImageSource(train_data_dir=str(folder), streaming=streaming, cache_dir=str(folder.with_suffix(".cache")))
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_images_are_a_tenth_at_most_and_leave_every_class_in_training(streaming, tmp_path, caplog):
    images = sorted_by_class(tmp_path / "data", streaming, sizes=[1] * 10 + [90, 90])
    columns = {"image_column": "image", "label_column": "label"}
    classes = Counter()
    for seed in range(20):
        rest, held = hold_out(images, 100, seed=seed, **columns)
        assert len(held) == 19 and {row["label"] for row in rest} == set(range(12))
        classes.update(row["label"] for row in held)
        assert len(list(rest)) == 190 - 19
    assert set(classes) == {10, 11} and 120 < classes[10] < 260  # of 380, half expected
    assert "19 images are held out instead of 100, of 190 in all" in caplog.text


def test_copies_of_a_held_out_image_do_not_take_the_last_of_a_class_out_of_a_stream(tmp_path):
    scratch = tmp_path / "scratch.png"
    data = [encoded(random_image(index), scratch) for index in (*range(27), 27, 27, 0)]
    rows = {"image": [{"bytes": image, "path": None} for image in data], "label": [0] * 27 + [1, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / "train.parquet")
    images = load_images(ImageSource(train_data_dir=str(tmp_path / "data"), streaming=True))
    for seed in range(40):
        rest, held = hold_out(images, 3, image_column="image", label_column="label", seed=seed)
        assert {row["label"] for row in rest} == {0, 1, 2} and len(list(rest)) == 27 and len(held) == 3


def test_copies_in_a_streamed_folder_are_held_out_together(tmp_path):
    for index in range(40):  # each image twice, under two names
        random_image(index % 20).save(tmp_path / f"{index}.png")
    images = load_images(ImageSource(train_data_dir=str(tmp_path), streaming=True))
    rest, held = hold_out(images, 4, image_column="image")
    contents = [{Path(row["image"]["path"]).read_bytes() for row in rows} for rows in (rest, held)]
    assert len(contents[1]) == 4 and contents[0].isdisjoint(contents[1]) and len(list(rest)) == 40 - 8


def test_images_that_are_all_the_last_of_their_class_cannot_be_held_out(tmp_path):
    images = sorted_by_class(tmp_path / "data", True, sizes=[1] * 30)
    with pytest.raises(ValueError, match=r"no image can be held out of 30.*--validation_split"):
        hold_out(images, 3, image_column="image", label_column="label")


def test_a_long_stream_is_sampled_from_a_part_of_its_row_groups_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SAMPLED_SHARDS", 10)
    images = sorted_by_class(tmp_path / "data", True, sizes=[40] * 50)  # 100 row groups of 20 images
    rows, seen = encoding.reservoir(images, 50, seed=0)
    assert seen == 10 * 20 >= encoding.SAMPLED_ROWS * len(rows) and len(rows) >= 50
    assert len({row["label"] for _, row in rows}) > 5  # the first 50 rows have two labels


def test_a_tenth_of_a_long_stream_can_be_held_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "SAMPLED_SHARDS", 10)
    images = sorted_by_class(tmp_path / "data", True, sizes=[40] * 50)  # 100 row groups of 20 images
    for count in (100, 200):
        rest, held = hold_out(images, count, image_column="image", label_column="label")
        assert len(held) == count and len(list(rest)) == 2000 - count
    assert "held out instead of" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_told_from_one_of_other_images_labels_or_order_wherever_they_differ(streaming, tmp_path):
    numbers, labels = list(range(200)), [index // 100 for index in range(200)]
    others = {
        "same": (numbers, labels),
        "labels": (numbers, labels[::-1]),
        "half of the images": (numbers[:100] + list(range(1000, 1100)), labels),
        "order": (numbers[::-1], labels),
    }
    identities = {}
    for name, (images, of_these) in {"first": (numbers, labels), **others}.items():
        rows = {"image": [random_image(number) for number in images], "label": of_these}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / name / "train.parquet", batch_size=20)
        source = ImageSource(dataset_name=str(tmp_path / name), streaming=streaming, cache_dir=str(tmp_path / "cache"))
        identities[name] = identify(load_images(source), load_images(source), "image", "label")
    assert [name for name in others if identities[name] == identities["first"]] == ["same"]


@pytest.mark.parametrize(
    ("spec", "held_out", "allowed"),
    [
        ("train", "train[:10%]", False),
        ("train[10%:]", "train[:20%]", False),
        ("train[10%:]", "train[:10%]", True),
        ("train+test", "test", False),
        ("train", "test", True),
    ],
)
def test_splits_to_train_on_and_held_out_share_no_image(spec, held_out, allowed, tmp_path):
    for split in ("train", "test"):
        rows = {"image": [random_image(index) for index in range(20)]}
        dataset = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()}))
        dataset.to_parquet(tmp_path / "data" / f"{split}.parquet")
    source = ImageSource(train_data_dir=str(tmp_path / "data"), split=spec, cache_dir=str(tmp_path / "cache"))
    if allowed:
        images, others, name = load_splits(source, held_out, 5, seed=0, preferred=())
        assert name == held_out and len(images) and len(others)
    else:
        with pytest.raises(ValueError, match="must have no image of the split to train on"):
            load_splits(source, held_out, 5, seed=0, preferred=())


@pytest.mark.parametrize("validation_split", [None, "train"])
def test_where_there_is_no_other_split_a_part_is_held_out(validation_split, parquet_folder, tmp_path):
    source = ImageSource(train_data_dir=parquet_folder, cache_dir=str(tmp_path), label_column="none")
    images, others, name = load_splits(source, validation_split, 2, seed=0, preferred=("test", "valid"))
    assert (len(images), len(others), name) == (NUM_IMAGES - 2, 2, "train")
    held = {row["image"]["path"] for row in others}
    assert not held & {row["image"]["path"] for row in images}
    with pytest.raises(ValueError, match=r"must be one of \['train'\], got \['dev'\]"):
        load_splits(source, "dev", 2, seed=0, preferred=())


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ({"img": "image", "label": "class"}, ("img", "label")),
        ({"picture": "image", "fine": "class", "coarse": "class"}, ("picture", None)),
        ({"picture": "image", "fine": "class", "label": "class"}, ("picture", "label")),
        ({"picture": "image", "labels": "int64", "id": "int64"}, ("picture", "labels")),
        ({"picture": "image", "id": "int64", "label": "string"}, ("picture", None)),
        ({"id": "int64"}, r"no column is of the type datasets\.Image: \{'id': Value\('int64'\)\}; cast_column"),
        ({"a": "image", "b": "image"}, "image_column must name the column of images, one of .*'a', 'b'"),
    ],
)
def test_columns_are_found_by_their_type(features, found):
    types = {"image": datasets.Image(), "class": datasets.ClassLabel(num_classes=3)}
    columns = datasets.Features({name: types.get(kind) or datasets.Value(kind) for name, kind in features.items()})
    if isinstance(found, tuple):
        assert find_columns(columns) == found
        assert find_columns(columns, label_column="none") == (found[0], None)
    else:
        with pytest.raises(ValueError, match=found):
            find_columns(columns)


def test_an_image_that_the_processor_refuses_is_unreadable_before_it_takes_memory(tmp_path):
    data = encoded(Image.new("L", (65535, 1)), tmp_path / "thin.png")
    with pytest.raises(ValueError, match="1 x 65535 pixels: a side must be at most 1000 times the other"):
        decode({"bytes": data, "path": None}, 32)


@pytest.mark.parametrize(("label", "said"), [(None, "None"), (-1, "-1"), (7, "7")])
def test_a_label_that_is_null_or_outside_of_its_classes_is_an_error_that_names_image_and_column(label, said, tmp_path):
    scratch = tmp_path / "scratch.png"
    rows = [{"bytes": encoded(random_image(index), scratch), "path": f"{index}.png"} for index in range(8)]
    pixels = pa.array(rows, type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": pixels, "kind": pa.array([0, 1, 2, label, 0, 1, 2, 0], type=pa.int64())})
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(num_classes=3)})
    dataset = load_images_of(datasets.Dataset(table, info=datasets.DatasetInfo(features=features)))
    message = rf"label_column='kind' must hold integers in \[0, 3\), but 3\.png has the label {said}"
    with pytest.raises(ValueError, match=message):
        list(loader_of(dataset, label_column="kind").epoch())


def load_images_of(dataset: datasets.Dataset) -> datasets.Dataset:
    return encoding.undecoded(dataset, None, None)[0]


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
    images = load_images(ImageSource(dataset_name=folder, split="validation", streaming=True))
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
