"""A run: where it stands, its steps with what they show, its checkpoints, its held-out figures, its model folder."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from datasets.exceptions import DatasetsError
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, under whichever of its names
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.hub.model_card import EARLIER_RUNS, SETTINGS
from ctrl_csc_hf.hub.records import read_object
from ctrl_csc_hf.inspection.visualization import reconstruction_grid, training_curves
from ctrl_csc_hf.metrics import peak_signal_to_noise_ratio
from ctrl_csc_hf.models.repository_ctrl_csc import replacing_model
from ctrl_csc_hf.objectives.distributed import sum_over_processes

from .checkpoints import (
    NUMBERS,
    TENSORS,
    random_state,
    readable,
    restore_random_state,
    write_checkpoint,
    write_json,
)
from .collapse import COLLAPSED, CollapseWatch, largest_rate
from .data import TrainingImages, to_pixel_values
from .ema import GRID_IMAGES, evaluated_model, held_out_figures
from .phases import Phases
from .settings import FIXED, WITHOUT_INFLUENCE, TrainingSettings
from .steps import REFINED_STEPS, StepFigures
from .stream import ImageLoader, Place

logger = logging.getLogger(__name__)

SHOWN_LETTERS = 200  # of a value in a message
EXAMPLES = 4  # held-out images kept as files, for the widget of a published model
# What the progress bar tells of a step
SHOWN = {
    "loss": "loss", "rate_reduction": "dR", "code_reduction": "dR(C)", "rate": "R(Z)", "reconstructed_rate": "R(Zh)",
    "psnr": "PSNR (dB)",
}  # fmt: skip
TITLES = {
    "energy": "before the game: sparse-coding energy", "fit": "before the game: deconvolution error",
    "game": "training",
}  # fmt: skip


@dataclass
class History:
    """Where a run stands, and what it logged.

    step: of the game; below 0, the steps that are left before it.
    changes: settings that were changed when the run was resumed: step, setting, before, after.
    """

    step: int
    records: list[dict[str, float]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    def record(self, step: int, **figures: float) -> None:
        self.records.append({"step": step, **figures})


class Run:
    """All that a run has: what its steps change, which its checkpoints hold, and what it shows.

    Args:
        accelerator: of all processes.
        settings: of this run.
        phases: its steps, with the model and all optimisers.
        loader: of this process's batches.
        images: held-out images and those for calibration.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: TrainingSettings,
        phases: Phases,
        loader: ImageLoader,
        images: TrainingImages,
    ) -> None:
        self.accelerator, self.settings, self.phases, self.images = accelerator, settings, phases, images
        self.model: CtrlCscModel = phases.model
        self.output_dir = Path(settings.output_dir)
        self.loader = loader
        self.places = [loader.place]  # of all processes, when last gathered
        self.history = History(-phases.steps["energy"] - phases.steps["fit"])
        self.stop = CatchStop()
        self._figures = StepFigures()
        self._collapse = CollapseWatch(settings.collapse_share, settings.collapse_steps)
        self._images_a_step = settings.train_batch_size * accelerator.num_processes
        self._batches = iter(loader)

    # Steps

    def make_steps(self, name: str, until: int) -> None:
        """The steps of a phase that are left, up to the step `until`; ends the program where it is asked to stop."""
        history, settings = self.history, self.settings
        first = until - self.phases.steps[name]
        self.phases.begin(name)
        with tqdm(
            total=self.phases.steps[name],
            initial=history.step - first,
            desc=TITLES[name],
            smoothing=0.05,
            disable=not self.accelerator.is_main_process,
        ) as progress:
            while history.step < until:
                is_logged = history.step % settings.logging_steps == 0
                if (is_logged or self.accelerator.num_processes == 1) and self.stop.seen():
                    self._show(progress, everything=True)
                    self._end_early(progress)
                if history.step < first + REFINED_STEPS:
                    self.model.project_parameters()
                batch = next(self._batches)
                labels = [batch["labels"]] if name == "game" and "labels" in batch else []
                pixel_values = to_pixel_values(batch["pixels"], self.accelerator.device)
                self._figures.keep(history.step + 1, self.phases(name, pixel_values, *labels))
                history.step += 1
                progress.update()
                is_saved = history.step % settings.checkpointing_steps == 0 and history.step != 0
                is_measured = history.step % settings.validation_steps == 0 and 0 < history.step < until
                if is_saved or is_measured or history.step == until:
                    self._show(progress, everything=True)
                elif history.step % settings.logging_steps == 0:
                    self._show(progress)
                if is_measured and self.accelerator.is_main_process:
                    self.evaluate()
                if is_saved:
                    self.save_checkpoint()

    def _end_early(self, progress: tqdm) -> None:
        checkpoint = self.save_checkpoint()
        self.accelerator.end_training()
        progress.close()
        self.accelerator.print(f"Stopped; go on with --resume_from_checkpoint {checkpoint}")
        sys.exit(self.stop.exit_code)

    def _show(self, progress: tqdm, *, everything: bool = False) -> None:
        """Records, logs and shows the figures that have arrived."""
        try:
            arrived = self._figures.read(everything=everything)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}. The run stops; the last checkpoint in {self.output_dir} is intact."
            ) from error
        images_per_second = self._images_a_step * (progress.format_dict["rate"] or 0)
        unreadable = self.loader.place.unreadable  # of this process
        for step, values in arrived:
            progress.set_postfix_str(
                "".join(f"{SHOWN[name]} {value:.4g}, " for name, value in values.items() if name in SHOWN)
                + f"{images_per_second:.0f} images/s"
                + (f", {unreadable} unreadable" if unreadable else "")
            )
            if step % self.settings.logging_steps == 0:
                self.history.record(step, **values)
                tracked = values | {"images_per_second": images_per_second, "unreadable": unreadable}
                self.accelerator.log(tracked, step=step)
            if "rate" in values:
                self._watch_collapse(step, values["rate"])

    def _watch_collapse(self, step: int, rate: float) -> None:
        largest = largest_rate(self._images_a_step, self.model.config.latent_dim, self.settings.distortion)
        if advice := self._collapse.notice(rate, largest):
            if self.accelerator.is_main_process:
                logger.warning("step %d: %s", step, advice)
            if self.settings.stop_on_collapse:
                self.stop.requested = True  # on all processes: they share R(Z)
                self.stop.exit_code = COLLAPSED

    # Figures

    def evaluate(self) -> CtrlCscModel:
        """Records the held-out figures of the model as it would be saved, and returns that."""
        settings, held_out, step = self.settings, self.images.held_out, self.history.step
        model = evaluated_model(self.model, self.phases.average, self.images.calibration, settings.train_batch_size)
        found, reconstructions = held_out_figures(model, held_out, settings.train_batch_size, settings.distortion)
        self.history.record(step, **found)
        self.accelerator.log(found, step=step)
        save_grid(self._sample_path(step), held_out, reconstructions)
        tqdm.write(
            f"step {step}: held-out PSNR {found['held_out_psnr']:.2f} dB, "
            f"match {found['held_out_match']:.1%}, R(Z) {found['held_out_rate']:.1f} nats, "
            f"dR {found['held_out_rate_reduction']:.2f} nats"
        )
        return model

    def _sample_path(self, step: int) -> Path:
        """Where the run shows what it makes of held-out images at a step."""
        return self.output_dir / "samples" / f"step-{step:06d}.png"

    # Checkpoints

    def save_checkpoint(self) -> Path:
        """output_dir/checkpoint-STEP; on all processes at once. `write_checkpoint` says what it raises."""
        folder = self.output_dir / f"checkpoint-{self.history.step}"
        if not folder.exists():  # or it is of this very state: the run was resumed from it and has made no step since
            self.gather_places()
            write_checkpoint(self.accelerator, folder, self._write_state, self.settings.checkpoints_total_limit)
        return folder

    def gather_places(self) -> None:
        """On all processes at once."""
        self.places = gather_object([self.loader.place])

    @property
    def unreadable(self) -> int:
        """Images that were skipped, by all processes when last gathered."""
        return sum(place.unreadable for place in self.places)

    def _write_state(self, folder: Path) -> None:
        """All that a step changes, as safetensors and JSON, the model for AutoModel. On all processes at once: the main
        one writes all but the states of the others' random generators.

        Learning rates are no part of it: they are functions of the step.
        """
        processes, average = PartialState(), self.phases.average
        save_file(random_state(), folder / f"random_state_{processes.process_index}.safetensors")
        if not processes.is_main_process:
            return
        self.model.save_pretrained(folder)
        CtrlCscImageProcessor(image_size=self.model.config.image_size).save_pretrained(folder)
        tensors = {
            f"{name}.{parameter}.{moment}": value
            for name, optimizer in self._optimizers().items()
            for parameter, moments in optimizer.state_dict()["state"].items()
            for moment, value in moments.items()
        }
        if average:
            tensors |= {f"average.{index}": weights for index, weights in enumerate(average.weights)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        numbers = {
            "images": self.images.identity,
            "history": asdict(self.history) | {"places": [asdict(place) for place in self.places]},
            "descents": {name: descent.done for name, descent in self.phases.descents.items()},
            "averaged": average.steps if average else None,
            "tensors": len(tensors),
        }
        write_json(folder / NUMBERS, numbers)
        write_json(folder / SETTINGS, asdict(self.settings) | self._record_of_images())

    def _record_of_images(self) -> dict[str, Any]:
        """What training_args.json tells of the images beside the settings."""
        earlier = self.images.earlier_runs
        return {"images": self.images.identity} | ({EARLIER_RUNS: earlier} if earlier else {})

    def load_checkpoint(self, folder: Path) -> None:
        """What `save_checkpoint` wrote, but the model, which was built from the folder already.

        Raises:
            ValueError: for a setting that may not change, for other images and another number of processes, with both
                values, and for a file that cannot be read.
        """
        phases, average, rank = self.phases, self.phases.average, PartialState().process_index
        random_file = folder / f"random_state_{rank}.safetensors"
        with readable(folder / NUMBERS):
            numbers = read_object(folder / NUMBERS)
            history = History(**{key: v for key, v in numbers["history"].items() if key != "places"})
            places = [Place(**place) for place in numbers["history"]["places"]]
            done = {name: numbers["descents"][name] for name in phases.descents}
            averaged, count = numbers["averaged"], numbers["tensors"]
        with readable(folder / SETTINGS):
            history.changes += self._changes(read_object(folder / SETTINGS), history.step)
        with readable(folder / NUMBERS):
            for name, value in self.images.identity.items():
                if value != (before := numbers["images"][name]):
                    raise ValueError(
                        f"a run must be resumed on the images that it was started on: their {name} was "
                        f"{shorten(repr(before), SHOWN_LETTERS)}, got {shorten(repr(value), SHOWN_LETTERS)}"
                    )
            if history.step > self.settings.max_train_steps:
                raise ValueError(
                    f"max_train_steps must be at least {history.step}, the step of {folder}, got "
                    f"{self.settings.max_train_steps}"
                )
            if len(places) != (processes := PartialState().num_processes):
                raise ValueError(f"a run of {len(places)} processes must be resumed by as many, got {processes}")
            lanes, expected = len(places[rank].lanes), len(self.loader.place.lanes)
            if lanes != expected:
                raise LookupError(f"a place in {lanes} lanes instead of {expected}")
        with readable(folder / TENSORS):
            tensors = load_file(folder / TENSORS)
            if len(tensors) != count:
                raise LookupError(f"{len(tensors)} of {count} tensors")
            states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self._optimizers()}
            for key, tensor in tensors.items():
                name, _, rest = key.partition(".")
                if name in states:
                    parameter, _, moment = rest.partition(".")
                    states[name].setdefault(int(parameter), {})[moment] = tensor
            for name, optimizer in self._optimizers().items():
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": states[name], "param_groups": groups})
                for weights, moments in optimizer.state.items():  # one kernel goes over both, in the order of memory
                    for moment, value in moments.items():
                        if value.shape == weights.shape:
                            moments[moment] = torch.empty_like(weights).copy_(value)
            for index, weights in enumerate(average.weights if average else ()):
                weights.copy_(tensors[f"average.{index}"])
        self.history, self.places, self.loader.place = history, places, places[rank]
        phases.game_steps = max(0, history.step)
        for name, descent in phases.descents.items():
            descent.done = done[name]
        if average:
            average.steps = averaged
        with readable(random_file):
            restore_random_state(load_file(random_file))

    def _optimizers(self) -> dict[str, Optimizer]:
        return {**{name: d.optimizer for name, d in self.phases.descents.items()}, **self.phases.players}

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

    # The model

    @torch.no_grad()
    def save_model(self) -> None:
        """The folder that AutoModel and AutoImageProcessor load, with metrics.json, the run's record and pictures.

        Raises:
            OSError: if it cannot be written; what the folder holds of an earlier model is as it was.
        """
        model, images, records = self.evaluate(), self.images, self.history.records
        shown = images.held_out[:GRID_IMAGES]
        reconstructions = model(shown.to(model.device), return_dict=True).reconstruction.cpu()
        processor = CtrlCscImageProcessor(image_size=model.config.image_size)
        figures = {k.removeprefix("held_out_"): v for k, v in records[-1].items() if k.startswith("held_out_")}
        # A model whose reconstructions are no closer than the mean of training images has learned nothing.
        mean_image = images.calibration.mean(dim=0).expand_as(images.held_out)
        figures["mean_image_psnr"] = peak_signal_to_noise_ratio(images.held_out, mean_image).mean().item()
        if not figures["psnr"] > figures["mean_image_psnr"]:
            logger.warning(
                "The model has learned nothing: its reconstructions of the held-out images have %.2f dB, the mean "
                "image %.2f dB. Longer training, other learning rates or more images may help.",
                figures["psnr"],
                figures["mean_image_psnr"],
            )
        measured = {
            "dataset": self.settings.hub_dataset_id, "split": images.split, "num_images": len(images.held_out),
        }  # fmt: skip
        metrics = {
            "step": self.history.step,
            "unreadable_images": self.unreadable,
            "figures": figure_records(figures, **measured, measured_by="training/train.py"),
        }
        record = {"changed_on_resume": self.history.changes} | self._record_of_images()
        samples = {self._sample_path(int(record["step"])) for record in records}
        with replacing_model(self.output_dir, model, keep=samples) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            save_grid(folder / "reconstructions.png", shown, reconstructions)
            (folder / "examples").mkdir()
            for index, image in enumerate(processor.postprocess(shown[:EXAMPLES])):
                image.save(folder / "examples" / f"{index}.png")
            write_json(folder / "metrics.json", metrics)
            write_json(folder / SETTINGS, asdict(self.settings) | record)
            (folder / "history.json").write_text(json.dumps(records) + "\n", encoding="utf-8")
            training_curves(records).savefig(folder / "training_curve.png", dpi=120)


class CatchStop:
    """Turns the first Ctrl-C or SIGTERM into a request, which the run answers between two steps.

    A second Ctrl-C stops at once.

    exit_code: what the run is to end with: 0 after SIGTERM, by which schedulers ask for a checkpoint; 130 after Ctrl-C.
    """

    exit_code = 0
    requested = False

    def seen(self) -> bool:
        """Whether any process was asked to stop; on all processes at once, which then wait for each other."""
        if PartialState().num_processes == 1:
            return self.requested
        return bool(sum_over_processes(torch.tensor(self.requested, device=PartialState().device, dtype=torch.int32)))

    def __enter__(self) -> Self:
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


def figure_records(figures: dict[str, float], **measured: Any) -> list[dict[str, Any]]:
    """Figures as metrics.json holds them: each with what it was measured on, and by which feature model."""
    return [{"name": name, "value": value, "feature_model": None, **measured} for name, value in figures.items()]
