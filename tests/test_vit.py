"""ViT and DeiT against timm, torchvision and transformers, every tensor randomised."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from originals import proven, randomise, saved
from safetensors.torch import load_file, save_file

import mlx_zoo
from mlx_zoo.catalogue import Reference
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.models.vit import TANH, VITS, ViT, ViTConfig, resampling
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402
from timm.layers import resample_abs_pos_embed  # noqa: E402

# One of each arithmetic, and the side of its images here: two or three patches.
ARITHMETICS = {
    "vit_tiny_patch16_224": 32,
    "vit_base_patch16_224_miil": 32,  # no bias of q, k, v
    "vit_base_patch32_clip_224": 64,  # a norm before, patches without bias, another epsilon
    "vit_base_patch32_clip_quickgelu_224": 64,
    "deit_tiny_distilled_patch16_224": 32,
    "deit3_small_patch16_224": 32,  # LayerScale, a class token without position
    "vit_small_patch14_dinov2": 28,  # LayerScale
    "vit_giant_patch14_dinov2": 28,  # SwiGLU
    "vit_small_patch14_reg4_dinov2": 28,  # registers
    "vit_giant_patch14_reg1_tipsv2": 28,
    "vit_base_patch16_radio_v3": 32,  # no final norm
    "vit_huge_patch16_radio_v4": 32,
    "vit_intern300m_patch14_448": 28,
    "vit_base_patch16_siglip_224": 48,  # attention pooling
    "vit_base_patch32_siglip_256": 64,  # and the tanh form of GELU
    "vit_so400m_patch14_siglip_384": 40,  # patches do not fill the image
    "vit_base_patch16_siglip_gap_224": 48,  # the average, the norm before it
    "vit_base_patch32_siglip_gap_256": 64,
    "vit_medium_patch16_gap_240": 48,
    "vit_wee_patch16_reg1_gap_256": 48,  # the average of patches alone, the norm after it
    "vit_so150m2_patch16_reg1_gap_256": 48,
    "vit_so150m_patch16_reg4_gap_256": 48,
}
# All of them small; the sizes of the published ones are a matter of the catalogue.
SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 4}


def small_timm(variant, **options):
    return randomise(timm.create_model(variant, **SMALL, **options))


def load(variant, original, folder, **options):
    """Our network of `variant`, as small as timm's `original`, with its weights."""
    path = saved(original, folder / "weights.pth")
    mlp_dims = original.blocks[0].mlp.fc2.in_features
    sizes = {"num_layers": 2, "dims": 96, "num_heads": 4, "mlp_dims": mlp_dims}
    return mlx_zoo.load(variant, pretrained=path, **sizes, **options)


