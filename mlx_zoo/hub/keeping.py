"""Where files are kept, and what becomes of them where the cache cannot be written.

A cache that is read-only is read. What it lacks goes to a folder that ends with this process.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger("mlx_zoo")

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_instead: dict[Path, Path] = {}  # folder that cannot be written -> the one that is used
_warned: set[Path] = set()


def places_of(folder: Path) -> list[Path]:
    """Where files of `folder` may be: there, and where this process had to put them instead."""
    return [folder, *(other for kept, other in _instead.items() if kept == folder)]


def writable(folder: Path) -> Path:
    """`folder`, made where need be; a temporary one where it cannot be written.

    Raises OSError where the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions alone would not tell of every case
            return folder
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        other = _instead.get(folder) or _temporary()
        log.info("%s; %s is used until this process ends", error, other)
        _instead[folder] = other
        return other


def _temporary() -> Path:
    made = tempfile.mkdtemp(prefix="mlx_zoo-")
    atexit.register(_remove, made, os.getpid())
    return Path(made)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a fork still ends with its parent's list of things to do
        shutil.rmtree(folder, ignore_errors=True)


def cannot_keep(root: Path, error: OSError) -> None:
    """Log that a cache takes nothing new: as a warning the first time, then as a note."""
    level = logging.INFO if root in _warned else logging.WARNING
    _warned.add(root)
    log.log(level, "new files cannot be kept in %s: %s", root, error)
