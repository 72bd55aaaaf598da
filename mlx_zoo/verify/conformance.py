"""Does MLX compute what PyTorch computes? Operation by operation, on any device, with figures.

The same inputs, rounded to a dtype, go through MLX on the device, and through PyTorch on the CPU in
that dtype and in float64, which is the truth. `mlx_zoo.verify.operations` is the table of what is
tried. An error is given in units of the dtype's rounding (2^-23, 2^-10, 2^-7) of what the operation
is measured by, and passes if it is a small multiple of PyTorch's own.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import version
from typing import Any
from zlib import crc32

import mlx.core as mx
import numpy as np

from mlx_zoo.backend.blas import load_fast_blas
from mlx_zoo.backend.precision import real_float32
from mlx_zoo.errors import MissingDependency
from mlx_zoo.verify import operations, reference
from mlx_zoo.verify.device import undisturbed
from mlx_zoo.verify.operations import Case, Operation
from mlx_zoo.verify.report import FACTOR, as_text, plain  # FACTOR: of PyTorch's own error

ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}  # normal number
LARGEST = {"float32": 3.4028235e38, "float16": 65504.0, "bfloat16": 3.3895314e38}
CHANCE = {"float32": 8.0, "float16": 2.0, "bfloat16": 2.0}  # smaller errors are taken for chance
DEVIATIONS_OF_CHANCE = 5.0  # standard deviations that a frequency may be off
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

REFERENCE_BLAS = "cpu, reference BLAS"

# What MLX says where a backend lacks an operation.
NOT_IMPLEMENTED = ("has no CUDA implementation", "NYI", "No implementation for", "not implemented")


@dataclass(frozen=True)
class Deviation:
    """What is known to be otherwise, so that it is shown and does not fail."""

    operation: str
    case: str  # a pattern of the case, "*" for all
    part: str  # "output*" or "gradient*"
    dtypes: tuple[str, ...]
    backend: str  # "cpu", "cuda", "metal"; REFERENCE_BLAS is a "cpu", too
    at_most: float  # units; infinite where the results are not numbers, or are others
    why: str
    since: str  # the version of MLX that it was seen with
    seldom: bool = False  # with some seeds or libraries only: not to see it proves nothing

    def covers(self, outcome: Outcome, backend: str) -> bool:
        return (
            self.operation == outcome.operation
            and fnmatchcase(outcome.case, self.case)
            and fnmatchcase(outcome.part, self.part)
            and outcome.dtype in self.dtypes
            and backend.startswith(self.backend)
        )

    def explains(self, outcome: Outcome, backend: str) -> bool:
        """Whether the outcome is off by no more than is known."""
        error = outcome.error
        return error is not None and error <= self.at_most and self.covers(outcome, backend)


ONE_BY_ONE = "the CPU adds one by one: the error grows with the length of the sum"
OWN_BLAS = "the BLAS of MLX's Linux wheel adds one by one (a fast one is better: mlx-zoo[cpu])"
IN_HALF = "the CPU adds in half precision, where PyTorch adds in float32"


NAN_ROW = "a row that sees nothing is NaN, in PyTorch 0; the networks hide by finfo.min / 2"
NEAR_ZERO = (
    "right to 3e-7, not relatively: near 0 few digits are. GELU multiplies by x, and is right"
)
MEAN_ROW = "a row that sees nothing is the mean of all values, in PyTorch 0; nobody reads such rows"
AS_IF_NOT = "reads transposed weights as if they were not; the package quantises on the CPU"


def on(backend: str) -> Callable[..., Deviation]:
    def row(
        operation: str, case: str, part: str, dtypes: str, at_most: float, why: str, seldom=False
    ) -> Deviation:
        kinds = tuple(dtypes.split())
        return Deviation(operation, case, part, kinds, backend, at_most, why, "0.32.4", seldom)

    return row


on_cpu, on_cuda = on("cpu"), on("cuda")

DEVIATIONS = (
    on_cpu("mean", "*, long", "output", "float32", 250, ONE_BY_ONE),
    on_cpu("mean", "*, two axes", "output", "float32", 250, ONE_BY_ONE),
    on_cpu("mean", "*float16 lacks", "output", "float16", np.inf, IN_HALF + ": it overflows"),
    on_cpu("sum", "*, long", "output", "float32", 250, ONE_BY_ONE),
    on_cpu("sum", "*, two axes", "output", "float32", 250, ONE_BY_ONE),
    *(
        Deviation(name, "*", "*", ("float32",), REFERENCE_BLAS, 200, OWN_BLAS, "0.32.4", True)
        for name in ("matmul", "Linear", "conv2d", "attention")
    ),
    on_cpu("cumsum", "*", "*", "float32", 200, ONE_BY_ONE),
    on_cpu("cumsum", "*, long", "output", "float16 bfloat16", 100, IN_HALF),
    on_cpu("cumsum", "*", "output", "float16 bfloat16", 5, IN_HALF),
    on_cpu("LayerNorm", "*, large*", "*", "float32", 10000, ONE_BY_ONE),
    on_cpu("softmax", "*x1024 *", "*", "float32", 500, ONE_BY_ONE),
    on_cpu("softmax", "*x50257 *", "*", "float32", 2000, ONE_BY_ONE),
    on_cpu("softmax", "*", "output", "float16 bfloat16", 16, IN_HALF),
    on_cpu("attention", "*, sharp", "output", "float16 bfloat16", 25, IN_HALF),
    on_cpu("attention", "*", "output", "float16 bfloat16", 5, IN_HALF, True),
    on_cpu("quantized_matmul", "*", "*", "float32", 200, ONE_BY_ONE),
    on_cpu("quantized_matmul", "*", "output", "float16 bfloat16", 40, IN_HALF),
    on_cpu(
        *("attention", "*hidden by -inf", "output", "float32 float16 bfloat16", np.inf, NAN_ROW),
    ),
    on_cpu(
        *("attention", "*, a row is False", "output", "float32 float16 bfloat16", 1e8, MEAN_ROW),
    ),
    on_cpu("erf", "*spread(*", "output", "float32", 2e7, NEAR_ZERO),
    on_cpu("erf", "*uniform(*", "output", "float32", 1e5, NEAR_ZERO),
    on_cpu(
        *("exp", "*,89.0]", "output", "float32 bfloat16", np.inf),
        "infinite from 88.0 on, where float32 reaches to 88.72",
    ),
    on_cpu(
        *("exp", "*(-120,87)", "output", "float32", 100),
        "right to 30 roundings far below 0",
    ),
    on_cpu(
        *("sigmoid", "*", "output", "float32", 100),
        "1 / (1 + exp(-x)) of an exp that is right to 30 roundings far below 0",
    ),
    on_cpu(
        *("sigmoid", "*spread(-6,1.9)", "output", "float16", 1000),
        "0 below -11.09, where exp(-x) leaves float16: the error is at most 1.6e-5",
    ),
    on_cuda("mean", "*float16 lacks", "output", "float16", np.inf, "the sum overflows float16"),
    on_cuda("quantize", "*, transposed", "output", "float32 float16 bfloat16", np.inf, AS_IF_NOT),
    on_cuda("attention", "*hidden by -inf", "output", "float32", np.inf, NAN_ROW),
    on_cuda("attention", "*, a row is False", "output", "float32", 1e8, MEAN_ROW),
    on_cuda(
        *("attention", "*, GPT-2, a prompt", "gradient of input 3", "float32", 20),
        "a little over four times PyTorch's error",
        True,
    ),
    on_cuda(
        *("sigmoid", "*spread(-6,1.9)", "output", "float16", 1000),
        "0 below -11.09, where exp(-x) leaves float16: the error is at most 1.6e-5",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One result of one case in one dtype. Errors are in units, None where there is no such."""

    operation: str
    case: str
    dtype: str
    part: str  # "output", "gradient of input 1", ...
    verdict: str  # "passed", "FAILED", "known deviation", "not implemented"
    error: float | None = None
    torch_error: float | None = None
    allowed: float = 0.0
    index: tuple[int, ...] = ()  # of the worst element
    expected: float | None = None
    actual: float | None = None
    message: str = ""  # of an exception; of a known deviation why it is

    @property
    def label(self) -> str:
        """What `only` takes to run this case alone."""
        return f"{self.operation}: {self.case}"

    def __str__(self) -> str:
        where = f"{self.label}\n  {self.dtype} {self.part}: "
        if self.error is None:
            return f"{where}{self.message}"
        torch = "" if self.torch_error is None else f"PyTorch {_figure(self.torch_error)}, "
        text = f"{where}error {_figure(self.error)} ({torch}allowed {self.allowed:.3g})"
        if self.expected is not None and self.actual is not None:
            text += (
                f"; element {list(self.index)}: expected {self.expected:.9g}, "
                f"actual {self.actual:.9g}, delta {self.actual - self.expected:.3g}"
            )
        return f"{text}\n  {self.message}" if self.message else text


