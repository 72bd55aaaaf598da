"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

A linear layer W of a block stays as it is; beside it two small ones are trained, A and B:

    y = W x + (alpha / rank) B A dropout(x)

B starts at zero: the network computes at first what it computed before. `merge_lora` adds the
product to W, and nothing of the adapters remains. An adapter is saved in a folder:

    adapter.safetensors    A and B of every layer, and the head where that was trained
    adapter.json           the LoRA; of which network, with which weights, it is an adapter
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_zoo import registry, zoo
from mlx_zoo.backend.inference import original_of
from mlx_zoo.errors import CheckpointError, MLXZooError
from mlx_zoo.hub import cache
from mlx_zoo.hub.checkpoint import read_safetensors
from mlx_zoo.hub.reading import Hashing
from mlx_zoo.hub.safetensors_header import read_header
from mlx_zoo.hub.safetensors_writer import write_safetensors
from mlx_zoo.mapping import engine
from mlx_zoo.preprocess.files import read_json
from mlx_zoo.training.parts import head_of, is_adapter

FORMAT = 1  # of a saved adapter
WEIGHTS, SETTINGS = "adapter.safetensors", "adapter.json"
# Their heads are as wide as the vocabulary, and no fresh ones: adapters leave them alone.
OF_THE_VOCABULARY = ("text-generation", "fill-mask", "pretraining")

Linear = nn.Linear | nn.QuantizedLinear


@dataclass(frozen=True)
class LoRA:
    """Which layers are adapted, and how.

    Args:
        rank: of the product B A.
        alpha: the product is multiplied by alpha / rank.
        dropout: of what goes into A, in training.
        layers: linear layers of a block; "attn.*", "mlp.fc?" and "*" are understood.
        head: train the head, too. Those that are as wide as the vocabulary are left alone.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    layers: tuple[str, ...] = ("attn.q_proj", "attn.v_proj")
    head: bool = True

    def __post_init__(self):
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        object.__setattr__(self, "layers", layers)
        if type(self.rank) is not int or not 1 <= self.rank <= 2**16:
            raise ValueError(f"rank={self.rank!r}: a whole number from 1 is needed")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha!r}: a number above 0 is needed")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: a part of 1 is needed")
        if not layers or not all(isinstance(pattern, str) for pattern in layers):
            raise ValueError(f"layers={self.layers!r}: names as 'attn.q_proj' are needed")
        if type(self.head) is not bool:
            raise ValueError(f"head={self.head!r}: True or False is needed")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class LoRALinear(nn.Module):
    """A linear layer and its adapter. (..., in) -> (..., out).

    The layer may be quantised, or of half precision: the adapter is of float32 and computes so.
    """

    def __init__(self, linear: Linear, lora: LoRA):
        super().__init__()
        out_dims, in_dims = shape_of(linear)
        if lora.rank > min(out_dims, in_dims):
            raise ValueError(f"rank={lora.rank}: a layer has {in_dims} inputs, {out_dims} outputs")
        self.linear = linear
        self.lora_a = nn.Linear(in_dims, lora.rank, bias=False)  # uniform, up to 1 / sqrt(in)
        self.lora_b = nn.Linear(lora.rank, out_dims, bias=False)
        self.lora_b.weight = mx.zeros((out_dims, lora.rank))
        self.dropout = nn.Dropout(lora.dropout)
        self.scale = lora.scale

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        z = self.dropout(x).astype(self.lora_a.weight.dtype)
        z = self.scale * self.lora_b(self.lora_a(z))
        return (y + z).astype(y.dtype)

    def product(self) -> mx.array:
        """(alpha / rank) B A, (out, in), in float32."""
        a, b = (layer.weight.astype(mx.float32) for layer in (self.lora_a, self.lora_b))
        return self.scale * mx.matmul(b, a, stream=mx.cpu)  # whose float32 is real float32


def shape_of(linear: Linear) -> tuple[int, int]:
    """(out, in) of a linear layer, quantised or not."""
    out_dims, columns = linear.weight.shape
    return out_dims, columns * 32 // linear.bits if is_quantized(linear) else columns


def is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter, by their names in the network."""
    return {name: x for name, x in model.named_modules() if isinstance(x, LoRALinear)}


# Adding and merging -----------------------------------------------------------------------------


