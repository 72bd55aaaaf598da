"""Vision transformers: ViT, DeiT, DINOv2, and the image towers of CLIP and SigLIP.

An Image is Worth 16x16 Words (Dosovitskiy et al. 2020, arXiv:2010.11929), DeiT (Touvron et al.
2020, arXiv:2012.12877), CLIP (Radford et al. 2021, arXiv:2103.00020), LayerScale (Touvron et al.
2021, arXiv:2103.17239), SigLIP (Zhai et al. 2023, arXiv:2303.15343), DINOv2 (Oquab et al. 2023,
arXiv:2304.07193), registers (Darcet et al. 2023, arXiv:2309.16588).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend import ops
from mlx_zoo.models.layers import (
    ACTIVATIONS,
    MLP,
    Attention,
    DropPath,
    LayerNorm,
    as_images,
    check_choice,
    check_count,
    check_transformer,
    other_channels,
)

POOLINGS = ("token", "avg", "map")


@dataclass(frozen=True)
class ViTConfig:
    img_size: int | tuple[int, int] = 224  # of a square, or (H, W)
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0 leaves the head out
    dims: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dims: int = 3072
    act: str = "gelu"
    gated: bool = False  # SwiGLU, where `act` is silu
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    class_token: bool = True
    dist_token: bool = False  # DeiT's second token, which learns from a teacher,
    dist_head: bool = False  # and its classifier
    num_registers: int = 0  # tokens that carry no patch and are read by nobody
    patch_positions_only: bool = False  # the tokens before the patches have no position
    pre_norm: bool = False  # CLIP: a norm before the blocks, and patches without a bias
    layer_scale: float | None = None  # what a fresh LayerScale starts from; None: there is none
    pool: str = "token"  # the class token; or "avg" of the patches, or "map": attention pooling
    final_norm: bool = True
    fc_norm: bool | None = None  # the final norm is that of the pooled; None: if pool is "avg"
    dropout: float = 0.0  # of what attention and the MLP give, and of the embedded tokens
    embed_dropout: float | None = None  # of these; None: as `dropout`
    mlp_dropout: float = 0.0  # between the MLP's layers, where transformers has none
    attention_dropout: float = 0.0
    head_dropout: float = 0.0  # of the pooled, before the head
    drop_path: float = 0.0  # of the last block; it grows linearly from 0

    def __post_init__(self):
        check_transformer(self)
        check_choice("pool", self.pool, POOLINGS)
        check_count("patch_size", self.patch_size, 1, most=2**20)
        check_count("in_chans", self.in_chans, 1, most=2**20)
        check_count("num_registers", self.num_registers, most=2**20)
        height, width = self.size
        check_count("img_size", height, self.patch_size, most=2**20)
        check_count("img_size", width, self.patch_size, most=2**20)
        check_count("the number of patches", math.prod(self.grid), 1, most=2**20)
        if height == width:  # equal configs are equal values
            object.__setattr__(self, "img_size", height)
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool='token' needs the class token")
        if self.dist_head and (not self.dist_token or self.pool != "token" or self.norms_pooled):
            raise ValueError("dist_head needs dist_token, pool='token', and no fc_norm")

    @property
    def size(self) -> tuple[int, int]:
        """Of the images: (H, W)."""
        return (self.img_size,) * 2 if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> tuple[int, int]:
        """How many patches fit, downwards and across; the rest of the image is not seen."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.dist_token + self.num_registers

    @property
    def norms_pooled(self) -> bool:
        return self.pool == "avg" if self.fc_norm is None else self.fc_norm


SIZES = {  # dims, blocks, heads, hidden dims of the MLP
    "tiny": (192, 12, 3, 768),
    "xsmall": (256, 10, 4, 1024),
    "wee": (256, 14, 4, 1280),
    "little": (320, 14, 5, 1792),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "mediumd": (512, 20, 8, 2048),
    "betwixt": (640, 12, 10, 2560),
    "base": (768, 12, 12, 3072),
    "so150m2": (832, 21, 13, 2176),
    "so150m": (896, 18, 14, 2304),
    "large": (1024, 24, 16, 4096),
    "intern300m": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}


def vit(size: str, patch_size: int, img_size: int, **options: Any) -> ViTConfig:
    dims, num_layers, num_heads, mlp_dims = SIZES[size]
    sizes = {"dims": dims, "num_layers": num_layers, "num_heads": num_heads, "mlp_dims": mlp_dims}
    options = {"patch_size": patch_size, "img_size": img_size, **sizes, **options}
    return ViTConfig(**options)


