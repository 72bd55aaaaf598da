"""Any kind of data as examples: from the disk, from sequences, from what can only be iterated."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mlx_zoo.training.examples import (
    LANGUAGE,
    TASKS,
    Examples,
    Stream,
    check_example,
    digest_of,
    examples_of,
    input_and_target,
    task_of,
)
from mlx_zoo.training.files import of_path


def read(data: Any, task: str | None = None) -> Examples | Stream:
    """Any kind of data as examples.

    Args:
        data: a folder with a folder of images for each class; a .csv, .tsv or .jsonl file with
            columns text[, text_pair], label, or image, label (a path, from the table's folder), of
            token classification {"tokens": [...], "tags": [...]}; a .txt file, or a folder of them;
            a tuple (inputs, labels); a sequence of (input, label), dicts with the names of such
            columns, or texts; or any other iterable of these, which is streamed.
        task: None for what the data looks like; texts without labels are "text-generation".

    Raises:
        ValueError: data that cannot be read, or is for another task; a file and its line are named.
    """
    if isinstance(data, (Examples, Stream)):
        return _checked(data, task)
    if task is not None and task not in TASKS:
        raise ValueError(f"task={task!r}: one of {', '.join(TASKS)} can be trained")
    if isinstance(data, (str, os.PathLike)):
        return _checked(of_path(Path(data).expanduser(), task), task)
    if isinstance(data, tuple) and len(data) == 2:
        return _checked(_of_pair(*data, task=task), task)
    if hasattr(data, "dataset") and hasattr(data, "batch_size"):
        raise ValueError(f"a {type(data).__name__} gives batches: give the examples, its .dataset")
    if not isinstance(data, (Mapping, bytes, bytearray)):
        if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            return _checked(_of_sequence(data, task), task)
        if isinstance(data, Iterable):
            return _of_iterable(data, task)
    raise ValueError(
        f"{type(data).__name__}: give a folder, a file, (inputs, labels), a sequence of "
        "(input, label), or another iterable of these"
    )


def _checked(found: Examples | Stream, task: str | None) -> Examples | Stream:
    if task not in (None, found.task) and not {task, found.task} <= {*LANGUAGE}:
        raise ValueError(f"this data is for {found.task}, not for {task}")
    return replace(found, task=task) if task else found


@dataclass(frozen=True)
class Inputs(Sequence):
    """The inputs of a sequence of (input, target) or dicts."""

    of: Any  # __len__ and __getitem__
    task: str

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: Any) -> Any:
        return input_and_target(self.of[index], self.task)[0]


def _of_pair(inputs: Any, targets: Any, task: str | None) -> Examples:
    """(inputs, labels)."""
    if not (hasattr(inputs, "__len__") and hasattr(targets, "__len__")):
        raise ValueError("(inputs, labels): two sequences are needed")
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs, but {len(targets)} labels")
    return _of_sequence([*zip(inputs, _plain(targets), strict=True)], task)


def _of_sequence(data: Any, task: str | None) -> Examples:
    """Every item is looked at once, for its label and the digest; inputs are not kept."""
    if not len(data):
        raise ValueError("the data is empty: at least 1 example is needed")
    digest, targets = sha256(), []
    for index in range(len(data)):
        try:
            item = data[index]
            task = task or task_of(item)
            given, target = input_and_target(item, task)
            check_example(given, target, task)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"example {index}: {error}") from error
        digest.update(_bytes_of(given))
        targets.append(target)
    assert task is not None
    return examples_of(task, Inputs(data, task), targets, digest_of(digest.hexdigest(), targets))


def _of_iterable(data: Iterable[Any], task: str | None) -> Stream:
    """Nothing is read of it, but for the first item where it can be read again."""
    if task is None:
        if isinstance(data, Iterator):
            raise ValueError("an iterator does not show what it is for: give task=")
        first = next(iter(data), None)
        if first is None:
            raise ValueError("the data is empty: at least 1 example is needed")
        task = task_of(first)
    return Stream(task, data)


def _plain(values: Any) -> list[Any]:
    """Labels in an array, as Python's own."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _bytes_of(given: Any) -> bytes:
    """What a digest takes of an input."""
    if isinstance(given, (str, tuple, list)):
        return json.dumps(given, default=repr).encode()
    if isinstance(given, os.PathLike):
        return f"{given} {os.stat(given).st_size}".encode()
    if isinstance(given, (bytes, bytearray)):
        return bytes(given)
    if hasattr(given, "tobytes"):  # an array, a Pillow image
        return given.tobytes()
    return np.asarray(given).tobytes()
