"""Whether float32 on a device is float32.

CUDA and the newer Apple GPUs multiply float32 matrices in TF32, whose mantissa has 10 bits of 23,
unless the environment variable MLX_ENABLE_TF32 is 0. MLX reads it once, at the first product on
the GPU: afterwards setting it has no effect.
"""

from __future__ import annotations


def real_float32(device: str = "gpu") -> bool:
    """Do products on `device` ("cpu", or "gpu" for the default device) keep 24 bits?

    A matrix product, a convolution and attention whose exact answer is one of their inputs, with
    all bits of a mantissa in use: whatever is computed with fewer differs. This computes, so it
    also settles what MLX does for the rest of the process.
    """
    import mlx.core as mx

    N = 256  # large enough for the kernels that matter; smaller products take others
    with mx.stream(mx.cpu if device == "cpu" else mx.default_device()):
        # Numbers above 1 whose last of 24 bits is set: no shorter mantissa holds them.
        x = 1 + (2 * mx.arange(N * N).reshape(N, N) + 1).astype(mx.float32) * 2.0**-23
        one = mx.eye(N)
        images = x.reshape(1, 16, 16, N)
        kernel = mx.zeros((N, 3, 3, N))
        kernel[:, 1, 1] = one
        tokens = x.reshape(1, 4, N, N // 4)
        chosen = mx.broadcast_to(mx.where(one > 0, 0.0, -1e9), (1, 4, N, N))  # each sees itself
        seen = mx.fast.scaled_dot_product_attention(
            mx.zeros_like(tokens), tokens, tokens, scale=1.0, mask=chosen
        )
        same = (
            mx.array_equal(x @ one, x),
            mx.array_equal(mx.conv2d(images, kernel, padding=1), images),
            mx.array_equal(seen, tokens),
        )
        return all(answer.item() for answer in same)
