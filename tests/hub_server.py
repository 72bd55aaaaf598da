"""A model hub on 127.0.0.1 that can misbehave, for tests with the real huggingface_hub client.

    with LocalHub() as hub:
        commit = hub.push("org/name", {"config.json": b"{}", "model.safetensors": weights})
        hub.fault("model.safetensors", "reset", times=2)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        ...
        assert hub.requests == [...]

`hub.plain["/resnet18.pth"] = b"..."` serves a file outside of any repository. Every request is
recorded as "METHOD /path".
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

HTML = b"<!DOCTYPE html>\n<html><body>Please log in to the hotel's network.</body></html>"
KINDS = (
    "truncate",  # half of the body, then the end of the connection
    "reset",  # half of the body, then a TCP reset
    "stall",  # half of the body, then nothing
    "status",  # the answer `status`, with `headers`
    "length",  # a Content-Length that is `by` bytes off, and the true body
    "flip",  # one bit of the body is another
    "body",  # `body` in the place of the file, with a fitting Content-Length
    "headers",  # the usual answer with these `headers` (None removes one)
    "slow",  # the body in 40 pieces, 5 ms apart
)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests for a path that ends in `path`."""

    path: str
    kind: str
    times: int = 1
    skip: int = 0  # requests that are answered properly first
    methods: tuple[str, ...] = ("GET",)
    status: int = 503
    by: int = 100
    body: bytes = HTML
    headers: dict[str, str | None] = field(default_factory=dict)


