"""EfficientNet against torchvision, timm and transformers, every tensor randomised."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from originals import proven, randomise, saved

import mlx_zoo
from mlx_zoo import describe, registry
from mlx_zoo.mapping import engine
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402

# One of each arithmetic; checkpoint -> the original. A name both have means torchvision's.
NETWORKS = {
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "efficientnet_b0.ra_in1k": "efficientnet_b0",
    "tf_efficientnet_b0": "tf_efficientnet_b0",  # SAME padding
    "efficientnet_b1_pruned": "efficientnet_b1_pruned",  # widths of no rule
    "efficientnet_lite0": "efficientnet_lite0",  # relu6, no squeeze-and-excitation
    "tf_efficientnet_lite1": "tf_efficientnet_lite1",
    "efficientnet_em": "efficientnet_em",  # fused, without residual
    "efficientnet_v2_s": torchvision.models.efficientnet_v2_s,
    "efficientnetv2_rw_t": "efficientnetv2_rw_t",
    "tf_efficientnetv2_b1": "tf_efficientnetv2_b1",  # widths rounded another way
}
SAME_NAME = {  # another epsilon
    "efficientnet_b5": torchvision.models.efficientnet_b5,
    "efficientnet_b5.sw_in12k_ft_in1k": "efficientnet_b5",
}


def made(original, **options):
    make = original if callable(original) else lambda **o: timm.create_model(original, **o)
    return randomise(make(**options))


def images(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize(
    ("name", "original"), (NETWORKS | SAME_NAME).items(), ids=NETWORKS | SAME_NAME
)
def test_the_network_is_its_original(name, original, tmp_path):
    path = saved(made(original), tmp_path / "w.pth")
    model = mlx_zoo.load(name, pretrained=path)
    assert proven(model, size=64).layers
    one, other = model(mx.array(images(2, 64, 64, 3)))
    assert mx.abs(one - other).max().item() > 1e-2, "two images, one answer"


UNTRAINED = sorted(
    name
    for name in registry.architectures()["efficientnet"].variants
    if not registry.find(name).reference and timm.is_model(name)
)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNTRAINED)
def test_what_no_one_has_trained(name, tmp_path):
    """test_parity has the others."""
    original = made(name)
    model = mlx_zoo.load(name, pretrained=saved(original, tmp_path / "w.pth"))
    x = images(2, 64, 64, 3)
    with torch.no_grad():
        wanted = original(nchw(x)).numpy()
    np.testing.assert_allclose(model(mx.array(x)), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "original", "wrong"),
    [
        ("tf_efficientnet_b0", "tf_efficientnet_b0", {"norm_eps": 1e-5}),
        ("tf_efficientnet_b0", "tf_efficientnet_b0", {"padding": "symmetric"}),
        ("efficientnet_b0.ra_in1k", "efficientnet_b0", {"norm_eps": 1e-3}),
        ("efficientnet_b0", torchvision.models.efficientnet_b0, {"padding": "same"}),
        ("efficientnet_v2_s", torchvision.models.efficientnet_v2_s, {"norm_eps": 1e-5}),
        ("efficientnet_es", "efficientnet_es", {"act": "relu6"}),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_verification_catches_what_no_shape_shows(name, original, wrong, tmp_path):
    path = saved(made(original), tmp_path / "w.pth")
    report = mlx_zoo.verify(mlx_zoo.load(name, pretrained=path, **wrong), size=64)
    assert not report.passed
    assert report.max_abs > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 47), (64, 96), (65, 64)], ids=str)
@pytest.mark.parametrize("name", ["efficientnet_es", "tf_efficientnet_b0", "tf_efficientnetv2_b0"])
def test_any_size(name, size, tmp_path):
    original = made(name)
    model = mlx_zoo.load(name, pretrained=saved(original, tmp_path / "w.pth"))
    x = images(2, *size, 3)
    with torch.no_grad():
        wanted = original(nchw(x)).numpy()
    np.testing.assert_allclose(model(mx.array(x)), wanted, atol=1e-5 * max(1, np.abs(wanted).max()))


# transformers -----------------------------------------------------------------------------------

B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
SHORT = {
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 2, 3],
    "expand_ratios": [1, 6, 4],
}
TRANSFORMERS = {
    "b0": B0,
    "odd blocks": B0 | SHORT | {"depthwise_padding": [3], "num_channels": 2},
    "half as wide": {
        "width_coefficient": 0.5,
        "depth_coefficient": 1.2,
        "depth_divisor": 4,
        "hidden_dim": 640,
        "squeeze_expansion_ratio": 0.5,
        "batch_norm_eps": 1e-2,
        "hidden_act": "relu",
    },
}


@pytest.mark.parametrize("size", [64, 75])
@pytest.mark.parametrize("options", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformers(options, size, tmp_path):
    config = transformers.EfficientNetConfig(**options, num_labels=7)
    randomise(transformers.EfficientNetForImageClassification(config)).save_pretrained(tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert model.checkpoint.dialect == "transformers"
    proven(model, size=size)


def test_transformers_without_a_head(tmp_path):
    config = transformers.EfficientNetConfig(**B0, **SHORT)
    body = randomise(transformers.EfficientNetModel(config))
    body.save_pretrained(tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    x = images(2, 64, 64, 3)
    with torch.no_grad():
        wanted = body(nchw(x)).pooler_output
    np.testing.assert_allclose(model(mx.array(x)), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling_type": "max"}, "pooling_type='max'"),
        ({"hidden_act": "prelu"}, "hidden_act='prelu'"),
        ({"hidden_dim": 1281}, "hidden_dim=1281"),
        ({"squeeze_expansion_ratio": 0}, "squeeze_expansion_ratio=0"),
        ({"in_channels": [32, 24, 24]}, "in_channels"),
        ({"out_channels": [32, 24, 40], "in_channels": [32, 32, 24]}, "out_channels"),
        ({"kernel_sizes": [3, 4, 3]}, "kernel=4"),
        ({"strides": [1, 3, 2]}, "stride=3"),
        ({"strides": [1, 2]}, "config.json cannot be read"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_implemented_is_refused(options, message, tmp_path):
    known = {"model_type": "efficientnet", **B0, **SHORT}
    (tmp_path / "config.json").write_text(json.dumps(known | options))
    with pytest.raises(mlx_zoo.errors.UnsupportedConfig, match=message):
        mlx_zoo.load(f"local-dir:{tmp_path}")


# Features, inputs, heads ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "efficientnet_es", "tf_efficientnetv2_b0"])
def test_features_and_intermediates_are_timms(name, tmp_path):
    original = made(name)
    model = mlx_zoo.load(name, pretrained=saved(original, tmp_path / "w.pth"))
    x = images(2, 64, 96, 3)
    with torch.no_grad():
        final, maps = original.forward_intermediates(nchw(x))
        pooled = original.global_pool(final)
    ours = model.forward_intermediates(mx.array(x))
    assert [m.shape for m in ours] == [tuple(m.permute(0, 2, 3, 1).shape) for m in maps]
    assert [m.shape[1] for m in ours] == [32, 16, 8, 4, 2]
    for mine, theirs in zip(ours, maps, strict=True):
        scale = theirs.abs().max().item()
        np.testing.assert_allclose(mine, theirs.permute(0, 2, 3, 1), atol=1e-5 * scale)
    np.testing.assert_allclose(model.features(mx.array(x)), pooled, atol=1e-5)
    assert model.features(mx.array(x)).shape == (2, model.num_features)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels_as_timm_makes_them(in_chans, tmp_path):
    from timm.models import adapt_input_conv

    original = made("efficientnet_lite0")
    path = saved(original, tmp_path / "w.pth")
    model = mlx_zoo.load("efficientnet_lite0", pretrained=path, in_chans=in_chans)
    wanted = adapt_input_conv(in_chans, original.conv_stem.weight.detach())
    np.testing.assert_allclose(model.conv_stem.weight, wanted.permute(0, 2, 3, 1), atol=1e-6)
    assert model(mx.zeros((1, 32, 32, in_chans))).shape == (1, 1000)
    assert model.config.in_chans == in_chans


def test_another_head(tmp_path, caplog):
    original = made(torchvision.models.efficientnet_b0)
    path = saved(original, tmp_path / "w.pth")
    model = mlx_zoo.load("efficientnet_b0", pretrained=path, num_classes=10)
    assert "fresh head, to be trained; num_classes=10" in caplog.text
    assert model(mx.zeros((1, 32, 32, 3))).shape == (1, 10)
    np.testing.assert_array_equal(model.bn2.weight, original.features[8][1].weight.detach())
    model.reset_head(0)
    assert model(mx.zeros((1, 32, 32, 3))).shape == (1, model.num_features)
    model.reset_head(3)
    assert model(mx.zeros((1, 32, 32, 3))).shape == (1, 3)


def test_training_drops_blocks_as_timm_does():
    mx.random.seed(0)
    model = mlx_zoo.load("efficientnet_b1")
    rates = [block.drop_path.p for stage in model.blocks for block in stage]
    original = timm.create_model("efficientnet_b1", drop_path_rate=0.2)
    theirs = [getattr(b.drop_path, "drop_prob", 0.0) for stage in original.blocks for b in stage]
    np.testing.assert_allclose(rates, theirs)
    x = mx.array(images(2, 32, 32, 3))
    assert mx.array_equal(model(x), model(x))
    model.train()
    assert not mx.array_equal(model(x), model(x))


def test_fresh_weights_are_as_large_as_timms():
    """torchvision's depthwise ones are so small that 1e-14 comes out."""
    mx.random.seed(0)
    modules = dict(mlx_zoo.load("efficientnet_es").named_modules())
    for name, theirs in timm.create_model("efficientnet_es").named_modules():
        if isinstance(theirs, torch.nn.Conv2d) and theirs.weight.numel() > 2000:
            std = theirs.weight.std().item()
            assert mx.std(modules[name].weight).item() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnet_v2_s"])
