"""A few thousand fuzzed cases of each target, the harness that judges them, and what it found."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import mlx_zoo  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from fuzz import headers, pickles, watch
from fuzz.pickles import Member, Parts

from mlx_zoo.errors import CheckpointError, UnsafeCheckpoint, UnsupportedFormat
from mlx_zoo.hub.torch_checkpoint import read_tensors
from mlx_zoo.mapping.engine import mismatches, to_mlx
from mlx_zoo.mapping.spec import Spec

ROOT = Path(mlx_zoo.__file__).parents[1]
TARGETS = ("fuzz.headers", "fuzz.pickles", "fuzz.state_dicts")


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_fuzzed_is_refused_or_right(target):
    summary = watch.run(target, 0, 2_000)
    assert not summary.failures, str(summary)
    assert summary.cases == 2_000
    assert summary.verdicts["both accept"] >= 200, "mutants that nothing reads prove little"
    assert summary.verdicts["both refuse"] >= 400
    assert max(summary.reasons.values()) < 500, "most fall at one check"


# --- The harness would notice ---------------------------------------------------------------------

MISTAKES = {  # what is changed in the readers, and what should be said of it
    "tensors that overlap": (
        "headers",
        "from mlx_zoo.hub import safetensors_header as m; m._check_offsets = lambda *a: None",
        "the reference says",
    ),
    "metadata of any kind": (
        "headers",
        "from mlx_zoo.hub import safetensors_header as m; m._check_metadata = lambda m: None",
        "the reference says",
    ),
    "a gradient of integers": (
        "pickles",
        "from mlx_zoo.hub import pickle_machine as m; m._check_grad = lambda *a: None",
        "the reference says",
    ),
    "a dim that is none": (
        "pickles",
        "from mlx_zoo.hub import pickle_machine as m; m._dims = lambda dims, limit=0: dims",
        "escaped",
    ),
    "a tensor without a home": (
        "state_dicts",
        "from mlx_zoo.mapping import engine as m; m._may_drop = lambda *a: True",
        "the reference says",
    ),
    "the order of a fused layer": (
        "state_dicts",
        "from mlx_zoo.mapping import engine as m\n"
        "targets = m._targets; m._targets = lambda row: targets(row)[::-1]",
        "other values|outputs differ",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name, tmp_path, monkeypatch):
    target, code, found = MISTAKES[name]
    # The mistake is made once the seeds have been read.
    body = "".join(f"        {line}\n" for line in code.splitlines())
    (tmp_path / "planted.py").write_text(
        f"from fuzz import {target}\n"
        f"class Target({target}.Target):\n"
        f"    def __init__(self, folder):\n"
        f"        super().__init__(folder{', tiny_only=True' * (target == 'state_dicts')})\n{body}"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    summary = watch.run("planted", 0, 400)
    assert summary.failures, "the mistake was not noticed"
    assert any(re.search(found, problem) for _, problem in summary.failures), str(summary)


MISBEHAVING = """
import ctypes, os, time
from fuzz.case import Case

class Target:
    allowed = (ValueError,)
    kept = []

    def __init__(self, folder):
        pass

    def make(self, number):
        return Case(number, number, 1000)

    def ours(self, case):
        match case.value:
            case 1:
                ctypes.string_at(0)
            case 2:
                time.sleep(60)
            case 3:
                self.kept.append(bytearray(b"x" * (60 << 20)))
            case 4:
                raise KeyError("not promised")
            case 5:
                bytearray(1 << 30)
            case 6:
                os._exit(7)
            case 8 | 10:
                raise ValueError("promised")
        return case.value

    def reference(self, case):
        match case.value:
            case 7 | 8:
                ctypes.string_at(0)
            case 9 | 10:
                raise RuntimeError("no")
        return case.value + (case.value == 11)

    def differences(self, case, ours, theirs):
        return [] if ours == theirs else ["differ"]

    def excuse(self, case, ours, refusal):
        return None
