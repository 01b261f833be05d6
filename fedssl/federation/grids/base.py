"""What the in-process grid and the Ray grid share: nodes, message ids, waiting for replies, calling the app."""

import itertools
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedssl.errors import BrokenProcessError
from fedssl.federation import flower_compat

App = Callable[[Message, Context], Message]  # a Flower ClientApp, or anything callable like one

FIRST_NODE_ID = 1000  # node id = FIRST_NODE_ID + partition id
REASON_LENGTH = 2000  # characters of an error that travel to the server


@dataclass(frozen=True, kw_only=True)
class GridEvent:
    """Something that happened below the messages, for the run's log.

    Args:
        kind: "worker_died" (its clients run again) or "worker_stopped" (nobody waits for its clients any more).
        node_ids: the clients whose work was lost.
        reason: one line.
    """

    kind: str
    node_ids: tuple[int, ...]
    reason: str


class LocalGrid(Grid):
    """A Flower grid whose clients live on this machine, or on a cluster that belongs to this run.

    Node ids are `FIRST_NODE_ID + partition_id`; every node is there from the start. Replies of `send_and_receive`
    come in the order of the messages, so that sums over them do not depend on which client was fastest.
    A message's time-to-live is not looked at: `timeout` is what limits a round.
    """

    def __init__(self, num_clients: int) -> None:
        flower_compat.identify_process()
        self._run = flower_compat.empty_run()
        self._node_ids = range(FIRST_NODE_ID, FIRST_NODE_ID + num_clients)
        self._ids = map(str, itertools.count(1))
        self._states: dict[int, RecordDict] = {}  # Context.state by node, where an app uses it
        self._events: list[GridEvent] = []

    def set_run(self, run: Run) -> None:
        """Replace the run that `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Deprecated in Flower; here for the abstract class: use `Message(...)`."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """All node ids, in the order of their partitions."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages for delivery; returns one id each, under which `pull_messages` hands out the reply."""
        messages = list(messages)
        for message in messages:
            if message.metadata.dst_node_id not in self._node_ids:
                raise ValueError(
                    f"there is no node {message.metadata.dst_node_id}: this grid has the nodes {self._node_ids.start} "
                    f"to {self._node_ids.stop - 1}. Take node ids from grid.get_node_ids()."
                )
        ids = list(itertools.islice(self._ids, len(messages)))
        for message, message_id in zip(messages, ids, strict=True):
            flower_compat.stamp(message, message_id)
        self._push(messages)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there by now, each handed out once; waits a moment where there is none yet.

        Give a set, or a dictionary's keys: other ids are copied in every call, and many clients make many calls.
        """
        ids = message_ids if isinstance(message_ids, Set) else dict.fromkeys(message_ids).keys()
        return list(self._pull(ids, None).values())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for the replies, at most `timeout` seconds.

        Returns the replies in the order of the messages. One that is late is missing, not an error, and is dropped
        when it comes.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        waiting, replies = dict.fromkeys(ids), dict[str, Message]()
        while waiting and (deadline is None or time.monotonic() < deadline):
            for message_id, reply in self._pull(waiting.keys(), deadline).items():
                del waiting[message_id]
                replies[message_id] = reply
        self.forget(list(waiting))
        return [replies[i] for i in ids if i in replies]

    def pop_events(self) -> list[GridEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def _keep_state(self, node_id: int, state: RecordDict | None) -> None:
        if state is None:
            self._states.pop(node_id, None)
        else:
            self._states[node_id] = state

    @abstractmethod
    def forget(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these replies any more: do not start them, stop what can be stopped, drop the rest."""

    @abstractmethod
    def close(self) -> None:
        """End the workers. A second call does nothing."""

    @abstractmethod
    def _push(self, messages: Sequence[Message]) -> None:
        """Take stamped messages."""

    @abstractmethod
    def _pull(self, message_ids: Set[str], deadline: float | None) -> dict[str, Message]:
        """Some replies by the id of their message; none after `deadline` (`time.monotonic`)."""

    def __enter__(self) -> "LocalGrid":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def node_config(node_id: int, num_partitions: int) -> dict[str, int]:
    """What a client finds in `context.node_config`."""
    return {"partition-id": node_id - FIRST_NODE_ID, "num-partitions": num_partitions}


def reason_of(error: BaseException) -> str:
    """What an error reply says of it."""
    return f"{type(error).__name__}: {error}"[:REASON_LENGTH]


def answer(
    app: App, message: Message, node_config: Mapping[str, Any], state: RecordDict | None
) -> tuple[Message, RecordDict | None]:
    """Call a client app; what it raises becomes an error reply with the reason `TypeName: message`.

    Args:
        app: a Flower ClientApp, or anything callable like one.
        message: stamped; the app gets its own dictionaries around the shared arrays.
        node_config: "partition-id" and "num-partitions".
        state: the node's `Context.state`, None for an empty one. It is not changed.

    Returns:
        The reply, and the node's new state (None where it is empty). A client that raises leaves its state as it was.

    Raises:
        BrokenProcessError: as the app raised it; the next client must not run in this process.
    """
    received = flower_compat.rebuild(message.metadata, flower_compat.private_copy(message.content))
    before = RecordDict() if state is None else flower_compat.private_copy(state)
    context = flower_compat.make_context(message.metadata.dst_node_id, node_config, before)
    try:
        reply: Any = app(received, context)
        if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise TypeError(f"a client app must return Message(..., reply_to=message), got {type(reply).__name__}")
    except (KeyboardInterrupt, BrokenProcessError):
        raise
    except BaseException as error:  # sys.exit() in a client must not end the run either
        return flower_compat.error_reply(message, flower_compat.CLIENT_RAISED, reason_of(error)), state
    return reply, context.state if len(context.state) else None
