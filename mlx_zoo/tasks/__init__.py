"""Networks at work: from texts and images to answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from mlx_zoo import zoo
from mlx_zoo.backend.inference import optimize_for_inference
from mlx_zoo.describe import Place, place_of
from mlx_zoo.tasks.generation import TextGeneration
from mlx_zoo.tasks.images import ImageClassification, ImageFeatures
from mlx_zoo.tasks.spans import QuestionAnswering, TokenClassification
from mlx_zoo.tasks.texts import FillMask, SentenceEmbedding, TextClassification


def pipeline(
    task: str,
    model: str | os.PathLike[str] | nn.Module,
    *,
    optimize: bool = True,
    **options: Any,
) -> Callable[..., Any]:
    """A function from inputs to answers, with the names and scores of transformers' pipelines.

    task                      input                     answer
    image-classification      image                     [{"label", "score"}, ...], best first
    image-feature-extraction  image                     (D,) array
    fill-mask                 text with [MASK]          [{"score", "token", "token_str",
                                                        "sequence"}, ...], best first
    text-classification       text, or                  [{"label", "score"}]
                              {"text", "text_pair"}
    token-classification      text                      [{"entity", "score", "index", "word",
                                                        "start", "end"}, ...]
    question-answering        {"question", "context"}   {"score", "start", "end", "answer"}
    sentence-embedding        text                      (D,) array
    text-generation           text                      [{"generated_text"}]

    A list of inputs gives a list of answers (a (B, D) array of arrays), an iterator an iterator
    that reads on as it is read, `batch_size` at a time. What else there is to say to each function
    (`top_k`, `aggregation_strategy`, ...), its own docstring tells: `help(mlx_zoo.pipeline(...))`.

    Args:
        task: one of the above.
        model: a name as `load` takes it, or a loaded network with the head of that task; it is
            put into eval mode.
        optimize: whether the network is made faster first (`optimize_for_inference`); a loaded one
            stays as it is, and what it learns later the pipeline knows.
        **options: as `load` takes them, where a name is given; of a loaded network, `cache_dir` and
            `local_files_only`: where the files beside its weights are.

    Raises:
        ValueError: an unknown task, or a network that is not for it.
        MLXZooError: as `load`.
    """
    if task not in PIPELINES:
        raise ValueError(f"task={task!r}: one of {', '.join(PIPELINES)} is needed")
    if not isinstance(model, nn.Module):
        head = {} if task in IMAGE_TASKS else {"task": task}
        model, options = zoo.load(model, **{"pretrained": True, **head, **options}), {}
    elif odd := sorted(options.keys() - {"cache_dir", "local_files_only"}):
        raise ValueError(f"{odd[0]}= is for a name: this network is loaded already")
    place = place_of(model, **options)
    model = model.eval()
    return PIPELINES[task](optimize_for_inference(model) if optimize else model, place)


IMAGE_TASKS = (ImageClassification.task, ImageFeatures.task)
PIPELINES: dict[str, Callable[[nn.Module, Place], Callable[..., Any]]] = {
    ImageClassification.task: ImageClassification,
    ImageFeatures.task: ImageFeatures,
    FillMask.task: FillMask,
    TextClassification.task: TextClassification,
    TokenClassification.task: TokenClassification,
    QuestionAnswering.task: QuestionAnswering,
    SentenceEmbedding.task: SentenceEmbedding,
    TextGeneration.task: TextGeneration,
}
