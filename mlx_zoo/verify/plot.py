"""The plots of a report's page, as SVG: the error of every layer, and how errors are distributed.

Across, places are in percent, so that a plot is as wide as its page and its text keeps its size;
down, they are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mlx_zoo.verify.markup import Html, tag
from mlx_zoo.verify.report import Comparison, Spread

HEIGHT, MARGIN, STRIP = 320, 10, 28  # of the field, inside of it, and of a strip beside the scale
LABELS = 26  # below the field
LOWEST, HIGHEST = -12, 6  # decades that a scale may show; what is beyond goes into a strip
# How wide a plot of so many rows is at least, by its class in the page's style; in pixels.
DEPTHS = ((160, "shallow", 300), (360, "deep", 720), (math.inf, "deepest", 940))
MANY = 80  # rows, above which marks are smaller
WIDE, LETTER, GAP = 900, 7, 6  # pixels: a plot on a screen, a letter, between names
BARS = 56  # height of the largest bar, each way

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(x: float) -> str:
    """A number as the page writes it."""
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    return f"{x:.1e}" if x else "0"


@dataclass(frozen=True)
class Scale:
    """Down a field: powers of ten from 10**low to 10**high, and a strip for what has no logarithm.

    Zeros, and what is below LOWEST, lie in a strip at the bottom; what is not finite, or above
    HIGHEST, in one at the top.
    """

    low: int
    high: int
    above: bool  # whether there are such
    below: bool

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        values = list(values)
        decades = [math.log10(x) for x in values if 10.0**LOWEST <= x <= 10.0**HIGHEST]
        low = math.floor(min(decades, default=-8))
        high = max(math.ceil(max(decades, default=-4)), low + 1)
        above = any(not x <= 10.0**HIGHEST for x in values)  # NaN as well
        return cls(low, high, above, any(x < 10.0**LOWEST for x in values))

    @property
    def top(self) -> float:
        """The place of 10**high."""
        return MARGIN + STRIP * self.above

    @property
    def bottom(self) -> float:
        """The place of 10**low."""
        return HEIGHT - MARGIN - STRIP * self.below

    def y(self, value: float) -> float:
        if not value <= 10.0**HIGHEST:
            return STRIP / 2
        if value < 10.0**LOWEST:
            return HEIGHT - STRIP / 2
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.bottom + part * (self.top - self.bottom)

    def has(self, value: float) -> bool:
        """Whether a value is on the scale itself."""
        return 10.0**LOWEST <= value <= 10.0**HIGHEST

    @property
    def ticks(self) -> range:
        """Decades that get a line and a label: about ten at most."""
        return range(self.low, self.high + 1, 1 + (self.high - self.low) // 11)


# The error of every layer -----------------------------------------------------------------------


def errors_by_layer(rows: Sequence[Comparison], num_layers: int, label: str) -> Html:
    """The layers and, after the first `num_layers`, the outputs, from left to right.

    Errors are against float64, relative to the layer's largest value.
    """
    scale = Scale.of(x for c in rows for x in map(c.relative, (c.error, c.torch_error, c.bound)))
    count = len(rows)
    field = tag(
        "svg",
        _shapes(3 if count > MANY else 4),
        *_groups(rows, num_layers),
        *_grid(scale),
        _allowed(rows, scale),
        *(_line(rows, scale, which) for which in ("torch", "ours")),
        *(_layer(c, i, count, scale) for i, c in enumerate(rows)),
        class_="field",
        width="100%",
        height=HEIGHT + LABELS,
        role="img",
        aria_label=label,
    )
    depth, _ = _depth(count)
    scroll = {"class_": "scroll", "tabindex": 0, "role": "region", "aria_label": "Error by layer"}
    inner = tag("div", tag("div", field, class_=depth), **scroll)
    return tag("div", _axis(scale), inner, class_="plot")


def _depth(count: int) -> tuple[str, int]:
    """The class of a plot of so many rows, and how wide it is at least."""
    return next((name, width) for most, name, width in DEPTHS if count <= most)


def _shapes(r: int) -> Html:
    """The marks that are no circle, about (0, 0)."""
    return tag(
        "defs",
        tag("path", id="diamond", d=f"M-{r} 0 0-{r} {r} 0 0 {r}z"),
        tag("path", id="cross", d="M-6-6 6 6M-6 6 6-6"),
    )


def _layer(c: Comparison, i: int, count: int, scale: Scale) -> Html:
    """A layer's two marks, in a column that tells its name and figures to who points at it."""
    x = f"{100 * (i + 0.5) / count:.2f}%"
    y, their_y = (f"{scale.y(c.relative(error)):.1f}" for error in (c.error, c.torch_error))
    column = {"x": f"{100 * i / count:.2f}%", "width": f"{100 / count:.2f}%", "height": HEIGHT}
    return tag(
        "g",
        tag("title", _told(c)),
        tag("rect", **column),
        tag("circle", cx=x, cy=y, r=2.5 if count > MANY else 3.5),
        tag("use", href="#diamond", x=x, y=their_y),
        None if c.passed else tag("use", href="#cross", x=x, y=y),
        class_="layer" if c.passed else "layer differs",
    )


