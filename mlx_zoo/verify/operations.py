"""MLX's operations that the networks use, each with the inputs it is tried on: a table.

A row is an operation: a function of arrays and parameters, and its cases. PyTorch's function of the
same name is in `mlx_zoo.verify.reference`, `mlx_zoo.verify.conformance` compares the two. Layouts
are MLX's: images (B, H, W, C), weights of convolutions (O, H, W, I).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo.backend import ops
from mlx_zoo.models import layers, resnet, vit

FLOATS = ("float32", "float16", "bfloat16")


# Inputs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """An input: its shape, and which numbers are in it."""

    shape: tuple[int, ...]
    kind: str = "normal"  # or "uniform", "spread", "integers", "distinct", "mask", "given"
    low: float = 0.0  # of "normal" the mean
    high: float = 1.0  # of "normal" the deviation
    values: tuple[float, ...] = ()  # of "given": the flat array
    dtype: str | None = None  # None: that of the case
    constant: bool = False  # no gradient of it is asked for

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """The array, in float64, or of its own dtype."""
        low, high, shape = self.low, self.high, self.shape
        x: np.ndarray
        match self.kind:
            case "normal":
                x = low + high * rng.standard_normal(shape)
            case "uniform":
                x = rng.uniform(low, high, shape)
            case "spread":  # both signs, all magnitudes from 10^low to 10^high
                x = rng.choice((-1.0, 1.0), shape) * 10 ** rng.uniform(low, high, shape)
            case "integers":
                x = rng.integers(int(low), int(high), shape)
            case "distinct":  # along the last axis, in any order
                x = rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1)
            case "mask":  # `high` of it True, and never a whole row False
                x = rng.random(shape) < high
                x[..., 0] = True
            case _:
                x = np.array(self.values, np.float64).reshape(shape)
        return x.astype(self.dtype or np.float64)

    def __str__(self) -> str:
        numbers = f"({self.low:.10g},{self.high:.10g})"
        said = {
            "normal": "" if (self.low, self.high) == (0, 1) else f"normal{numbers}",
            "given": str([*self.values]).replace(" ", "") if len(self.values) < 5 else "given",
            "mask": f"mask({self.high:g})",
            "distinct": "distinct",
        }
        shape = "x".join(map(str, self.shape))
        if self.dtype not in (None, "int32", "bool"):
            shape = f"{shape} {self.dtype}"
        return f"{shape} {said.get(self.kind, self.kind + numbers)}".strip()


def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Draw:
    return Draw(shape, "normal", mean, std)


def uniform(low: float, high: float, *shape: int) -> Draw:
    return Draw(shape, "uniform", low, high)


def spread(low: float, high: float, *shape: int) -> Draw:
    return Draw(shape, "spread", low, high)


def integers(low: int, high: int, *shape: int, dtype: str = "int32") -> Draw:
    return Draw(shape, "integers", low, high, dtype=dtype)


def distinct(*shape: int, dtype: str | None = None) -> Draw:
    return Draw(shape, "distinct", dtype=dtype)


def mask(part: float, *shape: int) -> Draw:
    return Draw(shape, "mask", 0, part, dtype="bool")


def given(values: Iterable[float], *shape: int, dtype: str | None = None) -> Draw:
    values = tuple(values)
    return Draw(shape or (len(values),), "given", values=values, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One set of inputs and parameters."""

    inputs: tuple[Draw, ...]
    parameters: tuple[tuple[str, Any], ...] = ()
    view: str = ""  # what ours are in memory: "transposed", "every other", "reversed", "inside"
    note: str = ""
    dtypes: tuple[str, ...] = ()  # instead of the operation's
    gradients: bool = True

    def __str__(self) -> str:
        said = [f"{name}={value}".replace(" ", "") for name, value in self.parameters]
        shown = [str(x) for x in self.inputs] + said
        return ", ".join([*shown, *filter(None, (self.view, self.note))])


def case(*inputs: Draw, view="", note="", dtypes=(), gradients=True, **parameters: Any) -> Case:
    return Case(inputs, tuple(parameters.items()), view, note, dtypes, gradients)


def viewed(case: Case) -> list[Case]:
    """The case itself, and with inputs that lie in memory in other orders."""
    ways = ("", "transposed", "every other", "reversed", "inside")
    return [replace(case, view=view) for view in ways]


# What an error is measured by: it is a multiple of the dtype's rounding of this.
LARGEST = "largest"  # the largest magnitude of the result
EACH = "each"  # each element's own magnitude
ROUNDED = "rounded"  # the same, and only the last rounding is allowed
INPUT = "input"  # that of the element or of the input there, whichever is larger
TERMS = "terms"  # the same operation on magnitudes: what the terms of a sum add up to
EXACT = "exact"  # no error is allowed
CHANCE = "chance"  # the standard deviation of a frequency among `draws`
STEP = "step"  # between two codes of a quantised group


@dataclass(frozen=True)
class Operation:
    name: str
    ours: Callable[..., Any]  # arrays and parameters -> an array or a tuple of them
    cases: tuple[Case, ...]
    measure: str = LARGEST
    dtypes: tuple[str, ...] = FLOATS
    gradients: bool = True  # whether it has any


OPERATIONS: dict[str, Operation] = {}
name: str
function: Callable[..., Any]


def row(name: str, ours: Callable, *cases: Case, measure: str = LARGEST, **how: Any) -> None:
    smooth = measure in (LARGEST, EACH, ROUNDED, INPUT, TERMS)
    how = {"gradients": smooth, **how}
    assert name not in OPERATIONS
    OPERATIONS[name] = Operation(name, ours, cases, measure, **how)


# Convolutions -----------------------------------------------------------------------------------


def filled(layer: nn.Module, **tensors: mx.array | None) -> nn.Module:
    """A layer with these tensors, in eval mode."""
    for name, x in tensors.items():
        if x is not None:
            layer[name] = x
    return layer.eval()


