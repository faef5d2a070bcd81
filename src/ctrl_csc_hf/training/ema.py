"""The average of weights that a run keeps, what it needs before it is evaluated or saved, and held-out figures."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.metrics import nearest_latent_match, peak_signal_to_noise_ratio
from ctrl_csc_hf.models.batch_norm import BatchNorm
from ctrl_csc_hf.objectives.rate_reduction import coding_rate, rate_reduction

CALIBRATION_IMAGES = 2048
GRID_IMAGES = 40


class AverageOfWeights:
    """The exponential moving average of weights.

    Args:
        parameters: to be averaged.
        decay: to which the decay rises: it is (n + 1) / (n + 10) at the n-th step after the first, which copies.

    Attributes:
        weights: the average, a tensor for each parameter.
        steps: number of steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.weights = [parameter.detach().clone() for parameter in parameters]
        self.decay, self.steps = decay, 0
        self._rate = torch.ones((), device=self.weights[0].device)  # read by a captured step

    def advance(self) -> None:
        """Counts a step: before `update`, and on the host, where a captured step does not come."""
        self.steps += 1
        self._rate.fill_(1 - min(self.steps / (self.steps + 9), self.decay) if self.steps > 1 else 1.0)

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        difference = torch._foreach_sub(list(parameters), self.weights)
        torch._foreach_mul_(difference, self._rate)
        torch._foreach_add_(self.weights, difference)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        torch._foreach_copy_(list(parameters), self.weights)


def evaluated_model(
    model: CtrlCscModel, average: AverageOfWeights | None, images: Tensor, batch_size: int
) -> CtrlCscModel:
    """A copy of the model for evaluation: with the averaged weights and batch norms that fit them, if there is an
    average, and with operator norms to within 1%.

    Args:
        images: training images (n, C, H, W) for the batch norms' statistics, pixels in [-1, 1].
        batch_size: images a batch of those.
    """
    evaluated = copy.deepcopy(model)
    if average is not None:
        average.copy_to(evaluated.parameters())
    evaluated.project_parameters()
    if average is not None:
        recompute_statistics(evaluated, images, batch_size)
    return evaluated.eval()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a compiled model would be compiled anew for each momentum below
def recompute_statistics(model: CtrlCscModel, images: Tensor, batch_size: int) -> None:
    """Sets the running statistics of every batch norm to the means over the batches of `images`.

    Batches have the same size up to one image, at most `batch_size`, so that each may count alike.

    Each process does it by itself, with the same images.
    """
    was_training, sum_over_processes = model.training, model.encoder.norms[0].sum_over_processes
    model.share_statistics(None)
    model.train()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for index, batch in enumerate(images.tensor_split(-(-len(images) // batch_size))):
        for norm in norms:
            norm.momentum = 1 / (index + 1)  # a plain mean over batches; the first one replaces what was there
        model(batch.to(model.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)
    model.share_statistics(sum_over_processes)


@torch.no_grad()
def held_out_figures(
    model: CtrlCscModel, images: Tensor, batch_size: int, distortion: float
) -> tuple[dict[str, float], Tensor]:
    """Figures on held-out images (n, C, H, W), and the reconstructions of the first `GRID_IMAGES`, on the CPU.

    PSNR in dB, the mean over images; match, the share of reconstructions whose nearest latent is their own
    original's; R(Z), R(Zh) and dR(Z, Zh) in nats.
    """
    was_training = model.training
    model.eval()
    psnr, latents, reconstructed = [], [], []
    reconstructions: list[Tensor] = []
    for batch in images.split(batch_size):
        batch = batch.to(model.device)
        output = model(batch, output_reconstructed_latents=True, return_dict=True)
        psnr.append(peak_signal_to_noise_ratio(batch, output.reconstruction))
        latents.append(output.latents)
        reconstructed.append(output.reconstructed_latents)
        if len(reconstructions) * batch_size < GRID_IMAGES:
            reconstructions.append(output.reconstruction.cpu())
    model.train(was_training)
    z, zh = torch.cat(latents), torch.cat(reconstructed)
    figures = {
        "held_out_psnr": torch.cat(psnr).mean().item(),
        "held_out_match": nearest_latent_match(z, zh),
        "held_out_rate": coding_rate(z, distortion=distortion).item(),
        "held_out_reconstructed_rate": coding_rate(zh, distortion=distortion).item(),
        "held_out_rate_reduction": rate_reduction(z, zh, distortion=distortion).item(),
    }
    return figures, torch.cat(reconstructions)[:GRID_IMAGES]
