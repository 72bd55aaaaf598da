"""BERT against transformers and sentence-transformers: every tensor random, and real weights."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from originals import proven, randomise
from safetensors.torch import load_file, save_file

import mlx_zoo
from mlx_zoo.errors import CheckpointError, MappingError, UnsupportedConfig
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()
import sentence_transformers  # noqa: E402
import transformers  # noqa: E402
from sentence_transformers.sentence_transformer import modules as st  # noqa: E402

TASKS = {
    None: "BertModel",
    "fill-mask": "BertForMaskedLM",
    "next-sentence-prediction": "BertForNextSentencePrediction",
    "pretraining": "BertForPreTraining",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "multiple-choice": "BertForMultipleChoice",
    "question-answering": "BertForQuestionAnswering",
}


def small(**options):
    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 40,
        "num_labels": 5,
    }
    return transformers.BertConfig(**{**sizes, **options})


def save(folder, task=None, **options):
    if task == "question-answering":
        options["num_labels"] = 2
    original = randomise(getattr(transformers, TASKS[task])(small(**options)))
    if getattr(original, "cls", None) is not None:
        original.tie_weights()
    original.save_pretrained(folder)
    return original


def reload(folder, rename, drop=()):
    """Rewrite the tensors' names, as other publishers and older releases have them."""
    state = load_file(folder / "model.safetensors")
    state = {rename(name): x for name, x in state.items() if name not in drop}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("task", TASKS)
def test_every_head(task, tmp_path):
    save(tmp_path, task)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task=task)
    report = proven(model)
    names = {layer.name for layer in report.layers}
    assert {f"blocks.{i}.attn.{p}_proj" for i in range(3) for p in ("q", "k", "v", "out")} <= names
    assert {f"blocks.{i}.{p}" for i in range(3) for p in ("norm1", "mlp.fc1", "norm2")} <= names


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"hidden_act": "quick_gelu"},
        {"hidden_act": "mish"},
        {"layer_norm_eps": 0.1},
        {"type_vocab_size": 1},
        {"type_vocab_size": 16},
        {"is_decoder": True},
        {"tie_word_embeddings": False},
        {"num_attention_heads": 1},
    ],
    ids=str,
)
def test_attributes_that_change_the_arithmetic(options, tmp_path):
    save(tmp_path, "fill-mask", **options)
    proven(mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="fill-mask"))


@pytest.mark.parametrize(
    "options",
    [
        {"position_embedding_type": "relative_key"},
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"hidden_act": "prelu"},
        {"model_type": "roberta"},
        {"auto_map": {"AutoModel": "modeling.MyBert"}},
        {"quantization_config": {"bits": 4}},
        {"hidden_size": 65},
        {"hidden_size": "many"},
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(options, tmp_path):
    config = {**small().to_dict(), "model_type": "bert", **options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = next(iter(options)) if options != {"hidden_size": 65} else "65 dims"
    name = "config.json" if options == {"hidden_size": "many"} else name
    with pytest.raises(UnsupportedConfig, match=name):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)


def old(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


def test_gamma_and_beta(tmp_path):
    save(tmp_path, "pretraining")
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="pretraining")
    reload(tmp_path, old)
    aged = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="pretraining")
    assert aged.checkpoint.dialect == "transformers, gamma and beta"
    same(model, aged)
    proven(aged)


def test_gamma_elsewhere_is_not_renamed(tmp_path):
    save(tmp_path)
    reload(tmp_path, lambda n: n.replace("pooler.dense.weight", "pooler.dense.gamma"))
    with pytest.raises(MappingError, match=r"no home for pooler\.dense\.gamma"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)


