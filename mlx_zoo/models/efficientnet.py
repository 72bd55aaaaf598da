"""EfficientNet, its Lite and EdgeTPU relatives, and EfficientNetV2.

EfficientNet (Tan & Le 2019, arXiv:1905.11946), EfficientNetV2 (Tan & Le 2021, arXiv:2104.00298).
Attribute names are timm's. How convolutions pad and the epsilon of the norms belong to published
weights: TensorFlow's are not PyTorch's, and no shape shows which are meant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend.ops import spatial_mean
from mlx_zoo.models.layers import (
    ACTIVATIONS,
    BatchNorm,
    Conv2d,
    DropPath,
    as_images,
    check_choice,
    check_count,
    other_channels,
)

# How much a side of an image grows, half of it at either end and the odd pixel at the far one.
PADDINGS = {
    "symmetric": lambda size, kernel, stride: kernel - 1,  # PyTorch's
    "same": lambda size, kernel, stride: max(kernel - (size % stride or stride), 0),  # TensorFlow's
    "even": lambda size, kernel, stride: kernel - stride,  # the same, taking all sizes for even
}


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind. The first alone may stride and takes another width than it gives."""

    kind: str  # "inverted" (MBConv), "separable" (it without expansion), "fused", or "conv"
    depth: int  # blocks
    kernel: int
    stride: int
    expansion: int  # channels inside a block, for each that comes in
    width: int  # channels that go out
    squeeze: float = 0.0  # channels of squeeze-and-excitation, for each that comes into the block
    residual: bool = True
    hidden: tuple[int, ...] = ()  # channels inside each block, where no rule gives them
    squeezed: tuple[int, ...] = ()  # those of squeeze-and-excitation, likewise

    def __post_init__(self):
        check_choice("kind", self.kind, BLOCKS)
        check_count("depth", self.depth, 1, most=1000)
        check_count("kernel", self.kernel, 3, most=99)
        check_count("stride", self.stride, 1, most=2)
        for width in (self.width, self.expansion, *self.hidden, *self.squeezed):
            check_count("a width", width, 1, most=2**20)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: an odd number is needed")
        if {len(self.hidden), len(self.squeezed)} - {0, self.depth}:
            raise ValueError(f"hidden={self.hidden}, squeezed={self.squeezed}: one of each a block")


