"""What a network is verified with: its original, the original's fingerprint, published figures.

No evidence is no verdict; evidence of other weights is not used; and every kind finds a mistake.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from originals import randomise
from safetensors.torch import load_file, save_file

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.cli import main
from mlx_zoo.errors import MissingDependency, VerificationError
from mlx_zoo.hub import cache as store
from mlx_zoo.hub.checkpoint import read_state_dict
from mlx_zoo.preprocess.text import Tokenizer
from mlx_zoo.verify import compare, published, reference, stored, sweep, verify
from mlx_zoo.verify.cached import Verdict
from mlx_zoo.verify.circumstances import circumstances
from mlx_zoo.verify.device import DeviceReport, on_another_device
from mlx_zoo.verify.evidence import Answer

reference.import_torchvision()
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()
ABSENT = ("torch", "torchvision", "timm", "transformers", "sentence_transformers", "safetensors")


def bert(folder, seed=0, kind=transformers.BertForMaskedLM, **config):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 40}
    model = randomise(kind(transformers.BertConfig(**{**sizes, **config})), seed)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def resnet(folder, seed=0):
    config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[64, 128], num_labels=5)
    model = randomise(transformers.ResNetForImageClassification(config), seed)
    model.save_pretrained(folder)
    return model


def load(folder, **options):
    return mlx_zoo.load(f"local-dir:{folder}", pretrained=True, **options)


@pytest.fixture
def folders(tmp_path):
    """Two small networks: where they are, and with which options they are loaded."""
    bert(tmp_path / "bert")
    resnet(tmp_path / "resnet")
    return {"bert": {"task": "fill-mask"}, "resnet": {}}


def without_torch(monkeypatch):
    monkeypatch.setattr(reference, "is_installed", lambda library: False)


# ---------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_a_verification_leaves_a_fingerprint_that_says_the_same(kind, folders, tmp_path):
    model = load(tmp_path / kind, **folders[kind])
    first = verify(model)
    assert first.passed
    assert first.evidence_kind == "original"
    print_ = model.entry.path / "fingerprint.safetensors"
    assert print_.stat().st_size < 1 << 20
    again = verify(model, evidence="fingerprint")
    assert again.passed, again.reason
    # Of embeddings, the original shows all rows; that these are the same weights is known then.
    seen = [x for x in first.layers if not x.name.endswith(".weight")]
    assert [x.name for x in again.layers] == [x.name for x in seen]
    assert again.evidence_kind == "fingerprint"
    assert "torch 2" in again.origin
    assert again.versions["torch"] == first.versions["torch"]
    rows = zip((*seen, *first.outputs), (*again.layers, *again.outputs), strict=True)
    for one, other in rows:
        assert other.scale == pytest.approx(one.scale)
        assert 0 < other.max_abs <= one.max_abs or one.max_abs == 0
        assert other.torch_error == one.torch_error  # of all values, not of those that are kept
    assert str(again).count("kept on")
    assert json.loads(again.to_json())["evidence_kind"] == "fingerprint"


def test_what_is_kept_are_the_originals_values(tmp_path):
    original = resnet(tmp_path / "resnet")
    model = load(tmp_path / "resnet")
    verify(model, size=64, seed=3)
    arrays = read_state_dict([model.entry.path / "fingerprint.safetensors"])
    pixels = compare.random_inputs("images", model.config, 64, 3)["pixel_values"]
    with torch.no_grad():
        wanted = original.double()(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).double()).logits
    np.testing.assert_allclose(np.array(arrays["output.output"]), wanted.numpy(), rtol=1e-12)
    again = verify(model, evidence="fingerprint")
    assert again.seed == 3
    assert "64, 64" in again.inputs


def test_large_inputs_are_made_again_from_their_seed(tmp_path, monkeypatch):
    resnet(tmp_path / "resnet")
    model = load(tmp_path / "resnet")
    verify(model, size=192)
    arrays = read_state_dict([model.entry.path / "fingerprint.safetensors"])
    assert not [name for name in arrays if name.startswith("input.")]
    assert verify(model, evidence="fingerprint").passed
    made = compare.random_inputs
    monkeypatch.setattr(
        compare, "random_inputs", lambda *a: {k: x + 1e-7 for k, x in made(*a).items()}
    )
    with pytest.raises(VerificationError, match="inputs cannot be made again"):
        verify(model, evidence="fingerprint")


def test_a_fingerprint_of_other_weights_is_not_used(tmp_path, monkeypatch):
    for name, seed in (("one", 0), ("other", 1)):
        bert(tmp_path / name, seed)
    one, other = (load(tmp_path / name, task="fill-mask") for name in ("one", "other"))
    verify(one)
    for file in ("fingerprint.safetensors", "verification.json"):
        shutil.copyfile(one.entry.path / file, other.entry.path / file)
    with pytest.raises(VerificationError, match="is of other weights"):
        verify(other, evidence="fingerprint")
    without_torch(monkeypatch)
    with pytest.raises(MissingDependency, match="is of other weights"):
        verify(other)
    assert verify(one).evidence_kind == "fingerprint"


@pytest.mark.parametrize("damage", ["a byte", "cut", "no verdict", "failed", "format", "index"])
def test_a_fingerprint_that_was_changed_is_not_used(damage, tmp_path):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    verify(model)
    path = model.entry.path / "fingerprint.safetensors"
    data = path.read_bytes()
    done = dict(model.entry.verification)
    if damage == "a byte":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "no verdict":
        (model.entry.path / "verification.json").unlink()
    elif damage == "failed":
        store.stamp(model.entry, {**done, "passed": False})
    else:  # by someone who mends the hashes: of no use, but no accident either
        import hashlib

        if damage == "format":
            data = data.replace(b'\\"format\\": 1', b'\\"format\\": 7')
        else:
            data = data.replace(b'.index"', b'.indey"')
        path.write_bytes(data)
        store.stamp(model.entry, {**done, "fingerprint": hashlib.sha256(data).hexdigest()})
    if damage == "index":  # the samples have lost their places
        assert not verify(model, evidence="fingerprint").passed
        return
    with pytest.raises(VerificationError, match=r"fingerprint in .* (is|cannot)"):
        verify(model, evidence="fingerprint")


def test_another_type_has_a_fingerprint_of_its_own(tmp_path):
    bert(tmp_path / "bert")
    verify(load(tmp_path / "bert", task="fill-mask"))
    half = load(tmp_path / "bert", task="fill-mask", dtype="float16")
    with pytest.raises(VerificationError, match="has left a fingerprint"):
        verify(half, evidence="fingerprint")
    assert verify(half).passed
    assert verify(half, evidence="fingerprint").tolerance == 1e-2


def test_of_a_changed_network_nothing_is_kept(tmp_path):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    perturb(model)
    assert not verify(model).passed
    assert not (model.entry.path / "verification.json").exists()
    assert verify(load(tmp_path / "bert", task="fill-mask")).passed
    assert not verify(model, evidence="fingerprint").passed
    assert model.entry.verification["passed"] is True


def test_a_lesser_verification_does_not_replace_one_against_the_original(tmp_path, monkeypatch):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    verify(model)
    before = model.entry.verification
    without_torch(monkeypatch)
    assert verify(model).passed
    assert model.entry.verification == before


def test_a_failure_against_the_original_is_not_replaced_by_a_lesser_pass():
    model = mlx_zoo.load("resnet_digits", pretrained=True)
    assert verify(model).evidence_kind == "original"
    store.stamp(model.entry, {**model.entry.verification, "passed": False})
    assert verify(model, evidence="published").passed
    assert model.entry.verification["passed"] is False
    assert not stored.verified(model, model.entry)


def test_a_file_that_has_changed_takes_no_fingerprint_away(tmp_path):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    verify(model)
    folder = mlx_zoo.convert(model, tmp_path / "proven")
    bert(tmp_path / "bert", seed=1)
    for loaded in (model, load(folder, task="fill-mask")):
        report = verify(loaded)
        assert not report.passed
        assert "model.safetensors is not the file that was converted" in " ".join(report.notes)
        assert verify(loaded, evidence="fingerprint").passed


def test_weights_that_are_quantised_as_they_are_read_are_other_weights(tmp_path):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask", verify=True)
    folder = mlx_zoo.convert(model, tmp_path / "proven")
    plain = load(folder, task="fill-mask")
    assert stored.verified_here(plain, plain.entry)
    few_bits = load(folder, task="fill-mask", quantize={"bits": 8, "group_size": 32})
    assert not stored.verified_here(few_bits, few_bits.entry)


def test_what_is_kept_of_a_failure_is_json(tmp_path):
    bert(tmp_path / "bert")
    state = load_file(tmp_path / "bert" / "model.safetensors")
    state["bert.encoder.layer.1.output.dense.bias"][0] = float("nan")
    save_file(state, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "bert", task="fill-mask", allow_nonfinite=True)
    assert not verify(model).passed
    found = json.loads((model.entry.path / "verification.json").read_text(), parse_constant=int)
    assert found["passed"] is False
    assert found["max_abs"] is None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_short_texts(size, tmp_path):
    bert(tmp_path / "bert")
    assert verify(load(tmp_path / "bert", task="fill-mask"), size=size).passed


def test_the_random_numbers_of_others_stay():
    mx.random.seed(5)
    torch.manual_seed(5)
    state = mx.random.state[0].tolist(), torch.get_rng_state().tolist()
    verify("resnet_digits")
    verify("vit_digits", quantize=8)
    assert (mx.random.state[0].tolist(), torch.get_rng_state().tolist()) == state


def test_an_original_that_cannot_be_imported_gives_way_to_its_fingerprint(tmp_path, monkeypatch):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    verify(model)

    def broken():
        raise ImportError("planted")

    monkeypatch.setattr(reference, "import_torchvision", broken)
    report = verify(model)
    assert report.evidence_kind == "fingerprint"
    assert "the original cannot be run: planted" in report.notes
    with pytest.raises(MissingDependency, match="transformers is broken: planted"):
        verify(model, evidence="original")


def test_what_is_not_used_is_said(tmp_path):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    verify(model, size=9, seed=2)
    report = verify(model, evidence="fingerprint", size=5, seed=1)
    assert "size and seed were not used" in " ".join(report.notes)
    assert "(2, 9)" in report.inputs
    with pytest.raises(ValueError, match="size=5: a quantised network"):
        verify("vit_digits", quantize=8, size=5)


def test_how_to_repeat_it_can_be_repeated(tmp_path):
    checkpoint = replace(mlx_zoo.info("resnet_digits"), revision="abc")

    def said(model, **options):
        return circumstances(checkpoint, model, options)["repeat"]["Python"]

    assert said("resnet18") == "mlx_zoo.verify('resnet18', revision='abc')"
    assert said("hf-hub:a/b") == "mlx_zoo.verify('hf-hub:a/b', revision='abc')"
    # These would be refused with a revision.
    assert said("hf-hub:a/b@main") == "mlx_zoo.verify('hf-hub:a/b@main')"
    assert "revision" not in said(f"local-dir:{tmp_path}")
    assert "revision" not in said(tmp_path)
    assert "revision" not in said("resnet18", pretrained="hf-hub:a/b")


def test_a_converted_folder_takes_its_fingerprint_along(tmp_path, monkeypatch, cache):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    bare = mlx_zoo.convert(model, tmp_path / "bare")
    assert not (bare / "fingerprint.safetensors").exists()
    verify(model)
    folder = mlx_zoo.convert(model, tmp_path / "proven")
    perturb(model)
    changed = mlx_zoo.convert(model, tmp_path / "changed")
    assert not (changed / "verification.json").exists()
    shutil.rmtree(tmp_path / "bert")
    shutil.rmtree(cache)
    without_torch(monkeypatch)
    loaded = load(folder, task="fill-mask")
    report = verify(loaded)
    assert report.passed
    assert report.evidence_kind == "fingerprint"
    again = mlx_zoo.convert(loaded, tmp_path / "again")  # and from there to the next
    assert verify(load(again, task="fill-mask")).passed
    for other in (bare, changed):
        with pytest.raises(MissingDependency, match="no verification against the original"):
            verify(load(other, task="fill-mask"))


def test_another_kind_of_machine_verifies_for_itself(tmp_path, monkeypatch):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask", verify=True)
    entry = model.entry
    assert stored.verified_here(model, entry)
    done = dict(entry.verification)
    store.stamp(entry, {**done, "versions": {**done["versions"], "platform": "Darwin arm64"}})
    assert not stored.verified_here(model, entry)
    without_torch(monkeypatch)
    load(tmp_path / "bert", task="fill-mask", verify=True)  # by the fingerprint
    model = load(tmp_path / "bert", task="fill-mask")
    perturb(model)
    assert not verify(model).passed


def test_without_its_files_the_original_gives_way_to_its_fingerprint(tmp_path):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    verify(model)
    shutil.rmtree(tmp_path / "bert")
    report = verify(model)
    assert report.passed
    assert report.evidence_kind == "fingerprint"
    assert "the original cannot be run" in " ".join(report.notes)
    with pytest.raises(mlx_zoo.errors.DownloadError):
        verify(model, evidence="original")


# ------------------------------------------------------------------------------- without PyTorch

ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))  # None: not to be found
import mlx_zoo
from mlx_zoo.errors import MissingDependency
"""


