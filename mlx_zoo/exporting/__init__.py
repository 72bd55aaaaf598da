"""The way back: a network as its publisher's library loads it, strictly.

    export(model, "weights.safetensors")   the tensors alone, by PyTorch's names and in its layout
    export(model, "folder")                a folder: weights, config.json, tokenizer, preprocessing
    export(model, "net.mlxfn")             the forward pass itself, for C++ and Swift

Every state dict is the whole of what the publisher's class has: tied tensors are written twice, and
BatchNorm's counters are there, so that `load_state_dict(strict=True)` takes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import describe, registry
from mlx_zoo.backend.inference import original_of
from mlx_zoo.catalogue import Architecture
from mlx_zoo.errors import MLXZooError
from mlx_zoo.exporting.configs import config_of
from mlx_zoo.exporting.functions import export_function
from mlx_zoo.hub import cache
from mlx_zoo.hub.cache import INDEX, WEIGHTS
from mlx_zoo.hub.safetensors_header import read_header
from mlx_zoo.mapping import engine
from mlx_zoo.preprocess.files import read_optional_json
from mlx_zoo.preprocess.processor import read_processor, write_processor
from mlx_zoo.preprocess.sentence import sentence_files
from mlx_zoo.preprocess.text import TOKENIZER_FILES

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
PICKLES = {".bin", ".pth", ".pt", ".ckpt"}
MARK = "exported_by"  # in the header of the weights: such a folder may be replaced


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a network for PyTorch: names and layout of its publisher, in safetensors.

    Args:
        model: a network of this package, as loaded or after training. Its own type is written.
        path: `*.safetensors` is one file with the weights (beside one called model.safetensors
            there will be config.json, too); `*.mlxfn` is the forward pass (`export_function`);
            anything else is a folder that the publisher's library loads:
            `AutoModelForX.from_pretrained(folder)` of transformers,
            `timm.create_model("local-dir:" + folder, pretrained=True)`, and for torchvision
            `get_model(config["constructor"], **config["options"])` by its config.json. What an
            export wrote is replaced at once; a folder with anything else in it is refused.
        dialect: whose names are written; None for those the weights came in.
        max_shard_size: bytes, or "5GB", above which a folder of transformers has several files and
            their index.

    Returns:
        The path.

    Raises:
        ValueError: a dialect that the architecture does not have, or whose publisher has no such
            network; layers that the published network does not have (quantised, LoRA's); a folder
            with other files.
    """
    target = Path(path).expanduser()
    if target.suffix == ".mlxfn":
        if dialect is not None:
            raise ValueError(f"dialect={dialect!r}: a function has none")
        return export_function(model, target)
    if target.suffix in PICKLES:
        raise ValueError(f"{target}: {target.suffix} is a pickle; give a name like w.safetensors")
    model = original_of(model)
    architecture = registry.of_model(model)
    weights = _weights(model, architecture)
    dialect = _dialect(model, architecture, dialect)
    limit = cache.as_bytes(max_shard_size)
    spec = architecture.spec(dialect, model.config)
    in_class = architecture.twins(model.config)
    state = engine.to_torch(weights, model, spec, in_class)
    state |= engine.batch_counters(state)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        _write_file(target, state, model, dialect)
    else:
        shards = limit if _publisher(dialect) == "transformers" else None
        _write_folder(target, state, model, dialect, shards)
    return target


# What is written --------------------------------------------------------------------------------


def _weights(model: nn.Module, architecture: Architecture) -> dict[str, mx.array]:
    """The parameters, which are those of the published network and no others."""
    weights = engine.parameters(model)
    if odd := [n for n, x in weights.items() if not mx.issubdtype(x.dtype, mx.floating)]:
        raise ValueError(f"{odd[0]} holds no floats: a quantised network cannot be exported")
    published = engine.parameters(architecture.outline(model.config))
    if changed := [*weights.keys() ^ published.keys()]:
        raise ValueError(
            f"{min(changed)}: the published network has other layers than this one. What was added "
            "is to be merged first (LoRA: mlx_zoo.training.merge_lora)"
        )
    if other := [name for name, x in published.items() if weights[name].shape != x.shape]:
        raise ValueError(f"{other[0]} has another shape than model.config says")
    return weights


def _dialect(model: nn.Module, architecture: Architecture, wish: str | None) -> str:
    """The one that is asked for; else that of the weights; else the first that has the network."""
    checkpoint = getattr(model, "checkpoint", None)
    own = checkpoint.dialect if checkpoint else None
    if wish is not None:
        if wish not in architecture.dialects:
            known = "; ".join(architecture.dialects)
            raise ValueError(f"dialect={wish!r}: one of {known} is needed")
        if wish != own and (why := _misfit(model.config, architecture, wish)):
            raise ValueError(f"dialect={wish!r}: this network has {why}, as none of theirs has")
        return wish
    same = [name for name in architecture.dialects if own and _publisher(name) == _publisher(own)]
    for name in (*((own,) if own else ()), *same, *(() if own else architecture.dialects)):
        if not _misfit(model.config, architecture, name):
            return name
    if own:
        raise ValueError(
            f"this network has {_misfit(model.config, architecture, own)}, as none of "
            f"{_publisher(own)}'s has: give dialect="
        )
    raise ValueError(
        f"no publisher has such a network: give dialect= {list(architecture.dialects)}"
    )


def _publisher(dialect: str) -> str:
    return dialect.partition(",")[0]


