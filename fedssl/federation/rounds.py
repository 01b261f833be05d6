"""The loop: one round as a story, in the order of Flower's `Strategy.start`, with what `start` lacks.

That is: resume, checkpoints, byte counts, evaluation, and failing loudly. Every failure is named with client and
reason; below `federation.min_replies` the run ends.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedssl.errors import PayloadError, TooFewRepliesError
from fedssl.federation.averaging import Adder, Summation
from fedssl.federation.checkpoint import Checkpoints, Progressed
from fedssl.federation.flower_compat import noted_sum
from fedssl.federation.records import Upload, family_values, load_state, num_bytes
from fedssl.federation.replies import KeptReplies
from fedssl.federation.roster import Member, ask_roster, by_node
from fedssl.federation.setup import Setup
from fedssl.federation.store import ClientStore
from fedssl.tracking import Progress, Tracker

log = logging.getLogger(__name__)


Evaluations = dict[str, dict[str, float]]  # family -> metrics
EVENTS = ("worker_died", "worker_stopped")  # the grid ran the task again; ended a late one that nobody waits for


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A client that did not answer usably, or a worker that ended under it."""

    partition: int
    kind: str  # failed | late | refused, or one of EVENTS
    reason: str


@dataclass(kw_only=True)
class Gathered:
    """What came back from one batch of messages."""

    asked: list[int] = field(default_factory=list)  # partitions
    replies: list[Message] = field(default_factory=list)  # usable ones, in partition order
    failures: list[Failure] = field(default_factory=list)
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    simulated: dict[int, float] = field(default_factory=dict)  # seconds, by partition, of the replies that came

    def count(self, kind: str) -> int:
        """Number of failures of this kind."""
        return sum(failure.kind == kind for failure in self.failures)

    @property
    def unforeseen(self) -> list[Failure]:
        """All failures but replies beyond the simulated deadline: those are part of the plan."""
        return [f for f in self.failures if f.kind != "late" or f.partition not in self.simulated]


@dataclass(frozen=True, kw_only=True)
class State:
    """The run between two rounds."""

    arrays: ArrayRecord
    progressed: Progressed

    @property
    def round_num(self) -> int:
        """The last finished round; 0 after initialisation."""
        return self.progressed.round_num


