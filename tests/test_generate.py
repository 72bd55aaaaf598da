"""Generated text against transformers' own, token by token, on the same random weights."""

from __future__ import annotations

import copy
import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tokenizers
import torch
from mlx.utils import tree_flatten
from originals import randomise

import mlx_zoo
from mlx_zoo.backend import ops, transposed
from mlx_zoo.backend.blas import load_fast_blas
from mlx_zoo.backend.inference import optimize_for_inference
from mlx_zoo.errors import CheckpointError
from mlx_zoo.preprocess.text import Tokenizer
from mlx_zoo.quantization import quantize
from mlx_zoo.tasks.generation import PromptCache, Sampling, generate, generate_batch
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()
import transformers  # noqa: E402

VOCAB, POSITIONS, END = 320, 256, "<|endoftext|>"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps. ",
    "Crème brûlée, naïve façade; Ångström; 北京大学 and カタカナ; 🤗🤗 👩‍👩‍👧. ",
    "Numbers: 0123456789, 3.14, 2.71828; code: def f(x): return x + 1\n",
]
PROMPTS = [
    "The quick brown",
    "Crème brûlée, 北京 and then it sleeps in the lazy café",
    "A",
]


def original(seed=0, **options):
    """A network whose greedy text does not run in circles, nor end: its positions speak loud, and
    token 0 is never the likeliest.
    """
    sizes = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**{**sizes, **ends, **options})
    model = randomise(transformers.GPT2LMHeadModel(config), seed)
    model.tie_weights()
    model.transformer.wpe.weight.data *= 3
    model.transformer.wte.weight.data[0] = 0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a byte-level tokenizer of its own, in vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("gpt2")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(CORPUS * 3, vocab_size=VOCAB, min_frequency=1, special_tokens=[END])
    assert bpe.get_vocab_size() == VOCAB
    bpe.save_model(str(folder))
    original().save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return mlx_zoo.load(f"local-dir:{folder}", pretrained=True)


@pytest.fixture(scope="module")
def reference(folder):
    """The original and its tokenizer, as transformers loads them."""
    torch.set_num_threads(1)  # such small networks gain nothing from more
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval(), tokenizer


def by_transformers(reference, prompts, count, **options):
    """The new tokens of each prompt, up to and with the one that ends it."""
    network, tokenizer = reference
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"do_sample": False, "pad_token_id": 0, **options}
    tokens = network.generate(**inputs, max_new_tokens=count, **options)
    rows = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    ends = options.get("eos_token_id", 0)
    return [row[: row.index(ends) + 1] if ends in row else row for row in rows]


def tokens_of(*args, **options):
    return [token.token for token in generate(*args, **options)]


def text_of(*args, **options):
    return "".join(token.text for token in generate(*args, **options))


# The same tokens --------------------------------------------------------------------------------


def test_greedy_text_is_that_of_transformers(model, reference):
    (wanted,) = by_transformers(reference, PROMPTS[1:2], 200)
    assert len(wanted) == 200
    assert len(set(wanted)) >= 30
    assert tokens_of(model, PROMPTS[1], max_tokens=200) == wanted
    ids = reference[1](PROMPTS[1])["input_ids"]
    assert tokens_of(model, ids, max_tokens=200) == wanted
    assert tokens_of(model, mx.array(ids), max_tokens=7) == wanted[:7]


def test_a_left_padded_batch_is_that_of_transformers(model, reference):
    wanted = by_transformers(reference, PROMPTS, 200)
    assert all(len(set(row)) >= 30 for row in wanted)
    found = generate_batch(model, PROMPTS, max_tokens=200)
    assert [row.tokens for row in found] == wanted
    assert [row.text for row in found] == [text_of(model, p, max_tokens=200) for p in PROMPTS]
    assert wanted[2] == tokens_of(model, PROMPTS[2], max_tokens=200)


