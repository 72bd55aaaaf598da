"""A safetensors file out of arrays, hashed while it is written.

`mx.save_safetensors` does neither at once, nor says which file it could not write.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_zoo.hub.reading import Hashing

KINDS = {
    mx.float64: "F64", mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16",
    mx.int64: "I64", mx.int32: "I32", mx.int16: "I16", mx.int8: "I8",
    mx.uint64: "U64", mx.uint32: "U32", mx.uint16: "U16", mx.uint8: "U8", mx.bool_: "BOOL",
}  # fmt: skip
ALIGNMENT = 8  # bytes
FLUSHED = 32 << 20  # bytes that are given to the disk at once


def write_safetensors(
    path: Path, weights: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> str:
    """Write the arrays, the widest types first; returns the sha256 of the file.

    Raises OSError, naming the path.
    """
    weights = dict(sorted(weights.items(), key=lambda item: -item[1].itemsize))  # aligned, all
    try:
        # By Python, with its permissions: MLX's own files are not the group's.
        with path.open("wb", buffering=0) as file, Hashing() as digest, Flushing(file) as disk:
            for data in (_header(weights, metadata), *map(_bytes, weights.values())):
                digest.add(data)
                _write(file, data)
                disk.wrote(len(data))
            return digest.hexdigest()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class Flushing:
    """Has the disk begin before all is written; at the end of this context it is idle again.

    What it could not write is raised there.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._since = file, 0
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Flushing:
        return self

    def wrote(self, size: int) -> None:
        """So many more bytes were written."""
        self._since += size
        if self._since >= FLUSHED and (self._last is None or self._last.done()):
            self._end()
            self._last, self._since = self._thread.submit(os.fsync, self._file.fileno()), 0

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._end()

    def _end(self) -> None:
        if self._last is not None:
            self._last.result()


def _header(weights: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, x in weights.items():
        begin, end = end, end + x.nbytes
        entries[name] = {
            "dtype": KINDS[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(x: mx.array) -> np.ndarray:
    """The bytes of an array, (nbytes,) of uint8; not copied where they lie in its order."""
    x = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x  # NumPy has no such type
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def _write(file: Any, data: Any) -> None:
    data = memoryview(data)
    while data:  # the system writes 2 GiB at most
        data = data[file.write(data) :]
