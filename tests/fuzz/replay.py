"""One case again, told in full. The judging is a worker's, whom a crash may take."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

from . import watch


def show(module: str, number: int, save: Path | None = None) -> int:
    """Print how case `number` was made and what became of it; 1 if that is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        case = importlib.import_module(module).Target(Path(folder)).make(number)
    print(f"case {number}: {case.size} bytes")
    for step in case.steps:
        print(f"  {step}")
    if save is not None:
        if not isinstance(case.value, bytes):
            raise SystemExit("this target's cases are no files; the steps above make it")
        save.write_bytes(case.value)
        print(f"  written to {save}")
    summary = watch.run(module, number, 1)
    print(summary)
    return 1 if summary.failures else 0
