"""Trains the denoiser on BSD's 432 training photographs in a few minutes of a GPU, and measures it on the 68 of CBSD68.

    python -m ctrl_csc_hf.training.denoiser pack --dataset FOLDER --output runs/bsd.safetensors
    python -m ctrl_csc_hf.training.denoiser train --data runs/bsd.safetensors --output runs/denoiser --seconds 270

The second command needs neither datasets nor diffusers. It ends after `seconds` with
model.safetensors and config.json, which `CtrlCscDenoiser.from_pretrained` loads, and denoiser.json, the figures. On a
CPU it is for trying it out.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctrl_csc_hf.models.denoiser_ctrl_csc import CtrlCscDenoiser, CtrlCscDenoiserConfig
from ctrl_csc_hf.models.repository_ctrl_csc import remove_records

from .steps import Replay, make_adam, set_learning_rate

PIXEL_STD = 127.5  # of 255 levels, the unit of pixels in [-1, 1]
TRAINED_LEVELS = (5.0, 55.0)  # of 255
TEST_LEVELS = (15.0, 25.0, 50.0)
HELD_OUT = 12  # of the training photographs, on which the state to keep is chosen
WARMUP_SECONDS = 3.0
LARGEST_NORM = 0.05  # of a gradient, as CDLNet's
DROP = 1.0  # dB below the best held-out figure, at which training returns to that state
SLOWER = 0.7  # the learning rate from there
CHECKPOINTS_APART, FIRST_CHECK = 25.0, 8.0  # seconds
MEASUREMENT_SECONDS = 15.0
FIGURES = "denoiser.json"
BFLOAT16_SHARE = 0.85


def pack(dataset: str, output: Path, train_images: int | None, test_images: int | None) -> None:
    """Writes the photographs of a data set to one file: JPEG as it is, others as lossless WebP.

    Args:
        train_images, test_images: how many are drawn; None for all.

    Raises:
        ValueError: if there is no split train or test, or no image that can be read.
    """
    from ctrl_csc_hf.latents.encoding import draw_images, image_bytes, load_image, split_names

    from .data import ImageSource, as_rgb, load_images

    def read(encoded: Any) -> bytes:
        image = load_image(encoded)
        if image.format == "JPEG":
            return image_bytes(encoded)
        buffer = BytesIO()
        as_rgb(image).save(buffer, "WEBP", lossless=True, quality=80, method=4)
        return buffer.getvalue()

    found = split_names(dataset)
    if missing := {"train", "test"}.difference(found):
        raise ValueError(
            f"the data set must have the splits train and test, such as folders of these names, but {dataset} has "
            f"{', '.join(found)}, not {' and '.join(sorted(missing))}"
        )
    tensors = {}
    for split, count in (("train", train_images), ("test", test_images)):
        rows = load_images(ImageSource(dataset_name=dataset, split=split, label_column="none", streaming=True))
        files, _ = draw_images(rows, count, read=read)
        tensors[f"{split}.bytes"] = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
        tensors[f"{split}.sizes"] = torch.tensor([len(file) for file in files], dtype=torch.int32)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output)
    print(
        f"{output}: {[len(t) for n, t in tensors.items() if n.endswith('sizes')]} photographs, "
        f"{output.stat().st_size / 1e6:.1f} MB"
    )


def read_photographs(path: Path, split: str) -> list[Tensor]:
    """(3, H, W), uint8, each of its own size.

    Raises:
        ValueError: for a file that `pack` did not write.
    """
    try:
        with safe_open(path, "pt") as file:
            files = file.get_tensor(f"{split}.bytes").split(file.get_tensor(f"{split}.sizes").tolist())
        images = [Image.open(BytesIO(data.numpy().tobytes())).convert("RGB") for data in files]
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: of benchmarks/packed.py
        raise ValueError(f"--data must be a file that pack wrote, got {path}: {error}") from error
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]


class Crops:
    """Draws square crops of photographs that lie on the device, each flipped and transposed at random."""

    def __init__(self, photographs: list[Tensor], size: int, device: torch.device) -> None:
        wide = [p if p.shape[2] >= p.shape[1] else p.transpose(1, 2) for p in photographs]
        height, width = (min(p.shape[dim] for p in wide) for dim in (1, 2))
        if not 0 < size <= height:
            raise ValueError(f"--crop must be positive and at most {height}, a side of a photograph, got {size}")
        if any(p.shape[1:] != (height, width) for p in wide):
            print(f"of each photograph the first {height} x {width} pixels are used, as many as the smallest has")
        self.pixels = torch.stack([p[:, :height, :width] for p in wide]).to(device)
        self.size, self.device = size, device

    def draw(self, count: int) -> Tensor:
        """(count, 3, size, size), pixels in [-1, 1]."""
        height, width = self.pixels.shape[2:]
        chosen, top, left, flips = (
            torch.randint(high, (count, 1, 1), device=self.device)
            for high in (len(self.pixels), height - self.size + 1, width - self.size + 1, 8)
        )
        along = torch.arange(self.size, device=self.device)
        rows, columns = along.view(1, -1, 1), along.view(1, 1, -1)
        rows = torch.where(flips & 1 > 0, self.size - 1 - rows, rows)
        columns = torch.where(flips & 2 > 0, self.size - 1 - columns, columns)
        transposed = flips & 4 > 0
        rows, columns = torch.where(transposed, columns, rows), torch.where(transposed, rows, columns)
        crops = self.pixels[chosen, :, top + rows, left + columns]  # [count, size, size, 3]
        return crops.permute(0, 3, 1, 2).float().div_(PIXEL_STD).sub_(1)


class Step:
    """One step of Adam on crops and noise; all its values stay on the device."""

    def __init__(self, model: CtrlCscDenoiser, rate: float, bfloat16: bool) -> None:
        self.model, self.bfloat16 = model, bfloat16
        self.parameters = list(model.parameters())
        self.optimizer = make_adam(self.parameters, rate)

    def __call__(self, clean: Tensor, noise: Tensor, noise_std: Tensor) -> Tensor:
        noisy = clean + noise * noise_std[:, None, None, None]
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False):
            denoised = self.model(noisy, noise_std)
        # Divided by the noise level, errors of all levels weigh about the same.
        loss = ((denoised - clean).square().mean(dim=(1, 2, 3)) / noise_std).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [parameter.grad for parameter in self.parameters]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = (LARGEST_NORM / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:  # a gradient that is not finite makes no step
            gradient.copy_(torch.where(norm.isfinite(), gradient * scale, 0))
        self.optimizer.step()
        self.model.project_parameters()
        return loss.detach()


def to_pixels(photograph: Tensor, device: torch.device) -> Tensor:
    return photograph[None].to(device).float() / PIXEL_STD - 1


@torch.no_grad()
def measure(model: CtrlCscDenoiser, photographs: list[Tensor], level: float, *, shifts: bool = False) -> list[float]:
    """PSNR in dB of every photograph, whole, its pixels clipped; the noise has a fixed seed and is not clipped."""
    device, results = model.device, []
    for index, photograph in enumerate(photographs):
        generator = torch.Generator().manual_seed(1000 * int(level) + index)
        clean = to_pixels(photograph, device)
        noise_std = torch.full((1,), level / PIXEL_STD, device=device)
        noisy = clean + torch.randn(clean.shape, generator=generator).to(device) * noise_std
        denoised = shifted(model, noisy, noise_std) if shifts else model(noisy, noise_std)
        error = ((denoised.clamp(-1, 1) - clean) / 2).square().mean()
        results.append(-10 * math.log10(error.item()) if error.isfinite() else -math.inf)
    return results


def shifted(model: CtrlCscDenoiser, noisy: Tensor, noise_std: Tensor) -> Tensor:
    """The mean over the codes' positions: cycle spinning."""
    stride, (height, width) = model.config.stride, noisy.shape[-2:]
    total = torch.zeros_like(noisy)
    for top in range(stride):
        for left in range(stride):
            larger = torch.nn.functional.pad(noisy, (left, 0, top, 0), mode="reflect")
            total += model(larger, noise_std)[..., top : top + height, left : left + width]
    return total / stride**2


