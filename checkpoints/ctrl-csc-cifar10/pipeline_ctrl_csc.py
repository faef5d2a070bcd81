"""A diffusers pipeline around a CTRL-CSC model: image -> latents -> reconstruction, and what the loop is good for.

This file and those it imports also run from a Hub repository, without the rest of the package; the components come as
objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .restoration import NOISE_LEVELS, calibrate_denoising, denoise, denoising_sparsity, inpaint, missing_pixels

OUTPUT_TYPES = ("pil", "np", "pt")
LARGEST_SINE_OF_PARALLELS = 1e-4  # of unit vectors whose great circle is lost in rounding

Images = list[Image.Image] | np.ndarray | Tensor


@dataclass
class CtrlCscPipelineOutput(BaseOutput):
    """
    images: the reconstructions: a list of n PIL images, an array (n, height, width, 3) or a tensor
        (n, 3, height, width), the latter two float32 in [0, 1].
    latents: (n, latent_dim), unit vectors; where asked for.
    codes: of every sparse-coding stage (n, stage_channels[l], h_l, w_l), non-negative; where asked for.
    """

    images: Images
    latents: Tensor | None = None
    codes: tuple[Tensor, ...] | None = None


class CtrlCscPipeline(DiffusionPipeline):
    """Reconstructs, denoises and completes images, encodes them, decodes latents, interpolates, and draws new images.

    Args:
        model: a `CtrlCscModel`.
        image_processor: its `CtrlCscImageProcessor`, which says what counts as an image.
        sampler: its `LatentSampler`, which `sample` alone needs.

    ```python
    >>> from PIL import Image
    >>> from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel, CtrlCscPipeline

    >>> pipe = CtrlCscPipeline(CtrlCscModel(CtrlCscConfig()), CtrlCscImageProcessor(image_size=32))
    >>> pipe(Image.new("RGB", (48, 40), "orange")).images[0].size
    (32, 32)
    ```
    """

    model: Any
    image_processor: Any
    sampler: Any
    _optional_components = ["sampler"]

    def __init__(
        self, model: PreTrainedModel, image_processor: BaseImageProcessor, sampler: object | None = None
    ) -> None:
        super().__init__()
        self.register_modules(model=model.eval(), image_processor=image_processor, sampler=sampler)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        batch_size: int = 64,
        output_type: str = "pil",
        return_latents: bool = False,
        return_codes: bool = False,
        return_dict: bool = True,
    ) -> CtrlCscPipelineOutput | tuple:
        """Reconstructs images.

        Args:
            image: what the image processor takes: an image, a batch, or a list of these.
            batch_size: images that go through the model at once.
            output_type: of the images: "pil", "np" or "pt".
            return_latents, return_codes: whether to return these too.
            return_dict: whether to return a `CtrlCscPipelineOutput` rather than a tuple of what it holds.

        Raises:
            ValueError: for another `output_type`, a `batch_size` below 1, and images that the processor refuses.
            TypeError: for what is no image.
        """
        # 1. Check the arguments
        self._check(batch_size, output_type)

        # 2. Images to pixels in [-1, 1]
        pixel_values = self._preprocess(image)

        # 3. Encode and decode, batch by batch
        latents, codes, reconstructions = [], [], []
        for batch in self.progress_bar(pixel_values.split(batch_size)):
            encoded = self.model.encode(batch, output_codes=return_codes)
            latents.append(encoded.latents)
            codes.append(encoded.codes)
            reconstructions.append(self.model.decode(encoded.latents).reconstruction)

        # 4. Pixels to images
        output = CtrlCscPipelineOutput(
            images=self.image_processor.postprocess(torch.cat(reconstructions), output_type=output_type),
            latents=torch.cat(latents) if return_latents else None,
            codes=tuple(torch.cat(stage) for stage in zip(*codes, strict=True)) if return_codes else None,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def denoise(self, image: Any, noise_std: float, batch_size: int = 64, output_type: str = "pil") -> Images:
        """Images without their noise: the reconstruction xh(y), and a sparse code of what it leaves, xh(y) + A(z).

        z = argmin_{z >= 0} lambda |z|_1 + 1/2 |y - xh(y) - A(z)|^2, with the first stage's dictionary. lambda belongs
        to the noise: `model.config.denoising_sparsity`, which `calibrate_denoising` sets, or 3 noise_std^2 where it
        is unset. A lambda above all that the residual holds gives the reconstruction, a lambda of 0 the noisy image.

        Args:
            image, batch_size, output_type: see `__call__`.
            noise_std: standard deviation of the noise, in units of pixels in [-1, 1]: twice that of pixels in [0, 1].

        Raises:
            ValueError: for a `noise_std` that is not positive and finite; else as `__call__`.
        """
        self._check(batch_size, output_type)
        sparsity = denoising_sparsity(self.model.config, noise_std)
        batches = self.progress_bar(self._preprocess(image).split(batch_size))
        denoised = torch.cat([denoise(self.model, batch, sparsity) for batch in batches])
        return self.image_processor.postprocess(denoised, output_type=output_type)

    @torch.no_grad()
    def calibrate_denoising(self, image: Any, noise_std: Sequence[float] = NOISE_LEVELS) -> list[list[float]]:
        """Finds the lambda of `denoise` for every noise level, and stores it in the model's configuration.

        A grid of lambdas is tried on the images with noise added; that of the highest mean PSNR is taken. `denoise`
        interpolates between the levels. `save_pretrained` saves them with the model.

        Args:
            image: some 100 images without noise that the model was not trained on; what `__call__` takes.
            noise_std: noise levels, rising, in units of pixels in [-1, 1].

        Returns:
            Pairs [noise_std, lambda].

        Raises:
            ValueError: for levels that are not positive, finite and rising; else as `__call__`.
        """
        clean = self._preprocess(image)
        self.model.config.denoising_sparsity = calibrate_denoising(self.model, clean, noise_std)
        return self.model.config.denoising_sparsity

    @torch.no_grad()
    def inpaint(
        self, image: Any, mask: Any, keep_known: bool = False, batch_size: int = 64, output_type: str = "pil"
    ) -> Images:
        """Images completed from their known pixels, by sparse coding restricted to these and then the loop, twice.

        The result is the model's reconstruction of the completed image, everywhere: with an empty mask that of
        `__call__`, exactly. `keep_known` puts the known pixels themselves back in place.

        Args:
            image, batch_size, output_type: see `__call__`.
            mask: of what is missing, in the pixels that the model sees, (image_size, image_size): a black and white
                PIL image, white where missing; an array or tensor (height, width), (n, height, width) or
                (n, 1, height, width), bool or of 0 and 1, 1 where missing; or a list of these. One for all images,
                or one each. What an image holds there does not matter, if the processor need not resize it.
            keep_known: whether known pixels stay as they are.

        Raises:
            ValueError: for a mask of another size, number or content, or that leaves no pixel known; else as
                `__call__`.
            TypeError: for what is no mask or no image.
        """
        self._check(batch_size, output_type)
        pixel_values = self._preprocess(image)
        missing = missing_pixels(mask, pixel_values).to(self.device)
        batches = list(zip(pixel_values.split(batch_size), missing.split(batch_size), strict=True))
        completed = torch.cat([inpaint(self.model, *batch) for batch in self.progress_bar(batches)])
        if keep_known:
            completed = completed.where(missing, pixel_values)
        return self.image_processor.postprocess(completed, output_type=output_type)

    @torch.no_grad()
    def encode(self, image: Any) -> Tensor:
        """Images -> latents (n, latent_dim), unit vectors. Errors as of `__call__`."""
        return self.model.encode(self._preprocess(image)).latents

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Images:
        """Latents (n, latent_dim) -> n images, as in `CtrlCscPipelineOutput`.

        Raises:
            ValueError: for latents of another shape, and for another `output_type`.
        """
        _check_output_type(output_type)
        reconstruction = self.model.decode(latents.to(self.device)).reconstruction
        return self.image_processor.postprocess(reconstruction, output_type=output_type)

    @torch.no_grad()
    def interpolate(self, a: Any, b: Any, num_steps: int = 8, output_type: str = "pil") -> Images:
        """Images along the great circle from the latents of image `a` to those of image `b`, both ends included.

        Raises:
            ValueError: for fewer than 2 steps, more than one image in `a` or `b`, and latents that point in
                opposite directions, which no single great circle joins.
        """
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, got {num_steps!r}")
        start, end = self.encode(a), self.encode(b)
        for name, latents in (("a", start), ("b", end)):
            if len(latents) != 1:
                raise ValueError(f"{name} must be one image, got {len(latents)}")
        return self.decode(great_circle(start, end, num_steps), output_type)

    def save_pretrained(self, save_directory: str) -> None:
        """Writes a folder that DiffusionPipeline and AutoModel load, the weights in it once; see `CtrlCscModel.export`.

        The package ctrl_csc_hf must be installed. `ctrl-csc publish` uploads.
        """
        self.model.export(save_directory, image_processor=self.image_processor, sampler=self.sampler)

    @staticmethod
    def _check(batch_size: int, output_type: str) -> None:
        _check_output_type(output_type)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")

    def _preprocess(self, image: Any) -> Tensor:
        pixel_values = self.image_processor(image, return_tensors="pt").pixel_values
        return pixel_values.to(self.device, self.model.dtype)

    @torch.no_grad()
    def sample(
        self,
        num_images: int = 1,
        label: int | None = None,
        component: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 64,
        output_type: str = "pil",
    ) -> Images:
        """New images, decoded from latents that the sampler draws; as in `CtrlCscPipelineOutput`.

        Args:
            num_images: how many.
            label: a class of the sampler's, where it was fitted with labels.
            component: one of its components, counted from 0.
            generator: the same seed gives the same images; a list holds one an image.
            batch_size: images that are decoded at once.
            output_type: of the images: "pil", "np" or "pt".

        Raises:
            ValueError: where there is no sampler, for a label, a component or a number that it refuses, another
                `output_type`, and a `batch_size` below 1.
        """
        _check_output_type(output_type)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if self.sampler is None:
            raise ValueError("sampler must be a LatentSampler, which `ctrl-csc fit-sampler` fits, got None")
        latents = self.sampler.sample(num_images, label, component, generator)
        reconstructions = [
            self.model.decode(batch.to(self.device)).reconstruction for batch in latents.split(batch_size)
        ]
        return self.image_processor.postprocess(torch.cat(reconstructions), output_type=output_type)


def great_circle(start: Tensor, end: Tensor, num_steps: int) -> Tensor:
    """Points at equal angles from `start` to `end`, unit vectors (1, d), both included: (num_steps, d).

    Raises:
        ValueError: if they point in opposite directions.
    """
    first, last = start.double(), end.double()
    angle = 2 * torch.atan2((first - last).norm(), (first + last).norm())  # accurate at both ends
    share = torch.linspace(0, 1, num_steps, dtype=torch.float64, device=start.device)[:, None]
    if angle.sin() < LARGEST_SINE_OF_PARALLELS:
        if angle > 1:
            raise ValueError("a and b must not have opposite latents: no single great circle joins them")
        points = first + share * (last - first)
    else:
        points = (((1 - share) * angle).sin() * first + (share * angle).sin() * last) / angle.sin()
    points = points.to(start.dtype)
    points[0], points[-1] = start[0], end[0]
    return points


def _check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")


__all__ = ["CtrlCscPipeline", "CtrlCscPipelineOutput"]
