"""The way back: what is exported is loaded by torchvision, timm and transformers, strictly."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from originals import randomise, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mlx_zoo
from mlx_zoo import describe, registry
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.exporting.configs import config_of
from mlx_zoo.hub import cache as cache_module
from mlx_zoo.mapping import engine
from mlx_zoo.preprocess.image import Preprocessing
from mlx_zoo.preprocess.processor import read_processor, write_processor
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()
CHECKPOINTS = registry.checkpoints()


def images(size=32, channels=3, batch=2):
    height, width = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(0).standard_normal((batch, height, width, channels), np.float32)


def nchw(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def trained(model):
    """As training leaves a network: every parameter and statistic is another."""
    random = np.random.default_rng(1)
    weights = {
        name: mx.array(np.array(x) * random.uniform(0.9, 1.1, x.shape).astype(np.float32))
        for name, x in engine.parameters(model).items()
    }
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    return model


def agree(ours, theirs):
    """To 1e-5, of the largest where that is above one; and two inputs give two outputs."""
    ours, theirs = np.array(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(theirs[0] - theirs[-1]).max() > 1e-3, "two inputs, one answer"
    assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(theirs).max())


def same(one, other):
    ours, theirs = engine.parameters(one), engine.parameters(other)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype, name
        assert mx.array_equal(x, theirs[name]), name


def strict_state(folder):
    """The tensors of a folder, of all its shards."""
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= load_file(path)
    return state


def saved_folder(folder, kind, config, **options):
    original = randomise(getattr(transformers, kind)(config, **options))
    original.save_pretrained(folder)
    return original


# Catalogue --------------------------------------------------------------------------------------


def test_every_transformers_config_is_written_and_read_back():
    count = 0
    for checkpoint in CHECKPOINTS.values():
        if not checkpoint.dialect.startswith("transformers"):
            continue
        architecture = registry.architectures()[checkpoint.architecture]
        tasks = (None, *architecture.tasks) if hasattr(checkpoint.config, "task") else ("",)
        for task in tasks:
            config = checkpoint.config if task == "" else replace(checkpoint.config, task=task)
            written = json.loads(json.dumps(architecture.write_config(config)))
            names = {str(i): f"class {i}" for i in range(config.num_classes)}
            found = describe.described({**written, "id2label": names}, "x")
            own = found.config if task == "" else replace(found.config, task=task)
            assert own == config, (checkpoint.name, task)
            if task in ("", "sentence-embedding"):
                assert found.task is None or task == ""
            else:
                assert found.task == task
            assert hasattr(transformers, written["architectures"][0])
            count += 1
    assert count > 200


def of_catalogue(checkpoint):
    """Its config.json, and what that says, without any weights."""
    model = registry.architectures()[checkpoint.architecture].outline(checkpoint.config)
    model.checkpoint = checkpoint
    written = json.loads(json.dumps(config_of(model, checkpoint.dialect, mx.float32, {})))
    return written, describe.described(written, "x")


LIBRARIES = ("timm", "torchvision")
ALL = [c for c in CHECKPOINTS.values() if c.dialect in LIBRARIES and not c.name.endswith("digits")]


def check_constructor(checkpoint):
    written, found = of_catalogue(checkpoint)
    constructor = written.get("architecture") or written["constructor"]
    assert constructor == checkpoint.reference.name
    assert not written.get("model_args"), "the name says it all"
    assert found.config == checkpoint.config
    left = {"test_size": None, "test_resize": None}
    assert replace(found.preprocessing, **left) == replace(checkpoint.preprocessing, **left)
    assert found.labels == checkpoint.labels


@pytest.mark.parametrize("checkpoint", ALL[::9], ids=lambda c: c.name)
def test_a_published_network_gets_its_own_constructor(checkpoint):
    check_constructor(checkpoint)


@pytest.mark.slow
def test_every_published_network_gets_its_own_constructor():
    for checkpoint in ALL:
        check_constructor(checkpoint)
    assert len(ALL) > 500


# Every dialect: a network that its publisher can have.
DEIT = {"dist_token": True, "dist_head": False}
TAUGHT = {"dist_token": True, "dist_head": True}
SMALL_TEXT = {"dims": 32, "num_layers": 1, "num_heads": 2, "mlp_dims": 64, "vocab_size": 99}
DIALECTS = {
    ("resnet_digits", "torchvision"): {},
    ("resnet_digits", "timm"): {},
    ("resnet_digits", "transformers"): {},
    ("vit_digits", "timm"): {},
    ("vit_digits", "torchvision"): {},
    ("vit_digits", "torchvision, old mlp names"): {},
    ("vit_digits", "transformers"): {},
    ("vit_digits", "transformers, since 5"): {},
    ("vit_digits", "transformers, deit"): DEIT,
    ("vit_digits", "transformers, deit, since 5"): DEIT,
    ("vit_digits", "transformers, deit with teacher"): TAUGHT,
    ("vit_digits", "transformers, deit with teacher, since 5"): TAUGHT,
    ("efficientnet_digits", "timm"): {},
    ("efficientnet_digits", "torchvision"): {"padding": "symmetric"},
    ("efficientnet_digits", "transformers"): {"padding": "even"},
    ("bert_base", "transformers"): SMALL_TEXT,
    ("bert_base", "transformers, gamma and beta"): SMALL_TEXT,
    ("bert_base", "transformers, untied"): {**SMALL_TEXT, "tied": False},
    ("bert_base", "transformers, untied, gamma and beta"): {**SMALL_TEXT, "tied": False},
    ("gpt2", "transformers"): SMALL_TEXT,
}


def test_the_dialects_are_all_here():
    known = {(a.name, d) for a in registry.architectures().values() for d in a.dialects}
    assert {(registry.find(name).architecture, dialect) for name, dialect in DIALECTS} == known


@pytest.mark.parametrize(("name", "dialect"), DIALECTS)
def test_every_dialect_there_and_back(name, dialect, tmp_path):
    options = dict(DIALECTS[name, dialect])
    if name == "bert_base":
        options["task"] = "pretraining"
    model = trained(mlx_zoo.load(name, **options))
    first = load_file(mlx_zoo.export(model, tmp_path / "a.safetensors", dialect=dialect))
    back = mlx_zoo.load(name, pretrained=tmp_path / "a.safetensors", **options)
    same(back, model)
    again = load_file(mlx_zoo.export(back, tmp_path / "b.safetensors"))  # as it came
    assert again.keys() == first.keys()
    assert all(torch.equal(x, again[name]) for name, x in first.items())


# transformers -----------------------------------------------------------------------------------

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**TINY, "vocab_size": 99, "intermediate_size": 64, "max_position_embeddings": 40}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
TEXTS = {
    "BertModel": None,
    "BertForMaskedLM": "fill-mask",
    "BertForNextSentencePrediction": "next-sentence-prediction",
    "BertForPreTraining": "pretraining",
    "BertForSequenceClassification": "text-classification",
    "BertForTokenClassification": "token-classification",
    "BertForQuestionAnswering": "question-answering",
    "GPT2LMHeadModel": "text-generation",
    "GPT2ForSequenceClassification": "text-classification",
    "GPT2ForTokenClassification": "token-classification",
}


def tiny(kind, **options):
    if kind.startswith("GPT2"):
        return transformers.GPT2Config(**{**GPT2, "pad_token_id": 0, **options})
    return transformers.BertConfig(**{**BERT, **options})


def loaded_by_transformers(folder, kind):
    """By from_pretrained, which wants for nothing; and by the strict way, of plain PyTorch."""
    model, found = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(found.values()), found
    by_hand = getattr(transformers, kind)(transformers.AutoConfig.from_pretrained(folder))
    by_hand.load_state_dict(strict_state(folder), strict=True)
    for name, x in model.state_dict().items():
        assert torch.equal(x, by_hand.state_dict()[name]), name
    return model.eval()


def answers(model, theirs, ids):
    mask = np.ones_like(ids)
    mask[0, -3:] = 0
    ids = ids * mask  # GPT2ForSequenceClassification looks for padding
    ours = model(mx.array(ids), mx.array(mask))
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).to_tuple()
    ours = [ours] if isinstance(ours, mx.array) else [x for x in ours if x is not None]
    pairs = [(a, b) for a, b in zip(ours, out, strict=False) if hasattr(b, "shape")]
    assert len(pairs) == len(ours)
    return pairs


@pytest.mark.parametrize(("kind", "task"), TEXTS.items())
def test_a_text_network_goes_back_to_transformers(kind, task, tmp_path):
    original = saved_folder(tmp_path / "original", kind, tiny(kind, num_labels=2))
    source = f"local-dir:{tmp_path / 'original'}"
    model = mlx_zoo.load(source, pretrained=True, task=task)
    folder = mlx_zoo.export(model, tmp_path / "same")
    state, published = strict_state(folder), strict_state(tmp_path / "original")
    assert published.keys() <= state.keys() == original.state_dict().keys()
    assert all(torch.equal(x, original.state_dict()[name]) for name, x in state.items())
    same(mlx_zoo.load(f"local-dir:{folder}", pretrained=True, task=task), model)

    if "Classification" in kind:  # another head
        model = mlx_zoo.load(source, pretrained=True, task=task, num_classes=5)
        names = ("to", "be", "or", "not", "that")
        model.checkpoint = replace(model.checkpoint, labels=names)
    folder = mlx_zoo.export(trained(model), tmp_path / "trained")
    theirs = loaded_by_transformers(folder, kind)
    if "Classification" in kind:
        assert theirs.config.id2label == dict(enumerate(names))
    ids = np.random.default_rng(2).integers(1, 99, (3, 12))
    for ours, found in answers(model, theirs, ids):
        agree(ours, found)
    back = mlx_zoo.load(f"local-dir:{folder}", pretrained=True, task=task)
    same(back, model)
    assert back.checkpoint.labels == model.checkpoint.labels or "Classification" not in kind


def test_an_untied_decoder(tmp_path):
    for kind, task in (("BertForMaskedLM", "fill-mask"), ("GPT2LMHeadModel", "text-generation")):
        source = tmp_path / kind
        original = saved_folder(source, kind, tiny(kind, tie_word_embeddings=False))
        model = mlx_zoo.load(f"local-dir:{source}", pretrained=True, task=task)
        folder = mlx_zoo.export(model, tmp_path / f"{kind}-back")
        assert strict_state(folder).keys() == original.state_dict().keys()
        theirs = loaded_by_transformers(folder, kind)
        ids = np.random.default_rng(2).integers(1, 99, (2, 12))
        for ours, found in answers(model, theirs, ids):
            agree(ours, found)
    model = mlx_zoo.load("bert_base", task="fill-mask", tied=False, **SMALL_TEXT)
    state = load_file(mlx_zoo.export(model, tmp_path / "w.safetensors"))
    assert "cls.predictions.decoder.weight" in state
    with pytest.raises(ValueError, match="tied=False, as none of theirs has"):
        mlx_zoo.export(model, tmp_path / "w.safetensors", dialect="transformers")


IMAGES = {
    "ViTForImageClassification": (transformers.ViTConfig, {"num_channels": 1}),
    "DeiTForImageClassification": (transformers.DeiTConfig, {"qkv_bias": False}),
    "DeiTForImageClassificationWithTeacher": (transformers.DeiTConfig, {}),
    "ResNetForImageClassification": (
        transformers.ResNetConfig,
        {"depths": [1, 2], "hidden_sizes": [32, 64], "embedding_size": 16},
    ),
    "EfficientNetForImageClassification": (
        transformers.EfficientNetConfig,
        {
            "width_coefficient": 1.1,
            "depth_coefficient": 1.2,
            "hidden_dim": 1408,
            "in_channels": [32, 16],
            "out_channels": [16, 40],
            "strides": [1, 2],
            "expand_ratios": [1, 6],
            "kernel_sizes": [3, 5],
            "num_block_repeats": [1, 2],
            "depthwise_padding": [1],
        },
    ),
}


def tiny_images(kind):
    make, options = IMAGES[kind]
    if kind.startswith(("ViT", "DeiT")):
        sizes = {**TINY, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
        options = {**sizes, **options}
    return make(num_labels=3, **options)


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_network_goes_back_to_transformers(kind, tmp_path):
    original = saved_folder(tmp_path / "original", kind, tiny_images(kind))
    model = mlx_zoo.load(f"local-dir:{tmp_path / 'original'}", pretrained=True)
    state = strict_state(mlx_zoo.export(model, tmp_path / "same"))
    for name, x in strict_state(tmp_path / "original").items():
        assert name.endswith("num_batches_tracked") or torch.equal(x, state[name]), name

    how = Preprocessing(size=32, resize=40, mean=(0.5,), std=(0.25,), floor_crop=True)
    model.checkpoint = replace(model.checkpoint, labels=("a", "b", "c"), preprocessing=how)
    new = {"ViT": ", since 5", "DeiT": ", deit, since 5"}.get(kind.partition("For")[0], "")
    if kind.endswith("Teacher"):
        new = ", deit with teacher, since 5"
    folder = mlx_zoo.export(
        trained(model), tmp_path / "trained", dialect=f"transformers{new}" if new else None
    )
    theirs = loaded_by_transformers(folder, kind)
    assert theirs.state_dict().keys() == original.state_dict().keys()
    x = images(32, model.config.in_chans)
    with torch.no_grad():
        agree(model(mx.array(x)), theirs(nchw(x)).logits)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    back = mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    same(back, model)
    assert back.checkpoint.labels == ("a", "b", "c")
    assert back.checkpoint.preprocessing == how
    assert type(transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"))


@pytest.mark.parametrize("kind", ["ViTModel", "ResNetModel", "BertModel"])
def test_a_body_has_no_head(kind, tmp_path):
    """Nor a pooler, where ours has none."""
    if kind == "BertModel":
        saved_folder(tmp_path / "a", kind, tiny(kind), add_pooling_layer=False)
        model = mlx_zoo.load(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    else:
        config = tiny_images(kind.replace("Model", "ForImageClassification"))
        saved_folder(tmp_path / "a", kind, config)
        model = mlx_zoo.load(f"local-dir:{tmp_path / 'a'}", pretrained=True, num_classes=0)
    folder = mlx_zoo.export(model, tmp_path / "b")
    options = {} if kind == "ResNetModel" else {"add_pooling_layer": False}
    theirs, found = transformers.AutoModel.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert type(theirs).__name__ == kind
    assert not any(found.values()), found
    same(mlx_zoo.load(f"local-dir:{folder}", pretrained=True), model)


def test_the_genuine_sentence_embedder_goes_back(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = mlx_zoo.load(f"local-dir:{minilm}", pretrained=True, task="sentence-embedding")
    folder = mlx_zoo.export(trained(model), tmp_path / "back")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {"modules.json", "1_Pooling/config.json", "vocab.txt", "config.json"}
    assert not [name for name in names if name.endswith(".bin")]
    texts = ["a cat sat", "shares fell on Monday"]
    wanted = SentenceTransformer(str(folder), device="cpu").encode(texts)
    found = mlx_zoo.pipeline("sentence-embedding", model)(texts)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_projections_after_the_pooling_have_folders_of_their_own(minilm, tmp_path):
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules

    kind = "BertModel"
    saved_folder(tmp_path / "bert", kind, tiny(kind, vocab_size=30522))
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "bert")
    body = modules.Transformer(str(tmp_path / "bert"))
    stack = [body, modules.Pooling(32), modules.Dense(32, 12)]
    original = sentence_transformers.SentenceTransformer(modules=stack, device="cpu")
    randomise(original[2])
    original.save(str(tmp_path / "original"))
    (tmp_path / "original" / "2_Dense" / "pytorch_model.bin").write_bytes(b"older")
    source = f"local-dir:{tmp_path / 'original'}"
    model = mlx_zoo.load(source, pretrained=True, task="sentence-embedding")
    folder = mlx_zoo.export(trained(model), tmp_path / "back")
    assert not [*folder.rglob("*.bin")]
    assert load_file(folder / "2_Dense" / "model.safetensors").keys() == {
        "linear.weight",
        "linear.bias",
    }
    texts = ["a cat sat", "shares fell on Monday"]
    back = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    found = mlx_zoo.pipeline("sentence-embedding", model)(texts)
    np.testing.assert_allclose(found, back.encode(texts), atol=1e-5)
    assert np.abs(original.encode(texts) - found).max() > 1e-3, "trained since"
    mlx_zoo.export(model, folder)  # all of it may be replaced


def test_a_published_config_is_kept_where_it_is_right(tmp_path):
    kind = "BertForSequenceClassification"
    own = {"custom": {"x": 1}, "problem_type": "multi_label_classification"}
    saved_folder(tmp_path / "a", kind, tiny(kind, num_labels=3, **own))
    source = {"name": f"local-dir:{tmp_path / 'a'}", "task": "text-classification"}
    model = mlx_zoo.load(**source, pretrained=True)
    config = transformers.AutoConfig.from_pretrained(mlx_zoo.export(model, tmp_path / "b"))
    assert (config.custom, config.problem_type) == tuple(own.values())
    model = mlx_zoo.load(**source, pretrained=True, num_classes=4, dropout=0.3)
    config = transformers.AutoConfig.from_pretrained(mlx_zoo.export(model, tmp_path / "c"))
    assert (config.custom, config.problem_type) == ({"x": 1}, None), "of another head"
    assert (config.num_labels, config.hidden_dropout_prob) == (4, 0.3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays(dtype, tmp_path):
    saved_folder(tmp_path / "a", "GPT2LMHeadModel", tiny("GPT2"))
    model = mlx_zoo.load(f"local-dir:{tmp_path / 'a'}", pretrained=True, dtype=dtype)
    folder = mlx_zoo.export(model, tmp_path / "b")
    kind = getattr(torch, dtype)
    assert {x.dtype for x in strict_state(folder).values()} == {kind}
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == kind
    same(mlx_zoo.load(f"local-dir:{folder}", pretrained=True), model)


def test_large_weights_are_in_shards(tmp_path):
    saved_folder(tmp_path / "a", "GPT2LMHeadModel", tiny("GPT2"))
    model = mlx_zoo.load(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    folder = mlx_zoo.export(model, tmp_path / "b", max_shard_size="20KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state = strict_state(folder)
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in state.values())
    largest = max(x.nbytes for x in state.values())
    for name in shards:
        assert sum(x.nbytes for x in load_file(folder / name).values()) <= max(largest, 20_000)
    loaded_by_transformers(folder, "GPT2LMHeadModel")
    same(mlx_zoo.load(f"local-dir:{folder}", pretrained=True), model)
    mlx_zoo.export(model, folder)  # in the place of the shards
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    with pytest.raises(ValueError, match="max_shard_size=0"):
        mlx_zoo.export(model, folder, max_shard_size=0)


PREPARED = [
    Preprocessing(size=24, resize=32, interpolation="bicubic", floor_crop=True),
    Preprocessing(size=(24, 32), resize=32, interpolation="lanczos", floor_crop=True),
    Preprocessing(size=24, resize=24, crop_mode="squash", mean=(0,) * 3, std=(1,) * 3),
    Preprocessing(size=(24, 40), resize=(24, 40), crop_mode="squash", floor_crop=True),
    Preprocessing(size=24, resize=(30, 33), crop_mode="squash", interpolation="nearest"),
]


@pytest.mark.parametrize("how", PREPARED, ids=str)
def test_preprocessing_goes_back(how, tmp_path):
    how = replace(how, floor_crop=True)
    written = write_processor(how)
    assert read_processor(json.loads(json.dumps(written))) == how
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (47, 61, 3), np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    ours = np.array(how(Image.fromarray(pixels)))[0]
    np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-5)


def test_a_border_is_no_processors():
    assert write_processor(Preprocessing(size=8, resize=8, crop_mode="border")) is None
    assert write_processor(Preprocessing(size=8, resize=(8, 9))) is None


# timm -------------------------------------------------------------------------------------------

SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 4}
VITS = {
    "vit_tiny_patch16_224": {"img_size": (48, 32)},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "vit_base_patch16_siglip_224": {"img_size": 48, "num_classes": 3},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "in_chans": 4},
    "deit3_small_patch16_224": {"img_size": 32, "in_chans": 1},
}
# Of resnets, timm can be told the depths and widths; of efficientnets it has a name for each.
SHALLOW = {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)}
CONVOLUTIONS = {
    "resnet18d": {**SHALLOW, "in_chans": 2},
    "resnet50_gn": {**SHALLOW, "channels": (32, 32, 64, 64)},
    "resnext50_32x4d": {**SHALLOW, "cardinality": 4, "base_width": 16},
    "resnetblur50": {**SHALLOW, "num_classes": 0},
    "tf_efficientnet_lite0": {"in_chans": 1},
}


def loaded_by_timm(folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def check_timm(model, tmp_path, size):
    labels = tuple(f"kind {i}" for i in range(model.config.num_classes))
    how = Preprocessing(size=size, resize=size, mean=(0.3,) * model.config.in_chans,
                        std=(0.2,) * model.config.in_chans)  # fmt: skip
    model.checkpoint = replace(model.checkpoint, labels=labels, preprocessing=how)
    folder = mlx_zoo.export(trained(model), tmp_path / "back")
    theirs = loaded_by_timm(folder)
    x = images(size, model.config.in_chans)
    with torch.no_grad():
        agree(model(mx.array(x)), theirs(nchw(x)))
    assert theirs.pretrained_cfg["mean"] == list(how.mean)
    back = mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    same(back, model)
    assert back.checkpoint.labels == labels
    assert back.checkpoint.preprocessing == how
    return folder


@pytest.mark.parametrize("variant", VITS)
def test_a_vision_transformer_goes_back_to_timm(variant, tmp_path):
    sizes = {"num_classes": 7, **VITS[variant]}
    original = randomise(timm.create_model(variant, **SMALL, **sizes))
    path = saved(original, tmp_path / "w.pth")
    mlp_dims = original.blocks[0].mlp.fc2.in_features
    own = {"num_layers": 2, "dims": 96, "num_heads": 4, "mlp_dims": mlp_dims}
    model = mlx_zoo.load(variant, pretrained=path, **own, **sizes)
    model.checkpoint = replace(model.checkpoint, dialect="timm")
    state = load_file(mlx_zoo.export(model, tmp_path / "same.safetensors"))
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in original.state_dict().items())
    folder = check_timm(model, tmp_path, sizes["img_size"])
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2)
    assert other.num_classes == 2, "timm finds the head"


@pytest.mark.parametrize("variant", CONVOLUTIONS)
def test_a_convolutional_network_goes_back_to_timm(variant, tmp_path):
    told = {"num_classes": 7, **CONVOLUTIONS[variant]}
    original = randomise(timm.create_model(variant, **told))
    names = {"layers": "depths", "channels": "widths", "cardinality": "groups"}
    own = {names.get(name, name): value for name, value in told.items()}
    model = mlx_zoo.load(variant, pretrained=saved(original, tmp_path / "w.pth"), **own)
    model.checkpoint = replace(model.checkpoint, dialect="timm")
    check_timm(model, tmp_path, 64)


@pytest.mark.parametrize("name", ["resnet_digits", "vit_digits"])
def test_the_bundled_networks_go_back_to_timm(name, tmp_path):
    model = mlx_zoo.load(name, pretrained=True)
    theirs = loaded_by_timm(mlx_zoo.export(model, tmp_path / "same"))
    x = images(32, 1)
    with torch.no_grad():
        agree(model(mx.array(x)), theirs(nchw(x)))
    assert theirs.pretrained_cfg["label_names"] == list("0123456789")
    for change in ({"num_classes": 3}, {"in_chans": 3}):
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        check_timm(mlx_zoo.load(name, pretrained=True, **change), tmp_path, 32)


def test_a_network_that_timm_cannot_make(tmp_path):
    model = mlx_zoo.load("efficientnet_digits", pretrained=True)
    with pytest.raises(ValueError, match=r"timm has no constructor .* stem_width=32, not 16"):
        mlx_zoo.export(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert mlx_zoo.export(model, tmp_path / "w.safetensors").is_file()


# torchvision ------------------------------------------------------------------------------------


def loaded_by_torchvision(folder):
    config = json.loads((folder / "config.json").read_text())
    model = torchvision.models.get_model(config["constructor"], weights=None, **config["options"])
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


def check_torchvision(name, original, tmp_path, size, **sizes):
    path = saved(original, tmp_path / "w.pth")
    model = mlx_zoo.load(name, pretrained=path, **sizes)
    dialect = "torchvision"
    state = load_file(mlx_zoo.export(model, tmp_path / "same.safetensors", dialect=dialect))
    for name, x in original.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(x, state[name]), name
    assert state.keys() == original.state_dict().keys()
    assert all(x.shape == original.state_dict()[name].shape for name, x in state.items())
    assert all(x.dtype == original.state_dict()[name].dtype for name, x in state.items())
    folder = mlx_zoo.export(trained(model), tmp_path / "back", dialect=dialect)
    x = images(size)
    with torch.no_grad():
        agree(model(mx.array(x)), loaded_by_torchvision(folder)(nchw(x)))
    back = mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    same(back, model)
    assert back.checkpoint.preprocessing == model.checkpoint.preprocessing
    return model


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_a_network_goes_back_to_torchvision(name, tmp_path):
    original = randomise(torchvision.models.get_model(name, weights=None, num_classes=7))
    model = check_torchvision(name, original, tmp_path, 64, num_classes=7)
    with pytest.raises(ValueError, match=r"is no exported folder|which no export wrote"):
        mlx_zoo.export(model, tmp_path)
    model.reset_input(1)
    with pytest.raises(ValueError, match="in_chans=1: torchvision's networks have 3 channels"):
        mlx_zoo.export(model, tmp_path / "grey", dialect="torchvision")


@pytest.mark.slow
def test_a_vision_transformer_goes_back_to_torchvision(tmp_path):
    original = torchvision.models.vit_b_32(image_size=64, num_classes=7)
    check_torchvision("vit_b_32", randomise(original), tmp_path, 64, num_classes=7, img_size=64)


# Files ------------------------------------------------------------------------------------------


@pytest.fixture
def digits():
    return mlx_zoo.load("resnet_digits", pretrained=True)


def test_a_file_that_libraries_look_for_has_its_config_beside_it(digits, tmp_path):
    path = tmp_path / "model.safetensors"
    mlx_zoo.export(digits, path)
    config = (tmp_path / "config.json").read_text()
    assert loaded_by_timm(tmp_path)
    mlx_zoo.export(digits, path)
    assert (tmp_path / "config.json").read_text() == config
    before = path.read_bytes()
    other = mlx_zoo.load("resnet_digits", pretrained=True, num_classes=3)
    for text in (None, "{}", "not json"):
        if text:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json describes another network: give"):
            mlx_zoo.export(other, path)
    assert path.read_bytes() == before
    mlx_zoo.export(other, tmp_path / "other.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == [
        "config.json",
        "model.safetensors",
        "other.safetensors",
    ]


def test_the_header_says_who_wrote_it(digits, tmp_path):
    with safe_open(mlx_zoo.export(digits, tmp_path / "w.safetensors"), "pt") as file:
        said = file.metadata()
    assert said == {"format": "pt", "exported_by": f"mlx_zoo {mlx_zoo.__version__}"}


def test_what_an_export_wrote_is_replaced_and_nothing_else(digits, tmp_path):
    folder = mlx_zoo.export(digits, tmp_path / "a")
    changed = trained(digits)
    mlx_zoo.export(changed, folder)
    same(mlx_zoo.load(f"local-dir:{folder}", pretrained=True), changed)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has notes.txt, which no export wrote"):
        mlx_zoo.export(digits, folder)
    (folder / "notes.txt").unlink()
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has model.safetensors, which no export wrote"):
        mlx_zoo.export(digits, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is no exported folder"):
        mlx_zoo.export(digits, folder)
    (folder / "config.json").unlink()
    mlx_zoo.export(digits, folder)  # an empty one
    with pytest.raises(ValueError, match="is a file; give the name of a folder"):
        mlx_zoo.export(digits, folder / "config.json")
    with pytest.raises(ValueError, match="is a pickle"):
        mlx_zoo.export(digits, tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("where", ["folder", "weights.safetensors"])
def test_a_full_disk_leaves_what_was_there(where, digits, tmp_path, monkeypatch):
    path = mlx_zoo.export(digits, tmp_path / where)
    files = [p for p in (path, *path.glob("*")) if p.is_file()]
    before = {p: p.read_bytes() for p in files}

    def full(path, *args):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "save", full)
    with pytest.raises(OSError, match="No space left"):
        mlx_zoo.export(trained(digits), path)
    assert {p: p.read_bytes() for p in files} == before
    assert not list(tmp_path.glob(".partial-*"))


def test_a_failed_rename_leaves_what_was_there(digits, tmp_path, monkeypatch):
    folder = mlx_zoo.export(digits, tmp_path / "a")
    before = (folder / "model.safetensors").read_bytes()
    rename = type(folder).rename

    def failing(self, target):
        if self.name.startswith(".partial") and target.name == "a":
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", failing)
    with pytest.raises(OSError, match="no"):
        mlx_zoo.export(trained(digits), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_layers_that_were_added_are_refused(digits, tmp_path):
    digits.layer1[0].extra = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"layer1.0.extra.bias: the published network has other layers"
    ):
        mlx_zoo.export(digits, tmp_path / "a")
    del digits.layer1[0].extra
    bias = digits.fc.pop("bias")
    with pytest.raises(ValueError, match=r"fc.bias: the published network has other layers"):
        mlx_zoo.export(digits, tmp_path / "a")
    digits.fc.bias = bias
    digits.fc.weight = digits.fc.weight[:3]
    with pytest.raises(ValueError, match=r"fc.weight has another shape than model.config says"):
        mlx_zoo.export(digits, tmp_path / "a")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"constructor": "alexnet"}, "torchvision's 'alexnet' is not implemented"),
        ({"options": {"norm_layer": "x"}}, r"options=.'norm_layer'.* is not implemented"),
        ({"options": {"num_classes": "x"}}, "config.json cannot be read"),
        ({"preprocessing": {"size": 3}}, "config.json cannot be read"),
    ],
)
def test_a_strangers_config_of_torchvision(said, message, tmp_path):
    config = {"library": "torchvision", "constructor": "resnet18", **said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedConfig, match=message):
        mlx_zoo.info(f"local-dir:{tmp_path}")


def test_another_publisher(tmp_path):
    """torchvision's network for timm, and timm's for torchvision and transformers."""
    original = randomise(torchvision.models.resnet18(num_classes=4))
    model = mlx_zoo.load("resnet18", pretrained=saved(original, tmp_path / "w.pth"), num_classes=4)
    x = images(48)
    with torch.no_grad():
        theirs = loaded_by_timm(mlx_zoo.export(model, tmp_path / "timm", dialect="timm"))
        agree(model(mx.array(x)), theirs(nchw(x)))
        folder = mlx_zoo.export(model, tmp_path / "hf", dialect="transformers")
        theirs = loaded_by_transformers(folder, "ResNetForImageClassification")
        agree(model(mx.array(x)), theirs(nchw(x)).logits)
