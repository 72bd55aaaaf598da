"""Images against torchvision's own transforms, pixel for pixel, and files of every kind."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx

from mlx_zoo import registry
from mlx_zoo.catalogue import Checkpoint, Preprocessing, Reference, config_from
from mlx_zoo.errors import UnsupportedConfig, VerificationError
from mlx_zoo.preprocess import image as image_module
from mlx_zoo.preprocess.image import CROP_MODES, INTERPOLATIONS, preprocess
from mlx_zoo.preprocess.processor import read_processor
from mlx_zoo.verify.preprocessing import compare_preprocessing, random_images
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402

transforms = torchvision.transforms

RNG = np.random.default_rng(0)
SMALL = Preprocessing(size=32, resize=37)
# Nothing is resized, cropped or scaled but by 255.
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
GREY = {"mean": (0.0,), "std": (1.0,)}


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


PICTURES = [noise(110, 80), noise(59, 93)]


def as_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array)


def hw(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


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

SIDES = (1, 7, 31, 32, 33, 110, 224, 225, 333)
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
            if max(width, height) > 15 * min(width, height):
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


def test_every_weights_entry_of_torchvision():
    """39 of them: of the settings in our catalogue, and those of torchvision itself."""
    entries = [
        (weights, f"{variant}.{weights.name.lower()}")
        for variant in torchvision.models.list_models(torchvision.models)
        if registry.family(variant)
        for weights in torchvision.models.get_model_weights(variant)
    ]
    assert len(entries) == 39
    seen = set()
    for weights, name in entries:
        checkpoint, recipe = registry.checkpoints()[name], weights.transforms()
        how = checkpoint.preprocessing
        key = (how, str(recipe))
        if key not in seen:
            seen.add(key)
            found = compare_preprocessing(checkpoint, PICTURES)
            assert found.reference == f"torchvision's {weights}"
            assert found.max_abs == 0, found


def timm_s(checkpoint, **options):
    """timm's own settings of a checkpoint."""
    published = timm.models.get_pretrained_cfg(checkpoint.name).to_dict()
    return timm.data.resolve_data_config(pretrained_cfg=published, **options)


def test_every_setting_of_timm_s_checkpoints():
    seen = set()
    for checkpoint in registry.checkpoints().values():
        if checkpoint.reference is None or checkpoint.dialect != "timm":
            continue
        if not timm.is_model_pretrained(checkpoint.name):  # what ships with the package
            continue
        how, settings = checkpoint.preprocessing, timm_s(checkpoint)
        key = (how, str(settings))
        if key in seen:
            continue
        seen.add(key)
        assert settings["input_size"] == (len(how.mean), *hw(how.size)), checkpoint.name
        found = compare_preprocessing(checkpoint, PICTURES[:1])
        assert found.reference == f"timm's {checkpoint.name}"
        assert found.max_abs == 0, found
        larger = timm_s(checkpoint, use_test_size=True)
        assert (larger["input_size"] != settings["input_size"]) == (how.test_size is not None)
        if how.test_size:
            expected = timm.data.create_transform(**larger)(as_image(PICTURES[0]))
            batch = preprocess(PICTURES[0], how.at(how.test_size))
            np.testing.assert_array_equal(batch[0], expected.permute(1, 2, 0).numpy())
    assert len(seen) > 90


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("size", [32, 33, (32, 48), (47, 32)])
def test_crop_modes_are_timm_s(crop_mode, size):
    for crop_pct in (1.0, 0.9):
        for interpolation in ("bicubic", "bilinear"):
            transform = timm.data.create_transform(
                (3, *hw(size)), crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation
            )
            resize = tuple(math.floor(side / crop_pct) for side in hw(size))
            how = Preprocessing(size, resize, interpolation, crop_mode=crop_mode)
            for width, height in ((1, 1), (32, 32), (110, 220), (97, 64), (31, 30), (7, 3)):
                image = as_image(noise(width, height))
                np.testing.assert_array_equal(
                    preprocess(image, how)[0],
                    transform(image).permute(1, 2, 0).numpy(),
                    err_msg=f"{width} x {height}, {how}",
                )


