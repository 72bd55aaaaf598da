"""finetune(): a network and data -> the network, trained on them.

It chooses: the network and its head, the data, what is trained. `run` does the work, step by step.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zoo import registry, zoo
from mlx_zoo.backend.inference import original_of
from mlx_zoo.backend.processes import Crew
from mlx_zoo.catalogue import random_state_kept
from mlx_zoo.hub import cache
from mlx_zoo.mapping import engine
from mlx_zoo.models.layers import BatchNorm, check_choice
from mlx_zoo.preprocess.image import as_sides
from mlx_zoo.tasks.batches import check_count
from mlx_zoo.training.checkpoints import Checkpoints
from mlx_zoo.training.curves import write_curves
from mlx_zoo.training.data import (
    Dataset,
    hold_out,
    inspect,
    task_of,
    training_data,
    validation_data,
)
from mlx_zoo.training.examples import LANGUAGE, Examples, Stream
from mlx_zoo.training.images import PrepareImages, preprocessing_like
from mlx_zoo.training.lora import digest_of_base
from mlx_zoo.training.objectives import Objective, objective_of
from mlx_zoo.training.optimizers import OPTIMIZERS, default_learning_rate
from mlx_zoo.training.options import Options
from mlx_zoo.training.outcome import as_finetuned, write_adapter, write_model
from mlx_zoo.training.parts import head_of
from mlx_zoo.training.run import Run
from mlx_zoo.training.steps import number_of
from mlx_zoo.training.trainable import Trainable, choose, training_mode

log = logging.getLogger("mlx_zoo")


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` came to. Printed, a few lines."""

    model: nn.Module  # in eval mode, with the best weights; the last, where nothing was evaluated
    history: list[dict[str, Any]]  # a row for each step
    metrics: dict[str, float]  # of the best evaluation
    trainable: Trainable
    learning_rate: float  # the highest
    output: Path | None

    def __str__(self) -> str:
        last, checkpoint = self.history[-1], self.model.checkpoint
        lines = [
            f"{checkpoint.name}, for {checkpoint.task}: {_counted(last['step'], 'step')}, "
            f"{_counted(last['epoch'], 'epoch')}, at a learning rate of {self.learning_rate:g}",
            f"trained: {self.trainable.method}, {self.trainable.num_trainable:,} of "
            f"{self.trainable.num_parameters:,} parameters ({self.trainable.percent:.2f} %)",
            "training loss: " + " -> ".join(f"{_number(row['loss']):.4g}" for row in self._ends),
        ]
        if self.metrics:
            told = ", ".join(f"{name} {x:.4g}" for name, x in self.metrics.items())
            lines.append(f"best evaluation: {told}")
        if self.output is not None:
            lines.append(f"in {self.output}")
        return "\n".join(lines)

    @property
    def _ends(self) -> list[dict[str, Any]]:
        return [self.history[0], self.history[-1]]


