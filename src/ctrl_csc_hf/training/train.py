"""Trains CTRL-CSC by closed-loop transcription: `accelerate launch training/train.py --config cifar10 ...`.

`main` is the algorithm; settings.py holds the settings, data.py the images and stream.py their order, phases.py the
steps, run.py what a run keeps and shows. `--help` lists the settings.
"""

import logging
import os
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from transformers import AutoModel, PreTrainedConfig

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.hub.model_card import EARLIER_RUNS, SETTINGS, training_datasets
from ctrl_csc_hf.hub.publishing import make_repository, publication_terms, publish
from ctrl_csc_hf.hub.records import read_object
from ctrl_csc_hf.latents.encoding import find_columns
from ctrl_csc_hf.objectives.rate_reduction import SMALL_CLASS

from .checkpoints import checkpoint_to_resume, readable, training_runs
from .data import HELD_OUT_SPLITS, ImageSource, TrainingImages, identify, identify_as_trained, load_splits, take_images
from .ema import CALIBRATION_IMAGES
from .phases import Phases
from .run import Run, one_line_errors
from .settings import PRECISIONS, TrainingSettings, parse_settings
from .stream import ImageLoader, ImageStream

logger = logging.getLogger(__name__)


def main(settings: TrainingSettings, config: CtrlCscConfig) -> Path:
    """Trains and returns the folder of the model."""
    accelerator = start_processes(settings)
    output_dir = Path(settings.output_dir)
    checkpoint = checkpoint_to_resume(output_dir, settings.resume_from_checkpoint)
    earlier_runs = runs_before(settings, checkpoint)
    if settings.push_to_hub and accelerator.is_main_process:  # what the Hub refuses is refused before the first step
        datasets = training_datasets(asdict(settings) | {EARLIER_RUNS: earlier_runs})
        license, private = publication_terms(datasets, settings.hub_license, settings.hub_private_repo)
        repository = make_repository(settings.hub_model_id or output_dir.resolve().name, private).repo_id
    output_dir.mkdir(parents=True, exist_ok=True)

    # Players f and g, images x
    set_seed(settings.seed)  # the same weights on all processes
    model = make_model(settings, config, checkpoint)
    set_seed(settings.seed, device_specific=True)
    ranks = accelerator.process_index, accelerator.num_processes
    stream, images = load_data(settings, model.config, earlier_runs, *ranks)
    loader = ImageLoader(
        stream,
        batch_size=settings.train_batch_size,
        num_workers=settings.dataloader_num_workers,
        max_unreadable_share=settings.max_unreadable_share,
    )
    prepare_model(model, settings, accelerator)
    phases = Phases(model, settings, stream.num_classes)
    run = Run(accelerator, settings, phases, loader, images)
    if checkpoint:
        run.load_checkpoint(checkpoint)
        accelerator.print(f"Resumed from {checkpoint}")
    tracked = {name: str(v) if isinstance(v, list) else v for name, v in asdict(settings).items()}
    accelerator.init_trackers("ctrl_csc", config=tracked)

    with run.stop:
        if run.history.step < 0:  # what the players know before the game
            if phases.steps["energy"] and not phases.descents["fit"].done:
                run.make_steps("energy", until=-phases.steps["fit"])
                phases.end("energy", images.calibration, settings.train_batch_size)
            run.make_steps("fit", until=0)
            phases.end("fit", images.calibration, settings.train_batch_size)
            run.save_checkpoint()
        if run.history.step == 0 and settings.max_train_steps and accelerator.is_main_process:
            run.evaluate()
        run.make_steps("game", until=settings.max_train_steps)

    run.gather_places()
    if accelerator.is_main_process:
        run.save_model()
        if run.unreadable:
            print(f"{run.unreadable} unreadable images were skipped")
        print(f"Model, image processor and metrics.json are in {output_dir}")
        if settings.push_to_hub:
            print(f"Published as {publish(output_dir, repository, license=license, private=private)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir


def start_processes(settings: TrainingSettings) -> Accelerator:
    """The accelerator, whose precision the settings get.

    Raises:
        ValueError: if the launcher asked for what this training cannot do.
    """
    output_dir = Path(settings.output_dir)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(str(output_dir), str(output_dir / settings.logging_dir)),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}: on a machine "
            "without an accelerator it needs ACCELERATE_USE_CPU=1"
        )
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(f"mixed_precision must be one of {PRECISIONS}, got {accelerator.mixed_precision!r}")
    settings.mixed_precision = accelerator.mixed_precision
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1, got {accelerator.gradient_accumulation_steps}: neither coding "
            "rates nor batch norms of a batch are means over its parts; take more processes instead"
        )
    return accelerator


