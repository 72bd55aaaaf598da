"""The mapping engine: its small language, its complaints, its inverses, and mutants it must catch.

Networks and specs come from the registry where a law is for all of them. A mutant is caught by
coverage (a MappingError, before any weight is used) or by parity (the outputs are others).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from itertools import combinations, cycle, pairwise, permutations, product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from originals import randomise

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.errors import MappingError
from mlx_zoo.mapping import engine, layout
from mlx_zoo.mapping.engine import links, mismatches, to_mlx, to_torch
from mlx_zoo.mapping.spec import Conv1D, Spec, Split, qkv
from mlx_zoo.models.layers import Attention
from mlx_zoo.verify import compare, verify
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402


class Net(nn.Module):
    """A network of whatever children it is given."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self[name] = child


def linear(out_dims=2, in_dims=3):
    return nn.Linear(in_dims, out_dims)


def values(*shape, seed=0, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype)


def sources(model, spec):
    """Our name -> upstream's."""
    return {target: link.source for link in links(model, spec) for target in link.targets}


def upstream(model, spec, seed=0):
    """A state dict that `spec` maps onto `model`, every tensor another."""
    table = links(model, spec)
    return {
        link.source: values(*link.upstream_shape, seed=seed + i) for i, link in enumerate(table)
    }


def problems(state, model, spec=None):
    with pytest.raises(MappingError) as caught:
        to_mlx(state, model, spec or Spec())
    return caught.value.problems


def same(a, b):
    np.testing.assert_array_equal(np.array(a), np.array(b))


# The language -----------------------------------------------------------------------------------


def test_a_layer_without_a_row_keeps_its_name():
    model = Net(fc=linear(), blocks=[Net(norm=nn.LayerNorm(3)), Net(norm=nn.LayerNorm(3))])
    assert all(ours == theirs for ours, theirs in sources(model, Spec()).items())


def test_a_letter_stands_for_a_number_of_any_length():
    model = Net(blocks=[Net(fc1=linear()) for _ in range(12)])
    names = sources(model, Spec(layers={"h.{i}.c_fc": "blocks.{i}.fc1"}))
    for i in range(12):
        assert names[f"blocks.{i}.fc1.weight"] == f"h.{i}.c_fc.weight"
        assert names[f"blocks.{i}.fc1.bias"] == f"h.{i}.c_fc.bias"


def test_a_letter_stands_for_nothing_but_a_number():
    model = Net(blocks=Net(first=linear(), fc=linear()))
    spec = Spec(layers={"h.{i}": "blocks.{i}"})
    assert sources(model, spec)["blocks.first.weight"] == "blocks.first.weight"


def test_numbers_may_be_counted_from_another_start():
    model = Net(layer0=linear(), layer1=linear(), layer2=linear())
    names = sources(model, Spec(layers={"stages.{s}": "layer{s+1}"}))
    assert names["layer1.weight"] == "stages.0.weight"
    assert names["layer2.weight"] == "stages.1.weight"
    assert names["layer0.weight"] == "layer0.weight", "there is no stage -1"

    model = Net(blocks=[linear(), linear()])
    names = sources(model, Spec(layers={"enc{i+7}.x": "blocks.{i}"}))
    assert names["blocks.1.bias"] == "enc8.x.bias"


def test_several_letters_in_one_row():
    model = Net(layer1=[Net(conv1=linear(), conv2=linear())], layer2=[Net(conv1=linear())] * 2)
    names = sources(model, Spec(layers={"s.{s}.l.{l}.c.{j}": "layer{s+1}.{l}.conv{j+1}"}))
    assert names["layer1.0.conv2.weight"] == "s.0.l.0.c.1.weight"
    assert names["layer2.1.conv1.weight"] == "s.1.l.1.c.0.weight"


def test_one_letter_is_one_number():
    model = Net(a=[Net(b=[linear(), linear()]), Net(b=[linear(), linear()])])
    names = sources(model, Spec(layers={"diagonal.{i}": "a.{i}.b.{i}"}))
    assert names["a.1.b.1.weight"] == "diagonal.1.weight"
    assert names["a.0.b.1.weight"] == "a.0.b.1.weight"


def test_a_row_is_anchored_at_both_ends():
    inner = Net(fc=linear(), fc2=linear())
    model = Net(fc=linear(), fc2=linear(), head=inner, xfc=linear(), fcs=Net(fc=Net(fc=linear())))
    changed = {a: b for a, b in sources(model, Spec(layers={"last": "fc"})).items() if a != b}
    assert changed == {"fc.weight": "last.weight", "fc.bias": "last.bias"}


@pytest.mark.parametrize("row", ["a.b", "a+", "(a)", "a|b", "[ab]", "^a$", "a?", r"\w", "a*"])
def test_a_name_is_not_a_regular_expression(row):
    model = Net(**{"axb": linear(), "a": linear(), "aa": linear(), "b": linear(), row: linear()})
    if "." in row:
        model.pop(row)
        model.a = Net(b=linear())
    changed = {a: b for a, b in sources(model, Spec(layers={"new+(x)": row})).items() if a != b}
    assert changed == {f"{row}.{leaf}": f"new+(x).{leaf}" for leaf in ("weight", "bias")}


def test_two_rows_for_one_layer_are_refused_by_name():
    model = Net(blocks=[linear()])
    spec = Spec(layers={"h.{i}": "blocks.{i}", "first": "blocks.0"})
    with pytest.raises(
        MappingError, match=r"two rows .* blocks\.0\.weight: first\.weight and h\.0\.weight"
    ):
        links(model, spec)


@pytest.mark.parametrize(
    "layers",
    [{"h": "blocks.{i}"}, {"h.0": "blocks.{i}", "h": "other"}, {"blocks.0": "other"}],
    ids=str,
)
def test_one_tensor_for_two_layers_is_refused(layers):
    model = Net(blocks=[linear(), linear()], other=linear())
    with pytest.raises(MappingError, match="from one tensor"):
        links(model, Spec(layers=layers))


@pytest.mark.parametrize("source", ["h.{j}", "h.{i}.{j+1}"])
def test_a_letter_that_our_side_does_not_say_is_refused(source):
    with pytest.raises(MappingError, match="does not say j"):
        links(Net(blocks=[linear()]), Spec(layers={source: "blocks.{i}"}))


# Rows of every type -----------------------------------------------------------------------------


def attention(dims=4, kv_dims=4):
    return Net(q_proj=linear(dims, 4), k_proj=linear(kv_dims, 4), v_proj=linear(kv_dims, 4))


@pytest.mark.parametrize("kv_dims", [4, 2], ids=["equal", "grouped queries"])
def test_a_fused_layer_splits_in_order_on_its_output_axis(kv_dims):
    model = Net(blocks=[Net(attn=attention(4, kv_dims)) for _ in range(2)])
    spec = Spec(layers={"h.{i}.qkv": qkv("blocks.{i}.attn")})
    state = upstream(model, spec)
    assert state["h.1.qkv.weight"].shape == (4 + 2 * kv_dims, 4)
    weights = to_mlx(state, model, spec)
    ends = [0, 4, 4 + kv_dims, 4 + 2 * kv_dims]
    for leaf in ("weight", "bias"):
        for part, (start, end) in zip("qkv", pairwise(ends), strict=True):
            piece = state[f"h.1.qkv.{leaf}"][start:end]
            same(weights[f"blocks.1.attn.{part}_proj.{leaf}"], piece)
    back = to_torch(weights, model, spec)
    assert back.keys() == state.keys()
    for name in state:
        same(back[name], state[name])


