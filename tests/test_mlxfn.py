"""A network as a function of MLX's own: read again without this package, and by C++."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_zoo
from mlx_zoo.backend import ops
from mlx_zoo.errors import MLXZooError
from mlx_zoo.exporting import export_function

# The five architectures, and what they are called with.
NETWORKS = {
    "resnet_digits": None,
    "vit_digits": None,
    "efficientnet_digits": None,
    "bert_docs": "pretraining",
    "bert_docs_qa": "question-answering",
    "gpt2_docs": "text-generation",
}


def load(name, **options):
    return mlx_zoo.load(name, pretrained=True, task=NETWORKS[name], **options)


def inputs_of(name, batch=1, length=16):
    random = np.random.default_rng(0)
    if name.endswith("digits"):
        return [mx.array(random.standard_normal((batch, 32, 32, 1)).astype(np.float32))]
    mask = np.ones((batch, length), np.int32)
    mask[:, length - 3 :] = 0
    return [mx.array(random.integers(0, 500, mask.shape, dtype=np.int32)), mx.array(mask)]


def outputs_of(model, inputs):
    """By MLX's operations alone, as a trace has them."""
    with ops.plain():
        out = model(*inputs)
    return [out] if isinstance(out, mx.array) else [x for x in out if x is not None]


READER = """
import sys
import mlx.core as mx
assert "mlx_zoo" not in sys.modules
function = mx.import_function(sys.argv[1])
given = mx.load(sys.argv[2])
found = function(*(given[name] for name in sorted(given)))
mx.save_safetensors(sys.argv[3], {str(i): x for i, x in enumerate(found)})
assert not [name for name in sys.modules if name.startswith("mlx_zoo")]
"""


def elsewhere(command, path, inputs, folder):
    """What another process gives for `inputs`."""
    given, taken = folder / "given.safetensors", folder / "taken.safetensors"
    mx.save_safetensors(str(given), {str(i): x for i, x in enumerate(inputs)})
    words = [*command, path, given, taken]
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = mx.load(str(taken))
    return [found[name] for name in sorted(found)]


