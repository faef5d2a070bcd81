"""What comes before the game: dictionaries from the sparse-coding energy, and a decoder that inverts the encoder."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.metrics import peak_signal_to_noise_ratio
from ctrl_csc_hf.training.ema import recompute_statistics
from ctrl_csc_hf.training.warmup import (
    Descent,
    deconvolution_error,
    invert_encoder,
    principal_directions,
    sparse_coding_energy,
)

CONFIG = {
    "image_size": 16,
    "latent_dim": 32,
    "stage_channels": [8, 16],
    "kernel_sizes": [4, 4, 4],
    "strides": [2, 2, 1],
    "paddings": [1, 1, 0],
    "sparsity": 0.02,
    "num_iterations": 2,
    "share_dictionaries": False,
}


def smooth_images(count: int = 64) -> torch.Tensor:
    """(count, 3, 16, 16), pixels in [-1, 1], with nothing finer than 4 pixels."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")


def descend(descent: Descent, images: torch.Tensor, steps: int | None = None, precision: str = "no") -> None:
    """The steps that are left, or `steps` of them."""
    for _ in range(descent.steps - descent.done if steps is None else steps):
        descent.model.project_parameters()
        descent.advance()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            descent.step(images)


def learn(model: CtrlCscModel, images: torch.Tensor, steps: int, precision: str = "no") -> None:
    descend(Descent(sparse_coding_energy, model, steps, 1e-2), images, precision=precision)
    recompute_statistics(model, images, len(images))


def test_no_image_counts_more_than_others_in_recomputed_statistics() -> None:
    torch.manual_seed(0)
    model, images = CtrlCscModel(CtrlCscConfig(**CONFIG)).train(), smooth_images()[:9]
    images[8] = -1
    codes = model.encoder.stages[0].encode(images).detach()
    recompute_statistics(model, images, 8)
    expected = (codes[:5].mean(dim=(0, 2, 3)) + codes[5:].mean(dim=(0, 2, 3))) / 2
    torch.testing.assert_close(model.encoder.norms[0].running_mean, expected)


def test_recomputed_statistics_are_means_over_batches_and_compile_nothing() -> None:
    torch.manual_seed(0)
    model, images = CtrlCscModel(CtrlCscConfig(**CONFIG)).train(), smooth_images()
    first = model.encoder.stages[0].encode(images).detach()
    compiled = []
    for player in (model.encoder, model.decoder):
        player.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    invert_encoder(model, images)
    recompute_statistics(model, images, 8)
    torch.testing.assert_close(model.encoder.norms[0].running_mean, first.mean(dim=(0, 2, 3)))
    variances = [batch.transpose(0, 1).flatten(1).var(dim=1) for batch in first.split(8)]
    torch.testing.assert_close(model.encoder.norms[0].running_var, torch.stack(variances).mean(dim=0))
    assert not compiled
    model(images)
    assert compiled  # elsewhere they still are


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_energy_falls_and_atoms_stay_unit_vectors(precision: str) -> None:
    torch.manual_seed(0)
    model, images = CtrlCscModel(CtrlCscConfig(**CONFIG)).train(), smooth_images()
    before = model.encoder(images, output_energy=True).energy.mean()
    decoder = [parameter.clone() for parameter in model.decoder.parameters()]
    learn(model, images, 20, precision)
    assert model.encoder(images, output_energy=True).energy.mean() < 0.7 * before
    assert all(dictionary.has_unit_atoms() for dictionary in model.dictionaries())
    assert all(torch.equal(a, b) for a, b in zip(decoder, model.decoder.parameters(), strict=True))


@pytest.mark.parametrize("loss", [sparse_coding_energy, deconvolution_error])
def test_another_descent_goes_on_from_the_state_of_the_first(loss: Callable) -> None:
    torch.manual_seed(0)
    whole, images = CtrlCscModel(CtrlCscConfig(**CONFIG)).train(), smooth_images()
    parted = copy.deepcopy(whole)
    first = Descent(loss, parted, 4, 1e-2)
    descend(first, images, steps=2)
    assert first.done == 2
    second = Descent(loss, parted, 4, 1e-2)
    second.done = first.done
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    descend(second, images)
    descend(Descent(loss, whole, 4, 1e-2), images)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parted.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_deconvolution_of_all_stages_then_gives_the_pixels(precision: str, shared: bool) -> None:
    torch.manual_seed(0)
    config = CtrlCscConfig(**CONFIG | {"share_dictionaries": shared})
    model, images = CtrlCscModel(config).train(), smooth_images()
    learn(model, images, steps=20)
    invert_encoder(model, images)
    before = peak_signal_to_noise_ratio(images, model(images).reconstruction).mean()
    encoder = [parameter.clone() for parameter in model.encoder.parameters()]
    descend(Descent(deconvolution_error, model, 30, 1e-2), images, precision=precision)
    recompute_statistics(model, images, len(images))
    assert peak_signal_to_noise_ratio(images, model(images).reconstruction).mean() > before + 2
    assert all(dictionary.has_unit_atoms() for dictionary in model.dictionaries())
    assert not any(torch.equal(a, b) for a, b in zip(encoder, model.encoder.parameters(), strict=True))


@pytest.mark.parametrize("count", [64, 20])
def test_the_last_stage_gets_the_principal_directions_of_its_signals(count: int) -> None:
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(**CONFIG)).train()
    images = smooth_images(count)
    model.eval()
    before = model.encoder.last_stage.dictionary.detach().clone()
    principal_directions(model, images, 16)
    signals = model.encoder(images, output_normalized_codes=True).normalized_codes[-1].flatten(1).detach().numpy()
    directions = np.linalg.svd(signals, full_matrices=False)[2][:32]
    atoms = model.encoder.last_stage.dictionary.detach().flatten(1)
    alignment = (atoms[: len(directions)] * torch.from_numpy(directions)).sum(dim=1).abs()
    torch.testing.assert_close(alignment, torch.ones_like(alignment), rtol=0, atol=1e-3)
    assert torch.equal(atoms[len(directions) :], before.flatten(1)[len(directions) :])


@pytest.mark.parametrize("low_pass", [False, True])
def test_the_decoders_codes_then_have_mean_and_deviation_of_the_encoders(low_pass: bool) -> None:
    torch.manual_seed(0)
    images = smooth_images()
    model = CtrlCscModel(CtrlCscConfig(**CONFIG, low_pass=low_pass)).train()
    learn(model, images, steps=20)
    codes = model.encoder(images, output_codes=True, update_statistics=False).codes
    invert_encoder(model, images)
    of_decoder: list[torch.Tensor] = []
    for stage in model.decoder.stages:
        synthesize = stage.synthesize
        stage.synthesize = lambda z, size, synthesize=synthesize: (of_decoder.append(z), synthesize(z, size))[1]
    reconstruction = model(images).reconstruction
    for expected, got in zip(codes, reversed(of_decoder), strict=True):
        alive = expected.std((0, 2, 3)) > 1e-3
        assert alive.sum() > 2
        for statistic in (torch.mean, torch.std):
            torch.testing.assert_close(
                statistic(got, (0, 2, 3))[alive], statistic(expected, (0, 2, 3))[alive], rtol=0.05, atol=0.01
            )
    mean_image = images.mean(dim=0).expand_as(images)
    before = peak_signal_to_noise_ratio(images, mean_image).mean()
    assert peak_signal_to_noise_ratio(images, reconstruction).mean() > before
