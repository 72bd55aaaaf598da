"""The PyTorch original, run here on seeded inputs, in the network's precision and in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_zoo import describe, registry
from mlx_zoo.catalogue import Architecture
from mlx_zoo.describe import Place
from mlx_zoo.errors import VerificationError
from mlx_zoo.hub.checkpoint import is_safetensors, read_state_dict
from mlx_zoo.hub.fetch import Fetched, fetch_weights
from mlx_zoo.mapping import engine
from mlx_zoo.mapping.layout import channels_last
from mlx_zoo.verify import compare, reference
from mlx_zoo.verify.evidence import Answer, Evidence


@dataclass(frozen=True)
class Pair:
    """A layer of ours and the original's that computes it; of a fused one, which part of it."""

    ours: str
    theirs: str
    part: int
    parts: int

    def out_of(
        self, seen: Mapping[str, np.ndarray], layer: nn.Module, shape: tuple[int, ...]
    ) -> np.ndarray:
        """What the original's layer gave, as ours gives it: (B, ..., C); of `shape` if it can."""
        values = np.split(channels_last(seen[self.theirs], layer), self.parts, axis=-1)[self.part]
        # Position embeddings have no batch axis, here or there; a changed network may have
        # another size.
        if values.ndim == len(shape) and values.shape[1:] == shape[1:] and len(values) == 1:
            return np.broadcast_to(values, shape)
        return values.reshape(shape) if values.size == np.prod(shape) else values


def run_original(
    model: nn.Module, place: Place, size: int | None, seed: int, precision: str
) -> Evidence:
    """What the original of `model` answers.

    Raises DownloadError where the published files are not at hand, VerificationError where the
    original does not take them.
    """
    checkpoint, architecture = model.checkpoint, registry.of_model(model)
    shown = compare.image_size(model, size) if architecture.inputs == "images" else size or 64
    inputs = compare.random_inputs(architecture.inputs, model.config, shown, seed)

    original, fetched = build_original(model, place)
    pairs = _pairs(model, architecture, original)
    upstream = {pair.theirs for pair in pairs.values()}
    outputs, layers = compare.shapes(model, inputs, pairs)
    same_outputs, same = reference.run(original, inputs, upstream, precision)
    true_outputs, true = reference.run(original, inputs, upstream, "float64")
    if outputs.keys() != same_outputs.keys():
        raise VerificationError(
            f"the network returns {', '.join(outputs)}, its original {', '.join(same_outputs)}"
        )
    modules = dict(model.named_modules())
    answers = {}
    for name, shape in layers.items():
        if pairs[name].theirs not in same:  # torch's attention takes out_proj's weight, and no more
            continue
        single, double = (pairs[name].out_of(x, modules[name], shape) for x in (same, true))
        answers[name] = Answer(single, double)
    tables = {
        name: Answer(*reference.table(original, pair.theirs, precision))
        for name, pair in pairs.items()
        if isinstance(modules[name], nn.Embedding)
    }
    library, trained = checkpoint.reference.library, checkpoint.base_model is not None
    return Evidence(
        kind="original",
        what=f"{library} in {precision} and float64",
        origin=f"{library} ran here, with the {'exported' if trained else 'published'} weights",
        inputs=inputs,
        outputs={name: Answer(same_outputs[name], true_outputs[name]) for name in outputs},
        layers=answers,
        tables=tables,
        said=", ".join(f"{name} {x.shape}" for name, x in inputs.items()),
        seed=seed,
        versions=reference.versions(library),
        sha256=fetched.sha256,
    )


def build_original(model: nn.Module, place: Place) -> tuple[Any, Fetched]:
    """The original of `model` with its published weights, and the files they are from."""
    checkpoint, architecture = model.checkpoint, registry.of_model(model)
    fetched = fetch_weights(describe.source_of(checkpoint), **place.options)
    for path in fetched.weights:
        if not is_safetensors(path):
            read_state_dict([path])  # no pickle is PyTorch's before it was ours
    files = {**describe.companions(checkpoint, architecture, place), **fetched.files}
    return reference.build(checkpoint, model.config, files, fetched.weights), fetched


def own_dialects(model: nn.Module) -> tuple[str, ...]:
    """The dialect of the checkpoint, then the others of its publisher.

    A library may give the layers of an old file new names: another of its dialects has those.
    """
    own, dialects = model.checkpoint.dialect, registry.of_model(model).dialects
    publisher = own.partition(",")[0]
    return (own, *(name for name in dialects if name.partition(",")[0] == publisher))


def _pairs(model: nn.Module, architecture: Architecture, original) -> dict[str, Pair]:
    """The layers of ours that have weights, with the original's.

    Those that a repository keeps in folders of their own have other names there; the output
    shows them.
    """
    there = dict(original.named_modules())
    apart = tuple(architecture.parts(model.config).values())
    unknown: dict[str, list[str]] = {}
    for dialect in own_dialects(model):
        pairs = {}
        unknown[dialect] = []
        spec = architecture.spec(dialect, model.config)
        for upstream, ours in engine.layer_links(model, spec).items():
            if not upstream or upstream.startswith(apart):
                continue
            names = [name for name in there if name == upstream or name.endswith("." + upstream)]
            if not names:
                unknown[dialect].append(upstream)
                continue
            for part, name in enumerate(ours):
                pairs[name] = Pair(name, min(names, key=len), part, len(ours))
        if not unknown[dialect]:
            return pairs
    raise VerificationError(f"the original has no layer {unknown[model.checkpoint.dialect][0]}")
