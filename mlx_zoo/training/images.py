"""Images as examples: decoded, varied by chance, and prepared as the checkpoint wants them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_zoo import registry
from mlx_zoo.catalogue import Checkpoint, timm_resize
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.preprocess.image import THREADS, Preprocessing, as_sides, opened, preprocess
from mlx_zoo.training.augmentation import Augmentation

USUAL_SIZE, USUAL_CROP = 224, 0.875  # of a network of random weights that says nothing of its own
NAMED = 5  # files that a message names


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The checkpoint's own, at the size that the network has now.

    For random weights: that of published ones of the same network; where there are none,
    ImageNet's means and deviations, bilinear, the centre of 7/8 of the image.
    """
    checkpoint, config = model.checkpoint, model.config
    how = checkpoint.preprocessing if checkpoint else None
    if how is None and (like := preprocessing_like(model)):
        how = like.preprocessing
    size = getattr(config, "img_size", how.size if how else USUAL_SIZE)
    if how is None:
        height, width = (timm_resize(side, USUAL_CROP) for side in as_sides(size))
        how = Preprocessing(size=size, resize=height if height == width else (height, width))
    fitting = how.of_channels(config.in_chans)
    if fitting is None:
        raise UnsupportedConfig(f"images of {config.in_chans} channels cannot be prepared")
    return fitting if size == fitting.size else fitting.at(size)


def preprocessing_like(model: nn.Module) -> Checkpoint | None:
    """A published network with preprocessing that is this one, but for its head and its input."""
    kind, body = registry.of_model(model).name, body_of(model.config)
    same = [
        c
        for c in registry.checkpoints().values()
        if c.architecture == kind and c.preprocessing and body_of(c.config) == body
    ]
    return min(same, key=lambda c: (not c.default, c.name), default=None)


def body_of(config: Any) -> dict[str, Any]:
    """A config without the sizes of the head and the input."""
    free = {"num_classes", "in_chans", "img_size", "task"}
    return {name: x for name, x in vars(config).items() if name not in free}


@dataclass(frozen=True)
class PrepareImages:
    """Images as `preprocess` takes them -> (B, H, W, C) float32."""

    how: Preprocessing
    augmentation: Augmentation | None = None

    @classmethod
    def of(cls, model: nn.Module, augment: bool | Augmentation | None) -> PrepareImages:
        """Raises ValueError for an `augment` that is none."""
        how = preprocessing_of(model)
        if augment is True:
            augment = Augmentation.usual(len(how.mean))
        if not isinstance(augment, Augmentation) and augment not in (None, False):
            raise ValueError(f"augment={augment!r}: True, False or Augmentation(...) is needed")
        return cls(how, augment or None)

    def __call__(
        self, images: Sequence[Any], rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, ...]:
        """An image's chances are its generator's, whichever thread prepares it."""
        if self.augmentation is None:
            return (preprocess([*images], self.how),)
        if len(images) == 1:
            return (np.stack([self.varied(images[0], rngs[0])]),)
        with ThreadPoolExecutor(min(len(images), THREADS), "mlx_zoo-images") as threads:
            return (np.stack([*threads.map(self.varied, images, rngs)]),)

    def varied(self, image: Any, rng: np.random.Generator) -> np.ndarray:
        """(H, W, C)."""
        assert self.augmentation is not None
        how, size = self.how, as_sides(self.how.size)
        seen = self.augmentation(opened(image, how), size, how.interpolation, rng)
        # It has its size: what is left to do is to scale and to normalise.
        return preprocess(seen, replace(how, resize=how.size, crop_mode="squash"))[0]


def check_files(images: Sequence[Any]) -> None:
    """Raise ValueError for files whose beginnings are no image's. Pixels are not decoded."""
    from PIL import Image

    def problem(image: Any) -> str | None:
        if not isinstance(image, (str, Path)):
            return None
        try:
            with Image.open(image):
                return None
        except Exception as error:  # each of Pillow's decoders raises what it likes
            named = "" if str(image) in str(error) else f"{image}: "
            return f"{named}{error}"

    with ThreadPoolExecutor(THREADS, "mlx_zoo-images") as threads:
        found = [why for why in threads.map(problem, images) if why]
    if found:
        more = f"\n  and {len(found) - NAMED} more" if len(found) > NAMED else ""
        listed = "\n  ".join(found[:NAMED])
        raise ValueError(f"{len(found)} of {len(images)} images cannot be read\n  {listed}{more}")
