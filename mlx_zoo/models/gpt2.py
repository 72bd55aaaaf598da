"""GPT-2: Language Models are Unsupervised Multitask Learners (Radford et al. 2019).

One class with the heads of three of transformers' GPT2* classes. The blocks are pre-norm: a
residual is added to what was not normalised. The two embeddings keep the names of OpenAI's code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.models.layers import (
    MLP,
    Attention,
    LayerNorm,
    as_array,
    causal,
    check_count,
    check_same_shape,
    check_tokens,
    check_transformer,
    hidden,
)

# Task -> the attribute of `GPT2` that is its head.
HEADS: dict[str | None, str | None] = {
    None: None,
    "text-generation": "lm_head",
    "text-classification": "score",
    "token-classification": "classifier",
}


@dataclass(frozen=True)
class GPT2Config:
    vocab_size: int = 50257
    dims: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dims: int = 3072
    max_positions: int = 1024
    norm_eps: float = 1e-5
    act: str = "gelu_new"
    scale_attn_weights: bool = True  # scores by 1 / sqrt(dims of a head)
    scale_attn_by_inverse_layer_idx: bool = False  # and those of block i by 1 / (i + 1)
    dropout: float = 0.1  # of the residuals
    embed_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1  # token classification alone has it
    tied: bool = True  # the token embeddings are the lm_head
    task: str | None = "text-generation"
    num_classes: int = 2

    def __post_init__(self):
        if self.task not in HEADS:
            tasks = ", ".join(task for task in HEADS if task)
            raise ValueError(f"task={self.task!r}: GPT-2 has {tasks}")
        check_transformer(self)
        for name in ("vocab_size", "max_positions"):
            check_count(name, getattr(self, name), 1)

    def attention_scale(self, layer: int) -> float:
        """By what the attention scores of block `layer`, from 0, are multiplied."""
        scale = (self.dims // self.num_heads) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


GPT2S = {
    "gpt2": GPT2Config(),
    "gpt2_medium": GPT2Config(dims=1024, num_layers=24, num_heads=16, mlp_dims=4096),
    "gpt2_large": GPT2Config(dims=1280, num_layers=36, num_heads=20, mlp_dims=5120),
    "gpt2_xl": GPT2Config(dims=1600, num_layers=48, num_heads=25, mlp_dims=6400),
}


class LayerCache:
    """Keys and values of one block, (B, heads, capacity, D / heads), of which `length` are in use.

    Room is made once, and in steps where it does not suffice: writing a token moves no others.
    """

    STEP = 256

    def __init__(self, capacity: int = 0):
        self.capacity = capacity
        self.length = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Write the keys and values of N further tokens; those of all, (B, heads, length, ...)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys = self._with_room(self.keys, k)
        self.values = self._with_room(self.values, v)
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _with_room(self, old: mx.array | None, new: mx.array) -> mx.array:
        room = 0 if old is None else old.shape[2]
        if old is not None and self.length <= room:
            return old
        steps = -(-self.length // self.STEP) * self.STEP
        wanted = steps if self.length > self.capacity else self.capacity
        B, heads, _, dims = new.shape
        fresh = mx.zeros((B, heads, wanted - room, dims), new.dtype)
        return fresh if old is None else mx.concatenate([old, fresh], axis=2)


class KVCache:
    """What a GPT-2 keeps of the tokens it has seen: pass it as `cache=`, the network fills it.

    Args:
        config: of the network.
        capacity: how many tokens there is room for from the start (None: more is made in steps).
    """

    def __init__(self, config: GPT2Config, capacity: int | None = None):
        self.config = config
        self.layers = [LayerCache(capacity or 0) for _ in range(config.num_layers)]
        self.seen: mx.array | None = None  # (B, length), where there was a mask: 0 is padding

    @property
    def length(self) -> int:
        """How many tokens a row has, padding included."""
        return min(layer.length for layer in self.layers)

    def check_rows(self, B: int) -> None:
        """Raise ValueError unless it is empty, or of B rows."""
        keys = self.layers[0].keys
        if self.length and keys is not None and keys.shape[0] != B:
            raise ValueError(f"this cache is of {keys.shape[0]} rows: the tokens have {B}")

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
            if not length:  # the next rows may be more, or fewer
                layer.keys = layer.values = None
        if self.seen is not None:
            self.seen = self.seen[:, :length] if length else None

    def extend_mask(self, input_ids: mx.array, mask: mx.array | None) -> mx.array | None:
        """The mask of all tokens, (B, length + N), with that of N new ones; None: no padding."""
        self.trim(self.length)  # what a call left that was broken off
        if mask is None and self.seen is None:
            return None
        if self.seen is None:
            self.seen = mx.ones((input_ids.shape[0], self.length), mx.bool_)
        new = mx.ones(input_ids.shape, mx.bool_) if mask is None else mask != 0
        self.seen = mx.concatenate([self.seen, new], axis=1)
        return self.seen


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        scale = config.attention_scale(layer)
        self.norm1 = LayerNorm(config.dims, config.norm_eps)
        self.attn = Attention(config.dims, config.num_heads, config.attention_dropout, scale=scale)
        self.norm2 = LayerNorm(config.dims, config.norm_eps)
        self.mlp = MLP(config.dims, config.mlp_dims, config.act)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None, cache: LayerCache | None = None
    ) -> mx.array:
        x = x + self.dropout(self.attn(self.norm1(x), mask, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT2(nn.Module):
    """input_ids (B, N) -> what `config.task` says.

    text-generation       logits (B, N, vocab) of the token that follows each
    text-classification   logits (B, num_classes), at the last token that is no padding
    token-classification  logits (B, N, num_classes)
    None                  the last hidden state, (B, N, D)
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.dims)
        self.wpe = nn.Embedding(config.max_positions, config.dims)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.blocks = [Block(config, layer) for layer in range(config.num_layers)]
        self.norm = LayerNorm(config.dims, config.norm_eps)
        self.head_dropout = nn.Dropout(config.classifier_dropout)
        self.config = config
        self.reset_head(config.num_classes)

    def __call__(
        self,
        input_ids: mx.array,
        attention_mask: mx.array | None = None,
        cache: KVCache | None = None,
    ) -> mx.array:
        """`attention_mask` (B, N) is 0 where a token is padding, and otherwise 1.

        Given a `cache`, the N tokens follow those in it, of whose padding it knows. Padding on the
        left counts for no position. Raises ValueError where a token's id or position is none that
        the network has, or the cache is of other rows; nothing is written to it then.
        """
        if attention_mask is not None:
            attention_mask = as_array(attention_mask, "attention_mask")
        x = self.encode(input_ids, attention_mask, cache)
        match self.config.task:
            case "text-generation":
                return self.predict(x)
            case "text-classification":
                return last(self.score(x), attention_mask)
            case "token-classification":
                return self.classifier(self.head_dropout(x))
        return x

    def encode(self, input_ids, attention_mask=None, cache: KVCache | None = None) -> mx.array:
        """The last hidden state, (B, N, D)."""
        input_ids = as_array(input_ids, "input_ids")
        if attention_mask is not None:
            attention_mask = as_array(attention_mask, "attention_mask")
            check_same_shape(attention_mask, input_ids, "attention_mask")
        if cache is not None and not isinstance(cache, KVCache):
            raise ValueError(f"cache: {type(cache).__name__} is none; model.make_cache() makes one")
        if cache is not None and cache.config != self.config:
            raise ValueError("this cache is of a network with another config")
        past = cache.length if cache else 0
        check_tokens(input_ids, self.config.vocab_size, self.config.max_positions, past)
        if cache is not None:
            cache.check_rows(input_ids.shape[0])
        return self._encode(input_ids, attention_mask, cache)

    def _encode(self, input_ids, attention_mask, cache: KVCache | None) -> mx.array:
        """As `encode`. Nothing is checked: generated tokens need no look.

        A row without a position left, whose text has ended, may go on for its neighbours' sake.
        """
        N, past = input_ids.shape[1], cache.length if cache else 0
        positions = mx.arange(past, past + N)
        seen = cache.extend_mask(input_ids, attention_mask) if cache else attention_mask
        if seen is not None:
            real = mx.cumsum((seen != 0).astype(mx.int32), axis=1) > 0
            padding = (~real).sum(axis=1, keepdims=True)  # on the left
            positions = mx.clip(positions - padding, 0, self.config.max_positions - 1)  # (B, N)
        x = self.dropout(self.wte(input_ids) + self.wpe(positions))

        mask = causal_mask(N, past, seen, x.dtype)
        layers = cache.layers if cache else [None] * len(self.blocks)
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, mask, layer)
        return self.norm(x)

    def predict(self, x: mx.array) -> mx.array:
        """Hidden states (..., D) -> logits (..., vocab)."""
        return self.wte.as_linear(x) if self.config.tied else self.lm_head(x)

    def next_logits(self, input_ids, attention_mask=None, cache=None) -> mx.array:
        """Logits (B, vocab) of the token that follows the last one; nothing is checked."""
        return self.predict(self._encode(input_ids, attention_mask, cache)[:, -1])

    def make_cache(self, capacity: int | None = None) -> KVCache:
        """An empty cache for this network: `KVCache` says what `capacity` is."""
        return KVCache(self.config, capacity)

    def reset_head(self, num_classes: int | None = None, task: str | None = None) -> None:
        """A fresh head for `task` (the present one where None).

        `num_classes` counts the labels of the two classifications.
        """
        config = replace(self.config, task=task or self.config.task)  # refuses an unknown task
        if num_classes is not None:
            config = replace(config, num_classes=num_classes)
        for name in HEADS.values():
            self.pop(name, None)
        self.config = config
        match config.task:
            case "text-generation" if not config.tied:
                self.lm_head = nn.Linear(config.dims, config.vocab_size, bias=False)
            case "text-classification":
                self.score = nn.Linear(config.dims, config.num_classes, bias=False)
            case "token-classification":
                self.classifier = nn.Linear(config.dims, config.num_classes)
        if (name := HEADS[config.task]) in self:
            self[name].set_dtype(self.norm.weight.dtype)
        self.train(self.training)  # the new layer, too


def causal_mask(N: int, past: int, seen: mx.array | None, dtype: mx.Dtype) -> mx.array | str | None:
    """What is added to the scores of N tokens after `past` others, as (B, 1, N, past + N).

    `seen` (B, past + N) is 0 where a token is padding. Without it, a word that attention knows
    does, or None where each may see all.
    """
    if seen is None:
        return None if N == 1 else "causal"
    return hidden(causal(N, past + N) & (seen != 0)[:, None, None, :], dtype)


def last(x: mx.array, attention_mask: mx.array | None) -> mx.array:
    """(B, N, ...) -> (B, ...): the last token of each row that is no padding."""
    if attention_mask is None:
        return x[:, -1]
    index = x.shape[1] - 1 - (attention_mask != 0)[:, ::-1].argmax(axis=1)
    return mx.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
