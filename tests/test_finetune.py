"""The loop: optimisers, schedules, accumulation, precision, evaluation, and what comes out."""

from __future__ import annotations

import csv
import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import mlx_zoo
from mlx_zoo.backend.processes import Crew
from mlx_zoo.errors import CheckpointError, MLXZooError
from mlx_zoo.mapping import engine
from mlx_zoo.training import LoRA, load_adapter, optimizers, steps
from mlx_zoo.training.data import Batch
from mlx_zoo.training.objectives import objective_of
from mlx_zoo.training.optimizers import Optimizer, schedule
from mlx_zoo.training.run import Run, State
from mlx_zoo.training.steps import Learner, trainable_of
from mlx_zoo.training.trainable import choose, depth_of, no_decay, training_mode
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()

WORDS = ["apple", "pear"]
TEXTS = [(f"text {i} of the {WORDS[i % 2]} " * (1 + i % 4), WORDS[i % 2]) for i in range(24)]
PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3), np.uint8)
IMAGES = [(x, f"class {i % 3}") for i, x in enumerate(PIXELS)]
PROSE = ["The function returns the sum of its arguments, or None. " * 8] * 6


def bert(**options):
    return mlx_zoo.load(
        "bert_docs", True, task="text-classification", num_classes=2, dtype="float32", **options
    )


def learner(model, **options):
    own = {k: options.pop(k) for k in ("precision", "clip_norm", "batch_size") if k in options}
    optimizer = Optimizer(model, trainable_of(model), **options)
    return Learner(model, objective_of(model), optimizer, Crew(), **own)


def batch_of(texts, seed=0):
    rng = np.random.default_rng(seed)
    ids = mx.array(rng.integers(5, 1000, (texts, 12)))
    return Batch((ids, mx.ones((texts, 12), mx.int32)), mx.array(rng.integers(0, 2, texts)), texts)


# Optimisers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_are_those_of_torch_with_its_groups(kind):
    """Weight decay with its exclusions, layer-wise learning rates, clipping, other rates."""
    model = bert()
    choose(model, "full")
    own = trainable_of(model)
    optimizer = Optimizer(model, own, kind=kind, weight_decay=0.1, layer_decay=0.7)
    theirs = {n: torch.nn.Parameter(torch.tensor(np.array(x))) for n, x in own.items()}
    top = max(depth_of(name, model) for name in own)
    groups = [
        {
            "params": [theirs[name]],
            "weight_decay": 0.0 if no_decay(name, x, model) else 0.1,
            "scale": 0.7 ** (top - depth_of(name, model)),
        }
        for name, x in own.items()
    ]
    assert {g["weight_decay"] for g in groups} == {0.0, 0.1}
    assert len({g["scale"] for g in groups}) == 4  # embeddings, two blocks, head
    made = torch.optim.SGD(groups, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups)
    rng = np.random.default_rng(0)
    for rate in (1e-2, 3e-3, 0.0):
        gradients = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in own.items()}
        for name, x in gradients.items():
            theirs[name].grad = torch.tensor(x)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in made.param_groups:
            group["lr"] = rate * group["scale"]
        made.step()
        clipped, own_norm = steps.clip_grad_norm({n: mx.array(x) for n, x in gradients.items()}, 1)
        assert own_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        own = optimizer.updated(own, clipped, rate)
    for name, x in own.items():
        np.testing.assert_allclose(x, theirs[name].detach(), rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7, 0.1, 0.33])
