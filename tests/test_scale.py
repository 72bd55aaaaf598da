"""Many inputs: prepared ahead in bounded memory, answered into files, gone on with, and shared."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import launching
import numpy as np
import pytest
from click.testing import CliRunner
from faults import command_line, environment, read_only
from PIL import Image
from safetensors.numpy import load_file

import mlx_zoo
from mlx_zoo.backend import processes
from mlx_zoo.cli import main
from mlx_zoo.errors import MLXZooError
from mlx_zoo.tasks.batches import AHEAD, SHARED, Failure, Windows, answers
from mlx_zoo.tasks.blocks import Block, Part, read_blocks
from mlx_zoo.tasks.images import Images
from mlx_zoo.tasks.jobs import answer_all

NUM_IMAGES, NUM_TEXTS = 200, 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """200 images in folders within folders, and what is no image by its name."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        place = root / f"{i % 3}" / ("deep" if i % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (20 + i % 9, 30), np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.{('png', 'jpg', 'BMP')[i % 3]}")
    for name in ("notes.txt", ".hidden.png", "0/._0.png"):
        (root / name).write_bytes(b"no image")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "1.png").write_bytes(b"no image")
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "sentences.txt"
    file.write_text("".join(f"sentence {i}{' and more' * (i % 7)}\n" for i in range(NUM_TEXTS)))
    yield file
    file.unlink()


def classify():
    return mlx_zoo.pipeline("image-classification", "resnet_digits")


def embed():
    return mlx_zoo.pipeline("sentence-embedding", "bert_docs")


def paths(folder):
    """As the folder is walked: the images alone, by their paths."""
    found = [p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".bmp")]
    shown = [p for p in found if not any(s.startswith(".") for s in p.relative_to(folder).parts)]
    return sorted(shown, key=lambda path: path.relative_to(folder).as_posix())


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# Prepared ahead ---------------------------------------------------------------------------------


class Prepared(list):
    """A window that knows how many of its kind there are."""

    alive, most = 0, 0
    lock = threading.Lock()

    def __init__(self, items):
        super().__init__(items)
        with self.lock:
            Prepared.alive += 1
            Prepared.most = max(Prepared.most, Prepared.alive)
        weakref.finalize(self, self.gone)

    @classmethod
    def gone(cls):
        with cls.lock:
            cls.alive -= 1


@pytest.mark.parametrize("kind", ["list", "windows"])
def test_little_is_held_however_much_there_is(kind):
    """Of 200 windows, the network being slower than what prepares them, and not read at all."""
    Prepared.alive = Prepared.most = 0

    def read(prepared, advance):
        time.sleep(0.001)
        return [2 * x for x in prepared]

    given = [*range(400)]
    if kind == "list":
        found = answers(given, Prepared, read, 2)
    else:
        windows = answers(Windows(iter(given), lambda first: True), Prepared, read, 2)
        found = [x for window in windows for x in window.answers]
    assert found == [2 * x for x in given]
    assert 1 < Prepared.most <= AHEAD + 2
    assert Prepared.alive <= 1


def test_the_next_is_prepared_while_the_network_reads():
    """The network waits for it: one after the other, it would wait for ever."""
    ready = [threading.Event() for _ in range(5)]

    def prepare(some):
        ready[some[0]].set()
        return some

    def read(some, advance):
        assert ready[min(some[0] + 1, 4)].wait(timeout=60)
        return some

    assert answers([0, 1, 2, 3, 4], prepare, read, 1) == [0, 1, 2, 3, 4]


