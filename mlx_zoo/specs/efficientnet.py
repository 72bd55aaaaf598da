"""EfficientNet and EfficientNetV2: timm, torchvision and transformers (google/efficientnet-*)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_zoo.catalogue import (
    Architecture,
    Checkpoint,
    Preprocessing,
    Reference,
    bundled_digits,
    imagenet_labels,
    num_labels,
    of_transformers,
    read_table,
    variant_of,
)
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.mapping.spec import Spec
from mlx_zoo.models.efficientnet import (
    EFFICIENTNETS,
    EfficientNet,
    EfficientNetConfig,
    Stage,
    rounded,
)
from mlx_zoo.models.layers import ACTIVATIONS

# A network without its head may do without the classifier.
TIMM = Spec(drop=("*.num_batches_tracked", "classifier.weight", "classifier.bias"))

# torchvision's layers have numbers, in the order of execution.
TORCHVISION_BLOCKS = {
    "inverted": {
        "block.0.0": "conv_pw",
        "block.0.1": "bn1",
        "block.1.0": "conv_dw",
        "block.1.1": "bn2",
        "block.2.fc1": "se.conv_reduce",
        "block.2.fc2": "se.conv_expand",
        "block.3.0": "conv_pwl",
        "block.3.1": "bn3",
    },
    "separable": {
        "block.0.0": "conv_dw",
        "block.0.1": "bn1",
        "block.1.fc1": "se.conv_reduce",
        "block.1.fc2": "se.conv_expand",
        "block.2.0": "conv_pw",
        "block.2.1": "bn2",
    },
    "fused": {
        "block.0.0": "conv_exp",
        "block.0.1": "bn1",
        "block.1.0": "conv_pwl",
        "block.1.1": "bn2",
    },
    "conv": {"block.0.0": "conv", "block.0.1": "bn1"},
}


def torchvision(config: EfficientNetConfig) -> Spec:
    head = len(config.stages) + 1
    rows = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        f"features.{head}.0": "conv_head",
        f"features.{head}.1": "bn2",
        "classifier.1": "classifier",
    }
    for s, stage in enumerate(config.stages):
        for theirs, ours in TORCHVISION_BLOCKS[stage.kind].items():
            rows[f"features.{s + 1}.{{j}}.{theirs}"] = f"blocks.{s}.{{j}}.{ours}"
    return Spec(rows, drop=("*.num_batches_tracked", "classifier.1.weight", "classifier.1.bias"))


TRANSFORMERS_BLOCKS = {
    "inverted": {
        "expansion.expand_conv": "conv_pw",
        "expansion.expand_bn": "bn1",
        "depthwise_conv.depthwise_conv": "conv_dw",
        "depthwise_conv.depthwise_norm": "bn2",
        "squeeze_excite.reduce": "se.conv_reduce",
        "squeeze_excite.expand": "se.conv_expand",
        "projection.project_conv": "conv_pwl",
        "projection.project_bn": "bn3",
    },
    "separable": {
        "depthwise_conv.depthwise_conv": "conv_dw",
        "depthwise_conv.depthwise_norm": "bn1",
        "squeeze_excite.reduce": "se.conv_reduce",
        "squeeze_excite.expand": "se.conv_expand",
        "projection.project_conv": "conv_pw",
        "projection.project_bn": "bn2",
    },
}


def transformers(config: EfficientNetConfig) -> Spec:
    """Its blocks are counted through all stages; it has no V2."""
    rows = {
        "embeddings.convolution": "conv_stem",
        "embeddings.batchnorm": "bn1",
        "encoder.top_conv": "conv_head",
        "encoder.top_bn": "bn2",
    }
    first = 0
    for s, stage in enumerate(config.stages):
        for theirs, ours in TRANSFORMERS_BLOCKS.get(stage.kind, {}).items():
            rows[f"encoder.blocks.{{j+{first}}}.{theirs}"] = f"blocks.{s}.{{j}}.{ours}"
        first += stage.depth
    return Spec(
        rows,
        prefix="efficientnet.",
        heads=("classifier",),
        drop=("*.num_batches_tracked", "classifier.weight", "classifier.bias"),
    )


# What a transformers config.json is silent about; B7's.
DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "width_coefficient": 2.0,
    "depth_coefficient": 3.1,
    "depth_divisor": 8,
    "kernel_sizes": (3, 3, 5, 3, 5, 5, 3),
    "in_channels": (32, 16, 24, 40, 80, 112, 192),
    "out_channels": (16, 24, 40, 80, 112, 192, 320),
    "depthwise_padding": (),
    "strides": (1, 2, 2, 2, 1, 2, 1),
    "num_block_repeats": (1, 2, 2, 3, 3, 4, 1),
    "expand_ratios": (1, 6, 6, 6, 6, 6, 6),
    "squeeze_expansion_ratio": 0.25,
    "hidden_act": "swish",
    "hidden_dim": 2560,
    "pooling_type": "mean",
    "batch_norm_eps": 1e-3,
    "batch_norm_momentum": 0.99,
    "dropout_rate": 0.5,
    "drop_connect_rate": 0.2,
}


# In training transformers drops single values, where all others drop an image's whole branch, and
# does not tell the first norm of a block the momentum. That is the part of the running statistics
# that is *replaced* in PyTorch, TensorFlow's the part that stays: its 0.99 keeps next to nothing.
ARITHMETIC: dict[str, Any] = {"drops_values": True, "inner_momentum": 0.1}


def from_transformers(config: Mapping[str, Any]) -> EfficientNetConfig:
    """Read a transformers EfficientNetConfig.

    Raises UnsupportedConfig naming what is not implemented, and where the sizes do not fit.
    """
    said = {name: config.get(name, default) for name, default in DEFAULTS.items()}

    def width(channels: int) -> int:
        return rounded(channels * said["width_coefficient"], divisor=said["depth_divisor"])

    def refuse(name: str) -> None:
        raise UnsupportedConfig(f"{name}={said[name]!r} in config.json is not implemented")

    if said["pooling_type"] != "mean":
        refuse("pooling_type")
    if said["hidden_act"] not in ACTIVATIONS:
        refuse("hidden_act")
    if said["squeeze_expansion_ratio"] <= 0:
        refuse("squeeze_expansion_ratio")
    if said["hidden_dim"] != width(1280):
        refuse("hidden_dim")
    stages: list[Stage] = []
    before = width(32)
    columns = ("in_channels", "out_channels", "num_block_repeats", "kernel_sizes", "strides")
    for taken, given, repeats, kernel, stride, expansion in zip(
        *(said[name] for name in (*columns, "expand_ratios")), strict=True
    ):
        stage = Stage(
            kind="separable" if expansion == 1 else "inverted",
            depth=math.ceil(said["depth_coefficient"] * repeats),
            kernel=kernel,
            stride=stride,
            expansion=expansion,
            width=width(given),
            squeeze=said["squeeze_expansion_ratio"],
        )
        if width(taken) != before:
            refuse("in_channels")
        if stride == 1 and stage.width == before:  # there, a stage's first block has no shortcut
            refuse("out_channels")
        before = stage.width
        stages.append(stage)
    return EfficientNetConfig(
        stages=tuple(stages),
        stem_width=width(32),
        head_width=said["hidden_dim"],
        act=said["hidden_act"],
        padding="even",
        symmetric_blocks=tuple(said["depthwise_padding"]),
        norm_eps=said["batch_norm_eps"],
        norm_momentum=said["batch_norm_momentum"],
        **ARITHMETIC,
        dropout=said["dropout_rate"],
        drop_path=said["drop_connect_rate"],
        num_classes=num_labels(config),
        in_chans=said["num_channels"],
    )


COEFFICIENTS = (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 4.3)  # the published widths, B0 to L2


def to_transformers(config: EfficientNetConfig) -> dict[str, Any]:
    """The inverse of `from_transformers`: the widths of B0 and a coefficient, where there is one.

    Raises ValueError for widths that no coefficient gives.
    """
    stem_and_head = (config.stem_width, config.head_width)
    for coefficient in COEFFICIENTS:
        if (rounded(32 * coefficient), rounded(1280 * coefficient)) == stem_and_head:
            break
    else:
        raise ValueError(
            f"stem_width, head_width={stem_and_head}: of transformers' networks, which scale "
            "(32, 1280), none has these"
        )

    def unscaled(width: int) -> int:
        candidates = (*DEFAULTS["out_channels"], *range(1, width + 8))
        return next(x for x in candidates if rounded(x * coefficient) == width)

    stages = config.stages
    try:
        given = [unscaled(stage.width) for stage in stages]
    except StopIteration:
        widths = tuple(stage.width for stage in stages)
        raise ValueError(f"widths {widths}: transformers' networks have multiples of 8") from None
    kind = "EfficientNetForImageClassification" if config.num_classes else "EfficientNetModel"
    return {
        "model_type": "efficientnet",
        "architectures": [kind],
        "num_channels": config.in_chans,
        "width_coefficient": coefficient,
        "depth_coefficient": 1.0,
        "depth_divisor": 8,
        "kernel_sizes": [stage.kernel for stage in stages],
        "in_channels": [32, *given[:-1]],
        "out_channels": given,
        "depthwise_padding": list(config.symmetric_blocks),
        "strides": [stage.stride for stage in stages],
        "num_block_repeats": [stage.depth for stage in stages],
        "expand_ratios": [stage.expansion for stage in stages],
        "squeeze_expansion_ratio": stages[0].squeeze,
        "hidden_act": config.act,
        "hidden_dim": config.head_width,
        "pooling_type": "mean",
        "batch_norm_eps": config.norm_eps,
        "batch_norm_momentum": config.norm_momentum,
        "dropout_rate": config.dropout,
        "drop_connect_rate": config.drop_path,
    }


# Checkpoints ------------------------------------------------------------------------------------


# torchvision's weights that were TensorFlow's once, as were those of V2.
PORTED = ("efficientnet_b5", "efficientnet_b6", "efficientnet_b7")


def configured(row: Mapping[str, str]) -> EfficientNetConfig:
    """The config of a row: of names that two publishers share, with the row's epsilon."""
    variant = variant_of(row)
    config = replace(EFFICIENTNETS[variant], num_classes=int(row["num_classes"]))
    if row["library"] == "torchvision" and variant in PORTED:
        return replace(config, norm_eps=1e-3, norm_momentum=0.01)
    return config


