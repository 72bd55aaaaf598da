"""safetensors headers: what the format forbids is refused before MLX sees the file."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import mlx_zoo  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mlx_zoo.errors import CheckpointError, UnsupportedFormat
from mlx_zoo.hub.safetensors_header import ITEM_SIZES, TensorInfo, read_header, strict_json


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pack(header: dict | str | bytes, num_bytes: int = 8, length: int | None = None) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(num_bytes)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    return path


VALID = {
    "plain": pack({"a": entry()}),
    "no tensors": pack({}, 0),
    "metadata": pack({"__metadata__": {"format": "pt"}, "a": entry()}),
    "null metadata": pack({"__metadata__": None, "a": entry()}),
    "padded": pack(json.dumps({"a": entry()}) + "    "),
    "scalar": pack({"a": entry(shape=(), offsets=(0, 4))}, 4),
    "empty tensors": pack(
        {"z": entry(shape=(0, 3), offsets=(8, 8)), "a": entry(), "b": entry("I8", (0,), (0, 0))}
    ),
    "out of order": pack({"b": entry(offsets=(8, 16)), "a": entry()}, 16),
    "unicode": pack({"é\U0001f600": entry()}),
    "rank 32": pack({"a": entry(shape=(1,) * 31 + (2,))}),
}

MALFORMED = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the file": pack({"a": entry()}, length=10_000),
    "header length 2**64 - 1": pack({"a": entry()}, length=2**64 - 1),
    "header length 0": struct.pack("<Q", 0) + b"{}",
    "header over 100 MB": struct.pack("<Q", 100_000_001) + b" " * 100_000_001,
    "not an object": pack("[1]"),
    "leading space": pack(" {}", 0),
    "byte order mark": pack(b"\xef\xbb\xbf{}", 0),
    "not UTF-8": pack(b'{"\xff": 1}'),
    "UTF-16": pack("{}".encode("utf-16-le"), 0),
    "truncated JSON": pack('{"a": {'),
    "trailing garbage": pack('{"a": 1} x'),
    "NaN": pack('{"a": NaN}'),
    "half a surrogate": pack('{"\\ud800": ' + json.dumps(entry()) + "}"),
    "duplicate name": pack('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2)),
    "duplicate field": pack('{"a": {"dtype": "F32", "dtype": "F32", "shape": [2],'
                            ' "data_offsets": [0, 8]}}'),
    "extra field": pack({"a": entry() | {"strides": [1]}}),
    "missing field": pack({"a": {"dtype": "F32", "shape": [2]}}),
    "entry is a list": pack({"a": [1, 2]}),
    "metadata is a list": pack({"__metadata__": [], "a": entry()}),
    "metadata is false": pack({"__metadata__": False, "a": entry()}),
    "metadata of numbers": pack({"__metadata__": {"epoch": 1}, "a": entry()}),
    "unknown dtype": pack({"a": entry("F31")}),
    "dtype is a list": pack({"a": entry(["F32"])}),
    "bool dim": pack({"a": entry(shape=[True, 2])}),
    "float dim": pack({"a": entry(shape=[2.0])}),
    "minus zero": pack('{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}', 0),
    "negative dims": pack({"a": entry(shape=[-1, -2])}),
    "dim of 2**32 + 2": pack({"a": entry(shape=[2**32 + 2])}),
    "no bytes for 2**64 elements": pack({"a": entry(shape=[65536] * 4, offsets=(0, 0))}, 0),
    "zero hides an overflow": pack({"a": entry(shape=[2**31 - 1] * 3 + [0], offsets=(0, 0))}, 0),
    "rank 33": pack({"a": entry(shape=[1] * 32 + [2])}),
    "rank 100,000": pack({"a": entry(shape=[1] * 100_000 + [2])}),
    "shape is a string": pack({"a": entry(shape="2")}),
    "offsets reversed": pack({"a": entry(offsets=(8, 0))}),
    "negative offsets": pack({"a": entry(offsets=(-8, 0))}),
    "offsets that wrap": pack({"a": entry(offsets=(2**64 - 4, 4))}),
    "bool offsets": pack({"a": entry("I8", [1], [False, True])}, 1),
    "three offsets": pack({"a": entry(offsets=(0, 8, 8))}),
    "too few bytes": pack({"a": entry()}, 7),
    "trailing bytes": pack({"a": entry()}, 9),
    "wrong span": pack({"a": entry(shape=[3])}),
    "overlap": pack({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "same bytes": pack({"a": entry(), "b": entry()}),
    "hole": pack({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "hole at the start": pack({"a": entry(offsets=(4, 12))}, 12),
    "giant integer": pack('{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}'
                          % ("9" * 3_000_000)),
    "giant float": pack('{"a": %s}' % ("9" * 3_000_000 + ".5")),
    "deep lists": pack('{"a": ' + "[" * 1_000_000),
    "deep objects": pack('{"a": ' * 500_000),
    "deep dtype": pack('{"a": {"shape": [2], "data_offsets": [0, 8], "dtype": '
                       + "[" * 900 + "]" * 900 + "}}"),
    "million empty objects": pack('{"a": [' + "{}," * 4_000_001 + "{}]}"),
}  # fmt: skip

CHILD = """
import sys, time
from pathlib import Path
from mlx_zoo.errors import CheckpointError
from mlx_zoo.hub.safetensors_header import read_header
start = time.monotonic()
try:
    read_header(Path(sys.argv[1]))
