"""Where a checkpoint comes from: `"hf-hub:org/name@main"`, `"local-dir:folder"`, a file, a URL.

A source is a value: parsing one touches no network, and `parse_source(str(source)) == source`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from mlx_zoo.errors import DownloadError

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".index.json")

# What browsers call a trustworthy origin: plain http may not leave the machine.
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]{0,254}")
_SHA256 = re.compile(r"[0-9a-f]{8,64}")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z.]+$")  # resnet18-f37072fd.pth


@dataclass(frozen=True)
class HubSource:
    """A repository on the Hugging Face hub, at a branch, tag or commit (None: as pinned)."""

    repo: str
    revision: str | None = None

    def __post_init__(self) -> None:
        bad = "--" in self.repo or ".." in self.repo or self.repo.endswith(".git")
        if bad or not _REPO.fullmatch(self.repo):
            raise ValueError(f"{self.repo!r} is not a hub repository: expected org/name")
        if self.revision is not None and (
            ".." in self.revision or not _REVISION.fullmatch(self.revision)
        ):
            raise ValueError(f"{self.revision!r} is not a branch, tag or commit of {self.repo}")

    def __str__(self) -> str:
        return f"hf-hub:{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class DirectorySource:
    """A local folder with a checkpoint and, for a self-contained one, its config.json.

    `path` is absolute where `parse_source` made it.
    """

    path: Path

    def __str__(self) -> str:
        return f"local-dir:{self.path}"


@dataclass(frozen=True)
class FileSource:
    """A local checkpoint file. `path` is absolute where `parse_source` made it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class UrlSource:
    """A file on the web. `sha256` is the whole hash, or its first 8 or more hex digits."""

    url: str
    sha256: str

    def __post_init__(self) -> None:
        if not is_permitted(self.url):
            raise ValueError(f"{self.url}: only https addresses are fetched")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(
                f"{self.url}: {self.sha256!r} is not a sha256; "
                "give 64 hex digits, or the first 8 or more"
            )

    def __str__(self) -> str:
        return f"{self.url}#sha256={self.sha256}"


Source = HubSource | DirectorySource | FileSource | UrlSource


def is_permitted(url: str) -> bool:
    """Whether `url` may be fetched: https, or http to this very machine."""
    parts = urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in LOOPBACK_HOSTS
    return bool(parts.hostname) and (parts.scheme == "https" or local)


def parse_source(text: str | os.PathLike[str], revision: str | None = None) -> Source | None:
    """Read where a checkpoint comes from.

    Args:
        text: `hf-hub:org/name[@revision]`, `org/name[@revision]`, `local-dir:path`, the path of a
            checkpoint, or an https URL with its hash. A `Path` is always local. A local path holds
            from then on, whatever directory the process changes to.
        revision: branch, tag or commit, for a hub repository alone.

    Returns:
        The source, or None for a bare name such as `resnet18`, which is the registry's to resolve.

    Raises:
        ValueError: the text cannot be a source.
        DownloadError: it names a local file or folder that does not exist.
    """
    if isinstance(text, os.PathLike):
        return _without_revision(_local(Path(text)), revision)
    if text.startswith("hf-hub:"):
        return _hub(text.removeprefix("hf-hub:"), revision)
    if text.startswith("local-dir:"):
        return _without_revision(_directory(text.removeprefix("local-dir:")), revision)
    if "://" in text:
        return _without_revision(_url(text), revision)
    if _looks_local(text):
        return _without_revision(_local(Path(text).expanduser()), revision)
    if "/" in text.partition("@")[0]:
        return _hub(text, revision)
    return None


def _hub(text: str, revision: str | None) -> HubSource:
    repo, at, written = text.partition("@")
    if at and revision not in (None, written):
        raise ValueError(f"{text} and revision={revision!r} name two revisions: give one")
    try:
        return HubSource(repo, written if at else revision)
    except ValueError as error:
        raise ValueError(
            f"{error}. A folder is written local-dir:{text}, a file ./{text}"
        ) from None


def _looks_local(text: str) -> bool:
    prefixes = ("./", "../", "/", "~", ".\\", "..\\")
    return (
        text.startswith(prefixes)
        or "\\" in text
        or Path(text).is_absolute()
        or text.endswith(CHECKPOINT_SUFFIXES)
        # A folder is not looked for: it would shadow the hub repository of the same name.
        or ("/" in text and os.path.isfile(text))
    )


def _local(path: Path) -> FileSource | DirectorySource:
    if path.is_dir():
        return DirectorySource(path.resolve())
    if not path.is_file():
        raise DownloadError(
            f"{path}: no such file or folder (looked in {Path.cwd()}); "
            "a hub repository is written hf-hub:org/name"
        )
    # A link keeps its own name, and its shards lie beside it: a hub's cache is made of links.
    return FileSource(path.parent.resolve() / path.name)


def _directory(text: str) -> DirectorySource:
    path = Path(text).expanduser()
    if not text or not path.is_dir():
        raise DownloadError(f"local-dir:{text}: no such folder (looked in {Path.cwd()})")
    return DirectorySource(path.resolve())


def _url(text: str) -> UrlSource:
    url, _, fragment = text.partition("#")
    in_name = _HASH_IN_NAME.search(PurePosixPath(unquote(urlsplit(url).path)).name)
    if fragment.startswith("sha256="):
        return UrlSource(url, fragment.removeprefix("sha256=").lower())
    if fragment:
        raise ValueError(f"{text}: expected #sha256=<hex> after the address, not #{fragment}")
    if not in_name:
        raise ValueError(
            f"{url} has no hash, so a changed file would not be noticed. "
            f"Give its sha256: {url}#sha256=<hex> "
            "(or a file name that ends in its first 8 digits, as torchvision's do: "
            "name-f37072fd.pth)"
        )
    return UrlSource(url, in_name[1])


def _without_revision(
    source: FileSource | DirectorySource | UrlSource, revision: str | None
) -> FileSource | DirectorySource | UrlSource:
    if revision is not None:
        raise ValueError(f"{source} has no revisions: leave out revision={revision!r}")
    return source
