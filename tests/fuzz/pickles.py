"""PyTorch checkpoints: what torch refuses we refuse, and where both read, every bit is equal.

A mutant is a checkpoint of torch.save taken apart: the opcodes of its pickle, its storages, and the
zip archive or the stream that holds them. The reference is torch.load(weights_only=True).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
import torch

from mlx_zoo.errors import CheckpointError, IntegrityError
from mlx_zoo.hub import torch_checkpoint

from .case import Case, bits, rng, scrambled

Ops = list[bytes]  # a pickle: each opcode with its argument


# --- Valid checkpoints ----------------------------------------------------------------------------


def noise(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Any bits at all: infinities, subnormals and every NaN."""
    generator = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(generator.integers(0, 2, shape).astype(bool))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    return torch.from_numpy(generator.integers(0, 256, size, np.uint8)).view(dtype).reshape(shape)


DTYPES = {
    torch.float64: mx.float64, torch.float32: mx.float32, torch.float16: mx.float16,
    torch.bfloat16: mx.bfloat16, torch.int64: mx.int64, torch.int32: mx.int32,
    torch.int16: mx.int16,
    torch.int8: mx.int8, torch.uint8: mx.uint8, torch.bool: mx.bool_,
}  # fmt: skip


def checkpoints() -> list[object]:
    """What people save: state dicts of every kind, and what training scripts put around them."""
    torch.manual_seed(0)
    base = noise(torch.float32, 2, 3, 4)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    optimizer.step()
    weights = {"a.weight": noise(torch.float32, 3, 2), "a.bias": noise(torch.float32, 3, seed=1)}
    return [
        {str(dtype): noise(dtype, 2, 3, seed=i) for i, dtype in enumerate(DTYPES)},
        OrderedDict((str(dtype), noise(dtype, 4, seed=i)) for i, dtype in enumerate(DTYPES)),
        {
            "base": base, "tied": base, "transposed": base.transpose(0, 2),
            "strided": base[:, ::2, 1:],
            "expanded": noise(torch.float16, 2, 1).expand(2, 7), "offset": base.flatten()[5:],
            "overlapping": noise(torch.float32, 9).unfold(0, 4, 2), "element": base[1, 2, 3],
        },
        {
            "empty": torch.zeros(0, 5), "view": base[2:],
            "scalar": torch.tensor(3), "flag": torch.tensor(True),
        },
        module.state_dict(),
        {f"module.{name}": x for name, x in module.state_dict().items()},
        {
            "state_dict": module.state_dict(), "epoch": 3, "loss": 0.5,
            "flags": [True, None, (1, 2**40)],
        },
        {
            "model": weights, "optimizer": optimizer.state_dict(), "best": torch.tensor(0.1),
            "big": 2**100,
        },
        OrderedDict(module.named_parameters()),
        {"last": noise(torch.float32, 1, 2, 3, 4).to(memory_format=torch.channels_last), **weights},
        {"a": torch.nn.Parameter(base, requires_grad=False), "b": torch.nn.Parameter(base[0])},
        {"model": OrderedDict(weights), "state_dict_ema": {"a": base}},
        weights,
        OrderedDict(weights),
        [base, 1],
        {"shape": base.shape, "a": base},
    ]  # fmt: skip


@dataclass
class Member:
    """A file in a zip archive; `over` replaces figures in one of its two headers."""

    name: str
    data: bytes
    over: dict[str, Any] = field(default_factory=dict)


@dataclass
class Parts:
    """A checkpoint, taken apart. `storages` has each one's key, elements and bytes."""

    zipped: bool
    ops: Ops
    storages: list[tuple[str, int, bytes]]
    root: str = "archive"
    members: list[Member] = field(default_factory=list)  # of a zip, besides the above
    heads: list[Ops] = field(default_factory=list)  # of a stream: magic, version, machine
    keys: Ops | None = None  # of a stream; None: those of `storages`
    over: dict[str, Any] = field(default_factory=dict)  # of the container

    def pack(self) -> bytes:
        return self._pack_zip() if self.zipped else self._pack_stream()

    def _pack_zip(self) -> bytes:
        files = [Member("data.pkl", b"".join(self.ops)), *self.members]
        files += [Member(f"data/{key}", data) for key, _, data in self.storages]
        known = {name: value for name, value in self.over.items() if isinstance(name, tuple)}
        for (at, name), value in known.items():
            files[at % len(files)].over[name] = value
        if self.over.get("shuffled"):
            random.Random(self.over["shuffled"]).shuffle(files)
        files += self.over.get("extra", [])
        return pack_zip(files, self.root, self.over)

    def _pack_stream(self) -> bytes:
        keys = self.keys or split(pickle.dumps([key for key, *_ in self.storages], 2))
        parts = [b"".join(ops) for ops in (*self.heads, self.ops, keys)]
        parts += [struct.pack("<Q", count % 2**64) + data for _, count, data in self.storages]
        return self.over.get("before", b"") + b"".join(parts) + self.over.get("after", b"")


