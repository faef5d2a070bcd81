"""What is inside a model: its atoms, what they add to an image, its latent space; and `ctrl-csc inspect`."""

import base64
import io
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from ctrl_csc_cli import app
from ctrl_csc_hf import CtrlCscConfig, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.inspection import anatomy
from ctrl_csc_hf.inspection.visualization import atom_atlas, correlation_map, region_maps

CONFIG = {
    "image_size": 16,
    "latent_dim": 8,
    "stage_channels": [6, 7],
    "kernel_sizes": [4, 4, 4],
    "strides": [2, 2, 1],
    "paddings": [1, 1, 0],
    "sparsity": 0.02,
}
LAST = 3


def lived_in(**fields) -> CtrlCscModel:
    """A model whose norms, biases and scales are no longer those of the start."""
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(**CONFIG, **fields)).eval()
    with torch.no_grad():
        for half in (model.encoder, model.decoder):
            for norm in half.norms:
                norm.running_mean.normal_(std=0.2)
                norm.running_var.uniform_(0.5, 2)
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(std=0.2)
        model.decoder.output_scale.uniform_(0.5, 1.5)
        model.decoder.output_bias.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> CtrlCscModel:
    return lived_in()


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def before_tanh(model: CtrlCscModel, latents: torch.Tensor) -> torch.Tensor:
    """By the model itself, in float64, where atanh undoes tanh."""
    exact = CtrlCscModel(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        return torch.atanh(exact.decode(latents.double()).reconstruction)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stage", [1, 2, LAST])
def test_a_stages_contributions_and_the_bias_add_up_to_the_reconstruction_before_tanh(shared: bool, stage: int) -> None:
    model = lived_in(share_dictionaries=shared)
    latents = model.encode(images(3)).latents[1:2].detach()
    parts, bias = anatomy.contributions(model.decoder, latents, stage)
    assert len(parts) == [6, 7, 8][stage - 1] and parts.std() > 1e-3
    torch.testing.assert_close((parts.sum(dim=0) + bias).double(), before_tanh(model, latents)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", [1, 2, LAST])
def test_a_contribution_is_the_derivative_along_the_codes_of_its_atom(model: CtrlCscModel, stage: int) -> None:
    """Relu is linear near an image: the slope of the decoder, from its own codes on, by differences in float64."""
    exact = CtrlCscModel(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    latents = exact.encode(images(1).double()).latents.detach()
    parts, _ = anatomy.contributions(exact.decoder, latents, stage)
    codes = anatomy.decoder_codes(exact.decoder, latents)[stage - 1]
    step = 1e-6
    for atom in range(codes.shape[1]):
        direction = torch.zeros_like(codes)
        direction[:, atom] = codes[:, atom]
        ahead, behind = (
            torch.atanh(anatomy.decode_from(exact.decoder, codes + sign * step * direction, stage)) for sign in (1, -1)
        )
        torch.testing.assert_close(parts[atom], ((ahead - behind) / (2 * step))[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", [1, 2, LAST])
def test_decoding_the_decoders_own_codes_from_any_stage_on_gives_the_reconstruction(
    model: CtrlCscModel, stage: int
) -> None:
    latents = model.encode(images(3)).latents.detach()
    codes = anatomy.decoder_codes(model.decoder, latents)
    assert [tuple(c.shape[1:]) for c in codes] == [(6, 8, 8), (7, 4, 4), (8, 1, 1)]
    reconstruction = model.decode(latents).reconstruction
    rebuilt = anatomy.decode_from(model.decoder, codes[stage - 1], stage)
    torch.testing.assert_close(rebuilt, reconstruction, atol=1e-5, rtol=0)


def test_codes_of_the_encoder_go_through_the_decoders_stages_below_them() -> None:
    """Of dictionaries that are shared: A_1 of relu of the decoder's norm of A_2 z_2."""
    model = lived_in(share_dictionaries=True)
    codes, decoder = model.encode(images(2), output_codes=True).codes, model.decoder
    signal = F.conv_transpose2d(codes[1], model.encoder.stages[1].dictionary, stride=2, padding=1)
    norm = decoder.norms[0]
    signal = F.relu(F.batch_norm(signal, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    signal = F.conv_transpose2d(signal, model.encoder.stages[0].dictionary, stride=2, padding=1)
    expected = torch.tanh(signal * decoder.output_scale[:, None, None] + decoder.output_bias[:, None, None])
    torch.testing.assert_close(anatomy.decode_from(decoder, codes[1], 2), expected.detach(), atol=1e-5, rtol=0)


def test_an_atom_in_pixels_is_the_sum_of_the_atoms_below_it_each_at_its_place(model: CtrlCscModel) -> None:
    first, second = (stage.dictionary.detach().numpy() for stage in model.decoder.stages)
    torch.testing.assert_close(anatomy.atoms_in_pixels(model.decoder, 1), model.decoder.stages[0].dictionary.detach())
    expected = np.zeros((7, 3, 10, 10), np.float32)
    for atom, channel, row, column in np.ndindex(second.shape):
        place = expected[atom, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
        place += second[atom, channel, row, column] * first[channel]
    torch.testing.assert_close(anatomy.atoms_in_pixels(model.decoder, 2), torch.from_numpy(expected))


def test_the_last_stages_atoms_fill_the_image_and_are_adjoint_to_the_linear_encoder(model: CtrlCscModel) -> None:
    encoder, picture = model.encoder, images(1)
    signal = picture
    for stage in (*encoder.stages, encoder.last_stage):
        signal = F.conv2d(signal, stage.dictionary, stride=stage.stride, padding=stage.padding)
    atoms = anatomy.atoms_in_pixels(encoder, LAST)
    assert atoms.shape == (8, 3, 16, 16)
    torch.testing.assert_close((atoms * picture).sum(dim=(1, 2, 3)), signal.detach().flatten(), atol=1e-5, rtol=1e-4)


def test_the_largest_codes_of_each_image_are_kept_and_nothing_else() -> None:
    codes = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    kept = anatomy.keep_largest(codes, 5)
    for before, after in zip(codes, kept, strict=True):
        threshold = before.abs().flatten().sort(descending=True).values[4]
        assert torch.equal(after, before.where(before.abs() >= threshold, torch.zeros(())))
    assert torch.equal(anatomy.keep_largest(codes, 48), codes)


def test_shares_of_energy_add_up_to_one() -> None:
    codes = torch.tensor([[1.0, 2.0], [2.0, 0.0]])[:, :, None, None]
    torch.testing.assert_close(anatomy.energy_shares(codes), torch.tensor([5 / 9, 4 / 9]))
    assert torch.equal(anatomy.energy_shares(torch.zeros(2, 3, 4, 4)), torch.zeros(3))


def test_use_is_the_share_of_the_energy_of_all_images_whatever_the_batches(model: CtrlCscModel) -> None:
    latents = F.normalize(torch.randn(70, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for codes, use in zip(
        anatomy.decoder_codes(model.decoder, latents), anatomy.atom_use(model.decoder, latents), strict=True
    ):
        energy = codes.double().square().sum(dim=(0, 2, 3))
        torch.testing.assert_close(use.double(), energy / energy.sum(), atol=1e-6, rtol=1e-4)


def test_a_region_belongs_to_the_atom_that_contributes_most_around_it() -> None:
    parts = torch.zeros(3, 3, 16, 16)
    parts[2, :, :, :8], parts[1, :, :, 8:], parts[0] = -1.0, 0.5, 0.1
    leading = anatomy.leading_atoms(parts)
    assert (leading[:, :8] == 2).all() and (leading[:, 9:] == 1).all()


def test_squared_singular_values_are_the_second_moments_eigenvalues() -> None:
    latents = F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    values = anatomy.spectrum(latents)
    torch.testing.assert_close(values.square().sum(), torch.ones(()))
    torch.testing.assert_close(values.square().flip(0), torch.linalg.eigvalsh(latents.T @ latents / 20))


def test_principal_directions_hold_the_most_of_what_is_orthogonal_to_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = F.normalize(torch.randn(40, 8, generator=generator) * torch.arange(1, 9) + 3, dim=1)
    mean, directions, shares = anatomy.principal_directions(latents, 3)
    torch.testing.assert_close(mean, F.normalize(latents.mean(dim=0), dim=0))
    frame = torch.cat([mean[None], directions])
    torch.testing.assert_close(frame @ frame.T, torch.eye(4), atol=1e-5, rtol=0)
    projector = torch.eye(8) - torch.outer(mean, mean)
    moment = projector @ latents.T @ latents @ projector
    eigenvalues = torch.linalg.eigvalsh(moment).flip(0)
    torch.testing.assert_close((directions @ moment @ directions.T).diagonal(), eigenvalues[:3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shares, eigenvalues[:3] / eigenvalues.sum(), atol=1e-4, rtol=0)


def test_a_walk_stays_on_the_sphere_and_turns_by_its_angles() -> None:
    start, direction = torch.eye(5)[:2]
    angles = torch.tensor([-1.0, 0.0, 0.5, math.pi / 2])
    points = anatomy.walk(start, direction, angles)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(4))
    assert torch.equal(points[1], start)
    torch.testing.assert_close(points[3], direction, atol=1e-6, rtol=0)
    torch.testing.assert_close((points @ start).acos(), angles.abs())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: anatomy.atoms_in_pixels(m.decoder, 4), "stage must be between 1 and 3, got 4"),
        (lambda m: anatomy.contributions(m.decoder, torch.zeros(1, 8), 0), "stage must be between 1 and 3, got 0"),
        (lambda m: anatomy.contributions(m.decoder, torch.zeros(2, 8), 1), r"those of one image, .*got \(2, 8\)"),
        (lambda m: anatomy.decoder_codes(m.decoder, torch.zeros(2, 7)), r"shape \(n, 8\), got \(2, 7\)"),
        (lambda m: anatomy.decode_from(m.decoder, torch.zeros(1, 6, 4, 4), 1), r"shape \(n, 6, 8, 8\) at stage 1"),
        (lambda m: anatomy.keep_largest(torch.zeros(1, 2, 2, 2), 9), "count must be between 1 and the 8 entries"),
        (lambda m: anatomy.principal_directions(torch.eye(4), 4), "count must be at least 1 and less than n and d"),
        (lambda m: anatomy.principal_directions(torch.eye(2).repeat(2, 1) * torch.tensor([[1.0], [1], [-1], [-1]]), 1),
         "must not cancel out"),
        (lambda m: anatomy.decoder_codes(CtrlCscModel(m.config).train().decoder, torch.zeros(1, 8)), "evaluation mode"),
        (lambda m: correlation_map(torch.eye(4), torch.zeros(3)), r"labels must have shape \(4,\), got \(3,\)"),
        (lambda m: correlation_map(torch.eye(4), None, torch.eye(3)), r"shape of latents, \(4, 4\), got \(3, 3\)"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(model: CtrlCscModel, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


def test_the_correlation_map_holds_the_cosines_ordered_by_class() -> None:
    generator = torch.Generator().manual_seed(0)
    z, zh = (F.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    labels = torch.tensor([1, 0, 2, 0, 1, 0])
    order = [1, 3, 5, 0, 4, 2]
    for reconstructed, other in ((None, z), (zh, zh)):
        figure = correlation_map(z, labels, reconstructed, ["cat", "dog", "ox"])
        axes = figure.axes[0]
        np.testing.assert_allclose(axes.images[0].get_array(), (z[order] @ other[order].T).abs().numpy(), atol=1e-6)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "dog", "ox"]
        np.testing.assert_allclose(axes.get_yticks(), [1, 3.5, 5])
    unordered = correlation_map(z).axes[0].images[0].get_array()
    np.testing.assert_allclose(unordered, (z @ z.T).abs().numpy(), atol=1e-6)


def test_the_atlas_begins_with_the_most_used_atom_or_the_one_of_largest_norm() -> None:
    atoms = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    atoms[3] *= 10
    for use, first in ((torch.tensor([0.1, 0.2, 0.4, 0.0, 0.3]), 2), (None, 3)):
        sheet = atom_atlas(atoms, use, title="stage 1").axes[0].images[0].get_array()
        expected = (atoms[first] / atoms[first].abs().max() + 1) / 2
        np.testing.assert_allclose(sheet[:4, :4], expected.permute(1, 2, 0).numpy(), atol=1e-6)


def test_the_region_map_colours_the_atoms_that_lead_most_pixels() -> None:
    parts = torch.zeros(7, 3, 16, 16)
    parts[4, :, :, :10], parts[2, :, :, 10:] = 1.0, 1.0
    figure = region_maps(torch.zeros(3, 16, 16), [parts], [torch.ones(7, 3, 4, 4)])
    _, regions, first, second, *_ = figure.axes
    number = regions.images[0].get_array()
    assert (number[:, :9] == 0).all() and (number[:, 12:] == 1).all()
    assert first.get_xlabel().startswith("4: ") and second.get_xlabel().startswith("2: ")


# The command


def save(folder: Path, model: CtrlCscModel, examples: int) -> Path:
    model.save_pretrained(folder)
    CtrlCscImageProcessor(image_size=16).save_pretrained(folder)
    (folder / "examples").mkdir()
    for index in range(examples):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "examples" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("inspected"), lived_in(), examples=2)


def inspect(*arguments: object):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def written(folder: Path) -> set[str]:
    for path in folder.iterdir():
        Image.open(path).load()
    return {path.stem for path in folder.iterdir()}


ATOMS = {"atoms_1", "atoms_2", "atoms_3"}
OF_AN_IMAGE = ("codes", "rebuilt", "regions", "contributions")


def test_without_images_the_checkpoints_examples_serve_and_without_these_atoms_are_sorted_by_norm(
    folder: Path, tmp_path: Path
) -> None:
    result = inspect("--model", folder, "--output", tmp_path / "a", "--report", tmp_path / "a.html")
    assert result.exit_code == 0, result.output
    assert written(tmp_path / "a") == ATOMS | {f"0_{what}" for what in OF_AN_IMAGE}
    assert "on 2 images" in (tmp_path / "a.html").read_text(encoding="utf-8")

    bare = save(tmp_path / "bare", lived_in(share_dictionaries=True), examples=0)
    result = inspect("--model", bare, "--output", tmp_path / "b", "--report", tmp_path / "b.html")
    assert result.exit_code == 0, result.output
    assert written(tmp_path / "b") == ATOMS
    assert "sorted by their norm" in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_images_and_a_data_set_with_labels_fill_one_self_contained_page(
    folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    photos, page = [tmp_path / name / "x.png" for name in "ab"], tmp_path / "pages" / "report.html"
    for photo in photos:  # two of one name
        photo.parent.mkdir()
        Image.new("RGB", (20, 24), "orange").save(photo)
    result = inspect(
        "--model", folder, "--image", photos[0], "--image", photos[1], "--dataset_name", image_folder,
        "--split", "train", "--num_images", 30, "--output", tmp_path / "out", "--report", page,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    latent_space = {"singular_values", "correlation", "walk_all_images", "walk_class0", "walk_class1"}
    of_images = {f"x_{index}_{what}" for index in (1, 2) for what in OF_AN_IMAGE}
    expected = ATOMS | of_images | {f"latents_{what}" for what in latent_space}
    assert written(tmp_path / "out") == expected

    html = page.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == len(expected) and html.count("<figcaption>") == len(expected)
    assert not re.search(r"https?:|<link|<script|@import|url\(", html)
    for source in sources:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert '<meta name="viewport" content="width=device-width' in html


def test_a_folder_of_photographs_without_labels_serves_too(folder: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for path in sorted(image_folder.rglob("*.png"))[:4]:
        shutil.copy(path, tmp_path / "photos")
    arguments = ("--dataset_name", tmp_path / "photos", "--split", "train", "--output", tmp_path / "out")
    result = inspect("--model", folder, *arguments)
    assert result.exit_code == 0, result.output
    latent_space = {name for name in written(tmp_path / "out") if name.startswith("latents")}
    assert latent_space == {"latents_singular_values", "latents_correlation", "latents_walk_all_images"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "does not exist"),
        (["--image", "{text}"], "--image: must be images that PIL reads and the model takes"),
        (["--dataset_name", "{empty}"], "--dataset_name: must be a data set of images that can be read"),
        (["--dataset_name", "{images}"], "--split: must be one of ['train'], got 'test'"),
        (["--dataset_name", "{images}", "--split", "train", "--image_column", "img"],
         "Error: --image_column must be one of ['image', 'label'], got 'img'"),
        (["--dataset_name", "{images}", "--split", "train", "--label_column", "image"],
         "Error: --label_column must hold integers, but 'image' holds Image"),
        (["--dataset_name", "{images}", "--num_images", "1"], "--num_images': Input should be greater than"),
        (["--output", "{text}"], "--output: must be a folder or not exist"),
        (["--report", "report.pdf"], "--report: must end in .html, got report.pdf"),
        (["--output", "{text}/out"], "--output: must be where one can write, got"),
        (["--dataset_name", "{images}", "--split", "train", "--output", "{images}/out"],
         "--output: must lie outside of the folder of the images"),
    ],
)  # fmt: skip
def test_what_inspect_cannot_take_is_said_in_words(
    arguments: list[str], message: str, folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    names = {"text": tmp_path / "text.png", "empty": tmp_path / "empty", "images": image_folder}
    given = [argument.format(**names) for argument in arguments]
    result = inspect("--model", folder, "--output", tmp_path / "out", *given)
    assert result.exit_code == (1 if "Error: --" in message else 2)
    words = " ".join(result.output.replace("│", " ").split())
    assert message in words, words
    assert not (tmp_path / "out").exists() and not (image_folder / "out").exists()


def test_without_matplotlib_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = inspect("--model", folder)
    assert result.exit_code == 1 and "inspect needs matplotlib: pip install ctrl-csc-hf[inspect]" in result.output


def test_a_low_pass_that_travels_apart_is_part_of_what_atoms_of_later_stages_make():
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(image_size=16, latent_dim=6, low_pass=True)).eval()
    latents = model.encode(torch.rand(1, 3, 16, 16) * 2 - 1).latents
    xh = model.decode(latents).reconstruction[0]
    codes = anatomy.decoder_codes(model.decoder, latents)
    for stage in (2, 3):
        parts, bias = anatomy.contributions(model.decoder, latents, stage)
        torch.testing.assert_close(torch.tanh(parts.sum(dim=0) + bias), xh, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(anatomy.decode_from(model.decoder, codes[stage - 1], stage)[0], xh)
        assert len(anatomy.atoms_in_pixels(model.encoder, stage)) == parts.shape[0]
