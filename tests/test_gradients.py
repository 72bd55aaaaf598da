"""Every parameter's gradient against PyTorch's in float64; and what training makes of them.

A gradient jumps where an activation is zero but for rounding. Nearly every input of a deep network
with relu has such a place, and float32 may find itself on the other side: `gradients` says how
PyTorch's own jumps are counted. Here a few inputs are tried for one without.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from originals import DEVICE, randomise, saved
from test_parity import cases, whole

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.describe import Place
from mlx_zoo.mapping import engine
from mlx_zoo.verify import compare
from mlx_zoo.verify.gradients import BATCH, gradients, truth_of
from mlx_zoo.verify.original import build_original
from mlx_zoo.verify.reference import create, import_torchvision
from mlx_zoo.verify.report import GRADIENT_TOLERANCE

import_torchvision()
import transformers  # noqa: E402

STREAM = mx.cpu if DEVICE == "cpu" else mx.default_device()
SEEDS = 5  # inputs that are tried

# Of every kind of block and stem one that is small; the others are slow.
FAST = (
    *("resnet_digits", "resnet18", "resnet10t", "resnet50_gn", "resnetaa50", "resnetblur50"),
    *("seresnet50", "resnext50d_32x4d"),
    *("efficientnet_digits", "efficientnet_b0", "tf_efficientnet_b0", "efficientnet_lite0"),
    *("vit_digits", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("deit3_small_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224"),
    *("vit_xsmall_patch16_clip_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_radio_v3"),
)


def networks(given):
    for checkpoint in given:
        marks = () if checkpoint.variant in FAST else pytest.mark.slow
        yield pytest.param(checkpoint, id=checkpoint.variant, marks=marks)


def prove(model, size=64, batch_statistics=True):
    """Every gradient is right to the tolerance, at one of a few inputs; at all of them by rule."""
    original, _ = build_original(model, Place())
    kind = registry.of_model(model).inputs
    shown = compare.image_size(model, size) if kind == "images" else size
    names = {n for n in engine.parameters(model) if not n.endswith(("running_mean", "running_var"))}
    for seed in range(SEEDS):
        inputs = compare.random_inputs(kind, model.config, shown, seed, BATCH)
        truth = truth_of(model, original, inputs, seed, batch_statistics)
        with mx.stream(STREAM):
            rows = truth.judge(model)
        assert {row.name for row in rows} - {"pixel_values"} == names
        assert ("pixel_values" in truth.double) == (kind == "images")
        wrong = [row for row in rows if not row.passed]
        assert not wrong, wrong
        if all(row.max_rel < GRADIENT_TOLERANCE for row in rows):
            return rows
    return rows


def loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(registry._names(), registry.key(checkpoint.variant), checkpoint)
    original = randomise(create(checkpoint.reference, checkpoint.config))
    return mlx_zoo.load(checkpoint.variant, pretrained=saved(original, tmp_path / "weights.pth"))


@pytest.mark.parametrize("checkpoint", [*networks(p.values[0] for p in cases())])
def test_the_gradients_are_those_of_the_original(checkpoint, tmp_path, monkeypatch):
    model = loaded(checkpoint, tmp_path, monkeypatch)
    is_smooth = checkpoint.config.act in ("gelu", "silu")  # nothing jumps: the tolerance counts
    before = {name: np.array(x) for name, x in engine.parameters(model).items()}
    rows = prove(model)
    assert not is_smooth or max(row.max_rel for row in rows) < GRADIENT_TOLERANCE
    if any(isinstance(module, nn.BatchNorm) for module in model.modules()):
        prove(model, batch_statistics=False)
    after = engine.parameters(model)
    assert all(np.array_equal(x, after[name]) for name, x in before.items())
    assert not any(module.training for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", whole(), ids=lambda c: c.variant)
def test_the_gradients_of_the_whole_network(checkpoint, tmp_path, monkeypatch):
    prove(loaded(checkpoint, tmp_path, monkeypatch))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SMALL, "vocab_size": 99, "intermediate_size": 64, "max_position_embeddings": 40}
GPT2 = {"vocab_size": 99, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
VIT = {**SMALL, "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 5}
RESNET = {"depths": [2, 1], "hidden_sizes": [32, 64], "embedding_size": 8, "num_labels": 5}
MOBILE = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
    "num_labels": 5,
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 2, 2],
    "expand_ratios": [1, 6, 4],
}
TRANSFORMERS = {
    **{
        name: (transformers.BertConfig, BERT)
        for name, task in registry.architectures()["bert"].classes.items()
        if name != "BertLMHeadModel"
    },
    "BertForMaskedLM, untied": (transformers.BertConfig, {**BERT, "tie_word_embeddings": False}),
    "BertForMaskedLM, no padding": (transformers.BertConfig, {**BERT, "pad_token_id": None}),
    "BertLMHeadModel": (transformers.BertConfig, {**BERT, "is_decoder": True}),
    "GPT2Model": (transformers.GPT2Config, GPT2),
    "GPT2LMHeadModel": (transformers.GPT2Config, GPT2),
    "GPT2LMHeadModel, untied": (transformers.GPT2Config, {**GPT2, "tie_word_embeddings": False}),
    "GPT2ForSequenceClassification": (transformers.GPT2Config, {**GPT2, "num_labels": 5}),
    "GPT2ForTokenClassification": (transformers.GPT2Config, {**GPT2, "num_labels": 5}),
    "ViTForImageClassification": (transformers.ViTConfig, VIT),
    "DeiTForImageClassificationWithTeacher": (transformers.DeiTConfig, VIT),
    "ResNetForImageClassification": (transformers.ResNetConfig, RESNET),
    "EfficientNetForImageClassification": (transformers.EfficientNetConfig, MOBILE),
}

IMAGES = [name for name in TRANSFORMERS if name.endswith(("ImageClassification", "WithTeacher"))]


def of_transformers(name, tmp_path, **options):
    """Our network of one that transformers saved, every tensor random."""
    kind, own = TRANSFORMERS[name]
    config = kind(**{**own, **options, "pad_token_id": own.get("pad_token_id", 0)})
    original = randomise(getattr(transformers, name.partition(",")[0])(config))
    original.save_pretrained(tmp_path)
    classes = {} if name in IMAGES else registry.architectures()[config.model_type].classes
    task = classes.get(name.partition(",")[0])
    chosen = {"task": task} if task else {}
    return mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, **chosen)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_gradients_of_transformers(name, tmp_path):
    prove(of_transformers(name, tmp_path), size=24)


def test_a_tied_embedding_learns_from_both_uses(tmp_path):
    """Its gradient is the sum of an untied network's two."""
    tied = of_transformers("GPT2LMHeadModel", tmp_path)
    inputs = compare.random_inputs("tokens", tied.config, 16, 0)
    targets = {"output": np.zeros((2, 16), np.int32)}
    _, found = gradients(tied, inputs, targets)
    untied = type(tied)(type(tied.config)(**{**vars(tied.config), "tied": False}))
    weights = [*engine.parameters(tied).items(), ("lm_head.weight", tied.wte.weight)]
    untied.load_weights(weights)
    _, apart = gradients(untied.eval(), inputs, targets)
    both = apart["wte.weight"] + apart["lm_head.weight"]
    np.testing.assert_allclose(found["wte.weight"], both, atol=1e-6 * np.abs(both).max())


