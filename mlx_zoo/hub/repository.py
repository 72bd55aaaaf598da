"""A repository on the Hugging Face hub: its commit, the names of its files, and their bytes.

A branch is resolved to a commit once, and pinned (`pins`): a later load needs no network and gets
the same weights even when the branch has moved. Passing `revision="main"` asks the hub again.

Files are downloaded by huggingface_hub and live in its own cache. They are hashed before anything
reads them, and a file that was verified is not hashed again while it keeps its size and time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlx_zoo.errors import DownloadError, IntegrityError
from mlx_zoo.hub.answers import (
    check_commit,
    check_etag,
    check_redirect,
    check_space,
    discard,
    is_hash,
    placeholder,
    watched_client,
)
from mlx_zoo.hub.asking import TIMEOUT, ask, is_offline, is_transient, not_cached
from mlx_zoo.hub.cache import cache_root
from mlx_zoo.hub.keeping import places_of, writable
from mlx_zoo.hub.pins import Pins
from mlx_zoo.hub.source import HubSource, is_permitted

log = logging.getLogger("mlx_zoo")
_LICENSE = re.compile(r"license:([\w.+-]{1,80})")
_T = TypeVar("_T")


def resolve_revision(
    source: HubSource, *, cache_dir: Path | None = None, local_files_only: bool = False
) -> str:
    """The commit that `source` stands for: as pinned, else as the hub says now, which pins it.

    A revision that the source names is asked for again, and pinned anew; when the hub cannot be
    reached, its last pin is used. Raises as `fetch.fetch_files` does.
    """
    return open_repository(source, cache_dir, local_files_only).resolve()


def open_repository(
    source: HubSource, cache_dir: Path | None, local_files_only: bool
) -> Repository:
    """The repository of `source`, at its revision. Asks nothing yet."""
    from huggingface_hub import constants

    root = cache_root(cache_dir)
    return Repository(
        source=source,
        endpoint=hub_endpoint(),
        cache=Path(constants.HF_HUB_CACHE) if cache_dir is None else root / "hub",
        pins=Pins(root / "pins" / f"{source.repo.replace('/', '--')}.json", source.repo),
        offline=is_offline(local_files_only),
    )


def hub_endpoint() -> str:
    """The address of the hub. Read now and handed to every call: the client reads it at import."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@dataclass(frozen=True)