def test_the_parts_of_a_split_are_in_the_order_of_the_row():
    model = Net(attn=attention())
    spec = Spec(layers={"kvq": Split("attn", ("k_proj", "v_proj", "q_proj"))})
    state = upstream(model, spec)
    same(to_mlx(state, model, spec)["attn.q_proj.bias"], state["kvq.bias"][8:])


def test_a_split_whose_part_is_not_there_is_refused():
    model = Net(attn=Net(q_proj=linear(), v_proj=linear()))
    with pytest.raises(MappingError, match="from one tensor"):
        links(model, Spec(layers={"c_attn": qkv("attn")}))


GPT2 = Spec(
    prefix="transformer.",
    layers={
        "h.{i}.attn.c_attn": Conv1D(qkv("blocks.{i}.attn")),
        "h.{i}.attn.c_proj": Conv1D("blocks.{i}.attn.out_proj"),
        "h.{i}.mlp.c_fc": Conv1D("blocks.{i}.fc1"),
    },
    tied={"lm_head": "wte"},
    drop=("h.{i}.attn.bias", "h.{i}.attn.masked_bias"),
)


def gpt2(dims=8):
    blocks = [Net(attn=Attention(dims, 2), fc1=linear(3 * dims, dims)) for _ in range(2)]
    return Net(wte=nn.Embedding(11, dims), blocks=blocks)


def test_conv1d_is_what_transformers_stores():
    original = randomise(
        transformers.GPT2Model(
            transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_inner=24)
        )
    )
    c_attn, c_proj = original.h[1].attn.c_attn, original.h[1].attn.c_proj
    torch.nn.init.normal_(c_attn.weight)
    torch.nn.init.normal_(c_proj.weight)
    state = {
        name: mx.array(x.detach().numpy())
        for name, x in original.state_dict().items()
        if "ln_" not in name and "wpe" not in name and "mlp.c_proj" not in name
    }
    model = gpt2()
    model.load_weights(list(to_mlx(state, model, GPT2).items()))
    x = values(5, 8)
    with torch.no_grad():
        fused = c_attn(torch.from_numpy(np.array(x)))
        projected = c_proj(torch.from_numpy(np.array(x)))
    attn = model.blocks[1].attn
    ours = mx.concatenate([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], axis=1)
    np.testing.assert_allclose(ours, fused, atol=1e-5)
    np.testing.assert_allclose(attn.out_proj(x), projected, atol=1e-5)


def test_conv1d_and_split_go_back_bit_for_bit():
    model = gpt2()
    state = upstream(model, GPT2)
    assert state["h.0.attn.c_attn.weight"].shape == (8, 24)
    assert state["h.0.mlp.c_fc.weight"].shape == (8, 24)
    assert state["h.0.attn.c_attn.bias"].shape == (24,)
    back = to_torch(to_mlx(state, model, GPT2), model, GPT2)
    assert back.keys() == state.keys()
    for name in state:
        same(back[name], state[name])


def test_conv1d_of_a_square_matrix_is_seen_by_its_values_only():
    model = gpt2()
    state = upstream(model, GPT2)
    right = to_mlx(state, model, GPT2)
    rows = {**GPT2.layers, "h.{i}.attn.c_proj": "blocks.{i}.attn.out_proj"}
    wrong = to_mlx(state, model, replace(GPT2, layers=rows))
    same(wrong["blocks.0.attn.out_proj.weight"], right["blocks.0.attn.out_proj.weight"].T)
    rows = {**GPT2.layers, "h.{i}.mlp.c_fc": "blocks.{i}.fc1"}
    assert "h.{0..1}.mlp.c_fc.weight (2 tensors) has shape (8, 24)" in "".join(
        problems(state, model, replace(GPT2, layers=rows))
    )


def test_bare_tensors():
    model = Net(cls_token=mx.zeros((1, 4)), head=Net(bias=mx.zeros(3)), embed=Net(pos=mx.zeros(2)))
    spec = Spec(layers={"cls": "cls_token", "predictions.bias": "head.bias"})
    assert sources(model, spec) == {
        "cls_token": "cls",
        "head.bias": "predictions.bias",
        "embed.pos": "embed.pos",
    }
    state = upstream(model, spec)
    same(to_mlx(state, model, spec)["head.bias"], state["predictions.bias"])


@pytest.mark.parametrize("tied", [{"lm_head": "wte"}, {"lm_head.weight": "wte.weight"}], ids=str)
def test_a_tied_tensor_is_dropped_where_it_is_equal_and_stands_in_where_alone(tied):
    model, spec = Net(wte=nn.Embedding(5, 3)), Spec(tied=tied)
    table = values(5, 3)
    for state in (
        {"wte.weight": table},
        {"wte.weight": table, "lm_head.weight": table + 0},
        {"lm_head.weight": table, "wte.weight": table + 0},
        {"lm_head.weight": table},
    ):
        weights = to_mlx(state, model, spec)
        assert weights.keys() == {"wte.weight"}
        same(weights["wte.weight"], table)
    assert to_torch(weights, model, spec).keys() == {"wte.weight"}


@pytest.mark.parametrize("other", [values(5, 3, seed=1), values(5, 3)[:4], values(3, 5)])
def test_a_tied_tensor_that_differs_is_refused(other):
    state = {"wte.weight": values(5, 3), "lm_head.weight": other}
    found = problems(state, Net(wte=nn.Embedding(5, 3)), Spec(tied={"lm_head": "wte"}))
    assert found == ("lm_head.weight differs from wte.weight, to which it is tied",)


def test_one_bit_is_a_difference_and_nan_is_not():
    table = np.array(values(5, 3))
    table[0, 0] = np.nan
    other = table.copy()
    model, spec = Net(wte=nn.Embedding(5, 3)), Spec(tied={"lm_head": "wte"})
    state = {"wte.weight": mx.array(table), "lm_head.weight": mx.array(other)}
    assert to_mlx(state, model, spec)
    other[4, 2] = np.nextafter(other[4, 2], np.float32(9))
    assert "differs" in problems({**state, "lm_head.weight": mx.array(other)}, model, spec)[0]


def test_a_spare_tensor_fills_a_gap_and_is_unused_otherwise():
    model = Net(head=Net(bias=mx.zeros(3)))
    spec = Spec(spare={"predictions.bias": "head.bias"})
    own, spare = values(3), values(3, seed=1)
    same(to_mlx({"head.bias": own, "predictions.bias": spare}, model, spec)["head.bias"], own)
    same(to_mlx({"predictions.bias": spare}, model, spec)["head.bias"], spare)
    assert problems({}, model, spec) == ("nothing fills head.bias",)


def test_what_is_dropped_is_said_by_name():
    model = Net(bn=nn.Linear(1, 1))
    state = {"bn.weight": values(1, 1), "bn.bias": values(1)}
    spec = Spec(drop=("*.num_batches_tracked", "h.{i}.attn.bias", "mask"))
    extra = ("bn.num_batches_tracked", "a.b.num_batches_tracked", "h.0.attn.bias", "h.11.attn.bias")
    many = {**state, **{name: mx.zeros(1) for name in (*extra, "mask")}}
    assert to_mlx(many, model, spec).keys() == state.keys()
    for name in ("num_batches_tracked_too", "h.x.attn.bias", "h.0.1.attn.bias", "mask.weight"):
        assert problems({**many, name: mx.zeros(1)}, model, spec) == (f"no home for {name}",)


def test_to_drop_is_not_to_do_without():
    model, spec = Net(fc=linear()), Spec(drop=("fc.*",))
    assert problems({}, model, spec) == ("nothing fills fc.weight", "nothing fills fc.bias")


