"""What a repository or folder says of itself -> Checkpoint. And a Checkpoint -> JSON and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_zoo import registry
from mlx_zoo.catalogue import (
    DATA,
    Architecture,
    Checkpoint,
    Preprocessing,
    Reference,
    as_size,
    config_from,
    labels,
    timm_resize,
)
from mlx_zoo.errors import (
    CheckpointError,
    DownloadError,
    IntegrityError,
    UnknownModel,
    UnsupportedConfig,
    legible,
)
from mlx_zoo.hub import cache
from mlx_zoo.hub.fetch import fetch_files
from mlx_zoo.hub.source import (
    DirectorySource,
    FileSource,
    HubSource,
    Source,
    UrlSource,
    parse_source,
)
from mlx_zoo.preprocess.files import read_json
from mlx_zoo.preprocess.processor import read_processor
from mlx_zoo.preprocess.sentence import sentence_files
from mlx_zoo.preprocess.text import TOKENIZER_FILES

CONFIG = "config.json"
OURS = {"format", "checkpoint", "config"}  # in a manifest that `convert` wrote
LIBRARY = "mlx_zoo"  # says a config.json that `convert` wrote, for people to read

# Of any transformers config.json: these ask for arithmetic or code that is not here.
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "auto_map": ({}, None),  # code of the repository's own
}


def place_of(model: nn.Module, cache_dir: Any = None, local_files_only: bool = False) -> Place:
    """Where the files of a loaded network are, but for what is said now."""
    own = getattr(model, "place", Place())
    return Place(
        own.cache_dir if cache_dir is None else cache_dir, local_files_only or own.local_files_only
    )


@dataclass(frozen=True)
class Place:
    """Where files are kept, and whether the network may be asked."""

    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    @property
    def root(self) -> Path:
        return cache.cache_root(self.cache_dir)

    @property
    def options(self) -> dict[str, Any]:
        """As the functions of hub.fetch take them."""
        directory = None if self.cache_dir is None else Path(self.cache_dir)
        return {"cache_dir": directory, "local_files_only": self.local_files_only}


def find(name: str | os.PathLike[str], revision: str | None, place: Place) -> Checkpoint:
    """The checkpoint that a user names: of the registry, of the hub, or of a folder.

    Raises UnknownModel, UnsupportedConfig, DownloadError; ValueError for a bare file.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"name={name!r}: the name of a model, a source or a path is needed")
    source = parse_source(name, revision)
    if source is None:
        checkpoint = registry.find(os.fspath(name))
        if revision is None:
            return checkpoint
        if not checkpoint.source.startswith("hf-hub:"):
            raise ValueError(f"{name} has no revisions: leave out revision={revision!r}")
        source = parse_source(checkpoint.source, revision)
        return replace(checkpoint, source=str(source))
    if isinstance(source, (FileSource, UrlSource)):
        raise ValueError(
            f"{name} does not say which architecture it is for; give both: "
            f"load('resnet18', pretrained={os.fspath(name)!r})"
        )
    if isinstance(source, HubSource):
        _refuse_folder(name)
    known = registry.of_repository(source.repo) if isinstance(source, HubSource) else None
    return replace(known, source=str(source)) if known else read(source, place)


def _refuse_folder(name: Any) -> None:
    """Raise ValueError where a bare 'org/name' is a folder here: which of the two is meant?"""
    if isinstance(name, str) and not name.startswith("hf-hub:") and Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder here: write local-dir:{name} for it, hf-hub:{name} for the hub"
        )


def complete(checkpoint: Checkpoint, place: Place) -> Checkpoint:
    """A checkpoint of the registry, as its own repository's config.json describes it today."""
    if not checkpoint.source.startswith("hf-hub:"):
        return checkpoint
    if checkpoint.reference is None or checkpoint.reference.library != "transformers":
        return checkpoint
    source = as_source(checkpoint.source)
    assert isinstance(source, HubSource)
    own = read(source, place)
    task = checkpoint.task if own.task is None else own.task
    found = {
        "config": own.config,
        "labels": own.labels,
        "revision": own.revision,
        "preprocessing": own.preprocessing or checkpoint.preprocessing,
    }
    return replace(checkpoint, task=task, **found)


