"""The index of the fault matrix, and rows 23 to 37: malformed and malicious checkpoints.

FAULTS.md has the rows. Everything goes through what users call: `load`, pipelines, the command.
What a file could do to a process is done to a process of its own (`hostile.outcomes`).
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import huggingface_hub

import mlx_zoo  # first: it must load its BLAS before mlx.core is imported

# isort: split
import hostile
import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hostile import Case, Outcome, file, stream, zipped
from hub_server import LocalHub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mlx_zoo import converting
from mlx_zoo.cli import main
from mlx_zoo.describe import DATA
from mlx_zoo.errors import (
    CheckpointError,
    DownloadError,
    IntegrityError,
    MappingError,
    UnsafeCheckpoint,
    UnsupportedFormat,
)
from mlx_zoo.hub import cache as cache_module
from mlx_zoo.mapping import engine
from mlx_zoo.verify.reference import import_torchvision

HERE = Path(__file__).parent
DIGITS = "resnet_digits"
FAMILIES = {
    "resnet_digits": "resnet_digits.pth",
    "vit_digits": "vit_digits.safetensors",
    "efficientnet_digits": "efficientnet_digits.safetensors",
    "bert_docs": "bert_docs/model.safetensors",
    "gpt2_docs": "gpt2_docs/model.safetensors",
}
KINDS = pytest.mark.parametrize("kind", ["zip", "stream", "safetensors"])
MIB = 1 << 20


def state_of(name: str) -> dict[str, torch.Tensor]:
    """The published tensors of a bundled network, as PyTorch names and stores them."""
    path = DATA / FAMILIES[name]
    if path.suffix == ".pth":
        return dict(torch.load(path, weights_only=True))
    return load_file(path)


def write(state: Mapping, path: Path, kind: str = "zip") -> Path:
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def bits(x: mx.array | torch.Tensor) -> np.ndarray:
    """The bits of each number, of the same shape."""
    if isinstance(x, torch.Tensor):
        x = x.detach().contiguous()
        return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()
    return np.array(x.view({2: mx.int16, 4: mx.int32}[x.dtype.size]))


# --- The index ------------------------------------------------------------------------------------


@cache
def rows_of_tests() -> dict[int, list[ast.FunctionDef]]:
    rows: dict[int, list[ast.FunctionDef]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_row_"):
                rows.setdefault(int(node.name.split("_")[2]), []).append(node)
    return rows


def listed_rows() -> dict[int, str]:
    text = (HERE / "FAULTS.md").read_text(encoding="utf-8")
    return {int(number): rest for number, rest in re.findall(r"^\| (\d+) \|(.*)$", text, re.M)}


def test_every_row_of_the_matrix_is_listed_and_tested():
    text = (HERE / "FAULTS.md").read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", text, re.M)] == list(range(1, 42))
    assert sorted(rows_of_tests()) == list(range(1, 42))


def test_rows_of_hostile_bytes_are_tested_in_a_process_of_its_own():
    """Each has a test that takes what `hostile.outcomes` found, or starts a process itself."""
    own = [row for row, rest in listed_rows().items() if row >= 23 and "own process" in rest]
    assert own == [*range(30, 38), 41]
    for row in own:
        taken = {arg.arg for test in rows_of_tests()[row] for arg in test.args.args}
        assert taken & {"outcomes", "text_outcomes"}, row


# --- 23 to 29: malformed checkpoints --------------------------------------------------------------

# A layer that every block has, and where its tensors go by our names ("" where it is the same).
REPEATED = {
    "resnet_digits": ("layer{i}.0.bn1.weight", range(1, 5), ""),
    "vit_digits": ("blocks.{i}.mlp.fc2.bias", range(4), ""),
    "efficientnet_digits": ("blocks.{i}.0.bn1.bias", range(4), ""),
    "bert_docs": (
        "encoder.layer.{i}.attention.output.dense.bias", range(2), "blocks.{i}.attn.out_proj.bias"
    ),
    "gpt2_docs": ("h.{i}.mlp.c_fc.bias", range(3), "blocks.{i}.mlp.fc1.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_row_23_missing_and_unexpected_tensors_of_every_family(name, tmp_path):
    state = state_of(name)
    layer, numbers, ours = REPEATED[name]
    prefix = {"bert_docs": "bert.", "gpt2_docs": "transformer."}.get(name, "")
    for i in numbers:
        lost = state.pop(prefix + layer.replace("{i}", str(i)))
        state[f"{prefix}adapters.{i}.weight"] = torch.zeros(2)
    assert lost.ndim == 1
    state["extra"] = torch.zeros(1)
    path = write(state, tmp_path / "w.pth")
    span = f"{{{numbers[0]}..{numbers[-1]}}}"
    also = f" (our {ours.replace('{i}', span)})" if ours else ""
    with pytest.raises(MappingError) as caught:
        mlx_zoo.load(name, path)
    assert set(caught.value.problems) == {
        f"no home for adapters.{span}.weight ({len(numbers)} tensors)",
        "no home for extra",
        f"nothing fills {layer.replace('{i}', span)}{also} ({len(numbers)} tensors)",
    }
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{path} does not fit {name}")
    assert first.endswith(": 3 problems")
    assert [line.strip() for line in rest] == list(caught.value.problems)
    result = CliRunner().invoke(main, ["load", name, "--pretrained", str(path)])
    assert (result.exit_code, result.output) == (1, f"Error: {caught.value}\n")


def cut(name: str, tensor: str, *slices: slice) -> dict[str, torch.Tensor]:
    state = state_of(name)
    state[tensor] = state[tensor][slices].clone()
    return state


CAUSES = {
    "num_classes, resnet": (
        *("resnet_digits", {}, lambda: cut("resnet_digits", "fc.weight", slice(7))),
        r"fc\.weight has shape \(7, 48\), the network needs \(10, 48\): another num_classes",
    ),
    "num_classes, vit": (
        *("vit_digits", {}, lambda: cut("vit_digits", "head.bias", slice(7))),
        r"head\.bias has shape \(7,\), the network needs \(10,\): another num_classes",
    ),
    "num_classes, efficientnet": (
        *(
            "efficientnet_digits",
            {},
            lambda: cut("efficientnet_digits", "classifier.bias", slice(3)),
        ),
        r"classifier\.bias has shape \(3,\), the network needs \(10,\): another num_classes",
    ),
    "in_chans": (
        "resnet_digits",
        {},
        lambda: state_of("resnet_digits") | {"conv1.weight": torch.zeros(64, 3, 7, 7)},
        r"conv1\.weight has shape \(64, 3, 7, 7\), .* \(64, 1, 7, 7\): another in_chans",
    ),
    "img_size": (
        *("vit_digits", {}, lambda: cut("vit_digits", "pos_embed", slice(None), slice(50))),
        r"pos_embed has shape \(1, 50, 48\), the network needs \(1, 65, 48\): another img_size",
    ),
    "vocabulary, bert": (
        *("bert_docs", {"vocab_size": 1000}, lambda: state_of("bert_docs")),
        r"word_embeddings\.weight has shape \(1536, 64\), .* \(1000, 64\): another vocabulary",
    ),
    "positions, gpt2": (
        *("gpt2_docs", {}, lambda: cut("gpt2_docs", "transformer.wpe.weight", slice(100))),
        r"wpe\.weight has shape \(100, 64\), .* \(256, 64\): another .*number of positions",
    ),
    "width, gpt2": (
        *("gpt2_docs", {"mlp_dims": 128}, lambda: state_of("gpt2_docs")),
        r"h\.\{0\.\.2\}\.mlp\.c_fc\.weight \(3 tensors\) has shape \(64, 256\), "
        r"the network needs \(64, 128\): another variant",
    ),
    "rank": (
        "resnet_digits",
        {},
        lambda: state_of("resnet_digits") | {"fc.bias": torch.zeros(2, 5)},
        r"fc\.bias has shape \(2, 5\), the network needs \(10,\): another variant",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_row_24_a_wrong_shape_and_its_likely_cause(cause, tmp_path):
    name, options, state, message = CAUSES[cause]
    with pytest.raises(MappingError, match=message):
        mlx_zoo.load(name, write(state(), tmp_path / "w.pth"), **options)


@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [
        ("resnet10t", {"num_classes": 5}, "resnet18"),  # whatever its head
        ("vit_tiny_patch16_224", {}, "vit_tiny_patch16_384"),
        ("efficientnet_b0", {}, "efficientnet_b1"),
    ],
)
def test_row_24_weights_of_another_variant_are_recognised(
    theirs, options, ours, tmp_path, monkeypatch
):
    import_torchvision()
    import timm

    with torch.device("meta"):
        shapes = timm.create_model(theirs, **options).state_dict()
    state = {n: torch.zeros(x.shape, dtype=torch.float16) for n, x in shapes.items()}
    path = write(state, tmp_path / "w.pth")
    wanted = (
        rf"does not fit {ours} .*these are the tensors of .*{theirs}.*load\('.*', \.\.\.\) reads"
    )
    mx.random.seed(7)
    with pytest.raises(MappingError, match=wanted):
        mlx_zoo.load(ours, path)
    after = mx.random.state[0].tolist()
    monkeypatch.setattr(converting, "_variants_of", lambda state, request: [])
    mx.random.seed(7)
    with pytest.raises(MappingError):
        mlx_zoo.load(ours, path)
    assert mx.random.state[0].tolist() == after, "the search took random numbers"


@KINDS
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "bool"])
def test_row_25_no_integer_where_a_float_belongs(dtype, kind, tmp_path, cache):
    state = state_of(DIGITS)
    state["fc.weight"] = state["fc.weight"].to(getattr(torch, dtype))
    path = write(state, tmp_path / "w", kind)
    with pytest.raises(MappingError, match=rf"fc\.weight holds {dtype}, where floats belong"):
        mlx_zoo.load(DIGITS, path)
    assert list(cache_module.entries(cache)) == []


@KINDS
def test_row_25_float64_is_cast_and_logged(kind, tmp_path, caplog):
    state = state_of(DIGITS)
    exact = state["fc.weight"].double() * (1 + 1e-9) + 1e-12
    state |= {"fc.weight": exact, "fc.bias": state["fc.bias"].double()}
    model = mlx_zoo.load(DIGITS, write(state, tmp_path / "w", kind))
    assert model.fc.weight.dtype == mx.float32
    np.testing.assert_array_equal(np.array(model.fc.weight), exact.numpy().astype(np.float32))
    (message,) = caplog.messages
    assert re.fullmatch(r"2 float64 tensors become float32, fc\.\w+ first", message)


def as_kind(x: torch.Tensor, kind: str) -> torch.Tensor:
    match kind:
        case "quantised":
            return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
        case "sparse":
            return x.to_sparse()
        case "meta":
            return x.to("meta")
    return x.to(getattr(torch, kind))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("what", "message"),
    {
        "complex64": "complex",
        "complex128": "complex",
        "float8_e4m3fn": "float8",
        "float8_e5m2": "float8",
        "uint16": "MLX lacks or torch rarely writes",
        "quantised": "quantised by torch",
        "sparse": "sparse",
        "meta": "without values",
    }.items(),
)
@pytest.mark.filterwarnings("ignore")  # of torch: quantised tensors, sparse ones
def test_row_25_other_kinds_of_tensors_are_named(what, message, zipped, tmp_path):
    state = state_of(DIGITS)
    state["fc.weight"] = as_kind(state["fc.weight"], what)
    path = write(state, tmp_path / "w.pth", "zip" if zipped else "stream")
    with pytest.raises(UnsupportedFormat, match=rf"tensors that are .*{message}.*tensor\.float"):
        mlx_zoo.load(DIGITS, path)


def test_row_25_float8_and_complex_in_safetensors(tmp_path):
    for dtype, name in (("float8_e4m3fn", "F8_E4M3"), ("complex64", "C64")):
        state = state_of(DIGITS)
        state["fc.weight"] = state["fc.weight"].to(getattr(torch, dtype))
        path = write(state, tmp_path / "w.safetensors", "safetensors")
        with pytest.raises(UnsupportedFormat, match=rf"'fc.weight' has dtype {name}, which MLX"):
            mlx_zoo.load(DIGITS, path)


@KINDS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_row_26_every_number_of_half_precision_keeps_its_bits(kind, dtype, tmp_path):
    """All 65,536 of them: signed zeros, subnormals, infinities, NaNs with their payloads."""
    state = {n: x.to(getattr(torch, dtype)) for n, x in state_of("bert_docs").items()}
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    words = state["bert.embeddings.word_embeddings.weight"]
    words.view(-1)[:65536] = every
    path = write(state, tmp_path / "w", kind)
    for _ in ("converted", "from the cache"):
        model = mlx_zoo.load("bert_docs", path, allow_nonfinite=True)
        assert {x.dtype for x in engine.parameters(model).values()} == {getattr(mx, dtype)}
        np.testing.assert_array_equal(bits(model.word_embed.weight), bits(words))
    folder = mlx_zoo.convert(model, tmp_path / "out")
    model = mlx_zoo.load(f"local-dir:{folder}", True, allow_nonfinite=True)
    np.testing.assert_array_equal(bits(model.word_embed.weight), bits(words))
    finite = torch.isfinite(words)
    wider = np.array(
        mlx_zoo.load("bert_docs", path, dtype="float32", allow_nonfinite=True).word_embed.weight
    )
    np.testing.assert_array_equal(wider[finite], words.float()[finite].numpy())


@KINDS
def test_row_26_float32_keeps_its_bits_too(kind, tmp_path):
    state = state_of(DIGITS)
    odd = torch.tensor(
        [0x80000000, 1, 0x807FFFFF, 0x7F800001, 0x7FC00123, 0xFFFFFFFF, 0x7F800000, 0x00800000],
        dtype=torch.int64,
    ).to(torch.int32)
    state["fc.weight"].view(-1)[: len(odd)] = odd.view(torch.float32)
    state["layer1.0.conv1.weight"].view(-1)[: len(odd)] = odd.view(torch.float32)
    path = write(state, tmp_path / "w", kind)
    for _ in ("converted", "from the cache"):
        model = mlx_zoo.load(DIGITS, path, allow_nonfinite=True)
        np.testing.assert_array_equal(bits(model.fc.weight), bits(state["fc.weight"]))
        theirs = bits(state["layer1.0.conv1.weight"]).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(bits(model.layer1[0].conv1.weight), theirs)


@KINDS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_row_27_nan_and_infinity_of_every_type(value, dtype, kind, tmp_path, cache):
    state = {
        n: x.to(getattr(torch, dtype)) if x.is_floating_point() else x
        for n, x in state_of(DIGITS).items()
    }
    state["fc.bias"][9] = state["layer2.0.bn1.running_var"][0] = value
    path = write(state, tmp_path / "w", kind)
    wanted = r"w holds NaN or infinity in layer2\.0\.bn1\.running_var, fc\.bias; allow_nonfinite="
    with pytest.raises(CheckpointError, match=wanted):
        mlx_zoo.load(DIGITS, path)
    assert list(cache_module.entries(cache)) == []
    result = CliRunner().invoke(main, ["load", DIGITS, "--pretrained", str(path)])
    assert (result.exit_code, "NaN or infinity" in result.output) == (1, True)
    found = np.array(mlx_zoo.load(DIGITS, path, allow_nonfinite=True).fc.bias.astype(mx.float32))
    np.testing.assert_array_equal(found[9], np.float32(value))
    assert np.isfinite(found[:9]).all()


@pytest.mark.parametrize(
    ("stored", "value", "wanted"),
    [
        ("float64", 1e300, None),  # float32 is what float64 becomes
        ("float32", 7e4, "float16"),
        ("bfloat16", 1e38, "float16"),
        ("float32", 3.4e38, "bfloat16"),
    ],
)
def test_row_27_what_leaves_the_range_of_another_type(stored, value, wanted, tmp_path, cache):
    state = {
        n: x.to(getattr(torch, stored)) if x.is_floating_point() else x
        for n, x in state_of(DIGITS).items()
    }
    state["fc.bias"][0] = value
    path = write(state, tmp_path / "w.pth")
    said = f" as {wanted}" if wanted else ""
    with pytest.raises(CheckpointError, match=rf"holds NaN or infinity{said} in fc\.bias; allow"):
        mlx_zoo.load(DIGITS, path, dtype=wanted)
    assert list(cache_module.entries(cache)) == []
    if wanted:
        assert mx.isfinite(mlx_zoo.load(DIGITS, path).fc.bias).all()


def in_one_storage(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every float tensor as a view of one storage, at offsets, with gaps between them."""
    floats = {n: x for n, x in state.items() if x.is_floating_point()}
    shared = torch.full((sum(x.numel() + 3 for x in floats.values()) + 5,), 7.0)
    found, start = dict(state), 5
    for name, x in floats.items():
        found[name] = shared[start : start + x.numel()].view(x.shape)
        found[name].copy_(x)
        start += x.numel() + 3
    return found


