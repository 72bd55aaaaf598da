"""Names -> checkpoints and architectures. Found by walking specs/: drop a file there."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module

import mlx.nn as nn

from mlx_zoo import specs
from mlx_zoo.catalogue import Architecture, Checkpoint
from mlx_zoo.errors import UnknownModel
from mlx_zoo.mapping import engine


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture, by name."""
    return {module.ARCHITECTURE.name: module.ARCHITECTURE for module in _modules()}


@cache
def checkpoints() -> dict[str, Checkpoint]:
    """Every published checkpoint, by name, sorted."""
    found = [checkpoint for module in _modules() for checkpoint in module.CHECKPOINTS]
    return {c.name: c for c in sorted(found, key=lambda c: c.name)}


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """The sorted names that match an fnmatch `pattern`, dashes and underscores alike.

    Without `pretrained`, the names of bare architectures are included: they can be built with
    random weights.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={pattern!r}: text such as 'resnet*' is needed")
    names = set(checkpoints()) | {c.variant for c in checkpoints().values() if c.default}
    if not pretrained:
        names |= {name for a in architectures().values() for name in a.variants}
    return sorted(name for name in names if fnmatchcase(key(name), key(pattern)))


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
    return engine.num_parameters(architectures()[checkpoint.architecture].model(checkpoint.config))


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
