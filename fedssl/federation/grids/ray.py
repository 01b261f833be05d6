"""The grid for many clients on one box with many cores or GPUs, and for a Ray cluster.

Long-lived actors keep the loaded app (and with it data and models) over all rounds. What a round costs beyond the
clients' arithmetic is kept small: large records are put into shared memory once a push and read once an actor; short
clients travel in batches; the client that is expected to take longest starts first; replies come back without a copy
of large arrays. Where only the sum of uploads is wanted (`push_to_add_up`), a worker adds up what its short clients
upload and sends one sum every few batches: each result beyond Ray's 100 KB costs a worker some 5 ms.

A client task is a pure function of message and state, so work that died with its actor simply runs again. A batch that
died runs again one message at a time, which finds the client that is to blame without failing its neighbours. A worker
whose client leaves it unable to compute (`BrokenProcessError`) is ended, and the client fails as one that raises.

Everything happens in the caller's thread, while it pulls: there is no background thread to race with.
"""

import logging
import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedssl.errors import BrokenProcessError, ConfigError, FedSSLError
from fedssl.federation import flower_compat
from fedssl.federation.grids.base import FIRST_NODE_ID, App, GridEvent, LocalGrid, reason_of
from fedssl.federation.grids.ray_runtime import open_grids, start_ray
from fedssl.federation.grids.ray_worker import Job, Result, Surroundings, Worker
from fedssl.federation.roster import known_members

if TYPE_CHECKING:
    from fedssl.federation.averaging import Summation  # and so torch, which Flower's workers import once they see GPUs

log = logging.getLogger(__name__)

