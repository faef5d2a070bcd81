"""Measures a model on held-out images, beside its rivals, on the same images in the same run:

    accelerate launch training/evaluate.py --model PATH --dataset_name uoft-cs/cifar10 --image_column img \
        --feature_model CLASSIFIER --rivals "ordinary convolutions=PATH" "squared error=PATH"

PCA of the same d and the mean image, fitted on the training split, are always there. Prints a table; writes into
OUTPUT_DIR metrics.json, whose figures the model card reads where OUTPUT_DIR is the model's folder, and pictures.

Definitions: PSNR is the mean over images of the clipped images' PSNR, in dB. match@n is the share of the first n
images whose reconstruction's nearest latent, by cosine among those n, is their own (for PCA: among PCA's latents).
Fréchet and kernel distance compare the reconstructions of the first `num_frechet_images` with those images, in a
vision model's pooled features. Probe and nearest neighbours learn classes from latents of training images. Rates are
in nats, of unit vectors, so they are left out where latents are none. "unseen" is another data set.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from autoencoders import Autoencoder, autoencoder, diffusers_autoencoder, linear_rivals, load_model
from data import ImageDataset, ImageSource, load_images, take_examples, to_pixel_values
from run import GRID_IMAGES, save_grid
from settings import option
from stream import ImageLoader, ImageStream
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from ctrl_csc_hf.metrics import (
    ClosedLoopConsistency,
    CodeSparsity,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    LatentProbe,
    LatentSpectrum,
    LearnedPerceptualSimilarity,
    PeakSignalToNoiseRatio,
    StructuralSimilarity,
    VisionFeatures,
    nearest_latent_match,
    peak_signal_to_noise_ratio,
)
from ctrl_csc_hf.visualization import correlation_map, image_table

BATCH_SIZE = 250
MODEL = "CTRL-CSC"
SHOWN = 10  # images a row of the pictures
MAPPED = 500  # images of the heat map
NEIGHBOURS = 5
LABEL_WIDTH = 14  # letters, of a row of pictures
# Of metrics.json, for the card; train.py writes the same names during a run.
CARD_FIGURES = {
    "held_out_psnr": "psnr",
    "held_out_match": "match",
    "held_out_rate": "rate",
    "held_out_reconstructed_rate": "reconstructed_rate",
    "held_out_rate_reduction": "rate_reduction",
    "ssim": "ssim",
    "lpips": "lpips",
    "frechet_distance": "frechet_distance",
    "kernel_distance": "kernel_distance",
    "linear_probe": "linear_probe",
    "knn": "knn",
    "unseen_psnr": "unseen_psnr",
    "unseen_match": "unseen_match",
}


@dataclass
class EvaluationSettings:
    model: str = option(None, "A folder that train.py wrote, or a Hub repository.", required=True)
    dataset_name: str | None = option(None, "A Hub data set, or a local folder that datasets.load_dataset reads.")
    train_data_dir: str | None = option(None, "A local folder of images, or of Parquet files.")
    train_split: str = option("train", "Split that PCA, the mean image and the probes are fitted on.")
    split: str = option("test", "Split to measure on.")
    image_column: str = option("image", "Column of the images.")
    label_column: str = option("label", "Column of the labels, for the probes and the heat map; 'none' without.")
    num_images: int = option(10_000, "Images to measure on, the first ones of the split.")
    num_frechet_images: int = option(5_000, "Of these, images for the Fréchet and the kernel distance.")
    num_probe_images: int = option(10_000, "Training images that the probes learn from.")
    feature_model: str | None = option(None, "A vision model for the distances; without it there are none.")
    feature_size: int = option(64, "Side that images are resized to for the feature model, bilinearly.")
    rivals: list[str] | None = option(None, "Other models of train.py, as NAME=PATH.")
    diffusers_autoencoders: list[str] | None = option(None, "Autoencoders of diffusers: folders or repositories.")
    unseen_dataset_name: str | None = option(None, "A data set that no model was trained on.")
    unseen_split: str = option("validation", "Its split.")
    unseen_image_column: str = option("image", "Its column of the images.")
    num_unseen_images: int = option(800, "Its images to measure on, and as many test images beside them.")
    output_dir: str = option("evaluation", "Where metrics.json and the pictures are written.")


@torch.inference_mode()
def main(settings: EvaluationSettings) -> dict[str, dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = load_model(settings.model, device)
    models = {MODEL: ours} | {name: load_model(path, device) for name, path in map(named_path, settings.rivals or ())}
    dims = {model.config.latent_dim for model in models.values()}
    sizes = {model.config.image_size for model in models.values()}
    if len(sizes) > 1:
        raise ValueError(f"rivals must take images of the model's size, got sides of {sorted(sizes)} pixels")
    (size,) = sizes
    label_column = None if settings.label_column.lower() == "none" else settings.label_column
    test = source(settings, settings.split, label_column)
    form = {"image_column": settings.image_column, "image_size": size}
    images, labels = take_examples(test, settings.num_images, label_column=label_column, **form)
    unseen = None
    if settings.unseen_dataset_name:
        unseen_source = ImageSource(
            dataset_name=settings.unseen_dataset_name, split=settings.unseen_split, streaming=True,
            image_column=settings.unseen_image_column, label_column=None,
        )  # fmt: skip
        unseen, _ = take_examples(
            load_images(unseen_source), settings.num_unseen_images,
            image_column=settings.unseen_image_column, image_size=size,
        )  # fmt: skip
    num_classes = getattr(test.features[label_column], "num_classes", None) if label_column else None

    autoencoders = {name: autoencoder(model) for name, model in models.items()}
    for path in settings.diffusers_autoencoders or ():
        autoencoders[path] = diffusers_autoencoder(path, device)
    batches = (batch for batch, _ in training_batches(settings, size, None, device))
    autoencoders |= linear_rivals(tqdm(batches, desc="training images, for PCA"), dims)
    features = None
    if settings.feature_model:
        features = VisionFeatures(settings.feature_model, settings.feature_size, device)

    results: dict[str, dict[str, Any]] = {}
    for name, rival in autoencoders.items():
        figures = measure(rival, images, features, settings.num_frechet_images, device, name)
        if num_classes and name != "mean image":
            figures |= probe(rival, settings, size, label_column, num_classes, images, labels, device)
        if unseen is not None:
            figures |= measure_unseen(rival, unseen, images[: len(unseen)], device)
        results[name] = figures

    output_dir = Path(settings.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_metrics(output_dir / "metrics.json", settings, results, len(images))
    draw(output_dir, autoencoders, images, labels, settings, size, device)
    print_table(results)
    return results


def named_path(rival: str) -> tuple[str, str]:
    name, separator, path = rival.partition("=")
    if not (name and separator and path) or name == MODEL:
        raise ValueError(f"rivals must be NAME=PATH with a name other than {MODEL!r}, got {rival!r}")
    return name, path


def source(settings: EvaluationSettings, split: str, label_column: str | None) -> ImageDataset:
    return load_images(
        ImageSource(
            dataset_name=settings.dataset_name,
            train_data_dir=settings.train_data_dir,
            split=split,
            streaming=True,
            image_column=settings.image_column,
            label_column=label_column,
        )
    )


def training_batches(
    settings: EvaluationSettings, image_size: int, label_column: str | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All images of the training split, with their labels where there is a column of them."""
    stream = ImageStream(
        source(settings, settings.train_split, label_column),
        image_column=settings.image_column,
        label_column=label_column,
        image_size=image_size,
        augmentation="none",
        shuffle_buffer=1,
        seed=0,
    )
    for batch in ImageLoader(stream, batch_size=BATCH_SIZE, num_workers=0).epoch():
        yield to_pixel_values(batch["pixels"], device), batch.get("labels")


