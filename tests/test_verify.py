"""Verification must be able to fail: whatever is planted is found, and the layer is named."""

from __future__ import annotations

import json
import shutil
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from originals import randomise
from safetensors.torch import load_file, save_file

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.describe import DATA
from mlx_zoo.errors import MissingDependency, MLXZooError, VerificationError
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.models.layers import ACTIVATIONS
from mlx_zoo.verify import Report, compare, reference, verify
from mlx_zoo.verify.report import Comparison

reference.import_torchvision()
import transformers  # noqa: E402

STORED = read_state_dict([DATA / "digits.safetensors"])


@pytest.fixture(params=["torch", "stored"])
def evidence(request, monkeypatch):
    """With PyTorch at hand, and without it: then against the outputs that were stored."""
    if request.param == "stored":
        without_torch(monkeypatch)
    return request.param


def without_torch(monkeypatch):
    monkeypatch.setattr(reference, "is_installed", lambda library: False)
    monkeypatch.setitem(sys.modules, "torch", None)  # an import would fail


def digits(**options):
    return mlx_zoo.load("resnet_digits", pretrained=True, **options)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    original = randomise(transformers.BertForMaskedLM(config))
    original.tie_weights()
    transformers.utils.logging.disable_progress_bar()
    original.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(bert_folder):
    return mlx_zoo.load(f"local-dir:{bert_folder}", pretrained=True, task="fill-mask")


def layers_of(report):
    return [layer.name for layer in report.layers]


