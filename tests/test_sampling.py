"""Samples come from the subspaces that were fitted, repeat with their generator, and travel with the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hub_server import LFS_SUFFIXES, Blob, HubServer, Repository
from safetensors.torch import load_file, save_file
from test_halves import trained_model
from test_hub import WITHOUT_THE_PACKAGE, files, needs_downloaded_code
from torch.nn.functional import normalize
from typer.testing import CliRunner

from ctrl_csc_cli import app
from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscPipeline
from ctrl_csc_hf.hub.publishing import export
from ctrl_csc_hf.inspection.neighbours import nearest_images, neighbours_figure
from ctrl_csc_hf.latents import fitting
from ctrl_csc_hf.latents.encoding import EncodedBatch, encode_dataset
from ctrl_csc_hf.latents.fitting import fit_sampler
from ctrl_csc_hf.models.sampling import LatentSampler, low_rank_factor


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_subspaces(count: int = 900, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of labels 2 and 5: of 2 along the first six axes, of 5 along the next four, twice as many."""
    labels = torch.tensor([2, 5, 5]).repeat(count // 3)
    latents = torch.randn(count, dim, generator=seeded(0)) * 1e-3
    latents[labels == 2, :6] += torch.randn(count // 3, 6, generator=seeded(1))
    latents[labels == 5, 6:10] += torch.randn(2 * count // 3, 4, generator=seeded(2))
    return normalize(latents, dim=1), labels


def batches(latents: torch.Tensor, labels: torch.Tensor | None, size: int = 50) -> list[EncodedBatch]:
    parts = [None] * len(latents) if labels is None else labels.split(size)
    return [EncodedBatch(torch.empty(0), *pair) for pair in zip(latents.split(size), parts, strict=False)]


@pytest.fixture(scope="module")
def labelled() -> LatentSampler:
    return fit_sampler(batches(*in_subspaces()))


def random_sampler(dim: int, labels: torch.Tensor | None = None) -> LatentSampler:
    generator = seeded(3)
    factors = [torch.randn(rank, dim, generator=generator) for rank in (2, 1, 3)]
    return LatentSampler(torch.tensor([0.5, 0.2, 0.3]), torch.randn(3, dim, generator=generator), factors, labels)


# ---- the mathematics


def test_samples_are_unit_vectors_of_their_labels_subspace_with_its_second_moment(labelled: LatentSampler) -> None:
    latents, labels = in_subspaces()
    assert labelled.ranks == [6, 4]
    for label in (2, 5):
        samples, fitted = labelled.sample(20_000, label, generator=seeded(0)), latents[labels == label]
        torch.testing.assert_close(samples.norm(dim=1), torch.ones(20_000))
        second_moments = [z.T @ z / len(z) for z in (samples, fitted)]
        torch.testing.assert_close(*second_moments, atol=0.02, rtol=0)
        outside = [axis for axis in range(24) if axis not in (range(6) if label == 2 else range(6, 10))]
        assert samples[:, outside].square().sum(dim=1).mean() < 1e-4


def test_a_sample_is_the_mean_and_noise_along_the_factor_of_its_component() -> None:
    """Leaves out the component's noise by least squares: what stays is along the mean alone."""
    sampler = random_sampler(8)
    for component in range(3):
        samples = sampler.sample(5, component=component, generator=seeded(1)).double().numpy()
        span = np.vstack([sampler.factors[component].double().numpy(), sampler.means[component].double().numpy()])
        shares, *_ = np.linalg.lstsq(span.T, samples.T, rcond=None)
        np.testing.assert_allclose(span.T @ shares, samples.T, atol=1e-5)
        assert (shares[-1] > 0).all()  # the mean, divided by |s|
        noise = shares[:-1] / shares[-1]
        assert noise.shape[0] == sampler.ranks[component] and np.abs(noise).max() < 5


def test_components_are_drawn_as_often_as_they_are_large(labelled: LatentSampler) -> None:
    samples = labelled.sample(30_000, generator=seeded(0))
    of_first = (samples[:, :6].square().sum(dim=1) > 0.5).float().mean().item()
    assert of_first == pytest.approx(1 / 3, abs=0.01)


def test_one_pass_over_batches_gives_the_moments_of_the_whole_set(labelled: LatentSampler) -> None:
    latents, labels = in_subspaces()
    for index, label in enumerate((2, 5)):
        rows = latents[labels == label].double().numpy()
        np.testing.assert_allclose(labelled.means[index], rows.mean(axis=0), atol=1e-6)
        factor = labelled.factors[index].double().numpy()
        np.testing.assert_allclose(factor.T @ factor, np.cov(rows.T), atol=1e-3)  # half precision
    assert labelled.labels.tolist() == [2, 5] and labelled.weights.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_directions_that_stand_out_of_noise_are_kept_and_the_others_not() -> None:
    noise = torch.randn(2000, 40, generator=seeded(0), dtype=torch.float64)
    planted = noise.clone()
    planted[:, 7:10] *= 3
    assert len(low_rank_factor(torch.cov(noise.T), 2000)) == 1
    factor = low_rank_factor(torch.cov(planted.T), 2000)
    assert factor.shape == (3, 40)
    assert factor[:, 7:10].square().sum() / factor.square().sum() > 0.95
    assert len(low_rank_factor(torch.cov(planted[:4].T), 4)) <= 3  # as many as four latents can show


def test_without_labels_the_groups_are_found_and_none_is_asked_for() -> None:
    sampler = fit_sampler(batches(in_subspaces()[0], None))
    assert sampler.labels is None and sorted(zip(sampler.weights.tolist(), sampler.ranks, strict=True)) == [
        (pytest.approx(1 / 3, abs=0.01), 6),
        (pytest.approx(2 / 3, abs=0.01), 4),
    ]


def test_every_latent_of_a_stream_is_as_likely_to_be_in_the_reservoir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "RESERVOIR", 10)
    positions = torch.arange(40.0)[:, None]
    counts = torch.zeros(40)
    for seed in range(800):
        reservoir = fitting._Reservoir(seed)
        for part in positions.split(7):
            reservoir.update(part)
        assert len(reservoir.latents.unique()) == 10
        counts[reservoir.latents.flatten().long()] += 1
    assert (counts / 800 - 0.25).abs().max() < 0.07  # 4.5 standard deviations


# ---- repeatability and errors


def test_a_seed_gives_the_same_samples_and_a_list_of_generators_each_its_own(labelled: LatentSampler) -> None:
    assert torch.equal(labelled.sample(6, generator=seeded(7)), labelled.sample(6, generator=seeded(7)))
    assert not torch.equal(labelled.sample(6, generator=seeded(7)), labelled.sample(6, generator=seeded(8)))
    together = labelled.sample(3, generator=[seeded(seed) for seed in (4, 5, 6)])
    for index, seed in enumerate((4, 5, 6)):
        assert torch.equal(together[index], labelled.sample(1, generator=seeded(seed))[0])


def test_what_is_saved_draws_the_same_and_is_under_5_megabytes(labelled: LatentSampler, tmp_path: Path) -> None:
    for sampler in (labelled, random_sampler(8)):
        sampler.save_pretrained(tmp_path)
        loaded = LatentSampler.from_pretrained(tmp_path)
        assert torch.equal(loaded.sample(9, generator=seeded(0)), sampler.sample(9, generator=seeded(0)))
        assert (loaded.labels is None) == (sampler.labels is None)
    large = LatentSampler(torch.full((10,), 0.1), torch.randn(10, 512), [torch.randn(400, 512)] * 10)
    large.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 5e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"label": 3}, r"label must be one of \[2, 5\], got 3"),
        ({"component": 2}, r"component must be in \[0, 2\), got 2"),
        ({"component": -1}, r"component must be in \[0, 2\), got -1"),
        ({"label": 2, "component": 0}, "label and component must not both be given, got 2 and 0"),
        ({"num_images": 2, "generator": [seeded(0)]}, "generator must be one or 2 generators, got 1"),
    ],
)
def test_what_it_cannot_draw_is_said(arguments: dict, message: str, labelled: LatentSampler) -> None:
    with pytest.raises(ValueError, match=message):
        labelled.sample(**arguments)