def split(data: bytes) -> Ops:
    """The first pickle in `data`, cut into opcodes."""
    starts = [position for *_, position in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], starts[-1] + 1], strict=True)]


def pack_zip(files: list[Member], root: str, over: dict[str, Any]) -> bytes:
    """An archive as torch writes it, but for what the members' and the container's `over` say."""
    out, directory = io.BytesIO(), io.BytesIO()
    out.write(over.get("before", b""))
    for member in files:
        own = member.over
        name = own.get("name", f"{root}/{member.name}".encode())
        data = own.get("packed", member.data)
        crc, size = zlib.crc32(member.data), len(data)
        flags, method = own.get("flags", 0), own.get("method", 0)
        start = out.tell()
        padding = -(start + 30 + len(name) + 4) % 64 if own.get("aligned", True) else 0
        extra = own.get("extra", struct.pack("<2H", 0x4246, padding) + b"Z" * padding)
        local = [crc, size, size]
        if flags & 8:
            local = own.get("streamed", [0, 0, 0])
        elif own.get("wide"):  # sizes in a zip64 field
            local[1:] = [0xFFFFFFFF] * 2
            extra = struct.pack("<2H2Q", 1, 16, size, size) + extra
        local = own.get("local", local)
        out.write(
            struct.pack(
                "<4s5H3I2H", own.get("signature", b"PK\3\4"), own.get("version", 0), flags,
                own.get("local_method", method), 0, 0, *(n % 2**32 for n in local), len(name),
                len(extra),
            )
        )  # fmt: skip
        out.write(own.get("local_name", name) + extra + data)
        if flags & 8:
            out.write(own.get("descriptor", struct.pack("<4sI2Q", b"PK\7\10", crc, size, size)))
        central = own.get("central", [crc, size, size])
        more = own.get("central_extra", b"")
        if own.get("wide"):
            central, more = (
                [crc, 2**32 - 1, 2**32 - 1],
                struct.pack("<2H2Q", 1, 16, size, size) + more,
            )
        note = own.get("comment", b"")
        directory.write(
            struct.pack(
                "<4s6H3I5H2I", own.get("central_signature", b"PK\1\2"), 0, 0,
                own.get("central_flags", flags), own.get("central_method", method), 0, 0,
                *(n % 2**32 for n in central), len(name), len(more), len(note), own.get("disk", 0),
                0, own.get("attributes", 0), own.get("start", start) % 2**32,
            ) + name + more + note
        )  # fmt: skip
        for _ in range(own.get("twice", 0)):
            directory.write(directory.getvalue()[-46 - len(name) - len(more) - len(note) :])
    start, body = out.tell(), directory.getvalue()
    count = len(files) + sum(member.over.get("twice", 0) for member in files)
    end = over.get("end", [count, count, len(body), start])
    out.write(body + over.get("gap", b""))
    if over.get("zip64", True):
        at = out.tell()
        figures = over.get("end64", [count, count, len(body), start])
        out.write(
            struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, *(n % 2**64 for n in figures))
        )
        out.write(struct.pack("<4sIQI", b"PK\6\7", 0, over.get("end64_start", at) % 2**64, 1))
    note = over.get("comment", b"")
    narrow = [n % 2**16 for n in end[:2]], [n % 2**32 for n in end[2:]]
    out.write(
        struct.pack(
            "<4s4H2IH", b"PK\5\6", *over.get("disks", (0, 0)), *narrow[0], *narrow[1], len(note)
        )
    )
    out.write(note + over.get("after", b""))
    return out.getvalue()


def taken_apart(value: object, zipped: bool, protocol: int) -> Parts:
    """What torch.save writes of a value. A stream's keys are addresses: they become numbers."""
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    data = file.getvalue()
    if zipped:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        ops = split(files.pop("data.pkl"))
        keys = [name for name in files if name.startswith("data/")]
        sizes = sizes_of(ops)
        storages = [(k[5:], sizes[k[5:]], files.pop(k)) for k in keys]
        return Parts(True, ops, storages, members=[Member(*item) for item in files.items()])
    pickles = []
    for _ in range(5):
        pickles.append(split(data))
        data = data[sum(map(len, pickles[-1])) :]
    *heads, ops, keys = pickles
    sizes, blobs = sizes_of(ops), {}
    for key in pickle.loads(b"".join(keys)):
        count = int.from_bytes(data[:8], "little")
        width = sizes[key, "width"]
        blobs[key] = key, count, data[8 : 8 + count * width]
        data = data[8 + count * width :]
    names = {key: str(i) for i, key in enumerate(k for k in sizes if isinstance(k, str))}
    ops = framed([respelled(op, lambda text: names.get(text, text)) for op in ops])
    return Parts(False, ops, [(names[k], *blobs[k][1:]) for k in names], heads=heads)


