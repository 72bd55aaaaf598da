"""The PyTorch originals. The only module that imports torch and the libraries built on it."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_zoo.catalogue import Checkpoint, Reference
from mlx_zoo.errors import CheckpointError, MissingDependency, VerificationError

Arrays = dict[str, np.ndarray]


def is_installed(library: str) -> bool:
    """Whether torch and the library of an original can be imported."""
    return all(importlib.util.find_spec(name) for name in ("torch", library))


def build(checkpoint: Checkpoint, config: Any, files: Mapping[str, Path], weights: Sequence[Path]):
    """The original network with its weights, in eval mode, in float32.

    Args:
        config: ours, which says the task, the number of classes and of input channels.
        files: name in the repository -> local path.
        weights: those of them that hold the weights.

    Raises:
        VerificationError: the original itself does not take these weights.
    """
    reference = checkpoint.reference
    assert reference is not None
    if reference.library == "transformers":
        model = _transformers(checkpoint, config, files)
    else:
        model = _filled(create(reference, config), config, weights)
    return model.eval().float()


def create(reference: Reference, config: Any):
    """torchvision's or timm's network for a config of ours, with fresh weights."""
    return {"torchvision": _torchvision, "timm": _timm}[reference.library](reference, config)


def versions(library: str) -> dict[str, str]:
    """Of torch and the library, as installed."""
    return {name: importlib.metadata.version(name) for name in ("torch", library)}


def run(
    model: Any, inputs: Arrays, layers: Iterable[str], precision: str
) -> tuple[Arrays, dict[str, np.ndarray]]:
    """Outputs by name, and what each of `layers` gave, in the order of execution.

    Images (B, H, W, C) are given to the original as it wants them, (B, C, H, W).
    """
    import torch

    dtype = getattr(torch, precision)
    model = copy.deepcopy(model).to(dtype)  # the weights as they were serve for the next
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable:
        def hook(module, args, output):
            seen[name] = _numpy(output)

        return hook

    modules = dict(model.named_modules())
    hooks = [_observe(modules[name], keep(name)) for name in layers]
    try:
        with torch.no_grad():
            if len(inputs) == 1:  # images: every library has its own name for them
                output = model(*(_tensor(x, dtype) for x in inputs.values()))
            else:
                output = model(**{name: _tensor(x, dtype) for name, x in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return _outputs(output), seen


def _observe(module, hook: Callable):
    """Have `hook` called with what a layer gives.

    timm's norms hold the activation that follows: what they give is what goes into it.
    """
    import torch

    act = getattr(module, "act", None)
    norms = (torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.LayerNorm)
    if isinstance(module, norms) and isinstance(act, torch.nn.Module):
        return act.register_forward_pre_hook(lambda module, args: hook(module, args, args[0]))
    return module.register_forward_hook(hook)


def _tensor(x: np.ndarray, dtype):
    import torch

    if x.dtype.kind == "i":
        return torch.from_numpy(x.astype(np.int64))
    if x.ndim == 4:
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return torch.from_numpy(x).to(dtype)


def _numpy(x) -> np.ndarray:
    x = x.detach().clone()  # the original may go on to change it in place
    return (x if x.element_size() >= 4 else x.float()).numpy()  # NumPy has no bfloat16


def _outputs(output) -> Arrays:
    """What a network returns, by the names that ours gives it."""
    if not hasattr(output, "items"):
        return {"output": _numpy(output)}
    arrays = {name: x for name, x in output.items() if hasattr(x, "detach")}
    if "sentence_embedding" in arrays:
        return {"output": _numpy(arrays["sentence_embedding"])}
    if "logits" in arrays:
        return {"output": _numpy(arrays["logits"])}
    return {name: _numpy(x) for name, x in arrays.items()}


# The libraries ----------------------------------------------------------------------------------


def import_torchvision():
    """torchvision, also where its compiled operators do not load.

    The wheels on PyPI are built for CUDA. Beside a CPU build of torch their library is skipped, and
    the import fails on two operators that a Python function registers a fake kernel for. Declaring
    their schemas is enough: classification networks use neither.
    """
    import torch

    try:
        torch.ops.torchvision.nms  # noqa: B018
    except AttributeError:
        spec = importlib.util.find_spec("torchvision")
        compiled = spec and spec.origin and list(Path(spec.origin).parent.glob("_C*"))
        if compiled and torch.version.cuda is None:
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)  # the schemas live as long as it
    import torchvision

    return torchvision


_kept: list[Any] = []


def _torchvision(reference: Reference, config: Any):
    torchvision = import_torchvision()
    if config.in_chans != 3:
        raise VerificationError(f"torchvision's networks take 3 channels, not {config.in_chans}")
    options = {"num_classes": config.num_classes or 1, **reference.options}
    if hasattr(config, "img_size"):
        options.setdefault("image_size", config.img_size)
    return torchvision.models.get_model(reference.name, weights=None, **options)


def _timm(reference: Reference, config: Any):
    import_torchvision()
    import timm

    options = {
        "num_classes": config.num_classes or 1,
        "in_chans": config.in_chans,
        **reference.options,
    }
    if hasattr(config, "img_size"):
        options.setdefault("img_size", config.img_size)
    if reference.name == "EfficientNet":
        return _timm_efficientnet(**options)
    return timm.create_model(reference.name, pretrained=False, **options)


def _timm_efficientnet(stages: Sequence[str], bn_eps: float, **options: Any):
    """timm's EfficientNet of any stages, in its own notation; create_model has only its own."""
    from functools import partial

    import torch
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    norm = partial(torch.nn.BatchNorm2d, eps=bn_eps)
    return EfficientNet(decode_arch_def([[stage] for stage in stages]), norm_layer=norm, **options)