def _misfit(config: Any, architecture: Architecture, dialect: str) -> str:
    """What this network has that no network of that publisher has; '' if nothing."""
    publishers = architecture.common.get(_publisher(dialect), {})
    for name, wanted in {**publishers, **architecture.common.get(dialect, {})}.items():
        has = getattr(config, name)
        if has not in (wanted if isinstance(wanted, list) else [wanted]):
            return f"{name}={has!r}"
    return ""


def _dtype(state: Mapping[str, mx.array]) -> mx.Dtype:
    return next(x.dtype for x in state.values() if mx.issubdtype(x.dtype, mx.floating))


def _metadata() -> dict[str, str]:
    from mlx_zoo import __version__

    return {"format": "pt", MARK: f"mlx_zoo {__version__}"}


def _save(path: Path, state: Mapping[str, mx.array]) -> None:
    cache.save(path, state, _metadata())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# One file ---------------------------------------------------------------------------------------


def _write_file(
    target: Path, state: Mapping[str, mx.array], model: nn.Module, dialect: str
) -> None:
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file")
    beside = target.with_name(CONFIG)
    config = None
    if target.name == WEIGHTS:  # libraries look for weights under this name, and for both at once
        config = config_of(model, dialect, _dtype(state), _companions(model))
        if beside.exists():
            _check_same_network(beside, config)
            config = None
    work = cache.working_folder(target.parent)
    try:
        _save(work / WEIGHTS, state)
        if config is not None:
            _write_json(work / CONFIG, config)
            (work / CONFIG).replace(beside)
        (work / WEIGHTS).replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_same_network(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a config.json that does not describe the network of `config`."""
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
        same = own == config or _described(own, path) == _described(config, path)
    except (MLXZooError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"{path} describes another network: give another folder, or another name than {WEIGHTS}"
        )


def _described(config: Mapping[str, Any], path: Path) -> Any:
    found = describe.described(config, path.parent.name)
    return found.architecture, found.config, found.task


# A folder ---------------------------------------------------------------------------------------


def _write_folder(
    target: Path,
    state: dict[str, mx.array],
    model: nn.Module,
    dialect: str,
    max_shard_size: int | None,
) -> None:
    """Written aside, then renamed; what an earlier export wrote gives way."""
    _check_replaceable(target)
    files = _companions(model)
    work = cache.working_folder(target.parent)
    try:
        _write_json(work / CONFIG, config_of(model, dialect, _dtype(state), files))
        if _publisher(dialect) == "transformers":
            _write_processor(work, model, files)
            _copy(files, work, model)
        architecture = registry.of_model(model)
        for folder, prefix in architecture.parts(model.config).items():
            part = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
            state = {n: x for n, x in state.items() if not n.startswith(prefix)}
            (work / folder).mkdir(parents=True, exist_ok=True)
            _save(work / folder / WEIGHTS, part)
        cache.write_weights(work, state, _metadata(), max_shard_size)
        _swap(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _companions(model: nn.Module) -> Mapping[str, Path]:
    """The files that were published beside the weights; {} where the weights are random."""
    checkpoint = getattr(model, "checkpoint", None)
    if checkpoint is None or not checkpoint.source:
        return {}
    architecture = registry.of_model(model)
    return describe.companions(checkpoint, architecture, describe.place_of(model))


def _copy(files: Mapping[str, Path], folder: Path, model: nn.Module) -> None:
    """The tokenizer's files, and for sentence embeddings those that say how they are pooled."""
    if registry.of_model(model).inputs != "tokens":
        return
    wanted = {*TOKENIZER_FILES}
    if model.config.task == "sentence-embedding":
        wanted |= {*sentence_files(), *sentence_files(files.get("modules.json"))}
    weights = (WEIGHTS, "pytorch_model.bin")
    for name in wanted & files.keys() - {CONFIG}:
        if Path(name).name not in weights:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[name], folder / name)


def _write_processor(folder: Path, model: nn.Module, files: Mapping[str, Path]) -> None:
    """The published preprocessing where it still is the network's, else one that does the same."""
    how = getattr(getattr(model, "checkpoint", None), "preprocessing", None)
    if how is None or registry.of_model(model).inputs != "images":
        return
    own = read_optional_json(files, PROCESSOR)
    kind = read_optional_json(files, CONFIG).get("model_type")
    written = own if own and read_processor(own, kind) == how else write_processor(how)
    if written is not None:
        _write_json(folder / PROCESSOR, written)


def _check_replaceable(target: Path) -> None:
    """Raise ValueError unless a folder is new, empty, or all of it was written by an export."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give the name of a folder")
    found = [path for path in target.rglob("*") if not path.is_dir()]
    ours = {*TOKENIZER_FILES, *sentence_files(), INDEX, CONFIG, PROCESSOR}
    modules = target / "modules.json"
    ours |= {*(sentence_files(modules) if modules.is_file() else ())}
    for path in found:
        name = path.relative_to(target).as_posix()
        if name not in ours and not (path.suffix == ".safetensors" and _is_exported(path)):
            raise ValueError(
                f"{target} has {name}, which no export wrote: give a folder that is new or empty"
            )
    if found and not any(path.suffix == ".safetensors" for path in found):
        raise ValueError(f"{target} is no exported folder: give one that is new or empty")


def _is_exported(path: Path) -> bool:
    try:
        return MARK in read_header(path).metadata
    except MLXZooError:
        return False


def _swap(work: Path, target: Path) -> None:
    """`work` becomes `target`; what was there is removed, or is back where that fails."""
    if not target.exists():
        work.rename(target)
        return
    aside = cache.working_folder(target.parent)
    target.rename(aside / target.name)
    try:
        work.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
