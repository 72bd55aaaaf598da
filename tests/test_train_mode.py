"""Train mode is PyTorch's: batch statistics, what is dropped where and how often, and 20 steps."""

from __future__ import annotations

from dataclasses import replace

import curves
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from originals import randomise
from torch.nn import functional as F

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.mapping import engine
from mlx_zoo.models.layers import BatchNorm, Conv2d, DropPath
from mlx_zoo.models.vit import ViTConfig
from mlx_zoo.verify import compare
from mlx_zoo.verify.reference import create, import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MOBILE = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 2, 3],
    "expand_ratios": [1, 6, 4],
    "dropout_rate": 0.3,
    "drop_connect_rate": 0.4,
}


def filled(name, original, config, dialect):
    """Our network with the weights of `original`."""
    architecture = registry.architectures()[name]
    model = architecture.model(config)
    state = {n: mx.array(x.numpy()) for n, x in original.state_dict().items()}
    weights = engine.to_mlx(state, model, architecture.spec(dialect, config))
    model.load_weights(list(weights.items()))
    return model


def of_timm(name, ours, theirs):
    checkpoint = registry.find(name)
    config = replace(checkpoint.config, **ours)
    options = {**checkpoint.reference.options, **theirs}
    original = randomise(create(replace(checkpoint.reference, options=options), config))
    return filled(checkpoint.architecture, original, config, checkpoint.dialect), original


def of_transformers(kind, config):
    original = randomise(getattr(transformers, kind)(config))
    architecture = next(
        a for a in registry.architectures().values() if config.model_type in a.model_types
    )
    own = architecture.read_config({**config.to_dict(), "architectures": [kind]})
    task = architecture.classes[kind]
    own = replace(own, task=task) if hasattr(own, "task") else own
    state = {n: mx.array(x.numpy()) for n, x in original.state_dict().items()}
    model = architecture.model(own)
    dialect = next(
        name
        for name in architecture.dialects
        if name.startswith("transformers")
        and not engine.mismatches(state, model, architecture.spec(name, own))
    )
    return filled(architecture.name, original, own, dialect), original


def of_torchvision():
    sizes = {"image_size": 32, "patch_size": 8, "num_heads": 4, "mlp_dim": 64, "num_classes": 5}
    rates = {"dropout": 0.1, "attention_dropout": 0.2}
    network = torchvision.models.VisionTransformer(num_layers=2, hidden_dim=32, **sizes, **rates)
    config = ViTConfig(
        img_size=32,
        patch_size=8,
        num_heads=4,
        mlp_dims=64,
        num_classes=5,
        num_layers=2,
        dims=32,
        **IN_VIT,
    )
    original = randomise(network)
    return filled("vit", original, config, "torchvision"), original


