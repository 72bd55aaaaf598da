"""The CUDA kernels against float64: as C++ threads on the CPU, as they are with `--device gpu`."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cuda_on_cpu import Compiler
from originals import DEVICE

from mlx_zoo.backend import cuda
from mlx_zoo.models.layers import ACTIVATIONS

HALVES = () if DEVICE == "cpu" else (mx.float16, mx.bfloat16)
ROUNDING = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def kernels(compiler, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(mx.fast, "cuda_kernel", compiler)
        cuda._kernel.cache_clear()
        yield
        cuda._kernel.cache_clear()
    else:
        assert cuda.available()
        yield


def normal(*shape, dtype=mx.float32, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(dtype)


def float64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def assert_close(found, wanted, tolerance):
    """Relative to the largest of what is wanted; what is no number is close to nothing."""
    found, wanted = float64(found), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


def convolved(x, weight, bias, stride, padding):
    x, weight = float64(x), float64(weight)[..., 0]
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    k = weight.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))
    y = np.einsum("bhwcij,cij->bhwc", windows[:, ::stride, ::stride], weight)
    return y if bias is None else y + float64(bias)


@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
@pytest.mark.parametrize(
    ("shape", "k", "stride", "padding"),
    [
        ((2, 6, 5, 12), 3, 1, 1),
        ((1, 8, 8, 7), 3, 2, ((0, 1), (1, 2))),  # as TensorFlow pads; channels one by one
        ((1, 5, 9, 300), 5, 1, 2),  # more channels than a block takes
        ((2, 7, 9, 4), 5, 2, ((1, 2), (2, 2))),
        ((1, 8, 7, 8), 7, 1, 0),
    ],
)
def test_depthwise(shape, k, stride, padding, dtype):
    C = shape[-1]
    x, weight = normal(*shape, dtype=dtype), normal(C, k, k, 1, dtype=dtype, seed=1)
    bias = None if k == 7 else normal(C, dtype=dtype, seed=2)
    pairs = ((padding,) * 2,) * 2 if isinstance(padding, int) else padding
    wanted = convolved(x, weight, bias, stride, pairs)
    if k == 3:
        wanted = wanted / (1 + np.exp(-wanted))
    found = cuda.depthwise(x, weight, bias, stride, padding, act="silu" if k == 3 else "linear")
    assert found.dtype == dtype
    assert_close(found, wanted, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
def test_max_pool(dtype):
    x = normal(2, 7, 6, 12, dtype=dtype)
    x[1, 3, 3, 5] = math.nan
    x[0, :, :, 2] = -math.inf
    with mx.stream(mx.cpu):
        wanted = nn.MaxPool2d(3, 2, 1)(x.astype(mx.float32))
    np.testing.assert_array_equal(float64(cuda.max_pool(x, 3, 2, 1)), float64(wanted))


@pytest.mark.parametrize("dtype", [mx.float32, *HALVES])
@pytest.mark.parametrize("act", cuda.ACTIVATIONS)
def test_activations_are_those_of_the_models(act, dtype):
    x = 5 * normal(2, 3, 20, dtype=dtype)
    with mx.stream(mx.cpu):
        wanted = ACTIVATIONS[act](x.astype(mx.float32))
    assert_close(cuda.activate(x, act), float64(wanted), ROUNDING[dtype])


def test_an_activation_of_a_sum():
    x, bias, added = normal(2, 3, 20), normal(20, seed=1), normal(2, 3, 20, seed=2)
    wanted = np.maximum(float64(x) + float64(bias) + float64(added), 0)
    assert_close(cuda.activate(x, "relu", bias, added), wanted, 1e-6)
    assert_close(cuda.activate(x, "relu", None, added), np.maximum(float64(x + added), 0), 1e-6)


def test_arrays_that_start_anywhere_in_memory():
    x, weight = normal(1 + 6 * 5 * 12)[1:].reshape(1, 6, 5, 12), normal(12, 3, 3, 1)
    assert_close(cuda.activate(x, "relu"), np.maximum(float64(x), 0), 1e-6)
    wanted = convolved(x, weight, None, 1, ((1, 1), (1, 1)))
    assert_close(cuda.depthwise(x, weight, None, 1, 1), wanted, 1e-6)
    with mx.stream(mx.cpu):
        wanted = nn.MaxPool2d(3, 2, 1)(x)
    np.testing.assert_array_equal(float64(cuda.max_pool(x, 3, 2, 1)), float64(wanted))


def attended(q, k, v, scale, mask):
    q, k, v = (float64(x) for x in (q, k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    N, M = scores.shape[-2:]
    if isinstance(mask, str):
        scores = np.where(np.tri(N, M, M - N), scores, -np.inf)
    elif mask is not None:
        scores = scores + float64(mask)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


HIDDEN = mx.finfo(mx.float32).min / 2


@pytest.mark.parametrize(
    ("N", "M", "D", "mask"),
    [
        (70, 70, 32, None),  # two steps through the keys, two blocks of queries
        (19, 70, 32, "causal"),
        (5, 9, 8, mx.where(mx.arange(9) % 2 == 0, 0.0, HIDDEN)[None, None, None]),
        (5, 9, 8, mx.where(mx.arange(5) == 3, HIDDEN, 0.0)[None, None, :, None]),  # sees nothing
        (5, 70, 8, mx.where(mx.arange(70) < 66, -math.inf, 0.0)[None, None, None]),  # nor a step
        (3, 3, 72, None),
    ],
)
def test_attention(N, M, D, mask):
    """Up to TF32's roundings, of arrays as layers have them: the heads after the tokens."""
    q = normal(2, N, 2, D).swapaxes(1, 2)
    k, v = (x.swapaxes(1, 2) for x in mx.split(normal(2, M, 2, 2 * D, seed=1), 2, axis=-1))
    found = cuda.attention(q, k, v, D**-0.5, mask)
    assert_close(found, attended(q, k, v, D**-0.5, mask), 2e-3)
    assert found.shape == q.shape


