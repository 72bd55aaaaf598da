"""Train `vit_digits`, a vision transformer that the package ships, on scikit-learn's digits.

The network is timm's own `VisionTransformer`, narrow and shallow, with 64 patches of 4 x 4. The
data, the training loop and the files are those of `digits.py`.

    python training_scripts/train_vit_digits.py              # writes mlx_zoo/data/
    python training_scripts/train_vit_digits.py --validate   # scores a recipe without the held-out

The recipe was not tuned. The 360 held-out images chose nothing: they are scored after training.

Writes, under `--output`:

    vit_digits.safetensors            the state dict, float32, in timm's names
    vit_digits.json                   where it comes from, as resnet_digits.json
    vit_digits_evidence.safetensors   what the original answers to digits.safetensors' images
"""

import digits
from timm.models.vision_transformer import VisionTransformer

NETWORK = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
    "in_chans": 1,
}


def new_model() -> VisionTransformer:
    return VisionTransformer(**NETWORK)


if __name__ == "__main__":
    digits.run(
        __file__,
        new_model,
        {"class": "timm.models.vision_transformer.VisionTransformer", **NETWORK},
        digits.TurningRecipe(epochs=80, lr=2e-3),
        checkpoint="vit_digits.safetensors",
        save_state=digits.save_safetensors,
        answers="vit_digits_evidence.safetensors",
        with_images=False,
        num_threads=1,
    )
