"""Texts to token ids and back, with the `tokenizers` library and a checkpoint's own files.

The ids are those of `transformers.AutoTokenizer` (5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_zoo.errors import CheckpointError, UnsupportedFormat
from mlx_zoo.preprocess.files import read_optional_json
from mlx_zoo.preprocess.sentence import read_transformer_options

if TYPE_CHECKING:
    import mlx.core as mx
    import tokenizers

# What is read here, besides the files of a sentence-transformers repository.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)

# Classes that transformers builds as BERT's, with the names of what their models take.
BERT_CLASSES = {
    "BertTokenizer": ("input_ids", "token_type_ids", "attention_mask"),
    "ElectraTokenizer": ("input_ids", "token_type_ids", "attention_mask"),
    "DistilBertTokenizer": ("input_ids", "attention_mask"),
}
BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
GPT2_CLASS = "GPT2Tokenizer"
GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
# Where no file names a class, the network's model_type in config.json does.
CLASS_OF_MODEL = {"gpt2": GPT2_CLASS}
NO_LIMIT = 10**20  # from here on, transformers does not truncate
ROLES = ("bos_token", "eos_token", *BERT_TOKENS)


@dataclass(frozen=True, eq=False)
class Tokens:
    """B texts (or pairs) as N tokens each; every array is (B, N) int32.

    `offsets[b][n]` is the (start, end) of token n in its text, in characters; (0, 0) where the
    token is special or padding, which is where `special_tokens_mask` is 1. In a pair, the tokens of
    the second text have token type 1. `input_names` are the arrays that the model takes.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    special_tokens_mask: np.ndarray
    offsets: list[list[tuple[int, int]]]
    input_names: tuple[str, ...] = BERT_CLASSES["BertTokenizer"]

    def inputs(self) -> dict[str, mx.array]:
        """The arguments of a model, as in `model(**tokens.inputs())`."""
        import mlx.core as mx

        return {name: mx.array(getattr(self, name)) for name in self.input_names}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary and its rules.

    `max_length` counts special tokens and is None where the checkpoint sets no limit.
    `special_tokens` maps roles ("mask_token") to tokens ("[MASK]"); all are in the vocabulary.
    A call sets the backend's truncation, so one object is for one thread at a time.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    max_length: int | None = None
    input_names: tuple[str, ...] = BERT_CLASSES["BertTokenizer"]
    padding_side: str = "right"
    truncation_side: str = "right"
    default_pad_id: int | None = None  # where no token has that role: config.json's
    end_ids: tuple[int, ...] = ()  # of the tokens at which a generated text ends

    @classmethod
    def from_files(
        cls, files: Mapping[str, Path], *, max_positions: int | None = None
    ) -> Tokenizer:
        """The tokenizer of a repository; `files` maps names inside it to local paths.

        tokenizer.json is preferred to vocab.txt, and to vocab.json with merges.txt. The length
        limit is that of sentence_bert_config.json, else tokenizer_config.json's, and never above
        `max_positions` (by default config.json's max_position_embeddings or n_positions).

        Raises UnsupportedFormat where there is no file of a kind that is read here, and
        CheckpointError for a malformed one.
        """
        config = read_optional_json(files, "tokenizer_config.json")
        model_config = read_optional_json(files, "config.json")
        max_seq_length, do_lower_case = read_transformer_options(files)

        class_name = config.get("tokenizer_class") or model_config.get("tokenizer_class")
        class_name = class_name or CLASS_OF_MODEL.get(model_config.get("model_type", ""))
        backend, class_name = _read_vocabulary(files, class_name)
        named = _named_tokens(files, config, class_name)
        declared = _declared_tokens(files, config, backend)
        if class_name in BERT_CLASSES:
            backend = _bert(backend.get_vocab(with_added_tokens=False), config, named)
        elif class_name == GPT2_CLASS:
            backend = _byte_level(backend, config)
        special_tokens = _add_tokens(backend, declared, named, _extra_tokens(files, config))
        if class_name == GPT2_CLASS and "tokenizer.json" not in files:  # which has its own frame
            _frame(backend, config, special_tokens)
        if do_lower_case:
            _lower_first(backend)

        if max_positions is None:
            max_positions = model_config.get("max_position_embeddings")
            max_positions = model_config.get("n_positions", max_positions)
        # transformers writes 1e30 for "no limit", and max_len in old files.
        own = max_seq_length or config.get("model_max_length", config.get("max_len"))
        limits = [_length(limit) for limit in (own, max_positions) if limit is not None]
        names = config.get("model_input_names") or BERT_CLASSES.get(
            class_name, ("input_ids", "attention_mask")
        )
        eos_id = backend.token_to_id(special_tokens.get("eos_token", ""))
        return cls(
            backend=backend,
            special_tokens=special_tokens,
            max_length=min((limit for limit in limits if limit < NO_LIMIT), default=None),
            input_names=tuple(name for name in names if name in BERT_CLASSES["BertTokenizer"]),
            padding_side=config.get("padding_side", "right"),
            truncation_side=config.get("truncation_side", "right"),
            default_pad_id=model_config.get("pad_token_id"),
            end_ids=end_ids(files) or (() if eos_id is None else (eos_id,)),
        )

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        truncation: bool = True,
        padding: bool = True,
        padding_side: str | None = None,
    ) -> Tokens:
        """Tokenize one text or B of them (or of pairs), with the special tokens of the checkpoint.

        Texts longer than `max_length` tokens (by default the checkpoint's limit) are cut, a pair at
        its longer text, and shorter ones are padded to the longest of the batch: on the "left" or
        "right", by default as the checkpoint says.

        Raises ValueError for something other than text, for no text at all, for a `max_length` that
        has no room for the special tokens, and for different lengths without padding.
        """
        batch = _batch(texts, pairs)
        padding_side = padding_side or self.padding_side
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: 'left' or 'right' is needed")
        limit = self.max_length if max_length is None else max_length
        # Whatever was set before, by tokenizer.json too, is replaced.
        if truncation and limit is not None:
            num_special = self.backend.num_special_tokens_to_add(pairs is not None)
            if limit < max(num_special, 1):
                raise ValueError(f"max_length={limit} must be at least {max(num_special, 1)}")
            self.backend.enable_truncation(limit, direction=self.truncation_side)
        else:
            self.backend.no_truncation()
        if padding and self.pad_token_id is not None:
            self.backend.enable_padding(
                direction=padding_side,
                pad_id=self.pad_token_id,
                pad_token=self.special_tokens.get("pad_token", ""),
            )
        else:
            self.backend.no_padding()

        encodings = self.backend.encode_batch(batch)
        lengths = sorted({len(encoding) for encoding in encodings})
        if len(lengths) > 1:
            reason = "this tokenizer has no padding token" if padding else "padding is off"
            raise ValueError(f"texts of {lengths} tokens cannot be one array: {reason}")
        return Tokens(
            input_ids=np.array([e.ids for e in encodings], dtype=np.int32),
            attention_mask=np.array([e.attention_mask for e in encodings], dtype=np.int32),
            token_type_ids=np.array([e.type_ids for e in encodings], dtype=np.int32),
            special_tokens_mask=np.array(
                [e.special_tokens_mask for e in encodings], dtype=np.int32
            ),
            offsets=[e.offsets for e in encodings],
            input_names=self.input_names,
        )

    def decode(self, ids: Sequence[int] | Any, *, skip_special_tokens: bool = False) -> str:
        """The text of one sequence of ids: a list, or an array (N,). Unknown ids leave no text."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"decode takes one sequence of ids, not {ids.dtype}{ids.shape}")
        return self.backend.decode(ids.tolist(), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, index: int) -> str:
        """The token of an id. Raises ValueError if there is none."""
        token = self.backend.id_to_token(int(index)) if index >= 0 else None
        if token is None:
            raise ValueError(f"no token has the id {index}; the vocabulary has {self.vocab_size}")
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it ("##ing"); None if it is not there."""
        return self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size()

    @property
    def mask_token(self) -> str | None:
        return self.special_tokens.get("mask_token")

    @property
    def mask_token_id(self) -> int | None:
        return self._role_id("mask_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._role_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._role_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """What fills up the rows of a batch, masked: of GPT-2, which has no token for it, the end
        of a text.
        """
        own = self._role_id("pad_token")
        own = self.default_pad_id if own is None else own
        return self.eos_token_id if own is None else own

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


@dataclass
class TextStream:
    """Tokens, one by one -> the text that each completes.

    A character of several bytes may be spread over tokens: its text comes with the last of them.
    """

    tokenizer: Tokenizer
    pending: list[int] = field(default_factory=list)  # tokens whose text is yet to come

    def push(self, token: int) -> str:
        """The text that `token` completes, '' where a character is still open."""
        self.pending.append(token)
        text = self._text()
        if text.endswith("\ufffd"):  # bytes that are no character, or not yet
            return ""
        self.pending.clear()
        return text

    def rest(self) -> str:
        """The text of what will not be completed any more."""
        text = self._text()
        self.pending.clear()
        return text

    def _text(self) -> str:
        return self.tokenizer.decode(self.pending, skip_special_tokens=True)


def end_ids(files: Mapping[str, Path]) -> tuple[int, ...]:
    """The ids of the tokens at which a text ends, as generation_config.json or config.json says.

    Raises CheckpointError for something else than ids.
    """
    ids = None
    for name in ("generation_config.json", "config.json"):
        if ids is None:
            ids = read_optional_json(files, name).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if odd := [i for i in ids if isinstance(i, bool) or not isinstance(i, int)]:
        raise CheckpointError(f"eos_token_id: {odd[0]!r} is not the id of a token")
    return tuple(ids)


def _length(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{value!r} is not a maximum length")
    return int(value)


def _batch(texts, pairs) -> list[str] | list[tuple[str, str]]:
    """What `encode_batch` takes; every element is known to be text."""
    first = _texts(texts, "texts")
    if not first:
        raise ValueError("texts is empty")
    if pairs is None:
        return first
    second = _texts(pairs, "pairs")
    if len(first) != len(second):
        raise ValueError(f"{len(first)} texts but {len(second)} pairs")
    return list(zip(first, second, strict=True))


def _texts(value, name: str) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a str or a list of str, not {type(value).__name__}")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] must be a str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}[{index}] is not valid Unicode: {error}") from error
    return list(value)


def _read_vocabulary(
    files: Mapping[str, Path], class_name: str | None
) -> tuple[tokenizers.Tokenizer, str | None]:
    """(what the file holds, the name of transformers' class for it without "Fast")."""
    import tokenizers
    from tokenizers.models import BPE, WordPiece

    class_name = class_name.removesuffix("Fast") if class_name else None
    if "tokenizer.json" in files:
        try:
            backend = tokenizers.Tokenizer.from_file(str(files["tokenizer.json"]))
        except Exception as error:  # tokenizers raises nothing more specific
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        is_wordpiece = isinstance(backend.model, WordPiece)
        if not is_wordpiece and (class_name is None or class_name in BERT_CLASSES):
            class_name = None  # the file knows better: transformers would read it as WordPiece
        elif class_name is None:
            class_name = "BertTokenizer"
        if class_name == GPT2_CLASS and not isinstance(backend.model, BPE):
            class_name = None
        return backend, class_name
    if "vocab.txt" in files:
        class_name = class_name or "BertTokenizer"
        if class_name not in BERT_CLASSES:
            raise UnsupportedFormat(
                f"vocab.txt of a {class_name} is not read here; a tokenizer.json is "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
            )
        try:
            vocab = WordPiece.read_file(str(files["vocab.txt"]))
        except Exception as error:  # tokenizers raises nothing more specific
            raise CheckpointError(f"vocab.txt cannot be read: {error}") from error
        return tokenizers.Tokenizer(WordPiece(vocab)), class_name
    if {"vocab.json", "merges.txt"} <= files.keys():
        class_name = class_name or GPT2_CLASS
        if class_name != GPT2_CLASS:
            raise UnsupportedFormat(
                f"vocab.json and merges.txt of a {class_name} are not read here; a tokenizer.json "
                "is (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
            )
        try:
            bpe = BPE.from_file(str(files["vocab.json"]), str(files["merges.txt"]))
        except Exception as error:  # tokenizers raises nothing more specific
            raise CheckpointError(f"vocab.json, merges.txt cannot be read: {error}") from error
        return tokenizers.Tokenizer(bpe), class_name
    raise UnsupportedFormat(
        f"no tokenizer.json, vocab.txt or vocab.json with merges.txt among {sorted(files)}; other "
        "vocabularies (SentencePiece models) are not read here: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes a tokenizer.json"
    )


def _bert(
    vocab: dict[str, int], config: Mapping[str, Any], named: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """BERT's tokenizer over `vocab`, as transformers' BertTokenizer builds it.

    The options are tokenizer_config.json's alone, and text is lower-cased unless it says otherwise.
    The normalizer inside tokenizer.json does not count, in transformers 4 and 5 alike.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    roles = {role: str(named[role].content) for role in BERT_TOKENS if role in named}
    needed = ("unk_token", "cls_token", "sep_token", "pad_token")
    if missing := [roles.get(role, role) for role in needed if roles.get(role) not in vocab]:
        raise CheckpointError(f"the vocabulary has no {', '.join(missing)}")
    cls_token, sep_token = roles["cls_token"], roles["sep_token"]

    backend = Tokenizer(WordPiece(vocab, unk_token=roles["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),  # None: where text is lower-cased
        lowercase=bool(config.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls_token}:0 $A:0 {sep_token}:0",
        pair=f"{cls_token}:0 $A:0 {sep_token}:0 $B:1 {sep_token}:1",
        special_tokens=[(token, vocab[token]) for token in (cls_token, sep_token)],
    )
    return backend


def _byte_level(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer over the merges of `backend`, as transformers' GPT2Tokenizer builds it.

    Text is bytes: nothing is normalised and nothing unknown. Of tokenizer.json's other rules, only
    what it puts around a text counts.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    model = backend.model
    model.dropout, model.unk_token, model.fuse_unk = None, None, False
    model.byte_fallback, model.ignore_merges = False, False
    own = Tokenizer(model)
    own.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space", False))
    )
    own.decoder = decoders.ByteLevel()
    if backend.post_processor is not None:
        own.post_processor = backend.post_processor
    return own


def _frame(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Put the tokens around a text that tokenizer_config.json asks for; GPT-2's own has none."""
    from tokenizers import processors

    ends = {"bos_token": config.get("add_bos_token"), "eos_token": config.get("add_eos_token")}
    asked = {role for role, wanted in ends.items() if wanted}
    if missing := sorted(asked - special_tokens.keys()):
        raise CheckpointError(f"the vocabulary has no {missing[0]}, which begins or ends a text")
    bos, eos = (special_tokens[role] if role in asked else None for role in ends)
    if not asked:
        return

    def framed(text: str, kind: int) -> str:
        return " ".join(f"{token}:{kind}" for token in (bos, text, eos) if token)

    backend.post_processor = processors.TemplateProcessing(
        single=framed("$A", 0),
        pair=f"{framed('$A', 0)} {framed('$B', 1)}",
        special_tokens=[(t, backend.token_to_id(t)) for t in {bos, eos} if t],
    )


def _named_tokens(
    files: Mapping[str, Path], config: Mapping[str, Any], class_name: str | None
) -> dict[str, tokenizers.AddedToken]:
    """Tokens by role: the class's own, overridden by tokenizer_config.json's and then by
    special_tokens_map.json's. The latter predates `added_tokens_decoder` and yields to it.
    """
    values: dict[str, Any] = dict(BERT_TOKENS) if class_name in BERT_CLASSES else {}
    if class_name == GPT2_CLASS:
        values = dict(GPT2_TOKENS)
    values |= {role: config[role] for role in ROLES if role in config}
    if "added_tokens_decoder" not in config:
        special_map = read_optional_json(files, "special_tokens_map.json")
        values |= {role: special_map[role] for role in ROLES if role in special_map}
    return {role: _added_token(value, special=True) for role, value in values.items() if value}


def _extra_tokens(files: Mapping[str, Path], config: Mapping[str, Any]) -> list:
    """Special tokens without a role, in either file and under either name."""
    sources = [config]
    if "added_tokens_decoder" not in config:
        sources.append(read_optional_json(files, "special_tokens_map.json"))
    extra = []
    for source in sources:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(key) or []
            values = values.values() if isinstance(values, dict) else values
            extra += [_added_token(value, special=True) for value in values]
    return extra


def _declared_tokens(
    files: Mapping[str, Path], config: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> dict[int, tokenizers.AddedToken]:
    """Tokens beside the model's vocabulary, by id.

    They are in tokenizer_config.json, or, in older repositories, in added_tokens.json and
    tokenizer.json.
    """
    if "added_tokens_decoder" in config:
        declared = config["added_tokens_decoder"]
        if not isinstance(declared, dict) or not all(index.isdecimal() for index in declared):
            raise CheckpointError(
                "tokenizer_config.json: added_tokens_decoder is not ids to tokens"
            )
        return {int(index): _added_token(value) for index, value in declared.items()}
    added = read_optional_json(files, "added_tokens.json")
    tokens = {index: _added_token(text) for text, index in added.items()}
    return tokens | backend.get_added_tokens_decoder()


def _added_token(value: str | Mapping[str, Any], *, special: bool = False) -> tokenizers.AddedToken:
    """A token as the JSON files write it: text, or a dict of text and flags."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{value!r} is not a token: text, or a dict with its content")
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {name: bool(value[name]) for name in names if name in value}
    return AddedToken(value["content"], **flags | ({"special": True} if special else {}))


def _add_tokens(
    backend: tokenizers.Tokenizer,
    declared: Mapping[int, tokenizers.AddedToken],
    named: Mapping[str, tokenizers.AddedToken],
    extra: Sequence[tokenizers.AddedToken],
) -> dict[str, str]:
    """Teach `backend` the tokens that are found in text as a whole; returns those with a role.

    Raises CheckpointError if a declared token would get another id than it was trained with.
    """
    roles = {role: token.content for role, token in named.items()}
    for index, token in sorted(declared.items(), key=lambda item: item[0]):
        token.special = token.special or token.content in roles.values()
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise CheckpointError(
                f"the added token {token.content!r} should have the id {index}, "
                f"but the vocabulary makes it {backend.token_to_id(token.content)}"
            )
    known = {token.content for token in declared.values()}
    # A role whose token the vocabulary lacks is left out: a new id would have no embedding.
    roles = {r: token for r, token in roles.items() if backend.token_to_id(token) is not None}
    missing = [named[role] for role, token in roles.items() if token not in known]
    missing += [token for token in extra if token.content not in known]
    backend.add_tokens(missing)
    return roles


def _lower_first(backend: tokenizers.Tokenizer) -> None:
    """Put sentence-transformers' own lower-casing before whatever the tokenizer does."""
    from tokenizers import normalizers

    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
