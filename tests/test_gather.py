"""One batch of messages: replies in partition order, every missing one named, every byte counted."""

from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedssl.config import compose, instantiate
from fedssl.errors import FedSSLError, PayloadError
from fedssl.federation.averaging import Summation
from fedssl.federation.flower_compat import CLIENT_RAISED, error_reply, identify_process
from fedssl.federation.grids.base import GridEvent, LocalGrid
from fedssl.federation.grids.in_process import InProcessGrid
from fedssl.federation.records import Header, Upload, num_bytes
from fedssl.federation.replies import KeptReplies
from fedssl.federation.roster import ask_roster
from fedssl.federation.rounds import Failure, Rounds, gather
from fedssl.federation.store import ClientStore


class Scripted(LocalGrid):
    """Answers in a given order; who is not in it never answers. Node ids have nothing to do with partitions."""

    def __init__(self, order: Sequence[int], errors: Sequence[int] = (), one_by_one: bool = True) -> None:
        super().__init__(6)
        self.order, self.errors, self.one_by_one = list(order), errors, one_by_one
        self.waiting: dict[str, Message] = {}
        self.forgotten: list[str] = []
        self.questions = 0

    def partition(self, message: Message) -> int:
        return 5 - list(self.get_node_ids()).index(message.metadata.dst_node_id)

    def answer(self, message: Message) -> Message:
        partition = self.partition(message)
        if message.metadata.message_type == "query.info":
            self.questions += 1
            info = {"partition_id": partition, "family": "tiny", "num_images": 3, "trains": partition != 0}
            return Message(RecordDict({"info": ConfigRecord(info)}), reply_to=message)
        if partition in self.errors:
            return error_reply(message, CLIENT_RAISED, f"ValueError: {partition} is unlucky")
        return Message(upload(partition).to_content(), reply_to=message)

    def forget(self, message_ids: Iterable[str]) -> None:
        self.forgotten += list(message_ids)

    def close(self) -> None: ...

    def _push(self, messages: Sequence[Message]) -> None:
        self.waiting |= {message.metadata.message_id: message for message in messages}

    def _pull(self, message_ids: Set[str], deadline: float | None) -> dict[str, Message]:
        ready: dict[str, Message] = {}
        by_partition = {self.partition(self.waiting[i]): i for i in message_ids}
        questions = self.waiting[next(iter(message_ids))].metadata.message_type == "query.info"
        for partition in list(by_partition) if questions else list(self.order):
            if partition not in by_partition:
                continue
            message_id = by_partition[partition]
            ready[message_id] = self.answer(self.waiting[message_id])
            if not questions:
                self.order.remove(partition)
                if self.one_by_one:
                    break
        return ready


def upload(partition: int, family: str = "tiny") -> Upload:
    header = Header(round_num=1, partition_id=partition, family=family, codec="none", public_fingerprint="f")
    return Upload(header=header, arrays={"w": np.zeros(partition + 1)}, metrics={"loss": float(partition)})


def messages(grid: Scripted, partitions: Sequence[int]) -> list[Message]:
    """With contents of different sizes."""
    nodes = {member.partition_id: member.node_id for member in ask_roster(grid).values()}
    return [
        Message(RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(10 * (p + 1)))})}), nodes[p], "train")
        for p in partitions
    ]


class AddsUp(Scripted):
    """A grid that can add up where clients run, and notes what it was asked."""

    asked: Summation | None = None

    def push_to_add_up(self, messages: Iterable[Message], summation: Summation) -> list[str]:
        self.asked = summation
        return self.push_messages(messages)


