"""One framework in a process of its own: builds a network once, then runs a round when told to.

Orders and answers are lines of JSON, on standard input and output; `mlx_zoo.benchmark.contest`
gives the orders. A worker imports its own framework and no other: PyTorch's threads would spin
against MLX's, its cuDNN stand in for MLX's, and each would be charged for the other's memory. This
file is therefore run by its path, and imports nothing of mlx_zoo unless mlx_zoo is measured.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], float | None]  # seconds, where the whole call is not what is measured
MAX_RUNS = 2000  # of a round
SMALLEST = 1e-9  # seconds


class Framework:
    """A network in some framework. `packages` are those whose versions matter."""

    packages: tuple[str, ...] = ()

    def __init__(self, order: Mapping[str, Any]):
        self.order = order
        self.network = order["network"]

    def build(self) -> None:
        """The network, with random weights: values do not change the time."""
        raise NotImplementedError

    def run_of(self, case: Mapping[str, Any]) -> Run:
        """What is timed: it returns when all is computed."""
        raise NotImplementedError

    def reset(self) -> None:
        """Give back buffers, and count the peak of memory from now."""

    def peak(self) -> int | None:
        """Bytes that the framework itself says it had at most since then."""
        return None

    def about(self) -> dict[str, Any]:
        """What else is worth knowing."""
        return {}


def inputs_of(case: Mapping[str, Any]) -> np.ndarray:
    """Images of normal numbers, or the ids (B, N) of tokens."""
    rng = np.random.default_rng(0)
    if case["vocab"]:
        return rng.integers(1, case["vocab"], case["shape"])
    return rng.standard_normal(case["shape"], np.float32)


def per_token(generate: Callable[[int], int], count: int) -> Run:
    """Seconds per further token: those of `count` tokens, less those of the first alone.

    `generate` says how many tokens a row got.
    """

    def seconds(wanted: int) -> float:
        start = time.perf_counter()
        got = generate(wanted)
        taken = time.perf_counter() - start
        if got != wanted:
            raise RuntimeError(f"the text ended after {got} of {wanted} tokens")
        return taken

    return lambda: max(seconds(count) - seconds(1), SMALLEST * count) / max(count - 1, 1)


# MLX --------------------------------------------------------------------------------------------


class MLX(Framework):
    """What is common to networks in MLX."""

    packages: tuple[str, ...] = ("mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mkl")
    model: Any

    def __init__(self, order: Mapping[str, Any]):
        super().__init__(order)
        if not order["tf32"]:
            os.environ["MLX_ENABLE_TF32"] = "0"
        from mlx_zoo.backend.blas import load_fast_blas

        load_fast_blas()  # first of all; for mlx-lm as well

    def build(self) -> None:
        import mlx.core as mx

        self.mx = mx
        mx.set_default_device(mx.gpu if self.order["device"] == "gpu" else mx.cpu)
        self.model = self.create()

    def create(self) -> Any:
        raise NotImplementedError

    def run_of(self, case: Mapping[str, Any]) -> Run:
        mx = self.mx
        x = mx.array(inputs_of(case))
        if not case["vocab"]:
            x = x.astype(getattr(mx, self.order["dtype"]))
        mx.eval(x)
        if case["phase"] == "decode":
            rows = np.array(x).tolist()
            return per_token(lambda count: self.generate(rows, count), case["new_tokens"])
        call = self.prefill if case["phase"] == "prefill" else self.model

        def run() -> None:
            mx.eval(call(x))

        return run

    def prefill(self, ids: Any) -> Any:
        raise NotImplementedError

    def generate(self, rows: list[list[int]], count: int) -> int:
        raise NotImplementedError

    def reset(self) -> None:
        self.mx.clear_cache()
        self.mx.reset_peak_memory()

    def peak(self) -> int | None:
        return self.mx.get_peak_memory()

    def about(self) -> dict[str, Any]:
        from mlx_zoo.backend.blas import load_fast_blas

        return {"blas": load_fast_blas().name}


class Zoo(MLX):
    """mlx_zoo's network, as it is loaded or optimised for inference."""

    packages = (*MLX.packages, "mlx-zoo")

    def create(self) -> Any:
        from mlx_zoo.zoo import load

        name, options = self.network["name"], self.network["options"]
        model = load(name, dtype=self.order["dtype"], **options)
        if self.order["variant"] == "optimised":
            from mlx_zoo.backend.inference import optimize_for_inference

            model = optimize_for_inference(model)
        return model

    def prefill(self, ids: Any) -> Any:
        return self.model.next_logits(ids, None, self.model.make_cache(ids.shape[1] + 1))

    def generate(self, rows: list[list[int]], count: int) -> int:
        from mlx_zoo.tasks.generation import generate, generate_batch

        if len(rows) == 1:
            return len(list(generate(self.model, rows[0], max_tokens=count)))
        texts = generate_batch(self.model, rows, max_tokens=count)
        return min(len(text.tokens) for text in texts)

    def save(self, path: str) -> None:
        """A checkpoint in PyTorch's names and layout."""
        from mlx_zoo.exporting import export

        export(self.model, path)

    def load(self, path: str, step: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
        """Seconds to convert a checkpoint and keep it, and to load what was kept."""
        from mlx_zoo.zoo import load

        cache = Path(path).with_name("cache")
        shutil.rmtree(cache, ignore_errors=True)
        name, options = self.network["name"], self.network["options"]
        cold, warm = (step(lambda: load(name, path, cache_dir=cache, **options)) for _ in range(2))
        return {"cold": cold, "warm": warm}

    def count(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """What a run of the case has to compute and to move, layer by layer: (FLOP, bytes)."""
        from mlx_zoo.benchmark.roofline import count

        mx = self.mx
        shape = [case["shape"][0], 1] if case["phase"] == "decode" else case["shape"]
        x = mx.zeros(shape, mx.int32 if case["vocab"] else getattr(mx, self.order["dtype"]))
        call = self.model if case["phase"] == "forward" else self.prefill
        work, covered = count(self.model, lambda: call(x))
        return {"work": [(one.flops, one.bytes) for one in work], "covered": covered}

    def ceilings(self) -> dict[str, float]:
        mx, order = self.mx, self.order
        n, size, dtype = large(order)
        a, b = (mx.random.normal((n, n)).astype(getattr(mx, dtype)) for _ in "ab")
        x = mx.zeros(size // 4)
        mx.eval(a, b, x)
        return ceilings(order, lambda: mx.eval(a @ b), lambda: mx.eval(x + 1))


class MLXLM(MLX):
    """mlx-lm's GPT-2, with the same BLAS."""

    packages = (*MLX.packages, "mlx-lm")

    def create(self) -> Any:
        gpt2: Any = importlib.import_module("mlx_lm.models.gpt2")
        model = gpt2.Model(gpt2.ModelArgs(model_type="gpt2", **self.network["config"]))
        model.set_dtype(getattr(self.mx, self.order["dtype"]))
        model.eval()
        self.mx.eval(model.parameters())
        return model

    def prefill(self, ids: Any) -> Any:
        """As mlx-lm's generate_step does it: what goes before, then the last token."""
        cache: Any = importlib.import_module("mlx_lm.models.cache").make_prompt_cache(self.model)
        if ids.shape[1] > 1:
            self.model(ids[:, :-1], cache=cache)
            self.mx.eval([layer.state for layer in cache])
        return self.model(ids[:, -1:], cache=cache)

    def generate(self, rows: list[list[int]], count: int) -> int:
        lm: Any = importlib.import_module("mlx_lm.generate")
        if len(rows) == 1:
            return len(list(lm.generate_step(self.mx.array(rows[0]), self.model, max_tokens=count)))
        batch = lm.BatchGenerator(self.model, stop_tokens=[])
        batch.insert(rows, [count] * len(rows))
        got = 0
        while responses := batch.next_generated():
            got += len(responses)
        batch.close()
        return got // len(rows)


# PyTorch ----------------------------------------------------------------------------------------


class Torch(Framework):
    """The PyTorch original, eager, compiled, or with channels last."""

    packages = ("torch", "torchvision", "timm", "transformers")
    model: Any

    def __init__(self, order: Mapping[str, Any]):
        super().__init__(order)
        import torch

        self.torch = torch
        torch.set_num_threads(order["threads"])
        torch.set_grad_enabled(False)
        self.device = "cpu"
        if order["device"] == "gpu":
            cuda = torch.cuda.is_available()
            if not cuda and not torch.backends.mps.is_available():
                raise RuntimeError("this PyTorch sees no GPU")
            self.device = "cuda" if cuda else "mps"
        tf32 = order["tf32"] and order["device"] == "gpu"  # on a CPU float32 is float32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32

    def build(self) -> None:
        model = self.create().eval().to(self.device, getattr(self.torch, self.order["dtype"]))
        if self.order["variant"] == "channels last":
            model = model.to(memory_format=self.torch.channels_last)
        self.model = model

    def create(self) -> Any:
        network = self.network
        if network["library"] == "torchvision":
            models = _torchvision().models
            return models.get_model(network["name"], weights=None, **network["options"])
        _torchvision()  # the other two import it
        if network["library"] == "timm":
            import timm

            return timm.create_model(network["name"], pretrained=False, **network["options"])
        import transformers

        kind: Any = getattr(transformers, network["name"])
        config = kind.config_class(**network["config"])
        return kind(config, **network["options"])

    def run_of(self, case: Mapping[str, Any]) -> Run:
        torch, model, variant = self.torch, self.model, self.order["variant"]
        if not case["vocab"]:
            B, H, W, C = case["shape"]
            case = {**case, "shape": (B, C, H, W)}
        x = torch.from_numpy(inputs_of(case)).to(self.device)
        if not case["vocab"]:
            x = x.to(getattr(torch, self.order["dtype"]))
            if variant == "channels last":
                x = x.contiguous(memory_format=torch.channels_last)
        if case["phase"] == "decode":
            return per_token(lambda count: self.generate(x, count), case["new_tokens"])
        if variant == "compiled":
            torch.compiler.reset()
            model = torch.compile(model)
        options = {"use_cache": True, "logits_to_keep": 1} if case["phase"] == "prefill" else {}

        def run() -> None:
            with torch.inference_mode():
                model(x, **options)
                self.wait()

        return run

    def generate(self, ids: Any, count: int) -> int:
        """By transformers' generate, greedily; compiled, with its static cache."""
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if self.order["variant"] == "compiled":
            compiling: Any = importlib.import_module("transformers").CompileConfig
            options |= {"cache_implementation": "static", "compile_config": compiling()}
        whole = self.torch.ones_like(ids)
        with self.torch.inference_mode():
            out = self.model.generate(ids, attention_mask=whole, max_new_tokens=count, **options)
            self.wait()
        return out.shape[1] - ids.shape[1]

    def wait(self) -> None:
        if self.device != "cpu":
            getattr(self.torch, self.device).synchronize()

    def reset(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def about(self) -> dict[str, Any]:
        threads = f"{self.torch.get_num_threads()} threads"
        if self.device == "cuda":
            return {"gpu": self.torch.cuda.get_device_name(), "threads": threads}
        return {"threads": threads}

    def ceilings(self) -> dict[str, float]:
        torch, order = self.torch, self.order
        n, size, dtype = large(order)
        a, b = (torch.randn(n, n, device=self.device, dtype=getattr(torch, dtype)) for _ in "ab")
        x = torch.zeros(size // 4, device=self.device)

        def waited(function: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                function()
                self.wait()

            return run

        return ceilings(order, waited(lambda: a @ b), waited(lambda: x + 1))

    def save(self, path: str) -> None:
        self.torch.save(self.model.state_dict(), path)

    def load(self, path: str, step: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
        """Seconds to read a checkpoint into a network; of both, with the network made for it.

        "assigned" makes the network without storage (meta device) and gives it the file's tensors.
        """
        torch = self.torch

        def fill(model: Any, **how: Any) -> None:
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state, **how)
            model.eval()

        def on_meta() -> None:
            with torch.device("meta"):
                model = self.create()
            fill(model, assign=True)

        return {
            "fill": step(lambda: fill(self.model)),
            "built": step(lambda: fill(self.create())),
            "assigned": step(on_meta),
        }


def _torchvision() -> Any:
    """torchvision, also where its operators, built for CUDA, do not load beside a CPU's torch.

    The import then fails on two operators that no classification network uses: it is enough to
    declare them.
    """
    import torch

    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)  # the operators live as long as it
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


KEPT: list[Any] = []
FRAMEWORKS: dict[str, type[Framework]] = {"mlx_zoo": Zoo, "torch": Torch, "mlx-lm": MLXLM}


# The process ------------------------------------------------------------------------------------


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def large(order: Mapping[str, Any]) -> tuple[int, int, str]:
    """Side of a large matrix, bytes of a large array, and the dtype in which a device is fastest.

    A CPU computes half precision slower than float32, if not in float32 itself.
    """
    gpu = order["device"] == "gpu"
    return (8192, 1 << 29, order["dtype"]) if gpu else (2048, 1 << 26, "float32")


def ceilings(
    order: Mapping[str, Any], product: Callable[[], Any], copy: Callable[[], Any]
) -> dict[str, float]:
    """The machine's own: GFLOP/s of a large matrix product, GB/s read and written by a copy.

    On the CPU NumPy copies, in all threads.
    """
    n, size, _ = large(order)
    seconds = min(timed(product) for _ in range(6))
    if order["device"] == "gpu":
        copied = min(timed(copy) for _ in range(6))
    else:
        copied = _copy_seconds(size, order["threads"])
    return {"gflops": 2 * n**3 / seconds / 1e9, "gb_per_second": 2 * size / copied / 1e9}


def _copy_seconds(size: int, threads: int) -> float:
    """To copy `size` bytes, by so many threads, best of six."""
    from concurrent.futures import ThreadPoolExecutor

    source, target = np.ones(size // 8), np.empty(size // 8)
    parts = [
        slice(i * len(source) // threads, (i + 1) * len(source) // threads) for i in range(threads)
    ]
    with ThreadPoolExecutor(threads) as pool:
        copy = lambda part: np.copyto(target[part], source[part])  # noqa: E731
        return min(timed(lambda: list(pool.map(copy, parts))) for _ in range(6))


def reset_peak_memory() -> None:
    """Linux counts a process's peak anew. Elsewhere it is that of the whole life."""
    with suppress(OSError):  # no Linux, or not allowed: the peak stays an upper bound
        Path("/proc/self/clear_refs").write_text("5")


def process_memory() -> tuple[int, int | None]:
    """Bytes: the peak of this process, and what it has now where the system says so."""
    try:
        said = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in said.splitlines())
        peak, now = (1024 * int(fields[key].split()[0]) for key in ("VmHWM", "VmRSS"))
        return peak, now
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024), None


class Worker:
    """Answers orders, one after the other. The methods are the orders' names."""

    def __init__(self) -> None:
        self.framework: Framework
        self.run: Run
        self.resting: tuple[float, float] | None = None  # since when, and the processor's time then

    def start(self, order: Mapping[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()
        kind = FRAMEWORKS[order["framework"]]
        self.framework = kind(order)
        imported = time.perf_counter()
        self.framework.build()
        versions = {}
        for package in kind.packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {
            "import_seconds": imported - begun,
            "build_seconds": time.perf_counter() - imported,
            "versions": versions,
            **self.framework.about(),
        }

    def prepare(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a case. Seconds of the first run, which compiles, and of the second."""
        self.resting = None  # until the first round is over
        self.run = lambda: None  # the last case's arrays go
        gc.collect()
        self.framework.reset()
        reset_peak_memory()
        before = process_memory()[1]
        self.run = self.framework.run_of(order["case"])
        return {"first": timed(self.run), "second": timed(self.run), "resident": before}

    def round(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of each run, at least `runs`, until `seconds` have gone, after one untimed."""
        busy = self._busy()
        self.run()
        seconds: list[float] = []
        gc.collect()
        gc.disable()
        begun = time.perf_counter()
        try:
            while len(seconds) < order["runs"] or time.perf_counter() - begun < order["seconds"]:
                start = time.perf_counter()
                own = self.run()
                seconds.append(time.perf_counter() - start if own is None else own)
                if len(seconds) == MAX_RUNS:
                    break
        finally:
            gc.enable()
        return {"seconds": seconds, "busy": busy}

    def rest(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """From now on this process should do nothing."""
        self.resting = (time.perf_counter(), time.process_time())
        return {}

    def _busy(self) -> float:
        """The share of one core that this process used while it was at rest."""
        if self.resting is None:
            return 0.0
        since, used = self.resting
        wall = max(time.perf_counter() - since, SMALLEST)
        return (time.process_time() - used) / wall if wall > 0.05 else 0.0

    def memory(self, order: Mapping[str, Any]) -> dict[str, Any]:
        peak, _ = process_memory()
        return {"process": peak, "framework": self.framework.peak()}

    def save(self, order: Mapping[str, Any]) -> dict[str, Any]:
        framework: Any = self.framework
        framework.save(order["path"])
        return {"bytes": os.path.getsize(order["path"])}

    def load(self, order: Mapping[str, Any]) -> dict[str, Any]:
        framework: Any = self.framework
        grown: list[int | None] = []

        def step(function: Callable[[], Any]) -> float:
            gc.collect()
            reset_peak_memory()
            before = process_memory()[1]
            seconds = timed(function)
            grown.append(None if before is None else process_memory()[0] - before)
            return seconds

        seconds = framework.load(order["path"], step)
        return {"seconds": seconds, "grown": grown[0]}  # ours: to convert; torch: to fill

    def count(self, order: Mapping[str, Any]) -> dict[str, Any]:
        framework: Any = self.framework
        return framework.count(order["case"])

    def ceilings(self, order: Mapping[str, Any]) -> dict[str, Any]:
        framework: Any = self.framework
        return framework.ceilings()


def main() -> None:
    """Serve until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order["do"])(order)
        except Exception as error:
            said = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {said[0] if said else 'no message'}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
