"""Promises of the models: shapes, modes of running, saving and loading, against arithmetic done here."""

import copy
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, pipeline

from ctrl_csc_hf import CtrlCscConfig, CtrlCscDecoder, CtrlCscEncoder, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.models.modeling_ctrl_csc import _unit_vectors
from ctrl_csc_hf.training.presets import load_preset, preset_names

CONFIG = {
    "image_size": 8,
    "stage_channels": [4, 5],
    "kernel_sizes": [4, 4, 2],
    "strides": [2, 2, 1],
    "paddings": [1, 1, 0],
    "latent_dim": 6,
    "sparsity": 0.05,
    "ridge": 0.2,
}
ARCHITECTURES = list(itertools.product([False, True], [False, True]))
IDS = [f"{'shared' if shared else 'separate'}{'-low_pass' * low_pass}" for shared, low_pass in ARCHITECTURES]
every_architecture = pytest.mark.parametrize(("shared", "low_pass"), ARCHITECTURES, ids=IDS)


def architecture(shared, low_pass):
    options = CONFIG | {"share_dictionaries": shared}
    if low_pass:
        options |= {"low_pass": True, "sparsity": [0.05, 0.02], "num_iterations": [2, 3], "step_size": 1.3}
    return options


def build_model(shared=False, low_pass=False) -> CtrlCscModel:
    """A model in evaluation, off its initial values as after training."""
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(**architecture(shared, low_pass))).train()
    with torch.no_grad():
        for half in (model.encoder, model.decoder):
            for norm in half.norms:
                norm.weight.uniform_(0.7, 1.3)
                norm.bias.uniform_(-0.2, 0.3)
        model.decoder.output_scale.uniform_(0.6, 1.1)
        model.decoder.output_bias.uniform_(-0.2, 0.2)
        model(images())
    model.project_parameters()
    return model.eval()


def images(n: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def largest_singular_value(stage) -> float:
    height, width = stage.signal_size
    unit_signals = torch.eye(stage.signal_channels * height * width).unflatten(1, (-1, height, width))
    adjoint = stage.adjoint(unit_signals.to(stage.dictionary)).detach().flatten(1)
    return np.linalg.norm(adjoint.double().numpy(), 2)


def tied_tensors(model: CtrlCscModel) -> dict[str, bool]:
    """Of every tensor that design gives to both halves: is it one object?"""
    names = []
    if model.config.share_dictionaries:
        names.append("last_stage.dictionary")
    if model.config.share_dictionaries is True:
        names += ["stages.0.dictionary", "stages.1.dictionary"]
    halves = [dict(half.named_parameters()) for half in (model.encoder, model.decoder)]
    return {name: halves[0][name] is halves[1][name] for name in names}


# ---- outputs


@every_architecture
def test_outputs_have_the_documented_shapes_and_ranges(shared, low_pass):
    model, x = build_model(shared, low_pass), images()
    out = model(x, output_reconstructed_latents=True, output_codes=True)
    assert out.reconstruction.shape == (5, 3, 8, 8)
    assert out.latents.shape == out.reconstructed_latents.shape == (5, 6)
    assert [tuple(codes.shape) for codes in out.codes] == [(5, 4, 4, 4), (5, 5, 2, 2)]
    assert out.reconstruction.abs().max() <= 1
    for latents in (out.latents, out.reconstructed_latents):
        torch.testing.assert_close(latents.norm(dim=1), torch.ones(5), rtol=0, atol=1e-4)
    assert out.latents.min() < 0 < out.latents.max()  # not confined to one orthant
    for codes in out.codes:
        assert codes.min() == 0 < codes.max()
    torch.testing.assert_close(model.encode(x).latents, out.latents)
    torch.testing.assert_close(model.decode(out.latents).reconstruction, out.reconstruction)
    torch.testing.assert_close(model.encode(out.reconstruction).latents, out.reconstructed_latents)


def test_codes_and_reconstructed_latents_come_only_where_asked_for():
    out = build_model()(images())
    assert list(out.keys()) == ["latents", "reconstruction", "pooler_output"]


@pytest.mark.parametrize("by_configuration", [False, True])
def test_codes_are_the_hidden_states_and_latents_the_pooled_output(by_configuration):
    model, x = build_model(), images()
    asked = {"output_hidden_states": True}
    if by_configuration:
        model.config.output_hidden_states, asked = True, {}
    codes = model(x, output_codes=True).codes
    for out in (model(x, **asked), model.encoder(x, **asked)):
        assert len(out.hidden_states) == 2 and out.codes is None
        assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, codes, strict=True))
        assert out.pooler_output is out.latents and next(iter(out.values())) is out.latents
    decoded = model.decoder(out.latents, **asked)
    assert [tuple(codes.shape) for codes in decoded.hidden_states] == [(5, 4, 4, 4), (5, 5, 2, 2)]
    first = decoded.hidden_states[0]
    pixels = model.decoder.stages[0].synthesize(first) * model.decoder.output_scale[:, None, None]
    torch.testing.assert_close(torch.tanh(pixels + model.decoder.output_bias[:, None, None]), decoded.reconstruction)


