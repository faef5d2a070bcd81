"""Measures a model on held-out images, beside its rivals, on the same images in the same run:

    accelerate launch training/evaluate.py --model PATH --dataset_name uoft-cs/cifar10 \
        --feature_model CLASSIFIER OTHER_CLASSIFIER --rivals "without the game=PATH" "squared error=PATH"

PCA of the same d and the mean image, fitted on the training split, are always there. Prints a table; writes into
OUTPUT_DIR metrics.json and pictures. The model card reads the model's figures where OUTPUT_DIR is the model's folder;
there, figures of a local data set that the model was not trained on, and of images that it may have been trained on,
go into OUTPUT_DIR/evaluation.

Definitions: PSNR is the mean over images of the clipped images' PSNR, in dB. match@n is the share of the first n
images whose reconstruction's nearest latent, by cosine among those n, is their own (for PCA: among PCA's latents).
Fréchet and kernel distance compare the reconstructions of the first `num_frechet_images` with those images, in each
vision model's pooled features; feature_cosine is the mean cosine of these between an image and its reconstruction.
Probe and nearest neighbours learn classes from latents of training images, and from the codes of all stages, averaged
to 4x4. energy_excess_1 is how far the sparse-coding energy of the first stage's codes is above its minimum. Rates are
in nats, of unit vectors, so they are left out where latents are none. "unseen" is another data set.
All images are drawn uniformly from their splits, in random order, by the seed.
"""

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.hub.records import read_object, readable
from ctrl_csc_hf.inspection.visualization import correlation_map, image_table
from ctrl_csc_hf.latents.encoding import ImageDataset, draw_images, find_columns
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

from .autoencoders import MEAN_IMAGE, PCA, Autoencoder, autoencoder, diffusers_autoencoder, linear_rivals, load_model
from .checkpoints import training_runs
from .data import (
    ImageSource,
    decode,
    identify_as_trained,
    load_images,
    load_splits,
    number_classes,
    take_images,
    to_pixel_values,
)
from .ema import GRID_IMAGES
from .run import figure_records, one_line_errors, save_grid
from .settings import SettingsParser, check_output_dir, hub_id, option

logger = logging.getLogger(__name__)

BATCH_SIZE = 250
MODEL = "CTRL-CSC"
PLACES = ("train_data_dir", "dataset_name")  # settings that name a data set, of train.py and here
SHOWN = 10  # images a row of the pictures
MAPPED = 500  # images of the heat map
NEIGHBOURS = 5
EXCESS_IMAGES = 64  # whose energies are compared with their minimum
POOLED = 4  # side to which codes are pooled for their probe
LABEL_WIDTH = 14  # letters, of a row of pictures
TEST_SPLITS = ("test", "validation", "valid", "val", "dev")  # in this order, where none is named
# Of metrics.json, for the card: those that the images and the model give, and those that a feature model gives too.
CARD_FIGURES = (
    "psnr", "match", "rate", "reconstructed_rate", "rate_reduction", "ssim", "lpips", "linear_probe", "knn",
    "codes_linear_probe", "nonzero_1", "nonzero_2", "nonzero_3", "energy_excess_1",
    "energy_excess_2", "energy_excess_3",
)  # fmt: skip
DISTANCES = ("frechet_distance", "kernel_distance", "feature_cosine")


