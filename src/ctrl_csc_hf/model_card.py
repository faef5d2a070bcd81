"""The model card of a checkpoint, filled from what the checkpoint holds: no figure is typed by hand."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .modeling_ctrl_csc import CtrlCscModel

# An installed package has them beside this module, an editable one in the repository.
MODEL_CARDS = next(
    folder
    for folder in (Path(__file__).parent / "model_cards", Path(__file__).parents[2] / "model_cards")
    if folder.is_dir()
)

UTILITIES = {
    "binary": "dR(Z, Zh) = R(Z u Zh) - R(Z)/2 - R(Zh)/2",
    "multi": "dR(Z | y) + dR(Zh | y) + sum_k dR(Z_k, Zh_k)",
    "unsupervised": "R(Z) + dR(Z, Zh)",
}
GAME = (
    "Encoder and decoder play a game: the encoder raises dR(Z, Zh) = R(Z u Zh) - R(Z)/2 - R(Zh)/2, which tells the "
    "latents of images and of their reconstructions apart, the decoder lowers it"
)
# Of metrics.json, which train.py writes and evaluate.py adds to: its entry, the figure's name in the card, its metric
# type, how it is written.
FIGURES = (
    ("held_out_psnr", "PSNR, mean over images, dB", "psnr", "{:.2f}"),
    ("held_out_match", "nearest-latent match", "nearest_latent_match", "{:.1%}"),
    ("held_out_rate", "R(Z), nats", "coding_rate", "{:.2f}"),
    ("held_out_rate_reduction", "dR(Z, Zh), nats", "rate_reduction", "{:.3f}"),
    ("ssim", "SSIM", "ssim", "{:.3f}"),
    ("lpips", "LPIPS", "lpips", "{:.3f}"),
    ("frechet_distance", "Fréchet distance of reconstructions", "frechet_distance", "{:.2f}"),
    ("kernel_distance", "kernel distance of reconstructions", "kernel_distance", "{:.4f}"),
    ("linear_probe", "linear probe on the latents, accuracy", "linear_probe", "{:.1%}"),
    ("knn", "10 nearest latents, accuracy", "knn", "{:.1%}"),
    ("unseen_psnr", "PSNR on a data set not trained on, dB", "unseen_psnr", "{:.2f}"),
    ("unseen_match", "nearest-latent match there", "unseen_match", "{:.1%}"),
)
LICENCES = {
    "ILSVRC/imagenet-1k": "for non-commercial research and education only, by the terms of ImageNet",
    "uoft-cs/cifar10": "published without a licence, collected from the web",
}
BIASES = {
    "ILSVRC/imagenet-1k": (
        "ImageNet shows the objects and people that web search in English found around 2010, mostly in North America "
        "and Europe, with known stereotypes among its categories of people; images unlike these come out worse."
    ),
    "uoft-cs/cifar10": (
        "CIFAR-10 holds ten classes of animals and vehicles, small, centred and collected from the web in English; "
        "faces, text and whatever else it lacks come out worse."
    ),
}
LOCAL_FOLDERS = ("cache_dir", "logging_dir", "output_dir", "resume_from_checkpoint", "train_data_dir")
FIGURE = "architecture.png"
OTHER_BIASES = "Images unlike the training data come out worse, and its biases are the model's."


def model_card(
    model: CtrlCscModel,
    repo_id: str,
    checkpoint: Path | None,
    pictures: list[str],
    license: str,
    published: bool = True,
) -> ModelCard:
    """The card of a model.

    Args:
        model: what it describes.
        repo_id: where the reader finds it.
        checkpoint: a folder with what train.py recorded, training_args.json and metrics.json; either may lack.
        pictures: paths in the repository: a grid of reconstructions first, then examples for the widget.
        license: identifier of the weights' licence, as the Hub lists them.
        published: False for a form that nobody has filled.
    """
    settings, metrics = public_settings(checkpoint), _read(checkpoint, "metrics.json")
    continued = bool(_read(checkpoint, "training_args.json").get("pretrained_model_name_or_path"))
    is_on_hub = "dataset_name" in settings
    dataset = settings.get("dataset_name", "a local folder of images")
    split = settings.get("validation_split") or settings.get("train_split")
    results = [
        (name, kind, form.format(metrics[key]), metrics[key]) for key, name, kind, form in FIGURES if key in metrics
    ]
    count = metrics.get("held_out_images", settings.get("num_validation_images", ""))
    grid, examples = (pictures[0], pictures[1:]) if pictures else (None, [])
    card_data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-to-image",
        datasets=[dataset] if is_on_hub else None,
        tags=["ctrl-csc", "sparse-coding", "closed-loop-transcription", "rate-reduction", "autoencoder", "diffusers"],
        model_name=repo_id.split("/")[-1] if is_on_hub and results else None,  # of model-index alone
        eval_results=[
            EvalResult(
                task_type="image-to-image",
                dataset_type=dataset,
                dataset_name=dataset.split("/")[-1],
                dataset_split=split,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
            for name, kind, _, value in results
        ]
        if is_on_hub and results
        else None,
        widget=[{"src": path, "example_title": Path(path).stem} for path in examples] or None,
    )
    config = model.config
    return ModelCard.from_template(
        card_data,
        template_str=(MODEL_CARDS / "template.md").read_text(encoding="utf-8"),
        model_name=repo_id.split("/")[-1],
        published=published,
        repo_id=repo_id,
        picture=grid,
        figure=FIGURE,
        config=config,
        stage_channels=", ".join(map(str, config.stage_channels)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        distortion=settings.get("distortion"),
        game=_game(settings) if settings else GAME,
        labels="J alone uses labels" if settings.get("objective") == "multi" else "No labels are used",
        warmup=_warmup(settings),
        continued=continued,
        settings=settings,
        dataset=f"`{dataset}`" if is_on_hub else dataset,
        dataset_licence=LICENCES.get(dataset),
        results=[(name, text) for name, _, text, _ in results],
        results_on=(
            f"{count} held-out images of {dataset} ({split})" if settings else "held-out images of an unknown data set"
        ),
        evaluated="held_out_images" in metrics,
        biases=BIASES.get(dataset, OTHER_BIASES),
    )


def _game(settings: dict[str, Any]) -> str:
    """What the players minimise, by the settings of train.py; the formulas are closed_loop.py's."""

    def loss(start: str, terms: tuple[tuple[str, str], ...]) -> str:
        weighted = [f"{settings[name]:g} {term}" for name, term in terms if settings.get(name)]
        return " + ".join([start, *weighted])

    encoder = loss("-J", (("encoder_consistency", "S"), ("augmentation_consistency", "S_a"), ("energy", "E")))
    decoder = loss("J", (("decoder_consistency", "S"),))
    utility = UTILITIES[settings.get("objective", "binary")]
    text = f"With J = {utility}, the encoder minimises {encoder}, the decoder {decoder}"
    distance = {"cosine": "1 - cos(z_i, zh_i)", "rate": "dR(z_i, zh_i)"}[settings.get("consistency", "cosine")]
    if " S" in encoder + decoder:
        text += f"; S is the mean of {distance}"
    if " S_a" in encoder:
        text += ", S_a the same between the latents of images and of augmented ones"
    if " E" in encoder:
        text += "; E is the energy above, of all stages, per pixel"
    return text


def _warmup(settings: dict[str, Any]) -> str:
    """What came before the game, by the settings of train.py."""
    kinds = (
        ("energy_warmup_steps", "on the sparse-coding energy alone"),
        ("deconvolution_warmup_steps", "on 1/2 |x - g(f(x))|^2"),
    )
    return " and ".join(f"{settings[name]} {what}" for name, what in kinds if settings.get(name))


def public_settings(checkpoint: Path | None) -> dict[str, Any]:
    """training_args.json less what names folders of the machine that trained; empty where there is none."""
    settings = {
        key: value for key, value in _read(checkpoint, "training_args.json").items() if key not in LOCAL_FOLDERS
    }
    for key in ("dataset_name", "pretrained_model_name_or_path"):
        value = settings.get(key) or ""
        if Path(value).exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", value):  # no name of a Hub repository
            settings.pop(key, None)
    return settings


def _read(checkpoint: Path | None, name: str) -> dict[str, Any]:
    path = None if checkpoint is None else checkpoint / name
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
