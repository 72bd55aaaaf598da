"""Operations with kernels of their own: they compute what MLX's operations compute."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mlx_zoo
from mlx_zoo.backend import cpu, ops

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or not ops.use_cpu_kernels(()), reason="kernels of Linux's CPU"
)

ACTIVATIONS = {
    "gelu": (ops.gelu, F.gelu),
    "gelu_tanh": (ops.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (ops.silu, F.silu),
    "quick_gelu": (lambda x: ops.silu(x, 1.702), lambda x: x * torch.sigmoid(1.702 * x)),
}


KERNELS = ("gelu", "gelu_tanh", "silu", "attention", "depthwise")


@pytest.fixture(autouse=True)
def seeded():
    mx.random.seed(0)


@pytest.fixture(params=["MKL", "NumPy"])
def vectors(request, monkeypatch):
    """With MKL's vector functions, and without."""
    if request.param == "NumPy":
        monkeypatch.setattr(cpu, "_mkl", lambda: None)
    elif cpu._mkl() is None:
        pytest.skip("MKL is not the BLAS of this process")
    return request.param


@pytest.fixture
def used(monkeypatch):
    """The names of the kernels that were used."""
    names = []

    def noting(name, kernel):
        def run(*arguments, **options):
            names.append(name)
            return kernel(*arguments, **options)

        return run

    for name in (*KERNELS, *(f"{name}_backward" for name in (*KERNELS, "convolution", "max_pool"))):
        monkeypatch.setattr(cpu, name, noting(name, getattr(cpu, name)))
    return names


def plainly(function, *arrays):
    with ops.plain():
        found = function(*arrays)
        mx.eval(found)
    return found


def largest(x, y):
    assert x.shape == y.shape
    return mx.abs(x - y).max().item()


# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_pytorch_in_float64(name, vectors, used):
    """To 1e-6 from end to end of what float32 can tell apart: tails, signed zeros, infinities."""
    ours, theirs = ACTIVATIONS[name]
    x = np.concatenate(
        [np.linspace(-120, 120, 200_001), np.linspace(-1e-3, 1e-3, 2001), [0.0, -0.0]]
    ).astype(np.float32)
    truth = theirs(torch.from_numpy(x).double()).numpy()
    found = np.array(ours(mx.array(x)))
    assert used
    assert np.abs(found - truth).max() < 1e-5  # at 120, where 8e-6 is the last bit
    near = np.abs(x) < 6
    assert np.abs(found - truth)[near].max() < 1e-6
    with np.errstate(invalid="ignore"):
        ends = np.array(ours(mx.array(np.tile(np.float32([np.inf, np.nan, 1e30, -1e30]), ops.FEW))))
    np.testing.assert_array_equal(ends[:4], np.float32([np.inf, np.nan, 1e30, 0]))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["rows", "columns", "every other", "broadcast"])
def test_activations_of_arrays_in_any_layout(name, layout, used):
    x = mx.random.normal((64, 8, 128)) * 3
    x = {
        "rows": x,
        "columns": x.swapaxes(0, 2),
        "every other": x[:, :, ::2],
        "broadcast": mx.broadcast_to(x[:1], x.shape),
    }[layout]
    function, before = ACTIVATIONS[name][0], np.array(x)
    assert largest(function(x), plainly(function, x)) < 2e-6
    assert used
    np.testing.assert_array_equal(np.array(x), before)  # what is given stays as it is


