"""ResNet against torchvision, timm and transformers, every tensor randomised."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from originals import proven, randomise, saved
from safetensors.torch import save_file

import mlx_zoo
from mlx_zoo.specs.resnet import from_transformers
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402

TRANSFORMERS = {
    "resnet-18": {
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "resnet-50": {},
    "v1": {"depths": [1, 1, 2, 1], "downsample_in_bottleneck": True},
    "strided": {"depths": [1, 2, 1, 1], "downsample_in_first_stage": True, "embedding_size": 32},
    "three stages, silu": {
        "depths": [1, 1, 1],
        "hidden_sizes": [64, 96, 128],
        "hidden_act": "silu",
        "num_channels": 2,
    },
}


@pytest.mark.parametrize("options", TRANSFORMERS.values(), ids=TRANSFORMERS)
@pytest.mark.parametrize("head", [True, False], ids=["classifier", "body"])
def test_transformers(options, head, tmp_path):
    config = transformers.ResNetConfig(**options, num_labels=7)
    kind = transformers.ResNetForImageClassification if head else transformers.ResNetModel
    randomise(kind(config)).save_pretrained(tmp_path)
    if not head:
        model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
        images = np.random.default_rng(0).standard_normal(
            (2, 64, 64, config.num_channels), np.float32
        )
        with torch.no_grad():
            original = kind.from_pretrained(tmp_path).eval()
            wanted = original(torch.from_numpy(images.transpose(0, 3, 1, 2))).pooler_output
        np.testing.assert_allclose(model(mx.array(images)), wanted[:, :, 0, 0], atol=1e-5)
        return
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert model.checkpoint.dialect == "transformers"
    proven(model, size=64)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 47), (96, 160), (224, 224)], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_any_size(name, size, tmp_path):
    original = randomise(torchvision.models.get_model(name, weights=None))
    model = mlx_zoo.load(name, pretrained=saved(original, tmp_path / "w.pth"))
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = original(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits = np.array(model(mx.array(images)))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2, "two images, one answer"


def of_timm(name, folder):
    """timm's network with few blocks and every tensor random, in a folder as timm writes them."""
    original = randomise(timm.create_model(name, layers=(2, 1, 1, 1), num_classes=7))
    config = {"architecture": name, "num_classes": 7, "model_args": {"layers": [2, 1, 1, 1]}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(original.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return original


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "resnet18d",
        "resnet26t",
        "resnet50c",
        "resnet50s",
        "resnet50_gn",
        "resnetaa50",
        "resnetaa50d",
        "resnetblur50",
        "resnetrs50",
        "resnext50d_32x4d",
        "seresnet50",
    ],
)
def test_timms_variants(name, tmp_path):
    original = of_timm(name, tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    proven(model, size=64)

    size = (31, 66) if "aa" in name else (33, 47)
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        wanted, (final, maps) = original(x), original.forward_intermediates(x)
        pooled = original.global_pool(final)
    logits = np.array(model(mx.array(images)))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2, "two images, one answer"
    for mine, theirs in zip(model.forward_intermediates(mx.array(images)), maps, strict=True):
        np.testing.assert_allclose(mine, theirs.permute(0, 2, 3, 1), atol=2e-5)
    features = model.features(mx.array(images))
    np.testing.assert_allclose(features, pooled, atol=1e-5)
    assert features.shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnetaa50", (33, 47), r"\(2, 1, 2, 2048\) .*multiples of 32"),
        ("resnetaa50d", (35, 35), "multiples of 32"),
        ("resnetblur50", (16, 32), "larger images"),
    ],
)
def test_sizes_that_timm_refuses_too(name, size, message, tmp_path):
    original = of_timm(name, tmp_path)
    with pytest.raises(RuntimeError):
        original(torch.zeros(2, 3, *size))
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(ValueError, match=message):
        model(mx.zeros((2, *size, 3)))


