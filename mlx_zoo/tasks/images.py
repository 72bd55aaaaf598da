"""Answers about images. What an image may be, `preprocess.image` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo import describe, registry, zoo
from mlx_zoo.describe import Place
from mlx_zoo.preprocess.image import as_list, preprocess
from mlx_zoo.tasks.batches import Advance, answers, check_count, stacked
from mlx_zoo.tasks.labels import check_function, default_function, label_names, ranked, scores_of

Answer = list[dict[str, Any]]


class Images:
    """A network that takes images, and how they are prepared for it."""

    task: str

    def __init__(self, model: nn.Module, place: Place):
        if registry.of_model(model).inputs != "images":
            raise ValueError(f"{self.task} needs a network that takes images")
        if model.checkpoint is None or model.checkpoint.preprocessing is None:
            raise ValueError("this network does not say how its images are prepared")
        self.model = model
        self.place = place

    def prepare(self, images: Sequence[Any]) -> np.ndarray:
        """(B, H, W, C) float32; MLX has no part in it, so that another thread may do it."""
        how = self.model.checkpoint.preprocessing
        size = getattr(self.model.config, "img_size", how.size)  # it may have been reset since
        return preprocess(list(images), how if size == how.size else how.at(size))

    def pixels(self, prepared: np.ndarray) -> mx.array:
        """(B, H, W, C), in the type of the weights."""
        return mx.array(prepared).astype(zoo.kind_of(self.model))


class ImageClassification(Images):
    """Images -> labels with scores, the best first."""

    task = "image-classification"

    def __init__(self, model: nn.Module, place: Place):
        super().__init__(model, place)
        if not model.config.num_classes:
            raise ValueError("this network has no head: load it with num_classes=")
        files: Mapping[str, Path] = {}
        if (model.checkpoint.dialect or "").startswith("transformers"):
            files = describe.companions(model.checkpoint, registry.of_model(model), place)
        self.labels = label_names(model)
        self.function = default_function(model, files)

    def __call__(
        self,
        images: Any,
        *,
        top_k: int | None = 5,
        function_to_apply: str | None = None,
        batch_size: int = 32,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """An image -> [{"label", "score"}, ...], best first; many images -> as many of these.

        Args:
            top_k: how many labels; None for all.
            function_to_apply: "softmax", "sigmoid" or "none"; None for what the checkpoint says.
        """
        check_function(function_to_apply)
        if top_k is not None:
            check_count("top_k", top_k)

        def read(prepared: np.ndarray, advance: Advance) -> list[Answer]:
            logits = self.model(self.pixels(prepared))
            scores = scores_of(logits, function_to_apply or self.function)
            advance(len(prepared))
            return [ranked(row, self.labels, top_k) for row in scores]

        return answers(as_list(images), self.prepare, read, batch_size)


class ImageFeatures(Images):
    """Images -> one pooled vector each: `model.features`."""

    task = "image-feature-extraction"

    def __call__(self, images: Any, *, batch_size: int = 32) -> np.ndarray | Iterator[np.ndarray]:
        """(B, D) float32 of a list; (D,) of one image; an iterator of (D,) of an iterator."""

        def read(prepared: np.ndarray, advance: Advance) -> list[np.ndarray]:
            vectors = np.array(self.model.features(self.pixels(prepared)).astype(mx.float32))
            advance(len(prepared))
            return list(vectors)

        return stacked(answers(as_list(images), self.prepare, read, batch_size))
