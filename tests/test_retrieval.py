"""Retrieval gives the rows of the largest cosines, with faiss and without."""

import importlib.util

import datasets
import numpy as np
import pytest
import torch
from test_halves import trained_model

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscPipeline
from ctrl_csc_hf.latents.retrieval import ImageIndex, index_images, retrieve


@pytest.fixture(scope="module")
def pipe() -> CtrlCscPipeline:
    return CtrlCscPipeline(trained_model(False), CtrlCscImageProcessor(image_size=8))


@pytest.fixture(scope="module")
def dataset() -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    features = datasets.Features({"picture": datasets.Image(), "number": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"picture": list(pixels), "number": list(range(30))}, features=features)


@pytest.fixture(params=["torch", "faiss"])
def index(
    request: pytest.FixtureRequest, pipe: CtrlCscPipeline, dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> ImageIndex:
    if request.param == "torch":  # as where faiss alone is not installed
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *package: None if name == "faiss" else find_spec(name, *package)
        )
    index = index_images(dataset, pipe, image_column="picture", batch_size=7)
    assert index.backend == request.param
    return index


def test_the_rows_found_are_those_of_the_largest_cosines(
    index: ImageIndex, pipe: CtrlCscPipeline, dataset: datasets.Dataset
) -> None:
    images = dataset["picture"][:]
    latents = pipe.encode(images).double().numpy()
    cosines = latents[[4, 19]] @ latents.T / np.outer(*[np.linalg.norm(z, axis=1) for z in (latents[[4, 19]], latents)])
    found = retrieve(index, [images[4], images[19]], k=5)
    assert found.rows[:, 0].tolist() == [4, 19]
    np.testing.assert_allclose(found.cosines, np.sort(cosines)[:, :-6:-1], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosines, found.rows.numpy(), axis=1), found.cosines, atol=1e-5)
    assert index.dataset[found.rows[0].tolist()]["number"][0] == 4


def test_what_cannot_be_indexed_or_sought_is_said(pipe: CtrlCscPipeline, dataset: datasets.Dataset) -> None:
    with pytest.raises(ValueError, match=r"dataset must be a datasets\.Dataset, .* got IterableDataset"):
        index_images(dataset.to_iterable_dataset(), pipe)
    with pytest.raises(ValueError, match="dataset must have rows, got none"):
        index_images(dataset.select([]), pipe)
    with pytest.raises(ValueError, match=r"image_column must be one of \['picture', 'number'\], got 'image'"):
        index_images(dataset, pipe)
    with pytest.raises(ValueError, match="image_column must hold images, but 'number' holds"):
        index_images(dataset, pipe, image_column="number")
    index = ImageIndex(dataset, pipe, torch.eye(6), "torch")
    for k in (0, 7):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 6\], got {k}"):
            retrieve(index, dataset[0]["picture"], k)
