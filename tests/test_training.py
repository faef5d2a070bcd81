"""training/train.py: what a run writes, and what becomes of it when something goes wrong."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import TINY_PRESET, TRAINING
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscConfig, CtrlCscDenoiser, CtrlCscDenoiserConfig, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.training.checkpoints import training_runs
from ctrl_csc_hf.training.ema import AverageOfWeights, evaluated_model
from ctrl_csc_hf.training.presets import load_preset, preset_names
from ctrl_csc_hf.training.settings import SCHEDULERS

Train = Callable[..., Path]


def run_main(flags: list[str]) -> Path:
    """train.py's main in this process."""
    from accelerate.state import AcceleratorState

    from ctrl_csc_hf.training.settings import parse_settings
    from ctrl_csc_hf.training.train import main

    AcceleratorState._reset_state(reset_partial_state=True)
    return main(*parse_settings(flags))


def test_a_run_writes_a_folder_that_the_auto_classes_load_with_its_figures(train: Train) -> None:
    folder = train("--report_to", "tensorboard")
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, CtrlCscModel)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = CtrlCscImageProcessor.from_pretrained(folder)
    pixel_values = processor(Image.new("RGB", (30, 20), "red"), return_tensors="pt").pixel_values
    assert model(pixel_values).reconstruction.shape == (1, 3, 16, 16)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["step"] == 4 and metrics["unreadable_images"] == 0
    for figure in metrics["figures"]:
        measured = {key: value for key, value in figure.items() if key not in ("name", "value")}
        assert measured == {"dataset": None, "split": "train", "num_images": 8, "feature_model": None,
                            "measured_by": "training/train.py"}  # fmt: skip
    figures = {figure["name"]: figure["value"] for figure in metrics["figures"]}
    assert 0 < figures["psnr"] < 60 and 0 <= figures["match"] <= 1 and 0 < figures["mean_image_psnr"] < 60
    assert model.config.id2label == {0: "class0", 1: "class1"}
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "step-000000.png",
        "step-000002.png",
        "step-000004.png",
    ]
    assert (folder / "training_curve.png").stat().st_size > 0
    assert list(folder.glob("logs/**/events.out.tfevents.*"))
    weights = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".safetensors")]
    assert weights == ["model.safetensors"]


def test_a_saved_average_has_unit_atoms_and_the_operator_norms_that_belong_to_them(train: Train) -> None:
    model = CtrlCscModel.from_pretrained(train())
    for dictionary in model.dictionaries():
        norms = dictionary.dictionary.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-6, rtol=0)
    for stage in model.encoder.stages:
        saved, size = stage.operator_norm.clone(), stage.signal_size
        stage.update_operator_norm((5, 5))  # another size, so that the next one starts from scratch
        stage.update_operator_norm(size)
        torch.testing.assert_close(saved, stage.operator_norm, rtol=0.01, atol=0)


def test_an_average_without_memory_is_the_raw_model(train: Train) -> None:
    averaged = load_file(train("--ema_decay", "0", output="averaged") / "model.safetensors")
    raw = load_file(train("--use_ema", "false", output="raw") / "model.safetensors")
    parameters = [name for name, _ in CtrlCscModel.from_pretrained(train(output="names")).named_parameters()]
    for name in parameters:
        # the average s + (1 - decay) (p - s) is p up to rounding
        torch.testing.assert_close(averaged[name], raw[name], atol=1e-6, rtol=0)


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(train: Train) -> None:
    whole = train("--max_train_steps", "6", "--checkpoints_total_limit", "5", output="whole")
    resumed = train(
        "--max_train_steps", "6", "--resume_from_checkpoint", str(whole / "checkpoint-2"), output="resumed"
    )  # fmt: skip
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_checkpoint_is_a_model_for_the_auto_classes_and_holds_no_pickle(train: Train) -> None:
    folder = train("--use_ema", "false", "--checkpointing_steps", "4") / "checkpoint-4"
    saved, last = (load_file(path / "model.safetensors") for path in (folder, folder.parent))
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, CtrlCscModel) and not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(saved[name], last[name]) for name, _ in model.named_parameters() if name in saved)
    assert CtrlCscImageProcessor.from_pretrained(folder).crop_size["height"] == 16
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_a_file_of_a_checkpoint_that_was_replaced_by_a_pickle_runs_no_code(train: Train, tmp_path: Path) -> None:
    folder = train("--max_train_steps", "2")
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple:
            return Path.touch, (ran,)

    read = [path for path in (folder / "checkpoint-2").iterdir() if path.name != "preprocessor_config.json"]
    assert len(read) == 6
    for path in read:
        content = path.read_bytes()
        torch.save(Code(), path)
        with pytest.raises(Exception, match=r"."):
            train("--resume_from_checkpoint", "latest", "--max_train_steps", "3")
        path.write_bytes(content)
    assert not ran.exists()
    train("--resume_from_checkpoint", "latest", "--max_train_steps", "3")


