"""Makes the most of ten minutes of a GPU: its tests, the times of training steps, and a training. docs/performance.md.

    python benchmarks/gpu.py pack --dataset uoft-cs/cifar10 --output runs/cifar10.safetensors
    python benchmarks/gpu.py --data runs/cifar10.safetensors --output runs/gpu

The second command needs neither datasets, diffusers, accelerate nor torchvision, nor an installed ctrl-csc-hf. Each
piece runs in a process of its own, for a limited time. Each row is written to gpu.jsonl and gpu.md in the output folder
as soon as it is there, also where it failed; the same command then goes on with the rows that are missing. A row that
failed is tried again once its line is removed from gpu.jsonl. On a CPU steps are eager alone.
"""

import argparse
import copy
import gc
import json
import math
import multiprocessing
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # rather than what is installed, if anything
import torch._functorch.config as functorch_config
from accelerator import PEAKS
from packed import check_packed, pack, read_pixels, to_pixel_values
from rivals import two_phase_step, with_plain_stages
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.metrics import FrechetDistance, KernelDistance, VisionFeatures
from ctrl_csc_hf.objectives.closed_loop import player_parameters
from ctrl_csc_hf.training.ema import CALIBRATION_IMAGES, evaluated_model, held_out_figures
from ctrl_csc_hf.training.phases import Phases, steps_of_phases
from ctrl_csc_hf.training.presets import load_preset
from ctrl_csc_hf.training.settings import TrainingSettings
from ctrl_csc_hf.training.steps import EAGER_CALLS, REFINED_STEPS, StepFigures

ROOT = Path(__file__).resolve().parents[1]
Figures: TypeAlias = dict[str, Any]  # of a row, by name; a row's function fills it, so what it had stays if it fails
Plan: TypeAlias = dict[str, Callable[[Figures], None]]  # the functions by row

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
GOAL = 4  # times the speed of the two-phase step
NETS = [  # presets and batches, the most telling first
    ("cifar10", 1024), ("imagenet64", 1024), ("imagenet128", 256), ("cifar10", 64), ("cifar10", 256), ("cifar10", 4096),
    ("imagenet64", 64), ("imagenet64", 256), ("imagenet128", 64), ("imagenet64", 4096), ("imagenet128", 1024),
    ("imagenet128", 4096),
]  # fmt: skip
PLAIN_WAYS, COMPILED_WAYS = ("two phases", "graph", "eager"), ("compiled", "compiled graph")
COMPILED_AFTER = 6  # nets: compilation takes minutes
TINY = {"image_size": 16, "latent_dim": 8, "stage_channels": [8, 8], "share_dictionaries": True}
LOGGED_STEPS = 100
EVALUATION_SECONDS = 45


# Results


class Results:
    """Rows {"piece", "row", figures or "error"}, a line each in gpu.jsonl, and as one table a piece in gpu.md."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "gpu.jsonl"

    def rows(self, piece: str) -> dict[str, Figures]:
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        return {row.pop("row"): row for row in map(json.loads, lines) if row.pop("piece") == piece}

    def add(self, piece: str, row: str, figures: Figures) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"piece": piece, "row": row, **figures}) + "\n")
        print(f"{piece}: {row}: {figures}", flush=True)
        tables = [f"## {name}\n\n{as_table(rows)}\n" for name in PIECES if (rows := self.rows(name))]
        (self.folder / "gpu.md").write_text("\n".join(tables), encoding="utf-8")


def as_table(rows: dict[str, Figures]) -> str:
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    lines = [["", *names], ["---"] * (len(names) + 1)]
    for row, figures in rows.items():
        cells = (figures.get(name, "") for name in names)
        lines.append([row, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# Training steps


def read_preset(options: argparse.Namespace, preset: str) -> tuple[CtrlCscModel, TrainingSettings]:
    sections = load_preset(preset)
    settings = TrainingSettings(**sections["training"] | {"mixed_precision": "bf16"})
    torch.manual_seed(settings.seed)
    if settings.pretrained_model_name_or_path:
        model = AutoModel.from_pretrained(settings.pretrained_model_name_or_path)
    else:
        model = AutoModel.from_config(CtrlCscConfig(**(TINY if options.short else sections["model"])))
    return model.train().to(DEVICE, memory_format=torch.channels_last), settings


def milliseconds(step: Callable[[], object], seconds: float) -> float:
    """The mean of the steps that `seconds` have room for, at least 3, after those that come before a graph's replay."""

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if GPU:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    timed(EAGER_CALLS + 1)
    return timed(max(3, min(100, int(seconds / timed(1))))) * 1e3