def test_an_optimised_network_writes_the_same(model, reference, monkeypatch, tmp_path):
    """With the weights by columns, too, which more than three rows are multiplied with."""
    fast, prompts = optimize_for_inference(model), [*PROMPTS, "jumps over", "dog 0123"]
    assert tokens_of(fast, PROMPTS[1], max_tokens=50) == tokens_of(model, PROMPTS[1], max_tokens=50)
    used = []
    inner = transposed.Table.as_linear
    monkeypatch.setattr(transposed, "_pays", lambda weights: True)
    monkeypatch.setattr(
        transposed.Table, "as_linear", lambda self, x: used.append(len(x)) or inner(self, x)
    )
    for network, count in ((model, 5), (fast, 3), (fast, 5)):
        assert not used
        found = generate_batch(network, prompts[:count], max_tokens=50)
        assert [row.tokens for row in found] == by_transformers(reference, prompts[:count], 50)
    assert set(used) == {5}

    cache = PromptCache(fast)
    list(generate(fast, PROMPTS[1], max_tokens=5, cache=cache))
    path = cache.save(tmp_path / "cache.safetensors")
    assert PromptCache.load(path, model).tokens == cache.tokens  # of either


def test_weights_by_columns_are_the_same_weights(model, monkeypatch):
    fast = optimize_for_inference(model)
    monkeypatch.setattr(transposed, "_pays", lambda weights: True)
    twin = transposed.for_rows(fast, 4, ("wte",))
    assert transposed.for_rows(fast, 9, ("wte",)) is twin is not fast
    assert transposed.for_rows(fast, 3, ("wte",)) is fast
    for layer, other in zip(fast.modules(), twin.modules(), strict=True):
        if type(layer) is nn.Linear:
            np.testing.assert_array_equal(layer.weight, other.weight)
            assert np.asarray(other.weight).flags.f_contiguous
    np.testing.assert_array_equal(fast.wte.weight, twin.wte.columns)
    assert twin.wte.weight is fast.wte.weight is model.wte.weight

    fast.blocks[0].mlp.fc1.weight = fast.blocks[0].mlp.fc1.weight + 1
    again = transposed.for_rows(fast, 4, ("wte",))
    np.testing.assert_array_equal(again.blocks[0].mlp.fc1.weight, fast.blocks[0].mlp.fc1.weight)
    assert "_transposed" not in vars(again)  # nor is the old one kept


def test_weights_lie_by_columns_where_it_was_measured_to_pay(model):
    fast = optimize_for_inference(model)
    is_mkl = load_fast_blas().name.startswith("MKL") and mx.default_device() == mx.cpu
    assert (transposed.for_rows(fast, 4, ("wte",)) is not fast) == is_mkl
    with ops.plain():
        assert transposed.for_rows(fast, 4, ("wte",)) is fast
    half = mlx_zoo.load("gpt2", num_layers=1, dims=64, num_heads=2, mlp_dims=64, dtype="float16")
    half = optimize_for_inference(half)
    assert transposed.for_rows(half, 4, ("wte",)) is half
    eighth = optimize_for_inference(quantize(model, group_size=32))
    assert transposed.for_rows(eighth, 4, ("wte",)) is eighth


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(penalty, model, reference):
    wanted = by_transformers(reference, PROMPTS, 40, repetition_penalty=penalty)
    found = generate_batch(model, PROMPTS, max_tokens=40, repetition_penalty=penalty)
    assert [row.tokens for row in found] == wanted
    assert tokens_of(model, PROMPTS[2], max_tokens=40, repetition_penalty=penalty) == wanted[2]
    assert wanted[2] != by_transformers(reference, PROMPTS[2:], 40)[0]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_text_ends_where_its_checkpoint_says(file, folder, reference, tmp_path):
    rows = by_transformers(reference, PROMPTS, 30)
    end = rows[0][20]
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps({**config, "eos_token_id": [end, 319]}))
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    wanted = by_transformers(reference, PROMPTS, 30, eos_token_id=end)
    assert len(wanted[0]) <= 21
    assert len({len(row) for row in wanted}) > 1
    found = generate_batch(model, PROMPTS, max_tokens=30)
    assert [row.tokens for row in found] == wanted
    tokens = list(generate(model, PROMPTS[0], max_tokens=30))
    assert [token.token for token in tokens] == wanted[0]
    assert tokens[-1].token == end
    tokenizer = reference[1]
    assert "".join(t.text for t in tokens) == found[0].text == tokenizer.decode(wanted[0][:-1])


