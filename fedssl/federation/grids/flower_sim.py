"""Flower's own simulation engine under our apps: what our grids are compared with, in results and in speed.

The engine calls a ServerApp in a thread of its own. Ours hands its grid to the thread that opened it and waits, so that
the loop, the checkpoints and Ctrl-C are those of every grid. What the engine does is Flower's: it asks every registered
node for work ten times a second, keeps `Context.state` in this process, and runs at most `most_workers()` clients at
once. What it lacks is said beside it: a folder of links tells which process runs which message, so that clients nobody
waits for are ended, deaths are named, and the end of a run does not wait for a client that hangs.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from types import TracebackType
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fedssl.errors import BrokenProcessError, ConfigError, FedSSLError
from fedssl.federation import flower_compat
from fedssl.federation.grids.base import App, GridEvent, answer
from fedssl.federation.grids.ray import Ray
from fedssl.federation.grids.ray_runtime import open_grids, start_own_ray
from fedssl.federation.grids.ray_worker import Surroundings

POLL_SECONDS = 0.1  # the engine's own waits are as long
NEVER = 1e9  # seconds to live of a message: `timeout` is what limits a round


def most_workers() -> int:
    """Clients that Flower's engine runs at once on this machine at most: the threads of a default pool."""
    return min(32, (os.cpu_count() or 1) + 4)


@dataclass(frozen=True, kw_only=True)
class FlowerSim:
    """Settings of `FlowerSimGrid`. The numbers live in conf/grid/flower_sim.yaml; each means what it means to `Ray`.

    Args:
        workers: actors; None: as many as fit (cores // threads, or gpus x clients_per_gpu), at most one a client.
        clients_per_gpu: actors that share a GPU.
        gpus: of this machine; None: what Ray finds.
        max_retries: how often a message runs again after its actor died.
    """

    workers: int | None
    clients_per_gpu: int
    gpus: int | None
    max_retries: int

    def __post_init__(self) -> None:
        _ = self._as_ray
        if self.workers is not None and self.workers > most_workers():
            raise ConfigError(
                f"grid.workers={self.workers}, but Flower's engine runs at most {most_workers()} clients at once on "
                f"this machine: lower grid.workers, leave it null, or use grid=ray."
            )

    @property
    def _as_ray(self) -> Ray:
        return Ray(**vars(self), max_clients_per_gpu=1, gpu_memory_share=1.0, address=None, batch_seconds=0.0)

    def open(self, load_app: Callable[[], App], *, num_clients: int, threads: int, device: str) -> "FlowerSimGrid":
        """Start Ray and the engine, and wait until all nodes are registered.

        Args:
            load_app: cloudpickled; called once in every worker, whose `sys.path` and working directory are ours.
            num_clients: nodes, one per partition.
            threads: torch threads of a worker.
            device: "cuda": workers own GPUs, or ConfigError; "cpu": they see none; "auto": GPUs where Ray has any.
        """
        ray = start_own_ray(self.gpus)
        from ray import cloudpickle

        (node,) = (node["Resources"] for node in ray.nodes() if node["Alive"])
        placement = self._as_ray.place([node], num_clients=num_clients, threads=threads, device=device)
        workers = min(placement.workers, most_workers())
        app = _ClientApp(
            key=uuid4().hex,
            load_app=cloudpickle.dumps(load_app),  # type: ignore[no-untyped-call]
            surroundings=Surroundings.of_this_process(see_gpus=placement.num_gpus > 0),
            threads=threads,
            desk=_Desk(tempfile.mkdtemp(prefix="fedssl-flower-")),
        )
        resources = {
            "num_cpus": int(1e4 * node["CPU"] / workers) / 1e4,  # so that exactly `workers` fit
            "num_gpus": placement.num_gpus,
            "max_restarts": -1,  # without, a dead actor answers every later message with an error
            "max_task_retries": self.max_retries,
        }
        return FlowerSimGrid(app, num_clients=num_clients, resources=resources)


