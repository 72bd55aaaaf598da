"""The header of a safetensors file, validated in full.

`mx.load` trusts the header: overlapping offsets, negative dims or a rank of 100,000 load and then
crash the process on first use. So nothing reaches it before `read_header` has accepted the file.

Format: https://github.com/huggingface/safetensors#format. What that library rejects is rejected
here; so are unknown keys in an entry, and dims that MLX's 32-bit shapes cannot hold.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_zoo.errors import CheckpointError, UnsupportedFormat

ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# Known to the format, unknown to MLX (which would read some of them as uint8).
UNSUPPORTED = {
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "F6_E2M3", "F6_E3M2", "F4", "C64",
}  # fmt: skip

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_ITEMS = 4_000_000  # commas in a JSON text: bounds the objects that parsing it can make
MAX_DIGITS = 40  # of a JSON number
MAX_DIM = 2**31
MAX_RANK = 32


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's entry. `offsets` are (begin, end) in bytes, counted from `Header.data_start`."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself: its tensors in the order of their bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and validate the header of the safetensors file at `path`; no tensor is read.

    Raises CheckpointError where the header is malformed or disagrees with the size of the file,
    and UnsupportedFormat for an element type that MLX does not have.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"the header should have {length} bytes, the file has {size}")
            if length > MAX_HEADER:
                raise CheckpointError(f"a header of {length} bytes; at most {MAX_HEADER} are read")
            return _parse(file.read(length), size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        raise type(error)(f"{path}: not a valid safetensors file: {error}") from error


def strict_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON from an untrusted file: no duplicate keys, no NaN, no giant numbers.

    Raises CheckpointError; never RecursionError, and never in more than a few seconds.
    """
    if raw.count(b",") > MAX_ITEMS:
        raise CheckpointError(f"JSON of more than {MAX_ITEMS} items")
    try:
        return json.loads(
            raw.decode(),
            object_pairs_hook=_object,
            parse_int=lambda text: _number(text, int),
            parse_float=lambda text: _number(text, float),
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError included
        raise CheckpointError(f"malformed JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise CheckpointError(f"key {twice[:100]!r} occurs twice")
    return found


def _number(text: str, kind: type) -> int | float:
    if len(text) > MAX_DIGITS:
        raise CheckpointError(f"a number of {len(text)} digits")
    return -0.0 if text == "-0" else kind(text)  # JSON's -0 is not an integer


def _refuse_constant(text: str) -> None:
    raise CheckpointError(f"{text} is not JSON")


def _parse(raw: bytes, file_size: int) -> Header:
    if not raw.startswith(b"{"):
        raise CheckpointError("the header does not start with '{'")
    entries = strict_json(raw)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # `null` is legal: MLX itself writes it
        metadata = {}
    _check_metadata(metadata)
    _check_encodable("".join(entries))

    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].offsets))
    _check_offsets(tensors, file_size - 8 - len(raw))
    return Header(tensors, metadata, data_start=8 + len(raw))


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ should map strings to strings")
    _check_encodable("".join(metadata) + "".join(metadata.values()))


def _check_encodable(text: str) -> None:
    # "\ud800" is accepted by Python's JSON parser, but it is not Unicode: printing it would fail.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError("a name with half of a surrogate pair") from error


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name[:100]!r} should have dtype, shape and data_offsets, no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]

    if not isinstance(dtype, str):
        raise CheckpointError(f"{name[:100]!r}: dtype should be a string")
    if dtype in UNSUPPORTED:
        raise UnsupportedFormat(
            f"{name[:100]!r} has dtype {dtype}, which MLX does not have; "
            "convert it in torch (`tensor.float()`) and save again"
        )
    if dtype not in ITEM_SIZES:
        raise CheckpointError(f"{name[:100]!r} has the unknown dtype {dtype[:100]!r}")
    # `type(...) is int`, because True is an int to isinstance.
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < MAX_DIM for n in shape):
        raise CheckpointError(f"{name[:100]!r}: dims should be integers from 0 to 2**31 - 1")
    if len(shape) > MAX_RANK:
        raise CheckpointError(f"{name[:100]!r} has rank {len(shape)}; at most {MAX_RANK} is read")
    # A zero among huge dims hides an overflow of the strides: it is left out of this product.
    if math.prod(n or 1 for n in shape) * ITEM_SIZES[dtype] >= 2**63:
        raise CheckpointError(f"{name[:100]!r}: shape {shape} overflows")
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise CheckpointError(f"{name[:100]!r}: data_offsets should be two integers")

    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise CheckpointError(
            f"{name[:100]!r}: {dtype} of shape {shape} does not take {end - begin} bytes"
        )
    return TensorInfo(dtype, tuple(shape), (begin, end))


def _check_offsets(tensors: dict[str, TensorInfo], num_bytes: int) -> None:
    """The tensors, sorted by offset, cover the data exactly: no hole, overlap or trailing byte."""
    position = 0
    for name, info in tensors.items():
        if info.offsets[0] != position:
            kind = "overlaps the one before" if info.offsets[0] < position else "leaves a hole"
            raise CheckpointError(f"{name[:100]!r} {kind}: {info.offsets}, expected {position}")
        position = info.offsets[1]
    if position != num_bytes:
        raise CheckpointError(f"the tensors take {position} bytes, the file has {num_bytes}")