@dataclass(frozen=True)
class Row:
    """What the results of one operation come to. Worst errors by column: ours and PyTorch's."""

    operation: str
    cases: int
    worst: Mapping[str, tuple[float, float | None]]
    verdict: str
    passed: bool


@dataclass(frozen=True)
class ConformanceReport:
    """Of all operations, or of those that were asked for."""

    outcomes: tuple[Outcome, ...]
    device: str
    backend: str
    seed: int
    only: str | None
    real_float32: bool  # products on the device keep 24 bits
    mended: tuple[Deviation, ...]  # known deviations that were tried and not seen
    versions: Mapping[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        return any(x.error is not None for x in self.outcomes) and not self.failures

    @property
    def failures(self) -> list[Outcome]:
        return [x for x in self.outcomes if x.verdict == "FAILED"]

    @property
    def known(self) -> list[Outcome]:
        return [x for x in self.outcomes if x.verdict == "known deviation"]

    @property
    def missing(self) -> list[Outcome]:
        return [x for x in self.outcomes if x.verdict == "not implemented"]

    @cached_property
    def rows(self) -> list[Row]:
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.operation, []).append(outcome)
        return [_row(name, outcomes) for name, outcomes in found.items()]

    def summary(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "operations": len(self.rows),
            "cases": sum(row.cases for row in self.rows),
            "results": len(self.outcomes),
            "failures": len(self.failures),
            "known_deviations": len(self.known),
            "not_implemented": len(self.missing),
            "mended": [asdict(deviation) for deviation in self.mended],
            "device": self.device,
            "backend": self.backend,
            "real_float32": self.real_float32,
            "seed": self.seed,
            "only": self.only,
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 1),
        }

    def to_json(self) -> str:
        """Everything, as JSON; an infinite or undefined figure is a word."""
        outcomes = [asdict(outcome) for outcome in self.outcomes]
        return json.dumps(plain({**self.summary(), "outcomes": outcomes}, str), indent=2)

    def to_markdown(self) -> str:
        """The tables, as they stand in CONFORMANCE.md."""
        cells = [_cells(row) for row in self.rows]
        lines = ["| " + " | ".join(line) + " |" for line in (HEAD, RULE, *cells)]
        text = [self._setting, "", *lines, "", self._verdict]
        for title, found in self._details:
            text += ["", f"{title}:", "", "```text", *found, "```"]
        return "\n".join(text)

    @property
    def _setting(self) -> str:
        versions = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        real = "" if self.real_float32 else "; float32 is NOT real float32 here"
        return f"{self.device} ({self.backend}), {versions}, seed {self.seed}{real}"

    @property
    def _verdict(self) -> str:
        said = self.summary()
        verdict = "passed" if self.passed else "FAILED"
        counts = (
            f"{said['operations']} operations, {said['cases']} cases, {said['results']} results"
        )
        others = [
            f"{said[name]} {name.replace('_', ' ')}"
            for name in ("failures", "known_deviations", "not_implemented")
            if said[name]
        ]
        return f"{verdict}: {', '.join([counts, *others])}; {self.seconds:.0f} s"

    @property
    def _details(self) -> Iterator[tuple[str, list[str]]]:
        if self.failures:
            yield "Failures", [str(outcome) for outcome in self.failures]
        if self.known:
            yield "Known deviations", [*self._known_deviations]
        if self.missing:
            yield "Not implemented", [str(outcome) for outcome in self.missing]
        if self.mended:
            rows = [f"{d.operation}: {d.case} ({d.part}): {d.why}" for d in self.mended]
            yield "Mended (known deviations that were not seen: delete their rows)", rows

    @property
    def _known_deviations(self) -> Iterator[str]:
        """Each with how often it was seen, and the worst result in full."""
        rest = self.known
        for deviation in DEVIATIONS:
            seen = [x for x in rest if deviation.explains(x, self.backend)]
            rest = [x for x in rest if x not in seen]
            if seen:
                worst = max(seen, key=lambda outcome: outcome.error or 0)
                count = f"{len(seen)} results" if len(seen) > 1 else "1 result"
                yield f"{deviation.operation}: {deviation.why} (since mlx {deviation.since})"
                yield f"  {count}; the worst: {replace(worst, message='')}"

    def __str__(self) -> str:
        return as_text(self, width=120)

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for column, rule in zip(HEAD, RULE, strict=True):
            table.add_column(column, justify="right" if rule.endswith(":") else "left")
        for row in self.rows:
            style = None if row.passed else "bold red"
            table.add_row(*(Text(cell) for cell in _cells(row)), style=style)
        details = [
            Text(line) for title, found in self._details for line in ("", f"{title}:", *found)
        ]
        style = "bold green" if self.passed else "bold red"
        return Group(Text(self._setting), "", table, *details, "", Text(self._verdict, style=style))


