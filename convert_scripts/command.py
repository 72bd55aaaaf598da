"""The command line that the conversion scripts share: several networks of a family, one report."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx_zoo
from mlx_zoo.errors import MLXZooError
from mlx_zoo.zoo import DTYPES

ROWS = "{:<36} {:<9} {}"


def convert_family(
    family: str, description: str | None, arguments: Sequence[str] | None = None
) -> int:
    """Convert the networks that the command line names; returns the exit status.

    A network that fails does not stop the others, and makes the status 1. `description` is the
    script's own; `arguments` are those of the process unless given.
    """
    said = _parser(family, description).parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    names = said.names or mlx_zoo.list_models("*.imagenet1k_*", family=family)
    if not names:
        _parser(family, description).error("name a network")
    if said.upload_repo and len(names) > 1:
        _parser(family, description).error("--upload-repo: of one network at a time")
    if said.private and not said.upload_repo:
        _parser(family, description).error("--private goes with --upload-repo")
    print(ROWS.format("network", "", "folder, or why not"), flush=True)
    failed = 0
    for name in names:
        try:
            _check_family(name, family)
            folder = mlx_zoo.convert(
                name,
                said.output / _folder(name),
                task=said.task,
                dtype=said.dtype,
                quantize=said.quantize,
                verify=said.verify,
                upload_repo=said.upload_repo,
                private=said.private,
            )
        except (MLXZooError, OSError, ValueError) as error:
            failed += 1
            print(ROWS.format(name, "FAILED", error), flush=True)
        else:
            print(ROWS.format(name, "converted", folder), flush=True)
    print(f"{len(names) - failed} of {len(names)} converted")
    return 1 if failed else 0


def _check_family(name: str, family: str) -> None:
    found = mlx_zoo.info(name).architecture
    if found != family:
        raise ValueError(f"this is a {found}: convert_{found}.py converts it")


def _folder(name: str) -> str:
    """What the folder of a network is called."""
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:")).resolve().name
    return name.removeprefix("hf-hub:").replace("/", "--")


def _parser(family: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"convert_{family}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = "; without any, all that torchvision publishes" * bool(
        mlx_zoo.list_models("*.imagenet1k_*", family=family)
    )
    parser.add_argument(
        "names", nargs="*", help=f"as mlx_zoo.load takes them: names, hf-hub:, local-dir:{every}"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("converted"), help="a folder in it for each; converted"
    )
    parser.add_argument("--task", help="which head, for networks of texts; the bare body without")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; their own without")
    parser.add_argument("--quantize", type=int, metavar="BITS", help="weights of so many bits")
    parser.add_argument("--verify", action="store_true", help="compare with the original first")
    parser.add_argument("--upload-repo", metavar="ORG/NAME", help="upload it to the hub, too")
    parser.add_argument("--private", action="store_true", help="with --upload-repo")
    return parser


def main(family: str, description: str | None) -> None:
    """`convert_family`, and the end of the process."""
    sys.exit(convert_family(family, description))
