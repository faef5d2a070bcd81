"""CTRL-CSC for Hugging Face: closed-loop transcription via convolutional sparse coding.

Importing this package registers its classes with transformers' Auto classes.
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel

# Up to transformers 5.17 the shorter import demands torchvision, which nothing here needs.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .models.configuration_ctrl_csc import CtrlCscConfig
from .models.denoiser_ctrl_csc import CtrlCscDenoiser, CtrlCscDenoiserConfig
from .models.image_processing_ctrl_csc import CtrlCscImageProcessor
from .models.modeling_ctrl_csc import (
    CtrlCscDecoder,
    CtrlCscDecoderOutput,
    CtrlCscEncoder,
    CtrlCscEncoderOutput,
    CtrlCscModel,
    CtrlCscModelOutput,
)
from .models.sparse_coding import ConvolutionalDictionary, ConvolutionalSparseCoding
from .objectives.rate_reduction import class_rate_reduction, coding_rate, multiclass_objective, rate_reduction

if TYPE_CHECKING:
    from .models.pipeline_ctrl_csc import CtrlCscPipeline, CtrlCscPipelineOutput

try:
    __version__ = metadata.version("ctrl-csc-hf")
except metadata.PackageNotFoundError:  # a checkout on the path, which was not installed
    __version__ = "0+unknown"

AutoConfig.register(CtrlCscConfig.model_type, CtrlCscConfig)
AutoModel.register(CtrlCscConfig, CtrlCscModel)
AutoConfig.register(CtrlCscDenoiserConfig.model_type, CtrlCscDenoiserConfig)
AutoModel.register(CtrlCscDenoiserConfig, CtrlCscDenoiser)
AutoImageProcessor.register(CtrlCscConfig, image_processor_classes={"pil": CtrlCscImageProcessor})


def __getattr__(name: str) -> Any:
    """The pipeline on demand: it needs diffusers, which the rest does not."""
    if name not in ("CtrlCscPipeline", "CtrlCscPipelineOutput"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .models import pipeline_ctrl_csc
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}: pip install ctrl-csc-hf[pipeline]") from error
    return getattr(pipeline_ctrl_csc, name)


__all__ = [
    "ConvolutionalDictionary",
    "ConvolutionalSparseCoding",
    "CtrlCscConfig",
    "CtrlCscDecoder",
    "CtrlCscDecoderOutput",
    "CtrlCscDenoiser",
    "CtrlCscDenoiserConfig",
    "CtrlCscEncoder",
    "CtrlCscEncoderOutput",
    "CtrlCscImageProcessor",
    "CtrlCscModel",
    "CtrlCscModelOutput",
    "CtrlCscPipeline",
    "CtrlCscPipelineOutput",
    "__version__",
    "class_rate_reduction",
    "coding_rate",
    "multiclass_objective",
    "rate_reduction",
]
