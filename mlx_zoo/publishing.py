"""What a converted folder says of itself, to people and to the hub: its model card, above all.

All of it follows from the manifest and the verification in the folder, and nothing reads it again:
the manifest stays the truth. The same folder gives the same bytes.

Metadata of a card: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlx_zoo import describe, registry
from mlx_zoo.catalogue import Checkpoint
from mlx_zoo.describe import CONFIG, LIBRARY
from mlx_zoo.hub import cache
from mlx_zoo.hub.safetensors_header import read_header
from mlx_zoo.mapping import engine

log = logging.getLogger("mlx_zoo")

CARD, PREPROCESSING = "README.md", "preprocessing.json"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"

# The hub's own identifiers, of those that weights have; any other is `other`, with its name.
LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc0-1.0", "creativeml-openrail-m", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "mit", "mpl-2.0", "odbl", "openrail", "pddl", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
PIPELINES = {  # task -> the hub's name, where it has another
    "next-sentence-prediction": "text-classification",
    "pretraining": "fill-mask",
    "sentence-embedding": "sentence-similarity",
}
KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_licence(checkpoint: Checkpoint) -> None:
    """Raise ValueError where a licence forbids to publish what was made of the weights.

    What it forbids those who load them, and that none is known, is logged.
    """
    own = (checkpoint.license or "").lower()
    if "nd" in own.split("-"):
        raise ValueError(
            f"{checkpoint.name}: its licence, {own}, allows no derivatives to be published, and "
            "converted weights are one: convert them where they are used"
        )
    if not own:
        log.warning("%s: no licence is known; see that you may publish it", checkpoint.name)


def without_paths(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint that does not tell where on somebody's disk its weights were."""
    return replace(checkpoint, source=shown_source(checkpoint.source))


