"""On a GPU the loop, its gradients and the pipeline give what they give on a CPU; training and evaluation run through.

CI has no GPU: these tests wait for a machine that has one. There, tests that need accelerate, datasets or diffusers are
skipped where these are missing.
"""

import copy
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_image
from safetensors.torch import load_file
from torch import Tensor

from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Train = Callable[..., Path]
CONFIG = {"image_size": 16, "latent_dim": 8, "stage_channels": [8, 8]}


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # by which they are of 10 bits otherwise


def on_both(**config: Any) -> tuple[CtrlCscModel, CtrlCscModel]:
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(**CONFIG | config)).train()
    with torch.no_grad():
        model(torch.rand(40, 3, 16, 16) * 2 - 1)  # running statistics
    on_gpu = CtrlCscModel(CtrlCscConfig(**CONFIG | config))
    on_gpu.load_state_dict(model.state_dict())
    return model, on_gpu.train().cuda()


def assert_same(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        *(torch.as_tensor(value).cpu() for value in (got, expected)), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("objective", ["binary", "multi", "unsupervised"])
def test_the_loop_has_the_same_figures_and_gradients(objective: str) -> None:
    images, labels = torch.rand(24, 3, 16, 16) * 2 - 1, torch.arange(24) % 3
    found: list[list[Tensor]] = []
    for model in on_both():
        device = model.device
        optimizers = [torch.optim.SGD(part, 0.1) for part in player_parameters(model)]
        terms = ClosedLoopObjective(objective, num_classes=3, energy=1.0)
        loop = ClosedLoop(model, terms, *optimizers)
        figures = loop.backward(images.to(device), labels.to(device))
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append([*vars(figures).values(), gradients / gradients.norm()])
        loop.step(images.to(device), labels.to(device))
    for got, expected in zip(found[1], found[0], strict=True):
        assert_same(got, expected, 1e-3)


def phases_of(model: CtrlCscModel, *graphs: str) -> Any:
    """The steps that benchmarks/gpu.py trains by: ten of each phase, whose learning rates fall."""
    from ctrl_csc_hf.training.phases import Phases
    from ctrl_csc_hf.training.settings import TrainingSettings

    settings = TrainingSettings(
        dataset_name="none",
        decoder_consistency=20.0,
        encoder_learning_rate=1e-3,
        decoder_learning_rate=1e-3,
        ema_decay=0.9,
        mixed_precision="bf16",
    )
    return Phases(model, settings, graphs=graphs, steps=dict.fromkeys(("energy", "fit", "game"), 10))


@pytest.mark.parametrize("phase", ["energy", "fit", "game"])
def test_ten_replayed_steps_give_the_weights_of_ten_eager_ones(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # Adam makes steps of the least gradients
    _, eager = on_both(share_dictionaries=True)
    begun, replayed = copy.deepcopy(eager), copy.deepcopy(eager)
    steps = [phases_of(eager), phases_of(replayed, phase)]
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(10):
        images = torch.rand(24, 3, 16, 16, generator=generator, device="cuda") * 2 - 1
        expected, got = ({name: value.item() for name, value in made(phase, images).items()} for made in steps)
        assert got == pytest.approx(expected, rel=0.02, abs=0.02)
    for name, value in eager.state_dict().items():
        moved = (value - begun.state_dict()[name]).norm()
        assert (replayed.state_dict()[name] - value).norm() <= 0.05 * moved, name
    assert not torch.equal(eager.encoder.stages[0].dictionary, begun.encoder.stages[0].dictionary)
    average, of_eager = (torch.cat([w.flatten() for w in made.average.weights]) for made in reversed(steps))
    initial = torch.cat([parameter.flatten() for parameter in begun.parameters()])
    assert (average - of_eager).norm() <= 0.05 * (of_eager - initial).norm()
    assert phase != "game" or not torch.equal(of_eager, initial)


@pytest.mark.parametrize("phase", ["energy", "fit", "game"])
def test_a_step_makes_the_cpu_wait_for_nothing(phase: str) -> None:
    _, model = on_both()
    steps = phases_of(model)
    images = torch.rand(24, 3, 16, 16, device="cuda") * 2 - 1
    steps(phase, images)  # makes the states of the optimisers
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(phase, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_goes_on_where_it_was(train: Train, precision: str) -> None:
    flags = ["--mixed_precision", precision, "--energy_warmup_steps", "2", "--deconvolution_warmup_steps", "2"]
    flags += ["--max_train_steps", "8", "--ema_decay", "0"]  # whose average is the model itself
    whole = train(*flags, "--checkpoints_total_limit", "9", output="whole")
    resumed = train(*flags, "--resume_from_checkpoint", str(whole / "checkpoint-4"), output="resumed")
    folders = (whole / "checkpoint-4", whole, resumed)
    at_checkpoint, first, second = (load_file(folder / "model.safetensors") for folder in folders)
    # cuDNN adds gradients up in any order, and bfloat16 hears it.
    for name in ("encoder.stages.0.dictionary", "encoder.last_stage.dictionary", "encoder.stages.1.dictionary"):
        moved = (first[name] - at_checkpoint[name]).norm()
        assert (second[name] - first[name]).norm() < 0.2 * moved


def test_both_halves_compile_into_one_graph_each_and_give_the_same() -> None:
    _, model = on_both()
    model.eval()
    images = (torch.rand(6, 3, 16, 16) * 2 - 1).cuda()
    expected = model(images).reconstruction
    model.encoder.compile(fullgraph=True)
    model.decoder.compile(fullgraph=True)
    assert_same(model(images).reconstruction, expected)


def test_a_compiled_run_comes_to_its_end(train: Train) -> None:
    phases = ("--energy_warmup_steps", "2", "--deconvolution_warmup_steps", "2", "--decoder_consistency", "20")
    folder = train("--torch_compile", "--mixed_precision", "bf16", *phases, "--train_batch_size", "4")
    assert (folder / "metrics.json").exists()


def test_evaluation_runs_to_its_end(train: Train, image_folder: Path, tmp_path: Path) -> None:
    for needed in ("datasets", "diffusers", "sklearn"):
        pytest.importorskip(needed)
    from test_evaluate import autoencoder_of_diffusers, classifier

    model = train("--objective", "multi")
    squared_error = train("--deconvolution_warmup_steps", "2", "--max_train_steps", "0", output="squared_error")
    evaluate = importlib.import_module("ctrl_csc_hf.training.evaluate")
    kl = autoencoder_of_diffusers(tmp_path / "kl")
    results = evaluate.main(
        evaluate.EvaluationSettings(
            model=str(model),
            rivals=[f"squared error={squared_error}"],
            diffusers_autoencoders=[f"kl={kl}"],
            feature_model=[classifier(tmp_path / "resnet")],
            feature_size=[32],
            train_data_dir=str(image_folder),
            split="train",
            num_images=40,
            num_frechet_images=30,
            num_probe_images=60,
            unseen_dataset_name=str(shutil.copytree(image_folder, tmp_path / "unseen")),
            unseen_split="train",
            num_unseen_images=20,
            output_dir=str(model),
        )
    )
    assert list(results) == ["CTRL-CSC", "squared error", "kl", "PCA, 8 numbers", "mean image"]
    assert all(0 < figures["psnr"] < 60 for figures in results.values())
    assert (model / "correlations.png").exists()


def test_the_pipeline_gives_the_same() -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("diffusers")
    from ctrl_csc_hf import CtrlCscPipeline
    from ctrl_csc_hf.latents.encoding import encode_dataset
    from ctrl_csc_hf.latents.fitting import fit_sampler

    images = [random_image(index, (16, 16)) for index in range(6)]
    processor = CtrlCscImageProcessor(image_size=16)
    dataset = datasets.Dataset.from_dict({"image": images, "label": [0, 0, 0, 1, 1, 1]})
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:9] = True
    found = []
    for model in on_both():
        batches = list(encode_dataset(dataset, model.eval(), processor, label_column="label"))
        pipe = CtrlCscPipeline(model, processor, fit_sampler(batches))
        pipe.set_progress_bar_config(disable=True)
        output = pipe(images, output_type="pt", return_latents=True, return_codes=True)
        found.append(
            [
                output.images, output.latents, *output.codes, pipe.decode(output.latents, "pt"),
                pipe.denoise(images, 0.2, output_type="pt"),
                pipe.inpaint(images, mask, output_type="pt"),
                pipe.inpaint(images, mask, keep_known=True, output_type="pt"),
                pipe.interpolate(images[0], images[1], 4, "pt"),
                pipe.sample(3, label=1, generator=torch.Generator().manual_seed(0), output_type="pt"),
                pipe.calibrate_denoising(images, [0.1, 0.3]),
            ]
        )  # fmt: skip
    for got, expected in zip(found[1], found[0], strict=True):
        assert_same(got, expected, 1e-3)
