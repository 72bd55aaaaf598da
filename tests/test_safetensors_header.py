"""safetensors headers, read as the library reads them. Malformed ones are in test_faults.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hostile import entry, pack

from mlx_zoo.errors import CheckpointError, UnsupportedFormat
from mlx_zoo.hub.safetensors_header import ITEM_SIZES, TensorInfo, read_header, strict_json


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


def test_strict_json_reads_ordinary_json():
    text = {"a": [1, -2, 0.5, None, True], "b": {"c": "é"}}
    assert strict_json(json.dumps(text).encode()) == text
