"""The cache of converted weights: an entry is whole or is not there, whatever happens.

Numbers in the names are the rows of the fault matrix.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from faults import DIGITS, digest, environment, read_only, right_digest

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.describe import DATA
from mlx_zoo.errors import MLXZooError
from mlx_zoo.hub import cache as cache_module
from mlx_zoo.hub import checkpoint

NAME = DIGITS


def load(**options):
    return mlx_zoo.load(NAME, pretrained=True, **options)


def entries(root):
    return list(cache_module.entries(root))


def only_entry(root):
    (entry,) = entries(root)
    return entry


def unfinished(root):
    return [path for path in root.rglob(".*") if path.name.startswith(".partial-")]


def quarantined(root):
    return list((root / "quarantine").glob("*"))


@pytest.fixture(scope="module")
def right():
    """The digest of the right weights, read without any cache."""
    return right_digest()


# ------------------------------------------------------------------ 17: killed at any point


def test_row_17_an_entry_appears_by_one_rename_of_a_finished_folder(cache, right, monkeypatch):
    seen = []

    def rename(work, path, rename=Path.rename):
        assert entries(cache) == []
        assert not path.exists()
        assert {file.name for file in work.iterdir()} == {"model.safetensors", "manifest.json"}
        cache_module.check(cache_module.read_entry(work))
        rename(work, path)
        seen.append(path)

    monkeypatch.setattr(Path, "rename", rename)
    assert digest(load()) == right
    assert [entry.path for entry in entries(cache)] == seen
    assert unfinished(cache) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import mlx_zoo
from mlx_zoo.hub import cache

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def then(action, *after):
    def act(*args, **options):
        action(*args, **options)
        for step in after:
            step(*args)
        die()
    return act

def halve(path, *args):
    os.truncate(path, path.stat().st_size // 2)

match sys.argv[1]:
    case "before the weights":
        cache.save = die
    case "in the weights":
        cache.save = then(cache.save, halve)
    case "before the manifest":
        Path.write_text = die
    case "in the manifest":
        Path.write_text = then(Path.write_text, halve)
    case "before the flush":
        cache.flush = die
    case "before the rename":
        Path.rename = die
    case "after the rename":
        Path.rename = then(Path.rename)
mlx_zoo.load("resnet_digits", pretrained=True)
"""
POINTS = (
    "before the weights",
    "in the weights",
    "before the manifest",
    "in the manifest",
    "before the flush",
    "before the rename",
    "after the rename",
)


@pytest.mark.parametrize("point", POINTS)
def test_row_17_killed(point, cache, right, caplog):
    killed = subprocess.run([sys.executable, "-c", KILLED, point], env=environment(**here(cache)))
    assert killed.returncode == -signal.SIGKILL
    whole = point == "after the rename"
    assert len(entries(cache)) == whole
    assert len(unfinished(cache)) == (not whole)

    assert digest(load()) == right
    cache_module.check(only_entry(cache))
    assert caplog.text == ""

    for work in unfinished(cache):  # a day later, the next conversion sweeps it
        os.utime(work, (0, 0))
    load(dtype="float16")
    assert unfinished(cache) == []
    assert len(entries(cache)) == 2


