"""The parent: hands ranges of cases to workers, outlives them, and sums up."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .case import MAX_SECONDS, Result

TESTS = Path(__file__).parents[1]
BATCH = 5_000  # cases of one process
PATIENCE = {"make": 120.0, "ours": MAX_SECONDS, "theirs": 20.0}  # s; make: imports come first


@dataclass
class Summary:
    """What a run found. `failures` has every case that should not be as it is."""

    target: str
    first: int
    cases: int = 0
    seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # ours, by type
    reasons: Counter[str] = field(default_factory=Counter)  # ours, by message
    only_ours: Counter[str] = field(default_factory=Counter)  # why we alone refuse
    excuses: Counter[str] = field(default_factory=Counter)
    died: Counter[str] = field(default_factory=Counter)  # the reference, and how
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)  # seconds, case
    peak: tuple[int, int] = (0, 0)  # bytes of memory, case
    ratio: tuple[float, int] = (0.0, 0)  # bytes of memory a byte, of inputs over 1 MiB; case

    def add(self, result: Result) -> None:
        self.cases += 1
        accepted = result.ours == "accepted", result.theirs == "accepted"
        verdict = {
            (True, True): "both accept",
            (False, False): "both refuse",
            (False, True): "only we refuse",
            (True, False): "only we accept",
        }[accepted]
        if result.excuse:
            verdict = "only we accept, excused"
            self.excuses[result.excuse] += 1
        self.verdicts[verdict] += 1
        if result.ours != "accepted":
            self.errors[result.ours] += 1
            self.reasons[result.why] += 1
            if accepted[1]:
                self.only_ours[result.why] += 1
        self.failures += [(result.number, problem) for problem in result.problems]
        self.slowest = max(self.slowest, (result.seconds, result.number))
        if result.peak is not None:
            self.peak = max(self.peak, (result.peak, result.number))
            if result.size >= 1 << 20:
                self.ratio = max(self.ratio, (result.peak / result.size, result.number))

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "target": self.target,
            "first": self.first,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
        }
        shown |= {name: self.verdicts[name] for name in VERDICTS}
        shown |= {"failures": self.failures[:100], "num_failures": len(self.failures)}
        for name in ("errors", "excuses", "died", "only_ours", "reasons"):
            shown[name] = dict(getattr(self, name).most_common(40))
        for name in ("slowest", "peak", "ratio"):
            value, number = getattr(self, name)
            shown[name] = {"value": round(value, 4), "case": number}
        return shown

    def __str__(self) -> str:
        lines = [
            f"{self.target}: cases {self.first} to {self.first + self.cases - 1}, "
            f"{self.seconds:.0f} s"
        ]
        lines += [
            f"  {count:>8} {100 * count / max(1, self.cases):5.1f} %  {name}"
            for name in VERDICTS
            if (count := self.verdicts[name]) or name != VERDICTS[-1]
        ]
        for title, counter in (
            ("errors by type", self.errors),
            ("what we refuse", self.reasons),
            ("what only we refuse", self.only_ours),
            ("excused", self.excuses),
            ("how the reference died", self.died),
        ):
            lines += [f"  {title}:", *(f"  {n:>8}  {what}" for what, n in counter.most_common(25))]
        lines += [
            f"  slowest: {self.slowest[0]:.3f} s, case {self.slowest[1]}",
            f"  most memory: {self.peak[0] / 2**20:.1f} MiB, case {self.peak[1]}; of inputs over "
            f"1 MiB {self.ratio[0]:.2f} bytes a byte, case {self.ratio[1]}",
            f"  failures: {len(self.failures)}",
            *(f"  {number:>8}  {what}" for number, what in self.failures[:50]),
        ]
        return "\n".join(lines)


VERDICTS = (
    "both accept",
    "both refuse",
    "only we refuse",
    "only we accept, excused",
    "only we accept",
)


@dataclass
class Worker:
    """A process with cases to judge, and the last that was heard of it."""

    process: subprocess.Popen[bytes]
    end: int  # the first case that is not its own
    number: int
    stderr: Any
    phase: str = "make"
    result: dict[str, Any] | None = None
    since: float = field(default_factory=time.monotonic)
    rest: bytes = b""
    ended: bool = False


def run(
    target: str,
    first: int,
    count: int,
    jobs: int = 1,
    progress: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Judge cases `first` to `first + count - 1` of a target: the name of a module.

    Raises RuntimeError where a case cannot even be made: that is a mistake in the target.
    """
    start = time.monotonic()
    summary = Summary(target.rpartition(".")[2], first)
    size = min(BATCH, -(-count // jobs))
    todo = [(n, min(n + size, first + count)) for n in range(first, first + count, size)][::-1]
    workers: list[Worker] = []
    selector = selectors.DefaultSelector()
    try:
        while todo or workers:
            while todo and len(workers) < jobs:
                workers.append(_start(target, *todo.pop()))
                selector.register(workers[-1].process.stdout, selectors.EVENT_READ, workers[-1])
            for key, _ in selector.select(timeout=0.2):
                _listen(key.data, summary)
            for worker in list(workers):
                hangs = time.monotonic() - worker.since > PATIENCE[worker.phase]
                if hangs and not worker.ended:
                    worker.process.kill()
                if worker.ended or hangs:
                    selector.unregister(worker.process.stdout)
                    workers.remove(worker)
                    if left := _bury(worker, summary, "hung" if hangs else ""):
                        todo.append(left)
            summary.seconds = time.monotonic() - start
            progress(summary)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
        selector.close()
    summary.failures.sort()
    return summary


def _start(target: str, first: int, end: int) -> Worker:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        ),
        "PYTHONWARNINGS": "ignore",
    }
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the worker is buried
    process = subprocess.Popen(
        [sys.executable, "-m", "fuzz.worker", target, str(first), str(end - first)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
    )
    return Worker(process, end, first, stderr)


def _listen(worker: Worker, summary: Summary) -> None:
    """Take in what a worker says."""
    data = os.read(worker.process.stdout.fileno(), 1 << 16)
    worker.ended = not data
    *lines, worker.rest = (worker.rest + data).split(b"\n")
    for line in lines:
        phase, _, value = line.partition(b" ")
        worker.phase, worker.since = phase.decode(), time.monotonic()
        if worker.phase == "make":
            worker.number = int(value)
        else:
            worker.result = json.loads(value)
        if worker.phase == "done":
            summary.add(Result(**worker.result))
            worker.phase, worker.number = "make", worker.number + 1


def _bury(worker: Worker, summary: Summary, how: str) -> tuple[int, int] | None:
    """Note what a worker died of, if it did. The cases that it leaves behind, if any."""
    code = worker.process.wait()
    worker.process.stdout.close()
    worker.stderr.seek(0)
    said = worker.stderr.read()[-2000:].decode(errors="replace")
    worker.stderr.close()
    if not how and code == 0 and worker.number == worker.end:
        return None
    how = how or (f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}")
    if worker.phase == "make":
        raise RuntimeError(f"{summary.target}: case {worker.number} was not made: {how}\n{said}")
    result = Result(**worker.result)
    if worker.phase == "ours":
        result.ours = how
        result.problems.append(f"{how} while we read it")
    else:
        result.theirs, result.their_why = "refused", how
        summary.died[how] += 1
        if result.ours == "accepted":
            result.problems.append(f"accepted, but the reference {how}")
    summary.add(result)
    left = worker.number + 1, worker.end
    return left if left[0] < left[1] else None