@pytest.mark.slow
def test_greedy_text_of_a_network_of_full_size(tmp_path):
    large = original(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024)
    large.save_pretrained(tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    rows = np.random.default_rng(0).integers(0, 50257, (2, 20))
    mask = np.ones_like(rows)
    mask[1, :8] = 0
    tokens = large.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=200,
        do_sample=False,
        pad_token_id=0,
    )
    wanted = tokens[:, 20:].tolist()
    assert min(len(set(row)) for row in wanted) >= 30
    assert tokens_of(model, rows[0], max_tokens=200) == wanted[0]
    found = generate_batch(model, [rows[0], rows[1, 8:]], max_tokens=200)
    assert [row.tokens for row in found] == wanted


# The same chances -------------------------------------------------------------------------------

FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 5},
    {"top_k": 400},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
    {"repetition_penalty": 1.4},
    {"temperature": 3.0, "top_k": 50, "top_p": 0.5, "repetition_penalty": 0.7},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_leave_the_chances_that_transformers_leaves(options, reference):
    options = {"temperature": 1.0, **options}
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (6, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, (6, 9))
    # What transformers is not told, it takes from the checkpoint, which says top_k=50 by default.
    off = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    config = transformers.GenerationConfig(do_sample=True, **{**off, **options})
    filters = reference[0]._get_logits_processor(config, input_ids_seq_length=9)
    wanted = filters(torch.tensor(ids), torch.tensor(logits)).numpy()

    sampling = Sampling(**options)
    used = np.zeros((6, VOCAB), bool)
    np.put_along_axis(used, ids, True, axis=1)
    used = mx.array(used) if "repetition_penalty" in options else None
    ours = np.array(sampling.filtered(sampling.penalised(mx.array(logits), used)))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(wanted))
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_tokens_come_as_often_as_they_should():
    logits = mx.broadcast_to(mx.array([[0.0, 1.0, 2.0, -1.0, 5.0]]), (20_000, 5))
    sampling = Sampling(temperature=1.7, top_k=4)
    found = np.array(sampling.choose(logits, None, mx.random.key(3)))
    share = np.bincount(found, minlength=5) / len(found)
    np.testing.assert_allclose(share, mx.softmax(sampling.filtered(logits[:1]))[0], atol=0.015)
    assert share[3] == 0


def test_a_seed_decides(model):
    options = {"temperature": 1.5, "max_tokens": 30}
    one = tokens_of(model, PROMPTS[0], seed=1, **options)
    assert one == tokens_of(model, PROMPTS[0], seed=1, **options)
    assert one != tokens_of(model, PROMPTS[0], seed=2, **options)
    mx.random.seed(5)
    free = tokens_of(model, PROMPTS[0], **options)
    assert free != tokens_of(model, PROMPTS[0], **options)
    mx.random.seed(5)
    assert free == tokens_of(model, PROMPTS[0], **options)


# Texts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 0}], ids=str)
def test_the_pieces_are_the_whole_text(options, model, reference):
    tokens = list(generate(model, PROMPTS[0], max_tokens=200, **options))
    whole = reference[1].decode([t.token for t in tokens], skip_special_tokens=True)
    assert "".join(t.text for t in tokens) == whole
    assert sum(not t.text for t in tokens) > 10  # characters of several bytes were open
    assert any(ord(character) > 0x7F for character in whole.replace("\ufffd", ""))


def test_a_text_comes_while_it_is_made(model):
    text = generate(model, PROMPTS[0], max_tokens=10)
    assert next(text).token == next(generate(model, PROMPTS[0], max_tokens=1)).token
    text.close()


