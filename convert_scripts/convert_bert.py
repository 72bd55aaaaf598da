"""Convert a BERT of the hub, or of a folder, with a head, into a folder that `local-dir:` loads.

    python convert_scripts/convert_bert.py out/ bert-base-uncased fill-mask
    python convert_scripts/convert_bert.py out/ local-dir:my-bert text-classification

Without a task: the bare body. The tokenizer's files go along.
"""

import sys

import mlx_zoo


def main(out: str, name: str, task: str | None = None) -> None:
    print(mlx_zoo.convert(name, out, task=task))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
