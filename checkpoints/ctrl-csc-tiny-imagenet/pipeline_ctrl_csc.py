"""A diffusers pipeline around a CTRL-CSC model: image -> latents -> reconstruction, and what the loop is good for.

This file and those it imports also run from a Hub repository, without the rest of the package; the components come as
objects.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub import create_repo, snapshot_download, upload_folder
from PIL import Image
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .repository_ctrl_csc import MODEL_INDEX, SAMPLER, SAMPLER_INDEX, copy_records, save_repository
from .restoration import (
    NOISE_LEVELS,
    calibrate_denoising,
    denoise,
    denoising_sparsity,
    inpaint,
    missing_pixels,
    missing_pixels_of_each,
)
from .sampling import LatentSampler
from .tiling import in_tiles

# diffusers 0.42 forgets `trust_remote_code` where it measures the components for device_map="balanced", but asks for no
# such flag where their modules are among its own pipelines' modules.
setattr(diffusers.pipelines, MODEL_INDEX["model"][0], sys.modules[save_repository.__module__])
setattr(diffusers.pipelines, SAMPLER_INDEX[SAMPLER][0], sys.modules[LatentSampler.__module__])

HUB_KEYWORDS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
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
        denoiser: a `CtrlCscDenoiser`, with which `denoise` and `inpaint` take photographs of any size. It has a
            repository of its own and is not saved with the pipeline.

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
    denoiser: Any
    _optional_components = ["sampler", "denoiser"]
    use_tiling = False

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: BaseImageProcessor,
        sampler: object | None = None,
        denoiser: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            model=model.eval(),
            image_processor=image_processor,
            sampler=sampler,
            denoiser=None if denoiser is None else denoiser.eval(),
        )

    def enable_tiling(self) -> None:
        """From now on `__call__` gives images back in their own size, made of tiles of the model's size.

        Neighbouring tiles overlap by a quarter of their side, and are blended there, see `in_tiles`.
        """
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """From now on `__call__` resizes and crops images to the model's size again."""
        self.use_tiling = False

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
        """Reconstructs images, in the model's size or, after `enable_tiling`, in their own.

        Args:
            image: what the image processor takes: an image, a batch, or a list of these.
            batch_size: images that go through the model at once.
            output_type: of the images: "pil", "np" or "pt". With tiling, images of different sizes are a list.
            return_latents, return_codes: whether to return these too; not with tiling, where each tile has its own.
            return_dict: whether to return a `CtrlCscPipelineOutput` rather than a tuple of what it holds.

        Raises:
            ValueError: for another `output_type`, a `batch_size` below 1, images that the processor refuses, and
                latents or codes asked for with tiling.
            TypeError: for what is no image.
        """
        # 1. Check the arguments
        self._check(batch_size, output_type)
        if self.use_tiling:
            if return_latents or return_codes:
                raise ValueError(
                    "return_latents and return_codes must be False with tiling, as each tile has latents and codes of "
                    "its own; disable_tiling() first"
                )
            images = self._reconstruct_in_tiles(image, batch_size, output_type)
            return CtrlCscPipelineOutput(images=images) if return_dict else (images,)

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

    def _reconstruct_in_tiles(self, image: Any, batch_size: int, output_type: str) -> Any:
        def reconstruct(tiles: Tensor) -> Tensor:
            return torch.cat([self.model(batch).reconstruction for batch in tiles.split(batch_size)])

        size = self.model.config.image_size
        tiled = [
            in_tiles(reconstruct, pixels, size)[None]
            for pixels in self.progress_bar(self._pixels_in_own_size(image, self.model))
        ]
        return self._postprocess_in_own_size(tiled, output_type)

    @torch.no_grad()
    def denoise(
        self, image: Any, noise_std: float, batch_size: int = 64, output_type: str = "pil"
    ) -> Images | list[np.ndarray] | list[Tensor]:
        """Images without their noise, by the pipeline's denoiser or, where it has none, by its model.

        The denoiser gives each image back in its own size, see `CtrlCscDenoiser`. The model works in its own size. It
        gives the reconstruction xh(y), and a sparse code of what that leaves, xh(y) + A(z):
        z = argmin_{z >= 0} lambda |z|_1 + 1/2 |y - xh(y) - A(z)|^2, with the first stage's dictionary. lambda belongs
        to the noise: `model.config.denoising_sparsity`, which `calibrate_denoising` sets, or 3 noise_std^2 where it
        is unset. A lambda above all that the residual holds gives the reconstruction, a lambda of 0 the noisy image.

        Args:
            image, batch_size, output_type: see `__call__`. Images of different sizes come one by one.
            noise_std: standard deviation of the noise, in units of pixels in [-1, 1]: twice that of pixels in [0, 1].

        Returns:
            As in `CtrlCscPipelineOutput`; of images of different sizes a list, each (height, width, 3) for "np" and
            (3, height, width) for "pt".

        Raises:
            ValueError: for a `noise_std` that is not positive and finite; else as `__call__`.
        """
        self._check(batch_size, output_type)
        if self.denoiser is not None:
            batches = self._batches_in_own_size(self._pixels_in_own_size(image, self.denoiser), batch_size)
            restored = [self.denoiser.denoise(batch, noise_std) for batch in self.progress_bar(batches)]
            return self._postprocess_in_own_size(restored, output_type)
        sparsity = denoising_sparsity(self.model.config, noise_std)
        batches = self.progress_bar(self._preprocess(image).split(batch_size))
        denoised = torch.cat([denoise(self.model, batch, sparsity) for batch in batches])
        return self.image_processor.postprocess(denoised, output_type=output_type)

    def _pixels_in_own_size(self, image: Any, component: Any) -> list[Tensor]:
        """(3, H, W) of each image, pixels in [-1, 1], where and as the component has its weights."""
        own = self.image_processor(image, do_resize=False, do_center_crop=False).pixel_values
        return [torch.as_tensor(pixels).to(component.device, component.dtype) for pixels in own]

    @staticmethod
    def _batches_in_own_size(tensors: list[Tensor], batch_size: int) -> list[Tensor]:
        if len({tensor.shape for tensor in tensors}) == 1:
            return list(torch.stack(tensors).split(batch_size))
        return [tensor[None] for tensor in tensors]

    def _postprocess_in_own_size(
        self, batches: list[Tensor], output_type: str
    ) -> Images | list[np.ndarray] | list[Tensor]:
        if len({batch.shape[1:] for batch in batches}) == 1:
            return self.image_processor.postprocess(torch.cat(batches), output_type=output_type)
        return [self.image_processor.postprocess(batch, output_type=output_type)[0] for batch in batches]

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
    ) -> Images | list[np.ndarray] | list[Tensor]:
        """Images completed from their known pixels, by the pipeline's denoiser or, where it has none, by its model.

        The denoiser completes each image in its own size, see `CtrlCscDenoiser.inpaint`; known pixels stay. The model
        does it by sparse coding restricted to the known pixels and then the loop, twice. Its result is the model's
        reconstruction of the completed image, everywhere: with an empty mask that of `__call__`, exactly. `keep_known`
        puts the known pixels themselves back in place.

        Args:
            image, batch_size, output_type: see `denoise`.
            mask: of what is missing: a black and white PIL image, white where missing; an array or tensor
                (height, width), (n, height, width) or (n, 1, height, width), bool or of 0 and 1, 1 where missing; or a
                list of these. One for all images, or one each. A mask of the model's size, (image_size, image_size),
                is of the pixels that the model sees; any other must have its image's own size, and is resized and
                cropped like it: every pixel that a missing one contributes to is missing. What an image holds where
                it is missing does not matter, unless the mask has the model's size and the image another. With a
                denoiser, masks have their images' own sizes.
            keep_known: whether known pixels stay as they are.

        Raises:
            ValueError: for a mask of another size, number or content, or that leaves no pixel known; else as
                `__call__`.
            TypeError: for what is no mask or no image.
        """
        self._check(batch_size, output_type)
        if self.denoiser is not None:
            own = self._pixels_in_own_size(image, self.denoiser)
            masks = missing_pixels_of_each(mask, [(one.shape[1], one.shape[2]) for one in own])
            pairs = zip(
                self._batches_in_own_size(own, batch_size),
                self._batches_in_own_size([one.to(self.denoiser.device) for one in masks], batch_size),
                strict=True,
            )
            restored = [self.denoiser.inpaint(*pair) for pair in self.progress_bar(list(pairs))]
            return self._postprocess_in_own_size(restored, output_type)
        pixel_values = self._preprocess(image)
        missing = missing_pixels(mask, image, pixel_values, self.image_processor).to(self.device)
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
            TypeError: for what is no tensor.
            ValueError: for latents of another shape, and for another `output_type`.
        """
        _check_output_type(output_type)
        if not isinstance(latents, Tensor):
            raise TypeError(f"latents must be a tensor, got {type(latents).__name__}; torch.as_tensor makes one")
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> Self:
        """Loads model, image processor and, where there is one, sampler, with the classes that are installed.

        It needs no model_index.json: what train.py wrote serves, and what `save_pretrained` of model and image
        processor wrote. `DiffusionPipeline.from_pretrained` loads published repositories, with their own code.

        Args:
            pretrained_model_name_or_path: a folder or a Hub repository.
            kwargs: `model`, `image_processor` or `sampler`, which then are not loaded; `denoiser`; `revision`, `token`,
                `cache_dir`, `force_download`, `local_files_only`, as of `snapshot_download`; `trust_remote_code`; the
                rest, such as `dtype` and `device_map`, is passed to `AutoModel.from_pretrained`.

        Raises:
            OSError, ValueError: if model or image processor are not there.
        """
        name = str(pretrained_model_name_or_path)
        given = {part: kwargs.pop(part) for part in ("model", "image_processor", SAMPLER, "denoiser") if part in kwargs}
        hub = {keyword: kwargs.pop(keyword) for keyword in HUB_KEYWORDS if keyword in kwargs}
        trust = {"trust_remote_code": kwargs.pop("trust_remote_code", False)}
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, **hub))
        if "model" not in given:
            given["model"] = AutoModel.from_pretrained(folder, **trust, **kwargs)
        if "image_processor" not in given:
            given["image_processor"] = AutoImageProcessor.from_pretrained(folder, **trust)
        if SAMPLER not in given and (folder / SAMPLER).is_dir():
            given[SAMPLER] = LatentSampler.from_pretrained(folder / SAMPLER)
        pipe = cls(**given)
        pipe.register_to_config(_name_or_path=name)
        return pipe

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> Any:
        """Writes a folder that DiffusionPipeline, AutoModel and AutoImageProcessor load, with the weights stored once.

        Card, figures and pictures of the published folder or repository that the pipeline was loaded from are saved
        too, unless weights or configuration have changed since. Those of another model that `save_directory` holds, and
        its sampler, are removed. `ctrl-csc publish` writes a card of its own.

        Args:
            save_directory: is made if it does not exist.
            safe_serialization, variant, use_flashpack: only True, None and False: weights are saved as
                model.safetensors, where AutoModel and DiffusionPipeline find them.
            max_shard_size: size of a file of weights, in bytes or as "5GB".
            push_to_hub: whether to upload the folder, too.
            repo_id: where to; by default the folder's name, in the account's own namespace.
            commit_message, private, create_pr, token: as of `push_to_hub`.

        Returns:
            The commit's information if `push_to_hub`, else None.

        Raises:
            ValueError: for what `safe_serialization`, `variant` and `use_flashpack` must not be, and if
                `save_directory` is a file.
        """
        only = (("safe_serialization", safe_serialization, True), ("variant", variant, None))
        for argument, value, allowed in (*only, ("use_flashpack", use_flashpack, False)):
            if value != allowed:
                raise ValueError(
                    f"{argument} must be {allowed}, as the weights are saved as model.safetensors, where AutoModel and "
                    f"DiffusionPipeline find them, got {value!r}"
                )
        folder = Path(save_directory)
        model = getattr(self.model, "_orig_mod", self.model)  # of a compiled model
        weights = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        save_repository(folder, model, self.image_processor, self.sampler, **weights)
        if name := self.name_or_path or model.name_or_path:
            copy_records(model, name, folder)
        if not push_to_hub:
            return None
        name = repo_id or folder.resolve().name
        repository = create_repo(name, private=private, token=token, exist_ok=True).repo_id
        return upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            delete_patterns=[f"{SAMPLER}/*"],  # of another pipeline, if this one has none
        )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        """Uploads what `save_pretrained` writes. A card that the repository already has stays, if none is saved; a
        sampler does not.

        Args:
            repo_id: "organization/name", or "name" for the account's own; is created if it does not exist.
            commit_message: by default "Upload CtrlCscPipeline".
            private: whether a repository that is created is private; None is the account's default, as a rule public.
            token: of the account, by default the one that `hf auth login` stored.
            create_pr: whether to open a pull request instead of committing.
            safe_serialization, variant: as in `save_pretrained`.
            subfolder: only None, as AutoModel finds code in the root alone.

        Returns:
            The commit's information.

        Raises:
            ValueError: for a `subfolder`, and as `save_pretrained`.
        """
        if subfolder is not None:
            raise ValueError(f"subfolder must be None, as AutoModel finds code in the root alone, got {subfolder!r}")
        with TemporaryDirectory() as folder:
            return self.save_pretrained(
                folder,
                safe_serialization,
                variant,
                push_to_hub=True,
                repo_id=repo_id,
                commit_message=commit_message,
                private=private,
                create_pr=create_pr,
                token=token,
            )

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
        label: int | str | None = None,
        component: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 64,
        output_type: str = "pil",
    ) -> Images:
        """New images, decoded from latents that the sampler draws; as in `CtrlCscPipelineOutput`.

        Args:
            num_images: how many.
            label: a class, by its number or by its name in `model.config.id2label`; only where the sampler was fitted
                with labels.
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
        if isinstance(label, str):
            label = self._class_number(label)
        latents = self.sampler.sample(num_images, label, component, generator)
        reconstructions = [
            self.model.decode(batch.to(self.device)).reconstruction for batch in latents.split(batch_size)
        ]
        return self.image_processor.postprocess(torch.cat(reconstructions), output_type=output_type)

    def _class_number(self, name: str) -> int:
        numbers = {text: number for number, text in self.model.config.id2label.items()}
        if name not in numbers:
            raise ValueError(f"label must be a number or one of {list(numbers)}, got {name!r}")
        return numbers[name]


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
