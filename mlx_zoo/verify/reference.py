"""The PyTorch originals. The only module that imports torch and the libraries built on it."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_zoo.catalogue import Checkpoint, Reference
from mlx_zoo.errors import CheckpointError, MissingDependency, MLXZooError, VerificationError
from mlx_zoo.verify.replaced import replaced

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
    import torch

    reference = checkpoint.reference
    assert reference is not None
    try:
        # Fresh weights are drawn: the caller's numbers stay.
        with torch.random.fork_rng(devices=()):
            if reference.library == "transformers":
                model = _transformers(checkpoint, config, files)
            else:
                model = _filled(create(reference, config), config, weights)
        return model.eval().float()
    except (MLXZooError, ImportError, MemoryError):
        raise
    except Exception as error:  # whatever the library makes of a config that a stranger wrote
        kind, *said = type(error).__name__, *str(error).splitlines()[:1]
        raise VerificationError(
            f"{reference.library} cannot build {checkpoint.name}: {': '.join((kind, *said))}"
        ) from error


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


def gradients(
    model: Any,
    inputs: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
    precision: str,
    batch_statistics: bool = True,
) -> Arrays:
    """The gradients by the original's names, of the loss that `mlx_zoo.verify.gradients` defines.

    That of images is called as they are in `inputs`, and (B, H, W, C). Nothing is dropped out.
    """
    import torch
    from torch.nn import functional as F
    from torch.nn.modules.batchnorm import _BatchNorm

    dtype = getattr(torch, precision)
    model = copy.deepcopy(model).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(batch_statistics)
    given = {name: _tensor(x, dtype) for name, x in inputs.items()}
    images = {name: x.requires_grad_() for name, x in given.items() if x.ndim == 4}
    with _real_float64():
        output = model(*given.values()) if images else model(**given)
    answers = _named(output)
    losses = [
        F.cross_entropy(answers[name].flatten(0, -2), torch.from_numpy(target).long().flatten())
        for name, target in targets.items()
    ]
    torch.stack(losses).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: x.grad.permute(0, 2, 3, 1) for name, x in images.items()}
    return {name: _numpy(x) for name, x in found.items()}


def _real_float64() -> AbstractContextManager[None]:
    """For a while, a softmax in float64 stays in it: transformers casts attention's to float32."""
    import torch
    from torch.nn import functional as F

    own = F.softmax

    def softmax(x, dim=None, _stacklevel=3, dtype=None):
        return own(x, dim, _stacklevel, None if x.dtype == torch.float64 else dtype)

    return replaced([(F, "softmax", softmax)])


