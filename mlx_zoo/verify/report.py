"""The result of a verification, and how its figures are judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

# How far ours and PyTorch's may be apart, as a part of the largest value.
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
# Errors below this part of the largest value are chance: eight roundings in float32, else one.
CHANCE = {"float32": 8 * 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FACTOR = 4.0  # how many times PyTorch's own rounding error ours may be, both against float64

NUM_SAMPLES = 8  # of the values of an output, that a report shows one by one
NUM_BINS = 41  # of the distribution of their errors; one is about zero
SHORT, NUM_WORST = 30, 10  # a table of so many layers is printed; of a longer one, the worst


@dataclass(frozen=True)
class Comparison:
    """One layer's (or output's) values, ours and PyTorch's, on the same input."""

    printed: ClassVar[bool] = False  # whether theirs are figures that somebody printed, rounded
    name: str
    max_abs: float  # ours against PyTorch, in the same precision
    mean_abs: float
    scale: float  # the largest magnitude, in float64
    error: float  # ours against PyTorch in float64
    torch_error: float  # PyTorch in our precision against itself in float64
    precision: str = "float32"
    note: str = ""  # why there are no figures, where there are none

    @property
    def tolerance(self) -> float:
        """Of `max_rel`."""
        return TOLERANCES[self.precision]

    @property
    def max_rel(self) -> float:
        """`max_abs` relative to the largest value of the layer."""
        return self.relative(self.max_abs)

    @property
    def bound(self) -> float:
        """Of `error`: a small multiple of what rounding costs PyTorch itself."""
        return FACTOR * max(self.torch_error, CHANCE[self.precision] * self.scale)

    @property
    def ratio(self) -> float:
        """Our error over PyTorch's own, both against float64; 1 where both are exact."""
        if not self.is_finite:
            return float("inf")
        if self.torch_error:
            return self.error / self.torch_error
        return float("inf") if self.error else 1.0

    @property
    def is_finite(self) -> bool:
        """Whether there is something to judge, and something to judge it by."""
        return bool(np.isfinite([self.max_abs, self.error, self.bound]).all())

    @property
    def strain(self) -> float:
        """How much of the bound our error uses up; infinite for what is not finite."""
        if not self.is_finite:
            return float("inf")
        return self.error / self.bound if self.bound else float(self.error > 0)

    @property
    def passed(self) -> bool:
        """Equal as far as the precision allows.

        The error against float64 is a small multiple of what rounding costs PyTorch itself; and
        where that cost is small, the two also agree to the tolerance. In half precision, whose
        tolerance is wide, either is enough.
        """
        if not self.is_finite:
            return False
        allowed = self.tolerance * self.scale
        accurate = self.error <= self.bound
        if self.precision != "float32":
            return accurate or self.max_abs <= allowed
        return accurate and (self.max_abs <= allowed or self.torch_error > allowed)

    def relative(self, figure: float) -> float:
        """A figure as a part of the largest value; as it is where all values are zero."""
        return figure / self.scale if self.scale else figure


def judge(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    double: np.ndarray,
    precision: str = "float32",
) -> Comparison:
    """Compare arrays of one shape: ours, PyTorch's in the same precision and in float64."""
    if not ours.shape == theirs.shape == double.shape or not ours.size:
        note = f"{_shape(ours)} here, {_shape(double)} in PyTorch"
        return Comparison(name, np.inf, np.inf, 1.0, np.inf, 0.0, precision, note)
    ours = ours.astype(np.float64)
    difference = np.abs(ours - theirs)
    return Comparison(
        name=name,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        scale=float(np.abs(double).max()),
        error=float(np.abs(ours - double).max()),
        torch_error=float(np.abs(theirs - double).max()),
        precision=precision,
    )


def _shape(x: np.ndarray) -> str:
    return " x ".join(map(str, x.shape)) or "one value"


# Gradients --------------------------------------------------------------------------------------

