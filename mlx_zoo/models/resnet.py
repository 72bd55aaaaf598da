"""ResNet, ResNeXt, Wide ResNet and what was made of them.

Deep Residual Learning (He et al. 2015, arXiv:1512.03385), Aggregated Residual Transformations
(Xie et al. 2016, arXiv:1611.05431), Wide Residual Networks (Zagoruyko & Komodakis 2016,
arXiv:1605.07146), Squeeze-and-Excitation (Hu et al. 2017, arXiv:1709.01507), Bag of Tricks: B, C, D
(He et al. 2018, arXiv:1812.01187), BlurPool (Zhang 2019, arXiv:1904.11486), ResNet-RS (Bello et al.
2021, arXiv:2103.07579). Attribute names are torchvision's and timm's: neither needs renaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend.ops import spatial_mean
from mlx_zoo.models.layers import (
    ACTIVATIONS,
    BatchNorm,
    Conv2d,
    DropPath,
    GroupNorm,
    MaxPool2d,
    as_images,
    check_choice,
    check_count,
    other_channels,
)


@dataclass(frozen=True)
class ResNetConfig:
    block: str = "bottleneck"  # or "basic"
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)  # a bottleneck puts out four times as many
    stem: str = "plain"  # a 7x7 convolution; "deep": three 3x3; "tiered": the first is narrower
    stem_width: int = 64  # a deep or tiered stem puts out twice as many
    stem_pool: str = "max"  # or "conv": a strided convolution
    groups: int = 1  # ResNeXt's cardinality
    base_width: int = 64  # channels of a group, where the stage has width 64
    norm: str = "batch"  # or "group"
    act: str = "relu"  # of the stem and of what a block gives
    inner_act: str = "relu"  # inside a block; transformers' hidden_act does not reach there
    stride_in_1x1: bool = False  # the original v1; torchvision and timm stride in the 3x3 (v1.5)
    first_stride: int = 1  # of the first stage
    anti_alias: str = "none"  # what strides instead of a convolution: "average" or "blur"
    avg_down: bool = False  # shortcuts take the mean of what they would skip (D)
    se_ratio: float = 0.0  # channels inside a squeeze-excite, as a part of the block's; 0: none
    drop_path: float = 0.0  # stochastic depth in training: of the last block, the first has none
    dropout: float = 0.0  # of the pooled, before the head
    num_classes: int = 1000  # 0 leaves the head out
    in_chans: int = 3

    def __post_init__(self):
        check_choice("block", self.block, ("basic", "bottleneck"))
        check_choice("stem", self.stem, ("plain", "deep", "tiered"))
        check_choice("stem_pool", self.stem_pool, ("max", "conv"))
        check_choice("norm", self.norm, ("batch", "group"))
        check_choice("act", self.act, ACTIVATIONS)
        check_choice("inner_act", self.inner_act, ACTIVATIONS)
        check_choice("anti_alias", self.anti_alias, ("none", "average", "blur"))
        if self.anti_alias != "none" and (self.stem_pool == "conv" or self.stride_in_1x1):
            raise ValueError(f"anti_alias={self.anti_alias!r}: without stem_pool, stride_in_1x1")
        if self.block == "basic" and (self.groups, self.base_width) != (1, 64):
            raise ValueError("groups, base_width: of bottlenecks, a basic block has none")
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(f"depths={self.depths} and widths={self.widths}: one of each a stage")
        for depth in self.depths:
            check_count("depths", depth, 1, most=1000)
        for width in (*self.widths, self.stem_width, self.groups, self.base_width, self.in_chans):
            check_count("a width", width, 1, most=2**20)
        for name in ("se_ratio", "drop_path", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a part of 1 is needed")
        check_count("num_classes", self.num_classes)


# What the letters of a name mean.
C: dict[str, Any] = {"stem": "deep", "stem_width": 32}
D = {**C, "avg_down": True}
S = {**C, "stem_width": 64}
T = {**D, "stem": "tiered"}
RS = {**D, "stem_pool": "conv", "se_ratio": 1 / 4}
SE: dict[str, Any] = {"se_ratio": 1 / 16}
AA: dict[str, Any] = {"anti_alias": "average"}

R101, R152, R200 = (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)

RESNETS = {
    "resnet10t": ResNetConfig(block="basic", depths=(1, 1, 1, 1), **T),
    "resnet14t": ResNetConfig(depths=(1, 1, 1, 1), **T),
    "resnet18": ResNetConfig(block="basic", depths=(2, 2, 2, 2)),
    "resnet18d": ResNetConfig(block="basic", depths=(2, 2, 2, 2), **D),
    "resnet26": ResNetConfig(depths=(2, 2, 2, 2)),
    "resnet26d": ResNetConfig(depths=(2, 2, 2, 2), **D),
    "resnet26t": ResNetConfig(depths=(2, 2, 2, 2), **T),
    "resnet34": ResNetConfig(block="basic"),
    "resnet34d": ResNetConfig(block="basic", **D),
    "resnet50": ResNetConfig(),
    "resnet50_gn": ResNetConfig(norm="group"),
    "resnet50c": ResNetConfig(**C),
    "resnet50d": ResNetConfig(**D),
    "resnet50s": ResNetConfig(**S),
    "resnet101": ResNetConfig(depths=R101),
    "resnet101c": ResNetConfig(depths=R101, **C),
    "resnet101d": ResNetConfig(depths=R101, **D),
    "resnet101s": ResNetConfig(depths=R101, **S),
    "resnet152": ResNetConfig(depths=R152),
    "resnet152c": ResNetConfig(depths=R152, **C),
    "resnet152d": ResNetConfig(depths=R152, **D),
    "resnet152s": ResNetConfig(depths=R152, **S),
    "resnet200d": ResNetConfig(depths=R200, **D),
    "resnetaa50": ResNetConfig(**AA),
    "resnetaa50d": ResNetConfig(**AA, **D),
    "resnetaa101d": ResNetConfig(depths=R101, **AA, **D),
    "resnetblur50": ResNetConfig(anti_alias="blur"),
    "resnetrs50": ResNetConfig(**RS),
    "resnetrs101": ResNetConfig(depths=R101, **RS),
    "resnetrs152": ResNetConfig(depths=R152, **RS),
    "resnetrs200": ResNetConfig(depths=R200, **RS),
    "resnetrs270": ResNetConfig(depths=(4, 29, 53, 4), **RS),
    "resnetrs350": ResNetConfig(depths=(4, 36, 72, 4), **RS),
    "resnetrs420": ResNetConfig(depths=(4, 44, 87, 4), **RS),
    "resnext50_32x4d": ResNetConfig(groups=32, base_width=4),
    "resnext50d_32x4d": ResNetConfig(groups=32, base_width=4, **D),
    "resnext101_32x4d": ResNetConfig(depths=R101, groups=32, base_width=4),
    "resnext101_32x8d": ResNetConfig(depths=R101, groups=32, base_width=8),
    "resnext101_32x16d": ResNetConfig(depths=R101, groups=32, base_width=16),
    "resnext101_32x32d": ResNetConfig(depths=R101, groups=32, base_width=32),
    "resnext101_64x4d": ResNetConfig(depths=R101, groups=64, base_width=4),
    "seresnet50": ResNetConfig(**SE),
    "seresnet152d": ResNetConfig(depths=R152, **SE, **D),
    "wide_resnet50_2": ResNetConfig(base_width=128),
    "wide_resnet101_2": ResNetConfig(depths=R101, base_width=128),
    "resnet_digits": ResNetConfig(
        block="basic", depths=(1, 1, 1, 1), widths=(16, 32, 48, 48), num_classes=10, in_chans=1
    ),
}


def conv3x3(in_dims: int, out_dims: int, stride: int = 1, groups: int = 1) -> Conv2d:
    return Conv2d(in_dims, out_dims, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_dims: int, out_dims: int, stride: int = 1) -> Conv2d:
    return Conv2d(in_dims, out_dims, 1, stride, bias=False)


class Activation(nn.Module):
    """In a list of layers, where PyTorch counts it, too."""

    def __init__(self, name: str):
        super().__init__()
        self.act = ACTIVATIONS[name]

    def __call__(self, x: mx.array) -> mx.array:
        return self.act(x)


class AveragePool(nn.Module):
    """Means of 2x2 pixels, at odd edges of those that there are. Sides are halved, rounding up."""

    def __call__(self, x: mx.array) -> mx.array:
        odd = [(0, side % 2) for side in x.shape[1:3]]
        x = mx.pad(x, [(0, 0), *odd, (0, 0)], mode="edge")
        return mx.unflatten(mx.unflatten(x, 2, (-1, 2)), 1, (-1, 2)).mean(axis=(2, 4))


class BlurPool(nn.Module):
    """The filter (1, 2, 1) / 4 along both sides, at every other pixel; edges are reflected."""

    def __call__(self, x: mx.array) -> mx.array:
        for axis in (1, 2):
            last = x.shape[axis] - 1
            if last == 0:
                raise ValueError("one row of pixels cannot be blurred: larger images are needed")
            here = mx.arange(0, last + 1, 2)
            before, after = mx.abs(here - 1), last - mx.abs(last - here - 1)
            sides = mx.take(x, before, axis) + mx.take(x, after, axis)
            x = (2 * mx.take(x, here, axis) + sides) / 4
        return x


class SqueezeExcite(nn.Module):
    """Channels are weighted by what all pixels together say. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dims: int, ratio: float):
        super().__init__()
        hidden_dims = max(8, int(dims * ratio + 4) // 8 * 8)
        self.fc1 = Conv2d(dims, hidden_dims, 1)
        self.fc2 = Conv2d(hidden_dims, dims, 1)

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.maximum(self.fc1(spatial_mean(x)), 0)
        return x * mx.sigmoid(self.fc2(y))


def group_norm(dims: int) -> GroupNorm:
    return GroupNorm(32, dims)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": BatchNorm, "group": group_norm}
ANTI_ALIASES: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "average": lambda: nn.AvgPool2d(2),
    "blur": BlurPool,
}


