"""Real clients behind the interface of a simulation's grids: a stable node id per partition, whoever answers for it.

Under Flower a node's id is random, and a SuperNode without a key of its own comes back under another one after a
restart. This grid asks every node once who it is (`query.join`), keeps the list of who answers for which partition up
to date while it waits, and refuses nodes that do not fit the run. It wraps any Flower grid: a SuperLink's, which by
itself looks for replies every three seconds, or that of Flower's simulation engine.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedssl.errors import ConfigError, PayloadError, TooFewRepliesError
from fedssl.federation import flower_compat
from fedssl.federation.grids.base import FIRST_NODE_ID, LocalGrid
from fedssl.federation.roster import Introduction, Member, introduce

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between two looks for replies
LOOK_SECONDS = 2.0  # between two looks for nodes that came or left
SAY_SECONDS = 15.0  # between two lines about nodes that are waited for
AT_ONCE = 64  # messages in one request to the SuperLink: larger requests are dropped with a line in its log
NO_LIMIT = 90 * 86_400.0  # seconds that a message lives where a round has no timeout; Flower's own default is 12 hours
TTL_MARGIN = 10.0  # seconds that a message outlives the round's timeout: until then its client may say why it is late


@runtime_checkable
class Host(Protocol):
    """What `DeployedGrid.join` has to know of the run; a `fedssl.federation.setup.Setup` is one."""

    def check_node(self, node: Introduction) -> None:
        """Raise `PayloadError` for a node that does not fit, with what would."""
        ...


@dataclass(kw_only=True)
class _Nodes:
    """Who answers for which partition now."""

    asked: dict[str, int] = field(default_factory=dict)  # Flower's message id -> Flower's node id
    known: set[int] = field(default_factory=set)  # Flower's ids of nodes that were asked
    refused: dict[int, str] = field(default_factory=dict)  # Flower's node id -> why
    of: dict[int, int] = field(default_factory=dict)  # partition -> Flower's node id
    introductions: dict[int, Introduction] = field(default_factory=dict)  # by partition


class DeployedGrid(LocalGrid):
    """The clients of a deployment, as the loop sees them.

    Args:
        grid: Flower's.
        num_clients: partitions, and so nodes, of the run.
        run_id: 32 hex digits; nodes keep their memory under it.
        timeout: seconds of a round (`federation.round_timeout`): a client ends its work for a message that is older.
            None: as long as it takes.
        wait: seconds to wait for the nodes before the first round.
        authenticated: nodes have keys, so one cannot take another's place.
        say: where lines for the person who waits go.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        num_clients: int,
        run_id: str,
        timeout: float | None,
        wait: float,
        authenticated: bool,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        super().__init__(num_clients)
        self.run_id = run_id
        self._grid = grid
        self._ttl = NO_LIMIT if timeout is None else timeout + TTL_MARGIN
        self._wait = wait
        self._authenticated = authenticated
        self._say = say
        self._nodes = _Nodes()
        self._host: Host | None = None
        self._sent: dict[str, Message] = {}  # ours, to the stable ids, by the id that Flower gave
        self._undelivered: dict[str, Message] = {}  # replies that this grid gives itself, by our message id
        self._looked = 0.0
        self._begun = False  # the members are fixed

    # --- who is there ---
    def join(self, host: Host) -> dict[int, Member]:
        """Wait until every partition has a node that fits; they are the run's members from then on.

        Raises:
            ConfigError: the time is up, and some nodes do not fit.
            TooFewRepliesError: the time is up, and some nodes did not come.
        """
        self._host = host
        started = said = time.monotonic()
        partitions = range(len(self._node_ids))
        while missing := [p for p in partitions if p not in self._nodes.of]:
            self._look(every=min(LOOK_SECONDS, 0.5))
            now = time.monotonic()
            if now - started > self._wait:
                self._give_up(missing)
            if now - said > SAY_SECONDS:
                said = now
                self._say(f"waiting for the nodes of partitions {_some(missing)}; {_count(self._nodes.of)} there")
            time.sleep(POLL_SECONDS)
        self._begun = True
        members = [self._member(p) for p in partitions]
        introduce(self, members)
        self._say(f"{_count(members)} there: {', '.join(f'{m.partition_id} ({m.family})' for m in members[:20])}")
        return {member.partition_id: member for member in members}

    def _give_up(self, missing: Sequence[int]) -> None:
        said = "".join(f"\n  node {node}: {reason}" for node, reason in self._nodes.refused.items())
        text = (
            f"after {self._wait:g} s the nodes of partitions {_some(missing)} are not there; the run waits for "
            f"federation.num_clients={len(self._node_ids)} nodes, with partition_id=0 to {len(self._node_ids) - 1}."
        )
        if self._nodes.refused:
            raise ConfigError(f"{text} Refused were:{said}")
        raise TooFewRepliesError(text)

    def _member(self, partition: int) -> Member:
        node = self._nodes.introductions[partition]
        return Member(
            node_id=FIRST_NODE_ID + partition,
            partition_id=partition,
            family=node.family,
            num_images=node.num_images,
            trains=node.trains,
        )

    def _look(self, *, every: float = LOOK_SECONDS) -> None:
        """Ask new nodes who they are; take in what they said."""
        if time.monotonic() - self._looked < every:
            return
        self._looked = time.monotonic()
        present = set(self._grid.get_node_ids())
        new = sorted(present - self._nodes.known)
        question = RecordDict({"config": ConfigRecord()})
        for start in range(0, len(new), AT_ONCE):
            some = new[start : start + AT_ONCE]
            ids = list(self._grid.push_messages([Message(question, node, "query.join") for node in some]))
            for message_id, node in zip(ids, some, strict=False):
                if message_id is not None:  # else it has left again
                    self._nodes.asked[message_id] = node
                    self._nodes.known.add(node)
        self._nodes.asked = {i: node for i, node in self._nodes.asked.items() if node in present}
        self._nodes.refused = {node: why for node, why in self._nodes.refused.items() if node in present}
        self._nodes.known &= present  # one that left is asked again when it comes back
        for partition, node in list(self._nodes.of.items()):
            if node not in present:
                del self._nodes.of[partition]
                log.warning("the node of partition %d has left", partition)
                if not self._begun:  # whoever comes in its place need not be like it
                    del self._nodes.introductions[partition]
        if self._nodes.asked:
            for reply in self._grid.pull_messages(list(self._nodes.asked)):
                self._introduced(self._nodes.asked.pop(reply.metadata.reply_to_message_id), reply)

    def _introduced(self, node: int, reply: Message) -> None:
        assert self._host is not None
        claims = ""
        try:
            if reply.has_error():
                raise PayloadError(f"it could not say who it is: {reply.error.reason}")
            said = Introduction.from_record(reply.content.config_records.get("join", ConfigRecord()))
            if said.partition_id not in range(len(self._node_ids)):
                raise PayloadError(f"it says it is of partition {said.partition_id}, there are {len(self._node_ids)}")
            claims = f" (partition {said.partition_id})"
            self._host.check_node(said)
            self._check_place(node, said)
        except PayloadError as error:
            self._nodes.refused[node] = f"{claims.lstrip()} {error}".lstrip()
            log.warning("node %d%s is refused: %s", node, claims, error)
            told = RecordDict({"config": ConfigRecord({"reason": str(error)})})
            self._grid.push_messages([Message(told, node, "query.refused")])  # so that its owner knows, too
            return
        before = self._nodes.of.get(said.partition_id)
        if before is not None and before != node:
            log.warning(
                "partition %d has a new node, %d instead of %d: it was started again, or two nodes have the same "
                "partition_id",
                said.partition_id,
                node,
                before,
            )
        self._nodes.of[said.partition_id] = node
        self._nodes.introductions.setdefault(said.partition_id, said)

    def _check_place(self, node: int, said: Introduction) -> None:
        holder = self._nodes.of.get(said.partition_id)
        if self._authenticated and holder not in (None, node):
            raise PayloadError(
                f"it says it is of partition {said.partition_id}, which node {holder} with another key is: give each "
                f"node a partition_id of its own"
            )
        earlier = self._nodes.introductions.get(said.partition_id)
        if earlier is not None and (earlier.family, earlier.trains) != (said.family, said.trains):
            raise PayloadError(
                f"partition {said.partition_id} was of family {earlier.family!r} when the run began, now it says "
                f"{said.family!r}"
            )

    # --- messages ---
    def forget(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these replies any more; their clients end by themselves when the message is too old."""
        forgotten = set(message_ids)
        self._sent = {i: m for i, m in self._sent.items() if m.metadata.message_id not in forgotten}
        for message_id in forgotten:
            self._undelivered.pop(message_id, None)

    def close(self) -> None:
        """The nodes stay: they are not ours."""
        self._sent.clear()
        self._undelivered.clear()

    def _push(self, messages: Sequence[Message]) -> None:
        self._look(every=0.0)
        for start in range(0, len(messages), AT_ONCE):
            ours, theirs = [], []
            for message in messages[start : start + AT_ONCE]:
                partition = message.metadata.dst_node_id - FIRST_NODE_ID
                node = self._nodes.of.get(partition)
                if node is None:
                    self._answer(message, flower_compat.NODE_UNAVAILABLE, "its node is not connected")
                    continue
                ours.append(message)
                theirs.append(Message(message.content, node, message.metadata.message_type, ttl=self._ttl))
            ids: list[str | None] = list(self._grid.push_messages(theirs)) if theirs else []
            if len(ids) < len(theirs):
                ids = [None] * len(theirs)
            for message, message_id in zip(ours, ids, strict=True):
                if message_id is None:
                    self._answer(message, flower_compat.NODE_UNAVAILABLE, "the SuperLink did not take the message")
                else:
                    self._sent[message_id] = message

    def _answer(self, message: Message, code: int, reason: str) -> None:
        self._undelivered[message.metadata.message_id] = Message(Error(code, reason), reply_to=message)

    def _pull(self, message_ids: Set[str], deadline: float | None) -> dict[str, Message]:
        replies = {i: self._undelivered.pop(i) for i in list(self._undelivered) if i in message_ids}
        theirs = [i for i, message in self._sent.items() if message.metadata.message_id in message_ids]
        for start in range(0, len(theirs), AT_ONCE):
            for reply in self._grid.pull_messages(theirs[start : start + AT_ONCE]):
                message = self._sent.pop(reply.metadata.reply_to_message_id)
                content = reply.error if reply.has_error() else reply.content
                replies[message.metadata.message_id] = Message(content, reply_to=message)
        if not replies:
            self._look()
            time.sleep(POLL_SECONDS)
        return replies


def _some(partitions: Sequence[int]) -> str:
    shown = ", ".join(map(str, partitions[:10]))
    return f"{shown} and {len(partitions) - 10} more" if len(partitions) > 10 else shown


def _count(nodes: Sequence[Member] | dict[int, int]) -> str:
    return f"{len(nodes)} node{' is' if len(nodes) == 1 else 's are'}"