def at(model, path):
    """The module of `model` at 'layer1.0.conv1'."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else model[part]
    return model


# ------------------------------------------------------------------------------ the same network


def test_the_bundled_network_is_its_original(evidence):
    report = verify(digits())
    assert report.passed, report.reason
    assert report.first_divergence is None
    assert report.tolerance == 1e-5
    assert 0 < report.max_abs < 1e-5
    assert report.mean_abs <= report.max_abs
    assert ("stored" in report.evidence) == (evidence == "stored")
    assert report.seed == (None if evidence == "stored" else 0)
    names = layers_of(report)
    assert names[:3] == ["conv1", "bn1", "layer1.0.conv1"]
    assert names[-1] == "fc"
    assert names.index("layer1.0.conv2") < names.index("layer1.0.downsample.0")
    assert names.index("layer2.0.bn1") < names.index("layer2.0.conv2")
    with_weights = {name.rpartition(".")[0] for name in load_digits()}
    assert set(names) == with_weights
    for row in (*report.layers, *report.outputs):
        assert row.scale > 0.1
        assert row.torch_error > 0


def load_digits():
    return torch.load(DATA / "resnet_digits.pth", weights_only=True)


def test_by_name_and_with_the_options_of_load(evidence):
    assert verify("resnet-digits").passed
    assert mlx_zoo.verify("resnet_digits", dtype="float16").tolerance == 1e-2


def test_other_seeds_are_other_inputs_and_the_same_seed_the_same():
    model = digits()
    first, again, other = (verify(model, seed=seed).to_json() for seed in (1, 1, 2))
    assert first == again
    assert json.loads(first)["outputs"] != json.loads(other)["outputs"]
    assert json.loads(verify(model, size=64).to_json())["inputs"] == "pixel_values (2, 64, 64, 1)"


def test_the_original_gives_two_inputs_two_answers():
    inputs = compare.random_inputs("images", digits().config, 32, seed=0)
    outputs, _ = compare.run(digits(), inputs, ())
    assert np.abs(outputs["output"][0] - outputs["output"][1]).max() > 0.1


# ----------------------------------------------------------------------------- planted mistakes


def nudge(layer, leaf="weight", by=1e-3):
    def plant(model):
        module = at(model, layer)
        x = np.array(module[leaf])
        index = f"layer.{layer}.index"
        num_channels = x.shape[0]
        # A channel of which the stored evidence has a sample.
        channel = int(STORED[index][0].item()) % num_channels if index in STORED else 0
        x[channel] += by
        module[leaf] = mx.array(x)

    return plant


def put(layer, name, value):
    def plant(model):
        module = at(model, layer) if layer else model
        assert repr(getattr(module, name)) != repr(value)
        setattr(module, name, value)

    return plant


def swap(layer, one, other):
    def plant(model):
        module = at(model, layer)
        module[one], module[other] = module[other], module[one]

    return plant


def transpose_kernel(model):
    model.layer2[0].conv2.weight = model.layer2[0].conv2.weight.transpose(0, 2, 1, 3)


SILU = ACTIVATIONS["silu"]
MISTAKES = {  # what -> how, and where it shows first
    "a stem's weight": (nudge("conv1"), "conv1"),
    "a weight": (nudge("layer2.0.conv1"), "layer2.0.conv1"),
    "a shortcut's weight": (nudge("layer3.0.downsample.0"), "layer3.0.downsample.0"),
    "a norm's scale": (nudge("layer1.0.bn2"), "layer1.0.bn2"),
    "a norm's mean": (nudge("layer4.0.bn1", "running_mean"), "layer4.0.bn1"),
    "a norm's variance": (nudge("layer2.0.bn2", "running_var", 1e-2), "layer2.0.bn2"),
    "the last bias": (nudge("fc", "bias"), "fc"),
    "a norm's eps": (put("layer3.0.bn2", "eps", 1e-3), "layer3.0.bn2"),
    "the stem's activation": (put("", "act", SILU), "layer1.0.conv1"),
    "an inner activation": (put("layer1.0", "inner_act", SILU), "layer1.0.conv2"),
    "a block's activation": (put("layer2.0", "act", SILU), "layer3.0.conv1"),
    "a pooling": (put("", "maxpool", nn.AvgPool2d(3, 2, 1)), "layer1.0.conv1"),
    "two norms swapped": (swap("layer1.0", "bn1", "bn2"), "layer1.0.bn1"),
    "a kernel's height and width": (transpose_kernel, "layer2.0.conv2"),
}


@pytest.mark.parametrize(("plant", "layer"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_resnet_is_found_where_it_is(plant, layer, evidence):
    model = digits()
    plant(model)
    report = verify(model)
    assert not report.passed
    assert report.first_divergence == layer
    assert layer in report.reason
    found = {row.name: row.passed for row in report.layers}
    before = layers_of(report)[: layers_of(report).index(layer)]
    assert all(found[name] for name in before)


@pytest.mark.parametrize(("plant", "layer"), [MISTAKES["a weight"]])
def test_one_single_weight(plant, layer):
    model = digits()
    weight = np.array(model.layer2[0].conv1.weight)
    weight[5, 1, 1, 3] += 1e-3
    model.layer2[0].conv1.weight = mx.array(weight)
    report = verify(model)
    assert not report.passed
    assert report.first_divergence == layer


@pytest.mark.parametrize("which", ["conv1", "layer2.0.conv1"])
def test_a_layer_of_another_shape_is_a_failed_report_not_an_accident(which, evidence):
    model = digits()
    if which == "conv1":
        model.conv1.padding = (0, 0)
    else:  # the original strides in the first of the two
        model.layer2[0].conv1.stride, model.layer2[0].conv2.stride = (1, 1), (2, 2)
    report = verify(model)
    assert not report.passed
    assert report.first_divergence == which


BERT_MISTAKES = {
    "a word's embedding": (lambda model: scale_up(model.word_embed), "word_embed"),
    "a position's embedding": (lambda model: scale_up(model.position_embed), "position_embed"),
    "a weight": (nudge("blocks.1.mlp.fc1"), "blocks.1.mlp.fc1"),
    "the last block's bias": (nudge("blocks.2.mlp.fc2", "bias"), "blocks.2.mlp.fc2"),
    "a norm's eps": (put("blocks.0.norm1", "eps", 1e-3), "blocks.0.norm1"),
    "an activation": (put("blocks.2.mlp", "act", ACTIVATIONS["relu"]), "blocks.2.mlp.fc2"),
    "the other gelu": (put("blocks.0.mlp", "act", ACTIVATIONS["gelu_new"]), "blocks.0.mlp.fc2"),
    "q and k swapped": (swap("blocks.1.attn", "q_proj", "k_proj"), "blocks.1.attn.q_proj"),
    "k and v swapped": (swap("blocks.0.attn", "k_proj", "v_proj"), "blocks.0.attn.k_proj"),
    "the scores' scale": (put("blocks.1.attn", "scale", 0.25), "blocks.1.attn.out_proj"),
    "the number of heads": (put("blocks.1.attn", "num_heads", 2), "blocks.1.attn.out_proj"),
    "the norms swapped": (swap("blocks.2", "norm1", "norm2"), "blocks.2.norm1"),
    "the decoder's bias": (nudge("mlm", "bias"), "mlm"),
}


def scale_up(embedding):
    embedding.weight = embedding.weight * 1.001


@pytest.mark.parametrize(("plant", "layer"), BERT_MISTAKES.values(), ids=BERT_MISTAKES)
def test_a_mistake_in_a_bert_is_found_where_it_is(plant, layer, bert):
    plant(bert)
    report = verify(bert)
    assert not report.passed
    assert report.first_divergence == layer
    assert layer in report.reason


def test_a_bert_without_a_mistake(bert):
    report = verify(bert)
    assert report.passed, report.reason
    names = layers_of(report)
    attention = [f"blocks.0.attn.{part}_proj" for part in ("q", "k", "v", "out")]
    start = names.index(attention[0])
    assert names[start : start + 4] == attention
    assert names.index("norm") < start < names.index("blocks.0.norm1") < names.index("mlm.dense")


def test_nan_is_never_the_same(evidence):
    model = digits()
    model.fc.bias = mx.full(10, float("nan"))
    report = verify(model)
    assert not report.passed
    assert report.first_divergence == "fc"


def test_weights_of_another_checkpoint_are_not_these(bert_folder, tmp_path):
    """The file is what the original reads: one that changed since is noticed."""
    shutil.copytree(bert_folder, tmp_path / "bert")
    model = mlx_zoo.load(f"local-dir:{tmp_path / 'bert'}", pretrained=True, task="fill-mask")
    assert verify(model).passed
    state = load_file(tmp_path / "bert" / "model.safetensors")
    state["bert.encoder.layer.1.output.dense.bias"][0] += 1e-2
    save_file(state, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    assert verify(model).first_divergence == "blocks.1.mlp.fc2"


@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
@pytest.mark.parametrize(
    ("difference", "error", "torch_error", "passed"),
    [
        (1e-6, 1e-6, 4e-7, True),
        (5e-6, 5e-6, 1e-7, False),  # within the tolerance, and far more than rounding costs
        (2e-5, 2e-5, 6e-6, False),  # a few roundings, and beyond the tolerance
        (5e-5, 4e-5, 2e-5, True),  # a deep network, whose original is no better
        (5e-4, 5e-4, 2e-5, False),
        (float("nan"), 0.0, 1e-6, False),
        (0.0, float("inf"), 1e-6, False),
    ],
)
def test_how_figures_are_judged(difference, error, torch_error, passed, scale):
    figures = (x * scale for x in (difference, difference, 1.0, error, torch_error))
    assert Comparison("layer", *figures).passed is passed


# -------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_its_own_tolerance(dtype, evidence):
    model = digits(dtype=dtype)
    report = verify(model)
    assert report.passed, report.reason
    assert report.tolerance == 1e-2
    assert report.max_rel > 1e-5  # which float32 would not pass
    model.layer3[0].bn1.weight = model.layer3[0].bn1.weight * 1.2
    report = verify(model)
    assert not report.passed
    assert report.first_divergence == "layer3.0.bn1"


# ------------------------------------------------------------------- what cannot be verified


def test_a_random_network_has_nothing_to_be_compared_with(bert_folder):
    for model in (mlx_zoo.load("resnet_digits"), mlx_zoo.load(f"local-dir:{bert_folder}")):
        with pytest.raises(VerificationError, match="random weights: there is nothing to compare"):
            verify(model)
    architecture = registry.architectures()["resnet"]
    with pytest.raises(VerificationError, match="random weights"):
        verify(architecture.model(architecture.variants["resnet_digits"]))
    with pytest.raises(VerificationError, match="random weights"):
        verify("resnet_digits", pretrained=False)


def test_without_torch_and_without_stored_outputs_the_extra_is_named(
    bert, bert_folder, monkeypatch
):
    without_torch(monkeypatch)
    wanted = r'needs torch and transformers: pip install "mlx-zoo\[torch\]"'
    with pytest.raises(MissingDependency, match=wanted) as caught:
        verify(bert)
    assert isinstance(caught.value, MLXZooError)
    assert isinstance(caught.value, ImportError)
    with pytest.raises(MissingDependency, match=wanted):
        mlx_zoo.load(f"local-dir:{bert_folder}", pretrained=True, task="fill-mask", verify=True)


def test_without_torch_the_bundled_network_is_verified_as_it_is_loaded(monkeypatch):
    without_torch(monkeypatch)
    assert digits(verify=True).checkpoint.name == "resnet_digits"


def test_a_network_with_another_head_does_not_fit_its_original():
    with pytest.raises(VerificationError, match="head of this network is fresh"):
        verify(digits(num_classes=3))


def test_an_unknown_device():
    with pytest.raises(ValueError, match="device='tpu': 'cpu' or 'gpu'"):
        verify(digits(), device="tpu")


# ------------------------------------------------------------------- the network is left alone


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_the_network_is_left_as_it_was(evidence):
    model = digits()
    model.train()
    model.layer2[0].bn1.eval()  # frozen, in a network that is being trained
    before = modes(model), classes(model)
    assert len(set(before[0].values())) == 2
    weights = np.array(model.bn1.running_mean)
    assert verify(model).passed  # in eval mode, or batch statistics would differ
    assert (modes(model), classes(model)) == before
    np.testing.assert_array_equal(model.bn1.running_mean, weights)


def test_the_network_is_left_as_it_was_when_it_fails(evidence):
    model = digits()
    model.train()

    def fail(x):
        raise RuntimeError("planted")

    model.layer3[0].act = fail
    before = modes(model), classes(model)
    with pytest.raises(RuntimeError, match="planted"):
        verify(model)
    assert (modes(model), classes(model)) == before
    inputs = compare.random_inputs("images", model.config, 32, seed=0)
    with pytest.raises(RuntimeError, match="planted"):
        compare.run(model, inputs, classes(model))
    assert classes(model) == before[1]


# ----------------------------------------------------------------------------------- the report


@pytest.fixture
def failed():
    model = digits()
    MISTAKES["a weight"][0](model)
    return verify(model)


def strictly(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_report_as_json(evidence, failed):
    passed = verify(digits())
    for report in (passed, failed):
        found = strictly(report.to_json())
        for name in ("passed", "max_abs", "mean_abs", "max_rel", "tolerance", "first_divergence"):
            assert found[name] == getattr(report, name), name
        assert found["name"] == "resnet_digits"
        assert found["versions"]["mlx_zoo"] == mlx_zoo.__version__
        assert [layer["name"] for layer in found["layers"]] == layers_of(report)
        for row, layer in zip(found["layers"], report.layers, strict=True):
            assert row["max_abs"] == layer.max_abs
            assert row["max_rel"] == layer.max_rel
            assert row["passed"] == layer.passed
        assert [row["name"] for row in found["outputs"]] == ["output"]
    assert passed.passed
    assert not failed.passed


def test_a_report_with_no_figures_is_json_too():
    model = digits()
    model.conv1.padding = (0, 0)
    model.fc.bias = mx.full(10, float("nan"))
    found = strictly(verify(model).to_json())
    assert found["passed"] is False
    assert found["first_divergence"] == "conv1"
    assert None in {row["max_abs"] for row in found["layers"]}


def test_the_report_as_a_table(evidence, failed):
    passed = verify(digits())
    for report in (passed, failed):
        text = str(report)
        assert max(map(len, text.splitlines())) <= 100
        assert "\x1b" not in text
        rows = [line for line in text.splitlines() if "layer4.0.conv2" in line]
        (row,) = rows
        layer = next(layer for layer in report.layers if layer.name == "layer4.0.conv2")
        assert f"{layer.max_abs:.1e}" in row
        assert f"{layer.error:.1e}" in row
        assert all(name in text for name in layers_of(report))
        assert report.evidence in text
    assert "passed: the same network" in str(passed)
    assert "differs" not in str(passed)
    assert "FAILED: first divergence at layer2.0.conv1" in " ".join(str(failed).split())
    (row,) = [line for line in str(failed).splitlines() if "layer2.0.conv1 " in line]
    assert "differs" in row
    (row,) = [line for line in str(failed).splitlines() if "layer1.0.conv1 " in line]
    assert "differs" not in row


def test_the_report_as_a_page(failed, capfd):
    page = failed.to_html()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert page.lower().count("</html>") == 1
    assert "<script" not in page
    assert "src=" not in page
    assert all(name in page for name in layers_of(failed))
    assert "FAILED" in page
    assert capfd.readouterr() == ("", "")


def test_an_empty_report_has_not_passed():
    report = Report("x", "nothing", (), (), "cpu", 0, "", {})
    assert not report.passed
