"""How parameters learn: AdamW or SGD of mlx.optimizers, in groups, and the learning rate of a step.

A group of parameters shares a weight decay and a factor of the learning rate, as in torch.optim.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers

from mlx_zoo.models.layers import check_choice
from mlx_zoo.training.parts import depth_of
from mlx_zoo.training.trainable import no_decay

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
# Where the user says none. All parameters of a pretrained network are moved by little; a fresh
# head, or adapters, by more; and AdamW moves a small network by more, too.
LEARNING_RATES = {
    "adamw": {"all": 1e-4, "few": 1e-3},
    "sgd": {"all": 1e-2, "few": 1e-1},
}
SMALL = 10**6  # parameters

Arrays = dict[str, mx.array]


class Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) or SGD with momentum, as in torch.optim.

    Args:
        model: whose trainable parameters are to learn.
        layer_decay: the learning rate of a parameter is multiplied by it once for each layer
            between it and the head.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, mx.array],
        *,
        kind: str = "adamw",
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        layer_decay: float = 1.0,
    ):
        def made(decay: float) -> optimizers.Optimizer:
            if kind == "sgd":
                return optimizers.SGD(0.0, momentum, weight_decay=decay)
            return optimizers.AdamW(0.0, [*betas], weight_decay=decay, bias_correction=True)

        top = max((depth_of(name, model) for name in parameters), default=0)
        groups: dict[tuple[float, float], list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            scale = layer_decay ** (top - depth_of(name, model)) if layer_decay != 1 else 1.0
            decay = 0.0 if no_decay(name, parameter, model) else weight_decay
            groups[scale, decay].append(name)
        self.groups = [(scale, made(decay), names) for (scale, decay), names in groups.items()]
        for _, group, names in self.groups:
            group.init({name: parameters[name] for name in names})

    def updated(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> Arrays:
        """The parameters after a step; the optimiser's own state moves with them."""
        found: Arrays = {}
        for scale, group, names in self.groups:
            group.learning_rate = learning_rate * scale
            found |= group.apply_gradients(
                {name: gradients[name] for name in names},
                {name: parameters[name] for name in names},
            )
        mx.eval([group.step for _, group, _ in self.groups])  # else SGD's grows, a sum of sums
        return {name: found[name] for name in parameters}

    @property
    def state(self) -> Arrays:
        """What was learnt about each parameter: "<name>/m", "<name>/v"."""
        return {
            f"{name}/{key}": x
            for _, group, names in self.groups
            for name in names
            for key, x in group.state[name].items()
        }

    def restore(self, state: Mapping[str, mx.array], num_updates: int) -> None:
        """Go on from a `state` after so many steps."""
        for _, group, names in self.groups:
            group.state["step"] = mx.array(num_updates, mx.uint64)
            for name in names:
                group.state[name] = {key: state[f"{name}/{key}"] for key in group.state[name]}


def schedule(kind: str, warmup: float | int, num_steps: int) -> Callable[[int], float]:
    """By what the learning rate is multiplied at each of `num_steps` steps, from 0.

    It grows from 0 to 1 over `warmup` steps (a float: that part of all), then follows half a cosine
    (Loshchilov & Hutter 2016, arXiv:1608.03983) or a line down to 0, or stays.
    """
    check_choice("schedule", kind, SCHEDULES)
    rising = int(warmup * num_steps) if isinstance(warmup, float) else warmup

    def factor(step: int) -> float:
        if step < rising:
            return step / max(1, rising)
        part = min(1.0, (step - rising) / max(1, num_steps - rising))
        if kind == "constant":
            return 1.0
        return 1 - part if kind == "linear" else (1 + math.cos(math.pi * part)) / 2

    return factor


def default_learning_rate(kind: str, method: Any, num_parameters: int) -> float:
    """A sane one: "all" parameters learn, or "few" of them, fresh."""
    few = method == "head" or not isinstance(method, str) or method == "lora"
    rate = LEARNING_RATES[kind]["few" if few else "all"]
    return 10 * rate if kind == "adamw" and num_parameters < SMALL else rate