def test_old_leaf_names_belong_to_one_kind_of_layer():
    model = Net(body=Net(norm=nn.LayerNorm(3)), LayerNorm=nn.LayerNorm(3), NotLayerNorm=linear())
    spec = Spec(
        layers={"emb.LayerNorm": "body.norm"},
        leaves={"LayerNorm.gamma": "weight", "LayerNorm.beta": "bias"},
    )
    assert sources(model, spec) == {
        "body.norm.weight": "emb.LayerNorm.gamma",
        "body.norm.bias": "emb.LayerNorm.beta",
        "LayerNorm.weight": "LayerNorm.gamma",
        "LayerNorm.bias": "LayerNorm.beta",
        "NotLayerNorm.weight": "NotLayerNorm.weight",
        "NotLayerNorm.bias": "NotLayerNorm.bias",
    }


def test_the_prefix_may_be_there_or_not():
    model, spec = Net(body=linear(), cls=linear()), Spec(prefix="bert.", heads=("cls",))
    state = upstream(model, spec)
    plain = to_mlx(state, model, spec)
    full = to_mlx({f"bert.{n}" if "body" in n else n: x for n, x in state.items()}, model, spec)
    half = to_mlx(
        {f"bert.{n}" if n == "body.bias" else n: x for n, x in state.items()}, model, spec
    )
    for name in plain:
        same(plain[name], full[name])
        same(plain[name], half[name])
    (found,) = problems({**state, "bert.body.bias": state["body.bias"]}, model, spec)
    assert found == "body.bias and bert.body.bias are the same tensor twice"
    (found, _) = problems({f"x.{n}": x for n, x in state.items() if "body" in n}, Net(), spec)
    assert found == "no home for x.body.weight", "a prefix is at the front, and no other"


def test_a_network_with_a_head_is_exported_with_the_prefix():
    spec = Spec(prefix="bert.", heads=("cls",))
    body, whole = Net(body=linear()), Net(body=linear(), cls=Net(dense=linear()), clsx=linear())
    assert to_torch(engine.parameters(body), body, spec).keys() == {"body.weight", "body.bias"}
    assert to_torch(engine.parameters(whole), whole, spec).keys() == {
        "bert.body.weight",
        "bert.body.bias",
        "cls.dense.weight",
        "cls.dense.bias",
        "bert.clsx.weight",
        "bert.clsx.bias",
    }


# What does not fit ------------------------------------------------------------------------------


def fc(*shape, bias=True, **others):
    return {
        "fc.weight": values(*shape),
        **({"fc.bias": values(shape[0])} if bias else {}),
        **others,
    }


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (fc(2, 3, gc=mx.zeros(1)), ["no home for gc"]),
        (fc(2, 3, bias=False), ["nothing fills fc.bias"]),
        (
            fc(4, 3),
            [
                "fc.weight has shape (4, 3), the network needs (2, 3): "
                "another num_classes, or another variant?",
                "fc.bias has shape (4,), the network needs (2,): "
                "another num_classes, or another variant?",
            ],
        ),
        (
            fc(2, 4),
            ["fc.weight has shape (2, 4), the network needs (2, 3): another variant?"],
        ),
        (
            {**fc(2, 3), "fc.weight": mx.zeros((2, 3, 1))},
            ["fc.weight has shape (2, 3, 1), the network needs (2, 3): another variant?"],
        ),
        (
            {**fc(2, 3), "fc.bias": mx.zeros(())},
            ["fc.bias has shape (), the network needs (2,): another variant?"],
        ),
        (
            {**fc(2, 3), "fc.bias": mx.zeros(2, dtype=mx.int64)},
            ["fc.bias holds int64, where floats belong"],
        ),
        (
            {**fc(2, 3), "fc.bias": mx.zeros(2, dtype=mx.bool_)},
            ["fc.bias holds bool, where floats belong"],
        ),
    ],
)
def test_every_kind_of_misfit_is_said(state, found):
    model = Net(fc=linear())
    assert list(problems(state, model)) == found
    assert list(mismatches(state, model, Spec())) == found
    assert mismatches(fc(2, 3), model, Spec()) == ()


def test_a_convolution_of_other_channels_is_said():
    model = Net(conv1=nn.Conv2d(3, 8, 7, bias=False))
    (found,) = problems({"conv1.weight": mx.zeros((8, 1, 7, 7))}, model)
    assert found.endswith("the network needs (8, 3, 7, 7): another in_chans, or another variant?")
    (found,) = problems({"conv1.weight": mx.zeros((8, 3, 5, 5))}, model)
    assert found.endswith("the network needs (8, 3, 7, 7): another variant?")


def test_a_tensor_in_mlx_layout_is_refused():
    (found,) = problems(
        {"conv1.weight": mx.zeros((8, 7, 7, 3))}, Net(conv1=nn.Conv2d(3, 8, 7, 1, 0, 1, 1, False))
    )
    assert "has shape (8, 7, 7, 3), the network needs (8, 3, 7, 7)" in found


def test_all_problems_come_at_once_with_their_numbers_collapsed():
    model = Net(blocks=[Net(fc=linear(), norm=nn.LayerNorm(3)) for _ in range(12)], wte=linear())
    spec = Spec(layers={"h.{i}.c_fc": "blocks.{i}.fc"}, tied={"lm_head": "wte"})
    state = upstream(model, spec)
    for i in range(12):
        del state[f"h.{i}.c_fc.weight"]
        state[f"h.{i}.attn.scale"] = mx.zeros(1)
        state[f"blocks.{i}.norm.weight"] = mx.zeros(4)
    state["blocks.3.norm.bias"] = mx.zeros(3, dtype=mx.int32)
    state["lm_head.weight"] = state["wte.weight"] + 1
    with pytest.raises(MappingError) as caught:
        to_mlx(state, model, spec)
    assert caught.value.problems == (
        "no home for h.{0..11}.attn.scale (12 tensors)",
        "nothing fills h.{0..11}.c_fc.weight (our blocks.{0..11}.fc.weight) (12 tensors)",
        "blocks.{0..11}.norm.weight (12 tensors) has shape (4,), the network needs (3,): "
        "another num_classes, or another variant?",
        "blocks.3.norm.bias holds int32, where floats belong",
        "lm_head.weight differs from wte.weight, to which it is tied",
    )
    lines = str(caught.value).splitlines()
    assert lines[0] == "this checkpoint does not fit the network: 5 problems"
    assert [line.strip() for line in lines[1:]] == list(caught.value.problems)


def test_names_of_other_words_are_not_collapsed():
    assert list(engine.collapse(["a.0.x", "b.1.x", "a.2.x", "c", "a.0.y"])) == [
        "a.{0..2}.x (2 tensors)",
        "b.1.x",
        "c",
        "a.0.y",
    ]


def test_float64_becomes_float32_and_is_logged(caplog):
    exact = np.random.default_rng(0).standard_normal((2, 3))
    with mx.stream(mx.cpu):
        state = fc(2, 3)
        state["fc.weight"] = mx.array(exact, dtype=mx.float64)
        assert state["fc.weight"].dtype == mx.float64
    weights = to_mlx(state, Net(fc=linear()), Spec())
    assert weights["fc.weight"].dtype == mx.float32
    same(weights["fc.weight"], exact.astype(np.float32))
    assert "1 float64 tensors become float32, fc.weight first" in caplog.text


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_kept(dtype, caplog):
    state = {name: x.astype(dtype) for name, x in fc(2, 3).items()}
    assert {x.dtype for x in to_mlx(state, Net(fc=linear()), Spec()).values()} == {dtype}
    assert not caplog.text


