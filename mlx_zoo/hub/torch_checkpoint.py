"""PyTorch checkpoints (.pth, .bin, .pt) without torch, and without trusting them.

A checkpoint is a pickle, which is a program. Here it runs on a small machine of our own that knows
the opcodes of `torch.save` and six callables, and builds inert values only: nothing is imported,
nothing of the file is called. Two containers hold the pickle: a zip archive (since torch 1.6), and
before it a stream of five pickles followed by raw storages, which has no checksum.

Reading has three steps: the machine builds a tree in which tensors are descriptions
(`TensorRef`) of storages in the file; every description is checked against the size of the file;
only then are the tensors that are wanted read, one storage at a time.

Sources: torch/serialization.py (`_save`, `_legacy_save`), torch/_utils.py (`_rebuild_tensor_v2`),
CPython's pickletools.py for the opcodes, PKWARE's APPNOTE.TXT for zip.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from mlx_zoo.errors import CheckpointError, IntegrityError, UnsafeCheckpoint, UnsupportedFormat

MAX_PICKLE = 32 << 20  # bytes
MAX_OPCODES = 1_000_000  # ten thousand tensors take about 400,000
MAX_STRING = 1 << 20  # bytes
MAX_INTEGER = 16  # bytes; torch's magic number has 10
MAX_LINE = 512  # bytes of a text opcode's argument
MAX_KEY = 2**31  # integer keys: beyond, hashes can be made to collide
MAX_NESTING = 64
MAX_RANK = 32
MAX_DIM = 2**31
MAX_STRIDE = 2**48
MAX_MEMBERS = 65_536  # of a zip archive
MAX_EXTRA = 1024  # bytes of a member's extra field; zip64 needs 32
MAX_EXPANDED = 256 << 20  # bytes that expanded tensors may take, over four times the file's own

# What a training script may nest its state dict under, in the order of preference. Averaged
# weights come last: timm, too, takes them only when asked.
WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema")
# What DistributedDataParallel and torch.compile put before every name.
PREFIXES = ("module.", "_orig_mod.")
# Entries of a state dict that are no tensors and carry no weights: the versions of its modules.
INERT = {"_metadata"}

HOW_TO_CONVERT = (
    "load it in torch, then `safetensors.torch.save_file(model.state_dict(), 'model.safetensors')`"
)


def read_torch(path: Path) -> dict[str, mx.array]:
    """Read the state dict in the PyTorch checkpoint at `path`: names to arrays, bit for bit.

    Nested training checkpoints are unwrapped (see `unwrap`) and prefixes that every name has are
    stripped (see `strip_prefixes`). Tensors that are one view of one storage are one array; tensors
    of a training checkpoint that are not in its state dict are not read. Needs memory for the
    tensors and one storage more.

    Raises UnsafeCheckpoint for a pickle that asks for anything but tensors, naming it;
    UnsupportedFormat for TorchScript, tar-era and big-endian files, saying how to convert them;
    IntegrityError for a wrong checksum; CheckpointError for all else that is malformed.
    """
    return strip_prefixes(read_tensors(path))


def read_tensors(path: Path) -> dict[str, mx.array]:
    """`read_torch` with the names as they are in the file: a shard shows a part of them only."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            archive = _read_zip(file, size) if _starts(file, b"PK") else _read_stream(file, size)
            tensors = unwrap(archive.tree)
            _check_total(tensors, size)
            return _read_storages(file, tensors, archive.regions)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (CheckpointError, IntegrityError) as error:
        raise type(error)(f"{path}: {error}") from error


# --- State dicts ----------------------------------------------------------------------------------

T = TypeVar("T")


def unwrap(tree: object) -> dict[str, Any]:
    """Find the state dict in the value of a checkpoint: names to tensors, nothing else.

    A training checkpoint nests it: the first of `WRAPPERS` that is a dict with tensors is taken,
    whatever lies beside it. Otherwise `tree` itself is the state dict.

    Raises CheckpointError where there is no tensor, and for an entry that is neither a tensor nor
    in `INERT`.
    """
    if not isinstance(tree, dict):
        raise CheckpointError(f"holds {_kind(tree)}, not a state dict")
    nested = (tree[key] for key in WRAPPERS if _holds_tensors(tree.get(key)))
    found = next(nested, tree)
    tensors = {name: value for name, value in found.items() if name not in INERT}

    if not _holds_tensors(tensors):
        raise CheckpointError(
            f"no tensors at the top level or under {', '.join(WRAPPERS)}; it holds {_some(tree)}"
        )
    others = [name for name, value in tensors.items() if not _is_tensor(value)]
    if others:
        kinds = ", ".join(f"{_short(name)} ({_kind(tensors[name])})" for name in others[:5])
        raise CheckpointError(f"{len(others)} entries of the state dict are no tensors: {kinds}")
    unnamed = [name for name in tensors if not isinstance(name, str)]
    if unnamed:
        raise CheckpointError(f"tensors named by something other than a string: {_some(unnamed)}")
    return tensors


