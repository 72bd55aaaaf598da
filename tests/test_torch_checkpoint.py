"""PyTorch checkpoints without torch: exact values, and nothing that a hostile file asks for."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import mlx_zoo  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
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


def tar_era() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("net/data.pkl", b"N.")
        archive.writestr("net/constants.pkl", b"N.")
        archive.writestr("net/code/__torch__.py", b"x" * 99, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


OTHERS = {
    "html": (b"<!DOCTYPE html><html>", CheckpointError, "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", CheckpointError, "git-lfs pointer"),
    "empty": (b"", CheckpointError, "an empty file"),
    "json": (b'{"error": "not found"}', CheckpointError, "JSON"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), CheckpointError, "gzip"),
    "safetensors": (b"\x02\0\0\0\0\0\0\0{}", CheckpointError, "a safetensors file"),
    "noise": (b"\xde\xad\xbe\xef" * 9, CheckpointError, "starts with"),
    "tar": (tar_era(), UnsupportedFormat, "tar archive.*save_file"),
    "torchscript": (torchscript(), UnsupportedFormat, "TorchScript.*save_file"),
    "plain pickle": (pickle.dumps({"a": 1}), UnsupportedFormat, "not one that torch.save wrote"),
    "plain pickle 0": (pickle.dumps([1], 0), UnsupportedFormat, "not one that torch.save wrote"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_another_kind_are_named(tmp_path, name):
    data, kind, message = OTHERS[name]
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    with pytest.raises(kind, match=message):
        read_tensors(path)


def test_looks_like():
    assert looks_like(b"\n\n <HTML>") == "an HTML page: an error or login page, perhaps"
    assert looks_like(b"PK\x03\x04") == "a zip archive"
    assert looks_like(b"\x80\x02}q\0.") == "a pickle"


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.pth: cannot be read"):
        read_tensors(tmp_path / "x.pth")


# --- Making hostile files -------------------------------------------------------------------------


class Global(str):
    """`module name`, for `encode`."""


class Call(tuple):
    """`(Global, argument, ...)`, for `encode`."""


class Stored(tuple):
    """A persistent id, for `encode`."""


def encode(value: object) -> bytes:
    """A pickle of protocol 2 without its STOP, of what pickle itself would refuse to write."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case Global():
            return b"c" + value.replace(" ", "\n").encode() + b"\n"
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case Call():
            return encode(value[0]) + encode(tuple(value[1:])) + b"R"
        case Stored():
            return encode(tuple(value)) + b"Q"
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
        case bytes():
            return value  # opcodes, as they are


ORDERED_DICT = Global("collections OrderedDict")


def stored(key="0", dtype="FloatStorage", size=4) -> Stored:
    return Stored(("storage", Global(f"torch {dtype}"), key, "cpu", size))


def tensor(storage=None, offset=0, shape=(4,), stride=(1,), grad=False, hooks=None) -> Call:
    storage = stored() if storage is None else storage
    hooks = Call((ORDERED_DICT,)) if hooks is None else hooks
    rebuild = Global("torch._utils _rebuild_tensor_v2")
    return Call((rebuild, storage, offset, shape, stride, grad, hooks))


def proto(value: object) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


def zipped(
    pickled: object, storages: dict[str, bytes] | None = None, root: str = "archive", **members
) -> bytes:
    """A zip checkpoint; `members` (`/` written as `__`) are added or, as None, left out."""
    storages = {"0": bytes(16)} if storages is None else storages
    files = {"data.pkl": pickled if isinstance(pickled, bytes) else proto(pickled)}
    files |= {"byteorder": b"little"} | {f"data/{key}": data for key, data in storages.items()}
    files |= {"version": b"3\n"} | members
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        for name, data in files.items():
            if data is not None:
                archive.writestr(f"{root}/{name}", data)
    return buffer.getvalue()


def stream(pickled: object, keys=("0",), storages: bytes | None = None, **info) -> bytes:
    """A stream checkpoint; its storage ids have one item more than a zip's."""
    body = pickled if isinstance(pickled, bytes) else proto(as_stream(pickled))
    info = {"protocol_version": 1001, "little_endian": True} | info
    head = proto(0x1950A86A20F9469CFC6C) + proto(1001) + proto(info)
    data = struct.pack("<Q", 4) + bytes(16) if storages is None else storages
    return head + body + proto(list(keys)) + data


