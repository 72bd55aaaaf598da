"""The page of a report: what it says is what was found, it stands alone, and a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_zoo
from mlx_zoo.verify.circumstances import circumstances
from mlx_zoo.verify.plot import HEIGHT, Scale, figure
from mlx_zoo.verify.published import Printed
from mlx_zoo.verify.quantized import QuantizedReport
from mlx_zoo.verify.report import (
    NUM_BINS,
    NUM_SAMPLES,
    Comparison,
    PreprocessingDifference,
    Report,
    judge,
    look_closely,
)

HOSTILE = "</title></style><script>alert(1)</script>\"'&<b onload=x> \ud800\x00\u202e[/red]"
VOID = {"meta", "br", "hr"}
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
RNG = np.random.default_rng(0)


# --------------------------------------------------------------------------------------- reports


def compared(name, ours=2e-7, torch=1.5e-7, scale=3.0, **more):
    """A layer with errors relative to its largest value."""
    difference = abs(ours - torch) * scale
    return Comparison(name, difference, difference, scale, ours * scale, torch * scale, **more)


def report_of(layers, outputs=None, kind=Report, **more):
    facts = {
        "name": "network",
        "evidence": "timm in float32 and float64",
        "device": "cpu",
        "seed": 7,
        "inputs": "pixel_values (2, 32, 32, 3)",
        "versions": {"mlx": "0.32.4"},
    }
    outputs = (compared("output"),) if outputs is None else outputs
    return kind(layers=tuple(layers), outputs=tuple(outputs), **{**facts, **more})


def some_layers(count):
    errors = 10 ** RNG.normal(-6.5, 0.3, (count, 2))
    return [compared(f"blocks.{i // 8}.part{i % 8}", *errors[i].tolist()) for i in range(count)]


def failing():
    layers = some_layers(12)
    for i in (5, 6, 9):
        layers[i] = compared(layers[i].name, 1e-3)
    return report_of(layers)


def odd():
    """Of everything that has no logarithm."""
    layers = [
        compared("both exact", 0.0, 0.0),
        compared("ours exact", 0.0),
        compared("theirs exact", 1e-7, 0.0),
        compared("nothing but zeros", 0.0, 0.0, scale=0.0),
        compared("tiny", 1e-30, 1e-20),
        compared("nan", math.nan),
        compared("infinite", math.inf),
        compared("torch is infinite", 1e-7, math.inf),
        judge("another shape", np.zeros((2, 3)), np.zeros((2, 4)), np.zeros((2, 4))),
        compared("huge", 1e30),
    ]
    return report_of(layers)


def quantised(**more):
    ours = {"output": RNG.normal(size=(4, 10)).astype(np.float32)}
    full = {"output": ours["output"] + np.float32(0.01)}
    return report_of(
        (),
        [judge("output", ours["output"], full["output"], full["output"])],
        QuantizedReport,
        effect={"perplexity": 93.98, "top-1 agreement": 0.75},
        num_tensors=90,
        **{**look_closely(ours, full, full), **more},
    )


def hostile():
    rows = [compared(HOSTILE), compared("x" + HOSTILE, 1e-3)]
    values = {"output": RNG.normal(size=(2, 3)).astype(np.float32)}
    return report_of(
        rows,
        name=HOSTILE,
        inputs=HOSTILE,
        source=HOSTILE,
        license=HOSTILE,
        sha256={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        repeat={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
        **look_closely(values, values, values, (HOSTILE,) * 3),
    )


REPORTS = {
    "passed": lambda: report_of(
        some_layers(20), preprocessing=PreprocessingDifference(0, 0, "x", 4)
    ),
    "failing": failing,
    "odd": odd,
    "deep": lambda: report_of(some_layers(500)),
    "outputs alone": lambda: report_of(()),
    "two outputs": lambda: report_of(some_layers(3), [compared("a"), compared("b", 0.1)]),
    "nothing compared": lambda: report_of((), ()),
    "printed": lambda: report_of((), [Printed("it", 1e-5, 1e-5, 1.0, 1e-5, 5e-6, allowed=1e-4)]),
    "quantised": quantised,
    "not its own": lambda: quantised(different=("norm.bias",)),
    "hostile": hostile,
}


@pytest.fixture(params=REPORTS)
def report(request):
    return REPORTS[request.param]()


@pytest.fixture(scope="module")
def digits():
    return mlx_zoo.verify("resnet_digits", seed=3)


# ---------------------------------------------------------------------------------- reading pages


class Element:
    def __init__(self, name, attributes):
        self.name, self.attributes, self.children = name, dict(attributes), []

    def all(self, name=None, class_=None):
        """Those below of a name and class, in the order of the page."""
        for child in self.children:
            if isinstance(child, Element):
                classes = (child.attributes.get("class") or "").split()
                if name in (None, child.name) and class_ in (None, *classes):
                    yield child
                yield from child.all(name, class_)

    @property
    def text(self):
        return "".join(x if isinstance(x, str) else x.text for x in self.children)

    def __getitem__(self, attribute):
        return self.attributes[attribute]


class Reader(HTMLParser):
    """A tree; whatever is not closed where it should be is an error."""

    def __init__(self):
        super().__init__()
        self.open = [Element("", ())]

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.open[-1].children.append(Element(name, attributes))
        if name not in VOID:
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, name, attributes):
        self.open[-1].children.append(Element(name, attributes))

    def handle_endtag(self, name):
        assert self.open.pop().name == name

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(report):
    page = report.to_html()
    reader = Reader()
    reader.feed(page)
    reader.close()
    (root,) = reader.open
    return root


def shown(text):
    """What is not printable is marked."""
    return text.replace("\ud800", "\ufffd").replace("\x00", "\ufffd").replace("\u202e", "\ufffd")


def rows_of(table):
    """The cells of a table's body."""
    (body,) = table.all("tbody")
    return [[cell.text for cell in row.children] for row in body.all("tr")]


