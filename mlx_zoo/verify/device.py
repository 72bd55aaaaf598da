"""A verification on another device than the CPU, with that on the CPU beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from mlx_zoo.catalogue import random_state_kept
from mlx_zoo.verify.report import Report

TF32 = "MLX_ENABLE_TF32"
NOT_FLOAT32 = (
    "float32 on this gpu is not float32: products there have fewer digits. MLX reads "
    "MLX_ENABLE_TF32=0 before its first product on the GPU alone: set it before Python starts"
)


@contextmanager
def undisturbed(device: str) -> Iterator[None]:
    """MLX's random state and the environment are afterwards what they were.

    Meanwhile TF32 is off where `device` is "gpu", as far as it can be: MLX reads the variable once,
    at its first product on the GPU, for as long as the process lives.
    """
    settles = device == "gpu" and TF32 not in os.environ
    if settles:
        os.environ[TF32] = "0"
    try:
        with random_state_kept():
            yield
    finally:
        if settles:
            os.environ.pop(TF32, None)


@dataclass(frozen=True)
class DeviceReport(Report):
    """Whether a network computes the same on a device that is not the CPU.

    Where the CPU passes and the device does not, the network is the right one, and the difference
    is the device's arithmetic.
    """

    cpu: Report | None = None  # the same comparison on the CPU
    real_float32: bool = True  # whether products of float32 have all of their digits there

    @property
    def reason(self) -> str:
        own = super().reason
        if self.passed or self.cpu is None or not self.cpu.passed:
            return own
        cause = f"{NOT_FLOAT32}. " if not self.real_float32 else ""
        return (
            f"the same network, whose arithmetic on this {self.device} differs: {cause}{own}. "
            f"On the cpu: {self.cpu.reason}"
        )

    def summary(self) -> dict[str, Any]:
        cpu = self.cpu and self.cpu.summary()
        return {**super().summary(), "real_float32": self.real_float32, "cpu": cpu}


def on_another_device(report: Report, cpu: Report, real: bool) -> Report:
    """The report of a device, with the CPU's beside it."""
    beside = f"on the cpu: {cpu.reason}"
    notes = (*report.notes, beside, *(() if real else (NOT_FLOAT32,)))
    if type(report) is not Report:  # a quantised network's: its tensors are judged, not this device
        return replace(report, notes=notes)
    own = {f.name: getattr(report, f.name) for f in fields(Report)}
    return DeviceReport(**{**own, "notes": notes}, cpu=cpu, real_float32=real)
