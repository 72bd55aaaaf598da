"""The pickle of a PyTorch checkpoint, run without trusting it.

A pickle is a program. Here it runs on a small machine of our own that knows the opcodes of
`torch.save` and five callables, and builds inert values only: nothing is imported, nothing of the
file is called. Tensors become descriptions (`TensorRef`) of storages elsewhere in the file.

Sources: CPython's pickletools.py for the opcodes; torch/_utils.py (`_rebuild_tensor_v2`) and
torch/serialization.py (`persistent_id`) for what they say.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_zoo.errors import CheckpointError, UnsafeCheckpoint, UnsupportedFormat

MAX_OPCODES = 1_000_000  # ten thousand tensors take about 400,000
MAX_PROTOCOL = 5
MAX_STRING = 1 << 20  # bytes
MAX_INTEGER = 16  # bytes; torch's magic number has 10
MAX_LINE = 512  # bytes of a text opcode's argument
MAX_KEY = 2**31  # integer keys: beyond, hashes can be made to collide
MAX_NESTING = 64
MAX_RANK = 32
MAX_DIM = 2**31
MAX_STRIDE = 2**48
MAX_ELEMENTS = 2**56  # of a storage

HOW_TO_CONVERT = (
    "load it in torch, then `safetensors.torch.save_file(model.state_dict(), 'model.safetensors')`"
)


# --- What the machine builds ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Symbol:
    """A global that a checkpoint may name. It is a name and nothing more."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """`num_elements` elements of one type, somewhere in the file; `key` says where."""

    key: str
    dtype: str  # a key of STORAGE_DTYPES
    num_elements: int

    @property
    def num_bytes(self) -> int:
        return self.num_elements * STORAGE_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view of a storage; offset and strides in elements. Equal ones are tied tensors."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * STORAGE_DTYPES[self.storage.dtype].itemsize


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


# Tensors of a kind that is not read: honest ones, so the error is not that of a gadget.
OTHER_TENSORS = {
    "torch._utils._rebuild_tensor_v3": "of a type that MLX lacks or torch rarely writes (float8?)",
    "torch.ComplexFloatStorage": "complex",
    "torch.ComplexDoubleStorage": "complex",
    "torch._utils._rebuild_qtensor": "quantised by torch",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_meta_tensor_no_storage": "without values (on the meta device)",
}


def _reduce(function: object, args: object) -> object:
    """What calling an allowed symbol gives. Nothing is called: this match is all there is."""
    if type(function) is not Symbol:
        raise UnsafeCheckpoint(f"the pickle calls {kind_of(function)}")
    if type(args) is not tuple:
        raise CheckpointError(f"{function.name} called with {kind_of(args)}")
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
            _check_grad(tensor, grad, hooks)
            return tensor
        case "torch._utils._rebuild_parameter", (TensorRef() as tensor, grad, hooks):
            _check_grad(tensor, grad, hooks)
            return tensor
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
        raise CheckpointError(f"an item set on {kind_of(target)}")
    # Hashing a deep tuple overflows the C stack, and large integers can be made to collide.
    if type(key) is not str and not (type(key) is int and abs(key) < MAX_KEY):
        raise UnsafeCheckpoint(f"{kind_of(key)} as a dict key; only strings and small integers are")
    if key in target:
        raise CheckpointError(f"the dict key {short_repr(key)} occurs twice")
    target[key] = value


def _dims(dims: object, limit: int = MAX_DIM) -> tuple[int, ...]:
    if type(dims) is not tuple:
        raise CheckpointError(f"a shape that is {kind_of(dims)}")
    if len(dims) > MAX_RANK:
        raise CheckpointError(f"a tensor of rank {len(dims)}; at most {MAX_RANK} is read")
    if not all(type(n) is int and 0 <= n < limit for n in dims):
        raise CheckpointError(f"dims or strides that are not integers from 0 to {limit - 1}")
    return dims


def _tensor(storage: object, offset: object, shape: object, stride: object) -> TensorRef:
    if type(storage) is not Storage:
        raise CheckpointError(f"a tensor made of {kind_of(storage)}")
    shape, stride = _dims(shape), _dims(stride, MAX_STRIDE)
    if len(shape) != len(stride):
        raise CheckpointError(f"a tensor with {len(shape)} dims and {len(stride)} strides")
    reach = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    # An empty view reads nothing, and slicing may well leave its offset beyond the end.
    limit = MAX_STRIDE if 0 in shape else storage.num_elements - reach
    if type(offset) is not int or not 0 <= offset < limit:
        raise CheckpointError(
            f"a tensor of shape {shape}, stride {stride} and offset {short_repr(offset)} "
            f"reaches out of its storage of {storage.num_elements} elements"
        )
    return TensorRef(storage, offset, shape, stride)


def _check_grad(tensor: TensorRef, grad: object, hooks: object) -> None:
    # torch writes an empty OrderedDict, always ("don't serialize hooks" in torch/_tensor.py).
    if hooks is not None and (not isinstance(hooks, dict) or hooks):
        raise UnsafeCheckpoint("a tensor with backward hooks")
    if type(grad) is not bool or (grad and tensor.storage.dtype not in FLOATS):
        raise CheckpointError("requires_grad should be a bool, and False for integers")


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
        self.frame_end = start = self.position
        try:
            for _ in range(MAX_OPCODES):
                start = self.position
                code = self.data[start]
                self.position += 1
                if code == STOP:
                    value = self.pop()
                    _check_nesting(value)
                    return value
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
        taken = self.data[self.position : self.position + size]
        if len(taken) < size or self.position < self.frame_end < self.position + size:
            raise IndexError  # the end of the data, or of a frame
        self.position += size
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
        return self.take(end + 1 - self.position)[:-1].decode()

    def int_line(self) -> int | bool:
        text = self.line()
        if len(text) > 2 * MAX_INTEGER:
            raise UnsafeCheckpoint(f"an integer of {len(text)} digits in the pickle")
        if text in ("00", "01"):  # how protocol 0 writes False and True
            return text == "01"
        return int(text.removesuffix("L"))

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

    def protocol(self) -> None:
        if (number := self.unsigned(1)) > MAX_PROTOCOL:
            raise CheckpointError(f"a pickle of protocol {number}, which does not exist")

    def frame(self) -> None:
        size = self.unsigned(8)
        if self.position < self.frame_end or size > len(self.data) - self.position:
            raise IndexError  # a frame within a frame, or one that is cut short
        self.frame_end = self.position + size

    def put(self, index: int) -> None:
        if not 0 <= index < MAX_OPCODES:
            raise UnsafeCheckpoint(f"place {short_repr(index)} of the pickle's memo")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    # Containers

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise CheckpointError(f"items appended to {kind_of(self.stack[-1])}")
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
        if full_name in OTHER_TENSORS:
            raise UnsupportedFormat(
                f"holds tensors that are {OTHER_TENSORS[full_name]}; "
                "make them plain floats in torch (`tensor.float()`) and save again"
            )
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
            raise UnsafeCheckpoint(f"the pickle sets the state of {kind_of(self.stack[-1])}")

    def persistent_id(self) -> None:
        name = self.pop()
        if type(name) is not tuple or len(name) != self.num_items or name[0] != "storage":
            raise UnsafeCheckpoint("the pickle refers to something other than a storage")
        _, symbol, key, location, num_elements, *view = name
        dtype = symbol.name.removeprefix("torch.") if type(symbol) is Symbol else None
        if dtype not in STORAGE_DTYPES or type(key) is not str or type(location) is not str:
            raise CheckpointError("a storage without a type, a key or a location")
        if type(num_elements) is not int or not 0 <= num_elements < MAX_ELEMENTS:
            raise CheckpointError(f"storage {short_repr(key)} has an impossible size")
        if view not in ([], [None]):
            raise UnsupportedFormat(f"has views of storages, as torch < 0.4: {HOW_TO_CONVERT}")
        storage = Storage(key, dtype, num_elements)
        if self.storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"storage {short_repr(key)} has two types or sizes")
        self.push(storage)


STOP = ord(".")
# Protocol 2 is what torch.save writes; the rest is read so that a gadget can be named.
OPCODES: dict[int, Callable[[Machine], object]] = {
    0x80: Machine.protocol,
    0x95: Machine.frame,
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


def _check_nesting(root: object) -> None:
    """Refuse a value deeper than MAX_NESTING. No recursion; what is shared is visited once."""
    level: list[Any] = [root]
    seen: set[int] = set()
    for _ in range(MAX_NESTING):
        level = [item for item in level if type(item) in (tuple, list, dict, OrderedDict)]
        level = list({id(item): item for item in level if id(item) not in seen}.values())
        if not level:
            return
        seen.update(map(id, level))
        level = [child for c in level for child in (c.values() if isinstance(c, dict) else c)]
    raise UnsafeCheckpoint(f"a pickle nested deeper than {MAX_NESTING}")


# --- Naming what a file holds ---------------------------------------------------------------------


def kind_of(value: object) -> str:
    """ "an int", "a list", "torch.Size": never the value itself, whose repr may be deep."""
    if isinstance(value, Symbol):
        return value.name
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def short_repr(name: object) -> str:
    """The repr of a dict key or of a name, which may be long, or no name at all."""
    if isinstance(name, str):
        return repr(name[:100])
    return repr(name) if isinstance(name, int) else kind_of(name)
