"""What the config.json of each publisher says of a network of ours, so that their library makes it.

transformers   the class, its attributes and labels: AutoModelFor*.from_pretrained(folder)
timm           the variant and its arguments: timm.create_model("local-dir:" + folder, True)
torchvision    the constructor and its options. torchvision reads no such file; our own loader
               does, and a person: get_model(config["constructor"], **config["options"])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import registry
from mlx_zoo.catalogue import Architecture, Checkpoint, num_labels, timm_resize
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.mapping import engine
from mlx_zoo.models.layers import ACTIVATIONS
from mlx_zoo.preprocess.files import read_optional_json
from mlx_zoo.preprocess.image import Preprocessing, as_sides

SIZES = ("num_classes", "in_chans", "img_size")  # that every publisher's constructor takes
# Of config.json, what another file says, or what is said anew.
STALE = ("_name_or_path", "torch_dtype", "transformers_version", "num_labels")


def config_of(
    model: nn.Module, dialect: str, dtype: mx.Dtype, files: Mapping[str, Path]
) -> dict[str, Any]:
    """The config.json of a network's publisher.

    Args:
        dialect: in which its weights are written; the publisher is its first word.
        dtype: of the weights.
        files: those beside the published weights, with their config.json where there is one.

    Raises:
        ValueError: the publisher has no such network; the message says what differs.
    """
    publisher = dialect.partition(",")[0]
    if publisher == "transformers":
        return _of_transformers(model, dtype, read_optional_json(files, "config.json"))
    return {"timm": _of_timm, "torchvision": _of_torchvision}[publisher](model, dialect)


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the classes; () where they are not known."""
    checkpoint = getattr(model, "checkpoint", None)
    names = checkpoint.labels if checkpoint else ()
    return names if len(names) == getattr(model.config, "num_classes", 0) else ()


# transformers -----------------------------------------------------------------------------------


def _of_transformers(model: nn.Module, dtype: mx.Dtype, own: Mapping[str, Any]) -> dict[str, Any]:
    """The published config.json where it describes the network still, with today's labels."""
    architecture, config = registry.of_model(model), model.config
    written = architecture.write_config(config)
    said = {"architectures": written["architectures"], "dtype": str(dtype).rpartition(".")[2]}
    names = labels_of(model)
    if names or config.num_classes != num_labels({}) or "id2label" in own:
        names = names or tuple(f"LABEL_{i}" for i in range(config.num_classes))
        said["id2label"] = {str(i): name for i, name in enumerate(names)}
        said["label2id"] = {name: i for i, name in enumerate(names)}
    kept = {name: x for name, x in own.items() if name not in STALE}
    if num_labels(own) != config.num_classes:  # it was said of another head
        kept.pop("problem_type", None)
    if own.get("model_type") != written["model_type"]:  # of another library, or of none
        kept = {}
    published, anew = {**kept, **said}, {**kept, **written, **said}
    if kept and not _misread(published, config, architecture):
        return published
    if differing := _misread(anew, config, architecture):
        raise ValueError(f"transformers has no such network: config.json cannot say {differing}")
    return anew


def _misread(written: Mapping[str, Any], config: Any, architecture: Architecture) -> str:
    """What a config.json says otherwise than `config`; '' where it says all that matters.

    The rates of stochastic layers matter where transformers has such layers.
    """
    try:
        read = architecture.read_config(written)
    except UnsupportedConfig as error:
        return str(error)
    if not config.num_classes:
        read = architecture.without_head(read)
    # The class, or another file, says these.
    said = {"task", *architecture.head_fields, *(n for n in vars(config) if n == "drop_path")}
    return ", ".join(
        f"{name}={value!r}"
        for name, value in vars(config).items()
        if name not in said and value != getattr(read, name)
    )


# timm -------------------------------------------------------------------------------------------


