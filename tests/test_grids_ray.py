"""The Ray grid on a real local Ray, started once for the module with two GPUs declared (none needed)."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedssl.config import compose, instantiate
from fedssl.errors import ConfigError
from fedssl.federation.arrays import to_record
from fedssl.federation.averaging import Summation, mean_of
from fedssl.federation.grids import ray as ray_grid
from fedssl.federation.grids.base import LocalGrid
from fedssl.federation.grids.in_process import InProcessGrid
from fedssl.federation.grids.ray import Placement, Ray, RayGrid
from fedssl.federation.grids.ray_runtime import open_grids
from fedssl.federation.records import Upload, num_bytes
from fedssl.federation.roster import Member, introduce
from fedssl.federation.rounds import Gathered, gather
from fedssl.federation.simulation import load_client_app
from tests import grid_apps
from tests.federation_helpers import small
from tests.test_grids import messages, plain_fedavg, stock_fedavg

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its log files to the garbage collector
]

NUM_CLIENTS = 12
SETTINGS = Ray(
    workers=2,
    clients_per_gpu=2,
    max_clients_per_gpu=8,
    gpu_memory_share=0.9,
    gpus=2,
    address=None,
    max_retries=1,
    batch_seconds=0.1,
)


@pytest.fixture(scope="module")
def grid() -> Iterator[RayGrid]:
    with SETTINGS.open(grid_apps.Behaviour, num_clients=NUM_CLIENTS, threads=1, device="cpu") as grid:
        yield grid


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the grid holds no message, reply, record or event of it."""
    yield
    if "grid" in request.fixturenames:
        grid: RayGrid = request.getfixturevalue("grid")
        grid.pop_events()
        assert not any([grid._queue, grid._tasks, grid._replies, grid._broadcast, grid._users])


def facts(replies: list[Message], name: str) -> list[object]:
    return [reply.content["facts"][name] for reply in replies]


def wait_for_workers(grid: RayGrid) -> None:
    """All workers have loaded the app."""
    deadline = time.monotonic() + 120
    while not all(slot.loaded for slot in grid._slots) and time.monotonic() < deadline:
        grid.pull_messages([])


def warm_up(grid: RayGrid) -> None:
    """Every client has answered once, so that its duration is known and short clients may travel together."""
    wait_for_workers(grid)
    grid.send_and_receive(messages(grid, list(range(NUM_CLIENTS))))


def test_stock_fedavg_equals_a_plain_loop_bit_for_bit(grid: RayGrid) -> None:
    """And therefore the in-process grid, which is held to the same."""
    with SETTINGS.open(grid_apps.least_squares, num_clients=10, threads=1, device="cpu") as fedavg_grid:
        np.testing.assert_array_equal(stock_fedavg(fedavg_grid), plain_fedavg(10))


def test_workers_keep_the_memory_that_they_free(grid: RayGrid) -> None:
    assert max(facts(grid.send_and_receive(messages(grid, [0, 1], "allocate")), "page_faults")) < 1000


def test_workers_are_other_processes_with_our_surroundings(grid: RayGrid) -> None:
    replies = grid.send_and_receive(messages(grid, [*range(6), 5, 4, 3]))
    assert facts(replies, "partition") == [0, 1, 2, 3, 4, 5, 5, 4, 3]
    assert os.getpid() not in facts(replies, "pid")
    assert set(facts(replies, "threads")) == {1}
    assert set(facts(replies, "cwd")) == {str(Path.cwd())}
    assert set(facts(replies, "cuda")) == {""}  # device=cpu: the declared GPUs are hidden
    assert set(sys.path) - {""} <= set(replies[0].content["facts"]["path"])


def test_state_follows_its_node_to_any_worker(grid: RayGrid) -> None:
    counts = [facts(grid.send_and_receive(messages(grid, [1, 2, 3], "count")), "count") for _ in range(3)]
    assert counts == [[1] * 3, [2] * 3, [3] * 3]


def test_failing_clients_are_error_replies(grid: RayGrid) -> None:
    batch = [*messages(grid, [0], "raise"), *messages(grid, [1], "exit"), *messages(grid, [2])]
    raised, exited, good = grid.send_and_receive(batch)
    assert (raised.error.code, raised.error.reason) == (
        2,
        "ValueError: during local training: no images in partition 0",
    )
    assert (exited.error.code, exited.error.reason) == (2, "SystemExit: 3")
    assert good.has_content()
    assert grid.pop_events() == []


