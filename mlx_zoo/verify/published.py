"""Against figures that publishers and the libraries' own tests print of famous checkpoints.

`data/published.json` holds them: facts alone, each with the page that they are from. A row is for a
repository of the hub, or for the very bytes of its weights wherever they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, ClassVar

import mlx.nn as nn
import numpy as np

from mlx_zoo import describe, registry
from mlx_zoo.catalogue import DATA, Checkpoint
from mlx_zoo.describe import Place
from mlx_zoo.errors import CheckpointError
from mlx_zoo.hub import cache
from mlx_zoo.preprocess.text import Tokenizer
from mlx_zoo.verify import compare, stored
from mlx_zoo.verify.report import Comparison, Report

FILE = DATA / "published.json"
# What float32 costs, as a part of the largest value: figures of one network that were printed on
# different machines are 1e-5 apart.
SLACK = {"float32": 5e-5, "float16": 1e-2, "bfloat16": 1e-2}

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Printed(Comparison):
    """Values of ours beside printed ones, which are rounded; there is no float64 to judge by."""

    printed: ClassVar[bool] = True
    allowed: float = 0.0

    @property
    def bound(self) -> float:
        """Half of the last digit printed, and what float32 costs."""
        return self.allowed

    @property
    def tolerance(self) -> float:
        return self.relative(self.allowed)

    @property
    def passed(self) -> bool:
        return bool(np.isfinite(self.error)) and self.error <= self.allowed


@dataclass(frozen=True)
class Published:
    """The rows that speak of a network."""

    cases: tuple[Case, ...]
    place: Place

    def report(self, model: nn.Module, precision: str, device: str) -> Report:
        """Run `model` on what each row shows it, and compare with what the row says it gives."""
        tokenizer = tokenizer_of(model, self.place)
        found = [_compare(model, case, tokenizer, precision) for case in self.cases]
        rows, counts = zip(*found, strict=True)
        return Report(
            name=model.checkpoint.name,
            evidence=f"published outputs, {sum(counts)} values",
            outputs=rows,
            layers=(),
            device=device,
            seed=None,
            inputs=f"{len(rows)} published inputs",
            versions=cache.versions(),
            evidence_kind="published",
            origin="; ".join(
                dict.fromkeys(f"{c['origin']} (read {c['read']})" for c in self.cases)
            ),
            notes=("few values, printed with few digits: less than a comparison of every layer",),
        )


def find_published(model: nn.Module, place: Place) -> Published | str:
    """What is published of a network as it is loaded; or why there is nothing."""
    checkpoint, task = model.checkpoint, getattr(model.config, "task", None)
    hashes = stored.source_hashes(model).values()
    rows = [row for row in read() if _speaks_of(row, checkpoint, hashes)]
    cases = tuple(case for row in rows for case in row["cases"] if task in case["tasks"])
    if not cases:
        return f"no outputs are published of {checkpoint.name}" + (
            f" with a head for {task}" if rows and task else ""
        )
    if any("texts" in case for case in cases) and tokenizer_of(model, place) is None:
        return f"the outputs published of {checkpoint.name} need its tokenizer, which is not there"
    return Published(cases, place)


def are_published(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint may have published outputs, as far as its source tells."""
    return any(_speaks_of(row, checkpoint, ()) for row in read())


def read() -> list[dict[str, Any]]:
    """The rows of the file. Figures are Decimals: their digits count."""
    return json.loads(FILE.read_text(encoding="utf-8"), parse_float=Decimal)


def _speaks_of(row: Mapping[str, Any], checkpoint: Checkpoint, hashes: Any) -> bool:
    source = checkpoint.source.partition("@")[0]
    return source == f"hf-hub:{row['repository']}" or bool({*row["sha256"]} & {*hashes})


def _numbers(values: Any) -> Iterator[Decimal]:
    if isinstance(values, list):
        for value in values:
            yield from _numbers(value)
    else:
        yield Decimal(values)


def tokenizer_of(model: nn.Module, place: Place) -> Tokenizer | None:
    """Of a network for texts; None where the files do not say, or it is not implemented."""
    architecture = registry.of_model(model)
    if architecture.inputs != "tokens":
        return None
    try:
        return Tokenizer.from_files(describe.companions(model.checkpoint, architecture, place))
    except CheckpointError:
        return None