@pytest.mark.parametrize("pool", [False, True])
def test_the_feature_extraction_pipeline_gives_the_latents(pool, tmp_path):
    model, processor = build_model(), CtrlCscImageProcessor(image_size=8)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path), pool=pool)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    expected = model.encode(processor(image, return_tensors="pt").pixel_values).latents
    torch.testing.assert_close(torch.tensor(extract(image)), expected)


# ---- latents of any image, stages of any size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-6, 0.3, 1e6, 1e15])
def test_latents_of_any_finite_image_are_unit_vectors_with_finite_gradients(level, training, dtype):
    constant = torch.full((2, 3, 8, 8), level)
    for model in (build_model(), CtrlCscModel(CtrlCscConfig(image_size=8))):
        model = model.to(dtype).train(training)
        for pixels in (constant, level * images(2)):
            pixels = pixels.to(dtype).requires_grad_()
            latents = model.encode(pixels).latents
            length = latents.float().norm(dim=1)
            torch.testing.assert_close(length, torch.ones(2), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)
            assert torch.autograd.grad(latents.sum(), pixels)[0].isfinite().all()


def test_the_zero_vector_is_given_a_direction_and_others_keep_theirs():
    vectors = torch.tensor([[0.0, 0, 0], [3, 0, -4], [0, 1e-30, 0], [-3e30, 4e30, 0]])
    expected = torch.tensor([[1, 0, 0], [0.6, 0, -0.8], [1, 0, 0], [-0.6, 0.8, 0]])
    torch.testing.assert_close(_unit_vectors(vectors), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "preset", [None, *(pytest.param(p, marks=[pytest.mark.slow] * (p == "imagenet128")) for p in preset_names())]
)
def test_no_default_has_a_dead_stage(preset):
    torch.manual_seed(0)
    config = CtrlCscConfig() if preset is None else CtrlCscConfig(**load_preset(preset)["model"])
    model, size = CtrlCscModel(config).eval(), config.image_size
    coarse = torch.rand(3, 3, size // 8, size // 8) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    for pixels in (torch.rand(3, 3, size, size) * 2 - 1, smooth, torch.full((1, 3, size, size), 0.3)):
        out = model.encode(pixels, output_codes=True)
        for codes in out.codes:
            # A constant image is its low pass, which random atoms, of many codes and few of these channels, may miss.
            nothing_to_code = config.low_pass and len(pixels) == 1
            assert nothing_to_code or 0.005 < (codes > 0).float().mean() < 0.9
        cosines = out.latents @ out.latents.T
        torch.testing.assert_close(cosines.diagonal(), torch.ones(len(pixels)), rtol=0, atol=1e-5)
        assert (cosines - torch.eye(len(pixels))).max() < 0.99


@pytest.mark.parametrize(
    ("size", "halvings", "kernel"),
    [
        (8, 2, 2),
        (16, 2, 4),
        (28, 2, 7),
        (32, 2, 8),
        (48, 3, 6),
        (50, 3, 6),
        (64, 3, 8),
        (96, 4, 6),
        (128, 4, 8),
        (224, 5, 7),
    ],
)
def test_the_image_size_alone_chooses_the_stages(size, halvings, kernel):
    config = CtrlCscConfig(image_size=size, latent_dim=4, num_iterations=1)
    assert config.stage_channels == [64, 128, 256, 512, 512][:halvings]
    assert config.kernel_sizes == [4] * halvings + [kernel] and config.signal_sizes[-1] == 1
    assert json.loads(config.to_json_string())["strides"] == [2] * halvings + [1]
    narrow = CtrlCscConfig(image_size=size, latent_dim=4, stage_channels=[4] * halvings)
    model = CtrlCscModel(narrow).eval()
    assert model(torch.rand(2, 3, size, size)).reconstruction.shape == (2, 3, size, size)


def test_stages_that_cannot_halve_the_image_are_refused():
    assert CtrlCscConfig(stage_channels=[8, 16, 16]).kernel_sizes == [4, 4, 4, 4]
    with pytest.raises(
        ValueError, match=r"image_size=8 is not allowed: it must be at least 16 for 4 stages of stride 2"
    ):
        CtrlCscConfig(image_size=8, stage_channels=[8, 8, 8, 8])
    with pytest.raises(ValueError, match=r"image_size=3 is not allowed: it must be at least 4 for 2 stages"):
        CtrlCscConfig(image_size=3)


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_is_refused_by_name(training):
    model = build_model().train(training)
    with pytest.raises(ValueError, match=r"pixel_values must hold at least one image, got shape \(0, 3, 8, 8\)"):
        model(images(0))
    with pytest.raises(ValueError, match=r"latents must hold at least one image, got shape \(0, 6\)"):
        model.decode(torch.zeros(0, 6))


def test_grey_images_have_a_model_too():
    model = CtrlCscModel(CtrlCscConfig(**CONFIG | {"num_channels": 1})).eval()
    out = model.encoder(images()[:, :1], output_energy=True)
    assert model.decode(out.latents).reconstruction.shape == (5, 1, 8, 8) and (out.energy > 0).all()


def test_energy_is_the_sum_of_the_stages_objectives_divided_by_the_pixels():
    model, x = build_model().double(), images().double()
    out = model.encoder(x, output_codes=True, output_energy=True)
    expected, signal = 0.0, x
    for stage, norm, codes in zip(model.encoder.stages, model.encoder.norms, out.codes, strict=True):
        synthesis = torch.nn.functional.conv_transpose2d(codes, stage.dictionary, stride=2, padding=1)
        terms = 0.05 * codes, 0.2 / 2 * codes**2, (signal - synthesis) ** 2 / 2
        expected = expected + sum(term.sum(dim=(1, 2, 3)) for term in terms)
        mean, deviation = norm.running_mean, (norm.running_var + 1e-5).sqrt()
        normalized = (codes - mean[:, None, None]) / deviation[:, None, None]
        signal = norm.weight[:, None, None] * normalized + norm.bias[:, None, None]
    atoms = model.encoder.last_stage.dictionary
    vector = torch.nn.functional.conv2d(signal, atoms)
    misfit = signal - torch.nn.functional.conv_transpose2d(vector, atoms)
    expected = expected + (misfit**2 / 2).sum(dim=(1, 2, 3))
    torch.testing.assert_close(out.energy, expected / (8 * 8))


def test_reconstructed_images_leave_the_running_statistics_alone():
    model, x = build_model().train(), images()
    twin = copy.deepcopy(model)
    model(x, output_reconstructed_latents=True)
    twin(x)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name
    before = copy.deepcopy(dict(model.encoder.named_buffers()))
    model.encoder(x, update_statistics=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.encoder.named_buffers())


def test_an_image_normalised_by_the_statistics_of_the_batch_before_has_the_latents_it_had_there():
    model, x = build_model().train(), images()
    latents = model.encoder(x).latents
    again = model.encoder(x[:1], update_statistics=False, reuse_statistics=True).latents
    torch.testing.assert_close(again, latents[:1])
    assert not torch.allclose(model.encoder(x[:1], update_statistics=False).latents, latents[:1], atol=1e-2)


@every_architecture
def test_new_model_has_unit_atoms_and_the_operator_norms_that_belong_to_them(shared, low_pass):
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(**architecture(shared, low_pass)))
    for dictionary in model.dictionaries():
        norms = dictionary.dictionary.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    for stage in model.encoder.stages:
        assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage), rel=0.01)