def _filled(model, config: Any, weights: Sequence[Path]):
    """The original with the published tensors: all of them, but for a head that is left out."""
    state = _state_dict(weights)
    unused = _take_heads(model) if config.num_classes == 0 else []
    if getattr(model, "attn_pool", "") is None:  # timm leaves it out as well, where it averages
        unused.append("attn_pool")
    state = {
        name: x
        for name, x in state.items()
        if not name.startswith(tuple(f"{layer}." for layer in unused))
    }
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise VerificationError(f"the original does not take these weights: {error}") from error
    return model


def _take_heads(model) -> list[str]:
    """Replace the last linear layer, and any twin beside it, by the identity. Their names."""
    from torch import nn

    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    *_, last = linear
    heads = [
        name
        for name, m in linear.items()
        if name.rpartition(".")[0] == last.rpartition(".")[0]
        and m.weight.shape == linear[last].weight.shape
    ]
    for name in heads:
        model.set_submodule(name, nn.Identity())
    return heads


def _transformers(checkpoint: Checkpoint, config: Any, files: Mapping[str, Path]):
    """The class of transformers for our task, by its own loader, which must want for nothing."""
    import_torchvision()
    import transformers

    from mlx_zoo import registry

    transformers.utils.logging.disable_progress_bar()

    if "config.json" not in files:
        raise VerificationError(
            f"the original of {checkpoint.name} needs its config.json, which a bare file lacks: "
            "put both into a folder and load local-dir:folder"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            link = Path(folder, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(path).resolve())
        if getattr(config, "task", None) == "sentence-embedding":
            return _sentence_transformer(folder)
        classes = registry.architectures()[checkpoint.architecture].classes
        task = getattr(config, "task", "image-classification")  # a body is that without its head
        own = transformers.AutoConfig.from_pretrained(folder)
        fitting = [
            name
            for name, its_task in classes.items()
            if its_task == task
            and getattr(transformers, name).config_class.model_type == own.model_type
        ]
        name = next((name for name in own.architectures or () if name in fitting), fitting[0])
        bare = task is None and hasattr(config, "pooler")
        options = {"add_pooling_layer": config.pooler} if bare else {}
        model, loading = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", **options
        )
    model.config.pad_token_id = 0  # that of compare.random_inputs
    for module in model.modules():
        if getattr(module, "reorder_and_upcast_attn", False):  # the same, but refuses float64
            module.reorder_and_upcast_attn = False
    missing = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if config.num_classes == 0:
        heads = tuple(f"{head}." for head in _take_heads(model))
        missing = [name for name in missing if not str(name).startswith(heads)]
    if missing:
        raise VerificationError(
            f"{name} itself finds no weights for {', '.join(map(str, missing))}"
        )
    return model