def test_what_it_cannot_be_fitted_on_is_said() -> None:
    latents, labels = in_subspaces(30)
    with pytest.raises(ValueError, match="label must be None, as this sampler was fitted without labels, got 2"):
        random_sampler(8).sample(label=2)
    with pytest.raises(ValueError, match=r"at least 2 images of each class, got 1 of \[7\]: leave"):
        fit_sampler(batches(latents, torch.tensor([7] + [2] * 29)))
    with pytest.raises(ValueError, match="counts must be at least 2, got 1 for component 1"):
        LatentSampler.of_gaussians(torch.tensor([3, 1]), torch.zeros(2, 8), torch.eye(8).expand(2, 8, 8))
    with pytest.raises(ValueError, match="labels must not be negative, got -1"):
        fit_sampler(batches(latents, labels - 3))
    with pytest.raises(ValueError, match="got no latents"):
        fit_sampler([])
    with pytest.raises(ValueError, match="got both"):
        fit_sampler([*batches(latents, labels), *batches(latents, None)])


def test_a_missing_or_damaged_file_is_named(labelled: LatentSampler, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"which `ctrl-csc fit-sampler` writes, got .*nowhere"):
        LatentSampler.from_pretrained(tmp_path / "nowhere")
    labelled.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"model\.safetensors must be a sampler's file"):
        LatentSampler.from_pretrained(tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "ranks"}, path)
    with pytest.raises(OSError, match=r"model\.safetensors must be a sampler's file"):
        LatentSampler.from_pretrained(tmp_path)


