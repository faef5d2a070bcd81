"""Lets DiffusionPipeline load the model from the root of the repository, where AutoModel has it: stored once."""

from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedModel


class Model(PreTrainedModel):
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        root = Path(pretrained_model_name_or_path).parent
        return AutoModel.from_pretrained(root, trust_remote_code=True, **kwargs)
