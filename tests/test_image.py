"""Images against torchvision's own transforms, pixel for pixel, and files of every kind."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx

from mlx_zoo.catalogue import Preprocessing
from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.preprocess.image import INTERPOLATIONS, preprocess
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
transforms = torchvision.transforms

RNG = np.random.default_rng(0)
SMALL = Preprocessing(size=32, resize=37)
# Nothing is resized, cropped or scaled but by 255.
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
GREY = {"mean": (0.0,), "std": (1.0,)}


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def theirs(image: Image.Image, how: Preprocessing) -> np.ndarray:
    steps = transforms.Compose(
        [
            transforms.Resize(how.resize, transforms.InterpolationMode(how.interpolation)),
            transforms.CenterCrop(how.size),
            transforms.ToTensor(),
            transforms.Normalize(how.mean, how.std),
        ]
    )
    return steps(image).permute(1, 2, 0).numpy()


def pixels(image, mode: str = "RGB", side: int = 4) -> np.ndarray:
    """(side, side, channels) in uint8: what is seen of an image of that size."""
    options = PLAIN if mode == "RGB" else GREY
    found = preprocess(image, Preprocessing(size=side, resize=side, **options))[0] * 255
    np.testing.assert_array_equal(found, found.round())
    return found.astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# What torchvision does ----------------------------------------------------------------------------

SIDES = (1, 2, 7, 31, 32, 33, 110, 220, 223, 224, 225, 256, 333, 500)
HOWS = [
    Preprocessing(size=224, resize=224),
    Preprocessing(size=224, resize=256),
    Preprocessing(size=224, resize=232, interpolation="bicubic"),
    Preprocessing(size=33, resize=36, interpolation="bicubic"),
    Preprocessing(size=32, resize=35, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)),
    Preprocessing(size=32, resize=35, interpolation="lanczos"),
    Preprocessing(size=32, resize=35, interpolation="nearest"),
    Preprocessing(size=64, resize=47),  # padded with black, by an odd number and an even one
    Preprocessing(size=65, resize=47, interpolation="bicubic"),
    Preprocessing(size=49, resize=48),
]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.resize}-{how.size}")
def test_pixels_are_torchvision_s(how):
    for width in SIDES:
        for height in SIDES:
            if max(width, height) > 40 * min(width, height):
                continue  # resized to millions of pixels
            image = Image.fromarray(noise(width, height))
            np.testing.assert_array_equal(
                preprocess(image, how)[0], theirs(image, how), err_msg=f"{width} x {height}"
            )


def test_grey_is_torchvision_s():
    how = Preprocessing(size=28, resize=31, mean=(0.13,), std=(0.31,))
    for width, height in ((28, 28), (110, 220), (33, 20)):
        image = Image.fromarray(noise(width, height)[..., 0])
        np.testing.assert_array_equal(preprocess(image, how)[0], theirs(image, how))


def test_the_longer_side_is_torchvision_s():
    """By way of a ratio, it would be 447, and the crop a pixel off."""
    image = Image.fromarray(noise(110, 220))
    how = Preprocessing(size=224, resize=224)
    assert transforms.Resize(224)(image).size == (224, 448)
    np.testing.assert_array_equal(preprocess(image, how)[0], theirs(image, how))


@pytest.mark.parametrize("name", ["ResNet18_Weights", "ResNet50_Weights", "ViT_B_16_Weights"])
def test_the_publisher_s_own_recipe(name):
    recipe = getattr(torchvision.models, name).DEFAULT.transforms()
    how = Preprocessing(
        size=recipe.crop_size[0],
        resize=recipe.resize_size[0],
        interpolation=recipe.interpolation.value,
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
    )
    for width, height in ((300, 451), (110, 220), (97, 64)):
        image = Image.fromarray(noise(width, height))
        expected = recipe(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(preprocess(image, how)[0], expected)


def test_every_interpolation_differs():
    image = Image.fromarray(noise(50, 60))
    seen = [
        preprocess(image, Preprocessing(size=32, resize=37, interpolation=name))
        for name in INTERPOLATIONS
    ]
    assert len({batch.tobytes() for batch in seen}) == len(INTERPOLATIONS)


# What may be given --------------------------------------------------------------------------------


def test_one_image_or_a_list(tmp_path):
    array = noise(50, 40)
    image = Image.fromarray(array)
    image.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    path = tmp_path / "x.png"
    forms = [array, mx.array(array), image, path, str(path), data, bytearray(data)]
    forms += [memoryview(data), torch.from_numpy(array)]
    expected = preprocess(array, SMALL)
    assert expected.shape == (1, 32, 32, 3)
    assert expected.dtype == np.float32
    for form in forms:
        np.testing.assert_array_equal(preprocess(form, SMALL), expected)
    for many in (forms, tuple(forms)):
        np.testing.assert_array_equal(
            preprocess(many, SMALL), np.repeat(expected, len(forms), axis=0)
        )


def test_images_of_several_sizes_are_one_batch():
    images = [noise(50, 40), noise(7, 90), noise(32, 32)]
    batch = preprocess(images, SMALL)
    assert batch.shape == (3, 32, 32, 3)
    for image, row in zip(images, batch, strict=True):
        np.testing.assert_array_equal(preprocess(image, SMALL)[0], row)


def test_what_was_given_is_left_alone(tmp_path):
    Image.fromarray(noise(9, 9)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        for _ in range(2):
            preprocess(image, SMALL)
        assert image.size == (9, 9)


NOT_IMAGES = {
    "none": (None, "NoneType is not an image"),
    "a number": (3, "int is not an image"),
    "rows": ([[1, 2], [3, 4]], "list is not an image"),
    "no list": ([], "images is empty"),
    "no tuple": ((), "images is empty"),
    "floats": (np.zeros((4, 4, 3)), "float64: uint8 is needed"),
    "16 bits": (np.zeros((4, 4), np.uint16), "uint16: uint8 is needed"),
    "channels first": (np.zeros((3, 9, 9), np.uint8), r"shape \(3, 9, 9\)"),
    "a batch": (np.zeros((2, 9, 9, 3), np.uint8), r"shape \(2, 9, 9, 3\)"),
    "one axis": (np.zeros(9, np.uint8), r"shape \(9,\)"),
    "no pixels": (np.zeros((0, 9, 3), np.uint8), r"shape \(0, 9, 3\)"),
    "an image of no pixels": (Image.new("RGB", (0, 9)), "0 x 9 pixels"),
    "no bytes": (b"", "not an image"),
    "a page": (b"<html>", "not an image"),
    "no file": ("no such file.png", "no such file.png: not an image"),
    "no path": (Path("no such file.png"), "no such file.png: not an image"),
    "no name": ("nul\0", "not an image"),
    "a folder": (Path(__file__).parent, "tests: not an image"),
    "another file": (__file__, "test_image.py: not an image"),
}


@pytest.mark.parametrize(("image", "message"), NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_what_is_not_an_image_is_a_value_error(image, message):
    with pytest.raises(ValueError, match=message):
        preprocess(image, SMALL)


def test_what_is_not_implemented_is_named():
    for how, message in (
        (Preprocessing(size=8, resize=8, interpolation="hamming"), "interpolation='hamming'"),
        (Preprocessing(size=8, resize=8, mean=(0.5,) * 4), "4 channels"),
    ):
        with pytest.raises(UnsupportedConfig, match=message):
            preprocess(noise(9, 9), how)


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_file_is_named(kind, tmp_path):
    image = Image.fromarray(noise(64, 48))
    data = encoded(image, kind)
    path = tmp_path / "photo"
    path.write_bytes(data)
    preprocess(path, SMALL)
    for length in (len(data) // 2, len(data) // 10, 20, 3, 0):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"photo: not an image that can be read"):
            preprocess([image, path], SMALL)


def chunk(name: bytes, data: bytes) -> bytes:
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def test_a_picture_of_too_many_pixels():
    size = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="not an image that can be read"):
        preprocess(data, SMALL)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it reads all the same
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_a_damaged_file_is_read_or_a_value_error(kind):
    """Whatever its decoder raises."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind == "GIF" else {"exif": exif}
    data = encoded(Image.fromarray(noise(24, 16)), kind, **options)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 200), 3):
            damaged[place] = rng.integers(256)
        try:
            assert preprocess(damaged, SMALL).shape == (1, 32, 32, 3)
        except ValueError:
            refused += 1
    assert refused > 0


