"""Where a parameter stands in a network: before the blocks, in one of them, or after; in its head.

Every network of this package has its layers in the order in which it uses them. Its blocks are
`blocks`, or `layer1`, `layer2`, ...; of a convolutional network each stage counts as one.
"""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import registry
from mlx_zoo.mapping import engine

STAGE = re.compile(r"layer[0-9]+")


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the blocks, or stages, in their order: "blocks.0", "blocks.1", ..."""
    found: list[str] = []
    for name, child in model.items():
        if name == "blocks":
            found += [f"blocks.{i}" for i in range(len(child))]
        elif STAGE.fullmatch(name):
            found.append(name)
    return tuple(found)


def head_of(model: nn.Module) -> frozenset[str]:
    """The attributes of a network that are its head: what `reset_head` makes afresh.

    Empty where the head is made of other layers: GPT-2's is the token embeddings, which are tied.
    """
    architecture = registry.of_model(model)
    body = architecture.outline(architecture.without_head(model.config))
    with_parameters = {name.partition(".")[0] for name in engine.parameters(model)}
    return frozenset(
        name for name in with_parameters if name in architecture.head_fields or name not in body
    )


def depth_of(name: str, model: nn.Module) -> int:
    """How deep a parameter is: 0 before the blocks, 1 to `num_blocks` in them, one more after.

    Of layer-wise learning rates (`layer_decay`), as BEiT has them (Bao et al. 2021,
    arXiv:2106.08254). Raises ValueError for a name that the network does not have.
    """
    blocks, order = blocks_of(model), list(model)
    for i, block in enumerate(blocks):
        if name.startswith(f"{block}."):
            return i + 1
    top = name.partition(".")[0]
    if top not in order:
        raise ValueError(f"{name}: this {type(model).__name__} has no such parameter")
    first = order.index(blocks[0].partition(".")[0])
    return 0 if order.index(top) < first else len(blocks) + 1


def part_of(name: str, model: nn.Module, head: frozenset[str]) -> str:
    """ "embeddings" (or "stem"), "blocks", "final layers", "head" or "adapters"."""
    if is_adapter(name):
        return "adapters"
    if name.partition(".")[0] in head:
        return "head"
    depth = depth_of(name, model)
    if depth == 0:
        return "stem" if "conv1" in model or "conv_stem" in model else "embeddings"
    return "blocks" if depth <= len(blocks_of(model)) else "final layers"


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is one of LoRA's."""
    return ".lora_a." in name or ".lora_b." in name


def own_parameters(module: nn.Module) -> dict[str, mx.array]:
    """The arrays of a module itself, without those of the modules in it."""
    return {leaf: x for leaf, x in module.items() if isinstance(x, mx.array)}