def _counted(count: float, what: str) -> str:
    return f"{count:.4g} {what}{'s' * (count != 1)}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def finetune(
    model: nn.Module | str | os.PathLike[str],
    train_data: Any,
    val_data: Any = None,
    *,
    task: str | None = None,
    method: Any = "full",
    output: str | os.PathLike[str] | None = None,
    epochs: int = 3,
    max_steps: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    optimizer: str = "adamw",
    learning_rate: float | None = None,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    schedule: str = "cosine",
    warmup: float | int = 0.1,
    layer_decay: float = 1.0,
    clip_norm: float | None = 1.0,
    precision: str = "float32",
    augment: Any = True,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    max_length: int | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    monitor: str | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Finetuned:
    """Train a network on data, in place, and keep the best of it.

    Args:
        model: a network from `load`, or a name: its pretrained weights, with a head for the
            classes of the data.
        train_data: a folder with a folder of images for each class; .csv or .jsonl with "text" (or
            "image") and "label", "text_pair", "tokens" and "tags"; a .txt or a folder of them for
            language models; (inputs, labels); a sequence of (input, label) or of dicts; any other
            iterable, which is streamed (give max_steps, too).
        val_data: the same kinds, or a float: that part of `train_data` is held out, of each class
            alike. None: nothing is evaluated.
        task: which head, for a name; None: as the data is.
        method: what is trained: "full", "head", "last-N" (the head and the last N blocks), "lora",
            or LoRA(...).
        output: a folder for checkpoints, log.csv, log.jsonl, curves.svg and, in the end, `model/`,
            which "local-dir:" loads. The same command goes on there if it was ended. None: nothing
            is written.
        epochs, max_steps: how often through the data, and the most steps.
        batch_size, accumulate: a step takes `accumulate` batches of `batch_size` examples, and
            does what one batch of them all would (BatchNorm takes each for itself).
        optimizer: "adamw" or "sgd" (with `momentum`), as in torch.optim.
        learning_rate: the highest. None: 1e-4 for adamw, 1e-2 for sgd; where few parameters are
            trained (head, adapters), ten times that; adamw for networks of less than a million
            parameters, ten times that again. The result says it.
        weight_decay: not of biases, norms, position embeddings and class tokens.
        schedule: after a linear warm-up "cosine" or "linear" down to 0, or "constant".
        warmup: steps; a float: that part of all steps.
        layer_decay: the learning rate of a block times this, once for each block above it.
        clip_norm: the largest norm of the gradient of all parameters; None: any.
        precision: "bfloat16" or "float16": forward and backward are computed in it (float16 with a
            loss scale that adapts); the parameters stay in float32. Evaluation is in float32.
        augment: of images: True (random resized crop, flip), False, or Augmentation(...).
        label_smoothing: the part of a label that all classes share.
        mixup: alpha of the Beta distribution by which images are mixed; 0: they are not.
        max_length: tokens of a text; longer ones are cut.
        evaluate_every: steps; None: after each epoch.
        patience: stop after so many evaluations without a better one.
        monitor: the metric that says which is better; None: accuracy, f1 or perplexity, by task.
        checkpoint_every: steps, besides after each evaluation; None: after each epoch.
        seed: of all that is left to chance.
        progress: False: no bar, not even on a terminal.

    Under `mlx.launch -n 2 -- ...` each process takes its part of every batch, and all compute what
    one would; the first writes.

    Raises:
        ValueError: a wrong argument; data that is wrong, or not for this network.
        MLXZooError: the output is that of other work, or damaged; the loss is no number; the disk
            is full; another process ended early. The network has the weights of the last step.
        OSError: a log, or what is written in the end, cannot be.
        KeyboardInterrupt: after the step at work; with an output, its checkpoint is kept.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    said = locals()
    options = Options(**{f.name: said[f.name] for f in fields(Options)})
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every)
    about = {"patience": patience, "monitor": monitor, "evaluate_every": evaluate_every}
    if val_data is None and any(value is not None for value in about.values()):
        raise ValueError(f"{', '.join(about)}: these are about evaluations: give val_data")
    crew = Crew()
    with random_state_kept(), ExitStack() as stack:
        mx.random.seed(number_of(seed))  # of a fresh head, and of adapters
        found = inspect(train_data, _task_of_data(model, task))
        if isinstance(val_data, (int, float)):
            found, val_data = hold_out(found, val_data, seed)
        network = _network(model, found, task)
        _widen(network)
        if learning_rate is None:
            learning_rate = default_learning_rate(optimizer, method, engine.num_parameters(network))
            options = replace(options, learning_rate=learning_rate)
        train, val = _datasets(network, found, val_data, options)
        if crew.rank == 0:
            _say_how_images_are_prepared(network, train)
        objective = objective_of(network, train.labels)
        steps = _number_of_steps(train, options)
        _check_monitor(monitor, objective)
        work = _work(network, train, val, options)
        crew.agree(work)
        folder = None if output is None else Path(output).expanduser()
        trainable = choose(network, method)
        _check_last_batch(network, train, options, steps, crew)
        keeper = None if folder is None else _keeper(folder, work, crew, stack)
        if crew.rank == 0:
            log.info("%s\nlearning rate %g, %d steps", trainable, learning_rate, steps)
        run = Run(network, train, val, objective, options, steps, crew, keeper)
        run.train(checkpoint_every, shown=progress is not False and crew.rank == 0)
        if folder is not None and crew.rank == 0:
            write_curves(run.state.history, folder / "curves.svg", run.metric)
            write_adapter(network, train.labels, folder)
        as_finetuned(network, train.labels)
        if folder is not None and crew.rank == 0:
            write_model(network, run.state.best_metrics, folder)
        if folder is not None:
            crew.meet()  # it is there when any of them is done
    found_best = run.state.best_metrics
    return Finetuned(network, run.state.history, found_best, trainable, learning_rate, folder)


# Before the first step --------------------------------------------------------------------------


def _task_of_data(model: Any, task: str | None) -> str | None:
    """A stream does not show what it is for: a loaded network's head says it."""
    return task_of(original_of(model)) if isinstance(model, nn.Module) else task


