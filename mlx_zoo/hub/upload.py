"""A converted folder -> a model repository on the hub, in one commit, by the hub's own client.

A commit replaces the one that was looked at before and no other; files of an earlier conversion
that the new one does not have go with it. A reader sees the old network or the new one, never a
part. What was uploaded before a connection broke, or a process was killed, is not sent again.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import urlsplit

from mlx_zoo.errors import UploadError
from mlx_zoo.hub import asking
from mlx_zoo.hub.cache import MANIFEST
from mlx_zoo.hub.repository import check_endpoint, hub_endpoint
from mlx_zoo.hub.source import HubSource, is_permitted

log = logging.getLogger("mlx_zoo")

EMPTY = {".gitattributes", "README.md"}  # what a repository may have in which nothing is
# What not every conversion writes: of an earlier one it may be left over.
SOME = (
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("verification.json", "fingerprint.safetensors", "report.json", "report.html"),
    "preprocessing.json",
)
# Seconds without progress; a hub takes its time over a large commit. (The client waits for ever.)
TIMEOUTS = {"connect": asking.TIMEOUT, "pool": None, "write": 60.0, "read": 300.0}


def check_target(repo: str, local_files_only: bool = False) -> None:
    """Raise before any work is done for an upload that cannot succeed.

    ValueError for what is no `org/name`; UploadError without network or without a token.
    """
    from huggingface_hub import get_token

    if "/" not in HubSource(repo).repo:
        raise ValueError(f"upload_repo={repo!r}: org/name is needed")
    if asking.is_offline(local_files_only):
        raise UploadError(f"{repo}: nothing is uploaded while the network is off")
    check_endpoint(hub_endpoint())
    if get_token() is None:
        raise UploadError(
            f"{repo}: there is no token of the hub here: run `hf auth login`, or set HF_TOKEN, "
            "with one that may write"
        )


def upload(folder: Path, repo: str, *, private: bool = False) -> str:
    """Make a model repository hold what a converted folder holds; returns the commit's address.

    The repository is made where there is none. Transient failures are tried again, from where they
    happened.

    Raises:
        UploadError: whatever the hub or the network refuses; a repository that holds something
            else, or is public where `private` is wished. The folder stays as it is.
        ValueError: `repo` is no `org/name`.
    """
    check_target(repo)
    pauses = iter(asking.BACKOFF)
    while True:
        try:
            with _bars_on_a_terminal(), _watched_requests(hub_endpoint()):
                return _commit(folder, repo, private)
        except UploadError as error:
            raise UploadError(f"{error}{_again(folder, repo, private)}") from error
        except (
            Exception
        ) as error:  # of any kind: the client and its transports raise what they like
            pause = next(pauses, None)
            if pause is None or not _is_transient(error):
                raise UploadError(
                    f"{repo}: {_explain(error)}{_again(folder, repo, private)}"
                ) from error
            log.info("%s: %s; trying again", repo, error)
            sleep(pause)


def _commit(folder: Path, repo: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=hub_endpoint())
    api.create_repo(repo, private=private or None, exist_ok=True)
    info = api.model_info(repo, timeout=asking.TIMEOUT)
    there = {str(file.rfilename) for file in info.siblings or ()}
    if private and info.private is False:
        raise UploadError(f"{repo} exists and is public, private=True was asked for")
    if there - EMPTY and MANIFEST not in there:
        others = ", ".join(sorted(there - EMPTY)[:3])
        raise UploadError(
            f"{repo} holds something that mlx_zoo has not written ({others}): name a new repository"
        )
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    left_over = sorted(
        name for name in there - files.keys() if any(fnmatch(name, other) for other in SOME)
    )
    done = api.create_commit(
        repo,
        [
            *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in left_over),
            *(CommitOperationAdd(name, path) for name, path in files.items()),
        ],
        commit_message="Converted by mlx_zoo",
        parent_commit=info.sha,
    )
    return str(done.commit_url)


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Within, the client draws its progress bars on a terminal, and none in a pipe."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


@contextmanager
def _watched_requests(endpoint: str) -> Iterator[None]:
    """Within, files are put to https addresses, or to the hub that the user configured.

    Nor does a request wait for ever.
    """
    from huggingface_hub.utils import get_session

    hub = urlsplit(endpoint)

    def check(request: Any) -> None:
        url = urlsplit(str(request.url))
        stays = (url.scheme, url.netloc) == (hub.scheme, hub.netloc)
        if request.method == "PUT" and not (stays or is_permitted(str(request.url))):
            raise UploadError(f"{endpoint} asks for files to be put to {request.url}: refused")
        request.extensions["timeout"] = TIMEOUTS

    hooks = get_session().event_hooks["request"]
    hooks.append(check)
    try:
        yield
    finally:
        hooks.remove(check)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from: the client wraps those of its threads."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _is_transient(error: Exception) -> bool:
    return any(asking.is_transient(cause) for cause in _chain(error))


def _explain(error: Exception) -> str:
    """What one of the client's errors means for who wants to upload."""
    refused = next((e for e in _chain(error) if isinstance(e, UploadError)), None)
    if refused is not None:
        return str(refused)
    status = next(
        (
            s
            for e in _chain(error)
            if (s := getattr(getattr(e, "response", None), "status_code", 0))
        ),
        None,
    )
    if status == 401:
        return (
            "the hub does not know this token: run `hf auth login`, or set HF_TOKEN, with another"
        )
    if status in (403, 404):
        return (
            "this token may not write there: make one with the right to write, for an account or "
            "organisation that is yours"
        )
    if status in (409, 412):
        return "somebody else has changed the repository meanwhile"
    text = str(next(reversed([*_chain(error)]))).strip().splitlines() or [type(error).__name__]
    if status == 429:
        return f"too many requests ({text[0]}): wait a few minutes"
    return text[0].rstrip(" .:")


def _again(folder: Path, repo: str, private: bool) -> str:
    words = ["hf", "upload", repo, str(folder), ".", *(["--private"] if private else [])]
    return f". Nothing is lost: {shlex.join(words)} uploads {folder} again"
