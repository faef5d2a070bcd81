"""A Space that shows what a CTRL-CSC repository does to an image. All it needs is the repository's id, as MODEL_ID.

It runs without ctrl_csc_hf: the repository brings its own code. `ctrl-csc demo` starts the same page locally.
"""

import os
from collections.abc import Callable
from copy import copy
from functools import partial, wraps
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
LARGEST_PHOTOGRAPH = 1024  # pixels of its longer side; larger ones are made smaller
GAP = 1  # pixels between the maps of two atoms, and between samples
SHOWN_ATOMS = 7
SAMPLES = (4, 8)  # rows and columns
ANY = "any"
PHOTOGRAPH = str(Path(__file__).with_name("photograph.jpg"))  # scikit-image's cat, by Stéfan van der Walt, CC0


def build(pipe: DiffusionPipeline, examples: list[str]) -> gr.Blocks:
    """The page.

    Args:
        pipe: a `CtrlCscPipeline`.
        examples: image files to pick from; may be none.
    """
    stages = list(range(1, len(pipe.model.config.stage_channels) + 1))

    def on(
        triggers: list[Any], function: Callable[..., Any], inputs: list[Any], outputs: Any, progress: str = "hidden"
    ) -> None:
        """Calls the function, an API endpoint of its name, once more where a trigger fires while it runs."""
        gr.on(
            triggers,
            _say_errors(partial(function, pipe)),
            inputs,
            outputs,
            api_name=function.__name__,
            show_progress=progress,
            trigger_mode="always_last",
        )

    def offer(images: list[Any], inputs: list[Any]) -> None:
        if images:
            gr.Examples(images, inputs, api_visibility="private")

    with gr.Blocks(title="CTRL-CSC", analytics_enabled=False) as page:
        gr.Markdown(
            "# CTRL-CSC\nAn image as a multi-stage sparse deconvolution: the encoder finds sparse codes stage by stage "
            f"and ends at {pipe.model.config.latent_dim} numbers; the decoder makes an image of these alone. "
            "[The paper](https://arxiv.org/abs/2302.09347)"
        )
        with gr.Tab("Reconstruct"):
            with gr.Row():
                image = _given("Your image", "image", next(iter(examples), None))
                outputs = [
                    _shown("What the model sees", "original"),
                    _shown("Reconstruction", "reconstruction"),
                    _shown("Difference; grey: none", "difference"),
                ]
            offer(examples, [image])
            figures = gr.Markdown(elem_id="figures")
            stage = gr.Radio(stages, value=1, label="Stage whose codes are shown")
            maps = _shown("Codes of this stage, a map for each atom, most active first; white: zero", "codes", 440)
            on([page.load, image.change, stage.change], reconstruct, [image, stage], [*outputs, maps, figures])
        with gr.Tab("Photographs"):
            with gr.Row():
                image = _given("Your photograph", "photograph")
                tiled = _shown("Reconstructed in its own size, in overlapping tiles", "tiled", 440, scale=2)
            figures = gr.Markdown(elem_id="tiled_figures")
            offer([PHOTOGRAPH], [image])
            on([image.change], photograph, [image], [tiled, figures], "full")
        with gr.Tab("Look inside"):
            with gr.Row():
                image = _given("Your image", "inside_image")
                inside = _shown("Atoms, and beneath each what it adds to the reconstruction", "inside", scale=3)
            stage = gr.Radio(stages, value=1, label="Stage", elem_id="inside_stage")
            figures = gr.Markdown(elem_id="inside_figures")
            offer(examples, [image])
            on([image.change, stage.change], look_inside, [image, stage], [inside, figures], "full")  # takes seconds
        with gr.Tab("Remove noise"):
            with gr.Row():
                image = _given("Your image", "clean")
                outputs = [
                    _shown("With noise", "noisy"),
                    _shown("Reconstruction of it", "noisy_reconstruction"),
                    _shown("Denoised", "denoised"),
                ]
            level = gr.Slider(0.05, 0.5, 0.2, step=0.05, label="Standard deviation of the noise, of pixels in [-1, 1]")
            figures = gr.Markdown(elem_id="noise_figures")
            offer(examples, [image])
            on([image.change, level.change], denoise, [image, level], [*outputs, figures])
        with gr.Tab("Fill in"):
            with gr.Row():
                image = _given("Your image", "whole")
                outputs = [
                    _shown("Missing pixels: white", "damaged"),
                    _shown("Completed", "completed"),
                    _shown("The same, known pixels kept", "kept"),
                ]
            share = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Share of missing pixels")
            seed = gr.Number(0, label="Seed: which ones", precision=0, elem_id="mask_seed")
            offer(examples, [image])
            on([image.change, share.change, seed.change], complete, [image, share, seed], outputs)
        with gr.Tab("Interpolate"):
            with gr.Row():
                first = _given("One image", "first")
                frame = _shown("Between them", "between")
                second = _given("Another", "second")
            position = gr.Slider(0, 1, 0.5, step=1 / (NUM_FRAMES - 1), label="Along the great circle of the latents")
            offer([list(pair) for pair in pairwise(examples)], [first, second])
            on([first.change, second.change, position.change], interpolate, [first, second, position], frame)
        if pipe.sampler is not None:
            with gr.Tab("Draw new images"):
                samples = _shown("Decoded from latents that the sampler drew", "samples", 440)
                classes = list(_classes(pipe))
                label = gr.Dropdown([ANY, *classes], value=ANY, label="Class", visible=bool(classes))
                seed = gr.Number(0, label="Seed", precision=0, elem_id="sample_seed")
                on([page.load, label.change, seed.change], sample, [label, seed], samples)
    return page


