"""The Space in a real browser: started as the Hub starts it, without the package, from a repository's id alone."""

import io
import os
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

import numpy as np
import pytest
import torch
import yaml
from hub_server import HubServer
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from test_halves import trained_model
from test_hub import WITHOUT_THE_PACKAGE, needs_downloaded_code, publish
from test_readme import COMMANDS

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel, CtrlCscPipeline

SPACE = Path(__file__).parents[1] / "spaces" / "ctrl-csc"
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
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()
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


def a_pipeline(model: CtrlCscModel) -> CtrlCscPipeline:
    pipe = CtrlCscPipeline(model, CtrlCscImageProcessor(image_size=model.config.image_size))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@needs_downloaded_code
def test_an_uploaded_picture_is_reconstructed_looked_into_and_interpolated(
    tmp_path: Path, browser_page: Page, photos: list[Path]
) -> None:
    model = trained_model(False, "batch_norm")
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
            broken.write_text("no image")
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
    model = trained_model(True, "inverse")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    CtrlCscImageProcessor(image_size=model.config.image_size).save_pretrained(folder)
    (folder / "examples").mkdir()
    for photo in photos:
        shutil.copy(photo, folder / "examples")
    port = free_port()
    (line,) = (line for line in COMMANDS if line.startswith("ctrl-csc demo"))
    words = shlex.split(line.replace("demo/model", str(folder)))
    command = [str(Path(sys.executable).parent / words[0]), *words[1:], "--port", str(port)]
    with serving(command, {"GRADIO_ANALYTICS_ENABLED": "0"}, port, tmp_path / "log") as address:
        browser_page.goto(address)
        browser_page.locator("button.gallery-item").nth(1).click()
        assert same(browser_page, "reconstruction", a_pipeline(model)(Image.open(photos[1])).images[0])


def test_without_a_repository_the_space_says_what_it_needs() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MODEL_ID"}
    result = subprocess.run([sys.executable, SPACE / "app.py"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "MODEL_ID must name a repository" in result.stderr


def test_the_spaces_metadata_is_what_the_hub_asks_for() -> None:
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).is_file()
    assert len(metadata["short_description"]) <= 60
    constraints = (SPACE.parents[1] / "constraints.txt").read_text().splitlines()
    assert f"gradio=={metadata['sdk_version']}" in constraints, "the version that CI tests"
