"""The result of a verification, and how its figures are judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# How far ours and PyTorch's may be apart, as a part of the largest value.
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
# Errors below this part of the largest value are chance: eight roundings in float32, else one.
CHANCE = {"float32": 8 * 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FACTOR = 4.0  # how many times PyTorch's own rounding error ours may be, both against float64


@dataclass(frozen=True)
class Comparison:
    """One layer's (or output's) values, ours and PyTorch's, on the same input."""

    name: str
    max_abs: float  # ours against PyTorch, in the same precision
    mean_abs: float
    scale: float  # the largest magnitude, in float64
    error: float  # ours against PyTorch in float64
    torch_error: float  # PyTorch in our precision against itself in float64
    precision: str = "float32"

    @property
    def tolerance(self) -> float:
        """Of `max_rel`."""
        return TOLERANCES[self.precision]

    @property
    def max_rel(self) -> float:
        """`max_abs` relative to the largest value of the layer."""
        return self.max_abs / self.scale if self.scale else self.max_abs

    @property
    def passed(self) -> bool:
        """Equal as far as the precision allows.

        The error against float64 is a small multiple of what rounding costs PyTorch itself; and
        where that cost is small, the two also agree to the tolerance. In half precision, whose
        tolerance is wide, either is enough.
        """
        if not np.isfinite([self.max_abs, self.error]).all():
            return False
        allowed = self.tolerance * self.scale
        accurate = self.error <= FACTOR * max(self.torch_error, CHANCE[self.precision] * self.scale)
        if self.precision != "float32":
            return accurate or self.max_abs <= allowed
        return accurate and (self.max_abs <= allowed or self.torch_error > allowed)


def judge(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    double: np.ndarray,
    precision: str = "float32",
) -> Comparison:
    """Compare arrays of one shape: ours, PyTorch's in the same precision and in float64."""
    if not ours.shape == theirs.shape == double.shape:
        return Comparison(name, np.inf, np.inf, 1.0, np.inf, 0.0, precision)
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
    # How far our images are from the publisher's own, a figure apart: the inputs above are random.
    preprocessing: PreprocessingDifference | None = None

    @property
    def passed(self) -> bool:
        return bool(self.outputs) and all(c.passed for c in (*self.outputs, *self.layers))

    @property
    def max_abs(self) -> float:
        """The largest difference between our outputs and PyTorch's, in the same precision."""
        return max(c.max_abs for c in self.outputs)

    @property
    def mean_abs(self) -> float:
        return sum(c.mean_abs for c in self.outputs) / len(self.outputs)

    @property
    def max_rel(self) -> float:
        """The same, relative to the largest value of the output."""
        return max(c.max_rel for c in self.outputs)

    @property
    def tolerance(self) -> float:
        return self.outputs[0].tolerance

    @property
    def first_divergence(self) -> str | None:
        """The first layer, in the order of execution, that is not the same; None if all are."""
        return next((c.name for c in (*self.layers, *self.outputs) if not c.passed), None)

    @property
    def reason(self) -> str:
        """The verdict in one line."""
        if self.passed:
            return f"the same network: max |difference| {self.max_abs:.1e}"
        worst = next(c for c in (*self.layers, *self.outputs) if not c.passed)
        return (
            f"first divergence at {worst.name}: max |difference| {worst.max_abs:.1e} of "
            f"{worst.scale:.1e}; against float64 {worst.error:.1e}, PyTorch {worst.torch_error:.1e}"
        )

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
            "device": self.device,
            "seed": self.seed,
            "inputs": self.inputs,
            "versions": dict(self.versions),
            "preprocessing": self.preprocessing and asdict(self.preprocessing),
        }

    def to_json(self) -> str:
        """Everything, as JSON."""
        rows = {
            kind: [{**asdict(c), "max_rel": c.max_rel, "passed": c.passed} for c in found]
            for kind, found in (("outputs", self.outputs), ("layers", self.layers))
        }
        return json.dumps(_plain({**self.summary(), **rows}), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """The table as a self-contained page."""
        console = _console(record=True)
        console.print(self)
        return console.export_html(inline_styles=True)

    def __str__(self) -> str:
        console = _console()
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"{self.name} against {self.evidence}", title_justify="left")
        table.add_column("layer, in the order of execution", overflow="fold")
        for column in ("max |diff|", "relative", "error, ours", "error, torch", ""):
            table.add_column(column, justify="right")
        for c in (*self.layers, *self.outputs):
            figures = [f"{x:.1e}" for x in (c.max_abs, c.max_rel, c.error, c.torch_error)]
            table.add_row(c.name, *figures, "" if c.passed else "[bold red]differs")
        seed = "" if self.seed is None else f", seed {self.seed}"
        verdict = "[bold green]passed[/]" if self.passed else "[bold red]FAILED[/]"
        return Group(
            table,
            f"{verdict}: {self.reason}",
            f"tolerance {self.tolerance:.0e} of the largest value and {FACTOR:.0f} times PyTorch's "
            f"own rounding error; {self.inputs}{seed}; on the {self.device}",
            *([f"preprocessing: {self.preprocessing}"] if self.preprocessing else []),
        )


def _plain(value: Any) -> Any:
    """`value` without NaN and infinity, which JSON does not have: they become null."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _console(record: bool = False):
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), width=100, record=record)
