"""Answers that are parts of a text: entities, and answers to questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo.describe import Place
from mlx_zoo.tasks.batches import check_count
from mlx_zoo.tasks.labels import label_names, scores_of
from mlx_zoo.tasks.texts import Pair, Texts, check_text, shortened

if TYPE_CHECKING:
    from tokenizers import Encoding

Entity = dict[str, Any]

STRATEGIES = ("none", "simple", "first", "average", "max")


class TokenClassification(Texts):
    """Texts -> their tokens with labels, or the entities that the tokens make up."""

    task = "token-classification"

    def __init__(self, model: nn.Module, place: Place):
        super().__init__(model, place)
        self.labels = label_names(model)

    def __call__(
        self,
        texts: Any,
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
        batch_size: int = 32,
    ) -> list[Entity] | list[list[Entity]] | Iterator[list[Entity]]:
        """A text -> its entities, in order; a list or an iterator of texts -> as many lists.

        Each is {"entity", "score", "index", "word", "start", "end"} of a token or, grouped,
        {"entity_group", "score", "word", "start", "end"}: characters `start` to `end` of the text.

        Args:
            aggregation_strategy: "none" for tokens; "simple" joins neighbours of one entity, B-
                beginning another. The rest do so with whole words, which have the label of their
                "first" token, of the one with the highest score ("max"), or of their "average".
            ignore_labels: which are left out.
            stride: texts that are longer than the network's limit are read in pieces that share so
                many tokens. Without it they are cut.

        Raises ValueError for what is not text, or an option that does not exist.
        """
        if aggregation_strategy not in STRATEGIES:
            choices = ", ".join(STRATEGIES)
            raise ValueError(f"aggregation_strategy={aggregation_strategy!r}: one of {choices}")
        if stride is not None:
            self.check_stride(stride, aggregation_strategy)

        def encode(some: Sequence[Any]) -> list[list[Encoding]]:
            return self.encode(some, truncation=True, stride=stride)

        def read(pieces: Sequence[Encoding]) -> list[np.ndarray]:
            scores = scores_of(self.model(**self.arrays(pieces)), "softmax")  # (B, N, C)
            return [row[: len(piece)] for row, piece in zip(scores, pieces, strict=True)]

        def answer(text: str, pieces: list[Encoding], said: list[np.ndarray]) -> list[Entity]:
            found = []
            for piece, scores in zip(pieces, said, strict=True):
                tokens = self.tokens(text, piece, scores)
                entities = self.aggregate(tokens, aggregation_strategy)
                found += [e for e in entities if _label(e) not in ignore_labels]
            return found if len(pieces) == 1 else without_overlaps(found)

        return self.run(texts, batch_size, encode, read, answer)

    def check_stride(self, stride: int, strategy: str) -> None:
        if strategy == "none":
            raise ValueError(f"stride={stride} needs another aggregation_strategy than 'none'")
        limit = self.tokenizer.max_length or self.model.config.max_positions
        room = limit - self.tokenizer.backend.num_special_tokens_to_add(False)
        if not isinstance(stride, int) or not 0 <= stride < room:
            raise ValueError(f"stride={stride!r}: from 0 to {room - 1} tokens can be shared")

    def tokens(self, text: str, piece: Encoding, scores: np.ndarray) -> list[Entity]:
        """The tokens of a piece that stand for text, with their scores (C,)."""
        # WordPiece marks what continues a word. Other vocabularies do not, and blanks must tell.
        marks_words = bool(getattr(self.tokenizer.backend.model, "continuing_subword_prefix", None))
        unknown = self.tokenizer.special_tokens.get("unk_token")
        found = []
        for index, token in enumerate(piece.ids):
            if piece.special_tokens_mask[index]:
                continue
            word = self.tokenizer.id_to_token(token)
            start, end = piece.offsets[index]
            if marks_words:
                continues = len(word) != end - start
            else:
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            if word == unknown:
                word, continues = text[start:end], False
            found.append(
                {
                    "word": word,
                    "scores": scores[index],
                    "start": start,
                    "end": end,
                    "index": index,
                    "continues": continues,
                }
            )
        return found

    def aggregate(self, tokens: list[Entity], strategy: str) -> list[Entity]:
        """Tokens as entities, or as groups of entities; those of every label."""
        if strategy in ("none", "simple"):
            entities = [self.labelled(token, token["scores"], token["word"]) for token in tokens]
            if strategy == "none":
                fields = ("entity", "score", "index", "word", "start", "end")
                return [{name: entity[name] for name in fields} for entity in entities]
        else:
            entities = [self.word(word, strategy) for word in _words(tokens)]
        return [self.group(group) for group in _groups(entities)]

    def labelled(self, token: Entity, scores: np.ndarray, word: str) -> Entity:
        best = int(scores.argmax())
        return {**token, "entity": self.labels[best], "score": float(scores[best]), "word": word}

    def word(self, tokens: list[Entity], strategy: str) -> Entity:
        """The tokens of a word as one."""
        match strategy:
            case "first":
                scores = tokens[0]["scores"]
            case "max":
                scores = max((token["scores"] for token in tokens), key=np.max)
            case _:
                scores = np.mean([token["scores"] for token in tokens], axis=0)
        whole = {"start": tokens[0]["start"], "end": tokens[-1]["end"]}
        return self.labelled(whole, scores, self.joined(tokens))

    def group(self, entities: list[Entity]) -> Entity:
        """Neighbours of one entity as one; its name is without B- or I-."""
        return {
            "entity_group": entities[0]["entity"].split("-", 1)[-1],
            "score": float(np.mean([entity["score"] for entity in entities])),
            "word": self.joined(entities),
            "start": entities[0]["start"],
            "end": entities[-1]["end"],
        }

    def joined(self, entities: list[Entity]) -> str:
        words = [entity["word"] for entity in entities]
        decoder = self.tokenizer.backend.decoder
        return " ".join(words) if decoder is None else decoder.decode(words)


def _label(entity: Entity) -> str:
    return entity["entity_group"] if "entity_group" in entity else entity["entity"]


def _words(tokens: list[Entity]) -> list[list[Entity]]:
    """Tokens -> those of each word."""
    words: list[list[Entity]] = []
    for token in tokens:
        if words and token["continues"]:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _groups(entities: list[Entity]) -> list[list[Entity]]:
    """Runs of one tag. B- begins another; a label without B- or I- is as if it had I-."""
    groups: list[list[Entity]] = []
    for entity in entities:
        begins, tag = _tag(entity["entity"])
        if groups and not begins and tag == _tag(groups[-1][-1]["entity"])[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and which it is."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def without_overlaps(entities: list[Entity]) -> list[Entity]:
    """Of entities that overlap, where pieces of a text did, the longest; then the likeliest."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if not kept or entity["start"] >= kept[-1]["end"]:
            kept.append(entity)
        elif _weight(entity) > _weight(kept[-1]):
            kept[-1] = entity
    return kept


