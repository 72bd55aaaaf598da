"""TRAINING.md's table and curves: gradients and twenty steps of training against PyTorch.

    python benchmarks/gradients.py                  # the table, as Markdown
    python benchmarks/gradients.py --all            # of every network: half an hour on two cores
    python benchmarks/gradients.py --only resnet18 vit_digits
    python benchmarks/gradients.py --curves benchmarks/loss_curves.svg

Networks are those of tests/test_parity.py, one for each arithmetic, shallow where blocks repeat,
with every tensor random; images of 64 pixels, or what the network takes. The table has of every
kind of block and stem one, and networks in which many activations are at a kink.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import mlx_zoo  # isort: skip  # before anything imports mlx.core
import curves
import mlx.nn as nn
from originals import randomise, saved
from test_parity import cases

from mlx_zoo import registry
from mlx_zoo.describe import Place
from mlx_zoo.verify import compare
from mlx_zoo.verify.gradients import BATCH, truth_of
from mlx_zoo.verify.markup import Html, tag
from mlx_zoo.verify.original import build_original
from mlx_zoo.verify.reference import create
from mlx_zoo.verify.report import Gradient, largest

FIGURES = ("double_rel", "max_rel", "raw_rel", "torch_rel")
SHOWN = (
    *("resnet_digits", "resnet18", "resnet10t", "resnet101c", "resnet50_gn", "resnetaa101d"),
    *("resnetblur50", "seresnet50", "resnext50d_32x4d", "resnetrs101"),
    *("efficientnet_digits", "efficientnet_b0", "efficientnet_b4", "tf_efficientnet_b0"),
    *("efficientnet_lite0", "tf_efficientnet_lite4", "efficientnet_es", "tf_efficientnet_el"),
    *("efficientnetv2_rw_t", "tf_efficientnetv2_b0"),
    *("vit_digits", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("deit3_small_patch16_224", "vit_base_patch16_siglip_224", "vit_xsmall_patch16_clip_224"),
    *("vit_small_patch14_reg4_dinov2", "vit_base_patch16_radio_v3"),
)

# The drawing: a field for each network and optimiser, and a line for each library.
WIDTH, HEIGHT, LEFT, TOP = 200, 120, 44, 40
COLOURS = {"PyTorch float64": "#e08a2c", "mlx_zoo": "#0868b8"}
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#1b1f24}.soft{fill:#57606a}.title{font-weight:600}"
)


def rows(chosen: Sequence[str]) -> Iterator[str]:
    """A row of the table for each of these networks, or of all; the largest figures below."""
    yield "| network | mode | gradients | float64 | float32 | with jumps | PyTorch's float32 |"
    yield "| --- | --- | --: | --: | --: | --: | --: |"
    worst, count = dict.fromkeys(FIGURES, 0.0), 0
    for checkpoint in (case.values[0] for case in cases()):
        if chosen and checkpoint.variant not in chosen:
            continue
        original = randomise(create(checkpoint.reference, checkpoint.config))
        registry._names()[registry.key(checkpoint.variant)] = checkpoint
        with tempfile.TemporaryDirectory() as folder:
            path = saved(original, Path(folder, "weights.pth"))
            model = mlx_zoo.load(checkpoint.variant, pretrained=path, cache_dir=folder)
            original, _ = build_original(model, Place(cache_dir=folder))
        has_statistics = any(isinstance(m, nn.BatchNorm) for m in model.modules())
        for in_training in (True, False) if has_statistics else (True,):
            found = gradients_of(model, original, in_training)
            figures = {name: getattr(largest(found, name), name) for name in FIGURES}
            worst = {name: max(x, figures[name]) for name, x in worst.items()}
            count += 1
            mode = "train" if in_training else "eval"
            verdict = "" if all(g.passed for g in found) else " **differs**"
            said = " | ".join(f"{x:.1e}" for x in figures.values())
            yield f"| {checkpoint.variant}{verdict} | {mode} | {len(found)} | {said} |"
    yield f"| the largest of {count} | | | {' | '.join(f'{x:.1e}' for x in worst.values())} |"


def gradients_of(model: nn.Module, original: Any, in_training: bool) -> tuple[Gradient, ...]:
    size = compare.image_size(model, 64)
    inputs = compare.random_inputs("images", model.config, size, 0, BATCH)
    return truth_of(model, original, inputs, 0, in_training).judge(model)


def plot(found: Mapping[tuple[str, str], Mapping[str, list[float]]]) -> str:
    """The losses of each network and optimiser, as SVG: ours drawn over PyTorch's."""
    parts: list[Html] = []
    networks = list(dict.fromkeys(name for name, _ in found))
    optimizers = list(dict.fromkeys(optimizer for _, optimizer in found))
    step_x, step_y = WIDTH + LEFT + 20, HEIGHT + TOP + 24
    for (name, optimizer), losses in found.items():
        x = LEFT + networks.index(name) * step_x
        y = TOP + 24 + optimizers.index(optimizer) * step_y
        parts += _field(f"{name}, {optimizer}", losses, x, y)
    width, height = len(networks) * step_x, len(optimizers) * step_y + 30
    said = "Losses of twenty steps of training: mlx_zoo's lie on PyTorch's"
    svg = tag(
        "svg",
        tag("style", Html(STYLE)),
        tag("rect", width=width, height=height, fill="#ffffff"),
        *_legend(),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        aria_label=said,
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
    )
    return f"{svg}\n"