def odd_blocks(config: EfficientNetConfig, size: int) -> Iterator[int]:
    """The blocks that stride where the image, of `size` at first, has an odd side."""
    size, block = math.ceil(size / 2), 0
    for stage in config.stages:
        if stage.stride == 2:
            if size % 2:
                yield block
            size = math.ceil(size / 2)
        block += stage.depth


def published(name: str, size: int) -> Checkpoint:
    config = EFFICIENTNETS[f"efficientnet_{name}"]
    config = replace(config, act="swish", padding="even", norm_eps=1e-3, **ARITHMETIC)
    config = replace(config, norm_momentum=DEFAULTS["batch_norm_momentum"])
    std = (0.47853944, 0.4732864, 0.47434163)
    return of_transformers(
        f"google/efficientnet-{name}",
        "efficientnet",
        replace(config, symmetric_blocks=tuple(odd_blocks(config, size))),
        "image-classification",
        "apache-2.0",
        name=f"efficientnet_{name}.google",
        preprocessing=Preprocessing(
            size=size,
            resize=size,
            interpolation="nearest",
            std=tuple(s * s for s in std),  # it divides twice
            crop_mode="squash",
        ),
        labels=imagenet_labels(),
        aliases=(f"google/efficientnet-{name}",),
        default=False,
    )


