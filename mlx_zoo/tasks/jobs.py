"""Long work on disk: a folder of images, or a file of texts, answered by a pipeline into one file.

    out.jsonl           the answers, in the order of the inputs; it appears whole, by one rename
    out.jsonl.job       what the work is, and how it ended: of other work the output is refused
    out.jsonl.part-0    until then, blocks of answers; a file of each process

A block has the answers to one window of inputs (`batches.Windows`), and a checksum. So work that is
ended, by whatever, goes on where it was when it is started again: a block that was only half
written is cut, and its inputs are answered again. Windows are the same whoever answers them, and
when; so are the bytes of the output. (A GPU may round otherwise in another process.)

Under `mlx.launch -n 2 -- mlx-zoo ...`, MLX's own distributed backend, the processes take turns with
the windows. Work that goes on need not have as many of them as before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zoo.backend.inference import original_of
from mlx_zoo.backend.processes import Crew
from mlx_zoo.errors import MLXZooError
from mlx_zoo.hub import cache
from mlx_zoo.tasks.batches import Windows, check_count, progress
from mlx_zoo.tasks.blocks import Block, Part, read_blocks, write_output
from mlx_zoo.tasks.generation import fingerprint
from mlx_zoo.tasks.images import Images
from mlx_zoo.tasks.inputs import Folder, Lines

FORMAT = 1  # of what is on the disk beside the output
VECTORS = ("image-feature-extraction", "sentence-embedding")
LABELS = ("image-classification", "fill-mask", "text-classification", "token-classification")
FORMATS = (".jsonl", ".npy", ".safetensors")  # the first of any answers, the others of vectors
NAMED = 20  # failures that a summary names; the output tells of all
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Summary:
    """How work ended."""

    output: Path
    num_inputs: int
    num_before: int  # that an earlier run had answered
    num_failed: int
    failures: tuple[tuple[str, str], ...]  # (input, reason) of the first few
    rank: int = 0  # of this process; others than 0 need not tell what it tells


def answer_all(
    pipeline: Any,
    inputs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    on_error: str = "record",
    batch_size: int = 32,
    **options: Any,
) -> Summary:
    """Write a pipeline's answers to many inputs, in bounded memory; what is done is kept.

    Args:
        pipeline: from `mlx_zoo.pipeline`, of images or of texts.
        inputs: a folder, whose images are found by their names (.jpg, .png, ...; hidden ones are
            none), in the folders below it, too, and sorted; or a file of texts, one a line (UTF-8).
        output: a new file: .jsonl, for each input a line {"input": ..., "answer": ...}, of a
            sentence {"text": ..., "embedding": ...}; vectors also go into .npy, or .safetensors
            where "embeddings" are, (inputs, D) float32.
        on_error: "record": an input that cannot be read has an "error" in its line, or a vector of
            NaN; "stop": it raises ValueError.
        batch_size: how many inputs the network is given at once.
        **options: as the pipeline takes them.

    Raises:
        ValueError: a wrong argument, no inputs, or one that is to "stop" the work.
        MLXZooError: the output is that of other work, or a process is still at it; or, of several
            processes that share the work, another ended early.
        OSError: a file or folder cannot be read or written.
    """
    output = Path(output).expanduser()
    task = getattr(pipeline, "task", None)
    if task not in (*LABELS, *VECTORS):
        raise ValueError(f"{task}: {', '.join((*LABELS, *VECTORS))} can be written to a file")
    known = FORMATS if task in VECTORS else FORMATS[:1]
    if output.suffix not in known:
        raise ValueError(f"{output}: {task} is written as {' or '.join(known)}")
    if on_error not in ("record", "stop"):
        raise ValueError(f"on_error={on_error!r}: 'record' or 'stop' is needed")
    check_count("batch_size", batch_size)
    source = Folder.of(inputs) if isinstance(pipeline, Images) else Lines.of(inputs)
    options["batch_size"] = batch_size
    work = _work(pipeline, source, options)
    crew = Crew()
    crew.agree(work)
    output.parent.mkdir(parents=True, exist_ok=True)
    with Part(output, crew.rank) as part:
        job = Job(output, work)
        if crew.rank == 0:
            job.begin()
        crew.meet()  # every file's torn end is cut, and the job begun
        done = job.done()
        if done is not None:
            return _summary(output, done, done["inputs"], crew)
        answered = {block.first: block.num for block in job.blocks()}
        crew.meet()  # nothing is written before all have seen what there is
        before = sum(answered.values())
        with progress(source.count, shown=crew.size == 1, done=before) as advance:
            windows = Windows(source, _turns(answered, crew), on_error == "stop", advance)
            with closing(pipeline(windows, **options)) as found:
                for window in found:
                    part.append(window, source, task)
        crew.meet()
        if crew.rank == 0:
            job.finish(source.count)
        crew.meet()
    done = job.done()
    assert done is not None
    return _summary(output, done, before, crew)


def _work(pipeline: Any, source: Folder | Lines, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that the bytes of the output depend on, as JSON has it."""
    model, checkpoint = original_of(pipeline.model), pipeline.model.checkpoint
    found = {
        "task": pipeline.task,
        "model": checkpoint.name,
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "weights": fingerprint(model),
        "optimised": model is not pipeline.model,
        "options": options,
        "inputs": source.digest,
        "number of inputs": source.count,
        "device": str(mx.default_device()),
        "threads": " ".join(os.environ.get(name, "-") for name in THREADS),  # they move roundings
        "format": FORMAT,
        **{name: release for name, release in cache.versions().items() if name.startswith("mlx")},
    }
    return json.loads(json.dumps(found, default=str))