def test_schedules_are_those_of_transformers(kind, warmup):
    from transformers import get_scheduler

    rising = int(warmup * 40) if isinstance(warmup, float) else warmup
    made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, made, num_warmup_steps=rising, num_training_steps=40)
    own = schedule(kind, warmup, 40)
    for step in range(40):
        assert own(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        made.step()
        theirs.step()


def test_pieces_of_any_sizes_are_the_whole_batch():
    """The mean is over all that counts: of next tokens, as many as a piece happens to have."""
    found = []
    for sizes in ([9], [4, 3, 2]):
        model = mlx_zoo.load("gpt2_docs", True, dtype="float32")
        rng, pieces = np.random.default_rng(0), []
        ids = rng.integers(0, 500, (9, 10))
        targets = np.where(rng.random((9, 10)) < 0.5, ids, -100)
        targets[:4, 2:] = -100
        for rows in np.split(np.arange(9), np.cumsum(sizes)[:-1]):
            pieces.append(Batch((mx.array(ids[rows]),), mx.array(targets[rows]), len(rows)))
        made = learner(model, kind="sgd", momentum=0.0)
        taken = made.step(pieces, 0.5, (0,))
        found.append((taken, made.parameters))
    (one, whole), (other, parts) = found
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    before = trainable_of(mlx_zoo.load("gpt2_docs", True, dtype="float32"))
    moved = max(mx.abs(whole[n] - before[n]).max().item() for n in whole)
    assert moved > 0.01
    assert max(mx.abs(whole[n] - parts[n]).max().item() for n in whole) < 1e-5


def test_chance_follows_from_the_seed_of_a_step():
    losses = []
    for seed in ((0, 1), (0, 1), (0, 2)):
        mx.random.seed(0)
        model = bert(dropout=0.5)
        training_mode(model)
        losses.append(learner(model).step([batch_of(4)], 0.0, seed).loss)
    assert losses[0] == losses[1] != losses[2]


# Precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_half_precision_has_float32_masters(kind, precision):
    found = {}
    for which in ("float32", precision):
        mx.random.seed(0)
        if kind == "bert":
            model, batch = bert(), batch_of(8)
        else:
            model = mlx_zoo.load("resnet_digits", True)
            images = mx.random.normal((8, 32, 32, 1))
            batch = Batch((images,), mx.arange(8), 8)
        training_mode(model)
        seen = []
        if kind == "resnet":
            model.fc = Spy(model.fc, seen)
        before = trainable_of(model)
        made = learner(model, kind="sgd", momentum=0.0, precision=which, batch_size=8)
        made.scale.value = min(made.scale.value, 256.0)
        taken = [made.step([batch], 1e-2, (i,)) for i in range(3)]
        assert not any(t.skipped for t in taken)
        kinds = {x.dtype for x in engine.parameters(model).values()}
        assert kinds == {mx.float32}
        if kind == "resnet":
            assert {*seen} == {getattr(mx, which)}
        moved = {n: np.array(x - before[n]) for n, x in made.parameters.items()}
        found[which] = (
            [t.loss for t in taken],
            np.concatenate([m.ravel() for m in moved.values()]),
        )
    (losses, moved), (low, low_moved) = found["float32"], found[precision]
    assert low != losses, "it was computed in half precision"
    np.testing.assert_allclose(low, losses, rtol=0.05)
    assert np.linalg.norm(low_moved - moved) < 0.35 * np.linalg.norm(moved)


class Spy(nn.Module):
    """A layer that keeps the type of what it is given."""

    def __init__(self, layer, seen):
        super().__init__()
        self.update_of = layer
        self.note = lambda x: seen.append(x.dtype)

    def __call__(self, x):
        self.note(x)
        return self.update_of(x)


def test_a_gradient_that_overflows_is_skipped_and_the_scale_halved():
    model = mlx_zoo.load("resnet_digits", True)
    training_mode(model)
    batch = Batch((mx.random.normal((8, 32, 32, 1)),), mx.arange(8), 8)
    made = learner(model, precision="float16", batch_size=8)
    made.scale.value = 2.0**40
    before, state = dict(engine.parameters(model)), dict(made.optimizer.state)
    assert made.step([batch], 1e-3, (0,)).skipped
    assert made.scale.value == 2.0**39
    after = engine.parameters(model)  # running statistics, too
    assert all(mx.array_equal(x, after[name]) for name, x in before.items())
    assert all(mx.array_equal(state[n], x) for n, x in made.optimizer.state.items())
    assert made.num_updates == 0
    made.scale.value = 2.0**8
    assert not made.step([batch], 1e-3, (1,)).skipped
    assert made.num_updates == 1
    after = engine.parameters(model)
    assert not any(mx.array_equal(before[n], after[n]) for n in ("fc.bias", "bn1.running_mean"))


def test_float32_is_not_scaled(monkeypatch):
    monkeypatch.setattr(steps, "GROWS_AFTER", 1)
    own = learner(bert(), kind="sgd")
    for step in range(2):
        own.step([batch_of(2)], 0.1, (0, step))
    assert own.scale.value == 1


def test_a_loss_scale_grows_back_and_gives_up():
    scale = steps.LossScale(8.0)
    for _ in range(steps.GROWS_AFTER):
        scale.passed()
    assert scale == steps.LossScale(16.0, 0)
    while scale.overflowed():
        pass
    assert scale.value < steps.SMALLEST_SCALE


# What is measured and kept ----------------------------------------------------------------------


def test_the_best_weights_are_kept_and_patience_ends_it(monkeypatch):
    """Scores that are made up: 0.2, 0.6, 0.5, 0.4 and no more."""
    scores, seen = iter([0.2, 0.6, 0.5, 0.4, 0.9]), []

    def scored(model, *args):
        seen.append(dict(engine.parameters(model)))
        return {"loss": 1.0, "accuracy": next(scores)}

    monkeypatch.setattr("mlx_zoo.training.run.evaluate", scored)
    result = mlx_zoo.finetune("resnet_digits", IMAGES, IMAGES, epochs=9, batch_size=12, patience=2)
    assert [row["val_accuracy"] for row in result.history if "val_accuracy" in row] == [
        *(0.2, 0.6, 0.5, 0.4)
    ]
    assert result.metrics == {"loss": 1.0, "accuracy": 0.6}
    own = engine.parameters(result.model)
    assert all(mx.array_equal(own[name], x) for name, x in seen[1].items())
    assert not all(mx.array_equal(own[name], x) for name, x in seen[3].items())


def test_a_loss_is_better_where_it_is_less():
    options = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
    result = mlx_zoo.finetune("bert_docs", TEXTS, 0.25, monitor="loss", **options)
    losses = [row["val_loss"] for row in result.history if "val_loss" in row]
    assert result.metrics["loss"] == min(losses)
    assert len({*losses}) == 3


def test_evaluation_counts_every_example_in_eval_mode():
    model = bert(dropout=0.9)
    result = mlx_zoo.finetune(
        model, TEXTS, TEXTS[:5], max_steps=1, batch_size=4, learning_rate=1e-9
    )
    run = mlx_zoo.pipeline("text-classification", result.model)
    right = [run(text)[0]["label"] == label for text, label in TEXTS[:5]]
    assert result.metrics["accuracy"] == pytest.approx(sum(right) / 5)


def test_it_learns_and_says_so(tmp_path, capsys):
    options = {"epochs": 6, "batch_size": 8, "learning_rate": 3e-3, "output": tmp_path / "out"}
    result = mlx_zoo.finetune("bert_docs", TEXTS, 0.25, **options)
    assert result.metrics["accuracy"] == 1.0
    assert result.history[-1]["loss"] < 0.1 < result.history[0]["loss"]
    assert "best evaluation" in str(result)
    assert "trained: full" in str(result)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err  # no bar where there is no terminal
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert rows == result.history
    with (tmp_path / "out" / "log.csv").open(newline="") as file:
        table = [*csv.DictReader(file)]
    assert [int(row["step"]) for row in table] == [row["step"] for row in rows]
    assert {*table[0]} == {*rows[-1]}
    assert table[0]["val_loss"] == ""
    assert (tmp_path / "out" / "curves.svg").read_text().startswith("<svg")


def test_what_is_frozen_does_not_move():
    model = mlx_zoo.load("resnet_digits", True, num_classes=3)
    before = dict(engine.parameters(model))
    result = mlx_zoo.finetune(model, IMAGES, method="head", epochs=1, learning_rate=0.1)
    after = engine.parameters(result.model)
    assert {name for name, x in before.items() if not mx.array_equal(x, after[name])} == {
        *("fc.weight", "fc.bias")
    }
    full = mlx_zoo.finetune(result.model, IMAGES, epochs=1, learning_rate=1e-2)
    moved = engine.parameters(full.model)
    assert not mx.array_equal(after["bn1.running_mean"], moved["bn1.running_mean"])


def test_others_random_numbers_stay_theirs():
    mx.random.seed(5)
    wanted = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(5)
    mlx_zoo.finetune("bert_docs", TEXTS, max_steps=1)
    assert mx.random.uniform(shape=(3,)).tolist() == wanted


def test_the_same_seed_gives_the_same_network():
    def trained(seed):
        result = mlx_zoo.finetune("resnet_digits", IMAGES, max_steps=2, batch_size=8, seed=seed)
        return engine.parameters(result.model)

    one, same, other = trained(1), trained(1), trained(2)
    assert all(mx.array_equal(one[name], same[name]) for name in one)
    assert not mx.array_equal(one["conv1.weight"], other["conv1.weight"])


# What comes out ---------------------------------------------------------------------------------


def same_network(one, other):
    own, its = engine.parameters(one), engine.parameters(other)
    return own.keys() == its.keys() and all(mx.array_equal(x, its[n]) for n, x in own.items())


def test_a_vision_model_is_its_own_checkpoint(tmp_path):
    out = tmp_path / "out"
    result = mlx_zoo.finetune("resnet_digits", IMAGES, 0.25, epochs=1, output=out)
    model, folder = result.model, f"local-dir:{out / 'model'}"
    assert not any(module.training for module in model.modules())
    again = mlx_zoo.load(folder, pretrained=True)
    assert same_network(model, again)
    for checkpoint in (model.checkpoint, again.checkpoint, mlx_zoo.info(folder)):
        assert checkpoint.name == "resnet_digits_finetuned"
        assert checkpoint.base_model == "resnet_digits"
        assert checkpoint.labels == ("class 0", "class 1", "class 2")
        assert checkpoint.config.num_classes == 3
        assert checkpoint.sha256 is checkpoint.evidence is checkpoint.reference is None
        assert not checkpoint.accuracy
    said = [mlx_zoo.pipeline("image-classification", m)(PIXELS[0]) for m in (model, folder)]
    assert said[0] == said[1]
    assert {answer["label"] for answer in said[0]} == {*model.checkpoint.labels}
    for network in (model, again):
        assert mlx_zoo.verify(network).passed  # test_trained.py has more of that
    mlx_zoo.export(model, tmp_path / "exported.safetensors")
    exported = mlx_zoo.load("resnet_digits", tmp_path / "exported.safetensors", num_classes=3)
    assert same_network(model, exported)
    mlx_zoo.convert(model, tmp_path / "copy")
    assert same_network(model, mlx_zoo.load(f"local-dir:{tmp_path / 'copy'}", pretrained=True))
    further = mlx_zoo.finetune(folder, IMAGES, max_steps=1)
    assert further.model.checkpoint.base_model == "resnet_digits"


def test_a_quantised_network_learns_by_adapters(tmp_path):
    model = mlx_zoo.load(
        "bert_docs", True, task="text-classification", num_classes=2, quantize={"group_size": 32}
    )
    with pytest.raises(ValueError, match="quantised"):
        mlx_zoo.finetune(model, TEXTS, max_steps=1)
    result = mlx_zoo.finetune(model, TEXTS, method="lora", epochs=1, output=tmp_path / "out")
    assert (tmp_path / "out" / "adapter").is_dir()
    assert not (tmp_path / "out" / "model").exists()
    assert result.trainable.percent < 20


def test_adapters_are_saved_beside_the_merged_network(tmp_path):
    out = tmp_path / "out"
    result = mlx_zoo.finetune(
        "bert_docs", TEXTS, method=LoRA(rank=4), epochs=1, output=out, learning_rate=1e-2
    )
    texts = [text for text, _ in TEXTS[:6]]

    def scores(model):
        said = mlx_zoo.pipeline("text-classification", model)(texts)
        return [answer["score"] for answer in said], [answer["label"] for answer in said]

    wanted = scores(result.model)
    merged = mlx_zoo.load(f"local-dir:{out / 'model'}", True, task="text-classification")
    for other in (merged, load_adapter("bert_docs", out / "adapter")):
        found = scores(other)
        assert found[1] == wanted[1]
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    assert any(name.endswith("lora_a.weight") for name in engine.parameters(result.model))
    base = json.loads((out / "adapter" / "adapter.json").read_text())["base"]
    assert base["name"] == "bert_docs"


def test_a_network_of_random_weights_is_saved_too(tmp_path):
    out = tmp_path / "out"
    model = mlx_zoo.load("vit_digits", num_classes=3)
    result = mlx_zoo.finetune(model, IMAGES, max_steps=2, output=out)
    again = mlx_zoo.load(f"local-dir:{out / 'model'}", pretrained=True)
    assert same_network(result.model, again)
    assert again.checkpoint.name == "vit_digits_finetuned"
    assert again.checkpoint.base_model is None
    run = mlx_zoo.pipeline("image-classification", result.model)
    assert run(PIXELS[0]) == mlx_zoo.pipeline("image-classification", again)(PIXELS[0])


def test_a_language_model_learns_a_text(tmp_path):
    options = {"epochs": 3, "batch_size": 2, "max_length": 32, "learning_rate": 3e-3}
    result = mlx_zoo.finetune("gpt2_docs", PROSE, PROSE[:1], **options, output=tmp_path / "out")
    assert result.metrics["perplexity"] < 3
    again = mlx_zoo.load(f"local-dir:{tmp_path / 'out' / 'model'}", pretrained=True)
    said = "".join(t.text for t in mlx_zoo.generate(again, "The function", max_tokens=8))
    assert "return" in said


def test_running_text_is_for_bert_to_fill():
    result = mlx_zoo.finetune("bert_docs", PROSE, PROSE[:1], max_steps=2, max_length=32)
    assert result.model.config.task == "fill-mask"
    assert result.metrics.keys() >= {"perplexity"}


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "lion"}, "adamw, sgd"),
        ({"schedule": "sawtooth"}, "cosine, linear, constant"),
        ({"precision": "int8"}, "float32, bfloat16, float16"),
        ({"method": "tail"}, "full, head, last-N"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"accumulate": True}, "accumulate=True"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"momentum": 1}, "momentum=1"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"warmup": -3}, "warmup=-3"),
        ({"layer_decay": 0}, "layer_decay=0"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"seed": None}, "seed=None"),
        ({"patience": 2}, "give val_data"),
        ({"evaluate_every": 2}, "give val_data"),
        ({"val_data": 0.25, "monitor": "beauty"}, "loss, accuracy"),
        ({"val_data": 1.5}, "between 0 and 1"),
        ({"mixup": -1}, "mixup=-1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ],
)
def test_wrong_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        mlx_zoo.finetune("resnet_digits", IMAGES, **options)


