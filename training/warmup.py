"""Before the game: dictionaries learned from the sparse-coding energy of images alone, and a decoder that inverts f.

The game then begins with reconstructions that have their image's layout, which a decoder with random dictionaries
has to find first, against an encoder that moves on.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.distributed import sum_gradients, sum_over_processes


def learn_dictionaries(
    accelerator: Accelerator,
    model: CtrlCscModel,
    batches: Iterable[Tensor],
    steps: int,
    learning_rate: float,
    is_interrupted: Callable[[], bool],
) -> bool:
    """Adam on E, the sparse-coding energy of the encoder's stages, with a learning rate that falls to zero.

    Args:
        accelerator: gives the precision.
        batches: images (n, C, H, W), pixels in [-1, 1]; `steps` of them are taken. Over several processes, its part.
        is_interrupted: asked before each step whether to stop.

    Returns:
        Whether it came to its end.
    """
    optimizer = torch.optim.Adam(model.encoder.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    parameters = list(model.encoder.parameters())
    progress = tqdm(total=steps, desc="sparse-coding energy", disable=not accelerator.is_main_process)
    for _, images in zip(range(steps), batches, strict=False):
        if is_interrupted():
            progress.close()
            return False
        count = sum_over_processes(torch.tensor(len(images), device=images.device))
        with accelerator.autocast():
            energy = model.encoder(images, output_energy=True).energy.sum() / count
        energy.backward()
        sum_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        model.project_parameters()
        progress.update()
        progress.set_postfix_str(f"E {sum_over_processes(energy.detach()).item():.3f}")
    progress.close()
    return True


@torch.no_grad()
def invert_encoder(model: CtrlCscModel, images: Tensor) -> None:
    """Gives the decoder the encoder's dictionaries, and batch norms that undo the encoder's on these images.

    Args:
        images: (n, C, H, W), pixels in [-1, 1].
    """
    encoder, decoder = model.encoder, model.decoder
    for own, theirs in zip((*decoder.stages, decoder.last_stage), (*encoder.stages, encoder.last_stage), strict=True):
        own.dictionary.copy_(theirs.dictionary)
    if model.config.decoder_normalization == "inverse":
        return
    *sizes, _ = model.config.signal_sizes
    vector = encoder(images).latents[:, :, None, None] * encoder.latent_norm
    signal = decoder.last_stage.synthesize(vector, (sizes[-1], sizes[-1]))
    for index in reversed(range(len(sizes) - 1)):
        own, theirs = decoder.norms[index], encoder.norms[index]
        inverted = theirs.inverse(signal)
        # A batch norm's output has its bias as mean and its weight as deviation.
        own.bias.copy_(inverted.mean(dim=(0, 2, 3)))
        own.weight.copy_(inverted.std(dim=(0, 2, 3), correction=0) * theirs.weight.sign())
        signal = decoder.stages[index].synthesize(F.relu(inverted), (sizes[index], sizes[index]))