def through(layers: nn.Module | list[nn.Module], x: mx.array) -> mx.array:
    """`x` after one layer, or after each of a list."""
    for layer in layers if isinstance(layers, list) else [layers]:
        x = layer(x)
    return x


def stem(config: ResNetConfig) -> tuple[nn.Module | list[nn.Module], int]:
    """What halves the sides of the images first, and how many channels it puts out."""
    width = config.stem_width
    if config.stem == "plain":
        return Conv2d(config.in_chans, width, 7, 2, padding=3, bias=False), width
    first = width // 4 * 3 if config.stem == "tiered" else width
    norm = NORMS[config.norm]
    layers = [
        conv3x3(config.in_chans, first, 2), norm(first), Activation(config.act),
        conv3x3(first, width), norm(width), Activation(config.act),
        conv3x3(width, 2 * width),
    ]  # fmt: skip
    return layers, 2 * width


def stem_pool(dims: int, config: ResNetConfig) -> list[nn.Module]:
    """What halves the sides a second time."""
    if config.stem_pool == "conv":
        return [conv3x3(dims, dims, 2), NORMS[config.norm](dims), Activation(config.act)]
    if config.anti_alias == "average":
        return [nn.AvgPool2d(2)]
    if config.anti_alias == "blur":
        return [MaxPool2d(3, 1, padding=1), BlurPool()]
    return [MaxPool2d(3, 2, padding=1)]


