"""The benchmark command in its short form, and that the rivals compute what ours does. Times are no one's promise."""

import copy
import importlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel

from ctrl_csc_hf import ConvolutionalSparseCoding, CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters

ROW = {"comparison", "setting", "ours_s", "rival_s", "ratio", "goal", "difference", "figures"}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_step_times_prints_a_row_for_each_net_and_batch(monkeypatch, capsys):
    step_times = importlib.import_module("step_times")
    small = {"stage_channels": [4, 4], "latent_dim": 8}
    monkeypatch.setattr(step_times, "NETS", [("cifar10", small, (4, 6))])
    step_times.main(["--repeats", "1"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1] for row in rows] == ["4", "6"]
    assert all(float(cell.strip(" |")) > 0 for row in rows for cell in row.split(" | ")[2:])


def test_a_timed_step_of_the_fit_lowers_the_error_and_one_of_the_game_moves_the_players():
    step_times = importlib.import_module("step_times")
    from ctrl_csc_hf.training.warmup import deconvolution_error

    torch.manual_seed(0)
    sizes = {"image_size": 16, "kernel_sizes": [4, 4, 4], "strides": [2, 2, 1], "paddings": [1, 1, 0]}
    model = CtrlCscModel(CtrlCscConfig(stage_channels=[4, 4], latent_dim=8, **sizes)).train()
    fit, game = step_times.steps_of(model)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    before = deconvolution_error(model, images).mean()
    for _ in range(30):
        fit(images)
    assert deconvolution_error(model, images).mean() < before
    fitted = [parameter.clone() for parameter in model.parameters()]
    game(images)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), fitted, strict=True))


def test_gpu_script_runs_where_the_libraries_of_training_are_missing_and_goes_on_where_it_was(tmp_path, capsys):
    gpu, packed_images = importlib.import_module("gpu"), importlib.import_module("packed")
    generator = np.random.default_rng(0)
    colors = generator.integers(0, 256, (30, 1, 1, 3), dtype=np.uint8)
    for index, color in enumerate(colors):
        path = tmp_path / "images" / ("test" if index < 10 else "train") / str(index % 2) / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.broadcast_to(color, (16, 16 + 2 * (index == 12), 3))).save(path)
    packed = tmp_path / "packed" / "images.safetensors"
    gpu.main(["pack", "--dataset", str(tmp_path / "images"), "--half", "1", "--output", str(packed)])
    assert "10 images of train, half 1" in capsys.readouterr().out
    held_out = packed_images.read_pixels(packed, "held_out", 16)
    assert sorted(held_out[:, :, 3, 5].tolist()) == sorted(color.ravel().tolist() for color in colors[:10])
    assert packed_images.read_pixels(packed, "train", 8).shape == (10, 3, 8, 8)

    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules |= dict.fromkeys(['accelerate', 'datasets', 'diffusers', 'torchvision'])\n"
    )
    command = [sys.executable, gpu.__file__, "--data", str(packed), "--output", str(tmp_path / "out"), "--short"]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--train_seconds", "2"], env=environment, check=True)
    results = gpu.Results(tmp_path / "out")
    rows = {piece: results.rows(piece) for piece in gpu.PIECES}
    assert not any("error" in figures for piece in rows.values() for figures in piece.values()), rows
    (tests,) = rows["tests"].values()
    assert tests["passed" if gpu.GPU else "skipped"] > 10 and not tests["failures"]
    rival, *ours = rows["steps"].values()
    assert ours and all(row["times two phases (goal 4)"] == rival["game, ms"] / row["game, ms"] for row in ours)
    training = rows["train"]["cifar10"]
    assert training["steps of fit"] >= training["steps of game"] >= training["steps of energy"] >= 1
    assert training["held_out_psnr"] > 0 and training["model, MB"] < 0.02
    model = AutoModel.from_pretrained(tmp_path / "out" / "cifar10")
    assert model.dtype == torch.float32 and model.config.image_size == 16
    assert "| cifar10, batch 8, two phases | " in (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    before = results.file.read_bytes()
    gpu.main([*command[2:], "--train_seconds", "2"])
    assert results.file.read_bytes() == before


def test_gpu_script_refuses_at_once_what_its_last_piece_would(tmp_path, capsys):
    gpu = importlib.import_module("gpu")
    (tmp_path / "text").write_text("no tensors", encoding="utf-8")
    save_file({"train.bytes": torch.zeros(1), "train.sizes": torch.zeros(1)}, tmp_path / "other")
    tensors = {f"{part}.{name}": torch.zeros(1) for part in ("train", "held_out") for name in ("bytes", "sizes")}
    save_file(tensors, tmp_path / "packed")
    for data, flags, message in (
        ("text", [], "--data must be a file that pack wrote, got"),
        ("other", [], "lacks held_out.bytes, held_out.sizes"),
        ("packed", ["--preset", "nothing"], "a preset must be a YAML file or one of"),
        ("packed", ["--feature_model", "a", "b", "--feature_size", "8"], "one number for each --feature_model, got 1"),
    ):
        with pytest.raises(SystemExit):
            gpu.main(["--output", str(tmp_path / "out"), "--data", str(tmp_path / data), *flags])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_packed_images_are_as_the_processor_sees_them_and_what_cannot_be_read_is_named(tmp_path):
    packed = importlib.import_module("packed")
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)).save(tmp_path / "images" / split / "0.png")
        Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "images" / split / "1.png")
    splits = {"train": "train", "held_out": "test"}
    packed.pack(str(tmp_path / "images"), splits, None, tmp_path / "packed")
    for size in (8, 4):
        assert [torch.unique(p).tolist() for p in packed.read_pixels(tmp_path / "packed", "train", size)] == [
            [100],
            [255],
        ]
    broken = tmp_path / "images" / "train" / "2.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"train, {broken} cannot be read, .*: leave it out"):
        packed.pack(str(tmp_path / "images"), splits, None, tmp_path / "packed")


