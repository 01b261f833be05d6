"""The loop itself: when it evaluates, what it carries from round to round, what it forgets in time."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

import fedssl
from fedssl.errors import ConfigError, TooFewRepliesError
from fedssl.federation import rounds, simulation
from fedssl.federation.checkpoint import Checkpoints
from fedssl.federation.server import Server
from fedssl.federation.store import ClientStore
from fedssl.lock import NAME as LOCK
from fedssl.lock import held
from strategies.fedavg import FedAvg
from tests.federation_helpers import FAMILIES, another_begins, assert_same, final_arrays, rows, sabotaged, small


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (3, [0, 3]), (9, [0, 3])])
def test_round_zero_and_the_last_round_are_always_evaluated(every: int, expected: list[int], tmp_path: Path) -> None:
    overrides = ("strategy=fedavg", "federation.num_rounds=3", f"evaluate.every={every}")
    fedssl.run(small(tmp_path / "run", *overrides))
    assert sorted({row["round"] for row in rows(tmp_path / "run", "eval")}) == expected
    for round_num in expected[1:]:
        evaluated = [row["family"] for row in rows(tmp_path / "run", "eval") if row["round"] == round_num]
        assert evaluated == list(FAMILIES)


class WithMomentum(FedAvg):
    """A server half with a state of its own."""

    def __init__(self, *, server: Server) -> None:
        super().__init__(server=server, weighted=True)
        self.velocity: dict[str, Tensor] = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        averages, metrics = super().aggregate_train(server_round, replies)
        assert averages is not None
        for name, average in averages.items():
            step = torch.from_numpy(average.numpy()) - torch.from_numpy(self.arrays[name].numpy())
            decay = 0.0 if "running" in name else 0.5  # a variance must not overshoot below zero
            self.velocity[name] = decay * self.velocity.get(name, torch.zeros(())) + step
        moved = {name: self.velocity[name] + torch.from_numpy(a.numpy()) for name, a in self.arrays.items()}
        return ArrayRecord(moved), metrics

    def state_dict(self) -> dict[str, Tensor]:
        return self.velocity

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.velocity = dict(state)


def test_a_strategys_own_state_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And matters: without it the weights would differ."""

    def run(name: str, num_rounds: int) -> None:
        config = small(tmp_path / name, "strategy=fedavg", f"federation.num_rounds={num_rounds}", "evaluate.every=9")
        config["strategy"]["server"] = {"_target_": "tests.test_rounds.WithMomentum"}
        (simulation.resume(config, tmp_path / name) if (tmp_path / name).exists() else fedssl.run(config))

    run("straight", 3)
    for name in ("resumed", "forgetful"):
        run(name, 2)
    run("resumed", 3)
    assert_same(final_arrays(tmp_path / "resumed"), final_arrays(tmp_path / "straight"))
    monkeypatch.setattr(WithMomentum, "load_state_dict", lambda self, state: None)
    run("forgetful", 3)
    with pytest.raises(AssertionError):
        assert_same(final_arrays(tmp_path / "forgetful"), final_arrays(tmp_path / "straight"))


