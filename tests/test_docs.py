"""The documentation: its site builds, its links lead somewhere, every block of it runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlencode, urlsplit

import pages
import pytest
from pages import NOT_RUN, PAGES, ROOT, blocks, reason

import mlx_zoo
from mlx_zoo import registry, training
from mlx_zoo.cli import main

LIMIT = 300  # seconds: against hanging

# Blocks -----------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with the examples, where `mlx-zoo` is the package under test."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    program = tmp_path / "bin" / "mlx-zoo"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_zoo "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(page: str, desk: Path) -> str:
    """What the blocks of a page print."""
    command = [sys.executable, pages.__file__, page]
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert not re.search(r"\w*Warning: ", done.stderr), done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_the_blocks_of_a_page_run(page, desk):
    if any(reason(page, block) is None for block in blocks((ROOT / page).read_text("utf-8"))):
        run(page, desk)


def test_the_blocks_of_the_readme_print_what_they_should(desk):
    printed = run("README.md", desk)
    assert "passed: the same network" in printed
    assert "[{'label': '7'" in printed
    assert "'answer': 'int'" in printed
    assert "'label': 'networkx'" in printed
    assert printed.splitlines()[-1], "the text that was generated"


@pytest.mark.parametrize("page", PAGES)
def test_a_block_is_run_or_the_list_says_why_not(page):
    found = list(blocks((ROOT / page).read_text(encoding="utf-8")))
    for block in found:
        assert block.language in {"python", "sh", "text"}, f"{page}: line {block.line}"
        assert block.language != "text" or reason(page, block), (
            f"{page}, line {block.line}: python and sh are run; NOT_RUN in pages.py has the rest"
        )
    starts = NOT_RUN.get(page, {})
    assert len([block for block in found if reason(page, block)]) == len(starts), "an old reason"


def test_every_page_with_a_reason_is_there():
    assert set(PAGES) >= NOT_RUN.keys()


# The site ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page has, and what it wants."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []  # to be followed by the reader
        self.parts: list[str] = []  # fetched by the browser
        self.rows: list[dict[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        self.ids |= {said[name] for name in ("id", "name") if said.get(name)}
        if tag == "a" and "href" in said:
            self.links.append(said["href"])
        elif tag == "link" and said.get("rel") not in ("prev", "next", "canonical"):
            self.parts.append(said["href"])
        elif tag == "tr":
            self.rows.append(said)
        self.parts += [said[name] for name in ("src", "srcset", "data", "poster") if said.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation, built as continuous integration builds it."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder / "site"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def built(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_within_the_site_leads_somewhere(site, built):
    assert len(built) > 25
    lost = []
    for path, page in built.items():
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                assert target.scheme == "https", link
                continue
            there = (path.parent / unquote(target.path)).resolve() if target.path else path
            anchors = built[there].ids if there in built else set()
            if not there.exists() or (target.fragment and unquote(target.fragment) not in anchors):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert not lost


def test_the_browser_fetches_nothing_from_elsewhere(site, built):
    for path, page in built.items():
        for part in page.parts:
            target = urlsplit(part)
            if target.scheme != "data":
                assert target.scheme + target.netloc == "", f"{path}: {part}"
                assert (path.parent / unquote(target.path)).exists(), f"{path}: {part}"
        assert 'class="mermaid"' not in path.read_text(encoding="utf-8")  # whose script is foreign
    for style in site.rglob("*.css"):
        wanted = re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", style.read_text("utf-8"))
        assert not [x for x in wanted if not x.startswith(("data:", "#")) and "//" in x], style


def test_what_is_public_has_its_place_in_the_reference(site, built):
    ids = set().union(*(page.ids for page in built.values()))
    public = {f"mlx_zoo.{name}" for name in mlx_zoo.__all__} - {"mlx_zoo.errors"}
    public |= {f"mlx_zoo.training.{name}" for name in training.__all__}
    public |= {
        f"mlx_zoo.errors.{name}"
        for name, value in vars(mlx_zoo.errors).items()
        if isinstance(value, type) and issubclass(value, mlx_zoo.errors.MLXZooError)
    }
    public |= {f"mlx-zoo-{command}" for command in main.commands}
    public.add("mlx_zoo.verify.verify")  # beside the package of that name
    missing = public - {"mlx_zoo.verify"} - ids
    assert not missing
    # What stands beside a field is its description.
    values = (site / "reference" / "values.html").read_text(encoding="utf-8")
    assert "before the centre is cropped to" in values


def test_the_catalogue_has_every_checkpoint_and_its_filters_every_choice(site):
    text = (site / "models.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr data-commercial="(.+?)"><td><code>(.+?)</code>', text)
    found = registry.checkpoints()
    assert [name for _, name in rows] == list(found)
    assert {name for commercial, name in rows if commercial == "no"} == {
        name for name, checkpoint in found.items() if checkpoint.is_non_commercial
    }
    choices = set(re.findall(r'<option value="(.*?)"', text))
    assert choices >= {c.license for c in found.values() if c.license}
    assert choices >= {c.architecture for c in found.values()} | {"fill-mask", "timm"}


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to run the filters in")
@pytest.mark.parametrize(
    ("chosen", "listed"),
    [
        ({}, {}),
        ({"name": "VIT-*clip"}, {"pattern": "*vit_*clip*"}),
        (
            {"family": "resnet", "of": "timm", "parameters": "30000000"},
            {"family": "resnet", "source": "timm", "max_params": 30e6},
        ),
        ({"task": "fill-mask"}, {"task": "fill-mask"}),
        ({"name": "vit (", "commercial": "no"}, None),
    ],
)
def test_the_filters_choose_what_list_models_does(chosen, listed, site, tmp_path):
    address = f"{(site / 'models.html').as_uri()}?{urlencode(chosen)}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command = [BROWSER, *options, "--virtual-time-budget=3000", "--dump-dom", address]
    page = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT).stdout
    shown = re.findall(r'<tr data-commercial="[^"]+"><td><code>(.+?)</code>', page)
    expected = set()
    if listed is not None:
        expected = set(mlx_zoo.list_models(pretrained=True, **listed)) & {*registry.checkpoints()}
        assert expected
    assert set(shown) == expected
    total = len(registry.checkpoints())
    said = f"{total} checkpoints" if len(shown) == total else f"{len(shown)} of {total} checkpoints"
    assert f">{said}</p>" in page
