"""What a network is compared with: the answers that its original gave to some inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import mlx.nn as nn
import numpy as np

from mlx_zoo.hub import cache
from mlx_zoo.verify import compare
from mlx_zoo.verify.report import Comparison, Report, judge, look_closely

KINDS = ("original", "fingerprint", "published")  # the best first


@dataclass(frozen=True)
class Answer:
    """What the original gave at a layer or an output: all of its values, or those at `index`."""

    single: np.ndarray  # in the precision of the network
    double: np.ndarray  # in float64: the truth
    index: np.ndarray | None = None  # into the flat array; None: these are all values
    # Of all values, where only some are here; None where that is not known.
    shape: tuple[int, ...] | None = None
    scale: float | None = None  # the largest magnitude
    rounding: float | None = None  # the largest error of `single`

    def judge(self, name: str, ours: np.ndarray, precision: str) -> Comparison:
        """Compare what our network gives there."""
        if self.index is None:
            return judge(name, ours, self.single, self.double, precision)
        if self.shape not in (None, ours.shape) or (self.index >= ours.size).any():
            nothing = np.broadcast_to(0.0, self.shape or ())
            return judge(name, ours, nothing, nothing, precision)
        row = judge(name, ours.reshape(-1)[self.index], self.single, self.double, precision)
        return replace(
            row,
            scale=row.scale if self.scale is None else self.scale,
            torch_error=max(row.torch_error, self.rounding or 0.0),
        )


@dataclass(frozen=True)
class Evidence:
    """The answers of an original, and where they are from."""

    kind: str  # of KINDS
    what: str  # "timm in float32 and float64"
    origin: str  # where it is from, and of when
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, Answer]
    layers: Mapping[str, Answer]  # by our names
    said: str  # the inputs in words
    seed: int | None  # of the inputs
    tables: Mapping[str, Answer] = field(default_factory=dict)  # embeddings whole, by layer
    few: int | None = None  # how many of the inputs the layers saw; None: all of them
    versions: Mapping[str, str] = field(default_factory=dict)  # of the original's libraries
    sha256: Mapping[str, str] = field(default_factory=dict)  # file of published weights -> hash

    @property
    def num_values(self) -> int:
        answers = (*self.outputs.values(), *self.layers.values())
        return sum(answer.double.size for answer in answers)

    def report(self, model: nn.Module, precision: str, device: str) -> Report:
        """Run `model` on the same inputs and judge every output and layer."""
        alike = self.layers.keys() - getattr(model, "fused", ())
        asked = () if self.few is not None else alike
        outputs, layers = compare.run(model, self.inputs, asked)
        if self.few is not None:
            few = {name: x[: self.few] for name, x in self.inputs.items()}
            _, layers = compare.run(model, few, alike)
        whole = [name for name, answer in self.outputs.items() if answer.index is None]
        closely = look_closely(
            {name: outputs[name] for name in whole},
            {name: self.outputs[name].single for name in whole},
            {name: self.outputs[name].double for name in whole},
            model.checkpoint.labels,
        )
        return Report(
            name=model.checkpoint.name,
            evidence=self.what,
            outputs=tuple(a.judge(n, outputs[n], precision) for n, a in self.outputs.items()),
            layers=(
                *(self.layers[n].judge(n, x, precision) for n, x in layers.items()),
                *self._tables(model, precision),
            ),
            device=device,
            seed=self.seed,
            inputs=self.said,
            versions={**cache.versions(), **self.versions},
            evidence_kind=self.kind,
            origin=self.origin,
            sha256=self.sha256,
            **closely,
        )

    def _tables(self, model: nn.Module, precision: str) -> list[Comparison]:
        """Of embeddings, all rows: the inputs have few of the tokens and positions."""
        modules = dict(model.named_modules())
        return [
            answer.judge(f"{name}.weight", compare.as_numpy(modules[name].weight), precision)
            for name, answer in self.tables.items()
        ]
