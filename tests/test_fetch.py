"""Fetching against a hub on 127.0.0.1: each fault has its promise, and no request is made in vain.

Numbers in the names are the rows of the fault matrix.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from faults import read_only, start
from hub_server import HTML, LocalHub, client_and_hub, git_sha1, sha256
from huggingface_hub import constants

import mlx_zoo
from mlx_zoo.errors import (
    CheckpointError,
    DownloadError,
    FileNotInRepository,
    GatedRepository,
    IntegrityError,
    MLXZooError,
    NotCached,
    RepositoryNotFound,
    RevisionNotFound,
)
from mlx_zoo.hub import answers, asking, download, fetch, repository
from mlx_zoo.hub.fetch import fetch_files, fetch_weights, resolve_revision
from mlx_zoo.hub.source import (
    DirectorySource,
    FileSource,
    HubSource,
    UrlSource,
    parse_source,
)

WEIGHTS = bytes(range(256)) * 64  # 16 kB: stored as LFS
CONFIG = b'{"hidden_size": 8}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16384\n"
SOURCE = HubSource("org/name")
BACKOFF = asking.BACKOFF


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository; the client's caches in tmp_path."""
    with client_and_hub(monkeypatch, tmp_path) as hub:
        hub.push("org/name", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
        yield hub


def files_in(folder: Path) -> list[str]:
    """Every file but the client's own bookkeeping: locks and the tag for backup programs."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return sorted(path.name for path in found if path.name not in ("CACHEDIR.TAG", ".gitignore"))


def at(revision: str) -> HubSource:
    return HubSource(SOURCE.repo, revision)


def url_source(hub: LocalHub, content: bytes = WEIGHTS, digits: int = 8) -> UrlSource:
    hub.plain["/models/net.pth"] = content
    return UrlSource(f"{hub.endpoint}/models/net.pth", sha256(WEIGHTS)[:digits])


# ----------------------------------------------------------------------------- what works


def test_weights_and_config_arrive_verified_at_the_commit(hub):
    commit = hub.branches["org/name"]["main"]
    fetched = fetch_weights(SOURCE)
    assert fetched.revision == commit
    assert fetched.files["model.safetensors"].read_bytes() == WEIGHTS
    assert fetched.sha256 == {"model.safetensors": sha256(WEIGHTS)}
    config = fetch_files(SOURCE, ["config.json"], optional=["vocab.txt"])
    assert set(config.files) == {"config.json"}
    assert config.files["config.json"].read_bytes() == CONFIG
    assert config.sha256["config.json"] == sha256(CONFIG)


def test_a_warm_load_makes_no_request_and_hashes_nothing(hub, monkeypatch):
    cold = fetch_weights(SOURCE)
    fetch_files(SOURCE, ["config.json"], optional=["vocab.txt"])
    hub.requests.clear()
    monkeypatch.setattr(repository, "_hashes", lambda *args: pytest.fail("hashed again"))
    assert fetch_weights(SOURCE) == cold
    fetch_files(SOURCE, ["config.json"], optional=["vocab.txt"])
    assert hub.requests == []


def test_cache_dir_holds_everything(hub, tmp_path):
    fetched = fetch_weights(SOURCE, cache_dir=tmp_path / "mine")
    assert fetched.files["model.safetensors"].is_relative_to(tmp_path / "mine" / "hub")
    assert (tmp_path / "mine" / "pins" / "org--name.json").is_file()
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "zoo").exists()


def test_cold_fetch_asks_the_api_once(hub):
    fetch_weights(SOURCE)
    fetch_files(SOURCE, ["config.json"], optional=["vocab.txt", "modules.json"])
    assert len([r for r in hub.requests if "/api/" in r]) == 1
    assert len(hub.gets("model.safetensors")) == 1


def test_shards_follow_their_index(hub):
    shards = {f"model-0000{i}-of-00002.safetensors": WEIGHTS + bytes([i]) for i in (1, 2)}
    index = json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(shards)}}).encode()
    hub.push(
        "org/big", {"model.safetensors.index.json": index, **shards, "pytorch_model.bin": b"x"}
    )
    fetched = fetch_weights(HubSource("org/big"))
    assert set(fetched.files) == {"model.safetensors.index.json", *shards}
    assert all(fetched.sha256[name] == sha256(content) for name, content in shards.items())
    folder = fetched.files["model.safetensors.index.json"].parent
    for local in (DirectorySource(folder), FileSource(folder / "model.safetensors.index.json")):
        assert fetch_weights(local).sha256 == fetched.sha256


def test_a_listed_shard_that_is_missing_is_named(hub):
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    hub.push("org/torn", {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(FileNotInRepository, match="model-00001-of-00001"):
        fetch_weights(HubSource("org/torn"))


def test_a_shard_outside_of_the_repository_is_refused(hub):
    index = {"weight_map": {"w": "../../x.safetensors"}}
    hub.push("org/evil", {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(CheckpointError):
        fetch_weights(HubSource("org/evil"))
    assert not [request for request in hub.requests if "x.safetensors" in request]


def test_local_folder_and_file(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "config.json").write_bytes(CONFIG)
    source = DirectorySource(tmp_path)
    assert set(fetch_weights(source).files) == {"pytorch_model.bin"}
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    fetched = fetch_weights(source)
    assert fetched.files == {"model.safetensors": tmp_path / "model.safetensors"}
    assert (fetched.revision, fetched.sha256) == ("", {"model.safetensors": sha256(WEIGHTS)})
    assert set(fetch_files(source, [], optional=["config.json", "vocab.txt"]).files) == {
        "config.json"
    }
    file = FileSource(tmp_path / "pytorch_model.bin")
    assert fetch_weights(file).files == {"pytorch_model.bin": tmp_path / "pytorch_model.bin"}
    assert fetch_files(file, [], optional=["config.json"]).files == {}
    with pytest.raises(FileNotInRepository, match=r"vocab\.txt"):
        fetch_files(source, ["vocab.txt"])


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotInRepository, match=r"model\.safetensors.*pytorch_model\.bin"):
        fetch_weights(DirectorySource(tmp_path))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "a\\b", "", "C:x", "a/./b"])
def test_names_stay_inside_the_repository(hub, tmp_path, name):
    for source in (SOURCE, DirectorySource(tmp_path)):
        with pytest.raises(ValueError, match="not the name of a file"):
            fetch_files(source, [name])
    assert hub.requests == []


# ----------------------------------------------------------------------------- rows 1-5


@pytest.mark.parametrize("kind", ["truncate", "stall"])
def test_row_1_a_broken_or_stalled_body_is_fetched_whole(hub, monkeypatch, kind):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fault("model.safetensors", kind)
    assert fetch_weights(SOURCE).files["model.safetensors"].read_bytes() == WEIGHTS
    assert len(hub.gets("model.safetensors")) == 2


def test_row_1_a_large_body_is_resumed_where_it_broke_off(hub, monkeypatch):
    large = bytes(22_000_000)
    hub.push("org/large", {"model.safetensors": large})
    hub.fault("model.safetensors", "truncate")
    fetched = fetch_weights(HubSource("org/large"))
    assert fetched.sha256["model.safetensors"] == sha256(large)
    (asked,) = hub.ranges
    assert 10**7 < int(asked.removeprefix("bytes=").removesuffix("-")) <= 11_000_000


def test_row_1_a_body_that_never_ends_whole_is_an_error(hub, tmp_path):
    hub.fault("model.safetensors", "truncate", times=99)
    with pytest.raises(DownloadError, match=r"/resolve/.*model\.safetensors"):
        fetch_weights(SOURCE)
    assert len(hub.gets("model.safetensors")) == 6  # the client's own five retries, and no more
    assert files_in(tmp_path / "hf") == []


@pytest.mark.parametrize("times", [1, 3])
def test_row_2_resets_are_retried_three_times(hub, times):
    hub.fault("model.safetensors", "reset", times=times)
    assert fetch_weights(SOURCE).files["model.safetensors"].read_bytes() == WEIGHTS
    assert len(hub.gets("model.safetensors")) == times + 1


def test_row_2_endless_resets_are_a_download_error(hub, tmp_path):
    hub.fault("model.safetensors", "reset", times=99)
    with pytest.raises(DownloadError, match=r"http://.*model\.safetensors.*[Cc]heck the conn"):
        fetch_weights(SOURCE)
    assert len(hub.gets("model.safetensors")) == 4
    assert files_in(tmp_path / "hf") == []


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("path", ["model.safetensors", "/api/models/org/name"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_row_3_server_errors_are_retried(hub, status, path, method):
    hub.fault(path, "status", times=3, status=status, methods=(method,))
    assert fetch_weights(SOURCE).files["model.safetensors"].read_bytes() == WEIGHTS


@pytest.mark.parametrize("path", ["model.safetensors", "/api/models/org/name"])
def test_row_3_a_server_that_stays_down_is_a_download_error(hub, tmp_path, path):
    hub.fault(path, "status", times=99, status=500, methods=("GET", "HEAD"))
    with pytest.raises(DownloadError, match=r"500.*try later") as caught:
        fetch_weights(SOURCE)
    assert type(caught.value) is DownloadError
    assert files_in(tmp_path / "hf") == []


@pytest.mark.parametrize("path", ["model.safetensors", "/api/models/org/name"])
def test_row_3_each_pause_is_longer(hub, monkeypatch, path):
    naps = []
    monkeypatch.setattr(asking, "sleep", naps.append)
    monkeypatch.setattr(asking, "BACKOFF", BACKOFF)
    hub.fault(path, "status", times=3, status=503)
    fetch_weights(SOURCE)
    assert naps == list(BACKOFF) == sorted(set(naps))
    assert min(naps) > 0


@pytest.mark.parametrize("path", ["model.safetensors", "/api/models/org/name"])
def test_row_4_retry_after_is_honoured(hub, monkeypatch, path):
    naps = []
    monkeypatch.setattr(asking, "sleep", naps.append)
    client = SimpleNamespace(sleep=naps.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time", client)
    hub.fault(path, "status", status=429, headers={"Retry-After": "7"})
    fetch_weights(SOURCE)
    assert naps in ([7], [8])  # the client adds a second of its own


def in_seconds(seconds: float) -> str:
    """A moment as HTTP writes it."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))


QUESTIONS = [  # each of the kinds of requests that a load makes
    ("/api/models/org/name", "GET"),
    ("model.safetensors", "HEAD"),
    ("model.safetensors", "GET"),
]


@pytest.mark.parametrize(("path", "method"), QUESTIONS)
@pytest.mark.parametrize(
    ("header", "value"),
    [("Retry-After", lambda: in_seconds(30)), ("RateLimit", lambda: '"api";r=0;t=30')],
)
def test_row_4_a_date_and_the_hub_s_own_header(hub, monkeypatch, path, method, header, value):
    naps = []
    monkeypatch.setattr(asking, "sleep", naps.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=naps.append))
    details = {"status": 429, "methods": (method,)}
    hub.fault(path, "status", headers={header: value()}, **details)
    fetch_weights(SOURCE)
    assert len(naps) == 1
    assert 20 < naps[0] <= 31


