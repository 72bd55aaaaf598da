"""What one must know to repeat a verification: which weights, on which machine, by which call."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend.blas import load_fast_blas
from mlx_zoo.catalogue import Checkpoint
from mlx_zoo.hub.source import HubSource, parse_source

OPTIONS = {  # of `verify` and `load` -> of the command line
    "pretrained": "--pretrained",
    "task": "--task",
    "num_classes": "--num-classes",
    "in_chans": "--in-chans",
    "img_size": "--img-size",
    "dtype": "--dtype",
    "quantize": "--quantize",
    "revision": "--revision",
    "device": "--device",
    "size": "--size",
    "seed": "--seed",
    "evidence": "--evidence",
}


def circumstances(
    checkpoint: Checkpoint, model: str | os.PathLike[str] | nn.Module, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of a Report. `model` and `options` are those of the call to `verify`."""
    said = {name: _plain(x) for name, x in options.items() if x is not None}
    if said.get("pretrained") is True:
        del said["pretrained"]
    if checkpoint.revision and "pretrained" not in said and _names_the_hub(model):
        said.setdefault("revision", checkpoint.revision)
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "license": checkpoint.license,
        "environment": environment(),
        "repeat": _repeat(checkpoint, model, said),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _names_the_hub(model: str | os.PathLike[str] | nn.Module) -> bool:
    """Whether a revision may be given beside it: a name without one, of no folder."""
    if isinstance(model, nn.Module):
        return False
    source = parse_source(model)
    return source is None or (isinstance(source, HubSource) and source.revision is None)


def environment() -> dict[str, str]:
    """The machine, besides the versions of what runs on it."""
    return {
        "Processor": str(mx.device_info(mx.cpu).get("device_name", platform.processor())),
        **({"GPU": _gpu()} if mx.default_device().type == mx.DeviceType.gpu else {}),
        "Cores": str(os.cpu_count()),
        "System": platform.platform(),
        "BLAS": load_fast_blas().name,
    }


def _gpu() -> str:
    return str(mx.device_info(mx.gpu).get("device_name", "GPU"))


def _plain(value: Any) -> Any:
    """As it can be typed again."""
    if isinstance(value, mx.Dtype):
        return str(value).rpartition(".")[2]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _repeat(checkpoint: Checkpoint, model: Any, said: Mapping[str, Any]) -> dict[str, str]:
    """The call as a line of Python and, where the command line can say it, of a shell."""
    how = "".join(f", {name}={value!r}" for name, value in said.items())
    if isinstance(model, nn.Module):
        return {"Python": f"mlx_zoo.verify(model{how})  # model: {checkpoint.name}, as loaded"}
    name = os.fspath(model)
    lines = {"Python": f"mlx_zoo.verify({name!r}{how})"}
    if said.keys() <= OPTIONS.keys() and all(isinstance(x, (str, int)) for x in said.values()):
        words = [word for key, value in said.items() for word in (OPTIONS[key], str(value))]
        lines["a shell"] = shlex.join(["mlx-zoo", "verify", name, *words])
    return lines
