"""training/evaluate.py against scikit-learn's PCA and the definitions, and the rivals it measures."""

import importlib
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from baselines import ConvolutionalConfig, ConvolutionalModel
from conftest import random_image
from PIL import Image
from sklearn.decomposition import PCA
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.metrics import VisionFeatures
from ctrl_csc_hf.training.data import to_pixel_values
from ctrl_csc_hf.training.presets import load_preset


@pytest.fixture
def evaluate() -> ModuleType:
    return importlib.import_module("ctrl_csc_hf.training.evaluate")


@pytest.fixture
def settings(evaluate: ModuleType, image_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def fill(**changes: Any) -> Any:
        options = {
            "train_data_dir": str(image_folder),
            "num_images": 40,
            "num_frechet_images": 6,
            "num_probe_images": 60,
            "output_dir": str(tmp_path / "evaluation"),
        }
        return evaluate.EvaluationSettings(**options | changes)

    return fill


def classifier(folder: Path) -> str:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder)
    return str(folder)


def other_classifier(folder: Path) -> str:
    torch.manual_seed(1)
    config = MobileNetV2Config(depth_multiplier=0.1, finegrained_output=False, num_labels=3)
    MobileNetV2ForImageClassification(config).half().save_pretrained(folder)  # many weights come in half precision
    return str(folder)


def autoencoder_of_diffusers(folder: Path) -> str:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=[4], norm_num_groups=2, latent_channels=2, sample_size=16).save_pretrained(folder)
    return str(folder)


