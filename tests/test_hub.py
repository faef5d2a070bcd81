"""An exported folder opens all doors with the same bits, with and without this package."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TRAINING
from diffusers import DiffusionPipeline
from hub_server import Blob, HubServer, Repository
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from test_halves import trained_model

from ctrl_csc_hf import CtrlCscDecoder, CtrlCscEncoder, CtrlCscImageProcessor, CtrlCscModel
from ctrl_csc_hf.hub.publishing import export
from ctrl_csc_hf.models.sampling import LatentSampler

needs_downloaded_code = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.13"),
    reason="transformers 5.12 runs no code from a downloaded folder, which DiffusionPipeline needs",
)
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
import base64, io, os, sys, torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
repo, images, output, keywords, by_folder = sys.argv[1:]
images, keywords = torch.load(images), eval(keywords)
folder = repo if os.path.isdir(repo) else snapshot_download(repo, **keywords)
REMOTE = {"trust_remote_code": True, **keywords}
found = {}
assert AutoConfig.from_pretrained(repo, **REMOTE).model_type == "ctrl_csc"
processor = AutoImageProcessor.from_pretrained(repo, **REMOTE)
x = processor(images, return_tensors="pt").pixel_values
with torch.no_grad():
    model = AutoModel.from_pretrained(repo, **REMOTE).eval()
    found["AutoModel"] = model(x).reconstruction
    pipe = DiffusionPipeline.from_pretrained(folder if eval(by_folder) else repo, **REMOTE)
    piped = pipe(images, output_type="pt", return_latents=True)
    found["pipeline"], found["pipeline latents"] = piped.images, piped.latents
    halves = []
    for half in ("Encoder", "Decoder"):
        half_class = get_class_from_dynamic_module(f"model/modeling_ctrl_csc.CtrlCsc{half}", repo, **keywords)
        loaded, report = half_class.from_pretrained(repo, output_loading_info=True, **keywords)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        halves.append(loaded.eval())
    found["halves"] = halves[1](halves[0](x).latents).reconstruction
sys.path.insert(0, folder)
from handler import EndpointHandler
handler = EndpointHandler(folder)
buffers = [io.BytesIO() for _ in images]
for image, buffer in zip(images, buffers):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
request = {"inputs": [base64.b64encode(buffer.getvalue()).decode() for buffer in buffers]}
found["handler latents"] = torch.tensor(handler({**request, "parameters": {"task": "encode"}})["latents"])
shown = [Image.open(io.BytesIO(base64.b64decode(image))) for image in handler(request)["images"]]
found["handler"] = [image.tobytes() for image in shown]
assert "ctrl_csc_hf" not in sys.modules
torch.save({"x": x, **found}, output)
"""


