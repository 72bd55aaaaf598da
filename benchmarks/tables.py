"""The tables of benchmarks.md: every target beside what is reached on this machine.

    python benchmarks/tables.py                       # the CPU: some eight minutes
    python benchmarks/tables.py --device gpu          # one CUDA GPU, with PyTorch
    python benchmarks/tables.py --only 'gpt2*' --json gpt2.json

Random weights and generated inputs: nothing is downloaded. The Markdown goes to standard output,
progress to standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_zoo.backend.blas import load_fast_blas
from mlx_zoo.benchmark import Case, Result, benchmark
from mlx_zoo.benchmark.result import markdown, milliseconds
from mlx_zoo.errors import MLXZooError

HEAD = ("work", "ours", "theirs", "target", "reached", "rounds", "verdict", "what bounds it")
IMPORTS = 10  # of each, in turns


@dataclass(frozen=True)
class Target:
    """A network's cases, and how our time may relate to that of others at most."""

    name: str
    limits: dict[str, float]  # rival -> ratio
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {' '.join(self.options.get('phases', ()))}".strip()


GPT2 = {"torch": 1.0, "mlx-lm": 1.0}
CPU = (
    Target("resnet50", {"torch": 1.5}, {"batch": [1, 8]}),
    Target("vit_b_16", {"torch": 1.2}, {"batch": [1, 8]}),
    Target("efficientnet_b0", {"torch": 2.0}, {"batch": [1, 8]}),
    Target("bert_base_uncased", {"torch": 1.2}, {"batch": [8], "length": 128}),
    Target("gpt2", {"torch": 1.2}, {"length": 512, "phases": ["prefill"]}),
    Target("gpt2", GPT2, {"batch": [1, 8], "phases": ["decode"]}),
)
HALVES = {"dtype": ["float32", "bfloat16"]}
GPU = (
    Target("resnet50", {"torch": 1.3}, {"batch": [64], **HALVES}),
    Target("vit_b_16", {"torch": 1.2}, {"batch": [64], **HALVES}),
    Target("efficientnet_b0", {"torch": 1.5}, {"batch": [64], **HALVES}),
    Target("bert_base_uncased", {"torch": 1.2}, {"batch": [8, 64], "length": 128, **HALVES}),
    Target("gpt2", {"torch": 1.0}, {"length": 512, "phases": ["prefill"], **HALVES}),
    Target("gpt2", GPT2, {"batch": [1, 8], "phases": ["decode"], **HALVES}),
)
LOADED = "resnet50"  # whose loading is timed


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def measure(target: Target, device: str, **how: Any) -> Result:
    rivals = ["eager", *(r for r in target.limits if r == "mlx-lm" and find_spec("mlx_lm"))]
    loads = target.name == LOADED and device == "cpu"
    return benchmark(
        target.name,
        device=device,
        compare=rivals,
        loading=loads,
        begin=say,
        **how,
        **target.options,
    )


def rows_of(target: Target, result: Result) -> Iterator[tuple[str, ...]]:
    for case in result.cases:
        for rival, limit in target.limits.items():
            yield row_of(result, case, rival, limit)


def row_of(result: Result, case: Case, rival: str, limit: float) -> tuple[str, ...]:
    ours, theirs = result.ours(case), result.row(case, rival)
    work = f"{result.name.partition('.')[0]}, {case}"
    assert ours.timing
    own = f"{milliseconds(ours.timing.median)} ms"
    if theirs is None or theirs.timing is None:
        why = theirs.error if theirs else "not installed"
        return (f"{work}; {rival}", own, why, f"<= {limit}", "", "", "not measured", "")
    ratio = result.ratio(case, rival)
    assert ratio
    bound = next((b for b in result.bounds if b.case == case), None)
    limits = ""
    if bound:
        what = "compute" if bound.compute_share > 0.5 else "memory"
        used = bound.seconds / ours.timing.median
        limits = f"{what}: {milliseconds(bound.seconds)} ms, {used:.0%} of ours"
    return (
        f"{work}; {rival}",
        own,
        f"{milliseconds(theirs.timing.median)} ms",
        f"<= {limit}",
        f"{ratio.median:.2f}",
        f"{ratio.low:.2f} to {ratio.high:.2f}",
        verdict(ratio.median, limit),
        limits,
    )


def verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else f"missed by {value / limit - 1:.0%}"