def conv(
    B: int, size: tuple[int, ...], kernel: int | tuple[int, ...], wide: str, **how: Any
) -> Case:
    """A convolution from I to O channels, `wide` "I>O". Weights keep the results of order one."""
    ins, outs = map(int, wide.split(">"))
    kernel = (kernel,) * len(size) if isinstance(kernel, int) else kernel
    fan_in = math.prod(kernel) * ins // how.get("groups", 1)
    return case(
        normal(B, *size, ins),
        normal(outs, *kernel, ins // how.get("groups", 1), std=fan_in**-0.5),
        **how,
    )


CONV2D = (
    conv(2, (8, 8), 3, "16>24", padding=1),
    conv(1, (7, 7), 3, "5>3", padding=1),
    conv(3, (9, 7), 3, "13>17", stride=2, padding=1),
    conv(2, (32, 32), 7, "3>16", stride=2, padding=3, note="ResNet's stem"),
    conv(1, (33, 31), 7, "1>8", stride=2, padding=3),
    conv(2, (17, 17), 3, "3>8", stride=2, padding=0),
    conv(2, (9, 9), 1, "32>64"),
    conv(1, (1, 1), 1, "64>4", note="squeeze-excite"),
    conv(2, (9, 9), 1, "16>40", stride=2, note="shortcut"),
    conv(2, (14, 14), 3, "32>32", padding=1, groups=8, note="ResNeXt"),
    conv(2, (15, 13), 3, "24>24", stride=2, padding=1, groups=4),
    conv(1, (8, 8), 3, "12>18", padding=1, groups=6),
    conv(2, (14, 14), 3, "20>20", padding=1, groups=20, note="depthwise"),
    conv(2, (15, 13), 3, "20>20", stride=2, padding=1, groups=20, note="depthwise"),
    conv(2, (14, 14), 5, "24>24", stride=2, padding=2, groups=24, note="depthwise"),
    conv(1, (7, 7), 5, "33>33", padding=2, groups=33, note="depthwise"),
    conv(1, (4, 4), 7, "6>6", padding=3, groups=6, note="depthwise"),
    conv(1, (8, 8), 3, "6>12", padding=1, groups=6, note="depthwise, twice as many"),
    conv(2, (32, 32), 16, "3>24", stride=16, note="ViT's patches"),
    conv(1, (42, 28), 14, "3>19", stride=14, note="ViT's patches"),
    conv(1, (12, 12), 11, "4>8", padding=5),
    conv(1, (13, 13), 3, "8>8", padding=2, dilation=2),
    conv(2, (14, 14), 3, "8>8", stride=2, padding=3, dilation=3),
    conv(1, (12, 12), 3, "8>8", padding=2, dilation=2, groups=8, note="depthwise"),
    conv(1, (9, 11), (1, 5), "6>10", padding=(0, 2)),
    conv(1, (9, 11), (3, 2), "6>10", stride=(2, 1), padding=(1, 0)),
    conv(1, (5, 5), 5, "8>8", note="one pixel comes out"),
    conv(1, (7, 7), 3, "512>32", padding=1, note="long sums"),
    conv(1, (3, 3), 3, "256>256", stride=2, padding=1),
    conv(2, (112, 112), 7, "3>64", stride=2, padding=3, note="large"),
    conv(4, (28, 28), 3, "64>64", padding=1, note="large"),
    conv(8, (14, 14), 1, "256>512", note="large"),
    conv(4, (28, 28), 3, "128>128", stride=2, padding=1, groups=32, note="large"),
    conv(4, (28, 28), 5, "96>96", stride=2, padding=2, groups=96, note="large, depthwise"),
    conv(2, (112, 112), 16, "3>192", stride=16, note="large"),
    *viewed(conv(2, (8, 8), 3, "8>8", padding=1))[1:],
    *viewed(conv(2, (8, 8), 3, "8>8", padding=1, groups=8, stride=2))[1:],
)

row(
    "conv1d",
    mx.conv1d,
    conv(2, (16,), 3, "8>12", padding=1),
    conv(1, (31,), 5, "7>9", stride=2, padding=2),
    conv(2, (20,), 3, "12>12", padding=1, groups=12),
    conv(2, (21,), 3, "12>24", stride=2, padding=1, groups=4),
    conv(1, (20,), 3, "4>4", padding=4, dilation=4),
)
row("conv2d", mx.conv2d, *CONV2D)


def conv2d(x, w, b=None, *, stride=1, padding=0, groups=1):
    outs, *kernel, ins = w.shape
    kernel = tuple(kernel)
    layer = nn.Conv2d(ins * groups, outs, kernel, stride, padding, groups=groups)
    return filled(layer, weight=w, bias=mx.zeros(outs, w.dtype) if b is None else b)(x)


row(
    "Conv2d",
    conv2d,
    case(normal(2, 8, 8, 6), normal(10, 3, 3, 6, std=0.1), normal(10), padding=1),
    case(normal(1, 9, 9, 8), normal(8, 3, 3, 2, std=0.2), normal(8), padding=1, groups=4),
    case(normal(1, 16, 16, 3), normal(12, 8, 8, 3, std=0.1), normal(12), stride=8),
    case(normal(2, 1, 1, 64), normal(4, 1, 1, 64, std=0.1), normal(4)),
)
row(
    "conv_transpose1d",
    mx.conv_transpose1d,
    conv(2, (9,), 3, "6>8", stride=2, padding=1),
    conv(1, (8,), 4, "5>7", stride=3),
)
row(
    "conv_transpose2d",
    mx.conv_transpose2d,
    conv(2, (6, 6), 3, "8>5", padding=1),
    conv(2, (6, 5), 3, "8>6", stride=2, padding=1),
    conv(1, (7, 7), 2, "6>4", stride=2),
    conv(1, (5, 5), 4, "3>8", stride=3, padding=1),
)

# Pooling ----------------------------------------------------------------------------------------


def ties(*shape: int) -> Draw:
    """Half of the values are 0, as after a ReLU."""
    x = np.random.default_rng(0).standard_normal(shape)
    return given(np.maximum(x, 0).ravel().tolist(), *shape)


POOL = {"kernel_size": 3, "stride": 2, "padding": 1}
row(
    "MaxPool2d",
    lambda x, **how: nn.MaxPool2d(**how)(x),
    case(normal(2, 16, 16, 8), **POOL),
    case(normal(1, 15, 13, 5), **POOL),
    case(normal(2, 9, 9, 8), kernel_size=3, stride=1, padding=1),
    case(normal(1, 8, 8, 3), kernel_size=2, stride=2),
    case(normal(1, 9, 9, 4, mean=-50), **POOL, note="all below 0"),
    case(ties(1, 8, 8, 4), **POOL, note="ties"),
    case(given([-math.inf] * 25, 1, 5, 5, 1), **POOL, gradients=False, note="-inf"),
    case(
        given([math.nan, *range(24)], 1, 5, 5, 1), **POOL, gradients=False, note="NaN in a corner"
    ),
    *viewed(case(normal(2, 8, 8, 4), **POOL))[1:],
    measure=ROUNDED,
)
row(
    "AvgPool2d",
    lambda x, **how: nn.AvgPool2d(**how)(x),
    case(normal(2, 16, 16, 8), kernel_size=2, stride=2),
    case(normal(1, 9, 7, 5), kernel_size=2, stride=2),
    case(normal(1, 14, 14, 3, mean=100), kernel_size=7, stride=7),
    case(normal(1, 9, 9, 3), kernel_size=3, stride=2, padding=1),
)
row(
    "mean of odd edges",
    lambda x: resnet.AveragePool()(x),
    case(normal(2, 8, 8, 8)),
    case(normal(1, 9, 8, 3)),
    case(normal(1, 7, 7, 5)),
    case(normal(1, 1, 1, 4)),
)

# Normalisation ----------------------------------------------------------------------------------


def batch_norm(x, mean, var, w, b, *, eps):
    layer = layers.BatchNorm(x.shape[-1], eps)
    return filled(layer, weight=w, bias=b, running_mean=mean, running_var=var)(x)


def batch_norm_training(x, mean, var, w, b, *, eps, momentum):
    layer = layers.BatchNorm(x.shape[-1], eps, momentum)
    filled(layer, weight=w, bias=b, running_mean=mean, running_var=var).train()
    y = layer(x)
    return y, mx.stop_gradient(layer.running_mean), mx.stop_gradient(layer.running_var)


def layer_norm(x, w, b, *, eps):
    return filled(layers.LayerNorm(x.shape[-1], eps), weight=w, bias=b)(x)


def group_norm(x, w, b, *, groups, eps):
    layer = layers.GroupNorm(groups, x.shape[-1], eps)
    return filled(layer, weight=w, bias=b)(x)


def scaled(C: int) -> tuple[Draw, Draw]:
    """Weight and bias."""
    return normal(C, mean=1, std=0.5), normal(C)


def stats(C: int, mean: float = 0.0, low: float = 0.5, high: float = 2.0) -> tuple[Draw, ...]:
    """Running mean and variance, weight and bias."""
    running = (normal(C, mean=mean), uniform(low, high, C))
    return *(replace(x, constant=True) for x in running), *scaled(C)


row(
    "BatchNorm",
    batch_norm,
    case(normal(2, 7, 7, 16), *stats(16), eps=1e-5),
    case(normal(1, 5, 3, 13), *stats(13), eps=1e-3),
    case(normal(2, 4, 4, 8, std=0.01), *stats(8, low=1e-6, high=1e-4), eps=1e-5, note="tiny var"),
    case(normal(2, 4, 4, 8, mean=50), *stats(8, mean=50), eps=1e-5, note="large mean"),
    case(normal(32, 24), *stats(24), eps=1e-5),
)
row(
    "BatchNorm in training",
    batch_norm_training,
    case(normal(4, 7, 7, 16), *stats(16), eps=1e-5, momentum=0.1),
    case(normal(3, 3, 5, 13), *stats(13), eps=1e-3, momentum=0.01),
    case(normal(2, 1, 2, 8), *stats(8), eps=1e-5, momentum=0.1, note="4 values a channel"),
    case(normal(4, 56, 56, 4, mean=30), *stats(4), eps=1e-5, momentum=0.1, note="large mean"),
    case(uniform(0, 1, 4, 112, 112, 2), *stats(2), eps=1e-5, momentum=0.1, note="many pixels"),
    case(normal(4, 8, 8, 4, std=1e-3), *stats(4), eps=1e-5, momentum=0.1, note="tiny var"),
)


row(
    "LayerNorm",
    layer_norm,
    case(normal(2, 5, 64), *scaled(64), eps=1e-5),
    case(normal(2, 3, 768), *scaled(768), eps=1e-12, note="BERT"),
    case(normal(2, 3, 192), *scaled(192), eps=1e-6, note="ViT"),
    case(normal(2, 3, 1600), *scaled(1600), eps=1e-5),
    case(normal(512, 768), *scaled(768), eps=1e-6, note="many rows"),
    case(normal(3, 4, 37), *scaled(37), eps=1e-3),
    case(normal(4, 1), *scaled(1), eps=1e-5, gradients=False, note="one value"),
    case(normal(4, 64, std=1e-4), *scaled(64), eps=1e-12, note="tiny var"),
    case(normal(4, 64, std=1e-3), *scaled(64), eps=1e-5, note="var below eps"),
    case(normal(4, 768, mean=30), *scaled(768), eps=1e-6, note="large mean"),
    case(normal(4, 768, mean=1000), *scaled(768), eps=1e-6, dtypes=("float32",), note="larger"),
    case(given([3.0] * 64, 2, 32), *scaled(32), eps=1e-5, gradients=False, note="constant rows"),
    *viewed(case(normal(2, 5, 48), *scaled(48), eps=1e-5))[1:],
)
row(
    "GroupNorm",
    group_norm,
    case(normal(2, 7, 7, 64), *scaled(64), groups=32, eps=1e-5),
    case(normal(1, 5, 3, 96), *scaled(96), groups=32, eps=1e-5),
    case(normal(2, 14, 14, 32, mean=20), *scaled(32), groups=32, eps=1e-5, note="large mean"),
    case(normal(2, 4, 4, 24, std=1e-3), *scaled(24), groups=4, eps=1e-5, note="tiny var"),
)
row(
    "linalg.norm",
    lambda x: mx.linalg.norm(x, axis=-1, keepdims=True),
    case(normal(4, 384)),
    case(normal(4, 384, std=1e-8)),
    case(normal(3, 1)),
    case(normal(2, 1000, std=1e12), dtypes=("float32",)),
    dtypes=("float32",),  # the networks take it in no other
)

# Functions of one number ------------------------------------------------------------------------

WIDE = case(spread(-6, 1.9, 4000), gradients=False)  # to +-80: exp leaves float32 at 88
BELOW_11 = case(uniform(-11, 11, 4000), gradients=False)  # exp leaves float16 at 11
NEAR = case(uniform(-6, 6, 3000))
SMALL = case(spread(-20, -3, 1000), dtypes=("float32", "bfloat16"), gradients=False)
ENDS = case(
    given([0.0, -0.0, math.inf, -math.inf, math.nan, 1e4, -1e4, 300, -300]), gradients=False
)
BEYOND = case(uniform(-120, 120, 500), dtypes=("float32", "bfloat16"), gradients=False)

for name, function in {"erf": mx.erf, "tanh": mx.tanh, "sigmoid": mx.sigmoid}.items():
    row(name, function, WIDE, NEAR, SMALL, BEYOND, ENDS, measure=EACH)
row(
    "exp",
    mx.exp,
    *(BELOW_11, NEAR, SMALL, ENDS),
    case(uniform(-120, 87, 500), dtypes=("float32", "bfloat16"), gradients=False),
    case(given([88.25, 88.5, 89.0]), dtypes=("float32", "bfloat16"), gradients=False),
    measure=EACH,
)
row(
    "sqrt",
    mx.sqrt,
    case(uniform(1e-3, 100, 1000)),
    case(given([0.0, 1e-4, math.inf, math.nan, -1.0]), gradients=False),
    measure=EACH,
)
row(
    "logaddexp",
    mx.logaddexp,
    case(uniform(-20, 20, 1000), uniform(-20, 20, 1000)),
    case(uniform(-20, 20, 100), given([0.0])),
    case(
        given([math.inf, -math.inf, math.nan, 1e4, -1e4, 0.0]),
        given([0.0, -math.inf, 0.0, 1e4, 0.0, 0.0]),
        gradients=False,
    ),
    measure=INPUT,
)
for name in (
    *("gelu", "gelu_tanh", "quick_gelu", "gelu_10", "relu", "relu2", "relu6", "leaky_relu"),
    *("silu", "mish", "hardswish", "laplace", "sqrtsoftplus"),
):
    function = layers.gelu_tanh if name == "gelu_tanh" else layers.ACTIVATIONS[name]
    moderate = case(spread(-6, 1.5, 2000), gradients=False)  # a square or cube fits float16
    measure = LARGEST if name == "laplace" else INPUT  # it is not about the input
    row(name, function, moderate, NEAR, ENDS, measure=measure)

# Softmax and attention --------------------------------------------------------------------------

LOWEST = float(np.finfo(np.float32).min)


def softmax(x, mask=None, *, axis=-1):
    return mx.softmax(x if mask is None else x + mask, axis=axis)


def hides(value: float, *shape: int, whole_row: bool = False) -> Draw:
    """An additive mask: 0 or `value`, by turns; in the first row `value` alone, if asked."""
    x = np.where(np.arange(math.prod(shape)) % 3 == 1, value, 0.0).reshape(shape)
    if whole_row:
        x[..., 0, :] = value
    return given(x.ravel().tolist(), *shape)


row(
    "softmax",
    softmax,
    case(normal(4, 10)),
    case(normal(2, 3, 197)),
    case(normal(2, 12, 197, 197), note="large"),
    case(normal(2, 3, 1024, std=5)),
    case(normal(2, 50257, std=3), dtypes=("float32",)),
    case(normal(3, 1)),
    case(normal(4, 5, 6), axis=1),
    case(normal(4, 30, mean=1e4, std=1e3), gradients=False, note="large"),
    case(uniform(-1e4, 1e4, 4, 30), gradients=False),
    case(normal(4, 12), hides(-math.inf, 4, 12), gradients=False, note="-inf"),
    case(normal(4, 12), hides(-30000.0, 4, 12), note="half of float16's lowest"),
    case(normal(4, 12), hides(-math.inf, 4, 12, whole_row=True), gradients=False, note="all -inf"),
    *viewed(case(normal(4, 33)))[1:],
)
row(  # What the weights are is nobody's business, but they are to be some, and to sum to 1.
    "softmax of hidden rows",
    lambda x, mask: mx.softmax(x + mask, axis=-1).sum(axis=-1),
    case(normal(4, 12), hides(-32752.0, 4, 12, whole_row=True), note="float16's lowest / 2"),
    case(
        normal(4, 12),
        hides(LOWEST / 2, 4, 12, whole_row=True),
        dtypes=("float32", "bfloat16"),
        note="finfo.min / 2",
    ),
    gradients=False,
)
row(
    "logsumexp",
    lambda x: mx.logsumexp(x, axis=-1),
    case(normal(4, 50)),
    case(normal(3, 1000, mean=-300, std=20)),
    case(given([-math.inf] * 8, 2, 4), gradients=False, note="all -inf"),
    case(given([math.inf, 0.0, math.nan, 0.0], 2, 2), gradients=False),
)


def attention(q, k, v, mask=None, *, scale, causal=False):
    how = "causal" if causal else mask
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=how)


