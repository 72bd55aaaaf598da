"""Every converted network in the cache, verified one after the other without the network."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zoo import describe, zoo
from mlx_zoo.describe import Place
from mlx_zoo.errors import DownloadError, MissingDependency, MLXZooError, VerificationError
from mlx_zoo.hub import cache
from mlx_zoo.verify.report import Report, plain

VERDICTS = ("passed", "FAILED", "damaged", "no evidence", "error")


@dataclass(frozen=True)
class Verdict:
    """What was found of one entry. Only "passed" is a network that was shown to be its original."""

    path: Path
    name: str
    source: str  # with its revision, where it has one
    dtype: str  # or how many bits its weights have
    verdict: str  # of VERDICTS
    reason: str
    seconds: float
    report: Report | None = None

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    @property
    def ratio(self) -> float | None:
        """The largest error of an output, in units of PyTorch's own; None where that is unknown."""
        if self.report is None or self.report.evidence_kind not in ("original", "fingerprint"):
            return None
        return max((c.ratio for c in self.report.outputs), default=None)

    def to_json(self) -> dict[str, Any]:
        report = self.report
        found = {
            "path": str(self.path),
            "name": self.name,
            "source": self.source,
            "dtype": self.dtype,
            "verdict": self.verdict,
            "passed": self.passed,
            "reason": self.reason,
            "max_abs": report.max_abs if report and report.outputs else None,
            "times_pytorch": self.ratio,
            "evidence": report and report.evidence,
            "evidence_kind": report and report.evidence_kind,
            "origin": report and report.origin,
            "seconds": round(self.seconds, 3),
        }
        return plain(found)


def sweep(
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    evidence: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    begin: Callable[[str], object] = lambda name: None,
) -> Iterator[Verdict]:
    """Verify what is cached, entry by entry; the network is not asked, and nothing stops it.

    Entries that are damaged, and those without evidence, are verdicts that say so. Each network's
    memory is given back before the next is loaded.

    Args:
        evidence, seed, device: as `verify` takes them.
        begin: called with the name of an entry before it is read.
    """
    place = Place(cache_dir, local_files_only=True)
    folders = (place.root / "weights").glob("*/")
    for path in sorted(x for x in folders if not x.name.startswith(".")):
        begin(path.name)
        start = time.perf_counter()
        found = _verdict(path, place, evidence, seed, device)
        gc.collect()
        mx.clear_cache()
        yield replace(found, seconds=time.perf_counter() - start)


def _verdict(path: Path, place: Place, evidence: str | None, seed: int, device: str) -> Verdict:
    """Of the entry in a folder."""
    from mlx_zoo.verify import verify

    found = Verdict(path, path.name, "", "", "damaged", "", 0.0)
    try:
        entry = cache.read_entry(path)
        checkpoint, _ = describe.from_json(entry.manifest)
        revision = f"@{checkpoint.revision}" if checkpoint.revision else ""
        source = checkpoint.source.partition("@")[0] + revision
        found = replace(found, name=checkpoint.name, source=source, dtype=_kind(entry))
        model = zoo.of_entry(entry, place)
    except Exception as error:  # whatever is wrong with one is no reason to leave out the others
        return replace(found, reason=_said(error))
    try:
        report = verify(
            model,
            evidence=evidence,
            seed=seed,
            device=device,
            cache_dir=place.cache_dir,
            local_files_only=True,
        )
    except (VerificationError, MissingDependency, DownloadError) as error:
        return replace(found, verdict="no evidence", reason=str(error))
    except Exception as error:
        return replace(found, verdict="error", reason=_said(error))
    verdict = "passed" if report.passed else "FAILED"
    return replace(found, verdict=verdict, reason=report.reason, report=report)


def _said(error: Exception) -> str:
    expected = isinstance(error, (OSError, ValueError, MLXZooError))
    return str(error) if expected else f"{type(error).__name__}: {error}"


def _kind(entry: cache.Entry) -> str:
    """How the weights are stored: their type, or the bits they were quantised to."""
    if how := entry.manifest.get("quantization"):
        return f"{how.get('bits')} bits"
    try:
        header = cache.read_header(entry.weights)
    except MLXZooError:
        return ""
    kinds = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    found = {kinds[x.dtype] for x in header.tensors.values() if x.dtype in kinds}
    return ", ".join(sorted(found))
