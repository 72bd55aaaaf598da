"""Names of a package that are imported when they are first asked for (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(names: dict[str, Any], homes: Mapping[str, str]) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        names: the package's own `globals()`.
        homes: name -> the module below the package that has it.
    """
    package = names["__name__"]

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = names[name] = getattr(import_module(f"{package}.{homes[name]}"), name)
        return found

    return find, lambda: sorted({*names, *homes})