def stepped(x: torch.Tensor) -> torch.Tensor:
    """Every third number of a storage that is three times as large."""
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), 7.0) if x.ndim else x
    return wide[..., 1::3].copy_(x) if x.ndim else x


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim > 1 else x,
    "strided": lambda x: stepped(x) if x.is_floating_point() else x,
    "parameters": lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
}


@pytest.mark.parametrize("kind", ["zip", "stream"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "in one storage"])
def test_row_28_views_of_storages_have_exact_values(layout, kind, tmp_path):
    state = state_of(DIGITS)
    if layout == "in one storage":
        views = in_one_storage(state)
    else:
        views = {name: LAYOUTS[layout](x) for name, x in state.items()}
        assert layout == "parameters" or any(not x.is_contiguous() for x in views.values())
    assert_weights(mlx_zoo.load(DIGITS, write(views, tmp_path / "w", kind)), state)


def assert_weights(model, state: Mapping[str, torch.Tensor]) -> None:
    """A ResNet has these weights, bit for bit, in MLX's layout."""
    ours = engine.parameters(model)
    floats = {n: x for n, x in state.items() if x.is_floating_point()}
    assert ours.keys() == floats.keys()
    for name, x in floats.items():
        theirs = bits(x).transpose(0, 2, 3, 1) if x.ndim == 4 else bits(x)
        np.testing.assert_array_equal(bits(ours[name]), theirs, err_msg=name)


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_row_28_expanded_storages(kind, tmp_path):
    state = state_of(DIGITS)
    state["fc.weight"] = torch.arange(48.0).expand(10, 48)  # one row, ten times
    state["bn1.bias"] = torch.tensor(0.25).expand(64)
    path = write(state, tmp_path / "w", kind)
    assert_weights(mlx_zoo.load(DIGITS, path), {n: x.clone() for n, x in state.items()})


