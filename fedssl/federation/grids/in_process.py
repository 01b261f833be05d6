"""The grid for debugging, tests and one GPU: clients run in this process, one after the other."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from flwr.app import Message

from fedssl.federation.grids.base import App, LocalGrid, answer, node_config

SLICE_SECONDS = 0.05  # one pull runs clients for about this long: progress shows, and pulls stay few


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """Settings of `InProcessGrid`: there are none."""

    def open(self, load_app: Callable[[], App], *, num_clients: int, threads: int, device: str) -> "InProcessGrid":
        """Load the app and return the grid.

        Args:
            load_app: called once, here.
            num_clients: nodes, one per partition.
            threads: torch threads while a client runs.
            device: not used here: the app itself chooses where its tensors live.
        """
        return InProcessGrid(load_app(), num_clients=num_clients, threads=threads)


class InProcessGrid(LocalGrid):
    """Calls the app when replies are pulled, in the order of the ids. A client cannot be interrupted by a timeout."""

    def __init__(self, app: App, *, num_clients: int, threads: int) -> None:
        super().__init__(num_clients)
        self._app = app
        self._threads = threads
        self._waiting: dict[str, Message] = {}

    def forget(self, message_ids: Iterable[str]) -> None:
        """Never run these messages."""
        for message_id in message_ids:
            self._waiting.pop(message_id, None)

    def close(self) -> None:
        """Drop what waits. There are no workers to end."""
        self._waiting.clear()

    def _push(self, messages: Sequence[Message]) -> None:
        self._waiting.update((message.metadata.message_id, message) for message in messages)

    def _pull(self, message_ids: Set[str], deadline: float | None) -> dict[str, Message]:
        replies = {}
        stop = time.monotonic() + SLICE_SECONDS
        with torch_threads(self._threads):
            for message_id in message_ids:
                if (message := self._waiting.pop(message_id, None)) is None:
                    continue
                reply = self._run_client(message)
                now = time.monotonic()
                if deadline is not None and now > deadline:
                    break  # late, like a slow client on any other grid
                replies[message_id] = reply
                if now > stop:
                    break
        return replies

    def _run_client(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        reply, state = answer(self._app, message, node_config(node_id, len(self._node_ids)), self._states.get(node_id))
        self._keep_state(node_id, state)
        return reply


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Inside, torch computes with `threads` threads; outside, with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
