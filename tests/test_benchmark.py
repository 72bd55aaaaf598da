"""The benchmark: its statistics, its counts, its workers, and what becomes of one that fails.

Nothing here asserts a time.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

import mlx_zoo
from mlx_zoo import benchmark as package
from mlx_zoo import registry
from mlx_zoo.benchmark import Case, Ratio, Result, Row, Timing, benchmark, contest, originals
from mlx_zoo.benchmark import process as processes
from mlx_zoo.benchmark import worker as workers
from mlx_zoo.benchmark.contest import Contestant, Setting, is_last
from mlx_zoo.benchmark.process import Process, WorkerError
from mlx_zoo.benchmark.result import GIB
from mlx_zoo.benchmark.roofline import Work, bound, count
from mlx_zoo.benchmark.timing import percentile
from mlx_zoo.cli import main
from mlx_zoo.errors import MissingDependency

# One thread: where others are at work, several wait for each other.
QUICK = {"rounds": 2, "seconds": 0.01, "compare": "eager", "loading": False, "threads": 1}


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setitem(contest.SETTLE, "cpu", 0.01)


@pytest.fixture
def children(monkeypatch):
    """The workers that are started, by name; afterwards all must have ended."""
    found = {}
    create = Process.__init__

    def noting(self, name, *args, **kwargs):
        create(self, name, *args, **kwargs)
        found.setdefault(name, []).append(self.child)

    monkeypatch.setattr(Process, "__init__", noting)
    yield found
    assert found
    assert all(child.poll() is not None for those in found.values() for child in those)


# Statistics -------------------------------------------------------------------------------------


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).exponential(size=37).tolist()
    for p in (0, 5, 50, 95, 99, 100):
        assert percentile(values, p) == pytest.approx(np.percentile(values, p), rel=1e-12)
    assert percentile([3.0], 99) == 3.0


def test_a_timing_is_of_all_runs():
    timing = Timing(((1.0, 2.0, 6.0), (3.0, 3.0)))
    facts = timing.to_json()
    assert facts["rounds"] == [2.0, 3.0]
    assert (facts["runs"], facts["mean"], facts["min"], facts["p50"]) == (5, 3.0, 1.0, 3.0)
    assert facts["std"] == pytest.approx(np.std([1, 2, 6, 3, 3], ddof=1))
    assert facts["p95"] == pytest.approx(5.4)
    assert Timing(((2.0,),)).std == 0


def test_a_ratio_is_of_neighbours():
    """The machine slows down fourfold: both are hit, and the ratio is not."""
    ours, theirs = Timing(((1.0,), (2.0,), (4.0,))), Timing(((2.0,), (4.0,), (10.0,)))
    assert Ratio.of(ours, theirs) == Ratio(0.5, 0.4, 0.5, 0.5)
    drifting = Ratio.of(Timing(((1.0,), (8.0,))), Timing(((2.0,), (16.0,))))
    assert (drifting.low, drifting.high) == (0.5, 0.5)


def test_a_token_takes_what_the_further_ones_take(monkeypatch):
    """To read the prompt takes 5 s, each token 2 s."""
    now = [0.0]
    monkeypatch.setattr(workers.time, "perf_counter", lambda: now[0])

    def generate(count):
        now[0] += 5 + 2 * count
        return count

    assert workers.per_token(generate, 9)() == 2
    with pytest.raises(RuntimeError, match="ended after 3 of 9"):
        workers.per_token(lambda count: min(count, 3), 9)()


def row(batch, memory, seconds=1.0, contestant="mlx_zoo"):
    case = Case("forward", (batch, 8, 8, 3), "float32")
    return Row(case, contestant, Timing(((seconds,),)), memory=memory)


def test_rows_per_gib_leave_out_what_a_process_has_anyway():
    rows = (row(1, GIB), row(2, GIB + GIB // 64), row(9, GIB + GIB // 8), row(9, 5, 1.0, "torch"))
    result = Result("x", "cpu", {}, {}, rows)
    assert result.per_gib("mlx_zoo") == 64
    assert result.per_gib("torch") is None


def test_a_sweep_ends_before_it_is_too_much(monkeypatch):
    monkeypatch.setattr(contest, "free_memory", lambda: 10 * GIB)
    assert not is_last(row(8, 3 * GIB))
    assert is_last(row(8, 5 * GIB))
    assert is_last(row(8, GIB, seconds=2.0))
    monkeypatch.setattr(contest, "free_memory", lambda: None)
    assert not is_last(row(8, 5 * GIB))


def test_throughput_counts_what_a_run_computes():
    timing = Timing(((0.5,),))
    prefill = Case("prefill", (2, 100), "float32", vocab=9)
    decode = replace(prefill, phase="decode")
    assert Row(prefill, "x", timing).throughput == 400
    assert Row(decode, "x", timing).throughput == 4
    assert (prefill.unit, replace(prefill, phase="forward").unit) == ("tokens", "sequences")


# Roofline ---------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.unseen = nn.Linear(8, 2, bias=False)
        self.linear = nn.Linear(8, 5)

    def __call__(self, x):
        return self.linear(self.conv(x).mean((1, 2)))


def test_work_is_counted_layer_by_layer():
    model = Small()
    work, covered = count(model, lambda: model(mx.zeros((2, 6, 6, 4))))
    conv = Work(2 * 2 * 3 * 3 * 8 * 9 * 2, 4 * (2 * 36 * 4 + 2 * 9 * 8 + 8 * 9 * 2 + 8))
    linear = Work(2 * 2 * 8 * 5, 4 * (2 * 8 + 2 * 5 + 8 * 5 + 5))
    assert work == [conv, linear]
    sizes = {"conv": 8 * 9 * 2 + 8, "linear": 45}
    assert covered == pytest.approx(sum(sizes.values()) / (sum(sizes.values()) + 16))
    assert type(model.conv) is nn.Conv2d  # as it was


@pytest.mark.parametrize(
    ("name", "shape", "gflop"),
    [("resnet18", (1, 224, 224, 3), 3.63), ("vit_tiny_patch16_224", (1, 224, 224, 3), 2.51)],
)
def test_known_networks_have_their_known_work(name, shape, gflop):
    """Twice the multiply-adds that torchvision, and the papers with attention, give."""
    model = mlx_zoo.load(name)
    work, covered = count(model, lambda: model(mx.zeros(shape)))
    assert sum(one.flops for one in work) / 1e9 == pytest.approx(gflop, rel=0.01)
    assert covered > 0.98


def test_a_bound_takes_the_longer_of_sums_and_bytes():
    seconds, share = bound([Work(2_000_000_000, 10), Work(10, 3_000_000_000)], 1.0, 1.0)
    assert seconds == pytest.approx(5.0)
    assert share == pytest.approx(0.4)
    assert bound([], 1.0, 1.0) == (0.0, 0.0)


# What the others build --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_config_goes_to_transformers_and_comes_back(family):
    architecture = registry.architectures()[family]
    configs = {c.config for c in registry.checkpoints().values() if c.architecture == family}
    assert len(configs) > 5
    configs.add(replace(next(iter(configs)), mlp_dims=40))
    for config in configs:
        theirs = originals.as_transformers(architecture, config)
        read = architecture.read_config(theirs)
        same = {n: getattr(read, n) for n in originals_of(architecture)}
        assert same == {n: getattr(config, n) for n in same}


def originals_of(architecture):
    """The fields that transformers has a name for."""
    table = sys.modules[f"mlx_zoo.specs.{architecture.name}"].ATTRIBUTES
    return {*table.values(), "mlp_dims", "num_classes"}


def test_the_original_is_told_what_was_changed():
    checkpoint = registry.find("vit_base_patch16_224")
    config = replace(checkpoint.config, img_size=64, num_classes=7)
    said = originals.in_torch(checkpoint, config)
    assert said["library"] == "timm"
    assert {"img_size": 64, "num_classes": 7, "in_chans": 3}.items() <= said["options"].items()
    bare = registry.find("bert_base")
    assert originals.in_torch(bare, bare.config)["name"] == "BertModel"


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(originals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="--compare none"):
        benchmark("resnet_digits", compare="eager")
    with pytest.raises(MissingDependency, match="pip install mlx-lm"):
        benchmark("gpt2_docs", compare="mlx-lm")


# Workers ----------------------------------------------------------------------------------------


def fake(tmp_path, monkeypatch, body):
    """A worker that does `body` with every order."""
    file = tmp_path / "worker.py"
    file.write_text(f"import json, os, sys, time\nfor line in sys.stdin:\n    {body}\n")
    monkeypatch.setattr(processes, "WORKER", file)
    return Process("the worker", 1)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('no more\\nmemory')", "ended during 'round': exit status 1; memory"),
        ("os.kill(os.getpid(), 9)", r"signal 9 \(out of memory\?\)"),
        ("time.sleep(600)", "gave no answer to 'round' for 1 s and was ended"),
        ("print(json.dumps({'error': 'E: why'}), flush=True)", "^the worker: E: why$"),
    ],
)
def test_a_worker_that_fails_is_an_error(body, said, tmp_path, monkeypatch, children):
    worker = fake(tmp_path, monkeypatch, body)
    with pytest.raises(WorkerError, match=said):
        worker.ask("round", limit=1 if "sleep" in body else 60)
    for _ in range(2):
        worker.close()


def test_a_worker_does_not_inherit_what_importing_us_sets(tmp_path, monkeypatch, children):
    """Else PyTorch's MKL and mlx-lm's CUDA would run as we have ours run."""
    code = (
        "import json, os; before = {**os.environ}; import mlx_zoo.benchmark\n"
        "print(json.dumps({k: v for k, v in os.environ.items() if before.get(k) != v}))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in processes.OURS}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    chosen = json.loads(done.stdout)
    assert chosen
    assert chosen.items() <= processes.OURS.items()

    said = "print(json.dumps({k: os.environ.get(k) for k in " + repr([*chosen]) + "}), flush=True)"
    for value, seen in ((None, None), ("its user's", "its user's")):
        for name, own in chosen.items():
            monkeypatch.setenv(name, value or own)
        worker = fake(tmp_path, monkeypatch, said)
        assert worker.ask("round") == dict.fromkeys(chosen, seen)
        worker.close()


def test_a_run_that_fails_leaves_the_garbage_collector_on():
    worker = workers.Worker()
    results = iter([None, None])
    worker.run = lambda: next(results)
    with pytest.raises(StopIteration):
        worker.round({"runs": 5, "seconds": 0})
    assert gc.isenabled()


def test_a_worker_ends_with_its_parent(children):
    worker = Process("the worker", 1)
    worker.child.stdin.close()  # as the system does when the parent is no more
    assert worker.child.wait(timeout=60) == 0
    worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("framework", ["mlx_zoo", "torch"])
def test_a_worker_has_one_framework_and_its_threads(framework, children):
    checkpoint = registry.find("bert_docs")
    network = {"name": "bert_docs", "options": {}}
    if framework == "torch":
        network = originals.in_torch(checkpoint, checkpoint.config)
    with ExitStack() as stack:
        setting = Setting("cpu", "float32", 1, True, 1, 0.0)
        worker, facts = setting.start(Contestant("it", framework, "eager", network), stack)
        loaded = Path(f"/proc/{worker.child.pid}/maps").read_text()
        environment = Path(f"/proc/{worker.child.pid}/environ").read_text()
    assert ("libmlx" in loaded, "libtorch" in loaded) == (
        framework == "mlx_zoo",
        framework == "torch",
    )
    assert "OMP_NUM_THREADS=1" in environment.split("\0")
    assert {"mlx_zoo": "mlx", "torch": "torch"}[framework] in facts["versions"]


# The whole --------------------------------------------------------------------------------------


def run(*args, status=0):
    result = CliRunner().invoke(main, ["benchmark", *map(str, args)])
    assert result.exit_code == status, result.output
    return result


def test_the_command_measures_all_there_is(tmp_path, children):
    file = tmp_path / "plot.svg"
    options = ("--rounds", 2, "--seconds", 0.01, "--compare", "eager", "--batch", "1,3")
    options += ("--threads", 1)
    facts = json.loads(
        run("resnet_digits", *options, "--json", "--plot", file, "--device", "cpu").stdout
    )
    assert {"format", "machine", "rows", "ratios", "loading", "bounds", "repeat"} <= facts.keys()
    assert {"Processor", "Cores", "BLAS", "Threads", "Load average"} <= facts["machine"].keys()
    assert {r["case"]["shape"][0] for r in facts["rows"]} == {1, 3}
    for r in facts["rows"]:
        s = r["seconds"]
        assert r["error"] is None
        assert len(s["rounds"]) == 2
        assert s["runs"] >= 6
        assert 0 < s["min"] <= s["p50"] <= s["p95"] <= s["p99"]
        assert r["throughput"] == pytest.approx(r["case"]["shape"][0] / s["p50"])
        assert r["process_peak_bytes"] > 10 << 20
        assert (r["framework_peak_bytes"] is None) == (r["contestant"] == "torch")
    by = {(r["contestant"], r["case"]["shape"][0]): r["seconds"]["rounds"] for r in facts["rows"]}
    for ratio in facts["ratios"]:
        batch = ratio["case"]["shape"][0]
        pairs = zip(by[ratio["ours"], batch], by["torch", batch], strict=True)
        ratios = [a / b for a, b in pairs]
        assert ratio["theirs"] == "torch"
        assert ratio["median"] == pytest.approx(statistics.median(ratios))
        assert (ratio["low"], ratio["high"]) == (min(ratios), max(ratios))
    loading = {one["contestant"]: one for one in facts["loading"]}
    assert loading["mlx_zoo"]["seconds"].keys() == {"cold", "warm"}
    assert loading["torch"]["seconds"].keys() == {"fill", "built", "assigned"}
    assert all(x > 0 for one in loading.values() for x in one["seconds"].values())
    assert loading["torch"]["bytes"] == loading["mlx_zoo"]["bytes"] > 400_000
    assert [b["case"]["shape"][0] for b in facts["bounds"]] == [1, 3]
    assert facts["contestants"]["torch"]["versions"].keys() >= {"torch", "timm"}
    words = "".join(ET.parse(file).getroot().itertext())
    assert "torch" in words
    assert "forward, batch 3, 32x32, float32" in words


def test_text_is_generated_by_both(children):
    result = benchmark("gpt2_docs", **QUICK, batch=[1, 2], length=12, new_tokens=4)
    assert {row.error for row in result.rows} == {""}
    phases = [(c.phase, c.batch, c.new_tokens) for c in result.cases]
    assert phases == [("prefill", 1, 0), ("prefill", 2, 0), ("decode", 1, 4), ("decode", 2, 4)]
    assert {row.contestant for row in result.rows} >= {"mlx_zoo", "torch"}
    text = package_text(result)
    assert "decode, batch 2, after 12 tokens, float32" in text
    assert "ours / theirs" in text


def package_text(result):
    from mlx_zoo.verify.report import as_text

    return as_text(result, 160)


def test_a_rival_that_cannot_is_a_row_and_one_that_is_killed_as_well(monkeypatch, children):
    real = originals.in_torch

    def wrong(checkpoint, config):
        return {**real(checkpoint, config), "name": "no such network"}

    def begin(what):
        if "round 2 of 2, torch" in what:
            os.kill(children["torch"][-1].pid, signal.SIGKILL)

    result = benchmark("bert_docs", **QUICK, length=8, batch=[1, 2], begin=begin)
    rows = {(r.contestant, r.case.batch): r for r in result.rows}
    assert "signal 9" in rows["torch", 1].error
    assert "signal 9" in rows["torch", 2].error
    assert all(r.timing for (name, _), r in rows.items() if name != "torch")
    assert "torch: torch ended during 'round': signal 9" in package_text(result)
    assert not json.loads(result.to_json())["ratios"]

    monkeypatch.setattr(originals, "in_torch", wrong)
    (ours, *_, theirs) = benchmark("bert_docs", **QUICK, length=8, optimize=False).rows
    assert ours.timing
    assert "no such network" in theirs.error


def test_without_ours_there_is_no_benchmark(children):
    def begin(what):
        if "round 1 of 2, mlx_zoo" in what:
            os.kill(children["mlx_zoo"][0].pid, signal.SIGKILL)

    with pytest.raises(WorkerError, match="mlx_zoo ended during 'round': signal 9"):
        benchmark("vit_digits", **{**QUICK, "compare": "none"}, begin=begin)


def test_a_sweep_doubles_and_is_drawn_as_lines(monkeypatch, children):
    monkeypatch.setitem(package.SWEEP_LIMITS, "batch", 8)
    result = benchmark("vit_digits", **{**QUICK, "compare": "none"}, sweep="batch")
    assert [case.batch for case in result.cases] == [1, 2, 4, 8]
    drawing = ET.fromstring(result.to_svg())
    words = "".join(drawing.itertext())
    assert "peak memory, MiB, by batch" in words
    assert len([x for x in drawing.iter() if x.tag.endswith("path")]) >= 2
    assert result.repeat.startswith("mlx-zoo benchmark vit_digits --batch 1 ")
    _, command, *words = shlex.split(result.repeat)
    options = main.commands[command].make_context(command, words).params
    same = {"sweep": "batch", "rounds": 2, "seconds": 0.01, "loading": False, "compare": ["none"]}
    assert same.items() <= options.items()


def test_loading_is_measured_without_torch(children):
    result = benchmark("vit_digits", **{**QUICK, "compare": "none", "loading": True})
    (loading,) = result.loading
    assert loading.contestant == "mlx_zoo"
    assert loading.bytes > 400_000
    assert not any(Path(word).exists() for word in result.notes)


def test_a_busy_machine_is_noted(monkeypatch, children):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    quick = {**QUICK, "compare": "none", "optimize": False}
    assert "busy" in " ".join(benchmark("resnet_digits", **quick).notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"dtype": []}, "dtype=None"),
        ({"new_tokens": 1}, "new_tokens=1: .*after the first"),
        ({"compare": ["eager", "jax"]}, "compare='jax'"),
        ({"length": 5}, "takes images"),
        ({"sweep": "length"}, "takes images"),
        ({"phases": ["decode"]}, "phase='decode'"),
        ({"task": "fill-mask"}, "task='fill-mask'"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_starts(options, said):
    with pytest.raises(ValueError, match=said):
        benchmark("resnet_digits", **options)


def test_errors_of_the_command_are_one_line():
    assert run("resnet_digits", "--batch", "two", status=2).output.endswith("between\n")
    output = run("resnet_digits", "--compare", "jax", status=1).output
    assert output.startswith("Error: compare='jax'")
    assert output.count("\n") == 1
    assert "no model is called" in run("resnet_digit5", status=1).output
    with pytest.raises(ValueError, match="256 positions"):
        benchmark("gpt2_docs", length=300, compare="none")


@pytest.mark.slow
def test_torch_compiles_and_has_channels_last(children):
    """Where no compiler works, the row says why."""
    result = benchmark("resnet_digits", **{**QUICK, "compare": "torch"})
    rows = {r.contestant: r for r in result.rows}
    assert rows["torch channels last"].timing
    assert rows["torch compiled"].timing or "torch compiled: " in rows["torch compiled"].error
