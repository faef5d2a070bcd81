"""Before the game: dictionaries learned from the sparse-coding energy of images alone, and a decoder that inverts f.

The game then begins with reconstructions that have their image's layout, which a decoder with random dictionaries
has to find first, against an encoder that moves on.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.distributed import sum_gradients, sum_over_processes

CHANNELWISE = (0, 2, 3)
FIT_ITERATIONS = 30


def learn_dictionaries(
    accelerator: Accelerator,
    model: CtrlCscModel,
    batches: Iterable[Tensor],
    is_interrupted: Callable[[], bool],
    steps: int,
    learning_rate: float,
) -> bool:
    """Adam on E, the sparse-coding energy of the encoder's stages, with a learning rate that falls to zero.

    Args:
        accelerator: gives the precision.
        batches: images (n, C, H, W), pixels in [-1, 1]; `steps` of them are taken. Over several processes, its part.
        is_interrupted: asked before each step whether to stop.
        steps, learning_rate: of Adam.

    Returns:
        Whether it came to its end.
    """

    def energy(images: Tensor) -> Tensor:
        return model.encoder(images, output_energy=True).energy

    parameters = model.encoder.parameters()
    return _descend(accelerator, model, energy, parameters, batches, is_interrupted, steps, learning_rate, "E")


def learn_deconvolution(
    accelerator: Accelerator,
    model: CtrlCscModel,
    batches: Iterable[Tensor],
    is_interrupted: Callable[[], bool],
    steps: int,
    learning_rate: float,
) -> bool:
    """Adam on both nets: 1/2 |x - g(f(x))|^2 per pixel, the data term of the deconvolution of all stages.

    E sees one stage at a time; what one of them misses is lost to the next. Arguments and value as those of
    `learn_dictionaries`.
    """

    def error(images: Tensor) -> Tensor:
        reconstruction = model.decoder(model.encoder(images).latents).reconstruction
        return (images - reconstruction.float()).square().flatten(1).mean(dim=1) / 2

    name = "1/2 |x - g(f(x))|^2"
    return _descend(accelerator, model, error, model.parameters(), batches, is_interrupted, steps, learning_rate, name)


def _descend(
    accelerator: Accelerator,
    model: CtrlCscModel,
    loss_of: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Tensor],
    is_interrupted: Callable[[], bool],
    steps: int,
    learning_rate: float,
    name: str,
) -> bool:
    """Adam on the mean over the batch of `loss_of(images)` (n,); whether it came to its end."""
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    progress = tqdm(total=steps, desc=f"before the game: {name}", disable=not accelerator.is_main_process)
    for _, images in zip(range(steps), batches, strict=False):
        if is_interrupted():
            progress.close()
            return False
        count = sum_over_processes(torch.tensor(len(images), device=images.device))
        with accelerator.autocast():
            loss = loss_of(images).sum() / count
        loss.backward()
        sum_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        model.project_parameters()
        progress.update()
        progress.set_postfix_str(f"{sum_over_processes(loss.detach()).item():.4f}")
    progress.close()
    return True


@torch.no_grad()
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
    encoded = encoder(images, output_codes=True, update_statistics=False)
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
