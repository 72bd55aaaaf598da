"""How fast is a network, beside the PyTorch original on the same machine, in the same minutes?

Every contestant lives in a worker process. Rounds alternate: while one runs, the others are idle.
benchmarks.md in the repository says how, and what was found.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import mlx.core as mx

from mlx_zoo import describe, registry
from mlx_zoo.benchmark import originals
from mlx_zoo.benchmark.contest import Contest, Contestant, Setting, time_loading
from mlx_zoo.benchmark.process import WorkerError
from mlx_zoo.benchmark.result import OURS, Bound, Case, Loading, Result, Row
from mlx_zoo.benchmark.timing import Ratio, Timing
from mlx_zoo.catalogue import Checkpoint, as_size
from mlx_zoo.describe import Place
from mlx_zoo.verify.circumstances import environment

__all__ = ["Case", "Ratio", "Result", "Row", "Timing", "benchmark"]

PHASES = ("forward", "prefill", "decode")
# What `compare` may name -> contestants: (name, framework, variant).
RIVALS = {
    "eager": (("torch", "torch", "eager"),),
    "compiled": (("torch compiled", "torch", "compiled"),),
    "channels-last": (("torch channels last", "torch", "channels last"),),
    "mlx-lm": (("mlx-lm", "mlx-lm", ""),),
    "none": (),
}
RIVALS["torch"] = (*RIVALS["eager"], *RIVALS["compiled"], *RIVALS["channels-last"])

BUSY = 0.25  # load average per core, above which a machine is busy
RESTLESS = 0.05  # share of a core, above which a worker at rest is not
SWEEP_LIMITS = {"batch": 1024, "length": 1 << 16}

LENGTHS = {"gpt2": 512}  # tokens, where nothing is said
LENGTH = 128
PROMPT = 32  # tokens before those that are decoded


def benchmark(
    name: str,
    *,
    batch: int | Sequence[int] = 1,
    length: int | None = None,
    img_size: int | None = None,
    dtype: str | Sequence[str] = "float32",
    device: str | None = None,
    compare: str | Sequence[str] | None = None,
    task: str | None = None,
    phases: Sequence[str] | None = None,
    new_tokens: int = 64,
    rounds: int = 5,
    seconds: float = 0.5,
    optimize: bool = True,
    loading: bool = True,
    tf32: bool = True,
    threads: int | None = None,
    sweep: str | None = None,
    begin: Callable[[str], None] = lambda what: None,
) -> Result:
    """Time a network with random weights; nothing is downloaded.

    Args:
        name: as `load` takes it, of the registry.
        batch: how many images or texts at once.
        length: tokens of a text (None: 128, for GPT-2 512); before those that are decoded, 32.
        img_size: side of the images, None for the checkpoint's own.
        dtype: one or more of float32, float16, bfloat16.
        device: "cpu" or "gpu"; None for MLX's default.
        compare: "torch" (eager, compiled, and for images with channels last), or of these "eager",
            "compiled", "channels-last"; "mlx-lm"; "none". None: "torch" where it is installed.
        task: which head, for text networks.
        phases: of "forward", "prefill" and "decode"; None for what the network is used for.
        new_tokens: how many are decoded in a run, from 2 on: the time is of those after the first.
        rounds: how often every contestant has its turn.
        seconds: how long a turn lasts, at least; it has three runs or more.
        optimize: measure the network optimised for inference as well.
        loading: measure how long loading takes, cold and warm.
        tf32: on a GPU, let float32 products have TF32's digits, in all frameworks.
        threads: of every library (None: the cores that this process may use).
        sweep: "batch" or "length": powers of two, until time or memory end it.
        begin: is told what is measured next.

    Raises:
        ValueError: a wrong argument.
        MissingDependency: what `compare` asks for is not installed.
        MLXZooError: an unknown name; our own worker failed. Where another's fails, its row says so.
    """
    checkpoint = describe.find(name, None, Place(local_files_only=True))
    architecture = registry.architectures()[checkpoint.architecture]
    config = _config(checkpoint, task, img_size)
    dtypes = [dtype] if isinstance(dtype, str) else list(dtype)
    batches = [batch] if isinstance(batch, int) else list(batch)
    _check("dtype", dtypes, ("float32", "float16", "bfloat16"))
    _check_counts(batch=batches, rounds=[rounds], new_tokens=[new_tokens])
    _check_counts(length=[length or 1], threads=[threads or 1])
    if new_tokens < 2:
        raise ValueError(f"new_tokens={new_tokens}: the time is of those after the first")
    if sweep is not None:
        _check("sweep", [sweep], tuple(SWEEP_LIMITS))
    if length is not None and architecture.inputs == "images":
        raise ValueError(f"length={length}: {name} takes images")
    device = device or ("gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu")
    _check("device", [device], ("cpu", "gpu"))
    if device == "gpu" and not mx.is_available(mx.gpu):
        raise ValueError("device='gpu': MLX sees none here")
    wanted = _phases(config, phases)
    if sweep == "length" and architecture.inputs == "images":
        raise ValueError(f"sweep='length': {name} takes images")
    options = {k: v for k, v in {"task": task, "img_size": img_size}.items() if v is not None}
    contestants, notes = _contestants(name, checkpoint, config, options, compare, optimize)

    threads = threads or _num_cores()
    said: dict[str, Any] = {"batch": batches, "length": length, "img_size": img_size}
    said |= {"dtype": dtypes, "task": task, "device": device, "compare": compare, "phase": phases}
    said |= {"new_tokens": new_tokens, "rounds": rounds, "seconds": seconds, "threads": threads}
    machine = {**environment(), "Threads": str(threads), **_load(notes)}
    if device == "gpu":
        machine["TF32"] = "on" if tf32 else "off"
    rows: list[Row] = []
    facts: dict[str, dict[str, Any]] = {}
    bounds: list[Bound] = []
    ceilings: dict[str, Mapping[str, float]] = {}
    for kind in dtypes:
        setting = Setting(device, kind, threads, tf32, rounds, seconds)
        cases = _cases(checkpoint, config, wanted, batches, length, kind, new_tokens, sweep)
        with ExitStack() as stack:
            contest = Contest(setting, contestants, stack, begin)
            rows += contest.run(cases, sweep is not None)
            bounds += contest.bounds
            ceilings[kind] = contest.ceilings
            facts |= contest.facts
    loadings: tuple[Loading, ...] = ()
    if loading:
        try:
            loadings = time_loading(replace(setting, dtype="float32"), contestants, begin)
        except WorkerError as error:
            notes.append(f"loading was not measured: {error}")
    restless = {r.contestant: r.busy for r in sorted(rows, key=lambda r: r.busy)}
    for rival, busy in restless.items():
        if busy > RESTLESS:
            notes.append(f"{rival} used up to {busy:.0%} of a core while the others ran")
    return Result(
        name=checkpoint.name,
        device=device,
        machine=machine,
        contestants=facts,
        rows=tuple(rows),
        loading=loadings,
        bounds=tuple(bounds),
        ceilings=ceilings,
        repeat=_repeat(name, said, sweep, optimize, loading, tf32),
        notes=tuple(notes),
    )


# What is asked for ------------------------------------------------------------------------------


def _check(name: str, values: Iterable[Any], known: Sequence[str]) -> None:
    for value in [*values] or [None]:
        if value not in known:
            raise ValueError(f"{name}={value!r}: one of {', '.join(known)} is needed")


def _check_counts(**counts: Sequence[Any]) -> None:
    for name, values in counts.items():
        for value in values or [None]:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a count from 1 is needed")


def _config(checkpoint: Checkpoint, task: str | None, img_size: int | None) -> Any:
    """The network's config. Raises ValueError for a task or size that it does not have."""
    architecture = registry.architectures()[checkpoint.architecture]
    config = checkpoint.config
    if task is not None:
        _check("task", [task], architecture.tasks)
    if hasattr(config, "task"):
        config = replace(config, task=task or architecture.default_task)
    if img_size is not None:
        if architecture.inputs != "images":
            raise ValueError(f"img_size={img_size}: {checkpoint.name} takes tokens")
        if hasattr(config, "img_size"):
            config = replace(config, img_size=as_size(img_size))
    return config