def agree(found, wanted):
    """To 1e-5, of the largest: another process may have another BLAS."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        a, b = np.array(a), np.array(b)
        assert np.abs(b).max() > 0.1
        assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_is_the_network(name, tmp_path):
    model = load(name)
    sizes = {} if name.endswith("digits") else {"length": 16}
    path = export_function(model, tmp_path / "net.mlxfn", batch=(1, 3), **sizes)
    function = mx.import_function(str(path))
    for batch in (1, 3):
        inputs = inputs_of(name, batch)
        found, wanted = function(*inputs), outputs_of(model, inputs)
        assert len(found) == len(wanted)
        assert all(mx.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match="No imported function found which matches"):
        function(*inputs_of(name, 2))
    agree(elsewhere([sys.executable, "-c", READER], path, inputs, tmp_path), wanted)


def test_texts_of_several_lengths_share_the_weights(tmp_path):
    model = load("gpt2_docs")
    path = export_function(model, tmp_path / "net.mlxfn", length=(4, 8, 16))
    once = export_function(model, tmp_path / "one.mlxfn", length=16)
    assert path.stat().st_size < 1.3 * once.stat().st_size
    function = mx.import_function(str(path))
    for length in (4, 8, 16):
        inputs = inputs_of("gpt2_docs", 1, length)
        assert mx.array_equal(function(*inputs)[0], outputs_of(model, inputs)[0])


def test_it_is_traced_in_eval_mode_and_stays_as_it_was(tmp_path):
    model = load("resnet_digits")
    model.train()
    path = mlx_zoo.export(model, tmp_path / "net.mlxfn")
    assert model.training
    model.eval()
    images = inputs_of("resnet_digits")
    (found,) = mx.import_function(str(path))(*images)
    assert mx.array_equal(found, outputs_of(model, images)[0])
    with pytest.raises(ValueError, match="a function has none"):
        mlx_zoo.export(model, path, dialect="timm")


def test_half_precision_and_other_sizes(tmp_path):
    model = load("resnet_digits", dtype="float16")
    path = export_function(model, tmp_path / "net.mlxfn", img_size=(24, 40))
    images = mx.random.normal((1, 24, 40, 1)).astype(mx.float16)
    (found,) = mx.import_function(str(path))(images)
    assert found.dtype == mx.float16
    assert mx.array_equal(found, outputs_of(model, [images])[0])


def test_an_optimised_and_a_quantised_network(tmp_path):
    model = mlx_zoo.optimize_for_inference(load("resnet_digits"))
    path = mlx_zoo.export(model, tmp_path / "fast.mlxfn")
    images = inputs_of("resnet_digits")
    (found,) = mx.import_function(str(path))(*images)
    assert mx.array_equal(found, outputs_of(model.original, images)[0])
    model = load("gpt2_docs", quantize={"bits": 8, "group_size": 32})
    path = export_function(model, tmp_path / "small.mlxfn", length=8)
    ids = inputs_of("gpt2_docs", 1, 8)
    agree(mx.import_function(str(path))(*ids), outputs_of(model, ids))


def test_the_file_says_what_it_is(tmp_path):
    path = export_function(load("bert_docs_qa"), tmp_path / "a" / "net.mlxfn", length=8)
    *_, said = mx.import_function(str(path), return_metadata=True)
    said = json.loads(said)
    assert said["architecture"] == "bert"
    assert said["task"] == "question-answering"
    assert said["inputs"] == [[[1, 8], [1, 8]]]
    assert [p.name for p in path.parent.iterdir()] == ["net.mlxfn"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("resnet_digits", {"batch": 0}),
        ("resnet_digits", {"batch": (1, "2")}),
        ("resnet_digits", {"batch": ()}),
        ("resnet_digits", {"length": 5}),
        ("gpt2_docs", {"img_size": 5}),
        ("gpt2_docs", {"length": 10_000}),
    ],
)
def test_wrong_sizes(name, wrong, tmp_path):
    (key,) = wrong
    with pytest.raises((ValueError, MLXZooError), match=f"{key}=|positions; truncate"):
        export_function(load(name), tmp_path / "net.mlxfn", **wrong)
    assert not [p for p in tmp_path.iterdir() if p.name != "cache"]


def test_what_was_there_stays_where_it_fails(tmp_path, monkeypatch):
    path = export_function(load("resnet_digits"), tmp_path / "net.mlxfn")
    before = path.read_bytes()
    model = load("vit_digits")
    monkeypatch.setattr(type(model), "__call__", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_function(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["net.mlxfn"]


# C++ --------------------------------------------------------------------------------------------

PROGRAM = """
#include "mlx/mlx.h"
namespace mx = mlx::core;
int main(int, char** argv) {
  auto given = mx::load_safetensors(argv[2]).first;
  std::vector<mx::array> inputs;
  for (size_t i = 0; i < given.size(); i++) inputs.push_back(given.at(std::to_string(i)));
  auto net = mx::import_function(argv[1]);
  auto outputs = net(inputs);
  std::unordered_map<std::string, mx::array> taken;
  for (size_t i = 0; i < outputs.size(); i++) taken.insert({std::to_string(i), outputs[i]});
  mx::save_safetensors(argv[3], taken);
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_cpp_computes_the_same(tmp_path):
    """Against the headers and the library of MLX's own wheel."""
    home = Path(mx.__file__).parent
    (tmp_path / "run.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++20", "-I", home / "include", tmp_path / "run.cpp", "-L"]
    command += [home / "lib", "-lmlx", f"-Wl,-rpath,{home / 'lib'}", "-o", tmp_path / "run"]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in NETWORKS:
        model, inputs = load(name), inputs_of(name, 2)
        sizes = {} if name.endswith("digits") else {"length": 16}
        path = export_function(model, tmp_path / f"{name}.mlxfn", batch=2, **sizes)
        agree(elsewhere([tmp_path / "run"], path, inputs, tmp_path), outputs_of(model, inputs))