def test_attention_in_numbers_that_tf32_holds_is_exact():
    """A token that sees one other, and values of 10 bits: no rounding is left to hide behind."""
    one = 1000 * mx.eye(16)[None, None]
    v = mx.arange(16 * 16).reshape(1, 1, 16, 16).astype(mx.float32)
    np.testing.assert_array_equal(np.array(cuda.attention(one, one, v, 1.0)), np.array(v))


def test_what_attention_takes(monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    q = mx.zeros((1, 2, 4, 64))
    assert cuda.attends(q, q, q)
    assert cuda.attends(q, q, q, "causal")
    assert cuda.attends(q, q, q, mx.zeros((1, 1, 1, 4)))
    half, one, odd = q.astype(mx.float16), q[:, :, :1], mx.zeros((1, 2, 4, 12))
    assert not cuda.attends(half, half, half)  # cuDNN does it
    assert not cuda.attends(one, q, q)  # a token alone: MLX has a kernel
    assert not cuda.attends(q, one, one)
    assert not cuda.attends(odd, odd, odd)
    assert not cuda.attends(q, q[:, :1], q[:, :1])  # heads that share keys
    assert not cuda.attends(q, q, q, mx.ones((1, 1, 1, 4), mx.bool_))
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert not cuda.attends(q, q, q)


def test_what_depthwise_is_used_for():
    x, weight = mx.zeros((1, 8, 8, 4)), mx.zeros((4, 3, 3, 1))
    assert cuda.convolves(x, weight)
    assert not cuda.convolves(x.astype(mx.bfloat16), weight.astype(mx.bfloat16))
    assert not cuda.convolves(x, mx.zeros((4, 3, 5, 1)))
    assert not cuda.convolves(x, mx.zeros((4, 9, 9, 1)))


if DEVICE == "gpu":  # of MLX's own kernels

    def test_there_is_no_gradient_rather_than_a_wrong_one():
        with pytest.raises(ValueError, match="vjp"):
            mx.eval(mx.grad(lambda x: cuda.max_pool(x, 3, 2, 1).sum())(normal(1, 6, 6, 4)))


def test_it_is_available_on_an_nvidia_gpu_alone():
    assert cuda.available() == (DEVICE == "gpu")
