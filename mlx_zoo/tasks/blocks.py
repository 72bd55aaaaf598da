"""Answers on the disk: blocks, one for each window, and the file that is made of them."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mlx_zoo.errors import MLXZooError
from mlx_zoo.tasks.batches import Answered, Failure
from mlx_zoo.tasks.inputs import Folder, Lines


class Block(NamedTuple):
    """The answers to a window, somewhere in a file: `size` bytes from `offset`."""

    first: int
    num: int
    failed: list[tuple[int, str, str]]  # (place in the window, input, reason)
    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Part:
    """The file of blocks that this process writes, and nobody else meanwhile."""

    def __init__(self, output: Path, rank: int):
        self.output = output
        self.path = output.with_name(f"{output.name}.part-{rank}")

    def __enter__(self) -> Part:
        """Cuts what is not whole at its end. Raises MLXZooError where another process has it."""
        self.file = self.path.open("ab", buffering=0)  # what could not be written is not kept
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(self.file.fileno()).st_nlink > 0  # who had it may just have left
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            self.file.close()
            raise MLXZooError(f"{self.output}: another process is still at it")
        whole = max((block.offset + block.size for block in read_blocks(self.path)), default=0)
        self.file.truncate(whole)
        return self

    def __exit__(self, *raised: object) -> None:
        found = os.fstat(self.file.fileno())
        if found.st_nlink and not found.st_size:  # else it was removed, as its name may show
            self.path.unlink(missing_ok=True)
        self.file.close()

    def append(self, window: Answered, source: Folder | Lines, task: str) -> None:
        """Raises OSError with the path where the disk is full."""
        found, failed = [], []
        for place, answer in enumerate(window.answers):
            index = window.first + place
            if not _is_finite(answer):
                answer = Failure("the answer has numbers that are not finite")
            if isinstance(answer, Failure):
                answer = Failure(source.reason(index, answer.message))
                failed.append((place, source.name(index), answer.message))
            found.append(answer)
        if self.output.suffix == ".jsonl":
            payload = "".join(_lines(window._replace(answers=found), source, task)).encode()
        else:
            payload = np.array([x for x in found if not isinstance(x, Failure)], "<f4").tobytes()
        head = {"first": window.first, "num": len(found), "failed": failed, "size": len(payload)}
        said = json.dumps(head).encode() + b"\n"
        checksum = zlib.crc32(payload, zlib.crc32(said))
        rest = memoryview(b"%08x %b%b" % (checksum, said, payload))
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_blocks(path: Path) -> Iterator[Block]:
    """The blocks of a file up to the first that is not whole."""
    with path.open("rb") as file:
        while line := file.readline():
            checksum, _, said = line.partition(b" ")
            try:
                head = json.loads(said)
                offset, payload = file.tell(), file.read(head["size"])
                if int(checksum, 16) != zlib.crc32(payload, zlib.crc32(said)):
                    return
            except (ValueError, TypeError, KeyError):
                return
            yield Block(head["first"], head["num"], head["failed"], path, offset, len(payload))


def write_output(path: Path, blocks: Sequence[Block], num_inputs: int) -> None:
    """The file of all answers; it appears whole, or not at all.

    Raises OSError with the path where the disk is full.
    """
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            if path.suffix == ".jsonl":
                for block in blocks:
                    file.write(block.read())
            else:
                _write_vectors(file, path.suffix, blocks, num_inputs)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(new)) from error


def _lines(window: Answered, source: Folder | Lines, task: str) -> Iterator[str]:
    """A record in JSON for each input."""
    keys = ("text", "embedding") if task == "sentence-embedding" else ("input", "answer")
    for place, (item, answer) in enumerate(zip(window.inputs, window.answers, strict=True)):
        record = {keys[0]: source.said(window.first + place, item)}
        if isinstance(answer, Failure):
            record["error"] = answer.message
        else:
            record[keys[1]] = answer.tolist() if isinstance(answer, np.ndarray) else answer
        yield json.dumps(record) + "\n"


def _is_finite(answer: Any) -> bool:
    if isinstance(answer, np.ndarray):
        return bool(np.isfinite(answer).all())
    try:
        json.dumps(answer, allow_nan=False)
    except ValueError:
        return False
    return True


def _write_vectors(file: BinaryIO, suffix: str, blocks: Sequence[Block], num_inputs: int) -> None:
    """(inputs, D) float32; the rows of failures are NaN."""
    good = [(block.num - len(block.failed), block.size) for block in blocks]
    width = next((size // 4 // rows for rows, size in good if rows), 0)
    if suffix == ".npy":
        head = {"descr": "<f4", "fortran_order": False, "shape": (num_inputs, width)}
        np.lib.format.write_array_header_1_0(file, head)
    else:
        shape, size = [num_inputs, width], 4 * num_inputs * width
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
        said = json.dumps({"embeddings": tensor}).encode()
        said += b" " * (-len(said) % 8)
        file.write(len(said).to_bytes(8, "little") + said)
    for block in blocks:
        rows = np.full((block.num, width), np.nan, "<f4")
        failed = {place for place, _, _ in block.failed}
        places = [place for place in range(block.num) if place not in failed]
        rows[places] = np.frombuffer(block.read(), "<f4").reshape(len(places), width)
        file.write(rows.tobytes())