# Judging ----------------------------------------------------------------------------------------


def test_a_network_that_computes_the_same_and_learns_otherwise_fails(monkeypatch):
    """One part in a thousand of the gradient is too much, behind the pool."""
    report = mlx_zoo.verify("resnet_digits", gradients=True)
    assert report.passed
    assert len(report.gradients) == 42

    def steeper(self, x):
        y = mlx_zoo.backend.ops.max_pool(x, self.kernel, self.stride, self.padding)
        return y + 0.001 * (y - mx.stop_gradient(y))

    monkeypatch.setattr("mlx_zoo.models.layers.MaxPool2d.__call__", steeper)
    report = mlx_zoo.verify("resnet_digits", gradients=True)
    assert not report.passed
    assert all(row.passed for row in (*report.layers, *report.outputs))
    differ = {row.name for row in report.gradients if not row.passed}
    assert differ == {"conv1.weight", "bn1.weight", "bn1.bias", "pixel_values"}
    assert "not the same gradients: 4 of 42 differ" in report.reason
    assert "conv1.weight" in report.to_html()
    assert '"gradients": [' in report.to_json()
    assert "4 of 42" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evidence": "fingerprint"}, "the original alone"),
        ({"dtype": "float16"}, 'dtype="float32"'),
        ({"quantize": 8}, "quantised"),
    ],
)
def test_what_has_no_gradients_to_compare_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mlx_zoo.verify("vit_digits", gradients=True, **options)
