"""A run that was ended, at whatever moment, goes on to the very bits of one that was not."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from faults import environment

import mlx_zoo
from mlx_zoo.errors import MLXZooError
from mlx_zoo.mapping import engine
from mlx_zoo.training import Augmentation, checkpoints, steps

# A process of its own; mlx_zoo before mlx.core.
TRAIN = "import mlx_zoo, sys; from test_resume import main; main(*sys.argv[1:])"
KILLED = -signal.SIGKILL


def train(kind, output, **options):
    """With all that chance has a hand in."""
    rng = np.random.default_rng(0)
    if kind == "resnet":
        images = rng.integers(0, 255, (24, 40, 40, 3), np.uint8)
        name, data = "resnet_digits", [(x, f"class {i % 3}") for i, x in enumerate(images)]
        special = {"augment": Augmentation(), "mixup": 0.2, "label_smoothing": 0.1}
        special["batch_size"] = 4
    else:
        words = ["apple", "pear"]
        data = [(f"text {i} of the {words[i % 2]} " * (1 + i % 4), words[i % 2]) for i in range(24)]
        mx.random.seed(0)  # of the fresh head
        name = mlx_zoo.load(
            "bert_docs", True, task="text-classification", num_classes=2, dropout=0.2
        )
        special = {"method": "lora", "batch_size": 4}
    options = {"epochs": 2, "accumulate": 2, "evaluate_every": 2, "patience": 9, **options}
    options = {"checkpoint_every": 1, **options}
    return mlx_zoo.finetune(name, data, 0.3, output=output, **special, **options)


def main(kind, output, doomed):
    """`train` in a process of its own, which kills itself before its `doomed`-th change of a file.

    Changes are what checkpoints, logs and the last folder make: opening, renaming, removing.
    """
    changes, doomed = 0, int(doomed)

    def watch(event, arguments):
        nonlocal changes
        writes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
            event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        )
        if writes and str(output) in str(arguments[0]):
            changes += 1
            if changes == doomed:
                os.kill(os.getpid(), signal.SIGKILL)

    if doomed:
        sys.addaudithook(watch)
    train(kind, Path(output))
    print(changes)


def run(kind, output, doomed=0):
    command = [sys.executable, "-c", TRAIN, kind, str(output), str(doomed)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def outcome(output):
    """The bytes of all that must not depend on how often it was ended."""
    names = ("log.csv", "log.jsonl", "curves.svg", "model/model.safetensors")
    found = {name: (output / name).read_bytes() for name in names}
    (last,) = (output / "checkpoints").glob("step-*")
    return {**found, "state": (last / "state.safetensors").read_bytes()}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """Of each kind, what one comes to that nobody ends."""
    found = {}
    for kind in ("resnet", "bert"):
        with pytest.MonkeyPatch.context() as patch:
            folder = tmp_path_factory.mktemp(kind)
            patch.setenv("MLX_ZOO_CACHE", str(folder / "cache"))
            train(kind, folder / "out")
        found[kind] = outcome(folder / "out")
    return found


@pytest.mark.parametrize("kind", ["resnet", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_kill_at_any_change_of_a_file_costs_nothing(kind, wanted, tmp_path):
    """Each run is killed a little further on, until one ends before that."""
    out, rng, kills = tmp_path / "out", random.Random(kind), 0
    while (done := run(kind, out, doomed=rng.randint(3, 25))).returncode:
        assert done.returncode == KILLED, done.stderr
        kills += 1
    assert kills >= 3
    assert outcome(out) == wanted[kind]
    assert {p.name.partition("-")[0] for p in (out / "checkpoints").iterdir()} == {"step", "best"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "bert"])
def test_a_kill_at_any_time_costs_nothing(kind, wanted, tmp_path):
    out, rng, kills = tmp_path / "out", random.Random(1), 0
    while kills < 8:
        command = [sys.executable, "-c", TRAIN, kind, str(out), "0"]
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1, 4))
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    assert run(kind, out).returncode == 0
    assert outcome(out) == wanted[kind]


def stop_before(patch, number):
    """Ctrl-C while the step of that number is at work."""
    step, taken = steps.Learner.step, 0

    def interrupted(self, *args):
        nonlocal taken
        taken += 1
        if taken == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    patch.setattr(steps.Learner, "step", interrupted)


@pytest.mark.parametrize(("kind", "number"), [("resnet", 2), ("bert", 3)])  # amid an epoch
def test_ctrl_c_keeps_the_step_at_work(kind, number, wanted, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_before(patch, number)
        with pytest.raises(KeyboardInterrupt):
            train(kind, out)
    assert f"stopped after step {number} of" in caplog.text
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == [f"step-{number:08d}"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(kind, out)
    assert outcome(out) == wanted[kind]
    before = {p: p.stat().st_mtime_ns for p in (out / "model").iterdir()}
    again = train(kind, out)  # nothing is left to do
    assert before == {p: p.stat().st_mtime_ns for p in (out / "model").iterdir()}
    assert outcome(out) == wanted[kind]
    assert again.history == [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 3}, "epochs 2 there, 3 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"learning_rate": 0.01}, "learning_rate 0.001 there, 0.01 here"),
    ],
)
def test_other_options_are_refused(change, said, tmp_path):
    train("resnet", tmp_path / "out", max_steps=1)
    with pytest.raises(MLXZooError, match=said):
        train("resnet", tmp_path / "out", **{"max_steps": 1, **change})


def test_other_data_and_weights_are_refused(tmp_path):
    images = np.zeros((6, 32, 32, 3), np.uint8)
    labels = ["a", "b"] * 3
    model = mlx_zoo.load("resnet_digits", True, num_classes=2)
    options = {"output": tmp_path / "out", "batch_size": 3, "max_steps": 1, "augment": None}
    mlx_zoo.finetune(model, (images, labels), **options)
    fresh = mlx_zoo.load("resnet_digits", True, num_classes=2)  # the head of chance is another
    mlx_zoo.finetune(fresh, (images, labels), **options)
    with pytest.raises(MLXZooError, match="train_data"):
        mlx_zoo.finetune(
            mlx_zoo.load("resnet_digits", True, num_classes=2), (images + 1, labels), **options
        )
    other = mlx_zoo.load("resnet_digits", True, num_classes=2)
    other.layer2[0].conv1.weight += 1e-3
    with pytest.raises(MLXZooError, match="weights"):
        mlx_zoo.finetune(other, (images, labels), **options)


def test_a_folder_with_something_else_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(MLXZooError, match=r"other things in it \(thesis.txt\)"):
        train("resnet", out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_an_output_without_a_checkpoint_takes_another_command(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(steps.Learner, "step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("resnet", out, max_steps=1)
    assert len(train("resnet", out, max_steps=2).history) == 2


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_no_start(file, tmp_path):
    out = tmp_path / "out"
    train("resnet", out, max_steps=2)
    (path,) = (out / "checkpoints").glob(f"step-*/{file}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(MLXZooError, match=r"step-00000002 is damaged"):
        train("resnet", out, max_steps=2)


def test_a_full_disk_leaves_the_checkpoint_before(wanted, tmp_path, monkeypatch):
    out, write = tmp_path / "out", checkpoints.write_safetensors

    def full(path, *args):
        if "step-00000004" in str(path):
            path.write_bytes(b"some")
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_safetensors", full)
        with pytest.raises(MLXZooError, match=r"No space left on device.*the one before is whole"):
            train("resnet", out)
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert "step-00000003" in names
    assert not any("partial" in name for name in names)
    train("resnet", out)
    assert outcome(out) == wanted["resnet"]


def test_one_at_a_time(tmp_path, monkeypatch):
    out = tmp_path / "out"
    begun = checkpoints.Checkpoints(out, {})
    with begun.held(), pytest.raises(MLXZooError, match="another process is still at it"):
        train("resnet", out)


def test_a_run_that_fails_leaves_a_network_to_use(tmp_path, monkeypatch, caplog):
    """With the weights of the last good step, in eval mode."""
    caplog.set_level(logging.INFO)
    out, step = tmp_path / "out", steps.Learner.step
    model = mlx_zoo.load("resnet_digits", True)
    images = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), np.uint8)
    data = (images, [str(i % 10) for i in range(12)])

    def poisoned(self, batches, *args):
        if self.num_updates == 2:
            images = batches[0].inputs[0] * mx.nan
            batches = [batches[0]._replace(inputs=(images,))]
        return step(self, batches, *args)

    monkeypatch.setattr(steps.Learner, "step", poisoned)
    with pytest.raises(MLXZooError, match="step 3: the loss is nan"):
        mlx_zoo.finetune(model, data, batch_size=4, output=out, checkpoint_every=1, epochs=2)
    assert not model.training
    assert np.isfinite(np.array(model(mx.zeros((1, 32, 32, 1))))).all()
    kept = mx.load(str(out / "checkpoints" / "step-00000002" / "state.safetensors"))
    for name in ("fc.weight", "layer1.0.bn1.running_var", "conv1.weight"):
        own = engine.parameters(model)[name]
        assert mx.array_equal(own, kept[f"network/{name}"])
