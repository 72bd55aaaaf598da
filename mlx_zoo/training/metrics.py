"""How well a network does: sums that are counted batch by batch, and what they come to.

The sums of several processes add up to those of all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_zoo.training.losses import IGNORED, cross_entropy

TOP = 5
MOST = 700.0  # of a mean loss, whose exponential is still a number


class Metrics(ABC):
    """`sums` is an array (M,) float64 that begins with the sum of the losses and their number."""

    sums: np.ndarray

    def __init__(self, count: int):
        self.sums = np.zeros(2 + count)

    @abstractmethod
    def counted(self, logits: mx.array, targets: mx.array) -> np.ndarray:
        """What a batch adds to all but the first two sums."""

    @abstractmethod
    def values(self) -> dict[str, float]:
        """What the sums come to: {"loss": ..., "accuracy": ..., ...}."""

    def update(self, outputs: mx.array, targets: mx.array) -> None:
        """Count the network's outputs (..., C) for a batch."""
        total, count = cross_entropy(outputs, targets)
        found = [total.item(), count.item()]
        self.sums += np.concatenate([found, self.counted(outputs, targets)])

    def merge(self, sums: Any) -> None:
        """Add the sums of others."""
        self.sums += np.asarray(sums, np.float64)

    @property
    def loss(self) -> float:
        """The mean; not a number where nothing was counted."""
        return self.part(self.sums[0])

    def part(self, count: float) -> float:
        """Of all that was asked."""
        return float(count / self.sums[1]) if self.sums[1] else math.nan


class Classes(Metrics):
    """Of class ids (B,) or soft labels (B, C), whose largest is taken.

    accuracy; top5, where there are more classes; f1: the mean over the classes, of those that are
    asked for or given, each 2 TP / (2 TP + FP + FN).
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        super().__init__(1 + 3 * num_classes)

    def counted(self, logits: mx.array, targets: mx.array) -> np.ndarray:
        scores = np.array(logits.astype(mx.float32))
        ids = np.array(targets)
        ids = ids.argmax(axis=-1) if ids.ndim == scores.ndim else ids
        rows, said = np.arange(len(ids)), scores.argmax(axis=-1)
        # Of equal scores the first has the better rank.
        own = scores[rows, ids][:, None]
        before = np.arange(self.num_classes) < ids[:, None]
        rank = ((scores > own) | ((scores == own) & before)).sum(axis=-1)
        right, size = said[said == ids], self.num_classes
        counts = [np.bincount(x, minlength=size) for x in (right, said, ids)]
        return np.concatenate([[(rank < TOP).sum()], *counts])

    def values(self) -> dict[str, float]:
        right, said, asked = self.sums[3:].reshape(3, self.num_classes)
        found = {"loss": self.loss, "accuracy": self.part(right.sum())}
        if self.num_classes > TOP:
            found["top5"] = self.part(self.sums[2])
        seen = said + asked > 0
        found["f1"] = float((2 * right[seen] / (said + asked)[seen]).mean()) if seen.any() else 0.0
        return found


class Tokens(Metrics):
    """Of token ids (B, N): perplexity, the exponential of the mean loss; accuracy."""

    def __init__(self):
        super().__init__(1)

    def counted(self, logits: mx.array, targets: mx.array) -> np.ndarray:
        return np.array([(logits.argmax(axis=-1) == targets).sum().item()])

    def values(self) -> dict[str, float]:
        perplexity = math.exp(self.loss) if not self.loss > MOST else math.inf
        return {"loss": self.loss, "perplexity": perplexity, "accuracy": self.part(self.sums[2])}


class Tags(Metrics):
    """Of tags' ids (B, N): accuracy of tokens and, where the tags are B-..., I-... and O, the
    precision, recall and f1 of whole entities (Tjong Kim Sang and De Meulder 2003); else f1 of the
    classes.
    """

    def __init__(self, labels: Sequence[str]):
        self.labels = tuple(labels)
        self.classes = Classes(len(labels))
        super().__init__(3 + len(self.classes.sums) - 2)

    @property
    def has_entities(self) -> bool:
        return all(name == "O" or name[:2] in ("B-", "I-") for name in self.labels)

    def counted(self, logits: mx.array, targets: mx.array) -> np.ndarray:
        said, asked = np.array(logits.argmax(axis=-1)), np.array(targets)
        seen = asked != IGNORED
        counts = np.zeros(3)
        for row_said, row_asked, row in (
            zip(said, asked, seen, strict=True) if self.has_entities else ()
        ):
            theirs, own = (
                entities([self.labels[i] for i in ids[row]]) for ids in (row_said, row_asked)
            )
            counts += [len(theirs & own), len(theirs), len(own)]
        flat = mx.array(np.array(logits.astype(mx.float32))[seen])
        return np.concatenate([counts, self.classes.counted(flat, mx.array(asked[seen]))])

    def values(self) -> dict[str, float]:
        right, said, asked = self.sums[2:5]
        self.classes.sums = np.concatenate([self.sums[:2], self.sums[5:]])
        found = self.classes.values()
        found.pop("top5", None)
        if self.has_entities:
            found |= {
                "precision": float(right / said) if said else 0.0,
                "recall": float(right / asked) if asked else 0.0,
                "f1": float(2 * right / (said + asked)) if said + asked else 0.0,
            }
        return found


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Tags -> (kind, first word, last word) of each entity.

    B- begins one, and so does I- where none of its kind goes on, as the CoNLL evaluation has it.
    """
    found: set[tuple[str, int, int]] = set()
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        if kind and (mark != "I" or own != kind):
            found.add((kind, start, i - 1))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = i, own
    return found