def test_one_publishers_weights_in_anothers_names(name, tmp_path):
    """Out of torchvision's names into timm's; timm's own network computes the same with them."""
    original = made(getattr(torchvision.models, name))
    model = mlx_zoo.load(name, pretrained=saved(original, tmp_path / "w.pth"))
    state = original.state_dict()
    back = torch_state(mlx_zoo.export(model, tmp_path / "back.safetensors"))
    assert back.keys() == state.keys()
    assert all(torch.equal(x, state[n]) for n, x in back.items())

    options = {} if name == "efficientnet_b1" else {"bn_eps": 1e-3}
    other = timm.create_model(name.replace("_v2_", "v2_"), **options).eval()
    path = mlx_zoo.export(model, tmp_path / "timm.safetensors", dialect="timm")
    other.load_state_dict(torch_state(path), strict=True)
    x = images(2, 64, 64, 3)
    with torch.no_grad():
        wanted, found = original(nchw(x)), other(nchw(x))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * wanted.abs().max().item())


def test_a_converted_folder_knows_its_padding_and_epsilon(tmp_path):
    path = saved(made("tf_efficientnet_b0"), tmp_path / "w.pth")
    folder = mlx_zoo.convert("tf_efficientnet_b0", tmp_path / "out", path)
    model = mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    assert model.config == registry.architectures()["efficientnet"].variants["tf_efficientnet_b0"]
    proven(model, size=64)