def _told(c: Comparison) -> str:
    """A layer in a line."""
    if c.note:
        return f"{c.name}: {c.note}"
    error, torch_error, bound = map(c.relative, (c.error, c.torch_error, c.bound))
    verdict = "" if c.passed else ", differs"
    return (
        f"{c.name}: error {figure(error)}, PyTorch {figure(torch_error)}, "
        f"allowed {figure(bound)}{verdict}"
    )


def _axis(scale: Scale) -> Html:
    """The labels of the scale, which stay where they are while the field is moved under a thumb."""
    labels = [(scale.y(10.0**k), f"10{str(k).translate(SUPERSCRIPTS)}") for k in scale.ticks]
    labels += [(scale.y(math.inf), "∞, NaN")] * scale.above
    labels += [(scale.y(0.0), "exact")] * scale.below
    texts = (tag("text", text, x=52, y=f"{y + 4:.1f}", text_anchor="end") for y, text in labels)
    return tag("svg", *texts, class_="axis", width=58, height=HEIGHT + LABELS, aria_hidden="true")


def _grid(scale: Scale) -> Iterator[Html]:
    lines = [("grid", scale.y(10.0**decade)) for decade in scale.ticks]
    lines += [("edge", scale.top)] * scale.above + [("edge", scale.bottom)] * scale.below
    for kind, y in lines:
        yield tag("line", class_=kind, x1="0", x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}")


def _stretched(*paths: Html) -> Html:
    """Paths have no percent: 1000 units are the whole width."""
    box = f"0 0 1000 {HEIGHT}"
    return tag("svg", *paths, viewBox=box, preserveAspectRatio="none", width="100%", height=HEIGHT)


def _allowed(rows: Sequence[Comparison], scale: Scale) -> Html:
    """All that the judge allows: up to a layer's bound, from edge to edge of its column."""
    steps = "".join(
        f"V{scale.y(c.relative(c.bound)):.1f}H{1000 * (i + 1) / len(rows):.1f}"
        for i, c in enumerate(rows)
    )
    return _stretched(
        tag("path", class_="allowed", d=f"M0 {HEIGHT}{steps}V{HEIGHT}z"),
        tag("path", class_="bound", d=f"M0 {scale.y(rows[0].relative(rows[0].bound)):.1f}{steps}"),
    )


def _line(rows: Sequence[Comparison], scale: Scale, which: str) -> Html:
    """Through the marks of "ours" or of "torch"; broken where one is not on the scale."""
    steps, pen = [], "M"
    for i, c in enumerate(rows):
        value = c.relative(c.error if which == "ours" else c.torch_error)
        if scale.has(value):
            steps.append(f"{pen}{1000 * (i + 0.5) / len(rows):.1f} {scale.y(value):.1f}")
        pen = "L" if scale.has(value) else "M"
    return _stretched(tag("path", class_=f"line {which}", d="".join(steps)))