class Block(nn.Module):
    """What two kinds of block share: the shortcut, and the sum. (B, H, W, C) -> (B, H', W', C')."""

    expansion: int

    def __init__(self, in_dims: int, width: int, stride: int, config: ResNetConfig):
        super().__init__()
        dims = width * self.expansion
        self.act, self.inner_act = ACTIVATIONS[config.act], ACTIVATIONS[config.inner_act]
        self.aa = ANTI_ALIASES[config.anti_alias if stride > 1 else "none"]()
        self.se = SqueezeExcite(dims, config.se_ratio) if config.se_ratio else nn.Identity()
        self.drop_path = DropPath(config.drop_path)
        self.downsample: list[nn.Module] = []  # where the shortcut is not the identity
        if stride > 1 or in_dims != dims:
            norm = NORMS[config.norm](dims)
            if config.avg_down:
                pool = AveragePool() if stride > 1 else nn.Identity()
                self.downsample = [pool, conv1x1(in_dims, dims), norm]
            else:
                self.downsample = [conv1x1(in_dims, dims, stride), norm]

    def added(self, x: mx.array, y: mx.array) -> mx.array:
        """The sum of the shortcut from `x` and the residual `y`."""
        y = self.drop_path(self.se(y))
        x = through(self.downsample, x)
        if x.shape != y.shape:  # averages drop an odd edge, which shortcuts keep
            raise ValueError(
                f"maps of shapes {x.shape} and {y.shape} cannot be added: this network takes "
                "images whose sides are multiples of 32"
            )
        return self.act(x + y)