COLUMNS = ("float32", "float16", "bfloat16", "gradients")
HEAD = ("operation", "cases", *COLUMNS, "verdict")
RULE = ("---", "---:", *("---:" for _ in COLUMNS), "---")


def run(
    device: str = "cpu",
    only: str | None = None,
    seed: int = 0,
    begin: Callable[[str], None] = lambda operation: None,
) -> ConformanceReport:
    """Try MLX's operations against PyTorch.

    Args:
        device: "cpu", or "gpu" for MLX's default device, which must be one. Where its float32 is
            not real float32 (MLX_ENABLE_TF32 must be 0 before the process's first product) the
            report says so.
        only: a pattern of operations ("conv*"), or of their cases ("conv2d: *depthwise").
        seed: of the inputs.
        begin: called with the name of each operation before it is tried.

    Raises:
        MissingDependency: PyTorch is not installed.
        ValueError: there is no such device or operation.
    """
    if not reference.is_installed("torch"):
        raise MissingDependency(
            "MLX's operations are compared with PyTorch's, which is not installed: "
            'pip install "mlx-zoo[torch]"'
        )
    chosen = [
        (operation, case)
        for operation in operations.OPERATIONS.values()
        for case in operation.cases
        if _is_asked_for(only, operation, case)
    ]
    if not chosen:
        names = ", ".join(operations.OPERATIONS)
        raise ValueError(f"only={only!r} matches no operation and no case; there are {names}")
    backend = _backend(device)
    start = time.perf_counter()
    with undisturbed(device), mx.stream(mx.cpu if device == "cpu" else mx.default_device()):
        is_real = real_float32(device)
        outcomes: list[Outcome] = []
        for operation, case in chosen:
            begin(operation.name)
            outcomes += _try(operation, case, seed)
    judged = [_known(outcome, backend) for outcome in outcomes]
    return ConformanceReport(
        outcomes=tuple(judged),
        device=_device_name(device),
        backend=backend,
        seed=seed,
        only=only,
        real_float32=is_real,
        mended=tuple(_mended(judged, backend)) if only is None else (),
        versions={
            **{name: version(name) for name in ("mlx", "torch", "numpy")},
            "python": platform.python_version(),
            **({"BLAS": load_fast_blas().name} if device == "cpu" else {}),
        },
        seconds=time.perf_counter() - start,
    )


