"""Are a network's gradients those of its PyTorch original? Every parameter's, in two steps.

In float64 ours are PyTorch's to its last digits, relu or not, which proves what they are of and how
they are computed. Ours in float32 are then compared with ours in float64 on the same side of every
kink (`kinks`), where they differ by float32's roundings alone.

The loss is the cross-entropy of every output along its last axis with seeded classes, its mean over
all other axes; of several outputs, the sum. Both networks are in train mode, but for what is drawn
by chance: BatchNorm takes the statistics of the batch, and nothing is dropped out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_zoo import registry
from mlx_zoo.backend import lanes
from mlx_zoo.describe import Place
from mlx_zoo.errors import VerificationError
from mlx_zoo.mapping import engine
from mlx_zoo.verify import compare, kinks, reference
from mlx_zoo.verify.double import real_float64
from mlx_zoo.verify.original import build_original, own_dialects
from mlx_zoo.verify.report import Gradient

Arrays = Mapping[str, np.ndarray]

BATCH = 4  # examples: several, for the statistics of BatchNorm
LOSS_TOLERANCE = 1e-5  # on the other side of a kink, at it but for a rounding, it is the same
STATISTICS = (".running_mean", ".running_var")  # follow the data, not a gradient


@dataclass(frozen=True)
class Truth:
    """What the original answers: gradients by our names, in our layout."""

    inputs: Arrays
    targets: Arrays  # classes (B, ...) of each output (B, ..., classes)
    single: Arrays  # in float32
    double: Arrays
    batch_statistics: bool = True

    def judge(self, model: nn.Module) -> tuple[Gradient, ...]:
        """Every gradient of `model`, a network in eval mode, which stays as it is."""
        told = (model, self.inputs, self.targets, self.batch_statistics)
        with kinks.noted() as sides:
            _, single = gradients(*told)
        loss, double = gradients(*told, "float64")
        if double.keys() != self.double.keys():
            odd = ", ".join(sorted(double.keys() ^ self.double.keys()))
            raise VerificationError(f"one network alone has gradients of {odd}")
        same = double
        if sides:
            with kinks.followed([np.array(side) for side in sides]):
                there, same = gradients(*told, "float64")
            if not abs(there - loss) <= LOSS_TOLERANCE * abs(loss):  # no rounding took it there
                same = double
        scale = max(float(np.abs(x).max()) for x in self.double.values())
        return tuple(
            Gradient(
                name=name,
                double_error=_distance(double[name], x),
                error=_distance(single[name], same[name]),
                raw_error=_distance(single[name], x),
                torch_error=_distance(self.single[name], x),
                scale=float(np.abs(x).max()),
                network_scale=scale,
            )
            for name, x in self.double.items()
        )


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.abs(x.astype(np.float64) - y).max())


def find_truth(model: nn.Module, place: Place, size: int | None, seed: int) -> Truth:
    """The gradients of the original of `model`, run here on seeded inputs and classes.

    Raises DownloadError where the published files are not at hand, VerificationError where the
    original does not take them.
    """
    original, _ = build_original(model, place)
    kind = registry.of_model(model).inputs
    shown = compare.image_size(model, size) if kind == "images" else size or 64
    inputs = compare.random_inputs(kind, model.config, shown, seed, BATCH)
    return truth_of(model, original, inputs, seed)


def truth_of(
    model: nn.Module,
    original: Any,
    inputs: Arrays,
    seed: int = 0,
    batch_statistics: bool = True,
) -> Truth:
    """The gradients of `original` on `inputs`, for classes drawn by `seed`."""
    outputs, _ = compare.shapes(model, inputs, ())
    rng = np.random.default_rng(seed)
    targets = {
        name: rng.integers(0, shape[-1], shape[:-1], np.int32) for name, shape in outputs.items()
    }
    single, double = (
        in_our_names(
            model, reference.gradients(original, inputs, targets, precision, batch_statistics)
        )
        for precision in ("float32", "float64")
    )
    return Truth(inputs, targets, single, double, batch_statistics)


def gradients(
    model: nn.Module,
    inputs: Arrays,
    targets: Arrays,
    batch_statistics: bool = True,
    precision: str = "float32",
) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of `model`, a network in eval mode, and its gradients: frozen parameters' too.

    In "float64" on the CPU, whatever the device.
    """

    def loss(parameters: dict[str, mx.array], images: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(parameters.items())))
        outputs = dict(compare.named(model(*(given | images).values())))
        losses = [
            nn.losses.cross_entropy(outputs[name], mx.array(target), reduction="mean")
            for name, target in targets.items()
        ]
        return mx.stack(losses).sum()

    in_precision = real_float64() if precision == "float64" else nullcontext()
    with in_precision, lanes.single(), _as_trained(model, batch_statistics):
        dtype = getattr(mx, precision)
        arrays = {name: x.astype(dtype) for name, x in engine.parameters(model).items()}
        model.update(tree_unflatten(list(arrays.items())))  # statistics, too
        parameters = {name: x for name, x in arrays.items() if not name.endswith(STATISTICS)}
        given = {name: mx.array(x) for name, x in inputs.items()}
        images = {name: x.astype(dtype) for name, x in given.items() if x.ndim == 4}
        value, found = mx.value_and_grad(loss, argnums=(0, 1))(parameters, images)
        mx.eval(value, found)
    own, of_images = found
    return float(np.array(value)), {
        name: compare.as_numpy(x) for name, x in (own | of_images).items()
    }


@contextmanager
def _as_trained(model: nn.Module, batch_statistics: bool) -> Iterator[None]:
    """For a while BatchNorm alone is in train mode; afterwards all is as it was."""
    before = engine.parameters(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm)]
    modes = [norm.training for norm in norms]
    for norm in norms:
        norm.train(batch_statistics)
    try:
        yield
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.train(mode)
        model.update(tree_unflatten(list(before.items())))


def in_our_names(model: nn.Module, found: Arrays) -> dict[str, np.ndarray]:
    """What belongs to the original's parameters, by ours: split and turned as they are."""
    architecture = registry.of_model(model)
    folders = {start: name for name, start in architecture.parts(model.config).items()}
    lacking: list[str] = []
    for dialect in own_dialects(model):
        spec = architecture.spec(dialect, model.config)
        ours: dict[str, np.ndarray] = {
            name: x for name, x in found.items() if name == "pixel_values"
        }
        lacking = []
        for link in engine.links(model, spec):
            if link.source.endswith(STATISTICS):
                continue
            x = _named(found, link.source, folders)
            if x is None:
                lacking.append(link.source)
                continue
            with mx.stream(mx.cpu):  # alone in having float64
                dtype = mx.float64 if x.dtype == np.float64 else mx.float32
                ours |= {n: np.array(part) for n, part in link.to_mlx(mx.array(x, dtype))}
        if not lacking:
            return ours
    raise VerificationError(f"the original has no gradient of {', '.join(lacking)}")


def _named(found: Arrays, source: str, folders: Mapping[str, str]) -> np.ndarray | None:
    """The array of that upstream name, whatever the original's wrappers put before it.

    A sentence-transformer numbers its layers as their folders: "2_Dense" holds those of "2.".
    """
    for start, folder in folders.items():
        if source.startswith(start):
            source = f"{folder.partition('_')[0]}.{source.removeprefix(start)}"
    names = [name for name in found if name == source or name.endswith(f".{source}")]
    return found[min(names, key=len)] if names else None
