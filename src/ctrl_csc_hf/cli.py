"""The command line, `ctrl-csc`."""

import re
import runpy
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from huggingface_hub import constants, snapshot_download

# httpx's, under whichever of its names huggingface_hub has it.
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoModel

from . import hub
from .image_processing_ctrl_csc import CtrlCscImageProcessor
from .metrics import peak_signal_to_noise_ratio
from .modeling_ctrl_csc import CtrlCscModel
from .visualization import reconstruction_grid

# An installed package has it beside this module, an editable one in the repository.
SPACE = next(
    folder
    for folder in (Path(__file__).parent / "space", Path(__file__).parents[2] / "spaces" / "ctrl-csc")
    if folder.is_dir()
)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """CTRL-CSC: images as a multi-stage sparse deconvolution."""


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option(help="A folder that train.py wrote, or a Hub repository.")],
    output: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("reconstructions.png"),
) -> None:
    """Writes the images above their reconstructions, and prints the PSNR of each, at the model's size."""
    if output.suffix.lower() != ".png":
        raise typer.BadParameter(f"must end in .png, got {output}", param_hint="--output")
    loaded, processor = _load_model(model, "--model"), _load_image_processor(model)
    originals = processor([_open_image(path, "IMAGES") for path in images], return_tensors="pt").pixel_values
    with torch.inference_mode():
        reconstructions = torch.cat([loaded(batch).reconstruction for batch in originals.split(64)])
    output.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 128 // originals.shape[-1])
    reconstruction_grid(originals, reconstructions, scale=scale).save(output)
    for path, psnr in zip(images, peak_signal_to_noise_ratio(originals, reconstructions).tolist(), strict=True):
        typer.echo(f"{path}: PSNR {psnr:.2f} dB")
    typer.echo(f"Originals above reconstructions: {output}")