def named(pattern: str, rows: str, **options: Any) -> dict[str, ViTConfig]:
    """The networks of one family by timm's names. A row is size/patch/image."""
    family = {}
    for row in rows.split():
        size, patch, img = row.split("/")
        name = pattern.format(size=size, patch=patch, img=img)
        family[name] = vit(size, int(patch), int(img), **options)
    return family


DEIT3: dict[str, Any] = {"layer_scale": 1e-6, "patch_positions_only": True}
CLIP: dict[str, Any] = {"pre_norm": True, "norm_eps": 1e-5}
SIGLIP: dict[str, Any] = {"class_token": False, "pool": "map"}
SIGLIP_GAP: dict[str, Any] = {"class_token": False, "pool": "avg", "fc_norm": False}
TANH = {"act": "gelu_pytorch_tanh"}
DINO = {"layer_scale": 1e-5}
TIPS = {"layer_scale": 1.0, "num_registers": 1, "patch_positions_only": True}
RADIO: dict[str, Any] = {"patch_positions_only": True, "final_norm": False}
SWIGLU: dict[str, Any] = {
    "dims": 1536,
    "num_heads": 24,
    "mlp_dims": 4096,
    "act": "silu",
    "gated": True,
}
AVERAGED: dict[str, Any] = {"class_token": False, "pool": "avg", "layer_scale": 1e-5}
REGISTERS = {**AVERAGED, "patch_positions_only": True}

