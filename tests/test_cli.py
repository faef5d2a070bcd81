"""ctrl-csc, as a user types it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from ctrl_csc_cli import app
from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel, CtrlCscPipeline
from ctrl_csc_hf.latents.encoding import encode_dataset
from ctrl_csc_hf.latents.fitting import fit_sampler
from ctrl_csc_hf.models.sampling import LatentSampler
from ctrl_csc_hf.training.evaluate import EvaluationSettings
from ctrl_csc_hf.training.settings import TrainingSettings


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = CtrlCscConfig(
        image_size=16, latent_dim=8, stage_channels=[8], kernel_sizes=[4, 8], strides=[2, 1], paddings=[1, 0]
    )
    CtrlCscModel(config).save_pretrained(folder)
    CtrlCscImageProcessor(image_size=16).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "b.jpg")
    return [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]


@pytest.mark.parametrize(("program", "settings"), [("train", TrainingSettings), ("evaluate", EvaluationSettings)])
def test_train_and_evaluate_list_their_settings(program: str, settings: type) -> None:
    result = CliRunner().invoke(app, [program, "--help"])
    assert result.exit_code == 0
    assert {f"--{field.name}" for field in fields(settings)} <= set(re.findall(r"--\w+", result.output))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train --train_data_dir images --learning_speed 3", "unrecognized arguments: --learning_speed 3"),
        ("train --train_data_dir images --seed first", "argument --seed: invalid int value: 'first'"),
        ("train --config", "argument --config: expected one argument"),
        ("evaluate --model m --train_data_dir images --speed 3", "unrecognized arguments: --speed 3"),
        ("evaluate --train_data_dir images", "the following arguments are required: --model"),
    ],
)
def test_a_wrong_flag_of_train_and_evaluate_is_one_line(arguments: str, line: str) -> None:
    result = CliRunner().invoke(app, arguments.split())
    assert (result.exit_code, result.output) == (1, f"ValueError: {line}; --help lists the settings\n")


def test_reconstruct_writes_originals_above_reconstructions_and_prints_each_psnr(
    model_folder: Path, photos: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out" / "grid.png"
    result = CliRunner().invoke(app, ["reconstruct", *photos, "--model", str(model_folder), "--output", str(output)])
    assert result.exit_code == 0, result.output
    pixels = np.asarray(Image.open(output))
    assert pixels.shape == (2 * 16 * 8 + 2, 2 * 16 * 8 + 2, 3)  # two rows, two columns, pixels enlarged 8 times

    model = CtrlCscModel.from_pretrained(model_folder).eval()
    processor = CtrlCscImageProcessor(image_size=16)
    for column, photo in enumerate(photos):
        original = processor(Image.open(photo), return_tensors="pt").pixel_values
        with torch.inference_mode():
            reconstruction = model(original).reconstruction
        error = ((original - reconstruction) / 2).square().mean().item()
        assert f"{photo}: PSNR {-10 * np.log10(error):.2f} dB" in result.output
        shown = pixels[:, column * 130 :][:, : 16 * 8]
        for row, image in ((0, original), (130, reconstruction)):
            expected = np.asarray(processor.postprocess(image)[0])
            assert np.abs(shown[row : row + 128][::8, ::8].astype(int) - expected).max() <= 1


def test_with_tiles_an_image_keeps_its_size(model_folder: Path, photos: list[str], tmp_path: Path) -> None:
    output = tmp_path / "grid.png"
    arguments = ["reconstruct", photos[0], "--model", str(model_folder), "--output", str(output), "--tiles"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    width, height = Image.open(photos[0]).size
    shown, scale = np.asarray(Image.open(output)), max(1, 128 // width)
    assert shown.shape == (2 * height * scale + 2, width * scale, 3)
    own = np.asarray(Image.open(photos[0]).convert("RGB")).repeat(scale, 0).repeat(scale, 1)
    assert np.abs(shown[: height * scale].astype(int) - own).max() <= 1
    result = CliRunner().invoke(app, [*arguments, photos[1]])
    assert result.exit_code == 2 and "must be one image with --tiles, got 2" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photo}", "--model", "{empty}"], "a folder or a Hub repository with a CTRL-CSC model"),
        (["{photo}", "--model", "{bert}"], "must hold a CTRL-CSC model"),
        (["{text}", "--model", "{model}"], "images that PIL reads and the model takes"),
        (
            ["{thin}", "--model", "{model}"],
            "images[0] has 1 x 1001 pixels: a side must be at most 1000 times",
        ),
        (["{cut}", "--model", "{model}"], "images that PIL reads and the model takes"),
        (["{photo}", "--model", "{model}", "--output", "{empty}/grid.bmp"], "must end in .png"),
        (
            ["{photo}", "--model", "{model}", "--output", "{text}/grid.png"],
            "--output: must be where one can write, got",
        ),
        (["nowhere.png", "--model", "{model}"], "does not exist"),
    ],
)
def test_what_reconstruct_cannot_take_is_said_in_words(
    arguments: list[str], message: str, model_folder: Path, photos: list[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    Image.new("L", (1001, 1)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes(Path(photos[0]).read_bytes()[:500])
    names = {
        "photo": photos[0],
        "thin": tmp_path / "thin.png",
        "cut": tmp_path / "cut.png",
        "empty": tmp_path / "empty",
        "bert": tmp_path / "bert",
        "text": tmp_path / "text.png",
        "model": model_folder,
    }
    result = CliRunner().invoke(app, ["reconstruct", *(argument.format(**names) for argument in arguments)])
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert message in words, words


def harmed(folder: Path, model_folder: Path, harm: str) -> Path:
    """The model's folder with one thing wrong."""
    shutil.copytree(model_folder, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if harm == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif harm == "cut off":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif harm == "other size":
        config.write_text(
            config.read_text(encoding="utf-8").replace('"latent_dim": 8', '"latent_dim": 9'), encoding="utf-8"
        )
    elif harm == "foreign code":
        content = {"model_type": "foreign", "auto_map": {"AutoConfig": "x.Config", "AutoModel": "x.Model"}}
        config.write_text(json.dumps(content), encoding="utf-8")
        (folder / "x.py").write_text("raise SystemExit('foreign code ran')", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("command", "harm", "message"),
    [
        ("reconstruct", "no processor", "Invalid value for --model: must hold an image processor beside its model"),
        ("demo", "no processor", "Invalid value for --model: must hold an image processor beside its model"),
        ("reconstruct", "cut off", "Invalid value for --model: must be a folder or a Hub repository with a CTRL-CSC"),
        ("demo", "cut off", "Invalid value for --model: must be a folder or a Hub repository with a CTRL-CSC model"),
        ("publish", "cut off", "Invalid value for --model: must be a folder or a Hub repository with a CTRL-CSC"),
        ("publish", "other size", "Invalid value for --model: must be a folder or a Hub repository with a CTRL-CSC"),
        ("reconstruct", "foreign code", "Invalid value for --model: must be a folder or a Hub repository with a"),
        ("publish", "foreign code", "Invalid value for --model: must be a folder or a Hub repository with a"),
    ],
)
def test_a_model_that_does_not_load_is_named_by_the_argument_that_gave_it(
    command: str, harm: str, message: str, model_folder: Path, photos: list[str], tmp_path: Path
) -> None:
    folder = str(harmed(tmp_path / "harmed", model_folder, harm))
    arguments = {
        "reconstruct": [photos[0], "--model", folder],
        "demo": ["--model", folder],
        "publish": ["--model", folder, "--repo_id", "org/name", "--dry_run", str(tmp_path / "out")],
    }
    result = CliRunner().invoke(app, [command, *arguments[command]])
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert message in words and "foreign code ran" not in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"figures": [{}], "objective": "chess", "size": "s"}'])
@pytest.mark.parametrize(
    ("command", "name", "remedy"),
    [
        ("publish", "metrics.json", "remove it, and the model is published without what it records"),
        ("publish", "training_args.json", "remove it, and the model is published without what it records"),
        ("publish", "preprocessor_config.json", "remove it, and the processor of the model's image size is published"),
        ("publish", "config.json", "must be a folder or a Hub repository with a CTRL-CSC model"),
        ("reconstruct", "config.json", "must be a folder or a Hub repository with a CTRL-CSC model"),
        ("reconstruct", "model.safetensors.index.json", "must be a folder or a Hub repository with a CTRL-CSC model"),
        ("reconstruct", "preprocessor_config.json", "save_pretrained(...) writes it"),
    ],
)
def test_a_damaged_json_file_is_named_with_what_to_do(
    command: str, name: str, remedy: str, content: str, own_model: Path, photos: list[str], tmp_path: Path
) -> None:
    (own_model / name).write_text(content, encoding="utf-8")
    if name == "model.safetensors.index.json":
        (own_model / "model.safetensors").unlink()
    arguments = {
        "publish": ["--repo_id", "org/name", "--dry_run", str(tmp_path / "out")],
        "reconstruct": [photos[0], "--output", str(tmp_path / "out" / "grid.png")],
    }
    result = CliRunner().invoke(app, [command, "--model", str(own_model), *arguments[command]])
    words = " ".join(result.output.replace("│", " ").split())
    assert isinstance(result.exception, SystemExit) and name in words and remedy in words, words
    assert not (tmp_path / "out").exists()


