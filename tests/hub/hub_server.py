"""A small Hub on the loopback device, for the tests of pushing and loading.

No well-kept Hub server exists in the package registries, so this one speaks what the installed huggingface_hub client
asks for: repositories, card validation, pre-upload, LFS by the basic transfer, commits, information and files. It
keeps everything in memory, refuses what the Hub documents to refuse, and can drop connections amid a request.

The Hub's own card validator is not public. The rules here are those that huggingface_hub's `ModelCardData` and the
error messages in its documentation tell: a YAML mapping; strings, or lists of them, of a known kind; base models are
Hub ids; a licence "other" has a name. The lists of licences and languages cannot be checked without the Hub.
"""

import base64
import hashlib
import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id


TOKEN = "hf_loopback"
TEXT_FIELDS = ("library_name", "pipeline_tag", "license", "license_name", "license_link", "base_model_relation")
LIST_FIELDS = ("tags", "language", "datasets", "metrics")
RELATIONS = ("finetune", "adapter", "quantized", "merge")


def card_errors(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a README's metadata."""
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block.group(2))
    except yaml.YAMLError as error:
        return [f"invalid yaml: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors = []
    for name in TEXT_FIELDS:
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in LIST_FIELDS:
        values = data.get(name, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{name}" must be a string or a list of strings')
    base_models = data.get("base_model", [])
    for index, name in enumerate(base_models if isinstance(base_models, list) else [base_models]):
        try:
            validate_repo_id(name)
        except HFValidationError:
            errors.append(f'"base_model[{index}]" with value "{name}" is not valid. Use a model id from the Hub.')
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required when "license" is "other"')
    return errors, []


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """As the Hub names contents: SHA-256 of an LFS file, git's name of any other."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits in their order: name and files of each."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def at(self, revision: str) -> dict[str, File] | None:
        return self.commits.get(self.head if revision == "main" else revision)


@dataclass
class Hub:
    """
    Attributes:
        drops: for "upload" and "commit", whether the coming requests of that kind are cut off, in their order.
        unknown: requests that this server does not speak.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    drops: dict[str, list[bool]] = field(default_factory=lambda: {"upload": [], "commit": []})
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def drops_next(self, kind: str) -> bool:
        dropped = bool(self.drops[kind]) and self.drops[kind].pop(0)
        if dropped:
            self.dropped.append(kind)
        return dropped

    def files(self, repository: str) -> dict[str, bytes]:
        """What the repository holds now."""
        found = self.repositories[repository]
        return {name: file.content for name, file in found.commits[found.head].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, content: dict | list | bytes = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer({"error": f"{what} not found"}, 404, X_Error_Code=what, X_Error_Message=f"{what} not found")

    def body(self, share: float = 1.0) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(int(self.headers.get("Content-Length", 0)) * share))

    def cut_off(self) -> None:
        """Read half of the request and reset the connection, as a network that fails does."""
        self.body(share=0.5)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # of the connection that was cut off
            self.close_connection = True

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for method, pattern, handle in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                writes = method in ("POST", "PUT") and "validate-yaml" not in path and "/lfs-storage/" not in path
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer({"error": "Invalid credentials"}, 401)
                return handle(self, **{name: value for name, value in match.groupdict().items() if value})
        self.hub.unknown.append(f"{self.command} {path}")
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def who_am_i(self) -> None:
        self.answer({"type": "user", "name": "someone", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def harnesses(self) -> None:
        self.answer({"standardEnvVars": [], "harnesses": {}})  # asked for by the command `hf`

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        known = name in self.hub.repositories
        # A new repository has a first commit, as the Hub's have.
        self.hub.repositories.setdefault(name, Repository({"0" * 40: {}}))
        content = {"url": f"{self.hub.url}/{name}", "name": name} | ({"error": "exists already"} if known else {})
        self.answer(content, 409 if known else 200)

    def validate_card(self) -> None:
        errors, warnings = card_errors(json.loads(self.body())["content"])
        content = {"errors": [{"message": each} for each in errors], "warnings": [{"message": w} for w in warnings]}
        self.answer(content, 400 if errors else 200)

    def preupload(self, repository: str, revision: str) -> None:
        asked = json.loads(self.body())["files"]
        if repository not in self.hub.repositories:
            return self.missing("RepoNotFound")
        held = self.hub.repositories[repository].at(revision)
        modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked]
        files = [
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            | ({"oid": held[file["path"]].oid} if file["path"] in held else {})
            for file, mode in zip(asked, modes, strict=True)
        ]
        return self.answer({"files": files})

    def lfs_batch(self, repository: str) -> None:
        objects = [{"oid": each["oid"], "size": each["size"]} for each in json.loads(self.body())["objects"]]
        for each in objects:
            if each["oid"] not in self.hub.uploads:
                base = f"{self.hub.url}/lfs-storage/{each['oid']}"
                each["actions"] = {"upload": {"href": base}, "verify": {"href": f"{self.hub.url}/{repository}.verify"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.hub.drops_next("upload"):
            return self.cut_off()
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer({"error": "content and name differ"}, 400)
        self.hub.uploads[oid] = content
        return self.answer()

    def lfs_verify(self, repository: str) -> None:
        asked = json.loads(self.body())
        there = len(self.hub.uploads.get(asked["oid"], b"")) == asked["size"]
        self.answer({}, 200 if there else 404)

    def commit(self, repository: str, revision: str) -> None:
        if self.hub.drops_next("commit"):
            return self.cut_off()
        content = self.body()
        found = self.hub.repositories[repository]
        files = dict(found.at(revision))
        for line in content.splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif each["key"] == "lfsFile":
                if value["oid"] not in self.hub.uploads:
                    return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
                files[value["path"]] = File(self.hub.uploads[value["oid"]], is_lfs=True)
            elif each["key"] != "header":
                return self.answer({"error": f"unknown operation {each['key']}"}, 400)
        name = hashlib.sha1(found.head.encode() + content).hexdigest()
        found.commits[name] = files
        return self.answer({"commitUrl": f"{self.hub.url}/{repository}/commit/{name}", "commitOid": name})

    def information(self, repository: str, revision: str | None = None) -> None:
        found = self.hub.repositories.get(repository)
        files = None if found is None else found.at(revision or "main")
        if files is None:
            return self.missing("RepoNotFound" if found is None else "RevisionNotFound")
        sha = found.head if revision in (None, "main") else revision
        siblings = [{"rfilename": name} for name in files]
        return self.answer({"id": repository, "modelId": repository, "sha": sha, "siblings": siblings, "tags": []})

    def tree(self, repository: str, revision: str, folder: str = "") -> None:
        files = self.hub.repositories[repository].at(revision)
        files = {name: file for name, file in files.items() if name.startswith(folder)}
        if not files:
            return self.missing("EntryNotFound")
        entries = [
            {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
            | ({"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}} if file.is_lfs else {})
            for name, file in files.items()
        ]
        return self.answer(entries)

    def file(self, repository: str, revision: str, name: str) -> None:
        found = self.hub.repositories.get(repository)
        files = None if found is None else found.at(revision)
        if files is None:
            return self.missing("RepoNotFound" if found is None else "RevisionNotFound")
        sha = found.head if revision == "main" else revision
        if name not in files:
            message = {"X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found", "X_Repo_Commit": sha}
            return self.answer({"error": "Entry not found"}, 404, **message)
        return self.answer(files[name].content, ETag=f'"{files[name].oid}"', X_Repo_Commit=sha)


NAME = r"(?P<repository>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.who_am_i),
    ("GET", r"/api/agent-harnesses", Handler.harnesses),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_card),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs-storage/(?P<oid>\w+)", Handler.lfs_upload),
    ("POST", rf"/{NAME}\.verify", Handler.lfs_verify),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", rf"/api/models/{NAME}", Handler.information),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", Handler.information),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.file),
    ("HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.file),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub at a free port of the loopback device while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