# There and back, for every network of the registry ----------------------------------------------

SMALL = {
    "depths": (2, 1),
    "widths": (32, 64),  # group norms want multiples of 32
    "stem_width": 32,
    "head_width": 24,
    "expansion": 2,
    "squeeze": 0.25,
    "img_size": 8,
    "patch_size": 4,
    "num_registers": 2,
    "dims": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dims": 24,
    "vocab_size": 29,
    "max_positions": 12,
    "num_classes": 5,
}
# As many equal shapes as can be: what coverage cannot tell apart.
SQUARE = {
    **SMALL,
    "depths": (2, 2),
    "widths": (32, 32),
    "expansion": 1,
    "squeeze": 1.0,
    "num_registers": 1,
    **dict.fromkeys(("stem_width", "head_width", "dims", "mlp_dims", "num_classes"), 32),
    **dict.fromkeys(("vocab_size", "max_positions", "type_vocab_size"), 32),
}


MASKED = ("fill-mask", "pretraining")  # whose decoder may be tied to the word embeddings


def sized(config, sizes):
    """`config` with these sizes of what it has: where there are no registers, none are added."""
    changes = {name: size for name, size in sizes.items() if getattr(config, name, None)}
    if hasattr(config, "stages"):  # one of each kind, and the last: a name must tell alike apart
        *others, last = config.stages
        stages = [*{stage.kind: stage for stage in others}.values(), last]
        changes["stages"] = tuple(
            sized(stage, {**sizes, "depth": depth, "width": width, "hidden": (), "squeezed": ()})
            for stage, depth, width in zip(
                stages, cycle(sizes["depths"]), cycle(sizes["widths"]), strict=False
            )
        )
    return replace(config, **changes)


def configs(architecture, sizes):
    """Small configs of a family: each variant, with every head and without, tied and not."""
    for name, variant in architecture.variants.items():
        config = sized(variant, sizes)
        if hasattr(config, "task"):
            for task, tied in product((None, *architecture.tasks), (True, False)):
                words = f"{name} {task or 'body'}{'' if tied else ' untied'}"
                yield words, replace(config, task=task, tied=tied)
        else:
            yield name, config
            yield f"{name} without head", architecture.without_head(config)
        if hasattr(config, "dense"):
            layers = ({"in_dims": config.dims, "out_dims": config.dims},) * config.num_layers
            yield f"{name} dense", replace(config, task="sentence-embedding", dense=layers)
        if getattr(config, "dist_head", False):  # transformers' DeiT
            yield f"{name} one head", replace(config, dist_head=False)


def tensors(model):
    return ((name, x.shape) for name, x in engine.parameters(model).items())


@cache
def kinds(family, square=False):
    """Small networks of a family, no two with the same tensors: (name, config, model)."""
    architecture = registry.architectures()[family]
    names, found = {}, {}
    for name, config in configs(architecture, SQUARE if square else SMALL):
        names.setdefault(config, name)
    for config, name in names.items():
        model = architecture.model(config)
        key = (getattr(config, "tied", None), *tensors(model))
        found.setdefault(key, (name, config, model))
    return found.values()


def is_natural(dialect, spec, config, model):
    """Whether a publisher's file of such a network would be read by that spec."""
    if getattr(config, "task", None) in MASKED:
        return config.tied != ("cls.predictions.decoder" in spec.layers)
    if dialect == "timm" or not spec.layers or not hasattr(config, "in_chans"):
        return True
    # Others than timm write every layer of an image's network in their own way.
    return all(
        link.targets != (link.source,) or link.source.rpartition(".")[0] in spec.heads
        for link in links(model, spec)
    )


def networks(family, dialect, square=False):
    """The small networks of a dialect, one of each kind: (name, spec, config, model)."""
    architecture = registry.architectures()[family]
    found = {}
    for name, config, model in kinds(family, square):
        spec = architecture.spec(dialect, config)
        if is_natural(dialect, spec, config, model):
            key = (spec.fingerprint, *tensors(model))
            found.setdefault(key, (name, spec, config, model))
    return [*found.values()]


# (family, dialect); of dialects that are one spec, the last.
DIALECTS = {
    (family, id(spec)): (family, dialect)
    for family, architecture in registry.architectures().items()
    for dialect, spec in architecture.dialects.items()
}.values()


def cases():
    """Each kind of network by each of its dialects."""
    for family, dialect in DIALECTS:
        for name, spec, config, _ in networks(family, dialect):
            yield pytest.param(family, spec, config, id=f"{family}-{dialect}-{name}")


UNSIGNED = {
    mx.float32: (np.uint32, mx.uint32),
    mx.float16: (np.uint16, mx.uint16),
    mx.bfloat16: (np.uint16, mx.uint16),
}


def random_bits(shape, dtype, rng):
    """Any bits at all: infinities, subnormals and every NaN."""
    kind = UNSIGNED[dtype][0]
    return mx.array(rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)).view(dtype)


def same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype, name
        kind = UNSIGNED[x.dtype][1]
        np.testing.assert_array_equal(
            np.array(found[name].view(kind)), np.array(x.view(kind)), err_msg=name
        )


def an_instance(pattern):
    """A name that fits a pattern of `drop`."""
    return pattern.replace("*", "x").replace("{i}", "1")


def twins(rows, state):
    """The tensors of `tied` or `spare`, with those of `state` that they are or stand for."""
    for source, twin in rows.items():
        leaves = [""] if twin in state else [".weight", ".bias"]
        yield from ((source + leaf, twin + leaf) for leaf in leaves if twin + leaf in state)


def with_extras(state, spec):
    """The state dict with what the spec lets be there, too: buffers and tied tensors."""
    plain = {name.removeprefix(spec.prefix): x for name, x in state.items()}
    extras = {an_instance(pattern): mx.arange(3) for pattern in spec.drop}
    extras |= {source: plain[twin] for source, twin in twins(spec.tied, plain)}
    return {**{name: x for name, x in extras.items() if name not in plain}, **state}