def _network(model: Any, found: Examples | Stream, task: str | None) -> nn.Module:
    """The network itself, or that of a name, with a head for the classes of the data."""
    if isinstance(model, nn.Module):
        if task not in (None, getattr(model.config, "task", None), found.task):
            raise ValueError(f"task={task!r}: of a network that is loaded already")
        if original_of(model) is not model:
            raise ValueError("this network is optimised for inference: train its .original")
        return model
    checkpoint = zoo.info(model)
    architecture = registry.architectures()[checkpoint.architecture]
    head: dict[str, Any] = {"task": found.task} if architecture.inputs == "tokens" else {}
    if found.task in LANGUAGE:
        fitting = [t for t in (found.task, *LANGUAGE) if t in architecture.tasks]
        if task is None and fitting:  # running text is for BERT to fill, for GPT-2 to go on with
            head["task"] = fitting[0]
        return zoo.load(model, True, **head)
    if not found.labels:
        raise ValueError("a stream does not say its classes: load the network with num_classes=")
    count = len(found.labels)
    keeps = checkpoint.task == found.task and {*found.labels} <= {*checkpoint.labels}
    if keeps:
        if count < len(checkpoint.labels):
            log.warning(
                "%s knows these %d classes, and keeps its head of %d; load(..., num_classes=%d) "
                "makes a fresh one",
                *(checkpoint.name, count, len(checkpoint.labels), count),
            )
        return zoo.load(model, True, **head)
    network = zoo.load(model, True, num_classes=count, **head)
    if architecture.keeps_head(network.checkpoint, found.task, count):
        network.reset_head(count)  # of other classes, of which there are as many
        mx.eval(network.parameters())
    return network


def _datasets(
    model: nn.Module, found: Examples | Stream, val_data: Any, options: Options
) -> tuple[Dataset, Dataset | None]:
    names = ("augment", "label_smoothing", "mixup", "max_length", "seed")
    train = training_data(found, model, **{name: getattr(options, name) for name in names})
    if val_data is None:
        return train, None
    some: dict[str, Any] = {"max_length": options.max_length, "seed": options.seed}
    val = validation_data(val_data, model, labels=train.labels, **some)
    if isinstance(val.examples, Stream) and val.examples.once:
        raise ValueError("val_data: each evaluation reads it, an iterator can be read once: a list")
    return train, val


def _say_how_images_are_prepared(model: nn.Module, train: Dataset) -> None:
    """Random weights do not say it: it is a choice, and the network's own from then on."""
    checkpoint = getattr(model, "checkpoint", None)
    if isinstance(train.prepare, PrepareImages) and not (checkpoint and checkpoint.preprocessing):
        like = preprocessing_like(model)
        log.warning(
            "random weights do not say how images are prepared: they are%s, %s",
            f" as {like.name}'s" if like else "",
            train.prepare.how,
        )


