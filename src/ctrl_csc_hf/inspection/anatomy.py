"""What is inside a model: its atoms in pixels, what each of them adds to an image, its latent space. No pictures.

Stages are counted as the paper counts them, from pixels inwards: stage 1 explains pixels, stage l the codes of stage
l - 1, and the last, L + 1, is linear; its codes are the latents. Of every stage the decoder makes codes too,
u_l = relu(norm_l(A_{l+1} u_{l+1})) with u_{L+1} = z, and xh = tanh(affine(A_1 u_1)).

All functions take models in evaluation mode, where normalisation is an affine map.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.modeling_ctrl_csc import CtrlCscDecoder, CtrlCscEncoder
from ..models.sparse_coding import ConvolutionalDictionary

ATOMS_AT_ONCE = 64  # that are synthesised in one batch
IMAGES_AT_ONCE = 64


def num_stages(half: CtrlCscEncoder | CtrlCscDecoder) -> int:
    """L + 1, the last, linear stage included."""
    return len(half.stages) + 1


@torch.no_grad()
def atoms_in_pixels(half: CtrlCscEncoder | CtrlCscDecoder, stage: int) -> Tensor:
    """A_1 A_2 ... A_l e_k for every atom k of stage l: atoms carried down to pixels by the dictionaries alone.

    The norms and relus between the stages are left out: relu has no meaning without the rest of an image, and a
    norm weighs the channels of its stage, by factors that `contributions` takes into account. Stage 1 gives the
    atoms themselves; with `low_pass`, the atoms of the stages above carry a part of the low pass. The code stands
    in the middle of its map; of the image, only the square that it can reach is kept.

    Args:
        half: encoder or decoder, whose dictionaries are taken.
        stage: l, from 1 to L + 1.

    Returns:
        (number of atoms, num_channels, a, a), a at most `image_size`; unit norm at stage 1, any norm above.

    Raises:
        ValueError: for a stage that does not exist.
    """
    _check_stage(half, stage)
    sizes = half.config.signal_sizes
    atoms = _dictionary(half, stage).code_channels
    middle = sizes[stage] // 2
    start, end = middle, middle + 1
    for lower in range(stage, 0, -1):
        dictionary = _dictionary(half, lower)
        start = max(start * dictionary.stride - dictionary.padding, 0)
        end = (end - 1) * dictionary.stride - dictionary.padding + dictionary.kernel_size
        end = min(end, sizes[lower - 1])
    pictures = []
    for chosen in _batches(atoms):
        signal = half.last_stage.dictionary.new_zeros(len(chosen), atoms, sizes[stage], sizes[stage])
        signal[torch.arange(len(chosen)), chosen, middle, middle] = 1
        for lower in range(stage, 0, -1):
            dictionary = _dictionary(half, lower)
            signal, low = signal[:, : dictionary.code_channels], signal[:, dictionary.code_channels :]
            signal = dictionary.synthesize(signal, (sizes[lower - 1], sizes[lower - 1]))
        if low.shape[1]:
            signal = signal * half.signal_unit + half.stages[0].interpolate(low, (sizes[0], sizes[0]))
        pictures.append(signal[:, :, start:end, start:end])
    return torch.cat(pictures)


@torch.no_grad()
def decoder_codes(decoder: CtrlCscDecoder, latents: Tensor) -> tuple[Tensor, ...]:
    """u_1, ..., u_L, u_{L+1} = z: the codes of every stage that the decoder makes of latents (n, d).

    Returns:
        of stage l (n, atoms, h_l, w_l); non-negative but for the latents, (n, d, 1, 1).

    Raises:
        ValueError: for latents of another shape, and in training mode.
    """
    last = num_stages(decoder)
    codes = [_as_codes(decoder, latents)]

    def record(signal: Tensor, _: int) -> Tensor:
        codes.append(F.relu(signal))
        return codes[-1]

    _decode(decoder, codes[0], last, record)
    return tuple(reversed(codes))


@torch.no_grad()
def decode_from(decoder: CtrlCscDecoder, codes: Tensor, stage: int) -> Tensor:
    """Decodes the codes of a stage from there on: they stand in the place of u_l.

    Codes of the encoder are codes of the same atoms only where both halves share their dictionaries; elsewhere what
    comes out shows how far training has made them alike. With `low_pass` the codes of stage 1 lack the low pass, and so
    do the pixels.

    Args:
        codes: of that stage (n, atoms, h_l, w_l), of the encoder or the decoder.
        stage: l, from 1 to L + 1; the codes of L + 1 are latents (n, d, 1, 1).

    Returns:
        pixels (n, num_channels, image_size, image_size) in [-1, 1].

    Raises:
        ValueError: for a stage that does not exist, codes of another shape, and in training mode.
    """
    _check_stage(decoder, stage)
    side = decoder.config.signal_sizes[stage]
    expected = (_dictionary(decoder, stage).code_channels, side, side)
    if codes.ndim != 4 or codes.shape[1:] != expected:
        raise ValueError(
            f"codes must have shape (n, {', '.join(map(str, expected))}) at stage {stage}, got {tuple(codes.shape)}"
        )
    return torch.tanh(_decode(decoder, codes, stage, lambda signal, _: F.relu(signal)))


@torch.no_grad()
def contributions(decoder: CtrlCscDecoder, latents: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """What each atom of a stage adds to the reconstruction of one image, before tanh.

    With the relu masks u_j > 0 of this image frozen, below stage l, the decoder is an affine map of u_l. Its linear
    part, applied to the codes of one atom, is that atom's contribution; its value at u_l = 0 is the bias, what the
    norms' and the output's biases make. All contributions and the bias add up to atanh(xh); with
    `low_pass`, at stage 1, to that less the low pass.

    Args:
        latents: of one image (1, d).
        stage: l, from 1 to L + 1.

    Returns:
        contributions (atoms, num_channels, image_size, image_size) and bias (num_channels, image_size, image_size).

    Raises:
        ValueError: for a stage that does not exist, latents of another shape, and in training mode.
    """
    _check_stage(decoder, stage)
    if len(latents) != 1:
        raise ValueError(f"latents must be those of one image, (1, d), got {tuple(latents.shape)}")
    all_codes = decoder_codes(decoder, latents)
    masks = [codes > 0 for codes in all_codes[: stage - 1]]
    codes = all_codes[stage - 1][0]

    def masked(signal: Tensor, lower: int) -> Tensor:
        return signal * masks[lower - 1]

    bias = _decode(decoder, torch.zeros_like(codes)[None], stage, masked)[0]
    parts = []
    for chosen in _batches(len(codes)):
        alone = codes.new_zeros(len(chosen), *codes.shape)
        alone[torch.arange(len(chosen)), chosen] = codes[chosen]
        parts.append(_decode(decoder, alone, stage, masked, biases=False))
    return torch.cat(parts), bias


def leading_atoms(contributions: Tensor) -> Tensor:
    """Which atom explains which region: of every pixel (H, W) the atom that contributes most around it.

    Most in energy, over the channels and a square window of an eighth of the image.

    Args:
        contributions: (atoms, num_channels, H, W).
    """
    window = contributions.shape[-1] // 8 // 2 * 2 + 1
    energy = contributions.square().sum(dim=1, keepdim=True)
    return F.avg_pool2d(energy, window, 1, window // 2, count_include_pad=False).argmax(dim=0)[0]


def keep_largest(codes: Tensor, count: int) -> Tensor:
    """Codes (n, atoms, h, w) with all but the `count` entries of largest magnitude, of each image, set to zero.

    Raises:
        ValueError: for a count below 1 or above the entries of an image.
    """
    entries = codes.flatten(1)
    if not 1 <= count <= entries.shape[1]:
        raise ValueError(f"count must be between 1 and the {entries.shape[1]} entries of an image, got {count}")
    kept = entries.abs().topk(count, dim=1).indices
    return torch.zeros_like(entries).scatter(1, kept, entries.gather(1, kept)).view_as(codes)


def energy_shares(codes: Tensor) -> Tensor:
    """Each atom's share of the energy |z|^2 of codes (n, atoms, h, w): (atoms,), adding up to 1; 0 without energy."""
    return _shares(codes.square().sum(dim=(0, 2, 3)))


