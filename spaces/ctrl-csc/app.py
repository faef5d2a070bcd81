"""A Space that shows what a CTRL-CSC repository does to an image. All it needs is the repository's id, as MODEL_ID.

It runs without ctrl_csc_hf: the repository brings its own code. `ctrl-csc demo` starts the same page locally.
"""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from PIL import Image

SHOWN_SIDE = 384  # pixels that a picture has at least on the page: a model's images may be 32 pixels wide
NUM_FRAMES = 21  # positions of the interpolation's slider
GAP = 1  # pixels between the maps of two atoms


def build(pipe: DiffusionPipeline, examples: list[str]) -> gr.Blocks:
    """The page.

    Args:
        pipe: a `CtrlCscPipeline`.
        examples: image files to pick from; may be none.
    """
    pairs = [list(pair) for pair in pairwise(examples)]
    num_stages = len(pipe.model.config.stage_channels)

    def reconstruct(image: Image.Image | None, stage: int) -> tuple[Any, ...]:
        if image is None:
            return None, None, None, None, ""
        output = _say_errors(pipe, image, output_type="np", return_codes=True)
        original = pipe.image_processor.postprocess(
            pipe.image_processor(image, return_tensors="pt").pixel_values, output_type="np"
        )[0]
        reconstruction = output.images[0]
        psnr = -10 * np.log10(np.square(original - reconstruction).mean() + 1e-12)
        codes = output.codes[stage - 1][0]
        channels, height, width = codes.shape
        figures = (
            f"PSNR {psnr:.2f} dB, from {pipe.model.config.latent_dim} numbers. Stage {stage} of {num_stages}: "
            f"{channels} atoms at {height}x{width} places; {(codes > 0).float().mean().item():.1%} of its "
            f"{codes.numel():,} codes are not zero."
        )
        difference = 0.5 + (original - reconstruction) / 2
        return _picture(original), _picture(reconstruction), _picture(difference), _maps(codes), figures

    def between(a: Image.Image | None, b: Image.Image | None, position: float) -> tuple[Any, ...]:
        if a is None or b is None:
            return [], None
        frames = [_picture(frame) for frame in _say_errors(pipe.interpolate, a, b, NUM_FRAMES, output_type="np")]
        return frames, pick(frames, position)

    def pick(frames: list[Image.Image], position: float) -> Image.Image | None:
        return frames[round(position * (NUM_FRAMES - 1))] if frames else None

    with gr.Blocks(title="CTRL-CSC", analytics_enabled=False) as page:
        gr.Markdown(
            "# CTRL-CSC\nAn image as a multi-stage sparse deconvolution: the encoder finds sparse codes stage by stage "
            f"and ends at {pipe.model.config.latent_dim} numbers; the decoder makes an image of these alone. "
            "[The paper](https://arxiv.org/abs/2302.09347)"
        )
        with gr.Tab("Reconstruct"):
            with gr.Row():
                image = _given("Your image", "image")
                original = _shown("What the model sees", "original")
                reconstruction = _shown("Reconstruction", "reconstruction")
                difference = _shown("Difference; grey: none", "difference")
            if examples:
                gr.Examples(examples, image)
            figures = gr.Markdown(elem_id="figures")
            stage = gr.Radio(list(range(1, num_stages + 1)), value=1, label="Stage whose codes are shown")
            maps = _shown("Codes of this stage, a map for each atom, most active first; white: zero", "codes", 440)
            gr.on(
                [image.change, stage.change],
                reconstruct,
                [image, stage],
                [original, reconstruction, difference, maps, figures],
                show_progress="hidden",
            )
        with gr.Tab("Interpolate"):
            with gr.Row():
                first = _given("One image", "first")
                frame = _shown("Between them", "between")
                second = _given("Another", "second")
            position = gr.Slider(0, 1, 0.5, step=1 / (NUM_FRAMES - 1), label="Along the great circle of the latents")
            if pairs:
                gr.Examples(pairs, [first, second])
            frames = gr.State([])
            gr.on([first.change, second.change], between, [first, second, position], [frames, frame])
            position.change(pick, [frames, position], frame, show_progress="hidden")
    return page


def _given(label: str, elem_id: str) -> gr.Image:
    return gr.Image(label=label, elem_id=elem_id, type="pil", sources=["upload", "clipboard"], height=300)


def _shown(label: str, elem_id: str, height: int = 300) -> gr.Image:
    return gr.Image(
        label=label, elem_id=elem_id, format="png", interactive=False, height=height, buttons=["download", "fullscreen"]
    )


def _say_errors(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls it; what it refuses appears on the page in its words."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error)) from error


def _picture(pixels: np.ndarray) -> Image.Image:
    """(height, width, 3) in [0, 1], each pixel as a square."""
    scale = -(-SHOWN_SIDE // pixels.shape[0])
    values = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(values.repeat(scale, axis=0).repeat(scale, axis=1))


def _maps(codes: torch.Tensor) -> Image.Image:
    """Codes (channels, height, width) of one image as a sheet of maps, black where a code is the stage's largest."""
    codes = codes[codes.sum(dim=(1, 2)).argsort(descending=True)].float().cpu()
    channels, height, width = codes.shape
    columns = 2 ** int(np.ceil(np.log2(channels) / 2 + 0.5))  # wide rather than high, and full rows for 2^k atoms
    sheet = np.full((-(-channels // columns) * (height + GAP), columns * (width + GAP), 3), (170, 200, 235), np.uint8)
    ink = (255 * (1 - codes / codes.max().clamp(min=1e-12))).round().numpy().astype(np.uint8)
    for index, values in enumerate(ink):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = values[..., None]
    scale = -(-3 * SHOWN_SIDE // sheet.shape[1])
    return Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1))


if __name__ == "__main__":
    if "MODEL_ID" not in os.environ:
        raise SystemExit("MODEL_ID must name a repository of a CTRL-CSC model; set it in the Space's settings")
    folder = snapshot_download(os.environ["MODEL_ID"])
    build(
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
        sorted(str(path) for path in Path(folder).glob("examples/*.png")),
    ).launch(max_file_size="10mb")
