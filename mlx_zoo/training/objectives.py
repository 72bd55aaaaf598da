"""What a network is trained to do: the loss of its outputs, and how well it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.training.data import task_of
from mlx_zoo.training.examples import FILL_MASK, GENERATION, IMAGES, TAGS, TEXTS
from mlx_zoo.training.losses import cross_entropy
from mlx_zoo.training.metrics import Classes, Metrics, Tags, Tokens

# Task -> what is watched for early stopping, and whether more of it is better.
MONITORS = {
    IMAGES: ("accuracy", "max"),
    TEXTS: ("accuracy", "max"),
    TAGS: ("f1", "max"),
    GENERATION: ("perplexity", "min"),
    FILL_MASK: ("perplexity", "min"),
}


@dataclass(frozen=True)
class Objective:
    """Cross-entropy, and the metrics of a task. `monitor` is (metric, "max" or "min")."""

    task: str
    labels: tuple[str, ...]
    monitor: tuple[str, str]
    num_classes: int

    def loss(self, outputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        """(sum of the losses, how many they are), float32: their quotient is the mean.

        The sums of parts of a batch add up to those of the batch.
        """
        return cross_entropy(outputs, targets)

    def metrics(self) -> Metrics:
        """None counted yet."""
        kinds: dict[str, Callable[[], Metrics]] = {
            TAGS: lambda: Tags(self.labels),
            GENERATION: Tokens,
            FILL_MASK: Tokens,
        }
        return kinds.get(self.task, lambda: Classes(self.num_classes))()

    def direction(self, metric: str) -> str:
        """Whether more ("max") or less ("min") of a metric is better."""
        return "min" if metric in ("loss", "perplexity") else "max"


def objective_of(model: nn.Module, labels: tuple[str, ...] = ()) -> Objective:
    """The objective of a network's head. `labels` (of tags: "B-person") are the data's.

    Raises ValueError for a head that cannot be trained here.
    """
    task = task_of(model)
    return Objective(task, labels, MONITORS[task], getattr(model.config, "num_classes", 0))
