"""Weights in the order in which the CPU multiplies a few rows with them fastest.

Texts that are continued together go through a network one token of each at a time. MKL multiplies
4 to 32 rows with a weight (O, I) of which the memory holds the columns one after the other in 0.7
of the time that it takes with one that is held by rows, as a checkpoint's is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo.backend import ops
from mlx_zoo.backend.blas import load_fast_blas
from mlx_zoo.backend.inference import Optimized, copied

FEWEST = 4  # rows: of one there is no difference, and two or three are faster by rows
BLOCK = 64  # rows of a weight that are moved at a time


def for_rows(model: nn.Module, rows: int, tables: Sequence[str] = ()) -> nn.Module:
    """`model`, or where it pays, a network like it for inputs of so many rows, (rows, 1).

    Only an optimised network has such a twin, which is made once, and again where the weights are
    others. It takes the memory of its linear layers.

    Args:
        model: the network.
        rows: how many there are.
        tables: its embeddings that are a linear layer, too.
    """
    if not (rows >= FEWEST and isinstance(model, Optimized)):
        return model
    linear = [x for x in model.modules() if type(x) is nn.Linear]
    weights = [x.weight for x in [*linear, *(model[name] for name in tables)]]
    if not _pays(weights):
        return model
    made_of, twin = vars(model).get("_transposed", ([], None))
    if len(made_of) != len(weights) or not all(map(operator.is_, made_of, weights)):
        twin = _transposed(model, tables)
        vars(model)["_transposed"] = weights, twin  # no module of the network, so not by setattr
    return twin


class Table(nn.Embedding):
    """An embedding with its weight twice: by rows, which are looked up, and by columns."""

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.columns.T


def _pays(weights: Sequence[mx.array]) -> bool:
    """Whether the CPU multiplies with these, none quantised, by MKL: no other was measured."""
    is_mkl = load_fast_blas().name.startswith("MKL")
    return is_mkl and ops.use_cpu_kernels(weights)


def _transposed(model: nn.Module, tables: Sequence[str]) -> nn.Module:
    twin = copied(model)
    vars(twin).pop("_transposed", None)
    for layer in twin.modules():
        if type(layer) is nn.Linear:
            layer.weight = by_columns(layer.weight)
    for name in tables:
        twin[name].columns = by_columns(twin[name].weight)
        twin[name].__class__ = Table
    return twin


def by_columns(weight: mx.array) -> mx.array:
    """The same (O, I), of which the memory holds the columns one after the other.

    In blocks: MLX's own copy takes three times as long.
    """
    held = mx.zeros(weight.shape[::-1])
    mx.eval(weight, held)
    rows, columns = np.asarray(weight), np.asarray(held)
    for top in range(0, len(rows), BLOCK):
        columns[:, top : top + BLOCK] = rows[top : top + BLOCK].T
    return held.T
