"""Networks optimised for inference compute what they computed before."""

from __future__ import annotations

import threading
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.backend import lanes
from mlx_zoo.backend.inference import Optimized, optimize_for_inference
from mlx_zoo.specs.bert import ARCHITECTURE as BERT
from mlx_zoo.specs.gpt2 import ARCHITECTURE as GPT2

SMALL = {"dims": 48, "num_heads": 3, "num_layers": 2, "mlp_dims": 96}


@pytest.fixture(autouse=True)
def seeded():
    mx.random.seed(0)


def reduced(config):
    """A config with the same arithmetic, shallower and narrower."""
    if hasattr(config, "depths"):
        return replace(config, depths=(2, 1, 1, 1), num_classes=7)
    if hasattr(config, "stages"):
        stages = tuple(
            replace(stage, depth=1, hidden=stage.hidden[:1], squeezed=stage.squeezed[:1])
            for stage in config.stages
        )
        return replace(config, stages=stages, num_classes=7)
    if hasattr(config, "patch_size"):
        return replace(config, img_size=3 * config.patch_size, num_classes=7, **SMALL)
    return replace(config, **SMALL)


def variants():
    """One of each arithmetic there is among the image networks, and all heads of the others."""
    found = {}
    for architecture in registry.architectures().values():
        if architecture.inputs == "images":
            for name, config in architecture.variants.items():
                small = reduced(config)
                found.setdefault((architecture.name, small), (name, architecture, small))
    for architecture in (BERT, GPT2):
        config = reduced(next(iter(architecture.variants.values())))
        for task in (None, *architecture.tasks):
            wanted = replace(config, task=task, vocab_size=99)
            found[architecture.name, task] = (f"{architecture.name} {task}", architecture, wanted)
    return {name: (architecture, config) for name, architecture, config in found.values()}


VARIANTS = variants()


