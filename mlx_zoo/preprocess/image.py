"""Images as a network wants them: resized, cropped, scaled, normalised. By Pillow.

Pixel for pixel what torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize`, timm's
transforms for evaluation and transformers' processors on Pillow make of a Pillow image.
"""

from __future__ import annotations

import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_zoo.errors import UnsupportedConfig

if TYPE_CHECKING:
    import mlx.core as mx
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow's name
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
CROP_MODES = ("center", "squash", "border")
THREADS = min(os.cpu_count() or 1, 16)  # Pillow decodes and resizes in each at once
MAX_RESIZED = 1 << 26  # pixels; of a larger image, only the part that will be seen is made

Size = int | tuple[int, int]  # the side of a square, or (H, W), in pixels


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a network, as its publisher did when measuring accuracy.

    `crop_mode` says how an image of any shape comes to fill `size`:

    center   its shorter side becomes `resize`, and the centre is cut out
    squash   both its sides become `resize`, and the centre is cut out
    border   its longer side becomes `resize`; around it is the mean colour

    Raises UnsupportedConfig for a mode or an interpolation that is not implemented, and ValueError
    for sizes that are none, or means and deviations that do not go together.
    """

    size: Size  # that the network sees
    resize: Size  # before the centre is cropped to `size`
    interpolation: str = "bilinear"  # or "nearest", "bicubic", "lanczos"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # subtracted from values in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    test_size: Size | None = None  # a larger size at which the publisher also measured
    test_resize: Size | None = None
    crop_mode: str = "center"
    # Where a crop cannot be in the middle, transformers rounds down, torchvision to even.
    floor_crop: bool = False

    def __post_init__(self):
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if (value := getattr(self, name)) not in known:
                raise UnsupportedConfig(
                    f"{name}={value!r} is not implemented; {', '.join(known)} are"
                )
        for name in ("size", "resize", "test_size", "test_resize"):
            value = getattr(self, name)
            if value is None and name.startswith("test_"):
                continue
            sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
            if not all(type(side) is int and side > 0 for side in sides):
                raise ValueError(f"{name}={value!r}: a side in pixels, or (H, W), is needed")
        if len(self.mean) != len(self.std) or not all(0 < x < math.inf for x in self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: one of each a channel is needed")

    def __call__(self, images: Any) -> mx.array:
        """Images as `preprocess` takes them -> what the network takes, (B, H, W, C) float32."""
        import mlx.core as mx

        return mx.array(preprocess(images, self))

    def of_channels(self, channels: int) -> Preprocessing | None:
        """The same for grey images, or for RGB; None for another number of channels.

        Grey has the average of the means and deviations, RGB three times those of grey.
        """
        if channels == len(self.mean):
            return self
        if channels == 3 and len(self.mean) == 1:
            return replace(self, mean=self.mean * 3, std=self.std * 3)
        if channels != 1:
            return None
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,), std=(std,))

    def at(self, size: Size) -> Preprocessing:
        """The same at another size: as published for `test_size`, else in proportion."""
        if size == self.test_size and self.test_resize is not None:
            return replace(self, size=size, resize=self.test_resize)
        sides = zip(as_sides(size), as_sides(self.size), as_sides(self.resize), strict=True)
        height, width = (new * resize // old for new, old, resize in sides)
        return replace(self, size=size, resize=height if height == width else (height, width))


def preprocess(images: Any, how: Preprocessing) -> np.ndarray:
    """Images -> a float32 batch (B, H, W, C), as `how` says.

    Args:
        images: one image or a list or tuple of them: a path, the bytes of a file or an open one, a
            Pillow image, or an array (H, W) or (H, W, C), of uint8 or of floats in [0, 1], which
            are rounded to 8 bits; or an array (B, H, W, C) of several. They are turned as their
            EXIF data says; what would be seen through transparency is not: the alpha channel is
            dropped.
        how: from a checkpoint. As many channels as it has means: 1 is grey, 3 is RGB.

    Raises:
        ValueError: something that is not an image, or cannot be read; a file is named.
        UnsupportedConfig: `how` asks for what is not implemented.
    """
    images = as_list(images)
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not images:
        raise ValueError("images is empty")

    def prepared(image: Any) -> np.ndarray:
        return _prepared(opened(image, how), how)

    # An open file, or image, that is there twice cannot be read by two threads at once.
    if len({*map(id, images)}) < len(images) or len(images) == 1:
        return np.stack([*map(prepared, images)])
    with ThreadPoolExecutor(min(len(images), THREADS), "mlx_zoo-images") as threads:
        return np.stack([*threads.map(prepared, images)])


def as_list(images: Any) -> Any:
    """A batch in one array, (B, H, W, C), as a list of images; anything else as it is."""
    return list(images) if getattr(images, "ndim", 0) == 4 else images


def _prepared(image: Image, how: Preprocessing) -> np.ndarray:
    """(H, W, C) in float32, in the order torchvision and timm do it."""
    image = _cropped(image, how)
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    pixels = pixels / np.float32(255)
    return (pixels - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)


def _cropped(image: Image, how: Preprocessing) -> Image:
    """The centre of the resized image, of `how.size`."""
    from PIL import Image

    crop, new = as_sides(how.size)[::-1], _resized(image.size, how)  # (W, H), as Pillow has it
    start = [_crop_start(*sides, how.floor_crop) for sides in zip(new, crop, strict=True)]
    first, last = (0, 0), new
    if math.prod(new) > MAX_RESIZED:
        first = (max(start[0], 0), max(start[1], 0))
        last = (min(start[0] + crop[0], new[0]), min(start[1] + crop[1], new[1]))
    left, right = (edge[0] * image.width / new[0] for edge in (first, last))
    top, bottom = (edge[1] * image.height / new[1] for edge in (first, last))
    seen = image.resize(
        (last[0] - first[0], last[1] - first[1]),
        Image.Resampling[how.interpolation.upper()],
        box=(left, top, right, bottom),
    )
    # Beyond its edges an image is black, a border has the mean colour.
    fill = tuple(round(255 * x) for x in how.mean) if how.crop_mode == "border" else 0
    canvas = Image.new(image.mode, crop, fill)
    canvas.paste(seen, (first[0] - start[0], first[1] - start[1]))
    return canvas


def _resized(size: tuple[int, int], how: Preprocessing) -> tuple[int, int]:
    """(W, H) of the image before it is cropped, given that of the image itself."""
    (width, height), (new_height, new_width) = size, as_sides(how.resize)
    if how.crop_mode == "squash":
        return new_width, new_height
    if how.crop_mode == "center" and new_height == new_width:
        # In this order: by way of a ratio, 110 x 220 would become 224 x 447.
        return int(new_width * width / min(size)), int(new_height * height / min(size))
    tight = max if how.crop_mode == "border" else min
    ratio = tight(height / new_height, width / new_width)
    return max(round(width / ratio), 1), max(round(height / ratio), 1)


def _crop_start(side: int, crop: int, floor: bool) -> int:
    """Where the centre begins. torchvision rounds to even where it cuts, and down where it pads."""
    if floor:
        return (side - crop) // 2
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def as_sides(size: Size) -> tuple[int, int]:
    """(H, W)."""
    return (size, size) if isinstance(size, int) else size


def opened(image: Any, how: Preprocessing) -> Image:
    """An image in the colours that `how` is for, upright and decoded, whatever it was given as.

    Raises ValueError for what is none or cannot be read, UnsupportedConfig for other colours.
    """
    from PIL import Image, ImageOps

    channels = len(how.mean)
    if channels not in MODES:
        raise UnsupportedConfig(f"images of {channels} channels are not implemented; 1 and 3 are")
    named = f"{image}: " if isinstance(image, (str, os.PathLike)) else ""
    if named.startswith(("http://", "https://")):
        raise ValueError(f"{named}nothing is fetched: give a path, or the bytes of the file")
    if isinstance(image, (bytes, bytearray, memoryview)):
        image = io.BytesIO(image)
    elif not named and not isinstance(image, Image.Image) and not hasattr(image, "read"):
        image = Image.fromarray(_checked(image))
    try:
        theirs = isinstance(image, Image.Image)  # and theirs to close
        with nullcontext(image) if theirs else Image.open(image) as found:
            if 0 in found.size:
                raise ValueError(f"an image of {found.width} x {found.height} pixels")
            kind = found.format
            return _converted(ImageOps.exif_transpose(found), MODES[channels], kind)
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
    """The array as Pillow takes it: 8 bits, (H, W) or (H, W, C). ValueError for anything else."""
    if not isinstance(array, np.ndarray) and not hasattr(array, "__array__"):
        raise ValueError(f"{type(array).__name__} is not an image: give a path, bytes or an array")
    try:
        array = np.asarray(array)
    except (RuntimeError, TypeError, ValueError) as error:  # bfloat16, or on another device
        raise ValueError(f"an array that NumPy cannot read: {error}") from error
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        remedy = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            remedy = "; this looks like CHW, PyTorch's layout: use image.transpose(1, 2, 0)"
        raise ValueError(f"an image of shape {array.shape}: (H, W) or (H, W, C) is needed{remedy}")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"an image of {array.dtype} from {array.min():g} to {array.max():g}: "
                "floats are to be from 0 to 1; normalised ones are for the network itself"
            )
        return (array.astype(np.float32) * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image of {array.dtype}: uint8 is needed, of values 0 to 255")
    return array
