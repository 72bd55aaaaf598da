"""load(): a name -> its checkpoint -> converted weights -> a network that is ready to use.

Converted weights come from the cache where it has them; otherwise the published file is fetched,
read, mapped and kept. `convert` and `export` are the same road, to a folder and back to PyTorch.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import describe, registry
from mlx_zoo.catalogue import Architecture, Checkpoint, config_from
from mlx_zoo.describe import Place, as_source
from mlx_zoo.errors import (
    CheckpointError,
    IntegrityError,
    MappingError,
    MLXZooError,
    VerificationError,
)
from mlx_zoo.hub import cache
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.hub.fetch import Fetched, fetch_files, fetch_weights, resolve_revision
from mlx_zoo.hub.source import DirectorySource, HubSource, UrlSource
from mlx_zoo.mapping import engine
from mlx_zoo.mapping.spec import Spec

log = logging.getLogger("mlx_zoo")

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load(
    name: str | os.PathLike[str],
    pretrained: bool | str | os.PathLike[str] = False,
    *,
    task: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    verify: bool = False,
    allow_nonfinite: bool = False,
    **config: Any,
) -> nn.Module:
    """Load a network, in eval mode, every parameter evaluated.

    Args:
        name: an architecture or checkpoint (`list_models()`), `hf-hub:org/name[@revision]`,
            `org/name`, or `local-dir:folder`.
        pretrained: True for the published weights, a path or source for other weights of the same
            architecture, False for random ones (no weights are downloaded then).
        task: which head, for the text networks; None is the bare body.
        num_classes: where it differs from the checkpoint's, the head is fresh; the log says so.
        in_chans: channels of the input, None for the checkpoint's own. The weights of the first
            convolution are summed or repeated to fit.
        img_size: side of the images, for networks whose parameters depend on it.
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoint's own.
        revision: branch, tag or commit of a hub repository. The commit of the first load stays in
            use until another is asked for.
        cache_dir: instead of MLX_ZOO_CACHE or the platform's cache folder.
        local_files_only: never ask the network.
        verify: compare with the PyTorch original, once, and keep the result.
        allow_nonfinite: let weights with NaN or infinity pass.
        **config: fields of the architecture's config, as `dropout=0.0`.

    Returns:
        The module, with `.config` (frozen) and `.checkpoint` (None where the weights are random).

    Raises:
        MLXZooError: whatever is wrong with the name, the files or the weights (mlx_zoo.errors).
        ValueError: a wrong argument.
    """
    place = Place(cache_dir, local_files_only)
    checkpoint = describe.find(name, revision, place)
    if pretrained is True:
        checkpoint = describe.complete(checkpoint, place)
    architecture = registry.architectures()[checkpoint.architecture]
    _check_arguments(architecture, task, num_classes, in_chans, img_size)
    dtype = None if dtype is None else as_dtype(dtype)
    wanted = _configure(checkpoint, task, config)

    if pretrained is False:
        sizes = {"num_classes": num_classes, "in_chans": in_chans}
        model = architecture.model(replace(wanted, **_given(sizes)))
        model.checkpoint = None
        model.set_dtype(dtype or mx.float32)
        return _ready(model)

    if pretrained is not True:
        checkpoint = describe.with_weights_of(checkpoint, pretrained)
    request = Request(checkpoint, architecture, wanted, num_classes, in_chans, dtype)
    converted = _converted(request, place, allow_nonfinite)
    _check_head(converted, request)
    model = _network(converted, request)
    if verify:
        _verify_once(model, converted, place)
    return _adapted(model, request)


def info(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """What is known of a checkpoint: source, licence, size, accuracy, preprocessing.

    A repository that is not in the registry is asked for its config.json.
    """
    return describe.find(name, revision, Place(cache_dir, local_files_only))


@dataclass(frozen=True)
class Request:
    """Which weights of a checkpoint are wanted, and as what."""

    checkpoint: Checkpoint
    architecture: Architecture
    config: Any  # the checkpoint's, with the task and what else the user said
    num_classes: int | None
    in_chans: int | None
    dtype: mx.Dtype | None

    @property
    def task(self) -> str | None:
        return getattr(self.config, "task", None)


@dataclass(frozen=True)
class Converted:
    """Weights in MLX's layout, the config they fill exactly, and the checkpoint they are from."""

    weights: Mapping[str, mx.array]
    config: Any
    checkpoint: Checkpoint
    entry: cache.Entry | None = None  # None where they could not be kept