@pytest.mark.parametrize(("path", "method"), QUESTIONS)
@pytest.mark.parametrize(
    ("header", "value"),
    [("Retry-After", lambda: in_seconds(3600)), ("RateLimit", lambda: '"api";r=0;t=3600')],
)
def test_row_4_nobody_waits_until_then(hub, monkeypatch, path, method, header, value):
    monkeypatch.setattr(asking, "sleep", lambda seconds: pytest.fail("waited"))
    details = {"status": 429, "methods": (method,), "times": 9}
    hub.fault(path, "status", headers={header: value()}, **details)
    with pytest.raises(DownloadError, match=r"asks to wait 3[56]\d\d s; try again after"):
        fetch_weights(SOURCE)


def test_row_4_nobody_waits_for_an_hour(hub, monkeypatch):
    monkeypatch.setattr(asking, "sleep", lambda seconds: pytest.fail("waited"))
    for path in ("/api/models/org/name", "model.safetensors"):
        hub.fault(path, "status", status=429, headers={"Retry-After": "3600"})
        with pytest.raises(DownloadError, match="3600 s"):
            fetch_weights(SOURCE)


@pytest.mark.parametrize("by", [-100, 100])
def test_row_5_a_lying_content_length(hub, tmp_path, by):
    hub.fault("model.safetensors", "length", by=by, times=99)
    with pytest.raises(DownloadError, match=r"model\.safetensors"):
        fetch_weights(SOURCE)
    assert files_in(tmp_path / "hf") == []


