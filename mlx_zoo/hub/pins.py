"""What was learnt about a hub repository, in `<cache>/pins/org--name.json`.

    revisions    branch or tag -> the commit it stood for
    commits      commit -> its `files` (names, or null: never asked) and those that were `verified`
                 (name -> sha256, with the size and time that the file had then); its `license`

It saves questions and hashing, so a damaged record is not believed, and one that cannot be written
is no error.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_zoo.hub.answers import is_hash
from mlx_zoo.hub.keeping import cannot_keep

log = logging.getLogger("mlx_zoo")


@dataclass(frozen=True)
class Pins:
    """The record of one repository. It is read anew each time: other processes write it too."""

    path: Path
    repo: str

    def commit_of(self, branch: str) -> str | None:
        return self._read()["revisions"].get(branch)

    def files_of(self, commit: str) -> list[str] | None:
        return self._row(commit).get("files")

    def license_of(self, commit: str) -> str | None:
        found = self._row(commit).get("license")
        return found if isinstance(found, str) else None

    def verified_sha256(self, commit: str, name: str, path: Path) -> str | None:
        """The sha256 that was found for the file at `path`, unless it has changed since."""
        seen = self._row(commit).get("verified", {}).get(name)
        if not isinstance(seen, dict) or not _stamp(path).items() <= seen.items():
            return None
        return seen.get("sha256")

    def record(
        self,
        commit: str,
        *,
        branch: str | None = None,
        files: list[str] | None = None,
        license: str | None = None,
        verified: tuple[str, Path, str] | None = None,
    ) -> None:
        """Add what was learnt; `verified` is a file's name, its path and its sha256."""
        pins = self._read()
        if branch is not None:
            pins["revisions"][branch] = commit
        row = pins["commits"].setdefault(commit, {"files": None, "verified": {}})
        if files is not None:
            row |= {"files": files, "license": license}
        if verified is not None:
            name, path, sha256 = verified
            row["verified"][name] = {"sha256": sha256, **_stamp(path)}
        self._write(pins)

    def _row(self, commit: str) -> dict[str, Any]:
        return self._read()["commits"].get(commit, {})

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            pins = json.loads(self.path.read_text(encoding="utf-8"))
            revisions, commits = pins["revisions"], pins["commits"]
            if not all(is_hash(commit) for commit in (*revisions.values(), *commits)):
                raise ValueError("not every commit is one")
            if not all(
                isinstance(row["files"], list | None) and isinstance(row["verified"], dict)
                for row in commits.values()
            ):
                raise ValueError("not a record of files")
            return {"revisions": revisions, "commits": commits}
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
            log.warning("%s is not used: %s", self.path, e)
        return {"revisions": {}, "commits": {}}

    def _write(self, pins: dict[str, dict[str, Any]]) -> None:
        part = self.path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"repo": self.repo, **pins}, indent=1)
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.path)
        except OSError as error:
            cannot_keep(self.path.parent.parent, error)
            with suppress(OSError):
                part.unlink()


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    # The time of the last change, which nobody can set back.
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