def as_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """The MLX type of a name. ValueError for anything but the three floats a network may have."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: one of {', '.join(DTYPES)} is needed")
    return found


def _check_arguments(architecture, task, num_classes, in_chans, img_size) -> None:
    name, inputs = architecture.name, architecture.inputs
    if task is not None and task not in architecture.tasks:
        raise ValueError(f"task={task!r}: {name} has {', '.join(architecture.tasks)}")
    if not (num_classes is None or (isinstance(num_classes, int) and num_classes >= 0)):
        raise ValueError(f"num_classes={num_classes!r}: a count is needed")
    if num_classes is not None and task is None and inputs == "tokens":
        raise ValueError(f"num_classes={num_classes}: of which head? give task=, too")
    if in_chans is not None and inputs != "images":
        raise ValueError(f"in_chans={in_chans}: {name} takes {inputs}")
    if not (in_chans is None or (isinstance(in_chans, int) and in_chans > 0)):
        raise ValueError(f"in_chans={in_chans!r}: a count is needed")
    if img_size is not None:
        kind = "images of any size" if inputs == "images" else inputs
        raise ValueError(f"img_size={img_size}: {name} takes {kind}")


def _configure(checkpoint: Checkpoint, task: str | None, options: Mapping[str, Any]) -> Any:
    """The checkpoint's config with a task and what the user said."""
    config = checkpoint.config
    if hasattr(config, "task"):
        options = {"task": task, **options}
    return config_from(type(config), {**vars(config), **options})


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# Converting -------------------------------------------------------------------------------------


def _converted(request: Request, place: Place, allow_nonfinite: bool) -> Converted:
    """The weights from the cache; else fetched, mapped and kept there."""
    checkpoint, architecture = request.checkpoint, request.architecture
    source = as_source(checkpoint.source)
    if isinstance(source, DirectorySource) and describe.is_converted(source.path):
        return _from_folder(source.path, request, allow_nonfinite)

    fetched = None
    if isinstance(source, HubSource):  # a commit says what the bytes are
        source = HubSource(source.repo, resolve_revision(source, **place.options))
        checkpoint = replace(checkpoint, revision=source.revision)
        identity: Any = str(source)
    elif isinstance(source, UrlSource):
        identity = str(source)
    else:  # local files are what their bytes are
        fetched = fetch_weights(source, **place.options)
        _check_sha256(fetched.sha256, checkpoint)
        identity = sorted(fetched.sha256.values())

    config = _convertible(request)
    files = describe.files_of(source, architecture, config, place)
    config = architecture.read_files(config, files)
    if fetched is not None:
        parts = [_fetch_part(source, folder, place) for folder in architecture.parts(config)]
        identity = [identity, [sorted(part.sha256.values()) for part in parts]]
    key = cache.key_of(
        {
            "source": identity,
            "architecture": architecture.name,
            "specs": architecture.fingerprint,
            "dialect": checkpoint.dialect,
            "config": asdict(config),
            "dtype": str(request.dtype),
        }
    )
    if (found := _from_cache(key, checkpoint, place)) and found.entry:
        _check_finite(found.entry.manifest.get("nonfinite"), request, allow_nonfinite)
        return found

    fetched = fetched or fetch_weights(source, **place.options)
    state = read_state_dict(fetched.weights, fetched.index)
    for folder, prefix in architecture.parts(config).items():
        state |= _part(source, folder, prefix, place)
    weights, config, dialect = _map(state, config, request)
    nonfinite = engine.nonfinite(weights)
    _check_finite(nonfinite, request, allow_nonfinite)
    checkpoint = replace(checkpoint, dialect=dialect)
    manifest = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "source_sha256": fetched.sha256,
        "spec": architecture.dialects[dialect].fingerprint,
        "nonfinite": nonfinite,
        **describe.to_json(checkpoint, config),
    }
    try:
        entry = cache.store(place.root, checkpoint.name, key, weights, manifest)
    except OSError as error:
        _warn_once(f"converted weights cannot be kept in {place.root}: {error}")
        entry = None
    return Converted(weights, config, checkpoint, entry)


