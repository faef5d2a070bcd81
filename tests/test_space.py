"""The Space in a real browser: started as the Hub starts it, without the package, from a repository's id alone."""

import io
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from gradio.data_classes import ImageData
from gradio_client import Client, handle_file
from hub_server import HubServer
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from test_halves import trained_model
from test_hub import WITHOUT_THE_PACKAGE, needs_downloaded_code, publish
from test_readme import COMMANDS

from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel, CtrlCscPipeline
from ctrl_csc_hf.inspection import anatomy
from ctrl_csc_hf.models.sampling import LatentSampler

SPACE = Path(__file__).parents[1] / "spaces" / "ctrl-csc"
APP = runpy.run_path(str(SPACE / "app.py"))
START = WITHOUT_THE_PACKAGE + "import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
# The rest of Chromium's own traffic finds no network on a test machine and fills its log.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="session")
def chromium() -> str:
    """Its path; where it is missing it is installed, on Debian and as root."""
    if shutil.which("chromium") is None:
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            pytest.skip("Chromium is not installed, and only root on Debian can install it")
        install = "apt-get install -y --no-install-recommends chromium"
        command = f"{install} || (apt-get update && {install})"
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        result = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(f"Chromium could not be installed: {result.stderr.strip().splitlines()[-1]}")
    path = shutil.which("chromium")
    assert path is not None
    return path


@pytest.fixture
def browser_page(chromium: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser.new_page(viewport={"width": 1280, "height": 1300})
        browser.close()


@contextmanager
def serving(command: list[str], environment: dict[str, str], port: int, log: Path) -> Iterator[str]:
    """The address of the page that the command serves, until the block ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    address = f"http://127.0.0.1:{port}"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text(encoding="utf-8")
                try:
                    urllib.request.urlopen(address, timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two, larger than the model's images and not square."""
    generator = np.random.default_rng(0)
    paths = []
    for name in ("a.png", "b.png"):
        coarse = generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60, 40), Image.Resampling.BICUBIC).save(tmp_path / name)
        paths.append(tmp_path / name)
    return paths


def shown(page: Page, name: str, expected: np.ndarray) -> np.ndarray:
    """The picture in the box of this name, at the model's size, once it is `expected` or ten seconds have passed."""
    pixels = np.zeros(0)
    for _ in range(20):
        image = page.locator(f"#{name} img").first
        image.wait_for(timeout=60_000)
        body = page.request.get(str(image.get_attribute("src"))).body()
        large = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
        scale = len(large) // len(expected)
        pixels = large[scale // 2 :: scale, scale // 2 :: scale]
        if pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).max() <= 1:
            break
        page.wait_for_timeout(500)
    return pixels


def same(page: Page, name: str, expected: Image.Image) -> bool:
    pixels = np.asarray(expected).astype(int)
    found = shown(page, name, pixels)
    return found.shape == pixels.shape and bool(np.abs(found - pixels).max() <= 1)


def maps_in_a_row(codes: torch.Tensor) -> Image.Image:
    """Codes (C, height, width) as maps from white, zero, to black, the largest; after each a line of a pixel."""
    shades = 255 * (1 - codes[codes.sum(dim=(1, 2)).argsort(descending=True)] / codes.max())
    channels, height, width = shades.shape
    picture = np.full((height + 1, channels * (width + 1), 3), (170, 200, 235), np.uint8)
    for index, shade in enumerate(shades):
        picture[:height, index * (width + 1) : index * (width + 1) + width] = shade.round().numpy()[..., None]
    return Image.fromarray(picture)


def upload(page: Page, name: str, path: Path) -> None:
    page.locator(f"#{name} input[type=file]").set_input_files(path)


