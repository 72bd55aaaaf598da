"""What a network has to compute and to move, layer by layer; what the machine needs for it.

Counted where the layers are called, so an architecture needs no line here. Attention is what a
module with heads computes between its projections. What lies between layers is left out, as fused
kernels can do it on the way: the bound is one that no program is faster than.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


@dataclass(frozen=True)
class Work:
    """Of one call of one layer."""

    flops: int
    bytes: int


def count(model: nn.Module, call: Callable[[], Any]) -> tuple[list[Work], float]:
    """The work of `call`, which calls `model`; the share of parameters in layers that were seen.

    Nothing is computed but what a network itself looks at.
    """
    seen: dict[int, int] = {}
    work: list[Work] = []
    with _noting_calls(model, work, seen):
        call()
    total = sum(x.size for _, x in leaves(model))
    return work, sum(seen.values()) / max(total, 1)


def bound(work: list[Work], gflops: float, gb_per_second: float) -> tuple[float, float]:
    """Seconds that the work takes at least, and the share of them in which sums are the longer."""
    seconds = sums = 0.0
    for one in work:
        compute, move = one.flops / gflops / 1e9, one.bytes / gb_per_second / 1e9
        seconds += max(compute, move)
        sums += compute if compute > move else 0.0
    return seconds, sums / seconds if seconds else 0.0


def work_of(layer: nn.Module, x: mx.array, y: mx.array) -> Work:
    """Of a layer without parts, that made y out of x."""
    weights = sum(p.nbytes for _, p in leaves(layer))
    weight = layer.get("weight")
    flops = 0
    if isinstance(layer, nn.Embedding):
        return Work(0, x.nbytes + 2 * y.nbytes)  # the rows that are looked up
    if isinstance(weight, mx.array) and weight.ndim > 1:
        flops = 2 * weight.size * (y.size // weight.shape[0])
    return Work(flops, x.nbytes + y.nbytes + weights)


def attention(layer: nn.Module, x: mx.array) -> Work:
    """Of scores and what they weigh, in every head: x is (B, N, D)."""
    B, N, D = x.shape
    return Work(4 * B * N * N * D, 4 * x.nbytes)


def leaves(layer: nn.Module) -> Any:
    """(name, array) of every parameter."""
    return tree_flatten(layer.parameters())


@contextmanager
def _noting_calls(model: nn.Module, work: list[Work], seen: dict[int, int]) -> Iterator[None]:
    """For a while, the modules become of classes that note what they are given and return."""
    own: list[tuple[nn.Module, type]] = []
    for _, module in model.named_modules():
        has_heads = "num_heads" in vars(module) or "num_heads" in module
        if module.children() and not has_heads:
            continue
        own.append((module, type(module)))
        module.__class__ = _noting(type(module), has_heads, work, seen)
    try:
        yield
    finally:
        for module, kind in reversed(own):
            module.__class__ = kind


def _noting(kind: type, has_heads: bool, work: list[Work], seen: dict[int, int]) -> type:
    def note(self: Any, x: Any, y: Any) -> None:
        if has_heads:
            if getattr(x, "ndim", 0) == 3:
                work.append(attention(self, x))
        elif isinstance(x, mx.array) and isinstance(y, mx.array):
            work.append(work_of(self, x, y))
            seen[id(self)] = sum(p.size for _, p in leaves(self))

    def __call__(self, x, *args, **kwargs):
        y = kind.__call__(self, x, *args, **kwargs)
        note(self, x, y)
        return y

    methods: dict[str, Any] = {"__call__": __call__}
    if issubclass(kind, nn.Embedding):

        def as_linear(self, x):
            y = kind.as_linear(self, x)  # type: ignore[attr-defined]
            weight = self.weight
            size = x.nbytes + y.nbytes + weight.nbytes
            work.append(Work(2 * weight.size * (x.size // weight.shape[1]), size))
            seen[id(self)] = weight.size
            return y

        methods["as_linear"] = as_linear
    return type(kind.__name__, (kind,), methods)