def random_network(architecture, config):
    """Every tensor random, running statistics too."""
    mx.random.seed(0)
    model = architecture.model(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm):
            shape = module.running_mean.shape
            module.running_mean = mx.random.normal(shape) * 0.2
            module.running_var = mx.random.uniform(0.5, 1.5, shape)
        if isinstance(module, (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            module.weight = mx.random.uniform(0.5, 1.5, module.weight.shape)
            module.bias = mx.random.normal(module.bias.shape) * 0.2
        if "gamma" in module:
            module.gamma = mx.random.uniform(0.5, 1.5, module.gamma.shape)
        if isinstance(module, nn.Linear) and "bias" in module:
            module.bias = mx.random.normal(module.bias.shape) * 0.2
    return model.eval()


def inputs(architecture, config, batch=3):
    if architecture.inputs == "images":
        height, width = np.broadcast_to(getattr(config, "img_size", None) or 64, 2).tolist()
        return [mx.random.normal((batch, height, width, config.in_chans))]
    shape = (batch, 2, 11) if config.task == "multiple-choice" else (batch, 11)
    mask = mx.ones(shape, mx.int32)
    mask[1, ..., 7:] = 0
    return [mx.random.randint(1, config.vocab_size, shape), mask]


def arrays(output):
    items = output if isinstance(output, tuple) else (output,)
    return [x for x in items if x is not None]


def alike(one, other, share=5e-6):
    one, other = arrays(one), arrays(other)
    assert [x.shape for x in one] == [x.shape for x in other]
    return all(
        mx.abs(a - b).max() <= share * mx.abs(b).max() for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_an_optimised_network_computes_the_same(name):
    architecture, config = VARIANTS[name]
    model = random_network(architecture, config)
    given = inputs(architecture, config)
    before = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    truth = model(*given)

    fast = optimize_for_inference(model)
    found = fast(*given)
    assert alike(found, truth)
    for x in arrays(truth):
        assert mx.abs(x[0] - x[-1]).max() > 1e-4 * mx.abs(x).max()  # inputs are told apart
    with lanes.single():
        assert alike(fast(*given), truth)
    assert type(found) is type(truth)

    kinds = [type(module) for module in fast.modules()]
    assert nn.BatchNorm not in kinds
    own = [type(module) for module in model.modules()]
    assert fast.fused or nn.BatchNorm not in own
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_its_type(dtype):
    model = random_network(*VARIANTS["resnet18"])
    model.set_dtype(getattr(mx, dtype))
    images = mx.random.normal((2, 64, 64, 3)).astype(getattr(mx, dtype))
    fast = optimize_for_inference(model)
    assert {x.dtype for _, x in tree_flatten(fast.parameters())} == {getattr(mx, dtype)}
    assert alike(fast(images), model(images), 3e-2)


@pytest.mark.parametrize(
    "name", ["resnet_digits", "efficientnet_digits", "vit_digits", "bert_docs", "gpt2_docs"]
)
def test_an_optimised_network_is_verified_as_any_other(name):
    model = mlx_zoo.load(name, pretrained=True)
    fast = optimize_for_inference(model)
    report, plain = mlx_zoo.verify(fast), mlx_zoo.verify(model)
    assert report.passed, report
    assert "optimised for inference" in " ".join(report.notes)
    left = {layer.name for layer in report.layers}
    assert left == {layer.name for layer in plain.layers} - fast.fused - {
        layer.name for layer in plain.layers if layer.name.endswith(("q_proj", "k_proj", "v_proj"))
    }


def test_a_wrong_fusion_fails_verification():
    fast = optimize_for_inference(mlx_zoo.load("resnet_digits", pretrained=True))
    fast.layer2[0].conv2.bias = fast.layer2[0].conv2.bias + 1e-3
    report = mlx_zoo.verify(fast)
    assert not report.passed
    assert report.first_divergence == "layer2.0.bn2"


def test_it_is_refused_in_training_and_cannot_be_trained_or_changed():
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        optimize_for_inference(model.train())
    fast = optimize_for_inference(model.eval())
    for change in (fast.train, lambda: fast.reset_head(3), lambda: fast.reset_input(3)):
        with pytest.raises(ValueError, match="original"):
            change()
    assert fast.eval() is fast
    assert not fast.training
    assert fast.trainable_parameters() == {"layer1": [{}], **fast.trainable_parameters()}
    assert not tree_flatten(fast.trainable_parameters())
    assert tree_flatten(model.trainable_parameters())


def test_it_is_exported_converted_and_quantised_as_its_original(tmp_path):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast = optimize_for_inference(model)
    one, other = (
        mlx_zoo.export(x, tmp_path / f"{i}.safetensors") for i, x in enumerate((model, fast))
    )
    assert one.read_bytes() == other.read_bytes()
    again = mlx_zoo.load(f"local-dir:{mlx_zoo.convert(fast, tmp_path / 'folder')}", pretrained=True)
    images = mx.random.normal((2, 32, 32, 1))
    assert mx.array_equal(again(images), model(images))
    with pytest.raises(ValueError, match="original"):
        mlx_zoo.quantize(optimize_for_inference(mlx_zoo.load("gpt2_docs", pretrained=True)))


def test_generation_follows_the_original_too():
    model = mlx_zoo.load("gpt2_docs", pretrained=True)
    fast = optimize_for_inference(model)
    before = [token.token for token in mlx_zoo.generate(fast, "Return the", max_tokens=8)]
    model.norm.weight = -model.norm.weight
    found = [token.token for token in mlx_zoo.generate(fast, "Return the", max_tokens=8)]
    assert found == [token.token for token in mlx_zoo.generate(model, "Return the", max_tokens=8)]
    assert found != before


def test_the_way_back_and_there_again():
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast = optimize_for_inference(model)
    assert fast.original is model
    assert isinstance(fast, type(model))
    assert isinstance(fast, Optimized)
    assert not isinstance(model, Optimized)
    assert optimize_for_inference(fast) is fast
    assert fast.checkpoint is model.checkpoint
    assert fast.fc.weight is model.fc.weight  # what is not changed is not there twice


def test_it_follows_its_original():
    """Weights that were trained, a new head, other statistics: nothing is stale."""
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast, images = optimize_for_inference(model), mx.random.normal((2, 32, 32, 1))
    old = fast(images)
    model.conv1.weight = model.conv1.weight * 1.5
    assert alike(fast(images), model(images))
    assert not alike(fast(images), old, 1e-3)
    model.train()
    model(images)  # the running statistics move
    assert alike(fast(images), model.eval()(images))
    model.reset_head(3)
    assert fast(images).shape == (2, 3)
    assert fast.config.num_classes == 3
    assert alike(fast(images), model(images))


def test_a_network_without_anything_to_fuse_is_one_too():
    model = mlx_zoo.load("gpt2_docs", pretrained=True, quantize=8)
    fast = optimize_for_inference(model)
    assert not fast.fused
    ids = mx.array([[1, 2, 3], [4, 5, 6]])
    assert alike(fast(ids), model(ids))


# Lanes ------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch):
    """As on two cores, and what each lane was given."""
    seen = []

    def noting(method, owner, *args, **kwargs):
        def part(owner, *args, **kwargs):
            if lanes.is_lane():
                seen.append(args[0].shape[0])
            return method(owner, *args, **kwargs)

        return own(part, owner, *args, **kwargs)

    own = lanes.divided
    monkeypatch.setattr(lanes, "_threads", lambda: 2)
    monkeypatch.setattr(lanes, "divided", noting)
    return seen


@pytest.mark.parametrize(("batch", "parts"), [(1, []), (2, [1, 1]), (5, [2, 3]), (8, [4, 4])])
def test_a_batch_is_divided_among_the_cores(batch, parts, two_threads):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast, images = optimize_for_inference(model), mx.random.normal((batch, 32, 32, 1))
    assert alike(fast(images), model(images))
    assert sorted(two_threads) == parts
    assert alike(fast.features(images), model.features(images))
    for ours, theirs in zip(
        fast.forward_intermediates(images), model.forward_intermediates(images), strict=True
    ):
        assert alike(ours, theirs)


def test_named_outputs_and_keywords_are_divided_too(two_threads):
    model = random_network(*VARIANTS["bert None"])
    fast = optimize_for_inference(model)
    ids, mask = inputs(*VARIANTS["bert None"], batch=5)
    found, truth = fast(ids, attention_mask=mask), model(ids, attention_mask=mask)
    assert type(found) is type(truth)
    assert two_threads
    assert alike(found.last_hidden_state, truth.last_hidden_state)
    assert alike(found.pooler_output, truth.pooler_output)


def test_errors_come_out_of_a_lane_as_they_are(two_threads):
    fast = optimize_for_inference(mlx_zoo.load("resnet_digits", pretrained=True))
    with pytest.raises(ValueError, match="NCHW"):
        fast(mx.zeros((4, 1, 32, 32)))
    assert fast(mx.zeros((4, 32, 32, 1))).shape == (4, 10)  # and the lanes go on


def test_the_threads_of_the_blas_are_as_before():
    get, _ = lanes._controls()
    before = get()
    fast = optimize_for_inference(mlx_zoo.load("resnet_digits", pretrained=True))
    fast(mx.zeros((4, 32, 32, 1)))
    with pytest.raises(ValueError, match="NCHW"):
        fast(mx.zeros((4, 1, 32, 32)))
    assert get() == before


def test_a_gradient_is_an_error_and_never_silently_zero(two_threads):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast, images = optimize_for_inference(model), mx.random.normal((2, 32, 32, 1))
    for some in (images, images[:1]):
        with pytest.raises(ValueError, match="cannot be differentiated"):
            mx.grad(lambda images: fast(images).sum())(some)


def test_it_can_be_compiled(two_threads):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast, images = optimize_for_inference(model), mx.random.normal((4, 32, 32, 1))
    assert alike(mx.compile(fast)(images), model(images))


def test_pipelines_optimise_and_can_be_told_not_to():
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    name = "image-classification"
    assert mlx_zoo.pipeline(name, model).model.original is model
    assert mlx_zoo.pipeline(name, model, optimize=False).model is model
    assert isinstance(mlx_zoo.pipeline(name, "resnet_digits").model, Optimized)


def test_threads_that_call_at_once_leave_the_blas_as_it_was(monkeypatch):
    """The second has counted the threads before the first tells the BLAS to use one."""
    threads = [2]  # as a BLAS has them
    controls = (lambda: threads[0], lambda count: threads.__setitem__(0, count))
    monkeypatch.setattr(lanes, "_controls", lambda: controls)
    monkeypatch.setattr(lanes, "_num_lanes", lambda arrays: 2)
    inside, go_on, ended = (threading.Event() for _ in range(3))

    def slow(owner, x):
        inside.set()
        assert go_on.wait(30)
        return x + 1

    def slower(owner, x):
        assert ended.wait(30)
        return x + 1

    def call(function):
        with mx.stream(mx.new_stream(mx.cpu)):
            lanes.divided(function, nn.Identity(), mx.ones((2, 3)))

    first, second = (threading.Thread(target=call, args=(how,)) for how in (slow, slower))
    first.start()
    assert inside.wait(30)
    second.start()
    second.join(0.5)  # it has begun
    go_on.set()
    first.join(30)
    ended.set()
    second.join(30)
    assert threads == [2]


def test_what_the_original_shares_may_be_changed_in_place(two_threads):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast, images = optimize_for_inference(model), mx.random.normal((4, 32, 32, 1))
    model.fc.bias += 1  # lazily, on this thread's stream
    assert alike(fast(images), model(images))


def test_who_computes_meanwhile_finds_every_layer(monkeypatch):
    """Another thread's call makes the network anew, as its original has other weights."""
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast = optimize_for_inference(model)
    removed = []
    monkeypatch.setattr(type(fast), "clear", lambda self: removed.append(self), raising=False)
    model.fc.bias = model.fc.bias + 1
    fast(mx.random.normal((1, 32, 32, 1)))
    assert not removed


def test_it_can_be_exported_as_a_function(tmp_path, two_threads):
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    fast, images = optimize_for_inference(model), mx.random.normal((4, 32, 32, 1))
    mx.export_function(str(tmp_path / "f.mlxfn"), fast, images)
    (found,) = mx.import_function(str(tmp_path / "f.mlxfn"))(images)
    assert alike(found, model(images))


def test_errors_speak_of_what_was_given(two_threads):
    fast = optimize_for_inference(mlx_zoo.load("resnet_digits", pretrained=True))
    with pytest.raises(ValueError, match=r"\(4, 1, 32, 32\)"):
        fast(mx.zeros((4, 1, 32, 32)))


def test_it_can_be_mapped(two_threads):
    model = mlx_zoo.load("vit_digits", pretrained=True)
    fast, images = optimize_for_inference(model), mx.random.normal((3, 32, 32, 1))
    assert alike(mx.vmap(lambda image: fast(image[None])[0])(images), model(images))


def test_optimised_networks_of_a_kind_are_of_one_class():
    one, other = (optimize_for_inference(mlx_zoo.load("resnet_digits")) for _ in range(2))
    assert type(one) is type(other)
