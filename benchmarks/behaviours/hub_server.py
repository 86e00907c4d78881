"""A Hugging Face Hub on loopback: what `huggingface_hub` needs to push and to load models, kept in memory.

Commits, branches, tags, LFS, private and gated repositories, and the checks of model cards answer as the Hub does.
Every request is logged, so that a test can say what was downloaded.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
REPO_ID = r"[\w.-]+/[\w.-]+"
MODEL_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


class ProblemError(Exception):
    """An answer that is an error.

    Args:
        status (`int`): of the answer.
        code (`str`): the header `X-Error-Code`, which the client tells errors apart by.
        message (`str`): for people.
        body (`dict`, *optional*): fields of the answer.
    """

    def __init__(self, status: int, code: str, message: str, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body or {}


class Request(NamedTuple):
    """What a client asked for.

    Attributes:
        method (`str`): such as `"HEAD"`.
        path (`str`): without the query.
        user (`str`, *optional*): whose token came with it.
        status (`int`): of the answer.
    """

    method: str
    path: str
    user: str | None
    status: int


@dataclass
class Repository:
    """A model repository: commits are whole file trees, by their hash; branches and tags are names of them."""

    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add_commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Put a file tree on top of a branch; its hash."""
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a hash means."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise ProblemError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The file tree of a revision."""
        return self.commits[self.resolve(revision)]


