"""Images as a network wants them: resized, cropped, scaled, normalised. By Pillow."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from mlx_zoo.catalogue import Preprocessing


def preprocess(images: Any, how: Preprocessing) -> np.ndarray:
    """Images -> a float32 batch (B, size, size, channels), as `how` says.

    Args:
        images: one image or a sequence of them: a path, the bytes of a file, a Pillow image, or a
            uint8 array (H, W) or (H, W, C).
        how: from a checkpoint. As many channels as it has means: 1 is grey, 3 is RGB.

    Raises:
        ValueError: something that is not an image.
    """
    if isinstance(images, (str, bytes, os.PathLike)) or not isinstance(images, Sequence):
        images = [images]
    if not images:
        raise ValueError("images is empty")
    return np.stack([_prepared(_opened(image, len(how.mean)), how) for image in images])


def _prepared(image: Image, how: Preprocessing) -> np.ndarray:
    """(size, size, channels) in float32, in the order torchvision and timm do it."""
    image = _resized(image, how.resize, how.interpolation)
    left, top = (round((side - how.size) / 2) for side in image.size)
    image = image.crop((left, top, left + how.size, top + how.size))
    pixels = np.asarray(image, dtype=np.float32).reshape(how.size, how.size, -1) / np.float32(255)
    return (pixels - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)


def _resized(image: Image, shorter: int, interpolation: str) -> Image:
    """The shorter side becomes `shorter` pixels, the longer one follows."""
    from PIL.Image import Resampling

    filters = {
        "bilinear": Resampling.BILINEAR,
        "bicubic": Resampling.BICUBIC,
        "lanczos": Resampling.LANCZOS,
        "nearest": Resampling.NEAREST,
    }
    width, height = image.size
    ratio = shorter / min(width, height)
    size = [
        shorter if side == min(width, height) else int(side * ratio) for side in (width, height)
    ]
    return image.resize((size[0], size[1]), filters[interpolation])


def _opened(image: Any, channels: int) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(image, (str, os.PathLike)):
            image = Image.open(image)
        elif isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, np.ndarray) or hasattr(image, "__array__"):
            image = Image.fromarray(_checked(np.asarray(image)))
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"{type(image).__name__} is not an image: give a path, bytes or an array"
            )
        image = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"not an image: {error}") from error
    return image.convert("L" if channels == 1 else "RGB")


def _checked(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise ValueError(f"an image of {array.dtype}: uint8 is needed, of values 0 to 255")
    if array.ndim == 3 and array.shape[-1] == 1:
        return array[..., 0]
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4)):
        return array
    raise ValueError(f"an image of shape {array.shape}: (H, W) or (H, W, C) is needed")