@pytest.mark.parametrize(
    ("after", "deadline_s", "timeout", "asked"),
    [
        (None, None, None, True),
        (30.0, None, None, True),
        (0.0, None, None, True),
        (None, 5.0, None, False),
        (None, None, 5.0, False),
    ],
)
def test_a_grid_may_add_up_only_what_nobody_wants_single(
    after: float | None, deadline_s: float | None, timeout: float | None, asked: bool, tmp_path: Path
) -> None:
    summation = Summation(
        round_num=1,
        public_fingerprint="f",
        weighted=True,
        clients={1: ("tiny", 3)},
        devices=instantiate(compose([])["federation"]["devices"]),
    )
    kept = KeptReplies(tmp_path, config={}, after=after, store=ClientStore(tmp_path / "clients"))
    for given, expected in ((summation, asked), (None, False)):
        grid = AddsUp([1, 2])
        gather(
            grid,
            messages(grid, [1, 2]),
            check=Upload.from_message,
            timeout=timeout,
            simulate=lambda member, sent, reply: 1.0,
            deadline_s=deadline_s,
            kept=kept,
            summation=given,
        )
        assert (grid.asked is not None) == expected
        if grid.asked is not None:
            assert grid.asked.whole_after == after


def partitions_of(replies: Iterable[Message]) -> list[int]:
    return [Upload.from_message(reply).header.partition_id for reply in replies]


@pytest.mark.parametrize("order", [[1, 2, 3, 5], [5, 3, 2, 1], [3, 5, 1, 2]])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_replies_are_in_partition_order_whoever_was_first(order: list[int], one_by_one: bool) -> None:
    grid = Scripted(order, one_by_one=one_by_one)
    seen: list[int] = []
    sent = messages(grid, [5, 2, 1, 3])
    gathered = gather(
        grid, sent, check=Upload.from_message, timeout=None, on_reply=lambda partition, _: seen.append(partition)
    )
    assert partitions_of(gathered.replies) == [1, 2, 3, 5]
    assert seen == order
    assert gathered.failures == []


def test_failed_late_and_refused_are_named_and_nobody_else() -> None:
    def check(reply: Message) -> None:
        if Upload.from_message(reply).header.partition_id == 3:
            raise PayloadError("its factors are NaN")

    grid = Scripted([4, 3, 1, 2], errors=[2])
    gathered = gather(grid, messages(grid, [5, 4, 3, 2, 1]), check=check, timeout=0.2)
    assert partitions_of(gathered.replies) == [1, 4]
    assert gathered.failures == [
        Failure(partition=2, kind="failed", reason="ValueError: 2 is unlucky"),
        Failure(partition=3, kind="refused", reason="its factors are NaN"),
        Failure(partition=5, kind="late", reason="no reply within 0.2 s (federation.round_timeout)"),
    ]
    assert [gathered.count(kind) for kind in ("failed", "refused", "late")] == [1, 1, 1]
    assert len(grid.forgotten) == 1  # the late one is not waited for any more


def test_a_reply_in_somebody_elses_name_is_refused() -> None:
    """Otherwise a client could be counted twice and another not at all."""

    class Impostor(Scripted):
        def answer(self, message: Message) -> Message:
            if message.metadata.message_type == "query.info" or self.partition(message) != 4:
                return super().answer(message)
            return Message(upload(2).to_content(), reply_to=message)

    grid = Impostor([2, 4])
    gathered = gather(grid, messages(grid, [2, 4]), check=Upload.from_message, timeout=None)
    assert partitions_of(gathered.replies) == [2]
    assert gathered.failures == [Failure(partition=4, kind="refused", reason="it says it is of partition 2")]


def test_a_reply_of_another_family_is_refused() -> None:
    """Otherwise its weights would be averaged, or its numbers shown, where they do not belong."""

    class Impostor(Scripted):
        def answer(self, message: Message) -> Message:
            if message.metadata.message_type == "query.info" or self.partition(message) != 4:
                return super().answer(message)
            return Message(upload(4, "resnet18").to_content(), reply_to=message)

    grid = Impostor([2, 4])
    gathered = gather(grid, messages(grid, [2, 4]), check=lambda reply: None, timeout=None)
    assert partitions_of(gathered.replies) == [2]
    reason = "it says it is of family 'resnet18', this client's is 'tiny'"
    assert gathered.failures == [Failure(partition=4, kind="refused", reason=reason)]


def test_dead_workers_are_named_by_the_clients_that_ran_again() -> None:
    grid = Scripted([1, 2])
    sent = messages(grid, [1, 2])
    nodes = {member.partition_id: member.node_id for member in ask_roster(grid).values()}
    grid._events.append(GridEvent(kind="worker_died", node_ids=(nodes[2], nodes[1]), reason="killed by signal 9"))
    gathered = gather(grid, sent, check=Upload.from_message, timeout=None)
    assert partitions_of(gathered.replies) == [1, 2]
    assert gathered.failures == [
        Failure(partition=partition, kind="worker_died", reason="killed by signal 9") for partition in (1, 2)
    ]