def as_stream(value: object) -> object:
    match value:
        case Stored():
            return Stored((*value, None))
        case tuple() | list():
            return type(value)(map(as_stream, value))
        case dict():
            return {key: as_stream(item) for key, item in value.items()}
    return value


def edited(data: bytes, old: bytes, new: bytes, count: int = 1) -> bytes:
    assert old in data
    assert len(old) == len(new)
    return data.replace(old, new, count)


def with_extra_member(name: str, data: bytes = b"x") -> bytes:
    buffer = io.BytesIO(zipped({"a": tensor()}))
    with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def deflated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", proto({"a": tensor(stored(size=1 << 26))}))
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data/0", bytes(1 << 28))
    return buffer.getvalue()


def overlapping() -> bytes:
    """Two members of the directory that share one local header's bytes."""
    data = zipped({"a": tensor()}, {"0": bytes(16), "1": bytes(16)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first, second = (archive.getinfo(f"archive/data/{key}").header_offset for key in "01")
    at = data.index(b"archive/data/1", data.index(b"PK\1\2")) - 4
    assert data[at : at + 4] == struct.pack("<I", second)
    return data[:at] + struct.pack("<I", first) + data[at + 4 :]


def directory_flood() -> bytes:
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 6, 0, 0, 0, 1, *[0] * 4, 0, 0) + b"x"
    count = 300_000
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, 47 * count, 4)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 4 + 47 * count, 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 47 * count, 4, 0)
    return b"PK\3\4" + entry * count + end64 + locator + end


GOOD = {"a": tensor()}
DEEP = b"N" + b"\x85" * 900_000

MALFORMED = {  # of both containers
    "no value": b"\x80\x02.",
    "no stop": b"\x80\x02}",
    "truncated string": b"\x80\x02X\xff\0\0\0a.",
    "stack underflow": b"\x80\x02\x86.",
    "no mark": b"\x80\x02t.",
    "unknown memo": b"\x80\x02h\x05.",
    "odd items": b"\x80\x02}(NNNu.",
    "bad utf-8": b"\x80\x02X\x01\0\0\0\xff.",
    "append to a dict": b"\x80\x02}Na.",
    "item of a list": b"\x80\x02]K\x01Ns.",
    "duplicate key": {"a": tensor(), "b": b"N" + encode("a") + encode(tensor())},
    "storage out of bounds": {"a": tensor(shape=(5,))},
    "offset out of bounds": {"a": tensor(offset=1)},
    "negative offset": {"a": tensor(offset=-1)},
    "offset of 2**63": {"a": tensor(offset=2**63, shape=(1,))},
    "offset of 2**63 of an empty tensor": {"a": tensor(offset=2**63, shape=(0,))},
    "deep offset": {"a": tensor(offset=b"N" + b"\x85" * 100_000)},
    "stride out of bounds": {"a": tensor(shape=(2, 2), stride=(3, 1))},
    "negative stride": {"a": tensor(offset=3, stride=(-1,))},
    "negative dim": {"a": tensor(shape=(-1,))},
    "two negative dims": {"a": tensor(shape=(-2, -2), stride=(0, 0))},
    "bool dim": {"a": tensor(shape=(True,))},
    "float dim": {"a": tensor(shape=(2.0,))},
    "strides missing": {"a": tensor(shape=(2, 2))},
    "list for a shape": {"a": tensor(shape=[4])},
    "rank 33": {"a": tensor(shape=(1,) * 33, stride=(1,) * 33)},
    "rank 100,000": {"a": tensor(shape=(1,) * 100_000, stride=(1,) * 100_000)},
    "absurd dim": {"a": tensor(shape=(2**40,), stride=(0,))},
    "terabytes of one element": {"a": tensor(shape=(2**20, 2**20), stride=(0, 0))},
    "gigabytes in many views": {
        f"a{i}": tensor(shape=(2**20, i), stride=(0, 0)) for i in range(1, 50)
    },
    "storage of 2**60": {"a": tensor(stored(size=2**60))},
    "storage larger than the file": {"a": tensor(stored(size=2**40))},
    "storage of -4": {"a": tensor(stored(size=-4))},
    "storage missing": {"a": tensor(stored("7"))},
    "storage of two types": {"a": tensor(), "b": tensor(stored(dtype="IntStorage"))},
    "bool requires_grad missing": {"a": tensor(grad=None)},
    "tensor of None": {"a": tensor(storage=b"N")},
    "state dict is a list": [tensor()],
    "no tensors": {"a": 1},
    "an int beside tensors": {"a": tensor(), "step": 3},
}