@dataclass(frozen=True)
class _Desk:
    """Who runs what: in `folder`, the link `<message id>` names a process; driver and workers look at it."""

    folder: str

    def begin(self, message_id: str, node_id: int) -> bool:
        """In a worker, before a message: False where nobody waits for it. Notes that a worker died under it before."""
        link = Path(self.folder, message_id)
        if link.is_symlink():
            link.rename(link.with_suffix(f".died.{node_id}.{uuid4().hex}"))
        if link.with_suffix(".dropped").exists() or not Path(self.folder).is_dir():
            return False
        link.symlink_to(str(os.getpid()))
        return True

    def end(self, message_id: str) -> None:
        """In a worker, after it."""
        Path(self.folder, message_id).unlink(missing_ok=True)

    def drop(self, message_ids: Iterable[str]) -> list[str]:
        """Never run these messages; those of them that ran in a process, which is dead now."""
        stopped = []
        for message_id in message_ids:
            link = Path(self.folder, message_id)
            link.with_suffix(".dropped").touch()
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int(link.readlink().name), signal.SIGKILL)
                stopped.append(message_id)
        return stopped

    def deaths(self) -> list[tuple[int, str]]:
        """Node and process id of every worker that died under a message since the last call, and was not dropped."""
        found = []
        for link in Path(self.folder).glob("*.died.*"):
            message_id, _, node_id, _ = link.name.split(".")
            if not Path(self.folder, f"{message_id}.dropped").exists():
                found.append((int(node_id), link.readlink().name))
            link.unlink()
        return found


# --- the worker's side -----------------------------------------------------------------------------------------------

_loaded: dict[str, App] = {}  # by `_ClientApp.key`


@dataclass(frozen=True, kw_only=True)
class _ClientApp:
    """What the engine sends to an actor with every message: a reference to an app that is loaded once there."""

    key: str
    load_app: bytes = field(repr=False)
    surroundings: Surroundings
    threads: int
    desk: _Desk

    def __call__(self, message: Message, context: Context) -> Message:
        message_id, node_id = message.metadata.message_id, message.metadata.dst_node_id
        if not self.desk.begin(message_id, node_id):
            return flower_compat.error_reply(message, flower_compat.CLIENT_CRASHED, "nobody waits for it")
        try:
            return self._answer(message, context)
        finally:
            self.desk.end(message_id)

    def _answer(self, message: Message, context: Context) -> Message:
        if self.key not in _loaded:
            import torch
            from ray import cloudpickle

            self.surroundings.enter()
            torch.set_num_threads(self.threads)
            _loaded[self.key] = cloudpickle.loads(self.load_app)()
        before = context.state if len(context.state) else None
        try:
            reply, state = answer(_loaded[self.key], message, context.node_config, before)
        except BrokenProcessError:  # the engine would give this process the next client
            traceback.print_exc()  # into Ray's log of this worker
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
            raise
        context.state = RecordDict() if state is None else state
        return reply


# --- the driver's side -----------------------------------------------------------------------------------------------


