"""What a worker takes of its GPU, and that a run says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedssl
from fedssl.cuda_graph import WORTH
from fedssl.errors import ConfigError
from fedssl.federation import client, gpu_memory
from fedssl.federation.gpu_memory import measure
from fedssl.federation.grids.in_process import InProcessGrid
from fedssl.federation.setup import Setup
from tests.federation_helpers import FAMILIES, small


def test_without_a_gpu_there_is_nothing_to_measure() -> None:
    setup = Setup(small(None))
    with pytest.raises(ConfigError, match="torch sees no GPU in this worker"):
        measure(setup, setup.build_model)


def test_both_sizes_of_a_clients_batches_are_trained_until_they_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(small(None))
    seen: list[Any] = []
    train = client.train

    def spy(model: Any, images: Any, **settings: Any) -> dict[str, float]:
        metrics = train(model, images, **settings)
        seen.append((len(images), settings["batch_size"], metrics["steps"], type(model.backbone).__name__))
        return metrics

    monkeypatch.setattr(client, "train", spy)
    for family in FAMILIES:
        gpu_memory._train_some_steps(setup, setup.build_model, family)
    # 13 of the largest client's 29 images: a batch of 8 and one of 5
    assert seen == [(13, 8, float(2 * WORTH), network) for network in ("Conv4", "Conv4", "Tiny")]


def test_a_peak_is_what_torch_reserved_and_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """In MB: of 80000 another process has 10000, a context takes 500, libraries 200 more."""
    held = {"context": 500, "reserved": 0, "peak": 0}

    def trained(setup: Setup, build_model: Any, family: str) -> None:
        held.update(context=700, reserved=2000, peak=3000 if family == "tiny" else 2000)

    fakes: dict[str, Any] = {
        "mem_get_info": lambda: (80_000 - 10_000 - held["context"] - held["reserved"], 80_000),
        "memory_reserved": lambda: held["reserved"],
        "max_memory_reserved": lambda: held["peak"],
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu_memory, "_free_beside_another_process", lambda: 80_000 - 10_000 - 2 * 500)
    monkeypatch.setattr(gpu_memory, "_train_some_steps", trained)
    monkeypatch.setattr(Setup, "device", torch.device("cuda"))
    setup = Setup(small(None))
    assert measure(setup, setup.build_model) == {"free": 70_000, "conv4_4": 2700, "conv4_2": 2700, "tiny": 3700}


def test_the_manifest_holds_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"clients_per_gpu": 3, "free_bytes": 10e9, "peak_bytes": {"tiny": 3e9}}
    monkeypatch.setattr(InProcessGrid, "gpu_memory", measured, raising=False)
    fedssl.run(small(tmp_path / "run", "strategy=fedavg", "federation.num_rounds=1", "evaluate.every=9"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["gpu_memory"] == measured
    assert manifest["seed"] == 0


@pytest.mark.gpu
def test_a_workers_memory_is_its_context_and_what_it_trains() -> None:
    peaks = {}
    for batch_size in (8, 128):  # workspaces of the convolutions are larger than what a few images more take
        sizes = ("data.num_images=1400", f"client.batch_size={batch_size}", "models.conv4_4.width=512")
        setup = Setup(small(None, "device=cuda", *sizes))
        figures = measure(setup, setup.build_model)
        free, total = torch.cuda.mem_get_info()
        assert set(figures) == {"free", *FAMILIES}
        assert free < figures["free"] <= total
        assert all(100e6 < figures[family] < total for family in FAMILIES)  # a context alone takes more
        peaks[batch_size] = figures["conv4_4"]
    assert peaks[128] > peaks[8]


@pytest.mark.gpu
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_auto_on_a_gpu(tmp_path: Path) -> None:
    """Small networks: as many as grid.max_clients_per_gpu allows."""
    overrides = ("device=cuda", "grid=ray", "grid.clients_per_gpu=auto", "grid.max_clients_per_gpu=2")
    assert fedssl.run(small(tmp_path / "run", *overrides))["status"] == "completed"
    measured = json.loads((tmp_path / "run" / "manifest.json").read_text())["gpu_memory"]
    assert measured["clients_per_gpu"] == 2
    assert set(measured["peak_bytes"]) == set(FAMILIES)
