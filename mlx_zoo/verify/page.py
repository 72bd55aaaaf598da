"""A report as one page that stands alone: nothing is fetched, nothing runs.

For a person who doubts the network: the verdict first, then what was compared with what, then all
the figures, so that each can be looked at and repeated.
"""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mlx_zoo.verify.markup import Html, tag
from mlx_zoo.verify.plot import distribution, errors_by_layer, figure
from mlx_zoo.verify.quantized import QuantizedReport
from mlx_zoo.verify.report import (
    CHANCE,
    FACTOR,
    GRADIENT_TOLERANCE,
    NUM_WORST,
    PROOF_TOLERANCE,
    Comparison,
    Report,
    Sample,
    Spread,
)

STYLE = Path(__file__).with_name("page.css")
AROUND = 3  # layers shown before the first that differs, and after it

Column = tuple[str, str, Callable[[Comparison], str]]  # its name, what it says, its figures


def _ratio(x: float) -> str:
    if x >= 1e6:
        return figure(x)
    return f"{x:.2f} ×" if x < 10 else f"{x:,.0f} ×"


ERROR: Column = (
    "error, ours",
    "the largest, against float64, as a part of the largest value",
    lambda c: figure(c.relative(c.error)),
)
STRAIN: Column = (
    "of the bound",
    "how much of what is allowed our error uses",
    lambda c: f"{100 * c.strain:,.0f} %" if c.strain < 100 else "far beyond",
)
SCALE: Column = ("largest value", "of the layer, in float64", lambda c: figure(c.scale))
COLUMNS: tuple[Column, ...] = (
    ERROR,
    (
        "error, PyTorch",
        "PyTorch's own, in the same precision",
        lambda c: figure(c.relative(c.torch_error)),
    ),
    (
        "ratio",
        "ours over PyTorch's",
        lambda c: _ratio(c.ratio) if c.error or c.torch_error else "exact",
    ),
    STRAIN,
    (
        "max |diff|",
        "between ours and PyTorch's, in the same precision",
        lambda c: figure(c.max_abs),
    ),
    SCALE,
)
PRINTED: tuple[Column, ...] = (  # of figures that somebody printed
    ("error, ours", "against what was printed, as a part of the largest value", ERROR[2]),
    STRAIN,
    ("largest value", "of those printed", SCALE[2]),
)


