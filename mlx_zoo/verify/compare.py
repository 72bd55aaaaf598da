"""Run a network and note what every layer gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo.backend import lanes, ops


def run(
    model: nn.Module, inputs: Mapping[str, np.ndarray], layers: Iterable[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Outputs by name, and what each of `layers` gave, in the order of execution."""
    with lanes.single(), _recording(model, frozenset(layers)) as seen:
        output = model(*(mx.array(x) for x in inputs.values()))
    return {name: as_numpy(x) for name, x in named(output)}, {
        name: as_numpy(x) for name, x in seen.items()
    }


def shapes(
    model: nn.Module, inputs: Mapping[str, np.ndarray], layers: Iterable[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """As `run`, but only the shapes: MLX is lazy, and nothing is computed."""
    with ops.plain(), _recording(model, frozenset(layers)) as seen:
        output = model(*(mx.array(x) for x in inputs.values()))
    return {name: x.shape for name, x in named(output)}, {n: x.shape for n, x in seen.items()}


def as_numpy(x: mx.array) -> np.ndarray:
    """In float32 or float64: NumPy has no bfloat16."""
    return np.array(ops.widened(x))


def image_size(model: nn.Module, size: int | None = None) -> int | tuple[int, int]:
    """Of the images that a network is shown: the only one it takes, `size`, or as published."""
    own = getattr(model.config, "img_size", size)
    how = model.checkpoint.preprocessing
    return own or (how.size if how else 224)


def random_inputs(
    kind: str, config: Any, size: int | tuple[int, int], seed: int, batch: int = 2
) -> dict[str, np.ndarray]:
    """Seeded inputs for a network of `kind` "images" or "tokens", a batch of two or more.

    Images are (B, H, W, C), of mean 0 and deviation 1. Tokens are (B, N): ids, a mask with the end
    of the second row left out, and token types.
    """
    rng = np.random.default_rng(seed)
    if kind == "images":
        height, width = (size, size) if isinstance(size, int) else size
        images = rng.standard_normal((batch, height, width, config.in_chans))
        return {"pixel_values": images.astype(np.float32)}
    assert isinstance(size, int)
    length = min(size, config.max_positions)
    shape: tuple[int, ...] = (batch, length)
    if config.task == "multiple-choice":
        shape = (batch, 3, length)
    mask = np.ones(shape, np.int32)
    mask[1, ..., length - length // 3 :] = 0
    inputs = {
        # 0 for padding alone: by it, transformers' GPT-2 finds the last token of a text.
        "input_ids": mask
        * rng.integers(min(1, config.vocab_size - 1), config.vocab_size, shape, np.int32),
        "attention_mask": mask,
    }
    if hasattr(config, "type_vocab_size"):
        types = rng.integers(0, config.type_vocab_size, shape, dtype=np.int32)
        inputs["token_type_ids"] = types
    return inputs


def named(output: Any) -> Iterator[tuple[str, mx.array]]:
    """What a network returns, by name."""
    if not hasattr(output, "_asdict"):
        yield "output", output
        return
    yield from ((name, x) for name, x in output._asdict().items() if x is not None)


@contextmanager
def _recording(model: nn.Module, names: frozenset[str]) -> Iterator[dict[str, mx.array]]:
    """MLX has no hooks: for a while, the modules become of classes that note what they return."""
    seen: dict[str, mx.array] = {}
    own: list[tuple[nn.Module, type]] = []
    for name, module in model.named_modules():
        if name in names:
            own.append((module, type(module)))
            module.__class__ = _noting(type(module), name, seen)
    try:
        yield seen
    finally:
        for module, kind in reversed(own):  # one that has two names was changed twice
            module.__class__ = kind


def _noting(kind: type, name: str, seen: dict[str, mx.array]) -> type:
    def __call__(self, *args, **kwargs):
        output = kind.__call__(self, *args, **kwargs)
        seen[name] = output
        return output

    return type(kind.__name__, (kind,), {"__call__": __call__})
