"""Converted weights on disk: keyed by what they were made from, stamped, hashed, atomic.

    <root>/weights/<name>-<first 16 digits of the key>/
        model.safetensors    the parameters, in MLX's layout
        manifest.json        what the key was made of; source, revision, hashes, versions
        verification.json    the latest verification, once there is one
        fingerprint.safetensors    what the PyTorch original answered then (`verify.stored`)

A folder that is to travel has the same files; above a limit its weights are in several,

    model-00001-of-00003.safetensors, ...    and model.safetensors.index.json, which says what is
                                             where; the manifest has the hash of each

    <root>/quarantine/       entries that could not be used
    <root>/downloads/        files that came from an https address (`download`)
    <root>/pins/             what was learnt about repositories (`pins`)
    <root>/seen/             the hashes of large local files (`seen`)

An entry appears by one rename of its folder, so a conversion that is killed leaves nothing that a
later run could take for whole. Its hash is checked before it is trusted. Any number of processes
and threads may use a cache at once. An attacker who can rewrite both files with the user's rights
is out of scope.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import string
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zoo.errors import MLXZooError
from mlx_zoo.hub.reading import Hashing, sha256_of
from mlx_zoo.hub.safetensors_header import Header, read_header
from mlx_zoo.hub.safetensors_writer import write_safetensors as save

log = logging.getLogger("mlx_zoo")

FORMAT = 1  # of an entry; raised whenever a conversion yields other bytes for the same spec
WEIGHTS, MANIFEST, VERIFICATION = "model.safetensors", "manifest.json", "verification.json"
FINGERPRINT = "fingerprint.safetensors"
INDEX, SHARD = "model.safetensors.index.json", "model-{:05}-of-{:05}.safetensors"
DAY = 24 * 3600  # seconds
STALE = DAY  # longer than any work takes: what is older was left by a process that was killed

State = tuple[int, ...]  # of a file: see `state_of`


@dataclass(frozen=True)
class Entry:
    """One converted checkpoint in the cache."""

    path: Path
    manifest: Mapping[str, Any]
    seen: tuple[State | None, ...] = ()  # of the weights' files, before they were checked
    borrowed: bool = False  # of another program's cache: nothing is written beside the weights

    @property
    def files(self) -> tuple[Path, ...]:
        """Those with the weights: one, or all shards."""
        return tuple(self.path / name for name in weights_of(self.manifest))

    @property
    def weights(self) -> Path:
        """The file with the weights; of shards the first."""
        return self.files[0]

    @property
    def verification(self) -> Mapping[str, Any] | None:
        """The latest verification of these weights, if any."""
        file = self.path / VERIFICATION
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        others = (self.path / name for name in (INDEX, MANIFEST, VERIFICATION, FINGERPRINT))
        return sum(file.stat().st_size for file in (*self.files, *others) if file.is_file())


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else MLX_ZOO_CACHE, else the platform's cache folder."""
    if cache_dir or (cache_dir := os.environ.get("MLX_ZOO_CACHE")):
        return Path(cache_dir).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_zoo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_zoo"