# Of the largest value of a parameter's gradient, against float64: in float64, which proves every
# formula and what it is of, and in float32.
PROOF_TOLERANCE, GRADIENT_TOLERANCE = 1e-9, 1e-4
VANISHING = 1e-9  # of the network's largest gradient: below, float64's own roundings are all it is


@dataclass(frozen=True)
class Gradient:
    """The gradient of one parameter, or of the images, ours and PyTorch's.

    One in float32 *jumps* where relu or a pool is on the other side of its kink than in float64,
    because of a rounding: `error` is without that, `raw_error` and `torch_error` are with it.
    """

    name: str
    double_error: float  # ours in float64 against PyTorch's in float64
    error: float  # ours in float32 against ours in float64, on the same side of every kink
    raw_error: float  # ours in float32 against PyTorch's in float64
    torch_error: float  # PyTorch's in float32 against its own in float64
    scale: float  # the largest value, in float64
    network_scale: float  # of all gradients of the network

    @property
    def vanishes(self) -> bool:
        """Whether the true gradient is 0: that of a bias before a norm, or of attention's keys."""
        return self.scale <= VANISHING * self.network_scale

    @property
    def double_rel(self) -> float:
        """`double_error` relative to the largest value; to that of the network where this is 0."""
        return self._relative(self.double_error)

    @property
    def max_rel(self) -> float:
        """`error`, likewise."""
        return self._relative(self.error)

    @property
    def raw_rel(self) -> float:
        """`raw_error`, likewise."""
        return self._relative(self.raw_error)

    @property
    def torch_rel(self) -> float:
        """`torch_error`, likewise."""
        return self._relative(self.torch_error)

    @property
    def passed(self) -> bool:
        """Proven in float64; and in float32 nothing but roundings."""
        proven = self.double_rel <= PROOF_TOLERANCE
        return bool(proven and self.max_rel <= GRADIENT_TOLERANCE)

    def _relative(self, error: float) -> float:
        scale = self.network_scale if self.vanishes else self.scale
        return error / scale if scale else error


def largest(gradients: Sequence[Gradient], figure: str) -> Gradient:
    """The one whose `figure`, "max_rel" say, is largest; NaN is."""

    def size(gradient: Gradient) -> float:
        value = getattr(gradient, figure)
        return np.inf if np.isnan(value) else value

    return max(gradients, key=size)


# A closer look at the outputs -------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One value of an output: ours, PyTorch's in the same precision, and in float64."""

    output: str
    index: tuple[int, ...]
    label: str  # of the class, where the checkpoint has one; else ""
    ours: float
    torch: float
    truth: float


@dataclass(frozen=True)
class Spread:
    """How the errors of an output's values are distributed, both against float64.

    Counts of values in NUM_BINS bins of one width, from -reach to reach. With a reach of 0 there is
    no error at all. `nonfinite` values of ours are in no bin.
    """

    output: str
    reach: float
    ours: tuple[int, ...]
    torch: tuple[int, ...]
    nonfinite: int = 0


def look_closely(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    double: Mapping[str, np.ndarray],
    labels: tuple[str, ...] = (),
) -> dict[str, Any]:
    """`samples` and `spreads` of the outputs, as a Report takes them.

    Of outputs of one shape alone. The samples are the largest values, and the one in which ours and
    PyTorch's are farthest apart. `labels` are of the last axis, where it is as long.
    """
    same = [name for name in ours if ours[name].shape == double[name].shape and ours[name].size]
    values = {name: (ours[name], theirs[name], double[name]) for name in same}
    return {
        "samples": tuple(x for name in same for x in _samples(name, *values[name], labels)),
        "spreads": tuple(_spread(name, *values[name]) for name in same),
    }