class FlowerSimGrid(Grid):
    """Flower's grid over its simulation engine. Close it (or leave its `with` block) to end the engine and its Ray."""

    def __init__(self, app: _ClientApp, *, num_clients: int, resources: dict[str, float]) -> None:
        self._handed: Queue[Grid | None] = Queue()  # None: the engine has ended
        self._finished = threading.Event()
        self._closed = False
        self._error: BaseException | None = None
        self._desk = app.desk
        self._waiting: dict[str, int] = {}  # node by the id of a message that has no reply yet
        self._dropped: set[str] = set()  # messages nobody waits for; the engine answers them all the same
        self._events: list[GridEvent] = []
        self._engine = threading.Thread(
            target=self._simulate, args=(app, num_clients, resources), name="flower simulation", daemon=True
        )
        self._engine.start()
        open_grids.add(self)
        try:
            self._grid = self._handed.get()
            while len(self.get_node_ids()) < num_clients:  # the server app starts before the nodes are there
                self._check()
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise

    def _simulate(self, app: _ClientApp, num_clients: int, resources: dict[str, float]) -> None:
        """In the engine's thread, until `close`."""
        server_app = ServerApp()

        @server_app.main()
        def hand_over(grid: Grid, context: Context) -> None:
            self._handed.put(grid)
            self._finished.wait()

        try:
            flower_compat.send_no_telemetry()
            from flwr.simulation import run_simulation

            with _quiet():
                run_simulation(
                    server_app=server_app,
                    client_app=app,  # type: ignore[arg-type]  # anything callable like one
                    num_supernodes=num_clients,
                    backend_config={"client_resources": resources},  # type: ignore[dict-item]
                )
        except BaseException as error:
            self._error = error
        finally:
            self._handed.put(None)

    def set_run(self, run: Run) -> None:
        """Replace the run that `run` returns; the engine knows only the one it began with."""
        self._grid_of_flower.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._grid_of_flower.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Deprecated in Flower; here for the abstract class: use `Message(...)`."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """All node ids: random, other ones in every run, in no order."""
        return list(self._grid_of_flower.get_node_ids())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages for delivery; returns one id each, under which `pull_messages` hands out the reply."""
        messages = list(messages)
        for message in messages:
            message.metadata.ttl = NEVER
        ids = list(self._grid_of_flower.push_messages(messages))
        if len(ids) < len(messages):  # Flower's only logs why
            raise ValueError(
                f"Flower's engine took {len(ids)} of {len(messages)} messages. Take node ids from grid.get_node_ids()."
            )
        self._waiting.update((i, message.metadata.dst_node_id) for i, message in zip(ids, messages, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there by now, each handed out once; waits a moment where there is none yet."""
        replies = []
        known = [i for i in message_ids if i in self._waiting]  # Flower answers for others with an error
        for reply in self._grid_of_flower.pull_messages([*known, *self._dropped]):
            if (message_id := reply.metadata.reply_to_message_id) in self._dropped:
                self._dropped.discard(message_id)
                continue
            node_id = self._waiting.pop(message_id)
            if reply.has_error() and reply.error.code == flower_compat.UNKNOWN:
                self._events.append(_died(node_id, str(reply.error.reason)))
            replies.append(reply)
        if not replies:
            self._check()
            time.sleep(POLL_SECONDS)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for the replies, at most `timeout` seconds.

        Returns the replies in the order of the messages. One that is late is missing, not an error.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        replies: dict[str, Message] = {}
        while len(replies) < len(ids) and (deadline is None or time.monotonic() < deadline):
            for reply in self.pull_messages([i for i in ids if i not in replies]):
                replies[reply.metadata.reply_to_message_id] = reply
        self.forget([i for i in ids if i not in replies])
        return [replies[i] for i in ids if i in replies]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop these messages, and end the workers that run them: the engine starts others."""
        dropped = {i: node for i in message_ids if (node := self._waiting.pop(i, None)) is not None}
        self._dropped.update(dropped)
        for message_id in self._desk.drop(dropped):
            self._events.append(
                GridEvent(
                    kind="worker_stopped",
                    node_ids=(dropped[message_id],),
                    reason="still running when the time was up",
                )
            )

    def pop_events(self) -> list[GridEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events + [_died(node_id, f"worker process {pid} died") for node_id, pid in self._desk.deaths()]

    def close(self) -> None:
        """End the engine, its actors and its Ray. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        open_grids.discard(self)
        self._finished.set()
        self._desk.drop(self._waiting)  # the engine waits for what runs
        self._engine.join()
        shutil.rmtree(self._desk.folder, ignore_errors=True)

    @property
    def _grid_of_flower(self) -> Grid:
        if self._closed:
            raise RuntimeError("this grid is closed")
        if self._grid is None:
            self._check()
        assert self._grid is not None
        return self._grid

    def _check(self) -> None:
        """Raise where the engine has ended by itself."""
        if not self._engine.is_alive():
            raise FedSSLError(
                f"Flower's simulation engine ended: {self._error or 'it said no reason'}"
            ) from self._error

    def __enter__(self) -> "FlowerSimGrid":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _died(node_id: int, reason: str) -> GridEvent:
    return GridEvent(kind="worker_died", node_ids=(node_id,), reason=reason)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Flower's logger says nothing: what goes wrong with a client is in its reply, and more in `_error`."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
