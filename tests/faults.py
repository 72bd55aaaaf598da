"""What tests of faults share: a small network on a hub, other processes, rights, full disks."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import mlx_zoo
from mlx_zoo.describe import DATA
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.mapping import engine

HERE = Path(__file__).parent
DIGITS = "resnet_digits"  # 111,370 parameters: a hundred conversions take seconds
TIMM_CONFIG = {
    "architecture": DIGITS,
    "num_classes": 10,
    "num_features": 48,
    "pretrained_cfg": {
        "input_size": [1, 32, 32],
        "mean": [0.3057],
        "std": [0.3235],
        "interpolation": "bicubic",
        "crop_pct": 0.8,
        "license": "mit",
    },
}


def digest(model) -> str:
    """Changes when any weight changes."""
    found = hashlib.sha256()
    for name, x in sorted(engine.parameters(model).items()):
        found.update(name.encode() + str(x.dtype).encode() + np.array(x).tobytes())
    return found.hexdigest()


def right_digest() -> str:
    """Of the bundled network, read without any cache."""
    from mlx_zoo import registry

    state = read_state_dict([DATA / f"{DIGITS}.pth"])
    architecture = registry.architectures()["resnet"]
    model = architecture.model(architecture.variants[DIGITS])
    weights = engine.to_mlx(state, model, architecture.dialects["timm"])
    model.load_weights(list(weights.items()))
    return digest(model)


def digits_repository(folder: Path) -> dict[str, bytes]:
    """The files of a repository with the bundled network, as timm would publish it."""
    path = folder / "published.safetensors"
    mlx_zoo.export(mlx_zoo.load(DIGITS, pretrained=True, cache_dir=folder / "own"), path)
    return {"config.json": json.dumps(TIMM_CONFIG).encode(), "model.safetensors": path.read_bytes()}


# Other processes --------------------------------------------------------------------------------


def environment(**more: object) -> dict[str, str]:
    """For a process that imports mlx_zoo and these files; what a test has set holds there, too."""
    paths = {"PYTHONPATH": os.pathsep.join((str(Path(mlx_zoo.__file__).parents[1]), str(HERE)))}
    return os.environ | paths | {name: str(value) for name, value in more.items()}


def start(program: str, *args: object, **more: object) -> subprocess.Popen:
    """A Python program with pipes, as text."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, env=environment(**more), text=True, **pipes)


def command_line(*args: object, **more: object) -> subprocess.CompletedProcess:
    """`mlx-zoo ...` as a user's shell starts it, its output in pipes."""
    command = [sys.executable, "-m", "mlx_zoo", *map(str, args)]
    return subprocess.run(
        command, env=environment(**more), capture_output=True, text=True, timeout=120
    )


# Rights and disks -------------------------------------------------------------------------------

_OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_VERSION = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Within, this thread obeys the permissions of files, even where the user is root.

    Linux's root owes that right to capabilities, which a thread may lay down for a while.
    """
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        import pytest  # not at the top: processes by the dozen import this file

        pytest.skip("root writes to read-only folders all the same")
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_VERSION, 0), (_Data * 2)()
    before = (_Data * 2)()
    for kept in (data, before):
        assert libc.capget(ctypes.byref(header), ctypes.byref(kept)) == 0
    data[0].effective &= ~_OVERRIDES
    assert libc.capset(ctypes.byref(header), ctypes.byref(data)) == 0
    try:
        yield
    finally:
        assert libc.capset(ctypes.byref(header), ctypes.byref(before)) == 0


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    """Within, nobody writes into these folders or those below them."""
    below = (path for folder in folders for path in folder.rglob("*") if path.is_dir())
    locked = [path for path in (*folders, *below) if not path.is_symlink()]
    modes = [path.stat().st_mode for path in locked]
    for path in locked:
        path.chmod(0o500)
    try:
        with unprivileged():
            assert not os.access(folders[0], os.W_OK, effective_ids=True)
            yield
    finally:
        for path, mode in zip(locked, modes, strict=True):
            path.chmod(mode)


def on_a_disk_of_its_own(script: str, disk: Path, **more: object) -> subprocess.CompletedProcess:
    """Run a shell script that may mount what it likes: nobody else sees it, and it ends with it.

    `$disk` is an empty folder, `python` this interpreter. Skips where the machine does not let us.
    """
    disk.mkdir(exist_ok=True)
    private = ["unshare", "--mount"] + ["--user", "--map-root-user"] * (os.geteuid() != 0)
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
    try:
        refused = subprocess.run([*private, *mount], capture_output=True, text=True).stderr
    except FileNotFoundError as error:
        refused = str(error)
    if refused:
        import pytest

        pytest.skip(f"no disk can be mounted here: {refused.strip()}")
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    return subprocess.run(
        [*private, "sh", "-c", python + script],
        env=environment(disk=disk, **more),
        capture_output=True,
        text=True,
        timeout=200,
    )
