"""A network made faster for inference: fewer passes over memory, and every core at work."""

from __future__ import annotations

import copy
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend import lanes, ops

# The methods of a network that take a batch and give a batch.
BATCHED = ("__call__", "features", "forward_intermediates", "encode")
STEPWISE = ("next_logits",)  # with a cache of what came before

_following = threading.Lock()


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A network that computes what `model` does, faster, for inference alone.

    BatchNorm is folded into the convolution before it; the projections to queries, keys and values
    become one; on the CPU a batch is divided among the cores. The outputs are those of `model` up
    to rounding. Pipelines do this by themselves.

    Args:
        model: a network of this package, in eval mode. It stays as it is, and shares the weights
            that are not changed.

    Returns:
        A network of the same class. Its `.original` is `model`, which it follows: where layers or
        weights of that are assigned anew, as optimisers do, this one has them, too. (What MLX
        changes in place, as `weight += 1`, it does not see.) It has nothing to train and no
        gradients; to change it, change its original.

    Raises:
        ValueError: a network in training mode, where statistics move and dropout is at work.
    """
    if isinstance(model, Optimized):
        return model
    if model.training:
        raise ValueError("this network is in training: model.eval() first")
    fast = _fused(model)
    fast.__class__ = _optimized(type(model))
    return fast


def original_of(model: nn.Module) -> nn.Module:
    """The network that an optimised one was made of; any other itself."""
    return model.original if isinstance(model, Optimized) else model


class Optimized:
    """What the class of an optimised network has besides."""

    original: nn.Module
    fused: frozenset[str]  # the layers that compute what several layers of the original do

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise ValueError(_refusal("trained"))
        return super().train(False)  # type: ignore[misc]


def _refusal(what: str) -> str:
    return f"this network is optimised for inference and cannot be {what}: take its .original"


@functools.cache
def _optimized(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of an optimised network of class `kind`."""
    own = {name: getattr(kind, name) for name in (*BATCHED, *STEPWISE) if hasattr(kind, name)}
    methods: dict[str, Any] = {
        name: (_on_every_core if name in BATCHED else _of_values)(method)
        for name, method in own.items()
    }
    methods |= {name: _refuse for name in dir(kind) if name.startswith("reset_")}
    return type(kind.__name__, (Optimized, kind), {"__module__": kind.__module__, **methods})


def _refuse(self, *args: Any, **kwargs: Any) -> None:
    raise ValueError(_refusal("changed"))


def _of_values(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an optimised network: of its original's weights, without gradients."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        if not lanes.is_lane():
            _follow(self)
        with ops.without_gradients():
            return method(self, *args, **kwargs)

    return run


def _on_every_core(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same of a method that takes a batch and gives a batch."""

    def compute(self, *args, **kwargs):
        with ops.without_gradients():
            return method(self, *args, **kwargs)

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        if lanes.is_lane():
            return method(self, *args, **kwargs)
        _follow(self)
        return _guarded(functools.partial(lanes.divided, compute, self), args, kwargs)

    return run


def _guarded(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`function(*args, **kwargs)`; to differentiate it is an error: it would seem constant."""
    result: Any = None

    def forward(*arrays: mx.array) -> list[mx.array]:
        nonlocal result
        result = function(*args, **kwargs)
        return _arrays(result)

    def refuse(*args: Any) -> None:
        raise ValueError(_refusal("differentiated"))

    guarded: Any = mx.custom_function(forward)
    guarded.vjp(refuse)
    guarded.jvp(refuse)
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, mx.array)]
    # On a GPU nothing is waited for: what is traced there is guarded, too.
    if not given or (mx.default_device() == mx.cpu and not ops.have_values(given)):
        return function(*args, **kwargs)
    outputs = guarded(*given)
    return _refilled(result, iter(outputs))


def _arrays(value: Any) -> list[mx.array]:
    """Those of an array, or of a named tuple or list of arrays and None."""
    if isinstance(value, mx.array):
        return [value]
    return [] if value is None else [x for item in value for x in _arrays(item)]