def images() -> torch.Tensor:
    """uint8, (3, 3, 12, 10)"""
    return torch.randint(0, 256, (3, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def open_all_doors(
    repo: str, tmp_path: Path, model: CtrlCscModel, environment: dict[str, str], by_folder: bool = False, **keywords
) -> None:
    """Opens them in a new process without the package, and compares with the model in this one.

    by_folder: opens DiffusionPipeline from the downloaded folder; offline, diffusers does not find custom code by a
        repository's name.
    """
    torch.save(images(), tmp_path / "images.pt")
    arguments = [repo, str(tmp_path / "images.pt"), str(tmp_path / "found.pt"), repr(keywords), str(by_folder)]
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
    for door in ("AutoModel", "halves"):
        assert torch.equal(found[door], expected.reconstruction), door
    for door in ("pipeline latents", "handler latents"):
        assert torch.equal(found[door], expected.latents), door
    processor = CtrlCscImageProcessor(image_size=model.config.image_size)
    assert torch.equal(found["pipeline"], processor.postprocess(expected.reconstruction, "pt"))
    assert found["handler"] == [image.tobytes() for image in processor.postprocess(expected.reconstruction)]


@pytest.mark.parametrize("shared", [False, True])
def test_every_door_opens_without_the_package_and_shows_the_same(shared: bool, tmp_path: Path) -> None:
    model = trained_model(shared)
    folder = export(model, tmp_path / "repository")
    open_all_doors(str(folder), tmp_path, model, {"HF_HUB_OFFLINE": "1"})
    assert len(list(folder.rglob("*.safetensors"))) == 1 and not list(folder.rglob("*.bin"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_checkpoint(folder: Path, model: CtrlCscModel, examples: int = 2) -> Path:
    """As train.py leaves it, in short."""
    model.save_pretrained(folder)
    CtrlCscImageProcessor(image_size=model.config.image_size).save_pretrained(folder)
    psnr = {"name": "psnr", "value": 17.5, "dataset": "uoft-cs/cifar10", "split": "test", "num_images": 100}
    figures = [psnr | {"feature_model": None, "measured_by": "training/train.py"}]
    (folder / "metrics.json").write_text(json.dumps({"step": 4, "figures": figures}), encoding="utf-8")
    (folder / "training_args.json").write_text(
        json.dumps({"hub_dataset_id": "uoft-cs/cifar10", "max_train_steps": 4}), encoding="utf-8"
    )
    (folder / "examples").mkdir()
    for name in ("reconstructions.png", *(f"examples/{index}.png" for index in range(examples))):
        Image.new("RGB", (8, 8), "orange").save(folder / name)
    return folder


def test_the_same_checkpoint_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "checkpoint", trained_model(True))
    code = (
        "import sys; from ctrl_csc_hf import CtrlCscModel; from ctrl_csc_hf.hub.publishing import export; "
        "export(CtrlCscModel.from_pretrained(sys.argv[1]), sys.argv[2], checkpoint=sys.argv[1])"
    )
    for name, seed in (("first", "1"), ("second", "2")):
        command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / name)]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
    first = files(tmp_path / "first")
    assert first == files(tmp_path / "second")
    assert {"README.md", "architecture.png", "examples/1.png", "metrics.json", "training_args.json"} <= set(first)
    export(CtrlCscModel.from_pretrained(tmp_path / "first"), tmp_path / "again", checkpoint=tmp_path / "first")
    assert first == files(tmp_path / "again")


def test_an_export_replaces_that_of_another_model_in_its_folder(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "checkpoint", trained_model(True))
    LatentSampler(torch.ones(1), torch.zeros(1, 6), [torch.eye(6)]).save_pretrained(checkpoint / "sampler")
    model = CtrlCscModel.from_pretrained(checkpoint)
    first = files(export(model, tmp_path / "out", checkpoint=checkpoint))
    with torch.no_grad():
        model.decoder.output_bias.add_(1)
    left = files(export(model, tmp_path / "out"))
    gone = {"metrics.json", "training_args.json", "reconstructions.png", "examples/0.png", "examples/1.png"}
    assert first.keys() - left.keys() == gone | {"sampler/model.safetensors", "sampler/sampling_ctrl_csc.py"}
    assert b"17.5" in first["README.md"] and b"17.5" not in left["README.md"]


def test_a_model_saved_anew_into_an_export_takes_no_card_figures_or_sampler_of_the_old_one(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "checkpoint", trained_model(True))
    LatentSampler(torch.ones(1), torch.zeros(1, 6), [torch.eye(6)]).save_pretrained(checkpoint / "sampler")
    model = CtrlCscModel.from_pretrained(checkpoint)
    out = export(model, tmp_path / "out", checkpoint=checkpoint)
    own = {"notes.md": b"mine", "examples/own.png": b"mine", "examples/own.txt": b"mine", "samples/own.png": b"mine"}
    for name, content in own.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    first = files(out)
    model.save_pretrained(out)
    assert files(out).keys() == first.keys()
    with torch.no_grad():
        model.decoder.output_bias.add_(1)
    model.save_pretrained(out)
    left = files(out)
    gone = {"metrics.json", "training_args.json", "reconstructions.png", "examples/0.png", "examples/1.png"}
    gone |= {"README.md", "handler.py", "architecture.png"}
    assert first.keys() - left.keys() == gone | {"sampler/model.safetensors", "sampler/sampling_ctrl_csc.py"}
    assert own.items() <= left.items()


@pytest.mark.parametrize("shared", [False, True])
def test_half_the_bytes_give_nearly_the_same_model_in_its_own_precision(shared: bool, tmp_path: Path) -> None:
    model = trained_model(shared)
    whole = export(model, tmp_path / "whole")
    half = export(model, tmp_path / "half", half=True)
    sizes = [
        sum(t.numel() * t.element_size() for t in load_file(f / "model.safetensors").values()) for f in (whole, half)
    ]
    dictionaries = {dictionary.dictionary for dictionary in model.dictionaries()}
    assert sizes[0] - sizes[1] == 2 * sum(dictionary.numel() for dictionary in dictionaries)
    loaded = CtrlCscModel.from_pretrained(half).eval()
    assert loaded.dtype == DiffusionPipeline.from_pretrained(half, trust_remote_code=True).model.dtype == torch.float32
    assert all(dictionary.has_unit_atoms() for dictionary in loaded.dictionaries())
    images = torch.rand(4, 3, model.config.image_size, model.config.image_size) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).reconstruction, model(images).reconstruction, atol=5e-3, rtol=0)


