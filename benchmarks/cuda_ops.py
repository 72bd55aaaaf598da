"""Operations on an NVIDIA GPU: MLX's own, the kernels of mlx_zoo.backend.cuda, PyTorch.

    python benchmarks/cuda_ops.py [--dtype float32] [--rounds 3] [--json]

Batch 64, float32 in TF32 on both sides; microseconds of one call, the median over rounds that
alternate between worker processes. A call's inputs are other ones than those of the call before,
and kernels are queued one by one: as one graph they would run side by side.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "bfloat16")
CALLS = 24  # in a round
COPIES = 3  # of the inputs
CONTESTANTS = ("mlx", "kernel", "torch")  # an operation may have no kernel

DEPTHWISE = ((112, 32, 3, 1), (112, 96, 3, 2), (56, 144, 3, 1), (28, 240, 5, 1), (14, 672, 5, 1))
TOKENS = ((64, 197), (64, 128), (8, 128))  # of ViT-B/16 at 224 pixels and BERT-base; 12 heads of 64
PIXELS = (64, 56, 56, 256)
Shapes = tuple[tuple[int, ...], ...]


def operations() -> dict[str, Shapes]:
    """{name: the shapes of its inputs, images as NHWC}"""
    found: dict[str, Shapes] = {
        "matmul 8192": ((8192, 8192), (8192, 8192)),
        "add": (PIXELS, PIXELS),
    }
    for side, C, k, stride in DEPTHWISE:
        found[f"depthwise silu {side} {C} {k} {stride}"] = ((64, side, side, C), (C, k, k, 1), (C,))
    found["max pool"] = ((64, 112, 112, 64),)
    found["silu"] = (PIXELS,)
    found["gelu"] = ((64, 197, 3072),)
    found["linear"] = ((64, 197, 768), (3072, 768), (3072,))
    for B, N in TOKENS:
        found[f"attention {B} {N}"] = ((B, N, 12, 64),) * 3
    return found


def with_mlx(name: str, is_kernel: bool) -> Callable[..., Any] | None:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_zoo.backend import cuda

    pool = nn.MaxPool2d(3, 2, 1)

    def depthwise(x, weight, bias):
        k, stride = map(int, name.split()[-2:])
        if is_kernel:
            return cuda.depthwise(x, weight, bias, stride, k // 2, "silu")
        y = mx.conv2d(x, weight, stride, k // 2, groups=x.shape[-1]) + bias
        return y * mx.sigmoid(y)

    def attention(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        if is_kernel:
            return cuda.attention(q, k, v, 0.125)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125)
        return mx.contiguous(y.swapaxes(1, 2))

    match name.split():
        case ["depthwise", *_]:
            return depthwise
        case ["attention", *_]:
            return attention
        case ["max", _]:
            return (lambda x: cuda.max_pool(x, 3, 2, 1)) if is_kernel else pool
        case ["silu" | "gelu" as act]:
            plain = nn.silu if act == "silu" else nn.gelu  # one fused pass, by mx.compile
            return (lambda x: cuda.activate(x, act)) if is_kernel else plain
        case ["matmul", _] if not is_kernel:
            return mx.matmul
        case ["add"] if not is_kernel:
            return mx.add
        case ["linear"] if not is_kernel:
            return lambda x, weight, bias: mx.addmm(bias, x, weight.T)
    return None


def with_torch(name: str) -> Callable[..., Any]:
    import torch
    from torch.nn import functional as F

    def depthwise(x, weight, bias):
        C, k, stride = map(int, name.split()[-3:])
        return F.silu(F.conv2d(x, weight, bias, stride, k // 2, groups=C))

    def attention(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

    named = {
        "depthwise": depthwise,
        "attention": attention,
        "max": lambda x: F.max_pool2d(x, 3, 2, 1),
        "silu": F.silu,
        "gelu": F.gelu,
        "matmul": torch.matmul,
        "add": torch.add,
        "linear": F.linear,
    }
    return named[name.split()[0]]


def is_images(name: str) -> bool:
    return name.split()[0] in ("depthwise", "max")


def work(contestant: str, dtype: str) -> None:
    """Serve rounds: an operation's name on stdin, its microseconds on stdout, or a dash."""
    timed = torch_timer(dtype) if contestant == "torch" else mlx_timer(dtype, contestant)
    for line in sys.stdin:
        microseconds = timed(line.strip())
        print("-" if microseconds is None else microseconds, flush=True)


def mlx_timer(dtype: str, contestant: str) -> Callable[[str], float | None]:
    import mlx.core as mx

    def timed(name: str) -> float | None:
        call = with_mlx(name, contestant == "kernel")
        if call is None or (contestant == "kernel" and "attention" in name and dtype != "float32"):
            return None
        shapes = operations()[name]
        inputs = [
            [mx.random.normal(s).astype(getattr(mx, dtype)) for s in shapes] for _ in range(COPIES)
        ]
        mx.eval(inputs)
        for copy in inputs:  # compiles what is to be compiled
            mx.eval(call(*copy))
        mx.synchronize()
        start = time.perf_counter()
        for i in range(CALLS):
            mx.async_eval(call(*inputs[i % COPIES]))
        mx.synchronize()
        return (time.perf_counter() - start) / CALLS * 1e6

    return timed


def torch_timer(dtype: str) -> Callable[[str], float]:
    import torch

    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def timed(name: str) -> float:
        call = with_torch(name)
        inputs = [
            [torch.randn(s, device="cuda").to(getattr(torch, dtype)) for s in operations()[name]]
            for _ in range(COPIES)
        ]
        if is_images(name):
            nchw = (0, 3, 1, 2)
            inputs = [
                [x.permute(nchw).contiguous() if x.ndim == 4 else x for x in copy]
                for copy in inputs
            ]
        for copy in inputs:
            call(*copy)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(CALLS):
            call(*inputs[i % COPIES])
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / CALLS * 1e6

    return timed


def compare(dtype: str, rounds: int) -> dict[str, dict[str, float | None]]:
    """{operation: {contestant: median microseconds}}"""
    present = [name for name in CONTESTANTS if name != "torch" or importlib.util.find_spec("torch")]
    pipe, command = subprocess.PIPE, [sys.executable, __file__, "--dtype", dtype, "--worker"]
    environment = os.environ | {"MLX_USE_CUDA_GRAPHS": "0"}
    workers = {
        name: subprocess.Popen(
            [*command, name], stdin=pipe, stdout=pipe, text=True, bufsize=1, env=environment
        )
        for name in present
    }
    figures: dict[str, dict[str, list[float]]] = {
        operation: {name: [] for name in present} for operation in operations()
    }
    for _ in range(rounds):
        for operation, by in figures.items():
            for name, worker in workers.items():
                assert worker.stdin
                assert worker.stdout
                worker.stdin.write(operation + "\n")
                if (answer := worker.stdout.readline().strip()) != "-":
                    by[name].append(float(answer))
    for worker in workers.values():
        worker.communicate()
    return {
        operation: {name: statistics.median(v) if v else None for name, v in by.items()}
        for operation, by in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="machine-readable figures")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.dtype)

    result = compare(arguments.dtype, arguments.rounds)
    if arguments.json:
        return print(json.dumps({"unit": "us", "median": result}, indent=2))
    title = f"us, median, {arguments.dtype}"
    print(f"{title:32}" + "".join(f"{name:>10}" for name in next(iter(result.values()))))
    for operation, by in result.items():
        cells = ("-" if v is None else f"{v:.1f}" for v in by.values())
        print(f"{operation:32}" + "".join(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    main()
