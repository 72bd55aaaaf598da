"""Kernels for the CPU: what MLX computes there one number, or one thread, at a time.

MLX's CPU backend takes 12 to 23 ns for an exp, tanh or erf, and walks through a depthwise
convolution pixel by pixel. Here an evaluated array is seen as a NumPy array, which is the same
memory, and computed by the vector instructions of NumPy, or of MKL where it is the process's BLAS:
20 to 60 times faster (benchmarks.md). Float32 only; `ops` says when these are used.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_zoo.backend.blas import load_fast_blas

# Infinity is the right answer, or leads to it.
quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")
BLOCK = 2**16  # elements that stay in a core's cache from one pass to the next
ROWS = 2**19  # of attention's scores, of all heads: fewer would make its products small
# Of MKL's vector mathematics (mkl_vml_defines.h): the last bit may be wrong; nothing is reported.
MKL_MODE = 0x1 | 0x100
# Of mkl_cblas.h.
MKL_ROW_MAJOR, MKL_NO_TRANS, MKL_TRANS = 101, 111, 112


# Of a fit to log(Phi(x) / Phi(-x)) / -x in powers of x^2, where |x| < 5.5: x Phi(x) is wrong by
# less than 1e-7, and by 6e-7 after float32's roundings.
LOGIT_OF_NORMAL = (
    *(-1.5957685, -0.07266857, 6.625999e-05, 1.10480265e-04),
    *(-7.938205e-06, 2.6689156e-07, -3.6111962e-09),
)


Arrays = list[mx.array]


@quiet
def gelu(x: mx.array) -> mx.array:
    """x * Phi(x), of the standard normal distribution."""
    x, y = _pair(x)
    if _mkl():
        a, b = _flat(x), _flat(y)
        _vector("vmsCdfNorm", a, b)
        _vector("vmsMul", a, b, b)
        return y
    for a, b in _blocks(x, y):
        _fill_logit_of_normal(np.minimum(a * a, np.float32(5.5**2)), b)
        b *= a
        _over_one_plus_exp(a, b)
    return y


def _fill_logit_of_normal(square: np.ndarray, out: np.ndarray) -> None:
    """log(Phi(-x) / Phi(x)) / x of x^2, into `out`."""
    out[...] = np.float32(LOGIT_OF_NORMAL[-1])
    for factor in LOGIT_OF_NORMAL[-2::-1]:
        out *= square
        out += np.float32(factor)


@quiet
def gelu_backward(x: mx.array, dy: mx.array) -> Arrays:
    """dy (Phi(x) + x phi(x))."""
    x, dx = _pair(x)
    dy = _in_one_piece(dy)
    for a, d, b in _blocks(x, dy, dx):
        square = a * a
        if _mkl():
            _vector("vmsCdfNorm", a, b)
        else:
            _fill_logit_of_normal(np.minimum(square, np.float32(5.5**2)), b)
            b *= a
            _over_one_plus_exp(np.float32(1), b)
        square *= np.float32(-0.5)
        _exp(square)
        square *= np.float32(1 / np.sqrt(2 * np.pi))
        square *= a
        b += square
        b *= d
    return [dx]


@quiet
def gelu_tanh(x: mx.array) -> mx.array:
    """x * (1 + tanh(u)) / 2 = x / (1 + exp(-2u)), where u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    factor = -2 * np.float32(np.sqrt(2 / np.pi))
    x, y = _pair(x)
    for a, b in _blocks(x, y):
        np.multiply(a, a, out=b)
        b *= factor * np.float32(0.044715)
        b += factor
        b *= a
        _over_one_plus_exp(a, b)
    return y


@quiet
def gelu_tanh_backward(x: mx.array, dy: mx.array) -> Arrays:
    """dy s (1 + 2 x u' (1 - s)), where s = 1 / (1 + exp(-2u))."""
    factor = 2 * np.float32(np.sqrt(2 / np.pi))
    x, dx = _pair(x)
    dy = _in_one_piece(dy)
    for a, d, b in _blocks(x, dy, dx):
        a = np.clip(a, -10, 10)  # s is 0 or 1 outside
        cubic = a * a
        cubic *= factor * np.float32(0.044715)
        np.add(cubic, factor, out=b)
        b *= -a  # -2u
        cubic *= 3
        cubic += factor
        cubic *= a  # 2 x u'
        _slope_of_gate(b, cubic)
        b *= d
    return [dx]


@quiet
def silu(x: mx.array, beta: float = 1.0) -> mx.array:
    """x / (1 + exp(-beta x))."""
    x, y = _pair(x)
    for a, b in _blocks(x, y):
        np.multiply(a, np.float32(-beta), out=b)
        _over_one_plus_exp(a, b)
    return y