def _is_asked_for(only: str | None, operation: Operation, case: Case) -> bool:
    names = (operation.name, f"{operation.name}: {case}")
    return only is None or only in names or any(fnmatchcase(name, only) for name in names)


def _backend(device: str) -> str:
    if device == "cpu":
        return REFERENCE_BLAS if load_fast_blas().name.startswith("reference") else "cpu"
    if device != "gpu":
        raise ValueError(f"device={device!r}: 'cpu' or 'gpu' is needed")
    if mx.default_device().type != mx.gpu:
        raise ValueError(
            f"device='gpu': MLX computes on {mx.default_device()} here; it needs a Mac, or Linux "
            'with CUDA and pip install "mlx-zoo[cuda]"'
        )
    return "cuda" if mx.cuda.is_available() else "metal"


def _device_name(device: str) -> str:
    found = mx.device_info(mx.cpu if device == "cpu" else mx.default_device())
    return str(found.get("device_name", device))


# One case ---------------------------------------------------------------------------------------


def draw(operation: Operation, case: Case, seed: int, dtype: str) -> list[np.ndarray]:
    """The inputs of a case: floats rounded to `dtype`, as float32, and integers."""
    rng = np.random.default_rng([seed, crc32(f"{operation.name}: {case}".encode())])
    return [_rounded(draw(rng), dtype) for draw in case.inputs]


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    if x.dtype.kind != "f":
        return x
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    return _numpy(mx.array(x).astype(DTYPES[dtype], stream=mx.cpu)).astype(np.float32)


