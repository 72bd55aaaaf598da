"""Bring a checkpoint's files to this machine: verified bytes, at a commit that stays put.

A source is a repository on a hub (`repository`), an https file with a hash (`download`), or local
files, which are read where they are. Whatever is wrong with the client, the network or the bytes
is an error of `mlx_zoo.errors`; only a full disk is an OSError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_zoo.errors import CheckpointError, FileNotInRepository
from mlx_zoo.hub.answers import placeholder
from mlx_zoo.hub.cache import cache_root, state_of
from mlx_zoo.hub.download import download, file_name
from mlx_zoo.hub.reading import sha256_of
from mlx_zoo.hub.repository import Repository, open_repository, resolve_revision
from mlx_zoo.hub.seen import known_sha256, remember
from mlx_zoo.hub.source import DirectorySource, FileSource, HubSource, Source, UrlSource

__all__ = ["Fetched", "fetch_files", "fetch_weights", "local_weights", "resolve_revision"]

# In the order of preference; an index names the shards that lie beside it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX_SUFFIX = ".index.json"

_SingleSource = DirectorySource | FileSource | UrlSource  # of one state, without revisions


@dataclass(frozen=True)
class Fetched:
    """Files on this machine, and what is known about them.

    files: name in the repository (or file name) -> local path.
    revision: the commit on the hub; "" for what does not come from there.
    sha256: name -> hash of the bytes, checked against the publisher's where there is one.
    license: as the repository's card says, where it does.
    seen: local file -> the state that it had before it was hashed.
    """

    files: dict[str, Path]
    revision: str
    sha256: dict[str, str]
    license: str | None = None
    seen: dict[Path, tuple[int, ...] | None] = field(default_factory=dict)

    def hashed(self, root: Path) -> Fetched:
        """With the hashes of the local files, but for those that are recorded in `root`."""
        found = {}
        for name, path in self.files.items():
            since, state = time.time(), self.seen[path]
            sha256 = self.sha256.get(name) or sha256_of(path)
            if name not in self.sha256 and state_of(path) == state:
                remember(root, path, state, since, sha256)
            found[name] = sha256
        return replace(self, sha256=found)

    @property
    def size(self) -> int:
        """Bytes of all files; those that are gone count for nothing."""
        return sum(state[2] for path in self.files.values() if (state := state_of(path)))

    @property
    def is_hashed(self) -> bool:
        """Whether the hashes of all files are known."""
        return self.sha256.keys() == self.files.keys()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a local file was replaced or written since it was hashed."""
        for path, state in self.seen.items():
            if state_of(path) != state:
                raise CheckpointError(f"{path} changed while it was read: load it again")

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
) -> Fetched:
    """Fetch `names`, all of them required, and those of `optional` that the source has.

    Only an answer that a file does not exist counts as missing: never a network failure.

    Raises:
        DownloadError: in the more exact type where there is one (`NotCached`, ...).
        IntegrityError: the bytes do not have the promised hash.
        CheckpointError: a local file is a git-lfs pointer or a web page.
        OSError: the disk is full.
        ValueError: a name that is not a plain relative path.
    """
    required, wished = tuple(names), tuple(optional)
    for name in (*required, *wished):
        _check_name(name)
    if isinstance(source, HubSource):
        repository = open_repository(source, cache_dir, local_files_only)
        commit = repository.resolve()
        present = [name for name in wished if repository.has(commit, name)]
        return _fetch_from_hub(repository, commit, (*required, *present))
    present = [name for name in wished if _has(source, name)]
    return _fetch_single(source, (*required, *present), cache_dir, local_files_only)


def fetch_weights(
    source: Source,
    *,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
) -> Fetched:
    """Fetch the weights: safetensors before pickles, a whole file before an index and its shards.

    Which of them exists is read from the repository's list of files, so that a failing server is
    never taken for a repository without safetensors. Raises as `fetch_files` does, and
    CheckpointError for an index that cannot be read.
    """
    if isinstance(source, HubSource):
        repository = open_repository(source, cache_dir, local_files_only)
        commit = repository.resolve()
        first = _choose_weights(repository.files_at_hand(commit, WEIGHT_FILES), source)
        fetched = _fetch_from_hub(repository, commit, (first,))
        return _join(fetched, _fetch_from_hub(repository, commit, _shards(fetched)))
    if isinstance(source, UrlSource):
        name = _own_name(source)
        fetched = _fetch_single(source, (name,), cache_dir, local_files_only)
        folder = DirectorySource(fetched.files[name].parent)
        return _join(fetched, _fetch_single(folder, _shards(fetched), cache_dir, local_files_only))
    root = cache_root(cache_dir)
    return local_weights(source, root).hashed(root)


