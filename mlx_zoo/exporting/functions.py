"""A network as an MLX function: the forward pass and its weights in one .mlxfn file.

MLX's own libraries run it, without Python and without this package. In C++ (Linux, macOS):

    auto net = mlx::core::import_function("net.mlxfn");
    auto logits = net({images})[0];  // images: (1, 224, 224, 3) float32

and in Swift, with mlx-swift:

    let net = try importFunction(from: url)
    let logits = try net(images)[0]

Texts take two arguments of int32, (B, N) both: input_ids and attention_mask (1 for a token, 0 for
padding).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import registry
from mlx_zoo.backend import ops
from mlx_zoo.backend.inference import original_of
from mlx_zoo.hub import cache
from mlx_zoo.preprocess.image import as_sides
from mlx_zoo.zoo import kind_of

LENGTH = 128  # tokens, where nobody says how many


def export_function(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    batch: int | Sequence[int] = 1,
    length: int | Sequence[int] | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> Path:
    """Write the forward pass of a network, weights included, as `mx.import_function` reads it.

    The file holds one trace for each shape, all with the same weights; the reader takes the one
    that fits its arguments. (What a network computes from its shapes is a constant in a trace, so
    MLX's traces without shapes are of no use here.) Images are (B, H, W, C) of the network's own
    type; texts are input_ids and attention_mask, (B, N) int32. What comes out are the arrays that
    the network returns, in its order, without those it does not have.

    Args:
        model: a network of this package. It is traced in eval mode.
        path: of the file; replaced at once where it exists.
        batch: how many images or texts at a time, or several such numbers.
        length: how many tokens, or several such numbers; 128, or as many as fit, if not said.
        img_size: side of the images, or (H, W); if not said, that of the network or of its
            preprocessing, else 224.

    Raises:
        ValueError: numbers that the network does not take.
    """
    model = original_of(model)
    architecture = registry.of_model(model)
    target = Path(path).expanduser()
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file")
    batches = _counts("batch", batch)
    examples: list[tuple[mx.array, ...]]
    if architecture.inputs == "images":
        if length is not None:
            raise ValueError(f"length={length!r}: {architecture.name} takes images")
        examples = [_images(model, size, img_size) for size in batches]
    else:
        if img_size is not None:
            raise ValueError(f"img_size={img_size!r}: {architecture.name} takes tokens")
        longest = model.config.max_positions
        lengths = _counts("length", min(LENGTH, longest) if length is None else length)
        examples = [_tokens(model, B, N) for B in batches for N in lengths]
    target.parent.mkdir(parents=True, exist_ok=True)
    work = cache.working_folder(target.parent)
    was_training = model.training
    model.eval()
    try:
        with ops.plain():
            _trace(model, work / "net.mlxfn", examples)
        (work / "net.mlxfn").replace(target)
    finally:
        model.train(was_training)
        shutil.rmtree(work, ignore_errors=True)
    return target


def _trace(model: nn.Module, path: Path, examples: Sequence[tuple[mx.array, ...]]) -> None:
    architecture = registry.of_model(model)
    checkpoint = getattr(model, "checkpoint", None)
    said = {
        "architecture": architecture.name,
        "name": checkpoint.name if checkpoint else None,
        "task": getattr(model.config, "task", "image-classification"),
        "inputs": [[[*x.shape] for x in example] for example in examples],
        "labels": list(checkpoint.labels if checkpoint else ()),
    }

    def forward(*inputs: mx.array) -> tuple[mx.array, ...]:
        return tuple(_arrays(model(*inputs)))

    with mx.exporter(str(path), forward, metadata=json.dumps(said)) as write:
        for example in examples:
            write(*example)


def _arrays(output: Any) -> Iterator[mx.array]:
    """An array, or those of a named tuple of arrays and None."""
    if isinstance(output, mx.array):
        yield output
    elif output is not None:
        for item in output:
            yield from _arrays(item)


# Examples ---------------------------------------------------------------------------------------


def _counts(name: str, said: int | Sequence[int]) -> tuple[int, ...]:
    counts = tuple(said) if isinstance(said, (tuple, list)) else (said,)
    if not counts or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"{name}={said!r}: a count, or several, is needed")
    return counts


def _images(model: nn.Module, batch: int, size: int | tuple[int, int] | None) -> tuple[mx.array]:
    if size is None:
        how = getattr(getattr(model, "checkpoint", None), "preprocessing", None)
        size = getattr(model.config, "img_size", how.size if how else 224)
    return (mx.zeros((batch, *as_sides(size), model.config.in_chans), kind_of(model)),)


def _tokens(model: nn.Module, batch: int, length: int) -> tuple[mx.array, mx.array]:
    return mx.zeros((batch, length), mx.int32), mx.ones((batch, length), mx.int32)