@dataclass
class EvaluationSettings:
    model: str = option(None, "A folder that train.py wrote, or a Hub repository.", required=True)
    dataset_name: str | None = option(None, "A Hub data set, or a local folder that datasets.load_dataset reads.")
    dataset_config_name: str | None = option(None, "Name of the data set configuration.")
    train_data_dir: str | None = option(None, "A local folder of images, or of Parquet files.")
    hub_dataset_id: str | None = option(None, "Hub id of the data set that a local folder is a copy of.")
    train_split: str | None = option(
        None,
        "Split that PCA, the mean image and the probes are fitted on; by default the one that the model was trained "
        "on, the only one allowed of the model's own data set, or else train.",
    )
    split: str | None = option(
        None,
        "Split to measure on; by default a test or validation split, or else the images of the training split that "
        "train.py holds out.",
    )
    image_column: str | None = option(None, "Column of the images; by default the only one of images.")
    label_column: str | None = option(
        None, "Column of the labels, for the probes and the heat map; by default found by its type; 'none' without."
    )
    num_images: int = option(10_000, "Number of images to measure on.")
    num_frechet_images: int = option(5_000, "Number of these for the Fréchet and the kernel distance.")
    num_fitted_images: int = option(
        50_000, "Number of training images that PCA and the mean image are fitted to and nearest ones are sought among."
    )
    num_probe_images: int = option(10_000, "Number of these that the probes learn from.")
    feature_model: list[str] | None = option(
        None,
        "Vision models for the distances, best two that learned from different images; without one there are none.",
    )
    feature_size: list[int] = field(
        default_factory=lambda: [64],
        metadata={"help": "Side that images are resized to for the feature models, bilinearly: of all, or of each."},
    )
    rivals: list[str] | None = option(None, "Other models of train.py, as NAME=PATH.")
    diffusers_autoencoders: list[str] | None = option(
        None, "Autoencoders of diffusers, folders or repositories, as NAME=PATH."
    )
    unseen_dataset_name: str | None = option(None, "A data set that no model was trained on.")
    unseen_split: str = option("validation", "Split of that data set.")
    unseen_hub_dataset_id: str | None = option(None, "Hub id of the data set that a local folder is a copy of.")
    num_unseen_images: int = option(800, "Number of its images to measure on, and of test images beside them.")
    seed: int = option(0, "Seed of all samples.")
    output_dir: str = option("evaluation", "Where metrics.json and the pictures are written.")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                "exactly one of --dataset_name and --train_data_dir must be given, got "
                f"dataset_name={self.dataset_name!r} and train_data_dir={self.train_data_dir!r}"
            )
        check_output_dir(self.output_dir, self.dataset_name or self.train_data_dir)
        check_output_dir(self.output_dir, self.unseen_dataset_name)
        self.hub_dataset_id = hub_id(self.dataset_name) or self.hub_dataset_id
        self.unseen_hub_dataset_id = hub_id(self.unseen_dataset_name) or self.unseen_hub_dataset_id
        for name in ("num_images", "num_frechet_images", "num_fitted_images", "num_probe_images", "num_unseen_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        names = [named_path(rival)[0] for rival in (*(self.rivals or ()), *(self.diffusers_autoencoders or ()))]
        if len(set(names)) < len(names):
            raise ValueError(f"rivals and diffusers_autoencoders must have different names, got {names}")
        models = len(self.feature_model or ())
        if len(self.feature_size) not in (1, models) or min(self.feature_size) < 1:
            raise ValueError(
                f"feature_size must be one number of at least 1, or one for each of {models} feature models, got "
                f"{self.feature_size!r}"
            )
        if (Path(self.output_dir) / "config.json").exists() and not self.is_beside_model:
            raise ValueError(
                f"output_dir must be the model's own folder or hold no model, got {self.output_dir!r}, which holds "
                f"another model than {self.model!r}"
            )

    @property
    def is_beside_model(self) -> bool:
        """Whether output_dir is the model's folder."""
        return Path(self.output_dir).resolve() == Path(self.model).resolve()


@dataclass(frozen=True)
class ProbeData:
    """
    classes: values of the labels, in order.
    labels: of the test images, (n,), places among the classes.
    training_labels: of the first of the training images, (m,), in the same form.
    """

    classes: list[int]
    labels: Tensor
    training_labels: Tensor


@dataclass(frozen=True)
class Images:
    """What is measured on, and what rivals and probes are fitted on.

    test: (n, 3, s, s), in random order; split: where it is from.
    training: a sample to fit on, (m, 3, s, s), uint8, in random order.
    probed: labels of these and what probes learn from; None where there is no probe.
    held_out: whether the test images are of the data set that the model was trained on, and no training images.
    recorded: whether they are held out, or of another data set with an id of its own on the Hub: a card tells these.
    """

    test: Tensor
    split: str
    training: Tensor
    probed: ProbeData | None
    held_out: bool
    recorded: bool


@torch.inference_mode()
def main(settings: EvaluationSettings) -> dict[str, dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = [(MODEL, settings.model), *map(named_path, settings.rivals or ())]
    models = {name: load_model(path, device) for name, path in named}
    dims = {model.config.latent_dim for model in models.values()}
    sizes = {model.config.image_size for model in models.values()}
    if len(sizes) > 1:
        raise ValueError(f"rivals must take images of the model's size, got sides of {sorted(sizes)} pixels")
    (size,) = sizes
    paths = settings.feature_model or []
    sides = settings.feature_size * len(paths) if len(settings.feature_size) == 1 else settings.feature_size
    features = [VisionFeatures(path, side, device) for path, side in zip(paths, sides, strict=True)]
    if len({model.name for model in features}) < len(features):
        raise ValueError(f"feature_model must hold models of different names, got {[model.name for model in features]}")
    check_unseen(settings)
    images = load_data(settings, size)
    output_dir = Path(settings.output_dir)
    beside_model = settings.is_beside_model and images.recorded
    if settings.is_beside_model and not images.recorded:
        output_dir /= "evaluation"
        print(
            "These images are not known to be held-out ones of the data set that the model was trained on, and it has "
            "no other id on the Hub (--hub_dataset_id) by which the model's card could name it: the model's "
            "metrics.json stays as it is"
        )
    digest = digest_of(models[MODEL])
    earlier_metrics(output_dir / "metrics.json", digest)  # before hours of measuring
    unseen = None
    if settings.unseen_dataset_name:
        source = ImageSource(
            dataset_name=settings.unseen_dataset_name, split=settings.unseen_split, streaming=True, label_column="none"
        )
        rows = load_images(source)
        column, _ = find_columns(rows.features)
        unseen = take_images(rows, settings.num_unseen_images, image_column=column, image_size=size, seed=settings.seed)

    autoencoders = {name: autoencoder(model) for name, model in models.items()}
    for name, path in map(named_path, settings.diffusers_autoencoders or ()):
        autoencoders[name] = diffusers_autoencoder(path, device)
    autoencoders |= linear_rivals(images.training, dims, device)
    results: dict[str, dict[str, Any]] = {}
    for name, rival in autoencoders.items():
        figures = measure(rival, images.test, features, settings.num_frechet_images, device, name)
        if images.probed is not None and name != MEAN_IMAGE:
            figures |= probe(rival, images, images.probed, device)
        if unseen is not None:
            figures |= measure_unseen(rival, unseen, images.test[: len(unseen)], device)
        results[name] = figures

    output_dir.mkdir(parents=True, exist_ok=True)
    num_unseen = 0 if unseen is None else len(unseen)
    dim = models[MODEL].config.latent_dim
    write_metrics(output_dir / "metrics.json", settings, results, images, num_unseen, features, digest, dim)
    draw_pictures(output_dir, autoencoders, images, device, with_grid=images.held_out or not beside_model)
    print_table(results)
    print(f"Figures and pictures are in {output_dir}")
    return results


def named_path(rival: str) -> tuple[str, str]:
    name, separator, path = rival.partition("=")
    if not (name and separator and path) or name in (MODEL, MEAN_IMAGE) or name.startswith("PCA, "):
        raise ValueError(
            f"rivals must be NAME=PATH with a name other than {MODEL!r}, {MEAN_IMAGE!r} and those of PCA, got {rival!r}"
        )
    return name, path


def digest_of(model: CtrlCscModel) -> str:
    """Tells a model's weights from others."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_unseen(settings: EvaluationSettings) -> None:
    """Refuses as unseen what the model was trained or is measured on, by its id or its place."""
    if not settings.unseen_dataset_name:
        return
    sources = [asdict(settings), *training_runs(settings.model)]
    ids = {source.get("hub_dataset_id") for source in sources} - {None}
    named = (name for source in sources for name in map(source.get, PLACES) if name)
    places = {Path(name).resolve() for name in named}
    if settings.unseen_hub_dataset_id in ids or Path(settings.unseen_dataset_name).resolve() in places:
        raise ValueError(
            "unseen_dataset_name must be another data set than the model was trained on or is measured on, got "
            f"{settings.unseen_dataset_name!r}"
        )


def is_training_data(settings: EvaluationSettings, trained_with: dict[str, Any]) -> bool:
    """Whether the data set is that of the model's training: by its Hub id, its local folder, or as a copy of that."""
    if settings.dataset_config_name not in (None, trained_with.get("dataset_config_name")):
        return False
    if settings.hub_dataset_id and settings.hub_dataset_id == trained_with.get("hub_dataset_id"):
        return True
    here = settings.train_data_dir or settings.dataset_name
    there = trained_with.get("train_data_dir") or trained_with.get("dataset_name")
    if here is None or not Path(here).exists():
        return False
    if there is not None and Path(here).resolve() == Path(there).resolve():
        return True
    if not (known := trained_with.get("images")):
        return False
    copy = ImageSource(
        dataset_name=settings.dataset_name,
        train_data_dir=settings.train_data_dir,
        split=trained_with["train_split"],
        streaming=trained_with["streaming"],
        label_column=trained_with["label_column"],
    )
    try:
        return identify_as_trained(copy, trained_with)[0] == known
    except ValueError:  # it has no such split or column
        return False


def were_held_out(source: ImageSource, trained_with: dict[str, Any], split: str) -> bool:
    """Whether a run has seen none of the images of a split, or none of its part that train.py holds out.

    A copy of the data set may have another order, of which train.py would hold out other images, or other splits. So
    the run's own held-out images, or for another split its training images, must be the same by `identify`. Of a model
    that older code trained, these are not known; then only a split of its own is trusted.

    Args:
        source: of the data set.
        trained_with: what train.py wrote about the run.
    """
    train_split, known = trained_with.get("train_split", source.split), trained_with.get("images")
    if known is None:
        return split != train_split
    source = replace(
        source, split=train_split, streaming=trained_with["streaming"], label_column=trained_with["label_column"]
    )
    try:
        found, held_out_split = identify_as_trained(source, trained_with)
        if split != held_out_split:
            if split == train_split:
                return False
            load_splits(source, split, 1, seed=0, preferred=())  # raises where they have images in common
    except ValueError:  # there is no such split
        return False
    kind = "held-out" if split == held_out_split else "training"
    return all(found.get(name) == value for name, value in known.items() if kind in name)


def load_data(settings: EvaluationSettings, image_size: int) -> Images:
    """Images to measure on, and all others of the training split."""
    runs = training_runs(settings.model)
    has_other_id = settings.hub_dataset_id not in (None, *(run.get("hub_dataset_id") for run in runs))
    runs = [run for run in runs if is_training_data(settings, run)]
    trained_with = runs[0] if runs else {}
    train_split = trained_with.get("train_split", settings.train_split or "train")
    if settings.train_split not in (None, train_split):
        raise ValueError(
            f"train_split must be {train_split!r}, as the model was trained on it, or be left out, got "
            f"{settings.train_split!r}"
        )
    # Of the data set that the model was trained on, the same settings as train.py's hold out the same images.
    source = ImageSource(
        dataset_name=settings.dataset_name,
        dataset_config_name=settings.dataset_config_name or trained_with.get("dataset_config_name"),
        train_data_dir=settings.train_data_dir,
        split=train_split,
        streaming=trained_with.get("streaming", settings.dataset_name is not None),
        image_column=settings.image_column or trained_with.get("image_column"),
        label_column=settings.label_column,
    )
    class_source = replace(source, label_column=trained_with.get("label_column", settings.label_column))
    training, test, split = load_splits(
        source,
        settings.split,
        trained_with.get("num_validation_images", settings.num_images),
        seed=trained_with.get("seed", settings.seed),
        preferred=TEST_SPLITS,
        class_source=class_source,
    )
    held_out = bool(runs)
    if not all(were_held_out(source, run, split) for run in runs):
        held_out = False
        logger.warning(
            "The images of the split %r may be training images: the model was trained on all of them, or on another "
            "copy of the data set, or does not tell. Give the same copy, or --split of images that it has not seen",
            split,
        )
    image_column, label_column = find_columns(training.features, source.image_column, settings.label_column)

    def draw(rows: ImageDataset, count: int) -> tuple[Tensor, list[int | None] | None]:
        images, labels = draw_images(
            rows,
            count,
            image_column=image_column,
            label_column=label_column or "none",
            seed=settings.seed,
            read=lambda encoded: decode(encoded, image_size),
        )
        return torch.from_numpy(np.stack(images)), labels

    pixels, labels = draw(test, settings.num_images)
    training_pixels, training_labels = draw(training, settings.num_fitted_images)
    probed = None
    if labels is None or training_labels is None:
        logger.warning("There is no column of labels, so no probe: --label_column names one")
    else:
        assert label_column is not None
        try:
            probing = training_labels[: settings.num_probe_images]
            classes, places = number_classes(label_column, labels, probing)
            probed = ProbeData(classes, *places)
        except ValueError as error:
            logger.warning("%s, so there is no probe", error)
    recorded = held_out if runs else has_other_id
    return Images(to_pixel_values(pixels), split, training_pixels, probed, held_out, recorded)


def measure(
    rival: Autoencoder,
    images: Tensor,
    features: list[VisionFeatures],
    num_frechet_images: int,
    device: torch.device,
    name: str,
) -> dict[str, Any]:
    """The figures of one autoencoder on held-out images; see the top of this file."""
    pairs: list[Any] = [PeakSignalToNoiseRatio(), StructuralSimilarity()]
    with suppress(ImportError):  # measured where it is installed
        pairs.append(LearnedPerceptualSimilarity())
    distances = {model.name: (FrechetDistance(), KernelDistance(), InceptionScore()) for model in features}
    cosines: dict[str, list[Tensor]] = {model.name: [] for model in features}
    consistency, spectrum, sparsity = ClosedLoopConsistency(), LatentSpectrum(), CodeSparsity()
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
        part = slice(0, max(num_frechet_images - start, 0))
        for model in features if len(x[part]) else ():
            of_images, of_reconstructions = model(x[part]), model(xh[part])
            frechet, kernel, score = distances[model.name]
            frechet.update(of_images, of_reconstructions)
            kernel.update(of_images, of_reconstructions)
            cosines[model.name].append(F.cosine_similarity(of_images, of_reconstructions))
            if model.is_classifier:
                score.update(model.logits(of_reconstructions))
    z, zh = torch.cat(latents), torch.cat(reconstructed)
    figures: dict[str, Any] = {key: value for pair in pairs for key, value in pair.compute().items()}
    if z.shape[1] > 1:  # the mean image has one number, the same for all
        consistency.update(z, zh)
        figures |= consistency.compute()
        for count in sorted({min(count, len(z)) for count in (1000, 5000, len(z))}):
            figures[f"match@{count}"] = nearest_latent_match(z[:count], zh[:count])
    for model in features:
        frechet, kernel, score = distances[model.name]
        found = frechet.compute() | kernel.compute() | {"feature_cosine": torch.cat(cosines[model.name]).mean().item()}
        found |= score.compute() if model.is_classifier else {}
        figures |= {in_features(key, model): value for key, value in found.items()}
    if torch.allclose(z.norm(dim=1), torch.ones(len(z), device=z.device), atol=1e-3):
        spectrum.update(z, zh)
        figures |= spectrum.compute()
    if rival.codes is not None and rival.energy_excess is not None:
        figures |= sparsity.compute() | rival.energy_excess(images[:EXCESS_IMAGES].to(device))
    return figures


def in_features(figure: str, model: VisionFeatures) -> str:
    """The key of a figure that a feature model gives."""
    return f"{figure}, features of {model.name}"


def probe(rival: Autoencoder, images: Images, data: ProbeData, device: torch.device) -> dict[str, float]:
    """Accuracies of classifiers of the latents, and of the stages' codes, learned from training images and labels."""
    inputs = {"": rival.encode}
    codes_of = rival.codes
    if codes_of is not None:
        inputs["codes_"] = lambda x: torch.cat(
            [F.adaptive_avg_pool2d(codes, POOLED).flatten(1) for codes in codes_of(x)], dim=1
        )
    figures: dict[str, float] = {}
    for prefix, features in inputs.items():
        statistic = LatentProbe(len(data.classes))
        training = images.training[: len(data.training_labels)]
        for x, y in zip(training.split(BATCH_SIZE), data.training_labels.split(BATCH_SIZE), strict=True):
            statistic.fit_update(features(to_pixel_values(x, device)), y)
        for x, y in zip(images.test.split(BATCH_SIZE), data.labels.split(BATCH_SIZE), strict=True):
            statistic.update(features(x.to(device)), y)
        figures |= {prefix + name: value for name, value in statistic.compute().items()}
    return figures


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


def write_metrics(
    path: Path,
    settings: EvaluationSettings,
    results: dict[str, dict[str, Any]],
    images: Images,
    num_unseen: int,
    features: list[VisionFeatures],
    digest: str,
    dim: int,
) -> None:
    """Replaces the figures of the same data sets and splits, which the card reads, and all figures of all rivals.

    The card has those of PCA with `dim` numbers beside the model's. No figure of another model stays, by the digest of
    its weights.
    """
    ours = results[MODEL]
    measured = {
        "dataset": settings.hub_dataset_id,
        "split": images.split,
        "num_images": len(images.test),
        "measured_by": "training/evaluate.py",
    }
    figures = {name: ours[name] for name in CARD_FIGURES if name in ours}  # not all of them are measured everywhere
    pca = results[PCA.format(dim)]
    figures |= {"mean_image_psnr": results[MEAN_IMAGE]["psnr"], "pca_psnr": pca["psnr"]}
    records = figure_records(figures, **measured)
    for model in features:
        count = min(settings.num_frechet_images, len(images.test))
        distances = {name: ours[in_features(name, model)] for name in DISTANCES}
        distances |= {f"pca_{name}": pca[in_features(name, model)] for name in DISTANCES}
        records += figure_records(distances, **measured | {"num_images": count, "feature_model": model.name})
    if num_unseen and settings.unseen_hub_dataset_id:  # a card names no local data set, so it cannot tell two apart
        measured |= {"dataset": settings.unseen_hub_dataset_id, "split": settings.unseen_split}
        unseen = {name: ours[f"unseen_{name}"] for name in ("psnr", "match")}
        records += figure_records(unseen, **measured | {"num_images": num_unseen})
    replaced = {(record["dataset"], record["split"]) for record in records}
    metrics, earlier = earlier_metrics(path, digest)
    kept = [figure for measured_on, figure in earlier if measured_on not in replaced]
    numbers = {name: value for name, value in asdict(settings).items() if name.startswith("num_") or name == "seed"}
    metrics |= {"figures": kept + records, "evaluation": numbers | {"weights": digest, "results": results}}
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def earlier_metrics(path: Path, digest: str) -> tuple[dict[str, Any], list[tuple[Any, dict[str, Any]]]]:
    """What metrics.json holds, and its figures of the model of this digest, each with its data set and split.

    Raises:
        ValueError: if it cannot be read.
    """
    if not path.exists():
        return {}, []
    with readable(path, "remove it, or name another output_dir"):
        metrics = read_object(path)
        of_this_model = metrics.get("evaluation", {"weights": digest}).get("weights") == digest
        figures = metrics.get("figures", []) if of_this_model else []
        return metrics, [((figure["dataset"], figure["split"]), figure) for figure in figures]


def draw_pictures(
    output_dir: Path,
    autoencoders: dict[str, Autoencoder],
    images: Images,
    device: torch.device,
    with_grid: bool,
) -> None:
    """rivals.png, neighbours.png, correlations.png and, with the grid, reconstructions.png."""
    ours = autoencoders[MODEL]
    shown = images.test[:GRID_IMAGES].to(device)
    if with_grid:
        save_grid(output_dir / "reconstructions.png", shown.cpu(), ours.decode(ours.encode(shown)).cpu())

    rows = {"test images": shown[:SHOWN]}
    rows |= {name: rival.decode(rival.encode(shown[:SHOWN])) for name, rival in autoencoders.items()}
    image_table(torch.stack(list(rows.values())).cpu(), row_labels=[fill(name, LABEL_WIDTH) for name in rows]).savefig(
        output_dir / "rivals.png", dpi=120
    )

    x = shown[:SHOWN]
    z = ours.encode(x)
    neighbours, cosines = nearest_training_images(ours, z, images.training, device)
    table = torch.cat([x[:, None], ours.decode(z)[:, None], neighbours], dim=1)
    names = ["image", "reconstruction", *(f"nearest {index + 1}" for index in range(cosines.shape[1]))]
    captions = [["", "", *(f"cos {cosine:.2f}" for cosine in row)] for row in cosines.tolist()]
    image_table(
        table.cpu(), row_labels=[str(index) for index in range(len(x))], column_labels=names, image_labels=captions
    ).savefig(output_dir / "neighbours.png", dpi=120)

    x = images.test[:MAPPED].to(device)
    z = ours.encode(x)
    zh = ours.encode(ours.decode(z))
    labels, classes = None, None
    if images.probed is not None:
        labels, classes = images.probed.labels[:MAPPED], list(map(str, images.probed.classes))
    figure = correlation_map(z.cpu(), labels, zh.cpu(), classes)
    figure.savefig(output_dir / "correlations.png", dpi=120)


def nearest_training_images(
    ours: Autoencoder, z: Tensor, training: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For latents (n, d), the training images (m, 3, s, s), uint8, with the nearest latents, and their cosines (n, k).

    The images are (n, k, 3, s, s), pixels in [-1, 1]; k is `NEIGHBOURS`, or m if that is smaller.
    """
    latents = torch.cat([ours.encode(to_pixel_values(batch, device)) for batch in training.split(BATCH_SIZE)])
    cosines, nearest = (z @ latents.T).topk(min(NEIGHBOURS, len(latents)), dim=1)
    return to_pixel_values(training[nearest.flatten().cpu()], device).unflatten(0, nearest.shape), cosines


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """A line for each figure, a column for each autoencoder."""
    figures = list(dict.fromkeys(key for column in results.values() for key in column if "spectrum" not in key))
    print("| " + " | ".join(["", *results]) + " |")
    print("| --- " * (len(results) + 1) + "|")
    for key in figures:
        cells = [f"{column[key]:.4g}" if key in column else "" for column in results.values()]
        print("| " + " | ".join([key, *cells]) + " |")


def launch(arguments: list[str] | None = None) -> None:
    """The program: reads its flags, and tells an error in one line."""
    with one_line_errors():
        parser = SettingsParser(EvaluationSettings, description="Measures a model on held-out images.")
        main(EvaluationSettings(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    launch()
