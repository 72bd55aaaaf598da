"""Operations that networks call, and whose fastest way differs by device.

Each computes what its docstring says in MLX's own operations, or hands over to a kernel that gives
the same up to a few roundings, and was measured to be faster: `cpu` on Linux, `cuda`. So it is with
gradients, which have kernels on Linux's CPU alone.

MLX_ZOO_KERNELS=off in the environment, or `with plain():`, leaves everything to MLX; batches are
not divided then, either.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend import cpu, cuda

# Below these a kernel on the CPU gains nothing over a lazy operation.
FEW = 2**11  # elements
FEW_SCORES = 2**14  # of attention
IM2COL_BYTES = 2**24  # of the patches that a convolution on the CPU lays out at a time
IMAGE_CHANNELS = 4  # at most: an image is rarely trained, and its gradient would be for nothing

# To collect kernels into CUDA's graphs costs more than it saves where each runs for long: 10 to
# 25 % of a forward pass on an H200; decoding, of small kernels, is 6 % faster with them. MLX reads
# this at its first work on the GPU.
os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")

_here = threading.local()  # .without_gradients: whether this thread computes values alone
_wanted = os.environ.get("MLX_ZOO_KERNELS", "").strip().lower() != "off"


class Suspension:
    """What does not happen while anyone, in any thread, asks so: `with it.held():`."""

    def __init__(self) -> None:
        self.count = 0
        self.counting = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.counting:
            self.count += 1
        try:
            yield
        finally:
            with self.counting:
                self.count -= 1


_no_kernels = Suspension()


def plain() -> AbstractContextManager[None]:
    """For a while, MLX's own operations alone, in every thread."""
    return _no_kernels.held()


@contextmanager
def without_gradients() -> Iterator[None]:
    """For a while, in this thread, kernels give values alone: half of the time of a small one.

    To MLX they are constants then, so nothing may be differentiated through them.
    """
    before = _without_gradients()
    _here.without_gradients = True
    try:
        yield
    finally:
        _here.without_gradients = before


def _without_gradients() -> bool:
    return getattr(_here, "without_gradients", False)


def is_enabled() -> bool:
    """Whether anything but MLX's own operations may be used."""
    return _wanted and not _no_kernels.count


# Operations -------------------------------------------------------------------------------------