@quiet
def silu_backward(x: mx.array, dy: mx.array, beta: float = 1.0) -> Arrays:
    """dy s (1 + beta x (1 - s)), where s = 1 / (1 + exp(-beta x))."""
    x, dx = _pair(x)
    dy = _in_one_piece(dy)
    for a, d, b in _blocks(x, dy, dx):
        a = np.clip(a * np.float32(beta), -80, 80)  # s is 0 or 1 outside
        np.negative(a, out=b)
        _slope_of_gate(b, a)
        b *= d
    return [dx]


@quiet
def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """softmax(scale q k^T + mask) v for q (B, heads, N, D), k and v (B, heads, M, D).

    The sums divide the small result, not the weights.
    """
    y = mx.zeros(q.shape)
    mx.eval(v, y)
    values, out = _rows(v), _rows(y)
    for b, rows, seen, weights in _weights(q, k, scale, mask):
        block = out[b, :, rows]
        _products(weights, values[b, :, seen], block)
        block /= weights.sum(axis=-1, keepdims=True)
    return y


@quiet
def attention_backward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    dy: mx.array,
    scale: float,
    mask: mx.array | str | None,
) -> Arrays:
    """The gradients of q, k and v, from that of attention's result."""
    gradients = [mx.zeros(x.shape) for x in (q, k, v)]
    mx.eval(q, k, v, dy, gradients)
    queries, keys, values, given = (_rows(x) for x in (q, k, v, dy))
    dq, dk, dv = (_rows(x) for x in gradients)
    for b, rows, seen, weights in _weights(q, k, scale, mask):
        weights /= weights.sum(axis=-1, keepdims=True)
        dv[b, :, seen] += weights.swapaxes(1, 2) @ given[b, :, rows]
        slopes = np.empty_like(weights)  # of the weights, then of the scaled scores
        _products(given[b, :, rows], values[b, :, seen].swapaxes(1, 2), slopes)
        slopes -= np.einsum("hnm,hnm->hn", slopes, weights)[..., None]
        slopes *= weights
        slopes *= np.float32(scale)
        _products(slopes, keys[b, :, seen], dq[b, :, rows])
        dk[b, :, seen] += slopes.swapaxes(1, 2) @ queries[b, :, rows]
    return gradients


