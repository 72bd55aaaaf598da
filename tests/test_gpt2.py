"""GPT-2 against transformers: every tensor random, in every form that its files have."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from originals import proven, randomise
from safetensors.torch import load_file, save_file

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.errors import CheckpointError, MappingError, UnsupportedConfig
from mlx_zoo.mapping import engine
from mlx_zoo.models.gpt2 import GPT2, Block, GPT2Config, KVCache, LayerCache, causal_mask
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()
import transformers  # noqa: E402
from transformers.activations import ACT2CLS  # noqa: E402

TASKS = {
    "text-generation": "GPT2LMHeadModel",
    "text-classification": "GPT2ForSequenceClassification",
    "token-classification": "GPT2ForTokenClassification",
}


def small(**options):
    sizes = {"vocab_size": 99, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 40}
    ends = {"bos_token_id": 98, "eos_token_id": 98}
    return transformers.GPT2Config(**{**sizes, **ends, "num_labels": 5, **options})


def save(folder, task="text-generation", kind=None, **options):
    original = randomise(getattr(transformers, kind or TASKS[task])(small(**options)))
    if original.config.tie_word_embeddings:
        original.tie_weights()
    original.get_input_embeddings().weight.data.clamp_(-0.3, 0.3)  # as a head, of order one
    original.save_pretrained(folder)
    return original


def load(folder, task="text-generation", **options):
    return mlx_zoo.load(f"local-dir:{folder}", pretrained=True, task=task, **options)


def rewrite(folder, change):
    state = change(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def same(one, other):
    ids = mx.array(np.random.default_rng(0).integers(0, 90, (2, 20)))
    assert one.config == other.config
    for (name, a), (_, b) in zip(parameters(one), parameters(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_array_equal(one(ids), other(ids))


def parameters(model):
    return tree_flatten(model.parameters())


# Parity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_head(task, tmp_path):
    save(tmp_path, task)
    report = proven(load(tmp_path, task))
    names = {layer.name for layer in report.layers}
    assert {f"blocks.{i}.attn.{p}_proj" for i in range(3) for p in ("q", "k", "v", "out")} <= names
    assert {f"blocks.{i}.{p}" for i in range(3) for p in ("norm1", "mlp.fc1", "norm2")} <= names


WITHOUT_WEIGHTS = sorted(ACT2CLS.keys() - {"prelu", "xielu"})  # those two have weights


@pytest.mark.parametrize("act", WITHOUT_WEIGHTS)
def test_every_activation(act, tmp_path):
    save(tmp_path, activation_function=act)
    proven(load(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"n_inner": 80},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"layer_norm_epsilon": 0.1},
        {"tie_word_embeddings": False},
        {"n_head": 1},
        {"n_positions": 300},
    ],
    ids=str,
)
def test_attributes_that_change_the_arithmetic(options, tmp_path):
    save(tmp_path, **options)
    proven(load(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"activation_function": "prelu"},
        {"hidden_size": 65},
        {"model_type": "gpt_neo"},
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(options, tmp_path):
    config = {**small().to_dict(), "model_type": "gpt2", **options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedConfig, match="n_embd" if "hidden_size" in options else next(iter(options))
    ):
        load(tmp_path)


def test_the_newer_names_of_attributes(tmp_path):
    save(tmp_path)
    model = load(tmp_path)
    path = tmp_path / "config.json"
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
    names |= {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
    config = json.loads(path.read_text())
    path.write_text(json.dumps({names.get(n, n): x for n, x in config.items()}))
    same(model, load(tmp_path))


# Files ------------------------------------------------------------------------------------------


def with_buffers(state):
    """As OpenAI's own file and older releases have it: no prefix, causal masks."""
    state = {name.removeprefix("transformer."): x for name, x in state.items()}
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(40, 40).tril()[None, None]
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def test_without_prefix_and_with_mask_buffers(tmp_path):
    save(tmp_path)
    model = load(tmp_path)
    rewrite(tmp_path, with_buffers)
    bare = load(tmp_path)
    same(model, bare)
    proven(bare)


