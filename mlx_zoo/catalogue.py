"""The values that describe what there is to load: checkpoints and architectures."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.mapping.spec import Spec
from mlx_zoo.preprocess.image import Preprocessing

MAX_SIDE = 10_000  # pixels: a config is a stranger's, and images of such a size may be made
DATA = Path(__file__).parent / "data"  # what ships with the package

# In the name of a licence that forbids commercial use, or allows research alone (Apple's AMLR).
NON_COMMERCIAL = re.compile(r"(?<![a-z])(nc|non[-_ ]?commercial|research|amlr)(?![a-z])")


@dataclass(frozen=True)
class Reference:
    """The PyTorch original: a library's own constructor. `name` may be chosen by task."""

    library: str  # "torchvision", "timm" or "transformers"
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Published weights of an architecture, and everything one must know to use and trust them."""

    name: str  # "resnet50.tv2_in1k"
    architecture: str  # "resnet"
    config: Any  # the architecture's frozen config, as the weights need it
    source: str  # where the bytes are: see mlx_zoo.hub.source
    dialect: str | None = None  # of the architecture's; None: the one that covers the file exactly
    reference: Reference | None = None
    evidence: str | None = None  # stored outputs of the original, where it cannot be run
    task: str | None = None  # the task whose head the weights carry, where the publisher says
    sha256: str | None = None  # of the file; at least its first 8 digits
    revision: str | None = None  # the commit, once it is known
    folder: str | None = None  # that `convert` wrote, with the files that go with the weights
    license: str | None = None
    num_params: int | None = None  # as published
    accuracy: Mapping[str, float] = field(default_factory=dict)  # {"acc1": 69.758}: ImageNet, %
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    default: bool = False  # what the bare name of the variant means
    base_model: str | None = None  # the checkpoint that was fine-tuned

    @property
    def variant(self) -> str:
        """The name without its tag: 'resnet50'."""
        return self.name.partition(".")[0]

    @property
    def is_non_commercial(self) -> bool:
        """Whether the licence, by its name, forbids commercial use or allows research alone."""
        return bool(NON_COMMERCIAL.search((self.license or "").lower()))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """MLX's random state is afterwards what it was.

    MLX draws lazily, but each draw moves the state: others' numbers would depend on it, and the
    moves pile up until somebody draws.
    """
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


@dataclass(frozen=True)
class Architecture:
    """A family of networks: one native module and the dialects in which its weights come."""

    name: str
    model: type[Any]  # an mlx.nn.Module made from a config
    variants: Mapping[str, Any]  # name -> frozen config
    # Publisher (and what sets it apart) -> Spec; where names count the blocks, by the config.
    dialects: Mapping[str, Spec | Callable[[Any], Spec]]
    inputs: str  # "images" or "tokens"
    tasks: tuple[str, ...]
    paper: str = ""  # authors, year, arXiv number
    # What the weights of a task serve besides: those of "pretraining" also fill masks.
    also: Mapping[str | None, tuple[str, ...]] = field(default_factory=dict)
    default_task: str | None = None  # what load() gives where no task is asked for
    model_types: tuple[str, ...] = ()  # in transformers' config.json
    read_config: Callable[[Mapping[str, Any]], Any] = lambda config: None  # config.json -> config
    # The way back, with model_type and the class; ValueError where transformers has no such one.
    write_config: Callable[[Any], dict[str, Any]] = lambda config: {}
    # Tensors that the class has for a second time: tied to others, or never used.
    twins: Callable[[Any], tuple[str, ...]] = lambda config: ()
    classes: Mapping[str, str | None] = field(default_factory=dict)  # transformers' -> task
    timm_args: Mapping[str, str] = field(default_factory=dict)  # timm's argument -> config's field
    # What follows from them: (the variant's config, the one with the arguments) -> config.
    timm_derives: Callable[[Any, Any], Any] = lambda published, config: config
    # What a repository's other files say: which are wanted next, given those in hand; and
    # the config as they complete it.
    files: Callable[[Any, Mapping[str, Path]], tuple[str, ...]] = lambda config, files: ()
    read_files: Callable[[Any, Mapping[str, Path]], Any] = lambda config, files: config
    # Folders with further weights -> what their tensors' names begin with.
    parts: Callable[[Any], Mapping[str, str]] = lambda config: {}
    # What only the weights show (a pooler, say): config, names of the tensors -> config.
    fit: Callable[[Any, frozenset[str]], Any] = lambda config, names: config
    # Whether a checkpoint may have the head of a task with so many classes.
    keeps_head: Callable[[Checkpoint, str | None, int | None], bool] = (
        lambda checkpoint, task, num_classes: num_classes in (None, checkpoint.config.num_classes)
    )
    without_head: Callable[[Any], Any] = lambda config: config
    # How many outputs the head has; None where that is not for the user to say.
    head_size: Callable[[Any], int | None] = lambda config: config.num_classes
    fixed_sizes: Mapping[str, int] = field(default_factory=dict)  # tasks that say it themselves
    # What the networks of a dialect, or of a publisher, have in common: a value, or a list of
    # those that there are.
    common: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    head_fields: tuple[str, ...] = ()  # of the config, that belong to a head as num_classes does
    full_precision: tuple[str, ...] = ()  # layers that quantisation leaves alone; `*` is anything

    def spec(self, dialect: str, config: Any) -> Spec:
        """How a network of that config is written in a dialect."""
        found = self.dialects[dialect]
        return found if isinstance(found, Spec) else found(config)

    def outline(self, config: Any) -> Any:
        """A network for the names and shapes of its parameters alone: nothing is allocated."""
        with random_state_kept():
            return self.model(config)

    def fingerprint(self, config: Any) -> str:
        """Changes when any dialect changes, and with it what a conversion yields."""
        text = "".join(self.spec(dialect, config).fingerprint for dialect in self.dialects)
        return sha256(text.encode()).hexdigest()[:16]


def of_transformers(
    repository: str, architecture: str, config: Any, task: str | None, license: str, **facts: Any
) -> Checkpoint:
    """A repository of the hub as transformers writes them, by its short name.

    Its own config.json has the last word when it is loaded. `facts` are what else is known of it,
    or other than this.
    """
    short = repository.partition("/")[2]
    own: dict[str, Any] = {
        "name": short.lower().replace("-", "_").replace(".", "_"),
        "aliases": (repository, short),
        "default": True,
    }
    return Checkpoint(
        architecture=architecture,
        config=config,
        source=f"hf-hub:{repository}",
        dialect="transformers",
        reference=Reference("transformers"),
        task=task,
        license=license,
        **{**own, **facts},
    )


def check_attributes(config: Mapping[str, Any], allowed: Mapping[str, Collection[Any]]) -> None:
    """Raise UnsupportedConfig for attributes of config.json with values that are not implemented.

    None among the allowed ones means that the attribute may be missing.
    """
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise UnsupportedConfig(
                f"{name}={config.get(name)!r} in config.json is not implemented"
            )


def bundled_digits(
    architecture: str, config: Any, reference: Reference, *, file: str, evidence: str
) -> Checkpoint:
    """The small network that ships with the package, trained in PyTorch on handwritten digits."""
    name = f"{architecture}_digits"
    facts = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    pixels = facts["preprocessing"]
    return Checkpoint(
        name=name,
        architecture=architecture,
        config=config,
        source=f"package:{file}",
        dialect="timm",
        reference=reference,
        evidence=f"package:{evidence}",
        task="image-classification",
        sha256=facts["sha256"][file],
        license="mit",
        num_params=facts["num_parameters"],
        accuracy={"acc1": 100 * facts["accuracy"]["correct"] / facts["accuracy"]["total"]},
        preprocessing=Preprocessing(
            size=32, resize=32, mean=tuple(pixels["mean"]), std=tuple(pixels["std"])
        ),
        labels=tuple(facts["labels"]),
        default=True,
    )


def bundled_texts(
    name: str, architecture: str, task: str, read_config: Callable[[Mapping[str, Any]], Any]
) -> Checkpoint:
    """A small network for texts that ships with the package, as transformers saves one."""
    config, facts = (
        json.loads((DATA / name / file).read_text(encoding="utf-8"))
        for file in ("config.json", "facts.json")
    )
    return Checkpoint(
        name=name,
        architecture=architecture,
        config=read_config(config),
        source=f"package:{name}",
        dialect="transformers",
        reference=Reference("transformers"),
        evidence=f"package:{name}/evidence.safetensors",
        task=task,
        sha256=facts["sha256"]["model.safetensors"],
        license="mit",
        num_params=facts["num_parameters"],
        labels=labels(config) if "id2label" in config else (),
        default=True,
    )


Row = Mapping[str, str]  # of a table: column -> cell


def variant_of(row: Row) -> str:
    """The name without its tag."""
    return row["name"].partition(".")[0]


def its_original(row: Row) -> Reference:
    """The library's network of the same name."""
    return Reference(row["library"], variant_of(row))


