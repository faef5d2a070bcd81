"""Denoising and completion measured, and their pictures.

    python benchmarks/restoration.py --model MODEL --dataset_name uoft-cs/cifar10

Some images of the test split calibrate: every method's parameters are those of the highest PSNR there, for each
noise level. Others are measured. Everything of ours that has a public call is measured through it.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic
from torch import Tensor
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscDenoiser, CtrlCscImageProcessor, CtrlCscModel, CtrlCscPipeline
from ctrl_csc_hf.latents.encoding import find_columns
from ctrl_csc_hf.models.restoration import (
    DENOISING_ITERATIONS,
    NOISE_LEVELS,
    denoise,
    denoising_sparsity,
    explain,
    psnr,
)
from ctrl_csc_hf.training import baselines  # noqa: F401  # registers its models for AutoModel
from ctrl_csc_hf.training.data import ImageSource, load_images, take_images

CALIBRATION_IMAGES = 64
SHOWN_LEVEL, SHOWN_IMAGES = 0.2, 8
SCORE_LEVELS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
WHITE = 1.0

Restorer = Callable[[Tensor], Tensor]


def each(function: Callable[[np.ndarray], np.ndarray], images: Tensor) -> Tensor:
    """scikit-image's functions, which take one image (H, W, 3)."""
    restored = np.stack([function(image) for image in images.permute(0, 2, 3, 1).numpy()])
    return torch.from_numpy(restored).permute(0, 3, 1, 2).float()


def mean_psnr(images: Tensor, clean: Tensor, where: Tensor | None = None) -> float:
    return psnr(images, clean, where).mean().item()


def best(candidates: dict[str, Restorer], noisy: Tensor, clean: Tensor) -> tuple[str, Restorer]:
    """The candidate of the highest PSNR, with its name."""
    name = max(candidates, key=lambda name: mean_psnr(candidates[name](noisy), clean))
    return name, candidates[name]


def total_variation(noise_std: float) -> dict[str, Restorer]:
    def restorer(weight: float) -> Restorer:
        return lambda noisy: each(lambda y: denoise_tv_chambolle(y, weight=weight, channel_axis=-1), noisy)

    return {f"weight {factor} sigma": restorer(factor * noise_std) for factor in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)}


def non_local_means(noise_std: float) -> dict[str, Restorer]:
    def restorer(patch: int, distance: int, h: float) -> Restorer:
        options = {"patch_size": patch, "patch_distance": distance, "h": h, "sigma": noise_std, "channel_axis": -1}
        return lambda noisy: each(lambda y: denoise_nl_means(y, **options), noisy)

    return {
        f"patch {patch}, distance {distance}, h {factor} sigma": restorer(patch, distance, factor * noise_std)
        for patch, distance in ((3, 8), (5, 6))
        for factor in (0.4, 0.5, 0.6, 0.8, 1.0)
    }


@torch.no_grad()
def with_sparsity(model: CtrlCscModel, noisy: Tensor, sparsities: Iterable[float]) -> Tensor:
    """The plain loop of a copy of the model whose stages have these lambdas."""
    other = copy.deepcopy(model)
    for stage, sparsity in zip(other.encoder.stages, sparsities, strict=True):
        stage.sparsity = sparsity
    return other(noisy).reconstruction


@torch.no_grad()
def stages_alone(model: CtrlCscModel, noisy: Tensor, sparsities: Sequence[float]) -> Tensor:
    """The first stages' codes of the image, synthesised by the same stages: no latents, no decoder."""
    encoder, signal, sizes = model.encoder, noisy, []
    for stage, norm, sparsity in zip(encoder.stages, encoder.norms, sparsities, strict=False):
        sizes.append(signal.shape[-2:])
        signal = norm(stage.solve(signal, sparsity=sparsity, num_iterations=DENOISING_ITERATIONS), False)
    for stage, norm, size in reversed(list(zip(encoder.stages, encoder.norms, sizes, strict=False))):
        scale = (norm.running_var + norm.eps).sqrt() / norm.weight
        carried = (signal - norm.bias[:, None, None]) * scale[:, None, None] + norm.running_mean[:, None, None]
        signal = stage.synthesize(torch.relu(carried), size)
    return signal


