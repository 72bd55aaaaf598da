"""The command line: what it prints, what it exits with, and that it never shows a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import mlx.core as mx
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import mlx_zoo
from mlx_zoo.cli import main
from mlx_zoo.verify import reference


def run(*args, status=0, **options):
    result = CliRunner().invoke(main, [str(a) for a in args], **options)
    assert result.exit_code == status, result.output
    return result.output


def run_json(*args, **options):
    return json.loads(run(*args, "--json", **options))


def test_the_demo_proves_and_predicts():
    output = run("demo")
    assert "the same network" in output
    assert "359 of 360 held-out digits right (99.7%)" in output
    facts = run_json("demo")
    assert facts["verification"]["passed"] is True
    assert facts["right"] == 359
    assert facts["parameters"] == 111_370


def test_the_demo_without_torch(monkeypatch):
    monkeypatch.setattr(reference, "is_installed", lambda library: False)
    facts = run_json("demo")
    assert facts["verification"]["passed"] is True
    assert "stored outputs" in facts["verification"]["evidence"]


def test_list():
    assert run_json("list", "resnet50.a*") == mlx_zoo.list_models("resnet50.a*")
    assert "resnet50.a1_in1k\n" in run("list", "resnet50*")
    assert "no model matches nothing*" in run("list", "nothing*")
    assert "resnet26" in run("list")
    assert "resnet26" not in run_json("list", "--pretrained", "*digits*")


def test_info():
    facts = run_json("info", "resnet50")
    assert facts["name"] == "resnet50.imagenet1k_v2"
    assert facts["num_params"] == 25_557_032
    assert facts["accuracy"] == {"acc1": 80.858, "acc5": 95.434}
    assert facts["preprocessing"]["resize"] == 232
    card = run("info", "bert-base-uncased")
    for fact in ("apache-2.0", "109,482,240", "hf-hub:google-bert/bert-base-uncased"):
        assert fact in card


def test_info_system():
    facts = run_json("info", "--system")
    assert facts["device"] == str(mx.default_device())
    assert facts["blas"]
    assert "mlx-zoo[torch]" in run("info", "--system") or "torch" in facts["PyTorch originals"]
    assert float(facts["float32 matmul on the CPU"].split()[0]) > 0


def test_load_and_the_cache(cache):
    facts = run_json("load", "resnet_digits", "--verify")
    assert facts["parameters"] == 111_370
    (entry,) = run_json("cache", "list")
    assert entry["checkpoint"]["name"] == "resnet_digits"
    assert entry["verification"]["passed"] is True
    assert "1 in " in run("cache", "list")
    assert run_json("cache", "verify") == {"checked": 1, "damaged": {}}

    (weights,) = cache.glob("weights/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert list(run_json("cache", "verify", status=1)["damaged"]) == [str(weights.parent)]
    assert run_json("cache", "prune") == []
    assert run_json("cache", "prune", "--days", 0) == [str(weights.parent)]
    assert run_json("cache", "list") == []


def test_verify(tmp_path):
    report = run_json("verify", "resnet_digits", "--html", tmp_path / "report.html")
    assert report["passed"] is True
    assert len(report["layers"]) == 27
    assert "layer4.0.bn2" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "passed" in run("verify", "resnet_digits", "--seed", 3)


def test_verify_fails_with_status_1(monkeypatch):
    load = mlx_zoo.zoo.load

    def load_and_break(*args, **options):
        model = load(*args, **options)
        model.layer2[0].conv2.weight = model.layer2[0].conv2.weight * 1.01
        return model

    monkeypatch.setattr("mlx_zoo.zoo.load", load_and_break)
    assert "first divergence at layer2.0.conv2" in run("verify", "resnet_digits", status=1)
    assert run_json("verify", "resnet_digits", status=1)["first_divergence"] == "layer2.0.conv2"


def test_convert_and_export(tmp_path):
    folder, file = tmp_path / "converted", tmp_path / "weights.safetensors"
    assert "local-dir:" in run("convert", "resnet_digits", folder)
    assert run_json("load", f"local-dir:{folder}")["parameters"] == 111_370
    run("export", "resnet_digits", file)
    assert load_file(file)["conv1.weight"].shape == (64, 1, 7, 7)
    run("export", "resnet_digits", file, "--dialect", "transformers")
    assert "resnet.embedder.embedder.convolution.weight" in load_file(file)


def test_predict():
    picture = "examples/seven.png"
    one, other = run_json("predict", "resnet_digits", picture, picture, "--top-k", 2)
    assert one == other, "the same picture twice is answered twice"
    assert one["input"] == picture
    assert [len(one["answer"]), one["answer"][0]["label"]] == [2, "7"]
    assert "7\n" in run("predict", "resnet_digits", picture)
    features = ("predict", "vit_digits", picture, "--task", "image-feature-extraction")
    (found,) = run_json(*features)
    assert len(found["answer"]) == 48
    assert len(run(*features).splitlines()) == 1 + 48


def test_embed(minilm):
    rows = run_json("embed", f"local-dir:{minilm}", "a cat", "a dog")
    assert [row["text"] for row in rows] == ["a cat", "a dog"]
    assert len(rows[0]["embedding"]) == 384
    lines = run("embed", f"local-dir:{minilm}", input="a cat\na dog\n").splitlines()
    assert len(lines) == 2
    assert float(lines[0].split()[0]) == pytest.approx(rows[0]["embedding"][0], rel=1e-4)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["load", "resnet19"], 1, "no model is called 'resnet19'.*resnet18"),
        (["load", "local-dir:nowhere"], 1, "no such folder"),
        (["load", "resnet_digits", "--task", "fill-mask"], 1, "resnet has image-classification"),
        (["load", "resnet18", "--offline"], 1, "mlx-zoo load resnet18.imagenet1k_v1$"),
        (["predict", "resnet_digits", "no.png"], 1, "not an image"),
        (["convert", "resnet_digits", "."], 1, "new or empty"),
        (["load"], 2, "Missing argument"),
        (["load", "x", "--dtype", "int4"], 2, "int4"),
        (["dance"], 2, "No such command"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_errors_are_one_clear_line(args, status, message):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == status
    assert "Traceback" not in result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert re.search(message, last), last


def test_a_traceback_for_those_who_ask():
    result = CliRunner().invoke(main, ["--debug", "load", "resnet19"])
    assert isinstance(result.exception, mlx_zoo.errors.UnknownModel)


def test_as_a_module_in_a_pipe():
    command = [sys.executable, "-m", "mlx_zoo", "load", "resnet19"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: no model is called 'resnet19'")
    assert len(result.stderr.strip().splitlines()) == 1