def call_each(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()


def free_memory() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def time_steps(options: argparse.Namespace, preset: str, batch: int, way: str, figures: Figures) -> None:
    """Of the fit and of the game: milliseconds of a step, images/s, share of the GPU's bfloat16 peak."""
    model, settings = read_preset(options, preset)
    size, seconds = model.config.image_size, 0.05 if options.short else 1.0
    images = to_pixel_values(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=DEVICE))
    if way == "two phases":
        objective = settings.closed_loop_objective(num_classes=None)
        players = tuple(torch.optim.Adam(part, 1e-4) for part in player_parameters(model))
        with_plain_stages(model)

        def rival() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                two_phase_step(model, objective, players, images, None)

        taken = milliseconds(rival, seconds)
        figures |= {"game, ms": taken, "game, images/s": batch / taken * 1e3}
        return
    operations = {}
    counted = Phases(copy.deepcopy(model), settings)
    for name in ("fit", "game"):
        with CountOperations() as counter:
            counted(name, images[:64])
        operations[name] = counter.total / len(images[:64])
    del counted
    if way.startswith("compiled"):
        torch._dynamo.reset()
        functorch_config.donated_buffer = False  # as train.py
        for player in (model.encoder, model.decoder):
            player.compile(fullgraph=True)
    peak = next((peak for name, peak in PEAKS.items() if GPU and name in torch.cuda.get_device_name()), None)
    for name in ("fit", "game"):
        phases = Phases(model, settings, graphs=[name] if way.endswith("graph") else [])
        taken = milliseconds(partial(phases, name, images), seconds)
        images_a_second = batch / taken * 1e3
        figures |= {f"{name}, ms": taken, f"{name}, images/s": images_a_second}
        figures[f"{name}, TFLOP/s"] = operations[name] * images_a_second / 1e12
        if peak:
            figures[f"{name}, FLOP utilisation"] = operations[name] * images_a_second / peak
        del phases
        free_memory()
    rival_row = Results(options.output).rows("steps").get(row_of_steps(preset, batch, "two phases"), {})
    if "game, ms" in rival_row:
        figures[f"times two phases (goal {GOAL})"] = rival_row["game, ms"] / figures["game, ms"]