def measure(
    rival: Autoencoder,
    images: Tensor,
    features: VisionFeatures | None,
    num_frechet_images: int,
    device: torch.device,
    name: str,
) -> dict[str, Any]:
    """The figures of one autoencoder on held-out images; see the top of this file."""
    pairs: list[Any] = [PeakSignalToNoiseRatio(), StructuralSimilarity()]
    with suppress(ImportError):  # measured where it is installed
        pairs.append(LearnedPerceptualSimilarity())
    distances = [FrechetDistance(), KernelDistance()]
    score, consistency, spectrum, sparsity = InceptionScore(), ClosedLoopConsistency(), LatentSpectrum(), CodeSparsity()
    latents, reconstructed = [], []
    for start in tqdm(range(0, len(images), BATCH_SIZE), desc=name):
        x = images[start : start + BATCH_SIZE].to(device)
        z = rival.encode(x)
        xh = rival.decode(z)
        zh = rival.encode(xh)
        for pair in pairs:
            pair.update(x, xh)
        latents.append(z)
        reconstructed.append(zh)
        if rival.codes is not None:
            sparsity.update(rival.codes(x))
        if features is not None and start < num_frechet_images:
            part = slice(0, num_frechet_images - start)
            of_images, of_reconstructions = features(x[part]), features(xh[part])
            for distance in distances:
                distance.update(of_images, of_reconstructions)
            if features.is_classifier:
                score.update(features.logits(of_reconstructions))
    z, zh = torch.cat(latents), torch.cat(reconstructed)
    figures: dict[str, Any] = {key: value for pair in pairs for key, value in pair.compute().items()}
    if z.shape[1] > 1:  # the mean image has one number, the same for all
        consistency.update(z, zh)
        figures |= consistency.compute()
        for count in sorted({min(count, len(z)) for count in (1000, 5000, len(z))}):
            figures[f"match@{count}"] = nearest_latent_match(z[:count], zh[:count])
    if features is not None:
        figures |= {key: value for distance in distances for key, value in distance.compute().items()}
        if features.is_classifier:
            figures |= score.compute()
    if torch.allclose(z.norm(dim=1), torch.ones(len(z), device=z.device), atol=1e-3):
        spectrum.update(z, zh)
        figures |= spectrum.compute()
    if rival.codes is not None:
        figures |= sparsity.compute()
    return figures