# ---- the pipeline, the command, the Hub


@pytest.fixture(scope="module")
def pipe() -> CtrlCscPipeline:
    model = trained_model(False)
    return CtrlCscPipeline(model, CtrlCscImageProcessor(image_size=8), random_sampler(6, torch.tensor([0, 1, 1])))


def test_images_are_the_decoded_latents_of_the_sampler_whatever_the_batches(pipe: CtrlCscPipeline) -> None:
    expected = pipe.decode(pipe.sampler.sample(5, 1, generator=seeded(0)), "pt")
    for size in (2, 64):
        images = pipe.sample(5, label=1, generator=seeded(0), batch_size=size, output_type="pt")
        torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    alone = pipe.sample(component=2, generator=seeded(0))
    assert len(alone) == 1 and alone[0].size == (8, 8)


def test_a_class_is_chosen_by_its_name_too(pipe: CtrlCscPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.model.config, "id2label", {0: "car", 1: "ship"})
    by_name, by_number = (pipe.sample(2, label=label, generator=seeded(0), output_type="pt") for label in ("ship", 1))
    assert torch.equal(by_name, by_number)
    with pytest.raises(ValueError, match=r"label must be a number or one of \['car', 'ship'\], got 'boat'"):
        pipe.sample(label="boat")
    with pytest.raises(ValueError, match=r"label must be one of \[0, 1\], got 2"):
        pipe.sample(label=2)


def test_a_pipeline_without_a_sampler_says_so_and_names_what_is_wrong_else(pipe: CtrlCscPipeline) -> None:
    bare = CtrlCscPipeline(pipe.model, pipe.image_processor)
    with pytest.raises(ValueError, match=r"sampler must be a LatentSampler, .* got None"):
        bare.sample()
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        pipe.sample(0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        pipe.sample(batch_size=0)
    with pytest.raises(ValueError, match="output_type must be one of"):
        pipe.sample(output_type="jpeg")


def test_what_is_saved_loads_with_its_sampler_or_without_one(pipe: CtrlCscPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "with")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "with", trust_remote_code=True)
    expected = pipe.sample(3, generator=seeded(0), output_type="np")
    assert np.array_equal(loaded.sample(3, generator=seeded(0), output_type="np"), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "with")
    CtrlCscPipeline(pipe.model, pipe.image_processor).save_pretrained(tmp_path / "without")
    assert "sampler" not in json.loads((tmp_path / "without" / "model_index.json").read_text(encoding="utf-8"))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "without", trust_remote_code=True)
    with pytest.raises(ValueError, match="sampler must be"):
        loaded.sample()


SAMPLE = """
import sys, torch
from diffusers import DiffusionPipeline
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(pipe.sample(4, label=1, generator=torch.Generator().manual_seed(0), output_type="pt"), sys.argv[2])
assert "ctrl_csc_hf" not in sys.modules
"""


