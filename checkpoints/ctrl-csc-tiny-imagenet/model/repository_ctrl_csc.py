"""The folder of a Hub repository that AutoModel, AutoImageProcessor and DiffusionPipeline all read.

`save_repository` writes it, with the weights once, in the root; `Model` and `ImageProcessor` let DiffusionPipeline load
them from there.

This file also runs from a Hub repository, without the rest of the package.
"""

import inspect
import json
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.image_processing_utils import BaseImageProcessor

# Up to transformers 5.17 the shorter import demands torchvision, which nothing here needs.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

logger = logging.getLogger(__name__)

SAMPLER = "sampler"  # folder of the optional component
INDEX = "model_index.json"
MODEL_AUTO_MAP = {
    "AutoConfig": "model/configuration_ctrl_csc.CtrlCscConfig",
    "AutoModel": "model/modeling_ctrl_csc.CtrlCscModel",
}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processor/image_processing_ctrl_csc.CtrlCscImageProcessor"}
MODEL_INDEX = {
    "_class_name": ["pipeline_ctrl_csc", "CtrlCscPipeline"],
    "image_processor": ["repository_ctrl_csc", "ImageProcessor"],
    "model": ["repository_ctrl_csc", "Model"],
}
SAMPLER_INDEX = {SAMPLER: ["sampling_ctrl_csc", "LatentSampler"]}
# What a published repository holds besides the pipeline.
RECORDS = (
    "README.md",
    "architecture.png",
    "handler.py",
    "metrics.json",
    "training_args.json",
    "training_curve.png",
    "reconstructions.png",
    "examples/*.png",
)
# Of these, names that others give to files of their own: only in a repository they are known to be this package's.
OF_REPOSITORIES = ("architecture.png", "handler.py")
CARD_TAG = "\n- ctrl-csc\n"  # by which a README.md is known to be a card of this package
# What evaluate.py writes into a model's folder or into its subfolder evaluation, and what else train.py leaves there.
MEASURED = ("metrics.json", "reconstructions.png", "rivals.png", "neighbours.png", "correlations.png")
UNPUBLISHED = (*MEASURED, *(f"evaluation/{name}" for name in MEASURED), "history.json", "samples/step-*.png")
# Of a configuration, what a model's outputs depend on and the shapes of its weights do not tell.
OF_THE_OUTPUTS = ("strides", "paddings", "sparsity", "ridge", "num_iterations", "step_size")


class Config:
    """Loads a model's configuration from the root, where diffusers names a component's folder."""

    @classmethod
    def from_pretrained(cls, root: str, subfolder: str = "", **kwargs: Any) -> Any:
        return AutoConfig.from_pretrained(root, trust_remote_code=True, **kwargs)


class Model(PreTrainedModel):
    """Lets DiffusionPipeline load the model where AutoModel does, in the folder above its component's."""

    config_class = Config

    def __new__(cls, config: Any) -> Any:  # without weights, to measure it for device_map="balanced"
        with torch.device("meta"):
            return AutoModel.from_config(config, trust_remote_code=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        root = Path(pretrained_model_name_or_path).parent
        model_type = AutoConfig.from_pretrained(root, trust_remote_code=True).model_type
        if model_type != "ctrl_csc":
            raise ValueError(f"model_type={model_type!r} is not allowed: it must be 'ctrl_csc'")
        # diffusers passes a dtype that nobody has given as None, for which transformers takes that of the file's first
        # tensor rather than the model's own.
        kwargs = {name: value for name, value in kwargs.items() if value is not None or "dtype" not in name}
        return AutoModel.from_pretrained(root, trust_remote_code=True, **kwargs)


class ImageProcessor(BaseImageProcessor):
    """Lets DiffusionPipeline load the image processor where AutoImageProcessor does."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        root = Path(pretrained_model_name_or_path).parent
        return AutoImageProcessor.from_pretrained(root, trust_remote_code=True, **kwargs)


def save_repository(
    folder: str | Path,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    sampler: Any = None,
    **weights: Any,
) -> None:
    """Writes weights, configuration, image processor, sampler and the code of all into a folder.

    The code is copied from where the classes are defined: the package, or the caches of remote code. What the
    folder holds of another model is removed, see `remove_other_model`.

    Args:
        folder: is made if it does not exist.
        model: a `CtrlCscModel`.
        image_processor: its `CtrlCscImageProcessor`.
        sampler: its `LatentSampler`, if it has one.
        weights: keyword arguments of the model's `save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: if `folder` is a file.
        OSError: if a file cannot be written; the folder is as it was.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder or not exist, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_model(folder, model) as scratch:
        model.save_pretrained(scratch, **weights)
        image_processor.save_pretrained(scratch)
        for path in scratch.glob("*.py"):  # transformers writes the code of remote classes beside, too
            path.unlink()
        _add_to_json(scratch / "config.json", {"auto_map": MODEL_AUTO_MAP})
        _add_to_json(scratch / "preprocessor_config.json", {"auto_map": IMAGE_PROCESSOR_AUTO_MAP})
        (scratch / INDEX).write_text(json.dumps(MODEL_INDEX, indent=2) + "\n", encoding="utf-8")
        this = Path(__file__)
        modules: dict[str, list[Any]] = {
            ".": [this.with_name("pipeline_ctrl_csc.py")],
            "model": [inspect.getfile(type(model)), this],
            "image_processor": [inspect.getfile(type(image_processor)), this],
        }
        for subfolder, files in modules.items():
            (scratch / subfolder).mkdir(exist_ok=True)
            for file in files:
                for source in (file, *get_relative_import_files(file)):
                    shutil.copyfile(source, scratch / subfolder / Path(source).name)
        if sampler is not None:
            save_sampler(scratch, sampler)
    if sampler is None:
        _remove_sampler(folder)


def save_sampler(folder: Path, sampler: Any) -> None:
    """Writes a sampler into a model's folder; where that is a repository, with its code and its entry of the index."""
    sampler.save_pretrained(folder / SAMPLER)
    if (folder / INDEX).is_file():
        shutil.copyfile(inspect.getfile(type(sampler)), folder / SAMPLER / "sampling_ctrl_csc.py")
        _add_to_json(folder / INDEX, SAMPLER_INDEX)


@contextmanager
def replacing_model(folder: Path, model: PreTrainedModel, keep: Collection[Path] = ()) -> Iterator[Path]:
    """A folder to write a model and its records into. At the end its files replace those of `folder`.

    Then weights are removed from `folder`, and what it holds of another model but `keep`, see `remove_other_model`.

    Raises:
        OSError: if a file cannot be written; `folder` is as it was.
    """
    with TemporaryDirectory(dir=folder, prefix=".unfinished-") as scratch:
        try:
            yield Path(scratch)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} cannot be written and is as it was: {error}") from error
        remove_other_model(folder, model, keep)
        for old in folder.glob("model*.safetensors*"):  # perhaps of another number of files
            old.unlink()
        for path in [path for path in Path(scratch).rglob("*") if path.is_file()]:
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)