def alone(code):
    """What Python prints where nothing of PyTorch's can be imported, nor a network be asked."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_pytorch(tmp_path):
    for name, seed in (("proven", 0), ("unproven", 1)):
        bert(tmp_path / name, seed)
    mlx_zoo.load(f"local-dir:{tmp_path / 'proven'}", True, task="fill-mask", verify=True)
    load(tmp_path / "unproven", task="fill-mask")
    printed = alone(
        f"""
for name in ({str(tmp_path / "proven")!r}, {str(tmp_path / "unproven")!r}):
    try:
        report = mlx_zoo.verify("local-dir:" + name, task="fill-mask")
        print(report.evidence_kind, report.passed, len(report.layers))
    except MissingDependency as error:
        print("refused:", error)
report = mlx_zoo.verify("resnet_digits")
print(report.evidence_kind, report.passed, len(report.layers))
try:
    mlx_zoo.verify("resnet18")
except MissingDependency as error:
    print("refused:", error)
"""
    ).splitlines()
    assert printed[0] == "fingerprint True 23"
    assert "needs torch and transformers" in printed[1]
    assert printed[2].startswith("published True")
    assert "resnet18" in printed[3]
    assert "not in the cache" in printed[3]


# --------------------------------------------------------------- every kind of evidence can fail


def perturb(model, layer="blocks.0.mlp.fc1"):
    """A weight a hundredth larger than it was."""
    module = dict(model.named_modules())[layer]
    module.weight = module.weight * 1.01


def exchange(model):
    first, second = model.blocks[0].attn, model.blocks[1].attn
    first.v_proj, second.v_proj = second.v_proj, first.v_proj


@pytest.mark.parametrize("plant", [perturb, exchange])
@pytest.mark.parametrize("kind", ["original", "fingerprint"])
def test_a_wrong_network_fails(kind, plant, tmp_path):
    bert(tmp_path / "bert")
    assert verify(load(tmp_path / "bert", task="fill-mask")).passed
    model = load(tmp_path / "bert", task="fill-mask")
    plant(model)
    report = verify(model, evidence=kind)
    assert not report.passed
    assert report.first_divergence.startswith("blocks.0.")


def test_one_single_weight_shows_in_a_fingerprint(tmp_path):
    resnet(tmp_path / "resnet")
    model = load(tmp_path / "resnet")
    assert verify(model).passed
    weight = np.array(model.layer1[0].conv1.weight)
    weight[np.unravel_index(np.abs(weight).argmax(), weight.shape)] *= 1.01
    model.layer1[0].conv1.weight = mx.array(weight)
    assert not verify(model, evidence="fingerprint").passed


@pytest.mark.parametrize("name", ["resnet_digits", "vit_digits", "gpt2_docs"])
def test_a_wrong_bundled_network_fails(name):
    model = mlx_zoo.load(name, pretrained=True)
    model.set_dtype(mx.float32)
    assert verify(model, evidence="published").passed
    perturb(model, "layer2.0.conv1" if name == "resnet_digits" else "blocks.0.mlp.fc1")
    assert not verify(model, evidence="published").passed


@pytest.mark.parametrize("plant", [perturb, exchange])
def test_minilm_gives_the_similarities_that_are_published(plant, minilm, monkeypatch):
    """The genuine weights, and the figures that sentence-transformers' own page shows."""
    without_torch(monkeypatch)
    model = load(minilm, task="sentence-embedding")
    report = verify(model)
    assert report.passed, report.reason
    assert report.evidence == "published outputs, 3 values"
    assert "sentence-transformers" in report.origin
    assert report.max_abs < 5e-5  # half of the last digit that is printed
    if plant is perturb:
        for layer in range(3):
            perturb(model, f"blocks.{layer}.mlp.fc1")
    else:
        exchange(model)
    assert not verify(model).passed


