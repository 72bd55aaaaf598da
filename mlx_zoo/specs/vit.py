"""ViT, DeiT and their descendants: torchvision, timm, and transformers' ViT and DeiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_zoo.catalogue import (
    Architecture,
    Checkpoint,
    Preprocessing,
    Reference,
    Row,
    bundled_digits,
    check_attributes,
    config_from,
    num_labels,
    of_transformers,
    read_table,
    variant_of,
)
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.mapping.spec import Spec, Split, qkv, weight_and_bias
from mlx_zoo.models.layers import ACTIVATIONS
from mlx_zoo.models.vit import VITS, ViT, ViTConfig, vit

TIMM = Spec(
    layers={
        "patch_embed.proj": "patch_embed",
        "blocks.{i}.attn.qkv": qkv("blocks.{i}.attn"),
        "blocks.{i}.attn.proj": "blocks.{i}.attn.out_proj",
        "attn_pool.q": "attn_pool.attn.q_proj",
        "attn_pool.kv": Split("attn_pool.attn", ("k_proj", "v_proj")),
        "attn_pool.proj": "attn_pool.attn.out_proj",
    },
    # Without a head, or averaging patches for which SigLIP's files hold an attention pooling, too.
    drop=(*weight_and_bias("head", "head_dist"), "attn_pool.*"),
)

TORCHVISION = Spec(
    layers={
        "class_token": "cls_token",
        "conv_proj": "patch_embed",
        "encoder.pos_embedding": "pos_embed",
        "encoder.layers.encoder_layer_{i}.ln_1": "blocks.{i}.norm1",
        # Bare tensors of nn.MultiheadAttention.
        "encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight": Split(
            "blocks.{i}.attn", ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        ),
        "encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias": Split(
            "blocks.{i}.attn", ("q_proj.bias", "k_proj.bias", "v_proj.bias")
        ),
        "encoder.layers.encoder_layer_{i}.self_attention.out_proj": "blocks.{i}.attn.out_proj",
        "encoder.layers.encoder_layer_{i}.ln_2": "blocks.{i}.norm2",
        "encoder.layers.encoder_layer_{i}.mlp.0": "blocks.{i}.mlp.fc1",
        "encoder.layers.encoder_layer_{i}.mlp.3": "blocks.{i}.mlp.fc2",
        "encoder.ln": "norm",
        "heads.head": "head",
    },
    drop=weight_and_bias("heads.head"),
)


def renamed(spec: Spec, names: Mapping[str, str]) -> Spec:
    """`spec` with other upstream names for some of its layers."""
    return replace(spec, layers={names.get(name, name): row for name, row in spec.layers.items()})


OLD_MLP = renamed(  # of torchvision's own weights
    TORCHVISION,
    {
        "encoder.layers.encoder_layer_{i}.mlp.0": "encoder.layers.encoder_layer_{i}.mlp.linear_1",
        "encoder.layers.encoder_layer_{i}.mlp.3": "encoder.layers.encoder_layer_{i}.mlp.linear_2",
    },
)

TRANSFORMERS = Spec(
    prefix="vit.",
    layers={
        "embeddings.cls_token": "cls_token",
        "embeddings.distillation_token": "dist_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed",
        "encoder.layer.{i}.layernorm_before": "blocks.{i}.norm1",
        "encoder.layer.{i}.attention.attention.query": "blocks.{i}.attn.q_proj",
        "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attn.k_proj",
        "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attn.v_proj",
        "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.out_proj",
        "encoder.layer.{i}.layernorm_after": "blocks.{i}.norm2",
        "encoder.layer.{i}.intermediate.dense": "blocks.{i}.mlp.fc1",
        "encoder.layer.{i}.output.dense": "blocks.{i}.mlp.fc2",
        "layernorm": "norm",
        "classifier": "head",
    },
    heads=("classifier",),
    drop=(*weight_and_bias("classifier", "pooler.dense"), "embeddings.mask_token"),
)

NEW_NAMES = {
    "encoder.layer.{i}.layernorm_before": "layers.{i}.layernorm_before",
    "encoder.layer.{i}.attention.attention.query": "layers.{i}.attention.q_proj",
    "encoder.layer.{i}.attention.attention.key": "layers.{i}.attention.k_proj",
    "encoder.layer.{i}.attention.attention.value": "layers.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.output.dense": "layers.{i}.attention.o_proj",
    "encoder.layer.{i}.layernorm_after": "layers.{i}.layernorm_after",
    "encoder.layer.{i}.intermediate.dense": "layers.{i}.mlp.fc1",
    "encoder.layer.{i}.output.dense": "layers.{i}.mlp.fc2",
}

DEIT = replace(TRANSFORMERS, prefix="deit.")

WITH_TEACHER = replace(  # both of its heads
    DEIT,
    layers={
        **{source: row for source, row in DEIT.layers.items() if source != "classifier"},
        "cls_classifier": "head",
        "distillation_classifier": "head_dist",
    },
    heads=("cls_classifier", "distillation_classifier"),
    drop=(
        *weight_and_bias("cls_classifier", "distillation_classifier", "pooler.dense"),
        "embeddings.mask_token",
    ),
)

# transformers' name -> ours. Its configs have the defaults of ViTConfig, but for the epsilon.
ATTRIBUTES = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "hidden_size": "dims",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dims",
    "hidden_act": "act",
    "layer_norm_eps": "norm_eps",
    "qkv_bias": "qkv_bias",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}


def from_transformers(config: Mapping[str, Any]) -> ViTConfig:
    """Read a transformers ViTConfig or DeiTConfig.

    Raises UnsupportedConfig naming what is not implemented.
    """
    read = {ours: config[theirs] for theirs, ours in ATTRIBUTES.items() if theirs in config}
    check_attributes(config, {"hidden_act": (None, *ACTIVATIONS)})
    if isinstance(patch := read.get("patch_size"), (list, tuple)):
        if len(set(patch)) != 1:
            raise UnsupportedConfig(f"patch_size={patch!r} in config.json is not implemented")
        read["patch_size"] = patch[0]
    is_deit = config.get("model_type") == "deit"
    classes = config.get("architectures") or ()
    own = config_from(
        ViTConfig,
        {
            "norm_eps": 1e-12,
            **read,
            "num_classes": num_labels(config),
            "dist_token": is_deit,
            "dist_head": is_deit and "DeiTForImageClassificationWithTeacher" in classes,
        },
    )
    check_attributes(
        config, {"head_dim": (None, own.dims // own.num_heads), "pruned_heads": (None, {})}
    )
    return own


def to_transformers(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `from_transformers`: a ViT, or a DeiT with one head or two."""
    kind = "DeiT" if config.dist_token else "ViT"
    head = "ForImageClassification" if config.num_classes else "Model"
    said = {theirs: getattr(config, ours) for theirs, ours in ATTRIBUTES.items()}
    if config.num_classes and config.dist_head:
        head += "WithTeacher"
    if not isinstance(config.img_size, int):
        said["image_size"] = list(config.img_size)
    return {"model_type": kind.lower(), "architectures": [kind + head], **said}