def tokens(B: int, heads: int, N: int, dims: int, *, past: int = 0, kv_heads: int = 0):
    """Queries, keys and values; N tokens after `past` others."""
    length, kv = past + N, kv_heads or heads
    return normal(B, heads, N, dims), normal(B, kv, length, dims), normal(B, kv, length, dims)


def ones_of(B: int, heads: int, N: int, dims: int):
    """Values of 1: attention gives 1, whatever the weights are."""
    q, k, _ = tokens(B, heads, N, dims)
    return q, k, given([1.0] * math.prod(q.shape), *q.shape)


row(
    "attention",
    attention,
    case(*tokens(2, 3, 16, 32), scale=32**-0.5),
    case(*tokens(2, 3, 17, 64), scale=64**-0.5),
    case(*tokens(1, 2, 197, 64), scale=0.125, note="ViT"),
    case(*tokens(2, 12, 128, 64), scale=0.125, note="BERT"),
    case(*tokens(1, 12, 256, 64), scale=0.125, causal=True, note="GPT-2"),
    case(*tokens(2, 4, 128, 64), mask(0.8, 2, 1, 1, 128), scale=0.125, note="BERT, padding"),
    case(*tokens(1, 2, 9, 80), scale=80**-0.5),
    case(*tokens(1, 2, 9, 72), scale=72**-0.5, note="SigLIP so400m"),
    case(*tokens(1, 2, 12, 128), scale=128**-0.5),
    case(*tokens(1, 2, 12, 96), scale=96**-0.5),
    case(*tokens(1, 4, 7, 12), scale=12**-0.5),
    case(*tokens(1, 2, 5, 13), scale=1.0),
    case(normal(2, 2, 1, 64), normal(2, 2, 33, 64), normal(2, 2, 33, 64), scale=0.125, note="pool"),
    case(*tokens(2, 3, 16, 64), scale=0.125, causal=True),
    case(*tokens(1, 2, 130, 64), scale=0.125, causal=True, note="GPT-2, a prompt"),
    case(*tokens(1, 2, 1, 64, past=40), scale=0.125, note="GPT-2, a token"),
    case(*tokens(1, 2, 1, 64, past=1100), scale=0.125, note="after many"),
    case(*tokens(1, 2, 5, 64, past=12), scale=0.125, causal=True, note="rectangular"),
    case(*tokens(1, 2, 40, 64, past=60), scale=0.125, causal=True, note="rectangular"),
    case(*tokens(2, 4, 6, 32, kv_heads=2), scale=32**-0.5, note="grouped"),
    case(*tokens(1, 8, 1, 64, past=20, kv_heads=2), scale=0.125, note="grouped"),
    case(*tokens(2, 2, 9, 64), mask(0.6, 2, 1, 9, 9), scale=0.125),
    case(*tokens(2, 2, 9, 64), mask(0.6, 2, 1, 1, 9), scale=0.125),
    case(*tokens(2, 2, 9, 64), mask(0.6, 9, 9), scale=0.125),
    case(*tokens(1, 2, 1, 64, past=8), mask(0.6, 1, 1, 1, 9), scale=0.125),
    case(*tokens(2, 2, 9, 64), normal(2, 2, 9, 9), scale=0.125, note="added"),
    case(*tokens(2, 2, 9, 64), hides(-32752.0, 2, 1, 1, 9), scale=0.125, note="added"),
    case(
        *ones_of(2, 2, 9, 64),
        hides(-32752.0, 1, 1, 9, 9, whole_row=True),
        scale=0.125,
        gradients=False,
        note="a row is hidden by float16's lowest / 2",
    ),
    case(
        *ones_of(2, 2, 9, 64),
        hides(LOWEST / 2, 1, 1, 9, 9, whole_row=True),
        scale=0.125,
        gradients=False,
        dtypes=("float32", "bfloat16"),
        note="a row is hidden by finfo.min / 2",
    ),
    case(*tokens(2, 2, 9, 64), hides(-math.inf, 1, 1, 9, 9), scale=0.125, note="-inf added"),
    case(
        *tokens(2, 2, 9, 64),
        hides(-math.inf, 1, 1, 9, 9, whole_row=True),
        scale=0.125,
        gradients=False,
        note="a row is hidden by -inf",
    ),
    case(
        *tokens(1, 2, 3, 64),
        given([False, False, False, True, False, True, True, True, True], 3, 3, dtype="bool"),
        scale=0.125,
        gradients=False,
        note="a row is False",
    ),
    case(*tokens(1, 2, 9, 64), scale=8.0, note="sharp"),
    *viewed(case(*tokens(2, 2, 9, 64), scale=0.125))[1:],
)

