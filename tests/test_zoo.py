"""load, info, list_models, convert and export, as the contract has them.

Numbers in the names are the rows of the fault matrix. Repositories are on a hub on 127.0.0.1.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from dataclasses import FrozenInstanceError, replace
from io import BytesIO
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from faults import DIGITS
from faults import TIMM_CONFIG as PUBLISHED
from hub_server import LocalHub, sha256
from huggingface_hub import constants
from originals import proven, randomise
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.describe import DATA
from mlx_zoo.errors import (
    CheckpointError,
    DownloadError,
    IntegrityError,
    MappingError,
    NotCached,
    RevisionNotFound,
    UnknownModel,
    UnsupportedConfig,
    VerificationError,
)
from mlx_zoo.hub import cache as cache_module
from mlx_zoo.mapping import engine
from mlx_zoo.models.layers import ACTIVATIONS
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
import sentence_transformers  # noqa: E402
import sentence_transformers.sentence_transformer.modules  # noqa: E402
import timm  # noqa: E402
import transformers  # noqa: E402

TIMM_CONFIG = {**PUBLISHED, "label_names": list("0123456789")}
BERT_NAME = "google-bert/bert-base-uncased"


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """An empty hub; the client's caches in tmp_path."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with LocalHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def no_network(monkeypatch):
    """Any look at a socket is a failure."""
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a connection"))


def digits():
    """The state dict of the bundled network, a copy of its own."""
    return torch.load(DATA / "resnet_digits.pth", weights_only=True)


def pickled(state) -> bytes:
    stream = BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def saved(state, path) -> Path:
    content = to_safetensors(state) if path.suffix == ".safetensors" else pickled(state)
    path.write_bytes(content)
    return path


def timm_files(state=None, **config):
    return {
        "config.json": json.dumps({**TIMM_CONFIG, **config}).encode(),
        "model.safetensors": to_safetensors(state or digits()),
    }


def small_bert(kind="BertForPreTraining", seed=0, **options):
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    original = randomise(
        getattr(transformers, kind)(transformers.BertConfig(**sizes, **options)), seed
    )
    if getattr(original, "cls", None) is not None:
        original.tie_weights()
    return original


def bert_folder(folder, kind="BertForPreTraining", **options):
    original = small_bert(kind, **options)
    transformers.utils.logging.disable_progress_bar()
    original.save_pretrained(folder)
    return original


def bert_files(folder, **options):
    bert_folder(folder, **options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(model):
    return {name: np.array(x) for name, x in engine.parameters(model).items()}


def same(one, other):
    ours, theirs = engine.parameters(one), engine.parameters(other)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype, name
        assert mx.array_equal(x, theirs[name]), name


def is_digits(model, state=None):
    """Whether a network has the published weights, in MLX's layout."""
    for name, x in (state or digits()).items():
        if not name.endswith("num_batches_tracked"):
            ours = weights(model)[name]
            theirs = x.numpy()
            theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    return True


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "means"),
    {
        "resnet18": "resnet18.imagenet1k_v1",
        "ResNet18": "resnet18.imagenet1k_v1",
        "resnet50": "resnet50.imagenet1k_v2",
        "resnet50.imagenet1k_v1": "resnet50.imagenet1k_v1",
        "ResNet50_Weights.IMAGENET1K_V2": "resnet50.imagenet1k_v2",
        "ResNet50_Weights.IMAGENET1K_V1": "resnet50.imagenet1k_v1",
        "resnet50.a1_in1k": "resnet50.a1_in1k",
        "resnet50.a1-in1k": "resnet50.a1_in1k",
        "RESNET50.A1_IN1K": "resnet50.a1_in1k",
        "timm/resnet50.a1_in1k": "resnet50.a1_in1k",
        "hf-hub:timm/resnet50.a1_in1k": "resnet50.a1_in1k",
        "wide-resnet50-2": "wide_resnet50_2.imagenet1k_v2",
        "bert-base-uncased": "bert_base_uncased",
        "bert_base_uncased": "bert_base_uncased",
        "BERT-base-uncased": "bert_base_uncased",
        "google-bert/bert-base-uncased": "bert_base_uncased",
        "hf-hub:google-bert/bert-base-uncased": "bert_base_uncased",
        "all-MiniLM-L6-v2": "all_minilm_l6_v2",
        "sentence-transformers/all-MiniLM-L6-v2": "all_minilm_l6_v2",
        "resnet-digits": "resnet_digits",
        "bert-base": "bert_base",
    }.items(),
)
def test_a_name_in_every_spelling(name, means, no_network):
    assert mlx_zoo.info(name).name == means


def test_torchvision_s_own_enumeration_is_a_name(no_network):
    for weights in (*torchvision.models.ResNet18_Weights, *torchvision.models.ResNet50_Weights):
        assert mlx_zoo.info(str(weights)).source == weights.url


def test_info_is_what_is_published(no_network):
    found = mlx_zoo.info("resnet18")
    assert found.architecture == "resnet"
    assert found.source == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert found.license == "bsd-3-clause"
    assert found.num_params == 11689512
    assert found.accuracy == {"acc1": 69.758, "acc5": 89.078}
    assert (found.preprocessing.size, found.preprocessing.resize) == (224, 256)
    with pytest.raises(FrozenInstanceError):
        found.name = "another"


def test_info_of_a_repository_that_is_not_in_the_registry(hub):
    hub.push("org/name", timm_files())
    found = mlx_zoo.info("org/name")
    assert found.name == "org/name"
    assert found.architecture == "resnet"
    assert found.config.num_classes == 10
    assert found.license == "mit"
    assert found.preprocessing.size == 32
    assert found.preprocessing.resize == 40
    assert found.preprocessing.interpolation == "bicubic"
    assert found.labels == tuple("0123456789")
    assert hub.gets("model.safetensors") == []


def test_list_models(no_network):
    names = mlx_zoo.list_models()
    assert names == sorted(set(names))
    assert {"resnet18", "resnet18.a1_in1k", "resnet26", "bert_base", "bert_base_uncased"} <= {
        *names
    }
    published = mlx_zoo.list_models(pretrained=True)
    assert {"resnet18", "resnet18.a1_in1k", "bert_base_uncased"} <= {*published}
    assert {"bert_base", "bert_large"} & {*published} == set()
    assert mlx_zoo.list_models("resnet18.*") == [n for n in names if n.startswith("resnet18.")]
    assert mlx_zoo.list_models("bert-base-*") == mlx_zoo.list_models("BERT_base_*") != []
    assert mlx_zoo.list_models("nothing*") == []
    families = {mlx_zoo.info(name).architecture for name in names}
    assert families == {"resnet", "vit", "efficientnet", "bert", "gpt2"}


def test_list_models_by_what_they_are(no_network):
    small = mlx_zoo.list_models(family="vit", source="timm", max_params=7e6, pretrained=True)
    assert "vit_tiny_patch16_224.augreg_in21k_ft_in1k" in small
    for name in small:
        checkpoint = mlx_zoo.info(name)
        assert (checkpoint.architecture, checkpoint.reference.library) == ("vit", "timm")
        assert checkpoint.num_params <= 7e6
    torchvisions = mlx_zoo.list_models("*.imagenet1k_*", source="torchvision", pretrained=True)
    assert len(torchvisions) == 39
    masked = mlx_zoo.list_models(task="fill-mask", pretrained=True)
    assert "bert_base_uncased" in masked
    assert "all_minilm_l6_v2" not in masked, "its weights have no such head"
    assert "all_minilm_l6_v2" in mlx_zoo.list_models(task="sentence-embedding")
    assert "bert_base" in mlx_zoo.list_models(task="fill-mask"), "random weights may have any"
    assert "gpt2" in mlx_zoo.list_models(task="text-generation", max_params=1.3e8)
    assert "gpt2_xl" not in mlx_zoo.list_models(task="text-generation", max_params=1.3e8)
    features = mlx_zoo.list_models(task="image-feature-extraction")
    assert {"resnet18", "vit_b_16", "efficientnet_b0"} <= set(features)
    assert "gpt2" not in features


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "resnets"}, "family='resnets': one of bert, "),
        ({"task": "translation"}, "task='translation': one of fill-mask, "),
        ({"source": "keras"}, "source='keras': one of timm, torchvision, transformers"),
    ],
)
def test_a_filter_that_there_is_not(options, message):
    with pytest.raises(ValueError, match=message):
        mlx_zoo.list_models(**options)


