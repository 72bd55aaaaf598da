"""Weights as their publisher stores them -> as our networks take them, kept in the cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import describe
from mlx_zoo.catalogue import Architecture, Checkpoint, config_from
from mlx_zoo.describe import Place, as_source
from mlx_zoo.errors import (
    CheckpointError,
    IntegrityError,
    MappingError,
    MLXZooError,
    NotCached,
)
from mlx_zoo.hub import cache
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.hub.fetch import (
    Fetched,
    fetch_files,
    fetch_weights,
    local_weights,
    resolve_revision,
)
from mlx_zoo.hub.keeping import cannot_keep
from mlx_zoo.hub.seen import LARGE
from mlx_zoo.hub.source import DirectorySource, HubSource, Source, UrlSource
from mlx_zoo.mapping import engine
from mlx_zoo.mapping.spec import Spec
from mlx_zoo.quantization import Quantization, quantize, quantize_layers

log = logging.getLogger("mlx_zoo")


@dataclass(frozen=True)
class Request:
    """Which weights of a checkpoint are wanted, and as what."""

    checkpoint: Checkpoint
    architecture: Architecture
    config: Any  # the checkpoint's, with the task and what else the user said
    num_classes: int | None = None
    in_chans: int | None = None
    img_size: int | tuple[int, int] | None = None
    dtype: mx.Dtype | None = None
    allow_nonfinite: bool = False
    quantize: Quantization | None = None

    @property
    def task(self) -> str | None:
        return getattr(self.config, "task", None)

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields of the config that the user gave as arguments of their own."""
        names = ("num_classes", "in_chans", "img_size")
        return {name: x for name in names if (x := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Converted:
    """Weights in MLX's layout, the config they fill exactly, and the checkpoint they are from."""

    weights: Mapping[str, mx.array]
    config: Any
    checkpoint: Checkpoint
    quantization: Quantization | None = None
    entry: cache.Entry | None = None  # None where they could not be kept


@dataclass(frozen=True)
class Origin:
    """Where the bytes are, and which network they are expected to fill."""

    source: Source  # of the hub: at a commit
    config: Any
    fetched: Fetched | None  # what is at hand already: local files
    parts: Mapping[str, Fetched]  # and those in folders of their own

    @property
    def identity(self) -> Any:
        """Which bytes they are: a commit, a pinned address, or hashes."""
        if self.fetched is None:
            return str(self.source)
        parts = [sorted(part.sha256.values()) for part in self.parts.values()]
        return [sorted(self.fetched.sha256.values()), parts]


@dataclass(frozen=True)
class Mapped:
    """Weights in MLX's layout, in memory, and what was found out about them."""

    weights: dict[str, mx.array]
    config: Any  # of the network that they fill
    dialect: str
    nonfinite: list[str]


def converted(request: Request, place: Place) -> Converted:
    """The weights from the cache; else fetched, mapped and kept there.

    Raises MLXZooError: whatever is wrong with the files or the weights.
    """
    source = as_source(request.checkpoint.source)
    if isinstance(source, DirectorySource) and describe.is_converted(source.path):
        return _from_folder(source.path, request)
    if isinstance(source, HubSource) and request.checkpoint.folder:
        _say_licence(request.checkpoint)
        return _from_folder(describe.fetch_converted(request.checkpoint, place), request, source)
    origin = _origin(source, request, place)
    if isinstance(origin.source, HubSource):
        checkpoint = replace(request.checkpoint, revision=origin.source.revision)
        request = replace(request, checkpoint=checkpoint)
    mapped = None
    if origin.fetched is not None:  # local files are what their bytes are
        origin, mapped = _hashed(origin, origin.fetched, request, place)
    key = cache.key_of(
        {
            "source": origin.identity,
            "architecture": request.architecture.name,
            "specs": request.architecture.fingerprint(origin.config),
            "dialect": request.checkpoint.dialect,
            "config": asdict(origin.config),
            "dtype": str(request.dtype),
            "quantize": request.quantize
            and {**asdict(request.quantize), "not": request.architecture.full_precision},
        }
    )
    found = _from_cache(key, request, place)
    if found is not None and _is_asked_for(found.config, origin.config, request):
        return found
    return _convert(key, origin, mapped, request, place)


def _is_asked_for(config: Any, expected: Any, request: Request) -> bool:
    """Whether an entry is another than the expected network only where the user allows it.

    It may lack the head or take other images, which `_map` permits to who gives a number.
    """
    free = request.sizes.keys() | ({"task"} if request.num_classes is not None else set())
    return all(
        name in free or getattr(config, name, None) == getattr(expected, name, None)
        for name in ("task", "num_classes", "in_chans", "img_size")
    )


def _origin(source: Source, request: Request, place: Place) -> Origin:
    fetched, parts = None, {}
    if isinstance(source, HubSource):  # a commit says what the bytes are
        commit = request.checkpoint.revision or resolve_revision(source, **place.options)
        source = HubSource(source.repo, commit)
    elif not isinstance(source, UrlSource):
        fetched = local_weights(source, place.root)
    config = _convertible(request)
    files = describe.files_of(source, request.architecture, config, place)
    config = request.architecture.read_files(config, files)
    if fetched is not None:
        folders = request.architecture.parts(config)
        parts = {folder: _fetch_part(source, folder, place) for folder in folders}
    return Origin(source, config, fetched, parts)


def _hashed(
    origin: Origin, fetched: Fetched, request: Request, place: Place
) -> tuple[Origin, Mapped | MLXZooError | None]:
    """The origin with the hashes of its local files, which tell whether the cache has them.

    Large files are mapped meanwhile, lest it has not; what is wrong with them is said only then.
    """
    mapped: Mapped | MLXZooError | None = None
    if fetched.is_hashed or fetched.size < LARGE:
        fetched = fetched.hashed(place.root)
    else:
        with ThreadPoolExecutor(1) as thread:
            hashing = thread.submit(fetched.hashed, place.root)
            try:
                mapped = _mapped(fetched, origin, request, place)
            except MLXZooError as error:
                mapped = error
            fetched = hashing.result()
        fetched.check_unchanged()
    _check_sha256(fetched.sha256, request.checkpoint)
    return replace(origin, fetched=fetched), mapped


def _convert(
    key: str,
    origin: Origin,
    mapped: Mapped | MLXZooError | None,
    request: Request,
    place: Place,
) -> Converted:
    if isinstance(mapped, MLXZooError):
        raise mapped
    fetched = origin.fetched or _fetch(origin.source, request, place)
    mapped = mapped or _mapped(fetched, origin, request, place)
    config = mapped.config
    checkpoint = replace(request.checkpoint, dialect=mapped.dialect)
    if is_bare(request.checkpoint):  # only now is it known what the file holds
        checkpoint = replace(checkpoint, config=config)
    weights, how = _quantized(mapped.weights, config, request)
    manifest = manifest_of(checkpoint, config, request.architecture, mapped.nonfinite, how)
    manifest["source_sha256"] = fetched.sha256
    try:
        entry = cache.store(place.root, checkpoint.name, key, weights, manifest)
    except OSError as error:
        cannot_keep(place.root, error)
        entry = None
    return Converted(weights, config, checkpoint, how, entry)


def _mapped(fetched: Fetched, origin: Origin, request: Request, place: Place) -> Mapped:
    """The tensors of the files, as the network wants them."""
    state = read_state_dict(fetched.weights, fetched.index)
    fetched.check_unchanged()
    for folder, prefix in request.architecture.parts(origin.config).items():
        state |= _part(origin, folder, prefix, place)
    weights, config, dialect = _map(state, origin.config, request)
    del state
    _settle(weights)
    nonfinite = engine.nonfinite(weights)
    _check_finite(nonfinite, request)
    return Mapped(weights, config, dialect, nonfinite)


def _settle(weights: dict[str, mx.array]) -> None:
    """Compute the weights one after the other, in place: each lets go of what it was made of."""
    for name in weights:
        weights[name] = mx.contiguous(weights[name])
        mx.eval(weights[name])


def network(architecture: Architecture, config: Any, how: Quantization | None) -> nn.Module:
    """The network that such weights fill; nothing is allocated."""
    model = architecture.outline(config)
    return model if how is None else quantize_layers(model, how)


def _quantized(
    weights: Mapping[str, mx.array], config: Any, request: Request
) -> tuple[Mapping[str, mx.array], Quantization | None]:
    """The weights as the user wants them quantised, if at all, and which layers that were."""
    if request.quantize is None:
        return weights, None
    model = request.architecture.outline(config)
    model.load_weights(list(weights.items()), strict=True)
    quantize(model, request.quantize.bits, group_size=request.quantize.group_size)
    return engine.parameters(model), model.quantization


def _fetch(source: Source, request: Request, place: Place) -> Fetched:
    _say_licence(request.checkpoint)
    try:
        return fetch_weights(source, **place.options)
    except NotCached as error:
        name = request.checkpoint.name
        raise NotCached(
            f"the weights of {name} are not in the cache and the network is off. "
            f"Fetch them with the network on: mlx-zoo load {name}"
        ) from error


def _say_licence(checkpoint: Checkpoint) -> None:
    """Log what a licence forbids, before the weights are downloaded."""
    if checkpoint.is_non_commercial:
        warn_once(
            f"{checkpoint.name}: the licence of these weights, {checkpoint.license}, "
            "does not allow commercial use"
        )


def manifest_of(
    checkpoint: Checkpoint,
    config: Any,
    architecture: Architecture,
    nonfinite: list[str],
    quantization: Quantization | None,
) -> dict[str, Any]:
    """What is written beside converted weights: where they are from, and what they are."""
    assert checkpoint.dialect is not None
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "spec": architecture.spec(checkpoint.dialect, config).fingerprint,
        "nonfinite": nonfinite,
        "quantization": quantization and asdict(quantization),
        **describe.to_json(replace(checkpoint, folder=None), config),
    }


def _convertible(request: Request) -> Any:
    """The config that the weights are expected to fill: what of the wish they can fulfil."""
    checkpoint, config = request.checkpoint, request.config
    if is_bare(checkpoint):  # what it holds is not known yet: try the wish itself
        return replace(config, **request.sizes)
    if request.architecture.keeps_head(checkpoint, request.task, request.num_classes):
        return config
    if request.num_classes is None:
        raise no_head(checkpoint, request)
    return request.architecture.without_head(config)


def no_head(checkpoint: Checkpoint, request: Request) -> CheckpointError:
    """The error for a head that the weights do not have."""
    remedy = "load or convert its original, with that task"
    if request.architecture.head_size(request.config) is not None:
        remedy = "num_classes= asks for a fresh one, to be trained"
    return CheckpointError(f"{checkpoint.name} has no head for {request.task}; {remedy}")


def is_bare(checkpoint: Checkpoint) -> bool:
    """Whether nothing but a file's own tensors says what they are."""
    return checkpoint.dialect is None


def _map(
    state: Mapping[str, mx.array], config: Any, request: Request
) -> tuple[dict[str, mx.array], Any, str]:
    """The state dict as parameters of a network, that network's config, and the dialect.

    Where the weights do not fill the wished-for head or input, and the user gave its size, they
    may fill the network without it: it is made afresh then.
    """
    architecture = request.architecture
    wishes = [config]
    if request.num_classes is not None:
        wishes.append(architecture.without_head(config))
    for name in request.sizes.keys() - {"num_classes"}:
        own = getattr(request.checkpoint.config, name)
        wishes += [replace(wish, **{name: own}) for wish in wishes]
    failure: MappingError | None = None
    for wish in wishes:
        try:
            wish = architecture.fit(wish, frozenset(state))
            model = architecture.outline(wish)
            dialect = choose_dialect(state, model, architecture, request.checkpoint)
            weights = engine.to_mlx(state, model, architecture.spec(dialect, wish))
        except MappingError as error:
            failure = failure or error
            continue
        return _cast(weights, request), wish, dialect
    assert failure is not None
    if same := _variants_of(state, request):
        remedy = f"these are the tensors of {', '.join(same)}, which load({same[0]!r}, ...) reads"
        raise MappingError(f"{failure.message}; {remedy}", failure.problems) from failure
    raise failure


def _variants_of(state: Mapping[str, mx.array], request: Request) -> list[str]:
    """Other variants of the architecture, at most three, that the tensors fill but for a head."""
    architecture, checkpoint = request.architecture, request.checkpoint
    outline = {name: mx.broadcast_to(mx.array(0.0), x.shape) for name, x in state.items()}

    def body(config: Any) -> Any:
        return architecture.fit(architecture.without_head(config), frozenset(state))

    @once
    def fits(config: Any) -> bool:
        spec = architecture.spec(dialect, config)
        return not engine.mismatches(outline, architecture.outline(config), spec)

    own = body(request.config)
    candidates = _candidates(own, architecture, checkpoint)
    dialect = _nearest(state, architecture.outline(own), candidates)
    if fits(own):  # something else is wrong: a type, a head
        return []
    variants = architecture.variants.items()
    return list(islice((name for name, config in variants if fits(body(config))), 3))


def _cast(weights: Mapping[str, mx.array], request: Request) -> dict[str, mx.array]:
    """The weights in the type that was asked for, or in their own; packed integers stay."""
    if request.dtype is None:
        return dict(weights)
    floating = {name for name, x in weights.items() if mx.issubdtype(x.dtype, mx.floating)}
    return {n: x.astype(request.dtype) if n in floating else x for n, x in weights.items()}


def choose_dialect(
    state: Mapping[str, mx.array],
    model: nn.Module,
    architecture: Architecture,
    checkpoint: Checkpoint,
) -> str:
    """The name of the one dialect that covers the tensors exactly.

    Raises MappingError: with the nearest miss where there is none, with all where there are two.
    """
    candidates: dict[str, Spec] = {}
    for name, spec in _candidates(model.config, architecture, checkpoint).items():
        if spec not in candidates.values():  # publishers may write alike
            candidates[name] = spec
    misses = {name: engine.mismatches(state, model, spec) for name, spec in candidates.items()}
    fitting: dict[tuple[engine.Link, ...], str] = {}
    for name, problems in misses.items():
        if not problems:  # dialects that read this network alike are one
            fitting.setdefault(engine.links(model, candidates[name]), name)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        several = "; ".join(fitting.values())
        raise MappingError(f"{checkpoint.source} fits several dialects: {several}")
    nearest = _nearest(state, model, candidates)
    raise MappingError(
        f"{checkpoint.source} does not fit {checkpoint.name} (as {nearest} writes it)",
        misses[nearest],
    )


def _candidates(config: Any, architecture: Architecture, checkpoint: Checkpoint) -> dict[str, Spec]:
    """The dialects that the weights may have, as far as the checkpoint says."""
    return {
        name: architecture.spec(name, config)
        for name in architecture.dialects
        if checkpoint.dialect in (None, name, name.partition(",")[0])
    }


def _nearest(state: Mapping[str, mx.array], model: nn.Module, candidates: dict[str, Spec]) -> str:
    return max(candidates, key=lambda name: _num_known(state, model, candidates[name]))


def _num_known(state: Mapping[str, mx.array], model: nn.Module, spec: Spec) -> int:
    """How many of the tensors have a home in `model`, whatever their shapes."""
    homes = {link.source for link in engine.links(model, spec)}
    return sum(name.removeprefix(spec.prefix) in homes for name in state)


def _part(origin: Origin, folder: str, prefix: str, place: Place) -> dict[str, mx.array]:
    """The weights of a module that a repository keeps in a folder of its own."""
    fetched = origin.parts.get(folder) or _fetch_part(origin.source, folder, place)
    if not fetched.files:
        raise CheckpointError(f"{origin.source} has no weights in {folder}")
    state = read_state_dict([next(iter(fetched.files.values()))])
    fetched.check_unchanged()
    return {prefix + name: x for name, x in state.items()}


def _fetch_part(source: Any, folder: str, place: Place) -> Fetched:
    names = [f"{folder}/{name}" for name in ("model.safetensors", "pytorch_model.bin")]
    return fetch_files(source, (), optional=names, **place.options)


def _check_sha256(hashes: Mapping[str, str], checkpoint: Checkpoint) -> None:
    promised = checkpoint.sha256
    for name, sha256 in hashes.items():
        if promised and not sha256.startswith(promised):
            raise IntegrityError(
                f"{name} of {checkpoint.source} has sha256 {sha256}, {promised} was published"
            )


def _check_finite(names: list[str] | None, request: Request) -> None:
    """Raise CheckpointError for tensors with NaN or infinity, unless they are allowed."""
    if names and not request.allow_nonfinite:
        cast = "" if request.dtype is None else f" as {str(request.dtype).split('.')[-1]}"
        raise CheckpointError(
            f"{request.checkpoint.source} holds NaN or infinity{cast} in "
            f"{', '.join(engine.collapse(names))}; allow_nonfinite=True lets it pass"
        )


@once
def warn_once(message: str) -> None:
    """Log a warning, the first time that it would say just this."""
    log.warning(message)


def _from_cache(key: str, request: Request, place: Place) -> Converted | None:
    """What the entry of that key holds, or None where there is no whole one."""
    checkpoint = request.checkpoint
    entry = cache.look_up(place.root, checkpoint.name, key)
    if entry is None:
        return None
    try:
        weights = cache.read_checked(entry)
        stored, config = describe.from_json(entry.manifest)
        if is_bare(checkpoint):
            checkpoint = replace(checkpoint, config=stored.config)
        checkpoint = replace(checkpoint, dialect=stored.dialect, revision=stored.revision)
        how = quantization_of(entry.manifest)
        found = Converted(weights, config, checkpoint, how, entry)
    except MLXZooError as error:  # damaged, or of another release
        cache.quarantine(place.root, entry.path, error)
        return None
    except OSError:
        log.info("%s was removed or replaced just now; it is converted again", entry.path)
        return None
    _check_finite(entry.manifest.get("nonfinite"), request)
    return found


def quantization_of(manifest: Mapping[str, Any]) -> Quantization | None:
    """How the weights of a manifest are quantised, if they are."""
    said = manifest.get("quantization")
    return None if said is None else config_from(Quantization, said)


def _from_folder(folder: Path, request: Request, source: HubSource | None = None) -> Converted:
    """What `convert` wrote; into a repository where `source` is given, of which this is a copy."""
    weights: Mapping[str, mx.array]
    try:
        entry = replace(cache.read_entry(folder), borrowed=source is not None)
        weights = cache.read_checked(entry)
    except (OSError, ValueError, MLXZooError) as error:
        remedy = f"{source} is to be uploaded again" if source else "convert it again"
        raise IntegrityError(f"{folder} is damaged ({error}): {remedy}") from error
    if entry.manifest["format"] != cache.FORMAT:
        raise CheckpointError(
            f"{folder} has format {entry.manifest['format']}, {cache.FORMAT} is read here: "
            "convert it again"
        )
    checkpoint, config = describe.from_json(entry.manifest)
    if checkpoint.architecture != request.architecture.name:
        raise CheckpointError(
            f"{folder} holds a {checkpoint.architecture}, not a {request.architecture.name}"
        )
    published = vars(request.checkpoint.config)
    said = {k: v for k, v in vars(request.config).items() if k != "task" and v != published[k]}
    config = replace(config, **said)
    how = quantization_of(entry.manifest)
    if engine.parameters(network(request.architecture, config, how)).keys() != weights.keys():
        raise CheckpointError(f"{folder}: its weights and config disagree")
    if request.task != getattr(config, "task", None):
        config, weights = _other_task(config, weights, how, folder, request)
    if request.dtype is not None:
        weights = _cast(weights, request)
        _check_finite(engine.nonfinite(weights), request)
    _check_finite(entry.manifest.get("nonfinite"), request)
    if how is None:
        weights, how = _quantized(weights, config, request)
    elif request.quantize not in (None, Quantization(how.bits, how.group_size)):
        raise ValueError(f"{folder} holds weights of {how.bits} bits: leave out quantize=")
    checkpoint = replace(checkpoint, folder=str(folder))
    return Converted(weights, config, checkpoint, how, entry)


def _other_task(
    config: Any,
    weights: Mapping[str, mx.array],
    how: Quantization | None,
    folder: Path,
    request: Request,
) -> tuple[Any, Mapping[str, mx.array]]:
    """A converted network for another task, where its tensors and files suffice, else its body."""
    architecture, task = request.architecture, request.task
    body = architecture.without_head(config)
    if task is not None:
        wish = replace(body, task=task)
        files = describe.files_of(DirectorySource(folder), architecture, wish, Place())
        wish = architecture.fit(architecture.read_files(wish, files), frozenset())
        stored = replace(request.checkpoint, config=config, task=config.task)
        wanted = engine.parameters(network(architecture, wish, how)).keys()
        if wanted <= weights.keys() and architecture.keeps_head(stored, task, request.num_classes):
            return wish, {name: weights[name] for name in wanted}
    wanted = engine.parameters(network(architecture, body, how)).keys()
    return body, {name: weights[name] for name in wanted}
