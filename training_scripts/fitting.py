"""What the small language models share: the optimiser, the batches, and the folder they go into."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from documentation import sources
from safetensors.numpy import save
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1] / "mlx_zoo" / "data"
MAX_STORED = 4096  # values of an output that is stored whole
NUM_SAMPLES = 1024  # values that are kept of a larger one
NUM_THREADS = 1  # the order of float32 sums depends on it, and with it the checkpoint's bits


def make_deterministic(seed: int) -> None:
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)


def fit(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batches: Iterator[Any],
    num_steps: int,
    lr: float,
    warmup: float = 0.06,
    weight_decay: float = 0.01,
) -> nn.Module:
    """AdamW with a linear warm-up and a cosine to nothing, over `num_steps` of `batches`."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": others}],
        lr=lr,
        weight_decay=0.0,
    )
    num_warmup = round(warmup * num_steps)

    def lr_factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    model.train()
    losses = []
    for step, batch in zip(range(num_steps), batches, strict=False):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if (step + 1) % 500 == 0:
            print(f"step {step + 1} of {num_steps}: loss {np.mean(losses[-500:]):.3f}", flush=True)
    return model.eval()


def batches(lengths: Sequence[int], batch_size: int, random: np.random.Generator) -> Iterator:
    """Indices of examples of about the same length, for ever, every example once an epoch."""
    while True:
        order = random.permutation(len(lengths))
        for pool in np.array_split(order, max(1, len(order) // (batch_size * 50))):
            pool = pool[np.argsort(np.asarray(lengths)[pool], kind="stable")]
            parts = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            yield from (parts[i] for i in random.permutation(len(parts)))


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, N) int64, `value` on the right of the shorter rows."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


# The folder


def as_stored(model: nn.Module) -> nn.Module:
    """The weights rounded to float16, as the file has them, in float32."""
    return model.half().float().eval()


@torch.inference_mode()
def evidence(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict:
    """What float64 and float32 PyTorch compute from the stored weights.

    Of an output with more than `MAX_STORED` values some are kept, those at `.index` of the flat
    array; `.shape` says which it had.
    """
    single, double = model(**inputs), model.double()(**inputs)
    model.float()
    tensors = {f"input.{name}": x.numpy() for name, x in inputs.items()}
    random = np.random.default_rng(0)
    for name in outputs:
        values = {f"output.{name}": double[name], f"output.{name}.torch32": single[name]}
        if double[name].numel() > MAX_STORED:
            choice = random.choice(double[name].numel(), size=NUM_SAMPLES, replace=False)
            index = torch.from_numpy(np.sort(choice))
            values = {key: x.flatten()[index] for key, x in values.items()}
            values[f"output.{name}.index"] = index
            values[f"output.{name}.shape"] = torch.tensor(double[name].shape)
        tensors |= {key: x.numpy() for key, x in values.items()}
    return tensors


def write_folder(
    folder: Path,
    model: Any,
    text_files: Mapping[str, str],
    answers: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> None:
    """config.json, model.safetensors in float16, `text_files`, the evidence and the facts."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name, text in text_files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    tensors = {name: np.ascontiguousarray(x) for name, x in answers.items()}
    (folder / "evidence.safetensors").write_bytes(save(tensors))
    names = ["config.json", "model.safetensors", "evidence.safetensors", *text_files]
    for name in names:
        (folder / name).chmod(0o644)  # some writers make files that only their owner can read
    facts = {
        "name": folder.name,
        "licence": "MIT",
        "num_parameters": parameters,
        **facts,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "data": sources(),
        "sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names
        },
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts["held_out"]), flush=True)
    for name in names:
        print(f"{folder.name}/{name}: {(folder / name).stat().st_size} bytes", flush=True)