def test_nothing_is_published_for_another_head(minilm, monkeypatch):
    without_torch(monkeypatch)
    model = load(minilm)
    with pytest.raises(MissingDependency, match="no outputs are published"):
        verify(model)
    with pytest.raises(VerificationError, match="no outputs are published"):
        verify(model, evidence="published")


def test_no_compared_value_is_no_pass():
    nothing = np.zeros(0)
    assert not Answer(nothing, nothing).judge("x", nothing, "float32").passed
    few = Answer(nothing, nothing, index=np.zeros(0, int), shape=(4,), scale=1.0)
    assert not few.judge("x", np.ones(4), "float32").passed
    far = Answer(np.ones(1), np.ones(1), index=np.array([9]))
    assert not far.judge("x", np.ones(4), "float32").passed
    ones, nines = np.ones(1), np.full(4, 9.0)
    for odd in ({"scale": np.inf}, {"rounding": np.inf}, {"scale": np.nan}):
        some = Answer(ones, ones, index=np.array([0]), shape=(4,), **odd)
        assert not some.judge("x", nines, "float32").passed
        assert not some.judge("x", nines, "float16").passed
    report = replace(mlx_zoo.verify("resnet_digits"), outputs=(), layers=())
    assert not report.passed
    assert json.loads(report.to_json())["max_abs"] is None


