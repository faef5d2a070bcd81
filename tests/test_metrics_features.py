"""The networks of the Fréchet and kernel distances: their features, their logits, what they are fed."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from ctrl_csc_hf.metrics import InceptionFeatures, VisionFeatures

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], num_labels=5, layer_type="basic")
VIT = ViTConfig(**SMALL, intermediate_size=8, num_labels=5)
DINO = Dinov2Config(**SMALL, num_labels=5)


def pixels(size: int = 16) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def saved(model: PreTrainedModel, folder: Path) -> Any:
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "dim"),
    [
        (ResNetForImageClassification(RESNET), 6),
        (ViTForImageClassification(VIT), 8),
        (Dinov2ForImageClassification(DINO), 16),
    ],
)
def test_a_classifier_s_features_are_what_its_head_takes_in_and_give_its_logits(
    model: PreTrainedModel, dim: int, tmp_path: Path
) -> None:
    saved(model, tmp_path)
    vision = VisionFeatures(tmp_path, image_size=16)
    features = vision(pixels())
    assert features.shape == (3, dim)
    torch.testing.assert_close(vision.logits(features), model(pixels()).logits, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model", [ResNetModel(RESNET), ViTModel(VIT), Dinov2Model(DINO)])
def test_another_model_s_features_are_its_pooled_output(model: PreTrainedModel, tmp_path: Path) -> None:
    saved(model, tmp_path)
    vision = VisionFeatures(tmp_path, image_size=16)
    torch.testing.assert_close(vision(pixels()), model(pixels()).pooler_output.flatten(1), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="logits need a classifier, got"):
        vision.logits(vision(pixels()))


@torch.no_grad()
def test_pixels_are_clipped_resized_and_normalised_as_the_repository_says(tmp_path: Path) -> None:
    model = saved(ResNetModel(RESNET), tmp_path)
    small, large = pixels(8), pixels(32)
    wide = F.interpolate(small, size=16, mode="bilinear", align_corners=False)
    got = VisionFeatures(tmp_path, image_size=16)
    torch.testing.assert_close(got(small), model(wide).pooler_output.flatten(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got(3 * large), got((3 * large).clamp(-1, 1)))
    # Every fourth line of a fine grid is white: without antialiasing the picture would be black, or a quarter white.
    grid = torch.full((1, 3, 64, 64), -1.0)
    grid[..., ::4] = 1
    grey = model(torch.full((1, 3, 16, 16), -0.5)).pooler_output.flatten(1)
    torch.testing.assert_close(got(grid), grey, atol=0.05, rtol=0.05)
    for settings, expected in (
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])),
        ({"do_normalize": False}, ([0.0] * 3, [1.0] * 3)),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in expected)
        by_hand = model(((wide + 1) / 2 - mean) / std).pooler_output.flatten(1)
        torch.testing.assert_close(VisionFeatures(tmp_path, image_size=16)(small), by_hand, atol=1e-5, rtol=1e-5)


def test_what_gives_no_sound_features_is_refused(tmp_path: Path) -> None:
    saved(
        BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)),
        tmp_path / "text",
    )
    with pytest.raises(ValueError, match="must be a vision model, got one of input_ids"):
        VisionFeatures(tmp_path / "text")
    saved(ViTModel(VIT, add_pooling_layer=False), tmp_path / "vit")  # AutoModel would add a random pooler
    with pytest.raises(ValueError, match=r"must hold all weights of ViTModel, lacks .*pooler"):
        VisionFeatures(tmp_path / "vit")


@torch.no_grad()
def test_features_of_the_cifar_resnet_are_its_pooled_output() -> None:
    folder = os.environ.get("CTRL_CSC_RESNET")
    if not folder:
        pytest.skip("CTRL_CSC_RESNET names no local copy of the classifier")
    vision, model = VisionFeatures(folder), AutoModel.from_pretrained(folder).eval()
    resized = F.interpolate(pixels(32), size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(vision(pixels(32)), model(resized).pooler_output.flatten(1), atol=1e-4, rtol=1e-4)
    assert vision.logits(vision(pixels(32))).shape == (3, 10)


def test_inception_s_features_need_torch_fidelity_by_name() -> None:
    """Where it is not installed, as in CI, only the message is tested; its weights are a download."""
    if importlib.util.find_spec("torch_fidelity") is not None:
        pytest.skip("torch-fidelity is installed")
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        InceptionFeatures()