@pytest.mark.parametrize("dtype", UNSIGNED, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize(("family", "spec", "config"), [*cases()])
def test_there_and_back_bit_for_bit(family, spec, config, dtype):
    model = registry.architectures()[family].model(config)
    rng = np.random.default_rng(0)
    own = engine.parameters(model)
    shapes = {link.source: link.upstream_shape for link in links(model, spec)}
    names = to_torch(own, model, spec).keys()
    state = {n: random_bits(shapes[n.removeprefix(spec.prefix)], dtype, rng) for n in names}

    weights = to_mlx(with_extras(state, spec), model, spec)
    assert {n: x.shape for n, x in weights.items()} == {n: x.shape for n, x in own.items()}
    same_bits(to_torch(weights, model, spec), state)

    weights = {name: random_bits(x.shape, dtype, rng) for name, x in own.items()}
    same_bits(to_mlx(to_torch(weights, model, spec), model, spec), weights)


def small_bert(**options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "vocab_size": 29, "max_position_embeddings": 12}
    return transformers.BertConfig(**{**sizes, **options})


def bert_originals():
    """Every class of transformers that ours stands for, and whether its decoder is tied."""
    bert = registry.architectures()["bert"]
    for name, task in bert.classes.items():
        for tied in (True, False):
            dialect = "transformers" if tied else "transformers, untied"
            if name != "BertLMHeadModel" and (tied or task in ("fill-mask", "pretraining")):
                kind = getattr(transformers, name)
                yield pytest.param(kind, task, tied, dialect, id=f"{name}, tied={tied}")


def original_state(original, rng):
    """Random bits by the names and shapes of a PyTorch network; tied tensors have the same."""
    state, known = {}, {}
    for name, x in original.state_dict().items():
        if not x.is_floating_point():
            state[name] = mx.array(x.numpy())
            continue
        key = (x.data_ptr(), tuple(x.shape))
        known.setdefault(key, random_bits(tuple(x.shape), mx.float32, rng))
        state[name] = known[key]
    return state


def goes_back(state, model, spec, unused=()):
    """Every tensor of a PyTorch state dict, but for those that have no use here."""
    wanted = {name: x for name, x in state.items() if not name.endswith(tuple(unused))}
    assert len(wanted) < len(state) or not unused
    same_bits(to_torch(to_mlx(state, model, spec), model, spec), wanted)


@pytest.mark.parametrize(("kind", "task", "tied", "dialect"), [*bert_originals()])
def test_bert_goes_back_to_the_names_of_its_original(kind, task, tied, dialect):
    architecture = registry.architectures()["bert"]
    config = small_bert(tie_word_embeddings=tied)
    state = original_state(kind(config), np.random.default_rng(0))
    ours = replace(architecture.read_config(config.to_dict()), task=task)
    model = architecture.model(architecture.fit(ours, frozenset(state)))
    spec = architecture.spec(dialect, config)
    goes_back(state, model, spec, state.keys() & {*spec.tied, *spec.spare})


@pytest.mark.parametrize(
    ("library", "name"),
    [
        *product(("torchvision", "timm", "transformers"), ("resnet18", "resnet50")),
        ("torchvision", "wide_resnet50_2"),
        ("timm", "resnext50_32x4d"),
        ("timm", "resnetrs50"),
    ],
)
def test_resnet_goes_back_to_the_names_of_its_original(library, name):
    architecture = registry.architectures()["resnet"]
    config = architecture.variants[name]
    if library == "transformers":
        options = {"layer_type": config.block, "depths": config.depths}
        options["hidden_sizes"] = [w * (1 if config.block == "basic" else 4) for w in config.widths]
        published = transformers.ResNetConfig(**options, num_labels=7)
        original = transformers.ResNetForImageClassification(published)
        config = architecture.read_config(published.to_dict())
    elif library == "timm":
        original = timm.create_model(name)
    else:
        original = torchvision.models.get_model(name)
    state = original_state(original, np.random.default_rng(0))
    model, spec = architecture.model(config), architecture.spec(library, config)
    goes_back(state, model, spec, ["num_batches_tracked"])


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_base_patch16_224_miil",  # no bias of q, k, v
        "vit_base_patch16_clip_224",  # a norm before, patches without bias
        "vit_base_patch16_siglip_224",  # attention pooling
        "vit_small_patch14_reg4_dinov2",  # registers, LayerScale
        "vit_giant_patch14_dinov2",  # SwiGLU
        "vit_wee_patch16_reg1_gap_256",  # the norm of the average
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_vit_goes_back_to_the_names_of_timms(name):
    architecture = registry.architectures()["vit"]
    patch = architecture.variants[name].patch_size
    sizes = {"img_size": 2 * patch, "num_classes": 5}
    original = timm.create_model(name, depth=2, embed_dim=32, num_heads=2, **sizes)
    sizes |= {"mlp_dims": original.blocks[0].mlp.fc2.in_features}
    config = replace(architecture.variants[name], num_layers=2, dims=32, num_heads=2, **sizes)
    state = original_state(original, np.random.default_rng(0))
    goes_back(state, architecture.model(config), architecture.spec("timm", config))


def torchvision_vit():
    """A small one, and the config that ours has for it."""
    sizes = {"patch_size": 4, "num_layers": 2, "num_heads": 2, "num_classes": 5}
    original = torchvision.models.VisionTransformer(8, hidden_dim=16, mlp_dim=24, **sizes)
    config = registry.architectures()["vit"].variants["vit_b_16"]
    return original, replace(config, img_size=8, dims=16, mlp_dims=24, **sizes)


def test_vit_goes_back_to_the_names_of_torchvisions():
    original, config = torchvision_vit()
    architecture = registry.architectures()["vit"]
    state = original_state(original, np.random.default_rng(0))
    goes_back(state, architecture.model(config), architecture.spec("torchvision", config))


def test_torchvision_reads_the_old_names_of_its_mlps():
    original, config = torchvision_vit()
    architecture = registry.architectures()["vit"]
    model = architecture.model(config)
    weights = randomised(model)
    old, new = (
        to_torch(weights, model, architecture.spec(dialect, config))
        for dialect in ("torchvision, old mlp names", "torchvision")
    )
    assert old.keys() != new.keys()
    original.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in old.items()})
    same_bits({name: mx.array(x.numpy()) for name, x in original.state_dict().items()}, new)


def published_state(original, folder):
    """Random bits by the names and shapes of the file that transformers writes."""
    rng = np.random.default_rng(0)
    for x in original.state_dict().values():
        if x.is_floating_point():
            bits = np.array(random_bits(tuple(x.shape), mx.float32, rng))
            x.copy_(torch.from_numpy(bits))
    original.save_pretrained(folder)
    return mx.load(str(folder / "model.safetensors"))


TRANSFORMERS_VITS = {
    "ViTModel": "transformers",
    "ViTForImageClassification": "transformers",
    "DeiTModel": "transformers, deit",
    "DeiTForImageClassification": "transformers, deit",
    "DeiTForImageClassificationWithTeacher": "transformers, deit with teacher",
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("name", "dialect"), TRANSFORMERS_VITS.items())
def test_vit_goes_back_to_the_names_of_transformers(name, dialect, in_memory, tmp_path):
    """In memory it has new names; its files keep the old ones."""
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5}
    kind = getattr(transformers, name)
    original = kind(kind.config_class(**sizes, architectures=[name]))
    if in_memory:
        dialect += ", since 5"
        state = original_state(original, np.random.default_rng(0))
    else:
        state = published_state(original, tmp_path)
    architecture = registry.architectures()["vit"]
    config = architecture.read_config(original.config.to_dict())
    config = config if architecture.classes[name] else architecture.without_head(config)
    unused = () if architecture.classes[name] else ("pooler.dense.weight", "pooler.dense.bias")
    goes_back(state, architecture.model(config), architecture.spec(dialect, config), unused)


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "efficientnet_b0"),
        ("torchvision", "efficientnet_v2_s"),
        ("timm", "efficientnet_b0"),
        ("timm", "efficientnet_es"),
        ("timm", "efficientnet_b1_pruned"),
        ("timm", "tf_efficientnetv2_b0"),
    ],
)
def test_efficientnet_goes_back_to_the_names_of_its_original(library, name):
    architecture = registry.architectures()["efficientnet"]
    config = architecture.variants[name]
    original = getattr(torchvision.models, name)() if library == "torchvision" else None
    original = original or timm.create_model(name)
    state = original_state(original, np.random.default_rng(0))
    model, spec = architecture.model(config), architecture.spec(library, config)
    goes_back(state, model, spec, ["num_batches_tracked"])