# ------------------------------------------------------------------------------ published figures


def test_what_is_published_is_well_formed_and_says_where_it_is_from(minilm):
    files = {p.name: p for p in minilm.iterdir()}
    uncased = Tokenizer.from_files(files).backend  # of BERT's own vocabulary
    sources = {c.source for c in registry.checkpoints().values()}
    words = {"Hello": ["fashion", "role", "new", "super", "fine"]}
    words["The man"] = ["carpenter", "waiter", "barber", "mechanic", "salesman"]
    for row in published.read():
        assert f"hf-hub:{row['repository']}" in sources
        assert row["cases"]
        for case in row["cases"]:
            assert case["origin"].startswith("https://github.com/huggingface/")
            assert case["kind"] in published.CASES
            if row["repository"].endswith("bert-base-uncased") and case["kind"] == "fill-mask":
                start = next(x for x in words if case["texts"][0].startswith(x))
                assert [uncased.id_to_token(i) for i in case["tokens"]] == words[start]


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Have figures published of the weights of a folder, and torch gone."""

    def publish(model, **case):
        hashes = list(model.entry.manifest["source_sha256"].values())
        common = {"what": "x", "origin": "https://x.org", "read": "2026-01-01"}
        case = {**common, "tasks": [model.config.task], **case}
        row = {"repository": "nobody/nothing", "sha256": hashes, "cases": [case]}
        file = tmp_path / "published.json"
        file.write_text(json.dumps([row]))
        monkeypatch.setattr(published, "FILE", file)
        without_torch(monkeypatch)

    return publish


def with_tokenizer(folder, minilm):
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (minilm / name).exists():
            shutil.copyfile(minilm / name, folder / name)


def test_hidden_states_that_are_published(tmp_path, publish):
    original = bert(tmp_path / "bert", kind=transformers.BertModel)
    model = load(tmp_path / "bert")
    ids, mask = [[5, 6, 7, 8]], [[0, 1, 1, 1]]
    with torch.no_grad():
        x = original(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    values = [[round(v, 4) for v in row] for row in x[0, 1:3, 1:4].tolist()]
    part = [[0, 1], [1, 3], [1, 4]]
    facts = {"input_ids": ids, "attention_mask": mask, "output": "last_hidden_state"}
    publish(model, kind="hidden states", part=part, values=values, **facts)
    report = verify(model)
    assert report.passed, report.reason
    assert report.evidence == "published outputs, 6 values"
    perturb(model)
    assert not verify(model).passed
    publish(model, kind="hidden states", part=[[0, 0], [1, 3], [1, 4]], values=[], **facts)
    assert not verify(load(tmp_path / "bert")).passed


def test_masks_filled_as_published(tmp_path, publish, minilm):
    original = bert(tmp_path / "bert", vocab_size=30522)
    with_tokenizer(tmp_path / "bert", minilm)
    model = load(tmp_path / "bert", task="fill-mask")
    text = "the man worked as a [MASK]."
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")(
        text, return_tensors="pt"
    )
    with torch.no_grad():
        logits = original(**tokens).logits[0, tokens.input_ids[0] == 103]
    shares, best = logits.softmax(-1)[0].topk(5)
    publish(model, kind="fill-mask", texts=[text], tokens=best.tolist(), values=shares.tolist())
    assert verify(model).passed
    perturb(model)
    assert not verify(model).passed
    wrong = [*best.tolist()[:4], 7]
    publish(model, kind="fill-mask", texts=[text], tokens=wrong, values=shares.tolist())
    report = verify(load(tmp_path / "bert", task="fill-mask"))
    assert not report.passed
    assert "not the values" in report.reason


def test_texts_continued_as_published(tmp_path, publish):
    config = transformers.GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    original = randomise(transformers.GPT2LMHeadModel(config))
    original.tie_weights()
    original.save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2")
    whole = original.generate(
        torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=-1
    )[0].tolist()
    publish(model, kind="continuation", prompt=whole[:2], continuation=whole[2:])
    report = verify(model)
    assert report.passed, report.reason
    assert report.evidence == "published outputs, 20 values"
    exchange(model)
    assert not verify(model).passed
    other = [*whole[2:-1], (whole[-1] + 1) % 99]
    publish(model, kind="continuation", prompt=whole[:2], continuation=other)
    assert not verify(load(tmp_path / "gpt2")).passed


def test_the_end_of_a_text_is_one_token():
    """As the rows of DialoGPT write it."""
    folder = mlx_zoo.describe.path_of("package:gpt2_docs")
    tokenizer = Tokenizer.from_files({p.name: p for p in folder.iterdir()})
    (ids,) = tokenizer("hello<|endoftext|>").input_ids
    assert tokenizer.backend.id_to_token(int(ids[-1])) == "<|endoftext|>"


# ---------------------------------------------------------------------------- half precision, GPUs


def test_rounded_weights_are_said_to_be_rounded(tmp_path):
    bert(tmp_path / "bert")
    folder = mlx_zoo.convert(
        load(tmp_path / "bert", task="fill-mask", dtype="float16"), tmp_path / "h"
    )
    report = verify(load(folder, task="fill-mask", dtype="float32"))
    assert not report.passed
    assert "those of float16: they were rounded" in " ".join(report.notes)
    assert "rounded" in " ".join(str(report).split())
    assert verify(load(folder, task="fill-mask")).passed
    whole = load(tmp_path / "bert", task="fill-mask")
    perturb(whole)
    assert "rounded" not in " ".join(verify(whole).notes)


def test_a_published_file_that_has_changed_is_said_to_have(tmp_path):
    bert(tmp_path / "bert")
    model = load(tmp_path / "bert", task="fill-mask")
    bert(tmp_path / "bert", seed=1)
    report = verify(model)
    assert not report.passed
    assert "model.safetensors is not the file that was converted" in " ".join(report.notes)


def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="MLX's default device here is the CPU"):
        verify("resnet_digits", device="gpu")


def test_the_command_line_turns_tf32_off_first(monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    done = CliRunner().invoke(main, ["verify", "resnet_digits", "--device", "gpu"])
    assert done.exit_code == 1
    assert os.environ["MLX_ENABLE_TF32"] == "0"


@pytest.mark.parametrize("real", [True, False])
def test_another_device_has_the_cpu_beside_it(real, monkeypatch):
    module = sys.modules["mlx_zoo.verify"]
    monkeypatch.setattr(module, "_check_arguments", lambda *args: None)
    monkeypatch.setattr(module, "real_float32", lambda device: real)
    seen = []
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    monkeypatch.setattr(stored, "keep", lambda *args: seen.append(os.environ["MLX_ENABLE_TF32"]))
    report = verify("resnet_digits", device="gpu")
    assert seen == ["0"]
    assert "MLX_ENABLE_TF32" not in os.environ
    assert report.passed
    assert report.cpu.passed
    assert "on the cpu: the same network" in " ".join(report.notes)
    assert ("not float32" in " ".join(report.notes)) is not real
    assert json.loads(report.to_json())["cpu"]["passed"] is True


def test_a_device_whose_arithmetic_differs_is_no_plain_failure():
    passed = mlx_zoo.verify("resnet_digits")
    coarse = replace(passed.outputs[0], max_abs=1e-2, error=1e-2)
    gpu = replace(passed, device="gpu", outputs=(coarse,))
    report = on_another_device(gpu, passed, real=False)
    assert isinstance(report, DeviceReport)
    assert not report.passed
    assert report.reason.startswith(
        "the same network, whose arithmetic on this gpu differs: float32"
    )
    assert "float32 on this gpu is not float32" in str(report).replace("\n", " ")
    quantised = mlx_zoo.verify("vit_digits", quantize=8)
    assert "note: on the cpu" in str(on_another_device(quantised, quantised, real=True))
    both = on_another_device(gpu, replace(passed, outputs=(coarse,)), real=True)
    assert both.reason.startswith("first divergence")


# ------------------------------------------------------------------------------- all that is cached


@pytest.fixture
def cached(tmp_path, cache):
    """One that passes, one damaged, one wrong, one without evidence; a bundled one; none."""
    for seed, name in enumerate(("good", "damaged", "wrong", "unproven")):
        bert(tmp_path / name, seed)
    models = {name: load(tmp_path / name, task="fill-mask") for name in ("good", "damaged")}
    models |= {name: load(tmp_path / name, task="fill-mask") for name in ("wrong", "unproven")}
    mlx_zoo.load("resnet_digits", pretrained=True)
    with (models["damaged"].entry.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    perturb(models["wrong"])
    entry = models["wrong"].entry
    weights = mlx_zoo.mapping.engine.parameters(models["wrong"])
    manifest = {k: v for k, v in entry.manifest.items() if k not in ("created", "size", "sha256")}
    store.write_folder(entry.path, weights, manifest)
    shutil.rmtree(tmp_path / "unproven")
    (cache / "weights" / "nothing-0").mkdir()
    return models


WANTED = {
    "good": "passed",
    "damaged": "damaged",
    "wrong": "FAILED",
    "unproven": "no evidence",
    "nothing-0": "damaged",
    "resnet_digits": "passed",
}


def test_a_sweep_says_of_each_what_was_found(cached):
    begun = []
    found = list(sweep(begin=begun.append))
    assert {x.name: x.verdict for x in found} == WANTED
    assert len(begun) == len(WANTED)
    by_name = {x.name: x for x in found}
    good = by_name["good"]
    assert good.passed
    assert 0 < good.ratio < 4
    assert good.dtype == "float32"
    assert "sha256" in by_name["damaged"].reason
    assert "blocks.0.mlp.fc1" in by_name["wrong"].reason
    assert "fingerprint" in by_name["unproven"].reason
    assert [x.name for x in found if x.passed] == ["good", "resnet_digits"]


@pytest.mark.parametrize("odd", [{"source": 7}, {"source": None}, {"config": []}, 5])
def test_a_sweep_survives_any_manifest(odd, cached):
    entry = cached["good"].entry
    manifest = dict(entry.manifest)
    manifest["checkpoint"] = {**manifest["checkpoint"], **odd} if isinstance(odd, dict) else odd
    (entry.path / "manifest.json").write_text(json.dumps(manifest))
    wanted = {**WANTED, "good": "damaged"}
    assert sorted(x.verdict for x in sweep()) == sorted(wanted.values())


def test_a_verdict_is_json(tmp_path):
    report = mlx_zoo.verify("resnet_digits")
    odd = replace(report.outputs[0], max_abs=np.inf, error=np.inf)
    verdict = Verdict(tmp_path, "x", "", "", "FAILED", "", 0.0, replace(report, outputs=(odd,)))
    found = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert (found["max_abs"], found["times_pytorch"]) == (None, None)


def test_the_command_that_verifies_all(cached, tmp_path):
    done = CliRunner().invoke(main, ["verify", "--all", "--local", "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["passed"], found["of"], found["interrupted"]) == (2, 6, False)
    assert {x["name"]: x["verdict"] for x in found["verdicts"]} == WANTED
    pages = tmp_path / "pages"
    done = CliRunner().invoke(main, ["verify", "--all", "--local", "--html", str(pages)])
    assert done.exit_code == 1
    assert "2 of 6 passed" in done.stdout
    assert all(verdict in done.stdout for verdict in WANTED.values())
    assert len(list(pages.glob("*.html"))) == 3
    for name, model in cached.items():
        if name != "good":
            shutil.rmtree(model.entry.path)
    shutil.rmtree(cached["good"].entry.path.parent / "nothing-0")
    done = CliRunner().invoke(main, ["verify", "--all", "--local"])
    assert done.exit_code == 0, done.stdout
    assert "2 of 2 passed" in done.stdout


def test_a_sweep_that_is_interrupted_prints_what_it_has(cached, monkeypatch):
    seen = []

    def interrupted(model, verify=verify, **options):
        if seen:
            raise KeyboardInterrupt
        seen.append(model)
        return verify(model, **options)

    monkeypatch.setattr(sys.modules["mlx_zoo.verify"], "verify", interrupted)
    done = CliRunner().invoke(main, ["verify", "--all", "--local"])
    assert done.exit_code == 130
    assert "interrupted" in done.stdout
    assert "damaged" in done.stdout  # found before


def test_an_empty_cache_is_no_pass():
    done = CliRunner().invoke(main, ["verify", "--all", "--local"])
    assert done.exit_code == 1
    assert "nothing is cached" in done.stdout


def test_an_accident_in_one_does_not_stop_the_others(cached, monkeypatch):
    def accident(model, verify=verify, **options):
        if "wrong" in model.checkpoint.source:
            raise RuntimeError("planted")
        return verify(model, **options)

    monkeypatch.setattr(sys.modules["mlx_zoo.verify"], "verify", accident)
    found = {x.name: x for x in sweep()}
    assert found["wrong"].verdict == "error"
    assert "planted" in found["wrong"].reason
    assert found["good"].passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all"], "would download, convert and verify all 5"),
        (["--local"], "--local goes with --all"),
        (["--all", "--local", "resnet18"], "NAME would be ignored"),
        (["--all", "--local", "--task", "fill-mask"], "--task would be ignored"),
        (["--all", "--local", "--size", "64"], "--size would be ignored"),
        ([], "Missing argument 'NAME'"),
    ],
)
def test_wrong_usage(arguments, message):
    done = CliRunner().invoke(main, ["verify", *arguments])
    assert done.exit_code == 2
    assert message in done.output


def test_an_unknown_kind_of_evidence():
    with pytest.raises(ValueError, match="evidence='hearsay': one of original, fingerprint"):
        verify("resnet_digits", evidence="hearsay")
    with pytest.raises(ValueError, match="compared with its own weights"):
        verify("vit_digits", quantize=8, evidence="original")