def test_a_head_for_other_classes_is_refused():
    model = mlx_zoo.load("resnet_digits", True, num_classes=4)
    with pytest.raises(ValueError, match="load it with num_classes=3"):
        mlx_zoo.finetune(model, IMAGES)


def test_a_head_of_as_many_other_classes_is_made_afresh():
    topics = mlx_zoo.info("bert_docs_topic").labels
    data = [(f"text {i}", f"{topics[i % len(topics)]}?") for i in range(12)]
    fresh = mlx_zoo.finetune("bert_docs_topic", data, max_steps=1, learning_rate=1e-9).model
    own = [(f"text {i}", topics[i % len(topics)]) for i in range(12)]
    kept = mlx_zoo.finetune("bert_docs_topic", own, max_steps=1, learning_rate=1e-9).model
    published = mlx_zoo.load("bert_docs_topic", True, task="text-classification", dtype="float32")
    head = {n: x for n, x in engine.parameters(published).items() if n.startswith("classifier")}
    head = head or {n: x for n, x in engine.parameters(published).items() if "head" in n}
    assert head
    for name, x in head.items():
        assert mx.allclose(engine.parameters(kept)[name], x, atol=1e-6)
    assert not all(mx.allclose(engine.parameters(fresh)[name], x) for name, x in head.items())