@pytest.mark.parametrize("name", ["EfficientNetForImageClassification", "EfficientNetModel"])
def test_efficientnet_goes_back_to_the_names_of_transformers(name):
    published = transformers.EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, num_labels=5
    )
    original = getattr(transformers, name)(published)
    architecture = registry.architectures()["efficientnet"]
    config = architecture.read_config(published.to_dict())
    config = config if architecture.classes[name] else architecture.without_head(config)
    state = original_state(original, np.random.default_rng(0))
    model, spec = architecture.model(config), architecture.spec("transformers", config)
    goes_back(state, model, spec, ["num_batches_tracked"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", registry.architectures()["gpt2"].classes)
def test_gpt2_goes_back_to_the_names_of_its_original(name, tied):
    architecture = registry.architectures()["gpt2"]
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 29, "n_positions": 12}
    published = transformers.GPT2Config(**sizes, num_labels=5, tie_word_embeddings=tied)
    state = original_state(getattr(transformers, name)(published), np.random.default_rng(0))
    config = architecture.read_config(published.to_dict())
    config = replace(config, task=architecture.classes[name])
    unused = [n for n in state if n.startswith("multiple_choice_head.")]
    if tied and "lm_head.weight" in state:
        unused.append("lm_head.weight")
        # Tied, no tensor of a head is left: as in OpenAI's own file, there is no prefix.
        state = {n.removeprefix("transformer."): x for n, x in state.items()}
    model, spec = architecture.model(config), architecture.spec("transformers", config)
    goes_back(state, model, spec, unused)


# Axes, against PyTorch itself -------------------------------------------------------------------

CONVOLUTIONS = [
    ("Conv1d", {}),
    ("Conv1d", {"groups": 2, "stride": 2, "padding": 1}),
    ("Conv1d", {"groups": 4, "dilation": 2, "bias": False}),
    ("Conv2d", {}),
    ("Conv2d", {"groups": 2, "stride": 2, "padding": 1}),
    ("Conv2d", {"groups": 4, "dilation": 2, "bias": False}),
    ("Conv2d", {"kernel_size": (3, 2), "stride": (1, 2)}),
    ("Conv3d", {}),
    ("Conv3d", {"kernel_size": (3, 2, 1), "stride": 2, "padding": 1}),
    ("ConvTranspose1d", {}),
    ("ConvTranspose1d", {"stride": 2, "padding": 1, "bias": False}),
    ("ConvTranspose2d", {}),
    ("ConvTranspose2d", {"kernel_size": (3, 2), "stride": 2, "padding": 1}),
    ("ConvTranspose3d", {}),
    ("ConvTranspose3d", {"kernel_size": (3, 2, 4), "stride": 2, "padding": 1}),
]


def convolve(kind, in_channels=4, out_channels=6, seed=0, **options):
    """What PyTorch's layer gives and what ours gives, channels last."""
    options = {"kernel_size": 3, **options}
    generator = torch.manual_seed(seed)
    theirs = getattr(torch.nn, kind)(in_channels, out_channels, **options)
    for parameter in theirs.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model = Net(layer=getattr(nn, kind)(in_channels, out_channels, **options))
    state = {f"layer.{n}": mx.array(x.detach().numpy()) for n, x in theirs.named_parameters()}
    model.load_weights(list(to_mlx(state, model, Spec()).items()), strict=True)
    axes = (7, 6, 5)[: int(kind[-2])]
    x = np.random.default_rng(seed).standard_normal((2, *axes, in_channels)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))))
    return layout.channels_last(wanted.numpy(), model.layer), np.array(model.layer(mx.array(x)))


@pytest.mark.parametrize(("kind", "options"), CONVOLUTIONS, ids=str)
def test_axes_are_those_of_pytorch(kind, options):
    wanted, ours = convolve(kind, out_channels=8 if options.get("groups") else 6, **options)
    assert wanted.shape == ours.shape
    assert np.abs(wanted).max() > 0.5
    assert np.abs(wanted - ours).max() < 1e-5


@pytest.mark.parametrize("layer", layout.AXES, ids=lambda layer: layer.__name__)
def test_any_other_order_of_the_axes_is_wrong(layer, monkeypatch):
    right = layout.AXES[layer]
    differences = {}
    for axes in permutations(range(len(right))):
        monkeypatch.setitem(layout.AXES, layer, axes)
        wanted, ours = convolve(layer.__name__, in_channels=3, out_channels=3)
        differences[axes] = np.abs(wanted - ours).max()
    assert differences.pop(right) < 1e-5
    assert min(differences.values()) > 1e-2


def test_every_convolution_of_mlx_has_its_row():
    kinds = {getattr(nn, name) for name in dir(nn) if name.startswith("Conv")}
    assert kinds == set(layout.AXES)


def test_the_square_trap():
    """A stem of 3 channels into 32 has one shape in both layouts: only its type tells."""
    weight = values(32, 3, 3, 3)
    model = Net(conv=nn.Conv2d(3, 32, 3, bias=False), table=Net(weight=mx.zeros((32, 3, 3, 3))))
    assert model.conv.weight.shape == weight.shape
    weights = to_mlx({"conv.weight": weight, "table.weight": weight}, model, Spec())
    same(weights["conv.weight"], np.array(weight).transpose(0, 2, 3, 1))
    assert not np.array_equal(weights["conv.weight"], weight)
    same(weights["table.weight"], weight)


# Mutants ----------------------------------------------------------------------------------------

SEEN = 1e-3  # of the largest output: a hundred times the tolerance of a verification


def randomised(model, seed=0):
    """Random parameters of a sane size, by our names."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, x in engine.parameters(model).items():
        if name.endswith("running_var") or (x.ndim == 1 and name.endswith("weight")):
            value = rng.uniform(0.5, 1.5, x.shape)
        elif x.ndim == 1:
            value = 0.3 * rng.standard_normal(x.shape)
        else:
            value = rng.standard_normal(x.shape) * (2 / np.prod(x.shape[1:])) ** 0.5
        weights[name] = mx.array(value, mx.float32)
    return weights


class Specimen:
    """A small network of the registry with its published state dict and its right answer."""

    def __init__(self, kind, spec, config, model):
        self.model = model
        self.model.eval()
        self.spec, self.config = spec, config
        self.state = to_torch(randomised(model), model, spec)
        self.links = links(model, spec)
        self.inputs = compare.random_inputs(kind, config, getattr(config, "img_size", 16), 0)
        self.right = self.answer(to_mlx(self.state, model, spec))

    def answer(self, weights):
        self.model.load_weights(list(weights.items()), strict=True)
        return compare.run(self.model, self.inputs, ())[0]

    def error(self, weights):
        """Relative to the largest value of each output, the largest."""
        found = self.answer(weights)
        return max(np.abs(found[n] - x).max() / np.abs(x).max() for n, x in self.right.items())

    def catch(self, mutant):
        """What catches a mutant of the spec: coverage, parity, or None."""
        try:
            weights = to_mlx(self.state, self.model, mutant)
        except MappingError:
            return "coverage"
        return "parity" if self.error(weights) > SEEN else None

    def ignores(self, mutant):
        """Whether a mutant reads this very network as the spec does."""
        try:
            return links(self.model, mutant) == self.links
        except MappingError:
            return False


@cache
def specimens(family, dialect):
    """The networks of a family of which a publisher's file would be read by that dialect."""
    kind = registry.architectures()[family].inputs
    return [Specimen(kind, *case) for _, *case in networks(family, dialect, square=True)]


def few(found):
    """As few of `found` as have every parameter, and every type of block; the largest first."""
    chosen, seen = [], set()
    for specimen in sorted(found, key=lambda s: len(s.links), reverse=True):
        names = {*engine.parameters(specimen.model)}
        names |= {f"{n} {type(m).__name__}" for n, m in specimen.model.named_modules() if [*m]}
        names = {re.sub(r"\.\d+(?=[. ])", ".#", name) for name in names}
        if not names <= seen:
            chosen.append(specimen)
            seen |= names
    return chosen