def table(model: Any, name: str, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """The weights of an embedding of the original, in the precision and in float64."""
    import torch

    weight = model.get_submodule(name).weight
    return _numpy(weight.to(getattr(torch, precision))), _numpy(weight.double())


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
    return {name: _numpy(x) for name, x in _named(output).items()}


def _named(output) -> dict[str, Any]:
    """As `_outputs`, still the tensors."""
    if not hasattr(output, "items"):
        return {"output": output}
    tensors = {name: x for name, x in output.items() if hasattr(x, "detach")}
    for name in ("sentence_embedding", "logits"):
        if name in tensors:
            return {"output": tensors[name]}
    return tensors


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

    if "config.json" not in files:
        raise VerificationError(
            f"the original of {checkpoint.name} needs its config.json, which a bare file lacks: "
            "put both into a folder and load local-dir:folder"
        )
    with tempfile.TemporaryDirectory() as folder, _quiet(transformers.utils.logging):
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


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' bars, and its lists of the tensors that another head would take."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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

    from mlx_zoo.hub.checkpoint import is_safetensors
    from mlx_zoo.hub.torch_checkpoint import WRAPPERS, strip_prefixes

    state: dict[str, Any] = {}
    for path in weights:
        if is_safetensors(path):
            from safetensors.torch import load_file

            state |= load_file(path)
        else:
            tree = torch.load(path, map_location="cpu", weights_only=True)
            state |= next((tree[key] for key in WRAPPERS if isinstance(tree.get(key), dict)), tree)
    if not state:
        raise CheckpointError(f"no tensors in {', '.join(map(str, weights))}")
    return strip_prefixes(state)


# Operations -------------------------------------------------------------------------------------


def operate(
    name: str,
    inputs: Sequence[np.ndarray],
    parameters: Mapping[str, Any],
    precision: str,
    cotangents: Sequence[np.ndarray] = (),
    wanted: Sequence[int] = (),
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What PyTorch's operation of that name gives, and the gradients of the `wanted` inputs.

    Arrays are in MLX's layout, images (B, H, W, C), on both ways. Floats are computed with in
    `precision`. `cotangents` are one for each output.
    """
    import torch

    dtype = getattr(torch, precision)
    tensors = [
        torch.from_numpy(np.array(x)).to(dtype) if x.dtype.kind == "f" else torch.from_numpy(x)
        for x in inputs
    ]
    for i in wanted:
        tensors[i].requires_grad_(True)
    outputs = _operations()[name](*tensors, **parameters)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients: Sequence[Any] = ()
    if wanted:
        roots = [i for i, x in enumerate(outputs) if x.requires_grad]
        gradients = torch.autograd.grad(
            [outputs[i] for i in roots],
            [tensors[i] for i in wanted],
            [torch.from_numpy(cotangents[i]).to(dtype) for i in roots],
            materialize_grads=True,
        )
    return [_numpy(x) for x in outputs], [_numpy(x) for x in gradients]


@functools.cache
def _operations() -> dict[str, Callable]:
    """By the names of `mlx_zoo.verify.operations`, with MLX's layouts and argument names."""
    import torch
    from torch.nn import functional as F

    def inner(x):  # (B, ..., C) -> (B, C, ...)
        return x.movedim(-1, 1)

    def outer(x):
        return x.movedim(1, -1)

    def conv(function):
        return lambda x, w, b=None, **how: outer(function(inner(x), inner(w), b, **how))

    def conv_transpose(function):
        return lambda x, w, **how: outer(function(inner(x), w.movedim(-1, 0), **how))

    def mean_edge(x):
        options = {"ceil_mode": True, "count_include_pad": False}
        return outer(F.avg_pool2d(inner(x), 2, 2, **options))

    def batch_norm(x, mean, var, w, b, *, eps):
        return outer(F.batch_norm(inner(x), mean, var, w, b, eps=eps))

    def batch_norm_training(x, mean, var, w, b, *, eps, momentum):
        mean, var = mean.detach().clone(), var.detach().clone()
        y = F.batch_norm(inner(x), mean, var, w, b, True, momentum, eps)
        return outer(y), mean, var

    def attention(q, k, v, mask=None, *, scale, causal=False):
        if causal:
            N, length = q.shape[2], k.shape[2]
            mask = torch.ones(N, length, dtype=torch.bool).tril(length - N)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)

    def arg_first(x, axis):
        return torch.sort(x, dim=axis, descending=True, stable=True).indices.select(axis, 0)

    def put(x, indices, values, *, axis):
        return torch.scatter(x, axis, indices.long(), values.expand(indices.shape))

    def update(x, y, *, start, stop):
        x = x.clone()
        x[:, :, start:stop] = y
        return x

    def pad(x, *, widths, mode="constant", value=0.0):
        pairs = [side for pair in reversed(widths) for side in pair]
        if mode == "constant":
            return F.pad(x, pairs, value=value)
        index = [
            torch.arange(-before, size + after).clamp(0, size - 1)
            for (before, after), size in zip(widths, x.shape, strict=True)
        ]
        return x[torch.meshgrid(*index, indexing="ij")]

    def cast(x, *, dtype):
        return x.to(getattr(torch, dtype))

    def resample(x, *, size):  # (H, W, D)
        y = F.interpolate(x.movedim(-1, 0)[None], size, mode="bicubic", antialias=True)
        return y[0].movedim(0, -1)

    def unpacked(packed, scales, biases, *, bits, group_size):
        """Codes lie bit after bit, the lowest first, each group with its scale and offset."""
        shifts = torch.arange(32)
        stream = (packed.long()[..., None] >> shifts & 1).flatten(-2)
        codes = (stream.unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)
        codes = codes.to(scales.dtype).unflatten(-1, (-1, group_size))
        return (codes * scales[..., None] + biases[..., None]).flatten(-2)

    def quantized_matmul(x, packed, scales, biases, *, transpose=True, **how):
        w = unpacked(packed, scales, biases, **how)
        return x @ (w.mT if transpose else w)

    def softplus(x):
        return torch.logaddexp(x, torch.zeros_like(x))

    normal = torch.distributions.Normal(0, 1)
    return {
        "conv1d": conv(F.conv1d),
        "conv2d": conv(F.conv2d),
        "Conv2d": conv(F.conv2d),
        "conv_transpose1d": conv_transpose(F.conv_transpose1d),
        "conv_transpose2d": conv_transpose(F.conv_transpose2d),
        "MaxPool2d": lambda x, **how: outer(F.max_pool2d(inner(x), **how)),
        "AvgPool2d": lambda x, **how: outer(F.avg_pool2d(inner(x), **how)),
        "mean of odd edges": mean_edge,
        "BatchNorm": batch_norm,
        "BatchNorm in training": batch_norm_training,
        "LayerNorm": lambda x, w, b, *, eps: F.layer_norm(x, x.shape[-1:], w, b, eps),
        "GroupNorm": lambda x, w, b, *, groups, eps: outer(
            F.group_norm(inner(x), groups, w, b, eps)
        ),
        "linalg.norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
        "exp": torch.exp,
        "erf": torch.erf,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "sqrt": torch.sqrt,
        "logaddexp": torch.logaddexp,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "relu6": F.relu6,
        "leaky_relu": F.leaky_relu,
        "silu": F.silu,
        "mish": F.mish,
        "hardswish": F.hardswish,
        "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5))),
        "sqrtsoftplus": lambda x: softplus(x).sqrt(),
        "softmax": lambda x, mask=None, *, axis=-1: (x if mask is None else x + mask).softmax(axis),
        "softmax of hidden rows": lambda x, mask: (x + mask).softmax(-1).sum(-1),
        "logsumexp": lambda x: torch.logsumexp(x, -1),
        "attention": attention,
        "Embedding": lambda w, ids: F.embedding(ids.long(), w),
        "Embedding.as_linear": lambda w, x: x @ w.T,
        "take": lambda x, ids, *, axis: x.index_select(axis, ids.long()),
        "take_along_axis": lambda x, ids, *, axis: torch.take_along_dim(x, ids.long(), axis),
        "put_along_axis": put,
        "x[rows, columns]": lambda x, rows, columns: x[rows.long(), columns.long()],
        "argmax": lambda x, *, axis=-1: arg_first(x, axis),
        "argmax of a mask": lambda x, *, axis=-1: arg_first((x != 0).int(), axis),
        "argsort": lambda x: torch.argsort(x, dim=-1, stable=True),
        "topk": lambda x, *, k: torch.sort(x, -1).values[..., -k:],
        "argpartition": lambda x, *, k: torch.sort(x, -1).values[..., k:],
        "cumsum": lambda x, *, axis: torch.cumsum(x, axis).to(x.dtype),
        "matmul": torch.matmul,
        "addmm": torch.addmm,
        "Linear": F.linear,
        "einsum": lambda *xs, subscripts: torch.einsum(subscripts, *xs),
        "tensordot": lambda x, y, *, axes: torch.tensordot(x, y, axes),
        "inner products": lambda x, y, *, scale: scale * x @ y.mT,
        "mean": lambda x, *, axis: x.mean(axis),
        "spatial_mean": lambda x: x.mean((1, 2), keepdim=True),
        "sum": lambda x, *, axis: x.sum(axis).to(x.dtype),
        "var": lambda x, *, axis: x.var(axis, correction=0),
        "max": lambda x, *, axis=-1: torch.amax(x, axis),
        "min": lambda x, *, axis=-1: torch.amin(x, axis),
        "bicubic": resample,
        "add": torch.add,
        "subtract": torch.subtract,
        "multiply": torch.multiply,
        "divide": torch.divide,
        "maximum": torch.maximum,
        "abs": torch.abs,
        "square": torch.square,
        "clip": lambda x, *, low, high: x.clamp(low, high),
        "where": lambda x, y, condition: torch.where(condition, x, y),
        "compare": lambda x, y: (x < y, x <= y, x == y, x != y, x >= y, x > y),
        "logic": lambda x, y: (x & y, x | y, ~x),
        "arithmetic of integers": lambda x, y: (x + y, x - y, x * y),
        "remainders": lambda x, y: (x // y, x % y),
        "astype": cast,
        "concatenate": lambda *xs, axis: torch.cat(xs, axis),
        "stack": lambda *xs, axis: torch.stack(xs, axis),
        "split": lambda x, *, parts: x.tensor_split(parts, -1),
        "pad": pad,
        "reshape": lambda x, *, shape: x.reshape(shape),
        "flatten, unflatten": lambda x: x.flatten(1, 2).unflatten(1, x.shape[1:3]),
        "transpose": lambda x, *, axes: x.permute(axes),
        "heads": lambda x, *, heads: x.unflatten(-1, (heads, -1)).swapaxes(1, 2),
        "broadcast_to": lambda x, *, shape: x.expand(shape),
        "slices": lambda x: (x[:, 1::2], x[:, 1:-1, None], torch.flip(x, (1,)), x[..., -1]),
        "x[:, :, a:b] = y": update,
        "arange": lambda *, start, stop, step: torch.arange(start, stop, step),
        "tri": lambda *, rows, columns, k: torch.ones(rows, columns, dtype=torch.bool).tril(k),
        "constants": lambda x: (torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 0.1)),
        "categorical": lambda x, **how: x.softmax(-1),
        "bernoulli": lambda x, **how: x,
        "normal": lambda x, **how: normal.cdf(x[1:]) - normal.cdf(x[:-1]),
        "Dropout": lambda x, **how: torch.cat((x, 1 - x)),
        "the same key": lambda x: torch.tensor([True, False]),
        "dequantize": unpacked,
        "quantize": lambda w, **how: w,
        "quantized_matmul": quantized_matmul,
    }
