"""Rows 1 to 22 of the fault matrix as users meet them: `load`, the command, SIGKILL, full disks.

Numbers in the names are the rows. `test_fetch` and `test_cache` hold the details of each.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from faults import (
    DIGITS,
    TIMM_CONFIG,
    command_line,
    digest,
    digits_repository,
    on_a_disk_of_its_own,
    read_only,
    right_digest,
    start,
)
from hub_server import HTML, client_and_hub, sha256

import mlx_zoo
from mlx_zoo.cli import main
from mlx_zoo.errors import (
    DownloadError,
    FileNotInRepository,
    GatedRepository,
    IntegrityError,
    NotCached,
    RepositoryNotFound,
    RevisionNotFound,
)
from mlx_zoo.hub import cache as cache_module

NAME = "org/name"
WEIGHTS = "model.safetensors"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def right():
    return right_digest()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Name -> bytes, of a repository with the bundled network."""
    folder = tmp_path_factory.mktemp("published")
    yield digits_repository(folder)
    shutil.rmtree(folder)


@pytest.fixture
def hub(monkeypatch, tmp_path, published):
    """The network in a repository, and behind `hub.address`."""
    with client_and_hub(monkeypatch, tmp_path) as hub:
        hub.push(NAME, published)
        path = f"/digits-{sha256(published[WEIGHTS])[:8]}.safetensors"
        hub.plain[path] = published[WEIGHTS]
        hub.address = hub.endpoint + path
        yield hub


def load(name=NAME, **options):
    return mlx_zoo.load(name, **{"pretrained": True, **options})


