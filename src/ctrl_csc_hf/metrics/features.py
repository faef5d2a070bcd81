"""Networks whose features the Fréchet and kernel distances compare. Pixels (n, 3, H, W) in [-1, 1] go in."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.image_processing_base import ImageProcessingMixin


class VisionFeatures:
    """The pooled features of a vision model of transformers: (n, 3, H, W) pixels in [-1, 1] -> (n, dim).

    Of a classifier (`...ForImageClassification`) they are what its last linear layer takes in, so that `logits` gives
    its logits from them; of another model its pooled output. Pixels are clipped, resized to `image_size` bilinearly
    (antialiased where that makes them smaller) and normalised by the mean and standard deviation of the repository's
    preprocessor_config.json; where there is none they stay in [-1, 1].

    Args:
        model_name_or_path: a Hub repository or a folder.
        image_size: side in pixels that images are resized to; many transformers take one size only.
        device: where the model runs.

    Raises:
        ValueError: for a model that takes no pixels, has no pooled output, or lacks some of its weights.
    """

    def __init__(
        self, model_name_or_path: str | Path, image_size: int = 64, device: torch.device | str = "cpu"
    ) -> None:
        config = AutoConfig.from_pretrained(model_name_or_path)
        self.is_classifier = any(name.endswith("ForImageClassification") for name in config.architectures or ())
        auto = AutoModelForImageClassification if self.is_classifier else AutoModel
        model, loading = auto.from_pretrained(model_name_or_path, dtype=torch.float32, output_loading_info=True)
        if model.main_input_name != "pixel_values":
            raise ValueError(f"{model_name_or_path!r} must be a vision model, got one of {model.main_input_name}")
        if loading["missing_keys"]:
            raise ValueError(
                f"{model_name_or_path!r} must hold all weights of {type(model).__name__}, lacks "
                f"{sorted(loading['missing_keys'])}"
            )
        self.head = _take_head(model) if self.is_classifier else nn.Identity()
        self.model, self.head = model.eval().to(device), self.head.eval().to(device)
        self.image_size, self.device = image_size, device
        self.name = f"a local {type(model).__name__}" if Path(model_name_or_path).exists() else str(model_name_or_path)
        self.mean, self.std = _normalisation(model_name_or_path)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device).float().clamp(-1, 1)
        size = (self.image_size, self.image_size)
        resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (resized.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        output = self.model(pixel_values=(resized / 2 + 0.5 - mean) / std)
        features = output.logits if self.is_classifier else output.get("pooler_output")
        if features is None:
            raise ValueError(f"{type(self.model).__name__} has no pooled output")
        return features.flatten(1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """The classifier's logits: what the instance gave, (n, dim) -> (n, num_labels); ValueError if it is none."""
        if not self.is_classifier:
            raise ValueError(f"logits need a classifier, got {type(self.model).__name__}")
        return self.head(features)


def _take_head(model: Any) -> nn.Module:
    """The last linear layer of a classifier; the identity takes its place, so that the model's logits are features."""
    inside = {id(module) for module in model.base_model.modules()}
    heads = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside
    ]
    if len(heads) != 1:
        raise ValueError(f"{type(model).__name__} must have one linear layer on top of its base model, got {heads}")
    head = model.get_submodule(heads[0])
    model.set_submodule(heads[0], nn.Identity())
    return head


def _normalisation(model_name_or_path: str | Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels in [0, 1] that the model was trained with."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model_name_or_path)
    except OSError:
        return [0.5] * 3, [0.5] * 3
    if not settings.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return settings.get("image_mean") or [0.5] * 3, settings.get("image_std") or [0.5] * 3


class InceptionFeatures:
    """The features of the FID, (n, 3, H, W) pixels in [-1, 1] -> (n, 2048), and the logits of the Inception score.

    Inception v3 with TensorFlow's weights of 2015, by torch-fidelity, which downloads them: pixels are rounded to 8
    bits and resized to 299 as TensorFlow 1 did. Logits are without bias, as there.

    Raises:
        ImportError: where torch-fidelity, or the torchvision that it needs, is not installed.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                f"InceptionFeatures needs torch-fidelity: pip install torch-fidelity ({error})"
            ) from error
        self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval().to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        levels = (pixels.to(self.device).float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        return self.model(levels)[0]

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """What the instance gave, (n, 2048) -> (n, 1008)."""
        return features @ self.model.fc.weight.T
