"""A file behind an https address with a hash: streamed into `<cache>/downloads`, and hashed.

It gets its name there when its bytes are right, so a download that is killed leaves nothing that a
later one could take for whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_zoo.errors import DownloadError, IntegrityError
from mlx_zoo.hub.answers import check_redirect, check_space, discard, placeholder
from mlx_zoo.hub.asking import TIMEOUT, Truncated, ask, is_offline, kinds, not_cached
from mlx_zoo.hub.cache import cache_root, sha256_of, sweep
from mlx_zoo.hub.keeping import places_of, writable
from mlx_zoo.hub.source import UrlSource

MAX_REDIRECTS = 5

log = logging.getLogger("mlx_zoo")


def file_name(source: UrlSource) -> str:
    """The name of the file behind a URL."""
    return PurePosixPath(unquote(urlsplit(source.url).path)).name or "checkpoint"


def download(source: UrlSource, cache_dir: Path | None, local_files_only: bool) -> tuple[Path, str]:
    """The file behind a URL, and its sha256. A cached one is hashed before it is trusted."""
    folder = cache_root(cache_dir) / "downloads"
    name = f"{source.sha256[:8]}-" + re.sub(r"[^\w.-]", "_", file_name(source))
    for place in places_of(folder):
        path = place / name
        if path.is_file():
            found = sha256_of(path)
            if found.startswith(source.sha256):
                return path, found
            discard(path)
            log.warning("%s was damaged: deleted", path)
    if is_offline(local_files_only):
        raise not_cached(source, name)
    folder = writable(folder)
    path = folder / name
    sweep(folder, ".*.part")
    part = folder / f".{uuid.uuid4().hex}.part"
    try:
        for _ in range(2):
            found = ask(lambda: _stream(source.url, part), source, source.url, folder)
            if found.startswith(source.sha256):
                os.replace(part, path)
                return path, found
    finally:
        part.unlink(missing_ok=True)
    raise IntegrityError(
        f"{source.url}: the bytes have sha256 {found}, not {source.sha256}. Fetched twice, nothing "
        "was kept. Either a proxy alters the file or its publisher has replaced it: compare the "
        "hash with the one the publisher states"
    )


def _stream(url: str, part: Path) -> str:
    """GET `url` into the file `part`; returns the sha256 of what was written."""
    from huggingface_hub.errors import HTTPError

    with _open_url(url) as response, open(part, "wb") as file:
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else None
        if size is not None:
            check_space(size, part.parent)
        digest = hashlib.sha256()
        with _progress(PurePosixPath(urlsplit(url).path).name, size) as advance:
            try:
                for chunk in response.iter_bytes():
                    digest.update(chunk)
                    file.write(chunk)
                    advance(len(chunk))
            except HTTPError as error:
                if "RemoteProtocolError" in kinds(error):
                    raise Truncated(str(error)) from error
                raise
        if size is not None and response.num_bytes_downloaded != size:
            raise Truncated(f"{response.num_bytes_downloaded} of {size} bytes")
    if looks := placeholder(part):
        raise DownloadError(f"{url} answers with {looks}")
    return digest.hexdigest()


@contextmanager
def _open_url(url: str) -> Iterator[Any]:
    """A streaming GET, with redirects that never leave https."""
    from huggingface_hub.utils import get_session

    address = url
    for _ in range(MAX_REDIRECTS):
        with get_session().stream(
            "GET",
            address,
            follow_redirects=False,
            timeout=TIMEOUT,
            headers={"Accept-Encoding": "identity"},
        ) as response:
            if not response.has_redirect_location:
                response.raise_for_status()
                yield response
                return
            target = str(response.url.join(response.headers["Location"]))
        check_redirect(address, target)
        address = target
    raise DownloadError(f"{url} redirects more than {MAX_REDIRECTS} times")


@contextmanager
def _progress(name: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=size)
        yield lambda num_bytes: bar.advance(task, num_bytes)
