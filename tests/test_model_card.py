"""Model cards say what the checkpoint holds, in the metadata that the Hub documents, and their code runs."""

import inspect
import json
import os
import re
import shutil
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
from ctrl_csc_hf.hub.model_card import MODEL_CARDS, model_card, public_settings
from ctrl_csc_hf.hub.publishing import export
from ctrl_csc_hf.inspection.visualization import architecture_figure
from ctrl_csc_hf.training.presets import load_preset

REPOSITORY = "org/ctrl-csc-cifar10"
CIFAR10 = "uoft-cs/cifar10"


def figure(name: str, value: float, dataset: str | None = CIFAR10, split: str = "test", **entries: Any) -> dict:
    measured = {"num_images": 1000, "feature_model": None, "measured_by": "training/train.py"}
    return {"name": name, "value": value, "dataset": dataset, "split": split, **measured, **entries}


FIGURES = [figure("psnr", 17.1234), figure("match", 0.987), figure("rate", 100.25), figure("mean_image_psnr", 12.5)]
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
    """What train.py leaves of a run on CIFAR-10, whose game is of both players and of the latents alone."""
    from ctrl_csc_hf.training.settings import parse_settings

    folder = tmp_path / "checkpoint"
    (folder / "examples").mkdir(parents=True)
    game = {"encoder_learning_rate": 1e-4, "code_reduction": 0, "code_consistency": 0, "pixel_error": 0}
    flags = [text for name, value in game.items() for text in (f"--{name}", str(value))]
    settings, _ = parse_settings(["--config", "cifar10_512", *flags])
    (folder / "training_args.json").write_text(json.dumps(asdict(settings)), encoding="utf-8")
    write_figures(folder, FIGURES)
    for name in ("reconstructions.png", "examples/0.png", "examples/1.png"):
        Image.new("RGB", (8, 8), "orange").save(folder / name)
    return folder


def write_figures(checkpoint: Path, figures: list[dict]) -> None:
    metrics = {"step": 5, "unreadable_images": 0, "figures": figures}
    (checkpoint / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


def change_settings(checkpoint: Path, **changes: Any) -> None:
    settings = json.loads((checkpoint / "training_args.json").read_text(encoding="utf-8")) | changes
    (checkpoint / "training_args.json").write_text(json.dumps(settings), encoding="utf-8")


def card_of(checkpoint: Path) -> str:
    return str(model_card(trained_model(False), REPOSITORY, checkpoint, [], "mit"))


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path) -> Path:
    model = trained_model(False)
    return export(model, tmp_path / "repository", repo_id=REPOSITORY, checkpoint=checkpoint)


def metadata(card: str) -> dict:
    """Parsed, and checked against what the Hub documents."""
    found = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]
    assert set(found) <= DOCUMENTED
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "image-feature-extraction")
    assert isinstance(found.get("license", ""), str)
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
    assert "license" not in found and found["datasets"] == [CIFAR10]
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "ctrl-csc-cifar10" and result["dataset"]["split"] == "test"
    figures = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert figures == {"psnr": 17.1234, "nearest_latent_match": 0.987, "coding_rate": 100.25}  # of the model alone
    for example in found["widget"]:
        assert (repository / example["src"]).is_file()
    assert len(found["widget"]) == 2


def test_figures_stand_by_what_they_were_measured_on(checkpoint: Path) -> None:
    by_evaluate = {"measured_by": "training/evaluate.py"}
    features = {"num_images": 500, "feature_model": "microsoft/resnet-18"}
    unseen = {"dataset": "ILSVRC/imagenet-1k", "split": "validation", "num_images": 800}
    write_figures(checkpoint, [
        figure("psnr", 17.5, num_images=10_000, **by_evaluate),
        figure("frechet_distance", 6.25, **features, **by_evaluate),
        figure("psnr", 15.25, **unseen, **by_evaluate),
        figure("linear_probe", 0.456, None, "train", num_images=60, **by_evaluate),
        figure("unheard_of", 1.0),
    ])  # fmt: skip
    card = card_of(checkpoint)
    cifar10, imagenet = metadata(card)["model-index"][0]["results"]
    assert [cifar10["dataset"][key] for key in ("type", "split")] == [CIFAR10, "test"]
    assert {metric["name"]: metric["value"] for metric in cifar10["metrics"]} == {
        "PSNR, mean over images, dB": 17.5,
        "Fréchet distance of reconstructions, features of microsoft/resnet-18": 6.25,
    }
    assert [imagenet["dataset"][key] for key in ("type", "split")] == ["ILSVRC/imagenet-1k", "validation"]
    assert [(metric["type"], metric["value"]) for metric in imagenet["metrics"]] == [("psnr", 15.25)]
    results = card.split("## Results")[1].split("PSNR alone")[0]
    heading, rule = "| figure | value | images |", "| --- | --- | --- |"
    assert [line for line in results.splitlines() if line] == [
        "On `uoft-cs/cifar10`, split test, by training/evaluate.py:", heading, rule,
        "| PSNR, mean over images, dB | 17.50 | 10000 |",
        "| Fréchet distance of reconstructions, features of microsoft/resnet-18 | 6.25 | 500 |",
        "On `ILSVRC/imagenet-1k`, split validation, by training/evaluate.py:", heading, rule,
        "| PSNR, mean over images, dB | 15.25 | 800 |",
        "On local images, split train, by training/evaluate.py:", heading, rule,
        "| linear probe on the latents, accuracy | 45.6% | 60 |",
    ]  # fmt: skip


