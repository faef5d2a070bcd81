"""The model card of a checkpoint, filled from what the checkpoint holds: no figure is typed by hand."""

import math
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..models.configuration_ctrl_csc import CtrlCscConfig
from ..models.modeling_ctrl_csc import CtrlCscModel
from .records import DAMAGED, read_object, readable

# An installed package has them beside this module, an editable one in the repository.
MODEL_CARDS = next(
    folder
    for folder in (Path(__file__).parents[1] / "model_cards", Path(__file__).parents[3] / "model_cards")
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
# Of metrics.json: a figure's name, its name in the card, its metric type on the Hub, None of rivals, how it is written.
FIGURES = {
    "psnr": ("PSNR, mean over images, dB", "psnr", "{:.2f}"),
    "mean_image_psnr": ("PSNR of the mean image, dB", None, "{:.2f}"),
    "pca_psnr": ("PSNR of PCA with as many numbers, dB", None, "{:.2f}"),
    "match": ("nearest-latent match", "nearest_latent_match", "{:.1%}"),
    "rate": ("R(Z), nats", "coding_rate", "{:.2f}"),
    "reconstructed_rate": ("R(Zh), nats", "reconstructed_coding_rate", "{:.2f}"),
    "rate_reduction": ("dR(Z, Zh), nats", "rate_reduction", "{:.3f}"),
    "ssim": ("SSIM", "ssim", "{:.3f}"),
    "lpips": ("LPIPS", "lpips", "{:.3f}"),
    "frechet_distance": ("Fréchet distance of reconstructions", "frechet_distance", "{:.2f}"),
    "kernel_distance": ("kernel distance of reconstructions", "kernel_distance", "{:.4f}"),
    "feature_cosine": ("cosine of features of an image and its reconstruction", "feature_cosine", "{:.3f}"),
    "pca_frechet_distance": ("Fréchet distance of PCA", None, "{:.2f}"),
    "pca_kernel_distance": ("kernel distance of PCA", None, "{:.4f}"),
    "pca_feature_cosine": ("cosine of features of an image and PCA's reconstruction", None, "{:.3f}"),
    "nonzero_1": ("active codes, stage 1", "active_codes_1", "{:.1%}"),
    "nonzero_2": ("active codes, stage 2", "active_codes_2", "{:.1%}"),
    "nonzero_3": ("active codes, stage 3", "active_codes_3", "{:.1%}"),
    "energy_excess_1": ("energy above its minimum, stage 1", "energy_excess_1", "{:.1%}"),
    "energy_excess_2": ("energy above its minimum, stage 2", "energy_excess_2", "{:.1%}"),
    "energy_excess_3": ("energy above its minimum, stage 3", "energy_excess_3", "{:.1%}"),
    "codes_linear_probe": ("linear probe on the pooled codes, accuracy", "codes_linear_probe", "{:.1%}"),
    "linear_probe": ("linear probe on the latents, accuracy", "linear_probe", "{:.1%}"),
    "knn": ("10 nearest latents, accuracy", "knn", "{:.1%}"),
}
# The task whose snippet the Hub shows, by huggingface.js' packages/tasks/src/model-libraries-snippets.ts: of a
# repository of the library transformers with remote code, pipeline(TASK, model=..., trust_remote_code=True).
TASK = "image-feature-extraction"
LICENCES = {
    "ILSVRC/imagenet-1k": "for non-commercial research and education only, by the terms of ImageNet",
    "uoft-cs/cifar10": "published without a licence, collected from the web",
    "zh-plus/tiny-imagenet": "a part of ImageNet, for non-commercial research and education only, by its terms",
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
    "zh-plus/tiny-imagenet": (
        "Tiny ImageNet holds 200 of ImageNet's categories, objects and animals that web search in English found around "
        "2010, mostly in North America and Europe; images unlike these come out worse."
    ),
}
# Settings that name folders of the machine that trained, or may.
LOCAL_SETTINGS = (
    "cache_dir",
    "logging_dir",
    "output_dir",
    "pretrained_model_name_or_path",
    "resume_from_checkpoint",
    "train_data_dir",
)
# Settings that say what the players minimise, or whether one of them does.
OF_THE_GAME = (
    "objective", "decoder_consistency", "energy", "code_reduction", "code_consistency", "pixel_error",
    "encoder_learning_rate",
)  # fmt: skip
FIGURE = "architecture.png"
METRICS, SETTINGS = "metrics.json", "training_args.json"
EARLIER_RUNS = "earlier_runs"  # of SETTINGS: the same of the runs before, of a model that goes on from another
# What to do about one of these that cannot be read.
REMEDY = "remove it, and the model is published without what it records"
OTHER_BIASES = "Images unlike the training data come out worse, and its biases are the model's."


def model_card(
    model: CtrlCscModel,
    repo_id: str,
    checkpoint: Path | None,
    pictures: list[str],
    license: str | None,
    published: bool = True,
) -> ModelCard:
    """The card of a model.

    Args:
        model: what it describes.
        repo_id: where the reader finds it.
        checkpoint: a folder with what train.py recorded, training_args.json and metrics.json; either may lack.
        pictures: paths in the repository: a grid of reconstructions first, then examples for the widget.
        license: identifier of the weights' licence, as the Hub lists them; None leaves it out.
        published: False for a form that nobody has filled.

    Raises:
        ValueError: for a record that cannot be read, by the file's name.
    """
    settings, metrics = public_settings(checkpoint), public_metrics(checkpoint)
    continued = bool(_read(checkpoint, SETTINGS).get("pretrained_model_name_or_path"))
    with _understood(checkpoint, SETTINGS):
        runs = [settings, *settings.get(EARLIER_RUNS, [])]
        ids = list(dict.fromkeys(run.get("hub_dataset_id") or "" for run in runs))
        played = [run for run in runs if run.get("max_train_steps") != 0]  # a checkpoint without records counts, too
        game, warmup = _game(played[0]) if played and settings else GAME, _warmup(settings)
        labelled = any("multi" in _values(run, "objective") for run in played)
        compares_pixels = any(any(_values(run, "pixel_error")) for run in played)
    with _understood(checkpoint, METRICS):
        figures = [figure for figure in metrics.get("figures", []) if figure["name"] in FIGURES]
        on_hub = [figure for figure in figures if figure["dataset"] is not None and FIGURES[figure["name"]][1]]
        results, eval_results = _groups(figures), [_eval_result(figure) for figure in on_hub]
    grid, examples = (pictures[0], pictures[1:]) if pictures else (None, [])
    card_data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=TASK,
        datasets=[dataset for dataset in ids if dataset] or None,
        tags=["ctrl-csc", "sparse-coding", "closed-loop-transcription", "rate-reduction", "autoencoder"],
        model_name=repo_id.split("/")[-1] if on_hub else None,  # of model-index alone
        eval_results=eval_results or None,
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
        **{field: _of_stages(config, field) for field in ("sparsity", "num_iterations")},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        distortion=settings.get("distortion"),
        game=game,
        labels="J alone uses labels" if labelled else "No labels are used",
        compares_pixels=compares_pixels,
        warmup=warmup,
        continued=continued,
        settings=settings,
        played=bool(played),
        dataset=" and ".join(_described(dataset) for dataset in ids),
        results=results,
        biases=" ".join(dict.fromkeys(BIASES.get(dataset, OTHER_BIASES) for dataset in ids)),
    )