def test_a_network_for_inference_is_refused():
    fast = mlx_zoo.optimize_for_inference(mlx_zoo.load("resnet_digits", True, num_classes=3))
    with pytest.raises(ValueError, match=r"train its \.original"):
        mlx_zoo.finetune(fast, IMAGES)


def test_a_stream_needs_a_number_of_steps():
    with pytest.raises(ValueError, match="max_steps is needed"):
        mlx_zoo.finetune(mlx_zoo.load("resnet_digits", True, num_classes=3), Stream())
    model = mlx_zoo.load("resnet_digits", True, num_classes=3)
    result = mlx_zoo.finetune(model, Stream(), max_steps=4, epochs=2, batch_size=10)
    assert [row["epoch"] for row in result.history] == [0, 0, 1, 1]


class Stream:
    """Examples one after the other, again and again; nobody knows how many."""

    def __iter__(self):
        yield from ((x, i % 3) for i, x in enumerate(PIXELS))


def test_a_loss_that_is_no_number_says_what_to_do():
    model = bert()
    with pytest.raises(MLXZooError, match=r"step \d: the (loss|norm).*lower learning_rate"):
        mlx_zoo.finetune(
            model, TEXTS, learning_rate=1e30, clip_norm=None, optimizer="sgd", warmup=0
        )
    assert not model.training