def test_crop_modes_differ():
    seen = [preprocess(PICTURES[0], replace(SMALL, crop_mode=mode)) for mode in CROP_MODES]
    assert len({batch.tobytes() for batch in seen}) == len(CROP_MODES)


# What transformers does ---------------------------------------------------------------------------

# As files on the hub are: of every release, with and without a class, the rest left to defaults.
STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "vit": ("vit", {"do_normalize": True, "do_resize": True, "size": 224}),
    "vit 384": ("vit", {"feature_extractor_type": "ViTFeatureExtractor", "size": 384}),
    "dino": ("vit", {"image_processor_type": "ViTImageProcessor", "resample": 3, **STATISTICS}),
    "fast": ("vit", {"image_processor_type": "ViTImageProcessorFast", "crop_pct": None}),
    "wide": ("vit", {"size": {"height": 48, "width": 96}, "resample": 1}),
    "cropped": ("vit", {"size": 64, "do_center_crop": True, "crop_size": [48, 32]}),
    "siglip": ("vit", {"image_processor_type": "SiglipImageProcessor"}),
    "deit": ("deit", {"do_center_crop": True, "crop_size": 224, "size": 256, **STATISTICS}),
    "deit's own": ("deit", {"image_processor_type": "DeiTImageProcessor"}),
    "dinov2": (
        "vit",
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, **STATISTICS},
    ),
    "clip": (
        "vit",
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 99, "crop_size": 96},
    ),
    "padded": ("vit", {"image_processor_type": "CLIPImageProcessor", "size": 95, "crop_size": 120}),
    "resnet": ("resnet", {"size": 224, "crop_pct": 0.875, "resample": 3, **STATISTICS}),
    "resnet odd": ("resnet", {"size": 98, "crop_pct": 0.95, "resample": 2}),
    "resnet 384": ("resnet", {"size": {"shortest_edge": 384}}),
    "efficientnet": (
        "efficientnet",
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "crop_size": {"height": 289, "width": 289},
            "do_center_crop": False,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.47853944, 0.4732864, 0.47434163],
            "include_top": True,
            "resample": 0,
            "rescale_offset": False,
            "size": {"height": 224, "width": 224},
        },
    ),
    "efficientnet's own": ("efficientnet", {}),
    "offset": (
        "efficientnet",
        {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False, "size": 64},
    ),
    "once": ("efficientnet", {"do_normalize": False, "include_top": True, "size": 64}),
    "not normalised": ("vit", {"do_normalize": False, "size": 64}),
    "not scaled": ("vit", {"do_rescale": False, "image_mean": [120, 115, 100], "size": 64}),
    "scaled": ("vit", {"rescale_factor": 0.01, "size": 64}),
    "one number": ("vit", {"image_mean": 0.4, "image_std": 0.2, "size": 64}),
}


def saved_processor(folder: Path, model_type: str, said: dict) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return Checkpoint(
        name="saved",
        architecture={"deit": "vit"}.get(model_type, model_type),
        config=None,
        source=f"local-dir:{folder}",
        reference=Reference("transformers"),
        preprocessing=read_processor(said, model_type),
    )