@torch.no_grad()
def atom_use(decoder: CtrlCscDecoder, latents: Tensor) -> list[Tensor]:
    """Of every stage, each atom's share (atoms,) of the energy of the codes that the decoder makes of latents (n, d).

    Raises:
        ValueError: as of `decoder_codes`.
    """
    batches = []
    for batch in latents.split(IMAGES_AT_ONCE):
        batches.append([codes.square().sum(dim=(0, 2, 3)) for codes in decoder_codes(decoder, batch)])
    return [_shares(torch.stack(energies).sum(dim=0)) for energies in zip(*batches, strict=True)]


def spectrum(latents: Tensor) -> Tensor:
    """Singular values of Z / sqrt(n), descending, (min(n, d),): latents (n, d).

    Their squares are the eigenvalues of the second moment Z^T Z / n, and add up to 1 for unit latents.
    """
    return torch.linalg.svdvals(latents.float()) / len(latents) ** 0.5


def principal_directions(latents: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean direction of a set of latents, and the directions in which it spreads most around it.

    Args:
        latents: Z (n, d), unit vectors, such as those of one class.
        count: number of directions, below n and d.

    Returns:
        m (d,), the mean of Z scaled to unit length; the first right singular vectors v (count, d) of Z - (Z m) m^T,
        orthogonal to m and each other, their largest entry positive; and each one's share (count,) of the energy of
        that difference.

    Raises:
        ValueError: for a count out of range, and for latents whose mean is zero.
    """
    size, dim = latents.shape
    if not 1 <= count < min(size, dim):
        raise ValueError(f"count must be at least 1 and less than n and d of latents {(size, dim)}, got {count}")
    latents = latents.float()
    mean = latents.mean(dim=0)
    if mean.norm() < 1e-6:
        raise ValueError("latents must not cancel out: their mean is zero and has no direction")
    mean = mean / mean.norm()
    _, values, directions = torch.linalg.svd(latents - torch.outer(latents @ mean, mean), full_matrices=False)
    shares = _shares(values.square())
    directions = directions[:count]
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    return mean, directions * signs, shares[:count]


def walk(start: Tensor, direction: Tensor, angles: Tensor) -> Tensor:
    """Along the sphere: cos(t) start + sin(t) direction for every angle t, in radians, (number of angles, d).

    Args:
        start, direction: (d,), orthogonal unit vectors.
        angles: (number of angles,).
    """
    return torch.outer(angles.cos(), start) + torch.outer(angles.sin(), direction)


def _decode(
    decoder: CtrlCscDecoder,
    codes: Tensor,
    stage: int,
    activate: Callable[[Tensor, int], Tensor],
    *,
    biases: bool = True,
) -> Tensor:
    """Pixels before tanh from codes of a stage.

    Args:
        activate: stands for relu; it takes what has been normalised, and the stage whose codes that becomes.
        biases: whether to add the shifts of the norms and the output. Without them, and with a linear `activate`, this
            is the linear part of the map, free of the rounding that subtracting its value at zero would leave.
    """
    if decoder.training:
        raise ValueError("decoder must be in evaluation mode, got one in training: call its eval()")
    low = None
    for lower in range(stage - 1, 0, -1):
        side, norm = decoder.config.signal_sizes[lower], decoder.norms[lower - 1]
        signal = _dictionary(decoder, lower + 1).synthesize(codes, (side, side))
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        carried = signal * scale[:, None, None] + biases * shift[:, None, None]
        atoms = _dictionary(decoder, lower).code_channels
        codes = activate(carried[:, :atoms], lower)
        low = carried[:, atoms:] if carried.shape[1] > atoms else None  # no relu is on it
    side = decoder.config.image_size
    pixels = decoder.stages[0].synthesize(codes, (side, side)) * decoder.output_scale[:, None, None]
    if low is not None:
        pixels = pixels + decoder.stages[0].interpolate(low, (side, side))
    return pixels + biases * decoder.output_bias[:, None, None]


def _shares(energy: Tensor) -> Tensor:
    return energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)


def _as_codes(decoder: CtrlCscDecoder, latents: Tensor) -> Tensor:
    if latents.ndim != 2 or latents.shape[1] != decoder.config.latent_dim:
        raise ValueError(f"latents must have shape (n, {decoder.config.latent_dim}), got {tuple(latents.shape)}")
    return latents[:, :, None, None]


def _dictionary(half: CtrlCscEncoder | CtrlCscDecoder, stage: int) -> ConvolutionalDictionary:
    return half.last_stage if stage == num_stages(half) else half.stages[stage - 1]


def _check_stage(half: CtrlCscEncoder | CtrlCscDecoder, stage: int) -> None:
    if not 1 <= stage <= num_stages(half):
        raise ValueError(f"stage must be between 1 and {num_stages(half)}, got {stage}")


def _batches(atoms: int) -> Iterator[Tensor]:
    yield from torch.arange(atoms).split(ATOMS_AT_ONCE)