def test_a_sharded_bin_with_its_index(tmp_path):
    original = save(tmp_path)
    model = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {f"transformer.{name}": x for name, x in with_buffers(original.state_dict()).items()}
    state["lm_head.weight"] = state.pop("transformer.lm_head.weight")
    names = sorted(state)
    index = {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05}-of-00003.bin"
        torch.save({name: state[name].clone() for name in names[i::3]}, tmp_path / file)
        index |= dict.fromkeys(names[i::3], file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    same(model, load(tmp_path))


def test_a_buffer_is_dropped_by_its_whole_name(tmp_path):
    save(tmp_path)
    rewrite(tmp_path, lambda state: state | {"transformer.h.0.attn.c_bias": torch.ones(3)})
    with pytest.raises(MappingError, match=r"no home for h\.0\.attn\.c_bias"):
        load(tmp_path)


def test_a_square_matrix_the_wrong_way_round_is_seen(tmp_path):
    """attn.c_proj has as many inputs as outputs: no shape tells, only the figures."""
    save(tmp_path)
    model = load(tmp_path)
    layer = model.blocks[0].attn.out_proj
    layer.weight = layer.weight.T
    report = mlx_zoo.verify(model)
    assert not report.passed
    assert report.first_divergence == "blocks.0.attn.out_proj"


def test_a_tied_head_must_be_the_embeddings(tmp_path):
    save(tmp_path)
    model = load(tmp_path)
    wte = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    rewrite(tmp_path, lambda state: state | {"lm_head.weight": wte.clone()})
    same(model, load(tmp_path))
    rewrite(tmp_path, lambda state: state | {"lm_head.weight": wte + 1})
    with pytest.raises(MappingError, match=r"lm_head\.weight differs from wte\.weight"):
        load(tmp_path)


def test_an_untied_head_is_needed_for_text_alone(tmp_path):
    save(tmp_path, tie_word_embeddings=False)
    model = load(tmp_path)
    assert model.lm_head.weight.shape == (99, 64)
    other = load(tmp_path, "text-classification", num_classes=3)
    assert "lm_head" not in other
    assert other(mx.array([[1, 2]])).shape == (1, 3)
    rewrite(tmp_path, lambda state: {n: x for n, x in state.items() if n != "lm_head.weight"})
    with pytest.raises(MappingError, match=r"nothing fills lm_head\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2DoubleHeadsModel"])
def test_other_classes_write_text(kind, tmp_path):
    save(tmp_path, kind=kind)
    proven(load(tmp_path))


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_a_classifier_writes_text_too(task, tmp_path):
    save(tmp_path, task)
    proven(load(tmp_path))


def test_a_fresh_head_must_be_asked_for(tmp_path, caplog):
    save(tmp_path)
    with pytest.raises(CheckpointError, match="no head for text-classification; num_classes="):
        load(tmp_path, "text-classification")
    model = load(tmp_path, "token-classification", num_classes=3)
    assert model(mx.array([[1, 2]])).shape == (1, 2, 3)
    assert "fresh head, to be trained; num_classes=3" in caplog.text


def test_text_is_what_it_does_by_default(tmp_path):
    save(tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert model.config.task == "text-generation"
    assert model(mx.array([[1, 2]])).shape == (1, 2, 99)


def test_export_is_bit_for_bit(tmp_path):
    original = save(tmp_path)
    path = mlx_zoo.export(load(tmp_path), tmp_path / "exported.safetensors")
    exported = load_file(path)
    state = original.state_dict()
    assert exported.keys() == state.keys(), "lm_head, which is tied, included"
    assert all(torch.equal(exported[name], x) for name, x in state.items())


@pytest.mark.parametrize(
    "name", [c.name for c in registry.checkpoints().values() if c.architecture == "gpt2"]
)
def test_published_checkpoints_have_their_size(name):
    checkpoint = registry.checkpoints()[name]
    model = GPT2(checkpoint.config)  # lazy: nothing is allocated
    assert engine.num_parameters(model) == checkpoint.num_params
    repository = checkpoint.source.removeprefix("hf-hub:").removeprefix("package:")
    assert registry.find(repository) is checkpoint


# Padding and caches -----------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    return save(tmp_path), load(tmp_path)


def ids_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 90, shape)