def run(*args):
    """What the command exits with and says, in this process."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.output


def kept(folder):
    """Every file but locks, records, and tags for backup programs."""
    odd = {".locks", "pins", "CACHEDIR.TAG", ".gitignore"}
    return {p for p in folder.rglob("*") if p.is_file() and not odd & set(p.parts)}


# ------------------------------------------------------------------ 1-13: the network, the hub


def always(kind, path=WEIGHTS, **details):
    return lambda hub: hub.fault(path, kind, times=99, **details)


def gate(hub):
    hub.gated.add(NAME)


def hide(hub):
    hub.private.add(NAME)


def remove_the_weights(hub):
    hub.push(NAME, {"config.json": json.dumps(TIMM_CONFIG).encode()})


def add_a_pickle(hub):
    files = hub.commits[NAME][hub.branches[NAME]["main"]]
    hub.push(NAME, {**files, "pytorch_model.bin": b"never read"})
    hub.fault(WEIGHTS, "status", times=99, methods=("HEAD",))


def nothing(hub):
    pass


FAULTS = {  # what is wrong, the error, what it says, an option
    "row_1_truncated": (
        always("truncate"),
        DownloadError,
        "model.safetensors.*Check the connection",
    ),
    "row_2_reset": (
        always("reset"),
        DownloadError,
        "http://127.*model.safetensors.*Check the conn",
    ),
    "row_3_500": (always("status", status=500), DownloadError, "500.*try later"),
    "row_3_503_of_the_api": (always("status", NAME), DownloadError, "503.*try later"),
    "row_4_429": (
        always("status", status=429, headers={"Retry-After": "3600"}),
        DownloadError,
        "3600 s; try again after that",
    ),
    "row_5_length": (always("length"), DownloadError, "model.safetensors.*Check the connection"),
    "row_6_flipped": (always("flip"), IntegrityError, "Fetched twice, nothing was kept"),
    "row_6_flipped_config": (
        always("flip", "config.json"),
        IntegrityError,
        "config.json of org/name",
    ),
    "row_7_a_page": (always("body", body=HTML), DownloadError, "an HTML page instead of the file"),
    "row_8_etag": (
        always("headers", headers={"X-Linked-ETag": '"../../../../x"'}, methods=("HEAD",)),
        DownloadError,
        "ETag '../../../../x' is not a hash.*refused",
    ),
    "row_9_gated": (
        gate,
        GatedRepository,
        "accept its licence at http.*/org/name, then run `hf auth",
    ),
    "row_9_private": (hide, RepositoryNotFound, "check the name.*hf auth login"),
    "row_9_revision": (nothing, RevisionNotFound, "tree/main lists them", "--revision=v9"),
    "row_9_file": (remove_the_weights, FileNotInRepository, "no weights.*its files: config.json"),
    "row_10_503_beside_a_pickle": (add_a_pickle, DownloadError, "503"),
    "row_11_off_line": (nothing, NotCached, "mlx-zoo load hf-hub:org/name", "--offline"),
}
OPTIONS = {"--revision=v9": {"revision": "v9"}, "--offline": {"local_files_only": True}}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_row_1_to_row_11_of_load_and_of_the_command(fault, hub, tmp_path, right, monkeypatch):
    break_it, kind, message, *args = fault
    secret = "hf_" + "s3cret" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    break_it(hub)
    with pytest.raises(kind, match=message) as caught:
        load(**OPTIONS[args[0]] if args else {})
    assert type(caught.value) is kind
    status, output = run("load", NAME, *args)
    assert status == 1
    assert "Traceback" not in output
    assert output.startswith("Error: ")
    assert output.count("\n") == 1
    assert re.search(message, output)
    assert secret not in output + str(caught.value)
    assert all(path.resolve().stat().st_size < 1000 for path in kept(tmp_path))  # config.json

    hub.faults.clear()
    hub.gated.clear()
    hub.private.clear()
    if break_it is not remove_the_weights:
        assert digest(load()) == right


def test_row_10_without_safetensors_the_pickle_is_read(hub, right):
    content = (Path(mlx_zoo.__file__).parent / "data" / "resnet_digits.pth").read_bytes()
    config = json.dumps(TIMM_CONFIG).encode()
    hub.push("org/old", {"config.json": config, "pytorch_model.bin": content})
    assert digest(load("org/old")) == right


@pytest.mark.parametrize(
    ("kind", "error"),
    [("flip", IntegrityError), ("truncate", IntegrityError), ("status", DownloadError)],
)
def test_row_13_of_load_and_of_the_command(hub, tmp_path, right, kind, error):
    hub.fault(".safetensors", kind, times=99)
    with pytest.raises(error, match=r"http://127.*digits-.*safetensors"):
        load(DIGITS, pretrained=hub.address)
    status, output = run("load", DIGITS, "--pretrained", hub.address)
    assert status == 1
    assert output.startswith("Error: http://127")
    assert output.count("\n") == 1
    assert kept(tmp_path) == set()
    hub.faults.clear()
    assert digest(load(DIGITS, pretrained=hub.address)) == right


def test_row_1_what_was_mended_is_not_worth_a_line(hub):
    """The client would like to tell of each of its retries, and twice."""
    hub.fault("config.json", "truncate")
    result = command_line("load", NAME, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["parameters"] == 111_370
    assert len(hub.gets("config.json")) == 2


# ------------------------------------------------------------------ 12: main moves

LOAD = """
import sys
import huggingface_hub.file_download
import mlx_zoo
from faults import digest
name, other, *revision = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
model = mlx_zoo.load(name, pretrained=other or True, revision=revision[0] if revision else None)
print(digest(model), model.checkpoint.revision, flush=True)
"""


def changed(content):
    """The lowest bit of the last number is another."""
    return content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]


def test_row_12_other_processes_keep_the_commit_as_well(hub, right, published):
    def load_elsewhere(*revision):
        output, errors = start(LOAD, NAME, "", *revision).communicate("go\n")
        assert errors == ""
        return output.split()[1:]

    first = hub.branches[NAME]["main"]
    assert load_elsewhere() == [right, first]
    second = hub.push(NAME, {**published, WEIGHTS: changed(published[WEIGHTS])})
    assert load_elsewhere() == [right, first]
    other, commit = load_elsewhere("main")
    assert (other != right, commit) == (True, second)
    assert load_elsewhere() == [other, second]
    assert load_elsewhere(first) == [right, first]
    assert digest(load()) == other


# ------------------------------------------------------------------ 14, 17: SIGKILL

# Dies before its n-th operation on a file below a folder.
AT_FILE_OPERATION = """
import os, signal, sys
folder, last = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
left = last