def gather(
    grid: Grid,
    messages: Iterable[Message],
    *,
    check: Callable[[Message], Any],
    timeout: float | None,
    on_reply: Callable[[int, Message], None] = lambda partition, reply: None,
    simulate: Callable[[Member, Message, Message], float] | None = None,
    deadline_s: float | None = None,
    kept: KeptReplies | None = None,
    summation: Summation | None = None,
) -> Gathered:
    """Send `messages`, wait for the replies, sort them by partition and name what is missing.

    Args:
        grid: Flower's way to the clients.
        messages: at most one a client.
        check: raises `PayloadError` for a reply that the strategy refuses.
        timeout: seconds; None waits as long as it takes.
        on_reply: called with partition and reply as they come.
        simulate: client, message and reply -> the simulated seconds in between.
        deadline_s: simulated seconds after which a reply is late; it was sent, so its bytes count.
        kept: where replies outlive this process; what it has is not asked for again, and counts as if it had been.
        summation: the strategy wants the sum of the uploads alone. They are added up as they come, so that few are
            held, and by a grid that can (`push_to_add_up`) where the clients run; not there with a `deadline_s`,
            which refuses single ones later, or a `timeout`, at which a sum may still be where it is made.
    """
    messages = list(messages)
    gathered = Gathered()
    if not messages:
        return gathered
    members = by_node(grid)
    gathered.asked = [members[message.metadata.dst_node_id].partition_id for message in messages]
    deadline = None if timeout is None else time.monotonic() + timeout
    sizes: dict[int, int] = {}
    for message in messages:  # clients of a family share one content
        if id(message.content) not in sizes:
            sizes[id(message.content)] = num_bytes(message)
        gathered.downlink_bytes += sizes[id(message.content)]
    usable: dict[int, Message] = {}
    adder = None if summation is None else Adder(summation)

    def arrived(member: Member, sent: Message, reply: Message) -> bool:
        """Sort one reply in; whether it is usable."""
        partition = member.partition_id
        gathered.uplink_bytes += num_bytes(reply)
        on_reply(partition, reply)
        if reply.has_error():
            gathered.failures.append(Failure(partition=partition, kind="failed", reason=str(reply.error.reason)))
            return False
        try:
            _check_sender(reply, member)
            if simulate is not None:
                seconds = gathered.simulated[partition] = simulate(member, sent, reply)
                if deadline_s is not None and seconds > deadline_s:
                    reason = f"{seconds:.4g} simulated s, {deadline_s:g} are waited (federation.devices.deadline_s)"
                    gathered.failures.append(Failure(partition=partition, kind="late", reason=reason))
                    return False
            check(reply)
        except PayloadError as error:
            gathered.failures.append(Failure(partition=partition, kind="refused", reason=str(error)))
            return False
        usable[partition] = reply
        return True

    def add_up(member: Member, sent: Message, reply: Message) -> None:
        if adder is not None:
            noted = noted_sum(reply)
            adder.take(member.partition_id, sent, reply)
            if noted_sum(reply) is not noted:
                check(reply)  # what the strategy keeps of it is without weights now

    unanswered = []
    for message in messages:
        member = members[message.metadata.dst_node_id]
        if kept is not None and (reply := kept.serve(member.partition_id, message)) is not None:
            if arrived(member, message, reply):
                add_up(member, message, reply)
        else:
            unanswered.append(message)
    ids: list[str] = []
    if unanswered:
        if summation is not None and deadline_s is None and timeout is None and hasattr(grid, "push_to_add_up"):
            whole_after = None if kept is None else kept.after
            ids = list(grid.push_to_add_up(unanswered, replace(summation, whole_after=whole_after)))
        else:
            ids = list(grid.push_messages(unanswered))
    waiting = {
        message_id: (members[message.metadata.dst_node_id], message)
        for message_id, message in zip(ids, unanswered, strict=True)
    }
    while waiting and (deadline is None or time.monotonic() < deadline):
        for reply in grid.pull_messages(waiting.keys()):
            member, sent = waiting.pop(reply.metadata.reply_to_message_id)
            if not arrived(member, sent, reply):
                continue
            if kept is not None:
                kept.keep(member.partition_id, sent, reply)
            add_up(member, sent, reply)
    if waiting:
        forget = getattr(grid, "forget", None)  # ours stop working for nobody; Flower's drop late replies themselves
        if forget is not None:
            forget(list(waiting))
    for member, _ in waiting.values():
        reason = f"no reply within {timeout:g} s (federation.round_timeout)"
        gathered.failures.append(Failure(partition=member.partition_id, kind="late", reason=reason))
    for event in grid.pop_events() if hasattr(grid, "pop_events") else []:
        for node_id in event.node_ids:
            partition = members[node_id].partition_id
            gathered.failures.append(Failure(partition=partition, kind=event.kind, reason=event.reason))
    for added_up in adder.all() if adder is not None else ():
        added_up.put_into(usable[added_up.partitions[0]])
    gathered.failures.sort(key=lambda failure: failure.partition)
    gathered.replies = [usable[partition] for partition in sorted(usable)]
    return gathered


def _check_sender(reply: Message, member: Member) -> None:
    """Refuse an upload in the name of another client or family; one without our header (a stock client's) has none."""
    header = reply.content.get("header", ConfigRecord())
    if not isinstance(header, ConfigRecord):
        raise PayloadError(f"its header should be of type ConfigRecord, got {type(header).__name__}")
    if (claimed := header.get("partition_id", member.partition_id)) != member.partition_id:
        raise PayloadError(f"it says it is of partition {claimed!r}")
    if (family := header.get("family", member.family)) != member.family:
        raise PayloadError(f"it says it is of family {family!r}, this client's is {member.family!r}")


