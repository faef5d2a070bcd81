"""Ordinary convolutions in place of sparse coding: `python benchmarks/baselines.py` takes what train.py takes.

`python benchmarks/baselines.py evaluate` takes what evaluate.py takes, and such models among its rivals.
"""

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ctrl_csc_hf import CtrlCscConfig, CtrlCscEncoder, CtrlCscModel
from ctrl_csc_hf.models.batch_norm import BatchNorm
from ctrl_csc_hf.models.sparse_coding import ConvolutionalDictionary
from ctrl_csc_hf.training import evaluate
from ctrl_csc_hf.training.run import one_line_errors
from ctrl_csc_hf.training.settings import parse_settings
from ctrl_csc_hf.training.train import main as train

LEAK = 0.2  # of the leaky relu, as in DCGAN's discriminator, which CTRL's encoder is


class ConvolutionalConfig(CtrlCscConfig):
    """As `CtrlCscConfig`; sparsity, ridge and num_iterations have no meaning here."""

    model_type = "ctrl_convolutional"

    def __init__(self, **kwargs: Any) -> None:  # without it transformers makes one that leaves out the checks
        super().__init__(**kwargs)
        if self.low_pass:
            raise ValueError("low_pass=True is not allowed: it must be False for ordinary convolutions")


class Convolution(ConvolutionalDictionary):
    """An ordinary convolution. Its filters keep unit norm, which the batch norm behind it makes no restriction."""

    def encode(self, signal: Tensor) -> Tensor:
        return self.adjoint(signal)


class RectifiedBatchNorm(BatchNorm):
    """Batch norm, then leaky relu."""

    def forward(
        self, codes: Tensor, update_statistics: bool, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        return F.leaky_relu(super().forward(codes, update_statistics, statistics), LEAK)


class ConvolutionalEncoder(CtrlCscEncoder):
    """The encoder of Dai et al., "CTRL", Entropy 24(4):456, 2022: [convolution, batch norm, leaky relu] a stage."""

    config_class = ConvolutionalConfig

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__(config)
        self.stages = nn.ModuleList(Convolution(*shape) for shape in config.stage_shapes[:-1])
        self.norms = nn.ModuleList(RectifiedBatchNorm(width) for width in config.stage_channels)
        self.post_init()


class ConvolutionalModel(CtrlCscModel):
    """CTRL's nets: `ConvolutionalEncoder` and the decoder of CTRL-CSC, which is a DCGAN's generator already."""

    config_class = ConvolutionalConfig

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__(config)
        self.encoder = ConvolutionalEncoder(config)
        self.post_init()
        self._keys_to_ignore_on_load_unexpected = set()


AutoConfig.register(ConvolutionalConfig.model_type, ConvolutionalConfig, exist_ok=True)
AutoModel.register(ConvolutionalConfig, ConvolutionalModel, exist_ok=True)


def launch() -> None:
    """train.py, of ordinary convolutions in the sizes of the preset, without its low pass, or evaluate.py."""
    if sys.argv[1:2] == ["evaluate"]:
        evaluate.launch(sys.argv[2:])
        return
    with one_line_errors():
        settings, config = parse_settings()
        if settings.energy or settings.energy_warmup_steps:
            raise ValueError(
                "energy and energy_warmup_steps must be 0, as ordinary convolutions have no energy, got "
                f"{settings.energy!r} and {settings.energy_warmup_steps!r}"
            )
        sizes = ("image_size", "latent_dim", "stage_channels", "kernel_sizes", "strides", "paddings")
        options = {name: getattr(config, name) for name in (*sizes, "share_dictionaries")}
        train(settings, ConvolutionalConfig(**options))


if __name__ == "__main__":
    launch()
