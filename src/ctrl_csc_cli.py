"""The command line, `ctrl-csc`.

A module beside the package, because importing the package registers it with transformers, which takes seconds. So
`--help` and `--version` answer at once; each command imports what it needs when it runs.
"""

import os
import re
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

    from ctrl_csc_hf import CtrlCscImageProcessor, CtrlCscModel


class OneLineErrors(TyperGroup):
    """Commands that end with one line, by Ctrl-C with the exit code of shells, 130, or by an error of the system."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # datasets and safetensors want names of files in UTF-8, whatever the locale.
        if not args and sys.getfilesystemencoding() != "utf-8":
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        return super().__call__(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # which click ends in silence
            raise
        except OSError as error:
            _stop(str(error))


app = typer.Typer(cls=OneLineErrors, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Model = Annotated[str, typer.Option(help="A folder that train.py wrote, or a Hub repository.")]
LocalModel = Annotated[str, typer.Option("--model", help="A folder that train.py wrote.")]
DatasetName = typer.Option("--dataset_name", help="A Hub data set, or a local folder of images or Parquet files.")
Split = Annotated[str, typer.Option(help="Split of the data set.")]
ImageColumn = Annotated[
    str | None, typer.Option("--image_column", help="Column of the images; by default the only one that holds images.")
]
LabelColumn = Annotated[
    str | None,
    typer.Option("--label_column", help="Column of integer labels; by default found by its type; none: no labels."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ctrl-csc-hf {metadata.version('ctrl-csc-hf')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """CTRL-CSC: images as a multi-stage sparse deconvolution."""


# The flags are those of the program, which reads and lists them itself.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def train(context: typer.Context) -> None:
    """Trains a model; --help lists the settings. On several GPUs: accelerate launch -m ctrl_csc_hf.training.train"""
    _launch("train", context.args)


@app.command(context_settings=PASSED_ON)
def evaluate(context: typer.Context) -> None:
    """Measures a model on held-out images, beside PCA and other models; --help lists the settings."""
    _launch("evaluate", context.args)


def _launch(program: str, arguments: list[str]) -> None:
    try:
        module = import_module(f"ctrl_csc_hf.training.{program}")
    except ModuleNotFoundError as error:
        _stop(f"{program} needs {error.name}: pip install ctrl-csc-hf[train]")
    module.launch(arguments)


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    model: Model,
    output: Annotated[Path, typer.Option(help="PNG file of the picture.")] = Path("reconstructions.png"),
    tiles: Annotated[
        bool, typer.Option("--tiles", help="Keep the size of a single image, in overlapping tiles of the model's size.")
    ] = False,
) -> None:
    """Writes the images above their reconstructions, and prints the PSNR of each, at the model's size."""
    if tiles and len(images) > 1:
        raise typer.BadParameter(f"must be one image with --tiles, got {len(images)}", param_hint="IMAGES")
    if output.suffix.lower() != ".png":
        raise typer.BadParameter(f"must end in .png, got {output}", param_hint="--output")
    import torch
    from tqdm.auto import tqdm

    from ctrl_csc_hf.inspection.visualization import reconstruction_grid
    from ctrl_csc_hf.metrics import peak_signal_to_noise_ratio
    from ctrl_csc_hf.models.tiling import in_tiles

    loaded, processor = _load_model(model), _load_image_processor(model)
    paths = tqdm(images, desc="images read", disable=len(images) == 1)
    own_size = {"do_resize": False, "do_center_crop": False} if tiles else {}
    pixels = [_read_image(path, "IMAGES", processor, **own_size) for path in paths]

    def reconstruct_all(many: "Tensor") -> "Tensor":
        return torch.cat([loaded(batch).reconstruction for batch in many.split(64)])

    try:
        originals = torch.cat(pixels)
        with torch.inference_mode():
            if tiles:
                reconstructions = in_tiles(reconstruct_all, originals[0], loaded.config.image_size)[None]
            else:
                reconstructions = reconstruct_all(originals)
    except (ValueError, RuntimeError) as error:  # images of another size than the model's, or of several
        _stop(f"preprocessor_config.json of {model} must give images of the model's size: {error}")
    scale = max(1, 128 // originals.shape[-1])
    with _written(output, "--output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        reconstruction_grid(originals, reconstructions, scale=scale).save(output)
    height, width = originals.shape[2:]
    for path, psnr in zip(images, peak_signal_to_noise_ratio(originals, reconstructions).tolist(), strict=True):
        typer.echo(f"{path}: PSNR {psnr:.2f} dB at {width}x{height} pixels")
    if not tiles:
        typer.echo("Images are cut to their centre square in the model's size; --tiles keeps the size of one")
    typer.echo(f"Originals above reconstructions: {output}")


@app.command()
def inspect(
    model: Model,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image to take apart; may be given several times.", exists=True, dir_okay=False),
    ] = None,
    dataset_name: Annotated[str | None, DatasetName] = None,
    split: Split = "test",
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    num_images: Annotated[
        int, typer.Option("--num_images", help="Images of the data set, drawn uniformly.", min=2)
    ] = 500,
    output: Annotated[Path, typer.Option(help="Folder of the pictures, PNG files.")] = Path("inspection"),
    report: Annotated[Path | None, typer.Option(help="HTML page of all pictures, one file.")] = None,
) -> None:
    """Draws what is inside a model: its atoms, what they make of an image, and, given a data set, the latent space.

    Without an image, one of the checkpoint's examples is taken apart, or else the first of the data set.
    """
    if report is not None and report.suffix.lower() != ".html":
        raise typer.BadParameter(f"must end in .html, got {report}", param_hint="--report")
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"must be a folder or not exist, got {output}", param_hint="--output")
    try:
        import matplotlib  # noqa: F401
        import torch
        from tqdm.auto import tqdm

        from ctrl_csc_hf.inspection.report import (
            Picture,
            dictionary_pictures,
            html_report,
            image_pictures,
            latent_pictures,
        )
    except ModuleNotFoundError as error:
        _stop(f"inspect needs {error.name}: pip install ctrl-csc-hf[inspect]")
    loaded, processor = _load_model(model).float(), _load_image_processor(model)
    if loaded.config.num_channels != 3:
        raise typer.BadParameter(
            f"must be of RGB images, got {loaded.config.num_channels} channels", param_hint="--model"
        )
    paths = image or sorted(_folder(model).glob("examples/*.png"))
    photos = [_read_image(path, "--image", processor) for path in paths]
    many, labels, class_names = torch.cat(photos) if photos else None, None, None
    if dataset_name is not None:
        many, labels, class_names = _sample(dataset_name, split, image_column, label_column, num_images, processor)
        from ctrl_csc_hf.latents.encoding import check_output

        try:
            check_output(output, dataset_name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--output") from error
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}_{index}" for index, name in enumerate(names, 1)]
    shown = dict(zip(names, photos, strict=True))
    if not shown and many is not None:
        shown = {"image": many[:1]}
    if not image:
        shown = dict(islice(shown.items(), 1))

    chapters: dict[str, list[Picture]] = {}
    try:
        with tqdm(total=1 + len(shown) + (dataset_name is not None), desc="chapters drawn") as progress:
            chapters["Atoms"] = dictionary_pictures(loaded, many)
            progress.update()
            for name, photo in shown.items():
                chapters[f"Image {name}"] = image_pictures(loaded, photo[0], name)
                progress.update()
            if dataset_name is not None and many is not None:
                chapters["Latent space"] = latent_pictures(loaded, many, labels, class_names)
                progress.update()
    except (ValueError, TypeError) as error:  # what the model refuses
        _stop(str(error))
    with _written(output, "--output"):
        output.mkdir(parents=True, exist_ok=True)
        for picture in (picture for pictures in chapters.values() for picture in pictures):
            path = output / (re.sub(r"[^\w-]+", "_", picture.name) + ".png")
            path.write_bytes(picture.png)
            typer.echo(f"{picture.title}: {path}")
    if report is not None:
        with _written(report, "--report"):
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(html_report(loaded, Path(model).absolute().name, chapters), encoding="utf-8")
        typer.echo(f"All of it: {report}")