def other_lambdas(model: CtrlCscModel) -> dict[str, dict[str, Restorer]]:
    """What else a lambda can do, by name: candidates by the multiple of the model's own."""
    own, count = model.config.sparsity, len(model.encoder.stages)
    factors = (1, 1.5, 2.5, 4, 6, 10, 15)

    def first(s: float) -> Restorer:
        return lambda y: with_sparsity(model, y, [s, *[own] * (count - 1)])

    def all_stages(s: float) -> Restorer:
        return lambda y: with_sparsity(model, y, [s] * count)

    def one_stage(s: float) -> Restorer:
        return lambda y: stages_alone(model, y, [s])

    def two_stages(s: float) -> Restorer:
        return lambda y: stages_alone(model, y, [own, s])

    return {
        "loop, lambda of the first stage": {f"{own * f:.3g}": first(own * f) for f in factors},
        "loop, lambda of all stages": {f"{own * f:.3g}": all_stages(own * f) for f in factors},
        "A(z) of the first stage": {f"{own * f:.3g}": one_stage(own * f) for f in (0.05, 0.1, 0.25, 0.5, *factors)},
        "two stages, lambda of the second": {
            f"{own * f:.3g}": two_stages(own * f) for f in (0.05, 0.25, 1, 5, 15, 50, 100)
        },
    }


class Ours:
    """The pipeline's calls on tensors in [-1, 1]."""

    def __init__(self, model: CtrlCscModel) -> None:
        self.pipe = CtrlCscPipeline(model, CtrlCscImageProcessor(image_size=model.config.image_size))
        self.pipe.set_progress_bar_config(disable=True)

    def calibrate(self, clean: Tensor) -> list[list[float]]:
        return self.pipe.calibrate_denoising(clean / 2 + 0.5)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.pipe(images / 2 + 0.5, output_type="pt").images * 2 - 1

    def denoise(self, noisy: Tensor, noise_std: float) -> Tensor:
        return self.pipe.denoise(noisy / 2 + 0.5, noise_std, output_type="pt") * 2 - 1

    def inpaint(self, images: Tensor, missing: Tensor, keep_known: bool = False) -> Tensor:
        return self.pipe.inpaint(images / 2 + 0.5, missing, keep_known, output_type="pt") * 2 - 1


def print_table(title: str, rows: dict[str, list[float]], head: Iterable[object]) -> None:
    head = list(head)
    print(f"\n| {title} | {' | '.join(map(str, head))} |\n|{' --- |' * (len(head) + 1)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")


