"""ctrl-csc, as a user types it."""

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
    (tmp_path / "text.png").write_text("no image")
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