def page(report: Report) -> str:
    """The page, as HTML."""
    style = STYLE.read_text(encoding="utf-8")
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="mlx_zoo"),
        tag("title", f"{report.name}: {_verdict(report)}"),
        tag("style", Html(style)),
    )
    main = tag(
        "main",
        _banner(report),
        _divergence(report),
        _evidence(report),
        _plot(report),
        _worst(report),
        _gradients(report),
        _outputs(report),
        _preprocessing(report),
        _all_layers(report),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def _verdict(report: Report) -> str:
    return "passed" if report.passed else "FAILED"


# The verdict ------------------------------------------------------------------------------------


def _banner(report: Report) -> Html:
    sign = "✓ passed" if report.passed else "✗ FAILED"
    return tag(
        "header",
        tag("p", sign, class_="sign"),
        tag("h1", report.name),
        tag("p", report.reason, class_="reason"),
        tag("p", f"Compared with {report.evidence}."),
        *(tag("p", tag("strong", "Note: "), note) for note in report.notes),
        tag("dl", *(_pair(*pair) for pair in _figures(report)), class_="figures"),
        class_="passed" if report.passed else "failed",
    )


def _figures(report: Report) -> Iterable[tuple[str, str]]:
    """The few that say most, and what they are."""
    if isinstance(report, QuantizedReport):
        if report.num_tensors:
            same = report.num_tensors - len(report.different)
            yield f"{same:,} of {report.num_tensors:,}", "tensors are its own, quantised"
        yield from ((f"{value:.4g}", name) for name, value in report.effect.items())
        return
    if not report.outputs:
        return
    largest = max(c.scale for c in report.outputs)
    yield figure(report.max_abs), f"max |difference| of outputs up to {largest:.2g}"
    rows = (*report.layers, *report.outputs)
    same = sum(c.passed for c in rows)
    yield f"{same:,} of {len(rows):,}", "layers and outputs the same"
    ratios = [c.ratio for c in rows if c.torch_error]
    if ratios and not report.is_printed:
        yield _ratio(max(ratios)), "PyTorch's own rounding error, at most"
    if report.preprocessing:
        yield f"{report.preprocessing.max_abs:.2g} of 255", "grey levels between prepared images"


def _pair(value: str, name: str) -> Html:
    return tag("div", tag("dt", name), tag("dd", value))


def _divergence(report: Report) -> Html | None:
    """Where ours parts from the original: the layers before, the first that differs, some after."""
    if report.passed:
        return None
    if isinstance(report, QuantizedReport):
        items = (tag("li", tag("code", name)) for name in report.different)
        return _section("These tensors are something else", tag("ul", *items))
    rows = (*report.layers, *report.outputs)
    at = next((i for i, c in enumerate(rows) if not c.passed), None)
    if at is None:
        return None
    first = rows[at]
    start = max(at - AROUND, 0)
    before = f"Before it, {at} of {at} are the same." if at else "It is the first of all."
    after = sum(not c.passed for c in rows[at + 1 :])
    if after:
        before += f" After it, {after} of {len(rows) - at - 1} differ, having seen what it gave."
    return _section(
        "First divergence: ",
        tag("p", before),
        tag("p", tag("strong", f"{first.note}.")) if first.note else None,
        _layers(
            report, rows[start : at + AROUND + 1], "The layers around the first divergence", first
        ),
        about=tag("code", first.name),
    )


# What was compared ------------------------------------------------------------------------------


def _evidence(report: Report) -> Html:
    weights = {
        "Source": report.source,
        "Revision": report.revision,
        **{f"SHA-256 of {name}": value for name, value in report.sha256.items()},
        "Licence": report.license,
    }
    seed = "" if report.seed is None else f", seed {report.seed}"
    precision = "" if isinstance(report, QuantizedReport) else f", in {report.precision}"
    ran = {
        "Compared with": report.evidence,
        "Evidence": report.origin,
        "Inputs": f"{report.inputs}{seed}",
        "Ran on": f"the {report.device}{precision}",
        "Date": report.date,
        "Took": None if report.seconds is None else f"{report.seconds:.1f} s",
    }
    software = (f"{name} {x}" for name, x in report.versions.items() if name != "platform")
    machine = {
        **report.environment,
        "System": report.environment.get("System", report.versions.get("platform")),
        "Software": ", ".join(software),
    }
    again = [
        tag("figure", tag("figcaption", f"To repeat it, in {where}"), tag("pre", tag("code", text)))
        for where, text in report.repeat.items()
    ]
    return _section(
        "What was compared with what",
        tag(
            "div",
            tag("div", _facts("The comparison", ran), _facts("The published weights", weights)),
            tag("div", _facts("The machine", machine)),
            class_="columns",
        ),
        tag("div", *again, class_="columns") if again else None,
    )


def _facts(title: str, facts: Mapping[str, str | None]) -> Html | None:
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", value))
        for name, value in facts.items()
        if value
    ]
    return (
        tag("table", tag("caption", title), tag("tbody", *rows), class_="facts") if rows else None
    )


# Layers -----------------------------------------------------------------------------------------


def _plot(report: Report) -> Html | None:
    if not report.layers:
        return None
    rows = (*report.layers, *report.outputs)
    hint = "Point at a column to read its figures; the table at the end has them all."
    return _section(
        "The error of every layer",
        _legend(report),
        errors_by_layer(rows, len(report.layers), _said(report, rows)),
        tag("p", f"{_rule(report)} {hint}", class_="note"),
    )


def _legend(report: Report) -> Html:
    marks = (
        ("ours", tag("circle", cx=12, cy=8, r=4), "ours"),
        ("torch", tag("path", d="M8 8 12 4 16 8 12 12z"), f"PyTorch, {report.precision}"),
        ("bound", tag("path", d="M0 3H24V16H0z"), "allowed"),
        ("differs", tag("path", d="M7 3 17 13M7 13 17 3"), "differs"),
    )
    return tag(
        "ul",
        *(
            tag("li", tag("svg", mark, class_=kind, width=24, height=16, aria_hidden="true"), text)
            for kind, mark, text in marks
            if kind != "differs" or not report.passed
        ),
        tag("li", "error against float64, as a part of the largest value there", class_="unit"),
        class_="legend",
    )