@pytest.mark.parametrize(("model_type", "said"), PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_are_transformers_s(model_type, said, tmp_path):
    """But for the rounding of float32, which does the steps after cropping one by one."""
    checkpoint = saved_processor(tmp_path, model_type, said)
    found = compare_preprocessing(checkpoint, PICTURES)
    assert found.reference.startswith("transformers' ")
    assert found.max_abs < 1e-3, found
    assert found.passed


@pytest.mark.parametrize("name", ["dino", "vit", "deit", "dinov2", "clip", "resnet"])
def test_the_other_backend_of_transformers_is_a_grey_level_apart(name, tmp_path):
    """It resizes with torch. Where it enlarges, one in 100,000 pixels is two apart."""
    checkpoint = saved_processor(tmp_path, *PROCESSORS[name])
    how = checkpoint.preprocessing
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.backend == "torchvision"
    for image in random_images(0):
        expected = processor(as_image(image), return_tensors="np")["pixel_values"][0]
        apart = (preprocess(image, how)[0] - expected.transpose(1, 2, 0)) * how.std * 255
        assert np.abs(apart).max() < 2.01
        assert (np.abs(apart) > 1.01).mean() < 1e-4


REFUSED = {
    "do_resize=False": {"do_resize": False},
    "resample=4": {"resample": 4},
    "do_pad=True": {"do_pad": True},
    "do_flip_channel_order=True": {"do_flip_channel_order": True},
    "size={'shortest_edge': 224}": {"size": {"shortest_edge": 224}},
    "size={'shortest_edge': 2, 'longest_edge': 3}": {
        "size": {"shortest_edge": 2, "longest_edge": 3}
    },
    "size='large'": {"size": "large"},
    "crop_size=None": {"do_center_crop": True},
    "do_center_crop=True": {
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "do_center_crop": True,
    },
    "image_processor_type='LevitImageProcessor'": {"image_processor_type": "LevitImageProcessor"},
    "interpolation": {"resample": "bicubic"},
}


@pytest.mark.parametrize(("message", "said"), REFUSED.items(), ids=REFUSED)
def test_what_a_processor_asks_for_and_is_not_implemented(message, said):
    with pytest.raises(UnsupportedConfig, match="json is not implemented") as e:
        read_processor(said, "vit")
    assert message.replace("interpolation", "resample='bicubic'") in str(e.value)


def test_a_processor_of_no_known_class():
    with pytest.raises(UnsupportedConfig, match="image_processor_type=''"):
        read_processor({"size": 224})


# How far apart ------------------------------------------------------------------------------------


def test_a_difference_is_seen_and_measured():
    checkpoint = registry.find("resnet50.imagenet1k_v2")
    assert compare_preprocessing(checkpoint).passed
    how = checkpoint.preprocessing
    for change in ({"interpolation": "bicubic"}, {"resize": 233}, {"crop_mode": "squash"}):
        found = compare_preprocessing(replace(checkpoint, preprocessing=replace(how, **change)))
        assert not found.passed, change
    brighter = replace(how, mean=tuple(x - 2 / 255 for x in how.mean))
    found = compare_preprocessing(replace(checkpoint, preprocessing=brighter))
    assert found.max_abs == pytest.approx(2, abs=1e-3)
    assert found.mean_abs == pytest.approx(2, abs=1e-3)


def test_a_checkpoint_that_no_library_knows():
    found = compare_preprocessing(registry.find("resnet-digits"), [noise(9, 7), noise(40, 50)])
    assert (found.max_abs, found.num_images) == (0, 2)
    assert found.reference == "torchvision's transforms, set as the checkpoint says"
    with pytest.raises(VerificationError, match="does not say"):
        compare_preprocessing(replace(registry.find("resnet18"), preprocessing=None))
    border = replace(SMALL, crop_mode="border")
    nameless = Checkpoint("x", "resnet", None, "", preprocessing=border)
    with pytest.raises(VerificationError, match="no transform is published"):
        compare_preprocessing(nameless)


def test_random_images_are_seeded():
    assert all(map(np.array_equal, random_images(3), random_images(3)))
    assert not np.array_equal(random_images(3)[0], random_images(4)[0])


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


def test_floats_are_rounded_to_8_bits():
    array = noise(50, 40)
    expected = preprocess(array, SMALL)
    for kind in (np.float64, np.float32):
        scaled = (array / 255).astype(kind)
        for form in (scaled, torch.from_numpy(scaled), mx.array(scaled)):
            np.testing.assert_array_equal(preprocess(form, SMALL), expected)
    coarse = np.rint(array / 255).astype(np.float16)
    np.testing.assert_array_equal(
        preprocess(coarse, SMALL), preprocess(coarse.astype(np.uint8) * 255, SMALL)
    )


def test_a_recipe_is_called():
    """`model.checkpoint.preprocessing(images)` is what the network takes."""
    images = [noise(50, 40), noise(7, 90)]
    batch = SMALL(images)
    assert isinstance(batch, mx.array)
    np.testing.assert_array_equal(batch, preprocess(images, SMALL))


def test_a_recipe_at_another_size():
    how = Preprocessing(size=224, resize=256, test_size=288, test_resize=300)
    assert (how.at(288).size, how.at(288).resize) == (288, 300)
    assert (how.at(112).size, how.at(112).resize) == (112, 128)
    assert (how.at((112, 448)).size, how.at((112, 448)).resize) == ((112, 448), (128, 512))
    assert preprocess(noise(50, 40), how.at((11, 44))).shape == (1, 11, 44, 3)
    assert how.at(224) == how


def test_a_recipe_goes_through_json():
    for how in (SMALL, SMALL.at((24, 40)), replace(SMALL, crop_mode="border", floor_crop=True)):
        assert config_from(Preprocessing, json.loads(json.dumps(asdict(how)))) == how


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
    "floats up to 255": (np.full((4, 4, 3), 255.0), "float64 from 255 to 255: floats are to be"),
    "floats below 0": (np.full((4, 4, 3), -0.5), "float64 from -0.5 to -0.5"),
    "no numbers": (np.full((4, 4, 3), np.nan), "float64 from nan to nan"),
    "bfloat16": (mx.zeros((4, 4, 3), mx.bfloat16), "NumPy cannot read"),
    "an address": ("https://example.com/x.png", "nothing is fetched"),
    "words": (np.array([["a", "b"]]), "uint8 is needed"),
    "16 bits": (np.zeros((4, 4), np.uint16), "uint16: uint8 is needed"),
    "channels first": (np.zeros((3, 9, 9), np.uint8), r"shape \(3, 9, 9\)"),
    "five axes": (np.zeros((1, 2, 9, 9, 3), np.uint8), r"shape \(1, 2, 9, 9, 3\)"),
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
    for option in ("interpolation", "crop_mode"):
        with pytest.raises(UnsupportedConfig, match=f"{option}='other' is not implemented"):
            replace(SMALL, **{option: "other"})
    with pytest.raises(UnsupportedConfig, match="4 channels"):
        preprocess(noise(9, 9), replace(SMALL, mean=(0.5,) * 4, std=(0.5,) * 4))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", 0),
        ("size", 32.0),
        ("size", True),
        ("size", (32,)),
        ("resize", (32, -1)),
        ("resize", None),
        ("test_size", "288"),
        ("mean", (0.5,)),
        ("std", (0.5, 0.5, 0.0)),
        ("std", (0.5, 0.5, float("nan"))),
    ],
)
def test_a_recipe_that_makes_no_sense(option, value):
    with pytest.raises(ValueError, match=f"{option}="):
        replace(SMALL, **{option: value})


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


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (1_000_000, 1), (4000, 3000)])
def test_pictures_of_any_shape(size, crop_mode):
    """Resized as a whole, the line would have 60 thousand million pixels."""
    how = replace(SMALL, crop_mode=crop_mode, size=224, resize=256)
    batch = preprocess(Image.new("RGB", size, (200, 100, 50)), how)
    assert batch.shape == (1, 224, 224, 3)
    seen = batch[0, 111, 111] * how.std + how.mean
    np.testing.assert_allclose(seen * 255, (200, 100, 50), atol=1e-3)


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.resize}-{how.size}")
def test_the_part_that_is_seen_is_the_part_of_the_whole(how, monkeypatch):
    images = [noise(*size) for size in ((110, 220), (97, 64), (31, 30), (1, 9))]
    whole = preprocess(images, how)
    monkeypatch.setattr(image_module, "MAX_RESIZED", 0)
    levels = np.abs(preprocess(images, how) - whole) * how.std * 255
    # Pillow keeps the edges of the part in float32: of two pixels as near, it may take the other.
    if how.interpolation != "nearest":
        assert levels.max() < 8  # a pixel to the side, they would be 200 apart
    assert (levels > 0.5).mean() < 0.15


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


def test_a_batch_in_one_array_is_several_images():
    batch = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    how = Preprocessing(size=16, resize=18)
    np.testing.assert_array_equal(preprocess(batch, how), preprocess(list(batch), how))
