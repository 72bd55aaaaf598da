"""Examples -> batches, in an order and with chances that follow from the seed alone.

The same epoch of the same data is the same, bit for bit, from wherever it is begun, and in however
many processes. A thread prepares the next batches while the network is at work on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zoo import registry
from mlx_zoo.errors import MLXZooError
from mlx_zoo.tasks.batches import ahead
from mlx_zoo.tasks.labels import label_names
from mlx_zoo.training.augmentation import Augmentation, Mixup, soft_labels
from mlx_zoo.training.examples import (
    FILL_MASK,
    GENERATION,
    IMAGES,
    LANGUAGE,
    TAGS,
    TASKS,
    TEXTS,
    Examples,
    Stream,
    check_classes,
    check_example,
    digest_of,
    hold_out,
    input_and_target,
)
from mlx_zoo.training.images import PrepareImages, check_files
from mlx_zoo.training.sources import read
from mlx_zoo.training.texts import (
    PrepareBlocks,
    PrepareMasked,
    PrepareNextTokens,
    PrepareTexts,
    PrepareWords,
)

__all__ = ["Batch", "Dataset", "hold_out", "inspect", "training_data", "validation_data"]

# What a generator is for: numbers that begin alike would draw alike.
ORDER, EXAMPLE, MIX = 1, 2, 3
Prepare = Callable[[Sequence[Any], Sequence[np.random.Generator]], tuple[np.ndarray, ...]]


class Batch(NamedTuple):
    """What the network is called with, and what is asked of it.

    A part without examples (the last batch of an epoch may have fewer than there are processes)
    has no inputs, and None for targets.
    """

    inputs: tuple[mx.array, ...]  # (images,), or (input_ids, attention_mask[, token_type_ids])
    targets: Any  # class ids (B,), soft labels (B, K), or ids (B, N), -100 where nothing is asked
    num_examples: int


class Row(NamedTuple):
    """An example with its number among all."""

    number: int
    given: Any
    target: Any


class Portion(NamedTuple):
    """What a process has of a batch, and what that is mixed with."""

    own: list[Row]
    others: Sequence[Row] = ()
    mix: Mixup | None = None


class Dataset:
    """Examples, prepared for a network.

    `labels` are the names of the classes in the order of their ids, () of language models, and
    `num_examples` is None for a stream.
    """

    def __init__(
        self,
        examples: Examples | Stream,
        labels: tuple[str, ...],
        prepare: Prepare,
        *,
        shuffle: bool,
        seed: int = 0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
    ):
        self.examples, self.labels, self.prepare = examples, labels, prepare
        self.task = examples.task
        self.shuffle, self.seed = shuffle and isinstance(examples, Examples), seed
        self.label_smoothing, self.mixup = label_smoothing, mixup
        self.ids = {name: i for i, name in enumerate(labels)}
        numbers = {str(i): i for i in range(len(labels))}
        if isinstance(examples, Stream):
            self.ids = numbers | self.ids
        elif numbers.keys() >= set(examples.labels) > set() and examples.labels[0] not in self.ids:
            self.ids = numbers
        self.blocks: list[np.ndarray] | None = None
        if isinstance(examples, Examples):
            if isinstance(prepare, PrepareBlocks):
                self.blocks = [*prepare.blocks(examples.inputs)]
                if not self.blocks:
                    raise ValueError("the text is too short to train with: 2 tokens are needed")
            for i, target in enumerate(examples.targets):
                self._target(target, examples.place(i))
        said = (self.task, labels, repr(prepare), shuffle, seed, label_smoothing, mixup)
        self.digest = digest_of(examples.digest, *said)
        self.used = False  # whether an iterator was read, which cannot be read again

    @property
    def num_examples(self) -> int | None:
        if isinstance(self.examples, Stream):
            return None
        return len(self.examples) if self.blocks is None else len(self.blocks)

    def num_batches(self, batch_size: int) -> int | None:
        """In an epoch, the last one, which may be smaller, with them; None: nobody knows."""
        return None if self.num_examples is None else -(-self.num_examples // batch_size)

    def batches(
        self, epoch: int, batch_size: int, *, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Batches of an epoch, from number `start` on.

        Args:
            batch_size: of all processes together.
            part: (rank, size): of each batch, the rows rank, rank + size, ...

        Raises:
            ValueError: an example cannot be read; it is named.
            MLXZooError: another epoch of what can be read only once.
        """

        def make(portion: Portion) -> tuple[tuple[np.ndarray, ...], Any, int]:
            return self._prepared(epoch, portion)

        with closing(ahead(make, self._portions(epoch, batch_size, start, part))) as found:
            for inputs, targets, count in found:
                asked = None if targets is None else mx.array(targets)
                yield Batch(tuple(map(mx.array, inputs)), asked, count)

    def _portions(
        self, epoch: int, batch_size: int, start: int, part: tuple[int, int]
    ) -> Iterator[Portion]:
        """It runs in the caller's thread, as the user's own code may have to."""
        if isinstance(self.examples, Stream):
            rows = islice(self._streamed(self.examples), start * batch_size, None)
            for number in count(start):
                batch = [*islice(rows, batch_size)]
                if not batch:
                    return
                yield self._portion(epoch, number, len(batch), batch.__getitem__, part)
        examples, size = self.examples, self.num_examples
        assert isinstance(examples, Examples)
        assert size is not None
        order = np.arange(size)
        if self.shuffle:
            order = np.random.default_rng([ORDER, self.seed, epoch]).permutation(size)
        for number in range(start, -(-size // batch_size)):
            chosen = order[number * batch_size : (number + 1) * batch_size].tolist()
            row = partial(self._row, examples, chosen)
            yield self._portion(epoch, number, len(chosen), row, part)

    def _portion(
        self, epoch: int, number: int, size: int, row: Callable[[int], Row], part: tuple[int, int]
    ) -> Portion:
        """Of a batch of that number and size; `row` gives an example by its place there."""
        rank, step = part
        own = [row(i) for i in range(rank, size, step)]
        if not self.mixup:
            return Portion(own)
        rng = np.random.default_rng([MIX, self.seed, epoch, number])
        mix = Mixup.draw(self.mixup, size, rng)
        return Portion(own, [row(i) for i in mix.partners[rank::step].tolist()], mix)

    def _row(self, examples: Examples, chosen: Sequence[int], place: int) -> Row:
        i = chosen[place]
        if self.blocks is not None:
            return Row(i, self.blocks[i], None)
        target = self._target(examples.targets[i], examples.place(i))
        return Row(i, evaluated(examples.inputs[i]), target)

    def _streamed(self, stream: Stream) -> Iterator[Row]:
        if stream.once and self.used:
            raise MLXZooError(
                "an iterator can be read once: epochs=1, or give what can be iterated again"
            )
        self.used = True
        pairs = self._checked(stream)
        if isinstance(self.prepare, PrepareBlocks):
            texts = (given for given, _ in pairs)
            pairs = ((block, None) for block in self.prepare.blocks(texts))
        for number, (given, target) in enumerate(pairs):
            yield Row(number, given, target)

    def _checked(self, stream: Stream) -> Iterator[tuple[Any, Any]]:
        for number, item in enumerate(stream.items):
            try:
                given, target = input_and_target(item, self.task)
                check_example(given, target, self.task)
            except ValueError as error:
                raise ValueError(f"example {number}: {error}") from error
            asked = None if target is None else self._target(target, f"example {number}")
            yield evaluated(given), asked

    def _target(self, target: Any, place: str) -> Any:
        """The ids of names. ValueError for a name that is none of the labels."""
        try:
            if isinstance(target, list):
                return [self.ids[name] for name in target]
            return self.ids[target]
        except KeyError as error:
            listed = ", ".join(self.labels[:10]) + (", ..." if self.labels[10:] else "")
            raise ValueError(f"{place}: {error} is none of the labels, {listed}") from None

    def _prepared(self, epoch: int, portion: Portion) -> tuple[tuple[np.ndarray, ...], Any, int]:
        """(inputs, targets, how many examples). MLX has no share in it."""
        own, others, mix = portion
        if not own:
            return (), None, 0
        inputs, targets = self._arrays(epoch, own)
        if mix is not None:
            (images,), labels = self._arrays(epoch, others)
            inputs, targets = (mix(inputs[0], images),), mix(targets, labels)
        return inputs, targets, len(own)

    def _arrays(self, epoch: int, rows: Sequence[Row]) -> tuple[tuple[np.ndarray, ...], Any]:
        given = [row.given for row in rows]
        rngs = [np.random.default_rng([EXAMPLE, self.seed, epoch, row.number]) for row in rows]
        inputs = self.prepare(given, rngs)
        if isinstance(self.prepare, PrepareBlocks):  # which knows what is asked
            return inputs[:1], inputs[1]
        ids = [row.target for row in rows]
        if isinstance(self.prepare, PrepareWords):
            return inputs, self.prepare.tags(given, ids)
        if self.label_smoothing or self.mixup:
            return inputs, soft_labels(np.array(ids), len(self.labels), self.label_smoothing)
        return inputs, np.array(ids, np.int32)


def evaluated(given: Any) -> Any:
    """An array of MLX's as NumPy's: it is evaluated in the thread that made it."""
    return np.array(given) if isinstance(given, mx.array) else given


def inspect(data: Any, task: str | None = None) -> Examples | Stream:
    """What data is, before a network is chosen: `.task`, and `.labels`, the names of its classes.

    What it returns may be given wherever the data may; an iterator must be.

    Raises ValueError for what is no data, or is for another task.
    """
    found = read(data, task)
    check_classes(found)
    return found


def training_data(
    data: Any,
    model: nn.Module,
    *,
    augment: bool | Augmentation | None = True,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    max_length: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Data in another order each epoch, as a network takes it.

    Args:
        data: as `examples.read` takes it.
        augment: of images: True for `Augmentation.usual`; None or False for none.
        label_smoothing: what part of a label all classes share.
        mixup: alpha of the Beta distribution by which images are mixed; 0 for not at all.
        max_length: tokens of a text, or of a block of running text.

    Raises:
        ValueError: a wrong argument, or data that is wrong, or is not for that network.
    """
    found = inspect(data, task_of(model))
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: from 0 to below 1 is needed")
    if not mixup >= 0:
        raise ValueError(f"mixup={mixup}: 0, or the alpha of a Beta distribution, is needed")
    if mixup and found.task != IMAGES:
        raise ValueError(f"mixup={mixup}: images are mixed, this is {found.task}")
    if label_smoothing and found.task not in (IMAGES, TEXTS):
        raise ValueError(f"label_smoothing={label_smoothing}: {found.task} has none")
    return Dataset(
        found,
        labels_for(found, model),
        _preparation(found, model, augment, max_length),
        shuffle=True,
        seed=seed,
        label_smoothing=label_smoothing,
        mixup=mixup,
    )


def validation_data(
    data: Any,
    model: nn.Module,
    *,
    labels: tuple[str, ...] | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Data in its own order, not augmented, with the labels of the training data.

    Hidden tokens are the same at every evaluation: give it the same epoch.
    """
    found = read(data, task_of(model))
    labels = labels_for(found, model) if labels is None else labels
    prepare = _preparation(found, model, None, max_length)
    return Dataset(found, labels, prepare, shuffle=False, seed=seed)


def task_of(model: nn.Module) -> str:
    """What a network can be trained for. ValueError for one whose head is for nothing here."""
    if registry.of_model(model).inputs == "images":
        if not model.config.num_classes:
            raise ValueError("this network has no head: load it with num_classes=")
        return IMAGES
    task = model.config.task
    if task not in TASKS:
        has = f"a head for {task}" if task else "no head"
        raise ValueError(f"this network has {has}: load it with task=, one of {', '.join(TASKS)}")
    return task


def labels_for(found: Examples | Stream, model: nn.Module) -> tuple[str, ...]:
    """The names of a network's outputs in their order: its own where the data's are among them.

    Raises ValueError where the data has other classes than the network has outputs for.
    """
    if found.task in LANGUAGE:
        return ()
    own, count = label_names(model), registry.of_model(model).head_size(model.config)
    named = bool(model.checkpoint and model.checkpoint.labels == own)
    numbers = tuple(map(str, range(count or 0)))
    if isinstance(found, Stream):
        return found.labels or (own if named else numbers)
    if set(found.labels) <= set(own):
        return own
    if set(found.labels) <= set(numbers) and (not named or len(found.labels) == count):
        return own if named else numbers
    if len(found.labels) == count:
        return found.labels
    raise ValueError(
        f"the data has {len(found.labels)} classes, the head of this network {count}: load it "
        f"with num_classes={len(found.labels)}, or give its name"
    )


def _preparation(
    found: Examples | Stream, model: nn.Module, augment: Any, max_length: int | None
) -> Prepare:
    """How inputs of that task become arrays."""
    if found.task == IMAGES:
        if max_length is not None:
            raise ValueError(f"max_length={max_length}: images have no tokens")
        if isinstance(found, Examples) and isinstance(found.inputs[0], (str, Path)):
            check_files(found.inputs)
        return PrepareImages.of(model, augment)
    kinds: Mapping[str, type[PrepareTexts]] = {
        TEXTS: PrepareTexts,
        TAGS: PrepareWords,
        GENERATION: PrepareNextTokens,
        FILL_MASK: PrepareMasked,
    }
    if isinstance(augment, Augmentation):
        raise ValueError("augment: texts are not augmented")
    prepare = kinds[found.task].of(model, max_length)
    if found.task == FILL_MASK and prepare.tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer of this network has no mask token")
    return prepare
