"""BERT and its descendants (MiniLM, BGE, E5, ...) in transformers' format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
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
from mlx_zoo.mapping.spec import Spec, weight_and_bias
from mlx_zoo.models.bert import BERTS, FIXED_SIZES, HEADS, POOLED, Bert, BertConfig, Dense
from mlx_zoo.models.layers import ACTIVATIONS
from mlx_zoo.preprocess.sentence import read_sentence_config, sentence_files

BERT = Spec(
    prefix="bert.",
    layers={
        "embeddings.word_embeddings": "word_embed",
        "embeddings.position_embeddings": "position_embed",
        "embeddings.token_type_embeddings": "token_type_embed",
        "embeddings.LayerNorm": "norm",
        "encoder.layer.{i}.attention.self.query": "blocks.{i}.attn.q_proj",
        "encoder.layer.{i}.attention.self.key": "blocks.{i}.attn.k_proj",
        "encoder.layer.{i}.attention.self.value": "blocks.{i}.attn.v_proj",
        "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.out_proj",
        "encoder.layer.{i}.attention.output.LayerNorm": "blocks.{i}.norm1",
        "encoder.layer.{i}.intermediate.dense": "blocks.{i}.mlp.fc1",
        "encoder.layer.{i}.output.dense": "blocks.{i}.mlp.fc2",
        "encoder.layer.{i}.output.LayerNorm": "blocks.{i}.norm2",
        "pooler.dense": "pooler",
        "cls.predictions.transform.dense": "mlm.dense",
        "cls.predictions.transform.LayerNorm": "mlm.norm",
        "cls.predictions.bias": "mlm.bias",
        "cls.seq_relationship": "nsp",
        "dense.{i}.linear": "dense.{i}",  # sentence-transformers' own, named so by hub.checkpoint
    },
    heads=("cls", "classifier", "qa_outputs"),
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    drop=(
        "embeddings.position_ids",
        "embeddings.token_type_ids",
        *weight_and_bias("pooler.dense"),  # what one task needs, another may do without
        *weight_and_bias("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        *("cls.predictions.transform.LayerNorm.gamma", "cls.predictions.transform.LayerNorm.beta"),
        "cls.predictions.bias",
        *weight_and_bias("cls.seq_relationship", "classifier", "qa_outputs"),
    ),
)

# A decoder of its own has its own bias; cls.predictions.bias is then a copy, or unused.
UNTIED = replace(
    BERT,
    layers={
        **{source: row for source, row in BERT.layers.items() if source != "cls.predictions.bias"},
        "cls.predictions.decoder": "mlm.decoder",
    },
    tied={},
    spare={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    drop=(
        *(name for name in BERT.drop if name != "cls.predictions.bias"),
        *weight_and_bias("cls.predictions.decoder"),
    ),
)

OLD_NAMES = {"LayerNorm.gamma": "weight", "LayerNorm.beta": "bias"}  # from TensorFlow's

CLASSES = {
    "BertModel": None,
    "BertForMaskedLM": "fill-mask",
    "BertLMHeadModel": "fill-mask",
    "BertForNextSentencePrediction": "next-sentence-prediction",
    "BertForPreTraining": "pretraining",
    "BertForSequenceClassification": "text-classification",
    "BertForTokenClassification": "token-classification",
    "BertForMultipleChoice": "multiple-choice",
    "BertForQuestionAnswering": "question-answering",
}

# Attributes whose other values ask for arithmetic that is not implemented.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, *ACTIVATIONS),
    "position_embedding_type": ("absolute", None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "attention_window": (None,),
    "embedding_size": (None,),
}


# transformers' name -> ours. Where a config.json is silent, both have the same default.
ATTRIBUTES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dims",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dims",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
    "pad_token_id": "padding_id",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "act",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "classifier_dropout",
    "is_decoder": "causal",
    "tie_word_embeddings": "tied",
}


def from_transformers(config: Mapping[str, Any]) -> BertConfig:
    """Read a transformers BertConfig. Raises UnsupportedConfig naming what is not implemented."""
    check_attributes(config, ONLY)
    read = {ours: config[theirs] for theirs, ours in ATTRIBUTES.items() if theirs in config}
    return config_from(BertConfig, {**read, "num_classes": num_labels(config)})


def to_transformers(config: BertConfig) -> dict[str, Any]:
    """The inverse of `from_transformers`, and the class of the task."""
    classes = {task: name for name, task in reversed(CLASSES.items())}  # of several, the first
    kind = classes.get(config.task, "BertModel")
    if config.causal and config.task == "fill-mask":
        kind = "BertLMHeadModel"
    said = {theirs: getattr(config, ours) for theirs, ours in ATTRIBUTES.items()}
    return {"model_type": "bert", "architectures": [kind], **said}


def twins(config: BertConfig) -> tuple[str, ...]:
    """What BertForMaskedLM and its like have besides: the decoder, or the bias that it replaced."""
    if "mlm" not in HEADS[config.task]:
        return ()
    decoder = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    return decoder if config.tied else ("cls.predictions.bias",)


def with_sentence_files(config: BertConfig, files: Mapping[str, Path]) -> BertConfig:
    """`config` with the pooling that a sentence-transformers repository describes."""
    if config.task != "sentence-embedding":
        return config
    sentence = read_sentence_config(files)
    dense = tuple(
        Dense(d.in_features, d.out_features, d.bias, d.activation, d.folder) for d in sentence.dense
    )
    return replace(config, pooling=sentence.pooling, dense=dense, normalize=sentence.normalize)


def wanted_files(config: BertConfig, files: Mapping[str, Path]) -> tuple[str, ...]:
    """The files that say how sentences are pooled, as far as those already in hand tell."""
    if config.task != "sentence-embedding":
        return ()
    return sentence_files() + sentence_files(files.get("modules.json"))


def keeps_head(checkpoint: Checkpoint, task: str | None, num_classes: int | None) -> bool:
    """Whether a checkpoint may have the head of `task` with that many classes.

    Three tasks have a `classifier`: only config.json tells which one a checkpoint means.
    """
    if "classifier" not in HEADS[task]:
        return True
    own_size = head_size(replace(checkpoint.config, task=task))
    return checkpoint.task in (None, task) and num_classes in (None, own_size)


def head_size(config: BertConfig) -> int | None:
    """Of the classifications, their labels; of other tasks, what they fix; of the rest, None."""
    if config.task in ("text-classification", "token-classification"):
        return config.num_classes
    return FIXED_SIZES.get(config.task or "")


def fit(config: BertConfig, names: frozenset[str]) -> BertConfig:
    """A bare body has a pooler where its checkpoint has one; of the tasks, some need it."""
    has_pooler = any(name.removeprefix(BERT.prefix).startswith("pooler.") for name in names)
    return replace(config, pooler=config.task in POOLED or (config.task is None and has_pooler))


BASE, LARGE = BERTS["bert_base"], BERTS["bert_large"]
SMALL = replace(BASE, dims=384, mlp_dims=1536)

# Trained on the documentation of Python and of libraries: training_scripts/train_bert_docs.py.
BUNDLED = {
    "bert_docs": "pretraining",
    "bert_docs_topic": "text-classification",  # of which library is this?
    "bert_docs_code": "token-classification",  # which words are names of functions, classes, ...?
    "bert_docs_qa": "question-answering",  # about the parameters of a function
}

GOOGLES = tuple(
    of_transformers(f"google-bert/{name}", "bert", config, "pretraining", "apache-2.0")
    for name, config in {
        "bert-base-uncased": BASE,
        "bert-base-cased": replace(BASE, vocab_size=28996),
        "bert-large-uncased": LARGE,
        "bert-large-cased": replace(LARGE, vocab_size=28996),
        "bert-base-multilingual-uncased": replace(BASE, vocab_size=105879),
        "bert-base-multilingual-cased": replace(BASE, vocab_size=119547),
        "bert-base-chinese": replace(BASE, vocab_size=21128),
    }.items()
)

SENTENCES = tuple(
    of_transformers(name, "bert", config, "sentence-embedding", license)
    for name, config, license in (
        ("sentence-transformers/all-MiniLM-L6-v2", replace(SMALL, num_layers=6), "apache-2.0"),
        ("sentence-transformers/all-MiniLM-L12-v2", SMALL, "apache-2.0"),
        ("BAAI/bge-small-en-v1.5", SMALL, "mit"),
        ("BAAI/bge-base-en-v1.5", BASE, "mit"),
        ("BAAI/bge-large-en-v1.5", LARGE, "mit"),
        ("intfloat/e5-small-v2", SMALL, "mit"),
        ("intfloat/e5-base-v2", BASE, "mit"),
        ("intfloat/e5-large-v2", LARGE, "mit"),
    )
)

CHECKPOINTS = (
    *(bundled_texts(name, "bert", task, from_transformers) for name, task in BUNDLED.items()),
    *GOOGLES,
    *SENTENCES,
)

ARCHITECTURE = Architecture(
    name="bert",
    model=Bert,
    variants=BERTS,
    dialects={
        "transformers": BERT,
        "transformers, gamma and beta": replace(BERT, leaves=OLD_NAMES),
        "transformers, untied": UNTIED,
        "transformers, untied, gamma and beta": replace(UNTIED, leaves=OLD_NAMES),
    },
    inputs="tokens",
    tasks=tuple(task for task in HEADS if task),
    paper="Devlin et al. 2018, arXiv:1810.04805",
    also={
        "pretraining": ("fill-mask", "next-sentence-prediction", "sentence-embedding"),
        "fill-mask": ("sentence-embedding",),
    },
    model_types=("bert",),
    read_config=from_transformers,
    write_config=to_transformers,
    twins=twins,
    classes=CLASSES,
    common={
        "transformers": {"tied": True},
        "transformers, untied": {"tied": False},
        "transformers, untied, gamma and beta": {"tied": False},
    },
    files=wanted_files,
    read_files=with_sentence_files,
    parts=lambda config: {d.folder: f"dense.{i}." for i, d in enumerate(config.dense)},
    keeps_head=keeps_head,
    head_size=head_size,
    fixed_sizes=FIXED_SIZES,
    head_fields=("pooler", "pooling", "dense", "normalize"),
    full_precision=(
        *("position_embed", "token_type_embed", "pooler"),
        *("mlm.*", "nsp", "classifier", "qa_outputs", "dense.*"),
    ),
    fit=fit,
    without_head=lambda config: replace(config, task=None, dense=()),
)
