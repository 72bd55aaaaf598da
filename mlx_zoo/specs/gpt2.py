"""GPT-2 and what was trained in its format (DistilGPT2, DialoGPT, Cerebras-GPT, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_zoo.catalogue import (
    Architecture,
    Checkpoint,
    bundled_texts,
    check_attributes,
    config_from,
    num_labels,
    of_transformers,
)
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.mapping.spec import Conv1D, Spec, qkv
from mlx_zoo.models.gpt2 import GPT2, GPT2S, HEADS, GPT2Config
from mlx_zoo.models.layers import ACTIVATIONS

TRANSFORMERS = Spec(
    prefix="transformer.",
    layers={
        "h.{i}.ln_1": "blocks.{i}.norm1",
        "h.{i}.attn.c_attn": Conv1D(qkv("blocks.{i}.attn")),
        "h.{i}.attn.c_proj": Conv1D("blocks.{i}.attn.out_proj"),
        "h.{i}.ln_2": "blocks.{i}.norm2",
        "h.{i}.mlp.c_fc": Conv1D("blocks.{i}.mlp.fc1"),
        "h.{i}.mlp.c_proj": Conv1D("blocks.{i}.mlp.fc2"),
        "ln_f": "norm",
    },
    heads=("lm_head", "score", "classifier"),
    tied={"lm_head": "wte"},
    drop=(
        "h.{i}.attn.bias",  # the causal mask, in older files
        "h.{i}.attn.masked_bias",
        "score.weight",  # what one task needs, another may do without
        "classifier.weight",
        "classifier.bias",
        "multiple_choice_head.summary.weight",
        "multiple_choice_head.summary.bias",
    ),
)
UNTIED = replace(TRANSFORMERS, tied={}, drop=(*TRANSFORMERS.drop, "lm_head.weight"))

CLASSIFICATIONS = ("text-classification", "token-classification")
CLASSES = {
    "GPT2LMHeadModel": "text-generation",
    "GPT2Model": None,
    "GPT2ForSequenceClassification": "text-classification",
    "GPT2ForTokenClassification": "token-classification",
    "GPT2DoubleHeadsModel": "text-generation",
}

# Attributes whose other values ask for arithmetic that is not implemented. Of the others,
# reorder_and_upcast_attn changes the arithmetic of half precision only, summary_* belongs to a head
# that is not here, and n_ctx has been without effect since the causal mask is no tensor.
ONLY: dict[str, tuple[Any, ...]] = {
    "activation_function": (None, *ACTIVATIONS),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
}

# transformers' names, the older ones last -> ours. Where a config.json is silent, both have the
# same default.
ATTRIBUTES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dims",
    "n_embd": "dims",
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "num_attention_heads": "num_heads",
    "n_head": "num_heads",
    "max_position_embeddings": "max_positions",
    "n_positions": "max_positions",
    "layer_norm_epsilon": "norm_eps",
    "activation_function": "act",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "resid_pdrop": "dropout",
    "embd_pdrop": "embed_dropout",
    "attn_pdrop": "attention_dropout",
    "tie_word_embeddings": "tied",
}


def from_transformers(config: Mapping[str, Any]) -> GPT2Config:
    """Read a transformers GPT2Config. Raises UnsupportedConfig naming what is not implemented."""
    check_attributes(config, ONLY)
    read: dict[str, Any] = {}
    for theirs, ours in ATTRIBUTES.items():
        if theirs in config and read.setdefault(ours, config[theirs]) != config[theirs]:
            raise UnsupportedConfig(
                f"{theirs}={config[theirs]!r} in config.json is said twice, differently"
            )
    dropouts = (config.get("classifier_dropout"), config.get("hidden_dropout"), 0.1)
    read["classifier_dropout"] = next(p for p in dropouts if p is not None)
    inner = config.get("n_inner")
    read["mlp_dims"] = 4 * read.get("dims", GPT2Config.dims) if inner is None else inner
    return config_from(GPT2Config, {**read, "num_classes": num_labels(config)})


def to_transformers(config: GPT2Config) -> dict[str, Any]:
    """The inverse of `from_transformers`, and the class of the task."""
    classes = {task: name for name, task in reversed(CLASSES.items())}  # of several, the first
    names = {ours: theirs for theirs, ours in ATTRIBUTES.items()}  # the older: GPT2Config's own
    return {
        "model_type": "gpt2",
        "architectures": [classes[config.task]],
        **{theirs: getattr(config, ours) for ours, theirs in names.items()},
        "n_inner": config.mlp_dims,
        "classifier_dropout": config.classifier_dropout,
    }


def keeps_head(checkpoint: Checkpoint, task: str | None, num_classes: int | None) -> bool:
    """Whether a checkpoint may have the head of `task` with that many classes."""
    if task not in CLASSIFICATIONS:
        return True
    return checkpoint.task in (None, task) and num_classes in (None, checkpoint.config.num_classes)


def published(repository: str, license: str, num_params: int, config: GPT2Config) -> Checkpoint:
    return of_transformers(
        repository, "gpt2", config, "text-generation", license, num_params=num_params
    )


SMALL, MEDIUM, LARGE, XL = GPT2S.values()


def cerebras(dims: int, num_layers: int, num_heads: int) -> GPT2Config:
    """Cerebras-GPT (Dey et al. 2023, arXiv:2304.03208), table 1."""
    return GPT2Config(
        dims=dims,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dims=4 * dims,
        max_positions=2048,
        act="gelu",
    )


CHECKPOINTS = (
    bundled_texts("gpt2_docs", "gpt2", "text-generation", from_transformers),
    published("openai-community/gpt2", "mit", 124_439_808, SMALL),
    published("openai-community/gpt2-medium", "mit", 354_823_168, MEDIUM),
    published("openai-community/gpt2-large", "mit", 774_030_080, LARGE),
    published("openai-community/gpt2-xl", "mit", 1_557_611_200, XL),
    published("distilbert/distilgpt2", "apache-2.0", 81_912_576, replace(SMALL, num_layers=6)),
    published("microsoft/DialoGPT-small", "mit", 124_439_808, SMALL),
    published("microsoft/DialoGPT-medium", "mit", 354_823_168, MEDIUM),
    published("microsoft/DialoGPT-large", "mit", 774_030_080, LARGE),
    *(
        published(f"cerebras/Cerebras-GPT-{size}", "apache-2.0", num_params, cerebras(*sizes))
        for size, num_params, sizes in (
            ("111M", 111_050_496, (768, 10, 12)),
            ("256M", 255_977_024, (1088, 14, 17)),
            ("590M", 590_310_912, (1536, 18, 12)),
            ("1.3B", 1_315_723_264, (2048, 24, 16)),
            ("2.7B", 2_651_553_280, (2560, 32, 32)),
            ("6.7B", 6_658_404_352, (4096, 32, 32)),
            ("13B", 12_853_386_240, (5120, 40, 40)),
        )
    ),
)

ARCHITECTURE = Architecture(
    name="gpt2",
    model=GPT2,
    variants=GPT2S,
    dialects={"transformers": lambda config: TRANSFORMERS if config.tied else UNTIED},
    inputs="tokens",
    paper="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    tasks=tuple(task for task in HEADS if task),
    default_task="text-generation",
    model_types=("gpt2",),
    read_config=from_transformers,
    write_config=to_transformers,
    twins=lambda config: (
        ("lm_head.weight",) if config.tied and config.task == "text-generation" else ()
    ),
    classes=CLASSES,
    keeps_head=keeps_head,
    head_size=lambda config: config.num_classes if config.task in CLASSIFICATIONS else None,
    without_head=lambda config: replace(config, task=None),
    full_precision=("wpe", "score", "classifier"),
)
