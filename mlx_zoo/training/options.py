"""What `finetune` may be asked for, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mlx_zoo.models.layers import check_choice
from mlx_zoo.tasks.batches import check_count
from mlx_zoo.training.optimizers import SCHEDULES
from mlx_zoo.training.steps import PRECISIONS


@dataclass(frozen=True)
class Options:
    """What `finetune` was asked for, checked."""

    method: Any
    epochs: int
    max_steps: int | None
    batch_size: int
    accumulate: int
    optimizer: str
    learning_rate: float | None
    momentum: float
    betas: tuple[float, float]
    weight_decay: float
    schedule: str
    warmup: float | int
    layer_decay: float
    clip_norm: float | None
    precision: str
    augment: Any
    label_smoothing: float
    mixup: float
    max_length: int | None
    evaluate_every: int | None
    patience: int | None
    monitor: str | None
    seed: int

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate"):
            check_count(name, getattr(self, name))
        for name in ("max_steps", "evaluate_every", "patience", "max_length"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("schedule", self.schedule, SCHEDULES)
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r}: a whole number from 0 is needed")
        if self.learning_rate is not None:
            _check_number("learning_rate", self.learning_rate, 0, above=True)
        _check_number("weight_decay", self.weight_decay, 0)
        _check_number("momentum", self.momentum, 0, below=1)
        _check_number("layer_decay", self.layer_decay, 0, most=1, above=True)
        if self.clip_norm is not None:
            _check_number("clip_norm", self.clip_norm, 0, above=True)
        if len(self.betas) != 2:
            raise ValueError(f"betas={self.betas!r}: two numbers are needed")
        for beta in self.betas:
            _check_number("betas", beta, 0, below=1)
        if isinstance(self.warmup, float):
            _check_number("warmup", self.warmup, 0, below=1)
        elif type(self.warmup) is not int or self.warmup < 0:
            raise ValueError(f"warmup={self.warmup!r}: a part of all steps, or steps, are needed")


def _check_number(
    name: str,
    value: Any,
    least: float,
    most: float = math.inf,
    below: float = math.inf,
    above: bool = False,
) -> None:
    """Raise ValueError unless least <= value <= most, value < below and, if `above`, > least."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or value >= below or (above and value == least):
        begin = f"above {least}" if above else f"from {least}"
        end = f" to below {below}" if below < math.inf else f" to {most}" if most < math.inf else ""
        raise ValueError(f"{name}={value!r}: a number {begin}{end} is needed")