def watch(event, args):
    global left
    if event not in WATCHED:
        return
    if any(str(x).startswith(folder) for x in args if isinstance(x, (str, os.PathLike))):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

names = ("mkdir", "rename", "remove", "rmdir", "symlink", "link", "truncate", "chmod")
WATCHED = {"open", *(f"os.{name}" for name in names)}
sys.addaudithook(watch)
"""


def arguments(kind, hub):
    return (NAME, "") if kind == "hub" else (DIGITS, hub.address)


def here(cache):
    return {"MLX_ZOO_CACHE": cache, "HF_HUB_CACHE": cache / "hub"}


def check_recovery(cache, kind, hub, right):
    """After a kill: nothing that can be seen is broken, and a load is right, once and again."""
    weights = cache / "weights"
    for path in weights.glob("[!.]*"):
        cache_module.check(cache_module.read_entry(path))
    name, other = arguments(kind, hub)
    for _ in range(2):
        assert digest(load(name, pretrained=other or True, cache_dir=cache)) == right
    (entry,) = cache_module.entries(cache)
    cache_module.check(entry)
    visible = [path for path in weights.iterdir() if not path.name.startswith(".partial-")]
    assert visible == [entry.path]
    assert not (cache / "quarantine").exists()


def load_until(number, kind, hub, cache):
    """Load in a process that dies at its n-th operation; its exit status and what it said."""
    program = AT_FILE_OPERATION + LOAD + "print(last - left)\n"
    process = start(program, cache, number, *arguments(kind, hub), **here(cache))
    output, errors = process.communicate("go\n", timeout=100)
    assert errors == ""
    return process.returncode, output.split()


@pytest.mark.parametrize(
    ("kind", "every"), [("url", 1), ("hub", 7), pytest.param("hub", 1, marks=pytest.mark.slow)]
)
def test_row_14_and_row_17_killed_at_each_operation_on_a_file(kind, every, hub, tmp_path, right):
    """Of a download and the conversion that follows it; or at each seventh of them."""
    status, output = load_until(0, kind, hub, tmp_path / "counted")
    assert (status, output[1]) == (0, right)
    num_operations = int(output[-1])
    assert num_operations > {"url": 18, "hub": 60}[kind]

    def kill(number):
        cache = tmp_path / str(number)
        assert load_until(number, kind, hub, cache) == (-signal.SIGKILL, ["ready"])
        return cache

    with ThreadPoolExecutor(2) as threads:
        for cache in threads.map(kill, range(1, num_operations + 1, every)):
            check_recovery(cache, kind, hub, right)
            shutil.rmtree(cache)


def test_row_14_and_row_17_killed_at_any_moment(hub, tmp_path, right):
    """Twenty times; now and then twice before the next load."""
    rng = random.Random("killed")
    slow = hub.fault(".safetensors", "slow", times=10**6)  # 0.2 s of body

    def attempt(kind, cache, moment):
        process = start(LOAD, *arguments(kind, hub), **here(cache))
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        process.stdin.write("go\n")
        process.stdin.flush()
        if moment is not None:
            time.sleep(moment)
            process.kill()
        output, errors = process.communicate(timeout=100)
        assert errors == ""
        assert output == "" or output.startswith(right)
        return time.monotonic() - started, process.returncode

    whole = {}
    for kind in ("hub", "url"):
        whole[kind], status = attempt(kind, tmp_path / kind, None)
        assert status == 0
    kills = 0
    for number in range(200):
        kind, cache = rng.choice(("hub", "url")), tmp_path / str(number)
        for _ in range(rng.choice((1, 1, 2))):
            _, status = attempt(kind, cache, rng.uniform(0, whole[kind]))
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
        slow.times = 0
        check_recovery(cache, kind, hub, right)
        slow.times = 10**6
        shutil.rmtree(cache)
        if kills >= 20:
            break
    assert kills >= 20


# Dies where half of a file is written, which no watch on operations sees, and at named steps.
AT_STEP = """
import os, signal, sys
from pathlib import Path
import huggingface_hub.file_download as client
from mlx_zoo.hub import cache, download, repository

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def then(action, after):
    def act(*args, **options):
        action(*args, **options)
        after(*args)
        die()
    return act

