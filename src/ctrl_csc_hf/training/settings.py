"""Settings of a training run: one dataclass, filled from a YAML preset and from flags, which override it."""

from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from ctrl_csc_hf import CtrlCscConfig
from ctrl_csc_hf.models.configuration_ctrl_csc import default_stages
from ctrl_csc_hf.objectives.closed_loop import ClosedLoopObjective
from ctrl_csc_hf.training.presets import load_preset

# A loss scaler would have to serve two players with one backward pass; bf16 needs none.
PRECISIONS = ("no", "bf16")
# Of transformers' schedules those that need neither a metric nor arguments of their own, and take any rate; its
# polynomial of degree one is the linear one.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
# What a preset says of its data set: another data set has columns and splits of its own.
OF_THE_DATA_SET = (
    "dataset_name", "dataset_config_name", "train_split", "validation_split", "image_column", "label_column",
    "streaming",
)  # fmt: skip
OF_EACH_STAGE = ("sparsity", "num_iterations")  # where they are lists, further stages take the last one's
STAGES = ("stage_channels", "kernel_sizes", "strides", "paddings")  # of a configuration, chosen by its image size
# Settings that may not change when a run is resumed: the steps before would have been other ones, or the images or
# their order.
FIXED = (
    "dataset_config_name", "deconvolution_warmup_steps", "energy_warmup_steps", "keep_dictionaries", "label_column",
    "num_validation_images", "pretrained_model_name_or_path", "seed", "shuffle_buffer", "streaming", "train_split",
    "use_ema", "validation_split",
)  # fmt: skip
# Settings without influence on what is learned; those of the data set, as the images must be the same.
WITHOUT_INFLUENCE = (
    "cache_dir", "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers", "dataset_name",
    "gradient_checkpointing", "hub_dataset_id", "hub_license", "hub_model_id", "hub_private_repo", "image_column",
    "logging_dir", "logging_steps", "max_unreadable_share", "output_dir", "push_to_hub", "report_to", "resolution",
    "resume_from_checkpoint", "train_data_dir", "validation_steps",
)  # fmt: skip


def hub_id(dataset_name: str | None) -> str | None:
    """The name of a data set on the Hub; None for a local folder, which `datasets` takes first."""
    return None if dataset_name is None or Path(dataset_name).exists() else dataset_name


def check_output_dir(output_dir: str, data: str | None) -> None:
    """`ctrl_csc_hf.latents.encoding.check_output`, by the name of the setting."""
    if data is None or not Path(data).is_dir():
        return
    from ctrl_csc_hf.latents.encoding import check_output  # needs datasets, which benchmarks/gpu.py does without

    try:
        check_output(output_dir, data)
    except ValueError as error:
        raise ValueError(f"output_dir {error}") from error