class CountOperations(TorchDispatchMode):
    """Adds up what convolutions and products do: additions and multiplications."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


# Training


class Training:
    """One of several that share the GPU, each with a stream of its own, so that small kernels run side by side.

    Args:
        preset: its name or path.
        pixels: "train" and "held_out" images (n, 3, size, size), uint8, the first on the device.
        graphs: phases whose step is one CUDA graph.
    """

    def __init__(
        self, options: argparse.Namespace, preset: str, pixels: dict[str, Tensor], graphs: Collection[str]
    ) -> None:
        self.options, self.name, self.pixels, self.graphs = options, Path(preset).stem, pixels, graphs
        self.model, self.settings = read_preset(options, preset)
        self.steps = steps_of_phases(self.settings)
        self.batch = options.batch_size or (8 if options.short else self.settings.train_batch_size)
        self.generator = torch.Generator(DEVICE).manual_seed(self.settings.seed)
        self.calibration = self.draw(CALIBRATION_IMAGES if GPU else 4 * self.batch)
        self.calibration_batch = max(self.batch, len(self.calibration) // 4)
        self.stream = torch.cuda.Stream() if GPU else None
        self.figures: Figures = {}

    def draw(self, count: int) -> Tensor:
        pixels = self.pixels["train"]
        chosen = pixels[torch.randint(len(pixels), (count,), generator=self.generator, device=DEVICE)]
        flips = torch.rand(count, 1, 1, 1, generator=self.generator, device=DEVICE) < 0.5
        return to_pixel_values(torch.where(flips, chosen.flip(3), chosen))

    def trial(self, name: str) -> Callable[[], object]:
        """A step of a phase, of a copy of the model; where it has hardly any, one of the phase with the most steps."""
        phases = Phases(copy.deepcopy(self.model), self.settings, graphs=self.graphs)
        name = name if self.steps[name] > 1 else max(self.steps, key=lambda name: self.steps[name])
        phases.begin(name)

        def step() -> None:
            with torch.cuda.stream(self.stream):
                phases(name, self.draw(self.batch))

        return step

    def run(self, last_moment: float) -> Iterator[None]:
        """All its steps, and a stop after each; no more of a phase where it is later than `last_moment`."""
        model, steps, history = self.model, self.steps, []
        phases, of_steps = Phases(model, self.settings, graphs=self.graphs, steps=steps), StepFigures()
        for name, count in steps.items():
            phases.begin(name)
            for step in range(count):
                if step < REFINED_STEPS:
                    model.project_parameters()
                of_steps.keep(step + 1, phases(name, self.draw(self.batch)))
                if (step + 1) % LOGGED_STEPS == 0 or step + 1 == count:
                    read = of_steps.read(everything=True)
                    history += [{"phase": name, "step": number, **values} for number, values in read]
                    if (step + 1) % (10 * LOGGED_STEPS) == 0 and name == "game":
                        print(f"{self.name}: {name}, step {step + 1}: {history[-1]['psnr']:.2f} dB", flush=True)
                    if time.monotonic() > last_moment:
                        steps[name] = step + 1  # slower than in the trial
                        break
                yield
            if name != "game" and (count or name == "fit"):
                phases.end(name, self.calibration, self.calibration_batch)
                free_memory()
        self.folder = self.options.output / self.name
        self.model = evaluated_model(model, phases.average, self.calibration, self.calibration_batch)
        save_in_float16(self.model, self.folder)
        logged = [json.dumps(record) for record in history if record["step"] % LOGGED_STEPS in (0, 1)]
        (self.folder / "history.jsonl").write_text("\n".join(logged) + "\n", encoding="utf-8")

    def measure(self) -> None:
        """Figures of what was saved, on held-out images."""
        saved = AutoModel.from_pretrained(self.folder).to(DEVICE).eval()
        order = torch.randperm(len(self.pixels["held_out"]), generator=torch.Generator().manual_seed(0))
        held_out = to_pixel_values(self.pixels["held_out"][order[: self.options.held_out_images]])
        self.figures |= {f"steps of {name}": count for name, count in self.steps.items()}
        self.figures |= {"batch": self.batch, "training images": len(self.pixels["train"])}
        self.figures |= {"model, MB": (self.folder / "model.safetensors").stat().st_size / 1e6}
        self.figures |= {"held-out images": len(held_out)}
        self.figures |= held_out_figures(saved, held_out, 256, self.settings.distortion)[0]
        active = torch.zeros(len(saved.config.stage_channels))
        networks = [
            (name, VisionFeatures(name, size, DEVICE), FrechetDistance(), KernelDistance())
            for name, size in zip(self.options.feature_model, self.options.feature_size, strict=True)
        ]
        with torch.no_grad():
            for batch in held_out.split(250):
                output = saved(batch.to(DEVICE), output_codes=True)
                active += torch.tensor([(c != 0).float().mean().item() for c in output.codes]) * len(batch)
                for _, network, *distances in networks:
                    pair = network(batch.to(DEVICE)), network(output.reconstruction)
                    for distance in distances:
                        distance.update(*pair)
        self.figures |= {f"active codes, stage {i}": s / len(held_out) for i, s in enumerate(active.tolist(), 1)}
        for name, _, *distances in networks:
            for distance in distances:
                self.figures |= {f"{k}, {Path(name).name}": value for k, value in distance.compute().items()}


def train(options: argparse.Namespace, graphs: list[str], figures: Figures) -> None:
    """The presets' trainings, at the same time. With `train_seconds` the phases of all are longer or shorter by one
    factor, so that they end then.
    """
    start = time.monotonic()
    read: dict[tuple[Path, int], dict[str, Tensor]] = {}
    trainings = []
    for index, preset in enumerate(options.preset):
        size = TINY["image_size"] if options.short else load_preset(preset)["model"]["image_size"]
        data = (options.data[min(index, len(options.data) - 1)], size)
        if data not in read:
            read[data] = {part: read_pixels(data[0], part, size) for part in ("train", "held_out")}
            read[data]["train"] = read[data]["train"].to(DEVICE)
        trainings.append(Training(options, preset, read[data], graphs))
    last_moment = math.inf
    if options.train_seconds:
        allowed = min(options.train_seconds, options.end - EVALUATION_SECONDS - start)
        total = 0.0
        for name in trainings[0].steps:
            trials = [training.trial(name) for training in trainings]
            taken = figures[f"a step of each, {name}, ms"] = milliseconds(partial(call_each, trials), seconds=0.5)
            total += taken * max(training.steps[name] for training in trainings)
            del trials
            free_memory()
        figures["before the first step, s"] = time.monotonic() - start
        factor = (start + allowed - time.monotonic()) * 1e3 / total
        print(f"all phases {factor:.2f} times as long", flush=True)
        last_moment = start + allowed
        for training in trainings:
            training.steps = {name: max(1, int(n * factor)) if n else 0 for name, n in training.steps.items()}
    running = [(training, training.run(last_moment)) for training in trainings]
    while running:
        for training, steps in list(running):
            with torch.cuda.stream(training.stream):
                if next(steps, "over") == "over":
                    running.remove((training, steps))
    figures["all steps done, s"] = time.monotonic() - start
    for training in trainings:
        training.measure()
        Results(options.output).add("train", training.name, training.figures)


def save_in_float16(model: CtrlCscModel, folder: Path) -> None:
    """A folder that AutoModel and AutoImageProcessor load, the model in float32."""
    halves: dict[int, Tensor] = {}  # one copy of weights that are shared
    state = {name: halves.setdefault(t.data_ptr(), t.half().contiguous()) for name, t in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    CtrlCscImageProcessor(image_size=model.config.image_size).save_pretrained(folder)


# Tests


def run_tests(options: argparse.Namespace, figures: Figures) -> None:
    """Of tests/test_cuda.py, whose whole output is in tests.log: numbers of tests by outcome, and what failed."""
    import pytest

    arguments = ["-v", "-rfE", "-p", "no:cacheprovider", "--color=no", str(ROOT / "tests" / "test_cuda.py")]
    with (options.output / "tests.log").open("w+", buffering=1, encoding="utf-8") as log:
        with redirect_stdout(log), redirect_stderr(log):
            pytest.main(arguments)
        log.seek(0)
        lines = log.read().splitlines() or ["nothing"]
    outcomes = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1])}
    if not outcomes:
        raise RuntimeError(f"pytest ended with: {lines[-1]}")
    figures |= outcomes | {"failures": "; ".join(line for line in lines if line.startswith(("FAILED", "ERROR")))}


# Pieces


def row_of_steps(preset: str, batch: int, way: str) -> str:
    return f"{preset}, batch {batch}, {way}"


def plan_steps(options: argparse.Namespace) -> Plan:
    nets = [("cifar10", 8)] if options.short else NETS
    plain = [(*net, way) for net in nets for way in PLAIN_WAYS if GPU or way != "graph"]
    compiled = [(*net, way) for net in nets[:3] for way in COMPILED_WAYS if GPU]
    first = COMPILED_AFTER * len(PLAIN_WAYS)
    order = plain[:first] + compiled[: len(COMPILED_WAYS)] + plain[first:] + compiled[len(COMPILED_WAYS) :]
    return {row_of_steps(*row): partial(time_steps, options, *row) for row in order}


def plan_train(options: argparse.Namespace) -> Plan:
    """As graphs; where that failed without the game's, then eagerly."""
    ways = {"graph": ["energy", "fit", "game"], "graph but for the game": ["energy", "fit"], "eager": []}
    plan, found = {}, Results(options.output).rows("train")
    presets = ", ".join(Path(preset).stem for preset in options.preset)
    for way, graphs in ways.items():
        if GPU or not graphs:
            plan[row := f"{presets}: {way}"] = partial(train, options, graphs)
            if "error" not in found.get(row, {}):
                break
    return plan


