"""Folders that travel: shards, model cards, reports; and their way to a hub and back.

The hub is a server on this machine, its client the real huggingface_hub.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from hub_server import client_and_hub

import mlx_zoo
from mlx_zoo import publishing, registry, zoo
from mlx_zoo.errors import (
    CheckpointError,
    FileNotInRepository,
    IntegrityError,
    RepositoryNotFound,
    UploadError,
    VerificationError,
)
from mlx_zoo.hub import cache as store
from mlx_zoo.hub import upload as upload_module
from mlx_zoo.mapping import engine

ROOT = Path(__file__).parents[1]
DIGITS, SMALL = "resnet_digits", 100_000  # bytes: half a megabyte of weights becomes five shards
REPO = "me/digits"
BERT = mlx_zoo.describe.path_of("package:bert_docs_topic")  # a folder as transformers writes it

# The client sends files in a way that its transport does not like.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with client_and_hub(monkeypatch, tmp_path / "client") as hub:
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def local(folder):
    return f"local-dir:{folder}"


def same(one, other):
    ours, theirs = engine.parameters(one), engine.parameters(other)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype
        assert mx.array_equal(x, theirs[name]).item(), name


def files_in(folder):
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}


def front_matter(folder):
    text = (Path(folder) / "README.md").read_text(encoding="utf-8")
    start, facts, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(facts)


# Shards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [DIGITS, "gpt2_docs"])
def test_weights_in_shards_are_the_same_weights(name, tmp_path):
    model = mlx_zoo.load(name, pretrained=True)
    folder = mlx_zoo.convert(model, tmp_path / "out", max_shard_size=SMALL)
    shards = sorted(path.name for path in folder.glob("model-*"))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert not (folder / "model.safetensors").exists()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = engine.parameters(model)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights.values())
    for shard in shards:
        held = mx.load(str(folder / shard))
        assert {key for key, home in index["weight_map"].items() if home == shard} == {*held}
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= SMALL
    loaded = mlx_zoo.load(local(folder), pretrained=True)
    same(loaded, model)
    assert loaded.config == model.config
    again = mlx_zoo.convert(local(folder), tmp_path / "whole")
    assert "model.safetensors" in files_in(again)
    assert not list(again.glob("model-*"))
    same(mlx_zoo.load(local(again), pretrained=True), model)


def one_bit(folder):
    path = folder / "model-00002-of-00005.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def exchanged(folder):
    one, other = (folder / f"model-0000{i}-of-00005.safetensors" for i in (1, 2))
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def index_with(change):
    def alter(folder):
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return alter


def manifest_with(change):
    def alter(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return alter


def renamed_shard(to):
    def change(manifest):
        rows = [*manifest["shards"].items()]
        manifest["shards"] = {to: rows[0][1], **dict(rows[1:])}

    return manifest_with(change)


def another_hash(manifest):
    manifest["sha256"] = "0" * 64


DAMAGED = {
    "a bit": one_bit,
    "a shard is missing": lambda f: (f / "model-00003-of-00005.safetensors").unlink(),
    "a shard is cut off": lambda f: os.truncate(f / "model-00003-of-00005.safetensors", 900),
    "two shards are exchanged": exchanged,
    "a foreign shard": lambda f: shutil.copy(
        f / "model-00001-of-00005.safetensors", f / "model-00006-of-00005.safetensors"
    ),
    "a whole file beside the shards": lambda f: shutil.copy(
        f / "model-00001-of-00005.safetensors", f / "model.safetensors"
    ),
    "no index": lambda f: (f / "model.safetensors.index.json").unlink(),
    "the index names another home": index_with(
        lambda homes: homes.update({"fc.bias": "model-00001-of-00005.safetensors"})
    ),
    "the index names a path": index_with(
        lambda homes: homes.update({"fc.bias": "../secret.safetensors"})
    ),
    "the index lacks a tensor": index_with(lambda homes: homes.pop("fc.bias")),
    "the manifest names a path": renamed_shard("../secret.safetensors"),
    "the manifest names an absolute path": renamed_shard("/etc/passwd"),
    "the manifest lacks a shard": manifest_with(
        lambda m: m["shards"].pop("model-00005-of-00005.safetensors")
    ),
    "the manifest's shards are a list": manifest_with(lambda m: m.update(shards=[*m["shards"]])),
    "the manifest's shards are none": manifest_with(lambda m: m.update(shards={})),
    "a shard without a hash": manifest_with(
        lambda m: m["shards"].update({"model-00001-of-00005.safetensors": None})
    ),
    "another hash of all": manifest_with(another_hash),
    "no shards are named": manifest_with(lambda m: m.pop("shards")),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    place = {"cache_dir": folder / "cache"}
    return mlx_zoo.convert(DIGITS, folder / "out", max_shard_size=SMALL, **place)


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_or_hostile_shards_are_refused(damage, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    mlx_zoo.load(local(folder), pretrained=True)
    (tmp_path / "secret.safetensors").write_bytes(b"x" * 100)
    damage(folder)
    with pytest.raises(IntegrityError, match=f"{folder} is damaged"):
        mlx_zoo.load(local(folder), pretrained=True)


def test_a_stray_shard_beside_whole_weights_is_refused(tmp_path):
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out")
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"model-00001-of-00001\.safetensors does not belong"):
        mlx_zoo.load(local(folder), pretrained=True)


@pytest.mark.parametrize(
    ("said", "found"), [(7, 7), ("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("300", 300)]
)
def test_sizes_of_shards(said, found):
    assert store.as_bytes(said) == found


@pytest.mark.parametrize("said", [0, -1, "5 apples", "", True, None, "GB"])
def test_sizes_that_are_none(said, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        mlx_zoo.convert(DIGITS, tmp_path / "out", max_shard_size=said)
    assert not (tmp_path / "out").exists()


# What a folder says -----------------------------------------------------------------------------


def test_equal_conversions_are_equal_bytes(tmp_path):
    made = [
        files_in(mlx_zoo.convert(DIGITS, tmp_path / name, verify=True, max_shard_size=SMALL))
        for name in ("one", "other")
    ]
    assert made[0].keys() >= {"README.md", "config.json", "preprocessing.json", "report.html"}
    assert made[0] == made[1]


def test_a_card_says_where_weights_are_from_and_how_they_were_verified(tmp_path):
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "Not verified" in card
    assert "report.html" not in card
    assert not list(folder.glob("report.*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    checkpoint = mlx_zoo.info(DIGITS)
    for fact in (
        *("package:resnet_digits.pth", checkpoint.sha256, manifest["sha256"], manifest["spec"]),
        *(
            "top-1 accuracy, as published | 99.72 %",
            "111,370 parameters",
            "`mit`",
            "dialect | timm",
        ),
    ):
        assert fact in card
    assert front_matter(folder) == {
        "license": "mit",
        "library_name": "mlx",
        "pipeline_tag": "image-classification",
        "tags": ["mlx", "mlx_zoo", "resnet"],
    }
    preprocessing = json.loads((folder / "preprocessing.json").read_text())
    assert preprocessing["size"] == 32
    assert tuple(preprocessing["mean"]) == checkpoint.preprocessing.mean

    folder = mlx_zoo.convert(DIGITS, tmp_path / "verified", verify=True)
    card = (folder / "README.md").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert report["passed"]
    assert f"largest difference | {report['max_abs']:.1e} |" in card
    assert "**passed**" in card
    assert "[report.html](report.html)" in card
    assert "layer2.0.conv2" in (folder / "report.html").read_text()
    # And where it was verified before, with the figures of then.
    card = (mlx_zoo.convert(DIGITS, tmp_path / "later") / "README.md").read_text()
    assert "**passed**" in card


def test_a_card_is_executable(tmp_path):
    folder = mlx_zoo.convert("bert_docs_topic", tmp_path / "out", task="text-classification")
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(folder))
    names = {}
    exec(code, names)
    assert names["run"]("a text")[0]["label"]


def entry_with(tmp_path, **facts):
    """A converted folder whose manifest says something else of the checkpoint."""
    model = mlx_zoo.load(DIGITS, pretrained=True)
    model.checkpoint = replace(model.checkpoint, **facts)
    return mlx_zoo.convert(model, tmp_path / "out")


def test_licences_have_the_names_of_the_hub(tmp_path, caplog):
    facts = front_matter(entry_with(tmp_path / "1", license="CC-BY-NC-4.0"))
    assert facts["license"] == "cc-by-nc-4.0"
    card = (tmp_path / "1" / "out" / "README.md").read_text()
    assert "**It does not allow commercial use.**" in card
    facts = front_matter(entry_with(tmp_path / "2", license="nvidia-open-model-license"))
    assert (facts["license"], facts["license_name"]) == ("other", "nvidia-open-model-license")
    facts = front_matter(entry_with(tmp_path / "3", license=None))
    assert facts["license"] == "unknown"
    known = {c.license for c in registry.checkpoints().values() if c.license}
    odd = {"nvidia-open-model-license"}
    assert known - odd <= publishing.LICENSES, "a new licence: is it one of the hub's?"


def test_what_a_stranger_wrote_stays_text(tmp_path):
    evil = 'mit"\ntags: [owned]\n---\n# <script>alert(1)</script> | [x](y)'
    folder = entry_with(tmp_path, license=evil, name="resnet_digits")
    facts = front_matter(folder)
    assert facts["license"] == "other"
    assert "owned" not in facts["tags"]
    assert "<script>" not in (folder / "README.md").read_text().split("---\n", 2)[2]


def test_a_quantised_network_of_the_hub_names_what_it_was_made_from(tmp_path):
    model = mlx_zoo.load("gpt2_docs", pretrained=True, quantize=4)
    model.checkpoint = replace(model.checkpoint, source="hf-hub:org/gpt@main", folder=None)
    entry = store.read_entry(mlx_zoo.convert("gpt2_docs", tmp_path / "out", quantize=4))
    facts = yaml.safe_load(publishing.card(entry, model.checkpoint, model.config).split("---\n")[1])
    assert facts["base_model"] == "org/gpt"
    assert facts["base_model_relation"] == "quantized"
    assert facts["pipeline_tag"] == "text-generation"
    assert "4 bits" in publishing.card(entry, model.checkpoint, model.config)


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("bert_base_uncased", "google-bert/bert-base-uncased"),
        ("me/mine", "me/mine"),
        (DIGITS, None),
    ],
)
def test_a_fine_tuned_network_names_what_it_was_made_from(base, shown, tmp_path):
    folder = entry_with(tmp_path, base_model=base, name="mine", reference=None, evidence=None)
    facts = front_matter(folder)
    assert facts.get("base_model") == shown
    assert facts.get("base_model_relation") == (shown and "finetune")
    assert f"fine-tuned from `{base}`" in (folder / "README.md").read_text()
    again = mlx_zoo.load(local(folder), pretrained=True)
    assert again.checkpoint.base_model == base


def test_metrics_are_in_the_card_and_stay_there(tmp_path):
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out", metrics={"accuracy": 0.98765, "steps": 10})
    for written in (folder, mlx_zoo.convert(local(folder), tmp_path / "again")):
        card = (written / "README.md").read_text()
        assert "accuracy, of the best evaluation | 0.9877 |" in card
        assert "steps, of the best evaluation | 10 |" in card
    changed = mlx_zoo.convert(local(folder), tmp_path / "half", dtype="float16")
    assert "evaluation" not in (changed / "README.md").read_text()


def test_the_config_is_for_people(tmp_path):
    folder = mlx_zoo.convert(DIGITS, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["library_name"] == "mlx_zoo"
    assert config["config"]["num_classes"] == 10
    config["config"]["num_classes"] = 3  # nothing believes it
    (folder / "config.json").write_text(json.dumps(config))
    assert mlx_zoo.load(local(folder), pretrained=True).config.num_classes == 10
    again = mlx_zoo.convert(local(folder), tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["config"]["num_classes"] == 10
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="a converted folder without its manifest"):
        mlx_zoo.load(local(folder), pretrained=True)
    # A publisher's stays what it is: the tokenizer needs it.
    folder = mlx_zoo.convert(local(BERT), tmp_path / "bert")
    assert (folder / "config.json").read_bytes() == (BERT / "config.json").read_bytes()


def test_a_network_that_is_another_is_not_written(tmp_path):
    model = mlx_zoo.load(DIGITS, pretrained=True)
    model.fc.weight = model.fc.weight * 1.01
    with pytest.raises(VerificationError, match="does not compute what its original computes"):
        mlx_zoo.convert(model, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


# To a hub and back ------------------------------------------------------------------------------


def fresh(tmp_path, name="elsewhere"):
    return {"cache_dir": tmp_path / name}


@pytest.mark.parametrize("limit", ["5GB", SMALL])
def test_what_was_uploaded_loads_bit_for_bit(limit, hub, tmp_path, capfd):
    model = mlx_zoo.load(DIGITS, pretrained=True, verify=True)
    folder = mlx_zoo.convert(model, tmp_path / "out", max_shard_size=limit, upload_repo=REPO)
    assert len(hub.commits[REPO]) == 2, "the empty repository, and one commit"
    assert {n: x for n, x in hub.files(REPO).items() if n != ".gitattributes"} == files_in(folder)
    assert capfd.readouterr().err == "", "no bars in a pipe"
    loaded = mlx_zoo.load(f"hf-hub:{REPO}", pretrained=True, **fresh(tmp_path))
    same(loaded, model)
    assert loaded.config == model.config
    assert replace(loaded.checkpoint, folder=None) == model.checkpoint
    about = mlx_zoo.info(REPO)
    assert about.source == f"hf-hub:{REPO}"
    assert about.revision == hub.branches[REPO]["main"]
    # What it says of its verification is its writer's word, and nothing is written beside it.
    before = files_in(tmp_path / "elsewhere" / "hub")
    report = mlx_zoo.verify(loaded, evidence="fingerprint")
    assert report.passed
    assert "so says the folder" in report.origin
    assert mlx_zoo.verify(loaded).evidence_kind == "original"
    assert files_in(tmp_path / "elsewhere" / "hub") == before
    # Later it needs no network.
    gets = len(hub.requests)
    offline = mlx_zoo.load(REPO, pretrained=True, local_files_only=True, **fresh(tmp_path))
    same(offline, model)
    assert len(hub.requests) == gets
    half = mlx_zoo.load(REPO, pretrained=True, dtype="float16", num_classes=3, **fresh(tmp_path))
    assert half.fc.weight.shape == (3, 48)
    assert half.fc.weight.dtype == mx.float16


def test_texts_go_along(hub, tmp_path):
    task = "text-classification"
    mlx_zoo.convert(local(BERT), tmp_path / "out", task=task, upload_repo="me/topic")
    answers = [
        mlx_zoo.pipeline(task, name, **fresh(tmp_path))("A graph with weighted edges.")
        for name in ("me/topic", local(BERT))
    ]
    assert answers[0] == answers[1]
    copy = mlx_zoo.convert("me/topic", tmp_path / "copy", task=task)
    assert files_in(copy).keys() == files_in(tmp_path / "out").keys()


def test_an_upload_does_not_tell_of_this_disk(hub, tmp_path):
    original = shutil.copytree(BERT, tmp_path / "secret-place" / "my-bert")
    model = mlx_zoo.load(local(original), pretrained=True, verify=True)
    folder = mlx_zoo.convert(model, tmp_path / "out", verify=True, upload_repo="me/bert")
    for name, content in files_in(folder).items():
        assert b"secret-place" not in content, name
        assert str(tmp_path).encode() not in content, name
    assert "local-dir:my-bert" in (folder / "README.md").read_text()
    same(mlx_zoo.load("me/bert", pretrained=True, **fresh(tmp_path)), model)


def test_a_private_repository(hub, tmp_path, monkeypatch):
    mlx_zoo.convert(DIGITS, tmp_path / "out", upload_repo=REPO, private=True)
    assert REPO in hub.private
    mlx_zoo.load(REPO, pretrained=True, **fresh(tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFound):
        mlx_zoo.load(REPO, pretrained=True, **fresh(tmp_path, "a stranger's"))
    with pytest.raises(ValueError, match="private=True goes with upload_repo="):
        mlx_zoo.convert(DIGITS, tmp_path / "x", private=True)


def test_a_second_upload_replaces_the_first(hub, tmp_path):
    mlx_zoo.convert(DIGITS, tmp_path / "1", max_shard_size=SMALL, upload_repo=REPO, verify=True)
    files = hub.files(REPO)
    hub.push(REPO, {**files, "picture.png": b"the owner's", "model_notes.md": b"theirs, too"})
    model = mlx_zoo.load("vit_digits", pretrained=True)
    folder = mlx_zoo.convert(model, tmp_path / "2", upload_repo=REPO)
    kept = {".gitattributes", "picture.png", "model_notes.md"}
    assert {*hub.files(REPO)} == {*files_in(folder)} | kept
    same(mlx_zoo.load(REPO, pretrained=True, **fresh(tmp_path)), model)
    commits, puts = len(hub.commits[REPO]), len(hub.puts)
    mlx_zoo.convert(model, tmp_path / "3", upload_repo=REPO)
    assert len(hub.commits[REPO]) == commits, "nothing has changed"
    assert len(hub.puts) == puts


# What goes wrong with an upload -----------------------------------------------------------------


def converted(tmp_path, **options):
    return mlx_zoo.convert(DIGITS, tmp_path / "out", upload_repo=REPO, **options)


def test_without_a_token_nothing_is_begun(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UploadError, match=r"no token .* `hf auth login`, or set HF_TOKEN"):
        converted(tmp_path)
    assert not (tmp_path / "out").exists()
    assert hub.requests == []


def test_without_network_nothing_is_begun(hub, tmp_path, monkeypatch):
    with pytest.raises(UploadError, match="nothing is uploaded while the network is off"):
        converted(tmp_path, local_files_only=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UploadError, match="nothing is uploaded while the network is off"):
        converted(tmp_path)
    assert not (tmp_path / "out").exists()
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["digits", "datasets/me/digits", "../me/x", "me/x@main", ""])
def test_what_is_no_repository_of_models(repo, hub, tmp_path):
    with pytest.raises(ValueError, match="org/name"):
        mlx_zoo.convert(DIGITS, tmp_path / "out", upload_repo=repo)
    assert hub.requests == []


def refused(tmp_path, match, **options):
    """An upload that fails: the folder is whole, and the message says how to do it again."""
    with pytest.raises(UploadError, match=match) as caught:
        converted(tmp_path, **options)
    folder = tmp_path / "out"
    assert f"hf upload {REPO} {folder} ." in str(caught.value)
    assert mlx_zoo.load(local(folder), pretrained=True)
    assert len(str(caught.value).splitlines()) == 1


def test_a_token_that_the_hub_does_not_know(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(tmp_path, "the hub does not know this token")


def test_an_organisation_of_others(hub, tmp_path):
    hub.read_only.add("me")
    refused(tmp_path, "this token may not write there")
    assert REPO not in hub.commits


def test_a_repository_of_others_that_may_be_read(hub, tmp_path):
    hub.push(REPO, {".gitattributes": b""})
    hub.read_only.add("me")
    refused(tmp_path, "this token may not write there")


def test_a_repository_with_something_else(hub, tmp_path):
    before = {"pytorch_model.bin": b"of somebody", "config.json": b"{}"}
    hub.push(REPO, before)
    refused(tmp_path, "holds something that mlx_zoo has not written .config.json, pytorch_model")
    assert hub.files(REPO) == before


def test_a_public_repository_is_not_taken_for_a_private_one(hub, tmp_path):
    hub.push(REPO, {".gitattributes": b""})
    refused(tmp_path, "exists and is public", private=True)
    assert hub.files(REPO) == {".gitattributes": b""}


STEPS = {
    "create": "/repos/create",
    "look": f"/api/models/{REPO}",
    "preupload": "/preupload/main",
    "batch": "/objects/batch",
    "put": "",
    "commit": "/commit/main",
}


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_fails_once(step, hub, tmp_path):
    method = {"look": "GET", "put": "PUT"}.get(step, "POST")
    status = {"create": 500, "commit": 429}.get(step, 503)
    fault = hub.fault(STEPS[step], "status", status=status, times=1, methods=(method,))
    converted(tmp_path)
    assert fault.times == 0
    same(
        mlx_zoo.load(REPO, pretrained=True, **fresh(tmp_path)),
        mlx_zoo.load(DIGITS, pretrained=True),
    )
    assert len(hub.commits[REPO]) == 2


@pytest.mark.parametrize("step", ["create", "put", "commit"])
def test_a_server_that_keeps_failing(step, hub, tmp_path):
    method = {"look": "GET", "put": "PUT"}.get(step, "POST")
    hub.fault(STEPS[step], "status", status=503, times=1000, methods=(method,))
    refused(tmp_path, "503")
    assert len(hub.commits.get(REPO, {"": {}})) == 1, "no commit"
    hub.faults.clear()
    shutil.rmtree(tmp_path / "out")
    converted(tmp_path)
    mlx_zoo.load(REPO, pretrained=True, **fresh(tmp_path))


def test_a_connection_that_is_reset_within_a_file(hub, tmp_path):
    fault = hub.fault("", "reset", methods=("PUT",), times=2)
    converted(tmp_path, max_shard_size=SMALL)
    assert fault.times == 0
    mlx_zoo.load(REPO, pretrained=True, **fresh(tmp_path))


def test_a_connection_that_is_reset_again_and_again(hub, tmp_path):
    hub.fault("", "reset", methods=("PUT",), times=1000)
    refused(tmp_path, "me/digits: ")


def test_a_commit_whose_answer_is_lost(hub, tmp_path, monkeypatch):
    """It was made, and is found to be made."""
    from huggingface_hub import HfApi

    from mlx_zoo.hub.asking import Truncated

    commits = []

    def create_commit(self, *args, create_commit=HfApi.create_commit, **options):
        commits.append(create_commit(self, *args, **options))
        if len(commits) == 1:
            raise Truncated("the answer")
        return commits[-1]

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    converted(tmp_path)
    assert len(hub.commits[REPO]) == 2
    assert commits[0].oid == commits[1].oid


def test_a_branch_that_moves_meanwhile(hub, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    def create_commit(self, *args, create_commit=HfApi.create_commit, **options):
        hub.push(REPO, {"manifest.json": b"another's"})
        return create_commit(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    refused(tmp_path, "somebody else has changed the repository meanwhile")
    assert hub.files(REPO) == {"manifest.json": b"another's"}


def test_files_are_not_put_to_any_address(hub, tmp_path):
    hub.lfs_address = "http://192.0.2.1"
    refused(tmp_path, "asks for files to be put to http://192.0.2.1/.*: refused")


def test_a_licence_that_forbids_it(hub, tmp_path, caplog):
    model = mlx_zoo.load(DIGITS, pretrained=True)
    own = model.checkpoint
    model.checkpoint = replace(own, license="cc-by-nc-nd-4.0")
    with pytest.raises(ValueError, match=r"cc-by-nc-nd-4\.0, allows no derivatives"):
        mlx_zoo.convert(model, tmp_path / "out", upload_repo=REPO)
    assert not (tmp_path / "out").exists()
    assert hub.requests == []
    mlx_zoo.convert(model, tmp_path / "out")  # for oneself
    model.checkpoint = replace(own, license=None)
    mlx_zoo.convert(model, tmp_path / "unknown", upload_repo=REPO)
    assert "no licence is known" in caplog.text


def test_a_network_that_failed_verification_is_not_uploaded(hub, tmp_path):
    model = mlx_zoo.load(DIGITS, pretrained=True)
    store.stamp(model.entry, {"passed": False, "first_divergence": "layer1"})
    with pytest.raises(VerificationError, match="first divergence at layer1"):
        mlx_zoo.convert(DIGITS, tmp_path / "out", upload_repo=REPO)
    assert hub.requests == []
    assert mlx_zoo.convert(DIGITS, tmp_path / "out", verify=False)  # for oneself


KILLED = """
import os, signal, sys
import mlx_zoo
from huggingface_hub import HfApi
from huggingface_hub.utils import get_session

