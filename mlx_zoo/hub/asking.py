"""Asking a server: transient failures are retried, the rest becomes an error of `mlx_zoo.errors`.

The client and its transports raise what they like. Errors of the transport are known by name: it
is httpx in the client's first major version, httpx2 in its second.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import TypeVar
from urllib.parse import urlsplit

from mlx_zoo.errors import (
    DownloadError,
    FileNotInRepository,
    GatedRepository,
    IntegrityError,
    MLXZooError,
    NotCached,
    RepositoryNotFound,
    RevisionNotFound,
)
from mlx_zoo.hub.answers import check_wait, retry_after
from mlx_zoo.hub.keeping import DISK_FULL
from mlx_zoo.hub.source import Source

BACKOFF = (0.5, 1.0, 2.0)  # seconds before each retry, unless the server asks for another wait
TIMEOUT = 10.0  # seconds without a byte

_RETRIED_BY_CLIENT = {
    "ConnectError",
    "TimeoutException",
    "RemoteProtocolError",
    "LocalEntryNotFoundError",
}

log = logging.getLogger("mlx_zoo")
_T = TypeVar("_T")


class Truncated(Exception):
    """A body that ends before the length its server announced."""


def ask(
    action: Callable[[], _T],
    source: Source,
    url: str,
    folder: Path,
    client_retries: bool = False,
) -> _T:
    """Run a network call that stores in `folder`; `source` and `url` are for messages.

    client_retries: the call retries on its own whatever cannot connect, stalls or breaks off, so
    only what it lets through (resets, 5xx) is retried here.
    """
    pauses = iter(BACKOFF)
    while True:
        try:
            return action()
        except MLXZooError:
            raise
        except Exception as error:  # of any kind: none of it may escape
            pause = next(pauses, None)
            given_up = client_retries and _RETRIED_BY_CLIENT & kinds(error)
            if pause is None or given_up or not is_transient(error):
                raise _explain(error, source, url, folder) from error
            wait = retry_after(getattr(getattr(error, "response", None), "headers", {}))
            check_wait(wait, url)
            log.info("%s: %s; trying again", url, error)
            sleep(pause if wait is None else wait)


def is_offline(local_files_only: bool) -> bool:
    """Whether nothing may be asked. The environment counts as it is now, not only at import."""
    from huggingface_hub import constants

    wished = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return local_files_only or wished or constants.HF_HUB_OFFLINE


def not_cached(source: Source, name: str) -> NotCached:
    """The error for what would have to be asked for."""
    return NotCached(
        f"{name} of {source} is not in the cache and the network is off. "
        f"Fetch it with the network on: mlx-zoo load {source}"
    )


def is_transient(error: BaseException | None) -> bool:
    """Whether the same question may be answered later."""
    from huggingface_hub.errors import HTTPError

    if error is None:
        return False
    if "LocalEntryNotFoundError" in kinds(error):
        return is_transient(error.__cause__)
    if (status := _status(error)) is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, HTTPError | Truncated)


def kinds(error: BaseException) -> set[str]:
    """The names of an error's classes."""
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(error: Exception, source: Source, url: str, folder: Path) -> Exception:
    """The error to raise for one of the client's or the transport's."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        return _explain(cause, source, url, folder)
    if refusal := _explain_refusal(error, source, url):
        return refusal
    if isinstance(error, errors.OfflineModeIsEnabled):
        return not_cached(source, url)
    if isinstance(error, Truncated):
        return IntegrityError(
            f"{url}: the body breaks off ({error}), again after {len(BACKOFF)} retries. "
            "Nothing was kept; check the connection and any proxy"
        )
    status = _status(error)
    if status is None and isinstance(error, OSError) and error.errno in DISK_FULL:
        return OSError(error.errno, f"{error.strerror}, fetching {url}", str(folder))
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return DownloadError(
            f"{url} cannot be stored: {error}. Make {folder} writable, or give another cache_dir"
        )
    return DownloadError(f"{url}: {_first_line(error)}. {_hint(error, status)}")


def _explain_refusal(error: Exception, source: Source, url: str) -> DownloadError | None:
    """The hub's refusals, each with what to do about it."""
    from huggingface_hub import errors

    parts = urlsplit(url)
    page = f"{parts.scheme}://{parts.netloc}/{getattr(source, 'repo', '')}"
    if isinstance(error, errors.GatedRepoError):
        return GatedRepository(
            f"{source} is gated: accept its licence at {page}, then run `hf auth login` "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RevisionNotFound(
            f"{source}: no such branch, tag or commit ({url}); {page}/tree/main lists them. "
            'If its history was rewritten, revision="main" takes what is there now'
        )
    if isinstance(error, errors.EntryNotFoundError) and _status(error) is not None:
        return FileNotInRepository(
            f"{source} has no such file: {url}; {page}/tree/main lists those it has"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error) == 401:
        return RepositoryNotFound(
            f"{source} does not exist, or is private ({url}): check the name, and for a private "
            "one run `hf auth login` (or set HF_TOKEN) with an account that may read it"
        )
    return None


def _hint(error: Exception, status: int | None) -> str:
    from huggingface_hub.errors import HTTPError

    if status == 403:
        return "The account or token in use may not read it: `hf auth login` with another"
    if status == 429:
        return "Too many requests: wait a few minutes; `hf auth login` raises the limit"
    if status is not None and status >= 500:
        return f"The server failed, again after {len(BACKOFF)} retries: try later"
    if status is not None:
        return "The address is wrong, or the file is gone"
    if isinstance(error, HTTPError):
        return "Check the connection, any proxy, and HF_ENDPOINT; what is cached loads without it"
    return "Nothing was kept; try again, and check any proxy between here and the server"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__} {lines[0]}".rstrip(" .:")
