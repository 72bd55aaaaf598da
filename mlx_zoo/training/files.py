"""Examples on the disk: folders of images, tables, lines of JSON, texts.

What is wrong with a file is said before anything is trained: in which file, and at which line.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_zoo.tasks.inputs import SUFFIXES
from mlx_zoo.training.examples import (
    GENERATION,
    IMAGES,
    LANGUAGE,
    Examples,
    check_example,
    digest_of,
    examples_of,
    input_and_target,
    task_of,
)

log = logging.getLogger("mlx_zoo")

TABLES = {".csv": ",", ".tsv": "\t"}
PARTS = {"train", "val", "valid", "validation", "dev", "test"}  # folders that are no classes


def of_path(path: Path, task: str | None) -> Examples:
    """What is at a path. ValueError where it is none of the kinds that are read here."""
    if path.is_dir():
        return _of_folder(path, task)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    kind = path.suffix.lower()
    if kind in TABLES:
        return _of_rows(path, _table(path, TABLES[kind]), task)
    if kind == ".jsonl":
        return _of_rows(path, _json_lines(path), task)
    if kind == ".txt":
        return _documents({path.name: _text(path)}, task, str(path))
    raise ValueError(f"{path}: a folder, .csv, .tsv, .jsonl or .txt is needed")


def _of_folder(folder: Path, task: str | None) -> Examples:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not _hidden(p))
    if classes and set(map(str.lower, classes)) <= PARTS and task in (None, IMAGES):
        raise ValueError(
            f"{folder} has the folders {', '.join(classes)}: give one of them as the training "
            "data, and another for evaluation"
        )
    files = _files(folder)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    if task in (None, IMAGES) and images:
        return _of_classes(folder, classes, images, len(files) - len(images))
    if task in (None, *LANGUAGE) and texts:
        found = {file.relative_to(folder).as_posix(): _text(file) for file in texts}
        return _documents(found, task, str(folder))
    wanted = "folders of images, one for each class" if task in (None, IMAGES) else ".txt files"
    raise ValueError(f"{folder}: {wanted} are needed, and none is there")


def _of_classes(folder: Path, classes: list[str], images: list[Path], others: int) -> Examples:
    """A folder of images for each class, and any folders in it; as torchvision's ImageFolder."""
    names = [image.relative_to(folder) for image in images]
    if loose := [name for name in names if len(name.parts) == 1]:
        raise ValueError(
            f"{folder / loose[0]} is in no folder of a class: {folder}/CLASS/image.jpg is needed"
        )
    targets = [name.parts[0] for name in names]
    if empty := sorted(set(classes) - set(targets)):
        raise ValueError(f"{folder / empty[0]}: no image is in the folder of this class")
    if others:
        log.warning("%s: %d files that are no images, by their names, are left out", folder, others)
    sizes = [
        (name.as_posix(), image.stat().st_size) for name, image in zip(names, images, strict=True)
    ]
    return Examples(
        IMAGES, images, targets, tuple(classes), digest_of(sizes), lambda i: str(images[i])
    )


def _files(folder: Path) -> list[Path]:
    """All that is below a folder and not hidden, sorted by path."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(place).resolve()
        folders[:] = sorted(
            name
            for name in folders  # a link to a folder that it is in would have no end
            if not name.startswith(".") and not here.is_relative_to(Path(place, name).resolve())
        )
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return [file for file in found if file.is_file()]


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"  # which Apple's archives bring


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table with a header: (where it is, column -> cell)."""
    limit = csv.field_size_limit(sys.maxsize)  # a text may be long
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(rows, [])]
            if not header:
                raise ValueError(f"{path} is empty: a header such as text,label is needed")
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: a name is twice in the header, {', '.join(header)}")
            for row in rows:
                place = f"{path}, line {rows.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{place}: {len(row)} cells, the header has {len(header)} "
                        f"({', '.join(header)})"
                    )
                yield place, dict(zip(header, row, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # of JSON, or of UTF-8
                raise ValueError(f"{place}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f'{place}: an object such as {{"text": ..., "label": ...}}')
            yield place, row


def _of_rows(
    path: Path, rows: Iterable[tuple[str, Mapping[str, Any]]], task: str | None
) -> Examples:
    """A table, or lines of JSON. Every row has what the first has."""
    places: list[str] = []
    inputs: list[Any] = []
    targets: list[Any] = []
    for place, row in rows:
        try:
            task = task or task_of(row)
            given, target = input_and_target(row, task)
            if task == IMAGES:
                given = path.parent / str(given)
                if not given.is_file():
                    raise ValueError(f"there is no file {given}")
            check_example(given, target, task)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        places.append(place)
        inputs.append(given)
        targets.append(target)
    if not places:
        raise ValueError(f"{path} has no examples: rows such as text,label are needed")
    assert task is not None
    digest = digest_of(*(map(str, inputs) if task == IMAGES else inputs), targets)
    return examples_of(task, inputs, targets, digest, places.__getitem__)


def _documents(texts: Mapping[str, str], task: str | None, where: str) -> Examples:
    """Plain texts, each a document."""
    if task not in (None, *LANGUAGE):
        raise ValueError(f"{where}: plain text has no labels; {task} needs a .csv or .jsonl file")
    names = [name for name, text in texts.items() if text.strip()]
    if not names:
        raise ValueError(f"{where}: there is no text in it")
    inputs = [texts[name] for name in names]
    return Examples(
        task or GENERATION, inputs, (), (), digest_of(inputs), lambda i: f"{where}: {names[i]}"
    )
