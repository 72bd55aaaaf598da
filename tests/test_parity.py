"""Every entry of the catalogue against its original; every image network with random tensors.

A new architecture is picked up here. SHALLOW may say how its networks are made small, and
`transformers_config` must say how transformers builds them, where it does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module

import mlx.core as mx
import pytest
import torch
from originals import proven, randomise, saved

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.catalogue import Reference
from mlx_zoo.mapping import engine
from mlx_zoo.verify.reference import create, import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402

NETWORKS = {
    c.variant: c
    for c in registry.checkpoints().values()
    if c.default and c.reference and c.reference.library in ("torchvision", "timm")
}


# What the networks compute ----------------------------------------------------------------------

# Blocks of one stage are alike: two of them show what all do. Ours, and the same for the library;
# torchvision's have all their blocks, but may have small images.
SHALLOW = {
    ("timm", "resnet"): lambda c: ({"depths": (2, 1, 1, 1)}, {"layers": (2, 1, 1, 1)}),
    ("timm", "vit"): lambda c: (
        {"num_layers": 2, "img_size": 3 * c.patch_size},
        {"depth": 2, "img_size": 3 * c.patch_size},
    ),
    ("torchvision", "vit"): lambda c: (
        {"img_size": 3 * c.patch_size},
        {"image_size": 3 * c.patch_size},
    ),
}


def shallow(checkpoint):
    """A checkpoint of the same arithmetic with few blocks and small images, where that is known."""
    make = SHALLOW.get((checkpoint.reference.library, checkpoint.architecture))
    if make is None:
        return checkpoint
    ours, theirs = make(checkpoint.config)
    options = {**checkpoint.reference.options, **theirs}
    reference = replace(checkpoint.reference, options=options)
    return replace(checkpoint, config=replace(checkpoint.config, **ours), reference=reference)


def cases():
    """One network for each distinct arithmetic; large ones are slow."""
    seen = {}
    for checkpoint in NETWORKS.values():
        few = shallow(checkpoint)
        seen.setdefault((few.architecture, few.config, few.reference.library), few)
    for few in seen.values():
        model = registry.architectures()[few.architecture].model(few.config)
        marks = pytest.mark.slow if engine.num_parameters(model) > 2e7 else ()
        yield pytest.param(few, id=few.variant, marks=marks)


def prove(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(registry._names(), registry.key(checkpoint.variant), checkpoint)
    original = randomise(create(checkpoint.reference, checkpoint.config))
    path = saved(original, tmp_path / "weights.pth")
    report = proven(mlx_zoo.load(checkpoint.variant, pretrained=path), size=64)
    compared = {row.name for row in report.layers}
    assert len(compared) >= len(_layers_with_weights(original))


def _layers_with_weights(original):
    """What can be compared: attention in one piece gives more than a tensor."""
    return [
        name
        for name, m in original.named_modules()
        if name
        and isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.BatchNorm2d))
        and not name.endswith("self_attention.out_proj")
    ]


@pytest.mark.parametrize("checkpoint", [*cases()])
def test_the_network_is_its_original(checkpoint, tmp_path, monkeypatch):
    prove(checkpoint, tmp_path, monkeypatch)


def whole():
    """The networks that were made shallow above, as they are; of several image sizes, one."""
    seen = {}
    for checkpoint in NETWORKS.values():
        if shallow(checkpoint) != checkpoint and checkpoint.num_params < 1.2e8:
            fields = {k: v for k, v in vars(checkpoint.config).items() if k != "img_size"}
            seen.setdefault((checkpoint.architecture, *fields.items()), checkpoint)
    return list(seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", whole(), ids=lambda c: c.variant)
def test_the_whole_network_is_its_original(checkpoint, tmp_path, monkeypatch):
    prove(checkpoint, tmp_path, monkeypatch)


def test_two_images_get_two_answers(tmp_path):
    original = randomise(torchvision.models.resnet18())
    model = mlx_zoo.load("resnet18", pretrained=saved(original, tmp_path / "weights.pth"))
    one, other = model(mx.random.normal((2, 64, 64, 3)))
    assert mx.abs(one - other).max().item() > 1e-2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "tf_efficientnet_b0"],
)
def test_half_precision_is_close(name, dtype, tmp_path):
    original = randomise(create(NETWORKS[name].reference, NETWORKS[name].config))
    path = saved(original, tmp_path / "weights.pth")
    report = mlx_zoo.verify(name, path, dtype=dtype, size=64)
    assert report.tolerance == 1e-2
    assert report.passed, report.reason


# What is in the catalogue -----------------------------------------------------------------------


@cache
def abstract_original(library, name, options, config):
    """Names and shapes of the original's tensors, without any memory for them."""
    options = dict(options)
    if not config.num_classes:  # its constructors know how to leave the head out
        options["num_classes"] = 0
    with torch.device("meta"):
        model = create(Reference(library, name, options), config)
    shapes = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    return shapes, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(c, id=c.name)
        for c in registry.checkpoints().values()
        if c.reference and c.reference.library in ("torchvision", "timm")
    ],
)
def test_every_image_entry_has_the_tensors_of_its_original(checkpoint):
    """Names, shapes and their published number; nothing is allocated on either side."""
    architecture = registry.architectures()[checkpoint.architecture]
    config, reference = checkpoint.config, checkpoint.reference
    model = architecture.model(config)  # lazy
    options = tuple(sorted(reference.options.items()))
    theirs, count = abstract_original(reference.library, reference.name, options, config)
    spec = architecture.spec(checkpoint.dialect, config)
    ours = {link.source: link.upstream_shape for link in engine.links(model, spec)}
    buffers = {name for name in theirs if name.endswith("num_batches_tracked")}
    assert ours == {name: shape for name, shape in theirs.items() if name not in buffers}
    assert engine.num_parameters(model) == checkpoint.num_params == count