def test_stop_strings_end_a_text_before_them(model):
    tokens = list(generate(model, PROMPTS[0], max_tokens=60))
    whole = "".join(t.text for t in tokens)
    for start in range(0, len(whole) - 4, 5):
        stop = whole[start : start + 4]
        if "\ufffd" in stop:
            continue
        found = list(generate(model, PROMPTS[0], max_tokens=60, stop=["no such text", stop]))
        assert "".join(t.text for t in found) == whole[: whole.index(stop)]
        assert [t.token for t in found] == [t.token for t in tokens][: len(found)]
    assert text_of(model, PROMPTS[0], max_tokens=60, stop="no such text") == whole
    (batched,) = generate_batch(model, PROMPTS[:1], max_tokens=60, stop=stop)
    assert batched.text == whole[: whole.index(stop)]


def test_what_may_become_a_stop_is_held_back(model):
    """A stop that never comes whole: what was held is given in the end."""
    whole = text_of(model, PROMPTS[0], max_tokens=12)
    tokens = list(generate(model, PROMPTS[0], max_tokens=12, stop=whole + "!"))
    assert [t.text for t in tokens] == [""] * 11 + [whole]


def test_stop_tokens_are_given_and_their_text_is_not(model):
    tokens = list(generate(model, PROMPTS[0], max_tokens=30))
    stop = tokens[9].token
    first = [t.token for t in tokens].index(stop)
    found = list(generate(model, PROMPTS[0], max_tokens=30, stop=stop))
    assert [t.token for t in found] == [t.token for t in tokens[: first + 1]]
    whole = model_text(model, [t.token for t in tokens[:first]])
    assert "".join(t.text for t in found) == whole


def model_tokenizer(model):
    return mlx_zoo.pipeline("text-generation", model).tokenizer


def model_text(model, tokens):
    return model_tokenizer(model).decode(tokens, skip_special_tokens=True)


def test_a_special_token_is_a_stop_by_its_name(model):
    """Whatever it is called: a text leaves it out."""
    tokens = tokens_of(model, PROMPTS[0], max_tokens=30)
    tokenizer = model_tokenizer(model)
    name = tokenizer.id_to_token(tokens[9])
    tokenizer.backend.add_special_tokens([name])
    first = tokens.index(tokens[9])
    found = list(generate(model, PROMPTS[0], max_tokens=30, stop=name, tokenizer=tokenizer))
    assert [t.token for t in found] == tokens[: first + 1]
    assert "".join(t.text for t in found) == tokenizer.decode(tokens[:first])


def test_the_files_are_read_once(model, folder, tmp_path, monkeypatch):
    reads = []
    inner = Tokenizer.from_files
    monkeypatch.setattr(Tokenizer, "from_files", lambda *args: reads.append(1) or inner(*args))
    names = dict(tree_flatten(model.parameters())).keys()
    wanted = text_of(model, PROMPTS[0], max_tokens=9)
    assert text_of(model, PROMPTS[0], max_tokens=9) == wanted
    assert generate_batch(model, PROMPTS[:1], max_tokens=9)[0].text == wanted
    assert len(reads) == 1
    assert dict(tree_flatten(model.parameters())).keys() == names
    assert text_of(copy.deepcopy(model), PROMPTS[0], max_tokens=9) == wanted

    for path in folder.iterdir():  # as another checkpoint says, texts end at once
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    ends = json.dumps({"eos_token_id": list(range(VOCAB))})
    (tmp_path / "generation_config.json").write_text(ends)
    model.checkpoint = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True).checkpoint
    assert len(tokens_of(model, PROMPTS[0], max_tokens=9)) == 1
    model.checkpoint = None
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(model, PROMPTS[0])


def test_an_empty_prompt_begins_a_text(model):
    assert tokens_of(model, "", max_tokens=5) == tokens_of(model, [0], max_tokens=5)


