"""What a stranger can write into a converted folder, a repository's texts, or a file that changes.

Every hash of a forged folder is right: whoever writes a folder can make them so.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from faults import DIGITS, digest, digits_repository, right_digest

import mlx_zoo
from mlx_zoo.cli import main
from mlx_zoo.errors import CheckpointError, MLXZooError, VerificationError
from mlx_zoo.hub import cache as store
from mlx_zoo.mapping import engine
from mlx_zoo.verify import verify

ESCAPES = "\x1b[2J\x1b]0;title\x07‮\nERROR: all is well"


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    return mlx_zoo.convert(DIGITS, folder / "digits", cache_dir=folder / "cache")


def forge(honest: Path, folder: Path, change, weights=None) -> Path:
    """A converted folder with another manifest, and hashes that agree with it."""
    manifest = json.loads((honest / "manifest.json").read_text())
    for later in ("size", "sha256", "versions", "format"):
        manifest.pop(later)
    change(manifest)
    folder.mkdir()
    store.write_folder(folder, weights or mx.load(str(honest / "model.safetensors")), manifest)
    return folder


class Gadget:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


REFERENCES = {
    "an option that loads a file": {"options": {"checkpoint_path": "notes.txt"}},
    "an option that downloads": {"options": {"pretrained": True}},
    "a name on a hub": {"name": "hf-hub:evil/repo"},
    "a name in a folder": {"name": "local-dir:."},
    "another library": {"library": "json"},
    "a library that is none": {"library": ["timm"]},
    "options that are none": {"options": [1]},
}


@pytest.mark.parametrize("change", REFERENCES.values(), ids=REFERENCES)
def test_a_folder_cannot_say_what_verification_builds(change, honest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_bytes(pickle.dumps(Gadget(tmp_path / "canary")))

    def planted(manifest):
        manifest["checkpoint"]["reference"].update(change)

    folder = forge(honest, tmp_path / "forged", planted)
    for action in (mlx_zoo.verify, mlx_zoo.load, mlx_zoo.info):
        with pytest.raises(CheckpointError, match=r"original|not one of mlx_zoo's"):
            action(f"local-dir:{folder}", *([True] if action is mlx_zoo.load else []))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "where", ["package:../forged.safetensors", "package:/etc/passwd", "/etc/passwd", "x", 7]
)
@pytest.mark.parametrize("field", ["evidence", "source"])
def test_a_folder_cannot_bring_its_own_proof(field, where, honest, tmp_path):
    def planted(manifest):
        manifest["checkpoint"] |= {"reference": None, field: where}

    folder = forge(honest, tmp_path / "forged", planted)
    with pytest.raises(MLXZooError):
        verify(f"local-dir:{folder}", evidence="published" if field == "evidence" else "original")


def test_what_a_folder_says_of_its_verification_is_not_believed(honest, tmp_path):
    """Where the original can be run; and the report says whose word a fingerprint is."""
    cached = mlx_zoo.load(DIGITS, pretrained=True, verify=True)
    proven = mlx_zoo.convert(cached, tmp_path / "proven")
    model = mlx_zoo.load(f"local-dir:{proven}", pretrained=True)
    assert "so says the folder" in verify(model, evidence="fingerprint").origin
    assert "so says" not in verify(cached, evidence="fingerprint").origin

    weights = {n: x * 1.01 for n, x in mx.load(str(proven / "model.safetensors")).items()}
    folder = forge(proven, tmp_path / "forged", lambda manifest: None, weights)
    said = json.loads((proven / "verification.json").read_text())
    sha256 = json.loads((folder / "manifest.json").read_text())["sha256"]
    (folder / "verification.json").write_text(json.dumps({**said, "sha256": sha256}))
    shutil.copy(proven / "fingerprint.safetensors", folder)
    with pytest.raises(VerificationError, match="does not compute"):
        mlx_zoo.load(f"local-dir:{folder}", pretrained=True, verify=True)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "verification.json"])
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_is_no_file_is_not_waited_for(name, kind, honest, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(honest, folder)
    if name == "model.safetensors":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "size": 0}))
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    if name == "verification.json":
        assert verify(f"local-dir:{folder}").passed
    else:
        with pytest.raises(MLXZooError):
            mlx_zoo.load(f"local-dir:{folder}", pretrained=True)


def test_a_terminal_obeys_nobody_but_us(tmp_path):
    files = digits_repository(tmp_path)
    config = json.loads(files["config.json"])
    config["label_names"] = [ESCAPES] * 10
    config["pretrained_cfg"]["license"] = ESCAPES
    folder = tmp_path / f"odd{ESCAPES[:9]}"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    for command in (["info"], ["load"], ["verify"], ["predict"]):
        more = ["examples/seven.png"] if command == ["predict"] else []
        done = CliRunner().invoke(main, [*command, f"local-dir:{folder}", *more])
        assert done.exit_code == (command == ["verify"]), done.output  # timm has no such network
        assert not {"\x1b", "\x07", "\u202e"} & set(done.output)
        assert "\nERROR" not in done.output
    state = {"fc.weight" + ESCAPES: mx.zeros((2, 2))}
    mx.save_safetensors(str(tmp_path / "odd.safetensors"), state)
    done = CliRunner().invoke(main, ["load", DIGITS, "--pretrained", f"{tmp_path}/odd.safetensors"])
    assert done.exit_code == 1
    assert r"no home for fc.weight\x1b" in done.output
    assert "\x1b" not in done.output
    assert "\nERROR" not in done.output


def test_a_file_that_is_replaced_while_it_is_read_is_never_kept_under_anothers_hash(
    tmp_path, monkeypatch
):
    """Two files take each other's place all the time; in the end, each loads as itself."""
    one = Path(mlx_zoo.__file__).parent / "data" / f"{DIGITS}.pth"
    model = mlx_zoo.load(DIGITS, pretrained=True)
    model.update({"fc": {"bias": model.fc.bias + 1}})
    other = mlx_zoo.export(model, tmp_path / "other.safetensors")
    both = [one.read_bytes(), other.read_bytes()]
    expected = {right_digest(), digest(model)}
    path = tmp_path / "weights.ckpt"
    path.write_bytes(both[0])
    stop = threading.Event()

    def swap():
        while not stop.wait(0.002):
            both.reverse()
            (tmp_path / "next").write_bytes(both[0])
            os.replace(tmp_path / "next", path)

    monkeypatch.setattr(logging.getLogger("mlx_zoo"), "disabled", True)
    swapping = threading.Thread(target=swap)
    swapping.start()
    noticed = 0
    try:
        for _ in range(60):
            try:
                mlx_zoo.load(DIGITS, pretrained=path)
            except MLXZooError:
                noticed += 1
    finally:
        stop.set()
        swapping.join()
    assert noticed
    for content in both:
        path.write_bytes(content)
        assert digest(mlx_zoo.load(DIGITS, pretrained=path)) in expected
        expected.discard(digest(mlx_zoo.load(DIGITS, pretrained=path)))
    assert not expected


@pytest.mark.parametrize(("name", "table"), [("gpt2_docs", "wpe"), ("bert_docs", "word_embed")])
def test_rows_of_a_table_that_no_input_reaches_are_compared(name, table):
    model = mlx_zoo.load(name, pretrained=True)
    layer = getattr(model, table)
    values = np.array(layer.weight.astype(mx.float32))
    values[-3:] *= 1.5
    layer.weight = mx.array(values).astype(layer.weight.dtype)
    report = verify(model)
    assert not report.passed
    assert report.first_divergence == f"{table}.weight"
    assert engine.parameters(model)