PIECES = {  # each with its limit in seconds; of the training, options.train_seconds come on top
    "tests": (lambda options: {"tests/test_cuda.py": partial(run_tests, options)}, 120),
    "steps": (plan_steps, 220),
    "train": (plan_train, EVALUATION_SECONDS + 10),
}


def rows_left(piece: str, options: argparse.Namespace) -> Plan:
    found = Results(options.output).rows(piece)
    return {row: run for row, run in PIECES[piece][0](options).items() if row not in found}


def work(piece: str, options: argparse.Namespace) -> None:
    """The rows of a piece that are left, up to the first that fails: CUDA may be of no use to this process then."""
    results = Results(options.output)
    torch.backends.cudnn.benchmark = True  # shapes are few
    for row, run in rows_left(piece, options).items():
        figures: Figures = {}
        try:
            run(figures)
        except Exception as error:
            traceback.print_exc()
            figures["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        figures["device"] = f"{torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}"
        results.add(piece, row, figures)
        if "error" in figures:
            sys.exit(1)
        free_memory()


def run_piece(piece: str, options: argparse.Namespace) -> None:
    """Starts processes for `work` until no row is left or the piece's time is over."""
    limit = PIECES[piece][1] + ((options.train_seconds or math.inf) if piece == "train" else 0)
    options.end = time.monotonic() + limit
    # CUDA needs a fresh process; elsewhere a copy of this one saves the imports.
    processes = multiprocessing.get_context("spawn" if GPU else "fork")
    while left := list(rows_left(piece, options)):
        process = processes.Process(target=work, args=(piece, options))
        process.start()
        process.join(None if limit == math.inf else max(0.0, options.end - time.monotonic()))
        is_late = process.is_alive()
        if is_late:
            process.kill()
            process.join()
        unfinished = next(iter(rows_left(piece, options)), None)
        if unfinished and is_late:
            Results(options.output).add(piece, unfinished, {"error": f"stopped, {piece} may take {limit:.0f} s"})
            return
        if unfinished == left[0]:
            reason = f"its process ended with {process.exitcode}"
            Results(options.output).add(piece, unfinished, {"error": reason})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "pack"), default="run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; of pack, its file")
    parser.add_argument("--data", type=Path, nargs="+", help="file that pack wrote, or one a preset, to train on")
    parser.add_argument("--pieces", nargs="+", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--preset", nargs="+", default=["cifar10"], help="what to train, all at the same time")
    parser.add_argument("--batch_size", type=int, help="of the training; by default the preset's")
    parser.add_argument("--train_seconds", type=float, default=180.0, help="of all; 0: the presets' own steps")
    parser.add_argument("--feature_model", nargs="+", default=[], help="networks whose features are compared")
    parser.add_argument("--feature_size", type=int, nargs="+", default=[], help="side in pixels for each of them")
    parser.add_argument("--held_out_images", type=int, default=5000, help="to measure on")
    parser.add_argument("--short", action="store_true", help="tiny nets: tests the command, its figures mean nothing")
    parser.add_argument("--dataset", help="of pack: a Hub id, or a folder")
    parser.add_argument("--split", default="train", help="of pack: what to train on")
    parser.add_argument("--half", type=int, choices=(0, 1), help="of pack: every other image of it")
    parser.add_argument("--held_out_split", default="test", help="of pack: what to measure on")
    options = parser.parse_args(arguments)
    if options.action == "pack":
        if not options.dataset:
            parser.error("pack needs --dataset")
        return pack(
            options.dataset, {"train": options.split, "held_out": options.held_out_split}, options.half, options.output
        )
    if "train" in options.pieces and not (options.data and all(path.is_file() for path in options.data)):
        parser.error(f"--data must be a file that pack wrote, for the piece train, got {options.data}")
    if len(options.feature_model) != len(options.feature_size):
        parser.error(
            f"--feature_size must be one number for each --feature_model, got {len(options.feature_size)} for "
            f"{len(options.feature_model)}"
        )
    if "train" in options.pieces:  # which comes last, minutes later
        try:
            for preset in options.preset:
                load_preset(preset)
            for path in options.data:
                check_packed(path)
        except ValueError as error:
            parser.error(str(error))
    for piece in options.pieces:
        run_piece(piece, options)


if __name__ == "__main__":
    main()
