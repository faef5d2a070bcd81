"""Model cards say what the checkpoint holds, in the metadata that the Hub documents, and their code runs."""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import RepoCard
from PIL import Image
from test_halves import trained_model
from test_hub import WITHOUT_THE_PACKAGE, needs_downloaded_code, publish

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.hub import export
from ctrl_csc_hf.model_card import MODEL_CARDS, model_card
from ctrl_csc_hf.presets import load_preset
from ctrl_csc_hf.visualization import architecture_figure

REPOSITORY = "org/ctrl-csc-cifar10"
METRICS = {"step": 5, "held_out_psnr": 17.1234, "held_out_match": 0.987, "held_out_rate": 100.25}
# The fields of a model card's metadata, from the Hub's documentation: their names, and what lies within them.
DOCUMENTED = {
    "base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_link",
    "license_name", "metrics", "model-index", "new_version", "pipeline_tag", "tags", "thumbnail", "widget",
}  # fmt: skip
RESULT = {
    "task": {"type", "name"},
    "dataset": {"type", "name", "config", "split", "revision", "args"},
    "metrics": {"type", "value", "name", "config", "args"},
    "source": {"name", "url"},
}
REQUIRED = {"task": {"type"}, "dataset": {"type", "name"}, "metrics": {"type", "value"}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What train.py leaves of a run on CIFAR-10."""
    from settings import parse_settings

    folder = tmp_path / "checkpoint"
    (folder / "examples").mkdir(parents=True)
    settings, _ = parse_settings(["--config", "cifar10"])
    (folder / "training_args.json").write_text(json.dumps(asdict(settings)), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    for name in ("reconstructions.png", "examples/0.png", "examples/1.png"):
        Image.new("RGB", (8, 8), "orange").save(folder / name)
    return folder


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path) -> Path:
    model = trained_model(False, "batch_norm")
    return export(model, tmp_path / "repository", repo_id=REPOSITORY, checkpoint=checkpoint)


def metadata(card: str) -> dict:
    """Parsed, and checked against what the Hub documents."""
    found = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]
    assert set(found) <= DOCUMENTED
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "image-to-image")
    assert isinstance(found["license"], str)
    for field in ("tags", "datasets"):
        assert all(isinstance(value, str) for value in found.get(field, []))
    for example in found.get("widget", []):
        assert set(example) == {"src", "example_title"} and all(isinstance(text, str) for text in example.values())
    for model in found.get("model-index", []):
        assert set(model) == {"name", "results"} and model["results"]
        for result in model["results"]:
            assert set(result) <= set(RESULT)
            for part, required in REQUIRED.items():
                for entry in result[part] if part == "metrics" else [result[part]]:
                    assert required <= set(entry) <= RESULT[part]
            assert all(isinstance(metric["value"], float) for metric in result["metrics"])
    return found


def test_the_metadata_are_documented_fields_and_figures_those_of_the_checkpoint(repository: Path) -> None:
    found = metadata((repository / "README.md").read_text(encoding="utf-8"))
    assert found["license"] == "apache-2.0"
    assert found["datasets"] == ["uoft-cs/cifar10"]
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "ctrl-csc-cifar10" and result["dataset"]["split"] == "test"
    figures = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert figures == {"psnr": 17.1234, "nearest_latent_match": 0.987, "coding_rate": 100.25}
    for example in found["widget"]:
        assert (repository / example["src"]).is_file()
    assert len(found["widget"]) == 2


def test_what_evaluate_adds_to_the_figures_is_in_the_card(checkpoint: Path, tmp_path: Path) -> None:
    added = {"held_out_images": 10000, "frechet_distance": 6.25, "linear_probe": 0.456, "evaluation": {"results": {}}}
    (checkpoint / "metrics.json").write_text(json.dumps(METRICS | added), encoding="utf-8")
    folder = export(trained_model(False, "batch_norm"), tmp_path / "out", repo_id=REPOSITORY, checkpoint=checkpoint)
    card = (folder / "README.md").read_text(encoding="utf-8")
    (result,) = metadata(card)["model-index"][0]["results"]
    figures = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert figures["frechet_distance"] == 6.25 and figures["linear_probe"] == 0.456
    assert "On 10000 held-out images of uoft-cs/cifar10 (test), by training/evaluate.py:" in card
    assert "| linear probe on the latents, accuracy | 45.6% |" in card


def test_a_model_that_has_not_played_the_game_does_not_claim_it(checkpoint: Path, tmp_path: Path) -> None:
    settings = json.loads((checkpoint / "training_args.json").read_text(encoding="utf-8"))
    (checkpoint / "training_args.json").write_text(json.dumps(settings | {"loop": "squared_error"}), encoding="utf-8")
    folder = export(trained_model(False, "batch_norm"), tmp_path / "out", repo_id=REPOSITORY, checkpoint=checkpoint)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Trained as an autoencoder, for comparison, without the game" in card
    assert "No loss of the game" not in card and "the encoder minimises" not in card


def test_the_text_tells_settings_results_and_limits(repository: Path) -> None:
    card = (repository / "README.md").read_text(encoding="utf-8")
    training = load_preset("cifar10")["training"]
    for expected in (
        "| PSNR, mean over images, dB | 17.12 |",
        "| nearest-latent match | 98.7% |",
        f"{training['max_train_steps']} steps of {training['train_batch_size']} images",
        f"after {training['energy_warmup_steps']} on the sparse-coding energy alone "
        f"and {training['deconvolution_warmup_steps']} on 1/2 |x - g(f(x))|^2.",
        "pixel by pixel; what comes before it does: 1/2 |x - g(f(x))|^2. No labels are used.",
        "On 1000 held-out images of uoft-cs/cifar10 (test)",
        "(architecture.png)",
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
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "model-index" not in metadata(card) and "None are recorded." in card
    assert "The checkpoint holds no record of its training." in card and "the encoder raises dR(Z, Zh)" in card


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"decoder_consistency": 20.0},
            "With J = dR(Z, Zh) = R(Z u Zh) - R(Z)/2 - R(Zh)/2, the encoder minimises -J, the decoder J + 20 S; "
            "S is the mean of 1 - cos(z_i, zh_i).",
        ),
        ({"decoder_consistency": 0.0}, "the encoder minimises -J, the decoder J.\n"),
        (
            {"consistency": "rate", "encoder_consistency": 0.5},
            "the encoder minimises -J + 0.5 S, the decoder J + 20 S; S is the mean of dR(z_i, zh_i).",
        ),
        (
            {"objective": "unsupervised", "augmentation_consistency": 1.0, "energy": 2.0},
            "With J = R(Z) + dR(Z, Zh), the encoder minimises -J + 1 S_a + 2 E, the decoder J + 20 S; S is the mean of "
            "1 - cos(z_i, zh_i), S_a the same between the latents of images and of augmented ones; "
            "E is the energy above, of all stages, per pixel.",
        ),
        ({"objective": "multi"}, "J alone uses labels."),
        ({"objective": "binary"}, "No labels are used."),
        (
            {"energy_warmup_steps": 0, "deconvolution_warmup_steps": 7},
            "images a process, after 7 on 1/2 |x - g(f(x))|^2.",
        ),
        ({"deconvolution_warmup_steps": 0}, "pixel by pixel. No labels are used."),
        ({"pretrained_model_name_or_path": "/some/folder"}, "pixel by pixel. No labels are used."),
        ({"pretrained_model_name_or_path": "/some/folder"}, "images a process, from a model trained before."),
        ({"use_ema": False}, "schedule linear.\n"),
        ({"dataset_name": "digits"}, "- Data set: a local folder of images."),  # by that name, here
    ],
)
def test_the_text_tells_the_game_that_was_played(
    changes: dict[str, Any], expected: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = json.loads((checkpoint / "training_args.json").read_text(encoding="utf-8")) | changes
    (checkpoint / "training_args.json").write_text(json.dumps(settings), encoding="utf-8")
    card = str(model_card(trained_model(False, "batch_norm"), REPOSITORY, checkpoint, [], "mit"))
    assert expected in card
    metadata(card)


def test_the_text_tells_the_ridge(tmp_path: Path) -> None:
    plain, ridged = (
        str(model_card(CtrlCscModel(CtrlCscConfig(ridge=mu)), REPOSITORY, None, [], "mit")) for mu in (0, 0.5)
    )
    assert "mu/2" not in plain and "mu =" not in plain and "mu/2 |z|^2" in ridged and "mu = 0.5" in ridged


def test_folders_of_the_machine_that_trained_are_not_published(checkpoint: Path, tmp_path: Path) -> None:
    written = json.loads((checkpoint / "training_args.json").read_text(encoding="utf-8"))
    for key in ("dataset_name", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path"):
        written[key] = "/home/somebody/folder"
    (checkpoint / "training_args.json").write_text(json.dumps(written), encoding="utf-8")
    folder = export(trained_model(False, "batch_norm"), tmp_path / "local", repo_id=REPOSITORY, checkpoint=checkpoint)
    for path in folder.rglob("*"):
        assert path.is_dir() or b"somebody" not in path.read_bytes(), path
    published = json.loads((folder / "training_args.json").read_text(encoding="utf-8"))
    assert published["energy_warmup_steps"] == written["energy_warmup_steps"]
    assert "Data set: a local folder of images." in (folder / "README.md").read_text(encoding="utf-8")


def code_blocks(card: str) -> list[str]:
    """Of Python; there is no code of another language, BibTeX apart."""
    assert set(re.findall(r"^```(\w+)$", card, re.MULTILINE)) == {"python", "bibtex"}
    return re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


@needs_downloaded_code
@pytest.mark.parametrize("card", ["published", "form"])
def test_every_python_block_of_a_card_runs_as_it_stands(card: str, checkpoint: Path, tmp_path: Path) -> None:
    """Against a Hub that has the repository of the card's name; the form's stands for what it will be filled with."""
    name = REPOSITORY if card == "published" else "ORGANIZATION/ctrl-csc-imagenet"
    CtrlCscModel(CtrlCscConfig(latent_dim=256, stage_channels=[4, 4, 4])).save_pretrained(checkpoint)
    for path in ("image.png", "other.png"):
        Image.effect_noise((20, 16), 80).convert("RGB").save(tmp_path / path)
    with HubServer() as server:
        publish(server, checkpoint, name)
        text = server.files(name)["README.md"].decode()
        blocks = code_blocks(
            text if card == "published" else (MODEL_CARDS / "ctrl-csc-imagenet.md").read_text(encoding="utf-8")
        )
        with_package = [block for block in blocks if "import ctrl_csc_hf" in block]
        assert (len(blocks), len(with_package)) == (4, 1)
        for blocker, chosen in (("", with_package), (WITHOUT_THE_PACKAGE, set(blocks) - set(with_package))):
            code = blocker + "\n".join(f"exec({block!r}, {{}})" for block in chosen)
            environment = {
                **os.environ,
                **server.environment(tmp_path / f"cache{len(blocker)}"),
                "OMP_NUM_THREADS": "1",
            }
            result = subprocess.run(
                [sys.executable, "-c", code],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
            assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "reconstruction.png").size == (32, 32)


def test_the_figure_of_the_form_is_that_of_its_model() -> None:
    figure = architecture_figure(CtrlCscConfig(**load_preset("imagenet64")["model"]))
    committed = Image.open(MODEL_CARDS / "architecture.png").convert("RGB")
    assert committed.size == figure.size
    difference = np.abs(np.asarray(committed).astype(int) - np.asarray(figure))
    assert difference.mean() < 1  # versions of Pillow draw letters a little differently


def imagenet_form(folder: Path) -> str:
    """The card of the preset imagenet64 before anybody has trained it."""
    preset = load_preset("imagenet64")
    from settings import parse_settings

    settings, _ = parse_settings(["--config", "imagenet64"])
    (folder / "training_args.json").write_text(json.dumps(asdict(settings)), encoding="utf-8")
    model = CtrlCscModel(CtrlCscConfig(**preset["model"]))
    return str(model_card(model, "ORGANIZATION/ctrl-csc-imagenet", folder, [], "other", published=False))


def test_the_form_for_imagenet_is_what_its_preset_gives_and_says_that_it_is_a_form(tmp_path: Path) -> None:
    form = (MODEL_CARDS / "ctrl-csc-imagenet.md").read_text(encoding="utf-8")
    assert form == imagenet_form(tmp_path) + "\n"
    assert "publishes no such weights" in " ".join(form.replace(">", "").split())
    assert "model-index" not in metadata(form)
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
