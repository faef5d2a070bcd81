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

from .image_processing_ctrl_csc import CtrlCscImageProcessor
from .model_card import MODEL_CARDS, model_card, public_settings
from .modeling_ctrl_csc import CtrlCscModel

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
    ".": ("pipeline_ctrl_csc.py",),
}
RECORDS = ("metrics.json", "training_curve.png")
GRID = "reconstructions.png"
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
    license: str = "apache-2.0",
) -> Path:
    """Writes the folder of a Hub repository: weights, configuration, image processor, the code of all, and the card.

    The same model gives the same bytes. Files of the same names are overwritten, others stay.

    Args:
        model: what to publish.
        folder: is made where it does not exist.
        repo_id: where it will be published, which the card tells.
        checkpoint: the folder that train.py wrote; the card tells its settings and figures, and shows its pictures.
        license: identifier of the weights' licence, as the Hub lists them.
    """
    folder = Path(folder)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    model.save_pretrained(folder)
    CtrlCscImageProcessor(image_size=model.config.image_size).save_pretrained(folder)
    _add_to_json(folder / "config.json", {"auto_map": MODEL_AUTO_MAP})
    _add_to_json(folder / "preprocessor_config.json", {"auto_map": IMAGE_PROCESSOR_AUTO_MAP})
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    for subfolder, sources in CODE.items():
        (folder / subfolder).mkdir(exist_ok=True)
        for source in sources:
            shutil.copyfile(PACKAGE / source, folder / subfolder / Path(source).name)
    shutil.copyfile(MODEL_CARDS / "handler.py", folder / "handler.py")
    pictures: list[str] = []
    if checkpoint is not None:
        pictures = [GRID, *sorted(f"examples/{path.name}" for path in checkpoint.glob("examples/*.png"))]
        pictures = [name for name in pictures if (checkpoint / name).is_file()]
        for name in (*RECORDS, *pictures):
            if (checkpoint / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)
        if settings := public_settings(checkpoint):
            (folder / "training_args.json").write_text(json.dumps(settings, indent=2) + "\n")
    card = model_card(model, repo_id, checkpoint, pictures, license)
    (folder / "README.md").write_text(str(card))
    return folder


def publish(checkpoint: str | Path, repo_id: str, *, private: bool = False, license: str = "apache-2.0") -> str:
    """Uploads a checkpoint in the form of `export`, as one commit: a reader sees all of it or nothing.

    Where nothing has changed, nothing is uploaded. After an upload that broke off the next one goes on with it.

    Args:
        checkpoint: a folder that `save_pretrained` or train.py wrote.
        repo_id: "name" or "organization/name"; is created where it does not exist.
        private: whether a repository that is created is private.
        license: identifier of the weights' licence, as the Hub lists them.

    Returns:
        The repository's address.
    """
    model = CtrlCscModel.from_pretrained(checkpoint)
    api = HfApi()
    with TemporaryDirectory() as folder:
        export(model, folder, repo_id=repo_id, checkpoint=checkpoint, license=license)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Publish with ctrl-csc-hf")
    return str(repository)


def _add_to_json(path: Path, entries: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
