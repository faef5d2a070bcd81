"""Model cards say what the checkpoint holds, in the metadata that the Hub documents, and their code runs."""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import RepoCard
from PIL import Image
from test_halves import trained_model
from test_hub import WITHOUT_THE_PACKAGE

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.hub import export
from ctrl_csc_hf.model_card import MODEL_CARDS, model_card
from ctrl_csc_hf.presets import load_preset

REPOSITORY = "org/ctrl-csc-cifar10"
METRICS = {"step": 5, "held_out_psnr": 17.1234, "held_out_match": 0.987, "held_out_rate": 100.25}
DOCUMENTED = {  # the fields of a model card's metadata, from the Hub's documentation
    "base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_link",
    "license_name", "metrics", "model-index", "new_version", "pipeline_tag", "tags", "thumbnail", "widget",
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What train.py leaves of a run on CIFAR-10."""
    from settings import parse_settings

    folder = tmp_path / "checkpoint"
    (folder / "examples").mkdir(parents=True)
    settings, _ = parse_settings(["--config", "cifar10_energy"])
    (folder / "training_args.json").write_text(json.dumps(asdict(settings)))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    for name in ("reconstructions.png", "examples/0.png", "examples/1.png"):
        Image.new("RGB", (8, 8), "orange").save(folder / name)
    return folder


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path) -> Path:
    model = trained_model(False, "batch_norm")
    return export(model, tmp_path / "repository", repo_id=REPOSITORY, checkpoint=checkpoint)


def metadata(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]


def test_the_metadata_are_documented_fields_and_figures_those_of_the_checkpoint(repository: Path) -> None:
    found = metadata((repository / "README.md").read_text())
    assert set(found) <= DOCUMENTED
    assert (found["library_name"], found["pipeline_tag"], found["license"]) == (
        "transformers",
        "image-to-image",
        "apache-2.0",
    )
    assert found["datasets"] == ["uoft-cs/cifar10"]
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "ctrl-csc-cifar10" and result["dataset"]["split"] == "test"
    figures = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert figures == {"psnr": 17.1234, "nearest_latent_match": 0.987, "coding_rate": 100.25}
    for example in found["widget"]:
        assert (repository / example["src"]).is_file()
    assert len(found["widget"]) == 2


def test_the_text_tells_settings_results_and_limits(repository: Path) -> None:
    card = (repository / "README.md").read_text()
    training = load_preset("cifar10_energy")["training"]
    for expected in (
        "| PSNR, mean over images, dB | 17.12 |",
        "| nearest-latent match | 98.7% |",
        f"{training['max_train_steps']} steps of {training['train_batch_size']} images",
        "(reconstructions.png)",
        "collected from the web",
        "CIFAR-10 holds ten classes",
        "@inproceedings{dai2024closed",
    ):
        assert expected in card, expected
    assert "This is a form" not in card and "{{" not in card
    for target in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert (repository / target).is_file()


def test_a_checkpoint_without_records_has_a_card_without_figures(tmp_path: Path) -> None:
    export(trained_model(False, "batch_norm"), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "model-index" not in metadata(card) and "None are recorded." in card


def test_folders_of_the_machine_that_trained_are_not_published(checkpoint: Path, tmp_path: Path) -> None:
    written = json.loads((checkpoint / "training_args.json").read_text())
    for key in ("dataset_name", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path"):
        written[key] = "/home/somebody/folder"
    (checkpoint / "training_args.json").write_text(json.dumps(written))
    folder = export(trained_model(False, "batch_norm"), tmp_path / "local", repo_id=REPOSITORY, checkpoint=checkpoint)
    for path in folder.rglob("*"):
        assert path.is_dir() or b"somebody" not in path.read_bytes(), path
    assert json.loads((folder / "training_args.json").read_text())["energy_warmup_steps"] == 200
    assert "Data set: a local folder of images." in (folder / "README.md").read_text()


def test_every_python_block_of_a_card_runs(repository: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for name in ("image.png", "other.png"):
        Image.effect_noise((20, 16), 80).convert("RGB").save(tmp_path / name)
    for block in blocks:
        code = block.replace(REPOSITORY, str(repository))
        blocker = "" if "import ctrl_csc_hf" in code else WITHOUT_THE_PACKAGE
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", blocker + code]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "reconstruction.png").exists()


def imagenet_form(folder: Path) -> str:
    """The card of the preset imagenet64 before anybody has trained it."""
    preset = load_preset("imagenet64")
    from settings import parse_settings

    settings, _ = parse_settings(["--config", "imagenet64"])
    (folder / "training_args.json").write_text(json.dumps(asdict(settings)))
    model = CtrlCscModel(CtrlCscConfig(**preset["model"]))
    return str(model_card(model, "ORGANIZATION/ctrl-csc-imagenet", folder, [], "other", published=False))


def test_the_form_for_imagenet_is_what_its_preset_gives_and_says_that_it_is_a_form(tmp_path: Path) -> None:
    form = (MODEL_CARDS / "ctrl-csc-imagenet.md").read_text()
    assert form == imagenet_form(tmp_path) + "\n"
    assert "publishes no such weights" in " ".join(form.replace(">", "").split())
    assert "None are recorded." in form and "non-commercial research" in form


@pytest.mark.skipif(
    "huggingface.co/api" in inspect.getsource(RepoCard.validate),
    reason="this huggingface_hub validates cards at the real Hub alone",
)
def test_the_hub_accepts_every_card(repository: Path, tmp_path: Path) -> None:
    """By ModelCard.validate, against the Hub of these tests: it parses the metadata as a mapping, no more."""
    cards = [repository / "README.md", MODEL_CARDS / "ctrl-csc-imagenet.md"]
    code = (
        "import sys; from huggingface_hub import ModelCard; [ModelCard.load(path).validate() for path in sys.argv[1:]]"
    )
    with HubServer() as server:
        environment = {**os.environ, **server.environment(tmp_path / "cache")}
        subprocess.run([sys.executable, "-c", code, *map(str, cards)], env=environment, check=True)
        assert server.count("POST", "/api/validate-yaml") == 2
    for path in cards:
        assert set(metadata(path.read_text())) <= DOCUMENTED
