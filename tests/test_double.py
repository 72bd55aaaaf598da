"""MLX's operations in real float64: values and gradients are PyTorch's to its last digits."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mlx_zoo.verify import double
from mlx_zoo.verify.double import real_float64

rng = np.random.default_rng(0)


def random(*shape):
    return rng.standard_normal(shape)


def conv(stride, padding, groups):
    def ours(x, weight):
        return mx.conv2d(x, weight, stride, padding, 1, groups)

    def theirs(x, weight):
        x, weight = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
        return F.conv2d(x, weight, None, stride, padding, 1, groups).permute(0, 2, 3, 1)

    return ours, theirs


def as_given(x):
    return mx.array(x, mx.bool_ if x.dtype == bool else mx.float64)


def attention(mask=None, **how):
    def ours(q, k, v):
        seen = as_given(mask) if isinstance(mask, np.ndarray) else mask
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=seen)

    def theirs(q, k, v):
        seen = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else None
        return F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, is_causal=mask is CAUSAL)

    return ours, theirs


CAUSAL = "causal"
SEEN = np.array([[True, True, False, True, False]] * 5)
qkv = [random(2, 3, 5, 4) for _ in range(3)]
CASES = {  # names of MLX are looked up in the call, as in a network
    "exp": (lambda x: mx.exp(x), torch.exp, [10 * random(50)]),
    "sigmoid": (lambda x: mx.sigmoid(x), torch.sigmoid, [10 * random(50)]),
    "erf": (lambda x: mx.erf(x), torch.erf, [2 * random(50)]),
    "softmax": (lambda x: mx.softmax(x, axis=-1), lambda x: x.softmax(-1), [9 * random(4, 9)]),
    "logsumexp": (
        lambda x: mx.logsumexp(x, axis=0),
        lambda x: x.logsumexp(0),
        [9 * random(4, 9)],
    ),
    "logaddexp": (lambda x, y: mx.logaddexp(x, y), torch.logaddexp, [9 * random(30), random(30)]),
    "layer_norm": (
        lambda x, weight, bias: mx.fast.layer_norm(x, weight, bias, 1e-6),
        lambda x, weight, bias: F.layer_norm(x, (9,), weight, bias, 1e-6),
        [3 + random(4, 9), random(9), random(9)],
    ),
    "attention": (*attention(), qkv),
    "attention, causal": (*attention(CAUSAL), qkv),
    "attention, masked": (*attention(SEEN), qkv),
    "attention, added": (*attention(random(2, 1, 5, 5)), qkv),
    "conv2d": (*conv((1, 1), (0, 0), 1), [random(2, 6, 7, 4), random(8, 3, 3, 4)]),
    "conv2d, strided": (*conv((2, 3), (1, 2), 1), [random(2, 9, 8, 4), random(6, 3, 5, 4)]),
    "conv2d, grouped": (*conv((2, 2), (1, 1), 2), [random(2, 7, 7, 4), random(6, 3, 3, 2)]),
    "conv2d, depthwise": (*conv((1, 1), (1, 1), 4), [random(2, 7, 7, 4), random(8, 3, 3, 1)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    ours, theirs, inputs = CASES[name]
    given = [torch.from_numpy(x).requires_grad_() for x in inputs]
    wanted = theirs(*given)
    cotangent = random(*wanted.shape)
    wanted.backward(torch.from_numpy(cotangent))
    with real_float64():
        arrays = [mx.array(x, mx.float64) for x in inputs]
        values, found = mx.vjp(ours, arrays, [mx.array(cotangent, mx.float64)])
        mx.eval(values, found)
    for x, y in zip([*values, *found], [wanted, *(x.grad for x in given)], strict=True):
        assert x.dtype == mx.float64
        y = y.detach().numpy()
        np.testing.assert_allclose(x, y, atol=1e-13 * np.abs(y).max(), rtol=0)


def test_other_types_and_threads_get_mlxs_own():
    own = [getattr(module, name) for module, name, _ in double.EXACT]
    x = mx.array([0.5], mx.float32)
    before = np.array(mx.exp(x))
    with ThreadPoolExecutor(1) as pool, real_float64():
        assert mx.exp is not own[0]
        assert np.array_equal(mx.exp(x), before)
        assert e() == math.e
        assert pool.submit(e).result() != math.e
    assert [getattr(module, name) for module, name, _ in double.EXACT] == own


def e():
    with mx.stream(mx.cpu):
        return mx.exp(mx.array(1, mx.float64)).item()