def test_without_a_tokenizer_there_are_tokens_alone():
    model = mlx_zoo.load("gpt2", num_layers=1, dims=16, num_heads=2, vocab_size=50, max_positions=9)
    tokens = list(generate(model, [1, 2], stop=[7]))
    assert 0 < len(tokens) <= 8  # as many as there are positions
    assert not any(t.text for t in tokens)
    for options in ({"prompt": "text"}, {"prompt": [1], "stop": "text"}):
        with pytest.raises(ValueError, match="no tokenizer"):
            generate(model, **options)


# Prompt caches ----------------------------------------------------------------------------------


@pytest.fixture
def read(model, monkeypatch):
    """How many tokens the network was given at a time."""
    counts = []
    inner = type(model).next_logits

    def next_logits(self, ids, *rest):
        counts.append(ids.shape[1])
        return inner(self, ids, *rest)

    monkeypatch.setattr(type(model), "next_logits", next_logits)
    return counts


def test_a_cached_prompt_is_not_read_again(model, read, tmp_path):
    wanted = tokens_of(model, PROMPTS[1], max_tokens=30)
    length = read[0]
    cache = PromptCache(model)
    assert tokens_of(model, PROMPTS[1], max_tokens=30, cache=cache) == wanted
    assert len(cache.tokens) == cache.states.length == length + 29

    longer = [*cache.tokens[:-5], 1, 2, 3]  # a text that begins alike
    alone = tokens_of(model, longer, max_tokens=10)
    read.clear()
    assert tokens_of(model, longer, max_tokens=10, cache=cache) == alone
    assert read == [3] + [1] * 9

    options = {"max_tokens": 10, "repetition_penalty": 1.5}  # which counts what is cached
    again = tokens_of(model, longer, cache=cache, **options)
    assert again == tokens_of(model, longer, **options) != alone

    path = cache.save(tmp_path / "caches" / "prompt.safetensors")
    assert {p.name for p in path.parent.iterdir()} == {path.name}
    loaded = PromptCache.load(path, model)
    assert loaded.tokens == cache.tokens
    read.clear()
    assert tokens_of(model, PROMPTS[1], max_tokens=30, cache=loaded) == wanted
    assert read[0] == 1


def test_a_cache_holds_what_was_read_when_a_text_is_left_early(model):
    wanted = tokens_of(model, PROMPTS[1], max_tokens=30)
    cache = PromptCache(model, capacity=100)
    text = generate(model, PROMPTS[1], max_tokens=30, cache=cache)
    for _ in range(4):
        next(text)
    text.close()
    assert len(cache.tokens) == cache.states.length
    assert tokens_of(model, PROMPTS[1], max_tokens=30, cache=cache) == wanted
    assert tokens_of(model, PROMPTS[2], max_tokens=9, cache=cache) == tokens_of(
        model, PROMPTS[2], max_tokens=9
    )


def test_a_text_may_be_left_and_the_cache_given_to_another(model):
    wanted = [tokens_of(model, prompt, max_tokens=30) for prompt in PROMPTS[:2]]
    cache = PromptCache(model)
    list(generate(model, PROMPTS[1], max_tokens=9, cache=cache))
    left = generate(model, PROMPTS[0], max_tokens=30, cache=cache)
    assert [next(left).token for _ in range(4)] == wanted[0][:4]
    assert len(cache.tokens) == cache.states.length  # and nobody has closed it
    assert tokens_of(model, PROMPTS[1], max_tokens=30, cache=cache) == wanted[1]
    with pytest.raises(ValueError, match="another text was begun with this cache"):
        next(left)
    assert len(cache.tokens) == cache.states.length
    assert tokens_of(model, PROMPTS[0], max_tokens=30, cache=cache) == wanted[0]


def test_a_cache_outlives_what_breaks_a_text_off(model, monkeypatch, tmp_path):
    wanted = tokens_of(model, PROMPTS[1], max_tokens=30)
    cache = PromptCache(model)
    text = generate(model, PROMPTS[1], max_tokens=30, cache=cache)
    next(text)
    inner = Sampling.choose

    def broken(*args):
        inner(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Sampling, "choose", broken)  # when the network has read
        with pytest.raises(KeyboardInterrupt):
            next(text)
    loaded = PromptCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    for kept in (cache, loaded):
        assert tokens_of(model, PROMPTS[1], max_tokens=30, cache=kept) == wanted


