"""The strategies that exchange weights: what each does to them, by hand; and that all do it with a target network."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from fedssl.federation import simulation
from fedssl.federation.records import Upload, model_state
from fedssl.federation.store import ClientStore
from tests.federation_helpers import (
    FAMILIES,
    Numpy,
    assert_same,
    final_arrays,
    first_round,
    rows,
    run_interrupted,
    small,
)

BYOL = ("method=byol", "method.predictor_dim=8")
WEIGHT_STRATEGIES = ("fedavg",)


def run(run_dir: Path, *overrides: str) -> Numpy:
    """The global weights after a small run."""
    simulation.run(small(run_dir, *overrides, "evaluate.every=9"))
    return final_arrays(run_dir)


def memory_of(run_dir: Path, partition: int, *, before: int = 9) -> Numpy:
    """What a client keeps."""
    kept = ClientStore(run_dir / "clients").read(partition, before=before)
    return {name: value.numpy() for name, value in kept.items()}


# --- with a target network ---
@pytest.mark.parametrize("strategy", WEIGHT_STRATEGIES)
def test_byol_interrupted_and_resumed_equals_byol(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, rows and the clients' memories, bit for bit, where one client of four sits out every round."""
    overrides = (f"strategy={strategy}", *BYOL, "federation.cohort_size=3", "federation.num_rounds=4")
    straight = run(tmp_path / "straight", *overrides)
    config = small(tmp_path / "resumed", *overrides, "evaluate.every=9")
    run_interrupted(config, monkeypatch, before_round=3)
    simulation.resume(config, tmp_path / "resumed")
    assert_same(final_arrays(tmp_path / "resumed"), straight)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")
    assert all(np.isfinite(array).all() for array in straight.values())
    came: dict[int, list[int]] = {}
    for row in rows(tmp_path / "straight", "client"):
        came.setdefault(row["partition"], []).append(row["round"])
        assert all(value is not None and math.isfinite(value) for value in row["metrics"].values())
    assert any(b - a > 1 for its in came.values() for a, b in itertools.pairwise(its))  # sat out, came back
    for partition in came:
        memory = memory_of(tmp_path / "straight", partition)
        assert_same(memory_of(tmp_path / "resumed", partition), memory)
        assert any(name.startswith(f"method/{FAMILIES[partition % 3]}/backbone") for name in memory)


@pytest.mark.parametrize("strategy", WEIGHT_STRATEGIES)
def test_an_upload_is_the_model_and_no_target_network(strategy: str, tmp_path: Path) -> None:
    setup, _, _, replies = first_round(small(None, f"strategy={strategy}", *BYOL), tmp_path)
    for partition, reply in enumerate(replies):
        family = FAMILIES[partition % 3]
        own = {f"{family}/{name}" for name in model_state(setup.build_model(family))}
        assert Upload.from_message(reply).arrays.keys() == own
        assert f"{family}/heads.predictor.out.weight" in own
        target = {name for name in memory_of(tmp_path, partition) if name.startswith(f"method/{family}/")}
        assert target  # which there is, but it stays


@pytest.mark.parametrize("strategy", ["fedavg"])
def test_a_cohorts_mean_is_over_the_cohort(strategy: str, tmp_path: Path) -> None:
    """Shares are of those who came: of conv4_4's two clients both, or the one that did; others' weights stay."""
    setup, server_half, _, replies = first_round(
        small(None, f"strategy={strategy}", *BYOL, "federation.cohort_size=2", "partition=dirichlet"), tmp_path
    )
    merged, _ = server_half.aggregate_train(1, replies)
    assert merged is not None
    uploads = [Upload.from_message(reply) for reply in replies]
    assert len(uploads) == 2
    for family in FAMILIES:
        its = [upload for upload in uploads if upload.header.family == family]
        total = sum(upload.num_images for upload in its)
        for name, initial in model_state(setup.build_model(family)).items():
            key = f"{family}/{name}"
            mean = sum(upload.num_images / total * upload.arrays[key].astype(np.float64) for upload in its)
            np.testing.assert_allclose(merged[key].numpy(), mean if its else initial.numpy(), rtol=1e-5, atol=1e-8)
