"""Convert EfficientNets into folders that `local-dir:` loads.

    python convert_scripts/convert_efficientnet.py out/ efficientnet_b0 tf_efficientnetv2_s

Without names: every one that torchvision publishes.
"""

import sys
from pathlib import Path

import mlx_zoo


def main(out: str, *names: str) -> None:
    for name in names or mlx_zoo.list_models("*.imagenet1k_*", family="efficientnet"):
        print(mlx_zoo.convert(name, Path(out, name)))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["converted"]))
