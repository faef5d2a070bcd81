"""Promises of CtrlCscImageProcessor, against Pillow and against arithmetic done here."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps

from ctrl_csc_hf.models import image_processing_ctrl_csc
from ctrl_csc_hf.models.image_processing_ctrl_csc import CtrlCscImageProcessor, check_sides

SIZE = 16
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
WIDE = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor() -> CtrlCscImageProcessor:
    return CtrlCscImageProcessor(image_size=SIZE)


def process(images, **kwargs) -> torch.Tensor:
    return CtrlCscImageProcessor(image_size=SIZE)(images, return_tensors="pt", **kwargs).pixel_values


def to_unit(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) with values in [0, 255] -> (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float64).transpose(2, 0, 1)[None] / 255 * 2 - 1).float()


def reload(image: Image.Image, **save) -> Image.Image:
    file = io.BytesIO()
    image.save(file, **save)
    return Image.open(file)


# PIL images


def test_8_bit_values_become_minus_one_to_one():
    pixel_values = process(Image.fromarray(PIXELS))
    assert pixel_values.shape == (1, 3, SIZE, SIZE) and pixel_values.dtype == torch.float32
    torch.testing.assert_close(pixel_values, to_unit(PIXELS), rtol=0, atol=1e-6)


def test_an_image_of_the_right_size_comes_back_bit_exactly(processor):
    every_value = np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE)
    for pixels in (PIXELS, np.stack([every_value, every_value.T, 255 - every_value], axis=-1)):
        (image,) = processor.postprocess(process(Image.fromarray(pixels)))
        assert image.mode == "RGB" and image.size == (SIZE, SIZE)
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reload(Image.fromarray(PIXELS), format="PNG", exif=exif)
    assert image.getexif()[0x0112] == orientation
    # The eight orientations of the EXIF standard: which corner the first row and column lie in.
    upright = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: np.rot90(PIXELS.transpose(1, 0, 2), 2),
        8: np.rot90(PIXELS, 1),
    }[orientation]
    torch.testing.assert_close(process(image), to_unit(upright))
    torch.testing.assert_close(process(image), process(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_put_on_white(mode):
    color, alpha = np.divmod(np.arange(SIZE * SIZE) * 257, 256)
    color, alpha = (np.uint8(plane.reshape(SIZE, SIZE)) for plane in (color, alpha[::-1]))
    grey_with_alpha = Image.merge("LA", [Image.fromarray(color), Image.fromarray(alpha)])
    on_white = color * (alpha / 255) + 255 * (1 - alpha / 255)
    expected = to_unit(np.repeat(on_white[..., None], 3, axis=2))
    torch.testing.assert_close(process(grey_with_alpha.convert(mode)), expected, rtol=0, atol=1.01 / 255)


def test_a_palette_with_alpha_is_put_on_white():
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image = image.convert("PA")
    image.putalpha(51)
    on_white = np.full((SIZE, SIZE, 3), [206, 208, 210])  # 10 / 5 + 255 * 4 / 5 = 206
    torch.testing.assert_close(process(image), to_unit(on_white))


def test_fully_transparent_is_white_and_opaque_is_left_alone():
    image = Image.fromarray(PIXELS).convert("RGBA")
    assert torch.equal(process(image), process(Image.fromarray(PIXELS)))
    image.putalpha(0)
    assert torch.equal(process(image), torch.ones(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_transparent_color_of_png_and_gif_is_white(mode):
    image = Image.new(mode, (SIZE, SIZE), 1)
    if mode == "P":
        image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(0, (0, 0, SIZE, 4))
    opaque = process(reload(image, format="PNG"))
    expected = opaque.clone()
    expected[:, :, :4] = 1
    assert not torch.equal(opaque, expected)
    assert torch.equal(process(reload(image, format="PNG", transparency=0)), expected)


def test_palette_grey_and_bilevel_images_keep_their_colors():
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    indices = PIXELS[..., 0]
    image = Image.fromarray(indices)
    torch.testing.assert_close(process(image), to_unit(np.repeat(indices[..., None], 3, axis=2)))
    image = image.convert("P")
    image.putpalette(palette.tobytes())
    torch.testing.assert_close(process(image), to_unit(palette[indices]))
    bilevel = Image.fromarray(indices > 99)
    assert bilevel.mode == "1"
    torch.testing.assert_close(process(bilevel), to_unit(np.repeat(indices[..., None] > 99, 3, axis=2) * 255))


def test_cmyk_is_converted_by_its_inks():
    inks = RNG.integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    image = Image.merge("CMYK", [Image.fromarray(plane.copy()) for plane in np.moveaxis(inks, -1, 0)])
    torch.testing.assert_close(process(image), to_unit(expected), rtol=0, atol=2.01 / 255)


def png(bits: int, color_type: int, rows: list[bytes], transparent: tuple[int, ...]) -> Image.Image:
    """A PNG file of any depth, which PIL cannot write, with a transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", SIZE, len(rows), bits, color_type, 0, 0, 0)
    color = struct.pack(f">{len(transparent)}H", *transparent)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = {b"IHDR": header, b"tRNS": color, b"IDAT": pixels, b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("bits", "colors", "transparent"),
    [  # of the two halves of an image, at the file's depth
        (1, [(0,), (1,)], 1),
        (2, [(1,), (2,)], 0),
        (4, [(3,), (11,)], 0),
        (4, [(5,), (10,)], 1),
        (8, [(3,), (51,)], 0),
        (8, [(51,), (3,)], 1),
        (16, [(3000,), (40000,)], 0),
        (16, [(3000, 4000, 5000), (60000, 50000, 40000)], 0),
        (8, [(30, 40, 50), (60, 50, 40)], 1),
    ],
)
def test_the_transparent_color_of_a_png_of_any_depth_is_white(bits, colors, transparent, loaded):
    def row(color: tuple[int, ...]) -> bytes:
        if bits == 16:
            return struct.pack(f">{len(color)}H", *color) * SIZE
        if len(color) == 3:
            return bytes(color) * SIZE
        return int((f"{color[0]:0{bits}b}") * SIZE, 2).to_bytes(SIZE * bits // 8, "big")

    half = SIZE // 2
    rows = [row(colors[0])] * half + [row(colors[1])] * half
    image = png(bits, 0 if len(colors[0]) == 1 else 2, rows, colors[transparent])
    if loaded:
        image.load()
    before = dict(image.info)
    halves = process(image)[0].split(half, dim=1)
    assert torch.equal(halves[transparent], torch.ones(3, half, SIZE))
    shown = torch.tensor(colors[1 - transparent]) / (2**bits - 1) * 2 - 1
    expected = shown[:, None, None].expand(3, half, SIZE)
    torch.testing.assert_close(halves[1 - transparent], expected, rtol=0, atol=2.01 / 255)
    assert image.info == before


@pytest.mark.parametrize(
    ("bits", "pixel", "transparent", "expected"),
    [
        (8, (85,), (1,), 85),
        (8, (34,), (2,), 34),
        (8, (85,), (85,), 255),
        (2, (1,), (1,), 255),
        (2, (1,), (0,), 85),
        (4, (2,), (2,), 255),
        (16, (3, 4, 5), (3, 4, 5), 255),  # no part of which is beyond 8 bits
        (16, (768, 1024, 1280), (3, 4, 5), (3, 4, 5)),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_flat_png_is_white_only_if_its_color_is_the_transparent_one(bits, pixel, transparent, expected, loaded):
    row = "".join(f"{value:0{bits}b}" for value in pixel * SIZE)
    rows = [int(row, 2).to_bytes(len(row) // 8, "big")] * SIZE
    image = png(bits, 0 if len(pixel) == 1 else 2, rows, transparent)
    if loaded:
        image.load()
    torch.testing.assert_close(process(image), to_unit(np.broadcast_to(expected, (SIZE, SIZE, 3))))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_is_scaled_not_clipped(mode):
    values = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (SIZE, SIZE), values.astype(dtype).tobytes())
    expected = to_unit(np.repeat(np.round(values / 65535 * 255)[..., None], 3, axis=2))
    torch.testing.assert_close(process(image), expected)
    torch.testing.assert_close(process(values), expected)
    torch.testing.assert_close(process(torch.from_numpy(values)), expected)


def test_a_16_bit_png_is_scaled():
    values = PIXELS[..., 0].astype(np.uint16) * 257
    image = reload(Image.fromarray(values), format="PNG")
    assert torch.equal(process(image), process(PIXELS[..., 0]))


def test_float_images_hold_zero_to_one():
    grey = RNG.random((SIZE, SIZE), dtype=np.float32)
    expected = torch.from_numpy(2 * grey - 1).expand(1, 3, -1, -1)
    torch.testing.assert_close(process(Image.fromarray(grey)), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"images\[0\] holds floats in \[0\.0, 255\.0\].* \[0, 1\]"):
        process(Image.fromarray(np.linspace(0, 255, 256, dtype=np.float32).reshape(SIZE, SIZE)))


# Resizing


@pytest.mark.parametrize("transpose", [False, True])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(transpose, processor):
    pixels = WIDE.transpose(1, 0, 2) if transpose else WIDE
    resized = Image.fromarray(WIDE).resize((22, SIZE), Image.Resampling.BICUBIC)  # 56 * 16 / 40 = 22.4
    expected = np.asarray(resized.crop((3, 0, 3 + SIZE, SIZE)))
    (image,) = processor.postprocess(process(Image.fromarray(pixels)))
    if transpose:  # Pillow resizes one side after the other, and rounds in between
        difference = np.asarray(image).transpose(1, 0, 2).astype(int) - expected
        assert np.abs(difference).max() <= 1
    else:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_resizing_is_antialiased():
    checkerboard = np.uint8(255 * (np.indices((160, 160)).sum(axis=0) % 2))
    assert process(checkerboard).abs().max() < 0.02


def test_small_images_are_enlarged():
    assert process(Image.fromarray(PIXELS[:5, :7])).shape == (1, 3, SIZE, SIZE)


def test_one_pixel_high_and_wide_images_are_images():
    for size in [(1, 1), (3, 3), (1, 5), (5, 1)]:
        torch.testing.assert_close(process(Image.new("RGB", size, "white")), torch.ones(1, 3, SIZE, SIZE))


def test_floats_are_resized_as_8_bit_values_are_but_without_rounding():
    as_float, as_uint8 = process(WIDE.astype(np.float32) / 255), process(WIDE)
    torch.testing.assert_close(as_float, as_uint8, rtol=0, atol=3 / 255)
    assert as_float.min() >= -1 and as_float.max() <= 1
    assert len(as_float.unique()) > 256


# Arrays and tensors


@pytest.mark.parametrize("pixels", [PIXELS, WIDE], ids=["right size", "resized"])
def test_channel_order_and_container_make_no_difference(pixels):
    expected = process(Image.fromarray(pixels))
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    for array in (pixels, first, pixels.transpose(2, 0, 1)):
        assert torch.equal(process(array), expected)
        assert torch.equal(process(torch.from_numpy(array)), expected)


def test_grey_arrays_of_every_shape_become_three_equal_channels():
    grey = PIXELS[..., 0]
    expected = process(Image.fromarray(grey))
    for array in (grey, grey[..., None], grey[None]):
        assert torch.equal(process(array), expected)
        assert torch.equal(process(torch.from_numpy(array)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_keep_their_precision(dtype):
    image = torch.rand(3, SIZE, SIZE, generator=torch.manual_seed(0)).to(dtype).requires_grad_()
    expected = 2 * image.detach().float()[None] - 1
    torch.testing.assert_close(process(image), expected, rtol=0, atol=1e-6)


def test_batches_and_nested_lists_come_out_flat_and_in_order():
    batch = RNG.integers(0, 256, (4, 20, 24, 3), dtype=np.uint8)
    expected = torch.cat([process(Image.fromarray(image)) for image in batch])
    first = batch.transpose(0, 3, 1, 2)
    for images in (
        batch,
        first,
        torch.from_numpy(batch),
        torch.from_numpy(first),
        list(batch),
        tuple(first),
        [batch[:1], [Image.fromarray(batch[1]), [torch.from_numpy(first[2])]], batch[3]],
    ):
        assert torch.equal(process(images), expected)


def test_images_of_many_sizes_make_one_batch():
    assert process([Image.fromarray(WIDE), PIXELS, WIDE[:20]]).shape == (3, 3, SIZE, SIZE)


def test_numpy_on_request_and_the_input_is_left_as_it_was(processor):
    before = WIDE.copy()
    pixel_values = processor(WIDE, return_tensors="np").pixel_values
    assert pixel_values.shape == (1, 3, SIZE, SIZE) and pixel_values.dtype == np.float32
    np.testing.assert_array_equal(pixel_values, process(WIDE).numpy())
    np.testing.assert_array_equal(WIDE, before)


def test_where_both_channel_orders_fit_the_caller_has_to_say_which():
    pixels = RNG.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"\(3, 3, 3\).*input_data_format.*channels_first.*channels_last"):
        process(pixels)
    last, first = (process(pixels, input_data_format=f"channels_{end}") for end in ("last", "first"))
    assert torch.equal(last, process(Image.fromarray(pixels)))
    assert torch.equal(first, process(Image.fromarray(pixels.transpose(1, 2, 0))))
    with pytest.raises(ValueError, match=r"\(3, 16, 16\) with input_data_format='channels_last'"):
        process(PIXELS.transpose(2, 0, 1), input_data_format="channels_last")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            None,
            TypeError,
            r"images\[0\] is of type NoneType: it must be a PIL image, a numpy array or a tensor",
        ),
        ("cat.png", TypeError, r"images\[0\] is of type str"),
        ([PIXELS, Path("cat.png")], TypeError, r"images\[1\] is of type \w*Path"),
        ([], ValueError, r"images holds \[\]: there must be at least one"),
        ([PIXELS, []], ValueError, r"images holds \[\]: there must be at least one"),
        (np.zeros((0, 3, 8, 8), np.uint8), ValueError, r"images holds an array of shape \(0, 3, 8, 8\)"),
        (
            np.zeros((0, 8, 3), np.uint8),
            ValueError,
            r"images\[0\] has shape \(0, 8, 3\): .*at least one pixel",
        ),
        (Image.new("RGB", (0, 8)), ValueError, r"images\[0\] has 8 x 0 pixels: it must have at least one"),
        ([PIXELS, Image.new("I", (0, 8))], ValueError, r"images\[1\] has 8 x 0 pixels: it must have at least one"),
        (np.zeros((8, 8, 2), np.uint8), ValueError, r"images\[0\] has shape \(8, 8, 2\): .*C = 1 or 3"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, r"images\[0\] has shape \(8, 8, 5\): .*C = 1 or 3"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"\(8, 8, 4\): .*transparency as PIL images"),
        (np.zeros(3, np.uint8), ValueError, r"images\[0\] has shape \(3,\): it must be \(height, width\)"),
        (torch.zeros(1, 1, 3, 8, 8), ValueError, r"images\[0\] has shape \(1, 1, 3, 8, 8\)"),
        (np.full((8, 8), np.nan), ValueError, r"images\[0\] holds floats in \[nan, nan\]: .*\[0, 1\]"),
        (np.full((8, 8), 255.0), ValueError, r"floats in \[255\.0, 255\.0\]: .*\[0, 1\].*uint8"),
        (torch.full((3, 8, 8), -0.5), ValueError, r"floats in \[-0\.5, -0\.5\]: they must be in \[0, 1\]"),
        (
            torch.zeros(3, 8, 8, dtype=torch.int64),
            TypeError,
            r"images\[0\] has dtype int64: it must be uint8",
        ),
        (Image.new("I", (8, 8), 70000), ValueError, r"mode I and values in \[70000, 70000\]: .*\[0, 65535\]"),
    ],
)
def test_what_it_cannot_take_is_a_clear_error(images, error, message):
    with pytest.raises(error, match=message):
        process(images)


# postprocess


def test_postprocess_gives_pil_numpy_and_torch(processor):
    pixel_values = torch.rand(2, 3, 4, 5, generator=torch.manual_seed(0)) * 2 - 1
    expected = (pixel_values.double().numpy() + 1) / 2
    as_torch = processor.postprocess(pixel_values, output_type="pt")
    assert as_torch.shape == (2, 3, 4, 5) and as_torch.dtype == torch.float32
    np.testing.assert_allclose(as_torch.numpy(), expected, atol=1e-6)
    as_numpy = processor.postprocess(pixel_values, output_type="np")
    assert as_numpy.shape == (2, 4, 5, 3) and as_numpy.dtype == np.float32
    np.testing.assert_allclose(as_numpy, expected.transpose(0, 2, 3, 1), atol=1e-6)
    as_pil = processor.postprocess(pixel_values.requires_grad_())
    assert [(image.mode, image.size) for image in as_pil] == [("RGB", (5, 4))] * 2
    np.testing.assert_array_equal(np.stack(as_pil), (expected * 255).round().transpose(0, 2, 3, 1))
    assert as_pil == processor.postprocess(pixel_values.detach().numpy())


def test_postprocess_rounds_to_the_nearest_of_the_256_values(processor):
    values = torch.linspace(0, 255, 3 * 1001, dtype=torch.float64)
    values = values[(values % 1 - 0.5).abs() > 1e-3][:2700].view(1, 3, 30, 30)
    (image,) = processor.postprocess(values / 127.5 - 1)
    np.testing.assert_array_equal(np.asarray(image), values[0].round().permute(1, 2, 0).numpy())


def test_postprocess_clips(processor):
    pixel_values = torch.tensor([-7.0, 0.0, 7.0]).view(1, 3, 1, 1)
    assert processor.postprocess(pixel_values, "pt").flatten().tolist() == [0, 0.5, 1]
    assert processor.postprocess(pixel_values.bfloat16())[0].getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(3, 8, 8), r"pixel_values has shape \(3, 8, 8\): it must be \(n, 3, height, width\)"),
        (torch.zeros(1, 8, 8, 3), r"pixel_values has shape \(1, 8, 8, 3\)"),
        (torch.full((1, 3, 8, 8), torch.nan), "pixel_values holds NaN"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"pixel_values is torch.uint8: .*floats in \[-1, 1\]"),
        ([Image.fromarray(PIXELS)], r"pixel_values is list: it must be a tensor or array"),
    ],
)
def test_postprocess_refuses_what_is_no_batch_of_pixels(processor, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        processor.postprocess(pixel_values)


def test_postprocess_refuses_an_unknown_output_type(processor):
    with pytest.raises(ValueError, match=r"output_type='latent' is not allowed: it must be 'pil', 'np' or 'pt'"):
        processor.postprocess(torch.zeros(1, 3, 8, 8), output_type="latent")


# Settings


def test_image_size_is_short_for_size_and_crop_size():
    settings = CtrlCscImageProcessor(image_size=64).to_dict()
    assert settings["size"] == {"shortest_edge": 64}
    assert settings["crop_size"] == {"height": 64, "width": 64}
    same = CtrlCscImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    assert settings == same.to_dict()
    assert CtrlCscImageProcessor()(WIDE, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("image_size", [0, -1, 8.0, True, "8"])
def test_image_size_must_be_a_positive_integer(image_size):
    with pytest.raises(ValueError, match=f"image_size={image_size!r} is not allowed: .* positive integer"):
        CtrlCscImageProcessor(image_size=image_size)


@pytest.mark.parametrize("size", [{"longest_edge": 8}, {"shortest_edge": 0}])
def test_sizes_that_it_does_not_know_are_refused(size):
    with pytest.raises(ValueError, match=r"size=\{.*\} is not allowed: it must have shortest_edge, or height"):
        process(WIDE, size=size)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("image_std", 0, "a positive number, or a list of 3"),
        ("image_std", [0.5, 0.0, 0.5], "a positive number"),
        ("image_std", -0.5, "a positive number"),
        ("image_std", float("nan"), "a positive number"),
        ("image_std", 1e-50, "a positive number"),
        ("image_std", [0.5, 0.5], "a positive number, or a list of 3"),
        ("image_std", ["a", "b", "c"], "a positive number"),
        ("image_mean", float("inf"), "a finite number, or a list of 3"),
        ("image_mean", [0.5, float("nan"), 0.5], "a finite number"),
        ("image_mean", [0.5], "a finite number, or a list of 3"),
        ("rescale_factor", 0, "a positive number$"),
        ("rescale_factor", -1 / 255, "a positive number$"),
        ("rescale_factor", float("nan"), "a positive number$"),
        ("rescale_factor", [1 / 255] * 3, "a positive number$"),
        ("crop_size", {"height": 0, "width": 8}, "height and width, both positive"),
        ("crop_size", {"height": 8, "width": -1}, "height and width, both positive"),
        ("crop_size", {"shortest_edge": 8}, "height and width, both positive"),
    ],
)
def test_numbers_that_would_make_no_pixels_are_refused(name, value, wanted):
    with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed: it must (be|have) {wanted}"):
        CtrlCscImageProcessor(**{name: value})(PIXELS)


