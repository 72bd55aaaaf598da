"""The turns that contestants take, each in its worker process, and how long they need."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_zoo.benchmark import roofline
from mlx_zoo.benchmark.process import Process, WorkerError
from mlx_zoo.benchmark.result import OURS, Bound, Case, Loading, Row
from mlx_zoo.benchmark.timing import Timing

# Seconds between turns. OpenMP's threads spin after their last loop, MKL's for 0.2 s, before they
# sleep; until then they would slow the next contestant.
SETTLE = {"cpu": 0.3, "gpu": 0.1}
MIN_RUNS = {"forward": 3, "prefill": 3, "decode": 1}  # of a turn; to decode takes many steps
LOADINGS = 3  # rounds
SLOWEST = 5.0  # seconds: a sweep ends before runs that take longer
ROOM = 0.8  # of the memory that is free, for a sweep


@dataclass(frozen=True)
class Contestant:
    """A framework with a network, in a process of its own."""

    name: str
    framework: str
    variant: str
    network: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is the same for all contestants."""

    device: str
    dtype: str
    threads: int
    tf32: bool
    rounds: int
    seconds: float  # of a turn, at least

    @property
    def settle(self) -> float:
        return SETTLE[self.device]

    def start(self, contestant: Contestant, stack: ExitStack) -> tuple[Process, dict[str, Any]]:
        """The contestant's worker, with its network, and what it says of itself."""
        worker = Process(contestant.name, self.threads)
        stack.callback(worker.close)
        order = {name: getattr(self, name) for name in ("device", "dtype", "threads", "tf32")}
        order |= {name: getattr(contestant, name) for name in ("framework", "variant", "network")}
        return worker, worker.ask("start", **order)


class Contest:
    """Workers with a network each, of one dtype, and their turns.

    Args:
        stack: ends the workers.
        begin: is told what is measured next.
    """

    def __init__(
        self,
        setting: Setting,
        contestants: Sequence[Contestant],
        stack: ExitStack,
        begin: Callable[[str], None],
    ):
        self.setting = setting
        self.begin = begin
        self.workers: dict[str, Process] = {}
        self.facts: dict[str, dict[str, Any]] = {}  # what the workers say of themselves
        self.failed: dict[str, str] = {}  # contestant -> why it takes part no longer
        self.names = [contestant.name for contestant in contestants]
        self.bounds: list[Bound] = []
        for contestant in contestants:
            name = contestant.name
            begin(f"{name} is built, in {setting.dtype}")
            try:
                self.workers[name], self.facts[name] = setting.start(contestant, stack)
            except WorkerError as error:
                self._leaves(name, error)
        begin("the machine itself")
        self.ceilings: dict[str, float] = {}  # by whoever comes nearest to them
        for name in (name for name in (OURS[0], "torch") if name in self.workers):
            try:
                for what, value in self.workers[name].ask("ceilings").items():
                    self.ceilings[what] = max(value, self.ceilings.get(what, 0.0))
            except WorkerError as error:
                self._leaves(name, error)
            time.sleep(setting.settle)

    def _leaves(self, name: str, error: WorkerError) -> None:
        """Without ours there is no benchmark; another's failure is a row."""
        if name in OURS:
            raise error
        self.failed[name] = str(error)
        if name in self.workers:
            self.workers.pop(name).close()

    def run(self, cases: Sequence[Case], sweep: bool) -> Iterator[Row]:
        """The rows, case by case. In a sweep, contestants leave before a case becomes too large."""
        for case in cases:
            if not any(name in self.workers for name in OURS):
                return
            for row in self._measure(case, sweep):
                yield row
                if sweep and row.contestant in self.workers and is_last(row):
                    self.workers.pop(row.contestant).close()

    def _measure(self, case: Case, sweep: bool) -> Iterator[Row]:
        errors: dict[str, str] = {}

        def ask(name: str, do: str, **order: Any) -> dict[str, Any] | None:
            """The answer, or None of a contestant that fails here."""
            try:
                return self.workers[name].ask(do, **order)
            except WorkerError as error:
                if name in OURS and not sweep:
                    raise
                errors[name] = str(error)
                if error.died or sweep:  # else its next case may be one that it can do
                    self.failed[name] = str(error)
                    self.workers.pop(name).close()
                return None

        first: dict[str, float] = {}
        for name in list(self.workers):
            self.begin(f"{case}: {name} warms up")
            if answer := ask(name, "prepare", case=asdict(case)):
                first[name] = answer["first"]
            time.sleep(self.setting.settle)
        how = {"seconds": self.setting.seconds, "runs": MIN_RUNS[case.phase]}
        turns: dict[str, list[tuple[float, ...]]] = {name: [] for name in first}
        busy = dict.fromkeys(first, 0.0)
        for i in range(self.setting.rounds):
            for name in [name for name in first if name not in errors]:
                self.begin(f"{case}: round {i + 1} of {self.setting.rounds}, {name}")
                answer = ask(name, "round", **how)
                time.sleep(self.setting.settle)
                if answer and ask(name, "rest") is not None:
                    turns[name].append(tuple(answer["seconds"]))
                    busy[name] = max(busy[name], answer["busy"])
        for name in self.names:
            peak = ask(name, "memory") if name in first and name not in errors else None
            if peak:
                timing = Timing(tuple(turns[name]))
                memory = (peak["process"], peak["framework"])
                yield Row(case, name, timing, first[name], *memory, busy=busy[name])
            elif name in errors or (name in self.failed and not sweep):
                yield Row(case, name, error=errors.get(name) or self.failed[name])
        if counted := OURS[0] in self.workers and ask(OURS[0], "count", case=asdict(case)):
            self.bounds.append(self._bound(case, counted))

    def _bound(self, case: Case, counted: Mapping[str, Any]) -> Bound:
        work = [roofline.Work(*pair) for pair in counted["work"]]
        limits = (self.ceilings["gflops"], self.ceilings["gb_per_second"])
        flops, size = sum(x.flops for x in work), sum(x.bytes for x in work)
        return Bound(case, flops, size, *roofline.bound(work, *limits), counted["covered"])