@KINDS
def test_row_28_ties_stay_ties(kind, tmp_path):
    state = state_of("gpt2_docs")
    words = state["transformer.wte.weight"]
    tied = state | {"lm_head.weight": words if kind != "safetensors" else words.clone()}
    alone = {n: x for n, x in tied.items() if n != "transformer.wte.weight"}
    ids = mx.array([[1, 2, 3]])
    expected = mlx_zoo.load("gpt2_docs", True)
    for number, some in enumerate((state, tied, alone)):
        model = mlx_zoo.load("gpt2_docs", write(some, tmp_path / f"w{number}", kind))
        assert "lm_head.weight" not in engine.parameters(model)
        assert mx.array_equal(model(ids), expected(ids))
    exported = mlx_zoo.export(model, tmp_path / "back.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        np.testing.assert_array_equal(bits(load_file(exported)[name]), bits(words))
    untied = tied | {"lm_head.weight": words + 1}
    with pytest.raises(MappingError, match=r"lm_head\.weight differs from wte\.weight, to which"):
        mlx_zoo.load("gpt2_docs", write(untied, tmp_path / "w", kind))


def prefixed(state: Mapping, prefix: str) -> dict:
    return {prefix + name: x for name, x in state.items()}


WRAPPED = {
    "module._orig_mod.": lambda state: prefixed(state, "module._orig_mod."),
    "_orig_mod.module.": lambda state: prefixed(state, "_orig_mod.module."),
    "twice module.": lambda state: prefixed(state, "module.module."),
    "an OrderedDict with _metadata": lambda state: metadata(OrderedDict(state)),
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": torch.tensor(0.1)},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"step": 1}}}},
    "model_state": lambda state: {"model_state": prefixed(state, "module.")},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "state_dict_ema": lambda state: {"state_dict_ema": state, "arch": "resnet"},
    "the raw weights before the averaged": lambda state: {
        "state_dict_ema": prefixed(state, "wrong."),
        "state_dict": state,
    },
}


def metadata(state: OrderedDict) -> OrderedDict:
    state._metadata = {"": {"version": 1}}
    return state


@pytest.mark.parametrize("kind", ["zip", "stream"])
@pytest.mark.parametrize("how", WRAPPED)
def test_row_29_wrapped_checkpoints(how, kind, tmp_path):
    state = state_of(DIGITS)
    assert_weights(mlx_zoo.load(DIGITS, write(WRAPPED[how](state), tmp_path / "w", kind)), state)


@KINDS
def test_row_29_a_prefix_of_some_is_no_prefix(kind, tmp_path):
    state = state_of(DIGITS)
    some = {n if n.startswith("fc") else f"module.{n}": x for n, x in state.items()}
    with pytest.raises(MappingError, match=r"no home for module\.") as caught:
        mlx_zoo.load(DIGITS, write(some, tmp_path / "w", kind))
    assert any(p.startswith("nothing fills conv1.weight") for p in caught.value.problems)


def test_row_29_what_no_spec_names_is_not_skipped(tmp_path):
    """Lightning's names, tensors beside a state dict's, counts and buffers of other layers."""
    state = state_of(DIGITS)
    for extra in ({"bn9.num_batches": torch.tensor(1)}, {"position_ids": torch.arange(3)[None]}):
        with pytest.raises(MappingError, match=f"no home for {next(iter(extra))}"):
            mlx_zoo.load(DIGITS, write(state | extra, tmp_path / "w.pth"))
    for value in ("resnet", 3, None, [torch.ones(1)]):
        with pytest.raises(CheckpointError, match=r"1 entries .* are no tensors: 'arch'"):
            mlx_zoo.load(DIGITS, write(state | {"arch": value}, tmp_path / "w.pth"))
    lightning = {"state_dict": prefixed(state, "net."), "pytorch-lightning_version": "2.4"}
    with pytest.raises(MappingError, match=r"no home for net\."):
        mlx_zoo.load(DIGITS, write(lightning, tmp_path / "w.pth"))
    for wrapper in ("model_ema", "network"):  # which of several is meant, nobody can know
        with pytest.raises(CheckpointError, match=f"no tensors .*it holds '{wrapper}'"):
            mlx_zoo.load(DIGITS, write({wrapper: state}, tmp_path / "w.pth"))


def test_row_29_index_buffers_that_specs_name(tmp_path):
    state = state_of("bert_docs")
    state["bert.embeddings.position_ids"] = torch.arange(128)[None]
    assert mlx_zoo.load("bert_docs", write(state, tmp_path / "w.pth"))
    state = state_of("gpt2_docs")
    for i in range(3):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    assert mlx_zoo.load("gpt2_docs", write(state, tmp_path / "w.pth"))
    state["transformer.h.0.attn.scale"] = torch.ones(1)
    with pytest.raises(MappingError, match=r"no home for h\.0\.attn\.scale"):
        mlx_zoo.load("gpt2_docs", write(state, tmp_path / "w.pth"))


# --- 30 to 37: in a process of its own ------------------------------------------------------------


def shards(weight_map: object, match: str, **files: bytes) -> Case:
    """A folder with an index and shards; `__` in a name is a dot."""
    named = {name.replace("__", "."): data for name, data in files.items()}
    index = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map})
    raw = index if isinstance(index, bytes) else index.encode()
    return Case({"model.safetensors.index.json": raw, **named}, match=match)


