"""Against outputs of the original that were stored, in float32 and float64, when it could be run.

A file of evidence for images holds `logits` and, of some `reference_inputs`, samples of what the
layers gave: `layer.<name>.{index,sample,torch32,scale}`. The images themselves are shared. One for
texts holds `input.<name>`, and `output.<name>` with `output.<name>.torch32`; of a large output, the
values at `output.<name>.index` and its `output.<name>.shape`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.nn as nn
import numpy as np

from mlx_zoo import registry
from mlx_zoo.describe import path_of
from mlx_zoo.errors import VerificationError
from mlx_zoo.hub import cache
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.mapping import engine
from mlx_zoo.preprocess.image import preprocess
from mlx_zoo.verify import compare
from mlx_zoo.verify.report import Comparison, Report, judge

IMAGES = "package:digits.safetensors"  # held-out ones, as every network for digits has seen them
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # in the order networks take them

Stored = Mapping[str, np.ndarray]


def against_stored(model: nn.Module, precision: str, device: str) -> Report:
    """Raises VerificationError where nothing was stored for the head that the network has."""
    checkpoint = model.checkpoint
    stored = _read(checkpoint.evidence)
    compared = _texts if f"input.{INPUTS[0]}" in stored else _images
    outputs, layers, inputs = compared(model, stored, precision)
    return Report(
        name=checkpoint.name,
        evidence="stored outputs of the PyTorch original, in float32 and float64",
        outputs=outputs,
        layers=layers,
        device=device,
        seed=None,
        inputs=inputs,
        versions=cache.versions(),
    )


Compared = tuple[tuple[Comparison, ...], tuple[Comparison, ...], str]


def _images(model: nn.Module, stored: Stored, precision: str) -> Compared:
    double, single = stored["logits"], stored["logits_torch32"]
    if model.config.num_classes != double.shape[1]:
        raise _nothing_stored(model, f"{double.shape[1]} classes", model.config.num_classes)
    images = _read(IMAGES)["images"]
    pixels = preprocess(list(images), model.checkpoint.preprocessing)
    output = compare.run(model, {"pixel_values": pixels}, ())[0]["output"]
    architecture = registry.of_model(model)
    spec = architecture.spec(model.checkpoint.dialect, model.config)
    links = engine.layer_links(model, spec)  # a fused layer is several of ours
    few = pixels[: len(stored["reference_inputs"])]
    _, seen = compare.run(
        model, {"pixel_values": few}, [n for ours in links.values() for n in ours]
    )
    layers = []
    for name, ours in sorted(links.items(), key=lambda item: list(seen).index(item[1][0])):
        values = np.concatenate([seen[part] for part in ours], axis=-1)
        index = stored[f"layer.{name}.index"]
        sample = values.reshape(-1)[index[index < values.size]]
        theirs, truth = stored[f"layer.{name}.torch32"], stored[f"layer.{name}.sample"]
        row = judge(name, sample, theirs, truth, precision)
        layers.append(replace(row, scale=float(stored[f"layer.{name}.scale"][0])))
    row = judge("output", output, single, double, precision)
    return (row,), tuple(layers), f"{len(images)} held-out images"


def _texts(model: nn.Module, stored: Stored, precision: str) -> Compared:
    inputs = {name: stored[f"input.{name}"] for name in INPUTS if f"input.{name}" in stored}
    outputs, _ = compare.run(model, inputs, ())
    shapes = {
        name.removesuffix(".torch32"): tuple(stored.get(f"{name[:-8]}.shape", x.shape))
        for name, x in stored.items()
        if name.endswith(".torch32")
    }
    rows = []
    for name, x in outputs.items():
        # A network with one output has no name for it: its shape tells which of the stored it is.
        like = [source for source, shape in shapes.items() if shape == x.shape]
        source = f"output.{name}" if f"output.{name}" in shapes else next(iter(like), None)
        if source is None:
            raise _nothing_stored(model, "another head", model.config.task)
        index = stored.get(f"{source}.index")
        ours = x if index is None else x.reshape(-1)[index]
        rows.append(judge(name, ours, stored[f"{source}.torch32"], stored[source], precision))
    return tuple(rows), (), f"{len(inputs[INPUTS[0]])} held-out texts"


def _nothing_stored(model: nn.Module, what: str, wanted: object) -> VerificationError:
    return VerificationError(
        f"the stored outputs of {model.checkpoint.name} are of {what}, this network has {wanted}: "
        'pip install "mlx-zoo[torch]"'
    )


def _read(evidence: str) -> Stored:
    state = read_state_dict([path_of(evidence)])
    return {name: np.array(x, copy=True) for name, x in state.items()}
