"""CtrlCscPipeline gives what processor and model give by hand, in every form that diffusers' users expect."""

import inspect
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel, CtrlCscPipeline
from ctrl_csc_hf.hub.publishing import export
from ctrl_csc_hf.models.sampling import LatentSampler
from ctrl_csc_hf.models.tiling import in_tiles

CONFIG = {
    "image_size": 16,
    "latent_dim": 8,
    "stage_channels": [8, 8],
    "kernel_sizes": [4, 4, 4],
    "strides": [2, 2, 1],
    "paddings": [1, 1, 0],
}


@pytest.fixture(scope="module")
def model() -> CtrlCscModel:
    torch.manual_seed(0)
    return CtrlCscModel(CtrlCscConfig(**CONFIG)).eval()


@pytest.fixture
def pipe(model: CtrlCscModel) -> CtrlCscPipeline:
    pipe = CtrlCscPipeline(model, CtrlCscImageProcessor(image_size=16))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def by_hand(model: CtrlCscModel, images: list[Image.Image]):
    pixel_values = CtrlCscImageProcessor(image_size=16)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        return model(pixel_values, output_codes=True)


def test_images_are_those_of_processor_and_model(pipe: CtrlCscPipeline, model: CtrlCscModel) -> None:
    images = pictures(3)
    expected = ((by_hand(model, images).reconstruction / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pipe(images, output_type="np").images, expected)
    assert torch.equal(pipe(images, output_type="pt").images, torch.from_numpy(expected).permute(0, 3, 1, 2))
    got = np.stack([np.asarray(image) for image in pipe(images).images])
    assert np.array_equal(got, np.round(expected * 255).astype(np.uint8))
    assert pipe(images[0]).images[0].size == (16, 16)


def test_latents_and_codes_come_where_asked_for(pipe: CtrlCscPipeline, model: CtrlCscModel) -> None:
    images = pictures(2)
    assert set(pipe(images)) == {"images"}
    output, expected = pipe(images, return_latents=True, return_codes=True), by_hand(model, images)
    assert torch.equal(output.latents, expected.latents)
    assert len(output.codes) == 2
    assert all(torch.equal(got, codes) for got, codes in zip(output.codes, expected.codes, strict=True))
    as_tuple = pipe(images, return_latents=True, return_dict=False)
    assert len(as_tuple) == 2 and torch.equal(as_tuple[1], output.latents)


def test_batches_equal_one_batch(pipe: CtrlCscPipeline) -> None:
    images = pictures(5)
    whole, parts = (pipe(images, size, "pt", return_latents=True, return_codes=True) for size in (5, 2))
    for got, expected in ((parts.images, whole.images), (parts.latents, whole.latents)):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert [codes.shape for codes in parts.codes] == [codes.shape for codes in whole.codes]


def test_encode_then_decode_is_the_reconstruction(pipe: CtrlCscPipeline) -> None:
    images = pictures(2)
    latents = pipe.encode(images)
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(2), atol=1e-2, rtol=0)
    assert torch.equal(pipe.decode(latents, output_type="pt"), pipe(images, output_type="pt").images)


def test_interpolation_goes_along_the_great_circle_in_equal_angles(pipe: CtrlCscPipeline, model: CtrlCscModel) -> None:
    a, b = pictures(2)
    images = pipe.interpolate(a, b, 5, output_type="pt")
    ends = pipe([a, b], output_type="pt").images  # equal up to rounding, which the size of a batch may change
    torch.testing.assert_close(images[[0, 4]], ends, atol=1e-6, rtol=0)
    start, end = pipe.encode([a, b]).double().numpy()
    # Rotation in the plane of both: by Gram-Schmidt, not by the formula of the pipeline.
    across = end - (end @ start) * start
    across /= np.linalg.norm(across)
    angles = np.arccos(end @ start) * np.arange(5) / 4
    points = np.cos(angles)[:, None] * start + np.sin(angles)[:, None] * across
    expected = model.decode(torch.from_numpy(points).float()).reconstruction / 2 + 0.5
    torch.testing.assert_close(images, expected.detach().clamp(0, 1), atol=1e-4, rtol=0)


def test_interpolation_between_equal_images_stays_where_it_is(pipe: CtrlCscPipeline) -> None:
    image = pictures(1)[0]
    images = pipe.interpolate(image, image, 3, output_type="pt")
    torch.testing.assert_close(images, pipe(image, output_type="pt").images.expand(3, -1, -1, -1), atol=1e-6, rtol=0)


def test_opposite_latents_have_no_great_circle() -> None:
    from ctrl_csc_hf.models.pipeline_ctrl_csc import great_circle

    start = torch.nn.functional.normalize(torch.randn(1, 8), dim=1)
    with pytest.raises(ValueError, match="opposite latents"):
        great_circle(start, -start, 4)


