"""MLX's operations against PyTorch's: the suite passes here, would notice, and leaves none out."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

import mlx_zoo
from mlx_zoo.backend.precision import real_float32
from mlx_zoo.cli import main
from mlx_zoo.errors import MissingDependency
from mlx_zoo.verify import conformance, operations, reference
from mlx_zoo.verify.operations import OPERATIONS, case, normal

PACKAGE = Path(mlx_zoo.__file__).parent
ROOT = Path(__file__).parents[1]
SCANNED = ("models/*.py", "tasks/*.py", "preprocess/*.py", "backend/*.py", "quantization.py")

# What is used, and computes nothing that could differ.
NEEDS_NO_CASE = {
    **dict.fromkeys(("mx.array", "mx.Dtype", "mx.finfo", "mx.issubdtype"), "about types"),
    **dict.fromkeys(("mx.eval", "mx.async_eval", "mx.stream"), "about when and where"),
    **dict.fromkeys(("mx.default_device", "mx.new_stream", "mx.contiguous"), "about where"),
    **dict.fromkeys(("mx.fast.cuda_kernel", "mx.cuda.is_available"), "kernels: test_cuda"),
    **dict.fromkeys(("mx.distributed.init", "mx.distributed.all_gather"), "jobs: test_scale"),
    "mx.distributed.all_sum": "processes: test_parallel",
    **dict.fromkeys(
        ("mx.custom_function", "mx.vjp", "mx.jvp", "mx.vmap"), "about gradients: test_ops"
    ),
    "mx.stop_gradient": "about gradients: test_gradients, test_train_mode",
    "x.split": "of strings",
    "mx.load": "a file's bytes: the hub's tests",
    "nn.Module": "a class without arithmetic",
    "nn.Identity": "returns what it is given",
    **dict.fromkeys(
        ("nn.LayerNorm", "nn.GroupNorm"), "parameters; those of layers, which compute, have cases"
    ),
    "nn.init.he_normal": "fresh weights, which are never compared",
    "nn.init.normal": "fresh weights, which are never compared",
    "nn.quantize": "replaces layers: quantize, dequantize and quantized_matmul have cases",
}


def chains(tree):
    """The dotted names of a file that begin with mx or nn, and what is called of other values."""
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        name = ast.unparse(node)
        if re.fullmatch(r"(mx|nn)(\.\w+)+", name):
            yield name
        elif id(node) in called and not name.startswith("math.") and node.attr[0] != "_":
            yield f"x.{node.attr}"


def resolved(name):
    value = {"mx": mx, "nn": nn}[name.partition(".")[0]]
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


def used_by(*patterns):
    """The operations, layers and methods of arrays in the source: name -> the files."""
    found = {}
    for path in (path for pattern in patterns for path in sorted(PACKAGE.glob(pattern))):
        for name in chains(ast.parse(path.read_text(encoding="utf-8"))):
            if name.startswith("x."):  # of arrays, in networks; elsewhere NumPy has the same names
                if path.parent.name != "models" or not hasattr(mx.array, name[2:]):
                    continue
            elif not callable(resolved(name)) or isinstance(resolved(name), (mx.Dtype, mx.Device)):
                continue
            found.setdefault(name, set()).add(path.name)
    return found


@pytest.fixture(scope="module")
def suite():
    """The report of all cases, and the names of what was called to get it."""
    called, own = set(), {}

    def noting(name, function):
        def call(*args, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in used_by(*SCANNED):
            if name in NEEDS_NO_CASE:
                continue
            if name.startswith("x."):
                owner, attribute = mx.array, name[2:]
            elif isinstance(resolved(name), type):  # a layer
                owner, attribute = resolved(name), "__call__"
            else:
                path, _, attribute = name.rpartition(".")
                owner = resolved(path) if "." in path else mx
            own[name] = getattr(owner, attribute)
            patch.setattr(owner, attribute, noting(name, own[name]))
        direct = {id(o.ours) for o in OPERATIONS.values()}  # rows of a function of MLX itself
        called.update(name for name in own if id(own[name]) in direct)
        report = conformance.run("cpu")
    return report, called


# The suite --------------------------------------------------------------------------------------


def test_the_cpu_conforms_but_for_what_is_known(suite):
    report, _ = suite
    assert report.passed, "\n".join(map(str, report.failures))
    assert report.real_float32
    assert not report.missing
    assert {row.operation for row in report.rows} == set(OPERATIONS)
    assert len(report.outcomes) > 2500


def test_every_known_deviation_of_the_cpu_is_seen(suite):
    report, _ = suite
    assert not report.mended, f"delete the rows of {report.mended}"
    for deviation in conformance.DEVIATIONS:
        if deviation.backend != report.backend:
            continue
        seen = [x for x in report.known if deviation.covers(x, report.backend)]
        assert seen or deviation.seldom, deviation
        assert all(x.message for x in seen)


def test_every_operation_of_the_networks_has_a_case(suite):
    """Where this fails: give it a row in verify/operations.py, or a reason in NEEDS_NO_CASE."""
    _, called = suite
    used = used_by(*SCANNED)
    assert {"mx.conv2d", "nn.Conv2d", "x.swapaxes", "mx.random.categorical"} <= set(used)
    lacking = {name: files for name, files in used.items() if name not in called}
    assert set(lacking) <= set(NEEDS_NO_CASE), lacking
    assert set(NEEDS_NO_CASE) <= set(lacking), "reasons for what is not used, or has a case"


def test_both_sides_have_the_same_operations():
    assert set(reference._operations()) == set(OPERATIONS)
    labels = [f"{o.name}: {c}" for o in OPERATIONS.values() for c in o.cases]
    assert len(labels) == len(set(labels)), "two cases of one label draw the same inputs"


def test_most_float_operations_are_tried_in_every_precision_and_differentiated(suite):
    report, _ = suite
    for row in report.rows:
        if OPERATIONS[row.operation].gradients:
            assert "gradients" in row.worst, row.operation
        assert set(OPERATIONS[row.operation].dtypes) <= set(row.worst), row.operation


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 8))
def test_other_inputs_conform_as_well(seed):
    report = conformance.run("cpu", seed=seed)
    assert report.passed, "\n".join(map(str, report.failures))


def test_inputs_are_those_of_the_seed():
    operation = OPERATIONS["matmul"]
    first, again, other = (
        conformance.draw(operation, operation.cases[0], seed, "float32")[0] for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.float32


@pytest.mark.parametrize("view", ["transposed", "every other", "reversed", "inside"])
@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 3, 4)])
def test_a_view_holds_the_same_values(view, shape):
    x = mx.random.normal(shape)
    seen = conformance._seen_as(x, view)
    mx.eval(x, seen)
    assert mx.array_equal(seen, x)
    strides = [np.array(each, copy=False).strides for each in (seen, x)]
    if len(shape) > 1 or view in ("every other", "reversed"):  # of an axis, there is one order
        assert strides[0] != strides[1]
    half = x.astype(mx.bfloat16)
    assert mx.array_equal(conformance._seen_as(half, view), half)


# It would notice --------------------------------------------------------------------------------


def wrong(monkeypatch, name, ours):
    """The report of an operation's first cases, where it is computed otherwise."""
    operation = OPERATIONS[name]
    changed = replace(operation, ours=ours, cases=operation.cases[:8])
    monkeypatch.setitem(OPERATIONS, name, changed)
    return conformance.run("cpu", only=name)