def test_a_killed_worker_loses_nothing(grid: RayGrid, tmp_path: Path) -> None:
    """Its clients run again with the identical result, in a new process; the event names them."""
    warm_up(grid)
    everyone = list(range(NUM_CLIENTS))
    expected = grid.send_and_receive(messages(grid, everyone))
    batch = messages(grid, everyone)
    batch[4:5] = messages(grid, [4], "die_once", folder=str(tmp_path))
    replies = grid.send_and_receive(batch)
    assert facts(replies, "partition") == everyone
    for reply, known in zip(replies, expected, strict=True):
        np.testing.assert_array_equal(reply.content["arrays"]["w"].numpy(), known.content["arrays"]["w"].numpy())
    (event,) = grid.pop_events()
    assert event.kind == "worker_died"
    assert 1004 in event.node_ids
    assert str(replies[4].content["facts"]["pid"]) not in event.reason
    again = grid.send_and_receive(messages(grid, everyone))
    assert facts(again, "partition") == everyone


def test_a_client_that_keeps_killing_workers_fails_alone(grid: RayGrid, tmp_path: Path) -> None:
    """Two deaths with max_retries=1, after the batch's first one, which blames nobody."""
    warm_up(grid)
    batch = messages(grid, list(range(NUM_CLIENTS)))
    batch[0:1] = messages(grid, [0], "die", folder=str(tmp_path))
    deadly, *others = grid.send_and_receive(batch)
    assert deadly.error.code == 8
    assert deadly.error.reason is not None
    assert "2 workers died while they ran this client: grid.max_retries=1" in deadly.error.reason
    assert facts(others, "partition") == list(range(1, NUM_CLIENTS))
    events = grid.pop_events()
    assert len(events) == len((tmp_path / "died-0").read_text()) in (2, 3)
    assert all(1000 in event.node_ids for event in events)


def test_a_process_that_cannot_go_on_is_replaced(grid: RayGrid) -> None:
    """Its client fails at once and by its own words; nobody else does, and nobody runs in that process again."""
    warm_up(grid)
    pids = {slot.pid for slot in grid._slots}
    batch = messages(grid, list(range(NUM_CLIENTS)))
    batch[0:1] = messages(grid, [0], "break")
    broken, *others = grid.send_and_receive(batch)
    assert (broken.error.code, broken.error.reason) == (2, "BrokenProcessError: no recording")
    assert facts(others, "partition") == list(range(1, NUM_CLIENTS))
    events = grid.pop_events()
    assert len(events) in (1, 2)  # in a batch, and alone
    assert all("was ended: BrokenProcessError: no recording" in event.reason for event in events)
    ended = {int(event.reason.split()[2]) for event in events}
    assert ended & pids
    wait_for_workers(grid)
    after = grid.send_and_receive(messages(grid, list(range(NUM_CLIENTS))))
    assert not ended & set(facts(after, "pid"))


def pull_all(grid: RayGrid, ids: list[str]) -> list[Message]:
    """All replies, as they come."""
    replies: list[Message] = []
    deadline = time.monotonic() + 60
    while len(replies) < len(ids) and time.monotonic() < deadline:
        replies += grid.pull_messages(ids)
    return replies


def push_many(grid: RayGrid, action: str, **header: float | str) -> tuple[list[str], Any, Any]:
    """Four short messages a client, the first does `action`: their ids, its worker's batch and the next one."""
    warm_up(grid)
    batch = messages(grid, list(range(NUM_CLIENTS)) * 4)
    batch[0:1] = messages(grid, [0], action, **header)
    grid._seconds.update(dict.fromkeys(grid._seconds, 0.01))
    grid._seconds[1000, "train"] = 0.05  # so it starts first
    ids = grid.push_messages(batch)
    running, waiting = next(slot.calls for slot in grid._slots if 1000 in {task.node_id for task in slot.tasks})
    return ids, running, waiting


