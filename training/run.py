"""What a run keeps: its history, its checkpoints, its held-out figures, and the model folder at the end."""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from data import ImageStream
from torch import Tensor
from torch.utils.data import DataLoader

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.distributed import sum_over_processes
from ctrl_csc_hf.metrics import nearest_latent_match, peak_signal_to_noise_ratio
from ctrl_csc_hf.rate_reduction import coding_rate, rate_reduction
from ctrl_csc_hf.visualization import reconstruction_grid, training_curves

GRID_IMAGES = 40
EXAMPLES = 4  # held-out images kept as files, for the widget of a published model


class History:
    """Where a run stands, and what it logged. A checkpoint holds it, with each process's place in its own images."""

    def __init__(self) -> None:
        self.step = 0
        self.place = {"epoch": 0, "batch": 0, "unreadable": 0}  # batches of this epoch, images skipped so far
        self.places = [self.place]  # of all processes, when last gathered
        self.records: list[dict[str, float]] = []

    def record(self, **figures: float) -> None:
        self.records.append({"step": self.step, **figures})

    def gather_places(self) -> None:
        """On all processes at once."""
        self.places = gather_object([dict(self.place)])

    @property
    def unreadable(self) -> int:
        """Images that were skipped, by all processes when last gathered."""
        return sum(place["unreadable"] for place in self.places)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "places": self.places, "records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        processes = PartialState()
        if len(state["places"]) != processes.num_processes:
            raise ValueError(
                f"a run of {len(state['places'])} processes must be resumed by as many, got {processes.num_processes}"
            )
        vars(self).update(state)
        self.place = dict(self.places[processes.process_index])


class CatchInterrupt:
    """Turns the first Ctrl-C into a request, which the run answers between two steps; the second one stops at once."""

    def seen(self) -> bool:
        """Whether any process was asked to stop; on all processes at once."""
        return bool(sum_over_processes(torch.tensor(self.requested, device=PartialState().device, dtype=torch.int32)))

    def __enter__(self) -> Self:
        self.requested = False
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def endless_batches(loader: DataLoader, stream: ImageStream, history: History) -> Iterator[dict[str, Any]]:
    """Batches, epoch after epoch, from where `history` stands."""
    while True:
        stream.set_epoch(history.place["epoch"])
        for batch in itertools.islice(loader, history.place["batch"], None):
            history.place["batch"] += 1
            history.place["unreadable"] += batch["unreadable"]
            yield batch
        history.place |= {"epoch": history.place["epoch"] + 1, "batch": 0}


def save_checkpoint(accelerator: Accelerator, output_dir: Path, history: History, limit: int | None) -> Path:
    """Writes output_dir/checkpoint-STEP under a temporary name first, then removes the oldest beyond `limit`.

    On all processes at once; they share the file system.
    """
    folder = output_dir / f"checkpoint-{history.step}"
    unfinished = output_dir / f".checkpoint-{history.step}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    history.gather_places()
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        for old in checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    return folder


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))


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
    """Figures on held-out images (n, C, H, W), and the reconstructions of the first `GRID_IMAGES`.

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
            reconstructions.append(output.reconstruction)
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
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (output_dir / "training_args.json").write_text(json.dumps(settings, indent=2) + "\n")
    (output_dir / "history.json").write_text(json.dumps(history.records) + "\n")
    training_curves(history.records).savefig(output_dir / "training_curve.png", dpi=120)