def torch_state(path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 64, 64), r"NCHW.*transpose\(0, 2, 3, 1\)"), ((1, 64, 64, 1), "takes 3 channels")],
)
def test_wrong_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        mlx_zoo.load("efficientnet_lite0")(mx.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "valid"}, "padding='valid'"),
        ({"act": "prelu"}, "act='prelu'"),
        ({"stages": ()}, "at least one"),
        ({"stages": ({"kind": "conv"},)}, "stages.*missing"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mlx_zoo.load("efficientnet_b0", **options)


# The catalogue ----------------------------------------------------------------------------------


def test_every_published_efficientnet_is_there():
    ours = registry.checkpoints()
    names = [n for n in torchvision.models.list_models() if n.startswith("efficientnet")]
    published = [str(w) for n in names for w in torchvision.models.get_model_weights(n)]
    assert len(published) == 12
    assert set(published) <= {alias for c in ours.values() for alias in c.aliases}
    theirs = {n for n in timm.list_pretrained() if "efficientnet" in n}
    others = ("efficientnet_x_", "efficientnet_h_", "gc_", "test_")  # and conditional convolutions
    covered = {n for n in theirs if not n.startswith(others) and "_cc_" not in n}
    assert len(covered) >= 82
    assert covered <= ours.keys()


@pytest.mark.parametrize("name", ["efficientnet_v2_m", "efficientnet_v2_l", "efficientnet_b7"])
def test_torchvisions_names(name):
    with torch.device("meta"):
        original = torchvision.models.get_model(name, weights=None)
    theirs = {n: tuple(x.shape) for n, x in original.state_dict().items() if x.ndim}
    architecture = registry.architectures()["efficientnet"]
    config = registry.find(name).config
    links = engine.links(architecture.model(config), architecture.spec("torchvision", config))
    assert {link.source: link.upstream_shape for link in links} == theirs


def test_a_name_that_two_publishers_share(tmp_path):
    ours = registry.checkpoints()
    assert registry.find("efficientnet_b5").config.norm_eps == 1e-3
    assert ours["efficientnet_b5.sw_in12k"].config.norm_eps == 1e-5
    assert registry.find("EfficientNet_B5_Weights.DEFAULT").reference.library == "torchvision"
    (tmp_path / "config.json").write_text('{"architecture": "efficientnet_b5"}')
    assert mlx_zoo.info(f"local-dir:{tmp_path}").config.norm_eps == 1e-5  # timm's format
    theirs = {c.config.padding for c in ours.values() if c.name.startswith("tf_efficientnet")}
    assert theirs == {"same"}


def test_the_bundled_network_reads_digits():
    from safetensors.numpy import load_file

    from mlx_zoo.preprocess.image import preprocess

    model = mlx_zoo.load("efficientnet_digits", pretrained=True)
    held_out = load_file(describe.path_of("package:digits.safetensors"))
    x = mx.array(preprocess(list(held_out["images"]), model.checkpoint.preprocessing))
    right = np.array(model(x)).argmax(1) == held_out["labels"]
    assert 100 * right.mean() == pytest.approx(model.checkpoint.accuracy["acc1"])


def test_googles_repositories_have_the_sizes_of_the_paper():
    for name in ("b0", "b7"):
        config = registry.find(f"google/efficientnet-{name}").config
        said = {"id2label": dict.fromkeys(range(1000), "")}
        if name == "b7":  # transformers' defaults
            said |= {"depthwise_padding": [18]}
            assert registry.architectures()["efficientnet"].read_config(said) == config
        model = registry.architectures()["efficientnet"].model(config)
        assert engine.num_parameters(model) == registry.find(f"efficientnet_{name}").num_params
    assert registry.find("google/efficientnet-b2").config.symmetric_blocks == (5, 8, 16)