def a_pipeline(model: CtrlCscModel, sampler: LatentSampler | None = None) -> CtrlCscPipeline:
    pipe = CtrlCscPipeline(model, CtrlCscImageProcessor(image_size=model.config.image_size), sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def a_sampler(labels: torch.Tensor | None) -> LatentSampler:
    generator = torch.Generator().manual_seed(0)
    means, factors = (torch.randn(2, *shape, generator=generator) for shape in ((6,), (3, 6)))
    return LatentSampler(torch.tensor([0.5, 0.5]), means, list(factors), labels)


def small(picture: Image.Image, height: int) -> Image.Image:
    """A picture of the page with each pixel, shown as a square, as one."""
    scale = picture.height // height
    return Image.fromarray(np.asarray(picture)[scale // 2 :: scale, scale // 2 :: scale])


@needs_downloaded_code
def test_an_uploaded_picture_is_reconstructed_looked_into_and_interpolated(
    tmp_path: Path, browser_page: Page, photos: list[Path]
) -> None:
    model = trained_model(False)
    model.save_pretrained(tmp_path / "checkpoint")
    pipe, images = a_pipeline(model), [Image.open(photo) for photo in photos]
    page, port = browser_page, free_port()
    with HubServer() as server:
        publish(server, tmp_path / "checkpoint")
        environment = server.environment(tmp_path / "cache") | {
            "MODEL_ID": "org/name",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_ANALYTICS_ENABLED": "0",
        }
        command = [sys.executable, "-c", START, str(SPACE / "app.py")]
        with serving(command, environment, port, tmp_path / "log") as address:
            page.goto(address)
            upload(page, "image", photos[0])
            output = pipe(images[0], return_codes=True)
            assert same(page, "reconstruction", output.images[0])
            pixel_values = pipe.image_processor(images[0], return_tensors="pt").pixel_values
            (original,) = pipe.image_processor.postprocess(pixel_values)
            assert same(page, "original", original)
            pixels = [np.asarray(image).astype(int) for image in (original, output.images[0])]
            assert same(page, "difference", Image.fromarray(((255 + pixels[0] - pixels[1]) // 2).astype(np.uint8)))
            assert same(page, "codes", maps_in_a_row(output.codes[0][0]))

            for stage, codes in enumerate(output.codes, start=1):
                page.get_by_role("radio", name=str(stage), exact=True).check()
                share = f"{(codes > 0).float().mean().item():.1%} of its {codes.numel():,} codes are not zero"
                page.get_by_text(f"Stage {stage} of {len(output.codes)}").wait_for()
                assert share in page.locator("#figures").inner_text()

            broken = tmp_path / "broken.png"
            broken.write_text("no image", encoding="utf-8")
            page.locator("#image").get_by_label("Remove Image").click()
            upload(page, "image", broken)
            page.get_by_text("Error", exact=True).first.wait_for()
            page.reload()
            upload(page, "image", photos[1])
            assert same(page, "reconstruction", pipe(images[1]).images[0])

            page.get_by_role("tab", name="Interpolate").click()
            for name, photo in zip(("first", "second"), photos, strict=True):
                upload(page, name, photo)
            frames = pipe.interpolate(*images, 21)
            for index in (10, 0, 5, 20):
                page.locator("input[type=range]").first.fill(str(index / 20))
                assert same(page, "between", frames[index]), index


def test_readmes_demo_command_serves_a_local_folder_with_its_examples(
    tmp_path: Path, browser_page: Page, photos: list[Path]
) -> None:
    model = trained_model(True)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    CtrlCscImageProcessor(image_size=model.config.image_size).save_pretrained(folder)
    sampler = a_sampler(labels=None)
    sampler.save_pretrained(folder / "sampler")
    (folder / "examples").mkdir()
    for photo in photos:
        shutil.copy(photo, folder / "examples")
    port = free_port()
    (line,) = (line for line in COMMANDS if line.startswith("ctrl-csc demo"))
    words = shlex.split(line.replace("demo/model", str(folder)))
    command = [str(Path(sys.executable).parent / words[0]), *words[1:], "--port", str(port)]
    with serving(command, {"GRADIO_ANALYTICS_ENABLED": "0"}, port, tmp_path / "log") as address:
        browser_page.goto(address)
        pipe, photo = a_pipeline(model, sampler), Image.open(photos[1])
        assert same(browser_page, "reconstruction", pipe(Image.open(photos[0])).images[0])
        browser_page.locator("button.gallery-item").nth(1).click()
        assert same(browser_page, "reconstruction", pipe(photo).images[0])

        browser_page.get_by_role("tab", name="Look inside").click()
        upload(browser_page, "inside_image", photos[1])
        assert same(browser_page, "inside", small(APP["look_inside"](pipe, photo, 1)[0], 17))
        browser_page.get_by_role("tab", name="Remove noise").click()
        upload(browser_page, "clean", photos[1])
        assert same(browser_page, "denoised", small(APP["denoise"](pipe, photo, 0.2)[2], 8))
        browser_page.get_by_role("tab", name="Fill in").click()
        upload(browser_page, "whole", photos[1])
        assert same(browser_page, "kept", small(APP["complete"](pipe, photo, 0.5, 0)[2], 8))
        browser_page.get_by_role("tab", name="Draw new images").click()
        assert same(browser_page, "samples", small(APP["sample"](pipe, "any", 0), 35))


def test_what_atoms_add_is_what_anatomy_finds_and_adds_up() -> None:
    decoder = trained_model(False).decoder
    latents = torch.nn.functional.normalize(torch.randn(1, 6), dim=1)
    parts, before_tanh = APP["contributions"](decoder, latents, 1)
    expected, bias = anatomy.contributions(decoder, latents, 1)
    torch.testing.assert_close(parts, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before_tanh, expected.sum(dim=0) + bias, atol=1e-4, rtol=1e-4)


def low_pass_model() -> CtrlCscModel:
    torch.manual_seed(0)
    return CtrlCscModel(CtrlCscConfig(image_size=16, latent_dim=6, low_pass=True, stage_channels=[4, 5])).eval()


def test_of_a_low_pass_apart_every_stage_is_looked_into_as_anatomy_does(photos: list[Path]) -> None:
    decoder = low_pass_model().decoder
    latents = torch.nn.functional.normalize(torch.randn(1, 6), dim=1)
    for stage, side in ((1, 8), (2, 4)):
        chosen = torch.arange(decoder.config.stage_channels[stage - 1])
        pictures, expected = APP["atoms_in_pixels"](decoder, stage, chosen), anatomy.atoms_in_pixels(decoder, stage)
        half = 2**stage * (side // 2)  # places left of the middle one, in pixels
        start = half - (2**stage - 1)
        width = expected.shape[-1]
        torch.testing.assert_close(pictures[:, :, start : start + width, start : start + width], expected)
        parts, _ = APP["contributions"](decoder, latents, stage)
        torch.testing.assert_close(parts, anatomy.contributions(decoder, latents, stage)[0], atol=1e-4, rtol=1e-4)
    pipe = CtrlCscPipeline(low_pass_model(), CtrlCscImageProcessor(image_size=16))
    texts = [APP["look_inside"](pipe, Image.open(photos[0]), stage)[1] for stage in (1, 2)]
    assert "all other atoms, the low pass and the bias" in texts[0] and "all other atoms and the bias" in texts[1]


def test_atoms_in_pixels_are_those_of_anatomy_in_the_middle_of_the_image() -> None:
    decoder = trained_model(False).decoder
    chosen = torch.tensor([2, 0])
    pictures, expected = APP["atoms_in_pixels"](decoder, 1, chosen), anatomy.atoms_in_pixels(decoder, 1)[chosen]
    top = 2 * 2 - 1  # the middle of 4 places, at stride 2 and padding 1
    side = expected.shape[-1]
    torch.testing.assert_close(pictures[:, :, top : top + side, top : top + side], expected)
    torch.testing.assert_close(pictures.square().sum(), expected.square().sum())


def test_noise_is_removed_as_the_pipeline_does_and_the_figures_are_of_the_pictures(photos: list[Path]) -> None:
    pipe, photo = a_pipeline(trained_model(False)), Image.open(photos[0])
    *pictures, figures = APP["denoise"](pipe, photo, 0.3)
    noisy, reconstruction, denoised = (small(picture, 8) for picture in pictures)
    for got, expected in ((reconstruction, pipe(noisy).images[0]), (denoised, pipe.denoise(noisy, 0.3)[0])):
        assert np.abs(np.asarray(got).astype(int) - np.asarray(expected)).max() <= 2  # the page's noise has no 8 bits
    (clean,) = pipe.image_processor.postprocess(pipe.image_processor(photo, return_tensors="pt").pixel_values)
    error = np.square(np.asarray(noisy) / 255 - np.asarray(clean) / 255).mean()
    assert abs(float(figures.split("with noise ")[1].split(" dB")[0]) + 10 * np.log10(error)) < 0.1


def files(folder: Path) -> dict[str, Path]:
    """Images that no conversion to 8 bits and RGB keeps."""
    steps = np.linspace(0, 1, 24 * 16).reshape(16, 24)
    colors = np.zeros((16, 24, 4), np.uint8)
    colors[..., 0], colors[4:12, 4:12, 3] = 200, 255
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "grey16.png": (Image.fromarray((steps * 65535).astype(np.uint16)), {}),
        "float.tif": (Image.fromarray(steps.astype(np.float32)), {}),
        "transparent.png": (Image.fromarray(colors), {}),
        "palette.gif": (Image.fromarray(colors[..., 3]).convert("P"), {"transparency": 0}),
        "turned.jpg": (Image.fromarray((steps * 255).astype(np.uint8)), {"exif": turned, "quality": 100}),
        "turned.png": (Image.fromarray(colors), {"exif": turned}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in images}


def test_an_upload_reaches_the_image_processor_as_its_file_is(tmp_path: Path) -> None:
    pipe, box = a_pipeline(trained_model(False)), APP["_given"]("Your image", "image")
    for name, path in files(tmp_path).items():
        given = box.preprocess(ImageData(path=str(path), orig_name=name))
        seen = small(APP["reconstruct"](pipe, given, 1)[0], 8)
        expected = pipe.image_processor.postprocess(
            pipe.image_processor(Image.open(path), return_tensors="pt").pixel_values
        )
        assert np.array_equal(np.asarray(seen), np.asarray(expected[0])), name


def test_the_psnr_is_that_of_the_pictures_shown(tmp_path: Path) -> None:
    pipe = a_pipeline(trained_model(False))
    for name, path in files(tmp_path).items():
        original, reconstruction, *_, figures = APP["reconstruct"](pipe, Image.open(path), 1)
        error = np.square(np.asarray(original, np.float64) - np.asarray(reconstruction)).mean() / 255**2
        assert figures.startswith(f"PSNR {-10 * np.log10(error):.2f} dB"), name


def test_the_api_has_an_endpoint_for_each_tab_and_no_other(tmp_path: Path, photos: list[Path]) -> None:
    pipe = a_pipeline(trained_model(False), a_sampler(labels=torch.tensor([3, 7])))
    page = APP["build"](pipe, [str(photo) for photo in photos])
    first, second = map(handle_file, photos)
    calls = {
        "/reconstruct": {"image": first, "stage": 1},
        "/photograph": {"image": first},
        "/look_inside": {"image": first, "stage": 1},
        "/denoise": {"image": first, "noise_std": 0.2},
        "/complete": {"image": first, "share": 0.5, "seed": 1},
        "/interpolate": {"first": first, "second": second, "position": 0.25},
        "/sample": {"label": "7", "seed": 5},
    }
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, allowed_paths=[str(tmp_path)])
    try:
        client = Client(address, download_files=str(tmp_path / "answers"), verbose=False)
        for kind in ("named_endpoints", "unnamed_endpoints"):
            endpoints = client.view_api(all_endpoints=True, print_info=False, return_format="dict")[kind]
            assert set(endpoints) == (set(calls) if kind == "named_endpoints" else set())
        answers = {name: client.predict(api_name=name, **inputs) for name, inputs in calls.items()}
    finally:
        page.close()
    images = [Image.open(photo) for photo in photos]
    for found, expected in (
        (answers["/reconstruct"][1], pipe(images[0]).images[0]),
        (answers["/interpolate"], pipe.interpolate(*images, 21)[5]),
        (answers["/complete"][2], small(APP["complete"](pipe, images[0], 0.5, 1)[2], 8)),
        (answers["/sample"], small(APP["sample"](pipe, "7", 5), 35)),
    ):
        picture = np.asarray(small(Image.open(found), expected.height)).astype(int)
        assert np.abs(picture - np.asarray(expected)).max() <= 1
    pipe.enable_tiling()
    tiled = pipe(images[0]).images[0]
    assert np.array_equal(np.asarray(Image.open(answers["/photograph"][0])), np.asarray(tiled))
    assert tiled.size == images[0].size and "at 60x40 pixels" in answers["/photograph"][1]
    assert answers["/denoise"][3].startswith("PSNR: with noise")
    assert "atoms of stage 1" in answers["/look_inside"][1]


def test_what_is_shown_is_of_the_last_input_also_if_it_changed_while_the_page_worked() -> None:
    page = APP["build"](a_pipeline(trained_model(False), a_sampler(labels=None)), [])
    events = [event for event in page.config["dependencies"] if event["api_visibility"] == "public"]  # no examples
    assert len(events) == 7 and {event["trigger_mode"] for event in events} == {"always_last"}
    shown = [output for event in events for output in event["outputs"]]
    assert len(shown) == len(set(shown)), "two events write into one picture"


def test_missing_pixels_are_white_as_many_as_asked_for_and_the_others_kept(photos: list[Path]) -> None:
    pipe, photo = a_pipeline(trained_model(False)), Image.open(photos[0])
    damaged, completed, kept = (np.asarray(small(image, 8)) for image in APP["complete"](pipe, photo, 0.5, 3))
    missing = (damaged == 255).all(axis=2)
    assert 0.25 < missing.mean() < 0.75
    assert np.array_equal(kept[~missing], damaged[~missing]) and np.array_equal(kept[missing], completed[missing])
    again, other = (np.asarray(small(APP["complete"](pipe, photo, 0.5, seed)[0], 8)) for seed in (3, 4))
    assert np.array_equal(again, damaged) and not np.array_equal(other, damaged)


@pytest.mark.parametrize(("names", "name"), [(None, "7"), ({3: "cat", 7: "horse", 8: "ship"}, "horse")])
def test_samples_are_the_pipelines_of_this_class_and_seed(names: dict[int, str] | None, name: str) -> None:
    model = trained_model(False)
    if names:
        model.config.id2label = names
    pipe = a_pipeline(model, a_sampler(labels=torch.tensor([3, 7])))
    page = APP["build"](pipe, [])
    (choices,) = (part["props"]["choices"] for part in page.config["components"] if part["type"] == "dropdown")
    assert [choice[0] for choice in choices] == ["any", names[3] if names else "3", name]
    sheet = np.asarray(small(APP["sample"](pipe, name, 5), 35))
    expected = pipe.sample(32, 7, generator=torch.Generator().manual_seed(5))
    for index in (0, 9, 31):
        top, left = index // 8 * 9, index % 8 * 9
        assert np.array_equal(sheet[top : top + 8, left : left + 8], np.asarray(expected[index]))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("complete", (0.5, None), "seed must be a whole number from 0 to 4294967295, got None"),
        ("complete", (0.5, -1), "seed must be a whole number from 0 to 4294967295, got -1"),
        ("complete", (1.0, 0), "mask must leave at least one pixel known"),
        ("denoise", (0.0,), "noise_std must be a finite number above 0"),
    ],
)
def test_wrong_input_is_said_in_words(function: str, arguments: tuple, message: str, photos: list[Path]) -> None:
    pipe = a_pipeline(trained_model(False))
    with pytest.raises(gr.Error, match=message):
        APP["_say_errors"](APP[function])(pipe, Image.open(photos[0]), *arguments)


@pytest.mark.parametrize(("harm", "message"), [("cut", "truncated"), ("thin", "1 x 1001 pixels: a side must be")])
def test_an_upload_that_the_image_processor_refuses_is_said_in_words(harm: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.effect_noise((1001, 1) if harm == "thin" else (40, 40), 50).save(path)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(gr.Error, match=message):
        APP["_say_errors"](APP["reconstruct"])(a_pipeline(trained_model(False)), Image.open(path), 1)


def test_without_an_image_every_tab_is_empty(photos: list[Path]) -> None:
    pipe = a_pipeline(trained_model(False))
    for function, arguments in (
        ("reconstruct", (1,)),
        ("photograph", ()),
        ("look_inside", (1,)),
        ("denoise", (0.2,)),
        ("complete", (0.5, 0)),
    ):
        assert not any(APP[function](pipe, None, *arguments))
    assert APP["interpolate"](pipe, None, Image.open(photos[0]), 0.5) is None


def test_only_a_repository_with_a_sampler_has_the_tab_that_draws() -> None:
    for sampler in (None, a_sampler(labels=None)):
        page = APP["build"](a_pipeline(trained_model(False), sampler), [])
        tabs = [part["props"]["label"] for part in page.config["components"] if part["type"] == "tabitem"]
        assert tabs[:6] == ["Reconstruct", "Photographs", "Look inside", "Remove noise", "Fill in", "Interpolate"]
        assert tabs[6:] == ([] if sampler is None else ["Draw new images"])


def test_without_a_repository_the_space_says_what_it_needs() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MODEL_ID"}
    result = subprocess.run([sys.executable, SPACE / "app.py"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "MODEL_ID must name a repository" in result.stderr


def test_the_spaces_metadata_is_what_the_hub_asks_for() -> None:
    metadata = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).is_file()
    assert len(metadata["short_description"]) <= 60
    constraints = (SPACE.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={metadata['sdk_version']}" in constraints, "the version that CI tests"
