"""Losses against PyTorch's, metrics against scikit-learn's and counted by hand, and the curves."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import mlx_zoo  # isort: skip  # before mlx.core
import mlx.core as mx
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score

from mlx_zoo.training.augmentation import soft_labels
from mlx_zoo.training.curves import POINTS, curves_svg, points, ticks, write_curves
from mlx_zoo.training.losses import IGNORED, cross_entropy
from mlx_zoo.training.metrics import Classes, Tags, Tokens, entities
from mlx_zoo.training.objectives import objective_of

rng = np.random.default_rng(0)


def with_gradient(logits, targets):
    """(mean loss, its gradient) of ours."""

    def mean(x):
        total, count = cross_entropy(x, mx.array(targets))
        return total / count

    value, gradient = mx.value_and_grad(mean)(mx.array(logits))
    return value.item(), np.array(gradient)


def pytorchs(logits, targets, **options):
    """The same of PyTorch's, in float64; classes are its second axis."""
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(targets, dtype=torch.float64 if targets.dtype.kind == "f" else torch.int64)
    moved = x.movedim(-1, 1)
    loss = torch.nn.functional.cross_entropy(moved, y, **options)
    loss.backward()
    return loss.item(), x.grad.numpy()


def check(ours, theirs):
    assert abs(ours[0] - theirs[0]) < 1e-6 * max(1, abs(theirs[0]))
    assert np.abs(ours[1] - theirs[1]).max() < 1e-7


@pytest.mark.parametrize("scale", [1, 50])
def test_the_loss_of_class_ids_is_pytorchs(scale):
    logits = scale * rng.normal(size=(9, 12)).astype(np.float32)
    ids = rng.integers(0, 12, 9).astype(np.int32)
    check(with_gradient(logits, ids), pytorchs(logits, ids))


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_pytorchs(smoothing):
    logits = 3 * rng.normal(size=(9, 12)).astype(np.float32)
    ids = rng.integers(0, 12, 9).astype(np.int32)
    ours = with_gradient(logits, soft_labels(ids, 12, smoothing))
    check(ours, pytorchs(logits, ids, label_smoothing=smoothing))


def test_the_loss_of_mixed_labels_is_pytorchs():
    logits = 3 * rng.normal(size=(9, 12)).astype(np.float32)
    soft = rng.dirichlet(np.ones(12), 9).astype(np.float32)
    check(with_gradient(logits, soft), pytorchs(logits, soft))


def test_the_loss_of_tokens_leaves_out_what_is_not_asked():
    logits = 3 * rng.normal(size=(3, 7, 12)).astype(np.float32)
    ids = rng.integers(0, 12, (3, 7)).astype(np.int32)
    ids[:, ::2] = IGNORED
    check(with_gradient(logits, ids), pytorchs(logits, ids))
    total, count = cross_entropy(mx.array(logits), mx.full((3, 7), IGNORED))
    assert (total.item(), count.item()) == (0, 0)


def test_the_sums_of_parts_add_up_and_half_precision_is_summed_in_float32():
    logits, ids = mx.random.normal((64, 12)) * 3, mx.array(rng.integers(0, 12, 64))
    whole, count = cross_entropy(logits, ids)
    parts = [cross_entropy(logits[i::3], ids[i::3]) for i in range(3)]
    assert abs(sum(total.item() for total, _ in parts) - whole.item()) < 1e-4
    assert sum(n.item() for _, n in parts) == count.item() == 64
    for dtype in (mx.float16, mx.bfloat16):
        total, _ = cross_entropy(logits.astype(dtype), ids)
        exact, _ = cross_entropy(logits.astype(dtype).astype(mx.float32), ids)
        assert total.dtype == mx.float32
        assert total.item() == exact.item()


def test_each_head_has_its_objective():
    monitors = {}
    for name, task in (
        ("resnet_digits", None),
        ("vit_digits", None),
        ("bert_docs_topic", "text-classification"),
        ("bert_docs_code", "token-classification"),
        ("gpt2_docs", None),
        ("bert_docs", "fill-mask"),
    ):
        objective = objective_of(mlx_zoo.load(name, pretrained=True, task=task))
        monitors[objective.task] = objective.monitor
        metric, better = objective.monitor
        assert metric in objective.metrics().values()
        assert objective.direction(metric) == better
    assert monitors == {
        "image-classification": ("accuracy", "max"),
        "text-classification": ("accuracy", "max"),
        "token-classification": ("f1", "max"),
        "text-generation": ("perplexity", "min"),
        "fill-mask": ("perplexity", "min"),
    }
    for options, message in (
        ({"name": "bert_docs_qa", "task": "question-answering"}, "a head for question-answering"),
        ({"name": "bert_docs"}, "load it with task="),
        ({"name": "resnet_digits", "num_classes": 0}, "load it with num_classes="),
    ):
        with pytest.raises(ValueError, match=message):
            objective_of(mlx_zoo.load(pretrained=True, **options))


# Metrics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 8])
def test_metrics_of_classes_are_scikit_learns(num_classes):
    logits = rng.normal(size=(90, num_classes)).astype(np.float32)
    ids = rng.integers(0, num_classes, 90)
    logits[np.arange(90), ids] += 1
    ids[ids == 1] = 0  # a class that is given and never asked for
    metrics, part = Classes(num_classes), Classes(num_classes)
    metrics.update(mx.array(logits[:50]), mx.array(ids[:50]))
    part.update(mx.array(logits[50:]), mx.array(ids[50:]))
    metrics.merge(part.sums)
    values, said = metrics.values(), logits.argmax(axis=1)
    assert math.isclose(values["accuracy"], accuracy_score(ids, said))
    assert math.isclose(values["f1"], f1_score(ids, said, average="macro"))
    assert math.isclose(values["loss"], pytorchs(logits, ids)[0], rel_tol=1e-6)
    if num_classes > 5:
        labels = range(num_classes)
        assert math.isclose(values["top5"], top_k_accuracy_score(ids, logits, k=5, labels=labels))
    else:
        assert "top5" not in values