# ---- modes of running


@every_architecture
def test_gradient_checkpointing_changes_no_output_gradient_or_running_statistic(shared, low_pass):
    plain = build_model(shared, low_pass).train()
    thrifty = copy.deepcopy(plain)
    thrifty.gradient_checkpointing_enable()
    assert thrifty.encoder.gradient_checkpointing and thrifty.decoder.gradient_checkpointing
    outputs = []
    for model in (plain, thrifty):
        out = model(images(), output_reconstructed_latents=True)
        (out.reconstruction.square().sum() + (out.latents * out.reconstructed_latents).sum()).backward()
        outputs.append(out)
    for key in outputs[0]:
        torch.testing.assert_close(outputs[0][key], outputs[1][key])
    named = dict(thrifty.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(named[name].grad, parameter.grad, msg=name)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(thrifty.get_buffer(name), buffer, msg=name)


def assert_compiled_matches_eager(backend: str, architectures) -> None:
    for shared, low_pass in architectures:
        torch.compiler.reset()
        model, x = build_model(shared, low_pass), images()
        for mode in (model.eval(), copy.deepcopy(model).train()):
            expected = copy.deepcopy(mode)(x, output_reconstructed_latents=True)
            got = torch.compile(mode, fullgraph=True, backend=backend)(x, output_reconstructed_latents=True)
            for key in expected:
                torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)


