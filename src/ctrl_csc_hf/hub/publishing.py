"""A checkpoint as a Hub repository: the folder of repository_ctrl_csc.py with a card, figures and pictures."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.image_processing_utils import BaseImageProcessor

from ..inspection.visualization import architecture_figure
from ..models.image_processing_ctrl_csc import CtrlCscImageProcessor
from ..models.modeling_ctrl_csc import CtrlCscModel
from ..models.repository_ctrl_csc import CARD_TAG, RECORDS, save_repository
from ..models.repository_ctrl_csc import SAMPLER as SAMPLER
from ..models.repository_ctrl_csc import save_sampler as save_sampler
from ..models.sampling import LatentSampler
from .model_card import (
    FIGURE,
    METRICS,
    MODEL_CARDS,
    SETTINGS,
    model_card,
    public_metrics,
    public_settings,
    training_datasets,
)
from .records import DAMAGED, readable

GRID = "reconstructions.png"
# What only some checkpoints have, and code that may be renamed: of these no older publication's files stay.
REPLACED = ("image_processor/*.py", "model/*.py", f"{SAMPLER}/*", *RECORDS)


def export(
    model: CtrlCscModel,
    folder: str | Path,
    *,
    repo_id: str = "ORGANIZATION/NAME",
    checkpoint: str | Path | None = None,
    image_processor: BaseImageProcessor | None = None,
    sampler: LatentSampler | None = None,
    license: str | None = None,
    half: bool = False,
) -> Path:
    """Writes the folder of a Hub repository: weights, configuration, image processor, the code of all, and the card.

    The same model gives the same bytes. Files of the same names are overwritten, but no README.md of others; card,
    figures, pictures and sampler of another model that the folder holds are removed; others stay.

    Args:
        model: what to publish.
        folder: is made if it does not exist.
        repo_id: where it will be published, "organization/name", which the card tells.
        checkpoint: the folder that train.py wrote; the card tells its settings and figures, and shows its pictures.
        image_processor: the model's; by default the checkpoint's, or the one of the model's image size.
        sampler: the pipeline's; by default the checkpoint's, if it has one.
        license: identifier of the weights' licence, as the Hub lists them; None leaves it out of the card.
        half: whether the file holds the dictionaries in float16, half as large; the model is loaded in its own
            precision, with atoms made unit vectors again.

    Raises:
        ValueError: if `repo_id` has another form, if `folder` is a file, the checkpoint or holds a README.md that
            is no card of this package, and if a file of the checkpoint cannot be read.
    """
    folder = Path(folder)
    readme = folder / "README.md"
    if readme.is_file() and CARD_TAG not in readme.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"folder must not hold {readme}, which is no card of this package: name another, or move it")
    checkpoint = None if checkpoint is None else Path(checkpoint)
    _check_name(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id must be ORGANIZATION/NAME, got {repo_id!r}")
    if checkpoint is not None and folder.resolve() == checkpoint.resolve():
        raise ValueError(f"folder must be another one than the checkpoint's, got {folder}")
    image_processor = image_processor or _image_processor(model, checkpoint)
    pictures: list[str] = []
    if checkpoint is not None:
        pictures = [GRID, *sorted(f"examples/{path.name}" for path in checkpoint.glob("examples/*.png"))]
        pictures = [name for name in pictures if (checkpoint / name).is_file()]
        _check_finished(checkpoint)
    card = model_card(model, repo_id, checkpoint, pictures, license)
    save_repository(folder, model, image_processor, sampler or _sampler(checkpoint))
    if half:
        _store_in_half(folder / "model.safetensors")
    shutil.copyfile(MODEL_CARDS / "handler.py", folder / "handler.py")
    architecture_figure(model.config).save(folder / FIGURE)
    if checkpoint is not None:
        for name in ("training_curve.png", *pictures):
            if (checkpoint / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)
        records = {METRICS: public_metrics(checkpoint), SETTINGS: public_settings(checkpoint)}
        for name, record in records.items():
            if record:
                (folder / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return folder


def publish(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    half: bool = False,
) -> str:
    """Uploads a checkpoint in the form of `export`, as one commit: a reader sees all of it or nothing.

    Where nothing has changed, nothing is uploaded. After an upload that broke off the next one goes on with it. What
    an older publication had and this one lacks, such as figures and examples, is removed (`REPLACED`); files that
    others added stay.

    Args:
        checkpoint: a folder that `save_pretrained` or train.py wrote.
        repo_id: "organization/name", or "name" for the account's own; is created if it does not exist.
        private: whether a repository that is created is private; None as `publication_terms` says.
        license: identifier of the weights' licence, as the Hub lists them; None as `publication_terms` says.
        half: as in `export`.

    Returns:
        The repository's address.

    Raises:
        ValueError: as `publication_terms`, and if the repository must be private and is public.
    """
    model = CtrlCscModel.from_pretrained(checkpoint)
    _check_finished(Path(checkpoint))
    _check_name(repo_id)
    license, private = publication_terms(training_datasets(public_settings(Path(checkpoint))), license, private)
    repository = make_repository(repo_id, private)
    with TemporaryDirectory() as folder:
        export(model, folder, repo_id=repository.repo_id, checkpoint=checkpoint, license=license, half=half)
        HfApi().upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            delete_patterns=list(REPLACED),
            commit_message="Publish with ctrl-csc-hf",
        )
    return str(repository)


def make_repository(repo_id: str, private: bool) -> RepoUrl:
    """The repository of a model, which is made if it does not exist.

    Raises:
        ValueError: for a name that is none, and if it must be private and is public.
    """
    _check_name(repo_id)
    repository = HfApi().create_repo(repo_id, private=private, exist_ok=True)
    if private and not HfApi().model_info(repository.repo_id).private:
        raise ValueError(
            f"private is {private}, but the repository {repository.repo_id} is public: make it private on the Hub, or "
            "publish with private=False (--public or --hub_private_repo False)"
        )
    return repository


def publication_terms(datasets: Sequence[str | None], license: str | None, private: bool | None) -> tuple[str, bool]:
    """Licence and visibility of a model: what is None follows from the data sets that it was trained on.

    Args:
        datasets: their ids on the Hub, None for one that is local or unknown; see `training_datasets`.
        license: None for the data sets' own.
        private: None for private if one of the data sets is private or gated, else public.

    Returns:
        The licence, and whether the repository is private.

    Raises:
        ValueError: if local data leave one of them open, if the data sets have no licence that could be taken, or
            several, and for a licence that the Hub does not list.
    """
    flags = {
        "license (--license or --hub_license)": license,
        "private (--private, --public or --hub_private_repo)": private,
    }
    missing = [name for name, value in flags.items() if value is None]
    if missing and None in datasets:
        raise ValueError(f"{' and '.join(missing)} must be given to publish a model of local data")
    if missing:
        infos = {dataset: HfApi().dataset_info(str(dataset)) for dataset in datasets}
        if private is None:
            private = any(info.private or info.gated for info in infos.values())
        if license is None:
            licences = {dataset: info.card_data.license if info.card_data else None for dataset, info in infos.items()}
            for dataset, found in licences.items():
                if not isinstance(found, str) or found == "unknown":
                    raise ValueError(f"{missing[0]} must be given, as the data set {dataset} has the licence {found!r}")
            if len(set(licences.values())) > 1:
                raise ValueError(f"{missing[0]} must be given, as the data sets have several: {licences}")
            license = str(next(iter(licences.values())))
    assert license is not None and private is not None
    try:
        ModelCard(f"---\nlicense: {json.dumps(license)}\n---\n").validate()
    except ValueError as error:
        raise ValueError(
            f"license (--license or --hub_license) must be one that the Hub lists, got {license!r}: see "
            "https://huggingface.co/docs/hub/repositories-licenses"
        ) from error
    return license, private


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id (--repo_id or --hub_model_id) is no name of a repository: {error}") from error


def _check_finished(checkpoint: Path) -> None:
    """Refuses a state of a run, whose settings tell of steps that were not made and whose weights were not averaged."""
    if (checkpoint / "training_state.json").is_file():
        raise ValueError(
            f"{checkpoint} is a state of a run, not its model: end the run there, by train.py with "
            f"--resume_from_checkpoint {checkpoint} and --max_train_steps of the step that it has reached"
        )


def _store_in_half(path: Path) -> None:
    tensors = load_file(path)
    halved = {name: tensor.half() if name.endswith("dictionary") else tensor for name, tensor in tensors.items()}
    unfinished = path.with_suffix(".unfinished")
    try:
        save_file(halved, unfinished, metadata={"format": "pt"})
        unfinished.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written and is as it was: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _image_processor(model: CtrlCscModel, checkpoint: Path | None) -> BaseImageProcessor:
    path = None if checkpoint is None else checkpoint / "preprocessor_config.json"
    if path is not None and path.is_file():
        with readable(
            path, "remove it, and the processor of the model's image size is published", (*DAMAGED, ValueError)
        ):
            return CtrlCscImageProcessor.from_pretrained(checkpoint)
    return CtrlCscImageProcessor(image_size=model.config.image_size)


def _sampler(checkpoint: Path | None) -> LatentSampler | None:
    if checkpoint is not None and (checkpoint / SAMPLER).is_dir():
        return LatentSampler.from_pretrained(checkpoint / SAMPLER)
    return None
