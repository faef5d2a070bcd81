"""What a run keeps: its history, its checkpoints, its held-out figures, and the model folder at the end."""

import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from datasets.exceptions import DatasetsError
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, under whichever of its names
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.hub import records
from ctrl_csc_hf.hub.records import read_object
from ctrl_csc_hf.inspection.visualization import reconstruction_grid, training_curves
from ctrl_csc_hf.metrics import peak_signal_to_noise_ratio
from ctrl_csc_hf.models.repository_ctrl_csc import replacing_model
from ctrl_csc_hf.objectives.distributed import sum_over_processes

from .ema import GRID_IMAGES, AverageOfWeights
from .settings import FIXED, WITHOUT_INFLUENCE, TrainingSettings
from .stream import ImageLoader, Place
from .warmup import Descent

logger = logging.getLogger(__name__)

SHOWN = 200  # letters of a value in a message
EXAMPLES = 4  # held-out images kept as files, for the widget of a published model
TENSORS = "training_state.safetensors"  # of a checkpoint, beside the model
NUMBERS = "training_state.json"
SETTINGS = "training_args.json"


class History:
    """Where a run stands, and what it logged. A checkpoint holds it, with each process's place in its own images.

    step: of the game; below 0, the steps that are left before it.
    changes: settings that were changed when the run was resumed: step, setting, before, after.
    """

    def __init__(self, loader: ImageLoader) -> None:
        self.step = 0
        self.loader = loader
        self.places = [loader.place]  # of all processes, when last gathered
        self.records: list[dict[str, float]] = []
        self.changes: list[dict[str, Any]] = []

    def record(self, step: int, **figures: float) -> None:
        self.records.append({"step": step, **figures})

    def gather_places(self) -> None:
        """On all processes at once."""
        self.places = gather_object([self.loader.place])

    @property
    def unreadable(self) -> int:
        """Images that were skipped, by all processes when last gathered."""
        return sum(place.unreadable for place in self.places)

    def state_dict(self) -> dict[str, Any]:
        places = [asdict(place) for place in self.places]
        return {"step": self.step, "places": places, "records": self.records, "changes": self.changes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        processes = PartialState()
        places = [Place(**place) for place in state["places"]]
        if len(places) != processes.num_processes:
            raise ValueError(
                f"a run of {len(places)} processes must be resumed by as many, got {processes.num_processes}"
            )
        self.step, self.places, self.records, self.changes = state["step"], places, state["records"], state["changes"]
        self.loader.place = places[processes.process_index]


@dataclass
class TrainingState:
    """All that a step of the run changes. A checkpoint holds it as safetensors and JSON, the model for AutoModel.

    Schedules are no part of it: they are functions of the step.

    Args:
        settings: of this run.
        model: both players.
        descents: what is learned before the game, by name.
        optimizers: of the game, by player.
        average: of the weights, or None.
        history: where the run stands.
        images: what identifies the training images.
    """

    settings: TrainingSettings
    model: CtrlCscModel
    descents: dict[str, Descent]
    optimizers: dict[str, Optimizer]
    average: AverageOfWeights | None
    history: History
    images: dict[str, Any]

    def save(self, folder: Path) -> None:
        """On all processes at once: the main one writes all but the states of the others' random generators."""
        processes = PartialState()
        save_file(_random_state(), folder / f"random_state_{processes.process_index}.safetensors")
        if not processes.is_main_process:
            return
        self.model.save_pretrained(folder)
        CtrlCscImageProcessor(image_size=self.model.config.image_size).save_pretrained(folder)
        tensors = {
            f"{name}.{parameter}.{moment}": value
            for name, optimizer in self._all_optimizers().items()
            for parameter, moments in optimizer.state_dict()["state"].items()
            for moment, value in moments.items()
        }
        if self.average:
            tensors |= {f"average.{index}": weights for index, weights in enumerate(self.average.weights)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        numbers = {
            "images": self.images,
            "history": self.history.state_dict(),
            "descents": {name: descent.done for name, descent in self.descents.items()},
            "averaged": self.average.steps if self.average else None,
        }
        _write_json(folder / NUMBERS, numbers)
        _write_json(folder / SETTINGS, asdict(self.settings) | {"images": self.images})

    def load(self, folder: Path) -> None:
        """What `save` wrote, but the model, which was built from the folder already; checks settings and images.

        Raises:
            ValueError: for a setting that may not change and for other images, with both values, and for a file
                that cannot be read.
        """
        random_state = folder / f"random_state_{PartialState().process_index}.safetensors"
        with readable(folder / NUMBERS):
            numbers = read_object(folder / NUMBERS)
            step = numbers["history"]["step"]
            descents = {name: numbers["descents"][name] for name in self.descents}
        with readable(folder / SETTINGS):
            changes = self._changes(read_object(folder / SETTINGS), step)
        with readable(folder / NUMBERS):
            for name, value in self.images.items():
                if value != (before := numbers["images"][name]):
                    raise ValueError(
                        f"a run must be resumed on the images that it was started on: their {name} was "
                        f"{shorten(repr(before), SHOWN)}, got {shorten(repr(value), SHOWN)}"
                    )
            if step > self.settings.max_train_steps:
                raise ValueError(
                    f"max_train_steps must be at least {step}, the step of {folder}, got "
                    f"{self.settings.max_train_steps}"
                )
            self.history.load_state_dict(numbers["history"])
            self.history.changes += changes
        with readable(folder / TENSORS):
            tensors = load_file(folder / TENSORS)
            states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self._all_optimizers()}
            for key, tensor in tensors.items():
                name, _, rest = key.partition(".")
                if name in states:
                    parameter, _, moment = rest.partition(".")
                    states[name].setdefault(int(parameter), {})[moment] = tensor
            for name, optimizer in self._all_optimizers().items():
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": states[name], "param_groups": groups})
                for weights, moments in optimizer.state.items():  # one kernel goes over both, in the order of memory
                    for moment, value in moments.items():
                        if value.shape == weights.shape:
                            moments[moment] = torch.empty_like(weights).copy_(value)
            for index, weights in enumerate(self.average.weights if self.average else ()):
                weights.copy_(tensors[f"average.{index}"])
        for name, descent in self.descents.items():
            descent.done = descents[name]
        if self.average:
            self.average.steps = numbers["averaged"]
        with readable(random_state):
            _restore_random_state(load_file(random_state))

    def _all_optimizers(self) -> dict[str, Optimizer]:
        return {name: descent.optimizer for name, descent in self.descents.items()} | self.optimizers

    def _changes(self, earlier: dict[str, Any], step: int) -> list[dict[str, Any]]:
        """Settings that changed; refuses those that may not."""
        fixed, changes = set(FIXED), []
        if step >= 0:
            fixed |= {"energy_warmup_learning_rate", "deconvolution_warmup_learning_rate"}
        if missing := fixed - earlier.keys():
            raise KeyError(*sorted(missing))
        for name, value in asdict(self.settings).items():
            before = earlier.get(name)
            if before == value:
                continue
            if name in fixed:
                raise ValueError(
                    f"{name} must not change when a run is resumed: the checkpoint was made with {before!r}, got "
                    f"{value!r}; give --{name} as before, or start a new run in another output_dir"
                )
            if name not in WITHOUT_INFLUENCE:
                changes.append({"step": step, "setting": name, "before": before, "after": value})
        return changes


class CatchStop:
    """Turns the first Ctrl-C or SIGTERM into a request, which the run answers between two steps.

    A second Ctrl-C stops at once.

    exit_code: what the run is to end with: 0 after SIGTERM, by which schedulers ask for a checkpoint; 130 after Ctrl-C.
    """

    exit_code = 0

    def seen(self) -> bool:
        """Whether any process was asked to stop; on all processes at once, which then wait for each other."""
        if PartialState().num_processes == 1:
            return self.requested
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


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: TrainingState) -> Path:
    """Writes output_dir/checkpoint-STEP, then removes the oldest beyond checkpoints_total_limit. All of it or nothing.

    On all processes at once; they share the file system.

    Raises:
        OSError: if it cannot be written; earlier ones are as they were.
    """
    folder = output_dir / f"checkpoint-{state.history.step}"
    if folder.exists():  # of this very state: the run was resumed from it and has made no step since
        return folder
    unfinished = output_dir / f".{folder.name}.unfinished"
    if accelerator.is_main_process:
        for leftover in output_dir.glob(".checkpoint-*"):  # of a run that was killed
            shutil.rmtree(leftover)
    state.history.gather_places()
    try:
        if accelerator.is_main_process:
            unfinished.mkdir()
        accelerator.wait_for_everyone()
        state.save(unfinished)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_through(unfinished)
    except Exception as error:  # each writer of the state raises its own
        shutil.rmtree(unfinished, ignore_errors=True)  # whose space may be wanted for something else
        raise OSError(f"{folder} cannot be written, earlier checkpoints are as they were: {error}") from error
    if accelerator.is_main_process:
        os.replace(unfinished, folder)
        sync(output_dir)
        limit = state.settings.checkpoints_total_limit
        for old in checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    return folder


