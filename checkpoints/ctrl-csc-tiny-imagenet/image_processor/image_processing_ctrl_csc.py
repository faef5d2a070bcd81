"""Images to pixels in [-1, 1] for CTRL-CSC, and back. Needs PIL, not torchvision."""

from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension, SizeDict

LARGEST_RATIO = 1000  # of an image's sides
TINY = float(np.finfo(np.float32).tiny)  # by a smaller number one cannot divide in float32
MOST_PIXELS = 2**30 // 12  # 89 million, of one image: from here on PIL warns of decompression bombs


def check_sides(height: int, width: int, name: str = "an image") -> None:
    """Refuses images that would take gigabytes of memory; to be called before an image is decoded.

    Raises:
        ValueError: if there is no pixel or more than 2^30 / 12, or if a side is more than 1,000 times the other, as
            resizing the shorter one would make gigabytes of the image.
    """
    shorter, longer = sorted((height, width))
    if shorter < 1:
        raise ValueError(f"{name} has {height} x {width} pixels: it must have at least one")
    if longer > LARGEST_RATIO * shorter:
        raise ValueError(
            f"{name} has {height} x {width} pixels: a side must be at most {LARGEST_RATIO} times the other"
        )
    if height * width > MOST_PIXELS:
        raise ValueError(f"{name} has {height} x {width} pixels: it must have at most {MOST_PIXELS:,}")