AUTO = "auto"
SHARES = 10_000  # of a GPU that Ray counts
BROADCAST_BYTES = 1 << 16  # records from this size on go through the object store once, not with every message
START_SECONDS = 60.0  # a cluster that has started no worker by then is named
POLL_SECONDS = 0.2  # one pull waits for about this long
SHARE = 0.8  # of its part of all work left, that a worker takes at once: so all end together, after few batches
SHORT_SECONDS = 0.01  # it takes at least this much: a batch costs both sides some ms, whatever is in it
SAMPLES = 8  # messages of a long queue that tell how much work is in it
OVERDUE = 3  # times batch_seconds
KEPT = 4  # times batch_seconds: so long a worker adds up before it sends its sum, because that costs some ms as well


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many actors, and what each claims of Ray's resources."""

    workers: int
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Settings of `RayGrid`. The numbers live in conf/grid/ray.yaml.

    Args:
        workers: actors, at most one a client; None: as many as fit (cores // threads, or gpus x clients_per_gpu), and
            a few without a client where a GPU would idle without them (`place`).
        clients_per_gpu: the most actors that share a GPU; "auto": as many as fit by what one is measured to take
            (`fitting`). A number above 1 that does not fit by that measure is warned about.
        max_clients_per_gpu: the most that "auto" chooses.
        gpu_memory_share: of a GPU's free memory, that its actors may take together.
        gpus: of this machine; None: what Ray finds. Does not apply to a cluster.
        address: of a running Ray cluster ("auto" for the one of this machine); None: a fresh Ray on this machine. Where
            the caller has initialised Ray, that one is used, whatever is said here or by `gpus`.
        max_retries: how often a message runs again after its worker died.
        batch_seconds: messages that are expected to take less travel together, up to this much work.
    """

    workers: int | None
    clients_per_gpu: int | str
    max_clients_per_gpu: int
    gpu_memory_share: float
    gpus: int | None
    address: str | None
    max_retries: int
    batch_seconds: float

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"grid.workers must be at least 1 or null (as many as fit), got {self.workers}.")
        number = 1 if self.clients_per_gpu == AUTO else self.clients_per_gpu
        if isinstance(number, str) or not float(number).is_integer() or number < 1:
            raise ConfigError(
                f"grid.clients_per_gpu must be a whole number of at least 1, got {self.clients_per_gpu}: Ray places "
                f"only fractions 1/k of a GPU without leaving a worker pending. With grid=ray it may also be auto."
            )
        if number > SHARES:
            raise ConfigError(
                f"grid.clients_per_gpu must be at most {SHARES}, got {self.clients_per_gpu}: Ray counts a GPU in "
                f"{SHARES} parts, and a worker with less than one of them has none."
            )
        if self.max_clients_per_gpu < 1:
            raise ConfigError(f"grid.max_clients_per_gpu must be at least 1, got {self.max_clients_per_gpu}.")
        if not 0 < self.gpu_memory_share <= 1:
            raise ConfigError(
                f"grid.gpu_memory_share is a share of a GPU's free memory, above 0 and at most 1, got "
                f"{self.gpu_memory_share}."
            )
        if self.gpus is not None and self.gpus < 0:
            raise ConfigError(f"grid.gpus must be at least 0 or null (all that Ray finds), got {self.gpus}.")
        if self.address not in (None, "auto") and not re.fullmatch(r"[^\s/]+:\d+", self.address):
            raise ConfigError(
                f"grid.address must be auto or host:port of a running Ray cluster (`ray start --head` prints it), or "
                f"null for a fresh Ray on this machine, got {self.address!r}."
            )
        if self.max_retries < 0:
            raise ConfigError(f"grid.max_retries must be at least 0, got {self.max_retries}.")
        if self.batch_seconds < 0:
            raise ConfigError(f"grid.batch_seconds must be at least 0 (no batches), got {self.batch_seconds}.")

    def open(self, load_app: Callable[[], App], *, num_clients: int, threads: int, device: str) -> "RayGrid":
        """Start (or join) Ray and the workers, without waiting for them.

        Args:
            load_app: cloudpickled; called once in every worker, whose `sys.path` and working directory are ours.
            num_clients: nodes, one per partition.
            threads: torch threads of a worker.
            device: "cuda": workers own GPUs, or ConfigError; "cpu": they see none; "auto": GPUs where Ray has any.
        """
        ray = start_ray(self.address, self.gpus)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        settings, measured = self, None
        gpus = 0 if device == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
        if gpus and self.clients_per_gpu != 1:
            settings, measured = self._sized(load_app, num_clients=num_clients, threads=threads, gpus=gpus)
        placement = settings.place(nodes, num_clients=num_clients, threads=threads, device=device)
        grid = RayGrid(settings, load_app, num_clients=num_clients, threads=threads, placement=placement)
        grid.gpu_memory = measured
        return grid

    def _sized(
        self, load_app: Callable[[], App], *, num_clients: int, threads: int, gpus: int
    ) -> tuple["Ray", dict[str, Any] | None]:
        """With "auto", these settings with the number that fits; else these, and a warning where theirs does not.

        One worker that has a GPU to itself answers the query `gpu_memory` (`fedssl.federation.gpu_memory`). All GPUs
        are taken to be like that one.

        Returns:
            Settings, and what was measured: None where every client has a GPU to itself.
        """
        auto = self.clients_per_gpu == AUTO
        most = self._sharing(num_clients, gpus, self.max_clients_per_gpu if auto else int(self.clients_per_gpu))
        if most == 1:
            return replace(self, clients_per_gpu=1), None
        alone = Placement(workers=1, num_cpus=0, num_gpus=1)
        with RayGrid(self, load_app, num_clients=num_clients, threads=threads, placement=alone) as grid:
            question = RecordDict({"config": ConfigRecord()})
            (reply,) = grid.send_and_receive([Message(question, grid.get_node_ids()[0], "query.gpu_memory")])
        if reply.has_error():
            if not auto:
                log.warning("grid.clients_per_gpu=%s was not checked: %s", self.clients_per_gpu, reply.error.reason)
                return self, None
            raise ConfigError(
                f"grid.clients_per_gpu=auto could not measure what a client takes of a GPU: {reply.error.reason}\nGive "
                f"grid.clients_per_gpu a number. Where not even one client fits, lower client.batch_size or choose "
                f"smaller federation.families."
            )
        peaks = {name: float(value) for name, value in reply.content.metric_records["gpu_memory"].items()}  # type: ignore[arg-type]
        free = peaks.pop("free")
        fit = fitting(free, max(peaks.values()), share=self.gpu_memory_share, most=most)
        settings = replace(self, clients_per_gpu=fit) if auto else self
        figures = ", ".join(f"{family} {peak / 1e9:.2f} GB" for family, peak in peaks.items())
        figures = f"of {free / 1e9:.2f} GB free, a worker takes {figures}"
        log.info("grid.clients_per_gpu=%s: %s", settings.clients_per_gpu, figures)
        if fit < most and not auto:
            log.warning(
                "grid.clients_per_gpu=%d may not fit: %s, and grid.gpu_memory_share=%g of that holds %d beside the "
                "server. Use grid.clients_per_gpu=%d or auto, or lower client.batch_size.",
                *(most, figures, self.gpu_memory_share, fit, fit),
            )
        return settings, {"clients_per_gpu": settings.clients_per_gpu, "free_bytes": free, "peak_bytes": peaks}

    def place(self, nodes: Sequence[Mapping[str, float]], *, num_clients: int, threads: int, device: str) -> Placement:
        """The placement on machines with these resources ("CPU", "GPU").

        With few clients or workers, fewer share a GPU than `clients_per_gpu` allows, so that no GPU idles. Ray fills
        one GPU after the other: for nine clients on eight of them it takes fifteen workers until the last has one.
        """
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if device == "cuda" and not gpus:
            raise ConfigError(
                "device=cuda, but Ray finds no GPU. Use device=cpu, or check CUDA_VISIBLE_DEVICES and grid.gpus."
            )
        if gpus and device != "cpu":
            sharing = self._sharing(num_clients, gpus, int(self.clients_per_gpu))
            share = math.floor(SHARES / sharing) / SHARES  # 1/k must not round up
            workers = min(num_clients, gpus * sharing)
            if self.workers is not None:
                workers = min(self.workers, workers)
            elif sharing > 1:
                workers = max(workers, (gpus - 1) * sharing + 1)
            return Placement(workers=workers, num_cpus=0, num_gpus=share)
        fit = sum(int(node.get("CPU", 0)) // threads for node in nodes)
        workers = min(max(1, fit) if self.workers is None else self.workers, num_clients)
        # On our own Ray nothing competes for the cores; on a cluster a claim that no node can meet would wait forever.
        claim = threads if self.address is not None and workers <= fit else 0
        return Placement(workers=workers, num_cpus=claim, num_gpus=0)

    def _sharing(self, num_clients: int, gpus: int, most: int) -> int:
        """How many workers share a GPU, at most `most`: no more than there are clients and workers for."""
        wanted = num_clients if self.workers is None else min(self.workers, num_clients)
        return min(most, math.ceil(wanted / gpus))


def fitting(free: float, peak: float, *, share: float, most: int) -> int:
    """How many workers fit on a GPU by memory: at least 1, at most `most`.

    The server trains its students and probes on one of the GPUs. It is taken to need as much as a worker, which nobody
    measured, and so much is left on each GPU: Ray gives all workers the same share of theirs.

    Args:
        free: bytes.
        peak: bytes that one takes, > 0.
        share: of the free bytes, that they may take together.
        most: the limit.
    """
    return max(1, min(most, math.floor(min(share * free, free - peak) / peak)))


@dataclass(eq=False, slots=True)
class _Task:
    """A message on its way."""

    message: Message
    records: dict[str, Any]  # as in `Job`
    keys: tuple[int, ...]  # of its broadcast records and of the summation
    family: str | None = None  # of the client, where it has said so
    summation_key: int | None = None  # where its reply may be added up with others
    deaths: int = 0  # workers that died while they ran this message alone
    alone: bool = False  # it was in a batch that died, or in a sum that was given up
    wanted: bool = True
    message_id: str = field(init=False)  # copied: metadata is slow to read
    node_id: int = field(init=False)
    message_type: str = field(init=False)

    def __post_init__(self) -> None:
        metadata = self.message.metadata
        self.message_id, self.node_id = metadata.message_id, metadata.dst_node_id
        self.message_type = metadata.message_type

    @property
    def kind(self) -> tuple[int, str]:
        return self.node_id, self.message_type

    @property
    def alike(self) -> tuple[str | None, str]:
        """What takes about as long."""
        return self.family, self.message_type


@dataclass(eq=False, slots=True)
class _OpenSum:
    """Uploads that a worker adds up; their replies are handed out when the sum has come."""

    number: int
    summation_key: int
    replies: list[tuple[_Task, Message, RecordDict | None]] = field(default_factory=list)  # and Context.state
    seconds: float = 0.0  # that the clients will probably have taken
    dropped: bool = False


@dataclass(eq=False, slots=True)
class _Call:
    """A batch of messages that a worker was given; none: to load the app, or to send a sum."""

    reference: Any  # what to wait for
    tasks: list[_Task]
    sum: _OpenSum | None = None  # that the uploads go into
    sends_sum: bool = False  # and which comes back with the replies
    seconds: float = 0.0  # that its clients will probably take
    since: float = field(default_factory=time.monotonic)  # when it was given, or the one before it ended


@dataclass(eq=False, slots=True)
class _Slot:
    """One worker as the driver sees it; when its actor dies, the slot gets another one."""

    actor: Any
    calls: deque[_Call]  # the first is what it works on, another one waits for it there
    loaded: bool = False
    pid: int = 0
    device: str = ""
    keys: set[int] = field(default_factory=set)  # broadcast records it holds
    unused: list[int] = field(default_factory=list)  # others, which its next call frees
    sum: _OpenSum | None = None  # that its next uploads go into
    sums: list[_OpenSum] = field(default_factory=list)  # all that it has not sent

    @property
    def tasks(self) -> list[_Task]:
        """All messages that it was given."""
        return [task for call in self.calls for task in call.tasks]

    def left(self, now: float) -> float:
        """Seconds of work that it probably still has; what is late is taken to need as long again as it is late."""
        if not self.tasks:
            return 0.0
        running, *others = self.calls
        return abs(running.seconds - (now - running.since)) + sum(call.seconds for call in others)


class RayGrid(LocalGrid):
    """Runs clients in Ray actors. Open it with `Ray.open`, close it (or leave its `with` block) to end the actors."""

    def __init__(
        self, settings: Ray, load_app: Callable[[], App], *, num_clients: int, threads: int, placement: Placement
    ) -> None:
        super().__init__(num_clients)
        import ray
        from ray import cloudpickle

        self._ray = ray
        self._settings = settings
        self.placement = placement
        self.gpu_memory: dict[str, Any] | None = None  # what `clients_per_gpu` was measured by, for the manifest
        actor_class = ray.remote(Worker).options(
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="DEFAULT" if settings.address is None else "SPREAD",  # over the nodes
        )
        surroundings = Surroundings.of_this_process(see_gpus=placement.num_gpus > 0)
        self._new_actor = partial(actor_class.remote, surroundings, num_clients, threads)
        self._load_app: bytes = cloudpickle.dumps(load_app)  # type: ignore[no-untyped-call]
        self._queue: deque[_Task] = deque()
        self._tasks: dict[str, _Task] = {}  # all that somebody waits for and that have no reply yet
        self._replies: dict[str, Message] = {}
        self._seconds: dict[tuple[int, str], float] = {}  # of a client's last message of a type
        # Mean and count by family (None where nobody said) and message type, for clients that are new to it: of many
        # registered nearly all are, in every round.
        self._typical: dict[tuple[str | None, str], tuple[float, int]] = {}
        self._broadcast: dict[int, Any] = {}  # references to records in the object store; small ones themselves
        self._users: Counter[int] = Counter()  # unanswered messages per broadcast record
        self._next_key = 0  # of broadcast records, and numbers of sums
        self._summation: "Summation | None" = None  # of the messages that are being pushed
        self._failed_starts = 0
        self._last_seen = time.monotonic()  # a worker that had started
        self._closed = False
        self._slots = [self._start_worker() for _ in range(placement.workers)]
        open_grids.add(self)

    # --- messages

    def push_to_add_up(self, messages: Iterable[Message], summation: "Summation") -> list[str]:
        """As `push_messages`; workers add up the uploads of short clients, where they can.

        Pull all of them, and before the next push: a reply may carry the weights of others, which are lost with it.
        """
        self._summation = summation
        try:
            return self.push_messages(messages)
        finally:
            self._summation = None

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop these messages; a worker that runs nothing else is replaced, so that a hanging client costs no core."""
        dropped = [self._tasks.pop(i) for i in message_ids if self._replies.pop(i, None) is None and i in self._tasks]
        if not dropped:
            return
        for task in dropped:
            task.wanted = False
        self._release(dropped)
        self._queue = deque(task for task in self._queue if task.wanted)
        for slot in self._slots:
            for added_up in slot.sums:
                if not all(task.wanted for task, *_ in added_up.replies):
                    self._drop(slot, added_up)
        for number, slot in enumerate(self._slots):
            running = slot.calls[0].tasks if slot.calls else []
            if running and not any(task.wanted for task in running):
                nodes = tuple(task.node_id for task in running)
                self._events.append(
                    GridEvent(kind="worker_stopped", node_ids=nodes, reason="still running when the time was up")
                )
                self._replace(number)

    def close(self) -> None:
        """End the actors; Ray itself stays for the next grid of this process. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        open_grids.discard(self)
        if self._ray.is_initialized():
            for slot in self._slots:
                self._ray.kill(slot.actor)
        for container in (self._slots, self._queue, self._tasks, self._replies, self._broadcast, self._users):
            container.clear()

    def _push(self, messages: Sequence[Message]) -> None:
        if self._closed:
            raise RuntimeError("this grid is closed")
        summation_key = None if self._summation is None or not messages else self._put(self._summation)
        keys: dict[int, int | None] = {}  # by identity of a record: large ones get a key, once
        members = known_members(self)
        tasks = []
        for message in messages:
            records: dict[str, Any] = dict(message.content)
            for name, record in message.content.items():
                if id(record) not in keys:
                    keys[id(record)] = self._put(record) if _is_large(record) else None
                if (key := keys[id(record)]) is not None:
                    records[name] = key
            used = tuple(value for value in records.values() if isinstance(value, int))
            if summation_key is not None:
                used += (summation_key,)
            self._users.update(used)
            member = members.get(message.metadata.dst_node_id)
            tasks.append(_Task(message, records, used, None if member is None else member.family, summation_key))
        self._tasks.update((task.message_id, task) for task in tasks)
        tasks.sort(key=lambda task: -self._expected(task))  # the longest first; new clients keep their order
        self._queue.extend(tasks)
        self._dispatch()

    def _pull(self, message_ids: Set[str], deadline: float | None) -> dict[str, Message]:
        ready = [i for i in self._replies if i in message_ids]
        if not ready:
            wait = POLL_SECONDS if deadline is None else min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            self._collect(wait)
            self._dispatch()
            self._name_a_full_cluster()
            ready = [i for i in self._replies if i in message_ids]
        return {i: self._replies.pop(i) for i in ready}

    def _put(self, record: "flower_compat.Record | Summation") -> int:
        self._next_key += 1
        data, views = flower_compat.dumps(record)
        large = bool(views) or len(data) >= BROADCAST_BYTES
        self._broadcast[self._next_key] = self._ray.put((data, views)) if large else (data, views)
        return self._next_key

    def _release(self, tasks: Iterable[_Task]) -> None:
        """These messages need their broadcast records no more; one without users is freed, at each worker by its next
        call: one for that alone would delay every round's end.
        """
        unused = []
        for key in (key for task in tasks for key in task.keys):
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._broadcast[key]
                unused.append(key)
        for slot in self._slots if unused else ():
            held = slot.keys.intersection(unused)
            slot.keys -= held
            slot.unused += held

    # --- work

    def _expected(self, task: _Task) -> float:
        """Seconds this message will probably take, by its client or those of its family; 0 where nothing is known."""
        return self._seconds.get(task.kind) or self._typical.get(task.alike, (0.0, 0))[0]

    def _dispatch(self) -> None:
        """Give idle workers work, first where fewest workers share the device; then what busy ones find when they end.

        Only what should be short waits at a worker, behind what should be, and not what is little: it had better go to
        whoever is idle first. The second of two messages to one node has the state from before the first if both are
        under way.
        """
        now = time.monotonic()
        idle = [slot for slot in self._slots if not slot.calls]
        if idle and not self._queue:
            self._take_back()
        part = self._part(now) if self._queue else 0.0
        busy = Counter(slot.device for slot in self._slots if slot.tasks) if idle and self._queue else Counter()
        while idle and self._queue:
            slot = min(idle, key=lambda slot: busy[slot.device])
            idle.remove(slot)
            busy[slot.device] += 1
            self._give(slot, self._next_batch(math.ceil(len(self._queue) / (len(idle) + 1)), part))
        for slot in idle:  # and nothing is left for it
            if slot.sum is not None:
                self._give(slot, [])
        for slot in self._slots:
            if not self._queue:
                break
            more = part - slot.left(now)
            if (
                slot.loaded
                and len(slot.calls) == 1
                and more >= self._settings.batch_seconds / 2
                and self._is_short(slot)
            ):
                self._give(slot, self._next_batch(len(self._queue), more))

    def _part(self, now: float) -> float:
        """Seconds of all work left, as far as known, that a worker may have; some messages tell of the whole queue."""
        step = max(1, len(self._queue) // SAMPLES)
        some = [self._expected(self._queue[i]) for i in range(0, len(self._queue), step)]
        known = sum(slot.left(now) for slot in self._slots) + len(self._queue) * sum(some) / len(some)
        return (SHARE if len(self._slots) > 1 else 1.0) * known / len(self._slots)

    def _take_back(self) -> None:
        """What waits behind a call that takes far longer than it should is for others, which are idle.

        That worker will do it nevertheless, up to `batch_seconds` of work for nobody.
        """
        overdue = time.monotonic() - OVERDUE * self._settings.batch_seconds
        for slot in self._slots:
            if len(slot.calls) < 2 or slot.calls[0].since >= overdue:
                continue
            running, waiting = slot.calls
            if waiting.sum is not None and waiting.sum is running.sum:
                continue  # without it, the sum could be had only by running the overdue ones again
            slot.calls.pop()
            self._queue.extend(task for task in waiting.tasks if task.wanted)
            if waiting.sum is not None:  # the worker still adds it
                self._drop(slot, waiting.sum)

    def _is_short(self, slot: _Slot) -> bool:
        """Whether it should end within `batch_seconds`, and what is next in the queue takes as little."""
        head, seconds = self._queue[0], self._settings.batch_seconds
        known = [self._expected(task) for task in (*slot.tasks, head)]
        return all(known) and sum(known[:-1]) <= seconds and known[-1] <= seconds and not head.alone

    def _give(self, slot: _Slot, tasks: list[_Task]) -> None:
        """Send a worker these messages, and the broadcast records it lacks; the last ones bring its sum back."""
        batch: list[Job] = [(task.message.metadata, task.records, self._states.get(task.node_id)) for task in tasks]
        added_up, adding, sends_sum = self._sum_for(slot, tasks), None, False
        if added_up is not None:
            sends_sum = not self._queue or added_up.seconds > KEPT * self._settings.batch_seconds
            adding = added_up.number, added_up.summation_key, sends_sum
            slot.sum = None if sends_sum else added_up
        unseen = {key for task in tasks for key in task.keys} - slot.keys
        slot.keys |= unseen
        data, views = flower_compat.dumps(batch)
        broadcast = {key: self._broadcast[key] for key in unseen}
        unused, slot.unused = slot.unused, []
        reference = slot.actor.work.remote(data, views, broadcast, unused, adding)
        slot.calls.append(_Call(reference, tasks, added_up, sends_sum, sum(map(self._expected, tasks))))

    def _sum_for(self, slot: _Slot, tasks: list[_Task]) -> _OpenSum | None:
        """Where the uploads of this batch are added: to the sum that the worker has begun, or to a new one.

        None where an upload is to come whole: of a client that takes long, as far as known, or is suspected.
        """
        if not tasks:
            return slot.sum
        key, seconds = tasks[0].summation_key, [self._expected(task) for task in tasks]
        if key is None or not all(seconds) or sum(seconds) > self._settings.batch_seconds:
            return None
        if any(task.alone or task.summation_key != key for task in tasks):
            return None
        if slot.sum is not None and slot.sum.summation_key != key:
            return None
        if slot.sum is None:
            self._next_key += 1
            slot.sum = _OpenSum(self._next_key, key)
            slot.sums.append(slot.sum)
        slot.sum.seconds += sum(seconds)
        return slot.sum

    def _drop(self, slot: _Slot, added_up: _OpenSum) -> None:
        """Give this worker's sum up: the clients that are in it, and still wanted, run again, each alone."""
        added_up.dropped = True
        slot.sums = [other for other in slot.sums if other is not added_up]
        slot.sum = None if slot.sum is added_up else slot.sum
        replies, added_up.replies = added_up.replies, []
        self._run_again(task for task, *_ in replies)
        slot.actor.drop.remote(added_up.number)

    def _next_batch(self, most: int, seconds: float) -> list[_Task]:
        """Tasks from the head of the queue: one, or at most so many short ones, within `seconds` or `SHORT_SECONDS` of
        work, and within `batch_seconds`.
        """
        limit = min(self._settings.batch_seconds, max(seconds, SHORT_SECONDS))
        batch = [self._queue.popleft()]
        work = self._expected(batch[0])
        while self._queue and len(batch) < most and not (batch[0].alone or self._queue[0].alone):
            more = self._expected(self._queue[0])
            if not (work and more) or work + more > limit:  # an unknown client travels alone
                break
            work += more
            batch.append(self._queue.popleft())
        return batch

    def _collect(self, timeout: float) -> None:
        """Take what workers have finished, waiting at most `timeout` seconds for the first."""
        under_way = {slot.calls[0].reference: number for number, slot in enumerate(self._slots) if slot.calls}
        if not under_way:
            return
        ready, others = self._ray.wait(list(under_way), num_returns=1, timeout=timeout)
        if ready and len(others) > 1:  # of many workers several may be ready, and to look at all costs the same
            ready += self._ray.wait(others, num_returns=len(others), timeout=0)[0]
        for reference in ready:
            number = under_way[reference]
            slot = self._slots[number]
            try:
                value = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, BrokenProcessError):
                    self._lost(number, error.cause)
                    continue
                raise error.cause from error  # loading failed, or a bug of ours: clients' own errors are replies
            except self._ray.exceptions.RayError as error:
                self._lost(number, error)
            else:
                done = slot.calls.popleft()
                if slot.calls:
                    slot.calls[0].since = time.monotonic()
                self._finished(slot, done, value)

    def _name_a_full_cluster(self) -> None:
        """Warn, once, where no node has room for any worker: Ray waits for one without a word."""
        now = time.monotonic()
        if self._settings.address is None or any(slot.loaded for slot in self._slots):
            self._last_seen = now
        elif now - self._last_seen > START_SECONDS:
            self._last_seen = math.inf
            log.warning(
                "no worker runs on the cluster grid.address=%s: each asks Ray for %g CPUs and %g GPUs, and it may be "
                "that no node has them free (`ray status` shows it). Waiting for one.",
                self._settings.address,
                self.placement.num_cpus,
                self.placement.num_gpus,
            )

    def _finished(self, slot: _Slot, call: _Call, value: Any) -> None:
        if not slot.loaded:
            slot.loaded = True
            slot.pid, slot.device = value
            self._failed_starts = 0
            return
        results: list[Result]
        results, sums = flower_compat.loads(*value) if isinstance(value, tuple) else flower_compat.loads(value, [])
        for task, (reply, state, seconds) in zip(call.tasks, results, strict=True):
            mean, count = self._typical.get(task.alike, (0.0, 0))
            self._typical[task.alike] = mean + (seconds - mean) / (count + 1), count + 1
            self._seconds[task.kind] = seconds
            if call.sum is None or flower_compat.noted_sum(reply) is None:
                self._answered(task, reply, state)
            else:
                call.sum.replies.append((task, reply, state))
        if call.sum is None:
            return
        if call.sum.dropped or not all(task.wanted for task, *_ in call.sum.replies):
            self._drop(slot, call.sum)
        elif call.sends_sum:
            slot.sums.remove(call.sum)
            by_node = {task.node_id: reply for task, reply, _ in call.sum.replies}
            for added_up in sums:
                added_up.put_into(by_node[FIRST_NODE_ID + added_up.partitions[0]])
            for answer_of in call.sum.replies:
                self._answered(*answer_of)

    def _answered(self, task: _Task, reply: Message, state: RecordDict | None) -> None:
        """Hand out the reply, if it is still wanted."""
        if task.wanted:
            self._replies[task.message_id] = reply
            del self._tasks[task.message_id]
            self._keep_state(task.node_id, state)
            self._release([task])

    def _lost(self, number: int, error: Exception) -> None:
        """A worker died: replace it, and run its messages again, or answer for the one that keeps killing workers."""
        slot = self._slots[number]
        broken = isinstance(error, BrokenProcessError)
        why = f"was ended: {reason_of(error)}" if broken else f"died: {_why(error)}"
        reason = f"worker process {slot.pid or '(starting)'} {why}"
        running = slot.calls[0].tasks
        added_up = [task for one in slot.sums for task, *_ in one.replies if task.wanted]
        for task in added_up if slot.loaded and not running else ():  # it died of its sum
            task.alone = True
        self._events.append(
            GridEvent(kind="worker_died", node_ids=tuple(task.node_id for task in (*running, *added_up)), reason=reason)
        )
        if not slot.loaded:
            self._failed_starts += 1
            if self._failed_starts > self._settings.max_retries * len(self._slots):
                raise FedSSLError(
                    f"workers die while they start, before any client runs: {reason} "
                    "Their logs are in Ray's folder (/tmp/ray/session_latest/logs)."
                )
        self._replace(number)
        lost = [task for task in running if task.wanted]
        if len(running) == 1 and lost:
            (task,) = lost
            task.deaths += 1
            if broken or task.deaths > self._settings.max_retries:
                code, text = flower_compat.CLIENT_RAISED, reason_of(error)
                if not broken:
                    code = flower_compat.CLIENT_CRASHED
                    text = (
                        f"{reason} ({task.deaths} workers died while they ran this client: "
                        f"grid.max_retries={self._settings.max_retries})"
                    )
                self._replies[task.message_id] = flower_compat.error_reply(task.message, code, text)
                del self._tasks[task.message_id]
                self._release(lost)
                return
        self._run_again(lost)

    def _run_again(self, tasks: Iterable[_Task]) -> None:
        """Those that are still wanted, each alone."""
        wanted = [task for task in tasks if task.wanted]
        for task in wanted:
            task.alone = True
        self._queue.extendleft(reversed(wanted))

    def _replace(self, number: int) -> None:
        """Another worker instead of this one; what waited there, and is no part of the matter, is back in the queue."""
        slot = self._slots[number]
        self._ray.kill(slot.actor)  # of one that died, too: it may only be out of reach
        waiting = [task for call in list(slot.calls)[1:] for task in call.tasks if task.wanted]
        waiting += [task for added_up in slot.sums for task, *_ in added_up.replies if task.wanted]
        self._queue.extendleft(reversed(waiting))
        self._slots[number] = self._start_worker()

    def _start_worker(self) -> _Slot:
        actor: Any = self._new_actor()
        return _Slot(actor=actor, calls=deque([_Call(actor.load.remote(self._load_app), [])]))


def _is_large(record: flower_compat.Record) -> bool:
    return flower_compat.num_bytes(record) >= BROADCAST_BYTES


def _why(error: Exception) -> str:
    """The part of Ray's long message that says how the worker ended."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text.partition("The actor died because ")[2] or text
    for advice in (" There are some potential", " Some common causes"):
        detail = detail.partition(advice)[0]
    return detail[:300] or type(error).__name__