def save(model: CtrlCscDenoiser, state: dict[str, Tensor], folder: Path) -> None:
    """The file in float16, half as large; the model is loaded in float32. No card or figures of another stay beside."""
    remove_records(folder)
    (folder / FIGURES).unlink(missing_ok=True)
    model.save_pretrained(folder, state_dict={name: value.half() for name, value in state.items()})


def milliseconds(step: Callable[..., Tensor], draw: Callable[[], tuple[Tensor, ...]], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step(*draw())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count * 1e3


def choose_step(
    model: CtrlCscDenoiser, draw: Callable[[], tuple[Tensor, ...]], precision: str
) -> tuple[Step, Callable[..., Tensor], str]:
    """A step, how it is launched, and what that is called: on a GPU as one CUDA graph where that works, in the
    precision asked for, or the faster one: bfloat16 if it takes less than `BFLOAT16_SHARE` of the time of TF32.
    """
    on_gpu = model.device.type == "cuda"
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    found: dict[bool, tuple[float, Step, Callable[..., Tensor], str]] = {}
    for bfloat16 in {"auto": (True, False) if on_gpu else (False,), "bfloat16": (True,), "tf32": (False,)}[precision]:
        name = "bfloat16" if bfloat16 else "TF32" if on_gpu else "float32"
        for way in ("CUDA graph", "eager") if on_gpu else ("eager",):
            step = Step(model, 0.0, bfloat16)
            launch: Callable[..., Tensor] = Replay(step) if way == "CUDA graph" else step
            try:
                milliseconds(launch, draw, 5)
                taken = milliseconds(launch, draw, 10 if on_gpu else 2)
                unchanged = all(torch.equal(value, initial[key]) for key, value in model.state_dict().items())
                if not unchanged:  # at a rate of 0
                    raise RuntimeError("a step of rate 0 changed the weights")
            except Exception as error:
                print(f"{name}, {way}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                model.load_state_dict(initial)
                continue
            print(f"{name}, {way}: {taken:.2f} ms a step", flush=True)
            found[bfloat16] = (taken, step, launch, f"{name}, {way}")
            break
    if len(found) == 2:
        return found[found[True][0] < BFLOAT16_SHARE * found[False][0]][1:]
    if not found:
        raise RuntimeError("no way of making a step works")
    return next(iter(found.values()))[1:]


def train(options: argparse.Namespace) -> None:
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    photographs = read_photographs(options.data, "train")
    test = read_photographs(options.data, "test")
    if options.measured is not None:
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        test = [test[index] for index in sorted(order[: options.measured].tolist())]
    if not 0 < options.held_out < len(photographs):
        raise ValueError(
            f"--held_out must be above 0 and below the number of photographs to train on, {len(photographs)}, got "
            f"{options.held_out}"
        )
    held_out = photographs[:: max(1, len(photographs) // options.held_out)][: options.held_out]
    chosen = {id(photograph) for photograph in held_out}
    crops = Crops([p for p in photographs if id(p) not in chosen], options.crop, device)
    held_out = [p if p.shape[2] >= p.shape[1] else p.transpose(1, 2) for p in held_out]  # of one size: one trial
    if device.type == "cpu":
        held_out = [photograph[:, :96, :96] for photograph in held_out]
    print(
        f"{len(crops.pixels)} photographs to train on, {len(held_out)} held out; {time.monotonic() - start:.1f} s",
        flush=True,
    )

    model = CtrlCscDenoiser(
        CtrlCscDenoiserConfig(
            num_atoms=options.atoms,
            kernel_size=options.kernel,
            num_iterations=options.iterations,
            num_dictionaries=options.dictionaries or options.iterations,
        )
    ).to(device)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        clean = crops.draw(options.batch)
        low, high = TRAINED_LEVELS
        levels = low + (high - low) * torch.rand(options.batch, device=device)
        return clean, torch.randn(clean.shape, device=device), levels / PIXEL_STD

    step, launch, way = choose_step(model, draw, options.precision)
    steps_start = time.monotonic()
    end = start + options.seconds - (MEASUREMENT_SECONDS if device.type == "cuda" else 0)
    print(f"{way}; steps from {steps_start - start:.1f} s on", flush=True)

    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    best, factor = -math.inf, 1.0
    best_state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    done, history = 0, []
    shown, next_check = steps_start, steps_start + min(FIRST_CHECK, options.checkpoint_seconds)

    def check(loss: float) -> None:
        """Held-out figures; keeps and saves the best state, or returns to it."""
        nonlocal best, best_state, factor
        found = sum(sum(measure(model, held_out, level)) / len(held_out) for level in TEST_LEVELS) / len(TEST_LEVELS)
        record = {"step": done, "seconds": round(time.monotonic() - start, 1), "loss": loss, "held-out PSNR": found}
        history.append(record)
        print(json.dumps(record), flush=True)
        if found > best:
            best = found
            best_state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            save(model, best_state, folder)
        elif not found > best - DROP:
            factor *= SLOWER
            model.load_state_dict(best_state)  # in place, where a graph finds it
            for state in step.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            print(f"back to the best state, learning rate times {factor:.2f}", flush=True)

    loss = torch.zeros(())
    while (now := time.monotonic()) < end:
        progress = (now - steps_start) / max(end - steps_start, 1e-9)
        warmup = min(1.0, (now - steps_start + 1e-3) / min(WARMUP_SECONDS, 0.05 * (end - steps_start)))
        if done % 10 == 0:
            rate = options.learning_rate * factor * warmup * (0.5 + 0.5 * math.cos(math.pi * progress))
            set_learning_rate(step.optimizer, rate)
        loss = launch(*draw())
        done += 1
        if done % 50 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # so that the clock is that of the steps
        if now - shown > options.progress_seconds:
            shown = now
            print(f"step {done}, {now - start:.0f} s, loss {loss.item():.5f}, rate {rate:.2e}", flush=True)
        if now > next_check:
            check(loss.item())
            next_check = time.monotonic() + options.checkpoint_seconds
    check(loss.item())
    finished = time.monotonic()

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # of many sizes
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "way": way,
        "steps": done,
        "ms a step": (finished - steps_start) * 1e3 / max(done, 1),
        "seconds to the last step": finished - start,
        "settings": {name: value for name, value in vars(options).items() if isinstance(value, int | float | str)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "MB": (folder / "model.safetensors").stat().st_size / 1e6,
        "history": history,
    }
    saved = CtrlCscDenoiser.from_pretrained(folder).to(device).eval()
    for level in TEST_LEVELS:
        for name, shifts in (("", False), (", all shifts", True)):
            if test and (device.type == "cuda" or not shifts):
                found = measure(saved, test, level, shifts=shifts)
                figures[f"PSNR at {level:.0f} of {len(test)}{name}"] = sum(found) / len(found)
                print(f"{level:.0f}/255{name}: {sum(found) / len(found):.3f} dB", flush=True)
                (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    figures["seconds"] = time.monotonic() - start
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "train"))
    parser.add_argument("--output", type=Path, required=True, help="of pack, its file; of train, the model's folder")
    parser.add_argument("--dataset", help="of pack: a Hub id, or a folder")
    parser.add_argument("--train_images", type=int, help="of pack: how many; by default all")
    parser.add_argument("--test_images", type=int, help="of pack: how many; by default all")
    parser.add_argument("--data", type=Path, help="of train: file that pack wrote")
    parser.add_argument("--seconds", type=float, default=270.0, help="from start to end")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--kernel", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=18)
    parser.add_argument("--dictionaries", type=int, help="pairs of dictionaries of the steps; by default one a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("auto", "bfloat16", "tf32"), default="auto")
    parser.add_argument("--held_out", type=int, default=HELD_OUT, help="photographs that are not trained on")
    parser.add_argument("--measured", type=int, help="test photographs to measure on; by default all")
    parser.add_argument("--progress_seconds", type=float, default=5.0)
    parser.add_argument("--checkpoint_seconds", type=float, default=CHECKPOINTS_APART)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.action == "pack":
        if not options.dataset:
            parser.error("pack needs --dataset")
        return pack(options.dataset, options.output, options.train_images, options.test_images)
    if not (options.data and options.data.is_file()):
        parser.error(f"--data must be a file that pack wrote, got {options.data}")
    train(options)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped")
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