# Gathers ----------------------------------------------------------------------------------------


def embedding(w, ids):
    return filled(nn.Embedding(*w.shape), weight=w)(ids)


row(
    "Embedding",
    embedding,
    case(normal(50, 16), integers(0, 50, 2, 9)),
    case(normal(300, 64), integers(0, 300, 4, 33)),
    case(normal(2000, 256), integers(0, 2000, 8, 128), note="large"),
    case(normal(7, 5), integers(0, 7, 3, 4, dtype="int64")),
    case(normal(7, 5), integers(0, 7, 11, dtype="uint8")),
    case(normal(2, 8), given([0, 1, 1, 0, 0, 0, 1, 1, 1, 1], 2, 5, dtype="int32"), note="repeats"),
    case(normal(3, 4), integers(0, 2, 1, 1000), note="many repeats"),
    *viewed(case(normal(20, 12), integers(0, 20, 8)))[1:],
)
row(
    "Embedding.as_linear",
    lambda w, x: filled(nn.Embedding(*w.shape), weight=w).as_linear(x),
    case(normal(300, 64), normal(2, 3, 64)),
    case(normal(51, 13), normal(1, 13)),
)
row(
    "take",
    lambda x, ids, *, axis: mx.take(x, ids, axis),
    case(normal(2, 9, 7, 4), integers(0, 9, 5), axis=1),
    case(normal(2, 9, 7, 4), integers(0, 7, 5), axis=2),
    case(normal(2, 3), given([2, 2, 0], dtype="int32"), axis=1, note="repeats"),
    *viewed(case(normal(2, 6, 8), integers(0, 6, 4), axis=1))[1:],
)
row(
    "take_along_axis",
    lambda x, ids, *, axis: mx.take_along_axis(x, ids, axis=axis),
    case(normal(3, 50), integers(0, 50, 3, 50), axis=-1),
    case(normal(3, 7, 5), integers(0, 7, 3, 1, 5), axis=1),
    *viewed(case(normal(4, 9), integers(0, 9, 4, 3), axis=-1))[1:],
)
row(
    "put_along_axis",
    lambda x, ids, y, *, axis: mx.put_along_axis(x, ids, y, axis=axis),
    case(normal(3, 50), distinct(3, 50, dtype="int32"), normal(3, 50), axis=-1),
    case(normal(3, 50), given([4, 9, 3], 3, 1, dtype="int32"), normal(1), axis=-1),
)
row(
    "x[rows, columns]",
    lambda x, rows, columns: x[rows, columns],
    case(normal(4, 9, 5), integers(0, 4, 6), integers(0, 9, 6)),
    case(normal(2, 3), given([0, 0], dtype="int32"), given([1, 1], dtype="int32"), note="repeats"),
)