def shortened(x):
    """Floats with TF32's mantissa, of 10 bits."""
    bits = mx.view(x, mx.uint32)
    return mx.view((bits + 0x1000) & ~mx.array(0x1FFF, mx.uint32), mx.float32)


def tf32(function):
    def product(x, w, *args, **kwargs):
        if x.dtype == mx.float32:
            x, w = shortened(x), shortened(w)
        return function(x, w, *args, **kwargs)

    return product


MISTAKES = {
    "conv2d": lambda x, w, *, padding=0, **how: mx.conv2d(x, w, padding=0, **how),
    "matmul": tf32(mx.matmul),
    "softmax": lambda x, mask=None, *, axis=-1: operations.softmax(x, mask, axis=axis) * 1.00001,
    "gelu": operations.layers.gelu_tanh,
    "LayerNorm": lambda x, w, b, *, eps: operations.layer_norm(x, w, b, eps=10 * eps),
    "take": lambda x, ids, *, axis: mx.take(x, ids + 0 * ids.max(), axis) * (1 + 2**-20),
    "argmax": lambda x, *, axis=-1: x.shape[axis] - 1 - x[..., ::-1].argmax(axis=axis),
    "max": lambda x, *, axis=-1: mx.where(mx.isnan(x), 0, x).max(axis=axis),
    "exp": lambda x: mx.where(x < -5, 0, mx.exp(x)),
    "categorical": lambda logits, *, draws: operations.categorical(logits * 0.9, draws=draws),
    "dequantize": lambda w, s, b, **how: mx.dequantize(w, s, b + 1e-3, **how),
    "quantize": lambda w, **how: mx.round(w),
    "add": lambda x, y: (x.astype(mx.float32) + y.astype(mx.float32) * 1.001).astype(x.dtype),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_operation_fails(name, monkeypatch):
    report = wrong(monkeypatch, name, MISTAKES[name])
    assert not report.passed
    assert [row.passed for row in report.rows] == [False]


def test_a_wrong_gradient_fails(monkeypatch):
    @mx.custom_function
    def tanh(x):
        return mx.tanh(x)

    @tanh.vjp
    def tanh_vjp(x, cotangent, y):
        return cotangent * (1 - 1.001 * y * y)

    report = wrong(monkeypatch, "tanh", tanh)
    assert {outcome.part for outcome in report.failures} == {"gradient of input 1"}


def test_a_failure_says_what_repeats_it(monkeypatch):
    off = mx.zeros((2, 9, 9, 64)).at[1, 2, 3, 4].add(0.5)

    def conv2d(x, w, **how):
        y = mx.conv2d(x, w, **how)
        return y + off if y.shape == off.shape and y.dtype == mx.float32 else y

    report = wrong(monkeypatch, "conv2d", conv2d)
    failure, *others = report.failures
    assert not others
    assert failure.index == (1, 2, 3, 4)
    assert failure.actual - failure.expected == pytest.approx(0.5, abs=1e-5)
    text = str(report)
    assert "element [1, 2, 3, 4]: expected" in text
    assert "seed 0" in text
    alone = conformance.run("cpu", only=failure.label)
    assert alone.failures == [failure]
    assert len({outcome.case for outcome in alone.outcomes}) == 1
    arrays = conformance.draw(OPERATIONS["conv2d"], operations.CONV2D[6], 0, "float32")
    again, _ = reference.operate("conv2d", arrays, {}, "float64")
    assert again[0][1, 2, 3, 4] == failure.expected


# Deviations, gaps, and what is raised -----------------------------------------------------------


def deviation(at_most, backend="cpu"):
    return conformance.Deviation(
        "square", "*", "*", ("float32",), backend, at_most, "because", "0.32"
    )


def test_a_known_deviation_is_shown_and_does_not_fail(monkeypatch):
    monkeypatch.setattr(conformance, "DEVIATIONS", (deviation(20),))
    report = wrong(monkeypatch, "square", lambda x: mx.square(x) * (1 + 10 * 2**-23))
    assert report.failures == [], "float16 and bfloat16 do not see ten roundings of float32"
    assert report.passed
    assert report.known
    assert "because" in str(report)
    assert "known deviation" in report.to_markdown()
    assert json.loads(report.to_json())["known_deviations"] == len(report.known)


@pytest.mark.parametrize("row", [deviation(5), deviation(20, "cuda")], ids=["larger", "elsewhere"])
def test_more_than_is_known_fails(row, monkeypatch):
    monkeypatch.setattr(conformance, "DEVIATIONS", (row,))
    assert not wrong(monkeypatch, "square", lambda x: mx.square(x) * (1 + 10 * 2**-23)).passed


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("erf", mx.float32, 1.05),
        ("BatchNorm in training", mx.float16, np.nan),
        ("cumsum", mx.float16, 1.05),
    ],
)
def test_a_mistake_does_not_hide_behind_what_is_known(name, dtype, factor, monkeypatch):
    own = OPERATIONS[name].ours

    def ours(x, *others, **how):
        found = own(x, *others, **how)
        if x.dtype != dtype:
            return found
        return tuple(y * factor for y in found) if isinstance(found, tuple) else found * factor

    assert not wrong(monkeypatch, name, ours).passed