def test_model_compiles_into_one_graph_and_gives_the_same():
    assert_compiled_matches_eager("eager", [(False, False), (True, True)])


@pytest.mark.slow
def test_every_architecture_compiles_into_one_graph_of_the_default_backend():
    assert_compiled_matches_eager("inductor", ARCHITECTURES)


@every_architecture
def test_bfloat16_autocast_is_finite_and_close(shared, low_pass):
    model, x = build_model(shared, low_pass), images()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    torch.testing.assert_close(got.latents.float(), expected.latents, rtol=0, atol=0.05)
    torch.testing.assert_close(got.reconstruction.float(), expected.reconstruction, rtol=0, atol=0.1)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).reconstruction.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_in_channels_last_order_is_saved_as_it_is(shared, tmp_path):
    model = build_model(shared).to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    loaded = CtrlCscModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    saved = load_file(tmp_path / "model.safetensors")
    assert ("decoder.last_stage.dictionary" in saved) is not shared  # once, if shared
    assert not model.encoder.stages[0].dictionary.is_contiguous()  # the model itself stays as it was


def test_channels_last_gives_the_same():
    model, x = build_model(), images()
    expected = model(x)
    got = copy.deepcopy(model).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got.latents, expected.latents)
    torch.testing.assert_close(got.reconstruction, expected.reconstruction)


@every_architecture
def test_model_changes_dtype_and_keeps_what_its_halves_share(shared, low_pass):
    model = build_model(shared, low_pass)
    for moved in (copy.deepcopy(model), copy.deepcopy(model).double(), copy.deepcopy(model).to(torch.bfloat16)):
        untied = [name for name, tied in tied_tensors(moved).items() if not tied]
        assert not untied


# ---- saving and loading