def images(size, batch=2, channels=3, seed=0):
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, height, width, channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nchw(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("variant", ARITHMETICS)
def test_the_network_is_timms(variant, tmp_path):
    sizes = {"img_size": ARITHMETICS[variant], "num_classes": 7}
    original = small_timm(variant, **sizes)
    model = load(variant, original, tmp_path, **sizes)
    reference = Reference("timm", variant, {**SMALL, **sizes})
    model.checkpoint = replace(model.checkpoint, reference=reference)
    report = proven(model)
    layers = {layer.name for layer in report.layers}
    leaves = {"weight", "bias", "gamma"}
    with_weights = [
        m for m in original.modules() if leaves & {n for n, _ in m.named_parameters(recurse=False)}
    ]
    assert len(layers) >= len(with_weights)

    x = images(ARITHMETICS[variant], seed=1)
    with torch.no_grad():
        wanted = original(nchw(x))
        tokens, maps = original.forward_intermediates(nchw(x))
        pooled = original.forward_head(tokens, pre_logits=True)
    np.testing.assert_allclose(model(mx.array(x)), wanted, atol=1e-5)
    np.testing.assert_allclose(model.encode(mx.array(x)), tokens, atol=2e-5)
    np.testing.assert_allclose(model.features(mx.array(x)), pooled, atol=1e-5)
    for mine, theirs in zip(model.forward_intermediates(mx.array(x)), maps, strict=True):
        np.testing.assert_allclose(mine, theirs.permute(0, 2, 3, 1), atol=2e-5)
    assert mx.abs(model(mx.array(x))[0] - model(mx.array(x))[1]).max() > 1e-2


ACTS = {"GELU": "gelu", "GELUTanh": TANH["act"], "QuickGELU": "quick_gelu", "SiLU": "silu"}


def test_what_no_shape_shows():
    """Heads, epsilons, activations and pooling of every variant; the rest is in the catalogue."""
    timms = VITS.keys() & {*timm.list_models()}
    assert len(timms) == 134
    for variant in timms:
        config = VITS[variant]
        with torch.device("meta"):
            original = timm.create_model(variant, depth=1)
        (block,) = original.blocks
        theirs = {
            "heads": block.attn.num_heads,
            "pool": original.global_pool,
            "act": ACTS[type(block.mlp.act).__name__],
            "eps": {m.eps for m in original.modules() if isinstance(m, torch.nn.LayerNorm)},
            "size": original.patch_embed.img_size,
            "prefix": original.num_prefix_tokens,
            "gated": getattr(block.mlp, "gate_last", None) is False,
        }
        if config.pool == "map":
            assert original.attn_pool.num_heads == config.num_heads
        assert theirs == {
            "heads": config.num_heads,
            "pool": config.pool,
            "act": config.act,
            "eps": {config.norm_eps},
            "size": config.size,
            "prefix": config.num_prefix_tokens,
            "gated": config.gated,
        }, variant


@pytest.mark.parametrize("old", [False, True], ids=["mlp.0", "mlp.linear_1"])
def test_the_network_is_torchvisions(old, tmp_path):
    sizes = {"image_size": 64, "num_classes": 7}
    original = torchvision.models.VisionTransformer(
        patch_size=32, num_layers=2, num_heads=4, hidden_dim=96, mlp_dim=128, **sizes
    )
    state = randomise(original).state_dict()
    if old:
        state = {k.replace("mlp.0", "mlp.linear_1"): x for k, x in state.items()}
        state = {k.replace("mlp.3", "mlp.linear_2"): x for k, x in state.items()}
    torch.save(state, tmp_path / "weights.pth")
    sizes = {"num_layers": 2, "num_heads": 4, "dims": 96, "mlp_dims": 128}
    model = mlx_zoo.load("vit_b_32", tmp_path / "weights.pth", img_size=64, num_classes=7, **sizes)
    assert model.checkpoint.dialect == "torchvision" + (", old mlp names" if old else "")
    x = images(64)
    with torch.no_grad():
        wanted = original(nchw(x)).numpy()
    np.testing.assert_allclose(model(mx.array(x)), wanted, atol=1e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2


@pytest.mark.slow
def test_torchvision_layer_by_layer(tmp_path):
    original = randomise(torchvision.models.vit_b_32())
    proven(mlx_zoo.load("vit_b_32", saved(original, tmp_path / "weights.pth")))


def small(kind, **options):
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "image_size": 24,
        "patch_size": 8,
        "num_labels": 5,
    }
    return getattr(transformers, f"{kind}Config")(**{**sizes, **options})


NEW = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def rename(folder, *, new):
    """Rewrite the tensors' names as transformers does since version 5, or did before."""

    def to(name):
        for classic, since in NEW.items():
            name = name.replace(classic, since) if new else name
        return name

    state = load_file(folder / "model.safetensors")
    assert any("attention.attention.query" in name for name in state), "classic names are saved"
    state = {to(name): x for name, x in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("new", [False, True], ids=["classic names", "names since 5"])
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("ViT", "ForImageClassification"),
        ("DeiT", "ForImageClassification"),
        ("DeiT", "ForImageClassificationWithTeacher"),
        ("ViT", "Model"),
        ("DeiT", "Model"),
    ],
)
def test_the_network_is_transformers(kind, head, new, tmp_path):
    original = randomise(getattr(transformers, kind + head)(small(kind)))
    original.save_pretrained(tmp_path)
    rename(tmp_path, new=new)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert model.checkpoint.dialect.endswith("since 5") == new
    x = images(24)
    with torch.no_grad():
        theirs = original(nchw(x))
    if head == "Model":
        wanted = theirs.last_hidden_state
        np.testing.assert_allclose(model.encode(mx.array(x)), wanted, atol=1e-5)
        np.testing.assert_allclose(model(mx.array(x)), wanted[:, 0], atol=1e-5)
        return
    np.testing.assert_allclose(model(mx.array(x)), theirs.logits, atol=1e-5)
    proven(model)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 0.1},
        {"qkv_bias": False},
        {"image_size": [16, 40]},
        {"patch_size": [8, 8]},
        {"num_channels": 1},
        {"num_attention_heads": 1},
        {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    ],
    ids=str,
)
def test_attributes_that_change_the_arithmetic(options, tmp_path):
    config = small("ViT", **options)
    randomise(transformers.ViTForImageClassification(config)).save_pretrained(tmp_path)
    proven(mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True))


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "prelu"},
        {"patch_size": [8, 4]},
        {"head_dim": 16},
        {"pruned_heads": {"0": [1]}},
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(options, tmp_path):
    config = small("ViT").to_dict()
    small("ViT").save_pretrained(tmp_path)
    config = {**config, "model_type": "vit", **options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedConfig, match=next(iter(options))):
        mlx_zoo.load(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("size", [16, 32, 48, 112, 208, (16, 64), (96, 32), (80, 33)], ids=str)
@pytest.mark.parametrize("variant", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_positions_are_resampled_as_timm_does(variant, size, tmp_path):
    original = small_timm(variant, img_size=112)
    model = load(variant, original, tmp_path, img_size=112)
    model.reset_size(size)
    height, width = (size, size) if isinstance(size, int) else size
    positions = resample_abs_pos_embed(
        original.pos_embed.detach(),
        [height // 16, width // 16],
        [7, 7],
        num_prefix_tokens=0 if original.no_embed_class else original.num_prefix_tokens,
    )
    np.testing.assert_allclose(model.pos_embed, positions, atol=3e-6)
    assert model.config.img_size == size
    assert model(mx.array(images(size))).shape == (2, 1000)


def test_a_resized_network_answers_as_timms(tmp_path):
    original = small_timm("vit_tiny_patch16_224", img_size=48)
    model = load("vit_tiny_patch16_224", original, tmp_path, img_size=48)
    original.set_input_size((64, 32))
    model.reset_size((64, 32))
    x = images((64, 32))
    with torch.no_grad():
        wanted = original(nchw(x)).numpy()
    np.testing.assert_allclose(model(mx.array(x)), wanted, atol=1e-5)
    before = np.array(model.pos_embed)
    model.reset_size((64, 32))
    np.testing.assert_array_equal(model.pos_embed, before)


@pytest.mark.parametrize(("old", "new"), [(7, 7), (7, 14), (14, 7), (37, 16), (1, 3), (5, 1)])
def test_resampling_keeps_what_is_even(old, new):
    matrix = np.array(resampling(old, new))
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    if old == new:
        np.testing.assert_allclose(matrix, np.eye(old), atol=1e-7)


@pytest.mark.parametrize("in_chans", [1, 2, 4])
def test_other_channels_as_timm_makes_them(in_chans, tmp_path):
    from timm.models import adapt_input_conv

    original = small_timm("vit_tiny_patch16_224", img_size=32)
    model = load("vit_tiny_patch16_224", original, tmp_path, img_size=32, in_chans=in_chans)
    wanted = adapt_input_conv(in_chans, original.patch_embed.proj.weight.detach())
    np.testing.assert_allclose(model.patch_embed.weight, wanted.permute(0, 2, 3, 1), atol=1e-6)
    assert model(mx.zeros((1, 32, 32, in_chans))).shape == (1, 1000)
    assert model.config.in_chans == in_chans


@pytest.mark.parametrize("variant", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_another_head(variant, tmp_path, caplog):
    original, x = small_timm(variant, img_size=32), images(32)
    model = load(variant, original, tmp_path, img_size=32, num_classes=10)
    assert model(mx.array(x)).shape == (2, 10)
    assert "fresh head, to be trained; num_classes=10" in caplog.text
    model.reset_head(0)
    with torch.no_grad():
        pooled = original.forward_head(original.forward_features(nchw(x)), pre_logits=True)
    np.testing.assert_allclose(model(mx.array(x)), pooled, atol=1e-5)
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert not {name for name in names if name.startswith("head")}
    model.reset_head(3)
    assert model(mx.array(x)).shape == (2, 3)
    assert ("head_dist" in model) == ("distilled" in variant)


def test_siglips_averaging_networks_leave_the_attention_pooling_out(tmp_path):
    variant = "vit_base_patch16_siglip_gap_224"
    mapped = small_timm("vit_base_patch16_siglip_224", img_size=32)
    averaged = timm.create_model(variant, **SMALL, img_size=32, num_classes=0).eval()
    averaged.load_state_dict(mapped.state_dict(), strict=False)
    model = load(variant, mapped, tmp_path, img_size=32, num_classes=0)
    x = images(32)
    with torch.no_grad():
        wanted = averaged(nchw(x))
    np.testing.assert_allclose(model(mx.array(x)), wanted, atol=1e-5)


@pytest.mark.parametrize("variant", ["vit_base_patch16_siglip_224", "deit3_small_patch16_224"])
def test_export_gives_timms_tensors_back(variant, tmp_path):
    original = small_timm(variant, img_size=32)
    model = load(variant, original, tmp_path, img_size=32)
    state = load_file(mlx_zoo.export(model, tmp_path / "back.safetensors"))
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in original.state_dict().items())
    model.reset_size((48, 32))
    state = load_file(mlx_zoo.export(model, tmp_path / "back.safetensors"))
    original.set_input_size((48, 32))
    original.load_state_dict(state, strict=True)


def test_a_folder_in_timms_format(tmp_path):
    args = {"depth": 2, "num_heads": 6, "reg_tokens": 2, "init_values": 0.1, "img_size": [32, 48]}
    args |= {"global_pool": "avg", "class_token": False, "no_embed_class": True}
    original = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=5, **args))
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": args}
    config |= {"global_pool": "avg", "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert model.config.img_size == (32, 48)
    assert model.config.norms_pooled, "as timm has it after an average"
    x = images((32, 48))
    with torch.no_grad():
        wanted = original(nchw(x))
    np.testing.assert_allclose(model(mx.array(x)), wanted, atol=1e-5)

    config["model_args"] = {**args, "qk_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedConfig, match="qk_norm"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)


TINY = ViTConfig(img_size=16, patch_size=8, dims=16, num_layers=3, num_heads=2, mlp_dims=32)


def test_dropout_and_stochastic_depth_act_in_training_only():
    config = replace(TINY, dropout=0.2, attention_dropout=0.2, drop_path=0.5)
    model, x = ViT(config), mx.array(images(16))
    assert [block.drop_path.p for block in model.blocks] == [0, 0.25, 0.5]
    assert not mx.array_equal(model(x), model(x)).item()
    model.eval()
    assert mx.array_equal(model(x), model(x)).item()


def test_stochastic_depth_drops_whole_samples():
    from mlx_zoo.models.layers import DropPath

    x = mx.ones((4000, 3, 2))
    y = np.array(DropPath(0.25)(x)).reshape(4000, 6)
    assert ((y == 0).all(axis=1) | np.isclose(y, 4 / 3).all(axis=1)).all()
    assert abs(y.mean() - 1) < 0.05
    assert (np.array(DropPath(1.0)(x)) == 0).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 24, 24, 3), r"24 x 24 pixels: this network takes 16 x 16.*img_size=24"),
        ((1, 16, 24, 3), r"16 x 24 pixels.*img_size=\(16, 24\)"),
        ((1, 3, 16, 16), r"NCHW.*transpose\(0, 2, 3, 1\)"),
        ((16, 16, 3), r"images\[None\]"),
    ],
)
def test_wrong_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        ViT(TINY)(mx.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 4}, "img_size=4"),
        ({"img_size": (16, 4)}, "img_size=4"),
        ({"num_heads": 3}, "16 dims do not divide among 3 heads"),
        ({"pool": "max"}, "pool='max'"),
        ({"class_token": False}, "class token"),
        ({"dist_head": True}, "dist_token"),
        ({"act": "prelu"}, "act='prelu'"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
    ids=str,
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)


def test_every_published_vit_is_there():
    from mlx_zoo import registry

    ours, variants = registry.checkpoints(), registry.architectures()["vit"].variants
    published = [
        str(weights)
        for name in torchvision.models.list_models(module=torchvision.models)
        if name in variants
        for weights in torchvision.models.get_model_weights(name)
    ]
    assert len(published) == 10
    assert set(published) <= {alias for c in ours.values() for alias in c.aliases}
    tags = {name for name in timm.list_pretrained() if name.partition(".")[0] in variants}
    assert len(tags) >= 280
    missing = tags - ours.keys()
    assert all(name.endswith("_ijepa") for name in missing), missing  # of no repository