def tables():
    """The dialects with rows, one for each distinct right-hand side."""
    distinct = {}
    for family, dialect in DIALECTS:
        rows = [[*spec.layers.values()] for _, spec, *_ in networks(family, dialect)]
        if any(rows):
            distinct.setdefault(f"{family} {rows}", (family, dialect))
    return distinct.values()


ROWS = [case for case in DIALECTS if any(spec.layers for _, spec, *_ in networks(*case))]
TABLES = [*tables()]


def without(rows, name):
    return {source: row for source, row in rows.items() if source != name}


def row_name(source, row):
    """Where a spec counts stages and blocks by the config, the same row for every count."""
    return re.sub(r"(features\.|blocks\.|j\+)\d+", r"\1#", f"{source}: {row}")


@pytest.mark.parametrize(("family", "dialect"), ROWS)
def test_no_row_can_be_missing(family, dialect):
    """Coverage catches each; and each is needed by some network."""
    needed = {}
    for specimen in specimens(family, dialect):
        rows = specimen.spec.layers
        for source, row in rows.items():
            mutant = replace(specimen.spec, layers=without(rows, source))
            used = not specimen.ignores(mutant)
            needed[row_name(source, row)] = needed.get(row_name(source, row), False) or used
            if used:
                with pytest.raises(MappingError, match="nothing fills"):
                    to_mlx(specimen.state, specimen.model, mutant)
    assert all(needed.values()), [row for row, used in needed.items() if not used]


# How many pairs of rows have the same letters and shapes, at least: coverage is blind to them.
BLIND = {"bert": 80, "efficientnet": 50, "gpt2": 12, "resnet": 0, "vit": 1}


@pytest.mark.parametrize(("family", "dialect"), TABLES)
def test_no_two_rows_can_be_swapped(family, dialect):
    caught = defaultdict(int)
    for specimen in few(specimens(family, dialect)):
        rows = specimen.spec.layers
        for a, b in combinations(rows, 2):
            mutant = replace(specimen.spec, layers={**rows, a: rows[b], b: rows[a]})
            if not specimen.ignores(mutant):
                by = specimen.catch(mutant)
                assert by, f"{a} and {b} swapped: {specimen.config}"
                caught[by] += 1
    assert caught["coverage"]
    assert caught["parity"] >= BLIND[family]


def of_family(family):
    """Its networks by all of its dialects, as few as have everything."""
    return few([s for case in DIALECTS if case[0] == family for s in specimens(*case)])


@pytest.mark.parametrize("family", registry.architectures())
def test_no_tensor_is_without_effect(family):
    for specimen in of_family(family):
        weights = to_mlx(specimen.state, specimen.model, specimen.spec)
        others = randomised(specimen.model, seed=1)
        for name in weights:
            error = specimen.error({**weights, name: others[name]})
            if name.endswith("k_proj.bias"):
                # It adds q.b to all the scores of a query, and softmax sees differences only.
                assert error < SEEN
            else:
                assert error > SEEN, (name, specimen.config)


@pytest.mark.parametrize("family", registry.architectures())
def test_no_two_layers_of_equal_shapes_can_be_swapped(family):
    """All layers, whether a row names them or not, and bare tensors: parity catches each."""
    for specimen in of_family(family):
        weights = to_mlx(specimen.state, specimen.model, specimen.spec)
        assert specimen.error(weights) == 0
        layers = defaultdict(dict)
        for name, x in weights.items():
            layer, _, leaf = name.rpartition(".")
            layers[layer or leaf]["." + leaf if layer else ""] = x
        shapes = {
            n: sorted((leaf, x.shape) for leaf, x in leaves.items()) for n, leaves in layers.items()
        }
        pairs = [(a, b) for a, b in combinations(layers, 2) if shapes[a] == shapes[b]]
        assert len(pairs) > 20
        for a, b in pairs:
            swapped = {x + leaf: v for x, y in ((a, b), (b, a)) for leaf, v in layers[y].items()}
            assert specimen.error({**weights, **swapped}) > SEEN, (a, b, specimen.config)


@pytest.mark.parametrize(
    ("family", "dialect"),
    [case for case in TABLES if case != ("efficientnet", "transformers")],  # no row is a matrix's
)
def test_no_row_can_be_transposed(family, dialect):
    """Coverage sees it in a matrix that is not square, parity in one that is."""
    caught = defaultdict(int)
    for specimen in specimens(family, dialect):
        rows = specimen.spec.layers
        for source, row in rows.items():
            other = row.target if isinstance(row, Conv1D) else Conv1D(row)
            mutant = replace(specimen.spec, layers={**rows, source: other})
            changed = {*links(specimen.model, mutant)} - {*specimen.links}
            if any(len(link.upstream_shape) == 2 for link in changed):  # a vector has no transpose
                by = specimen.catch(mutant)
                assert by, f"{source} transposed: {specimen.config}"
                caught[by] += 1
    assert caught["parity"]


@pytest.mark.parametrize(
    ("family", "dialect"), [("gpt2", "transformers"), ("vit", "timm"), ("vit", "torchvision")]
)
def test_no_parts_of_a_layer_can_be_permuted(family, dialect):
    """Queries, keys and values of one tensor: coverage is blind, parity sees it."""
    num_caught = 0
    for specimen in specimens(family, dialect):
        rows = specimen.spec.layers
        for source, row in rows.items():
            split = row.target if isinstance(row, Conv1D) else row
            for parts in [*permutations(getattr(split, "parts", ()))][1:]:
                other = replace(split, parts=parts)
                other = Conv1D(other) if isinstance(row, Conv1D) else other
                mutant = replace(specimen.spec, layers={**rows, source: other})
                if not specimen.ignores(mutant):
                    assert specimen.catch(mutant) == "parity", (source, parts, specimen.config)
                    num_caught += 1
    assert num_caught >= 5 * len(specimens(family, dialect))


@pytest.mark.parametrize(("family", "dialect"), DIALECTS)
def test_leaves_prefix_drop_tied_and_spare_are_all_needed(family, dialect):
    alike = defaultdict(list)
    for specimen in specimens(family, dialect):
        alike[specimen.spec.fingerprint].append(specimen)
    for found in alike.values():
        all_are_needed(found[0].spec, found)


def all_are_needed(spec, found):
    largest = max(found, key=lambda s: len(s.links))
    for leaf in spec.leaves:
        assert largest.catch(replace(spec, leaves=without(spec.leaves, leaf))) == "coverage"
    for a, b in combinations(spec.leaves, 2):
        crossed = {**spec.leaves, a: spec.leaves[b], b: spec.leaves[a]}
        assert largest.catch(replace(spec, leaves=crossed)) == "parity"
    if spec.prefix:
        assert largest.catch(replace(spec, prefix="")) == "coverage"
    if spec.heads:
        bare = to_torch(randomised(largest.model), largest.model, replace(spec, heads=()))
        assert bare.keys() != largest.state.keys()
    for pattern in spec.drop:
        name = an_instance(pattern)
        lacking = next(s for s in found if name not in {link.source for link in s.links})
        state = {**lacking.state, name: mx.arange(2)}
        to_mlx(state, lacking.model, spec)
        mutant = replace(spec, drop=tuple(p for p in spec.drop if p != pattern))
        with pytest.raises(MappingError, match=f"no home for {re.escape(name)}"):
            to_mlx(state, lacking.model, mutant)
    full = {n.removeprefix(spec.prefix): x for n, x in largest.state.items()}
    for source, twin in twins({**spec.tied, **spec.spare}, full):
        lone = {**without(full, twin), source: full[twin]}
        to_mlx(lone, largest.model, spec)
        mutant = replace(spec, tied={}, spare={})
        with pytest.raises(MappingError, match="nothing fills"):
            to_mlx(lone, largest.model, mutant)
        if spec.tied:
            with pytest.raises(MappingError, match="differs from"):
                to_mlx({**full, source: full[twin] + 1}, largest.model, spec)