def test_a_resumed_run_refuses_settings_that_it_could_not_keep_to(train: Train) -> None:
    train("--max_train_steps", "2")
    for name, value in {
        "seed": "1",
        "shuffle_buffer": "99",
        "streaming": "true",
        "use_ema": "false",
        "num_validation_images": "3",
        "validation_split": "train",
        "label_column": "none",
        "energy_warmup_steps": "7",
        "deconvolution_warmup_learning_rate": "1.0",
    }.items():
        with pytest.raises(ValueError, match=f"(?i){name} must not change .* was made with .*, got '?{value}'?;"):
            train("--resume_from_checkpoint", "latest", "--max_train_steps", "4", f"--{name}", value)
    with pytest.raises(ValueError, match="image_size must be 16, as the checkpoint has it, got 32"):
        train("--resume_from_checkpoint", "latest", "--max_train_steps", "4", "--resolution", "32")
    with pytest.raises(ValueError, match=r"max_train_steps must be at least 2, the step of .*checkpoint-2, got 1"):
        train("--resume_from_checkpoint", "latest", "--max_train_steps", "1")


def test_a_denoiser_is_no_model_to_start_from(train: Train, tmp_path: Path) -> None:
    sizes = {"num_atoms": 4, "num_iterations": 1, "num_dictionaries": 1}
    CtrlCscDenoiser(CtrlCscDenoiserConfig(**sizes)).save_pretrained(tmp_path / "denoiser")
    with pytest.raises(ValueError, match=r"must be a model of train\.py, but .*denoiser is a ctrl_csc_denoiser"):
        train("--pretrained_model_name_or_path", str(tmp_path / "denoiser"), "--max_train_steps", "1")