def test_gpu_script_writes_what_failed_and_goes_on(tmp_path, monkeypatch):
    gpu = importlib.import_module("gpu")

    def plan(options):
        return {"fails": fail, "ends": lambda _: os._exit(3), "passes": lambda f: f.update(x=1.0), "hangs": hang}

    def hang(figures):
        time.sleep(60)

    def fail(figures):
        figures["half"] = 0.5
        raise IndexError("half of it\nis there")

    monkeypatch.setattr(gpu, "PIECES", {"tests": (plan, 4)})
    monkeypatch.setattr(gpu, "GPU", False)
    gpu.main(["--output", str(tmp_path), "--pieces", "tests"])
    rows = gpu.Results(tmp_path).rows("tests")
    assert all(row.pop("device").startswith("CPU, torch") for row in (rows["fails"], rows["passes"]))
    assert rows == {
        "fails": {"half": 0.5, "error": "IndexError: half of it"},
        "ends": {"error": "its process ended with 3"},
        "passes": {"x": 1.0},
        "hangs": {"error": "stopped, tests may take 4 s"},
    }


def test_command_prints_a_table_and_writes_every_comparison_with_values_that_agree(tmp_path, capsys):
    bench, comparisons = importlib.import_module("bench"), importlib.import_module("comparisons")
    bench.main(["--short", "--output", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"date", "device", "threads", "versions"} <= set(results["machine"])
    assert {"python", "torch", "diffusers"} <= set(results["machine"]["versions"])
    rows = results["rows"]
    assert all(set(row) == ROW for row in rows)
    assert all(min(row["ours_s"], row["rival_s"], row["ratio"]) > 0 for row in rows)
    assert len({row["comparison"] for row in rows}) == len(comparisons.COMPARISONS)
    by_name = {name: [row for row in rows if row["comparison"] == name] for name in {r["comparison"] for r in rows}}
    assert max(row["difference"] for row in by_name["coding rates"]) <= 1e-4
    assert max(row["difference"] for row in by_name["stage / loop"]) <= 1e-5
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2


def test_unknown_comparison_is_an_error_that_names_the_known(capsys):
    bench = importlib.import_module("bench")
    with pytest.raises(SystemExit):
        bench.main(["--only", "nothing"])
    assert "'rates'" in capsys.readouterr().err


def test_rival_stage_computes_the_energy_of_the_same_codes():
    rivals = importlib.import_module("rivals")
    torch.manual_seed(0)
    stage = ConvolutionalSparseCoding(2, 4, 4, 2, 1, ridge=0.2, num_iterations=8).double()
    signal = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    expected = stage.encode(signal)
    codes, energy = rivals.encode_plainly(stage, signal)
    torch.testing.assert_close(codes, expected)
    torch.testing.assert_close(energy, stage.energy(signal, codes))


def test_rival_step_moves_the_encoder_as_ours_does():
    rivals = importlib.import_module("rivals")
    torch.manual_seed(0)
    shape = {"image_size": 8, "latent_dim": 4, "stage_channels": [4, 5]}
    shape |= {"kernel_sizes": [4, 4, 2], "strides": [2, 2, 1], "paddings": [1, 1, 0], "share_dictionaries": False}
    ours = CtrlCscModel(CtrlCscConfig(**shape)).double().train()
    ours.project_parameters()
    theirs = copy.deepcopy(ours)
    objective = ClosedLoopObjective("binary")
    images = torch.rand(10, 3, 8, 8, dtype=torch.float64) * 2 - 1
    optimizers = [[torch.optim.SGD(part, 0.01) for part in player_parameters(model)] for model in (ours, theirs)]
    ClosedLoop(ours, objective, *optimizers[0]).step(images)
    rivals.two_phase_step(theirs, objective, optimizers[1], images, None)
    for name, parameter in ours.encoder.named_parameters():
        torch.testing.assert_close(theirs.encoder.get_parameter(name), parameter)


def test_memory_table_counts_the_state_and_what_a_step_keeps():
    memory = importlib.import_module("memory")
    fields = {"image_size": 8, "latent_dim": 4, "stage_channels": [4], "kernel_sizes": [4, 4], "strides": [2, 1],
              "paddings": [1, 0], "share_dictionaries": False}  # fmt: skip
    model = CtrlCscModel(CtrlCscConfig(**fields))
    parameters = 2 * (4 * 3 * 16 + 2 * 4 + 4 * 4 * 16) + 2 * 3
    assert memory.state_bytes(model) == 5 * 4 * parameters
    few, many = (memory.activation_bytes(model, images) for images in (4, 64))
    image = 3 * 8 * 8 * 4  # kept as what the first convolution of either encoding takes, at least
    assert many > image and abs(few / many - 1) < 0.5
