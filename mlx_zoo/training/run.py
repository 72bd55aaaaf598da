"""A network on its way through the data: steps, evaluations, checkpoints.

An epoch is the data once; a step is `accumulate` batches, and one move of the parameters. Chance
(order, augmentation, dropout) follows from the seed, the epoch and the step alone: a run that was
ended, by whatever, goes on from its latest checkpoint with the very bits of one that was not.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo.backend.processes import Crew
from mlx_zoo.errors import MLXZooError
from mlx_zoo.tasks import batches as bars
from mlx_zoo.training.checkpoints import Checkpoints
from mlx_zoo.training.data import Dataset
from mlx_zoo.training.history import Log
from mlx_zoo.training.objectives import Objective
from mlx_zoo.training.optimizers import Arrays, Optimizer, schedule
from mlx_zoo.training.options import Options
from mlx_zoo.training.steps import Learner, evaluate, trainable_of
from mlx_zoo.training.trainable import training_mode

log = logging.getLogger("mlx_zoo")


@dataclass
class State:
    """Where a run is: what a checkpoint holds besides arrays. All of it is JSON's."""

    step: int = 0  # that were taken
    epoch: int = 0  # of the next batch
    batch: int = 0  # of the next batch, in its epoch
    num_updates: int = 0  # steps but for those that float16 skipped
    loss_scale: float = 1.0
    scale_steps: int = 0
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    waits: int = 0  # evaluations since the best
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """A network on its way through the data."""

    def __init__(
        self,
        model: nn.Module,
        train: Dataset,
        val: Dataset | None,
        objective: Objective,
        options: Options,
        num_steps: int,
        crew: Crew,
        keeper: Checkpoints | None,
    ):
        self.model, self.train_data, self.val_data, self.objective = model, train, val, objective
        self.options, self.num_steps, self.crew, self.keeper = options, num_steps, crew, keeper
        names = ("momentum", "betas", "weight_decay", "layer_decay")
        own = {name: getattr(options, name) for name in names}
        optimizer = Optimizer(model, trainable_of(model), kind=options.optimizer, **own)
        self.learner = Learner(
            model,
            objective,
            optimizer,
            crew,
            precision=options.precision,
            clip_norm=options.clip_norm,
            batch_size=options.batch_size,
        )
        assert options.learning_rate is not None  # it was chosen by now
        self.learning_rate = options.learning_rate
        self.factor = schedule(options.schedule, options.warmup, num_steps)
        self.metric = options.monitor or objective.monitor[0]
        self.state = State(loss_scale=self.learner.scale.value)
        self.best: Arrays = {}

    def train(self, checkpoint_every: int | None, shown: bool) -> None:
        """Take all steps that are left; then the network has the best weights, in eval mode."""
        if self.keeper is not None:
            self._go_on(self.keeper)
            self.crew.agree(
                {"step": self.state.step, "best": self.state.best_step},
                "the same checkpoint: the output is to be a folder that all of them see",
            )
        writes = self.keeper is not None and self.crew.rank == 0
        rows = Log(self.keeper.output if self.keeper and writes else None, self.state.history)
        try:
            with (
                self.learner.over_processes(),
                _interruptible(self.crew.size == 1) as interrupted,
                bars.progress(self.num_steps, shown, self.state.step) as advance,
            ):
                while not self.state.finished:
                    before = self.state.step
                    for group, is_last in self._groups():
                        self._step(group, is_last, rows)
                        advance(1)
                        if self._is_due(checkpoint_every, is_last) or interrupted():
                            self._keep()
                        if interrupted():
                            raise KeyboardInterrupt
                        if self.state.finished:
                            break
                    if self.state.step == before:  # it would never end
                        raise ValueError(
                            f"epoch {self.state.epoch + 1}: there are no examples to train with"
                        )
        except KeyboardInterrupt:
            log.warning("stopped after step %d of %d", self.state.step, self.num_steps)
            raise
        finally:
            self.learner.place(self.learner.whole())
            self.model.eval()
        if self.best:
            self.learner.place(self.best)
        mx.eval(self.model.parameters())

    def _groups(self) -> Iterator[tuple[list[Any], bool]]:
        """The batches of each step of this epoch that are left; whether they are the last."""
        state, options = self.state, self.options
        part = (self.crew.rank, self.crew.size)
        found = self.train_data.batches(
            state.epoch, options.batch_size, start=state.batch, part=part
        )
        training_mode(self.model)
        with closing(found) if hasattr(found, "close") else ExitStack():  # type: ignore[type-var]
            batches = iter(found)
            group = [*islice(batches, options.accumulate)]
            while group:
                following = [*islice(batches, options.accumulate)]
                yield group, not following
                group = following

    def _step(self, group: list[Any], is_last: bool, rows: Log) -> None:
        state, options = self.state, self.options
        rate = self.learning_rate * self.factor(state.step)
        try:
            taken = self.learner.step(group, rate, (options.seed, state.step))
        except MLXZooError as error:
            raise MLXZooError(f"step {state.step + 1}: {error}") from error
        state.step += 1
        state.batch += len(group)
        epoch = self._epochs_done(is_last)
        if is_last:
            state.epoch, state.batch = state.epoch + 1, 0
        state.finished = state.step >= self.num_steps or state.epoch >= options.epochs
        row = {
            "step": state.step,
            "epoch": epoch,
            "loss": _finite(taken.loss),
            "learning_rate": rate,
            "grad_norm": _finite(taken.grad_norm),
        }
        if self.val_data is not None and self._evaluates(is_last):
            row |= self._evaluate()
        state.history.append(row)
        rows.add(row)

    def _epochs_done(self, is_last: bool) -> float:
        num_batches = self.train_data.num_batches(self.options.batch_size)
        if is_last or not num_batches:
            return self.state.epoch + int(is_last)
        return round(self.state.epoch + self.state.batch / num_batches, 6)

    def _evaluates(self, is_last: bool) -> bool:
        every = self.options.evaluate_every
        return self.state.finished or (is_last if every is None else self.state.step % every == 0)

    def _evaluate(self) -> dict[str, Any]:
        """The metrics, for the row of this step; the best weights are kept in mind."""
        state, data = self.state, self.val_data
        assert data is not None
        found = evaluate(self.model, self.objective, data, self.options.batch_size, self.crew)
        training_mode(self.model)
        if self._is_better(found):
            state.best_step, state.best_metrics, state.waits = state.step, found, 0
            self.best = self.learner.moving()
        else:
            state.waits += 1
        if self.options.patience is not None and state.waits >= self.options.patience:
            state.finished = True
        if self.crew.rank == 0:
            told = ", ".join(f"{name} {x:.4g}" for name, x in found.items())
            log.info("step %d, epoch %d: %s", state.step, state.epoch, told)
        return {f"val_{name}": _finite(x) for name, x in found.items()}

    def _is_better(self, found: Mapping[str, float]) -> bool:
        """By the metric; of equals, the one with the lower loss."""
        if not self.state.best_metrics:
            return True
        return self._merit(found) > self._merit(self.state.best_metrics)

    def _merit(self, found: Mapping[str, float]) -> list[float]:
        sign = -1 if self.objective.direction(self.metric) == "min" else 1
        merits = [sign * found[self.metric], -found["loss"]]
        return [-math.inf if math.isnan(merit) else merit for merit in merits]

    def _is_due(self, every: int | None, is_last: bool) -> bool:
        """Whether a checkpoint is kept after this step."""
        evaluated = "val_loss" in self.state.history[-1]
        regular = is_last if every is None else self.state.step % every == 0
        return self.state.finished or evaluated or regular

    # Checkpoints

    def _keep(self) -> None:
        if self.keeper is None or self.crew.rank != 0:
            return
        state, scale = self.state, self.learner.scale
        state.num_updates = self.learner.num_updates
        state.loss_scale, state.scale_steps = scale.value, scale.steps
        arrays = {f"network/{name}": x for name, x in self.learner.moving().items()}
        arrays |= {f"optimizer/{k}": x for k, x in self.learner.optimizer.state.items()}
        self.keeper.keep(asdict(state), arrays, self.best, state.best_step)

    def _go_on(self, keeper: Checkpoints) -> None:
        """From the latest checkpoint, where there is one."""
        found = keeper.latest(sweep=self.crew.rank == 0)
        if found is None:
            return
        state, arrays, self.best = found
        own = {f.name for f in fields(State)}
        self.state = State(**{name: x for name, x in state.items() if name in own})
        parts: dict[str, Arrays] = {"network": {}, "optimizer": {}}
        for name, x in arrays.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = x
        self.learner.restore(parts["network"], parts["optimizer"], self.state.num_updates)
        scale = self.learner.scale
        scale.value, scale.steps = self.state.loss_scale, self.state.scale_steps
        if self.crew.rank == 0:
            log.info("going on after step %d of %d", self.state.step, self.num_steps)


def _finite(value: float) -> float | None:
    """As JSON has it, which knows no infinities."""
    return value if math.isfinite(value) else None


@contextmanager
def _interruptible(wanted: bool) -> Iterator[Any]:
    """Ctrl-C is heeded between steps: what is yielded says whether it was pressed. Twice: at once.

    In the main thread alone, to which signals come.
    """
    pressed = False

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if (
        not wanted
        or threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