def test_images_of_a_list_are_prepared_in_threads(folder, monkeypatch):
    seen = []
    prepare = Images.prepare

    def spied(self, images):
        seen.append(threading.current_thread() is threading.main_thread())
        return prepare(self, images)

    monkeypatch.setattr(Images, "prepare", spied)
    run, images = classify(), paths(folder)
    together = run(images, batch_size=32)
    assert seen == [False] * 7
    assert [*run(iter(images), batch_size=32)] == together  # bit for bit: the same batches
    assert seen[7:] == [True] * 7  # an iterator is read no further than its answers
    alone = [run(image, top_k=None) for image in images[:40]]
    for one, other in zip(alone, run(images[:40], top_k=None), strict=True):
        assert {x["label"] for x in one} == {x["label"] for x in other}
        other = {x["label"]: x["score"] for x in other}
        assert all(abs(x["score"] - other[x["label"]]) < 1e-6 for x in one)


def test_texts_answer_as_one_by_one(sentences):
    run, texts = embed(), sentences.read_text().splitlines()
    together = run(texts)
    assert together.shape[0] == NUM_TEXTS
    np.testing.assert_allclose(together[::9], [run(text) for text in texts[::9]], atol=1e-6)
    np.testing.assert_allclose(together, [*run(iter(texts))], atol=1e-6)


def test_an_image_that_cannot_be_read_ends_a_list_and_its_threads(folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = paths(folder)
    with pytest.raises(ValueError, match=r"bad\.png: not an image"):
        classify()([*images[:70], tmp_path / "bad.png", *images[70:]])
    assert not [t.name for t in threading.enumerate() if t.name.startswith("mlx_zoo-")]


def test_an_image_may_be_there_twice(folder):
    run, path = classify(), paths(folder)[0]
    with path.open("rb") as file:
        assert run([file] * 8) == run([path.read_bytes()] * 8)
    with Image.open(path) as image:
        assert run([image] * 8) == run([str(path)] * 8)


def test_a_window_is_answered_whatever_is_wrong_with_some_of_it():
    def prepare(some):
        if bad := [x for x in some if x % 10 == 3]:
            raise ValueError(f"{bad[0]} is bad")
        return some

    def read(some, advance):
        advance(len(some))
        return [-x for x in some]

    done = []
    windows = Windows(range(25), lambda first: first != 5, advance=done.append)
    found = [*answers(windows, prepare, read, 5)]
    assert [window.first for window in found] == [0, 10, 15, 20]
    assert found[0].answers == [0, -1, -2, Failure("3 is bad"), -4]
    assert found[-1].answers == [-20, -21, -22, Failure("23 is bad"), -24]
    assert sum(done) == 20
    with pytest.raises(ValueError, match=r"^3 is bad$"):
        next(answers(Windows(range(25), lambda first: True, stop=True), prepare, read, 5))
    assert found[1].inputs == [10, 11, 12, 13, 14]


# Into a file ------------------------------------------------------------------------------------


def test_a_folder_is_classified(folder, tmp_path):
    run, images = classify(), paths(folder)
    done = answer_all(run, folder, tmp_path / "new" / "out.jsonl", top_k=2)
    assert (done.num_inputs, done.num_failed, done.num_before) == (NUM_IMAGES, 0, 0)
    found = lines(done.output)
    assert [x["input"] for x in found] == [p.relative_to(folder).as_posix() for p in images]
    assert [x["answer"] for x in found] == run(images, top_k=2)
    left = {path.name for path in done.output.parent.iterdir()}
    assert left == {"out.jsonl", "out.jsonl.job"}
    again = answer_all(run, folder, done.output, top_k=2)
    assert again.num_before == NUM_IMAGES


def test_sentences_are_embedded(sentences, tmp_path):
    run, texts = embed(), sentences.read_text().splitlines()
    for suffix in (".npy", ".safetensors", ".jsonl"):
        answer_all(run, sentences, tmp_path / f"out{suffix}")
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, run(texts), atol=1e-6)
    tensors = load_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(tensors["embeddings"], found)
    records = lines(tmp_path / "out.jsonl")
    assert [x["text"] for x in records] == texts
    np.testing.assert_array_equal(np.array([x["embedding"] for x in records], "f4"), found)