def _summary(output: Path, done: Mapping[str, Any], before: int, crew: Crew) -> Summary:
    failures = tuple((name, reason) for name, reason in done["failures"])
    return Summary(output, done["inputs"], before, done["failed"], failures, crew.rank)


class Job:
    """The file that says what work the output is of, and how it ended."""

    def __init__(self, output: Path, work: Mapping[str, Any]):
        self.output = output
        self.work = work
        self.path = output.with_name(output.name + ".job")

    @property
    def parts(self) -> list[Path]:
        start = f"{self.output.name}.part-"
        return sorted(p for p in self.output.parent.iterdir() if p.name.startswith(start))

    def blocks(self) -> list[Block]:
        """Of all processes', the earlier ones' included; one for each window."""
        found = {block.first: block for path in self.parts for block in read_blocks(path)}
        return [found[first] for first in sorted(found)]

    def begin(self) -> None:
        """Make the file, unless the work was begun before.

        Raises MLXZooError where what is on the disk is not of this work.
        """
        if self.path.exists():
            done = self.done()
            if done is None:
                return
            if self.output.exists():
                if self.output.stat().st_size != done["bytes"]:
                    self.refuse("it was changed after it was made")
                self.sweep()
                return
            for path in self.parts:  # which processes hold, to write into
                os.truncate(path, 0)
        elif self.output.exists() or any(path.stat().st_size for path in self.parts):
            self.refuse(f"something is there, without {self.path.name} that says what it is")
        self.write(None)

    def done(self) -> dict[str, Any] | None:
        """How the work ended; None where it has not."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            work, done = dict(found["work"]), found["done"]
        except FileNotFoundError:
            raise MLXZooError(
                f"{self.path} is not there: all processes must see the same folder"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise MLXZooError(
                f"{self.path} is no such file as is written here: give another output, or remove it"
            ) from error
        keys = [*{**self.work, **work}]
        if odd := [key for key in keys if self.work.get(key) != work.get(key)]:
            told = (f"{k} {_told(work.get(k))} there, {_told(self.work.get(k))} here" for k in odd)
            self.refuse(f"it is of other work ({'; '.join(told)})")
        return done

    def refuse(self, reason: str) -> None:
        there = [self.output, self.path, *(path for path in self.parts if path.stat().st_size)]
        names = ", ".join(path.name for path in there if path.exists())
        raise MLXZooError(f"{self.output}: {reason}: give another output, or remove {names}")

    def write(self, done: Mapping[str, Any] | None) -> None:
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps({"work": self.work, "done": done}, indent=2) + "\n", "utf-8")
        new.replace(self.path)

    def finish(self, num_inputs: int) -> None:
        """Make the output of the blocks, and remove them."""
        blocks = self.blocks()
        if sum(block.num for block in blocks) != num_inputs:
            raise MLXZooError(f"{self.output}: a process left out its share; start it again")
        write_output(self.output, blocks, num_inputs)
        failures = [(name, why) for block in blocks for _, name, why in block.failed]
        self.write(
            {
                "inputs": num_inputs,
                "failed": len(failures),
                "failures": failures[:NAMED],
                "bytes": self.output.stat().st_size,
            }
        )
        self.sweep()

    def sweep(self) -> None:
        """Remove the blocks, which the output has."""
        for path in self.parts:
            path.unlink(missing_ok=True)


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _turns(answered: Iterable[int], crew: Crew) -> Callable[[int], bool]:
    """Whether a window is for this process: what nobody has answered is dealt out in turn."""
    turn, known = count(), {*answered}
    return lambda first: first not in known and next(turn) % crew.size == crew.rank
