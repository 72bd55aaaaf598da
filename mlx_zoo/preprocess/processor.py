"""transformers' preprocessor_config.json <-> Preprocessing. Defaults are transformers 5's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_zoo.errors import UnsupportedConfig
from mlx_zoo.preprocess.image import Preprocessing, Size, as_sides

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# What a file that leaves it out means, whatever its class.
DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": 224,
    "default_to_square": True,  # of a size that is one number
    "resample": 3,
    "do_center_crop": False,
    "crop_size": None,
    "crop_pct": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,  # values from -1
    "do_normalize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "include_top": False,  # divides by the deviation a second time
}
CLIP = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
# What sets a class apart: ViTImageProcessor, ...
CLASSES: dict[str, dict[str, Any]] = {
    "ViT": {"resample": 2},
    "Beit": {},
    "DeiT": {"size": 256, "do_center_crop": True, "crop_size": 224},
    "EfficientNet": {"size": 346, "crop_size": 289, "include_top": True},
    "ConvNext": {"size": 384, "default_to_square": False, "crop_pct": 0.875},
    "Bit": CLIP,
    "CLIP": CLIP,
    "Siglip": {"size": {"height": 224, "width": 224}, "default_to_square": False},
}
MODEL_TYPES = {  # of config.json, where the file does not name its class
    "vit": "ViT",
    "deit": "DeiT",
    "efficientnet": "EfficientNet",
    "resnet": "ConvNext",
    "dinov2": "Bit",
}
# What changes no pixel here: every image becomes RGB, and the answer is an array.
IGNORED = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "do_reduce_labels",
    "data_format",
    "return_tensors",
    "disable_grouping",
    "model_valid_processing_keys",
    "_valid_processor_keys",
}


def read_processor(config: Mapping[str, Any], model_type: str | None = None) -> Preprocessing:
    """What the image processor of a repository does.

    Args:
        config: its preprocessor_config.json.
        model_type: of its config.json, which tells the class where the former does not.

    Raises UnsupportedConfig, naming the attribute, for what is not implemented.
    """
    said = {name: x for name, x in config.items() if x is not None}  # null: as by default
    named = str(said.get("image_processor_type", said.get("feature_extractor_type", "")))
    kind = named or MODEL_TYPES.get(model_type or "", "")
    for ending in ("Fast", "ImageProcessor", "FeatureExtractor"):  # of several releases
        kind = kind.removesuffix(ending)
    if kind not in CLASSES:
        raise _unsupported("image_processor_type", named)
    for name in sorted(said.keys() - DEFAULTS.keys() - IGNORED):
        if said[name]:  # a switch that is off asks for nothing
            raise _unsupported(name, said[name])
    values = {**DEFAULTS, **CLASSES[kind], **said}
    if not values["do_resize"]:
        raise _unsupported("do_resize", False)
    if values["resample"] not in RESAMPLE:
        raise _unsupported("resample", values["resample"])
    mean, std = _mean_std(values)
    return Preprocessing(
        **_sizes(values),
        interpolation=RESAMPLE[values["resample"]],
        mean=mean,
        std=std,
        floor_crop=True,
    )


def write_processor(how: Preprocessing) -> dict[str, Any] | None:
    """The inverse of `read_processor`, but for `test_size`; None where no class does this."""
    common = {
        "do_resize": True,
        "resample": next(n for n, name in RESAMPLE.items() if name == how.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }
    crop = {"do_center_crop": True, "crop_size": _height_width(how.size)}
    if how.crop_mode == "center" and isinstance(how.resize, int):
        size = {"shortest_edge": how.resize}
        return {"image_processor_type": "CLIPImageProcessor", "size": size, **crop, **common}
    if how.crop_mode != "squash":
        return None
    size = _height_width(how.resize)
    if how.size == how.resize:
        return {"image_processor_type": "ViTImageProcessor", "size": size, **common}
    return {"image_processor_type": "DeiTImageProcessor", "size": size, **crop, **common}


def _height_width(size: Size) -> dict[str, int]:
    height, width = as_sides(size)
    return {"height": height, "width": width}


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """size, resize and crop_mode."""
    size = values["size"]
    if isinstance(size, int) and not values["default_to_square"]:
        size = {"shortest_edge": size}
    if isinstance(size, Mapping) and size.keys() == {"shortest_edge"}:
        edge, crop = size["shortest_edge"], values["crop_size"]
        if values["crop_pct"]:  # ConvNext's way, which ResNet follows: it has a crop of its own
            if values["do_center_crop"]:
                raise _unsupported("do_center_crop", True)
            if edge >= 384:
                return {"size": edge, "resize": edge, "crop_mode": "squash"}
            return {"size": edge, "resize": int(edge / values["crop_pct"])}
        if not values["do_center_crop"]:  # every image would have its own size
            raise _unsupported("size", size)
        return {"size": _pair("crop_size", crop), "resize": edge}
    resize = _pair("size", size)
    crop = _pair("crop_size", values["crop_size"]) if values["do_center_crop"] else resize
    return {"size": crop, "resize": resize, "crop_mode": "squash"}


def _pair(name: str, size: Any) -> Size:
    """Of a number, of [H, W], or of {"height": H, "width": W}. UnsupportedConfig for the rest."""
    if isinstance(size, list) and len(size) == 2:
        size = dict(zip(("height", "width"), size, strict=True))
    if isinstance(size, int):
        return size
    if not isinstance(size, Mapping) or size.keys() != {"height", "width"}:
        raise _unsupported(name, size)
    height, width = size["height"], size["width"]
    return height if height == width else (height, width)


def _mean_std(values: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of values in [0, 1], to which all that is done to them after cropping comes down."""
    mean, std = (
        tuple(x) if isinstance(x, (list, tuple)) else (x,) * 3
        for x in (values["image_mean"], values["image_std"])
    )
    again = std if values["include_top"] else (1,) * len(std)
    if not values["do_normalize"]:
        mean, std = (0,) * len(mean), (1,) * len(std)
    scale = 255 * values["rescale_factor"] if values["do_rescale"] else 255
    offset = 1 if values["do_rescale"] and values["rescale_offset"] else 0
    return (
        tuple((offset + x) / scale for x in mean),
        tuple(x * y / scale for x, y in zip(std, again, strict=True)),
    )


def _unsupported(name: str, value: Any) -> UnsupportedConfig:
    return UnsupportedConfig(f"{name}={value!r} in preprocessor_config.json is not implemented")