def _numpy(x: mx.array) -> np.ndarray:
    """In float64 where it is of floats: NumPy has no bfloat16."""
    if mx.issubdtype(x.dtype, mx.floating):
        return np.array(x.astype(mx.float32, stream=mx.cpu)).astype(np.float64)
    return np.array(x)


def _seen_as(x: mx.array, view: str) -> mx.array:
    """The same values, in another order in memory. What lies between them is NaN."""
    if not view or not mx.issubdtype(x.dtype, mx.floating) or x.ndim == 0:
        return x
    values = np.array(x.astype(mx.float32))
    last = (*[slice(None)] * (x.ndim - 1), slice(None, None, 2))
    if view == "transposed":
        if x.ndim == 1:
            return x
        turned = np.ascontiguousarray(values.swapaxes(-1, -2))  # MLX would keep NumPy's order
        return mx.array(turned).astype(x.dtype).swapaxes(-1, -2)
    if view == "every other":
        wider = np.repeat(values, 2, axis=-1)
        wider[..., 1::2] = np.nan
        return mx.array(wider).astype(x.dtype)[last]
    if view == "reversed":
        return mx.array(values[..., ::-1].copy()).astype(x.dtype)[..., ::-1]
    wider = np.pad(values, 1, constant_values=np.nan)
    return mx.array(wider).astype(x.dtype)[(slice(1, -1),) * x.ndim]


def _try(operation: Operation, case: Case, seed: int) -> Iterator[Outcome]:
    """The outcomes of a case in each of its dtypes. What it raises is an outcome, too."""
    dtypes = case.dtypes or operation.dtypes
    if not any(x.dtype is None for x in case.inputs):  # integers alone
        dtypes = dtypes[:1]
    for dtype in dtypes:
        for part, compare in {"output": _outputs, "gradients": _gradients}.items():
            try:
                yield from compare(operation, case, seed, dtype)
            except Exception as error:
                missing = any(words in str(error) for words in NOT_IMPLEMENTED)
                verdict = "not implemented" if missing else "FAILED"
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                yield Outcome(operation.name, str(case), dtype, part, verdict, message=message)


def _outputs(operation: Operation, case: Case, seed: int, dtype: str) -> Iterator[Outcome]:
    arrays, parameters = draw(operation, case, seed, dtype), dict(case.parameters)
    found = _tuple(operation.ours(*_given(case, arrays, dtype), **parameters))
    truth, _ = reference.operate(operation.name, arrays, parameters, "float64")
    same = _in_dtype(operation, arrays, parameters, dtype)[0] or [None] * len(truth)
    units = _units(operation, case, arrays, truth, dtype)
    for i, (x, t, s, unit) in enumerate(zip(found, truth, same, units, strict=True)):
        part = "output" if len(truth) == 1 else f"output {i + 1}"
        yield _judge(operation, case, dtype, part, _numpy(x), t, s, unit)