VIT = {**SMALL, "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 5}
VIT |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
BERT = {**SMALL, "vocab_size": 99, "intermediate_size": 64, "max_position_embeddings": 40}
BERT |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
BERT |= {"classifier_dropout": 0.3}
GPT2 = {"vocab_size": 99, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {"resid_pdrop": 0.1, "attn_pdrop": 0.2, "embd_pdrop": 0.3, "pad_token_id": 0}
IN_VIT = {"dropout": 0.1, "mlp_dropout": 0.1, "attention_dropout": 0.2}
PAIRS = {
    "ViT of torchvision": lambda: of_torchvision(),
    "ViT of timm": lambda: of_timm(
        "deit_tiny_distilled_patch16_224",
        {
            **IN_VIT,
            "embed_dropout": 0.15,
            "head_dropout": 0.3,
            "drop_path": 0.25,
            "num_layers": 3,
            "img_size": 48,
        },
        {
            "proj_drop_rate": 0.1,
            "attn_drop_rate": 0.2,
            "pos_drop_rate": 0.15,
            "drop_rate": 0.3,
            "drop_path_rate": 0.25,
            "depth": 3,
            "img_size": 48,
        },
    ),
    "ResNet of timm": lambda: of_timm(
        "resnet10t",
        {"dropout": 0.3, "drop_path": 0.4},
        {"drop_rate": 0.3, "drop_path_rate": 0.4},
    ),
    "ResNet of torchvision": lambda: of_timm("resnet18", {}, {}),
    "EfficientNet of timm": lambda: of_timm(
        "tf_efficientnet_b0", {}, {"drop_rate": 0.2, "drop_path_rate": 0.2}
    ),
    "EfficientNet of torchvision": lambda: of_timm("efficientnet_b0", {}, {}),
    "EfficientNet of transformers": lambda: of_transformers(
        "EfficientNetForImageClassification", transformers.EfficientNetConfig(**MOBILE)
    ),
    **{
        kind: lambda kind=kind, config=config: of_transformers(kind, config)
        for kind, config in {
            "ViTForImageClassification": transformers.ViTConfig(**VIT),
            "DeiTForImageClassificationWithTeacher": transformers.DeiTConfig(**VIT),
            "BertForMaskedLM": transformers.BertConfig(**BERT),
            "BertForSequenceClassification": transformers.BertConfig(**BERT),
            "BertForTokenClassification": transformers.BertConfig(**BERT),
            "BertForQuestionAnswering": transformers.BertConfig(**BERT),
            "BertForMultipleChoice": transformers.BertConfig(**BERT),
            "GPT2LMHeadModel": transformers.GPT2Config(**GPT2),
            "GPT2ForSequenceClassification": transformers.GPT2Config(**GPT2),
            "GPT2ForTokenClassification": transformers.GPT2Config(**GPT2),
        }.items()
    },
}


def told(monkeypatch):
    """Instead of dropping values at random, both sides multiply them by what tells the rate."""

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * (1 + p) if training else x

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **how):
        return (1 + dropout_p) * own(q, k, v, attn_mask, 0.0, is_causal, **how)

    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)

    def whole_branch(self, x):
        p = getattr(self, "drop_prob", None) or getattr(self, "p", 0.0)
        return x * (1 + 2 * p) if self.training else x

    monkeypatch.setattr(torchvision.ops.StochasticDepth, "forward", whole_branch)
    monkeypatch.setattr(timm.layers.DropPath, "forward", whole_branch)
    monkeypatch.setattr(DropPath, "__call__", whole_branch)

    def ours(self, x):
        return x * (2 - self._p_1) if self.training else x

    monkeypatch.setattr(nn.Dropout, "__call__", ours)


def given(model, kind):
    config, kind = model.config, registry.of_model(model).inputs
    size = getattr(config, "img_size", 64) if kind == "images" else 24
    return compare.random_inputs(kind, config, size, 0, 4)


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_dropped_is_what_the_original_drops(name, monkeypatch):
    """In the same places, at the same rates; and with the statistics of the batch."""
    model, original = PAIRS[name]()
    inputs = given(model, name)
    quiet = compare.run(model.eval(), inputs, ())[0]
    told(monkeypatch)
    outputs = compare.run(model.train(), inputs, ())[0]
    original.double().train()
    if "pixel_values" in inputs:
        x = torch.from_numpy(inputs["pixel_values"].transpose(0, 3, 1, 2).copy()).double()
        theirs = original(x)
    else:
        theirs = original(**{n: torch.from_numpy(x).long() for n, x in inputs.items()})
    theirs = getattr(theirs, "logits", theirs)
    theirs = {"output": theirs} if isinstance(theirs, torch.Tensor) else dict(theirs)
    for output, x in outputs.items():
        wanted = theirs[output].detach().numpy()
        np.testing.assert_allclose(x, wanted, atol=3e-5 * np.abs(wanted).max())
        if "QuestionAnswering" not in name:
            assert np.abs(x - quiet[output]).max() > 1e-2, "train mode is eval mode"


