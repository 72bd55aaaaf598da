"""How far our preparation of images is from the publisher's own, apart from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_zoo import describe, registry
from mlx_zoo.catalogue import Checkpoint
from mlx_zoo.describe import Place
from mlx_zoo.errors import VerificationError
from mlx_zoo.preprocess.image import opened, preprocess
from mlx_zoo.verify import reference
from mlx_zoo.verify.report import PreprocessingDifference

SIZES = ((640, 480), (375, 500), (110, 220), (97, 64))  # of the images when none are given
WAVES = (4, 8, 16, 32, 64, 128)  # patches a side of the noise that they are made of


def compare_preprocessing(
    checkpoint: Checkpoint,
    images: Sequence[Any] | None = None,
    *,
    seed: int = 0,
    place: Place | None = None,
) -> PreprocessingDifference:
    """Our images against those of the publisher's own transform.

    Args:
        checkpoint: what was published; a transform that only its own files describe is fetched.
        images: as `preprocess` takes them; None: four seeded ones, of several shapes.
        seed: of those.
        place: where files are kept.

    Raises:
        MissingDependency: the publisher's library is needed and not installed.
        VerificationError: the checkpoint does not say how its images are prepared.
    """
    how = checkpoint.preprocessing
    if how is None:
        raise VerificationError(f"{checkpoint.name} does not say how its images are prepared")
    name, theirs = reference.transform_of(checkpoint, _files(checkpoint, place or Place()))
    given = random_images(seed) if images is None else images
    differences = []
    for image in (opened(image, how) for image in given):
        ours = preprocess(image, how)[0]
        differences.append(np.abs((ours - theirs(image)) * np.array(how.std, np.float32) * 255))
    return PreprocessingDifference(
        max_abs=max(float(x.max()) for x in differences),
        mean_abs=float(np.mean([x.mean() for x in differences])),
        reference=name,
        num_images=len(differences),
    )


@cache
def random_images(seed: int) -> list[np.ndarray]:
    """Seeded images (H, W, 3) of uint8 with detail of every size, as photographs have."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    images = []
    for width, height in SIZES:
        pixels = np.full((height, width, 3), 127.0)
        for count in WAVES:
            noise = rng.integers(0, 256, (count, count, 3), np.uint8)
            wave = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(wave) - 127.0) * 2 / count**0.5
        images.append(pixels.clip(0, 255).astype(np.uint8))
    return images


def _files(checkpoint: Checkpoint, place: Place) -> Mapping[str, Path]:
    """Those in which transformers describes its processor."""
    if checkpoint.reference is None or checkpoint.reference.library != "transformers":
        return {}
    architecture = registry.architectures()[checkpoint.architecture]
    return describe.companions(checkpoint, architecture, place)