def tensors(*names: str) -> bytes:
    header = {n: hostile.entry(offsets=(8 * i, 8 * i + 8)) for i, n in enumerate(names)}
    return hostile.pack(header, 8 * len(names))


AB = {"a": "1.safetensors", "b": "2.safetensors"}
ONE, TWO = {"1__safetensors": tensors("a")}, {"2__safetensors": tensors("b")}
SHARDS = {  # row 31
    "a shard is missing": shards(AB, r"no 2\.safetensors", **ONE),
    "a key in two shards": shards(
        AB, r"2\.safetensors: holds 'a', and so does .*1\.safetensors",
        **ONE, **{"2__safetensors": tensors("a", "b")},
    ),
    "a shard has more than the index says": shards(
        AB, r"2\.safetensors holds 'c', unknown to the index",
        **ONE, **{"2__safetensors": tensors("b", "c")},
    ),
    "a shard has less than the index says": shards(
        AB | {"c": "1.safetensors"}, r"1\.safetensors should hold 'c'", **ONE, **TWO
    ),
    "the shards are swapped": shards(
        AB, r"1\.safetensors should hold 'a'",
        **{"1__safetensors": tensors("b"), "2__safetensors": tensors("a")},
    ),
    "a key twice in the index": shards(
        b'{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}',
        r"index\.json: key 'a' occurs twice", **ONE, **TWO,
    ),
    "a truncated shard": shards(
        AB, r"2\.safetensors: not a valid", **ONE, **{"2__safetensors": tensors("b")[:-1]}
    ),
    "a shard that is a page": shards(
        AB, r"2\.safetensors.* HTML", **ONE, **{"2__safetensors": b"<html>"}
    ),
    "a shard that is empty": shards(
        AB, r"2\.safetensors.*empty file", **ONE, **{"2__safetensors": b""}
    ),
    "no weight_map": shards(b"{}", r"index\.json: has no weight_map"),
    "an empty weight_map": shards({}, r"index\.json: has no weight_map"),
    "a list for a weight_map": shards(["1.safetensors"], r"index\.json: has no weight_map"),
    "a number for a file": shards({"a": 1}, r"index\.json: .*not a string"),
    "an empty index": shards(b"", r"index\.json: "),
    "an index that is a page": shards(b"<html>", r"index\.json"),
    "an index that is a list": shards(b"[]", r"index\.json: "),
    "an index with a mark": shards(b"\xef\xbb\xbf{}", r"index\.json: "),
    "an index of NaN": shards(b'{"weight_map": NaN}', r"index\.json: "),
    "an index of a million lists": shards(b"[" * 1_000_000, r"index\.json: "),
    "an index of a giant number": shards(b'{"a": ' + b"9" * 3_000_000 + b"}", r"index\.json: "),
}  # fmt: skip