def here(cache):
    return {"MLX_ZOO_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}


# ------------------------------------------------------------------ 18: many at once


def test_row_18_the_faster_process_wins(cache, right, monkeypatch, caplog):
    """Another process stores the same conversion between our look-up and our rename."""

    def save(path, weights, metadata, save=cache_module.save):
        monkeypatch.undo()
        monkeypatch.setenv("MLX_ZOO_CACHE", str(cache))
        assert digest(load()) == right
        return save(path, weights, metadata)

    monkeypatch.setattr(cache_module, "save", save)
    assert digest(load()) == right
    cache_module.check(only_entry(cache))
    assert unfinished(cache) == []
    assert caplog.text == ""


def test_row_18_what_is_in_the_way_may_be_damaged(cache, right, monkeypatch, caplog):
    """It appears between our look-up and our rename, and is set aside for ours."""

    def save(path, weights, metadata, save=cache_module.save):
        monkeypatch.undo()
        monkeypatch.setenv("MLX_ZOO_CACHE", str(cache))
        load()
        truncate(only_entry(cache))
        return save(path, weights, metadata)

    monkeypatch.setattr(cache_module, "save", save)
    assert digest(load()) == right
    (warning,) = caplog.messages
    assert "set aside" in warning
    cache_module.check(only_entry(cache))
    assert unfinished(cache) == []


def at_once(action, num=8):
    """What `action(0)` ... `action(7)` return, each in a thread and all started together."""
    barrier = threading.Barrier(num)

    def start(index):
        barrier.wait()
        return action(index)

    with ThreadPoolExecutor(num) as threads:
        return list(threads.map(start, range(num)))


@pytest.mark.parametrize("found", ["nothing", "a damaged entry"])
def test_row_18_eight_threads_convert_at_once(found, cache, right, caplog):
    if found != "nothing":
        load()
        only_entry(cache).weights.write_bytes(b"damaged")
    assert at_once(lambda _: digest(load())) == [right] * 8
    cache_module.check(only_entry(cache))
    assert unfinished(cache) == []
    assert "cannot be set aside" not in caplog.text
    assert found != "nothing" or caplog.text == ""


def test_row_18_eight_threads_store_one_key(cache, caplog):
    """Each gets an entry that is whole, whoever wrote it."""
    weights = [{"x": mx.full((1000, 100), i)} for i in range(8)]
    mx.eval(weights)
    stored = at_once(lambda i: cache_module.store(cache, NAME, "0" * 64, weights[i], {}))
    entry = only_entry(cache)
    assert {each.path for each in stored} == {entry.path}
    assert {each.manifest["sha256"] for each in stored} == {entry.manifest["sha256"]}
    cache_module.check(entry)
    assert unfinished(cache) == []
    assert caplog.text == ""


def test_row_18_eight_threads_stamp_one_entry(cache):
    """Of one process: its number alone would be the same for all."""
    load()
    entry = only_entry(cache)
    results = [{"passed": True, "layers": "x" * 100_000 * i} for i in range(8)]
    seen = []

    def stamp(index):
        for _ in range(10):
            cache_module.stamp(entry, results[index])
            seen.append(entry.verification)
            assert entry.size > 0

    at_once(stamp)
    wanted = [{"sha256": entry.manifest["sha256"], **result} for result in results]
    assert all(one in wanted for one in seen)
    names = {path.name for path in entry.path.iterdir()}
    assert names == {"model.safetensors", "manifest.json", "verification.json"}


def test_a_stamp_that_cannot_be_written_leaves_the_last_one(cache, monkeypatch):
    load()
    entry = only_entry(cache)
    cache_module.stamp(entry, {"passed": True})
    monkeypatch.setattr(cache_module, "flush", fail(errno.ENOSPC))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        cache_module.stamp(entry, {"passed": False})
    assert entry.verification["passed"]
    assert len(list(entry.path.iterdir())) == 3


def test_row_18_what_another_process_sets_aside_first_is_no_failure(cache, caplog):
    (cache / "weights").mkdir(parents=True)
    cache_module.quarantine(cache, cache / "weights" / "gone", "of another release")
    (message,) = caplog.messages
    assert "cannot be used (of another release)" in message


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_entry_is_on_the_disk_before_it_has_its_name(cache, monkeypatch):
    """Files, then the folder that names them, then its parent."""
    flushed = []

    def fsync(descriptor, fsync=os.fsync):
        fsync(descriptor)
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", fsync)
    load()
    path = only_entry(cache).path
    *files, work, parent = flushed
    assert {file.name for file in files} == {"model.safetensors", "manifest.json"}
    assert {file.parent for file in files} == {work}
    assert work.name.startswith(".partial-")
    assert parent == path.parent


def test_a_file_system_that_does_not_flush_folders_is_no_failure(cache, monkeypatch, caplog):
    def fsync(descriptor, fsync=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    load()
    cache_module.check(only_entry(cache))
    assert caplog.text == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_stays_open(cache):
    load()
    load()
    cache_module.stamp(only_entry(cache), {"passed": True})
    opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert not [name for name in opened if name.startswith(str(cache))]


# ------------------------------------------------------------------ 19: what makes a key


def another_spec(monkeypatch):
    resnet = registry.architectures()["resnet"]
    spec = resnet.dialects["timm"]
    changed = replace(spec, drop=(*spec.drop, "no.such.tensor"))
    dialects = {**resnet.dialects, "timm": changed}
    monkeypatch.setitem(registry.architectures(), "resnet", replace(resnet, dialects=dialects))


def another_format(monkeypatch):
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)


def another_dialect(monkeypatch):
    changed = replace(registry.find(NAME), dialect="torchvision")
    monkeypatch.setitem(registry._names(), NAME, changed)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (another_spec, {}),
        (another_format, {}),
        (another_dialect, {}),
        (lambda monkeypatch: None, {"dtype": "float16"}),
        (lambda monkeypatch: None, {"act": "silu"}),
    ],
    ids=["spec", "format", "dialect", "dtype", "config"],
)
def test_row_19_another_key_and_the_old_entry_is_not_used(cache, monkeypatch, change, options):
    load()
    old = only_entry(cache)
    read = []

    def read_checked(entry, read_checked=cache_module.read_checked):
        read.append(entry.path)
        return read_checked(entry)

    monkeypatch.setattr(cache_module, "read_checked", read_checked)
    change(monkeypatch)
    load(**options)
    assert read == []  # converted anew
    load(**options)
    assert len(read) == 1
    assert read[0] != old.path
    assert len({entry.manifest["key"] for entry in entries(cache)}) == 2


