"""The small trained networks that ship with the package: what is said of them, and every task."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.describe import DATA, path_of
from mlx_zoo.errors import VerificationError
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.verify import reference

reference.import_torchvision()
import transformers  # noqa: E402

BUNDLED = {c.name: c for c in registry.checkpoints().values() if c.source.startswith("package:")}
TEXTS = [
    "Return the sum of the elements along the given axis.",
    "A graph is a set of nodes and edges.",
    "Raise ValueError if the tensor is not on the same device as the module.",
]
CONTEXT = (
    "x (array_like): The values to be sorted. axis (int): The axis to sum over. "
    "copy (bool): Whether to copy the data."
)


def test_every_family_has_one():
    assert {c.architecture for c in BUNDLED.values()} == set(registry.architectures())


@pytest.mark.parametrize("name", BUNDLED)
def test_files_are_small_and_as_described(name):
    path = path_of(BUNDLED[name].source)
    if path.is_file():
        facts = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
        files = {file: DATA / file for file in facts["sha256"]}
    else:
        facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
        files = {file: path / file for file in facts["sha256"]}
    for file, where in files.items():
        assert where.stat().st_size < 500_000, file
        assert hashlib.sha256(where.read_bytes()).hexdigest() == facts["sha256"][file], file
    script = facts["script"] if "script" in facts else facts["training"]["script"]
    assert (DATA.parent.parent / "training_scripts" / script.rpartition("/")[2]).is_file()


@pytest.mark.parametrize("name", BUNDLED)
def test_each_is_its_original(name):
    task = BUNDLED[name].task if BUNDLED[name].architecture in ("bert", "gpt2") else None
    report = mlx_zoo.verify(name, task=task, dtype="float32")
    assert report.passed, report.reason
    assert report.max_abs < 1e-4


@pytest.mark.parametrize("name", BUNDLED)
def test_stored_outputs_are_evidence_without_torch(name, monkeypatch):
    monkeypatch.setattr(reference, "is_installed", lambda library: False)
    task = BUNDLED[name].task if BUNDLED[name].architecture in ("bert", "gpt2") else None
    report = mlx_zoo.verify(name, task=task, dtype="float32")
    assert report.passed, report.reason
    assert "stored outputs" in report.evidence
    model = mlx_zoo.load(name, pretrained=True, task=task, dtype="float32")
    changed = model.norm if "norm" in model else model.bn1
    changed.bias = changed.bias + 0.01
    assert not mlx_zoo.verify(model).passed


def test_nothing_is_stored_for_another_head(monkeypatch):
    monkeypatch.setattr(reference, "is_installed", lambda library: False)
    with pytest.raises(VerificationError, match="another head, this network has none"):
        mlx_zoo.verify("bert_docs_topic")


@pytest.mark.parametrize("name", ["resnet_digits", "vit_digits", "efficientnet_digits"])
def test_digits_are_read_as_well_as_it_says(name):
    held_out = read_state_dict([DATA / "digits.safetensors"])
    images, labels = np.array(held_out["images"]), np.array(held_out["labels"])
    answers = mlx_zoo.pipeline("image-classification", name)(list(images), top_k=1)
    right = sum(int(best["label"]) == label for (best,), label in zip(answers, labels, strict=True))
    assert 100 * right / len(labels) == pytest.approx(BUNDLED[name].accuracy["acc1"])
    vectors = mlx_zoo.pipeline("image-feature-extraction", name)(list(images[:3]))
    assert vectors.shape[0] == 3
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2


# Against transformers' pipelines on the same files ------------------------------------------------


def theirs(task, name):
    folder = str(path_of(BUNDLED[name].source))
    return transformers.pipeline(task, folder, dtype="float32", device="cpu")


def same(ours, wanted):
    """Equal but for scores, which are to 1e-4."""
    if isinstance(wanted, list):
        assert len(ours) == len(wanted)
        for a, b in zip(ours, wanted, strict=True):
            same(a, b)
    elif isinstance(wanted, dict):
        assert ours.keys() == wanted.keys()
        for key, value in wanted.items():
            same(ours[key], value)
    elif isinstance(wanted, float | np.floating):
        assert ours == pytest.approx(float(wanted), abs=1e-4)
    else:
        assert ours == wanted


@pytest.mark.parametrize(
    ("task", "name", "texts", "options"),
    [
        ("fill-mask", "bert_docs", [t.replace("the ", "[MASK] ", 1) for t in TEXTS[::2]], {}),
        ("text-classification", "bert_docs_topic", TEXTS, {"top_k": 3}),
        ("token-classification", "bert_docs_code", TEXTS, {"aggregation_strategy": "first"}),
        ("token-classification", "bert_docs_code", TEXTS, {"aggregation_strategy": "simple"}),
    ],
)
def test_answers_are_those_of_transformers(task, name, texts, options):
    same(
        mlx_zoo.pipeline(task, name, dtype="float32")(texts, **options),
        theirs(task, name)(texts, **options),
    )


def test_texts_are_those_of_transformers():
    wanted = theirs("text-generation", "gpt2_docs")(TEXTS, do_sample=False, max_new_tokens=200)
    ours = mlx_zoo.pipeline("text-generation", "gpt2_docs", dtype="float32")
    assert ours(TEXTS, max_tokens=200) == wanted
    assert [ours(text, max_tokens=200) for text in TEXTS] == wanted


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("What is the type of x?", "array_like"),
        ("What is the type of axis?", "int"),
        ("What does axis do?", "The axis to sum over."),
        ("What does copy do?", "Whether to copy the data."),
    ],
)
def test_questions_are_answered(question, wanted):
    ask = mlx_zoo.pipeline("question-answering", "bert_docs_qa", dtype="float32")
    answer = ask(question=question, context=CONTEXT)
    assert answer["answer"] == CONTEXT[answer["start"] : answer["end"]] == wanted


def test_sentences_are_embedded():
    embed = mlx_zoo.pipeline("sentence-embedding", "bert_docs")
    near, also, far = embed(
        ["Return the sum of the axis.", "Return the sum of an axis.", "a graph"]
    )
    assert near @ also > near @ far + 0.05