OUTSIDE = tensors("a")  # where some of the names of row 33 point
NAMES = (
    "../x.safetensors", "../../here/x.safetensors", "a/../../x.safetensors", "a/x.safetensors",
    "/etc/x.safetensors", "//host/x.safetensors", "~/x.safetensors", "..\\x.safetensors",
    "a\\x.safetensors", "C:x.safetensors", "C:\\x.safetensors", "file:///x.safetensors",
    "https://host/x.safetensors", "x.safetensors\0", "\0/x.safetensors", "x.safetensors\n",
    "x.safetensors/", "./x.safetensors", "..safetensors", ".safetensors", "..", ".", "",
    "x.py", "x.safetensors.py", "config.json", "model.safetensors.index.json",
    "x\u202esrotcnetefas.safetensors", "x\u2028.safetensors", "%2e%2e/x.safetensors",
    "x.safetensors ", "\uff0e\uff0e/x.safetensors",
)  # fmt: skip


def in_both(table: Mapping[str, object]) -> dict[str, Case]:
    """Each value as the pickle of a zip and of a stream, and by itself where it is opcodes."""
    cases = {}
    for name, value in table.items():
        opcodes = isinstance(value, bytes)
        body = b"\x80\x02" + value + b"." if opcodes else value
        cases |= {f"{name}, zip": file(zipped(body)), f"{name}, stream": file(stream(body))}
        if opcodes:
            cases[f"{name}, raw"] = file(body)
    return cases


