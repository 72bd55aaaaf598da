"""Every parameter's gradient against PyTorch's in float64; and what training makes of them."""

from __future__ import annotations

from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from originals import DEVICE, randomise, saved
from test_parity import cases, whole

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.describe import Place
from mlx_zoo.errors import VerificationError
from mlx_zoo.mapping import engine
from mlx_zoo.verify import compare, double, kinks
from mlx_zoo.verify.gradients import BATCH, STATISTICS, gradients, truth_of
from mlx_zoo.verify.original import build_original
from mlx_zoo.verify.reference import create, import_torchvision

import_torchvision()
import transformers  # noqa: E402

STREAM = mx.cpu if DEVICE == "cpu" else mx.default_device()
# Of every kind of block and stem one that is small; the others are slow.
FAST = (
    *("resnet_digits", "resnet10t", "resnet50_gn", "resnetblur50"),
    *("seresnet50", "resnext50d_32x4d"),
    *("efficientnet_digits", "efficientnet_b0", "tf_efficientnet_b0", "efficientnet_lite0"),
    *("vit_digits", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("deit3_small_patch16_224", "vit_base_patch16_siglip_224"),
    *("vit_xsmall_patch16_clip_224", "vit_small_patch14_reg4_dinov2"),
)


def networks(given):
    for checkpoint in given:
        marks = () if checkpoint.variant in FAST else pytest.mark.slow
        yield pytest.param(checkpoint, id=checkpoint.variant, marks=marks)


def prove(model, size=64):
    """Every gradient is right: in float64 to its last digits, in float32 to its tolerance."""
    original, _ = build_original(model, Place())
    kind = registry.of_model(model).inputs
    shown = compare.image_size(model, size) if kind == "images" else size
    inputs = compare.random_inputs(kind, model.config, shown, 0, BATCH)
    before = {name: np.array(x) for name, x in engine.parameters(model).items()}
    for batch_statistics in (True, False) if has_statistics(model) else (True,):
        truth = truth_of(model, original, inputs, 0, batch_statistics)
        with mx.stream(STREAM):
            rows = truth.judge(model)
        expected = {n for n in before if not n.endswith(STATISTICS)}
        expected |= {"pixel_values"} if kind == "images" else set()
        assert {row.name for row in rows} == expected
        wrong = [r for r in rows if not r.passed or r.double_rel > 1e-11 or r.max_rel > 1e-4]
        assert not wrong, wrong
    after = engine.parameters(model)
    assert all(np.array_equal(x, after[name]) for name, x in before.items())
    assert not any(module.training for module in model.modules())


def has_statistics(model):
    return any(isinstance(module, nn.BatchNorm) for module in model.modules())


def loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(registry._names(), registry.key(checkpoint.variant), checkpoint)
    original = randomise(create(checkpoint.reference, checkpoint.config))
    return mlx_zoo.load(checkpoint.variant, pretrained=saved(original, tmp_path / "weights.pth"))


@pytest.mark.parametrize("checkpoint", [*networks(p.values[0] for p in cases())])
def test_the_gradients_are_those_of_the_original(checkpoint, tmp_path, monkeypatch):
    prove(loaded(checkpoint, tmp_path, monkeypatch))


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
    wrong = next(row for row in report.gradients if row.name == "conv1.weight")
    assert wrong.double_rel == pytest.approx(1e-3, rel=1e-3), "of float64, not of a rounding"


def test_a_mistake_of_float32_alone_fails(monkeypatch):
    """Of a kernel's, say, which float64 does not see."""

    def steeper(x):
        y = mx.sigmoid(x)
        y = x * y
        return y + 0.001 * (y - mx.stop_gradient(y)) if x.dtype == mx.float32 else y

    monkeypatch.setitem(mlx_zoo.models.layers.ACTIVATIONS, "silu", steeper)
    report = mlx_zoo.verify("efficientnet_digits", gradients=True)
    assert not report.passed
    assert all(row.double_rel < 1e-11 for row in report.gradients)
    assert max(row.max_rel for row in report.gradients) > 1e-4


def test_a_rounding_across_a_kink_is_told_from_a_mistake():
    """Where relu is at 0 but for a rounding float32's gradient jumps, and is no other's."""
    x, weight = mx.array([[0.1, 0.2, -0.3 + 2e-9]]), mx.array([[3.0, 3.0, 3.0], [1.0, 2.0, 3.0]])

    def gradient(dtype):
        def loss(w):
            return mx.maximum(x.astype(dtype) @ w.T * 1e6, 0).sum()

        return np.array(mx.grad(loss)(weight.astype(dtype)))

    with kinks.noted() as sides:
        single = gradient(mx.float32)
    with double.real_float64():
        there = gradient(mx.float64)
        with kinks.followed([~np.array(sides[0])]):
            across = gradient(mx.float64)
        with kinks.followed([np.array(sides[0])]):
            same = gradient(mx.float64)
    np.testing.assert_allclose(single, same, rtol=1e-6)
    assert np.abs(across - same).max() > 1e4
    assert {*map(bool, np.array(sides[0]).flat)} <= {True, False}
    assert there.shape == same.shape


def test_sides_that_no_rounding_explains_are_not_followed(monkeypatch):
    @contextmanager
    def inverted():
        with noted() as sides:
            yield sides
            sides[0] = mx.logical_not(sides[0])  # of the first relu

    noted = kinks.noted
    monkeypatch.setattr(kinks, "noted", inverted)
    report = mlx_zoo.verify("resnet_digits", gradients=True)
    assert report.passed
    assert all(row.max_rel == pytest.approx(row.raw_rel, abs=1e-12) for row in report.gradients)


@pytest.mark.parametrize("sides", [[], [np.ones((1, 3), bool)]])
def test_another_path_is_not_followed(sides):
    with (
        kinks.followed(sides),
        pytest.raises(VerificationError, match="another path"),
    ):
        mx.maximum(mx.ones((1, 2)), 0)


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
