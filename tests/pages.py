"""Run the blocks of a page of documentation, in their order, as one script.

    python tests/pages.py docs/tutorial.md

Python's share one process and its names, the shell's share the folder. `NOT_RUN` has every other
block, by how it begins, and why.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]

NOT_RUN = {  # page -> how a block begins -> why it is not run
    "README.md": {
        'pip install -e ".[cpu]" && mlx-zoo demo': ".ci/run does, and test_readme.py compares",
        'pip install -e ".[cpu,test]" && python -m pytest': ".ci/run does",
        "mlx-zoo predict resnet50 photos/": "downloads; how-to/predict.md runs the like",
        "mlx-zoo finetune resnet50 photos/": "downloads; how-to/finetune.md runs the like",
        "TRANSFORMERS = Spec(": "an excerpt; how-to/architecture.md runs one",
    },
    "docs/tutorial.md": {'pip install -e ".[cpu,torch]"': ".ci/run installs"},
    "docs/how-to/publish.md": {
        "mlx-zoo convert resnet50": "uploads; test_publish.py does, to a server of its own",
        "python convert_scripts": "downloads; test_publish.py runs the scripts on what is bundled",
    },
    "docs/how-to/predict.md": {"mlx.launch": "downloads; test_scale.py launches processes"},
    "docs/how-to/finetune.md": {"mlx.launch": "downloads; test_parallel.py launches processes"},
}


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of the page, before its first


def blocks(text: str) -> Iterator[Block]:
    """Everything between fences."""
    for fence in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(fence[1], fence[2], text[: fence.start(2)].count("\n"))


def reason(page: str, block: Block) -> str | None:
    """Why a block is not run; None for one that is."""
    known = NOT_RUN.get(page, {})
    return next((why for start, why in known.items() if block.text.startswith(start)), None)


def run(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    if re.search(r"^(import|from) (timm|torchvision|transformers)", text, re.MULTILINE):
        from mlx_zoo.verify.reference import import_torchvision

        import_torchvision()  # also where its wheel was made for another PyTorch
    names = {"__name__": "__main__"}
    for block in blocks(text):
        if reason(page, block):
            continue
        if block.language == "sh":
            sys.stdout.flush()
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
        else:
            exec(compile("\n" * block.line + block.text, page, "exec"), names)


if __name__ == "__main__":
    run(sys.argv[1])
