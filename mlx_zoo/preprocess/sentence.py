"""What a sentence-transformers repository says about itself: pooling, projections, prompts.

Only JSON is read here; the arithmetic is done elsewhere. Keys and defaults are those of
sentence-transformers 6.2, and of the older releases whose files it still loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_zoo.errors import CheckpointError, UnsupportedConfig
from mlx_zoo.preprocess.files import read_optional_json

# The Transformer module's own file; the first that is present and not empty counts.
TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)

# The values under which the module is the plain network that every older file means.
PLAIN_TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}

# Older files hold one boolean per mode. Several may be on: they are concatenated in this order.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
POOLING_MODES = tuple(POOLING_FLAGS.values())

# "gelu" is the erf form: the file names the class alone, so that is what upstream rebuilds.
ACTIVATIONS = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}


@dataclass(frozen=True)
class DenseConfig:
    """A projection (B, in_features) -> (B, out_features) after pooling.

    Its tensors `linear.weight` (and `linear.bias`) are in `folder`, in model.safetensors or
    pytorch_model.bin. `activation` is one of the values of `ACTIVATIONS`.
    """

    folder: str
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "tanh"


@dataclass(frozen=True)
class SentenceConfig:
    """How token embeddings (B, N, D) become one vector per text: pool, project, normalise.

    `pooling` holds one or more of `POOLING_MODES`, concatenated in that order. `max_seq_length` is
    None where only the tokenizer's own files say it; `Tokenizer.max_length` is the resolved figure.
    With `include_prompt` off, the tokens of the prompt are left out of the pooling.
    """

    pooling: tuple[str, ...]
    dense: tuple[DenseConfig, ...]
    normalize: bool
    max_seq_length: int | None
    do_lower_case: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    include_prompt: bool


def sentence_files(modules: Path | None = None) -> tuple[str, ...]:
    """Names of the files to fetch, all optional but modules.json.

    Without an argument: those of the root. With the path of modules.json: those in the folders that
    it lists.
    """
    if modules is None:
        return ("modules.json", "config_sentence_transformers.json", *TRANSFORMER_CONFIGS)
    names: list[str] = []
    for kind, folder in _modules({"modules.json": modules}):
        if kind == "Dense":
            weights = ("model.safetensors", "pytorch_model.bin")
            names += [f"{folder}/{name}" for name in ("config.json", *weights)]
        elif kind in ("Pooling", "Normalize"):
            names.append(f"{folder}/config.json")
    return tuple(names)


def read_sentence_config(files: Mapping[str, Path]) -> SentenceConfig:
    """The configuration in `files`, which maps names inside the repository to local paths.

    Raises CheckpointError for a file that is missing or malformed, and UnsupportedConfig, naming
    the module or the key, for whatever would change the embedding and is not implemented.
    """
    modules = _modules(files)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedConfig(
            f"modules.json: the pipeline starts with {kinds[:2]}; "
            "only a Transformer followed by a Pooling is implemented"
        )
    pooling, include_prompt = _pooling(files, modules[1][1])
    dense: list[DenseConfig] = []
    normalize = False
    for kind, folder in modules[2:]:
        if kind == "Dense":
            if normalize:
                raise UnsupportedConfig("modules.json: a Dense after a Normalize")
            dense.append(_dense(files, folder))
        elif kind == "Normalize":
            name = f"{folder}/config.json"
            _require_sentence_embedding(read_optional_json(files, name), name)
            normalize = True
        elif kind != "Dropout":  # the identity outside of training
            raise UnsupportedConfig(f"modules.json: a second {kind}")
    max_seq_length, do_lower_case = read_transformer_options(files)
    prompts, default_prompt_name = _prompts(files)
    return SentenceConfig(
        pooling=pooling,
        dense=tuple(dense),
        normalize=normalize,
        max_seq_length=max_seq_length,
        do_lower_case=do_lower_case,
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        include_prompt=include_prompt,
    )


def read_transformer_options(files: Mapping[str, Path]) -> tuple[int | None, bool]:
    """(max_seq_length, do_lower_case) of sentence_bert_config.json; (None, False) without it."""
    name, config = TRANSFORMER_CONFIGS[0], {}
    for name in TRANSFORMER_CONFIGS:
        if config := read_optional_json(files, name):
            break
    config = dict(config)
    max_seq_length = config.pop("max_seq_length", None)
    do_lower_case = config.pop("do_lower_case", False)
    config.pop("unpad_inputs", None)  # how a batch is packed, not what is computed
    for key, plain in PLAIN_TRANSFORMER.items():
        value = config.pop(key, plain)
        if value != plain:
            raise UnsupportedConfig(f"{name}: {key} = {value!r} is not implemented")
    # Arguments for transformers' loaders, in both spellings, and the multi-vector settings.
    for key, value in config.items():
        if value:
            raise UnsupportedConfig(f"{name}: {key} = {value!r} is not implemented")
    if max_seq_length is not None and not _is_size(max_seq_length):
        raise CheckpointError(f"{name}: max_seq_length = {max_seq_length!r} is not a length")
    return max_seq_length, bool(do_lower_case)


def _modules(files: Mapping[str, Path]) -> list[tuple[str, str]]:
    """(kind, folder) of each module, in order. Every type that is not listed here is refused."""
    if "modules.json" not in files:
        raise CheckpointError("not a sentence-transformers repository: it has no modules.json")
    modules = []
    for entry in read_optional_json(files, "modules.json", list):
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) for key in ("type", "path")
        ):
            raise CheckpointError(f"modules.json: {entry!r} has no type and path")
        # sentence_transformers.models.Pooling before 5.4, since then
        # sentence_transformers.sentence_transformer.modules.pooling.Pooling.
        package, _, kind = entry["type"].rpartition(".")
        if package.split(".")[0] != "sentence_transformers" or kind not in (
            ("Transformer", "Pooling", "Dense", "Dropout", "Normalize")
        ):
            raise UnsupportedConfig(f"modules.json: {entry['type']} is not implemented")
        if entry.get("kwargs"):
            raise UnsupportedConfig(f"modules.json: kwargs of {kind} are not implemented")
        modules.append((kind, _folder(entry["path"], kind)))
    return modules


def _folder(path: str, kind: str) -> str:
    """`path` as it is, once it is known to stay inside the repository."""
    parts = PurePosixPath(path).parts
    if "\\" in path or ":" in path or ".." in parts or path.startswith("/"):
        raise CheckpointError(f"modules.json: the path {path!r} leaves the repository")
    if kind == "Transformer" and parts:
        raise UnsupportedConfig(
            f"modules.json: the Transformer is in {path!r}; only one in the repository's root is "
            "read (loading and saving it with sentence-transformers moves it there)"
        )
    if kind != "Transformer" and not parts:
        raise CheckpointError(f"modules.json: {kind} has no folder")
    return "/".join(parts)


def _pooling(files: Mapping[str, Path], folder: str) -> tuple[tuple[str, ...], bool]:
    """(modes, include_prompt)."""
    name = f"{folder}/config.json"
    config = dict(read_optional_json(files, name))
    if not config:
        raise CheckpointError(f"{name} is missing or empty")
    for key in ("embedding_dimension", "word_embedding_dimension"):
        config.pop(key, None)
    include_prompt = config.pop("include_prompt", True)
    flags = {flag: config.pop(flag) for flag in POOLING_FLAGS if flag in config}
    # Upstream: the newer key wins over the booleans, and all of them off means the mean.
    modes = config.pop("pooling_mode", None) or [
        mode for flag, mode in POOLING_FLAGS.items() if flags.get(flag)
    ]
    if config:
        raise UnsupportedConfig(f"{name}: {', '.join(sorted(config))} is not implemented")
    if not isinstance(modes, str | list):
        raise CheckpointError(f"{name}: pooling_mode = {modes!r} is not a mode or a list of them")
    modes = (modes,) if isinstance(modes, str) else tuple(modes) or ("mean",)
    modes = tuple("mean_sqrt_len" if mode == "mean_sqrt_len_tokens" else mode for mode in modes)
    for mode in modes:
        if mode not in POOLING_MODES:
            raise UnsupportedConfig(f"{name}: pooling mode {mode!r} is not implemented")
    return modes, bool(include_prompt)


def _dense(files: Mapping[str, Path], folder: str) -> DenseConfig:
    name = f"{folder}/config.json"
    config = read_optional_json(files, name)
    for key in ("in_features", "out_features"):
        if not _is_size(config.get(key)):
            raise CheckpointError(f"{name}: {key} = {config.get(key)!r} is not a size")
    _require_sentence_embedding(config, name)
    if config.get("use_residual"):
        raise UnsupportedConfig(f"{name}: use_residual is not implemented")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    package, _, kind = str(activation).rpartition(".")
    # A class of another package would be code from the repository; upstream replaces it by Tanh.
    if not package.startswith("torch.nn") or kind not in ACTIVATIONS:
        raise UnsupportedConfig(f"{name}: activation_function {activation} is not implemented")
    return DenseConfig(
        folder=folder,
        in_features=config["in_features"],
        out_features=config["out_features"],
        bias=bool(config.get("bias", True)),
        activation=ACTIVATIONS[kind],
    )


def _require_sentence_embedding(config: dict[str, Any], name: str) -> None:
    """Dense and Normalize can also work on tokens, which is another kind of model."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UnsupportedConfig(f"{name}: {key} = {config[key]!r} is not implemented")


def _prompts(files: Mapping[str, Path]) -> tuple[dict[str, str], str | None]:
    """(prompts, default_prompt_name); "query" and "document" always exist, empty by default."""
    name = "config_sentence_transformers.json"
    config = read_optional_json(files, name)
    model_type = config.get("model_type", "SentenceTransformer")
    if model_type != "SentenceTransformer":
        raise UnsupportedConfig(f"{name}: model_type = {model_type!r} is not implemented")
    saved = config.get("prompts") or {}
    if not isinstance(saved, dict) or not all(isinstance(t, str | None) for t in saved.values()):
        raise CheckpointError(f"{name}: prompts = {saved!r} are not names to texts")
    prompts = {"query": "", "document": ""} | {key: text or "" for key, text in saved.items()}
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{name}: default_prompt_name = {default!r} is not in prompts")
    return prompts, default


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