def test_of_local_data_the_card_links_and_names_nothing(checkpoint: Path) -> None:
    change_settings(checkpoint, hub_dataset_id=None, dataset_name="data/mycifar")
    write_figures(checkpoint, [figure("psnr", 17.5, None)])
    card = card_of(checkpoint)
    found = metadata(card)
    assert "datasets" not in found and "model-index" not in found and "mycifar" not in card
    assert "- Data set: local images." in card and "On local images, split test" in card


@pytest.mark.parametrize(("psnr", "mean_image", "said"), [
    (12.5, 12.75, True), (12.75, 12.75, True), (float("nan"), 12.75, True), (13.0, 12.75, False), (12.5, None, False),
])  # fmt: skip
def test_a_model_that_learned_nothing_is_called_so_above_all_else(
    psnr: float, mean_image: float | None, said: bool, checkpoint: Path
) -> None:
    others = [figure("mean_image_psnr", 99.0, split="train")]  # of other images: no comparison
    if mean_image is not None:
        others.append(figure("mean_image_psnr", mean_image))
    write_figures(checkpoint, [figure("psnr", psnr), *others])
    start = card_of(checkpoint).split("## Use")[0]
    assert ("**This model has learned nothing.**" in start) == said
    if said:
        assert f"a PSNR of {psnr:.2f} dB, the mean\n> image {mean_image:.2f} dB." in start


def test_settings_that_a_resumed_run_changed_are_told(checkpoint: Path) -> None:
    changes = [
        {"step": 40, "setting": "decoder_learning_rate", "before": 0.0005, "after": 0.0001},
        {"step": 60, "setting": "train_data_dir", "before": "/home/somebody/a", "after": "/home/somebody/b"},
    ]
    change_settings(checkpoint, changed_on_resume=changes)
    card = card_of(checkpoint)
    assert "- From step 40 on, `decoder_learning_rate` was 0.0001, before 0.0005.\n" in card
    assert "somebody" not in card and "train_data_dir" not in card


@pytest.mark.parametrize(
    ("setting", "before", "after", "told", "untold"),
    [
        ("pixel_error", 50.0, 0.0, "In the end, with J = ", "No loss of the game"),
        ("objective", "multi", "binary", "J alone uses labels", "No labels are used"),
        ("encoder_learning_rate", 1e-4, 0.0, "In the end, with J = ", "- With J = "),
    ],
)
def test_what_a_resumed_run_did_before_is_not_denied(
    setting: str, before: Any, after: Any, told: str, untold: str, checkpoint: Path
) -> None:
    for step, is_told in ((40, True), (0, False), (-5, False)):  # the game begins at 0
        change = {"step": step, "setting": setting, "before": before, "after": after}
        change_settings(checkpoint, changed_on_resume=[change], **{setting: after})
        card = card_of(checkpoint)
        assert (told in card, untold in card) == (is_told, not is_told), step


def test_a_model_that_has_not_played_the_game_does_not_claim_it(checkpoint: Path) -> None:
    change_settings(checkpoint, max_train_steps=0)
    card = card_of(checkpoint)
    assert "; none of the game." in card and "Not trained" not in card
    assert "No loss of the game" not in card and "the encoder minimises" not in card and "- Adam" not in card
    change_settings(checkpoint, max_train_steps=0, energy_warmup_steps=0, deconvolution_warmup_steps=0)
    assert "Not trained" in card_of(checkpoint)


