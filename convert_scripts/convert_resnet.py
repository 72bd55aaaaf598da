"""Convert ResNets into folders that `local-dir:` loads.

    python convert_scripts/convert_resnet.py out/ resnet18 resnet50.a1_in1k

Without names: every one that torchvision publishes.
"""

import sys
from pathlib import Path

import mlx_zoo


def main(out: str, *names: str) -> None:
    for name in names or mlx_zoo.list_models("*.imagenet1k_*", family="resnet"):
        print(mlx_zoo.convert(name, Path(out, name)))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["converted"]))
