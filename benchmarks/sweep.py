"""The ablation of docs/recipe.md: one factor at a time from cifar10_sweep.yaml, each on as many images.

    python benchmarks/sweep.py --dataset_name uoft-cs/cifar10 --image_column img --feature_model CLASSIFIER \
        --rows base "FISTA steps 8" --seeds 0 1 --output_dir sweep

Without --rows it runs all. Each row and seed is a run of train.py in a folder of its own, and a line of
OUTPUT_DIR/results.jsonl; those that are there already are not run again. Prints the table at the end, and draws the
games of the rows and seeds asked for into OUTPUT_DIR/curves.png.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import baselines  # registers its models for AutoModel
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor

from ctrl_csc_hf.hub.records import readable
from ctrl_csc_hf.latents.encoding import find_columns
from ctrl_csc_hf.metrics import (
    ClosedLoopConsistency,
    FrechetDistance,
    LatentProbe,
    PeakSignalToNoiseRatio,
    VisionFeatures,
)
from ctrl_csc_hf.training.autoencoders import load_model
from ctrl_csc_hf.training.data import ImageSource, load_images, take_examples
from ctrl_csc_hf.training.presets import load_preset
from ctrl_csc_hf.training.run import one_line_errors

BASE = str(Path(__file__).with_name("cifar10_sweep.yaml"))
TRAIN = str(Path(__file__).parents[1] / "training" / "train.py")
BATCH_SIZE = 250
# What each row changes, in the sections of a preset.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "base": {},
    "three stages": {
        "model": {
            "stage_channels": [32, 64, 128],
            "kernel_sizes": [4, 4, 4, 4],
            "strides": [2, 2, 2, 1],
            "paddings": [1, 1, 1, 0],
        }
    },
    "dictionaries shared": {"model": {"share_dictionaries": True}},
    "FISTA steps 1": {"model": {"num_iterations": 1}},
    "FISTA steps 2": {"model": {"num_iterations": 2}},
    "FISTA steps 8": {"model": {"num_iterations": 8}},
    "lambda 0.005": {"model": {"sparsity": 0.005}},
    "lambda 0.1": {"model": {"sparsity": 0.1}},
    "encoder 1.5e-5": {"training": {"encoder_learning_rate": 1.5e-5}},
    "encoder 1.5e-4": {"training": {"encoder_learning_rate": 1.5e-4}},
    "decoder 1.5e-4": {"training": {"decoder_learning_rate": 1.5e-4}},
    "decoder 2e-3": {"training": {"decoder_learning_rate": 2e-3}},
    "betas 0.9, 0.999": {"training": {"adam_beta1": 0.9}},
    "w_g 0": {"training": {"decoder_consistency": 0.0}},
    "w_g 100": {"training": {"decoder_consistency": 100.0}},
    "w_E 10": {"training": {"energy": 10.0}},
    "no energy before": {"training": {"energy_warmup_steps": 0}},
    "no deconvolution before": {"training": {"deconvolution_warmup_steps": 0}},
    "nothing before": {"training": {"energy_warmup_steps": 0, "deconvolution_warmup_steps": 0}},
    "nothing before, w_E 10": {
        "training": {"energy_warmup_steps": 0, "deconvolution_warmup_steps": 0, "energy": 10.0},
    },
    "multi": {"training": {"objective": "multi"}},
    "unsupervised": {"training": {"objective": "unsupervised"}},
    "distortion 0.05": {"training": {"distortion": 0.05}},
    "batch 64": {"training": {"train_batch_size": 64}},
    "batch 512": {"training": {"train_batch_size": 512}},
    "batch 2048": {"training": {"train_batch_size": 2048}},
    "no EMA": {"training": {"use_ema": False}},
    "ordinary convolutions": {"training": {"energy_warmup_steps": 0}},
    "ordinary convolutions, nothing before": {
        "training": {"energy_warmup_steps": 0, "deconvolution_warmup_steps": 0},
    },
    "the fit alone": {"training": {"deconvolution_warmup_steps": 500, "max_train_steps": 0}},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs rows of the ablation and prints their table.")
    parser.add_argument("--dataset_name", required=True, help="As train.py's.")
    parser.add_argument("--feature_model", required=True, help="A vision model, for the Fréchet distance.")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"{list(ROWS)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="A run for each of them.")
    parser.add_argument("--num_train_images", type=int, default=25_600, help="Images of the game, whatever the batch.")
    parser.add_argument("--num_images", type=int, default=5000, help="Number of test images to measure on.")
    parser.add_argument(
        "--num_probe_images", type=int, default=5000, help="Number of training images of the linear probe."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("sweep"), help="Where everything is written.")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    record = arguments.output_dir / "results.jsonl"
    results, done = [], set()
    if record.exists():
        with readable(record, "remove the line, and its row is run again"):
            results = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
            done = {(result["row"], result["seed"]) for result in results}
    for seed in arguments.seeds:
        for row in arguments.rows:
            if (row, seed) not in done:
                results.append(run(row, seed, arguments))
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    print_table(results)
    asked = [result for result in results if result["row"] in arguments.rows and result["seed"] in arguments.seeds]
    draw(asked, arguments.output_dir).savefig(arguments.output_dir / "curves.png", dpi=120)


def preset_of(row: str, num_train_images: int) -> dict[str, dict[str, Any]]:
    """The preset of a row, each of whose phases sees as many images as the base's, whatever the batch."""
    preset, base_batch = load_preset(BASE), load_preset(BASE)["training"]["train_batch_size"]
    for section, changes in ROWS[row].items():
        preset[section] |= changes
    training = preset["training"]
    batch = training["train_batch_size"]
    for warmup in ("energy_warmup_steps", "deconvolution_warmup_steps"):
        training[warmup] = round(training.get(warmup, 0) * base_batch / batch)
    if training["max_train_steps"]:
        training["max_train_steps"] = num_train_images // batch
    return preset


