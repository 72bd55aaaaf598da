"""What the digit networks share: the data, the training loop, the evidence and the files.

Preprocessing is Pillow and numpy alone (`as_image`, `as_inputs`): a deployed pipeline reproduces
a network's inputs bit for bit from the stored images.

Data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49 (CC BY 4.0), the copy that scikit-learn carries.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import sklearn
import torch
from PIL import Image
from safetensors.numpy import save
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from mlx_zoo import registry
from mlx_zoo.mapping import engine
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()  # timm imports it
import timm  # noqa: E402

DATA = Path(__file__).resolve().parents[1] / "mlx_zoo" / "data"
IMG_SIZE = 32
NUM_REFERENCE = 16  # layer outputs are recorded for the first 16 held-out images, as one batch
NUM_SAMPLES = 64  # values kept of each layer's output


# Data


@dataclass(frozen=True)
class Normalisation:
    """Over pixels in [0, 1] of the training images."""

    mean: float
    std: float

    @classmethod
    def of(cls, images: np.ndarray) -> "Normalisation":
        pixels = resize(images).astype(np.float64) / 255
        return cls(mean=round(float(pixels.mean()), 4), std=round(float(pixels.std()), 4))

    @property
    def background(self) -> float:
        """What a black pixel becomes."""
        return -self.mean / self.std


def as_image(digits: np.ndarray) -> np.ndarray:
    """Counts 0..16 (B, 8, 8) -> grey levels (B, 8, 8) uint8."""
    return np.rint(digits * 255 / 16).astype(np.uint8)


def resize(images: np.ndarray) -> np.ndarray:
    """(B, 8, 8) uint8 -> (B, 32, 32) uint8, as Pillow resizes a mode "L" image."""
    size = (IMG_SIZE, IMG_SIZE)
    return np.stack(
        [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BILINEAR)) for i in images]
    )


def as_inputs(images: np.ndarray, norm: Normalisation) -> Tensor:
    """(B, 8, 8) uint8 -> (B, 1, 32, 32) float32. Every step rounds to float32."""
    pixels = resize(images).astype(np.float32) / np.float32(255)
    pixels = (pixels - np.float32(norm.mean)) / np.float32(norm.std)
    return torch.from_numpy(pixels[:, None])


def split() -> list[np.ndarray]:
    """Images to train on, images held out, and the labels of each."""
    digits = load_digits()
    return train_test_split(
        as_image(digits.images),
        digits.target.astype(np.int64),
        test_size=0.2,
        random_state=0,  # the split stays when the recipe's seed changes
        stratify=digits.target,
    )


# Training


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    epochs: int = 60
    batch_size: int = 64
    lr: float = 3e-3
    warmup: float = 0.1  # the fraction of all steps
    weight_decay: float = 0.05  # of tensors with two axes or more; biases and norms have none
    label_smoothing: float = 0.1
    max_shift: int = 2  # pixels of the 32 x 32 input, each way

    def augmented(self, inputs: Tensor, background: float, random: torch.Generator) -> Tensor:
        """Each image changed by chance; (B, 1, H, W) -> the same."""
        return shifted(inputs, self.max_shift, background, random)


@dataclass(frozen=True)
class TurningRecipe(Recipe):
    max_rotation: float = 12.0  # degrees, each way
    max_zoom: float = 0.1  # in or out

    def augmented(self, inputs: Tensor, background: float, random: torch.Generator) -> Tensor:
        turned = rotated(inputs, self.max_rotation, self.max_zoom, background, random)
        return shifted(turned, self.max_shift, background, random)


def shifted(inputs: Tensor, max_shift: int, background: float, random: torch.Generator) -> Tensor:
    """Each image moved by up to `max_shift` pixels each way; (B, 1, H, W) -> the same."""
    num, _, height, width = inputs.shape
    padded = F.pad(inputs, (max_shift,) * 4, value=background)
    dy, dx = torch.randint(0, 2 * max_shift + 1, (2, num, 1), generator=random)
    rows = (torch.arange(height) + dy)[:, None, :, None]  # (B, 1, H, 1)
    cols = (torch.arange(width) + dx)[:, None, None, :]  # (B, 1, 1, W)
    return padded[torch.arange(num)[:, None, None, None], 0, rows, cols]


def rotated(
    inputs: Tensor, degrees: float, zoom: float, background: float, random: torch.Generator
) -> Tensor:
    """Each image turned and scaled about its centre; (B, 1, H, W) -> the same."""
    turn, scale = torch.rand((2, len(inputs)), generator=random) * 2 - 1
    turn, scale = turn * math.radians(degrees), 1 + scale * zoom
    zero = torch.zeros_like(turn)
    rows = (
        torch.stack([scale * turn.cos(), -scale * turn.sin(), zero], dim=1),
        torch.stack([scale * turn.sin(), scale * turn.cos(), zero], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(inputs.shape), align_corners=False)
    # Sampling pads with zeros, which the background is not.
    return F.grid_sample(inputs - background, grid, align_corners=False) + background


def train(
    new_model: Callable[[], nn.Module],
    images: np.ndarray,
    labels: np.ndarray,
    norm: Normalisation,
    recipe: Recipe,
) -> nn.Module:
    torch.manual_seed(recipe.seed)
    random = torch.Generator().manual_seed(recipe.seed)
    inputs, targets = as_inputs(images, norm), torch.from_numpy(labels)

    model = new_model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
    )
    # Batches of equal size: a remainder of a few images would unsettle BatchNorm's statistics.
    num_batches = len(inputs) // recipe.batch_size
    num_steps = recipe.epochs * num_batches
    num_warmup = round(recipe.warmup * num_steps)

    def lr_factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(inputs), generator=random)
        for batch in order[: num_batches * recipe.batch_size].split(recipe.batch_size):
            x = recipe.augmented(inputs[batch], norm.background, random)
            loss = F.cross_entropy(model(x), targets[batch], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.inference_mode()
def num_correct(model: nn.Module, inputs: Tensor, labels: np.ndarray) -> int:
    return int((model(inputs).argmax(dim=1).numpy() == labels).sum())


def cross_validate(
    new_model: Callable[[], nn.Module], images: np.ndarray, labels: np.ndarray, recipe: Recipe
) -> Iterator[float]:
    """Accuracy on each fifth of the training images, of a network trained on the other four."""
    folds = StratifiedKFold(n_splits=5, shuffle=True, random_state=recipe.seed)
    for fit, rest in folds.split(images, labels):
        norm = Normalisation.of(images[fit])
        model = train(new_model, images[fit], labels[fit], norm, recipe)
        yield num_correct(model, as_inputs(images[rest], norm), labels[rest]) / len(rest)


# What the original answers


@torch.inference_mode()
def layer_outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Outputs of the layers that have parameters of their own, in the order of execution.

    Images are NHWC. Of timm's norms with an activation in them it is what the norm gives.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            nhwc = output.permute(0, 2, 3, 1) if output.ndim == 4 else output
            outputs[name] = nhwc.contiguous().clone()  # an activation may follow, in place

        layer.register_forward_hook(hook)

    for name, layer in model.named_modules():
        if name and next(layer.parameters(recurse=False), None) is not None:
            # In timm's BatchNormAct2d an identity stands between the norm and its activation.
            keep(name, getattr(layer, "drop", layer))
    model(inputs)
    return outputs


def our_layers(checkpoint: str) -> dict[str, tuple[str, ...]]:
    """timm's layer -> ours, which are several where timm's is a fused one."""
    known = registry.find(checkpoint)
    architecture = registry.architectures()[known.architecture]
    model = architecture.model(known.config)
    return engine.layer_links(model, architecture.spec("timm", known.config))


@torch.inference_mode()
def evidence(
    new_model: Callable[[], nn.Module],
    state: dict[str, Tensor],
    inputs: Tensor,
    seed: int,
    links: dict[str, tuple[str, ...]],
) -> dict[str, np.ndarray]:
    """What float64 and float32 PyTorch compute; float64 means double weights on float32 inputs.

    `links` gives our names of the layers. The layout is that of `mlx_zoo.verify.stored`.
    """
    single, double = (filled(new_model(), state, kind) for kind in (torch.float32, torch.float64))
    tensors = {
        "output.logits": double(inputs.double()).numpy(),  # (360, 10)
        "output.logits.torch32": single(inputs).numpy(),
        "reference_inputs": np.arange(NUM_REFERENCE),
    }
    truth = layer_outputs(double, inputs[:NUM_REFERENCE].double())
    torch32 = layer_outputs(single, inputs[:NUM_REFERENCE])
    random = np.random.default_rng(seed)
    for name, output in truth.items():
        index = np.sort(random.choice(output.numel(), size=NUM_SAMPLES, replace=False))
        *shape, width = output.shape
        dims = width // len(links[name])
        row, column = index // width, index % width
        for part, ours in enumerate(links[name]):
            here = column // dims == part
            tensors[f"layer.{ours}"] = output.numpy().reshape(-1)[index[here]]
            tensors[f"layer.{ours}.torch32"] = torch32[name].numpy().reshape(-1)[index[here]]
            tensors[f"layer.{ours}.index"] = (row * dims + column % dims)[here]
            tensors[f"layer.{ours}.shape"] = np.array([*shape, dims])
            tensors[f"layer.{ours}.scale"] = output.abs().max().reshape(1).numpy()
    return tensors


def filled(model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    model.load_state_dict(state)
    return model.to(dtype).eval()


# The files


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def save_arrays(tensors: dict[str, np.ndarray], path: Path) -> None:
    # Not save_file, which makes files that only their owner can read.
    path.write_bytes(save({name: np.ascontiguousarray(x) for name, x in tensors.items()}))


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_arrays({name: x.numpy() for name, x in state.items()}, path)


def run(
    script: str,
    new_model: Callable[[], nn.Module],
    architecture: dict[str, Any],
    recipe: Recipe,
    *,
    checkpoint: str,
    save_state: Callable[[dict[str, Tensor], Path], object],
    answers: str,
    with_images: bool,
    num_threads: int,
) -> None:
    """The command line of a training script.

    Args:
        architecture: how the facts describe what `new_model` makes.
        checkpoint, save_state: the file with the weights, and what writes it.
        answers: the file with the evidence, which has the held-out images too if `with_images`.
        num_threads: the order of float32 sums depends on it, and with it the checkpoint's bits.
    """
    doc = sys.modules["__main__"].__doc__ or ""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DATA, help="directory to write into")
    parser.add_argument("--validate", action="store_true", help="cross-validate, write nothing")
    parser.add_argument("--folds", type=int, default=5, help="how many of the five to validate on")
    for name, default in asdict(recipe).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help=f"default {default}")
    args = parser.parse_args()
    recipe = type(recipe)(**{name: getattr(args, name) for name in asdict(recipe)})

    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)

    images, held_out, labels, held_out_labels = split()
    if args.validate:
        accuracies: list[float] = []
        for accuracy in cross_validate(new_model, images, labels, recipe):
            accuracies.append(accuracy)
            print(f"fold {len(accuracies)}: {accuracy:.4f}", flush=True)
            if len(accuracies) == args.folds:
                break
        print(f"mean   {np.mean(accuracies):.4f}")
        return

    norm = Normalisation.of(images)
    state = train(new_model, images, labels, norm, recipe).state_dict()
    inputs = as_inputs(held_out, norm)
    model = filled(new_model(), state, torch.float32)
    correct = num_correct(model, inputs, held_out_labels)

    args.output.mkdir(parents=True, exist_ok=True)
    paths = [args.output / checkpoint, args.output / answers]
    save_state(state, paths[0])
    tensors = {"images": held_out, "labels": held_out_labels} if with_images else {}
    tensors |= evidence(new_model, state, inputs, recipe.seed, our_layers(paths[0].stem))
    save_arrays(tensors, paths[1])

    name = paths[0].stem
    provenance = {
        "name": name,
        "script": f"training_scripts/{Path(script).name}",
        "architecture": architecture,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "scikit-learn": sklearn.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "training": asdict(recipe) | {"optimizer": "AdamW", "num_threads": num_threads},
        "split": {
            "function": "sklearn.model_selection.train_test_split",
            "test_size": 0.2,
            "stratified": True,
            "random_state": 0,
            "num_train": len(images),
            "num_held_out": len(held_out),
        },
        "accuracy": {
            "dataset": "held out",
            "correct": correct,
            "total": len(held_out),
            "top1": round(correct / len(held_out), 4),
        },
        "preprocessing": {
            "stored": "uint8 (8, 8), rint(count * 255 / 16) of counts 0..16",
            "mode": "L",
            "size": [IMG_SIZE, IMG_SIZE],
            "interpolation": "bilinear",
            "scale": 255,
            "mean": [norm.mean],
            "std": [norm.std],
            "arithmetic": "float32: (pixel / 255 - mean) / std",
            "held_out_inputs_sha256": sha256(inputs.numpy().astype("<f4").tobytes()),
        },
        "labels": [str(name) for name in load_digits().target_names],
        "data": {
            "name": "Optical Recognition of Handwritten Digits",
            "source": "sklearn.datasets.load_digits",
            "licence": "CC BY 4.0",
            "citation": "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, "
            "UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49",
        },
        "sha256": {path.name: sha256(path.read_bytes()) for path in paths},
    }
    text = json.dumps(provenance, indent=2) + "\n"
    (args.output / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"held out: {correct} of {len(held_out)} correct")
    for path in paths:
        print(f"{path.name}: {path.stat().st_size} bytes, sha256 {sha256(path.read_bytes())}")