def loading_rows(result: Result) -> Iterator[tuple[str, ...]]:
    """Warm loading beside torch.load and load_state_dict, cold conversion beside its targets."""
    by = {loading.contestant: loading for loading in result.loading}
    ours, theirs = by["mlx_zoo"], by["torch"]
    warm, cold = ours.seconds["warm"], ours.seconds["cold"]
    for how, said in (
        ("fill", "torch.load + load_state_dict into a network that is there"),
        ("built", "the same, with the network built"),
        ("assigned", "the same, built on the meta device and assigned"),
    ):
        ratio = warm / theirs.seconds[how]
        yield (
            f"{LOADED}, warm load; {said}",
            f"{milliseconds(warm)} ms",
            f"{milliseconds(theirs.seconds[how])} ms",
            "<= 0.5",
            f"{ratio:.2f}",
            "",
            verdict(ratio, 0.5),
            "",
        )
    rate = ours.bytes / cold / 1e6
    kept = "met" if rate >= 500 else f"missed by {1 - rate / 500:.0%}"
    speed = f"{milliseconds(cold)} ms"
    what = f"{LOADED}, cold conversion of {ours.bytes / 1e6:.0f} MB"
    yield (what, speed, "", ">= 500 MB/s", f"{rate:.0f} MB/s", "", kept, "")
    if ours.grown is not None:
        share = ours.grown / ours.bytes
        judged = verdict(share, 1.5)
        yield (f"{what}, peak memory", "", "", "<= 1.5 x", f"{share:.2f} x", "", judged, "")


def import_row() -> tuple[str, ...]:
    """`import mlx_zoo` beside `import mlx.core, mlx.nn` with the same BLAS, in turns."""
    path = load_fast_blas().path
    blas = f"import ctypes; ctypes.CDLL({path!r}, ctypes.RTLD_GLOBAL); " if path else ""
    codes = {"ours": "import mlx_zoo", "mlx": f"{blas}import mlx.core, mlx.nn"}
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(IMPORTS + 1):
        for name, code in codes.items():
            timed = f"import time; start = time.perf_counter(); {code}; "
            command = [sys.executable, "-c", f"{timed}print(time.perf_counter() - start)"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            seconds[name].append(float(done.stdout))
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    pairs = list(zip(seconds["ours"][1:], seconds["mlx"][1:], strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return (
        "import mlx_zoo; import mlx.core, mlx.nn and the BLAS",
        f"{milliseconds(medians['ours'])} ms",
        f"{milliseconds(medians['mlx'])} ms",
        "<= 1.3",
        f"{ratio:.2f}",
        f"{min(a / b for a, b in pairs):.2f} to {max(a / b for a, b in pairs):.2f}",
        verdict(ratio, 1.3),
        "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--only", default="*", help="a pattern: 'gpt2 decode', 'import'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, at least")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write every result to this file, too")
    given = parser.parse_args()
    how = {"rounds": given.rounds, "seconds": given.seconds, "threads": given.threads}

    results: list[Result] = []
    rows: list[tuple[str, ...]] = []
    for target in CPU if given.device == "cpu" else GPU:
        if not fnmatch(str(target), given.only):
            continue
        say(f"--- {target}")
        try:
            result = measure(target, given.device, **how)
        except MLXZooError as error:  # the other rows are still worth having
            rows.append((str(target), "", "", "", "", "", f"failed: {error}", ""))
            continue
        results.append(result)
        rows += rows_of(target, result)
        if result.loading:
            rows += loading_rows(result)
    if given.device == "cpu" and fnmatch("import", given.only):
        say("--- import")
        rows.append(import_row())
    print(markdown(HEAD, rows))
    if results:
        machine = ", ".join(f"{name}: {fact}" for name, fact in results[0].machine.items())
        print(f"\n{machine}.")
        versions: dict[str, str] = {}
        for facts in results[-1].contestants.values():
            versions |= facts["versions"]
        print(f"\n{', '.join(f'{name} {version}' for name, version in versions.items())}.")
        for dtype, its in results[0].ceilings.items():
            print(
                f"\nCeilings, {dtype}: {its['gflops']:,.0f} GFLOP/s, "
                f"{its['gb_per_second']:,.0f} GB/s."
            )
        for note in dict.fromkeys(note for result in results for note in result.notes):
            print(f"\nNote: {note}.")
    if given.json:
        given.json.write_text(json.dumps([r.summary() for r in results], indent=2, default=str))


if __name__ == "__main__":
    main()
