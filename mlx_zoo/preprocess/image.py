"""Images as a network wants them: resized, cropped, scaled, normalised. By Pillow.

Pixel for pixel what torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` make of a
Pillow image, which is also what timm makes of it.
"""

from __future__ import annotations

import io
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_zoo.errors import UnsupportedConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from mlx_zoo.catalogue import Preprocessing

MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow's name
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def preprocess(images: Any, how: Preprocessing) -> np.ndarray:
    """Images -> a float32 batch (B, size, size, channels), as `how` says.

    Args:
        images: one image or a list or tuple of them: a path, the bytes of a file, a Pillow image,
            or a uint8 array (H, W) or (H, W, C). They are turned as their EXIF data says; what
            would be seen through transparency is not: the alpha channel is dropped.
        how: from a checkpoint. As many channels as it has means: 1 is grey, 3 is RGB.

    Raises:
        ValueError: something that is not an image, or cannot be read; a file is named.
        UnsupportedConfig: `how` asks for what is not implemented.
    """
    channels = len(how.mean)
    if channels not in MODES:
        raise UnsupportedConfig(f"images of {channels} channels are not implemented; 1 and 3 are")
    if how.interpolation not in INTERPOLATIONS:
        raise UnsupportedConfig(
            f"interpolation={how.interpolation!r} is not implemented; "
            f"{', '.join(INTERPOLATIONS)} are"
        )
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not images:
        raise ValueError("images is empty")
    return np.stack([_prepared(_opened(image, MODES[channels]), how) for image in images])


def _prepared(image: Image, how: Preprocessing) -> np.ndarray:
    """(size, size, channels) in float32, in the order torchvision and timm do it."""
    image = _resized(image, how.resize, how.interpolation)
    left, top = (_crop_start(side, how.size) for side in image.size)
    # Beyond its edges an image is black.
    image = image.crop((left, top, left + how.size, top + how.size))
    pixels = np.asarray(image, dtype=np.float32).reshape(how.size, how.size, -1) / np.float32(255)
    return (pixels - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)


def _resized(image: Image, shorter: int, interpolation: str) -> Image:
    """The shorter side becomes `shorter` pixels, the longer one follows."""
    from PIL.Image import Resampling

    # In this order: by way of a ratio, 110 x 220 would become 224 x 447.
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    return image.resize((width, height), Resampling[interpolation.upper()])


def _crop_start(side: int, crop: int) -> int:
    """Where the centre begins. torchvision rounds to even where it cuts, and down where it pads."""
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def _opened(image: Any, mode: str) -> Image:
    """An image of `mode`, upright and decoded, whatever it was given as."""
    from PIL import Image, ImageOps

    named = f"{image}: " if isinstance(image, (str, os.PathLike)) else ""
    if isinstance(image, (bytes, bytearray, memoryview)):
        image = io.BytesIO(image)
    elif not named and not isinstance(image, Image.Image):
        image = Image.fromarray(_checked(image))
    try:
        theirs = isinstance(image, Image.Image)  # and theirs to close
        with nullcontext(image) if theirs else Image.open(image) as found:
            if 0 in found.size:
                raise ValueError(f"an image of {found.width} x {found.height} pixels")
            kind = found.format
            return _converted(ImageOps.exif_transpose(found), mode, kind)
    except Exception as error:  # each of Pillow's decoders raises what it likes
        raise ValueError(f"{named}not an image that can be read: {error}") from error


def _converted(image: Image, mode: str, kind: str | None) -> Image:
    """To 8 bits a channel. `kind` is the format of the file: "PNG"."""
    from PIL import Image

    # Pillow clips what has more bits than it can show: all of a photograph becomes white.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        # As the PNG specification (13.12) scales samples: by 255/65535, rounded.
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}): scale them to 8 bits first")
    elif image.mode == "P":  # else Pillow warns of a palette with transparent colours
        image = image.convert("RGBA")
    return image.convert(mode)


def _checked(array: Any) -> np.ndarray:
    """The array as Pillow takes it. Raises ValueError for anything else."""
    if not isinstance(array, np.ndarray) and not hasattr(array, "__array__"):
        raise ValueError(f"{type(array).__name__} is not an image: give a path, bytes or an array")
    array = np.asarray(array)
    if array.dtype != np.uint8:
        raise ValueError(f"an image of {array.dtype}: uint8 is needed, of values 0 to 255")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ValueError(f"an image of shape {array.shape}: (H, W) or (H, W, C) is needed")
    return array