MASKS = {
    "none": None,
    "causal": "causal",
    "bool": mx.random.uniform(shape=(2, 1, 70, 90), key=mx.random.key(1)) > 0.5,
    "keys": mx.where(
        mx.random.uniform(shape=(2, 1, 1, 90), key=mx.random.key(2)) > 0.5, 0.0, -1e30
    ),
    "nothing": mx.full((2, 1, 1, 90), mx.finfo(mx.float32).min / 2),
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention(mask, vectors, used):
    q, k, v = (mx.random.normal((2, 4, n, 16)) for n in (70, 90, 90))
    found = ops.attention(q, k, v, scale=0.5, mask=MASKS[mask])
    assert used == ["attention"]
    as_torch = [torch.from_numpy(np.array(x)).double() for x in (q, k, v)]
    scores = 0.5 * as_torch[0] @ as_torch[1].mT
    if mask == "causal":
        scores = scores + torch.full((70, 90), -math.inf, dtype=torch.double).triu(90 - 70 + 1)
    elif mask == "bool":
        visible = torch.from_numpy(np.array(MASKS[mask]))
        scores = scores.masked_fill(~visible, -math.inf)
    elif mask == "keys":
        scores = scores + torch.from_numpy(np.array(MASKS[mask])).double()
    elif mask == "nothing":
        scores = torch.zeros_like(scores)  # each sees all alike
    truth = (scores.softmax(-1) @ as_torch[2]).numpy()
    assert np.abs(np.array(found) - truth).max() < 2e-6


CONVOLUTIONS = [
    (size, kernel, stride, padding)
    for size, kernel, stride in itertools.product([(33, 20), (7, 12), (2, 3)], (3, 5, 7), (1, 2, 3))
    for padding in {0, 1, kernel // 2}
    if min(size) + 2 * padding >= kernel
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CONVOLUTIONS)
def test_depthwise_convolutions(size, kernel, stride, padding, bias, used, monkeypatch):
    monkeypatch.setattr(ops, "FEW", 1)
    monkeypatch.setattr(cpu, "BLOCK", 1000)  # so that there are several blocks
    x, w = mx.random.normal((2, *size, 24)), mx.random.normal((24, kernel, kernel, 1))
    b = mx.random.normal((24,)) if bias else None

    def convolution(x, w, b):
        return ops.conv2d(x, w, b, stride=(stride,) * 2, padding=(padding,) * 2, groups=24)

    assert largest(convolution(x, w, b), plainly(convolution, x, w, b)) < 1e-5
    assert used == ["depthwise"]


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_single_pixels_are_matrix_products(stride):
    x, w, b = mx.random.normal((3, 9, 8, 16)), mx.random.normal((5, 1, 1, 16)), mx.ones((5,))
    found = ops.conv2d(x, w, b, stride=(stride, stride))
    assert largest(found, mx.conv2d(x, w, stride=stride) + b) < 1e-5


def test_many_images_are_convolved_a_few_at_a_time(monkeypatch):
    x, w = mx.random.normal((7, 12, 12, 8)), mx.random.normal((5, 3, 3, 8))
    monkeypatch.setattr(ops, "IM2COL_BYTES", 2 * 4 * 12 * 12 * 72)
    calls = []
    own = mx.conv2d
    monkeypatch.setattr(mx, "conv2d", lambda x, *a, **k: calls.append(len(x)) or own(x, *a, **k))
    found = ops.conv2d(x, w, padding=(1, 1))
    assert calls == [2, 2, 2, 1]
    assert largest(found, own(x, w, padding=1)) < 1e-6


# Gradients --------------------------------------------------------------------------------------


def pulled(function, *arrays):
    """The gradients from that of a result, which does not lie row by row in memory."""
    dy = mx.random.normal(function(*arrays).shape[::-1], key=mx.random.key(3)).transpose()
    return mx.vjp(function, list(arrays), [dy])[1], dy


def are_close(found, truth, bound=1e-5):
    for ours, other in zip(found, truth, strict=True):
        assert largest(ours, mx.array(other)) <= bound * max(1, np.abs(np.array(other)).max())


def in_float64(function, *arrays, dy):
    """PyTorch's gradients."""
    arrays = [torch.from_numpy(np.array(x)).double().requires_grad_() for x in arrays]
    function(*arrays).backward(torch.from_numpy(np.array(dy)).double())
    return [x.grad.float().numpy() for x in arrays]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_are_those_of_pytorch_in_float64(name, vectors, used):
    ours, theirs = ACTIVATIONS[name]
    ends = np.float32([0.0, -0.0, 1e30, -1e30])
    x = mx.array(np.concatenate([np.linspace(-120, 120, 200_001, dtype=np.float32), ends]))
    found = mx.grad(lambda x: ours(x).sum())(x)
    assert used == [used[0], f"{used[0]}_backward"]
    truth = torch.from_numpy(np.array(x)).clamp(-200, 200).double().requires_grad_()
    theirs(truth).sum().backward()
    assert largest(found, mx.array(truth.grad.float().numpy())) < 4e-7


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_of_arrays_in_any_layout(name, used):
    x = (mx.random.normal((64, 8, 128)) * 3)[:, ::2].swapaxes(0, 2)
    function = ACTIVATIONS[name][0]
    found, _ = pulled(function, x)
    are_close(found, plainly(lambda: pulled(function, x)[0]), 1e-6)
    assert len(used) == 3  # the result's shape is asked for, too


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rows", [1, 2**19])
def test_gradients_of_attention(mask, rows, vectors, used, monkeypatch):
    monkeypatch.setattr(cpu, "ROWS", rows * 4 * 90 * 11)  # in several blocks, or in one
    q, k, v = (mx.random.normal((2, n, 4, 16)).swapaxes(1, 2) for n in (70, 90, 90))

    def attention(q, k, v):
        return ops.attention(q, k, v, scale=0.5, mask=MASKS[mask])

    found, dy = pulled(attention, q, k, v)
    assert ("attention_backward" in used) == (mask in ("none", "causal", "bool"))

    def theirs(q, k, v):
        scores = 0.5 * q @ k.mT
        if mask == "causal":
            scores = scores + torch.full((70, 90), -math.inf, dtype=torch.double).triu(21)
        elif mask != "none":
            added = MASKS[mask]
            if added.dtype == mx.bool_:
                added = mx.where(added, 0, -1e30)
            scores = scores + torch.from_numpy(np.array(added))
        return scores.softmax(-1) @ v

    if mask != "nothing":  # whose weights PyTorch would not see as constants
        are_close(found, in_float64(theirs, q, k, v, dy=dy), 2e-6)
    are_close(found, plainly(lambda: pulled(attention, q, k, v)[0]), 2e-6)


GRADIENTS = [
    (size, kernel, stride, padding, groups)
    for size, kernel, stride, groups in itertools.product(
        [(13, 10), (8, 9)], (1, 3, 5, 7), (1, 2, 3), (1, 4, 8)
    )
    for padding in sorted({0, 1, kernel // 2})
]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "groups"), GRADIENTS)
def test_gradients_of_convolutions(size, kernel, stride, padding, groups, used, monkeypatch):
    monkeypatch.setattr(ops, "FEW", 1)
    monkeypatch.setattr(ops, "IM2COL_BYTES", 2 * 4 * 8 * kernel**2 * math.prod(size))
    monkeypatch.setattr(cpu, "BLOCK", 100)
    x = mx.random.normal((3, *size[::-1], 8)).swapaxes(1, 2)
    w = mx.random.normal((8, kernel, kernel, 8 // groups))
    b = mx.random.normal((8,)) if stride == 2 else None
    arrays = [x, w] if b is None else [x, w, b]

    def convolution(x, w, b=None):
        options = {"stride": (stride,) * 2, "padding": (padding,) * 2, "groups": groups}
        return ops.conv2d(x, w, b, **options)

    found, dy = pulled(convolution, *arrays)
    mx.eval(found)
    kernels = {name for name in used if name.endswith("_backward")}
    if groups == 1 and (kernel, padding) != (1, 0):
        assert kernels == {"convolution_backward"}
    elif groups == 8:
        assert kernels == {"depthwise_backward"}
    are_close(found, plainly(lambda: pulled(convolution, *arrays)[0]))

    def theirs(x, w, b=None):
        x, w = x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2)
        return F.conv2d(x, w, b, stride, padding, groups=groups).permute(0, 2, 3, 1)

    are_close(found, in_float64(theirs, *arrays, dy=dy))


def test_gradients_of_convolutions_of_oblongs(used, monkeypatch):
    monkeypatch.setattr(ops, "FEW", 1)
    x, w = mx.random.normal((2, 11, 14, 8)), mx.random.normal((6, 3, 5, 8))

    def convolution(x, w):
        return ops.conv2d(x, w, stride=(3, 2), padding=(0, 2))

    found, _ = pulled(convolution, x, w)
    assert "convolution_backward" in used
    are_close(found, plainly(lambda: pulled(convolution, x, w)[0]))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0)]
)
def test_gradients_of_pooling(kernel, stride, padding, used, monkeypatch):
    """Where several are the largest, as MLX gives them."""
    monkeypatch.setattr(ops, "FEW", 1)
    x = mx.random.normal((2, 9, 12, 8))

    def pool(x):
        return ops.max_pool(x, kernel, stride, padding)

    def theirs(x):
        return F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding).permute(0, 2, 3, 1)

    found, dy = pulled(pool, x)
    assert used == ["max_pool_backward"]
    are_close(found, in_float64(theirs, x, dy=dy), 1e-6)
    for other in (mx.round(x), mx.maximum(x, 0), -mx.ones_like(x)):
        are_close(pulled(pool, other)[0], plainly(lambda x=other: pulled(pool, x)[0]), 1e-6)


