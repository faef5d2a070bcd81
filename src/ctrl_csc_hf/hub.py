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
from .modeling_ctrl_csc import CtrlCscModel

PACKAGE = Path(__file__).parent
# An installed package has them beside this module, an editable one in the repository.
MODEL_CARDS = next(
    folder for folder in (PACKAGE / "model_cards", PACKAGE.parents[1] / "model_cards") if folder.is_dir()
)
CODE = {  # where it lies in the repository; diffusers fetches a component's folder, and the pipeline from the root
    "model": ("configuration_ctrl_csc.py", "sparse_coding.py", "modeling_ctrl_csc.py", "remote/load_model.py"),
    "image_processor": ("image_processing_ctrl_csc.py", "remote/load_image_processor.py"),
    ".": ("pipeline_ctrl_csc.py",),
}
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


def export(model: CtrlCscModel, folder: str | Path) -> Path:
    """Writes the folder of a Hub repository: weights, configuration, image processor, and the code of all.

    The same model gives the same bytes. Files of the same names are overwritten, others stay.

    Args:
        model: what to publish.
        folder: is made where it does not exist.
    """
    folder = Path(folder)
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
    return folder


def publish(checkpoint: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a checkpoint in the form of `export`, as one commit: a reader sees all of it or nothing.

    Where nothing has changed, nothing is uploaded. After an upload that broke off the next one goes on with it.

    Args:
        checkpoint: a folder that `save_pretrained` or train.py wrote.
        repo_id: "name" or "organization/name"; is created where it does not exist.
        private: whether a repository that is created is private.

    Returns:
        The repository's address.
    """
    model = CtrlCscModel.from_pretrained(checkpoint)
    api = HfApi()
    with TemporaryDirectory() as folder:
        export(model, folder)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Publish with ctrl-csc-hf")
    return str(repository)


def _add_to_json(path: Path, entries: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
