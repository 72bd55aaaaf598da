"""Train `efficientnet_digits`, which the package ships, on scikit-learn's digits.

The network is timm's own `EfficientNet` with four narrow stages, and in everything else as the
TensorFlow weights need it: asymmetric "same" padding, batch norms with an epsilon of 1e-3. The
data, the training loop and the files are those of `digits.py`.

    python training_scripts/train_efficientnet_digits.py              # writes mlx_zoo/data/
    python training_scripts/train_efficientnet_digits.py --validate   # without the held-out images

The recipe was not tuned. The 360 held-out images chose nothing: they are scored after training.

Writes, under `--output`:

    efficientnet_digits.safetensors            the state dict, float32, in timm's names
    efficientnet_digits.json                   where it comes from, as resnet_digits.json
    efficientnet_digits_evidence.safetensors   what the original answers to the images in
                                               digits.safetensors
"""

from functools import partial

import digits
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

# Block, repeats, kernel, stride, expansion, channels, squeeze.
STAGES = (
    "ds_r1_k3_s1_e1_c16_se0.25",
    "ir_r2_k3_s2_e4_c24_se0.25",
    "ir_r2_k5_s2_e4_c40_se0.25",
    "ir_r2_k3_s1_e4_c48_se0.25",
)
NETWORK = {
    "stem_size": 16,
    "num_features": 192,
    "num_classes": 10,
    "in_chans": 1,
    "pad_type": "same",
}
BN_EPS = 1e-3


def new_model() -> EfficientNet:
    return EfficientNet(
        block_args=decode_arch_def([[stage] for stage in STAGES]),
        act_layer=nn.SiLU,
        norm_layer=partial(nn.BatchNorm2d, eps=BN_EPS),
        **NETWORK,
    )


if __name__ == "__main__":
    digits.run(
        __file__,
        new_model,
        {
            "class": "timm.models.efficientnet.EfficientNet",
            "stages": STAGES,
            **NETWORK,
            "act": "silu",
            "bn_eps": BN_EPS,
        },
        digits.TurningRecipe(epochs=40),
        checkpoint="efficientnet_digits.safetensors",
        save_state=digits.save_safetensors,
        answers="efficientnet_digits_evidence.safetensors",
        with_images=False,
        num_threads=1,
    )
