"""What two or more architectures use unchanged.

Letters in shape comments: B batch, H W C image, N tokens, D dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend import ops
from mlx_zoo.backend.ops import gelu, gelu_tanh, silu

# By the names that PyTorch's config files use. mlx.nn's own versions are wrapped in mx.compile,
# which on the CPU calls a C++ compiler at run time; these need none.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "quick_gelu": lambda x: silu(x, 1.702),
    "gelu_10": lambda x: mx.clip(gelu(x), -10, 10),
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
    "relu6": lambda x: mx.clip(x, 0, 6),
    "leaky_relu": lambda x: mx.maximum(x, 0.01 * x),
    "silu": silu,
    "swish": silu,
    "mish": lambda x: x * mx.tanh(mx.logaddexp(x, 0)),
    "hardswish": lambda x: x * mx.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + mx.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "sigmoid": lambda x: mx.sigmoid(x),
    "sqrtsoftplus": lambda x: mx.sqrt(mx.logaddexp(x, 0)),
    "tanh": mx.tanh,
    "linear": lambda x: x,
    "identity": lambda x: x,
}


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017). (B, N, D) -> (B, N, D)."""

    projects_together = True  # queries, keys and values are of the same tokens

    def __init__(
        self,
        dims: int,
        num_heads: int,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        scale: float | None = None,  # of the scores; None: 1 / sqrt(dims of a head)
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dims // num_heads) ** -0.5 if scale is None else scale
        self.q_proj = nn.Linear(dims, dims, qkv_bias)
        self.k_proj = nn.Linear(dims, dims, qkv_bias)
        self.v_proj = nn.Linear(dims, dims, qkv_bias)
        self.out_proj = nn.Linear(dims, dims)
        self.p = dropout
        self.dropout = nn.Dropout(dropout)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """`mask` is added to the scores and broadcasts to (B, heads, N, N), or is "causal".

        A `cache` takes the keys and values of x and gives those of all tokens so far.
        """
        q, k, v = map(self.heads, self.project(x))
        if cache is not None:
            k, v = cache.update(k, v)
        if self.training and self.p > 0:  # the fused kernel cannot drop weights
            scores = self.scale * q @ k.swapaxes(-1, -2)
            if isinstance(mask, str):
                mask = hidden(causal(q.shape[2], k.shape[2]), scores.dtype)
            weights = mx.softmax(scores if mask is None else scores + mask, axis=-1)
            y = self.dropout(weights) @ v
        else:
            y = ops.attention(q, k, v, scale=self.scale, mask=mask)
        return self.out_proj(y.swapaxes(1, 2).flatten(2))

    def project(self, x: mx.array) -> list[mx.array]:
        """Queries, keys and values, each (B, N, D)."""
        if "qkv" in self:  # the three layers as one, which `optimize_for_inference` made
            return list(mx.split(self.qkv(x), 3, axis=-1))
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def heads(self, x: mx.array) -> mx.array:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        return mx.unflatten(x, -1, (self.num_heads, -1)).swapaxes(1, 2)


def causal(N: int, length: int) -> mx.array:
    """Which of `length` tokens the last N see: (N, length), each itself and those before it."""
    return mx.tri(N, length, length - N, dtype=mx.bool_)


def hidden(visible: mx.array, dtype: mx.Dtype) -> mx.array:
    """What is added to the scores, so that only what is `visible` counts.

    Half of the lowest number: a row in which nothing is visible stays a row of numbers, which -inf
    would not leave, nor the lowest itself: a score below 0 and it make -inf in float16.
    """
    return mx.where(visible, mx.array(0, dtype), mx.array(mx.finfo(dtype).min / 2, dtype))


class MLP(nn.Module):
    """Two linear layers with an activation between them. (B, N, D) -> (B, N, D)."""

    def __init__(self, dims: int, hidden_dims: int, act: str = "gelu", dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, dims)
        self.act = ACTIVATIONS[act]
        self.dropout = nn.Dropout(dropout)  # between the layers

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.dropout(self.act(self.fc1(x))))