def test_what_waits_at_a_worker_that_dies_is_not_blamed(grid: RayGrid, tmp_path: Path) -> None:
    """A busy worker has its next batch already; only the one it worked on is named, and all are answered."""
    ids, running, waiting = push_many(grid, "die_once", folder=str(tmp_path))
    nodes = tuple(task.node_id for task in running.tasks)
    assert nodes[0] == 1000
    assert waiting.tasks
    replies = pull_all(grid, ids)
    assert Counter(facts(replies, "partition")) == Counter(list(range(NUM_CLIENTS)) * 4)
    (event,) = grid.pop_events()
    assert (event.kind, event.node_ids) == ("worker_died", nodes)


def test_what_waits_behind_a_hanging_client_is_done_by_others(grid: RayGrid) -> None:
    ids, running, waiting = push_many(grid, "sleep", seconds=5.0)
    behind = [task.message_id for task in waiting.tasks]
    started = time.monotonic()
    replies = []
    while len(replies) < len(ids) - len(running.tasks) and time.monotonic() - started < 4:
        replies += grid.pull_messages(ids)
    answered = {reply.metadata.reply_to_message_id for reply in replies}
    assert answered == set(ids) - {task.message_id for task in running.tasks}
    assert answered.issuperset(behind)
    rest = pull_all(grid, [message_id for message_id in ids if message_id not in answered])
    assert len(rest) == len(running.tasks)
    assert grid.pop_events() == []


def test_nobody_waits_for_what_waits_either(grid: RayGrid) -> None:
    """All of a hanging worker's messages are dropped; the next round is whole."""
    ids, _, waiting = push_many(grid, "sleep", seconds=60.0)
    assert waiting.tasks
    grid.forget(ids)
    assert [event.kind for event in grid.pop_events()][:1] == ["worker_stopped"]
    everyone = list(range(NUM_CLIENTS))
    assert facts(grid.send_and_receive(messages(grid, everyone)), "partition") == everyone


