"""ResNet against torchvision, timm and transformers, every tensor randomised."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from originals import proven, randomise, saved

import mlx_zoo
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


def test_features_and_intermediates_are_timms(tmp_path):
    original = randomise(timm.create_model("resnet50", pretrained=False))
    model = mlx_zoo.load("resnet50", pretrained=saved(original, tmp_path / "w.pth"))
    images = np.random.default_rng(0).standard_normal((2, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        final, maps = original.forward_intermediates(x)
        pooled = original.global_pool(final)
    ours = model.forward_intermediates(mx.array(images))
    assert [m.shape for m in ours] == [tuple(m.permute(0, 2, 3, 1).shape) for m in maps]
    for mine, theirs in zip(ours, maps, strict=True):
        np.testing.assert_allclose(mine, theirs.permute(0, 2, 3, 1), atol=2e-5)
    np.testing.assert_allclose(model.features(mx.array(images)), pooled, atol=1e-5)
    assert model.features(mx.array(images)).shape == (2, model.num_features)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_other_channels_as_timm_makes_them(in_chans, tmp_path):
    from timm.models import adapt_input_conv

    original = randomise(timm.create_model("resnet18", pretrained=False))
    path = saved(original, tmp_path / "w.pth")
    model = mlx_zoo.load("resnet18", pretrained=path, in_chans=in_chans)
    wanted = adapt_input_conv(in_chans, original.conv1.weight.detach())
    np.testing.assert_allclose(model.conv1.weight, wanted.permute(0, 2, 3, 1), atol=1e-6)
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