@pytest.mark.parametrize(
    ("typo", "closest"),
    [
        ("resnet81", "resnet18"),
        ("resnet-5O", "resnet50"),
        ("resnet50.a1_in2k", r"resnet50\.a1_in1k"),
        ("bert-base-uncase", "bert_base_uncased"),
        ("minilm-l6-v2", "all_minilm_l6_v2"),
        ("ResNet50_Weights.IMAGENET1K_V3", r"resnet50_weights\.imagenet1k_v2"),
    ],
)
def test_row_38_a_typo_gets_the_closest_names(typo, closest, no_network):
    for function in (mlx_zoo.load, mlx_zoo.info):
        with pytest.raises(UnknownModel, match=f"{typo}.*did you mean .*{closest}"):
            function(typo)
    assert mlx_zoo.info("resnet18")  # what is suggested exists


@pytest.mark.parametrize("name", ["xyzzy", "", "alexnet"])
def test_row_38_a_name_that_is_like_no_other(name, no_network):
    with pytest.raises(UnknownModel, match=r"list_models\(\)|did you mean"):
        mlx_zoo.load(name)


# --------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (123, {}, "name=123"),
        (None, {}, "name=None"),
        (DIGITS, {"pretrained": None}, "pretrained=None"),
        (DIGITS, {"pretrained": 1}, "pretrained=1"),
        (DIGITS, {"pretrained": "yes"}, "pretrained='yes'.*path"),
        (DIGITS, {"dtype": "int8"}, "float32, float16, bfloat16"),
        (DIGITS, {"dtype": mx.int32}, "float32, float16, bfloat16"),
        (DIGITS, {"dtype": np.float32}, "float32, float16, bfloat16"),
        (DIGITS, {"num_classes": -1}, "num_classes=-1: a count"),
        (DIGITS, {"num_classes": "10"}, "num_classes='10': a count"),
        (DIGITS, {"num_classes": 2.5}, "num_classes=2.5: a count"),
        (DIGITS, {"in_chans": 0}, "in_chans=0: a count"),
        (DIGITS, {"in_chans": "3"}, "in_chans='3': a count"),
        ("bert_base", {"in_chans": 3}, "in_chans=3.*takes tokens"),
        (DIGITS, {"img_size": 64}, "img_size=64.*any size"),
        ("bert_base", {"img_size": 64}, "img_size=64.*tokens"),
        (DIGITS, {"task": "fill-mask"}, "task='fill-mask'.*has image-classification"),
        ("bert_base", {"task": "translation"}, "has .*fill-mask.*question-answering"),
        ("bert_base", {"num_classes": 3}, "num_classes=3.*task="),
        (DIGITS, {"depth": 3}, "depth: not an option of ResNetConfig.*depths"),
        ("bert_base", {"heads": 3}, "heads: not an option of BertConfig.*num_heads"),
        (DIGITS, {"revision": "main"}, "resnet_digits has no revisions.*'main'"),
        ("resnet18", {"revision": "main"}, "resnet18 has no revisions"),
        ("bert_base", {"revision": "main"}, "bert_base has no revisions"),
        ("org/name@v1", {"revision": "v2"}, "two revisions"),
    ],
)
def test_wrong_arguments(name, options, message, no_network, cache):
    with pytest.raises(ValueError, match=message):
        mlx_zoo.load(name, **{"pretrained": True, **options})
    assert not cache.exists()


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_bare_file_does_not_say_what_it_is_for(pretrained, tmp_path):
    path = saved(digits(), tmp_path / "w.pth")
    for name in (path, str(path)):
        with pytest.raises(ValueError, match=r"which architecture.*load\('resnet18', pretrained="):
            mlx_zoo.load(name, pretrained=pretrained)


def test_an_architecture_without_published_weights():
    with pytest.raises(UnknownModel, match=r"no published weights.*pretrained='file\.pth'"):
        mlx_zoo.load("bert_base", pretrained=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50.a1_in1k", "bert-base-uncased", DIGITS])
def test_random_weights_need_no_request_and_no_file(name, no_network, tmp_path):
    model = mlx_zoo.load(name)
    assert model.checkpoint is None
    assert not model.training
    assert files_in(tmp_path) == []
    for x in engine.parameters(model).values():
        assert x.dtype == mx.float32


def test_random_weights_of_any_size_and_type(no_network):
    model = mlx_zoo.load("resnet18", num_classes=7, in_chans=4, dtype="bfloat16", act="silu")
    assert model(mx.zeros((1, 32, 32, 4), mx.bfloat16)).shape == (1, 7)
    assert {x.dtype for x in engine.parameters(model).values()} == {mx.bfloat16}
    assert model.config.act == "silu"
    with pytest.raises(FrozenInstanceError):
        model.config.act = "relu"
    model = mlx_zoo.load("bert_base", num_layers=1, task="token-classification", num_classes=3)
    assert model(mx.array([[1, 2]])).shape == (1, 2, 3)


# ----------------------------------------------------------------------- every kind of source


def test_the_bundled_network(no_network):
    model = mlx_zoo.load(DIGITS, pretrained=True)
    assert is_digits(model)
    assert not model.training
    assert model.checkpoint.source == "package:resnet_digits.pth"
    assert isinstance(model, nn.Module)
    assert model.config == registry.architectures()["resnet"].variants[DIGITS]


@pytest.mark.parametrize("name", ["org/name", "hf-hub:org/name", "org/name@main", "local"])
def test_a_timm_repository(name, hub, tmp_path):
    files = timm_files()
    commit = hub.push("org/name", files)
    if name == "local":
        for file, content in files.items():
            (tmp_path / file).write_bytes(content)
        name = f"local-dir:{tmp_path}"
    model = mlx_zoo.load(name, pretrained=True)
    assert is_digits(model)
    assert model.checkpoint.reference.library == model.checkpoint.dialect == "timm"
    assert model.checkpoint.revision == (None if name.startswith("local") else commit)
    assert model.checkpoint.source == name if ":" in name else f"hf-hub:{name}"


def test_a_timm_repository_of_the_registry(hub):
    timm = pytest.importorskip("timm")
    original = randomise(timm.create_model("resnet18", pretrained=False))
    content = to_safetensors(original.state_dict())
    hub.push("timm/resnet18.a1_in1k", {"model.safetensors": content})
    model = mlx_zoo.load("resnet18.a1_in1k", pretrained=True)
    assert is_digits(model, original.state_dict())
    assert model.checkpoint.name == "resnet18.a1_in1k"
    hub.requests.clear()
    same(model, mlx_zoo.load("hf-hub:timm/resnet18.a1_in1k", pretrained=True))
    assert hub.requests == []


def at_url(hub, monkeypatch, content, digest=None):
    """`resnet_digits`, published at an address whose file name ends in its hash."""
    path = f"/models/digits-{digest or sha256(content)[:8]}.pth"
    hub.plain[path] = content
    published = replace(
        registry.find(DIGITS), source=hub.endpoint + path, dialect="torchvision", sha256=None
    )
    monkeypatch.setitem(registry._names(), DIGITS, published)
    return path


def test_a_torchvision_address(hub, monkeypatch):
    path = at_url(hub, monkeypatch, pickled(digits()))
    model = mlx_zoo.load(DIGITS, pretrained=True)
    assert is_digits(model)
    assert model.checkpoint.dialect == "torchvision"
    assert hub.requests == [f"GET {path}"]
    mlx_zoo.load(DIGITS, pretrained=True)
    assert hub.requests == [f"GET {path}"]


def test_a_torchvision_address_with_other_bytes(hub, monkeypatch, cache):
    at_url(hub, monkeypatch, pickled(digits()), digest="01234567")
    with pytest.raises(IntegrityError, match="01234567"):
        mlx_zoo.load(DIGITS, pretrained=True)
    assert files_in(cache) == []


def in_shards(state, suffix):
    """The state dict in three files and their index."""
    write = to_safetensors if suffix == "safetensors" else pickled
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(state)
    files, weight_map = {}, {}
    for i in range(3):
        file = f"{stem}-{i + 1:05}-of-00003.{suffix}"
        files[file] = write({name: state[name] for name in names[i::3]})
        weight_map |= dict.fromkeys(names[i::3], file)
    files[f"{stem}.{suffix}.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


STORED = {
    "safetensors": lambda state: {"model.safetensors": to_safetensors(state)},
    "sharded safetensors": lambda state: in_shards(state, "safetensors"),
    "bin": lambda state: {"pytorch_model.bin": pickled(state)},
    "sharded bin": lambda state: in_shards(state, "bin"),
}


@pytest.mark.parametrize("place", ["hub", "folder"])
@pytest.mark.parametrize("stored", STORED)
def test_a_transformers_repository(stored, place, hub, tmp_path):
    bert_folder(tmp_path / "original")
    wanted = mlx_zoo.load(f"local-dir:{tmp_path / 'original'}", pretrained=True, task="fill-mask")
    state = load_file(tmp_path / "original" / "model.safetensors")
    files = {"config.json": (tmp_path / "original" / "config.json").read_bytes()}
    files |= STORED[stored](state)
    name = BERT_NAME
    if place == "hub":
        hub.push(BERT_NAME, files)
    else:
        (tmp_path / "other").mkdir()
        for file, content in files.items():
            (tmp_path / "other" / file).write_bytes(content)
        name = f"local-dir:{tmp_path / 'other'}"
    model = mlx_zoo.load(name, pretrained=True, task="fill-mask")
    same(model, wanted)
    assert model.config == wanted.config


@pytest.mark.parametrize(
    "spelling",
    ["bert-base-uncased", "bert_base_uncased", BERT_NAME, f"hf-hub:{BERT_NAME}@main"],
)
def test_a_name_of_the_registry_reads_its_repository_s_config(spelling, hub, tmp_path):
    hub.push(BERT_NAME, bert_files(tmp_path / "original"))
    model = mlx_zoo.load(spelling, pretrained=True)
    assert model.config.dims == 32  # of the repository, not of the table
    assert model(mx.array([[1, 2]])).last_hidden_state.shape == (1, 2, 32)


def test_a_missing_shard_is_named(hub, tmp_path):
    files = in_shards(load_state(tmp_path), "safetensors")
    del files["model-00002-of-00003.safetensors"]
    hub.push("org/name", files | {"config.json": (tmp_path / "config.json").read_bytes()})
    with pytest.raises(DownloadError, match="model-00002-of-00003"):
        mlx_zoo.load("org/name", pretrained=True)


def load_state(folder):
    bert_folder(folder)
    return load_file(folder / "model.safetensors")


def sentence_folder(folder):
    """A BERT whose sentence vectors go through a dense layer in a folder of its own."""
    bert_folder(folder, "BertModel")
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    dense = {
        "in_features": 32,
        "out_features": 6,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules.items())
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    for path, config in (("1_Pooling", pooling), ("2_Dense", dense)):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    state = {"linear.weight": torch.randn(6, 32), "linear.bias": torch.randn(6)}
    saved(state, folder / "2_Dense" / "model.safetensors")
    return state


def test_row_19_other_bytes_in_the_folder_of_a_part(tmp_path, cache):
    state = sentence_folder(tmp_path)
    name = f"local-dir:{tmp_path}"
    first = mlx_zoo.load(name, pretrained=True, task="sentence-embedding")
    np.testing.assert_array_equal(first.dense[0].weight, state["linear.weight"].numpy())
    state["linear.weight"] += 1
    saved(state, tmp_path / "2_Dense" / "model.safetensors")
    second = mlx_zoo.load(name, pretrained=True, task="sentence-embedding")
    np.testing.assert_array_equal(second.dense[0].weight, state["linear.weight"].numpy())
    assert len(list(cache_module.entries(cache))) == 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": {"lr": 0.1}},
        lambda state: OrderedDict((f"module.{name}", x) for name, x in state.items()),
        lambda state: {f"_orig_mod.{name}": x for name, x in state.items()},
        lambda state: {"state_dict": {f"module.{name}": x for name, x in state.items()}},
    ],
    ids=["state_dict", "model", "module.", "_orig_mod.", "nested, module."],
)
def test_row_29_training_checkpoints(wrap, tmp_path):
    path = saved(wrap(digits()), tmp_path / "w.pth")
    assert is_digits(mlx_zoo.load(DIGITS, pretrained=path))


