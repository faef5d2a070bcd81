"""What comes before the game: dictionaries from the sparse-coding energy, and a decoder that inverts the encoder."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ema import recompute_statistics
from warmup import invert_encoder, learn_dictionaries

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.metrics import peak_signal_to_noise_ratio

CONFIG = {
    "image_size": 16,
    "latent_dim": 32,
    "stage_channels": [8, 16],
    "kernel_sizes": [4, 4, 4],
    "strides": [2, 2, 1],
    "paddings": [1, 1, 0],
    "sparsity": 0.02,
}


def smooth_images(count: int = 64) -> torch.Tensor:
    """(count, 3, 16, 16), pixels in [-1, 1], with nothing finer than 4 pixels."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")


def accelerator(precision: str = "no") -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=precision)


def learn(model: CtrlCscModel, images: torch.Tensor, steps: int, precision: str = "no") -> None:
    learn_dictionaries(accelerator(precision), model, itertools.repeat(images), steps, 1e-2, lambda: False)
    recompute_statistics(model, images, len(images))


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


def test_an_interrupt_ends_it_before_the_next_step() -> None:
    model, images = CtrlCscModel(CtrlCscConfig(**CONFIG)).train(), smooth_images()
    before = model.encoder.last_stage.dictionary.clone()
    learn_dictionaries(accelerator(), model, itertools.repeat(images), 3, 1e-2, lambda: True)
    assert torch.equal(model.encoder.last_stage.dictionary, before)


def test_a_decoder_of_its_own_then_does_what_a_shared_one_with_inverse_norms_does() -> None:
    torch.manual_seed(0)
    images = smooth_images()
    shared = CtrlCscModel(CtrlCscConfig(**CONFIG, share_dictionaries=True, decoder_normalization="inverse")).train()
    learn(shared, images, steps=20)
    with torch.no_grad():
        shared.encoder.norms[0].weight[0] *= -1  # an encoder of its own may have this
    separate = CtrlCscModel(CtrlCscConfig(**CONFIG)).train()
    separate.encoder.load_state_dict(shared.encoder.state_dict())
    invert_encoder(separate.eval(), images)
    recompute_statistics(separate, images, len(images))
    expected, got = shared.eval()(images).reconstruction, separate.eval()(images).reconstruction
    torch.testing.assert_close(got, expected, atol=0.03, rtol=0)  # batch norms of both halves have an eps
    mean_image = images.mean(dim=0).expand_as(images)
    assert peak_signal_to_noise_ratio(images, got).mean() > peak_signal_to_noise_ratio(images, mean_image).mean()