@pytest.mark.parametrize(
    "options",
    [
        {"block": "basic", "groups": 32},
        {"stem": "deeper"},
        {"anti_alias": "blur", "stem_pool": "conv"},
        {"anti_alias": "average", "stride_in_1x1": True},
        {"norm": "layer"},
        {"se_ratio": 16.0},
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        mlx_zoo.load("resnet50", **options)


def test_stochastic_depth():
    model = mlx_zoo.load("resnet18", drop_path=1.0)
    rates = [b.drop_path.p for i in range(4) for b in model[f"layer{i + 1}"]]
    np.testing.assert_allclose(rates, np.linspace(0, 1, 8))
    x = mx.random.uniform(shape=(2, 4, 4, 512))
    last = model.layer4[1]
    assert mx.abs(last(x) - x).max().item() > 1e-2
    assert mx.array_equal(last.train()(x), x)


def test_microsofts_repositories_are_known():
    for depth in (18, 26, 34, 50, 101, 152):
        known = mlx_zoo.info(f"microsoft/resnet-{depth}")
        assert known.name == mlx_zoo.info(f"resnet-{depth}").name
        assert known.config == mlx_zoo.info(f"resnet{depth}").config
        assert known.source == f"hf-hub:microsoft/resnet-{depth}"
    fifty = transformers.ResNetConfig(num_labels=1000)  # the library's defaults
    assert from_transformers(fifty.to_dict()) == mlx_zoo.info("microsoft/resnet-50").config


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_other_channels_as_timm_makes_them(name, in_chans, tmp_path):
    from timm.models import adapt_input_conv

    original = randomise(timm.create_model(name, layers=(1, 1, 1, 1)))
    path = saved(original, tmp_path / "w.pth")
    model = mlx_zoo.load(name, pretrained=path, depths=(1, 1, 1, 1), in_chans=in_chans)
    ours, theirs = (n.conv1 if name == "resnet18" else n.conv1[0] for n in (model, original))
    wanted = adapt_input_conv(in_chans, theirs.weight.detach())
    np.testing.assert_allclose(ours.weight, wanted.permute(0, 2, 3, 1), atol=1e-6)
    assert model(mx.zeros((1, 32, 32, in_chans))).shape == (1, 1000)
    assert model.config.in_chans == in_chans


def test_another_head(tmp_path, caplog):
    original = randomise(torchvision.models.resnet18())
    path = saved(original, tmp_path / "w.pth")
    model = mlx_zoo.load("resnet18", pretrained=path, num_classes=10)
    assert model(mx.zeros((1, 64, 64, 3))).shape == (1, 10)
    assert "fresh head, to be trained; num_classes=10" in caplog.text
    np.testing.assert_array_equal(
        model.conv1.weight, original.conv1.weight.detach().permute(0, 2, 3, 1)
    )

    own = randomise(torchvision.models.resnet18(num_classes=10), seed=1)
    path = saved(own, tmp_path / "ten.pth")
    model = mlx_zoo.load("resnet18", pretrained=path, num_classes=10)  # its own head is kept
    np.testing.assert_array_equal(model.fc.weight, own.fc.weight.detach())
    with pytest.raises(mlx_zoo.errors.MappingError, match=r"\(10, 512\).*another num_classes"):
        mlx_zoo.load("resnet18", pretrained=path)

    model.reset_head(0)
    assert model(mx.zeros((1, 64, 64, 3))).shape == (1, 512)
    model.reset_head(3)
    assert model(mx.zeros((1, 64, 64, 3))).shape == (1, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (mx.zeros((1, 3, 64, 64)), r"NCHW.*transpose\(0, 2, 3, 1\)"),
        (mx.zeros((1, 64, 64, 3), dtype=mx.uint8), "uint8.*floats"),
        (mx.zeros((64, 64, 3)), r"images\[None\]"),
        (mx.zeros((1, 64, 64, 1)), "takes 3 channels, not 1"),
        (mx.zeros((0, 64, 64, 3)), "empty"),
        (mx.zeros((64,)), "batch"),
    ],
)
def test_wrong_images_are_refused(images, message):
    model = mlx_zoo.load("resnet18")
    with pytest.raises(ValueError, match=message):
        model(images)


def test_an_unknown_attribute_is_refused(tmp_path):
    config = transformers.ResNetConfig(depths=[1], hidden_sizes=[64], layer_type="basic")
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"relu"', '"prelu"'))
    with pytest.raises(mlx_zoo.errors.UnsupportedConfig, match="hidden_act='prelu'"):
        mlx_zoo.load(f"local-dir:{tmp_path}")