def test_saved_settings_load_again(tmp_path):
    saved = CtrlCscImageProcessor(image_size=24, resample=Image.Resampling.LANCZOS)
    saved.save_pretrained(tmp_path)
    loaded = CtrlCscImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert torch.equal(*(each(WIDE, return_tensors="pt").pixel_values for each in (saved, loaded)))
    smaller = CtrlCscImageProcessor.from_pretrained(tmp_path, image_size=8)
    assert smaller(WIDE, return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)


LOAD = """
import sys
import zlib
import numpy as np
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained(sys.argv[1], **{options})
image = np.load(sys.argv[1] + "/image.npy")
np.save(sys.argv[1] + "/loaded.npy", processor(image, return_tensors="np").pixel_values)
print(type(processor).__module__, "ctrl_csc_hf" in sys.modules)
"""


needs_auto_class = pytest.mark.skipif(
    hasattr(transformers.AutoImageProcessor, "_backends"),  # a dummy
    reason="up to 5.17, transformers' AutoImageProcessor demands torchvision",
)


def load_in_a_new_process(folder: Path, script: str) -> list[str]:
    np.save(folder / "image.npy", WIDE)
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@needs_auto_class
def test_auto_image_processor_loads_it_in_a_new_process(tmp_path):
    CtrlCscImageProcessor(image_size=SIZE).save_pretrained(tmp_path)
    script = "import ctrl_csc_hf\n" + LOAD.format(options={})
    module, _ = load_in_a_new_process(tmp_path, script)
    assert module == CtrlCscImageProcessor.__module__
    np.testing.assert_array_equal(np.load(tmp_path / "loaded.npy"), process(WIDE).numpy())