# Width and depth of Google's EfficientNets, by the paper's table.
COEFFICIENTS = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
}


def transformers_config(checkpoint):
    """The config with which transformers builds a network of its own hub."""
    config, family = checkpoint.config, checkpoint.architecture
    if family == "resnet":
        expansion = {"basic": 1, "bottleneck": 4}[config.block]
        widths = [width * expansion for width in config.widths]
        return transformers.ResNetConfig(
            layer_type=config.block, depths=config.depths, hidden_sizes=widths, num_labels=1000
        )
    if family == "efficientnet":
        width, depth = COEFFICIENTS[checkpoint.source.rpartition("-")[2]]
        return transformers.EfficientNetConfig(
            width_coefficient=width,
            depth_coefficient=depth,
            hidden_dim=config.head_width,
            depthwise_padding=list(config.symmetric_blocks),
            batch_norm_eps=config.norm_eps,
            dropout_rate=config.dropout,
            num_labels=1000,
        )
    distilled = getattr(config, "dist_token", False)  # DeiT without it is published as a ViT
    kind = {
        "bert": transformers.BertConfig,
        "gpt2": transformers.GPT2Config,
        "vit": transformers.DeiTConfig if distilled else transformers.ViTConfig,
    }[family]
    attributes = import_module(f"mlx_zoo.specs.{family}").ATTRIBUTES
    options = {theirs: getattr(config, ours) for theirs, ours in attributes.items()}
    labels = {"num_labels": config.num_classes} if config.num_classes else {}
    return kind(**options, **labels)


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(c, id=c.name)
        for c in registry.checkpoints().values()
        if c.reference and c.reference.library == "transformers"
    ],
)
def test_every_entry_of_transformers_has_the_tensors_of_its_original(checkpoint):
    architecture = registry.architectures()[checkpoint.architecture]
    published = transformers_config(checkpoint)
    task = None if checkpoint.task == "sentence-embedding" else checkpoint.task
    fitting = [
        kind
        for name, its_task in architecture.classes.items()
        if its_task == task
        and (kind := getattr(transformers, name)).config_class is type(published)
    ]
    has_teacher = getattr(checkpoint.config, "dist_head", False)
    with torch.device("meta"):
        original = fitting[-1 if has_teacher else 0](published)
    theirs = {n: tuple(x.shape) for n, x in original.state_dict().items()}

    config = architecture.read_config(
        {**published.to_dict(), "architectures": [fitting[0].__name__]}
    )
    if has_teacher:
        config = replace(config, dist_head=True)
    given = {}
    if hasattr(config, "task"):
        config = replace(config, task=task)
        given = {name: getattr(checkpoint.config, name) for name in ("task", "num_classes")}
    elif task is None:
        config = architecture.without_head(config)
    same = replace(config, **given)
    assert same == checkpoint.config, "what the table says is what config.json would"
    model = architecture.model(architecture.fit(config, frozenset(theirs)))
    covered = []
    for dialect in architecture.dialects:
        if dialect.startswith("transformers"):
            spec = architecture.spec(dialect, config)
            state = {name: mx.zeros(shape) for name, shape in theirs.items()}  # lazy
            if not engine.mismatches(state, model, spec):
                covered.append(dialect)
    assert covered
    count = sum(p.numel() for p in original.parameters())
    assert engine.num_parameters(model) <= count  # a pooler that nothing reads may be left out
    if checkpoint.num_params:
        assert checkpoint.num_params == count == engine.num_parameters(model)