def test_half_precision_weights_become_float32(caplog):
    caplog.set_level("INFO", logger="mlx_zoo")
    model = mlx_zoo.load("bert_docs", True, task="text-classification", num_classes=2)
    assert model.pooler.weight.dtype == mx.float16
    result = mlx_zoo.finetune(model, TEXTS, max_steps=1)
    assert {x.dtype for _, x in tree_flatten(result.model.parameters())} == {mx.float32}
    assert "the weights were float16 and are float32 now" in caplog.text


def test_learning_rates_that_nobody_said():
    assert optimizers.default_learning_rate("adamw", "full", 10**6) == 1e-4
    assert optimizers.default_learning_rate("adamw", "last-2", 10**8) == 1e-4
    assert optimizers.default_learning_rate("adamw", LoRA(), 10**8) == 1e-3
    assert optimizers.default_learning_rate("sgd", "head", 10**8) == 0.1
    assert optimizers.default_learning_rate("adamw", "full", 10**6 - 1) == 1e-3
    assert optimizers.default_learning_rate("sgd", "full", 10**5) == 1e-2


def test_a_last_batch_of_one_is_refused_before_the_first_step(monkeypatch):
    """Of one image of 32 px the last norms of that network have one value of each channel."""
    monkeypatch.setattr(Learner, "step", None)  # no step is taken
    model = mlx_zoo.load("resnet_digits", True, num_classes=3)
    before = dict(tree_flatten(model.parameters()))
    with pytest.raises(
        ValueError, match=r"24 examples in batches of 23 leave 1.*another batch_size"
    ):
        mlx_zoo.finetune(model, IMAGES, batch_size=23, epochs=1)
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(x, after[name]).item() for name, x in before.items())


