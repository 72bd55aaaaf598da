"""Row 41: every way to give a text network tokens that it does not have; one line for each.

Run in a process of its own: a gather that reads past the end of its table may end it.
"""

from __future__ import annotations

import json
from functools import partial

import mlx_zoo  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np

from mlx_zoo.tasks.generation import generate_batch

bert, gpt2 = mlx_zoo.load("bert_docs", True), mlx_zoo.load("gpt2_docs", True)
choices = mlx_zoo.load("bert_docs", True, task="multiple-choice", num_classes=1)
embedding = mlx_zoo.load("bert_docs", True, task="sentence-embedding")
V = {"bert": bert.config.vocab_size, "gpt2": gpt2.config.vocab_size}
P = {"bert": bert.config.max_positions, "gpt2": gpt2.config.max_positions}
ok = mx.array([[1, 2, 3]])


def filled():
    cache = gpt2.make_cache()
    gpt2(ok, cache=cache)
    return cache


def ints(*shape):
    return mx.zeros(shape, mx.int32)


def u64(number):
    return mx.array(np.array([[number]], np.uint64))


def of(name):
    """What is no batch of tokens for the network of that name."""
    size, positions = V[name], P[name]
    return {
        "the size": [[size]],
        "a million": [[10**6]],
        "2**31": [[2**31]],
        "2**31 - 1": [[2**31 - 1]],
        "2**32 + 1": [[2**32 + 1]],
        "2**63 - 1": [[2**63 - 1]],
        "2**63, uint64": u64(2**63 + 5),
        "2**64 - 1, uint64": u64(2**64 - 1),
        "2**64": [[2**64]],
        "10**30": [[10**30]],
        "minus 1": [[-1]],
        "minus 2**31": [[-(2**31)]],
        "one of many": [[1] * 9 + [size]],
        "in the second row": [[1, 1], [1, size]],
        "int16": mx.array([[-3]], mx.int16),
        "floats": mx.zeros((1, 3)),
        "bools": mx.zeros((1, 3), mx.bool_),
        "complex": mx.zeros((1, 3), mx.complex64),
        "too long": ints(1, positions + 1),
        "far too long": ints(1, 50 * positions),
        "no rows": ints(0, 3),
        "no tokens": ints(2, 0),
        "nothing": ints(0, 0),
        "[]": [],
        "[[]]": [[]],
        "one row": [1, 2],
        "a number": 3,
        "three axes": [[[1]]],
        "text": "hello",
        "texts": [["hello"]],
        "None": None,
        "ragged": [[1, 2], [3]],
        "objects": np.array([[None]]),
    }


calls = {}
for name, model in (("bert", bert), ("gpt2", gpt2)):
    for what, ids in of(name).items():
        for function in ("__call__", "encode"):
            calls[f"{name}.{function}, {what}"] = partial(getattr(model, function), ids)
    for what, mask in {
        "longer": mx.ones((1, 4)),
        "of rank 1": mx.ones(3),
        "of more rows": mx.ones((2, 3)),
        "of rank 4": mx.ones((1, 1, 1, 3)),
        "text": "x",
        "ragged": [[1], [1, 1]],
    }.items():
        for function in ("__call__", "encode"):
            calls[f"{name}.{function}, mask {what}"] = partial(getattr(model, function), ok, mask)
for what, kinds in {
    "2": [[0, 1, 2]],
    "minus 1": [[0, -1, 0]],
    "a million": [[0, 10**6, 0]],
    "short": [[0, 0]],
    "floats": mx.zeros((1, 3)),
    "text": "x",
}.items():
    calls[f"bert, token types {what}"] = partial(bert, ok, None, kinds)
for what, ids in of("bert").items():
    if what != "three axes":
        calls[f"choices, {what}"] = partial(choices, ids)
    calls[f"embedding, {what}"] = partial(embedding, ids)
calls["choices, an id"] = lambda: choices([[[V["bert"]]]])
for what, ids in of("gpt2").items():
    calls[f"with a cache, {what}"] = lambda i=ids: gpt2(i, cache=filled())
    if what not in ("text", "one row"):  # which are prompts
        calls[f"generate, {what}"] = lambda i=ids: next(mlx_zoo.generate(gpt2, i))
    rows = ids.tolist() if isinstance(ids, mx.array) else ids
    if what not in ("text", "texts", "ragged", "floats", "complex", "bools"):
        calls[f"generate_batch, {what}"] = partial(generate_batch, gpt2, rows, max_tokens=2)
for what, ids in {
    "the size": [V["gpt2"]],
    "minus 1": [-1],
    "floats": [1.5],
    "bools": [True],
    "nested": [[1]],
    "10**30": [10**30],
    "too long": [1] * (P["gpt2"] + 1),
}.items():
    calls[f"generate of ids, {what}"] = lambda i=ids: next(mlx_zoo.generate(gpt2, i))
    calls[f"generate_batch of ids, {what}"] = lambda i=ids: generate_batch(gpt2, [[1], i])
calls["a cache, too long"] = lambda: gpt2(mx.zeros((1, P["gpt2"] - 2), mx.int32), cache=filled())
calls["a cache, of other rows"] = lambda: gpt2([[1], [2]], cache=filled())
calls["a cache, a mask of all"] = lambda: gpt2([[1]], mx.ones((1, 4)), cache=filled())
calls["a cache that is none"] = lambda: gpt2([[1]], cache="x")
calls["a long prompt"] = lambda: next(mlx_zoo.generate(gpt2, "the " * 3000))
calls["no room"] = lambda: next(mlx_zoo.generate(gpt2, [1] * 200, max_tokens=100))
calls["generate None"] = lambda: next(mlx_zoo.generate(gpt2, None))

texts = {
    "fill-mask": "bert_docs",
    "sentence-embedding": "bert_docs",
    "text-classification": "bert_docs_topic",
    "token-classification": "bert_docs_code",
    "text-generation": "gpt2_docs",
}
for task, name in texts.items():
    ask = mlx_zoo.pipeline(task, name)
    for what, text in {
        "None": None,
        "a number": 3,
        "bytes": b"x",
        "half a pair": "\ud800",
        "a nested list": [["x"]],
        "a list of None": [None],
    }.items():
        calls[f"{task}, {what}"] = lambda a=ask, t=text: a(t)
    long = "the function returns a list " * 400
    if task in ("fill-mask", "text-classification", "text-generation"):
        calls[f"{task}, too long"] = lambda a=ask, t=long, m=ask.tokenizer.mask_token: a(
            t + (m or "")
        )
calls["fill-mask, no mask"] = lambda: mlx_zoo.pipeline("fill-mask", "bert_docs")("")
ask = mlx_zoo.pipeline("question-answering", "bert_docs_qa")
for what, said in {
    "text": "x",
    "no context": {"question": "x"},
    "an empty question": {"question": "", "context": "x"},
    "an empty context": {"question": "x", "context": ""},
    "None": {"question": None, "context": "x"},
    "a long question": {"question": long, "context": "x"},
}.items():
    calls[f"question-answering, {what}"] = lambda s=said: ask(s)
calls["no sentences"] = lambda: mlx_zoo.pipeline("sentence-embedding", "bert_docs")([])

for name, call in calls.items():
    print("started", name, flush=True)
    try:
        found = call()
        mx.eval(
            [x for x in (found if isinstance(found, tuple) else [found]) if isinstance(x, mx.array)]
        )
        print(json.dumps(["accepted", ""]), flush=True)
    except BaseException as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