def test_what_a_line_is(tmp_path):
    """Empty lines count, carriage returns do not, nor do Unicode's other separators."""
    file = tmp_path / "texts.txt"
    file.write_bytes("a cat\r\n\n\u2028 b\x0c\n \nlast".encode())
    answer_all(embed(), file, tmp_path / "out.jsonl")
    wanted = ["a cat", "", "\u2028 b\x0c", " ", "last"]
    assert [x["text"] for x in lines(tmp_path / "out.jsonl")] == wanted


def test_what_cannot_be_read_is_told(folder, sentences, tmp_path):
    """And the rest is answered as if it were not there."""
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    (images / "1" / "bad.png").write_bytes(b"no image")
    (images / "cut.jpg").write_bytes((folder / "1" / "deep" / "1.jpg").read_bytes()[:200])
    (images / "gone.png").symlink_to("nowhere")
    os.mkfifo(images / "pipe.png")  # whose reader would wait
    (images / "folder.png").mkdir()
    odd = os.fsdecode(b"\xff.png")
    shutil.copy(folder / "0" / "0.png", images / odd)
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(main, ["predict", "resnet_digits", str(images), "--output", out])
    assert result.exit_code == 1
    assert "204 inputs, 3 failed" in result.output
    found = {x["input"]: x for x in lines(out)}
    assert len(found) == NUM_IMAGES + 4
    failed = {name: x["error"] for name, x in found.items() if "answer" not in x}
    assert failed.keys() == {"1/bad.png", "cut.jpg", "gone.png"}
    assert all(text.startswith("not an image that can be read") for text in failed.values())
    assert str(images) not in out.read_text(), "the bytes do not depend on where the folder is"
    same = [found[name]["answer"][0]["label"] for name in (odd, "0/0.png")]
    assert same[0] == same[1]

    texts = tmp_path / "texts.txt"
    texts.write_bytes(sentences.read_bytes() + b"not \xff UTF-8\nthe end\n")
    words = ["embed", "bert_docs", texts, "--output", tmp_path / "out.npy"]
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 1
    said = json.loads(result.output)
    assert said["num_failed"] == 1
    ((name, reason),) = said["failures"]
    assert name == f"line {NUM_TEXTS + 1}"
    assert "not valid Unicode" in reason
    found = np.load(tmp_path / "out.npy")
    assert np.isnan(found[NUM_TEXTS]).all()
    assert np.isfinite(np.delete(found, NUM_TEXTS, 0)).all()