def training_datasets(settings: dict[str, Any]) -> list[str | None]:
    """The Hub ids of the images of all runs that made a model, by `public_settings`; None for local or unknown ones."""
    earlier = settings.get(EARLIER_RUNS, [])
    ids = [run.get("hub_dataset_id") for run in (settings, *earlier)]
    is_unknown = bool(settings.get("pretrained_model_name_or_path")) and not earlier
    return list(dict.fromkeys([*ids, *[None] * is_unknown]))


def _described(dataset: str) -> str:
    """A data set's name with its licence, where it is known."""
    name = f"`{dataset}`" if dataset else "local images"
    return f"{name}, {LICENCES[dataset]}" if dataset in LICENCES else name


def _groups(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures by what they were measured on, with their rows: name, value, number of images."""
    groups: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    for figure in figures:
        groups.setdefault((figure["dataset"], figure["split"]), []).append(figure)
    found = []
    for (dataset, split), group in groups.items():
        values = {figure["name"]: figure["value"] for figure in group}
        psnr, mean_image = values.get("psnr", math.inf), values.get("mean_image_psnr", -math.inf)
        found.append(
            {
                "images": f"`{dataset}`, split {split}" if dataset else f"local images, split {split}",
                "measured_by": " and ".join(dict.fromkeys(figure["measured_by"] for figure in group)),
                "rows": [
                    (_label(figure), FIGURES[figure["name"]][2].format(figure["value"]), figure["num_images"])
                    for figure in group
                ],
                "learned_nothing": not psnr > mean_image,
                "psnr": psnr,
                "mean_image_psnr": mean_image,
            }
        )
    return found


def _eval_result(figure: dict[str, Any]) -> EvalResult:
    metric_type = FIGURES[figure["name"]][1]
    assert metric_type is not None
    return EvalResult(
        task_type=TASK,
        dataset_type=figure["dataset"],
        dataset_name=figure["dataset"].split("/")[-1],
        dataset_split=figure["split"],
        metric_type=metric_type,
        metric_name=_label(figure),
        metric_value=figure["value"],
    )


def _label(figure: dict[str, Any]) -> str:
    label = FIGURES[figure["name"]][0]
    return f"{label}, features of {figure['feature_model']}" if figure["feature_model"] else label


def _game(settings: dict[str, Any]) -> str:
    """What the players minimise, by the settings of train.py; the formulas are closed_loop.py's."""

    def loss(start: str, terms: tuple[tuple[str, str], ...]) -> str:
        weighted = [f"{settings[name]:g} {term}" for name, term in terms if settings.get(name)]
        return " + ".join([start, *weighted])

    encoder = loss("-J", (("energy", "E"),))
    decoder = loss(
        "J", (("decoder_consistency", "S"), ("code_consistency", "S_c"), ("pixel_error", "1/2 |x - xh|^2 per pixel"))
    )
    utility = UTILITIES[settings.get("objective", "binary")]
    weights = settings.get("code_reduction", [0.0])
    if len(weights) == 1 and weights[0]:
        utility += f" + {weights[0]:g} sum_l dR(C_l, Ch_l)"
    elif any(weights):
        utility += "".join(
            f" + {weight:g} dR(C_{stage}, Ch_{stage})" for stage, weight in enumerate(weights, 1) if weight
        )
    changed = any(len(_values(settings, name)) > 1 for name in OF_THE_GAME)
    text = f"{'In the end, with' if changed else 'With'} J = {utility}, "
    if settings.get("encoder_learning_rate") == 0:
        encoder = ""
        text += f"the decoder minimises {decoder}; the encoder stands still"
    else:
        text += f"the encoder minimises {encoder}, the decoder {decoder}"
    if " S" in decoder.replace(" S_c", ""):
        text += "; S is the mean of 1 - cos(z_i, zh_i)"
    if any(weights) or " S_c" in decoder:
        text += "; C_l are the normalised codes of stage l of images, Ch_l those of reconstructions"
    if " S_c" in decoder:
        text += ", S_c the mean of (C_l - Ch_l)^2, summed over stages"
    if " E" in encoder:
        text += "; E is the energy above, of all stages, per pixel"
    return text


def _values(settings: dict[str, Any], name: str) -> list[Any]:
    """The values that a setting had in the game, the last one first: of a resumed run perhaps several."""
    changes = [c for c in settings.get("changed_on_resume", []) if c["setting"] == name and c["step"] > 0]
    return [settings.get(name), *(change["before"] for change in changes)]


def _of_stages(config: CtrlCscConfig, field: str) -> str:
    """The value of a field of all stages, or each one's."""
    values = [f"{value:g}" for value in config.of_stages(field)]
    return values[0] if len(set(values)) == 1 else " and ".join(values)


def _warmup(settings: dict[str, Any]) -> str:
    """What came before the game, by the settings of train.py."""
    kinds = (
        ("energy_warmup_steps", "on the sparse-coding energy alone"),
        ("deconvolution_warmup_steps", "on 1/2 |x - g(f(x))|^2"),
    )
    return " and ".join(f"{settings[name]} {what}" for name, what in kinds if settings.get(name))


def public_settings(checkpoint: Path | None) -> dict[str, Any]:
    """training_args.json without what is local to the machine that trained; empty where there is none.

    Raises:
        ValueError: if it cannot be read.
    """
    with _understood(checkpoint, SETTINGS):
        return _public(_read(checkpoint, SETTINGS))


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    dataset = settings.get("hub_dataset_id")

    def is_public(name: str, value: Any) -> bool:
        if name == "dataset_name":
            return dataset is not None and value == dataset
        if name in LOCAL_SETTINGS or (name == "dataset_config_name" and dataset is None):
            return False
        return name.startswith("hub_") or not (isinstance(value, str) and re.search(r"[/\\]", value))

    public = {name: value for name, value in settings.items() if is_public(name, value)}
    if settings.get("pretrained_model_name_or_path"):  # that there was one is told, not where it lay
        public["pretrained_model_name_or_path"] = "a model trained before"
    if "changed_on_resume" in settings:
        public["changed_on_resume"] = [
            change for change in settings["changed_on_resume"] if change["setting"] in public
        ]
    if EARLIER_RUNS in settings:
        public[EARLIER_RUNS] = [_public(run) for run in settings[EARLIER_RUNS]]
    return public


def public_metrics(checkpoint: Path | None) -> dict[str, Any]:
    """metrics.json as the card reads it, see `FIGURES`; empty where it has no figures.

    Raises:
        ValueError: if it cannot be read.
    """
    metrics = _read(checkpoint, METRICS)
    entries = ("step", "unreadable_images", "figures", "evaluation")
    return {name: metrics[name] for name in entries if name in metrics} if metrics.get("figures") else {}


def _read(checkpoint: Path | None, name: str) -> dict[str, Any]:
    with _understood(checkpoint, name):
        return read_object(checkpoint / name) if checkpoint and (checkpoint / name).is_file() else {}


def _understood(checkpoint: Path | None, name: str) -> AbstractContextManager[None]:
    return readable((checkpoint or Path()) / name, REMEDY, (*DAMAGED, ValueError))