def test_row_19_other_bytes_of_a_local_file(cache, tmp_path):
    path = tmp_path / "digits.safetensors"
    model = load()
    mlx_zoo.export(model, path)
    first = mlx_zoo.load(NAME, pretrained=path)
    model.fc.bias = model.fc.bias + 1
    mlx_zoo.export(model, path)
    second = mlx_zoo.load(NAME, pretrained=path)
    np.testing.assert_array_equal(second.fc.bias, first.fc.bias + 1)
    assert len(entries(cache)) == 3


# ------------------------------------------------------------------ 20: a damaged entry


def truncate(entry):
    os.truncate(entry.weights, entry.weights.stat().st_size - 1)


def flip(place):
    def damage(entry):
        content = bytearray(entry.weights.read_bytes())
        content[place] ^= 1
        entry.weights.write_bytes(content)

    return damage


def write(text):
    def damage(entry):
        (entry.path / "manifest.json").write_text(text)

    return damage


def change(**fields):
    def damage(entry):
        manifest = {**entry.manifest, **fields}
        (entry.path / "manifest.json").write_text(json.dumps(manifest))

    return damage


def change_config(entry):
    change(config={**entry.manifest["config"], "act": "silu"})(entry)


def another_release(entry):
    """A manifest that is whole, and of a release that writes what this one does not know."""
    manifest = {k: v for k, v in entry.manifest.items() if k not in ("created", "size", "sha256")}
    manifest["checkpoint"] = {**manifest["checkpoint"], "of_the_future": 1}
    weights = dict(mx.load(str(entry.weights)))
    mx.eval(weights)
    manifest.pop("versions")
    cache_module.write_folder(entry.path, weights, manifest)
    cache_module.check(cache_module.read_entry(entry.path))


