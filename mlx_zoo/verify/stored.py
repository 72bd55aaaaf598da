"""Answers of an original that were kept: beside cached weights (a fingerprint), or in the package.

Both are safetensors files of one layout:

    input.<name>            what the networks saw; where it is large, its seed makes it again
    output.<name>           what the original returned, in float64
    layer.<name>            what a layer gave, by our name
    <either>.torch32        the same in the precision that was compared, float32 as a rule
    <either>.index          where only some values are kept: their places in the flat array
    <either>.shape          of all values
    <either>.scale, .rounding    their largest magnitude, and PyTorch's largest error
    reference_inputs        where the layers saw fewer inputs than the outputs: which, the first

A fingerprint's header says what ran, when, and how the inputs are made. Which weights it speaks of
is said by the verification.json beside it, that has the hashes of both.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo import describe, zoo
from mlx_zoo.catalogue import as_size
from mlx_zoo.describe import path_of
from mlx_zoo.errors import MLXZooError, VerificationError
from mlx_zoo.hub import cache
from mlx_zoo.hub.checkpoint import NUMPY_DTYPES, read_state_dict
from mlx_zoo.hub.keeping import cannot_keep
from mlx_zoo.hub.safetensors_header import read_header
from mlx_zoo.mapping import engine
from mlx_zoo.preprocess.image import preprocess
from mlx_zoo.verify import compare
from mlx_zoo.verify.evidence import Answer, Evidence
from mlx_zoo.verify.report import Report, plain

IMAGES = "package:digits.safetensors"  # held-out ones, as every network for digits has seen them
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # in the order networks take them
BEST = ("original", "weights")  # kinds of evidence that no other replaces
FOREIGN = " (so says the folder: it proves what its writer has proved)"
FACTS = "evidence"  # the key in a fingerprint's header
MAX_INPUTS = 1 << 18  # bytes that are kept of inputs
MAX_WHOLE = 2048  # values of an output; of a larger one as many are kept
MAX_SAMPLES, MAX_LAYERS = 64, 1 << 15  # values of a layer, and of all of them

Arrays = Mapping[str, np.ndarray]


# What ships with the package --------------------------------------------------------------------


def bundled(model: nn.Module) -> Evidence:
    """The stored answers for a network that ships with the package.

    Raises VerificationError where nothing was stored for the head that it has.
    """
    checkpoint = model.checkpoint
    stored = _read(path_of(checkpoint.evidence))
    inputs = {name: stored[f"input.{name}"] for name in INPUTS if f"input.{name}" in stored}
    said = f"{len(next(iter(inputs.values()), ()))} held-out texts"
    if not inputs:
        images = _read(path_of(IMAGES))["images"]
        inputs = {"pixel_values": preprocess(list(images), checkpoint.preprocessing)}
        said = f"{len(images)} held-out images"
    seen = stored.get("reference_inputs")
    return Evidence(
        kind="published",
        what="stored outputs of the PyTorch original, in float32 and float64",
        origin=f"ships with mlx_zoo {cache.versions()['mlx_zoo']}; training_scripts/ made it",
        inputs=inputs,
        outputs=_outputs(stored, model, inputs),
        layers=_answers(stored, "layer"),
        said=said,
        seed=None,
        few=None if seen is None else len(seen),
    )


def _outputs(stored: Arrays, model: nn.Module, inputs: Arrays) -> dict[str, Answer]:
    """The stored outputs, by the names that ours have.

    A network with one output has no name for it: its shape tells which of the stored it is.
    """
    answers = _answers(stored, "output")
    found = {}
    for name, shape in compare.shapes(model, inputs, ())[0].items():
        like = [source for source, a in answers.items() if (a.shape or a.double.shape) == shape]
        source = name if name in answers else next(iter(like), None)
        if source is None:
            own, its = getattr(model.config, "task", None), model.checkpoint.task
            raise VerificationError(
                f"the stored outputs of {model.checkpoint.name} are of another head, this network "
                f"has {own or 'none'}: "
                + (f"task={its!r} loads it" if its != own else 'pip install "mlx-zoo[torch]"')
            )
        found[name] = answers[source]
    return found


# Fingerprints -----------------------------------------------------------------------------------


def keep(model: nn.Module, report: Report, evidence: Evidence | None) -> None:
    """Keep a verification, and what the original answered, beside the weights it speaks of.

    Of a network as its entry in the cache, or its folder, holds it; of another nothing is kept, nor
    where the original was made of other files. A verification against the original, whether it
    passed or not, is not replaced by a lesser one.
    """
    entry: cache.Entry | None = getattr(model, "entry", None)
    if entry is None or entry.borrowed:
        return
    if changed_files(model, report) or not is_as_stored(model, entry):
        return
    is_best = report.evidence_kind in BEST
    done = _verification(model, entry)
    if done and not is_best and done.get("evidence_kind", "original") in BEST:
        return
    said = {**plain(report.summary()), **_identity(model), "date": _today()}
    try:
        if is_best and report.passed and evidence is not None:
            data = pack(evidence, model)
            cache.keep(entry, cache.FINGERPRINT, data)
            said["fingerprint"] = hashlib.sha256(data).hexdigest()
        cache.stamp(entry, said)
    except OSError as error:
        cannot_keep(entry.path, error)


def carry(model: nn.Module, folder: Path) -> None:
    """Copy what is known of a network's weights to a folder into which they were just written."""
    entry: cache.Entry | None = getattr(model, "entry", None)
    if entry is None or not verified(model, entry) or not is_as_stored(model, entry):
        return
    copy = cache.read_entry(folder)
    print_ = entry.path / cache.FINGERPRINT
    if print_.is_file():
        cache.keep(copy, cache.FINGERPRINT, print_.read_bytes())
    cache.stamp(copy, {**(entry.verification or {}), "sha256": copy.manifest["sha256"]})


