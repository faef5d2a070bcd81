"""Inference Endpoints: reconstructs, encodes and interpolates images by the model beside this file.

In, as JSON: {"inputs": IMAGE or [IMAGE, ...], "parameters": {"task": "reconstruct" | "encode" | "interpolate",
"num_steps": 8}}, where IMAGE is base64 or a data URI; or the bytes of one image, as the widgets of Inference Endpoints
send them. Out: {"images": [base64 PNG, ...]}, or {"latents": [[...], ...]} for "encode", or one PIL image where
bytes came in. What cannot be answered gives {"error": "one line"}.
"""

import base64
import binascii
import io
import logging
import re
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel

# Up to transformers 5.17 the shorter import demands torchvision, which nothing here needs.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 10_000_000  # of one image, encoded
MAX_PIXELS = 2**30 // 12  # of one image, by its header: the most that the image processor takes
MAX_IMAGES = 64
MAX_STEPS = 64
TASKS = ("reconstruct", "encode", "interpolate")
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


class BadInput(ValueError):
    """What the sender can mend; the message is the answer."""


class EndpointHandler:
    """Loads the model of a folder; each call answers one request."""

    def __init__(self, path: str = "") -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).eval().to(self.device)
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)

    def __call__(self, data: Any) -> Any:
        try:
            return self._answer(data)
        except BadInput as error:
            return {"error": str(error)}
        except Exception as error:
            logger.exception("a request failed")
            return {"error": f"the request failed: {type(error).__name__}"}

    @torch.inference_mode()
    def _answer(self, data: Any) -> Any:
        if not isinstance(data, dict) or "inputs" not in data:
            raise BadInput(f"the request must be an object with inputs, got {_shown(data)}")
        inputs = data["inputs"]
        task, num_steps = _parameters(data.get("parameters"))
        came_raw = isinstance(inputs, bytes | bytearray | Image.Image)
        given = inputs if isinstance(inputs, list) else [inputs]
        if not 1 <= len(given) <= MAX_IMAGES:
            raise BadInput(f"inputs must be 1 to {MAX_IMAGES} images, got {len(given)}")
        if task == "interpolate" and len(given) != 2:
            raise BadInput(f"inputs must be 2 images for task 'interpolate', got {len(given)}")
        # One at a time, so that no more than one image lies decoded in memory.
        pixel_values = torch.cat([self._pixels(image, f"inputs[{index}]") for index, image in enumerate(given)])
        latents = self.model.encode(pixel_values.to(self.device)).latents
        if task == "encode":
            return {"latents": latents.tolist()}
        if task == "interpolate":
            latents = _great_circle(*latents, num_steps)
        results = self.processor.postprocess(self.model.decode(latents).reconstruction)
        return results[0] if came_raw else {"images": [_png(image) for image in results]}

    def _pixels(self, given: Any, name: str) -> torch.Tensor:
        """(1, 3, image_size, image_size)"""
        image = _open(given, name)
        try:
            return self.processor(image, return_tensors="pt").pixel_values
        except Exception as error:  # PIL reads EXIF only now, and what it finds wrong has many kinds
            raise BadInput(f"{name} must be an image that the model takes, got {_shown(error, 200)}") from None


def _parameters(parameters: Any) -> tuple[str, int]:
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise BadInput(f"parameters must be an object, got {_shown(parameters)}")
    unknown = set(parameters) - {"task", "num_steps"}
    if unknown:
        raise BadInput(f"parameters must be among task and num_steps, got {_shown(sorted(map(str, unknown)))}")
    task, num_steps = parameters.get("task", "reconstruct"), parameters.get("num_steps", 8)
    if task not in TASKS:
        raise BadInput(f"task must be one of {TASKS}, got {_shown(task)}")
    if type(num_steps) is not int or not 2 <= num_steps <= MAX_STEPS:
        raise BadInput(f"num_steps must be an integer from 2 to {MAX_STEPS}, got {_shown(num_steps)}")
    return task, num_steps


def _open(image: Any, name: str) -> Image.Image:
    if isinstance(image, Image.Image):  # the toolkit of Inference Endpoints has decoded it
        opened = image
    else:
        content = bytes(image) if isinstance(image, bytes | bytearray) else _decoded(image, name)
        if not 1 <= len(content) <= MAX_BYTES:
            raise BadInput(f"{name} must have 1 to {MAX_BYTES} bytes, got {len(content)}")
        try:
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError:
            raise BadInput(f"{name} must have at most {MAX_PIXELS} pixels, got far more") from None
        except Exception:  # PIL's decoders raise many kinds
            raise BadInput(f"{name} must be an image of the formats {', '.join(FORMATS)}, got other bytes") from None
    if opened.width * opened.height > MAX_PIXELS:
        raise BadInput(f"{name} must have at most {MAX_PIXELS} pixels, got {opened.width} x {opened.height}")
    try:
        opened.load()
    except Exception as error:
        raise BadInput(f"{name} must be a whole image, got a damaged one: {_shown(error)}") from None
    return opened


def _decoded(text: Any, name: str) -> bytes:
    if not isinstance(text, str):
        raise BadInput(f"{name} must be an image as base64 or a data URI, got {_shown(text)}")
    prefix = DATA_URI.match(text)
    if prefix is None and re.match(r"[\w+.-]+:", text):
        raise BadInput(f"{name} must be base64 or a data URI of an image, got {_shown(text)}; no address is fetched")
    encoded = text[prefix.end() :] if prefix else text
    if len(encoded) > MAX_BYTES * 4 // 3 + 4:
        raise BadInput(f"{name} must have 1 to {MAX_BYTES} bytes, got {len(encoded) * 3 // 4}")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadInput(f"{name} must be base64, got {_shown(text)}") from None


def _great_circle(start: torch.Tensor, end: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Points at equal angles from `start` to `end`, unit vectors (d,), both included: (num_steps, d)."""
    angle = 2 * torch.atan2((start - end).norm(), (start + end).norm())
    share = torch.linspace(0, 1, num_steps, device=start.device)[:, None]
    if angle.sin() < 1e-4:
        if angle > 1:
            raise BadInput("inputs must not have opposite latents for task 'interpolate', got two that have")
        return start + share * (end - start)
    return (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _shown(value: Any, length: int = 60) -> str:
    """A value, or what an exception says, in an error: one short line."""
    text = " ".join(str(value).split()) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
