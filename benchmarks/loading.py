"""What it costs to import, to load from the cache, and to convert: mlx_zoo beside PyTorch.

    python benchmarks/loading.py [--rounds 5] [--only import warm cold] [--json]

Every measurement is a process of its own, and the two sides alternate. The checkpoints hold random
weights, made once (about 3 GB in --folder, a temporary one unless it is given); all files are in
the system's memory when they are read. Times are medians; they start after the imports, but
include what a first call brings with it. Memory is the process's peak over what it had then.
PyTorch's side is what takes a file to a network: torch.load (or safetensors), the constructor,
load_state_dict. Modules are imported from bytecode, as installed packages are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORKS = {
    "resnet50": "torchvision",
    "vit_base_patch16_224": "timm",
    "bert-base-uncased": "transformers",
    "gpt2": "transformers",
}
TASKS = {"bert-base-uncased": {"task": "pretraining"}}
KINDS = ("pth", "safetensors")
IMPORTS = {"mlx and the BLAS": "mlx.core, mlx.nn", "mlx_zoo": "mlx_zoo", "torch": "torch"}


# In workers --------------------------------------------------------------------------------------


def original(name: str) -> Any:
    """PyTorch's constructor of a network, its library imported."""
    from mlx_zoo.verify.reference import import_torchvision

    torchvision = import_torchvision()
    if NETWORKS[name] == "torchvision":
        return getattr(torchvision.models, name)
    if NETWORKS[name] == "timm":
        import timm

        return lambda: timm.create_model(name)
    import transformers

    if name == "gpt2":
        return lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config())
    return lambda: transformers.BertForPreTraining(transformers.BertConfig())


def make(folder: Path) -> None:
    """Write the checkpoints that are not there yet."""
    import torch
    from safetensors.torch import save_model

    for name in NETWORKS:
        if not all((folder / f"{name}.{kind}").is_file() for kind in KINDS):
            torch.manual_seed(0)
            network = original(name)()
            torch.save(network.state_dict(), folder / f"{name}.pth")
            save_model(network, str(folder / f"{name}.safetensors"), {"format": "pt"})


def load_with_torch(name: str, file: Path) -> Callable[[], object]:
    import torch
    from safetensors.torch import load_model

    build = original(name)

    def load() -> object:
        state = torch.load(file, weights_only=True) if file.suffix == ".pth" else None
        network = build()
        if state is None:
            load_model(network, str(file))
        else:
            network.load_state_dict(state)
        return network

    return load


def load_with_mlx_zoo(name: str, file: Path, cache: Path) -> Callable[[], object]:
    from mlx_zoo import load

    return lambda: load(name, pretrained=file, cache_dir=cache, **TASKS.get(name, {}))


def peak_memory() -> int:
    """Bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    words = status.read_text().split() if status.is_file() else ()
    return int(words[words.index("VmHWM:") + 1]) * 1024 if "VmHWM:" in words else 0


def measure(action: Callable[[], object]) -> dict[str, float]:
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak from here on
    before, start = peak_memory(), time.perf_counter()
    kept = action()
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "bytes": peak_memory() - before}
    del kept
    return found


def measure_import(what: str, blas: str) -> dict[str, float]:
    import ctypes

    start = time.perf_counter()
    if what.startswith("mlx.") and blas:
        ctypes.CDLL(blas, ctypes.RTLD_GLOBAL)
    exec(f"import {what}")
    return {"seconds": time.perf_counter() - start}


def work(task: str, *words: str) -> dict[str, float]:
    if task == "make":
        make(Path(words[0]))
        return {}
    if task == "import":
        return measure_import(*words)
    if task == "blas":
        from mlx_zoo.backend.blas import load_fast_blas

        return {"path": load_fast_blas().path or ""}  # type: ignore[dict-item]
    side, name, file, cache = words
    if side == "torch":
        return measure(load_with_torch(name, Path(file)))
    return measure(load_with_mlx_zoo(name, Path(file), Path(cache)))


# The benchmark -----------------------------------------------------------------------------------


class Bench:
    """Starts workers, in rounds that alternate between the sides."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, *words: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--worker", *words]
        done = subprocess.run(
            command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    def medians(self, sides: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(self.rounds):
            for side, measured in sides.items():
                found[side].append(measured())
        return {
            side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for side, runs in found.items()
        }

    def imports(self) -> dict[str, dict[str, Any]]:
        blas = self.run("blas")["path"]
        for what in IMPORTS.values():
            self.run("import", what, blas)  # writes the bytecode
        return self.medians(
            {name: lambda w=what: self.run("import", w, blas) for name, what in IMPORTS.items()}
        )

    def load(self, name: str, kind: str, *, warm: bool) -> dict[str, dict[str, Any]]:
        file, cache = str(self.folder / f"{name}.{kind}"), self.folder / "cache"

        def ours() -> dict[str, Any]:
            if not warm:
                shutil.rmtree(cache, ignore_errors=True)
            return self.run("load", "mlx_zoo", name, file, str(cache))

        def theirs() -> dict[str, Any]:
            return self.run("load", "torch", name, file, "")

        ours()  # which brings the file into memory
        if warm:
            ours()
        found = self.medians({"mlx_zoo": ours, "torch": theirs})
        shutil.rmtree(cache, ignore_errors=True)
        return {**found, "checkpoint": {"bytes": os.path.getsize(file)}}


def table(result: dict[str, Any]) -> str:
    """All of it, in Markdown."""
    lines: list[str] = []
    if imports := result.get("import"):
        base = imports["mlx and the BLAS"]["seconds"]
        lines += ["| import | ms | / mlx and the BLAS |", "|---|--:|--:|"]
        for name, found in imports.items():
            seconds = found["seconds"]
            lines.append(f"| {name} | {seconds * 1e3:.0f} | {seconds / base:.2f} |")
        lines.append("")
    for what in ("warm", "cold"):
        if rows := result.get(what):
            lines += [
                f"| {what} load | MB | mlx_zoo, ms | torch, ms | ratio | MB/s | peak / checkpoint "
                "| torch's peak |",
                "|---|--:|--:|--:|--:|--:|--:|--:|",
            ]
            for name, row in rows.items():
                size = row["checkpoint"]["bytes"]
                ours, theirs = row["mlx_zoo"], row["torch"]
                lines.append(
                    f"| {name} | {size / 1e6:.0f} | {ours['seconds'] * 1e3:.0f} "
                    f"| {theirs['seconds'] * 1e3:.0f} "
                    f"| {ours['seconds'] / theirs['seconds']:.2f} "
                    f"| {size / ours['seconds'] / 1e6:.0f} | {ours['bytes'] / size:.2f} "
                    f"| {theirs['bytes'] / size:.2f} |"
                )
            lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("import", "warm", "cold"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--folder", type=Path, help="where the checkpoints are kept")
    parser.add_argument("--json", action="store_true", help="machine-readable figures")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return print(json.dumps(work(*arguments.worker)))

    wanted = arguments.only or ("import", "warm", "cold")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        bench, result = Bench(folder, arguments.rounds), {}
        if "import" in wanted:
            result["import"] = bench.imports()
        if {"warm", "cold"} & {*wanted}:
            bench.run("make", str(folder))
        for what in ("warm", "cold"):
            if what in wanted:
                result[what] = {
                    f"{name}.{kind}": bench.load(name, kind, warm=what == "warm")
                    for name in arguments.networks
                    for kind in KINDS
                }
    print(json.dumps(result, indent=2) if arguments.json else table(result))


if __name__ == "__main__":
    main()
