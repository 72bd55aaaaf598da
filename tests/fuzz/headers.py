"""safetensors files: what the library refuses we refuse, and MLX reads what it reads.

A mutant is a list of entries, each a list of (field, JSON text), so that a field may be missing,
be there twice, or hold a number that JSON can spell but no one would.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
import safetensors

from mlx_zoo.errors import CheckpointError
from mlx_zoo.hub import checkpoint, safetensors_header
from mlx_zoo.hub.safetensors_header import ITEM_SIZES, UNSUPPORTED

from .case import Case, bits, rng, scrambled

WORDS = (
    "weight",
    "bias",
    "h.0.attn",
    "h.10.attn",
    "",
    "a",
    "é",
    "\U0001f600",
    "\0",
    'a"b',
    "x" * 300,
)
BY_SIZE = {size: [d for d, s in ITEM_SIZES.items() if s == size] for size in (1, 2, 4, 8)}
# What stands where a dim or an offset belongs.
NUMBERS = (
    "0", "1", "2", "3", "7", "8", "-1", "-8", "-0", "00", "02", "+2", "2.0", "2.", ".5", "2e0",
    "1e3", "1E+2",
    "0x2", "2_0", "true", "false", "null", '"2"', "[2]", "{}", "NaN", "Infinity", "-Infinity",
    " 2 ",
    str(2**31 - 1), str(2**31), str(2**32), str(2**32 + 4), str(2**53 + 1), str(2**63 - 1),
    str(2**63), str(2**64 - 8),
    str(2**64), str(2**64 + 2), "1" + "0" * 40, "9" * 400, "1e400",
)  # fmt: skip
JUNK = (
    "null", "true", "1", '"F32"', "[]", "{}", "[[]]", '{"a": 1}', '""', "NaN", "'a'", "", "[1,]",
    '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x41"', '"\t"', "[" * 70 + "]" * 70,
    "[" * 600 + "]" * 600,
)  # fmt: skip
KEYS = (
    '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0061"', '"\\u0000"', '"\\/"',
    '"a\\qb"', '"a', "a", "1",
    '"__metadata__"', '"__METADATA__"', '"\\u005f_metadata__"', '"dtype"', '""', '"\x7f"',
    '"a\nb"', "null",
)  # fmt: skip


@dataclass
class Entry:
    """A member of the header: its name and its fields, all as JSON text."""

    name: str
    fields: list[list[str]]  # [field, value]

    def get(self, field: str) -> str:
        return next((value for name, value in self.fields if name == field), "null")

    def set(self, field: str, value: str) -> None:
        for pair in self.fields:
            if pair[0] == field:
                pair[1] = value

    def numbers(self, field: str) -> list[str]:
        return [n for n in self.get(field).strip("[]").split(",") if n]

    def set_numbers(self, field: str, numbers: list[str]) -> None:
        self.set(field, f"[{','.join(numbers)}]")


@dataclass
class File:
    """A safetensors file, taken apart."""

    entries: list[Entry]
    metadata: list[str]  # JSON texts; none, one, or more
    data: bytes
    padding: str = ""
    comma: str = ", "
    colon: str = ": "
    length: int | None = None  # of the header; None: the true one

    def pack(self) -> bytes:
        members = [f'"__metadata__"{self.colon}{text}' for text in self.metadata]
        for entry in self.entries:
            fields = [f'"{name}"{self.colon}{value}' for name, value in entry.fields]
            members.append(f"{entry.name}{self.colon}{{{self.comma.join(fields)}}}")
        text = "{" + self.comma.join(members) + "}" + self.padding
        raw = text.encode("utf-8", "surrogatepass")
        length = len(raw) if self.length is None else self.length
        return struct.pack("<Q", length % 2**64) + raw + self.data


def valid(chance: random.Random) -> File:
    """A file that the library could have written, of any types, shapes and names."""
    entries, position = [], 0
    names = chance.sample(WORDS, chance.randint(0, 5))
    large = chance.random() < 0.003
    blobs = []
    for i, name in enumerate(names):
        dtype = chance.choice(sorted(ITEM_SIZES))
        if chance.random() < 0.02:
            dtype = chance.choice(sorted(UNSUPPORTED - {"F4", "F6_E2M3", "F6_E3M2"}))
        shape = [
            chance.choice((0, 1, 1, 2, 2, 3, 4))
            for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 5)))
        ]
        if large and i == 0:
            shape = [chance.randint(1, 4), 1 << 18]
        size = int(np.prod(shape, dtype=int)) * ITEM_SIZES.get(dtype, {"C64": 8}.get(dtype, 1))
        blob = bytes(size) if dtype == "BOOL" else chance.randbytes(size)
        blobs.append(blob)
        offsets = [str(position), str(position + size)]
        fields = [
            ["dtype", json.dumps(dtype)],
            ["shape", f"[{','.join(map(str, shape))}]"],
            ["data_offsets", f"[{','.join(offsets)}]"],
        ]
        entries.append(Entry(json.dumps(name, ensure_ascii=chance.random() < 0.5), fields))
        position += size
    metadata = chance.choice(
        ([], [], ["null"], ["{}"], ['{"format":"pt"}'], ['{"é":"\\u00e9","b":""}'])
    )
    return File(entries, list(metadata), b"".join(blobs), " " * chance.choice((0, 0, 1, 7)))


# --- Changes: each gets a file with at least one tensor, and one of its entries -------------------


def same_size(file: File, entry: Entry, chance: random.Random) -> None:
    dtype = entry.get("dtype").strip('"')
    entry.set("dtype", json.dumps(chance.choice(BY_SIZE.get(ITEM_SIZES.get(dtype, 0), [dtype]))))


def other_dtype(file: File, entry: Entry, chance: random.Random) -> None:
    names = [
        *ITEM_SIZES,
        *UNSUPPORTED,
        "f32",
        "F128",
        "",
        "F32 ",
        "BOOL\\u0000",
        "U1",
        "I4",
        "C128",
    ]
    value = (
        json.dumps(chance.choice(sorted(names))) if chance.random() < 0.8 else chance.choice(JUNK)
    )
    entry.set("dtype", value.replace("\\\\", "\\"))


def reshape(file: File, entry: Entry, chance: random.Random) -> None:
    """Another shape of as many elements."""
    dims = entry.numbers("shape")
    for _ in range(chance.randint(1, 3)):
        at = chance.randint(0, len(dims))
        match chance.randrange(3):
            case 0:
                dims.insert(at, "1")
            case 1:
                chance.shuffle(dims)
            case 2 if dims and "0" in dims:
                dims.insert(at, chance.choice(("0", "5", str(2**20), str(2**31 - 1), str(2**40))))
    entry.set_numbers("shape", dims)


def deep_rank(file: File, entry: Entry, chance: random.Random) -> None:
    ones = ["1"] * chance.choice((20, 27, 31, 32, 33, 64, 5000))
    entry.set_numbers("shape", ones + entry.numbers("shape"))


def wrong_dim(file: File, entry: Entry, chance: random.Random) -> None:
    dims = entry.numbers("shape")
    if dims and chance.random() < 0.8:
        dims[chance.randrange(len(dims))] = chance.choice(NUMBERS)
    else:
        dims.insert(chance.randint(0, len(dims)), chance.choice(NUMBERS))
    entry.set_numbers("shape", dims)


def overflowing(file: File, entry: Entry, chance: random.Random) -> None:
    """Dims whose product wraps around 2**64, or hides behind a zero."""
    dims = chance.choice((
        ["65536"] * 4, ["4294967296"] * 2, ["2147483647"] * 3, ["2", "9223372036854775808"],
        ["2147483647", "2147483647", "2147483647", "0"], ["0", "2147483647", "2147483647"],
        ["-1", "-1"],
        ["4294967297", "1"], ["0", "9223372036854775807"],
    ))  # fmt: skip
    entry.set_numbers("shape", dims)
    if chance.random() < 0.5:
        begin = (entry.numbers("data_offsets") or ["0"])[0]
        entry.set_numbers("data_offsets", [begin, begin])


def wrong_offset(file: File, entry: Entry, chance: random.Random) -> None:
    offsets = entry.numbers("data_offsets") or ["0"]
    at = chance.randrange(len(offsets))
    if chance.random() < 0.5 and offsets[at].isdigit():
        offsets[at] = str(int(offsets[at]) + chance.choice((-8, -4, -1, 1, 4, 8, 2**32, 2**64)))
    else:
        offsets[at] = chance.choice(NUMBERS)
    entry.set_numbers("data_offsets", offsets)


def shifted(file: File, entry: Entry, chance: random.Random) -> None:
    """Both offsets moved: the span is right, its place is not."""
    step = chance.choice((-(2**63), -8, -4, -1, 1, 4, 8, 64, 2**64))
    offsets = entry.numbers("data_offsets")
    if all(n.lstrip("-").isdigit() for n in offsets):
        entry.set_numbers("data_offsets", [str(int(n) + step) for n in offsets])


def other_offsets(file: File, entry: Entry, chance: random.Random) -> None:
    other = chance.choice(file.entries)
    mine, theirs = entry.get("data_offsets"), other.get("data_offsets")
    entry.set("data_offsets", theirs)
    if chance.random() < 0.7:
        other.set("data_offsets", mine)


def count_of_offsets(file: File, entry: Entry, chance: random.Random) -> None:
    offsets = entry.numbers("data_offsets")
    match chance.randrange(3):
        case 0:
            offsets = offsets[:1]
        case 1:
            offsets = [*offsets, *offsets[-1:]]
        case 2:
            offsets = offsets[::-1]
    entry.set_numbers("data_offsets", offsets)


def hole(file: File, entry: Entry, chance: random.Random) -> None:
    """Bytes between tensors that belong to none, or are missing."""
    begin = entry.numbers("data_offsets")[:1]
    at = int(begin[0]) if begin and begin[0].isdigit() else 0
    size = chance.choice((1, 4, 8))
    file.data = file.data[:at] + bytes(size) + file.data[at:]
    if chance.random() < 0.5:
        for other in file.entries:
            numbers = other.numbers("data_offsets")
            if len(numbers) == 2 and all(n.isdigit() for n in numbers) and int(numbers[0]) >= at:
                other.set_numbers("data_offsets", [str(int(n) + size) for n in numbers])


def renamed(file: File, entry: Entry, chance: random.Random) -> None:
    entry.name = json.dumps(f"{chance.choice(WORDS)}.{chance.randrange(3)}")


def escaped(file: File, entry: Entry, chance: random.Random) -> None:
    """The same name, every character spelled as an escape."""
    try:
        text = str(json.loads(entry.name))
    except ValueError:
        return
    units = struct.unpack(f"<{len(text.encode('utf-16-le', 'surrogatepass')) // 2}H",
                          text.encode("utf-16-le", "surrogatepass"))  # fmt: skip
    entry.name = '"' + "".join(f"\\u{unit:04x}" for unit in units) + '"'


def odd_name(file: File, entry: Entry, chance: random.Random) -> None:
    entry.name = chance.choice(KEYS)


def same_name(file: File, entry: Entry, chance: random.Random) -> None:
    entry.name = chance.choice(file.entries).name


def twice(file: File, entry: Entry, chance: random.Random) -> None:
    file.entries.insert(chance.randint(0, len(file.entries)), Entry(entry.name, [*entry.fields]))


def without(file: File, entry: Entry, chance: random.Random) -> None:
    file.entries.remove(entry)


def reordered(file: File, entry: Entry, chance: random.Random) -> None:
    chance.shuffle(file.entries)
    chance.shuffle(entry.fields)


def field_set(file: File, entry: Entry, chance: random.Random) -> None:
    """A field lost, doubled, added, or of another name."""
    at = chance.randrange(len(entry.fields)) if entry.fields else 0
    match chance.randrange(5):
        case 0:
            entry.fields[at : at + 1] = []
        case 1:
            entry.fields.append([*(entry.fields[at] if entry.fields else ["dtype", '"F32"'])])
        case 2:
            entry.fields.append(
                [chance.choice(("strides", "offset", "", "Dtype")), chance.choice(JUNK)]
            )
        case 3 if entry.fields:
            entry.fields[at][0] = chance.choice(
                ("dtype", "shape", "data_offsets", "offsets", "SHAPE")
            )
        case 4 if entry.fields:
            entry.fields[at][1] = chance.choice(JUNK)


def metadata(file: File, entry: Entry, chance: random.Random) -> None:
    texts = (
        "null", "{}", '{"a":"b"}', '{"a":"b","a":"c"}', '{"a":1}', '{"a":null}', "[]", '"x"', "1",
        "false",
        '{"a":{"b":"c"}}', '{"\\ud800":"a"}', '{"a":"\\ud800"}', '{"a":"\\ud83d\\ude00"}',
        '{"\\u0000":"\\u0000"}',
        '{"a":"' + "y" * 3000 + '"}', '{"a":"b",}', '{"":""}',
    )  # fmt: skip
    match chance.randrange(3):
        case 0:
            file.metadata = [chance.choice(texts)]
        case 1:
            file.metadata.append(chance.choice(texts))
        case 2:
            file.metadata = []


def spacing(file: File, entry: Entry, chance: random.Random) -> None:
    good, bad = (
        ("", " ", "\n", "\t\r ", "  "),
        ("\x0b", "\x0c", "\xa0", "\0", "//", "/**/", "\ufeff", ","),
    )
    blank = chance.choice(good if chance.random() < 0.7 else bad)
    match chance.randrange(3):
        case 0:
            file.padding = blank * chance.randint(1, 9)
        case 1:
            file.comma = blank + "," + chance.choice(good)
        case 2:
            file.colon = blank + ":" + chance.choice(good)


def trailing(file: File, entry: Entry, chance: random.Random) -> None:
    file.padding = chance.choice(("}", "{}", "x", "\0", "\0" * 8, "[]", " x", "null", ","))


def header_length(file: File, entry: Entry, chance: random.Random) -> None:
    true = int.from_bytes(file.pack()[:8], "little")
    file.length = chance.choice((
        true - 1, true + 1, true - 8, true + 8, true + len(file.data), true + len(file.data) + 1,
        0, 1, 2,
        2**63, 2**64 - 1, 2**64 - 8, 100_000_000, 100_000_001, 2**32 + true, 2**40 + true,
    ))  # fmt: skip


def values(file: File, entry: Entry, chance: random.Random) -> None:
    """Other bytes in the tensors: bools that are none, any NaN."""
    file.data = chance.randbytes(len(file.data))


def more_data(file: File, entry: Entry, chance: random.Random) -> None:
    extra = chance.choice((1, 4, 8, 4096))
    file.data = file.data + bytes(extra) if chance.random() < 0.5 else file.data[:-extra]


def raw_json(file: File, entry: Entry, chance: random.Random) -> None:
    entry.set(chance.choice(("shape", "data_offsets", "dtype")), chance.choice(JUNK))


# Those named first keep a file valid, mostly; they are tried as often as all others together.
HARMLESS = (
    same_size,
    reshape,
    renamed,
    escaped,
    reordered,
    metadata,
    spacing,
    values,
    other_offsets,
)
HARMFUL = (
    other_dtype, deep_rank, wrong_dim, overflowing, wrong_offset, shifted, count_of_offsets, hole,
    odd_name, same_name, twice, without, field_set, trailing, header_length, more_data, raw_json,
)  # fmt: skip


class Target:
    """`make` writes no file; `ours` and `reference` read the one file that they share."""

    allowed = (CheckpointError,)

    def __init__(self, folder: Path):
        self.path = folder / "x.safetensors"
        for number in range(20):  # MLX's threads and pools are there before anything is measured
            with suppress(CheckpointError):  # of a type that MLX does not have
                self.read(valid(rng("warm", number)).pack())

    def make(self, number: int) -> Case:
        chance = rng("safetensors", number)
        file, steps = valid(chance), []
        is_large = len(file.data) > 1 << 20  # kept valid more often: they show the memory
        for _ in range(chance.choice((0, 0, 0, 1) if is_large else (0, 1, 1, 1, 2, 2, 3, 4))):
            if not file.entries:
                break
            change: Callable = chance.choice(HARMLESS if chance.random() < 0.55 else HARMFUL)
            change(file, chance.choice(file.entries), chance)
            steps.append(change.__name__)
        data = file.pack()
        if not is_large and chance.random() < 0.2:
            data, step = scrambled(data, valid(chance).pack(), chance)
            steps.append(step)
        return Case(number, data, len(data), steps)

    def ours(self, case: Case):
        return self.read(case.value)

    def read(self, data: bytes):
        self.path.write_bytes(data)
        header = safetensors_header.read_header(self.path)
        arrays = checkpoint.read_safetensors(self.path, header)
        mx.eval(arrays)
        mx.clear_cache()
        return header, arrays

    def reference(self, case: Case):
        """Both of the library's ways in; the file is on the disk by now."""
        with safetensors.safe_open(self.path, "numpy") as file:
            found = file.metadata() or {}
            list(file.keys())
        return found, safetensors.deserialize(case.value)

    def differences(self, case: Case, ours, theirs) -> list[str]:
        (header, arrays), (found, tensors) = ours, theirs
        wrong = []
        if header.metadata != found:
            wrong.append(f"metadata {header.metadata}, for the library {found}")
        wanted = dict(tensors)
        if not wanted.keys() == header.tensors.keys() == arrays.keys():
            return [
                *wrong,
                f"names {[*header.tensors]} and {[*arrays]}, for the library {[*wanted]}",
            ]
        for name, tensor in wanted.items():
            info, array = header.tensors[name], arrays[name]
            said = (info.dtype, list(info.shape), str(array.dtype), list(array.shape))
            dtype = f"mlx.core.{MLX_NAMES.get(tensor['dtype'])}"
            if said != (tensor["dtype"], tensor["shape"], dtype, tensor["shape"]):
                wrong.append(
                    f"{name!r} is {said}, for the library {tensor['dtype']} {tensor['shape']}"
                )
            elif bits(array) != bytes(tensor["data"]):
                wrong.append(f"{name!r} has other bytes than the library read")
        return wrong

    def excuse(self, case: Case, ours, refusal: Exception) -> None:
        return None  # there is none


MLX_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
