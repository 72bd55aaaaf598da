"""The notebooks run from top to bottom, as notebooks, offline; they are kept without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NUM_PICTURES = {"01": 2, "02": 4, "03": 2, "04": 3, "05": 2, "06": 5}  # at least

notebooks = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_there_are_six():
    assert [path.name[:2] for path in PATHS] == [*NUM_PICTURES]


@notebooks
def test_it_is_kept_as_others_are(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "kept without outputs"
    assert notebook.cells[0].source.startswith("# ")
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    bold = " ".join(prose.split()).count("change this one line**")
    assert bold == 1, "the line to change for the full-size network, in one place"
    kept = json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
    assert text == kept, "one way of writing it keeps differences small"


@notebooks
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    before = sorted(FOLDER.rglob("*"))
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises what a cell raises
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not re.search(r"\w*Warning: |Traceback", said), said
    pictures = sum("image/png" in output.get("data", ()) for output in outputs)
    assert pictures >= NUM_PICTURES[path.name[:2]]
    assert sorted(FOLDER.rglob("*")) == before, "it wrote beside itself"
    assert not list((tmp_path / "temporary").glob("mlx_zoo-*")), "it left its folder behind"
