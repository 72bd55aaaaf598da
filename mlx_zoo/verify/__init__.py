"""Does a network compute what its PyTorch original computes? Layer by layer, with figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import describe, registry, zoo
from mlx_zoo.backend.inference import original_of
from mlx_zoo.backend.precision import real_float32
from mlx_zoo.catalogue import Checkpoint
from mlx_zoo.describe import Place
from mlx_zoo.errors import DownloadError, MissingDependency, MLXZooError, VerificationError
from mlx_zoo.mapping import engine
from mlx_zoo.preprocess.image import MODES
from mlx_zoo.verify import reference, stored
from mlx_zoo.verify.cached import sweep
from mlx_zoo.verify.circumstances import circumstances
from mlx_zoo.verify.device import on_another_device, undisturbed
from mlx_zoo.verify.evidence import KINDS, Evidence
from mlx_zoo.verify.gradients import find_truth
from mlx_zoo.verify.original import run_original
from mlx_zoo.verify.preprocessing import compare_preprocessing
from mlx_zoo.verify.published import Published, are_published, find_published
from mlx_zoo.verify.quantized import against_full_precision
from mlx_zoo.verify.report import TOLERANCES, PreprocessingDifference, Report
from mlx_zoo.verify.trained import beside_its_export, is_trained

__all__ = ["Report", "sweep", "verify"]


def verify(
    model: str | os.PathLike[str] | nn.Module,
    pretrained: bool | str | os.PathLike[str] = True,
    *,
    evidence: str | None = None,
    size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    gradients: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **options,
) -> Report:
    """Compare a network with its PyTorch original on seeded inputs, in real float32.

    The evidence is the best that is at hand, and the report says which: the original itself, run
    here in float32 and in float64, which is the truth; else its fingerprint, what it answered when
    these very weights were verified against it before, here or on another machine; else what is
    published of its outputs. What the original answers is kept beside weights in the cache.

    Of a network that `finetune` trained, the original is the publisher's class with what `export`
    writes of its weights. A quantised network is compared with its own in full precision: `effect`
    says how often the top answer is the same, and a language model's perplexity before and after.

    Args:
        model: a name as `load` takes it, or a loaded network, changed or not.
        pretrained, **options: as `load` takes them, where a name is given.
        evidence: "original", "fingerprint" or "published": that, and no other.
        size: side of the images (None: as published) or number of tokens (64; at most as many as
            there are positions). A network that takes images of one size gets those.
        seed: of the inputs.
        device: "cpu", or "gpu" for the default device, whose float32 may not be real float32. Its
            report has the comparison on the CPU beside it.
        gradients: also compare the gradient of every parameter with PyTorch's, in float64 and in
            float32, in train mode without dropout: `report.gradients`. The evidence must be the
            original.

    Returns:
        A Report; `.passed` says whether it is the same network, `.first_divergence` where not.

    Raises:
        MissingDependency: PyTorch is needed and not installed.
        VerificationError: there is nothing to compare with.
    """
    start = time.perf_counter()
    place = Place(cache_dir, local_files_only)
    _check_arguments(evidence, size, seed, device)
    given = model
    if isinstance(model, nn.Module) and (options or pretrained is not True):
        said = ", ".join(options) or f"pretrained={pretrained!r}"
        raise ValueError(f"{said}: this network is loaded already, and verified as it is")
    with undisturbed(device):
        if not isinstance(model, nn.Module):
            model = _loaded(model, pretrained, evidence, place, options)
        place = describe.place_of(model, cache_dir, local_files_only)
        _check_is_the_checkpoints(model)
        asked = {"evidence": evidence, "size": size, "seed": seed or None}
        asked["device"] = None if device == "cpu" else device
        asked["gradients"] = gradients or None
        call = {"pretrained": pretrained, **options, **asked}
        facts = circumstances(model.checkpoint, given, call)
        its_export = is_trained(model.checkpoint) and getattr(model, "quantization", None) is None
        with _in_eval_mode(model), beside_its_export(model) if its_export else nullcontext():
            report = _verified(model, place, evidence, size, seed, device, gradients, facts)
    return replace(report, seconds=time.perf_counter() - start)


def _check_arguments(evidence: str | None, size: int | None, seed: int, device: str) -> None:
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device={device!r}: 'cpu' or 'gpu' is needed")
    if device == "gpu" and mx.default_device().type != mx.DeviceType.gpu:
        raise ValueError("device='gpu': MLX's default device here is the CPU")
    if evidence not in (None, *KINDS):
        raise ValueError(f"evidence={evidence!r}: one of {', '.join(KINDS)} is needed")
    for name, value in {"size": size, "seed": seed}.items():
        if value is not None and (type(value) is not int or value < (name == "size")):
            raise ValueError(f"{name}={value!r}: a count is needed")


def _loaded(model, pretrained, evidence, place: Place, options) -> nn.Module:
    """The network of a name. Nothing is downloaded where there is nothing to compare it with."""
    checkpoint = describe.find(model, options.get("revision"), place)
    useful = options.get("quantize") is not None or (
        _has_original(checkpoint) or checkpoint.evidence or are_published(checkpoint)
    )
    try:
        return zoo.load(
            model,
            pretrained,
            cache_dir=place.cache_dir,
            local_files_only=place.local_files_only or not useful,
            **options,
        )
    except DownloadError as error:
        if useful:
            raise
        raise _nothing(checkpoint, evidence, ["its weights are not in the cache"]) from error


def _check_is_the_checkpoints(model: nn.Module) -> None:
    """Random weights, a fresh head or an adapted input have no original."""
    if getattr(model, "checkpoint", None) is None:
        raise VerificationError("this network has random weights: there is nothing to compare with")
    if getattr(model, "lora", None) is not None:
        raise VerificationError(
            "this network has adapters, which its original does not have: merge_lora(model) first"
        )
    architecture, config = registry.of_model(model), model.config
    task, size = getattr(config, "task", None), architecture.head_size(config)
    own = model.checkpoint.config
    if size and not architecture.keeps_head(model.checkpoint, task, size):
        raise VerificationError("the head of this network is fresh: there is nothing to compare")
    for name in ("in_chans", "img_size"):
        if getattr(config, name, None) != getattr(own, name, None):
            raise VerificationError(
                f"this network was adapted to {name}={getattr(config, name)}, its original has "
                f"{getattr(own, name)}: there is nothing to compare"
            )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]  # parents first
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.train(training)


def _verified(
    model: nn.Module,
    place: Place,
    evidence: str | None,
    size: int | None,
    seed: int,
    device: str,
    gradients: bool,
    facts: Mapping[str, Any],
) -> Report:
    """The report of a network in eval mode, `facts` in it; kept beside its weights if possible."""
    found: Evidence | Published | None = None
    truth = None
    if gradients:
        evidence = _evidence_of_gradients(model, evidence)
    if getattr(model, "quantization", None) is not None:
        if evidence is not None or size is not None:
            said = f"size={size}" if evidence is None else f"evidence={evidence!r}"
            raise ValueError(f"{said}: a quantised network is compared with its own weights")

        def run(device: str) -> Report:
            report = against_full_precision(model, place, seed, device)
            return replace(report, **facts, sha256=stored.source_hashes(model))
    else:
        found, notes = _find(original_of(model), place, evidence, size, seed)
        preprocessing = _preprocessing(model.checkpoint, seed, place)
        if gradients:
            with mx.stream(mx.cpu):
                truth = find_truth(original_of(model), place, size, seed)

        def run(device: str) -> Report:
            report = found.report(model, _precision(model), device)
            if truth is not None:
                report = replace(report, gradients=truth.judge(model))
            more = () if report.passed else _explained(model, report)
            if fused := getattr(model, "fused", ()):
                layers = f"{len(fused)} layers are fused, and judged by what follows them"
                more = (*more, f"optimised for inference: {layers}")
            sha256 = report.sha256 or stored.source_hashes(model)
            said = {"notes": (*report.notes, *more, *notes), "sha256": sha256, **facts}
            return replace(report, preprocessing=preprocessing, **said)

    with mx.stream(mx.cpu):
        report = run("cpu")
    stored.keep(model, report, found if isinstance(found, Evidence) else None)
    if device == "cpu":
        return report
    try:
        with mx.stream(mx.default_device()):
            return on_another_device(run("gpu"), report, real_float32("gpu"))
    except RuntimeError as error:  # a kernel that MLX cannot compile, say
        said = str(error).partition("\n")[0]
        raise VerificationError(
            f"{report.name}: MLX cannot compute it here ({said}). On the cpu: {report.reason}",
            report,
        ) from error


def _evidence_of_gradients(model: nn.Module, evidence: str | None) -> str:
    """The only kind that has them. Raises ValueError where there is nothing to differentiate."""
    if evidence not in (None, "original"):
        raise ValueError(f"evidence={evidence!r} has no gradients: the original alone does")
    if getattr(model, "quantization", None) is not None:
        raise ValueError("gradients=True: a quantised network has none of its weights")
    if getattr(model, "fused", ()):
        raise ValueError("gradients=True: this network is optimised for inference; load it anew")
    if (precision := _precision(model)) != "float32":
        raise ValueError(
            f"gradients=True: they are compared in float32, this network is of {precision}; load "
            'it with dtype="float32"'
        )
    return "original"


# Evidence ---------------------------------------------------------------------------------------


def _find(
    model: nn.Module, place: Place, evidence: str | None, size: int | None, seed: int
) -> tuple[Evidence | Published, tuple[str, ...]]:
    """The best evidence that is at hand, and why there is no better one."""
    ways: dict[str, Callable[[], Evidence | Published | str]] = {
        "original": lambda: _original(model, place, size, seed, evidence is not None),
        "fingerprint": lambda: stored.fingerprint(model),
        "published": lambda: (
            stored.bundled(model) if model.checkpoint.evidence else find_published(model, place)
        ),
    }
    missing: list[str] = []
    for kind in KINDS if evidence is None else (evidence,):
        found = ways[kind]()
        if not isinstance(found, str):
            if kind != "original" and (size is not None or seed):
                missing.append("size and seed were not used: this evidence has its own inputs")
            return found, tuple(missing)
        missing.append(found)
    raise _nothing(model.checkpoint, evidence, missing)


def _original(
    model: nn.Module, place: Place, size: int | None, seed: int, only: bool
) -> Evidence | str:
    """What the original answers here, or why it cannot be run. `only`: that is an error."""
    checkpoint = model.checkpoint
    if checkpoint.reference is None:
        return f"{checkpoint.name} names no PyTorch original"
    if not _has_original(checkpoint):
        return f"torch and {checkpoint.reference.library} are not installed"
    try:
        with mx.stream(mx.cpu):
            return run_original(model, place, size, seed, _precision(model))
    except (DownloadError, ImportError) as error:  # ImportError: of a broken installation, too
        if not only:
            return f"the original cannot be run: {error}"
        if isinstance(error, MLXZooError):
            raise
        raise MissingDependency(f"{checkpoint.reference.library} is broken: {error}") from error


def _has_original(checkpoint: Checkpoint) -> bool:
    return checkpoint.reference is not None and reference.is_installed(checkpoint.reference.library)


def _nothing(
    checkpoint: Checkpoint, evidence: str | None, missing: list[str]
) -> VerificationError | MissingDependency:
    """The error that says what would help."""
    why = "; ".join(missing)
    if evidence not in (None, "original") or _has_original(checkpoint):
        return VerificationError(f"nothing to compare {checkpoint.name} with: {why}")
    if checkpoint.reference is None:
        return VerificationError(f"{checkpoint.name} names no PyTorch original to compare with")
    return MissingDependency(
        f"verifying {checkpoint.name} needs torch and {checkpoint.reference.library}: "
        f'pip install "mlx-zoo[torch]" ({why}); a folder that `mlx-zoo convert` wrote where they '
        "are, after `mlx-zoo verify`, can be verified without them"
    )


def _explained(model: nn.Module, report: Report) -> tuple[str, ...]:
    """What is known of a difference."""
    other = stored.changed_files(model, report)
    notes = [f"{name} is not the file that was converted: it has changed" for name in other]
    weights = [x for x in engine.parameters(model).values() if x.dtype == mx.float32]
    for half in (mx.float16, mx.bfloat16) if weights else ():
        if all(mx.array_equal(x, x.astype(half).astype(mx.float32)).item() for x in weights):
            kind = str(half).rpartition(".")[2]
            notes.append(
                f"all weights are those of {kind}: they were rounded before they were loaded, by a "
                f"conversion in half precision, say. Convert them in float32, or verify with "
                f'dtype="{kind}"'
            )
    return tuple(notes)


def _preprocessing(
    checkpoint: Checkpoint, seed: int, place: Place
) -> PreprocessingDifference | None:
    """None where nobody publishes how, or it cannot be shown in a picture, or be run here."""
    how = checkpoint.preprocessing
    if how is None or len(how.mean) not in MODES or not _has_original(checkpoint):
        return None
    try:
        return compare_preprocessing(checkpoint, seed=seed, place=place)
    except (VerificationError, ImportError, DownloadError):
        return None


def _precision(model: nn.Module) -> str:
    """The widest type of the parameters: activations take it on."""
    kinds = {str(x.dtype).split(".")[-1] for x in engine.parameters(model).values()}
    return next((kind for kind in TOLERANCES if kind in kinds), "float32")