def test_the_card_of_a_model_that_goes_on_from_another_tells_of_both(checkpoint: Path) -> None:
    imagenet = {
        "hub_dataset_id": "ILSVRC/imagenet-1k",
        "objective": "multi",
        "pixel_error": 50.0,
        "train_data_dir": "/secret/images",
    }
    start = {"pretrained_model_name_or_path": "/secret/model", "pixel_error": 0.0}
    change_settings(checkpoint, earlier_runs=[imagenet], **start)
    card = card_of(checkpoint)
    assert metadata(card)["datasets"] == [CIFAR10, "ILSVRC/imagenet-1k"]
    assert "`ILSVRC/imagenet-1k`, for non-commercial research" in card and "stereotypes" in card
    published = public_settings(checkpoint)
    assert published["earlier_runs"][0]["pixel_error"] == 50.0 and "secret" not in json.dumps(published) + card
    assert "J alone uses labels" in card and "No loss of the game" not in card
    change_settings(checkpoint, max_train_steps=0)
    assert "J alone uses labels" in card_of(checkpoint)


def test_the_text_tells_settings_results_and_limits(repository: Path) -> None:
    card = (repository / "README.md").read_text(encoding="utf-8")
    training = load_preset("cifar10_512")["training"]
    for expected in (
        "| PSNR, mean over images, dB | 17.12 | 1000 |",
        "| nearest-latent match | 98.7% | 1000 |",
        f"{training['max_train_steps']} steps of the game, of {training['train_batch_size']} images",
        f"after {training['energy_warmup_steps']} on the sparse-coding energy alone "
        f"and {training['deconvolution_warmup_steps']} on 1/2 |x - g(f(x))|^2.",
        "pixel by pixel; what comes before it does: 1/2 |x - g(f(x))|^2. No labels are used.",
        "On `uoft-cs/cifar10`, split test, by training/train.py:",
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
    export(trained_model(False), tmp_path)
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
            {"objective": "unsupervised", "energy": 2.0},
            "With J = R(Z) + dR(Z, Zh), the encoder minimises -J + 2 E, the decoder J + 20 S; S is the mean of "
            "1 - cos(z_i, zh_i); E is the energy above, of all stages, per pixel.",
        ),
        ({"objective": "multi"}, "J alone uses labels."),
        (
            {"code_reduction": [0.3], "code_consistency": 2.0, "pixel_error": 50.0, "encoder_learning_rate": 0.0},
            "With J = dR(Z, Zh) = R(Z u Zh) - R(Z)/2 - R(Zh)/2 + 0.3 sum_l dR(C_l, Ch_l), the decoder minimises "
            "J + 20 S + 2 S_c + 50 1/2 |x - xh|^2 per pixel; the encoder stands still; S is the mean of "
            "1 - cos(z_i, zh_i); C_l are the normalised codes of stage l of images, Ch_l those of reconstructions, "
            "S_c the mean of (C_l - Ch_l)^2, summed over stages.\n- No labels are used.",
        ),
        ({"code_reduction": [0.3, 0.0, 0.1]}, "R(Zh)/2 + 0.3 dR(C_1, Ch_1) + 0.1 dR(C_3, Ch_3), the encoder"),
        ({"objective": "binary"}, "No labels are used."),
        (
            {"energy_warmup_steps": 0, "deconvolution_warmup_steps": 7},
            "images a process, after 7 on 1/2 |x - g(f(x))|^2.",
        ),
        ({"deconvolution_warmup_steps": 0}, "pixel by pixel. No labels are used."),
        ({"pretrained_model_name_or_path": "/some/folder"}, "pixel by pixel. No labels are used."),
        ({"pretrained_model_name_or_path": "/some/folder"}, "images a process, from a model trained before."),
        ({"use_ema": False}, "schedule linear.\n"),
    ],
)
def test_the_text_tells_the_game_that_was_played(changes: dict[str, Any], expected: str, checkpoint: Path) -> None:
    change_settings(checkpoint, **changes)
    card = card_of(checkpoint)
    assert expected in card
    metadata(card)


def test_the_text_tells_the_ridge(tmp_path: Path) -> None:
    plain, ridged = (
        str(model_card(CtrlCscModel(CtrlCscConfig(ridge=mu)), REPOSITORY, None, [], "mit")) for mu in (0, 0.5)
    )
    assert "mu/2" not in plain and "mu =" not in plain and "mu/2 |z|^2" in ridged and "mu = 0.5" in ridged


