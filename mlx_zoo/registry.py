"""Names -> checkpoints and architectures. Found by walking specs/: drop a file there."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module

import mlx.nn as nn

from mlx_zoo import specs
from mlx_zoo.catalogue import Architecture, Checkpoint
from mlx_zoo.errors import UnknownModel
from mlx_zoo.mapping import engine

FEATURES = "image-feature-extraction"  # of any image network: it needs no head


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture, by name."""
    return {module.ARCHITECTURE.name: module.ARCHITECTURE for module in _modules()}


@cache
def checkpoints() -> dict[str, Checkpoint]:
    """Every published checkpoint, by name, sorted."""
    found = [checkpoint for module in _modules() for checkpoint in module.CHECKPOINTS]
    return {c.name: c for c in sorted(found, key=lambda c: c.name)}


def list_models(
    pattern: str = "*",
    *,
    pretrained: bool = False,
    family: str | None = None,
    task: str | None = None,
    source: str | None = None,
    max_params: float | None = None,
) -> list[str]:
    """The sorted names that match an fnmatch `pattern`, dashes and underscores alike.

    Args:
        pattern: "resnet*", "*clip*".
        pretrained: leave out the names of bare architectures, which have random weights only.
        family: an architecture: "vit".
        task: for which the network has, or takes, a head: "fill-mask". Published weights whose
            head is for another task are left out.
        source: whose weights: "torchvision", "timm", "transformers".
        max_params: the most parameters: 25e6.

    Raises:
        ValueError: a family, task or source that there is not.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={pattern!r}: text such as 'resnet*' is needed")
    known = architectures()
    _check_filter("family", family, known)
    _check_filter("task", task, {FEATURES, *(task for a in known.values() for task in a.tasks)})
    _check_filter("source", source, {publisher(c) for c in checkpoints().values()})
    names = set(checkpoints()) | {c.variant for c in checkpoints().values() if c.default}
    if not pretrained:
        names |= {name for a in known.values() for name in a.variants}
    return sorted(
        name
        for name in names
        if fnmatchcase(key(name), key(pattern))
        and _is_wanted(find(name), family, task, source, max_params)
    )


def _check_filter(name: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"{name}={value!r}: one of {', '.join(sorted(known))} is needed")


def _is_wanted(checkpoint: Checkpoint, family, task, source, max_params) -> bool:
    architecture = architectures()[checkpoint.architecture]
    if family not in (None, architecture.name) or source not in (None, publisher(checkpoint)):
        return False
    if task is not None and not _serves(checkpoint, architecture, task):
        return False
    return max_params is None or num_parameters(checkpoint) <= max_params


def _serves(checkpoint: Checkpoint, architecture: Architecture, task: str) -> bool:
    """Whether the published weights have a head for `task`; random ones may have any."""
    if task == FEATURES:
        return architecture.inputs == "images"
    if checkpoint.task == task or not checkpoint.source:
        return task in architecture.tasks
    return task in architecture.also.get(checkpoint.task, ())


def publisher(checkpoint: Checkpoint) -> str:
    """Whose original a checkpoint is: "timm"; "" of random weights."""
    return checkpoint.reference.library if checkpoint.reference else ""


def find(name: str) -> Checkpoint:
    """The checkpoint that a name means: `resnet18`, `resnet50.a1_in1k`, `bert-base-uncased`, ...

    Raises UnknownModel with the closest names.
    """
    try:
        return _names()[key(name)]
    except KeyError:
        close = difflib.get_close_matches(key(name), _names(), n=4, cutoff=0.6)
        hint = (
            f"did you mean {', '.join(close)}?"
            if close
            else "mlx_zoo.list_models() has all names; a repository of the hub is 'org/name'"
        )
        raise UnknownModel(f"no model is called {name!r}: {hint}") from None


def of_repository(repository: str) -> Checkpoint | None:
    """The checkpoint whose source is that repository of the hub, if any."""
    return next((c for c in checkpoints().values() if c.source == f"hf-hub:{repository}"), None)


def family(variant: str) -> Architecture | None:
    """The architecture that has a variant of that name, if any."""
    for architecture in architectures().values():
        if key(variant) in map(key, architecture.variants):
            return architecture
    return None


def num_parameters(checkpoint: Checkpoint) -> int:
    """As published; where that is not known, of the network itself (nothing is allocated)."""
    if checkpoint.num_params is not None:
        return checkpoint.num_params
    return engine.num_parameters(
        architectures()[checkpoint.architecture].outline(checkpoint.config)
    )


def of_model(model: nn.Module) -> Architecture:
    """The architecture of a network. ValueError for one that is not of this package."""
    for architecture in architectures().values():
        if isinstance(model, architecture.model):
            return architecture
    raise ValueError(f"{type(model).__name__} is not one of mlx_zoo's networks")


def key(name: str) -> str:
    """How names are compared: in lower case, dashes as underscores."""
    return name.lower().replace("-", "_")


@cache
def _names() -> dict[str, Checkpoint]:
    """Everything that a user may say -> the checkpoint it means."""
    names = {}
    for architecture in architectures().values():  # architectures without published weights
        for variant, config in architecture.variants.items():
            names[key(variant)] = Checkpoint(
                name=variant, architecture=architecture.name, config=config, source=""
            )
    for checkpoint in checkpoints().values():
        names |= {key(alias): checkpoint for alias in (checkpoint.name, *checkpoint.aliases)}
    for checkpoint in checkpoints().values():
        if checkpoint.default:
            names[key(checkpoint.variant)] = checkpoint
    return names


def _modules() -> Iterator:
    for module in pkgutil.iter_modules(specs.__path__):
        yield import_module(f"{specs.__name__}.{module.name}")
