"""The catalogue of models, from the registry, in the place of `<!-- models -->`.

A table that needs nothing; assets/models.js adds the filters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from html import escape

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.catalogue import Checkpoint

HEAD = ("name", "family", "of", "parameters", "size", "top-1", "tasks", "licence")
NUMBERS = ("parameters", "size", "top-1")
SIZES = {1e6: "1 M", 10e6: "10 M", 30e6: "30 M", 100e6: "100 M", 300e6: "300 M", 1e9: "1,000 M"}


def on_page_content(html, page, config, files):
    """After Markdown, which would read each of the rows in vain."""
    return (
        html.replace("<!-- models -->", catalogue()) if page.file.src_uri == "models.md" else html
    )


def catalogue() -> str:
    """Filters, hidden until there is a script, and a table of every published checkpoint."""
    found = registry.checkpoints().values()
    tasks = tasks_by_name()
    rows = "\n".join(row(checkpoint, tasks[checkpoint.name]) for checkpoint in found)
    heads = "".join(f"<th{numeric(name)}>{name}</th>" for name in HEAD)
    return (
        f'<form class="filters" hidden>\n{filters(list(found), tasks)}\n</form>\n'
        f'<p class="count" aria-live="polite">{len(found)} checkpoints</p>\n'
        '<div class="models" data-search-exclude><table class="catalogue">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def tasks_by_name() -> dict[str, list[str]]:
    """Name -> the tasks for which those weights have a head."""
    every = {task for a in registry.architectures().values() for task in a.tasks}
    found = defaultdict(list)
    for task in sorted({registry.FEATURES, *every}):
        for name in mlx_zoo.list_models(pretrained=True, task=task):
            found[name].append(task)
    return found


def filters(found: list[Checkpoint], tasks: dict[str, list[str]]) -> str:
    """What narrows the table, each by the name that it has in the page's address."""
    used = sorted({task for names in tasks.values() for task in names})
    return "\n".join(
        [
            '<label>name <input type="search" name="name" placeholder="vit*clip" '
            'autocomplete="off" spellcheck="false"></label>',
            select("family", ((x, x) for x in sorted({c.architecture for c in found}))),
            select("task", ((x, x) for x in used)),
            select("of", ((x, x) for x in sorted({registry.publisher(c) for c in found}))),
            select("parameters", ((f"{n:.0f}", f"at most {text}") for n, text in SIZES.items())),
            select(
                "commercial use",
                (("yes", "not forbidden"), ("no", "forbidden"), ("?", "no licence named")),
            ),
            select("licence", ((x, x) for x in sorted({c.license for c in found if c.license}))),
            '<button type="reset">all</button>',
        ]
    )


def select(name: str, options: Iterable[tuple[str, str]]) -> str:
    key = name.partition(" ")[0]
    choices = [("", "any"), *options]
    inner = "".join(f'<option value="{escape(x)}">{escape(text)}</option>' for x, text in choices)
    return f'<label>{name} <select name="{key}">{inner}</select></label>'


def row(checkpoint: Checkpoint, tasks: list[str]) -> str:
    """A checkpoint in a row. What is sorted or filtered by another value than is shown has it."""
    how, count = checkpoint.preprocessing, registry.num_parameters(checkpoint)
    size = how.size if how else ""
    sides = size if isinstance(size, tuple) else (size,)  # pixels: (H, W) where they differ
    accuracy = checkpoint.accuracy.get("acc1")
    cells = {
        "name": f"<code>{escape(checkpoint.name)}</code>",
        "family": checkpoint.architecture,
        "of": registry.publisher(checkpoint),
        "parameters": f"{count / 1e6:,.1f} M",
        "size": " × ".join(map(str, sides)),
        "top-1": "" if accuracy is None else f"{accuracy:.1f}",
        "tasks": ", ".join(tasks),
        "licence": escape(checkpoint.license or "not named"),
    }
    values = {"parameters": count, "size": sides[0] or 0, "top-1": accuracy or 0}
    shown = "".join(cell(name, text, values.get(name)) for name, text in cells.items())
    commercial = "?" if not checkpoint.license else "no" if checkpoint.is_non_commercial else "yes"
    return f'<tr data-commercial="{commercial}">{shown}</tr>'


def cell(name: str, text: str, value: float | None) -> str:
    data = "" if value is None else f" data-value={value}"
    return f"<td{numeric(name)}{data}>{text}</td>"


def numeric(name: str) -> str:
    return ' class="number"' if name in NUMBERS else ""
