"""The README keeps its word: its example runs, its table is what the registry holds."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import mlx_zoo
from mlx_zoo.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "options"),
    [("README.md", ["--families", "--markdown"]), ("MODELS.md", ["--markdown"])],
)
def test_the_tables_of_models_are_current(file, options):
    command = " ".join(["mlx-zoo list", *options])
    table = CliRunner().invoke(main, ["list", *options]).output.strip()
    text = (ROOT / file).read_text(encoding="utf-8")
    pattern = rf"<!-- models: {command} -->\n(.*?)\n?<!-- end of models -->"
    written = re.search(pattern, text, re.DOTALL)
    assert written[1].strip() == table, f"run `{command}` and put its output there"


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "passed: the same network" in printed
    assert "[{'label': '7'" in printed
    assert "'answer': 'int'" in printed
    assert "'label': 'networkx'" in printed
    assert printed.splitlines()[-1], "the text that was generated"


def test_the_commands_are_those_of_continuous_integration():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for part in ('".[cpu,test]"', "mlx-zoo demo", "python -m pytest"):
        assert part in script
        assert any(part in command for command in commands)


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] for cell in cells), "notebooks are kept without outputs"
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    subprocess.run([sys.executable, script], cwd=path.parent, check=True, timeout=120)


@pytest.mark.parametrize("family", ["resnet", "vit", "efficientnet"])
def test_the_conversion_scripts_for_images(family, tmp_path):
    script = runpy.run_path(str(ROOT / "convert_scripts" / f"convert_{family}.py"))
    script["main"](str(tmp_path), f"{family}_digits")
    mlx_zoo.load(f"local-dir:{tmp_path / f'{family}_digits'}", pretrained=True)


def test_the_conversion_scripts_for_texts(minilm, tmp_path):
    script = runpy.run_path(str(ROOT / "convert_scripts" / "convert_gpt2.py"))
    script["main"](str(tmp_path / "gpt2"), "gpt2_docs", "8")
    write = mlx_zoo.pipeline("text-generation", f"local-dir:{tmp_path / 'gpt2'}")
    assert write.model.quantization.bits == 8
    assert write("Return the", max_tokens=3)[0]["generated_text"] > "Return the"

    script = runpy.run_path(str(ROOT / "convert_scripts" / "convert_bert.py"))
    script["main"](str(tmp_path / "bert"), f"local-dir:{minilm}", "sentence-embedding")
    embed = mlx_zoo.pipeline("sentence-embedding", f"local-dir:{tmp_path / 'bert'}")
    assert embed("a converted folder has its tokenizer").shape == (384,)