def test_an_image_processor_of_another_size_is_one_line(own_model: Path, photos: list[str], tmp_path: Path) -> None:
    CtrlCscImageProcessor(image_size=32).save_pretrained(own_model)
    output = str(tmp_path / "grid.png")
    result = CliRunner().invoke(app, ["reconstruct", photos[0], "--model", str(own_model), "--output", output])
    assert result.exit_code == 1 and "must give images of the model's size" in result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repo_id", "name", "--dry_run", "{out}"], "repo_id must be ORGANIZATION/NAME, got 'name'"),
        (["--repo_id", "a/b/c", "--dry_run", "{out}"], "'a/b/c'"),
        (["--repo_id", "a/b/c", "--license", "mit", "--public"], "'a/b/c'"),
        (["--repo_id", "org/name", "--dry_run", "{model}"], "folder must be another one than the checkpoint's"),
        (
            ["--repo_id", "org/name", "--dry_run", "{notes}"],
            "README.md, which is no card of this package: name another",
        ),
        (["--repo_id", "org/name"], "must be given to publish a model of local data"),
    ],
)
def test_what_publish_cannot_do_is_one_line(flags: list[str], message: str, model_folder: Path, tmp_path: Path) -> None:
    names = {"out": tmp_path / "out", "model": model_folder, "notes": tmp_path / "notes"}
    names["notes"].mkdir()
    (names["notes"] / "README.md").write_text("# Of my own\n", encoding="utf-8")
    result = CliRunner().invoke(
        app, ["publish", "--model", str(model_folder), *(flag.format(**names) for flag in flags)]
    )
    assert result.exit_code == 1
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert message in line and "Traceback" not in result.output
    assert (names["notes"] / "README.md").read_text(encoding="utf-8") == "# Of my own\n"