@needs_auto_class
def test_its_file_alone_serves_it_as_remote_code(tmp_path):
    CtrlCscImageProcessor(image_size=SIZE).save_pretrained(tmp_path)
    shutil.copy(image_processing_ctrl_csc.__file__, tmp_path)
    config = tmp_path / "preprocessor_config.json"
    auto_map = {"AutoImageProcessor": "image_processing_ctrl_csc.CtrlCscImageProcessor"}
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"auto_map": auto_map}), encoding="utf-8"
    )
    module, imported = load_in_a_new_process(tmp_path, LOAD.format(options={"trust_remote_code": True}))
    assert module.startswith("transformers_modules.") and imported == "False"
    np.testing.assert_array_equal(np.load(tmp_path / "loaded.npy"), process(WIDE).numpy())


# Without rescaling


@pytest.mark.parametrize("options", [{}, {"do_resize": False}, {"resample": Image.Resampling.LANCZOS}])
@pytest.mark.parametrize("mean_and_std", [(0.5, 0.5), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])])
def test_floats_give_the_same_pixels_whether_they_are_rescaled_or_not(options, mean_and_std):
    mean, std = mean_and_std
    image = RNG.random((SIZE, 24, 3), dtype=np.float32)
    rescaled, as_they_are = (
        process(image, do_rescale=do_rescale, image_mean=mean, image_std=std, **options) for do_rescale in (True, False)
    )
    torch.testing.assert_close(as_they_are, rescaled, rtol=0, atol=1e-6)
    centre = (image[:, 4:20].astype(np.float64) - mean) / std
    torch.testing.assert_close(as_they_are[0].permute(1, 2, 0).double(), torch.from_numpy(centre), rtol=0, atol=1e-5)