def _rule(report: Report) -> str:
    """What the judge allows."""
    if report.is_printed:
        return f"{report.rule[0].upper()}{report.rule[1:]}."
    chance = CHANCE[report.precision]
    single = report.precision == "float32"
    both, unless = ("and", ", unless PyTorch's own error is above that") if single else ("or", "")
    return (
        "Both networks saw the same inputs. The original in float64 is the truth; PyTorch's own "
        f"error in {report.precision} is what rounding costs. A layer is the same where our error "
        f"is at most {FACTOR:.0f} times PyTorch's (or {FACTOR:.0f} times {chance:.1e}, which is "
        f"chance), {both} where ours and PyTorch's are at most {report.tolerance:.0e} of the "
        f"largest value apart{unless}."
    )


def _said(report: Report, rows: Sequence[Comparison]) -> str:
    """The plot in words."""
    errors = [c.relative(c.error) for c in rows if math.isfinite(c.error)]
    theirs = [c.relative(c.torch_error) for c in rows if math.isfinite(c.torch_error)]
    ours_to, theirs_to = (
        f"from {figure(min(x))} to {figure(max(x))}" if x else "never finite"
        for x in (errors, theirs)
    )
    differ = [c.name for c in rows if not c.passed]
    verdict = f"{len(differ)} differ, the first is {differ[0]}" if differ else "all are allowed"
    return (
        f"Error of {len(report.layers)} layers and {len(report.outputs)} outputs in the order of "
        f"execution, on a log scale: ours {ours_to}, PyTorch's {theirs_to}; {verdict}."
    )


def _worst(report: Report) -> Html | None:
    if isinstance(report, QuantizedReport) or len(report.layers) <= NUM_WORST:
        return None  # all of them are shown
    few = report.worst[:NUM_WORST]
    return _section(
        "The worst layers",
        _layers(report, few, "Those that come nearest to what is allowed, or exceed it"),
    )


def _gradients(report: Report) -> Html | None:
    """The parameters whose gradients come nearest to what is allowed; all of those that differ."""
    if not report.gradients:
        return None
    order = sorted(report.gradients, key=lambda g: (g.passed, -g.max_rel, -g.double_rel))
    shown = [g for i, g in enumerate(order) if i < NUM_WORST or not g.passed]
    columns = ("in float64", "in float32", "with jumps", "PyTorch's")
    head = tag(
        "tr",
        tag("th", "parameter", scope="col"),
        tag("th", "verdict", scope="col", class_="text"),
        *(tag("th", name, scope="col") for name in columns),
    )
    rows = [
        tag(
            "tr",
            tag("th", g.name, scope="row"),
            tag("td", "same" if g.passed else "✗ differs", class_="text"),
            *(tag("td", f"{x:.1e}") for x in (g.double_rel, g.max_rel, g.raw_rel, g.torch_rel)),
            class_=None if g.passed else "differs",
        )
        for g in shown
    ]
    caption = (
        f"Of {len(report.gradients)} gradients, the worst: errors as parts of the largest value. "
        f"In float64 against PyTorch, {PROOF_TOLERANCE:.0e} is allowed; in float32 on the same "
        f"side of every kink, of relu say, {GRADIENT_TOLERANCE:.0e}; then with what a rounding "
        "across a kink costs, ours and PyTorch's own"
    )
    return _section("Gradients", _table(caption, head, rows))


def _all_layers(report: Report) -> Html | None:
    if isinstance(report, QuantizedReport) or not (report.layers or report.outputs):
        return None
    rows = (*report.layers, *report.outputs)
    layers = "Layers in the order of execution, then the outputs"
    table = _layers(report, rows, layers if report.layers else "What the network returns")
    count = f"All {len(report.layers)} layers and the" if report.layers else "The"
    few = len(report.layers) <= NUM_WORST
    plural = "s" if len(report.outputs) > 1 else ""
    summary = tag("summary", f"{count} output{plural}, in figures")
    rule = None if report.layers else tag("p", _rule(report), class_="note")  # else by the plot
    return tag("details", summary, table, rule, open="" if few else None)


def _layers(
    report: Report, rows: Sequence[Comparison], caption: str, first: Comparison | None = None
) -> Html:
    columns = PRINTED if report.is_printed else COLUMNS
    head = tag(
        "tr",
        tag("th", "layer" if report.layers else "output", scope="col"),
        tag("th", "verdict", scope="col", class_="text"),
        *(tag("th", name, scope="col", title=said) for name, said, _ in columns),
    )
    return _table(caption, head, [_row(c, columns, c is first) for c in rows])