def halve(path, *args):
    os.truncate(path, os.path.getsize(path) // 2)

def halve_body(url, file, *args):
    file.flush()
    halve(file.name)

match sys.argv.pop():
    case "before the first question":
        repository.Repository.resolve = download.ask = die
    case "before the body":
        client.http_get = download._open_url = die
    case "in the body":
        client.http_get = then(client.http_get, halve_body)
        download._stream = then(download._stream, lambda url, part: halve(part))
    case "before the body has its name":
        client._chmod_and_move = os.replace = die
    case "before it is looked at":
        repository._hashes = download.placeholder = die
    case "in a record or manifest":
        Path.write_text = then(Path.write_text, halve)
    case "in the weights":
        cache.save = then(cache.save, halve)
    case "before the entry has its name":
        Path.rename = die
"""
STEPS = re.findall(r'case "(.*)"', AT_STEP)


@pytest.mark.parametrize("kind", ["hub", "url"])
@pytest.mark.parametrize("step", STEPS)
def test_row_14_and_row_17_killed_at(step, kind, hub, tmp_path, right):
    cache = tmp_path / "here"
    process = start(AT_STEP + LOAD, *arguments(kind, hub), step, **here(cache))
    _, errors = process.communicate("go\n", timeout=100)
    assert process.returncode == -signal.SIGKILL, errors
    check_recovery(cache, kind, hub, right)


# ------------------------------------------------------------------ 15: a full disk

# On a disk that was large enough when it was looked at.
FILLED_MEANWHILE = """
import shutil, sys
from types import SimpleNamespace
shutil.disk_usage = lambda path: SimpleNamespace(free=10**12)
from mlx_zoo.cli import main
main(prog_name="mlx-zoo")
"""


@pytest.mark.parametrize("kind", ["hub", "url"])
@pytest.mark.parametrize("known", ["before", "on the way"])
def test_row_15_a_disk_that_is_full(kind, known, hub, tmp_path):
    """300 kB for a file of 455. Then there is space again."""
    name, other = arguments(kind, hub)
    command = f"load {name} --json" + (f" --pretrained {other}" if other else "")
    (tmp_path / "filled.py").write_text(FILLED_MEANWHILE)
    disk = tmp_path / "disk"
    result = on_a_disk_of_its_own(
        f"""
        mount -t tmpfs -o size=300k tmpfs "$disk"
        python {"-m mlx_zoo" if known == "before" else '"$filled"'} {command}
        echo "status $?"
        find "$disk" -size +8k -type f
        mount -o remount,size=32m "$disk"
        python -m mlx_zoo {command} > "$log"
        echo "status $?"
        find "$disk" -path '*/weights/*/model.safetensors' -size +400k | wc -l
        """,
        disk,
        filled=tmp_path / "filled.py",
        log=tmp_path / "log",
        MLX_ZOO_CACHE=disk / "zoo",
        HF_HUB_CACHE=disk / "hf",
    )
    assert result.stdout.split("\n") == ["status 1", "status 0", "1", ""], result.stderr
    (error,) = result.stderr.splitlines()
    assert error.startswith("Error: [Errno 28] ")
    assert error.endswith(f"{disk / ('zoo/downloads' if other else 'hf')}'")
    assert json.loads((tmp_path / "log").read_text())["parameters"] == 111_370


def test_row_15_a_disk_without_space_for_what_is_converted(tmp_path):
    """The network is loaded all the same; `convert` and `export` fail."""
    disk = tmp_path / "disk"
    result = on_a_disk_of_its_own(
        f"""
        mount -t tmpfs -o size=300k tmpfs "$disk"
        python -m mlx_zoo load {DIGITS} --json > "$log"
        echo "status $?"
        for command in convert export; do
            python -m mlx_zoo $command {DIGITS} "$disk/out.safetensors" --cache-dir "$elsewhere"
            echo "status $?"
        done
        python -m mlx_zoo --debug convert {DIGITS} "$disk/out" 2> "$traceback"
        echo "status $?"
        find "$disk" -type f
        mount -o remount,size=32m "$disk"
        python -m mlx_zoo load {DIGITS} > /dev/null
        echo "status $?"
        find "$disk" -type f -path '*/weights/{DIGITS}-*' | wc -l
        """,
        disk,
        log=tmp_path / "log",
        traceback=tmp_path / "traceback",
        elsewhere=tmp_path / "elsewhere",
        MLX_ZOO_CACHE=disk / "zoo",
    )
    statuses = ["status 0", "status 1", "status 1", "status 1", "status 0"]
    assert result.stdout.split("\n") == [*statuses, "2", ""], result.stderr
    warning, *errors = result.stderr.splitlines()
    assert warning.startswith(f"WARNING: new files cannot be kept in {disk / 'zoo'}: ")
    assert len(errors) == 2
    for line in (warning, *errors):
        assert re.search(rf"No space left on device: .?{disk}/.*model\.safetensors", line)
    assert "\nOSError: " in (tmp_path / "traceback").read_text()
    assert json.loads((tmp_path / "log").read_text())["parameters"] == 111_370


# ------------------------------------------------------------------ 16: a read-only cache


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_row_16_a_cold_cache_that_is_read_only(kind, hub, tmp_path, right, caplog):
    """Fetched and converted all the same; said once."""
    name, other = arguments(kind, hub)
    folders = [tmp_path / "zoo", tmp_path / "hf"]
    for folder in folders:
        folder.mkdir()
    with read_only(*folders):
        for _ in range(2):
            assert digest(load(name, pretrained=other or True)) == right
        status, output = run("load", name, *(("--pretrained", other) if other else ()), "--json")
        assert (status, json.loads(output)["parameters"]) == (0, 111_370)
    (warning,) = caplog.messages
    assert str(tmp_path / "zoo") in warning
    assert "Permission denied" in warning
    assert [path for folder in folders for path in kept(folder)] == []


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_row_16_a_warm_cache_that_is_read_only(kind, hub, tmp_path, right, caplog):
    name, other = arguments(kind, hub)
    load(name, pretrained=other or True)
    hub.requests.clear()
    with read_only(*(path for path in (tmp_path / "zoo", tmp_path / "hf") if path.exists())):
        assert digest(load(name, pretrained=other or True)) == right
    assert hub.requests == []
    assert caplog.messages == []


def test_row_16_a_disk_that_is_read_only(hub, tmp_path):
    """Not by permissions but as a whole."""
    disk = tmp_path / "disk"
    result = on_a_disk_of_its_own(
        f"""
        mount -t tmpfs tmpfs "$disk"
        python -m mlx_zoo load {NAME} --json > "$log"
        mount -o remount,ro "$disk"
        python -m mlx_zoo load {NAME} --json >> "$log"
        echo "warm $?"
        echo "now cold" >&2
        python -m mlx_zoo load {NAME} --json --cache-dir "$disk/cold" >> "$log"
        echo "cold $?"
        """,
        disk,
        log=tmp_path / "log",
        MLX_ZOO_CACHE=disk / "zoo",
        HF_HUB_CACHE=disk / "hf",
    )
    assert result.stdout == "warm 0\ncold 0\n", result.stderr
    assert (tmp_path / "log").read_text().count('"parameters": 111370') == 3
    first, warning = result.stderr.splitlines()
    assert first == "now cold"
    assert warning.startswith(f"WARNING: new files cannot be kept in {disk / 'cold'}: ")
    assert "Read-only file system" in warning


# ------------------------------------------------------------------ 18: many at once


@pytest.mark.parametrize(
    ("num", "found"),
    [
        (24, "nothing"),
        (12, "a damaged entry"),
        pytest.param(60, "nothing", marks=pytest.mark.slow),
    ],
)
def test_row_18_many_processes_convert_at_once_and_some_are_killed(
    num, found, hub, tmp_path, right, caplog
):
    """A third may die: a half of those at an operation on a file, a half at some moment."""
    rng = random.Random(f"{num} {found}")
    cache = tmp_path / "zoo"
    load()
    (entry,) = cache_module.entries(cache)
    if found == "nothing":
        shutil.rmtree(cache)
    else:
        entry.weights.write_bytes(b"damaged")
    last = [rng.randint(1, 12) if i % 6 == 0 else 0 for i in range(num)]
    racers = [start(AT_FILE_OPERATION + LOAD, cache, number, NAME, "") for number in last]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers[3::6]:
        time.sleep(rng.uniform(0, 0.2))
        racer.kill()
    killed = 0
    for i, racer in enumerate(racers):
        output, errors = racer.communicate(timeout=100)
        killed += racer.returncode == -signal.SIGKILL and i % 3 == 0
        assert racer.returncode == (-signal.SIGKILL if output == "" else 0), errors
        assert output == "" or output.startswith(right)
        assert output or i % 3 == 0
        assert found != "nothing" or errors == ""
    assert killed > 0

    (entry,) = cache_module.entries(cache)
    cache_module.check(entry)
    caplog.clear()
    assert digest(load()) == right
    assert caplog.messages == []
    assert [path.name for path in (cache / "weights").glob("[!.]*")] == [entry.path.name]


# ------------------------------------------------------------------ 19, 21, 22: the entry


def test_row_19_another_commit_and_the_old_entry_is_not_used(hub, tmp_path, right, published):
    assert digest(load()) == right
    hub.push(NAME, {**published, WEIGHTS: changed(published[WEIGHTS])})
    assert digest(load(revision="main")) != right
    keys = {entry.manifest["key"] for entry in cache_module.entries(tmp_path / "zoo")}
    assert len(keys) == 2


def test_row_21_who_rewrites_both_is_out_of_scope_and_that_is_documented():
    text = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())
    assert re.search(r"rewrites? both", text)
    assert "manifest" in text


def test_row_21_who_rewrites_one_of_them_is_caught(cache, tmp_path, right, caplog):
    """Proper weights under the same header; each line of the manifest."""
    load(DIGITS)
    (entry,) = cache_module.entries(cache)
    good = shutil.copytree(entry.path, tmp_path / "good")

    def is_caught():
        caplog.clear()
        assert digest(load(DIGITS)) == right
        shutil.rmtree(entry.path)
        shutil.copytree(good, entry.path)
        return "set aside and converted again" in caplog.text

    entry.weights.write_bytes(changed(entry.weights.read_bytes()))
    assert is_caught()
    for name in entry.manifest.keys() - {"created"}:  # the date, by which nothing is decided
        for other in {"x", None} - {str(entry.manifest[name])}:
            if entry.manifest[name] != other:
                text = json.dumps({**entry.manifest, name: other})
                (entry.path / "manifest.json").write_text(text)
                assert is_caught(), name
    assert not is_caught()


# Harms an entry and puts a good one in its place, over and over.
VANDAL = """
import os, shutil, sys, uuid
from pathlib import Path

path, good, act = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
weights = path / "model.safetensors"
aside = path.parents[1] / "aside"
aside.mkdir()
print("ready", flush=True)
count = 0
while not Path(sys.argv[4]).exists():
    new, old = aside / uuid.uuid4().hex, aside / uuid.uuid4().hex
    shutil.copytree(good, new)
    try:
        if act == "truncated":
            os.truncate(weights, count * 7919 % 440_000)
        elif act == "overwritten":
            with open(weights, "r+b") as file:
                file.seek(200_000)
                file.write(b"x" * 50_000)
        elif act == "deleted":
            shutil.rmtree(path)
        if path.exists():
            path.rename(old)
        new.rename(path)
        count += 1
    except OSError:  # the other side was faster
        pass
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
print(count)
"""


@pytest.mark.parametrize("act", ["deleted", "replaced", "truncated", "overwritten"])
def test_row_22_an_entry_that_changes_while_it_is_loaded(act, cache, tmp_path, right):
    load(DIGITS)
    (entry,) = cache_module.entries(cache)
    good = shutil.copytree(entry.path, tmp_path / "good")
    stop = tmp_path / "stop"
    vandal = start(VANDAL, entry.path, good, act, stop)
    try:
        assert vandal.stdout.readline() == "ready\n"
        for _ in range(40):
            assert digest(load(DIGITS)) == right
    finally:
        stop.touch()
        output, errors = vandal.communicate(timeout=60)
    assert errors == ""
    assert int(output) > 10
    assert digest(load(DIGITS)) == right