def _legend() -> Iterator[Html]:
    for i, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + 150 * i
        yield tag("line", x1=x, x2=x + 24, y1=16, y2=16, stroke=colour, stroke_width=3)
        yield tag("text", name, x=x + 30, y=20)


def _field(title: str, losses: Mapping[str, list[float]], x: float, y: float) -> Iterator[Html]:
    values = [loss for line in COLOURS for loss in losses[line]]
    low, high = min(values), max(values)
    yield tag("text", title, x=x, y=y - 20, class_="title")
    yield tag("text", f"apart {curves.apart(dict(losses)):.0e}", x=x, y=y - 6, class_="soft")
    for value in (low, high):
        at = y + HEIGHT * (high - value) / (high - low)
        yield tag("line", x1=x, x2=x + WIDTH, y1=f"{at:.1f}", y2=f"{at:.1f}", stroke="#d0d7de")
        yield tag("text", f"{value:.2f}", x=x - 6, y=f"{at + 4:.1f}", text_anchor="end")
    for name, colour in COLOURS.items():
        points = " ".join(
            f"{x + WIDTH * i / (len(losses[name]) - 1):.1f},"
            f"{y + HEIGHT * (high - loss) / (high - low):.1f}"
            for i, loss in enumerate(losses[name])
        )
        thick = {"stroke_width": 5 if name.startswith("PyTorch") else 1.5}
        yield tag("polyline", points=points, fill="none", stroke=colour, **thick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=SHOWN, help="networks by name")
    parser.add_argument("--all", action="store_true", help="all networks")
    parser.add_argument("--curves", type=Path, help="draw the losses into this file, no table")
    chosen = parser.parse_args()
    if not chosen.curves:
        for row in rows(() if chosen.all else chosen.only):
            print(row, flush=True)
        return
    found = {(n, o): curves.train(n, o) for n in curves.NETWORKS for o in curves.OPTIMIZERS}
    assert all(math.isfinite(x) for losses in found.values() for x in losses["mlx_zoo"])
    print("| network | optimiser | first, last loss | mlx_zoo | PyTorch float32 |")
    print("| --- | --- | --: | --: | --: |")
    for (name, optimizer), losses in found.items():
        first, *_, last = losses["mlx_zoo"]
        figures = (curves.apart(losses, line) for line in ("mlx_zoo", "PyTorch float32"))
        said = " | ".join(f"{figure:.1e}" for figure in figures)
        print(f"| {name} | {optimizer} | {first:.2f}, {last:.2f} | {said} |")
    chosen.curves.write_text(plot(found), encoding="utf-8")


if __name__ == "__main__":
    main()
