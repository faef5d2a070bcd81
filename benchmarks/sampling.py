"""Samples, nearest subspaces and retrieval of a model, measured and drawn.

`python benchmarks/sampling.py --model PATH --dataset_name uoft-cs/cifar10 --feature_model PATH`

Fréchet distances are between the first `num_images` test images and as many others, in a vision model's pooled
features, as in training/evaluate.py. Writes sampling.json and the pictures into `output_dir`, and the encoded splits
into `cache_dir`, from where another run takes them.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, HfArgumentParser

from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel, CtrlCscPipeline
from ctrl_csc_hf.inspection.neighbours import nearest_images, neighbours_figure
from ctrl_csc_hf.latents.encoding import EncodedBatch, encode_dataset, find_data
from ctrl_csc_hf.latents.fitting import fit_sampler
from ctrl_csc_hf.latents.segmentation import coding_length, k_means, segment
from ctrl_csc_hf.latents.subspace import ClassMoments, NearestSubspace
from ctrl_csc_hf.metrics import FeatureMoments, frechet_distance
from ctrl_csc_hf.models.sampling import LatentSampler

BATCH_SIZE = 250
SHOWN = 10  # images a row
SUBSPACE_RANKS = (1, 5, 10, 20, 30, 50, 100, 200, 300)
SAMPLER_RANKS = (10, 30, 50, 200, 400)
K_MEANS_GROUPS = (10, 30, 128)


@dataclass
class Settings:
    model: str = field(metadata={"help": "A folder that train.py wrote, or a Hub repository."})
    dataset_name: str = field(metadata={"help": "A labelled data set with the splits train and test."})
    feature_model: str = field(metadata={"help": "A vision model for the Fréchet distance."})
    class_names: str = field(default="", metadata={"help": "Separated by commas, for the pictures."})
    num_images: int = field(default=5000, metadata={"help": "Of each Fréchet distance."})
    feature_size: int = field(default=64, metadata={"help": "Side that images are resized to for the feature model."})
    output_dir: str = "sampling"
    cache_dir: str = "sampling"


@torch.inference_mode()
def main(settings: Settings) -> None:
    model = CtrlCscModel.from_pretrained(settings.model).eval()
    processor = CtrlCscImageProcessor.from_pretrained(settings.model)
    train, test = (encoded(settings, split, model, processor) for split in ("train", "test"))
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    names = settings.class_names.split(",") if settings.class_names else None

    results: dict[str, Any] = {"settings": asdict(settings)}
    samplers = {}
    for kind, labelled in (("classes", True), ("groups", False)):
        start = time.process_time()
        samplers[kind] = fit_sampler(batches(train, labelled))
        samplers[kind].save_pretrained(output / kind)
        results[f"sampler of {kind}"] = {
            "processor seconds": time.process_time() - start,
            "components": len(samplers[kind].ranks),
            "ranks": samplers[kind].ranks,
            "megabytes": (output / kind / "model.safetensors").stat().st_size / 1e6,
        }
    start = time.process_time()
    groups = segment(train["latents"])
    results["groups in all training latents"] = {
        "processor seconds": time.process_time() - start,
        "sizes": groups.bincount().tolist(),
    }
    results["coding length of 10,000 latents, nats"] = coding_lengths(
        train["latents"][:10_000], train["labels"][:10_000]
    )
    results["planted subspaces"] = planted()
    results["Fréchet distance"] = frechet_distances(settings, model, samplers, train, test)
    results["nearest training image"] = copies(model, samplers["classes"], train, test, settings.num_images)
    results["accuracy"] = accuracies(train, test)
    results["share of the 10 nearest training images in the query's class"] = precision(train, test)
    (output / "sampling.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2, ensure_ascii=False))

    pipe = CtrlCscPipeline(model, processor)
    draw_components(pipe, samplers["classes"], names, output / "sampling_classes.png")
    draw_components(pipe, samplers["groups"], None, output / "sampling_groups.png")
    draw_interpolation(pipe, test, output / "sampling_interpolation.png")
    draw_neighbours(model, samplers["classes"], train, output / "sampling_neighbours.png")
    draw_retrieval(train, test, names, output / "sampling_retrieval.png")


def encoded(settings: Settings, split: str, model: CtrlCscModel, processor: CtrlCscImageProcessor) -> dict[str, Tensor]:
    """Of a split, in random order: pixels (n, 3, H, W), uint8, latents (n, d) and labels (n,)."""
    path = Path(settings.cache_dir) / f"{split}.safetensors"
    if not path.exists():
        dataset = datasets.load_dataset(**find_data(settings.dataset_name), split=split, streaming=True)
        parts = list(encode_dataset(dataset, model, processor, label_column=None, batch_size=BATCH_SIZE))
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "pixels": torch.cat([((part.pixel_values + 1) * 127.5).round().byte() for part in parts]),
            "latents": torch.cat([part.latents for part in parts]),
            "labels": torch.cat([part.labels for part in parts]),
        }
        order = torch.randperm(len(tensors["labels"]), generator=torch.Generator().manual_seed(0))
        save_file({name: tensor[order] for name, tensor in tensors.items()}, path)
    return load_file(path)


def to_pixel_values(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def batches(split: dict[str, Tensor], labelled: bool) -> list[EncodedBatch]:
    parts = zip(*(split[name].split(BATCH_SIZE) for name in ("latents", "labels")), strict=True)
    return [EncodedBatch(torch.empty(0), latents, labels if labelled else None) for latents, labels in parts]


def decode(model: CtrlCscModel, latents: Tensor) -> Tensor:
    return torch.cat([model.decode(part).reconstruction for part in latents.split(BATCH_SIZE)])


def feature_moments(settings: Settings) -> Callable[[Tensor], FeatureMoments]:
    """Of images (n, 3, H, W), pixels in [-1, 1]."""
    vision_model = AutoModel.from_pretrained(settings.feature_model).eval()
    size = (settings.feature_size, settings.feature_size)

    def moments(pixels: Tensor) -> FeatureMoments:
        features = [
            vision_model(F.interpolate(part, size=size, mode="bilinear", align_corners=False)).pooler_output.flatten(1)
            for part in pixels.split(BATCH_SIZE)
        ]
        total = FeatureMoments(features[0].shape[1])
        total.update(torch.cat(features))
        return total

    return moments


def coding_lengths(latents: Tensor, labels: Tensor) -> dict[str, float]:
    """Of all latents as one group and, with what tells whose each is, of the classes."""
    found = {}
    for name, groups in (("one group", torch.zeros_like(labels)), ("classes", labels)):
        moments = ClassMoments()
        moments.update(latents, groups)
        counts = moments.counts.double()
        covariances = torch.stack(list(moments.covariances())) * ((counts - 1) / counts)[:, None, None]
        lengths = coding_length(counts, moments.means, covariances) + counts * (len(latents) / counts).log()
        found[name] = lengths.sum().item()
    return found


def planted(num_subspaces: int = 10, rank: int = 40, dim: int = 512, count: int = 10_000) -> dict[str, Any]:
    """What `segment` finds in latents of random subspaces, with noise, and how many are with most of their own."""
    generator = seed()
    truth = torch.randint(num_subspaces, (count,), generator=generator)
    bases = torch.linalg.qr(torch.randn(num_subspaces, dim, rank, generator=generator))[0]
    latents = (bases[truth] @ torch.randn(count, rank, 1, generator=generator))[:, :, 0]
    latents += 0.3 * (rank / dim) ** 0.5 * torch.randn(count, dim, generator=generator)
    start = time.process_time()
    groups = segment(F.normalize(latents, dim=1))
    seconds = time.process_time() - start
    hits = sum(int(truth[groups == group].bincount().max()) for group in range(int(groups.max()) + 1))
    return {"groups": int(groups.max()) + 1, "share with their own": hits / count, "processor seconds": seconds}


def frechet_distances(
    settings: Settings,
    model: CtrlCscModel,
    samplers: dict[str, LatentSampler],
    train: dict[str, Tensor],
    test: dict[str, Tensor],
) -> dict[str, float]:
    count, moments = settings.num_images, feature_moments(settings)
    reference = moments(to_pixel_values(test["pixels"][:count]))
    others = {
        "reconstructions of these test images": test["latents"][:count],
        "reconstructions of training images": train["latents"][:count],
        **{f"samples of {kind}": sampler.sample(count, generator=seed()) for kind, sampler in samplers.items()},
    }
    of_class = ClassMoments()
    of_class.update(train["latents"], train["labels"])
    eigen = [torch.linalg.eigh(covariance) for covariance in of_class.covariances()]
    for rank in SAMPLER_RANKS:
        factors = [
            (vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()).mT.flip(0).contiguous()
            for values, vectors in eigen
        ]
        fixed = LatentSampler(samplers["classes"].weights, of_class.means, factors)
        others[f"samples of classes, rank {rank}"] = fixed.sample(count, generator=seed())
    for num_groups in K_MEANS_GROUPS:
        of_group = ClassMoments()
        of_group.update(train["latents"], k_means(train["latents"], num_groups, seed=0))
        sampler = LatentSampler.of_gaussians(of_group.counts, of_group.means, of_group.covariances())
        others[f"samples of {num_groups} groups by k-means"] = sampler.sample(count, generator=seed())
    noise = torch.randn(count, model.config.latent_dim, generator=seed())
    others["points spread evenly over the sphere"] = F.normalize(noise, dim=1)
    distances = {"training images": frechet_distance(reference, moments(to_pixel_values(train["pixels"][:count])))}
    for name, latents in others.items():
        distances[name] = frechet_distance(reference, moments(decode(model, latents)))
    return distances


def copies(
    model: CtrlCscModel, sampler: LatentSampler, train: dict[str, Tensor], test: dict[str, Tensor], count: int
) -> dict[str, dict[str, float]]:
    """How near the nearest training image is, to samples and to test images that nobody copied; medians and extremes.

    By pixels, what is compared with the training images is a decoded image in both cases.
    """
    found = {}
    for name, latents in (
        ("samples", sampler.sample(count, generator=seed())),
        ("test images", test["latents"][:count]),
    ):
        nearest = nearest_images(decode(model, latents), latents, with_pixels(train))
        found[name] = {
            "median cosine": nearest.cosines.median().item(),
            "largest cosine": nearest.cosines.max().item(),
            "median RMS difference of pixels": nearest.pixel_distances.median().item(),
            "smallest RMS difference of pixels": nearest.pixel_distances.min().item(),
        }
    return found


def with_pixels(split: dict[str, Tensor]) -> Iterator[EncodedBatch]:
    parts = zip(split["pixels"].split(BATCH_SIZE), split["latents"].split(BATCH_SIZE), strict=True)
    return (EncodedBatch(to_pixel_values(pixels), latents) for pixels, latents in parts)


def accuracies(train: dict[str, Tensor], test: dict[str, Tensor]) -> dict[str, float]:
    """Of the nearest subspace, fitted on the training latents, on the test latents."""
    ranks = {f"rank {rank}": rank for rank in SUBSPACE_RANKS} | {"default": None}
    found = {}
    for name, rank in ranks.items():
        classifier = NearestSubspace(rank).fit(train["latents"], train["labels"])
        found[name] = (classifier.predict(test["latents"]) == test["labels"]).float().mean().item()
    return found


def precision(train: dict[str, Tensor], test: dict[str, Tensor]) -> float:
    rows = nearest_rows(train["latents"], test["latents"][:1000], 10)
    return (train["labels"][rows] == test["labels"][:1000, None]).float().mean().item()


def nearest_rows(latents: Tensor, queries: Tensor, k: int) -> Tensor:
    """As `ctrl_csc_hf.latents.retrieval` finds them, whose index would encode the data set once more."""
    return (queries @ latents.T).topk(k).indices


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- pictures


def grid(images: Tensor, titles: list[str] | None = None, headings: list[str] | None = None) -> Figure:
    """Rows of images (rows, columns, 3, H, W) in [0, 1], with a title to the left of each and headings above."""
    rows, columns = images.shape[:2]
    figure = Figure(figsize=(0.75 * columns + (1.1 if titles else 0), 0.75 * rows + (0.25 if headings else 0)))
    cells = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for row, axes_row in enumerate(cells):
        for column, axes in enumerate(axes_row):
            axes.imshow(images[row, column].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if headings and row == 0:
                axes.set_title(headings[column], fontsize=8)
        if titles:
            axes_row[0].set_ylabel(titles[row], rotation=0, ha="right", va="center", fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=90, bbox_inches="tight")
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(path, optimize=True)


def draw_components(pipe: CtrlCscPipeline, sampler: LatentSampler, names: list[str] | None, path: Path) -> None:
    """A row of samples of each component, or of the first ten."""
    pipe.sampler = sampler
    components = range(min(len(sampler.ranks), 10))
    rows = [pipe.sample(SHOWN, component=index, generator=seed(), output_type="pt") for index in components]
    save(grid(torch.stack(rows), [names[index] if names else f"component {index}" for index in components]), path)


def draw_interpolation(pipe: CtrlCscPipeline, test: dict[str, Tensor], path: Path) -> None:
    """Between the first test images, two by two, the photographs at both ends."""
    rows = []
    for first, second in test["pixels"][:8].unflatten(0, (4, 2)):
        frames = pipe.interpolate(to_image(first), to_image(second), num_steps=SHOWN - 2, output_type="pt")
        rows.append(torch.cat([first[None] / 255, frames, second[None] / 255]))
    save(grid(torch.stack(rows), None, ["photograph", "g(f(x))", *[""] * (SHOWN - 4), "g(f(x))", "photograph"]), path)


def draw_neighbours(model: CtrlCscModel, sampler: LatentSampler, train: dict[str, Tensor], path: Path) -> None:
    latents = sampler.sample(SHOWN, generator=seed())
    samples = decode(model, latents)
    save(neighbours_figure(samples, nearest_images(samples, latents, with_pixels(train))), path)


def draw_retrieval(train: dict[str, Tensor], test: dict[str, Tensor], names: list[str] | None, path: Path) -> None:
    rows = nearest_rows(train["latents"], test["latents"][:6], SHOWN - 1)
    shown = torch.cat([test["pixels"][:6, None], train["pixels"][rows]], dim=1).float() / 255
    labels = test["labels"][:6].tolist()
    titles = [names[label] if names else f"label {label}" for label in labels]
    save(grid(shown, titles, ["query", *(f"{place}." for place in range(1, SHOWN))]), path)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
