"""Does a network compute what its PyTorch original computes? Layer by layer, with figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo import describe, registry, zoo
from mlx_zoo.catalogue import Architecture, Checkpoint
from mlx_zoo.describe import Place
from mlx_zoo.errors import MissingDependency, VerificationError
from mlx_zoo.hub import cache
from mlx_zoo.hub.fetch import fetch_weights
from mlx_zoo.mapping import engine
from mlx_zoo.mapping.layout import channels_last
from mlx_zoo.preprocess.image import MODES
from mlx_zoo.verify import compare, reference
from mlx_zoo.verify.preprocessing import compare_preprocessing
from mlx_zoo.verify.quantized import against_full_precision
from mlx_zoo.verify.report import TOLERANCES, PreprocessingDifference, Report, judge
from mlx_zoo.verify.stored import against_stored

__all__ = ["Report", "verify"]


def verify(
    model: str | os.PathLike[str] | nn.Module,
    pretrained: bool | str | os.PathLike[str] = True,
    *,
    size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **options,
) -> Report:
    """Compare a network with its PyTorch original on seeded inputs, in real float32.

    The original runs in float32 and in float64, which is the truth. Where PyTorch is not installed
    and the checkpoint has stored outputs of the original, those are the evidence instead. A
    quantised network is compared with its own weights in full precision: the report's `effect` says
    how often the top answer is the same, and a language model's perplexity before and after.

    Args:
        model: a name as `load` takes it, or a loaded network, changed or not.
        pretrained, **options: as `load` takes them, where a name is given.
        size: side of the images (None: as published) or number of tokens (64; at most as many as
            there are positions). A network that takes images of one size gets those.
        seed: of the inputs.
        device: "cpu", or "gpu" for the default device, whose float32 may not be real float32.

    Returns:
        A Report; `.passed` says whether it is the same network, `.first_divergence` where not.

    Raises:
        MissingDependency: PyTorch is needed and not installed.
        VerificationError: there is nothing to compare with.
    """
    place = Place(cache_dir, local_files_only)
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device={device!r}: 'cpu' or 'gpu' is needed")
    for name, value in {"size": size, "seed": seed}.items():
        if value is not None and (type(value) is not int or value < (name == "size")):
            raise ValueError(f"{name}={value!r}: a count is needed")
    if isinstance(model, nn.Module) and (options or pretrained is not True):
        said = ", ".join(options) or f"pretrained={pretrained!r}"
        raise ValueError(f"{said}: this network is loaded already, and verified as it is")
    if not isinstance(model, nn.Module):
        if options.get("quantize") is None:  # said before anything is downloaded
            _can_run_original(describe.find(model, options.get("revision"), place))
        model = zoo.load(
            model, pretrained, cache_dir=cache_dir, local_files_only=local_files_only, **options
        )
    place = describe.place_of(model, cache_dir, local_files_only)
    checkpoint = getattr(model, "checkpoint", None)
    if checkpoint is None:
        raise VerificationError("this network has random weights: there is nothing to compare with")
    _check_is_the_checkpoints(model)
    modes = [(module, module.training) for module in model.modules()]  # parents first
    model.eval()
    try:
        with mx.stream(mx.cpu if device == "cpu" else mx.default_device()):
            if getattr(model, "quantization", None) is not None:
                return against_full_precision(model, place, seed, _device())
            if _can_run_original(checkpoint):
                return _against_original(model, place, size, seed)
            return against_stored(model, _precision(model), _device())
    finally:
        for module, training in modes:
            module.train(training)


def _check_is_the_checkpoints(model: nn.Module) -> None:
    """A fresh head or an adapted input has no original."""
    architecture, config = registry.of_model(model), model.config
    task, size = getattr(config, "task", None), architecture.head_size(config)
    own = model.checkpoint.config
    if size and not architecture.keeps_head(model.checkpoint, task, size):
        raise VerificationError("the head of this network is fresh: there is nothing to compare")
    for name in ("in_chans", "img_size"):
        if getattr(config, name, None) != getattr(own, name, None):
            raise VerificationError(
                f"this network was adapted to {name}={getattr(config, name)}, its original has "
                f"{getattr(own, name)}: there is nothing to compare"
            )


def _can_run_original(checkpoint) -> bool:
    original = checkpoint.reference
    if original is not None and reference.is_installed(original.library):
        return True
    if checkpoint.evidence:
        return False
    if original is None:
        raise VerificationError(f"{checkpoint.name} names no PyTorch original to compare with")
    raise MissingDependency(
        f"verifying {checkpoint.name} needs torch and {original.library}: "
        'pip install "mlx-zoo[torch]"'
    )


@dataclass(frozen=True)
class Pair:
    """A layer of ours and the original's that computes it; of a fused one, which part of it."""

    ours: str
    theirs: str
    part: int
    parts: int

    def out_of(self, seen: Mapping[str, np.ndarray], layer: nn.Module, like: np.ndarray):
        """What the original's layer gave, as ours gives it: (B, ..., C), of the shape of `like`."""
        values = np.split(channels_last(seen[self.theirs], layer), self.parts, axis=-1)[self.part]
        # Position embeddings have no batch axis, here or there; a changed network may have
        # another size.
        if values.ndim == like.ndim and values.shape[1:] == like.shape[1:] and len(values) == 1:
            return np.broadcast_to(values, like.shape)
        return values.reshape(like.shape) if values.size == like.size else values