def test_on_error_stop(folder, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out.jsonl"
    shutil.copytree(folder, images)
    (images / "1" / "bad.png").write_bytes(b"no image")
    run = classify()
    answer_all(run, images, tmp_path / "wanted.jsonl")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1/bad\.png: not an image"):
            answer_all(run, images, out, on_error="stop")
        assert not out.exists()
    done = answer_all(run, images, out)
    assert done.num_before == 96, "three windows, before that of the image"
    assert out.read_bytes() == (tmp_path / "wanted.jsonl").read_bytes()


def test_an_answer_that_is_not_finite_is_a_failure(folder, tmp_path):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    model.layer4[0].conv1.weight = model.layer4[0].conv1.weight * float("inf")
    run = mlx_zoo.pipeline("image-feature-extraction", model)
    for suffix in (".npy", ".jsonl"):
        done = answer_all(run, folder, tmp_path / f"out{suffix}")
        assert done.num_failed == NUM_IMAGES
        assert "not finite" in done.failures[0][1]
        assert len(done.failures) == 20
    assert np.load(tmp_path / "out.npy").shape[0] == NUM_IMAGES
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()


def test_other_work_is_refused(folder, sentences, tmp_path):
    run, out = classify(), tmp_path / "out.jsonl"

    def refused(message, pipeline=run, inputs=folder, error=MLXZooError, output=out, **options):
        before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
        with pytest.raises(error, match=message):
            answer_all(pipeline, inputs, output, **options)
        assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}

    out.write_text("mine")
    refused(r"something is there, without out\.jsonl\.job.*another output, or remove out\.jsonl$")
    out.unlink()
    answer_all(run, folder, out)
    other = mlx_zoo.pipeline("image-classification", "vit_digits")
    for work in ("done", "begun"):
        refused('other work.*model "resnet_digits" there, "vit_digits" here', other)
        refused('other work .*options {"batch_size": 32} there', batch_size=8)
        refused("options .* remove out.jsonl", top_k=1)
        refused("number of inputs 200 there, 66 here", inputs=folder / "2")
        refused("task .*sentence-embedding", embed(), sentences)
        trained = mlx_zoo.load("resnet_digits", pretrained=True)
        trained.fc.bias = trained.fc.bias + 1
        refused("weights", mlx_zoo.pipeline("image-classification", trained))
        plain = mlx_zoo.pipeline("image-classification", "resnet_digits", optimize=False)
        refused("optimised true there, false here", plain)
        if work == "done":
            whole = out.read_bytes()
            out.write_bytes(whole[:-1])
            refused("was changed after it was made")
            out.unlink()  # it is made again, but only half of it
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Part, "append", lambda *args: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    answer_all(run, folder, out)
    job = tmp_path / "out.jsonl.job"
    job.write_text("{}")
    refused("no such file as is written here")
    job.unlink()
    refused("is no folder of images", inputs=sentences, error=ValueError)
    refused("is no file of texts", embed(), folder, error=ValueError)
    refused("image-classification is written as .jsonl$", output="a.npy", error=ValueError)
    refused("'record' or 'stop'", on_error="skip", error=ValueError)
    refused("batch_size", batch_size=0, error=ValueError)
    (tmp_path / "none").mkdir()
    refused("no image is there", inputs=tmp_path / "none", error=ValueError)
    (tmp_path / "none.txt").touch()
    refused("is empty", embed(), tmp_path / "none.txt", error=ValueError)
    writer = mlx_zoo.pipeline("text-generation", "gpt2_docs")
    refused("text-generation: .* can be written", writer, sentences, error=ValueError)


def test_one_at_a_time(folder, tmp_path):
    with (tmp_path / "out.jsonl.part-0").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(MLXZooError, match="another process is still at it"):
            answer_all(classify(), folder, tmp_path / "out.jsonl")
    assert answer_all(classify(), folder, tmp_path / "out.jsonl").num_failed == 0


def test_who_comes_as_another_leaves_does_not_write_into_nothing(tmp_path, monkeypatch):
    """The file is removed between its opening and its lock."""
    part, flock = tmp_path / "out.jsonl.part-0", fcntl.flock

    def late(file, how):
        part.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        pytest.raises(MLXZooError, match="another process is still at it"),
        Part(tmp_path / "out.jsonl", 0),
    ):
        pytest.fail("it holds a file that is gone")


def test_an_image_that_was_exchanged_for_one_of_its_size_is_other_work(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out.jsonl"
    images.mkdir()
    for colour in (10, 200):
        Image.new("L", (32, 32), colour).save(images / "1.bmp")
        os.utime(images / "1.bmp", (colour, colour))
        if colour == 10:
            answer_all(classify(), images, out)
    with pytest.raises(MLXZooError, match=r"other work .*inputs"):
        answer_all(classify(), images, out)


def test_texts_that_change_meanwhile(sentences, tmp_path, monkeypatch):
    file = tmp_path / "texts.txt"
    shutil.copy(sentences, file)
    append = Part.append

    def changed(self, *args):
        append(self, *args)
        file.write_text("other\n" * NUM_TEXTS)

    monkeypatch.setattr(Part, "append", changed)
    with pytest.raises(MLXZooError, match=r"texts\.txt was changed while it was read"):
        answer_all(embed(), file, tmp_path / "out.npy", batch_size=4)
    assert not (tmp_path / "out.npy").exists()


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "locked").mkdir()
    with read_only(tmp_path / "locked"), pytest.raises(PermissionError, match="locked"):
        answer_all(classify(), folder, tmp_path / "locked" / "out.jsonl")


