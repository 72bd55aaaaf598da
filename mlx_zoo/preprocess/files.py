"""JSON files out of a repository or folder, which anyone may have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_zoo.errors import CheckpointError

MAX_JSON = 64 << 20  # bytes; the largest that are known, of 20,000 labels, have two million


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds, which is a `kind`: dict or list.

    Raises CheckpointError, naming the file, where it cannot be read, is too large, is not JSON, or
    holds something else.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"{path} has more than {MAX_JSON} bytes, too many for a JSON file")
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # bad UTF-8 and giant numbers included
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} holds a {type(value).__name__} instead of a {kind.__name__}")
    return value


def read_optional_json(files: Mapping[str, Path], name: str, kind: type = dict) -> Any:
    """`read_json` of the file that has that name in its repository; an empty `kind` without it."""
    return read_json(files[name], kind) if name in files else kind()
