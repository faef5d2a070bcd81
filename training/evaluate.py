"""Measures a model on held-out images, beside PCA of the same d and the mean image:
`accelerate launch training/evaluate.py --model PATH --dataset_name uoft-cs/cifar10 ...`.

Prints a table, writes evaluation.json and a grid of originals and reconstructions. Definitions: PSNR is the mean over
images of the clipped images' PSNR, in dB; match@n is the share of the first n images whose reconstruction's nearest
latent, by cosine among those n, is their own (for PCA: among PCA's latents); the Fréchet distance compares the
reconstructions of the first `num_frechet_images` with those images, in a vision model's pooled features.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from data import ImageSource, load_images, take_images, to_pixel_values
from run import GRID_IMAGES, save_grid
from settings import option
from stream import ImageLoader, ImageStream
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, HfArgumentParser

from ctrl_csc_hf.metrics import (
    FeatureMoments,
    frechet_distance,
    nearest_latent_match,
    peak_signal_to_noise_ratio,
)
from ctrl_csc_hf.rate_reduction import coding_rate, rate_reduction

BATCH_SIZE = 250


@dataclass
class EvaluationSettings:
    model: str = option(None, "A folder that train.py wrote, or a Hub repository.", required=True)
    dataset_name: str | None = option(None, "A Hub data set, or a local folder that datasets.load_dataset reads.")
    train_data_dir: str | None = option(None, "A local folder of images, or of Parquet files.")
    train_split: str = option("train", "Split that PCA and the mean image are fitted on.")
    split: str = option("test", "Split to measure on.")
    image_column: str = option("image", "Column of the images.")
    num_images: int = option(10_000, "Images to measure on, the first ones of the split.")
    num_frechet_images: int = option(5_000, "Of these, images for the Fréchet distance.")
    feature_model: str | None = option(None, "A vision model for the Fréchet distance; without it there is none.")
    feature_size: int = option(64, "Side that images are resized to for the feature model, bilinearly.")
    output_dir: str = option("evaluation", "Where evaluation.json and the grid are written.")


Autoencoder = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@torch.inference_mode()
def main(settings: EvaluationSettings) -> dict[str, dict[str, float]]:
    model = AutoModel.from_pretrained(settings.model).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    size, dim = model.config.image_size, model.config.latent_dim

    images = take_images(
        source(settings, settings.split), settings.num_images,
        image_column=settings.image_column, image_size=size,
    )  # fmt: skip
    mean, components = principal_components(settings, size, dim)
    pca: Autoencoder = (
        lambda x: (x.flatten(1) - mean) @ components,
        lambda z: (z @ components.T + mean).clamp(-1, 1).unflatten(1, (3, size, size)),
    )
    rivals: dict[str, Autoencoder] = {
        "CTRL-CSC": (lambda x: model.encode(x).latents, lambda z: model.decode(z).reconstruction),
        f"PCA, {dim} numbers": pca,
        "mean image": (
            lambda x: x.new_zeros(len(x), 1),
            lambda z: mean.expand(len(z), -1).unflatten(1, (3, size, size)),
        ),
    }
    features = feature_extractor(settings, device)
    results: dict[str, dict[str, float]] = {}
    for name, (encode, decode) in rivals.items():
        results[name] = measure(images, encode, decode, features, settings.num_frechet_images, device, name)
    z = torch.cat([model.encode(batch.to(device)).latents for batch in images.split(BATCH_SIZE)])
    zh = torch.cat(
        [model(batch.to(device), output_reconstructed_latents=True).reconstructed_latents
         for batch in images.split(BATCH_SIZE)]
    )  # fmt: skip
    results["CTRL-CSC"] |= {
        "R(Z)": coding_rate(z).item(),
        "R(Zh)": coding_rate(zh).item(),
        "dR(Z, Zh)": rate_reduction(z, zh).item(),
    }

    output_dir = Path(settings.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "evaluation.json").write_text(json.dumps({"settings": asdict(settings), **results}, indent=2) + "\n")
    shown = images[:GRID_IMAGES]
    save_grid(output_dir / "reconstructions.png", shown, model(shown.to(device)).reconstruction.cpu())
    print_table(results)
    return results


def source(settings: EvaluationSettings, split: str):
    return load_images(
        ImageSource(
            dataset_name=settings.dataset_name,
            train_data_dir=settings.train_data_dir,
            split=split,
            streaming=True,
            image_column=settings.image_column,
            label_column=None,
        )
    )


def principal_components(settings: EvaluationSettings, image_size: int, dim: int) -> tuple[Tensor, Tensor]:
    """PCA of the training images: their mean (3 s^2,) and the first `dim` directions (3 s^2, dim)."""
    stream = ImageStream(
        source(settings, settings.train_split),
        image_column=settings.image_column,
        label_column=None,
        image_size=image_size,
        augmentation="none",
        shuffle_buffer=1,
        seed=0,
    )
    moments = FeatureMoments(3 * image_size**2)
    loader = ImageLoader(stream, batch_size=1000, num_workers=0)
    for batch in tqdm(loader.epoch(), desc="training images, for PCA"):
        moments.update(to_pixel_values(batch["pixels"]).flatten(1))
    _, vectors = torch.linalg.eigh(moments.covariance)
    return moments.mean.float(), vectors[:, -dim:].float()


def feature_extractor(settings: EvaluationSettings, device: str) -> Callable[[Tensor], Tensor] | None:
    """Pixels (n, 3, H, W) in [-1, 1] -> pooled features (n, dim)."""
    if settings.feature_model is None:
        return None
    vision_model = AutoModel.from_pretrained(settings.feature_model).eval().to(device)
    size = (settings.feature_size, settings.feature_size)

    def features(pixels: Tensor) -> Tensor:
        resized = F.interpolate(pixels.to(device), size=size, mode="bilinear", align_corners=False)
        return vision_model(resized).pooler_output.flatten(1)

    return features


def measure(
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensor] | None,
    num_frechet_images: int,
    device: str,
    name: str,
) -> dict[str, float]:
    """The figures of one autoencoder; see the top of this file."""
    psnr, latents, reconstructed = [], [], []
    moments: list[FeatureMoments] = []
    for start in tqdm(range(0, len(images), BATCH_SIZE), desc=name):
        x = images[start : start + BATCH_SIZE].to(device)
        z = encode(x)
        xh = decode(z)
        psnr.append(peak_signal_to_noise_ratio(x, xh))
        latents.append(z)
        reconstructed.append(encode(xh))
        if features and start < num_frechet_images:
            for index, pixels in enumerate((x, xh)):
                extracted = features(pixels[: num_frechet_images - start])
                if len(moments) <= index:
                    moments.append(FeatureMoments(extracted.shape[1]))
                moments[index].update(extracted)
    z, zh = torch.cat(latents), torch.cat(reconstructed)
    figures = {"PSNR": torch.cat(psnr).mean().item()}
    if z.shape[1] > 1:
        for count in sorted({min(count, len(z)) for count in (1000, 5000, len(z))}):
            figures[f"match@{count}"] = nearest_latent_match(z[:count], zh[:count])
    if moments:
        figures["Fréchet distance"] = frechet_distance(*moments)
    return figures


def print_table(results: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(column for figures in results.values() for column in figures))
    print("| " + " | ".join(["", *columns]) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for name, figures in results.items():
        print("| " + " | ".join([name, *(f"{figures[c]:.4g}" if c in figures else "" for c in columns)]) + " |")


if __name__ == "__main__":
    (evaluation_settings,) = HfArgumentParser(EvaluationSettings).parse_args_into_dataclasses()
    main(evaluation_settings)