def _of_timm(model: nn.Module, dialect: str) -> dict[str, Any]:
    """As timm's repositories have it; weights and sizes are loaded as they are."""
    architecture, config = registry.of_model(model), model.config
    original = _original(model, "timm")
    how = getattr(getattr(model, "checkpoint", None), "preprocessing", None)
    height, width = as_sides(getattr(config, "img_size", how.size if how else 224))
    spec = architecture.spec(dialect, config)
    found: dict[str, Any] = {
        "architecture": original.name,
        "num_classes": config.num_classes,
        "model_args": dict(original.options),
        "pretrained_cfg": {
            "architecture": original.name,
            "num_classes": config.num_classes,
            "input_size": [config.in_chans, height, width],
            "fixed_input_size": hasattr(config, "img_size"),
            **_named(list(_layers(model, spec, architecture))),
            **(_timm_preprocessing(how) if how else {}),
            **_facts(getattr(model, "checkpoint", None)),
        },
    }
    if names := labels_of(model):
        found["label_names"] = list(names)
    return found


def _layers(model: nn.Module, spec: Any, architecture: Architecture) -> Iterator[tuple[str, str]]:
    """The first convolution and the heads, by upstream's names, where one layer of ours is each."""
    modules = dict(model.named_modules())
    convolutions = 0
    for source, (target, *_) in engine.layer_links(model, spec).items():
        if isinstance(modules[target], nn.Conv2d):
            convolutions += 1
            if convolutions == 1:
                yield "first_conv", source
        if target in architecture.full_precision and model.config.num_classes:
            yield "classifier", source


def _named(found: list[tuple[str, str]]) -> dict[str, Any]:
    """The name of each layer, or the list of names where there are several."""
    names: dict[str, Any] = {}
    for kind, name in found:
        names[kind] = [*names[kind], name] if kind in names else [name]
    return {kind: own[0] if len(own) == 1 else own for kind, own in names.items()}


def _timm_preprocessing(how: Preprocessing) -> dict[str, Any]:
    said: dict[str, Any] = {
        "interpolation": how.interpolation,
        "mean": list(how.mean),
        "std": list(how.std),
        "crop_pct": _crop_pct(how.size, how.resize),
        "crop_mode": how.crop_mode,
    }
    if how.test_size and how.test_resize:
        height, width = as_sides(how.test_size)
        said["test_input_size"] = [len(how.mean), height, width]
        said["test_crop_pct"] = _crop_pct(how.test_size, how.test_resize)
    return said


def _crop_pct(size: Any, resize: Any) -> float:
    """The part that is cropped, as short as it gives `resize` again by timm's rounding."""
    (side, _), (wanted, _) = as_sides(size), as_sides(resize)
    exact = side / wanted
    candidates = (*(round(exact, digits) for digits in range(2, 6)), exact, side / (wanted + 0.5))
    return next(x for x in candidates if x and timm_resize(side, x) == wanted)


def _facts(checkpoint: Checkpoint | None) -> dict[str, Any]:
    return {"license": checkpoint.license} if checkpoint and checkpoint.license else {}


# torchvision ------------------------------------------------------------------------------------


def _of_torchvision(model: nn.Module, dialect: str) -> dict[str, Any]:
    config = model.config
    if config.in_chans != 3 or not config.num_classes:
        what = f"in_chans={config.in_chans}" if config.num_classes else "num_classes=0"
        raise ValueError(
            f"{what}: torchvision's networks have 3 channels and a head; dialect='timm' may do"
        )
    original = _original(model, "torchvision")
    found: dict[str, Any] = {
        "library": "torchvision",
        "constructor": original.name,
        "options": {**original.options, "num_classes": config.num_classes},
        "label_names": list(labels_of(model)),
    }
    checkpoint = getattr(model, "checkpoint", None)
    if hasattr(config, "img_size"):
        if not isinstance(config.img_size, int):
            raise ValueError(f"img_size={config.img_size}: torchvision's networks take squares")
        found["options"]["image_size"] = config.img_size
    if checkpoint and checkpoint.preprocessing:
        found["preprocessing"] = asdict(checkpoint.preprocessing)
    return {**found, **_facts(checkpoint)}