def _sentence_transformer(folder: str):
    if not is_installed("sentence_transformers"):
        raise MissingDependency(
            "the original of a sentence embedding is sentence-transformers: "
            "pip install sentence-transformers"
        )
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        folder, device="cpu", model_kwargs={"attn_implementation": "eager", "dtype": torch.float32}
    )

    class Embedder(torch.nn.Module):
        """Takes a network's arguments, where SentenceTransformer takes one dictionary."""

        def __init__(self):
            super().__init__()
            self.original = model

        def forward(self, **inputs):
            return self.original(dict(inputs))

    return Embedder()


# Images -----------------------------------------------------------------------------------------


def transform_of(
    checkpoint: Checkpoint, files: Mapping[str, Path]
) -> tuple[str, Callable[[Any], np.ndarray]]:
    """The publisher's way from a Pillow image to a normalised array (H, W, C), after its name.

    torchvision and timm keep one for each checkpoint, transformers builds one from `files`
    (name -> path: preprocessor_config.json, config.json). Of a checkpoint that its library does not
    know, it is torchvision's, set as the checkpoint says.

    Raises MissingDependency; VerificationError where there is no such way.
    """
    library = checkpoint.reference.library if checkpoint.reference else "torchvision"
    if not (is_installed(library) and is_installed("torchvision")):
        raise MissingDependency(
            f"the images of {checkpoint.name} as published need torch, torchvision and {library}: "
            'pip install "mlx-zoo[torch]"'
        )
    if "preprocessor_config.json" in files:
        return _transformers_transform(files)
    own = {"torchvision": _torchvision_transform, "timm": _timm_transform}.get(library)
    name, transform = (own and own(checkpoint)) or _same_transform(checkpoint)
    return name, lambda image: transform(image).permute(1, 2, 0).numpy()


def _torchvision_transform(checkpoint: Checkpoint):
    models = import_torchvision().models
    variant, _, tag = checkpoint.name.partition(".")
    if variant not in models.list_models():
        return None
    weights = models.get_model_weights(variant)
    if tag.upper() not in weights.__members__:
        return None
    return f"torchvision's {weights.__name__}.{tag.upper()}", weights[tag.upper()].transforms()


def _timm_transform(checkpoint: Checkpoint):
    import_torchvision()
    import timm

    name = checkpoint.name.rpartition("/")[2]  # of a repository
    if not timm.is_model_pretrained(name):
        return None
    published = timm.models.get_pretrained_cfg(name)
    assert published is not None
    settings = timm.data.resolve_data_config(pretrained_cfg=published.to_dict())
    return f"timm's {name}", timm.data.create_transform(**settings)


def _transformers_transform(files: Mapping[str, Path]):
    """On Pillow: the other backend resizes with torch, a grey level apart here and there."""
    import_torchvision()
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            Path(folder, name).symlink_to(Path(path).resolve())
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def transform(image) -> np.ndarray:
        return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)

    return f"transformers' {type(processor).__name__}", transform


def _same_transform(checkpoint: Checkpoint):
    transforms = import_torchvision().transforms
    how = checkpoint.preprocessing
    if how is None or how.crop_mode == "border" or not isinstance(how.size, int):
        raise VerificationError(f"no transform is published for the images of {checkpoint.name}")
    resize = how.resize
    if how.crop_mode == "squash" and isinstance(resize, int):
        resize = (resize, resize)
    steps = [
        transforms.Resize(resize, transforms.InterpolationMode(how.interpolation)),
        transforms.CenterCrop(how.size),
        transforms.ToTensor(),
        transforms.Normalize(how.mean, how.std),
    ]
    return "torchvision's transforms, set as the checkpoint says", transforms.Compose(steps)


def _state_dict(weights: Sequence[Path]) -> dict[str, Any]:
    """The published tensors, read by PyTorch's and safetensors' own readers, not by ours."""
    import torch

    from mlx_zoo.hub.torch_checkpoint import WRAPPERS, strip_prefixes

    state: dict[str, Any] = {}
    for path in weights:
        with path.open("rb") as file:
            is_pickle = file.read(2) in (b"PK", b"\x80\x02")
        if is_pickle:
            tree = torch.load(path, map_location="cpu", weights_only=True)
            state |= next((tree[key] for key in WRAPPERS if isinstance(tree.get(key), dict)), tree)
        else:
            from safetensors.torch import load_file

            state |= load_file(path)
    if not state:
        raise CheckpointError(f"no tensors in {', '.join(map(str, weights))}")
    return strip_prefixes(state)