def _row(c: Comparison, columns: Sequence[Column], first: bool) -> Html:
    if c.note:
        figures = [tag("td", c.note, colspan=len(columns))]
    else:
        figures = [tag("td", said(c)) for *_, said in columns]
    verdict = "same" if c.passed else "✗ differs first" if first else "✗ differs"
    classes = " ".join(["differs"] * (not c.passed) + ["first"] * first)
    return tag(
        "tr",
        tag("th", c.name, scope="row"),
        tag("td", verdict, class_="text"),
        *figures,
        class_=classes or None,
    )


# Outputs ----------------------------------------------------------------------------------------


def _outputs(report: Report) -> Html | None:
    if not report.outputs:
        return None
    if isinstance(report, QuantizedReport):
        ours, theirs, truth = "quantised", "full precision", None
    else:
        ours, theirs, truth = "ours", f"PyTorch {report.precision}", "PyTorch float64"
    parts: list[Html] = []
    for c in report.outputs:
        samples = [x for x in report.samples if x.output == c.name]
        spreads = [x for x in report.spreads if x.output == c.name]
        if samples and len(report.outputs) > 1:
            parts.append(tag("h3", tag("code", c.name)))
        parts += [_samples(samples, (ours, theirs, truth))] if samples else []
        parts += [_spread(x, ours, theirs if truth else None, truth or theirs) for x in spreads]
    return _section("The outputs", *parts) if parts else None


def _samples(samples: Sequence[Sample], names: tuple[str, str, str | None]) -> Html:
    labels = any(x.label for x in samples)
    columns = ("index", *["label"] * labels, *filter(None, names), f"{names[0]} − {names[1]}")
    apart = [abs(x.ours - x.torch) for x in samples]
    worst = max(range(len(samples)), key=lambda i: (apart[i] != apart[i], apart[i]))
    rows = []
    for i, x in enumerate(samples):
        values = (x.ours, x.torch, x.truth) if names[2] else (x.ours, x.torch)
        where = f"[{', '.join(map(str, x.index))}]"
        rows.append(
            tag(
                "tr",
                tag("th", where, scope="row"),
                tag("td", x.label, class_="text") if labels else None,
                *(tag("td", f"{value:.8g}") for value in values),
                tag("td", figure(x.ours - x.torch), " ◂ farthest apart" if i == worst else None),
            )
        )
    head = tag(
        "tr",
        *(
            tag("th", name, scope="col", class_="text" if name == "label" else None)
            for name in columns
        ),
    )
    caption = "The largest values, and the one in which the two are farthest apart"
    return _table(caption, head, rows)


def _spread(spread: Spread, ours: str, theirs: str | None, truth: str) -> Html:
    total = f"{sum(spread.ours):,} values"
    odd = f"; {spread.nonfinite:,} more are not finite" if spread.nonfinite else ""
    if not spread.reach:
        return tag("p", f"No difference at all from {truth}: {total}{odd}.")
    ways = f": {ours} upward, {theirs} downward" if theirs else f", {ours}"
    caption = tag("figcaption", f"Errors of {total} against {truth}{ways}{odd}")
    return tag("figure", caption, distribution(spread, ours, theirs))


# Images -----------------------------------------------------------------------------------------


def _preprocessing(report: Report) -> Html | None:
    found = report.preprocessing
    if found is None:
        return None
    verdict = "within one grey level" if found.passed else "✗ more than one grey level apart"
    return _section(
        "Preparing images, apart from the network",
        tag(
            "p",
            f"The inputs above are random numbers. How images become numbers was compared with "
            f"{found.reference}, on {found.num_images} images: {found.max_abs:.2g} of 255 grey "
            f"levels at most, {found.mean_abs:.1g} on average; {verdict}.",
        ),
    )


# Parts of the page ------------------------------------------------------------------------------


def _section(title: str, *children: Html | None, about: Html | None = None) -> Html:
    return tag("section", tag("h2", title, about), *children)


def _table(caption: str, head: Html, rows: Iterable[Html]) -> Html:
    """A table of figures, which can be moved sideways where the page is narrow."""
    title = tag("caption", tag("span", caption))
    table = tag("table", title, tag("thead", head), tag("tbody", *rows))
    scroll = {"class_": "scroll", "tabindex": 0, "role": "region", "aria_label": caption}
    return tag("div", table, **scroll)