def test_gradients_add_up_where_an_array_is_used_again(monkeypatch):
    monkeypatch.setattr(ops, "FEW", 1)
    x, w = mx.random.normal((2, 9, 8, 8)), mx.random.normal((8, 3, 3, 8)) / 8

    def twice(x, w):
        y = ops.conv2d(x, w, padding=(1, 1))
        return ops.gelu(ops.conv2d(y + x, w, stride=(2, 2), padding=(1, 1))).sum() + y.sum()

    slopes = mx.grad(twice, argnums=(0, 1))
    before = np.array(x)
    found = slopes(x, w)
    are_close(found, plainly(slopes, x, w))
    are_close(mx.compile(slopes)(x, w), found)
    np.testing.assert_array_equal(np.array(x), before)


def test_gradients_for_many_at_once_and_of_gradients(monkeypatch):
    monkeypatch.setattr(ops, "FEW", 1)
    x, w = mx.random.normal((3, 2, 9, 8, 8)), mx.random.normal((8, 3, 3, 8)) / 8

    def loss(x, w):
        return (ops.silu(ops.conv2d(x, w, stride=(2, 2), padding=(1, 1))) ** 2).sum()

    slopes = mx.grad(loss)
    are_close([mx.vmap(slopes, in_axes=(0, None))(x, w)], [mx.stack([slopes(x, w) for x in x])])
    curvature = mx.grad(lambda w: (slopes(x[0], w) ** 2).sum())
    are_close([curvature(w)], [plainly(curvature, w)])
    dys = mx.random.normal((3, 2, 9, 8, 8))
    jacobian = mx.vmap(lambda dy: mx.vjp(ops.silu, [x[0]], [dy])[1][0])
    are_close([jacobian(dys)], [plainly(jacobian, dys)])