@pytest.mark.parametrize(
    "name",
    [
        "ResNet of torchvision",
        "ResNet of timm",
        "EfficientNet of torchvision",
        "EfficientNet of transformers",
    ],
)
def test_running_statistics_follow_as_in_the_original(name, monkeypatch):
    """Three batches; also those of a norm that is in eval mode, which stay."""
    model, original = PAIRS[name]()
    told(monkeypatch)
    model.train()
    original.double().train()
    norms = [n for n, m in original.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    original.get_submodule("bn1" if "bn1" in norms else norms[0]).eval()
    model.bn1.eval()
    for seed in range(3):
        x = compare.random_inputs("images", model.config, 48, seed, 4)["pixel_values"]
        mx.eval(model(mx.array(x)), model.state)
        original(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).double())
    found = filled_from(model, original)
    checked = 0
    for statistic, x in engine.parameters(model).items():
        if statistic.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(x, found[statistic], rtol=2e-4, atol=2e-5, err_msg=statistic)
            checked += 1
    assert checked > 20


def filled_from(model, original):
    architecture = registry.of_model(model)
    state = {n: mx.array(x.float().numpy()) for n, x in original.state_dict().items()}
    for dialect in architecture.dialects:
        spec = architecture.spec(dialect, model.config)
        if not engine.mismatches(state, model, spec):
            return engine.to_mlx(state, model, spec)
    raise AssertionError("no dialect")


def momenta(modules):
    return [(m.momentum, m.eps) for m in modules]


