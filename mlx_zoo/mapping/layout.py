"""Axes: PyTorch's order and MLX's. The only file of the package in which axes are moved.

Layout is decided by the *type* of the layer that receives a tensor, never by its shape: a 3x3
convolution of 3 channels into 32 is stored (32, 3, 3, 3) in both worlds.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

# Upstream's axes in our order; a layer type without a row keeps its axes.
AXES: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Conv1d: (0, 2, 1),  # O I L     -> O L I
    nn.Conv2d: (0, 2, 3, 1),  # O I H W   -> O H W I
    nn.Conv3d: (0, 2, 3, 4, 1),  # O I D H W -> O D H W I
    nn.ConvTranspose1d: (1, 2, 0),  # I O L     -> O L I
    nn.ConvTranspose2d: (1, 2, 3, 0),  # I O H W   -> O H W I
    nn.ConvTranspose3d: (1, 2, 3, 4, 0),  # I O D H W -> O D H W I
}

# Rows of a matrix that are turned at once: a processor's cache holds as many, and the copy takes
# a tenth of the time.
STRIP = 16

# The layers whose activations MLX keeps channels-last.
CHANNELS_LAST: tuple[type[nn.Module], ...] = (*AXES, nn.BatchNorm, nn.GroupNorm)


def axes_of(layer: nn.Module, ndim: int) -> tuple[int, ...]:
    """The permutation that takes a tensor of `layer` with `ndim` axes from PyTorch to MLX."""
    for kind, axes in AXES.items():
        if isinstance(layer, kind) and len(axes) == ndim:
            return axes
    return tuple(range(ndim))


def inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `axes`."""
    return tuple(axes.index(i) for i in range(len(axes)))


def permute(x: mx.array, axes: tuple[int, ...]) -> mx.array:
    """`x` with its axes in the order `axes`; `x` itself where nothing moves."""
    return x if axes == tuple(range(x.ndim)) else x.transpose(axes)


def stored_in_out(x: mx.array) -> mx.array:
    """(in, out) <-> (out, in): transformers' Conv1D and a linear layer. Its own inverse."""
    if x.ndim != 2 or x.shape[0] % STRIP:
        return x.T if x.ndim == 2 else x
    rows, columns = x.shape
    strips = mx.contiguous(x.reshape(-1, STRIP, columns).transpose(0, 2, 1))
    return mx.contiguous(strips.transpose(1, 0, 2)).reshape(columns, rows)


def channels_last(x, layer: nn.Module):
    """A PyTorch activation (B, C, ...) in the order that our `layer` gives it, (B, ..., C)."""
    if isinstance(layer, CHANNELS_LAST) and x.ndim > 2:
        return x.transpose(0, *range(2, x.ndim), 1)
    return x