def add_lora(model: nn.Module, lora: LoRA | None = None) -> nn.Module:
    """Give the linear layers of a transformer's blocks adapters, in place, and return it.

    The outputs stay what they are. Adapters, and the head where `lora.head` says so, are what is
    trained then; all else is frozen. `model.lora` says what was done. A is drawn from MLX's random
    state: `mx.random.seed` makes it the same again.

    Args:
        model: a network of this package; its weights may be quantised.
        lora: which layers and how; None is LoRA().

    Raises:
        ValueError: a network without such layers; one that has adapters already, or that is
            optimised for inference; a head that is fresh, and would not be trained.
    """
    lora = LoRA() if lora is None else lora
    architecture = registry.of_model(model)
    if original_of(model) is not model:
        raise ValueError("this network is optimised for inference: add LoRA to its .original")
    if adapted(model):
        raise ValueError("this network has adapters already: merge_lora(model) first")
    if not lora.head and _head_is_fresh(model):
        raise ValueError("the head of this network is fresh and must be trained: head=True")
    layers = {name: LoRALinear(x, lora) for name, x in _chosen(model, lora, architecture.name)}
    for name, layer in layers.items():
        _put(model, name, layer)
    model.lora = lora
    model.train(model.training)  # the new layers, too
    freeze_all_but_adapters(model)
    mx.eval(model.parameters())
    return model


def _chosen(model: nn.Module, lora: LoRA, kind: str) -> Iterator[tuple[str, Linear]]:
    """The layers that a LoRA names. ValueError where one of its names is in no block."""
    linear: dict[str, Linear] = {}
    modules = dict(model.named_modules())
    for name in dict.fromkeys(name.rpartition(".")[0] for name in engine.parameters(model)):
        if name.startswith("blocks.") and isinstance(modules[name], Linear):
            linear[name] = modules[name]
    if not linear:
        raise ValueError(
            f"the blocks of this {kind} have no linear layers: LoRA is for transformers; "
            "method='head', 'last-N' or 'full' trains this network"
        )
    inner = {name: name.split(".", 2)[2] for name in linear}  # as in every block
    for pattern in lora.layers:
        if not any(fnmatchcase(own, pattern) for own in inner.values()):
            has = ", ".join(dict.fromkeys(inner.values()))
            raise ValueError(f"layers={pattern!r}: no block of this {kind} has it; they have {has}")
    for name, own in inner.items():
        if any(fnmatchcase(own, pattern) for pattern in lora.layers):
            yield name, linear[name]


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the layer of that name: "blocks.3.attn.q_proj"."""
    *path, last = name.split(".")
    holder: Any = model
    for step in path:
        holder = holder[int(step)] if isinstance(holder, list) else holder[step]
    holder[last] = layer


def freeze_all_but_adapters(model: nn.Module) -> None:
    """What `model.lora` trains, and no more, can be trained."""
    model.freeze()
    for layer in adapted(model).values():
        layer.lora_a.unfreeze()
        layer.lora_b.unfreeze()
    for name in trained_head(model):
        model[name].unfreeze()


def trained_head(model: nn.Module) -> frozenset[str]:
    """The attributes of the head that is trained, and saved, with the adapters."""
    task = getattr(model.config, "task", None)
    return head_of(model) if model.lora.head and task not in OF_THE_VOCABULARY else frozenset()


def _head_is_fresh(model: nn.Module) -> bool:
    """Whether a head of such a size is none that the checkpoint has."""
    checkpoint, architecture = getattr(model, "checkpoint", None), registry.of_model(model)
    task, size = getattr(model.config, "task", None), architecture.head_size(model.config)
    if checkpoint is None:
        return bool(head_of(model))
    return bool(size) and not architecture.keeps_head(checkpoint, task, size)


def merge_lora(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Add every adapter to the weights of its layer, in place, and return the network.

    It computes the same, up to rounding, and is built as it was before `add_lora`. All its
    parameters can be trained.

    Args:
        model: a network with adapters.
        dequantize: make a quantised network a whole one first, of float weights: few bits would
            not take up an adapter without loss.

    Raises:
        ValueError: no adapters; quantised weights, unless `dequantize`.
    """
    if original_of(model) is not model:
        raise ValueError("this network is optimised for inference: merge its .original")
    layers = adapted(model)
    if not layers:
        raise ValueError("this network has no adapters to merge")
    if getattr(model, "quantization", None) is not None:
        if not dequantize:
            raise ValueError(
                "the weights of this network are quantised, and too coarse to take up adapters: "
                "merge_lora(model, dequantize=True) makes them floats; save_adapter keeps both"
            )
        _dequantize(model)
    for name, layer in layers.items():
        linear, product = layer.linear, layer.product()
        linear.weight = (linear.weight.astype(mx.float32) + product).astype(linear.weight.dtype)
        _put(model, name, linear)
    model.lora = None
    unfreeze_all(model)
    mx.eval(model.parameters())
    return model


