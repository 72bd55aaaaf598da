"""The demonstration: the bundled network goes the way of any other, and shows its work."""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.catalogue import DATA
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.mapping.engine import num_parameters

NAME = "resnet_digits"
SHADES = " ·:+*#@█"


def run(console: Console, as_json: bool = False) -> bool:
    """Load, verify, predict; True if the network is its original. Writes to a temporary cache."""
    with tempfile.TemporaryDirectory(prefix="mlx_zoo-demo-") as folder:
        model, cold = _timed(lambda: mlx_zoo.load(NAME, pretrained=True, cache_dir=folder))
        model, warm = _timed(lambda: mlx_zoo.load(NAME, pretrained=True, cache_dir=folder))
        report, verifying = _timed(lambda: mlx_zoo.verify(model, cache_dir=folder))

    held_out = read_state_dict([DATA / "digits.safetensors"])
    images, labels = np.array(held_out["images"]), np.array(held_out["labels"])
    pixels = model.checkpoint.preprocessing(list(images))
    scores, predicting = _timed(lambda: np.array(mx.softmax(model(pixels), axis=-1)))
    right = int((scores.argmax(axis=1) == labels).sum())

    facts = {
        "name": NAME,
        "source": model.checkpoint.source,
        "parameters": num_parameters(model),
        "cold_load_seconds": cold,
        "warm_load_seconds": warm,
        "verification": report.summary(),
        "verification_seconds": verifying,
        "held_out": len(labels),
        "right": right,
        "accuracy": right / len(labels),
        "images_per_second": len(labels) / predicting,
        "device": str(mx.default_device()),
    }
    if as_json:
        console.print_json(json.dumps(facts))
    else:
        _show(console, facts, report, images, labels, scores)
    return report.passed


def _timed(work) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _show(console: Console, facts: dict[str, Any], report, images, labels, scores) -> None:
    console.print(f'[bold]model = mlx_zoo.load("{NAME}", pretrained=True)[/]\n')
    verdict = "[bold green]the same network[/]" if report.passed else "[bold red]NOT the same[/]"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    output = report.outputs[0]
    rows = {
        "read": f"a PyTorch checkpoint, {facts['parameters']:,} parameters, without PyTorch: "
        "its pickle was not executed",
        "loaded": f"{facts['cold_load_seconds'] * 1e3:.0f} ms the first time (read, mapped, kept), "
        f"{facts['warm_load_seconds'] * 1e3:.0f} ms from the cache",
        "verified": f"{verdict} in {len(report.layers)} layers and its output, "
        f"against {report.evidence}",
        "": f"max |difference| {report.max_abs:.1e} of {output.scale:.1f}; "
        f"error against float64 {output.error:.1e}, PyTorch's own {output.torch_error:.1e}",
        "predicted": f"{facts['right']} of {facts['held_out']} held-out digits right "
        f"({facts['accuracy']:.1%}), {facts['images_per_second']:,.0f} images/s "
        f"on {facts['device']}",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    console.print()
    _show_digits(console, images, labels, scores)
    count = len(registry.checkpoints())
    console.print(
        f"\nThe same line loads {count} published checkpoints from their original files:\n"
        "  mlx-zoo list 'resnet50*'\n"
        "  mlx-zoo info resnet50\n"
        "  mlx-zoo load resnet50 --verify\n"
        "  mlx-zoo embed all-MiniLM-L6-v2 'a sentence' 'another one'"
    )


def _show_digits(console: Console, images, labels, scores, count: int = 6) -> None:
    """A few of the held-out digits and what the network says of them; a wrong one comes last."""
    wrong = np.flatnonzero(scores.argmax(axis=1) != labels)
    shown = [*range(count - min(1, len(wrong))), *wrong[:1]]
    for row in range(8):
        lines = ("".join(SHADES[x // 32] * 2 for x in images[i, row]) for i in shown)
        console.print("  ".join(lines), markup=False)
    captions = []
    for i in shown:
        guess = int(scores[i].argmax())
        right = guess == labels[i]
        caption = f"{guess}  {scores[i, guess]:.1%}" if right else f"{guess}, is a {labels[i]}"
        captions.append(caption.ljust(16))
    console.print("  ".join(captions).rstrip(), markup=False)