def test_a_worker_takes_most_of_its_part_at_once(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fifths, so that few batches are sent and all workers end together; little is not sent ahead."""
    warm_up(grid)
    give, batches = grid._give, []
    monkeypatch.setattr(grid, "_give", lambda slot, tasks: batches.append(len(tasks)) or give(slot, tasks))
    grid._seconds.update(dict.fromkeys(grid._seconds, 0.002))
    ids = grid.push_messages(messages(grid, list(range(NUM_CLIENTS)) * 4))
    assert batches == [19, 19]  # of 24
    assert len(pull_all(grid, ids)) == sum(batches) == 48


def test_long_messages_do_not_wait_at_a_busy_worker(grid: RayGrid) -> None:
    """Whoever is free first takes the next one."""
    warm_up(grid)
    grid._seconds.update(dict.fromkeys(grid._seconds, 2 * SETTINGS.batch_seconds))
    ids = grid.push_messages(messages(grid, list(range(NUM_CLIENTS)) * 2))
    assert [len(slot.calls) for slot in grid._slots] == [1] * len(grid._slots)
    assert len(pull_all(grid, ids)) == len(ids)


def test_late_clients_are_missing_and_free_their_worker(grid: RayGrid) -> None:
    warm_up(grid)
    batch = [*messages(grid, [0, 1], "sleep", seconds=60.0), *messages(grid, [2])]
    grid._seconds[1000, "train"] = grid._seconds[1001, "train"] = 60.0  # known to be long: both start first
    started = time.monotonic()
    assert grid.send_and_receive(batch, timeout=1) == []
    assert time.monotonic() - started < 5
    events = grid.pop_events()
    assert [event.kind for event in events] == ["worker_stopped"] * 2
    assert {node for event in events for node in event.node_ids} == {1000, 1001}
    assert facts(grid.send_and_receive(messages(grid, [0, 1])), "partition") == [0, 1]
    assert grid.pull_messages([message.metadata.message_id for message in batch]) == []


def test_the_longest_known_client_starts_first(grid: RayGrid) -> None:
    wait_for_workers(grid)
    batch = messages(grid, [0, 1, 2], "sleep", seconds=0.05) + messages(grid, [3], "sleep", seconds=0.4)
    grid.send_and_receive(batch)
    started = [float(str(seconds)) for seconds in facts(grid.send_and_receive(batch), "started")]
    assert started[3] in sorted(started)[:2]  # with the first on the other worker


def test_of_clients_not_seen_yet_those_of_the_longest_family_start_first(grid: RayGrid) -> None:
    """One of each has answered; the others are expected to take as long as those of their family."""
    with SETTINGS.open(grid_apps.Behaviour, num_clients=NUM_CLIENTS, threads=1, device="cpu") as mixed:
        wait_for_workers(mixed)
        introduce(
            mixed,
            [
                Member(node_id=node, partition_id=p, family=("short", "long")[p % 2], num_images=9, trains=True)
                for p, node in enumerate(mixed.get_node_ids())
            ],
        )
        mixed.send_and_receive(messages(mixed, [0]) + messages(mixed, [1], "sleep", seconds=0.4))
        unseen = messages(mixed, [2, 4, 6, 8, 10], "sleep", seconds=0.05)
        batch = [*unseen, *messages(mixed, [11], "sleep", seconds=0.4)]
        started = [float(str(seconds)) for seconds in facts(mixed.send_and_receive(batch), "started")]
    assert started[-1] in sorted(started)[:2]  # with the first on the other worker


def test_large_records_are_broadcast_once_and_arrive_unharmed(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).normal(size=100_000)
    record = ArrayRecord({"w": Array(weights), "b": Array(np.float32([1.0]))})
    put, puts = grid._put, []
    monkeypatch.setattr(grid, "_put", lambda record: puts.append(record) or put(record))
    batch = [
        Message(RecordDict({"header": ConfigRecord({"round": i}), "arrays": record}), node, "train")
        for i, node in enumerate(grid.get_node_ids())
    ]
    replies = grid.send_and_receive(batch)
    assert len(puts) == 1
    for partition, reply in enumerate(replies):
        received = reply.content["arrays"]["w"]
        np.testing.assert_array_equal(received.numpy(), weights + partition)
        assert len(received.data) == len(record["w"].data)
        assert not isinstance(received.data, bytes)  # still in shared memory
    assert not any(slot.keys for slot in grid._slots)
    unused = [set(slot.unused) for slot in grid._slots]
    assert all(unused)
    grid.send_and_receive(messages(grid, list(range(NUM_CLIENTS))))
    for slot, keys in zip(grid._slots, unused, strict=True):
        assert not keys & set(slot.unused)  # its next call freed them


def test_memory_does_not_grow_over_rounds(grid: RayGrid) -> None:
    """40 rounds move 40 x 4 messages of 4 MB each way: 1.3 GB if anything were kept."""
    arrays = ArrayRecord({"w": Array(np.zeros(500_000))})

    def peak(num_rounds: int) -> int:
        worker = 0
        for _ in range(num_rounds):
            arrays["w"] = Array(np.zeros(500_000))  # another broadcast every round
            batch = [
                Message(RecordDict({"header": ConfigRecord({}), "arrays": arrays}), node, "train")
                for node in grid.get_node_ids()[:4]
            ]
            worker = max(int(str(size)) for size in facts(grid.send_and_receive(batch), "private_bytes"))
        return grid_apps.private_bytes() + worker

    before = peak(10)
    assert peak(40) - before < 100e6


# --- uploads that workers add up --------------------------------------------------------------------------------------
BEFORE = to_record({"tiny/w": np.linspace(-1, 1, 90_000, dtype=np.float32), "tiny/b": np.ones(3, np.float32)})
SUMMATION = Summation(
    round_num=1,
    public_fingerprint="f",
    weighted=True,
    clients={partition: ("tiny", 10 + partition) for partition in range(NUM_CLIENTS)},
    devices=instantiate(compose([])["federation"]["devices"]),
)


@pytest.fixture(scope="module")
def uploading() -> Iterator[RayGrid]:
    with SETTINGS.open(grid_apps.Uploads, num_clients=NUM_CLIENTS, threads=1, device="cpu") as grid:
        wait_for_workers(grid)
        gather_uploads(grid)
        yield grid
        assert not any([grid._queue, grid._tasks, grid._replies, grid._broadcast, grid._users])


def to_everybody(grid: LocalGrid) -> list[Message]:
    """Messages; clients are expected to answer in a millisecond, so that they travel together."""
    if isinstance(grid, RayGrid):
        grid._seconds.update({(node_id, "train"): 0.001 for node_id in grid.get_node_ids()})
    content = RecordDict({"arrays": BEFORE, "config": ConfigRecord({"server-round": 1})})
    return [Message(content, node_id, "train") for node_id in grid.get_node_ids()]


def gather_uploads(grid: LocalGrid, **settings: Any) -> Gathered:
    """A round, as the server's loop gathers it."""
    sent = to_everybody(grid)
    return gather(grid, sent, check=Upload.from_message, timeout=None, summation=SUMMATION, **settings)


def uploads_in(replies: Iterable[Message]) -> list[Upload]:
    return sorted(map(Upload.from_message, replies), key=lambda upload: upload.header.partition_id)


def one_by_one(partitions: Iterable[int] = range(NUM_CLIENTS)) -> list[Upload]:
    """Whole uploads, of clients that run one after the other."""
    with InProcessGrid(grid_apps.Uploads(), num_clients=NUM_CLIENTS, threads=1) as grid:
        sent = to_everybody(grid)
        return uploads_in(grid.send_and_receive([sent[partition] for partition in partitions]))


def assert_same_mean(uploads: Sequence[Upload], expected: Sequence[Upload]) -> None:
    mean, other = (mean_of(some, SUMMATION, BEFORE) for some in (uploads, expected))
    for name in ("w", "b"):
        np.testing.assert_array_equal(mean[name].numpy(), other[name].numpy())


def test_workers_add_up_what_short_clients_upload(uploading: RayGrid) -> None:
    """Few replies carry weights; headers, metrics, bytes and the mean are those of clients that answer one by one."""
    with InProcessGrid(grid_apps.Uploads(), num_clients=NUM_CLIENTS, threads=1) as grid:
        plain = gather_uploads(grid)
    there, whole = gather_uploads(uploading), one_by_one()
    uploads, own = uploads_in(there.replies), uploads_in(plain.replies)
    everybody = tuple(range(NUM_CLIENTS))
    assert [upload.summed for upload in own] == [everybody] + [()] * (NUM_CLIENTS - 1)  # as they came
    assert_same_mean(own, whole)
    assert [sorted(upload.summed) for upload in uploads if upload.summed] == [list(everybody)]
    apart = uploads_in(pull_all(uploading, uploading.push_to_add_up(to_everybody(uploading), SUMMATION)))
    assert all(upload.summed is not None for upload in apart)
    assert 1 <= sum(bool(upload.summed) for upload in apart) <= len(uploading._slots)  # of the workers
    assert_same_mean(apart, whole)
    assert [(upload.header, upload.metrics) for upload in uploads] == [(u.header, u.metrics) for u in whole]
    assert (there.uplink_bytes, there.failures) == (plain.uplink_bytes, [])
    assert [num_bytes(reply) for reply in there.replies] == [num_bytes(reply) for reply in plain.replies]
    assert_same_mean(uploads, whole)


def test_who_travels_alone_sends_it_all(uploading: RayGrid) -> None:
    sent = to_everybody(uploading)
    uploading._seconds.update(dict.fromkeys(uploading._seconds, 2 * SETTINGS.batch_seconds))
    uploads = uploads_in(pull_all(uploading, uploading.push_to_add_up(sent, SUMMATION)))
    assert [upload.summed for upload in uploads] == [None] * NUM_CLIENTS
    assert_same_mean(uploads, one_by_one())


def test_no_worker_adds_up_where_a_reply_may_be_refused_later(uploading: RayGrid) -> None:
    """The server does, those in time."""
    there = gather_uploads(uploading, simulate=lambda member, *_: float(member.partition_id), deadline_s=5.0)
    uploads = uploads_in(there.replies)
    assert [upload.header.partition_id for upload in uploads] == [0, 1, 2, 3, 4, 5]
    assert there.count("late") == NUM_CLIENTS - 6
    assert sorted(upload.summed for upload in uploads if upload.summed is not None)[:5] == [()] * 5
    assert_same_mean(uploads, one_by_one(range(6)))


def test_a_sum_with_a_reply_that_nobody_waits_for_is_not_used(uploading: RayGrid) -> None:
    """The others that are in it run again, each alone."""
    ids = uploading.push_to_add_up(to_everybody(uploading), SUMMATION)
    first, *others = uploading._slots[0].tasks
    assert len(others) > 1
    uploading.forget([first.message_id])
    uploads = uploads_in(pull_all(uploading, [message_id for message_id in ids if message_id != first.message_id]))
    dropped = first.node_id - 1000
    assert [upload.header.partition_id for upload in uploads] == [p for p in range(NUM_CLIENTS) if p != dropped]
    whole = {upload.header.partition_id for upload in uploads if upload.summed is None}
    assert whole >= {task.node_id - 1000 for task in others}
    assert_same_mean(uploads, one_by_one(p for p in range(NUM_CLIENTS) if p != dropped))


def test_a_worker_that_dies_takes_its_sum_along(uploading: RayGrid) -> None:
    """What it had added counts once: all its clients run again, those too that had ended, and the event names them."""
    slot = uploading._slots[0]
    sent = [message for _ in range(3) for message in to_everybody(uploading)]
    ids = uploading.push_to_add_up(sent, SUMMATION)
    while not any(added_up.replies for added_up in slot.sums):
        uploading._collect(1.0)
        uploading._dispatch()
    ended = {task.node_id for added_up in slot.sums for task, *_ in added_up.replies}
    os.kill(slot.pid, signal.SIGKILL)
    replies = pull_all(uploading, ids)
    (event,) = uploading.pop_events()
    assert event.kind == "worker_died"
    assert set(event.node_ids) >= ended
    assert Counter(reply.metadata.reply_to_message_id for reply in replies) == Counter(ids)
    sums = [upload for upload in map(Upload.from_message, replies) if upload.summed]
    assert len(replies) == sum(len(upload.summed or ()) for upload in sums) + sum(
        Upload.from_message(reply).summed is None for reply in replies
    )


def test_a_worker_of_which_a_batch_was_taken_adds_up_anew(uploading: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does the batch nevertheless, so its sum would hold twice what another worker is given."""
    monkeypatch.setattr(ray_grid, "OVERDUE", 0)  # whatever waits behind a call is taken by who is idle,
    monkeypatch.setattr(ray_grid, "KEPT", 0)  # where it has a sum of its own
    for _ in range(3):
        assert_same_mean(uploads_in(gather_uploads(uploading).replies), one_by_one())


@pytest.mark.parametrize("same", [True, False])
def test_a_batch_for_a_sum_that_an_overdue_one_goes_into_stays(uploading: RayGrid, same: bool) -> None:
    """Otherwise that sum would be given up, and whoever is overdue would run twice."""
    tasks = [ray_grid._Task(message, {}, ()) for message in to_everybody(uploading)[:2]]
    sums = [ray_grid._OpenSum(1, 1), ray_grid._OpenSum(2, 1)]
    calls = [ray_grid._Call(None, [tasks[0]], sums[0], since=0.0), ray_grid._Call(None, [tasks[1]], sums[not same])]
    given_up: list[Any] = []
    grid: Any = SimpleNamespace(
        _queue=deque(),
        _slots=[ray_grid._Slot(actor=None, calls=deque(calls)), ray_grid._Slot(actor=None, calls=deque())],
        _settings=SETTINGS,
        _drop=lambda slot, one: given_up.append(one),
    )
    RayGrid._take_back(grid)
    assert list(grid._queue) == ([] if same else [tasks[1]])
    assert given_up == ([] if same else [sums[1]])


def test_a_long_round_sends_its_sums_now_and_then(uploading: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_grid, "KEPT", 0)
    sent = [message for _ in range(4) for message in to_everybody(uploading)]
    uploads = uploads_in(pull_all(uploading, uploading.push_to_add_up(sent, SUMMATION)))
    assert all(upload.summed is not None for upload in uploads)
    sums = [upload.summed for upload in uploads if upload.summed]
    assert len(sums) > len(uploading._slots)
    assert sorted(partition for one in sums for partition in one) == sorted(4 * list(range(NUM_CLIENTS)))


def test_what_the_server_keeps_of_a_reply_is_without_weights(uploading: RayGrid) -> None:
    kept: dict[int, Upload] = {}

    def check(reply: Message) -> None:
        upload = Upload.from_message(reply)
        kept[upload.header.partition_id] = upload

    gather(uploading, to_everybody(uploading), check=check, timeout=None, summation=SUMMATION)
    assert [dict(kept[partition].arrays) for partition in range(NUM_CLIENTS)] == [{}] * NUM_CLIENTS


def test_what_is_added_up_apart_ends(uploading: RayGrid) -> None:
    """Also where a worker could add nothing, or nobody waits any more."""
    stranger = replace(SUMMATION, round_num=2)
    uploads = uploads_in(pull_all(uploading, uploading.push_to_add_up(to_everybody(uploading), stranger)))
    assert [upload.summed for upload in uploads] == [None] * NUM_CLIENTS
    ids = uploading.push_to_add_up(to_everybody(uploading), SUMMATION)
    uploading._collect(1.0)
    uploading.forget(ids)
    uploading.pop_events()
    assert_same_mean(uploads_in(gather_uploads(uploading).replies), one_by_one())
    deadline = time.monotonic() + 30
    while any(slot.calls for slot in uploading._slots) and time.monotonic() < deadline:
        uploading.pull_messages([])
    assert not any(slot.sums or slot.sum for slot in uploading._slots)


def test_the_means_of_both_workers_are_one(uploading: RayGrid) -> None:
    for _ in range(3):
        assert_same_mean(uploads_in(gather_uploads(uploading).replies), one_by_one())


def test_gpus_are_shared_as_configured(grid: RayGrid) -> None:
    """Two declared GPUs, two workers on each; every worker sees one GPU."""
    settings = replace(SETTINGS, workers=None, batch_seconds=0.0)
    with settings.open(grid_apps.Behaviour, num_clients=4, threads=1, device="auto") as gpu_grid:
        assert gpu_grid.placement.num_gpus == 0.5
        wait_for_workers(gpu_grid)
        replies = gpu_grid.send_and_receive(messages(gpu_grid, [0, 1, 2, 3], "sleep", seconds=0.5))
        devices = dict(zip(facts(replies, "pid"), facts(replies, "cuda"), strict=True))
        assert Counter(devices.values()) == {"0": 2, "1": 2}
        two = gpu_grid.send_and_receive(messages(gpu_grid, [0, 1], "sleep", seconds=0.5))
        assert set(facts(two, "cuda")) == {"0", "1"}  # and two clients do not share one while the other idles


def sharing(clients_per_gpu: int | str, **changes: Any) -> Ray:
    return replace(SETTINGS, **{"workers": None, "clients_per_gpu": clients_per_gpu, **changes})


def test_auto_places_as_many_as_fit_by_the_largest_peak(grid: RayGrid) -> None:
    """10 GB are free, the larger family takes 3, and so the server: two on each GPU, if they may take so much."""
    for num_clients, share, limit, expected in ((12, 0.9, 8, 2), (12, 0.9, 1, 1), (4, 0.9, 8, 2), (12, 0.5, 8, 1)):
        settings = sharing("auto", max_clients_per_gpu=limit, gpu_memory_share=share)
        opened = settings.open(grid_apps.takes_gpu_memory, num_clients=num_clients, threads=1, device="auto")
        with opened as gpu_grid:
            assert gpu_grid.placement == Placement(workers=2 * expected, num_cpus=0, num_gpus=1 / expected)
            if num_clients == 4:
                wait_for_workers(gpu_grid)
                assert set(Counter(slot.device for slot in gpu_grid._slots).values()) == {2}
                assert gpu_grid.gpu_memory == {
                    "clients_per_gpu": 2,
                    "free_bytes": 10e9,
                    "peak_bytes": {"small": 1e9, "large": 3e9},
                }


@pytest.mark.parametrize(("number", "fits"), [(2, True), (3, False)])
def test_a_number_that_does_not_fit_is_warned_about(
    number: int, fits: bool, grid: RayGrid, caplog: pytest.LogCaptureFixture
) -> None:
    opened = sharing(number).open(grid_apps.takes_gpu_memory, num_clients=12, threads=1, device="auto")
    with opened as gpu_grid:
        assert gpu_grid.placement.workers == 2 * number
    assert bool(caplog.messages) is not fits
    if not fits:
        assert caplog.messages == [
            "grid.clients_per_gpu=3 may not fit: of 10.00 GB free, a worker takes small 1.00 GB, large 3.00 GB, and "
            "grid.gpu_memory_share=0.9 of that holds 2 beside the server. Use grid.clients_per_gpu=2 or auto, or lower "
            "client.batch_size."
        ]


def test_a_number_that_no_gpu_will_see_is_not_warned_about(grid: RayGrid, caplog: pytest.LogCaptureFixture) -> None:
    """Four workers on two GPUs are two on each, which fit."""
    settings = sharing(8, workers=4)
    with settings.open(grid_apps.takes_gpu_memory, num_clients=12, threads=1, device="auto") as gpu_grid:
        assert gpu_grid.placement == Placement(workers=4, num_cpus=0, num_gpus=0.5)
    assert caplog.messages == []


def test_auto_without_a_figure_is_refused(grid: RayGrid) -> None:
    """Our own app, on GPUs that are only declared."""
    config = small(None, "device=auto")
    load_app = partial(load_client_app, config, Path("nowhere"))
    refusal = r"grid\.clients_per_gpu=auto could not measure .*ConfigError: torch sees no GPU in this worker"
    with pytest.raises(ConfigError, match=refusal):
        sharing("auto").open(load_app, num_clients=4, threads=1, device="auto")


def test_auto_means_nothing_where_no_gpu_is_shared(grid: RayGrid) -> None:
    """Neither the app nor its query is asked: this one does not know it."""
    for device, num_clients, num_gpus in (("cpu", 4, 0), ("auto", 2, 1)):
        with sharing("auto").open(grid_apps.Behaviour, num_clients=num_clients, threads=1, device=device) as opened:
            assert opened.placement.num_gpus == num_gpus
            assert opened.gpu_memory is None


def test_a_failing_app_loader_ends_the_run_with_its_own_error(grid: RayGrid) -> None:
    with (
        SETTINGS.open(grid_apps.refuses_to_load, num_clients=2, threads=1, device="cpu") as broken,
        pytest.raises(RuntimeError, match="no such data set"),
    ):
        broken.send_and_receive(messages(broken, [0]))


def test_another_ray_is_refused_while_grids_are_open(grid: RayGrid) -> None:
    other = replace(SETTINGS, workers=1, clients_per_gpu=1, gpus=5)
    with pytest.raises(ConfigError, match=r"already runs a Ray with grid\.address=None, grid\.gpus=2"):
        other.open(grid_apps.Behaviour, num_clients=2, threads=1, device="cpu")


def test_a_closed_grid_is_closed(grid: RayGrid) -> None:
    short = SETTINGS.open(grid_apps.Behaviour, num_clients=1, threads=1, device="cpu")
    assert short in open_grids
    short.close()
    short.close()
    assert short not in open_grids
    with pytest.raises(RuntimeError, match="this grid is closed"):
        short.push_messages(messages(grid, [0]))


INTERRUPTED = """
import sys
from fedssl.federation.grids.ray import Ray
from tests import grid_apps
from tests.federation_helpers import small
from tests.test_grids import messages

settings = Ray(
    workers=2, clients_per_gpu=1, max_clients_per_gpu=8, gpu_memory_share=0.9, gpus=0, address=None, max_retries=1,
    batch_seconds=0.1,
)
with settings.open(grid_apps.Behaviour, num_clients=2, threads=1, device="cpu") as grid:
    print(*[reply.content["facts"]["pid"] for reply in grid.send_and_receive(messages(grid, [0, 1]))], flush=True)
    grid.send_and_receive(messages(grid, [0, 1], "sleep", seconds=600.0))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_nothing_survives_the_driver(how: signal.Signals) -> None:
    """After Ctrl-C, and even after kill -9, no worker is left; Ray printed nothing."""
    driver = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    workers = [int(pid) for pid in driver.stdout.readline().split()]
    assert workers
    time.sleep(0.3)
    driver.send_signal(how)
    stdout, stderr = driver.communicate(timeout=180)
    assert stdout == ""
    if how is signal.SIGINT:
        assert stderr.rstrip().endswith("KeyboardInterrupt")
        assert stderr.startswith("Traceback")
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists()]
