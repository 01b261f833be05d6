"""Flower's own simulation engine as a grid: an oracle for ours, with the same run directory and the same failures."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedssl
from fedssl.__main__ import main
from fedssl.errors import ConfigError
from fedssl.federation import simulation
from fedssl.federation.grids import flower_sim
from fedssl.federation.grids.flower_sim import FlowerSim, FlowerSimGrid
from tests import grid_apps
from tests.federation_helpers import SMALL, rows, run_interrupted, sabotaged, small
from tests.test_grids import messages
from tests.test_grids_ray import facts
from tests.test_simulation import assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files to the garbage collector

NUM_CLIENTS = 8
SETTINGS = FlowerSim(workers=2, clients_per_gpu=2, gpus=2, max_retries=1)
ON_FLOWER = ("grid=flower_sim", "grid.workers=2", "grid.gpus=2")


@pytest.fixture(scope="module")
def grid() -> Iterator[FlowerSimGrid]:
    with SETTINGS.open(grid_apps.Behaviour, num_clients=NUM_CLIENTS, threads=1, device="cpu") as grid:
        yield grid


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the grid waits for no message, and no worker is said to run one."""
    yield
    if "grid" in request.fixturenames:
        grid: FlowerSimGrid = request.getfixturevalue("grid")
        grid.pop_events()
        assert not grid._waiting


