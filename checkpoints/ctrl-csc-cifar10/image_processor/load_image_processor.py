"""Lets DiffusionPipeline load the image processor from the root of the repository, where AutoImageProcessor has it."""

from pathlib import Path
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

# Up to transformers 5.17 the shorter import demands torchvision, which nothing here needs.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


class ImageProcessor(BaseImageProcessor):
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        root = Path(pretrained_model_name_or_path).parent
        return AutoImageProcessor.from_pretrained(root, trust_remote_code=True, **kwargs)
