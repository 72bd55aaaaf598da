"""Checkpoint files of any kind, as one state dict.

A file is what its bytes say, never what its name says: a hub's blob has no suffix, and an error
page may be called `model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_zoo.errors import CheckpointError, UnsafeCheckpoint
from mlx_zoo.hub.reading import Hashing, read_bytes
from mlx_zoo.hub.safetensors_header import Header, TensorInfo, read_header, strict_json
from mlx_zoo.hub.torch_checkpoint import (
    SAFETENSORS,
    looks_like,
    other_kind,
    read_tensors,
    strip_prefixes,
)

MAX_INDEX = 64 << 20  # bytes
BLOCK = 4 << 20  # bytes that are read at once: small tensors together
ROOM = 16 << 20  # bytes of memory that are used again for the next block
SHARD_SUFFIXES = (".safetensors", ".bin")

NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def read_state_dict(paths: Sequence[Path], index: Path | None = None) -> dict[str, mx.array]:
    """Read one state dict from its file or its shards: names to arrays, bit for bit.

    Nested training checkpoints are unwrapped and prefixes that every name has are stripped
    (`torch_checkpoint.unwrap`, `strip_prefixes`). With `index`, the shards must hold exactly what
    the index says.

    Raises CheckpointError, or one of its kinds, or IntegrityError, naming the file.
    """
    if not paths:
        raise ValueError("no checkpoint files given")
    merged: dict[str, mx.array] = {}
    owner: dict[str, Path] = {}
    names_by_file: dict[str, list[str]] = {}
    for path in paths:
        tensors = _read_file(path)
        twice = [name for name in tensors if name in owner]
        if twice:
            raise CheckpointError(f"{path}: holds {_some(twice)}, and so does {owner[twice[0]]}")
        merged.update(tensors)
        owner.update(dict.fromkeys(tensors, path))
        names_by_file[path.name] = list(tensors)
    if index is not None:
        check_index(index, names_by_file)
    return strip_prefixes(merged)  # of all shards together: one alone may share more by chance


def shard_names(index: Path) -> tuple[str, ...]:
    """The file names in a `*.index.json`, sorted; each is a plain name beside the index.

    Raises UnsafeCheckpoint for a name that is a path, CheckpointError for a malformed index.
    """
    return tuple(sorted(set(_weight_map(index).values())))


def check_index(index: Path, names_by_file: Mapping[str, Collection[str]]) -> None:
    """Raise CheckpointError, naming the file, unless each shard holds what the index says.

    `names_by_file` has the names of the tensors found in each shard, by the shard's file name.
    """
    expected: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        expected.setdefault(file, set()).add(name)
    for file in sorted(expected.keys() | names_by_file.keys()):
        if file not in names_by_file:
            raise CheckpointError(f"{index}: the shard {file} is missing")
        if file not in expected:
            raise CheckpointError(f"{index}: does not know the shard {file}")
        found = set(names_by_file[file])
        if missing := expected[file] - found:
            raise CheckpointError(f"{index}: {file} should hold {_some(missing)} but does not")
        if surplus := found - expected[file]:
            raise CheckpointError(f"{index}: {file} holds {_some(surplus)}, unknown to the index")


def is_safetensors(path: Path) -> bool:
    """By its first bytes, whatever its name."""
    return looks_like(_read(path, 512)) == SAFETENSORS


def _read_file(path: Path) -> dict[str, mx.array]:
    kind = looks_like(_read(path, 512))
    if kind == SAFETENSORS:
        return read_safetensors(path, read_header(path))
    if kind in ("a zip archive", "a pickle", "a tar archive"):
        return read_tensors(path)
    error = other_kind(kind)
    raise type(error)(f"{path}: {error}")


def read_safetensors(
    path: Path, header: Header, digest: Hashing | None = None
) -> dict[str, mx.array]:
    """The tensors of a file, in memory, in their own types; `digest` gets all bytes of the file.

    Not by mx.load: it reads when an array is evaluated, and where the file is shorter by then, what
    is evaluated after it fails too, or waits for ever. Raises CheckpointError.
    """
    tensors = {}
    try:
        with path.open("rb", buffering=0) as file:
            if digest:
                digest.add(read_bytes(file, header.data_start))
            file.seek(header.data_start)
            blocks = list(_blocks(header))
            largest = max((_span(block)[1] for block in blocks), default=0)
            # One is read into while the other is hashed; to take new memory takes as long.
            rooms = [np.empty(min(largest, ROOM), np.uint8) for _ in range(2 if digest else 1)]
            for i, block in enumerate(blocks):
                start, size = _span(block)
                if digest:
                    digest.wait(1)
                data = read_bytes(file, size, rooms[i % len(rooms)] if size <= ROOM else None)
                if digest:
                    digest.add(data)
                for name, info in block:
                    begin, end = info.offsets
                    tensors[name] = _to_array(data[begin - start : end - start], info)
    except (EOFError, OSError, ValueError) as error:  # it changed since its header was read
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return tensors


def _blocks(header: Header) -> Iterator[list[tuple[str, TensorInfo]]]:
    """The tensors in the order of their bytes, as many at a time as are read at once."""
    block: list[tuple[str, TensorInfo]] = []
    for item in header.tensors.items():
        block.append(item)
        if item[1].offsets[1] - block[0][1].offsets[0] >= BLOCK:
            yield block
            block = []
    if block:
        yield block


def _span(block: list[tuple[str, TensorInfo]]) -> tuple[int, int]:
    """Where a block starts, and its bytes."""
    start, (_, end) = block[0][1].offsets[0], block[-1][1].offsets
    return start, end - start


def _to_array(data: np.ndarray, info: TensorInfo) -> mx.array:
    """The bytes of one tensor, copied into an array of its own."""
    dtype = np.dtype(NUMPY_DTYPES[info.dtype])
    if data.ctypes.data % dtype.itemsize:  # the format does not align them
        data = data.copy()
    kind = mx.float64 if info.dtype == "F64" else None  # float32 unless told
    array = mx.array(data.view(dtype).reshape(info.shape), dtype=kind)
    return array.view(mx.bfloat16) if info.dtype == "BF16" else array


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map of tensor names to file names, validated."""
    raw = _read(index, MAX_INDEX + 1)
    if len(raw) > MAX_INDEX:
        raise CheckpointError(f"{index}: more than {MAX_INDEX} bytes for an index")
    try:
        content = strict_json(raw)
    except CheckpointError as error:
        kind = looks_like(raw[:512])
        raise CheckpointError(f"{index}: {error} (it looks like {kind})") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensors to files")
    for file in weight_map.values():
        _check_shard_name(index, file)
    return weight_map


def _check_shard_name(index: Path, file: object) -> None:
    if not isinstance(file, str):
        raise CheckpointError(f"{index}: a file name in weight_map is not a string")
    # On the text, before any path is made of it; a colon is a drive or a stream on Windows.
    if any(part in file for part in ("/", "\\", "..", ":")) or not file.isprintable():
        raise UnsafeCheckpoint(f"{index}: the shard name {file[:100]!r} is not a plain file name")
    if not file.endswith(SHARD_SUFFIXES) or file in SHARD_SUFFIXES:
        raise UnsafeCheckpoint(
            f"{index}: the shard name {file[:100]!r} does not end in {' or '.join(SHARD_SUFFIXES)}"
        )


def _read(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _some(names: Collection[str]) -> str:
    shown = [repr(name[:100]) for name in sorted(names)]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