VITS = {
    "vit_b_16": vit("base", 16, 224),  # torchvision's names
    "vit_b_32": vit("base", 32, 224),
    "vit_l_16": vit("large", 16, 224),
    "vit_l_32": vit("large", 32, 224),
    "vit_h_14": vit("huge", 14, 224),
    **named(
        "vit_{size}_patch{patch}_{img}",
        "tiny/16/224 tiny/16/384 small/8/224 small/16/224 small/16/384 small/32/224 small/32/384 "
        "base/8/224 base/16/224 base/16/384 base/32/224 base/32/384 "
        "large/16/224 large/16/384 large/32/224 large/32/384 huge/14/224",
    ),
    **named("vit_{size}_patch{patch}_{img}_miil", "base/16/224", qkv_bias=False),
    **named("deit_{size}_patch{patch}_{img}", "tiny/16/224 small/16/224 base/16/224 base/16/384"),
    **named(
        "deit_{size}_distilled_patch{patch}_{img}",
        "tiny/16/224 small/16/224 base/16/224 base/16/384",
        dist_token=True,
        dist_head=True,
    ),
    **named(
        "deit3_{size}_patch{patch}_{img}",
        "small/16/224 small/16/384 medium/16/224 base/16/224 base/16/384 "
        "large/16/224 large/16/384 huge/14/224",
        **DEIT3,
    ),
    **named(
        "vit_{size}_patch{patch}_clip_{img}",
        "xsmall/16/224 medium/16/224 medium/32/224 betwixt/32/224 "
        "base/16/224 base/16/384 base/32/224 base/32/256 base/32/384 base/32/448 "
        "large/14/224 large/14/336 huge/14/224 huge/14/336 huge/14/378 "
        "giant/14/224 gigantic/14/224 gigantic/14/378",
        **CLIP,
    ),
    **named(
        "vit_{size}_patch{patch}_plus_clip_{img}",
        "base/16/240",
        **CLIP,
        dims=896,
        num_heads=14,
        mlp_dims=3584,
    ),
    **named(
        "vit_{size}_patch{patch}_clip_quickgelu_{img}",
        "base/16/224 base/32/224 large/14/224 large/14/336 huge/14/224 huge/14/378 gigantic/14/224",
        **CLIP,
        act="quick_gelu",
    ),
    **named("vit_{size}_patch{patch}_dinov2", "small/14/518 base/14/518 large/14/518", **DINO),
    **named("vit_{size}_patch{patch}_dinov2", "giant/14/518", **DINO, **SWIGLU),
    **named(
        "vit_{size}_patch{patch}_reg4_dinov2",
        "small/14/518 base/14/518 large/14/518",
        **DINO,
        num_registers=4,
        patch_positions_only=True,
    ),
    **named(
        "vit_{size}_patch{patch}_reg4_dinov2",
        "giant/14/518",
        **DINO,
        **SWIGLU,
        num_registers=4,
        patch_positions_only=True,
    ),
    **named(
        "vit_{size}_patch{patch}_reg1_tipsv2", "base/14/448 large/14/448 so400m/14/448", **TIPS
    ),
    **named("vit_{size}_patch{patch}_reg1_tipsv2", "giant/14/448", **TIPS, **SWIGLU),
    **named(
        "vit_{size}_patch{patch}_radio_v3",
        "base/16/512 large/16/512",
        **RADIO,
        num_registers=7,
        layer_scale=1e-5,
    ),
    **named("vit_{size}_patch{patch}_radio_v3", "huge/16/512", **RADIO, num_registers=7),
    **named(
        "vit_{size}_patch{patch}_radio_v3",
        "giant/16/512",
        **RADIO,
        num_registers=7,
        dims=1536,
        num_heads=24,
    ),
    **named(
        "vit_{size}_patch{patch}_radio_v4",
        "so400m/16/512 huge/16/512",
        **RADIO,
        num_registers=9,
    ),
    **named(
        "vit_{size}_patch{patch}_{img}", "intern300m/14/448", layer_scale=0.1, final_norm=False
    ),
    **named(
        "vit_{size}_patch{patch}_siglip_{img}",
        "base/16/224 base/16/256 base/16/384 base/16/512 large/16/256 large/16/384 "
        "so400m/14/224 so400m/14/378 so400m/14/384",
        **SIGLIP,
    ),
    **named(
        "vit_{size}_patch{patch}_siglip_{img}",
        "base/32/256 large/16/512 so400m/16/256 so400m/16/384 so400m/16/512 "
        "giantopt/16/256 giantopt/16/384",
        **SIGLIP,
        **TANH,
    ),
    **named(
        "vit_{size}_patch{patch}_siglip_gap_{img}",
        "base/16/224 base/16/256 base/16/384 base/16/512 large/16/256 large/16/384 "
        "so400m/14/224 so400m/14/378 so400m/14/384 so400m/14/448 so400m/14/896",
        **SIGLIP_GAP,
    ),
    **named(
        "vit_{size}_patch{patch}_siglip_gap_{img}",
        "base/32/256 large/16/512 so400m/16/256 so400m/16/384 so400m/16/512 "
        "giantopt/16/256 giantopt/16/384",
        **SIGLIP_GAP,
        **TANH,
    ),
    **named(
        "vit_{size}_patch{patch}_gap_{img}",
        "medium/16/240 medium/16/256 medium/16/384",
        **SIGLIP_GAP,
        qkv_bias=False,
        layer_scale=1e-6,
    ),
    **named(  # I-JEPA's
        "vit_{size}_patch{patch}_gap_{img}", "huge/14/224 huge/16/448 giant/16/224", **SIGLIP_GAP
    ),
    **named(
        "vit_{size}_patch{patch}_reg1_gap_{img}",
        "wee/16/256 little/16/256 medium/16/256 betwixt/16/256",
        **REGISTERS,
        num_registers=1,
    ),
    **named(
        "vit_{size}_patch{patch}_reg4_gap_{img}",
        "little/16/256 medium/16/256 mediumd/16/256 mediumd/16/384 betwixt/16/256 betwixt/16/384",
        **REGISTERS,
        num_registers=4,
    ),
    **named(
        "vit_{size}_patch{patch}_reg1_gap_{img}",
        "so150m2/16/256 so150m2/16/384 so150m2/16/448",
        **AVERAGED,
        num_registers=1,
        qkv_bias=False,
    ),
    **named(
        "vit_{size}_patch{patch}_reg4_gap_{img}",
        "so150m/16/256 so150m/16/384",
        **SIGLIP_GAP,
        num_registers=4,
    ),
    "vit_digits": ViTConfig(
        img_size=32,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        dims=48,
        num_layers=4,
        num_heads=4,
        mlp_dims=192,
    ),
}


class LayerScale(nn.Module):
    """A learnt factor for each of the dims."""

    def __init__(self, dims: int, start: float):
        super().__init__()
        self.gamma = mx.full((dims,), start)

    def __call__(self, x: mx.array) -> mx.array:
        return x * self.gamma