class CtrlCscImageProcessor(PilBackend):
    r"""Turns images into `pixel_values` (n, 3, image_size, image_size), float32 in [-1, 1], and back.

    The shorter side is resized to `image_size` (PIL's antialiased bicubic), the centre square is cut out, and
    8-bit values v become 2 v / 255 - 1. An image of `image_size` x `image_size` is not resampled:
    `postprocess` gives its 8-bit pixels back exactly.

    An image is one of
    - a PIL image of any mode that PIL converts to RGB. Its EXIF orientation is applied, transparency is put
      on white; the grey modes I;16 and I hold 16 bits, [0, 65535]; mode F holds [0, 1];
    - a numpy array or torch tensor (height, width), (height, width, C) or (C, height, width), C = 1 or 3. The
      dtype says what it holds: uint8 [0, 255], uint16 [0, 65535], floats [0, 1]. Floats keep their precision,
      16 bits are rounded to 8. Where both orders fit, as in (3, 3, 3), `input_data_format`,
      "channels_first" or "channels_last", has to say which.

    Images come alone, as a 4-dimensional array (a batch), or in lists of these, nested or not, which come out
    flat.

    `do_rescale` multiplies 8-bit values by `rescale_factor`, 1 / 255. With `do_rescale=False` floats stay in [0, 1] and
    are normalised to the same `pixel_values`; 8-bit values, which `do_normalize` cannot bring to [-1, 1] then, need
    `do_normalize=False` too and come out as they are.

    Args:
        image_size (`int`, *optional*): side of the square results, in pixels; short for
            `size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}`,
            which are what is saved. 32 where nothing is given.
        kwargs: the settings of every transformers image processor, such as `resample` or `do_center_crop`.

    Raises:
        TypeError: for what is no image, and for dtypes other than the above.
        ValueError: for shapes, sizes and values other than the above, NaN included, for empty lists, for images that
            `check_sides` refuses, and for 8-bit values that are to be normalised but not rescaled.

    ```python
    >>> from PIL import Image
    >>> from ctrl_csc_hf import CtrlCscImageProcessor

    >>> processor = CtrlCscImageProcessor(image_size=64)
    >>> processor(Image.new("RGB", (100, 80), "red"), return_tensors="pt").pixel_values.shape
    torch.Size([1, 3, 64, 64])
    ```
    """

    do_resize = True
    size = {"shortest_edge": 32}
    default_to_square = False
    resample = Image.Resampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 32, "width": 32}
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    def __init__(self, image_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**_square(image_size), **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], image_size: int | None = None, **kwargs: Any) -> Any:
        # transformers would drop `from_pretrained(..., image_size=64)` in silence.
        return super().from_dict(image_processor_dict, **_square(image_size), **kwargs)

    def _prepare_image_like_inputs(
        self, images: Any, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> list[np.ndarray]:
        layout = None if input_data_format is None else ChannelDimension(input_data_format)
        return [_to_rgb(image, f"images[{index}]", layout) for index, image in enumerate(_flatten(images))]

    def resize(self, image: np.ndarray, size: SizeDict, resample: int | None = None, **kwargs: Any) -> np.ndarray:
        """Resize (3, height, width), uint8 or float32 in [0, 1], keeping the dtype.

        Raises:
            ValueError: if `size` has other keys than shortest_edge, or height and width, or is not positive, and for
                images that `check_sides` refuses.
        """
        sides = dict(size)
        if set(sides) not in ({"shortest_edge"}, {"height", "width"}) or min(sides.values()) < 1:
            raise ValueError(
                f"size={sides} is not allowed: it must have shortest_edge, or height and width, all positive"
            )
        check_sides(*image.shape[1:])
        height, width = get_resize_output_image_size(
            image,
            size=size.shortest_edge or (size.height, size.width),
            default_to_square=False,
            input_data_format=ChannelDimension.FIRST,
        )
        # One plane at a time, as PIL has no RGB image of floats.
        planes = [Image.fromarray(plane).resize((width, height), resample) for plane in image]
        largest = 255 if image.dtype == np.uint8 else 1
        return np.clip(np.stack([np.asarray(plane) for plane in planes]), 0, largest)  # bicubic overshoots

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        """Cut the centre out, with black around it where the image is smaller.

        Raises:
            ValueError: if `size` has other keys than height and width, or is not positive.
        """
        sides = dict(size)
        if set(sides) != {"height", "width"} or min(sides.values()) < 1:
            raise ValueError(f"crop_size={sides} is not allowed: it must have height and width, both positive")
        return super().center_crop(image, size, **kwargs)

    def rescale(self, image: np.ndarray, scale: float, **kwargs: Any) -> np.ndarray:
        """Multiply 8-bit values by `scale`; floats in [0, 1] stand for 8-bit values divided by 255.

        Raises:
            ValueError: if `scale` is no positive number.
        """
        _check_numbers("rescale_factor", scale, [()], TINY)
        return super().rescale(image, scale if image.dtype == np.uint8 else 255 * scale, **kwargs)

    def normalize(self, image: np.ndarray, mean: Any, std: Any, **kwargs: Any) -> np.ndarray:
        """Subtract `mean` and divide by `std`, floats or one a channel.

        Raises:
            ValueError: for numbers that are not finite, a `std` that is not positive, and for 8-bit values, which have
                not been rescaled.
        """
        for name, values, lowest in (("image_mean", mean, -np.inf), ("image_std", std, TINY)):
            _check_numbers(name, values, [(), (len(image),)], lowest)
        if image.dtype == np.uint8:
            raise ValueError(
                "do_normalize=True with do_rescale=False needs floats in [0, 1], got an image of 8-bit values: "
                "leave do_rescale=True, or set do_normalize=False"
            )
        return super().normalize(image, mean, std, **kwargs)

    def postprocess(
        self, pixel_values: torch.Tensor | np.ndarray, output_type: Literal["pil", "np", "pt"] = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Images from pixels in [-1, 1], what the decoder gives; values beyond are clipped.

        Args:
            pixel_values: (n, 3, height, width), any float dtype.
            output_type: "pil", "np" or "pt".

        Returns:
            "pil": a list of n RGB images, rounded to 8 bits; "np": an array (n, height, width, 3), float32 in
            [0, 1]; "pt": a tensor (n, 3, height, width), float32 in [0, 1], on the device of `pixel_values`.

        Raises:
            ValueError: for another shape, dtype or `output_type`, and for NaN.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is not allowed: it must be 'pil', 'np' or 'pt'")
        images = torch.as_tensor(pixel_values) if isinstance(pixel_values, np.ndarray) else pixel_values
        if not (isinstance(images, torch.Tensor) and images.is_floating_point()):
            received = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise ValueError(f"pixel_values is {received}: it must be a tensor or array of floats in [-1, 1]")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pixel_values has shape {tuple(images.shape)}: it must be (n, 3, height, width)")
        if images.isnan().any():
            raise ValueError("pixel_values holds NaN: it must be numbers in [-1, 1]")

        images = (images.detach().float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return arrays
        return [Image.fromarray(array) for array in (arrays * 255).round().astype(np.uint8)]


def _square(image_size: int | None) -> dict[str, dict[str, int]]:
    if image_size is None:
        return {}
    if type(image_size) is not int or image_size < 1:
        raise ValueError(f"image_size={image_size!r} is not allowed: it must be a positive integer")
    return {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}


def _check_numbers(name: str, values: Any, shapes: list[tuple[int, ...]], lowest: float) -> None:
    try:
        numbers = np.asarray(values, np.float32)
    except (TypeError, ValueError):  # no numbers, or a ragged list
        numbers = np.full((), np.nan)
    if numbers.shape not in shapes or not np.isfinite(numbers).all() or numbers.min() < lowest:
        wanted = "a positive number" if lowest > 0 else "a finite number"
        each = f", or a list of {shapes[-1][0]} such numbers" if shapes[-1] else ""
        raise ValueError(f"{name}={values!r} is not allowed: it must be {wanted}{each}")


def _flatten(images: Any) -> list[Any]:
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    if not (is_batch or isinstance(images, (list, tuple))):
        return [images]
    if len(images) == 0:
        received = f"an array of shape {tuple(images.shape)}" if is_batch else repr(images)
        raise ValueError(f"images holds {received}: there must be at least one image")
    return list(images) if is_batch else [image for item in images for image in _flatten(item)]


def _to_rgb(image: Any, name: str, layout: ChannelDimension | None) -> np.ndarray:
    """(3, height, width), uint8 or float32 in [0, 1], of one image."""
    if isinstance(image, Image.Image):
        pixels, layout = _pil_pixels(image, name), ChannelDimension.LAST
    elif isinstance(image, torch.Tensor):
        # numpy has no bfloat16.
        pixels = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    elif isinstance(image, np.ndarray):
        pixels = image
    else:
        raise TypeError(f"{name} is of type {type(image).__name__}: it must be a PIL image, a numpy array or a tensor")
    if pixels.size == 0:
        raise ValueError(f"{name} has shape {pixels.shape}: it must have at least one pixel")
    pixels = _to_uint8_or_unit_range(_channels_first(pixels, name, layout), name)
    return np.broadcast_to(pixels, (3, *pixels.shape[1:]))


def _pil_pixels(image: Image.Image, name: str) -> np.ndarray:
    """(height, width), uint16 or float32, or (height, width, 3), uint8."""
    check_sides(image.height, image.width, name)  # by its header
    depth = _bit_depth(image)  # which a copy lacks
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # or else it would be copied
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return np.asarray(image)
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion to RGB clips at 255
        pixels = np.asarray(image)
        if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 65535):
            raise ValueError(
                f"{name} has mode {image.mode} and values in [{pixels.min()}, {pixels.max()}]: "
                "they must be in [0, 65535]"
            )
        return np.where(pixels == image.info.get("transparency"), 65535, pixels).astype(np.uint16)
    if image.has_transparency_data:
        if "transparency" in image.info:
            image = image.copy()  # whose info is not the caller's
            image.info["transparency"] = _transparent_color(image, depth)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _transparent_color(image: Image.Image, depth: int | None) -> Any:
    """The image's transparent colour in 8 bits, like its pixels; PIL keeps it in the bits of a PNG file, `depth`.

    Where that is not known, a colour beyond 8 bits has 16, and grey levels tell: they are multiples of 85 if they had 2
    bits, of 17 if they had 4.
    """
    color = image.info["transparency"]
    if image.mode == "RGB" and isinstance(color, tuple) and (depth == 16 or max(color) > 255):
        return tuple(value >> 8 for value in color)  # as PIL does with the pixels
    if image.mode == "L" and isinstance(color, int):
        if depth is not None:
            return color % 2**depth * 255 // (2**depth - 1)
        levels = np.flatnonzero(image.histogram())
        return next((f * color for f in (85, 17) if f * color <= 255 and not (levels % f).any()), color)
    return color


def _bit_depth(image: Image.Image) -> int | None:
    """Of a PNG file, by its header; 8 for other formats; None for a copy, and where the file has been closed."""
    if image.format not in ("PNG", None):
        return 8
    try:
        file = image._fp  # type: ignore[attr-defined]  # PIL keeps it when the image has been loaded, too
        place = file.tell()
        file.seek(24)  # in the first chunk, IHDR, behind width and height
        depth = file.read(1)[0]
        file.seek(place)
        return depth
    except (AttributeError, OSError, ValueError):
        return None


def _channels_first(pixels: np.ndarray, name: str, layout: ChannelDimension | None) -> np.ndarray:
    """(C, height, width), C = 1 or 3."""
    if pixels.ndim == 2:
        return pixels[None]
    channel_axes = {ChannelDimension.FIRST: 0, ChannelDimension.LAST: -1}
    axes = [
        axis
        for candidate, axis in channel_axes.items()
        if pixels.ndim == 3 and pixels.shape[axis] in (1, 3) and layout in (None, candidate)
    ]
    if not axes:
        wanted = "" if layout is None else f" with input_data_format={layout.value!r}"
        raise ValueError(
            f"{name} has shape {pixels.shape}{wanted}: it must be (height, width), (height, width, C) or "
            "(C, height, width) with C = 1 or 3 channels; give images with transparency as PIL images"
        )
    if len(axes) == 2:
        raise ValueError(
            f"{name} has shape {pixels.shape}, in which either end may be the channels: "
            "input_data_format must be 'channels_first' or 'channels_last'"
        )
    return np.moveaxis(pixels, axes[0], 0)


def _to_uint8_or_unit_range(pixels: np.ndarray, name: str) -> np.ndarray:
    """uint8, or float32 in [0, 1]."""
    if pixels.dtype == np.uint8:
        return pixels
    if np.issubdtype(pixels.dtype, np.uint16):
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = pixels.astype(np.float32)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # also false for NaN
            raise ValueError(
                f"{name} holds floats in [{pixels.min()}, {pixels.max()}]: they must be in [0, 1]; "
                "values in [0, 255] must be uint8"
            )
        return pixels
    raise TypeError(f"{name} has dtype {pixels.dtype}: it must be uint8, uint16 or a float dtype")


__all__ = ["CtrlCscImageProcessor", "check_sides"]
