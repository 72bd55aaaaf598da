"""Several processes train one network: what they come to is what one comes to."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import launching
import mlx.core as mx
import numpy as np
import pytest
from faults import environment

import mlx_zoo
from mlx_zoo.errors import MLXZooError
from mlx_zoo.training import steps

# A process of its own; mlx_zoo before mlx.core.
TRAIN = "import mlx_zoo, sys; from test_parallel import main; main(*sys.argv[1:])"


def train(kind, output, **options):
    """Of the last batch two processes have 3 and 2 images, or 1 text and none."""
    if kind == "resnet":
        images = np.random.default_rng(0).integers(0, 255, (21, 32, 32, 3), np.uint8)
        name, data = "resnet_digits", [(x, f"class {i % 3}") for i, x in enumerate(images)]
        options = {"augment": None, "epochs": 1, **options}
    else:
        words = ["apple", "pear"]
        texts = [f"text {i} of the {words[i % 2]} " * (1 + i % 4) for i in range(17)]
        name, data = "bert_docs", [(x, words[i % 2]) for i, x in enumerate(texts)]
    options = {"epochs": 2, "batch_size": 8, **options}
    if (seed := options.pop("head", None)) is not None:  # drawn by each process for itself
        mx.random.seed(seed + int(os.environ.get("MLX_RANK", 0)))
        name = mlx_zoo.load(name, True, num_classes=3)
    mlx_zoo.finetune(name, data, data[:5], output=output, **options)


def main(kind, output, options):
    """`train` in a process of its own, which may be killed: {"die": [rank, before which step]}."""
    options = json.loads(options)
    rank, last = options.pop("die", (None, None))
    if os.environ.get("MLX_RANK") == str(rank):
        step, numbers = steps.Learner.step, itertools.count(1)

        def deadly(self, *args):
            if next(numbers) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args)

        steps.Learner.step = deadly
    try:
        train(kind, Path(output), **options)
    except (MLXZooError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(3)


def alone(kind, output, **options):
    train(kind, output, **options)
    return weights(output)


def launch(kind, output, **options):
    done = launching.launch(2, "-c", TRAIN, kind, output, json.dumps(options), env=environment())
    assert (output / "model").exists(), done.stdout + done.stderr
    return weights(output)


def crew(tmp_path, kind, output, *options):
    """Two processes as mlx.launch starts them, but nobody ends one if the other dies."""
    port, hosts = launching.free_port(), tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
    started = []
    for rank, own in enumerate(options):
        command = [sys.executable, "-c", TRAIN, kind, str(output), json.dumps(own)]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        place = environment(MLX_RANK=rank, MLX_HOSTFILE=hosts)
        started.append(subprocess.Popen(command, env=place, text=True, **pipes))
    try:
        return [(*process.communicate(timeout=120), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


def weights(output):
    return mx.load(str(output / "model" / "model.safetensors"))


def furthest(one, other, leave=()):
    """The largest difference, but for the parameters whose names end so."""
    assert one.keys() == other.keys()
    return max(
        mx.abs(one[name] - other[name]).max().item() for name in one if not name.endswith(leave)
    )


# Keys' biases have no influence on attention: their gradients are roundings, which AdamW blows up.
CASES = {
    "resnet adamw": ("resnet", {"optimizer": "adamw", "head": 5}, ()),
    "resnet last-2": ("resnet", {"optimizer": "sgd", "method": "last-2"}, ()),
    "bert sgd": ("bert", {"optimizer": "sgd", "accumulate": 2}, ()),
    "bert lora": ("bert", {"method": "lora"}, ("k_proj.bias",)),
}
LATER = ("resnet last-2", "bert lora")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in LATER else c for c in CASES]
)
def test_two_processes_train_as_one_does(case, tmp_path):
    kind, options, leave = CASES[case]
    one, two = alone(kind, tmp_path / "one", **options), launch(kind, tmp_path / "two", **options)
    assert furthest(one, two, leave) < 1e-5
    rows = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for a, b in zip(*(map(json.loads, lines) for lines in rows), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([*b.values()], [*a.values()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dying", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_that_dies_is_missed_and_the_work_goes_on(dying, tmp_path):
    options = {"optimizer": "sgd", "checkpoint_every": 1}
    wanted = alone("bert", tmp_path / "one", **options)
    out = tmp_path / "two"
    found = crew(tmp_path, "bert", out, *[{**options, "die": [dying, 4]}] * 2)
    assert found[dying][2] == -signal.SIGKILL
    said, _, status = found[1 - dying]
    assert "another process ended early" in said
    assert status == 3
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert furthest(wanted, launch("bert", out, **options)) < 1e-5


def test_processes_with_other_work_do_not_share_it(tmp_path):
    found = crew(tmp_path, "bert", tmp_path / "out", {"seed": 0}, {"seed": 1})
    assert all("do not have the same inputs" in said for said, _, _ in found), found
    assert not (tmp_path / "out").exists()


def test_a_batch_norm_without_examples_is_refused(tmp_path):
    """Statistics of the whole batch need every process: 21 examples in batches of 4 leave one."""
    found = crew(tmp_path, "resnet", tmp_path / "out", *[{"max_steps": 6, "batch_size": 4}] * 2)
    assert all("BatchNorm needs one in each" in said for said, _, _ in found), found