def key_of(fields: Mapping[str, Any]) -> str:
    """64 hex digits that change when anything in `fields`, or the format, changes."""
    text = json.dumps({"format": FORMAT, **fields}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def find(root: Path, name: str, key: str) -> Entry | None:
    """The whole and unchanged entry of that key, or None. Any other is set aside."""
    entry = look_up(root, name, key)
    if entry is None:
        return None
    try:
        check(entry)
    except (OSError, ValueError, MLXZooError) as error:
        quarantine(root, entry.path, error)
        return None
    return entry


def look_up(root: Path, name: str, key: str) -> Entry | None:
    """The entry of that key, its weights not yet checked, or None. A damaged one is set aside."""
    path = _folder(root, name, key)
    if not path.is_dir():
        return None
    try:
        entry = read_entry(path)
        if entry.manifest.get("key") != key:
            raise MLXZooError("the manifest belongs to another conversion")
    except (OSError, ValueError, MLXZooError) as error:
        quarantine(root, path, error)
        return None
    return entry


def read_entry(path: Path) -> Entry:
    """The entry in a folder, its manifest read, its weights not yet checked.

    Raises OSError where there is no manifest, ValueError where it is something else.
    """
    if not (path / MANIFEST).is_file():  # nor a pipe, which would wait for a writer
        raise FileNotFoundError(f"{path} has no {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"the manifest is no manifest: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError("the manifest is not an object")
    return Entry(path, manifest, tuple(state_of(path / name) for name in weights_of(manifest)))


def weights_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the files with the weights that a manifest speaks of, in their order.

    Raises ValueError for shards that are not named as they are written: a manifest may be a
    stranger's, and a name may be a path.
    """
    if "shards" not in manifest:
        return (WEIGHTS,)
    shards = manifest["shards"]
    if not isinstance(shards, dict) or [*shards] != [*_shard_names(len(shards))] or not shards:
        raise ValueError("the manifest's shards are not model-00001-of-..., one after the other")
    if not all(isinstance(row, dict) for row in shards.values()):
        raise ValueError("the manifest's shards have no sizes and hashes")
    return tuple(shards)


def _shard_names(count: int) -> Iterator[str]:
    return (SHARD.format(number, count) for number in range(1, count + 1))


def check(entry: Entry) -> None:
    """Raise unless weights and manifest are those that were written.

    The manifest has the hashes of the weights; their headers repeat what the manifest says.
    """
    names = {}
    for file in entry.files:
        header = _checked_header(entry, file)
        _check_sha256(entry, file, sha256_of(file))
        _check_metadata(entry, file, header)
        names[file.name] = list(header.tensors)
    _check_whole(entry, names)


def read_checked(entry: Entry) -> dict[str, mx.array]:
    """The parameters of an entry, in memory: the bytes that are hashed are those that are kept.

    Raises as `check` does; OSError where it was removed or replaced meanwhile.
    """
    from mlx_zoo.hub.checkpoint import read_safetensors

    weights: dict[str, mx.array] = {}
    names: dict[str, Sequence[str]] = {}
    for file in entry.files:
        header = _checked_header(entry, file)
        with Hashing() as digest:
            tensors = read_safetensors(file, header, digest)
            _check_sha256(entry, file, digest.hexdigest())
        _check_metadata(entry, file, header)
        names[file.name] = list(tensors)
        weights |= tensors
    _check_whole(entry, names)
    _check_same_files(entry)
    return weights


def _promised(entry: Entry, file: Path, what: str) -> Any:
    """The size or sha256 that the manifest gives a file."""
    return entry.manifest.get("shards", {}).get(file.name, entry.manifest).get(what)


def _checked_header(entry: Entry, file: Path) -> Header:
    if not file.is_file():
        raise MLXZooError(f"{file.name} is no file")
    size, promised = file.stat().st_size, _promised(entry, file, "size")
    if size != promised:
        raise MLXZooError(f"{file.name} has {size} bytes, {promised} were written")
    return read_header(file)


def _check_sha256(entry: Entry, file: Path, sha256: str) -> None:
    if sha256 != _promised(entry, file, "sha256"):
        raise MLXZooError(f"{file.name} does not have the sha256 that was written")


def _check_metadata(entry: Entry, file: Path, header: Header) -> None:
    if header.metadata != _header_of(entry.manifest):
        raise MLXZooError(f"{MANIFEST} does not say what the header of {file.name} says")


def _check_whole(entry: Entry, names: Mapping[str, Sequence[str]]) -> None:
    """Raise unless shards hold what the index says, and no other file could be taken for weights.

    `names` are those of the tensors in each file.
    """
    from mlx_zoo.hub.checkpoint import check_index

    own = set(names)
    if "shards" in entry.manifest:
        check_index(entry.path / INDEX, names)
        hashes = [row.get("sha256") for row in entry.manifest["shards"].values()]
        if entry.manifest.get("sha256") != _joint_sha256(hashes):
            raise MLXZooError(f"the sha256 in {MANIFEST} is not that of its shards")
        own.add(INDEX)
    if others := sorted({file.name for file in entry.path.glob("model*.safetensors*")} - own):
        raise MLXZooError(f"{others[0]} does not belong to it")


def _check_same_files(entry: Entry) -> None:
    for file, seen in zip(entry.files, entry.seen, strict=True):
        if state_of(file) != seen:
            raise OSError(f"{file} was replaced while it was read")


def read_weights(entry: Entry) -> dict[str, mx.array]:
    """The parameters of an entry that was checked, in memory: its file may go or change then.

    Raises OSError where it is gone, or is no longer the file that was checked.
    """
    from mlx_zoo.hub.checkpoint import read_safetensors

    weights: dict[str, mx.array] = {}
    for file in entry.files:
        try:
            weights |= read_safetensors(file, read_header(file))
        except MLXZooError as error:
            raise OSError(f"{file}: {error}") from error
    _check_same_files(entry)
    return weights


def state_of(path: Path) -> State | None:
    """Which file this is, its bytes, and its last change (ns), which nobody can set back."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns


def store(
    root: Path, name: str, key: str, weights: Mapping[str, mx.array], manifest: Mapping[str, Any]
) -> Entry:
    """Write an entry. Where another process or thread was faster, its entry is returned.

    Raises OSError where the disk is full or cannot be written; nothing is left behind then.
    """
    path = _folder(root, name, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, ".partial-*")
    work = working_folder(path.parent)
    try:
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        manifest = write_folder(work, weights, {"key": key, **manifest, "created": created})
        for written in (*work.iterdir(), work):
            flush(written)
        for retry in (True, False):
            try:
                work.rename(path)
                break
            except OSError:
                if other := find(root, name, key):
                    return other
                if not retry:  # what was in the way, and damaged, was set aside just now
                    raise
        flush(path.parent)
        return Entry(path, manifest, (state_of(path / WEIGHTS),))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def working_folder(parent: Path) -> Path:
    """A new folder beside its later place. (Python's tempfile would make it the user's alone.)"""
    work = parent / f".partial-{uuid.uuid4().hex}"
    work.mkdir()
    return work


def write_folder(
    folder: Path,
    weights: Mapping[str, mx.array],
    manifest: Mapping[str, Any],
    max_shard_size: int | None = None,
) -> Mapping[str, Any]:
    """Write weights and manifest into an existing folder; the manifest as written is returned.

    Of more bytes of weights than `max_shard_size` there are several files. The same weights and
    manifest give the same bytes.
    """
    manifest = {"format": FORMAT, **manifest, "versions": versions()}
    hashes = write_weights(folder, weights, _header_of(manifest), max_shard_size)
    written: dict[str, dict[str, Any]] = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in hashes.items()
    }
    if len(written) == 1:
        manifest = {**manifest, **written[WEIGHTS]}
    else:
        size = sum(row["size"] for row in written.values())
        joint = _joint_sha256([row["sha256"] for row in written.values()])
        manifest = {**manifest, "size": size, "sha256": joint, "shards": written}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def write_weights(
    folder: Path, weights: Mapping[str, mx.array], header: Mapping[str, str], limit: int | None
) -> dict[str, str]:
    """Write weights into one file, or several of at most `limit` bytes and their index.

    Returns the name of each file and its sha256.
    """
    shards = _shards(weights, limit)
    names = [WEIGHTS] if len(shards) == 1 else [*_shard_names(len(shards))]
    placed = dict(zip(names, shards, strict=True))
    if len(placed) > 1:
        homes = {key: name for name, shard in placed.items() for key in shard}
        total = sum(x.nbytes for x in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {name: save(folder / name, shard, header) for name, shard in placed.items()}


def as_bytes(size: int | str) -> int:
    """Bytes of "5GB", "500MB" or a number of them. ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", str(size).strip().upper())
    number = float(found[1]) * 1000 ** " KMGT".index(found[2] or " ") if found else 0
    if isinstance(size, bool) or number < 1:
        raise ValueError(f"max_shard_size={size!r}: bytes, or '5GB', are needed")
    return int(number)


def _shards(weights: Mapping[str, mx.array], limit: int | None) -> list[dict[str, mx.array]]:
    """The weights in their order, as many together as `limit` allows in bytes; one at least."""
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name, x in weights.items():
        if limit is not None and shards[-1] and size + x.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    return shards


def _joint_sha256(hashes: Sequence[str | None]) -> str:
    """One hash that stands for those of all shards."""
    return hashlib.sha256(" ".join(map(str, hashes)).encode()).hexdigest()


def _header_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the headers of the weights repeat of their manifest."""
    later = ("created", "size", "sha256", "shards")
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in manifest.items()}
    return {"layout": "mlx", **{k: text for k, text in texts.items() if k not in later}}


def stamp(entry: Entry, verification: Mapping[str, Any]) -> None:
    """Keep the result of a verification beside the weights it speaks of."""
    text = json.dumps({"sha256": entry.manifest["sha256"], **verification}, indent=2) + "\n"
    keep(entry, VERIFICATION, text.encode())


def keep(entry: Entry, name: str, data: bytes) -> None:
    """Write, or replace, a file beside the weights of an entry."""
    sweep(entry.path, ".*.part")
    part = entry.path / f".{uuid.uuid4().hex}.part"
    try:
        part.write_bytes(data)
        flush(part)
        part.replace(entry.path / name)
    finally:
        part.unlink(missing_ok=True)


def entries(root: Path) -> Iterator[Entry]:
    """Every entry that has a manifest, by name; the weights are not checked."""
    for path in sorted((root / "weights").glob("*/")):
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            continue
        try:
            yield read_entry(path)
        except (OSError, ValueError):
            log.warning("%s: the manifest cannot be read; `mlx-zoo cache prune` removes it", path)


def downloads(root: Path) -> list[tuple[Path, int]]:
    """The finished files behind https addresses, by name, each with its bytes on disk."""
    found = []
    for path in sorted((root / "downloads").glob("[!.]*")):
        try:
            found.append((path, path.stat().st_size))
        except FileNotFoundError:  # removed just now
            continue
    return found


def prune(root: Path, keep_days: float | None = None) -> list[Path]:
    """Remove what was set aside, unfinished or unreadable; the paths that are gone are returned.

    With `keep_days`, entries and downloads that are older go too; 0 removes all of them. A download
    is needed again only for another conversion of the same file.
    """
    entries = [p for p in (root / "weights").glob("*/") if not p.name.startswith(".partial-")]
    kept = [path for path in entries if _is_readable(path)]
    doomed = [*(root / "quarantine").glob("*/"), *(p for p in entries if p not in kept)]
    if keep_days is not None:
        kept += [path for path, _ in downloads(root)]
        doomed += [path for path in kept if _age(path) >= keep_days * DAY]
    removed = [path for path in doomed if _remove(path)]
    for folder, pattern in (
        ("weights", ".partial-*"),
        ("downloads", ".*.part"),
        ("pins", ".*.part"),
        ("seen", ".*.part"),
    ):
        removed += sweep(root / folder, pattern)
    return removed


def sweep(folder: Path, pattern: str) -> list[Path]:
    """Remove the files and folders of a pattern that processes left when they were killed.

    Others may finish or sweep the same just now: what is gone is no error.
    """
    return [path for path in folder.glob(pattern) if _age(path) > STALE and _remove(path)]


def _age(path: Path) -> float:
    """Seconds since a file or folder was written; 0 where it is gone, or of the future."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def _remove(path: Path) -> bool:
    """Whether the file or folder is gone now; the log says why it is not."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:  # another process was faster
        return True
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)
        return False
    return True


def _is_readable(path: Path) -> bool:
    try:
        return bool(read_entry(path))
    except (OSError, ValueError):
        return False


def versions() -> dict[str, str]:
    """What took part in a conversion or verification."""
    from mlx_zoo import __version__

    return {
        "mlx_zoo": __version__,
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _folder(root: Path, name: str, key: str) -> Path:
    known = "._-" + string.ascii_letters + string.digits
    plain = "".join(c if c in known else "-" for c in name)[-80:]
    return root / "weights" / f"{plain.lstrip('.')}-{key[:16]}"


def quarantine(root: Path, path: Path, reason: Exception | str) -> None:
    """Set an entry that cannot be used aside: damaged, or of another release. The log says why."""
    aside = root / "quarantine" / f"{path.name}-{time.time_ns()}"
    log.warning("%s cannot be used (%s); it is set aside and converted again", path, reason)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
    except FileNotFoundError:  # another process was faster
        return
    except OSError as failure:
        log.warning("%s cannot be set aside: %s", path, failure)


def flush(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows has no descriptors of folders
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # a network's file system may not know how to flush a folder
            raise
    finally:
        os.close(descriptor)
