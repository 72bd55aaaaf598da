"""The BLAS is settled once per process, by whoever comes first: every case is its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlx_zoo.backend import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has a fast BLAS")

ROOT = Path(__file__).parents[1]
LOAD = "from mlx_zoo.backend.blas import *; blas = load_fast_blas()\n"
MLX = "import mlx.core as mx; mx.set_default_device(mx.cpu)\n"
TORCH = "import torch\n"
# A process without any fast BLAS: imported with MLX_ZOO_BLAS=off, then made to look again.
NOTHING = """
import os, sys
import mlx_zoo.backend.blas as b
del os.environ["MLX_ZOO_BLAS"]
sys.modules.pop("mlx.core", None)
b._open = lambda name: None
b.load_fast_blas.cache_clear()
"""
# Shapes large enough that the BLAS uses its threads, each against numpy in float64. The reference
# BLAS adds in one running sum, which costs it 2e-6.
CHECK = """
import numpy as np
rng = np.random.default_rng(0)
def error(ours, true):
    return np.abs(np.array(ours) - true).max() / np.abs(true).max()
for n in (3, 200, 768):
    a, b = rng.standard_normal((2, n, n)).astype("float32")
    true = a.astype("float64") @ b
    assert error(mx.array(a) @ mx.array(b), true) < 1e-5, n
    if "torch" in globals():
        assert error(torch.from_numpy(a) @ torch.from_numpy(b), true) < 1e-5, n
"""
LINALG = """
n = 120
a = rng.standard_normal((n, n)) + n * np.eye(n)
c = rng.standard_normal((n, n)) + 1j * rng.standard_normal((n, n))
spd = a @ a.T
single, double = mx.array(a.astype("float32")), mx.array(a, dtype=mx.float64)
assert error(double @ double, a @ a) < 1e-14                                   # dgemm
assert error(mx.array(c.astype("complex64")) @ mx.array(c.astype("complex64")), c @ c) < 1e-5
assert error(mx.linalg.inv(single), np.linalg.inv(a)) < 1e-5                   # sgetrf, sgetri
assert error(mx.linalg.solve(double, double), np.eye(n)) < 1e-12               # dgetrf
assert error(mx.linalg.cholesky(mx.array(spd)), np.linalg.cholesky(spd)) < 1e-5
assert error(mx.linalg.eigvalsh(mx.array(spd)), np.linalg.eigvalsh(spd)) < 1e-5
u, s, vt = mx.linalg.svd(single)
assert error(u @ mx.diag(s) @ vt, a) < 1e-5
q, r = mx.linalg.qr(single)
assert error(q @ r, a) < 1e-5
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_ZOO_", "MKL_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **kept,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "default::RuntimeWarning",
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def output(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def fast() -> str:
    """The path of the BLAS that is found here without being named."""
    path = output(LOAD + "print(blas.path or '')")
    if not path:
        pytest.skip("no fast BLAS is installed")
    return path


@pytest.fixture
def mkl(fast: str) -> str:
    if "mkl_rt" not in fast:
        pytest.skip("the fast BLAS is not MKL")
    return fast


def test_the_fast_blas_serves_mlx_and_is_named(fast):
    # Who serves is read off the process: its libraries load when the first product is computed.
    used = "print(any(n in open('/proc/self/maps').read() for n in ('mkl_core', 'openblas')))"
    printed = output(LOAD + MLX + CHECK + LINALG + used + "\nprint(load_fast_blas())")
    assert printed.startswith("True\n")
    assert f"path='{fast}'" in printed
    assert "name='MKL" in printed or "name='OpenBLAS" in printed


def test_off_leaves_mlx_as_it_was_built(fast):
    shown = "print(blas.path, blas.note, 'libmkl' in open('/proc/self/maps').read())"
    assert output(LOAD + MLX + CHECK + shown, MLX_ZOO_BLAS="off") == "None MLX_ZOO_BLAS=off False"


def test_a_named_library_is_used(fast):
    assert output(LOAD + "print(blas.path)", MLX_ZOO_BLAS=fast) == fast


@pytest.mark.parametrize(
    ("path", "problem"),
    [("/no/such/libblas.so", "cannot be loaded"), ("libm.so.6", "exports no cblas_sgemm")],
)
def test_a_named_library_that_cannot_serve_is_an_error(path, problem):
    done = run(LOAD, MLX_ZOO_BLAS=path)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"mlx_zoo.errors.MLXZooError: MLX_ZOO_BLAS={path} {problem}")
    assert "unset it" in message


def test_a_named_library_that_comes_second_is_reported(fast):
    first = f"import ctypes; ctypes.CDLL({fast!r}, ctypes.RTLD_GLOBAL)\n"
    assert "in this process already" in output(first + LOAD + "print(blas.note)")
    assert output(first + LOAD + "print(blas.path)", MLX_ZOO_BLAS=fast) == fast


@pytest.mark.skipif(not blas._computes_on_reference_blas(), reason="not MLX's CPU wheel")
class TestWarnings:
    def test_mlx_first_warns_once_with_the_remedy(self):
        code = MLX + LOAD + "print(load_fast_blas() is blas, blas.name)"
        done = run(code)
        assert done.stdout.strip() == "True reference (slow)"
        assert done.stderr.count("RuntimeWarning") == 1
        assert "Put `import mlx_zoo` before" in done.stderr
        assert output(code, MLX_ZOO_BLAS="off") == "True reference (slow)"

    def test_mlx_first_is_quiet_when_a_fast_blas_is_there(self, fast):
        first = f"import ctypes; ctypes.CDLL({fast!r}, ctypes.RTLD_GLOBAL)\n"
        assert "measure_gflops" in output(first + MLX + LOAD + "print(blas.note)")

    def test_none_found_warns_once_with_the_remedy(self):
        done = run(NOTHING + LOAD + "load_fast_blas(); print(blas.name)", MLX_ZOO_BLAS="off")
        assert done.stdout.strip() == "reference (slow)"
        assert done.stderr.count("RuntimeWarning") == 1
        assert 'pip install "mlx-zoo[cpu]"' in done.stderr

    def test_none_found_is_quiet_where_mlx_computes_on_cuda(self):
        cuda = (
            "beside = b._beside_mlx\n"
            "b._beside_mlx = lambda pattern: ['there'] if 'cuda' in pattern else beside(pattern)\n"
        )
        code = NOTHING + cuda + LOAD + "print(blas.note)"
        assert output(code, MLX_ZOO_BLAS="off") == "no fast BLAS was found"


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"MKL_THREADING_LAYER": "TBB"}, "ends the process"),
        ({"MKL_INTERFACE_LAYER": "ILP64"}, "counts in 32 bits"),
        ({"MKL_THREADING_LAYER": "SEQUENTIAL"}, ""),
        ({"MKL_THREADING_LAYER": "INTEL"}, ""),
    ],
)
def test_mkl_settings_that_would_do_harm_are_undone(mkl, settings, note):
    assert note in output(LOAD + MLX + CHECK + LINALG + "print(blas.note)", **settings)


@pytest.mark.skipif(not find_spec("torch"), reason="PyTorch is not installed")
@pytest.mark.parametrize(
    "order",
    [TORCH + LOAD + MLX, LOAD + TORCH + MLX, LOAD + MLX + CHECK + TORCH],
    ids=["torch first", "torch between", "torch after the first product"],
)
def test_torch_in_the_same_process_computes_the_same(fast, order):
    # Two OpenMP runtimes meet here, which has given wrong products where a layer was forced.
    output(order + CHECK)


def test_measured_speed_is_a_number():
    assert blas.measure_gflops(64) > 0