def test_the_checkpoints_own_image_processor_is_published(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "checkpoint", trained_model(False))
    CtrlCscImageProcessor(image_size=8, resample=0, do_center_crop=False).save_pretrained(checkpoint)
    folder = export(CtrlCscModel.from_pretrained(checkpoint), tmp_path / "repository", checkpoint=checkpoint)
    published = CtrlCscImageProcessor.from_pretrained(folder)
    assert (published.resample, published.do_center_crop) == (0, False)


@pytest.mark.parametrize(
    ("keywords", "folder", "message"),
    [
        ({"repo_id": "name"}, "new", "repo_id must be ORGANIZATION/NAME, got 'name'"),
        ({"repo_id": "a/b/c"}, "new", "must be in the form .*'a/b/c'"),
        ({"repo_id": "org/na me"}, "new", "'org/na me'"),
        ({}, "file", "folder must be a folder or not exist, got .*file"),
        ({}, "checkpoint", "folder must be another one than the checkpoint's, got .*checkpoint"),
        (
            {"checkpoint": "state"},
            "new",
            "state is a state of a run, not its model: end the run there, by train.py with",
        ),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(
    keywords: dict[str, str], folder: str, message: str, tmp_path: Path
) -> None:
    model = trained_model(False)
    checkpoint = a_checkpoint(tmp_path / "checkpoint", model)
    (tmp_path / "file").touch()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "training_state.json").touch()
    before = files(tmp_path)
    of = tmp_path / keywords.pop("checkpoint", checkpoint.name)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / folder, checkpoint=of, **keywords)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 100), "weights of .* are damaged"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-50]
            ),
            "weights of .* are damaged",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8"),
            "model_type='bert' is not allowed",
        ),
        (
            lambda folder: (
                torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"),
                (folder / "model.safetensors").unlink(),
            ),
            "no file named model.safetensors",
        ),
    ],
    ids=["missing", "no safetensors", "cut off", "other model", "pickled only"],
)
def test_a_damaged_repository_is_a_clear_error_at_every_door(harm, message: str, tmp_path: Path) -> None:
    folder = export(trained_model(False), tmp_path)
    harm(folder)
    for door in (CtrlCscModel, CtrlCscEncoder, CtrlCscDecoder, DiffusionPipeline):
        flag = {"trust_remote_code": True} if door is DiffusionPipeline else {}
        with pytest.raises((OSError, ValueError), match=message):
            door.from_pretrained(folder, **flag)