"""


def test_whatever_a_case_does_is_put_down_to_it(tmp_path, monkeypatch):
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    summary = watch.run("misbehaving", 0, 14, jobs=2)
    found = dict(summary.failures)
    wanted = {
        1: "died of SIGSEGV while we read it",
        2: "hung while we read it",
        4: "KeyError escaped",
        6: "exited with 7 while we read it",
        7: "accepted, but the reference died of SIGSEGV",
        9: "accepted, but the reference says: no",
        11: "differ",
    }
    if Path("/proc/self/clear_refs").exists():
        wanted |= {3: "bytes of memory for 1000 of input", 5: "MemoryError escaped"}
    assert found.keys() == wanted.keys()
    for number, text in wanted.items():
        assert text in found[number]
    assert summary.cases == 14
    assert summary.verdicts["both accept"] == 6 - (5 in wanted)
    assert summary.verdicts["both refuse"] == 5
    assert summary.verdicts["only we accept"] == 2
    assert sum(summary.verdicts.values()) == 14


CASES = """
import hashlib, pathlib, random, sys
from fuzz import headers, pickles, tiny
for target in headers, pickles:
    maker = target.Target(pathlib.Path(sys.argv[1]))
    made = [maker.make(n).value for n in range(200)]
    print(len(set(made)), hashlib.sha256(b"".join(made)).hexdigest())
print([tiny.tiny(random.Random(n)).name for n in range(200)])
"""


def test_a_case_is_a_function_of_its_number(tmp_path):
    first, second = (output("-c", CASES, tmp_path, seed=seed) for seed in ("1", "2"))
    assert first == second
    assert all(int(line.split()[0]) > 100 for line in first.splitlines()[:2]), "many are alike"


def test_one_case_is_told_in_full(tmp_path):
    arguments = ("-m", "tests.fuzz", "safetensors", "--replay", "11", "--save")
    said = output(*arguments, tmp_path / "x", seed="1")
    case = headers.Target(tmp_path).make(11)
    assert (tmp_path / "x").read_bytes() == case.value
    for text in (f"case 11: {case.size} bytes", *case.steps, "failures: 0"):
        assert text in said


def output(*arguments: str | Path, seed: str) -> str:
    """What Python prints, with another order of its sets."""
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- What it found --------------------------------------------------------------------------------


def checkpoint(zipped: bool = True, protocol: int = 2) -> Parts:
    return pickles.taken_apart({"a": torch.arange(4.0)}, zipped, protocol)


def refused(parts: Parts, tmp_path: Path, kind: type[CheckpointError], message: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(parts.pack())
    with pytest.raises(kind, match=message):
        read_tensors(path)


def test_a_checkpoint_that_is_put_together_again_is_read(tmp_path):
    for zipped in (True, False):
        for protocol in (2, 4):
            (tmp_path / "x.pth").write_bytes(checkpoint(zipped, protocol).pack())
            assert read_tensors(tmp_path / "x.pth")["a"].tolist() == [0, 1, 2, 3]


def test_a_member_that_is_a_folder(tmp_path):
    """torch reads nothing of it, and returns memory that no one has written."""
    for at in range(len(checkpoint().members) + 2):
        parts = checkpoint()
        parts.over = {(at, "attributes"): 0x10}
        refused(parts, tmp_path, CheckpointError, "or a folder")
    parts = checkpoint()
    parts.over = {(0, "attributes"): 0x20}
    (tmp_path / "x.pth").write_bytes(parts.pack())
    assert read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["BYTEORDER", "ByteOrder"])
def test_names_in_upper_case_are_the_same_names(tmp_path, name):
    """To torch they are: it would read this file as one of a big-endian machine."""
    parts = checkpoint()
    parts.members.append(Member(name, b"big"))
    refused(parts, tmp_path, CheckpointError, "occurs twice")
    parts.members = [member for member in parts.members if member.name != "byteorder"]
    refused(parts, tmp_path, UnsupportedFormat, "big-endian")


@pytest.mark.parametrize(
    ("name", "data", "kind", "message"),
    [
        ("version", b"11", UnsupportedFormat, "version 11"),
        ("version", b"0", UnsupportedFormat, "version 0"),
        ("version", b"9" * 64, UnsupportedFormat, "version 9"),
        (".storage_alignment", b"x", CheckpointError, "alignment"),
        (".data/serialization_id", b"\xff", CheckpointError, "id is not text"),
    ],
)
def test_what_torch_reads_beside_the_pickle(tmp_path, name, data, kind, message):
    parts = checkpoint()
    next(member for member in parts.members if member.name == name).data = data
    refused(parts, tmp_path, kind, message)


@pytest.mark.parametrize("zipped", [True, False])
def test_frames_hold_whole_opcodes(tmp_path, zipped):
    """Where a frame ends within an opcode, Python's own unpickler reads another one."""
    parts = checkpoint(zipped, 4)
    at = next(i for i, op in enumerate(parts.ops) if op[0] == 0x95)
    text = next(i for i, op in enumerate(parts.ops) if op.endswith(b"storage"))
    before = sum(map(len, parts.ops[at + 1 : text]))
    for size in (before + len(parts.ops[text]) - 3, 10**6, 2**64 - 1):
        parts.ops[at] = b"\x95" + struct.pack("<Q", size)
        refused(parts, tmp_path, CheckpointError, "malformed or truncated")
    parts.ops[at] = b"\x95" + struct.pack("<Q", before)
    parts.ops.insert(at + 1, b"\x95" + bytes(8))  # a frame within it
    refused(parts, tmp_path, CheckpointError, "malformed or truncated")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_protocol_that_does_not_exist(tmp_path, zipped):
    parts = checkpoint(zipped)
    parts.ops[0] = b"\x80\6"
    refused(parts, tmp_path, CheckpointError, "protocol 6")


