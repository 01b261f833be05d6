"""`DeployedGrid` over a Flower grid whose nodes come, leave and lie; no process, no network."""

from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedssl.errors import ConfigError, PayloadError, TooFewRepliesError
from fedssl.federation import flower_compat
from fedssl.federation.grids import deployed
from fedssl.federation.grids.base import FIRST_NODE_ID
from fedssl.federation.grids.deployed import DeployedGrid
from fedssl.federation.roster import Introduction, ask_roster

Node = Callable[[Message], Message | None]  # None: it does not answer


def introduction(partition: int, **other: Any) -> Introduction:
    usual = {"family": "conv4_16", "num_images": 40, "trains": True, "public_fingerprint": "f" * 64}
    return Introduction(partition_id=partition, rehearsal=True, version=version("fedssl"), **{**usual, **other})


def node(partition: int, **other: Any) -> Node:
    """Says who it is, and answers everything else with its partition."""

    def answer(message: Message) -> Message:
        if message.metadata.message_type == "query.join":
            return Message(RecordDict({"join": introduction(partition, **other).to_record()}), reply_to=message)
        return Message(RecordDict({"said": ConfigRecord({"partition": partition})}), reply_to=message)

    return answer


class FlowerGrid(Grid):
    """Flower's side: nodes under ids that say nothing; ids of messages are its own."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        flower_compat.identify_process()
        self.nodes = nodes
        self.replies: dict[str, Message] = {}
        self.pushed: list[Message] = []

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return flower_compat.empty_run()

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:  # type: ignore[override]
        ids: list[str | None] = []
        for message in messages:
            self.pushed.append(message)
            if message.metadata.dst_node_id not in self.nodes:
                ids.append(None)
                continue
            ids.append(f"flower-{len(self.pushed)}")
            flower_compat.stamp(message, str(ids[-1]))
            if (reply := self.nodes[message.metadata.dst_node_id](message)) is not None:
                self.replies[str(ids[-1])] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


class Picky:
    """A run that wants one family."""

    def check_node(self, said: Introduction) -> None:
        if said.family != "conv4_16":
            raise PayloadError(f"no {said.family} here")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(deployed, "LOOK_SECONDS", 0.0)


def open_grid(flower: FlowerGrid, *, wait: float = 1.0, authenticated: bool = False, clients: int = 2) -> DeployedGrid:
    return DeployedGrid(
        flower, num_clients=clients, run_id="a" * 32, timeout=5, wait=wait, authenticated=authenticated, say=str
    )


def ask(grid: DeployedGrid, *partitions: int, timeout: float | None = 1.0) -> list[Message]:
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    messages = [Message(content, FIRST_NODE_ID + p, "train") for p in partitions]
    return list(grid.send_and_receive(messages, timeout=timeout))


def test_partitions_keep_their_ids_whatever_flower_calls_their_nodes() -> None:
    flower = FlowerGrid({2**63 + 5: node(1), 7: node(0)})
    grid = open_grid(flower)
    members = grid.join(Picky())
    assert [(m.node_id, m.partition_id) for m in members.values()] == [(FIRST_NODE_ID, 0), (FIRST_NODE_ID + 1, 1)]
    assert ask_roster(grid) == members  # and nobody is asked again
    replies = ask(grid, 1, 0)
    assert [r.content.config_records["said"]["partition"] for r in replies] == [1, 0]
    assert [r.metadata.src_node_id for r in replies] == [FIRST_NODE_ID + 1, FIRST_NODE_ID]
    assert sum(m.metadata.message_type == "query.join" for m in flower.pushed) == 2
    assert all(m.metadata.ttl == 15 for m in flower.pushed if m.metadata.message_type == "train")


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(TooFewRepliesError, match=r"partitions 1 are not there; the run waits for .*num_clients=2"):
        open_grid(FlowerGrid({7: node(0)}), wait=0.05).join(Picky())


def deaf(message: Message) -> Message:
    return Message(Error(2, "no such folder"), reply_to=message)


def nonsense(message: Message) -> Message:
    return Message(RecordDict({"join": ConfigRecord({"partition_id": "first"})}), reply_to=message)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (node(1, family="vit_tiny"), "no vit_tiny here"),
        (node(2), "it says it is of partition 2, there are 2"),
        (node(-1), "it says it is of partition -1"),
        (deaf, "it could not say who it is: no such folder"),
        (nonsense, "it says that it has None images"),
    ],
)
def test_a_node_that_does_not_fit_is_refused_with_the_reason(other: Node, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        open_grid(FlowerGrid({7: node(0), 8: other}), wait=0.05).join(Picky())


def test_a_node_that_is_started_again_takes_its_place_back() -> None:
    flower = FlowerGrid({7: node(0), 8: node(1)})
    grid = open_grid(flower)
    grid.join(Picky())
    flower.nodes[8] = lambda message: None  # dead, but Flower still believes that it is there
    assert len(ask(grid, 0, 1, timeout=0.05)) == 1
    flower.nodes[9] = node(1)
    assert [r.content.config_records["said"]["partition"] for r in ask(grid, 0, 1)] == [0, 1]


def test_a_node_that_left_fails_at_once() -> None:
    flower = FlowerGrid({7: node(0), 8: node(1)})
    grid = open_grid(flower)
    grid.join(Picky())
    del flower.nodes[8]
    first, second = ask(grid, 0, 1)
    assert not first.has_error()
    assert second.error.reason == "its node is not connected"
    flower.nodes[8] = node(1)
    assert not any(reply.has_error() for reply in ask(grid, 0, 1))


def test_before_the_run_begins_another_family_can_take_the_place_of_one_that_left() -> None:
    flower = FlowerGrid({8: node(1)})
    grid = open_grid(flower, wait=0.05)
    with pytest.raises(TooFewRepliesError):
        grid.join(Picky())
    flower.nodes = {7: node(0), 9: node(1, trains=False)}
    assert [member.trains for member in grid.join(Picky()).values()] == [True, False]


def test_one_that_comes_back_as_another_family_is_refused() -> None:
    flower = FlowerGrid({7: node(0), 8: node(1)})
    grid = open_grid(flower)
    grid.join(Picky())
    del flower.nodes[8]
    flower.nodes[9] = node(1, trains=False)
    assert [reply.has_error() for reply in ask(grid, 0, 1)] == [False, True]
    assert [reply.has_error() for reply in ask(grid, 0, 1)] == [False, True]


def test_with_keys_nobody_takes_anothers_place() -> None:
    flower = FlowerGrid({7: node(0), 8: node(1)})
    grid = open_grid(flower, authenticated=True)
    grid.join(Picky())
    flower.nodes[9] = lambda message: Message(
        RecordDict({"join": introduction(1).to_record(), "said": ConfigRecord({"partition": 666})}), reply_to=message
    )
    for _ in range(3):
        assert [r.content.config_records["said"]["partition"] for r in ask(grid, 0, 1)] == [0, 1]


def test_one_that_left_before_its_answer_was_read_is_nobody() -> None:
    """Whoever comes in its place gets in, with keys too."""
    flower = FlowerGrid({7: node(0), 8: lambda message: None})
    grid = open_grid(flower, authenticated=True, wait=0.05)
    with pytest.raises(TooFewRepliesError):
        grid.join(Picky())
    late = next(m for m in flower.pushed if m.metadata.dst_node_id == 8)
    flower.replies[late.metadata.message_id] = node(1)(late)  # type: ignore[assignment]
    del flower.nodes[8]
    flower.nodes[9] = node(1)
    assert set(grid.join(Picky())) == {0, 1}
    assert not any(reply.has_error() for reply in ask(grid, 0, 1))


def test_a_refused_node_is_told_and_forgotten_when_it_leaves() -> None:
    told: list[str] = []

    def unfit(message: Message) -> Message:
        if message.metadata.message_type == "query.refused":
            told.append(str(message.content.config_records["config"]["reason"]))
        return node(1, family="vit_tiny")(message)

    flower = FlowerGrid({7: node(0), 8: unfit})
    grid = open_grid(flower, wait=0.05)
    with pytest.raises(ConfigError, match="no vit_tiny here"):
        grid.join(Picky())
    assert told == ["no vit_tiny here"]
    del flower.nodes[8]
    with pytest.raises(TooFewRepliesError):
        grid.join(Picky())


def test_a_late_reply_is_forgotten() -> None:
    late: list[Message] = []

    def slow(message: Message) -> Message | None:
        if message.metadata.message_type == "query.join":
            return node(1)(message)
        late.append(message)
        return None

    flower = FlowerGrid({7: node(0), 8: slow})
    grid = open_grid(flower)
    grid.join(Picky())
    assert len(ask(grid, 0, 1, timeout=0.05)) == 1
    flower.replies[late[0].metadata.message_id] = Message(RecordDict(), reply_to=late[0])
    assert len(ask(grid, 0, 1, timeout=0.05)) == 1


def test_flowers_error_becomes_the_clients_failure() -> None:
    def broken(message: Message) -> Message:
        if message.metadata.message_type == "query.join":
            return node(1)(message)
        return Message(Error(5, "gone"), reply_to=message)

    grid = open_grid(FlowerGrid({7: node(0), 8: broken}))
    grid.join(Picky())
    reply = ask(grid, 0, 1)[1]
    assert (reply.error.code, reply.error.reason, reply.metadata.src_node_id) == (5, "gone", FIRST_NODE_ID + 1)


def test_the_number_of_images_travels_in_eight_bytes() -> None:
    few, many = (introduction(0, num_images=n).to_record() for n in (2, 10**9))
    assert len(few.deflate()) == len(many.deflate())
    assert Introduction.from_record(many).num_images == 10**9
