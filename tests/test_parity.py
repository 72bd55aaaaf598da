"""Every image network of the registry against its original, every tensor randomised.

A new architecture is picked up here without a line of test code.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from originals import proven, randomise, saved

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.mapping import engine
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402

IMAGE_NETWORKS = [
    pytest.param(c, id=c.variant, marks=pytest.mark.slow if c.num_params > 1.5e8 else ())
    for c in registry.checkpoints().values()
    if c.default and c.reference and c.reference.library in ("torchvision", "timm")
]


@pytest.mark.parametrize("checkpoint", IMAGE_NETWORKS)
def test_the_network_is_its_original(checkpoint, tmp_path):
    reference, config = checkpoint.reference, checkpoint.config
    options = {"num_classes": config.num_classes, **reference.options}
    if reference.library == "torchvision":
        original = torchvision.models.get_model(reference.name, weights=None, **options)
    else:
        original = timm.create_model(reference.name, in_chans=config.in_chans, **options)
    path = saved(randomise(original), tmp_path / "weights.pth")
    report = proven(mlx_zoo.load(checkpoint.variant, pretrained=path), size=64)
    with_weights = [
        name for name, m in original.named_modules() if list(m.parameters(recurse=False))
    ]
    assert len(report.layers) >= len(with_weights)


def test_two_images_get_two_answers(tmp_path):
    original = randomise(torchvision.models.resnet18())
    model = mlx_zoo.load("resnet18", pretrained=saved(original, tmp_path / "weights.pth"))
    one, other = model(mx.random.normal((2, 64, 64, 3)))
    assert mx.abs(one - other).max().item() > 1e-2


@pytest.mark.parametrize("name", registry.checkpoints())
def test_every_checkpoint_builds_with_its_published_size(name):
    checkpoint = mlx_zoo.info(name)
    architecture = registry.architectures()[checkpoint.architecture]
    model = architecture.model(checkpoint.config)  # lazy: nothing is allocated
    assert checkpoint.num_params in (None, engine.num_parameters(model))
    assert checkpoint.source
    assert checkpoint.reference
    assert checkpoint.license or name == "resnet50.bamboo"


def test_every_published_resnet_is_there():
    ours = registry.checkpoints()
    variants = registry.architectures()["resnet"].variants
    published = [
        str(weights)
        for name in torchvision.models.list_models(module=torchvision.models)
        if name in variants
        for weights in torchvision.models.get_model_weights(name)
    ]
    assert len(published) == 17
    assert set(published) <= {alias for c in ours.values() for alias in c.aliases}
    tags = {name for name in timm.list_pretrained() if name.partition(".")[0] in variants}
    assert len(tags) >= 78
    assert tags <= ours.keys()


def test_float16_weights_are_kept_and_close(tmp_path):
    original = randomise(torchvision.models.resnet18())
    path = saved(original, tmp_path / "weights.pth")
    for dtype in ("float16", "bfloat16"):
        report = mlx_zoo.verify("resnet18", path, dtype=dtype, size=64)
        assert report.tolerance == 1e-2
        assert report.passed, report.reason
