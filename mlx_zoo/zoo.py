"""load(): a name -> its checkpoint -> converted weights -> a network that is ready to use.

Converted weights come from the cache where it has them; otherwise the published file is fetched,
read, mapped and kept. `convert` is the same road, to a folder; `mlx_zoo.exporting` is the way back.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import describe, publishing, quantization, registry
from mlx_zoo.backend.inference import original_of
from mlx_zoo.catalogue import Architecture, Checkpoint, as_size, config_from
from mlx_zoo.converting import (
    Converted,
    Request,
    converted,
    manifest_of,
    network,
    no_head,
    quantization_of,
)
from mlx_zoo.describe import Place
from mlx_zoo.errors import CheckpointError, VerificationError
from mlx_zoo.hub import cache
from mlx_zoo.hub.upload import check_target, upload
from mlx_zoo.mapping import engine
from mlx_zoo.quantization import as_quantization

log = logging.getLogger("mlx_zoo")

# Options of `load` with which weights are what they are.
UNCHANGING = {"task", "revision", "cache_dir", "local_files_only", "allow_nonfinite"}
PLACE = {"cache_dir", "local_files_only"}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load(
    name: str | os.PathLike[str],
    pretrained: bool | str | os.PathLike[str] = False,
    *,
    task: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    verify: bool = False,
    allow_nonfinite: bool = False,
    quantize: int | Mapping[str, int] | None = None,
    **config: Any,
) -> nn.Module:
    """Load a network, in eval mode, every parameter evaluated.

    Args:
        name: an architecture or checkpoint (`list_models()`), `hf-hub:org/name[@revision]`,
            `org/name`, or `local-dir:folder`.
        pretrained: True for the published weights, a path or source for other weights of the same
            architecture, False for random ones (no weights are downloaded then).
        task: which head, for the text networks; None is BERT's bare body, GPT-2's language model.
        num_classes: where it differs from the checkpoint's, the head is fresh; the log says so.
        in_chans: channels of the input, None for the checkpoint's own. The weights of the first
            convolution are summed or repeated to fit.
        img_size: side of the images, or (H, W), for networks whose parameters depend on it: the
            position embeddings are resampled.
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoint's own.
        revision: branch, tag or commit of a hub repository. The commit of the first load stays in
            use until another is asked for.
        cache_dir: instead of MLX_ZOO_CACHE or the platform's cache folder.
        local_files_only: never ask the network.
        verify: compare with the PyTorch original, once, and keep the result.
        allow_nonfinite: let weights with NaN or infinity pass.
        quantize: bits of a weight (2 to 8), or {"bits": 4, "group_size": 32}: as mlx_zoo.quantize
            does it, kept in the cache.
        **config: fields of the architecture's config, as `dropout=0.0`.

    Returns:
        The module, with `.config` (frozen) and `.checkpoint` (None where the weights are random).

    Raises:
        MLXZooError: whatever is wrong with the name, the files or the weights (mlx_zoo.errors).
        ValueError: a wrong argument.
    """
    place = Place(cache_dir, local_files_only)
    checkpoint = describe.find(name, revision, place)
    if pretrained is True:
        checkpoint = describe.complete(checkpoint, place)
    architecture = registry.architectures()[checkpoint.architecture]
    _say_which_head(checkpoint, architecture, task, pretrained)
    img_size = None if img_size is None else as_size(img_size)
    _check_arguments(architecture, task, num_classes, in_chans, img_size)
    dtype = None if dtype is None else as_dtype(dtype)
    wanted = _configure(checkpoint, task, config)
    request = Request(
        checkpoint=checkpoint,
        architecture=architecture,
        config=wanted,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
        quantize=as_quantization(quantize),
    )
    if pretrained is False:
        if verify:
            raise ValueError("verify=True: random weights have no original")
        model = architecture.model(replace(wanted, **request.sizes))
        model.checkpoint = model.quantization = None
        model.set_dtype(dtype or mx.float32)
        if how := request.quantize:
            quantization.quantize(model, how.bits, group_size=how.group_size)
        return _ready(model)

    if pretrained is not True:
        checkpoint = describe.with_weights_of(checkpoint, pretrained, place)
        wanted = _configure(checkpoint, task, config)
        request = replace(request, checkpoint=checkpoint, config=wanted)
    found = converted(request, place)
    model = _network(found, request)
    model.place = place  # where the files beside the weights are
    if verify:
        _verify_once(model, found, place)
    published = model.config
    model = _adapted(model, request)
    if verify and model.config != published:
        log.warning(
            "%s was verified as it is published; what was changed then has no original",
            model.checkpoint.name,
        )
    return model


def info(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """What is known of a checkpoint: source, licence, size, accuracy, preprocessing.

    A repository that is not in the registry is asked for its config.json.
    """
    return describe.find(name, revision, Place(cache_dir, local_files_only))


def _say_which_head(checkpoint, architecture: Architecture, task, pretrained) -> None:
    """Log that weights have another head than the one a network gets without `task=`."""
    default = architecture.default_task
    if pretrained and task is None and default and checkpoint.task not in (None, default):
        log.warning(
            "%s has a head for %s, which task=%r loads; this is its %s",
            *(checkpoint.name, checkpoint.task, checkpoint.task, default),
        )


def as_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """The MLX type of a name. ValueError for anything but the three floats a network may have."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: one of {', '.join(DTYPES)} is needed")
    return found


