"""Many inputs at once: lists in batches, iterators lazily."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

Advance = Callable[[float], None]  # told how many inputs are done since it was last called
Work = Callable[[Sequence[Any], Advance], list[Any]]  # inputs -> an answer to each


def answers(inputs: Any, work: Work, batch_size: int, look_ahead: int = 1) -> Any:
    """What `work` says to one input, to a list or tuple of them, or to an iterator.

    One gives one, a list gives a list, and an iterator (a generator, say) gives an iterator: it
    takes `batch_size` inputs whenever their answers are asked for, and keeps none. Of a list,
    `work` is given `look_ahead` batches at once, which lets it choose what to put together.

    Raises ValueError for a `batch_size` that is none.
    """
    check_count("batch_size", batch_size)
    if isinstance(inputs, Iterator) and not hasattr(inputs, "read"):  # an open file is one input
        return _lazily(inputs, work, batch_size)
    if not isinstance(inputs, (list, tuple)):
        return work([inputs], lambda count: None)[0]
    found: list[Any] = []
    with _progress(len(inputs), shown=len(inputs) > batch_size) as advance:
        for some in batches(inputs, batch_size * look_ahead):
            found += work(some, advance)
    return found


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


def _lazily(inputs: Iterator[Any], work: Work, batch_size: int) -> Iterator[Any]:
    while batch := list(islice(inputs, batch_size)):
        yield from work(batch, lambda count: None)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Advance]:
    """A bar on the terminal, gone when the work is done; nothing where stderr is none."""
    if not shown or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
