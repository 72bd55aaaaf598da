"""Other operations in the place of MLX's, for a while and in one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Replacement = tuple[Any, str, Callable]  # a module, a name in it, and what that calls


@contextmanager
def replaced(replacements: Sequence[Replacement]) -> Iterator[None]:
    """For a while, this thread's calls get to these; other threads' to what was there."""
    before = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    for (module, name, own), (*_, new) in zip(before, replacements, strict=True):
        setattr(module, name, _here(own, new))
    try:
        yield
    finally:
        for module, name, own in before:
            setattr(module, name, own)


def _here(own: Callable, new: Callable) -> Callable:
    thread = threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == thread else own)(*args, **kwargs)

    return chosen