@app.command()
def publish(
    model: LocalModel,
    repo_id: Annotated[str, typer.Option("--repo_id", help="ORGANIZATION/NAME on the Hub.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Visibility of a new repository; by default private if the Hub data set is private or gated.",
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Licence of the weights, as the Hub lists them; by default that of the Hub data set."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the dictionaries in float16, half as large.")] = False,
    dry_run: Annotated[Path | None, typer.Option("--dry_run", help="Write the folder here; upload nothing.")] = None,
) -> None:
    """Publishes a checkpoint as a Hub repository, with its code, its model card and an endpoint handler."""
    folder = _local_folder(model, "the checkpoint is read")
    from huggingface_hub import constants

    from ctrl_csc_hf.hub import publishing

    loaded = _load_model(model)
    try:
        if dry_run is not None:
            publishing.export(loaded, dry_run, repo_id=repo_id, checkpoint=folder, license=license, half=half)
            typer.echo(f"Written, not uploaded: {dry_run}")
        else:
            typer.echo(f"Published: {publishing.publish(folder, repo_id, private=private, license=license, half=half)}")
    except (OSError, ValueError) as error:  # what the Hub refuses is an OSError
        _stop(str(error))
    except _http_error() as error:
        _stop(f"the Hub at {constants.ENDPOINT} does not answer: {error}")


