"""One step of training: gradients of a batch, in pieces, in several processes, in half precision.

All sums are sums over what counts (examples, or tokens), and are divided once, at the end, by how
many that were: pieces of any sizes give the gradient of the mean over the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_unflatten

from mlx_zoo.backend.processes import Crew
from mlx_zoo.errors import MLXZooError
from mlx_zoo.mapping import engine
from mlx_zoo.models.layers import BatchNorm
from mlx_zoo.training.optimizers import Arrays, Optimizer
from mlx_zoo.training.trainable import STATISTICS

PRECISIONS = {"float32": None, "bfloat16": mx.bfloat16, "float16": mx.float16}
# Of float16, whose smallest gradients would be 0: as torch.amp's GradScaler has them.
FIRST_SCALE, SMALLEST_SCALE, LARGEST_SCALE, GROWS_AFTER = 2.0**16, 2.0**-14, 2.0**24, 2000


@dataclass
class LossScale:
    """By what the loss is multiplied (Micikevicius et al. 2017, arXiv:1710.03740).

    Halved where a gradient overflows, doubled after many steps in which none did.
    """

    value: float = 1.0
    steps: int = 0  # since it last changed

    def overflowed(self) -> bool:
        """Halve it. False where it cannot be halved any more: the loss itself is at fault."""
        self.value, self.steps = self.value / 2, 0
        return self.value >= SMALLEST_SCALE

    def passed(self) -> None:
        self.steps += 1
        if self.steps >= GROWS_AFTER and self.value < LARGEST_SCALE:
            self.value, self.steps = self.value * 2, 0


@dataclass(frozen=True)
class Taken:
    """What a step came to."""

    loss: float  # the mean over what counts in the whole batch, in all processes
    grad_norm: float  # before it is clipped
    skipped: bool = False  # float16: a gradient overflowed, and nothing was changed


class Learner:
    """A network and its optimiser, and how a step is taken.

    The network's own parameters stay in float32. With half precision, the forward and backward
    pass see copies of them; running statistics and the norms' arithmetic stay in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Any,
        optimizer: Optimizer,
        crew: Crew,
        *,
        precision: str = "float32",
        clip_norm: float | None = None,
        batch_size: int = 1,
    ):
        self.model, self.objective, self.optimizer, self.crew = model, objective, optimizer, crew
        self.half, self.clip_norm = PRECISIONS[precision], clip_norm
        self.scales = precision == "float16"
        self.scale = LossScale(FIRST_SCALE if self.scales else 1.0)
        self.rows = batch_size if self.scales else 1  # so that the scale is of a mean
        # A fresh head, and adapters, may have been drawn by each process for itself.
        self.parameters: Arrays = crew.first(trainable_of(model))
        self.place(self.parameters)
        self.frozen: Arrays = {  # statistics move, and are looked up when they are needed
            name: x
            for name, x in engine.parameters(model).items()
            if name not in self.parameters and not name.endswith(STATISTICS)
        }
        self.num_updates = 0
        self.norms = {n: m for n, m in model.named_modules() if isinstance(m, BatchNorm)}
        self._gradient = mx.value_and_grad(self._scaled_loss)

    def step(self, batches: Sequence[Any], learning_rate: float, seed: Sequence[int]) -> Taken:
        """Learn from one batch, in pieces.

        Args:
            seed: numbers that no other step has: chance (dropout, stochastic depth) follows from
                them, and from the process.

        Raises:
            MLXZooError: the loss is no number, or another process is gone. Nothing was changed.
        """
        before = self.statistics()
        try:
            gradients, total, count = self._gradients(batches, seed)
            loss = total / count if count else math.nan
            most = math.inf if self.clip_norm is None else self.clip_norm
            scale = self.rows / (self.scale.value * max(count, 1))
            gradients = {name: x.astype(mx.float32) * scale for name, x in gradients.items()}
            clipped, norm = clip_grad_norm(gradients, most)
            taken = Taken(loss, norm.item())
            if not (math.isfinite(loss) and math.isfinite(taken.grad_norm)):
                self._refuse(taken, count)
                self.place(before)
                return Taken(loss, taken.grad_norm, skipped=True)
        except BaseException:
            self.place(before)
            raise
        if self.scales:
            self.scale.passed()
        self.num_updates += 1
        self.place(self.optimizer.updated(self.parameters, clipped, learning_rate))
        self.parameters = trainable_of(self.model)
        mx.eval(self.parameters, self.optimizer.state, self.statistics())
        return taken

    def _refuse(self, taken: Taken, count: float) -> None:
        if not count:
            raise MLXZooError("nothing is asked of the network in this batch: no label counts")
        if self.scales and self.scale.overflowed():
            return
        what = "the loss" if not math.isfinite(taken.loss) else "the norm of the gradient"
        value = taken.grad_norm if math.isfinite(taken.loss) else taken.loss
        raise MLXZooError(
            f"{what} is {value}: try a lower learning_rate, more warmup, or precision='float32'"
        )

    def _gradients(
        self, batches: Sequence[Any], seed: Sequence[int]
    ) -> tuple[Arrays, float, float]:
        """The sums of the gradients (times the loss scale), of the losses, and what counts."""
        gradients: Arrays = {name: mx.zeros_like(x) for name, x in self.parameters.items()}
        total, count = mx.array(0.0), mx.array(0.0)
        for piece, batch in enumerate(batches):
            if self.crew.size > 1:
                self._meet(batch)
            if not batch.num_examples:
                continue
            mx.random.seed(number_of(*seed, piece, self.crew.rank))
            (_, loss, counts), found = self._gradient(
                self.parameters, batch.inputs, batch.targets, self.scale.value / self.rows
            )
            self.place(self.whole() if self.half else self.parameters)
            gradients = {n: x + found[n] for n, x in gradients.items()} if piece else found
            total, count = total + loss, count + counts.astype(mx.float32)
            mx.eval(gradients, total, count, self.statistics())
        if self.crew.size > 1:
            gradients, total, count = self._of_all(gradients, total, count)
        return gradients, float(total.item()), float(count.item())  # type: ignore[arg-type]

    def _meet(self, batch: Any) -> None:
        """All are there, each with its part of the same batch."""
        rows = self.crew.meet([batch.num_examples])[:, 0]
        if any(norm.training for norm in self.norms.values()) and not rows.all():
            raise ValueError(
                f"a batch of {rows.sum()} examples for {self.crew.size} processes: BatchNorm needs "
                "one in each; choose another batch_size, or fewer processes"
            )

    def _of_all(
        self, gradients: Arrays, total: mx.array, count: mx.array
    ) -> tuple[Arrays, mx.array, mx.array]:
        """The sums over all processes. They meet afterwards: had one gone, these were not sums."""
        own = [*gradients.values(), mx.stack([total, count])]
        *sums, counts = (x * self.crew.size for x in nn.average_gradients(own))
        mx.eval(sums, counts)
        self.crew.meet()
        return dict(zip(gradients, sums, strict=True)), counts[0], counts[1]

    def _scaled_loss(
        self, parameters: Arrays, inputs: Sequence[mx.array], targets: Any, scale: float
    ) -> tuple[mx.array, mx.array, mx.array]:
        if self.half is None:
            self.place(parameters)
        else:
            self.place({name: self._cast(x) for name, x in (self.frozen | parameters).items()})
            inputs = [self._cast(x) for x in inputs]
        total, count = self.objective.loss(self.model(*inputs), targets)
        return total * scale, mx.stop_gradient(total), mx.stop_gradient(count)

    def _cast(self, x: mx.array) -> mx.array:
        assert self.half is not None
        return x.astype(self.half) if mx.issubdtype(x.dtype, mx.floating) else x

    def place(self, arrays: Mapping[str, mx.array]) -> None:
        """Give the network these parameters."""
        self.model.update(tree_unflatten(list(arrays.items())))

    def statistics(self) -> Arrays:
        """The running statistics of every BatchNorm."""
        return {f"{name}.{leaf}": m[leaf] for name, m in self.norms.items() for leaf in STATISTICS}

    def moving(self) -> Arrays:
        """All that training changes."""
        return self.parameters | self.statistics()

    def whole(self) -> Arrays:
        """The network's own parameters, whatever a step had put in their place."""
        return self.parameters | self.frozen

    def restore(self, network: Arrays, optimizer: Arrays, num_updates: int) -> None:
        """Go on from what `moving` and the optimiser's state were."""
        self.place(network)
        self.parameters = trainable_of(self.model)
        self.optimizer.restore(optimizer, num_updates)
        self.num_updates = num_updates

    @contextmanager
    def over_processes(self) -> Iterator[None]:
        """BatchNorm takes the statistics of the whole batch, of which a process has a part."""
        if self.crew.size > 1:
            for norm in self.norms.values():
                norm.over_processes = mx.distributed.all_sum
        try:
            yield
        finally:
            for norm in self.norms.values():
                norm.__dict__.pop("over_processes", None)


def trainable_of(model: nn.Module) -> Arrays:
    """The parameters that learn, by their whole names."""
    return dict(tree_flatten(model.trainable_parameters()))


def number_of(*seed: int) -> int:
    """One of 2^64 numbers for MLX's random state; seeds that differ give others."""
    return int.from_bytes(sha256(repr(seed).encode()).digest()[:8], "little")


def evaluate(model: nn.Module, objective: Any, data: Any, batch_size: int, crew: Crew) -> dict:
    """The metrics of all examples, in eval mode, shared among the processes."""
    model.eval()
    metrics = objective.metrics()
    for batch in data.batches(0, batch_size, part=(crew.rank, crew.size)):
        if batch.num_examples:
            metrics.update(model(*batch.inputs), batch.targets)
    if crew.size > 1:
        own = np.asarray(metrics.sums, np.float64)
        every = crew.meet(np.ascontiguousarray(own).view(np.uint32).reshape(-1))
        whole = objective.metrics()
        for said in every:  # in the same order everywhere: the same bits
            whole.merge(np.ascontiguousarray(said).view(np.float64).reshape(own.shape))
        metrics = whole
    return metrics.values()