def test_evaluation_measures_the_model_and_its_rivals_on_the_same_images(
    evaluate: ModuleType,
    settings: Callable[..., Any],
    train: Callable[..., Path],
    tiny_preset: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    model = train("--max_train_steps", "1")
    written_by_train = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    convolutional = tmp_path / "convolutional"
    ConvolutionalModel(ConvolutionalConfig(**load_preset(str(tiny_preset))["model"])).save_pretrained(convolutional)
    kl = autoencoder_of_diffusers(tmp_path / "kl")
    results = evaluate.main(
        settings(
            model=str(model),
            rivals=[f"ordinary convolutions={convolutional}"],
            diffusers_autoencoders=[f"kl={kl}"],
            feature_model=[classifier(tmp_path / "resnet"), other_classifier(tmp_path / "mobilenet")],
            feature_size=[32, 40],
            unseen_dataset_name=str(shutil.copytree(image_folder, tmp_path / "unseen")),
            unseen_split="train",
            unseen_hub_dataset_id="org/unseen",
            num_unseen_images=20,
            output_dir=str(model),
        )
    )
    assert list(results) == ["CTRL-CSC", "ordinary convolutions", "kl", "PCA, 8 numbers", "mean image"]
    table = capsys.readouterr().out
    assert "|  | CTRL-CSC | ordinary convolutions |" in table
    assert f"| psnr | {results['CTRL-CSC']['psnr']:.4g} |" in table

    saved = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    assert saved["evaluation"]["results"] == results
    assert written_by_train.keys() < saved.keys() and saved["step"] == written_by_train["step"]
    assert not any(str(folder) in json.dumps(saved) for folder in (tmp_path, image_folder))
    unseen = {figure["name"]: figure for figure in saved["figures"] if figure["dataset"]}
    assert unseen["psnr"]["value"] == results["CTRL-CSC"]["unseen_psnr"] and unseen.keys() == {"psnr", "match"}
    assert (unseen["psnr"]["dataset"], unseen["psnr"]["num_images"]) == ("org/unseen", 20)
    figures = {figure["name"]: figure for figure in saved["figures"] if figure["dataset"] is None}
    names = ("a local ResNetForImageClassification", "a local MobileNetV2ForImageClassification")
    features = {(f["name"], f["feature_model"]): f for f in saved["figures"] if f["feature_model"]}
    distances = ("frechet_distance", "kernel_distance", "feature_cosine")
    assert set(features) == set(product((*distances, *(f"pca_{name}" for name in distances)), names))
    pca = results["PCA, 8 numbers"]
    assert figures["pca_psnr"]["value"] == pca["psnr"]
    measured = {"dataset": None, "split": "train", "measured_by": "training/evaluate.py"}
    # Those of train.py, of the same images, are replaced.
    assert len(saved["figures"]) == len(figures) + 2 * len(distances) + len(unseen)
    assert figures["psnr"] == measured | {
        "name": "psnr", "value": results["CTRL-CSC"]["psnr"], "num_images": 8, "feature_model": None
    }  # fmt: skip
    for (name, model_name), figure in features.items():
        column = pca if name.startswith("pca_") else results["CTRL-CSC"]
        value = column[f"{name.removeprefix('pca_')}, features of {model_name}"]
        assert figure == measured | {"name": name, "value": value, "num_images": 6, "feature_model": model_name}
    x = evaluate.load_data(settings(model=str(model)), 16).test[:6]
    features = VisionFeatures(tmp_path / "resnet", 32)
    with torch.no_grad():
        xh = CtrlCscModel.from_pretrained(model)(x).reconstruction
    cosine = torch.nn.functional.cosine_similarity(features(x), features(xh)).mean().item()
    assert results["CTRL-CSC"][f"feature_cosine, features of {names[0]}"] == pytest.approx(cosine, abs=1e-4)
    assert figures["mean_image_psnr"]["value"] == results["mean image"]["psnr"]
    for name in ("reconstructions", "rivals", "neighbours", "correlations"):
        assert Image.open(model / f"{name}.png").width > 100

    # The 8 images that train.py held out are measured on, the other 72 are fitted.
    images = evaluate.load_data(settings(model=str(model)), 16)
    assert len(images.test) == 8
    fitted = to_pixel_values(images.training)
    assert len(fitted) == 72 and torch.cdist(fitted.flatten(1), images.test.flatten(1)).min() > 0.1
    pixels, measured_on = (part.flatten(1).double().numpy() for part in (fitted, images.test))
    pca = PCA(8).fit(pixels)
    error = measured_on - pca.inverse_transform(pca.transform(measured_on)).clip(-1, 1)
    expected = np.mean(10 * np.log10(4 / (error**2).mean(axis=1)))
    assert results["PCA, 8 numbers"]["psnr"] == pytest.approx(expected, abs=0.01)
    error = measured_on - pixels.mean(axis=0)
    assert results["mean image"]["psnr"] == pytest.approx(np.mean(10 * np.log10(4 / (error**2).mean(axis=1))), abs=0.01)
    assert results["PCA, 8 numbers"]["match@8"] > 0.9
    frechet = f"frechet_distance, features of {names[0]}"
    assert results["PCA, 8 numbers"][frechet] < results["mean image"][frechet]
    assert all("unseen_psnr" in figures and "seen_psnr" in figures for figures in results.values())
    # The energy's minimum by another method: ISTA, without momentum.
    ours = CtrlCscModel.from_pretrained(model)
    stage, first = ours.encoder.stages[0], images.test
    codes = torch.zeros_like(stage.encode(first))
    step = 1 / stage.operator_norm**2
    with torch.no_grad():
        for _ in range(2000):
            error = stage.synthesize(codes, first.shape[-2:]) - first
            codes = stage.proximal(codes - step * stage.adjoint(error), step)
        least, reached = (stage.energy(first, z).sum().item() for z in (codes, stage.encode(first)))
    assert results["CTRL-CSC"]["energy_excess_1"] == pytest.approx(reached / least - 1, abs=1e-3) and reached > least
    assert "nonzero_1" in results["CTRL-CSC"] and "nonzero_1" not in results["ordinary convolutions"]
    assert (
        "rate" in results["CTRL-CSC"] and "rate" not in results["PCA, 8 numbers"]
    )  # whose latents are no unit vectors
    assert "codes_linear_probe" in results["CTRL-CSC"] and "codes_linear_probe" not in results["PCA, 8 numbers"]
    assert 0 <= results["CTRL-CSC"]["linear_probe"] <= 1 and "linear_probe" not in results["mean image"]


def test_images_without_labels_are_measured_too(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path]
) -> None:
    figures = evaluate.main(settings(model=str(train("--max_train_steps", "1")), label_column="none"))["CTRL-CSC"]
    assert "psnr" in figures and "linear_probe" not in figures


