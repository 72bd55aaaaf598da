"""Layers that several architectures share, where no single one of them shows what they promise."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_zoo
from mlx_zoo.models.layers import Attention, DropPath, causal, hidden


def test_hidden_scores_stay_numbers_that_do_not_count():
    """Even of a row that sees nothing, in the narrowest range: -500 and the lowest are -inf."""
    scores = mx.array([[-500.0, 3.0], [-500.0, -500.0]], mx.float16)
    weights = mx.softmax(scores + hidden(mx.array([[1, 0], [0, 0]], mx.bool_), mx.float16), axis=-1)
    np.testing.assert_array_equal(weights, [[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize("past", [0, 7])
def test_the_fused_kernel_and_the_path_that_drops_weights_are_causal_alike(past):
    mx.random.seed(0)
    attn = Attention(32, 4, dropout=1e-7)  # so few that none is
    x = mx.random.normal((2, 12, 32))
    asked = {"mask": "causal", "cache": Past(past)}
    np.testing.assert_allclose(attn.train()(x, **asked), attn.eval()(x, **asked), atol=1e-5)
    spelt = hidden(causal(12, past + 12), x.dtype)
    np.testing.assert_allclose(attn(x, **asked), attn(x, spelt, Past(past)), atol=1e-5)
    assert mx.abs(attn(x, **asked) - attn(x, None, Past(past))).max() > 0.01


class Past:
    """A cache that has `length` tokens, always the same, and keeps none."""

    def __init__(self, length):
        self.past = mx.random.normal((2, 4, length, 8), key=mx.random.key(1))

    def update(self, k, v):
        return (mx.concatenate([self.past, x], axis=2) for x in (k, v))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_part_of_1_is_refused(p):
    with pytest.raises(ValueError, match="drop_path="):
        DropPath(p)
    for name in ("vit_digits", "efficientnet_digits"):
        with pytest.raises(ValueError, match="drop_path="):
            mlx_zoo.load(name, drop_path=p * 10)