def die(request):
    if request.method == sys.argv[2] and str(request.url).find(sys.argv[3]) >= 0:
        os.kill(os.getpid(), signal.SIGKILL)

get_session().event_hooks["request"].append(die)
mlx_zoo.convert("resnet_digits", sys.argv[1], upload_repo="me/digits")
"""


@pytest.mark.parametrize(("method", "where"), [("PUT", "lfs-put"), ("POST", "/commit/main")])
def test_a_killed_upload_is_done_again(method, where, hub, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", KILLED, tmp_path / "killed", method, where]
    killed = subprocess.run([*map(str, command)], env=environment, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert hub.files(REPO) == {".gitattributes": b""}, "nothing can be seen of it"
    there = len(hub.puts)
    assert mlx_zoo.load(local(tmp_path / "killed"), pretrained=True), "the folder is whole"
    converted(tmp_path)
    same(
        mlx_zoo.load(REPO, pretrained=True, **fresh(tmp_path)),
        mlx_zoo.load(DIGITS, pretrained=True),
    )
    assert len(hub.puts) == len({*hub.puts}), "nothing was sent twice"
    assert (there > 0) == (method == "POST")


def test_bars_are_for_terminals(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()  # transformers, told so by another test, disables the hub's, too
    with upload_module._bars_on_a_terminal():
        assert are_progress_bars_disabled(), "the tests' stderr is none"
    assert not are_progress_bars_disabled()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with upload_module._bars_on_a_terminal():
        assert not are_progress_bars_disabled()


# A hub's word is a stranger's -------------------------------------------------------------------


STRAY = {"a foreign shard", "a whole file beside the shards"}


@pytest.mark.parametrize("damage", sorted({*DAMAGED} - STRAY))
def test_a_damaged_or_hostile_repository_is_refused(damage, hub, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    DAMAGED[damage](folder)
    hub.push("evil/repo", files_in(folder))
    with pytest.raises((IntegrityError, FileNotInRepository)):
        mlx_zoo.load("evil/repo", pretrained=True)
    assert not [path for path in hub.requests if "secret" in path or "passwd" in path]


@pytest.mark.parametrize("damage", sorted(STRAY))
def test_what_the_manifest_does_not_name_is_not_fetched(damage, hub, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    DAMAGED[damage](folder)
    hub.push("org/repo", files_in(folder))
    mlx_zoo.load("org/repo", pretrained=True)
    stray = {*files_in(folder)} - {*files_in(sharded)}
    assert not [path for path in hub.gets() if path.endswith(tuple(stray))]


def test_a_repository_cannot_say_what_verification_builds(hub, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["checkpoint"]["reference"]["options"] = {"checkpoint_path": "x"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    hub.push("evil/repo", files_in(folder))
    with pytest.raises(CheckpointError, match="its original"):
        mlx_zoo.load("evil/repo", pretrained=True)


def test_what_a_repository_says_of_its_verification_is_not_believed(hub, tmp_path):
    """Not even where the client's files are in the folder of our own cache."""
    model = mlx_zoo.load(DIGITS, pretrained=True, verify=True)
    entry = store.read_entry(mlx_zoo.convert(model, tmp_path / "out"))
    weights = {name: x * 1.01 for name, x in engine.parameters(model).items()}
    later = ("size", "sha256", "format", "versions")
    said, manifest = entry.verification, {k: v for k, v in entry.manifest.items() if k not in later}
    store.write_folder(entry.path, weights, manifest)
    forged = store.read_entry(entry.path)
    store.stamp(forged, {**said, "sha256": forged.manifest["sha256"]})
    hub.push("evil/repo", files_in(entry.path))
    with pytest.raises(VerificationError, match="does not compute"):
        mlx_zoo.load("evil/repo", pretrained=True, verify=True, **fresh(tmp_path))


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"files": []}'])
def test_a_manifest_of_another_program_is_none_of_ours(content, hub):
    files = {name: (BERT / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.push("org/bert", {**files, "manifest.json": content})
    loaded = mlx_zoo.load("org/bert", pretrained=True)
    same(loaded, mlx_zoo.load(local(BERT), pretrained=True))


# The command line and the scripts ---------------------------------------------------------------


def test_the_command_uploads(hub, tmp_path):
    from click.testing import CliRunner

    from mlx_zoo.cli import main

    run = CliRunner().invoke
    words = ["convert", DIGITS, str(tmp_path / "out"), "--upload-repo", REPO, "--json"]
    done = run(main, [*words, "--max-shard-size", "100KB", "--verify"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["uploaded"] == f"hf-hub:{REPO}"
    assert {*said["files"]} == {*files_in(tmp_path / "out")}
    assert "report.html" in said["files"]
    words[2] = str(tmp_path / "again")
    hub.read_only.add("me")
    hub.push(REPO, {".gitattributes": b""})
    done = run(main, words)
    assert done.exit_code == 1
    assert done.output.startswith("Error: me/digits: this token may not write there")
    assert run(main, ["convert", DIGITS, str(tmp_path / "x"), "--private"]).exit_code == 2


SCRIPTS = {
    "resnet": (DIGITS, ["--dtype", "float16"]),
    "vit": ("vit_digits", ["--verify"]),
    "efficientnet": ("efficientnet_digits", []),
    "bert": ("bert_docs", ["--task", "fill-mask"]),
    "gpt2": ("gpt2_docs", ["--quantize", "8"]),
}


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script as a process would: gives its exit status and what it printed."""
    monkeypatch.syspath_prepend(str(ROOT / "convert_scripts"))

    def run(family, *words):
        path = ROOT / "convert_scripts" / f"convert_{family}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        return ended.value.code, capsys.readouterr().out

    yield run
    sys.modules.pop("command", None)


@pytest.mark.parametrize("family", SCRIPTS)
def test_a_script_converts(family, script, tmp_path):
    name, options = SCRIPTS[family]
    status, said = script(family, name, "--output", tmp_path / "out", *options)
    assert status == 0
    assert "1 of 1 converted" in said
    folder = tmp_path / "out" / name
    task = {"bert": "fill-mask"}.get(family)
    model = mlx_zoo.load(local(folder), pretrained=True, task=task)
    assert (folder / "report.html").exists() == ("--verify" in options)
    if family == "resnet":
        assert zoo.kind_of(model) == mx.float16
    if family == "gpt2":
        assert model.quantization.bits == 8
    assert "usage: convert_" in script(family, "--help")[1]


def test_one_failure_of_several_does_not_stop_the_others(script, tmp_path):
    names = ["no_such_network", DIGITS, "vit_digits"]
    status, said = script("resnet", *names, "--output", tmp_path / "out")
    assert status == 1
    assert [line.split()[:2] for line in said.splitlines()[1:4]] == [
        ["no_such_network", "FAILED"],
        [DIGITS, "converted"],
        ["vit_digits", "FAILED"],
    ]
    assert "convert_vit.py converts it" in said
    assert said.endswith("1 of 3 converted\n")
    mlx_zoo.load(local(tmp_path / "out" / DIGITS), pretrained=True)


def test_a_script_uploads(script, hub, tmp_path):
    status, _ = script("resnet", DIGITS, "--output", tmp_path, "--upload-repo", REPO, "--private")
    assert status == 0
    assert REPO in hub.private
    mlx_zoo.load(REPO, pretrained=True, **fresh(tmp_path))
    assert script("resnet", "a", "b", "--upload-repo", REPO)[0] == 2
    assert script("resnet", DIGITS, "--private")[0] == 2


def test_every_family_has_a_script():
    scripts = {
        path.stem.removeprefix("convert_") for path in ROOT.glob("convert_scripts/convert_*")
    }
    assert scripts == {*registry.architectures()} == {*SCRIPTS}
