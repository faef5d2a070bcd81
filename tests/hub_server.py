"""A small Hugging Face Hub on loopback, for the real huggingface_hub client: models, LFS, commits, resolve, tree.

Everything is kept in memory. Commits are atomic: one that fails leaves the revision before it as it was.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".webp")
# Some of those that the Hub lists
LICENCES = ("apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "gpl-3.0", "mit", "openrail", "other", "unknown")
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        """Of the file as git sees it: for LFS, that is a pointer."""
        content = self.content
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # sha -> path -> blob
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> sha

    def commit(self, files: dict[str, Blob]) -> str:
        named = sorted((path, blob.git_oid) for path, blob in files.items())
        sha = hashlib.sha1(f"{self.name} {len(self.commits)} {named}".encode()).hexdigest()
        self.commits[sha], self.refs["main"] = files, sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"no revision {revision}")
        return sha


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """`with HubServer() as server`: the client reaches it under `server.url`.

    datasets: what the Hub tells of a data set, by its id: cardData, private, gated.
    requests: what came in, as (method, path).
    break_next: what fails at its next request, one of "lfs" (the server gives up in the middle of the upload), "commit"
        (the server answers 403) and "silence" (the server takes part of an upload, sets `silent` and never answers).
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}  # LFS, sha256 -> content
        self.requests: list[tuple[str, str]] = []
        self.break_next: str | None = None
        self.silent = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """What a client process needs to know this server alone, with a cache of its own and without Xet."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def count(self, method: str, pattern: str) -> int:
        return sum(verb == method and re.search(pattern, path) is not None for verb, path in self.requests)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return {path: blob.content for path, blob in repository.commits[repository.sha(revision)].items()}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/(.+?)/preupload/([^/]+)", "preupload"),
        ("POST", r"/(.+?)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_put"),
        ("POST", r"/api/models/(.+?)/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/(.+?)/tag/([^/]+)", "tag"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/datasets/([^/]+/[^/]+)", "dataset_info"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        try:
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    return getattr(self, name)(*(unquote(group) if group else "main" for group in match.groups()))
            raise HubError(404, "EntryNotFound", f"no route {self.command} {path}")
        except HubError as error:
            self._send({"error": str(error)}, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def create_repository(self) -> None:
        request = json.loads(self._body())
        name = f"{request.get('organization') or 'tester'}/{request['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._send(url, 409)
        self.hub.repositories[name] = Repository(
            name, "private" in (request.get("visibility"), request.get("private") and "private")
        )
        self.hub.repositories[name].commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        self._send(url)

    def validate_card(self) -> None:
        matter = FRONT_MATTER.match(json.loads(self._body())["content"])
        try:
            metadata = yaml.safe_load(matter[1]) if matter else {}
            problem = None if isinstance(metadata, dict) else "the metadata must be a mapping"
            if not problem and metadata.get("license", "other") not in LICENCES:
                problem = f'"license" must be one of {list(LICENCES)}'
        except yaml.YAMLError as error:
            problem = str(error)
        warnings = [] if matter else [{"message": "empty or missing yaml metadata"}]
        self._send({"errors": [{"message": problem}] if problem else [], "warnings": warnings}, 400 if problem else 200)

    def preupload(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        current = repository.commits[repository.sha(revision)]
        files = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": self._oid(current.get(entry["path"])),
            }
            for entry in json.loads(self._body())["files"]
        ]
        self._send({"files": files})

    def lfs_batch(self, name: str) -> None:
        self._repository(name)
        objects = []
        for entry in json.loads(self._body())["objects"]:
            answer: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            objects.append(answer)
        self._send({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.hub.break_next == "lfs":
            self.hub.break_next = None
            self.rfile.read(1000)
            self.close_connection = True
            # The client would retry, with pauses, what looks like the network's fault.
            raise HubError(403, "Forbidden", "broken off")
        if self.hub.break_next == "silence":
            self.hub.break_next = None
            self.close_connection = True
            self.rfile.read(1000)
            self.hub.silent.set()
            self.rfile.read()  # until the client is gone
            return
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "BadRequest", "the content does not have its sha256")
        self.hub.objects[oid] = content
        self._send({})

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        lines = [json.loads(line) for line in self._body().splitlines()]
        if self.hub.break_next == "commit":
            self.hub.break_next = None
            raise HubError(403, "Forbidden", "broken off")
        parent = repository.sha(revision)
        files = dict(repository.commits[parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit", parent) != parent:
                    raise HubError(412, "PreconditionFailed", "main has moved")
            elif line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise HubError(400, "BadRequest", f"no LFS object {value['oid']}")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, "BadRequest", f"unknown operation {line['key']}")
        sha = repository.commit(files)
        self._send({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def tag(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        repository.refs[json.loads(self._body())["tag"]] = repository.sha(revision)
        self._send({})

    def tree(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        files = repository.commits[repository.sha(revision)]
        listing = [
            {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content)}
            | ({"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}} if blob.lfs else {})
            for path, blob in sorted(files.items())
        ]
        self._send(listing)

    def info(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        sha = repository.sha(revision)
        card = FRONT_MATTER.match(repository.commits[sha].get("README.md", Blob(b"", False)).content.decode())
        self._send({
            "id": name,
            "modelId": name,
            "sha": sha,
            "private": repository.private,
            "cardData": yaml.safe_load(card[1]) if card else None,
            "siblings": [{"rfilename": path} for path in sorted(repository.commits[sha])],
        })  # fmt: skip

    def dataset_info(self, name: str) -> None:
        if name not in self.hub.datasets:
            raise HubError(404, "RepoNotFound", f"no data set {name}")
        self._send({"id": name, "private": False, "gated": False, "siblings": []} | self.hub.datasets[name])

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        sha = repository.sha(revision)
        blob = repository.commits[sha].get(path)
        if blob is None:
            raise HubError(404, "EntryNotFound", f"no file {path}")
        content, status, headers = blob.content, 200, {"X-Repo-Commit": sha, "ETag": f'"{self._oid(blob)}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            headers["Content-Range"] = f"bytes {wanted[1]}-{len(content) - 1}/{len(content)}"
            content, status = content[int(wanted[1]) :], 206
        self._send(content, status, headers)

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise HubError(404, "RepoNotFound", f"no repository {name}")
        return self.hub.repositories[name]

    @staticmethod
    def _oid(blob: Blob | None) -> str | None:
        """What the client compares its own file with: sha256 for LFS, git's sha1 otherwise."""
        return None if blob is None else (blob.sha256 if blob.lfs else blob.git_oid)

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