class Rounds:
    """The loop over rounds of one run.

    Args:
        setup: the run's parts.
        strategy: the server half.
        grid: the way to the clients.
        tracker: where rows go.
        progress: what a person sees.
        checkpoints: where states go.
        store: the clients' memory, pruned here.
        replay_hint: how a failed task is run again, with {round} and {partition}; None where it is not.
    """

    def __init__(
        self,
        *,
        setup: Setup,
        strategy: Strategy,
        grid: Grid,
        tracker: Tracker,
        progress: Progress,
        checkpoints: Checkpoints,
        store: ClientStore,
        replay_hint: str | None,
    ) -> None:
        self.setup = setup
        self.strategy = strategy
        self.grid = grid
        self.tracker = tracker
        self.progress = progress
        self.checkpoints = checkpoints
        self.store = store
        self._to_prune: dict[int, list[int]] = {}  # round -> clients that may have written their memory in it
        self.replay_hint = replay_hint
        self.replies = KeptReplies(
            checkpoints.root / "replies",
            config=setup.config,
            after=setup.federation.keep_replies_after,
            store=store,
        )

    # --- the story ---
    def initialise(self, arrays: ArrayRecord, started: float) -> State:
        """Round 0: evaluate the initial weights of every family, and what needs no network."""
        evaluation = self._evaluate_global(0, arrays)
        if self.setup.evaluation.raw_pixels:
            self.tracker.row(0, "eval", self.setup.evaluator.raw_pixels(), family="raw_pixels")
        members = ask_roster(self.grid).values()
        trainers = [member.family for member in members if member.trains]
        progressed = Progressed(
            round_num=0,
            uplink_bytes=0,
            downlink_bytes=0,
            wall_seconds=time.monotonic() - started,
            simulated_seconds=0.0,
            metrics_offset=self.tracker.offset,
            server_row={},
            failed_rounds=[],
            evaluation=evaluation,
            global_model=True,
            num_trained={family: trainers.count(family) for family in self.setup.families},
        )
        self.checkpoints.save(arrays, self._strategy_state(), progressed)
        return State(arrays=arrays, progressed=progressed)

    def run(self, state: State, *, deadline: float | None) -> tuple[State, str]:
        """Rounds until the last one or the deadline (on `time.monotonic`'s clock).

        Returns:
            The last state, and "completed" or "stopped".

        Raises:
            TooFewRepliesError: a round ended below `federation.min_replies`; the state before it is checkpointed.
        """
        bases = self.checkpoints.prune(state.progressed.failed_rounds)
        self._to_prune = {state.round_num: self.store.prune(bases)}  # everybody: who was asked before is not known
        for round_num in range(state.round_num + 1, self.setup.federation.num_rounds + 1):
            if deadline is not None and time.monotonic() >= deadline:
                return state, "stopped"
            state = self.one_round(state, round_num)
        return state, "completed"

    def one_round(self, state: State, round_num: int) -> State:
        """Broadcast, gather, aggregate, evaluate, checkpoint."""
        started = time.monotonic()
        deadline_s = self.setup.federation.devices.deadline_s
        messages = list(self.strategy.configure_train(round_num, state.arrays, ConfigRecord(), self.grid))
        seconds_asking = time.monotonic() - started  # some compute what they send
        self.progress.round_started(round_num, len(messages))
        self.replies.begin(round_num)
        gathered = gather(
            self.grid,
            messages,
            check=getattr(self.strategy, "check", lambda reply: None),
            timeout=self.setup.federation.round_timeout,
            on_reply=self._show_reply,
            simulate=self.setup.simulated_seconds,
            deadline_s=deadline_s,
            kept=self.replies,
            summation=getattr(self.strategy, "summation", None),
        )
        started -= self.replies.earlier_seconds
        self._name_failures(round_num, gathered.unforeseen)
        unevaluated: list[Failure] = []
        try:
            self._demand_replies(round_num, len(messages), gathered)
            seconds = {"seconds_clients": time.monotonic() - started}

            self.progress.phase("aggregating")
            aggregating = time.monotonic()
            arrays, learned = self.strategy.aggregate_train(round_num, gathered.replies)
            state = replace(state, arrays=state.arrays if arrays is None else arrays)
            seconds["seconds_aggregation"] = time.monotonic() - aggregating
            waited = self.setup.simulated_wait(round_num, len(messages), gathered.simulated)
            seconds["simulated_seconds"] = seconds_asking + waited + seconds["seconds_aggregation"]

            self.progress.phase("evaluating")
            evaluating = time.monotonic()
            evaluation, global_model = state.progressed.evaluation, state.progressed.global_model
            new_evaluation: dict[str, dict[str, float]] = {}
            client_metrics: dict[int, dict[str, float]] = {}
            if round_num % self.setup.evaluation.every == 0 or round_num == self.setup.federation.num_rounds:
                new_evaluation, client_metrics = self._evaluate(round_num, state.arrays, unevaluated)
                evaluation, global_model = new_evaluation, not client_metrics
            seconds["seconds_evaluation"] = time.monotonic() - evaluating
        finally:  # a round that ends the run has this row, too
            self._write_round_row(round_num, gathered, unevaluated)

        self._write_client_rows(round_num, gathered, client_metrics)
        seconds["seconds"] = time.monotonic() - started
        server_row = {
            **(dict(learned) if learned is not None else {}),
            "uplink_bytes": gathered.uplink_bytes,
            "downlink_bytes": gathered.downlink_bytes,
            **seconds,
        }
        state = self._keep(state, round_num, gathered, evaluation, global_model, server_row)
        self.progress.round_finished(round_num, self._line(len(messages), gathered, server_row, new_evaluation))
        return state

    # --- its parts ---
    def _show_reply(self, partition: int, reply: Message) -> None:
        self.progress.client_finished(partition, self.setup.family(partition), _loss(reply))

    def _name_failures(self, round_num: int, failures: Iterable[Failure]) -> None:
        for failure in failures:
            if failure.kind in EVENTS:
                head = f"{failure.kind.replace('_', ' ')} under partition {failure.partition} in round {round_num}"
            else:
                head = f"client {failure.kind} in round {round_num}, partition {failure.partition}"
            again = "; the task ran again" if failure.kind == "worker_died" else ""
            hint = ""
            if self.replay_hint is not None:
                command = self.replay_hint.format(round=round_num, partition=failure.partition)
                hint = f"\nReplay it in this process: {command}"
            log.warning("%s: %s%s%s", head, failure.reason, again, hint)

    def _write_round_row(self, round_num: int, gathered: Gathered, unevaluated: Iterable[Failure]) -> None:
        """The numbers are those of the training replies alone; `failures` has the evaluation's at its end."""
        row = {
            "num_ok": len(gathered.replies),
            "num_failed": gathered.count("failed"),
            "num_late": gathered.count("late"),
            "num_refused": gathered.count("refused"),
            "failures": [vars(failure) for failure in (*gathered.failures, *unevaluated)],
        }
        self.tracker.row(round_num, "round", row)

    def _demand_replies(self, round_num: int, num_messages: int, gathered: Gathered) -> None:
        federation = self.setup.federation
        availability = federation.devices.availability
        needed = -(-num_messages // 2) if federation.min_replies is None else min(federation.min_replies, num_messages)
        if availability < 1 and self.setup.client_half is not None:  # those who are away make no round out of nothing
            needed = max(1, needed) if federation.min_replies is None else federation.min_replies
        if len(gathered.replies) < needed:
            lines = [f"  partition {f.partition}: {f.kind}: {f.reason}" for f in gathered.failures]
            if availability < 1:
                lines.append(
                    f"  {num_messages or 'no'} clients were there to be asked: raise federation.devices.availability="
                    f"{availability:g} or federation.num_clients, or lower federation.min_replies (0 goes on with none)"
                )
            raise TooFewRepliesError(
                f"round {round_num} has {len(gathered.replies)} usable replies of {num_messages}, "
                f"federation.min_replies asks for {needed}:\n" + "\n".join(lines)
            )

    def _evaluate(
        self, round_num: int, arrays: ArrayRecord, unevaluated: list[Failure]
    ) -> tuple[dict[str, dict[str, float]], dict[int, dict[str, float]]]:
        """Probe the global models; where the strategy asks its clients instead, theirs.

        What goes wrong then is added to `unevaluated`.
        """
        messages = list(self.strategy.configure_evaluate(round_num, arrays, ConfigRecord(), self.grid))
        if not messages:
            return self._evaluate_global(round_num, arrays), {}
        gathered = gather(
            self.grid,
            messages,
            check=getattr(self.strategy, "check_evaluation", lambda reply: None),
            timeout=self.setup.federation.round_timeout,
        )
        for failure in gathered.failures:
            log.warning("evaluation of partition %d %s: %s", failure.partition, failure.kind, failure.reason)
            kind = failure.kind if failure.kind in EVENTS else "failed"
            unevaluated.append(replace(failure, kind=kind, reason=f"evaluation: {failure.reason}"))
        self._demand_replies(round_num, len(messages), gathered)
        lists = self.strategy.aggregate_evaluate(round_num, gathered.replies)
        evaluation: Evaluations = {}
        for name, values in (lists or {}).items():
            family, metric = name.split("/", 1)
            row = evaluation.setdefault(family, {})
            numbers = [float(v) for v in values]  # type: ignore[union-attr]
            row |= {metric: sum(numbers) / len(numbers), f"{metric}_min": min(numbers), f"{metric}_max": max(numbers)}
            row["num_clients"] = len(numbers)
        for family, row in evaluation.items():
            self.tracker.row(round_num, "eval", row, family=family)
        by_client = {
            int(reply.content.config_records["header"]["partition_id"]): dict(reply.content.metric_records["metrics"])  # type: ignore[arg-type]
            for reply in gathered.replies
        }
        return evaluation, by_client  # type: ignore[return-value]

    def _evaluate_global(self, round_num: int, arrays: ArrayRecord) -> dict[str, dict[str, float]]:
        evaluation = {}
        for family in self.setup.families:
            if values := family_values(arrays, family):
                model = self.setup.build_model(family)
                load_state(model, values)
                evaluation[family] = self.setup.evaluator(model.backbone.to(self.setup.device))
                self.tracker.row(round_num, "eval", evaluation[family], family=family)
        return evaluation

    def _write_client_rows(
        self, round_num: int, gathered: Gathered, client_metrics: Mapping[int, Mapping[str, float]]
    ) -> None:
        for reply in gathered.replies:
            upload = Upload.from_message(reply)
            partition = upload.header.partition_id
            metrics = {
                **upload.metrics,
                "uplink_bytes": num_bytes(reply),
                "simulated_seconds": gathered.simulated[partition],
                **client_metrics.get(partition, {}),
            }
            self.tracker.row(round_num, "client", metrics, partition=partition, family=upload.header.family)

    def _keep(
        self,
        state: State,
        round_num: int,
        gathered: Gathered,
        evaluation: dict[str, dict[str, float]],
        global_model: bool,
        server_row: dict[str, Any],
    ) -> State:
        before = state.progressed
        progressed = replace(
            before,
            round_num=round_num,
            uplink_bytes=before.uplink_bytes + gathered.uplink_bytes,
            downlink_bytes=before.downlink_bytes + gathered.downlink_bytes,
            wall_seconds=before.wall_seconds + server_row["seconds"],
            simulated_seconds=_sum(before.simulated_seconds, server_row["simulated_seconds"]),
            metrics_offset=self.tracker.offset,
            server_row=server_row,
            failed_rounds=before.failed_rounds + ([round_num] if gathered.unforeseen else []),
            evaluation=evaluation,
            global_model=global_model,
        )
        self.checkpoints.save(state.arrays, self._strategy_state(), progressed)
        self.replies.clear()
        self.tracker.row(round_num, "server", server_row)
        self._prune(progressed, gathered.asked)
        return State(arrays=state.arrays, progressed=progressed)

    def _prune(self, progressed: Progressed, asked: list[int]) -> None:
        """Delete what no kept checkpoint needs any more.

        A client that wrote in round r has an older memory only for the checkpoints before r: it is looked at when r is
        the oldest of the newest `keep`, and then not again before it writes. A failed round's checkpoint never goes.
        """
        bases = self.checkpoints.prune(progressed.failed_rounds)
        self._to_prune[progressed.round_num] = asked
        for round_num in [r for r in self._to_prune if r <= progressed.round_num + 1 - self.checkpoints.keep]:
            self.store.prune(bases, self._to_prune.pop(round_num))

    def _strategy_state(self) -> dict[str, Tensor]:
        """What the strategy itself must remember; ours keep everything in the arrays."""
        return self.strategy.state_dict() if hasattr(self.strategy, "state_dict") else {}

    def _line(
        self,
        asked: int,
        gathered: Gathered,
        server_row: Mapping[str, Any],
        evaluation: Mapping[str, Mapping[str, float]],
    ) -> dict[str, float | int | str]:
        reported = evaluation.get(self.setup.report_family, {})
        line: dict[str, float | int | str] = {"ok": f"{len(gathered.replies)}/{asked}"} if asked else {}
        if late := gathered.count("late"):
            line["late"] = late
        losses = [upload for reply in gathered.replies if (upload := _loss(reply)) is not None]
        if losses:
            line["client loss"] = sum(losses) / len(losses)
        if (loss := server_row.get(f"{self.setup.report_family}/loss")) is not None:
            line["server loss"] = loss
        line |= {name: reported[name] for name in ("knn_top1", "linear_top1", "labels1_top1") if name in reported}
        return line | {"up MB": gathered.uplink_bytes / 1e6}


def _sum(before: float | None, more: float) -> float | None:
    return None if before is None else before + more


def _loss(reply: Message) -> float | None:
    """The client's loss where it tells one; the reply may be anything."""
    if reply.has_error():
        return None
    loss = reply.content.metric_records.get("metrics", MetricRecord()).get("loss")
    return float(loss) if isinstance(loss, int | float) else None