def _gradients(operation: Operation, case: Case, seed: int, dtype: str) -> Iterator[Outcome]:
    """In float32 alone: where rounding is coarse, they say little that outputs do not."""
    wanted = [i for i, x in enumerate(case.inputs) if x.dtype is None and not x.constant]
    if dtype != "float32" or not (wanted and operation.gradients and case.gradients):
        return
    arrays, parameters = draw(operation, case, seed, dtype), dict(case.parameters)
    inputs = _given(case, arrays, dtype)

    def function(*primals: mx.array) -> tuple[mx.array, ...]:
        every = list(inputs)
        for i, x in zip(wanted, primals, strict=True):
            every[i] = x
        return _tuple(operation.ours(*every, **parameters))

    outputs, _ = reference.operate(operation.name, arrays, parameters, "float64")
    rng = np.random.default_rng([seed, 1])
    cotangents = [rng.standard_normal(t.shape).astype(np.float32) for t in outputs]
    _, found = mx.vjp(function, [inputs[i] for i in wanted], [mx.array(c) for c in cotangents])
    how = (cotangents, wanted)
    _, truth = reference.operate(operation.name, arrays, parameters, "float64", *how)
    same = _in_dtype(operation, arrays, parameters, dtype, *how)[1] or [None] * len(truth)
    for i, x, t, s in zip(wanted, found, truth, same, strict=True):
        unit = ROUNDING[dtype] * _largest(t)
        yield _judge(operation, case, dtype, f"gradient of input {i + 1}", _numpy(x), t, s, unit)


def _given(case: Case, arrays: list[np.ndarray], dtype: str) -> list[mx.array]:
    """The inputs as MLX's arrays."""
    return [
        _seen_as(mx.array(x).astype(DTYPES[dtype]), case.view)
        if x.dtype.kind == "f"
        else mx.array(x)
        for x in arrays
    ]


def _in_dtype(operation: Operation, arrays, parameters, dtype: str, *how: Any):
    """What PyTorch gives in the same dtype; nothing where it lacks that on the CPU."""
    try:
        return reference.operate(operation.name, arrays, parameters, dtype, *how)
    except (RuntimeError, NotImplementedError):
        return None, None


def _tuple(x: Any) -> tuple[mx.array, ...]:
    return x if isinstance(x, tuple) else (x,)


def _largest(x: np.ndarray) -> float:
    finite = np.abs(x[np.isfinite(x)]).astype(np.float64)
    return float(finite.max(initial=0)) or 1.0


def _units(
    operation: Operation, case: Case, arrays: list[np.ndarray], truth: list, dtype: str
) -> list[Any]:
    """What errors of the outputs are counted in."""
    rounding, smallest = ROUNDING[dtype], SMALLEST[dtype]
    match operation.measure:
        case operations.EXACT:
            return [1.0] * len(truth)
        case operations.CHANCE:
            draws = dict(case.parameters)["draws"]
            return [np.sqrt(np.maximum(p * (1 - p), 1e-12) / draws) for p in truth]
        case operations.STEP:
            how = dict(case.parameters)
            groups = arrays[0].reshape(*arrays[0].shape[:-1], -1, how["group_size"])
            steps = np.ptp(groups, axis=-1) / (2 ** how["bits"] - 1)
            return [np.repeat(steps, how["group_size"], axis=-1) + rounding * _largest(truth[0])]
        case operations.EACH:
            # Where exponents reach to -126, smaller numbers may be flushed to 0.
            flushed = smallest / rounding if dtype != "float16" else 0.0
            sizes = [np.where(np.abs(t) < smallest, flushed, np.abs(t)) for t in truth]
        case operations.ROUNDED:
            sizes = [np.abs(t) for t in truth]
        case operations.INPUT:
            sizes = [np.maximum(np.abs(t), np.abs(arrays[0])) for t in truth]
        case operations.TERMS:
            magnitudes = [np.abs(x) if x.dtype.kind == "f" else x for x in arrays]
            terms, _ = reference.operate(
                operation.name, magnitudes, dict(case.parameters), "float64"
            )
            sizes = [np.full(t.shape, _largest(x)) for t, x in zip(truth, terms, strict=True)]
        case _:
            sizes = [np.full(t.shape, _largest(t)) for t in truth]
    return [rounding * np.maximum(np.nan_to_num(x, posinf=1, nan=1), smallest) for x in sizes]