def test_a_missing_tensor_is_reported(tmp_path: Path) -> None:
    folder = export(trained_model(False), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.last_stage.dictionary"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, report = CtrlCscModel.from_pretrained(folder, output_loading_info=True)
    assert list(report["missing_keys"]) == ["encoder.last_stage.dictionary"]


# ---- over HTTP


TERMS = ("--license", "mit", "--public")


def publisher(
    server: HubServer, checkpoint: Path, name: str = "org/name", *flags: str, terms: tuple[str, ...] = TERMS
) -> subprocess.Popen[str]:
    """The command, in a process of its own: the client reads its environment on import."""
    command = str(Path(sys.executable).parent / "ctrl-csc")
    return subprocess.Popen(
        [command, "publish", "--model", str(checkpoint), "--repo_id", name, *terms, *flags],
        env={**os.environ, **server.environment(checkpoint.parent / "publisher")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def publish(
    server: HubServer, checkpoint: Path, name: str = "org/name", *flags: str, terms: tuple[str, ...] = TERMS
) -> str:
    process = publisher(server, checkpoint, name, *flags, terms=terms)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.strip()


@needs_downloaded_code
def test_what_is_published_opens_by_every_door_elsewhere_and_was_stored_and_fetched_once(tmp_path: Path) -> None:
    model = trained_model(True)
    model.save_pretrained(tmp_path / "checkpoint")
    with HubServer() as server:
        assert publish(server, tmp_path / "checkpoint") == f"Published: {server.url}/org/name"
        weights = hashlib.sha256((tmp_path / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()
        assert server.count("PUT", weights) == 1
        sha = server.repositories["org/name"].sha("main")
        open_all_doors("org/name", tmp_path, model, server.environment(tmp_path / "cache"))
        assert server.count("GET", "model.safetensors") == 1
        offline = {**server.environment(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}
        open_all_doors("org/name", tmp_path, model, offline | {"HF_HUB_OFFLINE": "1"}, by_folder=True)
        open_all_doors("org/name", tmp_path, model, offline, by_folder=True, local_files_only=True)
        elsewhere = str(tmp_path / "elsewhere")
        environment = server.environment(tmp_path / "other_cache")
        open_all_doors("org/name", tmp_path, model, environment, revision=sha, cache_dir=elsewhere)
        assert list((tmp_path / "elsewhere").glob("models--org--name/snapshots/*/model.safetensors"))


@needs_downloaded_code
def test_with_the_package_no_remote_code_and_no_flag_is_needed_but_for_the_pipeline(tmp_path: Path) -> None:
    trained_model(True).save_pretrained(tmp_path / "checkpoint")
    code = (
        "import ctrl_csc_hf; from transformers import AutoConfig, AutoModel; from diffusers import DiffusionPipeline;"
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor;"
        "doors = (AutoConfig, AutoModel, AutoImageProcessor, ctrl_csc_hf.CtrlCscEncoder, ctrl_csc_hf.CtrlCscDecoder);"
        "loaded = [door.from_pretrained('org/name') for door in doors];"
        "pipe = DiffusionPipeline.from_pretrained('org/name', trust_remote_code=True);"
        "print([type(part).__module__ for part in (*loaded, pipe.model, pipe.image_processor)])"
    )
    with HubServer() as server:
        publish(server, tmp_path / "checkpoint")
        environment = {**os.environ, **server.environment(tmp_path / "cache")}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    assert result.returncode == 0, result.stderr
    names = ("configuration", "modeling", "image_processing", "modeling", "modeling", "modeling", "image_processing")
    assert result.stdout.strip() == str([f"ctrl_csc_hf.models.{name}_ctrl_csc" for name in names])


def test_publishing_again_uploads_nothing_and_a_change_keeps_the_old_revision(tmp_path: Path) -> None:
    model = trained_model(False)
    model.save_pretrained(tmp_path / "checkpoint")
    with HubServer() as server:
        publish(server, tmp_path / "checkpoint")
        before, first = server.files("org/name"), server.repositories["org/name"].sha("main")
        puts = server.count("PUT", "/lfs/")
        publish(server, tmp_path / "checkpoint")
        assert (server.count("PUT", "/lfs/"), server.count("POST", "/commit/")) == (puts, 1)
        with torch.no_grad():
            model.decoder.output_bias.add_(1)
        model.save_pretrained(tmp_path / "checkpoint")
        publish(server, tmp_path / "checkpoint")
        assert server.files("org/name", first) == before
        changed = {path for path, content in server.files("org/name").items() if before[path] != content}
        assert changed == {"model.safetensors"}


def test_a_publication_replaces_what_the_one_before_had_and_leaves_what_others_added(tmp_path: Path) -> None:
    model = trained_model(False)
    with HubServer() as server:
        first = a_checkpoint(tmp_path / "first", model, examples=4)
        LatentSampler(torch.ones(1), torch.zeros(1, 6), [torch.eye(6)]).save_pretrained(first / "sampler")
        publish(server, first)
        assert {"sampler/model.safetensors", "sampler/sampling_ctrl_csc.py"} <= set(server.files("org/name"))
        repository = server.repositories["org/name"]
        added = {name: Blob(b"by hand", False) for name in ("notes.md", "figures/plot.png", "model/old.py")}
        repository.commit(repository.commits[repository.sha("main")] | added)
        model.save_pretrained(tmp_path / "second")  # without figures, settings, pictures and sampler
        publish(server, tmp_path / "second")
        found = set(server.files("org/name"))
    export(model, tmp_path / "expected", repo_id="org/name", license="mit")
    assert found == {*files(tmp_path / "expected"), ".gitattributes", "notes.md", "figures/plot.png"}


def test_a_name_alone_is_the_accounts_and_the_card_tells_it_whole(tmp_path: Path) -> None:
    trained_model(False).save_pretrained(tmp_path / "checkpoint")
    with HubServer() as server:
        for _ in range(2):  # created, and found
            assert publish(server, tmp_path / "checkpoint", "name", terms=("--license=mit", "--private")).endswith(
                "/tester/name"
            )
        assert server.repositories["tester/name"].private
        assert b'AutoModel.from_pretrained("tester/name", trust_remote' in server.files("tester/name")["README.md"]


TERMS_OF = """
import sys
from ctrl_csc_hf.hub.publishing import publication_terms
for arguments in eval(sys.argv[1]):
    try:
        print(publication_terms(*arguments))
    except ValueError as error:
        print(error)
"""
FLAGS = r"license \(--license or --hub_license\)", r"private \(--private, --public or --hub_private_repo\)"


TERMS = [
    ((["org/open"], None, None), r"\('cc-by-4.0', False\)"),
    ((["org/gated"], None, None), r"\('other', True\)"),
    ((["org/private"], None, None), r"\('mit', True\)"),
    ((["org/private"], "gpl-3.0", False), r"\('gpl-3.0', False\)"),  # what is given holds
    ((["org/unknown"], None, None), f"{FLAGS[0]} must be given, as the data set org/unknown has the licence 'unknown'"),
    ((["org/several"], None, True), rf"{FLAGS[0]} must be given, .* has the licence \['mit', 'other'\]"),
    ((["org/bare"], None, None), f"{FLAGS[0]} must be given, as the data set org/bare has the licence None"),
    ((["org/unknown"], "mit", None), r"\('mit', False\)"),
    (([None], "mit", True), r"\('mit', True\)"),
    (([None], None, None), f"{FLAGS[0]} and {FLAGS[1]} must be given to publish a model of local data"),
    (([None], "mit", None), f"{FLAGS[1]} must be given to publish a model of local data"),
    (([None], None, True), f"{FLAGS[0]} must be given to publish a model of local data"),
    (([None], "cc-by-nd-9.0", True), rf"{FLAGS[0]} must be one that the Hub lists, got 'cc-by-nd-9\.0': see .*"),
    ((["org/open", "org/private"], "mit", None), r"\('mit', True\)"),  # the stricter of two
    ((["org/open", "org/open"], None, None), r"\('cc-by-4.0', False\)"),
    ((["org/open", "org/private"], None, None), f"{FLAGS[0]} must be given, as the data sets have several: .*"),
    ((["org/open", None], None, None), f"{FLAGS[0]} and {FLAGS[1]} must be given to publish a model of local data"),
]  # fmt: skip


def test_licence_and_visibility_are_the_data_sets_or_asked_for(data_sets: HubServer, tmp_path: Path) -> None:
    environment = {**os.environ, **data_sets.environment(tmp_path / "cache")}
    command = [sys.executable, "-c", TERMS_OF, repr([arguments for arguments, _ in TERMS])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for found, (arguments, expected) in zip(result.stdout.splitlines(), TERMS, strict=True):
        assert re.fullmatch(expected, found), arguments


@pytest.fixture(scope="module")
def data_sets():
    with HubServer() as server:
        server.datasets |= {
            "org/open": {"cardData": {"license": "cc-by-4.0"}},
            "org/gated": {"cardData": {"license": "other"}, "gated": "manual"},
            "org/private": {"cardData": {"license": "mit"}, "private": True},
            "org/unknown": {"cardData": {"license": "unknown"}},
            "org/several": {"cardData": {"license": ["mit", "other"]}},
            "org/bare": {},
        }
        yield server


def test_a_model_of_local_data_is_published_by_explicit_terms_alone(tmp_path: Path) -> None:
    trained_model(False).save_pretrained(tmp_path / "checkpoint")
    with HubServer() as server:
        process = publisher(server, tmp_path / "checkpoint", terms=())
        _, errors = process.communicate()
        assert process.returncode == 1 and not server.repositories
        assert re.fullmatch(f"Error: {FLAGS[0]} and {FLAGS[1]} must be given .*\n", errors)


def test_a_model_follows_its_data_set_into_privacy_but_into_no_public_repository(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "checkpoint", trained_model(False))
    with HubServer() as server:
        server.datasets["uoft-cs/cifar10"] = {"cardData": {"license": "cc-by-nc-4.0"}, "gated": "auto"}
        publish(server, checkpoint, terms=())
        assert server.repositories["org/name"].private
        assert b"\nlicense: cc-by-nc-4.0\n" in server.files("org/name")["README.md"]
        server.repositories["org/public"] = Repository("org/public", private=False)
        server.repositories["org/public"].commit({})
        process = publisher(server, checkpoint, "org/public", terms=())
        _, errors = process.communicate()
        assert process.returncode == 1 and not server.files("org/public")
        assert "Error: private is True, but the repository org/public is public" in errors


PUSH = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("org/name", trust_remote_code=True)
pipe.push_to_hub("org/copy", private=True, commit_message="A copy")
pipe.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="org/saved")
with torch.no_grad():
    pipe.model.decoder.output_bias.add_(1)
pipe.register_modules(sampler=None)
pipe.push_to_hub("org/name")
assert "ctrl_csc_hf" not in sys.modules
"""


@needs_downloaded_code
def test_a_pipeline_from_the_hub_is_pushed_without_the_package_with_its_card_while_the_weights_are_its(
    tmp_path: Path,
) -> None:
    checkpoint = a_checkpoint(tmp_path / "checkpoint", trained_model(True))
    LatentSampler(torch.ones(1), torch.zeros(1, 6), [torch.eye(6)]).save_pretrained(checkpoint / "sampler")
    with HubServer() as server:
        publish(server, checkpoint)
        published = server.files("org/name")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **server.environment(tmp_path / "cache")}
        command = [sys.executable, "-c", WITHOUT_THE_PACKAGE + PUSH, str(tmp_path / "saved")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert server.files("org/copy") == server.files("org/saved") == published
        assert server.repositories["org/copy"].private
        assert files(tmp_path / "saved").keys() | {".gitattributes"} == published.keys()
        pushed = server.files("org/name")
        changed = {name for name, content in pushed.items() if published[name] != content}
        assert changed == {"model.safetensors", "model_index.json"}  # the card of the repository itself stays
        assert {name for name in published if name not in pushed} == {
            "sampler/model.safetensors",
            "sampler/sampling_ctrl_csc.py",
        }
    open_all_doors(str(tmp_path / "saved"), tmp_path, CtrlCscModel.from_pretrained(checkpoint).eval(), {})


# As huggingface.js builds them for the page of a model, packages/tasks/src/model-libraries-snippets.ts.
SNIPPETS = {
    "transformers": """
# Use a pipeline as a high-level helper
from transformers import pipeline

pipe = pipeline("{tag}", model="{id}", trust_remote_code=True)
""",
    "AutoModel": """
# Load model directly
from transformers import AutoModel
model = AutoModel.from_pretrained("{id}", trust_remote_code=True, device_map="auto")
""",
    "AutoImageProcessor": """
# Load model directly
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{id}", trust_remote_code=True, device_map="auto")
""",
}


def test_the_snippets_that_the_hub_shows_run_without_the_package_and_the_pipeline_gives_latents(
    tmp_path: Path,
) -> None:
    model = trained_model(False)
    folder = export(model, tmp_path / "repository")
    card = ModelCard.load(folder / "README.md").data
    # With another library, or its tag, the Hub shows other snippets; custom_code follows from auto_map.
    assert card.get("library_name") == "transformers" and "diffusers" not in card.tags
    assert "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    picture = CtrlCscImageProcessor(image_size=8).postprocess(torch.rand(1, 3, 8, 8) * 2 - 1)[0]
    picture.save(tmp_path / "image.png")
    chosen = ["transformers", "AutoModel"]
    if Version(transformers.__version__) >= Version("5.18"):
        chosen.append("AutoImageProcessor")
    code = "".join(SNIPPETS[name].format(tag=card.pipeline_tag, id=folder) for name in chosen)
    code += f"import json; print(json.dumps(pipe({str(tmp_path / 'image.png')!r})))"
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE + code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    pixel_values = CtrlCscImageProcessor(image_size=8)(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.encode(pixel_values).latents
    torch.testing.assert_close(torch.tensor(json.loads(result.stdout)), expected, atol=1e-6, rtol=0)


def test_train_publishes_what_it_trained(tiny_preset: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    paths = {
        "config": tiny_preset,
        "train_data_dir": image_folder,
        "output_dir": folder,
        "cache_dir": tmp_path / "data",
    }
    flags = [f"--{name}={path}" for name, path in paths.items()]
    with HubServer() as server:
        subprocess.run(
            [
                sys.executable,
                str(TRAINING / "train.py"),
                *flags,
                "--push_to_hub",
                "--hub_model_id=org/trained",
                "--hub_license=mit",
                "--hub_private_repo=False",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", **server.environment(tmp_path / "cache")},
            check=True,
        )
        files = server.files("org/trained")
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert json.loads(files["metrics.json"])["step"] == 4
    assert b"PSNR, mean over images" in files["README.md"]


@pytest.mark.parametrize("moment", ["lfs", "commit", "silence"])
def test_an_upload_that_breaks_off_leaves_what_was_there_and_the_next_one_finishes_it(
    moment: str, tmp_path: Path
) -> None:
    model = trained_model(False)
    model.save_pretrained(tmp_path / "checkpoint")
    with HubServer() as server:
        publish(server, tmp_path / "checkpoint")
        before = server.files("org/name")
        with torch.no_grad():
            model.decoder.output_bias.add_(1)
        model.save_pretrained(tmp_path / "checkpoint")
        server.break_next = moment
        if moment == "silence":
            process = publisher(server, tmp_path / "checkpoint")
            assert server.silent.wait(timeout=120)
            process.kill()
            process.communicate()
        else:
            with pytest.raises(AssertionError, match="broken off"):
                publish(server, tmp_path / "checkpoint")
        assert server.files("org/name") == before
        puts = server.count("PUT", "/lfs/")
        publish(server, tmp_path / "checkpoint")
        assert server.count("PUT", "/lfs/") - puts == (0 if moment == "commit" else 1)
        whole = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
        assert server.files("org/name")["model.safetensors"] == whole