class LocalHub:
    """Repositories of bytes behind the hub's HTTP interface; a context manager."""

    def __init__(self, lfs_threshold: int = 1024):
        self.lfs_threshold = lfs_threshold
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repo -> commit -> files
        self.branches: dict[str, dict[str, str]] = {}  # repo -> branch -> commit
        self.plain: dict[str, bytes] = {}
        self.licenses: dict[str, str] = {}  # repo -> as its card says
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token = "hf_local"  # opens gated and private repositories, and may write
        self.read_only: set[str] = set()  # organisations in which it may not
        self.objects: dict[str, bytes] = {}  # sha256 -> what was put into the large file storage
        self.puts: list[str] = []  # the sha256 of what arrived there whole, each time
        self.lfs_address: str | None = None  # where large files are to be put; None: here
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []  # of the requests that asked for a part
        self.tokens: list[str] = []  # of the requests that brought one
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self.stopping = threading.Event()

    def __enter__(self) -> LocalHub:
        hub = self

        class Answer(_Answer):
            pass

        Answer.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the listener and every kept-alive connection, which would outlive it."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._sockets:
                with suppress(OSError):  # the other side was first
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def push(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with exactly these files, and move the branch to it."""
        digest = hashlib.sha1(f"{repo} {len(self.commits.get(repo, {}))}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        commit = digest.hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def fault(self, path: str, kind: str, **details) -> Fault:
        """Let the next requests for a path that ends in `path` go wrong; see `KINDS`."""
        assert kind in KINDS, kind
        self.faults.append(Fault(path, kind, **details))
        return self.faults[-1]

    def gets(self, suffix: str = "") -> list[str]:
        """The GET requests for a path that ends in `suffix`."""
        return [r for r in self.requests if r.startswith("GET ") and r.endswith(suffix)]

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if method in fault.methods and path.endswith(fault.path) and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def remember(self, connection: socket.socket, is_open: bool) -> None:
        with self._lock:
            (self._sockets.add if is_open else self._sockets.discard)(connection)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What the newest commit of a branch holds."""
        return self.commits[repo][self.branches[repo][branch]]


@contextmanager
def client_and_hub(monkeypatch, folder: Path) -> Iterator[LocalHub]:
    """An empty hub that the client asks, with its caches in `folder`, and no time lost in waiting.

    Other processes are told the same by their environment, but do wait.
    """
    import huggingface_hub
    from huggingface_hub import constants

    from mlx_zoo.hub import asking

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "MLX_ZOO_CACHE": folder / "zoo",
        "HF_HUB_CACHE": folder / "hf",
        "HF_TOKEN_PATH": folder / "token",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    no_wait = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time", no_wait)
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
    monkeypatch.setattr(asking, "BACKOFF", (0, 0, 0))
    with LocalHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub
        huggingface_hub.close_session()


class _Answer(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.remember(self.connection, True)

    def finish(self) -> None:
        self.hub.remember(self.connection, False)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True  # the client left, or we reset it

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer_writing()

    def do_PUT(self) -> None:
        self._answer_writing()

    def _answer_writing(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.fault = self.hub.next_fault(self.command, path)
        size = int(self.headers.get("Content-Length", 0))
        if self.fault and self.fault.kind == "reset":
            self.rfile.read(size // 2)
            return self._reset()
        body = self.rfile.read(size) if size else b"".join(self._chunks())
        if self.fault and self.fault.kind == "status":
            return self._send(self.fault.status, b"out of order", {})
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path.startswith("/lfs-put/"):  # its address is the right to write there
            return self._keep_object(path.removeprefix("/lfs-put/"), body)
        if not self._has_token():
            self.fault = None
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._send(401, b"{}", headers)
        rows = [json.loads(line) for line in body.splitlines() if line]
        if path == "/api/repos/create":
            return self._create(rows[0])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send_json({"objects": [*map(self._lfs_row, rows[0]["objects"])]})
        repo, _, step = path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        if repo not in self.hub.commits:
            return self._refuse(404, "RepoNotFound")
        if repo.partition("/")[0] in self.hub.read_only:
            return self._send(403, b"{}", {"X-Error-Message": "you may not write here"})
        files = self.hub.files(repo)
        if step == "preupload":
            return self._send_json({"files": [self._mode(files, row) for row in rows[0]["files"]]})
        return self._commit(repo, files, rows)

    def _chunks(self) -> Iterator[bytes]:
        """The body of a request that does not say its length."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _create(self, row: dict) -> None:
        repo = f"{row['organization']}/{row['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if row["organization"] in self.hub.read_only:
            return self._send(403, b"{}", {"X-Error-Message": "you may not write here"})
        if repo in self.hub.commits:
            return self._send(409, json.dumps(url).encode(), {"Content-Type": "application/json"})
        self.hub.push(repo, {".gitattributes": b""})
        if row.get("visibility") == "private" or row.get("private"):
            self.hub.private.add(repo)
        return self._send_json(url)

    def _mode(self, files: dict[str, bytes], row: dict) -> dict:
        large = row["size"] >= self.hub.lfs_threshold
        own = files.get(row["path"])
        oid = own and (sha256(own) if large else git_sha1(own))
        mode = "lfs" if large else "regular"
        return {"path": row["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _lfs_row(self, row: dict) -> dict:
        if row["oid"] in self.hub.objects:
            return row
        where = self.hub.lfs_address or self.hub.endpoint
        return row | {"actions": {"upload": {"href": f"{where}/lfs-put/{row['oid']}"}}}

    def _keep_object(self, oid: str, body: bytes) -> None:
        if sha256(body) != oid:
            return self._send(400, b"another hash", {})
        self.hub.puts.append(oid)
        self.hub.objects[oid] = body
        return self._send(200, b"", {})

    def _commit(self, repo: str, files: dict[str, bytes], rows: list[dict]) -> None:
        parent = rows[0]["value"].get("parentCommit")
        if parent not in (None, self.hub.branches[repo]["main"]):
            return self._send(412, b"{}", {"X-Error-Message": "the branch has moved"})
        files = dict(files)
        for row in rows[1:]:
            kind, value = row["key"], row["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        commit = self.hub.push(repo, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        return self._send_json({"commitUrl": url, "commitOid": commit})

    def _send_json(self, value: dict) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.ranges += filter(None, [self.headers.get("Range")])
        self.hub.tokens += filter(None, [self.headers.get("Authorization")])
        self.fault = self.hub.next_fault(self.command, path)
        if self.fault and self.fault.kind == "status":
            return self._send(self.fault.status, b"out of order", {})
        if path in self.hub.plain:
            return self._send_file(self.hub.plain[path], {})
        if path.startswith("/api/models/"):
            return self._answer_api(path.removeprefix("/api/models/"))
        stored = path.startswith("/lfs-store/")
        repo, found, rest = path.removeprefix("/lfs-store").strip("/").partition("/resolve/")
        if not found:
            return self._send(404, b"no such page", {})
        return self._answer_file(repo, rest, stored)

    def _answer_api(self, rest: str) -> None:
        repo, _, revision = rest.partition("/revision/")
        repo, tree, at = repo.partition("/tree/")
        if (commit := self._find(repo, at or revision or "main")) is None:
            return
        files = self.hub.commits[repo][commit]
        if tree:
            answer = [self._tree_row(name, content) for name, content in files.items()]
        else:
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repo, "sha": commit, "siblings": siblings}
            answer["private"] = repo in self.hub.private
            if repo in self.hub.licenses:
                answer["tags"] = ["mlx", f"license:{self.hub.licenses[repo]}"]
            if self.fault and "sha" in self.fault.headers:
                answer["sha"] = self.fault.headers["sha"]
        if self.fault and self.fault.kind == "body":
            return self._send(200, self.fault.body, {"Content-Type": "text/html"})
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _tree_row(self, name: str, content: bytes) -> dict:
        row = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
        if len(content) >= self.hub.lfs_threshold:
            row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return row

    def _answer_file(self, repo: str, rest: str, stored: bool) -> None:
        # A revision with a slash arrives quoted, so the first part is all of it.
        revision, _, name = rest.partition("/")
        if (commit := self._find(repo, revision)) is None:
            return None
        if repo in self.hub.gated and not self._has_token():
            return self._refuse(403, "GatedRepo")
        content = self.hub.commits[repo][commit].get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if len(content) < self.hub.lfs_threshold:
            return self._send_file(content, headers | {"ETag": f'"{git_sha1(content)}"'})
        headers |= {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        if stored:
            return self._send_file(content, headers | {"ETag": f'"{sha256(content)}"'})
        location = f"{self.hub.endpoint}/lfs-store/{repo}/resolve/{commit}/{name}"
        return self._send(302, b"", headers | {"Location": location})

    def _find(self, repo: str, revision: str) -> str | None:
        """The commit of a revision, or None after an answer that refuses."""
        if repo not in self.hub.commits or (repo in self.hub.private and not self._has_token()):
            return self._refuse(404 if self._has_token() else 401, "RepoNotFound")
        if revision in self.hub.commits[repo]:
            return revision
        commit = self.hub.branches[repo].get(revision)
        return commit or self._refuse(404, "RevisionNotFound")

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        fault = self.fault
        if fault and fault.kind == "body":
            return self._send(200, fault.body, headers)
        if fault and fault.kind == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            return self._send(200, content, headers)
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        total = len(content)
        headers = headers | {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
        return self._send(206, content[start:], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        fault = self.fault
        length = len(body) + (fault.by if fault and fault.kind == "length" else 0)
        headers = {"Content-Type": "application/octet-stream", **headers}
        headers |= {"Content-Length": str(length), **(fault.headers if fault else {})}
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        broken = fault is not None and fault.kind in ("truncate", "reset", "stall")
        body = body[: len(body) // 2] if broken else body
        step = max(1, len(body) // 40) if fault and fault.kind == "slow" else max(1, len(body))
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            self.wfile.flush()
            if step < len(body):
                self.hub.stopping.wait(0.005)
        if fault and (broken or fault.kind == "length"):
            self.close_connection = True
        if fault and fault.kind == "stall":
            self.hub.stopping.wait(30)
        if fault and fault.kind == "reset":
            self._reset()

    def _reset(self) -> None:
        # Lingering for no time turns the close into a reset; the reader holds the socket open.
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