LOAD_AND_RUN = """
import sys
from pathlib import Path
import torch, transformers, ctrl_csc_hf
for folder in Path(sys.argv[1]).iterdir():
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is ctrl_csc_hf.CtrlCscModel and not model.training
    with torch.no_grad():
        out = model(torch.load(Path(sys.argv[2]) / "images.pt"), output_reconstructed_latents=True, output_codes=True)
    torch.save([out.latents, out.reconstruction, out.reconstructed_latents, *out.codes],
               Path(sys.argv[2]) / f"{folder.name}.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of every architecture's model, and what a new process makes of them."""
    folder, outputs = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("outputs")
    models = {}
    for name, architecture in zip(IDS, ARCHITECTURES, strict=True):
        models[name] = build_model(*architecture)
        models[name].save_pretrained(folder / name)
    torch.save(images(), outputs / "images.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, folder, outputs], env=environment, check=True)
    return folder, outputs, models


@pytest.mark.parametrize("name", IDS)
def test_saved_model_gives_the_same_bits_in_a_new_process(saved, name):
    _, outputs, models = saved
    with torch.no_grad():
        out = models[name](images(), output_reconstructed_latents=True, output_codes=True)
    expected = [out.latents, out.reconstruction, out.reconstructed_latents, *out.codes]
    for got, tensor in zip(torch.load(outputs / f"{name}.pt"), expected, strict=True):
        assert torch.equal(got, tensor)


@pytest.mark.parametrize("name", IDS)
def test_saved_folder_holds_safetensors_only_and_shared_dictionaries_once(saved, name):
    folder, _, models = saved
    assert {path.name for path in (folder / name).iterdir()} == {"config.json", "model.safetensors"}
    shapes = [tuple(tensor.shape) for tensor in load_file(folder / name / "model.safetensors").values()]
    copies = 1 if name.startswith("shared") else 2
    for dictionary in models[name].encoder.dictionaries():
        assert shapes.count(tuple(dictionary.dictionary.shape)) == copies


@pytest.mark.parametrize("name", IDS)
def test_loading_misses_nothing_and_ties_again_what_is_shared(saved, name):
    model, info = CtrlCscModel.from_pretrained(saved[0] / name, output_loading_info=True)
    assert not any(info.values()), info
    assert all(tied_tensors(model).values())
    for key, tensor in saved[2][name].state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_configuration_loads_as_it_was_saved(saved):
    for name, (shared, low_pass) in zip(IDS, ARCHITECTURES, strict=True):
        config = AutoConfig.from_pretrained(saved[0] / name)
        assert isinstance(config, CtrlCscConfig)
        expected = architecture(shared, low_pass)
        assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize("name", IDS)
def test_model_loads_in_bfloat16(saved, name):
    model = AutoModel.from_pretrained(saved[0] / name, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert all(tied_tensors(model).values())
    out, expected = model(images()), saved[2][name](images())
    assert out.latents.dtype == torch.bfloat16
    torch.testing.assert_close(out.latents.float(), expected.latents, rtol=0, atol=0.1)
    for stage in model.encoder.stages:
        assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage), rel=0.01)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
@pytest.mark.parametrize("name", IDS)
def test_model_loads_by_device_map(saved, name, device_map):
    pytest.importorskip("accelerate")
    model = AutoModel.from_pretrained(saved[0] / name, device_map=device_map)
    out, expected = model(images().to(model.device)), saved[2][name](images())
    torch.testing.assert_close(out.reconstruction.cpu(), expected.reconstruction, rtol=1e-4, atol=1e-4)
    assert all(tied_tensors(model).values())


