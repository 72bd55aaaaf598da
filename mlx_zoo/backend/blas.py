"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel is linked against the reference BLAS, which multiplies matrices some sixty times
slower than the machine can. The dynamic linker looks a symbol up in the process's global scope
first, so a better BLAS put there with RTLD_GLOBAL *before* `mlx.core` is imported serves MLX too;
afterwards the symbols are bound for good. `mlx_zoo/__init__.py` therefore calls `load_fast_blas()`
before anything else: about 2 ms, and the standard library alone is imported.

The global scope is everyone's: a PyTorch imported later takes its matrix products from here too
(its wheel exports `sgemm_` under the same name). Values were equal, but such a PyTorch is not an
independent witness of ours: a comparison that needs one runs it in a process of its own.

`MLX_ZOO_BLAS=/path/to/libopenblas.so` (or a name the loader knows) chooses the library,
`MLX_ZOO_BLAS=off` leaves MLX as it was built.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from mlx_zoo.errors import MLXZooError

MKL_SONAMES = ("libmkl_rt.so.3", "libmkl_rt.so.2")  # since 2026, since 2021
OPENBLAS_SONAME = "libopenblas.so.0"

# Values of mkl_service.h.
MKL_INTERFACE_LP64 = 0
MKL_THREADING_SEQUENTIAL = 1
MKL_THREADING_GNU = 3


@dataclass(frozen=True)
class Blas:
    """Where MLX's dense linear algebra on the CPU comes from. `note` says what is worth knowing."""

    name: str
    path: str | None = None
    note: str = ""


@functools.cache
def load_fast_blas() -> Blas:
    """Put a fast BLAS in front of MLX's own, and say which. Later calls return the first answer.

    Raises:
        MLXZooError: `MLX_ZOO_BLAS` names a library that cannot serve. It was asked for by name,
            so nothing else takes its place.
    """
    if sys.platform != "linux":
        return Blas("Accelerate", note="part of macOS")
    choice = os.environ.get("MLX_ZOO_BLAS", "").strip()
    if choice.lower() == "off":
        return _built_in("MLX_ZOO_BLAS=off")

    already = _in_global_scope()
    if "mlx.core" in sys.modules:
        if already:
            return Blas(
                _name(already),
                note="in this process already; only measure_gflops() tells whether MLX uses it",
            )
        if choice or _computes_on_reference_blas():
            warnings.warn(
                "mlx.core was imported before mlx_zoo, so matrix products on the CPU stay slow. "
                "Put `import mlx_zoo` before the first import of mlx "
                "(or set MLX_ZOO_BLAS=off to silence this).",
                RuntimeWarning,
                stacklevel=3,
            )
        return _built_in("mlx.core was imported first")

    before = Blas(_name(already), note="in this process already") if already else None
    if choice:
        chosen = _load_chosen(choice)
        if before and _address(chosen) != _address(ctypes.CDLL(None)):
            warnings.warn(
                f"MLX_ZOO_BLAS={choice} has no effect: {before.name} is in this process already, "
                "and the dynamic linker prefers whoever came first (see LD_PRELOAD).",
                RuntimeWarning,
                stacklevel=3,
            )
            return before
        return _loaded(chosen)
    if before:
        return before
    if library := _load_mkl() or _open(OPENBLAS_SONAME):
        return _loaded(library)
    if _computes_on_reference_blas():
        warnings.warn(
            "No fast BLAS was found, so matrix products on the CPU are some sixty times slower "
            'than they could be. Install one: pip install "mlx-zoo[cpu]" on x86-64, or the '
            "distribution's OpenBLAS (Debian, Ubuntu: libopenblas0-pthread) "
            "(or set MLX_ZOO_BLAS=off to silence this).",
            RuntimeWarning,
            stacklevel=3,
        )
    return _built_in("no fast BLAS was found")


def measure_gflops(n: int = 1024) -> float:
    """Billions of float32 operations a second of an (n, n) matrix product on the CPU, best of 5."""
    import time

    import mlx.core as mx

    with mx.stream(mx.cpu):
        a, b = mx.random.normal((n, n)), mx.random.normal((n, n))
        mx.eval(a, b, a @ b)  # the first product also starts the BLAS's threads
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            mx.eval(a @ b)
            seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9


