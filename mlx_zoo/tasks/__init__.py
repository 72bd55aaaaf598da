"""Networks at work: from texts and images to answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo import describe, registry, zoo
from mlx_zoo.describe import Place
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.preprocess.image import preprocess
from mlx_zoo.preprocess.sentence import read_sentence_config
from mlx_zoo.preprocess.text import Tokenizer


def pipeline(
    task: str, model: str | os.PathLike[str] | nn.Module, **options: Any
) -> Callable[..., Any]:
    """A function from inputs to answers.

    image-classification   images -> for each, [{"label": ..., "score": ...}, ...], best first
    sentence-embedding     texts  -> (B, D) array, as sentence-transformers' encode

    Args:
        task: one of the above.
        model: a name as `load` takes it, or a loaded network.
        **options: as `load` takes them, where a name is given.

    Raises:
        ValueError: an unknown task, or a network that is not for it.
    """
    if task not in PIPELINES:
        raise ValueError(f"task={task!r}: one of {', '.join(PIPELINES)} is needed")
    place = Place(options.get("cache_dir"), options.get("local_files_only", False))
    return PIPELINES[task](model, place, options)


class ImageClassification:
    """Images -> labels with scores, the best first."""

    def __init__(self, model, place: Place, options: dict[str, Any]):
        if not isinstance(model, nn.Module):
            model = zoo.load(model, **{"pretrained": True, **options})
        self.model = model
        if registry.of_model(self.model).inputs != "images":
            raise ValueError("image-classification needs a network that takes images")
        self.checkpoint = self.model.checkpoint
        if self.checkpoint is None or self.checkpoint.preprocessing is None:
            raise ValueError("this network does not say how its images are prepared")
        if not self.model.config.num_classes:
            raise ValueError("this network has no head: load it with num_classes=")

    def __call__(
        self, images: Any, *, top_k: int = 5, batch_size: int = 32
    ) -> list[list[dict[str, Any]]] | list[dict[str, Any]]:
        """One image (see preprocess.image) -> a list of answers; a sequence of them -> lists."""
        if top_k < 1 or batch_size < 1:
            raise ValueError(f"top_k={top_k}, batch_size={batch_size}: at least 1 is needed")
        many = isinstance(images, (list, tuple))
        answers = []
        for batch in batches(images if many else [images], batch_size):
            pixels = preprocess(batch, self.checkpoint.preprocessing)
            scores = mx.softmax(self.model(mx.array(pixels)).astype(mx.float32), axis=-1)
            answers += [self.best(row, top_k) for row in np.array(scores)]
        return answers if many else answers[0]

    def best(self, scores: np.ndarray, top_k: int) -> list[dict[str, Any]]:
        names = self.model.checkpoint.labels
        if len(names) != len(scores):  # another head than the checkpoint's
            names = tuple(f"LABEL_{i}" for i in range(len(scores)))
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [{"label": names[i], "score": float(scores[i])} for i in order]


class SentenceEmbedding:
    """Texts -> one vector each."""

    def __init__(self, model, place: Place, options: dict[str, Any]):
        if not isinstance(model, nn.Module):
            options = {"pretrained": True, "task": "sentence-embedding", **options}
            model = zoo.load(model, **options)
        if getattr(model.config, "task", None) != "sentence-embedding" or not model.checkpoint:
            raise ValueError("load the network with task='sentence-embedding', pretrained=True")
        self.model = model
        files = describe.companions(model.checkpoint, registry.of_model(model), place)
        self.tokenizer = Tokenizer.from_files(files)
        sentence = read_sentence_config(files)
        self.prompt = sentence.prompts.get(sentence.default_prompt_name or "", "")
        if self.prompt and not sentence.include_prompt:
            raise UnsupportedConfig("include_prompt=false with a default prompt is not implemented")

    def __call__(self, texts: str | Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """(B, D) float32; (D,) for a single text."""
        if isinstance(texts, str):
            return self([texts])[0]
        if not texts or batch_size < 1:
            raise ValueError(f"{len(texts)} texts, batch_size={batch_size}: at least 1 of each")
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"texts hold {type(odd[0]).__name__}, where str belongs")
        texts = [self.prompt + text for text in texts]
        # Like lengths together: less padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        rows: dict[int, np.ndarray] = {}
        for batch in batches(order, batch_size):
            tokens = self.tokenizer([texts[i] for i in batch])
            vectors = np.array(self.model(**tokens.inputs()).astype(mx.float32))
            rows |= dict(zip(batch, vectors, strict=True))
        return np.stack([rows[i] for i in range(len(texts))])


PIPELINES: dict[str, Callable[..., Any]] = {
    "image-classification": ImageClassification,
    "sentence-embedding": SentenceEmbedding,
}


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`items` in runs of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