def test_files_are_closed(tmp_path):
    """One that is not gives a ResourceWarning, which is an error here; of several frames, too."""
    frames = [Image.fromarray(noise(8, 8)) for _ in range(3)]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        path = tmp_path / kind
        frames[0].save(path, kind, save_all=True, append_images=frames[1:])
        with path.open("rb") as file, Image.open(file) as first:
            expected = preprocess(first.convert("RGB"), SMALL)
        np.testing.assert_array_equal(preprocess(path, SMALL), expected)


# Kinds of pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_turns_the_image(turn, kind, tmp_path):
    upright = np.zeros((4, 4, 3), np.uint8)
    upright[:2, :2] = 255  # a corner: each of the eight turns of it and of the next is another
    upright[:2, 2:] = 128
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(stored.repeat(4, 0).repeat(4, 1)).save(
        tmp_path / "x", kind, exif=exif, **options
    )
    found = pixels(tmp_path / "x", side=16)
    np.testing.assert_array_equal(found, upright.repeat(4, 0).repeat(4, 1))


def test_a_damaged_exif_block_turns_nothing():
    data = encoded(Image.fromarray(noise(8, 8)), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="EXIF"):
        assert pixels(data, side=8).shape == (8, 8, 3)


def test_a_palette():
    image = Image.fromarray(noise(4, 4)).quantize(8)
    expected = np.asarray(image.convert("RGB"))
    for form in (image, encoded(image, "PNG"), encoded(image, "GIF")):
        np.testing.assert_array_equal(pixels(form), expected)
    np.testing.assert_array_equal(
        pixels(image, "L")[..., 0], np.asarray(image.convert("RGB").convert("L"))
    )