@pytest.mark.parametrize("name", registry.checkpoints())
def test_every_entry_says_where_it_is_from(name):
    checkpoint = mlx_zoo.info(name)
    assert checkpoint.source
    assert checkpoint.reference
    assert checkpoint.license or name.endswith(".bamboo")  # its publisher names none
    if registry.architectures()[checkpoint.architecture].inputs == "images":
        how = checkpoint.preprocessing
        assert how or checkpoint.reference.library == "transformers"
        if how:
            assert how.size > 0 < how.resize
            assert how.crop_mode in ("center", "squash", "border")
    if checkpoint.sha256:
        assert len(checkpoint.sha256) >= 8


def test_every_variant_has_one_meaning():
    for name in registry.checkpoints():
        checkpoint = registry.find(name)
        assert checkpoint.name == name, "a name is the alias of another"
    defaults = [c.variant for c in registry.checkpoints().values() if c.default]
    assert len(defaults) == len(set(defaults))
    tagged = {c.variant for c in registry.checkpoints().values()}
    assert tagged == set(defaults)


def test_every_published_weight_of_torchvision_is_there():
    ours = registry.checkpoints()
    aliases = {alias for c in ours.values() for alias in c.aliases}
    modules = ("resnet", "vision_transformer", "efficientnet")
    published = [
        str(weights)
        for name in torchvision.models.list_models(module=torchvision.models)
        for weights in torchvision.models.get_model_weights(name)
        if weights.__class__.__module__.rpartition(".")[2] in modules
    ]
    assert len(published) == 39
    assert set(published) <= aliases
    for text in published:
        kind, _, name = text.partition(".")
        weights = getattr(torchvision.models, kind)[name]
        entry = registry.find(text)
        assert entry.source == weights.url
        assert weights.url.rpartition("-")[2].removesuffix(".pth") == entry.sha256
        assert entry.num_params == weights.meta["num_params"]
        assert entry.accuracy["acc1"] == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        assert entry.labels == tuple(weights.meta["categories"])


def test_every_published_weight_of_timms_variants_is_there():
    variants = {name for a in registry.architectures().values() for name in a.variants}
    published = {n for n in timm.list_pretrained() if n.partition(".")[0] in variants}
    # These four are training checkpoints somewhere else, not repositories of the hub.
    published = {n for n in published if not n.endswith("_ijepa")}
    assert len(published) >= 450
    assert published <= registry.checkpoints().keys()
