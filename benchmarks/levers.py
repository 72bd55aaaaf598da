"""What each of the ways to be fast gives: the same network with one more of them at a time.

    python benchmarks/levers.py            # the CPU: some four minutes
    python benchmarks/levers.py gpt2       # of one network

In alternating rounds of one process; medians, in Markdown.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx_zoo  # before MLX, for its BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo.backend import lanes, ops

ROUNDS = 3
# Name -> the shapes of its inputs.
WORK: dict[str, list[tuple[int, ...]]] = {
    "resnet50": [(1, 224, 224, 3), (8, 224, 224, 3)],
    "vit_b_16": [(1, 224, 224, 3), (8, 224, 224, 3)],
    "efficientnet_b0": [(1, 224, 224, 3), (8, 224, 224, 3)],
    "bert_base_uncased": [(8, 128)],
    "gpt2": [(1, 512)],
}


def levers(model: nn.Module) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """Each adds to those before it."""
    fast = mlx_zoo.optimize_for_inference(model)
    return {
        "MLX alone": (model, ops.plain),
        "+ kernels": (model, nullcontext),
        "+ fused layers": (fast, lanes.single),
        "+ batch divided": (fast, nullcontext),
    }


def seconds(model: nn.Module, x: mx.array, how: Callable[[], Any]) -> float:
    with how():
        start = time.perf_counter()
        mx.eval(model(x))
        return time.perf_counter() - start


def main() -> None:
    columns: list[str] = []
    for name in sys.argv[1:] or WORK:
        model = mlx_zoo.load(name)
        ways = levers(model)
        if not columns:
            columns = ["work", *ways]
            print(f"| {' | '.join(columns)} |\n|---|{'---:|' * len(ways)}")
        for shape in WORK[name]:
            images = len(shape) == 4
            x = mx.random.normal(shape) if images else mx.array(np.random.randint(0, 30_000, shape))
            mx.eval(x)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for i in range(ROUNDS + 1):
                for way, (network, how) in ways.items():
                    spent = seconds(network, x, how)
                    if i:  # the first round warms up
                        times[way].append(spent)
            cells = [f"{1e3 * statistics.median(t):.0f} ms" for t in times.values()]
            size = f"batch {shape[0]}" if images else f"{shape[0]} x {shape[1]} tokens"
            print(f"| {name}, {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