def _number_of_steps(train: Dataset, options: Options) -> int:
    num_batches = train.num_batches(options.batch_size)
    if num_batches is None:
        if options.max_steps is None:
            raise ValueError("nobody knows how long the data is: max_steps is needed")
        return options.max_steps
    if not num_batches:
        raise ValueError("there are no examples to train with")
    steps = options.epochs * -(-num_batches // options.accumulate)
    return steps if options.max_steps is None else min(steps, options.max_steps)


def _check_last_batch(
    model: nn.Module, train: Dataset, options: Options, steps: int, crew: Crew
) -> None:
    """Raise ValueError where the last batch of an epoch has too few examples for BatchNorm."""
    size, count = options.batch_size, train.num_examples
    training_mode(model)
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.training]
    batches = train.num_batches(size)
    if count is None or batches is None or not norms:
        return
    if steps < -(-batches // options.accumulate):  # it is not reached
        return
    least = count % size or size
    problem = None
    if least < crew.size:
        problem = f"BatchNorm needs one in each of {crew.size} processes"
    elif least == 1:
        problem = _problem_of_one(model, train, norms)
    if problem:
        raise ValueError(
            f"{count} examples in batches of {size} leave {least} for the last one, and {problem}: "
            "choose another batch_size"
        )


def _problem_of_one(model: nn.Module, train: Dataset, norms: list[BatchNorm]) -> str | None:
    """What BatchNorm says of a batch of one image. Its shape tells: nothing is computed."""
    assert isinstance(train.prepare, PrepareImages)
    how, before = train.prepare.how, [(m.running_mean, m.running_var) for m in norms]
    try:
        model(mx.zeros((1, *as_sides(how.size), len(how.mean))))
    except ValueError as error:
        return str(error)
    finally:
        for norm, (mean, var) in zip(norms, before, strict=True):
            norm.running_mean, norm.running_var = mean, var
    return None


def _check_monitor(monitor: str | None, objective: Objective) -> None:
    known = objective.metrics().values()
    if monitor is not None and monitor not in known:
        raise ValueError(f"monitor={monitor!r}: one of {', '.join(known)} is needed")


def _widen(model: nn.Module) -> None:
    """Make the weights float32, as what is trained must be: 16 bits would lose small steps."""
    kinds = {x.dtype for x in engine.parameters(model).values()} & {mx.float16, mx.bfloat16}
    if kinds:
        kind = str(kinds.pop()).split(".")[-1]
        log.info("the weights were %s and are float32 now; precision=%r computes in it", kind, kind)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())


def _work(
    model: nn.Module, train: Dataset, val: Dataset | None, options: Options
) -> dict[str, Any]:
    """All that the result depends on, as JSON has it. (But for a fresh head, which is trained.)"""
    checkpoint = getattr(model, "checkpoint", None)
    return {
        "model": checkpoint and checkpoint.name,
        "config": asdict(model.config),
        "weights": digest_of_base(model, head_of(model)),
        "train_data": train.digest,
        "val_data": val and val.digest,
        **{f.name: _plain(getattr(options, f.name)) for f in fields(options)},
        **{name: release for name, release in cache.versions().items() if name.startswith("mlx")},
    }


def _plain(value: Any) -> Any:
    is_plain = value is None or isinstance(value, (bool, int, float, str, tuple))
    return value if is_plain else repr(value)


def _keeper(folder: Path, work: Mapping[str, Any], crew: Crew, stack: ExitStack) -> Checkpoints:
    """The output folder, begun; only the first process holds it and writes there."""
    keeper = Checkpoints(folder, work)
    if crew.rank == 0:
        stack.enter_context(keeper.held())
        keeper.begin()
    crew.meet()
    return keeper
