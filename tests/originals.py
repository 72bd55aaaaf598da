"""PyTorch originals in which every tensor is random, and whose activations stay of order one.

A freshly initialised network proves little: its norms scale by 1, its biases are 0.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import nn

from mlx_zoo.verify import Report, verify

DEVICE = os.environ.get("MLX_ZOO_TEST_DEVICE", "cpu")  # pytest --device; originals: the CPU


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and running statistic of `model` with random values of a sane size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, std, mean=0.0):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    def uniform(tensor, low, high):
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    mobile = mobile_norms(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            normal(module.weight, math.sqrt(2 / fan_in))
        elif isinstance(module, nn.Linear):
            normal(module.weight, 1 / math.sqrt(module.in_features))
        elif type(module).__name__ == "Conv1D":  # of transformers: a linear layer, stored (in, out)
            normal(module.weight, 1 / math.sqrt(module.weight.shape[0]))
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 0.7)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            last = name.endswith(("bn3", "bn2", "layer.1.normalization", "layer.2.normalization"))
            low, high = (0.2, 0.4) if last else (0.6, 1.4)  # residuals must not pile up
            uniform(module.weight, *mobile.get(module, (low, high)))
            if isinstance(module, nn.BatchNorm2d):
                normal(module.running_mean, 0.2)
                uniform(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.LayerNorm):
            uniform(module.weight, 0.5, 1.5)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            normal(bias, 0.2, 1.5 if name.endswith(MOBILE_GATES) else 0.0)
        for leaf, bare in module.named_parameters(recurse=False):
            if leaf == "gamma":  # of a LayerScale: residuals must not pile up
                uniform(bare, 0.3, 0.8)
            elif leaf not in ("weight", "bias"):  # tokens, positions, a fused projection
                normal(bare, 1 / math.sqrt(bare.shape[1]) if leaf == "in_proj_weight" else 0.3)
    untouched = [n for n, p in model.named_parameters() if bool((p == 0).all() or (p == 1).all())]
    assert not untouched, untouched
    return model.eval()


# The gates of EfficientNet's squeeze-and-excitation: half shut, they would hide what came in.
MOBILE_GATES = ("se.conv_expand", "squeeze_excite.expand", "block.1.fc2", "block.2.fc2")


def mobile_norms(model: nn.Module) -> dict[nn.Module, tuple[float, float]]:
    """The norms of EfficientNet's blocks and the range of their scales.

    Only the last of a block may have a shortcut added; a block without one must not fade.
    """
    ranges = {}
    for module in model.modules():
        for has_shortcut in ("has_skip", "use_res_connect", "apply_dropout"):
            if hasattr(module, has_shortcut):
                *norms, last = (m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
                ranges |= dict.fromkeys(norms, (0.6, 1.4))
                ranges[last] = (0.05, 0.25) if getattr(module, has_shortcut) else (0.5, 1.2)
    return ranges


def saved(model: nn.Module, path: Path) -> Path:
    """`path`, where the weights of `model` are now."""
    torch.save(model.state_dict(), path)
    return path


def proven(model, **options) -> Report:
    """The report of a network that must be its original, at outputs of order one.

    To 1e-5, of the largest output where that is above one; where PyTorch's own float32 error is
    above 1e-5, only the factor against it bounds ours.
    """
    report = verify(model, device=DEVICE, **options)
    assert report.passed, report.reason
    for output in report.outputs:
        assert 0.1 < output.scale < 30, "activations left the order of one"
        assert output.max_abs < 1e-5 * max(1, output.scale) or output.torch_error > 1e-5
    return report