def _convertible(request: Request) -> Any:
    """The config that the weights are expected to fill: what of the wish they can fulfil."""
    checkpoint, config = request.checkpoint, request.config
    if is_bare(checkpoint):  # what it holds is not known yet: try the wish itself
        sizes = {"num_classes": request.num_classes, "in_chans": request.in_chans}
        return replace(config, **_given(sizes))
    if request.architecture.keeps_head(checkpoint, request.task, request.num_classes):
        return config
    if request.num_classes is None:
        raise CheckpointError(
            f"{checkpoint.name} has no head for {request.task}; "
            "num_classes= asks for a fresh one, to be trained"
        )
    return request.architecture.without_head(config)


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
    if request.in_chans is not None:
        own = request.checkpoint.config.in_chans
        wishes += [replace(wish, in_chans=own) for wish in wishes]
    failure: MappingError | None = None
    for wish in wishes:
        try:
            wish = architecture.fit(wish, frozenset(state))
            model = architecture.model(wish)
            dialect = choose_dialect(state, model, architecture, request.checkpoint)
            weights = engine.to_mlx(state, model, architecture.dialects[dialect])
        except MappingError as error:
            failure = failure or error
            continue
        if request.dtype is not None:
            weights = {name: x.astype(request.dtype) for name, x in weights.items()}
        return weights, wish, dialect
    assert failure is not None
    raise failure


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
    tables = set()
    for name, spec in architecture.dialects.items():
        publisher = name.partition(",")[0]
        table = engine.links(model, spec)  # dialects that read this network alike are one
        if checkpoint.dialect in (None, name, publisher) and table not in tables:
            tables.add(table)
            candidates[name] = spec
    misses = {name: engine.mismatches(state, model, spec) for name, spec in candidates.items()}
    fitting = [name for name, problems in misses.items() if not problems]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise MappingError(f"{checkpoint.source} fits several dialects: {'; '.join(fitting)}")
    nearest = max(candidates, key=lambda name: _num_known(state, model, candidates[name]))
    raise MappingError(
        f"{checkpoint.source} does not fit {checkpoint.name} (as {nearest} writes it)",
        misses[nearest],
    )


def _num_known(state: Mapping[str, mx.array], model: nn.Module, spec: Spec) -> int:
    """How many of the tensors have a home in `model`, whatever their shapes."""
    homes = {link.source for link in engine.links(model, spec)}
    return sum(name.removeprefix(spec.prefix) in homes for name in state)


def _part(source: Any, folder: str, prefix: str, place: Place) -> dict[str, mx.array]:
    """The weights of a module that a repository keeps in a folder of its own."""
    files = _fetch_part(source, folder, place).files
    if not files:
        raise CheckpointError(f"{source} has no weights in {folder}")
    state = read_state_dict([next(iter(files.values()))])
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


def _check_finite(names: list[str] | None, request: Request, allow_nonfinite: bool) -> None:
    if names and not allow_nonfinite:
        cast = "" if request.dtype is None else f" as {str(request.dtype).split('.')[-1]}"
        raise CheckpointError(
            f"{request.checkpoint.source} holds NaN or infinity{cast} in "
            f"{', '.join(engine.collapse(names))}; allow_nonfinite=True lets it pass"
        )


@once
def _warn_once(message: str) -> None:
    log.warning(message)


# Loading ----------------------------------------------------------------------------------------


def _from_cache(key: str, checkpoint: Checkpoint, place: Place) -> Converted | None:
    """What the entry of that key holds, or None where there is no whole one."""
    entry = cache.find(place.root, checkpoint.name, key)
    if entry is None:
        return None
    try:
        stored, config = describe.from_json(entry.manifest)
        checkpoint = replace(checkpoint, dialect=stored.dialect, revision=stored.revision)
        return Converted(cache.read_weights(entry), config, checkpoint, entry)
    except CheckpointError as error:  # of another release, say
        cache.quarantine(place.root, entry.path, error)
    except OSError:
        log.info("%s was removed just now; it is converted again", entry.path)
    return None


def _from_folder(folder: Path, request: Request, allow_nonfinite: bool) -> Converted:
    """What `convert` wrote."""
    try:
        entry = cache.read_entry(folder)
        cache.check(entry)
        weights = cache.read_weights(entry)
    except (OSError, ValueError, MLXZooError) as error:
        raise IntegrityError(f"{folder} is damaged ({error}): convert it again") from error
    if entry.manifest["format"] != cache.FORMAT:
        raise CheckpointError(
            f"{folder} has format {entry.manifest['format']}, {cache.FORMAT} is read here: "
            "convert it again"
        )
    checkpoint, config = describe.from_json(entry.manifest)
    _check_finite(entry.manifest.get("nonfinite"), request, allow_nonfinite)
    published = vars(request.checkpoint.config)
    said = {k: v for k, v in vars(request.config).items() if k != "task" and v != published[k]}
    checkpoint = replace(checkpoint, folder=str(folder))
    return Converted(weights, replace(config, **said), checkpoint, entry)


def _check_head(converted: Converted, request: Request) -> None:
    """A head may be made afresh only where that was asked for."""
    has = getattr(converted.config, "task", None)
    if request.task not in (None, has) and request.num_classes is None:
        raise CheckpointError(
            f"{converted.checkpoint.name} has no head for {request.task}; "
            "num_classes= asks for a fresh one, to be trained"
        )


