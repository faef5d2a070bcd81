"""ctrl-csc, as a user types it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.cli import app


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photo}", "--model", "{empty}"], "a folder or a Hub repository with a CTRL-CSC model"),
        (["{photo}", "--model", "{bert}"], "must hold a CTRL-CSC model"),
        (["{text}", "--model", "{model}"], "images that PIL can read"),
        (["{photo}", "--model", "{model}", "--output", "{empty}/grid.bmp"], "must end in .png"),
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
    names = {
        "photo": photos[0],
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
        ("publish", "cut off", "Invalid value for CHECKPOINT: must be a folder or a Hub repository with a CTRL-CSC"),
        ("publish", "other size", "Invalid value for CHECKPOINT: must be a folder or a Hub repository with a CTRL-CSC"),
        ("reconstruct", "foreign code", "Invalid value for --model: must be a folder or a Hub repository with a"),
        ("publish", "foreign code", "Invalid value for CHECKPOINT: must be a folder or a Hub repository with a"),
    ],
)
def test_a_model_that_does_not_load_is_named_by_the_argument_that_gave_it(
    command: str, harm: str, message: str, model_folder: Path, photos: list[str], tmp_path: Path
) -> None:
    folder = str(harmed(tmp_path / "harmed", model_folder, harm))
    arguments = {
        "reconstruct": [photos[0], "--model", folder],
        "demo": ["--model", folder],
        "publish": [folder, "--repo_id", "org/name", "--dry_run", str(tmp_path / "out")],
    }
    result = CliRunner().invoke(app, [command, *arguments[command]])
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert message in words and "foreign code ran" not in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repo_id", "name", "--dry_run", "{out}"], "repo_id must be ORGANIZATION/NAME, got 'name'"),
        (["--repo_id", "a/b/c", "--dry_run", "{out}"], "'a/b/c'"),
        (["--repo_id", "a/b/c"], "'a/b/c'"),
        (["--repo_id", "org/name", "--dry_run", "{model}"], "folder must be another one than the checkpoint's"),
        (["--repo_id", "org/name"], "does not answer"),
    ],
)
def test_what_publish_cannot_do_is_one_line(flags: list[str], message: str, model_folder: Path, tmp_path: Path) -> None:
    names = {"out": tmp_path / "out", "model": model_folder}
    command = [str(Path(sys.executable).parent / "ctrl-csc"), "publish", str(model_folder)]
    result = subprocess.run(
        [*command, *(flag.format(**names) for flag in flags)],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert message in line and "Traceback" not in result.stderr


def test_a_port_in_use_is_said(model_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["demo", "--model", str(model_folder), "--port", str(port)])
    assert result.exit_code == 2 and f"must be a free port, got {port}" in " ".join(result.output.split())


def test_without_gradio_the_demo_names_the_extra(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", "--model", str(model_folder)])
    assert result.exit_code == 1 and "the demo needs gradio: pip install ctrl-csc-hf[demo]" in result.output