def reconstruct(pipe: DiffusionPipeline, image: Image.Image | None, stage: int) -> tuple[Any, ...]:
    """What the model sees, its reconstruction, their difference, the codes of a stage, and figures."""
    if image is None:
        return None, None, None, None, ""
    output = pipe(image, output_type="np", return_codes=True)
    original = pipe.image_processor.postprocess(_pixels(pipe, image), output_type="np")[0]
    pictures = _picture(original), _picture(output.images[0])
    codes = output.codes[stage - 1][0]
    channels, height, width = codes.shape
    figures = (
        f"PSNR {_psnr(*pictures):.2f} dB, from {pipe.model.config.latent_dim} numbers. Stage {stage} of "
        f"{len(output.codes)}: {channels} atoms at {height}x{width} places; {(codes > 0).float().mean().item():.1%} of "
        f"its {codes.numel():,} codes are not zero."
    )
    return *pictures, _picture(0.5 + (original - output.images[0]) / 2), _maps(codes), figures


def photograph(pipe: DiffusionPipeline, image: Image.Image | None) -> tuple[Any, ...]:
    """The reconstruction of a photograph in its own size, and figures."""
    if image is None:
        return None, ""
    pixels = pipe.image_processor(image, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
    original = pipe.image_processor.postprocess(pixels)[0]
    original.thumbnail((LARGEST_PHOTOGRAPH, LARGEST_PHOTOGRAPH))
    in_tiles = copy(pipe)  # other visitors' calls go on without tiles
    in_tiles.enable_tiling()
    reconstruction = in_tiles(original).images[0]
    figures = (
        f"PSNR {_psnr(original, reconstruction):.2f} dB at {original.width}x{original.height} pixels; each tile of "
        f"{pipe.model.config.image_size}x{pipe.model.config.image_size} is {pipe.model.config.latent_dim} numbers."
    )
    return reconstruction, figures


def look_inside(pipe: DiffusionPipeline, image: Image.Image | None, stage: int) -> tuple[Any, ...]:
    """The decoder's atoms that add most to a reconstruction above what they add, and a text.

    Last come the reconstruction and, beneath it, what is left: all other atoms and the bias.
    """
    if image is None:
        return None, ""
    latents = pipe.encode(image)
    parts, before_tanh = contributions(pipe.model.decoder, latents, stage)
    order = parts.square().sum(dim=(1, 2, 3)).argsort(descending=True)[:SHOWN_ATOMS]
    atoms, leading = atoms_in_pixels(pipe.model.decoder, stage, order), parts[order]
    atoms = atoms / atoms.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    factor = 1 / leading.abs().max().clamp(min=1e-12)
    above = torch.cat([atoms, before_tanh.tanh()[None]])
    beneath = torch.cat([factor * leading, (before_tanh - leading.sum(dim=0))[None]])
    numbers = ", ".join(map(str, order.tolist()))
    low_pass = ", the low pass" if stage == 1 and getattr(pipe.model.config, "low_pass", False) else ""
    figures = (
        f"The atoms of stage {stage} that add most to this reconstruction, of {len(parts)}: {numbers}. Above, each "
        "carried down to pixels through the dictionaries; beneath, what it adds before tanh with the relus of this "
        f"image frozen, times {factor:.1f}; grey is zero. At the right the reconstruction and, beneath it, all other "
        f"atoms{low_pass} and the bias. What is beneath, without that factor, adds up to the reconstruction before "
        "tanh."
    )
    return _sheet(pipe, torch.cat([above, beneath]), len(above)), figures


def denoise(pipe: DiffusionPipeline, image: Image.Image | None, noise_std: float) -> tuple[Any, ...]:
    """The image with noise, the reconstruction of that, what `pipe.denoise` makes of it, and their PSNR."""
    if image is None:
        return None, None, None, ""
    clean = _pixels(pipe, image)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = pipe.image_processor.postprocess(clean + noise_std * noise, output_type="pt")
    reconstruction = pipe(noisy, output_type="np").images[0]
    denoised = pipe.denoise(noisy, noise_std, output_type="np")[0]
    original = pipe.image_processor.postprocess(clean, output_type="np")[0]
    pictures = [_picture(pixels) for pixels in (noisy[0].permute(1, 2, 0).numpy(), reconstruction, denoised)]
    names = ("with noise", "reconstruction", "denoised")
    figures = ", ".join(
        f"{name} {_psnr(_picture(original), picture):.2f} dB" for name, picture in zip(names, pictures, strict=True)
    )
    return *pictures, f"PSNR: {figures}."


def complete(pipe: DiffusionPipeline, image: Image.Image | None, share: float, seed: int | None) -> tuple[Any, ...]:
    """The image without some of its pixels, completed, and completed with the known pixels kept."""
    if image is None:
        return None, None, None
    pixels = _pixels(pipe, image)
    missing = torch.rand(pixels.shape[-2:], generator=_generator(seed)) < share
    damaged = pipe.image_processor.postprocess(pixels.where(~missing, 1.0), output_type="pt")
    completed, kept = (pipe.inpaint(damaged, missing, keep_known=keep, output_type="np")[0] for keep in (False, True))
    return _picture(damaged[0].permute(1, 2, 0).numpy()), _picture(completed), _picture(kept)


def interpolate(
    pipe: DiffusionPipeline, first: Image.Image | None, second: Image.Image | None, position: float
) -> Image.Image | None:
    """The image at a position in [0, 1] between two."""
    if first is None or second is None:
        return None
    frames = pipe.interpolate(first, second, NUM_FRAMES, output_type="np")
    return _picture(frames[round(position * (NUM_FRAMES - 1))])


def sample(pipe: DiffusionPipeline, label: str, seed: int | None) -> Image.Image:
    """New images, of a class where the sampler has classes."""
    rows, columns = SAMPLES
    chosen = None if label == ANY else _classes(pipe)[label]
    drawn = pipe.sample(rows * columns, chosen, generator=_generator(seed), output_type="pt")
    return _sheet(pipe, 2 * drawn - 1, columns)


@torch.no_grad()
def contributions(decoder: Any, latents: torch.Tensor, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each atom of a stage adds to the reconstruction before tanh (atoms, 3, H, W), and that sum (3, H, W).

    With the relus of this image frozen the decoder is linear in an atom's codes, and so in the atom itself: the
    derivative towards the atom is what it adds.
    """
    name = f"stages.{stage - 1}.dictionary"
    dictionary = decoder.get_parameter(name)

    def decode(atoms: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(decoder, {name: atoms}, (latents,)).reconstruction[0]

    parts = []
    for index, atom in enumerate(dictionary):
        alone = torch.zeros_like(dictionary)
        alone[index] = atom
        parts.append(torch.func.jvp(decode, (dictionary,), (alone,))[1])
    reconstruction = decode(dictionary).clamp(-1 + 1e-6, 1 - 1e-6)  # where tanh is flat, nothing is left to divide
    return torch.stack(parts) / (1 - reconstruction**2), reconstruction.atanh()


@torch.no_grad()
def atoms_in_pixels(decoder: Any, stage: int, chosen: torch.Tensor) -> torch.Tensor:
    """These atoms of a stage, each from the middle of the image, through the dictionaries alone: (n, 3, H, W)."""
    sizes = decoder.config.signal_sizes
    signal = torch.zeros(len(chosen), decoder.config.stage_channels[stage - 1], sizes[stage], sizes[stage])
    signal[torch.arange(len(chosen)), chosen.cpu(), sizes[stage] // 2, sizes[stage] // 2] = 1
    signal = signal.to(decoder.device, decoder.dtype)
    for lower in reversed(range(stage)):
        width = decoder.config.stage_channels[lower]
        signal, low = signal[:, :width], signal[:, width:]  # with `low_pass` stage 2 makes that of the image, too
        signal = decoder.stages[lower].synthesize(signal, (sizes[lower], sizes[lower]))
        if low.shape[1]:
            signal = signal * decoder.signal_unit + decoder.stages[lower].interpolate(low, (sizes[lower], sizes[lower]))
    return signal


def _given(label: str, elem_id: str, path: str | None = None) -> gr.Image:
    """A box for an image that comes as its file is: `image_mode` None, or it would be converted to 8 bits and RGB.

    Args:
        path: of the image that is there from the start.
    """
    return gr.Image(
        path, label=label, elem_id=elem_id, type="pil", image_mode=None, sources=["upload", "clipboard"], height=300
    )


def _shown(label: str, elem_id: str, height: int = 300, scale: int = 1) -> gr.Image:
    return gr.Image(
        label=label,
        elem_id=elem_id,
        format="png",
        interactive=False,
        height=height,
        scale=scale,
        buttons=["download", "fullscreen"],
    )


def _say_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which tells the page in its own words what it refuses."""

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except (ValueError, TypeError, OSError) as error:  # PIL's of a broken file is the last
            raise gr.Error(str(error)) from error

    return call


def _classes(pipe: DiffusionPipeline) -> dict[str, int]:
    """The sampler's classes by their names, or by their numbers where the model's configuration has no names."""
    labels = [] if pipe.sampler.labels is None else pipe.sampler.labels.unique().tolist()
    names = pipe.model.config.id2label
    return {names[label] if set(labels) <= set(names) else str(label): label for label in labels}


def _generator(seed: int | None) -> torch.Generator:
    if seed is None or not 0 <= seed < 2**32:
        raise ValueError(f"The seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
    return torch.Generator().manual_seed(int(seed))


def _pixels(pipe: DiffusionPipeline, image: Image.Image) -> torch.Tensor:
    """What the model sees, (1, 3, H, W) in [-1, 1]."""
    return pipe.image_processor(image, return_tensors="pt").pixel_values


def _psnr(original: Image.Image, other: Image.Image) -> float:
    """In dB, of two pictures of the page."""
    difference = np.asarray(original).astype(int) - np.asarray(other)
    return float(-10 * np.log10(np.square(difference / 255).mean() + 1e-12))


def _picture(pixels: np.ndarray) -> Image.Image:
    """(height, width, 3) in [0, 1], each pixel as a square."""
    scale = -(-SHOWN_SIDE // pixels.shape[0])
    values = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(values.repeat(scale, axis=0).repeat(scale, axis=1))


def _sheet(pipe: DiffusionPipeline, images: torch.Tensor, columns: int) -> Image.Image:
    """Images (n, 3, H, W) in [-1, 1], row by row."""
    pixels = pipe.image_processor.postprocess(images, output_type="np")
    height, width = pixels.shape[1:3]
    rows = len(pixels) // columns
    sheet = np.ones((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.float32)
    for index, values in enumerate(pixels):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = values
    return _picture(sheet)


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
