"""The child: judges a range of cases and says on its standard output what it is doing.

Three lines a case: `make N`, `ours` or `theirs` with what is known by then, `done` with the result.
Its parent knows by the last line where it died or hangs.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from .case import Result, judge


def main(target_name: str, first: int, count: int) -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not for our parent

    def say(phase: str, value: object) -> None:
        os.write(out, f"{phase} {json.dumps(value)}\n".encode())

    def announce(phase: str, result: Result) -> None:
        say(phase, asdict(result))

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where a gadget would leave its mark
        target = importlib.import_module(target_name).Target(Path(folder))
        for number in range(first, first + count):
            say("make", number)
            announce("done", judge(target, number, announce))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
