"""ResNet, ResNeXt and Wide ResNet.

Deep Residual Learning (He et al. 2015, arXiv:1512.03385), Aggregated Residual Transformations
(Xie et al. 2016, arXiv:1611.05431), Wide Residual Networks (Zagoruyko & Komodakis 2016,
arXiv:1605.07146). Attribute names are torchvision's, so its checkpoints need no renaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.models.layers import ACTIVATIONS, as_images, check_choice, check_count, other_channels


@dataclass(frozen=True)
class ResNetConfig:
    block: str = "bottleneck"  # or "basic"
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)  # a bottleneck puts out four times as many
    stem_width: int = 64
    groups: int = 1  # ResNeXt's cardinality
    base_width: int = 64  # channels of a group, where the stage has width 64
    act: str = "relu"  # of the stem and of what a block gives
    inner_act: str = "relu"  # inside a block; transformers' hidden_act does not reach there
    stride_in_1x1: bool = False  # the original v1; torchvision and timm stride in the 3x3 (v1.5)
    first_stride: int = 1  # of the first stage
    num_classes: int = 1000  # 0 leaves the head out
    in_chans: int = 3

    def __post_init__(self):
        check_choice("block", self.block, ("basic", "bottleneck"))
        check_choice("act", self.act, ACTIVATIONS)
        check_choice("inner_act", self.inner_act, ACTIVATIONS)
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(f"depths={self.depths} and widths={self.widths}: one of each a stage")
        for depth in self.depths:
            check_count("depths", depth, 1, most=1000)
        for width in (*self.widths, self.stem_width, self.groups, self.base_width, self.in_chans):
            check_count("a width", width, 1, most=2**20)
        check_count("num_classes", self.num_classes)


def resnext(depths: tuple[int, ...], groups: int, base_width: int) -> ResNetConfig:
    return ResNetConfig(depths=depths, groups=groups, base_width=base_width)


RESNETS = {
    "resnet18": ResNetConfig(block="basic", depths=(2, 2, 2, 2)),
    "resnet26": ResNetConfig(depths=(2, 2, 2, 2)),
    "resnet34": ResNetConfig(block="basic"),
    "resnet50": ResNetConfig(),
    "resnet101": ResNetConfig(depths=(3, 4, 23, 3)),
    "resnet152": ResNetConfig(depths=(3, 8, 36, 3)),
    "resnext50_32x4d": resnext((3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": resnext((3, 4, 23, 3), 32, 4),
    "resnext101_32x8d": resnext((3, 4, 23, 3), 32, 8),
    "resnext101_32x16d": resnext((3, 4, 23, 3), 32, 16),
    "resnext101_32x32d": resnext((3, 4, 23, 3), 32, 32),
    "resnext101_64x4d": resnext((3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": ResNetConfig(base_width=128),
    "wide_resnet101_2": ResNetConfig(depths=(3, 4, 23, 3), base_width=128),
    "resnet_digits": ResNetConfig(
        block="basic", depths=(1, 1, 1, 1), widths=(16, 32, 48, 48), num_classes=10, in_chans=1
    ),
}


def conv3x3(in_dims: int, out_dims: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_dims, out_dims, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_dims: int, out_dims: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_dims, out_dims, 1, stride, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_dims: int, width: int, stride: int, config: ResNetConfig):
        super().__init__()
        self.act, self.inner_act = ACTIVATIONS[config.act], ACTIVATIONS[config.inner_act]
        self.conv1 = conv3x3(in_dims, width, stride)
        self.bn1 = nn.BatchNorm(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm(width)
        self.downsample = shortcut(in_dims, width, stride)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.inner_act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        for layer in self.downsample:
            x = layer(x)
        return self.act(x + y)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_dims: int, width: int, stride: int, config: ResNetConfig):
        super().__init__()
        self.act, self.inner_act = ACTIVATIONS[config.act], ACTIVATIONS[config.inner_act]
        dims = width * config.base_width // 64 * config.groups
        first, second = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_dims, dims, first)
        self.bn1 = nn.BatchNorm(dims)
        self.conv2 = conv3x3(dims, dims, second, config.groups)
        self.bn2 = nn.BatchNorm(dims)
        self.conv3 = conv1x1(dims, width * self.expansion)
        self.bn3 = nn.BatchNorm(width * self.expansion)
        self.downsample = shortcut(in_dims, width * self.expansion, stride)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.inner_act(self.bn1(self.conv1(x)))
        y = self.inner_act(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        for layer in self.downsample:
            x = layer(x)
        return self.act(x + y)


BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


def shortcut(in_dims: int, out_dims: int, stride: int) -> list[nn.Module]:
    """The projection of the residual path; empty where it is the identity."""
    if stride == 1 and in_dims == out_dims:
        return []
    return [conv1x1(in_dims, out_dims, stride), nn.BatchNorm(out_dims)]


class ResNet(nn.Module):
    """images (B, H, W, in_chans) -> logits (B, num_classes). Any H and W."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        self.act = ACTIVATIONS[config.act]
        self.conv1 = nn.Conv2d(config.in_chans, config.stem_width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm(config.stem_width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        block = BLOCKS[config.block]
        dims = config.stem_width
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            stage = []
            for j in range(depth):
                stride = 1 if j else (2 if i else config.first_stride)
                stage.append(block(dims, width, stride, config))
                dims = width * block.expansion
            self[f"layer{i + 1}"] = stage

        self.num_features = dims
        self.reset_head(config.num_classes)
        he_normal: Callable[..., mx.array] = nn.init.he_normal()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015b, arXiv:1502.01852
                module.weight = he_normal(module.weight, mode="fan_out", gain=math.sqrt(2))

    def __call__(self, x: mx.array) -> mx.array:
        x = self.features(x)
        return self.fc(x) if self.config.num_classes else x

    def features(self, x: mx.array) -> mx.array:
        """The pooled feature vector, (B, num_features)."""
        return self.forward_intermediates(x)[-1].mean(axis=(1, 2))

    def forward_intermediates(self, x: mx.array) -> list[mx.array]:
        """The feature maps (B, H / stride, W / stride, C): the stem's, then each stage's."""
        x = as_images(x, self.config.in_chans)
        x = self.act(self.bn1(self.conv1(x)))
        maps = [x]
        x = self.maxpool(x)
        for i in range(len(self.config.depths)):
            for block in self[f"layer{i + 1}"]:
                x = block(x)
            maps.append(x)
        return maps

    def reset_head(self, num_classes: int) -> None:
        """A fresh classifier for `num_classes` classes; 0 leaves the features as they are."""
        self.config = replace(self.config, num_classes=num_classes)
        self.pop("fc", None)
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes)
            self.fc.set_dtype(self.conv1.weight.dtype)

    def reset_input(self, in_chans: int) -> None:
        """Adapt the first convolution to images of `in_chans` channels, keeping what it learnt."""
        self.config = replace(self.config, in_chans=in_chans)
        self.conv1.weight = other_channels(self.conv1.weight, in_chans)
