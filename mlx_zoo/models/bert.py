"""BERT: Pre-training of Deep Bidirectional Transformers (Devlin et al. 2018, arXiv:1810.04805).

One class with the heads of transformers' BertFor* classes. The blocks are post-norm: a residual
is normalised after it is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend import ops
from mlx_zoo.models.layers import (
    ACTIVATIONS,
    MLP,
    Attention,
    LayerNorm,
    as_array,
    causal,
    check_choice,
    check_count,
    check_integers,
    check_range,
    check_same_shape,
    check_tokens,
    check_transformer,
    hidden,
)

# Task -> the attributes of `Bert` that make its head.
HEADS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "sentence-embedding": (),
    "fill-mask": ("mlm",),
    "next-sentence-prediction": ("nsp",),
    "pretraining": ("mlm", "nsp"),
    "text-classification": ("classifier",),
    "token-classification": ("classifier",),
    "multiple-choice": ("classifier",),
    "question-answering": ("qa_outputs",),
}
POOLED = {"next-sentence-prediction", "pretraining", "text-classification", "multiple-choice"}
# How many outputs a head has, where the task says it. The two classifications count their labels.
FIXED_SIZES = {"next-sentence-prediction": 2, "question-answering": 2, "multiple-choice": 1}
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")


@dataclass(frozen=True)
class Dense:
    """A linear layer with an activation after the pooling of a sentence-transformer."""

    in_dims: int
    out_dims: int
    bias: bool = True
    act: str = "tanh"
    folder: str = ""  # of the repository, where its weights are


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int = 30522
    dims: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dims: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    padding_id: int | None = 0  # the token whose embedding is not learnt
    norm_eps: float = 1e-12
    act: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None  # as `dropout` where None
    causal: bool = False  # is_decoder
    tied: bool = True  # the word embeddings are the decoder of masked tokens
    pooler: bool = True  # a bare body may lack it
    task: str | None = None
    num_classes: int = 2
    # Sentence embeddings, as the checkpoint's own sentence-transformers files say.
    pooling: tuple[str, ...] = ("mean",)
    dense: tuple[Dense, ...] = ()
    normalize: bool = True

    def __post_init__(self):
        dense = tuple(d if isinstance(d, Dense) else Dense(**d) for d in self.dense)
        object.__setattr__(self, "dense", dense)
        if self.task not in HEADS:
            tasks = ", ".join(task for task in HEADS if task)
            raise ValueError(f"task={self.task!r}: BERT has {tasks}")
        check_transformer(self)
        for name in ("vocab_size", "max_positions"):
            check_count(name, getattr(self, name), 1)
        check_count("type_vocab_size", self.type_vocab_size, 1)
        for mode in self.pooling:
            check_choice("pooling", mode, POOLINGS)


BERTS = {
    "bert_base": BertConfig(),
    "bert_large": BertConfig(dims=1024, num_layers=24, num_heads=16, mlp_dims=4096),
}


class BertOutput(NamedTuple):
    last_hidden_state: mx.array  # (B, N, D)
    pooler_output: mx.array | None  # (B, D); None where the checkpoint has no pooler


class PretrainingOutput(NamedTuple):
    prediction_logits: mx.array  # (B, N, vocab)
    seq_relationship_logits: mx.array  # (B, 2)


class QuestionAnsweringOutput(NamedTuple):
    start_logits: mx.array  # (B, N)
    end_logits: mx.array  # (B, N)


class Block(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attn = Attention(config.dims, config.num_heads, config.attention_dropout)
        self.norm1 = LayerNorm(config.dims, config.norm_eps)
        self.mlp = MLP(config.dims, config.mlp_dims, config.act)
        self.norm2 = LayerNorm(config.dims, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class MaskedLM(nn.Module):
    """(B, N, D) -> logits (B, N, vocab), through the word embeddings where they are tied."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.act]
        self.dense = nn.Linear(config.dims, config.dims)
        self.norm = LayerNorm(config.dims, config.norm_eps)
        if config.tied:
            self.bias = mx.zeros(config.vocab_size)
        else:
            self.decoder = nn.Linear(config.dims, config.vocab_size)

    def __call__(self, x: mx.array, word_embed: nn.Embedding) -> mx.array:
        x = self.norm(self.act(self.dense(x)))
        return self.decoder(x) if "decoder" in self else word_embed.as_linear(x) + self.bias