def _check_arguments(architecture, task, num_classes, in_chans, img_size) -> None:
    name, inputs = architecture.name, architecture.inputs
    if task is not None and task not in architecture.tasks:
        raise ValueError(f"task={task!r}: {name} has {', '.join(architecture.tasks)}")
    if not (num_classes is None or (type(num_classes) is int and num_classes >= 0)):
        raise ValueError(f"num_classes={num_classes!r}: a count is needed")
    if num_classes is not None and inputs == "tokens":
        _check_head_size(architecture, task, num_classes)
    if in_chans is not None and inputs != "images":
        raise ValueError(f"in_chans={in_chans}: {name} takes {inputs}")
    if not (in_chans is None or (type(in_chans) is int and in_chans > 0)):
        raise ValueError(f"in_chans={in_chans!r}: a count is needed")
    if img_size is not None and not hasattr(_any_config(architecture), "img_size"):
        kind = "images of any size" if inputs == "images" else inputs
        raise ValueError(f"img_size={img_size}: {name} takes {kind}")


def _any_config(architecture: Architecture) -> Any:
    return next(iter(architecture.variants.values()))


def _check_head_size(architecture: Architecture, task: str | None, num_classes: int) -> None:
    if task is None:
        raise ValueError(f"num_classes={num_classes}: of which head? give task=, too")
    config = replace(_any_config(architecture), task=task)
    size = architecture.head_size(config)
    if size is None:
        raise ValueError(f"num_classes={num_classes}: {task} has no classes to count")
    if num_classes != architecture.fixed_sizes.get(task, num_classes or None):
        wanted = architecture.fixed_sizes.get(task, "at least 1")
        raise ValueError(f"num_classes={num_classes}: the head of {task} has {wanted}")


def _configure(checkpoint: Checkpoint, task: str | None, options: Mapping[str, Any]) -> Any:
    """The checkpoint's config with a task and what the user said."""
    config, architecture = checkpoint.config, registry.architectures()[checkpoint.architecture]
    if hasattr(config, "task"):
        options = {"task": task or architecture.default_task, **options}
    return config_from(type(config), {**vars(config), **options})


# Loading ----------------------------------------------------------------------------------------


def _check_head(found: Converted, request: Request) -> None:
    """A head may be made afresh only where that was asked for."""
    has = getattr(found.config, "task", None)
    if request.task not in (None, has) and request.num_classes is None:
        raise no_head(found.checkpoint, request)


