"""A checkpoint as a Hub repository: one folder for every door, the weights in it once.

AutoModel, AutoImageProcessor and AutoConfig, the two halves, DiffusionPipeline and Inference Endpoints all read it,
with and without this package: the code that they need lies beside the weights.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file
from transformers.image_processing_utils import BaseImageProcessor

from .image_processing_ctrl_csc import CtrlCscImageProcessor
from .model_card import FIGURE, MODEL_CARDS, model_card, public_settings
from .modeling_ctrl_csc import CtrlCscModel
from .sampling import LatentSampler
from .visualization import architecture_figure

PACKAGE = Path(__file__).parent
CODE = {  # where it lies in the repository; diffusers fetches a component's folder, and the pipeline from the root
    "model": (
        "configuration_ctrl_csc.py",
        "sparse_coding.py",
        "batch_norm.py",
        "modeling_ctrl_csc.py",
        "remote/load_model.py",
    ),
    "image_processor": ("image_processing_ctrl_csc.py", "remote/load_image_processor.py"),
    ".": ("pipeline_ctrl_csc.py", "restoration.py"),
}
SAMPLER = "sampler"  # the folder of the pipeline's optional component, in a checkpoint too; here with its code
SAMPLER_CODE = "sampling.py"
RECORDS = ("metrics.json", "training_curve.png")
SETTINGS = "training_args.json"
GRID = "reconstructions.png"
# What only some checkpoints have, and code that may be renamed: of these no older publication's files stay.
REPLACED = ("examples/*.png", "image_processor/*.py", "model/*.py", f"{SAMPLER}/*", *RECORDS, SETTINGS, GRID)
MODEL_AUTO_MAP = {
    "AutoConfig": "model/configuration_ctrl_csc.CtrlCscConfig",
    "AutoModel": "model/modeling_ctrl_csc.CtrlCscModel",
}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processor/image_processing_ctrl_csc.CtrlCscImageProcessor"}
MODEL_INDEX = {
    "_class_name": ["pipeline_ctrl_csc", "CtrlCscPipeline"],
    "image_processor": ["load_image_processor", "ImageProcessor"],
    "model": ["load_model", "Model"],
}


def export(
    model: CtrlCscModel,
    folder: str | Path,
    *,
    repo_id: str = "ORGANIZATION/NAME",
    checkpoint: str | Path | None = None,
    image_processor: BaseImageProcessor | None = None,
    sampler: LatentSampler | None = None,
    license: str = "apache-2.0",
    half: bool = False,
) -> Path:
    """Writes the folder of a Hub repository: weights, configuration, image processor, the code of all, and the card.

    The same model gives the same bytes. Files of the same names are overwritten, others stay.

    Args:
        model: what to publish.
        folder: is made where it does not exist.
        repo_id: where it will be published, "organization/name", which the card tells.
        checkpoint: the folder that train.py wrote; the card tells its settings and figures, and shows its pictures.
        image_processor: the model's; by default the checkpoint's, or the one of the model's image size.
        sampler: the pipeline's; by default the checkpoint's, where it has one.
        license: identifier of the weights' licence, as the Hub lists them.
        half: whether the file holds the dictionaries in float16, half as large; the model is loaded in its own
            precision, with atoms made unit vectors again.

    Raises:
        ValueError: if `repo_id` has another form, and if `folder` is a file or the checkpoint itself.
    """
    folder = Path(folder)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id must be ORGANIZATION/NAME, got {repo_id!r}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder or not exist, got {folder}")
    if checkpoint is not None and folder.resolve() == checkpoint.resolve():
        raise ValueError(f"folder must be another one than the checkpoint's, got {folder}")
    model.save_pretrained(folder)
    if half:
        _store_in_half(folder / "model.safetensors")
    (image_processor or _image_processor(model, checkpoint)).save_pretrained(folder)
    _add_to_json(folder / "config.json", {"auto_map": MODEL_AUTO_MAP})
    _add_to_json(folder / "preprocessor_config.json", {"auto_map": IMAGE_PROCESSOR_AUTO_MAP})
    code, index = CODE, MODEL_INDEX
    if sampler := sampler or _sampler(checkpoint):
        sampler.save_pretrained(folder / SAMPLER)
        code, index = CODE | {SAMPLER: (SAMPLER_CODE,)}, MODEL_INDEX | {SAMPLER: ["sampling", "LatentSampler"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for subfolder, sources in code.items():
        (folder / subfolder).mkdir(exist_ok=True)
        for source in sources:
            shutil.copyfile(PACKAGE / source, folder / subfolder / Path(source).name)
    shutil.copyfile(MODEL_CARDS / "handler.py", folder / "handler.py")
    architecture_figure(model.config).save(folder / FIGURE)
    pictures: list[str] = []
    if checkpoint is not None:
        pictures = [GRID, *sorted(f"examples/{path.name}" for path in checkpoint.glob("examples/*.png"))]
        pictures = [name for name in pictures if (checkpoint / name).is_file()]
        for name in (*RECORDS, *pictures):
            if (checkpoint / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)
        if settings := public_settings(checkpoint):
            (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    card = model_card(model, repo_id, checkpoint, pictures, license)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return folder


def publish(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str = "apache-2.0",
    half: bool = False,
) -> str:
    """Uploads a checkpoint in the form of `export`, as one commit: a reader sees all of it or nothing.

    Where nothing has changed, nothing is uploaded. After an upload that broke off the next one goes on with it. What
    an older publication had and this one lacks, such as figures and examples, is removed (`REPLACED`); files that
    others added stay.

    Args:
        checkpoint: a folder that `save_pretrained` or train.py wrote.
        repo_id: "organization/name", or "name" for the account's own; is created where it does not exist.
        private: whether a repository that is created is private.
        license, half: as in `export`.

    Returns:
        The repository's address.
    """
    model = CtrlCscModel.from_pretrained(checkpoint)
    api = HfApi()
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        export(model, folder, repo_id=repository.repo_id, checkpoint=checkpoint, license=license, half=half)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            delete_patterns=list(REPLACED),
            commit_message="Publish with ctrl-csc-hf",
        )
    return str(repository)


def _store_in_half(path: Path) -> None:
    tensors = load_file(path)
    halved = {name: tensor.half() if name.endswith("dictionary") else tensor for name, tensor in tensors.items()}
    save_file(halved, path, metadata={"format": "pt"})


def _image_processor(model: CtrlCscModel, checkpoint: Path | None) -> BaseImageProcessor:
    if checkpoint is not None and (checkpoint / "preprocessor_config.json").is_file():
        return CtrlCscImageProcessor.from_pretrained(checkpoint)
    return CtrlCscImageProcessor(image_size=model.config.image_size)


def _sampler(checkpoint: Path | None) -> LatentSampler | None:
    if checkpoint is not None and (checkpoint / SAMPLER).is_dir():
        return LatentSampler.from_pretrained(checkpoint / SAMPLER)
    return None


def _add_to_json(path: Path, entries: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
