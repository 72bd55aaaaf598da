"""finetune(): a network and data -> the network, trained on them.

It chooses: the network and its head, the data, what is trained. `run` does the work, step by step.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
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
from mlx_zoo.models.layers import check_choice
from mlx_zoo.tasks.batches import check_count
from mlx_zoo.training.checkpoints import Checkpoints
from mlx_zoo.training.data import Dataset, hold_out, inspect, training_data, validation_data
from mlx_zoo.training.examples import LANGUAGE, Examples, Stream
from mlx_zoo.training.lora import digest_of_base
from mlx_zoo.training.objectives import Objective, objective_of
from mlx_zoo.training.optimizers import OPTIMIZERS, default_learning_rate
from mlx_zoo.training.options import Options
from mlx_zoo.training.outcome import as_finetuned, write_adapter, write_curves, write_model
from mlx_zoo.training.parts import head_of
from mlx_zoo.training.run import Run
from mlx_zoo.training.steps import number_of
from mlx_zoo.training.trainable import Trainable, choose

log = logging.getLogger("mlx_zoo")


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` came to. Printed, a few lines."""

    model: nn.Module  # in eval mode, with the best weights; the last, where nothing was evaluated
    history: list[dict[str, Any]]  # a row for each step
    metrics: dict[str, float]  # of the best evaluation
    trainable: Trainable
    output: Path | None

    def __str__(self) -> str:
        last = self.history[-1]
        lines = [
            f"{self.model.checkpoint.name}: {last['step']} steps, {last['epoch']:.4g} epochs",
            f"trained: {self.trainable.method}, {self.trainable.num_trainable:,} of "
            f"{self.trainable.num_parameters:,} parameters ({self.trainable.percent:.2f} %)",
            "training loss: " + " -> ".join(f"{row['loss'] or math.nan:.4g}" for row in self._ends),
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
            trained (head, adapters), ten times that.
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
    rate = default_learning_rate(optimizer, method) if learning_rate is None else learning_rate
    said = {**locals(), "learning_rate": rate}
    options = Options(**{f.name: said[f.name] for f in fields(Options)})
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every)
    if val_data is None and (patience is not None or monitor is not None):
        raise ValueError("patience and monitor are about evaluations: give val_data")
    crew = Crew()
    with random_state_kept(), ExitStack() as stack:
        mx.random.seed(number_of(seed))  # of a fresh head, and of adapters
        found = inspect(train_data, None if isinstance(model, nn.Module) else task)
        network = _network(model, found, task)
        _widen(network)
        train, val = _datasets(network, found, val_data, options)
        objective = objective_of(network, train.labels)
        steps = _number_of_steps(train, options)
        _check_monitor(monitor, objective)
        work = _work(network, train, val, options)
        crew.agree(work)
        folder = None if output is None else Path(output).expanduser()
        trainable = choose(network, method)
        keeper = None if folder is None else _keeper(folder, work, crew, stack)
        if crew.rank == 0:
            log.info("%s\nlearning rate %g, %d steps", trainable, rate, steps)
        run = Run(network, train, val, objective, options, steps, crew, keeper)
        run.train(checkpoint_every, shown=progress is not False and crew.rank == 0)
        if folder is not None and crew.rank == 0:
            write_curves(run.state.history, run.metric, folder)
            write_adapter(network, train.labels, folder)
        as_finetuned(network, train.labels)
        if folder is not None and crew.rank == 0:
            write_model(network, run.state.best_metrics, folder)
        if folder is not None:
            crew.meet()  # it is there when any of them is done
    return Finetuned(network, run.state.history, run.state.best_metrics, trainable, folder)


# Before the first step --------------------------------------------------------------------------


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
        return zoo.load(model, True, **head)
    network = zoo.load(model, True, num_classes=count, **head)
    if architecture.keeps_head(network.checkpoint, found.task, count):
        network.reset_head(count)  # of other classes, of which there are as many
        mx.eval(network.parameters())
    return network


def _datasets(
    model: nn.Module, found: Examples | Stream, val_data: Any, options: Options
) -> tuple[Dataset, Dataset | None]:
    if isinstance(val_data, (int, float)):
        found, val_data = hold_out(found, val_data, options.seed)
    names = ("augment", "label_smoothing", "mixup", "max_length", "seed")
    train = training_data(found, model, **{name: getattr(options, name) for name in names})
    if val_data is None:
        return train, None
    some: dict[str, Any] = {"max_length": options.max_length, "seed": options.seed}
    return train, validation_data(val_data, model, labels=train.labels, **some)


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
