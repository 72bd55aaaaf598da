"""Train `resnet_digits`, the checkpoint that the package ships, on scikit-learn's digits.

The network is timm's own `ResNet` with narrow stages, so the PyTorch original of the demo is code
that everybody can install. The data, the training loop and the files are those of `digits.py`.

    python training_scripts/train_resnet_digits.py              # writes mlx_zoo/data/
    python training_scripts/train_resnet_digits.py --validate   # how the recipe was chosen

The recipe (`digits.Recipe`) was chosen by `--validate`, five-fold cross-validation inside the 1437
training images, where one image is 0.07 %:

    99.65 %  the recipe as it stands
    99.58 %  --max-shift 3 --weight-decay 0.2
    99.51 %  --max-shift 3
    99.44 %  --max-shift 4 --label-smoothing 0.05

The 360 held-out images chose nothing: the plain command scores them, after training.

Writes, under `--output`:

    resnet_digits.pth    the state dict as torchvision publishes its own: OrderedDict, float32, zip
    resnet_digits.json   where it comes from: versions, recipe, split, accuracy, hashes, licence
    digits.safetensors   the held-out images, and what the PyTorch original answers to them
"""

import digits
import torch
from timm.models.resnet import BasicBlock, ResNet

NETWORK = {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 48), "num_classes": 10, "in_chans": 1}


def new_model() -> ResNet:
    return ResNet(block=BasicBlock, **NETWORK)


if __name__ == "__main__":
    digits.run(
        __file__,
        new_model,
        {"class": "timm.models.resnet.ResNet", "block": "BasicBlock", **NETWORK},
        digits.Recipe(),
        checkpoint="resnet_digits.pth",
        save_state=torch.save,
        answers="digits.safetensors",
        with_images=True,
        num_threads=2,
    )