# Order ------------------------------------------------------------------------------------------

WITH_NAN = given([1.0, math.nan, 3.0, 2.0, 5.0, 4.0], 2, 3)
row(
    "argmax",
    lambda x, *, axis=-1: x.argmax(axis=axis),
    case(normal(4, 50)),
    case(normal(2, 50257), dtypes=("float32",)),
    case(normal(4, 5, 6), axis=1),
    case(given([1.0, 3.0, 3.0, 2.0, 3.0] * 2, 2, 5), note="ties: the first"),
    case(given([0.0] * 40, 1, 40), note="ties: the first"),
    case(given([-math.inf] * 6, 2, 3), note="-inf"),
    case(WITH_NAN, note="NaN"),
    case(integers(0, 5, 6, 40), dtypes=("float32",), note="integers with ties"),
    *viewed(case(normal(5, 17)))[1:],
    measure=EXACT,
)
row(
    "argmax of a mask",
    lambda x, *, axis=-1: (x != 0).argmax(axis=axis),
    case(mask(0.4, 5, 33), axis=1),
    case(integers(0, 2, 5, 33), axis=1),
    case(given([0, 0, 1, 1, 0, 0, 0, 0], 2, 4, dtype="int32"), axis=1),
    measure=EXACT,
    dtypes=("float32",),
)
row(
    "argsort",
    lambda x: mx.argsort(x, axis=-1),
    case(distinct(3, 40)),
    case(distinct(2, 2000), dtypes=("float32",)),
    case(normal(2, 50257), dtypes=("float32",)),
    case(given([3.0, -math.inf, 1.0, math.inf, 2.0, -1.0])),
    case(given([2.0, 1.0, 2.0, 1.0, 2.0, 0.0]), note="ties: the first"),
    case(WITH_NAN, note="NaN"),
    *viewed(case(distinct(4, 16)))[1:],
    measure=EXACT,
)
row(
    "topk",
    lambda x, *, k: mx.sort(mx.topk(x, k, axis=-1), axis=-1),
    case(normal(3, 50), k=5),
    case(normal(2, 50257), k=50, dtypes=("float32",)),
    case(normal(3, 9), k=9),
    case(given([1.0, 2.0, 2.0, 2.0, 0.0]), k=2, note="ties"),
    measure=EXACT,
)
row(
    "argpartition",
    lambda x, *, k: mx.sort(
        mx.take_along_axis(x, mx.argpartition(x, kth=k, axis=-1), axis=-1)[..., k:], axis=-1
    ),
    case(normal(3, 50), k=40),
    case(normal(2, 5000), k=4950, dtypes=("float32",)),
    measure=EXACT,
)
row(
    "max",
    lambda x, *, axis=-1: x.max(axis=axis),
    case(normal(4, 50)),
    case(normal(2, 50257), dtypes=("float32",)),
    case(normal(4, 5, 6), axis=1),
    case(given([1.0, 3.0, 3.0, 0.0], 1, 4), note="ties"),
    case(WITH_NAN, gradients=False, note="NaN"),
    case(given([-math.inf] * 4, 2, 2), gradients=False, note="-inf"),
    case(integers(-9, 9, 4, 7), dtypes=("float32",)),
    measure=ROUNDED,
)
row(
    "min",
    lambda x, *, axis=-1: x.min(axis=axis),
    case(normal(4, 50)),
    case(normal(4, 5, 6), axis=1),
    case(WITH_NAN, gradients=False, note="NaN"),
    case(integers(-9, 9, 4, 7), dtypes=("float32",)),
    measure=ROUNDED,
)

# Products ---------------------------------------------------------------------------------------


