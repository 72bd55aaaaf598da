"""The README keeps its word: its table is what the registry holds, its commands are those of CI.

(test_docs.py runs its blocks.)
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

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


def test_the_commands_are_those_of_continuous_integration():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for part in ('".[cpu,test]"', "mlx-zoo demo", "python -m pytest"):
        assert part in script
        assert any(part in command for command in commands)