def local_weights(source: DirectorySource | FileSource, root: Path) -> Fetched:
    """The local files of the weights, with those of their hashes that are recorded in `root`.

    Raises as `fetch_weights` does.
    """
    if isinstance(source, DirectorySource):
        first = _choose_weights([name for name in WEIGHT_FILES if _has(source, name)], source)
    else:
        first = _own_name(source)
    fetched = _find_in_place(source, (first,), root)
    folder = DirectorySource(fetched.files[first].parent)
    return _join(fetched, _find_in_place(folder, _shards(fetched), root))


def _choose_weights(available: list[str], source: Source) -> str:
    for name in WEIGHT_FILES:
        if name in available:
            return name
    shown = ", ".join(name if name.isprintable() else repr(name) for name in sorted(available)[:12])
    raise FileNotInRepository(
        f"{source} has no weights that are read here ({', '.join(WEIGHT_FILES)}); "
        f"its files: {shown or 'none'}"
    )


def _shards(fetched: Fetched) -> tuple[str, ...]:
    if fetched.index is None:
        return ()
    from mlx_zoo.hub.checkpoint import shard_names

    return shard_names(fetched.index)


def _fetch_from_hub(repository: Repository, commit: str, names: Iterable[str]) -> Fetched:
    found = _collect(names, lambda name: repository.fetch(commit, name), revision=commit)
    return replace(found, license=repository.license(commit))


def _fetch_single(
    source: _SingleSource, names: Iterable[str], cache_dir: Path | None, local_files_only: bool
) -> Fetched:
    if isinstance(source, UrlSource):
        return _collect(names, lambda name: _download(source, name, cache_dir, local_files_only))
    root = cache_root(cache_dir)
    return _find_in_place(source, names, root).hashed(root)


def _find_in_place(
    source: DirectorySource | FileSource, names: Iterable[str], root: Path
) -> Fetched:
    """Local files, with those of their hashes that are recorded."""
    files = {name: _in_place(source, name) for name in names}
    seen = {path: state_of(path) for path in files.values()}
    known = {name: known_sha256(root, path, seen[path]) for name, path in files.items()}
    hashes = {name: sha256 for name, sha256 in known.items() if sha256}
    return Fetched(files, "", hashes, seen=seen)


def _collect(
    names: Iterable[str], fetch_one: Callable[[str], tuple[Path, str]], revision: str = ""
) -> Fetched:
    files, hashes = {}, {}
    for name in names:
        files[name], hashes[name] = fetch_one(name)
    return Fetched(files, revision, hashes)


def _join(one: Fetched, other: Fetched) -> Fetched:
    return replace(
        one,
        files=one.files | other.files,
        sha256=one.sha256 | other.sha256,
        seen=one.seen | other.seen,
    )


def _download(
    source: UrlSource, name: str, cache_dir: Path | None, local_files_only: bool
) -> tuple[Path, str]:
    if not _has(source, name):
        raise FileNotInRepository(f"{source} is one file, without a {name}")
    return download(source, cache_dir, local_files_only)


def _folder(source: DirectorySource | FileSource) -> Path:
    return source.path if isinstance(source, DirectorySource) else source.path.parent


def _in_place(source: DirectorySource | FileSource, name: str) -> Path:
    folder = _folder(source)
    path = folder / name
    if not path.is_file() or not _has(source, name):
        raise FileNotInRepository(f"{source} has no {name}: looked in {folder}")
    if looks := placeholder(path):
        raise CheckpointError(f"{path} is {looks}")
    return path


def _has(source: _SingleSource, name: str) -> bool:
    if isinstance(source, DirectorySource):
        return (source.path / name).is_file()
    return name == _own_name(source)


def _own_name(source: FileSource | UrlSource) -> str:
    return file_name(source) if isinstance(source, UrlSource) else source.path.name


def _check_name(name: str) -> None:
    """Names may come out of a repository's own JSON: none may point outside of its folder."""
    steps = any(part in ("", ".", "..") for part in name.split("/"))
    if steps or any(character in name for character in "\\:\0"):
        raise ValueError(f"{name!r} is not the name of a file inside a repository")