def _load_chosen(choice: str) -> ctypes.CDLL:
    """The library that MLX_ZOO_BLAS names, or an error: a wish is not silently replaced."""
    remedy = "Correct MLX_ZOO_BLAS, or unset it to have one found."
    try:
        library = ctypes.CDLL(choice, ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise MLXZooError(f"MLX_ZOO_BLAS={choice} cannot be loaded: {error}. {remedy}") from None
    if not hasattr(library, "cblas_sgemm"):
        raise MLXZooError(f"MLX_ZOO_BLAS={choice} exports no cblas_sgemm. {remedy}")
    if "USE64BITINT" in _openblas_config(library):
        raise MLXZooError(f"MLX_ZOO_BLAS={choice} counts in 64 bits, MLX in 32. {remedy}")
    return library


def _load_mkl() -> ctypes.CDLL | None:
    """The `mkl` package of this environment. pip puts its libraries into the prefix's lib/.

    It is asked for the same bits whatever the number of threads, who else is in the process, and
    where arrays lie in memory (MKL's "conditional numerical reproducibility", at no cost that was
    measurable), unless the environment says otherwise.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # read at the first product
    for soname in MKL_SONAMES:
        path = os.path.join(sys.prefix, "lib", soname)
        if os.path.exists(path) and (library := _open(path)):
            return library
    import importlib.metadata  # slow to import, and needed for `pip install --user` alone

    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (_open(str(file.locate())) for file in files if file.name in MKL_SONAMES)
    return next(filter(None, found), None)


def _open(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:  # not there, or built for another machine: the next candidate's turn
        return None


def _loaded(library: ctypes.CDLL) -> Blas:
    note = _settle_mkl(library) if hasattr(library, "MKL_Set_Threading_Layer") else ""
    return Blas(_name(library), library._name, note)


def _settle_mkl(mkl: ctypes.CDLL) -> str:
    """Undo the settings under which MKL would end the process or misread MLX's integers.

    The threading layer is otherwise left to MKL, which chooses at the first product, by the OpenMP
    that is in the process by then: PyTorch's libgomp is shared, and without it Intel's is loaded.
    Never force Intel's layer: beside libgomp its products were wrong (mkl 2026.2, torch 2.13).
    For the same reason nothing here may ask MKL for its version, which would settle the choice.
    """
    notes = []
    if os.environ.get("MKL_INTERFACE_LAYER", "").upper().startswith("ILP64"):
        mkl.MKL_Set_Interface_Layer(MKL_INTERFACE_LP64)
        notes.append("MKL_INTERFACE_LAYER=ILP64 is not followed: MLX counts in 32 bits")
    if os.environ.get("MKL_THREADING_LAYER", "").upper() == "TBB":
        gnu = _open("libgomp.so.1") is not None
        mkl.MKL_Set_Threading_Layer(MKL_THREADING_GNU if gnu else MKL_THREADING_SEQUENTIAL)
        used = "GNU" if gnu else "SEQUENTIAL"
        notes.append(f"MKL_THREADING_LAYER=TBB ends the process with pip's MKL: {used} is used")
    return "; ".join(notes)


def _in_global_scope() -> ctypes.CDLL | None:
    """The process's global scope, if a BLAS is in it. MLX's own is not: it is local to MLX."""
    process = ctypes.CDLL(None)
    return process if hasattr(process, "cblas_sgemm") else None


def _address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value


def _name(library: ctypes.CDLL) -> str:
    if hasattr(library, "MKL_Set_Threading_Layer"):
        # pip's version of it. MKL's own answer comes at a price: see _settle_mkl.
        versions = [path.name.split("-")[1] for path in _beside_mlx("mkl-*.dist-info")]
        in_prefix = str(library._name).startswith(sys.prefix)
        return " ".join(["MKL", *(v.removesuffix(".dist") for v in versions[:1] if in_prefix)])
    if config := _openblas_config(library):
        return " ".join(config.split()[:2])
    return Path(library._name).name if library._name else "an unknown BLAS"


def _openblas_config(library: ctypes.CDLL) -> str:
    """Such as "OpenBLAS 0.3.21 DYNAMIC_ARCH NO_AFFINITY"; empty for another BLAS."""
    if not hasattr(library, "openblas_get_config"):
        return ""
    library.openblas_get_config.restype = ctypes.c_char_p
    return library.openblas_get_config().decode()


def _built_in(note: str) -> Blas:
    if _beside_mlx("mlx_cpu-*.dist-info"):
        return Blas("reference (slow)", note=note)
    return Blas("as MLX was built", note=note)


def _computes_on_reference_blas() -> bool:
    """True for the CPU wheel alone. The CUDA wheels compute elsewhere; conda and distributions
    build MLX against a BLAS of theirs, and leave no `mlx_cpu` metadata."""
    return bool(_beside_mlx("mlx_cpu-*.dist-info")) and not _beside_mlx("mlx_cuda_*.dist-info")


def _beside_mlx(pattern: str) -> list[Path]:
    """What matches in the folder that mlx is installed in; mlx itself is not imported."""
    spec = importlib.util.find_spec("mlx")
    folders = (spec.submodule_search_locations if spec else None) or []
    return [path for folder in folders for path in Path(folder).parent.glob(pattern)]
