"""Text from a language model, token by token: how each is chosen, when it ends, what is kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_zoo import describe, registry
from mlx_zoo.backend.inference import original_of
from mlx_zoo.backend.transposed import for_rows
from mlx_zoo.catalogue import Checkpoint
from mlx_zoo.describe import Place
from mlx_zoo.errors import CheckpointError, UnsupportedFormat
from mlx_zoo.hub import cache as files
from mlx_zoo.hub.safetensors_header import read_header
from mlx_zoo.preprocess.text import TextStream, Tokenizer, end_ids
from mlx_zoo.tasks.texts import Texts, check_text, shortened

MAX_TOKENS = 256  # of a text, where nothing else is asked for
FORMAT = "1"  # of a saved prompt cache


class Token(NamedTuple):
    """A generated token, and the text that it completes."""

    token: int
    text: str


class Completion(NamedTuple):
    """What follows a prompt. A token that ends the text is among the tokens, not in the text."""

    tokens: list[int]
    text: str


def generate(
    model: nn.Module,
    prompt: str | Sequence[int],
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | int | Iterable[str | int] = (),
    seed: int | None = None,
    cache: PromptCache | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Token]:
    """Continue a text, token by token.

    It ends after `max_tokens`, at a token that ends texts according to the checkpoint's own
    generation_config.json or config.json, or as `stop` says.

    Args:
        model: a network loaded for text-generation.
        prompt: a text, or the ids of its tokens, for which no tokenizer is needed. An empty text
            is the token that begins texts.
        max_tokens: how many at most. None: 256, or as many as there are positions left.
        temperature: what the logits are divided by; 0 always takes the likeliest token, and the
            three that follow are without effect.
        top_k: choose among the k likeliest tokens (0: all),
        top_p: of these, the fewest that hold this share of the probability (1.0: all),
        min_p: of these, the ones at least this share as likely as the likeliest (0.0: all).
        repetition_penalty: above 1, tokens of the prompt and of the text become less likely (Keskar
            et al. 2019, arXiv:1909.05858, section 4.1).
        stop: texts and ids of tokens that end it as well. The text of a stop is not given.
        seed: of the choice; None uses mx.random's own state.
        cache: what was read before; the part that the prompt begins with is not read again.
        tokenizer: instead of the checkpoint's own.

    Returns:
        An iterator over tokens, each with its `.token` (id) and `.text`. The text comes with the
        token that completes it: '' while a character of several bytes, or what may become a stop,
        is still open. All texts together are the whole one.

    Raises:
        ValueError: at once, for a wrong argument, or where the prompt and `max_tokens` need more
            positions than the network has; later, where another text was begun with the cache.
        MLXZooError: the checkpoint's tokenizer cannot be read.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_model(model)
    tokenizer, ends = _language(model, tokenizer)
    stops = Stops.of(stop, ends, tokenizer)
    ids = _ids(prompt, model, tokenizer)
    count = _room(prompt, len(ids), max_tokens, model)
    if cache is None:
        cache = PromptCache(model, capacity=len(ids) + count)
    elif cache.model is not model:
        raise ValueError("this cache is of another network")
    writer = Writer(count, stops, tokenizer)
    return _generate(model, ids, sampling, _key(seed), cache, writer)