def _network(converted: Converted, request: Request) -> nn.Module:
    """The network that the weights fill exactly."""
    model = request.architecture.model(converted.config)
    weights = converted.weights
    if request.dtype is not None:
        weights = {name: x.astype(request.dtype) for name, x in weights.items()}
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise CheckpointError(
            f"{converted.checkpoint.name}: converted weights and config disagree: {error}"
        ) from error
    model.checkpoint = converted.checkpoint
    return _ready(model)


def _adapted(model: nn.Module, request: Request) -> nn.Module:
    """`model` with the input and the head that the user asked for, where they are others."""
    config = model.config
    if request.in_chans not in (None, getattr(config, "in_chans", None)):
        model.reset_input(request.in_chans)
    other_task = request.task is not None and request.task != config.task
    if other_task or request.num_classes not in (None, config.num_classes):
        if request.num_classes:
            name, count = model.checkpoint.name, request.num_classes
            log.warning("%s: a fresh head for %d classes, to be trained", name, count)
        model.reset_head(request.num_classes, *((request.task,) if other_task else ()))
        if request.dtype is not None:
            model.set_dtype(request.dtype)
    return _ready(model)


def _ready(model: nn.Module) -> nn.Module:
    model.eval()
    mx.eval(model.parameters())
    return model


def _verify_once(model: nn.Module, converted: Converted, place: Place) -> None:
    """Compare with the PyTorch original unless that was done before for these very weights."""
    from mlx_zoo.verify import verify

    entry = converted.entry
    done = entry.verification if entry else None
    if entry and done and done.get("passed") and done.get("sha256") == entry.manifest["sha256"]:
        return
    report = verify(model, cache_dir=place.cache_dir, local_files_only=place.local_files_only)
    if entry:
        try:
            cache.stamp(entry, report.summary())
        except OSError as error:
            _warn_once(f"the verification cannot be kept in {entry.path}: {error}")
    if not report.passed:
        raise VerificationError(
            f"{converted.checkpoint.name} does not compute what its original computes: "
            f"{report.reason}",
            report,
        )


# Writing ----------------------------------------------------------------------------------------


def convert(
    name: str | os.PathLike[str],
    path: str | os.PathLike[str],
    pretrained: bool | str | os.PathLike[str] = True,
    **options: Any,
) -> Path:
    """Write a self-contained folder that `load("local-dir:" + path, pretrained=True)` reads.

    Args:
        name, pretrained, **options: as `load` takes them.
        path: a folder that does not exist yet, or is empty.

    Returns:
        The folder: model.safetensors in MLX's layout, manifest.json with its provenance, and the
        tokenizer's files where there are any.

    Raises:
        As `load`; ValueError where the folder has something in it.
    """
    if pretrained is False:
        raise ValueError("pretrained=False: random weights are not converted")
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; give a folder that is new or empty")
    model = load(name, pretrained, **options)
    checkpoint = model.checkpoint
    weights = engine.parameters(model)
    architecture = registry.architectures()[checkpoint.architecture]
    manifest = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "spec": architecture.dialects[checkpoint.dialect].fingerprint,
        "nonfinite": engine.nonfinite(weights),
        **describe.to_json(replace(checkpoint, folder=None), model.config),
    }
    place = Place(options.get("cache_dir"), options.get("local_files_only", False))
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = cache.working_folder(folder.parent)
    try:
        cache.write_folder(work, weights, manifest)
        for own_name, file in describe.companions(checkpoint, architecture, place).items():
            (work / own_name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, work / own_name)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def export(model: nn.Module, path: str | os.PathLike[str], *, dialect: str | None = None) -> Path:
    """Write a network's weights as PyTorch names and stores them, in one safetensors file.

    Args:
        model: a network of this package, as loaded or after training.
        path: of the file, replaced at once where it exists.
        dialect: the publisher whose names are written; None for those the weights came in.

    Raises:
        ValueError: a dialect that the architecture does not have.
    """
    architecture = registry.of_model(model)
    checkpoint = getattr(model, "checkpoint", None)
    own = checkpoint.dialect if checkpoint else None
    name = dialect or own or next(iter(architecture.dialects))
    if name not in architecture.dialects:
        raise ValueError(f"dialect={name!r}: one of {'; '.join(architecture.dialects)} is needed")
    weights = engine.parameters(model)
    state = engine.to_torch(weights, model, architecture.dialects[name])
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = cache.working_folder(target.parent)
    try:
        cache.save(work / "model.safetensors", state, {"format": "pt"})
        (work / "model.safetensors").replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
