"""Inputs with what a network is to answer to them, whatever they were given as."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from mlx_zoo.tasks.inputs import SUFFIXES
from mlx_zoo.tasks.texts import Pair, check_text

IMAGES, TEXTS, TAGS, GENERATION, FILL_MASK = (
    *("image-classification", "text-classification", "token-classification"),
    *("text-generation", "fill-mask"),
)
TASKS = (IMAGES, TEXTS, TAGS, GENERATION, FILL_MASK)
LANGUAGE = (GENERATION, FILL_MASK)  # texts alone: what is asked is in them
# The names of columns, as tables and data sets on the hub have them; the first that is there.
COLUMNS = {
    "image": ("image", "img", "file", "path", "filename"),
    "tokens": ("tokens", "words"),
    "text": ("text", "sentence", "text_a", "sentence1", "premise", "question1"),
    "second": ("text_pair", "text_b", "sentence2", "hypothesis", "question2"),
    "tags": ("tags", "ner_tags", "labels"),
    "label": ("label", "labels", "class", "category", "target"),
}
FEW = 20  # documents, below which a part held out is the end of each


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with what a network is to answer to them.

    A target is the name of a class, of token classification the tags of the words; of language
    models there are none. `labels` are the names of the classes or tags, sorted.
    """

    task: str
    inputs: Sequence[Any]
    targets: Sequence[Any]
    labels: tuple[str, ...]
    digest: str
    place: Callable[[int], str] = lambda index: f"example {index}"  # for messages

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, indices: np.ndarray) -> Examples:
        """Those examples alone."""
        kept = indices.tolist()
        return replace(
            self,
            inputs=Chosen(self.inputs, kept),
            targets=[self.targets[i] for i in kept] if len(self.targets) else (),
            digest=digest_of(self.digest, kept),
            place=lambda index: self.place(kept[index]),
        )


@dataclass(frozen=True, eq=False)
class Stream:
    """Examples that come one after the other, in their own order; how many is not known.

    Items are (input, target), dicts, or texts. What classes there are, the network knows.
    """

    task: str
    items: Iterable[Any]
    labels: tuple[str, ...] = ()
    digest: str = "a stream"

    @property
    def once(self) -> bool:
        """Whether it can be read a single time: an iterator."""
        return iter(self.items) is self.items or isinstance(self.items, Iterator)


@dataclass(frozen=True)
class Chosen(Sequence):
    """Some of a sequence, in another order; each is asked for when it is needed."""

    of: Sequence[Any]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.of[self.indices[index]]