def remove_other_model(folder: Path, model: PreTrainedModel, keep: Collection[Path] = ()) -> None:
    """Removes card, figures, pictures and sampler of another model than this one that a folder holds.

    Other files stay, and those of `keep`. To be called before the model is saved there.
    """
    if describes_other_model(folder, model):
        remove_records(folder, keep=keep)


def describes_other_model(folder: Path, model: PreTrainedModel) -> bool:
    """Whether a folder holds a model of other weights, or one that uses the same otherwise, and what belongs to it."""
    written = (folder / SAMPLER).is_dir() or _found(folder, (*RECORDS, *UNPUBLISHED))
    return bool(written) and (folder / "config.json").is_file() and not _holds(model, folder)


def remove_records(
    folder: Path, patterns: Iterable[str] = (*RECORDS, *UNPUBLISHED), keep: Collection[Path] = ()
) -> None:
    """Removes what this package has written about the model in a folder, and its sampler; other files stay.

    A README.md that is no card of this package stays, and so do examples that are neither numbered nor named by one.
    """
    found = set(_found(folder, patterns)).difference(keep)
    readme = folder / "README.md"
    card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    if not (card.startswith("---") and CARD_TAG in card):
        card = ""
        found.discard(readme)
    if not (folder / INDEX).is_file():
        found -= {folder / name for name in OF_REPOSITORIES}
    for path in found:
        if path.parent.name != "examples" or path.stem.isdigit() or f"examples/{path.name}" in card:
            path.unlink()
    _remove_sampler(folder)


def copy_records(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Copies the card, the figures and the pictures of the repository that a model was loaded from into a folder.

    Only if weights and configuration are still those of the repository, which the figures were measured on.

    Args:
        model: what was loaded.
        name: the published folder or the Hub repository that it was loaded from.
        folder: where the model is being saved.
    """
    loaded_from = Path(model.name_or_path)  # of a repository, its snapshot in the cache, which may lack the records
    revision = loaded_from.name if loaded_from.is_dir() else getattr(model.config, "_commit_hash", None)
    try:
        source = Path(name)
        if not source.is_dir():
            source = Path(snapshot_download(name, revision=revision, allow_patterns=list(RECORDS)))
    except (OSError, ValueError) as error:  # not reached, or no longer there
        logger.warning("the card and the figures of %s are not saved with the model: %s", name, error)
        return
    if not (source / "README.md").is_file() or source.resolve() == folder.resolve():
        return
    if not _holds(model, model.name_or_path, revision):
        logger.warning(
            "the card and the figures of %s are not saved with the model: its weights or its configuration are others",
            name,
        )
        return
    for path in _found(source, RECORDS):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _remove_sampler(folder: Path) -> None:
    if (folder / SAMPLER / "model.safetensors").is_file():
        shutil.rmtree(folder / SAMPLER)


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _holds(model: PreTrainedModel, name: str | Path, revision: str | None = None) -> bool:
    """Whether a folder or a Hub repository holds the weights that the model has, and uses them as it does."""
    try:
        other = type(model).from_pretrained(name, revision=revision)
    except (OSError, RuntimeError, ValueError):  # no model, or one of another kind
        return False
    saved, state = other.state_dict(), model.state_dict()
    alike = [_value(model.config, field) == _value(other.config, field) for field in OF_THE_OUTPUTS]
    return (
        all(alike)
        and saved.keys() == state.keys()
        and all(torch.equal(tensor.cpu(), saved[key].to(tensor.dtype)) for key, tensor in state.items())
    )


def _value(config: Any, field: str) -> Any:
    value = getattr(config, field, None)
    return list(value) if isinstance(value, tuple) else value


def _add_to_json(path: Path, entries: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(path)
