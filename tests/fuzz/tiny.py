"""Tiny networks with random specs: what each row should do is known, for it is made here twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch

from mlx_zoo.mapping.spec import Conv1D, Row, Spec, Split

from .pair import Pair

Source = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
WORDS = (
    "fc",
    "conv",
    "norm",
    "proj",
    "dense",
    "head",
    "embed",
    "cls",
    "w1",
    "w10",
    "ln_1",
    "Layer",
)


class Net(nn.Module):
    """A network of whatever children it is given."""


@dataclass
class Draft:
    """A pair in the making: PyTorch's shapes by name, ours, the spec, and what becomes of what."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)
    expected: dict[str, Source] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)


class Place(NamedTuple):
    """A layer's two names, and what is particular about it upstream."""

    ours: str
    theirs: str
    in_out: bool  # stored (in, out)
    parts: tuple[str, ...]  # of a fused layer
    is_old: bool  # gamma and beta for weight and bias


def tiny(chance: random.Random) -> Pair:
    """One to six layers or blocks of them, under other names and in other layouts upstream."""
    draft, model = Draft(), Net()
    words = chance.sample(WORDS, chance.randint(1, 5))
    for word in words:
        model[word] = _layer(draft, chance, word, word, [{}])
    if chance.random() < 0.6:
        count = chance.choice((1, 2, 2, 3, 11))
        model.blocks = [Net() for _ in range(count)]
        for word in chance.sample(WORDS, chance.randint(1, 3)):
            numbers = [{"i": i} for i in range(count)]
            layers = _layer(draft, chance, f"blocks.{{i}}.{word}", f"h.{{i}}.{word}", numbers)
            for block, layer in zip(model.blocks, layers if count > 1 else [layers], strict=True):
                block[word] = layer
    return _pair(draft, model, words, chance)


def _layer(draft: Draft, chance: random.Random, ours: str, theirs: str, numbers: list[dict]):
    """Draft the rows of a layer, or of one in every block; the layer, or a list of them."""
    start = chance.choice((0, 0, 1, 7)) if "{i}" in ours else 0
    renamed = chance.random() < 0.6
    kind = chance.choice(KINDS)
    if renamed:
        theirs = f"x_{theirs}".replace("{i}", f"{{i+{start}}}" if start else "{i}")
        theirs += chance.choice((".inner", ".0", "", ""))
    else:
        theirs = ours
    is_norm = kind is _norm and renamed and chance.random() < 0.5
    if is_norm:
        theirs += ".LayerNorm"
        draft.leaves |= {"LayerNorm.gamma": "weight", "LayerNorm.beta": "bias"}
    parts = ("q", "k", "v")[: chance.randint(2, 3)] if kind is _fused else ()
    in_out = kind in (_linear, _fused) and chance.random() < 0.4
    target: Row = Split(ours, parts) if parts else ours
    if in_out:
        target = Conv1D(target)
    if renamed or parts or in_out:
        draft.rows[theirs] = target
    seed = chance.random()
    made = []
    for values in numbers:
        name = ours.replace("{i}", str(values.get("i")))
        upstream = theirs.replace("{i}", str(values.get("i")))
        upstream = upstream.replace(f"{{i+{start}}}", str(values.get("i", 0) + start))
        own = random.Random(seed)  # all blocks are alike
        made.append(kind(draft, own, Place(name, upstream, in_out, parts, is_norm)))
    return made if len(made) > 1 else made[0]


def _take(name: str, move: Callable = lambda x: x) -> Source:
    return lambda state: move(state[name])


def _linear(draft: Draft, chance: random.Random, place: Place) -> Any:
    rows, columns, bias = chance.choice((2, 3)), chance.choice((2, 3)), chance.random() < 0.7
    draft.shapes[f"{place.theirs}.weight"] = (columns, rows) if place.in_out else (rows, columns)
    draft.expected[f"{place.ours}.weight"] = _take(
        f"{place.theirs}.weight", (lambda x: x.T) if place.in_out else lambda x: x
    )
    if bias:
        draft.shapes[f"{place.theirs}.bias"] = (rows,)
        draft.expected[f"{place.ours}.bias"] = _take(f"{place.theirs}.bias")
    return nn.Linear(columns, rows, bias)


def _fused(draft: Draft, chance: random.Random, place: Place) -> Any:
    heights = [chance.choice((2, 2, 3)) for _ in place.parts]
    total, columns, bias = sum(heights), chance.choice((2, 3, 6)), chance.random() < 0.7
    draft.shapes[f"{place.theirs}.weight"] = (columns, total) if place.in_out else (total, columns)
    if bias:
        draft.shapes[f"{place.theirs}.bias"] = (total,)
    layer, start = Net(), 0
    for part, height in zip(place.parts, heights, strict=True):
        rows = slice(start, start + height)
        draft.expected[f"{place.ours}.{part}.weight"] = _take(
            f"{place.theirs}.weight", lambda x, rows=rows: (x.T if place.in_out else x)[rows]
        )
        if bias:
            draft.expected[f"{place.ours}.{part}.bias"] = _take(
                f"{place.theirs}.bias", lambda x, rows=rows: x[rows]
            )
        layer[part] = nn.Linear(columns, height, bias)
        start += height
    return layer


