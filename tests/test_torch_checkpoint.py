"""PyTorch checkpoints without torch: exact values. Hostile ones are in test_faults.py."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import hostile
import mlx.core as mx
import numpy as np
import pytest
import torch
from hostile import GOOD, LIVE, ORDERED_DICT, archives, encode, stream, zipped
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_zoo.errors import CheckpointError, IntegrityError, UnsafeCheckpoint, UnsupportedFormat
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.hub.torch_checkpoint import (
    looks_like,
    read_tensors,
    strip_prefixes,
    unwrap,
)

DTYPES = {
    torch.float64: mx.float64,
    torch.float32: mx.float32,
    torch.float16: mx.float16,
    torch.bfloat16: mx.bfloat16,
    torch.int64: mx.int64,
    torch.int32: mx.int32,
    torch.int16: mx.int16,
    torch.int8: mx.int8,
    torch.uint8: mx.uint8,
    torch.bool: mx.bool_,
}


def bits(array: mx.array | torch.Tensor) -> bytes:
    if isinstance(array, torch.Tensor):
        array = array.detach().contiguous()
        return (
            (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy().tobytes()
        )
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


def assert_same(array: mx.array, tensor: torch.Tensor) -> None:
    assert array.dtype == DTYPES[tensor.dtype]
    assert array.shape == tuple(tensor.shape)
    assert bits(array) == bits(tensor)


def save(value: object, path: Path, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])


# --- Values ---------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_dtype_bit_for_bit(tmp_path, zipped, protocol):
    # Every byte pattern that has a meaning, so NaN payloads, infinities and denormals too.
    raw = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    tensors = {str(d): raw.clone().view(d) for d in DTYPES if d != torch.bool}
    tensors["bool"] = raw % 3 == 0
    found = read_tensors(save(tensors, tmp_path / "x.pth", zipped, protocol))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


@FORMATS
def test_float64_keeps_its_digits(tmp_path, zipped):
    found = read_tensors(save({"a": torch.tensor([0.1, 1e300])}, tmp_path / "x.pth", zipped))
    assert found["a"].dtype == mx.float32
    tensor = torch.tensor([0.1, 1e300, 1 + 2**-52], dtype=torch.float64)
    found = read_tensors(save({"a": tensor}, tmp_path / "x.pth", zipped))
    assert np.array(found["a"]).tolist() == [0.1, 1e300, 1 + 2**-52]


@FORMATS
def test_views_of_storages(tmp_path, zipped):
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.transpose(1, 3),
        "channels_last": base.clone().to(memory_format=torch.channels_last),
        "strided": base[:, ::2, 1:3, ::3],
        "expanded": torch.tensor([1.0, 2.0]).reshape(2, 1).expand(2, 7),
        "offset": base.flatten()[100:],
        "overlapping": torch.arange(9.0).unfold(0, 4, 2),
        "scalar": torch.tensor(3),
        "element": base[1, 2, 3, 4],
        "empty": torch.zeros(0, 5),
        "empty view": base[2:],
        "empty view beyond the end": base[2:, 2:],
        "diagonal": base[0, 0].diagonal(),
    }
    found = read_tensors(save(tensors, tmp_path / "x.pth", zipped))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    assert found["base"] is found["tied"]
    assert found["base"] is not found["transposed"]


@FORMATS
def test_a_module(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).half()
    found = read_tensors(save(module.state_dict(), tmp_path / "x.pth", zipped))
    expected = module.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_same(found[name], tensor)
    named = OrderedDict(module.named_parameters())  # Parameter objects, not their data
    assert set(read_tensors(save(named, tmp_path / "x.pth", zipped))) == set(named)


def tensors_of(shapes: st.SearchStrategy) -> st.SearchStrategy:
    @st.composite
    def build(draw):
        dtype, shape = draw(st.sampled_from(list(DTYPES))), draw(shapes)
        seed = draw(st.integers(0, 2**16))
        size = int(np.prod([n + 2 for n in shape], dtype=int)) * 8
        raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        storage = torch.from_numpy(raw % 2 if dtype == torch.bool else raw).view(dtype)
        tensor = storage[: int(np.prod([n + 2 for n in shape], dtype=int))]
        tensor = tensor.reshape([n + 2 for n in shape])
        for axis, n in enumerate(shape):  # a strided, offset view of that shape
            step = draw(st.integers(1, 2)) if n <= 2 else 1
            start = draw(st.integers(0, max(0, n + 2 - n * step)))
            tensor = tensor.transpose(0, axis)[start : start + n * step : step].transpose(0, axis)
        return tensor.permute(draw(st.permutations(range(len(shape)))))

    return build()


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1).filter(
            lambda name: name != "_metadata" and not name.startswith(("module.", "_orig_mod."))
        ),
        tensors_of(st.lists(st.integers(0, 4), max_size=4)),
        min_size=1,
        max_size=4,
    ),
    zipped=st.booleans(),
    data=st.data(),
)
def test_round_trips(tmp_path_factory, tensors, zipped, data):
    tied = data.draw(st.sampled_from(sorted(tensors)))
    tensors["the same again"] = tensors[tied]
    found = read_tensors(save(tensors, tmp_path_factory.getbasetemp() / "x.pth", zipped))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    assert found["the same again"] is found[tied]


# --- State dicts ----------------------------------------------------------------------------------


@FORMATS
def test_a_training_checkpoint(tmp_path, zipped):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3, "loss": 0.5, "name": "linear", "flags": [True, None, (1, 2.5)], "big": 2**100,
        "best": torch.tensor(0.1), "optimizer": optimizer.state_dict(),
        "state_dict": {f"module.{n}": t for n, t in module.state_dict().items()},
    }  # fmt: skip
    found = read_state_dict([save(checkpoint, tmp_path / "x.pth", zipped)])
    assert list(found) == ["weight", "bias"]
    assert_same(found["weight"], module.weight)


def test_tensors_outside_the_state_dict_are_not_read(tmp_path):
    path = save({"model": {"a": torch.ones(2)}, "z": torch.ones(999)}, tmp_path / "x.pth")
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(999).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(data)
    assert list(read_tensors(path)) == ["a"]


def test_unwrap_prefers_by_the_documented_order():
    a, b = mx.array(1.0), mx.array(2.0)
    assert unwrap({"a": a}) == {"a": a}
    for key in ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema"):
        assert unwrap({"epoch": 1, key: {"a": a}}) == {"a": a}
    assert unwrap({"state_dict_ema": {"a": b}, "model": {"a": a}})["a"] is a
    assert unwrap({"model": {"a": b}, "state_dict": {"a": a}})["a"] is a
    assert unwrap({"model": {}, "state_dict_ema": {"a": a}})["a"] is a
    assert unwrap({"model": a}) == {"model": a}
    assert unwrap({"a": a, "_metadata": {"version": 1}}) == {"a": a}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1], "holds a list"),
        ({}, "no tensors"),
        ({"net": {"a": mx.array(1)}, "epoch": 1}, "it holds 'net', 'epoch'"),
        ({"a": mx.array(1), "epoch": 1}, r"1 entries .* no tensors: 'epoch' \(an int\)"),
        ({3: mx.array(1)}, "something other than a string: 3"),
    ],
)
def test_unwrap_refuses(tree, message):
    with pytest.raises(CheckpointError, match=message):
        unwrap(tree)


def test_strip_prefixes():
    assert strip_prefixes({"module.a": 1, "module.b": 2}) == {"a": 1, "b": 2}
    assert strip_prefixes({"module._orig_mod.module.a": 1}) == {"a": 1}
    assert strip_prefixes({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
    assert strip_prefixes({"module.": 1}) == {"module.": 1}
    assert strip_prefixes({}) == {}


# --- Files of another kind ------------------------------------------------------------------------


def test_looks_like():
    assert looks_like(b"\n\n <HTML>") == "an HTML page: an error or login page, perhaps"
    assert looks_like(b"PK\x03\x04") == "a zip archive"
    assert looks_like(b"\x80\x02}q\0.") == "a pickle"


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.pth: cannot be read"):
        read_tensors(tmp_path / "x.pth")


def test_what_python_2_wrote(tmp_path):
    """OrderedDict from a list of pairs, and names as SHORT_BINSTRING."""
    name = b"U\x01a"
    value = encode(ORDERED_DICT) + b"](](" + name + encode(hostile.tensor()) + b"ee\x85R"
    (tmp_path / "x.pth").write_bytes(zipped(b"\x80\x02" + value + b"."))
    assert list(read_tensors(tmp_path / "x.pth")) == ["a"]


def test_errors_are_of_the_right_kind(tmp_path):
    """All that is refused, and for what, the rows 32 to 37 of test_faults.py say."""

    def refusal(data: bytes) -> type:
        (tmp_path / "x.pth").write_bytes(data)
        with pytest.raises((CheckpointError, IntegrityError), match=r"x\.pth: ") as caught:
            read_tensors(tmp_path / "x.pth")
        return caught.type

    gadget = b"\x80\x02" + LIVE["GLOBAL"] + b"."
    assert refusal(zipped(gadget)) is refusal(stream(gadget)) is refusal(gadget) is UnsafeCheckpoint
    assert refusal(archives()["wrong CRC"][0]) is IntegrityError
    assert refusal(zipped(GOOD, byteorder=b"big")) is UnsupportedFormat
    assert refusal(stream(GOOD)[:-1]) is CheckpointError
    assert refusal(b"\x02\0\0\0\0\0\0\0{}") is CheckpointError  # safetensors