def _random_state() -> dict[str, Tensor]:
    """Of torch's generators of the CPU and, where there is one, of the GPU; nothing draws from others."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def readable(path: Path, remedy: str | None = None) -> AbstractContextManager[None]:
    """Raises a ValueError that names the file where its content is not what it should be.

    Args:
        path: by default a file of a checkpoint.
        remedy: what can be done about another one.
    """
    resume_from_before = f"to resume from the checkpoint before, remove the folder {path.parent}"
    return records.readable(path, remedy or resume_from_before)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
    """The checkpoints of a run, oldest first; other folders and files may lie beside them."""
    steps = {}
    for path in output_dir.glob("checkpoint-*"):
        if (step := re.fullmatch(r"checkpoint-(-?\d+)", path.name)) and path.is_dir():
            steps[path] = int(step[1])
    return sorted(steps, key=steps.__getitem__)


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The folder `wanted`, or the newest checkpoint for 'latest'.

    Raises:
        ValueError: if there is none.
    """
    if wanted != "latest":
        if not (Path(wanted) / NUMBERS).is_file():
            raise ValueError(f"resume_from_checkpoint must be a checkpoint folder or 'latest', got {wanted!r}")
        return Path(wanted)
    found = checkpoints(output_dir)
    if not found:
        raise ValueError(f"resume_from_checkpoint='latest', but there is no checkpoint in {output_dir}")
    return found[-1]


