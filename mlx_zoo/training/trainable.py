"""What of a network is trained: all of it, its head, its last blocks, or adapters (`lora`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_zoo import registry
from mlx_zoo.backend.inference import original_of
from mlx_zoo.training.lora import (
    LoRA,
    adapted,
    add_lora,
    freeze_all_but_adapters,
    is_quantized,
)
from mlx_zoo.training.parts import blocks_of, depth_of, head_of, own_parameters, part_of

__all__ = ["Part", "Trainable", "choose", "depth_of", "no_decay", "training_mode"]

POSITION_TABLES = ("position_embed", "wpe")
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Part:
    """How many parameters a part of a network has, and how many of them are trained."""

    name: str
    parameters: int
    trainable: int


@dataclass(frozen=True)
class Trainable:
    """What of a network is trained, part by part. Printed, a table.

    Running statistics are no parameters; those of quantised layers are counted as before.
    """

    method: str
    parts: tuple[Part, ...]

    @property
    def num_parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def num_trainable(self) -> int:
        return sum(part.trainable for part in self.parts)

    @property
    def percent(self) -> float:
        """Of all parameters, how many are trained."""
        return 100 * self.num_trainable / self.num_parameters

    def __str__(self) -> str:
        total = Part("all", self.num_parameters, self.num_trainable)
        rows = [("part", "parameters", "trainable", "%")]
        rows += [
            (p.name, f"{p.parameters:,}", f"{p.trainable:,}", f"{percent(p):.2f}")
            for p in (*self.parts, total)
        ]
        name, *numbers = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [
            "  ".join(
                [row[0].ljust(name), *(x.rjust(n) for x, n in zip(row[1:], numbers, strict=True))]
            )
            for row in rows
        ]
        return "\n".join([f"trained: {self.method}", *lines])


def percent(part: Part) -> float:
    return 100 * part.trainable / part.parameters if part.parameters else 0.0


def choose(model: nn.Module, method: str | LoRA = "full") -> Trainable:
    """Freeze all of a network but what a method trains; what that is, part by part.

    Args:
        model: a network of this package, in place.
        method:
            "full"    everything.
            "head"    what `reset_head` makes, and BERT's pooler before it.
            "last-N"  the head, the last N blocks (stages of a ResNet or EfficientNet) and what is
                      between them and the head: the final norm, an EfficientNet's last
                      convolution, a SigLIP's attention pooling.
            "lora"    adapters beside the queries and values of every block, and the head: LoRA().
            LoRA(...) other adapters. A network that has these already keeps them.

    Raises:
        ValueError: a method that there is not, or that this network does not take: no head of its
            own, fewer blocks, no linear layers, quantised weights.
    """
    registry.of_model(model)
    if original_of(model) is not model:
        raise ValueError("this network is optimised for inference: train its .original")
    lora = LoRA() if method == "lora" else method
    if isinstance(lora, LoRA):
        if not adapted(model):
            add_lora(model, lora)
        elif model.lora != lora:
            raise ValueError(f"this network has adapters already, of {model.lora}: merge_lora it")
        freeze_all_but_adapters(model)
        return _report(model, _in_words(lora), head_of(model))
    if adapted(model):
        raise ValueError(f"method={method!r}: this network has adapters: merge_lora(model) first")
    head = head_of(model)
    _train(model, _wanted(model, method, head))
    return _report(model, str(method), head)


def _in_words(lora: LoRA) -> str:
    return f"lora of rank {lora.rank}, alpha {lora.alpha:g}: {', '.join(lora.layers)}"


def _wanted(model: nn.Module, method: object, head: frozenset[str]) -> Callable[[str], bool]:
    """Whether a parameter of that name is trained."""
    if method == "full":
        return lambda name: True
    if method == "head":
        if not head:
            raise ValueError(
                "method='head': this network has no head of its own; load it with num_classes= or "
                "a task=, or train 'last-1', 'full' or 'lora'"
            )
        return lambda name: name.partition(".")[0] in head
    last = re.fullmatch(r"last-([0-9]{1,4})", method) if isinstance(method, str) else None
    if last is None:
        raise ValueError(f"method={method!r}: one of full, head, last-N, lora, LoRA(...) is needed")
    count, has = int(last[1]), len(blocks_of(model))
    if not 1 <= count <= has:
        raise ValueError(f"method={method!r}: this network has {has} blocks, from last-1")
    return lambda name: name.partition(".")[0] in head or depth_of(name, model) > has - count


def _train(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Freeze everything but the parameters that are wanted; running statistics are never trained.

    ValueError where one of them is quantised; the network is as it was then.
    """
    keys: list[tuple[nn.Module, list[str]]] = []
    for name, module in model.named_modules():
        own = [leaf for leaf in own_parameters(module) if wanted(f"{name}.{leaf}".lstrip("."))]
        if own and is_quantized(module):
            raise ValueError(
                f"{name} is quantised and cannot be trained: method='lora' trains adapters beside "
                "quantised layers"
            )
        keys.append((module, own))
    model.freeze()
    for module, own in keys:
        module.unfreeze(keys=own, recurse=False)


def _report(model: nn.Module, method: str, head: frozenset[str]) -> Trainable:
    sizes: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        trained = module.trainable_parameters()
        for leaf, x in own_parameters(module).items():
            if leaf in STATISTICS or (is_quantized(module) and leaf in ("scales", "biases")):
                continue
            size = x.size * 32 // module.bits if x.dtype == mx.uint32 else x.size
            part = part_of(f"{name}.{leaf}".lstrip("."), model, head)
            row = sizes.setdefault(part, [0, 0])
            row[0] += size
            row[1] += size if leaf in trained else 0
    order = ("stem", "embeddings", "blocks", "final layers", "head", "adapters")
    return Trainable(method, tuple(Part(name, *sizes[name]) for name in order if name in sizes))


def training_mode(model: nn.Module) -> None:
    """As `model.train()`, but for what has nothing to train: it stays in eval mode.

    A frozen BatchNorm keeps its statistics, and dropout in a frozen block is off. Dropout between
    the blocks belongs to the layer that takes its output.
    """
    model.train()
    for module in model.modules():
        if _has_parameters(module) and not tree_flatten(module.trainable_parameters()):
            module.eval()
    follows = False  # whether the layer that is next in use is trained
    for layer in reversed(list(_layers([*model.values()]))):
        if _has_parameters(layer):
            follows = layer.training
        else:
            layer.train(follows)


def _has_parameters(module: nn.Module) -> bool:
    return bool(tree_flatten(module.parameters()))


def _layers(values: list[Any]) -> Iterator[nn.Module]:
    """The modules among `values`, and in lists there, in order."""
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, list):
            yield from _layers(value)


def no_decay(name: str, parameter: mx.array, model: nn.Module) -> bool:
    """Whether weight decay leaves a parameter alone.

    Biases, norms and all else of one axis; position embeddings; tokens that are parameters
    themselves (class token, registers). Raises ValueError for a network of another package.
    """
    registry.of_model(model)
    *path, leaf = name.split(".")
    is_position = bool(path) and path[-1] in POSITION_TABLES
    return parameter.ndim <= 1 or leaf != "weight" or is_position