class LayerNorm(nn.LayerNorm):
    """Layer normalization (Ba et al. 2016, arXiv:1607.06450), whose gradients are right on CUDA."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.layer_norm(x, self.weight, self.get("bias"), self.eps)


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu & He 2018, arXiv:1803.08494), the channels grouped as in PyTorch."""

    def __init__(self, num_groups: int, dims: int, eps: float = 1e-5):
        super().__init__(num_groups, dims, eps, pytorch_compatible=True)

    def __call__(self, x: mx.array) -> mx.array:
        groups = mx.unflatten(x.flatten(1, -2), 2, (self.num_groups, -1))
        groups = groups.swapaxes(1, 2)  # (B, groups, H * W, C / groups)
        y = ops.layer_norm(groups.flatten(2), None, None, self.eps)
        y = y.reshape(groups.shape).swapaxes(1, 2).reshape(x.shape)
        return self.weight * y + self.bias


class BatchNorm(nn.BatchNorm):
    """Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167). (..., C) -> (..., C).

    In training by the statistics of the batch. The running ones move towards them by a part
    `momentum`, the variance as one estimates it without bias; they are float32 from then on.
    """

    # Sums an array over the processes among which a batch is divided; None: it is whole.
    over_processes: Callable[[mx.array], mx.array] | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return super().__call__(x).astype(x.dtype)
        if self.over_processes is None and x.size == x.shape[-1]:
            raise ValueError(
                f"a batch of shape {tuple(x.shape)} has one value of each channel: in training "
                "BatchNorm needs two; give more or larger images, or leave it in eval mode"
            )
        y, mean, var, count = ops.batch_norm(
            x, self.weight, self.bias, self.eps, self.over_processes
        )
        mean, var = mx.stop_gradient(mean), mx.stop_gradient(var * (count / (count - 1)))
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var
        return y


class Conv2d(nn.Conv2d):
    """A convolution, computed in the way that is fastest on the device. (B, H, W, C)."""

    def __init__(self, *sizes: Any, dilation: int = 1, **options: Any):
        if dilation != 1:
            raise ValueError(f"dilation={dilation}: this convolution has none")
        super().__init__(*sizes, **options)

    def __call__(self, x: mx.array) -> mx.array:
        return self.convolve(x, self.padding)

    def convolve(self, x: mx.array, padding: tuple[int, int]) -> mx.array:
        return ops.conv2d(
            x,
            self.weight,
            self.bias if "bias" in self else None,
            stride=self.stride,
            padding=padding,
            groups=self.groups,
        )


class MaxPool2d(nn.Module):
    """The largest of each window of pixels. (B, H, W, C) -> (B, H / stride, W / stride, C)."""

    def __init__(self, kernel: int, stride: int, padding: int):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def __call__(self, x: mx.array) -> mx.array:
        return ops.max_pool(x, self.kernel, self.stride, self.padding)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382), where a residual is added.

    In training each sample of the batch is dropped with probability `p`; the others are scaled by
    1 / (1 - p). The identity otherwise.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"drop_path={p} of a block: a part of 1 is needed")
        self.p = p

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.p == 0:
            return x
        kept = mx.random.bernoulli(1 - self.p, (x.shape[0], *[1] * (x.ndim - 1)))
        return mx.where(kept, x / max(1 - self.p, 1e-12), 0)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in (choices := list(choices)):
        raise ValueError(f"{name}={value!r}: one of {', '.join(choices)} is needed")


def check_count(name: str, value: int, least: int = 0, most: int = 2**28) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}={value!r}: a whole number from {least} to {most} is needed")


def check_transformer(config: Any) -> None:
    """Raise ValueError unless the sizes that every transformer's config has make sense."""
    check_choice("act", config.act, ACTIVATIONS)
    for name in ("dims", "num_heads", "mlp_dims"):
        check_count(name, getattr(config, name), 1, most=2**20)
    check_count("num_layers", config.num_layers, 1, most=1000)
    check_count("num_classes", config.num_classes)
    if not 0 < config.norm_eps < 1:
        raise ValueError(f"norm_eps={config.norm_eps}: a small number above 0 is needed")
    if config.dims % config.num_heads:
        raise ValueError(f"{config.dims} dims do not divide among {config.num_heads} heads")


