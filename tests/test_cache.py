"""The cache of converted weights: an entry is whole or is not there, whatever happens.

Numbers in the names are the rows of the fault matrix.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_zoo
from mlx_zoo import converting, registry
from mlx_zoo.describe import DATA
from mlx_zoo.errors import MLXZooError
from mlx_zoo.hub import cache as cache_module
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.mapping import engine

NAME = "resnet_digits"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(mlx_zoo.__file__).parents[1])}


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


def digest(model):
    """Changes when any weight changes."""
    found = hashlib.sha256()
    for name, x in sorted(engine.parameters(model).items()):
        found.update(name.encode() + str(x.dtype).encode() + np.array(x).tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def right():
    """The digest of the right weights, read without any cache."""
    state = read_state_dict([DATA / "resnet_digits.pth"])
    architecture = registry.architectures()["resnet"]
    model = architecture.model(architecture.variants[NAME])
    weights = engine.to_mlx(state, model, architecture.dialects["timm"])
    model.load_weights(list(weights.items()))
    return digest(model)


@pytest.fixture(autouse=True)
def warnings_are_new():
    """A warning is given once in a process: here, once in a test."""
    converting.warn_once.cache_clear()


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
        cache._flush = die
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
    killed = subprocess.run([sys.executable, "-c", KILLED, point], env=ENVIRONMENT | here(cache))
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

AT_ONCE = """
import sys
sys.path.insert(0, sys.argv[1])
import mlx_zoo
from test_cache import digest
print("ready", flush=True)
sys.stdin.readline()
print(digest(mlx_zoo.load("resnet_digits", pretrained=True)))
"""


@pytest.mark.parametrize("found", ["nothing", "a damaged entry"])
def test_row_18_twelve_processes_convert_at_once(found, cache, right):
    if found != "nothing":
        load()
        only_entry(cache).weights.write_bytes(b"damaged")
    command = [sys.executable, "-c", AT_ONCE, str(Path(__file__).parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    racers = [
        subprocess.Popen(command, env=ENVIRONMENT | here(cache), text=True, **pipes)
        for _ in range(12)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        output, errors = racer.communicate(timeout=100)
        assert racer.returncode == 0, errors
        assert output.strip() == right
        assert found != "nothing" or errors == ""
    cache_module.check(only_entry(cache))
    assert unfinished(cache) == []


def test_row_18_the_faster_process_wins(cache, right, monkeypatch, caplog):
    """Another process stores the same conversion between our look-up and our rename."""

    def save(path, weights, metadata, save=cache_module.save):
        monkeypatch.undo()
        monkeypatch.setenv("MLX_ZOO_CACHE", str(cache))
        assert digest(load()) == right
        save(path, weights, metadata)

    monkeypatch.setattr(cache_module, "save", save)
    assert digest(load()) == right
    cache_module.check(only_entry(cache))
    assert unfinished(cache) == []
    assert caplog.text == ""


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

    def read_weights(entry, read_weights=cache_module.read_weights):
        read.append(entry.path)
        return read_weights(entry)

    monkeypatch.setattr(cache_module, "read_weights", read_weights)
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
    assert f"{entry.path} is damaged" in caplog.text
    assert "converted again" in caplog.text
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
    checked = []

    def check(entry, check=cache_module.check):
        check(entry)
        checked.append(entry)
        shutil.rmtree(entry.path)

    monkeypatch.setattr(cache_module, "check", check)
    assert digest(load()) == right
    assert [entry.path for entry in checked] == [entry.path]


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
    "the flush": (cache_module, "_flush"),
    "the rename": (Path, "rename"),
}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("step", STEPS)
def test_rows_15_and_16_a_cold_cache_that_cannot_be_written(
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders all the same")
def test_row_16_a_read_only_folder(cache, right, caplog):
    load()
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        assert digest(load()) == right
        assert caplog.text == ""
        load(dtype="float16")
        assert "cannot be kept" in caplog.text
    finally:
        for folder in folders:
            folder.chmod(0o700)


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
    for garbled in ("", "{", "[]", "1"):
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