def layer_scale(dims: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(dims, start)


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202). fc1 holds the gate, then what it gates."""

    def __init__(self, dims: int, hidden_dims: int, act: str, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dims, 2 * hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, dims)
        self.act = ACTIVATIONS[act]
        self.dropout = nn.Dropout(dropout)  # between the layers

    def __call__(self, x: mx.array) -> mx.array:
        gate, x = mx.split(self.fc1(x), 2, axis=-1)
        return self.fc2(self.dropout(self.act(gate) * x))


class Block(nn.Module):
    def __init__(self, config: ViTConfig, drop_path: float):
        super().__init__()
        dims, mlp = config.dims, GatedMLP if config.gated else MLP
        self.norm1 = LayerNorm(dims, config.norm_eps)
        self.attn = Attention(dims, config.num_heads, config.attention_dropout, config.qkv_bias)
        self.norm2 = LayerNorm(dims, config.norm_eps)
        self.mlp = mlp(dims, config.mlp_dims, config.act, config.mlp_dropout)
        self.ls1, self.ls2 = (layer_scale(dims, config.layer_scale) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.drop_path(self.ls1(self.dropout(self.attn(self.norm1(x)))))
        return x + self.drop_path(self.ls2(self.dropout(self.mlp(self.norm2(x)))))


class AttentionPool(nn.Module):
    """A learnt token asks all patches (SigLIP). (B, N, D) -> (B, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.latent = mx.random.normal((1, 1, config.dims), scale=config.dims**-0.5)
        self.attn = Attention(config.dims, config.num_heads)
        self.attn.projects_together = False
        self.norm = LayerNorm(config.dims, config.norm_eps)
        self.mlp = MLP(config.dims, config.mlp_dims, config.act)

    def __call__(self, x: mx.array) -> mx.array:
        attn, latent = self.attn, mx.broadcast_to(self.latent, (x.shape[0], 1, x.shape[2]))
        q, k, v = (attn.heads(y) for y in (attn.q_proj(latent), attn.k_proj(x), attn.v_proj(x)))
        y = ops.attention(q, k, v, scale=attn.scale)
        x = attn.out_proj(y.swapaxes(1, 2).flatten(2))
        return (x + self.mlp(self.norm(x)))[:, 0]


class ViT(nn.Module):
    """images (B, H, W, in_chans) of `config.img_size` -> logits (B, num_classes).

    With two heads (DeiT) the logits are the mean of theirs, in training too. To distill, give
    `head` the first token of `encode`, and `head_dist` the second.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        dims, patch = config.dims, config.patch_size
        num_patches, num_prefix = math.prod(config.grid), config.num_prefix_tokens
        num_positions = num_patches + (0 if config.patch_positions_only else num_prefix)

        def norm(there: bool) -> nn.Module:
            return LayerNorm(dims, config.norm_eps) if there else nn.Identity()

        self.patch_embed = nn.Conv2d(config.in_chans, dims, patch, patch, bias=not config.pre_norm)
        if config.class_token:
            self.cls_token = mx.random.normal((1, 1, dims), scale=0.02)
        if config.dist_token:
            self.dist_token = mx.random.normal((1, 1, dims), scale=0.02)
        if config.num_registers:
            self.reg_token = mx.random.normal((1, config.num_registers, dims), scale=0.02)
        self.pos_embed = mx.random.normal((1, num_positions, dims), scale=0.02)
        first = config.dropout if config.embed_dropout is None else config.embed_dropout
        self.dropout = nn.Dropout(first)
        self.norm_pre = norm(config.pre_norm)
        last = max(config.num_layers - 1, 1)
        self.blocks = [Block(config, config.drop_path * i / last) for i in range(config.num_layers)]
        self.norm = norm(config.final_norm and not config.norms_pooled)
        if config.pool == "map":
            self.attn_pool = AttentionPool(config)
        self.fc_norm = norm(config.final_norm and config.norms_pooled)
        self.head_dropout = nn.Dropout(config.head_dropout)

        self.num_features = dims
        self.reset_head(config.num_classes)
        normal: Callable[[mx.array], mx.array] = nn.init.normal(std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight = normal(module.weight)
                if "bias" in module:
                    module.bias = mx.zeros_like(module.bias)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.encode(x)
        if not self.config.num_classes:
            return self.pool(x)
        if self.config.dist_head:
            taught = self.head_dist(self.head_dropout(x[:, 1]))
            return (self.head(self.head_dropout(x[:, 0])) + taught) / 2
        return self.head(self.head_dropout(self.pool(x)))

    def encode(self, x: mx.array) -> mx.array:
        """Images -> tokens (B, N, D): class token, distillation token, registers, patches."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, x: mx.array) -> mx.array:
        """What the first block is given, (B, N, D)."""
        x = as_images(x, self.config.in_chans)
        self._check_size(*x.shape[1:3])
        x = self.patch_embed(x).flatten(1, 2)  # (B, h * w, D)
        names = ("cls_token", "dist_token", "reg_token")
        tokens = [self[name] for name in names if name in self]
        prefix = [mx.broadcast_to(token, (len(x), *token.shape[1:])) for token in tokens]
        if self.config.patch_positions_only:
            x = mx.concatenate([*prefix, x + self.pos_embed], axis=1)
        else:
            x = mx.concatenate([*prefix, x], axis=1) + self.pos_embed
        return self.norm_pre(self.dropout(x))

    def pool(self, x: mx.array) -> mx.array:
        """Tokens (B, N, D) -> the feature vector (B, D)."""
        patches = x[:, self.config.num_prefix_tokens :]
        match self.config.pool:
            case "map":
                x = self.attn_pool(patches)
            case "avg":
                x = patches.mean(axis=1)
            case _:
                x = (x[:, 0] + x[:, 1]) / 2 if self.config.dist_head else x[:, 0]
        return self.fc_norm(x)

    def features(self, x: mx.array) -> mx.array:
        """The pooled feature vector, (B, num_features)."""
        return self.pool(self.encode(x))

    def forward_intermediates(self, x: mx.array) -> list[mx.array]:
        """The patches after each block as maps (B, h, w, D), without the final norm."""
        x = self.embed(x)
        maps = []
        for block in self.blocks:
            x = block(x)
            patches = x[:, self.config.num_prefix_tokens :]
            maps.append(mx.unflatten(patches, 1, self.config.grid))
        return maps

    def reset_head(self, num_classes: int) -> None:
        """Fresh classifiers for `num_classes` classes; 0 leaves the features as they are."""
        self.config = replace(self.config, num_classes=num_classes)
        self.pop("head", None)
        self.pop("head_dist", None)
        if not num_classes:
            return
        for name in ("head", "head_dist") if self.config.dist_head else ("head",):
            self[name] = nn.Linear(self.num_features, num_classes)
            self[name].set_dtype(self.patch_embed.weight.dtype)

    def reset_input(self, in_chans: int) -> None:
        """Adapt the patch embedding to images of `in_chans` channels, keeping what it learnt."""
        self.config = replace(self.config, in_chans=in_chans)
        self.patch_embed.weight = other_channels(self.patch_embed.weight, in_chans)

    def reset_size(self, img_size: int | tuple[int, int]) -> None:
        """Adapt to images of another size: the positions of the patches are resampled."""
        config = replace(self.config, img_size=img_size)
        (h, w), (H, W), D = self.config.grid, config.grid, config.dims
        self.config = config
        if (h, w) == (H, W):
            return
        num_prefix = self.pos_embed.shape[1] - h * w
        prefix, patches = self.pos_embed[:, :num_prefix], self.pos_embed[:, num_prefix:]
        x = patches.astype(mx.float32).reshape(h, w, D)
        # On the CPU, whose float32 is real float32.
        x = mx.tensordot(resampling(h, H), x, axes=1, stream=mx.cpu)  # (H, w, D)
        x = mx.tensordot(resampling(w, W), x, axes=[[1], [1]], stream=mx.cpu)  # (W, H, D)
        x = x.swapaxes(0, 1)
        x = x.reshape(1, H * W, D).astype(prefix.dtype)
        self.pos_embed = mx.concatenate([prefix, x], axis=1)

    def _check_size(self, height: int, width: int) -> None:
        if (height, width) != self.config.size:
            h, w = self.config.size
            asked = height if height == width else (height, width)
            raise ValueError(
                f"images of {height} x {width} pixels: this network takes {h} x {w}; resize them, "
                f"or load it with img_size={asked}"
            )


def resampling(old: int, new: int) -> mx.array:
    """The matrix (new, old) of antialiased bicubic interpolation, as Pillow and PyTorch have it.

    Pixels are unit cells with their values at the centres; where the result is the smaller, the
    kernel is widened to cover what falls together.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    rows = []
    for i in range(new):
        centre = (i + 0.5) * scale
        first = max(int(centre - 2 * stretch + 0.5), 0)
        end = min(int(centre + 2 * stretch + 0.5), old)
        row = [cubic((j + 0.5 - centre) / stretch) if first <= j < end else 0.0 for j in range(old)]
        rows.append([weight / sum(row) for weight in row])
    return mx.array(rows)


def cubic(x: float, a: float = -0.5) -> float:
    """Keys' kernel (1981), which is 0 from 2 on."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0