# timm's own notation for the stages of the bundled network.
DIGITS = (
    *("ds_r1_k3_s1_e1_c16_se0.25", "ir_r2_k3_s2_e4_c24_se0.25"),
    *("ir_r2_k5_s2_e4_c40_se0.25", "ir_r2_k3_s1_e4_c48_se0.25"),
)

GOOGLES = {
    "b0": 224,
    "b1": 240,
    "b2": 260,
    "b3": 300,
    "b4": 380,
    "b5": 456,
    "b6": 528,
    "b7": 600,
}

CHECKPOINTS = (
    bundled_digits(
        "efficientnet",
        EFFICIENTNETS["efficientnet_digits"],
        Reference(
            "timm",
            "EfficientNet",
            {
                "stages": DIGITS,
                "stem_size": 16,
                "num_features": 192,
                "pad_type": "same",
                "bn_eps": 1e-3,
                "act_layer": "silu",
            },
        ),
        file="efficientnet_digits.safetensors",
        evidence="efficientnet_digits_evidence.safetensors",
    ),
    *read_table(Path(__file__).with_suffix(".tsv"), "efficientnet", configured),
    *(published(name, size) for name, size in GOOGLES.items()),
)

ARCHITECTURE = Architecture(
    name="efficientnet",
    model=EfficientNet,
    variants=EFFICIENTNETS,
    dialects={"timm": TIMM, "torchvision": torchvision, "transformers": transformers},
    inputs="images",
    tasks=("image-classification",),
    paper="Tan & Le 2019, arXiv:1905.11946; V2: 2021, arXiv:2104.00298",
    common={
        "timm": {"padding": ["symmetric", "same"]},
        "torchvision": {"padding": "symmetric", "act": ["silu", "swish"]},
        "transformers": {"padding": "even"},
    },
    full_precision=("classifier",),
    model_types=("efficientnet",),
    read_config=from_transformers,
    write_config=to_transformers,
    classes={
        "EfficientNetForImageClassification": "image-classification",
        "EfficientNetModel": None,
    },
    timm_args={
        "drop_rate": "dropout",
        "drop_path_rate": "drop_path",
        "bn_eps": "norm_eps",
        "bn_momentum": "norm_momentum",
    },
    without_head=lambda config: replace(config, num_classes=0),
)