def _judge(operation, case, dtype, part, ours, truth, same, unit) -> Outcome:
    """`ours` and what PyTorch gives in the `same` dtype, against the truth in float64."""
    label = (operation.name, str(case), dtype, part)
    if ours.shape != truth.shape:
        message = f"the result has shape {ours.shape}, PyTorch's {truth.shape}"
        return Outcome(*label, "FAILED", message=message)
    errors = _errors(ours, truth, unit, dtype)
    error = float(errors.max(initial=0))
    measure = operation.measure if part.startswith("output") else operations.LARGEST
    torch_error = None
    if same is not None and measure not in (operations.CHANCE, operations.STEP):
        torch_error = float(_errors(same, truth, unit, dtype).max(initial=0))
    allowed = {
        operations.EXACT: 0.0,
        operations.ROUNDED: 0.500001,
        operations.CHANCE: DEVIATIONS_OF_CHANCE,
        operations.STEP: 1.0,
    }.get(measure, max(CHANCE[dtype], FACTOR * _finite(torch_error)))
    index = np.unravel_index(int(errors.argmax()), errors.shape) if errors.size else ()
    return Outcome(
        *label,
        "passed" if error <= allowed else "FAILED",
        error,
        torch_error,
        allowed,
        tuple(map(int, index)),
        float(truth[index]) if errors.size else None,
        float(ours[index]) if errors.size else None,
    )


def _finite(error: float | None) -> float:
    return error if error is not None and np.isfinite(error) else 0.0


def _errors(x: np.ndarray, truth: np.ndarray, unit: Any, dtype: str) -> np.ndarray:
    """In units; infinite where one is a number and the other is not."""
    if truth.dtype.kind != "f":
        return np.abs(x.astype(np.float64) - truth) / unit
    x, truth = x.astype(np.float64), truth.astype(np.float64)
    largest = LARGEST[dtype]
    rounded = np.where(np.abs(truth) > largest * (1 + ROUNDING[dtype] / 4), np.inf, 1)
    truth = np.where(np.isfinite(truth), truth * np.where(truth == 0, 1, rounded), truth)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(x - truth) / unit
    same = (np.isnan(x) & np.isnan(truth)) | (x == truth)
    edge = np.abs(truth) > largest * (1 - 4 * ROUNDING[dtype])  # may round to either
    errors = np.where(same | (edge & np.isinf(x) & (np.sign(x) == np.sign(truth))), 0.0, errors)
    return np.where(np.isnan(errors), np.inf, errors)


# All of them ------------------------------------------------------------------------------------


def _known(outcome: Outcome, backend: str) -> Outcome:
    if outcome.verdict != "FAILED":
        return outcome
    for deviation in DEVIATIONS:
        if deviation.explains(outcome, backend):
            return replace(outcome, verdict="known deviation", message=deviation.why)
    return outcome


def _mended(outcomes: list[Outcome], backend: str) -> Iterator[Deviation]:
    for deviation in DEVIATIONS:
        tried = [outcome for outcome in outcomes if deviation.covers(outcome, backend)]
        seen = any(outcome.verdict != "passed" for outcome in tried)
        if tried and not seen and not deviation.seldom:
            yield deviation


def _row(name: str, outcomes: list[Outcome]) -> Row:
    worst: dict[str, tuple[float, float | None]] = {}
    for outcome in outcomes:
        column = "gradients" if outcome.part.startswith("gradient") else outcome.dtype
        if outcome.error is not None and outcome.error >= worst.get(column, (-1.0, None))[0]:
            worst[column] = outcome.error, outcome.torch_error
    counts = Counter(outcome.verdict for outcome in outcomes)
    passed = counts.pop("passed", 0)
    said = [
        f"{count} {verdict}{'s' * (count > 1 and verdict == 'known deviation')}"
        for verdict, count in counts.items()
    ]
    if passed and said:
        said.insert(0, f"{passed} passed")
    cases = len({outcome.case for outcome in outcomes})
    return Row(name, cases, worst, ", ".join(said) or "passed", not counts["FAILED"])


def _cells(row: Row) -> list[str]:
    return [row.operation, str(row.cases), *(_pair(row.worst.get(x)) for x in COLUMNS), row.verdict]


def _pair(worst: tuple[float, float | None] | None) -> str:
    if worst is None:
        return ""
    ours, torch = worst
    return f"{_figure(ours)} / {'-' if torch is None else _figure(torch)}"


def _figure(error: float) -> str:
    if not np.isfinite(error):
        return "not a number"
    return f"{error:.2g}" if error < 1000 else f"{error:.0e}"
