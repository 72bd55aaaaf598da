"""Texts as examples: tokens and masks, tags of words, blocks of running text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_zoo import describe, registry
from mlx_zoo.describe import place_of
from mlx_zoo.preprocess.text import Tokenizer
from mlx_zoo.training.losses import IGNORED

MULTIPLE = 8  # rows are padded to: fewer shapes, for which a step is compiled
BLOCK = 512  # tokens, of running text, where the network has so many positions
PIECE = 1 << 16  # characters of a document that are made tokens of at a time
# A document can be cut after such a newline: no token of BERT or GPT-2 reaches over it.
SEAM = re.compile(r"(?<=\S\n)(?=\S)")
# Of masked language modelling (Devlin et al. 2018, section 3.1).
MASKED, HIDDEN, RANDOM = 0.15, 0.8, 0.1  # of the tokens; of those, as [MASK]; as any token


def tokenizer_of(model: nn.Module) -> Tokenizer:
    """The tokenizer that goes with the weights. ValueError for random ones: they have none."""
    if model.checkpoint is None:
        raise ValueError("this network has random weights: load it with pretrained=True")
    files = describe.companions(model.checkpoint, registry.of_model(model), place_of(model))
    return Tokenizer.from_files(files, max_positions=model.config.max_positions)


def length_of(model: nn.Module, max_length: int | None, usual: int | None) -> int:
    """How many tokens a row may have. ValueError for more than the network has positions."""
    most = model.config.max_positions
    if max_length is None:
        return min(usual or most, most)
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 3:
        raise ValueError(f"max_length={max_length!r}: a number of tokens, 3 or more, is needed")
    if max_length > most:
        raise ValueError(f"max_length={max_length}: the network has {most} positions")
    return max_length


@dataclass(frozen=True, eq=False)
class PrepareTexts:
    """Texts, or pairs -> input_ids, attention_mask[, token_type_ids], each (B, N) int32.

    What exceeds `max_length` is cut, a pair at its longer text.
    """

    tokenizer: Tokenizer
    max_length: int

    @classmethod
    def of(cls, model: nn.Module, max_length: int | None) -> PrepareTexts:
        tokenizer = tokenizer_of(model)
        tokenizer.backend.no_padding()
        length = length_of(model, max_length, tokenizer.max_length)
        tokenizer.backend.enable_truncation(length, direction=tokenizer.truncation_side)
        return cls(tokenizer, length)

    def __repr__(self) -> str:
        """What a digest takes of it."""
        vocabulary = sha256(self.tokenizer.backend.to_str().encode()).hexdigest()
        return f"{type(self).__name__}({vocabulary}, max_length={self.max_length})"

    @property
    def input_names(self) -> tuple[str, ...]:
        """In the order in which networks take them."""
        types = ("token_type_ids",) if "token_type_ids" in self.tokenizer.input_names else ()
        return ("input_ids", "attention_mask", *types)

    def __call__(
        self, texts: Sequence[Any], rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, ...]:
        """Raises ValueError for a text that has no tokens."""
        encoded = self.tokenizer.backend.encode_batch([*texts])
        if not all(map(len, encoded)):
            raise ValueError("an empty text has no tokens for this network")
        padding = {"input_ids": self.tokenizer.pad_token_id or 0}
        rows = {
            "input_ids": [e.ids for e in encoded],
            "attention_mask": [e.attention_mask for e in encoded],
            "token_type_ids": [e.type_ids for e in encoded],
        }
        return tuple(
            padded(rows[name], padding.get(name, 0), self.max_length) for name in self.input_names
        )


@dataclass(frozen=True, eq=False, repr=False)
class PrepareWords(PrepareTexts):
    """Words with tags -> the same of the words with blanks between, and where each has its tag.

    It is at the word's first token, as in BERT's paper; IGNORED elsewhere.
    """

    def __call__(
        self, texts: Sequence[Any], rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, ...]:
        return super().__call__([" ".join(words) for words in texts], rngs)

    def tags(self, texts: Sequence[Any], ids: Sequence[Sequence[int]]) -> np.ndarray:
        """The tags' ids, of each word -> of each token, (B, N) int32."""
        encoded = self.tokenizer.backend.encode_batch([" ".join(words) for words in texts])
        rows = []
        for words, own, encoding in zip(texts, ids, encoded, strict=True):
            ends = np.cumsum([len(word) + 1 for word in words])  # each with the blank after it
            row, seen = [], -1
            for (start, end), special in zip(
                encoding.offsets, encoding.special_tokens_mask, strict=True
            ):
                # GPT-2's tokens may begin with the blank before a word: the last letter tells.
                word = int(np.searchsorted(ends, end - 1, side="right"))
                first = not special and end > start and word > seen
                row.append(own[word] if first else IGNORED)
                seen = word if first else seen
            rows.append(row)
        return padded(rows, IGNORED, self.max_length)