# ----------------------------------------------------------------------------- rows 6-8


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("links", [True, False])  # a file system without symbolic links has copies
def test_row_6_a_flipped_byte_is_fetched_again_once(hub, monkeypatch, name, links):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    hub.fault(name, "flip")
    fetched = fetch_files(SOURCE, [name])
    expected = WEIGHTS if name == "model.safetensors" else CONFIG
    assert fetched.files[name].read_bytes() == expected
    assert fetched.files[name].is_symlink() == links
    assert len(hub.gets(name)) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_row_6_a_flipped_byte_that_stays_is_an_integrity_error(hub, tmp_path, name):
    hub.fault(name, "flip", times=99)
    with pytest.raises(IntegrityError, match="Fetched twice, nothing was kept"):
        fetch_files(SOURCE, [name])
    assert len(hub.gets(name)) == 2
    assert files_in(tmp_path / "hf") == []


def test_row_6_a_file_that_was_never_verified_is_hashed(hub):
    """Killed between download and hash: the client's cache holds it, our record does not."""
    path = fetch_weights(SOURCE).files["model.safetensors"]
    (Path(os.environ["MLX_ZOO_CACHE"]) / "pins" / "org--name.json").unlink()
    blob = path.resolve()
    blob.write_bytes(b"\0" + WEIGHTS[1:])
    assert fetch_weights(SOURCE).files["model.safetensors"].read_bytes() == WEIGHTS


def test_row_6_a_cached_file_that_changed_is_hashed_again(hub):
    path = fetch_weights(SOURCE).files["model.safetensors"]
    path.resolve().write_bytes(WEIGHTS[:-1])
    with pytest.raises(IntegrityError, match="load it once with the network on"):
        fetch_weights(SOURCE, local_files_only=True)
    assert fetch_weights(SOURCE).files["model.safetensors"].read_bytes() == WEIGHTS


@pytest.mark.parametrize(("body", "looks"), [(HTML, "HTML page"), (POINTER, "git-lfs pointer")])
@pytest.mark.parametrize("same_size", [False, True])
def test_row_7_something_else_in_the_place_of_the_file(hub, tmp_path, body, looks, same_size):
    if same_size:
        body = body + b"\n" * (len(WEIGHTS) - len(body))
    hub.fault("model.safetensors", "body", body=body, times=99)
    with pytest.raises(DownloadError, match=looks):
        fetch_weights(SOURCE)
    assert files_in(tmp_path / "hf") == []


@pytest.mark.parametrize("content_type", ["text/html", "application/octet-stream"])
def test_row_7_a_long_html_page(hub, tmp_path, content_type):
    body = HTML + b" " * 100_000
    hub.push("org/long", {"model.safetensors": bytes(len(body))})
    headers = {"Content-Type": content_type}
    hub.fault("model.safetensors", "body", body=body, times=9, headers=headers)
    with pytest.raises(DownloadError, match="HTML page"):
        fetch_weights(HubSource("org/long"))
    assert files_in(tmp_path / "hf") == []


def test_row_7_a_pointer_that_was_committed(hub, tmp_path):
    hub.push("org/pointer", {"model.safetensors": POINTER})
    with pytest.raises(DownloadError, match="git-lfs pointer"):
        fetch_weights(HubSource("org/pointer"))
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        fetch_weights(DirectorySource(tmp_path))


def test_row_7_an_html_page_instead_of_the_api(hub):
    hub.fault("/api/models/org/name", "body", times=9)
    with pytest.raises(DownloadError, match="HTML page"):
        fetch_weights(SOURCE)


HOSTILE = ["../../../../x", "/nowhere/x", "..", "C:x", "a" * 39, "g" * 40, "a" * 65]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("config.json", "ETag"),
        ("config.json", "X-Repo-Commit"),
        ("model.safetensors", "X-Linked-ETag"),
        ("model.safetensors", "X-Repo-Commit"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_row_8_hostile_headers_are_refused(hub, tmp_path, text, name, header, again):
    """Also when the headers are good as we look, and bad as the client asks for them again."""
    # A large file's HEAD is two requests: a redirect and its target.
    skip = 0 if not again else 1 if name == "config.json" else 2
    quoted = text if header == "X-Repo-Commit" else f'"{text}"'
    details = {"times": 99, "skip": skip, "methods": ("HEAD",)}
    hub.fault(name, "headers", headers={header: quoted}, **details)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DownloadError, match="refused"):
        fetch_files(SOURCE, [name])
    written = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {path.name for path in written} <= {"org--name.json"}
    assert hub.gets(name) == []


def test_row_8_the_headers_are_checked_without_the_hook_as_well(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_check_answer", lambda response: None)
    details = {"times": 99, "methods": ("HEAD",), "headers": {"ETag": '"../../../../x"'}}
    hub.fault("config.json", "headers", **details)
    with pytest.raises(DownloadError, match="refused"):
        fetch_files(SOURCE, ["config.json"])
    assert files_in(tmp_path) == ["org--name.json"]


@pytest.mark.parametrize("text", HOSTILE)
def test_row_8_a_hostile_commit_on_a_missing_file(hub, tmp_path, text):
    """The client would keep the file's absence in a folder of that name."""
    details = {"times": 99, "skip": 1, "methods": ("HEAD",), "status": 404}
    refusal = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": text}
    hub.fault("config.json", "status", headers=refusal, **details)
    with pytest.raises(DownloadError, match="refused"):
        fetch_files(SOURCE, ["config.json"])
    assert files_in(tmp_path) == ["org--name.json"]


@pytest.mark.parametrize("text", HOSTILE)
def test_row_8_a_hostile_commit_from_the_api(hub, tmp_path, text):
    hub.fault("/api/models/org/name", "headers", headers={"sha": text})
    with pytest.raises(DownloadError, match="refused"):
        fetch_weights(SOURCE)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("other", [lambda commit: "b" * 40, str.upper])
def test_row_8_another_commit_than_the_one_asked_for(hub, other, again):
    """The client would look for one under the name of the other from then on."""
    commit = {"X-Repo-Commit": other(hub.branches["org/name"]["main"])}
    fault = hub.fault(
        "config.json", "headers", headers=commit, methods=("HEAD",), skip=int(again), times=99
    )
    with pytest.raises(DownloadError, match="another commit"):
        fetch_files(SOURCE, ["config.json"])
    fault.times = 0
    assert fetch_files(SOURCE, ["config.json"]).sha256 == {"config.json": sha256(CONFIG)}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "target",
    [
        "http://example.com/x",
        "http://127.0.0.1.example.com/x",
        "//example.com/x",
        "ftp://example.com/x",
        "file:///etc/passwd",
        "http://[::1",
        "https://",
        "data:text/plain,x",
    ],
)
def test_row_8_a_hostile_location_is_refused(hub, tmp_path, target, again):
    """Also when the client, which asks again, is the first to get it."""
    details = {"times": 99, "skip": 2 * again, "methods": ("HEAD",)}
    hub.fault("model.safetensors", "headers", headers={"Location": target}, **details)
    with pytest.raises(DownloadError, match=r"only https|URL|protocol"):
        fetch_weights(SOURCE)
    assert hub.gets("model.safetensors") == []
    assert files_in(tmp_path) == ["org--name.json"]


