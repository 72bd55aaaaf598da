"""A quantised network beside itself in full precision: is it the same one, and what did it cost?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo import registry, zoo
from mlx_zoo.converting import Request, converted, network
from mlx_zoo.describe import Place
from mlx_zoo.errors import VerificationError
from mlx_zoo.hub import cache
from mlx_zoo.mapping import engine
from mlx_zoo.quantization import quantize_layers
from mlx_zoo.verify import compare
from mlx_zoo.verify.published import tokenizer_of
from mlx_zoo.verify.report import Report, judge, look_closely

NUM_IMAGES = 16
NUM_TEXTS, NUM_TOKENS = 8, 128


@dataclass(frozen=True)
class QuantizedReport(Report):
    """Whether a network is its checkpoint's, quantised, and what that does to its outputs.

    It passes where every tensor is, bit for bit, what quantising the checkpoint's own weights
    gives. The comparison of the outputs, and `effect`, say what that costs; they are not judged.
    """

    different: tuple[str, ...] = ()  # tensors that are something else
    effect: Mapping[str, float] = field(default_factory=dict)
    num_tensors: int = 0  # that were compared

    @property
    def passed(self) -> bool:
        return self.num_tensors > 0 and not self.different

    @property
    def first_divergence(self) -> str | None:
        return self.different[0] if self.different else None

    @property
    def reason(self) -> str:
        if self.different:
            names = ", ".join(engine.collapse(self.different))
            return f"not the weights of {self.name}, quantised: {names}"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.effect.items())
        return f"its own weights, quantised: {figures}"

    def summary(self) -> dict[str, Any]:
        return {**super().summary(), "effect": dict(self.effect)}

    @property
    def rule(self) -> str:
        return "allowed is no difference, in any bit of any tensor"

    def _figures(self) -> list[Any]:
        from rich.markup import escape
        from rich.table import Table

        title = escape(f"{self.name} against {self.evidence}")
        table = Table(title=title, title_justify="left")
        table.add_column("effect on the outputs")
        table.add_column(justify="right")
        for name, value in self.effect.items():
            table.add_row(name, f"{value:.4g}")
        for c in self.outputs:
            table.add_row(f"max |diff| of {c.name}, of {c.scale:.2g}", f"{c.max_abs:.2g}")
        return [table]


def against_full_precision(model: nn.Module, place: Place, seed: int, device: str) -> Report:
    """Compare a quantised network with its checkpoint's own weights, in float32."""
    full = _full_precision(model, place)
    inputs, what = _inputs(model, place, seed)
    mine, _ = compare.run(model, inputs, ())
    original, _ = compare.run(full, inputs, ())
    effect = _effect(model, inputs, mine, original)
    versions = cache.versions()
    return QuantizedReport(
        name=model.checkpoint.name,
        evidence=f"its own weights before they were quantised to {model.quantization.bits} bits",
        outputs=tuple(judge(n, x, original[n], original[n]) for n, x in mine.items()),
        layers=(),
        device=device,
        seed=seed,
        inputs=f"{', '.join(f'{name} {x.shape}' for name, x in inputs.items())}, {what}",
        versions=versions,
        evidence_kind="weights",
        origin="the published weights, converted here and quantised again",
        different=_different(model, full),
        effect=effect,
        num_tensors=len(engine.parameters(model)),
        **look_closely(mine, original, original, model.checkpoint.labels),
    )


def _full_precision(model: nn.Module, place: Place) -> nn.Module:
    """The network of the same checkpoint and config, as it was before."""
    checkpoint = replace(model.checkpoint, folder=None)
    found = converted(Request(checkpoint, registry.of_model(model), model.config), place)
    if found.config != model.config:
        raise VerificationError(f"{checkpoint.name} was changed after it was loaded")
    full = network(registry.of_model(model), found.config, None)
    full.load_weights(list(found.weights.items()), strict=True)
    return full.eval()


def _different(model: nn.Module, full: nn.Module) -> tuple[str, ...]:
    """The tensors of `model` that quantising `full` does not give; `full` is used up.

    The user may have had the weights cast, before they were quantised or after.
    """
    own = engine.parameters(model)
    kind = zoo.kind_of(model)
    before = copy.deepcopy(full)
    before.set_dtype(kind)
    before = quantize_layers(before, model.quantization)
    after = quantize_layers(full, model.quantization)
    after.set_dtype(kind)
    return min((_unequal(own, engine.parameters(again)) for again in (before, after)), key=len)


def _unequal(own: Mapping[str, mx.array], again: Mapping[str, mx.array]) -> tuple[str, ...]:
    if own.keys() != again.keys():
        return tuple(sorted(own.keys() ^ again.keys()))
    return tuple(
        name for name, x in own.items() if not mx.array_equal(x, again[name], equal_nan=True).item()
    )


def _inputs(model: nn.Module, place: Place, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """What both networks see, and what that is in words."""
    config = model.config
    if registry.of_model(model).inputs == "images":
        size = compare.image_size(model)
        return compare.random_inputs("images", config, size, seed, NUM_IMAGES), "of seeded noise"
    tokenizer = tokenizer_of(model, place)
    if tokenizer is None or config.task == "multiple-choice":
        inputs = compare.random_inputs("tokens", config, NUM_TOKENS, seed)
        return inputs, "of seeded random tokens"
    length = min(NUM_TOKENS, config.max_positions)
    tokens = tokenizer(_texts(), max_length=length)
    arrays = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    if hasattr(config, "type_vocab_size"):
        arrays["token_type_ids"] = tokens.token_type_ids
    return arrays, "of Python's own documentation"


def _texts() -> list[str]:
    """The first long entries of the language reference that every Python has."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items()) if len(text) > 10 * NUM_TOKENS][:NUM_TEXTS]


def _effect(
    model: nn.Module,
    inputs: Mapping[str, np.ndarray],
    mine: Mapping[str, np.ndarray],
    original: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """What quantisation does to the outputs.

    top-1 agreement: how often the largest output is the same one. perplexity: of the texts, by a
    language model, before and after. cosine: the mean similarity of what is no classification.
    """
    effect: dict[str, float] = {}
    for name, x in mine.items():
        label = "" if len(mine) == 1 else f" of {name}"
        seen = _positions(x, inputs)
        if getattr(model.config, "task", None) == "text-generation":
            effect["perplexity"] = _perplexity(original[name], inputs)
            effect["perplexity, quantised"] = _perplexity(x, inputs)
        a, b = x[seen], original[name][seen]
        if _are_logits(model, name):
            effect[f"top-1 agreement{label}"] = float((a.argmax(-1) == b.argmax(-1)).mean())
        else:
            norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            effect[f"cosine{label}"] = float(((a * b).sum(-1) / np.maximum(norms, 1e-12)).mean())
    return effect


def _are_logits(model: nn.Module, name: str) -> bool:
    task = getattr(model.config, "task", "image-classification")
    if task == "image-classification":
        return bool(model.config.num_classes)
    return task not in (None, "sentence-embedding")


def _positions(x: np.ndarray, inputs: Mapping[str, np.ndarray]) -> Any:
    """Which of the leading positions of an output count: tokens that are no padding."""
    mask = inputs.get("attention_mask")
    per_token = mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape
    return mask.astype(bool) if per_token and mask is not None else slice(None)


def _perplexity(logits: np.ndarray, inputs: Mapping[str, np.ndarray]) -> float:
    """exp of the mean negative log-likelihood of each token given those before it."""
    ids, seen = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].astype(bool)
    logits = logits[:, :-1].astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[..., None].astype(np.int64), axis=-1)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - chosen
    return float(np.exp(losses[seen].mean()))
