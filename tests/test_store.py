"""The clients' memory: the newest version before a round, never the future, whole or not at all."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from fedssl.federation import store as store_module
from fedssl.federation.store import ClientStore


def memory(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), value), "count": torch.tensor(7)}


def test_a_client_without_memory_has_an_empty_one(tmp_path: Path) -> None:
    assert ClientStore(tmp_path).read(3, before=5) == {}


def test_the_newest_version_before_a_round_is_read_never_the_future(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for round_num in (2, 5, 10):  # 10 < 2 as text
        store.write(1, round_num, memory(round_num))
    store.write(11, 3, memory(-1))  # another client, whose name begins alike
    read = {before: store.read(1, before=before).get("w", torch.zeros(1))[0].unique().tolist() for before in range(13)}
    assert [read[before] for before in (0, 2, 3, 5, 6, 10, 11)] == [[0.0], [0.0], [2.0], [2.0], [5.0], [5.0], [10.0]]
    assert store.read(1, before=11)["count"].item() == 7


def test_the_same_task_again_overwrites_its_version(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.write(0, 1, memory(1))
    store.write(0, 1, memory(2))
    assert store.versions(0) == [1]
    assert store.read(0, before=2)["w"][0, 0] == 2


def test_strided_views_and_gradients_are_kept_by_value(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    table = torch.arange(6.0).reshape(2, 3).requires_grad_()
    store.write(0, 1, {"columns": table.T, "row": table[1]})
    read = store.read(0, before=2)
    assert torch.equal(read["columns"], table.detach().T)
    assert torch.equal(read["row"], table.detach()[1])


@given(st.data())
def test_pruning_keeps_the_newest_and_what_a_base_reads(
    tmp_path_factory: pytest.TempPathFactory, data: DataObject
) -> None:
    store = ClientStore(tmp_path_factory.mktemp("store"))
    written = {partition: data.draw(st.sets(st.integers(1, 8)), f"rounds of {partition}") for partition in (0, 1)}
    for partition, rounds in written.items():
        for round_num in rounds:
            store.write(partition, round_num, memory(round_num))
    bases = data.draw(st.sets(st.integers(0, 9)), "bases")

    def readable() -> list[list[float]]:
        return [
            store.read(partition, before=before).get("w", torch.zeros(0)).unique().tolist()
            for partition in written
            for before in (*(base + 1 for base in bases), 99)  # a task after round r reads before r + 1
        ]

    before = readable()
    store.prune(bases)
    assert readable() == before
    for partition, rounds in written.items():
        read = {max((r for r in rounds if r <= base), default=None) for base in (*bases, 99)} - {None}
        assert set(store.versions(partition)) == read  # and nothing more than needed


def test_a_write_that_dies_leaves_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ClientStore(tmp_path)
    store.write(0, 1, memory(1))

    def die(tensors: object, path: Path) -> None:
        path.write_bytes(b"half of a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "save_file", die)
    for round_num in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            store.write(0, round_num, memory(9))
    assert store.versions(0) == [1]
    assert store.read(0, before=9)["w"][0, 0] == 1
    store.prune([5])
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["1.safetensors"]  # the halves are gone


def test_a_replay_writes_nothing(tmp_path: Path) -> None:
    ClientStore(tmp_path, writable=False).write(0, 1, memory(1))
    assert list(tmp_path.iterdir()) == []