def test_bfloat16(model: CtrlCscModel) -> None:
    pipe = CtrlCscPipeline(CtrlCscModel(model.config), CtrlCscImageProcessor(image_size=16))
    pipe.model.load_state_dict(model.state_dict())
    pipe.set_progress_bar_config(disable=True)
    exact = pipe(pictures(2), output_type="pt").images
    pipe.to(torch.bfloat16)
    output = pipe(pictures(2), output_type="pt", return_latents=True)
    assert output.latents.dtype == torch.bfloat16 and output.images.dtype == torch.float32
    assert (output.images - exact).abs().mean() < 0.05


def test_the_progress_bar_counts_batches_and_can_be_off(
    model: CtrlCscModel, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = CtrlCscPipeline(model, CtrlCscImageProcessor(image_size=16))
    pipe(pictures(3), batch_size=1)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(pictures(3), batch_size=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, image: pipe(image, output_type="jpeg"), "output_type must be one of .*'pil'.*, got 'jpeg'"),
        (lambda pipe, image: pipe(image, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda pipe, image: pipe.decode(np.zeros((2, 8))), "latents must be a tensor, got ndarray; torch.as_tensor"),
        (lambda pipe, image: pipe.decode(torch.randn(2, 7)), r"latents must have shape \(n, 8\), got \(2, 7\)"),
        (lambda pipe, image: pipe.interpolate(image, image, 1), "num_steps must be at least 2, got 1"),
        (lambda pipe, image: pipe.interpolate([image] * 2, image), "a must be one image, got 2"),
        (lambda pipe, image: pipe([]), "there must be at least one image"),
    ],
)
def test_wrong_arguments_are_named(pipe: CtrlCscPipeline, call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(pipe, pictures(1)[0])


def test_what_is_saved_loads_as_a_pipeline_and_as_a_model_from_weights_stored_once(
    pipe: CtrlCscPipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    image = pictures(1)[0]
    expected = pipe(image, output_type="np").images
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert np.array_equal(loaded(image, output_type="np").images, expected)
    model = AutoModel.from_pretrained(tmp_path).eval()
    assert np.array_equal(CtrlCscPipeline(model, pipe.image_processor)(image, output_type="np").images, expected)


def test_what_train_py_and_the_parts_save_loads_as_a_pipeline(pipe: CtrlCscPipeline, tmp_path: Path) -> None:
    """Without a model_index.json, as train.py leaves it."""
    pipe.model.save_pretrained(tmp_path)
    CtrlCscImageProcessor(image_size=16, resample=0).save_pretrained(tmp_path)
    loaded = CtrlCscPipeline.from_pretrained(tmp_path)
    assert (loaded.sampler, loaded.image_processor.resample, loaded.name_or_path) == (None, 0, str(tmp_path))
    assert torch.equal(loaded.encode(torch.zeros(1, 3, 16, 16)), pipe.encode(torch.zeros(1, 3, 16, 16)))
    LatentSampler(torch.ones(1), torch.zeros(1, 8), [torch.eye(8)]).save_pretrained(tmp_path / "sampler")
    sampler = LatentSampler(torch.ones(1), torch.ones(1, 8), [torch.eye(8)])
    assert isinstance(CtrlCscPipeline.from_pretrained(tmp_path).sampler, LatentSampler)
    parts = {"model": pipe.model, "sampler": sampler}
    loaded = CtrlCscPipeline.from_pretrained(tmp_path, **parts)
    assert loaded.model is pipe.model and loaded.sampler is sampler
    assert CtrlCscPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="Unrecognized model"):
        CtrlCscPipeline.from_pretrained(tmp_path / "sampler")


def test_the_keywords_of_diffusers_are_honoured_or_refused(pipe: CtrlCscPipeline, tmp_path: Path) -> None:
    allowed = {"safe_serialization": True, "variant": None, "push_to_hub": False, "use_flashpack": False}
    pipe.save_pretrained(tmp_path / "model", max_shard_size="5KB", **allowed)
    shards = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert len(shards) > 1 and "model.safetensors" not in shards
    image = pictures(1)[0]
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert np.array_equal(loaded(image, output_type="np").images, pipe(image, output_type="np").images)
    loaded.save_pretrained(str(tmp_path / "model"))  # over itself: one file again
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors*")] == ["model.safetensors"]
    for keyword, value in (("safe_serialization", False), ("variant", "fp16"), ("use_flashpack", True)):
        with pytest.raises(ValueError, match=rf"{keyword} must be .* got {value!r}"):
            pipe.save_pretrained(tmp_path / "refused", **{keyword: value})
    with pytest.raises(ValueError, match=r"subfolder must be None, .* got 'part'"):
        pipe.push_to_hub("org/name", subfolder="part")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder must be a folder or not exist, got .*file"):
        pipe.save_pretrained(tmp_path / "file")
    assert not (tmp_path / "refused").exists()
    signature = inspect.signature(DiffusionPipeline.save_pretrained).parameters
    assert set(signature) - {"kwargs"} <= set(inspect.signature(CtrlCscPipeline.save_pretrained).parameters)
    pushed = inspect.signature(DiffusionPipeline.push_to_hub).parameters
    assert list(pushed) == list(inspect.signature(CtrlCscPipeline.push_to_hub).parameters)


def test_the_card_and_its_figures_come_along_while_the_weights_are_theirs(
    pipe: CtrlCscPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "checkpoint"
    pipe.save_pretrained(checkpoint)
    (checkpoint / "examples").mkdir()
    pictures(1)[0].save(checkpoint / "examples" / "0.png")
    (checkpoint / "training_args.json").write_text('{"max_train_steps": 4}', encoding="utf-8")
    published = export(CtrlCscModel.from_pretrained(checkpoint), tmp_path / "published", checkpoint=checkpoint)
    records = {"README.md", "architecture.png", "handler.py", "training_args.json", "examples/0.png"}

    def saved(pipe: CtrlCscPipeline, name: str) -> dict[str, bytes]:
        pipe.save_pretrained(tmp_path / name)
        files = {str(path.relative_to(tmp_path / name)): path for path in (tmp_path / name).rglob("*")}
        return {name: path.read_bytes() for name, path in files.items() if path.is_file()}

    for number, loaded in enumerate((
        DiffusionPipeline.from_pretrained(published, trust_remote_code=True),
        CtrlCscPipeline.from_pretrained(published),
        CtrlCscPipeline(AutoModel.from_pretrained(published), pipe.image_processor),
    )):  # fmt: skip
        found = saved(loaded, f"again{number}")
        assert {name: content for name, content in found.items() if name in records} == {
            name: (published / name).read_bytes() for name in records
        }
    assert "README.md" not in saved(CtrlCscPipeline.from_pretrained(checkpoint), "of a folder without a card")
    caplog.clear()
    assert records.isdisjoint(saved(CtrlCscPipeline.from_pretrained(published, sparsity=0.5), "another lambda"))
    assert "its weights or its configuration are others" in caplog.text
    with torch.no_grad():
        loaded.model.decoder.output_bias.add_(1)
    caplog.clear()
    assert records.isdisjoint(saved(loaded, "trained further"))
    assert "its weights or its configuration are others" in caplog.text


@pytest.mark.parametrize("change", ["other weights", "other shapes", "other steps", "none"])
def test_what_a_folder_holds_of_another_model_is_removed_when_a_pipeline_is_saved_there(
    change: str, pipe: CtrlCscPipeline, tmp_path: Path
) -> None:
    sampler = LatentSampler(torch.ones(1), torch.zeros(1, 8), [torch.eye(8)])
    CtrlCscPipeline(pipe.model, pipe.image_processor, sampler).save_pretrained(tmp_path)
    records = {"README.md", "metrics.json", "reconstructions.png", "training_args.json", "examples/0.png"}
    measured = {"rivals.png", "neighbours.png", "correlations.png", "evaluation/metrics.json", "evaluation/rivals.png"}
    records |= measured | {"history.json", "training_curve.png", "samples/step-000500.png"}
    own = {"notes.md", "examples/own.txt", "examples/own.png", "metrics.csv", "samples/own.png", "evaluation/own.png"}
    for name in records | own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "README.md").write_text("---\ntags:\n- ctrl-csc\n---\n", encoding="utf-8")
    saved = CtrlCscPipeline.from_pretrained(tmp_path, sampler=None)
    if change == "other weights":
        with torch.no_grad():
            saved.model.decoder.output_bias.add_(1)
    elif change == "other steps":
        saved = CtrlCscPipeline.from_pretrained(tmp_path, sampler=None, num_iterations=7)
    elif change == "other shapes":
        saved = CtrlCscPipeline(CtrlCscModel(CtrlCscConfig(**CONFIG | {"latent_dim": 4})), pipe.image_processor)
    saved.save_pretrained(tmp_path)
    left = {name for name in records | own if (tmp_path / name).is_file()}
    assert left == (records | own if change == "none" else own)
    assert CtrlCscPipeline.from_pretrained(tmp_path).sampler is None


def test_what_cannot_be_written_is_an_error_that_leaves_the_folder_as_it_was(
    pipe: CtrlCscPipeline, tmp_path: Path
) -> None:
    sampler = LatentSampler(torch.ones(1), torch.zeros(1, 8), [torch.eye(8)])
    CtrlCscPipeline(pipe.model, pipe.image_processor, sampler).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("card", encoding="utf-8")
    larger = LatentSampler(torch.ones(1), torch.zeros(1, 8), [torch.ones(2000, 8)])
    other = CtrlCscPipeline(CtrlCscModel(CtrlCscConfig(**CONFIG)), pipe.image_processor, sampler)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # of a file: the kernel refuses more, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        for write in (lambda: other.save_pretrained(tmp_path), lambda: larger.save_pretrained(tmp_path / "sampler")):
            with pytest.raises(OSError, match="cannot be written and is as it was"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_saving_a_pipeline_into_a_project_leaves_its_files(pipe: CtrlCscPipeline, tmp_path: Path) -> None:
    (tmp_path / "sampler").mkdir()
    for name in ("README.md", "metrics.json", "sampler/noise.py"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    pipe.save_pretrained(tmp_path)
    assert all((tmp_path / name).is_file() for name in ("README.md", "metrics.json", "sampler/noise.py"))


def test_a_device_map_places_the_published_pipeline(pipe: CtrlCscPipeline, tmp_path: Path) -> None:
    sampler = LatentSampler(torch.ones(1), torch.zeros(1, 8), [torch.eye(8)])
    CtrlCscPipeline(pipe.model, pipe.image_processor, sampler).save_pretrained(tmp_path)
    image = pictures(1)[0]
    balanced = DiffusionPipeline.from_pretrained(tmp_path, device_map="balanced", trust_remote_code=True)
    assert balanced.sampler.ranks == [8]
    expected = pipe(image, output_type="pt").images
    torch.testing.assert_close(balanced(image, output_type="pt").images.cpu(), expected, atol=1e-5, rtol=0)
    placed = CtrlCscPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert placed.device.type == "cpu" and torch.equal(placed(image, output_type="pt").images, expected)


def test_a_compiled_model_is_saved_as_it_is(pipe: CtrlCscPipeline, tmp_path: Path) -> None:
    compiled = CtrlCscPipeline(pipe.model, pipe.image_processor)
    compiled.model = torch.compile(pipe.model)  # compiled when it is called
    compiled.save_pretrained(tmp_path)
    loaded = CtrlCscPipeline.from_pretrained(tmp_path)
    assert loaded.model.state_dict().keys() == pipe.model.state_dict().keys()


def test_without_diffusers_the_pipeline_names_the_extra_and_the_rest_works() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None; import ctrl_csc_hf\n"
        "try: ctrl_csc_hf.CtrlCscPipeline\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "CtrlCscPipeline needs diffusers: pip install ctrl-csc-hf[pipeline]"


@pytest.mark.parametrize("shape", [(16, 16), (40, 57), (16, 100), (7, 30), (5, 5)])
def test_tiles_cover_every_pixel_and_overlap_without_seams(shape: tuple[int, int]) -> None:
    image = torch.rand(3, *shape)
    seen = []

    def shifted(tiles: torch.Tensor) -> torch.Tensor:  # by 0 and 1 in turns: seams as high as they get
        seen.append(tiles)
        return tiles + (torch.arange(len(tiles)) % 2).view(-1, 1, 1, 1)

    torch.testing.assert_close(in_tiles(lambda tiles: tiles, image, 16), image)
    steps = in_tiles(shifted, image, 16) - image
    assert seen[0].shape[1:] == (3, 16, 16) and steps.min() >= -1e-6 and steps.max() <= 1 + 1e-6
    assert max(float(steps.diff(dim=dim).abs().max()) for dim in (1, 2)) <= 1 / 4 + 1e-5


def test_the_border_of_a_tile_is_nowhere_the_border_of_a_larger_image() -> None:
    spoiled = torch.ones(16, 16)
    spoiled[1:-1, 1:-1] = 0
    image = torch.rand(3, 16, 50)
    assert (in_tiles(lambda tiles: tiles + spoiled, image, 16) - image).max() < 0.5


def test_with_tiling_images_keep_their_size_and_a_single_tile_is_the_reconstruction(pipe: CtrlCscPipeline) -> None:
    generator = np.random.default_rng(0)
    one, wide = (Image.fromarray(generator.integers(0, 256, (16, side, 3), dtype=np.uint8)) for side in (16, 50))
    whole = pipe(one, output_type="pt").images
    pipe.enable_tiling()
    torch.testing.assert_close(pipe(one, output_type="pt").images, whole)
    assert [image.size for image in pipe([one, wide]).images] == [one.size, wide.size]
    with pytest.raises(ValueError, match="return_latents and return_codes must be False with tiling"):
        pipe(one, return_latents=True)
    pipe.disable_tiling()
    assert pipe(wide).images[0].size == (16, 16)