def test_left_padding_counts_for_no_position(pair):
    original, model = pair
    ids, mask = ids_of(3, 12), np.ones((3, 12), int)
    mask[1, :5] = 0
    mask[2, :11] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        wanted = original(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    ours = np.array(model(mx.array(ids), mx.array(mask)))
    real = mask.astype(bool)
    assert np.abs(ours[real] - wanted[real]).max() < 1e-5
    alone = np.array(model(mx.array(ids[1:2, 5:])))
    assert np.abs(ours[1, 5:] - alone[0]).max() < 1e-5
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("capacity", [None, 30, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_in_pieces_with_a_cache_it_is_the_same(pair, padded, capacity, monkeypatch):
    monkeypatch.setattr(LayerCache, "STEP", 8)
    _, model = pair
    ids, mask = mx.array(ids_of(2, 30)), None
    if padded:
        mask = mx.ones((2, 30), mx.int32)
        mask[1, :7] = 0  # more than the first piece
    whole = model(ids, mask)
    cache = model.make_cache(capacity)
    pieces = []
    for start, end in ((0, 5), (5, 17), (17, 18), (18, 19), (19, 30)):
        part = mask[:, start:end] if padded and end < 18 else None  # it knows of the padding
        pieces.append(model(ids[:, start:end], part, cache))
        assert cache.length == end
    rows = np.s_[0] if padded else np.s_[:]
    difference = np.abs(np.array(mx.concatenate(pieces, axis=1)) - np.array(whole))
    assert difference[rows].max() < 1e-5
    assert difference[:, 7:].max() < 1e-5
    rooms = {layer.keys.shape[2] for layer in cache.layers}
    assert rooms == {30 if capacity == 30 else 32}


def test_a_trimmed_cache_forgets(pair):
    _, model = pair
    ids = mx.array(ids_of(1, 20))
    cache = model.make_cache()
    model(ids, cache=cache)
    cache.trim(9)
    again = model(ids[:, 9:12], cache=cache)
    assert cache.length == 12
    np.testing.assert_allclose(again, model(ids)[:, 9:12], atol=1e-5)


def test_a_refused_call_leaves_the_cache_as_it_was(pair):
    _, model = pair
    ids = mx.array(ids_of(2, 12))
    cache = model.make_cache()
    model(ids[:, :5], cache=cache)
    for rows in (ids[:1], mx.concatenate([ids, ids])):
        with pytest.raises(ValueError, match="this cache is of 2 rows: the tokens have"):
            model(rows[:, 5:], cache=cache)
    assert {layer.length for layer in cache.layers} == {cache.length} == {5}
    np.testing.assert_allclose(model(ids[:, 5:], cache=cache), model(ids)[:, 5:], atol=1e-5)
    cache.trim(0)
    np.testing.assert_allclose(model(ids[:1], cache=cache), model(ids[:1]), atol=1e-5)


def test_a_call_that_was_broken_off_leaves_the_cache_of_use(pair, monkeypatch):
    _, model = pair
    ids, mask = mx.array(ids_of(2, 12)), mx.ones((2, 12), mx.int32)
    mask[1, :3] = 0
    cache = model.make_cache()
    model(ids[:, :5], mask[:, :5], cache=cache)

    def broken(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Block, "__call__", broken_from(1, Block.__call__, broken))
        with pytest.raises(MemoryError):
            model(ids[:, 5:9], mask[:, 5:9], cache=cache)
    assert cache.length == 5
    found = model(ids[:, 5:], mask[:, 5:], cache=cache)
    np.testing.assert_allclose(found, model(ids, mask)[:, 5:], atol=1e-5)


def broken_from(call, inner, broken):
    """`inner`, which after so many calls is `broken`."""
    calls = iter([inner] * call)
    return lambda *args: next(calls, broken)(*args)


def test_positions_end_where_the_network_ends(pair):
    _, model = pair
    cache = model.make_cache()
    model(mx.array(ids_of(1, 39)), cache=cache)
    with pytest.raises(ValueError, match="2 tokens after 39: this network has 40 positions"):
        model(mx.array([[1, 2]]), cache=cache)
    assert cache.length == 39  # and nothing has happened
    model(mx.array([[1]]), cache=cache)
    with pytest.raises(ValueError, match="1 tokens after 40"):
        model(mx.array([[1]]), cache=cache)
    with pytest.raises(ValueError, match="41 tokens: this network has 40 positions"):
        model(mx.array(ids_of(1, 41)))


def test_wrong_inputs_are_refused(pair):
    _, model = pair
    for ids, message in (
        ([[99]], "token id 99.*has 99"),
        ([[-1]], "token id -1"),
        ([[]], "B, N > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(mx.array(ids))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 3\)"):
        model(mx.array([[1, 2]]), mx.array([[1, 1, 1]]))
    with pytest.raises(ValueError, match="another config"):
        model(mx.array([[1, 2]]), cache=KVCache(GPT2Config(num_layers=3)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_classified_at_its_last_token(side, tmp_path):
    save(tmp_path, "text-classification")
    model = load(tmp_path, "text-classification")
    ids, mask = ids_of(1, 12), np.ones((1, 12), int)
    alone = model(mx.array(ids[:, :8]))
    padding = ((0, 0), (4, 0) if side == "left" else (0, 4))
    ids, mask = np.pad(ids[:, :8], padding), np.pad(mask[:, :8], padding)
    np.testing.assert_allclose(model(mx.array(ids), mx.array(mask)), alone, atol=1e-5)


def test_half_precision(pair, tmp_path):
    original, _ = pair
    model = load(tmp_path, dtype="bfloat16")
    ids = ids_of(2, 20)
    logits = model(mx.array(ids), mx.ones((2, 20)))
    assert logits.dtype == mx.bfloat16
    with torch.no_grad():
        wanted = original(torch.tensor(ids)).logits.numpy()
    difference = np.abs(np.array(logits.astype(mx.float32)) - wanted).max()
    assert difference < 0.05 * np.abs(wanted).max()


def loud(model, offset=4.0):
    """Scores lower by a number that is the same for every key, to which softmax is blind."""
    for block in model.blocks:
        block.attn.q_proj.bias = block.attn.q_proj.bias + mx.array(offset, mx.float16)
        block.attn.k_proj.bias = block.attn.k_proj.bias - mx.array(offset, mx.float16)
    return model


def test_padding_on_the_left_leaves_half_precision_its_numbers(pair, tmp_path):
    model = loud(load(tmp_path, dtype="float16"))
    ids, mask = mx.array(ids_of(3, 12)), mx.ones((3, 12), mx.int32)
    mask[1, :5] = 0
    mask[2] = 0
    found = np.array(model(ids, mask).astype(mx.float32))
    assert np.isfinite(found).all()
    alone = np.array(model(ids[1:2, 5:]).astype(mx.float32))
    assert np.abs(found[1, 5:] - alone[0]).max() < 0.02 * np.abs(alone).max()


def test_a_row_of_padding_alone_is_classified_somehow(tmp_path):
    save(tmp_path, "text-classification")
    model = loud(load(tmp_path, "text-classification", dtype="float16"))
    ids, mask = mx.array(ids_of(2, 12)), mx.ones((2, 12), mx.int32)
    mask[1] = 0
    found = model(ids, mask)
    assert mx.isfinite(found).all()
    np.testing.assert_allclose(found[:1], model(ids[:1]), atol=0.01)


def test_without_padding_no_mask_is_made():
    assert causal_mask(1, 5, None, mx.float32) is None
    assert causal_mask(4, 5, None, mx.float32) == "causal"
