"""Many inputs at once: lists in batches, the next ones prepared meanwhile; iterators lazily."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

Advance = Callable[[float], None]  # told how many inputs are done since it was last called
Prepare = Callable[[Sequence[Any]], Any]  # inputs -> what `Read` takes; ValueError for a bad one
Read = Callable[[Any, Advance], list[Any]]  # what was prepared -> an answer to each input
AHEAD = 2  # windows that are prepared while the network reads another
# Batches in a window of `Windows`, at most: what is dealt out to processes, or lost with one.
SHARED = 8

Item = TypeVar("Item")
Made = TypeVar("Made")


def answers(inputs: Any, prepare: Prepare, read: Read, batch_size: int, look_ahead: int = 1) -> Any:
    """The answers to one input, to a list or tuple of them, to an iterator, or to `Windows`.

    One gives one, a list gives a list, and an iterator (a generator, say) gives an iterator: it
    takes `batch_size` inputs whenever their answers are asked for, and keeps none. Of a list,
    `prepare` is given a window of `look_ahead` batches at once, which lets it choose what to put
    together, and runs in a thread, so that the next windows are ready when `read` is.

    Raises ValueError for a `batch_size` that is none.
    """
    check_count("batch_size", batch_size)
    size = batch_size * look_ahead
    if isinstance(inputs, Windows):
        return inputs.answers(prepare, read, batch_size * min(look_ahead, SHARED))
    if isinstance(inputs, Iterator) and not hasattr(inputs, "read"):  # an open file is one input
        return _lazily(inputs, prepare, read, batch_size)
    if not isinstance(inputs, (list, tuple)):
        return read(prepare([inputs]), lambda count: None)[0]
    found: list[Any] = []
    with (
        progress(len(inputs), shown=len(inputs) > batch_size) as advance,
        closing(ahead(prepare, batches(inputs, size))) as windows,
    ):
        for prepared in windows:
            found += read(prepared, advance)
    return found


class Failure(NamedTuple):
    """Why there is no answer to an input."""

    message: str


class Answered(NamedTuple):
    """A window of inputs, the place of its first among all, and an answer or failure to each."""

    first: int
    inputs: Sequence[Any]
    answers: list[Any]


@dataclass(frozen=True)
class Windows:
    """Inputs of which a pipeline answers one window after the other: an iterator of `Answered`.

    Windows are fixed, whichever of them are `wanted`: what is put together, and so every bit of
    the answers, does not depend on it. The inputs are read as far as two windows ahead.
    """

    inputs: Iterable[Any]
    wanted: Callable[[int], bool]  # by the place of the first input; asked once for each, in order
    stop: bool = False  # whether an input that cannot be prepared ends all, by its ValueError
    advance: Advance = lambda count: None

    def answers(self, prepare: Prepare, read: Read, size: int) -> Iterator[Answered]:
        """One window at a time, of `size` inputs."""

        def sound(window: tuple[int, list[Any]]) -> tuple[int, list[Any], dict[int, Failure], Any]:
            first, some = window
            try:
                return first, some, {}, prepare(some)
            except ValueError:
                if self.stop:
                    raise
            failed = {i: why for i, item in enumerate(some) if (why := failure(item))}
            good = [item for i, item in enumerate(some) if i not in failed]
            return first, some, failed, prepare(good) if good else None

        def failure(item: Any) -> Failure | None:
            try:
                prepare([item])
            except ValueError as error:
                return Failure(str(error))
            return None

        with closing(ahead(sound, self.chosen(size))) as windows:
            for first, some, failed, prepared in windows:
                found = iter(read(prepared, self.advance) if len(failed) < len(some) else [])
                self.advance(len(failed))
                said = [failed[i] if i in failed else next(found) for i in range(len(some))]
                yield Answered(first, some, said)

    def chosen(self, size: int) -> Iterator[tuple[int, list[Any]]]:
        inputs, first = iter(self.inputs), 0
        while some := list(islice(inputs, size)):
            if self.wanted(first):
                yield first, some
            first += len(some)


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made, None, None]:
    """`make` of each item, in order. A thread makes the next ones while this one is in use.

    Besides what is in use, at most AHEAD are kept, and the one that is asked for. The items are
    taken by the caller's own thread.
    """
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1, "mlx_zoo-ahead") as thread:
        try:
            for item in items:
                waiting.append(thread.submit(make, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`items` in runs of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def stacked(found: Any) -> Any:
    """The answers to a list as one array; those to an iterator, or to a single input, as they are.

    Raises ValueError for none at all.
    """
    if not isinstance(found, list):
        return found
    if not found:
        raise ValueError("an empty list: at least 1 input is needed")
    return np.stack(found)


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: at least 1 is needed")


def _lazily(inputs: Iterator[Any], prepare: Prepare, read: Read, batch_size: int) -> Iterator[Any]:
    while batch := list(islice(inputs, batch_size)):
        yield from read(prepare(batch), lambda count: None)


@contextmanager
def progress(total: int, shown: bool, done: int = 0) -> Iterator[Advance]:
    """A bar on the terminal, gone when the work is done; nothing where stderr is none.

    It tells how many of `total` inputs are done (`done` of them before), at what rate, and how long
    the rest will take.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.1f}/s" if task.speed else "")

    count = TextColumn("{task.completed:,.0f}/{task.total:,}")
    columns = (BarColumn(), TaskProgressColumn(), count, Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)