def _against_original(model: nn.Module, place: Place, size: int | None, seed: int) -> Report:
    checkpoint, architecture = model.checkpoint, registry.of_model(model)
    shown = compare.image_size(model, size) if architecture.inputs == "images" else size or 64
    inputs = compare.random_inputs(architecture.inputs, model.config, shown, seed)
    precision = _precision(model)

    original = _original(model, architecture, place)
    pairs = _pairs(model, architecture, original)
    upstream = {pair.theirs for pair in pairs.values()}
    outputs, layers = compare.run(model, inputs, pairs)
    same_outputs, same = reference.run(original, inputs, upstream, precision)
    true_outputs, true = reference.run(original, inputs, upstream, "float64")
    if outputs.keys() != same_outputs.keys():
        raise VerificationError(
            f"the network returns {', '.join(outputs)}, its original {', '.join(same_outputs)}"
        )
    modules = dict(model.named_modules())
    rows = []
    for name, x in layers.items():
        if pairs[name].theirs not in same:  # torch's attention takes out_proj's weight, and no more
            continue
        theirs = [pairs[name].out_of(seen, modules[name], x) for seen in (same, true)]
        rows.append(judge(name, x, theirs[0], theirs[1], precision))
    return Report(
        name=checkpoint.name,
        evidence=f"{checkpoint.reference.library} in {precision} and float64",
        outputs=tuple(
            judge(name, x, same_outputs[name], true_outputs[name], precision)
            for name, x in outputs.items()
        ),
        layers=tuple(rows),
        device=_device(),
        seed=seed,
        inputs=", ".join(f"{name} {x.shape}" for name, x in inputs.items()),
        versions={**cache.versions(), **reference.versions(checkpoint.reference.library)},
        preprocessing=_preprocessing(checkpoint, seed, place),
    )


def _preprocessing(
    checkpoint: Checkpoint, seed: int, place: Place
) -> PreprocessingDifference | None:
    """None where nobody publishes how, or where it cannot be shown in a picture."""
    how = checkpoint.preprocessing
    if how is None or len(how.mean) not in MODES:
        return None
    try:
        return compare_preprocessing(checkpoint, seed=seed, place=place)
    except VerificationError:
        return None


def _original(model: nn.Module, architecture: Architecture, place: Place):
    """The PyTorch original with the published weights."""
    checkpoint = model.checkpoint
    fetched = fetch_weights(describe.source_of(checkpoint), **place.options)
    files = {**describe.companions(checkpoint, architecture, place), **fetched.files}
    return reference.build(checkpoint, model.config, files, fetched.weights)


def _pairs(model: nn.Module, architecture: Architecture, original) -> dict[str, Pair]:
    """The layers of ours that have weights, with the original's.

    Those that a repository keeps in folders of their own have other names there; the output
    shows them.
    """
    there = dict(original.named_modules())
    apart = tuple(architecture.parts(model.config).values())
    own = model.checkpoint.dialect
    publisher = own.partition(",")[0]
    # A library may give the layers of an old file new names: another of its dialects has those.
    others = [name for name in architecture.dialects if name.partition(",")[0] == publisher]
    unknown: dict[str, list[str]] = {}
    for dialect in (own, *others):
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
    raise VerificationError(f"the original has no layer {unknown[own][0]}")


def _device() -> str:
    return str(mx.default_device().type).split(".")[-1]


def _precision(model: nn.Module) -> str:
    """The widest type of the parameters: activations take it on."""
    kinds = {str(x.dtype).split(".")[-1] for x in engine.parameters(model).values()}
    return next((kind for kind in TOLERANCES if kind in kinds), "float32")