@app.command()
def fit_sampler(
    model: LocalModel,
    dataset_name: Annotated[str, DatasetName],
    split: Split = "train",
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    num_images: Annotated[
        int | None, typer.Option("--num_images", help="Images drawn uniformly; by default all.", min=2)
    ] = None,
) -> None:
    """Fits what CtrlCscPipeline.sample draws from on the training images' latents, and writes it into MODEL/sampler.

    The sampler has a component for each class, whose name is written into the model's configuration; without labels,
    for each group of latents that is found.
    """
    folder = _local_folder(model, "the sampler is written")
    try:
        from ctrl_csc_hf.hub import publishing
        from ctrl_csc_hf.latents.encoding import encode_dataset
        from ctrl_csc_hf.latents.fitting import fit_sampler as fit
    except ModuleNotFoundError as error:
        _stop(f"fit-sampler needs {error.name}: pip install ctrl-csc-hf[train]")
    loaded, processor = _load_model(model), _load_image_processor(model)
    dataset, image_column, label_column = _open_dataset(dataset_name, split, image_column, label_column)
    names = getattr(dataset.features.get(label_column), "names", None)
    try:
        sampler = fit(
            encode_dataset(
                dataset,
                loaded,
                processor,
                image_column=image_column,
                label_column=label_column or "none",
                num_images=num_images,
            ),
            class_names=names,
        )
    except (OSError, ValueError) as error:
        _stop(str(error))
    with _written(folder, "--model"):
        publishing.save_sampler(folder, sampler)
        if sampler.labels is not None:
            id2label = dict(enumerate(names)) if names else {label: str(label) for label in sampler.labels.tolist()}
            loaded.config.id2label = id2label
            loaded.config.label2id = {name: label for label, name in id2label.items()}
            with TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
                loaded.config.save_pretrained(unfinished)
                (Path(unfinished) / "config.json").replace(folder / "config.json")
    kind = "groups" if sampler.labels is None else "classes"
    ranks = f"{min(sampler.ranks)} to {max(sampler.ranks)} of {sampler.means.shape[1]} directions"
    typer.echo(f"Components: {len(sampler.ranks)} {kind}, of {ranks}")
    typer.echo(f"Sampler: {folder / publishing.SAMPLER}")


@app.command()
def demo(
    model: Model,
    port: Annotated[int, typer.Option(help="Local port of the web page.", min=1, max=65535)] = 7860,
) -> None:
    """Starts the page of the Space spaces/ctrl-csc on a model: what is inside it, and what it makes of images."""
    import ctrl_csc_hf
    from ctrl_csc_hf.models.repository_ctrl_csc import SAMPLER

    # An installed package has the Space beside its modules, an editable one in the repository.
    package = Path(ctrl_csc_hf.__file__).parent
    spaces = (package / "space", package.parents[1] / "spaces" / "ctrl-csc")
    loaded, processor = _load_model(model), _load_image_processor(model)
    try:
        space = next(space for space in spaces if space.is_dir())
        build = runpy.run_path(str(space / "app.py"))["build"]
        from ctrl_csc_hf import CtrlCscPipeline
        from ctrl_csc_hf.models.sampling import LatentSampler
    except ModuleNotFoundError as error:
        _stop(f"the demo needs {error.name}: pip install ctrl-csc-hf[demo]")

    folder = _folder(model)
    examples = sorted(str(path) for path in folder.glob("examples/*.png"))
    sampler = LatentSampler.from_pretrained(folder / SAMPLER) if (folder / SAMPLER).is_dir() else None
    page = build(CtrlCscPipeline(loaded, processor, sampler), examples)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            max_file_size="10mb",
            allowed_paths=[str(folder), str(space)],
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise typer.BadParameter(f"must be a free port, got {port}: {error}", param_hint="--port") from error
    threading.Event().wait()  # for Ctrl-C


@contextmanager
def _written(path: Path, argument: str) -> Iterator[None]:
    """Tells what cannot be written by the argument that names it."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(f"must be where one can write, got {path}: {error}", param_hint=argument) from error


def _stop(message: str) -> NoReturn:
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    raise typer.Exit(1)


def _http_error() -> type[Exception]:
    """httpx's, under whichever of its names huggingface_hub has it."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return HTTPError