def test_bytes_of_all_messages_and_of_all_replies_that_came() -> None:
    """Refused uploads were sent all the same; an error and a late one were not."""

    def refuse(reply: Message) -> None:
        raise PayloadError("no")

    grid = Scripted([1, 2, 3], errors=[2])
    sent = messages(grid, [1, 2, 3, 4])
    gathered = gather(grid, sent, check=refuse, timeout=0.1)
    assert gathered.downlink_bytes == sum(len("arrays") + len("w") + 128 + 80 * (p + 1) for p in (1, 2, 3, 4))
    replies = [Message(upload(p).to_content(), 1, "train") for p in (1, 3)]
    assert gathered.uplink_bytes == sum(map(num_bytes, replies))
    assert gathered.uplink_bytes > 0


def test_no_messages_need_no_roster() -> None:
    grid = Scripted([])
    assert gather(grid, [], check=Upload.from_message, timeout=None).replies == []
    assert grid.questions == 0


# --- who is there ---
def test_everybody_is_asked_once() -> None:
    grid = Scripted([])
    roster = ask_roster(grid)
    assert list(roster) == [0, 1, 2, 3, 4, 5]
    assert [member.node_id for member in roster.values()] == sorted(grid.get_node_ids(), reverse=True)
    assert [member.trains for member in roster.values()] == [False] + [True] * 5
    assert ask_roster(grid) is roster
    assert grid.questions == 6
    assert ask_roster(Scripted([])) is not roster


def _app(answer: Any) -> InProcessGrid:
    def app(message: Message, context: Context) -> Message:
        info = answer(int(context.node_config["partition-id"]))
        return Message(RecordDict({"info": ConfigRecord(info)}), reply_to=message)

    return InProcessGrid(app, num_clients=3, threads=1)


def test_two_nodes_of_one_partition_are_refused() -> None:
    grid = _app(lambda partition: {"partition_id": 1, "family": "tiny", "num_images": 1, "trains": True})
    with pytest.raises(FedSSLError, match="two nodes claim the same partition"):
        ask_roster(grid)


def test_a_node_that_cannot_say_who_it_is_ends_the_run() -> None:
    def answer(partition: int) -> Any:
        raise OSError("no such data set")

    with pytest.raises(FedSSLError, match="a node could not say who it is: OSError: no such data set"):
        ask_roster(_app(answer))


# --- what the loop makes of it ---
def test_a_reply_that_is_no_upload_does_not_stop_the_display() -> None:
    """It is shown before it is checked."""
    shown: list[Any] = []
    loop = object.__new__(Rounds)
    loop.progress = SimpleNamespace(client_finished=lambda *args: shown.append(args))  # type: ignore[assignment]
    loop.setup = SimpleNamespace(family=lambda partition: "tiny")  # type: ignore[assignment]
    identify_process()
    for records in ({}, {"metrics": ConfigRecord()}, {"metrics": MetricRecord({"loss": [1.0]})}):
        loop._show_reply(1, Message(RecordDict(records), 1, "train"))
    assert shown == [(1, "tiny", None)] * 3


@pytest.mark.parametrize(
    ("kind", "warning"),
    [
        ("worker_died", "worker died under partition 2 in round 3: killed by signal 9; the task ran again\n"),
        ("worker_stopped", "worker stopped under partition 2 in round 3: killed by signal 9\n"),
        ("late", "client late in round 3, partition 2: killed by signal 9\n"),
    ],
)
def test_warnings_are_sentences(kind: str, warning: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = object.__new__(Rounds)
    loop.replay_hint = "again {round} {partition}"
    with caplog.at_level("WARNING", logger="fedssl"):
        loop._name_failures(3, [Failure(partition=2, kind=kind, reason="killed by signal 9")])
    assert caplog.messages == [f"{warning}Replay it in this process: again 3 2"]
