"""One half of a saved model, loaded alone."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctrl_csc_hf import CtrlCscConfig, CtrlCscDecoder, CtrlCscEncoder, CtrlCscModel

SHARED = [False, "last", True]


def trained_model(shared: bool | str) -> CtrlCscModel:
    """A tiny model none of whose tensors has the value that a new model gives it."""
    torch.manual_seed(0)
    config = CtrlCscConfig(image_size=8, latent_dim=6, stage_channels=[4], kernel_sizes=[4, 4], strides=[2, 1],
                           paddings=[1, 0], share_dictionaries=shared)  # fmt: skip
    model = CtrlCscModel(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 2)
    model(torch.rand(5, 3, 8, 8) * 2 - 1)
    model.project_parameters()
    return model.eval()


@pytest.mark.parametrize("shared", SHARED)
def test_each_half_loads_all_it_needs_from_the_whole_models_folder(shared: bool | str, tmp_path: Path) -> None:
    model = trained_model(shared)
    model.save_pretrained(tmp_path)
    images, latents = torch.rand(2, 3, 8, 8) * 2 - 1, torch.nn.functional.normalize(torch.randn(2, 6), dim=1)
    for half, loaded_class in ((model.encoder, CtrlCscEncoder), (model.decoder, CtrlCscDecoder)):
        loaded, report = loaded_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert loaded.state_dict().keys() == half.state_dict().keys()
        for name, tensor in half.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    encoder, decoder = CtrlCscEncoder.from_pretrained(tmp_path).eval(), CtrlCscDecoder.from_pretrained(tmp_path).eval()
    assert torch.equal(encoder(images).latents, model.encode(images).latents)
    assert torch.equal(decoder(latents).reconstruction, model.decode(latents).reconstruction)


@pytest.mark.parametrize("shared", SHARED)
def test_a_half_saved_alone_loads_again(shared: bool | str, tmp_path: Path) -> None:
    model = trained_model(shared)
    model.save_pretrained(tmp_path / "whole")
    for loaded_class in (CtrlCscEncoder, CtrlCscDecoder):
        half = loaded_class.from_pretrained(tmp_path / "whole")
        half.save_pretrained(tmp_path / "half")
        assert len(load_file(tmp_path / "half" / "model.safetensors")) == len(half.state_dict())
        again, report = loaded_class.from_pretrained(tmp_path / "half", output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in half.state_dict().items())


def test_the_whole_model_still_reports_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained_model(False).decoder.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        _, report = CtrlCscModel.from_pretrained(tmp_path, output_loading_info=True)
    assert "encoder.last_stage.dictionary" in report["missing_keys"]


def test_a_configuration_of_another_model_type_is_refused(tmp_path: Path) -> None:
    trained_model(False).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config.replace('"ctrl_csc"', '"bert"'), encoding="utf-8")
    for loaded_class in (CtrlCscModel, CtrlCscEncoder, CtrlCscDecoder):
        with pytest.raises(ValueError, match="model_type='bert' is not allowed: it must be 'ctrl_csc'"):
            loaded_class.from_pretrained(tmp_path)