def test_a_cache_of_several_rows_is_refused(model):
    cache = PromptCache(model)
    list(generate(model, [1, 2, 3], max_tokens=2, cache=cache))
    cache.states = model.make_cache()
    model(mx.array([[1, 2, 3], [1, 2, 4]]), cache=cache.states)
    with pytest.raises(ValueError, match="this cache is of 2 rows"):
        list(generate(model, [1, 2, 3, 4], max_tokens=2, cache=cache))
    assert {layer.length for layer in cache.states.layers} == {3}


def test_an_empty_cache_is_saved_too(model, tmp_path):
    path = PromptCache(model).save(tmp_path / "cache.safetensors")
    assert PromptCache.load(path, model).tokens == []


def test_the_cache_of_another_network_is_refused(model, tmp_path):
    cache = PromptCache(model)
    list(generate(model, PROMPTS[0], max_tokens=3, cache=cache))
    path = cache.save(tmp_path / "cache.safetensors")
    original(seed=1).save_pretrained(tmp_path / "other")  # of the same sizes
    other = mlx_zoo.load(f"local-dir:{tmp_path / 'other'}", pretrained=True)
    with pytest.raises(CheckpointError, match="prompt cache of another network"):
        PromptCache.load(path, other)
    with pytest.raises(ValueError, match="cache is of another network"):
        generate(other, [1], cache=cache)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError):
        PromptCache.load(path, model)
    with pytest.raises(CheckpointError, match="no file"):
        PromptCache.load(tmp_path / "nothing", model)
    with pytest.raises(CheckpointError, match="no prompt cache"):
        PromptCache.load(tmp_path / "other" / "model.safetensors", model)


def test_a_cache_with_other_tensors_is_refused(model, tmp_path):
    cache = PromptCache(model)
    list(generate(model, PROMPTS[0], max_tokens=3, cache=cache))
    path = cache.save(tmp_path / "cache.safetensors")
    arrays, metadata = mx.load(str(path), return_metadata=True)
    for damaged in (
        {n: x for n, x in arrays.items() if n != "layers.1.keys"},
        arrays | {"layers.1.keys": arrays["layers.1.keys"][:, :, 1:]},
        {n: x for n, x in arrays.items() if n != "tokens"},
    ):
        mx.save_safetensors(str(path), damaged, metadata)
        with pytest.raises(CheckpointError, match="damaged"):
            PromptCache.load(path, model)


# Neighbours -------------------------------------------------------------------------------------


def test_a_long_neighbour_does_not_shorten_a_text(model):
    rows = [[7] * 200, [5] * 250, [6] * POSITIONS]
    wanted = [tokens_of(model, row) for row in rows]
    assert [len(row) for row in wanted] == [57, 7, 1]
    assert [row.tokens for row in generate_batch(model, rows)] == wanted
    assert [row.tokens for row in generate_batch(model, mx.array(rows[1:2]))] == wanted[1:2]

    texts = ["The quick brown fox; " * n for n in (10, 15)]
    pipe = mlx_zoo.pipeline("text-generation", model)
    assert pipe(texts, batch_size=2) == pipe(texts, batch_size=1)
    with pytest.raises(
        ValueError, match=r"max_tokens=200 after \d+ of the prompt 'The quick brown"
    ):
        generate_batch(model, ["A", texts[1]], max_tokens=200)
    with pytest.raises(ValueError, match=r"max_tokens=40 after 250 of the prompt \[5, 5, 5"):
        generate_batch(model, rows[:2], max_tokens=40)


