"""Weights in few bits, by MLX's own quantisation.

Linear and embedding layers are quantised in groups along their inputs; convolutions, norms and the
layers that an architecture names in `full_precision` (small heads, position tables) are not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import registry
from mlx_zoo.backend.inference import original_of

log = logging.getLogger("mlx_zoo")

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """How a network's layers were quantised, and which of them."""

    bits: int = 8
    group_size: int = 64  # inputs that share a scale and an offset
    layers: tuple[str, ...] = ()

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r}: one of {', '.join(map(str, BITS))} is needed")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size={self.group_size!r}: one of {sizes} is needed")


def quantize(model: nn.Module, bits: int = 8, *, group_size: int = 64) -> nn.Module:
    """Quantise a network in place, and return it; `model.quantization` says what was done.

    Args:
        model: a network of this package.
        bits: of a weight: 2, 3, 4, 5, 6 or 8.
        group_size: inputs that share a scale and an offset: 32, 64 or 128. Layers whose inputs it
            does not divide stay as they are; the log names them.

    Raises:
        ValueError: wrong numbers; a network that is quantised already, or that has nothing to
            quantise.
    """
    wish = Quantization(bits, group_size)
    architecture = registry.of_model(model)
    if original_of(model) is not model:
        raise ValueError("this network is optimised for inference: quantise its .original")
    if getattr(model, "quantization", None) is not None:
        raise ValueError("this network is quantised already")
    if getattr(model, "lora", None) is not None:
        raise ValueError("this network has adapters (LoRA): merge_lora(model) before, or add later")
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Embedding))
        and not any(fnmatchcase(name, pattern) for pattern in architecture.full_precision)
    }
    fitting = [name for name, layer in found.items() if layer.weight.shape[-1] % group_size == 0]
    if not fitting:
        why = "its layers are convolutions" if not found else f"no layer divides by {group_size}"
        raise ValueError(f"nothing to quantise in this {architecture.name}: {why}")
    if odd := sorted(found.keys() - set(fitting)):
        log.warning(
            "%d layers do not divide into groups of %d and stay as they are, %s first",
            *(len(odd), group_size, odd[0]),
        )
    model = quantize_layers(model, Quantization(wish.bits, wish.group_size, tuple(fitting)))
    mx.eval(model.parameters())
    return model


def quantize_layers(model: nn.Module, how: Quantization) -> nn.Module:
    """Quantise exactly the layers that `how` names, in place; nothing is computed yet.

    On the CPU wherever the network is: the same bits come out on every machine, and CUDA's quantize
    (mlx 0.32.4) reads transposed weights as if they were not.
    """
    layers = frozenset(how.layers)
    with mx.stream(mx.cpu):
        nn.quantize(
            model,
            group_size=how.group_size,
            bits=how.bits,
            class_predicate=lambda name, layer: name in layers,
        )
    model.quantization = how
    return model


def as_quantization(said: Any) -> Quantization | None:
    """What `load(quantize=)` takes: a number of bits, or fields of Quantization. ValueError."""
    if said is None or isinstance(said, Quantization):
        return said
    if isinstance(said, Mapping):
        if unknown := sorted(said.keys() - {"bits", "group_size"}):
            raise ValueError(f"quantize={said!r}: {', '.join(unknown)} is not bits or group_size")
        return Quantization(**said)
    return Quantization(said)