# Which network of theirs ------------------------------------------------------------------------


@dataclass(frozen=True)
class Original:
    """A constructor of a library, and what it is to be told besides the sizes."""

    name: str
    options: Mapping[str, Any]
    differing: tuple[str, ...]  # fields of the config that it cannot be told
    num_sizes: int  # that are other than its own


def _original(model: nn.Module, library: str) -> Original:
    """The constructor that makes this network. ValueError, naming the nearest, for none."""
    architecture, config = registry.of_model(model), model.config
    checkpoint = getattr(model, "checkpoint", None)
    reference = checkpoint.reference if checkpoint else None
    arguments = architecture.timm_args if library == "timm" else {}

    def distance(found: Original) -> tuple[Any, ...]:
        is_own = reference is not None and (reference.library, reference.name) == (
            library,
            found.name,
        )
        return len(found.differing), not is_own, len(found.options), found.num_sizes, found.name

    theirs = _variants(architecture, library).items()
    found = [_told(name, own, config, arguments, architecture) for name, own in theirs]
    best = min(found, key=distance, default=None)
    if best is None:
        raise ValueError(f"{library} has no {architecture.name}")
    if best.differing:
        own = _variants(architecture, library)[best.name]
        said = ", ".join(_other(name, config, own) for name in best.differing)
        raise ValueError(
            f"{library} has no constructor for this {architecture.name}: {best.name}, the nearest, "
            f"has {said}. A name such as weights.safetensors writes its tensors alone"
        )
    return best


def _variants(architecture: Architecture, library: str) -> dict[str, Any]:
    """The networks that a library can make by name: name -> config.

    torchvision's all have weights; a name that no weights tell of is timm's.
    """
    known: dict[str, dict[str, Any]] = {"torchvision": {}, "timm": {}}
    for c in registry.checkpoints().values():
        own = c.reference
        if c.architecture == architecture.name and own and own.name in architecture.variants:
            known.setdefault(own.library, {}).setdefault(own.name, c.config)
    if library != "timm":
        return known[library]
    return {
        name: config
        for name, config in architecture.variants.items()
        if name in known["timm"]
        or (name not in known["torchvision"] and not name.endswith("_digits"))
    }


def _told(
    name: str,
    own: Any,
    config: Any,
    arguments: Mapping[str, str],
    architecture: Architecture,
) -> Original:
    """How far a constructor can be told to make the network of a config."""
    differing = _differing(own, config)
    options = {arg: field for arg, field in arguments.items() if field in differing}
    try:
        told = replace(own, **{field: getattr(config, field) for field in options.values()})
        told = architecture.timm_derives(own, told) if options else told
    except ValueError:  # arguments that this constructor does not take together
        told = own
    left = tuple(field for field in _differing(told, config) if "drop" not in field)
    sizes = sum(getattr(own, n, None) != getattr(config, n, None) for n in SIZES)
    said = {arg: _plain(getattr(config, field)) for arg, field in options.items()}
    return Original(name, said, left, sizes)


def _differing(own: Any, config: Any) -> list[str]:
    """The fields, but for sizes, in which two configs ask for another arithmetic."""
    return [
        name
        for name, value in vars(own).items()
        if name not in SIZES and not _alike(value, getattr(config, name))
    ]


def _other(name: str, config: Any, own: Any) -> str:
    wanted, has = repr(getattr(config, name)), repr(getattr(own, name))
    return f"{name}={has}, not {wanted}" if len(has + wanted) < 60 else f"other {name}"


def _alike(a: Any, b: Any) -> bool:
    """Equal, or two names of one activation."""
    names = isinstance(a, str) and isinstance(b, str) and {a, b} <= ACTIVATIONS.keys()
    return a == b or (names and ACTIVATIONS[a] is ACTIVATIONS[b])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