@app.command()
def inspect(
    model: Annotated[str, typer.Option(help="A folder that train.py wrote, or a Hub repository.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image to take apart; may be given several times.", exists=True, dir_okay=False),
    ] = None,
    dataset_name: Annotated[
        str | None,
        typer.Option("--dataset_name", help="A Hub data set, or a local folder of images or Parquet files."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "test",
    image_column: Annotated[str, typer.Option("--image_column", help="Column of the images.")] = "image",
    label_column: Annotated[
        str | None, typer.Option("--label_column", help="Column of the labels; by default label, where there is one.")
    ] = None,
    num_images: Annotated[int, typer.Option("--num_images", help="Of the data set, in a shuffled order.", min=2)] = 500,
    output: Annotated[Path, typer.Option(help="Folder of the pictures, PNG files.")] = Path("inspection"),
    report: Annotated[Path | None, typer.Option(help="An HTML page of all pictures, one file.")] = None,
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

        from .report import Picture, dictionary_pictures, html_report, image_pictures, latent_pictures
    except ModuleNotFoundError as error:
        _stop(f"inspect needs {error.name}: pip install ctrl-csc-hf[inspect]")
    loaded, processor = _load_model(model, "--model").float(), _load_image_processor(model)
    if loaded.config.num_channels != 3:
        raise typer.BadParameter(
            f"must be of RGB images, got {loaded.config.num_channels} channels", param_hint="--model"
        )
    paths = image or sorted(_folder(model).glob("examples/*.png"))
    photos = [_open_image(path, "--image") for path in paths]
    many, labels, class_names = photos, None, None
    if dataset_name is not None:
        many, labels, class_names = _read_dataset(dataset_name, split, image_column, label_column, num_images)
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}_{index}" for index, name in enumerate(names, 1)]
    shown = dict(zip(names, photos, strict=True)) or dict(zip(["image"], many, strict=False))
    if not image:
        shown = dict(islice(shown.items(), 1))

    chapters: dict[str, list[Picture]] = {}
    try:
        pixel_values: Any = processor(many, return_tensors="pt").pixel_values if many else None
        chapters["Atoms"] = dictionary_pictures(loaded, pixel_values)
        for name, photo in shown.items():
            pixels = processor(photo, return_tensors="pt").pixel_values[0]
            chapters[f"Image {name}"] = image_pictures(loaded, pixels, name)
        if dataset_name is not None:
            chapters["Latent space"] = latent_pictures(loaded, pixel_values, labels, class_names)
    except (ValueError, TypeError) as error:  # what the processor and the model refuse
        _stop(str(error))
    output.mkdir(parents=True, exist_ok=True)
    for picture in (picture for pictures in chapters.values() for picture in pictures):
        path = output / (re.sub(r"[^\w-]+", "_", picture.name) + ".png")
        path.write_bytes(picture.png)
        typer.echo(f"{picture.title}: {path}")
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(html_report(loaded, Path(model).absolute().name, chapters), encoding="utf-8")
        typer.echo(f"All of it: {report}")


@app.command()
def publish(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that train.py wrote.", exists=True, file_okay=False)],
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
    model = _load_model(str(checkpoint), "CHECKPOINT")
    try:
        if dry_run is not None:
            hub.export(model, dry_run, repo_id=repo_id, checkpoint=checkpoint, license=license, half=half)
            typer.echo(f"Written, not uploaded: {dry_run}")
        else:
            typer.echo(f"Published: {hub.publish(checkpoint, repo_id, private=private, license=license, half=half)}")
    except (OSError, ValueError) as error:  # what the Hub refuses is an OSError
        _stop(str(error))
    except HTTPError as error:
        _stop(f"the Hub at {constants.ENDPOINT} does not answer: {error}")


@app.command()
def fit_sampler(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that train.py wrote.", exists=True, file_okay=False)],
    dataset_name: Annotated[str, typer.Option("--dataset_name", help="The training images: a Hub id or a folder.")],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    image_column: Annotated[str, typer.Option("--image_column", help="Column of the images.")] = "image",
    label_column: Annotated[
        str | None,
        typer.Option("--label_column", help="Of integers, a component each; without, groups are sought."),
    ] = None,
    num_images: Annotated[int | None, typer.Option("--num_images", help="Fit on the first ones alone.", min=2)] = None,
) -> None:
    """Fits what CtrlCscPipeline.sample draws from on a data set's latents, and writes it into CHECKPOINT/sampler."""
    loaded, processor = _load_model(str(checkpoint), "CHECKPOINT"), _load_image_processor(str(checkpoint))
    try:
        import datasets

        from .encoding import encode_dataset
        from .fitting import fit_sampler as fit
    except ModuleNotFoundError as error:
        _stop(f"fit-sampler needs {error.name}: pip install ctrl-csc-hf[train]")
    try:
        dataset = datasets.load_dataset(dataset_name, split=split, streaming=True)
        if num_images is not None:
            dataset = dataset.take(num_images)
        batches = encode_dataset(dataset, loaded, processor, image_column=image_column, label_column=label_column)
        sampler = fit(batches)
    except (OSError, ValueError) as error:
        _stop(str(error))
    sampler.save_pretrained(checkpoint / hub.SAMPLER)
    kind = "groups" if sampler.labels is None else "classes"
    ranks = f"{min(sampler.ranks)} to {max(sampler.ranks)} of {sampler.means.shape[1]} directions"
    typer.echo(f"Components: {len(sampler.ranks)} {kind}, of {ranks}")
    typer.echo(f"Sampler: {checkpoint / hub.SAMPLER}")


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A folder that train.py wrote, or a Hub repository.")],
    port: Annotated[int, typer.Option(help="Of the page, on this machine.")] = 7860,
) -> None:
    """Starts the page of the Space spaces/ctrl-csc on a model: what is inside it, and what it makes of images."""
    loaded, processor = _load_model(model, "--model"), _load_image_processor(model)
    try:
        build = runpy.run_path(str(SPACE / "app.py"))["build"]
        from .pipeline_ctrl_csc import CtrlCscPipeline
        from .sampling import LatentSampler
    except ModuleNotFoundError as error:
        _stop(f"the demo needs {error.name}: pip install ctrl-csc-hf[demo]")

    folder = _folder(model)
    examples = sorted(str(path) for path in folder.glob("examples/*.png"))
    sampler = LatentSampler.from_pretrained(folder / hub.SAMPLER) if (folder / hub.SAMPLER).is_dir() else None
    page = build(CtrlCscPipeline(loaded, processor, sampler), examples)
    try:
        page.launch(server_name="127.0.0.1", server_port=port, max_file_size="10mb", allowed_paths=[str(folder)])
    except OSError as error:
        raise typer.BadParameter(f"must be a free port, got {port}: {error}", param_hint="--port") from error


def _stop(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


def _load_model(path_or_repository: str, argument: str) -> CtrlCscModel:
    try:
        model = AutoModel.from_pretrained(path_or_repository, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:  # transformers' for tensors of other shapes is the last
        raise typer.BadParameter(
            f"must be a folder or a Hub repository with a CTRL-CSC model, got {path_or_repository!r}: {error}",
            param_hint=argument,
        ) from error
    if not isinstance(model, CtrlCscModel):
        raise typer.BadParameter(
            f"must hold a CTRL-CSC model, got {type(model).__name__} in {path_or_repository!r}", param_hint=argument
        )
    return model.eval()


def _folder(path_or_repository: str) -> Path:
    local = Path(path_or_repository)
    return local if local.is_dir() else Path(snapshot_download(path_or_repository))


def _load_image_processor(path_or_repository: str) -> CtrlCscImageProcessor:
    try:
        return CtrlCscImageProcessor.from_pretrained(path_or_repository)
    except OSError as error:
        raise typer.BadParameter(
            f"must hold an image processor beside its model, got {path_or_repository!r}: {error}", param_hint="--model"
        ) from error


def _open_image(path: Path, argument: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except (UnidentifiedImageError, OSError) as error:
        raise typer.BadParameter(
            f"must be images that PIL can read, got {path}: {error}", param_hint=argument
        ) from error


def _read_dataset(
    name: str, split: str, image_column: str, label_column: str | None, count: int
) -> tuple[list[Image.Image], Tensor | None, list[str] | None]:
    """Some images of a data set, their labels and the classes' names, where it has them."""
    try:
        import datasets
    except ModuleNotFoundError:
        _stop("--dataset_name needs datasets: pip install ctrl-csc-hf[inspect]")

    def refuse(argument: str, allowed: str, received: object) -> NoReturn:
        raise typer.BadParameter(f"must be {allowed}, got {received!r}", param_hint=argument)

    try:
        splits = datasets.get_dataset_split_names(name)
        if split not in splits:
            refuse("--split", f"one of {splits}", split)
        # Classes may stand one after the other.
        dataset = datasets.load_dataset(name, split=split, streaming=True).shuffle(seed=0, buffer_size=5 * count)
        features: Any = dataset.features or dataset._resolve_features().features
        if not isinstance(features.get(image_column), datasets.Image):
            columns = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
            refuse("--image_column", f"a column of images, one of {columns}", image_column)
        kind = features.get(label_column or "label")
        rows = list(islice(dataset, count))
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetGenerationError) as error:
        raise typer.BadParameter(
            f"must be a data set of images that can be read, got {name!r}: {error}", param_hint="--dataset_name"
        ) from error
    photos = [row[image_column] for row in rows]
    labels = [row.get(label_column or "label") for row in rows]
    if all(isinstance(label, int) and label >= 0 for label in labels):  # -1 stands for labels kept secret
        return photos, torch.tensor(labels), getattr(kind, "names", None)
    if label_column is not None:
        refuse("--label_column", f"a column of integers of at least 0, of {list(features)}", label_column)
    return photos, None, None