def _phases(config: Any, phases: Sequence[str] | None) -> Sequence[str]:
    generates = getattr(config, "task", None) == "text-generation"
    if phases is None:
        return ("prefill", "decode") if generates else ("forward",)
    _check("phase", phases, PHASES if generates else PHASES[:1])
    return phases


def _num_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load(notes: list[str]) -> dict[str, str]:
    """The load average of the last minute, with a note where somebody else is at work."""
    load = os.getloadavg()[0]
    if load > BUSY * (os.cpu_count() or 1):
        notes.append(
            f"this machine was busy when it began (load average {load:.1f}): "
            "times are too long, and ratios uncertain"
        )
    return {"Load average": f"{load:.2f}"}


def _contestants(
    name: str,
    checkpoint: Checkpoint,
    config: Any,
    options: Mapping[str, Any],
    compare: str | Sequence[str] | None,
    optimize: bool,
) -> tuple[list[Contestant], list[str]]:
    """Who takes part, ours first; what is worth a note."""
    images = registry.architectures()[checkpoint.architecture].inputs == "images"
    own_options = options
    if images and not hasattr(config, "img_size"):  # takes any size: nothing to configure
        own_options = {k: v for k, v in options.items() if k != "img_size"}
    own = {"name": name, "options": own_options}
    found, notes = [Contestant(OURS[0], "mlx_zoo", "plain", own)], []
    if optimize:
        found.append(Contestant(OURS[1], "mlx_zoo", "optimised", own))
    if compare is None:
        compare = "torch" if find_spec("torch") else "none"
        if compare == "none":
            notes.append('PyTorch is not installed: pip install "mlx-zoo[torch]" to compare')
    names = [compare] if isinstance(compare, str) else list(compare)
    _check("compare", names, tuple(RIVALS))
    for rival, framework, variant in dict.fromkeys(r for one in names for r in RIVALS[one]):
        if variant == "channels last" and not images:
            continue
        described = originals.in_mlx_lm if framework == "mlx-lm" else originals.in_torch
        found.append(Contestant(rival, framework, variant, described(checkpoint, config)))
    return found, notes


