"""Before the game: dictionaries from the sparse-coding energy of images alone, a decoder that inverts f, a fit of both.

The game then begins with reconstructions of their images, which a decoder with random dictionaries has to find first,
against an encoder that moves on.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from steps import make_adam, set_learning_rate
from torch import Tensor

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.distributed import count_over_processes, sum_gradients, sum_over_processes

CHANNELWISE = (0, 2, 3)
FIT_ITERATIONS = 30


def sparse_coding_energy(model: CtrlCscModel, images: Tensor) -> Tensor:
    """E, the energies of the encoder's stages in all, per pixel: images (n, C, H, W) -> (n,). Not of the decoder."""
    return model.encode(images, output_energy=True).energy


def deconvolution_error(model: CtrlCscModel, images: Tensor) -> Tensor:
    """1/2 |x - g(f(x))|^2 per pixel, the data term of the deconvolution of all stages: (n, C, H, W) -> (n,).

    E sees one stage at a time; what one of them misses is lost to the next.
    """
    reconstruction = model.decode(model.encode(images).latents).reconstruction
    return (images - reconstruction.float()).square().flatten(1).mean(dim=1) / 2


class Descent:
    """Adam on the mean of a loss over a batch, with a learning rate that falls to zero linearly.

    Args:
        loss: one of the two above, of each image; parameters without a gradient are not changed.
        model: whose parameters are learned.
        steps: number of steps.
        learning_rate: of the first step.

    Attributes:
        done: number of steps made.
    """

    def __init__(
        self, loss: Callable[[CtrlCscModel, Tensor], Tensor], model: CtrlCscModel, steps: int, learning_rate: float
    ) -> None:
        self.loss, self.model, self.steps, self.done = loss, model, steps, 0
        self.learning_rate = learning_rate
        self.optimizer = make_adam(model.parameters(), learning_rate)
        self._parameters = list(model.parameters())

    def advance(self) -> None:
        """Counts a step and sets its learning rate: before `step`, on the host, where a captured step does not come."""
        set_learning_rate(self.optimizer, self.learning_rate * (1 - self.done / self.steps))
        self.done += 1

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """One step on images (n, C, H, W), pixels in [-1, 1]; over several processes, on this one's part of them.

        Returns:
            loss: the batch's mean of the loss before the step, a scalar on the device.
        """
        mean_loss = self.loss(self.model, images).sum() / count_over_processes(len(images), images.device)
        mean_loss.backward()
        sum_gradients(self._parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.project_parameters(refine=False)
        torch.clear_autocast_cache()  # which holds the weights of before, for as long as its context lasts
        return {"loss": sum_over_processes(mean_loss.detach())}


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # nothing is to be compiled for one call on another number of images
def invert_encoder(model: CtrlCscModel, images: Tensor) -> None:
    """Gives the decoder the encoder's dictionaries, and batch norms that make its codes look like the encoder's.

    What passed the latents has lost some of the codes' deviation, and a relu moves the mean of the rest: undoing the
    encoder's batch norms alone would leave codes too dense and too even.

    Args:
        images: (n, C, H, W), pixels in [-1, 1].
    """
    encoder, decoder = model.encoder, model.decoder
    for own, theirs in zip((*decoder.stages, decoder.last_stage), (*encoder.stages, encoder.last_stage), strict=True):
        own.dictionary.copy_(theirs.dictionary)
    if model.config.decoder_normalization == "inverse":
        return
    *sizes, _ = model.config.signal_sizes
    encoded = model.encode(images, output_codes=True, update_statistics=False)
    signal = encoded.latents[:, :, None, None] * encoder.latent_norm
    signal = decoder.last_stage.synthesize(signal, (sizes[-1], sizes[-1]))
    for index in reversed(range(len(sizes) - 1)):
        inverted = encoder.norms[index].inverse(signal)
        norm = decoder.norms[index]
        # A batch norm's output has its bias as mean and its weight as deviation.
        weight, bias, codes = fit_rectified(inverted, encoded.codes[index])
        norm.weight.copy_(weight * encoder.norms[index].weight.sign())
        norm.bias.copy_(bias)
        signal = decoder.stages[index].synthesize(codes, (sizes[index], sizes[index]))


def fit_rectified(signal: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight w and bias b (C,) with which relu(w u + b) has mean and deviation of the codes in each channel, and it.

    u is the signal (n, C, h, w) less its mean, over its deviation. A fixed-point iteration from the signal's own mean
    and deviation.
    """
    weight, bias = deviation(signal), signal.mean(CHANNELWISE)
    normalized = (signal - bias[:, None, None]) / weight[:, None, None]
    fitted = F.relu(signal)
    for _ in range(FIT_ITERATIONS):
        weight = weight * (deviation(codes) / deviation(fitted)).clamp(0.5, 2)
        bias = bias + codes.mean(CHANNELWISE) - fitted.mean(CHANNELWISE)
        fitted = F.relu(normalized * weight[:, None, None] + bias[:, None, None])
    return weight, bias, fitted


def deviation(signal: Tensor) -> Tensor:
    """Standard deviation of each channel of (n, C, h, w), above 0: (C,)."""
    return signal.std(CHANNELWISE, correction=0).clamp(min=1e-12)
