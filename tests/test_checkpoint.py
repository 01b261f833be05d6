"""Checkpoints come back bit for bit, whole or not at all, and those that somebody needs stay."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedssl.errors import ConfigError, DataError
from fedssl.federation import checkpoint as checkpoint_module
from fedssl.federation.checkpoint import Checkpoints, Progressed
from tests.federation_helpers import assert_same, numpy_of, tree_hash


def progressed(round_num: int, **changes: Any) -> Progressed:
    return dataclasses.replace(
        Progressed(
            round_num=round_num,
            uplink_bytes=10,
            downlink_bytes=20,
            wall_seconds=1.5,
            simulated_seconds=60.5,
            metrics_offset=99,
            server_row={"loss": 0.25, "uplink_bytes": 10},
            failed_rounds=[],
            evaluation={"tiny": {"knn_top1": 0.1 + 0.2}},
            global_model=True,
            num_trained={"tiny": 2},
        ),
        **changes,
    )


ARRAYS = ArrayRecord(
    {
        "tiny/w": Array(np.arange(6, dtype=np.float32).reshape(2, 3).T),  # not contiguous
        "tiny/scale": Array(np.array(0.5, dtype=np.float32)),  # no dimensions
        "tiny/empty": Array(np.zeros((0, 3), np.float16)),
        "other/w": Array(np.array([np.nan, -0.0], np.float64)),
    }
)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = {"momentum": torch.randn(3, generator=torch.Generator().manual_seed(0)), "step": torch.tensor(5)}
    checkpoints.save(ARRAYS, state, progressed(3))
    arrays, strategy_state, counters = Checkpoints(tmp_path, keep=2).load(3)
    assert_same(numpy_of(arrays), numpy_of(ARRAYS))
    assert strategy_state.keys() == state.keys()
    assert all(torch.equal(strategy_state[name], state[name]) for name in state)
    assert counters == progressed(3)


def test_a_strategy_without_state_and_a_run_without_arrays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(ArrayRecord(), {}, progressed(0))
    arrays, state, _ = checkpoints.load(0)
    assert (dict(arrays), state) == ({}, {})


def save(checkpoints: Checkpoints, *rounds: int, failed: list[int]) -> list[int]:
    kept: list[int] = []
    for round_num in rounds:
        checkpoints.save(ArrayRecord(), {}, progressed(round_num))
        kept = checkpoints.prune([f for f in failed if f <= round_num])
    return kept


@pytest.mark.parametrize(
    ("keep", "failed", "kept"),
    [(1, [], [12]), (2, [], [11, 12]), (2, [3], [2, 11, 12]), (1, [1, 12], [0, 11, 12]), (99, [], list(range(13)))],
)
def test_the_newest_and_the_bases_of_failed_rounds_stay(
    tmp_path: Path, keep: int, failed: list[int], kept: list[int]
) -> None:
    """The base of round 3 is the state after round 2: what a replay of round 3 starts from."""
    checkpoints = Checkpoints(tmp_path, keep=keep)
    assert save(checkpoints, *range(13), failed=failed) == kept  # for the client store
    assert checkpoints.rounds() == kept
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_a_save_that_dies_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(ARRAYS, {}, progressed(0))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_tensors", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(ARRAYS, {}, progressed(1))
    assert any(tmp_path.glob(".*"))  # something half is there
    assert checkpoints.rounds() == [0]
    checkpoints.save(ARRAYS, {}, progressed(1))
    assert checkpoints.rounds() == [0, 1]
    assert not any(tmp_path.glob(".*"))


def test_a_deletion_that_dies_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(ARRAYS, {}, progressed(0))
    checkpoints.save(ARRAYS, {}, progressed(1))

    def half(folder: Path, **_: Any) -> None:
        (folder / "progress.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.prune([])
    for round_num in checkpoints.rounds():
        checkpoints.load(round_num)
    assert checkpoints.rounds() == [1]
    checkpoints.prune([])
    assert [path.name for path in tmp_path.iterdir()] == ["00001"]  # and the next prune takes the half away


def test_what_is_loaded_may_change_without_the_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(ARRAYS, {"m": torch.zeros(2)}, progressed(1))
    before = tree_hash(tmp_path)
    arrays, state, counters = checkpoints.load(1)
    state["m"].add_(1)
    torch.from_numpy(arrays["tiny/w"].numpy()).add_(1)
    counters.server_row["loss"] = 7
    assert tree_hash(tmp_path) == before
    assert_same(numpy_of(checkpoints.load(1)[0]), numpy_of(ARRAYS))


@pytest.mark.parametrize("name", ["arrays.safetensors", "strategy.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_named(name: str, damage: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(ARRAYS, {"m": torch.zeros(2)}, progressed(1))
    path = tmp_path / "00001" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if damage == "cut" else b"")
    with pytest.raises(DataError, match=r"missing or damaged.*delete .*00001 to go on") as caught:
        checkpoints.load(1)
    assert str(path) in str(caught.value)


def test_none_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_checkpoints must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