def framed(ops: Ops) -> Ops:
    """With the length that its first frame should have; torch.save's pickles have one, or none."""
    at = next((i for i, op in enumerate(ops) if op and op[0] == 0x95), None)
    if at is None:
        return ops
    size = sum(map(len, ops[at + 1 :]))
    return [*ops[:at], b"\x95" + struct.pack("<Q", size), *ops[at + 1 :]]


def sizes_of(ops: Ops) -> dict[Any, int]:
    """Each storage's elements by its key, and by (key, "width") the bytes of one."""
    found: dict[Any, int] = {}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            return name if name in WIDTHS else OrderedDict if name == "OrderedDict" else nothing

        def persistent_load(self, pid: tuple) -> None:
            _, kind, key, _, count, *_ = pid
            found[key], found[key, "width"] = count, WIDTHS[kind]

    Reader(io.BytesIO(b"".join(ops))).load()
    return found


def nothing(*args: object) -> None:
    """Stands for what makes tensors, where only their storages matter."""


WIDTHS = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
    "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip


# --- Opcodes --------------------------------------------------------------------------------------

INTS, GETS, PUTS, TEXTS = b"KMJ\x8a", b"hj", b"qr", b"X\x8c"


def text_of(op: bytes) -> str:
    return op[5 if op[0] == ord("X") else 2 :].decode("utf-8", "surrogatepass")


