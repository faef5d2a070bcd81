"""Export of the model and of its halves to torch.export and ONNX, with a number of images that is free."""

import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch.export import Dim

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel

ROOT = Path(__file__).parents[1]
BATCHES = (1, 2, 7)
SIZE = 12


@pytest.fixture(scope="module", params=["three_channels", "one_channel"])
def model(request) -> CtrlCscModel:
    torch.manual_seed(0)
    options = {"ridge": 1.0, "num_channels": 1} if request.param == "one_channel" else {}
    config = CtrlCscConfig(
        image_size=SIZE,
        latent_dim=6,
        stage_channels=[5, 8],
        num_iterations=3,
        **options,
    )
    return CtrlCscModel(config).eval()


def module_and_inputs(model: CtrlCscModel, part: str) -> tuple[torch.nn.Module, str, dict[int, torch.Tensor]]:
    """A part of the model, the name of its argument, and that argument for each number of images."""
    if part == "decoder":
        return model.decoder, "latents", {n: torch.randn(n, 6) for n in BATCHES}
    images = {n: torch.rand(n, model.config.num_channels, SIZE, SIZE) * 2 - 1 for n in BATCHES}
    return model if part == "model" else model.encoder, "pixel_values", images


@pytest.mark.parametrize("part", ["encoder", "decoder", "model"])
def test_a_traced_module_gives_the_same_for_any_number_of_images(model, part):
    module, _, inputs = module_and_inputs(model, part)
    traced = torch.jit.trace(module, inputs[2], strict=False)  # with gradients enabled, as users do
    for value in inputs.values():
        for key, expected in module(value).items():
            torch.testing.assert_close(traced(value)[key], expected)


@pytest.mark.parametrize("batch", [Dim("batch"), Dim.DYNAMIC], ids=["named", "dynamic"])
@pytest.mark.parametrize("part", ["encoder", "decoder", "model"])
def test_an_exported_program_gives_the_same_for_any_number_of_images(model, part, batch, tmp_path):
    module, name, inputs = module_and_inputs(model, part)
    program = torch.export.export(module, (inputs[2],), dynamic_shapes={name: {0: batch}})
    # The operator norm belongs to images of the model's size: nothing of its iteration is left to compute.
    assert not [node for node in program.graph.nodes if "power_iteration" in str(node.target)]
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for value in inputs.values():
        with torch.no_grad():
            expected, found = module(value), loaded(value)
        assert type(found) is type(expected) and found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["encoder", "decoder", "model"])
@torch.no_grad()
def test_onnxruntime_gives_the_same_for_any_number_of_images(model, part, tmp_path):
    module, name, inputs = module_and_inputs(model, part)
    path = tmp_path / "model.onnx"
    torch.onnx.export(module, (inputs[2],), path, dynamo=True, dynamic_shapes={name: {0: Dim("batch")}}, verbose=False)
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains <= {"", "ai.onnx"}  # standard operators alone
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    assert argument.name == name and argument.shape[0] == "batch"
    for value in inputs.values():
        expected, found = module(value, return_dict=False), session.run(None, {name: value.numpy()})
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_that_returns_all_it_can_is_exported(training):
    torch.manual_seed(0)
    encoder = CtrlCscModel(CtrlCscConfig(image_size=SIZE, latent_dim=6, stage_channels=[5, 8])).encoder.train(training)
    options = {"output_codes": True, "output_energy": True, "output_hidden_states": True}
    shapes = {"pixel_values": {0: Dim("batch")}, **dict.fromkeys(options)}
    example = torch.rand(2, 3, SIZE, SIZE)  # of a copy: a program shares the tensors of what it was exported from
    program = torch.export.export(deepcopy(encoder), (example,), options, dynamic_shapes=shapes).module()
    for n in BATCHES:
        images = torch.rand(n, 3, SIZE, SIZE) * 2 - 1
        torch.testing.assert_close(dict(program(images, **options)), dict(encoder(images, **options)))
    torch.testing.assert_close(program.state_dict(), dict(encoder.state_dict()))  # the same running statistics


def test_a_program_that_returns_tuples_loads_without_the_package(tmp_path):
    torch.manual_seed(0)
    config = CtrlCscConfig(image_size=SIZE, latent_dim=6, stage_channels=[5, 8], return_dict=False)
    model, images = CtrlCscModel(config).eval(), torch.rand(7, 3, SIZE, SIZE)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; program = torch.export.load('program.pt2').module()\n"
        "torch.save(program(torch.load('images.pt')), 'outputs.pt'); assert 'ctrl_csc_hf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), model(images), rtol=1e-5, atol=1e-6)


def test_what_the_docs_export_gives_the_same_as_the_trained_model(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").symlink_to(ROOT / "checkpoints")
    names: dict = {}
    exec(block, names)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    for n in BATCHES:
        images = torch.rand(n, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            expected, latents = names["model"](images), names["program"].module()(images).latents
        torch.testing.assert_close(latents, expected.latents, rtol=0, atol=1e-5)
        for name in names["names"]:
            (found,) = session.run([name], {"pixel_values": images.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), expected[name], rtol=0, atol=1e-4)