@dataclass(frozen=True, eq=False, repr=False)
class PrepareBlocks(PrepareTexts):
    """Documents -> blocks of `max_length` tokens, one after the other; what is left over is not
    used, unless it is all. The end of a document is a token.
    """

    @classmethod
    def of(cls, model: nn.Module, max_length: int | None) -> PrepareBlocks:
        tokenizer = tokenizer_of(model)
        tokenizer.backend.no_padding()
        tokenizer.backend.no_truncation()
        return cls(tokenizer, length_of(model, max_length, BLOCK))

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """What stands before and after the tokens of a block."""
        return [], []

    @property
    def end(self) -> int | None:
        """What stands after a document."""
        return self.tokenizer.eos_token_id

    def blocks(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """(max_length,) int32 each; of a text that is too short, the only one is shorter."""
        before, after = self.frame
        room = self.max_length - len(before) - len(after)
        kept: list[int] = []
        whole = False
        for tokens in self.tokens(documents):
            kept += tokens
            full = len(kept) // room * room
            for start in range(0, full, room):
                whole = True
                yield np.array([*before, *kept[start : start + room], *after], np.int32)
            del kept[:full]
        if not whole and len(kept) > 1:
            yield np.array([*before, *kept, *after], np.int32)

    def tokens(self, documents: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of all documents, some at a time."""
        end = [] if self.end is None else [self.end]
        for document in documents:
            for piece in pieces(document):
                yield self.tokenizer.backend.encode(piece, add_special_tokens=False).ids
            yield end


@dataclass(frozen=True, eq=False, repr=False)
class PrepareNextTokens(PrepareBlocks):
    """Blocks -> input_ids (B, N). The target of a token is the next."""

    def __call__(
        self, texts: Sequence[Any], rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, ...]:
        ids = np.stack(texts)
        return ids, np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], IGNORED)], axis=1)


@dataclass(frozen=True, eq=False, repr=False)
class PrepareMasked(PrepareBlocks):
    """Blocks -> input_ids (B, N) with masks. The targets are the tokens that were there.

    The masks of a block are others each time that it is seen (Liu et al. 2019, arXiv:1907.11692).
    """

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        roles = (self.tokenizer.special_tokens.get(role) for role in ("cls_token", "sep_token"))
        before, after = ([i] if t and (i := self.tokenizer.token_to_id(t)) else [] for t in roles)
        return before, after

    @property
    def end(self) -> int | None:
        _, after = self.frame
        return after[0] if after else None

    @cached_property
    def special(self) -> np.ndarray:
        """The ids of tokens that are not hidden, and that nothing is replaced by."""
        found = map(self.tokenizer.token_to_id, self.tokenizer.special_tokens.values())
        return np.array(sorted({i for i in found if i is not None}), np.int32)

    @cached_property
    def words(self) -> np.ndarray:
        """The ids that a token may be replaced by."""
        return np.setdiff1d(np.arange(self.tokenizer.vocab_size, dtype=np.int32), self.special)

    def __call__(
        self, texts: Sequence[Any], rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, ...]:
        rows = [self.masked(block, rng) for block, rng in zip(texts, rngs, strict=True)]
        ids, targets = (np.stack(part) for part in zip(*rows, strict=True))
        return ids, targets

    def masked(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(what is seen, the targets), (N,) each: at least one token is asked for."""
        open_ = ~np.isin(ids, self.special)
        chosen = open_ & (rng.random(len(ids)) < MASKED)
        if not chosen.any() and open_.any():
            chosen[rng.choice(np.flatnonzero(open_))] = True
        fate = rng.random(len(ids))
        other = rng.choice(self.words, len(ids))
        mask = self.tokenizer.mask_token_id
        assert mask is not None
        seen = np.where(chosen & (fate < HIDDEN), mask, ids)
        seen = np.where(chosen & (fate >= HIDDEN) & (fate < HIDDEN + RANDOM), other, seen)
        return seen.astype(np.int32), np.where(chosen, ids, IGNORED).astype(np.int32)


def padded(rows: Sequence[Sequence[int]], padding: int, most: int) -> np.ndarray:
    """(B, N) int32, filled up on the right: N is a multiple of MULTIPLE, or `most`."""
    N = min(-(-max(map(len, rows)) // MULTIPLE) * MULTIPLE, most)
    return np.array([[*row, *[padding] * (N - len(row))] for row in rows], np.int32)


def pieces(document: str) -> Iterator[str]:
    """A document in parts whose tokens, one after the other, are its own."""
    start = 0
    while len(document) - start > PIECE:
        seam = SEAM.search(document, start + PIECE)
        if seam is None:
            break
        yield document[start : seam.start()]
        start = seam.start()
    yield document[start:]