def test_old_memory_goes_with_old_checkpoints(tmp_path: Path) -> None:
    """The base of the failed round 2 stays, so what its clients read stays, too."""
    overrides = ("strategy=local_only", "federation.num_rounds=4", "federation.keep_checkpoints=1", "evaluate.every=9")
    fedssl.run(small(tmp_path / "clean", *overrides))
    fedssl.run(sabotaged(small(tmp_path / "failed", *overrides), "raise", round_num=2, partitions=[0]))
    assert Checkpoints(tmp_path / "clean" / "checkpoints", keep=1).rounds() == [4]
    assert [ClientStore(tmp_path / "clean" / "clients").versions(p) for p in range(4)] == [[4]] * 4
    assert [ClientStore(tmp_path / "failed" / "clients").versions(p) for p in range(4)] == [[1, 4]] * 4
    metrics = simulation.replay(
        small(tmp_path / "failed", *overrides), tmp_path / "failed", round_num=2, partition_id=1
    )
    (written,) = (r for r in rows(tmp_path / "failed", "client") if (r["round"], r["partition"]) == (2, 1))
    assert metrics["loss"] == written["metrics"]["loss"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_memory_that_no_checkpoint_needs_goes_though_its_client_is_not_asked_again(keep: int, tmp_path: Path) -> None:
    """In two sittings; the base of the failed round 3 stays and pins one memory a client, not all that follow."""
    run_dir = tmp_path / "run"
    overrides = ("strategy=local_only", "federation.cohort_size=2", "evaluate.every=99")
    config = small(run_dir, *overrides, f"federation.keep_checkpoints={keep}", "federation.num_rounds=6")
    fedssl.run(sabotaged(config, "raise", round_num=3, partitions=[0, 1, 2]))
    config["federation"]["num_rounds"] = 6 + keep
    simulation.resume(config, run_dir)
    wrote = [(row["partition"], row["round"]) for row in rows(run_dir, "client")]
    bases = Checkpoints(run_dir / "checkpoints", keep=keep).rounds()
    assert bases == [2, *range(7, 7 + keep)]
    for partition in range(4):
        read = {max((r for p, r in wrote if p == partition and r <= base), default=0) for base in bases} - {0}
        assert ClientStore(run_dir / "clients").versions(partition) == sorted(read)


def test_a_round_looks_at_the_memory_of_its_cohort_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sitting looks once at that of everybody who was ever seen, here fifty more."""
    overrides = ("strategy=local_only", "evaluate.every=9", "federation.num_rounds=1")
    config = small(tmp_path / "run", *overrides)
    fedssl.run(config)
    for partition in range(100, 150):
        ClientStore(tmp_path / "run" / "clients").write(partition, 1, {"seen": torch.ones(1)})
    looked_at: Counter[int] = Counter()
    versions = ClientStore.versions

    def count(self: ClientStore, partition_id: int) -> list[int]:
        looked_at[partition_id] += 1
        return versions(self, partition_id)

    monkeypatch.setattr(ClientStore, "versions", count)
    config["federation"]["num_rounds"] = 4
    simulation.resume(config, tmp_path / "run")
    assert [looked_at[partition] for partition in range(100, 150)] == [1] * 50


@pytest.mark.parametrize("more_rounds", [0, 1])
def test_what_a_kill_before_the_pruning_left_goes_when_the_run_goes_on(
    more_rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", "strategy=local_only", "evaluate.every=9", "federation.num_rounds=4")
    with monkeypatch.context() as patch:
        patch.setattr(ClientStore, "prune", lambda *_: [])
        fedssl.run(config)
    store = ClientStore(tmp_path / "run" / "clients")
    assert store.versions(3) == [1, 2, 3, 4]
    config["federation"]["num_rounds"] += more_rounds
    simulation.resume(config, tmp_path / "run")
    assert [store.versions(partition) for partition in range(4)] == [[3 + more_rounds, 4 + more_rounds]] * 4


def test_the_clients_memory_can_live_elsewhere(tmp_path: Path) -> None:
    fedssl.run(small(tmp_path / "run", "strategy=local_only", f"client.store={tmp_path / 'store'}", "evaluate.every=9"))
    assert not (tmp_path / "run" / "clients").exists()
    assert ClientStore(tmp_path / "store").versions(3) == [1, 2]


def test_two_runs_never_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a resumed run look for it elsewhere: the saved path is absolute."""
    monkeypatch.chdir(tmp_path)
    overrides = ("strategy=local_only", "client.store=store", "evaluate.every=9", "federation.num_rounds=1")
    fedssl.run(small(tmp_path / "first", *overrides))
    saved = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert saved["client"]["store"] == str(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"client\.store=.*store is not empty"):
        fedssl.run(small(tmp_path / "second", *overrides))
    assert not (tmp_path / "second").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved["federation"]["num_rounds"] = 2
    assert simulation.resume(saved, tmp_path / "first")["rounds"] == 2
    assert ClientStore(tmp_path / "store").versions(0) == [1, 2]


def test_a_store_is_one_runs_at_a_time(tmp_path: Path) -> None:
    """Though nothing has been remembered in it yet; what a kill leaves of the lock is not in the way."""
    store = tmp_path / "store"
    store.mkdir()
    overrides = ("strategy=local_only", f"client.store={store}", "evaluate.every=9", "federation.num_rounds=1")
    with (
        held(store, "", ""),
        pytest.raises(ConfigError, match=rf"client\.store={store} is in use by .*: choose another"),
    ):
        fedssl.run(small(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()
    (store / LOCK).write_text("process 1 on a machine that has gone")
    config = small(tmp_path / "run", *overrides)
    assert fedssl.run(config)["status"] == "completed"
    assert sorted(path.name for path in store.iterdir()) == ["0", "1", "2", "3"]
    config["federation"]["num_rounds"] = 2
    with held(store, "", ""), pytest.raises(ConfigError, match=rf"client\.store={store} is in use by .*: end it there"):
        simulation.resume(config, tmp_path / "run")
    assert simulation.resume(config, tmp_path / "run")["rounds"] == 2


@pytest.mark.parametrize(("still_there", "said"), [(True, "is in use by process"), (False, "is not empty")])
def test_a_run_does_not_take_a_store_that_another_has_just_taken(still_there: bool, said: str, tmp_path: Path) -> None:
    """Both have found it empty, and then read their images for a while."""
    store = tmp_path / "store"

    def write() -> None:
        ClientStore(store).write(0, 1, {"seen": torch.ones(1)})

    refused = pytest.raises(ConfigError, match=rf"client\.store={store} {said}")
    with another_begins(store, write, still_there=still_there), refused:
        fedssl.run(small(tmp_path / "run", "strategy=local_only", f"client.store={store}"))
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert ClientStore(store).versions(0) == [1]


@pytest.mark.parametrize("name", ["elsewhere", "run"])
def test_a_run_has_its_store_for_as_long_as_it_lasts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run directory itself may be it: it is not taken twice."""
    summarise = simulation.summarise
    refusals: list[str] = []

    def look(*run: Any) -> dict[str, Any]:  # when all rounds are done
        with pytest.raises(ConfigError) as caught, held(tmp_path / name, "", ""):
            pass
        refusals.append(str(caught.value))
        return summarise(*run)

    monkeypatch.setattr(simulation, "summarise", look)
    overrides = (f"client.store={tmp_path / name}", "evaluate.every=9", "federation.num_rounds=1")
    assert fedssl.run(small(tmp_path / "run", "strategy=local_only", *overrides))["status"] == "completed"
    assert [f"in use by process {os.getpid()} on " in refusal for refusal in refusals] == [True]
    assert not (tmp_path / name / LOCK).exists()


def test_a_store_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = small(tmp_path / "run", "strategy=local_only", f"client.store={tmp_path / 'file' / 'store'}")
    with pytest.raises(ConfigError, match=r"client\.store=.*store cannot be written: Not a directory"):
        fedssl.run(config)
    assert not (tmp_path / "run").exists()


def test_seconds_add_up_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path / "run", "strategy=fedavg", "evaluate.every=9", "federation.num_rounds=1")
    first = fedssl.run(config)["wall_seconds"]
    config["federation"]["num_rounds"] = 2
    total = simulation.resume(config, tmp_path / "run")["wall_seconds"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    _, second = (line["metrics"]["seconds"] for line in lines if line["scope"] == "server")
    assert total == pytest.approx(first + second)


def test_a_late_client_is_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process nobody can be interrupted, but after the time is up nobody is started any more."""
    config = small(tmp_path / "run", "strategy=fedavg", "federation.num_rounds=1", "federation.min_replies=1")
    config["federation"]["round_timeout"] = 1.0
    clock = iter(range(10_000))
    started: list[float] = []

    class Clock:
        """Every look at it takes 0.3 s; the deadline of 1 s is looked at before every pull."""

        @staticmethod
        def monotonic() -> float:
            started.append(0.3 * next(clock))
            return started[-1]

    monkeypatch.setattr(rounds, "time", Clock)
    monkeypatch.setattr("fedssl.federation.grids.in_process.SLICE_SECONDS", 0.0)  # one client a pull
    fedssl.run(config)
    (row,) = rows(tmp_path / "run", "round")
    late = [failure["partition"] for failure in row["metrics"]["failures"]]
    assert row["metrics"]["num_ok"] + row["metrics"]["num_late"] == 4
    assert late == list(range(row["metrics"]["num_ok"], 4))
    assert 1 <= len(late) <= 3
    assert row["metrics"]["failures"][0]["reason"] == "no reply within 1 s (federation.round_timeout)"
    assert [r["partition"] for r in rows(tmp_path / "run", "client")] == list(range(row["metrics"]["num_ok"]))


def test_a_client_whose_evaluation_fails_is_in_the_rounds_row(tmp_path: Path) -> None:
    """Among the failures, with its own reason; the counts are those of the training replies."""
    config = small(tmp_path / "run", "strategy=local_only")
    summary = fedssl.run(sabotaged(config, "raise in evaluation", round_num=2, partitions=[1, 3]))
    assert summary["families"]["conv4_4"]["num_clients"] == 2
    first, second = (row["metrics"] for row in rows(tmp_path / "run", "round"))
    assert first["failures"] == []
    assert (second["num_ok"], second["num_failed"]) == (4, 0)
    reason = "evaluation: ClientError: during the strategy's client half: RuntimeError: no memory left"
    assert second["failures"] == [{"partition": p, "kind": "failed", "reason": reason} for p in (1, 3)]


def test_too_few_evaluations_end_the_run_with_a_row(tmp_path: Path) -> None:
    config = small(tmp_path / "run", "strategy=local_only")
    with pytest.raises(TooFewRepliesError, match="no memory left"):
        fedssl.run(sabotaged(config, "raise in evaluation", round_num=1, partitions=[0, 1, 3]))
    (row,) = rows(tmp_path / "run", "round")
    assert [failure["partition"] for failure in row["metrics"]["failures"]] == [0, 1, 3]
