"""Processes that `mlx.launch` starts, over loopback."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path


def free_port():
    """Of two in a row, the first."""
    for port in random.Random(os.getpid()).sample(range(20000, 32000), 100):
        try:
            with (
                socket.create_server(("127.0.0.1", port)),
                socket.create_server(("127.0.0.1", port + 1)),
            ):
                return port
        except OSError:
            continue
    raise AssertionError("no free port")


def launch(count, *words, env):
    """`mlx.launch -n count -- python ...`."""
    place = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = shutil.which("mlx.launch", path=place)
    command = [script, "-n", count, "--backend", "ring", "--starting-port", free_port()]
    command += ["--", sys.executable, *words]
    silent, ours = os.pipe()  # at the end of its input it would spin
    try:
        return subprocess.run(
            [*map(str, command)],
            env=env,
            stdin=silent,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        os.close(silent)
        os.close(ours)