QUICK = ("efficientnet_b5", "efficientnet_v2_s")
MOMENTA = {
    c.variant: c
    for c in registry.checkpoints().values()
    if c.default
    and c.architecture == "efficientnet"
    and c.reference.library in ("torchvision", "timm")
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MOMENTA],
)
def test_norms_have_the_momentum_and_epsilon_of_the_original(name):
    checkpoint = MOMENTA[name]
    with torch.device("meta"):
        original = create(checkpoint.reference, checkpoint.config)
    model = registry.architectures()["efficientnet"].model(checkpoint.config)
    theirs = [m for m in original.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    ours = [m for m in model.modules() if isinstance(m, nn.BatchNorm)]
    assert sorted(momenta(ours)) == sorted(momenta(theirs))
    assert {type(m) for m in ours} == {BatchNorm}


def test_transformers_momentum_is_read():
    said = {"model_type": "efficientnet", **MOBILE, "batch_norm_momentum": 0.25}
    config = registry.architectures()["efficientnet"].read_config(said)
    assert (config.norm_momentum, config.inner_momentum) == (0.25, 0.1)


# Chance -----------------------------------------------------------------------------------------


def test_values_and_branches_are_dropped_at_their_rate():
    mx.random.seed(0)
    x = mx.ones((4000, 50))
    y = np.array(nn.Dropout(0.3)(x))
    assert {*np.unique(y).round(5)} == {0.0, np.float32(1 / 0.7).round(5)}
    assert np.mean(y == 0) == pytest.approx(0.3, abs=0.005)
    y = np.array(DropPath(0.3)(x))
    assert np.mean(y[:, 0] == 0) == pytest.approx(0.3, abs=0.03)
    assert (y == y[:, :1]).all(), "an example's branch is dropped whole"


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_rate_of_none_or_all(p):
    assert mx.array_equal(DropPath(p)(mx.ones((5, 2))), mx.full((5, 2), 1 - p)).item()


# BatchNorm --------------------------------------------------------------------------------------


def norm(seed=0, C=6, **options):
    rng = np.random.default_rng(seed)
    layer = BatchNorm(C, **options)
    layer.weight, layer.bias = (mx.array(rng.uniform(0.5, 1.5, C), mx.float32) for _ in range(2))
    return layer


def grads(layer, x, g):
    def loss(x, weight, bias):
        layer.weight, layer.bias = weight, bias
        return (layer(x) * g).sum()

    return mx.grad(loss, argnums=(0, 1, 2))(x, layer.weight, layer.bias)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_batch_norm_is_as_exact_as_pytorchs(mean):
    """Far from zero, too, where sums one by one lose the digits that count."""
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((8, 28, 28, 6)).astype(np.float32) for _ in range(2))
    x += np.float32(mean)
    layer = norm()
    weight, bias = np.array(layer.weight), np.array(layer.bias)
    found = [layer(mx.array(x))]
    statistics = [layer.running_mean, layer.running_var]
    found += [*grads(layer, mx.array(x), mx.array(g)), *statistics]
    answers = []
    for dtype in (torch.float32, torch.float64):
        there = torch.nn.BatchNorm2d(6).to(dtype)
        there.weight.data, there.bias.data = (torch.tensor(a, dtype=dtype) for a in (weight, bias))
        inputs = torch.tensor(x, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
        y = there(inputs)
        y.backward(torch.tensor(g, dtype=dtype).permute(0, 3, 1, 2))
        images = [a.detach().permute(0, 2, 3, 1).numpy() for a in (y, inputs.grad)]
        rest = [there.weight.grad, there.bias.grad, there.running_mean, there.running_var]
        answers.append([*images, *(a.numpy() for a in rest)])
    for ours, single, double in zip(found, *answers, strict=True):
        error, theirs = (np.abs(np.array(a) - double).max() for a in (ours, single))
        assert error <= 8 * max(theirs, 2**-24 * np.abs(double).max())


def test_statistics_are_those_of_all_processes():
    """Of two with the same half of a batch: the sum over processes is twice one's own."""
    rng = np.random.default_rng(0)
    half, g = (mx.array(rng.standard_normal((3, 5, 5, 6)), mx.float32) for _ in range(2))
    whole, alone = norm(), norm()
    alone.over_processes = lambda sums: 2 * sums
    both = grads(whole, mx.concatenate([half, half]), mx.concatenate([g, g]))
    own = grads(alone, half, g)
    np.testing.assert_allclose(own[0], both[0][:3], atol=1e-6)
    np.testing.assert_allclose(2 * own[1], both[1], rtol=1e-5)  # the rest is the other's to add
    np.testing.assert_allclose(2 * own[2], both[2], rtol=1e-5)
    np.testing.assert_allclose(alone.running_var, whole.running_var, rtol=1e-6)
    np.testing.assert_allclose(alone.running_mean, whole.running_mean, atol=1e-7)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_running_statistics_stay_float32(dtype):
    x = (300 + 4 * mx.random.normal((64, 8, 8, 6))).astype(dtype)
    layer = norm(momentum=0.01)
    assert layer(x).dtype == dtype
    exact = norm(momentum=0.01)
    exact(x.astype(mx.float32))
    for name in ("running_mean", "running_var"):
        assert layer[name].dtype == mx.float32
        np.testing.assert_allclose(layer[name], exact[name], rtol=1e-6)
    assert layer.eval()(x).dtype == dtype


def test_one_value_has_no_deviation():
    with pytest.raises(ValueError, match="one value of each channel"):
        norm()(mx.ones((1, 1, 1, 6)))
    norm().eval()(mx.ones((1, 1, 1, 6)))


def test_statistics_are_no_parameters_to_train():
    layer = norm()
    layer.unfreeze()
    assert {*layer.trainable_parameters()} == {"weight", "bias"}


def test_a_dilated_convolution_is_refused():
    with pytest.raises(ValueError, match="dilation=2"):
        Conv2d(3, 4, 3, dilation=2)


def test_the_padding_token_learns_as_an_answer_alone():
    """transformers gives its embedding no gradient; a tied decoder's row has one."""
    model = mlx_zoo.load("bert_docs", task="fill-mask", pretrained=True, dtype="float32")
    ids = mx.array([[2, 5, 0, 0]])

    def loss(weight):
        model.word_embed.weight = weight
        return mx.square(model.encode(ids)).sum() * 1e-3

    found = mx.abs(mx.grad(loss)(model.word_embed.weight)).max(axis=1)
    assert found[0].item() == 0
    assert found[5].item() > 0


# Twenty steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", curves.OPTIMIZERS)
@pytest.mark.parametrize("name", curves.NETWORKS)
def test_twenty_steps_follow_pytorch(name, optimizer):
    losses = curves.train(name, optimizer)
    assert len(losses["mlx_zoo"]) == 20
    np.testing.assert_allclose(losses["mlx_zoo"], losses["PyTorch float32"], rtol=1e-4)
    assert curves.apart(losses) < 1e-4
    first, last = losses["mlx_zoo"][:2], losses["mlx_zoo"][-2:]  # of the two batches
    assert all(after < 0.9 * before for before, after in zip(first, last, strict=True))
