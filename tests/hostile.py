"""Checkpoint files that are wrong on purpose, and what becomes of a process that loads them.

The tables are by row of the fault matrix (FAULTS.md): name -> bytes, or a value for both of the
containers of torch.save. `outcomes` loads files in a process of its own, one after the other.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import mlx_zoo

# --- Pickles and their containers -----------------------------------------------------------------


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


# --- safetensors ----------------------------------------------------------------------------------


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pack(header: Any, num_bytes: int = 8, length: int | None = None) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(num_bytes)


# --- The tables -----------------------------------------------------------------------------------

GOOD = {"a": tensor()}
DEEP = b"N" + b"\x85" * 900_000
TOUCH = "touch gadget"  # what every live gadget tries to run, in the folder of the process


def _partial(opcode: bytes, *args: object) -> bytes:
    """functools.partial by an opcode that makes instances."""
    keywords = b"}" if opcode == b"\x92" else b""
    return encode(Global("functools partial")) + encode(args) + keywords + opcode


SYSTEM = Global("os system")
# Row 32. These do run, on a machine that trusts pickles: a test sees them do it.
LIVE: dict[str, bytes] = {
    "GLOBAL": encode(Call((SYSTEM, TOUCH))),
    "GLOBAL of posix": encode(Call((Global("posix system"), TOUCH))),
    "STACK_GLOBAL": encode("os") + encode("system") + b"\x93" + encode((TOUCH,)) + b"R",
    "STACK_GLOBAL with dots": encode("shutil") + encode("os.system") + b"\x93"
    + encode((TOUCH,)) + b"R",
    "INST": b"(S'touch gadget'\nios\nsystem\n",
    "OBJ": b"(cos\nsystem\nS'touch gadget'\no",
    "NEWOBJ": _partial(b"\x81", SYSTEM, TOUCH) + b")R",
    "NEWOBJ_EX": _partial(b"\x92", SYSTEM, TOUCH) + b")R",
    "BUILD": _partial(b"\x81", Global("builtins print"))
    + encode((SYSTEM, (TOUCH,), {}, None)) + b"b)R",
    "eval": encode(Call((Global("builtins eval"), f"__import__('os').system('{TOUCH}')"))),
    "exec": encode(Call((Global("builtins exec"), f"import os; os.system('{TOUCH}')"))),
    "getattr": encode(Call((Global("builtins getattr"),
                            Call((Global("builtins __import__"), "os")), "system")))
    + encode((TOUCH,)) + b"R",
    "Popen": encode(Call((Global("subprocess call"), ["touch", "gadget"]))),
    "timeit": encode(Call((Global("timeit timeit"), f"__import__('os').system('{TOUCH}')", "pass",
                           Global("time perf_counter"), 1))),
    "map": encode(Call((Global("builtins list"),
                        Call((Global("builtins map"), SYSTEM, [TOUCH]))))),
    "pickle in a pickle": encode(Call((Global("pickle loads"),
        Call((Global("_codecs encode"), "cos\nsystem\n(S'touch gadget'\ntR.", "latin1"))))),
}  # fmt: skip
# Others that are known to get past lists of what is forbidden, and every way to name or make them.
GADGETS: dict[str, object] = LIVE | {
    name: Call((Global(name), "1"))
    for name in (
        "builtins setattr", "builtins compile", "builtins globals", "importlib import_module",
        "torch load", "torch hub.load", "torch.storage _load_from_bytes", "torch.jit load",
        "torch.serialization load", "torch._utils _rebuild_from_type_v2",
        "torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2",
        "torch.fx.graph_module reduce_graph_module", "numpy.core.multiarray _reconstruct",
        "numpy.testing._private.utils runstring", "code InteractiveInterpreter.runcode",
        "cProfile run", "bdb Bdb.run", "pdb run", "pty spawn", "runpy _run_code", "pip main",
        "ctypes CDLL", "marshal loads", "types CodeType", "types FunctionType", "sys modules",
        "operator attrgetter", "operator methodcaller", "copyreg _reconstructor", "site main",
        "webbrowser open", "shutil rmtree", "socket socket", "collections namedtuple",
        "collections.OrderedDict fromkeys", "_io FileIO", "__main__ Net", "argparse Namespace",
    )
} | {
    "dotted name of ours": b"X\5\0\0\0torchX\x19\0\0\0_utils._rebuild_tensor_v2\x93",
    "in the arguments of a tensor": {"a": tensor(grad=Call((SYSTEM, TOUCH)))},
    "after a tensor": {"a": tensor(), "b": Call((SYSTEM, TOUCH))},
    "in an OrderedDict": Call((ORDERED_DICT, [("a", Call((SYSTEM, TOUCH)))])),
    "as a storage": Stored(("storage", Call((SYSTEM, TOUCH)), "0", "cpu", 4)),
    "as a reference": Stored((Call((SYSTEM, TOUCH)),)),
    "rebuild from type": Call((Global("torch._utils _rebuild_from_type_v2"),)),
    "storage of another name": Global("torch UntypedStorage"),
    "newobj": encode(ORDERED_DICT) + b")\x81",
    "newobj_ex": encode(ORDERED_DICT) + b")}\x92",
    "obj": b"(" + encode(ORDERED_DICT) + b"o",
    "inst": b"(icollections\nOrderedDict\n",
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
    "hooks": {"a": tensor(hooks={"x": 1})},
}  # fmt: skip

# Also row 32: pickles that no machine runs to its end, or whose value is no state dict.
PICKLES: dict[str, object] = {
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
    "deep offset": {"a": tensor(offset=b"N" + b"\x85" * 100_000)},
    "storage missing": {"a": tensor(stored("7"))},
    "storage of two types": {"a": tensor(), "b": tensor(stored(dtype="IntStorage"))},
    "bool requires_grad missing": {"a": tensor(grad=None)},
    "tensor of None": {"a": tensor(storage=b"N")},
    "state dict is a list": [tensor()],
    "no tensors": {"a": 1},
    "an int beside tensors": {"a": tensor(), "step": 3},
}

FLOODS: dict[str, object] = {  # row 35
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
    "keys that collide": b"}(" + b"".join(encode(i * (2**61 - 1) + 7) + b"N" for i in range(20_000))
    + b"u",
    "keys one after the other": b"}(" + b"".join(encode(i * 2**20) + b"N" for i in range(2048))
    + b"u" + b"0N",
    "a tuple of itself, often": b"N" + b"\x86".join([b"2"] * 100_000),
    "dicts in dicts, shared": b"}" + b"".join(b"2X\1\0\0\0a}s" for _ in range(100_000)),
    "a list that holds itself": b"]q\0h\0a",
    "a dict that holds itself": b"}q\0X\1\0\0\0ah\0s",
}  # fmt: skip

SIZES: dict[str, object] = {  # row 36
    "storage out of bounds": {"a": tensor(shape=(5,))},
    "offset out of bounds": {"a": tensor(offset=1)},
    "negative offset": {"a": tensor(offset=-1)},
    "offset of 2**63": {"a": tensor(offset=2**63, shape=(1,))},
    "offset of 2**63 of an empty tensor": {"a": tensor(offset=2**63, shape=(0,))},
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
    "stride of 2**62": {"a": tensor(shape=(2, 2), stride=(2**62, 1))},
    "expanded to 16 TB": {"a": tensor(shape=(2**31 - 1, 2**11), stride=(0, 0))},
    "expanded to 100 GB, by 100": {
        f"a{i}": tensor(offset=i % 4, shape=(2**28 + i,), stride=(0,)) for i in range(100)
    },
    "expanded to 16 EB": {"a": tensor(shape=(2**31 - 1,) * 2, stride=(0, 0))},
    "storage of 2**55": {"a": tensor(stored(size=2**55))},
    "an int of 8 PB": {"a": tensor(stored(size=2**50))},
}

HEADERS: dict[str, bytes] = {  # row 30
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
    "a dtype that MLX lacks": pack({"a": entry("F8_E4M3", [8], [0, 8])}),
    "complex": pack({"a": entry("C64", [1], [0, 8])}),
    "dims of 2**32 + 4, read as 4": pack({"a": entry("I8", [2**32 + 4], [0, 4])}, 4),
    "terabytes of nothing, and a byte": pack(
        {"a": entry(shape=[2**31 - 1, 0, 2**31 - 1], offsets=(0, 0))}, 1
    ),
    "a truncated file": pack({"a": entry(shape=[1000], offsets=(0, 4000))}, 3999),
    "a name of a megabyte, twice": pack('{"%s": 1, "%s": 2}' % (("x" * 2**20,) * 2)),
}  # fmt: skip


# --- Archives, and files of other kinds -----------------------------------------------------------


def with_a_comment() -> bytes:
    buffer = io.BytesIO(zipped(GOOD))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"PK"
    return buffer.getvalue()


def with_deflated_pickle() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", proto(GOOD), zipfile.ZIP_DEFLATED)
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data/0", bytes(16))
    return buffer.getvalue()


def with_zip64(count: int) -> bytes:
    """A good archive whose zip64 directory claims `count` members."""
    good = zipped(GOOD)
    end = good.index(b"PK\5\6")
    *_, members, size, start, _ = struct.unpack("<4s4H2IH", good[end:])
    assert members == 4
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    return good[:end] + end64 + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1) + good[end:]


def patched(mark: bytes, offset: int, new: bytes, after: bytes = b"") -> bytes:
    """A good archive with `new` written at `offset` from `mark`, behind the first `after`."""
    good = zipped(GOOD)
    at = good.index(mark, good.index(after)) + offset
    return good[:at] + new + good[at + len(new) :]


def archives() -> dict[str, tuple[bytes, str]]:
    """Row 34: zip archives, and what the error must say."""
    good, directory = zipped(GOOD), b"PK\1\2"
    return {
        "compressed bomb": (deflated(), "compressed"),
        "compressed pickle": (with_deflated_pickle(), "compressed"),
        "duplicate member": (with_extra_member("archive/data/0"), "twice"),
        "data.pkl twice": (with_extra_member("archive/data.pkl", proto(GOOD)), "twice"),
        "two pickles": (with_extra_member("archive/x/data.pkl"), r"2 \*/data.pkl"),
        "no pickle": (zipped(GOOD, **{"data.pkl": None}), r"0 \*/data.pkl"),
        "two folders": (with_extra_member("other/x"), "more than one folder"),
        "parent folder": (with_extra_member("archive/../x"), "has a path"),
        "way out": (with_extra_member("../../gadget"), "has a path"),
        "absolute": (with_extra_member("/archive/x"), "has a path"),
        "backslash": (with_extra_member("archive/x\\y"), "has a path"),
        "no name": (with_extra_member("archive//x"), "has a path"),
        "storage with a path": (zipped({"a": tensor(stored("../0"))}), "not in the archive"),
        "storage with an absolute path": (
            zipped({"a": tensor(stored("/etc/passwd"))}), "not in the archive",
        ),
        "storage named by letters": (
            zipped({"a": tensor(stored("x"))}, {"x": bytes(16)}), "not in the archive",
        ),
        "storage that is the pickle": (
            zipped({"a": tensor(stored("../data.pkl"))}), "not in the archive",
        ),
        "overlapping members": (overlapping(), "overlaps"),
        "wrong CRC": (edited(good, bytes(16), b"\1" + bytes(15)), "CRC-32"),
        "wrong CRC of the pickle": (edited(good, b"FloatStorage", b"DoublStorage"), "CRC-32"),
        "another CRC in the directory": (patched(directory, 16, b"abcd"), "disagree"),
        "encrypted": (patched(directory, 8, b"\1"), "encrypted"),
        "a size that lies": (patched(directory, 20, struct.pack("<2I", 17, 17)), "disagree"),
        "a size of 4 GB": (patched(directory, 20, b"\xfe\xff\xff\xff" * 2), "reaches out"),
        "a size in a zip64 field that is not there": (patched(directory, 20, b"\xff" * 8), ""),
        "zip64 of other members": (with_zip64(5), "disagree"),
        "zip64 of 2**60 members": (with_zip64(2**60), "disagree"),
        "a flood of members": (directory_flood(), "members"),
        "a comment": (with_a_comment(), "truncated"),
        "bytes before": (b"PK\3\4" + good, "not where it should be"),
        "garbage before": (b"\0" * 9 + good, "something else"),
        "bytes after": (good + b"x", "truncated"),
        "truncated": (good[:-30], "truncated"),
        "half": (good[: len(good) // 2], "truncated"),
        "signature only": (b"PK\3\4", "truncated"),
        "no version": (zipped(GOOD, version=None), "version"),
        "unknown endian": (zipped(GOOD, byteorder=b"middle"), "byte order"),
        "bytes after the pickle": (zipped(proto(GOOD) + b"x"), "followed"),
        "pickle of 40 MB": (zipped(b"N" * (40 << 20)), "bytes; at most"),
        "storage too short": (zipped(GOOD, {"0": bytes(15)}), "should have 16 bytes"),
        "storage too long": (zipped(GOOD, {"0": bytes(17)}), "should have 16 bytes"),
        "bools of 2": (
            zipped({"a": tensor(stored(dtype="BoolStorage"))}, {"0": b"\0\1\2\3"}), "bools",
        ),
    }  # fmt: skip


def streams() -> dict[str, tuple[bytes, str]]:
    """What of row 34 a stream can have; and gadgets in pickles that a zip does not have."""
    gadget = b"\x80\x02" + LIVE["GLOBAL"] + b"."
    magic, version = proto(0x1950A86A20F9469CFC6C), proto(1001)
    return {
        "no keys": (stream(GOOD, keys=()), "disagree"),
        "other keys": (stream(GOOD, keys=("1",)), "disagree"),
        "key twice": (stream(GOOD, keys=("0", "0")), "disagree"),
        "truncated": (stream(GOOD)[:-1], "its storages end"),
        "bytes after": (stream(GOOD) + b"x", "its storages end"),
        "another size": (
            stream(GOOD, storages=struct.pack("<Q", 5) + bytes(20)), "not where it should be",
        ),
        "view of a storage": (
            stream(proto({"a": tensor(Stored((*stored(), ("1", 0, 4))))})), "torch < 0.4",
        ),
        "gadget for the version": (magic + gadget, "os.system"),
        "gadget for the machine": (magic + version + gadget, "os.system"),
        "gadget for the keys": (
            stream(GOOD).replace(proto(["0"]), gadget), "os.system",
        ),
        "empty": (b"", "empty"),
        "first byte only": (b"\x80\x02", "truncated"),
    }  # fmt: skip


class Gadget:
    """Made by the pickle module itself, in any protocol."""

    def __reduce__(self):
        return os.system, (TOUCH,)


def pickled(value: object, protocol: int) -> bytes:
    return pickle.dumps(value, protocol)


def tar_era() -> bytes:
    """What torch.load(weights_only=True) ran before 2.6, too (CVE-2025-32434)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, data in (("pickle", pickled(Gadget(), 2)), ("storages", b""), ("tensors", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("net/data.pkl", pickled(Gadget(), 2))
        archive.writestr("net/constants.pkl", pickled(Gadget(), 2))
        archive.writestr("net/code/__torch__.py", b"x" * 99, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones(3))
    return buffer.getvalue()


def exported() -> bytes:
    """The outline of torch.export.save's archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (
            ("archive_format", "pt2"),
            ("models/model.json", "{}"),
            ("version", "0"),
        ):
            archive.writestr(f"net/{name}", data)
    return buffer.getvalue()


def foreign() -> dict[str, tuple[bytes, str]]:
    """Row 37: honest files of another kind, all UnsupportedFormat, and what the error must say."""
    in_torch = r"load it in torch, then .*save_file"
    elsewhere = r"take the \.safetensors or \.bin file .*safetensors\.numpy\.save_file"
    return {
        "tar era": (tar_era(), f"tar archive.*{in_torch}"),
        "TorchScript": (torchscript(), f"TorchScript.*{in_torch}"),
        "torch.export": (exported(), f"torch.export.*{in_torch}"),
        "big-endian zip": (zipped(GOOD, byteorder=b"big"), f"big-endian.*{in_torch}"),
        "big-endian stream": (stream(GOOD, little_endian=False), f"little-endian.*{in_torch}"),
        "endless stream": (stream(GOOD, little_endian=None), f"little-endian.*{in_torch}"),
        "plain pickle": (pickled({"a": 1}, 2), f"not one that torch.save wrote.*{in_torch}"),
        "plain pickle 0": (pickled([1], 0), f"not one that torch.save wrote.*{in_torch}"),
        "GGUF": (b"GGUF\3\0\0\0" + bytes(99), f"GGUF.*llama.cpp.*{elsewhere}"),
        "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), f"HDF5.*Keras.*{elsewhere}"),
        "npy": (b"\x93NUMPY\1\0v\0" + bytes(99), f"NumPy file.*{elsewhere}"),
        "npz": (npz(), f"NumPy archive.*{elsewhere}"),
        "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(99), f"ONNX.*{elsewhere}"),
        "SavedModel": (b"\x08\x01\x12\xc9\x02\n\x9f\x01" + bytes(99), f"TensorFlow.*{elsewhere}"),
        "Flax": (b"\x81\xa6params\x82\xa5wte" + bytes(99), f"MessagePack.*Flax.*{elsewhere}"),
    }  # fmt: skip


PLAIN = {  # not even of another framework: CheckpointError
    "HTML": (b"<!DOCTYPE html><html>", "an? (HTML|web) page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "nothing": (b"", "an empty file"),
    "JSON": (b'{"error": "not found"}', "JSON"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "gzip"),
    "noise": (b"\xde\xad\xbe\xef" * 9, "starts with"),
}

# --- Loading them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Files of a folder, and which of them to load; "" for the folder."""

    files: Mapping[str, bytes]
    load: str = ""
    match: str = ""  # what the error must say


@dataclass(frozen=True)
class Outcome:
    """What `load` did with a case: the error's type ("accepted" where there was none) and text."""

    kind: str
    message: str = ""
    kinds: tuple[str, ...] = ()  # the error's base classes, too
    seconds: float = 0.0  # of processor time
    peak: int = 0  # bytes of memory beyond what the process had before
    made: list[str] = field(default_factory=list)  # files that appeared in the process's folder


def file(data: bytes, match: str = "", name: str = "w.pth") -> Case:
    return Case({name: data}, name, match)


CHILD = """
import faulthandler, json, os, sys, time
from pathlib import Path
import mlx_zoo

here = Path.cwd()
status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")

def memory(name):
    if not status.exists():  # elsewhere than on Linux, memory is not looked at
        return 0
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])

def load(path):
    try:
        LOAD
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return dict(kind=kinds[0], kinds=kinds, message=str(error)[:4000])
    return dict(kind="accepted")

limit, good, *paths = sys.argv[1:]
load(good)  # what is imported and allocated once is not counted
for path in paths:
    print("started", path, flush=True)
    faulthandler.dump_traceback_later(float(limit), exit=True)
    if refs.exists():
        refs.write_text("5")  # the peak begins anew
    before, start = memory("VmRSS"), time.process_time()
    found = load(path)
    found |= dict(seconds=time.process_time() - start, peak=memory("VmHWM") - before)
    made = [file.name for file in here.iterdir()]
    for name in made:
        (here / name).unlink()
    print(json.dumps(found | dict(made=made)), flush=True)
"""


def python(script: str, *args: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """A process of its own that runs `script` in the folder `cwd`."""
    root = str(Path(mlx_zoo.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": root} | variables,
        check=False,
    )


def outcomes(
    cases: Mapping[str, Case],
    folder: Path,
    load: str = 'mlx_zoo.load("resnet_digits", pretrained=path)',
    limit: float = 60,
) -> dict[str, Outcome]:
    """What becomes of each case, loaded in a process that is started anew where one dies of it.

    `load` is what the process does with the `path` of each, for at most `limit` seconds. Raises
    AssertionError where anything was written outside of its own folder and the cache.
    """
    good = folder / "good.pth"
    good.write_bytes(zipped(GOOD))
    here, home, paths = folder / "here", folder / "home", {}
    here.mkdir(exist_ok=True)
    home.mkdir(exist_ok=True)
    for number, (name, case) in enumerate(cases.items()):
        own = folder / "cases" / f"{number:04}"
        for relative, data in case.files.items():
            (own / relative).parent.mkdir(parents=True, exist_ok=True)
            (own / relative).write_bytes(data)
        paths[name] = str(own / case.load) if case.load else f"local-dir:{own}"
    before = listing(folder)
    found: dict[str, Outcome] = {}
    names = list(cases)
    while len(found) < len(names):
        rest = [paths[name] for name in names[len(found) :]]
        variables = {"HOME": str(home), "MLX_ZOO_CACHE": str(folder / "cache")}
        child = python(CHILD.replace("LOAD", load), limit, good, *rest, cwd=here, **variables)
        assert child.stdout, child.stderr[-2000:]
        lines = [line for line in child.stdout.splitlines() if not line.startswith("started")]
        for line in lines:
            found[names[len(found)]] = Outcome(**json.loads(line))
        if len(lines) < len(rest):
            end = f"died of {child.returncode}: {child.stderr[-2000:]}"
            found[names[len(found)]] = Outcome(end)
    after = {name: x for name, x in listing(folder).items() if not name.startswith("cache/")}
    assert after == before, sorted(after.items() ^ before.items())
    assert not any("safetensors" in name for name in listing(folder / "cache"))
    return found


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and when it was changed."""
    files = (path for path in folder.rglob("*") if path.is_file())
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