def with_weights_of(
    checkpoint: Checkpoint, other: str | os.PathLike[str], place: Place
) -> Checkpoint:
    """`checkpoint` with the weights of a local file or another source.

    What was published of it, its hash included, does not hold for them. A folder or repository
    that says which network it holds must mean the same one. Raises CheckpointError otherwise;
    ValueError for something that is no source.
    """
    source: Source | None = None
    if isinstance(other, (str, os.PathLike)):
        is_file = Path(other).is_file()  # whatever its name
        source = parse_source(Path(other) if is_file else other)
    if isinstance(source, HubSource):
        _refuse_folder(other)
    if source is None:
        raise ValueError(
            f"pretrained={other!r}: True, the path of a checkpoint, or a source is needed"
        )
    bare = Checkpoint(
        name=checkpoint.variant,
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        source=str(source),
        reference=checkpoint.reference,
        preprocessing=checkpoint.preprocessing,
    )
    if isinstance(source, (FileSource, UrlSource)):
        return bare
    says = fetch_files(source, (), optional=("config.json", cache.MANIFEST), **place.options)
    if not says.files:
        return replace(bare, license=says.license)
    own = read(source, place)
    if differences := _differences(own, checkpoint):
        raise CheckpointError(
            f"{source} holds another network than {checkpoint.name}: {differences}; "
            f"load({str(source)!r}, pretrained=True) loads it"
        )
    return own


def _differences(own: Checkpoint, other: Checkpoint) -> str:
    """What sets two networks apart, but for their heads and inputs; '' if nothing does."""
    if own.architecture != other.architecture:
        return f"{own.architecture}, not {other.architecture}"
    ours, theirs = vars(own.config), vars(other.config)
    head = registry.architectures()[own.architecture].head_fields
    free = {"num_classes", "in_chans", "img_size", "task", *head}
    free |= {name for name in ours if "drop" in name}
    return ", ".join(
        f"{name}={value!r}, not {theirs[name]!r}"
        for name, value in ours.items()
        if name not in free and value != theirs[name]
    )


def as_source(text: str) -> Source:
    """The source that a checkpoint names; `package:` is what ships with mlx_zoo."""
    if text.startswith("package:"):
        path = path_of(text)
        return DirectorySource(path) if path.is_dir() else FileSource(path)
    source = parse_source(text)
    if source is None:
        raise UnknownModel(
            "there are no published weights of this architecture; give a checkpoint: "
            "load(name, pretrained='file.pth'), or one of mlx_zoo.list_models(pretrained=True)"
        )
    return source


def path_of(text: str) -> Path:
    """The file or folder that a `package:` source names. Raises CheckpointError outside of it."""
    path = DATA / text.removeprefix("package:")
    if not path.resolve().is_relative_to(DATA.resolve()):
        raise CheckpointError(f"{text} is not in the package")
    return path


def read(source: HubSource | DirectorySource, place: Place) -> Checkpoint:
    """What a repository or folder says of itself."""
    names = ("config.json", cache.MANIFEST, "preprocessor_config.json")
    fetched = fetch_files(source, (), optional=names, **place.options)
    files = fetched.files
    if isinstance(source, DirectorySource):
        converted = is_converted(source.path)
    else:
        converted = cache.MANIFEST in files and _is_manifest(files[cache.MANIFEST])
    if converted:
        checkpoint, config = from_json(read_json(files[cache.MANIFEST]))
        task = getattr(config, "task", checkpoint.task)  # of its head, where it has one
        if isinstance(source, HubSource):  # whoever asks for its weights needs the rest, too
            folder = str(files[cache.MANIFEST].parent)
            checkpoint = replace(checkpoint, revision=fetched.revision, folder=folder)
        return replace(checkpoint, config=config, task=task, source=str(source))
    if "config.json" not in files:
        raise CheckpointError(
            f"{source} has no config.json, so its architecture is unknown: "
            "load(architecture, pretrained=...) reads bare weights"
        )
    config = read_json(files["config.json"])
    if is_readers_config(config):
        raise CheckpointError(f"{source} is a converted folder without its {cache.MANIFEST}")
    name = source.repo if isinstance(source, HubSource) else source.path.resolve().name
    try:
        checkpoint = described(config, name)
        architecture = registry.architectures()[checkpoint.architecture]
        architecture.outline(checkpoint.config)  # refuses what the network does not have
        processor = files.get("preprocessor_config.json")
        if processor and architecture.inputs == "images" and checkpoint.preprocessing is None:
            how = read_processor(read_json(processor), config.get("model_type"))
            checkpoint = replace(checkpoint, preprocessing=how)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedConfig(f"{name}: config.json cannot be read: {error}") from error
    return _legible(
        replace(
            checkpoint,
            source=str(source),
            revision=fetched.revision or None,
            license=checkpoint.license or fetched.license,
        )
    )


