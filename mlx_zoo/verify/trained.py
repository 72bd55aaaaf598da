"""A network that was trained here, and PyTorch's with the very same weights.

Nobody published them: the original is the publisher's class, filled with what `export` writes. That
shows that both libraries make the same of these weights, and not where they are from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.nn as nn

from mlx_zoo import describe
from mlx_zoo.catalogue import Checkpoint
from mlx_zoo.describe import Place
from mlx_zoo.errors import VerificationError
from mlx_zoo.exporting import export


def is_trained(checkpoint: Checkpoint | None) -> bool:
    """Whether weights are those of a `finetune`, of published ones or of random ones."""
    return checkpoint is not None and bool(checkpoint.base_model or not checkpoint.source)


@contextmanager
def beside_its_export(model: nn.Module) -> Iterator[None]:
    """For a while, what a trained network names its original is its export, in a folder.

    Raises VerificationError where no publisher's library can load it.
    """
    name = model.checkpoint.name
    own = {key: getattr(model, key, None) for key in ("checkpoint", "place", "entry")}
    with TemporaryDirectory() as folder:
        try:
            path = export(model, Path(folder) / "exported")
        except ValueError as error:
            raise VerificationError(
                f"{name} was trained, and cannot be compared with PyTorch: {error}"
            ) from error
        place = Place(local_files_only=True)
        found = describe.find(f"local-dir:{path}", None, place)
        model.checkpoint = replace(found, name=name, base_model=found.name)
        model.place, model.entry = place, None
        try:
            yield
        finally:
            for key, value in own.items():
                setattr(model, key, value)