def tables(root, caption):
    return [t for t in root.all("table") if next(t.all("caption")).text.startswith(caption)]


# -------------------------------------------------------------------------------------- structure


def test_a_page_stands_alone(report):
    page = report.to_html()
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    root = read(report)
    assert not {"script", "img", "link", "iframe", "object", "b"} & {x.name for x in root.all()}
    for element in root.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "style", "srcset", "action")
            if "href" in name:
                assert value in ("#diamond", "#cross")
    (style,) = root.all("style")
    assert not re.search(r"url\(|@import|@font-face|//", style.text)
    policies = [x["content"] for x in root.all("meta") if x.attributes.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    assert policies == [
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    ]
    ids = [x["id"] for x in root.all() if "id" in x.attributes]
    assert len(ids) == len(set(ids))


def test_a_page_can_be_read_without_eyes(report):
    root = read(report)
    assert [x.text for x in root.all("h1")] == [shown(report.name)]
    for table in root.all("table"):
        assert next(table.all("caption")).text
        for row in table.all("tr"):
            assert row.children[0].name == "th"
        for cell in table.all("th"):
            assert cell["scope"] in ("col", "row")
    for svg in root.all("svg"):
        classes = svg.attributes.get("class", "")
        if classes in ("field", "distribution"):
            assert svg["role"] == "img"
            assert len(svg["aria-label"]) > 30
    for region in root.all("div", "scroll"):
        assert region["role"] == "region"
        assert region["tabindex"] == "0"
        assert region["aria-label"]


def test_whatever_a_checkpoint_says_is_text():
    root = read(hostile())
    said = shown(HOSTILE)
    assert said.startswith("</title>")
    for name in ("h1", "title"):
        assert said in next(root.all(name)).text
    cells = [x.text for x in root.all("td")] + [x.text for x in root.all("th")]
    assert cells.count(said) >= 8
    hostile().to_html().encode("utf-8")
    assert HOSTILE[:20] in str(report_of((), name=HOSTILE))  # and no markup of the terminal's


def test_a_deep_network_is_a_small_page():
    page = REPORTS["deep"]().to_html()
    assert len(page.encode()) < 300_000


# ---------------------------------------------------------------------------------------- figures


def test_the_verdict_comes_first(report):
    root = read(report)
    header = next(root.all("header"))
    assert next(header.all(class_="sign")).text == ("✓ passed" if report.passed else "✗ FAILED")
    assert header["class"] == ("passed" if report.passed else "failed")
    assert next(root.all("main")).children[0] is header
    assert shown(report.reason) in header.text
    assert report.evidence in header.text


def test_every_layer_is_in_the_table_with_its_figures():
    for made in (failing(), REPORTS["deep"]()):
        (details,) = read(made).all("details")
        (table,) = details.all("table")
        rows = (*made.layers, *made.outputs)
        found = rows_of(table)
        assert [row[0] for row in found] == [c.name for c in rows]
        for row, c in zip(found, rows, strict=True):
            assert row[1] == ("same" if c.passed else "✗ differs")
            assert float(row[2]) == pytest.approx(c.error / c.scale, rel=0.06)
            assert float(row[3]) == pytest.approx(c.torch_error / c.scale, rel=0.06)
            assert float(row[4].rstrip(" ×").replace(",", "")) == pytest.approx(
                c.error / c.torch_error, rel=0.06, abs=0.006
            )
            assert float(row[6]) == pytest.approx(c.max_abs, rel=0.06)
            assert float(row[7]) == pytest.approx(c.scale, rel=0.06)


def test_the_worst_layers_are_the_worst():
    made = failing()
    (table,) = tables(read(made), "Those that come nearest")
    found = [row[0] for row in rows_of(table)]
    assert len(found) == 10
    assert set(found[:3]) == {made.layers[i].name for i in (5, 6, 9)}
    rest = [c for c in (*made.layers, *made.outputs) if c.passed]
    rest.sort(key=lambda c: -c.error / max(4 * c.torch_error, 4 * 8 * 2**-23 * c.scale))
    assert found[3:] == [c.name for c in rest[:7]]


def test_the_first_divergence_jumps_to_the_eye():
    made = failing()
    root = read(made)
    section = next(root.all("section"))
    assert next(section.all("h2")).text == f"First divergence: {made.layers[5].name}"
    assert "Before it, 5 of 5 are the same. After it, 2 of 7 differ" in section.text
    (first,) = section.all("tr", "first")
    assert first.children[0].text == made.layers[5].name
    assert first.children[1].text == "✗ differs first"
    names = [row[0] for row in rows_of(next(section.all("table")))]
    assert names == [c.name for c in made.layers[2:9]]
    assert not any("First divergence" in x.text for x in read(REPORTS["passed"]()).all("h2"))


def test_outputs_that_differ_are_a_divergence():
    section = next(read(REPORTS["two outputs"]()).all("section"))
    assert next(section.all("h2")).text == "First divergence: b"


def test_the_page_of_a_real_verification(digits):
    assert digits.passed
    root = read(digits)
    facts = {cell[0]: cell[1] for t in root.all("table", "facts") for cell in rows_of(t)}
    assert facts["Compared with"] == digits.evidence
    assert facts["Inputs"] == f"{digits.inputs}, seed 3"
    assert facts["Source"] == "package:resnet_digits.pth"
    assert facts["Licence"] == "mit"
    assert facts["SHA-256 of resnet_digits.pth"] == sha256_of("resnet_digits.pth")
    for name in ("mlx_zoo", "mlx", "python", "torch", "timm"):
        assert f"{name} {digits.versions[name]}" in facts["Software"]
    assert facts["System"] == platform.platform()
    assert facts["Processor"]
    assert facts["BLAS"]
    (table,) = tables(root, "The largest values")
    for row, sample in zip(rows_of(table), digits.samples, strict=True):
        assert row[0] == f"[{sample.index[0]}, {sample.index[1]}]"
        assert row[1] == str(sample.index[1])  # the label of a digit
        shown = [float(x) for x in row[2:5]]
        assert shown == pytest.approx([sample.ours, sample.torch, sample.truth], rel=1e-7)
    farthest = [row for row in rows_of(table) if "farthest apart" in row[-1]]
    assert len(farthest) == 1
    assert float(farthest[0][-1].split()[0]) == pytest.approx(digits.max_abs, rel=0.06) or float(
        farthest[0][-1].split()[0]
    ) == pytest.approx(-digits.max_abs, rel=0.06)
    section = next(x for x in root.all("section") if "Preparing images" in x.text)
    assert "0 of 255 grey levels at most" in section.text


def test_evidence_that_is_stored_names_the_same_weights():
    report = mlx_zoo.verify("resnet_digits", evidence="published")
    assert report.sha256 == {"resnet_digits.pth": sha256_of("resnet_digits.pth")}
    assert report.source == "package:resnet_digits.pth"
    report = mlx_zoo.verify("gpt2_docs", quantize=8)
    assert report.sha256 == {"model.safetensors": sha256_of("gpt2_docs/model.safetensors")}


def sha256_of(file):
    from mlx_zoo.catalogue import DATA

    return hashlib.sha256((DATA / file).read_bytes()).hexdigest()


def test_a_verification_can_be_repeated_as_it_says(digits):
    python, shell = digits.repeat["Python"], digits.repeat["a shell"]
    assert python == "mlx_zoo.verify('resnet_digits', seed=3)"
    assert shell == "mlx-zoo verify resnet_digits --seed 3"
    assert eval(python).to_json() == digits.to_json()
    again = mlx_zoo.verify("resnet_digits", seed=1, size=48, dtype=mx.float16, num_classes=10)
    said = "dtype='float16', num_classes=10, size=48, seed=1"
    assert again.repeat["Python"] == f"mlx_zoo.verify('resnet_digits', {said})"
    options = "--dtype float16 --num-classes 10 --size 48 --seed 1"
    assert again.repeat["a shell"] == f"mlx-zoo verify resnet_digits {options}"
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    (line,) = mlx_zoo.verify(model).repeat.values()
    assert line.startswith("mlx_zoo.verify(model)  # model: resnet_digits")


def test_a_revision_that_moves_is_repeated_where_it_was():
    checkpoint = replace(mlx_zoo.info("bert-base-uncased"), revision="abc123")
    said = circumstances(checkpoint, "bert-base-uncased", {"pretrained": True})
    assert said["revision"] == "abc123"
    assert said["repeat"] == {
        "Python": "mlx_zoo.verify('bert-base-uncased', revision='abc123')",
        "a shell": "mlx-zoo verify bert-base-uncased --revision abc123",
    }
    how = {"pretrained": "my weights.pth", "dropout": 0.5, "task": None}
    said = circumstances(checkpoint, "hf-hub:a/b@main", how)
    assert said["repeat"] == {
        "Python": "mlx_zoo.verify('hf-hub:a/b@main', pretrained='my weights.pth', dropout=0.5)"
    }


def test_the_page_of_printed_figures():
    """They have a few digits, and nothing is known of PyTorch's own error."""
    row = Printed("what it is", 3e-5, 1e-5, 2.0, 3e-5, 5e-6, allowed=1.5e-4)
    made = report_of((), [row], origin="a model card", notes=("few",))
    root = read(made)
    (details,) = root.all("details")
    (table,) = details.all("table")
    heads = [x.text for x in next(table.all("thead")).all("th")]
    assert heads == ["output", "verdict", "error, ours", "of the bound", "largest value"]
    assert rows_of(table) == [["what it is", "same", "1.5e-05", "20 %", "2.0e+00"]]
    assert "Allowed is half of the last digit" in details.text
    assert not list(root.all("svg", "field"))  # two marks are no plot
    assert "Note: few" in next(root.all("header")).text
    assert "a model card" in root.text
    assert "PyTorch's own rounding error" not in root.text + str(made)
    assert "half a digit" in str(made)


def test_the_page_of_a_quantised_network():
    own, other = read(quantised()), read(quantised(different=("norm.bias",)))
    assert "90 of 90" in next(own.all("header")).text
    assert "89 of 90" in next(other.all("header")).text
    assert "93.98" in next(own.all("header")).text
    assert next(other.all("li")).text == "norm.bias"
    for root in (own, other):
        (table,) = tables(root, "The largest values")
        heads = [x.text for x in next(table.all("thead")).all("th")]
        assert heads == ["index", "quantised", "full precision", "quantised − full precision"]
        assert not list(root.all("svg", "field"))  # nothing is judged against rounding


# ------------------------------------------------------------------------------------------ plots


def percent(text):
    assert text.endswith("%")
    return float(text[:-1])


def marks_of(root):
    (field,) = root.all("svg", "field")
    return list(field.all("g", "layer"))


def ticks_of(root):
    """Decade -> place, as the labels beside the plot say."""
    (axis,) = root.all("svg", "axis")
    labels = {x.text: float(x["y"]) - 4 for x in axis.all("text")}
    return {
        int(text[2:].translate(SUPERSCRIPTS)): y for text, y in labels.items() if text[:2] == "10"
    }, {text: y for text, y in labels.items() if text[:2] != "10"}


def test_a_layer_has_a_mark_of_each_kind_where_its_error_is():
    for made in (REPORTS["passed"](), failing(), REPORTS["deep"]()):
        root = read(made)
        rows = (*made.layers, *made.outputs)
        marks = marks_of(root)
        assert len(marks) == len(rows)
        ticks, others = ticks_of(root)
        assert not others
        low, high = min(ticks), max(ticks)
        decade = (ticks[high] - ticks[low]) / (high - low)
        assert decade < 0  # upward
        for i, (mark, c) in enumerate(zip(marks, rows, strict=True)):
            (circle,) = mark.all("circle")
            diamond, *crosses = mark.all("use")
            assert diamond["href"] == "#diamond"
            assert len(crosses) == (not c.passed)
            assert ("differs" in mark["class"]) == (not c.passed)
            middle = 100 * (i + 0.5) / len(rows)
            assert percent(circle["cx"]) == pytest.approx(middle, abs=0.01)
            assert percent(diamond["x"]) == pytest.approx(middle, abs=0.01)
            for place, error in ((circle["cy"], c.error), (diamond["y"], c.torch_error)):
                y = ticks[low] + (math.log10(error / c.scale) - low) * decade
                assert float(place) == pytest.approx(y, abs=0.11)
            title = next(mark.all("title")).text
            assert title.startswith(f"{c.name}: error {figure(c.error / c.scale)}, ")


def test_the_bound_is_drawn_where_the_judge_has_it():
    made = failing()
    root = read(made)
    ticks, _ = ticks_of(root)
    low, high = min(ticks), max(ticks)
    (path,) = root.all("path", "bound")
    steps = re.findall(r"V([\d.]+)H([\d.]+)", path["d"])
    rows = (*made.layers, *made.outputs)
    assert len(steps) == len(rows)
    for i, ((y, x), c) in enumerate(zip(steps, rows, strict=True)):
        allowed = 4 * max(c.torch_error / c.scale, 8 * 2**-23)
        part = (math.log10(allowed) - low) / (high - low)
        assert float(y) == pytest.approx(ticks[low] + part * (ticks[high] - ticks[low]), abs=0.11)
        assert float(x) == pytest.approx(1000 * (i + 1) / len(rows), abs=0.06)


def test_what_has_no_logarithm_lies_beside_the_scale():
    made = odd()
    root = read(made)
    ticks, strips = ticks_of(root)
    assert set(strips) == {"∞, NaN", "exact"}
    top, bottom = strips["∞, NaN"], strips["exact"]
    assert 0 < top < min(ticks.values()) < max(ticks.values()) < bottom < HEIGHT
    places = {}
    for mark, c in zip(marks_of(root), (*made.layers, *made.outputs), strict=True):
        places[c.name] = float(next(mark.all("circle"))["cy"]), float(next(mark.all("use"))["y"])
        assert all(0 < y < HEIGHT for y in places[c.name])
    assert places["both exact"] == places["nothing but zeros"] == (bottom, bottom)
    assert places["ours exact"][0] == bottom != places["ours exact"][1]
    assert places["theirs exact"][1] == bottom != places["theirs exact"][0]
    assert places["tiny"] == (bottom, bottom)
    for name in ("nan", "infinite", "huge"):
        assert places[name][0] == top
    assert places["torch is infinite"][1] == top
    assert "nan" not in "".join(x["d"] for x in root.all("path")).lower()
    (details,) = root.all("details")
    found = {row[0]: row[1:] for row in rows_of(next(details.all("table")))}
    assert found["both exact"][1:4] == ["0", "0", "exact"]
    assert found["nan"][1] == "NaN"
    assert found["infinite"][1] == "∞"
    assert found["another shape"] == ["✗ differs", "2 x 3 here, 2 x 4 in PyTorch"]
    assert json.loads(made.to_json())["layers"][5]["error"] is None


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([1e-7], -7, -6), ([3e-7, 2e-5], -7, -4), ([0.0, math.nan], -8, -4), ([1e-3, 1e-3], -3, -2)],
)
def test_a_scale_holds_its_values(values, low, high):
    scale = Scale.of(values)
    assert (scale.low, scale.high) == (low, high)
    assert scale.top <= scale.y(10.0**high) < scale.y(10.0**low) <= scale.bottom
    assert all(scale.top - 0.1 <= scale.y(x) <= scale.bottom + 0.1 for x in values if scale.has(x))


