"""How training images are varied: cropped and resized, flipped, their colours moved; and mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ATTEMPTS = 10  # at a crop that fits; then the centre is taken


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image by chance, every time that it is seen.

    A crop of `scale` of its area and of an aspect ratio (width to height) of `ratio` is resized to
    what the network sees (Szegedy et al. 2014, arXiv:1409.4842, section 6), and mirrored, left to
    right, `flip` of the time. `jitter` moves brightness, contrast and saturation, each by a factor
    between 1 - jitter and 1 + jitter.

    The values are those with which networks for photographs are commonly trained. Text and digits
    must not be mirrored: set flip=0.0. Of networks for grey images, see `usual`.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.0

    def __post_init__(self):
        (low, high), (narrow, wide) = self.scale, self.ratio
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale={self.scale}: two parts of the area, from above 0 to 1")
        if not 0 < narrow <= wide < math.inf:
            raise ValueError(f"ratio={self.ratio}: two ratios above 0 are needed")
        for name in ("flip", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: between 0 and 1 is needed")

    @classmethod
    def usual(cls, channels: int) -> Augmentation:
        """For RGB the values above. For grey images, which are mostly digits, letters and scans,
        crops of at least 0.7 of the area, and no flip.
        """
        return cls() if channels == 3 else cls(scale=(0.7, 1.0), ratio=(0.9, 1 / 0.9), flip=0.0)

    def __call__(
        self, image: Image, size: tuple[int, int], interpolation: str, rng: np.random.Generator
    ) -> Image:
        """An image of `size` (H, W) out of one of any size."""
        from PIL import Image, ImageEnhance, ImageOps

        left, top, width, height = self.crop(image.width, image.height, rng)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize(size[::-1], Image.Resampling[interpolation.upper()])
        if rng.random() < self.flip:
            image = ImageOps.mirror(image)
        if self.jitter:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = change(image).enhance(rng.uniform(1 - self.jitter, 1 + self.jitter))
        return image

    def crop(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, width, height), distributed as by torchvision's RandomResizedCrop."""
        area, (low, high) = width * height, (math.log(x) for x in self.ratio)
        for _ in range(ATTEMPTS):
            target, ratio = area * rng.uniform(*self.scale), math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
                return int(left), int(top), w, h
        # The largest part of the middle that has an aspect ratio among those allowed.
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = min(width, round(height * ratio))
        h = min(height, round(width / ratio))
        return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True)
class Mixup:
    """Each image of a batch with another of it, and their labels (Zhang et al. 2017,
    arXiv:1710.09412): `share` of itself, the rest of the one at `partners`.
    """

    share: float
    partners: np.ndarray  # (B,)

    @classmethod
    def draw(cls, alpha: float, count: int, rng: np.random.Generator) -> Mixup:
        """A share from Beta(alpha, alpha) for a batch of `count`."""
        return cls(float(rng.beta(alpha, alpha)), rng.permutation(count))

    def __call__(self, own: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(B, ...) float32 of each -> (B, ...) float32."""
        share = np.float32(self.share)
        return share * own + (np.float32(1) - share) * others


def soft_labels(ids: np.ndarray, num_classes: int, smoothing: float) -> np.ndarray:
    """Class ids (B,) -> (B, num_classes) float32: `smoothing` of 1 is shared among all classes
    (Szegedy et al. 2015, arXiv:1512.00567, section 7).
    """
    found = np.full((len(ids), num_classes), smoothing / num_classes, np.float32)
    found[np.arange(len(ids)), ids] += np.float32(1 - smoothing)
    return found