@pytest.mark.parametrize("of", ["gelu", "attention"])
def test_forward_derivatives_of_gradients(of):
    q, direction = mx.random.normal((2, 2, 4, 64, 64))

    def loss(q):
        y = ops.gelu(q) if of == "gelu" else ops.attention(q, q, q, scale=0.1, mask="causal")
        return (y**2).sum()

    def product(q):
        return mx.jvp(mx.grad(loss), [q], [direction])[1][0]

    are_close([product(q)], [plainly(product, q)])


def test_gradients_that_are_not_finite_do_not_warn():
    x = mx.full((2, 32, 32, 8), math.nan)
    for function in (ops.gelu, ops.gelu_tanh, ops.silu, lambda x: ops.max_pool(x, 3, 2, 1)):
        assert mx.isnan(mx.grad(lambda x, f=function: f(x).sum())(x)).all().item()


# When they are used -----------------------------------------------------------------------------


def test_small_arrays_and_other_types_are_left_to_mlx(used):
    x = mx.random.normal((4, ops.FEW))
    ops.silu(x[0, :-1])
    for dtype in (mx.float16, mx.bfloat16):
        assert ops.silu(x.astype(dtype)).dtype == dtype
    assert not used
    ops.silu(x)
    assert used == ["silu"]


def test_kernels_can_be_turned_off(used):
    x = mx.random.normal((ops.FEW,))
    with ops.plain():
        ops.silu(x)
    assert not used
    ops.silu(x)
    assert used
    code = "from mlx_zoo.backend import ops; print(ops.is_enabled())"
    for said, enabled in (("off", "False"), ("OFF", "False"), ("", "True")):
        environment = {**os.environ, "MLX_ZOO_KERNELS": said}
        asked = [sys.executable, "-c", code]
        assert subprocess.check_output(asked, env=environment, text=True).strip() == enabled


# Transformations --------------------------------------------------------------------------------


def network(x, w, b, q):
    """Uses every kernel, where the arrays are large enough."""
    x = ops.conv2d(x, w, b, stride=(2, 2), padding=(1, 1), groups=w.shape[0])
    for function in (ops.silu, ops.gelu, ops.gelu_tanh):
        x = function(x)
    tokens = x.reshape(1, 1, -1, 64)
    return ops.attention(q * tokens, tokens, tokens, scale=0.1, mask="causal")


def arguments():
    shapes = ((2, 28, 24, 64), (64, 3, 3, 1), (64,), (1, 1, 336, 64))
    return [mx.random.normal(shape) for shape in shapes]


def test_gradients_are_those_of_the_operations(used):
    arrays = arguments()

    def loss(*arrays):
        return (network(*arrays) ** 2).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    found = gradient(*arrays)
    assert set(used) == {*KERNELS, *(f"{name}_backward" for name in KERNELS)}
    for ours, truth in zip(found, plainly(gradient, *arrays), strict=True):
        assert largest(ours, truth) < 3e-5 * mx.abs(truth).max().item()  # roundings, through five


