"""EndpointHandler behind a real server: right answers, and one line for each bad request."""

import base64
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_halves import trained_model
from test_hub import WITHOUT_THE_PACKAGE

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.hub.publishing import export
from ctrl_csc_hf.models.image_processing_ctrl_csc import MOST_PIXELS


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8))


def png_that_claims(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Endpoint:
    def __init__(self, url: str, model: CtrlCscModel, process_id: int) -> None:
        self.url, self.model, self.process_id = url, model, process_id
        self.processor = CtrlCscImageProcessor(image_size=model.config.image_size)

    def post(self, body: Any, kind: str = "application/json") -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def by_hand(self, images: list[Image.Image]) -> list[bytes]:
        """Pixels of the reconstructions, as this process gets them."""
        pixel_values = self.processor(images, return_tensors="pt").pixel_values
        with torch.no_grad():
            reconstruction = self.model(pixel_values).reconstruction
        return [image.tobytes() for image in self.processor.postprocess(reconstruction)]

    def images(self, body: Any) -> list[bytes]:
        status, answer = self.post(body)
        assert status == 200, answer
        return [Image.open(io.BytesIO(base64.b64decode(item))).tobytes() for item in json.loads(answer)["images"]]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server process with an exported folder, without this package."""
    model = trained_model(True)
    folder = export(model, tmp_path_factory.mktemp("endpoint"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "handler_server.py"
    start = f"{WITHOUT_THE_PACKAGE}\nimport runpy; sys.argv[0] = 'x'; runpy.run_path({str(script)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-c", start, str(folder), str(port)], env=environment)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/", model, process.pid)
    deadline = time.monotonic() + 120
    while True:
        try:
            endpoint.post({})
            break
        except urllib.error.URLError:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)
    yield endpoint
    assert process.poll() is None, "the server died"
    process.terminate()
    process.wait(timeout=30)


def test_images_as_base64_data_uri_and_lists_are_reconstructed(endpoint: Endpoint) -> None:
    first, second = picture(), picture(1)
    expected = endpoint.by_hand([first, second])
    assert endpoint.images({"inputs": text(encoded(first))}) == expected[:1]
    as_uri = "data:image/png;base64," + text(encoded(second))
    assert endpoint.images({"inputs": [text(encoded(first)), as_uri]}) == expected
    wrapped = "\n".join(text(encoded(first))[start : start + 76] for start in range(0, 900, 76))
    assert endpoint.images({"inputs": wrapped, "parameters": {"task": "reconstruct"}}) == expected[:1]


def test_raw_bytes_come_back_as_an_image(endpoint: Endpoint) -> None:
    for form, kind in (("PNG", "image/png"), ("JPEG", "image/jpeg"), ("PNG", "application/octet-stream")):
        content = encoded(picture(), form)
        status, answer = endpoint.post(content, kind)
        assert status == 200, answer
        decoded = Image.open(io.BytesIO(content))
        assert Image.open(io.BytesIO(answer)).tobytes() == endpoint.by_hand([decoded])[0]


def test_encode_gives_the_latents(endpoint: Endpoint) -> None:
    status, answer = endpoint.post({"inputs": text(encoded(picture())), "parameters": {"task": "encode"}})
    pixel_values = endpoint.processor(picture(), return_tensors="pt").pixel_values
    expected = endpoint.model.encode(pixel_values).latents.detach()
    assert status == 200
    torch.testing.assert_close(torch.tensor(json.loads(answer)["latents"]), expected, atol=1e-6, rtol=0)


def test_interpolation_passes_the_reconstructions_at_its_ends_and_the_mean_direction_halfway(
    endpoint: Endpoint,
) -> None:
    ends = [picture(), picture(1)]
    body = {"inputs": [text(encoded(image)) for image in ends], "parameters": {"task": "interpolate", "num_steps": 5}}
    images = endpoint.images(body)
    assert len(images) == 5
    latents = endpoint.model.encode(endpoint.processor(ends, return_tensors="pt").pixel_values).latents
    halfway = torch.nn.functional.normalize(latents.sum(dim=0, keepdim=True), dim=1) * latents[0].norm()
    (middle,) = endpoint.processor.postprocess(endpoint.model.decode(halfway).reconstruction)
    first, last = endpoint.by_hand(ends)
    for got, expected in zip(images[::2], (first, middle.tobytes(), last), strict=True):
        difference = np.frombuffer(got, np.uint8).astype(int) - np.frombuffer(expected, np.uint8)
        assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    "content",
    [
        encoded(picture().convert("CMYK"), "JPEG"),
        encoded(picture().convert("P"), "GIF"),
        encoded(picture().convert("LA")),
        encoded(Image.fromarray(np.full((5, 5), 40_000, np.uint16))),
        encoded(picture(), "GIF", save_all=True, append_images=[picture(1)]),
        encoded(picture(), "TIFF"),
    ],
    ids=["CMYK", "palette", "transparent grey", "16 bits", "animation", "TIFF"],
)
def test_unusual_images_are_fine(endpoint: Endpoint, content: bytes) -> None:
    assert endpoint.images({"inputs": text(content)}) == endpoint.by_hand([Image.open(io.BytesIO(content))])


def test_requests_at_the_same_time_get_their_own_answers(endpoint: Endpoint) -> None:
    pictures = [picture(seed) for seed in range(24)]
    expected = [endpoint.by_hand([image]) for image in pictures]
    bodies = [{"inputs": text(encoded(image))} for image in pictures]
    bad = [{"inputs": "%%%%"}] * len(bodies)
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(endpoint.post, (body for pair in zip(bodies, bad, strict=True) for body in pair))
        found = list(answers)
    for (status, answer), wanted in zip(found[::2], expected, strict=True):
        assert status == 200
        assert Image.open(io.BytesIO(base64.b64decode(json.loads(answer)["images"][0]))).tobytes() == wanted[0]
    assert all(status == 400 for status, _ in found[1::2])


def peak_memory(process_id: int) -> int:
    """Of a process until now, in MB."""
    (line,) = (
        x for x in Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM")
    )
    return int(line.split()[1]) // 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_many_large_images_do_not_lie_in_memory_together(endpoint: Endpoint) -> None:
    large = text(encoded(Image.new("RGB", (4000, 4000), "orange")))  # 48 MB decoded, 60 kB encoded
    assert endpoint.post({"inputs": [large]})[0] == 200
    one = peak_memory(endpoint.process_id)
    assert endpoint.post({"inputs": [large] * 8})[0] == 200
    assert peak_memory(endpoint.process_id) - one < 2 * 48


GOOD = text(encoded(picture()))
PNG, JPEG = encoded(picture()), encoded(picture(), "JPEG")
BOMB = png_that_claims(9460, 9459, zlib.compress(b"\0" * (3 * 9460 + 1) * 9459))
EXIF = encoded(picture(), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\0\0\0\0")


def tiff(value: float, kind: type) -> str:
    return text(encoded(Image.fromarray(np.full((5, 5), value, kind)), "TIFF"))


def nested(depth: int) -> bytes:
    return b'{"inputs": ' + b"[" * depth + b"]" * depth + b"}"


BAD: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "the body must be JSON"),
    "no JSON": (b"{", "the body must be JSON"),
    "no text": (b"\xff\xfe{}", "the body must be JSON"),
    "null": (None, "must be an object with inputs, got None"),
    "number": (7, "must be an object with inputs, got 7"),
    "list": ([GOOD], "must be an object with inputs, got ["),
    "string": (GOOD, "must be an object with inputs, got '"),
    "empty object": ({}, "must be an object with inputs, got {}"),
    "misspelt": ({"input": GOOD}, "must be an object with inputs"),
    "inputs null": ({"inputs": None}, "inputs[0] must be an image as base64 or a data URI, got None"),
    "inputs number": ({"inputs": 3}, "inputs[0] must be an image as base64 or a data URI, got 3"),
    "inputs object": ({"inputs": {"image": GOOD}}, "inputs[0] must be an image as base64 or a data URI, got {"),
    "inputs true": ({"inputs": True}, "inputs[0] must be an image as base64 or a data URI, got True"),
    "no images": ({"inputs": []}, "inputs must be 1 to 64 images, got 0"),
    "too many images": ({"inputs": [GOOD] * 65}, "inputs must be 1 to 64 images, got 65"),
    "nested": ({"inputs": [[GOOD]]}, "inputs[0] must be an image as base64 or a data URI, got ["),
    "second is null": ({"inputs": [GOOD, None]}, "inputs[1] must be an image as base64"),
    "empty string": ({"inputs": ""}, "inputs[0] must have 1 to 10000000 bytes, got 0"),
    "no base64": ({"inputs": "%%%%"}, "inputs[0] must be base64, got '%%%%'"),
    "accents": ({"inputs": "éé=="}, "inputs[0] must be base64"),
    "cut base64": ({"inputs": GOOD[:-3]}, "inputs[0] must be base64"),
    "empty data URI": ({"inputs": "data:image/png;base64,"}, "inputs[0] must have 1 to 10000000 bytes, got 0"),
    "data URI of text": ({"inputs": "data:text/plain;base64," + GOOD}, "must be base64 or a data URI of an image"),
    "data URI without base64": ({"inputs": "data:image/png," + GOOD}, "must be base64 or a data URI of an image"),
    "web address": ({"inputs": "http://127.0.0.1/x.png"}, "no address is fetched"),
    "file address": ({"inputs": "file:///etc/passwd"}, "no address is fetched"),
    "path": ({"inputs": "../config.json"}, "inputs[0] must be base64"),
    "text file": ({"inputs": text(b"hello world")}, "must be an image of the formats PNG, JPEG"),
    "SVG": ({"inputs": text(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}, "must be an image of the formats"),
    "format not allowed": ({"inputs": text(encoded(picture(), "PPM"))}, "must be an image of the formats"),
    "zeros": ({"inputs": text(b"\0" * 1000)}, "must be an image of the formats"),
    "PNG signature": ({"inputs": text(PNG[:8])}, "must be an image of the formats"),
    "half a PNG": ({"inputs": text(PNG[: len(PNG) // 2])}, "inputs[0] must be a whole image"),
    "half a JPEG": ({"inputs": text(JPEG[:-40])}, "inputs[0] must be a whole image"),
    "PNG without pixels": ({"inputs": text(png_that_claims(4, 4))}, "inputs[0] must be a whole image"),
    "PNG of size zero": ({"inputs": text(png_that_claims(0, 4))}, "inputs[0] must be"),
    "huge by its header": ({"inputs": text(png_that_claims(2**30, 2**30))}, "must have at most 89478485 pixels"),
    "bomb": ({"inputs": text(BOMB)}, f"must have at most {MOST_PIXELS} pixels, got 9460 x 9459"),
    "too many bytes": ({"inputs": "A" * 13_400_000}, "inputs[0] must have 1 to 10000000 bytes, got 10050000"),
    "thin": ({"inputs": text(encoded(Image.new("L", (1001, 1))))}, "inputs[0] must be an image that the model takes"),
    "very thin": ({"inputs": text(encoded(Image.new("L", (25_000_000, 1))))}, "a side must be at most 1000 times"),
    "pixels NaN": ({"inputs": [GOOD, tiff(np.nan, np.float32)]}, "inputs[1] must be an image that the model takes"),
    "pixels infinite": ({"inputs": tiff(np.inf, np.float32)}, "inputs[0] must be an image that the model takes"),
    "pixels negative": ({"inputs": tiff(-5, np.int32)}, "they must be in [0, 65535]"),
    "damaged EXIF": ({"inputs": text(EXIF.replace(b"II*\0", b"XI*\0"))}, "inputs[0] must be an image that the model"),
    "lone surrogate": ({"inputs": "\ud800"}, "inputs[0] must be base64, got '\\ud800'"),
    "null characters": ({"inputs": "\0\n\0"}, "inputs[0] must be base64, got '\\x00\\n"),
    "emoji as a parameter": ({"inputs": GOOD, "parameters": {"🧩": 1}}, "among task and num_steps, got ['🧩']"),
    "lines in a task": ({"inputs": GOOD, "parameters": {"task": "a\nb"}}, "task must be one of"),
    "deep": (nested(500), "inputs[0] must be an image as base64 or a data URI, got [["),
    "deeper than JSON may be": (nested(200_000), "the body must be JSON"),
    "an endless number": (b'{"inputs": 1' + b"0" * 5000 + b"}", "the body must be JSON"),
    "infinity": (b'{"inputs": 1e999}', "inputs[0] must be an image as base64 or a data URI, got inf"),
    "parameters list": ({"inputs": GOOD, "parameters": []}, "parameters must be an object, got []"),
    "parameters string": ({"inputs": GOOD, "parameters": "encode"}, "parameters must be an object, got 'encode'"),
    "unknown parameter": ({"inputs": GOOD, "parameters": {"steps": 3}}, "among task and num_steps, got ['steps']"),
    "unknown task": ({"inputs": GOOD, "parameters": {"task": "paint"}}, "task must be one of"),
    "task null": ({"inputs": GOOD, "parameters": {"task": None}}, "task must be one of"),
    "task list": ({"inputs": GOOD, "parameters": {"task": ["encode"]}}, "task must be one of"),
    **{
        f"num_steps {value!r}": (
            {"inputs": [GOOD, GOOD], "parameters": {"task": "interpolate", "num_steps": value}},
            f"num_steps must be an integer from 2 to 64, got {value!r}",
        )
        for value in (0, 1, -3, 65, 10**12, 2.0, "5", True, None, [5], float("nan"))
    },
    "interpolate one": ({"inputs": GOOD, "parameters": {"task": "interpolate"}}, "inputs must be 2 images for task"),
    "interpolate three": (
        {"inputs": [GOOD] * 3, "parameters": {"task": "interpolate"}},
        "inputs must be 2 images for task 'interpolate', got 3",
    ),
}
BAD_RAW: dict[str, tuple[bytes, str]] = {
    "raw nothing": (b"", "inputs[0] must have 1 to 10000000 bytes, got 0"),
    "raw text": (b"hello", "must be an image of the formats"),
    "raw half a PNG": (PNG[:-60], "must be a whole image"),
    "raw bomb": (BOMB, "must have at most 89478485 pixels"),
}


def test_the_list_of_bad_requests_is_long() -> None:
    assert len(BAD) + len(BAD_RAW) >= 40


@pytest.mark.parametrize("name", [*BAD, *BAD_RAW])
def test_a_bad_request_gets_one_line_and_the_next_good_one_its_answer(endpoint: Endpoint, name: str) -> None:
    body, expected = BAD[name] if name in BAD else BAD_RAW[name]
    status, answer = endpoint.post(body, "application/json" if name in BAD else "image/png")
    error = json.loads(answer)["error"]
    assert status == 400 and expected in error, error
    assert "\n" not in error and "Traceback" not in error and len(error) < 280
    assert endpoint.images({"inputs": GOOD}) == endpoint.by_hand([picture()])