@pytest.mark.parametrize("target", ["../../../../etc/passwd", "/x", ""])
def test_row_8_a_location_that_leads_nowhere(hub, tmp_path, target):
    details = {"times": 99, "methods": ("HEAD",)}
    hub.fault("model.safetensors", "headers", headers={"Location": target}, **details)
    with pytest.raises(DownloadError):
        fetch_weights(SOURCE)
    assert files_in(tmp_path) == ["org--name.json"]


def test_row_8_hostile_names_in_the_list_of_files(hub, tmp_path):
    """They are compared with the names that are looked for, and never become paths."""
    evil = {f"{up}x.safetensors": b"evil" for up in ("../../../", "/", "..\\", "C:", "a\n\033[2J")}
    hub.push("org/evil", {**evil, "../model.safetensors": b"evil", "model.safetensors": WEIGHTS})
    before = set(tmp_path.parent.rglob("x.safetensors"))
    fetched = fetch_weights(HubSource("org/evil"))
    assert fetched.sha256 == {"model.safetensors": sha256(WEIGHTS)}
    assert set(tmp_path.parent.rglob("x.safetensors")) == before
    assert len(hub.gets(".safetensors")) == 1
    hub.push("org/only", evil)
    with pytest.raises(FileNotInRepository, match="has no weights") as caught:
        fetch_weights(HubSource("org/only"))
    assert str(caught.value).isprintable()


def test_row_8_a_commit_in_capitals_is_the_same_commit(hub):
    first = fetch_weights(SOURCE)
    commit = first.revision
    hub.fault("/api/models/org/name", "headers", headers={"sha": commit.upper()}, times=9)
    assert fetch_weights(at("main")).revision == commit
    hub.requests.clear()
    assert fetch_weights(at(commit.upper())) == first
    assert hub.requests == []


def test_row_8_a_damaged_record_is_not_believed(hub, tmp_path):
    pins = tmp_path / "zoo" / "pins" / "org--name.json"
    fetch_weights(SOURCE)
    good = pins.read_text()
    for bad in (
        "",
        "[]",
        "{",
        "[" * 100_000,
        good.replace('"main": "', '"main": "../'),
        '{"revisions": 3}',
    ):
        pins.write_text(bad)
        assert fetch_weights(SOURCE).sha256 == {"model.safetensors": sha256(WEIGHTS)}
        assert pins.read_text() == good


# ----------------------------------------------------------------------------- rows 9-12


def test_row_9_gated(hub, monkeypatch):
    hub.gated.add("org/name")
    with pytest.raises(GatedRepository, match=r"accept its licence at http.*/org/name.*hf auth"):
        fetch_weights(SOURCE)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch_weights(SOURCE).files["model.safetensors"].read_bytes() == WEIGHTS


def test_row_9_private_or_missing(hub, monkeypatch):
    hub.private.add("org/name")
    for source in (SOURCE, HubSource("org/nothing")):
        with pytest.raises(RepositoryNotFound, match=r"check the name.*hf auth login"):
            fetch_weights(source)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch_weights(SOURCE).files["model.safetensors"].read_bytes() == WEIGHTS
    with pytest.raises(RepositoryNotFound):
        fetch_weights(HubSource("org/nothing"))


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_row_9_missing_revision(hub, revision):
    with pytest.raises(RevisionNotFound, match="no such branch"):
        fetch_weights(at(revision))
    with pytest.raises(RevisionNotFound):
        fetch_files(at(revision), ["config.json"])


def test_row_9_missing_file(hub):
    with pytest.raises(FileNotInRepository, match=r"has no such file.*vocab\.txt"):
        fetch_files(SOURCE, ["vocab.txt"])
    hub.push("org/flax", {"flax_model.msgpack": b"x"})
    with pytest.raises(FileNotInRepository, match=r"flax_model\.msgpack"):
        fetch_weights(HubSource("org/flax"))