def test_forward_derivatives_are_those_of_the_operations():
    """Of convolutions MLX has none."""
    q, tangent = mx.random.normal((2, 1, 4, 150, 64))

    def tokens(q):
        for function in (ops.silu, ops.gelu, ops.gelu_tanh):
            q = function(q)
        return ops.attention(q, q, q, scale=0.1)

    def derivative(q):
        return mx.jvp(tokens, [q], [tangent])[1][0]

    found, truth = derivative(q), plainly(derivative, q)
    assert largest(found, truth) < 1e-5 * mx.abs(truth).max().item()


def test_traced_functions_use_the_operations(used):
    arrays = arguments()
    truth = plainly(network, *arrays)
    assert largest(mx.compile(network)(*arrays), truth) < 1e-5
    many = mx.vmap(ops.gelu)(arrays[0])
    assert not used
    assert largest(many, ops.gelu(arrays[0])) < 1e-6


@pytest.mark.parametrize("name", ["vit_digits", "efficientnet_digits", "bert_docs", "gpt2_docs"])
def test_networks_can_be_exported_as_functions(name, tmp_path):
    model = mlx_zoo.load(name, pretrained=True)
    x = mx.random.normal((2, 32, 32, 1)) if "digits" in name else mx.ones((2, 100), mx.int32)
    path = str(tmp_path / "function.mlxfn")
    mx.export_function(path, lambda x: first(model(x)), x)
    assert largest(mx.import_function(path)(x)[0], first(model(x))) < 1e-5


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_second_derivatives():
    x = mx.random.normal((ops.FEW,))

    def curvature(x):
        return mx.grad(lambda x: mx.grad(lambda x: (ops.gelu(x) ** 2).sum())(x).sum())(x)

    assert largest(curvature(x), plainly(curvature, x)) < 1e-4


# Unusual arrays ---------------------------------------------------------------------------------


def of_both(*args, **kwargs):
    fast = ops.attention(*args, **kwargs)
    with ops.plain():
        return fast, ops.attention(*args, **kwargs)


def is_close(a, b, bound=1e-5):
    return mx.abs(a - b).max().item() < bound


def heads(*shape):
    return [mx.random.normal(shape) for _ in range(3)]


def odd_arrays():
    q, k, v = heads(2, 4, 64, 16)
    yield "rows backwards", (q, k[:, :, ::-1], v[:, :, ::-1])
    yield "heads backwards", (q[:, ::-1], k[:, ::-1], v)
    yield "one row for all", (mx.broadcast_to(q[:, :, :1], q.shape), k, v)
    yield "one key for all", (q, mx.broadcast_to(k[:, :, :1], q.shape), v)
    yield "one value for all", (q, k, mx.broadcast_to(v[:, :, :1], q.shape))
    yield "fewer heads of keys", (q, k[:, :2], v[:, :2])
    yield "heads of one number", heads(2, 16, 64, 1)
    key, value = (mx.random.normal((2, 4, 16))[:, :, None] for _ in range(2))
    yield "one key", (mx.random.normal((2, 4, 4096, 16)), key, value)


@pytest.mark.parametrize(("name", "arrays"), list(odd_arrays()))
def test_attention_of_arrays_that_lie_oddly_in_memory(name, arrays):
    assert is_close(*of_both(*arrays, scale=0.25))

    def slopes(q, k, v):
        return pulled(lambda q, k, v: ops.attention(q, k, v, scale=0.25), q, k, v)[0]

    are_close(slopes(*arrays), plainly(slopes, *arrays))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_attention_takes_masks_of_other_types(dtype):
    assert is_close(
        *of_both(
            *heads(2, 4, 64, 16), scale=0.25, mask=mx.random.normal((1, 4, 64, 64)).astype(dtype)
        )
    )


def test_attention_has_a_gradient_of_its_mask():
    q, k, v = heads(2, 4, 64, 16)
    mask = mx.random.normal((1, 4, 64, 64))
    slope = mx.grad(lambda mask: (ops.attention(q, k, v, scale=0.25, mask=mask) ** 2).sum())
    fast = slope(mask)
    with ops.plain():
        exact = slope(mask)
    assert mx.abs(exact).max().item() > 0.1
    assert is_close(fast, exact, 1e-4)


def test_plain_ends_with_the_last_of_them():
    first, second = ops.plain(), ops.plain()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not ops.is_enabled()
    second.__exit__(None, None, None)
    assert ops.is_enabled()
