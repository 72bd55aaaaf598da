"""Converted weights on disk: keyed by what they were made from, stamped, hashed, atomic.

    <root>/weights/<name>-<first 16 digits of the key>/
        model.safetensors    the parameters, in MLX's layout
        manifest.json        what the key was made of; source, revision, hashes, versions
        verification.json    the latest verification, once there is one
        fingerprint.safetensors    what the PyTorch original answered then (`verify.stored`)

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
import shutil
import string
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
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
DAY = 24 * 3600  # seconds
STALE = DAY  # longer than any work takes: what is older was left by a process that was killed


@dataclass(frozen=True)
class Entry:
    """One converted checkpoint in the cache."""

    path: Path
    manifest: Mapping[str, Any]
    seen: tuple[int, ...] | None = None  # the state of the weights before they were checked

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

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
        files = (self.path / name for name in (WEIGHTS, MANIFEST, VERIFICATION, FINGERPRINT))
        return sum(file.stat().st_size for file in files if file.is_file())


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
    seen = state_of(path / WEIGHTS)
    if not (path / MANIFEST).is_file():  # nor a pipe, which would wait for a writer
        raise FileNotFoundError(f"{path} has no {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"the manifest is no manifest: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError("the manifest is not an object")
    return Entry(path, manifest, seen)


def check(entry: Entry) -> None:
    """Raise unless weights and manifest are those that were written.

    The manifest has the hash of the weights; their header repeats what the manifest says.
    """
    header = _checked_header(entry)
    _check_sha256(entry, sha256_of(entry.weights))
    _check_metadata(entry, header)


def read_checked(entry: Entry) -> dict[str, mx.array]:
    """The parameters of an entry, in memory: the bytes that are hashed are those that are kept.

    Raises as `check` does; OSError where it was removed or replaced meanwhile.
    """
    from mlx_zoo.hub.checkpoint import read_safetensors

    header = _checked_header(entry)
    with Hashing() as digest:
        weights = read_safetensors(entry.weights, header, digest)
        _check_sha256(entry, digest.hexdigest())
    _check_metadata(entry, header)
    _check_same_file(entry)
    return weights


def _checked_header(entry: Entry) -> Header:
    if not entry.weights.is_file():
        raise MLXZooError(f"{WEIGHTS} is no file")
    size = entry.weights.stat().st_size
    if size != entry.manifest.get("size"):
        raise MLXZooError(f"{WEIGHTS} has {size} bytes, {entry.manifest.get('size')} were written")
    return read_header(entry.weights)


def _check_sha256(entry: Entry, sha256: str) -> None:
    if sha256 != entry.manifest.get("sha256"):
        raise MLXZooError(f"{WEIGHTS} does not have the sha256 that was written")


def _check_metadata(entry: Entry, header: Header) -> None:
    if header.metadata != _header_of(entry.manifest):
        raise MLXZooError(f"{MANIFEST} does not say what the header of {WEIGHTS} says")


def _check_same_file(entry: Entry) -> None:
    if state_of(entry.weights) != entry.seen:
        raise OSError(f"{entry.weights} was replaced while it was read")


def read_weights(entry: Entry) -> dict[str, mx.array]:
    """The parameters of an entry that was checked, in memory: its file may go or change then.

    Raises OSError where it is gone, or is no longer the file that was checked.
    """
    from mlx_zoo.hub.checkpoint import read_safetensors

    try:
        weights = read_safetensors(entry.weights, read_header(entry.weights))
    except MLXZooError as error:
        raise OSError(f"{entry.weights}: {error}") from error
    _check_same_file(entry)
    return weights


def state_of(path: Path) -> tuple[int, ...] | None:
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
        manifest = write_folder(work, weights, {"key": key, **manifest})
        for written in (*work.iterdir(), work):
            _flush(written)
        for retry in (True, False):
            try:
                work.rename(path)
                break
            except OSError:
                if other := find(root, name, key):
                    return other
                if not retry:  # what was in the way, and damaged, was set aside just now
                    raise
        _flush(path.parent)
        return Entry(path, manifest, state_of(path / WEIGHTS))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def working_folder(parent: Path) -> Path:
    """A new folder beside its later place. (Python's tempfile would make it the user's alone.)"""
    work = parent / f".partial-{uuid.uuid4().hex}"
    work.mkdir()
    return work


def write_folder(
    folder: Path, weights: Mapping[str, mx.array], manifest: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Write weights and manifest into an existing folder; the manifest as written is returned."""
    manifest = {"format": FORMAT, **manifest, "versions": versions()}
    target = folder / WEIGHTS
    sha256 = save(target, weights, _header_of(manifest))
    manifest = {
        **manifest,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "size": target.stat().st_size,
        "sha256": sha256,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _header_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the header of the weights repeats of their manifest."""
    later = ("created", "size", "sha256")
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
        _flush(part)
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


def _flush(path: Path) -> None:
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
