"""Answers about texts."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo import describe, registry
from mlx_zoo.describe import Place
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.preprocess.sentence import read_sentence_config
from mlx_zoo.preprocess.text import Tokenizer
from mlx_zoo.tasks.batches import Advance, answers, batches, check_count, stacked
from mlx_zoo.tasks.labels import check_function, default_function, label_names, ranked, scores_of

if TYPE_CHECKING:
    from tokenizers import Encoding

log = logging.getLogger("mlx_zoo")

Answer = list[dict[str, Any]]
LOOK_AHEAD = 32  # batches: a window of a list, in which texts of like lengths are put together
ONE: Any = ...  # where no top_k is given: the best alone, not in a list


class Pair(NamedTuple):
    """Two texts that the network sees as one."""

    first: str
    second: str


Text = str | Pair
Piece = TypeVar("Piece", bound=Sized)  # the tokens that the network takes at a time


class Texts:
    """A network that takes tokens, and the tokenizer that goes with its weights."""

    task: str

    def __init__(self, model: nn.Module, place: Place):
        architecture = registry.of_model(model)
        if architecture.inputs != "tokens":
            raise ValueError(f"{self.task} needs a network that takes texts")
        if model.config.task != self.task:
            has = f"has the head of {model.config.task}" if model.config.task else "has no head"
            raise ValueError(f"this network {has}: load it with task={self.task!r}")
        if model.checkpoint is None:
            raise ValueError("this network has random weights: load it with pretrained=True")
        self.model = model
        self.files = describe.companions(model.checkpoint, architecture, place)
        limit = model.config.max_positions
        self.tokenizer = Tokenizer.from_files(self.files, max_positions=limit)
        taken = inspect.signature(type(model).__call__).parameters
        if odd := [name for name in self.tokenizer.input_names if name not in taken]:
            raise UnsupportedConfig(f"{odd[0]} is what the tokenizer gives, the network takes none")

    def encode(
        self,
        texts: Sequence[Text],
        *,
        truncation: bool | str = False,
        max_length: int | None = None,
        stride: int | None = None,
    ) -> list[list[Encoding]]:
        """For each text, the tokens of its pieces: of one, unless there is a `stride`.

        Args:
            truncation: whether what exceeds `max_length` is cut, a pair at its longer text; or
                which text of a pair is cut: "only_second".
            max_length: of a piece, special tokens included; None for the tokenizer's own limit.
            stride: how many tokens a piece shares with the one before it; None: the first is all.

        Raises ValueError for what is not text, has no tokens, or more than the network has places.
        """
        for text in texts:
            for part in text if isinstance(text, Pair) else [text]:
                check_text(part)
        limit = self.model.config.max_positions
        backend = self.tokenizer.backend
        cut: dict[str, Any] = {
            "max_length": max_length or self.tokenizer.max_length or limit,
            "stride": stride or 0,
            "strategy": "longest_first" if truncation is True else truncation,
            "direction": self.tokenizer.truncation_side,
        }
        # Nothing is changed that is right already: another thread may be decoding.
        if backend.padding:
            backend.no_padding()
        if truncation and backend.truncation != cut:
            backend.enable_truncation(**cut)
        elif not truncation and backend.truncation:
            backend.no_truncation()
        encoded = backend.encode_batch(list(texts))
        for text, encoding in zip(texts, encoded, strict=True):
            if not len(encoding):
                raise ValueError("an empty text has no tokens for this network")
            if len(encoding) > limit:
                raise ValueError(
                    f"{shortened(text)} has {len(encoding)} tokens, the network {limit} positions: "
                    "truncation=True cuts what is too long"
                )
        if stride is None:
            return [[first] for first in encoded]
        return [[first, *first.overflowing] for first in encoded]

    def arrays(self, pieces: Sequence[Encoding]) -> dict[str, mx.array]:
        """The arguments of the network, (B, N): shorter pieces are padded on their right."""
        N = max(map(len, pieces))
        sources = {
            "input_ids": ("ids", self.tokenizer.pad_token_id or 0),
            "attention_mask": ("attention_mask", 0),
            "token_type_ids": ("type_ids", 0),
        }
        found = {}
        # Padding needs a mask, even where the tokenizer's files do not speak of one.
        for name in {*self.tokenizer.input_names, "attention_mask"}:
            source, padding = sources[name]
            rows = [getattr(piece, source) for piece in pieces]
            found[name] = mx.array([row + [padding] * (N - len(row)) for row in rows])
        return found

    def run(
        self,
        inputs: Any,
        batch_size: int,
        encode: Callable[[Sequence[Any]], list[list[Piece]]],
        read: Callable[[Sequence[Piece]], Iterable[Any]],
        answer: Callable[[Any, list[Piece], list[Any]], Any],
    ) -> Any:
        """The answers to one input, to a list or tuple of them, or to an iterator.

        Args:
            encode: inputs -> the pieces of each.
            read: a batch of pieces -> what the network says of each.
            answer: an input, its pieces, and what the network says of them -> the answer.
        """

        def prepare(some: Sequence[Any]) -> tuple[Sequence[Any], list[list[Piece]]]:
            return some, encode(some)

        def work(prepared: tuple[Sequence[Any], list[list[Piece]]], advance: Advance) -> list[Any]:
            some, encoded = prepared
            places = [(i, n) for i, pieces in enumerate(encoded) for n in range(len(pieces))]
            # Like lengths together: less padding.
            places.sort(key=lambda place: len(encoded[place[0]][place[1]]), reverse=True)
            said: dict[tuple[int, int], Any] = {}
            for batch in batches(places, batch_size):
                said |= zip(batch, read([encoded[i][n] for i, n in batch]), strict=True)
                advance(sum(1 / len(encoded[i]) for i, _ in batch))
            return [
                answer(item, pieces, [said[i, n] for n in range(len(pieces))])
                for i, (item, pieces) in enumerate(zip(some, encoded, strict=True))
            ]

        return answers(inputs, prepare, work, batch_size, LOOK_AHEAD)


class FillMask(Texts):
    """Texts with a mask -> the likeliest tokens in its place."""

    task = "fill-mask"

    def __init__(self, model: nn.Module, place: Place):
        super().__init__(model, place)
        self.mask = self.tokenizer.mask_token_id
        if self.mask is None:
            raise ValueError("the tokenizer of this network has no mask token")

    def __call__(
        self,
        texts: Any,
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        truncation: bool = False,
        batch_size: int = 32,
    ) -> Any:
        """A text -> [{"score", "token", "token_str", "sequence"}, ...], best first.

        A text with several masks gives such a list for each. Of a list or an iterator of texts,
        a list or an iterator of these.

        Args:
            top_k: how many tokens.
            targets: the only tokens to choose from. One that the vocabulary lacks stands for the
                first that it is split into.
            truncation: whether what the network has no positions for is cut.

        Raises ValueError for a text without a mask, or one that is too long.
        """
        check_count("top_k", top_k)
        chosen = None if targets is None else self.target_ids(targets)

        def encode(some: Sequence[Any]) -> list[list[Encoding]]:
            encoded = self.encode(some, truncation=truncation)
            for text, (tokens,) in zip(some, encoded, strict=True):
                if self.mask not in tokens.ids:
                    name = self.tokenizer.mask_token
                    raise ValueError(f"{shortened(text)} has no {name} among its tokens")
            return encoded

        def read(pieces: Sequence[Encoding]) -> list[list[list[tuple[int, float]]]]:
            return self.candidates(pieces, top_k, chosen)

        def answer(text: str, pieces: list[Encoding], said: list[Any]) -> list[Any]:
            found = self.filled(pieces[0].ids, said[0])
            return found[0] if len(found) == 1 else found

        return self.run(texts, batch_size, encode, read, answer)

    def candidates(
        self, pieces: Sequence[Encoding], top_k: int, chosen: list[int] | None
    ) -> list[list[list[tuple[int, float]]]]:
        """Piece -> mask -> (token, score), best first."""
        masks = [
            (b, n) for b, p in enumerate(pieces) for n, i in enumerate(p.ids) if i == self.mask
        ]
        rows, columns = map(mx.array, zip(*masks, strict=True))
        x = self.model.encode(**self.arrays(pieces))[rows, columns]  # (masks, D)
        scores = scores_of(self.model.mlm(x, self.model.word_embed), "softmax")  # (masks, vocab)
        ids = np.arange(scores.shape[1]) if chosen is None else np.array(chosen)
        scores = scores[:, ids]
        found: list[list[list[tuple[int, float]]]] = [[] for _ in pieces]
        for (b, _), row in zip(masks, scores, strict=True):
            best = np.argsort(-row, kind="stable")[:top_k]
            found[b].append([(int(ids[i]), float(row[i])) for i in best])
        return found

    def filled(self, ids: list[int], said: list[list[tuple[int, float]]]) -> list[Answer]:
        """For each mask, each of its candidates in the text; the other masks stay as they are."""
        masks = [n for n, i in enumerate(ids) if i == self.mask]
        padding = self.tokenizer.pad_token_id  # the text itself may spell it
        found: list[Answer] = []
        for mask, candidates in zip(masks, said, strict=True):
            found.append([])
            for token, score in candidates:
                filled = [*ids[:mask], token, *ids[mask + 1 :]]
                sequence = self.tokenizer.decode(
                    [i for i in filled if i != padding], skip_special_tokens=len(masks) == 1
                )
                said_as = self.tokenizer.decode([token])
                found[-1].append(
                    {"score": score, "token": token, "token_str": said_as, "sequence": sequence}
                )
        return found

    def target_ids(self, targets: str | Sequence[str]) -> list[int]:
        """The ids of words, each once. Raises ValueError where there is none."""
        targets = [targets] if isinstance(targets, str) else targets
        ids: dict[int, str] = {}
        for target in targets:
            check_text(target)
            token = self.tokenizer.token_to_id(target)
            if token is None:
                pieces = self.tokenizer.backend.encode(target, add_special_tokens=False).ids
                if not pieces:
                    log.warning("targets: %r has no token and is left out", target)
                    continue
                token = pieces[0]
                known_as = self.tokenizer.id_to_token(token)
                log.warning("targets: %r is no token; %r is taken for it", target, known_as)
            ids[token] = target
        if not ids:
            raise ValueError(f"targets={targets!r}: none is a token of this network")
        return list(ids)


class TextClassification(Texts):
    """Texts, or pairs of texts -> labels with scores."""

    task = "text-classification"

    def __init__(self, model: nn.Module, place: Place):
        super().__init__(model, place)
        self.labels = label_names(model)
        self.function = default_function(model, self.files)

    def __call__(
        self,
        texts: Any,
        *,
        top_k: int | None = ONE,
        function_to_apply: str | None = None,
        truncation: bool = False,
        batch_size: int = 32,
    ) -> Any:
        """A text -> [{"label", "score"}]; a list of texts -> such a dict for each.

        Given a `top_k`, every text has a list, best first. An iterator of texts gives an iterator.

        Args:
            texts: str, or {"text": ..., "text_pair": ...}.
            top_k: how many labels; None for all.
            function_to_apply: "softmax", "sigmoid" or "none"; None for what the checkpoint says.
            truncation: whether what the network has no positions for is cut.

        Raises ValueError for what is not text, or too long.
        """
        check_function(function_to_apply)
        if top_k not in (None, ONE):
            check_count("top_k", top_k)

        def encode(some: Sequence[Any]) -> list[list[Encoding]]:
            return self.encode([pair_of(item) for item in some], truncation=truncation)

        def read(pieces: Sequence[Encoding]) -> np.ndarray:
            return scores_of(self.model(**self.arrays(pieces)), function_to_apply or self.function)

        def answer(item: Any, pieces: list[Encoding], said: list[np.ndarray]) -> Any:
            if top_k is ONE:
                return ranked(said[0], self.labels, 1)[0]
            return ranked(said[0], self.labels, top_k)

        found = self.run(texts, batch_size, encode, read, answer)
        return [found] if top_k is ONE and isinstance(texts, str) else found


class SentenceEmbedding(Texts):
    """Texts -> one vector each."""

    task = "sentence-embedding"

    def __init__(self, model: nn.Module, place: Place):
        super().__init__(model, place)
        sentence = read_sentence_config(self.files)
        self.prompt = sentence.prompts.get(sentence.default_prompt_name or "", "")
        if self.prompt and not sentence.include_prompt:
            raise UnsupportedConfig("include_prompt=false with a default prompt is not implemented")

    def __call__(self, texts: Any, *, batch_size: int = 32) -> np.ndarray | Iterator[np.ndarray]:
        """(B, D) float32 of a list; (D,) of one text; an iterator of (D,) of an iterator.

        What is longer than the checkpoint's own limit is cut, as sentence-transformers does.
        """

        def encode(some: Sequence[Any]) -> list[list[Encoding]]:
            prompted = [self.prompt + text if isinstance(text, str) else text for text in some]
            return self.encode(prompted, truncation=True)

        def read(pieces: Sequence[Encoding]) -> np.ndarray:
            return np.array(self.model(**self.arrays(pieces)).astype(mx.float32))

        def answer(text: str, pieces: list[Encoding], said: list[np.ndarray]) -> np.ndarray:
            return said[0]

        return stacked(self.run(texts, batch_size, encode, read, answer))


def check_text(text: Any) -> None:
    """Raise ValueError unless it is text that UTF-8 can spell."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.80} is {type(text).__name__}, where str belongs")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{shortened(text)} is not valid Unicode: {error}") from error


def shortened(text: Text) -> str:
    """The beginning of a text, for a message."""
    start = text if isinstance(text, str) else " ".join(text)
    return repr(start if len(start) <= 60 else f"{start[:60]}...")


def pair_of(item: Any) -> Text:
    """{"text": ..., "text_pair": ...} as a pair; a text as it is. ValueError for anything else."""
    if isinstance(item, Mapping) and {"text"} <= item.keys() <= {"text", "text_pair"}:
        pair = item.get("text_pair")
        return Pair(item["text"], pair) if pair else item["text"]  # an empty one is none
    if not isinstance(item, str):
        kind = type(item).__name__
        raise ValueError(f"{kind}: give text, or a pair as {{'text': ..., 'text_pair': ...}}")
    return item