def denoising(ours: Ours, baseline: CtrlCscModel | None, held_out: Tensor, clean: Tensor, folder: Path) -> None:
    """Prints PSNR at every noise level, draws curves and examples."""
    model = ours.pipe.model
    print("denoising_sparsity:", [[level, round(s, 6)] for level, s in ours.calibrate(held_out)])
    rows: dict[str, list[float]] = {}
    alternatives: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(1)
    for level in NOISE_LEVELS:
        noise = torch.randn(held_out.shape, generator=generator), torch.randn(clean.shape, generator=generator)
        tuning, noisy = ((x + level * n).clamp(-1, 1) for x, n in zip((held_out, clean), noise, strict=True))
        variation_name, variation = best(total_variation(level), tuning, held_out)
        means_name, means = best(non_local_means(level), tuning, held_out)
        print(f"sigma {level}: total variation {variation_name}; non-local means {means_name}")
        results = {
            "noisy image": noisy,
            "plain reconstruction": ours.reconstruct(noisy),
            "`pipe.denoise`": ours.denoise(noisy, level),
            "total variation": variation(noisy),
            "non-local means": means(noisy),
        }
        if baseline is not None:
            with torch.no_grad():
                results["ordinary convolutions"] = baseline(noisy).reconstruction
        for name, images in results.items():
            rows.setdefault(name, []).append(mean_psnr(images, clean))
        for name, candidates in other_lambdas(model).items():
            sparsity, restorer = best(candidates, tuning, held_out)
            print(f"sigma {level}: {name} {sparsity}")
            alternatives.setdefault(name, []).append(mean_psnr(restorer(noisy), clean))
        if level == SHOWN_LEVEL:
            shown = [("photograph", clean), *results.items()]
            save_in_few_colors(examples(shown), folder / "denoising_examples.png")
    print_table("noise level", rows, NOISE_LEVELS)
    print_table("noise level", alternatives, NOISE_LEVELS)

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = {"noisy image": "k:", "plain reconstruction": "C0--", "`pipe.denoise`": "C0-", "total variation": "C1-"}
    for name, values in rows.items():
        style = styles.get(name, "C2-" if name == "non-local means" else "C3--")
        axes.plot(NOISE_LEVELS, values, style, marker="o", markersize=4, label=name.strip("`"))
    axes.set(
        xlabel="standard deviation of the noise, pixels in [-1, 1]",
        ylabel="mean PSNR, dB",
        title=f"Denoising {len(clean)} test images",
        xticks=NOISE_LEVELS,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(folder / "denoising.png", dpi=110)


@torch.no_grad()
def scores(ours: Ours, held_out: Tensor, clean: Tensor, folder: Path) -> None:
    """Prints and draws what the residual xh(y) - y has in common with x - y. Noise is not clipped here."""
    model = ours.pipe.model
    rows: dict[str, list[float]] = {}
    lengths: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(2)
    for level in SCORE_LEVELS:
        tuning, noisy = (x + level * torch.randn(x.shape, generator=generator) for x in (held_out, clean))
        estimates = {
            "plain reconstruction, xh(y) - y": model(noisy).reconstruction,
            "pipe.denoise, xh(y) + A(z) - y": denoise(model, noisy, denoising_sparsity(model.config, level)),
            "total variation": best(total_variation(level), tuning, held_out)[1](noisy),
        }
        true = (clean - noisy).flatten(1)
        for name, estimate in estimates.items():
            residual = (estimate - noisy).flatten(1)
            rows.setdefault(name, []).append(torch.cosine_similarity(residual, true).mean().item())
            lengths.setdefault(name, []).append((residual.norm(dim=1) / true.norm(dim=1)).mean().item())
    print_table("cosine to x - y at noise level", rows, SCORE_LEVELS)
    print_table("length, x - y having 1", lengths, SCORE_LEVELS)

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, values, label in zip(
        figure.subplots(1, 2),
        (rows, lengths),
        ("cosine to the true direction x - y", "length as a multiple of |x - y|"),
        strict=True,
    ):
        for (name, line), style in zip(values.items(), ("C0--", "C0-", "C1-"), strict=True):
            axes.plot(SCORE_LEVELS, line, style, marker="o", markersize=4, label=name)
        axes.set(xlabel="standard deviation of the noise, pixels in [-1, 1]", ylabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(0, 1.02)
    figure.axes[1].set_yscale("log")
    figure.axes[1].set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
    figure.axes[1].minorticks_off()
    figure.axes[1].axhline(1, color="k", linewidth=0.8)
    figure.axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle("Residual of a restored image against the direction back to the photograph")
    figure.savefig(folder / "score.png", dpi=110)


def masks(count: int, size: int) -> dict[str, Tensor]:
    """(count, 1, size, size), True where missing."""
    generator = torch.Generator().manual_seed(3)
    missing = {
        f"{share:.0%} of pixels": torch.rand(count, 1, size, size, generator=generator) < share
        for share in (0.25, 0.5, 0.75)
    }
    for side in (size * 5 // 16, size // 2):
        block, start = torch.zeros(count, 1, size, size, dtype=torch.bool), (size - side) // 2
        block[:, :, start : start + side, start : start + side] = True
        missing[f"block of {side} x {side}"] = block
    return missing


@torch.no_grad()
def other_completions(model: CtrlCscModel, filled: Tensor, missing: Tensor) -> dict[str, Tensor]:
    """What else completion can be: `filled` has the known pixels' mean where missing."""
    encoder, (stage, *stages), known = model.encoder, model.encoder.stages, ~missing
    signal = encoder.norms[0](stage.solve(filled, known=known), False)
    for deeper, norm in zip(stages, encoder.norms[1:], strict=True):
        signal = norm(deeper.encode(signal), False)
    mean = filled.where(missing, 0).sum(dim=(2, 3), keepdim=True) / missing.sum(dim=(2, 3), keepdim=True)
    once = explain(stage, filled, mean.expand_as(filled), known=known, num_iterations=8).where(missing, filled)
    refilled = model(filled).reconstruction.where(missing, filled)
    return {
        "codes of the known pixels, through the loop": model.decode(
            torch.nn.functional.normalize(encoder.last_stage.adjoint(signal).flatten(1))
        ).reconstruction,
        "mean fill, through the loop": model(filled).reconstruction,
        "mean fill, through the loop twice": model(refilled).reconstruction,
        "mean + A(z) of the known pixels": once,
        "the same, through the loop": model(once).reconstruction,
    }


def completion(ours: Ours, denoiser: CtrlCscDenoiser | None, clean: Tensor, folder: Path) -> None:
    """Prints PSNR on the missing pixels, and draws examples."""
    rows: dict[str, list[float]] = {}
    pictures = [("photograph", clean)]
    missing_by_name = masks(len(clean), clean.shape[-1])
    for name, missing in missing_by_name.items():
        mean = clean.where(~missing, 0).sum(dim=(2, 3), keepdim=True) / (~missing).sum(dim=(2, 3), keepdim=True)
        filled = mean.expand_as(clean).where(missing, clean)
        pairs = zip(filled.permute(0, 2, 3, 1).numpy(), missing[:, 0].numpy(), strict=True)
        biharmonic = np.stack([inpaint_biharmonic(image, mask, channel_axis=-1) for image, mask in pairs])
        results = {
            "mean fill": filled,
            "biharmonic": torch.from_numpy(biharmonic).permute(0, 3, 1, 2).float(),
            "`pipe.inpaint`": ours.inpaint(filled, missing),
            **({} if denoiser is None else {"`pipe.inpaint` with a denoiser": denoiser.inpaint(filled, missing)}),
            "(plain reconstruction of the whole image)": ours.reconstruct(clean),
            **other_completions(ours.pipe.model, filled, missing),
        }
        for method, images in results.items():
            rows.setdefault(method, []).append(mean_psnr(images, clean, missing))
        if name in ("50% of pixels", list(missing_by_name)[-1]):
            pictures += [
                (f"{name}\nmissing", filled.where(~missing, WHITE)),
                ("biharmonic", results["biharmonic"]),
                ("pipe.inpaint", results["`pipe.inpaint`"]),
                ("keep_known=True", ours.inpaint(filled, missing, keep_known=True)),
            ]
    print_table("PSNR on missing pixels", rows, missing_by_name)
    save_in_few_colors(examples(pictures), folder / "completion_examples.png")


def examples(rows: Sequence[tuple[str, Tensor]]) -> Figure:
    """The first images of each (n, 3, H, W), in rows with their names."""
    count = min(SHOWN_IMAGES, len(rows[0][1]))
    figure = Figure(figsize=(1.7 + count, len(rows) * 1.02), layout="constrained")
    for line, (name, images) in zip(figure.subplots(len(rows), count, squeeze=False), rows, strict=True):
        for axes, image in zip(line, images[:count], strict=True):
            axes.imshow((image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name.strip("`"), rotation=0, ha="right", va="center")
    return figure


def save_in_few_colors(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=85)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def timings(ours: Ours, images: Tensor) -> None:
    images = images[:64]
    missing = masks(len(images), images.shape[-1])["50% of pixels"]
    for name, call in (
        ("denoise", lambda: ours.denoise(images, 0.2)),
        ("inpaint", lambda: ours.inpaint(images, missing)),
    ):
        start = time.process_time()
        call()
        print(f"{name}, {len(images)} images: {time.process_time() - start:.2f} s of processor time")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that train.py wrote, or a Hub repository")
    parser.add_argument("--baseline", help="a model of ordinary convolutions that train.py wrote; compared where given")
    parser.add_argument("--denoiser", help="a CtrlCscDenoiser, as which completion is measured, too, where given")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("restoration"))
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    model = CtrlCscModel.from_pretrained(options.model).eval()
    baseline = None if options.baseline is None else AutoModel.from_pretrained(options.baseline).eval()
    denoiser = None if options.denoiser is None else CtrlCscDenoiser.from_pretrained(options.denoiser).eval()
    source = ImageSource(dataset_name=options.dataset_name, split=options.split, label_column="none", streaming=True)
    rows = load_images(source)
    image_column, _ = find_columns(rows.features)
    images = take_images(
        rows, CALIBRATION_IMAGES + options.num_images, image_column=image_column, image_size=model.config.image_size
    )
    if len(images) <= CALIBRATION_IMAGES:
        parser.error(f"dataset_name must have more than {CALIBRATION_IMAGES} images in the split, got {len(images)}")
    held_out, clean = images[:CALIBRATION_IMAGES], images[CALIBRATION_IMAGES:]
    options.output.mkdir(parents=True, exist_ok=True)
    ours = Ours(model)
    timings(ours, clean)
    denoising(ours, baseline, held_out, clean, options.output)
    scores(ours, held_out, clean, options.output)
    completion(ours, denoiser, clean, options.output)


if __name__ == "__main__":
    main()