def training_settings(model: str) -> dict[str, Any]:
    """What train.py wrote about the model's training; empty where nothing is known."""
    path = Path(model, SETTINGS)
    if not Path(model).exists():
        with suppress(OSError, ValueError):  # there is none
            path = Path(hf_hub_download(model, SETTINGS))
    if not path.exists():
        return {}
    with readable(path, "remove it, and the model is measured without what is known of its training"):
        return read_object(path)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends a program with one line where Ctrl-C stopped it, or where something that it was given is wrong."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of startup.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped", file=sys.stderr)
        sys.exit(130)
    except HTTPError as error:
        if isinstance(error, OSError):  # as what the Hub refuses is
            sys.exit(f"{type(error).__name__}: {error}")
        sys.exit(f"OSError: the Hub at {constants.ENDPOINT} does not answer: {error}")
    except (OSError, ValueError, FloatingPointError, DatasetsError) as error:
        reason = f": {error.__cause__}" if isinstance(error, DatasetsError) and error.__cause__ else ""
        sys.exit(f"{type(error).__name__}: {error}{reason}")


def save_grid(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """Originals above reconstructions, small images enlarged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 64 // originals.shape[-1])
    reconstruction_grid(originals[: len(reconstructions)], reconstructions, scale=scale).save(path)


def sample_path(output_dir: Path, step: int) -> Path:
    """Where a run shows what it makes of held-out images at a step."""
    return output_dir / "samples" / f"step-{step:06d}.png"


@torch.no_grad()
def save_model(
    model: CtrlCscModel, output_dir: Path, state: TrainingState, held_out: Tensor, split: str, mean_image: Tensor
) -> None:
    """The folder that AutoModel and AutoImageProcessor load, with metrics.json, the run's record and pictures.

    Args:
        model: to be saved.
        held_out: images (n, C, H, W) of the data set's `split`.
        mean_image: of training images (C, H, W): a model whose reconstructions are no closer has learned nothing.

    Raises:
        OSError: if it cannot be written; what the folder holds of an earlier model is as it was.
    """
    shown = held_out[:GRID_IMAGES]
    reconstructions = model(shown.to(model.device), return_dict=True).reconstruction.cpu()
    processor = CtrlCscImageProcessor(image_size=model.config.image_size)
    history, settings = state.history, state.settings
    last = next(r for r in reversed(history.records) if "held_out_psnr" in r)
    figures = {name.removeprefix("held_out_"): value for name, value in last.items() if name.startswith("held_out_")}
    figures["mean_image_psnr"] = peak_signal_to_noise_ratio(held_out, mean_image.expand_as(held_out)).mean().item()
    if not figures["psnr"] > figures["mean_image_psnr"]:
        logger.warning(
            "The model has learned nothing: its reconstructions of the held-out images have %.2f dB, the mean image "
            "%.2f dB. Longer training, other learning rates or more images may help.",
            figures["psnr"],
            figures["mean_image_psnr"],
        )
    measured = {"dataset": settings.hub_dataset_id, "split": split, "num_images": len(held_out)}
    metrics = {
        "step": history.step,
        "unreadable_images": history.unreadable,
        "figures": figure_records(figures, **measured, measured_by="training/train.py"),
    }
    record = {"changed_on_resume": history.changes, "images": state.images}
    samples = {sample_path(output_dir, int(record["step"])) for record in history.records}
    with replacing_model(output_dir, model, keep=samples) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        save_grid(folder / "reconstructions.png", shown, reconstructions)
        (folder / "examples").mkdir()
        for index, image in enumerate(processor.postprocess(shown[:EXAMPLES])):
            image.save(folder / "examples" / f"{index}.png")
        _write_json(folder / "metrics.json", metrics)
        _write_json(folder / SETTINGS, asdict(settings) | record)
        (folder / "history.json").write_text(json.dumps(history.records) + "\n", encoding="utf-8")
        training_curves(history.records).savefig(folder / "training_curve.png", dpi=120)


def figure_records(figures: dict[str, float], **measured: Any) -> list[dict[str, Any]]:
    """Figures as metrics.json holds them: each with what it was measured on, and by which feature model."""
    return [{"name": name, "value": value, "feature_model": None, **measured} for name, value in figures.items()]