def matrices(M: int, K: int, N: int, *batch: int, **how: Any) -> Case:
    return case(normal(*batch, M, K), normal(*batch, K, N), **how)


row(
    "matmul",
    mx.matmul,
    matrices(4, 8, 16),
    matrices(1, 64, 64),
    matrices(64, 64, 1),
    matrices(1, 1, 1),
    matrices(5, 1, 7),
    matrices(17, 31, 13),
    matrices(128, 768, 96),
    matrices(1, 768, 513),
    matrices(8, 4096, 8, note="long sums"),
    matrices(2, 50000, 3, note="long sums", dtypes=("float32",)),
    matrices(394, 768, 1024, note="large"),
    matrices(256, 256, 256, note="large"),
    matrices(16, 32, 24, 3),
    matrices(5, 16, 7, 2, 3),
    case(normal(2, 3, 8, 16), normal(16, 12)),
    case(normal(2, 1, 8, 16), normal(1, 3, 16, 5)),
    case(normal(16), normal(16, 5)),
    case(normal(3, 64, mean=100), normal(64, 5, mean=100), note="large mean"),
    *viewed(matrices(24, 40, 16))[1:],
    *viewed(matrices(9, 8, 7, 2))[1:],
    *viewed(matrices(1, 64, 48))[1:],
)
row(
    "addmm",
    mx.addmm,
    case(normal(5), normal(3, 64), normal(64, 5)),
    case(normal(12, 5), normal(12, 9), normal(9, 5)),
)
row(
    "Linear",
    lambda x, w, b=None: filled(
        nn.Linear(w.shape[1], w.shape[0], bias=b is not None), weight=w, bias=b
    )(x),
    case(normal(2, 5, 64), normal(48, 64, std=0.1), normal(48)),
    case(normal(1, 768), normal(10, 768, std=0.03), normal(10)),
    case(normal(2, 7, 33), normal(17, 33, std=0.1)),
    case(normal(197, 192), normal(576, 192, std=0.07), normal(576)),
    case(normal(2, 3, 3072), normal(64, 3072, std=0.02), normal(64), note="long sums"),
    *viewed(case(normal(4, 5, 16), normal(8, 16), normal(8)))[1:],
)
row(
    "einsum",
    lambda *xs, subscripts: mx.einsum(subscripts, *xs),
    case(normal(2, 5, 8), normal(2, 6, 8), subscripts="bnd,bmd->bnm"),
    case(normal(2, 3, 5, 4), normal(4, 3, 7), subscripts="bhnd,dhe->bne"),
)
row(
    "tensordot",
    lambda x, y, *, axes: mx.tensordot(x, y, axes=axes),
    case(normal(6, 9), normal(9, 5, 4), axes=1),
    case(normal(6, 9), normal(4, 9, 5), axes=[[1], [1]]),
)
row(
    "inner products",
    lambda q, k, *, scale: scale * q @ k.swapaxes(-1, -2),
    case(normal(2, 3, 9, 16), normal(2, 3, 9, 16), scale=0.25),
    case(normal(1, 2, 1, 64), normal(1, 2, 33, 64), scale=0.125),
)
row(
    "bicubic",
    lambda x, *, size: mx.tensordot(
        vit.resampling(x.shape[1], size[1]),
        mx.tensordot(vit.resampling(x.shape[0], size[0]), x, axes=1),
        axes=[[1], [1]],
    ).swapaxes(0, 1),
    case(normal(14, 14, 8), size=(24, 24)),
    case(normal(24, 24, 8), size=(14, 14)),
    case(normal(7, 7, 5), size=(9, 12)),
    case(normal(16, 16, 3), size=(4, 5)),
    case(normal(3, 3, 2), size=(1, 1)),
    dtypes=("float32",),  # positions are resampled in no other
)

# Sums -------------------------------------------------------------------------------------------

SUMS = (
    case(normal(6, 64), axis=-1),
    case(normal(2, 1000, 5), axis=1),
    case(uniform(0, 1, 100000), axis=0, note="long"),
    case(uniform(0, 1, 4, 30000), axis=1, note="long", dtypes=("float32",)),
    case(uniform(0, 1, 30000, 3), axis=0, note="long", dtypes=("float32",)),
    case(uniform(0, 1, 1, 112, 112, 4), axis=(1, 2), note="two axes"),
    case(uniform(0, 1, 1, 224, 224, 3), axis=(1, 2), note="two axes", dtypes=("float32",)),
    case(uniform(0, 1, 2, 6, 6, 3), axis=(1, 2)),
    case(normal(4, 3, 5), axis=(0, 2)),
    *viewed(case(uniform(0, 1, 40, 48), axis=-1))[1:],
)
row(
    "mean",
    lambda x, *, axis: x.mean(axis=axis),
    *SUMS,
    case(uniform(0, 8, 2, 30000), axis=1, dtypes=("float16",), note="whose sum float16 lacks"),
    measure=TERMS,
)
row(
    "sum",
    lambda x, *, axis: x.sum(axis=axis),
    *(replace(c, dtypes=("float32", "bfloat16")) if c.note == "long" else c for c in SUMS),
    case(integers(0, 2, 3, 500), axis=1, dtypes=("float32",), note="counts"),
    measure=TERMS,
)
row(
    "var",
    lambda x, *, axis: mx.var(x, axis=axis),
    case(normal(6, 64), axis=-1),
    case(normal(2, 49, 5, mean=3), axis=1),
    case(normal(4, 14, 14, 3, mean=30), axis=(0, 1, 2), note="large mean"),
    case(normal(3, 300, mean=1000), axis=-1, note="larger mean", dtypes=("float32",)),
)
row(
    "spatial_mean",
    ops.spatial_mean,
    case(uniform(0, 1, 2, 112, 112, 5)),
    case(normal(2, 7, 7, 64)),
    case(normal(1, 9, 4, 3, mean=10)),
    case(normal(1, 1, 1, 8)),
    measure=TERMS,
)
row(
    "cumsum",
    lambda x, *, axis: mx.cumsum(x, axis=axis),
    case(uniform(0, 1, 3, 50), axis=-1),
    case(uniform(0, 1, 20, 3), axis=0),
    case(uniform(0, 1, 3, 700), axis=-1, note="long"),
    case(uniform(0, 1e-4, 2, 50257), axis=-1, dtypes=("float32",), note="a vocabulary"),
    case(integers(0, 2, 3, 60), axis=1, dtypes=("float32",), note="integers"),
    *viewed(case(uniform(0, 1, 6, 9), axis=-1))[1:],
    measure=TERMS,
)

# Element by element -----------------------------------------------------------------------------