def _refilled(value: Any, arrays: Iterator[mx.array]) -> Any:
    """`value` with other arrays in the places of its own."""
    if isinstance(value, mx.array):
        return next(arrays)
    if value is None:
        return None
    items = [_refilled(item, arrays) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else items


def _follow(fast: nn.Module) -> None:
    """Make a network anew where its original has other weights, or other layers, than it had."""
    if _is_current(fast):
        return
    with _following:  # another thread may be computing with it, and never finds a layer missing
        if _is_current(fast):
            return
        anew = _fused(fast.original)
        dict.update(fast, anew)
        for name in fast.keys() - anew.keys():
            del fast[name]
        vars(fast).update(vars(anew))


def _is_current(fast: nn.Module) -> bool:
    now, then = _leaves(fast.original), fast._made_of
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _fused(model: nn.Module) -> nn.Module:
    """A copy of a network, its layers fused, in eval mode. Only what changed is in memory twice."""
    fast = copied(model)
    fused: set[str] = set()
    for name, module in fast.named_modules():
        fused |= {f"{name}.{own}".lstrip(".") for own in (*_fold_norms(module), *_fuse(module))}
    nn.Module.train(fast, False)
    fast.freeze()
    mx.eval(fast.parameters())
    # No modules of the network, so not by setattr.
    vars(fast).update(original=model, fused=frozenset(fused), _made_of=_leaves(model))
    return fast


def copied(value: Any) -> Any:
    """Modules anew, in lists too; arrays and all else as they are."""
    if isinstance(value, list):
        return [copied(item) for item in value]
    if not isinstance(value, nn.Module):
        return value
    twin = copy.copy(value)
    for name, child in value.items():
        twin[name] = copied(child)
    return twin


def _leaves(value: Any) -> list[mx.array]:
    """The arrays of a module, parameters or not."""
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _leaves(item)] if isinstance(value, list) else []


# BatchNorm --------------------------------------------------------------------------------------


def _fold_norms(module: nn.Module) -> Iterator[str]:
    """Fold each BatchNorm of a module into the convolution just before it; the latter's names.

    Both are the module's own, or stand in a list of its layers: a network of this package has its
    layers in the order in which it uses them.
    """
    before: tuple[str, Any] = ("", None)
    for holder, key, name, layer in list(_layers(module)):
        conv_name, conv = before
        if isinstance(layer, nn.BatchNorm) and isinstance(conv, nn.Conv2d):
            _fold(layer, conv)
            holder[key] = nn.Identity()
            yield conv_name
        before = name, layer


def _layers(module: nn.Module) -> Iterator[tuple[Any, Any, str, nn.Module]]:
    """The modules directly in a module and its lists: what holds them, by which key; name; it."""
    for name, child in module.items():
        if isinstance(child, nn.Module):
            yield module, name, name, child
        elif isinstance(child, list):
            for i, item in enumerate(child):
                if isinstance(item, nn.Module):
                    yield child, i, f"{name}.{i}", item


def _fold(norm: nn.BatchNorm, conv: nn.Conv2d) -> None:
    """norm(conv(x)) = (w * scale) x + (bias - mean) * scale + shift, computed in float32."""
    scale = mx.rsqrt(norm.running_var.astype(mx.float32) + norm.eps)
    shift = mx.zeros_like(scale)
    if "weight" in norm:
        scale, shift = scale * norm.weight, norm.bias
    bias = conv.bias if "bias" in conv else 0
    dtype = conv.weight.dtype
    conv.weight = (conv.weight * scale[:, None, None, None]).astype(dtype)
    conv.bias = ((bias - norm.running_mean) * scale + shift).astype(dtype)


# Attention --------------------------------------------------------------------------------------


def _fuse(module: nn.Module) -> list[str]:
    """Make one layer of an attention's q_proj, k_proj and v_proj; its name, where there is any."""
    names = ("q_proj", "k_proj", "v_proj")
    parts = [module[name] for name in names if name in module]
    if len(parts) < 3 or {type(part) for part in parts} != {nn.Linear}:  # quantised, say
        return []
    if not module.projects_together:
        return []
    qkv = nn.Linear(1, 1, bias="bias" in parts[0])
    for leaf in parts[0]:
        qkv[leaf] = mx.concatenate([part[leaf] for part in parts])
    for name in names:
        module.pop(name)
    module.qkv = qkv
    return ["qkv"]