def test_the_nearest_training_images_of_training_images_are_themselves(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path]
) -> None:
    from ctrl_csc_hf.training.autoencoders import autoencoder, load_model

    model = train("--max_train_steps", "1")
    ours = autoencoder(load_model(str(model), "cpu"))
    images = evaluate.load_data(settings(model=str(model)), 16)
    fitted = to_pixel_values(images.training)
    with torch.inference_mode():
        z = ours.encode(fitted)
        neighbours, cosines = evaluate.nearest_training_images(ours, z, images.training, torch.device("cpu"))
    torch.testing.assert_close(neighbours[:, 0], fitted)
    expected = (z @ z.T).sort(descending=True).values[:, : evaluate.NEIGHBOURS]
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)


def labelled(folder: Path, labels: list[int], kind: str = "") -> str:
    """Noise of its kind as Parquet files, splits train and test, with integer labels that are no ClassLabel."""
    first = len(kind) * 1000
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for start, split in ((first, "train"), (first + len(labels), "test")):
        rows = {"image": [random_image(start + index, (16, 16)) for index in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_integer_labels_are_probed_and_missing_ones_are_told(
    evaluate: ModuleType,
    settings: Callable[..., Any],
    train: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = str(train("--max_train_steps", "1"))
    data = labelled(tmp_path / "labelled", [index % 3 for index in range(30)])
    results = evaluate.main(settings(model=model, train_data_dir=data))
    assert "codes_linear_probe" in results["CTRL-CSC"] and "codes_linear_probe" not in results["PCA, 8 numbers"]
    assert 0 <= results["CTRL-CSC"]["linear_probe"] <= 1
    assert "probe" not in caplog.text
    assert (
        json.loads((tmp_path / "evaluation" / "metrics.json").read_text(encoding="utf-8"))["figures"][0]["split"]
        == "test"
    )
    hidden = labelled(tmp_path / "hidden", [-1] * 30)
    assert "linear_probe" not in evaluate.main(settings(model=model, train_data_dir=hidden))["CTRL-CSC"]
    assert "label_column='label' holds -1, so there is no probe" in caplog.text


@pytest.mark.parametrize("count", [1, 3])
def test_a_few_images_are_measured_too(
    evaluate: ModuleType, settings: Callable[..., Any], tmp_path: Path, count: int
) -> None:
    configuration = CtrlCscConfig(image_size=16, latent_dim=4, stage_channels=[4], kernel_sizes=[4, 8], strides=[2, 1],
                                  paddings=[1, 0])  # fmt: skip
    CtrlCscModel(configuration).save_pretrained(tmp_path / "model")
    data = labelled(tmp_path / "few", list(range(count)))
    figures = evaluate.main(settings(model=str(tmp_path / "model"), train_data_dir=data))["CTRL-CSC"]
    assert np.isfinite(figures["psnr"]) and (tmp_path / "evaluation" / "neighbours.png").exists()


@pytest.mark.parametrize("split", [None, "train"])
def test_of_a_split_that_is_fitted_other_images_are_measured_on(
    evaluate: ModuleType, settings: Callable[..., Any], split: str | None, tmp_path: Path
) -> None:
    images = evaluate.load_data(settings(model=str(tmp_path), split=split, num_images=5), 16)
    fitted = to_pixel_values(images.training)
    assert len(images.test) == 5 and len(fitted) == 75
    assert torch.cdist(fitted.flatten(1), images.test.flatten(1)).min() > 0.1


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_a_card_reads_figures_of_the_training_data_or_of_data_with_an_id_and_shows_held_out_images(
    evaluate: ModuleType,
    settings: Callable[..., Any],
    train: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    ours, theirs = (labelled(tmp_path / name, [index % 3 for index in range(30)], name) for name in ("ours", "theirs"))
    model = train("--max_train_steps", "1", data=Path(ours))
    before, grid = written(model), (model / "reconstructions.png").read_bytes()

    evaluate.main(settings(model=str(model), train_data_dir=theirs, output_dir=str(model)))
    assert written(model) == before and (model / "reconstructions.png").read_bytes() == grid
    assert written(model / "evaluation")["figures"] and (model / "evaluation" / "reconstructions.png").exists()
    assert "the model's metrics.json stays as it is" in capsys.readouterr().out

    for options, recorded, held_out in (
        ({"train_data_dir": ours}, True, True),
        ({"train_data_dir": ours, "split": "train"}, False, False),
        ({"train_data_dir": ours, "split": "train", "hub_dataset_id": "org/ours"}, False, False),
        ({"train_data_dir": theirs}, False, False),
        ({"train_data_dir": theirs, "hub_dataset_id": "org/theirs"}, True, False),
    ):
        images = evaluate.load_data(settings(model=str(model), **options), 16)
        assert (images.recorded, images.held_out) == (recorded, held_out)
        was_said = "The images of the split 'train' may be training images" in caplog.text
        assert was_said == (options.get("split") == "train")
        caplog.clear()


def test_images_that_a_run_before_was_trained_on_are_not_held_out(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path], tmp_path: Path
) -> None:
    data = labelled(tmp_path / "data", [index % 3 for index in range(30)])
    folder = copied(
        data,
        tmp_path / "three",
        train=("train", slice(10)),
        validation=("train", slice(10, None)),
        test=("test", slice(None)),
    )
    short = ("--max_train_steps", "1", "--validation_split", "test")
    first = train(*short, "--train_split", "train+validation", data=Path(folder), output="first")
    second = train(*short, "--pretrained_model_name_or_path", str(first), data=Path(folder), output="second")
    for model, split, held_out in ((first, "test", True), (second, "test", True), (second, "validation", False)):
        assert (
            evaluate.load_data(settings(model=str(model), train_data_dir=folder, split=split), 16).held_out == held_out
        )


def copied(data: str, folder: Path, **splits: tuple[str, slice]) -> str:
    """A copy of a data set, each of whose splits has some rows of a split of it."""
    for split, (of, rows) in splits.items():
        dataset = datasets.Dataset.from_parquet(f"{data}/{of}.parquet", cache_dir=str(folder.with_suffix(".cache")))
        dataset.select(range(len(dataset))[rows]).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_images_of_another_copy_of_the_data_set_are_held_out_only_if_training_held_them_out(
    evaluate: ModuleType,
    settings: Callable[..., Any],
    train: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = labelled(tmp_path / "data", [index % 3 for index in range(30)])
    every, back = slice(None), slice(None, None, -1)
    one_split = copied(data, tmp_path / "one", train=("train", every))
    id_flags = ("--max_train_steps", "1", "--hub_dataset_id", "org/data")
    part_held_out = train(*id_flags, data=Path(one_split), output="part")
    split_held_out = train(*id_flags, data=Path(data), output="split")
    before = written(part_held_out), (part_held_out / "reconstructions.png").read_bytes()

    for model, splits, split, same in (
        (part_held_out, {"train": ("train", every)}, None, True),
        (part_held_out, {"train": ("train", back)}, None, False),
        (part_held_out, {"train": ("train", slice(20)), "test": ("train", slice(20, None))}, None, False),
        (split_held_out, {"train": ("train", back), "test": ("test", every)}, "test", True),
        (split_held_out, {"train": ("train", every), "test": ("test", every), "val": ("test", back)}, "test", True),
        (split_held_out, {"train": ("train", every)}, None, False),
        (split_held_out, {"train": ("test", every), "test": ("train", every)}, None, False),
    ):
        copy = copied(data, tmp_path / f"copy{len(list(tmp_path.iterdir()))}", **splits)
        caplog.clear()
        given = settings(model=str(model), train_data_dir=copy, hub_dataset_id="org/data", split=split)
        images = evaluate.load_data(given, 16)
        assert images.held_out == images.recorded == same == ("may be training images" not in caplog.text), splits

    backwards = copied(data, tmp_path / "backwards", train=("train", back))
    given = {"train_data_dir": backwards, "hub_dataset_id": "org/data", "output_dir": str(part_held_out)}
    evaluate.main(settings(model=str(part_held_out), **given))
    assert before == (written(part_held_out), (part_held_out / "reconstructions.png").read_bytes())
    assert written(part_held_out / "evaluation")["figures"]


def test_of_a_model_that_does_not_tell_its_images_only_another_split_is_held_out(
    evaluate: ModuleType, settings: Callable[..., Any], tmp_path: Path
) -> None:
    data = labelled(tmp_path / "data", [index % 3 for index in range(30)])
    one_split = copied(data, tmp_path / "one", train=("train", slice(None)))
    (tmp_path / "training_args.json").write_text('{"hub_dataset_id": "org/data"}', encoding="utf-8")
    for folder, held_out in ((data, True), (one_split, False)):
        given = settings(model=str(tmp_path), train_data_dir=folder, hub_dataset_id="org/data")
        images = evaluate.load_data(given, 16)
        assert images.held_out == images.recorded == held_out


def test_rivals_are_fitted_on_the_split_that_the_model_was_trained_on(
    evaluate: ModuleType, settings: Callable[..., Any], image_folder: Path, tmp_path: Path
) -> None:
    record = {"train_data_dir": str(image_folder), "train_split": "train"}
    (tmp_path / "training_args.json").write_text(json.dumps(record), encoding="utf-8")
    evaluate.load_data(settings(model=str(tmp_path), train_split="train"), 16)
    with pytest.raises(ValueError, match=r"train_split must be 'train', as the model was trained on it, .*'nonsense'"):
        evaluate.load_data(settings(model=str(tmp_path), train_split="nonsense"), 16)


def test_the_part_held_out_in_training_is_measured_whatever_the_labels_of_the_probe(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path], tmp_path: Path
) -> None:
    for index in range(40):  # 30 classes of one image, which only a run without labels holds out
        path = tmp_path / "data" / f"class{min(index, 30)}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(index, (16, 16)).save(path)
    data = tmp_path / "data"
    model = train("--max_train_steps", "1", "--label_column", "none", data=data)
    images = evaluate.load_data(settings(model=str(model), train_data_dir=str(data)), 16)
    held_out = sorted(np.asarray(Image.open(path)).tobytes() for path in (model / "examples").glob("*.png"))
    measured = ((images.test + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert held_out == sorted(np.ascontiguousarray(image).tobytes() for image in measured) and len(held_out) == 4
    assert images.held_out and images.probed is not None


def test_a_folder_holds_the_figures_of_one_model(
    evaluate: ModuleType, settings: Callable[..., Any], tmp_path: Path
) -> None:
    configuration = CtrlCscConfig(image_size=8)
    first, second = (evaluate.digest_of(CtrlCscModel(configuration)) for _ in range(2))
    images = evaluate.load_data(settings(model=str(tmp_path)), 8)
    results = {"CTRL-CSC": {"psnr": 1.0}, "PCA, 8 numbers": {"psnr": 2.0}, "mean image": {"psnr": 0.0}}
    for digest, dataset, expected in (
        (first, "org/a", {"org/a"}),
        (first, "org/b", {"org/a", "org/b"}),
        (second, "org/c", {"org/c"}),
    ):
        given = settings(model="any", hub_dataset_id=dataset)
        evaluate.write_metrics(tmp_path / "metrics.json", given, results, images, 0, [], digest, 8)
        assert {figure["dataset"] for figure in written(tmp_path)["figures"]} == expected


@pytest.mark.parametrize("content", ["[]", "{", '{"figures": [{}]}', '{"figures": 3}'])
def test_a_damaged_record_is_named_with_what_to_do(evaluate: ModuleType, content: str, tmp_path: Path) -> None:
    for name in ("metrics.json", "training_args.json"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.json cannot be read, .*: remove it, or name another output_dir$"):
        evaluate.earlier_metrics(tmp_path / "metrics.json", "digest")
    if "figures" not in content:
        with pytest.raises(ValueError, match=r"training_args\.json cannot be read, .*: remove it, and the model is"):
            evaluate.training_runs(str(tmp_path))


@pytest.mark.parametrize(
    ("training", "test", "reason"),
    [
        ([10**9 + index % 3 for index in range(30)], None, None),
        ([2**63 - 9 + index % 2 for index in range(30)], [2**63 - 1] * 30, None),
        ([-1] * 15 + [0, 1, 2] * 5, [0, 1, 2] * 10, "label_column='label' holds -1"),
        ([None] * 15 + [0, 1, 2] * 5, [0, 1, 2] * 10, "label_column='label' holds null"),
        ([7] * 30, None, "label_column='label' holds no value but 7"),
    ],
)
def test_any_integers_are_classes_and_what_cannot_be_probed_is_told(
    training: list[int | None], test: list[int | None] | None, reason: str | None
) -> None:
    from ctrl_csc_hf.training.data import number_classes

    test = test or training
    if reason is not None:
        with pytest.raises(ValueError, match=f"{reason}$"):
            number_classes("label", test, training)
    else:
        values, (first, second) = number_classes("label", test, training)
        assert values == sorted({*training, *test})
        assert [values[place] for place in first] == test and [values[place] for place in second] == training


@pytest.mark.parametrize("name", ["num_images", "num_frechet_images", "num_probe_images"])
def test_numbers_below_one_are_refused(settings: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        settings(model="any", **{name: 0})


def test_sizes_of_feature_models_are_one_or_one_for_each(settings: Callable[..., Any]) -> None:
    for sizes in ([0], [32, 64, 96]):
        with pytest.raises(ValueError, match="feature_size must be one number of at least 1, or one for each of 2"):
            settings(model="any", feature_model=["a", "b"], feature_size=sizes)


def test_figures_are_not_written_into_the_folder_of_another_model(
    settings: Callable[..., Any], train: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = (str(train("--max_train_steps", "1", output=name)) for name in ("first", "second"))
    with pytest.raises(ValueError, match=r"output_dir must be the model's own folder or hold no model, got .*second"):
        settings(model=first, output_dir=second)


def test_figures_and_pictures_are_not_written_into_the_images(
    settings: Callable[..., Any], image_folder: Path, parquet_folder: str
) -> None:
    for changes in ({}, {"train_data_dir": parquet_folder, "unseen_dataset_name": str(image_folder)}):
        with pytest.raises(ValueError, match=r"output_dir must lie outside of the folder of the images, .*, got"):
            settings(model="any", output_dir=str(image_folder / "evaluation"), **changes)


@pytest.mark.parametrize("rival", ["path", "=path", "CTRL-CSC=path", "name=", "mean image=path", "PCA, 8 numbers=path"])
def test_a_rival_without_a_name_of_its_own_is_refused(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path], rival: str
) -> None:
    with pytest.raises(ValueError, match="rivals must be NAME=PATH"):
        evaluate.main(settings(model=str(train("--max_train_steps", "1")), rivals=[rival]))


def test_two_rivals_of_one_name_are_refused(settings: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"must have different names, got \['a', 'a'\]"):
        settings(model="any", rivals=["a=first"], diffusers_autoencoders=["a=second"])


@pytest.mark.parametrize("change", [{"num_validation_images": None}, {"images": [1]}])
def test_a_damaged_record_of_the_training_is_named(
    change: dict[str, Any], evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path]
) -> None:
    model = train("--max_train_steps", "1")
    record = json.loads((model / "training_args.json").read_text(encoding="utf-8")) | change
    record = {name: value for name, value in record.items() if name not in change or value is not None}
    (model / "training_args.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"training_args\.json cannot be read, .*: remove it, and the model is measured"
    ):
        evaluate.main(settings(model=str(model)))


def test_what_the_model_was_trained_on_is_not_unseen(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    model = str(train("--max_train_steps", "1", "--hub_dataset_id", "org/trained"))
    other = labelled(tmp_path / "other", [0, 1] * 10)
    for unseen in ({"unseen_dataset_name": str(image_folder)},
                   {"unseen_dataset_name": other, "unseen_hub_dataset_id": "org/trained"}):  # fmt: skip
        with pytest.raises(ValueError, match="unseen_dataset_name must be another data set than"):
            evaluate.main(settings(model=model, train_data_dir=other, **unseen))


def test_a_copy_of_the_training_images_is_known_by_what_it_holds(
    evaluate: ModuleType, settings: Callable[..., Any], train: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    model = str(train("--max_train_steps", "1"))
    copy = str(shutil.copytree(image_folder, tmp_path / "copy"))
    given = {"model": model, "train_data_dir": copy, "hub_dataset_id": "org/copy"}
    images, own = (evaluate.load_data(settings(**case), 16) for case in (given, {"model": model}))
    assert images.held_out and torch.equal(images.test, own.test)


def test_what_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    from ctrl_csc_hf.training.autoencoders import diffusers_autoencoder, load_model

    with pytest.raises(ValueError, match=r"must hold a model of train\.py, got ResNet"):
        load_model(classifier(tmp_path / "resnet"), "cpu")
    with pytest.raises(ValueError, match="must hold an autoencoder of diffusers"):
        diffusers_autoencoder(str(tmp_path), "cpu")
