"""Dependencies, addresses, licences: promises of SECURITY.md beside the matrix of faults."""

from __future__ import annotations

import ast
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import LocalHub
from originals import randomise

import mlx_zoo
from mlx_zoo import converting, registry
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()
import transformers  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mlx_zoo.__file__).parent
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(requirement for extra in extras for requirement in extra),
    ]


@pytest.mark.parametrize("requirement", requirements())
def test_every_dependency_has_an_upper_bound(requirement):
    versions = requirement.partition(";")[0].replace(" ", "")
    if not versions.startswith("mlx-zoo["):  # one extra within another
        assert re.search(r"<\d|==\d", versions)
        assert re.search(r">=\d|==\d", versions)


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_in_the_package_could_execute_a_file(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib"}
    assert not imported & {"marshal", "shelve"}
    for name, call in calls(tree):
        assert name not in {"eval", "exec", "compile", "__import__", "os.system", "np.load"}, name
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert options.get("trust_remote_code", "False") == "False"
        assert options.get("allow_pickle", "False") == "False"
        if name == "torch.load":
            assert options["weights_only"] == "True"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_address_in_the_package_is_plain_http(path):
    addresses = re.findall(r"http://[\w.]+", path.read_text(encoding="utf-8"))
    assert not {address for address in addresses if "www.w3.org" not in address}


def test_every_published_address_is_https_or_a_hub_s():
    for checkpoint in registry.checkpoints().values():
        if checkpoint.source:
            assert checkpoint.source.startswith(("https://", "hf-hub:", "package:")), checkpoint


# Licences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("license", "is_non_commercial"),
    [
        ("cc-by-nc-4.0", True),
        ("CC-BY-NC-SA-4.0", True),
        ("apple-amlr", True),
        ("fair-noncommercial-research-license", True),
        ("some-non-commercial", True),
        ("cc-by-4.0", False),
        ("apache-2.0", False),
        ("mit", False),
        ("bsd-3-clause", False),
        ("apple-ascl", False),
        ("nvidia-open-model-license", False),
        ("ncsa", False),
        (None, False),
    ],
)
def test_which_licences_forbid_commercial_use(license, is_non_commercial):
    checkpoint = replace(mlx_zoo.info("resnet18"), license=license)
    assert checkpoint.is_non_commercial is is_non_commercial


def test_a_licence_that_forbids_commercial_use_is_said_before_the_download(
    monkeypatch, caplog, tmp_path
):
    class Download(Exception):
        pass

    def fetch(*args, **options):
        raise Download(*[record.getMessage() for record in caplog.records])

    converting.warn_once.cache_clear()
    monkeypatch.setattr(converting, "fetch_weights", fetch)
    name = "resnet18.fb_swsl_ig1b_ft_in1k"
    monkeypatch.setattr(converting, "resolve_revision", lambda *args, **options: "a" * 40)
    with caplog.at_level(logging.WARNING, "mlx_zoo"), pytest.raises(Download) as before:
        mlx_zoo.load(name, pretrained=True, cache_dir=tmp_path)
    (said,) = before.value.args
    assert name in said
    assert "cc-by-nc-4.0" in said
    assert "does not allow commercial use" in said

    caplog.clear()
    with caplog.at_level(logging.WARNING, "mlx_zoo"), pytest.raises(Download) as before:
        mlx_zoo.load("resnet18.a1_in1k", pretrained=True, cache_dir=tmp_path)
    assert before.value.args == ()


def test_a_repository_that_nobody_here_knows_has_the_licence_of_its_card(
    monkeypatch, caplog, tmp_path
):
    original = randomise(transformers.BertModel(transformers.BertConfig(**SMALL)))
    original.save_pretrained(tmp_path / "bert")
    files = {path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()}
    converting.warn_once.cache_clear()
    with LocalHub() as hub:
        hub.push("org/name", files)
        hub.push("org/free", files)
        hub.licenses = {"org/name": "cc-by-nc-sa-4.0", "org/free": "\x1b[2Jmit"}
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert mlx_zoo.info("org/name").license == "cc-by-nc-sa-4.0"
        assert mlx_zoo.info("org/free").license is None  # nothing that a terminal might obey
        assert not caplog.records
        model = mlx_zoo.load("org/name", pretrained=True)
        mlx_zoo.load("org/name", pretrained=True)
        mlx_zoo.load("org/free", pretrained=True)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "org/name: the licence of these weights, cc-by-nc-sa-4.0, does not allow" in said
    assert model.checkpoint.license == "cc-by-nc-sa-4.0"