def run(row: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains a row and measures it."""
    preset = preset_of(row, arguments.num_train_images)
    folder = folder_of(row, seed, arguments.output_dir)
    config = arguments.output_dir / f"{folder.name}.yaml"
    config.write_text(yaml.safe_dump(preset), encoding="utf-8")
    start = time.perf_counter()
    subprocess.run(
        [
            sys.executable, baselines.__file__ if row.startswith("ordinary convolutions") else TRAIN,
            "--config", str(config), "--output_dir", str(folder), "--seed", str(seed), "--report_to", "none",
            "--dataset_name", arguments.dataset_name,
        ],
        check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {"row": row, "seed": seed, **measure(folder, arguments), "seconds": round(seconds)}


@torch.inference_mode()
def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """PSNR, match, Fréchet distance and probes of the test images; R(Z) and dR of the run's own held-out images."""
    model = load_model(str(folder), "cpu")
    images, labels = examples("test", arguments.num_images, model.config.image_size, arguments)
    fitted_images, fitted_labels = examples("train", arguments.num_probe_images, model.config.image_size, arguments)
    features = VisionFeatures(arguments.feature_model)
    psnr, consistency, distance = PeakSignalToNoiseRatio(), ClosedLoopConsistency(), FrechetDistance()
    probe = LatentProbe(int(fitted_labels.max()) + 1)
    for batch, y in zip(fitted_images.split(BATCH_SIZE), fitted_labels.split(BATCH_SIZE), strict=True):
        probe.fit_update(model.encode(batch).latents, y)
    for batch, y in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
        output = model(batch, output_reconstructed_latents=True, return_dict=True)
        psnr.update(batch, output.reconstruction)
        consistency.update(output.latents, output.reconstructed_latents)
        distance.update(features(batch), features(output.reconstruction))
        probe.update(output.latents, y)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    held_out = {figure["name"]: figure["value"] for figure in metrics["figures"]}
    return {
        **psnr.compute(),
        **consistency.compute(),
        **distance.compute(),
        **probe.compute(),
        "rate": held_out["rate"],
        "rate_reduction": held_out["rate_reduction"],
    }


def examples(split: str, count: int, image_size: int, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """A uniform sample of the images of a split (n, 3, s, s), pixels in [-1, 1], and their labels (n,)."""
    rows = load_images(ImageSource(dataset_name=arguments.dataset_name, split=split, streaming=True))
    image_column, label_column = find_columns(rows.features)
    return take_examples(rows, count, image_column=image_column, image_size=image_size, label_column=label_column)


def folder_of(row: str, seed: int, output_dir: Path) -> Path:
    return output_dir / f"{row.replace(' ', '_')}-{seed}"


def print_table(results: list[dict[str, Any]]) -> None:
    columns = ("change", "seed", "PSNR, dB", "match", "Fréchet", "R(Z), nats", "dR(Z, Zh), nats", "probe", "minutes")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for result in results:
        print(
            f"| {result['row']} | {result['seed']} | {result['psnr']:.2f} | {result['match']:.1%} "
            f"| {result['frechet_distance']:.2f} | {result['rate']:.1f} | {result['rate_reduction']:.2f} "
            f"| {result['linear_probe']:.1%} | {result['seconds'] / 60:.1f} |"
        )


def draw(results: list[dict[str, Any]], output_dir: Path) -> Figure:
    """PSNR and R(Z) of training batches against the step of the game; PSNR against Fréchet distance at its end."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for result in results:
        label = result["row"] + (f", seed {result['seed']}" if result["seed"] else "")
        history = folder_of(result["row"], result["seed"], output_dir) / "history.json"
        for axes, key in zip(panels, ("psnr", "rate"), strict=False):
            with readable(history, "remove its row's line of results.jsonl, and the row is run again"):
                records = json.loads(history.read_text(encoding="utf-8"))
                points = [(record["step"], record[key]) for record in records if key in record]
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        panels[2].plot(result["psnr"], result["frechet_distance"], "o", label=label)
    for axes, x, y in zip(
        panels,
        ("step", "step", "PSNR of test images, dB"),
        ("PSNR of training batches, dB", "R(Z) of training batches, nats", "Fréchet distance"),
        strict=True,
    ):
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    panels[2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


if __name__ == "__main__":
    with one_line_errors():
        main(parse_arguments())
