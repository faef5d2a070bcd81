"""Denoising and completion: what the loop makes of a damaged image, and a sparse code of what it leaves unexplained.

Both rest on `explain`: an estimate of the image plus A(z), the sparse code z of the image's known pixels less the
estimate, with the first stage's dictionary A and any lambda. This file also runs from a Hub repository.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DENOISING_ITERATIONS = 32
NOISE_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.5)  # standard deviations, of pixels in [-1, 1]
DEFAULT_RATIO = 3.0  # lambda / noise_std^2 before calibration
RATIOS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # tried in calibration
COMPLETION_ITERATIONS = 8
COMPLETION_ROUNDS = 2


def explain(
    stage: Any,
    image: Tensor,
    estimate: Tensor,
    *,
    known: Tensor | None = None,
    sparsity: float | None = None,
    num_iterations: int,
) -> Tensor:
    """estimate + A(z), z = argmin_{z >= 0} lambda |z|_1 + mu/2 |z|^2 + 1/2 |M (image - estimate - A(z))|^2.

    Args:
        stage: a `ConvolutionalSparseCoding` of pixels.
        image, estimate: (n, C, H, W).
        known: M, bool (n, 1, H, W), of the pixels that count; by default all.
        sparsity: lambda; by default the stage's.
        num_iterations: steps of FISTA.
    """
    codes = stage.solve(image - estimate, known=known, sparsity=sparsity, num_iterations=num_iterations)
    return estimate + stage.synthesize(codes, image.shape[-2:])


def denoise(model: Any, noisy: Tensor, sparsity: float) -> Tensor:
    """xh(y) + A(z), the loop's reconstruction of y and a sparse code of the rest.

    Args:
        model: a `CtrlCscModel`.
        noisy: y (n, 3, image_size, image_size), pixels in [-1, 1] with noise.
        sparsity: lambda. Towards 0 the result is y, as far as the dictionary reaches; from max A*(y - xh(y)) on it
            is xh(y).
    """
    reconstruction = model(noisy, return_dict=True).reconstruction
    return explain(
        model.encoder.stages[0], noisy, reconstruction, sparsity=sparsity, num_iterations=DENOISING_ITERATIONS
    )


def denoising_sparsity(config: Any, noise_std: float) -> float:
    """The lambda that belongs to a noise level: lambda / noise_std^2 is interpolated between the calibrated levels.

    The most probable code under Gaussian noise and a density ~ exp(-z / b) of codes has lambda = noise_std^2 / b.

    Raises:
        ValueError: for a `noise_std` that is not positive and finite.
    """
    if not 0 < noise_std < float("inf"):
        raise ValueError(f"noise_std must be a finite number above 0, in units of pixels in [-1, 1], got {noise_std!r}")
    if config.denoising_sparsity is None:
        return DEFAULT_RATIO * noise_std**2
    levels, sparsities = np.asarray(config.denoising_sparsity, dtype=np.float64).T
    return float(np.interp(noise_std, levels, sparsities / levels**2) * noise_std**2)


@torch.no_grad()
def calibrate_denoising(model: Any, clean: Tensor, noise_std: Sequence[float]) -> list[list[float]]:
    """Pairs [noise_std, lambda]: of `RATIOS` times noise_std^2 the lambda whose denoised images have the highest PSNR.

    Args:
        model: a `CtrlCscModel`.
        clean: (n, 3, image_size, image_size), pixels in [-1, 1] without noise, of images it was not trained on.
        noise_std: noise levels, rising. The noise is the same in each call.

    Raises:
        ValueError: for levels that are not positive, finite and rising.
    """
    levels = [float(level) for level in noise_std]
    if not levels or levels != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < float("inf"):
        raise ValueError(f"noise_std must be finite numbers above 0, rising, got {list(noise_std)}")
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    pairs = []
    for level in levels:
        noisy = (clean + level * noise).clamp(-1, 1)  # as images hold it
        scores = {ratio * level**2: psnr(denoise(model, noisy, ratio * level**2), clean).mean() for ratio in RATIOS}
        pairs.append([level, max(scores, key=lambda sparsity: float(scores[sparsity]))])
    return pairs


def psnr(images: Tensor, clean: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (n,), of pixels clipped to [-1, 1].

    Args:
        where: bool (n, 1, H, W), the pixels that count, at least one an image; by default all.
    """
    squares = ((images.float().clamp(-1, 1) - clean.float()) / 2).square()
    weights = torch.ones_like(squares) if where is None else where.expand_as(squares).float()
    return -10 * torch.log10((squares * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1))