def _load_model(path_or_repository: str) -> "CtrlCscModel":
    from transformers import AutoModel

    from ctrl_csc_hf import CtrlCscModel
    from ctrl_csc_hf.hub.records import DAMAGED

    try:
        model, report = AutoModel.from_pretrained(path_or_repository, trust_remote_code=False, output_loading_info=True)
        # What is missing would be random, but for operator norms, which are computed.
        if missing := [key for key in report["missing_keys"] if not key.endswith(("operator_norm", "singular_vector"))]:
            raise LookupError(f"the weights lack {sorted(missing)}")
    except (*DAMAGED, ValueError) as error:
        raise typer.BadParameter(
            f"must be a folder or a Hub repository with a CTRL-CSC model, got {path_or_repository!r}, of which "
            f"config.json, model.safetensors or model.safetensors.index.json cannot be read: {error}",
            param_hint="--model",
        ) from error
    if not isinstance(model, CtrlCscModel):
        raise typer.BadParameter(
            f"must hold a CTRL-CSC model, got {type(model).__name__} in {path_or_repository!r}", param_hint="--model"
        )
    return model.eval()


def _local_folder(model: str, what: str) -> Path:
    if not Path(model).is_dir():
        raise typer.BadParameter(
            f"must be a local folder, {what} there, got {model!r}; `hf download` makes one of a Hub repository",
            param_hint="--model",
        )
    return Path(model)


def _folder(path_or_repository: str) -> Path:
    from huggingface_hub import snapshot_download

    local = Path(path_or_repository)
    return local if local.is_dir() else Path(snapshot_download(path_or_repository))


def _load_image_processor(path_or_repository: str) -> "CtrlCscImageProcessor":
    from ctrl_csc_hf import CtrlCscImageProcessor
    from ctrl_csc_hf.hub.records import DAMAGED

    try:
        return CtrlCscImageProcessor.from_pretrained(path_or_repository)
    except (*DAMAGED, ValueError) as error:
        raise typer.BadParameter(
            f"must hold an image processor beside its model, got {path_or_repository!r}, of which "
            f"preprocessor_config.json cannot be read: {error}; "
            "CtrlCscImageProcessor(image_size=...).save_pretrained(...) writes it",
            param_hint="--model",
        ) from error


def _read_image(path: Path, argument: str, processor: "CtrlCscImageProcessor", **options: bool) -> "Tensor":
    """(1, 3, image_size, image_size), in [-1, 1]; the processor gets the options."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return processor(image, return_tensors="pt", **options).pixel_values
    except Exception as error:  # PIL's decoders raise nearly everything on broken files
        raise typer.BadParameter(
            f"must be images that PIL reads and the model takes, got {path}: {error}", param_hint=argument
        ) from error


def _open_dataset(
    name: str, split: str, image_column: str | None, label_column: str | None
) -> tuple["datasets.IterableDataset", str, str | None]:
    """The columns of a split's images and labels, undecoded, and their names."""
    import datasets

    from ctrl_csc_hf.latents.encoding import find_data, split_names, undecoded

    try:
        splits = split_names(name)
        if split not in splits:
            raise typer.BadParameter(f"must be one of {splits}, got {split!r}", param_hint="--split")
        dataset = datasets.load_dataset(**find_data(name), split=split, streaming=True)
        dataset = dataset if dataset.features else dataset._resolve_features()
    except (OSError, ValueError, _http_error(), datasets.exceptions.DatasetGenerationError) as error:
        raise typer.BadParameter(
            f"must be a data set of images that can be read, got {name!r}: {error}", param_hint="--dataset_name"
        ) from error
    try:
        return undecoded(dataset, image_column, label_column)
    except ValueError as error:  # which begins with the column's argument
        _stop(f"--{error}")


def _sample(
    name: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    count: int,
    processor: "CtrlCscImageProcessor",
) -> tuple["Tensor", "Tensor | None", list[str] | None]:
    """Images of a data set, (n, 3, image_size, image_size), their labels and the classes' names, where it has them."""
    try:
        import torch

        from ctrl_csc_hf.latents.encoding import draw_images, open_image
    except ModuleNotFoundError as error:
        _stop(f"--dataset_name needs {error.name}: pip install ctrl-csc-hf[inspect]")

    def read(encoded: Any) -> "Tensor":
        return processor(open_image(encoded), return_tensors="pt").pixel_values

    dataset, image_column, found = _open_dataset(name, split, image_column, label_column)
    try:
        images, labels = draw_images(dataset, count, image_column=image_column, label_column=found or "none", read=read)
    except (OSError, ValueError) as error:
        _stop(str(error))
    if labels is None:
        return torch.cat(images), None, None
    if any(label is None or label < 0 for label in labels):  # -1 stands for labels kept secret
        if label_column is not None:
            _stop(f"--label_column must hold integers of at least 0, but {label_column!r} holds others: give none")
        return torch.cat(images), None, None
    return torch.cat(images), torch.tensor(labels), getattr(dataset.features[found], "names", None)
