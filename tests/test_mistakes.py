"""Rows 38 to 41 of the fault matrix (FAULTS.md): mistakes of the user."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx_zoo  # first: it must load its BLAS before mlx.core is imported

# isort: split
import hostile
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_zoo.cli import main
from mlx_zoo.errors import CheckpointError, UnknownModel
from mlx_zoo.mapping import engine

DIGITS = "resnet_digits"
FAMILIES = ("resnet_digits", "vit_digits", "efficientnet_digits", "bert_docs", "gpt2_docs")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("resnt50", "resnet50"), ("ResNet-51", "resnet_50"),
        ("resnet50.tv2_in1kk", "resnet50.tv2_in1k"),
        ("vit_b_61", "vit_b_16"), ("vit-base-patch16-242", "vit_base_patch16_224"),
        ("deit_small_patch16_225", "deit_small_patch16_224"),
        ("efficientnet-b00", "efficientnet_b0"), ("tf_efficientnet_b0.ns_jft_in1kk",
                                                  "tf_efficientnet_b0.ns_jft_in1k"),
        ("bert-base-uncasd", "bert_base_uncased"), ("Bert-Large-Caesd", "bert_large_cased"),
        ("all-MiniLM-L6-v3", "all_minilm_l6_v2"),
        ("gpt-2-medum", "gpt2_medium"), ("distilgtp2", "distilgpt2"), ("resnet 50", "resnet50"),
    ],
)  # fmt: skip
def test_row_38_a_typo_in_every_family(typo, meant):
    with pytest.raises(UnknownModel, match=re.escape(f"no model is called {typo!r}: did you mean")):
        mlx_zoo.load(typo, pretrained=True)
    for command in (["load"], ["info"], ["convert", "out"], ["verify"]):
        result = CliRunner().invoke(main, [command[0], typo, *command[1:]])
        assert result.exit_code == 1
        assert result.output.startswith("Error: no model is called")
        assert meant in re.split(r"[ ,?]+", result.output.strip())
    assert mlx_zoo.info(meant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clases": 3}, "num_clases"),
        ({"task": "image-clasification"}, "resnet has image-classification"),
        ({"dtype": "float61"}, "float32, float16, bfloat16"),
    ],
)
def test_row_38_a_typo_in_an_option(options, message):
    with pytest.raises(ValueError, match=message):
        mlx_zoo.load(DIGITS, True, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_row_39_another_number_of_classes_in_every_family(name, caplog):
    task = {"bert_docs": "text-classification", "gpt2_docs": "text-classification"}.get(name)
    options = {"task": task} if task else {}
    model = mlx_zoo.load(name, True, num_classes=4, **options)
    assert caplog.messages == [f"{name}: a fresh head, to be trained; num_classes=4"]
    inputs = mx.array([[1, 2]]) if task else mx.zeros((1, 32, 32, 1))
    assert model(inputs).shape == (1, 4)
    body = engine.parameters(mlx_zoo.load(name, True))
    kept = [
        n for n, x in engine.parameters(model).items() if n in body and x.shape == body[n].shape
    ]
    assert all(
        mx.array_equal(engine.parameters(model)[n], body[n]) for n in kept if "pooler" not in n
    )
    assert len(kept) >= len(engine.parameters(model)) - 4


def test_row_39_a_head_to_be_kept_must_be_there():
    with pytest.raises(CheckpointError, match=r"no head for token-classification; num_classes="):
        mlx_zoo.load("bert_docs_topic", True, task="token-classification")
    with pytest.raises(ValueError, match="num_classes=7: fill-mask has no classes to count"):
        mlx_zoo.load("bert_docs", True, task="fill-mask", num_classes=7)


IMAGES = {  # what is given, to a network of 1 channel or of 3: what it looks like, and the remedy
    "NCHW, grey": (1, np.zeros((2, 1, 32, 32), np.float32), r"NCHW.*transpose\(0, 2, 3, 1\)$"),
    "NCHW, RGB": (3, np.zeros((2, 3, 32, 32), np.float32), r"NCHW.*transpose\(0, 2, 3, 1\)$"),
    "NCHW, grey for RGB": (
        3, np.zeros((2, 1, 32, 32), np.float32), r"NCHW.*transpose.*not 1; .*in_chans=1",
    ),
    "NCHW, RGBA for RGB": (
        3, np.zeros((2, 4, 32, 32), np.float32), r"NCHW.*transpose.*not 4; .*in_chans=4",
    ),
    "grey for RGB": (3, np.zeros((2, 32, 32, 1), np.float32), "3 channels, not 1; .*in_chans=1"),
    "RGB for grey": (1, np.zeros((2, 32, 32, 3), np.float32), "1 channels, not 3; .*in_chans=3"),
    "RGBA for RGB": (3, np.zeros((2, 32, 32, 4), np.float32), "3 channels, not 4; .*in_chans=4"),
    "one image": (3, np.zeros((32, 32, 3), np.float32), r"\(32, 32, 3\): .*use images\[None\]$"),
    "one image, CHW": (
        3, np.zeros((3, 32, 32), np.float32), r"CHW.*use images.transpose\(1, 2, 0\)\[None\]$",
    ),
    "grey images": (1, np.zeros((2, 32, 32), np.float32), r"use images\[\.\.\., None\]$"),
    "one grey image": (1, np.zeros((32, 32), np.float32), r"use images\[None, \.\.\., None\]$"),
    "five axes": (3, np.zeros((1, 1, 32, 32, 3), np.float32), r"a batch \(B, H, W, 3\) is needed"),
    "uint8": (3, np.zeros((1, 32, 32, 3), np.uint8), r"uint8.*checkpoint\.preprocessing\(images\)"),
    "int64": (1, np.zeros((1, 32, 32, 1), np.int64), r"int64.*checkpoint\.preprocessing\(images\)"),
    "bool": (1, np.zeros((1, 32, 32, 1), bool), r"bool.*checkpoint\.preprocessing\(images\)"),
    "complex": (1, np.zeros((1, 32, 32, 1), np.complex64), "complex64: floats are needed"),
    "no image": (1, np.zeros((0, 32, 32, 1), np.float32), "are empty"),
    "no pixels": (1, np.zeros((1, 0, 32, 1), np.float32), "are empty"),
    "a path": (3, "dog.jpg", "str is not an array"),
    "nothing": (3, None, "NoneType is not an array"),
    "objects": (3, np.array([None]), "ndarray is not an array"),
    "ragged": (3, [[1.0], [1.0, 2.0]], "list is not an array"),
}  # fmt: skip


@pytest.fixture(scope="module")
def image_networks() -> dict[tuple[str, int], nn.Module]:
    names = ("resnet_digits", "vit_digits", "efficientnet_digits")
    return {(n, c): mlx_zoo.load(n, True, in_chans=c) for n in names for c in (1, 3)}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("name", ["resnet_digits", "vit_digits", "efficientnet_digits"])
def test_row_40_images_of_the_wrong_form(name, case, image_networks):
    channels, images, message = IMAGES[case]
    model = image_networks[name, channels]
    for function in (model, model.features, model.forward_intermediates):
        with pytest.raises(ValueError, match=message) as caught:
            function(images)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet_digits", "vit_digits", "efficientnet_digits"])
def test_row_40_the_remedies_work(name, image_networks):
    """What the errors tell one to do."""
    grey, colour = image_networks[name, 1], image_networks[name, 3]
    x = mx.random.normal((2, 3, 32, 32), key=mx.random.key(0))
    batch = colour(x.transpose(0, 2, 3, 1))
    assert batch.shape == (2, 10)
    one = colour(x[0].transpose(1, 2, 0)[None])
    assert mx.allclose(one[0], batch[0], atol=1e-4)
    images = mx.random.normal((2, 32, 32), key=mx.random.key(1))
    assert grey(images[..., None]).shape == (2, 10)
    assert grey(images[0][None, ..., None]).shape == (1, 10)
    photographs = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    assert grey(grey.checkpoint.preprocessing(photographs)).shape == (2, 10)
    assert grey(photographs.astype(np.float64)).shape == (2, 10)  # floats of NumPy are floats


def test_row_40_another_size_than_a_vit_s(image_networks):
    model = image_networks["vit_digits", 1]
    for shape, asked in (((1, 48, 48, 1), "48"), ((1, 32, 64, 1), r"\(32, 64\)")):
        with pytest.raises(ValueError, match=rf"takes 32 x 32; resize them, .*img_size={asked}"):
            model(mx.zeros(shape))
    assert (
        mlx_zoo.load("vit_digits", True, img_size=(32, 64))(mx.zeros((1, 32, 64, 1))).shape[1] == 10
    )


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 32, 32), np.uint8), r"CHW.*use image\.transpose\(1, 2, 0\)"),
        (np.zeros((2, 3, 32, 32), np.uint8), r"CHW.*use image\.transpose\(1, 2, 0\)"),
        (np.zeros((32, 32, 2), np.uint8), r"\(32, 32, 2\): \(H, W\) or \(H, W, C\) is needed$"),
        (np.zeros((32, 32), np.int64), "int64: uint8 is needed"),
        (np.full((32, 32), -1.0), "floats are to be from 0 to 1; normalised ones are for"),
        (np.full((32, 32), 255.0), "floats are to be from 0 to 1"),
        (np.full((32, 32), np.nan), "from nan to nan: floats are to be from 0 to 1"),
        (np.zeros((0, 3), np.uint8), r"\(0, 3\)"),
        ("absent.jpg", "absent.jpg: not an image that can be read"),
        (b"<html>", "not an image that can be read"),
        (None, "NoneType is not an image"),
        (3.5, "float is not an image"),
    ],
    ids=str,
)
def test_row_40_images_of_the_wrong_form_in_pipelines(image, message, task, image_networks):
    ask = mlx_zoo.pipeline(task, image_networks["resnet_digits", 1])
    with pytest.raises(ValueError, match=message):
        ask(image)


SCRIPT = (Path(__file__).parent / "wrong_tokens.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text_outcomes(tmp_path_factory) -> dict[str, tuple[str, str]]:
    process = hostile.python(SCRIPT, cwd=tmp_path_factory.mktemp("texts"))
    lines = process.stdout.splitlines()
    assert process.returncode == 0, (process.returncode, lines[-1:], process.stderr[-2000:])
    started = [line.removeprefix("started ") for line in lines if line.startswith("started ")]
    found = [json.loads(line) for line in lines if not line.startswith("started ")]
    return dict(zip(started, map(tuple, found), strict=True))


def test_row_41_tokens_that_a_network_does_not_have(text_outcomes):
    assert len(text_outcomes) > 300
    wrong = {name: said for name, said in text_outcomes.items() if said[0] != "ValueError"}
    assert not wrong
    assert not [name for name, (_, message) in text_outcomes.items() if "\n" in message]


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "bert.__call__, the size": "token id 1536: this network has 1536, from 0",
        "gpt2.encode, a million": "token id 1000000: this network has 1024, from 0",
        "gpt2.__call__, minus 1": "token id -1: this network has 1024, from 0",
        "bert.encode, too long": "129 tokens: this network has 128 positions; truncate",
        "bert.__call__, no tokens": r"input_ids of shape \(2, 0\): a batch \(B, N\) with B, N > 0",
        "bert.__call__, one row": r"input_ids of shape \(2,\): a batch \(B, N\)",
        "gpt2.__call__, floats": "input_ids of type float32: integers are needed",
        "bert, token types 2": "token type 2: this network has 2, from 0",
        "bert, token types floats": "token_type_ids of type float32: integers are needed",
        "gpt2.__call__, mask longer": r"attention_mask of shape \(1, 4\): input_ids have \(1, 3\)",
        "a cache, too long": "254 tokens after 3: this network has 256 positions",
        "a cache, of other rows": "this cache is of 1 rows: the tokens have 2",
        "a cache that is none": r"cache: str is none; model\.make_cache\(\) makes one",
        "a long prompt": "3002 tokens, this network 256 positions: shorten it",
        "generate of ids, the size": "token id 1024: this network has 1024, from 0",
        "generate_batch of ids, minus 1": "token id -1: this network has 1024, from 0",
        "text-classification, too long": "positions: truncation=True cuts what is too long",
        "text-generation, half a pair": "not valid Unicode",
        "question-answering, an empty question": "an empty question",
        "no sentences": "an empty list: at least 1 input is needed",
    }.items(),
)
def test_row_41_the_errors_say_what_is_wrong(name, message, text_outcomes):
    assert re.search(message, text_outcomes[name][1]), text_outcomes[name]


def test_row_41_a_refused_call_leaves_a_cache_as_it_was():
    model = mlx_zoo.load("gpt2_docs", True)
    cache, other = model.make_cache(), model.make_cache()
    for each in (cache, other):
        model(mx.array([[1, 2, 3]]), cache=each)
    for ids in ([[10**6]], [[1], [2]], [[0] * 254], [[]], [[-1]]):
        with pytest.raises(ValueError, match=r"token id|rows|positions|shape"):
            model(mx.array(ids), cache=cache)
    assert cache.length == 3
    assert mx.array_equal(model(mx.array([[4]]), cache=cache), model(mx.array([[4]]), cache=other))
