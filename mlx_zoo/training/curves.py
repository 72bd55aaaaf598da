"""A run as SVG: the losses, the metric that is watched, and the learning rate, over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_zoo.verify.markup import Html, tag

WIDTH, LEFT, RIGHT, TOP, GAP = 720, 70, 20, 30, 44  # pixels; above a field, and below it
HEIGHT, LOW = 200, 70  # of a field, and of the learning rate's
POINTS = 400  # of a line: of more, neighbours become their mean
TICKS = 4  # about as many lines across a field
METRICS = ("accuracy", "perplexity", "f1")  # which is drawn where none is named: the first known
STYLE = """
svg{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#57606a;--grid:#d8dee4;
--train:#0868b8;--val:#a34f00}
@media(prefers-color-scheme:dark){svg{--ground:#0d1117;--ink:#e6edf3;--soft:#9198a1;--grid:#30363d;
--train:#6cb6ff;--val:#f0a35e}}
text{font:12px system-ui,sans-serif;fill:var(--ink)}.soft{fill:var(--soft)}
.ground{fill:var(--ground)}.grid{stroke:var(--grid)}path{fill:none;stroke-width:2}
path.train{stroke:var(--train)}path.val{stroke:var(--val)}
circle.val{fill:var(--val)}circle.train{fill:var(--train)}text.train{fill:var(--train)}text.val{fill:var(--val)}
"""

Points = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Field:
    """One chart: its title, its lines by class ("train" or "val"), and how high it is."""

    title: str
    lines: Mapping[str, Points]
    height: int = HEIGHT


def curves_svg(history: Sequence[Mapping[str, Any]], monitor: str | None = None) -> str:
    """The file's text. It follows the reader's light or dark scheme, and holds no script.

    Args:
        history: rows with "step", and whichever of "loss", "learning_rate", "val_loss",
            "val_accuracy", ... was measured there.
        monitor: the metric that is drawn; None for the task's first.
    """
    if monitor is None:
        known = (name for name in METRICS if any(f"val_{name}" in row for row in history))
        monitor = next(known, None)
    fields = [
        Field("loss", {"train": points(history, "loss"), "val": points(history, "val_loss")}),
        Field("learning rate", {"train": points(history, "learning_rate")}, LOW),
    ]
    if monitor not in (None, "loss"):
        fields.insert(1, Field(str(monitor), {"val": points(history, f"val_{monitor}")}))
    fields = [field for field in fields if any(field.lines.values())]
    steps = [x for field in fields for line in field.lines.values() for x, _ in line]
    ends = (min(steps, default=0), max(steps, default=1))
    parts: list[Html] = []
    y = 0.0
    for field in fields:
        parts += _field(field, y, ends)
        y += TOP + field.height + GAP
    y = max(y, 1)
    ground = tag("rect", class_="ground", width=WIDTH, height=f"{y:.0f}")
    size = {"width": WIDTH, "height": f"{y:.0f}", "viewBox": f"0 0 {WIDTH} {y:.0f}"}
    said = f"Over the steps: {', '.join(field.title for field in fields) or 'nothing'}"
    space = "http://www.w3.org/2000/svg"
    style = tag("style", Html(STYLE))
    return (
        f"{tag('svg', style, ground, *parts, xmlns=space, role='img', aria_label=said, **size)}\n"
    )


def write_curves(
    history: Sequence[Mapping[str, Any]], path: Path, monitor: str | None = None
) -> None:
    """The same into a file."""
    path.write_text(curves_svg(history, monitor), encoding="utf-8")


def points(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Where a value was measured, at most POINTS of them; what is not finite is left out."""
    found = [
        (float(row["step"]), float(row[name]))
        for row in history
        if row.get(name) is not None and math.isfinite(row[name])
    ]
    size = -(-len(found) // POINTS) or 1
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Round values from at most `low` to at least `high`: steps of 1, 2 or 5 by a power of ten."""
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    step = next(k * power for k in (1, 2, 5, 10) if k * power * TICKS >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _field(field: Field, y: float, ends: tuple[float, float]) -> list[Html]:
    values = [v for line in field.lines.values() for _, v in line]
    marks = ticks(min(values), max(values))
    top, bottom = y + TOP, y + TOP + field.height
    wide = max(ends[1] - ends[0], 1)

    def place(x: float, v: float) -> tuple[float, float]:
        across = (x - ends[0]) / wide
        up = (v - marks[0]) / (marks[-1] - marks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), bottom - up * (bottom - top)

    parts = [tag("text", field.title, x=LEFT, y=f"{y + 20:.0f}")]
    names = {"train": "training", "val": "validation"}
    shown = [kind for kind, line in field.lines.items() if line and len(field.lines) > 1]
    for i, kind in enumerate(reversed(shown)):
        at = {"x": WIDTH - RIGHT - 80 * i, "y": f"{y + 20:.0f}"}
        parts.append(tag("text", names[kind], class_=kind, text_anchor="end", **at))
    for mark in marks:
        _, at_y = place(ends[0], mark)
        line = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": f"{at_y:.1f}", "y2": f"{at_y:.1f}"}
        label = {"x": LEFT - 8, "y": f"{at_y + 4:.1f}", "text_anchor": "end"}
        parts += [
            tag("line", class_="grid", **line),
            tag("text", f"{mark:.4g}" if mark else "0", class_="soft", **label),
        ]
    for step in [x for x in ticks(*ends) if ends[0] <= x <= ends[1]]:
        at_x, _ = place(step, marks[0])
        label = {"x": f"{at_x:.1f}", "y": f"{bottom + 18:.1f}", "text_anchor": "middle"}
        parts.append(tag("text", f"{step:g}", class_="soft", **label))
    for kind, drawn in field.lines.items():
        placed = [place(*point) for point in drawn]
        if len(placed) > 1:
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in placed)
            parts.append(tag("path", class_=kind, d=f"M{path}"))
        if kind == "val" or len(placed) == 1:
            parts += [
                tag("circle", class_=kind, cx=f"{px:.1f}", cy=f"{py:.1f}", r=3.5)
                for px, py in placed
            ]
    return parts
