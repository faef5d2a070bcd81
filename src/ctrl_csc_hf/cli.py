"""The command line, `ctrl-csc`."""

import runpy
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from huggingface_hub import constants, snapshot_download

# httpx's, under whichever of its names huggingface_hub has it.
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from PIL import Image, UnidentifiedImageError
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
    originals = processor([_open_image(path) for path in images], return_tensors="pt").pixel_values
    with torch.inference_mode():
        reconstructions = torch.cat([loaded(batch).reconstruction for batch in originals.split(64)])
    output.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 128 // originals.shape[-1])
    reconstruction_grid(originals, reconstructions, scale=scale).save(output)
    for path, psnr in zip(images, peak_signal_to_noise_ratio(originals, reconstructions).tolist(), strict=True):
        typer.echo(f"{path}: PSNR {psnr:.2f} dB")
    typer.echo(f"Originals above reconstructions: {output}")


@app.command()
def publish(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that train.py wrote.", exists=True, file_okay=False)],
    repo_id: Annotated[str, typer.Option("--repo_id", help="ORGANIZATION/NAME on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    license: Annotated[str, typer.Option(help="Of the weights, as the Hub lists licences.")] = "apache-2.0",
    dry_run: Annotated[Path | None, typer.Option("--dry_run", help="Write the folder here; upload nothing.")] = None,
) -> None:
    """Publishes a checkpoint as a Hub repository, with its code, its model card and an endpoint handler."""
    model = _load_model(str(checkpoint), "CHECKPOINT")
    try:
        if dry_run is not None:
            hub.export(model, dry_run, repo_id=repo_id, checkpoint=checkpoint, license=license)
            typer.echo(f"Written, not uploaded: {dry_run}")
        else:
            typer.echo(f"Published: {hub.publish(checkpoint, repo_id, private=private, license=license)}")
    except (OSError, ValueError) as error:  # what the Hub refuses is an OSError
        _stop(str(error))
    except HTTPError as error:
        _stop(f"the Hub at {constants.ENDPOINT} does not answer: {error}")


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A folder that train.py wrote, or a Hub repository.")],
    port: Annotated[int, typer.Option(help="Of the page, on this machine.")] = 7860,
) -> None:
    """Starts the page of the Space spaces/ctrl-csc on a model: reconstructions, codes, interpolation."""
    loaded, processor = _load_model(model, "--model"), _load_image_processor(model)
    try:
        build = runpy.run_path(str(SPACE / "app.py"))["build"]
        from .pipeline_ctrl_csc import CtrlCscPipeline
    except ModuleNotFoundError as error:
        _stop(f"the demo needs {error.name}: pip install ctrl-csc-hf[demo]")

    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    examples = sorted(str(path) for path in folder.glob("examples/*.png"))
    page = build(CtrlCscPipeline(loaded, processor), examples)
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


def _load_image_processor(path_or_repository: str) -> CtrlCscImageProcessor:
    try:
        return CtrlCscImageProcessor.from_pretrained(path_or_repository)
    except OSError as error:
        raise typer.BadParameter(
            f"must hold an image processor beside its model, got {path_or_repository!r}: {error}", param_hint="--model"
        ) from error


def _open_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except (UnidentifiedImageError, OSError) as error:
        raise typer.BadParameter(
            f"must be images that PIL can read, got {path}: {error}", param_hint="IMAGES"
        ) from error