def test_a_local_file_is_not_what_was_published(tmp_path):
    state = digits()
    state["fc.bias"] += 1
    model = mlx_zoo.load(DIGITS, pretrained=saved(state, tmp_path / "w.pth"))
    assert is_digits(model, state)
    assert model.checkpoint.accuracy == {}
    assert model.checkpoint.sha256 is model.checkpoint.num_params is None
    assert str(tmp_path) in model.checkpoint.source


def test_other_weights_from_a_repository(hub):
    state = digits()
    state["fc.bias"] += 1
    hub.push("me/finetuned", {"model.safetensors": to_safetensors(state)})
    model = mlx_zoo.load(DIGITS, pretrained="me/finetuned")
    assert is_digits(model, state)
    assert model.checkpoint.revision == hub.branches["me/finetuned"]["main"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "convnext_tiny"}, "timm's architecture 'convnext_tiny'"),
        ({**TIMM_CONFIG, "model_args": {"output_stride": 8}}, "model_args=.*output_stride"),
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox'.*bert, .*resnet"),
        ({}, "model_type=None"),
        ({**TIMM_CONFIG, "pretrained_cfg": [1]}, "config.json cannot be read"),
        ({**TIMM_CONFIG, "num_classes": "many"}, "config.json cannot be read.*many"),
        ({"model_type": "bert", "id2label": {"a": "b"}}, "config.json cannot be read"),
        ({"model_type": "bert", "id2label": [1]}, "config.json cannot be read"),
        ({"model_type": "bert", "architectures": [["x"]]}, "config.json cannot be read"),
        ({"model_type": "resnet", "depths": 3}, "config.json cannot be read"),
    ],
    ids=str,
)
def test_a_config_that_is_not_understood(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for pretrained in (True, False):
        with pytest.raises(UnsupportedConfig, match=message):
            mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=pretrained)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_config_that_is_not_json(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)


