"""
A model hub in memory, for tests that push and load over HTTP. It answers what `huggingface_hub` asks of the real Hub.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path, token=hub.token)})

`huggingface_hub` and `transformers` read the environment when they are imported. In a process that has imported them,
`hub.connect(monkeypatch, tmp_path)` does the same for pushes and downloads. Load the code of a repo in a new process.

Repos hold commits and commits hold files. Each is named by its content, so a revision can be pinned. The hub has models,
datasets and spaces, branches, private and gated repos, and large files. It has no pull requests and no Xet, and tells the
clients so.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LARGE_FILE = 10_000_000
LARGE_FILE_ENDINGS = (".bin", ".gguf", ".npy", ".onnx", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


class LoggedRequest(NamedTuple):
    method: str
    path: str  # with its query
    status: int
    token: str | None


class File(NamedTuple):
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def stored(self) -> bytes:
        """The content that git stores. For a large file this is a pointer."""
        if not self.is_lfs:
            return self.content
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def blob_id(self) -> str:
        return _git_hash("blob", self.stored)

    def describe(self, path: str) -> dict[str, Any]:
        """The entry of the file in a tree."""
        described = {"type": "file", "path": path, "oid": self.blob_id, "size": len(self.content)}
        if self.is_lfs:
            described["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.stored)}
        return described


class Commit(NamedTuple):
    oid: str
    message: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        listing = "".join(f"{path} {file.blob_id}\n" for path, file in sorted(files.items()))
        oid = _git_hash("commit", f"{self.kind} {self.id}\n{parent}\n{message}\n{listing}".encode())
        self.commits[oid] = Commit(oid, message, parent, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """The commit with this hash, or the last one of this branch."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Response(NamedTuple):
    body: bytes | dict | list
    headers: dict[str, str] = {}
    status: int = 200


