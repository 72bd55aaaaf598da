"""Convert vision transformers into folders that `local-dir:` loads.

    python convert_scripts/convert_vit.py out/ vit_b_16 vit_base_patch14_dinov2

Without names: every one that torchvision publishes.
"""

import sys
from pathlib import Path

import mlx_zoo


def main(out: str, *names: str) -> None:
    for name in names or mlx_zoo.list_models("*.imagenet1k_*", family="vit"):
        print(mlx_zoo.convert(name, Path(out, name)))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["converted"]))