def verified(model: nn.Module, entry: cache.Entry) -> Mapping[str, Any] | None:
    """The verification that these very weights, as this network, passed; None if there is none."""
    done = _verification(model, entry)
    return done if done and done.get("passed") is True else None


def _verification(model: nn.Module, entry: cache.Entry) -> Mapping[str, Any] | None:
    """The latest of these very weights, as this network."""
    done = entry.verification or {}
    how = getattr(model, "quantization", None)  # a folder's weights may be quantised as it is read
    if _as_json(how and asdict(how)) != entry.manifest.get("quantization"):
        return None
    wanted = {"sha256": entry.manifest.get("sha256"), **_identity(model)}
    return done if wanted.items() <= done.items() else None


def source_hashes(model: nn.Module) -> Mapping[str, str]:
    """The hashes of the published files that its weights were converted from, by name.

    A converted folder has them from a verification, if at all.
    """
    entry: cache.Entry | None = getattr(model, "entry", None)
    if entry is None:
        return {}
    kept = entry.manifest.get("source_sha256")
    return kept or (verified(model, entry) or {}).get("sha256_of_source") or {}


def changed_files(model: nn.Module, report: Report) -> list[str]:
    """The files that the original was made of, where they are not those that were converted."""
    converted = source_hashes(model)
    return [name for name, sha in report.sha256.items() if converted.get(name, sha) != sha]


def verified_here(model: nn.Module, entry: cache.Entry) -> bool:
    """Whether that was with this MLX, on a machine like this one: others round otherwise."""
    there = (verified(model, entry) or {}).get("versions")
    here = cache.versions()
    return isinstance(there, dict) and all(there.get(k) == here[k] for k in ("mlx", "platform"))


def fingerprint(model: nn.Module) -> Evidence | str:
    """What the original answered when these weights were verified; or why that cannot be used."""
    entry: cache.Entry | None = getattr(model, "entry", None)
    if entry is None or not (path := entry.path / cache.FINGERPRINT).is_file():
        return "no verification against the original has left a fingerprint of these weights"
    done = verified(model, entry)
    if done is None:
        return f"the fingerprint in {entry.path} is of other weights, another type or another head"
    try:
        if cache.sha256_of(path) != done.get("fingerprint"):
            return f"the fingerprint in {entry.path} is not the one that was written"
        found = unpack(path, model)
        outputs, layers = compare.shapes(model, found.inputs, found.layers)
        if (outputs.keys(), layers.keys()) != (found.outputs.keys(), found.layers.keys()):
            raise ValueError("it speaks of other outputs or layers")
        return found if is_own(model, entry) else replace(found, origin=found.origin + FOREIGN)
    # Whatever its writer, who may be a stranger, made of it.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return f"the fingerprint in {entry.path} cannot be used: {error!r}"
    except (OSError, MLXZooError) as error:
        return f"the fingerprint in {entry.path} cannot be used: {error}"


def is_own(model: nn.Module, entry: cache.Entry) -> bool:
    """Whether an entry is of this user's cache, not a folder that anyone may have written."""
    place = getattr(model, "place", describe.Place())
    return entry.path.absolute().is_relative_to((place.root / "weights").absolute())


def is_as_stored(model: nn.Module, entry: cache.Entry) -> bool:
    """Whether a network has the config and, bit for bit, the weights of its entry."""
    if _identity(model)["config"] != _as_json(entry.manifest.get("config")):
        return False
    own = engine.parameters(model)
    try:
        stored = cache.read_weights(entry)
    except OSError:
        return False
    return own.keys() == stored.keys() and all(
        x.dtype == stored[name].dtype and mx.array_equal(x, stored[name], equal_nan=True).item()
        for name, x in own.items()
    )


def _identity(model: nn.Module) -> dict[str, Any]:
    """What is as which network, besides the hash of the file."""
    return {"config": _as_json(asdict(model.config)), "dtype": str(zoo.kind_of(model))}