@dataclass(frozen=True)
class EfficientNetConfig:
    stages: tuple[Stage, ...]
    stem_width: int = 32
    head_width: int = 1280
    act: str = "silu"
    padding: str = "symmetric"  # or "same", "even"
    symmetric_blocks: tuple[int, ...] = ()  # that pad so in any case, counted through all stages
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1  # a batch's part in the running statistics
    inner_momentum: float | None = None  # that of inverted blocks' first norm; None: the same
    dropout: float = 0.2
    drop_path: float = 0.2  # towards which the rate of the blocks grows from 0
    drops_values: bool = False  # single values at that rate, not an image's whole branch
    num_classes: int = 1000  # 0 leaves the head out
    in_chans: int = 3

    def __post_init__(self):
        try:
            stages = tuple(s if isinstance(s, Stage) else Stage(**s) for s in self.stages)
        except TypeError as error:
            raise ValueError(f"stages: {error}") from error
        object.__setattr__(self, "stages", stages)
        if not stages:
            raise ValueError("stages=(): at least one is needed")
        check_choice("act", self.act, ACTIVATIONS)
        check_choice("padding", self.padding, PADDINGS)
        for name in ("norm_momentum", "inner_momentum"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a part of 1 is needed")
        for width in (self.stem_width, self.head_width, self.in_chans):
            check_count("a width", width, 1, most=2**20)
        check_count("num_classes", self.num_classes)


@dataclass(frozen=True)
class BlockConfig:
    in_dims: int
    hidden: int
    squeezed: int  # 0: no squeeze-and-excitation
    out_dims: int
    kernel: int
    stride: int
    padding: str
    residual: bool
    drop_path: float


def plan(config: EfficientNetConfig) -> list[list[BlockConfig]]:
    """The blocks of every stage."""
    total = sum(stage.depth for stage in config.stages)
    dims, n, stages = config.stem_width, 0, []
    for stage in config.stages:
        blocks = []
        for j in range(stage.depth):
            stride = 1 if j else stage.stride
            squeezed = max(1, int(dims * stage.squeeze)) if stage.squeeze else 0
            block = BlockConfig(
                in_dims=dims,
                hidden=stage.hidden[j] if stage.hidden else dims * stage.expansion,
                squeezed=stage.squeezed[j] if stage.squeezed else squeezed,
                out_dims=stage.width,
                kernel=stage.kernel,
                stride=stride,
                padding="symmetric" if n in config.symmetric_blocks else config.padding,
                residual=stage.residual and stride == 1 and dims == stage.width,
                drop_path=config.drop_path * n / total,
            )
            blocks.append(block)
            dims, n = stage.width, n + 1
        stages.append(blocks)
    return stages


class Conv(Conv2d):
    """A convolution that pads as `padding` says. (B, H, W, C) -> (B, H / stride, W / stride, D)."""

    def __init__(
        self, in_dims: int, out_dims: int, kernel: int, stride: int, padding: str, groups: int = 1
    ):
        super().__init__(in_dims, out_dims, kernel, stride, groups=groups, bias=False)
        self.growth = PADDINGS[padding]

    def __call__(self, x: mx.array) -> mx.array:
        kernel, stride = self.weight.shape[1], self.stride[0]
        high, wide = (self.growth(side, kernel, stride) for side in x.shape[1:3])
        if high % 2 or wide % 2:
            x = mx.pad(x, [(0, 0), (0, high % 2), (0, wide % 2), (0, 0)])
        return self.convolve(x, (high // 2, wide // 2))


def conv1x1(in_dims: int, out_dims: int) -> Conv2d:
    return Conv2d(in_dims, out_dims, 1, bias=False)


def batch_norm(dims: int, config: EfficientNetConfig) -> BatchNorm:
    return BatchNorm(dims, config.norm_eps, config.norm_momentum)


class SqueezeExcite(nn.Module):
    """Channels weighted by what all pixels together say. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dims: int, squeezed: int, act: str):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.conv_reduce = Conv2d(dims, squeezed, 1)
        self.conv_expand = Conv2d(squeezed, dims, 1)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.act(self.conv_reduce(spatial_mean(x)))
        return x * mx.sigmoid(self.conv_expand(y))


class Block(nn.Module):
    """A branch, and around it a shortcut where the shapes allow one."""

    def __init__(self, block: BlockConfig, config: EfficientNetConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.act]
        drop = nn.Dropout if config.drops_values else DropPath
        self.drop_path = drop(block.drop_path)
        self.residual = block.residual

    def __call__(self, x: mx.array) -> mx.array:
        y = self.branch(x)
        return x + self.drop_path(y) if self.residual else y

    def branch(self, x: mx.array) -> mx.array:
        raise NotImplementedError


def squeeze_excite(block: BlockConfig, config: EfficientNetConfig) -> nn.Module:
    if not block.squeezed:
        return nn.Identity()
    return SqueezeExcite(block.hidden, block.squeezed, config.act)


class Inverted(Block):
    """MBConv: more channels, a depthwise convolution, fewer channels."""

    def __init__(self, block: BlockConfig, config: EfficientNetConfig):
        super().__init__(block, config)
        dims = block.hidden
        self.conv_pw = conv1x1(block.in_dims, dims)
        self.bn1 = batch_norm(dims, config)
        if config.inner_momentum is not None:
            self.bn1.momentum = config.inner_momentum
        self.conv_dw = Conv(dims, dims, block.kernel, block.stride, block.padding, groups=dims)
        self.bn2 = batch_norm(dims, config)
        self.se = squeeze_excite(block, config)
        self.conv_pwl = conv1x1(dims, block.out_dims)
        self.bn3 = batch_norm(block.out_dims, config)

    def branch(self, x: mx.array) -> mx.array:
        x = self.act(self.bn1(self.conv_pw(x)))
        x = self.act(self.bn2(self.conv_dw(x)))
        return self.bn3(self.conv_pwl(self.se(x)))


class Separable(Block):
    """MBConv without expansion: a depthwise convolution, then other channels."""

    def __init__(self, block: BlockConfig, config: EfficientNetConfig):
        super().__init__(block, config)
        dims = block.in_dims
        self.conv_dw = Conv(dims, dims, block.kernel, block.stride, block.padding, groups=dims)
        self.bn1 = batch_norm(dims, config)
        self.se = squeeze_excite(block, config)
        self.conv_pw = conv1x1(dims, block.out_dims)
        self.bn2 = batch_norm(block.out_dims, config)

    def branch(self, x: mx.array) -> mx.array:
        x = self.act(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(self.se(x)))


class Fused(Block):
    """Fused-MBConv: a full convolution to more channels, then fewer."""

    def __init__(self, block: BlockConfig, config: EfficientNetConfig):
        super().__init__(block, config)
        dims = block.hidden
        self.conv_exp = Conv(block.in_dims, dims, block.kernel, block.stride, block.padding)
        self.bn1 = batch_norm(dims, config)
        self.se = squeeze_excite(block, config)
        self.conv_pwl = conv1x1(dims, block.out_dims)
        self.bn2 = batch_norm(block.out_dims, config)

    def branch(self, x: mx.array) -> mx.array:
        x = self.act(self.bn1(self.conv_exp(x)))
        return self.bn2(self.conv_pwl(self.se(x)))


class ConvBlock(Block):
    """Fused-MBConv without expansion: one convolution."""

    def __init__(self, block: BlockConfig, config: EfficientNetConfig):
        super().__init__(block, config)
        self.conv = Conv(block.in_dims, block.out_dims, block.kernel, block.stride, block.padding)
        self.bn1 = batch_norm(block.out_dims, config)

    def branch(self, x: mx.array) -> mx.array:
        return self.act(self.bn1(self.conv(x)))


BLOCKS: dict[str, type[Block]] = {
    "inverted": Inverted,
    "separable": Separable,
    "fused": Fused,
    "conv": ConvBlock,
}


class EfficientNet(nn.Module):
    """images (B, H, W, in_chans) -> logits (B, num_classes). Any H and W."""

    def __init__(self, config: EfficientNetConfig):
        super().__init__()
        self.config = config
        self.act = ACTIVATIONS[config.act]
        self.conv_stem = Conv(config.in_chans, config.stem_width, 3, 2, config.padding)
        self.bn1 = batch_norm(config.stem_width, config)
        self.blocks = [
            [BLOCKS[stage.kind](block, config) for block in blocks]
            for stage, blocks in zip(config.stages, plan(config), strict=True)
        ]
        self.conv_head = conv1x1(config.stages[-1].width, config.head_width)
        self.bn2 = batch_norm(config.head_width, config)
        self.dropout = nn.Dropout(config.dropout)

        self.num_features = config.head_width
        self.reset_head(config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as the authors' own code does
                out_dims, *kernel, _ = module.weight.shape
                fan_out = math.prod(kernel) * out_dims / module.groups
                module.weight = mx.random.normal(module.weight.shape) * math.sqrt(2 / fan_out)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.dropout(self.features(x))
        return self.classifier(x) if self.config.num_classes else x

    def features(self, x: mx.array) -> mx.array:
        """The pooled feature vector, (B, num_features)."""
        x = self.forward_intermediates(x)[-1]
        x = self.act(self.bn2(self.conv_head(x)))
        return spatial_mean(x)[:, 0, 0]

    def forward_intermediates(self, x: mx.array) -> list[mx.array]:
        """The feature maps (B, H / stride, W / stride, C), the last at each size, as timm gives.

        Strides 2, 4, 8, 16 and 32; the last map is what the head's convolution takes.
        """
        x = as_images(x, self.config.in_chans)
        x = self.act(self.bn1(self.conv_stem(x)))
        maps = []
        for stage, blocks in zip(self.config.stages, self.blocks, strict=True):
            if stage.stride > 1:
                maps.append(x)
            for block in blocks:
                x = block(x)
        return [*maps, x]

    def reset_head(self, num_classes: int) -> None:
        """A fresh classifier; none for 0."""
        self.config = replace(self.config, num_classes=num_classes)
        if num_classes:
            self.classifier = nn.Linear(self.num_features, num_classes)
            self.classifier.set_dtype(self.conv_stem.weight.dtype)
        else:
            self.pop("classifier", None)

    def reset_input(self, in_chans: int) -> None:
        """Another number of input channels: the first weights are summed or repeated."""
        self.config = replace(self.config, in_chans=in_chans)
        self.conv_stem.weight = other_channels(self.conv_stem.weight, in_chans)


# Variants ---------------------------------------------------------------------------------------


def inverted(
    depth: int, kernel: int, stride: int, expansion: int, width: int, squeeze: float = 0.25
) -> Stage:
    return Stage("inverted", depth, kernel, stride, expansion, width, squeeze)


def rounded(width: float, limit: float = 0.9, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`; the next one, where that is below `limit` of the width."""
    nearest = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < limit * width else nearest


def scaled(
    config: EfficientNetConfig, width: float, depth: float, limit: float = 0.9, **changes
) -> EfficientNetConfig:
    """A network wider and deeper by these factors (arXiv:1905.11946, section 3.3)."""
    stages = tuple(
        replace(s, width=rounded(s.width * width, limit), depth=math.ceil(s.depth * depth))
        for s in config.stages
    )
    stem, head = (rounded(w * width, limit) for w in (config.stem_width, config.head_width))
    return replace(config, stages=stages, stem_width=stem, head_width=head, **changes)


def tensorflow(config: EfficientNetConfig) -> EfficientNetConfig:
    """As Google trained it."""
    return replace(config, padding="same", norm_eps=1e-3)


SCALES = {  # width, depth, dropout
    "b0": (1.0, 1.0, 0.2),
    "b1": (1.0, 1.1, 0.2),
    "b2": (1.1, 1.2, 0.3),
    "b3": (1.2, 1.4, 0.3),
    "b4": (1.4, 1.8, 0.4),
    "b5": (1.6, 2.2, 0.4),
    "b6": (1.8, 2.6, 0.5),
    "b7": (2.0, 3.1, 0.5),
    "b8": (2.2, 3.6, 0.5),
    "l2": (4.3, 5.3, 0.5),
}

B0 = EfficientNetConfig(  # arXiv:1905.11946, table 1
    stages=(
        Stage("separable", 1, 3, 1, 1, 16, 0.25),
        inverted(2, 3, 2, 6, 24),
        inverted(2, 5, 2, 6, 40),
        inverted(3, 3, 2, 6, 80),
        inverted(3, 5, 1, 6, 112),
        inverted(4, 5, 2, 6, 192),
        inverted(1, 3, 1, 6, 320),
    )
)
SCALED = {
    name: scaled(B0, width, depth, dropout=dropout)
    for name, (width, depth, dropout) in SCALES.items()
}


def lite(name: str) -> EfficientNetConfig:
    """Without squeeze-and-excitation; the ends of the network are not scaled."""
    *_, dropout = SCALES[name]
    first, *middle, last = (replace(s, squeeze=0.0) for s in SCALED[name].stages)
    stages = (replace(first, depth=1), *middle, replace(last, depth=1))
    return replace(B0, stages=stages, act="relu6", dropout=min(dropout, 0.3))


LITES = {f"lite{i}": lite(f"b{i}") for i in range(5)}

EDGE = EfficientNetConfig(
    stages=(
        Stage("fused", 1, 3, 1, 4, 24, residual=False),
        Stage("fused", 2, 3, 2, 8, 32),
        Stage("fused", 4, 3, 2, 8, 48),
        inverted(5, 5, 2, 8, 96, 0),
        inverted(4, 5, 1, 8, 144, 0),
        inverted(2, 5, 2, 8, 192, 0),
    ),
    act="relu",
)


def edge(width: float, depth: float) -> EfficientNetConfig:
    """Its first stage expands what it puts out, not what comes in."""
    config = scaled(EDGE, width, depth)
    first, *others = config.stages
    hidden = (first.width * first.expansion,) * first.depth
    return replace(config, stages=(replace(first, hidden=hidden), *others))


EDGES = {"es": edge(1.0, 1.0), "em": edge(1.0, 1.1), "el": edge(1.2, 1.4)}

# Knapsack pruning (Aflalo et al. 2020, arXiv:2002.08258): of every stage but the first its width,
# and of its blocks the inner channels and those of squeeze-and-excitation.
PRUNED = {
    "b1": (
        (12, (48, 62, 48), (4, 6, 6)),
        (35, (70, 61, 51), (6, 10, 10)),
        (74, (175, 188, 137, 164), (10, 20, 20, 20)),
        (67, (399, 201, 160, 213), (20, 28, 28, 28)),
        (192, (637, 806, 798, 891, 990), (27, 48, 48, 48, 48)),
        (320, (1152, 1912), (48, 80)),
    ),
    "b2": (
        (17, (54, 69, 61), (4, 6, 6)),
        (42, (86, 72, 98), (6, 12, 12)),
        (85, (245, 274, 254, 292), (12, 22, 22, 22)),
        (116, (502, 315, 354, 443), (22, 30, 30, 30)),
        (208, (719, 1148, 1160, 1182, 1228), (30, 52, 52, 52, 52)),
        (352, (1248, 2112), (52, 88)),
    ),
    "b3": (
        (12, (27, 49, 48), (6, 8, 8)),
        (40, (83, 90, 85), (8, 12, 12)),
        (93, (215, 261, 219, 254, 236), (12, 24, 24, 24, 24)),
        (120, (480, 235, 217, 226, 340), (24, 34, 34, 33, 34)),
        (232, (802, 1030, 924, 1016, 1130, 1266), (34, 58, 58, 58, 58, 58)),
        (384, (1392, 2301), (58, 96)),
    ),
}


def pruned(name: str) -> EfficientNetConfig:
    first, *others = SCALED[name].stages
    stages = (
        replace(stage, width=width, hidden=hidden, squeezed=squeezed)
        for stage, (width, hidden, squeezed) in zip(others, PRUNED[name], strict=True)
    )
    return tensorflow(replace(SCALED[name], stages=(first, *stages)))


V2_KINDS = (  # kind, stride, expansion: arXiv:2104.00298, table 4
    ("conv", 1, 1),
    ("fused", 2, 4),
    ("fused", 2, 4),
    ("inverted", 2, 4),
    ("inverted", 1, 6),
    ("inverted", 2, 6),
    ("inverted", 1, 6),
)


def v2(depths: tuple[int, ...], widths: tuple[int, ...], **changes) -> EfficientNetConfig:
    stages = tuple(
        Stage(kind, depth, 3, stride, expansion, width, 0.25 if kind == "inverted" else 0.0)
        for (kind, stride, expansion), depth, width in zip(V2_KINDS, depths, widths, strict=False)
    )
    return replace(EfficientNetConfig(stages, stem_width=widths[0]), **changes)


def v2_rw(depths: tuple[int, ...]) -> EfficientNetConfig:
    """timm's own, of before Google's was published."""
    config = v2(depths, (24, 48, 64, 128, 160, 272), head_width=1792)
    first, *others = config.stages
    return replace(config, stages=(replace(first, kind="fused"), *others))


# The smallest are rounded to the nearest width, be it much below.
V2_BASE = v2((1, 2, 2, 3, 5, 8), (16, 32, 48, 96, 112, 192), stem_width=32)
V2 = {
    "b0": V2_BASE,
    "b1": scaled(V2_BASE, 1.0, 1.1, limit=0),
    "b2": scaled(V2_BASE, 1.1, 1.2, limit=0, dropout=0.3),
    "b3": scaled(V2_BASE, 1.2, 1.4, limit=0, dropout=0.3),
    "s": v2((2, 4, 4, 6, 9, 15), (24, 48, 64, 128, 160, 256)),
    "m": v2((3, 5, 5, 7, 14, 18, 5), (24, 48, 80, 160, 176, 304, 512), dropout=0.3),
    "l": v2((4, 7, 7, 10, 19, 25, 7), (32, 64, 96, 192, 224, 384, 640), dropout=0.4),
    "xl": v2((4, 8, 8, 16, 24, 32, 8), (32, 64, 96, 192, 256, 512, 640), dropout=0.4),
}

# With the arithmetic of whoever has the name; where torchvision and timm share it, of timm.
EFFICIENTNETS = {
    **{f"efficientnet_{name}": config for name, config in SCALED.items()},
    **{f"efficientnet_{name}": config for name, config in (LITES | EDGES).items()},
    **{f"efficientnet_{name}_pruned": EDGES[name] for name in ("es", "el")},  # many zeros
    **{f"efficientnet_{name}_pruned": pruned(name) for name in PRUNED},
    **{f"tf_efficientnet_{n}": tensorflow(c) for n, c in (SCALED | LITES | EDGES).items()},
    **{f"efficientnetv2_{name}": V2[name] for name in ("s", "m", "l", "xl")},
    **{f"efficientnet_v2_{name}": replace(V2[name], norm_eps=1e-3) for name in ("s", "m", "l")},
    **{f"tf_efficientnetv2_{name}": tensorflow(config) for name, config in V2.items()},
    "efficientnetv2_rw_t": scaled(V2["s"], 0.8, 0.9),
    "efficientnetv2_rw_s": v2_rw((2, 4, 4, 6, 9, 15)),
    "efficientnetv2_rw_m": scaled(v2_rw((3, 5, 5, 8, 15, 24)), 1.2, 1.0),
    "efficientnet_digits": tensorflow(
        EfficientNetConfig(
            stages=(
                Stage("separable", 1, 3, 1, 1, 16, 0.25),
                inverted(2, 3, 2, 4, 24),
                inverted(2, 5, 2, 4, 40),
                inverted(2, 3, 1, 4, 48),
            ),
            stem_width=16,
            head_width=192,
            num_classes=10,
            in_chans=1,
        )
    ),
}
