"""One case and its judgement: what we make of an input, and what the reference makes of it."""

from __future__ import annotations

import ctypes
import random
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np

MAX_SECONDS = 5.0  # of one case, on our side
MAX_RATIO = 4  # bytes of memory for one byte of input
# What an interpreter, MLX and malloc take beside the input: pages first touched, pools that grow.
NOISE = 32 << 20  # bytes of memory in use
ADDRESSES = 256 << 20  # bytes of address space, which threads and pools reserve without using it


@dataclass
class Case:
    """A mutant: what it is (a file's bytes, or a target's own value) and how it was made."""

    number: int
    value: Any
    size: int  # bytes of the input
    steps: list[str] = field(default_factory=list)


class Target(Protocol):
    """What is fuzzed. `make` is deterministic; `excuse` is asked about what only we accept."""

    allowed: tuple[type[Exception], ...]  # what our reader promises to raise

    def make(self, number: int) -> Case: ...

    def ours(self, case: Case) -> Any: ...

    def reference(self, case: Case) -> Any: ...

    def differences(self, case: Case, ours: Any, theirs: Any) -> list[str]: ...

    def excuse(self, case: Case, ours: Any, refusal: Exception) -> tuple[str, list[str]] | None:
        """Why the reference's refusal does not count, and what is wrong all the same."""


def rng(target: str, number: int) -> random.Random:
    """The source of all chance in a case."""
    return random.Random(f"{target} {number}")


def scrambled(data: bytes, other: bytes, chance: random.Random) -> tuple[bytes, str]:
    """`data` changed without regard to what its bytes mean, and how; `other` is a file alike."""
    at, size = chance.randrange(len(data) + 1), chance.randint(1, 12)
    match chance.randrange(7):
        case 0:
            return data[:at], f"cut at {at}"
        case 1:
            return data + chance.randbytes(size), f"{size} bytes more"
        case 2:
            return data[:at] + data[at + size :], f"{size} bytes out at {at}"
        case 3:
            return data[:at] + chance.randbytes(size) + data[at:], f"{size} bytes in at {at}"
        case 4:
            end = chance.randrange(len(other))
            return data[:at] + other[end:], f"spliced at {at} with another's {end}"
        case 5:
            text = bytes([chance.choice(b'"{}[],:-0e\\().KMhqtuRQ\x85')])
            return data[:at] + text + data[at + 1 :], f"{text!r} at {at}"
    flipped = bytearray(data)
    if flipped:
        flipped[at % len(flipped)] ^= 1 << chance.randrange(8)
    return bytes(flipped), f"a bit of byte {at}"


def bits(array: mx.array) -> bytes:
    """The bytes of an array, whatever they mean."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


@dataclass
class Result:
    """What became of a case. `problems` are findings; an empty list is what we hope for."""

    number: int
    size: int
    ours: str = ""  # "accepted", or the type of the error
    why: str = ""  # its message, without what differs from case to case
    seconds: float = 0.0
    peak: int | None = None  # bytes of memory that reading it took; None where that is unknown
    theirs: str = ""  # "accepted", "refused"
    their_why: str = ""
    excuse: str = ""
    problems: list[str] = field(default_factory=list)


def judge(
    target: Target,
    number: int,
    announce: Callable[[str, Result], None] = lambda phase, result: None,
) -> Result:
    """Make case `number`, read it on both sides, compare. `announce` hears of each phase."""
    case = target.make(number)
    result = Result(number, case.size)
    announce("ours", result)
    ours = _read(target, case, result)
    announce("theirs", result)
    _compare(target, case, ours, result)
    return result


def _read(target: Target, case: Case, result: Result) -> Any:
    value = None
    memory = Memory(MAX_RATIO * case.size + ADDRESSES)
    start = time.perf_counter()
    try:
        value = target.ours(case)
        result.ours = "accepted"
    except target.allowed as error:
        result.ours, result.why = type(error).__name__, gist(error)
    except Exception as error:
        result.ours, result.why = type(error).__name__, gist(error)
        result.problems.append(f"{type(error).__name__} escaped: {str(error)[:300]}")
    finally:
        result.seconds = time.perf_counter() - start
        result.peak = memory.release()
    if result.seconds > MAX_SECONDS:
        result.problems.append(f"took {result.seconds:.1f} s")
    if result.peak is not None and result.peak > MAX_RATIO * case.size + NOISE:
        result.problems.append(f"took {result.peak} bytes of memory for {case.size} of input")
    return value


def _compare(target: Target, case: Case, ours: Any, result: Result) -> None:
    try:
        theirs = target.reference(case)
    except Exception as refusal:
        result.theirs, result.their_why = "refused", gist(refusal)
        if result.ours != "accepted":
            return
        found = target.excuse(case, ours, refusal)
        if found is None:
            result.problems.append(f"accepted, but the reference says: {str(refusal)[:300]}")
        else:
            result.excuse, problems = found
            result.problems += problems
        return
    result.theirs = "accepted"
    if result.ours == "accepted":
        result.problems += target.differences(case, ours, theirs)


def gist(error: Exception) -> str:
    """An error's message without paths, names and numbers: what kind of complaint it is."""
    text = " ".join(str(error).split("\n")[:2]) or type(error).__name__
    text = re.sub(r"\S*/\S+: ", "", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|\[[^\]]*\]", "_", text)
    return re.sub(r"-?\d+", "#", text)[:90]


class Memory:
    """The memory that this process takes from now on, and a limit to what it may ask for.

    Linux tells the peak of a span of time; elsewhere the peak is unknown, and there is no limit.
    """

    def __init__(self, limit: int):
        self.known = STATUS.exists()
        if self.known:
            trim()  # memory that was used before and kept would hide what is taken now
            CLEAR.write_text("5")  # VmHWM starts again from what is in use
            values = _status()
            self.before = values["VmRSS"]
            self.limits = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (values["VmSize"] + limit, self.limits[1]))

    def release(self) -> int | None:
        """Lift the limit. The peak above what was in use before, in bytes."""
        if not self.known:
            return None
        resource.setrlimit(resource.RLIMIT_AS, self.limits)
        return max(0, _status()["VmHWM"] - self.before)


LIBC = ctypes.CDLL(None)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def trim() -> None:
    """Give free memory back to the system, where the C library can."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def _status() -> dict[str, int]:
    """VmSize, VmRSS and VmHWM of this process, in bytes."""
    found = re.findall(r"^(VmSize|VmRSS|VmHWM):\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return {name: int(value) << 10 for name, value in found}