def examples_of(task: str, inputs: Any, targets: list[Any], digest: str, *place: Any) -> Examples:
    if task in LANGUAGE:
        return Examples(task, inputs, (), (), digest, *place)
    names = {*targets} if task != TAGS else {tag for tags in targets for tag in tags}
    return Examples(task, inputs, targets, in_order(names), digest, *place)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted; numbers by their value."""
    names = [*names]
    numbers = all(re.fullmatch(r"\d{1,9}", name) for name in names)
    return tuple(sorted(names, key=int if numbers else None))


def digest_of(*parts: Any) -> str:
    """The same for the same values, in another process, too."""
    return sha256(json.dumps(parts, default=repr).encode()).hexdigest()


def check_classes(found: Examples | Stream) -> None:
    """Raise ValueError where there is nothing to tell apart."""
    if isinstance(found, Examples) and found.task not in LANGUAGE and len(found.labels) < 2:
        kind = "tag" if found.task == TAGS else "class"
        raise ValueError(f"the data has a single {kind} ({', '.join(found.labels)}): 2 are needed")


# One example ------------------------------------------------------------------------------------


def task_of(item: Any) -> str:
    """What an example is for, by its looks. ValueError where it looks like none."""
    if isinstance(item, str):
        return GENERATION
    if isinstance(item, Mapping):
        if _column(item, "image"):
            return IMAGES
        if _column(item, "tokens"):
            return TAGS
        if _column(item, "text"):
            return TEXTS if _column(item, "label") else GENERATION
        raise ValueError(
            f"columns {', '.join(map(str, item))}: text and label, image and label, or tokens and "
            "tags are needed"
        )
    if isinstance(item, (tuple, list)) and len(item) == 2:
        given, target = item
        if isinstance(target, (list, tuple)):
            return TAGS
        text = isinstance(given, (tuple, list)) and all(isinstance(x, str) for x in given)
        if text or (isinstance(given, str) and not given.lower().endswith(SUFFIXES)):
            return TEXTS
        return IMAGES
    raise ValueError(f"{type(item).__name__} is no example: (input, label), a dict, or a text")


def input_and_target(item: Any, task: str) -> tuple[Any, Any]:
    """An example as (input, target); a target that a language model has no use for is left out.

    Class names are text: 3 is "3".
    """
    if task in LANGUAGE:
        return (item[_needed(item, "text")] if isinstance(item, Mapping) else item), None
    if isinstance(item, Mapping):
        if task == TAGS:
            return item[_needed(item, "tokens")], _names(item[_needed(item, "tags")])
        target = _name(item[_needed(item, "label")])
        if task == IMAGES:
            return item[_needed(item, "image")], target
        text, second = item[_needed(item, "text")], _column(item, "second")
        pair = item[second] if second else None
        return (Pair(text, pair) if pair else text), target  # an empty one is none
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise ValueError(f"{type(item).__name__} is no example: (input, label), or a dict")
    given, target = item
    if task == TAGS:
        return given, _names(target)
    if task == TEXTS and isinstance(given, (tuple, list)) and len(given) == 2:
        given = Pair(*given)
    return given, _name(target)


def check_example(given: Any, target: Any, task: str) -> None:
    """Raise ValueError for what the task cannot be trained with. Images are looked at elsewhere."""
    if task == TAGS:
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(f"tokens={given!r:.60}: a list of words is needed")
        if len(given) != len(target):
            raise ValueError(f"{len(given)} tokens, but {len(target)} tags")
    if task != IMAGES:
        for text in given if isinstance(given, (list, tuple)) else [given]:
            if not isinstance(text, str):
                raise ValueError(f"{type(text).__name__} is no text, which {task} needs")
            check_text(text)
    if task == TEXTS and not any(given if isinstance(given, Pair) else [given]):
        raise ValueError("the text is empty")
    if task != TAGS and target == "":
        raise ValueError("the label is empty")


def _column(row: Mapping[str, Any], kind: str) -> str | None:
    return next((name for name in COLUMNS[kind] if name in row), None)


def _needed(row: Mapping[str, Any], kind: str) -> str:
    if found := _column(row, kind):
        return found
    known = " or ".join(COLUMNS[kind])
    raise ValueError(f"no column {known}; there are {', '.join(map(str, row))}")


def _name(label: Any) -> str:
    if hasattr(label, "item") and getattr(label, "ndim", 1) == 0:  # of NumPy or MLX
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"{label!r:.60} is no label: a name, or a number from 0, is needed")
    if isinstance(label, int) and label < 0:
        raise ValueError(f"label {label}: a name, or a number from 0, is needed")
    return str(label).strip()


def _names(tags: Any) -> list[str]:
    if isinstance(tags, str) or not hasattr(tags, "__len__"):
        raise ValueError(f"tags={tags!r:.60}: a list, one for each word, is needed")
    return [_name(tag) for tag in tags]


# A part held out --------------------------------------------------------------------------------


def hold_out(examples: Examples | Stream, part: float, seed: int) -> tuple[Examples, Examples]:
    """(the rest, the part that is held out for evaluation), by chance; of each class alike.

    Of few texts, it is the end of each. Raises ValueError where nothing would be left.
    """
    if not isinstance(part, float) or not 0 < part < 1:
        raise ValueError(f"val_data={part!r}: data, or a part between 0 and 1, is needed")
    if isinstance(examples, Stream):
        raise ValueError(f"val_data={part}: of a stream no part is held out; give data")
    if examples.task in LANGUAGE and len(examples) < FEW:
        cut = [_cut(text, part) for text in examples.inputs]
        rest, held = ([pair[i] for pair in cut if pair[i].strip()] for i in (0, 1))
        if not rest or not held:
            raise ValueError(f"val_data={part}: there is too little text to hold a part out")
        return (
            replace(examples, inputs=rest, digest=digest_of(rest)),
            replace(examples, inputs=held, digest=digest_of(held)),
        )
    rng, count = np.random.default_rng(seed), len(examples)
    groups: dict[Any, list[int]] = {}
    for i in range(count):
        stratified = len(examples.targets) and examples.task != TAGS
        groups.setdefault(examples.targets[i] if stratified else None, []).append(i)
    chosen = np.zeros(count, bool)
    for group in groups.values():
        chosen[rng.permutation(group)[: round(part * len(group))]] = True
    if not chosen.any() or chosen.all():
        raise ValueError(f"val_data={part}: of {count} examples, that leaves nothing on a side")
    return examples.part(np.flatnonzero(~chosen)), examples.part(np.flatnonzero(chosen))


def _cut(text: str, part: float) -> tuple[str, str]:
    """The beginning and the last `part` of a text, at the end of a line or a word."""
    wanted = int(len(text) * (1 - part))
    ends = [m.end() for m in re.finditer(r"\n" if "\n" in text else r"\s", text)]
    at = min(ends, key=lambda end: abs(end - wanted), default=wanted)
    return text[:at], text[at:]