def _weights(
    q: mx.array, k: mx.array, scale: float, mask: mx.array | str | None
) -> Iterator[tuple[int, slice, slice, np.ndarray]]:
    """Image, rows, keys, and the weights (heads, rows, keys) of attention, not yet divided.

    As many rows of scores at a time as stay in the cache; where the mask is "causal", without the
    keys that none of these rows sees. The memory of the weights is used again.
    """
    (B, heads, N, _), M = q.shape, k.shape[2]
    causal, added = isinstance(mask, str), None
    if isinstance(mask, mx.array):
        added = mx.broadcast_to(mask, (B, heads, N, M))
    mx.eval(q, k, added)
    queries, keys = _rows(q), _rows(k)
    size = min(N, max(1, ROWS // (heads * M)))
    room = np.empty(heads * size * M, np.float32)
    later = np.triu(np.full((size, size), -np.inf, np.float32), 1)
    for b in range(B):
        for top in range(0, N, size):
            end = min(N, top + size)
            rows, seen = end - top, M - N + end if causal else M
            weights = room[: heads * rows * seen].reshape(heads, rows, seen)
            _products(queries[b, :, top:end], keys[b, :, :seen].swapaxes(1, 2), weights)
            weights *= np.float32(scale)
            if causal:
                weights[:, :, seen - rows :] += later[:rows, :rows]
            elif added is not None:
                weights += np.asarray(added)[b, :, top:end]
            weights -= weights.max(axis=-1, keepdims=True)
            _exp(weights)
            yield b, slice(top, end), slice(seen), weights


def depthwise(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    stride: int = 1,
    padding: int = 0,
) -> mx.array:
    """A convolution of every channel with its own kernel. (B, H, W, C) -> (B, H', W', C).

    Args:
        x: (B, H, W, C).
        weight: (C, k, k, 1).
        bias: (C,), or None.

    Rows of the output are summed up tap by tap, as many at a time as stay in the cache.
    """
    B, H, W, C = x.shape
    k = weight.shape[1]
    high, wide = ((side + 2 * padding - k) // stride + 1 for side in (H, W))
    y = mx.zeros((B, high, wide, C))
    mx.eval(x, weight, bias, y)
    image, out = np.asarray(x), np.asarray(y)
    taps = np.moveaxis(np.asarray(weight)[..., 0], 0, -1)  # (k, k, C)
    taps = np.ascontiguousarray(np.broadcast_to(taps[:, :, None], (k, k, wide, C)))
    start = np.float32(0) if bias is None else np.asarray(bias)
    columns = [_meeting(j - padding, stride, W, 0, wide) for j in range(k)]

    step = max(1, BLOCK // (wide * C))
    products = np.empty((step, wide, C), np.float32)
    for b in range(B):
        for top in range(0, high, step):
            rows = out[b, top : top + step]
            rows[...] = start
            for i in range(k):
                here, there = _meeting(i - padding, stride, H, top, top + len(rows))
                for j, (left, right) in enumerate(columns):
                    into = rows[here.start - top : here.stop - top, left]
                    product = products[: len(into), left]
                    np.multiply(image[b, there, right], taps[i, j, left], out=product)
                    into += product
    return y


@quiet
def depthwise_backward(
    x: mx.array, weight: mx.array, *bias_and_dy: mx.array, stride: int = 1, padding: int = 0
) -> Arrays:
    """The gradients of x, of the weight, and of the bias if there is one, from dy's: the last."""
    *bias, dy = bias_and_dy
    _, H, W, C = x.shape
    B, high, wide, _ = dy.shape
    k = weight.shape[1]
    dx, dweight = mx.zeros(x.shape), mx.zeros(weight.shape)
    mx.eval(x, weight, dy, dx, dweight)
    image, given, into = np.asarray(x), np.asarray(dy), np.asarray(dx)
    taps = np.moveaxis(np.asarray(weight)[..., 0], 0, -1)  # (k, k, C)
    taps = np.ascontiguousarray(np.broadcast_to(taps[:, :, None], (k, k, wide, C)))
    slopes = np.moveaxis(np.asarray(dweight)[..., 0], 0, -1)
    columns = [_meeting(j - padding, stride, W, 0, wide) for j in range(k)]

    step = max(1, BLOCK // (wide * C))
    products = np.empty((step, wide, C), np.float32)
    for b in range(B):
        for top in range(0, high, step):
            for i in range(k):
                end = min(high, top + step)
                here, there = _meeting(i - padding, stride, H, top, end)
                for j, (left, right) in enumerate(columns):
                    block = given[b, here, left]
                    product = products[: len(block), left]
                    np.multiply(block, taps[i, j, left], out=product)
                    into[b, there, right] += product
                    np.multiply(block, image[b, there, right], out=product)
                    slopes[i, j] += product.sum(axis=(0, 1))
    return [dx, dweight, *(dy.sum(axis=(0, 1, 2)) for _ in bias)]


@quiet
def convolution_backward(
    x: mx.array, weight: mx.array, dy: mx.array, stride: tuple[int, int], padding: tuple[int, int]
) -> mx.array:
    """The gradient of x (B, H, W, C): what the taps of all windows get, summed up."""
    D, *kernel, C = weight.shape
    dx, taps = mx.zeros(x.shape), dy.reshape(-1, D) @ weight.reshape(D, -1)
    mx.eval(dx, taps)
    meetings = _meetings(x.shape[1:3], dy.shape[1:3], kernel, stride, padding)
    parts = np.asarray(taps).reshape(*dy.shape[:3], *kernel, C)
    for into, part in zip(np.asarray(dx), parts, strict=True):
        for tap, here, there in meetings:
            into[there] += part[here + tap]
    return dx


@quiet
def max_pool_backward(x: mx.array, dy: mx.array, k: int, stride: int, padding: int) -> Arrays:
    """Of each window, dy in equal parts for those that are the largest."""
    dx = mx.zeros(x.shape)
    mx.eval(x, dy, dx)
    sizes = ((size, size) for size in (k, stride, padding))
    meetings = _meetings(x.shape[1:3], dy.shape[1:3], *sizes)
    top, count = np.empty((2, *dy.shape[1:]), np.float32)
    for image, given, into in zip(*map(np.asarray, (x, dy, dx)), strict=True):
        top[...], count[...] = -np.inf, 0
        for _, here, there in meetings:
            np.maximum(top[here], image[there], out=top[here])
        for _, here, there in meetings:
            count[here] += top[here] == image[there]
        np.divide(given, count, out=count)
        for _, here, there in meetings:
            into[there] += count[here] * (top[here] == image[there])
    return [dx]


Place = tuple[slice, slice]


def _meetings(
    image: Sequence[int],
    output: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> list[tuple[tuple[int, ...], Place, Place]]:
    """Each tap of a kernel, the outputs where it lies on the image, and the pixels it lies on."""
    found = []
    for tap in itertools.product(*map(range, kernel)):
        sides = zip(tap, padding, stride, image, output, strict=True)
        (a, b), (c, d) = (_meeting(t - p, step, size, 0, end) for t, p, step, size, end in sides)
        found.append((tap, (a, c), (b, d)))
    return found


def _meeting(shift: int, stride: int, size: int, first: int, end: int) -> tuple[slice, slice]:
    """The outputs `first` to `end` of which a tap lies on the image, and the pixels it lies on."""
    first = max(first, -(shift // stride) if shift < 0 else 0)
    end = max(first, min(end, (size - 1 - shift) // stride + 1))
    begin = first * stride + shift
    return slice(first, end), slice(begin, begin + stride * (end - first), stride)


# Arrays -----------------------------------------------------------------------------------------


def _pair(x: mx.array) -> tuple[mx.array, mx.array]:
    """`x` in one piece of memory, and a new array like it; both evaluated."""
    x, y = _in_one_piece(x), mx.zeros_like(x)
    mx.eval(y)
    return x, y


def _in_one_piece(x: mx.array) -> mx.array:
    """`x`, evaluated, in one piece of memory."""
    x = mx.contiguous(x)
    mx.eval(x)
    return x


def _flat(x: mx.array) -> np.ndarray:
    """The memory of an evaluated array."""
    return np.asarray(x).reshape(-1)


def _rows(x: mx.array) -> np.ndarray:
    """An evaluated array, of which at least the rows are in one piece of memory."""
    seen = np.asarray(x)
    return seen if seen.strides[-1] == seen.itemsize else np.ascontiguousarray(seen)


def _blocks(*arrays: mx.array) -> Iterator[list[np.ndarray]]:
    """The memory of arrays of one size, a block of each at a time."""
    size = 4 * BLOCK if _mkl() else BLOCK  # MKL divides it among its threads
    for start in range(0, arrays[0].size, size):
        yield [_flat(x)[start : start + size] for x in arrays]


# Vectors ----------------------------------------------------------------------------------------


@functools.cache
def _mkl() -> Any:
    """MKL, where it is the process's BLAS; else None."""
    blas = load_fast_blas()
    if not blas.name.startswith("MKL"):
        return None
    library = ctypes.CDLL(blas.path)
    return library if hasattr(library, "vmsCdfNorm") else None


def _exp(x: np.ndarray) -> None:
    """exp(x), into `x`."""
    _vector("vmsExp", x, x) if _mkl() else np.exp(x, out=x)


def _slope_of_gate(out: np.ndarray, rise: np.ndarray) -> None:
    """s (1 + rise (1 - s)), where s = 1 / (1 + exp(out)), into `out`. Changes `rise`."""
    _exp(out)
    odds = out.copy()
    out += 1
    np.divide(np.float32(1), out, out=out)
    odds *= out  # 1 - s, without what that rounds away
    rise *= odds
    rise += 1
    out *= rise


def _over_one_plus_exp(x: np.ndarray | np.float32, out: np.ndarray) -> None:
    """x / (1 + exp(out)), into `out`."""
    _exp(out)
    out += 1
    np.divide(x, out, out=out)


def _products(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """a[h] b[h] for every head h, into out[h]: MKL divides the heads among its threads."""
    is_transposed = b.strides[2] != b.itemsize
    stored = (a, b.swapaxes(1, 2) if is_transposed else b, out)
    if not (_mkl() and all(map(_has_rows, stored))):
        np.matmul(a, b, out=out)
        return
    sizes = map(ctypes.c_int, (a.shape[1], b.shape[2], a.shape[2]))
    places = [
        (ctypes.c_void_p(x.ctypes.data), ctypes.c_int(x.strides[1] // 4), x.strides[0] // 4)
        for x in stored
    ]
    (a_place, b_place, out_place), count = places, ctypes.c_int(len(a))
    _mkl().cblas_sgemm_batch_strided(
        *(MKL_ROW_MAJOR, MKL_NO_TRANS, MKL_TRANS if is_transposed else MKL_NO_TRANS),
        *(*sizes, ctypes.c_float(1), *a_place, *b_place, ctypes.c_float(0), *out_place, count),
    )


def _has_rows(x: np.ndarray) -> bool:
    """Whether the BLAS takes x (heads, rows, columns): one row after the other, each in one piece.

    It writes a line to standard error, and nothing into the result, where that is not so.
    """
    head, row, one = x.strides
    return one == x.itemsize and row >= x.shape[2] * x.itemsize and head >= 0


def _vector(function: str, *vectors: np.ndarray) -> None:
    """One of MKL's functions of vectors, each in one piece of memory; the last one is written."""
    pointers = (ctypes.c_void_p(x.ctypes.data) for x in vectors)
    getattr(_mkl(), function)(ctypes.c_int(vectors[0].size), *pointers, ctypes.c_int64(MKL_MODE))
