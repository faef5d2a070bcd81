"""Trains CTRL-CSC by closed-loop transcription: `accelerate launch training/train.py --config cifar10 ...`.

This file is the algorithm; settings.py holds the settings, data.py the images and stream.py their order, ema.py the
average of the weights, run.py what a run keeps. `--help` lists the settings.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from huggingface_hub import HfApi
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedConfig, get_scheduler

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.hub.publishing import publication_terms, publish
from ctrl_csc_hf.latents.encoding import find_columns
from ctrl_csc_hf.objectives.closed_loop import PLAYERS, player_parameters
from ctrl_csc_hf.objectives.rate_reduction import SMALL_CLASS

from .collapse import COLLAPSED, CollapseWatch, largest_rate
from .data import (
    HELD_OUT_SPLITS,
    ImageSource,
    identify,
    identify_as_trained,
    load_splits,
    take_images,
    to_pixel_values,
)
from .ema import CALIBRATION_IMAGES, AverageOfWeights, evaluated_model, held_out_figures, recompute_statistics
from .run import (
    CatchStop,
    History,
    TrainingState,
    checkpoints,
    find_checkpoint,
    one_line_errors,
    readable,
    sample_path,
    save_checkpoint,
    save_grid,
    save_model,
    training_settings,
)
from .settings import LOOPS, PRECISIONS, TrainingSettings, parse_settings
from .steps import REFINED_STEPS, StepFigures, make_adam, set_learning_rate
from .stream import ImageLoader, ImageStream
from .warmup import (
    Descent,
    deconvolution_error,
    hold_stages,
    invert_encoder,
    principal_directions,
    sparse_coding_energy,
)

logger = logging.getLogger(__name__)

# What the progress bar tells of a step
SHOWN = {
    "loss": "loss", "rate_reduction": "dR", "code_reduction": "dR(C)", "rate": "R(Z)", "reconstructed_rate": "R(Zh)",
    "psnr": "PSNR (dB)",
}  # fmt: skip


def main(settings: TrainingSettings, config: CtrlCscConfig) -> Path:
    """Trains and returns the folder of the model."""
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
    settings.mixed_precision = accelerator.mixed_precision  # for the record, where the launcher has said it
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1, got {accelerator.gradient_accumulation_steps}: neither coding "
            "rates nor batch norms of a batch are means over its parts; take more processes instead"
        )
    if settings.push_to_hub and accelerator.is_main_process:  # what the Hub refuses is refused before the first step
        license, private = publication_terms(settings.hub_dataset_id, settings.hub_license, settings.hub_private_repo)
        repository = settings.hub_model_id or output_dir.resolve().name
        repository = HfApi().create_repo(repository, private=private, exist_ok=True).repo_id
    checkpoint = None
    if settings.resume_from_checkpoint:
        checkpoint = find_checkpoint(output_dir, settings.resume_from_checkpoint)
    earlier = checkpoints(output_dir)
    if earlier and (checkpoint is None or checkpoint.resolve() != earlier[-1].resolve()):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds {earlier[-1].name} of an earlier run: resume_from_checkpoint must "
            f"be it, or 'latest', or output_dir another folder; got {settings.resume_from_checkpoint!r}"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(settings.seed)  # the same weights on all processes

    # Players f and g
    if checkpoint:
        with readable(checkpoint / "model.safetensors"):
            model = AutoModel.from_pretrained(checkpoint)
    elif settings.pretrained_model_name_or_path:
        model = AutoModel.from_pretrained(settings.pretrained_model_name_or_path)
    else:
        model = AutoModel.from_config(config)
    check_config(model.config, config, settings)

    # Images x, each process its own
    set_seed(settings.seed, device_specific=True)
    stream, held_out, held_out_split, calibration, identity = load_data(
        settings, model.config, accelerator.process_index, accelerator.num_processes
    )
    loader = ImageLoader(
        stream,
        batch_size=settings.train_batch_size,
        num_workers=settings.dataloader_num_workers,
        max_unreadable_share=settings.max_unreadable_share,
    )

    # What trains them
    model.train().to(accelerator.device, memory_format=torch.channels_last)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if settings.torch_compile:
        functorch_config.donated_buffer = False  # a step of the game goes back through its graph twice
        for player in (model.encoder, model.decoder):
            player.compile(fullgraph=True)
    hold_stages(model, settings.keep_dictionaries)
    energy = Descent(sparse_coding_energy, model, settings.energy_warmup_steps, settings.energy_warmup_learning_rate)
    fit = Descent(
        deconvolution_error, model, settings.deconvolution_warmup_steps, settings.deconvolution_warmup_learning_rate
    )
    rates = (settings.encoder_learning_rate, settings.decoder_learning_rate)
    optimizers = [
        make_adam(parameters, rate, (settings.adam_beta1, settings.adam_beta2))
        for parameters, rate in zip(player_parameters(model), rates, strict=True)
    ]
    schedule = get_scheduler(settings.lr_scheduler, optimizers[0], settings.lr_warmup_steps, settings.max_train_steps)
    parameters = list(model.parameters())
    average = AverageOfWeights(parameters, settings.ema_decay) if settings.use_ema else None
    loop = LOOPS[settings.loop](
        model,
        settings.closed_loop_objective(stream.num_classes),
        *optimizers,
        players=PLAYERS if settings.encoder_learning_rate else PLAYERS[1:],
    )

    # The record
    history = History(loader)
    if not settings.pretrained_model_name_or_path:
        history.step = -energy.steps - fit.steps  # the game begins at 0
    state = TrainingState(
        settings,
        model,
        {"energy": energy, "fit": fit},
        dict(zip(("encoder", "decoder"), optimizers, strict=True)),
        average,
        history,
        identity,
    )
    if checkpoint:
        state.load(checkpoint)
        accelerator.print(f"Resumed from {checkpoint}")
    tracked = {name: str(v) if isinstance(v, list) else v for name, v in asdict(settings).items()}
    accelerator.init_trackers("ctrl_csc", config=tracked)

    figures, collapse = StepFigures(), CollapseWatch(settings.collapse_share, settings.collapse_steps)
    images_a_step = settings.train_batch_size * accelerator.num_processes

    def show(progress: tqdm, *, everything: bool = False) -> None:
        """Records, logs and shows the figures that have arrived."""
        try:
            arrived = figures.read(everything=everything)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}. The run stops; the last checkpoint in {output_dir} is intact."
            ) from error
        images_per_second = images_a_step * (progress.format_dict["rate"] or 0)
        unreadable = loader.place.unreadable  # of this process
        for step, values in arrived:
            progress.set_postfix_str(
                "".join(f"{SHOWN[name]} {value:.4g}, " for name, value in values.items() if name in SHOWN)
                + f"{images_per_second:.0f} images/s"
                + (f", {unreadable} unreadable" if unreadable else "")
            )
            if step % settings.logging_steps == 0:
                history.record(step, **values)
                tracked = values | {"images_per_second": images_per_second, "unreadable": unreadable}
                accelerator.log(tracked, step=step)
            largest = largest_rate(images_a_step, model.config.latent_dim, settings.distortion)
            if "rate" in values and (advice := collapse.notice(values["rate"], largest)):
                if accelerator.is_main_process:
                    logger.warning("step %d: %s", step, advice)
                if settings.stop_on_collapse:
                    stop.requested = True  # on all processes: they share R(Z)
                    stop.exit_code = COLLAPSED

    def evaluate() -> CtrlCscModel:
        evaluated = evaluated_model(model, average, calibration, settings.train_batch_size)
        found, reconstructions = held_out_figures(evaluated, held_out, settings.train_batch_size, settings.distortion)
        history.record(history.step, **found)
        accelerator.log(found, step=history.step)
        save_grid(sample_path(output_dir, history.step), held_out, reconstructions)
        tqdm.write(
            f"step {history.step}: held-out PSNR {found['held_out_psnr']:.2f} dB, "
            f"match {found['held_out_match']:.1%}, R(Z) {found['held_out_rate']:.1f} nats, "
            f"dR {found['held_out_rate_reduction']:.2f} nats"
        )
        return evaluated

    batches = iter(loader)

    def make_steps(name: str, until: int, steps: int, step: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """The steps of a phase that are left, of `steps` in all; ends the run where it is asked to stop."""
        with tqdm(
            total=steps,
            initial=history.step - until + steps,
            desc=name,
            smoothing=0.05,
            disable=not accelerator.is_main_process,
        ) as progress:  # fmt: skip
            while history.step < until:
                is_logged = history.step % settings.logging_steps == 0
                if (is_logged or accelerator.num_processes == 1) and stop.seen():
                    show(progress, everything=True)
                    checkpoint = save_checkpoint(accelerator, output_dir, state)
                    accelerator.end_training()
                    progress.close()
                    accelerator.print(f"Stopped; go on with --resume_from_checkpoint {checkpoint}")
                    sys.exit(stop.exit_code)
                if history.step < until - steps + REFINED_STEPS:
                    model.project_parameters()
                figures.keep(history.step + 1, step(next(batches)))
                history.step += 1
                progress.update()
                is_saved = history.step % settings.checkpointing_steps == 0 and history.step != 0
                is_measured = history.step % settings.validation_steps == 0 and 0 < history.step < until
                if is_saved or is_measured or history.step == until:
                    show(progress, everything=True)
                elif history.step % settings.logging_steps == 0:
                    show(progress)
                if is_measured and accelerator.is_main_process:
                    evaluate()
                if is_saved:
                    save_checkpoint(accelerator, output_dir, state)

    # What the players know before the game
    def descend(descent: Descent) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            descent.advance()
            with accelerator.autocast():
                return descent.step(to_pixel_values(batch["pixels"], accelerator.device))

        return step

    def prepare() -> None:
        if energy.steps and not fit.done:
            hold_stages(model, False)
            make_steps("before the game: sparse-coding energy", -fit.steps, energy.steps, descend(energy))
            hold_stages(model, settings.keep_dictionaries)
            energy.optimizer.state.clear()  # of no use to later checkpoints
            recompute_statistics(model, calibration, settings.train_batch_size)
            principal_directions(model, calibration.to(accelerator.device), settings.train_batch_size)
            invert_encoder(model, calibration.to(accelerator.device))
        if fit.steps:
            make_steps("before the game: deconvolution error", 0, fit.steps, descend(fit))
            fit.optimizer.state.clear()
        recompute_statistics(model, calibration, settings.train_batch_size)
        if average:
            average.advance()
            average.update(parameters)
        save_checkpoint(accelerator, output_dir, state)

    # The game
    def game(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            set_learning_rate(optimizer, rate * schedule.lr_lambdas[0](history.step))
        pixel_values = to_pixel_values(batch["pixels"], accelerator.device)
        with accelerator.autocast():
            played = loop.step(pixel_values, batch.get("labels"))
        if average:
            average.advance()
            average.update(parameters)
        return vars(played)

    with CatchStop() as stop:
        if history.step < 0:
            prepare()
        if history.step == 0 and accelerator.is_main_process:
            evaluate()
        make_steps("training", settings.max_train_steps, settings.max_train_steps, game)

    history.gather_places()
    if accelerator.is_main_process:
        save_model(evaluate(), output_dir, state, held_out, held_out_split, calibration.mean(dim=0))
        if history.unreadable:
            print(f"{history.unreadable} unreadable images were skipped")
        print(f"Model, image processor and metrics.json are in {output_dir}")
        if settings.push_to_hub:
            print(f"Published as {publish(output_dir, repository, license=license, private=private)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir


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


def load_data(
    settings: TrainingSettings, config: CtrlCscConfig, rank: int, world_size: int
) -> tuple[ImageStream, torch.Tensor, str, torch.Tensor, dict[str, Any]]:
    """The stream of training images, held-out images and their split, images to calibrate batch norms on, `identify`.

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
    if settings.pretrained_model_name_or_path:
        check_held_out_images(settings.pretrained_model_name_or_path, settings, source, split, identity)
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
            raise ValueError(f"label_column must be of the type ClassLabel for objective='multi', got {label_column!r}")
        if settings.train_batch_size < SMALL_CLASS * stream.num_classes:
            logger.warning(
                "A batch of %d images has fewer than %d a class: the sum over %d classes swamps the rest of the "
                "objective 'multi'",
                settings.train_batch_size,
                SMALL_CLASS,
                stream.num_classes,
            )
    return stream, held_out, split, calibration, identity


def check_held_out_images(
    name: str, settings: TrainingSettings, source: ImageSource, split: str, identity: dict[str, Any]
) -> None:
    """Refuses to go on from a model on the same images with other held-out ones: each run would train on the other's.

    Args:
        name: of the model.
        source: of the training images.
        split: of the held-out images.
        identity: `identify` of both.

    Raises:
        ValueError: with the settings that hold out the same images.
    """
    trained_with = training_settings(name)
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
            f"the held-out images must be those of {name}, which was trained on this data set: its held-out images "
            "would be trained on, or images that it was trained on held out; give (None: leave out) "
            + ", ".join(f"--{key} {value}" for key, value in changed.items())
        )


def launch(arguments: list[str] | None = None) -> None:
    """The program: reads its flags, and tells an error in one line."""
    with one_line_errors():
        main(*parse_settings(arguments))


if __name__ == "__main__":
    launch()