def test_a_folder_without_a_config(tmp_path):
    saved(digits(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json.*load\(architecture"):
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert is_digits(mlx_zoo.load(DIGITS, pretrained=f"local-dir:{tmp_path}"))


# ----------------------------------------------------------------------- revisions, the network


def test_row_12_the_commit_of_the_first_load_stays_in_use(hub):
    changed = digits()
    changed["fc.bias"] += 1
    first = hub.push("org/name", timm_files())
    assert is_digits(mlx_zoo.load("org/name", pretrained=True))
    second = hub.push("org/name", timm_files(changed))
    model = mlx_zoo.load("org/name", pretrained=True)
    assert is_digits(model)
    assert model.checkpoint.revision == first

    model = mlx_zoo.load("org/name", pretrained=True, revision="main")
    assert is_digits(model, changed)
    assert model.checkpoint.revision == second
    assert is_digits(mlx_zoo.load("org/name", pretrained=True), changed)
    for name, revision in (("org/name", first), (f"org/name@{first}", None)):
        assert is_digits(mlx_zoo.load(name, pretrained=True, revision=revision))


def test_a_branch_of_a_name_of_the_registry(hub, tmp_path):
    hub.push(BERT_NAME, bert_files(tmp_path / "main"))
    hub.push(BERT_NAME, bert_files(tmp_path / "v2", seed=1), branch="v2")
    main = mlx_zoo.load("bert-base-uncased", pretrained=True)
    v2 = mlx_zoo.load("bert-base-uncased", pretrained=True, revision="v2")
    assert v2.checkpoint.revision == hub.branches[BERT_NAME]["v2"]
    assert not mx.array_equal(v2.pooler.weight, main.pooler.weight)
    same(v2, mlx_zoo.load(f"{BERT_NAME}@v2", pretrained=True))
    with pytest.raises(RevisionNotFound, match="no-such"):
        mlx_zoo.load("bert-base-uncased", pretrained=True, revision="no-such")


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_row_11_off_line(how, hub, tmp_path, monkeypatch):
    hub.push(BERT_NAME, bert_files(tmp_path / "original"))
    options = {}
    if how == "local_files_only":
        options = {"local_files_only": True}
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotCached, match=f"mlx-zoo load hf-hub:{BERT_NAME}"):
        mlx_zoo.load("bert-base-uncased", pretrained=True, **options)
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    warm = mlx_zoo.load("bert-base-uncased", pretrained=True)
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    same(warm, mlx_zoo.load("bert-base-uncased", pretrained=True, **options))
    # From the same files, another network.
    mlx_zoo.load("bert-base-uncased", pretrained=True, task="fill-mask", **options)
    assert hub.requests == []


def test_row_11_off_line_at_an_address(hub, monkeypatch):
    at_url(hub, monkeypatch, pickled(digits()))
    with pytest.raises(NotCached, match=f"mlx-zoo load {DIGITS}$"):
        mlx_zoo.load(DIGITS, pretrained=True, local_files_only=True)
    mlx_zoo.load(DIGITS, pretrained=True)
    hub.stop()
    assert is_digits(mlx_zoo.load(DIGITS, pretrained=True, local_files_only=True))
    assert is_digits(mlx_zoo.load(DIGITS, pretrained=True))


def test_the_bundled_file_has_the_hash_that_was_published(monkeypatch, cache):
    other = replace(registry.find(DIGITS), sha256="0" * 64)
    monkeypatch.setitem(registry._names(), DIGITS, other)
    with pytest.raises(IntegrityError, match="0000 was published"):
        mlx_zoo.load(DIGITS, pretrained=True)
    assert not cache.exists()


# ---------------------------------------------------------------------------- heads, inputs


def test_row_39_another_number_of_classes_is_a_fresh_head(caplog):
    model = mlx_zoo.load(DIGITS, pretrained=True, num_classes=3)
    assert model(mx.zeros((1, 32, 32, 1))).shape == (1, 3)
    assert model.config.num_classes == 3
    assert caplog.messages == ["resnet_digits: a fresh head, to be trained; num_classes=3"]
    np.testing.assert_array_equal(model.layer4[0].conv2.weight, weights_of_digits("layer4.0.conv2"))
    caplog.clear()
    model = mlx_zoo.load(DIGITS, pretrained=True, num_classes=10)  # its own number
    assert is_digits(model)
    model = mlx_zoo.load(DIGITS, pretrained=True, num_classes=0)
    assert model(mx.zeros((1, 32, 32, 1))).shape == (1, 48)
    assert caplog.messages == []


def weights_of_digits(layer):
    return digits()[f"{layer}.weight"].permute(0, 2, 3, 1).numpy()


def test_row_39_the_text_of_three_classes(hub, tmp_path, caplog):
    folder = tmp_path / "original"
    bert_folder(folder, "BertForSequenceClassification", num_labels=3)
    name = f"local-dir:{folder}"
    own = mlx_zoo.load(name, pretrained=True, task="text-classification")
    same(own, mlx_zoo.load(name, pretrained=True, task="text-classification", num_classes=3))
    assert caplog.messages == []
    model = mlx_zoo.load(name, pretrained=True, task="text-classification", num_classes=5)
    assert model(mx.array([[1, 2]])).shape == (1, 5)
    assert caplog.messages == ["original: a fresh head, to be trained; num_classes=5"]
    assert mx.array_equal(model.pooler.weight, own.pooler.weight)
    with pytest.raises(CheckpointError, match="no head for token-classification; num_classes="):
        mlx_zoo.load(name, pretrained=True, task="token-classification")


def test_row_39_a_head_is_never_random_unless_asked_for(tmp_path):
    """Not even where the weights without it lie in the cache, from when it was asked for."""
    bert_folder(tmp_path)
    name, task = f"local-dir:{tmp_path}", "question-answering"
    with pytest.raises(MappingError, match="qa_outputs"):
        mlx_zoo.load(name, pretrained=True, task=task)
    mlx_zoo.load(name, pretrained=True, task=task, num_classes=2)
    with pytest.raises(MappingError, match="qa_outputs"):
        mlx_zoo.load(name, pretrained=True, task=task)


def test_row_39_what_the_cache_holds_does_not_depend_on_earlier_wishes(tmp_path):
    state = digits()
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:7], state["fc.bias"][:7]
    path = saved(state, tmp_path / "seven.pth")
    with pytest.raises(MappingError, match="num_classes"):
        mlx_zoo.load(DIGITS, path)
    mlx_zoo.load(DIGITS, path, num_classes=12)  # keeps the body, and the cache has it
    with pytest.raises(MappingError, match="num_classes"):
        mlx_zoo.load(DIGITS, path)


@pytest.mark.parametrize(
    ("task", "num_classes"),
    [("fill-mask", 7), ("pretraining", 2), ("question-answering", 3), ("text-classification", 0)],
)
def test_a_trained_head_cannot_be_replaced_by_a_count_that_it_has_not(task, num_classes, tmp_path):
    bert_folder(tmp_path)
    with pytest.raises(ValueError, match=f"num_classes={num_classes}"):
        mlx_zoo.load(f"local-dir:{tmp_path}", True, task=task, num_classes=num_classes)


def test_a_bare_file_has_a_head_and_an_input_of_its_own_also_from_the_cache(tmp_path):
    original = randomise(timm.create_model("resnet26", num_classes=7, in_chans=1))
    path = saved(original.state_dict(), tmp_path / "grey.pth")
    for _ in ("converted", "from the cache"):
        model = mlx_zoo.load("resnet26", path, num_classes=7, in_chans=1)
        proven(model, size=64)


def test_a_named_network_does_not_take_the_weights_of_another(tmp_path):
    bert_folder(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="vocab_size=99, not 30522"):
        mlx_zoo.load("bert_base", pretrained=f"local-dir:{tmp_path / 'bert'}")
    folder = mlx_zoo.convert(DIGITS, tmp_path / "digits")
    for name in ("resnet18", "bert_base"):
        with pytest.raises(CheckpointError, match="another network"):
            mlx_zoo.load(name, pretrained=f"local-dir:{folder}")
    assert is_digits(mlx_zoo.load(DIGITS, pretrained=f"local-dir:{folder}"))


def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.pth.tar", "weights", "w.PTH"):
        saved(digits(), tmp_path / name)
        assert is_digits(mlx_zoo.load(DIGITS, pretrained=name))


def test_the_folders_that_timm_writes(tmp_path):
    from timm.models import save_for_hf

    for i, options in enumerate(({}, {"num_classes": 7}, {"in_chans": 1})):
        original = randomise(timm.create_model("resnet18", **options))
        save_for_hf(original, tmp_path / str(i), safe_serialization=True)
        model = mlx_zoo.load(f"local-dir:{tmp_path / str(i)}", pretrained=True)
        proven(model, size=64)


def test_a_body_alone_of_transformers_resnet(tmp_path):
    config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[64, 128])
    randomise(transformers.ResNetModel(config)).save_pretrained(tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert model(mx.zeros((1, 32, 32, 3))).shape == (1, 128)


def test_the_preprocessing_of_a_transformers_repository(tmp_path):
    config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[64, 128], num_labels=3)
    original = randomise(transformers.ResNetForImageClassification(config))
    original.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": 224, "crop_pct": 0.875, "resample": 3, "image_mean": [0.5] * 3})
    )
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    how = model.checkpoint.preprocessing
    assert (how.size, how.resize, how.interpolation, how.mean) == (224, 256, "bicubic", (0.5,) * 3)
    picture = np.zeros((300, 400, 3), np.uint8)
    answers = mlx_zoo.pipeline("image-classification", model)(picture)
    assert [a["label"] for a in answers] != []


def test_an_untied_body_needs_no_equal_twins(tmp_path):
    bert_folder(tmp_path, "BertForMaskedLM", tie_word_embeddings=False)
    for task in (None, "fill-mask"):
        proven(mlx_zoo.load(f"local-dir:{tmp_path}", True, task=task))


def test_a_fresh_head_has_none_of_the_old_ones_labels(tmp_path):
    model = mlx_zoo.load(DIGITS, True, num_classes=12)
    assert not model.checkpoint.labels
    assert not model.checkpoint.accuracy
    answers = mlx_zoo.pipeline("image-classification", model)(np.zeros((8, 8), np.uint8), top_k=12)
    assert {answer["label"] for answer in answers} == {f"LABEL_{i}" for i in range(12)}
    with pytest.raises(ValueError, match="no head"):
        mlx_zoo.pipeline("image-classification", DIGITS, num_classes=0)


def test_a_fresh_pooler_comes_with_a_fresh_head(tmp_path):
    bert_folder(tmp_path, "BertForMaskedLM")
    model = mlx_zoo.load(
        f"local-dir:{tmp_path}", True, task="text-classification", num_classes=4, dtype="float16"
    )
    assert model(mx.array([[1, 2]])).shape == (1, 4)
    assert model.pooler.weight.dtype == model.classifier.weight.dtype == mx.float16


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"act": "foo"}),
        ("resnet18", {"block": "foo"}),
        ("resnet18", {"depths": 3}),
        ("resnet18", {"depths": "abcd"}),
        ("resnet18", {"base_width": 0}),
        ("resnet18", {"depths": (10**8, 1, 1, 1)}),
        ("resnet18", {"num_classes": 10**12}),
        ("bert_base", {"dims": "x"}),
        ("bert_base", {"num_heads": 0}),
        ("bert_base", {"num_layers": 10**8}),
        ("bert_base", {"norm_eps": float("nan")}),
        ("bert_base", {"causal": "no"}),
        ("bert_base", {"pooling": ("foo",)}),
    ],
    ids=str,
)
def test_options_that_make_no_network_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options)).replace("base_width", "width")):
        mlx_zoo.load(name, **options)