def generate_batch(
    model: nn.Module,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | int | Iterable[str | int] = (),
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Continue several texts at once, as `generate` does one; shorter prompts are padded.

    What a prompt gives does not depend on its neighbours, but for chance where temperature > 0.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_model(model)
    tokenizer, ends = _language(model, tokenizer)
    stops = Stops.of(stop, ends, tokenizer)
    given = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else []
    if not given:
        raise ValueError("prompts must be a list of at least one")
    rows = [_ids(prompt, model, tokenizer) for prompt in given]
    counts = [
        _room(prompt, len(row), max_tokens, model) for prompt, row in zip(given, rows, strict=True)
    ]
    count = max(counts)
    cache = model.make_cache(max(map(len, rows)) + count)
    writers = [Writer(count, stops, tokenizer) for count in counts]
    network = for_rows(model, len(rows), ("wte",) if model.config.tied else ())
    for tokens in _steps(network, rows, count, sampling, _key(seed), cache):
        for writer, token in zip(writers, tokens, strict=True):
            if not writer.ended:
                writer.push(token)
        if all(writer.ended for writer in writers):
            break
    return [Completion(writer.tokens, "".join(writer.texts)) for writer in writers]


class PromptCache:
    """What a network keeps of one text that it has read, so as not to read it again.

    `generate(model, prompt, cache=cache)` fills it, and a later prompt that begins alike is faster.
    The network may not change meanwhile.

    Args:
        model: a network loaded for text-generation.
        capacity: how many tokens there is room for from the start.
    """

    def __init__(self, model: nn.Module, capacity: int | None = None):
        _check_model(model)
        self.model = model
        self.states = model.make_cache(capacity)
        self.tokens: list[int] = []  # those of which the states are

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, from which `load` makes the cache again, for this network."""
        arrays = {"tokens": mx.array(self.tokens, mx.int32)}
        for i, layer in enumerate(self.states.layers if self.tokens else ()):
            arrays[f"layers.{i}.keys"] = layer.keys[:, :, : len(self.tokens)]
            arrays[f"layers.{i}.values"] = layer.values[:, :, : len(self.tokens)]
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = files.working_folder(target.parent)
        metadata = {"prompt_cache": FORMAT, "network": fingerprint(self.model)}
        try:
            files.save(work / "cache.safetensors", arrays, metadata)
            (work / "cache.safetensors").replace(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> PromptCache:
        """What `save` wrote for the same network.

        Raises CheckpointError where it is another network's, or the file is something else.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        header = read_header(path)
        if header.metadata.get("prompt_cache") != FORMAT:
            raise CheckpointError(f"{path} is no prompt cache that is read here")
        if header.metadata.get("network") != fingerprint(model):
            raise CheckpointError(f"{path} is the prompt cache of another network: make a new one")
        config, cache = model.config, cls(model)
        arrays: Any = mx.load(str(path))
        tokens = arrays.pop("tokens", None)
        length = -1 if tokens is None else tokens.size
        shape = (1, config.num_heads, length, config.dims // config.num_heads)
        wanted = {f"layers.{i}.{kind}" for i in range(config.num_layers) for kind in KINDS}
        if arrays.keys() != (wanted if length else set()) or not all(
            x.shape == shape for x in arrays.values()
        ):
            raise CheckpointError(f"{path} is damaged: make a new prompt cache")
        cache.tokens = tokens.tolist()
        for i, layer in enumerate(cache.states.layers if length else ()):
            layer.update(*(arrays[f"layers.{i}.{kind}"] for kind in KINDS))
        mx.eval(arrays)
        return cache


KINDS = ("keys", "values")


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that tell networks apart: by config, and by the first values of every tensor.

    Training moves them all; two checkpoints of one config differ in them.
    """
    model = original_of(model)  # an optimised one's layers are fused, and its states the same
    parameters: Any = sorted(tree_flatten(model.parameters()))
    first = mx.concatenate([x.reshape(-1)[:16].astype(mx.float32) for _, x in parameters])
    text = json.dumps([asdict(model.config), [name for name, _ in parameters]], sort_keys=True)
    return sha256(text.encode() + np.array(first).tobytes()).hexdigest()[:16]


# Choosing tokens --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: `generate` says what the numbers mean."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        numbers = {name: x for name, x in vars(self).items() if name != "top_k"}
        for name, x in numbers.items():
            if isinstance(x, bool) or not isinstance(x, Real):
                raise ValueError(f"{name}={x!r}: a number is needed")
        wrong = {
            "temperature": not 0 <= self.temperature < float("inf"),
            "top_k": isinstance(self.top_k, bool)
            or not isinstance(self.top_k, int)
            or self.top_k < 0,
            "top_p": not 0 < self.top_p <= 1,
            "min_p": not 0 <= self.min_p <= 1,
            "repetition_penalty": not 0 < self.repetition_penalty < float("inf"),
        }
        needed = {
            "temperature": "a number from 0",
            "top_k": "a whole number from 0",
            "top_p": "a share above 0 and up to 1",
            "min_p": "a share from 0 to 1",
            "repetition_penalty": "a number above 0",
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise ValueError(f"{name}={getattr(self, name)!r}: {needed[name]} is needed")

    def penalised(self, logits: mx.array, used: mx.array | None) -> mx.array:
        """`logits` (B, vocab) with those of `used` tokens (B, vocab) lowered."""
        if used is None:
            return logits
        penalty = self.repetition_penalty
        lowered = mx.where(logits < 0, logits * penalty, logits / penalty)
        return mx.where(used, lowered, logits)

    def filtered(self, logits: mx.array) -> mx.array:
        """`logits` (B, vocab) over the temperature, -inf where a token is out of the question.

        The order is that of transformers: each filter sees the probabilities that the last leaves.
        """
        logits = logits / max(self.temperature, 1e-30)  # below, float32 has no room
        if 0 < self.top_k < logits.shape[-1]:
            least = mx.topk(logits, self.top_k, axis=-1).min(axis=-1, keepdims=True)
            logits = mx.where(logits < least, -mx.inf, logits)
        if self.top_p < 1:  # the tail of which the sum is at most 1 - top_p goes
            order = mx.argsort(logits, axis=-1)
            tail = mx.cumsum(
                mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1
            )
            tail[:, -1] = 2  # the likeliest stays, however small top_p is
            kept = mx.put_along_axis(mx.zeros_like(tail), order, tail, axis=-1) > 1 - self.top_p
            logits = mx.where(kept, logits, -mx.inf)
        if self.min_p > 0:
            probs = mx.softmax(logits, axis=-1)
            kept = probs >= self.min_p * probs.max(axis=-1, keepdims=True)
            logits = mx.where(kept, logits, -mx.inf)
        return logits

    def choose(self, logits: mx.array, used: mx.array | None, key: mx.array | None) -> mx.array:
        """Logits (B, vocab) -> the ids of the chosen tokens, (B,)."""
        logits = self.penalised(logits.astype(mx.float32), used)
        if self.temperature == 0:
            return logits.argmax(axis=-1)
        return mx.random.categorical(self.filtered(logits), key=key)


def _key(seed: int | None) -> mx.array | None:
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r}: a whole number from 0, below 2**64, is needed")
    return mx.random.key(seed)


def _steps(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    key: mx.array | None,
    cache: Any,
    prefix: Sequence[int] = (),
) -> Iterator[list[int]]:
    """`count` times the next token of every row; `prefix` is what the cache has of them.

    On a GPU, while a token is on its way to the caller, the one after it is being computed.
    """
    cache.check_rows(len(rows))
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros_like(ids)
    counts = sampling.repetition_penalty != 1
    present = np.zeros((len(rows), model.config.vocab_size if counts else 0), bool)
    for b, row in enumerate(rows):
        ids[b, longest - len(row) :] = row
        mask[b, longest - len(row) :] = 1
        if counts:
            present[b, [*prefix, *row]] = True
    used = mx.array(present) if counts else None

    def step(ids: mx.array, mask: mx.array | None) -> mx.array:
        nonlocal key, used
        now = None
        if key is not None:
            key, now = mx.random.split(key)
        tokens = sampling.choose(model.next_logits(ids, mask, cache), used, now)
        if used is not None:
            used = mx.put_along_axis(used, tokens[:, None], mx.array(True), axis=1)
        mx.async_eval(tokens)
        return tokens

    tokens = step(mx.array(ids), None if mask.all() else mx.array(mask))
    ahead = mx.default_device() != mx.cpu  # where kernels compute while a step is being built
    for _ in range(count - 1):
        following = step(tokens[:, None], None) if ahead else None
        yield np.array(tokens).tolist()
        tokens = step(tokens[:, None], None) if following is None else following
    yield np.array(tokens).tolist()


def _generate(
    model: nn.Module,
    ids: list[int],
    sampling: Sampling,
    key: mx.array | None,
    cache: PromptCache,
    writer: Writer,
) -> Iterator[Token]:
    known = _num_alike(cache.tokens, ids[:-1])  # the last one is read for what follows it
    cache.states.trim(known)
    # True whenever the caller has the word, who may never come back; a new list for every text.
    read = cache.tokens = ids[:known]
    steps = _steps(model, [ids[known:]], writer.count, sampling, key, cache.states, ids[:known])
    for (token,) in steps:
        text = writer.push(token)
        read[:] = [*ids, *writer.tokens][: cache.states.length]
        yield Token(token, text)
        if writer.ended:
            return
        if cache.tokens is not read:
            raise ValueError("another text was begun with this cache: the first cannot go on")


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


# Ending and writing -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stops:
    """What ends a text: tokens, and texts."""

    ids: frozenset[int]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, stop: Any, ends: Iterable[int], tokenizer: Tokenizer | None) -> Stops:
        """What the user and the checkpoint say. Raises ValueError."""
        if not isinstance(stop, Iterable) and not isinstance(stop, int):
            raise ValueError(f"stop={stop!r}: texts, or ids of tokens, are needed")
        given = [stop] if isinstance(stop, (str, int)) else list(stop)
        texts = tuple(s for s in given if isinstance(s, str))
        ids = [s for s in given if not isinstance(s, str)]
        if odd := [s for s in ids if isinstance(s, bool) or not isinstance(s, int)]:
            raise ValueError(f"stop={odd[0]!r}: a text or the id of a token is needed")
        if "" in texts:
            raise ValueError("stop='' would end every text before it begins")
        if texts and tokenizer is None:
            raise ValueError(f"stop={texts[0]!r}: this network has no tokenizer, give token ids")
        if tokenizer is not None:  # special tokens have no text
            added = tokenizer.backend.get_added_tokens_decoder()
            ids += [i for i, token in added.items() if token.special and token.content in texts]
        return cls(frozenset([*ids, *ends]), texts)

    def cut(self, text: str) -> tuple[str, str, bool]:
        """What of a text is settled, what may become a stop, and whether there was one."""
        found = [at for stop in self.texts if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], "", True
        held = max(
            (n for stop in self.texts for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        return text[: len(text) - held], text[len(text) - held :], False


class Writer:
    """Tokens -> text, until there is a stop, or `count` of them."""

    def __init__(self, count: int, stops: Stops, tokenizer: Tokenizer | None):
        self.count = count
        self.stops = stops
        self.stream = None if tokenizer is None else TextStream(tokenizer)
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.held = ""  # text that may become a stop
        self.ended = False

    def push(self, token: int) -> str:
        """The text that `token` settles. `ended` says whether it was the last."""
        self.tokens.append(token)
        text, is_last = "", token in self.stops.ids
        if not is_last:
            text = self.held + (self.stream.push(token) if self.stream else "")
            text, self.held, self.ended = self.stops.cut(text)
            is_last = len(self.tokens) == self.count
        if is_last and not self.ended:  # no more tokens come for what is held back
            text += self.held + (self.stream.rest() if self.stream else "")
            self.ended = True
        self.texts.append(text)
        return text


def _check_model(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "task", None) != "text-generation":
        raise ValueError("a network loaded with task='text-generation' is needed")
    if model.training:
        raise ValueError("this network is in training, where dropout is at work: model.eval()")


@dataclass(frozen=True, eq=False)
class Language:
    """What the files beside a checkpoint's weights say, read once and kept with the network."""

    checkpoint: Checkpoint
    place: Place
    tokenizer: Tokenizer | None
    ends: tuple[int, ...]


def _language(
    model: nn.Module, tokenizer: Tokenizer | None
) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """The tokenizer of a network's checkpoint, if it has one, and the tokens that end its texts."""
    if tokenizer is not None:
        return tokenizer, tokenizer.end_ids
    checkpoint, place = getattr(model, "checkpoint", None), describe.place_of(model)
    if checkpoint is None:
        return None, ()
    kept = getattr(model, "_language", None)
    if kept is None or kept.checkpoint is not checkpoint or kept.place != place:
        found = describe.companions(checkpoint, registry.of_model(model), place)
        try:
            tokenizer = Tokenizer.from_files(found)
        except UnsupportedFormat:
            kept = Language(checkpoint, place, None, end_ids(found))
        else:
            kept = Language(checkpoint, place, tokenizer, tokenizer.end_ids)
        model._language = kept  # no array: to MLX it is no parameter
    return kept.tokenizer, kept.ends


def _ids(prompt: Any, model: nn.Module, tokenizer: Tokenizer | None) -> list[int]:
    """The ids of a prompt's tokens, at least one. Raises ValueError."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("this network has no tokenizer: give the prompt as a list of ids")
        ids = tokenizer(prompt, truncation=False, padding=False).input_ids[0]
        if not ids.size and tokenizer.bos_token_id is None:
            raise ValueError("the prompt is empty, and no token begins a text")
        ids = ids if ids.size else np.array([tokenizer.bos_token_id])
    else:
        ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        said = " ".join(repr(prompt).split())[:60]
        raise ValueError(f"prompt={said}: a text, or a list of at least one id, is needed")
    if not 0 <= ids.min() <= ids.max() < model.config.vocab_size:
        raise ValueError(
            f"token id {ids.min() if ids.min() < 0 else ids.max()}: this network has "
            f"{model.config.vocab_size}, from 0"
        )
    return ids.tolist()


def _room(prompt: Any, length: int, max_tokens: int | None, model: nn.Module) -> int:
    """How many tokens may follow a prompt of `length`. Raises ValueError where it cannot be."""
    positions = model.config.max_positions
    if length > positions:
        raise ValueError(
            f"the prompt {_start(prompt)} has {length} tokens, this network {positions} "
            "positions: shorten it"
        )
    room = positions - length + 1  # the last token of all is not read
    if max_tokens is None:
        return min(MAX_TOKENS, room)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens!r}: a whole number from 1 is needed")
    if max_tokens > room:
        raise ValueError(
            f"max_tokens={max_tokens} after {length} of the prompt {_start(prompt)}: this network "
            f"has {positions} positions, which is room for {room}"
        )
    return max_tokens


def _start(prompt: Any) -> str:
    return shortened(prompt) if isinstance(prompt, str) else f"{prompt!s:.60}"


# The pipeline -----------------------------------------------------------------------------------


class TextGeneration(Texts):
    """Prompts -> the same, continued."""

    task = "text-generation"

    def __call__(
        self,
        prompts: str | Iterable[str],
        *,
        batch_size: int = 8,
        return_full_text: bool = True,
        **options: Any,
    ) -> Any:
        """A text -> [{"generated_text": the prompt and what follows}]; a list -> a list of these.

        An iterator gives an iterator. `**options` are those of `generate_batch`; without
        `return_full_text` the prompt is left out.
        """

        def encode(some: Sequence[Any]) -> list[list[list[int]]]:
            for text in some:
                check_text(text)
            rows = [_ids(text, self.model, self.tokenizer) for text in some]
            for text, row in zip(some, rows, strict=True):
                _room(text, len(row), options.get("max_tokens"), self.model)
            return [[row] for row in rows]

        def read(rows: Sequence[list[int]]) -> list[Completion]:
            return generate_batch(self.model, rows, tokenizer=self.tokenizer, **options)

        def answer(text: str, rows: Any, said: list[Completion]) -> list[dict[str, str]]:
            return [{"generated_text": (text if return_full_text else "") + said[0].text}]

        return self.run(prompts, batch_size, encode, read, answer)