def test_a_deviation_that_is_gone_is_said_to_be_mended(monkeypatch):
    monkeypatch.setattr(conformance, "DEVIATIONS", (deviation(20),))
    monkeypatch.setattr(operations, "OPERATIONS", {"square": OPERATIONS["square"]})
    report = conformance.run("cpu")
    assert report.passed
    assert report.mended == (deviation(20),)
    assert "delete their rows" in str(report)
    assert conformance.run("cpu", only="square").mended == (), "a part of the suite proves nothing"


def test_one_that_raises_does_not_stop_the_others(monkeypatch):
    def broken(x, y):
        if x.dtype == mx.float16:
            raise RuntimeError("[Foo::eval_gpu] Add has no CUDA implementation.")
        if x.ndim == 3:
            raise RuntimeError("something else")
        return x + y

    report = wrong(monkeypatch, "add", broken)
    kinds = {(x.dtype, x.verdict) for x in report.outcomes}
    assert ("float16", "not implemented") in kinds
    assert ("float32", "passed") in kinds
    assert {x.message for x in report.failures} == {"RuntimeError: something else"}
    assert "not implemented" in report.rows[0].verdict
    assert not report.passed


def test_a_gradient_that_is_not_implemented_keeps_the_output(monkeypatch):
    @mx.custom_function
    def square(x):
        return mx.square(x)

    @square.vjp
    def square_vjp(primals, cotangents, outputs):
        raise RuntimeError("[conv] NYI")

    report = wrong(monkeypatch, "square", square)
    found = {(x.part, x.verdict) for x in report.outcomes if x.dtype == "float32"}
    assert ("output", "passed") in found
    assert ("gradients", "not implemented") in found
    assert report.passed


