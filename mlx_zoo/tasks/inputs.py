"""Inputs that are on the disk: many, in a fixed order, and known again by a digest."""

from __future__ import annotations

import json
import os
import stat
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mlx_zoo.errors import MLXZooError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Folder:
    """The images in a folder and below it, sorted by their paths."""

    path: Path
    names: tuple[str, ...]  # relative to the folder
    digest: str  # of names, sizes, and when each was last written

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Folder:
        """Raises ValueError where there is no such folder, or no image in it."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder of images")

        def refuse(error: OSError) -> None:
            raise error

        states: dict[str, tuple[int, int] | None] = {}
        for place, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                    continue
                file = Path(place, name)
                try:
                    found = file.stat()
                except OSError:  # a link to nowhere: it will fail, and be told of
                    states[file.relative_to(folder).as_posix()] = None
                    continue
                if stat.S_ISREG(found.st_mode):  # a pipe would wait for a writer
                    state = found.st_size, found.st_mtime_ns
                    states[file.relative_to(folder).as_posix()] = state
        if not states:
            raise ValueError(f"{folder}: no image is there, by its name ({', '.join(SUFFIXES)})")
        names = sorted(states)
        text = json.dumps([(name, states[name]) for name in names])
        return cls(folder, tuple(names), sha256(text.encode()).hexdigest())

    @property
    def count(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Path]:
        return (self.path / name for name in self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def said(self, index: int, image: Path) -> str:
        """How its line in the output names an input."""
        return self.names[index]

    def reason(self, index: int, message: str) -> str:
        """A message about an input, wherever the folder is."""
        name = self.names[index]
        return message.replace(str(self.path / name), name).removeprefix(f"{name}: ")


@dataclass(frozen=True)
class Lines:
    """The lines of a file, each a text. They are never in memory all at once."""

    path: Path
    count: int
    digest: str  # of the file

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Lines:
        """Raises ValueError where there is no such file, or no line in it."""
        path = Path(path).expanduser()
        if not path.is_file():  # a pipe could not be read again
            raise ValueError(f"{path} is no file of texts, one a line")
        digest, count, last = sha256(), 0, b"\n"
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                count += chunk.count(b"\n")
                last = chunk[-1:]
        count += last != b"\n"  # the last line may have no end
        if not count:
            raise ValueError(f"{path} is empty: a text in every line is needed")
        return cls(path, count, digest.hexdigest())

    def __iter__(self) -> Iterator[str]:
        """Raises MLXZooError in the end, where the file was changed meanwhile."""
        digest = sha256()
        with self.path.open("rb") as file:
            for i, line in enumerate(file):
                digest.update(line)
                if i == 0:
                    line = line.removeprefix(BOM_UTF8)  # as Windows' editors begin a file
                # What is not UTF-8 becomes what no pipeline takes for text.
                yield line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="surrogateescape")
        if digest.hexdigest() != self.digest:
            raise MLXZooError(f"{self.path} was changed while it was read")

    def name(self, index: int) -> str:
        return f"line {index + 1}"

    def said(self, index: int, text: str) -> str:
        """How its line in the output names an input."""
        return text

    def reason(self, index: int, message: str) -> str:
        return message
