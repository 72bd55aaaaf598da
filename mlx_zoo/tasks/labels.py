"""The outputs of a classification head: their names, and scores from logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo import registry
from mlx_zoo.catalogue import num_labels
from mlx_zoo.preprocess.files import read_optional_json
from mlx_zoo.tasks.batches import check_count

FUNCTIONS = ("softmax", "sigmoid", "none")
# Those of a config.json's problem_type that do not depend on the number of labels.
FUNCTION_OF = {"regression": "none", "multi_label_classification": "sigmoid"}


def label_names(model: nn.Module) -> tuple[str, ...]:
    """As the checkpoint says; LABEL_0, LABEL_1, ... for another head than the checkpoint's."""
    count = registry.of_model(model).head_size(model.config) or 0
    names = model.checkpoint.labels if model.checkpoint else ()
    return names if len(names) == count else tuple(f"LABEL_{i}" for i in range(count))


def default_function(model: nn.Module, files: Mapping[str, Path]) -> str:
    """What makes scores of logits, by transformers' rule; `files` may have its config.json.

    The sigmoid is for several labels at once and for a single one, "none" for regression.
    """
    count = registry.of_model(model).head_size(model.config)
    config = read_optional_json(files, "config.json")
    # Of a fresh head with another number of labels, config.json knows nothing.
    kind = config.get("problem_type") if num_labels(config) == count else ""
    return FUNCTION_OF.get(str(kind), "sigmoid" if count == 1 else "softmax")


def check_function(function: str | None) -> None:
    """Raise ValueError for a `function_to_apply` that is not there."""
    if function not in (None, *FUNCTIONS):
        raise ValueError(f"function_to_apply={function!r}: one of {', '.join(FUNCTIONS)} is needed")


def scores_of(logits: mx.array, function: str) -> np.ndarray:
    """(..., C) -> (..., C) float32."""
    logits = logits.astype(mx.float32)
    if function != "none":
        logits = mx.softmax(logits, axis=-1) if function == "softmax" else mx.sigmoid(logits)
    return np.array(logits)


def ranked(scores: np.ndarray, names: Sequence[str], top_k: int | None) -> list[dict[str, Any]]:
    """The `top_k` labels (None: all) with their scores (C,), best first."""
    if top_k is not None:
        check_count("top_k", top_k)
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": names[i], "score": float(scores[i])} for i in order]
