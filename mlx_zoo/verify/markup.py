"""HTML and SVG out of Python values. Text is escaped where it becomes part of a page."""

from __future__ import annotations

from html import escape

ALONE = {"br", "hr", "meta"}  # HTML: have no end
EMPTY = {"circle", "line", "path", "rect", "use"}  # SVG: end where they begin


class Html(str):
    """What is markup already; any other string is text."""


def tag(name: str, /, *children: str | None, **attributes: object) -> Html:
    """An element with its children, text or markup; None is left out, as is an attribute of None.

    The names of attributes are written as in Python: `class_`, `aria_label`.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ALONE:
        return Html(f"<{name}{pairs}>")
    if name in EMPTY and not children:
        return Html(f"<{name}{pairs}/>")
    return Html(f"<{name}{pairs}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Text and markup, one after the other."""
    return Html("".join(x if isinstance(x, Html) else _text(x) for x in children if x is not None))


def _text(value: str) -> str:
    """Escaped. What cannot be seen, or turns a line around, or is half a pair, becomes a mark."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in value))
