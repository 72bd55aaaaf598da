"""Convert a GPT-2 of the hub, or of a folder, into a folder that `local-dir:` loads.

    python convert_scripts/convert_gpt2.py out/ distilgpt2
    python convert_scripts/convert_gpt2.py out/ gpt2-xl 4

A number at the end: the bits of a weight, quantised. The tokenizer's files go along.
"""

import sys

import mlx_zoo


def main(out: str, name: str, bits: str | None = None) -> None:
    print(mlx_zoo.convert(name, out, quantize=None if bits is None else int(bits)))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
