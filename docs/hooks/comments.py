"""Docstrings as they are written here, for the site.

The fields of a dataclass are described by the comments beside them, and what is set out in columns
stays in columns.
"""

from __future__ import annotations

import re

import griffe

COLUMNS = re.compile(r"\S {2,}\S")


class Comments(griffe.Extension):
    """What stands beside a field, or above it, is its description."""

    def on_class(self, *, cls: griffe.Class, **kwargs) -> None:
        fields = [a for a in cls.attributes.values() if a.annotation and not a.docstring]
        if cls.docstring and (told := [(a.name, text) for a in fields if (text := comment(a))]):
            lines = "".join(f"\n    {name}: {text}" for name, text in told)
            cls.docstring.value += f"\n\nAttributes:{lines}"

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(in_columns, paragraphs))


def comment(field: griffe.Attribute) -> str:
    """Of the last of its lines, or of those before the first."""
    lines = field.lines_collection[field.filepath]
    beside = lines[field.endlineno - 1].partition("  # ")[2]
    above = []
    for line in reversed(lines[: field.lineno - 1]):
        if beside or not line.strip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    return beside or " ".join(above)


def in_columns(paragraph: str) -> str:
    """A paragraph as it is, or between fences where its lines make a table."""
    lines = paragraph.splitlines()
    if sum(bool(COLUMNS.search(line)) for line in lines) < 2 or lines[0].startswith(" "):
        return paragraph
    return f"```text\n{paragraph}\n```"
