"""Before the game: dictionaries from the sparse-coding energy of images alone, the principal directions of their codes,
a decoder that inverts f, a fit of both.

The game then begins with reconstructions of their images, which a decoder with random dictionaries has to find first,
against an encoder that moves on.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.objectives.distributed import count_over_processes, sum_gradients, sum_over_processes

from .steps import make_adam, set_learning_rate

CHANNELWISE = (0, 2, 3)
FIT_ITERATIONS = 30


def sparse_coding_energy(model: CtrlCscModel, images: Tensor) -> Tensor:
    """E, the energies of the encoder's stages in all, per pixel: images (n, C, H, W) -> (n,). Not of the decoder.

    Each stage takes its signal as it comes: by the dictionary of a stage that codes little the next one's energy falls.
    """
    energy = model.encode(images, output_energy=True, detach_signals=True).energy
    assert energy is not None
    return energy


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


def hold_stages(model: CtrlCscModel, still: bool) -> None:
    """Whether dictionaries and batch norms of the encoder's sparse-coding stages stand still."""
    for parameter in (*model.encoder.stages.parameters(), *model.encoder.norms.parameters()):
        parameter.requires_grad_(not still)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # nothing is to be compiled for one call on another number of images
def principal_directions(model: CtrlCscModel, images: Tensor, batch_size: int) -> None:
    """Gives the encoder's last stage the principal directions of its signals: the minimum of its energy, as lambda = 0.

    Args:
        images: (n, C, H, W), pixels in [-1, 1]; with fewer than latent_dim of them the atoms that are left stay.
        batch_size: images a batch of those.
    """
    last = model.encoder.last_stage
    batches = []
    for batch in images.split(batch_size):
        codes = model.encode(batch, output_normalized_codes=True, update_statistics=False).normalized_codes
        assert codes is not None
        batches.append(codes[-1].flatten(1))
    signals = torch.cat(batches).float()
    values, vectors = torch.linalg.eigh((signals @ signals.T).double())  # of the n x n matrix: n is the smaller
    count = min(len(last.dictionary), int((values > values[-1] * len(values) * torch.finfo(torch.float32).eps).sum()))
    values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
    atoms = (vectors / values.sqrt()).T.to(signals) @ signals
    last.dictionary[:count] = atoms.view(-1, *last.dictionary.shape[1:])
    last.normalize_atoms()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def invert_encoder(model: CtrlCscModel, images: Tensor) -> None:
    """Gives the decoder the encoder's dictionaries, and an affine map a channel, that make what it has look like what
    the encoder had: batch norms for the codes, the output's for the pixels.

    What passed the latents has lost some of the codes' deviation, and a relu moves the mean of the rest: undoing the
    encoder's batch norms alone would leave codes too dense and too even.

    Args:
        images: (n, C, H, W), pixels in [-1, 1].
    """
    encoder, decoder = model.encoder, model.decoder
    for own, theirs in zip((*decoder.stages, decoder.last_stage), (*encoder.stages, encoder.last_stage), strict=True):
        own.dictionary.copy_(theirs.dictionary)
    *sizes, _ = model.config.signal_sizes
    encoded = model.encode(images, output_codes=True, update_statistics=False)
    assert encoded.codes is not None
    signal = decoder.last_stage.synthesize(encoded.latents[:, :, None, None], (sizes[-1], sizes[-1]))
    low = None
    for index in reversed(range(len(sizes) - 1)):
        norm, codes = decoder.norms[index], encoded.codes[index]
        width = codes.shape[1]
        # A batch norm's output has its bias as mean and its weight as deviation.
        norm.weight[:width], norm.bias[:width], fitted = fit_rectified(signal[:, :width], codes)
        if signal.shape[1] > width:
            original = encoder.stages[0].low_pass(images)
            normalized = standardize(signal[:, width:])
            norm.weight[width:], norm.bias[width:], low = fit_linear(normalized, original)
        signal = decoder.stages[index].synthesize(fitted, (sizes[index], sizes[index]))
    detail = images if low is None else images - decoder.stages[0].interpolate(low, images.shape[-2:])
    scale, bias, _ = fit_linear(signal, detail)
    decoder.output_scale.copy_(scale)
    decoder.output_bias.copy_(bias)


def fit_linear(signal: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight w and bias b (C,) with which w u + b is nearest to the target in each channel, and it: (n, C, h, w)."""
    centred = signal - signal.mean(CHANNELWISE, keepdim=True)
    weight = (centred * target).sum(CHANNELWISE) / centred.square().sum(CHANNELWISE).clamp(min=1e-12)
    bias = target.mean(CHANNELWISE) - weight * signal.mean(CHANNELWISE)
    return weight, bias, signal * weight[:, None, None] + bias[:, None, None]


def fit_rectified(signal: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight w and bias b (C,) with which relu(w u + b) has mean and deviation of the codes in each channel, and it.

    u is the signal (n, C, h, w) less its mean, over its deviation. A fixed-point iteration from the signal's own mean
    and deviation.
    """
    weight, bias = deviation(signal), signal.mean(CHANNELWISE)
    normalized = standardize(signal)
    fitted = F.relu(signal)
    for _ in range(FIT_ITERATIONS):
        weight = weight * (deviation(codes) / deviation(fitted)).clamp(0.5, 2)
        bias = bias + codes.mean(CHANNELWISE) - fitted.mean(CHANNELWISE)
        fitted = F.relu(normalized * weight[:, None, None] + bias[:, None, None])
    return weight, bias, fitted


def standardize(signal: Tensor) -> Tensor:
    """The signal (n, C, h, w) less its mean, over its deviation, in each channel."""
    return (signal - signal.mean(CHANNELWISE, keepdim=True)) / deviation(signal)[:, None, None]


def deviation(signal: Tensor) -> Tensor:
    """Standard deviation of each channel of (n, C, h, w), above 0: (C,)."""
    return signal.std(CHANNELWISE, correction=0).clamp(min=1e-12)