def with_mlp_ratio(published: ViTConfig, config: ViTConfig) -> ViTConfig:
    """timm sizes an MLP by the dims of its block, in the proportion of the variant."""
    return replace(config, mlp_dims=config.dims * published.mlp_dims // published.dims)


def config_of(row: Row) -> ViTConfig:
    """That of the variant; torchvision has weights of one variant for images of several sizes."""
    config = VITS[variant_of(row)]
    return replace(config, num_classes=int(row["num_classes"]), img_size=int(row["size"]))


def original_of(row: Row) -> Reference:
    variant = variant_of(row)
    sized = row["library"] == "torchvision"  # timm's names say the size
    return Reference(row["library"], variant, {"image_size": int(row["size"])} if sized else {})


GOOGLES = Preprocessing(size=224, resize=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_mode="squash")
DEITS = Preprocessing(size=224, resize=256, interpolation="bicubic", crop_mode="squash")


def published(repository: str, config: ViTConfig, preprocessing: Preprocessing) -> Checkpoint:
    """By a name that begins with the organisation: the short one is a checkpoint of timm's."""
    return of_transformers(
        repository,
        "vit",
        replace(config, norm_eps=1e-12),
        "image-classification" if config.num_classes else None,
        "apache-2.0",
        name=repository.lower().replace("/", "_").replace("-", "_"),
        aliases=(repository,),
        preprocessing=preprocessing,
    )


def googles(size: str, patch_size: int, img_size: int, num_classes: int = 1000) -> Checkpoint:
    """A network of the ViT paper. Without a head it saw ImageNet-21k only."""
    name = f"google/vit-{size}-patch{patch_size}-{img_size}{'' if num_classes else '-in21k'}"
    config = vit(size, patch_size, img_size, num_classes=num_classes)
    return published(name, config, replace(GOOGLES, size=img_size, resize=img_size))


# torchvision's SWAG weights have a licence of their own, CC BY-NC 4.0:
# https://github.com/facebookresearch/SWAG/blob/main/LICENSE
CHECKPOINTS = (
    bundled_digits(
        "vit",
        VITS["vit_digits"],
        Reference(
            "timm",
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 4},
        ),
        file="vit_digits.safetensors",
        evidence="vit_digits_evidence.safetensors",
    ),
    *read_table(Path(__file__).with_suffix(".tsv"), "vit", config_of, original_of),
    googles("base", 16, 224),
    googles("base", 16, 384),
    googles("base", 32, 384),
    googles("large", 16, 224),
    googles("large", 16, 384),
    googles("large", 32, 384),
    googles("base", 16, 224, num_classes=0),
    googles("base", 32, 224, num_classes=0),
    googles("large", 16, 224, num_classes=0),
    googles("large", 32, 224, num_classes=0),
    googles("huge", 14, 224, num_classes=0),
    *(
        published(f"facebook/deit-{size}{kind}-patch16-224", vit(size, 16, 224, **heads), DEITS)
        for size in ("tiny", "small", "base")
        for kind, heads in {
            "": {},
            "-distilled": {"dist_token": True, "dist_head": True},
        }.items()
    ),
)