def unfreeze_all(model: nn.Module) -> None:
    """All parameters can be trained, but for the running statistics of norms.

    Module by module: MLX's own recursion would unfreeze those, and quantised weights, too.
    """
    for module in model.modules():
        module.unfreeze(recurse=False)


def _dequantize(model: nn.Module) -> None:
    """Every quantised layer as the float layer that computes the same, in place."""
    for name, layer in list(model.named_modules()):
        if not is_quantized(layer):
            continue
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits, stream=mx.cpu
        )
        whole: Any
        if isinstance(layer, nn.QuantizedEmbedding):
            whole = nn.Embedding(1, 1)
        else:
            whole = nn.Linear(1, 1, bias="bias" in layer)
        whole.weight = weight
        if "bias" in layer:
            whole.bias = layer.bias
        _put(model, name, whole)
    model.quantization = None


# Saving and loading -----------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write what was trained of a network with adapters into a folder; returns it.

    The folder is made, or holds an adapter that is replaced.

    Raises:
        ValueError: no adapters; a parameter that can be trained, and belongs to no adapter and to
            no head: it would be lost.
    """
    model = original_of(model)
    if not adapted(model):
        raise ValueError("this network has no adapters: add_lora(model) first")
    weights = adapter_of(model)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    if lost := sorted(trainable.keys() - weights.keys()):
        raise ValueError(
            f"{lost[0]} is trained, too, and belongs to no adapter: write the whole network, "
            "convert(merge_lora(model), folder)"
        )
    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    work = cache.working_folder(target)
    try:
        sha256 = write_safetensors(work / WEIGHTS, weights, {"format": "mlx_zoo LoRA"})
        said = {"format": FORMAT, "sha256": sha256, **_settings(model)}
        (work / SETTINGS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, SETTINGS):
            (work / name).replace(target / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def adapter_of(model: nn.Module) -> dict[str, mx.array]:
    """The parameters of the adapters, and of the head that is trained with them."""
    head = trained_head(model)
    return {
        name: x
        for name, x in engine.parameters(model).items()
        if is_adapter(name) or name.partition(".")[0] in head
    }


def _settings(model: nn.Module) -> dict[str, Any]:
    """What is to be known of an adapter: its LoRA, its base, the classes of its head."""
    checkpoint, how = getattr(model, "checkpoint", None), getattr(model, "quantization", None)
    return {
        "lora": asdict(model.lora),
        "base": {
            "architecture": registry.of_model(model).name,
            **_origin(model),
            "config": _config_of(model),
            "dtype": str(zoo.kind_of(model)).split(".")[-1],
            "quantization": how and {"bits": how.bits, "group_size": how.group_size},
            "weights": digest_of_base(model, trained_head(model)),
        },
        "labels": list(getattr(checkpoint, "labels", ()) if trained_head(model) else ()),
    }


def _origin(model: nn.Module) -> dict[str, str | None]:
    """Where the weights that were adapted came from."""
    checkpoint = getattr(model, "checkpoint", None)
    found = {name: getattr(checkpoint, name, None) for name in ("name", "source", "revision")}
    return {**found, "name": getattr(checkpoint, "base_model", None) or found["name"]}


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The config as JSON has it, without what matters in training alone."""
    config = json.loads(json.dumps(asdict(model.config)))
    return {name: value for name, value in config.items() if "drop" not in name}


def digest_of_base(model: nn.Module, head: frozenset[str]) -> str:
    """The sha256 over all parameters but those of adapters, and of a head that they come with."""
    digest = hashlib.sha256()
    inner = tuple(f"{name}.linear." for name in adapted(model))
    for name, x in sorted(engine.parameters(model).items()):
        if is_adapter(name) or name.partition(".")[0] in head:
            continue
        if name.startswith(inner):
            name = name.replace(".linear.", ".")
        bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x  # NumPy has no such type
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(np.ascontiguousarray(np.asarray(bits)).data)
    return digest.hexdigest()