@pytest.mark.parametrize("transparency", [bytes([0, 128, 255]), 1])
def test_a_palette_with_transparent_colours(transparency):
    """Pillow warns of it."""
    image = Image.fromarray(noise(4, 4)).quantize(8)
    data = encoded(image, "PNG", transparency=transparency)
    np.testing.assert_array_equal(pixels(data), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped():
    rgba, grey_alpha = noise(4, 4, 4), noise(4, 4, 2)
    for form in (rgba, encoded(Image.fromarray(rgba), "PNG")):
        np.testing.assert_array_equal(pixels(form), rgba[..., :3])
    image = Image.merge("LA", [Image.fromarray(grey_alpha[..., i]) for i in range(2)])
    for form in (image, encoded(image, "PNG")):
        np.testing.assert_array_equal(pixels(form), grey_alpha[..., :1].repeat(3, -1))
        np.testing.assert_array_equal(pixels(form, "L"), grey_alpha[..., :1])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "1", "RGBX"])
def test_other_colours(mode):
    image = Image.fromarray(noise(4, 4)).convert(mode)
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg():
    """Stored inverted, as Adobe's programs do."""
    image = Image.fromarray(noise(16, 16)).convert("CMYK")
    data = encoded(image, "JPEG", quality=100)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(pixels(data, side=16), expected)
    assert np.abs(expected.astype(int) - np.asarray(image.convert("RGB"))).mean() < 12


def test_colours_that_pillow_cannot_convert():
    with pytest.raises(ValueError, match="not an image that can be read"):
        preprocess(Image.new("La", (4, 4)), SMALL)


def test_grey_becomes_rgb_and_rgb_grey():
    grey, colour = noise(4, 4, 1), noise(4, 4)
    for form in (grey, grey[..., 0], Image.fromarray(grey[..., 0])):
        np.testing.assert_array_equal(pixels(form), grey.repeat(3, -1))
        np.testing.assert_array_equal(pixels(form, "L"), grey)
    expected = np.asarray(Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(pixels(colour, "L")[..., 0], expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "an image", "big-endian"])
def test_16_bits_are_scaled(kind):
    """Pillow clips them: all that is brighter than 255 of 65535 would be white."""
    values = np.array([0, 128, 129, 255, 256, 257, 1000, 30_000, 32_767, 32_768, 65_000, 65_535])
    values = np.resize(values, (4, 4)).astype(np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    if kind == "big-endian":
        image = Image.frombytes("I;16B", (4, 4), values.astype(">u2").tobytes())
    elif kind != "an image":
        image = encoded(image, kind)
    expected = (values / 257).round()
    np.testing.assert_array_equal(pixels(image, "L")[..., 0], expected)
    np.testing.assert_array_equal(pixels(image), expected[..., None].repeat(3, -1))


def test_a_16_bit_file_of_8_bit_values_is_the_8_bit_file():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    data = encoded(Image.fromarray(values * 257), "PNG")
    np.testing.assert_array_equal(pixels(data, "L", side=16)[..., 0], values)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bits_have_no_scale(kind):
    image = Image.fromarray(np.ones((4, 4), kind))
    for form in (image, encoded(image, "TIFF")):
        with pytest.raises(ValueError, match="32 bits"):
            preprocess(form, SMALL)