PLAIN = {
    "pool": "token",
    "class_token": True,
    "num_registers": 0,
    "patch_positions_only": False,
    "pre_norm": False,
    "layer_scale": None,
    "gated": False,
    "final_norm": True,
    "fc_norm": [None, False],
}
UNDISTILLED = {"dist_token": False, "dist_head": False}
DISTILLED = {"dist_token": True, "dist_head": False}
TAUGHT = {"dist_token": True, "dist_head": True}

ARCHITECTURE = Architecture(
    name="vit",
    model=ViT,
    variants=VITS,
    dialects={
        "timm": TIMM,
        "torchvision": TORCHVISION,
        "torchvision, old mlp names": OLD_MLP,
        "transformers": TRANSFORMERS,
        "transformers, since 5": renamed(TRANSFORMERS, NEW_NAMES),
        "transformers, deit": DEIT,
        "transformers, deit, since 5": renamed(DEIT, NEW_NAMES),
        "transformers, deit with teacher": WITH_TEACHER,
        "transformers, deit with teacher, since 5": renamed(WITH_TEACHER, NEW_NAMES),
    },
    inputs="images",
    tasks=("image-classification",),
    paper="Dosovitskiy et al. 2020, arXiv:2010.11929",
    common={
        "torchvision": {
            **PLAIN,
            **UNDISTILLED,
            "norm_eps": 1e-6,
            "qkv_bias": True,
            "act": ["gelu", "gelu_python"],
        },
        "transformers": {**PLAIN, **UNDISTILLED},
        "transformers, deit": DISTILLED,
        "transformers, deit, since 5": DISTILLED,
        "transformers, deit with teacher": TAUGHT,
        "transformers, deit with teacher, since 5": TAUGHT,
    },
    full_precision=("head", "head_dist"),
    model_types=("vit", "deit"),
    read_config=from_transformers,
    write_config=to_transformers,
    classes={
        "ViTForImageClassification": "image-classification",
        "DeiTForImageClassification": "image-classification",
        "DeiTForImageClassificationWithTeacher": "image-classification",
        "ViTModel": None,
        "DeiTModel": None,
    },
    timm_args={
        "global_pool": "pool",
        "patch_size": "patch_size",
        "embed_dim": "dims",
        "depth": "num_layers",
        "num_heads": "num_heads",
        "qkv_bias": "qkv_bias",
        "init_values": "layer_scale",
        "class_token": "class_token",
        "reg_tokens": "num_registers",
        "no_embed_class": "patch_positions_only",
        "pre_norm": "pre_norm",
        "final_norm": "final_norm",
        "fc_norm": "fc_norm",
        "drop_rate": "head_dropout",
        "pos_drop_rate": "embed_dropout",
        "attn_drop_rate": "attention_dropout",
        "drop_path_rate": "drop_path",
    },
    timm_derives=with_mlp_ratio,
    without_head=lambda config: replace(config, num_classes=0),
)
