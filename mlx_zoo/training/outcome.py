"""What becomes of a network that was trained: a checkpoint of its own, and a folder to load."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_zoo import registry, zoo
from mlx_zoo.catalogue import Checkpoint
from mlx_zoo.mapping import engine
from mlx_zoo.training.data import task_of
from mlx_zoo.training.images import body_of, preprocessing_of
from mlx_zoo.training.lora import adapted, merge_lora, save_adapter

SUFFIX = "_finetuned"


def as_finetuned(model: nn.Module, labels: tuple[str, ...]) -> None:
    """Give a trained network a checkpoint of its own.

    What was published of its base, hashes and accuracy and outputs, does not hold for it; where the
    tokenizer is, and the licence, it still says.
    """
    architecture, old = registry.of_model(model), getattr(model, "checkpoint", None)
    is_vision = architecture.inputs == "images"
    if old is None:  # trained from random weights
        name = _variant(model, architecture)
        dialect = next(iter(architecture.dialects))
        old = Checkpoint(name, architecture.name, model.config, source="", dialect=dialect)
    base = old.base_model or old.name
    model.checkpoint = replace(
        old,
        name=old.name if old.name.endswith(SUFFIX) else old.name + SUFFIX,
        base_model=base if old.source else None,
        config=model.config,
        task=task_of(model),
        reference=None,
        evidence=None,
        sha256=None,
        num_params=engine.num_parameters(architecture.outline(model.config)),
        accuracy={},
        labels=labels,
        aliases=(),
        default=False,
        preprocessing=preprocessing_of(model) if is_vision else old.preprocessing,
    )
    model.entry = None  # of the cache: these are not its weights any more


def _variant(model: nn.Module, architecture: Any) -> str:
    """The name of a config, but for the sizes of its head and its input."""
    own = body_of(model.config)
    same = (name for name, config in architecture.variants.items() if body_of(config) == own)
    return next(same, architecture.name)


def write_adapter(model: nn.Module, labels: tuple[str, ...], output: Path) -> None:
    """Write `adapter/`, of the network that was adapted, where there are adapters."""
    if not adapted(model):
        return
    checkpoint = getattr(model, "checkpoint", None)
    if checkpoint is not None:
        model.checkpoint = replace(checkpoint, labels=labels)
    save_adapter(model, output / "adapter")


def write_model(model: nn.Module, metrics: Mapping[str, float], output: Path) -> None:
    """Write `model/`, adapters merged, unless it is there.

    A quantised network has its adapter alone: few bits do not take it up.
    """
    if (output / "model").exists():
        return
    if adapted(model):
        if getattr(model, "quantization", None) is not None:
            return
        model = merge_lora(copy.deepcopy(model))
    zoo.convert(model, output / "model", metrics=dict(metrics) or None)
