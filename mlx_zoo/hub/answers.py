"""What a server answers, checked before anything acts on it: headers, waits, sizes and bodies."""

from __future__ import annotations

import errno
import logging
import math
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlx_zoo.errors import DownloadError, IntegrityError
from mlx_zoo.hub.source import is_permitted

log = logging.getLogger("mlx_zoo")

LONGEST_WAIT = 60.0  # seconds; a server that asks for more (Retry-After) gets no retry
SMALL_BODY = 65536  # bytes; a body this short is looked at before it is written

_HASH = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
_RATE_LIMIT = re.compile(r"r=0;t=(\d+)")
_HTML = "an HTML page instead of the file: a login page or a proxy's, or a wrong address"
_POINTER = "a git-lfs pointer instead of the file: run `git lfs pull` where it was cloned"


def is_hash(text: str) -> bool:
    """Whether `text` can be a commit or an ETag: 40 or 64 hex digits, harmless as a file name."""
    return bool(_HASH.fullmatch(text))


def check_commit(commit: str | None, url: str) -> str:
    """The commit, in lower case."""
    if commit is None or not is_hash(commit):
        raise DownloadError(f"{url}: {commit!r} is not a commit (40 or 64 hex digits); refused")
    return commit.lower()


def check_etag(etag: str, url: str) -> None:
    if not is_hash(etag):
        raise DownloadError(
            f"{url}: the ETag {etag!r} is not a hash (40 or 64 hex digits); refused, as it would "
            "become a path"
        )


def check_redirect(address: str, target: str) -> None:
    """Raise DownloadError for a way that leads away from https, or from a hub without it."""
    downgrade = address.startswith("https:") and not target.startswith("https:")
    one, other = urlsplit(address), urlsplit(target)
    stays = (one.scheme, one.netloc) == (other.scheme, other.netloc)
    if downgrade or not (stays or is_permitted(target)):
        raise DownloadError(f"{address} redirects to {target}: only https addresses are fetched")


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait; the header holds seconds or a date.

    The hub says so in a header of its own, too: `RateLimit: "api";r=0;t=55`.
    """
    value = (headers.get("Retry-After") or "").strip()
    if limit := _RATE_LIMIT.search(headers.get("RateLimit") or ""):
        value = limit[1]
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):  # no header, or neither form
        return None


def check_wait(seconds: float | None, url: str) -> None:
    if seconds is not None and seconds > LONGEST_WAIT:
        raise DownloadError(f"{url}: the server asks to wait {seconds:.0f} s; try again after that")


def check_space(size: int, folder: Path) -> None:
    """Raise OSError for a body that does not fit. (The client only warns, and fills the disk.)"""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size:,} bytes are needed, {free:,} are free", str(folder))


def placeholder(content: Path | bytes) -> str | None:
    """What stands in the place of a file, if its first bytes show it."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            content = file.read(512)
    start = content.lstrip()[:64].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return _HTML
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return _POINTER
    return None


def discard(path: Path) -> None:
    """Delete a file that failed a check: in the client's cache its links, and the blob, too."""
    chain = [path]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / chain[-1].readlink())
    try:
        for link in chain:
            link.unlink(missing_ok=True)
    except OSError as error:
        raise IntegrityError(
            f"{path} is damaged and cannot be deleted ({error}): delete it by hand"
        ) from error


_NOT_OURS = object()
_ours: ContextVar[Any] = ContextVar("_ours", default=_NOT_OURS)  # the commit that is asked for


@contextmanager
def watched_client(commit: str | None = None) -> Iterator[None]:
    """Within, the client's HTTP session refuses what its next step would trust.

    The client makes file names out of ETags and commits, waits as long as a Retry-After says, and
    writes any body of the right length. It asks for headers again that were checked before, so
    each answer is looked at. The session is the user's as well: their own calls are left alone.
    What the client warns of is a note here: the error says it if it comes to that.
    """
    from huggingface_hub.utils import get_session

    for name in ("file_download", "utils._http"):
        logging.getLogger(f"huggingface_hub.{name}").addFilter(_note)
    hooks = get_session().event_hooks["response"]
    if _check_answer not in hooks:
        hooks.append(_check_answer)
    token = _ours.set(commit)
    try:
        yield
    finally:
        _ours.reset(token)


def _note(record: logging.LogRecord) -> bool:
    """Whether the client may say this itself."""
    if _ours.get() is _NOT_OURS:
        return True
    log.info("%s", record.getMessage())
    return False


def _check_answer(response: Any) -> None:
    if (wanted := _ours.get()) is _NOT_OURS:
        return
    url, headers = str(response.url), response.headers
    if (commit := headers.get("X-Repo-Commit")) is not None:
        check_commit(commit, url)
        if wanted not in (None, commit):
            raise DownloadError(f"{url} answers for another commit, {commit}, not {wanted}")
    if response.status_code >= 400 and (wait := retry_after(headers)) is not None:
        check_wait(wait, url)
        headers["Retry-After"] = str(math.ceil(wait))  # the client does not read dates
    redirects = response.has_redirect_location
    if redirects:
        check_redirect(url, str(response.url.join(headers["Location"])))
    if response.status_code >= 300 and not redirects:
        return
    if response.request.method == "HEAD":
        _check_head(response)
    elif not redirects:
        _check_body(response)


def _check_head(response: Any) -> None:
    url, headers = str(response.url), response.headers
    if response.has_redirect_location and "X-Linked-ETag" not in headers:
        target = response.url.join(headers["Location"])
        if target.host == response.url.host:
            return  # a renamed repository's: the ETag comes from its new address
    if etag := headers.get("X-Linked-ETag") or headers.get("ETag"):
        check_etag(etag.removeprefix("W/").strip('"'), url)


def _check_body(response: Any) -> None:
    headers, looks = response.headers, None
    length = headers.get("Content-Length", "")
    if headers.get("Content-Type", "").startswith("text/html"):
        looks = _HTML
    elif length.isdigit() and int(length) <= SMALL_BODY and response.status_code == 200:
        looks = placeholder(response.read())
    if looks:
        raise DownloadError(f"{response.url} answers with {looks}")