def _compare(
    model: nn.Module, case: Case, tokenizer: Tokenizer | None, precision: str
) -> tuple[Comparison, int]:
    """The judged values of a case, and how many there are."""
    ours, printed, scale = CASES[case["kind"]](model, case, tokenizer)
    nothing = Printed(
        case["what"], np.inf, np.inf, 1.0, np.inf, 0.0, precision, "nothing was compared"
    )
    if len(ours) != len(printed) or not len(ours):
        return nothing, 0
    difference = np.abs(ours - np.array([float(x) for x in printed]))
    half_digit = max(_half_digit(x) for x in printed)
    row = replace(
        nothing,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        scale=scale,
        error=float(difference.max()),
        torch_error=half_digit,
        note="" if np.isfinite(difference).all() else "not the values that are printed",
        allowed=half_digit + SLACK[precision] * scale,
    )
    return row, len(ours)


def _half_digit(x: Decimal) -> float:
    """Of the last one printed: 0.00005 for 0.4249."""
    exponent = x.as_tuple().exponent
    assert isinstance(exponent, int)
    return 0.5 * 10.0**exponent if exponent < 0 else 0.0


# What is compared: our values, the printed ones, and the largest magnitude of such values --------

Values = tuple[np.ndarray, list[Decimal], float]


def _hidden_states(model: nn.Module, case: Case, tokenizer: Tokenizer | None) -> Values:
    """A part of an output, for token ids."""
    outputs, _ = compare.run(model, _ids(model, case["input_ids"], case["attention_mask"]), ())
    x = outputs[case["output"]][tuple(slice(*part) for part in case["part"])]
    printed = [*_numbers(case["values"])]
    return x.reshape(-1), printed, float(max(map(abs, printed), default=1))


def _fill_mask(model: nn.Module, case: Case, tokenizer: Tokenizer | None) -> Values:
    """The probabilities of the likeliest tokens at the masked place of a text."""
    assert tokenizer is not None
    tokens = tokenizer(case["texts"])
    outputs, _ = compare.run(model, _ids(model, tokens.input_ids, tokens.attention_mask), ())
    logits = outputs.get("prediction_logits", outputs.get("output"))
    assert logits is not None
    mask = tokenizer.backend.token_to_id(tokenizer.special_tokens["mask_token"])
    (chosen,) = logits[tokens.input_ids == mask].astype(np.float64)  # (V,)
    shares = np.exp(chosen - chosen.max())
    shares = shares / shares.sum()
    best = np.argsort(-shares, kind="stable")[: len(case["tokens"])]
    # Where other tokens are the likeliest, the values are not those that are printed.
    same = set(best.tolist()) == set(case["tokens"])
    ours = shares[case["tokens"]] if same else np.full(len(best), np.nan)
    return ours, case["values"], float(max(case["values"]))


def _similarity(model: nn.Module, case: Case, tokenizer: Tokenizer | None) -> Values:
    """The cosines of sentences, each with each; of each with itself it is 1, which says nothing."""
    assert tokenizer is not None
    tokens = tokenizer(case["texts"])
    outputs, _ = compare.run(model, _ids(model, tokens.input_ids, tokens.attention_mask), ())
    x = outputs["output"].astype(np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    i, j = np.triu_indices(len(x), 1)
    return np.inner(x, x)[i, j], [case["values"][a][b] for a, b in zip(i, j, strict=True)], 1.0


def _continuation(model: nn.Module, case: Case, tokenizer: Tokenizer | None) -> Values:
    """How far below the likeliest token each printed one is: 0 where the text is the same."""
    if "texts" in case:
        assert tokenizer is not None
        prompt, whole = (tokenizer(text).input_ids[0].tolist() for text in case["texts"])
    else:
        prompt, whole = case["prompt"], case["prompt"] + case["continuation"]
    if whole[: len(prompt)] != prompt:
        return np.zeros(0), [], 1.0
    ids = [whole[:-1]]
    outputs, _ = compare.run(model, _ids(model, ids, np.ones_like(ids)), ())
    logits = outputs["output"][0, len(prompt) - 1 :].astype(np.float64)  # (N, V)
    chosen = np.take_along_axis(logits, np.array(whole[len(prompt) :])[:, None], axis=-1)[:, 0]
    below = logits.max(axis=-1) - chosen
    return below, [Decimal(0)] * len(below), float(np.abs(logits).max())


CASES = {
    "hidden states": _hidden_states,
    "fill-mask": _fill_mask,
    "similarity": _similarity,
    "continuation": _continuation,
}


def _ids(model: nn.Module, ids: Any, mask: Any) -> dict[str, np.ndarray]:
    """The arguments of a network for texts."""
    inputs = {
        "input_ids": np.array(ids, np.int32),
        "attention_mask": np.array(mask, np.int32),
    }
    if hasattr(model.config, "type_vocab_size"):
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    return inputs