def read_table(
    path: Path,
    architecture: str,
    config: Callable[[Row], Any],
    reference: Callable[[Row], Reference] = its_original,
) -> tuple[Checkpoint, ...]:
    """The checkpoints of a tab-separated table beside a spec file.

    Each row gives its config and its PyTorch original. Empty cells mean "not published".
    """
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(
            _checkpoint(row, architecture, config(row), reference(row))
            for row in csv.DictReader(file, delimiter="\t")
        )


def _checkpoint(row: Row, architecture: str, config: Any, reference: Reference) -> Checkpoint:
    num_classes = int(row["num_classes"])
    resize = row["resize"] and int(row["resize"])
    size = int(row["size"])
    test_size = int(row["test_size"]) if row["test_size"] else None
    return Checkpoint(
        name=row["name"],
        architecture=architecture,
        config=config,
        source=row["source"],
        dialect=row["library"],
        reference=reference,
        task="image-classification" if num_classes else None,
        sha256=row["sha256"] or None,
        license=row["license"] or None,
        num_params=int(row["params"]),
        accuracy={k: float(row[k]) for k in ("acc1", "acc5") if row[k]},
        preprocessing=Preprocessing(
            size=size,
            resize=resize or timm_resize(size, row["crop_pct"]),
            interpolation=row["interpolation"],
            mean=_numbers(row["mean"]),
            std=_numbers(row["std"]),
            test_size=test_size,
            test_resize=test_size
            and timm_resize(test_size, row["test_crop_pct"] or row["crop_pct"]),
            crop_mode=row.get("crop_mode") or "center",
        ),
        labels=imagenet_labels() if num_classes == 1000 else (),
        aliases=tuple(row["aliases"].split()),
        default=row["default"] == "1",
    )


@cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1000 classes of ImageNet-1k in their order, as torchvision writes them."""
    return tuple((DATA / "imagenet1k.txt").read_text(encoding="utf-8").splitlines())


def timm_resize(size: int, crop_pct: str | float) -> int:
    """timm resizes so that the crop is `crop_pct` of the shorter side."""
    return math.floor(size / float(crop_pct))


def as_size(size: Any) -> int | tuple[int, int]:
    """Sides (H, W) of images as a config has them: one number for a square.

    ValueError for anything but whole numbers from 1 to 10,000.
    """
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise ValueError(f"img_size={size!r}: a side in pixels, or (H, W), is needed")
    return sides[0] if sides[0] == sides[1] else sides


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def num_labels(config: Mapping[str, Any]) -> int:
    """How many labels a transformers config.json has; 2 where it says nothing, as there."""
    return int(config.get("num_labels") or len(config.get("id2label") or ()) or 2)


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The label names of a transformers config.json, in order; () where it has none."""
    names = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    return tuple(names[i] for i in sorted(names)) if sorted(names) == [*range(len(names))] else ()


def config_from(kind: type, values: Mapping[str, Any]) -> Any:
    """A frozen config out of JSON's types, lists becoming tuples. ValueError for unknown fields."""
    known = {f.name for f in fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(
            f"{', '.join(unknown)}: not an option of {kind.__name__}, which has "
            f"{', '.join(sorted(known))}"
        )
    values = {name: _with_tuples(value) for name, value in values.items()}
    for f in fields(kind):
        if f.name == "img_size" and f.name in values:
            values["img_size"] = as_size(values["img_size"])
        elif f.name in values:
            _check_type(kind, f, values[f.name])
    return kind(**values)


def _check_type(kind: type, of: Field[Any], value: Any) -> None:
    """A field takes what its default is: a count no text, a tuple of counts no single count."""
    name, default = of.name, of.default
    if default is MISSING or default is None or (value is None and "None" in str(of.type)):
        return
    accepted = (int, float) if isinstance(default, float) else type(default)
    right = isinstance(value, accepted) and isinstance(value, bool) == isinstance(default, bool)
    if right and isinstance(default, tuple) and default and isinstance(default[0], int):
        right = all(isinstance(item, int) for item in value)
    if not right:
        raise ValueError(f"{name}={value!r}: {kind.__name__} takes something like {default!r}")


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(x) for name, x in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