class BasicBlock(Block):
    expansion = 1

    def __init__(self, in_dims: int, width: int, stride: int, config: ResNetConfig):
        super().__init__(in_dims, width, stride, config)
        norm = NORMS[config.norm]
        strided = stride if config.anti_alias == "none" else 1
        self.conv1 = conv3x3(in_dims, width, strided)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = norm(width)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.aa(self.inner_act(self.bn1(self.conv1(x))))
        y = self.bn2(self.conv2(y))
        return self.added(x, y)


class Bottleneck(Block):
    expansion = 4

    def __init__(self, in_dims: int, width: int, stride: int, config: ResNetConfig):
        super().__init__(in_dims, width, stride, config)
        norm = NORMS[config.norm]
        dims = width * config.base_width // 64 * config.groups
        strided = stride if config.anti_alias == "none" else 1
        first, second = (strided, 1) if config.stride_in_1x1 else (1, strided)
        self.conv1 = conv1x1(in_dims, dims, first)
        self.bn1 = norm(dims)
        self.conv2 = conv3x3(dims, dims, second, config.groups)
        self.bn2 = norm(dims)
        self.conv3 = conv1x1(dims, width * self.expansion)
        self.bn3 = norm(width * self.expansion)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.inner_act(self.bn1(self.conv1(x)))
        y = self.aa(self.inner_act(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return self.added(x, y)


class ResNet(nn.Module):
    """images (B, H, W, in_chans) -> logits (B, num_classes). Any H and W.

    Anti-aliased networks are choosier: averages want multiples of 32, blurs at least 17 pixels.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        self.act = ACTIVATIONS[config.act]
        self.conv1, dims = stem(config)
        self.bn1 = NORMS[config.norm](dims)
        self.maxpool = stem_pool(dims, config)

        block = BasicBlock if config.block == "basic" else Bottleneck
        num_blocks, last = 0, max(1, sum(config.depths) - 1)
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            stage = []
            for j in range(depth):
                stride = 1 if j else (2 if i else config.first_stride)
                own = replace(config, drop_path=config.drop_path * num_blocks / last)
                stage.append(block(dims, width, stride, own))
                num_blocks += 1
                dims = width * block.expansion
            self[f"layer{i + 1}"] = stage

        self.dropout = nn.Dropout(config.dropout)
        self.num_features = dims
        self.reset_head(config.num_classes)
        he_normal: Callable[..., mx.array] = nn.init.he_normal()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015b, arXiv:1502.01852
                module.weight = he_normal(module.weight, mode="fan_out", gain=math.sqrt(2))

    def __call__(self, x: mx.array) -> mx.array:
        x = self.dropout(self.features(x))
        return self.fc(x) if self.config.num_classes else x

    def features(self, x: mx.array) -> mx.array:
        """The pooled feature vector, (B, num_features)."""
        return spatial_mean(self.forward_intermediates(x)[-1])[:, 0, 0]

    def forward_intermediates(self, x: mx.array) -> list[mx.array]:
        """The feature maps (B, H / stride, W / stride, C): the stem's, then each stage's."""
        x = as_images(x, self.config.in_chans)
        x = self.act(self.bn1(through(self.conv1, x)))
        maps = [x]
        x = through(self.maxpool, x)
        for i in range(len(self.config.depths)):
            x = through(self[f"layer{i + 1}"], x)
            maps.append(x)
        return maps

    def reset_head(self, num_classes: int) -> None:
        """A fresh classifier for `num_classes` classes; 0 leaves the features as they are."""
        self.config = replace(self.config, num_classes=num_classes)
        self.pop("fc", None)
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes)
            self.fc.set_dtype(self.bn1.weight.dtype)

    def reset_input(self, in_chans: int) -> None:
        """Adapt the first convolution to images of `in_chans` channels, keeping what it learnt."""
        self.config = replace(self.config, in_chans=in_chans)
        first = self.conv1[0] if isinstance(self.conv1, list) else self.conv1
        first.weight = other_channels(first.weight, in_chans)
