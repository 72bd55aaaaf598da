"""Apply a Spec: PyTorch's tensors to ours and back. Pure: no files, no network, no torch.

`links` pairs every parameter of a network with the upstream tensor that fills it. Both directions
read that one table, so each is the inverse of the other, and coverage is a comparison of two sets
of names. Everything that does not fit is collected and raised in one `MappingError`.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_zoo.errors import MappingError
from mlx_zoo.mapping.layout import axes_of, inverse, permute, stored_in_out
from mlx_zoo.mapping.spec import Conv1D, Row, Spec, Split

log = logging.getLogger("mlx_zoo")

StateDict = Mapping[str, mx.array]

PIECE = 1 << 18  # values that are looked at together: a processor's cache holds as many


@dataclass(frozen=True)
class Link:
    """One upstream tensor and the parameters of ours that it holds.

    Several targets are stacked upstream along axis 0 (after a Conv1D's transpose), in this order.
    """

    source: str  # without the spec's prefix
    targets: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # ours, one for each target
    axes: tuple[int, ...]  # upstream's axes in our order
    in_out: bool  # stored (in, out)
    is_table: bool = False  # of an embedding, a row for each entry

    @property
    def upstream_shape(self) -> tuple[int, ...]:
        """The shape that the upstream tensor must have."""
        upstream = [tuple(shape[i] for i in inverse(self.axes)) for shape in self.shapes]
        stacked = upstream[0] if len(upstream) == 1 else (sum(self._heights), *upstream[0][1:])
        return stacked[::-1] if self.in_out and len(stacked) == 2 else stacked

    @property
    def _heights(self) -> tuple[int, ...]:
        """How many rows of the upstream tensor each target takes."""
        return tuple(shape[inverse(self.axes)[0]] for shape in self.shapes)

    def to_mlx(self, x: mx.array) -> Iterator[tuple[str, mx.array]]:
        """Our parameters out of the upstream tensor."""
        x = stored_in_out(x) if self.in_out else x
        if len(self.targets) == 1:
            yield self.targets[0], permute(x, self.axes)
            return
        ends = list(accumulate(self._heights))[:-1]
        for target, piece in zip(self.targets, mx.split(x, ends, axis=0), strict=True):
            yield target, permute(piece, self.axes)

    def to_torch(self, weights: StateDict) -> mx.array:
        """The upstream tensor out of our parameters."""
        pieces = [permute(weights[target], inverse(self.axes)) for target in self.targets]
        x = mx.concatenate(pieces, axis=0) if len(pieces) > 1 else pieces[0]
        return stored_in_out(x) if self.in_out else x


def to_mlx(state_dict: StateDict, model: nn.Module, spec: Spec) -> dict[str, mx.array]:
    """The parameters of `model`, by our names and in our layout, from a PyTorch state dict.

    Raises MappingError with every problem at once: a tensor without a home, a parameter that
    nothing fills or that is filled twice, a wrong shape or type, tied tensors that differ.
    float64 becomes float32 (logged); other float types are kept bit for bit.
    """
    table = links(model, spec)
    tensors, problems = _cover(state_dict, table, spec)
    if problems:
        raise MappingError("this checkpoint does not fit the network", tuple(problems))
    doubles = [source for source, x in tensors.items() if x.dtype == mx.float64]
    if doubles:
        log.warning("%d float64 tensors become float32, %s first", len(doubles), doubles[0])
    weights: dict[str, mx.array] = {}
    for link in table:
        x = tensors[link.source]
        if x.dtype == mx.float64:  # float64 lives on the CPU only
            x = x.astype(mx.float32, stream=mx.cpu)
        weights.update(link.to_mlx(x))
    return weights


def to_torch(
    weights: StateDict, model: nn.Module, spec: Spec, twins: Iterable[str] = ()
) -> dict[str, mx.array]:
    """The PyTorch state dict of `model`'s parameters `weights`: upstream's names and layout.

    `twins` are tied and spare tensors, without the prefix, that are to be written as well.
    """
    state = {link.source: link.to_torch(weights) for link in links(model, spec)}
    for name in twins:
        state[name] = state[_twin(name, spec) or spec.spare[name]]
    prefixed = any(_is_head(source, spec) for source in state)
    return {_with_prefix(name, spec) if prefixed else name: x for name, x in state.items()}


def batch_counters(state: StateDict) -> dict[str, mx.array]:
    """The buffer that PyTorch's BatchNorms have beside their statistics: batches seen, 0.

    It is read where `momentum=None` alone, but load_state_dict(strict=True) wants it.
    """
    norms = (name.removesuffix("running_mean") for name in state if name.endswith(".running_mean"))
    return {f"{norm}num_batches_tracked": mx.array(0, mx.int64) for norm in norms}


def mismatches(state_dict: StateDict, model: nn.Module, spec: Spec) -> tuple[str, ...]:
    """What keeps `spec` from covering a state dict; () if nothing does."""
    return tuple(_cover(state_dict, links(model, spec), spec)[1])


def links(model: nn.Module, spec: Spec) -> tuple[Link, ...]:
    """Every parameter of `model` with the upstream tensor that fills it, in the model's order."""
    modules = dict(model.named_modules())
    grouped: dict[str, list[tuple[int, str, mx.array, bool]]] = defaultdict(list)
    for name, parameter in parameters(model).items():
        source, part, in_out = _source_of(name, spec)
        grouped[source].append((part, name, parameter, in_out))
    table = []
    for source, found in grouped.items():
        found.sort(key=lambda item: item[0])
        parts = [part for part, *_ in found]
        if parts != list(range(len(parts))):
            names = ", ".join(name for _, name, *_ in found)
            raise MappingError(f"the spec fills {names} from one tensor, {source}")
        _, first, parameter, in_out = found[0]
        layer = modules[_split(first)[0]]
        axes, is_table = axes_of(layer, parameter.ndim), isinstance(layer, nn.Embedding)
        shapes = tuple(tuple(parameter.shape) for _, _, parameter, _ in found)
        targets = tuple(name for _, name, *_ in found)
        table.append(Link(source, targets, shapes, axes, in_out, is_table))
    return tuple(table)


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Every parameter of `model`, running statistics included, by its whole name."""
    return dict(tree_flatten(model.parameters()))


def num_parameters(model: nn.Module) -> int:
    """As publishers count them: without running statistics, frozen layers included."""
    statistics = (".running_mean", ".running_var")
    return sum(x.size for name, x in parameters(model).items() if not name.endswith(statistics))


def layer_links(model: nn.Module, spec: Spec) -> dict[str, tuple[str, ...]]:
    """Upstream layer -> the layers of ours that compute it, where both have parameters.

    Left out are tensors of the network itself (position embeddings, say), and those that have
    another name within their layer here (a fused `in_proj_weight`): what the two give differs.
    """
    pairs: dict[str, dict[str, None]] = defaultdict(dict)
    for link in links(model, spec):
        source, upstream_leaf = _split(link.source)
        for target in link.targets:
            layer, leaf = _split(target)
            if layer and upstream_leaf == _upstream_leaf(source, leaf, spec):
                pairs[source][layer] = None
    return {source: tuple(targets) for source, targets in pairs.items()}


# Names ------------------------------------------------------------------------------------------


def _split(name: str) -> tuple[str, str]:
    """'layer1.0.conv1.weight' -> ('layer1.0.conv1', 'weight')."""
    layer, _, leaf = name.rpartition(".")
    return layer, leaf


@lru_cache(maxsize=4096)
def _pattern(template: str) -> tuple[re.Pattern[str], tuple[tuple[str, int], ...]]:
    """'layer{s+1}.{i}' as an anchored expression and its numbers: (name, what is added to it)."""
    numbers = tuple(
        (n, int(add or 0)) for n, add in re.findall(r"\{(\w+?)(?:\+(\d+))?\}", template)
    )
    pieces = re.split(r"\{\w+?(?:\+\d+)?\}", template)
    return re.compile("([0-9]+)".join(map(re.escape, pieces))), numbers


def _match(template: str, name: str) -> dict[str, int] | None:
    """The numbers of `template` where it is the whole of `name`."""
    pattern, numbers = _pattern(template)
    found = pattern.fullmatch(name)
    if not found:
        return None
    values: dict[str, int] = {}
    for (n, add), text in zip(numbers, found.groups(), strict=True):
        value = int(text) - add
        if value < 0 or values.setdefault(n, value) != value:  # one letter, one number
            return None
    return values


def _fill(template: str, values: Mapping[str, int]) -> str:
    """`template` with its numbers written out."""
    if unknown := [n for n, _ in _pattern(template)[1] if n not in values]:
        raise MappingError(f"{template}: our side of this row does not say {', '.join(unknown)}")
    return re.sub(r"\{(\w+?)(?:\+(\d+))?\}", lambda m: str(values[m[1]] + int(m[2] or 0)), template)


def _targets(row: Row) -> tuple[str, ...]:
    """The layers of ours that a row fills."""
    if isinstance(row, Conv1D):
        return _targets(row.target)
    if isinstance(row, Split):
        return tuple(f"{row.layer}.{part}" for part in row.parts)
    return (row,)


def _source_of(name: str, spec: Spec) -> tuple[str, int, bool]:
    """The upstream tensor that holds our parameter `name`, its place there, and whether in-out."""
    layer, leaf = _split(name)
    found = []
    for source, row in spec.layers.items():
        for part, target in enumerate(_targets(row)):
            if (values := _match(target, layer)) is not None:
                upstream = _fill(source, values)
                found.append((f"{upstream}.{_upstream_leaf(upstream, leaf, spec)}", part, row))
            elif (values := _match(target, name)) is not None:  # a bare tensor
                found.append((_fill(source, values), part, row))
    if len(found) > 1:
        rows = " and ".join(sorted(source for source, *_ in found))
        raise MappingError(f"two rows of the spec fill {name}: {rows}")
    if not found:  # no row means the same name
        return f"{layer}.{_upstream_leaf(layer, leaf, spec)}" if layer else leaf, 0, False
    source, part, row = found[0]
    return source, part, isinstance(row, Conv1D)


def _upstream_leaf(layer: str, leaf: str, spec: Spec) -> str:
    for old, ours in spec.leaves.items():
        kind, old_leaf = _split(old)
        if ours == leaf and layer.rpartition(".")[2] == kind:
            return old_leaf
    return leaf


def _is_head(source: str, spec: Spec) -> bool:
    return any(source == head or source.startswith(head + ".") for head in spec.heads)


def _with_prefix(source: str, spec: Spec) -> str:
    return source if _is_head(source, spec) else spec.prefix + source


def _twin(source: str, spec: Spec) -> str | None:
    """The tensor to which `source` is tied, if any."""
    if source in spec.tied:
        return spec.tied[source]
    layer, leaf = _split(source)
    return f"{spec.tied[layer]}.{leaf}" if layer in spec.tied else None


# Coverage ---------------------------------------------------------------------------------------


def _strip(state_dict: StateDict, spec: Spec) -> dict[str, list[str]]:
    """Names without the prefix -> the names in the file (more than one is a fault)."""
    names = defaultdict(list)
    for name in state_dict:
        names[name.removeprefix(spec.prefix) if spec.prefix else name].append(name)
    return names


def _cover(
    state_dict: StateDict, table: tuple[Link, ...], spec: Spec
) -> tuple[dict[str, mx.array], list[str]]:
    """The tensor for each link of `table`, and everything that does not fit."""
    expected = {link.source: link for link in table}
    present = {}
    problems = []
    for source, names in _strip(state_dict, spec).items():
        if len(names) > 1:
            problems.append(f"{' and '.join(names)} are the same tensor twice")
        present[source] = state_dict[names[0]]
    for source in list(present):  # a tied or spare tensor stands in for an absent one
        twin = _twin(source, spec) or spec.spare.get(source)
        if twin in expected and twin not in present:
            present[twin] = present.pop(source)

    unexpected = [s for s in present if s not in expected and not _may_drop(s, expected, spec)]
    missing = [s for s in expected if s not in present]
    problems += [f"no home for {names}" for names in collapse(unexpected)]
    problems += [f"nothing fills {names}" for names in collapse(missing, _naming(expected))]
    misfits = defaultdict(list)
    for source, link in expected.items():
        if source in present:
            for what in _misfits(present[source], link):
                misfits[what].append(source)
    problems += [f"{names} {what}" for what, found in misfits.items() for names in collapse(found)]
    for source in _unequal_twins(present, spec):
        problems.append(f"{source} differs from {_twin(source, spec)}, to which it is tied")
    for source, twin in spec.spare.items():
        filled = expected.get(twin)
        if filled and source in present and tuple(present[source].shape) != filled.upstream_shape:
            problems.append(f"{source} has another shape than {twin}, for which it may stand")
    return {s: x for s, x in present.items() if s in expected}, problems


def _may_drop(source: str, expected: Mapping[str, Link], spec: Spec) -> bool:
    # Of a tied layer, only what its twin has: the bias of a head may be nobody's.
    if source in spec.tied or source in spec.spare or _twin(source, spec) in expected:
        return True
    return any(fnmatchcase(source, p) or _match(p, source) is not None for p in spec.drop)


def _naming(expected: Mapping[str, Link]) -> Callable[[str], str]:
    """Upstream's name, and ours where it is another."""

    def name(source: str) -> str:
        targets = expected[source].targets
        return source if targets == (source,) else f"{source} (our {', '.join(targets)})"

    return name


def _misfits(x: mx.array, link: Link) -> Iterator[str]:
    """What is wrong with a tensor that has the right name."""
    if not mx.issubdtype(x.dtype, mx.floating):
        yield f"holds {str(x.dtype).split('.')[-1]}, where floats belong"
    shape, wanted = tuple(x.shape), link.upstream_shape
    if shape == wanted:
        return
    cause = "another variant?"
    if len(shape) == len(wanted):
        differing = [i for i, (a, b) in enumerate(zip(shape, wanted, strict=True)) if a != b]
        if differing == [0] and link.is_table:
            cause = "another vocabulary or number of positions, or another variant?"
        elif differing == [0]:
            cause = "another num_classes, or another variant?"
        elif differing == [1] and len(shape) == 4:
            cause = "another in_chans, or another variant?"
        elif differing == [1] and len(shape) == 3:  # position embeddings, (1, N, D)
            cause = "another img_size, or another variant?"
    yield f"has shape {shape}, the network needs {wanted}: {cause}"


def _unequal_twins(present: StateDict, spec: Spec) -> Iterator[str]:
    """Tied tensors that are not equal to their twins; NaNs are alike."""
    for source, a in present.items():
        twin = _twin(source, spec)
        if twin is not None and twin in present and a is not present[twin]:
            b = present[twin]
            if a.shape != b.shape or not mx.array_equal(a, b, equal_nan=True, stream=mx.cpu).item():
                yield source


def collapse(names: Iterable[str], show: Callable[[str], str] = str) -> Iterator[str]:
    """Names that differ in their numbers only, as one: 'h.{0..11}.mlp.c_fc.bias (12 tensors)'."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        shown = show(name)
        groups[re.sub(r"\d+", "#", shown)].append(shown)
    for group in groups.values():
        if len(group) == 1:
            yield group[0]
            continue
        columns = [
            sorted(set(map(int, c)))
            for c in zip(*(re.findall(r"\d+", g) for g in group), strict=True)
        ]
        texts = [str(c[0]) if len(c) == 1 else f"{{{c[0]}..{c[-1]}}}" for c in columns]
        pieces = re.split(r"\d+", group[0])
        name = "".join(a + b for a, b in zip(pieces, [*texts, ""], strict=True))
        yield f"{name} ({len(group)} tensors)"


def nonfinite(weights: StateDict) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity."""
    return [name for name, x in weights.items() if not _is_finite(x)]


def _is_finite(x: mx.array) -> bool:
    """By NumPy, which takes a tenth of MLX's time on the CPU; some values at a time."""
    if x.dtype == mx.bfloat16:  # which NumPy does not have: the exponent is all ones
        bits = np.asarray(x.view(mx.uint16)).reshape(-1)
        return all(((piece & 0x7F80) != 0x7F80).all() for piece in _pieces(bits))
    return all(np.isfinite(piece).all() for piece in _pieces(np.asarray(x).reshape(-1)))


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[i : i + PIECE] for i in range(0, len(values), PIECE))
