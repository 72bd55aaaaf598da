"""A PyTorch network, and ours that it should fill."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch

from mlx_zoo.mapping.spec import Spec


@dataclass
class Pair:
    """A PyTorch network and ours. `state` is its state dict, by the names of a file."""

    name: str
    original: torch.nn.Module
    model: nn.Module
    spec: Spec
    state: dict[str, torch.Tensor]
    names: Mapping[str, str] = field(default_factory=dict)  # file's -> the original's, if others
    prefix: str = ""  # of the original's own names; files have it or not
    ties: Mapping[str, str] = field(default_factory=dict)  # a tensor that another stands in for
    spare: Mapping[str, str] = field(default_factory=dict)  # likewise, but they may differ
    # Expressions for names that a file may have or lack, whatever they hold.
    unused: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()  # expressions for the original's own that ours has no use for
    # By our names, what the tensors should become; None where only the way back is a witness.
    expected: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    outputs: Callable[[torch.nn.Module], np.ndarray] | None = None
    our_outputs: Callable[[nn.Module], mx.array] | None = None

    def __post_init__(self):
        self.own = dict(self.original.state_dict())
        self.needed = {
            name
            for name in self.own
            if name not in self.ties and name not in self.spare and not self._is_idle(name)
        }

    def canonical(self, state: Mapping[str, Any], notes: set[str] | None = None) -> dict[str, Any]:
        """A file's tensors by the original's own names; those without one keep theirs."""
        notes = set() if notes is None else notes
        found: dict[str, Any] = {}
        for name, x in state.items():
            bare = name.removeprefix(self.prefix) if self.prefix else name
            own = self._own(name)
            twins = {**self.ties, **self.spare}
            if own is None and bare in twins:
                notes.add("a tensor that stands in for another, or is not needed")
                own = None if (twin := self._own(twins[bare])) in found else twin
                if own is None or any(self._own(n) == twin for n in state if n != name):
                    continue
            elif own is None and any(re.fullmatch(p, n) for p in self.unused for n in (name, bare)):
                notes.add("a tensor that the spec drops by name")
                continue
            if own not in (None, name):
                is_other = name in self.names or self.prefix + name in self.names
                notes.add(
                    "another name of the same tensor, as files have it"
                    if is_other
                    else "the prefix of task models, there or not"
                )
            if own is not None and self.own[own].shape != x.shape and self._is_idle(own):
                notes.add("a tensor that the spec drops by name")
                x = self.own[own]
            if own is None or own in found:
                own = name  # without a home, or there twice: strict loading will say so
            found[own] = x
        for name in self.own.keys() - found.keys():
            twins = {**self.ties, **self.spare}
            twin = twins.get(name) or next((a for a, b in twins.items() if b == name), None)
            if twin in found:
                notes.add("a tied tensor, there once")
                found[name] = found[twin]
            elif name not in self.needed:
                notes.add("a tensor that the spec drops by name")
                found[name] = self.own[name]
        return found

    def as_loaded(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A file's tensors as the original's own library names them when it reads files."""
        found: dict[str, Any] = {}
        for name, x in state.items():
            known = self.names.get(name, name)
            found[name if known in state and known != name else known] = x
        return found

    def _is_idle(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.idle)

    def _own(self, name: str) -> str | None:
        """The original's name of a file's tensor, if it has one."""
        bare = name.removeprefix(self.prefix) if self.prefix else name
        names = [self.names.get(n, n) for n in (name, self.prefix + name, bare)]
        names += [n for known in names[:1] for n in (self.prefix + known,)]
        return next((n for n in names if n in self.own), None)