def test_nothing_local_is_published(checkpoint: Path, tmp_path: Path) -> None:
    local = ("dataset_name", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path", "cache_dir")
    change_settings(
        checkpoint,
        **dict.fromkeys(local, "/home/somebody/folder"),
        hub_dataset_id=None,
        dataset_config_name="somebody",
        a_setting_of_tomorrow="./somebody",
        changed_on_resume=[{"step": 1, "setting": "cache_dir", "before": None, "after": "/home/somebody"}],
    )
    # What an older version wrote holds no figures of the form that says what was measured.
    (checkpoint / "metrics.json").write_text(
        json.dumps({"held_out_psnr": 17.5, "evaluation": {"results": {"/home/somebody/rival": {"psnr": 16.5}}}}),
        encoding="utf-8",
    )
    folder = export(trained_model(False), tmp_path / "local", repo_id=REPOSITORY, checkpoint=checkpoint)
    for path in folder.rglob("*"):
        assert path.is_dir() or b"somebody" not in path.read_bytes(), path
    assert not (folder / "metrics.json").exists()
    published = json.loads((folder / "training_args.json").read_text(encoding="utf-8"))
    written = json.loads((checkpoint / "training_args.json").read_text(encoding="utf-8"))
    assert published["energy_warmup_steps"] == written["energy_warmup_steps"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Data set: local images." in card and "17.5" not in card


def test_of_a_local_copy_of_a_hub_data_set_the_hub_id_alone_is_told(checkpoint: Path) -> None:
    change_settings(checkpoint, dataset_name="/home/somebody/cifar10", hub_dataset_id=CIFAR10)
    card = card_of(checkpoint)
    assert metadata(card)["datasets"] == [CIFAR10] and "somebody" not in card
    assert public_settings(checkpoint)["hub_dataset_id"] == CIFAR10
    assert "dataset_name" not in public_settings(checkpoint)


@pytest.mark.skipif(shutil.which("localedef") is None, reason="there is no localedef to make a Latin-1 locale with")
def test_a_card_written_under_a_latin_1_locale_is_read_again(checkpoint: Path, tmp_path: Path) -> None:
    write_figures(checkpoint, [*FIGURES, figure("frechet_distance", 1.0, feature_model="a/b")])
    trained_model(False).save_pretrained(checkpoint)
    locale = tmp_path / "en_US.ISO-8859-1"
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(locale)], check=True)
    code = (
        "import locale, sys; from ctrl_csc_hf import CtrlCscModel; from huggingface_hub import ModelCard;"
        "assert locale.getpreferredencoding() == 'ISO-8859-1', locale.getpreferredencoding();"
        "from ctrl_csc_hf.hub.publishing import export; checkpoint, folder = sys.argv[1:];"
        "export(CtrlCscModel.from_pretrained(checkpoint), folder, checkpoint=checkpoint);"
        "assert 'Fréchet' in ModelCard.load(folder + '/README.md').text"
    )
    environment = {**os.environ, "LOCPATH": str(tmp_path), "LC_ALL": locale.name, "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code.replace("é", "\\xe9"), str(checkpoint), str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr


def code_blocks(card: str) -> list[str]:
    """Of Python; there is no code of another language, BibTeX apart."""
    assert set(re.findall(r"^```(\w+)$", card, re.MULTILINE)) == {"python", "bibtex"}
    return re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


@needs_downloaded_code
@pytest.mark.parametrize("card", ["published", pytest.param("form", marks=pytest.mark.slow)])
def test_every_python_block_of_a_card_runs_as_it_stands(card: str, checkpoint: Path, tmp_path: Path) -> None:
    """Against a Hub that has the repository of the card's name; the form's stands for what it will be filled with."""
    name = REPOSITORY if card == "published" else "ORGANIZATION/ctrl-csc-imagenet"
    stages = {"stage_channels": [4, 4], "kernel_sizes": [4, 4, 8], "strides": [2, 2, 1], "paddings": [1, 1, 0]}
    CtrlCscModel(CtrlCscConfig(image_size=32, latent_dim=256, **stages)).save_pretrained(checkpoint)
    for path in ("image.png", "other.png"):
        Image.effect_noise((20, 16), 80).convert("RGB").save(tmp_path / path)
    with HubServer() as server:
        publish(server, checkpoint, name)
        text = server.files(name)["README.md"].decode()
        blocks = code_blocks(
            text if card == "published" else (MODEL_CARDS / "ctrl-csc-imagenet.md").read_text(encoding="utf-8")
        )
        with_package = [block for block in blocks if "import ctrl_csc_hf" in block]
        assert (len(blocks), len(with_package)) == (5, 1)
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
    from ctrl_csc_hf.training.settings import parse_settings

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
