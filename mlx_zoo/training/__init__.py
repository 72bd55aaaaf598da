"""Fine-tuning: a pretrained network made one's own.

`finetune` is the loop. Around it: where examples come from (`data`), what is asked of the network
(`objectives`, `metrics`), which of its parameters learn (`trainable`, `lora`), and how (`steps`,
`optimizers`).
"""

from typing import TYPE_CHECKING

from mlx_zoo.lazy import lazily

if TYPE_CHECKING:
    from mlx_zoo.training.augmentation import Augmentation
    from mlx_zoo.training.finetuning import Finetuned, finetune
    from mlx_zoo.training.lora import LoRA, add_lora, load_adapter, merge_lora, save_adapter
    from mlx_zoo.training.trainable import choose

__all__ = [
    "Augmentation",
    "Finetuned",
    "LoRA",
    "add_lora",
    "choose",
    "finetune",
    "load_adapter",
    "merge_lora",
    "save_adapter",
]

# Where each is. It is imported when it is first asked for.
_HOMES = {
    "Augmentation": "augmentation",
    "Finetuned": "finetuning",
    "LoRA": "lora",
    "add_lora": "lora",
    "choose": "trainable",
    "finetune": "finetuning",
    "load_adapter": "lora",
    "merge_lora": "lora",
    "save_adapter": "lora",
}

if not TYPE_CHECKING:  # which would take any name for one of these
    __getattr__, __dir__ = lazily(globals(), _HOMES)