def _as_json(value: Any) -> Any:
    """As a file has it: lists for tuples."""
    return json.loads(json.dumps(value))


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def pack(evidence: Evidence, model: nn.Module) -> bytes:
    """The file of a fingerprint: at most a megabyte, but for thousands of layers."""
    inputs = {f"input.{name}": x for name, x in evidence.inputs.items()}
    facts = {
        "format": 1,
        "date": _today(),
        "what": evidence.what,
        "said": evidence.said,
        "seed": evidence.seed,
        "shapes": {name: x.shape for name, x in evidence.inputs.items()},
        "sha256": {name: _hash(x) for name, x in evidence.inputs.items()},
        "source_sha256": dict(evidence.sha256),
        "versions": {**cache.versions(), **evidence.versions},
    }
    arrays = inputs if sum(x.nbytes for x in inputs.values()) <= MAX_INPUTS else {}
    rng = np.random.default_rng(0)
    for name, answer in evidence.outputs.items():
        arrays |= _packed(f"output.{name}", answer, MAX_WHOLE, rng)
    share = max(8, min(MAX_SAMPLES, MAX_LAYERS // max(1, len(evidence.layers))))
    for name, answer in evidence.layers.items():
        arrays |= _packed(f"layer.{name}", answer, share, rng)
    return safetensors(arrays, {FACTS: json.dumps(facts)})


def _packed(name: str, answer: Answer, most: int, rng: np.random.Generator) -> Arrays:
    single, double = answer.single, answer.double
    if double.size <= most or single.shape != double.shape:
        return {name: double, f"{name}.torch32": single}
    # Of as many channels as there are samples: a mistake may be in one channel alone.
    channels = np.resize(rng.permutation(double.shape[-1]), most)
    rows = rng.integers(double.size // double.shape[-1], size=most)
    index = np.unique(rows * double.shape[-1] + channels)
    return {
        name: double.reshape(-1)[index],
        f"{name}.torch32": single.reshape(-1)[index],
        f"{name}.index": index.astype(np.int64),
        f"{name}.shape": np.array(double.shape),
        f"{name}.scale": np.abs(double).max().reshape(1),
        f"{name}.rounding": np.abs(single - double).max().reshape(1),
    }


def unpack(path: Path, model: nn.Module) -> Evidence:
    """The inverse of `pack`. Raises ValueError where the inputs cannot be made again here."""
    facts = json.loads(read_header(path).metadata[FACTS])
    if facts["format"] != 1:
        raise ValueError(f"it has format {facts['format']}, 1 is read here")
    stored = _read(path)
    shapes = facts["shapes"]
    inputs = {name: stored[f"input.{name}"] for name in shapes if f"input.{name}" in stored}
    if not inputs:  # of images alone: tokens are small
        ((_, *sides, _),) = shapes.values()
        as_size(sides)  # of a sane size
        height, width = sides
        inputs = compare.random_inputs("images", model.config, (height, width), facts["seed"])
    if {name: _hash(x) for name, x in inputs.items()} != facts["sha256"]:
        raise ValueError("its inputs cannot be made again with this NumPy")
    versions = {k: v for k, v in facts["versions"].items() if k not in cache.versions()}
    ran = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Evidence(
        kind="fingerprint",
        what=f"the fingerprint of {facts['what']}",
        origin=f"kept on {facts['date']} beside these weights by a verification against {ran}, "
        f"on {facts['versions']['platform']}",
        inputs=inputs,
        outputs=_answers(stored, "output"),
        layers=_answers(stored, "layer"),
        said=facts["said"],
        seed=facts["seed"],
        versions=versions,
        sha256=facts["source_sha256"],
    )


# The file ---------------------------------------------------------------------------------------


def _answers(stored: Arrays, kind: str) -> dict[str, Answer]:
    """Those under `output.` or `layer.`, by name."""
    names = [key.removesuffix(".torch32") for key in stored if key.endswith(".torch32")]
    return {
        name.partition(".")[2]: Answer(
            single=stored[f"{name}.torch32"],
            double=stored[name],
            index=stored.get(f"{name}.index"),
            shape=None if (x := stored.get(f"{name}.shape")) is None else tuple(map(int, x)),
            scale=None if (x := stored.get(f"{name}.scale")) is None else float(x[0]),
            rounding=None if (x := stored.get(f"{name}.rounding")) is None else float(x[0]),
        )
        for name in names
        if name.startswith(f"{kind}.")
    }


def safetensors(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. (MLX writes no float64.)"""
    kinds = {dtype.lstrip("<"): name for name, dtype in NUMPY_DTYPES.items() if name != "BF16"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, x in arrays.items():
        begin, end = end, end + x.nbytes
        kind = kinds[x.dtype.str.lstrip("<|")]
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = [np.ascontiguousarray(x).tobytes() for x in arrays.values()]
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _read(path: Path) -> Arrays:
    return {name: np.array(x, copy=True) for name, x in read_state_dict([path]).items()}


def _hash(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
