"""A worker as its parent sees it: orders go in, answers come out in time, or it is an error."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_zoo.errors import MLXZooError

WORKER = Path(__file__).with_name("worker.py")
# By its path, so that no package of ours is imported; with the parent's own search path.
BOOT = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_path({file!r}, run_name='__main__')"
# What importing mlx_zoo sets for this process (`backend.blas`, `backend.ops`). A worker of ours
# sets it itself; the others are measured as their own users have them.
OURS = {"MKL_CBWR": "AUTO,STRICT", "MLX_USE_CUDA_GRAPHS": "0"}
LIMIT = 900.0  # seconds for an answer: a network that is compiled takes minutes


class WorkerError(MLXZooError):
    """A worker could not do what it was told; `died` where it is no more."""

    def __init__(self, message: str, died: bool = False):
        self.died = died
        super().__init__(message)


class Process:
    """A worker process. Raises WorkerError whenever it fails, ends, or is late.

    Args:
        name: for messages.
        threads: of every library in it.
    """

    def __init__(self, name: str, threads: int):
        self.name = name
        self.answers: queue.Queue[str] = queue.Queue()
        self.errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        inherited = {k: v for k, v in os.environ.items() if OURS.get(k) != v}
        self.child = subprocess.Popen(
            [sys.executable, "-c", BOOT.format(path=sys.path, file=str(WORKER))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            bufsize=1,
            env={**inherited, **dict.fromkeys(counts, str(threads))},
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.answers.put(line)
        self.answers.put("")  # it has ended

    def ask(self, do: str, limit: float = LIMIT, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer, at most `limit` seconds."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps({"do": do, **order}) + "\n")
            line = self.answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise WorkerError(
                f"{self.name} gave no answer to '{do}' for {limit:.0f} s and was ended", died=True
            ) from None
        except OSError:  # nobody reads any more
            line = ""
        if not line:
            raise WorkerError(f"{self.name} ended during '{do}': {self._last_words()}", died=True)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        """How it ended, and the last line it wrote to standard error."""
        try:
            status = self.child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            status = self.child.wait()
        how = f"exit status {status}"
        if status < 0:
            how = f"signal {-status}" + (" (out of memory?)" if status == -9 else "")
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        return f"{how}; {said[-1]}" if said else how

    def close(self) -> None:
        """End it."""
        assert self.child.stdin is not None
        with suppress(OSError):  # it has ended already
            self.child.stdin.close()
        try:
            self.child.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.listener.join()
        assert self.child.stdout is not None
        self.child.stdout.close()
        self.errors.close()