def load_adapter(
    model: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    merge: bool = False,
    **options: Any,
) -> nn.Module:
    """A network with the adapter that `save_adapter` wrote; its labels are the adapter's.

    Args:
        model: the network that was adapted, or one like it, which is changed in place; or its
            name, by which it is loaded with the task, classes and type that the adapter needs.
        folder: with adapter.json and adapter.safetensors.
        merge: merge the adapter at once.
        **options: of `load`, where a name is given: cache_dir, local_files_only, revision.

    Raises:
        CheckpointError: files that are damaged, or hold something else.
        MLXZooError: an adapter of another network, or of other weights.
        ValueError: a network that has adapters already; options without a name.
    """
    from mlx_zoo.training.outcome import as_finetuned

    folder = Path(folder).expanduser()
    said = _read_settings(folder / SETTINGS)
    tensors = _read_tensors(folder / WEIGHTS, said["sha256"])
    if not isinstance(model, nn.Module):
        model = _base(model, said, tensors, options, folder)
    elif options:
        raise ValueError(f"{', '.join(options)}: of a network that is loaded already")
    model = original_of(model)
    if adapted(model):
        raise ValueError("this network has adapters already: merge_lora(model) first")
    _check_base(model, said, folder)
    lora = _lora(said["lora"], folder)
    before = model.training
    try:
        add_lora(model, lora)
        _fill(model, tensors, folder)
    except ValueError as error:  # layers that the network does not have
        raise CheckpointError(f"{folder / SETTINGS}: {error}") from error
    except CheckpointError:
        _remove(model)
        raise
    if getattr(model, "checkpoint", None) is not None:
        as_finetuned(model, tuple(said["labels"]) or model.checkpoint.labels)
    model.train(before)
    return merge_lora(model) if merge else model


def _remove(model: nn.Module) -> None:
    """The network as it was before `add_lora`."""
    for name, layer in adapted(model).items():
        _put(model, name, layer.linear)
    model.lora = None
    unfreeze_all(model)


def _fill(model: nn.Module, tensors: Mapping[str, mx.array], folder: Path) -> None:
    """Give the adapters and the head their weights. CheckpointError with everything that is off."""
    wanted = adapter_of(model)
    problems = [f"no home for {name}" for name in _some(tensors.keys() - wanted.keys())]
    problems += [f"{name} is missing" for name in _some(wanted.keys() - tensors.keys())]
    for name in sorted(wanted.keys() & tensors.keys()):
        if (has := tensors[name].shape) != (needs := wanted[name].shape):
            problems.append(f"{name} has shape {tuple(has)}, the network needs {tuple(needs)}")
        elif tensors[name].dtype not in zoo.DTYPES.values():
            problems.append(f"{name} holds {tensors[name].dtype}, where floats belong")
    if not problems:
        problems = [f"{name} holds NaN or infinity" for name in engine.nonfinite(tensors)]
    if problems:
        raise CheckpointError("\n  ".join([f"{folder / WEIGHTS} does not fit:", *problems]))
    model.load_weights(list(tensors.items()), strict=False)  # strict as to the adapter, above
    mx.eval(model.parameters())


def _some(names: Iterable[str]) -> Iterator[str]:
    return engine.collapse(sorted(names))


def _check_base(model: nn.Module, said: Mapping[str, Any], folder: Path) -> None:
    """Raise MLXZooError, saying what differs, unless the network is the one that was adapted."""
    base, own = said["base"], _config_of(model)
    name = registry.of_model(model).name
    if name != base["architecture"]:
        raise MLXZooError(f"{folder} is an adapter of a {base['architecture']}, not of a {name}")
    config = base["config"]
    if differing := sorted(k for k in own.keys() | config.keys() if own.get(k) != config.get(k)):
        what = ", ".join(f"{k}={config.get(k)!r}, not {own.get(k)!r}" for k in differing)
        raise MLXZooError(f"{folder} is an adapter of another network: it has {what}")
    if _digest(model, said) == base["weights"]:
        return
    how = getattr(model, "quantization", None)
    now = how and {"bits": how.bits, "group_size": how.group_size}
    kind = str(zoo.kind_of(model)).split(".")[-1]
    facts = {
        "quantization": (base["quantization"], now),
        "dtype": (base["dtype"], kind),
        **{k: (base[k], own) for k, own in _origin(model).items()},
    }
    what = "; ".join(f"{k} {a}, not {b}" for k, (a, b) in facts.items() if a != b)
    if kind != base["dtype"]:
        what += f" (load it with dtype={base['dtype']!r}, or give its name)"
    raise MLXZooError(
        f"{folder} is an adapter of other weights than this network has"
        + (f": {what}" if what else "; by name and source they are the same: were they trained?")
    )