def is_last(row: Row) -> bool:
    """Whether the next case of a sweep would take too long, or more memory than there is."""
    if row.timing is None:
        return False
    free = free_memory()
    larger = 2 * (row.memory or 0)
    return 4 * row.timing.median > SLOWEST or (free is not None and larger > ROOM * free)


def free_memory() -> int | None:
    """Bytes that the system could still give, where it says so."""
    try:
        said = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in said.splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def time_loading(
    setting: Setting, contestants: Sequence[Contestant], begin: Callable[[str], None]
) -> tuple[Loading, ...]:
    """Ours cold and warm, and PyTorch's ways, from one checkpoint in a temporary folder.

    PyTorch writes it; where PyTorch takes no part, ours does. It lies in the page cache, so this
    times the reading of a file, not the disk.
    """
    by_framework = {c.framework: c for c in reversed(contestants)}  # the plain ones come first
    by_framework.pop("mlx-lm", None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        begin("a checkpoint is written")
        workers = {}
        for framework, contestant in by_framework.items():
            workers[framework], _ = setting.start(contestant, stack)
        writer = "torch" if "torch" in workers else "mlx_zoo"
        path = str(Path(folder, "weights.pth" if writer == "torch" else "weights.safetensors"))
        size = workers[writer].ask("save", path=path)["bytes"]
        found: dict[str, list[dict[str, Any]]] = {framework: [] for framework in workers}
        for i in range(LOADINGS):
            for framework, worker in workers.items():
                begin(f"loading: round {i + 1} of {LOADINGS}, {framework}")
                found[framework].append(worker.ask("load", path=path))
                time.sleep(setting.settle)
    return tuple(
        Loading(
            framework,
            {
                how: statistics.median(a["seconds"][how] for a in answers)
                for how in answers[0]["seconds"]
            },
            size,
            max((a["grown"] for a in answers if a["grown"] is not None), default=None),
        )
        for framework, answers in found.items()
    )
