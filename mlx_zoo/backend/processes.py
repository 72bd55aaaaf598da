"""The processes that share a task, under `mlx.launch` or MPI: who they are, and whether all live.

MLX's own backends carry the data: TCP between machines (the ring), MPI, or NCCL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_zoo.errors import MLXZooError

# One of these is in the environment of a process that mlx.launch or mpirun has started.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Crew:
    """The processes that share the work, by MLX's own backends; one that was not launched is alone.

    One that dies closes its connections, and the others learn of it where they next meet. (They do
    not learn of one that hangs: `mlx.launch` waits for it, too.)
    """

    def __init__(self) -> None:
        self.rank, self.size, self.meetings = 0, 1, 0
        hosts = os.environ.get("MLX_HOSTFILE")
        if hosts and not Path(hosts).read_text().strip():
            return  # `mlx.launch -n 1` writes it so, and MLX does not read it
        if any(name in os.environ for name in LAUNCHED):
            try:
                group = mx.distributed.init()
            except RuntimeError as error:
                raise MLXZooError(f"the other processes cannot be reached: {error}") from error
            self.rank, self.size = group.rank(), group.size()

    def meet(self, words: Iterable[int] = ()) -> np.ndarray:
        """Wait for all; (processes, words) of what each says. MLXZooError where one is gone."""
        said = np.array([*words], np.uint32)
        if self.size == 1:
            return said[None]
        # Where a connection is lost, the ring of MLX 0.32 may give what the memory held before: the
        # number of the meeting shows what is new.
        self.meetings += 1
        mine = np.concatenate([np.array([self.meetings, self.rank], np.uint32), said])
        try:
            found = np.array(mx.distributed.all_gather(mx.array(mine[None])))
        except RuntimeError:
            found = mine[None]
        wanted = [[self.meetings, rank] for rank in range(self.size)]
        if not np.array_equal(found[:, :2], wanted):
            raise MLXZooError(
                "another process ended early: what is done is kept, the same command goes on"
            )
        return found[:, 2:]

    def agree(
        self, work: Mapping[str, Any], what: str = "the same inputs, network and options"
    ) -> None:
        """Raise MLXZooError unless all processes have the same work."""
        digest = sha256(json.dumps(work, sort_keys=True).encode()).digest()
        if len(np.unique(self.meet(np.frombuffer(digest, np.uint32)), axis=0)) > 1:
            raise MLXZooError(f"the processes do not have {what}")

    def first(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The arrays of the first process, in all of them."""
        if self.size == 1:
            return dict(arrays)
        own = {n: x if self.rank == 0 else mx.zeros_like(x) for n, x in arrays.items()}
        found = {name: mx.distributed.all_sum(x) for name, x in own.items()}
        mx.eval(found)
        self.meet()  # had one gone, these were not its arrays
        return found