def _groups(rows: Sequence[Comparison], num_layers: int) -> Iterator[Html]:
    """Bands of light and shade for the parts of the network, with their names where they fit."""
    count = len(rows)
    _, narrow = _depth(count)
    start = 0
    ends: dict[int, float] = {
        WIDE: -GAP,
        narrow: -GAP,
    }  # of the last name, in pixels of such a plot
    for shade, (name, size) in enumerate(_parts([c.name for c in rows[:num_layers]], count)):
        x, share = 100 * start / count, size / count
        if shade % 2:
            yield tag(
                "rect", class_="part", x=f"{x:.2f}%", width=f"{100 * share:.2f}%", height=HEIGHT
            )
        text = name if len(name) * LETTER < share * WIDE else name.rpartition(".")[2]
        half, middle = len(text) * LETTER / 2, x / 100 + share / 2
        fits = [width for width in ends if middle * width - half >= ends[width] + GAP]
        if WIDE in fits:
            ends |= {width: middle * width + half for width in fits}
            yield tag(
                "text",
                text,
                class_=None if narrow in fits else "roomy",  # not on a phone
                x=f"{100 * middle:.2f}%",
                y=HEIGHT + 17,
                text_anchor="middle",
            )
        start += size


def _parts(names: Sequence[str], count: int) -> list[tuple[str, int]]:
    """(part of the network, how many rows): "layer1", or "blocks.3" where blocks are most of it."""
    first = [name.partition(".")[0] for name in names]
    most = {part for part in first if first.count(part) > len(first) / 2}
    parts: list[tuple[str, int]] = []
    for name, part in zip(names, first, strict=True):
        if part in most:
            part = ".".join(name.split(".")[:2])
        if parts and parts[-1][0] == part:
            parts[-1] = (part, parts[-1][1] + 1)
        else:
            parts.append((part, 1))
    return parts + ([("output", count - len(names))] if count > len(names) else [])


# How errors are distributed ---------------------------------------------------------------------


def distribution(spread: Spread, ours: str, theirs: str | None) -> Html:
    """Two histograms, ours upward and PyTorch's downward, of errors from -reach to reach."""
    largest = max(*spread.ours, *(spread.torch if theirs else ()), 1)
    count, middle = len(spread.ours), BARS + 4
    bars = []
    for i, (up, down) in enumerate(zip(spread.ours, spread.torch, strict=True)):
        place = {"x": f"{100 * i / count:.2f}%", "width": f"{84 / count:.2f}%"}
        if up:
            height = max(BARS * up / largest, 1)  # one value among millions is seen, too
            bars.append(
                tag(
                    "rect",
                    class_="ours",
                    **place,
                    y=f"{middle - height:.1f}",
                    height=f"{height:.1f}",
                )
            )
        if down and theirs:
            bars.append(
                tag(
                    "rect",
                    class_="torch",
                    **place,
                    y=middle,
                    height=f"{max(BARS * down / largest, 1):.1f}",
                )
            )
    end = 2 * middle if theirs else middle + 2
    ends = ((0, "start", -spread.reach), (50, "middle", 0.0), (100, "end", spread.reach))
    said = f"Errors of {spread.output}, from {-spread.reach:.1e} to {spread.reach:.1e}, "
    said += f"{ours} upward" + (f", {theirs} downward" if theirs else "")
    return tag(
        "svg",
        *bars,
        tag("line", class_="edge", x1="0", x2="100%", y1=middle, y2=middle),
        *(
            tag(
                "text",
                figure(x) if x >= 0 else f"−{figure(-x)}",
                x=f"{at}%",
                y=end + 14,
                text_anchor=anchor,
            )
            for at, anchor, x in ends
        ),
        class_="distribution",
        width="100%",
        height=end + 20,
        role="img",
        aria_label=said,
    )