def _convolution(draft: Draft, chance: random.Random, place: Place) -> Any:
    rank, outs, ins = chance.choice((1, 2)), chance.choice((2, 3)), chance.choice((2, 3))
    kernel = tuple(chance.choice((1, 2, 3)) for _ in range(rank))
    is_transposed = chance.random() < 0.3
    draft.shapes[f"{place.theirs}.weight"] = (
        *((ins, outs) if is_transposed else (outs, ins)),
        *kernel,
    )
    spatial = tuple(range(2, 2 + rank))
    axes = (1, *spatial, 0) if is_transposed else (0, *spatial, 1)
    draft.expected[f"{place.ours}.weight"] = _take(
        f"{place.theirs}.weight", lambda x: x.permute(axes)
    )
    kind = f"Conv{'Transpose' if is_transposed else ''}{rank}d"
    return getattr(nn, kind)(ins, outs, kernel if rank == 2 else kernel[0], bias=False)


def _norm(draft: Draft, chance: random.Random, place: Place) -> Any:
    dims = chance.choice((2, 3))
    leaves = ["weight", "bias"]
    is_batch = not place.is_old and chance.random() < 0.5
    if is_batch:
        leaves += ["running_mean", "running_var"]
        draft.buffers.append(f"{place.theirs}.num_batches_tracked")
    for leaf in leaves:
        upstream = {"weight": "gamma", "bias": "beta"}[leaf] if place.is_old else leaf
        draft.shapes[f"{place.theirs}.{upstream}"] = (dims,)
        draft.expected[f"{place.ours}.{leaf}"] = _take(f"{place.theirs}.{upstream}")
    return nn.BatchNorm(dims) if is_batch else nn.LayerNorm(dims)


def _embedding(draft: Draft, chance: random.Random, place: Place) -> Any:
    shape = chance.choice((3, 5)), chance.choice((2, 3))
    draft.shapes[f"{place.theirs}.weight"] = shape
    draft.expected[f"{place.ours}.weight"] = _take(f"{place.theirs}.weight")
    return nn.Embedding(*shape)


def _bare(draft: Draft, chance: random.Random, place: Place) -> Any:
    shape = tuple(chance.choice((1, 2, 3)) for _ in range(chance.randint(0, 4)))
    draft.shapes[place.theirs] = shape
    draft.expected[place.ours] = _take(place.theirs)
    return mx.zeros(shape)


KINDS = (_linear, _linear, _fused, _convolution, _norm, _embedding, _bare)


def _pair(draft: Draft, model: Net, words: list[str], chance: random.Random) -> Pair:
    prefix = chance.choice(("", "", "net."))
    tops = {name.partition(".")[0] for name in draft.shapes}
    heads = tuple(sorted(top for top in sorted(tops) if prefix and chance.random() < 0.3))

    def full(name: str) -> str:
        return name if name.partition(".")[0] in heads else prefix + name

    original = torch.nn.Module()
    for name, shape in draft.shapes.items():
        x = torch.from_numpy(_noise(shape, chance))
        _register(original, full(name), torch.nn.Parameter(x))
    for name in draft.buffers:
        _register(original, full(name), torch.tensor(chance.randrange(9)), is_buffer=True)
    ties, tied, spare = {}, {}, {}
    matrices = [n for n in draft.shapes if n.endswith(("embed.weight", "fc.weight"))]
    if matrices and chance.random() < 0.5:
        twin = chance.choice(matrices)
        _register(original, "lm_head.weight", original.get_parameter(full(twin)))
        ties["lm_head.weight"] = full(twin)
        is_whole = (
            f"{twin.removesuffix('weight')}bias" not in draft.shapes and chance.random() < 0.5
        )
        names = ("lm_head", twin.removesuffix(".weight")) if is_whole else ("lm_head.weight", twin)
        tied[names[0]] = names[1]
    biases = [n for n in draft.shapes if n.endswith(".bias")]
    if biases and chance.random() < 0.2:
        spare["spare.bias"] = chance.choice(biases)
    spec = Spec(
        layers=draft.rows,
        prefix=prefix,
        heads=heads,
        leaves=draft.leaves,
        tied=tied,
        spare=spare,
        drop=("*.num_batches_tracked", "h.{i}.mask", "mask"),
    )
    return Pair(
        name=f"tiny {sorted(draft.shapes)} {spec}",
        original=original,
        model=model.eval(),
        spec=spec,
        state={name: x.clone() for name, x in original.state_dict().items()},
        prefix=prefix,
        ties=ties,
        spare=spare,
        unused=(r".*\.num_batches_tracked", r"h\.[0-9]+\.mask", "mask"),
        idle=(r".*\.num_batches_tracked",),
        expected=lambda state: {
            ours: source(_Prefixed(state, full)) for ours, source in draft.expected.items()
        },
    )


class _Prefixed(dict):
    """A state dict, asked by names without the prefix."""

    def __init__(self, state: Mapping[str, torch.Tensor], full: Callable[[str], str]):
        super().__init__(state)
        self.full = full

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(self.full(name))


def _noise(shape: tuple[int, ...], chance: random.Random):
    return np.random.default_rng(chance.randrange(2**32)).standard_normal(shape).astype("f4")


def _register(module: torch.nn.Module, name: str, x: torch.Tensor, is_buffer: bool = False) -> None:
    """Put `x` under a dotted name, with whatever modules it takes."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module._modules[part]
    if is_buffer:
        module.register_buffer(leaf, x)
    else:
        module.register_parameter(leaf, x)