def _weight(entity: Entity) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]


class QuestionAnswering(Texts):
    """A question and a context -> the part of the context that answers it.

    The rule is that of transformers 4's pipeline (5 has none).
    """

    task = "question-answering"

    def __call__(
        self,
        inputs: Any = None,
        *,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        top_k: int = 1,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        batch_size: int = 32,
    ) -> Any:
        """{"question", "context"} -> {"score", "start", "end", "answer"}.

        `start` and `end` are characters of the context. A list or an iterator of such dicts gives a
        list or an iterator of answers; with a `top_k` above 1 each of them is a list, best first.

        Args:
            question, context: instead of `inputs`; lists of both, or of questions on one context.
            top_k: how many answers.
            max_answer_len: in tokens.
            handle_impossible_answer: whether "" may be an answer: there is none.
            align_to_words: whether an answer begins and ends with a whole word.
            max_seq_len: a longer context is read in pieces of that many tokens, the question
                included; None for 384, or the tokenizer's limit where that is less.
            doc_stride: how many tokens pieces share; None for 128, or half a piece if that is less.

        Raises ValueError for an empty text, or a question that leaves no room for the context.
        """
        check_count("top_k", top_k)
        check_count("max_answer_len", max_answer_len)
        if max_seq_len is not None:
            check_count("max_seq_len", max_seq_len)
        limit = self.model.config.max_positions
        length = min(max_seq_len or 384, self.tokenizer.max_length or limit, limit)
        if doc_stride is None:
            doc_stride = min(length // 2, 128)
        if not isinstance(doc_stride, int) or doc_stride < 0:
            raise ValueError(f"doc_stride={doc_stride!r}: a number of tokens is needed")

        def encode(some: Sequence[Any]) -> list[list[Encoding]]:
            pairs = [_question(item) for item in some]
            self.check_room(pairs, length, doc_stride)
            return self.encode(
                pairs, truncation="only_second", max_length=length, stride=doc_stride
            )

        def read(pieces: Sequence[Encoding]) -> list[np.ndarray]:
            output = self.model(**self.arrays(pieces))
            logits = np.array(mx.stack(output, axis=-1).astype(mx.float32))  # (B, N, 2)
            return [row[: len(piece)] for row, piece in zip(logits, pieces, strict=True)]

        def answer(item: Any, pieces: list[Encoding], said: list[np.ndarray]) -> Any:
            context = _question(item)[1]
            best = Answers(context, align_to_words)
            for piece, logits in zip(pieces, said, strict=True):
                # Answers may turn out to be the same, once they are whole words.
                num_spans = 2 * top_k + 10 if align_to_words else top_k
                spans, nothing = best_spans(piece, logits, num_spans, max_answer_len)
                best.add(piece, spans, nothing)
            found = best.ranked(top_k, handle_impossible_answer)
            return found[0] if top_k == 1 else found

        given = _questions(inputs, question, context)
        return self.run(given, batch_size, encode, read, answer)

    def check_room(self, pairs: list[Pair], length: int, stride: int) -> None:
        """Raise ValueError where a question leaves no room for a context and what pieces share."""
        backend = self.tokenizer.backend
        backend.no_truncation()
        room = length - backend.num_special_tokens_to_add(True)
        for question in {question for question, _ in pairs}:
            tokens = len(backend.encode(question, add_special_tokens=False))
            if tokens + stride >= room:
                raise ValueError(
                    f"{shortened(question)} has {tokens} tokens, which leaves {room - tokens} of "
                    f"max_seq_len={length} for the context: more than doc_stride={stride}, which "
                    "pieces of it share, are needed"
                )


class Answers:
    """The answers that a context has to a question; what differs by case alone is one."""

    def __init__(self, context: str, align_to_words: bool):
        self.context = context
        self.align_to_words = align_to_words
        self.found: dict[str, dict[str, Any]] = {}
        self.nothing = np.inf  # the score of there being no answer

    def add(self, piece: Encoding, spans: list[tuple[int, int, float]], nothing: float) -> None:
        """What a piece of the context says: spans of tokens with scores, and the score of none."""
        self.nothing = min(self.nothing, nothing)
        for first, last, score in spans:
            start, end = self.characters(piece, first)[0], self.characters(piece, last)[1]
            answer = self.context[start:end]
            new = {"score": 0.0, "start": start, "end": end, "answer": answer}
            self.found.setdefault(answer.lower(), new)["score"] += score

    def characters(self, piece: Encoding, token: int) -> tuple[int, int]:
        """Where a token, or the word that it belongs to, begins and ends in the context."""
        word = piece.token_to_word(token) if self.align_to_words else None
        whole = None if word is None else piece.word_to_chars(word, sequence_index=1)
        return whole or piece.offsets[token]

    def ranked(self, top_k: int, handle_impossible_answer: bool) -> list[dict[str, Any]]:
        """The `top_k` best; "" with the score 0 where there is none at all."""
        found = [*self.found.values()]
        if handle_impossible_answer:
            found.append({"score": self.nothing, "start": 0, "end": 0, "answer": ""})
        found.sort(key=lambda answer: answer["score"], reverse=True)
        return found[:top_k] or [{"score": 0.0, "start": 0, "end": 0, "answer": ""}]


def best_spans(
    piece: Encoding, logits: np.ndarray, top_k: int, max_length: int
) -> tuple[list[tuple[int, int, float]], float]:
    """The likeliest (first token, last token, score) in the context, and the score of no answer.

    `logits` (N, 2) are of beginning and of ending at a token. The probabilities are over the tokens
    of the context and the first token of all, which stands for no answer.
    """
    context = np.array([sequence == 1 for sequence in piece.sequence_ids])
    possible = context.copy()
    possible[0] = True
    logits = np.where(possible[:, None], logits.astype(np.float64), -np.inf)
    odds = np.exp(logits - logits.max(axis=0))
    odds /= odds.sum(axis=0)
    starts, ends = odds[:, 0], odds[:, 1]
    nothing = float(starts[0] * ends[0])

    # An answer ends where it begins or later, but not too late.
    allowed = np.tril(np.triu(np.outer(context, context)), max_length - 1)
    scores = np.where(allowed, np.outer(starts, ends), -1.0)
    order = np.argsort(-scores, axis=None, kind="stable")[: min(top_k, int(allowed.sum()))]
    pairs = zip(*np.unravel_index(order, scores.shape), strict=True)
    return [(int(i), int(j), float(scores[i, j])) for i, j in pairs], nothing


def _question(item: Any) -> Pair:
    """The question and its context. Raises ValueError where one is missing, empty or no text."""
    if not isinstance(item, Mapping) or item.keys() != {"question", "context"}:
        raise ValueError(f"{item!r:.80}: {{'question': ..., 'context': ...}} is needed")
    for name, text in item.items():
        check_text(text)
        if not text:
            raise ValueError(f"an empty {name}")
    return Pair(item["question"], item["context"])


def _questions(inputs: Any, question: Any, context: Any) -> Any:
    """However they were given, as one dict, or as many."""
    if (inputs is None) == (question is None and context is None):
        raise ValueError("give either question= and context=, or dicts of both")
    if inputs is not None:
        return inputs
    if isinstance(question, str) or question is None:
        return {"question": question, "context": context}
    contexts = [context] * len(question) if isinstance(context, str) else context
    if contexts is None or len(contexts) != len(question):
        raise ValueError(f"{len(question)} questions need a context each, or one for all")
    return [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]