def test_a_bar_on_a_terminal_and_nothing_in_a_pipe(folder, tmp_path, monkeypatch, capsys):
    answer_all(classify(), folder, tmp_path / "a.jsonl")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    answer_all(classify(), folder, tmp_path / "b.jsonl")
    out, err = capsys.readouterr()
    assert not out
    assert "200/200" in err
    assert "/s" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "resnet_digits", "a.png", "--on-error", "stop"], "goes with --output"),
        (["predict", "resnet_digits", "a", "b", "--output", "c.jsonl"], "takes one folder"),
        (["predict", "resnet_digits", "--output", "c.jsonl"], "takes one folder"),
        (["embed", "bert_docs", "--output", "c.npy"], "one file of texts"),
    ],
)
def test_wrong_usage(words, message):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert message in result.output


# Interrupted ------------------------------------------------------------------------------------

# Runs work again and again, each time in a process that kills itself at the next step: when a file
# beside the output is opened, renamed or removed, or when a block is half written; then it goes on.
STEPS = """
import os, random, resource, shutil, signal, sys
from pathlib import Path
import mlx_zoo
from mlx_zoo.tasks import blocks, jobs

kind, inputs, out, wanted = sys.argv[1], *map(Path, sys.argv[2:])
wanted = wanted.read_bytes()
random.seed(0)

def work():
    task, name = {"predict": ("image-classification", "resnet_digits"),
                  "embed": ("sentence-embedding", "bert_docs")}[kind]
    jobs.answer_all(mlx_zoo.pipeline(task, name), inputs, out, batch_size=24)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def watched(last):
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        return steps == last

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(str(out)):
            step() and die()

    class Torn:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if step():
                self.file.write(data[: random.randrange(len(data))])
                die()
            return self.file.write(data)

    enter, read = blocks.Part.__enter__, blocks.Block.read

    def entered(self):
        enter(self)
        self.file = Torn(self.file)
        return self

    def counted(self):
        step() and die()
        return read(self)

    blocks.Part.__enter__, blocks.Block.read = entered, counted
    sys.addaudithook(hook)
    work()

def process(function, *args):
    if not (child := os.fork()):
        status = 1
        try:
            function(*args)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]

kills = 0
while (status := process(watched, kills + 1)) != 0:
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
    assert not out.exists() or out.read_bytes() == wanted
    assert process(work) == 0
    assert out.read_bytes() == wanted
    shutil.rmtree(out.parent)
assert out.read_bytes() == wanted
print(kills)
"""