def test_a_last_batch_of_one_that_is_not_reached_or_not_taken_by_a_norm_is_none():
    for options in ({"max_steps": 1}, {"method": "head"}):
        model = mlx_zoo.load("resnet_digits", True, num_classes=3)
        mlx_zoo.finetune(model, IMAGES, batch_size=23, epochs=1, **options)


def test_examples_that_can_be_read_only_once():
    """An epoch without any would never end; what is evaluated is read again and again."""

    class Once:
        def __init__(self):
            self.items = iter([(x, i % 3) for i, x in enumerate(PIXELS)])

        def __iter__(self):
            return self.items

    model = mlx_zoo.load("resnet_digits", True, num_classes=3)
    with pytest.raises(ValueError, match="epoch 2: there are no examples"):
        mlx_zoo.finetune(model, Once(), max_steps=5, epochs=2, batch_size=12, task=None)
    with pytest.raises(ValueError, match="val_data: each evaluation reads it"):
        mlx_zoo.finetune(model, [(x, i % 3) for i, x in enumerate(PIXELS)], iter(IMAGES))


def test_a_metric_that_is_no_number_is_not_the_best_for_good():
    run = object.__new__(Run)
    run.metric, run.objective = "loss", objective_of(bert())
    run.state = State(best_metrics={"loss": math.nan})
    assert run._is_better({"loss": 2.0})
    assert not run._is_better({"loss": math.nan})


def test_images_of_random_weights_are_prepared_as_of_published_ones(caplog):
    model = mlx_zoo.load("resnet_digits", num_classes=3)
    published = mlx_zoo.load("resnet_digits", True).checkpoint.preprocessing
    result = mlx_zoo.finetune(model, IMAGES, max_steps=1)
    assert result.model.checkpoint.preprocessing == published
    assert "random weights do not say how images are prepared: they are as resnet_digits" in (
        caplog.text
    )


def test_a_name_without_weights_is_refused():
    with pytest.raises((CheckpointError, MLXZooError)):
        mlx_zoo.finetune("resnet_digits_of_nobody", IMAGES)
