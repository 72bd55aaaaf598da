"""The sha256 of large local files that were hashed, in `<cache>/seen/<16 digits of the path>.json`.

A file is taken for unchanged while it is the same one, of the same size and last change (which
nobody can set back). As a clock may tick slowly, that change must have been some time ago when the
file was hashed. It saves hashing, so a record that cannot be read or written is no error.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path

LARGE = 16 << 20  # bytes; to hash less takes no time
SETTLED = 2.0  # seconds: the slowest clock of a file system that is in use

State = tuple[int, ...]


def known_sha256(root: Path, path: Path, state: State | None) -> str | None:
    """The sha256 that the file at `path`, in this state, was found to have."""
    try:
        record = json.loads(_record(root, path).read_text(encoding="utf-8"))
        if record["path"] == str(path) and state is not None and record["state"] == [*state]:
            sha256 = record["sha256"]
            return sha256 if isinstance(sha256, str) and len(sha256) == 64 else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        pass
    return None


def remember(root: Path, path: Path, state: State | None, since: float, sha256: str) -> None:
    """Record the sha256 of a large file that was in this state when hashing began, at `since`."""
    if state is None or os.name == "nt":  # where the last change of a file is not known
        return
    *_, size, changed = state
    if size < LARGE or since - changed / 1e9 < SETTLED:
        return
    target = _record(root, path)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    text = json.dumps({"path": str(path), "state": state, "sha256": sha256})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except OSError:
        with suppress(OSError):
            part.unlink()


def _record(root: Path, path: Path) -> Path:
    digits = hashlib.sha256(str(path).encode(errors="surrogateescape")).hexdigest()[:16]
    return root / "seen" / f"{digits}.json"
