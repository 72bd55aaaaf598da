"""A verification report as it is, for the page that explains it: of a bundled network."""

from __future__ import annotations

import tempfile

from mkdocs.structure.files import File

import mlx_zoo


def on_files(files, config):
    with tempfile.TemporaryDirectory(prefix="mlx_zoo-docs-") as cache:
        report = mlx_zoo.verify("resnet_digits", evidence="published", cache_dir=cache)
    files.append(File.generated(config, "assets/report.html", content=report.to_html()))
    return files
