"""Famous pretrained networks for Apple's MLX: one line loads the original weights, verified."""

from mlx_zoo.backend.blas import load_fast_blas

load_fast_blas()  # before anything imports mlx.core: afterwards it would have no effect

from mlx_zoo import errors
from mlx_zoo.quantization import quantize
from mlx_zoo.registry import list_models
from mlx_zoo.tasks import pipeline
from mlx_zoo.tasks.generation import generate
from mlx_zoo.verify import verify
from mlx_zoo.zoo import convert, export, info, load

__version__ = "0.1.0"
__all__ = [
    "convert",
    "errors",
    "export",
    "generate",
    "info",
    "list_models",
    "load",
    "pipeline",
    "quantize",
    "verify",
]