@pytest.mark.parametrize(
    "over",
    [
        {"disks": (1, 0)},
        {"disks": (0, 1)},
        {"disks": (0xFFFF, 0xFFFF)},
        {"end": [1, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF]},
    ],
    ids=str,
)
def test_an_archive_on_several_disks(tmp_path, over):
    parts = checkpoint()
    parts.over = over
    refused(parts, tmp_path, CheckpointError, "several disks")


def test_the_version_that_counts_is_the_one_that_torch_reads(tmp_path):
    parts = checkpoint()
    parts.members.append(Member(".data/version", b"x"))
    refused(parts, tmp_path, CheckpointError, "which version")


def test_a_place_in_the_memo_beyond_all_others(tmp_path):
    parts = checkpoint()
    parts.ops.insert(2, b"r\xff\xff\xff\xff")  # Python's own unpickler asks for 64 GB
    refused(parts, tmp_path, UnsafeCheckpoint, "memo")


def test_expanded_tensors_take_little_more_than_the_file(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1).expand(2**22)}, path)  # 16 MiB
    assert read_tensors(path)["a"].shape == (2**22,)
    torch.save({"a": torch.ones(1).expand(2**22 + 2**12)}, path)
    with pytest.raises(UnsafeCheckpoint, match="asks for"):
        read_tensors(path)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)


STATE = {"fc.weight": mx.ones((2, 3)), "fc.bias": mx.ones(2)}


def test_a_number_is_written_in_ascii():
    spec = Spec(drop=("h.{i}.mask",))
    assert to_mlx({**STATE, "h.3.mask": mx.zeros(1)}, Net(), spec)
    assert mismatches({**STATE, "h.٣.mask": mx.zeros(1)}, Net(), spec) == ("no home for h.٣.mask",)


def test_what_could_stand_for_another_has_its_shape():
    spec = Spec(spare={"spare": "fc.bias"})
    assert to_mlx({**STATE, "spare": mx.zeros(2)}, Net(), spec)
    (problem,) = mismatches({**STATE, "spare": mx.zeros(3)}, Net(), spec)
    assert problem == "spare has another shape than fc.bias, for which it may stand"


def test_of_a_tied_layer_only_what_its_twin_has_is_dropped():
    """The bias of a head whose matrix is tied was lost without a word."""
    state, spec = {**STATE, "head.weight": mx.ones((2, 3))}, Spec(tied={"head": "fc"})
    assert to_mlx({**state, "head.bias": mx.ones(2)}, Net(), spec)
    for name in ("head.gamma", "head.weight.", "head.bias.x"):
        assert mismatches({**state, name: mx.ones(2)}, Net(), spec) == (f"no home for {name}",)
    spec = Spec(tied={"head": "embed"})
    embed = mx.ones((3, 2))
    model = nn.Module()
    model.embed = nn.Embedding(3, 2)
    state = {"embed.weight": embed, "head.weight": embed}
    assert to_mlx(state, model, spec)
    assert mismatches({**state, "head.bias": mx.ones(3)}, model, spec) == ("no home for head.bias",)
