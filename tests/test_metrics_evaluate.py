"""The `evaluate` modules: loaded by path, they give what their classes give, and keep no data."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

import ctrl_csc_hf.metrics
from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import StreamingMetric

FOLDER = Path(ctrl_csc_hf.metrics.__file__).parent
MODULES = sorted(path.parent.name for path in FOLDER.glob("*/*.py"))
NEEDS_A_PACKAGE = {"lpips"}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def images() -> dict[str, Any]:
    return {"references": normal(5, 3, 8, 8).tanh(), "predictions": normal(5, 3, 8, 8).tanh() * 0.9}


def vectors() -> dict[str, Any]:
    z = normal(5, 4)
    return {"references": z, "predictions": z + 0.3 * z.flip(0)}


# Options, inputs in the order of the class's `update`
CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "psnr": (metrics.PeakSignalToNoiseRatio, {}, images()),
    "ssim": (metrics.StructuralSimilarity, {}, images()),
    "frechet": (metrics.FrechetDistance, {}, vectors()),
    "kernel": (metrics.KernelDistance, {}, vectors()),
    "inception_score": (metrics.InceptionScore, {}, {"predictions": normal(5, 4)}),
    "closed_loop_consistency": (metrics.ClosedLoopConsistency, {}, vectors()),
    "code_sparsity": (
        metrics.CodeSparsity,
        {},
        {"predictions": (normal(5, 3, 2, 2).relu(), normal(5, 2, 1, 1).relu())},
    ),
    "latent_probe": (
        metrics.LatentProbe,
        {"num_classes": 2},
        {"predictions": normal(5, 4), "references": torch.tensor([0, 1, 1, 0, 1])},
    ),
    "latent_spectrum": (metrics.LatentSpectrum, {"distortion": 0.3}, vectors()),
}


def load(name: str, tmp_path: Path, **options: Any) -> Any:
    return evaluate.load(str(FOLDER / name), cache_dir=str(tmp_path), **options)


def part(value: Any, rows: slice | int) -> Any:
    return tuple(v[rows] for v in value) if isinstance(value, tuple) else value[rows]


def as_lists(value: Any) -> Any:
    return tuple(v.numpy() for v in value) if isinstance(value, tuple) else value.tolist()


def flat(figures: dict[str, Any]) -> list[float]:
    return [number for key in sorted(figures) for number in np.atleast_1d(figures[key])]


def fit(values: Any) -> None:
    """Training latents for a probe."""
    if hasattr(values, "fit_update"):
        values.fit_update(normal(20, 4) + 0.1, torch.arange(20) % 2)


def test_every_module_is_tested() -> None:
    assert set(MODULES) == set(CASES) | NEEDS_A_PACKAGE


@pytest.mark.parametrize("name", CASES)
def test_a_module_gives_its_class_s_figures_in_batches_one_by_one_and_at_once(name: str, tmp_path: Path) -> None:
    statistic, options, inputs = CASES[name]
    by_class = statistic(**options)
    fit(by_class)
    by_class.update(*inputs.values())
    expected = pytest.approx(flat(by_class.compute()), rel=1e-5)

    module = load(name, tmp_path, **options)
    fit(module)
    assert flat(module.compute(**inputs)) == expected
    fit(module)
    module.add_batch(**{key: part(value, slice(0, 2)) for key, value in inputs.items()})
    module.add_batch(**{key: as_lists(part(value, slice(2, 4))) for key, value in inputs.items()})
    module.add(**{key.removesuffix("s"): part(value, 4) for key, value in inputs.items()})
    assert len(module) == 5 and flat(module.compute()) == expected
    # It starts anew.
    assert len(module) == 0
    with pytest.raises(ValueError, match="more images added by update, got 0"):
        module.compute()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "data were written"


@pytest.mark.parametrize("name", CASES)
def test_a_module_says_what_it_is_and_can_be_imported(name: str, tmp_path: Path) -> None:
    _, options, inputs = CASES[name]
    module = load(name, tmp_path, **options)
    assert module.name == name and module.module_type == "metric" and module.citation.startswith("@")
    fit(module)
    for figure in module.compute(**inputs):
        assert f"`{figure.removesuffix('_2').removesuffix('_1')}" in module.description
    assert all(key in module.inputs_description for key in module.features)
    assert module.inputs_description in module.add_batch.__doc__
    (imported,) = (
        value
        for value in vars(importlib.import_module(f"ctrl_csc_hf.metrics.{name}.{name}")).values()
        if isinstance(value, type) and issubclass(value, StreamingMetric) and value.__module__.endswith(name)
    )
    assert imported.__name__ == type(module).__name__


def test_importing_the_modules_hides_none_of_the_functions() -> None:
    for name in CASES:
        importlib.import_module(f"ctrl_csc_hf.metrics.{name}.{name}")
    assert all(callable(getattr(metrics, name)) for name in metrics.__all__)


def test_lpips_module_says_what_to_install(tmp_path: Path) -> None:
    """Where lpips is installed its class is tested with it; elsewhere only the message is."""
    if importlib.util.find_spec("lpips") is not None:
        pytest.skip("lpips is installed")
    with pytest.raises(ImportError, match="pip install lpips"):
        load("lpips", tmp_path)


def test_modules_on_features_take_pixels_where_they_are_given_an_extractor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], num_labels=5, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    vision = metrics.VisionFeatures(tmp_path / "resnet", image_size=16)
    x, xh = images().values()
    for name, statistic in (("frechet", metrics.FrechetDistance), ("kernel", metrics.KernelDistance)):
        expected = statistic()
        expected.update(vision(x), vision(xh))
        module = load(name, tmp_path, extractor=vision)
        assert module.compute(references=x, predictions=xh.numpy()) == pytest.approx(expected.compute(), abs=1e-6)
    score = metrics.InceptionScore()
    score.update(vision.logits(vision(xh)))
    module = load("inception_score", tmp_path, extractor=vision)
    assert module.compute(predictions=xh) == pytest.approx(score.compute())


def test_modules_of_the_same_inputs_combine(tmp_path: Path) -> None:
    both = evaluate.combine([load("psnr", tmp_path), load("ssim", tmp_path)])
    both.add_batch(**{key: value[:3] for key, value in images().items()})
    assert both.compute(**{key: value[3:] for key, value in images().items()}).keys() == {"psnr", "ssim"}


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    psnr = load("psnr", tmp_path)
    with pytest.raises(ValueError, match=r"needs the inputs \['predictions', 'references'\], got \['references'\]"):
        psnr.add_batch(references=images()["references"])
    with pytest.raises(ValueError, match=r"got \['predictions', 'references', 'weights'\]"):
        psnr.add_batch(**images(), weights=np.ones(5))
    with pytest.raises(ValueError, match="num_process must be 1, with batches gathered from the processes, got 2"):
        load("psnr", tmp_path, num_process=2, experiment_id="two")
