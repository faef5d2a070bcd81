"""Lets DiffusionPipeline load the model from the root of the repository, where AutoModel has it: stored once."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedModel


class Model(PreTrainedModel):
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        root = Path(pretrained_model_name_or_path).parent
        model_type = AutoConfig.from_pretrained(root, trust_remote_code=True).model_type
        if model_type != "ctrl_csc":
            raise ValueError(f"model_type={model_type!r} is not allowed: it must be 'ctrl_csc'")
        return AutoModel.from_pretrained(root, trust_remote_code=True, **kwargs)
