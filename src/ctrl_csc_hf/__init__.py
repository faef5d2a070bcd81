"""CTRL-CSC for Hugging Face: closed-loop transcription via convolutional sparse coding.

Importing this package registers its classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel

# Up to transformers 5.17 the shorter import demands torchvision, which nothing here needs.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_ctrl_csc import CtrlCscConfig
from .image_processing_ctrl_csc import CtrlCscImageProcessor
from .modeling_ctrl_csc import (
    CtrlCscDecoder,
    CtrlCscDecoderOutput,
    CtrlCscEncoder,
    CtrlCscEncoderOutput,
    CtrlCscModel,
    CtrlCscModelOutput,
)
from .rate_reduction import class_rate_reduction, coding_rate, multiclass_objective, rate_reduction
from .sparse_coding import ConvolutionalDictionary, ConvolutionalSparseCoding

AutoConfig.register(CtrlCscConfig.model_type, CtrlCscConfig)
AutoModel.register(CtrlCscConfig, CtrlCscModel)
AutoImageProcessor.register(CtrlCscConfig, image_processor_classes={"pil": CtrlCscImageProcessor})

__all__ = [
    "ConvolutionalDictionary",
    "ConvolutionalSparseCoding",
    "CtrlCscConfig",
    "CtrlCscDecoder",
    "CtrlCscDecoderOutput",
    "CtrlCscEncoder",
    "CtrlCscEncoderOutput",
    "CtrlCscImageProcessor",
    "CtrlCscModel",
    "CtrlCscModelOutput",
    "class_rate_reduction",
    "coding_rate",
    "multiclass_objective",
    "rate_reduction",
]
