"""A benchmark as SVG: bars for each case, or, of a sweep, lines of time and of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mlx_zoo.benchmark.result import Result, Row, milliseconds
from mlx_zoo.verify.markup import Html, tag

WIDTH, LEFT, RIGHT = 860, 190, 150  # pixels: of the whole, before the field, after it
BAR, GAP, TOP = 18, 6, 34  # of a bar, between cases, above the first
HEIGHT = 260  # of a field with lines
MANY = 3  # cases above which a sweep is drawn as lines
COLOURS = ("#0868b8", "#56a3e8", "#a34f00", "#e08a2c", "#7a5c00", "#14703b")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1b1f24}.soft{fill:#57606a}.title{font-weight:600}"
)


def plot(result: Result) -> str:
    """The file's text. Drawn are the cases that were measured."""
    rows = [row for row in result.rows if row.timing]
    names = list(dict.fromkeys(row.contestant for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    parts: list[Html] = []
    y = float(TOP)

    def mib(row: Row) -> float | None:
        peak = result.peak(row)
        return peak and peak / (1 << 20)

    groups = list(dict.fromkeys((r.case.phase, r.case.dtype) for r in rows))
    for phase, dtype in groups:
        own = [r for r in rows if (r.case.phase, r.case.dtype) == (phase, dtype)]
        cases = {r.case for r in own}
        axis = "batch" if len({c.batch for c in cases}) > 1 else "length"
        if len(cases) > MANY and len({c.batch for c in cases} if axis == "batch" else cases) > MANY:
            for what, value in (("time of a run, ms", _ms), ("peak memory, MiB", mib)):
                parts += _lines(own, colours, axis, f"{phase}, {dtype}: {what}", value, y)
                y += HEIGHT + 64
        else:
            for case in dict.fromkeys(r.case for r in own):
                shown = [r for r in own if r.case == case]
                parts += _bars(shown, colours, f"{case}: time of a run, ms", y)
                y += TOP + len(shown) * (BAR + GAP) + GAP
    head = tag("text", f"{result.name} on the {result.device}", x=10, y=20, class_="title")
    body = (tag("style", Html(STYLE)), _ground(y), head, *parts)
    said = f"{result.name} on the {result.device}: " + ", ".join(names)
    size = {"width": WIDTH, "height": f"{y:.0f}", "viewBox": f"0 0 {WIDTH} {y:.0f}"}
    svg = tag("svg", *body, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=said, **size)
    return f"{svg}\n"


def _ground(height: float) -> Html:
    return tag("rect", width=WIDTH, height=f"{height:.0f}", fill="#ffffff")


def _ms(row: Row) -> float | None:
    return 1e3 * row.timing.median if row.timing else None


def _bars(rows: Sequence[Row], colours: dict[str, str], title: str, y: float) -> list[Html]:
    """A bar each, its median, and a line from the quickest run to the 95th percentile."""
    timings = [row.timing for row in rows if row.timing]
    # A long tail may leave the field: the bars are what is compared.
    most = min(max(t.percentile(95) for t in timings), 2 * max(t.median for t in timings))
    scale = (WIDTH - LEFT - RIGHT) / most
    parts = [tag("text", title, x=10, y=f"{y + 18:.0f}", class_="soft")]
    for i, row in enumerate(rows):
        assert row.timing is not None
        t, top = row.timing, y + TOP + i * (BAR + GAP) - 6
        at = {"y": f"{top:.1f}", "height": BAR}
        low, high = (LEFT + scale * min(x, most) for x in (min(t.seconds), t.percentile(95)))
        middle, right = f"{top + BAR / 2:.1f}", f"{high + 8:.1f}"
        spread = {"x1": f"{low:.1f}", "x2": f"{high:.1f}", "y1": middle, "y2": middle}
        parts += [
            tag("text", row.contestant, x=LEFT - 8, y=f"{top + 13:.1f}", text_anchor="end"),
            tag(
                "rect", x=LEFT, width=f"{scale * t.median:.1f}", fill=colours[row.contestant], **at
            ),
            tag("line", stroke="#1b1f24", stroke_width=1.5, **spread),
            tag("text", milliseconds(t.median), x=right, y=f"{top + 13:.1f}"),
        ]
    return parts


def _lines(
    rows: Sequence[Row],
    colours: dict[str, str],
    axis: str,
    title: str,
    value: Callable[[Row], float | None],
    y: float,
) -> list[Html]:
    """A line for each contestant, both scales logarithmic."""
    points = [
        (row.contestant, row.case.batch if axis == "batch" else row.case.shape[1], found)
        for row in rows
        if (found := value(row))
    ]
    parts = [tag("text", f"{title}, by {axis}", x=10, y=f"{y + 18:.0f}", class_="soft")]
    if not points:
        return parts
    xs = sorted({x for _, x, _ in points})
    low = math.floor(math.log2(min(v for *_, v in points)))
    high = max(math.ceil(math.log2(max(v for *_, v in points))), low + 1)
    bottom = y + TOP + HEIGHT

    def place(x: float, v: float) -> tuple[float, float]:
        across = (math.log2(x) - math.log2(xs[0])) / max(math.log2(xs[-1] / xs[0]), 1)
        up = (math.log2(v) - low) / (high - low)
        return 70 + across * (WIDTH - 70 - RIGHT), bottom - up * HEIGHT

    for power in range(low, high + 1, 1 + (high - low) // 8):
        _, at = place(xs[0], 2.0**power)
        line = {"x1": 70, "x2": WIDTH - RIGHT, "y1": f"{at:.1f}", "y2": f"{at:.1f}"}
        parts += [
            tag("line", stroke="#d0d7de", **line),
            tag("text", f"{2.0**power:g}", x=62, y=f"{at + 4:.1f}", text_anchor="end"),
        ]
    for x in xs:
        at, _ = place(x, 2.0**low)
        parts.append(
            tag("text", str(x), x=f"{at:.1f}", y=f"{bottom + 18:.1f}", text_anchor="middle")
        )
    ends: list[float] = []
    for name in dict.fromkeys(n for n, *_ in points):
        own = [place(x, v) for n, x, v in points if n == name]
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in own)
        px, py = own[-1]
        while any(abs(py - other) < 13 for other in ends):  # names do not lie on each other
            py += 13
        ends.append(py)
        parts += [
            tag("path", d=f"M{path}", fill="none", stroke=colours[name], stroke_width=2),
            *(tag("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=3, fill=colours[name]) for a, b in own),
            tag("text", name, x=f"{px + 8:.1f}", y=f"{py + 4:.1f}", fill=colours[name]),
        ]
    return parts
