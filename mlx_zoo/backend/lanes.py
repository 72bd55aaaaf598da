"""A batch divided among the cores of a CPU.

MLX computes an operation on the CPU in one thread, but for matrix products, which the BLAS divides.
Parts of a batch, each in a thread and on a stream of its own, keep every core at work in all of
them; the BLAS then uses one thread for each part.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_zoo.backend import ops
from mlx_zoo.backend.blas import load_fast_blas

_here = threading.local()  # .stream: of this thread, where it is a lane
_no_lanes = ops.Suspension()
_cores = threading.Lock()  # held by the one call that is divided


def single() -> AbstractContextManager[None]:
    """For a while, no batch is divided."""
    return _no_lanes.held()


def is_lane() -> bool:
    """Whether this thread computes a part of a batch."""
    return hasattr(_here, "stream")


def divided(function: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(owner, *args, **kwargs)`; on the CPU, of parts of the batch, put together again.

    Arguments that are arrays are the batch, (B, ...), and so is every array of the result, which
    may be a named tuple or a list of arrays.
    """
    arrays = [x for x in (*args, *kwargs.values()) if x is not None]
    count = _num_lanes(arrays)
    # A thread cannot evaluate what belongs to another's stream: the weights, too, must be there.
    if count < 2 or not ops.have_values(arrays, owner):
        return function(owner, *args, **kwargs)

    def run(part: slice) -> Any:
        if not is_lane():
            _here.stream = mx.new_stream(mx.cpu)
        with mx.stream(_here.stream):
            some = [x if x is None else x[part] for x in args]
            named = {name: x if x is None else x[part] for name, x in kwargs.items()}
            found = function(owner, *some, **named)
            mx.eval(found)
        return found

    B = arrays[0].shape[0]
    bounds = [B * i // count for i in range(count + 1)]
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    if not _cores.acquire(blocking=False):  # another thread of the caller's has them
        return function(owner, *args, **kwargs)
    try:
        with _blas_threads(_threads() // count):
            return _joined(list(_pool(count).map(run, parts)))
    except ValueError:  # of a part's shape: the whole one's says what was given
        return function(owner, *args, **kwargs)
    finally:
        _cores.release()


def _num_lanes(arrays: list[Any]) -> int:
    """Into how many parts to divide a call with these arguments."""
    if (
        _no_lanes.count
        or not ops.is_enabled()
        or is_lane()
        or not arrays
        or mx.default_device() != mx.cpu
    ):
        return 1
    if not all(isinstance(x, mx.array) and x.ndim for x in arrays):
        return 1
    sizes = {x.shape[0] for x in arrays}
    return min(*sizes, _threads()) if len(sizes) == 1 else 1


def _joined(found: list[Any]) -> Any:
    first = found[0]
    if first is None:
        return None
    if isinstance(first, mx.array):
        return mx.concatenate(found)
    joined = [_joined(list(parts)) for parts in zip(*found, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else joined


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="mlx_zoo")


# Threads of the BLAS ----------------------------------------------------------------------------


@functools.cache
def _controls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """How the process's BLAS says and is told how many threads to use; None: it cannot be told."""
    blas = load_fast_blas()
    if blas.path is None:
        return None
    library = ctypes.CDLL(blas.path)
    for get, put in (
        ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
        ("openblas_get_num_threads", "openblas_set_num_threads"),
    ):
        if hasattr(library, put):
            return getattr(library, get), getattr(library, put)
    return None


def _threads() -> int:
    """How many threads the BLAS would use: what the user allows."""
    controls = _controls()
    return controls[0]() if controls else 1


@contextmanager
def _blas_threads(count: int) -> Iterator[None]:
    """For a while, so many threads for each matrix product."""
    controls = _controls()
    assert controls is not None
    get, put = controls
    before = get()
    put(max(1, count))
    try:
        yield
    finally:
        put(before)
