"""The folders of a run's checkpoints: written as a whole or not at all, found again, and read."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from ctrl_csc_hf.hub import records
from ctrl_csc_hf.hub.model_card import EARLIER_RUNS, SETTINGS

TENSORS = "training_state.safetensors"  # of a checkpoint, beside the model
NUMBERS = "training_state.json"
# Settings that decide which images a run holds out
DIVIDING = ("train_split", "streaming", "label_column", "validation_split", "num_validation_images", "seed")


def write_checkpoint(
    accelerator: Accelerator, folder: Path, write: Callable[[Path], None], total_limit: int | None
) -> None:
    """Writes a checkpoint, then removes the oldest ones beside it beyond `total_limit`. All of it or nothing.

    On all processes at once; they share the file system.

    Args:
        write: puts the files into a folder, which then takes the place of `folder`.

    Raises:
        OSError: if it cannot be written; earlier ones are as they were.
    """
    unfinished = folder.parent / f".{folder.name}.unfinished"
    if accelerator.is_main_process:
        for leftover in folder.parent.glob(".checkpoint-*"):  # of a run that was killed
            shutil.rmtree(leftover)
    try:
        if accelerator.is_main_process:
            unfinished.mkdir()
        accelerator.wait_for_everyone()
        write(unfinished)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for path in (*unfinished.rglob("*"), unfinished):
                sync(path)
    except Exception as error:  # each writer of the state raises its own
        shutil.rmtree(unfinished, ignore_errors=True)  # whose space may be wanted for something else
        raise OSError(f"{folder} cannot be written, earlier checkpoints are as they were: {error}") from error
    if accelerator.is_main_process:
        os.replace(unfinished, folder)
        sync(folder.parent)
        for old in checkpoints(folder.parent)[: -total_limit if total_limit else 0]:
            shutil.rmtree(old)


def sync(path: Path) -> None:
    """Returns when the file or folder is on the disk, and not in its cache alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; other folders and files may lie beside them."""
    steps = {}
    for path in output_dir.glob("checkpoint-*"):
        if (step := re.fullmatch(r"checkpoint-(-?\d+)", path.name)) and path.is_dir():
            steps[path] = int(step[1])
    return sorted(steps, key=steps.__getitem__)


def checkpoint_to_resume(output_dir: Path, wanted: str | None) -> Path | None:
    """The folder `wanted`, or the newest checkpoint for 'latest'; None for a new run.

    Raises:
        ValueError: if there is none, or a later one that would be written over.
    """
    earlier = checkpoints(output_dir)
    checkpoint = Path(wanted) if wanted else None
    if wanted == "latest":
        if not earlier:
            raise ValueError(f"resume_from_checkpoint='latest', but there is no checkpoint in {output_dir}")
        checkpoint = earlier[-1]
    elif checkpoint and not (checkpoint / NUMBERS).is_file():
        raise ValueError(f"resume_from_checkpoint must be a checkpoint folder or 'latest', got {wanted!r}")
    if earlier and (checkpoint is None or checkpoint.resolve() != earlier[-1].resolve()):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds {earlier[-1].name} of an earlier run: resume_from_checkpoint must "
            f"be it, or 'latest', or output_dir another folder; got {wanted!r}"
        )
    return checkpoint


def readable(path: Path) -> AbstractContextManager[None]:
    """Raises a ValueError that names a file of a checkpoint whose content is not what it should be."""
    return records.readable(path, f"to resume from the checkpoint before, remove the folder {path.parent}")


def training_runs(model: str) -> list[dict[str, Any]]:
    """What train.py wrote about the runs that made a model, the last one first; none where it wrote nothing.

    Raises:
        OSError: if the Hub, which the model is from, is not reached.
        ValueError: for a file that cannot be read.
    """
    path = Path(model, SETTINGS)
    if not Path(model).exists():
        try:
            path = Path(hf_hub_download(model, SETTINGS))
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"the Hub is not reached, so it is unknown which images {model} was trained on: give the folder that "
                f"`hf download {model}` prints, which needs the Hub once"
            ) from error
        except EntryNotFoundError:
            return []
        except HFValidationError as error:
            raise ValueError(
                f"a model must be a folder or a Hub repository, got {model!r}, which is neither"
            ) from error
    if not path.exists():
        return []
    with records.readable(path, "remove it, and the model is measured without what is known of its training"):
        last = records.read_object(path)
        runs = [last, *last.pop(EARLIER_RUNS, [])]
        for settings in runs:
            if not isinstance(images := settings.get("images", {}), dict):
                raise TypeError(f"images must be an object, but is {images!r}")
            if images and (missing := set(DIVIDING) - settings.keys()):
                raise LookupError(f"it lacks {sorted(missing)}")
        return runs


def random_state() -> dict[str, Tensor]:
    """Of torch's generators of the CPU and, where there is one, of the GPU; nothing draws from others."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