def test_an_unknown_part_of_a_head_is_refused(tmp_path):
    save(tmp_path, "fill-mask")
    state = load_file(tmp_path / "model.safetensors")
    state["cls.predictions.adapter.weight"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(MappingError, match=r"no home for cls\.predictions\.adapter\.weight"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="fill-mask")


def test_a_class_of_another_name_is_known_by_its_tensors(tmp_path):
    save(tmp_path, "token-classification")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertTagger"]}))
    proven(mlx_zoo.load(f"local-dir:{tmp_path}", True))
    proven(mlx_zoo.load(f"local-dir:{tmp_path}", True, task="token-classification"))
    with pytest.raises(MappingError, match=r"pooler\.dense\.weight"):
        mlx_zoo.load(f"local-dir:{tmp_path}", True, task="text-classification")


def test_a_mixture_of_old_and_new_names_is_refused(tmp_path):
    save(tmp_path)
    reload(tmp_path, lambda n: old(n) if "layer.0" in n else n)
    with pytest.raises(MappingError, match="no home for"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("task", [None, "fill-mask", "next-sentence-prediction"])
def test_a_pretraining_checkpoint_serves_its_parts(task, tmp_path):
    save(tmp_path, "pretraining")
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task=task)
    proven(model)


def test_prefix_or_not(tmp_path):
    save(tmp_path, "pretraining")
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    reload(tmp_path, lambda n: n.removeprefix("bert."))
    same(model, mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True))


def test_without_a_pooler(tmp_path):
    save(tmp_path)
    reload(tmp_path, str, drop=("pooler.dense.weight", "pooler.dense.bias"))
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert model(mx.array([[1, 2]])).pooler_output is None
    proven(model)
    with pytest.raises(MappingError, match="nothing fills"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="next-sentence-prediction")


def test_tied_tensors(tmp_path):
    original = save(tmp_path, "fill-mask")
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="fill-mask")
    state = dict(original.state_dict())  # the .bin has both ends of each tie
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    same(model, mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="fill-mask"))

    lone = {n: x for n, x in state.items() if n != "cls.predictions.bias"}  # its twin stands in
    torch.save(lone, tmp_path / "pytorch_model.bin")
    same(model, mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="fill-mask"))

    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(MappingError, match=r"decoder\.weight differs from .*word_embeddings"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="fill-mask")


def test_index_buffers_are_dropped(tmp_path):
    save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["embeddings.position_ids"] = torch.arange(40)[None]
    save_file(state, tmp_path / "model.safetensors")
    proven(mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True))


def test_a_fresh_head_must_be_asked_for(tmp_path, caplog):
    save(tmp_path, "token-classification")  # its classifier is not that of sequences
    with pytest.raises(CheckpointError, match="no head for text-classification; num_classes="):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="text-classification")
    model = mlx_zoo.load(
        f"local-dir:{tmp_path}", pretrained=True, task="token-classification", num_classes=3
    )
    assert model(mx.array([[1, 2]])).shape == (1, 2, 3)
    assert "fresh head, to be trained; num_classes=3" in caplog.text
    with pytest.raises(MappingError, match="qa_outputs"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, task="question-answering")
    model = mlx_zoo.load(
        f"local-dir:{tmp_path}", pretrained=True, task="question-answering", num_classes=2
    )
    assert model(mx.array([[1, 2]])).start_logits.shape == (1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_leaves_half_precision_its_numbers(causal, tmp_path):
    save(tmp_path, is_decoder=causal)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, dtype="float16")
    for block in model.blocks:  # lower scores, all by the same: softmax is blind to it
        block.attn.q_proj.bias = block.attn.q_proj.bias + mx.array(4.0, mx.float16)
        block.attn.k_proj.bias = block.attn.k_proj.bias - mx.array(4.0, mx.float16)
    mask = mx.ones((3, 20), mx.int32)
    mask[1, :6] = 0
    mask[2] = 0
    ids = mx.array(np.random.default_rng(0).integers(0, 90, (3, 20)))
    assert mx.isfinite(model(ids, mask).last_hidden_state).all()