# --------------------------------------------------------------------------- malformed weights


def test_row_24_weights_of_another_variant(tmp_path):
    path = saved(digits(), tmp_path / "w.pth")
    with pytest.raises(MappingError) as caught:
        mlx_zoo.load("resnet18", pretrained=path)
    message = str(caught.value)
    assert str(path) in message
    assert (
        "layer1.0.conv1.weight has shape (16, 64, 3, 3), the network needs (64, 64, 3, 3): "
        "another num_classes, or another variant?" in message
    )
    assert (
        "conv1.weight has shape (64, 1, 7, 7), the network needs (64, 3, 7, 7): "
        "another in_chans, or another variant?" in message
    )
    assert "nothing fills layer{1..4}.1.conv{1..2}.weight (8 tensors)" in message
    assert f"{len(caught.value.problems)} problems" in message


def test_row_23_all_that_is_missing_and_all_that_is_unexpected_in_one_error(tmp_path):
    bert_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for i in range(3):
        del state[f"bert.encoder.layer.{i}.attention.output.dense.bias"]
        state[f"bert.encoder.layer.{i}.adapter.weight"] = torch.zeros(2)
    state["bert.pooler.dense.bias"] = torch.zeros(7)
    state["extra"] = torch.zeros(1)
    saved(state, tmp_path / "model.safetensors")
    with pytest.raises(MappingError) as caught:
        mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    assert set(caught.value.problems) == {
        "no home for encoder.layer.{0..2}.adapter.weight (3 tensors)",
        "no home for extra",
        "nothing fills encoder.layer.{0..2}.attention.output.dense.bias "
        "(our blocks.{0..2}.attn.out_proj.bias) (3 tensors)",
        "pooler.dense.bias has shape (7,), the network needs (32,): "
        "another num_classes, or another variant?",
    }
    assert all(problem in str(caught.value) for problem in caught.value.problems)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_row_25_integers_are_refused_and_float64_is_cast(suffix, tmp_path, caplog):
    state = digits()
    state["fc.weight"] = state["fc.weight"].to(torch.int64)
    with pytest.raises(MappingError, match=r"fc\.weight holds int64, where floats belong"):
        mlx_zoo.load(DIGITS, pretrained=saved(state, tmp_path / f"int{suffix}"))
    assert caplog.messages == []
    doubles = {n: x.double() if x.is_floating_point() else x for n, x in digits().items()}
    model = mlx_zoo.load(DIGITS, pretrained=saved(doubles, tmp_path / f"double{suffix}"))
    assert is_digits(model)
    assert {x.dtype for x in engine.parameters(model).values()} == {mx.float32}
    (message,) = caplog.messages
    assert "float64 tensors become float32" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_row_26_half_precision_is_kept_bit_for_bit(kind, suffix, tmp_path):
    dtype = getattr(torch, kind)
    state = {n: x.to(dtype) if x.is_floating_point() else x for n, x in digits().items()}
    path = saved(state, tmp_path / f"w{suffix}")
    for _ in range(2):  # converted, then from the cache
        model = mlx_zoo.load(DIGITS, pretrained=path)
        assert {x.dtype for x in engine.parameters(model).values()} == {getattr(mx, kind)}
        bits = np.array(model.conv1.weight.view(mx.uint16)).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(bits, state["conv1.weight"].view(torch.uint16).numpy())
        single = mlx_zoo.load(DIGITS, pretrained=path, dtype="float32")
        assert is_digits(single, {n: x.float() for n, x in state.items()})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", mx.float16])
def test_row_26_another_type_where_it_is_asked_for(dtype):
    kind = getattr(mx, dtype) if isinstance(dtype, str) else dtype
    whole = mlx_zoo.load(DIGITS, pretrained=True)
    for _ in range(2):
        model = mlx_zoo.load(DIGITS, pretrained=True, dtype=dtype)
        for name, x in engine.parameters(model).items():
            assert x.dtype == kind
            assert mx.array_equal(x, engine.parameters(whole)[name].astype(kind))
    fresh = mlx_zoo.load(DIGITS, pretrained=True, dtype=dtype, num_classes=3, in_chans=3)
    assert {x.dtype for x in engine.parameters(fresh).values()} == {kind}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_row_27_no_nan_and_no_infinity(value, tmp_path, cache):
    state = digits()
    state["layer1.0.bn2.weight"][3] = state["fc.bias"][0] = value
    path = saved(state, tmp_path / "w.pth")
    wanted = r"holds NaN or infinity in .*bn2\.weight, fc\.bias; allow_nonfinite=True"
    with pytest.raises(CheckpointError, match=wanted):
        mlx_zoo.load(DIGITS, pretrained=path)
    assert list(cache_module.entries(cache)) == []
    model = mlx_zoo.load(DIGITS, pretrained=path, allow_nonfinite=True)
    np.testing.assert_array_equal(np.array(model.fc.bias), state["fc.bias"].numpy())
    mlx_zoo.load(DIGITS, pretrained=path, allow_nonfinite=True)
    with pytest.raises(CheckpointError, match=wanted):  # also out of the cache
        mlx_zoo.load(DIGITS, pretrained=path)
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out", path, allow_nonfinite=True)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    mlx_zoo.load(f"local-dir:{folder}", pretrained=True, allow_nonfinite=True)


def test_row_27_what_overflows_in_half_precision(tmp_path):
    state = digits()
    state["fc.bias"][0] = 1e6
    path = saved(state, tmp_path / "w.pth")
    assert is_digits(mlx_zoo.load(DIGITS, pretrained=path), state)
    with pytest.raises(CheckpointError, match=r"infinity as float16 in fc\.bias"):
        mlx_zoo.load(DIGITS, pretrained=path, dtype="float16")


def test_rows_40_and_41_wrong_inputs_of_a_loaded_network(tmp_path):
    model = mlx_zoo.load(DIGITS, pretrained=True)
    with pytest.raises(ValueError, match=r"NCHW.*transpose\(0, 2, 3, 1\)"):
        model(mx.zeros((2, 1, 32, 32)))
    with pytest.raises(ValueError, match="uint8"):
        model(mx.zeros((2, 32, 32, 1), mx.uint8))
    bert_folder(tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)
    for ids, message in (([[99]], "99"), ([[0] * 41], "41 tokens"), ([[]], "N > 0")):
        with pytest.raises(ValueError, match=message):
            model(mx.array(ids))


# ------------------------------------------------------------------------------- verification


@pytest.fixture
def verifications(monkeypatch):
    """The networks that were verified."""
    module = sys.modules["mlx_zoo.verify"]
    seen = []

    def verify(model, *args, verify=module.verify, **options):
        seen.append(model)
        return verify(model, *args, **options)

    monkeypatch.setattr(module, "verify", verify)
    return seen


def test_verification_runs_once_for_the_same_weights(verifications, cache, tmp_path):
    for _ in range(2):
        model = mlx_zoo.load(DIGITS, pretrained=True, verify=True)
    assert len(verifications) == 1
    assert is_digits(model)
    (entry,) = cache_module.entries(cache)
    assert entry.verification["passed"] is True
    assert entry.verification["max_abs"] < 1e-5
    assert entry.verification["sha256"] == entry.manifest["sha256"]

    mlx_zoo.load(DIGITS, pretrained=True, verify=True, dtype="float16")  # other weights
    assert len(verifications) == 2
    cache_module.stamp(entry, {**entry.verification, "sha256": "0" * 64})
    mlx_zoo.load(DIGITS, pretrained=True, verify=True)
    assert len(verifications) == 3
    cache_module.stamp(entry, {**entry.verification, "passed": False})
    mlx_zoo.load(DIGITS, pretrained=True, verify=True)
    assert len(verifications) == 4
    mlx_zoo.load(DIGITS, pretrained=True)
    assert len(verifications) == 4


def test_a_failed_verification_names_the_layer_and_is_tried_again(
    verifications, cache, monkeypatch
):
    monkeypatch.setitem(ACTIVATIONS, "relu", lambda x: mx.maximum(x, 0.01 * x))
    for _ in range(2):
        with pytest.raises(
            VerificationError, match=r"resnet_digits does not .*layer1\.0\.conv1"
        ) as caught:
            mlx_zoo.load(DIGITS, pretrained=True, verify=True)
        assert caught.value.report.first_divergence == "layer1.0.conv1"
        assert not caught.value.report.passed
    assert len(verifications) == 2
    monkeypatch.undo()
    monkeypatch.setenv("MLX_ZOO_CACHE", str(cache))
    mlx_zoo.load(DIGITS, pretrained=True, verify=True)


