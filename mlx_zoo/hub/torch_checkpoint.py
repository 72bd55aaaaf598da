"""PyTorch checkpoints (.pth, .bin, .pt) without torch: a file becomes a state dict of arrays.

Two containers hold a checkpoint's pickle: a zip archive (since torch 1.6; `zip_archive` opens it),
and before it a stream of five pickles followed by raw storages, which has no checksum. Reading has
three steps: `pickle_machine` builds a tree in which tensors are descriptions of storages in the
file; every description is checked against the size of the file; only then are the tensors that are
wanted read, one storage at a time.

Source: torch/serialization.py (`_save`, `_legacy_save`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from mlx_zoo.errors import CheckpointError, IntegrityError, UnsafeCheckpoint, UnsupportedFormat
from mlx_zoo.hub.pickle_machine import (
    HOW_TO_CONVERT,
    STORAGE_DTYPES,
    Machine,
    Storage,
    TensorRef,
    kind_of,
    short_repr,
)
from mlx_zoo.hub.zip_archive import (
    Region,
    central_directory,
    check_crc,
    member_regions,
    read_region,
    read_unchecked,
)

MAX_PICKLE = 32 << 20  # bytes
MAX_EXPANDED = 16 << 20  # bytes that expanded tensors may take, over three times the file's own

# What a training script may nest its state dict under, in the order of preference. Averaged
# weights come last: timm, too, takes them only when asked.
WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema")
# What DistributedDataParallel and torch.compile put before every name.
PREFIXES = ("module.", "_orig_mod.")
# Entries of a state dict that are no tensors and carry no weights: the versions of its modules.
INERT = {"_metadata"}


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read the state dict in the PyTorch checkpoint at `path`: names to arrays, bit for bit.

    Nested training checkpoints are unwrapped (see `unwrap`). The names are as they are in the file:
    whether all have a prefix, only all shards together say (see `strip_prefixes`). Tensors that are
    one view of one storage are one array; tensors of a training checkpoint that are not in its
    state dict are not read. Needs memory for the tensors and one storage more.

    Raises UnsafeCheckpoint for a pickle that asks for anything but tensors, naming it;
    UnsupportedFormat for TorchScript, tar-era and big-endian files, saying how to convert them;
    IntegrityError for a wrong checksum; CheckpointError for all else that is malformed.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            is_zip = file.read(2) == b"PK"
            archive = _read_zip(file, size) if is_zip else _read_stream(file, size)
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
        raise CheckpointError(f"holds {kind_of(tree)}, not a state dict")
    nested = (tree[key] for key in WRAPPERS if _holds_tensors(tree.get(key)))
    found = next(nested, tree)
    tensors = {name: value for name, value in found.items() if name not in INERT}

    if not _holds_tensors(tensors):
        raise CheckpointError(
            f"no tensors at the top level or under {', '.join(WRAPPERS)}; it holds {_some(tree)}"
        )
    others = [name for name, value in tensors.items() if not _is_tensor(value)]
    if others:
        kinds = ", ".join(f"{short_repr(name)} ({kind_of(tensors[name])})" for name in others[:5])
        raise CheckpointError(f"{len(others)} entries of the state dict are no tensors: {kinds}")
    unnamed = [name for name in tensors if not isinstance(name, str)]
    if unnamed:
        raise CheckpointError(f"tensors named by something other than a string: {_some(unnamed)}")
    return tensors


def strip_prefixes(tensors: Mapping[str, T]) -> dict[str, T]:
    """Strip `module.` and `_orig_mod.`, as often as every name has them."""
    start = 0  # the names are cut once, at the end: one may be a megabyte of prefixes
    while prefix := next((p for p in PREFIXES if _all_have(tensors, p, start)), None):
        start += len(prefix)
    return {name[start:]: value for name, value in tensors.items()}


def _all_have(names: Collection[str], prefix: str, start: int) -> bool:
    """Whether every name has `prefix` at `start`, and something after it."""
    end = start + len(prefix)
    return bool(names) and all(n.startswith(prefix, start) and len(n) > end for n in names)


def _is_tensor(value: object) -> bool:
    return isinstance(value, (mx.array, TensorRef))


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(map(_is_tensor, value.values()))


def _some(names: Iterable[object]) -> str:
    shown = [short_repr(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


# --- The two containers ---------------------------------------------------------------------------

STREAM_MAGIC = 0x1950A86A20F9469CFC6C
STREAM_VERSION = 1001
MAX_VERSION = 10  # of a zip; torch/include/caffe2/serialize/versions.h


class Archive(NamedTuple):
    """A container, opened: the value of its pickle, and where its storages lie."""

    tree: object
    regions: dict[str, Region]


def _read_zip(file: io.BufferedReader, size: int) -> Archive:
    """`<root>/data.pkl`, and `<root>/data/<key>` for each storage, where root is any folder."""
    members, directory_start = central_directory(file, size)
    if members and all(m.name.endswith(b".npy") for m in members):
        raise other_kind("a NumPy archive")
    if any(b"/code/" in m.name or m.name.endswith(b"/constants.pkl") for m in members):
        raise UnsupportedFormat(
            f"is a TorchScript archive, a program (`torch.jit.load` reads it): {HOW_TO_CONVERT}"
        )
    if any(m.name.endswith(b"/archive_format") for m in members):
        raise UnsupportedFormat(
            f"is an archive of torch.export, a program (`torch.export.load` reads it): "
            f"{HOW_TO_CONVERT}"
        )
    regions = member_regions(file, members, directory_start)
    root = _archive_root(regions)
    _check_byte_order(file, regions.get(f"{root}/byteorder"))
    _check_version(file, regions.get(f"{root}/.data/version") or regions.get(f"{root}/version"))
    _check_notes(file, regions, root)

    pickle = regions[f"{root}/data.pkl"]
    if pickle.num_bytes > MAX_PICKLE:
        raise UnsafeCheckpoint(f"a pickle of {pickle.num_bytes} bytes; at most {MAX_PICKLE}")
    machine = Machine(read_region(file, pickle, "data.pkl").tobytes(), num_items=5)
    tree = machine.run()
    if machine.position != pickle.num_bytes:
        raise CheckpointError("the pickle is followed by other bytes")

    storages = {}
    for key, storage in machine.storages.items():
        region = regions.get(f"{root}/data/{key}")
        if region is None or not (key.isascii() and key.isdigit()):
            raise CheckpointError(f"storage {short_repr(key)} is not in the archive")
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


def _check_byte_order(file: io.BufferedReader, region: Region | None) -> None:
    order = _read_small(file, region, "byteorder") if region else b"little"  # old files are
    if order == b"big":
        raise UnsupportedFormat(f"was written by a big-endian machine: {HOW_TO_CONVERT}")
    if order != b"little":
        raise CheckpointError(f"unknown byte order {order!r}")


def _check_version(file: io.BufferedReader, region: Region | None) -> None:
    text = _read_small(file, region, "version").strip() if region else b""
    if not text.isdigit():
        raise CheckpointError("the archive does not say which version of torch's format it has")
    if not 1 <= int(text) <= MAX_VERSION:
        raise UnsupportedFormat(f"has version {int(text)} of torch's format: {HOW_TO_CONVERT}")


def _check_notes(file: io.BufferedReader, regions: Mapping[str, Region], root: str) -> None:
    """What torch reads, too, and fails on: no tensor depends on it."""
    alignment = regions.get(f"{root}/.storage_alignment")
    if alignment and not _read_small(file, alignment, "storage_alignment").isdigit():
        raise CheckpointError("the alignment of the storages is not a number")
    identity = regions.get(f"{root}/.data/serialization_id")
    if identity and not _read_small(file, identity, "serialization_id").isascii():
        raise CheckpointError("the archive's own id is not text")


def _read_small(file: io.BufferedReader, region: Region, what: str) -> bytes:
    if region.num_bytes > 64:
        raise CheckpointError(f"{what} has {region.num_bytes} bytes")
    return read_region(file, region, what).tobytes()


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
    info = machine.run()
    if not isinstance(info, dict) or info.get("little_endian") is not True:
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
    """Each storage is its number of elements (8 bytes) and their bytes; the last ends the file."""
    regions = {}
    for storage in storages:
        file.seek(position)
        if int.from_bytes(file.read(8), "little") != storage.num_elements:
            raise CheckpointError(f"storage {short_repr(storage.key)} is not where it should be")
        regions[storage.key] = Region(position + 8, storage.num_bytes, None)
        position += 8 + storage.num_bytes
    if position != size:
        raise CheckpointError(f"its storages end at byte {position}, the file has {size}")
    return regions


# --- Files of another kind ------------------------------------------------------------------------

SAFETENSORS = "a safetensors file"
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
# Whose weights are in the files of other frameworks.
FOREIGN = {
    "a GGUF file": "llama.cpp",
    "an HDF5 file": "Keras or TensorFlow",
    "a NumPy file": "NumPy",
    "a NumPy archive": "NumPy, JAX or MLX",
    "a MessagePack file": "Flax",
    "a protocol buffer": "ONNX or TensorFlow",
}


MESSAGE_PACK = re.compile(rb"([\x81-\x8f]|\xde..)([\xa1-\xbf]|\xd9)[\w.]", re.DOTALL)
# Field 1, a version below 32, then another: ONNX's ModelProto, TensorFlow's SavedModel.
PROTOCOL_BUFFER = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]")


def looks_like(first_bytes: bytes) -> str:
    """Say what a file is by its first 512 bytes: "an HTML page", "a zip archive"."""
    if not first_bytes:
        return "an empty file"
    if first_bytes[5:9] == b"\0\0\0{":  # after the length of the header, which is below 2**40
        return SAFETENSORS
    if first_bytes[257:262] == b"ustar":
        return "a tar archive"
    text = first_bytes[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, kind in SIGNATURES:
        if text.startswith(signature):
            return kind
    # A map of 1 to 15 pairs, or of up to 65,535, whose first key is a string.
    if MESSAGE_PACK.match(first_bytes):
        return "a MessagePack file"
    if PROTOCOL_BUFFER.match(first_bytes):
        return "a protocol buffer"
    # Protocol 2 and later start with PROTO; before, with one of these opcodes.
    if first_bytes[0] == 0x80 or (first_bytes[0] in b"(]}cINVLF" and b"\n" in first_bytes[:512]):
        return "a pickle"
    return f"something else: it starts with {first_bytes[:8]!r}"


def other_kind(kind: str) -> CheckpointError:
    """The error for a file of a kind that `looks_like` names and nobody here reads."""
    if kind in FOREIGN:
        return UnsupportedFormat(
            f"is {kind}, of {FOREIGN[kind]}: take the .safetensors or .bin file of the same "
            "network, or load this one in its own framework and save its tensors, by PyTorch's "
            "names and in PyTorch's layout, with `safetensors.numpy.save_file`"
        )
    return CheckpointError(f"is not a checkpoint: it looks like {kind}")


def _check_first_bytes(data: bytes) -> None:
    kind = looks_like(data)
    if kind == "a tar archive":
        raise UnsupportedFormat(f"is a tar archive, as torch < 0.2 wrote: {HOW_TO_CONVERT}")
    if kind != "a pickle":
        raise other_kind(kind)


# --- Reading storages -----------------------------------------------------------------------------


def _check_total(tensors: Mapping[str, TensorRef], file_size: int) -> None:
    """Refuse to allocate more than a file of that size can honestly ask for, by expanding."""
    total = sum(ref.num_bytes for ref in set(tensors.values()))
    if total > 3 * file_size + MAX_EXPANDED:  # and one storage, while it is read
        raise UnsafeCheckpoint(f"a file of {file_size} bytes asks for {total} bytes of tensors")


def _read_storages(
    file: io.BufferedReader, tensors: Mapping[str, TensorRef], regions: Mapping[str, Region]
) -> dict[str, mx.array]:
    """The tensors as arrays, in the same order; storages are read once, in the file's order.

    Their checksums are computed beside, in a thread.
    """
    views: dict[str, set[TensorRef]] = {}
    for ref in tensors.values():
        views.setdefault(ref.storage.key, set()).add(ref)
    arrays: dict[TensorRef, mx.array] = {}
    room = np.empty(max(regions[key].num_bytes for key in views), np.uint8)
    with ThreadPoolExecutor(1) as thread:
        for key in sorted(views, key=lambda key: regions[key].start):
            what = f"storage {key}"
            buffer = read_unchecked(file, regions[key], what, room)
            checked = thread.submit(check_crc, buffer, regions[key], what)
            arrays.update((ref, _to_array(buffer, ref)) for ref in views[key])
            checked.result()
    return {name: arrays[ref] for name, ref in tensors.items()}


def _to_array(buffer: np.ndarray, ref: TensorRef) -> mx.array:
    """Copy one view of a storage's bytes into an array of its own."""
    dtype = STORAGE_DTYPES[ref.storage.dtype]
    if ref.storage.dtype == "BoolStorage" and buffer.size and buffer.max() > 1:
        raise CheckpointError(f"storage {short_repr(ref.storage.key)} has bools other than 0 and 1")
    if 0 in ref.shape:
        view = np.zeros(ref.shape, dtype)
    else:
        strides = [step * dtype.itemsize for step in ref.stride]
        view = np.ndarray(ref.shape, dtype, buffer, ref.offset * dtype.itemsize, strides)
    match ref.storage.dtype:
        case "DoubleStorage":
            return mx.array(view, dtype=mx.float64)  # MLX makes it float32 unless told
        case "BFloat16Storage":
            return mx.array(view).view(mx.bfloat16)
    return mx.array(view)