def test_a_run_is_resumed_on_the_same_images_wherever_they_lie_and_on_no_others(
    train: Train, image_folder: Path, tmp_path: Path
) -> None:
    flags = ("--validation_split", "train")
    folder = train("--max_train_steps", "2", *flags)
    state = (folder / "checkpoint-2" / "training_state.json").read_text(encoding="utf-8")
    assert str(image_folder) not in state and image_folder.name not in state

    def resume(data: Path) -> None:
        train(*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "4", data=data)

    def moved(name: str) -> Path:
        return shutil.copytree(image_folder, tmp_path / name)

    fewer, others, renamed = moved("fewer"), moved("others"), moved("renamed")
    (fewer / "train" / "class1" / "079.png").unlink()
    for path in others.glob("train/class0/*.png"):
        Image.new("RGB", (20, 16), "red").save(path)
    (renamed / "train" / "class1").rename(renamed / "train" / "class2")
    for data, message in (
        (fewer, "number of held-out images was 8, got 7"),
        (others, "digest of sampled (training|held-out) images and labels was '.*', got '.*'"),
        (renamed, r"class names was \['class0', 'class1'\], got \['class0', 'class2'\]"),
    ):
        with pytest.raises(ValueError, match=f"resumed on the images that it was started on: their ({message})"):
            resume(data)
    resume(moved("moved"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("model.safetensors", None),
        ("training_state.safetensors", None),
        ("training_state.json", b"{}"),
        ("training_state.json", None),
        ("training_args.json", b"{}"),
        ("training_args.json", b"[]"),
        ("random_state_0.safetensors", None),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named(name: str, content: bytes | None, checkpoint: Path) -> None:
    flags = json.loads((checkpoint.parent / "flags.json").read_text(encoding="utf-8"))
    path = checkpoint / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    try:
        with pytest.raises(ValueError, match=rf"{name} cannot be read, .* remove the folder .*checkpoint-1$"):
            run_main([*flags, "--resume_from_checkpoint", "latest"])
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.safetensors"])
def test_a_file_of_a_checkpoint_that_lacks_a_tensor_is_named(name: str, checkpoint: Path) -> None:
    flags = json.loads((checkpoint.parent / "flags.json").read_text(encoding="utf-8"))
    path = checkpoint / name
    whole = path.read_bytes()
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if key.startswith("decoder")))
    save_file(tensors, path, {"format": "pt"})
    try:
        with pytest.raises(ValueError, match=rf"{name} cannot be read, .* remove the folder .*checkpoint-1$"):
            run_main([*flags, "--resume_from_checkpoint", "latest"])
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def checkpoint(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of one step, with its flags beside it."""
    folder = tmp_path_factory.mktemp("run")
    preset = folder / "tiny.yaml"
    preset.write_text(TINY_PRESET, encoding="utf-8")
    paths = {"config": preset, "train_data_dir": image_folder, "output_dir": folder, "cache_dir": folder / "cache"}
    flags = [f"--{name}={path}" for name, path in paths.items()] + ["--max_train_steps=1", "--checkpointing_steps=1"]
    (folder / "flags.json").write_text(json.dumps(flags), encoding="utf-8")
    return run_main(flags) / "checkpoint-1"


def test_a_resumed_run_applies_and_records_the_settings_that_were_changed(train: Train) -> None:
    def updates(*changed: str) -> dict[str, float]:
        """Largest change of each half's parameters in two resumed steps, and of their average."""
        folder = train("--max_train_steps", "2", output="/".join(changed) or "same")
        before = load_file(folder / "checkpoint-2" / "model.safetensors")
        (folder / "README.md").write_text("---\ntags:\n- ctrl-csc\n---\nThe card after two steps", encoding="utf-8")
        train("--max_train_steps", "4", "--resume_from_checkpoint", "latest", *changed, output=str(folder))
        assert not (folder / "README.md").exists()
        after, averaged = (load_file(path / "model.safetensors") for path in (folder / "checkpoint-4", folder))
        names = [name for name in before if name.endswith("bias")]
        moved = {
            half: max((after[name] - before[name]).abs().max().item() for name in names if name.startswith(half))
            for half in ("encoder", "decoder")
        }
        behind = max((after[name] - averaged[name]).abs().max().item() for name in names)
        changes = json.loads((folder / "training_args.json").read_text(encoding="utf-8"))["changed_on_resume"]
        settings = [(change["step"], change["setting"], change["after"]) for change in changes]
        expected = [(2, "max_train_steps", 4)]
        if changed:
            expected.append((2, changed[0].removeprefix("--"), float(changed[1])))
        assert sorted(settings) == sorted(expected)
        return moved | {"behind": behind}

    same = updates()
    slow_encoder = updates("--encoder_learning_rate", "1e-7")
    assert slow_encoder["encoder"] < 1e-5 < 1e-4 < same["encoder"]
    assert slow_encoder["decoder"] == pytest.approx(same["decoder"], rel=0.2)
    assert updates("--decoder_learning_rate", "1e-7")["decoder"] < 1e-5 < same["decoder"]
    assert updates("--ema_decay", "0.0")["behind"] < 1e-6 < same["behind"]
    assert updates("--adam_beta1", "0.9")["decoder"] != same["decoder"]


def test_a_run_in_the_folder_of_another_model_leaves_none_of_its_records(train: Train) -> None:
    folder = train()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in ("rivals.png", "neighbours.png", "correlations.png"):  # of evaluate.py
        (folder / name).touch()
    train("--max_train_steps", "3", "--seed", "1")
    assert not {"rivals.png", "neighbours.png", "correlations.png"} & {path.name for path in folder.iterdir()}
    samples = sorted(path.name for path in (folder / "samples").iterdir())
    assert samples == ["step-000000.png", "step-000002.png", "step-000003.png"]


def test_a_full_disk_at_the_end_of_a_run_leaves_the_model_before_it_with_its_records(train: Train) -> None:
    folder = train()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "samples"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # of a file: the kernel refuses more, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "model.safetensors").stat().st_size - 1, limits[1]))
    try:
        with pytest.raises(OSError, match="model cannot be written and is as it was: "):
            train("--seed", "1", "--checkpointing_steps", "100")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "samples"}
    assert left == before


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_that_is_offered_goes_on_where_it_was(train: Train, scheduler: str) -> None:
    flags = ("--lr_scheduler", scheduler, "--lr_warmup_steps", "2", "--max_train_steps", "5")
    whole = train(*flags, "--checkpoints_total_limit", "5", output="whole")
    resumed = train(*flags, "--resume_from_checkpoint", str(whole / "checkpoint-2"), output="resumed")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_folders_and_files_beside_the_checkpoints_stay_and_stop_nothing(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for name in ("checkpoint-best", "checkpoint-4-backup"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoint-9.zip").write_bytes(b"kept")
    (folder / "checkpoint-7").write_bytes(b"kept")
    train("--checkpoints_total_limit", "1")
    train("--resume_from_checkpoint", "latest", "--max_train_steps", "6", "--checkpoints_total_limit", "1")
    names = {path.name for path in folder.glob("checkpoint-*")}
    assert names == {"checkpoint-6", "checkpoint-7", "checkpoint-9.zip", "checkpoint-best", "checkpoint-4-backup"}


@pytest.mark.parametrize("size", [16, 28, pytest.param(48, marks=pytest.mark.slow)])
def test_a_folder_and_an_output_are_enough_whatever_the_resolution(
    size: int, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctrl_csc_hf.training.settings import parse_settings

    flags = ["--train_data_dir", str(image_folder), "--output_dir", str(tmp_path / "out"), "--resolution", str(size)]
    settings, config = parse_settings(flags)
    assert config.image_size == size and settings.image_column is None and settings.validation_split is None
    assert settings.hub_dataset_id is None and settings.streaming is False
    short = ["--energy_warmup_steps", "1", "--deconvolution_warmup_steps", "1", "--max_train_steps", "1"]
    short += ["--train_batch_size", "8"]
    assert run_main([*flags, *short, "--cache_dir", str(tmp_path / "cache")]).is_dir()
    assert CtrlCscConfig.from_pretrained(tmp_path / "out").image_size == size


@pytest.mark.parametrize("data", ["train_data_dir", "dataset_name"])
def test_the_output_lies_outside_of_the_images_as_its_pictures_would_be_trained_on_next(
    data: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctrl_csc_hf.training.settings import parse_settings

    monkeypatch.chdir(image_folder)
    for folder, output in ((".", "out"), (str(image_folder), str(image_folder)), ("..", ".")):
        with pytest.raises(ValueError, match=r"output_dir must lie outside of the folder of the images, .*, got"):
            parse_settings([f"--{data}", folder, "--output_dir", output])
    assert parse_settings([f"--{data}", ".", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("own", ["examples", "samples"])
def test_images_where_a_model_keeps_its_pictures_are_not_trained_on(own: str, tmp_path: Path) -> None:
    from ctrl_csc_hf.training.settings import parse_settings

    (tmp_path / own / "photos").mkdir(parents=True)
    for folder in (tmp_path / own, tmp_path / own / "photos"):
        with pytest.raises(ValueError, match=r"must not be above the folder of the images, .*, in which pictures of"):
            parse_settings(["--train_data_dir", str(folder), "--output_dir", str(tmp_path)])


def test_a_hub_that_does_not_answer_is_one_line(image_folder: Path, tmp_path: Path) -> None:
    flags = ["--train_data_dir", str(image_folder), "--output_dir", str(tmp_path / "out"), "--push_to_hub"]
    flags += ["--hub_license", "mit", "--hub_private_repo"]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "none"}
    command = [sys.executable, str(TRAINING / "train.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "OSError: the Hub at http://127.0.0.1:9 does not answer" in result.stderr.splitlines()[-1]


def test_a_presets_data_set_gives_way_to_the_one_that_is_named() -> None:
    from ctrl_csc_hf.training.settings import parse_settings

    ours, _ = parse_settings(["--config", "cifar10"])
    assert (ours.dataset_name, ours.image_column, ours.validation_split) == ("uoft-cs/cifar10", "img", "test")
    assert ours.hub_dataset_id == "uoft-cs/cifar10" and ours.streaming
    same, _ = parse_settings(["--config", "cifar10", "--dataset_name", "uoft-cs/cifar10", "--streaming", "false"])
    assert (same.image_column, same.streaming) == ("img", False)
    other, _ = parse_settings(["--config", "cifar10", "--dataset_name", "org/other"])
    assert (other.image_column, other.validation_split, other.hub_dataset_id) == (None, None, "org/other")
    assert other.streaming


def test_a_model_that_is_worse_than_the_mean_image_is_announced(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    figures = json.loads((train("--max_train_steps", "1") / "metrics.json").read_text(encoding="utf-8"))["figures"]
    psnr, mean = (next(f["value"] for f in figures if f["name"] == name) for name in ("psnr", "mean_image_psnr"))
    assert psnr < mean
    assert (
        f"The model has learned nothing: its reconstructions of the held-out images have {psnr:.2f} dB" in caplog.text
    )


def test_images_of_one_channel_are_refused_by_the_name_of_the_setting(train: Train, tiny_preset: Path) -> None:
    text = tiny_preset.read_text(encoding="utf-8").replace("model:", "model:\n  num_channels: 1")
    tiny_preset.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="num_channels must be 3, as images are read as RGB, got 1"):
        train()


def test_what_is_wrong_is_said_in_one_line(tiny_preset: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TRAINING / "train.py"), "--train_data_dir", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("ValueError: train_data_dir must be a folder, got ")


def test_batch_norms_and_held_out_images_come_from_all_classes_of_a_folder_sorted_by_class(
    train: Train, tmp_path: Path
) -> None:
    for label, (low, high) in enumerate([(0, 80), (175, 255)]):
        for index in range(2100):
            path = tmp_path / "data" / "train" / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(low, high, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    flags = ("--max_train_steps", "1", "--num_validation_images", "200", "--validation_steps", "9")
    model = AutoModel.from_pretrained(train(*flags, data=tmp_path / "data"))
    first = model.encoder.stages[0]
    dark, bright = (torch.full((1, 3, 16, 16), level) for level in (-0.69, 0.69))
    means = [first.encode(image).mean(dim=(0, 2, 3)) for image in (dark, bright)]
    # Of the mean codes of dark and of bright images, the running mean is about half way between the two.
    apart = (means[1] - means[0]).abs() > 0.1
    share = (model.encoder.norms[0].running_mean - means[0])[apart] / (means[1] - means[0])[apart]
    assert 0.3 < share.median() < 0.7


def test_what_was_learnt_before_the_game_is_kept_and_gone_on_from(
    train: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--energy_warmup_steps", "3", "--deconvolution_warmup_steps", "2", "--checkpoints_total_limit", "5")
    whole = train(*flags, output="whole")
    assert capfd.readouterr().err.count("before the game: ") > 0
    resumed = train(*flags, "--resume_from_checkpoint", str(whole / "checkpoint-0"), output="resumed")
    assert "before the game: " not in capfd.readouterr().err
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_precision_that_the_launcher_was_told_is_recorded(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folder = train("--max_train_steps", "2")
    for path in (folder, folder / "checkpoint-2"):
        assert json.loads((path / "training_args.json").read_text(encoding="utf-8"))["mixed_precision"] == "bf16"


def test_gradient_accumulation_is_refused_with_the_reason(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(
        ValueError, match=r"must be 1, got 2: neither coding rates nor batch norms .* means over its parts"
    ):
        train()


def test_two_processes_train_one_model_and_resume_where_each_of_them_stood(
    tiny_preset: Path, image_folder: Path, tmp_path: Path
) -> None:
    def run(output: str, *flags: str, use_cpu: str = "1") -> Path:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        paths = {"config": tiny_preset, "train_data_dir": image_folder, "cache_dir": tmp_path / "cache"}
        arguments = [f"--{name}={path}" for name, path in paths.items()] + [f"--output_dir={tmp_path / output}", *flags]
        result = subprocess.run(
            [*torchrun, str(TRAINING / "train.py"), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": use_cpu},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return tmp_path / output

    try:
        run(
            "alone", use_cpu="0"
        )  # accelerate 1.2 runs both, as it was told; newer ones run one, which is no game of two
    except AssertionError as error:
        assert "2 processes were launched, but accelerate runs 1" in str(error)
    flags = (
        "--max_train_steps=6",
        "--energy_warmup_steps=2",
        "--deconvolution_warmup_steps=2",
    )
    whole = run("whole", *flags, "--checkpoints_total_limit=5")
    state = json.loads((whole / "checkpoint-6" / "training_state.json").read_text(encoding="utf-8"))
    assert len(state["history"]["places"]) == 2  # there were two
    resumed = run("resumed", *flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_folder_with_checkpoints_of_an_earlier_run_is_refused_and_stays_as_it_is(train: Train) -> None:
    folder = train("--max_train_steps", "4")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for flags in ((), ("--resume_from_checkpoint", str(folder / "checkpoint-2"))):
        with pytest.raises(ValueError, match="holds checkpoint-4 of an earlier run"):
            train(*flags)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_old_checkpoints_are_removed_beyond_the_limit(train: Train) -> None:
    folder = train("--max_train_steps", "6", "--checkpoints_total_limit", "1")
    assert [path.name for path in folder.glob("*checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("flags", [
    ("--objective", "multi"),
    ("--objective", "unsupervised"),
    ("--energy", "0.1", "--mixed_precision", "bf16", "--gradient_checkpointing"),
    ("--energy_warmup_steps", "3", "--deconvolution_warmup_steps", "2", "--gradient_checkpointing"),
    pytest.param(
        ("--torch_compile", "--mixed_precision", "bf16", "--train_batch_size", "4", "--energy_warmup_steps", "2",
         "--deconvolution_warmup_steps", "2"), marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_every_objective_and_weight_trains(train: Train, flags: tuple[str, ...]) -> None:
    metrics = json.loads((train(*flags, "--max_train_steps", "2") / "metrics.json").read_text(encoding="utf-8"))
    assert all(figure["value"] == figure["value"] for figure in metrics["figures"])


def test_steps_before_the_game_are_recorded_by_their_loss(train: Train) -> None:
    folder = train("--energy_warmup_steps", "3", "--deconvolution_warmup_steps", "2")
    losses = {
        r["step"]: r["loss"] for r in json.loads((folder / "history.json").read_text(encoding="utf-8")) if "loss" in r
    }
    assert list(losses) == [-4, -3, -2, -1, 0]
    assert all(loss > 0 for loss in losses.values())


def test_small_classes_are_warned_about(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    train("--objective", "multi", "--train_batch_size", "12", "--max_train_steps", "1")
    assert "fewer than 8 a class" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_leaves_the_checkpoint(
    train: Train, tmp_path: Path
) -> None:
    train("--max_train_steps", "2")
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("checkpoint-2/*")}
    with pytest.raises(
        FloatingPointError, match=r"step 3: the encoder loss is inf.*last checkpoint in .*model is intact"
    ):
        train("--resume_from_checkpoint", "latest", "--max_train_steps", "8", "--energy", "1e39")
    assert before and all(path.read_bytes() == content for path, content in before.items())


def test_an_unreadable_image_is_skipped_counted_and_reported(
    train: Train, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = shutil.copytree(image_folder, tmp_path / "broken")
    (broken / "train" / "class0" / "999.png").write_bytes(b"no image")
    folder = train("--max_train_steps", "12", data=broken)  # four batches of 16 are an epoch
    skipped = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["unreadable_images"]
    assert skipped >= 1
    assert f"{skipped} unreadable images were skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "launcher", [[], ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]]
)
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(
    train: Train, tiny_preset: Path, image_folder: Path, tmp_path: Path, launcher: list[str]
) -> None:
    arguments = ["--config", str(tiny_preset), "--train_data_dir", str(image_folder), "--max_train_steps", "100000"]
    arguments += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "model")]
    arguments += ["--checkpointing_steps", "100000", "--validation_steps", "100000"]
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(TRAINING / "train.py"), *arguments],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        deadline = time.monotonic() + 240
        while "dR" not in log.read_text(encoding="utf-8") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        assert process.wait(timeout=120) != 0
        deadline = time.monotonic() + 60
        while "Stopped" not in log.read_text(encoding="utf-8") and time.monotonic() < deadline:
            time.sleep(0.2)  # accelerate does not wait for the run
    if not launcher:
        assert process.returncode == 130 and "Traceback" not in log.read_text(encoding="utf-8")
    (checkpoint,) = (tmp_path / "model").glob("checkpoint-*")
    assert f"--resume_from_checkpoint {checkpoint}" in log.read_text(encoding="utf-8")
    step = int(checkpoint.name.split("-")[1])
    train("--resume_from_checkpoint", "latest", "--max_train_steps", str(step + 1))
    assert json.loads((tmp_path / "model" / "metrics.json").read_text(encoding="utf-8"))["step"] == step + 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objective", "triple"), "objective must be one of"),
        (("--decoder_consistency", "-1"), "decoder_consistency must be a finite number of at least 0, got -1"),
        (("--mixed_precision", "fp16"), "mixed_precision must be one of .*'bf16'.*, got 'fp16'"),
        (("--max_train_steps", "-1"), "max_train_steps must be at least 0, got -1"),
        (("--resume_from_checkpoint", "latest"), "there is no checkpoint in"),
        (("--image_column", "picture"), "image_column must be one of .*image.*, got 'picture'"),
        (("--resolution", "3"), "image_size=3 is not allowed: it must be at least 4"),
        (("--resolution", "75", "--config", "cifar10"), "resolution must be even and at least 4, got 75"),
        (("--validation_split", "train[:50%]"), "must have no image of the split to train on"),
        (("--train_split", "nothing"), "nothing"),
        (("--lr_scheduler", "reduce_lr_on_plateau"), "lr_scheduler must be one of .*'linear'.*, got 'reduce_lr"),
        (("--push_to_hub",), "license"),
        (("--seed", "4294967296"), r"seed must be below 2\^32, got 4294967296"),
        (("--lr_warmup_steps", "-3"), "lr_warmup_steps must be at least 0, got -3"),
        (("--shuffle_buffer", "-1"), "shuffle_buffer must be at least 0, got -1"),
        (("--dataloader_num_workers", "-1"), "dataloader_num_workers must be at least 0, got -1"),
        (("--energy_warmup_steps", "-1"), "energy_warmup_steps must be at least 0, got -1"),
        (("--deconvolution_warmup_steps", "-1"), "deconvolution_warmup_steps must be at least 0, got -1"),
        (("--config", "nothing"), "a preset must be a YAML file or one of .*cifar10"),
    ],
)
def test_wrong_settings_are_refused_by_name(train: Train, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(*flags)


@pytest.mark.parametrize(("section", "entry"), [("training", "learning_speed"), ("model", "sparisty")])
def test_a_preset_with_an_unknown_entry_is_refused(section: str, entry: str, tmp_path: Path) -> None:
    from ctrl_csc_hf.training.settings import parse_settings

    preset = tmp_path / "preset.yaml"
    preset.write_text(f"{section}: {{{entry}: 1}}", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{section} must hold .*got .*{entry}"):
        parse_settings(["--config", str(preset), "--dataset_name", "x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "must be a YAML file, but cannot be read as one: while parsing"),
        ("training: [1]", r"sections must hold entries of the form 'name: value', got {'training': \[1\]}"),
        ("training: {max_train_steps: }", "max_train_steps must be of the type int, got None"),
        ("training: {max_train_steps: abc}", "max_train_steps must be of the type int, got 'abc'"),
        ("training: {checkpoints_total_limit: 1.5}", "must be of the type int or NoneType, got 1.5"),
        ("training: {code_reduction: [0.3, abc]}", r"must be of the type list of float, got \[0.3, 'abc'\]"),
        ("training: {code_reduction: 0.3}", "must be of the type list of float, got 0.3"),
        ("training: {max_train_steps: [1]}", r"max_train_steps must be of the type int, got \[1\]"),
        ("training: {code_reduction: []}", r"must be of the type list of float, got \[\]"),
        ("model: {image_size: }", "image_size.*got NoneType"),
    ],
)
def test_what_is_wrong_in_a_preset_is_one_line_with_the_files_name(text: str, message: str, tmp_path: Path) -> None:
    from ctrl_csc_hf.training.settings import parse_settings

    preset = tmp_path / "wrong.yaml"
    preset.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^.*wrong\.yaml.*{message}") as caught:
        parse_settings(["--config", str(preset), "--dataset_name", "x"])
    assert "\n" not in str(caught.value)
    text = "training: {ema_decay: 1e-4, seed: 3, checkpoints_total_limit: , code_reduction: [1e-1, 2]}"
    preset.write_text(text, encoding="utf-8")
    settings, _ = parse_settings(["--config", str(preset), "--dataset_name", "x"])
    assert (settings.ema_decay, settings.seed, settings.checkpoints_total_limit) == (1e-4, 3, None)
    assert settings.code_reduction == [0.1, 2.0]


@pytest.mark.parametrize("size", [16, 28, 32, 48, 64, 96, 128, 224])
def test_a_presets_values_of_each_stage_fit_any_resolution(size: int) -> None:
    from ctrl_csc_hf.training.settings import parse_settings

    flags = ["--config", "cifar10", "--train_data_dir", "x", "--resolution", str(size)]
    config = parse_settings(flags)[1]
    further = len(config.stage_channels) - 2
    assert config.sparsity == [0.5, 0.6] + [0.6] * further
    assert config.num_iterations == [24, 14] + [14] * further


def test_a_run_that_goes_on_leaves_what_others_put_into_its_folder(train: Train) -> None:
    folder = train("--max_train_steps", "2")
    own = [folder / name for name in ("README.md", "handler.py", "notes.txt", "examples/own.png")]
    for path in own:
        path.write_bytes(b"mine")
    train("--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert all(path.read_bytes() == b"mine" for path in own)


def test_a_run_that_starts_from_a_checkpoint_takes_its_sizes_and_weights(train: Train, tiny_preset: Path) -> None:
    first = train(output="first")
    larger = (
        tiny_preset.read_text(encoding="utf-8")
        .replace("image_size: 16", "image_size: 32")
        .replace("[4, 4, 4]", "[4, 4, 8]")
    )
    tiny_preset.write_text(larger, encoding="utf-8")
    start = ("--pretrained_model_name_or_path", str(first))
    with pytest.raises(ValueError, match=r"resolution must be 16 or be left out, .* got 32"):
        train(*start, "--resolution", "32", output="other")
    second = train(*start, "--max_train_steps", "1", "--use_ema", "false", output="second")
    assert CtrlCscConfig.from_pretrained(second).image_size == 16
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    name = "encoder.last_stage.dictionary"
    torch.testing.assert_close(before[name], after[name], atol=1e-3, rtol=0)


def test_a_run_that_starts_from_a_model_holds_out_the_same_images_of_the_same_data_set(
    train: Train, image_folder: Path, tmp_path: Path
) -> None:
    first = train("--max_train_steps", "2", output="first")
    short = ("--max_train_steps", "1")
    for start in (first, first / "checkpoint-2"):
        flags = ("--pretrained_model_name_or_path", str(start), *short)
        for changed, remedy in (
            (("--seed", "1"), "--seed 0"),
            (("--num_validation_images", "4"), "--num_validation_images 16"),
            (("--streaming", "true", "--seed", "2"), "--streaming False, --seed 0"),
        ):
            with pytest.raises(ValueError, match=rf"held-out images must be those of .*first.*\) {remedy}$"):
                train(*flags, *changed, output="second")
    others = shutil.copytree(image_folder, tmp_path / "others")
    for path in others.glob("train/class0/*.png"):
        Image.new("RGB", (20, 16), "red").save(path)
    train(*flags, output="second")
    third = train(*flags, "--seed", "1", "--checkpointing_steps", "1", output="third", data=others)
    first.rename(tmp_path / "moved")  # what is known of it is in the checkpoint
    more = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    train(*flags, *more, "--seed", "1", output="third", data=others)
    with pytest.raises(ValueError, match=r"held-out images must be those of .*third, .*\) --seed 0$"):
        train("--pretrained_model_name_or_path", str(third), "--seed", "1", *short, output="fourth")


def test_a_model_whose_training_is_not_known_for_want_of_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"the Hub is not reached, .* org/name was trained on: give the folder that `hf"):
        training_runs("org/name")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_flags_override_it(name: str) -> None:
    from ctrl_csc_hf.training.settings import parse_settings

    preset = load_preset(name)
    images = [] if preset["training"].get("dataset_name") else ["--train_data_dir", "images"]
    settings, config = parse_settings(["--config", name, "--seed", "7", *images])
    assert settings.seed == 7
    assert config.signal_sizes[-1] == 1
    assert {"cifar10", "imagenet64", "imagenet128"} <= set(preset_names())


def assert_same_bits_in_a_new_process(model: CtrlCscModel, folder: Path) -> None:
    """Saves the model, loads it in another process, and compares all outputs for two images."""
    size = model.config.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model.save_pretrained(folder)
    torch.save(images, folder / "images.pt")
    script = (
        "import sys, torch, ctrl_csc_hf; from transformers import AutoModel; folder = sys.argv[1];"
        "torch.set_num_threads(1); model = AutoModel.from_pretrained(folder).eval();"
        "output = model(torch.load(folder + '/images.pt'), output_reconstructed_latents=True);"
        "torch.save(dict(output), folder + '/output.pt')"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: the number of threads decides the order of sums
    output = dict(model(images, output_reconstructed_latents=True))
    torch.set_num_threads(threads)
    loaded = torch.load(folder / "output.pt")
    assert output.keys() == loaded.keys()
    for key, value in output.items():
        assert torch.equal(value, loaded[key]), key


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "cifar10")) for name in preset_names()]
)
def test_every_presets_model_is_the_same_after_saving_and_loading_elsewhere(name: str, tmp_path: Path) -> None:
    assert_same_bits_in_a_new_process(CtrlCscModel(CtrlCscConfig(**load_preset(name)["model"])).eval(), tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_an_average_is_the_same_after_saving_and_loading_elsewhere(shared: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CtrlCscConfig(image_size=8, latent_dim=6, stage_channels=[4], kernel_sizes=[4, 4], strides=[2, 1],
                           paddings=[1, 0], share_dictionaries=shared)  # fmt: skip
    model = CtrlCscModel(config)
    average = AverageOfWeights(model.parameters(), decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    average.advance()
    average.update(model.parameters())
    images = torch.rand(12, 3, 8, 8) * 2 - 1
    averaged = evaluated_model(model, average, images, batch_size=4)
    assert all(dictionary.has_unit_atoms() for dictionary in averaged.dictionaries())
    assert_same_bits_in_a_new_process(averaged, tmp_path)


def test_statistics_of_an_average_are_the_means_over_the_batches_of_its_images() -> None:
    torch.manual_seed(0)
    config = CtrlCscConfig(image_size=8, latent_dim=6, stage_channels=[4], kernel_sizes=[4, 4], strides=[2, 1],
                           paddings=[1, 0])  # fmt: skip
    model = CtrlCscModel(config)
    images = torch.rand(12, 3, 8, 8) * 2 - 1
    averaged = evaluated_model(model, AverageOfWeights(model.parameters(), decay=0), images, batch_size=4)
    codes = [averaged.encoder.stages[0].encode(batch) for batch in images.split(4)]
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in codes]).mean(dim=0)
    variances = torch.stack([batch.var(dim=(0, 2, 3)) for batch in codes]).mean(dim=0)
    torch.testing.assert_close(averaged.encoder.norms[0].running_mean, means)
    torch.testing.assert_close(averaged.encoder.norms[0].running_var, variances)


def test_cifar10_streams_through_the_preset(
    train: Train, cifar10: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctrl_csc_hf.training.train.CALIBRATION_IMAGES", 128)  # rather than minutes
    flags = ["--config", "cifar10", "--dataset_name", cifar10, "--report_to", "none"]
    flags += ["--max_train_steps", "2", "--num_validation_images", "64", "--output_dir", str(tmp_path / "cifar10")]
    flags += ["--energy_warmup_steps", "1", "--deconvolution_warmup_steps", "1", "--use_ema", "false"]
    folder = run_main([*flags, "--train_batch_size", "16"])
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["step"] == 2 and metrics["figures"][0]["split"] == "test"


def test_imagenet_streams_through_its_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrl_csc_hf.training.train.CALIBRATION_IMAGES", 128)
    folder = os.environ.get("CTRL_CSC_IMAGENET_SAMPLE")
    if not folder:
        pytest.skip("CTRL_CSC_IMAGENET_SAMPLE names no local sample of ImageNet")
    flags = ["--config", "imagenet64", "--dataset_name", folder, "--train_split", "validation", "--report_to", "none"]
    flags += ["--max_train_steps", "1", "--num_validation_images", "8", "--train_batch_size", "8", "--use_ema", "false"]
    flags += ["--dataloader_num_workers", "1", "--output_dir", str(tmp_path / "imagenet"), "--label_column", "none"]
    flags += ["--energy_warmup_steps", "1", "--deconvolution_warmup_steps", "1"]
    metrics = json.loads((run_main(flags) / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["step"] == 1 and metrics["unreadable_images"] == 0
