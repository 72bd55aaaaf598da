"""Importing, reading and writing without waiting: nothing is done less well for it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

import mlx_zoo
from mlx_zoo.errors import CheckpointError
from mlx_zoo.hub import safetensors_writer, seen
from mlx_zoo.hub.cache import sha256_of, state_of
from mlx_zoo.hub.checkpoint import read_safetensors, read_state_dict
from mlx_zoo.hub.fetch import fetch_weights, local_weights
from mlx_zoo.hub.reading import BEHIND, Hashing
from mlx_zoo.hub.safetensors_header import read_header
from mlx_zoo.hub.safetensors_writer import write_safetensors
from mlx_zoo.hub.source import FileSource
from mlx_zoo.mapping import engine
from mlx_zoo.mapping.layout import STRIP, stored_in_out

# Importing ---------------------------------------------------------------------------------------


def python(code, *words):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_alone_brings_in_the_blas_and_little_else():
    code = "import sys, mlx_zoo; print(*[n for n in sys.modules if n.startswith('mlx')])"
    assert {*python(code)} <= {
        "mlx_zoo",
        "mlx_zoo.errors",
        "mlx_zoo.lazy",
        "mlx_zoo.backend",
        "mlx_zoo.backend.blas",
    }
    assert "numpy" not in python("import sys, mlx_zoo; print(*sys.modules)")


@pytest.mark.parametrize("first", ["mlx_zoo.verify.report", "mlx_zoo.tasks", "mlx_zoo.cli"])
def test_every_name_is_the_function_whatever_is_imported_before(first):
    code = f"""
import {first}
import mlx_zoo
from mlx_zoo import *
for name in set(mlx_zoo.__all__) - {{"errors"}}:
    assert callable(getattr(mlx_zoo, name)), name
    assert getattr(mlx_zoo, name) is globals()[name], name