UNSAFE = {  # of both containers, and as raw pickles
    "system": Call((Global("posix system"), "touch gadget")),
    "eval": Call((Global("builtins eval"), "1")),
    "getattr": Call((Global("builtins getattr"), 1, "x")),
    "numpy": Call((Global("numpy.core.multiarray _reconstruct"),)),
    "torch.load": Call((Global("torch load"), "x")),
    "rebuild from type": Call((Global("torch._utils _rebuild_from_type_v2"),)),
    "dotted name": b"X\5\0\0\0torchX\x19\0\0\0_utils._rebuild_tensor_v2\x93",
    "storage of another name": Global("torch UntypedStorage"),
    "newobj": encode(ORDERED_DICT) + b")\x81",
    "newobj_ex": encode(ORDERED_DICT) + b")}\x92",
    "obj": b"(" + encode(ORDERED_DICT) + b"o",
    "inst": b"(icollections\nOrderedDict\n",
    "inst gadget": b"(S'touch gadget'\niposix\nsystem\n",
    "ext1": b"\x82\x01",
    "ext2": b"\x83\x01\0",
    "ext4": b"\x84\x01\0\0\0",
    "stack_global of ints": b"K\x01K\x01\x93",
    "reduce of a string": b"X\1\0\0\0a)R",
    "reduce of a size": encode(Call((Global("torch Size"), 4))),
    "build a list": b"]}b",
    "build a dict": b"}}b",
    "build with a tuple": encode(Call((ORDERED_DICT,))) + b"N}\x86b",
    "persid": b"P0\n",
    "bytes": b"C\x01a",
    "set": b"\x8f",
    "tuple as a key": encode({(1,): 2}),
    "deep tuple": DEEP,
    "deep tuple as a key": b"}" + DEEP + b"Ns",
    "deep tuple called": DEEP + b")R",
    "deep list": b"]" * 400_000 + b"a" * 400_000,
    "deep marks": b"(" * 1_000_000 + b"t" * 1_000_000,
    "deep dicts": b"}" + b"K\x01}" * 300_000 + b"s" * 300_000,
    "large integer keys": encode({i * (2**61 - 1): None for i in range(1, 9)}),
    "float key": encode({1.5: None}),
    "opcode flood": b"N0" * 1_000_000,
    "memo flood": b"]" + b"".join(b"r" + struct.pack("<I", i) for i in range(1_100_000)),
    "memo bomb": b"]" + b"q\0(" + b"h\0" * 1_100_000 + b"e",
    "pairs again and again": b"](" + encode(["x", None])
    + b"eq\0" + (encode(ORDERED_DICT) + b"h\0\x85R0") * 100_000,
    "long string": b"X\xff\xff\xff\x7fa",
    "long integer": b"\x8a\xff" + b"\x01" * 255,
    "long4": b"\x8b\xff\xff\xff\x7f",
    "hooks": {"a": tensor(hooks={"x": 1})},
}  # fmt: skip


class Gadget:
    def __reduce__(self):
        return os.system, ("touch gadget",)


