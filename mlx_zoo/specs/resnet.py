"""ResNet and its descendants: torchvision, timm and transformers (microsoft/resnet-*)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_zoo.catalogue import (
    Architecture,
    Checkpoint,
    Reference,
    bundled_digits,
    check_attributes,
    num_labels,
    of_transformers,
    read_table,
    variant_of,
)
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.mapping.spec import Spec
from mlx_zoo.models.layers import ACTIVATIONS
from mlx_zoo.models.resnet import RESNETS, ResNet, ResNetConfig

# A network without its head may do without fc.
TORCHVISION = Spec(
    drop=("*.num_batches_tracked", "fc.weight", "fc.bias")
)  # timm has the same names

TRANSFORMERS = Spec(
    prefix="resnet.",
    layers={
        "embedder.embedder.convolution": "conv1",
        "embedder.embedder.normalization": "bn1",
        "encoder.stages.{s}.layers.{l}.layer.{j}.convolution": "layer{s+1}.{l}.conv{j+1}",
        "encoder.stages.{s}.layers.{l}.layer.{j}.normalization": "layer{s+1}.{l}.bn{j+1}",
        "encoder.stages.{s}.layers.{l}.shortcut.convolution": "layer{s+1}.{l}.downsample.0",
        "encoder.stages.{s}.layers.{l}.shortcut.normalization": "layer{s+1}.{l}.downsample.1",
        "classifier.1": "fc",
    },
    heads=("classifier.1",),
    drop=("*.num_batches_tracked", "classifier.1.weight", "classifier.1.bias"),
)


def from_transformers(config: Mapping[str, Any]) -> ResNetConfig:
    """Read a transformers ResNetConfig. Raises UnsupportedConfig naming what is not implemented."""
    blocks = (None, "basic", "bottleneck")
    check_attributes(config, {"hidden_act": (None, *ACTIVATIONS), "layer_type": blocks})
    block = config.get("layer_type", "bottleneck")
    expansion = {"basic": 1, "bottleneck": 4}[block]
    sizes = config.get("hidden_sizes", (256, 512, 1024, 2048))
    if uneven := [size for size in sizes if size % expansion]:
        raise UnsupportedConfig(
            f"hidden_sizes={uneven} in config.json do not divide by {expansion}"
        )
    return ResNetConfig(
        block=block,
        depths=tuple(config.get("depths", (3, 4, 6, 3))),
        widths=tuple(size // expansion for size in sizes),
        stem_width=config.get("embedding_size", 64),
        act=config.get("hidden_act", "relu"),
        stride_in_1x1=config.get("downsample_in_bottleneck", False),
        first_stride=2 if config.get("downsample_in_first_stage", False) else 1,
        num_classes=num_labels(config),
        in_chans=config.get("num_channels", 3),
    )


def to_transformers(config: ResNetConfig) -> dict[str, Any]:
    """The inverse of `from_transformers`."""
    expansion = {"basic": 1, "bottleneck": 4}[config.block]
    return {
        "model_type": "resnet",
        "architectures": ["ResNetForImageClassification" if config.num_classes else "ResNetModel"],
        "layer_type": config.block,
        "depths": list(config.depths),
        "hidden_sizes": [width * expansion for width in config.widths],
        "embedding_size": config.stem_width,
        "hidden_act": config.act,
        "downsample_in_bottleneck": config.stride_in_1x1,
        "downsample_in_first_stage": config.first_stride == 2,
        "num_channels": config.in_chans,
    }


def of_microsoft(depth: int) -> Checkpoint:
    return of_transformers(
        f"microsoft/resnet-{depth}",
        "resnet",
        RESNETS[f"resnet{depth}"],
        "image-classification",
        "apache-2.0",
        aliases=(f"microsoft/resnet-{depth}",),
    )


CHECKPOINTS = (
    bundled_digits(
        "resnet",
        RESNETS["resnet_digits"],
        Reference("timm", "resnet18", {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 48)}),
        file="resnet_digits.pth",
        evidence="digits.safetensors",
    ),
    *map(of_microsoft, (18, 26, 34, 50, 101, 152)),
    *read_table(
        Path(__file__).with_suffix(".tsv"),
        "resnet",
        lambda row: replace(RESNETS[variant_of(row)], num_classes=int(row["num_classes"])),
    ),
)

PLAIN = {
    "stem": "plain",
    "stem_pool": "max",
    "norm": "batch",
    "anti_alias": "none",
    "avg_down": False,
    "se_ratio": 0.0,
    "inner_act": "relu",
}
V1_5 = {"act": "relu", "inner_act": "relu", "stride_in_1x1": False, "first_stride": 1}

ARCHITECTURE = Architecture(
    name="resnet",
    model=ResNet,
    variants=RESNETS,
    dialects={"torchvision": TORCHVISION, "timm": TORCHVISION, "transformers": TRANSFORMERS},
    inputs="images",
    tasks=("image-classification",),
    paper="He et al. 2015, arXiv:1512.03385",
    model_types=("resnet",),
    common={
        "timm": V1_5,
        "torchvision": {**PLAIN, **V1_5},
        "transformers": {**PLAIN, "groups": 1, "base_width": 64},
    },
    full_precision=("fc",),
    read_config=from_transformers,
    write_config=to_transformers,
    timm_args={
        "layers": "depths",
        "channels": "widths",
        "cardinality": "groups",
        "base_width": "base_width",
        "avg_down": "avg_down",
        "drop_path_rate": "drop_path",
        "drop_rate": "dropout",
    },
    classes={"ResNetForImageClassification": "image-classification", "ResNetModel": None},
    without_head=lambda config: replace(config, num_classes=0),
)