def text_op(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def respelled(op: bytes, change: Callable[[str], str]) -> bytes:
    """A string's opcode with another text; any other as it is."""
    return text_op(change(text_of(op))) if op[0] in TEXTS else op


def int_of(op: bytes) -> int:
    if op[0] == 0x8A:
        return int.from_bytes(op[2:], "little", signed=True)
    return int.from_bytes(op[1:], "little", signed=op[0] == ord("J"))


def int_op(value: int, spelling: int = 0) -> bytes:
    """`value` as BININT1, BININT2, BININT, LONG1 or text: the first that can, from `spelling`."""
    for kind, size in ((b"K", 1), (b"M", 2), (b"J", 4))[spelling:]:
        signed = kind == b"J"
        if -(2**31) * signed <= value < 2 ** (8 * size - signed):
            return kind + value.to_bytes(size, "little", signed=signed)
    if spelling > 3:
        return b"I%d\n" % value if spelling == 4 else b"L%dL\n" % value
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([min(size, 255)]) + value.to_bytes(size, "little", signed=True)


def places(ops: Ops, codes: bytes) -> list[int]:
    """Where the opcodes of some kinds are."""
    return [i for i, op in enumerate(ops) if op and op[0] in codes]


def named(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


STORAGES = [f"torch {name}" for name in WIDTHS]
GLOBALS = [
    *STORAGES, "torch ComplexFloatStorage", "torch QInt8Storage", "torch UntypedStorage",
    "torch.storage UntypedStorage",
    "torch.storage TypedStorage", "torch Tensor", "torch device", "torch float32", "torch Size",
    "torch.Size numel",
    "collections OrderedDict", "collections Counter", "collections defaultdict", "builtins set",
    "builtins dict",
    "builtins list", "builtins complex", "builtins bytearray", "builtins getattr", "builtins eval",
    "__builtin__ eval",
    "posix system", "os system", "numpy.core.multiarray _reconstruct", "torch load",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter",
    "torch.nn.modules.linear Linear",
    "torch.serialization _get_layout", "torch _utils._rebuild_tensor_v2", "_codecs encode",
    "copy_reg _reconstructor",
    "torch.FloatStorage ", "torch FloatStorage.x", " ",
]  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 24, 100, 255, 256, 65535, 2**20, 2**24, 2**31 - 1, 2**31, 2**32,
    2**32 + 1, 2**40,
    2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 + 1, 2**100, -1, -2, -8, -(2**31), -(2**63),
    2**900,
)  # fmt: skip
STRINGS = (
    "", "0", "1", "2", "00", "+1", "1 ", "-1", "٠", "²", "../0", "/etc/passwd", "0\0", "data.pkl",
    "version", "storage",
    "Storage", "module", "cpu", "cuda:0", "meta", "mps", "cuda:99", "nowhere", "state_dict",
    "model", "_metadata", "a",
    "module.", "module.a", "é", "\ud800", "\U0001f600", "a" * 300, "x\ny",
)  # fmt: skip
# Opcodes with an argument that fits, to be put in anywhere.
OPCODES = [
    b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"l", b"d",
    b"a", b"e", b"s", b"u",
    b"R", b"b", b"Q", b"0", b"1", b"2", b".", b"\x81", b"\x92", b"o", b"\x93", b"\x94", b"\x8f",
    b"\x90", b"\x91",
    b"K\1", b"K\0", b"M\1\0", b"J\1\0\0\0", b"J\xff\xff\xff\xff", b"\x8a\1\1", b"\x8a\0",
    b"\x8b\1\0\0\0\1",
    b"G" + struct.pack(">d", 1.5), b"G" + struct.pack(">d", float("nan")), b"F1.5\n", b"I1\n",
    b"I01\n", b"L1L\n",
    b"S'a'\n", b"Va\n", b"U\1a", b"T\1\0\0\0a", b"\x8c\1a", b"\x8d\1\0\0\0\0\0\0\0a", b"C\1a",
    b"B\1\0\0\0a",
    b"\x8e\1\0\0\0\0\0\0\0a", b"\x96\1\0\0\0\0\0\0\0a", b"P0\n", b"\x82\1", b"\x83\1\0",
    b"\x84\1\0\0\0",
    b"h\0", b"h\1", b"h\xff", b"j\0\0\0\0", b"g0\n", b"q\0", b"q\xff", b"r\0\0\1\0", b"p5\n",
    b"\x80\2", b"\x80\4",
    b"\x80\x63", b"\x95\0\0\0\0\0\0\0\0", b"iposix\nsystem\n", b"\xff", b"\0",
    b"X\xff\xff\xff\xff", b"\x97", b"\x98",
]  # fmt: skip


def spelling(parts: Parts, chance: random.Random) -> None:
    """A number, string or place in the memo, spelled by another opcode."""
    ops = parts.ops
    spots = places(ops, INTS + GETS + PUTS + TEXTS)
    for at in chance.sample(spots, min(len(spots), chance.choice((1, 3, 50)))):
        op = ops[at]
        if op[0] in INTS:
            plain = chance.random() < 0.9
            ops[at] = int_op(int_of(op), chance.randrange(4) if plain else chance.choice((4, 5)))
        elif op[0] in GETS + PUTS and op[0] in b"hq":
            ops[at] = (b"j" if op[0] == ord("h") else b"r") + op[1:] + b"\0\0\0"
        elif (
            op[0] in TEXTS and len(raw := text_op(text_of(op))[5:]) < 256 and chance.random() < 0.1
        ):
            ops[at] = chance.choice((b"\x8c", b"U")) + bytes([len(raw)]) + raw


def remembered(parts: Parts, chance: random.Random) -> None:
    """Places in the memo that nobody asks for."""
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(2, len(parts.ops))
        if parts.ops[at - 1][0] not in b"(\x80\x95":
            parts.ops.insert(at, b"r" + struct.pack("<I", chance.randrange(200_000, 210_000)))


def idle(parts: Parts, chance: random.Random) -> None:
    """Opcodes that change nothing."""
    at = chance.randrange(1, len(parts.ops))
    parts.ops[at:at] = chance.choice(
        ([b"N", b"0"], [b"\x80\2"], [b"(", b"1"], [b"K\5", b"2", b"0", b"0"], [b"\x95" + bytes(8)])
    )


def other_names(parts: Parts, chance: random.Random) -> None:
    """Names of tensors and of anything else; those of storages, of their types and places stay."""
    kept = {"storage", "cpu", *(key for key, *_ in parts.storages)}
    spots = [i for i in places(parts.ops, TEXTS) if text_of(parts.ops[i]) not in kept]
    for at in chance.sample(spots, min(len(spots), chance.choice((1, 1, 3)))):
        new = chance.choice(
            ("a", "b.weight", "é", "module.a", "_metadata", "x" * 200, "model", "\0", "")
        )
        parts.ops[at] = text_op(f"{new}{chance.randrange(9)}" if chance.random() < 0.8 else new)


def placed(parts: Parts, chance: random.Random) -> None:
    """Storages that were on another device."""
    place = chance.choice(
        ("cuda:0", "cuda", "mps", "xla:1", "meta", "cpu:0", "", "nowhere", "privateuseone")
    )
    parts.ops = [respelled(op, lambda t: place if t == "cpu" else t) for op in parts.ops]


def same_width(parts: Parts, chance: random.Random) -> None:
    """A storage of another type whose elements have as many bytes."""
    spots = [i for i in places(parts.ops, b"c") if parts.ops[i][7:-1].decode() in WIDTHS]
    if spots:
        at = chance.choice(spots)
        width = WIDTHS[parts.ops[at][7:-1].decode()]
        alike = [name for name in STORAGES if WIDTHS[name[6:]] == width]
        parts.ops[at] = named(chance.choice(alike))


def values(parts: Parts, chance: random.Random) -> None:
    """Other bytes in a storage, its checksum mended."""
    if parts.storages:
        at = chance.randrange(len(parts.storages))
        key, count, data = parts.storages[at]
        parts.storages[at] = key, count, chance.randbytes(len(data))


def view(parts: Parts, chance: random.Random) -> None:
    """A dim, a stride or an offset: small numbers, which often stay within the storage."""
    spots = [i for i in places(parts.ops, b"K") if int_of(parts.ops[i]) < 16]
    for at in chance.sample(spots, min(len(spots), chance.choice((1, 1, 2)))):
        parts.ops[at] = int_op(max(0, int_of(parts.ops[at]) + chance.choice((-2, -1, 1, 2, -9, 6))))


def number(parts: Parts, chance: random.Random) -> None:
    if spots := places(parts.ops, INTS):
        at, value = chance.choice(spots), chance.choice(NUMBERS)
        parts.ops[at] = int_op(value, chance.choice((0, 0, 0, 3)))


def truth(parts: Parts, chance: random.Random) -> None:
    """requires_grad, and numbers that are bools, floats or nothing."""
    at = chance.choice(places(parts.ops, b"\x88\x89" + INTS) or [0])
    parts.ops[at] = chance.choice((b"\x88", b"\x89", b"N", b"G" + struct.pack(">d", 2.0), b"K\1"))


def string(parts: Parts, chance: random.Random) -> None:
    if spots := places(parts.ops, TEXTS):
        parts.ops[chance.choice(spots)] = text_op(chance.choice(STRINGS))


def swapped_strings(parts: Parts, chance: random.Random) -> None:
    if len(spots := places(parts.ops, TEXTS)) > 1:
        a, b = chance.sample(spots, 2)
        parts.ops[a], parts.ops[b] = parts.ops[b], parts.ops[a]


def other_global(parts: Parts, chance: random.Random) -> None:
    at = chance.choice(places(parts.ops, b"c") or [1])
    parts.ops[at] = named(chance.choice(GLOBALS))


def memo(parts: Parts, chance: random.Random) -> None:
    """Another place in the memo: a value taken for another, or none."""
    if spots := places(parts.ops, GETS + PUTS):
        at = chance.choice(spots)
        old = int.from_bytes(parts.ops[at][1:], "little")
        new = (
            old + chance.choice((-3, -2, -1, 1, 2, 3))
            if chance.random() < 0.8
            else chance.randrange(2**32)
        )
        wide = b"j" if parts.ops[at][0] in GETS else b"r"
        parts.ops[at] = wide + struct.pack("<I", new % 2**32)


def dropped(parts: Parts, chance: random.Random) -> None:
    at = chance.randrange(len(parts.ops))
    del parts.ops[at : at + chance.choice((1, 1, 1, 2, 5))]


def inserted(parts: Parts, chance: random.Random) -> None:
    parts.ops.insert(chance.randrange(len(parts.ops)), chance.choice(OPCODES))


def replaced(parts: Parts, chance: random.Random) -> None:
    parts.ops[chance.randrange(len(parts.ops))] = chance.choice(OPCODES)


def doubled(parts: Parts, chance: random.Random) -> None:
    at, size = chance.randrange(len(parts.ops)), chance.choice((1, 1, 2, 8, 30))
    parts.ops[at:at] = parts.ops[at : at + size]


def moved(parts: Parts, chance: random.Random) -> None:
    at, size = chance.randrange(len(parts.ops)), chance.choice((1, 1, 2, 8, 30))
    piece = parts.ops[at : at + size]
    del parts.ops[at : at + size]
    to = chance.randint(0, len(parts.ops))
    parts.ops[to:to] = piece


def gadget(parts: Parts, chance: random.Random) -> None:
    """A call of something that is no tensor; the argument would leave a file behind."""
    what = named(
        chance.choice(("posix system", "os system", "builtins eval", "builtins exec", *GLOBALS))
    )
    arg = text_op(chance.choice(("touch gadget", "open('gadget', 'w')")))
    call = chance.choice((
        [what, b"(", arg, b"t", b"R", b"0"], [what, b"(", arg, b"t", b"R"],
        [what, arg, b"\x85", b"R"],
        [b"(", arg, b"iposix\nsystem\n"], [b"(", what, arg, b"o"], [what, arg, b"\x85", b"\x81"],
        [text_op("posix"), text_op("system"), b"\x93", arg, b"\x85", b"R"],
        [what, b")", b"}", b"\x92"],
        [what, arg, b"b"], [arg, b"Q"], [what, b"Q"],
        [named("collections OrderedDict"), b")", b"R", what, b"b"],
        [what, b")", b"R"],
        [named("collections OrderedDict"), b"]", b"]", arg, what, b"e", b"a", b"\x85", b"R"],
    ))  # fmt: skip
    at = chance.randrange(1, len(parts.ops))
    parts.ops[at:at] = call


def flood(parts: Parts, chance: random.Random) -> None:
    """Much of the same: nesting, marks, copies."""
    count = chance.choice((10, 70, 1_000, 20_000))
    piece = chance.choice((
        [b"N"] + [b"\x85"] * count, [b"("] * count, [b"]"] * count + [b"a"] * (count - 1),
        [b"2"] * count,
        [b"}"] + [b"K\1}"] * count + [b"s"] * count, [b"("] * count + [b"t"] * count,
        [b"N", b"0"] * count,
        [b"]", b"q\xfe"] + [b"("] + [b"h\xfe"] * count + [b"e"], [b")"] + [b"\x86"] * count,
    ))  # fmt: skip
    at = chance.randrange(1, len(parts.ops))
    parts.ops[at:at] = piece + ([b"0"] if chance.random() < 0.5 else [])


# --- Containers -----------------------------------------------------------------------------------


def zip_details(parts: Parts, chance: random.Random) -> None:
    """What one writer of archives does and another does not."""
    at = chance.randrange(12)
    match chance.randrange(10):
        case 0:
            parts.root = chance.choice(("x", "model", "é", "a b", "archive.x", "Archive"))
        case 1:
            parts.over["shuffled"] = chance.randrange(1, 9)
        case 2:
            parts.over[at, "aligned"] = False
        case 3:
            parts.over[at, "extra"] = chance.choice((b"", bytes(4), b"XX\2\0ab", b"x" * 200))
        case 4:
            parts.over[at, "flags"] = chance.choice((0x800, 8, 0x808))
        case 5:
            parts.over[at, "wide"] = True
        case 6:
            parts.over["zip64"] = False
        case 7:
            parts.over[at, "attributes"] = chance.choice((1, 0x10, 0x81A40000, 0xA1FF0000))
        case 8:
            parts.over[at, "comment"] = b"note"
        case 9:
            parts.over[at, "central_extra"] = chance.choice((b"UT\5\0\1abcd", b"XX\1\0", b"abc"))


def zip_members(parts: Parts, chance: random.Random) -> None:
    """Members lost, added, renamed, or of other contents."""
    match chance.randrange(6):
        case 0 if parts.members:
            del parts.members[chance.randrange(len(parts.members))]
        case 1:
            name = chance.choice((
                "x", "data/99", "data/0", "data.pkl", "x/data.pkl", "constants.pkl", "code/x.py",
                "../x", "/x", "a\\b",
                "byteorder", "data/../data/0", "VERSION", "ByteOrder", "DATA/0", "", "data/",
                "./x", ".data/version", "x\n", "tensors/0", "data//0",
            ))  # fmt: skip
            parts.members.append(Member(name, chance.choice((b"", b"x", b"3\n", b"N.", bytes(24)))))
        case 2 if parts.members:
            member = chance.choice(parts.members)
            member.data = chance.choice(
                (b"", b"3", b"2\n", b"0", b"-1", b"x", b"big", b"little", b"9" * 70, b"\xff")
            )
        case 3 if parts.storages:
            at = chance.randrange(len(parts.storages))
            key, count, data = parts.storages[at]
            step = chance.choice((-4, -1, 1, 4))
            parts.storages[at] = key, count, data[:step] if step < 0 else data + bytes(step)
        case 4 if parts.storages:
            del parts.storages[chance.randrange(len(parts.storages))]
        case 5 if len(parts.storages) > 1:
            a, b = chance.sample(range(len(parts.storages)), 2)
            (key, n, data), (other, m, more) = parts.storages[a], parts.storages[b]
            parts.storages[a], parts.storages[b] = (other, n, data), (key, m, more)


def zip_lies(parts: Parts, chance: random.Random) -> None:
    """A header, directory or end record that says what is not so."""
    at, figure = chance.randrange(12), chance.choice((0, 1, 64, 2**16, 2**31, 2**32 - 1))
    other = f"{parts.root}/{chance.choice(('data.pkl', 'version', 'data/0', '../x', 'x'))}".encode()
    match chance.randrange(16):
        case 0:
            parts.over[at, "local"] = [figure, 16, 16]
        case 1:
            parts.over[at, "central"] = chance.choice(
                ([figure, 16, 16], [0, figure, figure], [0, 1, 2])
            )
        case 2:
            parts.over[at, "local_name"] = other
        case 3:
            parts.over[at, "name"] = other
        case 4:
            parts.over[at, "flags"] = chance.choice((1, 0x40, 0x2000, 0x801, 2**15, 8))
        case 5:
            parts.over[at, chance.choice(("method", "local_method", "central_method"))] = (
                chance.choice((8, 1, 99))
            )
        case 6:
            parts.over[at, "start"] = figure
        case 7:
            parts.over[at, "twice"] = 1
        case 8:
            parts.over[at, "disk"] = chance.choice((1, 0xFFFF))
        case 9:
            parts.over[at, chance.choice(("signature", "central_signature"))] = chance.choice(
                (b"PK\1\2", b"PK\5\6", b"abcd")
            )
        case 10:
            parts.over[chance.choice(("before", "after", "gap", "comment"))] = chance.choice(
                (b"x", b"PK\3\4", bytes(64))
            )
        case 11:
            parts.over["end"] = [
                chance.choice((0, 1, 5, 0xFFFF)),
                chance.choice((1, 5, 0xFFFF)),
                figure,
                chance.choice((0, 64, figure)),
            ]
        case 12:
            parts.over["end64"] = [
                1,
                chance.choice((0, 1, 5, 2**63)),
                chance.choice((figure, 2**63)),
                chance.choice((0, 64, 2**64 - 64)),
            ]
        case 13:
            parts.over["end64_start"] = chance.choice((0, 64, 2**63))
        case 14:
            parts.over[at, "descriptor"] = chance.choice((b"", b"PK\7\10" + bytes(20)))
            parts.over[at, "flags"] = 8
        case 15:
            parts.over["disks"] = chance.choice(((1, 0), (0, 1), (0xFFFF, 0xFFFF)))


def deflated(parts: Parts, chance: random.Random) -> None:
    """Members that are compressed, as their headers say."""
    for member in parts.members:
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(member.data) + packer.flush()
        figures = [zlib.crc32(member.data), len(packed), len(member.data)]
        member.over |= {"method": 8, "packed": packed, "local": figures, "central": figures}


def stream_details(parts: Parts, chance: random.Random) -> None:
    """Storages in another order; what a machine says of itself."""
    if chance.random() < 0.6:
        chance.shuffle(parts.storages)
    else:
        info = {
            "protocol_version": 1001,
            "little_endian": True,
            "type_sizes": {"short": 2},
            "x": [1],
        }
        parts.heads[2] = split(pickle.dumps(info, 2))


def stream_lies(parts: Parts, chance: random.Random) -> None:
    """A head, a list of keys or a count that says what is not so."""
    at = chance.randrange(len(parts.storages)) if parts.storages else 0
    match chance.randrange(8):
        case 0:
            which = chance.randrange(3)
            value = chance.choice(
                (1001, 1000, 1, None, {}, {"little_endian": False}, {"little_endian": 1}, "x", [1])
            )
            parts.heads[which] = split(pickle.dumps(value, 2))
        case 1:
            keys = [key for key, *_ in parts.storages]
            chance.choice(
                (lambda: keys.append("7"), lambda: keys.reverse(), lambda: keys and keys.pop())
            )()
            parts.keys = split(pickle.dumps(keys, 2))
        case 2:
            parts.keys = split(
                pickle.dumps(chance.choice((None, (), {}, "0", [0], [b"0"], [["0"]], [None])), 2)
            )
        case 3 if parts.storages:
            key, count, data = parts.storages[at]
            parts.storages[at] = (
                key,
                chance.choice((count + 1, count - 1, 0, -1, 2**31, 2**61, 2**62)),
                data,
            )
        case 4 if parts.storages:
            key, count, data = parts.storages[at]
            parts.storages[at] = key, count, data[:-1] if chance.random() < 0.5 else data + b"x"
        case 5 if parts.storages:
            del parts.storages[at]
        case 6:
            parts.over[chance.choice(("before", "after"))] = chance.choice(
                (b"x", b"\0" * 8, b"\x80\2N.", b"PK\3\4")
            )
        case 7:
            heads = Parts(False, chance.choice(parts.heads), [])
            chance.choice((inserted, dropped, replaced, number))(heads, chance)
            parts.heads[chance.randrange(3)] = heads.ops


HARMLESS = (spelling, remembered, idle, other_names, placed, same_width, values, view)
HARMFUL = (
    number, truth, string, swapped_strings, other_global, memo, dropped, inserted, replaced,
    doubled, moved, gadget, flood,
)  # fmt: skip


class Target:
    """torch.save makes the seeds; `ours` writes the file that both sides read."""

    allowed = (CheckpointError, IntegrityError)

    def __init__(self, folder: Path):
        self.path, self.canary = folder / "x.pth", Path("gadget").absolute()
        self.seeds = [
            (value, zipped, protocol)
            for value in checkpoints()
            for zipped in (True, False)
            for protocol in (2, 2, 2, 2, 2, 2, 1, 4)
        ]
        self.parts: dict[int, Parts] = {}
        for number in range(0, len(self.seeds), 5):
            with suppress(*self.allowed):
                self.read(self.seed(number).pack())

    def seed(self, number: int) -> Parts:
        """A checkpoint taken apart, and a copy of it."""
        if number not in self.parts:
            self.parts[number] = taken_apart(*self.seeds[number])
        found = self.parts[number]
        return Parts(
            found.zipped, [*found.ops], [*found.storages], found.root,
            [Member(member.name, member.data) for member in found.members],
            [*map(list, found.heads)],
        )  # fmt: skip

    def make(self, number: int) -> Case:
        chance = rng("torch", number)
        if chance.random() < 0.003:
            return self.large(number, chance)
        which = chance.randrange(len(self.seeds))
        parts, steps = self.seed(which), [f"seed {which}"]
        details = zip_details if parts.zipped else stream_details
        lies = (zip_members, zip_lies, deflated) if parts.zipped else (stream_lies,)
        for _ in range(chance.choice((0, 1, 1, 1, 1, 2, 2, 3))):
            kinds = chance.choices((HARMLESS, HARMFUL, (details,), lies), (6, 4, 2, 2))[0]
            change: Callable = chance.choice(kinds)
            if len(parts.ops) > 3:
                change(parts, chance)
                steps.append(change.__name__)
        if chance.random() < 0.7:
            parts.ops = framed(parts.ops)
        data = parts.pack()
        if chance.random() < 0.08:
            data, step = scrambled(
                data, self.seed(chance.randrange(len(self.seeds))).pack(), chance
            )
            steps.append(step)
        return Case(number, data, len(data), steps)

    def large(self, number: int, chance: random.Random) -> Case:
        """A few MiB, of which the tensors are views: they show what memory is taken."""
        base = noise(chance.choice([*DTYPES]), chance.randint(1, 4), 1 << 18, seed=number)
        value = {"a": base, "b": base[0], "c": base.T, "d": base[:, ::2], "e": base[0, 0]}
        kept = dict(chance.sample([*value.items()], chance.randint(1, 5)))
        parts = taken_apart(kept, chance.random() < 0.5, 2)
        return Case(number, data := parts.pack(), len(data), [f"{[*kept]} of {base.dtype}"])

    def ours(self, case: Case) -> dict[str, mx.array]:
        try:
            return self.read(case.value)
        finally:
            if self.canary.exists():
                self.canary.unlink()
                raise AssertionError("a gadget ran")

    def read(self, data: bytes) -> dict[str, mx.array]:
        self.path.write_bytes(data)
        found = torch_checkpoint.read_tensors(self.path)
        mx.eval(found)
        mx.clear_cache()
        return found

    def reference(self, case: Case) -> object:
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def differences(self, case: Case, ours: dict[str, mx.array], theirs: Any) -> list[str]:
        if not isinstance(theirs, dict):
            return [f"torch found a {type(theirs).__name__}"]
        wanted = state_dict(theirs)
        if list(wanted) != list(ours):
            return [f"names {[*ours]}, for torch {[*wanted]}"]
        wrong = []
        for name, tensor in wanted.items():
            array = ours[name]
            if array.dtype != DTYPES.get(tensor.dtype) or array.shape != tuple(tensor.shape):
                theirs = f"{tensor.dtype} {tensor.shape}"
                wrong.append(f"{name!r} is {array.dtype} {array.shape}, for torch {theirs}")
            elif bits(array) != torch_bits(tensor):
                wrong.append(f"{name!r} has other bits than torch read")
        return wrong

    def excuse(
        self, case: Case, ours: dict[str, mx.array], refusal: Exception
    ) -> tuple[str, list[str]] | None:
        """torch's safe reader knows fewer opcodes than there are; Python's own reads the rest."""
        if "Unsupported operand" not in str(refusal):
            return None
        try:
            theirs = torch.load(
                self.path, map_location="cpu", weights_only=False, pickle_module=PYTHONS
            )
        except Exception as error:
            return "an opcode that torch's reader lacks", [f"accepted, but pickle says: {error!r}"]
        return "an opcode that torch's reader lacks", self.differences(case, ours, theirs)


class Reader(pickle.Unpickler):
    """Python's unpickler, which may name what our reader may name and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if f"{module} {name}" not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


ALLOWED = {
    *STORAGES, "collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}  # fmt: skip
PYTHONS = SimpleNamespace(
    __name__="pickle",
    Unpickler=Reader,
    load=lambda file, **options: Reader(file, **options).load(),
)


def state_dict(tree: dict) -> dict[str, torch.Tensor]:
    """Where a training checkpoint keeps its weights, as the reader's documentation says."""
    nests = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema")
    for value in (tree.get(nest) for nest in nests):
        if isinstance(value, dict) and any(isinstance(x, torch.Tensor) for x in value.values()):
            tree = value
            break
    return {name: x for name, x in tree.items() if name != "_metadata"}


def torch_bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().tobytes()