def test_a_verification_that_cannot_be_kept(verifications, cache, monkeypatch, caplog):
    def stamp(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(cache_module, "stamp", stamp)
    mlx_zoo.load(DIGITS, pretrained=True, verify=True)
    assert "new files cannot be kept" in caplog.text


@pytest.mark.parametrize("options", [{"num_classes": 3}, {"num_classes": 0}, {"in_chans": 3}])
def test_the_published_part_is_verified_before_it_is_adapted(options, verifications):
    model = mlx_zoo.load(DIGITS, pretrained=True, verify=True, **options)
    assert len(verifications) == 1
    (name, value), *_ = options.items()
    assert getattr(model.config, name) == value


@pytest.mark.parametrize("kind", ["ResNetForImageClassification", "ResNetModel"])
def test_a_body_of_transformers_is_verified(kind, verifications, tmp_path):
    config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[64, 128], num_labels=5)
    original = randomise(getattr(transformers, kind)(config))
    transformers.utils.logging.disable_progress_bar()
    original.save_pretrained(tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, verify=True, num_classes=0)
    assert len(verifications) == 1
    assert model(mx.zeros((1, 32, 32, 3))).shape == (1, 128)


def test_a_body_of_torchvision_is_verified(verifications, tmp_path):
    original = randomise(torchvision.models.resnet18(num_classes=4))
    path = saved(original.state_dict(), tmp_path / "w.pth")
    mlx_zoo.load("resnet18", pretrained=path, verify=True, num_classes=0)
    assert len(verifications) == 1


# ----------------------------------------------------------------------------------- convert


def test_a_converted_folder_is_self_contained(tmp_path, no_network, cache):
    model = mlx_zoo.load(DIGITS, pretrained=True)
    folder = mlx_zoo.convert(DIGITS, tmp_path / "new" / "out")
    assert files_in(folder) == [
        *("README.md", "config.json", "manifest.json", "model.safetensors", "preprocessing.json")
    ]
    shutil.rmtree(cache)
    loaded = mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    same(loaded, model)
    assert loaded.config == model.config
    assert replace(loaded.checkpoint, folder=None) == model.checkpoint
    assert not cache.exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "package:resnet_digits.pth"
    assert manifest["sha256"] == cache_module.sha256_of(folder / "model.safetensors")
    assert not [path for path in folder.parent.iterdir() if path != folder]
    assert mlx_zoo.info(f"local-dir:{folder}").accuracy == model.checkpoint.accuracy
    assert mlx_zoo.verify(loaded).passed


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"num_classes": 3}, {"in_chans": 3}, {"num_classes": 0}]
)
def test_what_was_converted_is_what_is_loaded(options, tmp_path, caplog):
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out", **options)
    caplog.clear()
    one = mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    assert caplog.messages == []
    for name, value in options.items():
        if name == "dtype":
            assert one.conv1.weight.dtype == mx.float16
        else:
            assert getattr(one.config, name) == value
    copy = mlx_zoo.convert(f"local-dir:{folder}", tmp_path / "copy")
    same(one, mlx_zoo.load(f"local-dir:{copy}", pretrained=True))


def test_a_converted_folder_takes_the_arguments_of_load(tmp_path, caplog):
    bert_folder(tmp_path / "original")
    folder = mlx_zoo.convert(
        f"local-dir:{tmp_path / 'original'}", tmp_path / "out", task="fill-mask"
    )
    name = f"local-dir:{folder}"
    assert mlx_zoo.load(name, pretrained=True).config.task is None  # as of any other source
    model = mlx_zoo.load(name, pretrained=True, task="fill-mask")
    same(model, mlx_zoo.load(f"local-dir:{tmp_path / 'original'}", True, task="fill-mask"))
    assert mlx_zoo.load(name, pretrained=True, dropout=0.7).config.dropout == 0.7
    half = mlx_zoo.load(name, pretrained=True, dtype="float16")
    assert half.norm.weight.dtype == mx.float16
    with pytest.raises(CheckpointError, match="no head for question-answering; num_classes="):
        mlx_zoo.load(name, pretrained=True, task="question-answering")
    with pytest.raises(CheckpointError, match="weights and config disagree"):
        mlx_zoo.load(name, pretrained=True, num_layers=2)


def test_the_tokenizer_goes_with_the_weights(minilm, tmp_path, no_network):
    shutil.copytree(minilm, tmp_path / "original")
    name = f"local-dir:{tmp_path / 'original'}"
    texts = ["A cat sat on the mat.", "Ein Satz."]
    wanted = mlx_zoo.pipeline("sentence-embedding", name)(texts)
    folder = mlx_zoo.convert(name, tmp_path / "out", task="sentence-embedding")
    assert {
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "modules.json",
        "1_Pooling/config.json",
    } <= {*files_in(folder)}
    shutil.rmtree(tmp_path / "original")
    shutil.rmtree(tmp_path / "cache")
    ours = mlx_zoo.pipeline("sentence-embedding", f"local-dir:{folder}")(texts)
    np.testing.assert_array_equal(ours, wanted)


def test_a_converted_body_embeds_as_its_own_files_say(minilm, tmp_path):
    texts = ["A cat sat on the mat.", "Ein Satz."]
    wanted = mlx_zoo.pipeline("sentence-embedding", f"local-dir:{minilm}")(texts)
    folder = mlx_zoo.convert(f"local-dir:{minilm}", tmp_path / "out")
    embed = mlx_zoo.pipeline("sentence-embedding", f"local-dir:{folder}")
    np.testing.assert_array_equal(embed(texts), wanted)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(
        json.dumps({"word_embedding_dimension": 384, "pooling_mode_cls_token": True})
    )
    embed = mlx_zoo.pipeline("sentence-embedding", f"local-dir:{folder}")
    assert np.abs(embed(texts) - wanted).max() > 0.01


def test_a_converted_network_without_dense_layers_says_what_helps(minilm, tmp_path):
    modules = sentence_transformers.sentence_transformer.modules
    body = modules.Transformer(str(minilm))
    layers = [body, modules.Pooling(384), modules.Dense(384, 24)]
    original = sentence_transformers.SentenceTransformer(modules=layers, device="cpu")
    original.save_pretrained(str(tmp_path / "original"))
    source = f"local-dir:{tmp_path / 'original'}"
    folder = mlx_zoo.convert(source, tmp_path / "body")
    with pytest.raises(CheckpointError, match="load or convert its original, with that task"):
        mlx_zoo.load(f"local-dir:{folder}", True, task="sentence-embedding")
    folder = mlx_zoo.convert(source, tmp_path / "whole", task="sentence-embedding")
    texts = ["A cat sat on the mat."]
    ours = mlx_zoo.pipeline("sentence-embedding", f"local-dir:{folder}")(texts)
    np.testing.assert_allclose(ours, original.encode(texts), atol=1e-5)
    assert not mlx_zoo.load(f"local-dir:{folder}", True).config.dense


def test_a_converted_pretraining_network_serves_its_parts(tmp_path):
    bert_folder(tmp_path / "original")
    original = f"local-dir:{tmp_path / 'original'}"
    folder = mlx_zoo.convert(original, tmp_path / "out", task="pretraining")
    for task in (None, "fill-mask", "next-sentence-prediction", "pretraining"):
        one = mlx_zoo.load(f"local-dir:{folder}", True, task=task)
        same(one, mlx_zoo.load(original, True, task=task))


def test_a_cast_of_a_converted_folder_is_checked(tmp_path):
    state = digits()
    state["fc.bias"][0] = 1e6  # beyond float16
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out", saved(state, tmp_path / "w.pth"))
    with pytest.raises(CheckpointError, match=r"infinity as float16 in fc\.bias"):
        mlx_zoo.load(f"local-dir:{folder}", True, dtype="float16")


def test_a_verification_speaks_of_one_network_and_precision(tmp_path):
    bert_folder(tmp_path / "original")
    folder = mlx_zoo.convert(f"local-dir:{tmp_path / 'original'}", tmp_path / "out")
    name = f"local-dir:{folder}"
    mlx_zoo.load(name, True, verify=True)
    with pytest.raises(VerificationError):
        mlx_zoo.load(name, True, verify=True, norm_eps=0.5)


