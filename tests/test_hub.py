"""An exported folder opens all doors with the same bits, with and without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_halves import trained_model

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.hub import export

# Blocks the installed package, as on a machine that never had it.
WITHOUT_THE_PACKAGE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ctrl_csc_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
DOORS = """
import sys, torch
from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
repo, images, output, keywords = sys.argv[1], torch.load(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
REMOTE = {"trust_remote_code": True, **keywords}
found = {}
assert AutoConfig.from_pretrained(repo, **REMOTE).model_type == "ctrl_csc"
processor = AutoImageProcessor.from_pretrained(repo, **REMOTE)
x = processor(images, return_tensors="pt").pixel_values
with torch.no_grad():
    model = AutoModel.from_pretrained(repo, **REMOTE).eval()
    found["AutoModel"] = model(x).reconstruction
    pipe = DiffusionPipeline.from_pretrained(repo, **REMOTE)
    pixels = pipe(images, output_type="pt", return_latents=True)
    found["pipeline"] = pixels.images * 2 - 1
    halves = []
    for half in ("Encoder", "Decoder"):
        half_class = get_class_from_dynamic_module(f"model/modeling_ctrl_csc.CtrlCsc{half}", repo, **keywords)
        loaded, report = half_class.from_pretrained(repo, output_loading_info=True, **keywords)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        halves.append(loaded.eval())
    found["halves"] = halves[1](halves[0](x).latents).reconstruction
assert "ctrl_csc_hf" not in sys.modules
torch.save({"x": x, "latents": pixels.latents, **found}, output)
"""


def images() -> torch.Tensor:
    """uint8, (3, 3, 12, 10)"""
    return torch.randint(0, 256, (3, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def open_all_doors(repo: str, tmp_path: Path, model: CtrlCscModel, environment: dict[str, str], **keywords) -> None:
    """Opens them in a new process without the package, and compares with the model in this one."""
    torch.save(images(), tmp_path / "images.pt")
    arguments = [repo, str(tmp_path / "images.pt"), str(tmp_path / "found.pt"), repr(keywords)]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE + DOORS, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found.pt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads decides the order of sums
    with torch.no_grad():
        expected = model(found["x"])
    torch.set_num_threads(threads)
    assert torch.equal(found["latents"], expected.latents)
    for door in ("AutoModel", "halves"):
        assert torch.equal(found[door], expected.reconstruction), door
    torch.testing.assert_close(found["pipeline"], expected.reconstruction, atol=1e-6, rtol=0)  # by way of [0, 1]


@pytest.mark.parametrize(("shared", "normalization"), [(False, "batch_norm"), (True, "inverse")])
def test_every_door_opens_without_the_package_and_shows_the_same(
    shared: bool, normalization: str, tmp_path: Path
) -> None:
    model = trained_model(shared, normalization)
    folder = export(model, tmp_path / "repository")
    open_all_doors(str(folder), tmp_path, model, {"HF_HUB_OFFLINE": "1"})
    assert len(list(folder.rglob("*.safetensors"))) == 1 and not list(folder.rglob("*.bin"))


def test_with_the_package_no_remote_code_and_no_flag_is_needed(tmp_path: Path) -> None:
    folder = export(trained_model(False, "batch_norm"), tmp_path)
    code = (
        "import sys, ctrl_csc_hf; from transformers import AutoConfig, AutoModel;"
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor;"
        "loaded = [auto.from_pretrained(sys.argv[1]) for auto in (AutoConfig, AutoModel, AutoImageProcessor)];"
        "print([type(part).__module__ for part in loaded])"
    )
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    names = [f"ctrl_csc_hf.{name}_ctrl_csc" for name in ("configuration", "modeling", "image_processing")]
    assert result.stdout.strip() == str(names)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = trained_model(True, "batch_norm")
    export(model, tmp_path / "first")
    export(CtrlCscModel.from_pretrained(tmp_path / "first"), tmp_path / "second")
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "first", tmp_path / "second")
    )
    assert first == second


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 100), "weights of .* are damaged"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-50]
            ),
            "weights of .* are damaged",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "bert"})),
            "model_type='bert' is not allowed",
        ),
        (
            lambda folder: (
                torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"),
                (folder / "model.safetensors").unlink(),
            ),
            "model.safetensors",
        ),
    ],
    ids=["missing", "no safetensors", "cut off", "other model", "pickled only"],
)
def test_a_damaged_repository_is_a_clear_error(harm, message: str, tmp_path: Path) -> None:
    folder = export(trained_model(False, "batch_norm"), tmp_path)
    harm(folder)
    with pytest.raises((OSError, ValueError), match=message):
        CtrlCscModel.from_pretrained(folder)


def test_a_missing_tensor_is_reported(tmp_path: Path) -> None:
    folder = export(trained_model(False, "batch_norm"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.last_stage.dictionary"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, report = CtrlCscModel.from_pretrained(folder, output_loading_info=True)
    assert list(report["missing_keys"]) == ["encoder.last_stage.dictionary"]