assert mlx_zoo.verify.__module__ == "mlx_zoo.verify"
assert set(mlx_zoo.__all__) <= set(dir(mlx_zoo))
"""
    python(code)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        mlx_zoo.lod  # noqa: B018
    assert isinstance(mlx_zoo, ModuleType)
    assert not hasattr(mlx_zoo, "__wrapped__")


def test_a_function_may_be_replaced(monkeypatch):
    monkeypatch.setattr(mlx_zoo, "verify", len)
    assert mlx_zoo.verify is len


# Hashing beside ----------------------------------------------------------------------------------


def test_the_hash_is_that_of_all_buffers_in_their_order():
    pieces = [os.urandom(size) for size in (0, 1, 1 << 20, 3, 5 << 20)]
    with Hashing() as digest:
        for piece in pieces:
            digest.add(piece)
        digest.add(*pieces)
        assert digest.hexdigest() == hashlib.sha256(b"".join(pieces * 2)).hexdigest()


def test_no_more_waits_than_is_allowed(monkeypatch):
    most = 0
    with Hashing() as digest:
        for _ in range(6):
            digest.add(bytes(BEHIND // 2))
            most = max(most, digest._behind)
    assert most <= BEHIND


def test_the_thread_ends_with_its_context_whatever_happens():
    before = threading.active_count()
    with pytest.raises(TypeError), Hashing() as digest:
        digest.add(bytes(1 << 20), None)
    assert threading.active_count() == before


# Writing -----------------------------------------------------------------------------------------


def every_kind():
    rng = np.random.default_rng(0)
    weights = {
        f"w.{i}": mx.array(rng.normal(size=(3, i, 5))).astype(kind)
        for i, kind in enumerate(
            (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.int8, mx.bool_)
        )
    }
    weights["strided"] = mx.arange(12.0).reshape(3, 4).T
    weights["spread"] = mx.broadcast_to(mx.array(2.5), (2, 3))
    weights["scalar"] = mx.array(7.0)
    return weights


def test_what_is_written_is_what_mlx_reads(tmp_path):
    path, weights = tmp_path / "w.safetensors", every_kind()
    sha256 = write_safetensors(path, weights, {"layout": "mlx", "name": "ä"})
    assert sha256 == sha256_of(path)
    found, metadata = mx.load(str(path), return_metadata=True)
    assert metadata["name"] == "ä"
    header = read_header(path)  # in full: no hole, no overlap
    ours = read_safetensors(path, header)
    assert found.keys() == ours.keys() == weights.keys()
    for name, x in weights.items():
        assert found[name].dtype == ours[name].dtype == x.dtype
        assert found[name].shape == ours[name].shape == x.shape
        assert mx.array_equal(found[name], x)
        assert mx.array_equal(ours[name], x)
    sizes = {"F32": 4, "U32": 4, "F16": 2, "BF16": 2, "I8": 1, "BOOL": 1}
    for info in header.tensors.values():
        assert (header.data_start + info.offsets[0]) % sizes[info.dtype] == 0


@pytest.mark.parametrize("when", ["between", "at the end"])
def test_a_disk_that_fails_beside_is_an_error_with_the_path(when, tmp_path, monkeypatch):
    """What fsync cannot write, it says once: it must not be lost in a thread."""
    monkeypatch.setattr(safetensors_writer, "FLUSHED", 1 if when == "between" else 1 << 12)

    def fsync(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "w.safetensors"
    with pytest.raises(OSError, match=r"w\.safetensors") as caught:
        write_safetensors(path, {"x": mx.zeros(2000), "y": mx.zeros(2000)}, {})
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_reading_in_blocks_hashes_every_byte_once(block, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_zoo.hub.checkpoint.BLOCK", block)
    path, weights = tmp_path / "w.safetensors", every_kind()
    write_safetensors(path, weights, {})
    with Hashing() as digest:
        found = read_safetensors(path, read_header(path), digest)
        assert digest.hexdigest() == sha256_of(path)
    assert all(mx.array_equal(found[name], x) for name, x in weights.items())


def test_tensors_that_are_not_aligned_are_read_all_the_same(tmp_path):
    entries = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(entries).encode()
    data = b"\7" + np.array([1.5, -2], np.float32).tobytes()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = read_state_dict([tmp_path / "w.safetensors"])
    assert found["b"].tolist() == [1.5, -2]


# Turning and looking -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(STRIP, 3), (5 * STRIP, 48), (7, 48), (STRIP + 1, 2), (1, 1)])
@pytest.mark.parametrize("kind", [mx.float32, mx.bfloat16])
def test_a_matrix_is_turned_in_strips_as_it_is_at_once(shape, kind):
    x = mx.random.normal(shape).astype(kind)
    assert mx.array_equal(stored_in_out(x), x.T)
    assert mx.array_equal(stored_in_out(stored_in_out(x)), x)
    assert mx.array_equal(stored_in_out(x[:, :1]), x[:, :1].T)


@pytest.mark.parametrize("kind", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, engine.PIECE - 1, engine.PIECE, -1])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(kind, bad, place):
    values = np.full(engine.PIECE + 5, 3.0, np.float32)
    fine = mx.array(values).astype(kind)
    values[place] = bad
    weights = {"fine": fine, "bad": mx.array(values).astype(kind), "largest": mx.array(3.0e38)}
    assert engine.nonfinite(weights) == ["bad"]


# Local files that are known ----------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large, and as written some time ago."""
    monkeypatch.setattr(seen, "LARGE", 10)
    monkeypatch.setattr(seen, "SETTLED", 0.0)
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"x": mx.zeros(100)}, {})
    return path


def hashed(monkeypatch):
    """The files that are hashed from here on."""
    found = []

    def count(path):
        found.append(path)
        return sha256_of(path)

    monkeypatch.setattr("mlx_zoo.hub.fetch.sha256_of", count)
    return found


def test_a_large_file_is_hashed_once(large, cache, monkeypatch):
    found, source = hashed(monkeypatch), FileSource(large)
    first = fetch_weights(source)
    assert fetch_weights(source) == first
    assert first.sha256 == {large.name: sha256_of(large)}
    assert found == [large]
    assert local_weights(source, cache).is_hashed
    assert fetch_weights(source, cache_dir=cache / "other") == first
    assert found == [large] * 2


@pytest.mark.parametrize("how", ["in place", "replaced", "with its old times", "touched"])
def test_a_file_that_changed_is_hashed_again(how, large, monkeypatch):
    source, before = FileSource(large), large.stat()
    old = fetch_weights(source).sha256
    content = bytearray(large.read_bytes())
    content[-1] ^= 1
    if how == "replaced":
        large.with_name("new").write_bytes(content)
        large.with_name("new").replace(large)
    elif how != "touched":
        with large.open("r+b") as file:
            file.write(content)
    if how != "in place":
        os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = hashed(monkeypatch)
    new = fetch_weights(source).sha256
    assert found == [large]
    assert new == {large.name: sha256_of(large)}
    assert (new == old) == (how == "touched")