def test_the_tokenizer_of_a_hub_repository_goes_with_the_weights(hub, minilm, tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    files = {name: (minilm / name).read_bytes() for name in names if (minilm / name).is_file()}
    assert "tokenizer.json" in files
    hub.push(BERT_NAME, bert_files(tmp_path / "original") | files)
    folder = mlx_zoo.convert("bert-base-uncased", tmp_path / "out", task="fill-mask")
    written = {"README.md", "config.json", "manifest.json", "model.safetensors"}
    assert {*files_in(folder)} == {*written, *files}
    for name, content in files.items():
        assert (folder / name).read_bytes() == content
    model = mlx_zoo.load(f"local-dir:{folder}", pretrained=True)
    assert model.checkpoint.revision == hub.branches[BERT_NAME]["main"]


def test_convert_refuses_a_folder_with_something_in_it(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="exists; give a folder that is new or empty"):
            mlx_zoo.convert(DIGITS, path)
    assert files_in(tmp_path) == ["notes.txt"]
    with pytest.raises(ValueError, match="random weights"):
        mlx_zoo.convert(DIGITS, tmp_path / "out", pretrained=False)
    (tmp_path / "empty").mkdir()
    assert mlx_zoo.convert(DIGITS, tmp_path / "empty") == tmp_path / "empty"
    assert is_digits(mlx_zoo.load(f"local-dir:{tmp_path / 'empty'}", pretrained=True))


KILLED = """
import os, signal, sys
from pathlib import Path
import mlx_zoo
from mlx_zoo.hub import cache

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

mlx_zoo.load("resnet_digits", pretrained=True)  # so that only the folder is written
place, name = {"weights": (cache, "save"), "manifest": (Path, "write_text"),
               "rename": (Path, "rename")}[sys.argv[1]]
setattr(place, name, die)
mlx_zoo.convert("resnet_digits", sys.argv[2])
"""


@pytest.mark.parametrize("step", ["weights", "manifest", "rename"])
def test_a_killed_convert_leaves_no_folder(step, tmp_path):
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(mlx_zoo.__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", KILLED, step, str(out)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert is_digits(mlx_zoo.load(f"local-dir:{mlx_zoo.convert(DIGITS, out)}", pretrained=True))


def test_a_convert_that_fails_leaves_nothing(tmp_path, monkeypatch):
    mlx_zoo.load(DIGITS, pretrained=True)
    before = files_in(tmp_path)

    def save(path, *args):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(cache_module, "save", save)
    for write in (
        lambda: mlx_zoo.convert(DIGITS, tmp_path / "out"),
        lambda: mlx_zoo.export(mlx_zoo.load(DIGITS), tmp_path / "out.safetensors"),
    ):
        with pytest.raises(OSError, match="the disk is full"):
            write()
        assert files_in(tmp_path) == before


def tamper_weights(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def tamper_config(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"relu"', '"silu"'))


TAMPERED = {
    "a bit": (tamper_weights, IntegrityError),
    "truncated": (
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        IntegrityError,
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), IntegrityError),
    "the config": (tamper_config, IntegrityError),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"format'),
        CheckpointError,
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), CheckpointError),
}


@pytest.mark.parametrize(("tamper", "error"), TAMPERED.values(), ids=TAMPERED)
def test_a_converted_folder_that_was_tampered_with(tamper, error, tmp_path):
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out")
    tamper(folder)
    with pytest.raises(error, match=str(folder)):
        mlx_zoo.load(f"local-dir:{folder}", pretrained=True)


def test_a_converted_folder_of_another_format(tmp_path, monkeypatch):
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out")
    monkeypatch.setattr(cache_module, "FORMAT", 99)
    with pytest.raises(CheckpointError, match="has format 1, 99 is read here: convert it again"):
        mlx_zoo.load(f"local-dir:{folder}", pretrained=True)


# ------------------------------------------------------------------------------------ export


def test_export_is_what_torchvision_loads(tmp_path):
    original = randomise(torchvision.models.resnet18())
    model = mlx_zoo.load("resnet18", pretrained=saved(original.state_dict(), tmp_path / "w.pth"))
    path = mlx_zoo.export(model, tmp_path / "sub" / "back.safetensors")
    other = torchvision.models.resnet18()
    other.load_state_dict(load_file(path), strict=True)
    for name, x in original.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(other.state_dict()[name], x), name


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("BertModel", None),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForNextSentencePrediction", "next-sentence-prediction"),
        ("BertForPreTraining", "pretraining"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("BertForMultipleChoice", "multiple-choice"),
    ],
)
def test_export_is_what_transformers_loads(kind, task, tmp_path):
    original = bert_folder(tmp_path / "original", kind)
    model = mlx_zoo.load(f"local-dir:{tmp_path / 'original'}", pretrained=True, task=task)
    (tmp_path / "back").mkdir()
    shutil.copy(tmp_path / "original" / "config.json", tmp_path / "back")
    path = mlx_zoo.export(model, tmp_path / "back" / "model.safetensors")
    assert load_file(path).keys() == original.state_dict().keys(), "tied tensors included"
    other, report = getattr(transformers, kind).from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, x in original.state_dict().items():
        assert torch.equal(other.state_dict()[name], x), name


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_export_keeps_half_precision(kind, tmp_path):
    state = {n: x.to(getattr(torch, kind)) for n, x in digits().items() if x.is_floating_point()}
    model = mlx_zoo.load(DIGITS, pretrained=saved(state, tmp_path / "w.safetensors"))
    back = load_file(mlx_zoo.export(model, tmp_path / "back.safetensors"))
    assert back.keys() == digits().keys()
    for name, x in state.items():
        assert back[name].dtype == x.dtype
        assert torch.equal(back[name], x), name


def test_export_of_a_changed_network_and_back(tmp_path):
    model = mlx_zoo.load(DIGITS, pretrained=True, num_classes=3)
    model.conv1.weight = model.conv1.weight * 2
    path = mlx_zoo.export(model, tmp_path / "mine.safetensors")
    same(mlx_zoo.load(DIGITS, pretrained=path, num_classes=3), model)
    model.conv1.weight = model.conv1.weight * 2
    assert mlx_zoo.export(model, path) == path  # replaced
    same(mlx_zoo.load(DIGITS, pretrained=path, num_classes=3), model)


def test_export_of_random_weights_and_in_another_dialect(tmp_path):
    model = mlx_zoo.load(DIGITS)
    path = mlx_zoo.export(model, tmp_path / "random.safetensors", dialect="transformers")
    assert "embedder.embedder.convolution.weight" in {
        name.removeprefix("resnet.") for name in load_file(path)
    }
    same(mlx_zoo.load(DIGITS, pretrained=path), model)
    with pytest.raises(ValueError, match="dialect='keras': one of torchvision; timm; transformers"):
        mlx_zoo.export(model, path, dialect="keras")
    with pytest.raises(ValueError, match="Linear is not one of mlx_zoo's networks"):
        mlx_zoo.export(nn.Linear(2, 2), path)
    architecture = registry.architectures()["resnet"]
    by_hand = architecture.model(architecture.variants[DIGITS])
    by_hand = mlx_zoo.export(by_hand, tmp_path / "hand.safetensors")
    assert load_file(by_hand).keys() == digits().keys()


def test_nothing_is_said_when_all_is_well(hub, caplog, capfd, tmp_path):
    hub.push("org/name", timm_files())
    with caplog.at_level(logging.WARNING):
        mlx_zoo.load("org/name", pretrained=True)
        mlx_zoo.load("org/name", pretrained=True)
        mlx_zoo.convert("org/name", tmp_path / "out")
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


# Changed networks, in folders and pipelines -----------------------------------------------------

FAMILIES = ["resnet_digits", "vit_digits", "efficientnet_digits"]
GREY = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_head_is_of_the_type_of_the_body(name):
    model = mlx_zoo.load(name, pretrained=True, dtype="float16", num_classes=5)
    assert {x.dtype for x in engine.parameters(model).values()} == {mx.float16}


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_prepared_for_the_channels_that_a_network_was_given(name):
    classify = mlx_zoo.pipeline("image-classification", name, in_chans=3)
    assert classify.model.config.in_chans == 3
    grey, rgb = classify(GREY, top_k=3), classify(np.stack([GREY] * 3, axis=-1), top_k=3)
    own = mlx_zoo.pipeline("image-classification", name)(GREY, top_k=3)
    for a, b, c in zip(grey, rgb, own, strict=True):
        assert a == b
        assert a["label"] == c["label"]
        assert abs(a["score"] - c["score"]) < 1e-4, "the response keeps its size"
    five = mlx_zoo.load(name, pretrained=True, in_chans=5)
    with pytest.raises(ValueError, match="does not say how its images are prepared"):
        mlx_zoo.pipeline("image-classification", five)