@pytest.mark.parametrize("image", [PIXELS, PIXELS.astype(np.uint16) * 257, Image.fromarray(PIXELS)])
def test_8_bit_values_that_are_not_rescaled_come_out_as_they_are_or_are_refused(image):
    raw = process(image, do_rescale=False, do_normalize=False)
    assert raw.dtype == torch.uint8 and np.array_equal(raw[0].permute(1, 2, 0).numpy(), PIXELS)
    with pytest.raises(ValueError, match=r"do_normalize=True with do_rescale=False needs floats in .*do_rescale=True"):
        process(image, do_rescale=False)


def test_the_rescale_factor_is_of_8_bit_values_and_floats_stand_for_these():
    options = {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}  # [0, 2], then [-1, 1]
    torch.testing.assert_close(process(PIXELS, **options), to_unit(PIXELS), rtol=0, atol=1e-6)
    torch.testing.assert_close(process(PIXELS / 255, **options), to_unit(PIXELS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_the_container_asked_for_holds_the_same_pixels(return_tensors, processor):
    pixel_values = processor([PIXELS, WIDE], return_tensors=return_tensors).pixel_values
    assert type(pixel_values) is {None: list, "np": np.ndarray, "pt": torch.Tensor}[return_tensors]
    np.testing.assert_array_equal(np.stack([np.asarray(each) for each in pixel_values]), process([PIXELS, WIDE]))


# Images that would take gigabytes


@pytest.mark.parametrize("shape", [(1, 1001), (2002, 2)])
def test_an_image_so_thin_that_resizing_would_make_gigabytes_of_it_is_refused(shape: tuple[int, int]) -> None:
    message = rf"{shape[0]} x {shape[1]} pixels: a side must be at most 1000 times"
    for refuse in (process, lambda pixels: process(Image.fromarray(pixels)), lambda pixels: check_sides(*shape)):
        with pytest.raises(ValueError, match=message):
            refuse(np.zeros(shape, np.uint8))
    assert process(Image.fromarray(np.zeros((1, 1000), np.uint8))).shape == (1, 3, SIZE, SIZE)


def test_an_image_of_more_pixels_than_pil_warns_of_is_refused_before_it_is_decoded() -> None:
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    with pytest.warns(Image.DecompressionBombWarning):
        image = Image.open(io.BytesIO(file.getvalue()[:100]))  # without its pixels, which nothing could decode
    with pytest.raises(ValueError, match=r"images\[1\] has 10000 x 10000 pixels: it must have at most 89,478,485"):
        process([PIXELS, image])
    assert Image.MAX_IMAGE_PIXELS == image_processing_ctrl_csc.MOST_PIXELS
    check_sides(9459, 9459)
    with pytest.raises(ValueError, match="9460 x 9460 pixels"):
        check_sides(9460, 9460)