def test_row_9_each_refusal_says_what_to_do_and_none_the_token(hub, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    secret = "hf_" + "s3cret" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    hub.gated.add("org/gated")
    hub.push("org/gated", {"model.safetensors": WEIGHTS})
    page = re.escape(hub.endpoint)
    cases = {
        GatedRepository: (
            HubSource("org/gated"),
            rf"accept its licence at {page}/org/gated,.*hf a",
        ),
        RepositoryNotFound: (HubSource("org/none"), r"check the name.*hf auth login.*HF_TOKEN"),
        RevisionNotFound: (at("v9"), rf"{page}/org/name/tree/main lists them"),
        FileNotInRepository: (SOURCE, rf"{page}/org/name/tree/main lists those it has"),
    }
    said = []
    for kind, (source, what_to_do) in cases.items():
        with pytest.raises(kind, match=what_to_do) as caught:
            fetch_files(source, ["model.safetensors", "vocab.txt"])
        assert type(caught.value) is kind
        assert str(source) in str(caught.value)
        assert str(caught.value).isprintable()  # one line
        said += traceback.format_exception(caught.value)
    for status, remedy in ((400, "address is wrong"), (403, "hf auth login"), (500, "try later")):
        hub.fault("/api/models/org/other", "status", status=status, times=9)
        with pytest.raises(DownloadError, match=f"http.*/org/other.*{remedy}") as caught:
            fetch_weights(HubSource("org/other"))
        said += traceback.format_exception(caught.value)
        hub.faults.clear()
    assert secret in "".join(hub.tokens)  # it was used
    assert secret not in "".join(said) + caplog.text


def test_row_9_the_token_is_for_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.private.add("org/name")
    with LocalHub() as store:  # another port is another host
        store.plain["/stored"] = store.plain["/models/net.pth"] = WEIGHTS
        away = {"Location": f"{store.endpoint}/stored"}
        hub.fault("model.safetensors", "headers", headers=away, methods=("HEAD",), times=9)
        assert fetch_weights(SOURCE).sha256 == {"model.safetensors": sha256(WEIGHTS)}
        fetch_weights(UrlSource(f"{store.endpoint}/models/net.pth", sha256(WEIGHTS)))
        assert store.gets("/stored")
        assert store.tokens == []
    assert hub.tokens


def test_row_10_falls_back_to_pickles(hub):
    hub.push("org/old", {"pytorch_model.bin": WEIGHTS, "config.json": CONFIG})
    assert set(fetch_weights(HubSource("org/old")).files) == {"pytorch_model.bin"}


@pytest.mark.parametrize("methods", [("HEAD",), ("GET",)])
def test_row_10_a_failing_server_is_no_reason_to_fall_back(hub, methods):
    files = {"model.safetensors": WEIGHTS, "pytorch_model.bin": WEIGHTS[::-1]}
    hub.push("org/both", files)
    hub.fault("model.safetensors", "status", times=999, status=503, methods=methods)
    with pytest.raises(DownloadError, match="503"):
        fetch_weights(HubSource("org/both"))
    assert not [request for request in hub.requests if "pytorch_model" in request]


def test_optional_is_not_missing_when_the_server_fails(hub):
    hub.fault("config.json", "status", times=99, status=500, methods=("HEAD",))
    with pytest.raises(DownloadError, match="500"):
        fetch_files(SOURCE, [], optional=["config.json"])


@pytest.mark.parametrize("how", ["argument", "environment", "constant", "no network"])
def test_row_11_offline_and_cached(hub, monkeypatch, how):
    cold = fetch_weights(SOURCE)
    fetch_files(SOURCE, ["config.json"], optional=["vocab.txt"])
    hub.requests.clear()
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elif how == "constant":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "no network":
        hub.stop()
    only = how == "argument"
    assert fetch_weights(SOURCE, local_files_only=only) == cold
    assert fetch_weights(at("main"), local_files_only=only) == cold
    config = fetch_files(SOURCE, ["config.json"], optional=["vocab.txt"], local_files_only=only)
    assert set(config.files) == {"config.json"}
    assert hub.requests == []


def test_row_11_offline_with_what_another_program_cached(hub, tmp_path):
    huggingface_hub.hf_hub_download(
        "org/name", "model.safetensors", cache_dir=tmp_path / "hf", endpoint=hub.endpoint
    )
    hub.requests.clear()
    fetched = fetch_weights(SOURCE, local_files_only=True)
    assert fetched.sha256 == {"model.safetensors": sha256(WEIGHTS)}
    with pytest.raises(NotCached):  # nobody knows whether the repository has one
        fetch_files(SOURCE, [], optional=["config.json"], local_files_only=True)
    assert hub.requests == []


def test_row_11_offline_and_not_cached_says_which_command_fetches_it(hub):
    for call in (fetch_weights, lambda source, **kw: fetch_files(source, ["config.json"], **kw)):
        with pytest.raises(NotCached, match="mlx-zoo load hf-hub:org/name"):
            call(SOURCE, local_files_only=True)
    source = url_source(hub)
    with pytest.raises(NotCached, match="mlx-zoo load http"):
        fetch_weights(source, local_files_only=True)
    fetch_weights(SOURCE)
    with pytest.raises(NotCached, match=r"config\.json"):
        fetch_files(SOURCE, ["config.json"], local_files_only=True)


def test_row_11_no_network_and_not_cached(hub):
    hub.stop()
    with pytest.raises(DownloadError, match="Check the connection"):
        fetch_weights(SOURCE)


def test_row_12_a_moved_branch_is_followed_only_when_asked(hub):
    first = fetch_weights(SOURCE)
    moved = hub.push("org/name", {"config.json": CONFIG, "model.safetensors": WEIGHTS[::-1]})
    assert fetch_weights(SOURCE) == first
    assert resolve_revision(SOURCE) == first.revision
    second = fetch_weights(at("main"))
    assert second.revision == moved
    assert second.files["model.safetensors"].read_bytes() == WEIGHTS[::-1]
    assert fetch_weights(SOURCE) == second  # pinned anew
    assert fetch_weights(at(first.revision)) == first


def test_row_12_another_branch_leaves_the_pin_of_main(hub):
    first = fetch_weights(SOURCE)
    other = hub.push("org/name", {"model.safetensors": WEIGHTS[::-1]}, branch="v2")
    assert fetch_weights(at("v2")).revision == other
    assert fetch_weights(SOURCE) == first


def test_row_12_a_pin_stands_in_for_a_hub_that_fails(hub):
    first = fetch_weights(SOURCE)
    hub.fault("/revision/main", "status", times=99)
    assert fetch_weights(at("main")) == first
    hub.fault("/revision/v2", "status", times=99)
    with pytest.raises(DownloadError):
        fetch_weights(at("v2"))


# ----------------------------------------------------------------------------- row 13


@pytest.mark.parametrize("digits", [8, 64])
def test_row_13_a_url_is_fetched_once(hub, tmp_path, digits):
    source = url_source(hub, digits=digits)
    fetched = fetch_weights(source)
    path = tmp_path / "zoo" / "downloads" / f"{sha256(WEIGHTS)[:8]}-net.pth"
    assert fetched.files == {"net.pth": path}
    assert fetched.sha256 == {"net.pth": sha256(WEIGHTS)}
    assert fetch_weights(source, local_files_only=True) == fetched
    assert hub.requests == ["GET /models/net.pth"]
    assert fetch_files(source, [], optional=["config.json"]).files == {}


@pytest.mark.parametrize("content", [WEIGHTS[:100], WEIGHTS[::-1]])
def test_row_13_wrong_bytes_are_deleted_and_fetched_again_once(hub, tmp_path, content):
    with pytest.raises(IntegrityError, match="Fetched twice, nothing was kept"):
        fetch_weights(url_source(hub, content))
    assert len(hub.requests) == 2
    assert files_in(tmp_path) == []


def test_row_13_one_flipped_byte_is_mended(hub):
    source = url_source(hub)
    hub.fault("net.pth", "flip")
    assert fetch_weights(source).files["net.pth"].read_bytes() == WEIGHTS


@pytest.mark.parametrize("damage", [WEIGHTS[:-1], b"", WEIGHTS[::-1]])
def test_row_13_a_cached_file_is_hashed_before_it_is_trusted(hub, damage):
    source = url_source(hub)
    path = fetch_weights(source).files["net.pth"]
    path.write_bytes(damage)
    assert fetch_weights(source).files["net.pth"].read_bytes() == WEIGHTS
    path.write_bytes(damage)
    with pytest.raises(NotCached):
        fetch_weights(source, local_files_only=True)
    assert not path.exists()


@pytest.mark.parametrize("kind", ["truncate", "reset", "stall", "status"])
def test_row_13_transient_faults_of_a_url_are_retried(hub, monkeypatch, kind):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    source = url_source(hub)
    hub.fault("net.pth", kind, times=3)
    assert fetch_weights(source).files["net.pth"].read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("truncate", IntegrityError),
        ("length", IntegrityError),
        ("reset", DownloadError),
        ("status", DownloadError),
    ],
)
def test_row_13_lasting_faults_of_a_url(hub, tmp_path, kind, error):
    source = url_source(hub)
    hub.fault("net.pth", kind, times=99)
    with pytest.raises(error, match=r"http://127.*net\.pth"):
        fetch_weights(source)
    assert len(hub.requests) == 4
    assert files_in(tmp_path) == []