def test_the_parts_of_a_network_are_named():
    layers = [
        compared(n) for n in ("stem", *(f"blocks.{b}.fc{i}" for b in range(3) for i in (1, 2)))
    ]
    (field,) = read(report_of(layers)).all("svg", "field")
    assert [x.text for x in field.children if isinstance(x, Element) and x.name == "text"] == [
        "stem",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "output",
    ]


def test_names_of_parts_are_not_written_over_each_other():
    (field,) = read(REPORTS["deep"]()).all("svg", "field")
    texts = [x for x in field.children if isinstance(x, Element) and x.name == "text"]
    assert len(texts) > 20
    for width, some in ((900, texts), (940, [x for x in texts if "class" not in x.attributes])):
        sides = [
            (percent(x["x"]) / 100 * width + side * 3.5 * len(x.text))
            for x in some
            for side in (-1, 1)
        ]
        assert sides == sorted(sides)
        assert sides[0] >= 0


# ---------------------------------------------------------------------------- samples and spreads


def test_outputs_are_looked_at_closely():
    truth = RNG.normal(size=(3, 40))
    theirs = (truth + RNG.normal(size=truth.shape) * 1e-7).astype(np.float32)
    ours = theirs.copy()
    ours[1, 5] += 3e-3
    labels = tuple(f"label {i}" for i in range(40))
    found = look_closely({"x": ours}, {"x": theirs}, {"x": truth}, labels)
    samples, (spread,) = found["samples"], found["spreads"]
    largest = np.sort(truth.reshape(-1))[::-1][:NUM_SAMPLES]
    assert set(largest) <= {x.truth for x in samples}
    assert [x.truth for x in samples] == sorted((x.truth for x in samples), reverse=True)
    assert len(samples) <= NUM_SAMPLES + 1
    assert (1, 5) in {x.index for x in samples}
    for x in samples:
        assert x.label == f"label {x.index[1]}"
        assert (x.ours, x.torch, x.truth) == (ours[x.index], theirs[x.index], truth[x.index])
    assert spread.reach == pytest.approx(3e-3, rel=1e-3)
    assert len(spread.ours) == len(spread.torch) == NUM_BINS
    assert sum(spread.ours) == sum(spread.torch) == truth.size
    assert spread.ours[NUM_BINS // 2] == truth.size - 1
    assert spread.ours[-1] == 1


def test_outputs_that_are_not_finite_are_looked_at_too():
    truth = np.arange(6.0).reshape(2, 3)
    ours = truth.astype(np.float32)
    ours[0, 1], ours[1, 0] = np.nan, np.inf
    found = look_closely({"x": ours}, {"x": truth}, {"x": truth})
    (spread,) = found["spreads"]
    assert (sum(spread.ours), spread.nonfinite, spread.reach) == (4, 2, 0.0)
    assert any(math.isnan(x.ours) for x in found["samples"])
    other_shape = look_closely({"x": ours[:1]}, {"x": truth}, {"x": truth})
    assert other_shape == {"samples": (), "spreads": ()}
    page = read(report_of((), [judge("x", ours, truth, truth)], **found)).text
    assert "2 more are not finite" in page


def test_a_distribution_has_the_counts_as_its_heights():
    made = quantised()
    (drawing,) = read(made).all("svg", "distribution")
    heights = [float(x["height"]) for x in drawing.all("rect", "ours")]
    counts = [x for x in made.spreads[0].ours if x]
    assert len(heights) == len(counts)
    assert heights == pytest.approx([56 * x / max(counts) for x in counts], abs=0.06)


def test_nothing_compared_is_not_the_same():
    for shapes in (((0, 4),) * 3, ((2, 3), (2, 4), (2, 4))):
        row = judge("x", *map(np.zeros, shapes))
        assert not row.passed
        assert "here" in row.note


# --------------------------------------------------------------------------------- on a terminal


def test_a_deep_network_is_a_short_table():
    layers = some_layers(161)
    for i in range(100, 140):
        layers[i] = compared(layers[i].name, 1e-3 * (i - 99))
    made = report_of(layers)
    text = str(made)
    assert len(text.splitlines()) < 40
    shown = [c for c in layers if f" {c.name} " in text]
    assert shown[0] is layers[100]  # the first that differs
    assert {*layers[100:110], *layers[130:140]} == {*shown}
    assert text.count("differs") == 21 - made.outputs[0].passed
    assert "161 layers in all; of those not shown 20 differ and 121 passed" in text
    assert " output " in text
    passed = str(report_of(some_layers(161)))
    assert "of those not shown 151 passed" in passed
    assert all(f" {c.name} " in str(report_of(layers[:30])) for c in layers[:30])


# ----------------------------------------------------------------------------------- in a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def opened(page, tmp_path, *options, size="1000,1400"):
    """Show a page in Chromium: what it wrote to its log, and its picture."""
    file, picture = tmp_path / "report.html", tmp_path / "page.png"
    file.write_text(page, encoding="utf-8")
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update")
    command = [
        CHROMIUM,
        *("--headless", "--disable-gpu", "--disable-quic", "--disable-sync", *quiet),
        *(["--no-sandbox"] if os.getuid() == 0 else []),
        *("--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'own'}"),
        *(f"--screenshot={picture}", f"--window-size={size}", "--virtual-time-budget=2000"),
        *options,
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(tmp_path / "own", ignore_errors=True)
    with Image.open(picture) as image:
        return done.stderr, np.asarray(image.convert("RGB")).astype(int)


def pixels_like(picture, colour):
    return int((np.abs(picture - colour).max(axis=-1) < 8).sum())


@in_a_browser
def test_a_browser_shows_it_and_asks_for_nothing(tmp_path):
    made = failing()
    log, picture = opened(made.to_html(), tmp_path)
    assert "CONSOLE" not in log, log  # neither an error nor a request that was refused
    assert pixels_like(picture, (255, 255, 255)) > 0.4 * picture[..., 0].size
    assert pixels_like(picture, (253, 235, 240)) > 100_000  # the banner of one that failed
    assert pixels_like(picture, (179, 18, 63)) > 300  # its sign, and crosses
    assert pixels_like(picture, (8, 104, 184)) > 100  # our marks
    assert pixels_like(picture, (163, 79, 0)) > 50  # PyTorch's


@in_a_browser
def test_a_browser_would_say_what_a_page_asks_for(tmp_path):
    """So that the silence above means something; and the policy holds."""
    page = REPORTS["passed"]().to_html()
    planted = '<img src="https://example.org/x.png"><script>document.title="x"</script></main>'
    log, picture = opened(
        page.replace("</main>", planted), tmp_path, "--blink-settings=preferredColorScheme=0"
    )
    assert len(re.findall("CONSOLE.*Content Security Policy", log)) >= 2, log
    assert pixels_like(picture, (20, 23, 27)) > 0.4 * picture[..., 0].size  # in the dark
    assert pixels_like(picture, (18, 48, 31)) > 20_000  # the banner of one that passed