def gelu(x: mx.array) -> mx.array:
    """The exact form, x * Phi(x), by the error function."""

    def exact(x):
        return x * (1 + mx.erf(x * math.sqrt(0.5))) * 0.5

    on_cuda = partial(cuda.activate, act="gelu")
    return _fastest(exact, x, on_cpu=cpu.gelu, backward=cpu.gelu_backward, on_cuda=on_cuda)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh form of the GELU paper (Hendrycks & Gimpel 2016, arXiv:1606.08415), section 2."""

    def exact(x):
        return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))

    on_cuda = partial(cuda.activate, act="gelu_new")
    backward = cpu.gelu_tanh_backward
    return _fastest(exact, x, on_cpu=cpu.gelu_tanh, backward=backward, on_cuda=on_cuda)


def silu(x: mx.array, beta: float = 1.0) -> mx.array:
    """x * sigmoid(beta x) (Ramachandran et al. 2017, arXiv:1710.05941)."""

    def exact(x):
        return x * mx.sigmoid(x if beta == 1 else beta * x)

    on_cuda = partial(cuda.activate, act="silu") if beta == 1 else None
    on_cpu, backward = partial(cpu.silu, beta=beta), partial(cpu.silu_backward, beta=beta)
    return _fastest(exact, x, on_cpu=on_cpu, backward=backward, on_cuda=on_cuda)


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """softmax(scale q k^T + mask) v, for q (B, heads, N, D) and k, v (B, heads, M, D).

    `mask` broadcasts to (B, heads, N, M), or is "causal": of M tokens, the last N each see those
    before them.
    """

    arrays, visible = [q, k, v], mask
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:  # it may have gradients, too
        arrays, visible = [*arrays, mask.astype(q.dtype)], None

    def exact(q, k, v, added=visible):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=added)

    def on_cpu(q, k, v, added=visible):
        return cpu.attention(q, k, v, scale, _as_added(added, q.dtype))

    def backward(q, k, v, dy):
        return cpu.attention_backward(q, k, v, dy, scale, _as_added(visible, q.dtype))

    def on_cuda(q, k, v, added=visible):
        return cuda.attention(q, k, v, scale, added)

    (_, heads, N, _), M = q.shape, k.shape[2]
    is_large = math.prod(q.shape[:3]) * M >= FEW_SCORES
    is_usual = heads == k.shape[1] and k.shape == v.shape
    is_ours = is_large and is_usual and (N <= M or not isinstance(mask, str))
    return _fastest(
        exact,
        *arrays,
        on_cpu=on_cpu if is_ours else None,
        backward=backward if is_ours and len(arrays) == 3 else None,
        on_cuda=on_cuda if cuda.attends(q, k, v, mask) else None,
    )


def _as_added(mask: mx.array | str | None, dtype: mx.Dtype) -> mx.array | str | None:
    """What a mask of attention adds to the scores, where it is a matrix."""
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
        return mx.where(mask, 0, mx.finfo(dtype).min / 2)
    return mask


def conv2d(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> mx.array:
    """A convolution of (B, H, W, C) with (D, k, k, C / groups) -> (B, H', W', D)."""
    num_filters, *kernel_size, _ = weight.shape
    if (kernel_size, padding, groups) == ([1, 1], (0, 0), 1):  # a matrix product, without patches
        return _linear(x[:, :: stride[0], :: stride[1]], weight[:, 0, 0], bias)

    def exact(x, weight, bias=None):
        x = _convolved(x, weight, stride, padding, groups)
        return x if bias is None else x + bias

    is_square = all(first == second for first, second in (kernel_size, stride, padding))
    is_depthwise = 1 < groups == num_filters == x.shape[-1] and weight.shape[-1] == 1
    if not (is_square and is_depthwise):
        return exact(x, weight, bias)
    # Depthwise: each channel has a kernel of its own.
    on_cuda = partial(cuda.depthwise, stride=stride[0], padding=padding[0])
    return _fastest(
        exact,
        *((x, weight) if bias is None else (x, weight, bias)),
        on_cpu=partial(cpu.depthwise, stride=stride[0], padding=padding[0]),
        backward=partial(cpu.depthwise_backward, stride=stride[0], padding=padding[0]),
        on_cuda=on_cuda if cuda.convolves(x, weight) else None,
    )


def _linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """x (..., I) by weight (O, I), plus bias (O,)."""
    if bias is None:
        return x @ weight.T
    if mx.default_device() == mx.cpu:  # whose addmm copies the bias to every row first
        return x @ weight.T + bias
    return mx.addmm(bias, x, weight.T)


def _convolved(
    x: mx.array,
    weight: mx.array,
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
) -> mx.array:
    """As conv2d, without bias. On the CPU a few images at a time, whose patches fit the cache.

    The gradient of x has a kernel because MLX takes up to 100 times as long where the stride is 2.
    """
    num_pixels = math.prod(x.shape[1:3]) // math.prod(stride)
    patches = num_pixels * math.prod(weight.shape[1:3]) * x.shape[-1]
    size = max(1, IM2COL_BYTES // max(1, patches * x.dtype.size))

    def exact(x, weight):
        return mx.conv2d(x, weight, stride, padding, groups=groups)

    def backward(x, weight, dy):
        dweight = mx.vjp(partial(exact, x), [weight], [dy])[1]
        return [cpu.convolution_backward(x, weight, dy, stride, padding), *dweight]

    if not is_enabled() or mx.default_device() != mx.cpu:
        return exact(x, weight)
    has_backward = groups == 1 and x.shape[-1] > IMAGE_CHANNELS
    convolved = partial(_fastest, exact, backward=backward if has_backward else None)
    if len(x) <= size:
        return convolved(x, weight)
    return mx.concatenate([convolved(x[i : i + size], weight) for i in range(0, len(x), size)])


def spatial_mean(x: mx.array) -> mx.array:
    """The mean over the pixels of each image: (B, H, W, C) -> (B, 1, 1, C)."""
    if use_cpu_kernels([x]):  # the BLAS adds in several sums, on every core
        B, H, W, C = x.shape
        return (mx.full((1, H * W), 1 / (H * W)) @ x.reshape(B, H * W, C)).reshape(B, 1, 1, C)
    # In two steps: MLX's CPU adds one by one, and what rounding costs grows with a sum's length.
    return x.mean(axis=2, keepdims=True).mean(axis=1, keepdims=True)


Sum = Callable[[mx.array], mx.array]


def batch_norm(
    x: mx.array, weight: mx.array, bias: mx.array, eps: float, over_processes: Sum | None = None
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Each channel of x (..., C) by the mean and the deviation of its own values.

    `over_processes` sums an array over processes that share a batch: the statistics, and the
    gradients, are those of the whole batch then.

    Returns:
        y like x; and in float32 or wider mean (C,), variance (C,), and of how many values (1,).
        Of y alone are there gradients.
    """
    total = over_processes or (lambda sums: sums)

    def forward(x, weight, bias):
        wide = widened(x)
        sums = total(mx.concatenate([channel_sums(wide), mx.full((1,), x.size // x.shape[-1])]))
        count = sums[-1:]
        mean = sums[:-1] / count
        centred = wide - mean  # but for what the sum's roundings left, which is taken off below
        moments = mx.stack([channel_sums(centred), channel_sums(mx.square(centred))])
        rest, square = total(moments) / count
        var = square - mx.square(rest)
        scale = weight * mx.rsqrt(var + eps)
        y = centred * scale + (bias - rest * scale)
        return y.astype(x.dtype), mean + rest, var, count

    function: Any = mx.custom_function(forward)

    @function.vjp
    def vjp(primals, cotangents, outputs):  # fewer passes over the memory than MLX's own makes
        (x, weight, bias), (_, mean, var, count) = primals, outputs
        dy, inverse = widened(cotangents[0]), mx.rsqrt(var + eps)
        centred = widened(x) - mean
        own = mx.stack([channel_sums(dy), channel_sums(dy * centred)])
        constant, linear = total(own) / count  # of the whole batch
        dx = (weight * inverse) * (dy - centred * (linear * mx.square(inverse)) - constant)
        dbias, dweight = own[0], own[1] * inverse
        return dx.astype(x.dtype), dweight.astype(weight.dtype), dbias.astype(bias.dtype)

    return function(x, weight, bias)


def widened(x: mx.array) -> mx.array:
    """In float32, or float64 if it is."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def channel_sums(x: mx.array) -> mx.array:
    """The sum of each channel over everything else: (..., C) -> (C,)."""
    if use_cpu_kernels([x]):  # as for `spatial_mean`
        rows = x.reshape(-1, x.shape[-1])
        return (mx.ones((1, len(rows))) @ rows)[0]
    while x.ndim > 1:
        x = x.sum(axis=-2)
    return x


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """Each vector of x (..., D) by its own mean and deviation."""
    if x.shape[-1] % 4 == 0 or not cuda.available():
        return mx.fast.layer_norm(x, weight, bias, eps)
    # Of other widths MLX's gradient is wrong on CUDA.
    wide = widened(x)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    inverse = mx.rsqrt(mx.square(centred).mean(axis=-1, keepdims=True) + eps)
    y = centred * inverse if weight is None else centred * inverse * weight
    return (y if bias is None else y + bias).astype(x.dtype)


def max_pool(x: mx.array, kernel: int, stride: int, padding: int) -> mx.array:
    """The largest of each window: (B, H, W, C) -> (B, H', W', C). Padding is never the largest."""
    exact = nn.MaxPool2d(kernel, stride, padding)
    on_cuda = partial(cuda.max_pool, k=kernel, stride=stride, padding=padding)
    backward = partial(cpu.max_pool_backward, k=kernel, stride=stride, padding=padding)
    return _fastest(exact, x, backward=backward, on_cuda=on_cuda)


# Choosing ---------------------------------------------------------------------------------------

Kernel = Callable[..., mx.array]
Backward = Callable[..., list[mx.array]]


def _fastest(
    exact: Kernel,
    *arrays: mx.array,
    on_cpu: Kernel | None = None,
    backward: Backward | None = None,
    on_cuda: Kernel | None = None,
) -> mx.array:
    """What `exact` computes of the arrays, by a kernel where one is given for them and pays.

    `backward` is a kernel of the CPU for the gradients, of the arrays and that of the result.
    """
    if backward and not on_cpu and not _without_gradients():
        on_cpu = exact
    if on_cuda and use_cuda_kernels(arrays):
        return _differentiable(on_cuda, exact)(*arrays)
    if on_cpu and arrays[0].size >= FEW and use_cpu_kernels(arrays) and have_values(*arrays):
        return _differentiable(on_cpu, exact, backward)(*arrays)
    return exact(*arrays)


def use_cuda_kernels(arrays: Iterable[mx.array]) -> bool:
    """Whether kernels for these are on, and CUDA's: of one floating type."""
    dtypes = {x.dtype for x in arrays}
    return is_enabled() and len(dtypes) == 1 and dtypes <= {*cuda.DTYPES} and cuda.available()


def use_cpu_kernels(arrays: Iterable[mx.array]) -> bool:
    """Whether kernels for these are on, and the CPU's. (macOS has vector functions of its own.)"""
    return (
        is_enabled()
        and sys.platform == "linux"
        and mx.default_device() == mx.cpu
        and all(x.dtype == mx.float32 for x in arrays)
    )


def have_values(*arrays: Any) -> bool:
    """Whether there is something to compute with, and compute it.

    There is nothing while a function is traced (mx.compile, mx.vmap, mx.export_function).
    """
    try:
        mx.eval(*arrays)
    except (ValueError, RuntimeError):
        return False
    return True


def _differentiable(kernel: Any, exact: Any, backward: Backward | None = None) -> Any:
    """`kernel`, with the derivatives of `exact`, which computes the same.

    `backward` is a kernel for the CPU that computes the gradients of `exact`.
    """
    if _without_gradients():
        return kernel
    function: Any = mx.custom_function(kernel)

    @function.vjp
    def vjp(primals, cotangents, outputs):
        count, arrays = len(_as_list(primals)), [*_as_list(primals), *_as_list(cotangents)]

        def pulled(*arrays):
            return mx.vjp(exact, list(arrays[:count]), list(arrays[count:]))[1]

        if backward and use_cpu_kernels(arrays) and have_values(*arrays):
            found = _differentiable(backward, pulled)(*arrays)
        else:
            found = pulled(*arrays)
        return found if isinstance(primals, (tuple, list)) else found[0]

    @function.jvp
    def jvp(primals, tangents):
        pairs = zip(_as_list(primals), _as_list(tangents), strict=True)
        tangents = [mx.zeros_like(x) if tangent is None else tangent for x, tangent in pairs]
        _, found = mx.jvp(exact, _as_list(primals), tangents)
        return found[0] if len(found) == 1 else found

    @function.vmap
    def vmap(inputs, axes):
        inputs, axes = _as_list(inputs), axes if isinstance(axes, (tuple, list)) else [axes]
        return mx.vmap(exact, in_axes=tuple(axes))(*inputs), 0

    return function


def _as_list(arrays: Any) -> list[mx.array]:
    return list(arrays) if isinstance(arrays, (tuple, list)) else [arrays]
