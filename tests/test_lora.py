"""What is trained of a network; adapters beside its layers: exact, merged, saved and refused."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from originals import randomise

import mlx_zoo
from mlx_zoo.errors import CheckpointError, MLXZooError, VerificationError
from mlx_zoo.hub.safetensors_writer import write_safetensors
from mlx_zoo.mapping import engine
from mlx_zoo.training.lora import (
    LoRA,
    LoRALinear,
    adapted,
    add_lora,
    load_adapter,
    merge_lora,
    save_adapter,
)
from mlx_zoo.training.parts import blocks_of, head_of
from mlx_zoo.training.trainable import choose, depth_of, no_decay, training_mode
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()
import transformers  # noqa: E402

BUNDLED = {
    "resnet_digits": {},
    "efficientnet_digits": {},
    "vit_digits": {},
    "bert_docs_topic": {"task": "text-classification", "dtype": "float32"},
    "gpt2_docs": {"dtype": "float32"},
}
TRANSFORMERS = ("vit_digits", "bert_docs_topic", "gpt2_docs")
EVERYWHERE = LoRA(rank=4, layers=("*",))


@pytest.fixture(autouse=True)
def same_numbers():
    mx.random.seed(0)


def bundled(name, **options):
    return mlx_zoo.load(name, pretrained=True, **{**BUNDLED[name], **options})


def inputs(model, rows=3, seed=0):
    """A batch that a bundled network takes."""
    random = np.random.default_rng(seed)
    if hasattr(model.config, "in_chans"):
        return mx.array(random.normal(size=(rows, 32, 32, 1)).astype(np.float32))
    return mx.array(random.integers(5, 900, (rows, 12)))


def stir(model, seed=0):
    """Give every B a value, as training does: it is 0 before."""
    random = np.random.default_rng(seed)
    for layer in adapted(model).values():
        b = layer.lora_b
        b.weight = mx.array(random.normal(size=b.weight.shape).astype(np.float32) * 0.05)
    return model


def relative(a, b):
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


def names(tree):
    return {name for name, _ in tree_flatten(tree)}


def apart(model):
    """Its parameters, which no later change in place touches."""
    return {name: mx.array(x) for name, x in engine.parameters(model).items()}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A small BERT with a head of 3 classes, random, as transformers saves it; and its folder."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128, "vocab_size": 200, "max_position_embeddings": 40}
    config = transformers.BertConfig(**sizes, num_labels=3)
    original = randomise(transformers.BertForSequenceClassification(config))
    folder = tmp_path_factory.mktemp("lora") / "bert"
    original.save_pretrained(folder)
    return original, folder


def classifier(folder, **options):
    return mlx_zoo.load(
        f"local-dir:{folder}", pretrained=True, task="text-classification", **options
    )


IDS = np.random.default_rng(0).integers(5, 200, (4, 9))


# What is trained --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_full_is_everything_but_statistics(name):
    model = bundled(name)
    report = choose(model, "full")
    statistics = {n for n in engine.parameters(model) if n.endswith(("_mean", "_var"))}
    assert names(model.trainable_parameters()) == engine.parameters(model).keys() - statistics
    assert report.num_trainable == report.num_parameters == engine.num_parameters(model)
    assert report.percent == 100


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet_digits", {"fc"}),
        ("efficientnet_digits", {"classifier"}),
        ("vit_digits", {"head"}),
        ("bert_docs_topic", {"pooler", "classifier"}),
    ],
)
def test_the_head_alone(name, head):
    model = bundled(name)
    report = choose(model, "head")
    trained = names(model.trainable_parameters())
    assert {n.partition(".")[0] for n in trained} == head == head_of(model)
    assert {p.name for p in report.parts if p.trainable} == {"head"}
    assert report.num_trainable == sum(
        x.size for _, x in tree_flatten(model.trainable_parameters())
    )


@pytest.mark.parametrize(
    ("name", "tops"),
    [
        ("resnet_digits", {"layer3", "layer4", "fc"}),
        ("efficientnet_digits", {"blocks.2", "blocks.3", "conv_head", "bn2", "classifier"}),
        ("vit_digits", {"blocks.2", "blocks.3", "norm", "head"}),
        ("bert_docs_topic", {"blocks.0", "blocks.1", "pooler", "classifier"}),
        ("gpt2_docs", {"blocks.1", "blocks.2", "norm"}),
    ],
)
def test_the_last_two(name, tops):
    model = bundled(name)
    choose(model, "last-2")
    tree = names(model.trainable_parameters())
    found = {".".join(n.split(".")[: 1 + n.startswith("blocks")]) for n in tree}
    assert found == tops
    assert not {n for n in tree if n.endswith(("running_mean", "running_var"))}


SMALL = {"num_layers": 2, "dims": 24, "num_heads": 2, "mlp_dims": 48}


@pytest.mark.parametrize(
    ("name", "options", "method", "trained"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "head", {"head", "head_dist"}),
        ("vit_base_patch16_siglip_224", {}, "last-1", {"blocks", "norm", "attn_pool"}),
        ("vit_base_patch16_siglip_224", {}, "lora", {"blocks"}),
        ("gpt2", {"tied": False}, "head", {"lm_head"}),
        ("gpt2", {"tied": False}, "lora", {"blocks"}),  # lm_head is as wide as the vocabulary
        ("gpt2", {"task": "text-classification"}, "lora", {"blocks", "score"}),
        ("bert_base", {"task": "fill-mask"}, "lora", {"blocks"}),
        ("bert_base", {"task": "question-answering"}, "lora", {"blocks", "qa_outputs"}),
        ("bert_base", {"task": "multiple-choice"}, "lora", {"blocks", "classifier", "pooler"}),
    ],
)
def test_heads_of_other_kinds(name, options, method, trained):
    words = {} if name.startswith(("deit", "vit")) else {"vocab_size": 30}
    model = mlx_zoo.load(name, **SMALL, **words, **options)
    report = choose(model, method)
    tree = names(model.trainable_parameters())
    assert {n.partition(".")[0] for n in tree} == trained
    assert not any(".lora_" not in n and n.startswith("blocks") for n in tree if method == "lora")
    parts = {part.name: part.trainable for part in report.parts}
    assert parts["embeddings"] == 0
    assert bool(parts.get("head")) == bool(trained & head_of(model))


def test_a_report_is_a_table():
    report = choose(bundled("vit_digits"), LoRA(rank=8, head=True))
    lines = str(report).splitlines()
    assert lines[0] == "trained: lora of rank 8, alpha 16: attn.q_proj, attn.v_proj"
    assert lines[1].split() == ["part", "parameters", "trainable", "%"]
    # 4 blocks, 2 layers of 48 x 48 each: 8 (48 + 48) each.
    assert lines[-2].split() == ["adapters", "6,144", "6,144", "100.00"]
    assert lines[-1].split() == ["all", "123,802", "6,634", "5.36"]


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("vit_digits", "last-99", "this network has 4 blocks"),
        ("vit_digits", "last-0", "this network has 4 blocks"),
        ("vit_digits", "last-two", "one of full, head, last-N, lora"),
        ("vit_digits", "everything", "one of full, head, last-N, lora"),
        ("vit_digits", 3, "one of full, head, last-N, lora"),
        ("gpt2_docs", "head", "no head of its own"),
        ("resnet_digits", "lora", r"this resnet have no linear layers.*'head', 'last-N' or 'full'"),
        ("efficientnet_digits", LoRA(), "this efficientnet have no linear layers"),
        (
            "vit_digits",
            LoRA(layers="attn.query"),
            r"no block of this vit has it; they have attn\.q",
        ),
        ("vit_digits", LoRA(layers=("mlp.*", "x")), "layers='x'"),
        ("vit_digits", LoRA(rank=49), "rank=49: a layer has 48 inputs, 48 outputs"),
    ],
)
def test_nonsense_is_refused_and_nothing_changes(name, method, message):
    model = bundled(name)
    before = engine.parameters(model).keys()
    with pytest.raises(ValueError, match=message):
        choose(model, method)
    assert engine.parameters(model).keys() == before
    assert len(names(model.trainable_parameters())) > 0


@pytest.mark.parametrize(
    "options",
    [
        *({"rank": rank} for rank in (0, -1, True, 2.0, 2**17)),
        *({"alpha": alpha} for alpha in (0, -1, math.inf, math.nan, "16")),
        *({"dropout": p} for p in (1, -0.1, math.nan, None)),
        *({"layers": ()}, {"layers": (3,)}, {"head": 1}),
    ],
)
def test_a_lora_of_wrong_numbers(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LoRA(**options)


def test_layers_by_patterns():
    def found(*layers):
        model = add_lora(bundled("bert_docs_topic"), LoRA(layers=layers))
        return {name.removeprefix("blocks.0.") for name in adapted(model) if ".0." in name}

    attention = {f"attn.{part}_proj" for part in ("q", "k", "v", "out")}
    assert found("attn.q_proj") == {"attn.q_proj"}
    assert found("attn.*") == attention
    assert found("attn.[qv]_proj", "mlp.fc2") == {"attn.q_proj", "attn.v_proj", "mlp.fc2"}
    assert found("*") == attention | {"mlp.fc1", "mlp.fc2"}


def test_an_optimised_network_is_not_trained():
    fast = mlx_zoo.optimize_for_inference(bundled("vit_digits"))
    for change in (choose, add_lora, merge_lora):
        with pytest.raises(ValueError, match=r"optimised for inference: .* its \.original"):
            change(fast)


def test_choosing_twice(bert):
    model = classifier(bert[1])
    choose(model, EVERYWHERE)
    before = apart(model)
    assert choose(model, EVERYWHERE).num_trainable > 0  # as one that goes on does
    assert before.keys() == engine.parameters(model).keys()
    with pytest.raises(ValueError, match="adapters already"):
        choose(model, LoRA(rank=2))
    with pytest.raises(ValueError, match=r"method='full'.*merge_lora\(model\) first"):
        choose(model, "full")
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model)


# Training mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet_digits", "efficientnet_digits"])
@pytest.mark.parametrize(
    ("method", "moves"), [("head", ()), ("last-1", ("last",)), ("full", "all")]
)
def test_statistics_move_where_a_norm_is_trained(name, method, moves):
    model = bundled(name)
    choose(model, method)
    training_mode(model)
    before = apart(model)
    mx.eval(model(inputs(model)), model.parameters())
    after = engine.parameters(model)
    moved = {n for n, x in before.items() if not mx.array_equal(x, after[n]).item()}
    statistics = {n for n in before if n.endswith(("running_mean", "running_var"))}
    norms_trained = {
        n
        for n in statistics
        if n.rpartition(".")[0] + ".weight" in names(model.trainable_parameters())
    }
    assert moved == norms_trained
    assert bool(moved) == bool(moves)
    assert (moved == statistics) == (moves == "all")


def dropouts(model):
    return {name for name, x in model.named_modules() if isinstance(x, nn.Dropout) and x.training}


def test_dropout_follows_what_is_trained():
    model = bundled("bert_docs_topic")
    choose(model, "head")
    training_mode(model)
    assert dropouts(model) == {"head_dropout"}
    choose(model, "last-1")
    training_mode(model)
    assert {"blocks.1.dropout", "blocks.1.attn.dropout", "head_dropout"} <= dropouts(model)
    assert {n for n in dropouts(model) if not n.startswith("blocks.1.")} == {"head_dropout"}
    choose(model, "full")
    training_mode(model)
    assert {"dropout", "blocks.0.dropout", "head_dropout"} < dropouts(model)
    model.eval()
    assert not dropouts(model)


def test_dropout_of_adapters(bert):
    model = classifier(bert[1], dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
    stir(add_lora(model, LoRA(rank=4, dropout=0.5)))
    assert not model.training
    assert not dropouts(model)
    assert mx.array_equal(model(mx.array(IDS)), model(mx.array(IDS))).item()
    training_mode(model)
    assert not mx.array_equal(model(mx.array(IDS)), model(mx.array(IDS))).item()


# Rates and decay --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_depths_follow_the_network(name):
    model = bundled(name)
    depths = {n: depth_of(n, model) for n in engine.parameters(model)}
    num_blocks = len(blocks_of(model))
    assert set(depths.values()) | {num_blocks + 1} == {*range(num_blocks + 2)}
    for i, block in enumerate(blocks_of(model)):
        assert {d for n, d in depths.items() if n.startswith(block + ".")} == {i + 1}
    assert {depths[n] for n in depths if n.partition(".")[0] in head_of(model)} <= {num_blocks + 1}
    with pytest.raises(ValueError, match="no such parameter"):
        depth_of("stem.weight", model)


def test_depths_of_what_is_outside_the_blocks():
    model = bundled("gpt2_docs")
    assert [depth_of(n, model) for n in ("wte.weight", "wpe.weight", "norm.bias")] == [0, 0, 4]
    model = bundled("vit_digits")
    assert [depth_of(n, model) for n in ("pos_embed", "cls_token", "head.bias")] == [0, 0, 5]
    model = add_lora(bundled("vit_digits"))
    assert depth_of("blocks.2.attn.q_proj.lora_a.weight", model) == 3


def test_what_does_not_decay():
    def kept(name, **options):
        model = mlx_zoo.load(name, **options)
        found = {n for n, x in engine.parameters(model).items() if no_decay(n, x, model)}
        odd = {n for n in found if not n.endswith("bias") and engine.parameters(model)[n].ndim > 1}
        one_axis = {n for n, x in engine.parameters(model).items() if x.ndim <= 1}
        assert one_axis <= found
        return odd

    assert kept("vit_tiny_patch16_224", num_layers=1) == {"cls_token", "pos_embed"}
    assert kept("bert_base", num_layers=1, vocab_size=50, dims=12) == {"position_embed.weight"}
    assert kept("gpt2", num_layers=1, vocab_size=50, dims=12) == {"wpe.weight"}
    assert kept("resnet18") == set()


# LoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_is_the_same_function(name, dtype):
    model = bundled(name, dtype=dtype)
    x = inputs(model)
    before = model(x)
    add_lora(model, EVERYWHERE)
    assert mx.array_equal(model(x), before).item()
    assert {x.lora_a.weight.dtype for x in adapted(model).values()} == {mx.float32}
    stir(model)
    assert model(x).dtype == before.dtype
    assert not mx.array_equal(model(x), before).item()


class TorchLoRA(torch.nn.Module):
    """The reference: y = W x + (alpha / rank) B A x."""

    def __init__(self, linear, a, b, scale):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.a.T @ self.b.T)


TORCH_NAMES = {
    "attn.q_proj": "attention.self.query",
    "attn.k_proj": "attention.self.key",
    "attn.v_proj": "attention.self.value",
    "attn.out_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def test_gradients_are_those_of_torch(bert):
    model = stir(add_lora(classifier(bert[1]), LoRA(rank=3, alpha=7.0, layers=("*",))))
    original = transformers.BertForSequenceClassification.from_pretrained(bert[1]).double().eval()
    original.requires_grad_(False)
    references = {}
    for name, layer in adapted(model).items():
        _, block, inner = name.split(".", 2)
        path, _, leaf = f"bert.encoder.layer.{block}.{TORCH_NAMES[inner]}".rpartition(".")
        holder = original.get_submodule(path)
        a, b = (torch.tensor(np.array(x.weight)).double() for x in (layer.lora_a, layer.lora_b))
        references[name] = TorchLoRA(getattr(holder, leaf), a, b, 7.0 / 3)
        setattr(holder, leaf, references[name])
    original.classifier.requires_grad_(True)
    weights = np.random.default_rng(1).normal(size=(4, 3))
    logits = original(torch.tensor(IDS)).logits
    (logits * torch.tensor(weights)).sum().backward()

    def loss(ids):
        return (model(ids) * mx.array(weights.astype(np.float32))).sum()

    assert np.abs(np.array(model(mx.array(IDS))) - logits.detach().numpy()).max() < 1e-5
    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)(mx.array(IDS))[1]))
    wanted = {"classifier.weight": original.classifier.weight.grad}
    wanted |= {f"{n}.lora_a.weight": x.a.grad for n, x in references.items()}
    wanted |= {f"{n}.lora_b.weight": x.b.grad for n, x in references.items()}
    assert len(wanted) == 1 + 2 * 2 * 6
    assert gradients.keys() == wanted.keys() | {"classifier.bias", "pooler.weight", "pooler.bias"}
    for name, truth in wanted.items():
        truth = truth.numpy()
        error = np.abs(np.array(gradients[name]) - truth).max() / np.abs(truth).max()
        assert error < 1e-4, name


def fit(model, steps=8, seed=0):
    """Train on a batch of random labels; the losses."""
    x = inputs(model, 8, seed)
    targets = mx.array(np.random.default_rng(seed).integers(0, 3, 8))
    optimizer = optim.AdamW(learning_rate=1e-2)

    def loss(x):
        logits = model(x)
        logits = logits if logits.ndim == 2 else logits[:, -1]
        return nn.losses.cross_entropy(logits, targets, reduction="mean")

    step, losses = nn.value_and_grad(model, loss), []
    training_mode(model)
    for _ in range(steps):
        value, gradients = step(x)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, value)
        losses.append(value.item())
    model.eval()
    return losses


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("quantize", [None, {"bits": 8, "group_size": 32}])
def test_training_moves_the_adapters_and_nothing_else(name, quantize):
    if name == "vit_digits" and quantize:  # 48 dims do not divide: only fc2 of 192 does
        quantize = {"bits": 4, "group_size": 64}
    model = bundled(name, quantize=quantize)
    before = apart(model)
    choose(model, LoRA(rank=4, layers=("attn.*", "mlp.*"), head=False))
    assert all(isinstance(layer.linear.weight, mx.array) for layer in adapted(model).values())
    losses = fit(model)
    assert losses[-1] < 0.9 * losses[0]
    after = {n.replace(".linear.", "."): x for n, x in engine.parameters(model).items()}
    assert all(mx.array_equal(x, after[n]).item() for n, x in before.items())
    assert all(mx.abs(layer.lora_b.weight).max().item() > 0 for layer in adapted(model).values())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_merged_it_computes_the_same_and_is_what_it_was(name):
    model = bundled(name)
    structure = [(n, x.shape, x.dtype) for n, x in engine.parameters(model).items()]
    x = inputs(model)
    before = model(x)
    stir(add_lora(model, EVERYWHERE))
    apart_ = model(x)
    assert relative(apart_, before) > 1e-2
    assert merge_lora(model) is model
    assert relative(model(x), apart_) < 1e-6
    assert [(n, x.shape, x.dtype) for n, x in engine.parameters(model).items()] == structure
    assert names(model.trainable_parameters()) == engine.parameters(model).keys()
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model)
    choose(model, "lora")  # and again


def test_adapters_that_learnt_nothing_leave_the_original():
    model = merge_lora(add_lora(bundled("vit_digits"), EVERYWHERE))
    assert mlx_zoo.verify(model).passed


def test_merged_it_goes_back_to_transformers(bert, tmp_path):
    model = stir(add_lora(classifier(bert[1]), EVERYWHERE))
    logits = np.array(model(mx.array(IDS)))
    with pytest.raises(ValueError, match="merge_lora"):
        mlx_zoo.export(model, tmp_path / "never.safetensors")
    mlx_zoo.export(merge_lora(model), tmp_path / "merged.safetensors")
    from safetensors.torch import load_file

    original = transformers.BertForSequenceClassification(bert[0].config).eval()
    original.load_state_dict(load_file(tmp_path / "merged.safetensors"), strict=True)
    assert np.abs(original(torch.tensor(IDS)).logits.detach().numpy() - logits).max() < 1e-5


def test_adapters_beside_quantised_weights(bert):
    model = classifier(bert[1], quantize={"bits": 4, "group_size": 32})
    ids = mx.array(IDS)
    before = model(ids)
    add_lora(model, EVERYWHERE)
    assert mx.array_equal(model(ids), before).item()
    with pytest.raises(ValueError, match="merge_lora"):
        choose(model, "last-1")
    stir(model)
    with pytest.raises(ValueError, match="dequantize=True"):
        merge_lora(model)
    logits = model(ids)
    assert relative(merge_lora(model, dequantize=True)(ids), logits) < 1e-5
    plain = classifier(bert[1])
    assert engine.parameters(model).keys() == engine.parameters(plain).keys()
    assert model.quantization is None
    assert choose(classifier(bert[1], quantize=8), "lora").num_parameters == (
        choose(plain, "lora").num_parameters
    )


def test_quantised_weights_are_not_trained(bert):
    model = classifier(bert[1], quantize=8)
    for method in ("full", "last-1"):
        with pytest.raises(ValueError, match=r"is quantised and cannot be trained: method='lora'"):
            choose(model, method)
    choose(model, "head")


def test_with_adapters_it_is_neither_quantised_nor_converted_nor_verified(tmp_path):
    model = stir(add_lora(bundled("bert_docs_topic")))
    with pytest.raises(ValueError, match=r"merge_lora\(model\)"):
        mlx_zoo.quantize(model)
    with pytest.raises(ValueError, match=r"merge_lora\(model\)"):
        mlx_zoo.convert(model, tmp_path / "never")
    with pytest.raises(VerificationError, match=r"merge_lora\(model\)"):
        mlx_zoo.verify(model)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_optimised_it_computes_the_same(name):
    model = stir(add_lora(bundled(name), LoRA(layers=("attn.q_proj", "mlp.fc1"))))
    x = inputs(model, 9)
    fast = mlx_zoo.optimize_for_inference(model)
    assert relative(fast(x), model(x)) < 1e-6
    stir(model, seed=1)  # which it follows
    assert relative(fast(x), model(x)) < 1e-6


def test_generation_with_adapters():
    model = bundled("gpt2_docs")
    before = [t.token for t in mlx_zoo.generate(model, "Return the", max_tokens=8)]
    stir(add_lora(model, EVERYWHERE))
    after = [t.token for t in mlx_zoo.generate(model, "Return the", max_tokens=8)]
    assert before != after
    merge_lora(model)
    assert [t.token for t in mlx_zoo.generate(model, "Return the", max_tokens=8)] == after


# Saved and loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("quantize", [None, {"bits": 8, "group_size": 32}])
def test_an_adapter_comes_back(name, quantize, tmp_path):
    if name == "vit_digits" and quantize:
        quantize = {"bits": 8, "group_size": 64}
    model = bundled(name, quantize=quantize)
    choose(model, LoRA(rank=2, layers=("attn.*",)))
    fit(model, steps=2)
    x = inputs(model)
    folder = save_adapter(model, tmp_path / "adapter")
    assert {p.name for p in folder.iterdir()} == {"adapter.json", "adapter.safetensors"}
    by_name = load_adapter(name, folder)
    again = load_adapter(bundled(name, quantize=quantize), str(folder))
    for other in (by_name, again):
        assert mx.array_equal(other(x), model(x)).item()
        assert other.lora == model.lora
        assert not other.training
        trained = names(other.trainable_parameters())
        assert trained == names(model.trainable_parameters())
        assert other.checkpoint.labels == (
            model.checkpoint.labels if "classifier" in model or "head" in model else ()
        )
    if not quantize:
        assert relative(load_adapter(name, folder, merge=True)(x), model(x)) < 1e-6
        assert (folder / "adapter.safetensors").stat().st_size < 60_000
    save_adapter(by_name, folder)  # over it
    with pytest.raises(ValueError, match="adapters already"):
        load_adapter(by_name, folder)


def test_a_fresh_head_is_saved_with_the_adapter(tmp_path):
    options = {"task": "text-classification", "num_classes": 3, "dtype": "float32"}
    model = mlx_zoo.load("bert_docs", pretrained=True, **options)
    with pytest.raises(ValueError, match="head of this network is fresh"):
        choose(model, LoRA(head=False))
    choose(model, "lora")
    fit(model, steps=1)
    folder, x = save_adapter(model, tmp_path / "adapter"), inputs(model)
    assert mx.array_equal(load_adapter("bert_docs", folder)(x), model(x)).item()
    other = mlx_zoo.load("bert_docs", pretrained=True, **options)
    assert not mx.array_equal(other(x), model(x)).item()
    assert mx.array_equal(load_adapter(other, folder)(x), model(x)).item()


def test_an_adapter_over_quantised_weights_whose_scales_became_float32(tmp_path):
    model = mlx_zoo.load("gpt2_docs", pretrained=True, quantize={"bits": 8, "group_size": 32})
    model.set_dtype(mx.float32)  # as finetune does
    folder = save_adapter(stir(add_lora(model)), tmp_path / "adapter")
    x = inputs(model)
    assert mx.array_equal(load_adapter("gpt2_docs", folder)(x), model(x)).item()


def test_what_would_be_lost_is_not_saved(tmp_path):
    model = bundled("bert_docs_topic")
    with pytest.raises(ValueError, match=r"add_lora\(model\) first"):
        save_adapter(model, tmp_path)
    add_lora(model)
    model.norm.unfreeze()
    with pytest.raises(ValueError, match=r"norm\.bias is trained, too"):
        save_adapter(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.fixture
def adapter(tmp_path):
    return save_adapter(stir(add_lora(bundled("bert_docs_topic"))), tmp_path / "adapter")


def other_weights(**options):
    model = bundled("bert_docs_topic", **options)
    model.blocks[1].mlp.fc1.bias = model.blocks[1].mlp.fc1.bias + 1e-3
    return model


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: bundled("vit_digits"), "adapter of a bert, not of a vit"),
        (lambda: bundled("bert_docs_topic", dtype="bfloat16"), "dtype float32, not bfloat16"),
        (lambda: bundled("bert_docs_topic", quantize=8), r"quantization None, not \{'bits': 8"),
        (lambda: mlx_zoo.load("bert_docs", pretrained=True, task="fill-mask"), "task='text-class"),
        (other_weights, "other weights than this network has; by name and source they are the s"),
        (
            lambda: mlx_zoo.load("bert_base", task="text-classification", num_layers=1),
            "another network: it has dims=64, not 768",
        ),
        (
            lambda: mlx_zoo.load(
                "bert_docs", pretrained=True, task="text-classification", num_classes=7,
                dtype="float32",
            ),
            "name bert_docs_topic, not bert_docs",
        ),
    ],
)  # fmt: skip
def test_another_base_is_refused_and_stays_what_it_was(adapter, base, message):
    model = base()
    before = engine.parameters(model).keys()
    with pytest.raises(MLXZooError, match=message):
        load_adapter(model, adapter)
    assert engine.parameters(model).keys() == before


def rewritten(change):
    """A change of what adapter.json says."""

    def write(folder):
        said = json.loads((folder / "adapter.json").read_text())
        change(said)
        (folder / "adapter.json").write_text(json.dumps(said))

    return write


def retensored(change):
    """A change of the tensors, which adapter.json then knows of."""

    def write(folder):
        tensors = mx.load(str(folder / "adapter.safetensors"))
        mx.eval(tensors)
        change(tensors)
        sha256 = write_safetensors(folder / "adapter.safetensors", tensors, {})
        rewritten(lambda said: said.update(sha256=sha256))(folder)

    return write


A = "blocks.0.attn.q_proj.lora_a.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "adapter.json").write_text("[]"), "instead of a dict"),
        (lambda folder: (folder / "adapter.json").write_text("[" * 10**5), "not JSON"),
        (lambda folder: (folder / "adapter.safetensors").write_bytes(b"x" * 99), "safetensors"),
        (rewritten(lambda said: said.update(format=2)), "format 2"),
        (rewritten(lambda said: said.pop("lora")), "should have"),
        (rewritten(lambda said: said.update(more=1)), "should have"),
        (rewritten(lambda said: said.update(base="bert")), "base should be a dict"),
        (rewritten(lambda said: said.update(labels=[1])), "labels should be texts"),
        (rewritten(lambda said: said.update(labels=["a"])), "1 labels"),
        (rewritten(lambda said: said["lora"].update(rank=2**16)), "rank=65536"),
        (rewritten(lambda said: said["lora"].update(rank=True)), "rank=True"),
        (rewritten(lambda said: said["lora"].update(layers=["nowhere"])), "layers='nowhere'"),
        (rewritten(lambda said: said["lora"].update(layers="*")), "are needed"),
        (rewritten(lambda said: said["lora"].update(alpha="16")), "alpha='16'"),
        (rewritten(lambda said: said["lora"].update(rank=4)), "has shape"),
        (rewritten(lambda said: said.update(sha256="0" * 64)), "is not the file"),
        (rewritten(lambda said: said["base"].update(architecture="x")), "no architecture 'x'"),
        (rewritten(lambda said: said["base"].update(dtype="int8")), "dtype='int8'"),
        (
            rewritten(lambda said: said["base"]["config"].update(num_classes=2**27)),
            "classes|labels",
        ),
        (rewritten(lambda said: said["base"]["config"].update(task=["x"])), "no such network"),
        (rewritten(lambda said: said["base"].update(quantization={"bits": "4"})), "bits='4'"),
        (retensored(lambda x: x.pop(A)), f"{A} is missing"),
        (retensored(lambda x: x.update(evil=x[A])), "no home for evil"),
        (retensored(lambda x: x.update({A: x[A][:4]})), "has shape"),
        (retensored(lambda x: x.update({A: x[A] * math.nan})), "NaN"),
        (retensored(lambda x: x.update({A: x[A].astype(mx.int32)})), "floats belong"),
    ],
)
def test_damaged_adapters(adapter, damage, message):
    damage(adapter)
    with pytest.raises(CheckpointError, match=message):
        load_adapter("bert_docs_topic", adapter)


def test_what_does_not_fit_is_taken_off_again(adapter):
    retensored(lambda x: x.pop(A))(adapter)
    model = bundled("bert_docs_topic")
    before = model(inputs(model))
    with pytest.raises(CheckpointError, match="missing"):
        load_adapter(model, adapter)
    assert not adapted(model)
    assert model.lora is None
    assert mx.array_equal(model(inputs(model)), before).item()
    assert names(model.trainable_parameters()) == engine.parameters(model).keys()


def test_options_are_for_a_name(adapter, tmp_path):
    load_adapter("bert_docs_topic", adapter, cache_dir=tmp_path / "own")
    assert (tmp_path / "own").is_dir()
    with pytest.raises(ValueError, match="cache_dir: of a network that is loaded already"):
        load_adapter(bundled("bert_docs_topic"), adapter, cache_dir=tmp_path)


def test_a_layer_alone():
    linear = nn.Linear(6, 5)
    layer = LoRALinear(linear, LoRA(rank=2, alpha=3.0))
    layer.lora_b.weight = mx.random.normal((5, 2))
    x = mx.random.normal((4, 6))
    wanted = x @ linear.weight.T + linear.bias
    wanted = wanted + 1.5 * (x @ layer.lora_a.weight.T @ layer.lora_b.weight.T)
    assert relative(layer(x), wanted) < 1e-6
    assert mx.abs(layer.lora_a.weight).max().item() <= 6**-0.5