def write_papers(folder: Path, report: Any = None, repo: str | None = None) -> None:
    """Write what belongs beside the weights and the manifest in a folder.

    Args:
        folder: with weights, manifest, tokenizer, and the verification, if any.
        report: of the verification, where it ran just now.
        repo: the repository on the hub that the folder is for: nothing tells of this disk then.
    """
    entry = cache.read_entry(folder)
    checkpoint, config = describe.from_json(entry.manifest)
    if report is not None:
        report = replace(report, date="", seconds=None)  # equal reports are equal files
        if repo is not None:
            report = replace(report, source=checkpoint.source, repeat={})
        (folder / REPORT_JSON).write_text(report.to_json() + "\n", encoding="utf-8")
        (folder / REPORT_HTML).write_text(report.to_html(), encoding="utf-8")
    if repo is not None and (done := entry.verification):
        cache.stamp(entry, {**done, "source": checkpoint.source, "repeat": {}})
    if not (folder / CONFIG).is_file():  # the publisher's own may be there, for the tokenizer
        _write(folder / CONFIG, config_of(checkpoint, config))
    if checkpoint.preprocessing:
        _write(folder / PREPROCESSING, asdict(checkpoint.preprocessing))
    text = card(entry, checkpoint, config, repo)
    (folder / CARD).write_text(text, encoding="utf-8")


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def config_of(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    """A config.json to read: its keys are such that nobody takes it for transformers' or timm's."""
    return {
        "library_name": LIBRARY,
        "family": checkpoint.architecture,
        "network": checkpoint.variant,
        "config": asdict(config),
        "id2label": {str(i): label for i, label in enumerate(checkpoint.labels)},
    }


# The model card ---------------------------------------------------------------------------------


def card(entry: cache.Entry, checkpoint: Checkpoint, config: Any, repo: str | None = None) -> str:
    """The README.md of a converted folder, with the hub's metadata in front."""
    sections = [
        _front_matter(entry, checkpoint, config),
        f"# {repo.partition('/')[2] if repo else checkpoint.name}",
        _what_it_is(entry, checkpoint, config),
        _how_to_use(checkpoint, config, repo),
        _accuracy(checkpoint, entry.manifest.get("metrics") or {}),
        _how_verified(entry),
        _provenance(entry, checkpoint),
        _licence(checkpoint),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def task_of(checkpoint: Checkpoint, config: Any) -> str | None:
    """What a network of that config is for, as pipelines are named."""
    if registry.architectures()[checkpoint.architecture].inputs == "images":
        return "image-classification" if config.num_classes else "image-feature-extraction"
    return getattr(config, "task", None)


def base_model(checkpoint: Checkpoint) -> str | None:
    """The repository on the hub that weights were made from, if it was one."""
    base, known = checkpoint.base_model, registry.checkpoints()
    if base is not None and base not in known:
        return base if base.count("/") == 1 else None
    source = checkpoint.source if base is None else known[base].source
    return (
        source.removeprefix("hf-hub:").partition("@")[0] if source.startswith("hf-hub:") else None
    )


def _front_matter(entry: cache.Entry, checkpoint: Checkpoint, config: Any) -> str:
    own = (checkpoint.license or "unknown").lower()
    facts: dict[str, Any] = {"license": own}
    if own not in LICENSES | {"unknown"}:
        facts = {"license": "other", "license_name": own}
    facts["library_name"] = "mlx"
    task = task_of(checkpoint, config)
    inputs = registry.architectures()[checkpoint.architecture].inputs
    if inputs == "images" or task:
        facts["pipeline_tag"] = PIPELINES.get(task or "", task)
    else:
        facts["pipeline_tag"] = "feature-extraction"
    if base := base_model(checkpoint):
        facts["base_model"] = base
        if _is_tuned(checkpoint):
            facts["base_model_relation"] = "finetune"
        elif entry.manifest.get("quantization"):
            facts["base_model_relation"] = "quantized"
    facts["tags"] = ["mlx", LIBRARY, checkpoint.architecture]
    # JSON is YAML, and quotes whatever a stranger wrote.
    lines = [f"{name}: {json.dumps(fact)}" for name, fact in facts.items()]
    return "\n".join(["---", *lines, "---"])


def _is_tuned(checkpoint: Checkpoint) -> bool:
    return checkpoint.base_model is not None


def _is_fresh(checkpoint: Checkpoint, config: Any) -> bool:
    """Whether the head is another than that of the weights that were published, or trained."""
    architecture = registry.architectures()[checkpoint.architecture]
    task, size = getattr(config, "task", None), architecture.head_size(config)
    return bool(size) and not architecture.keeps_head(checkpoint, task, size)


def _what_it_is(entry: cache.Entry, checkpoint: Checkpoint, config: Any) -> str:
    architecture = registry.architectures()[checkpoint.architecture]
    count = engine.num_parameters(architecture.outline(config))
    made = "converted from the weights its authors published for PyTorch"
    if not checkpoint.source:
        made = "trained from random weights"
    elif _is_tuned(checkpoint):
        made = f"fine-tuned from `{checkpoint.base_model}`"
    if _is_fresh(checkpoint, config):
        made += "; its head is fresh, random weights that are to be trained"
    if how := entry.manifest.get("quantization"):
        kind = f"quantised to {how.get('bits')} bits"
    else:
        tensors = read_header(entry.weights).tensors.values()
        kind = ", ".join(sorted({KINDS.get(x.dtype, x.dtype) for x in tensors}))
    lines = [
        f"`{checkpoint.name}` for [MLX](https://github.com/ml-explore/mlx), {made}: "
        f"{count:,} parameters, {kind}.",
        architecture.paper and f"Paper: {architecture.paper}.",
    ]
    return "\n\n".join(filter(None, lines))


def _how_to_use(checkpoint: Checkpoint, config: Any, repo: str | None) -> str:
    name = f"hf-hub:{repo}" if repo else "local-dir:path/of/this/folder"
    task = task_of(checkpoint, config)
    own = getattr(config, "task", None)
    options = "" if own is None else f", task={own!r}"
    lines = [
        "## Use",
        "```python",
        "import mlx_zoo",
        "",
        f'model = mlx_zoo.load("{name}", pretrained=True{options})',
    ]
    if task is not None and task in _pipelines():
        lines.append(f'run = mlx_zoo.pipeline("{task}", model)')
    lines += [
        "```",
        "",
        "The tensors have MLX's layout and mlx_zoo's names, so PyTorch's libraries do not read "
        "them: `mlx_zoo.export` writes them as PyTorch does. `manifest.json` is what the loader "
        "believes; it has the config, the labels and the hash of the weights.",
    ]
    if checkpoint.preprocessing:
        lines[-1] += f" `{PREPROCESSING}` says how images are prepared."
    return "\n".join(lines)


def _pipelines() -> set[str]:
    """Tasks that have one: all heads but for those that a pipeline would not know how to ask."""
    tasks = {task for a in registry.architectures().values() for task in a.tasks}
    return (tasks | {"image-feature-extraction"}) - {
        *("pretraining", "next-sentence-prediction", "multiple-choice")
    }


def _accuracy(checkpoint: Checkpoint, metrics: Mapping[str, Any]) -> str:
    rows = [
        (f"{name.replace('acc', 'top-')} accuracy, as published", f"{value:.2f} %")
        for name, value in checkpoint.accuracy.items()
    ]
    rows += [
        (f"{name}, of the best evaluation", f"{value:.4g}" if isinstance(value, float) else value)
        for name, value in metrics.items()
    ]
    return "\n".join(["## Accuracy", "", *_table(("measure", "value"), rows)]) if rows else ""


def _how_verified(entry: cache.Entry) -> str:
    done = entry.verification
    if not done or done.get("passed") is not True:
        return "## Verification\n\nNot verified: these weights were not compared with an original."
    rows = [("compared with", done.get("evidence")), ("inputs", done.get("inputs"))]
    for key, name in (
        ("max_abs", "largest difference"),
        ("mean_abs", "mean difference"),
        ("max_rel", "largest difference, of the largest value"),
        ("tolerance", "tolerance, of the largest value"),
    ):
        if isinstance(done.get(key), (int, float)):
            rows.append((name, f"{done[key]:.1e}"))
    rows += [("device", done.get("device")), ("versions", _listed(done.get("versions")))]
    how = (
        "The network was compared with its PyTorch original, layer by layer, on the same inputs in "
        "the same precision and in float64, by `mlx_zoo.verify`: **passed**."
    )
    if (entry.path / REPORT_HTML).is_file():
        how += f" [{REPORT_HTML}]({REPORT_HTML}) has every layer."
    rows = [(name, value) for name, value in rows if value]
    return "\n".join(["## Verification", "", how, "", *_table(("what", "figure"), rows)])


def _provenance(entry: cache.Entry, checkpoint: Checkpoint) -> str:
    manifest = entry.manifest
    rows = [
        (
            "source of what was fine-tuned" if _is_tuned(checkpoint) else "source",
            shown_source(checkpoint.source),
        ),
        ("revision", checkpoint.revision),
        *(
            (f"sha256 of the published {k}", v)
            for k, v in (manifest.get("source_sha256") or {}).items()
        ),
        ("dialect", checkpoint.dialect),
        ("fingerprint of the mapping", manifest.get("spec")),
        *((f"sha256 of {file.name} here", _sha256(manifest, file)) for file in entry.files),
        ("versions", _listed(manifest.get("versions"))),
    ]
    rows = [(name, value) for name, value in rows if value]
    return "\n".join(["## Provenance", "", *_table(("what", "value"), rows)])


def shown_source(source: str) -> str:
    """A source without the folders of somebody's disk."""
    prefix, found, path = source.partition("local-dir:")
    if found and not prefix:
        return f"local-dir:{Path(path).name}"
    return source if ":" in source.partition("/")[0] else Path(source).name


def _sha256(manifest: Mapping[str, Any], file: Path) -> str:
    return str(manifest.get("shards", {}).get(file.name, manifest).get("sha256"))


def _licence(checkpoint: Checkpoint) -> str:
    if not checkpoint.license:
        text = "No licence of the weights is known here: ask their authors."
    else:
        text = f"The weights have the licence `{_plain(checkpoint.license)}`."
        if checkpoint.is_non_commercial:
            text += " **It does not allow commercial use.**"
    return f"## Licence\n\n{text}"


def _listed(values: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items()) if isinstance(values, dict) else ""


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> list[str]:
    lines = [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows]
    return [f"| {' | '.join(head)} |", "|---|---|", *lines]


def _plain(text: Any) -> str:
    """Text that a stranger wrote, as one cell of a table without markup of its own."""
    words = " ".join(str(text).split())
    return "".join(f"&#{ord(c)};" if c in "|<>[]`" else c for c in words)
