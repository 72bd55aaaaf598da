"""Twenty steps of training, ours and PyTorch's, on the same batches from the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import torch
from originals import randomise
from torch.nn import functional as F

from mlx_zoo import registry
from mlx_zoo.mapping import engine
from mlx_zoo.verify import reference

reference.import_torchvision()
import transformers  # noqa: E402

STEPS, BATCH, CLASSES = 20, 8, 10
# As in torch.optim: momentum and weight decay of all parameters, so that each is seen to work.
SGD = {"momentum": 0.9, "weight_decay": 1e-2}
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
OPTIMIZERS = ("sgd", "adamw")
# Learning rates of both, at which these networks learn two batches.
RATES = {
    "resnet": (0.01, 1e-3),
    "efficientnet": (0.1, 3e-3),
    "vit": (0.01, 1e-3),
    "bert": (0.01, 1e-3),
    "gpt2": (0.03, 3e-3),
}

TOKENS = {"vocab_size": 97, "num_labels": CLASSES, "bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
}
NETWORKS = tuple(RATES)


def pair(name: str) -> tuple[nn.Module, torch.nn.Module, int]:
    """A small network of the family, its original with the same weights, and the inputs' size."""
    architecture, size = registry.architectures()[name], 32
    match name:
        case "bert":
            config = transformers.BertConfig(
                **TOKENS,
                **NO_DROPOUT,
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=96,
                max_position_embeddings=32,
            )
            original = transformers.BertForSequenceClassification(config)
            own = architecture.read_config(config.to_dict())
            own = replace(own, task="text-classification", num_classes=CLASSES)
            dialect = "transformers"
        case "gpt2":
            config = transformers.GPT2Config(
                **TOKENS,
                n_embd=48,
                n_layer=2,
                n_head=4,
                n_positions=32,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
            original = transformers.GPT2LMHeadModel(config)
            own, dialect = architecture.read_config(config.to_dict()), "transformers"
        case _:
            digits = registry.find(f"{name}_digits")
            original, dialect = reference.create(digits.reference, digits.config), "timm"
            own = digits.config
            if name == "efficientnet":
                own = replace(own, dropout=0.0, drop_path=0.0)
    original = randomise(original)
    model = architecture.model(own)
    state = {name: mx.array(x.numpy()) for name, x in original.state_dict().items()}
    weights = engine.to_mlx(state, model, architecture.spec(dialect, own))
    model.load_weights(list(weights.items()))
    return model, original, size


def batches(name: str, model: nn.Module, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two batches by turns, which can be learnt by heart, as many times as there are steps.

    Inputs, and the class of each row; of GPT-2, the token after each.
    """
    rng = np.random.default_rng(0)
    few = [*itertools.islice(_drawn(rng, name, model, size), 2)]
    return itertools.islice(itertools.cycle(few), STEPS)


def _drawn(
    rng: np.random.Generator, name: str, model: nn.Module, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        if registry.of_model(model).inputs == "images":
            channels = getattr(model.config, "in_chans", 1)
            images = rng.standard_normal((BATCH, size, size, channels))
            yield images.astype(np.float32), rng.integers(0, CLASSES, BATCH)
        else:
            ids = rng.integers(1, model.config.vocab_size, (BATCH, size))
            following = np.roll(ids, -1, axis=1)
            yield ids, following if name == "gpt2" else rng.integers(0, CLASSES, BATCH)


def train(name: str, optimizer: str) -> dict[str, list[float]]:
    """The losses of each step: "mlx_zoo", "PyTorch float32" and "PyTorch float64"."""
    model, original, size = pair(name)
    given = [*batches(name, model, size)]
    rate = RATES[name][OPTIMIZERS.index(optimizer)]
    found = {"mlx_zoo": ours(model, given, optimizer, rate)}
    for precision in ("float32", "float64"):
        found[f"PyTorch {precision}"] = theirs(original, given, optimizer, rate, precision)
    return found


def ours(model: nn.Module, given: list[Any], optimizer: str, rate: float) -> list[float]:
    model.train()
    if optimizer == "sgd":
        update: optim.Optimizer = optim.SGD(rate, **SGD)
    else:
        update = optim.AdamW(rate, **ADAMW, bias_correction=True)  # off by default

    def loss(x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    step, losses = nn.value_and_grad(model, loss), []
    for x, y in given:
        value, gradients = step(mx.array(x), mx.array(y))
        update.update(model, gradients)
        mx.eval(model.state, update.state, value)
        losses.append(value.item())
    return losses


def theirs(
    original: torch.nn.Module, given: list[Any], optimizer: str, rate: float, precision: str
) -> list[float]:
    dtype = getattr(torch, precision)
    state = {name: x.clone() for name, x in original.state_dict().items()}
    original.to(dtype).train()
    if optimizer == "sgd":
        update: torch.optim.Optimizer = torch.optim.SGD(original.parameters(), rate, **SGD)
    else:
        update = torch.optim.AdamW(original.parameters(), rate, **ADAMW)
    losses = []
    for x, y in given:
        update.zero_grad()
        output = original(reference._tensor(x, dtype))
        logits = getattr(output, "logits", output)
        loss = F.cross_entropy(logits.flatten(0, -2), torch.from_numpy(y).flatten())
        loss.backward()
        update.step()
        losses.append(loss.item())
    original.float().load_state_dict(state)
    return losses


def apart(losses: dict[str, list[float]], one: str = "mlx_zoo") -> float:
    """How far the losses of `one` are from those in float64, at most, of the first loss."""
    truth = np.array(losses["PyTorch float64"])
    return float((np.abs(np.array(losses[one]) - truth) / truth).max())