DAMAGE = {
    "truncated": truncate,
    "emptied": lambda entry: os.truncate(entry.weights, 0),
    "a bit of the data": flip(-1),
    "a bit of the header": flip(20),
    "a bit of the header's length": flip(7),
    "no weights": lambda entry: entry.weights.unlink(),
    "no manifest": lambda entry: (entry.path / "manifest.json").unlink(),
    "empty manifest": write(""),
    "half a manifest": write('{"format": 1, '),
    "a deep manifest": write("[" * 100_000),
    "a list for a manifest": write("[]"),
    "a manifest that is not text": lambda entry: (entry.path / "manifest.json").write_bytes(
        b"\xff\xfe\x00"
    ),
    "the manifest of another key": change(key="0" * 64),
    "another config in the manifest": change_config,
    "a manifest without a hash": change(sha256=None),
    "a manifest of another release": another_release,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_row_20_damage_is_set_aside_and_converted_again(damage, cache, right, caplog):
    load()
    entry = only_entry(cache)
    damage(entry)
    assert digest(load()) == right
    assert f"{entry.path} cannot be used (" in caplog.text
    assert "set aside and converted again" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (aside,) = quarantined(cache)
    assert aside.name.startswith(entry.path.name)
    assert only_entry(cache).path == entry.path

    caplog.clear()
    assert digest(load()) == right
    assert caplog.text == ""


def test_row_20_damage_that_cannot_be_set_aside(cache, right, caplog):
    load()
    truncate(only_entry(cache))
    (cache / "quarantine").write_text("a file where the folder would be")
    assert digest(load()) == right
    assert "cannot be set aside" in caplog.text
    assert "cannot be kept" in caplog.text
    assert unfinished(cache) == []


# ------------------------------------------------------------------ 22: changed while loading


def test_row_22_a_loaded_model_needs_its_entry_no_more(cache, right):
    load()
    model = load()
    weights = only_entry(cache).weights
    with weights.open("r+b") as file:  # the very bytes that were read, in place
        file.write(bytes(weights.stat().st_size))
    shutil.rmtree(cache)
    assert digest(model) == right


def test_row_22_an_entry_that_is_replaced_while_it_is_read(cache, right, monkeypatch):
    load()
    entry = only_entry(cache)
    seen = []

    def read_entry(path, read_entry=cache_module.read_entry):
        found = read_entry(path)
        seen.append(path)
        shutil.rmtree(path)
        return found

    monkeypatch.setattr(cache_module, "read_entry", read_entry)
    assert digest(load()) == right
    assert seen == [entry.path]


@pytest.mark.parametrize("harm", [lambda entry: truncate(entry), lambda entry: flip(-1)(entry)])
@pytest.mark.parametrize("when", ["found", "opened", "while it is hashed", "read"])
def test_row_22_an_entry_that_is_harmed_while_it_is_read(harm, when, cache, right, monkeypatch):
    """Before its header is read, between that and its tensors, between these, or after all."""
    load()
    entry = only_entry(cache)

    def act(*args, **options):
        monkeypatch.setattr(place, name, action)
        if when in ("opened", "while it is hashed"):
            harm(entry)
        result = action(*args, **options)
        if when in ("found", "read"):
            harm(entry)
        return result

    monkeypatch.setattr(checkpoint, "BLOCK", 1)  # a tensor at a time
    place, name = {
        "found": (cache_module, "look_up"),
        "opened": (checkpoint, "read_safetensors"),
        "while it is hashed": (checkpoint, "_to_array"),
        "read": (cache_module, "read_checked"),
    }[when]
    action = getattr(place, name)
    monkeypatch.setattr(place, name, act)
    assert digest(load()) == right
    if when == "read":  # it is held already, and the harm is found by the next
        assert quarantined(cache) == []
        assert digest(load()) == right
    assert len(quarantined(cache)) == 1
    cache_module.check(only_entry(cache))


# ------------------------------------------------------------------ 15, 16: no space, no right


def fail(error):
    def act(*args, **options):
        raise OSError(error, os.strerror(error))

    return act


# What may fail, and where.
STEPS = {
    "making a folder": (cache_module, "working_folder"),
    "the weights": (cache_module, "save"),
    "the manifest": (Path, "write_text"),
    "the flush": (cache_module, "flush"),
    "the rename": (Path, "rename"),
}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("step", STEPS)
def test_row_15_and_row_16_a_cold_cache_that_cannot_be_written(
    step, error, cache, right, monkeypatch, caplog
):
    monkeypatch.setattr(*STEPS[step], fail(error))
    for _ in range(2):
        assert digest(load()) == right
    (warning,) = caplog.messages  # once
    assert str(cache) in warning
    assert os.strerror(error) in warning
    assert entries(cache) == unfinished(cache) == []


def test_row_15_a_disk_that_is_full_indeed(cache, right, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond fails
    try:
        assert digest(load()) == right
        with pytest.raises(OSError, match=r"partial-.*model\.safetensors"):
            cache_module.store(cache, NAME, "0" * 64, {"x": mx.zeros(10**6)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(caplog.messages) == 1
    assert "model.safetensors" in caplog.text
    assert entries(cache) == unfinished(cache) == []
    load()
    cache_module.check(only_entry(cache))


def test_row_16_a_file_where_the_cache_would_be(tmp_path, right, caplog):
    (tmp_path / "file").touch()
    assert digest(load(cache_dir=tmp_path / "file" / "cache")) == right
    assert "cannot be kept" in caplog.text


def test_row_16_a_warm_cache_is_only_read(cache, right, monkeypatch, caplog):
    load()
    for place, name in STEPS.values():
        monkeypatch.setattr(place, name, fail(errno.EROFS))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert digest(load()) == right
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert caplog.text == ""


def test_row_16_a_read_only_folder(cache, right, caplog):
    load()
    with read_only(cache):
        assert digest(load()) == right
        assert caplog.text == ""
        for _ in range(2):
            load(dtype="float16")
    (warning,) = caplog.messages
    assert f"new files cannot be kept in {cache}: [Errno {errno.EACCES}]" in warning
    only_entry(cache)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077], ids=oct)
def test_permissions_are_the_umask_s(umask, cache):
    before = os.umask(umask)
    try:
        load()
        cache_module.stamp(only_entry(cache), {"passed": True})
    finally:
        os.umask(before)
    paths = [cache, *cache.rglob("*")]
    assert len(paths) == 6
    for path in paths:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


# ------------------------------------------------------------------ what is kept, and where


def test_the_manifest_says_where_the_weights_are_from(cache):
    load()
    entry = only_entry(cache)
    source = DATA / "resnet_digits.pth"
    assert entry.path.name == f"{NAME}-{entry.manifest['key'][:16]}"
    assert entry.manifest["source"] == "package:resnet_digits.pth"
    assert entry.manifest["source_sha256"] == {source.name: cache_module.sha256_of(source)}
    assert entry.manifest["sha256"] == cache_module.sha256_of(entry.weights)
    assert entry.manifest["versions"]["mlx_zoo"] == mlx_zoo.__version__
    assert entry.size == sum(path.stat().st_size for path in entry.path.iterdir())
    _, header = mx.load(str(entry.weights), return_metadata=True)
    assert header["layout"] == "mlx"
    assert header["key"] == entry.manifest["key"]


def test_a_verification_is_kept_beside_its_weights(cache):
    load()
    entry = only_entry(cache)
    assert entry.verification is None
    cache_module.stamp(entry, {"passed": True, "max_abs": 1e-7})
    assert entry.verification == {
        "passed": True,
        "max_abs": 1e-7,
        "sha256": entry.manifest["sha256"],
    }
    cache_module.stamp(entry, {"passed": False})
    assert only_entry(cache).verification["passed"] is False
    for garbled in ("", "{", "[]", "1", "[" * 100_000):
        (entry.path / "verification.json").write_text(garbled)
        assert entry.verification is None
    assert {path.name for path in entry.path.iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "verification.json",
    }


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", "nul\0", "a" * 300, "name.tag"])
def test_no_name_leaves_the_cache(name, cache):
    entry = cache_module.store(cache, name, "0" * 64, {"x": mx.zeros(1)}, {})
    assert entry.path.parent == cache / "weights"
    assert cache_module.find(cache, name, "0" * 64).path == entry.path


def test_entries_and_prune(cache, caplog):
    load()
    load(dtype="float16")
    load(dtype="bfloat16")
    old, broken, kept = (entry.path for entry in entries(cache))
    os.utime(old, (0, 0))
    (broken / "manifest.json").write_text("{")
    weights = cache / "weights"
    for name, age in (("young", 0), ("old", 2 * cache_module.STALE)):
        (weights / f".partial-{name}").mkdir()
        os.utime(weights / f".partial-{name}", (time.time() - age,) * 2)
    (weights / "no manifest").mkdir()
    (cache / "quarantine" / "aside").mkdir(parents=True)

    assert [entry.path for entry in entries(cache)] == [old, kept]
    assert f"{broken}: the manifest cannot be read" in caplog.text
    removed = cache_module.prune(cache)
    assert set(removed) == {
        broken,
        weights / ".partial-old",
        weights / "no manifest",
        cache / "quarantine" / "aside",
    }
    assert not any(path.exists() for path in removed)
    assert (weights / ".partial-young").exists()
    assert [entry.path for entry in entries(cache)] == [old, kept]
    assert cache_module.prune(cache, keep_days=30) == [old]
    assert only_entry(cache).path == kept
    assert cache_module.prune(cache / "nothing here") == []


def test_prune_removes_downloads_by_age_and_parts_that_were_left(cache):
    folder, pins = cache / "downloads", cache / "pins"
    for place in (folder, pins):
        place.mkdir(parents=True)
    ages = {"a.pth": 10, "b.pth": 40, ".young.part": 0, ".old.part": 2}
    for name, days in ages.items():
        (folder / name).write_bytes(bytes(days))
        os.utime(folder / name, (time.time() - days * 24 * 3600,) * 2)
    (pins / "org--name.json").touch()
    (pins / ".old.part").touch()
    os.utime(pins / ".old.part", (0, 0))
    os.utime(pins / "org--name.json", (0, 0))

    assert cache_module.downloads(cache) == [(folder / "a.pth", 10), (folder / "b.pth", 40)]
    assert cache_module.downloads(cache / "nothing here") == []
    assert set(cache_module.prune(cache)) == {folder / ".old.part", pins / ".old.part"}
    assert cache_module.prune(cache, keep_days=30) == [folder / "b.pth"]
    os.utime(folder / "a.pth", (time.time() + 999,) * 2)  # of the future
    assert cache_module.prune(cache, keep_days=0) == [folder / "a.pth"]
    assert cache_module.downloads(cache) == []
    assert (folder / ".young.part").exists()
    assert (pins / "org--name.json").exists()


def test_prune_says_what_it_cannot_remove(cache, monkeypatch, caplog):
    load()
    path = only_entry(cache).path
    monkeypatch.setattr(shutil, "rmtree", fail(errno.EACCES))
    assert cache_module.prune(cache, keep_days=0) == []
    assert f"{path} cannot be removed" in caplog.text


def test_prune_beside_another_prune(cache):
    for kind in ("float32", "float16", "bfloat16"):
        load(dtype=kind)
    removed = at_once(lambda _: cache_module.prune(cache, keep_days=0))
    assert len({path for paths in removed for path in paths}) == 3
    assert entries(cache) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MLX_ZOO_CACHE")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_module.cache_root() == tmp_path / "Library" / "Caches" / "mlx_zoo"
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_module.cache_root() == tmp_path / ".cache" / "mlx_zoo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_module.cache_root() == tmp_path / "xdg" / "mlx_zoo"
    monkeypatch.setenv("MLX_ZOO_CACHE", "~/own")
    assert cache_module.cache_root() == tmp_path / "own"
    assert cache_module.cache_root("~/given") == tmp_path / "given"

    load()
    only_entry(tmp_path / "own")
    load(cache_dir=tmp_path / "given")
    only_entry(tmp_path / "given")
    monkeypatch.delenv("MLX_ZOO_CACHE")
    load()
    only_entry(tmp_path / "xdg" / "mlx_zoo")


def test_what_is_found_is_checked_by_hand_too(cache):
    load()
    entry = only_entry(cache)
    cache_module.check(entry)
    truncate(entry)
    with pytest.raises(MLXZooError, match=r"bytes, .* were written"):
        cache_module.check(entry)