def test_wrong_tokens_are_refused(tmp_path):
    model = mlx_zoo.load("bert_base", num_layers=1, vocab_size=50, max_positions=8)
    for ids, message in (
        ([[50]], "token id 50.*has 50"),
        ([[-1]], "token id -1"),
        ([[0] * 9], "9 tokens.*8 positions"),
        ([[]], "B, N > 0"),
        ([1, 2], r"\(B, N\)"),
        ([[0.5]], "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            model(mx.array(ids))
    with pytest.raises(ValueError, match="token type 2"):
        model(mx.array([[1]]), token_type_ids=mx.array([[2]]))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 3\)"):
        model(mx.array([[1, 2]]), mx.array([[1, 1, 1]]))


def same(one, other):
    ids = mx.array(np.random.default_rng(0).integers(0, 90, (2, 20)))
    assert one.config == other.config
    for (name, a), (_, b) in zip(parameters(one), parameters(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    for a, b in zip(tree_flatten(one(ids)), tree_flatten(other(ids)), strict=True):
        np.testing.assert_array_equal(a[1], b[1])


def parameters(model):
    return tree_flatten(model.parameters())


# Real weights -----------------------------------------------------------------------------------

SENTENCES = [
    "MLX is an array framework for machine learning on Apple silicon.",
    "A cat sat on the mat.",
    "Ein Kätzchen saß auf der Matte — 猫.",
    "",
    "word " * 400,
]


def test_minilm_agrees_at_every_hidden_state(minilm):
    model = mlx_zoo.load(f"local-dir:{minilm}", pretrained=True)
    report = proven(model)
    hidden = [
        c for c in report.layers if c.name in ("norm", *(f"blocks.{i}.norm2" for i in range(6)))
    ]
    assert len(hidden) == 7
    assert max(c.max_abs for c in hidden) < 1e-5

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=128, return_tensors="np")
    ours = model(**{name: mx.array(x) for name, x in batch.items()})
    original = transformers.BertModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        wanted = original(**{name: torch.from_numpy(x) for name, x in batch.items()})
    real = batch["attention_mask"].astype(bool)
    difference = np.array(ours.last_hidden_state)[real] - wanted.last_hidden_state.numpy()[real]
    assert np.abs(difference).max() < 1e-5
    np.testing.assert_allclose(ours.pooler_output, wanted.pooler_output, atol=1e-5)


def test_minilm_sentence_embeddings(minilm):
    model = mlx_zoo.load(f"local-dir:{minilm}", pretrained=True, task="sentence-embedding")
    ours = mlx_zoo.pipeline("sentence-embedding", model)(SENTENCES)
    wanted = sentence_transformers.SentenceTransformer(str(minilm), device="cpu").encode(SENTENCES)
    assert np.abs(np.array(ours) - wanted).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    proven(model)


POOLINGS = (
    "cls",
    "max",
    "mean",
    "mean_sqrt_len_tokens",
    "weightedmean",
    "lasttoken",
    ["cls", "max"],
)


@pytest.mark.parametrize("mode", POOLINGS, ids=str)
@pytest.mark.parametrize("extra", ["plain", "dense, normalised"])
def test_every_pooling(mode, extra, minilm, tmp_path):
    save(tmp_path / "body", vocab_size=30522, max_position_embeddings=512)
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "body")
    body = st.Transformer(str(tmp_path / "body"))
    pooling = st.Pooling(body.get_embedding_dimension(), pooling_mode=mode)
    modules = [body, pooling]
    if extra != "plain":
        width = pooling.get_embedding_dimension()
        modules += [st.Dense(width, 24), st.Dense(24, 12, bias=False), st.Normalize()]
        for module in modules[2:4]:
            randomise(module)
    original = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    original.save_pretrained(str(tmp_path / "whole"))
    path = f"local-dir:{tmp_path / 'whole'}"
    model = mlx_zoo.load(path, pretrained=True, task="sentence-embedding")
    ours = np.array(mlx_zoo.pipeline("sentence-embedding", model)(SENTENCES))
    wanted = original.encode(SENTENCES)
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())