def of_every_protocol() -> dict[str, Case]:
    cases = {}
    for protocol in range(6):
        gadget = hostile.pickled({"a": [hostile.Gadget()]}, protocol)
        made = {"zip": zipped(gadget), "stream": stream(gadget), "raw": gadget}
        cases |= {f"protocol {protocol}, {k}": file(x, r"\w+\.system") for k, x in made.items()}
    return cases


def as_cases(table: Mapping[str, tuple[bytes, str]]) -> dict[str, Case]:
    return {name: file(data, match) for name, (data, match) in table.items()}


def whole(table: Mapping[str, object]) -> dict[str, Case]:
    made = {"zip": zipped, "stream": stream}
    return {f"{n}, {k}": file(build(v)) for n, v in table.items() for k, build in made.items()}


ROWS: dict[int, dict[str, Case]] = {
    30: {name: file(data, name="w.safetensors") for name, data in hostile.HEADERS.items()},
    31: SHARDS,
    32: in_both(hostile.GADGETS) | of_every_protocol() | whole(hostile.PICKLES),
    33: {
        repr(name): shards({"a": "1.safetensors", "b": name}, r"index\.json: the shard name", **ONE)
        for name in NAMES
    },
    34: as_cases(hostile.archives() | hostile.streams()),
    35: in_both(hostile.FLOODS),
    36: whole(hostile.SIZES),
    37: as_cases(hostile.foreign()),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[int, str], Outcome]:
    """What became of every file and folder of these rows."""
    folder = tmp_path_factory.mktemp("hostile")
    cases = {f"{row} {name}": case for row, table in ROWS.items() for name, case in table.items()}
    for beside in ("x.safetensors", "cases/x.safetensors", "home/x.safetensors"):
        (folder / beside).parent.mkdir(exist_ok=True)
        (folder / beside).write_bytes(OUTSIDE)
    found = hostile.outcomes(cases, folder)
    shutil.rmtree(folder / "cases")
    keys = [(row, name) for row, table in ROWS.items() for name in table]
    return dict(zip(keys, found.values(), strict=True))


