"""`python -m tests.fuzz safetensors --count 100000`, from the root of the repository."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the workers' name for this package is `fuzz`

from fuzz import replay, watch

TARGETS = {"safetensors": "fuzz.headers", "torch": "fuzz.pickles", "mapping": "fuzz.state_dicts"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case")
    parser.add_argument("--count", type=int, default=2_000, help="how many cases (2000)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    parser.add_argument("--replay", type=int, metavar="CASE", help="one case, told in full")
    parser.add_argument("--save", type=Path, metavar="FILE", help="with --replay: write it there")
    asked = parser.parse_args()
    module = TARGETS[asked.target]
    if asked.replay is not None:
        return replay.show(module, asked.replay, asked.save)

    def progress(summary: watch.Summary) -> None:
        if sys.stderr.isatty():
            print(f"\r{summary.cases} of {asked.count}", end="", file=sys.stderr, flush=True)

    summary = watch.run(module, asked.seed, asked.count, asked.jobs, progress)
    print(json.dumps(summary.to_json(), indent=1) if asked.json else summary)
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
