"""What CTRL-CSC is compared with, against plain torch; and the sweep that compares."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import baselines
import pytest
import torch
import torch.nn.functional as F
import yaml
from baselines import ConvolutionalConfig, ConvolutionalModel
from conftest import BENCHMARKS
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, ResNetConfig, ResNetModel

from ctrl_csc_hf import CtrlCscConfig
from ctrl_csc_hf.training.data import ImageSource, load_images, take_images
from ctrl_csc_hf.training.presets import load_preset
from ctrl_csc_hf.training.settings import parse_settings

SHAPE = {
    "image_size": 16,
    "latent_dim": 8,
    "stage_channels": [4, 6],
    "kernel_sizes": [4, 4, 4],
    "strides": [2, 2, 1],
    "paddings": [1, 1, 0],
}


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_convolutional_encoder_is_convolution_batch_norm_leaky_relu() -> None:
    torch.manual_seed(0)
    model = ConvolutionalModel(ConvolutionalConfig(**SHAPE)).train()
    x = signal = images()
    for stage, stride, padding in zip(model.encoder.stages, (2, 2), (1, 1), strict=True):
        convolved = F.conv2d(signal, stage.dictionary, stride=stride, padding=padding)
        signal = F.leaky_relu(F.batch_norm(convolved, None, None, training=True), 0.2)
    vector = F.conv2d(signal, model.encoder.last_stage.dictionary).flatten(1)
    vector[:, 0] += 1e-3  # so that the zero vector has a direction, too
    torch.testing.assert_close(model.encode(x).latents, F.normalize(vector), atol=1e-5, rtol=1e-4)


def test_its_configuration_has_the_stages_of_its_image_size_and_is_checked() -> None:
    assert ConvolutionalConfig(image_size=64).stage_channels == CtrlCscConfig(image_size=64).stage_channels
    with pytest.raises(ValueError, match="latent_dim=0 is not allowed"):
        ConvolutionalConfig(latent_dim=0)
    with pytest.raises(ValueError, match="low_pass=True is not allowed: it must be False for ordinary convolutions"):
        ConvolutionalConfig(low_pass=True)


def test_it_is_saved_and_loaded_by_automodel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ConvolutionalModel(ConvolutionalConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is ConvolutionalModel
    assert torch.equal(loaded(images()).reconstruction, model(images()).reconstruction)


def test_train_trains_it_and_evaluate_measures_it(
    tiny_preset: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--config", str(tiny_preset), "--train_data_dir", str(image_folder), "--max_train_steps", "1"]
    monkeypatch.setattr(
        sys, "argv", ["baselines.py", *flags, "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    )
    baselines.launch()
    assert type(AutoModel.from_pretrained(tmp_path / "run")) is ConvolutionalModel
    flags = ["--model", str(tmp_path / "run"), "--train_data_dir", str(image_folder)]
    monkeypatch.setattr(sys, "argv", ["baselines.py", "evaluate", *flags, "--output_dir", str(tmp_path / "figures")])
    baselines.launch()
    assert (tmp_path / "figures" / "metrics.json").is_file()


def test_convolutions_have_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["baselines.py", "--config", "cifar10", "--output_dir", "never"])
    with pytest.raises(SystemExit, match=r"energy and energy_warmup_steps must be 0, .*, got 0\.0 and 400"):
        baselines.launch()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--keep_dictionaries",), "keep_dictionaries must be off where energy_warmup"),
        (("--collapse_share", "2"), "collapse_share must be between 0 and 1"),
        (("--collapse_steps", "0"), "collapse_steps must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(tiny_preset: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(["--config", str(tiny_preset), "--train_data_dir", "somewhere", *flags])


def test_every_row_of_the_sweep_is_a_run_that_settings_accept_on_as_many_images(tmp_path: Path) -> None:
    from sweep import BASE, ROWS, preset_of

    base = load_preset(BASE)
    phases = ("energy_warmup_steps", "deconvolution_warmup_steps", "max_train_steps")
    for row, changes in ROWS.items():
        for section, values in changes.items():
            assert all(base[section].get(key) != value for key, value in values.items()), f"{row} changes nothing"
        path = tmp_path / "row.yaml"
        path.write_text(yaml.safe_dump(preset_of(row, 25_600)), encoding="utf-8")
        settings, _ = parse_settings(["--config", str(path)])
        for phase in phases:
            if phase not in changes.get("training", {}):
                images = getattr(settings, phase) * settings.train_batch_size
                assert abs(images - base["training"][phase] * 128) <= settings.train_batch_size, (row, phase)


def test_the_sweep_knows_the_models_of_all_its_rows() -> None:
    code = (
        f"import sys; sys.path.append({str(BENCHMARKS)!r}); import sweep; "
        "from transformers import AutoConfig; AutoConfig.for_model('ctrl_convolutional')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # a new process: this one has imported them


def test_the_sweep_runs_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    tiny_preset: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    import sweep

    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(image_folder / "train", data / split)
    resnet = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(resnet).save_pretrained(tmp_path / "resnet")
    monkeypatch.setattr(sweep, "BASE", str(tiny_preset))  # the same run at 16 pixels
    arguments = SimpleNamespace(
        dataset_name=str(data), image_column="image", label_column="label", feature_model=str(tmp_path / "resnet"),
        rows=["w_g 0"], seeds=[3], num_train_images=32, num_images=20, num_probe_images=1000,
        output_dir=tmp_path / "sweep",
    )  # fmt: skip
    sweep.main(arguments)
    (result,) = [
        json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    settings = json.loads((tmp_path / "sweep" / "w_g_0-3" / "training_args.json").read_text(encoding="utf-8"))
    assert (settings["decoder_consistency"], settings["seed"], settings["max_train_steps"]) == (0, 3, 2)
    assert f"| w_g 0 | 3 | {result['psnr']:.2f} |" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "curves.png").stat().st_size > 0
    history = json.loads((tmp_path / "sweep" / "w_g_0-3" / "history.json").read_text(encoding="utf-8"))
    panels = sweep.draw([result], tmp_path / "sweep").axes
    for axes, key in zip(panels, ("psnr", "rate"), strict=False):
        (line,) = axes.lines
        assert line.get_xydata().tolist() == [[record["step"], record[key]] for record in history if key in record]
    assert panels[2].lines[0].get_xydata().tolist() == [[result["psnr"], result["frechet_distance"]]]

    model = AutoModel.from_pretrained(tmp_path / "sweep" / "w_g_0-3").eval()
    source = ImageSource(dataset_name=str(data), split="test", streaming=True, label_column=None)
    measured = take_images(load_images(source), 20, image_column="image", image_size=16)
    with torch.no_grad():
        error = (measured - model(measured).reconstruction).square().mean(dim=(1, 2, 3))
        latents = model.encode(measured).latents
        training, labels = sweep.examples("train", 1000, 16, arguments)
        fitted = model.encode(training).latents
    assert result["psnr"] == pytest.approx((10 * torch.log10(4 / error)).mean().item(), abs=1e-4)
    scaler = StandardScaler().fit(fitted)
    probe = LogisticRegression(max_iter=1000).fit(scaler.transform(fitted), labels)
    _, test_labels = sweep.examples("test", 20, 16, arguments)
    assert result["linear_probe"] == pytest.approx(probe.score(scaler.transform(latents), test_labels))

    written = (tmp_path / "sweep" / "w_g_0-3" / "model.safetensors").stat().st_mtime_ns
    sweep.main(arguments)  # there already
    assert (tmp_path / "sweep" / "w_g_0-3" / "model.safetensors").stat().st_mtime_ns == written

    record = tmp_path / "sweep" / "results.jsonl"
    record.write_text(record.read_text(encoding="utf-8") + '{"row": "w_g', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"results\.jsonl cannot be read, .*: remove the line, and its row is run again"
    ):
        sweep.main(arguments)