def probe(
    rival: Autoencoder,
    settings: EvaluationSettings,
    image_size: int,
    label_column: str,
    num_classes: int,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
) -> dict[str, float]:
    """Accuracies of classifiers of the latents."""
    statistic, count = LatentProbe(num_classes), 0
    for x, y in training_batches(settings, image_size, label_column, device):
        statistic.fit_update(rival.encode(x), y)
        count += len(x)
        if count >= settings.num_probe_images:
            break
    for x, y in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
        statistic.update(rival.encode(x.to(device)), y)
    return statistic.compute()


def measure_unseen(rival: Autoencoder, unseen: Tensor, seen: Tensor, device: torch.device) -> dict[str, float]:
    """PSNR and match of another data set's images, and the match among as many test images."""
    figures = {}
    for name, images in (("unseen", unseen), ("seen", seen)):
        psnr, latents, reconstructed = [], [], []
        for batch in images.split(BATCH_SIZE):
            x = batch.to(device)
            latents.append(rival.encode(x))
            xh = rival.decode(latents[-1])
            psnr.append(peak_signal_to_noise_ratio(x, xh))
            reconstructed.append(rival.encode(xh))
        figures[f"{name}_psnr"] = torch.cat(psnr).mean().item()
        if latents[0].shape[1] > 1:
            figures[f"{name}_match"] = nearest_latent_match(torch.cat(latents), torch.cat(reconstructed))
    return figures


def write_metrics(path: Path, settings: EvaluationSettings, results: dict[str, dict[str, Any]], count: int) -> None:
    """Adds to what train.py wrote there, if it did: the card's figures, and all figures of all rivals."""
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    metrics |= {entry: results[MODEL][key] for entry, key in CARD_FIGURES.items() if key in results[MODEL]}
    numbers = {
        name: getattr(settings, name) for name in ("num_frechet_images", "num_probe_images", "num_unseen_images")
    }
    metrics |= {"held_out_images": count, "evaluation": numbers | {"results": results}}  # and no name of a local folder
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def draw(
    output_dir: Path,
    autoencoders: dict[str, Autoencoder],
    images: Tensor,
    labels: Tensor | None,
    settings: EvaluationSettings,
    image_size: int,
    device: torch.device,
) -> None:
    """reconstructions.png, rivals.png, neighbours.png and correlations.png."""
    ours = autoencoders[MODEL]
    shown = images[:GRID_IMAGES].to(device)
    save_grid(output_dir / "reconstructions.png", shown.cpu(), ours.decode(ours.encode(shown)).cpu())

    rows = {"test images": shown[:SHOWN]}
    rows |= {name: rival.decode(rival.encode(shown[:SHOWN])) for name, rival in autoencoders.items()}
    image_table(torch.stack(list(rows.values())).cpu(), row_labels=[fill(name, LABEL_WIDTH) for name in rows]).savefig(
        output_dir / "rivals.png", dpi=120
    )

    x = shown[:SHOWN]
    z = ours.encode(x)
    neighbours, cosines = nearest_training_images(ours, z, settings, image_size, device)
    table = torch.cat([x[:, None], ours.decode(z)[:, None], neighbours], dim=1)
    names = ["image", "reconstruction", *(f"nearest {index + 1}" for index in range(NEIGHBOURS))]
    captions = [["", "", *(f"cos {cosine:.2f}" for cosine in row)] for row in cosines.tolist()]
    image_table(
        table.cpu(), row_labels=[str(index) for index in range(len(x))], column_labels=names, image_labels=captions
    ).savefig(output_dir / "neighbours.png", dpi=120)

    x = images[:MAPPED].to(device)
    z = ours.encode(x)
    zh = ours.encode(ours.decode(z))
    figure = correlation_map(z.cpu(), None if labels is None else labels[:MAPPED], zh.cpu())
    figure.savefig(output_dir / "correlations.png", dpi=120)


def nearest_training_images(
    ours: Autoencoder, z: Tensor, settings: EvaluationSettings, image_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For latents (n, d), the training images with the nearest latents (n, NEIGHBOURS, 3, s, s), and their cosines."""
    cosines = z.new_full((len(z), 0), 0)
    images = z.new_zeros(len(z), 0, 3, image_size, image_size)
    for x, _ in training_batches(settings, image_size, None, device):
        cosines = torch.cat([cosines, z @ ours.encode(x).T], dim=1)
        images = torch.cat([images, x.expand(len(z), *x.shape)], dim=1)
        cosines, best = cosines.topk(min(NEIGHBOURS, cosines.shape[1]), dim=1)
        images = images[torch.arange(len(z), device=device)[:, None], best]
    return images, cosines


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """A line for each figure, a column for each autoencoder."""
    figures = list(dict.fromkeys(key for column in results.values() for key in column if "spectrum" not in key))
    print("| " + " | ".join(["", *results]) + " |")
    print("| --- " * (len(results) + 1) + "|")
    for key in figures:
        cells = [f"{column[key]:.4g}" if key in column else "" for column in results.values()]
        print("| " + " | ".join([key, *cells]) + " |")


if __name__ == "__main__":
    (evaluation_settings,) = HfArgumentParser(EvaluationSettings).parse_args_into_dataclasses()
    main(evaluation_settings)