def test_row_13_retry_after_of_a_url(hub, monkeypatch):
    naps = []
    monkeypatch.setattr(asking, "sleep", naps.append)
    source = url_source(hub)
    hub.fault("net.pth", "status", status=429, headers={"Retry-After": "7"})
    fetch_weights(source)
    assert naps == [7]
    hub.fault("net2.pth", "status", status=429, headers={"Retry-After": in_seconds(3600)})
    with pytest.raises(DownloadError, match="asks to wait"):
        fetch_weights(UrlSource(f"{hub.endpoint}/net2.pth", "0" * 8))


@pytest.mark.parametrize(("body", "looks"), [(HTML, "HTML page"), (POINTER, "git-lfs pointer")])
def test_row_13_something_else_behind_a_url(hub, tmp_path, body, looks):
    with pytest.raises(DownloadError, match=looks):
        fetch_weights(url_source(hub, body))
    assert files_in(tmp_path) == []


def test_row_13_a_missing_url(hub):
    with pytest.raises(DownloadError, match="404"):
        fetch_weights(UrlSource(f"{hub.endpoint}/gone.pth", "0" * 8))
    assert len(hub.requests) == 1


def test_row_13_redirects_stay_on_permitted_addresses(hub):
    source = url_source(hub)
    hub.plain["/old.pth"] = b""
    moved = UrlSource(f"{hub.endpoint}/old.pth", source.sha256)
    hub.fault("old.pth", "status", status=302, headers={"Location": "/models/net.pth"})
    assert fetch_weights(moved).files["old.pth"].read_bytes() == WEIGHTS
    for target in ("http://example.com/x.pth", "file:///etc/passwd", "ftp://example.com/x"):
        away = UrlSource(f"{hub.endpoint}/away.pth", "0" * 8)
        hub.fault("away.pth", "status", status=302, headers={"Location": target})
        with pytest.raises(DownloadError, match="only https"):
            fetch_weights(away)
    hub.fault("loop.pth", "status", status=302, times=99, headers={"Location": "/loop.pth"})
    with pytest.raises(DownloadError, match="more than"):
        fetch_weights(UrlSource(f"{hub.endpoint}/loop.pth", "0" * 8))


# ----------------------------------------------------------------------------- only https


@pytest.mark.parametrize("endpoint", ["ftp://example.com", "file:///etc", "example.com", "//x"])
def test_an_endpoint_of_another_kind_is_not_asked(hub, monkeypatch, endpoint):
    warm = fetch_weights(SOURCE)
    hub.requests.clear()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: pytest.fail("asked"))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    for source, name in ((HubSource("org/other"), None), (at("main"), None), (SOURCE, "vocab.txt")):
        with pytest.raises(DownloadError, match=f"HF_ENDPOINT={endpoint}"):
            fetch_files(source, [name]) if name else fetch_weights(source)
    assert fetch_weights(SOURCE) == warm  # which asks nobody
    assert hub.requests == []


def test_a_configured_endpoint_may_lack_https_with_a_warning(hub, monkeypatch, caplog):
    """Such a hub may send on within itself, and nowhere else without https."""
    asked = serve_as("http://hub.test", hub, monkeypatch)
    assert fetch_weights(SOURCE).sha256 == {"model.safetensors": sha256(WEIGHTS)}
    assert all(url.startswith("http://hub.test/") for url in asked)
    (warning,) = [r.getMessage() for r in caplog.records if "without https" in r.getMessage()]
    assert "http://hub.test" in warning
    there = {"Location": "http://example.com/x"}
    hub.fault("/api/models/org/other", "status", status=302, times=9, headers=there)
    with pytest.raises(DownloadError, match=r"redirects to http.*only https"):
        fetch_weights(HubSource("org/other"))
    assert all(url.startswith("http://hub.test/") for url in asked)


def serve_as(endpoint: str, hub, monkeypatch) -> list[str]:
    """Have the hub answer at another address, without any encryption; a list of what was asked."""
    asked: list[str] = []
    transport = type(huggingface_hub.utils.get_session()._transport)

    def handle(self, request, handle=transport.handle_request):
        asked.append(str(request.url))
        assert request.url.host == "hub.test"
        url = request.url.copy_with(scheme="http", host="127.0.0.1", port=hub._server.server_port)
        content = {"headers": request.headers, "stream": request.stream}
        again = type(request)(request.method, url, extensions=request.extensions, **content)
        return handle(self, again)

    monkeypatch.setattr(transport, "handle_request", handle)
    hub.endpoint = endpoint
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    return asked


@pytest.fixture
def https(hub, monkeypatch):
    """The hub at https://hub.test; a list of what was asked."""
    return serve_as("https://hub.test", hub, monkeypatch)


