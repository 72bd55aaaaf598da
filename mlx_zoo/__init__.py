"""Famous pretrained networks for Apple's MLX: one line loads the original weights, verified."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from mlx_zoo.backend.blas import load_fast_blas

load_fast_blas()  # before anything imports mlx.core: afterwards it would have no effect

from mlx_zoo import errors
from mlx_zoo.lazy import lazily

if TYPE_CHECKING:
    from mlx_zoo.backend.inference import optimize_for_inference
    from mlx_zoo.exporting import export
    from mlx_zoo.quantization import quantize
    from mlx_zoo.registry import list_models
    from mlx_zoo.tasks import pipeline
    from mlx_zoo.tasks.generation import generate
    from mlx_zoo.training import finetune
    from mlx_zoo.verify import verify
    from mlx_zoo.zoo import convert, info, load

__version__ = "0.1.0"
__all__ = [
    "convert",
    "errors",
    "export",
    "finetune",
    "generate",
    "info",
    "list_models",
    "load",
    "optimize_for_inference",
    "pipeline",
    "quantize",
    "verify",
]

# Where each function is. It is imported when it is first asked for: `import mlx_zoo` alone takes
# no longer than MLX does.
_HOMES = {
    "convert": "zoo",
    "export": "exporting",
    "finetune": "training",
    "generate": "tasks.generation",
    "info": "zoo",
    "list_models": "registry",
    "load": "zoo",
    "optimize_for_inference": "backend.inference",
    "pipeline": "tasks",
    "quantize": "quantization",
    "verify": "verify",
}

if not TYPE_CHECKING:  # which would take any name for one of these
    __getattr__, __dir__ = lazily(globals(), _HOMES)


class _Package(ModuleType):
    """`mlx_zoo.verify` is the function, also once the package of that name was imported."""

    def __setattr__(self, name, value):
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
