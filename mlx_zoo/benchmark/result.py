"""What a benchmark found: a value, a table, JSON, a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_zoo.benchmark.timing import Ratio, Timing
from mlx_zoo.errors import MLXZooError

FORMAT = 1  # of the JSON
OURS = ("mlx_zoo", "mlx_zoo optimised")
GIB = 1 << 30
HEAD = ("", "ms", "±", "p95", "p99", "runs", "per second", "memory", "ours / theirs", "rounds")


@dataclass(frozen=True)
class Case:
    """What is computed: a `phase` of a network, on inputs of a shape.

    "forward" is a call of the network. "prefill" reads a prompt, fills the cache and gives the
    logits of the next token; "decode" is one further token of every row.
    """

    phase: str
    shape: tuple[int, ...]  # images (B, H, W, C), ids (B, N)
    dtype: str
    vocab: int = 0  # of ids; 0 for images
    new_tokens: int = 0  # that are decoded

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def unit(self) -> str:
        """What a throughput counts."""
        if not self.vocab:
            return "images"
        return "sequences" if self.phase == "forward" else "tokens"

    @property
    def amount(self) -> int:
        """How many of them one run computes."""
        return self.batch * self.shape[1] if self.phase == "prefill" else self.batch

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape[1:3] if not self.vocab else self.shape[1:]))
        after = "after " if self.phase == "decode" else ""
        kind = " tokens" if self.vocab else ""
        return f"{self.phase}, batch {self.batch}, {after}{size}{kind}, {self.dtype}"


@dataclass(frozen=True)
class Row:
    """One contestant in one case. Without a `timing`, `error` says why."""

    case: Case
    contestant: str
    timing: Timing | None = None
    first: float | None = None  # seconds of the first run, which compiles
    memory: int | None = None  # bytes: the peak of the process while this case ran
    framework_memory: int | None = None  # the peak as MLX or CUDA counts it
    busy: float = 0.0  # share of a core that it used while the others ran
    error: str = ""

    @property
    def throughput(self) -> float | None:
        """By the median: images, sequences or tokens a second."""
        return self.case.amount / self.timing.median if self.timing else None

    def to_json(self) -> dict[str, Any]:
        return {
            "case": asdict(self.case),
            "contestant": self.contestant,
            "seconds": self.timing and self.timing.to_json(),
            "throughput": self.throughput,
            "unit": f"{self.case.unit}/s",
            "first_run_seconds": self.first,
            "process_peak_bytes": self.memory,
            "framework_peak_bytes": self.framework_memory,
            "busy_at_rest": self.busy,
            "error": self.error or None,
        }


@dataclass(frozen=True)
class Bound:
    """What the machine allows in a case: no layer is faster than its sums, nor than its bytes.

    Bytes are those that cannot be avoided: every layer's weights, its input and its output, once.
    """

    case: Case
    flops: int
    bytes: int
    seconds: float  # layer by layer, the longer of the two
    compute_share: float  # of these seconds, in layers whose sums take longer
    covered: float  # share of the parameters whose layers were seen

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Loading:
    """From a checkpoint on disk to a network in memory; seconds are medians over the rounds."""

    contestant: str
    seconds: Mapping[str, float]  # how -> how long
    bytes: int  # of the checkpoint
    grown: int | None = None  # bytes of memory at most, on top of what there was: the first way

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """A benchmark of one network. `print` shows a table."""

    name: str
    device: str
    machine: Mapping[str, Any]
    contestants: Mapping[str, Mapping[str, Any]]  # name -> versions, seconds to import and build
    rows: tuple[Row, ...]
    loading: tuple[Loading, ...] = ()
    bounds: tuple[Bound, ...] = ()
    ceilings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # dtype -> measured
    repeat: str = ""  # the command
    notes: tuple[str, ...] = ()

    def row(self, case: Case, contestant: str) -> Row | None:
        return next((r for r in self.rows if (r.case, r.contestant) == (case, contestant)), None)

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def ours(self, case: Case) -> Row:
        """Our faster one in a case."""
        rows = [row for row in self.rows if row.case == case and row.contestant in OURS]
        return min(rows, key=lambda r: r.timing.median if r.timing else float("inf"))

    def ratio(self, case: Case, theirs: str, ours: str | None = None) -> Ratio | None:
        """Our time over theirs in a case; of our faster one where `ours` is not said."""
        own = self.ours(case) if ours is None else self.row(case, ours)
        other = self.row(case, theirs)
        if own is None or other is None or own.timing is None or other.timing is None:
            return None
        return Ratio.of(own.timing, other.timing)

    def peak(self, row: Row) -> int | None:
        """Bytes: of the GPU as the framework counts them, on the CPU of the whole process."""
        return row.framework_memory if self.device == "gpu" else row.memory

    def per_gib(self, contestant: str) -> float | None:
        """How many more rows of a batch a GiB of memory holds, where several were measured.

        The peak of the largest batch less that of the smallest: networks and libraries cancel.
        """
        rows = [r for r in self.rows if r.contestant == contestant and r.timing]
        kinds = [(r.case.phase, r.case.dtype, r.case.shape[1:]) for r in rows]
        alike = (r for r, kind in zip(rows, kinds, strict=True) if kind == kinds[0])
        peaks = [(r.case.batch, self.peak(r) or 0) for r in alike]
        (low, least), (high, most) = min(peaks, default=(0, 0)), max(peaks, default=(0, 0))
        return (high - low) / (most - least) * GIB if most > least > 0 else None

    # To others ----------------------------------------------------------------------------------

    def to_json(self) -> str:
        return json.dumps(self.summary(), indent=2, default=str)

    def summary(self) -> dict[str, Any]:
        """What `to_json` writes: plain values, times in seconds, memory in bytes."""
        return {
            "format": FORMAT,
            "name": self.name,
            "device": self.device,
            "machine": dict(self.machine),
            "contestants": {name: dict(facts) for name, facts in self.contestants.items()},
            "rows": [row.to_json() for row in self.rows],
            "ratios": [
                {"case": asdict(case), "ours": ours, "theirs": theirs, **asdict(ratio)}
                for case, ours, theirs, ratio in self._ratios()
            ],
            "loading": [loading.to_json() for loading in self.loading],
            "bounds": [bound.to_json() for bound in self.bounds],
            "ceilings": {dtype: dict(found) for dtype, found in self.ceilings.items()},
            "repeat": self.repeat,
            "notes": list(self.notes),
        }

    def _ratios(self) -> Iterator[tuple[Case, str, str, Ratio]]:
        names = list(dict.fromkeys(row.contestant for row in self.rows))
        for case in self.cases:
            for ours in (name for name in names if name in OURS):
                for theirs in (name for name in names if name not in OURS):
                    if ratio := self.ratio(case, theirs, ours):
                        yield case, ours, theirs, ratio

    def to_svg(self) -> str:
        """Bars for each case; lines where there are more than three batches or lengths."""
        from mlx_zoo.benchmark.plot import plot

        return plot(self)

    def save_plot(self, path: Path) -> None:
        """Raises MLXZooError where nothing was measured."""
        if not any(row.timing for row in self.rows):
            raise MLXZooError("nothing was measured that could be plotted")
        path.write_text(self.to_svg(), encoding="utf-8")

    def lines(self) -> list[tuple[str, ...]]:
        """The table's rows: of a case its name, then its contestants."""
        found: list[tuple[str, ...]] = []
        for case in self.cases:
            found.append((str(case),))
            found += [self._cells(row) for row in self.rows if row.case == case]
        return found

    def _cells(self, row: Row) -> tuple[str, ...]:
        t = row.timing
        if t is None:
            return (f"  {row.contestant}", row.error)
        memory = self.peak(row)
        ratio = None if row.contestant in OURS else self.ratio(row.case, row.contestant)
        return (
            f"  {row.contestant}",
            milliseconds(t.median),
            milliseconds(t.std),
            milliseconds(t.percentile(95)),
            milliseconds(t.percentile(99)),
            str(t.num_runs),
            f"{row.throughput:,.4g} {row.case.unit}",
            "" if memory is None else f"{memory / GIB:.2f} GiB",
            "" if ratio is None else f"{ratio.median:.2f}",
            "" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}",
        )

    def remarks(self) -> list[str]:
        """What is said below the table."""
        found = []
        for one in self.loading:
            parts = ", ".join(f"{how} {1e3 * x:,.0f} ms" for how, x in one.seconds.items())
            cold = one.seconds.get("cold")
            rate = f" ({one.bytes / cold / 1e6:,.0f} MB/s cold)" if cold else ""
            grown = (
                "" if one.grown is None else f"; memory + {one.grown / one.bytes:.2f} x the file"
            )
            found.append(
                f"loading {one.bytes / 1e6:,.0f} MB, {one.contestant}: {parts}{rate}{grown}"
            )
        for bound in self.bounds:
            row = self.ours(bound.case)
            used = f": {bound.seconds / row.timing.median:.0%} of ours" if row.timing else ""
            what = "compute" if bound.compute_share > 0.5 else "memory"
            found.append(
                f"roofline, {bound.case}: {bound.flops / 1e9:,.1f} GFLOP, "
                f"{bound.bytes / 1e6:,.0f} MB, at least {milliseconds(bound.seconds)} ms{used}; "
                f"{what} bounds {max(bound.compute_share, 1 - bound.compute_share):.0%} of it"
            )
        for name in self.contestants:
            if more := self.per_gib(name):
                found.append(f"{name}: each GiB holds {more:,.0f} more {self.cases[0].unit}")
        for dtype, its in self.ceilings.items():
            found.append(
                f"this machine, {dtype}: {its['gflops']:,.0f} GFLOP/s in a matrix product, "
                f"{its['gb_per_second']:,.0f} GB/s in a copy"
            )
        found.append(", ".join(f"{name}: {fact}" for name, fact in self.machine.items()))
        for name, facts in self.contestants.items():
            versions = ", ".join(f"{package} {v}" for package, v in facts["versions"].items())
            found.append(f"{name}: {versions}")
        return found + [f"note: {note}" for note in self.notes] + [f"again: {self.repeat}"]

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for i, column in enumerate(HEAD):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        failed = []
        for cells in self.lines():
            if len(cells) == 2:  # the whole reason below: it would widen a column
                failed.append(Text(f"{cells[0].strip()}: {cells[1]}"))
                cells = (cells[0], "failed")
            table.add_row(*map(Text, cells), style="bold" if len(cells) == 1 else None)
        return Group(table, *dict.fromkeys(map(str, failed)), *map(Text, self.remarks()))


def milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all but its first column to the right."""
    rule = ("---", *["---:"] * (len(head) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
