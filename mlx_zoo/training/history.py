"""What was measured at each step, on the disk: log.jsonl and log.csv.

They hold what the same command always gives: no time of the clock. So those of a run that was ended
and went on are those of one that was not.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[
    str, Any
]  # {"step": 1, "epoch": 0, "loss": ..., "learning_rate": ..., "val_loss": ...}

LINES, TABLE = "log.jsonl", "log.csv"


class Log:
    """The two files of an output folder; whatever was there after `history` is cut."""

    def __init__(self, folder: Path | None, history: Iterable[Row] = ()):
        self.folder = folder
        self.columns: list[str] = []
        self.rows = list(history)
        if folder is not None:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            (folder / LINES).write_text(lines, encoding="utf-8")
            self._write_table()

    def add(self, row: Row) -> None:
        """One more; a line in each file. Raises OSError where the disk is full."""
        self.rows.append(row)
        if self.folder is None:
            return
        with (self.folder / LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not row.keys() <= set(self.columns):
            self._write_table()
            return
        with (self.folder / TABLE).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def _write_table(self) -> None:
        """Anew: the first evaluation brings columns of its own."""
        assert self.folder is not None
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with (self.folder / TABLE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if self.columns:
                writer.writeheader()
            writer.writerows(self.rows)