def make_model(settings: TrainingSettings, config: CtrlCscConfig, checkpoint: Path | None) -> CtrlCscModel:
    """Of the checkpoint, of the settings' pretrained model, or new; `check_config` says what it raises."""
    if checkpoint:
        with readable(checkpoint / "config.json"):
            read_object(checkpoint / "config.json")["model_type"]
        with readable(checkpoint / "model.safetensors"):
            model, report = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
            if missing := report["missing_keys"]:
                raise LookupError(f"it lacks {sorted(missing)}")
    elif settings.pretrained_model_name_or_path:
        model = AutoModel.from_pretrained(settings.pretrained_model_name_or_path)
    else:
        model = AutoModel.from_config(config)
    check_config(model.config, config, settings)
    return model


def prepare_model(model: CtrlCscModel, settings: TrainingSettings, accelerator: Accelerator) -> None:
    """In training, on its device, and compiled where that is asked for."""
    model.train().to(accelerator.device, memory_format=torch.channels_last)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if settings.torch_compile:
        functorch_config.donated_buffer = False  # a step of the game goes back through its graph twice
        for player in (model.encoder, model.decoder):
            player.compile(fullgraph=True)


def check_config(config: CtrlCscConfig, expected: CtrlCscConfig, settings: TrainingSettings) -> None:
    """Refuses what the preset and the flags say of the model, where a checkpoint says something else.

    Raises:
        ValueError: for a value that differs, for images that are not RGB, and for a model that train.py does not train.
    """
    if not isinstance(config, CtrlCscConfig):
        raise ValueError(
            f"pretrained_model_name_or_path must be a model of train.py, but {settings.pretrained_model_name_or_path} "
            f"is a {config.model_type}"
        )
    if config.num_channels != 3:
        raise ValueError(f"num_channels must be 3, as images are read as RGB, got {config.num_channels}")
    if settings.pretrained_model_name_or_path:  # of which no preset says anything
        if settings.resolution not in (None, config.image_size):
            raise ValueError(
                f"resolution must be {config.image_size} or be left out, as "
                f"{settings.pretrained_model_name_or_path} has it, got {settings.resolution}"
            )
        return
    common = {field.name for field in fields(PreTrainedConfig)}
    for name in (field.name for field in fields(config) if field.name not in common):
        value, wanted = (list(v) if isinstance(v := getattr(c, name), tuple) else v for c in (config, expected))
        if value != wanted and name != "denoising_sparsity":
            raise ValueError(f"{name} must be {value!r}, as the checkpoint has it, got {wanted!r}")


def runs_before(settings: TrainingSettings, checkpoint: Path | None) -> list[dict[str, Any]]:
    """What is known of the runs that made the model which this run began with, the last one first."""
    if checkpoint:
        with readable(checkpoint / SETTINGS):
            return read_object(checkpoint / SETTINGS).get(EARLIER_RUNS, [])
    start = settings.pretrained_model_name_or_path
    return training_runs(start) if start else []