@pytest.mark.parametrize("name", IDS)
def test_encoder_loads_alone(saved, name):
    encoder, info = CtrlCscEncoder.from_pretrained(saved[0] / name, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(encoder(images()).latents, saved[2][name].encode(images()).latents)


def test_decoder_with_tensors_of_its_own_loads_alone(saved):
    decoder, info = CtrlCscDecoder.from_pretrained(saved[0] / "separate", output_loading_info=True)
    assert not any(info.values()), info
    latents = saved[2]["separate"].encode(images()).latents
    expected = saved[2]["separate"].decode(latents).reconstruction
    assert torch.equal(decoder(latents).reconstruction, expected)


@pytest.mark.parametrize("name", IDS)
def test_weights_from_elsewhere_are_projected_on_loading(saved, name, tmp_path):
    state = load_file(saved[0] / name / "model.safetensors")
    scaled = {key: 3 * tensor if "dictionary" in key else tensor for key, tensor in state.items()}
    saved[2][name].config.save_pretrained(tmp_path)
    save_file(scaled, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModel.from_pretrained(tmp_path)
    for dictionary in model.dictionaries():
        norms = dictionary.dictionary.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    for stage in model.encoder.stages:
        assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage), rel=0.01)
    expected = saved[2][name](images()).reconstruction
    torch.testing.assert_close(model(images()).reconstruction, expected, rtol=1e-2, atol=1e-2)


def test_weights_without_operator_norms_get_them_on_loading(saved, tmp_path):
    name = "separate"
    state = load_file(saved[0] / name / "model.safetensors")
    bare = {key: v for key, v in state.items() if not key.endswith(("operator_norm", "singular_vector"))}
    saved[2][name].config.save_pretrained(tmp_path)
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModel.from_pretrained(tmp_path)
    for stage in model.encoder.stages:
        assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage), rel=0.01)


# ---- errors


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 3, 16, 16), (2, 1, 8, 8), (3, 8, 8)])
def test_image_of_the_wrong_size_is_an_error_that_names_both_sizes(shape):
    model = build_model()
    for call in (model, model.encode, model.encoder):
        with pytest.raises(ValueError, match=r"pixel_values must have shape \(n, 3, 8, 8\)") as error:
            call(torch.zeros(shape))
        assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 5), (6,), (2, 6, 1, 1)])
def test_latents_of_the_wrong_size_are_an_error_that_names_both_sizes(shape):
    with pytest.raises(ValueError, match=r"latents must have shape \(n, 6\)") as error:
        build_model().decode(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("strides", [2, 1, 1], "bring image_size=8 to 1x1 at the last stage"),
        ("strides", [2, 2, 0], "a list of positive integers"),
        ("strides", [2, 2], "3 entries, one more than stage_channels"),
        ("kernel_sizes", [4, 4, 4, 4], "3 entries, one more than stage_channels"),
        ("paddings", [1, 1, 2], r"less than its kernel size \(kernel_sizes=\[4, 4, 2\]\)"),
        ("paddings", [-1, 1, 0], "at least 0"),
        ("stage_channels", [4, 0], "a list of positive integers"),
        ("stage_channels", [], "a list of positive integers"),
        ("image_size", 0, "a positive integer"),
        ("num_channels", -1, "a positive integer"),
        ("latent_dim", 0, "a positive integer"),
        ("num_iterations", 0, "a positive integer"),
        ("sparsity", -0.1, "a finite number of at least 0"),
        ("sparsity", float("nan"), "a finite number of at least 0"),
        ("step_size", 1.4, "above 0 and below 4/3"),
        ("ridge", float("inf"), "a finite number of at least 0"),
        ("tie_word_embeddings", False, "True"),
        ("image_size", 8.5, "expected int"),
        ("sparsity", "much", "expected float"),
        ("sparsity", [0.1, 0.2, 0.3], "or a list of 2, one a sparse-coding stage"),
        ("num_iterations", [2, 0], "a positive integer, or a list of 2"),
        ("strides", "221", "list"),
        ("share_dictionaries", "yes", "True, False or 'last'"),
    ],
)
def test_wrong_configuration_is_an_error_that_names_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=allowed) as error:
        CtrlCscConfig(**CONFIG | {field: value})
    assert field in str(error.value) and str(value) in str(error.value)


