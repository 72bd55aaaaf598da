"""What a worker of another framework is told to build: the network that ours is a twin of."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any

from mlx_zoo import describe, registry
from mlx_zoo.catalogue import Architecture, Checkpoint, Reference
from mlx_zoo.describe import Place
from mlx_zoo.errors import MissingDependency, MLXZooError
from mlx_zoo.preprocess.files import read_json


def in_torch(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    """The original of a network with that config: its library, its constructor and the arguments.

    Raises MissingDependency where the library is not installed; MLXZooError where there is no such
    network in it.
    """
    reference = checkpoint.reference or _reference_of(checkpoint)
    missing = [x for x in ("torch", reference.library) if importlib.util.find_spec(x) is None]
    if missing:
        raise MissingDependency(
            f"the PyTorch original of {checkpoint.name} needs {' and '.join(missing)}: "
            'pip install "mlx-zoo[torch]", or --compare none'
        )
    if reference.library == "transformers":
        return _in_transformers(checkpoint, config)
    options = {"num_classes": config.num_classes or 1, **reference.options}
    if reference.library == "torchvision":
        if hasattr(config, "img_size"):
            options["image_size"] = config.img_size
    else:
        if reference.name == "EfficientNet":
            raise MLXZooError(f"timm has no name for {checkpoint.name}: --compare none")
        options["in_chans"] = config.in_chans
        if hasattr(config, "img_size"):
            options["img_size"] = config.img_size
    return {"library": reference.library, "name": reference.name, "options": options}


def _reference_of(checkpoint: Checkpoint) -> Reference:
    """That of published weights for the same network."""
    architecture = registry.architectures()[checkpoint.architecture]
    if architecture.inputs == "tokens":
        return Reference("transformers")
    for other in registry.checkpoints().values():
        if other.config == checkpoint.config and other.reference:
            return other.reference
    raise MLXZooError(f"no library has an original of {checkpoint.name}: --compare none")


def _in_transformers(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    architecture = registry.architectures()[checkpoint.architecture]
    task = getattr(config, "task", "image-classification")
    if task == "sentence-embedding":  # whose pooling takes no time to speak of
        task = None
    name = next(name for name, its in architecture.classes.items() if its == task)
    options = {}
    if architecture.inputs == "tokens":
        values = as_transformers(architecture, config)
    else:
        files = describe.companions(checkpoint, architecture, Place(local_files_only=True))
        if "config.json" not in files:
            raise MLXZooError(
                f"the original of {checkpoint.name} needs its config.json: `mlx-zoo load "
                f"{checkpoint.name}` fetches it, or --compare none"
            )
        values = dict(read_json(files["config.json"]))
        values |= {"image_size": config.img_size} if hasattr(config, "img_size") else {}
    if task is None and hasattr(config, "pooler"):
        options["add_pooling_layer"] = config.pooler
    return {"library": "transformers", "name": name, "config": values, "options": options}


def as_transformers(architecture: Architecture, config: Any) -> dict[str, Any]:
    """A text network's config under transformers' names: the table of its spec, read backwards."""
    table: Mapping[str, str] = import_module(f"mlx_zoo.specs.{architecture.name}").ATTRIBUTES
    ours = asdict(config)
    values = {theirs: ours[name] for theirs, name in table.items()}
    values["num_labels"] = config.num_classes
    if "n_embd" in values:  # GPT-2's own name for it, which has no default of ours
        values["n_inner"] = config.mlp_dims
    return values


def in_mlx_lm(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    """The arguments of mlx-lm's GPT-2.

    Raises MissingDependency without mlx-lm; MLXZooError for a network that it does not have.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        raise MissingDependency("mlx-lm is not installed: pip install mlx-lm")
    if checkpoint.architecture != "gpt2" or not config.tied:
        raise MLXZooError(f"mlx-lm has GPT-2 alone, and no {checkpoint.name}")
    positions = config.max_positions
    return {
        "config": {
            "n_ctx": positions,
            "n_positions": positions,
            "n_embd": config.dims,
            "n_head": config.num_heads,
            "n_layer": config.num_layers,
            "layer_norm_epsilon": config.norm_eps,
            "vocab_size": config.vocab_size,
        }
    }