def load_data(
    settings: TrainingSettings, config: CtrlCscConfig, earlier_runs: list[dict[str, Any]], rank: int, world_size: int
) -> tuple[ImageStream, TrainingImages]:
    """The stream of training images, and those that the run keeps.

    The configuration gets the names of the classes, where the data set has them.
    """
    assert settings.streaming is not None
    source = ImageSource(
        dataset_name=settings.dataset_name,
        dataset_config_name=settings.dataset_config_name,
        train_data_dir=settings.train_data_dir,
        split=settings.train_split,
        streaming=settings.streaming,
        image_column=settings.image_column,
        label_column=settings.label_column,
        cache_dir=settings.cache_dir,
    )
    images, held_out_images, split = load_splits(
        source,
        settings.validation_split,
        settings.num_validation_images,
        seed=settings.seed,
        preferred=HELD_OUT_SPLITS,
    )
    image_column, label_column = find_columns(images.features, settings.image_column, settings.label_column)
    if names := getattr(images.features.get(label_column), "names", None):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
    identity = identify(images, held_out_images, image_column, label_column)
    for run in earlier_runs:
        check_held_out_images(run, settings, source, split, identity)
    if settings.objective != "multi":
        label_column = None
    take = partial(take_images, image_column=image_column, image_size=config.image_size, seed=settings.seed)
    held_out, calibration = take(held_out_images, settings.num_validation_images), take(images, CALIBRATION_IMAGES)
    stream = ImageStream(
        images,
        image_column=image_column,
        image_size=config.image_size,
        label_column=label_column,
        augmentation=settings.augmentation,
        shuffle_buffer=settings.shuffle_buffer,
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
    )
    if settings.objective == "multi":
        if stream.num_classes is None:
            raise ValueError(
                f"label_column must name a column of the type ClassLabel for objective='multi', got {label_column!r}"
                + ("" if label_column else ", as the data set has none or several")
            )
        if settings.train_batch_size < SMALL_CLASS * stream.num_classes:
            logger.warning(
                "A batch of %d images has fewer than %d a class: the sum over %d classes swamps the rest of the "
                "objective 'multi'",
                settings.train_batch_size,
                SMALL_CLASS,
                stream.num_classes,
            )
    return stream, TrainingImages(held_out, split, calibration, identity, earlier_runs)


def check_held_out_images(
    trained_with: dict[str, Any],
    settings: TrainingSettings,
    source: ImageSource,
    split: str,
    identity: dict[str, Any],
) -> None:
    """Refuses to go on from a model on the same images with other held-out ones: each run would train on the other's.

    Args:
        trained_with: what train.py wrote about a run of the model.
        source: of the training images.
        split: of the held-out images.
        identity: `identify` of both.

    Raises:
        ValueError: with the settings that hold out the same images.
    """
    known = trained_with.get("images", {})  # which older code has not recorded
    if all(identity.get(kind) == value for kind, value in known.items() if "held-out" in kind):
        return
    earlier = {key: trained_with[key] for key in ("train_split", "streaming", "label_column")}
    earlier_source = replace(
        source, split=earlier["train_split"], streaming=earlier["streaming"], label_column=earlier["label_column"]
    )
    try:
        found, earlier_split = identify_as_trained(earlier_source, trained_with)
    except ValueError:  # this data set has no such split
        return
    if found == known and not split == earlier_split != earlier["train_split"]:  # all of another split are held out
        dividing = (*earlier, "validation_split", "num_validation_images", "seed")
        changed = {key: trained_with[key] for key in dividing if trained_with[key] != getattr(settings, key)}
        raise ValueError(
            f"the held-out images must be those of {settings.pretrained_model_name_or_path}, which was trained on this "
            "data set: its held-out images would be trained on, or images that it was trained on held out; give (None: "
            "leave out) " + ", ".join(f"--{key} {value}" for key, value in changed.items())
        )


def launch(arguments: list[str] | None = None) -> None:
    """The program: reads its flags, and tells an error in one line."""
    with one_line_errors():
        main(*parse_settings(arguments))


if __name__ == "__main__":
    launch()
