"""A denoiser of photographs of any size: one stage of convolutional sparse coding, unrolled and trained to denoise.

Janjusevic, Khalilian-Gourtani and Wang, "CDLNet: Noise-Adaptive Convolutional Dictionary Learning Network for Blind
Denoising and Demosaicing", IEEE Open Journal of Signal Processing 3, 2022 (arXiv 2112.00913).

    image y - low pass -> z_0 = 0, z_{t+1} = shrink(z_t - A_t*(B_t(z_t) - y), tau_t) -> low pass + D(z_T)

Each step is one of the proximal gradient method that solves the first stage's program, with lambda in proportion to the
noise: tau_t = a_t + b_t noise_std. This file also runs from a Hub repository.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

FRAME = 4  # pixels by which an image is reflected at its border, so that its border is not that of the codes
FAINT = 2 / 255  # a noise level that is below all it is trained for: at less, less of what it changes is changed
TILE, MARGIN = 512, 64  # in pixels: sides of the tiles of large images, and how much more of the image each sees
COMPLETION_LEVELS, COMPLETION_STEPS = (160 / 127.5, 5 / 127.5), 60  # noise levels, falling geometrically


class CtrlCscDenoiserConfig(PreTrainedConfig):
    """Configuration of `CtrlCscDenoiser`.

    Args:
        num_channels: of the images.
        num_atoms: of each dictionary.
        kernel_size: side of an atom in pixels, a multiple of `stride`, at most 8.
        stride: distance of neighbouring codes in pixels: 1, 2 or 4.
        num_iterations: T, steps of the program.
        num_dictionaries: pairs of A and B. 1 for the same in all steps, T for a pair a step.

    Raises:
        ValueError: for numbers other than the above, and for the configuration of another model.
    """

    model_type = "ctrl_csc_denoiser"

    num_channels: int = 3
    num_atoms: int = 128
    kernel_size: int = 6
    stride: int = 2
    num_iterations: int = 18
    num_dictionaries: int = 18

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # transformers would only warn, and make a new model.
        model_type = config_dict.get("model_type")
        _require(model_type in (None, cls.model_type), "model_type", model_type, f"{cls.model_type!r}")
        loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._check()  # with what was given to `from_pretrained`
        return loaded

    def _check(self) -> None:
        for field in ("num_channels", "num_atoms", "num_iterations", "num_dictionaries"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "a positive integer")
        _require(self.stride in (1, 2, FRAME), "stride", self.stride, f"1, 2 or {FRAME}")
        allowed = f"a positive multiple of stride={self.stride}, at most {2 * FRAME}"
        fits = 1 <= self.kernel_size <= 2 * FRAME and self.kernel_size % self.stride == 0
        _require(fits, "kernel_size", self.kernel_size, allowed)


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r} is not allowed: it must be {allowed}")


class CtrlCscDenoiser(PreTrainedModel):
    """y, noise_std -> an image without noise. Images of any size; pixels and noise_std in units of [-1, 1]."""

    config_class = CtrlCscDenoiserConfig
    main_input_name = "noisy"

    def __init__(self, config: CtrlCscDenoiserConfig) -> None:
        super().__init__(config)
        atoms = (config.num_atoms, config.num_channels, config.kernel_size, config.kernel_size)
        self.analysis = nn.Parameter(torch.empty(config.num_dictionaries, *atoms))  # A_t, the step size in it
        self.synthesis = nn.Parameter(torch.empty(config.num_dictionaries, *atoms))  # B_t
        self.dictionary = nn.Parameter(torch.empty(atoms))  # D
        self.thresholds = nn.Parameter(torch.empty(config.num_iterations, 2, config.num_atoms))  # a_t and b_t
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """All dictionaries the same, of norm 1 as an operator, as CDLNet's."""
        if isinstance(module, CtrlCscDenoiser):
            nn.init.normal_(module.dictionary)
            module.dictionary.div_(module.operator_norm())
            module.analysis.copy_(module.dictionary)
            module.synthesis.copy_(module.dictionary)
            nn.init.constant_(module.thresholds[:, 0], 1e-3)
            nn.init.constant_(module.thresholds[:, 1], 1e-2)

    def operator_norm(self, side: int = 64, steps: int = 50) -> Tensor:
        """The largest singular value of D on signals of this side, by power iteration."""
        atoms = F.pixel_unshuffle(self.dictionary, self.config.stride)
        signal = torch.cos(torch.arange(atoms.shape[1] * side**2, dtype=atoms.dtype) ** 2 * 0.7)
        signal = signal.view(1, -1, side, side).to(atoms)
        for _ in range(steps):
            codes = F.conv2d(signal / signal.norm(), atoms)
            signal = F.conv_transpose2d(codes, atoms)
        return codes.norm()

    def forward(self, noisy: Tensor, noise_std: Tensor, low: Tensor | None = None) -> Tensor:
        """
        Args:
            noisy: y (n, C, H, W), pixels in [-1, 1] with noise, which need not be clipped.
            noise_std: (n,), the standard deviation of the noise.
            low: (n, C, 1, 1), what is taken out before coding and put back; by default the image's mean.

        Returns:
            (n, C, H, W), not clipped either.
        """
        config = self.config
        low = noisy.mean(dim=(2, 3), keepdim=True) if low is None else low
        signal = _framed(noisy - low, config.stride)
        blocks = F.pixel_unshuffle(signal, config.stride).contiguous(memory_format=torch.channels_last)
        analysis, synthesis = (self._in_blocks(atoms) for atoms in (self.analysis, self.synthesis))
        thresholds = self.thresholds[:, 0, None] + self.thresholds[:, 1, None] * noise_std[:, None]
        thresholds = thresholds[..., None, None]  # [T, n, atoms, 1, 1]

        codes = _SoftThreshold.apply(F.conv2d(blocks, analysis[0]), thresholds[0])
        for step in range(1, config.num_iterations):
            pair = step * config.num_dictionaries // config.num_iterations
            residual = blocks - F.conv_transpose2d(codes, synthesis[pair])
            codes = _SoftThreshold.apply(F.conv2d(residual, analysis[pair]).add_(codes), thresholds[step])
        with torch.autocast(noisy.device.type, enabled=False):
            detail = F.conv_transpose2d(codes.to(noisy.dtype), F.pixel_unshuffle(self.dictionary, config.stride))
            detail = F.pixel_shuffle(detail, config.stride)
            return low + detail[..., FRAME : FRAME + noisy.shape[-2], FRAME : FRAME + noisy.shape[-1]]

    @torch.no_grad()
    def denoise(self, noisy: Tensor, noise_std: float) -> Tensor:
        """`forward` in little memory: large images in tiles, each with `MARGIN` more pixels around than it yields.

        Towards a noise level of 0 the result is the image itself.

        Args:
            noisy: (n, C, H, W), of any size.
            noise_std: of all images.

        Raises:
            ValueError: for a `noise_std` that is not positive and finite.
        """
        if not 0 < noise_std < float("inf"):
            raise ValueError(
                f"noise_std must be a finite number above 0, in units of pixels in [-1, 1], got {noise_std!r}"
            )
        levels, low = noisy.new_full((len(noisy),), noise_std), noisy.mean(dim=(2, 3), keepdim=True)
        share = min(1.0, noise_std / FAINT)
        denoised = torch.empty_like(noisy)
        for top in range(0, noisy.shape[2], TILE):
            for left in range(0, noisy.shape[3], TILE):
                above, before = min(top, MARGIN), min(left, MARGIN)  # even, as the stride wants
                seen = noisy[..., top - above : top + TILE + MARGIN, left - before : left + TILE + MARGIN]
                tile = self(seen, levels, low)[..., above : above + TILE, before : before + TILE]
                part = noisy[..., top : top + TILE, left : left + TILE]
                denoised[..., top : top + TILE, left : left + TILE] = part.lerp(tile, share)
        return denoised

    @torch.no_grad()
    def inpaint(self, image: Tensor, missing: Tensor) -> Tensor:
        """The image completed: its missing pixels are denoised again and again, as if with less and less noise.

        A denoiser is the proximal map of what it knows about images, here in place of that of lambda |z|_1: proximal
        steps under the constraint that known pixels stay (plug-and-play priors, Venkatakrishnan et al. 2013).

        Args:
            image: (n, C, H, W) of any size, pixels in [-1, 1], of any value where missing.
            missing: bool (n, 1, H, W), not all of an image.
        """
        known = ~missing
        completed = image.where(known, 0).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True)
        completed = image.where(known, completed)
        first, last = COMPLETION_LEVELS
        for step in range(COMPLETION_STEPS):
            noise_std = first * (last / first) ** (step / (COMPLETION_STEPS - 1))
            completed = image.where(known, self.denoise(completed, noise_std))
        return completed

    def _in_blocks(self, atoms: Tensor) -> tuple[Tensor, ...]:
        blocks = F.pixel_unshuffle(atoms.flatten(0, 1), self.config.stride)
        return tuple(b.contiguous(memory_format=torch.channels_last) for b in blocks.chunk(len(atoms)))

    @torch.no_grad()
    def project_parameters(self) -> None:
        """Thresholds are at least 0."""
        self.thresholds.clamp_(min=0)