def test_image_size_that_strides_do_not_bring_to_one_is_an_error():
    with pytest.raises(ValueError, match="image_size=16 to 1x1 at the last stage"):
        CtrlCscConfig(**CONFIG | {"image_size": 16})


def test_integer_serves_where_a_float_is_meant():
    config = CtrlCscConfig(**CONFIG | {"sparsity": 1, "ridge": 0})
    exact = CtrlCscConfig(**CONFIG | {"sparsity": 1.0, "ridge": 0.0})
    torch.manual_seed(0)
    model = CtrlCscModel(config)
    twin = CtrlCscModel(exact)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images()).reconstruction, twin.eval()(images()).reconstruction)


# ---- the low pass apart


def test_the_low_pass_of_an_image_travels_apart_and_only_the_rest_is_coded():
    model = build_model(low_pass=True)
    flat = images(2)[:, :, :1, :1].expand(-1, -1, 8, 8)
    encoded = model.encode(flat, output_codes=True, output_normalized_codes=True)
    assert encoded.codes[0].abs().max() < 1e-5  # nothing is left of a constant image
    norm, (first, second) = model.encoder.norms[0], encoded.normalized_codes
    assert first.shape == (2, 7, 4, 4) and second.shape == (2, 5, 2, 2)
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    low = (first[:, 4:] - norm.bias[4:, None, None]) / scale[4:, None, None] + norm.running_mean[4:, None, None]
    torch.testing.assert_close(low, flat[:, :, :4, :4], rtol=1e-4, atol=1e-5)


def test_the_low_pass_is_the_mean_under_each_atom_and_linear_between_their_centres():
    stage = CtrlCscEncoder(CtrlCscConfig(**architecture(False, True))).stages[0]
    x = images(1)
    low = stage.low_pass(x)
    assert low[0, 1, 0, 2].item() == pytest.approx(x[0, 1, :3, 3:7].mean().item())  # the atom reaches over the border
    assert low[0, 2, 1, 3].item() == pytest.approx(x[0, 2, 1:5, 5:].mean().item())
    between = stage.interpolate(low, (8, 8))
    assert between[0, 0, 3, 0].item() == pytest.approx((0.25 * low[0, 0, 2, 0] + 0.75 * low[0, 0, 1, 0]).item())
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    inner = stage.interpolate(stage.low_pass(ramp), (8, 8))[..., 3:5]
    torch.testing.assert_close(inner, ramp[..., 3:5])  # atoms are centred on their codes


def test_a_low_pass_needs_atoms_that_are_centred_on_their_codes():
    with pytest.raises(ValueError, match="kernel size 3, padding 1 and stride 2"):
        CtrlCscConfig(**architecture(False, True) | {"kernel_sizes": [3, 4, 2]})


def test_each_stage_s_energy_is_that_of_its_own_dictionary_where_signals_are_detached():
    model = build_model(low_pass=True).train()
    model.encode(images(), output_energy=True, detach_signals=True).energy.sum().backward()
    apart = model.encoder.stages[0].dictionary.grad.clone()
    model.zero_grad()
    stage = model.encoder.stages[0]
    detail = (images() - stage.interpolate(stage.low_pass(images()), (8, 8))) / 0.2
    (stage.energy(detail, stage.encode(detail)).sum() / 64).backward()
    torch.testing.assert_close(apart, stage.dictionary.grad)


@pytest.mark.parametrize("statistics", [None, (torch.full((4,), 0.1), torch.full((4,), 2.0))])
def test_the_gradient_of_one_image_is_what_it_is_among_others(statistics):
    model = build_model()
    stage, norm, gradients = model.encoder.stages[0], model.encoder.norms[0], []
    if statistics:
        norm.train()
    weights = torch.rand(5, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    for count in (5, 1):
        x = images(5)[:count].requires_grad_()
        norm(stage.encode(x), False, statistics).backward(weights[:count].clone())
        gradients.append(x.grad[0])
    torch.testing.assert_close(*gradients)
