"""Converted weights on disk: keyed by what they were made from, stamped, hashed, atomic.

    <root>/weights/<name>-<first 16 digits of the key>/
        model.safetensors    the parameters, in MLX's layout
        manifest.json        what the key was made of; source, revision, hashes, versions
        verification.json    the latest verification, once there is one

An entry appears by one rename of its folder, so a conversion that is killed leaves nothing that a
later run could take for whole. Its hash is checked before it is trusted. An attacker who can
rewrite both files with the user's rights is out of scope.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
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
from mlx_zoo.hub.safetensors_header import read_header

log = logging.getLogger("mlx_zoo")

FORMAT = 1  # of an entry; raised whenever a conversion yields other bytes for the same spec
WEIGHTS, MANIFEST, VERIFICATION = "model.safetensors", "manifest.json", "verification.json"
STALE = 24 * 3600  # seconds after which a working folder belongs to a process that was killed


@dataclass(frozen=True)
class Entry:
    """One converted checkpoint in the cache."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def verification(self) -> Mapping[str, Any] | None:
        """The latest verification of these weights, if any."""
        try:
            found = json.loads((self.path / VERIFICATION).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.iterdir())


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


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def find(root: Path, name: str, key: str) -> Entry | None:
    """The whole and unchanged entry of that key, or None. A damaged one is set aside."""
    path = _folder(root, name, key)
    if not path.is_dir():
        return None
    try:
        entry = read_entry(path)
        if entry.manifest.get("key") != key:
            raise MLXZooError("the manifest belongs to another conversion")
        check(entry)
    except (OSError, ValueError, MLXZooError) as error:
        quarantine(root, path, error)
        return None
    return entry


def read_entry(path: Path) -> Entry:
    """The entry in a folder, its manifest read, its weights not yet checked."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("the manifest is not an object")
    return Entry(path, manifest)


def check(entry: Entry) -> None:
    """Raise unless weights and manifest are those that were written.

    The manifest has the hash of the weights; their header repeats what the manifest says.
    """
    size = entry.weights.stat().st_size
    if size != entry.manifest.get("size"):
        raise MLXZooError(f"{WEIGHTS} has {size} bytes, {entry.manifest.get('size')} were written")
    if sha256_of(entry.weights) != entry.manifest.get("sha256"):
        raise MLXZooError(f"{WEIGHTS} does not have the sha256 that was written")
    if read_header(entry.weights).metadata != _header_of(entry.manifest):
        raise MLXZooError(f"{MANIFEST} does not say what the header of {WEIGHTS} says")


def read_weights(entry: Entry) -> dict[str, mx.array]:
    """The parameters of an entry. They are read from the file when they are evaluated.

    Raises OSError where the file is gone; once opened, it may go.
    """
    try:
        weights = mx.load(str(entry.weights))
    except RuntimeError as error:
        raise OSError(f"{entry.weights}: {error}") from error
    assert isinstance(weights, dict)
    return weights


def store(
    root: Path, name: str, key: str, weights: Mapping[str, mx.array], manifest: Mapping[str, Any]
) -> Entry:
    """Write an entry. Where another process was faster, its entry is returned.

    Raises OSError where the disk is full or cannot be written; nothing is left behind then.
    """
    path = _folder(root, name, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    work = working_folder(path.parent)
    try:
        manifest = write_folder(work, weights, {"key": key, **manifest})
        for file in work.iterdir():
            _flush(file)
        try:
            work.rename(path)
        except OSError:
            if other := find(root, name, key):
                return other
            raise
        _flush(path.parent)
        return Entry(path, manifest)
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
    save(target, weights, _header_of(manifest))
    manifest = {
        **manifest,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "size": target.stat().st_size,
        "sha256": sha256_of(target),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _header_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the header of the weights repeats of their manifest."""
    later = ("created", "size", "sha256")
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in manifest.items()}
    return {"layout": "mlx", **{k: text for k, text in texts.items() if k not in later}}


def save(path: Path, weights: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Raises OSError with the path where the disk is full."""
    path.touch()  # by Python, as the umask says: MLX's own files are not the group's
    try:
        mx.save_safetensors(str(path), dict(weights), metadata=dict(metadata))
    except RuntimeError as error:
        raise OSError(f"{path}: {error}") from error


def stamp(entry: Entry, verification: Mapping[str, Any]) -> None:
    """Keep the result of a verification beside the weights it speaks of."""
    text = json.dumps({"sha256": entry.manifest["sha256"], **verification}, indent=2) + "\n"
    work = entry.path / f".{VERIFICATION}-{os.getpid()}"
    work.write_text(text, encoding="utf-8")
    work.replace(entry.path / VERIFICATION)


def entries(root: Path) -> Iterator[Entry]:
    """Every entry that has a manifest, by name; the weights are not checked."""
    for path in sorted((root / "weights").glob("*/")):
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            continue
        try:
            yield read_entry(path)
        except (OSError, ValueError):
            log.warning("%s: the manifest cannot be read; `mlx-zoo cache prune` removes it", path)


def prune(root: Path, keep_days: float | None = None) -> list[Path]:
    """Remove what was set aside, unfinished or unreadable; with `keep_days`, older entries too."""
    now = time.time()
    removed = []
    for path in [*(root / "quarantine").glob("*/"), *(root / "weights").glob("*/")]:
        unfinished = path.name.startswith(".partial-")
        if path.parent.name == "quarantine" or not _is_readable(path):
            old = not unfinished or now - path.stat().st_mtime > STALE
        else:
            old = keep_days is not None and now - path.stat().st_mtime > keep_days * 24 * 3600
        if old:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


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
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)[-80:]
    return root / "weights" / f"{plain.lstrip('.')}-{key[:16]}"


def quarantine(root: Path, path: Path, error: Exception) -> None:
    """Set a damaged entry aside, with a warning in the log."""
    aside = root / "quarantine" / f"{path.name}-{time.time_ns()}"
    log.warning("%s is damaged (%s); it is set aside and converted again", path, error)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
    except OSError as failure:
        log.warning("%s cannot be set aside: %s", path, failure)


def _sweep(folder: Path) -> None:
    """Remove the working folders of conversions that were killed long ago."""
    for path in folder.glob(".partial-*"):
        try:
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue


def _flush(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows has no descriptors of folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
