"""What this package is timed against, written from the mathematics; no line of it comes from elsewhere.

`looped_multiclass_objective`  CTRL-Multi with one logdet a class and set in a Python loop, as in the loss of the CTRL
                               authors' public trainer (Dai et al., Entropy 24(4):456, 2022).
`two_phase_step`               that trainer's step: two encodings and a decoding for the encoder's update, then all of
                               it again for the decoder's, with gradients of all parameters in both phases.
`encode_plainly`               FISTA as a plain loop with what the public SDNet layer (Dai et al., NeurIPS 2022, arXiv
                               2210.12945) does besides: atoms normalised and the energy computed in every forward pass,
                               the proximal map in two passes over the codes.
`bare_convolutions`            no rival: the convolutions that the mathematics of a stage cannot do without, alone.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrl_csc_hf import ConvolutionalSparseCoding, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoopObjective

STEP_FACTOR = 0.9  # of 1 / |A|^2, as SDNet's


def looped_multiclass_objective(
    features: Tensor, reconstructed: Tensor, labels: Tensor, num_classes: int, distortion: float = 0.5
) -> Tensor:
    """dR(Z | y) + dR(Zh | y) + sum_k dR(Z_k, Zh_k) of features (n, d), in nats; empty classes are skipped."""

    def rate(rows: Tensor) -> Tensor:
        count, dim = rows.shape
        identity = torch.eye(dim, dtype=rows.dtype, device=rows.device)
        return torch.logdet(identity + dim / (count * distortion) * rows.T @ rows) / 2

    total = rate(features) + rate(reconstructed)
    for label in range(num_classes):
        members = labels == label
        if not members.any():
            continue
        rates = [rate(rows[members]) for rows in (features, reconstructed)]
        union = rate(torch.cat([features[members], reconstructed[members]]))
        total = total - members.sum() / len(labels) * (rates[0] + rates[1]) + union - (rates[0] + rates[1]) / 2
    return total


def two_phase_step(
    model: CtrlCscModel,
    objective: ClosedLoopObjective,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor | None,
) -> None:
    """One step of both players, 12 passes of the encoder and 4 of the decoder, a backward pass counted as two.

    Reconstructions are normalised by the images' statistics, as in our step.
    """
    for optimizer, sign in zip(optimizers, (-1, 1), strict=True):
        for player in optimizers:
            player.zero_grad(set_to_none=True)
        z = model.encoder(images).latents
        xh = model.decoder(z).reconstruction
        again = {"update_statistics": False, "reuse_statistics": True}
        zh = model.encoder(xh.detach() if sign < 0 else xh, **again).latents
        utility, _ = objective.utility(z, zh, labels)
        (sign * utility).backward()
        optimizer.step()
    model.project_parameters(refine=False)


def with_plain_stages(model: CtrlCscModel) -> CtrlCscModel:
    """The model, its encoder's stages replaced by `encode_plainly`."""
    for stage in model.encoder.stages:
        stage.encode = partial(_codes_only, stage)
    return model


def _codes_only(stage: ConvolutionalSparseCoding, signal: Tensor) -> Tensor:
    return encode_plainly(stage, signal)[0]


def encode_plainly(stage: ConvolutionalSparseCoding, signal: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and energy (n,) of non-negative sparse coding, by the same steps as the stage's own."""
    geometry = {"stride": stage.stride, "padding": stage.padding}
    surplus = [(side + 2 * stage.padding - stage.kernel_size) % stage.stride for side in signal.shape[-2:]]
    atoms = stage.dictionary / torch.linalg.vector_norm(stage.dictionary, dim=(1, 2, 3), keepdim=True)
    step = STEP_FACTOR / stage.operator_norm.square()

    def residual(codes: Tensor) -> Tensor:
        return signal - F.conv_transpose2d(codes, atoms, output_padding=surplus, **geometry)

    def proximal(codes: Tensor) -> Tensor:
        shrunk = F.relu(codes - step * stage.sparsity)
        return shrunk / (1 + step * stage.ridge)

    codes = previous = proximal(step * F.conv2d(signal, atoms, **geometry))
    momentum = 1.0
    for _ in range(stage.num_iterations - 1):
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        extrapolated = codes + (momentum - 1) / next_momentum * (codes - previous)
        previous, momentum = codes, next_momentum
        codes = proximal(extrapolated + step * F.conv2d(residual(extrapolated), atoms, **geometry))
    prior = stage.sparsity * codes.abs() + stage.ridge / 2 * codes.square()
    energy = prior.flatten(1).sum(dim=1) + residual(codes).square().flatten(1).sum(dim=1) / 2
    return codes, energy


def bare_convolutions(stage: ConvolutionalSparseCoding, signal: Tensor, codes: Tensor) -> Callable[[], None]:
    """A function that runs the convolutions of one forward and backward pass of the stage, on any numbers.

    T adjoints and T - 1 syntheses, and of each the gradients of its input and of the dictionary: 6 T - 3 convolutions,
    by torch's own kernels in the memory format that the stage uses.
    """
    layout = {"memory_format": torch.channels_last}
    signal, codes = signal.detach().contiguous(**layout), codes.detach().contiguous(**layout)
    atoms = stage.dictionary.detach().contiguous(**layout)
    stride, padding = [stage.stride] * 2, [stage.padding] * 2
    surplus = [(side + 2 * stage.padding - stage.kernel_size) % stage.stride for side in signal.shape[-2:]]

    def backward(gradient: Tensor, inputs: Tensor, transposed: bool) -> None:
        rest = surplus if transposed else [0, 0]
        torch.ops.aten.convolution_backward(
            gradient, inputs, atoms, None, stride, padding, [1, 1], transposed, rest, 1, [True, True, False]
        )

    def run() -> None:
        for iteration in range(stage.num_iterations):
            F.conv2d(signal, atoms, None, stride, padding)
            backward(codes, signal, False)
            if iteration:
                F.conv_transpose2d(codes, atoms, None, stride, padding, surplus)
                backward(signal, codes, True)

    return run
