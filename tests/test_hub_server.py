"""The tests' own Hub keeps its promises towards the real client."""

import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import *
api, folder = HfApi(), Path(sys.argv[1])
"""


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text and 300 kB of weights."""
    (tmp_path / "files" / "sub").mkdir(parents=True)
    (tmp_path / "files" / "sub" / "notes.md").write_text("first\n", encoding="utf-8")
    (tmp_path / "files" / "model.safetensors").write_bytes(bytes(range(250)) * 1200)
    return tmp_path / "files"


def client(server: HubServer, folder: Path, code: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", **server.environment(folder.parent / "cache")}
    command = [sys.executable, "-c", CLIENT + code, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_what_is_uploaded_comes_back_and_old_revisions_stay(server: HubServer, folder: Path) -> None:
    code = """
api.create_repo("org/name"); api.create_repo("org/name", exist_ok=True)
first = api.upload_folder(repo_id="org/name", folder_path=folder).oid
(folder / "sub/notes.md").write_text("second\\n")
second = api.upload_folder(repo_id="org/name", folder_path=folder).oid
assert first != second
assert Path(hf_hub_download("org/name", "sub/notes.md", revision=first)).read_text() == "first\\n"
copy = Path(snapshot_download("org/name"))
for path in ("sub/notes.md", "model.safetensors"):
    assert (copy / path).read_bytes() == (folder / path).read_bytes()
info = api.model_info("org/name")
assert (info.sha, info.private) == (second, False)
print(sorted(file.rfilename for file in info.siblings))
"""
    assert client(server, folder, code) == "['.gitattributes', 'model.safetensors', 'sub/notes.md']"
    assert server.count("PUT", "/lfs/") == 1


def test_uploading_the_same_again_changes_nothing(server: HubServer, folder: Path) -> None:
    upload = 'api.create_repo("org/name", private=True, exist_ok=True)\n'
    upload += 'api.upload_folder(repo_id="org/name", folder_path=folder)\n'
    client(server, folder, upload)
    commits = len(server.repositories["org/name"].commits)
    client(server, folder, upload)
    assert len(server.repositories["org/name"].commits) == commits
    assert server.count("PUT", "/lfs/") == 1 and server.count("POST", "/commit/") == 1
    assert server.repositories["org/name"].private


def test_what_does_not_exist_is_the_clients_own_error(server: HubServer, folder: Path) -> None:
    code = """
api.create_repo("org/name")
for arguments, error in (
    (dict(repo_id="org/name", filename="missing"), EntryNotFoundError),
    (dict(repo_id="org/name", filename=".gitattributes", revision="missing"), RevisionNotFoundError),
    (dict(repo_id="org/other", filename="x"), RepositoryNotFoundError),
):
    try: hf_hub_download(**arguments)
    except error: print("raised")
"""
    assert client(server, folder, code).split() == ["raised"] * 3


def test_an_upload_that_breaks_off_leaves_the_revision_before(server: HubServer, folder: Path) -> None:
    client(server, folder, 'api.create_repo("org/name")\n')
    code = 'api.upload_folder(repo_id="org/name", folder_path=folder)\n'
    server.break_next = "lfs"
    with pytest.raises(AssertionError, match="broken off"):
        client(server, folder, code)
    assert list(server.files("org/name")) == [".gitattributes"]