def hostile_files() -> dict[str, tuple[bytes, str]]:
    """Every hostile file, with the error that is expected of it ("" where any will do)."""
    files: dict[str, tuple[bytes, str]] = {}
    for name, value in MALFORMED.items():
        files[f"zip, {name}"] = zipped(value), ""
        files[f"stream, {name}"] = stream(value), ""
    for name, value in UNSAFE.items():
        for kind, build in (("zip", zipped), ("stream", stream), ("raw", proto)):
            body = b"\x80\x02" + value + b"." if isinstance(value, bytes) else value
            if kind == "raw" and isinstance(value, bytes):
                files[f"raw, {name}"] = body, ""
            elif kind != "raw" or name != "hooks":
                files[f"{kind}, {name}"] = build(body), ""
    for protocol in range(6):
        gadget = pickle.dumps({"a": [Gadget()]}, protocol)
        for kind, data in (("zip", zipped(gadget)), ("stream", stream(gadget)), ("raw", gadget)):
            files[f"{kind}, gadget of protocol {protocol}"] = data, f"{os.name}.system"
    good = zipped(GOOD)
    crc = good.index(b"PK\1\2") + 16
    files |= {
        "zip, compressed bomb": (deflated(), "compressed"),
        "zip, duplicate member": (with_extra_member("archive/data/0"), "twice"),
        "zip, two pickles": (with_extra_member("archive/x/data.pkl"), "2 \\*/data.pkl"),
        "zip, two folders": (with_extra_member("other/x"), "more than one folder"),
        "zip, parent folder": (with_extra_member("archive/../x"), "has a path"),
        "zip, absolute": (with_extra_member("/archive/x"), "has a path"),
        "zip, backslash": (with_extra_member("archive/x\\y"), "has a path"),
        "zip, overlapping": (overlapping(), "overlaps"),
        "zip, wrong crc": (edited(good, bytes(16), b"\1" + bytes(15)), "CRC-32"),
        "zip, headers disagree": (good[:crc] + b"abcd" + good[crc + 4 :], "disagree"),
        "zip, encrypted": (good[: crc - 8] + b"\1" + good[crc - 7 :], "encrypted"),
        "zip, truncated": (good[:-30], "truncated"),
        "zip, half": (good[: len(good) // 2], "truncated"),
        "zip, signature only": (b"PK\3\4", "truncated"),
        "zip, bytes before": (b"PK\3\4" + good, "not where it should be"),
        "zip, bytes after": (good + b"x", "truncated"),
        "zip, directory flood": (directory_flood(), "members"),
        "zip, no pickle": (zipped(GOOD, **{"data.pkl": None}), "0 \\*/data.pkl"),
        "zip, no version": (zipped(GOOD, version=None), "version"),
        "zip, big-endian": (zipped(GOOD, byteorder=b"big"), "big-endian"),
        "zip, unknown endian": (zipped(GOOD, byteorder=b"middle"), "byte order"),
        "zip, pickle of 40 MB": (zipped(b"N" * (40 << 20)), "bytes; at most"),
        "zip, bytes after the pickle": (zipped(proto(GOOD) + b"x"), "followed"),
        "zip, storage too short": (zipped(GOOD, {"0": bytes(15)}), "should have 16 bytes"),
        "zip, storage too long": (zipped(GOOD, {"0": bytes(17)}), "should have 16 bytes"),
        "zip, storage with a path": (zipped({"a": tensor(stored("../0"))}), "not in the archive"),
        "zip, storage named version": (zipped({"a": tensor(stored("x"))}, {"x": bytes(16)}), "not"),
        "zip, bools of 2": (
            zipped({"a": tensor(stored(dtype="BoolStorage"))}, {"0": b"\0\1\2\3"}), "bools",
        ),
        "stream, big-endian": (stream(GOOD, little_endian=False), "little-endian"),
        "stream, no endian": (stream(GOOD, little_endian=None), "little-endian"),
        "stream, no keys": (stream(GOOD, keys=()), "disagree"),
        "stream, other keys": (stream(GOOD, keys=("1",)), "disagree"),
        "stream, key twice": (stream(GOOD, keys=("0", "0")), "disagree"),
        "stream, truncated": (stream(GOOD)[:-1], "its storages end"),
        "stream, bytes after": (stream(GOOD) + b"x", "its storages end"),
        "stream, other size": (
            stream(GOOD, storages=struct.pack("<Q", 5) + bytes(20)), "not where it should be",
        ),
        "stream, view of a storage": (
            stream(proto({"a": tensor(Stored((*stored(), ("1", 0, 4))))})), "torch < 0.4",
        ),
        "raw, empty": (b"", "empty"),
        "raw, proto only": (b"\x80\x02", "truncated"),
    }  # fmt: skip
    return files


CHILD = """
import json, re, resource, sys, time
from pathlib import Path
from mlx_zoo.errors import CheckpointError, IntegrityError
from mlx_zoo.hub.torch_checkpoint import read_tensors

def peak_of_this_process():  # ru_maxrss begins at that of the process that spawned this one
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for path in sorted(Path(sys.argv[1]).iterdir()):
    print(json.dumps({"started": path.name}), flush=True)
    start = time.monotonic()
    try:
        kind, message = "accepted", str(list(read_tensors(path)))
    except (CheckpointError, IntegrityError) as error:
        kind, message = type(error).__name__, str(error)
    except BaseException as error:
        kind, message = "escaped", repr(error)[:500]
    seconds = time.monotonic() - start
    peak = peak_of_this_process()
    print(json.dumps(dict(kind=kind, message=message, seconds=seconds, peak=peak)), flush=True)
"""


def run_child(script: str, *args: object, cwd: Path) -> subprocess.CompletedProcess:
    root = str(Path(mlx_zoo.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": root},
        check=False,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """What became of every hostile file, all read by one process that must survive them all."""
    files = hostile_files()
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "files").mkdir()
    for number, (data, _) in enumerate(files.values()):
        (folder / "files" / f"{number:04}.pth").write_bytes(data)
    child = run_child(CHILD, folder / "files", cwd=folder)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    last = list(files)[sum("started" in line for line in lines) - 1] if lines else None
    assert child.returncode == 0, f"died of {child.returncode} on {last!r}: {child.stderr[-2000:]}"
    assert not (folder / "gadget").exists(), "a gadget ran"
    results = [line for line in lines if "kind" in line]
    return dict(zip(files, results, strict=True))


HOSTILE = {name: message for name, (_, message) in hostile_files().items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(outcomes, name):
    outcome = outcomes[name]
    assert outcome["kind"] in (
        "CheckpointError", "UnsafeCheckpoint", "UnsupportedFormat", "IntegrityError"
    ), outcome  # fmt: skip
    assert outcome["seconds"] < 5
    assert ".pth: " in outcome["message"]
    if HOSTILE[name]:
        assert re.search(HOSTILE[name], outcome["message"])


@pytest.mark.parametrize("kind", ["zip", "stream", "raw"])
def test_a_gadget_is_named(outcomes, kind):
    for name, full_name in (
        ("system", "posix.system"),
        ("getattr", "builtins.getattr"),
        ("numpy", "numpy.core.multiarray._reconstruct"),
        ("inst", "collections.OrderedDict"),
    ):
        assert outcomes[f"{kind}, {name}"]["kind"] == "UnsafeCheckpoint"
        assert full_name in outcomes[f"{kind}, {name}"]["message"]


def test_hostile_files_take_little_memory(outcomes):
    assert max(outcome["peak"] for outcome in outcomes.values()) < 1.5 * 2**20  # KiB


def test_the_hostile_files_differ_from_good_ones_in_one_thing(tmp_path):
    for data in (zipped(GOOD), stream(GOOD)):
        (tmp_path / "x.pth").write_bytes(data)
        assert bits(read_tensors(tmp_path / "x.pth")["a"]) == bytes(16)
        assert list(torch.load(tmp_path / "x.pth", weights_only=True)) == ["a"]


def test_what_python_2_wrote(tmp_path):
    """OrderedDict from a list of pairs, and names as SHORT_BINSTRING."""
    name = b"U\x01a"
    value = encode(ORDERED_DICT) + b"](](" + name + encode(tensor()) + b"ee\x85R"
    (tmp_path / "x.pth").write_bytes(zipped(b"\x80\x02" + value + b"."))
    assert list(read_tensors(tmp_path / "x.pth")) == ["a"]


def test_errors_are_of_the_right_kind(tmp_path):
    def refusal(data: bytes) -> type:
        (tmp_path / "x.pth").write_bytes(data)
        with pytest.raises((CheckpointError, IntegrityError)) as caught:
            read_tensors(tmp_path / "x.pth")
        return caught.type

    assert refusal(zipped(UNSAFE["system"])) is UnsafeCheckpoint
    assert refusal(edited(zipped(GOOD), bytes(16), b"\1" + bytes(15))) is IntegrityError
    assert refusal(zipped(GOOD, byteorder=b"big")) is UnsupportedFormat
    assert refusal(stream(GOOD)[:-1]) is CheckpointError


# --- Fuzz against torch ---------------------------------------------------------------------------


def fuzz_bases(folder: Path) -> dict[str, tuple[bytes, Callable[[bytes], bytes]]]:
    """Small checkpoints: the pickle of each, and how to put another one in its place."""
    weight = torch.arange(12.0).reshape(3, 4)
    value = OrderedDict(
        weight=weight, tied=weight, view=weight.T[1:], half=torch.ones(2, 2).half(),
        index=torch.tensor([3, 1]), flag=torch.tensor(True), parameter=torch.nn.Parameter(weight),
    )  # fmt: skip
    save(value, folder / "x.pth")
    with zipfile.ZipFile(folder / "x.pth") as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    save(value, folder / "y.pth", zipped=False)
    data = (folder / "y.pth").read_bytes()
    start = data.index(b"\x80\x02ccollections")
    end = data.index(b".\x80\x02]", start) + 1
    return {
        "zip": (members["data.pkl"], lambda new: zipped(new, {}, **(members | {"data.pkl": new}))),
        "stream": (data[start:end], lambda new: data[:start] + new + data[end:]),
    }


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A few edits: a byte set, removed or doubled, a slice moved, or an opcode put in."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size = rng.randrange(2, len(data)), rng.randint(1, 8)
        match rng.choice((0, 1, 2, 3, 4, 5, 5, 5)):
            case 0:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at] + data[at + size :]
            case 2:
                data = data[:at] + data[at : at + size] + data[at:]
            case 3:
                to = rng.randrange(2, len(data))
                data = data[:to] + data[at : at + size] + data[to:]
            case 4:
                opcodes = [*b"()0]}N\x88\x89KtuRQbs2", *b"\x85\x86\x87"]
                data = data[:at] + bytes([rng.choice(opcodes)]) + data[at:]
            case 5:  # an operand: the number after K, or the index after h
                spots = [i for i in range(2, len(data) - 1) if data[i] in b"Kh"]
                at = rng.choice(spots) + 1
                data = data[:at] + bytes([rng.randrange(16)]) + data[at + 1 :]
    return data


FUZZ_CHILD = """
import json, sys, warnings
from pathlib import Path
import mlx_zoo
import mlx.core as mx, numpy as np, torch
from mlx_zoo.errors import CheckpointError, IntegrityError
from mlx_zoo.hub.torch_checkpoint import read_tensors

def bits(x):
    if isinstance(x, torch.Tensor):
        x = x.detach().contiguous()
        return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy().tobytes()
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x).tobytes()

for path in sorted(Path(sys.argv[1]).iterdir()):
    print(json.dumps({"started": path.name}), flush=True)
    try:
        ours = read_tensors(path)
    except (CheckpointError, IntegrityError) as error:
        print(json.dumps({"ours": type(error).__name__}))
        continue
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Opcodes of other protocols, which only ours reads (a documented difference).
        same = "Unsupported operand" in str(error)
        print(json.dumps({"ours": "accepted", "same": same, "theirs": str(error)[-300:]}))
        continue
    theirs = {k: v for k, v in theirs.items() if k != "_metadata"}
    same = list(ours) == list(theirs) and all(
        tuple(a.shape) == tuple(b.shape) and bits(a) == bits(b)
        for a, b in zip(ours.values(), theirs.values())
    )
    print(json.dumps({"ours": "accepted", "same": same}))
"""


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_fuzz_accepts_nothing_that_torch_refuses(tmp_path, kind):
    base, rebuild = fuzz_bases(tmp_path)[kind]
    rng, count = random.Random(0), 500
    (tmp_path / "files").mkdir()
    for number in range(count):
        (tmp_path / "files" / f"{number:06}.pth").write_bytes(rebuild(mutate(rng, base)))
    child = run_child(FUZZ_CHILD, tmp_path / "files", cwd=tmp_path)
    assert child.returncode == 0, child.stdout[-300:] + child.stderr[-2000:]
    results = [json.loads(line) for line in child.stdout.splitlines()]
    accepted = [r | results[i - 1] for i, r in enumerate(results) if r.get("ours") == "accepted"]
    assert len(accepted) > count // 60
    assert [r for r in accepted if not r.get("same")] == []


def test_fuzz_of_whole_files(tmp_path):
    """A bit flipped anywhere in a zip is refused or changes nothing."""
    value = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    data = save(value, tmp_path / "x.pth").read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        at = rng.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        (tmp_path / "x.pth").write_bytes(flipped)
        try:
            found = read_tensors(tmp_path / "x.pth")
        except (CheckpointError, IntegrityError):
            refused += 1
            continue
        for name, tensor in value.items():
            assert_same(found[name], tensor)
    assert refused > 100
