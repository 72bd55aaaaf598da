"""The example, shorter; and adapters of the bundled networks for texts, trained, saved, merged."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_zoo
from mlx_zoo.mapping import engine
from mlx_zoo.training import LoRA, load_adapter, merge_lora
from mlx_zoo.training.texts import tokenizer_of

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def letters():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import finetune_letters
    finally:
        sys.path.remove(str(EXAMPLES))
    return finetune_letters


# Letters ----------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_letters(letters, tmp_path):
    folders = [
        letters.write_letters(tmp_path / str(i), 2, seed) for i, seed in enumerate((3, 3, 4))
    ]
    drawn = [{p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*.png"))} for f in folders]
    assert len(drawn[0]) == 2 * 26
    assert drawn[0] == drawn[1]
    assert not drawn[0].items() & drawn[2].items()
    assert len(set(drawn[0].values())) == len(drawn[0])


def test_letters_are_learnt(letters, tmp_path):
    """A third of the example's drawings and epochs: of 26 letters, chance would find 4 %."""
    data, model = tmp_path / "data", None
    letters.write_letters(data / "train", 30, seed=0)
    letters.write_letters(data / "held out", 10, seed=1)
    result, _ = letters.learn("resnet_digits", data, "full", 5, tmp_path / "run")
    assert result.metrics["accuracy"] > 0.65
    model = mlx_zoo.load(f"local-dir:{tmp_path}/run/model", pretrained=True)
    assert model.checkpoint.labels == tuple(letters.LETTERS)
    images = [str(data / "held out" / letter / "000.png") for letter in letters.LETTERS]
    named = mlx_zoo.pipeline("image-classification", model)(images)
    right = sum(rows[0]["label"] == x for rows, x in zip(named, letters.LETTERS, strict=True))
    assert right >= 13


@pytest.mark.slow
def test_the_example_as_it_is_said(letters, tmp_path, capsys):
    accuracy = letters.run(tmp_path)
    full, head, scratch = accuracy.values()
    assert full > 0.93
    assert min(full, scratch) > 1.5 * head > 0.4
    assert "fine-tuned in full" in capsys.readouterr().out


# Texts ------------------------------------------------------------------------------------------

WORDS = [
    *("array", "value", "axis", "shape", "matrix", "index", "graph", "node", "edge", "input"),
    *("output", "file", "path", "string", "number", "function", "module", "class", "name", "list"),
]
KINDS = {
    "error": ("Raises ValueError if the {} is not a {}.", "An error is raised when {} has no {}."),
    "result": ("Returns the {} of the {}.", "The result is a {} with the same {}."),
    "advice": ("Use {} instead of {}.", "It is better to pass a {} than a {}."),
}


def sentences(count, seed):
    """(text, label) pairs: what a sentence of documentation is about."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        label = list(KINDS)[i % len(KINDS)]
        form = KINDS[label][random.integers(2)]
        found.append((form.format(*random.choice(WORDS, 2, replace=False)), label))
    return found


def test_lora_classifies_texts(tmp_path):
    train, held_out = sentences(96, seed=0), sentences(48, seed=1)
    result = mlx_zoo.finetune(
        "bert_docs",
        train,
        held_out,
        method=LoRA(rank=4, layers=("attn.*", "mlp.*")),
        output=tmp_path / "run",
        epochs=4,
        batch_size=16,
        learning_rate=5e-3,
    )
    assert result.metrics["accuracy"] > 0.9
    assert {part.name for part in result.trainable.parts if part.trainable} == {"head", "adapters"}
    assert result.trainable.percent < 12
    classify = mlx_zoo.pipeline("text-classification", result.model)
    assert classify("Returns the shape of the array.")[0]["label"] == "result"

    adapter = tmp_path / "run" / "adapter"
    size = (adapter / "adapter.safetensors").stat().st_size
    assert size < 0.2 * sum(x.nbytes for x in engine.parameters(result.model).values())
    ids = mx.array(np.random.default_rng(0).integers(5, 900, (3, 12)))
    logits = result.model(ids)
    again = load_adapter("bert_docs", adapter)
    assert mx.array_equal(again(ids), logits).item()
    assert again.checkpoint.labels == result.model.checkpoint.labels
    merged = merge_lora(again)
    assert (mx.abs(merged(ids) - logits).max() / mx.abs(logits).max()).item() < 5e-6
    folder = mlx_zoo.load(
        f"local-dir:{tmp_path}/run/model", pretrained=True, task="text-classification"
    )
    assert (mx.abs(folder(ids) - logits).max() / mx.abs(logits).max()).item() < 5e-6


def test_lora_lowers_the_perplexity_of_a_language_model(tmp_path):
    for name, seed in {"train": 0, "val": 1}.items():
        lines = (text for text, _ in sentences(300, seed))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = mlx_zoo.load("gpt2_docs", pretrained=True)
    before = {name: mx.array(x) for name, x in engine.parameters(base).items()}
    result = mlx_zoo.finetune(
        base,
        tmp_path / "train.txt",
        tmp_path / "val.txt",
        method="lora",
        output=tmp_path / "run",
        epochs=4,
        batch_size=8,
        max_length=64,
        learning_rate=5e-3,
        evaluate_every=1000,
    )
    first, last = perplexity(mlx_zoo.load("gpt2_docs", pretrained=True)), perplexity(result.model)
    assert last < 0.6 * first
    after = {n.replace(".linear.", "."): x for n, x in tree_flatten(result.model.parameters())}
    assert all(mx.array_equal(x.astype(mx.float32), after[n]).item() for n, x in before.items())
    again = load_adapter("gpt2_docs", tmp_path / "run" / "adapter", merge=True)
    assert perplexity(again) == pytest.approx(last, rel=1e-5)


def perplexity(model) -> float:
    """Of held-out sentences."""
    tokens = tokenizer_of(model)([text for text, _ in sentences(24, seed=2)])
    ids, seen = mx.array(tokens.input_ids), mx.array(tokens.attention_mask)[:, 1:]
    logits = model(ids, mx.array(tokens.attention_mask)).astype(mx.float32)[:, :-1]
    losses = nn.losses.cross_entropy(logits, ids[:, 1:]) * seen
    return mx.exp(losses.sum() / seen.sum()).item()