def test_a_hub_that_does_not_answer_is_one_line(model_folder: Path) -> None:
    command = [str(Path(sys.executable).parent / "ctrl-csc"), "publish", "--model", str(model_folder)]
    result = subprocess.run(
        [*command, "--repo_id", "org/name", "--license", "mit", "--private"],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert "does not answer" in line and "Traceback" not in result.stderr


def test_a_port_in_use_is_said(model_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["demo", "--model", str(model_folder), "--port", str(port)])
    assert result.exit_code == 2 and f"must be a free port, got {port}" in " ".join(result.output.split())


def test_a_port_that_cannot_be_is_said(model_folder: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--model", str(model_folder), "--port", "65536"])
    assert result.exit_code == 2 and "Invalid value for '--port'" in result.output


def test_weights_that_lack_a_tensor_are_not_published(own_model: Path, tmp_path: Path) -> None:
    tensors = load_file(own_model / "model.safetensors")
    del tensors["decoder.output_bias"]
    save_file(tensors, own_model / "model.safetensors", {"format": "pt"})
    target = ["--repo_id", "org/model", "--dry_run", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["publish", "--model", str(own_model), *target])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "the weights lack ['decoder.output_bias']" in " ".join(re.sub("[│╭╰─]", " ", result.output).split())


def test_a_damaged_sampler_is_one_line(own_model: Path) -> None:
    (own_model / "sampler").mkdir()
    (own_model / "sampler" / "model.safetensors").write_bytes(b"no sampler")
    result = CliRunner().invoke(app, ["demo", "--model", str(own_model)])
    assert result.exit_code == 1 and "must be a sampler's file" in result.output and "Traceback" not in result.output


def test_without_gradio_the_demo_names_the_extra(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", "--model", str(model_folder)])
    assert result.exit_code == 1 and "the demo needs gradio: pip install ctrl-csc-hf[demo]" in result.output


# Without a command


def test_help_and_version_and_a_wrong_option_load_neither_torch_nor_transformers() -> None:
    commands = ["reconstruct", "inspect", "publish", "fit-sampler", "demo"]
    wrong = [
        ["--help"],
        ["--version"],
        ["nonsense"],
        ["demo", "--modle", "x"],
        *([name, "--help"] for name in commands),
    ]
    code = f"""
import sys
from ctrl_csc_cli import app
for arguments in {wrong}:
    try:
        app(arguments)
    except SystemExit:
        print("loaded", {{"torch", "transformers", "huggingface_hub", "ctrl_csc_hf"}} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.count("loaded set()") == len(wrong), result.stdout + result.stderr
    for name in commands:
        assert name in result.stdout.split("loaded")[0]


def test_arguments_are_read_as_utf_8_whatever_the_locale() -> None:
    command = [str(Path(sys.executable).parent / "ctrl-csc"), "fit-sampler", "--model", "é", "--dataset_name", "x"]
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(command, env={**os.environ, **ascii_locale}, capture_output=True)
    assert result.returncode == 2 and "got 'é'" in result.stderr.decode()


def test_the_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert CliRunner().invoke(app, ["--version"]).output == f"ctrl-csc-hf {project['version']}\n"


def test_options_of_one_name_and_one_meaning_serve_all_commands() -> None:
    described = {
        name: CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for name in ("reconstruct", "inspect", "publish", "fit-sampler", "demo")
    }
    options = {name: set(re.findall(r"--[\w-]+", text)) - {"--help"} for name, text in described.items()}
    assert all("--model" in each and not any("-" in option[2:] for option in each) for each in options.values())
    shared = {"--dataset_name", "--split", "--image_column", "--label_column", "--num_images"}
    assert shared <= options["inspect"] and shared <= options["fit-sampler"]


# Samplers


@pytest.fixture
def own_model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "own"))


def fit(folder: Path, *arguments: object):
    return CliRunner().invoke(app, ["fit-sampler", "--model", str(folder), *map(str, arguments)])


def test_fit_sampler_finds_the_columns_draws_from_the_whole_split_and_keeps_class_names(
    own_model: Path, image_folder: Path
) -> None:
    result = fit(own_model, "--dataset_name", image_folder, "--num_images", 24)  # whose first 40 are of one class
    assert result.exit_code == 0, result.output
    sampler = LatentSampler.from_pretrained(own_model / "sampler")
    assert sampler.labels is not None and sampler.labels.tolist() == [0, 1]

    model, processor = CtrlCscModel.from_pretrained(own_model), CtrlCscImageProcessor.from_pretrained(own_model)
    assert model.config.id2label == {0: "class0", 1: "class1"} and model.config.label2id == {"class0": 0, "class1": 1}
    stream = datasets.load_dataset(str(image_folder), split="train", streaming=True)
    expected = fit_sampler(encode_dataset(stream, model, processor, label_column="label", num_images=24))
    torch.testing.assert_close(sampler.means, expected.means)
    (image,) = CtrlCscPipeline(model, processor, sampler).sample(label="class1")
    assert image.size == (16, 16)


def numbered(folder: Path, labels: list[int]) -> Path:
    """A data set whose classes have no names."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    photos = [Image.effect_noise((16, 16), 50).convert("RGB") for _ in labels]
    folder.mkdir()
    datasets.Dataset.from_dict({"image": photos, "label": labels}, features=features).to_parquet(folder / "0.parquet")
    return folder


def test_class_names_are_those_of_the_data_set_that_the_sampler_was_fitted_on(
    own_model: Path, image_folder: Path, tmp_path: Path
) -> None:
    model = CtrlCscModel.from_pretrained(own_model)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(own_model)

    def names_after(*arguments: object) -> dict[int, str]:
        result = fit(own_model, "--dataset_name", *arguments)
        assert result.exit_code == 0, result.output
        config = CtrlCscConfig.from_pretrained(own_model)
        assert config.label2id == {name: label for label, name in config.id2label.items()}
        return config.id2label

    assert names_after(image_folder) == {0: "class0", 1: "class1"}
    assert names_after(image_folder, "--label_column", "none") == {0: "class0", 1: "class1"}
    assert names_after(numbered(tmp_path / "numbered", [7, 7, 3, 3, 3])) == {3: "3", 7: "7"}


def test_fit_sampler_without_labels_seeks_groups(own_model: Path, image_folder: Path) -> None:
    result = fit(own_model, "--dataset_name", image_folder, "--label_column", "none")
    assert result.exit_code == 0 and "groups" in result.output
    assert LatentSampler.from_pretrained(own_model / "sampler").labels is None
    assert "id2label" not in json.loads((own_model / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fit-sampler", "Error: labels must not be negative, got -1"),
        ("inspect", "Error: --label_column must hold integers of at least 0, but 'label' holds others"),
    ],
)
def test_labels_kept_secret_are_refused_where_they_are_asked_for(
    command: str, message: str, own_model: Path, tmp_path: Path
) -> None:
    data = ["--dataset_name", str(numbered(tmp_path / "data", [-1] * 8)), "--split", "train"]
    data += ["--label_column", "label"]
    output = ["--output", str(tmp_path / "out")] if command == "inspect" else []
    result = CliRunner().invoke(app, [command, "--model", str(own_model), *data, *output])
    assert result.exit_code == 1
    assert message in result.output
    assert not (own_model / "sampler").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_column", "img"], "Error: --image_column must be one of ['image', 'label'], got 'img'"),
        (["--label_column", "image"], "Error: --label_column must hold integers, but 'image' holds Image"),
        (["--split", "test"], "Invalid value for --split: must be one of ['train'], got 'test'"),
        (["--model", "org/name"], "Invalid value for --model: must be a local folder, the sampler is written there"),
        (["--dataset_name", "no/where"], "Invalid value for --dataset_name: must be a data set of images that can be"),
    ],
)
def test_what_fit_sampler_cannot_take_is_said_in_words(
    arguments: list[str], message: str, own_model: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # or the Hub is asked for no/where, again and again
    result = fit(own_model, "--dataset_name", image_folder, *arguments)
    assert result.exit_code == (1 if message.startswith("Error") else 2)
    assert message in " ".join(result.output.replace("│", " ").split()) and "Traceback" not in result.output
    assert not (own_model / "sampler").exists()


def test_a_class_of_a_single_image_is_named(own_model: Path, tmp_path: Path) -> None:
    for name, count in (("boat", 3), ("train", 1)):  # classes, not splits
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(count):
            Image.effect_noise((16, 16), 50).save(tmp_path / "data" / name / f"{index}.png")
    result = fit(own_model, "--dataset_name", tmp_path / "data")
    assert result.exit_code == 1 and not (own_model / "sampler").exists()
    assert "got 1 of ['train']: " in result.output and "--label_column none" in result.output


# Ctrl-C


@pytest.mark.parametrize("command", ["fit-sampler", "demo"])
def test_ctrl_c_ends_a_command_with_one_line(command: str, own_model: Path, image_folder: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments, sign = {
        "fit-sampler": (["--dataset_name", str(image_folder)], "images encoded"),
        "demo": (["--port", str(port)], f"127.0.0.1:{port}"),
    }[command]
    words = [str(Path(sys.executable).parent / "ctrl-csc"), command, "--model", str(own_model), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "0"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = b""
    while sign.encode() not in output:
        read = process.stdout.read1()
        assert read, output.decode()
        output += read
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read().decode()
    assert process.wait(timeout=60) == 130
    assert rest.rstrip().endswith("Interrupted") and "Traceback" not in rest
