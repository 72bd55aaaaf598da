"""What a run of fine-tuning keeps on the disk, so that it can go on where it was.

    finetune.json               what the work is: options, data, weights; other work is refused
    checkpoints/step-00000120/  the latest state: `state.json` and `state.safetensors`
    checkpoints/best-00000080/  the best weights so far, which that state names
    log.csv, log.jsonl, curves.svg, model/, adapter/

A checkpoint appears by one rename of its folder, flushed before. Whatever is older goes only then:
there is a whole one at any moment. Its files have hashes, which are checked before it is trusted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zoo.errors import MLXZooError
from mlx_zoo.hub.cache import flush
from mlx_zoo.hub.checkpoint import read_safetensors
from mlx_zoo.hub.reading import Hashing
from mlx_zoo.hub.safetensors_header import read_header
from mlx_zoo.hub.safetensors_writer import write_safetensors
from mlx_zoo.training.history import LINES, TABLE

FORMAT = 1  # of all this
JOB, STATE, ARRAYS = "finetune.json", "state.json", "state.safetensors"

Arrays = Mapping[str, mx.array]


class Checkpoints:
    """The output folder of a run; one process at a time may write there."""

    def __init__(self, output: Path, work: Mapping[str, Any]):
        self.output, self.folder = output, output / "checkpoints"
        self.work = json.loads(json.dumps(work, default=str))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others out. MLXZooError where another process is still at it."""
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output} is a file: give a folder that is new or empty")
        self.output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.output, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise MLXZooError(f"{self.output}: another process is still at it") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def begin(self) -> None:
        """Say what the work is, unless it was begun before.

        Raises MLXZooError where what is in the folder is not of this work.
        """
        path = self.output / JOB
        new = path.with_name(path.name + ".new")
        if any(self.folder.glob("step-*")):
            self._compare(path)
        else:  # nothing was kept yet that another command could lose
            known = {path.name, new.name, LINES, TABLE, self.folder.name}
            if others := sorted({p.name for p in self.output.iterdir()} - known):
                raise MLXZooError(
                    f"{self.output} has other things in it ({', '.join(others[:3])}), and no "
                    "checkpoint: give a folder that is new or empty"
                )
            _write(new, json.dumps({"format": FORMAT, "work": self.work}, indent=2) + "\n")
            new.replace(path)
            flush(self.output)
        self.folder.mkdir(exist_ok=True)
        for folder in (self.folder, self.output, self.output / "adapter"):  # of one that was killed
            for partial in folder.glob(".partial-*"):
                shutil.rmtree(partial)

    def _compare(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            work, kind = dict(found["work"]), found["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MLXZooError(
                f"{path} is no such file as is written here: give another output, or remove it"
            ) from error
        said = {"format": kind, **work}
        mine = {"format": FORMAT, **self.work}
        if odd := [k for k in {**mine, **said} if mine.get(k) != said.get(k)]:
            told = (f"{k} {_told(said.get(k))} there, {_told(mine.get(k))} here" for k in odd)
            raise MLXZooError(
                f"{self.output} is of other work ({'; '.join(told)}): give another output, or "
                "remove it"
            )

    def latest(
        self, sweep: bool
    ) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, mx.array]] | None:
        """The state, its arrays, and the best weights; None where nothing was kept yet.

        `sweep`: remove what a run that was killed had no time to.

        Raises MLXZooError where they are damaged.
        """
        found = sorted(self.folder.glob("step-*"))
        if not found:
            return None
        folder = found[-1]
        try:
            state, arrays = self._read(folder)
            best: dict[str, mx.array] = {}
            if name := state["best_folder"]:
                _, best = self._read(self.folder / name)
        except (OSError, ValueError, KeyError, TypeError, MLXZooError) as error:
            raise MLXZooError(
                f"{folder} is damaged ({error}): put it back as it was, or remove {self.output} "
                "and begin again"
            ) from error
        if sweep:
            self._sweep(folder.name, name)
        return state, arrays, best

    def keep(self, state: Mapping[str, Any], arrays: Arrays, best: Arrays, best_step: int) -> None:
        """Replace the checkpoint by this one.

        Raises MLXZooError where the disk is full or cannot be written; the one before is whole.
        """
        name = f"best-{best_step:08d}" if best else None
        target = self.folder / f"step-{state['step']:08d}"
        try:
            if name and not (self.folder / name).exists():
                self._write(self.folder / name, {"step": best_step}, best)
            self._write(target, {**state, "best_folder": name}, arrays)
        except OSError as error:
            raise MLXZooError(
                f"the checkpoint of step {state['step']} cannot be written: {error}; the one "
                "before is whole: make room, and the same command goes on from there"
            ) from error
        self._sweep(target.name, name)

    def _sweep(self, *kept: str | None) -> None:
        """Remove all checkpoints but these."""
        for other in self.folder.iterdir():
            if other.name not in kept:
                shutil.rmtree(other, ignore_errors=True)

    def _write(self, target: Path, state: Mapping[str, Any], arrays: Arrays) -> None:
        work = self.folder / f".partial-{target.name}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir()
            hashed = write_safetensors(work / ARRAYS, arrays, {})
            text = json.dumps(state)
            said = {"state": state, "sha256": {ARRAYS: hashed, "state": _sha256(text)}}
            _write(work / STATE, json.dumps(said) + "\n")
            flush(work / ARRAYS)
            flush(work)
            work.rename(target)
            flush(self.folder)
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise

    def _read(self, folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
        said = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state, hashes = said["state"], said["sha256"]
        if _sha256(json.dumps(state)) != hashes["state"]:
            raise MLXZooError(f"{STATE} was changed")
        with Hashing() as digest:
            arrays = read_safetensors(folder / ARRAYS, read_header(folder / ARRAYS), digest)
            if digest.hexdigest() != hashes[ARRAYS]:
                raise MLXZooError(f"{ARRAYS} does not have the sha256 that was written")
        return state, arrays


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sha256(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