PAIR = case(spread(-3, 2, 600), spread(-3, 2, 600))
BROADCAST = case(normal(3, 1, 8), normal(5, 1))
NOT_FINITE = case(
    given([math.inf, -math.inf, math.nan, math.inf, 0.0, -0.0]),
    given([math.inf, math.inf, 1.0, 0.0, 0.0, 3.0]),
    gradients=False,
)
HUGE = case(spread(30, 38, 200), spread(0, 6, 200), dtypes=("float32", "bfloat16"), gradients=False)
TINY = case(
    spread(-37, -30, 200),
    spread(-6, 0, 200),
    dtypes=("float32",),
    gradients=False,
    note="subnormal results",
)
for name, function in {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "maximum": mx.maximum,
}.items():
    cases = [*viewed(PAIR), BROADCAST, NOT_FINITE, HUGE, *([TINY] if name == "multiply" else [])]
    row(name, function, *cases, *viewed(case(normal(6, 8), normal(6, 8)))[1:], measure=ROUNDED)
row("abs", mx.abs, case(spread(-3, 3, 100)), ENDS, case(integers(-9, 9, 20)), measure=ROUNDED)
row("square", mx.square, case(spread(-3, 2, 100)), ENDS, measure=ROUNDED)
row(
    "clip",
    lambda x, *, low, high: mx.clip(x, low, high),
    case(uniform(-8, 8, 200), low=0, high=6),
    replace(ENDS, parameters=(("low", -10), ("high", 10))),
    case(integers(-9, 99, 20), low=0, high=63, dtypes=("float32",)),
    measure=ROUNDED,
)
row(
    "where",
    lambda x, y, condition: mx.where(condition, x, y),
    case(normal(4, 9), normal(4, 9), mask(0.5, 4, 9)),
    case(normal(4, 9), given([-math.inf]), mask(0.5, 4, 1)),
    case(given([math.nan] * 3), normal(3), given([0, 0, 1], dtype="bool"), gradients=False),
    measure=ROUNDED,
)
row(
    "compare",
    lambda x, y: (x < y, x <= y, x == y, x != y, x >= y, x > y),
    case(integers(-3, 3, 200), integers(-3, 3, 200), dtypes=("float32",)),
    case(given([0.0, -0.0, math.nan, math.inf, 1.0]), given([-0.0, 0.0, math.nan, math.inf, 2.0])),
    case(normal(5, 1), normal(4)),
    measure=EXACT,
)
row(
    "logic",
    lambda x, y: (x & y, x | y, ~x),
    case(mask(0.5, 40), mask(0.5, 40)),
    case(mask(0.5, 4, 1), mask(0.5, 1, 9)),
    measure=EXACT,
    dtypes=("float32",),
)
BIG = given([2**31 - 1, -(2**31), 2**30, -7, 65536, 46341], dtype="int32")
row(
    "arithmetic of integers",
    lambda x, y: (x + y, x - y, x * y),
    case(integers(-99, 99, 50), integers(-99, 99, 50)),
    case(integers(-99, 99, 50, dtype="int64"), integers(-99, 99, 50, dtype="int64")),
    case(integers(0, 255, 50, dtype="uint8"), integers(0, 255, 50, dtype="uint8")),
    case(BIG, BIG, note="wraps round"),
    measure=EXACT,
    dtypes=("float32",),
)
row(
    "remainders",
    lambda x, y: (x // y, x % y),
    case(integers(-99, 99, 50), integers(1, 9, 50)),
    case(integers(-99, 99, 50), integers(-9, -1, 50), note="of negative numbers"),
    measure=EXACT,
    dtypes=("float32",),
)
CASTS = given([0.0, -0.0, 1 / 3, -2.5, 65519.0, 65520.0, 1e-7, 6e-8, 3e-8, 1e30, -1e39, 255.7])
NAMES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
NAMES |= {"int32": mx.int32, "bool": mx.bool_}
row(
    "astype",
    lambda x, *, dtype: x.astype(NAMES[dtype]),
    *(case(normal(500, std=100), dtype=dtype, gradients=False) for dtype in (*FLOATS, "int32")),
    *(case(spread(-9, 5, 500), dtype=dtype, gradients=False) for dtype in FLOATS),
    *(
        case(CASTS, dtype=dtype, dtypes=("float32",), gradients=False, note="ends of the range")
        for dtype in ("float16", "bfloat16")
    ),
    case(given([math.nan, math.inf, -math.inf]), dtype="float16", gradients=False),
    case(given([0.0, 0.4, -3.0, math.nan]), dtype="bool", gradients=False),
    case(mask(0.5, 30), dtype="int32", dtypes=("float32",)),
    case(mask(0.5, 30), dtype="float16", dtypes=("float32",)),
    case(integers(-(10**6), 10**6, 90), dtype="float16", dtypes=("float32",)),
    case(integers(-(2**31), 2**31 - 1, 90), dtype="float32", dtypes=("float32",)),
    case(integers(-(2**40), 2**40, 30, dtype="int64"), dtype="int32", dtypes=("float32",)),
    case(integers(0, 255, 90, dtype="uint8"), dtype="float32", dtypes=("float32",)),
    measure=EXACT,
)

# Shapes -----------------------------------------------------------------------------------------

row(
    "concatenate",
    lambda *xs, axis: mx.concatenate(list(xs), axis=axis),
    case(normal(2, 1, 8), normal(2, 9, 8), axis=1),
    case(normal(2, 3, 4), normal(2, 3, 5), normal(2, 3, 1), axis=-1),
    *viewed(case(normal(3, 4), normal(2, 4), axis=0))[1:],
    measure=EXACT,
    gradients=True,
)
row(
    "stack",
    lambda *xs, axis: mx.stack(list(xs), axis=axis),
    case(normal(2, 5), normal(2, 5), axis=-1),
    case(normal(2, 5), normal(2, 5), axis=0, view="transposed"),
    measure=EXACT,
    gradients=True,
)
row(
    "split",
    lambda x, *, parts: tuple(mx.split(x, parts, axis=-1)),
    case(normal(2, 5, 12), parts=2),
    case(normal(2, 12), parts=3, view="every other"),
    measure=EXACT,
    gradients=True,
)
row(
    "pad",
    lambda x, *, widths, mode="constant", value=0.0: (
        mx.pad(x, widths, mode=mode)
        if mode != "constant"
        else mx.pad(x, widths, mode=mode, constant_values=value)
    ),
    case(normal(2, 5, 4, 3), widths=((0, 0), (0, 1), (0, 1), (0, 0))),
    case(normal(2, 5, 4, 3), widths=((0, 0), (1, 2), (3, 0), (0, 0)), value=-7.0),
    case(normal(2, 5, 3, 3), widths=((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge"),
    *viewed(case(normal(5, 6), widths=((1, 1), (0, 2))))[1:],
    *viewed(case(normal(5, 6), widths=((1, 1), (0, 2)), mode="edge"))[1:],
    measure=EXACT,
    gradients=True,
)
row(
    "reshape",
    lambda x, *, shape: x.reshape(shape),
    *viewed(case(normal(4, 6), shape=(3, 8))),
    *viewed(case(normal(2, 4, 6), shape=(8, 6))),
    case(normal(2, 3, 4), shape=(-1,)),
    measure=EXACT,
    gradients=True,
)
row(
    "flatten, unflatten",
    lambda x: mx.unflatten(x.flatten(1, 2), 1, x.shape[1:3]),
    *viewed(case(normal(2, 3, 4, 5))),
    measure=EXACT,
    gradients=True,
)
row(
    "heads",
    lambda x, *, heads: mx.unflatten(x, -1, (heads, -1)).swapaxes(1, 2),
    *viewed(case(normal(2, 5, 12), heads=3)),
    measure=EXACT,
    gradients=True,
)
row(
    "transpose",
    lambda x, *, axes: x.transpose(axes),
    *viewed(case(normal(2, 3, 4, 5), axes=(0, 3, 1, 2))),
    measure=EXACT,
    gradients=True,
)
row(
    "broadcast_to",
    lambda x, *, shape: mx.broadcast_to(x, shape),
    *viewed(case(normal(1, 1, 6), shape=(3, 4, 6))),
    measure=EXACT,
    dtypes=("float32", "bfloat16"),  # its gradient is a sum, whose terms are few
)
row(
    "slices",
    lambda x: (x[:, 1::2], x[:, 1:-1, None], x[:, ::-1], x[..., -1]),
    *viewed(case(normal(3, 8, 5))),
    measure=EXACT,
    gradients=True,
)


def update(x, y, *, start, stop):
    x = x + 0  # assigning changes the array itself
    x[:, :, start:stop] = y
    return x


row(
    "x[:, :, a:b] = y",
    update,
    *viewed(case(normal(2, 3, 16, 4), normal(2, 3, 5, 4), start=6, stop=11)),
    case(normal(2, 3, 16, 4), normal(2, 3, 1, 4), start=15, stop=16),
    measure=EXACT,
    gradients=True,
)
row(
    "arange",
    lambda *, start, stop, step: mx.arange(start, stop, step),
    case(start=0, stop=64, step=1),
    case(start=5, stop=18, step=2),
    measure=EXACT,
    dtypes=("float32",),
)
row(
    "tri",
    lambda *, rows, columns, k: mx.tri(rows, columns, k, dtype=mx.bool_),
    case(rows=5, columns=5, k=0),
    case(rows=3, columns=8, k=5),
    measure=EXACT,
    dtypes=("float32",),
)
row(
    "constants",
    lambda x: (
        mx.zeros_like(x),
        mx.ones(x.shape, x.dtype),
        mx.full(x.shape, mx.array(0.1, x.dtype)),
    ),
    case(normal(3, 5)),
    measure=ROUNDED,
    gradients=False,
)

# Chance: how often something is drawn -----------------------------------------------------------


def categorical(logits, *, draws):
    rows = mx.broadcast_to(logits, (draws, *logits.shape))
    return frequencies(mx.random.categorical(rows, key=mx.random.key(7)), logits.shape[-1])


def frequencies(found: mx.array, N: int) -> mx.array:
    """How often each of N numbers is among those found."""
    return mx.array(np.bincount(np.array(found).ravel(), minlength=N) / found.size)


def drawn_normal(edges, *, draws):
    x = np.array(mx.random.normal((draws,), key=mx.random.key(7)))
    return mx.array(np.histogram(x, np.array(edges))[0] / draws)


def dropout(p, *, draws):
    """Among as many ones: zeros, and what is scaled by 1 / (1 - p)."""
    mx.random.seed(7)
    y = nn.Dropout(p.item())(mx.ones(draws))
    return mx.stack([(y == 0).mean(), mx.isclose(y, 1 / (1 - p)).mean()])


row(
    "categorical",
    categorical,
    case(normal(10), draws=20000),
    case(given([0.0, -math.inf, 1.0, -math.inf, 2.0]), draws=20000, note="-inf is never drawn"),
    measure=CHANCE,
    dtypes=("float32",),
)
row(
    "bernoulli",
    lambda p, *, draws: mx.stack(
        [mx.random.bernoulli(q, (draws,), key=mx.random.key(7)).mean() for q in p]
    ),
    case(given([0.0, 0.1, 0.5, 0.9, 1.0]), draws=20000),
    measure=CHANCE,
    dtypes=("float32",),
)
row(
    "normal",
    drawn_normal,
    case(given([-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0]), draws=50000),
    measure=CHANCE,
    dtypes=("float32",),
)
row(
    "Dropout",
    dropout,
    case(given([0.1]), draws=20000),
    case(given([0.5]), draws=20000),
    measure=CHANCE,
    dtypes=("float32",),
)


def same_key(logits):
    """Whether a key draws the same again, and whether another one does."""
    rows = mx.broadcast_to(logits, (500, *logits.shape))
    first, second = mx.random.split(mx.random.key(3))
    draws = [mx.random.categorical(rows, key=key) for key in (first, first, second)]
    return mx.stack([mx.array_equal(draws[0], x) for x in draws[1:]])


row("the same key", same_key, case(normal(20)), measure=EXACT, dtypes=("float32",))

# Few bits ---------------------------------------------------------------------------------------

QUANTIZED = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def packed(N: int, K: int, bits: int, group_size: int) -> tuple[Draw, ...]:
    """A weight (N, K) of any codes, with scales and offsets of its groups."""
    codes = integers(0, 2**32, N, K * bits // 32, dtype="uint32")
    groups = (N, K // group_size)
    return codes, uniform(0.5 / 2**bits, 1.5 / 2**bits, *groups), uniform(-0.7, -0.3, *groups)


row(
    "dequantize",
    lambda w, scales, biases, **how: mx.dequantize(w, scales, biases, **how),
    *(case(*packed(4, 256, b, g), bits=b, group_size=g) for b, g in QUANTIZED),
    gradients=False,
)
row(
    "quantized_matmul",
    lambda x, w, scales, biases, **how: mx.quantized_matmul(x, w, scales, biases, **how),
    *(case(normal(3, 256), *packed(32, 256, b, g), bits=b, group_size=g) for b, g in QUANTIZED),
    *(case(normal(1, 512), *packed(64, 512, b, 64), bits=b, group_size=64) for b in (4, 8)),
    case(normal(2, 5, 128), *packed(40, 128, 4, 32), bits=4, group_size=32),
    case(normal(40, 768), *packed(96, 768, 8, 64), bits=8, group_size=64),
    case(normal(2, 4096), *packed(64, 4096, 8, 64), bits=8, group_size=64, note="long sums"),
    case(normal(64, 768), *packed(128, 768, 4, 64), bits=4, group_size=64, note="large"),
    case(normal(3, 32), *packed(32, 128, 4, 64), transpose=False, bits=4, group_size=64),
)


def quantized(w, *, bits, group_size):
    return mx.dequantize(*mx.quantize(w, group_size, bits), group_size, bits)


row(
    "quantize",
    quantized,
    *(case(normal(8, 256), bits=b, group_size=g, gradients=False) for b, g in QUANTIZED),
    case(normal(64, 256), bits=4, group_size=64, gradients=False, view="transposed"),
    measure=STEP,
)
