"""MLX's operations in real float64, which makes the backward pass of a network provable.

MLX computes in float64 on the CPU alone, and not all of it: some operations are exact to float32's
last digits only, or cast to it, and convolutions refuse it. Those are here, of plain operations
that have gradients; slow, and for comparisons alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_zoo.verify.replaced import replaced


@contextmanager
def real_float64() -> Iterator[None]:
    """For a while, on the CPU, the operations of arrays in float64 are exact to its roundings.

    `mlx.core` has others in their place; arrays of other types, and other threads, get its own.
    """
    exact = [(m, name, _by_type(getattr(m, name), exact)) for m, name, exact in EXACT]
    with replaced(exact), mx.stream(mx.cpu):
        yield


def _by_type(own: Callable, exact: Callable) -> Callable:
    def chosen(x: Any, *args: Any, **kwargs: Any) -> mx.array:
        is_double = isinstance(x, mx.array) and x.dtype == mx.float64
        return (exact if is_double else own)(x, *args, **kwargs)

    return chosen


def exp(x: mx.array) -> mx.array:
    return mx.power(mx.array(math.e, mx.float64), x)


def sigmoid(x: mx.array) -> mx.array:
    return 0.5 + 0.5 * mx.tanh(0.5 * x)


def erf(x: mx.array) -> mx.array:
    by_one = np.frompyfunc(math.erf, 1, 1)
    function: Any = mx.custom_function(
        lambda x: mx.array(by_one(np.array(x)).astype(np.float64), mx.float64)
    )

    @function.vjp
    def vjp(x, cotangent, output):
        return cotangent * (2 / math.sqrt(math.pi)) * exp(-mx.square(x))

    return function(x)


def softmax(x: mx.array, axis: int, **precise: bool) -> mx.array:
    y = exp(x - mx.stop_gradient(x.max(axis=axis, keepdims=True)))
    return y / y.sum(axis=axis, keepdims=True)


def logsumexp(x: mx.array, axis: int, keepdims: bool = False) -> mx.array:
    most = mx.stop_gradient(x.max(axis=axis, keepdims=True))
    y = most + mx.log(exp(x - most).sum(axis=axis, keepdims=True))
    return y if keepdims else y.squeeze(axis)


def logaddexp(x: mx.array, y: Any) -> mx.array:
    return mx.where(x > y, x, y) + mx.log1p(exp(-mx.abs(x - y)))


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred * mx.rsqrt(mx.square(centred).mean(axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """softmax(scale q k^T + mask) v, with as many heads of keys as of queries."""
    scores, lowest = scale * q @ k.swapaxes(-1, -2), mx.array(-1e300, mx.float64)
    if isinstance(mask, str):  # "causal"
        N, M = scores.shape[-2:]
        mask = mx.tri(N, M, M - N, dtype=mx.bool_)
    if mask is not None:
        masked = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, lowest) if masked else scores + mask
    return softmax(scores, axis=-1) @ v


def conv2d(
    x: mx.array,
    weight: mx.array,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> mx.array:
    """Of each position in the kernel, the pixels that it sees by its weights; their sum."""
    (sy, sx), (py, px) = (n if isinstance(n, tuple) else (n, n) for n in (stride, padding))
    assert dilation in (1, (1, 1))
    D, kh, kw, _ = weight.shape
    x = mx.pad(x, [(0, 0), (py, py), (px, px), (0, 0)])
    B, H, W, C = x.shape
    h, w = (H - kh) // sy + 1, (W - kw) // sx + 1
    kernel = mx.unflatten(weight, 0, (groups, -1)).transpose(2, 3, 0, 4, 1)  # (k, k, G, C/G, D/G)
    y = mx.zeros((groups, B * h * w, D // groups), mx.float64)
    for i in range(kh):
        for j in range(kw):
            seen = x[:, i : i + sy * (h - 1) + 1 : sy, j : j + sx * (w - 1) + 1 : sx]
            seen = seen.reshape(B * h * w, groups, C // groups).swapaxes(0, 1)
            # Of one channel each: products, not that many products of matrices.
            y = y + (seen * kernel[i, j] if groups == C else seen @ kernel[i, j])
    return y.swapaxes(0, 1).reshape(B, h, w, D)


EXACT: tuple[tuple[Any, str, Callable], ...] = (
    (mx, "exp", exp),
    (mx, "sigmoid", sigmoid),
    (mx, "erf", erf),
    (mx, "softmax", softmax),
    (mx, "logsumexp", logsumexp),
    (mx, "logaddexp", logaddexp),
    (mx, "conv2d", conv2d),
    (mx.fast, "layer_norm", layer_norm),
    (mx.fast, "scaled_dot_product_attention", attention),
)