def test_a_file_that_was_just_written_is_not_known(large, cache, monkeypatch):
    """It may change again within one tick of the clock."""
    monkeypatch.setattr(seen, "SETTLED", 60.0)
    found = hashed(monkeypatch)
    for _ in range(2):
        fetch_weights(FileSource(large))
    assert found == [large] * 2
    seen.remember(cache, large, state_of(large), time.time() + 120, "a" * 64)
    assert seen.known_sha256(cache, large, state_of(large)) == "a" * 64


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", "[" * 100_000, '{"path": 1}', "\0", '{"state": null}']
)
def test_a_garbled_record_is_not_believed(record, large, cache, monkeypatch):
    fetch_weights(FileSource(large))
    (kept,) = (cache / "seen").iterdir()
    kept.write_text(record)
    found = hashed(monkeypatch)
    assert fetch_weights(FileSource(large)).sha256 == {large.name: sha256_of(large)}
    assert found == [large]


def test_a_cache_that_takes_nothing_is_no_error(large, tmp_path, caplog):
    (tmp_path / "file").touch()
    found = fetch_weights(FileSource(large), cache_dir=tmp_path / "file")
    assert found.sha256 == {large.name: sha256_of(large)}
    assert caplog.text == ""


# Mapping while hashing ---------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """Files of any size are mapped while they are hashed."""
    monkeypatch.setattr("mlx_zoo.converting.LARGE", 0)


def exported(path, change=None):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    if change:
        change(model)
    return mlx_zoo.export(model, path)


def test_a_large_file_is_mapped_while_it_is_hashed(tmp_path, at_once, cache):
    path = exported(tmp_path / "w.safetensors")
    cold = mlx_zoo.load("resnet_digits", pretrained=path)
    warm = mlx_zoo.load("resnet_digits", pretrained=path)
    assert cold.entry.path == warm.entry.path
    for name, x in engine.parameters(cold).items():
        assert mx.array_equal(x, engine.parameters(warm)[name])
    copy = tmp_path / "other.safetensors"
    copy.write_bytes(path.read_bytes())  # the same bytes, which nobody has hashed
    assert mlx_zoo.load("resnet_digits", pretrained=copy).entry.path == cold.entry.path


def test_what_is_wrong_with_a_large_file_is_said_once(tmp_path, at_once, caplog, monkeypatch):
    path = exported(tmp_path / "w.safetensors")
    read = []

    def read_more(*words):
        read.append(words)
        return {**read_state_dict(*words), "surplus": mx.zeros(1)}

    monkeypatch.setattr("mlx_zoo.converting.read_state_dict", read_more)
    with pytest.raises(mlx_zoo.errors.MappingError, match="no home for surplus"):
        mlx_zoo.load("resnet_digits", pretrained=path)
    assert len(read) == 1


def test_a_large_file_that_changes_while_it_is_hashed_is_refused(tmp_path, at_once, monkeypatch):
    path = exported(tmp_path / "w.safetensors")

    def slow(file):
        found = sha256_of(file)
        content = file.read_bytes()
        file.write_bytes(content)  # all is read, but the hash may be of either
        return found

    monkeypatch.setattr("mlx_zoo.hub.fetch.sha256_of", slow)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        mlx_zoo.load("resnet_digits", pretrained=path)


PEAK = """
import sys
from pathlib import Path
import mlx_zoo
load = mlx_zoo.load
load(sys.argv[1], pretrained=True, cache_dir=sys.argv[3])  # what a first load brings with it

def peak():
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) * 1024

Path("/proc/self/clear_refs").write_text("5")
before = peak()
load(sys.argv[2], pretrained=sys.argv[4], cache_dir=sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_conversion_needs_half_as_much_again_as_the_file_at_most(kind, tmp_path):
    path = tmp_path / f"w.{kind}"
    mlx_zoo.export(mlx_zoo.load("resnet18"), tmp_path / "w.safetensors")
    if kind == "pth":
        import torch

        state = read_state_dict([tmp_path / "w.safetensors"])
        torch.save({n: torch.from_numpy(np.array(x)) for n, x in state.items()}, path)
    (peak,) = python(PEAK, "resnet_digits", "resnet18", tmp_path / "cache", path)
    assert int(peak) < 1.5 * path.stat().st_size + (8 << 20)