def _samples(name: str, ours, theirs, double, labels: tuple[str, ...]) -> list[Sample]:
    order = np.nan_to_num(double.reshape(-1), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    count = min(NUM_SAMPLES, order.size)
    largest = np.argpartition(-order, count - 1)[:count]
    apart = np.abs(ours.astype(np.float64) - theirs).reshape(-1)
    farthest = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
    chosen = {*map(int, largest), farthest}
    known = labels if double.ndim and double.shape[-1] == len(labels) else ()
    found = []
    for flat in sorted(chosen, key=lambda i: (-order[i], i)):
        at = tuple(map(int, np.unravel_index(flat, double.shape)))
        label = known[at[-1]] if known else ""
        found.append(Sample(name, at, label, *(float(x[at]) for x in (ours, theirs, double))))
    return found


def _spread(name: str, ours, theirs, double) -> Spread:
    errors = [(x.astype(np.float64) - double).reshape(-1) for x in (ours, theirs)]
    finite = [x[np.isfinite(x)] for x in errors]
    reach = max((float(np.abs(x).max()) for x in finite if x.size), default=0.0)
    counts = [
        np.histogram(x / reach if reach else x, NUM_BINS, range=(-1, 1))[0].tolist() for x in finite
    ]
    up, down = map(tuple, counts)
    return Spread(name, reach, up, down, nonfinite=errors[0].size - finite[0].size)


# The report -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreprocessingDifference:
    """Between our images and the publisher's, in grey levels of 255, before the mean is taken."""

    max_abs: float
    mean_abs: float
    reference: str  # whose images ours were compared with
    num_images: int

    @property
    def passed(self) -> bool:
        """Within one grey level, whole numbers but for float32's rounding."""
        return self.max_abs < 1.01

    def __str__(self) -> str:
        return (
            f"{self.max_abs:.2g} of 255 grey levels at most, {self.mean_abs:.1g} on average, from "
            f"{self.reference} on {self.num_images} images"
        )


@dataclass(frozen=True)
class Report:
    """Whether a network computes what its PyTorch original computes, and the figures for it.

    `layers` are in the order of execution; `outputs` are what the network returns.
    """

    name: str
    evidence: str  # what it was compared with
    outputs: tuple[Comparison, ...]
    layers: tuple[Comparison, ...]
    device: str
    seed: int | None  # of random inputs
    inputs: str  # what both networks saw
    versions: Mapping[str, str]
    evidence_kind: str = "original"  # or "fingerprint", "published"; "weights" where quantised
    origin: str = ""  # of the evidence: where it is from, and of when
    notes: tuple[str, ...] = ()  # what one should know of this verdict
    # How far our images are from the publisher's own, a figure apart: the inputs above are random.
    preprocessing: PreprocessingDifference | None = None
    samples: tuple[Sample, ...] = ()  # values of the outputs, one by one
    spreads: tuple[Spread, ...] = ()  # of their errors
    gradients: tuple[Gradient, ...] = ()  # of each parameter, and of images, where it was asked
    # Of the published weights.
    source: str | None = None
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)  # file -> of its bytes
    license: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)  # the machine, besides versions
    repeat: Mapping[str, str] = field(default_factory=dict)  # "Python", "shell" -> how to run it
    date: str = ""  # when it ran, and for how long: not in JSON, so that equal runs are equal
    seconds: float | None = None

    @property
    def passed(self) -> bool:
        same = all(c.passed for c in (*self.outputs, *self.layers))
        return bool(self.outputs) and same and all(g.passed for g in self.gradients)

    @property
    def max_abs(self) -> float:
        """The largest difference between our outputs and PyTorch's, in the same precision."""
        return max((c.max_abs for c in self.outputs), default=np.nan)

    @property
    def mean_abs(self) -> float:
        return sum(c.mean_abs for c in self.outputs) / len(self.outputs) if self.outputs else np.nan

    @property
    def max_rel(self) -> float:
        """The same, relative to the largest value of the output."""
        return max((c.max_rel for c in self.outputs), default=np.nan)

    @property
    def tolerance(self) -> float:
        return self.outputs[0].tolerance if self.outputs else np.nan

    @property
    def precision(self) -> str:
        return self.outputs[0].precision if self.outputs else "float32"

    @property
    def is_printed(self) -> bool:
        """Whether ours were compared with figures that somebody printed, rounded."""
        return any(c.printed for c in self.outputs)

    @property
    def first_divergence(self) -> str | None:
        """The first layer, in the order of execution, that is not the same; None if all are."""
        return next((c.name for c in (*self.layers, *self.outputs) if not c.passed), None)

    @property
    def reason(self) -> str:
        """The verdict in one line."""
        if self.passed:
            return f"the same network: max |difference| {self.max_abs:.1e}"
        if not self.outputs:
            return "nothing was compared"
        worst = next((c for c in (*self.layers, *self.outputs) if not c.passed), None)
        if worst is None:
            return f"the same outputs, but not the same gradients: {self._of_gradients()}"
        if worst.note:
            return f"first divergence at {worst.name}: {worst.note}"
        if self.is_printed:
            return (
                f"first divergence at {worst.name}: max |difference| {worst.max_abs:.1e} from what "
                f"was printed, of {worst.scale:.1e}; {worst.bound:.1e} is allowed"
            )
        return (
            f"first divergence at {worst.name}: max |difference| {worst.max_abs:.1e} of "
            f"{worst.scale:.1e}; against float64 {worst.error:.1e}, PyTorch {worst.torch_error:.1e}"
        )

    def _of_gradients(self) -> str:
        count, differ = len(self.gradients), [g for g in self.gradients if not g.passed]
        figures = ("double_rel", "max_rel", "raw_rel", "torch_rel")
        in_double, single, raw, torch = (largest(self.gradients, name) for name in figures)
        said = (
            f"{f'{len(differ)} of {count} differ' if differ else count}, wrong by "
            f"{in_double.double_rel:.1e} of the largest value at most in float64 "
            f"({in_double.name}), by {single.max_rel:.1e} in float32 ({single.name})"
        )
        if raw.raw_rel <= GRADIENT_TOLERANCE:
            return f"{said}, PyTorch's in float32 by {torch.torch_rel:.1e}"
        return (
            f"{said}; where a rounding takes float32 across a kink, of relu say, it jumps by "
            f"{raw.raw_rel:.1e}, and PyTorch's by {torch.torch_rel:.1e}"
        )

    @property
    def rule(self) -> str:
        """What is allowed."""
        if self.is_printed:
            return "allowed is half of the last digit that was printed, and what float32 costs"
        return (
            f"tolerance {self.tolerance:.0e} of the largest value and {FACTOR:.0f} times PyTorch's "
            "own rounding error"
        )

    @property
    def worst(self) -> tuple[Comparison, ...]:
        """The layers and outputs that come nearest to their bounds, or are beyond, worst first."""
        return tuple(sorted((*self.layers, *self.outputs), key=lambda c: (c.passed, -c.strain)))

    def summary(self) -> dict[str, Any]:
        """The verdict and its figures, without the layers."""
        return {
            "name": self.name,
            "passed": self.passed,
            "max_abs": self.max_abs,
            "mean_abs": self.mean_abs,
            "max_rel": self.max_rel,
            "tolerance": self.tolerance,
            "first_divergence": self.first_divergence,
            "evidence": self.evidence,
            "evidence_kind": self.evidence_kind,
            "origin": self.origin,
            "notes": list(self.notes),
            "device": self.device,
            "seed": self.seed,
            "inputs": self.inputs,
            "versions": dict(self.versions),
            "preprocessing": self.preprocessing and asdict(self.preprocessing),
            "source": self.source,
            "revision": self.revision,
            "sha256_of_source": dict(self.sha256),
            "license": self.license,
            "environment": dict(self.environment),
            "repeat": dict(self.repeat),
        }

    def to_json(self) -> str:
        """Everything, as JSON."""
        rows = {
            kind: [{**asdict(c), "max_rel": c.max_rel, "passed": c.passed} for c in found]
            for kind, found in (("outputs", self.outputs), ("layers", self.layers))
        }
        closer = {
            kind: [asdict(x) for x in found]
            for kind, found in (("samples", self.samples), ("spreads", self.spreads))
        }
        gradients = {"gradients": [as_row(g) for g in self.gradients]} if self.gradients else {}
        return json.dumps(
            plain({**self.summary(), **rows, **closer, **gradients}), indent=2, allow_nan=False
        )

    def to_html(self) -> str:
        """Everything, as one self-contained page."""
        from mlx_zoo.verify.page import page

        return page(self)

    def __str__(self) -> str:
        return as_text(self, width=100)

    def __rich__(self):
        from rich.console import Group
        from rich.markup import escape

        seed = "" if self.seed is None else f", seed {self.seed}"
        verdict = "[bold green]passed[/]" if self.passed else "[bold red]FAILED[/]"
        lines = [f"{verdict}: {escape(self.reason)}"]
        if self.outputs:
            lines.append(escape(f"{self.rule}; {self.inputs}{seed}; on the {self.device}"))
        if self.gradients:
            lines.append(escape(f"gradients: {self._of_gradients()}"))
        if self.preprocessing:
            lines.append(escape(f"preprocessing: {self.preprocessing}"))
        if self.origin:
            lines.append(escape(f"evidence: {self.origin}"))
        lines += [escape(f"note: {note}") for note in self.notes]
        return Group(*self._figures(), *lines)

    def _figures(self) -> list[Any]:
        """The table of what was compared."""
        from rich.markup import escape
        from rich.table import Table

        shown = self._shown()
        title = escape(f"{self.name} against {self.evidence}")
        table = Table(title=title, title_justify="left")
        what = "layer, in the order of execution" if self.layers else "output"
        theirs = "half a digit" if self.is_printed else "error, torch"
        table.add_column(what, overflow="fold")
        for column in ("max |diff|", "relative", "error, ours", theirs, ""):
            table.add_column(column, justify="right")
        for c in (*shown, *self.outputs):
            figures = [f"{x:.1e}" for x in (c.max_abs, c.max_rel, c.error, c.torch_error)]
            table.add_row(escape(c.name), *figures, "" if c.passed else "[bold red]differs")
        lines: list[Any] = [table]
        if rest := [c for c in self.layers if c not in shown]:
            differ = sum(not c.passed for c in rest)
            differing = f"{differ} differ and " if differ else ""
            lines.append(
                f"{len(self.layers)} layers in all; of those not shown {differing}"
                f"{len(rest) - differ} passed: --html and --json have them"
            )
        return lines

    def _shown(self) -> list[Comparison]:
        """The layers worth a line: all of a few; else the worst, and the first that differ."""
        if len(self.layers) <= SHORT:
            return list(self.layers)
        differ = [c for c in self.layers if not c.passed][:NUM_WORST]
        worst = sorted(self.layers, key=lambda c: c.strain, reverse=True)[:NUM_WORST]
        return [c for c in self.layers if c in differ or c in worst]


def as_row(gradient: Gradient) -> dict[str, Any]:
    """A gradient's figures, for JSON."""
    judged = ("double_rel", "max_rel", "raw_rel", "torch_rel", "passed")
    return {**asdict(gradient), **{name: getattr(gradient, name) for name in judged}}


def plain(value: Any, odd: Callable[[float], Any] = lambda x: None) -> Any:
    """`value` with `odd` of NaN and infinity, which JSON does not have: null, as a rule."""
    if isinstance(value, dict):
        return {name: plain(x, odd) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x, odd) for x in value]
    return odd(value) if isinstance(value, float) and not np.isfinite(value) else value


def as_text(report: Any, width: int) -> str:
    """What rich makes of a report, in characters alone."""
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    Console(file=file, width=width).print(report)
    return file.getvalue().rstrip()
