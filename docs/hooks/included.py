"""Pages that lie elsewhere in the repository are part of the site, and links work in both places.

A link is written as it works in the repository, `[SECURITY](../SECURITY.md)`; in the site it leads
to the page that was made of that file. Pictures that such a page shows go along.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
INCLUDED = {  # file of the repository -> page of the site
    "benchmarks.md": "included/performance.md",
    "CONFORMANCE.md": "included/conformance.md",
    "TRAINING.md": "included/training.md",
    "SECURITY.md": "included/security.md",
    "tests/FAULTS.md": "included/faults.md",
    "CONTRIBUTING.md": "included/contributing.md",
    "CHANGELOG.md": "included/changelog.md",
    "README.md": "index.md",  # whose place in the site the home page takes
    "MODELS.md": "models.md",
}
WRITTEN = {"index.md", "models.md"}  # in docs/, in other words
HOMES = {page: source for source, page in INCLUDED.items() if page not in WRITTEN}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")  # to a file: an address has a colon
PICTURE = re.compile(r"!\[[^]]*\]\(([^)\s:]+)\)")


def on_files(files, config):
    for page, source in HOMES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for picture in PICTURE.findall(text):
            path = normpath(join(dirname(source), picture))
            content = (ROOT / path).read_bytes()
            files.append(File.generated(config, join(dirname(page), path), content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    source = HOMES.get(page.file.src_uri, join("docs", page.file.src_uri))

    def rewritten(match: re.Match[str]) -> str:
        begin, target, anchor, end = match.groups(default="")
        path = normpath(join(dirname(source), target))
        if path not in INCLUDED:  # a page of docs/, or nothing: then the build fails
            return match[0]
        there = relpath(INCLUDED[path], dirname(page.file.src_uri) or ".")
        return f"{begin}{there}{anchor}{end}"

    return LINK.sub(rewritten, markdown)