def test_an_ended_row_asks_for_no_position_that_there_is_not(model, monkeypatch):
    asked = []
    inner = type(model.wpe).__call__

    def look(self, ids):
        asked.append(ids.max().item()) if self is model.wpe else None
        return inner(self, ids)

    monkeypatch.setattr(type(model.wpe), "__call__", look)
    generate_batch(model, [[7], [6] * POSITIONS], max_tokens=None)
    assert max(asked) == POSITIONS - 1


# Wrong arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "0.5"}, "temperature='0.5'"),
        ({"top_p": None}, "top_p=None"),
        ({"min_p": True}, "min_p=True"),
        ({"repetition_penalty": [1.2]}, r"repetition_penalty=\[1.2\]"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 2}, "min_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 254}, "max_tokens=254 after 4 .* room for 253"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**70}, f"seed={2**70}"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"stop": None}, "stop=None"),
        ({"stop": 0.5}, "stop=0.5"),
        ({"stop": ""}, "stop=''"),
        ({"stop": [None]}, "stop=None"),
        ({"prompt": []}, "at least one id"),
        ({"prompt": [0.5]}, "at least one id"),
        ({"prompt": [[1]]}, "at least one id"),
        ({"prompt": [320]}, "token id 320: this network has 320"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [1] * 257}, "257 tokens, this network 256 positions"),
        ({"prompt": 5}, "prompt=5"),
        ({"prompt": None}, "prompt=None"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_once(options, message, model):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt": [1, 2, 3, 4], **options})
    prompt = options.pop("prompt", [1, 2, 3, 4])
    with pytest.raises(ValueError, match=message):
        generate_batch(model, [prompt], **options)


def test_the_greatest_seed(model):
    assert len(tokens_of(model, [1], temperature=1.0, seed=2**64 - 1, max_tokens=2)) == 2


def test_prompts_are_a_list(model):
    for prompts in (5, None, "text", [], iter(())):
        with pytest.raises(ValueError, match="a list of at least one"):
            generate_batch(model, prompts)


def test_the_last_position_is_used(model):
    prompt = [1] * 250
    assert len(tokens_of(model, prompt)) == 7
    assert len(tokens_of(model, prompt, max_tokens=7)) == 7
    assert len(tokens_of(model, [1] * 256)) == 1


def test_wrong_networks_are_refused(model, folder):
    with pytest.raises(ValueError, match="task='text-generation'"):
        generate(mlx_zoo.load("bert_base", num_layers=1, vocab_size=50), [1])
    with pytest.raises(ValueError, match="task='text-generation'"):
        PromptCache(mlx_zoo.load("resnet18"))
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        generate(model, [1])


# The pipeline -----------------------------------------------------------------------------------


def test_the_pipeline_is_that_of_transformers(folder, reference):
    ours = mlx_zoo.pipeline("text-generation", f"local-dir:{folder}")
    theirs = transformers.pipeline("text-generation", reference[0], tokenizer=reference[1])
    options = {"do_sample": False, "pad_token_id": 0}
    wanted = theirs(PROMPTS, max_new_tokens=20, **options)
    assert ours(PROMPTS, max_tokens=20) == wanted
    assert list(ours(iter(PROMPTS), max_tokens=20, batch_size=2)) == wanted
    assert ours(PROMPTS[1], max_tokens=20) == wanted[1]
    (new,) = ours(PROMPTS[1], max_tokens=20, return_full_text=False)
    assert PROMPTS[1] + new["generated_text"] == wanted[1][0]["generated_text"]
    assert ours([]) == []
    for wrong in (5, [5], ["A", None], [["A"]], "\ud800"):
        with pytest.raises(ValueError, match=r"where str belongs|not valid Unicode"):
            ours(wrong)
    for prompt in ("", PROMPTS[0] * 40):
        assert_like_alone(ours, prompt)


def assert_like_alone(pipe, prompt):
    """As `generate` continues it, or refuses to."""
    try:
        wanted = prompt + text_of(pipe.model, prompt, max_tokens=5)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            pipe(prompt, max_tokens=5)
    else:
        assert pipe(prompt, max_tokens=5) == [{"generated_text": wanted}]