def _network(found: Converted, request: Request) -> nn.Module:
    """The network that the weights fill exactly."""
    _check_head(found, request)
    model = network(request.architecture, found.config, found.quantization)
    try:
        model.load_weights(list(found.weights.items()), strict=True)
    except ValueError as error:
        raise CheckpointError(
            f"{found.checkpoint.name}: converted weights and config disagree: {error}"
        ) from error
    model.checkpoint = found.checkpoint
    model.quantization = found.quantization
    model.entry = found.entry  # what is known of these weights is kept there
    return _ready(model)


def of_entry(entry: cache.Entry, place: Place) -> nn.Module:
    """The network that an entry of the cache, or a converted folder, holds.

    Raises OSError and MLXZooError where it is damaged.
    """
    weights = cache.read_checked(entry)
    checkpoint, config = describe.from_json(entry.manifest)
    how = quantization_of(entry.manifest)
    found = Converted(weights, config, checkpoint, how, entry)
    architecture = registry.architectures()[checkpoint.architecture]
    model = _network(found, Request(checkpoint, architecture, config))
    model.place = place
    return model


def _adapted(model: nn.Module, request: Request) -> nn.Module:
    """`model` with the input and the head that the user asked for, where they are others."""
    config, how = model.config, model.checkpoint.preprocessing
    if request.in_chans not in (None, getattr(config, "in_chans", None)):
        model.reset_input(request.in_chans)
        how = how and how.of_channels(request.in_chans)
    if request.img_size not in (None, getattr(config, "img_size", None)):
        model.reset_size(request.img_size)
        how = how and how.at(request.img_size)
    if how != model.checkpoint.preprocessing:
        model.checkpoint = replace(model.checkpoint, preprocessing=how, accuracy={})
    other_task = request.task is not None and request.task != config.task
    if other_task or request.num_classes not in (None, request.architecture.head_size(config)):
        if request.num_classes:
            name, outputs = model.checkpoint.name, request.num_classes
            log.warning("%s: a fresh head, to be trained; num_classes=%d", name, outputs)
        model.reset_head(request.num_classes, *((request.task,) if other_task else ()))
        model.checkpoint = replace(model.checkpoint, labels=(), accuracy={})
    if getattr(model.config, "num_classes", None) == 0:  # the features alone
        model.checkpoint = replace(model.checkpoint, labels=(), accuracy={})
    return _ready(model)


def kind_of(model: nn.Module) -> mx.Dtype:
    """The type of the first parameter that holds floats."""
    kinds = (x.dtype for x in engine.parameters(model).values())
    return next(kind for kind in kinds if mx.issubdtype(kind, mx.floating))


def _ready(model: nn.Module) -> nn.Module:
    model.eval()
    mx.eval(model.parameters())
    return model


def _verify_once(model: nn.Module, found: Converted, place: Place) -> None:
    """Compare with the PyTorch original unless that was done before for these very weights."""
    from mlx_zoo.verify import stored, verify

    # What a folder says of itself is not taken for a verification.
    if (
        found.entry
        and stored.is_own(model, found.entry)
        and stored.verified_here(model, found.entry)
    ):
        return
    report = verify(model, cache_dir=place.cache_dir, local_files_only=place.local_files_only)
    if not report.passed:
        raise _not_the_same(found.checkpoint.name, report)


def _not_the_same(name: str, report: Any) -> VerificationError:
    return VerificationError(
        f"{name} does not compute what its original computes: {report.reason}", report
    )


# Writing ----------------------------------------------------------------------------------------


