"""The denoiser beside total variation and non-local means: on CIFAR-10's test images and on the 68 of CBSD68.

    python benchmarks/denoising.py --denoiser checkpoints/ctrl-csc-denoiser --dataset uoft-cs/cifar10 --num_images 200
    python benchmarks/denoising.py --denoiser checkpoints/ctrl-csc-denoiser --dataset FOLDER

The folder holds Berkeley's photographs as the splits train and test. Noise of 15, 25 and 50 of 255 with fixed seeds,
not clipped, as denoisers' figures are published; what is restored is clipped. PSNR in dB is the mean over images.
scikit-image's methods, which are told the noise level, get the setting of the highest PSNR on training images.
Published on CBSD68: CBM3D 33.5, 30.7 and 27.4, CDnCNN 33.9, 31.2 and 28.0.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torch import Tensor

from ctrl_csc_hf import CtrlCscDenoiser
from ctrl_csc_hf.latents.encoding import draw_images
from ctrl_csc_hf.models.restoration import psnr
from ctrl_csc_hf.training.data import ImageSource, as_rgb, load_images

LEVELS = (15, 25, 50)  # of 255
TUNING_IMAGES, TUNING_SIDE = 12, 128  # of photographs, their middles

Restorer = Callable[[Tensor], Tensor]


def read(dataset: str, split: str, count: int | None) -> list[Tensor]:
    """(1, 3, H, W), pixels in [-1, 1], of each image in its own size: all in their order, or a uniform sample."""
    rows = load_images(ImageSource(dataset_name=dataset, split=split, label_column="none", streaming=True))
    images = [np.array(as_rgb(image)) for image in draw_images(rows, count)[0]]
    return [torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in images]


def with_noise(images: Sequence[Tensor], level: int) -> list[Tensor]:
    """The same noise as in its training."""
    noisy = []
    for index, image in enumerate(images):
        generator = torch.Generator().manual_seed(1000 * level + index)
        noisy.append(image + torch.randn(image.shape, generator=generator) * (level / 127.5))
    return noisy


def each(function: Callable[[np.ndarray], np.ndarray], images: Tensor) -> Tensor:
    """scikit-image's functions, which take one image (H, W, 3)."""
    restored = np.stack([function(image) for image in images.permute(0, 2, 3, 1).numpy()])
    return torch.from_numpy(restored).permute(0, 3, 1, 2).float()


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


def score(restorer: Restorer, noisy: Sequence[Tensor], clean: Sequence[Tensor]) -> float:
    return sum(psnr(restorer(y), x).item() for y, x in zip(noisy, clean, strict=True)) / len(clean)


def measure(denoiser: CtrlCscDenoiser, dataset: str, count: int | None, tuning: list[Tensor], title: str) -> None:
    """Prints a table of a test split."""
    clean = read(dataset, "test", count)
    rows: dict[str, list[float]] = {}
    for level in LEVELS:
        noise_std = level / 127.5
        tuning_noisy, noisy = with_noise(tuning, level), with_noise(clean, level)
        rows.setdefault("noisy image", []).append(score(lambda y: y, noisy, clean))
        start = time.process_time()
        found = score(lambda y, noise_std=noise_std: denoiser.denoise(y, noise_std), noisy, clean)
        seconds = (time.process_time() - start) / len(clean)
        rows.setdefault("`CtrlCscDenoiser`", []).append(found)
        print(f"{title}, {level}: {found:.2f} dB, {seconds:.2f} s of processor time an image", flush=True)
        for name, candidates in (
            ("total variation", total_variation(noise_std)),
            ("non-local means", non_local_means(noise_std)),
        ):
            setting = max(candidates, key=lambda setting: score(candidates[setting], tuning_noisy, tuning))
            rows.setdefault(name, []).append(score(candidates[setting], noisy, clean))
            print(f"{title}, {level}: {name} {rows[name][-1]:.2f} dB by {setting}", flush=True)
    print_table(f"{title}, {len(clean)} images", rows, [f"{level}/255" for level in LEVELS])


def print_table(title: str, rows: dict[str, list[float]], head: Iterable[object]) -> None:
    head = list(head)
    print(f"\n| {title} | {' | '.join(map(str, head))} |\n|{' --- |' * (len(head) + 1)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")


def middle(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    top, left = max(0, (height - TUNING_SIDE) // 2), max(0, (width - TUNING_SIDE) // 2)
    return image[..., top : top + TUNING_SIDE, left : left + TUNING_SIDE]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", required=True, help="a folder or a Hub repository of a CtrlCscDenoiser")
    parser.add_argument("--dataset", nargs="+", required=True, help="Hub ids or folders with the splits train and test")
    parser.add_argument("--num_images", type=int, help="of each test split; by default all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    denoiser = CtrlCscDenoiser.from_pretrained(options.denoiser).eval()
    for dataset in options.dataset:
        tuning = [middle(image) for image in read(dataset, "train", TUNING_IMAGES)]
        measure(denoiser, dataset, options.num_images, tuning, Path(dataset).name)


if __name__ == "__main__":
    main()