def test_equal_scores_are_no_answer():
    """A network that always says the same is not in the top 5 for every class."""
    metrics = Classes(10)
    metrics.update(mx.zeros((10, 10)), mx.arange(10))
    assert metrics.values()["top5"] == 0.5
    assert metrics.values()["accuracy"] == 0.1


def test_metrics_of_soft_labels_take_the_largest():
    logits, soft = mx.eye(4) * 9, mx.array(soft_labels(np.array([0, 1, 2, 0]), 4, 0.2))
    metrics = Classes(4)
    metrics.update(logits, soft)
    assert metrics.values()["accuracy"] == 0.75


def test_perplexity_is_over_all_tokens_not_over_batches():
    metrics, losses = Tokens(), []
    for count in (2, 9):
        logits = rng.normal(size=(1, 10, 7)).astype(np.float32)
        ids = rng.integers(0, 7, (1, 10))
        ids[:, count:] = IGNORED
        metrics.update(mx.array(logits), mx.array(ids))
        losses += (
            (-torch.log_softmax(torch.tensor(logits[0, :count]), -1))
            .numpy()[np.arange(count), ids[0, :count]]
            .tolist()
        )
    assert math.isclose(metrics.values()["perplexity"], math.exp(np.mean(losses)), rel_tol=1e-5)
    assert 0 <= metrics.values()["accuracy"] <= 1
    metrics.sums[0] = 1e6
    assert metrics.values()["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("O B-A I-A O", {("A", 1, 2)}),
        ("B-A B-A I-A", {("A", 0, 0), ("A", 1, 2)}),
        ("I-A I-A O I-B", {("A", 0, 1), ("B", 3, 3)}),  # one that begins without a B-
        ("B-A I-B I-B", {("A", 0, 0), ("B", 1, 2)}),
        ("B-A O I-A", {("A", 0, 0), ("A", 2, 2)}),
        ("B-A-x I-A-x", {("A-x", 0, 1)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_of_tags(tags, wanted):
    assert entities(tags.split()) == wanted


def test_metrics_of_entities():
    labels = ("O", "B-A", "I-A", "B-B", "I-B")
    asked = [[0, 1, 2, IGNORED, 0, 3], [1, IGNORED, 2, 0, IGNORED, IGNORED]]
    said = [[0, 1, 2, 4, 0, 1], [1, 0, 2, 0, 3, 3]]  # what is not asked does not count
    metrics = Tags(labels)
    metrics.update(9 * mx.eye(5)[mx.array(said)], mx.array(asked))
    values = metrics.values()
    assert values["accuracy"] == 7 / 8
    # Asked: A, B; A. Said: A, A; A.
    assert values["precision"] == values["recall"] == values["f1"] == 2 / 3
    plain = Tags(("NOUN", "VERB"))
    plain.update(9 * mx.eye(2)[mx.array([[0, 1, 1]])], mx.array([[0, 0, 1]]))
    assert "precision" not in plain.values()
    assert math.isclose(plain.values()["f1"], f1_score([0, 0, 1], [0, 1, 1], average="macro"))


def test_nothing_counted_is_no_number_and_no_error():
    for metrics in (Classes(7), Tokens(), Tags(("O", "B-A"))):
        assert math.isnan(metrics.values()["loss"])
    metrics = Tags(("O", "B-A"))
    metrics.update(mx.zeros((1, 2, 2)), mx.full((1, 2), IGNORED))
    assert math.isnan(metrics.values()["accuracy"])


# Curves -----------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def history(count, every):
    return [
        {
            "step": step,
            "loss": 3 / step,
            "learning_rate": 1e-3,
            **({"val_loss": 4 / step, "val_accuracy": 1 - 1 / step} if step % every == 0 else {}),
        }
        for step in range(1, count + 1)
    ]


def test_curves_show_what_was_measured_and_nothing_else(tmp_path):
    write_curves(history(30, 10), tmp_path / "curves.svg")
    root = ElementTree.fromstring((tmp_path / "curves.svg").read_text(encoding="utf-8"))
    said = [text.text for text in root.iter(f"{SVG}text")]
    for title in ("loss", "training", "validation", "accuracy", "learning rate"):
        assert title in said
    dots = [dot.get("class") for dot in root.iter(f"{SVG}circle")]
    assert dots == ["val"] * 6  # three evaluations of two values
    alone = ElementTree.fromstring(curves_svg([{"step": 1, "loss": math.nan, "val_loss": None}]))
    assert not [*alone.iter(f"{SVG}circle")]
    svg = curves_svg(history(3, 1), "<script>")
    assert "<script" not in svg
    assert "prefers-color-scheme" in svg


def test_lower_losses_are_drawn_lower():
    root = ElementTree.fromstring(curves_svg(history(30, 10)))
    path = next(p for p in root.iter(f"{SVG}path") if p.get("class") == "train")
    places = [[float(x) for x in point.split()] for point in path.get("d")[1:].split("L")]
    assert len(places) == 30
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(places))


def test_long_runs_are_drawn_by_means():
    found = points([{"step": i, "loss": float(i % 2)} for i in range(10 * POINTS)], "loss")
    assert len(found) <= POINTS
    assert {value for _, value in found} == {0.5}


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.1, 0.1), (0, 0), (-3, 17), (1e-5, 3e-4), (99.98, 99.99), (5, 1e6)]
)
def test_marks_hold_all_values_and_are_few(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 7
