"""What differs between a published PyTorch checkpoint and our module, as a value.

Most layers carry the same name in both worlds and need no row. A row says a difference: upstream's
layer on the left, ours on the right. `{i}` stands for a number, `{i+1}` for the number after it.

    Spec(layers={"blocks.{i}.attn.proj": "blocks.{i}.attn.out_proj"})
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Split:
    """One upstream layer that holds several of ours, stacked along its output axis."""

    layer: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Conv1D:
    """A linear layer that transformers stores (in, out) instead of (out, in)."""

    target: str | Split


def qkv(attention: str) -> Split:
    """A fused projection: queries, keys and values, in this order."""
    return Split(attention, ("q_proj", "k_proj", "v_proj"))


Row = str | Split | Conv1D


def weight_and_bias(*layers: str) -> tuple[str, ...]:
    """The names of the tensors of layers, for `drop`."""
    return tuple(f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias"))


@dataclass(frozen=True)
class Spec:
    """How one publisher names and stores the tensors of an architecture.

    layers:  upstream's layer (or bare tensor) -> ours. Whole names; at most one row matches.
    prefix:  what task models put before the body's names; stripped where present.
    heads:   layers outside that prefix (task heads). Exporting a network that has any writes the
             prefix, exporting a bare body does not, as transformers does.
    leaves:  old leaf names, anchored to a layer's own name: {"LayerNorm.gamma": "weight"}.
    tied:    a tensor (or layer) that is another one again. Where present it must be equal; where
             only it is present, it stands in for its twin.
    spare:   a tensor that fills the place of another where that one is absent, else is unused.
    drop:    tensors that a network may do without; `*` stands for anything, `{i}` for a number.
    """

    layers: Mapping[str, Row] = field(default_factory=dict)
    prefix: str = ""
    heads: tuple[str, ...] = ()
    leaves: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    spare: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when anything in the spec changes."""
        rows = {source: repr(row) for source, row in self.layers.items()}
        text = json.dumps({**asdict(self), "layers": rows}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
