"""Checkpoint files of any kind, shards and their index. Those with faults are in test_faults.py."""

from __future__ import annotations

import json
from pathlib import Path

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlx_zoo.errors import CheckpointError
from mlx_zoo.hub.checkpoint import check_index, read_state_dict, shard_names

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1, 2], dtype=torch.int64),
    "b.weight": torch.randn(2, 2, 2).to(torch.bfloat16),
    "scale": torch.tensor(0.5, dtype=torch.float16),
}


def write(path: Path, tensors: dict, kind: str) -> Path:
    match kind:
        case "safetensors":
            save_file(tensors, path)
        case "zip":
            torch.save(tensors, path)
        case "stream":
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def bits(array: mx.array | torch.Tensor) -> bytes:
    if isinstance(array, torch.Tensor):
        return array.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


def assert_same(found: dict[str, mx.array], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape)
        assert str(found[name].dtype).split(".")[-1] == str(tensor.dtype).split(".")[-1]
        assert bits(found[name]) == bits(tensor)


KINDS = pytest.mark.parametrize("kind", ["safetensors", "zip", "stream"])


@KINDS
@pytest.mark.parametrize("name", ["blob", "x.safetensors", "x.bin", "x.pth"])
def test_a_file_is_what_its_bytes_say(tmp_path, kind, name):
    assert_same(read_state_dict([write(tmp_path / name, WEIGHTS, kind)]), WEIGHTS)


def test_float64_from_safetensors(tmp_path):
    # mx.load refuses a file with one float64 in it, so such a file takes another way.
    tensors = WEIGHTS | {
        "double": torch.tensor([0.1, 1e300], dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    found = read_state_dict([write(tmp_path / "x.safetensors", tensors, "safetensors")])
    assert_same(
        {n: a for n, a in found.items() if n != "flags"},
        {n: t for n, t in tensors.items() if n != "flags"},
    )
    assert found["flags"].dtype == mx.bool_
    assert found["flags"].tolist() == [True, False]


@KINDS
def test_shards_are_merged(tmp_path, kind):
    names = sorted(WEIGHTS)
    parts = {"1.bin": names[:2], "2.bin": names[2:]}
    for file, part in parts.items():
        write(tmp_path / file, {name: WEIGHTS[name] for name in part}, kind)
    index = write_index(tmp_path, {name: file for file, part in parts.items() for name in part})
    assert shard_names(index) == ("1.bin", "2.bin")
    assert_same(read_state_dict([tmp_path / file for file in parts], index), WEIGHTS)


@KINDS
def test_prefixes_are_stripped_from_all_shards_or_none(tmp_path, kind):
    one, two = torch.ones(1), torch.ones(2)
    first = write(tmp_path / "1", {"module.a": one}, kind)
    second = write(tmp_path / "2", {"module.b": two}, kind)
    other = write(tmp_path / "3", {"b": two}, kind)
    assert_same(read_state_dict([first, second]), {"a": one, "b": two})
    assert_same(read_state_dict([first, other]), {"module.a": one, "b": two})


@KINDS
def test_row_31_a_key_in_two_shards(tmp_path, kind):
    paths = [write(tmp_path / f"{i}.bin", {"a": torch.ones(1)}, kind) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"1\.bin: holds 'a', and so does .*0\.bin"):
        read_state_dict(paths)


def test_a_missing_file_and_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.bin: cannot be read"):
        read_state_dict([tmp_path / "absent.bin"])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state_dict([tmp_path])
    with pytest.raises(ValueError, match="no checkpoint files"):
        read_state_dict([])


# --- The index ------------------------------------------------------------------------------------


def write_index(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1.5e9}, "weight_map": weight_map}))
    return path


def test_row_31_an_index_and_shards_that_disagree(tmp_path):
    index = write_index(tmp_path, {"a": "1.bin", "b": "2.bin"})
    check_index(index, {"1.bin": ["a"], "2.bin": ["b"]})
    for shards, message in (
        ({"1.bin": ["a"]}, r"the shard 2\.bin is missing"),
        ({"1.bin": ["a"], "2.bin": ["b"], "3.bin": ["c"]}, r"does not know the shard 3\.bin"),
        ({"1.bin": [], "2.bin": ["b"]}, r"1\.bin should hold 'a'"),
        ({"1.bin": ["a"], "2.bin": ["b", "c"]}, r"2\.bin holds 'c'"),
        ({"1.bin": ["b"], "2.bin": ["a"]}, r"1\.bin should hold 'a'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_index(index, shards)