# --- settings ---
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "grid.workers must be at least 1"),
        ({"clients_per_gpu": 0}, "grid.clients_per_gpu must be a whole number of at least 1, got 0"),
        ({"max_retries": -1}, "grid.max_retries must be at least 0"),
        ({"workers": 33}, r"grid.workers=33, but Flower's engine runs at most \d+ clients at once"),
    ],
)
def test_settings_check_themselves(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowerSim(**(vars(SETTINGS) | changes))


@pytest.mark.parametrize(("cores", "most"), [(2, 6), (16, 20), (64, 32)])
def test_the_engine_runs_few_clients_at_once(cores: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_sim.os, "cpu_count", lambda: cores)
    assert flower_sim.most_workers() == most
    FlowerSim(**(vars(SETTINGS) | {"workers": most}))
    with pytest.raises(ConfigError, match=f"at most {most} clients at once"):
        FlowerSim(**(vars(SETTINGS) | {"workers": most + 1}))


def test_a_bad_setting_ends_the_command_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [override for override in SMALL if not override.startswith("grid=")]
    code = main([*overrides, "grid=flower_sim", "grid.workers=33", f"run_dir={tmp_path / 'run'}"])
    assert code == 2
    assert "grid.workers=33, but Flower's engine runs at most" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- runs: before the module's grid is opened, because there is one engine at a time ---
@pytest.mark.ray
def test_a_run_is_the_in_process_one_bit_for_bit(tmp_path: Path) -> None:
    """Weights, rows and summary, though a worker is killed; the row of its round names the client."""
    fedssl.run(small(tmp_path / "here", "strategy=flesd"))
    config = small(tmp_path / "flower", "strategy=flesd", *ON_FLOWER)
    fedssl.run(sabotaged(config, "kill", round_num=2, partitions=[1], marker=str(tmp_path / "killed")))
    assert (tmp_path / "killed").exists()
    assert_same_run(tmp_path / "flower", tmp_path / "here")
    first, second = (row["metrics"] for row in rows(tmp_path / "flower", "round"))
    assert first["failures"] == []
    assert (second["num_ok"], second["num_failed"]) == (4, 0)
    assert [(failure["partition"], failure["kind"]) for failure in second["failures"]] == [(1, "worker_died")]


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_is_resumed_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After round 1 in this process; what a client then remembers, and how one fails, are those of other grids."""
    overrides = ("strategy=local_only", "evaluate.every=9")
    for name in ("here", "flower"):
        config = sabotaged(small(tmp_path / name, *overrides), "raise", round_num=2, partitions=[3])
        if name == "flower":
            run_interrupted(config, monkeypatch, before_round=2)
            config["grid"] = small(None, *overrides, *ON_FLOWER)["grid"]
            simulation.resume(config, tmp_path / name)
        else:
            fedssl.run(config)
    assert_same_run(tmp_path / "flower", tmp_path / "here")
    assert rows(tmp_path / "flower", "round") == rows(tmp_path / "here", "round")


@pytest.mark.slow
@pytest.mark.ray
def test_closing_does_not_wait_for_a_client_that_hangs() -> None:
    import ray  # here: where there is none, the GPU's tests are collected all the same

    with SETTINGS.open(grid_apps.Behaviour, num_clients=2, threads=1, device="cpu") as grid:
        grid.push_messages(messages(grid, [0], "sleep", seconds=600.0))
        time.sleep(1)
        started = time.monotonic()
    assert time.monotonic() - started < 120
    assert "flower simulation" not in [thread.name for thread in threading.enumerate()]
    assert not ray.is_initialized()
    with pytest.raises(RuntimeError, match="this grid is closed"):
        grid.get_node_ids()


# --- the grid ---
@pytest.mark.ray
def test_workers_keep_the_memory_that_they_free(grid: FlowerSimGrid) -> None:
    assert max(facts(grid.send_and_receive(messages(grid, [0, 1], "allocate")), "page_faults")) < 1000


@pytest.mark.ray
def test_workers_are_other_processes_with_our_surroundings(grid: FlowerSimGrid) -> None:
    everyone = list(range(NUM_CLIENTS))
    replies = grid.send_and_receive(messages(grid, everyone))
    assert [reply.metadata.src_node_id for reply in replies] == grid.get_node_ids()  # in the order of the messages
    assert sorted(facts(replies, "partition")) == everyone
    assert set(facts(replies, "partitions")) == {NUM_CLIENTS}
    assert os.getpid() not in facts(replies, "pid")
    assert len(set(facts(replies, "pid"))) <= 2
    assert set(facts(replies, "threads")) == {1}
    assert set(facts(replies, "cwd")) == {str(Path.cwd())}
    assert set(facts(replies, "cuda")) == {""}  # device=cpu: the declared GPUs are hidden
    assert set(sys.path) - {""} <= set(replies[0].content["facts"]["path"])


@pytest.mark.ray
def test_state_follows_its_node(grid: FlowerSimGrid) -> None:
    counts = [facts(grid.send_and_receive(messages(grid, [1, 2, 3], "count")), "count") for _ in range(2)]
    assert counts == [[1] * 3, [2] * 3]


@pytest.mark.ray
def test_failing_clients_are_error_replies(grid: FlowerSimGrid) -> None:
    """With the words of every grid, and their worker lives."""
    pids = set(facts(grid.send_and_receive(messages(grid, [0, 1, 2, 3])), "pid"))
    batch = [*messages(grid, [0], "raise"), *messages(grid, [1], "exit"), *messages(grid, [2])]
    raised, exited, good = grid.send_and_receive(batch)
    assert raised.error.code == 2
    assert str(raised.error.reason).startswith("ValueError: during local training: no images in partition")
    assert (exited.error.code, exited.error.reason) == (2, "SystemExit: 3")
    assert set(facts([good], "pid")) <= pids
    assert grid.pop_events() == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_worker_loses_nothing_and_a_deadly_client_fails_alone(grid: FlowerSimGrid, tmp_path: Path) -> None:
    """Where a dead actor of Flower's would answer every later message with an error."""
    nodes = grid.get_node_ids()
    batch = messages(grid, list(range(NUM_CLIENTS)))
    batch[2:3] = messages(grid, [2], "die_once", folder=str(tmp_path))
    batch[5:6] = messages(grid, [5], "die", folder=str(tmp_path))
    batch[7:8] = messages(grid, [7], "break")
    replies = grid.send_and_receive(batch)
    assert [reply.has_error() for reply in replies] == [position in (5, 7) for position in range(NUM_CLIENTS)]
    assert [replies[position].error.code for position in (5, 7)] == [0, 0]
    assert {event.kind for event in grid.pop_events()} == {"worker_died"}
    again = grid.send_and_receive(messages(grid, list(range(NUM_CLIENTS))))
    assert [reply.metadata.src_node_id for reply in again] == nodes
    assert not any(reply.has_error() for reply in again)


@pytest.mark.slow
@pytest.mark.ray
def test_late_clients_are_missing_and_free_their_worker(grid: FlowerSimGrid) -> None:
    batch = messages(grid, [0, 1, 2], "sleep", seconds=600.0)
    started = time.monotonic()
    assert grid.send_and_receive(batch, timeout=2) == []
    assert time.monotonic() - started < 30
    events = grid.pop_events()
    assert [event.kind for event in events] == ["worker_stopped"] * 2
    assert {node for event in events for node in event.node_ids} < set(grid.get_node_ids()[:3])
    assert len(facts(grid.send_and_receive(messages(grid, [0, 1])), "partition")) == 2
    assert grid.pull_messages([message.metadata.message_id for message in batch]) == []


@pytest.mark.ray
def test_no_second_grid_while_one_is_open(grid: FlowerSimGrid) -> None:
    with pytest.raises(ConfigError, match="grid=flower_sim ends the Ray that it ran on"):
        SETTINGS.open(grid_apps.Behaviour, num_clients=2, threads=1, device="cpu")


@pytest.mark.ray
def test_unknown_nodes_are_named(grid: FlowerSimGrid) -> None:
    (message,) = messages(grid, [0])
    message.metadata.dst_node_id = 7
    with pytest.raises(ValueError, match="took 0 of 1 messages"):
        grid.push_messages([message])
