"""Bring a checkpoint's files to this machine: verified bytes, at a commit that stays put.

What arrives is hashed before anything reads it, and a branch is resolved to a commit once: the
commit, the files it holds and the hashes seen are written to `<cache>/pins/org--name.json`, so a
later load needs no network and gets the same weights even when the branch has moved. Passing
`revision="main"` asks the hub again.

Downloads from the hub go through huggingface_hub and live in its own cache; everything that this
client or the network may do wrong is answered here with an error of `mlx_zoo.errors`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from time import sleep
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from mlx_zoo.errors import (
    CheckpointError,
    DownloadError,
    FileNotInRepository,
    GatedRepository,
    IntegrityError,
    MLXZooError,
    NotCached,
    RepositoryNotFound,
    RevisionNotFound,
)
from mlx_zoo.hub.cache import cache_root, sha256_of
from mlx_zoo.hub.source import (
    DirectorySource,
    FileSource,
    HubSource,
    Source,
    UrlSource,
    is_permitted,
)

# In the order of preference; an index names the shards that lie beside it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX_SUFFIX = ".index.json"
BACKOFF = (0.5, 1.0, 2.0)  # seconds before each retry
LONGEST_WAIT = 60.0  # seconds; a server that asks for more (Retry-After) gets no retry
TIMEOUT = 10.0  # seconds without a byte
MAX_REDIRECTS = 5

_HASH = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SMALL_BODY = 65536  # bytes; a body this short is looked at before it is written
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Fetched:
    """Files on this machine, and what is known about them.

    files: name in the repository (or file name) -> local path.
    revision: the commit on the hub; "" for what does not come from there.
    sha256: name -> hash of the bytes, checked against the publisher's where there is one.
    """

    files: dict[str, Path]
    revision: str
    sha256: dict[str, str]

    @property
    def index(self) -> Path | None:
        """The file that says which shard holds which tensor, if there is one."""
        return next((p for name, p in self.files.items() if name.endswith(INDEX_SUFFIX)), None)

    @property
    def weights(self) -> list[Path]:
        """All other files: after `fetch_weights`, those that hold tensors."""
        return [path for name, path in self.files.items() if not name.endswith(INDEX_SUFFIX)]


def fetch_files(
    source: Source,
    names: Iterable[str],
    *,
    optional: Iterable[str] = (),
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> Fetched:
    """Fetch `names`, all of them required, and those of `optional` that the source has.

    Only an answer that a file does not exist counts as missing: never a network failure.

    Raises:
        DownloadError: in the more exact type where there is one (`NotCached`, ...).
        IntegrityError: the bytes do not have the promised hash.
        OSError: the disk is full.
        ValueError: a name that is not a plain relative path, or a revision of a local source.
    """
    required, wished = tuple(names), tuple(optional)
    for name in (*required, *wished):
        _check_name(name)
    if isinstance(source, HubSource):
        repository = _repository(source, cache_dir, local_files_only, revision)
        commit = _resolve(repository)
        wished = tuple(name for name in wished if _has(repository, commit, name))
        return _fetch_from_hub(repository, commit, (*required, *wished))
    _refuse_revision(source, revision)
    wished = tuple(name for name in wished if _has_locally(source, name))
    return _fetch_locally(source, (*required, *wished), cache_dir, local_files_only)


def fetch_weights(
    source: Source,
    *,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> Fetched:
    """Fetch the weights: safetensors before pickles, a whole file before an index and its shards.

    Which of them exists is read from the repository's list of files, so that a failing server is
    never taken for a repository without safetensors. Raises as `fetch_files` does.
    """
    if isinstance(source, HubSource):
        repository = _repository(source, cache_dir, local_files_only, revision)
        commit = _resolve(repository)
        first = _choose_weights(_weights_at_hand(repository, commit), source)
        fetched = _fetch_from_hub(repository, commit, (first,))
        shards = _shards(fetched.files[first])
        return _merge(fetched, _fetch_from_hub(repository, commit, shards))
    _refuse_revision(source, revision)
    if isinstance(source, DirectorySource):
        first = _choose_weights((n for n in WEIGHT_FILES if _has_locally(source, n)), source)
    else:
        first = _own_name(source)
    fetched = _fetch_locally(source, (first,), cache_dir, local_files_only)
    if not (shards := _shards(fetched.files[first])):
        return fetched
    folder = DirectorySource(fetched.files[first].parent)
    return _merge(fetched, _fetch_locally(folder, shards, cache_dir, local_files_only))


def resolve_revision(
    source: HubSource,
    *,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> str:
    """The commit that `source` stands for: as pinned, else as the hub says now, which pins it.

    A revision that is given (here or in the source) is asked for again, and pinned anew; when the
    hub cannot be reached, its last pin is used. Raises as `fetch_files` does.
    """
    return _resolve(_repository(source, cache_dir, local_files_only, revision))


def _choose_weights(available: Iterable[str], source: Source) -> str:
    names = set(available)
    for name in WEIGHT_FILES:
        if name in names:
            return name
    shown = ", ".join(sorted(names)[:12]) or "none"
    raise FileNotInRepository(
        f"{source} has no weights that are read here ({', '.join(WEIGHT_FILES)}); "
        f"its files: {shown}"
    )


def _shards(path: Path) -> tuple[str, ...]:
    if not path.name.endswith(INDEX_SUFFIX):
        return ()
    from mlx_zoo.hub.checkpoint import shard_names

    return tuple(shard_names(path))


def _merge(one: Fetched, other: Fetched) -> Fetched:
    return replace(one, files=one.files | other.files, sha256=one.sha256 | other.sha256)


def _check_name(name: str) -> None:
    """Names may come out of a repository's own JSON: none may point outside of its folder."""
    parts = name.split("/")
    if (
        "\\" in name
        or ":" in name
        or "\0" in name
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ValueError(f"{name!r} is not the name of a file inside a repository")


def _refuse_revision(source: Source, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"{source} has no revisions: leave out revision={revision!r}")


# --------------------------------------------------------------------------- local files and URLs


_Local = DirectorySource | FileSource | UrlSource


def _own_name(source: FileSource | UrlSource) -> str:
    if isinstance(source, UrlSource):
        return PurePosixPath(unquote(urlsplit(source.url).path)).name or "checkpoint"
    return source.path.name


def _has_locally(source: _Local, name: str) -> bool:
    if isinstance(source, DirectorySource):
        return (source.path / name).is_file()
    return name == _own_name(source)


def _fetch_locally(
    source: _Local, names: Iterable[str], cache_dir: Path | None, local_files_only: bool
) -> Fetched:
    files, hashes = {}, {}
    for name in names:
        if isinstance(source, UrlSource):
            if not _has_locally(source, name):
                raise FileNotInRepository(f"{source} is one file, without a {name}")
            files[name], hashes[name] = _fetch_url(source, cache_dir, local_files_only)
            continue
        folder = source.path if isinstance(source, DirectorySource) else source.path.parent
        path = folder / name
        if not path.is_file() or not _has_locally(source, name):
            raise FileNotInRepository(f"{source} has no {name}: looked in {folder}")
        if looks := _placeholder(path):
            raise CheckpointError(f"{path} is {looks}")
        files[name], hashes[name] = path, sha256_of(path)
    return Fetched(files, "", hashes)


def _fetch_url(
    source: UrlSource, cache_dir: Path | None, local_files_only: bool
) -> tuple[Path, str]:
    """The file behind a URL, and its sha256. A cached one is hashed before it is trusted."""
    folder = cache_root(cache_dir) / "downloads"
    name = re.sub(r"[^\w.-]", "_", _own_name(source))
    path = folder / f"{source.sha256[:8]}-{name}"
    if path.is_file():
        found = sha256_of(path)
        if found.startswith(source.sha256):
            return path, found
        _delete(path)
        _log.warning("%s was damaged: deleted, and fetched again", path)
    if _is_offline(local_files_only):
        raise _not_cached(source, path.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{folder} cannot be made: {error}") from error
    _delete_stale_parts(folder)
    part = folder / f".{uuid.uuid4().hex}.part"
    for _ in range(2):
        try:
            found = _ask(lambda: _stream(source.url, part), source, source.url, folder)
            if found.startswith(source.sha256):
                os.replace(part, path)
                return path, found
        finally:
            part.unlink(missing_ok=True)
    raise IntegrityError(
        f"{source.url}: the bytes have sha256 {found}, not {source.sha256}. Fetched twice, nothing "
        "was kept. Either a proxy alters the file or its publisher has replaced it: compare the "
        "hash with the one the publisher states"
    )


def _delete_stale_parts(folder: Path) -> None:
    """What a killed process left; a day is longer than any download still under way."""
    for part in folder.glob(".*.part"):
        if part.stat().st_mtime < time.time() - 86400:
            part.unlink(missing_ok=True)


class _Truncated(Exception):
    """A body that ends before the length its server announced."""


def _stream(url: str, part: Path) -> str:
    """GET `url` into the file `part`; returns the sha256 of what was written."""
    with _open_url(url) as response, open(part, "wb") as file:
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else None
        if size is not None:
            _check_space(size, part.parent)
        digest = hashlib.sha256()
        with _progress(PurePosixPath(urlsplit(url).path).name, size) as advance:
            try:
                for chunk in response.iter_bytes():
                    digest.update(chunk)
                    file.write(chunk)
                    advance(len(chunk))
            except _http_error() as error:
                if "RemoteProtocolError" in _kinds(error):
                    raise _Truncated(str(error)) from error
                raise
        if size is not None and response.num_bytes_downloaded != size:
            raise _Truncated(f"{response.num_bytes_downloaded} of {size} bytes")
    if looks := _placeholder(part):
        raise DownloadError(f"{url} answers with {looks}")
    return digest.hexdigest()


@contextmanager
def _open_url(url: str) -> Iterator[Any]:
    """A streaming GET, with redirects that never leave https."""
    from huggingface_hub.utils import get_session

    address = url
    for _ in range(MAX_REDIRECTS):
        with get_session().stream(
            "GET",
            address,
            follow_redirects=False,
            timeout=TIMEOUT,
            headers={"Accept-Encoding": "identity"},
        ) as response:
            if not response.has_redirect_location:
                response.raise_for_status()
                yield response
                return
            target = str(response.url.join(response.headers["Location"]))
        downgrade = address.startswith("https:") and not target.startswith("https:")
        if downgrade or not is_permitted(target):
            raise DownloadError(f"{url} redirects to {target}: only https addresses are fetched")
        address = target
    raise DownloadError(f"{url} redirects more than {MAX_REDIRECTS} times")


@contextmanager
def _progress(name: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=size)
        yield lambda num_bytes: bar.advance(task, num_bytes)


# --------------------------------------------------------------------------------------- the hub


@dataclass(frozen=True)
class _Repository:
    """A repository at the revision that is asked for, and where its bytes and pins are kept."""

    source: HubSource
    endpoint: str
    cache: Path  # huggingface_hub's folder
    pins: Path
    offline: bool

    @property
    def repo(self) -> str:
        return self.source.repo


def _repository(
    source: HubSource, cache_dir: Path | None, local_files_only: bool, revision: str | None
) -> _Repository:
    from huggingface_hub import constants

    root = cache_root(cache_dir)
    return _Repository(
        source=replace(source, revision=revision or source.revision),
        # Read now and handed to every call: the client itself reads it once, at import.
        endpoint=(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"),
        cache=Path(constants.HF_HUB_CACHE) if cache_dir is None else root / "hub",
        pins=root / "pins" / f"{source.repo.replace('/', '--')}.json",
        offline=_is_offline(local_files_only),
    )


def _is_offline(local_files_only: bool) -> bool:
    from huggingface_hub import constants

    wished = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return local_files_only or wished or constants.HF_HUB_OFFLINE


def _resolve(repository: _Repository) -> str:
    revision = repository.source.revision
    if revision and _HASH.fullmatch(revision):
        return revision.lower()
    branch = revision or "main"
    pinned = _read_pins(repository)["revisions"].get(branch)
    if repository.offline:
        commit = pinned or _client_ref(repository, branch)
        if commit is None:
            raise _not_cached(repository.source, branch)
        return commit
    if pinned and revision is None:
        return pinned
    try:
        commit, files = _ask_for_commit(repository, revision)
    except DownloadError as error:
        if pinned is None or not _is_transient(error.__cause__):
            raise
        _log.warning("%s; using commit %s of %s, pinned earlier", error, pinned, repository.repo)
        return pinned
    _record(repository, commit, branch=branch, files=files)
    return commit


def _ask_for_commit(repository: _Repository, revision: str | None) -> tuple[str, list[str]]:
    """One call: the commit of a revision, and the names of its files."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=repository.endpoint)
    info = _ask_hub(
        repository,
        lambda: api.model_info(repository.repo, revision=revision, timeout=TIMEOUT),
        repository.endpoint,
    )
    commit = _check_commit(info.sha, repository.endpoint)
    if info.siblings is None:
        raise DownloadError(f"{repository.endpoint} does not list the files of {repository.source}")
    return commit, [str(sibling.rfilename) for sibling in info.siblings]


def _client_ref(repository: _Repository, branch: str) -> str | None:
    """The commit that another program of the user fetched through the same hub cache."""
    ref = repository.cache / f"models--{repository.repo.replace('/', '--')}" / "refs" / branch
    commit = ref.read_text().strip() if ref.is_file() else ""
    return commit.lower() if _HASH.fullmatch(commit) else None


def _list_files(repository: _Repository, commit: str) -> list[str] | None:
    """The names of a commit's files; None if that was never asked and there is no network."""
    known = _read_pins(repository)["commits"].get(commit, {}).get("files")
    if known is not None or repository.offline:
        return known
    files = _ask_for_commit(repository, commit)[1]
    _record(repository, commit, files=files)
    return files


def _weights_at_hand(repository: _Repository, commit: str) -> list[str]:
    files = _list_files(repository, commit)
    if files is None:
        files = [name for name in WEIGHT_FILES if _cached(repository, commit, name)]
        if not files:
            raise _not_cached(repository.source, "weights")
    return files


def _has(repository: _Repository, commit: str, name: str) -> bool:
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    cached = try_to_load_from_cache(
        repository.repo, name, cache_dir=repository.cache, revision=commit
    )
    if cached is not None:
        return cached is not _CACHED_NO_EXIST
    files = _list_files(repository, commit)
    if files is None:  # unknown is not missing: a pooling config that is skipped changes results
        raise _not_cached(repository.source, name)
    return name in files


def _cached(repository: _Repository, commit: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        repository.repo, name, cache_dir=repository.cache, revision=commit
    )
    return Path(found) if isinstance(found, str) else None


def _fetch_from_hub(repository: _Repository, commit: str, names: Iterable[str]) -> Fetched:
    files, hashes = {}, {}
    for name in names:
        files[name], hashes[name] = _fetch_one(repository, commit, name)
    return Fetched(files, commit, hashes)


def _fetch_one(repository: _Repository, commit: str, name: str) -> tuple[Path, str]:
    """One file and its sha256, downloaded if need be and hashed unless it was before."""
    where = f"{name} of {repository.repo} at {commit}"
    for _ in range(2):
        path, etag = _cached(repository, commit, name), None
        if path is None:
            path, etag = _download(repository, commit, name)
        elif known := _verified(repository, commit, name, path):
            return path, known
        etag = etag or _blob_name(path)
        if etag is None and not repository.offline:
            etag = _head(repository, commit, name).etag
        looks = None if name.endswith((".html", ".md")) else _placeholder(path)
        found, matches = _hashes(path, etag)
        if looks or not matches:
            _delete(path)
        if looks:
            raise DownloadError(f"{where} is {looks}")
        if matches:
            _record(repository, commit, verified={name: {"sha256": found, **_stamp(path)}})
            return path, found
        if repository.offline:
            break
        _log.warning("%s does not have the hash %s: fetched again", where, etag)
    raise IntegrityError(
        f"{where}: the bytes have sha256 {found}, but the hub promises {etag}. "
        + (
            "The damaged file was deleted from the cache; load it once with the network on"
            if repository.offline
            else "Fetched twice, nothing was kept: a proxy or a disk alters the file"
        )
    )


def _head(repository: _Repository, commit: str, name: str) -> Any:
    """The hub's metadata of a file; its ETag and commit are hashes, or it is refused."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository.repo, name, revision=commit, endpoint=repository.endpoint)
    metadata = _ask_hub(
        repository,
        lambda: get_hf_file_metadata(url, endpoint=repository.endpoint, timeout=TIMEOUT),
        url,
    )
    if metadata.etag is None or metadata.commit_hash is None:
        raise DownloadError(
            f"{url}: the answer carries no ETag and commit, so it is not a hub's. "
            "Check HF_ENDPOINT and any proxy"
        )
    _check_etag(metadata.etag, url)
    if _check_commit(metadata.commit_hash, url) != commit:
        raise DownloadError(f"{url} answers for another commit, {metadata.commit_hash}")
    host = urlsplit(metadata.location).hostname
    if host != urlsplit(repository.endpoint).hostname and not is_permitted(metadata.location):
        raise DownloadError(f"{url} redirects to {metadata.location}: only https is fetched")
    return replace(metadata, etag=metadata.etag.lower())


def _download(repository: _Repository, commit: str, name: str) -> tuple[Path, str]:
    """Have the client fetch a file into its cache; returns its path there and its ETag."""
    from huggingface_hub import hf_hub_download

    if repository.offline:
        raise _not_cached(repository.source, name)
    metadata = _head(repository, commit, name)
    _check_space(metadata.size or 0, repository.cache)
    _ask_hub(
        repository,
        lambda: hf_hub_download(
            repository.repo,
            name,
            revision=commit,
            cache_dir=repository.cache,
            endpoint=repository.endpoint,
        ),
        f"{repository.endpoint}/{repository.repo}/resolve/{commit}/{name}",
        client_retries=True,
    )
    path = _cached(repository, commit, name)
    if path is None:
        raise DownloadError(
            f"{repository.endpoint} gave {name} of {repository.repo} another commit"
        )
    return path, metadata.etag


def _blob_name(path: Path) -> str | None:
    """The ETag a cached file was stored under: one link away, as blobs may be links themselves."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if _HASH.fullmatch(name) else None


def _delete(path: Path) -> None:
    """Remove a file from the client's cache: the pointer, the blob, and a blob it shares."""
    chain = [path]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / os.readlink(chain[-1]))
    try:
        for link in chain:
            link.unlink(missing_ok=True)
    except OSError as error:
        raise IntegrityError(
            f"{path} is damaged and cannot be deleted ({error}): delete it by hand"
        ) from error


# ------------------------------------------------------------------------------------------ pins


def _read_pins(repository: _Repository) -> dict[str, dict[str, Any]]:
    """`revisions`: branch -> commit; `commits`: commit -> its `files` and the `verified` ones."""
    empty: dict[str, dict[str, Any]] = {"revisions": {}, "commits": {}}
    try:
        pins = json.loads(repository.pins.read_text(encoding="utf-8"))
        revisions, commits = pins["revisions"], pins["commits"]
        if not all(_HASH.fullmatch(commit) for commit in (*revisions.values(), *commits)):
            raise ValueError("not every commit is one")
        if not all(
            isinstance(row["files"], list | None) and isinstance(row["verified"], dict)
            for row in commits.values()
        ):
            raise ValueError("not a record of files")
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s is not used: %s", repository.pins, error)
        return empty
    return {"revisions": revisions, "commits": commits}


def _record(
    repository: _Repository,
    commit: str,
    *,
    branch: str | None = None,
    files: list[str] | None = None,
    verified: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Add what was learnt. A cache that cannot be written costs a question or a hash next time."""
    pins = _read_pins(repository)
    if branch is not None:
        pins["revisions"][branch] = commit
    row = pins["commits"].setdefault(commit, {"files": None, "verified": {}})
    if files is not None:
        row["files"] = files
    row["verified"].update(verified or {})
    part = repository.pins.with_name(f".{uuid.uuid4().hex}.part")
    try:
        repository.pins.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"repo": repository.repo, **pins}, indent=1), encoding="utf-8")
        os.replace(part, repository.pins)
    except OSError as error:
        _log.warning("%s could not be written: %s", repository.pins, error)
        if part.exists():
            part.unlink()


def _verified(repository: _Repository, commit: str, name: str, path: Path) -> str | None:
    row = _read_pins(repository)["commits"].get(commit, {}).get("verified", {}).get(name)
    if not isinstance(row, dict) or {**row, **_stamp(path)} != row:
        return None
    return row.get("sha256")


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


# ----------------------------------------------------------------------------- bytes and answers


def _hashes(path: Path, etag: str | None) -> tuple[str, bool]:
    """The sha256 of a file, and whether it is what its ETag says (sha256, or git's blob sha1)."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            if etag and len(etag) == 40:
                git.update(chunk)
    found = sha256.hexdigest()
    return found, etag in (None, found, git.hexdigest())


def _placeholder(content: Path | bytes) -> str | None:
    """What stands in the place of a file, if its first bytes show it."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            content = file.read(512)
    start = content.lstrip()[:64].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page instead of the file: a login page or a proxy's, or a wrong address"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer instead of the file: run `git lfs pull` where it was cloned"
    return None


def _check_commit(commit: str | None, url: str) -> str:
    if commit is None or not _HASH.fullmatch(commit):
        raise DownloadError(f"{url}: {commit!r} is not a commit (40 or 64 hex digits); refused")
    return commit.lower()


def _check_etag(etag: str, url: str) -> None:
    if not _HASH.fullmatch(etag):
        raise DownloadError(
            f"{url}: the ETag {etag!r} is not a hash (40 or 64 hex digits); refused, as it would "
            "become a path"
        )


def _check_space(size: int, folder: Path) -> None:
    """The client only warns, and then fills the disk."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size:,} bytes are needed, {free:,} are free", str(folder))


def _check_wait(seconds: float | None, url: str) -> None:
    if seconds is not None and seconds > LONGEST_WAIT:
        raise DownloadError(f"{url}: the server asks to wait {seconds:.0f} s; try again after that")


_ours: ContextVar[bool] = ContextVar("_ours", default=False)


def _check_answer(response: Any) -> None:
    """A hook on the client's HTTP session: refuse what its next step would trust.

    The client makes file names out of ETags and commits, waits as long as a Retry-After says, and
    writes any body of the right length. It asks for the headers once more after `_head` has seen
    them, so they are looked at here as well.
    """
    if not _ours.get():
        return
    url, headers = str(response.url), response.headers
    if (commit := headers.get("X-Repo-Commit")) is not None:
        _check_commit(commit, url)
    _check_wait(_retry_after(headers), url)
    if response.status_code >= 300 and not response.has_redirect_location:
        return
    if response.request.method == "HEAD":
        stays = response.has_redirect_location and (
            response.url.join(headers["Location"]).host == response.url.host
        )
        etag = headers.get("X-Linked-ETag") or headers.get("ETag")
        if etag and not (stays and "X-Linked-ETag" not in headers):  # a renamed repository's hop
            _check_etag(etag.removeprefix("W/").strip('"'), url)
        return
    if response.has_redirect_location:
        return
    looks = None
    length = headers.get("Content-Length", "")
    if headers.get("Content-Type", "").startswith("text/html"):
        looks = _placeholder(b"<html")
    elif length.isdigit() and int(length) <= _SMALL_BODY and response.status_code == 200:
        looks = _placeholder(response.read())
    if looks:
        raise DownloadError(f"{url} answers with {looks}")


@contextmanager
def _watched_client() -> Iterator[None]:
    from huggingface_hub.utils import get_session

    hooks = get_session().event_hooks["response"]
    if _check_answer not in hooks:
        hooks.append(_check_answer)
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


# ---------------------------------------------------------------------------- retries and errors


def _ask(
    action: Callable[[], _T],
    source: Source,
    url: str,
    folder: Path,
    client_retries: bool = False,
) -> _T:
    """Run a network call: transient failures are retried, the rest becomes an error of ours.

    client_retries: the call retries on its own whatever cannot connect, stalls or breaks off, so
    only what it lets through (resets, 5xx) is retried here.
    """
    for pause in (*BACKOFF, None):
        try:
            return action()
        except MLXZooError:
            raise
        # The client and its transports raise what they like; none of it may escape.
        except Exception as error:
            given_up = client_retries and _RETRIED_BY_CLIENT & _kinds(error)
            if pause is None or given_up or not _is_transient(error):
                raise _explain(error, source, url, folder) from error
            wait = _retry_after(getattr(getattr(error, "response", None), "headers", {}))
            _check_wait(wait, url)
            _log.info("%s: %s; trying again", url, error)
            sleep(pause if wait is None else wait)
    raise AssertionError("unreachable")


def _ask_hub(
    repository: _Repository, action: Callable[[], _T], url: str, client_retries: bool = False
) -> _T:
    """`_ask`, through the client and with every answer looked at before the client acts on it."""

    def watched() -> _T:
        with _watched_client():  # for each try: the client makes a new session when it likes
            return action()

    return _ask(watched, repository.source, url, repository.cache, client_retries)


# By name: the client's transport is httpx in its first major version, httpx2 in its second.
_RETRIED_BY_CLIENT = {
    "ConnectError",
    "TimeoutException",
    "RemoteProtocolError",
    "LocalEntryNotFoundError",
}


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _http_error() -> type[Exception]:
    """The base class of the transport's errors, whichever transport the client brings."""
    from huggingface_hub import errors

    return errors.HTTPError


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: BaseException | None) -> bool:
    if error is None:
        return False
    if "LocalEntryNotFoundError" in _kinds(error):
        return _is_transient(error.__cause__)
    if (status := _status(error)) is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, _http_error() | _Truncated)


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait; the header holds seconds or a date."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):  # no header, or neither form
        return None


def _explain(error: Exception, source: Source, url: str, folder: Path) -> Exception:
    """The error to raise for one of the client's or the transport's."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        return _explain(cause, source, url, folder)
    known = _explain_answer(error, source, url)
    if known is not None:
        return known
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _not_cached(source, url)
    if isinstance(error, _Truncated):
        return IntegrityError(
            f"{url}: the body breaks off ({error}), again after {len(BACKOFF)} retries. "
            "Nothing was kept; check the connection and any proxy"
        )
    status = _status(error)
    if status is None and isinstance(error, OSError) and error.errno in _DISK_FULL:
        return OSError(error.errno, f"{error.strerror}, fetching {url}", str(folder))
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return DownloadError(
            f"{url} cannot be stored: {error}. Make {folder} writable, or give another cache_dir"
        )
    return DownloadError(f"{url}: {_first_line(error)}. {_hint(error, status)}")


def _explain_answer(error: Exception, source: Source, url: str) -> DownloadError | None:
    """The hub's refusals, each with what to do about it."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        parts = urlsplit(url)
        page = f"{parts.scheme}://{parts.netloc}/{getattr(source, 'repo', '')}"
        return GatedRepository(
            f"{source} is gated: accept its licence at {page}, then run `hf auth login` "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RevisionNotFound(
            f"{source}: no such branch, tag or commit ({url}). "
            'If its history was rewritten, revision="main" takes what is there now'
        )
    if isinstance(error, errors.EntryNotFoundError) and _status(error) is not None:
        return FileNotInRepository(f"{source} has no such file: {url}")
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error) == 401:
        return RepositoryNotFound(
            f"{source} does not exist, or is private ({url}): check the name, and for a private "
            "one run `hf auth login` (or set HF_TOKEN) with an account that may read it"
        )
    return None


def _hint(error: Exception, status: int | None) -> str:
    if status == 403:
        return "The account or token in use may not read it: `hf auth login` with another"
    if status == 429:
        return "Too many requests: wait a few minutes; `hf auth login` raises the limit"
    if status is not None and status >= 500:
        return f"The server failed, again after {len(BACKOFF)} retries: try later"
    if status is not None:
        return "The address is wrong, or the file is gone"
    if isinstance(error, _http_error()):
        return "Check the connection, any proxy, and HF_ENDPOINT; what is cached loads without it"
    return "Nothing was kept; try again, and check any proxy between here and the server"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__} {lines[0]}".rstrip(" .:")


def _not_cached(source: Source, name: str) -> NotCached:
    return NotCached(
        f"{name} of {source} is not in the cache and the network is off. "
        f"Fetch it with the network on: mlx-zoo load {source}"
    )