except CheckpointError as error:
    print(type(error).__name__, f"{time.monotonic() - start:.3f}", error)
"""


@pytest.mark.parametrize("name", VALID)
def test_valid_headers_are_read_as_the_library_reads_them(tmp_path, name):
    path = write(tmp_path, VALID[name])
    header = read_header(path)
    with safetensors.safe_open(path, "numpy") as file:
        assert header.metadata == (file.metadata() or {})
        assert set(header.tensors) == set(file.keys())
        for key, info in header.tensors.items():
            assert list(info.shape) == file.get_slice(key).get_shape()
            assert info.dtype == file.get_slice(key).get_dtype()
    arrays = mx.load(str(path))
    assert {k: i.shape for k, i in header.tensors.items()} == {
        k: a.shape for k, a in arrays.items()
    }


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_headers_are_refused(tmp_path, name):
    path = write(tmp_path, MALFORMED[name])
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["deep lists", "deep objects", "deep dtype", "giant integer"])
def test_hostile_headers_do_not_crash_the_process(tmp_path, name):
    path = write(tmp_path, MALFORMED[name])
    root = str(Path(mlx_zoo.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-c", CHILD, path],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=root,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    kind, seconds, _ = child.stdout.split(maxsplit=2)
    assert kind == "CheckpointError"
    assert float(seconds) < 5


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZES))
def test_every_dtype(tmp_path, dtype):
    size = ITEM_SIZES[dtype]
    path = write(tmp_path, pack({"a": entry(dtype, [3], [0, 3 * size])}, 3 * size))
    header = read_header(path)
    assert header.tensors == {"a": TensorInfo(dtype, (3,), (0, 3 * size))}
    assert header.data_start == path.stat().st_size - 3 * size


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "C64"])
def test_a_dtype_that_mlx_lacks_is_named(tmp_path, dtype):
    with pytest.raises(UnsupportedFormat, match=f"'a' has dtype {dtype}"):
        read_header(write(tmp_path, pack({"a": entry(dtype, [8], [0, 8])})))


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: cannot be read"):
        read_header(tmp_path / "absent.safetensors")


def test_what_the_library_writes_is_read(tmp_path):
    arrays = {f"layer{i}.{n}": np.zeros((i, 3), np.float16) for i in range(9) for n in "ab"}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    header = read_header(path)
    assert header.metadata == {"format": "np"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: array.shape for name, array in arrays.items()
    }


def test_thousands_of_tensors_are_fast(tmp_path):
    header = {f"layers.{i}.weight": entry(offsets=(8 * i, 8 * i + 8)) for i in range(20_000)}
    path = write(tmp_path, pack(header, 160_000))
    start = time.monotonic()
    assert len(read_header(path).tensors) == 20_000
    assert time.monotonic() - start < 2


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to three edits of the header: bytes, digits, JSON values; its length is then repaired."""
    size = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + size].decode(), data[8 + size :]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        new = rng.choice(
            [*'0123456789-.,:{}[]" eE', "F16", "BOOL", "null", "true", "1e3", "\\u0041", "[0,8]"]
        )
        match rng.randrange(4):
            case 0:
                text = text[:at] + new + text[at + 1 :]
            case 1:
                text = text[:at] + new + text[at:]
            case 2:
                text = text[:at] + text[at + 1 :] or "{"
            case 3:
                old = rng.choice(["F32", "[2]", "[0, 8]", '"a"', "dtype", "shape", "8", "0"])
                text = text.replace(old, new, 1)
    body = body[: rng.randrange(len(body) + 1)] if rng.random() < 0.1 else body
    return pack(text, 0) + body


def test_fuzz_accepts_nothing_that_the_library_refuses(tmp_path):
    rng = random.Random(0)
    accepted = 0
    for _ in range(2000):
        data = mutate(rng, VALID[rng.choice(sorted(set(VALID) - {"no tensors"}))])
        path = write(tmp_path, data)
        try:
            header = read_header(path)
        except CheckpointError:
            continue
        accepted += 1
        tensors = {i["name"]: i for i in parse(data)}
        assert set(tensors) == set(header.tensors)
        for name, info in header.tensors.items():
            assert tensors[name]["shape"] == list(info.shape)
    assert accepted > 50


def parse(data: bytes) -> list[dict]:
    return [{"name": name, **info} for name, info in safetensors.deserialize(data)]


def test_strict_json_reads_ordinary_json():
    text = {"a": [1, -2, 0.5, None, True], "b": {"c": "é"}}
    assert strict_json(json.dumps(text).encode()) == text