def of_row(row: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", ROWS[row])


def refused(outcome: Outcome, case: Case, *kinds: type[Exception]) -> None:
    """The process lived, ran nothing and made nothing; the error is of one of these types."""
    assert not outcome.kind.startswith("died"), outcome.kind
    assert any(kind.__name__ in outcome.kinds for kind in kinds), outcome
    assert "MappingError" not in outcome.kinds, "it was read as if it were whole"
    assert re.search(case.match, outcome.message), outcome.message
    assert outcome.made == []
    assert outcome.seconds < 5  # of processor time: a crowded machine is no hang
    assert re.search(r"(w\.pth|w\.safetensors|index\.json|\d{4})", outcome.message), "it says where"


@of_row(30)
def test_row_30_malformed_safetensors(outcomes, name):
    refused(outcomes[30, name], ROWS[30][name], CheckpointError)


@of_row(31)
def test_row_31_shards_and_index_disagree(outcomes, name):
    refused(outcomes[31, name], ROWS[31][name], CheckpointError, DownloadError)


@of_row(32)
def test_row_32_pickle_gadgets(outcomes, name):
    known = name.rpartition(",")[0]
    if known in hostile.PICKLES:
        refused(outcomes[32, name], ROWS[32][name], CheckpointError)
        return
    refused(outcomes[32, name], ROWS[32][name], UnsafeCheckpoint)
    value = hostile.GADGETS.get(known)
    if isinstance(value, hostile.Call) and value[0] != hostile.ORDERED_DICT:
        assert value[0].replace(" ", ".") in outcomes[32, name].message
    if known in hostile.LIVE:
        assert re.search(
            r"asks for \w+(\.\w+)+|never writes|makes a os.system", outcomes[32, name].message
        )


@of_row(33)
def test_row_33_shard_names_that_lead_away(outcomes, name):
    refused(outcomes[33, name], ROWS[33][name], UnsafeCheckpoint)


@of_row(34)
def test_row_34_hostile_archives(outcomes, name):
    refused(outcomes[34, name], ROWS[34][name], CheckpointError, IntegrityError)
    assert outcomes[34, name].peak < 64 * MIB + 4 * size_of(34, name)


@of_row(35)
def test_row_35_floods_and_depths(outcomes, name):
    refused(outcomes[35, name], ROWS[35][name], CheckpointError)
    assert outcomes[35, name].peak < 256 * MIB


@of_row(36)
def test_row_36_absurd_sizes(outcomes, name):
    refused(outcomes[36, name], ROWS[36][name], CheckpointError)
    assert outcomes[36, name].peak < 64 * MIB + 4 * size_of(36, name)


@of_row(37)
def test_row_37_files_of_another_kind(outcomes, name):
    refused(outcomes[37, name], ROWS[37][name], UnsupportedFormat)


def size_of(row: int, name: str) -> int:
    return sum(map(len, ROWS[row][name].files.values()))


# What these rows need besides: that the harness would notice, and the other ways in.

EVIL = """{
    "crash": lambda: os.kill(os.getpid(), 11), "exit": lambda: os._exit(0),
    "hang": lambda: time.sleep(99), "file": lambda: Path("gadget").touch(),
    "memory": lambda: bytearray(300 << 20).find(1), "odd": lambda: 1 / 0, "fine": lambda: None,
}[Path(path).name.removesuffix(".pth")]()"""


def test_what_would_go_wrong_is_seen(tmp_path):
    names = ("fine", "crash", "odd", "file", "memory", "hang", "exit", "fine again")
    cases = {name: file(b"", name=f"{name.split()[0]}.pth") for name in names}
    found = hostile.outcomes(cases, tmp_path, load=EVIL, limit=3)
    assert [found[name].kind for name in ("fine", "fine again", "odd")] == [
        *("accepted", "accepted", "ZeroDivisionError")
    ]
    assert found["crash"].kind.startswith("died of -11")
    assert found["hang"].kind.startswith("died of 1:")
    assert found["exit"].kind.startswith("died of 0")
    assert found["file"].made == ["gadget"]
    assert found["memory"].peak > 250 * MIB > 50 * MIB > found["fine"].peak


def test_a_file_written_elsewhere_is_seen(tmp_path):
    with pytest.raises(AssertionError, match="escaped"):
        hostile.outcomes({"out": file(b"")}, tmp_path, load="Path('../escaped').touch()")


def test_row_32_the_gadgets_are_live(tmp_path):
    """Each does run where a pickle is trusted: here, in an empty folder."""
    script = """
import pickle, sys
from pathlib import Path
gadget = Path("gadget")
for name, body in eval(sys.argv[1]).items():
    try:
        pickle.loads(b"\\x80\\x04" + body + b".")
    except Exception:
        pass
    if gadget.exists():
        gadget.unlink()
        print(name)
"""
    process = hostile.python(script, repr(hostile.LIVE), cwd=tmp_path)
    assert process.stdout.splitlines() == list(hostile.LIVE), process.stderr


def test_rows_32_to_37_the_files_differ_from_good_ones_in_one_thing(tmp_path):
    """What is not refused is read: nothing but the fault keeps these files out."""
    for data in (zipped(hostile.GOOD), stream(hostile.GOOD)):
        path = tmp_path / "w.pth"
        path.write_bytes(data)
        assert list(torch.load(path, weights_only=True)) == ["a"]
        with pytest.raises(MappingError, match="no home for a"):
            mlx_zoo.load(DIGITS, path)


def test_row_31_whole_shards_are_read(tmp_path):
    """Of both kinds, by way of links, and beside files that the index does not name."""
    state = state_of(DIGITS)
    names = list(state)
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").mkdir()
    weight_map = {}
    for number, kind in enumerate(("safetensors", "zip")):
        file_name = f"{number}.{'safetensors' if kind == 'safetensors' else 'bin'}"
        part = {n: state[n] for n in names[number::2]}
        (tmp_path / "folder" / file_name).symlink_to(
            write(part, tmp_path / "real" / file_name, kind)
        )
        weight_map |= dict.fromkeys(part, file_name)
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "folder" / "9.safetensors").write_bytes(tensors("a"))
    assert_weights(mlx_zoo.load(DIGITS, f"local-dir:{tmp_path / 'folder'}"), state)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (30, "overlap"), (31, "a shard is missing"), (32, "GLOBAL, zip"),
        (32, "protocol 4, stream"),
        (33, "'../x.safetensors'"), (34, "wrong CRC"), (35, "deep tuple as a key, zip"),
        (36, "rank 100,000, zip"), (37, "TorchScript"), (37, "GGUF"),
    ],
)  # fmt: skip
def test_rows_30_to_37_on_the_command_line(row, name, tmp_path, monkeypatch):
    """One line on stderr and exit status 1; in a process of its own."""
    case = ROWS[row][name]
    for file_name, data in case.files.items():
        (tmp_path / file_name).write_bytes(data)
    before = hostile.listing(tmp_path)
    script = "from mlx_zoo.cli import main; main()"
    weights = str(tmp_path / case.load) if case.load else f"local-dir:{tmp_path}"
    process = hostile.python(script, "load", DIGITS, "--pretrained", weights, cwd=tmp_path)
    assert (process.returncode, process.stdout) == (1, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("Error: ")
    assert re.search(case.match, line)
    assert {n: x for n, x in hostile.listing(tmp_path).items() if "cache" not in n} == before


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on 127.0.0.1, for the real client."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LocalHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub
        huggingface_hub.close_session()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors"])
def test_row_33_a_repository_s_index_is_no_more_trusted(name, hub, tmp_path):
    case = shards({"a": "1.safetensors", "b": name}, "", **ONE)
    hub.push("org/name", dict(case.files))
    with pytest.raises(UnsafeCheckpoint, match=r"index\.json: the shard name"):
        mlx_zoo.load(DIGITS, "org/name")
    assert not [path for path in hub.gets() if path.endswith(".safetensors")]


def test_row_32_and_37_files_from_a_hub(hub):
    for number, (data, kind, message) in enumerate((
        (zipped(b"\x80\x02" + hostile.LIVE["GLOBAL"] + b"."), UnsafeCheckpoint, "os.system"),
        (hostile.torchscript(), UnsupportedFormat, "TorchScript"),
    )):  # fmt: skip
        hub.push(f"org/name{number}", {"pytorch_model.bin": data})
        with pytest.raises(kind, match=message):
            mlx_zoo.load(DIGITS, f"org/name{number}")


@pytest.mark.parametrize("name", hostile.PLAIN)
def test_row_37_what_is_no_checkpoint_at_all(name, tmp_path):
    data, message = hostile.PLAIN[name]
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"w\.pth.*{message}") as caught:
        mlx_zoo.load(DIGITS, tmp_path / "w.pth")
    assert caught.type is CheckpointError
