"""On which side of every kink a network computes, noted in one precision, followed in another.

Relu has a kink at 0, a clip at its ends, a pool where two pixels are equal: there a gradient jumps.
Of the many activations of a deep network some are at their kink but for rounding, so that float32
may be on the other side of it than float64, its gradient off by 1e-3 and more, and right. Between
the kinks everything is smooth: on the same sides the two differ by roundings alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from mlx_zoo.backend import ops
from mlx_zoo.errors import VerificationError
from mlx_zoo.verify.replaced import replaced


@contextmanager
def noted() -> Iterator[list[mx.array]]:
    """The sides of every kink that is passed meanwhile, in the order of execution."""
    sides: list[mx.array] = []
    own, own_clip, own_pool = mx.maximum, mx.clip, ops.max_pool

    def maximum(x, y):
        sides.append(x > y)
        return own(x, y)

    def clip(x, low, high):
        sides.append((x > low).astype(mx.int8) + (x >= high))
        return own_clip(x, low, high)

    def max_pool(x, *shape):
        sides.append(windows(x, *shape).argmax(axis=-1))
        return own_pool(x, *shape)

    with replaced([(mx, "maximum", maximum), (mx, "clip", clip), (ops, "max_pool", max_pool)]):
        yield sides


@contextmanager
def followed(sides: list[np.ndarray]) -> Iterator[None]:
    """The same sides again, wherever the values are. Raises VerificationError for another path."""
    rest = iter(sides)

    def following(shape: tuple[int, ...]) -> mx.array:
        side = next(rest, None)
        if side is None or side.shape != shape:
            raise VerificationError("the network takes another path in float64 than in float32")
        return mx.array(side)

    def maximum(x, y):
        return mx.where(following(x.shape), x, y)

    def clip(x, low, high):
        side = following(x.shape)
        return mx.where(side == 0, low, mx.where(side == 1, x, high))

    def max_pool(x, *shape):
        pixels = windows(x, *shape)
        side = following(pixels.shape[:-1])
        return mx.take_along_axis(pixels, side[..., None], axis=-1)[..., 0]

    with replaced([(mx, "maximum", maximum), (mx, "clip", clip), (ops, "max_pool", max_pool)]):
        yield


def windows(x: mx.array, kernel: int, stride: int, padding: int) -> mx.array:
    """The pixels of each window of a pool: (B, H, W, C) -> (B, H', W', C, kernel * kernel)."""
    edge = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    x = mx.pad(x, edge, constant_values=mx.array(-mx.inf, x.dtype))
    h, w = ((size - kernel) // stride + 1 for size in x.shape[1:3])
    places = [(i, j) for i in range(kernel) for j in range(kernel)]
    ends = stride * (h - 1) + 1, stride * (w - 1) + 1
    seen = [x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i, j in places]
    return mx.stack(seen, axis=-1)