class Repository:
    """A repository at the revision that is asked for, and where its bytes and pins are kept."""

    source: HubSource
    endpoint: str
    cache: Path  # huggingface_hub's folder
    pins: Pins
    offline: bool

    @property
    def repo(self) -> str:
        return self.source.repo

    # What there is

    def resolve(self) -> str:
        """The commit of the revision; see `resolve_revision`."""
        revision = self.source.revision
        if revision and is_hash(revision):
            return revision.lower()
        branch = revision or "main"
        pinned = self.pins.commit_of(branch)
        if self.offline:
            commit = pinned or self._client_ref(branch)
            if commit is None:
                raise not_cached(self.source, branch)
            return commit
        if pinned and revision is None:
            return pinned
        try:
            commit, known = self._ask_for_commit(revision)
        except DownloadError as error:
            if pinned is None or not is_transient(error.__cause__):
                raise
            log.warning("%s; using commit %s of %s, pinned earlier", error, pinned, self.repo)
            return pinned
        self.pins.record(commit, branch=branch, **known)
        return commit

    def license(self, commit: str) -> str | None:
        """What the repository's card says, if the hub was asked about that commit."""
        return self.pins.license_of(commit)

    def files_at_hand(self, commit: str, wanted: Iterable[str]) -> list[str]:
        """The names of a commit's files, or of those `wanted` that a cache without a list has."""
        files = self._list_files(commit)
        if files is None:
            files = [name for name in wanted if self._cached(commit, name)]
            if not files:
                raise not_cached(self.source, "weights")
        return files

    def has(self, commit: str, name: str) -> bool:
        found = self._look_up(commit, name)
        if found is not None:
            return isinstance(found, str)
        files = self._list_files(commit)
        if (
            files is None
        ):  # unknown is not missing: a pooling config that is skipped changes results
            raise not_cached(self.source, name)
        return name in files

    def _list_files(self, commit: str) -> list[str] | None:
        """The names of a commit's files; None if that was never asked and there is no network."""
        known = self.pins.files_of(commit)
        if known is not None or self.offline:
            return known
        _, known_now = self._ask_for_commit(commit)
        self.pins.record(commit, **known_now)
        return known_now["files"]

    def _ask_for_commit(self, revision: str | None) -> tuple[str, dict[str, Any]]:
        """One call: the commit of a revision; the names of its files, and its licence."""
        from huggingface_hub import HfApi

        api, url = HfApi(endpoint=self.endpoint), f"{self.endpoint}/api/models/{self.repo}"
        info = self._ask(lambda: api.model_info(self.repo, revision=revision, timeout=TIMEOUT), url)
        commit = check_commit(info.sha, url)
        if info.siblings is None:
            raise DownloadError(f"{self.endpoint} does not list the files of {self.source}")
        files = [str(sibling.rfilename) for sibling in info.siblings]
        found = (_LICENSE.fullmatch(str(tag)) for tag in info.tags or ())
        return commit, {"files": files, "license": next((tag[1] for tag in found if tag), None)}

    def _client_ref(self, branch: str) -> str | None:
        """The commit that another program of the user fetched through the same hub cache."""
        ref = self.cache / f"models--{self.repo.replace('/', '--')}" / "refs" / branch
        commit = ref.read_text().strip() if ref.is_file() else ""
        return commit.lower() if is_hash(commit) else None

    def _look_up(self, commit: str, name: str) -> Any:
        """A path (str) in the client's cache; None: not there; else known not to exist."""
        from huggingface_hub import try_to_load_from_cache

        found = [
            try_to_load_from_cache(self.repo, name, cache_dir=place, revision=commit)
            for place in places_of(self.cache)
        ]
        return next((path for path in found if isinstance(path, str)), found[0])

    def _cached(self, commit: str, name: str) -> Path | None:
        found = self._look_up(commit, name)
        return Path(found) if isinstance(found, str) else None

    # Its bytes

    def fetch(self, commit: str, name: str) -> tuple[Path, str]:
        """One file and its sha256, downloaded if need be and hashed unless it was before."""
        path = self._cached(commit, name)
        if path and (known := self.pins.verified_sha256(commit, name, path)):
            return path, known
        where = f"{name} of {self.repo} at {commit}"
        etag: str | None
        for retry in (True, False):
            if path is None:
                path, etag = self._download(commit, name)
            else:
                etag = self._promised_etag(commit, name, path)
            looks = None if name.endswith((".html", ".md")) else placeholder(path)
            found, matches = _hashes(path, etag)
            if matches and not looks:
                self.pins.record(commit, verified=(name, path, found))
                return path, found
            discard(path)
            if looks:
                raise DownloadError(f"{where} is {looks}")
            if self.offline:
                break
            if retry:
                log.warning("%s does not have the hash %s: deleted, fetched again", where, etag)
            path = None
        raise IntegrityError(
            f"{where}: the bytes have sha256 {found}, but the hub promises {etag}. "
            + (
                "The damaged file was deleted from the cache; load it once with the network on"
                if self.offline
                else "Fetched twice, nothing was kept: a proxy or a disk alters the file"
            )
        )

    def _promised_etag(self, commit: str, name: str, path: Path) -> str | None:
        """The ETag of a cached file: its blob's name, else asked for, which needs the network."""
        # One link away, as blobs may be links themselves.
        blob = Path(os.readlink(path)).name if path.is_symlink() else ""
        if is_hash(blob):
            return blob
        return None if self.offline else self._head(commit, name).etag

    def _download(self, commit: str, name: str) -> tuple[Path, str]:
        """Have the client fetch a file into its cache; returns its path there and its ETag."""
        from huggingface_hub import hf_hub_download

        if self.offline:
            raise not_cached(self.source, name)
        metadata = self._head(commit, name)
        folder = writable(self.cache)
        check_space(metadata.size or 0, folder)
        self._ask(
            lambda: hf_hub_download(
                self.repo, name, revision=commit, cache_dir=folder, endpoint=self.endpoint
            ),
            f"{self.endpoint}/{self.repo}/resolve/{commit}/{name}",
            commit,
            client_retries=True,
        )
        path = self._cached(commit, name)
        if path is None:
            raise DownloadError(f"{name} of {self.repo} is not in {folder} any more: try again")
        return path, metadata.etag

    def _head(self, commit: str, name: str) -> Any:
        """The hub's metadata of a file; its ETag and commit are hashes, or it is refused."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.repo, name, revision=commit, endpoint=self.endpoint)
        metadata = self._ask(
            lambda: get_hf_file_metadata(url, endpoint=self.endpoint, timeout=TIMEOUT), url, commit
        )
        if metadata.etag is None or metadata.commit_hash is None:
            raise DownloadError(
                f"{url}: the answer carries no ETag and commit, so it is not a hub's. "
                "Check HF_ENDPOINT and any proxy"
            )
        check_etag(metadata.etag, url)
        check_commit(metadata.commit_hash, url)
        check_redirect(url, metadata.location)
        return replace(metadata, etag=metadata.etag.lower())

    def _ask(
        self,
        action: Callable[[], _T],
        url: str,
        commit: str | None = None,
        client_retries: bool = False,
    ) -> _T:
        """`ask`, with every answer looked at before the client acts on it."""
        check_endpoint(self.endpoint)

        def watched() -> _T:
            # For each try: the client makes a new session when it likes.
            with watched_client(commit):
                return action()

        return ask(watched, self.source, url, self.cache, client_retries)


@once
def check_endpoint(endpoint: str) -> None:
    """The hub that the user configured may be one without https. Nothing else may."""
    if is_permitted(endpoint):
        return
    if urlsplit(endpoint).scheme != "http":
        raise DownloadError(f"HF_ENDPOINT={endpoint} is not the address of a hub: https://...")
    log.warning(
        "HF_ENDPOINT=%s: without https, others can read your token and alter files", endpoint
    )


def _hashes(path: Path, etag: str | None) -> tuple[str, bool]:
    """The sha256 of a file, and whether it is what its ETag says (sha256, or git's blob sha1)."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            if etag and len(etag) == 40:
                git.update(chunk)
    found = sha256.hexdigest()
    return found, etag in (None, found, git.hexdigest())