def other_channels(weight: mx.array, in_chans: int) -> mx.array:
    """A convolution's weight (O, H, W, I) for another number of input channels, as timm does it.

    One channel takes the sum over I. Otherwise the channels repeat, scaled so that the response
    keeps its size.
    """
    if in_chans == 1:
        return weight.sum(axis=-1, keepdims=True)
    repeated = mx.concatenate([weight] * -(-in_chans // weight.shape[-1]), axis=-1)
    return repeated[..., :in_chans] * (weight.shape[-1] / in_chans)


COLOURS = (1, 3, 4)  # the channels of grey images, RGB and RGBA


def as_images(x: Any, channels: int) -> mx.array:
    """`x` as an array, if it is a float batch (B, H, W, channels). Raises ValueError otherwise."""
    x = as_array(x, "images")
    shape = tuple(x.shape)
    if x.ndim != 4:
        raise ValueError(
            f"images of shape {shape}: a batch (B, H, W, {channels}) is needed"
            + _as_batch(shape, channels)
        )
    if x.shape[-1] != channels:
        raise ValueError(f"images of shape {shape}{_what_channels(shape, channels)}")
    if 0 in shape:
        raise ValueError(f"images of shape {shape} are empty")
    if not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(
            f"images of type {str(x.dtype).split('.')[-1]}: floats are needed, scaled and "
            "normalised as the network was trained: model.checkpoint.preprocessing(images) does it"
        )
    return x


def _as_batch(shape: tuple[int, ...], channels: int) -> str:
    """What makes a batch of an array of another rank, where it can be told."""
    match shape:
        case (_, _, C) if channels == C:
            return "; use images[None]"
        case (C, _, _) if channels == C:
            return "; this looks like CHW, PyTorch's layout: use images.transpose(1, 2, 0)[None]"
        case (_, _, W) if channels == 1 and W not in COLOURS:
            return "; use images[..., None]"
        case (_, _) if channels == 1:
            return "; use images[None, ..., None]"
    return ""


def _what_channels(shape: tuple[int, ...], channels: int) -> str:
    """What is wrong with a batch whose last axis is not the channels of the network."""
    is_nchw = shape[1] == channels or (shape[1] in COLOURS and shape[-1] not in COLOURS)
    found = shape[1] if is_nchw else shape[-1]
    layout = (
        f" look like NCHW, PyTorch's layout; MLX's is NHWC, (B, H, W, {found}): "
        "use images.transpose(0, 2, 3, 1)"
    )
    number = (
        f"this network takes {channels} channels, not {found}; load it with in_chans={found} "
        "for these"
    )
    if not is_nchw:
        return f": {number}"
    return layout if found == channels else f"{layout}; and {number}"


def check_tokens(input_ids: mx.array, vocab_size: int, max_positions: int, past: int = 0) -> None:
    """Raise ValueError unless `input_ids` is a batch (B, N) of ids that the tables hold.

    `past` tokens came before them. MLX reads past the end of a table without a word.
    """
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"input_ids of shape {shape}: a batch (B, N) with B, N > 0 is needed")
    check_integers(input_ids, "input_ids")
    if past + shape[1] > max_positions:
        after = f" after {past}" if past else ""
        raise ValueError(
            f"{shape[1]} tokens{after}: this network has {max_positions} positions; truncate"
        )
    check_range(input_ids, vocab_size, "token id")


def check_integers(ids: mx.array, name: str) -> None:
    """Raise ValueError unless `ids` are integers; bools are none."""
    if not mx.issubdtype(ids.dtype, mx.integer):
        kind = str(ids.dtype).split(".")[-1]
        raise ValueError(f"{name} of type {kind}: integers are needed")


def check_same_shape(x: mx.array, input_ids: mx.array, name: str) -> None:
    """Raise ValueError unless there is one of `x` for every token."""
    if x.shape != input_ids.shape:
        shape, wanted = tuple(x.shape), tuple(input_ids.shape)
        raise ValueError(f"{name} of shape {shape}: input_ids have {wanted}")


def as_array(x: Any, name: str) -> mx.array:
    """`x` itself, or the array of a NumPy array or nested lists. Raises ValueError."""
    try:
        return x if isinstance(x, mx.array) else mx.array(x)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition(". ")[0]  # MLX goes on to list what it takes
        raise ValueError(f"{name}: {type(x).__name__} is not an array: {reason}") from error


def check_range(ids: mx.array, size: int, what: str) -> None:
    """Raise ValueError unless 0 <= ids < size. Not inside mx.compile, where values are unknown."""
    ends: Any
    try:
        ends = mx.stack([ids.min(), ids.max()]).tolist()  # a GPU is waited for once
    except ValueError:  # being traced
        return
    low, high = ends
    if low < 0 or high >= size:
        raise ValueError(f"{what} {low if low < 0 else high}: this network has {size}, from 0")
