"""The bytes of a file, and their sha256: taken in a thread of its own while they are used."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

BEHIND = 64 << 20  # bytes that may wait to be hashed: they are held in memory as long


def read_bytes(
    file: BufferedIOBase | RawIOBase, count: int, room: np.ndarray | None = None
) -> np.ndarray:
    """The next `count` bytes (uint8), in `room` where that is given.

    Raises EOFError where the file ends before.
    """
    data = np.empty(count, np.uint8) if room is None else room[:count]
    done = 0
    while done < count:  # the system reads 2 GiB at most
        got = file.readinto(data[done:].data)
        if not got:
            raise EOFError(f"it ends {count - done} bytes too early")
        done += got
    return data


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


class Hashing:
    """The sha256 of all buffers that are added, in their order. Nobody may change them meanwhile.

    A context: at its end the thread has ended, too.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._behind = 0

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, *buffers: Any) -> None:
        """Have the bytes of contiguous buffers hashed; waits where too many are waiting."""
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        self._waiting.append((size, self._thread.submit(self._update, buffers)))
        self._behind += size
        while self._behind > BEHIND:
            self._wait()

    def hexdigest(self) -> str:
        """64 hex digits, once all is hashed."""
        self.wait(0)
        return self._digest.hexdigest()

    def wait(self, waiting: int) -> None:
        """Until at most so many additions wait: the buffers of others may change then."""
        while len(self._waiting) > waiting:
            self._wait()

    def _update(self, buffers: Sequence[Any]) -> None:
        for buffer in buffers:
            self._digest.update(buffer)

    def _wait(self) -> None:
        size, done = self._waiting.popleft()
        done.result()
        self._behind -= size
