"""What a run keeps: its history, its checkpoints, its held-out figures, and the model folder at the end."""

import json
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from stream import ImageLoader, Place
from torch import Tensor

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.distributed import sum_over_processes
from ctrl_csc_hf.metrics import nearest_latent_match, peak_signal_to_noise_ratio
from ctrl_csc_hf.rate_reduction import coding_rate, rate_reduction
from ctrl_csc_hf.visualization import reconstruction_grid, training_curves

GRID_IMAGES = 40
EXAMPLES = 4  # held-out images kept as files, for the widget of a published model


class History:
    """Where a run stands, and what it logged. A checkpoint holds it, with each process's place in its own images.

    step: of the game; below 0, the steps that are left before it.
    """

    def __init__(self, loader: ImageLoader) -> None:
        self.step = 0
        self.loader = loader
        self.places = [loader.place]  # of all processes, when last gathered
        self.records: list[dict[str, float]] = []

    def record(self, **figures: float) -> None:
        self.records.append({"step": self.step, **figures})

    def gather_places(self) -> None:
        """On all processes at once."""
        self.places = gather_object([self.loader.place])

    @property
    def unreadable(self) -> int:
        """Images that were skipped, by all processes when last gathered."""
        return sum(place.unreadable for place in self.places)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "places": [asdict(place) for place in self.places], "records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        processes = PartialState()
        places = [Place(**place) for place in state["places"]]
        if len(places) != processes.num_processes:
            raise ValueError(
                f"a run of {len(places)} processes must be resumed by as many, got {processes.num_processes}"
            )
        place = places[processes.process_index]
        lanes, expected = len(place.lanes), self.loader.stream.num_lanes
        if lanes != expected:
            raise ValueError(f"a run on images in {lanes} lanes must be resumed on the same, got images in {expected}")
        self.step, self.places, self.records = state["step"], places, state["records"]
        self.loader.place = place


class CatchStop:
    """Turns the first Ctrl-C or SIGTERM into a request, which the run answers between two steps.

    A second Ctrl-C stops at once.

    exit_code: what the run is to end with: 0 after SIGTERM, by which schedulers ask for a checkpoint; 130 after Ctrl-C.
    """

    exit_code = 0

    def seen(self) -> bool:
        """Whether any process was asked to stop; on all processes at once."""
        return bool(sum_over_processes(torch.tensor(self.requested, device=PartialState().device, dtype=torch.int32)))

    def __enter__(self) -> Self:
        self.requested = False
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        self.requested = True
        if number == signal.SIGINT:
            self.exit_code = 130
            signal.signal(signal.SIGINT, signal.default_int_handler)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, history: History, limit: int | None) -> Path:
    """Writes output_dir/checkpoint-STEP, then removes the oldest beyond `limit`. It is there as a whole or not at all.

    On all processes at once; they share the file system.

    Raises:
        OSError: if it cannot be written; earlier ones are as they were.
    """
    folder = output_dir / f"checkpoint-{history.step}"
    if folder.exists():  # of this very state: the run was resumed from it and has made no step since
        return folder
    unfinished = output_dir / f".{folder.name}.unfinished"
    if accelerator.is_main_process:
        for leftover in output_dir.glob(".checkpoint-*"):  # of a run that was killed
            shutil.rmtree(leftover)
    history.gather_places()
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_through(unfinished)
    except Exception as error:  # each writer of the state raises its own
        shutil.rmtree(unfinished, ignore_errors=True)  # whose space may be wanted for something else
        raise OSError(f"{folder} cannot be written, earlier checkpoints are as they were: {error}") from error
    if accelerator.is_main_process:
        os.replace(unfinished, folder)
        sync(output_dir)
        for old in checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    return folder


def write_through(folder: Path) -> None:
    """Returns when all of the folder's files are on the disk, and not in its cache alone."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The folder `wanted`, or the newest checkpoint for 'latest'.

    Raises:
        ValueError: if there is none.
    """
    if wanted != "latest":
        if not Path(wanted).is_dir():
            raise ValueError(f"resume_from_checkpoint must be a checkpoint folder or 'latest', got {wanted!r}")
        return Path(wanted)
    found = checkpoints(output_dir)
    if not found:
        raise ValueError(f"resume_from_checkpoint='latest', but there is no checkpoint in {output_dir}")
    return found[-1]


@torch.no_grad()
def held_out_figures(
    model: CtrlCscModel, images: Tensor, batch_size: int, distortion: float
) -> tuple[dict[str, float], Tensor]:
    """Figures on held-out images (n, C, H, W), and the reconstructions of the first `GRID_IMAGES`, on the CPU.

    PSNR in dB, the mean over images; match, the share of reconstructions whose nearest latent is their own
    original's; R(Z), R(Zh) and dR(Z, Zh) in nats.
    """
    was_training = model.training
    model.eval()
    psnr, latents, reconstructed, reconstructions = [], [], [], []
    for batch in images.split(batch_size):
        batch = batch.to(model.device)
        output = model(batch, output_reconstructed_latents=True)
        psnr.append(peak_signal_to_noise_ratio(batch, output.reconstruction))
        latents.append(output.latents)
        reconstructed.append(output.reconstructed_latents)
        if len(reconstructions) * batch_size < GRID_IMAGES:
            reconstructions.append(output.reconstruction.cpu())
    model.train(was_training)
    z, zh = torch.cat(latents), torch.cat(reconstructed)
    figures = {
        "held_out_psnr": torch.cat(psnr).mean().item(),
        "held_out_match": nearest_latent_match(z, zh),
        "held_out_rate": coding_rate(z, distortion=distortion).item(),
        "held_out_reconstructed_rate": coding_rate(zh, distortion=distortion).item(),
        "held_out_rate_reduction": rate_reduction(z, zh, distortion=distortion).item(),
    }
    return figures, torch.cat(reconstructions)[:GRID_IMAGES]


def save_grid(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """Originals above reconstructions, small images enlarged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 64 // originals.shape[-1])
    reconstruction_grid(originals[: len(reconstructions)], reconstructions, scale=scale).save(path)


@torch.no_grad()
def save_model(
    model: CtrlCscModel, output_dir: Path, history: History, settings: dict[str, Any], held_out: Tensor
) -> None:
    """The folder that AutoModel and AutoImageProcessor load, with metrics.json, the run's record and pictures."""
    model.save_pretrained(output_dir)
    shown = held_out[:GRID_IMAGES]
    save_grid(output_dir / "reconstructions.png", shown, model(shown.to(model.device)).reconstruction.cpu())
    processor = CtrlCscImageProcessor(image_size=model.config.image_size)
    (output_dir / "examples").mkdir(exist_ok=True)
    for index, image in enumerate(processor.postprocess(shown[:EXAMPLES])):
        image.save(output_dir / "examples" / f"{index}.png")
    processor.save_pretrained(output_dir)
    figures = next((r for r in reversed(history.records) if "held_out_psnr" in r), {})
    metrics = {**figures, "unreadable_images": history.unreadable}
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (output_dir / "training_args.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (output_dir / "history.json").write_text(json.dumps(history.records) + "\n", encoding="utf-8")
    training_curves(history.records).savefig(output_dir / "training_curve.png", dpi=120)