def test_images_are_prepared_at_the_size_that_a_network_was_given(tmp_path):
    model = mlx_zoo.load("vit_digits", pretrained=True, img_size=48)
    assert (model.checkpoint.preprocessing.size, model.config.img_size) == (48, 48)
    assert not model.checkpoint.accuracy, "it was measured at another size"
    answer = mlx_zoo.pipeline("image-classification", model)(GREY)
    mlx_zoo.convert(model, tmp_path / "larger")
    folder = f"local-dir:{tmp_path / 'larger'}"
    assert mlx_zoo.pipeline("image-classification", folder)(GREY) == answer
    assert mlx_zoo.info(folder).config.img_size == 48
    assert mlx_zoo.load(folder).config.img_size == 48, "random weights, too"
    back = mlx_zoo.load(folder, pretrained=True, img_size=32)
    assert back(mx.zeros((1, 32, 32, 1))).shape == (1, 10)
    assert mlx_zoo.load("vit_digits", pretrained=folder).config.img_size == 48


def test_a_converted_folder_has_the_config_it_was_written_with(tmp_path):
    mlx_zoo.convert("vit_digits", tmp_path / "five", num_classes=5, dropout=0.3)
    folder = f"local-dir:{tmp_path / 'five'}"
    assert mlx_zoo.info(folder).config.num_classes == 5
    for said, kept in (({}, 0.3), ({"dropout": 0.0}, 0.0), ({"dropout": 0.1}, 0.1)):
        assert mlx_zoo.load(folder, pretrained=True, **said).config.dropout == kept


def test_a_network_without_head_has_no_labels():
    checkpoint = mlx_zoo.load("resnet_digits", pretrained=True, num_classes=0).checkpoint
    assert (checkpoint.labels, dict(checkpoint.accuracy)) == ((), {})


def test_a_loaded_network_knows_where_its_files_are(tmp_path):
    model = mlx_zoo.load("gpt2_docs", pretrained=True, cache_dir=tmp_path / "mine", quantize=8)
    write = mlx_zoo.pipeline("text-generation", model)
    assert write("Return", max_tokens=2)[0]["generated_text"].startswith("Return")
    assert mlx_zoo.verify(model).passed
    mlx_zoo.convert(model, tmp_path / "folder")
    assert (tmp_path / "folder" / "merges.txt").exists()
    assert len(list((tmp_path / "mine").rglob("manifest.json"))) == 2, "packed, and as it was"
    assert not list(Path(os.environ["MLX_ZOO_CACHE"]).rglob("manifest.json"))


def test_a_loaded_network_is_written_as_it_is(tmp_path):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    with pytest.raises(ValueError, match="dtype: a loaded network is written as it is"):
        mlx_zoo.convert(model, tmp_path / "x", dtype="float16")


def test_weights_with_another_head_than_the_default_are_named(tmp_path, caplog):
    options = {"task": "text-classification", "num_classes": 3}
    mlx_zoo.convert("gpt2_docs", tmp_path / "classes", **options)
    folder = f"local-dir:{tmp_path / 'classes'}"
    assert mlx_zoo.info(folder).task == "text-classification"
    caplog.clear()
    assert mlx_zoo.load(folder, pretrained=True).config.task == "text-generation"
    assert "has a head for text-classification, which task='text-classification' loads" in (
        caplog.text
    )
    assert mlx_zoo.load(folder, pretrained=True, **options)(mx.array([[1, 2]])).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 48.0}, "img_size=48.0: a side in pixels"),
        ({"img_size": (32, 0)}, r"img_size=\(32, 0\)"),
        ({"dropout": None}, "dropout=None: ViTConfig takes"),
        ({"quantize": 8.0}, "bits=8.0"),
        ({"quantize": "8"}, "bits='8'"),
    ],
)
def test_wrong_types_of_options(options, message):
    with pytest.raises(ValueError, match=message):
        mlx_zoo.load("vit_digits", pretrained=True, **options)


def test_a_network_can_be_made_larger_later():
    model = mlx_zoo.load("vit_digits", pretrained=True)
    model.reset_size(64)
    wanted = mlx_zoo.load("vit_digits", pretrained=True, img_size=64)
    classify = mlx_zoo.pipeline("image-classification", model)
    assert classify(GREY) == mlx_zoo.pipeline("image-classification", wanted)(GREY)


def test_images_in_open_files_and_in_one_array(tmp_path):
    classify = mlx_zoo.pipeline("image-classification", "resnet_digits")
    wanted = classify(GREY)
    Image.fromarray(GREY).save(tmp_path / "x.png")
    assert classify(BytesIO((tmp_path / "x.png").read_bytes())) == wanted
    with (tmp_path / "x.png").open("rb") as file:
        assert classify(file) == wanted
    assert classify(GREY[None, ..., None]) == [wanted]


def test_a_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch, no_network):
    (tmp_path / "my" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: mlx_zoo.load("my/model", pretrained=True),
        lambda: mlx_zoo.load("resnet18", pretrained="my/model"),
    ):
        with pytest.raises(ValueError, match="my/model is a folder here: write local-dir:my/model"):
            call()


def test_random_weights_are_not_verified():
    with pytest.raises(ValueError, match="random weights have no original"):
        mlx_zoo.load("resnet_digits", verify=True)


def test_what_is_changed_after_it_was_verified_is_said(caplog):
    mlx_zoo.load("resnet_digits", pretrained=True, verify=True)
    assert "verified as it is published" not in caplog.text
    mlx_zoo.load("resnet_digits", pretrained=True, verify=True, in_chans=3)
    assert "resnet_digits was verified as it is published" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nonsense": 5}, "nonsense: this network is loaded already"),
        ({"quantize": 4, "num_classes": 7}, "quantize, num_classes: this network is loaded"),
        ({"pretrained": False}, "pretrained=False: this network is loaded"),
        ({"size": -1}, "size=-1: a count is needed"),
        ({"size": 1.5}, r"size=1\.5"),
        ({"seed": "a"}, "seed='a'"),
    ],
)
def test_verify_refuses_what_it_does_not_use(arguments, message):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    with pytest.raises(ValueError, match=message):
        mlx_zoo.verify(model, **arguments)


# Dialects of other publishers -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dialect", "message"),
    [
        ("vit_small_patch14_reg4_dinov2", "torchvision", "num_registers=4, as none of theirs"),
        ("vit_small_patch14_dinov2", "transformers", "layer_scale=1e-05"),
        ("vit_base_patch16_siglip_224", "transformers, since 5", "pool='map'"),
        ("vit_base_patch16_clip_224", "torchvision", "pre_norm=True"),
        ("deit_tiny_distilled_patch16_224", "torchvision", "dist_token=True"),
        ("vit_tiny_patch16_224", "transformers, deit with teacher", "dist_token=False"),
        ("resnet10t", "torchvision", "stem='tiered'"),
        ("seresnet50", "transformers", "se_ratio=0.0625"),
        ("resnext50_32x4d", "transformers", "groups=32"),
        ("tf_efficientnetv2_b0", "transformers", "padding='same'"),
        ("tf_efficientnet_b0", "torchvision", "padding='same'"),
        ("efficientnet_b0", "transformers", "padding='symmetric'"),
    ],
)
def test_a_publisher_has_its_own_networks_only(name, dialect, message, tmp_path):
    model = mlx_zoo.load(name, num_classes=3)
    with pytest.raises(ValueError, match=message):
        mlx_zoo.export(model, tmp_path / "x.safetensors", dialect=dialect)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("vit_tiny_patch16_224", "torchvision"),
        ("vit_tiny_patch16_224", "transformers"),
        ("vit_b_32", "timm"),
        ("deit_tiny_distilled_patch16_224", "transformers, deit with teacher"),
        ("wide_resnet50_2", "timm"),
        ("resnet18", "transformers"),
        ("efficientnet_b0", "timm"),
        ("efficientnet_v2_s", "timm"),
    ],
)
def test_the_same_network_in_the_names_of_another_publisher(name, dialect, tmp_path):
    model = mlx_zoo.load(name, num_classes=3)
    path = mlx_zoo.export(model, tmp_path / "x.safetensors", dialect=dialect)
    again = mlx_zoo.load(name, pretrained=path, num_classes=3)
    size = getattr(model.config, "img_size", 64)
    images = mx.random.normal((1, size, size, 3))
    assert mx.array_equal(model(images), again(images)).item()


def test_a_body_of_gpt2_is_kept(tmp_path, caplog):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": 50}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "g")
    first, again = (mlx_zoo.load(f"local-dir:{tmp_path}/g", pretrained=True) for _ in range(2))
    assert not [r for r in caplog.records if r.name == "mlx_zoo"]
    assert first(mx.array([[1, 2]])).shape == (1, 2, 50), "its head is its embeddings"
    mlx_zoo.convert(again, tmp_path / "out")
    assert mlx_zoo.load(f"local-dir:{tmp_path}/out", pretrained=True).config == first.config
