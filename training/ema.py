"""What an average of weights needs before it is evaluated or saved."""

import copy

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.batch_norm import BatchNorm

CALIBRATION_IMAGES = 2048


def averaged_model(model: CtrlCscModel, ema: EMAModel, images: Tensor, batch_size: int) -> CtrlCscModel:
    """A copy of the model with the averaged weights: atoms projected, operator norms and batch norms made to fit.

    Args:
        images: training images (n, C, H, W) for the batch norms' statistics, pixels in [-1, 1].
        batch_size: images a batch of those.
    """
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged.parameters())
    averaged.project_parameters()
    recompute_statistics(averaged, images, batch_size)
    return averaged.eval()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a compiled model would be compiled anew for each momentum below
def recompute_statistics(model: CtrlCscModel, images: Tensor, batch_size: int) -> None:
    """Sets the running statistics of every batch norm to the means over the batches of `images`.

    Each process does it by itself, with the same images.
    """
    was_training, sum_over_processes = model.training, model.encoder.sum_over_processes
    model.share_statistics(None)
    model.train()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for index, batch in enumerate(images.split(batch_size)):
        for norm in norms:
            norm.momentum = 1 / (index + 1)  # a plain mean over batches; the first one replaces what was there
        model.encoder.latent_norm_momentum = 1 / (index + 1)
        model(batch.to(model.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.encoder.latent_norm_momentum = type(model.encoder).latent_norm_momentum
    model.train(was_training)
    model.share_statistics(sum_over_processes)
