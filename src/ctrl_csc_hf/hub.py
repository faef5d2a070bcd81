"""A checkpoint as a Hub repository: one folder for every door, the weights in it once.

AutoModel, AutoImageProcessor and AutoConfig, the two halves, DiffusionPipeline and Inference Endpoints all read it,
with and without this package: the code that they need lies beside the weights.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from .image_processing_ctrl_csc import CtrlCscImageProcessor
from .modeling_ctrl_csc import CtrlCscModel

PACKAGE = Path(__file__).parent
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
    return folder


def _add_to_json(path: Path, entries: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