def option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainingSettings:
    """Names as in diffusers' training examples, where they have one."""

    # Images
    dataset_name: str | None = option(None, "A Hub data set, or a local folder that datasets.load_dataset reads.")
    dataset_config_name: str | None = option(None, "Name of the data set configuration.")
    train_data_dir: str | None = option(None, "A local folder of images, or of Parquet files.")
    hub_dataset_id: str | None = option(
        None, "Hub id of the data set that a local folder is a copy of; the model card names no local data."
    )
    train_split: str = option("train", "Split to train on.")
    validation_split: str | None = option(
        None,
        "Split of the held-out images; by default a validation or test split, or else at most a tenth of the "
        "training split, drawn by the seed.",
    )
    num_validation_images: int = option(1000, "Number of held-out images, drawn by the seed.")
    streaming: bool | None = option(
        None,
        "Stream the data set instead of preparing it on disk; by default only what dataset_name names.",
        nargs="?",
        const=True,
    )
    shuffle_buffer: int = option(10_000, "Images of a stream that a process keeps in memory to mix them.")
    image_column: str | None = option(None, "Column of the images; by default the only one of images.")
    label_column: str | None = option(None, "Column of the labels, by default found by its type; 'none' without.")
    resolution: int | None = option(
        None,
        "Side of the images in pixels; another one than the preset's chooses the stages, too. Of lists of a value a "
        "stage, further stages take the last one.",
    )
    augmentation: str = option("flip", "none, flip, or crop_and_flip.")
    dataloader_num_workers: int = option(0, "Processes that decode images; 0 decodes in the main one.")
    max_unreadable_share: float = option(0.01, "Share of images that may be unreadable; above it, the run stops.")
    cache_dir: str | None = option(None, "Where datasets keeps what it prepares.")

    # Model
    pretrained_model_name_or_path: str | None = option(None, "Start from this checkpoint instead of the preset.")
    gradient_checkpointing: bool = option(False, "Compute activations twice to save memory.")

    # The game, see ctrl_csc_hf.objectives.closed_loop
    objective: str = option("binary", "binary, multi, or unsupervised.")
    distortion: float = option(0.5, "eps^2 of the coding rates.")
    decoder_consistency: float = option(10.0, "w_g, weight of self-consistency in the decoder's loss.")
    energy: float = option(0.0, "w_E, weight of the sparse-coding energy.")
    code_reduction: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={"help": "w_l, weight of the rate reduction between the codes of a stage: of all stages, or of each."},
    )
    code_consistency: float = option(0.0, "w_c, weight of the codes' squared difference in the decoder's loss.")
    pixel_error: float = option(0.0, "w_x, weight of the squared error of pixels in the decoder's loss.")

    # Collapse, see collapse.py
    collapse_share: float = option(
        0.25, "R(Z) of a batch below this share of its largest possible value counts as collapsed; 0 never does."
    )
    collapse_steps: int = option(200, "Collapsed steps in a row before the run warns.")
    stop_on_collapse: bool = option(False, "Then save a checkpoint and stop.")

    # Before the game, see warmup.py; not where a run starts from a checkpoint
    energy_warmup_steps: int = option(0, "Steps that learn the dictionaries from the sparse-coding energy alone.")
    energy_warmup_learning_rate: float = option(1e-3, "Learning rate of those, which falls to zero.")
    deconvolution_warmup_steps: int = option(0, "Steps after those that fit both nets to 1/2 |x - g(f(x))|^2.")
    deconvolution_warmup_learning_rate: float = option(2e-3, "Learning rate of those, which falls to zero.")

    # Optimisation
    keep_dictionaries: bool = option(
        False, "Leave the encoder's dictionaries, in the fit and the game, as the sparse-coding energy made them."
    )
    max_train_steps: int = option(45_000, "Steps of the game, which follow those before it; 0 ends with the fit.")
    train_batch_size: int = option(256, "Images a step.")
    encoder_learning_rate: float = option(
        1.5e-4, "Learning rate of the encoder, and of what the players share; at 0 the decoder plays alone."
    )
    decoder_learning_rate: float = option(5e-4, "Learning rate of the decoder.")
    lr_scheduler: str = option("linear", f"One of {list(SCHEDULERS)}.")
    lr_warmup_steps: int = option(0, "Steps of linear warm-up.")
    adam_beta1: float = option(0.5, "Decay of Adam's first moments.")
    adam_beta2: float = option(0.999, "Decay of Adam's second moments.")
    use_ema: bool = option(True, "Keep an exponential moving average of both networks; it is what is saved.")
    ema_decay: float = option(0.999, "Decay of the exponential moving average.")
    mixed_precision: str | None = option(None, "no or bf16; by default, what accelerate launch was told.")
    torch_compile: bool = option(False, "Compile both networks: minutes at the start, a faster step on a GPU.")
    seed: int = option(0, "Seed of the initial weights, samples, order of images and augmentation.")

    # Output
    output_dir: str = option("ctrl-csc-model", "Where everything is written.")
    logging_dir: str = option("logs", "Folder of the tracker's files inside output_dir.")
    logging_steps: int = option(10, "Steps between two logged figures.")
    validation_steps: int = option(500, "Steps of the game between two evaluations on held-out images.")
    checkpointing_steps: int = option(500, "Steps between two checkpoints.")
    checkpoints_total_limit: int | None = option(2, "Checkpoints kept; older ones are removed.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'latest'.")
    report_to: str = option("tensorboard", "Any tracker of Accelerate, 'all', or 'none'.")
    push_to_hub: bool = option(False, "Upload the result to the Hub.")
    hub_model_id: str | None = option(None, "Repository to upload to; by default, the name of output_dir.")
    hub_license: str | None = option(None, "Licence of the weights; by default that of the data set's card.")
    hub_private_repo: bool | None = option(
        None, "Whether a new repository is private; by default as the data set.", nargs="?", const=True
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                "exactly one of --dataset_name and --train_data_dir must be given, got "
                f"dataset_name={self.dataset_name!r} and train_data_dir={self.train_data_dir!r}"
            )
        check_output_dir(self.output_dir, self.dataset_name or self.train_data_dir)
        self.hub_dataset_id = hub_id(self.dataset_name) or self.hub_dataset_id
        if self.streaming is None:
            self.streaming = self.dataset_name is not None
        if self.objective == "multi" and self.label_column == "none":
            raise ValueError("label_column must name a column for objective='multi', got 'none'")
        for name in ("train_batch_size", "num_validation_images", "logging_steps", "validation_steps",
                     "checkpointing_steps", "collapse_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("energy_warmup_steps", "deconvolution_warmup_steps", "max_train_steps", "lr_warmup_steps",
                     "shuffle_buffer", "dataloader_num_workers", "seed"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2^32, got {self.seed!r}")
        if not 0 <= self.encoder_learning_rate < float("inf"):
            raise ValueError(
                f"encoder_learning_rate must be a number of at least 0, got {self.encoder_learning_rate!r}"
            )
        for name in ("decoder_learning_rate", "energy_warmup_learning_rate", "deconvolution_warmup_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)!r}")
        for name in ("max_unreadable_share", "collapse_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}")
        if self.mixed_precision not in (None, *PRECISIONS):
            raise ValueError(f"mixed_precision must be one of {PRECISIONS}, got {self.mixed_precision!r}")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(f"checkpoints_total_limit must be at least 1, got {self.checkpoints_total_limit!r}")
        if self.lr_scheduler not in SCHEDULERS:
            raise ValueError(f"lr_scheduler must be one of {SCHEDULERS}, got {self.lr_scheduler!r}")
        if self.keep_dictionaries and not (self.energy_warmup_steps or self.pretrained_model_name_or_path):
            raise ValueError(
                "keep_dictionaries must be off where energy_warmup_steps is 0, or the dictionaries of a new model stay "
                "random, got True"
            )
        self.closed_loop_objective(num_classes=1)  # wrong weights and names are found before any data is read

    def closed_loop_objective(self, num_classes: int | None) -> ClosedLoopObjective:
        return ClosedLoopObjective(
            objective=self.objective,
            distortion=self.distortion,
            num_classes=num_classes,
            decoder_consistency=self.decoder_consistency,
            energy=self.energy,
            code_reduction=self.code_reduction[0] if len(self.code_reduction) == 1 else self.code_reduction,
            code_consistency=self.code_consistency,
            pixel_error=self.pixel_error,
        )


class SettingsParser(HfArgumentParser):
    """Raises a ValueError for wrong flags, which a program tells in one line, without the usage of all settings."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the settings")


def parse_settings(arguments: list[str] | None = None) -> tuple[TrainingSettings, CtrlCscConfig]:
    """Reads flags and the preset that `--config` names, a YAML file or one of the package's presets.

    Raises:
        ValueError: for a flag or an entry of the preset that is no setting, and for values that are not allowed.
    """
    presets = SettingsParser(add_help=False)
    presets.add_argument("--config", default="cifar10", help="A YAML preset: a path, or a name of the package's.")
    chosen, rest = presets.parse_known_args(arguments)
    preset = load_preset(chosen.config)

    parser = SettingsParser(TrainingSettings, parents=[presets], description="Trains CTRL-CSC.")
    known = {entry.name for entry in fields(TrainingSettings)}
    fields_of = {"training": known, "model": {entry.name for entry in fields(CtrlCscConfig)}}
    for section, allowed in fields_of.items():
        unknown = set(preset[section]) - allowed
        if unknown:
            raise ValueError(f"{chosen.config}: {section} must hold {sorted(allowed)}, got {sorted(unknown)}")
    for name, value in preset["training"].items():
        hint = get_type_hints(TrainingSettings)[name]
        types = get_args(hint) or (hint,)
        is_list = get_origin(hint) is list
        entries = value if is_list and isinstance(value, list) else [value]
        if isinstance(value, list) is not is_list or not entries or not all(_is_of(entry, types) for entry in entries):
            names = " or ".join(kind.__name__ for kind in types)
            names = f"list of {names}" if is_list else names
            raise ValueError(f"{chosen.config}: {name} must be of the type {names}, got {value!r}")
        if is_list:  # argparse reads strings as it does those of flags, but none within a list
            preset["training"][name] = [types[0](entry) for entry in entries]
    of_data = {name: value for name, value in preset["training"].items() if name in OF_THE_DATA_SET}
    parser.set_defaults(**{name: value for name, value in preset["training"].items() if name not in of_data})
    namespace = vars(parser.parse_args(rest))
    named = namespace["train_data_dir"] or namespace["dataset_name"]
    if named in (None, of_data.get("dataset_name")):
        for name, value in of_data.items():
            if namespace[name] == parser.get_default(name):
                namespace[name] = value
    settings = TrainingSettings(**{name: namespace[name] for name in known})
    model = preset["model"]
    if settings.resolution not in (None, model.get("image_size")):
        model = {name: value for name, value in model.items() if name not in STAGES}
        model["image_size"] = settings.resolution
    try:
        for name in OF_EACH_STAGE:
            if "stage_channels" not in model and isinstance(value := model.get(name), list):
                stages = len(default_stages(model["image_size"])["stage_channels"])
                model[name] = [*value, *value[-1:] * stages][:stages]
        return settings, CtrlCscConfig(**model)
    except (TypeError, ValueError) as error:
        reason = f"the model of {chosen.config}: {' '.join(str(error).split())}"
        if settings.resolution and (settings.resolution % 2 or settings.resolution < 4):
            reason = f"resolution must be even and at least 4, got {settings.resolution}; {reason}"
        raise ValueError(reason) from error


def _is_of(value: Any, types: tuple[type, ...]) -> bool:
    """Whether a value of a YAML file is of one of the types; YAML has some numbers, such as 1e-4, as strings."""
    if isinstance(value, str) and str not in types:
        with suppress(ValueError):
            value = float(value)
    return type(value) in types or (float in types and type(value) is int)