class Bert(nn.Module):
    """input_ids (B, N) -> what `config.task` says.

    None                      BertOutput: .last_hidden_state (B, N, D), .pooler_output (B, D)
    sentence-embedding        (B, D)
    fill-mask                 logits (B, N, vocab)
    next-sentence-prediction  logits (B, 2)
    pretraining               PretrainingOutput
    text-classification       logits (B, num_classes)
    token-classification      logits (B, N, num_classes)
    multiple-choice           logits (B, choices), of inputs (B, choices, N)
    question-answering        QuestionAnsweringOutput
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embed = nn.Embedding(config.vocab_size, config.dims)
        self.position_embed = nn.Embedding(config.max_positions, config.dims)
        self.token_type_embed = nn.Embedding(config.type_vocab_size, config.dims)
        self.norm = LayerNorm(config.dims, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = [Block(config) for _ in range(config.num_layers)]
        self.dense = [nn.Linear(d.in_dims, d.out_dims, d.bias) for d in config.dense]
        self.config = config
        if config.pooler:
            self.pooler = nn.Linear(config.dims, config.dims)
        self.reset_head(config.num_classes)

    def __call__(
        self,
        input_ids: mx.array,
        attention_mask: mx.array | None = None,
        token_type_ids: mx.array | None = None,
    ):
        input_ids = as_array(input_ids, "input_ids")
        if attention_mask is not None:
            attention_mask = as_array(attention_mask, "attention_mask")
        if token_type_ids is not None:
            token_type_ids = as_array(token_type_ids, "token_type_ids")
        if self.config.task == "multiple-choice":
            return self.choose(input_ids, attention_mask, token_type_ids)
        x = self.encode(input_ids, attention_mask, token_type_ids)
        match self.config.task:
            case None:
                return BertOutput(x, self.pool(x) if self.config.pooler else None)
            case "sentence-embedding":
                return self.embed(x, attention_mask)
            case "fill-mask":
                return self.mlm(x, self.word_embed)
            case "next-sentence-prediction":
                return self.nsp(self.pool(x))
            case "pretraining":
                return PretrainingOutput(self.mlm(x, self.word_embed), self.nsp(self.pool(x)))
            case "text-classification":
                return self.classifier(self.head_dropout(self.pool(x)))
            case "token-classification":
                return self.classifier(self.head_dropout(x))
            case "question-answering":
                logits = self.qa_outputs(x)
                return QuestionAnsweringOutput(logits[..., 0], logits[..., 1])

    def encode(self, input_ids, attention_mask=None, token_type_ids=None) -> mx.array:
        """The last hidden state, (B, N, D)."""
        input_ids = as_array(input_ids, "input_ids")
        check_tokens(input_ids, self.config.vocab_size, self.config.max_positions)
        if token_type_ids is None:
            token_type_ids = mx.zeros_like(input_ids)
        else:
            token_type_ids = as_array(token_type_ids, "token_type_ids")
            check_same_shape(token_type_ids, input_ids, "token_type_ids")
            check_integers(token_type_ids, "token_type_ids")
            check_range(token_type_ids, self.config.type_vocab_size, "token type")
        x = self.word_embed(input_ids)
        if self.config.padding_id is not None:  # it learns as a word to be predicted alone
            is_padding = (input_ids == self.config.padding_id)[..., None]
            x = mx.where(is_padding, mx.stop_gradient(x), x)
        x = x + self.token_type_embed(token_type_ids)
        x = x + self.position_embed(mx.arange(input_ids.shape[1]))
        x = self.dropout(self.norm(x))

        mask = self.mask(input_ids, attention_mask, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def mask(self, input_ids, attention_mask, dtype: mx.Dtype) -> mx.array | None:
        """What is added to attention's scores, broadcasting to (B, heads, N, N)."""
        N = input_ids.shape[1]
        seen = causal(N, N) if self.config.causal else None
        if attention_mask is not None:
            attention_mask = as_array(attention_mask, "attention_mask")
            check_same_shape(attention_mask, input_ids, "attention_mask")
            keys = (attention_mask != 0)[:, None, None, :]
            seen = keys if seen is None else seen & keys
        return None if seen is None else hidden(seen, dtype)

    def pool(self, x: mx.array) -> mx.array:
        """The first token through the pooler, (B, D)."""
        return mx.tanh(self.pooler(x[:, 0]))

    def choose(self, input_ids, attention_mask=None, token_type_ids=None) -> mx.array:
        """Logits (B, choices) of inputs (B, choices, N)."""
        if input_ids.ndim != 3:
            shape = tuple(input_ids.shape)
            raise ValueError(f"input_ids of shape {shape}: multiple choice needs (B, choices, N)")
        flat = [None if a is None else a.flatten(0, 1) for a in (attention_mask, token_type_ids)]
        x = self.encode(input_ids.flatten(0, 1), *flat)
        logits = self.classifier(self.head_dropout(self.pool(x)))
        return logits.reshape(input_ids.shape[:2])

    def embed(self, x: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """Token vectors (B, N, D) -> sentence vectors, as sentence-transformers pools them."""
        seen = mx.ones(x.shape[:2]) if attention_mask is None else attention_mask
        dtype, x = x.dtype, ops.widened(x)  # sums and norms leave the range of half precision
        x = mx.concatenate([pool_tokens(x, seen, mode) for mode in self.config.pooling], axis=-1)
        for linear, dense in zip(self.dense, self.config.dense, strict=True):
            x = ACTIVATIONS[dense.act](linear(x))
        if self.config.normalize:
            x = x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return x.astype(dtype)

    def reset_head(self, num_classes: int | None = None, task: str | None = None) -> None:
        """A fresh head for `task` (the present one where None).

        `num_classes` counts the labels of the two classifications; the other heads know theirs.
        """
        task = task or self.config.task
        config = replace(self.config, task=task)  # refuses an unknown task
        if num_classes is not None:
            config = replace(config, num_classes=num_classes)
        if task in POOLED and "pooler" not in self:  # as fresh as the head
            self.pooler = nn.Linear(config.dims, config.dims)
            config = replace(config, pooler=True)
        if task not in POOLED | {None} and self.pop("pooler", None):
            config = replace(config, pooler=False)
        for name in {name for names in HEADS.values() for name in names}:
            self.pop(name, None)
        self.config = config
        p = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        self.head_dropout = nn.Dropout(p)
        for name in HEADS[task]:
            self[name] = self._head(name)
        for name in ("pooler", *HEADS[task]):
            if name in self:
                self[name].set_dtype(self.norm.weight.dtype)
        self.train(self.training)  # the new layers, too

    def _head(self, name: str) -> nn.Module:
        config = self.config
        if name == "mlm":
            return MaskedLM(config)
        two = FIXED_SIZES["next-sentence-prediction"]  # also of the pretraining head
        size = two if name == "nsp" else FIXED_SIZES.get(config.task or "", config.num_classes)
        return nn.Linear(config.dims, size)


def pool_tokens(x: mx.array, seen: mx.array, mode: str) -> mx.array:
    """Token vectors (B, N, D) -> (B, D). `seen` (B, N) is 1 where a token counts, else 0."""
    weights = (seen != 0).astype(x.dtype)[..., None]  # (B, N, 1)
    match mode:
        case "cls":
            first = (seen != 0).argmax(axis=1)  # the first real token of a left-padded batch
            return mx.take_along_axis(x, first[:, None, None], axis=1)[:, 0]
        case "max":
            return mx.where(weights > 0, x, mx.finfo(x.dtype).min).max(axis=1)
        case "mean":
            return (x * weights).sum(axis=1) / mx.maximum(weights.sum(axis=1), 1e-9)
        case "mean_sqrt_len":
            return (x * weights).sum(axis=1) / mx.sqrt(mx.maximum(weights.sum(axis=1), 1e-9))
        case "weightedmean":  # a token's weight is its position, from 1
            weights = weights * mx.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
            return (x * weights).sum(axis=1) / mx.maximum(weights.sum(axis=1), 1e-9)
        case "lasttoken":
            last = x.shape[1] - 1 - (seen != 0)[:, ::-1].argmax(axis=1)
            return mx.take_along_axis(x * weights, last[:, None, None], axis=1)[:, 0]
    raise ValueError(f"pooling={mode!r}: one of {', '.join(POOLINGS)} is needed")