def _legible(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose texts, which a stranger wrote, are texts that a terminal may show."""
    own = checkpoint.license
    return replace(
        checkpoint,
        name=legible(checkpoint.name, keep=""),
        license=legible(own, keep="") if isinstance(own, str) else None,
        labels=tuple(legible(str(label), keep="") for label in checkpoint.labels),
    )


def source_of(checkpoint: Checkpoint) -> Source:
    """Where the published bytes are; of the hub: at the commit, once that is known."""
    source = as_source(checkpoint.source)
    if isinstance(source, HubSource) and checkpoint.revision:
        return replace(source, revision=checkpoint.revision)
    return source


def files_of(
    source: Source, architecture: Architecture, config: Any, place: Place
) -> Mapping[str, Path]:
    """The files that complete a config, as the architecture asks for them."""
    return _fetch_wanted(source, lambda files: architecture.files(config, files), place)


def companions(
    checkpoint: Checkpoint, architecture: Architecture, place: Place
) -> Mapping[str, Path]:
    """The files beside the weights that their use needs: config.json, the tokenizer's."""
    own_folder = checkpoint.folder  # a converted one outlives its original
    if not own_folder and not checkpoint.source:  # trained from random weights
        return {}
    source = as_source(f"local-dir:{own_folder}") if own_folder else source_of(checkpoint)
    if not isinstance(source, (HubSource, DirectorySource)):
        return {}

    def wanted(files: Mapping[str, Path]) -> tuple[str, ...]:
        if architecture.inputs != "tokens":
            return ("config.json", "preprocessor_config.json")
        return TOKENIZER_FILES + sentence_files() + sentence_files(files.get("modules.json"))

    files = dict(_fetch_wanted(source, wanted, place))
    if CONFIG in files and is_readers_config(read_json(files[CONFIG])):
        del files[CONFIG]  # it is written anew with each folder
    return files


def is_readers_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that `convert` wrote, not a publisher's."""
    return config.get("library_name") == LIBRARY


def fetch_converted(checkpoint: Checkpoint, place: Place) -> Path:
    """All files of a repository that holds a converted folder; the folder that they are in.

    Raises as `fetch_files` does; IntegrityError for a manifest that is not one of ours.
    """
    source = source_of(checkpoint)
    found = fetch_files(source, (cache.MANIFEST,), **place.options)
    folder = found.files[cache.MANIFEST].parent
    try:
        weights = cache.weights_of(read_json(found.files[cache.MANIFEST]))
    except ValueError as error:
        raise IntegrityError(f"{source}: {error}") from error
    if len(weights) > 1:
        weights += (cache.INDEX,)
    beside = (cache.VERIFICATION, cache.FINGERPRINT)
    files = {**fetch_files(source, weights, optional=beside, **place.options).files}
    architecture = registry.architectures()[checkpoint.architecture]
    files |= companions(replace(checkpoint, folder=None), architecture, place)
    if any(path != folder / name for name, path in files.items()):
        raise DownloadError(
            f"the files of {source} are in two caches, as one cannot be written: give a cache_dir "
            "that can"
        )
    return folder


def _fetch_wanted(
    source: Source, wanted: Callable[[Mapping[str, Path]], tuple[str, ...]], place: Place
) -> Mapping[str, Path]:
    """Those files that there are of the ones `wanted` names, given those in hand, until no more."""
    files: dict[str, Path] = {}
    asked: set[str] = set()
    while names := set(wanted(files)) - asked:
        asked |= names
        files |= fetch_files(source, (), optional=sorted(names), **place.options).files
    return files


def is_converted(folder: Path) -> bool:
    """Whether a folder holds weights in MLX's layout, as `mlx_zoo.convert` writes them."""
    path = folder / cache.MANIFEST
    return path.is_file() and read_json(path).keys() >= OURS


def _is_manifest(path: Path) -> bool:
    """Whether a repository's manifest.json is one of ours: others have files of that name."""
    try:
        return read_json(path).keys() >= OURS
    except CheckpointError:
        return False


def described(config: Mapping[str, Any], name: str) -> Checkpoint:
    """What a config.json says, whoever wrote it: timm, transformers, or `export` for torchvision.

    Raises UnsupportedConfig; what Python raises for values of another kind.
    """
    if "architecture" in config:
        return _of_timm(config, name)
    return (_of_torchvision if "constructor" in config else _of_transformers)(config, name)


def _of_torchvision(config: Mapping[str, Any], name: str) -> Checkpoint:
    constructor, options = str(config["constructor"]), dict(config.get("options") or {})
    original = Reference("torchvision", constructor)
    for known in registry.checkpoints().values():
        own = known.reference
        if own and (own.library, own.name) == ("torchvision", constructor):
            break
    else:
        raise UnsupportedConfig(f"{name}: torchvision's {constructor!r} is not implemented")
    sizes = {"num_classes": options.pop("num_classes", 1000)}
    if hasattr(known.config, "img_size"):
        sizes["img_size"] = as_size(options.pop("image_size", 224))
        original = replace(original, options={"image_size": sizes["img_size"]})
    if options:
        raise UnsupportedConfig(f"{name}: options={options} in config.json is not implemented")
    how = config.get("preprocessing")
    return Checkpoint(
        name=name,
        architecture=known.architecture,
        config=config_from(type(known.config), {**vars(known.config), **sizes}),
        source="",
        dialect="torchvision",
        reference=original,
        task="image-classification",
        license=config.get("license"),
        preprocessing=how and config_from(Preprocessing, how),
        labels=tuple(config.get("label_names") or ()),
    )


def _of_transformers(config: Mapping[str, Any], name: str) -> Checkpoint:
    for option, allowed in REFUSED.items():
        if config.get(option) not in allowed:
            raise UnsupportedConfig(f"{name}: {option} in config.json is not implemented")
    kind = config.get("model_type")
    for architecture in registry.architectures().values():
        if kind in architecture.model_types:
            break
    else:
        known = sorted(kind for a in registry.architectures().values() for kind in a.model_types)
        raise UnsupportedConfig(
            f"{name}: model_type={kind!r} in config.json is not implemented; {', '.join(known)} are"
        )
    # A class of another name may have any head, or none: the tensors will tell.
    (class_name, *_) = config.get("architectures") or [None]
    task = architecture.classes.get(class_name)
    own = architecture.read_config(config)
    if class_name in architecture.classes and task is None:
        own = architecture.without_head(own)
    return Checkpoint(
        name=name,
        architecture=architecture.name,
        config=own,
        source="",
        dialect="transformers",
        reference=Reference("transformers"),
        task=task,
        labels=labels(config),
    )


def _of_timm(config: Mapping[str, Any], name: str) -> Checkpoint:
    variant = str(config["architecture"])
    architecture = registry.family(variant)
    if architecture is None:
        raise UnsupportedConfig(f"{name}: timm's architecture {variant!r} is not implemented")
    said = dict(config.get("model_args") or {})
    published = config.get("pretrained_cfg") or {}
    in_chans, *size = published.get("input_size") or (3, 224, 224)
    sizes = {
        "in_chans": said.pop("in_chans", in_chans),
        "num_classes": said.pop(
            "num_classes", config.get("num_classes", published.get("num_classes", 1000))
        ),
    }
    own = architecture.variants[variant]
    if hasattr(own, "img_size"):  # the number of position embeddings follows from it
        sizes["img_size"] = as_size(said.pop("img_size", size))
    known = architecture.timm_args
    pools = [said.get("global_pool"), config.get("global_pool")]
    if "global_pool" not in known:
        said.pop("global_pool", None)
    if unknown := {arg: x for arg, x in said.items() if arg not in known}:
        raise UnsupportedConfig(f"{name}: model_args={unknown} in config.json is not implemented")
    own = config_from(
        type(own), {**vars(own), **sizes, **{known[arg]: x for arg, x in said.items()}}
    )
    own = architecture.timm_derives(architecture.variants[variant], own)
    pool = getattr(own, known["global_pool"]) if "global_pool" in known else "avg"
    if other := [said_pool for said_pool in pools if said_pool not in (pool, None)]:
        raise UnsupportedConfig(
            f"{name}: global_pool={other[0]!r} in config.json is not implemented"
        )
    height, width = size
    crop_pct = published.get("crop_pct") or 0.875
    resize = (timm_resize(height, crop_pct), timm_resize(width, crop_pct))
    return Checkpoint(
        name=name,
        architecture=architecture.name,
        config=own,
        source="",
        dialect="timm",
        reference=Reference("timm", variant, said),
        task="image-classification" if own.num_classes else None,
        license=published.get("license"),
        preprocessing=Preprocessing(
            size=as_size(size),
            resize=as_size(resize),
            interpolation=published.get("interpolation") or "bilinear",
            mean=tuple(published.get("mean") or Preprocessing.mean),
            std=tuple(published.get("std") or Preprocessing.std),
            crop_mode=published.get("crop_mode") or "center",
        ),
        labels=tuple(config.get("label_names") or ()),
    )


def _check_original(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise CheckpointError for an original or stored outputs that the registry does not know.

    Verification builds the one and opens the other, and a manifest may be a stranger's: a library's
    constructor has options that load files.
    """
    alike = [c for c in registry.checkpoints().values() if c.architecture == architecture.name]
    own = checkpoint.reference
    if own is not None:
        theirs = [c.reference for c in alike if c.reference and c.reference.library == own.library]
        names = {*(original.name for original in theirs), *architecture.variants}
        options = {*architecture.timm_args, *(name for x in theirs for name in x.options)}
        if not theirs or own.name not in names or not set(own.options) <= options:
            raise CheckpointError(f"{checkpoint.name}: its original, {own}, is none that is known")
    stored = {c.evidence for c in alike if c.name == checkpoint.name}
    if checkpoint.evidence not in {None, *stored}:
        raise CheckpointError(f"{checkpoint.name}: no outputs were stored as {checkpoint.evidence}")


def to_json(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    """A checkpoint and the config of its converted weights, as JSON's types."""
    return {"checkpoint": asdict(checkpoint), "config": asdict(config)}


def from_json(manifest: Mapping[str, Any]) -> tuple[Checkpoint, Any]:
    """The inverse of `to_json`. Raises CheckpointError where it is something else."""
    try:
        values = dict(manifest["checkpoint"])
        architecture = registry.architectures()[values["architecture"]]
        kind = type(next(iter(architecture.variants.values())))
        values["config"] = config_from(kind, values["config"])
        for name, nested in (("reference", Reference), ("preprocessing", Preprocessing)):
            if values[name] is not None:
                values[name] = config_from(nested, values[name])
        checkpoint = config_from(Checkpoint, values)
        if not all(isinstance(text, str) for text in (checkpoint.name, checkpoint.source)):
            raise TypeError("its name and source are texts")
        _check_original(checkpoint, architecture)
        return _legible(checkpoint), config_from(kind, manifest["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{cache.MANIFEST} is not one of mlx_zoo's: {error!r}") from error