@pytest.mark.parametrize("kind", ["predict", pytest.param("embed", marks=pytest.mark.slow)])
def test_killed_at_every_step_it_goes_on(kind, folder, sentences, tmp_path):
    (tmp_path / "few.txt").write_text("\n".join(sentences.read_text().splitlines()[:300]))
    inputs, suffix = {"predict": (folder / "1", "jsonl"), "embed": (tmp_path / "few.txt", "npy")}[
        kind
    ]
    wanted = tmp_path / f"wanted.{suffix}"
    answer_all({"predict": classify, "embed": embed}[kind](), inputs, wanted, batch_size=24)
    command = [sys.executable, "-c", STEPS, kind, inputs, tmp_path / "at" / f"o.{suffix}", wanted]
    done = subprocess.run(
        [*map(str, command)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def test_killed_at_any_moment_it_goes_on(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part-0"
    words = ["predict", "resnet_digits", folder, "--batch-size", 2, "--output"]
    assert command_line(*words, tmp_path / "wanted.jsonl").returncode == 0
    seeded, sizes = random.Random(0), []
    whole = (tmp_path / "wanted.jsonl").stat().st_size
    for share in (0.2, 0.5, 0.8):
        command = [sys.executable, "-m", "mlx_zoo", *words, out]
        process = subprocess.Popen([*map(str, command)], env=environment())
        least = whole * (share + seeded.uniform(-0.1, 0.1))
        while process.poll() is None and not (part.exists() and part.stat().st_size > least):
            time.sleep(0.001)
        process.kill()
        process.wait()
        sizes.append(part.stat().st_size if part.exists() else whole)
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] < whole
    done = command_line(*words, out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_before"] > 0
    assert out.read_bytes() == (tmp_path / "wanted.jsonl").read_bytes()


def test_what_is_torn_or_damaged_is_cut(folder, tmp_path):
    run, out = classify(), tmp_path / "out.jsonl"
    answer_all(run, folder, tmp_path / "wanted.jsonl")
    part = tmp_path / "out.jsonl.part-0"
    append, count = Part.append, 0

    def limited(self, *args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        append(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Part, "append", limited)
        with pytest.raises(KeyboardInterrupt):
            answer_all(run, folder, out)
    whole, three = part.read_bytes(), [*read_blocks(part)]
    assert [block.first for block in three] == [0, 32, 64]
    assert b"".join(map(Block.read, three)) in (tmp_path / "wanted.jsonl").read_bytes()
    seeded, end = random.Random(0), three[1].offset + three[1].size
    for cut in sorted(seeded.sample(range(end, len(whole)), 40)):
        part.write_bytes(whole[:cut])
        assert [*read_blocks(part)] == three[:2], cut
        part.write_bytes(whole[:cut] + b"\0" * (len(whole) - cut))  # a power cut leaves such
        assert [*read_blocks(part)] == three[:2], cut
        part.write_bytes(whole[:cut] + bytes([whole[cut] ^ 4]) + whole[cut + 1 :])
        assert [*read_blocks(part)] == three[:2], cut
    done = answer_all(run, folder, out)
    assert done.num_before == 64
    assert out.read_bytes() == (tmp_path / "wanted.jsonl").read_bytes()


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import mlx_zoo
from mlx_zoo.tasks.jobs import answer_all
run = mlx_zoo.pipeline("image-classification", "resnet_digits")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    answer_all(run, sys.argv[1], sys.argv[2])
except OSError as error:
    print(error)
"""


def test_a_full_disk(folder, tmp_path):
    """In the middle of a block, and of the output: the path is named, and the work goes on."""
    out, wanted = tmp_path / "out.jsonl", tmp_path / "wanted.jsonl"
    answer_all(classify(), folder, wanted)
    size = wanted.stat().st_size
    for room, name in ((size // 2, "out.jsonl.part-0"), (size - 1, "out.jsonl.part-0")):
        command = [sys.executable, "-c", FULL, folder, out, room]
        done = subprocess.run(
            [*map(str, command)], env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert name in done.stdout
        assert "File too large" in done.stdout
        assert not out.exists()
    assert answer_all(classify(), folder, out).num_before >= 96
    assert out.read_bytes() == wanted.read_bytes()


# Shared -----------------------------------------------------------------------------------------


def launch(count, *words):
    """`mlx.launch -n count -- mlx-zoo ...`."""
    return launching.launch(count, "-m", "mlx_zoo", *words, env=environment())


def test_two_processes_share_the_work(folder, sentences, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    (images / "1" / "bad.png").write_bytes(b"no image")
    answer_all(classify(), images, tmp_path / "wanted.jsonl", top_k=3)
    words = ("predict", "resnet_digits", images, "--top-k", 3, "--output", tmp_path / "out.jsonl")
    done = launch(2, *words)
    assert done.stdout.count("201 inputs, 1 failed") == 1, done.stderr  # one speaks for both
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "wanted.jsonl").read_bytes()

    out, wanted = tmp_path / "out.npy", tmp_path / "wanted.npy"
    answer_all(embed(), sentences, wanted, batch_size=8)
    words = ("embed", "bert_docs", sentences, "--batch-size", 8, "--output", out)
    with pytest.MonkeyPatch.context() as patch:  # two windows by one process, the rest by two
        patch.setattr(Part, "append", limit(Part.append, 2))
        with pytest.raises(KeyboardInterrupt):
            answer_all(embed(), sentences, out, batch_size=8)
    assert [block.num for block in read_blocks(out.with_name("out.npy.part-0"))] == [8 * SHARED] * 2
    done = launch(2, *words)
    assert f"{2 * 8 * SHARED} of them before" in done.stdout, done.stderr
    assert out.read_bytes() == wanted.read_bytes()
    assert {p.name for p in tmp_path.glob("out.*")} == {
        *("out.jsonl", "out.jsonl.job", "out.npy", "out.npy.job")
    }


def limit(append, most):
    """`append` that is interrupted after so many."""
    count = 0

    def limited(self, *args):
        nonlocal count
        count += 1
        if count > most:
            raise KeyboardInterrupt
        append(self, *args)

    return limited


def test_a_launch_of_one(sentences, tmp_path):
    done = launch(1, "embed", "bert_docs", sentences, "--output", tmp_path / "out.npy")
    assert "500 inputs, 0 failed" in done.stdout, done.stderr


CREW = """
import os, signal, sys
import mlx_zoo
from mlx_zoo.errors import MLXZooError
from mlx_zoo.tasks.blocks import Part
from mlx_zoo.tasks.jobs import answer_all
inputs, out, die, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
append, count = Part.append, 0

def deadly(self, *args):
    global count
    count += 1
    if count == die:
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, *args)

if die:
    Part.append = deadly
run = mlx_zoo.pipeline("image-classification", "resnet_digits")
try:
    answer_all(run, inputs, out, batch_size=batch_size)
except MLXZooError as error:
    print(error)
"""


def crew(tmp_path, *members):
    """Processes as mlx.launch starts them, but on their own: nobody ends one if another dies."""
    port, hosts = launching.free_port(), tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(len(members))]))
    started = []
    for rank, words in enumerate(members):
        command = [sys.executable, "-c", CREW, *map(str, words)]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        own = environment(MLX_RANK=rank, MLX_HOSTFILE=hosts)
        started.append(subprocess.Popen(command, env=own, text=True, **pipes))
    try:
        return [(*process.communicate(timeout=120), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("dying", [0, 1])
def test_one_that_dies_is_missed(dying, folder, tmp_path):
    out, wanted = tmp_path / "out.jsonl", tmp_path / "wanted.jsonl"
    answer_all(classify(), folder, wanted, batch_size=8)
    words = [(folder, out, 2 if rank == dying else 0, 8) for rank in range(2)]
    found = crew(tmp_path, *words)
    assert found[dying][2] == -signal.SIGKILL
    said, _, status = found[1 - dying]
    assert "another process ended early" in said
    assert status == 0
    assert not out.exists()
    done = answer_all(classify(), folder, out, batch_size=8)
    assert done.num_before == 8 * (1 + (12, 13)[dying]), "one window of the dead, and the other's"
    assert out.read_bytes() == wanted.read_bytes()
    assert not [*tmp_path.glob("*.part-*")]


def test_processes_with_other_work_do_not_share_it(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    found = crew(tmp_path, (folder, out, 0, 8), (folder, out, 0, 16))
    assert all("do not have the same inputs" in said for said, _, _ in found), found
    assert not out.exists()


def test_what_is_not_launched_is_alone(monkeypatch):
    for name in processes.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mlx.core.distributed.init", lambda: 1 / 0)
    assert (processes.Crew().rank, processes.Crew().size) == (0, 1)
