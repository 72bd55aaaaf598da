"""The text that the small language models learn: docstrings of installed packages.

The sources are read and parsed, never imported, so what is gathered depends on the releases alone
(`versions`). A file is wholly trained on or wholly held out, and no paragraph comes twice.
"""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Name -> (the package, its licence).
LIBRARIES = {
    "networkx": ("networkx", "BSD-3-Clause"),
    "numpy": ("numpy", "BSD-3-Clause"),
    "python": ("", "PSF-2.0"),  # the standard library
    "scikit-learn": ("sklearn", "BSD-3-Clause"),
    "scipy": ("scipy", "BSD-3-Clause"),
    "sympy": ("sympy", "BSD-3-Clause"),
    "torch": ("torch", "BSD-3-Clause"),
}
TESTS = re.compile(r"tests?|_?testing|idlelib|lib2to3|turtledemo|(?:site|dist)-packages|test_.*")
ROLE = re.compile(r":(?:\w+:)?(\w+):`(?:[^`<]*<)?([~!]?)([^`<>]+)>?`")
# Prompts, directives, underlines, tables, formulas and addresses.
NOT_PROSE = re.compile(r">>>|\.\. |[-=~^*#+|]{3}|\$ |[{}\\|]|:math:|https?:")


@dataclass(frozen=True)
class Docstring:
    library: str
    path: str  # of the file, in the library
    text: str  # dedented

    @property
    def held_out(self) -> bool:
        """One file in ten."""
        return zlib.crc32(f"{self.library}/{self.path}".encode()) % 10 == 0


@functools.cache
def docstrings() -> tuple[Docstring, ...]:
    """In the order of libraries, paths and lines. No text comes twice."""
    found: dict[str, Docstring] = {}
    for library, (package, _) in LIBRARIES.items():
        paths = sysconfig.get_paths()
        root = Path(paths["purelib"]) / package if package else Path(paths["stdlib"])
        for path in sorted(root.rglob("*.py"), key=Path.as_posix):
            name = path.relative_to(root)
            if any(TESTS.fullmatch(part) for part in name.with_suffix("").parts):
                continue
            for text in _docstrings(path):
                found.setdefault(text, Docstring(library, name.as_posix(), text))
    return tuple(found.values())


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in string literals
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.isascii():
                yield inspect.cleandoc(text)


@functools.cache
def prose() -> tuple[tuple[Docstring, tuple[str, ...]], ...]:
    """The paragraphs of prose of every docstring, with their markup. None comes twice."""
    seen: set[str] = set()
    result = []
    for docstring in docstrings():
        paragraphs = []
        for block in re.split(r"\n\s*\n", docstring.text):
            paragraph = " ".join(block.split())
            if is_prose(plain(paragraph)) and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            result.append((docstring, tuple(paragraphs)))
    return tuple(result)


@functools.cache
def all_sentences() -> tuple[tuple[Docstring, str], ...]:
    """Whole sentences of any part of a docstring, with their markup. None comes twice."""
    found: dict[str, Docstring] = {}
    for docstring in docstrings():
        for block in re.split(r"\n\s*\n", docstring.text):
            for sentence in sentences(" ".join(block.split())):
                text = plain(sentence)
                whole = 25 <= len(text) <= 300 and text[0].isupper() and text[-1] in ".!?"
                if whole and not NOT_PROSE.search(text) and " : " not in text:
                    found.setdefault(sentence, docstring)
    return tuple((docstring, sentence) for sentence, docstring in found.items())


def is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph) >= 40
        and letters >= 0.85 * len(paragraph)
        and paragraph[0].isupper()
        and paragraph[-1] in ".:!?"
        and not NOT_PROSE.search(paragraph)
        and not re.match(r"\w+ : |[A-Z]\w+:", paragraph)
    )


def sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)


def plain(text: str) -> str:
    """Without reStructuredText's markup."""
    return spans(text)[0]


def spans(text: str) -> tuple[str, list[tuple[int, int, str]]]:
    """Text without markup, and (start, end, role) of what stood in roles."""
    pieces, found, size, last = [], [], 0, 0
    for match in ROLE.finditer(text):
        before = _unquoted(text[last : match.start()])
        role, mark, name = match.groups()
        name = name.rpartition(".")[2] if mark == "~" else name
        name = name.strip().removesuffix("()")
        found.append((size + len(before), size + len(before) + len(name), role))
        pieces += [before, name]
        size += len(before) + len(name)
        last = match.end()
    return "".join([*pieces, _unquoted(text[last:])]), found


def _unquoted(text: str) -> str:
    return re.sub(r"`|(?<!\w)\*{1,2}(?=\w)|(?<=\w)\*{1,2}(?!\w)", "", text)


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    text: str


@functools.cache
def parameters() -> tuple[tuple[Docstring, tuple[Parameter, ...]], ...]:
    """What a docstring says of a function's parameters: numpydoc's sections "Parameters" and
    Google's "Args:". No entry comes twice.
    """
    seen: set[Parameter] = set()
    result = []
    for docstring in docstrings():
        entries = []
        for name, kind, text in [*_numpydoc(docstring.text), *_google(docstring.text)]:
            text = plain(sentences(" ".join(text.split("\n\n")[0].split()))[0])
            entry = Parameter(name, plain(kind).strip().removesuffix(","), text)
            if 12 <= len(text) <= 160 and 2 <= len(entry.type) <= 60 and entry not in seen:
                seen.add(entry)
                entries.append(entry)
        if entries:
            result.append((docstring, tuple(entries)))
    return tuple(result)


def _numpydoc(text: str) -> list[tuple[str, str, str]]:
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n-{3,}|\Z)", text, re.M | re.S)
    entry = r"^(\w+) ?: ([^\n]+)\n((?:[ ]{2,}[^\n]*\n?|\n(?=[ ]{2}))+)"
    return re.findall(entry, section[1], re.M) if section else []


def _google(text: str) -> list[tuple[str, str, str]]:
    section = re.search(r"^Args:\n((?:[ ]+[^\n]*\n?|\n)+)", text, re.M)
    entry = r"^ {2,4}(\w+) \(([^()\n]+)\): ((?:[^\n]+\n?)(?:[ ]{6,}[^\n]*\n?)*)"
    return re.findall(entry, section[1], re.M) if section else []


def versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name) if package else platform.python_version()
        for name, (package, _) in LIBRARIES.items()
    }


def sources() -> dict[str, object]:
    """What the facts of a checkpoint say of its text."""
    text = "\0".join(docstring.text for docstring in docstrings())
    return {
        "name": "docstrings of installed packages",
        "gathered_by": "training_scripts/documentation.py",
        "versions": versions(),
        "licences": {name: licence for name, (_, licence) in LIBRARIES.items()},
        "held_out": "every docstring of one file in ten: crc32 of 'library/path' % 10 == 0",
        "num_docstrings": len(docstrings()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