def test_nothing_tried_is_no_pass():
    with pytest.raises(ValueError, match="matches no operation"):
        conformance.run("cpu", only="dance")
    report = conformance.run("cpu", only="tri")
    assert not replace(report, outcomes=()).passed
    missing = [replace(x, verdict="not implemented", error=None) for x in report.outcomes]
    assert not replace(report, outcomes=tuple(missing)).passed


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="'cpu' or 'gpu'"):
        conformance.run("tpu")
    if mx.default_device() == mx.Device(mx.cpu):
        with pytest.raises(ValueError, match="MLX computes on Device\\(cpu"):
            conformance.run("gpu")


def test_without_pytorch(monkeypatch):
    monkeypatch.setattr(reference, "is_installed", lambda library: False)
    with pytest.raises(MissingDependency, match=re.escape('pip install "mlx-zoo[torch]"')):
        conformance.run("cpu")


# How errors are counted -------------------------------------------------------------------------


def errors(x, truth, unit=1.0, dtype="float32"):
    return conformance._errors(np.array(x), np.array(truth), unit, dtype).tolist()


def test_errors_count_what_is_not_a_number():
    inf, nan = np.inf, np.nan
    assert errors([inf, -inf, nan, 1.0], [inf, -inf, nan, 1.5]) == [0, 0, 0, 0.5]
    assert errors([nan, 1.0, inf, -inf], [1.0, nan, -inf, 2.0]) == [inf] * 4
    assert errors([inf, 65504.0, inf], [1e6, 1e6, 60000.0], dtype="float16") == [0, inf, inf]
    assert errors([inf, 65504.0], [65510.0, 65510.0], dtype="float16")[0] == 0, (
        "may round to either"
    )
    assert errors([3, 4], [3, 6]) == [0, 2]


def test_a_unit_is_one_rounding_of_what_is_measured():
    operation = replace(OPERATIONS["tanh"], cases=(case(normal(2)),))
    arrays, truth = [np.array([4.0, 0.0])], [np.array([1.0, 1e-3])]

    def units(measure, dtype="float32"):
        changed = replace(operation, measure=measure)
        return conformance._units(changed, changed.cases[0], arrays, truth, dtype)[0] * 2.0**23

    assert units(operations.LARGEST).tolist() == [1, 1]
    assert units(operations.EACH) == pytest.approx([1, 1e-3])
    assert units(operations.INPUT) == pytest.approx([4, 1e-3])
    assert units(operations.LARGEST, "bfloat16").tolist() == [2**16, 2**16]


def test_real_float32():
    assert real_float32("cpu")


@pytest.mark.parametrize("name", ["conv2d", "__matmul__"])
def test_products_in_fewer_bits_are_not_real_float32(name, monkeypatch):
    owner = mx.array if name.startswith("_") else mx
    monkeypatch.setattr(owner, name, tf32(getattr(owner, name)))
    assert not real_float32("cpu")


# The command line and the page ------------------------------------------------------------------


def test_the_command(monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    run = CliRunner().invoke
    result = run(main, ["conformance", "--only", "tri", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert [facts["passed"], facts["operations"]] == [True, 1]
    assert facts["backend"].startswith("cpu")
    assert os.environ["MLX_ENABLE_TF32"] == "0"
    result = run(main, ["conformance", "--only", "arange", "--markdown"])
    assert "| arange | 2 | 0 / 0 |" in result.output
    monkeypatch.setitem(
        OPERATIONS, "square", replace(OPERATIONS["square"], ours=lambda x: mx.square(x) + 1)
    )
    result = run(main, ["conformance", "--only", "square"])
    assert result.exit_code == 1
    assert "expected" in result.output
    result = run(main, ["conformance", "--only", "dance"])
    assert result.exit_code == 1
    assert "matches no operation" in result.output


def test_the_command_where_torch_is_not_installed():
    code = (
        "import sys; sys.modules['torch'] = None; import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)\n"
        "from mlx_zoo.cli import main; main(['conformance'])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: MLX's operations are compared with PyTorch's")


def test_the_page_lists_what_the_suite_has():
    page = (ROOT / "CONFORMANCE.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- cpu: .* -->.*<!-- end of cpu -->.*<!-- cuda: .* -->", page, re.DOTALL)
    table = page.partition("<!-- cpu")[2].partition("<!-- end of cpu")[0]
    listed = dict(re.findall(r"^\| (.+?) \| (\d+) \|", table, re.MULTILINE))
    assert listed == {name: str(len(o.cases)) for name, o in OPERATIONS.items()}
    words = " ".join(page.split())
    for known in conformance.DEVIATIONS:
        assert known.why in words