def inpaint(model: Any, image: Tensor, missing: Tensor) -> Tensor:
    """The loop's reconstruction xh of the completed image, (n, 3, image_size, image_size).

    An estimate is explained from the known pixels and fills in the missing ones; what the loop makes of that is the
    next estimate. The first is the known pixels' mean. Nothing missing gives the plain reconstruction.

    Args:
        model: a `CtrlCscModel`.
        image: (n, 3, image_size, image_size), pixels in [-1, 1], of any value where missing.
        missing: bool (n, 1, image_size, image_size), not all of an image.
    """
    known, stage = ~missing, model.encoder.stages[0]
    sparsity = stage.sparsity * model.encoder.signal_unit  # of residuals in pixels
    estimate = image.where(known, 0).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True)
    estimate = estimate.expand_as(image)
    for _ in range(COMPLETION_ROUNDS):
        explained = explain(
            stage, image, estimate, known=known, sparsity=sparsity, num_iterations=COMPLETION_ITERATIONS
        )
        estimate = model(explained.where(missing, image), return_dict=True).reconstruction
    return estimate


def missing_pixels(mask: Any, image: Any, pixel_values: Tensor, processor: Any) -> Tensor:
    """Masks of any form, see `CtrlCscPipeline.inpaint`, of the pixels that the model sees: bool (n, 1, H, W).

    Args:
        mask: of the model's size, or of the images' own.
        image: the images, as the processor takes them.
        pixel_values: (n, 3, H, W), what the processor makes of them.
        processor: a `CtrlCscImageProcessor`.

    Raises:
        ValueError: for another size, number or content, and for an image of which nothing is known.
        TypeError: for what is no mask.
    """
    count, size = len(pixel_values), tuple(pixel_values.shape[-2:])
    masks = _list_masks(mask, count)
    if any(one.shape != size for one in masks):
        originals = processor(image, do_resize=False, do_center_crop=False).pixel_values
        sizes = [tuple(original.shape[-2:]) for original in originals]
        for index, own in enumerate(sizes):
            received = masks[index % len(masks)].shape
            if received not in (size, own):
                raise ValueError(
                    f"mask must have the size of image {index}, {own}, or the model's, {size}, got {received}"
                )
        masks = [one if one.shape == size else _as_the_model_sees(one, processor) for one in masks]
    _check_something_known(masks)
    return torch.from_numpy(np.stack(masks))[:, None].expand(count, 1, *size)


def missing_pixels_of_each(mask: Any, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Masks of any form of images in their own sizes (height, width): bool (1, height, width) of each.

    Raises:
        ValueError: for another size, number or content, and for an image of which nothing is known.
        TypeError: for what is no mask.
    """
    masks = _list_masks(mask, len(sizes))
    masks = masks * (len(sizes) // len(masks))
    for index, (one, own) in enumerate(zip(masks, sizes, strict=True)):
        if one.shape != own:
            raise ValueError(f"mask must have the size of image {index}, {own}, got {one.shape}")
    _check_something_known(masks)
    return [torch.from_numpy(one)[None] for one in masks]


def _list_masks(mask: Any, count: int) -> list[np.ndarray]:
    masks = [one for item in (mask if isinstance(mask, list | tuple) else [mask]) for one in _to_masks(item)]
    if len(masks) not in (1, count):
        raise ValueError(f"mask must be one for all images or one for each of {count}, got {len(masks)}")
    return masks


def _check_something_known(masks: Sequence[np.ndarray]) -> None:
    for index, one in enumerate(masks):
        if one.all():
            raise ValueError(f"mask must leave at least one pixel known, but mask {index} marks all as missing")


def _as_the_model_sees(missing: np.ndarray, processor: Any) -> np.ndarray:
    """(H, W), bool: the processor's pixels that depend on the missing ones of an image, (height, width)."""
    grey = np.full(missing.shape, 0.5, dtype=np.float32)
    other = np.where(missing, np.random.default_rng(0).random(missing.shape, dtype=np.float32), grey)
    first, second = (np.asarray(processor(image, return_tensors="np").pixel_values[0]) for image in (grey, other))
    return (first != second).any(axis=0)


def _to_masks(mask: Any) -> np.ndarray:
    """(k, height, width), bool."""
    if isinstance(mask, Image.Image):
        white = 255
        mask = np.asarray(mask.convert("L"))
    elif isinstance(mask, np.ndarray | Tensor):
        white = 1
        mask = np.asarray(mask.float().cpu() if isinstance(mask, Tensor) else mask)
    else:
        raise TypeError(
            f"mask must be a PIL image, a numpy array, a tensor or a list of these, got {type(mask).__name__}"
        )
    if not 2 <= mask.ndim <= 4 or (mask.ndim == 4 and mask.shape[1] != 1):
        raise ValueError(f"mask must be (height, width), (n, height, width) or (n, 1, height, width), got {mask.shape}")
    if not np.isin(mask, (0, white)).all():
        allowed = "black and white" if white == 255 else "bool or hold 0 and 1 alone"
        raise ValueError(f"mask must be {allowed}, got values in [{mask.min()}, {mask.max()}]")
    return mask.reshape(-1, *mask.shape[-2:]) == white