def test_https_throughout(hub, https):
    assert fetch_weights(SOURCE).sha256 == {"model.safetensors": sha256(WEIGHTS)}
    hub.plain["/net.pth"] = WEIGHTS
    fetch_weights(UrlSource("https://hub.test/net.pth", sha256(WEIGHTS)))
    assert len(https) > 4
    assert all(url.startswith("https://hub.test/") for url in https)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "target", ["http://hub.test/x", "http://127.0.0.1/x", "http://example.com/x"]
)
def test_nobody_leads_away_from_https(hub, https, tmp_path, target, again):
    """Not to the same host, not to this machine: not for the weights, the API or an address."""
    there = {"headers": {"Location": target}}
    details = {"times": 99, "skip": 2 * again, "methods": ("HEAD",)}
    hub.fault("model.safetensors", "headers", **there, **details)
    with pytest.raises(DownloadError, match=r"redirects to http.*only https"):
        fetch_weights(SOURCE)
    for path in ("/api/models/org/other", "/net.pth"):
        hub.fault(path, "status", status=302, times=9, **there)
    with pytest.raises(DownloadError, match=r"redirects to http.*only https"):
        fetch_weights(HubSource("org/other"))
    with pytest.raises(DownloadError, match=r"redirects to http.*only https"):
        fetch_weights(UrlSource("https://hub.test/net.pth", "0" * 8))
    assert all(url.startswith("https://hub.test/") for url in https)
    assert files_in(tmp_path) == ["org--name.json"]


def test_a_body_is_not_fetched_from_http(hub, https, tmp_path):
    """The client follows the redirects of a GET by itself."""
    there = {"Location": "http://hub.test/x"}
    hub.fault("model.safetensors", "status", status=302, times=9, headers=there)
    with pytest.raises(DownloadError, match=r"redirects to http.*only https"):
        fetch_weights(SOURCE)
    assert all(url.startswith("https://hub.test/") for url in https)
    assert files_in(tmp_path) == ["org--name.json"]


# ----------------------------------------------------------------------------- rows 14-16


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_row_14_killed_during_a_download(hub, tmp_path, kind):
    source = url_source(hub) if kind == "url" else SOURCE
    name = "net.pth" if kind == "url" else "model.safetensors"
    hub.fault(name, "stall")
    program = textwrap.dedent("""
        import sys
        from mlx_zoo.hub.fetch import fetch_weights
        from mlx_zoo.hub.source import HubSource, UrlSource
        url, digits = sys.argv[1:]
        fetch_weights(UrlSource(url, digits) if url else HubSource("org/name"))
    """)
    arguments = [source.url, source.sha256] if kind == "url" else ["", ""]
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(fetch.__file__).parents[2]),
    }
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment)
    deadline = time.monotonic() + 30
    while not hub.gets(name) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # let the first half arrive
    process.kill()
    assert process.wait() == -signal.SIGKILL
    fetched = fetch_weights(source)
    assert fetched.files[name].read_bytes() == WEIGHTS
    assert fetched.sha256 == {name: sha256(WEIGHTS)}


def test_row_14_parts_of_killed_processes_are_swept(hub, tmp_path):
    folder = tmp_path / "zoo" / "downloads"
    folder.mkdir(parents=True)
    old, young = folder / ".old.part", folder / ".young.part"
    old.touch(), young.touch()
    os.utime(old, (0, 0))
    fetch_weights(url_source(hub))
    assert not old.exists()
    assert young.exists()


def test_row_14_a_part_that_is_gone_while_it_is_looked_at(hub, tmp_path, monkeypatch):
    """Another process finishes its download between the listing of the folder and the look."""
    folder = tmp_path / "zoo" / "downloads"
    folder.mkdir(parents=True)
    other = folder / ".other.part"
    other.touch()

    def stat(path, stat=Path.stat, **options):
        if path == other:
            other.replace(folder / "other.pth")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert fetch_weights(url_source(hub)).files["net.pth"].read_bytes() == WEIGHTS
    assert (folder / "other.pth").exists()


