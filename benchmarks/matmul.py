"""What the BLAS is worth on Linux: MLX as installed, MLX under mlx_zoo, PyTorch.

    python benchmarks/matmul.py [--rounds 3] [--json]

Each contestant lives in a worker process of its own, and the rounds alternate between them, so a
machine that slows down slows all of them down. Float32 on the CPU; medians over the rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

MATMULS = {"matmul 1024x1024x1024": (1024, 1024, 1024), "matmul 197x768x3072": (197, 768, 3072)}
CONV = "conv 3x3 56x56x64"
WORKERS = {"mlx": "import mlx.core", "mlx_zoo": "import mlx_zoo", "torch": "import torch"}
GFLOP = {
    **{name: 2 * n * k * m / 1e9 for name, (n, k, m) in MATMULS.items()},
    CONV: 2 * 56 * 56 * 64 * 64 * 9 / 1e9,
}


def mlx_operations() -> dict[str, Callable[[], object]]:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)

    def product(n: int, k: int, m: int) -> Callable[[], object]:
        a, b = mx.random.normal((n, k)), mx.random.normal((k, m))
        mx.eval(a, b)
        return lambda: mx.eval(a @ b)

    x, w = mx.random.normal((1, 56, 56, 64)), mx.random.normal((64, 3, 3, 64))
    mx.eval(x, w)
    operations = {name: product(*shape) for name, shape in MATMULS.items()}
    return {**operations, CONV: lambda: mx.eval(mx.conv2d(x, w, padding=1))}


def torch_operations() -> dict[str, Callable[[], object]]:
    import torch

    def product(n: int, k: int, m: int) -> Callable[[], object]:
        a, b = torch.randn(n, k), torch.randn(k, m)
        return lambda: a @ b

    x, w = torch.randn(1, 64, 56, 56), torch.randn(64, 64, 3, 3)
    operations = {name: product(*shape) for name, shape in MATMULS.items()}
    return {**operations, CONV: lambda: torch.nn.functional.conv2d(x, w, padding=1)}


def work(contestant: str) -> None:
    """Serve rounds: an operation's name on stdin, its GFLOP/s on stdout."""
    exec(WORKERS[contestant])  # first of all: for MLX the order of imports is what is measured
    operations = torch_operations() if contestant == "torch" else mlx_operations()
    for line in sys.stdin:
        name = line.strip()
        operations[name]()  # warm the caches and wake the threads
        seconds: list[float] = []
        while len(seconds) < 3 or sum(seconds) < 0.2:
            start = time.perf_counter()
            operations[name]()
            seconds.append(time.perf_counter() - start)
        print(GFLOP[name] / statistics.median(seconds), flush=True)


def compare(rounds: int) -> dict[str, dict[str, float]]:
    """{operation: {contestant: median GFLOP/s}}"""
    contestants = [name for name in WORKERS if importlib.util.find_spec(name)]
    pipe, command = subprocess.PIPE, [sys.executable, __file__, "--worker"]
    workers = {
        name: subprocess.Popen([*command, name], stdin=pipe, stdout=pipe, text=True, bufsize=1)
        for name in contestants
    }
    figures: dict[str, dict[str, list[float]]] = {op: {c: [] for c in workers} for op in GFLOP}
    for _ in range(rounds):
        for operation in GFLOP:
            for contestant, worker in workers.items():
                assert worker.stdin
                assert worker.stdout
                worker.stdin.write(operation + "\n")
                figures[operation][contestant].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    return {op: {c: statistics.median(v) for c, v in by.items()} for op, by in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="machine-readable figures")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)

    result = compare(arguments.rounds)
    if arguments.json:
        return print(json.dumps({"unit": "GFLOP/s", "median": result}, indent=2))
    contestants = list(next(iter(result.values())))
    print(f"{'GFLOP/s, median':24}" + "".join(f"{c:>10}" for c in contestants), end="")
    print("".join(f"{'zoo/' + c:>12}" for c in contestants if c != "mlx_zoo"))
    for operation, by in result.items():
        ratios = (by["mlx_zoo"] / by[c] for c in contestants if c != "mlx_zoo")
        print(f"{operation:24}" + "".join(f"{v:10.1f}" for v in by.values()), end="")
        print("".join(f"{ratio:12.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