class _SoftThreshold(torch.autograd.Function):
    """sign(z) max(|z| - tau, 0), of codes (n, atoms, h, w) and tau (n, atoms, 1, 1); fewer passes than by autograd."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, threshold: Tensor) -> Tensor:
        threshold = threshold.to(codes.dtype)
        shrunk = codes - torch.clamp(codes, -threshold, threshold)
        ctx.save_for_backward(shrunk)
        return shrunk

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (shrunk,), (gradient,) = ctx.saved_tensors, gradients
        signs = shrunk.sign()
        of_threshold = (gradient * signs).sum(dim=(2, 3), keepdim=True, dtype=torch.float32)
        return torch.where(signs != 0, gradient, 0), of_threshold.neg()


def _framed(image: Tensor, stride: int) -> Tensor:
    """The image and its reflection around it: `FRAME` pixels, and at the end as many more as make sides multiples of
    the stride. Of images smaller than the frame, the reflection of the reflection.
    """
    for dim in (2, 3):
        side = image.shape[dim]
        index = torch.arange(-FRAME, side + FRAME + -side % stride, device=image.device)
        period = torch.full((), max(2 * (side - 1), 1), device=image.device)  # no number, which ONNX wants fixed
        index = (index % period).minimum(-index % period)
        image = image.index_select(dim, index)
    return image


# `save_pretrained` writes this file beside the weights, too, and where in it AutoModel finds the class.
CtrlCscDenoiserConfig.register_for_auto_class()
CtrlCscDenoiser.register_for_auto_class("AutoModel")

__all__ = ["CtrlCscDenoiser", "CtrlCscDenoiserConfig"]