@needs_downloaded_code
def test_a_repository_with_a_sampler_gives_its_samples_elsewhere_without_the_package(
    pipe: CtrlCscPipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "repository")
    with HubServer() as server:
        server.repositories["org/name"] = Repository("org/name", private=False)
        blobs = {
            name: Blob(content, name.endswith(LFS_SUFFIXES)) for name, content in files(tmp_path / "repository").items()
        }
        server.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
        server.repositories["org/name"].commit(blobs)
        subprocess.run(
            [sys.executable, "-c", WITHOUT_THE_PACKAGE + SAMPLE, "org/name", str(tmp_path / "found.pt")],
            env={**os.environ, "OMP_NUM_THREADS": "1", **server.environment(tmp_path / "cache")},
            check=True,
        )
    expected = pipe.sample(4, label=1, generator=seeded(0), output_type="pt")
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected, atol=1e-6, rtol=0)


def test_an_exported_folder_serves_as_a_checkpoint_again(pipe: CtrlCscPipeline, tmp_path: Path) -> None:
    first = export(pipe.model, tmp_path / "first", sampler=pipe.sampler)
    again = export(pipe.model, tmp_path / "again", checkpoint=first)
    assert files(again) == files(first) and "sampler/sampling_ctrl_csc.py" in files(first)


@pytest.mark.parametrize(("flags", "labels"), [([], [0, 1]), (["--label_column", "none"], None)])
def test_the_command_writes_a_sampler_beside_the_model(
    flags: list[str], labels: list[int] | None, pipe: CtrlCscPipeline, image_folder: Path, tmp_path: Path
) -> None:
    pipe.model.save_pretrained(tmp_path)
    pipe.image_processor.save_pretrained(tmp_path)
    command = ["fit-sampler", "--model", str(tmp_path), "--dataset_name", str(image_folder), *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = LatentSampler.from_pretrained(tmp_path / "sampler")
    assert (None if written.labels is None else written.labels.tolist()) == labels

    dataset = datasets.load_dataset(str(image_folder), split="train")
    column = "none" if flags else "label"
    expected = fit_sampler(encode_dataset(dataset, pipe.model, pipe.image_processor, label_column=column))
    assert torch.equal(written.sample(4, generator=seeded(0)), expected.sample(4, generator=seeded(0)))
    for wrong in (["--image_column", "img"], ["--label_column", "class"], ["--label_column", "image"]):
        result = CliRunner().invoke(app, [*command, *wrong])
        assert result.exit_code == 1 and f"Error: {wrong[0]} must" in result.output


def test_the_command_adds_a_sampler_to_a_published_folder(
    pipe: CtrlCscPipeline, image_folder: Path, tmp_path: Path
) -> None:
    export(pipe.model, tmp_path)
    result = CliRunner().invoke(app, ["fit-sampler", "--model", str(tmp_path), "--dataset_name", str(image_folder)])
    assert result.exit_code == 0, result.output
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.sampler.labels.tolist() == [0, 1] and len(loaded.sample(2, label="class1")) == 2


# ---- nearest training images


def test_a_copied_image_is_seen_among_the_nearest(pipe: CtrlCscPipeline) -> None:
    generator = seeded(0)
    images = torch.rand(30, 3, 8, 8, generator=generator) * 2 - 1
    latents = normalize(torch.randn(30, 6, generator=generator), dim=1)
    parts = [EncodedBatch(*pair) for pair in zip(images.split(7), latents.split(7), strict=True)]
    samples = torch.stack([images[21], images[3] + 0.1])
    nearest = nearest_images(samples, latents[[8, 28]], parts)
    assert torch.equal(nearest.by_pixels, images[[21, 3]]) and torch.equal(nearest.by_latents, images[[8, 28]])
    torch.testing.assert_close(nearest.pixel_distances, torch.tensor([0.0, 0.1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(nearest.cosines, torch.ones(2))
    figure = neighbours_figure(samples, nearest)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 6 and np.allclose(shown[2], images[21].permute(1, 2, 0) / 2 + 0.5)
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "0.00", "0.10", "1.00", "1.00"]
    with pytest.raises(ValueError, match="at least one image, got none"):
        nearest_images(samples, latents[:2], [])
    with pytest.raises(ValueError, match=r"samples must have shape \(n, 3, 8, 8\), got \(2, 3, 4, 4\)"):
        nearest_images(samples[:, :, :4, :4], latents[:2], parts)