def strip_prefixes(tensors: Mapping[str, T]) -> dict[str, T]:
    """Strip `module.` and `_orig_mod.`, as often as every name has them."""
    start = 0
    while prefix := next((p for p in PREFIXES if _all_have(tensors, p, start)), None):
        start += len(prefix)
    return {name[start:]: value for name, value in tensors.items()}


def _all_have(names: Iterable[str], prefix: str, start: int) -> bool:
    names = list(names)
    shortest = start + len(prefix) + 1  # something must remain
    return bool(names) and all(n.startswith(prefix, start) and len(n) >= shortest for n in names)


def _is_tensor(value: object) -> bool:
    return isinstance(value, (mx.array, TensorRef))


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(map(_is_tensor, value.values()))


def _kind(value: object) -> str:
    """ "an int", "a list", "torch.Size": never the value itself, whose repr may be deep."""
    name = type(value).__name__
    return value.name if isinstance(value, Symbol) else f"a{'n' * (name[0] in 'aeiouAEIOU')} {name}"


def _short(name: object) -> str:
    if isinstance(name, str):
        return repr(name[:100])
    return repr(name) if isinstance(name, int) else _kind(name)


def _some(names: Iterable[object]) -> str:
    shown = [_short(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


# --- What the machine builds ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Symbol:
    """A global that a checkpoint may name. It is a name and nothing more."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """`num_elements` elements of one type, somewhere in the file; `key` says where."""

    key: str
    dtype: str
    num_elements: int

    @property
    def num_bytes(self) -> int:
        return self.num_elements * STORAGE_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view of a storage; offset and stride in elements. Equal ones are tied tensors."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * STORAGE_DTYPES[self.storage.dtype].itemsize


class Region(NamedTuple):
    """Where bytes lie in the file, and their CRC-32 where the container has one."""

    start: int
    num_bytes: int
    crc: int | None


class Archive(NamedTuple):
    """A container, opened: the value of its pickle, and where its storages lie."""

    tree: object
    regions: dict[str, Region]


STORAGE_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),  # numpy has no bfloat16: its bits
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
FLOATS = {"DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage"}

SYMBOLS = {
    name: Symbol(name)
    for name in (
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        *(f"torch.{storage}" for storage in STORAGE_DTYPES),
    )
}


def _reduce(function: object, args: object) -> object:
    """What calling an allowed symbol gives. Nothing is called: this match is all there is."""
    if type(function) is not Symbol:
        raise UnsafeCheckpoint(f"the pickle calls {_kind(function)}")
    if type(args) is not tuple:
        raise CheckpointError(f"{function.name} called with {_kind(args)}")
    match function.name, args:
        case "collections.OrderedDict", ():
            return OrderedDict()
        case "collections.OrderedDict", (list(pairs),):  # as Python 2 wrote it
            return _ordered_dict(pairs)
        case "torch.Size", (tuple(dims),):
            return _dims(dims)
        case "torch._utils._rebuild_tensor", (storage, offset, shape, stride):
            return _tensor(storage, offset, shape, stride)
        case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, stride, grad, hooks):
            tensor = _tensor(storage, offset, shape, stride)
            return _with_grad(tensor, grad, hooks)
        case "torch._utils._rebuild_parameter", (TensorRef() as tensor, grad, hooks):
            return _with_grad(tensor, grad, hooks)
    raise UnsafeCheckpoint(f"the pickle calls {function.name} with unexpected arguments")


def _ordered_dict(pairs: list) -> OrderedDict:
    result: OrderedDict = OrderedDict()
    for pair in pairs:
        if type(pair) not in (tuple, list) or len(pair) != 2:
            raise CheckpointError("an OrderedDict made of something other than pairs")
        _set_item(result, *pair)
    pairs[:] = [None]  # spent: a list that is named again and again would multiply the work
    return result


def _set_item(target: Any, key: object, value: object) -> None:
    if type(target) not in (dict, OrderedDict):
        raise CheckpointError(f"an item set on {_kind(target)}")
    # Hashing a deep tuple overflows the C stack, and large integers can be made to collide.
    if type(key) is not str and not (type(key) is int and abs(key) < MAX_KEY):
        raise UnsafeCheckpoint(f"{_kind(key)} as a dict key; only strings and small integers are")
    if key in target:
        raise CheckpointError(f"the dict key {_short(key)} occurs twice")
    target[key] = value


def _dims(dims: object, limit: int = MAX_DIM) -> tuple[int, ...]:
    if type(dims) is not tuple:
        raise CheckpointError(f"a shape that is {_kind(dims)}")
    if len(dims) > MAX_RANK:
        raise CheckpointError(f"a tensor of rank {len(dims)}; at most {MAX_RANK} is read")
    if not all(type(n) is int and 0 <= n < limit for n in dims):
        raise CheckpointError(f"dims or strides that are not integers from 0 to {limit - 1}")
    return dims


def _tensor(storage: object, offset: object, shape: object, stride: object) -> TensorRef:
    if type(storage) is not Storage:
        raise CheckpointError(f"a tensor made of {_kind(storage)}")
    shape, stride = _dims(shape), _dims(stride, MAX_STRIDE)
    if len(shape) != len(stride):
        raise CheckpointError(f"a tensor with {len(shape)} dims and {len(stride)} strides")
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    # An empty view reads nothing, and slicing may well leave its offset beyond the end.
    num_offsets = MAX_STRIDE if 0 in shape else storage.num_elements - last
    if type(offset) is not int or not 0 <= offset < num_offsets:
        raise CheckpointError(
            f"a tensor of shape {shape}, stride {stride} and offset {_short(offset)} "
            f"reaches out of its storage of {storage.num_elements} elements"
        )
    return TensorRef(storage, offset, shape, stride)


def _with_grad(tensor: TensorRef, grad: object, hooks: object) -> TensorRef:
    # torch writes an empty OrderedDict, always ("don't serialize hooks" in torch/_tensor.py).
    if hooks is not None and (not isinstance(hooks, dict) or hooks):
        raise UnsafeCheckpoint("a tensor with backward hooks")
    if type(grad) is not bool or (grad and tensor.storage.dtype not in FLOATS):
        raise CheckpointError("requires_grad should be a bool, and False for integers")
    return tensor


# --- The machine ----------------------------------------------------------------------------------


class Machine:
    """Runs the pickle that starts at `position` of `data`; `run` leaves `position` at its end.

    `num_items` is the length of the tuple that names a storage (5 in a zip archive, 6 in a stream).
    `storages` collects the storages that were named, by key. The opcodes are the rows of `OPCODES`.
    """

    def __init__(self, data: bytes, num_items: int):
        self.data = data
        self.position = 0
        self.num_items = num_items
        self.storages: dict[str, Storage] = {}

    def run(self) -> object:
        """The value that the pickle builds.

        Raises UnsafeCheckpoint and CheckpointError; stops after MAX_OPCODES.
        """
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each MARK
        self.memo: dict[int, Any] = {}
        start = self.position
        try:
            for _ in range(MAX_OPCODES):
                start = self.position
                code = self.data[start]
                self.position += 1
                if code == STOP:
                    return _check_nesting(self.stack.pop())
                if code not in OPCODES:
                    raise UnsafeCheckpoint(
                        f"opcode {bytes([code])!r} at byte {start} of the pickle, which torch.save "
                        f"never writes; nothing of it was run. If you trust it: {HOW_TO_CONVERT}"
                    )
                OPCODES[code](self)
        except (IndexError, KeyError, ValueError) as error:
            # The end of the data, an empty stack, an unknown memo, text that is no number.
            raise CheckpointError(f"malformed or truncated pickle, at byte {start}") from error
        raise UnsafeCheckpoint(f"a pickle of more than {MAX_OPCODES} opcodes")

    # What follows an opcode

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise IndexError
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        if size > MAX_INTEGER:
            raise UnsafeCheckpoint(f"an integer of {size} bytes in the pickle")
        return int.from_bytes(self.take(size), "little", signed=True)

    def double(self) -> float:
        return struct.unpack(">d", self.take(8))[0]

    def string(self, length_size: int) -> str:
        length = self.unsigned(length_size)
        if length > MAX_STRING:
            raise UnsafeCheckpoint(f"a string of {length} bytes in the pickle")
        return self.take(length).decode()

    def line(self) -> str:
        end = self.data.index(b"\n", self.position, self.position + MAX_LINE)
        line = self.take(end - self.position)
        self.position += 1
        return line.decode()

    def int_line(self) -> int | bool:
        text = self.line()
        if len(text) > 2 * MAX_INTEGER:
            raise UnsafeCheckpoint(f"an integer of {len(text)} digits in the pickle")
        bools = {"00": False, "01": True}
        return bools[text] if text in bools else int(text.removesuffix("L"))

    # The stack and the memo

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_many(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def mark(self) -> None:
        if len(self.marked) == MAX_NESTING:
            raise UnsafeCheckpoint(f"a pickle nested deeper than {MAX_NESTING}")
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    # Containers

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise CheckpointError(f"items appended to {_kind(self.stack[-1])}")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set_item(self.stack[-1], key, value)

    def dict_of(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    # What makes pickles dangerous: names, calls, state, and references to things outside

    def name_symbol(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise UnsafeCheckpoint("a global that is not named by strings")
        full_name = f"{module}.{name}"
        # With a dot in `name`, it is an attribute of something else that spells the same.
        if full_name not in SYMBOLS or "." in name:
            raise UnsafeCheckpoint(
                f"the pickle asks for {full_name[:200]}, which is not part of a tensor; nothing of "
                f"it was run. If you trust it: {HOW_TO_CONVERT}"
            )
        self.push(SYMBOLS[full_name])

    def instance(self) -> None:
        raise UnsafeCheckpoint(f"the pickle makes a {self.line()[:200]}.{self.line()[:200]}")

    def reduce(self) -> None:
        function, args = self.pop_many(2)
        self.push(_reduce(function, args))

    def build(self) -> None:
        # state_dict() keeps its modules' versions in an attribute: dropped, they hold no weights.
        state = self.pop()
        if type(self.stack[-1]) is not OrderedDict or type(state) is not dict:
            raise UnsafeCheckpoint(f"the pickle sets the state of {_kind(self.stack[-1])}")

    def persistent_id(self) -> None:
        name = self.pop()
        if type(name) is not tuple or len(name) != self.num_items or name[0] != "storage":
            raise UnsafeCheckpoint("the pickle refers to something other than a storage")
        _, symbol, key, location, num_elements, *view = name
        dtype = symbol.name.removeprefix("torch.") if type(symbol) is Symbol else None
        if dtype not in STORAGE_DTYPES or type(key) is not str or type(location) is not str:
            raise CheckpointError("a storage without a type, a key or a location")
        if type(num_elements) is not int or not 0 <= num_elements < 2**56:
            raise CheckpointError(f"storage {_short(key)} has an impossible size")
        if view not in ([], [None]):
            raise UnsupportedFormat(f"has views of storages, as torch < 0.4: {HOW_TO_CONVERT}")
        storage = Storage(key, dtype, num_elements)
        if self.storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"storage {_short(key)} has two types or sizes")
        self.push(storage)


STOP = ord(".")
# Protocol 2 is what torch.save writes; the rest is read so that a gadget can be named.
OPCODES: dict[int, Callable[[Machine], object]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    # Constants
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord(")"): lambda m: m.push(()),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    # Numbers: BININT1, BININT2, BININT, LONG1, BINFLOAT; and as text INT, LONG, FLOAT
    ord("K"): lambda m: m.push(m.unsigned(1)),
    ord("M"): lambda m: m.push(m.unsigned(2)),
    ord("J"): lambda m: m.push(m.signed(4)),
    0x8A: lambda m: m.push(m.signed(m.unsigned(1))),
    ord("G"): lambda m: m.push(m.double()),
    ord("I"): lambda m: m.push(m.int_line()),
    ord("L"): lambda m: m.push(m.int_line()),
    ord("F"): lambda m: m.push(float(m.line())),
    # Strings: BINUNICODE, SHORT_BINUNICODE, Python 2's BINSTRING and SHORT_BINSTRING, UNICODE
    ord("X"): lambda m: m.push(m.string(4)),
    0x8C: lambda m: m.push(m.string(1)),
    ord("T"): lambda m: m.push(m.string(4)),
    ord("U"): lambda m: m.push(m.string(1)),
    ord("V"): lambda m: m.push(m.line().encode("latin-1").decode("raw-unicode-escape")),
    # The memo: BINPUT, LONG_BINPUT, PUT, MEMOIZE; BINGET, LONG_BINGET, GET
    ord("q"): lambda m: m.put(m.unsigned(1)),
    ord("r"): lambda m: m.put(m.unsigned(4)),
    ord("p"): lambda m: m.put(m.int_line()),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.unsigned(1)),
    ord("j"): lambda m: m.get(m.unsigned(4)),
    ord("g"): lambda m: m.get(m.int_line()),
    # The stack: MARK, POP, POP_MARK, DUP
    ord("("): Machine.mark,
    ord("0"): Machine.pop,
    ord("1"): Machine.pop_mark,
    ord("2"): lambda m: m.push(m.stack[-1]),
    # Containers: TUPLE, TUPLE1 to TUPLE3, LIST, APPEND, APPENDS, DICT, SETITEM, SETITEMS
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.push(tuple(m.pop_many(1))),
    0x86: lambda m: m.push(tuple(m.pop_many(2))),
    0x87: lambda m: m.push(tuple(m.pop_many(3))),
    ord("l"): lambda m: m.push(m.pop_mark()),
    ord("a"): lambda m: m.extend(m.pop_many(1)),
    ord("e"): lambda m: m.extend(m.pop_mark()),
    ord("d"): lambda m: m.dict_of(m.pop_mark()),
    ord("s"): lambda m: m.set_items(m.pop_many(2)),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    # GLOBAL, STACK_GLOBAL, INST, REDUCE, BUILD, BINPERSID
    ord("c"): lambda m: m.name_symbol(m.line(), m.line()),
    0x93: lambda m: m.name_symbol(*m.pop_many(2)),
    ord("i"): Machine.instance,
    ord("R"): Machine.reduce,
    ord("b"): Machine.build,
    ord("Q"): Machine.persistent_id,
}


def _check_nesting(root: object) -> object:
    """Refuse a value deeper than MAX_NESTING. No recursion; what is shared is visited once."""
    level: list[Any] = [root]
    seen: set[int] = set()
    for _ in range(MAX_NESTING):
        level = [item for item in level if type(item) in (tuple, list, dict, OrderedDict)]
        level = list({id(item): item for item in level if id(item) not in seen}.values())
        if not level:
            return root
        seen.update(map(id, level))
        level = [child for c in level for child in (c.values() if isinstance(c, dict) else c)]
    raise UnsafeCheckpoint(f"a pickle nested deeper than {MAX_NESTING}")


# --- The stream (torch < 1.6) ---------------------------------------------------------------------

STREAM_MAGIC = 0x1950A86A20F9469CFC6C
STREAM_VERSION = 1001


def _read_stream(file: io.BufferedReader, size: int) -> Archive:
    """Five pickles (magic, version, machine, value, storage keys), then each storage's elements."""
    file.seek(0)
    data = file.read(MAX_PICKLE)
    _check_first_bytes(data)
    machine = Machine(data, num_items=6)
    if machine.run() != STREAM_MAGIC:
        raise UnsupportedFormat(f"is a pickle, but not one that torch.save wrote: {HOW_TO_CONVERT}")
    if machine.run() != STREAM_VERSION:
        raise UnsupportedFormat(f"has an unknown version of torch's format: {HOW_TO_CONVERT}")
    match machine.run():
        case {"little_endian": True}:
            pass
        case _:
            raise UnsupportedFormat(f"was not written by a little-endian machine: {HOW_TO_CONVERT}")
    tree = machine.run()
    keys = machine.run()
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise CheckpointError("the list of storages is malformed")
    if len(keys) != len(machine.storages) or set(keys) != machine.storages.keys():
        raise CheckpointError("the list of storages and the tensors disagree")
    storages = [machine.storages[key] for key in keys]
    return Archive(tree, _stream_regions(file, machine.position, storages, size))


def _stream_regions(
    file: io.BufferedReader, position: int, storages: list[Storage], size: int
) -> dict[str, Region]:
    regions = {}
    for storage in storages:
        file.seek(position)
        if int.from_bytes(file.read(8), "little") != storage.num_elements:
            raise CheckpointError(f"storage {_short(storage.key)} is not where it should be")
        regions[storage.key] = Region(position + 8, storage.num_bytes, None)
        position += 8 + storage.num_bytes
    if position != size:
        raise CheckpointError(f"its storages end at byte {position}, the file has {size}")
    return regions


def _check_first_bytes(data: bytes) -> None:
    kind = looks_like(data)
    if kind == "a tar archive":
        raise UnsupportedFormat(f"is a tar archive, as torch < 0.2 wrote: {HOW_TO_CONVERT}")
    if kind != "a pickle":
        raise CheckpointError(f"is not a PyTorch checkpoint: it looks like {kind}")


SIGNATURES = (  # in lower case
    (b"pk\x03\x04", "a zip archive"),
    (b"version https://git-lfs", "a git-lfs pointer: the file itself was never fetched"),
    (b"<!doctype html", "an HTML page: an error or login page, perhaps"),
    (b"<html", "an HTML page: an error or login page, perhaps"),
    (b"<?xml", "an XML page: an error of the server, perhaps"),
    (b"{", "JSON text: an error of the server, perhaps"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"gguf", "a GGUF file"),
    (b"\x89hdf", "an HDF5 file"),
    (b"\x93numpy", "a NumPy file"),
)


def looks_like(first_bytes: bytes) -> str:
    """Say what a file is by its first 512 bytes: "an HTML page", "a zip archive"."""
    if not first_bytes:
        return "an empty file"
    if first_bytes[5:9] == b"\0\0\0{":  # after the length of the header, which is below 2**40
        return "a safetensors file"
    if first_bytes[257:262] == b"ustar":
        return "a tar archive"
    text = first_bytes[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, kind in SIGNATURES:
        if text.startswith(signature):
            return kind
    # Protocol 2 and later start with PROTO; before, with one of these opcodes.
    if first_bytes[0] == 0x80 or (first_bytes[0] in b"(]}cINVLF" and b"\n" in first_bytes[:512]):
        return "a pickle"
    return f"something else: it starts with {first_bytes[:8]!r}"


def _starts(file: io.BufferedReader, signature: bytes) -> bool:
    file.seek(0)
    return file.read(len(signature)) == signature


# --- The zip archive (torch >= 1.6) ---------------------------------------------------------------

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END_LOCATOR64 = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # "the real figure is in the zip64 field"
HAS_DESCRIPTOR, UTF8 = 0x8, 0x800


class Member(NamedTuple):
    """A file in a zip archive, as the central directory describes it."""

    name: bytes
    flags: int
    crc: int
    size: int
    header_start: int
    is_stored: bool  # neither compressed nor encrypted


def _read_zip(file: io.BufferedReader, size: int) -> Archive:
    """`<root>/data.pkl` and `<root>/data/<key>` for each storage, all stored, none compressed."""
    members, directory_start = _central_directory(file, size)
    if any(b"/code/" in m.name or m.name.endswith(b"/constants.pkl") for m in members):
        raise UnsupportedFormat(
            f"is a TorchScript archive, a program (`torch.jit.load` reads it): {HOW_TO_CONVERT}"
        )
    regions = _member_regions(file, members, directory_start)
    root = _archive_root(regions)
    _check_byte_order(file, regions, root)

    pickle = regions[f"{root}/data.pkl"]
    if pickle.num_bytes > MAX_PICKLE:
        raise UnsafeCheckpoint(f"a pickle of {pickle.num_bytes} bytes; at most {MAX_PICKLE}")
    machine = Machine(_read_region(file, pickle, "data.pkl").tobytes(), num_items=5)
    tree = machine.run()
    if machine.position != pickle.num_bytes:
        raise CheckpointError("the pickle is followed by other bytes")

    storages = {}
    for key, storage in machine.storages.items():
        region = regions.get(f"{root}/data/{key}")
        if region is None or not (key.isascii() and key.isdigit()):
            raise CheckpointError(f"storage {_short(key)} is not in the archive")
        if region.num_bytes != storage.num_bytes:
            raise CheckpointError(
                f"storage {key} should have {storage.num_bytes} bytes, it has {region.num_bytes}"
            )
        storages[key] = region
    return Archive(tree, storages)


def _archive_root(regions: Mapping[str, Region]) -> str:
    pickles = [name for name in regions if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"is not a PyTorch checkpoint: a zip with {len(pickles)} */data.pkl")
    root = pickles[0].removesuffix("/data.pkl")
    strays = [name for name in regions if not name.startswith(f"{root}/")]
    if strays or "/" in root:
        raise CheckpointError(f"a zip archive of more than one folder: {_some(strays or pickles)}")
    return root


def _check_byte_order(file: io.BufferedReader, regions: Mapping[str, Region], root: str) -> None:
    region = regions.get(f"{root}/byteorder")
    order = b"little" if region is None else _read_small(file, region, "byteorder")
    if order == b"big":
        raise UnsupportedFormat(f"was written by a big-endian machine: {HOW_TO_CONVERT}")
    if order != b"little":
        raise CheckpointError(f"unknown byte order {order!r}")
    version = regions.get(f"{root}/version") or regions.get(f"{root}/.data/version")
    if version is None or not _read_small(file, version, "version").strip().isdigit():
        raise CheckpointError("the archive does not say which version of torch's format it has")


def _central_directory(file: io.BufferedReader, size: int) -> tuple[list[Member], int]:
    """The members of the archive, and where their list starts; it must end where the file ends."""
    end_start = size - END.size
    signature, _, _, _, count, directory_size, start, comment = _unpack(file, end_start, END)
    if signature != b"PK\5\6" or comment:
        raise CheckpointError("truncated: a zip archive without its directory at the end")
    locator_start = end_start - END_LOCATOR64.size
    signature, _, end64_start, _ = _unpack(file, locator_start, END_LOCATOR64)
    if signature == b"PK\6\7":  # torch always writes it; figures that fit are in both
        if end64_start + END64.size != locator_start:
            raise CheckpointError("the zip64 directory is not where it should be")
        signature, *_, count64, size64, start64 = _unpack(file, end64_start, END64)
        agrees = count in (count64, FULL16) and directory_size in (size64, FULL32)
        if signature != b"PK\6\6" or not agrees or start not in (start64, FULL32):
            raise CheckpointError("the zip directory and the zip64 directory disagree")
        end_start, count, directory_size, start = end64_start, count64, size64, start64
    if start + directory_size != end_start:
        raise CheckpointError("the zip directory is not where it should be")
    if count > MAX_MEMBERS or directory_size > MAX_PICKLE:
        raise UnsafeCheckpoint(f"a zip archive of {count} members; at most {MAX_MEMBERS} are read")

    file.seek(start)
    directory = file.read(directory_size)
    members, position = [], 0
    try:
        for _ in range(count):
            member, position = _central_entry(directory, position)
            members.append(member)
    except struct.error as error:
        raise CheckpointError("the zip directory is truncated") from error
    if position != directory_size:
        raise CheckpointError("the zip directory has bytes that belong to no member")
    return members, start


def _central_entry(directory: bytes, position: int) -> tuple[Member, int]:
    """The member described at `position` of the directory, and the position of the next."""
    fields = CENTRAL_HEADER.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
    name_size, extra_size, comment_size, disk, _, _, start = fields[10:]
    name_start = position + CENTRAL_HEADER.size
    name = directory[name_start : name_start + name_size]
    extra_start = name_start + name_size
    extra = directory[extra_start : extra_start + extra_size]

    if signature != b"PK\1\2" or disk or extra_size > MAX_EXTRA:
        raise CheckpointError("the zip directory is malformed")
    size, packed, start = _zip64((size, packed, start), extra)
    stored = method == 0 and size == packed and not flags & ~(HAS_DESCRIPTOR | UTF8)
    return Member(name, flags, crc, size, start, stored), extra_start + extra_size + comment_size


def _zip64(values: tuple[int, ...], extra: bytes) -> list[int]:
    """Replace those of `values` that did not fit 32 bits by what the extra field says."""
    wide = b""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + size]
        extra = extra[4 + size :]
    result = []
    for value in values:
        if value == FULL32:
            value, wide = struct.unpack_from("<Q", wide)[0], wide[8:]
        result.append(value)
    return result


def _member_regions(file: io.BufferedReader, members: list[Member], end: int) -> dict[str, Region]:
    """Where each member's bytes lie, before `end`; local headers agree, and nothing overlaps."""
    regions: dict[str, Region] = {}
    position = 0
    for member in sorted(members, key=lambda member: member.header_start):
        if member.header_start < position:
            raise CheckpointError(f"{member.name[:100]!r} overlaps another member of the archive")
        name = _member_name(member)
        if name in regions:
            raise CheckpointError(f"{_short(name)} occurs twice in the archive")
        if not member.is_stored:
            raise CheckpointError(f"{_short(name)} is compressed or encrypted; torch does neither")
        if member.header_start + member.size > end:
            raise CheckpointError(f"{_short(name)} reaches out of the archive")
        region, position = _local_region(file, member)
        if position > end:
            raise CheckpointError(f"{_short(name)} reaches into the directory of the archive")
        regions[name] = region
    return regions


def _member_name(member: Member) -> str:
    try:
        name = member.name.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"a member's name is not UTF-8: {member.name[:100]!r}") from error
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or not name.isprintable() or "\\" in name:
        raise UnsafeCheckpoint(f"a member of the archive has a path for a name: {_short(name)}")
    return name


def _local_region(file: io.BufferedReader, member: Member) -> tuple[Region, int]:
    """Where the member's bytes lie, and where the member ends with its data descriptor."""
    fields = _unpack(file, member.header_start, LOCAL_HEADER)
    signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = fields
    # With a descriptor, the figures follow the data and the local header may have zeros.
    if flags & HAS_DESCRIPTOR and (crc, packed, size) == (0, 0, 0):
        crc, packed, size = member.crc, member.size, member.size
    agrees = (
        signature == b"PK\3\4"
        and (flags, method) == (member.flags, 0)
        and crc == member.crc
        and {packed, size} <= {member.size, FULL32}
        and file.read(name_size) == member.name
    )
    if not agrees:
        raise CheckpointError(f"{member.name[:100]!r}: the archive's two headers disagree")

    start = member.header_start + LOCAL_HEADER.size + name_size + extra_size
    end = start + member.size
    if flags & HAS_DESCRIPTOR:
        file.seek(end)
        found = file.read(24)
        descriptor = next((d for d in _descriptors(member) if found.startswith(d)), None)
        if descriptor is None:
            raise CheckpointError(f"{member.name[:100]!r}: the data descriptor disagrees")
        end += len(descriptor)
    return Region(start, member.size, member.crc), end


def _descriptors(member: Member) -> Iterator[bytes]:
    """The two forms that follow the data of a member, with sizes of 64 and of 32 bits."""
    yield struct.pack("<4sI2Q", b"PK\7\10", member.crc, member.size, member.size)
    if member.size <= FULL32:
        yield struct.pack("<4s3I", b"PK\7\10", member.crc, member.size, member.size)


def _unpack(file: io.BufferedReader, position: int, layout: struct.Struct) -> tuple:
    if position < 0:
        raise CheckpointError("the archive is truncated")
    file.seek(position)
    data = file.read(layout.size)
    if len(data) != layout.size:
        raise CheckpointError("the archive is truncated")
    return layout.unpack(data)


# --- Reading storages -----------------------------------------------------------------------------


def _check_total(tensors: Mapping[str, TensorRef], file_size: int) -> None:
    """Refuse to allocate more than a file of that size can honestly ask for, by expanding."""
    total = sum(ref.num_bytes for ref in set(tensors.values()))
    if total > 4 * file_size + MAX_EXPANDED:
        raise UnsafeCheckpoint(f"a file of {file_size} bytes asks for {total} bytes of tensors")


def _read_storages(
    file: io.BufferedReader, tensors: Mapping[str, TensorRef], regions: Mapping[str, Region]
) -> dict[str, mx.array]:
    """The tensors as arrays, in the same order; storages are read once, in the file's order."""
    views: dict[str, set[TensorRef]] = {}
    for ref in tensors.values():
        views.setdefault(ref.storage.key, set()).add(ref)
    arrays: dict[TensorRef, mx.array] = {}
    for key in sorted(views, key=lambda key: regions[key].start):
        buffer = _read_region(file, regions[key], f"storage {key}")
        arrays.update((ref, _to_array(buffer, ref)) for ref in views[key])
    return {name: arrays[ref] for name, ref in tensors.items()}


def _to_array(buffer: np.ndarray, ref: TensorRef) -> mx.array:
    """Copy one view of a storage's bytes into an array of its own."""
    dtype = STORAGE_DTYPES[ref.storage.dtype]
    if ref.storage.dtype == "BoolStorage" and buffer.size and buffer.max() > 1:
        raise CheckpointError(f"storage {_short(ref.storage.key)} has bools other than 0 and 1")
    if 0 in ref.shape:
        view = np.zeros(ref.shape, dtype)
    else:
        strides = [step * dtype.itemsize for step in ref.stride]
        view = np.ndarray(ref.shape, dtype, buffer, ref.offset * dtype.itemsize, strides)
    if ref.storage.dtype == "DoubleStorage":
        return mx.array(view, dtype=mx.float64)  # MLX makes it float32 unless told
    array = mx.array(view)
    return array.view(mx.bfloat16) if ref.storage.dtype == "BFloat16Storage" else array


def _read_region(file: io.BufferedReader, region: Region, what: str) -> np.ndarray:
    """The bytes of a region (uint8), checked against its CRC where there is one."""
    buffer = np.empty(region.num_bytes, np.uint8)
    file.seek(region.start)
    if file.readinto(buffer.data) != region.num_bytes:
        raise CheckpointError(f"truncated in {what}")
    if region.crc is not None and zlib.crc32(buffer.data) != region.crc:
        raise IntegrityError(f"{what} does not have the CRC-32 that the archive promises")
    return buffer


def _read_small(file: io.BufferedReader, region: Region, what: str) -> bytes:
    if region.num_bytes > 64:
        raise CheckpointError(f"{what} has {region.num_bytes} bytes")
    return _read_region(file, region, what).tobytes()