@pytest.mark.parametrize(
    ("axes", "by"),
    [
        (None, "coverage"),
        ((0, 1, 2, 3), "coverage"),
        ((3, 0, 1, 2), "coverage"),
        ((1, 2, 3, 0), "coverage"),
        ((0, 3, 2, 1), "parity"),  # height for width
    ],
    ids=str,
)
def test_wrong_axes_of_a_convolution_are_caught(axes, by, monkeypatch):
    specimen = specimens("resnet", "timm")[0]
    if axes is None:
        monkeypatch.delitem(layout.AXES, nn.Conv2d)
    else:
        monkeypatch.setitem(layout.AXES, nn.Conv2d, axes)
    assert specimen.catch(specimen.spec) == by


# Mutants before the judge: the whole way, against the PyTorch original ---------------------------


def change_rows(architecture, monkeypatch, dialect, rows):
    """A dialect, and those named after it, with other rows instead of their own."""

    def mutant(genuine, config):
        spec = genuine if isinstance(genuine, Spec) else genuine(config)
        known = rows.keys() <= spec.layers.keys() or not spec.layers
        return replace(spec, layers={**spec.layers, **rows}) if known else spec

    for name, genuine in architecture.dialects.items():
        if name.startswith(dialect):
            monkeypatch.setitem(architecture.dialects, name, partial(mutant, genuine))


SELF = "encoder.layer.{i}.attention.self."
OUTPUT = "encoder.layer.{i}.attention.output."
BERT_MUTANTS = {
    "none": {},
    "query and key": {
        SELF + "query": "blocks.{i}.attn.k_proj",
        SELF + "key": "blocks.{i}.attn.q_proj",
    },
    "key and value": {
        SELF + "value": "blocks.{i}.attn.k_proj",
        SELF + "key": "blocks.{i}.attn.v_proj",
    },
    "the two norms": {
        OUTPUT + "LayerNorm": "blocks.{i}.norm2",
        "encoder.layer.{i}.output.LayerNorm": "blocks.{i}.norm1",
    },
    "a square matrix": {OUTPUT + "dense": Conv1D("blocks.{i}.attn.out_proj")},
    "the pooler's": {"pooler.dense": Conv1D("pooler")},
}


@pytest.mark.parametrize("rows", BERT_MUTANTS.values(), ids=BERT_MUTANTS)
def test_verification_catches_a_mutant_of_bert(rows, tmp_path, monkeypatch):
    randomise(transformers.BertModel(small_bert(hidden_size=32))).save_pretrained(tmp_path)
    architecture = registry.architectures()["bert"]
    change_rows(architecture, monkeypatch, "transformers", rows)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)  # coverage sees nothing
    report = verify(model)
    assert report.passed == (not rows), report.reason
    if rows:
        assert report.max_rel > SEEN


def gpt2_rows(folder):
    """An LM whose squares are transposed: what is stored (in, out) is read as (out, in)."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 29, "n_positions": 12}
    randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))).save_pretrained(
        folder
    )
    return {"h.{i}.attn.c_proj": "blocks.{i}.attn.out_proj"}


def vit_rows(folder):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 16, "patch_size": 4}
    original = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    randomise(original).save_pretrained(folder)
    return {
        "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attn.v_proj",
        "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attn.k_proj",
    }


def efficientnet_rows(folder):
    """Two norms of one size, in all blocks of a stage."""
    sizes = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    original = transformers.EfficientNetForImageClassification(
        transformers.EfficientNetConfig(**sizes)
    )
    randomise(original).save_pretrained(folder)
    return {
        "encoder.blocks.{j+5}.expansion.expand_bn": "blocks.3.{j}.bn2",
        "encoder.blocks.{j+5}.depthwise_conv.depthwise_norm": "blocks.3.{j}.bn1",
    }


@pytest.mark.parametrize("mutant", [False, True])
@pytest.mark.parametrize(
    ("family", "make"),
    [("gpt2", gpt2_rows), ("vit", vit_rows), ("efficientnet", efficientnet_rows)],
)
def test_verification_catches_a_mutant(family, make, mutant, tmp_path, monkeypatch):
    rows = make(tmp_path)
    if mutant:
        architecture = registry.architectures()[family]
        change_rows(architecture, monkeypatch, "transformers", rows)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True)  # coverage sees nothing
    report = verify(model, size=getattr(model.config, "img_size", 64))
    assert report.passed != mutant, report.reason
    assert (report.max_rel > SEEN) == mutant


@pytest.mark.parametrize(("eps", "passed"), [(1e-12, True), (1e-6, False), (1e-5, False)])
def test_verification_catches_another_epsilon_of_bert(eps, passed, tmp_path):
    original = randomise(transformers.BertModel(small_bert(hidden_size=32)))
    for table in original.embeddings.children():
        if isinstance(table, torch.nn.Embedding):
            table.weight.data *= 0.03  # as small as published ones are: epsilon weighs there
    original.save_pretrained(tmp_path)
    model = mlx_zoo.load(f"local-dir:{tmp_path}", pretrained=True, norm_eps=eps)
    report = verify(model)
    assert report.passed == passed, report.reason
    assert report.first_divergence == (None if passed else "norm")


def resnet(folder):
    options = {"layer_type": "basic", "depths": [2, 1], "hidden_sizes": [16, 24]}
    config = transformers.ResNetConfig(**options, embedding_size=16, num_labels=5)
    randomise(transformers.ResNetForImageClassification(config)).save_pretrained(folder)
    return f"local-dir:{folder}"


def test_verification_catches_height_and_width_exchanged(tmp_path, monkeypatch):
    name = resnet(tmp_path)
    assert verify(mlx_zoo.load(name, pretrained=True), size=32).passed
    monkeypatch.setitem(layout.AXES, nn.Conv2d, (0, 3, 2, 1))
    model = mlx_zoo.load(name, pretrained=True, cache_dir=tmp_path / "another")
    report = verify(model, size=32)
    assert not report.passed
    assert report.first_divergence == "conv1"


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_verification_catches_another_epsilon_of_resnet(eps, tmp_path):
    model = mlx_zoo.load(resnet(tmp_path), pretrained=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm):
            assert module.eps == 1e-5
            module.eps = eps
    report = verify(model, size=32)
    assert not report.passed
    assert report.first_divergence == "bn1"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("layer4.0.conv1", "layer4.0.conv2"),
        ("layer1.0.bn1", "layer1.0.bn2"),
        ("layer4.0.bn1", "layer4.0.downsample.1"),
    ],
)
def test_verification_catches_exchanged_layers_of_resnet(one, other, tmp_path, monkeypatch):
    options = {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 48), "in_chans": 1}
    original = randomise(timm.create_model("resnet18", num_classes=10, **options))
    torch.save(original.state_dict(), tmp_path / "w.pth")
    architecture = registry.architectures()["resnet"]
    for dialect in ("torchvision", "timm"):
        change_rows(architecture, monkeypatch, dialect, {one: other, other: one})
    model = mlx_zoo.load("resnet_digits", pretrained=tmp_path / "w.pth")
    report = verify(model)
    assert not report.passed
    assert report.max_rel > SEEN