def _cases(
    checkpoint: Checkpoint,
    config: Any,
    phases: Sequence[str],
    batches: Sequence[int],
    length: int | None,
    dtype: str,
    new_tokens: int,
    sweep: str | None,
) -> list[Case]:
    """All of a dtype, in the order in which they are measured. Raises ValueError."""
    if not hasattr(config, "vocab_size"):
        how = checkpoint.preprocessing
        size = getattr(config, "img_size", None) or (how.size if how else 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        counts = _powers(SWEEP_LIMITS["batch"]) if sweep else batches
        return [Case("forward", (B, *sides, config.in_chans), dtype) for B in counts]
    most = config.max_positions
    usual = min(LENGTHS.get(checkpoint.architecture, LENGTH), most)
    found = []
    for phase in phases:
        count = min(new_tokens, most // 2) if phase == "decode" else 0
        N = length or (min(PROMPT, most - count) if phase == "decode" else usual)
        if N + count > most:
            raise ValueError(f"length={N}: {checkpoint.name} has {most} positions")
        shapes = [(B, N) for B in batches]
        if sweep == "batch":
            shapes = [(B, N) for B in _powers(SWEEP_LIMITS["batch"])]
        elif sweep == "length":
            shapes = [(batches[0], n) for n in _powers(most - count) if n >= min(16, most)]
        found += [Case(phase, shape, dtype, config.vocab_size, count) for shape in shapes]
    return found


def _powers(most: int) -> list[int]:
    """Powers of two up to `most`."""
    return [1 << i for i in range(most.bit_length())]


def _repeat(
    name: str, said: Mapping[str, Any], sweep, optimize: bool, loading: bool, tf32: bool
) -> str:
    """The command that measures the same."""
    words = ["mlx-zoo", "benchmark", name]
    for option, value in {**said, "sweep": sweep}.items():
        if value is not None:
            listed = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            words += [f"--{option.replace('_', '-')}", str(listed)]
    flags = {"--no-optimize": optimize, "--no-loading": loading, "--no-tf32": tf32}
    return shlex.join([*words, *(flag for flag, on in flags.items() if not on)])