def test_row_18_eight_threads_fetch_one_address(hub, tmp_path):
    source = url_source(hub)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: fetch_weights(source), range(8)))
    assert {path.read_bytes() for each in found for path in each.files.values()} == {WEIGHTS}
    assert files_in(tmp_path) == [found[0].files["net.pth"].name]


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_row_15_no_space_is_known_before_the_download(hub, tmp_path, monkeypatch, kind):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"16,384 bytes are needed, 1,000 are free") as caught:
        fetch_weights(url_source(hub) if kind == "url" else SOURCE)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in caught.value.filename
    assert not set(files_in(tmp_path)) - {"org--name.json"}


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_row_15_the_disk_fills_during_the_download(hub, tmp_path, kind):
    source = url_source(hub) if kind == "url" else SOURCE
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a write beyond fails with EFBIG
    try:
        with pytest.raises(OSError, match=", fetching http") as caught:
            fetch_weights(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in caught.value.filename
    assert not isinstance(caught.value, MLXZooError)
    assert not set(files_in(tmp_path)) - {"org--name.json"}
    assert fetch_weights(source).revision in ("", hub.branches["org/name"]["main"])


def test_row_16_a_read_only_cache_that_is_warm(hub, tmp_path, caplog):
    source = url_source(hub)
    warm, url = fetch_weights(SOURCE), fetch_weights(source)
    hub.requests.clear()
    with read_only(tmp_path / "hf", tmp_path / "zoo"):
        assert fetch_weights(SOURCE) == warm
        assert fetch_weights(source) == url
    assert hub.requests == []
    assert caplog.messages == []


def test_row_16_a_read_only_cache_that_is_cold(hub, tmp_path, caplog):
    """What is fetched then lasts as long as the process."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "zoo").mkdir()
    source = url_source(hub)
    with read_only(tmp_path / "hf", tmp_path / "zoo"):
        for _ in range(2):
            for fetched in (fetch_weights(SOURCE), fetch_weights(source)):
                ((name, path),) = fetched.files.items()
                assert path.read_bytes() == WEIGHTS
                assert not path.is_relative_to(tmp_path)
                assert fetched.sha256 == {name: sha256(WEIGHTS)}
                assert len(hub.gets(name)) == 1
    (warning,) = caplog.messages
    assert f"new files cannot be kept in {tmp_path / 'zoo'}: [Errno {errno.EACCES}]" in warning
    assert files_in(tmp_path / "hf") == files_in(tmp_path / "zoo") == []


def test_row_16_what_a_process_kept_elsewhere_goes_with_it(hub, tmp_path):
    (tmp_path / "zoo").touch()
    program = """
        import sys
        from mlx_zoo.hub.fetch import fetch_weights
        from mlx_zoo.hub.source import UrlSource
        (path,) = fetch_weights(UrlSource(*sys.argv[1:])).weights
        assert path.is_file()
        print(path)
    """
    source = url_source(hub)
    output, errors = start(textwrap.dedent(program), source.url, source.sha256).communicate()
    path = Path(output.strip())
    assert path.name.endswith("net.pth"), errors
    assert not path.parent.exists()


def test_row_16_one_repository_of_the_cache_belongs_to_another(hub, tmp_path):
    fetch_files(SOURCE, ["config.json"])
    with (
        read_only(tmp_path / "hf" / "models--org--name"),
        pytest.raises(DownloadError, match=r"cannot be stored.*writable, or give another cache_di"),
    ):
        fetch_weights(SOURCE)
    assert fetch_weights(SOURCE).sha256 == {"model.safetensors": sha256(WEIGHTS)}


def test_row_16_a_record_that_cannot_be_written_is_no_error(hub, tmp_path, caplog):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "pins").write_text("a file where the folder would be")
    for _ in range(2):
        assert fetch_weights(SOURCE).sha256 == {"model.safetensors": sha256(WEIGHTS)}
    (warning,) = caplog.messages
    assert "new files cannot be kept" in warning


# ----------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf-hub:timm/vit_base_patch16_224.augreg", HubSource("timm/vit_base_patch16_224.augreg")),
        ("hf-hub:org/name@v1", HubSource("org/name", "v1")),
        ("org/name", HubSource("org/name")),
        ("org/name@refs/pr/1", HubSource("org/name", "refs/pr/1")),
        ("hf-hub:gpt2", HubSource("gpt2")),
        ("https://h.org/a.pth#sha256=" + "AB" * 32, UrlSource("https://h.org/a.pth", "ab" * 32)),
        ("https://h.org/a-f37072fd.pth", UrlSource("https://h.org/a-f37072fd.pth", "f37072fd")),
    ],
)
def test_parse_source(text, source):
    assert parse_source(text) == source
    assert parse_source(str(source)) == source


def test_parse_source_leaves_names_to_the_registry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    for name in ("resnet18", "resnet50.tv2_in1k", "bert-base-uncased", "resnet18@main"):
        assert parse_source(name) is None
        assert parse_source(name, revision="main") is None


def test_parse_source_reads_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "net.pth").touch()
    (tmp_path / "org" / "file").touch()
    folder, file = DirectorySource(tmp_path / "org" / "name"), FileSource(tmp_path / "net.pth")
    assert parse_source("local-dir:org/name") == folder
    assert parse_source("./org/name") == folder
    assert parse_source(Path("org/name")) == folder
    assert parse_source("net.pth") == parse_source("./net.pth") == file
    assert parse_source(str(tmp_path / "net.pth")) == FileSource(tmp_path / "net.pth")
    assert parse_source("org/file") == FileSource(tmp_path / "org" / "file")
    assert parse_source("org/../org/name/../file") == parse_source("org/file")
    assert parse_source("./..") == DirectorySource(tmp_path.parent)
    # A folder in the working directory does not shadow the hub.
    assert parse_source("org/name") == HubSource("org/name")
    (tmp_path / "plain").touch()
    plain = [parse_source(text) for text in ("./plain", "org/file")]
    for place in (tmp_path, tmp_path / "org"):
        monkeypatch.chdir(place)
        for source in (folder, file, *plain):
            assert parse_source(str(source)) == source


def test_a_relative_folder_holds_after_a_change_of_directory(tmp_path, monkeypatch, minilm):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "minilm").symlink_to(minilm)
    monkeypatch.chdir(tmp_path)
    model = mlx_zoo.load("local-dir:models/minilm", pretrained=True, task="sentence-embedding")
    monkeypatch.chdir(tmp_path / "models")
    assert mlx_zoo.pipeline("sentence-embedding", model)("a sentence").shape == (384,)


def test_a_link_keeps_its_name_and_its_shards(hub, monkeypatch):
    """The hub's cache is made of links to blobs, which have no names and lie elsewhere."""
    shard = "model-00001-of-00001.safetensors"
    index = json.dumps({"weight_map": {"w": shard}}).encode()
    hub.push("org/big", {"model.safetensors.index.json": index, shard: WEIGHTS})
    path = fetch_weights(HubSource("org/big")).files["model.safetensors.index.json"]
    assert path.is_symlink()
    monkeypatch.chdir(path.parent)
    source = parse_source("./model.safetensors.index.json")
    assert source == FileSource(path)
    assert fetch_weights(source).sha256[shard] == sha256(WEIGHTS)


@pytest.mark.parametrize(
    "text", ["./none", "none.pth", "org/none.safetensors", "local-dir:none", "local-dir:", "/none"]
)
def test_parse_source_of_what_does_not_exist(text):
    with pytest.raises(DownloadError, match="no such"):
        parse_source(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf-hub:a/b/c",
        "a/b/c",
        "hf-hub:",
        "hf-hub:../x",
        "org/na--me",
        "org/name@",
        "org/name@../x",
        "hf-hub:org/name@a b",
        "http://h.org/resnet18-f37072fd.pth",
        "ftp://h.org/resnet18-f37072fd.pth",
        "https:///resnet18-f37072fd.pth",
        "https://h.org/a.pth#md5=00",
        "https://h.org/a.pth#sha256=abc",
        "https://h.org/a.pth#sha256=" + "0" * 65,
    ],
)
def test_parse_source_refuses(text):
    with pytest.raises(ValueError, match=r"is not a|only https|expected #sha256"):
        parse_source(text)


def test_parse_source_asks_for_a_hash():
    with pytest.raises(ValueError, match="#sha256=<hex>"):
        parse_source("https://h.org/a.pth")


def test_parse_source_with_a_revision():
    assert parse_source("org/name", revision="v1") == HubSource("org/name", "v1")
    assert parse_source("org/name@v1", revision="v1") == HubSource("org/name", "v1")
    with pytest.raises(ValueError, match="two revisions"):
        parse_source("org/name@v1", revision="v2")
    with pytest.raises(ValueError, match="no revisions"):
        parse_source("https://h.org/resnet18-f37072fd.pth", revision="v1")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_on_a_terminal_and_none_in_a_pipe(hub, monkeypatch, capfd, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    fetch_weights(url_source(hub))
    fetch_weights(SOURCE)
    assert ("net.pth" in capfd.readouterr().err) == is_terminal


def test_importing_is_cheap():
    """The client takes a while to import, and most commands do without it."""
    program = "import sys, mlx_zoo.hub.fetch; print('huggingface_hub' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(fetch.__file__).parents[2])}
    output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert output.strip() == "False"


def test_git_hash_is_git_s():
    assert git_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
