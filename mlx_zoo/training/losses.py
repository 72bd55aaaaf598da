"""Cross-entropy, of class ids and of soft labels."""

from __future__ import annotations

import mlx.core as mx

IGNORED = -100  # a target that nothing is asked of, as in PyTorch


def cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """(sum, count) in float32 of logits (..., C) of any type.

    Targets are class ids (...), IGNORED where nothing is asked, or soft labels (..., C).
    """
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1)  # (...)
    if targets.ndim == logits.ndim:
        losses = (targets * (total[..., None] - logits)).sum(axis=-1)
        return losses.sum(), mx.array(losses.size, mx.float32)
    asked = targets != IGNORED
    ids = mx.where(asked, targets, 0)
    losses = total - mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return mx.where(asked, losses, 0).sum(), asked.astype(mx.float32).sum()