class HubServer:
    """
    Args:
        users (`dict[str, str]`): Token of each user, by name. A user owns the repos under its name. `hub.token` is that
            of the first user.

    Attributes:
        url (`str`): Value for `HF_ENDPOINT`.
        requests (`list[LoggedRequest]`): All requests that were answered, in order.
    """

    def __init__(self, users: dict[str, str] | None = None):
        users = users or {"alice": "hf_alice", "bob": "hf_bob"}
        self.token = next(iter(users.values()))
        self.names = {token: name for name, token in users.items()}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[LoggedRequest] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- for tests ---

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables with which a new process talks to this hub and has a cache of its own. Without a token it is nobody."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def connect(self, monkeypatch: Any, home: Path, token: str | None = None) -> None:
        """Do the same for this process, which has imported `huggingface_hub`, until `monkeypatch` is undone."""
        import transformers.utils.hub
        from huggingface_hub import close_session, constants, hf_api

        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # keeps the old endpoint
        close_session()

    def add(self, repo_id: str, files: dict[str, bytes | str], kind: str = "model", **access: bool) -> str:
        """Commit these files to the main branch of a repo, which is created if needed. Return the hash of the commit."""
        with self.lock:
            repo = self.repos.get((kind, repo_id)) or self._create(kind, repo_id, **access)
            contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
            added = {path: File(content, is_large(path, content)) for path, content in contents.items()}
            return repo.commit("main", "Add files", {**repo.at("main").files, **added}).oid

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a repo, by path."""
        commit = self.repos[kind, repo_id].at(revision)
        return {path: file.content for path, file in commit.files.items()}

    def history(self, repo_id: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """The commits of a repo, the newest first."""
        repo = self.repos[kind, repo_id]
        commits = [repo.at(revision)]
        while commits[-1].parent is not None:
            commits.append(repo.commits[commits[-1].parent])
        return commits

    # --- for the handler ---

    def _create(self, kind: str, repo_id: str, **access: bool) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, **access)
        attributes = "".join(
            f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE_FILE_ENDINGS
        ).encode()
        repo.commit("main", "initial commit", {".gitattributes": File(attributes, False)})
        return repo

    def find(self, kind: str, repo_id: str, user: str | None, write: bool = False, files: bool = False) -> Repo:
        """A repo that a user may read or write. Everybody may see that a gated repo exists, but not read its files."""
        repo = self.repos.get((kind, repo_id))
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            # Without a login, a missing repo and a private one look the same.
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if repo.gated and files and user != owner:
            message = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise HubError(401 if user is None else 403, message, "GatedRepo")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and user != owner:
            raise HubError(403, f"You don't have write access to {repo_id}")
        return repo


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer  # set by the subclass that each server makes
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Print nothing: `HubServer.requests` has the log."""

    def _answer(self) -> None:
        self.content = self._read()
        authorization = self.headers.get("Authorization", "")
        token = authorization.removeprefix("Bearer ").strip() or None
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        try:
            if token is not None and token not in self.hub.names:
                raise HubError(401, "Invalid credentials in Authorization header")
            self.user = self.hub.names[token] if token is not None else None
            with self.hub.lock:
                response = self._route(split.path)
        except HubError as error:
            headers = {"X-Error-Message": str(error), **error.headers}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            response = Response({"error": str(error)}, headers, error.status)
        except Exception as error:  # a bug of this server must not look like a Hub that is away
            response = Response({"error": repr(error)}, {"X-Error-Message": repr(error)}, 500)
        self.hub.requests.append(LoggedRequest(self.command, self.path, response.status, token))
        self._send(response)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, response: Response) -> None:
        body, headers = response.body, {"Content-Type": "application/octet-stream", **response.headers}
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(response.status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, path: str) -> Response:
        for method, pattern, answer in _ROUTES:
            match = pattern.fullmatch(path)
            if match and (method == self.command or (method, self.command) == ("GET", "HEAD")):
                values = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                if "kind" in values:
                    values["kind"] = values["kind"].strip("/").removesuffix("s") or "model"
                return answer(self, **values)
        raise HubError(404, f"There is no {self.command} {path} here")

    # --- accounts and repos ---

    def whoami(self) -> Response:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write", "createdAt": "2026-01-01T00:00:00.000Z"}
        auth = {"type": "access_token", "accessToken": token}
        return Response(
            {"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "orgs": [], "auth": auth}
        )

    def validate_yaml(self) -> Response:
        errors, warnings = check_card(json.loads(self.content)["content"])
        report = {
            name: [{"message": message} for message in found]
            for name, found in [("errors", errors), ("warnings", warnings)]
        }
        return Response(report, status=400 if errors else 200)

    def create(self) -> Response:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        asked = json.loads(self.content)
        owner = asked.get("organization") or self.user
        repo_id, kind = f"{owner}/{asked['name']}", asked.get("type") or "model"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if owner != self.user:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        if (kind, repo_id) in self.hub.repos:
            return Response({"error": f"You already created this {kind} repo", "url": url}, status=409)
        # Clients before 2.0 send `private`.
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub._create(kind, repo_id, private=private)
        return Response({"url": url, "name": repo_id, "id": repo_id})

    def info(self, kind: str, repo: str, revision: str = "") -> Response:
        found = self.hub.find(kind, repo, self.user)
        commit = found.at(revision or "main")
        readme = commit.files.get("README.md")
        card = _front_matter(readme.content.decode(errors="replace")) if readme else {}
        siblings = []
        for path, file in sorted(commit.files.items()):
            described = file.describe(path)
            details = {"size": described["size"], "blobId": described["oid"], "lfs": described.get("lfs")}
            if file.is_lfs:
                details["lfs"] = {**described["lfs"], "sha256": file.sha256}
            siblings.append({"rfilename": path, **(details if "blobs" in self.query else {})})
        return Response(
            {
                "_id": repo,
                "id": repo,
                f"{kind}Id": repo,
                "sha": commit.oid,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags") or [],
                "cardData": card,
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "siblings": siblings,
            }
        )

    def auth_check(self, kind: str, repo: str, write: str) -> Response:
        self.hub.find(kind, repo, self.user, write=bool(write), files=True)
        return Response({})

    def refs(self, kind: str, repo: str) -> Response:
        branches = self.hub.find(kind, repo, self.user).branches
        listed = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in sorted(branches.items())
        ]
        return Response({"branches": listed, "converts": [], "tags": []})

    def create_branch(self, kind: str, repo: str, revision: str) -> Response:
        found = self.hub.find(kind, repo, self.user, write=True)
        if re.search(r"\s|^refs/|^[0-9a-f]{40}$", revision):
            raise HubError(400, f"Invalid branch name: {revision}")
        if revision in found.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        starting_point = json.loads(self.content or b"{}").get("startingPoint") or "main"
        found.branches[revision] = found.at(starting_point).oid
        return Response({})

    # --- what is in a repo ---

    def _entries(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """Files and folders by their paths."""
        entries = {path: file.describe(path) for path, file in commit.files.items()}
        for path in commit.files:
            for folder in list(Path(path).parents)[:-1]:
                name = folder.as_posix()
                inside = sorted(file.blob_id for inner, file in commit.files.items() if inner.startswith(name + "/"))
                oid = _git_hash("tree", "".join(inside).encode())
                entries[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
        return entries

    def tree(self, kind: str, repo: str, revision: str, path: str) -> Response:
        commit = self.hub.find(kind, repo, self.user, files=True).at(revision)
        entries = self._entries(commit)
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        prefix = f"{path}/" if path else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return Response(
            [
                entry
                for name, entry in sorted(entries.items())
                if name.startswith(prefix) and (recursive or "/" not in name.removeprefix(prefix))
            ]
        )

    def paths_info(self, kind: str, repo: str, revision: str) -> Response:
        commit = self.hub.find(kind, repo, self.user, files=True).at(revision)
        entries = self._entries(commit)
        asked = parse_qs(self.content.decode()).get("paths", [])
        return Response([entries[path.strip("/")] for path in asked if path.strip("/") in entries])

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> Response:
        commit = self.hub.find(kind, repo, self.user, files=True).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        file = commit.files[path]
        headers |= {"ETag": f'"{file.sha256 if file.is_lfs else file.blob_id}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(file.content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return Response(file.content, headers)
        size = len(file.content)
        start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        if start >= size:
            return Response(b"", {**headers, "Content-Range": f"bytes */{size}"}, 416)
        return Response(
            file.content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}, 206
        )

    # --- uploads ---

    def preupload(self, kind: str, repo: str, revision: str) -> Response:
        files = self.hub.find(kind, repo, self.user, write=True).at(revision).files
        answers = []
        for asked in json.loads(self.content)["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            answer = {"path": path, "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if is_large(path, sample, asked["size"]) else "regular"
            if path in files:  # so that the client leaves out files that have not changed
                answer["oid"] = files[path].sha256 if files[path].is_lfs else files[path].blob_id
            answers.append(answer)
        return Response({"files": answers})

    def lfs_batch(self, kind: str, repo: str) -> Response:
        self.hub.find(kind, repo, self.user, write=True)
        objects = []
        for asked in json.loads(self.content)["objects"]:
            url = f"{self.hub.url}/large-files/{asked['oid']}"
            missing = {"actions": {"upload": {"href": url}, "verify": {"href": url}}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.large_files else missing)})
        return Response({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> Response:
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise HubError(400, f"What was sent is not {oid}")
        self.hub.large_files[oid] = self.content
        return Response(b"")

    def lfs_verify(self, oid: str) -> Response:
        size = len(self.hub.large_files.get(oid, b""))
        if json.loads(self.content)["size"] != size:
            raise HubError(400, f"{oid} has {size} bytes")
        return Response({})

    def commit(self, kind: str, repo: str, revision: str) -> Response:
        found = self.hub.find(kind, repo, self.user, write=True)
        if "create_pr" in self.query:
            raise HubError(400, "There are no pull requests here")
        if revision not in found.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(found.at(revision).files), ""
        for line in self.content.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            path = value.get("path", "")
            if key == "header":
                message = value["summary"]
                expected = value.get("parentCommit", found.branches[revision])
                if expected != found.branches[revision]:
                    raise HubError(412, f"A commit has happened since {expected}. Please refresh and try again.")
            elif key == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = File(self.hub.large_files[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            elif key == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
            else:
                raise HubError(400, f"Unknown operation {key!r}")
        if kind == "model" and "README.md" in files:
            errors, _ = check_card(files["README.md"].content.decode())
            if errors:
                raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        oid = found.commit(revision, message, files).oid
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.hub.url}/{prefix}{repo}/commit/{oid}"
        return Response({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def _route(method: str, pattern: str, answer: Any) -> tuple[str, re.Pattern, Any]:
    api = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"
    web = r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+(?:/[^/]+)?)"
    return method, re.compile(pattern.replace("{api}", api).replace("{web}", web)), answer


_ROUTES = [
    _route("GET", "/api/whoami-v2", _Handler.whoami),
    _route("POST", "/api/validate-yaml", _Handler.validate_yaml),
    _route("POST", "/api/repos/create", _Handler.create),
    _route("GET", "{api}/revision/(?P<revision>[^/]+)", _Handler.info),
    _route("GET", "{api}/auth-check(?P<write>/write)?", _Handler.auth_check),
    _route("GET", "{api}/refs", _Handler.refs),
    _route("POST", "{api}/branch/(?P<revision>[^/]+)", _Handler.create_branch),
    _route("GET", "{api}/tree/(?P<revision>[^/]+)/?(?P<path>.*)", _Handler.tree),
    _route("POST", "{api}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    _route("POST", "{api}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    _route("POST", "{api}/commit/(?P<revision>[^/]+)", _Handler.commit),
    _route("GET", "{api}", _Handler.info),
    _route("GET", "{web}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    _route("POST", r"{web}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    _route("PUT", "/large-files/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    _route("POST", "/large-files/(?P<oid>[0-9a-f]{64})", _Handler.lfs_verify),
]


def is_large(path: str, sample: bytes, size: int | None = None) -> bool:
    """Whether a file is stored outside of git, because of its ending, its size, or because it is binary."""
    return path.endswith(LARGE_FILE_ENDINGS) or (size or len(sample)) > LARGE_FILE or b"\0" in sample


def _git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def _front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's metadata. These are the rules of the Hub that a generated card could break."""
    try:
        data = _front_matter(text)
    except yaml.YAMLError as error:
        return [f"The metadata is not YAML: {error}"], []
    if not isinstance(data, dict):
        return [f"The metadata is a {type(data).__name__}, not a mapping"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [
        f'"{name}" must be a string'
        for name in ("license", "library_name", "pipeline_tag", "license_name", "license_link")
        if not isinstance(data.get(name, ""), str)
    ]
    for name in ("tags", "language", "datasets", "base_model", "metrics"):
        values = data.get(name, [])
        values = [values] if isinstance(values, str) and name != "tags" else values
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{name}" must be a list of strings')
        elif name in ("base_model", "datasets"):
            errors += [
                f'"{name}" with value "{value}" is not valid' for value in values if not REPO_ID.fullmatch(value)
            ]
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required with license: other')
    for model in data.get("model-index", []):
        for key in ("name", "results"):
            if not model.get(key):
                errors.append(f'"model-index[0].{key}" is required')
        for result in model.get("results", []):
            present = [
                result.get("task", {}).get("type"),
                result.get("dataset", {}).get("type"),
                result.get("dataset", {}).get("name"),
                *(
                    value
                    for metric in result.get("metrics", [{}])
                    for value in (metric.get("type"), metric.get("value"))
                ),
            ]
            if any(value is None for value in present):
                errors.append(
                    '"model-index[0].results" needs task.type, dataset.type, dataset.name, metrics type and value'
                )
    return errors, []