def convert(
    name: str | os.PathLike[str] | nn.Module,
    path: str | os.PathLike[str],
    pretrained: bool | str | os.PathLike[str] = True,
    *,
    verify: bool = False,
    max_shard_size: int | str = "5GB",
    metrics: Mapping[str, Any] | None = None,
    upload_repo: str | None = None,
    private: bool = False,
    **options: Any,
) -> Path:
    """Write a self-contained folder that `load("local-dir:" + path, pretrained=True)` reads.

    Args:
        name, pretrained, **options: as `load` takes them; or a loaded network, as it is now.
        path: a folder that does not exist yet, or is empty.
        verify: compare with the original first; the report goes along, as JSON and as a page.
        max_shard_size: bytes, or "5GB", above which the weights are in several files.
        metrics: of a fine-tuned network, by name, for the model card.
        upload_repo: `org/name` on the hub, which gets what the folder holds, in one commit, once it
            is complete; made where there is none. `load("hf-hub:org/name", pretrained=True)` reads
            it. Paths of this machine are not told. The token is the hub client's own.
        private: whether a repository that is made is for those with a token alone.

    Returns:
        The folder: model.safetensors in MLX's layout, manifest.json with its provenance, the model
        card in README.md, config.json and preprocessing.json for people, the tokenizer's files
        where there are any, and where the weights were verified the report with the original's
        fingerprint, by which another machine verifies them without PyTorch.

    Raises:
        As `load`; ValueError where the folder has something in it, or where the licence forbids to
        upload it; VerificationError where `verify` shows another network, or did before an upload;
        UploadError, when the folder stays.
    """
    from mlx_zoo.verify import stored

    if upload_repo is None and private:
        raise ValueError("private=True goes with upload_repo=")
    if upload_repo is not None:
        check_target(upload_repo, bool(options.get("local_files_only")))
    limit = cache.as_bytes(max_shard_size)
    if pretrained is False:
        raise ValueError("pretrained=False: random weights are not converted")
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; give a folder that is new or empty")
    if isinstance(name, nn.Module):
        if changing := sorted(options.keys() - PLACE):
            raise ValueError(f"{', '.join(changing)}: a loaded network is written as it is")
        model = original_of(name)
    else:
        model = load(name, pretrained, **options)
    checkpoint = getattr(model, "checkpoint", None)
    if checkpoint is None:
        raise ValueError("this network has random weights: there is nothing to convert")
    if getattr(model, "lora", None) is not None:
        raise ValueError("this network has adapters: merge_lora(model) first, or save_adapter")
    if upload_repo is not None:
        publishing.check_licence(checkpoint)
        _check_has_not_failed(model)
    said: dict[str, Any] = {k: v for k, v in options.items() if k in PLACE}
    report = _verified(model, said) if verify else None
    weights = engine.parameters(model)
    architecture = registry.architectures()[checkpoint.architecture]
    nonfinite = engine.nonfinite(weights)
    manifest = manifest_of(
        checkpoint if upload_repo is None else publishing.without_paths(checkpoint),
        model.config,
        architecture,
        nonfinite,
        getattr(model, "quantization", None),
    )
    if hashes := stored.source_hashes(model):
        manifest["source_sha256"] = dict(hashes)
    if not isinstance(name, nn.Module) and not options.keys() - UNCHANGING:
        metrics = metrics or (model.entry and model.entry.manifest.get("metrics"))
    if metrics:
        manifest["metrics"] = dict(metrics)
    place = describe.place_of(model, **said)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = cache.working_folder(folder.parent)
    try:
        cache.write_folder(work, weights, manifest, limit)
        stored.carry(model, work)
        for own_name, file in describe.companions(checkpoint, architecture, place).items():
            (work / own_name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, work / own_name)
        publishing.write_papers(work, report, upload_repo)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if upload_repo is not None:
        log.info("uploaded: %s", upload(folder, upload_repo, private=private))
    return folder


def _verified(model: nn.Module, place: Mapping[str, Any]) -> Any:
    """The report of a network. Raises VerificationError where it did not pass."""
    from mlx_zoo.verify import verify

    report = verify(model, **place)
    if not report.passed:
        raise _not_the_same(model.checkpoint.name, report)
    return report


def _check_has_not_failed(model: nn.Module) -> None:
    """Raise VerificationError where the latest verification of a network's weights failed."""
    entry: cache.Entry | None = getattr(model, "entry", None)
    done = (entry.verification if entry else None) or {}
    if entry and done.get("passed") is False and done.get("sha256") == entry.manifest.get("sha256"):
        raise VerificationError(
            f"{model.checkpoint.name} failed its latest verification (first divergence at "
            f"{done.get('first_divergence')}) and is not uploaded: mlx-zoo verify says more"
        )
