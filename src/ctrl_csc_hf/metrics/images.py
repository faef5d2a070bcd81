"""Reconstructions against their images, pixel by pixel: PSNR, SSIM, LPIPS. Pixels are in [-1, 1]."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .statistic import Statistic, check_same_shape

SMALLEST_SSIM_SIDE = 6  # pixels: torchmetrics reflects five at each border


def peak_signal_to_noise_ratio(images: Tensor, reconstructions: Tensor) -> Tensor:
    """PSNR of each image in dB, peak to peak 2: (n, C, H, W) pixels in [-1, 1], clipped -> (n,)."""
    error = (images.float() - reconstructions.float().clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


class ImagePairStatistic(Statistic):
    """A figure of each image and its reconstruction, as the mean over the images."""

    name: str

    def __init__(self) -> None:
        super().__init__()
        self.sum = 0.0

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Adds a batch.

        Args:
            images, reconstructions: (n, C, H, W) pixels in [-1, 1]; reconstructions are clipped to that.

        Raises:
            ValueError: for shapes that differ or have no four dimensions, or images outside [-1, 1].
        """
        check_same_shape("reconstructions", reconstructions, "images", images)
        if images.ndim != 4:
            raise ValueError(f"images must have shape (n, C, H, W), got {tuple(images.shape)}")
        if not images.numel():
            return
        if images.abs().max() > 1 + 1e-3 or not images.is_floating_point():
            raise ValueError(
                f"images must be floating-point pixels in [-1, 1], got {images.dtype} from {images.min().item():.4g} "
                f"to {images.max().item():.4g}"
            )
        figures = self.per_image(images.detach().float(), reconstructions.detach().float().clamp(-1, 1))
        self.sum += figures.cpu().double().sum().item()
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """The mean over the images; ValueError where none was added."""
        self._require()
        return {self.name: self.sum / self.count}

    @abstractmethod
    def per_image(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """(n, C, H, W), clipped -> (n,)."""


class PeakSignalToNoiseRatio(ImagePairStatistic):
    """`psnr`: the mean over images of the PSNR of the clipped reconstruction, in dB; infinite if any is exact.

    PSNR = 10 log10(peak^2 / mean squared error); it is the same on [0, 1] with peak 1 and on [-1, 1] with peak 2.
    """

    name = "psnr"

    def per_image(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        return peak_signal_to_noise_ratio(images, reconstructions)


class StructuralSimilarity(ImagePairStatistic):
    """`ssim`: the mean over images of the structural similarity on [0, 1], at most 1, which equal images have.

    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE
    Transactions on Image Processing 13(4), 2004, equation 13, by torchmetrics: a Gaussian window of 11 pixels and
    standard deviation 1.5, channel by channel, images reflected at their borders (scikit-image leaves a border of five
    pixels out instead). Images have six pixels or more a side.
    """

    name = "ssim"

    def per_image(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure

        if min(images.shape[2:]) < SMALLEST_SSIM_SIDE:
            raise ValueError(
                f"images must have {SMALLEST_SSIM_SIDE} or more pixels a side, got {tuple(images.shape[2:])}"
            )
        similarity: Any = structural_similarity_index_measure(
            reconstructions / 2 + 0.5, images / 2 + 0.5, data_range=1.0, reduction="none"
        )
        return similarity.reshape(len(images))


class LearnedPerceptualSimilarity(ImagePairStatistic):
    """`lpips`: the mean over images of the perceptual distance with AlexNet's features; 0 for equal images.

    Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
    CVPR 2018, by the authors' package lpips, which downloads AlexNet's weights. It runs on the images' device.

    Raises:
        ImportError: where lpips, or the torchvision that it needs, is not installed.
    """

    name = "lpips"

    def __init__(self) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError(f"LearnedPerceptualSimilarity needs lpips: pip install lpips ({error})") from error
        self.network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def per_image(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        return self.network.to(images.device)(images, reconstructions).reshape(len(images))
