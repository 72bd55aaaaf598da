"""Weights in few bits: made, kept, loaded, and compared with what they were."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from originals import randomise

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.mapping import engine
from mlx_zoo.quantization import Quantization
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()
import transformers  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """A small BERT as transformers saves it."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128, "vocab_size": 200, "max_position_embeddings": 40}
    original = randomise(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)))
    original.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def load(source, **options):
    return mlx_zoo.load(f"local-dir:{source}", pretrained=True, task="fill-mask", **options)


IDS = mx.array(np.random.default_rng(0).integers(0, 200, (2, 12)))


def test_heads_and_positions_stay_whole(folder):
    model = load(folder)
    assert mlx_zoo.quantize(model, bits=8) is model
    assert isinstance(model.word_embed, nn.QuantizedEmbedding)
    assert isinstance(model.blocks[0].attn.q_proj, nn.QuantizedLinear)
    assert isinstance(model.position_embed, nn.Embedding)
    assert type(model.mlm.dense) is nn.Linear
    assert model.quantization.bits == 8
    assert len(model.quantization.layers) == 1 + 2 * 6
    with pytest.raises(ValueError, match="quantised already"):
        mlx_zoo.quantize(model)


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.02), (4, 0.4)])
def test_fewer_bits_cost_more(folder, bits, worst):
    whole, packed = load(folder)(IDS), load(folder, quantize=bits)(IDS)
    error = (mx.abs(packed - whole).max() / mx.abs(whole).max()).item()
    assert worst / 50 < error < worst


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_kept_in_the_cache_and_in_a_folder(folder, tmp_path, dtype):
    first = load(folder, quantize={"bits": 4, "group_size": 32}, dtype=dtype)
    again = load(folder, quantize={"bits": 4, "group_size": 32}, dtype=dtype)
    mlx_zoo.convert(first, tmp_path / "packed")
    (folder / "model.safetensors").rename(folder / "elsewhere")  # it is not read again
    moved = load(tmp_path / "packed")
    for model in (again, moved):
        assert model.quantization == first.quantization
        own, theirs = engine.parameters(first), engine.parameters(model)
        assert own.keys() == theirs.keys()
        assert all(mx.array_equal(x, theirs[name]).item() for name, x in own.items())
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    assert manifest["quantization"]["bits"] == 4
    with pytest.raises(ValueError, match="weights of 4 bits: leave out quantize="):
        load(tmp_path / "packed", quantize=8)


def test_a_folder_of_packed_weights_serves_another_task(folder, tmp_path):
    mlx_zoo.convert(load(folder, quantize=8), tmp_path / "packed")
    body = mlx_zoo.load(f"local-dir:{tmp_path}/packed", pretrained=True)
    whole = mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    a, b = body(IDS).last_hidden_state, whole(IDS).last_hidden_state
    assert 0 < mx.abs(a - b).max().item() < 0.1


def test_a_converted_folder_is_quantised_when_it_is_loaded(folder, tmp_path):
    mlx_zoo.convert(load(folder), tmp_path / "whole")
    packed, direct = load(tmp_path / "whole", quantize=8), load(folder, quantize=8)
    assert mx.array_equal(packed(IDS), direct(IDS)).item()


def test_verify_says_what_it_costs(folder, tmp_path):
    mlx_zoo.convert(load(folder, quantize=8), tmp_path / "packed")
    for model in (load(folder, quantize=8), load(tmp_path / "packed")):
        report = mlx_zoo.verify(model)
        assert report.passed, report.reason
        assert 0.9 < report.effect["top-1 agreement"] <= 1
        assert "top-1 agreement" in str(report)
        assert json.loads(report.to_json())["effect"] == report.effect
    few = mlx_zoo.verify(load(folder, quantize=2))
    assert few.passed
    assert few.effect["top-1 agreement"] < report.effect["top-1 agreement"]


def test_verify_sees_another_weight(folder):
    model = load(folder, quantize=8)
    model.blocks[1].mlp.fc1.scales = model.blocks[1].mlp.fc1.scales * 1.001
    model.norm.bias = model.norm.bias + 1e-3
    report = mlx_zoo.verify(model)
    assert not report.passed
    assert set(report.different) == {"blocks.1.mlp.fc1.scales", "norm.bias"}
    assert "not the weights of" in report.reason


def test_random_networks_too():
    model = mlx_zoo.load("bert_base", task="fill-mask", quantize=4, num_layers=1, vocab_size=64)
    assert model.quantization.bits == 4
    assert model(IDS % 64).shape == (2, 12, 64)
    with pytest.raises(ValueError, match="random weights: there is nothing to convert"):
        mlx_zoo.convert(model, "never")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits=7: one of 2, 3, 4, 5, 6, 8"),
        ({"bits": True}, "bits=True"),
        ({"group_size": 48}, "group_size=48: one of 32, 64, 128"),
        ({"group_size": 128}, "no layer divides by 128"),
    ],
)
def test_wrong_numbers(folder, options, message):
    config = json.loads((folder / "config.json").read_text())
    model = mlx_zoo.load("bert_base", num_layers=1, dims=64, mlp_dims=64, num_heads=2)
    assert config["hidden_size"] == model.config.dims
    with pytest.raises(ValueError, match=message):
        mlx_zoo.quantize(model, **options)


def test_convolutions_are_not_quantised():
    with pytest.raises(ValueError, match=r"nothing to quantise in this resnet.*convolutions"):
        mlx_zoo.quantize(mlx_zoo.load("resnet18"))


def test_what_does_not_divide_stays_and_is_said(caplog):
    model = mlx_zoo.load("bert_base", num_layers=1, dims=64, mlp_dims=100, num_heads=2)
    mlx_zoo.quantize(model)
    assert "1 layers do not divide into groups of 64 and stay as they are, blocks.0.mlp.fc2" in (
        caplog.text
    )
    assert type(model.blocks[0].mlp.fc2) is nn.Linear


def test_quantised_weights_are_not_exported(folder, tmp_path):
    with pytest.raises(ValueError, match="a quantised network cannot be exported"):
        mlx_zoo.export(load(folder, quantize=8), tmp_path / "x.safetensors")


def test_the_record_takes_only_its_fields():
    with pytest.raises(ValueError, match="mode is not bits or group_size"):
        mlx_zoo.load("bert_base", quantize={"mode": "nf4"})
    assert Quantization(4, 32).layers == ()


def test_a_packed_folder_of_another_type_is_still_its_own(folder, tmp_path):
    mlx_zoo.convert(load(folder, quantize=8), tmp_path / "packed")
    for dtype in ("float16", "bfloat16"):
        report = mlx_zoo.verify(load(tmp_path / "packed", dtype=dtype))
        assert report.passed, report.reason


def test_the_cache_knows_which_layers_were_left_alone(folder, monkeypatch):
    architecture = registry.architectures()["bert"]
    assert "word_embed" in load(folder, quantize=8).quantization.layers
    kept = (*architecture.full_precision, "word_embed")
    monkeypatch.setitem(
        registry.architectures(), "bert", replace(architecture, full_precision=kept)
    )
    assert "word_embed" not in load(folder, quantize=8).quantization.layers


def test_a_language_model_tells_its_perplexity():
    report = mlx_zoo.verify("gpt2_docs", quantize=8)
    assert report.passed, report.reason
    before, after = report.effect["perplexity"], report.effect["perplexity, quantised"]
    assert 30 < before < 200
    assert 0.9 < after / before < 1.1
    worse = mlx_zoo.verify("gpt2_docs", quantize={"bits": 3, "group_size": 32})
    assert worse.effect["perplexity, quantised"] > 1.1 * before