def find_card_problems(content: str) -> list[str]:
    """What the Hub refuses in the metadata of a model card."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", content, flags=re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["The metadata must be an object"]
    problems = []
    base_models = data.get("base_model", [])
    for name in [base_models] if isinstance(base_models, str) else base_models:
        if not isinstance(name, str) or not MODEL_ID.fullmatch(name):
            problems.append(
                f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
            )
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be an array of strings')
    return problems


class HubServer(ThreadingHTTPServer):
    """The Hub on a free port of loopback, serving in threads from the start.

    Args:
        users (`dict[str, str]`): token to name.
    """

    daemon_threads = True
    running: ClassVar["HubServer | None"] = None

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        HubServer.running = self
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where large files are: to the client another host, which must not see its token."""
        return f"http://localhost:{self.server_address[1]}/lfs"

    def put(self, repo_id: str, files: dict[str, bytes], **settings: Any) -> Repository:
        """Make a repository with some files, without a request."""
        repository = Repository(owner=repo_id.split("/")[0], **settings)
        repository.add_commit("main", files, "Initial commit")
        self.repositories[repo_id] = repository
        return repository

    def downloads(self, since: int = 0) -> list[str]:
        """The files whose content was sent, as `repository/file`, after the first `since` requests."""
        pattern = re.compile(rf"/({REPO_ID})/resolve/[^/]+/(.+)")
        matches = [pattern.fullmatch(r.path) for r in self.requests[since:] if r.method == "GET" and r.status < 400]
        return [f"{match.group(1)}/{match.group(2)}" for match in matches if match]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._read_body()
        self.user: str | None = None
        try:
            self.user = self._authenticate()
            with self.server.lock:
                self._answer(path, body)
        except ProblemError as problem:
            headers = {"X-Error-Code": problem.code, "X-Error-Message": problem.message}
            self._send(problem.status, {"error": problem.message, **problem.body}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _authenticate(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise ProblemError(401, "", "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.server.requests.append(Request(self.command, unquote(urlsplit(self.path).path), self.user, status))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, path: str, body: bytes) -> None:
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                getattr(self, action)(body, **match.groupdict())
                return
        raise ProblemError(404, "", f"Nothing answers {self.command} {path}")

    def _find(self, repo: str, write: bool = False) -> Repository:
        """A repository, if the user may see it: a private one does not exist for others."""
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and self.user != repository.owner):
            raise ProblemError(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        if write and self.user != repository.owner:
            raise ProblemError(401 if self.user is None else 403, "", "You have no write access to this repository")
        return repository

    def _whoami(self, body: bytes) -> None:
        if self.user is None:
            raise ProblemError(401, "", "Invalid username or password.")
        self._send(200, {"type": "user", "name": self.user, "fullname": self.user, "orgs": []})

    def _create(self, body: bytes) -> None:
        fields = json.loads(body)
        owner = fields.get("organization") or self.user
        if self.user is None or owner != self.user:
            raise ProblemError(401 if self.user is None else 403, "", f"You cannot create repositories of {owner!r}")
        repo = f"{owner}/{fields['name']}"
        url = {"url": f"{self.server.url}/{repo}"}
        if repo in self.server.repositories:
            raise ProblemError(409, "", "You already created this model repo", url)
        self.server.put(repo, {".gitattributes": b""}, private=fields.get("visibility") == "private")
        self._send(200, url)

    def _validate_card(self, body: bytes) -> None:
        problems = [{"message": problem} for problem in find_card_problems(json.loads(body)["content"])]
        self._send(400 if problems else 200, {"errors": problems, "warnings": []})

    def _info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        repository = self._find(repo)
        sha = repository.resolve(revision or "main")
        siblings = [{"rfilename": name} for name in sorted(repository.commits[sha])]
        fields = {"id": repo, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings}
        self._send(200, fields | {"gated": "auto" if repository.gated else False})

    def _tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        files = self._find(repo).files(revision)
        start = f"{folder}/" if folder else ""
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": _hash_blob(content)}
            for name, content in sorted(files.items())
            if name.startswith(start)
        ]
        self._send(200, entries)

    def _refs(self, body: bytes, repo: str) -> None:
        repository = self._find(repo)
        names = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        refs = {
            kind: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": sha} for name, sha in shas.items()]
            for kind, (place, shas) in names.items()
        }
        self._send(200, refs | {"converts": []})

    def _resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        repository = self._find(repo)
        if repository.gated and self.user != repository.owner:
            raise ProblemError(401 if self.user is None else 403, "GatedRepo", f"Access to model {repo} is restricted")
        sha = repository.resolve(revision)
        content = repository.commits[sha].get(name)
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            self._send(404, {"error": "Entry not found"}, headers)
            return
        headers = {"X-Repo-Commit": sha}
        if name.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(content).hexdigest()
            self.server.objects[oid] = content
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", headers | {"Location": f"{self.server.storage_url}/{oid}"})
        else:
            self._send(200, content, headers | {"ETag": f'"{_hash_blob(content)}"'})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = self._find(repo, write=True).files(revision)
        answers = []
        for asked in json.loads(body)["files"]:
            name, is_large = asked["path"], asked["path"].endswith(LFS_SUFFIXES)
            old = files.get(name)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if is_large else _hash_blob(old)
            mode = "lfs" if is_large else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers})

    def _batch(self, body: bytes, repo: str) -> None:
        self._find(repo, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.storage_url}/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in self.server.objects else asked | {"actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise ProblemError(400, "", "The content does not have this hash")
        self.server.objects[oid] = body
        self._send(200, {})

    def _load(self, body: bytes, oid: str) -> None:
        self._send(200, self.server.objects[oid])

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._find(repo, write=True)
        if revision not in repository.branches:
            raise ProblemError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, message = dict(repository.files(revision)), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                raise ProblemError(400, "", f"Nothing does {entry['key']}")
        sha = repository.add_commit(revision, files, message)
        self._send(200, {"commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def _branch(self, body: bytes, repo: str, name: str) -> None:
        repository = self._find(repo, write=True)
        if name in repository.branches:
            raise ProblemError(409, "", "Reference already exists")
        repository.branches[name] = repository.resolve(json.loads(body or b"{}").get("startingPoint", "main"))
        self._send(200, {})

    def _tag(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._find(repo, write=True)
        repository.tags[json.loads(body)["tag"]] = repository.resolve(revision)
        self._send(200, {})


def _hash_blob(content: bytes) -> str:
    """The hash that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_API = rf"/api/models/(?P<repo>{REPO_ID})"
_ROUTES = [
    ("GET HEAD", rf"/(?P<repo>{REPO_ID})/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "_resolve"),
    ("GET", "/api/whoami-v2", "_whoami"),
    ("GET", _API, "_info"),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", "_info"),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "_tree"),
    ("GET", rf"{_API}/refs", "_refs"),
    ("POST", "/api/repos/create", "_create"),
    ("POST", "/api/validate-yaml", "_validate_card"),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", "_preupload"),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", "_commit"),
    ("POST", rf"{_API}/branch/(?P<name>.+)", "_branch"),
    ("POST", rf"{_API}/tag/(?P<revision>.+)", "_tag"),
    ("POST", rf"/(?P<repo>{REPO_ID})\.git/info/lfs/objects/batch", "_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "_store"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "_load"),
]
