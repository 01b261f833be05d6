"""`scripts/benchmark.py`: what measures a GPU, and runs on the CPU as well."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from bench import views  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", DEVICES)
def test_views_are_measured_on_any_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PAIRS", 2)
    monkeypatch.setattr(views, "AT_LEAST_S", 0.01)
    rates = views.on_device(torch.device(name), [16])["rates"]["16"]
    ways = {"torchvision_one_draw", "exact", "exact_replayed", "linear", "linear_replayed"}
    assert rates.keys() == ways
    assert all(median > 0 for median, _ in rates.values())