def _digest(model: nn.Module, said: Mapping[str, Any]) -> str:
    """Of a network without adapters, as of the one that was adapted."""
    is_wide = getattr(model.config, "task", None) in OF_THE_VOCABULARY
    carried = said["lora"].get("head") is True and not is_wide
    return digest_of_base(model, head_of(model) if carried else frozenset())


# Reading what anyone may have written -----------------------------------------------------------

BASE: dict[str, tuple[type, ...]] = {  # field -> its types
    "architecture": (str,),
    "name": (str, type(None)),
    "source": (str, type(None)),
    "revision": (str, type(None)),
    "config": (dict,),
    "dtype": (str,),
    "quantization": (dict, type(None)),
    "weights": (str,),
}
SAID: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "sha256": (str,),
    "lora": (dict,),
    "base": (dict,),
    "labels": (list,),
}


def _read_settings(path: Path) -> dict[str, Any]:
    """adapter.json, its fields of the right types. Raises CheckpointError."""
    said = read_json(path)
    if said.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {said.get('format')!r} is not {FORMAT}")
    _check_fields(said, SAID, path)
    _check_fields(said["base"], BASE, path)
    labels = said["labels"]
    if not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{path}: labels should be texts")
    if labels and len(labels) != said["base"]["config"].get("num_classes"):
        raise CheckpointError(f"{path}: {len(labels)} labels are not one for each class")
    return said


def _check_fields(
    values: Mapping[str, Any], wanted: Mapping[str, tuple[type, ...]], path: Path
) -> None:
    if values.keys() != wanted.keys():
        raise CheckpointError(f"{path} should have {', '.join(wanted)}; it has {', '.join(values)}")
    for name, kinds in wanted.items():
        if type(values[name]) not in kinds:
            raise CheckpointError(f"{path}: {name} should be a {kinds[0].__name__}")


def _lora(values: Mapping[str, Any], folder: Path) -> LoRA:
    """The LoRA of adapter.json. Raises CheckpointError."""
    known = {field.name for field in fields(LoRA)}
    try:
        if values.keys() != known or not isinstance(values["layers"], list):
            raise ValueError(f"{', '.join(sorted(known))} are needed")
        return LoRA(**values)
    except ValueError as error:
        raise CheckpointError(f"{folder / SETTINGS}: lora: {error}") from error


def _read_tensors(path: Path, sha256: str) -> dict[str, mx.array]:
    """The tensors of adapter.safetensors, whole and as written. Raises CheckpointError."""
    with Hashing() as digest:
        tensors = read_safetensors(path, read_header(path), digest)
        if digest.hexdigest() != sha256:
            raise CheckpointError(f"{path} is not the file that {SETTINGS} was written for")
    return tensors


def _base(
    name: str | os.PathLike[str],
    said: Mapping[str, Any],
    tensors: Mapping[str, mx.array],
    options: Mapping[str, Any],
    folder: Path,
) -> nn.Module:
    """The network of that name with the task, the classes and the type that the adapter needs."""
    base = said["base"]
    architecture = registry.architectures().get(base["architecture"])
    if architecture is None:
        raise CheckpointError(f"{folder / SETTINGS}: no architecture {base['architecture']!r}")
    config, is_image = base["config"], architecture.inputs == "images"
    task = config.get("task")
    wanted: dict[str, Any] = {"quantize": base["quantization"]}
    for field in ("in_chans", "img_size") if is_image else ("task",):
        wanted[field] = config.get(field)
    if is_image or task in ("text-classification", "token-classification"):
        wanted["num_classes"] = config.get("num_classes")
    # A head is made before it is filled: of a size that the file cannot have, it is not.
    size, most = wanted.get("num_classes"), sum(x.size for x in tensors.values())
    if size is not None and said["lora"].get("head") and not (type(size) is int and size <= most):
        raise CheckpointError(f"{folder}: {size!r} classes are none that its tensors have")
    # Quantised in the type it has now, or before it got that, as by `finetune`: it does not say.
    for dtype in (base["dtype"], None) if base["quantization"] else (base["dtype"],):
        try:
            model = zoo.load(name, True, **{"dtype": dtype, **wanted, **options})
        except ValueError as error:
            raise CheckpointError(f"{folder} is an adapter of no such network: {error}") from error
        model.set_dtype(zoo.as_dtype(base["dtype"]))
        if _digest(model, said) == base["weights"]:
            break
    return model
