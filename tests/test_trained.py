"""What was trained here computes what PyTorch does with the weights that `export` writes."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_zoo
from mlx_zoo.errors import VerificationError

RANDOM = np.random.default_rng(0)
IMAGES = (RANDOM.integers(0, 255, (8, 32, 32, 1), np.uint8), [*"abababab"])
TEXTS = [(f"open the file {x} and read it", "files") for x in "abcd"]
TEXTS += [(f"the sum of {x} and one", "numbers") for x in "abcd"]


@pytest.mark.parametrize(
    ("name", "data"), [("resnet_digits", IMAGES), ("vit_digits", IMAGES), ("bert_docs", TEXTS)]
)
def test_a_trained_network_is_verified_by_its_export(name, data, tmp_path):
    result = mlx_zoo.finetune(name, data, epochs=1, batch_size=4, output=tmp_path / "run")
    task = result.model.checkpoint.task if data is TEXTS else None
    for given in (result.model, f"local-dir:{tmp_path / 'run' / 'model'}"):
        report = mlx_zoo.verify(given, **({"task": task} if isinstance(given, str) else {}))
        assert report.passed, report.reason
        assert "exported weights" in report.origin
        assert len(report.layers) > 5
    assert result.model.checkpoint.base_model == name  # as it was


def test_a_mistake_is_seen():
    model = mlx_zoo.finetune("resnet_digits", IMAGES, epochs=1, batch_size=4).model
    model.layer1[0].bn1.eps = 0.1
    report = mlx_zoo.verify(model)
    assert not report.passed
    assert report.first_divergence == "layer1.0.bn1"


def test_a_network_that_no_library_can_make_says_so():
    model = mlx_zoo.finetune("efficientnet_digits", IMAGES, epochs=1, batch_size=4).model
    with pytest.raises(
        VerificationError, match=r"was trained, and cannot be compared.*no construc"
    ):
        mlx_zoo.verify(model)
    assert model.checkpoint.base_model == "efficientnet_digits"
