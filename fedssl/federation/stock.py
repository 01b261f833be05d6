"""Flower's own strategies as server halves, one instance per architecture family.

`Stock` drives any strategy of `flwr.serverapp.strategy` that merges weights into weights. Alone, such a strategy knows
one model, samples random node ids with Python's global generator and waits until enough of them are there. Here

- it sees this round's cohort of its family as all the nodes there are: `federation.cohort_size` says who takes part;
- uploads are checked like everybody's, and it gets them in partition order;
- it gets what is trained, floats only. Batch norm's running averages, which no optimiser steps on and no two of which
  are worth choosing between, are averaged beside it, by number of images. So a robust strategy guards the weights, not
  these averages: against malicious clients use families without batch norm;
- weights travel in the model's own type. Some strategies return double precision (numpy's promotion); they get that
  back in the next round, as they would from Flower;
- its random draws come from the run's seed, and its state is kept in checkpoints.

What cannot work is found out before the run, by a rehearsal of two rounds on a few numbers.
"""

import copy
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedssl.environment import keep_start
from fedssl.errors import ConfigError, FedSSLError, PayloadError
from fedssl.federation.arrays import read_array, to_record, write_array
from fedssl.federation.flower_compat import identify_process, stamp
from fedssl.federation.per_family import PerFamily
from fedssl.federation.records import Upload
from fedssl.federation.server import Server
from fedssl.federation.weights import LARGEST, mean_weights
from fedssl.seeding import seeded_globals

log = logging.getLogger(__name__)

EVERYONE = {"fraction_train": 1.0, "min_train_nodes": 1, "min_available_nodes": 1}  # of the nodes it is shown
NOT_ASKED = ("fraction_evaluate", "min_evaluate_nodes")  # the server evaluates its own weights
ROUND = "server-round"  # what every strategy tells its clients
MOST_REPLIES = 100  # how far to look for a number of replies that would do


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one family's strategy is after a round."""

    strategy: Strategy
    returned: ArrayRecord | None  # the trained weights as it returned them; None where the model's are the same


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One family's round so far."""

    strategy: Strategy  # after `configure_train`
    messages: Mapping[int, Message]  # its own, by node
    nodes: Mapping[int, int]  # node by partition

    @property
    def config(self) -> dict[str, Any]:
        """What it tells clients beside the round's number."""
        return _told(next(iter(self.messages.values()))) if self.messages else {}


class Stock(PerFamily):
    """The server half.

    Args:
        server: what the framework knows.
        strategy: of Flower; copied for each family.
        metrics: numbers of the clients that it reads beside `num-examples`; an upload without them is refused.
        client_reads: entries of the configuration that it sends which the client half reads
            (`Broadcast.config`). Others are refused: a number that nobody reads changes nothing.

    Raises:
        ConfigError: it cannot work with as few replies as a family has, or its state cannot be kept, or it takes part
            in what other keys decide.
    """

    def __init__(
        self, *, server: Server, strategy: object, metrics: Sequence[str] = (), client_reads: Sequence[str] = ()
    ) -> None:
        super().__init__(server=server)
        if not isinstance(strategy, Strategy):
            raise ConfigError(
                f"strategy.server.strategy must name a flwr.serverapp.strategy.Strategy, got a "
                f"{type(strategy).__name__}."
            )
        _take_everyone(strategy)
        self.pattern = strategy
        self.name = type(strategy).__name__
        self.metrics, self.client_reads = tuple(metrics), tuple(client_reads)
        self.trained = {family: _trained(server, family) for family in server.client_families}
        self.held = {f: Held(strategy=copy.deepcopy(strategy), returned=None) for f in server.client_families}
        self.next_held: dict[str, Held] = {}  # what they are if this round counts
        self.asked: dict[str, Asked] = {}
        identify_process()
        for family, most in self._most_replies().items():
            self._check_rehearsal(family, most)

    # --- a round ---
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let each family's strategy ask its part of the cohort."""
        self.arrays, self.round_num, self.asked = arrays, server_round, {}
        cohort = self.server.sample_cohort(server_round, grid)
        messages: dict[int, Message] = {}
        for family in self.server.client_families:
            nodes = {member.partition_id: member.node_id for member in cohort if member.family == family}
            if not nodes:
                continue
            strategy = copy.deepcopy(self.held[family].strategy)
            with self._drawing(family, "asks"):
                own = ask(strategy, server_round, self._given(family), config, list(nodes.values()))
            asked = self.asked[family] = Asked(strategy=strategy, messages=own, nodes=nodes)
            chosen = [member for member in cohort if member.node_id in own]
            for message in self.server.messages(server_round, chosen, ConfigRecord(asked.config), arrays):
                messages[message.metadata.dst_node_id] = message
        return [messages[member.node_id] for member in cohort if member.node_id in messages]

    def check(self, reply: Message) -> Upload:
        """As `PerFamily`; and a client that was asked, with the numbers that the strategy reads."""
        upload = super().check(reply)
        asked = self.asked.get(upload.header.family)
        if asked is None or asked.nodes.get(upload.header.partition_id) not in asked.messages:
            raise PayloadError(f"partition {upload.header.partition_id} was not asked in this round")
        for name in self.metrics:
            value = upload.metrics.get(name)
            if value is None or not abs(value) <= LARGEST:
                raise PayloadError(f"it declares {name}={value}, which {self.name} reads")
        return upload

    def merge(self, family: str, uploads: Sequence[Upload], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the family's strategy makes of the uploads; where that is nothing, the weights stay as they were."""
        asked, names = self.asked[family], self.trained[family]
        strategy = copy.deepcopy(asked.strategy)  # so that the same replies can be merged again
        answers = [
            (
                asked.messages[asked.nodes[upload.header.partition_id]],
                {name: upload.arrays[name] for name in names},
                {"num-examples": upload.num_images, **{name: upload.metrics[name] for name in self.metrics}},
            )
            for upload in uploads
        ]
        try:
            with self._drawing(family, "merges"):
                merged = combine(strategy, self.round_num, answers)
        except TooFewError as error:
            log.warning("round %d: %s keeps its weights: %s", self.round_num, family, error)
            merged = None
        except Exception as error:
            raise FedSSLError(
                f"{self.name} failed in round {self.round_num} on {len(uploads)} replies of {family}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if merged is None:
            self.next_held[family] = replace(self.held[family], strategy=strategy)
            return before
        own = _only(self.arrays, names)
        sent = {name: value.astype(own[name].dtype) for name, value in merged.items() if name in own}
        rounded = any(merged[name].dtype != own[name].dtype for name in names)
        returned = to_record({name: merged[name] for name in names}) if rounded else None
        self.next_held[family] = Held(strategy=strategy, returned=returned)
        shares = [upload.num_images for upload in uploads]
        statistics = [{k: v for k, v in upload.arrays.items() if k not in sent} for upload in uploads]
        return {
            **before,  # in its order
            **{name.split("/", 1)[1]: torch.from_numpy(value) for name, value in sent.items()},
            **mean_weights(statistics, shares),
        }

    def accept(self, family: str) -> None:
        """The round counts: where its weights are of no use, its strategy forgets it, too."""
        self.held[family] = self.next_held[family]

    def _given(self, family: str) -> ArrayRecord:
        """The family's trained weights, as exact as its strategy returned them."""
        given = _only(self.arrays, self.trained[family])
        returned = self.held[family].returned
        if returned is None or not all(
            np.array_equal(read_array(name, returned[name]).astype(own.dtype), read_array(name, own))
            for name, own in given.items()
        ):
            return given  # or they are not what it returned, but somebody else's
        return returned

    @contextmanager
    def _drawing(self, family: str, what: str) -> Iterator[None]:
        with seeded_globals(self.server.seed, f"{self.name} {what}/{family}", self.round_num), _quiet(logging.WARNING):
            yield

    # --- before the run ---
    def _most_replies(self) -> dict[str, int]:
        """The most replies that a round can have, for the families that train."""
        cohort = self.server.cohort_size or self.server.num_trainers
        numbers = {family: self.server.num_trainers_of.get(family, 0) for family in self.server.client_families}
        return {family: min(cohort, number) for family, number in numbers.items() if number > 0}

    def _check_rehearsal(self, family: str, most: int) -> None:
        """Raise `ConfigError` unless two rounds with `most` replies work and leave a state that can be kept."""
        try:
            strategy = self._rehearse(most)
        except TooFewError as error:
            needed = next((n for n in range(most + 1, MOST_REPLIES) if self._works_with(n)), None)
            raise ConfigError(
                f"{self.name} cannot work with {family}, of which a round has at most {most} replies: {error}. "
                f"{f'It needs {needed}. ' if needed else ''}Raise federation.num_clients or federation.cohort_size, "
                f"name fewer federation.families, or change strategy.server.strategy."
            ) from error
        pack_strategy(strategy, self.pattern, self.name, {})

    def _works_with(self, num_replies: int) -> bool:
        try:
            self._rehearse(num_replies)
        except TooFewError:
            return False
        return True

    def _rehearse(self, num_replies: int) -> Strategy:
        """Two rounds of a copy on a few numbers; `TooFewError`, or `ConfigError` for what never works."""
        strategy = copy.deepcopy(self.pattern)
        weights = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "scale": np.array(1, np.float32)}
        try:
            with seeded_globals(self.server.seed, "rehearsal"), _quiet(logging.CRITICAL):
                for round_num in (1, 2):
                    messages = ask(strategy, round_num, to_record(weights), {}, range(1, num_replies + 1))
                    unread = [k for m in messages.values() for k in _told(m) if k not in self.client_reads]
                    if unread:
                        raise ConfigError(
                            f"{self.name} tells clients {', '.join(dict.fromkeys(unread))}, which the client half "
                            f"does not read, so it would change nothing. Name a client half that reads it from "
                            f"Broadcast.config, and the entry in strategy.server.client_reads."
                        )
                    answers = [
                        (
                            message,
                            {name: np.asarray(value + np.float32(0.1 * node)) for name, value in weights.items()},
                            {"num-examples": 9.0 + node, **dict.fromkeys(self.metrics, 1.0)},
                        )
                        for node, message in messages.items()
                    ]
                    merged = combine(strategy, round_num, answers)
                    if merged.keys() != weights.keys() or any(merged[n].shape != w.shape for n, w in weights.items()):
                        raise ConfigError(f"{self.name} does not return the weights that it was given")
                    weights = {name: np.asarray(merged[name], value.dtype) for name, value in weights.items()}
        except (ConfigError, TooFewError):
            raise
        except Exception as error:
            raise ConfigError(
                f"{self.name} does not work here: {type(error).__name__}: {error}. See strategy.server.strategy, and "
                f"for numbers that it reads of clients strategy.server.metrics."
            ) from error
        return strategy

    # --- its state ---
    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the strategies have become."""
        state = super().state_dict()
        for family, held in self.held.items():
            tree = {
                "strategy": pack_strategy(held.strategy, self.pattern, self.name, state),
                "returned": pack(held.returned, f"{self.name}.returned", state),
            }
            state[family] = torch.frombuffer(bytearray(json.dumps(tree).encode()), dtype=torch.uint8)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""
        super().load_state_dict(state)
        for family in self.held:
            tree = json.loads(bytes(state[family].numpy()))
            strategy = copy.deepcopy(self.pattern)
            unpack_strategy(strategy, tree["strategy"], state)
            self.held[family] = Held(strategy=strategy, returned=unpack(tree["returned"], state))

    def notes(self) -> list[str]:
        """As `PerFamily`; and where a choice between clients is none."""
        pairs = [family for family, most in self._most_replies().items() if most == 2]
        if not hasattr(self.pattern, "num_malicious_nodes"):
            pairs = []
        return super().notes() + [
            f"{family} has two replies a round, each as far from the other: {self.name}'s choice is that of their order"
            for family in pairs
        ]


# --- talking to a strategy ---------------------------------------------------------------------------------------
class TooFewError(Exception):
    """The strategy can make nothing of so few replies."""


class _Cohort:
    """All that a strategy may ask of a grid: which nodes there are."""

    def __init__(self, node_ids: Iterable[int]) -> None:
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> list[int]:
        return list(self._node_ids)


def ask(
    strategy: Strategy, round_num: int, arrays: ArrayRecord, config: Mapping[str, Any], node_ids: Iterable[int]
) -> dict[int, Message]:
    """The strategy's messages to those of `node_ids` that it chooses, by node."""
    grid = cast(Grid, _Cohort(node_ids))
    messages = list(strategy.configure_train(round_num, arrays, ConfigRecord({**config}), grid))
    for message in messages:
        stamp(message, str(message.metadata.dst_node_id))  # replies name it
        if message.content is not messages[0].content or [*message.content.array_records.values()] != [arrays]:
            raise ConfigError(f"{type(strategy).__name__} sends clients something else than the weights")
    return {message.metadata.dst_node_id: message for message in messages}


Answer = tuple[Message, Mapping[str, np.ndarray], Mapping[str, float]]  # to which message, weights, metrics


def combine(strategy: Strategy, round_num: int, answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    """What the strategy makes of the answers to its messages; `TooFewError` where that is nothing.

    Where it is told a number f of malicious clients, fewer than 2f + 3 answers are too few: no choice is safe then
    (Blanchard et al. 2017, https://arxiv.org/abs/1703.02757, Definition 3 and Proposition 4: 2f + 2 < n). Flower goes
    on and chooses.
    """
    malicious = getattr(strategy, "num_malicious_nodes", 0)
    if malicious < 0:
        raise ConfigError(f"num_malicious_nodes must be at least 0, got {malicious}")
    if malicious and len(answers) < 2 * malicious + 3:
        raise TooFewError(f"{malicious} malicious clients cannot be told apart among fewer than {2 * malicious + 3}")
    replies = [
        Message(RecordDict({"arrays": to_record(arrays), "metrics": MetricRecord(dict(metrics))}), reply_to=message)
        for message, arrays, metrics in answers
    ]
    with keep_start():  # Bulyan and QFedAvg collect garbage at least once a reply (`keep_input=False`), 0.2 s each
        merged, _ = strategy.aggregate_train(round_num, replies)
    if merged is None:
        raise TooFewError(f"it makes nothing of {len(answers)} replies")
    return {name: read_array(name, array) for name, array in merged.items()}


def _told(message: Message) -> dict[str, Any]:
    return {k: v for record in message.content.config_records.values() for k, v in record.items() if k != ROUND}


def _only(arrays: ArrayRecord, names: Iterable[str]) -> ArrayRecord:
    part = ArrayRecord()
    for name in names:
        part[name] = arrays[name]  # the constructor would copy
    return part


def _take_everyone(strategy: Strategy) -> None:
    """Let it take all nodes that it is shown; refuse settings of its own about who takes part."""
    parameters = inspect.signature(type(strategy)).parameters
    for name in (*EVERYONE, *NOT_ASKED):
        value = vars(strategy).get(name)
        if name in parameters and value != parameters[name].default:
            decides = "nobody: the server evaluates its weights" if name in NOT_ASKED else "federation.cohort_size"
            raise ConfigError(
                f"strategy.server.strategy.{name}={value} would decide what is decided by {decides}. Leave it out."
            )
        if name in EVERYONE and value is not None:
            setattr(strategy, name, EVERYONE[name])
    for value in vars(strategy).values():
        if isinstance(value, Strategy):
            _take_everyone(value)


def _trained(server: Server, family: str) -> list[str]:
    """The family's trained weights, `<family>/<parameter>`, in the model's order, whatever a record's is."""
    parameters = server.build_model(family).named_parameters()
    return [f"{family}/{name}" for name, value in parameters if value.requires_grad and value.is_floating_point()]


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Inside, Flower's logger shows nothing below `level`: it tells of every sampling."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- keeping a strategy ------------------------------------------------------------------------------------------
def pack_strategy(strategy: Strategy, pattern: Strategy, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What has changed in `strategy` since it was `pattern`, as JSON, its arrays in `tensors`."""
    packed = {}
    for name, value in vars(strategy).items():
        before = vars(pattern).get(name)
        if isinstance(value, Strategy) and isinstance(before, Strategy):
            packed[name] = ["Strategy", pack_strategy(value, before, f"{where}.{name}", tensors)]
        elif value is not before:  # a copy has the same numbers, text and functions
            packed[name] = pack(value, f"{where}.{name}", tensors)
    return packed


def unpack_strategy(strategy: Strategy, packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make `strategy`, a copy of the pattern, what it was."""
    for name, tree in packed.items():
        if isinstance(tree, list) and tree[0] == "Strategy":
            unpack_strategy(vars(strategy)[name], tree[1], tensors)
        else:
            setattr(strategy, name, unpack(tree, tensors))


def pack(value: object, where: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, its arrays in `tensors`.

    Numbers, text, arrays, Flower's array records, and lists, tuples and dictionaries of them; anything else is a
    `ConfigError` that says where it is.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        name = f"{len(tensors)}/{where}"
        tensors[name] = torch.from_numpy(np.array(value, order="C"))
        return ["scalar" if isinstance(value, np.generic) else "array", name]
    if isinstance(value, Array):
        return ["Array", pack(read_array(where, value), where, tensors)]
    if isinstance(value, ArrayRecord):
        return ["ArrayRecord", [[k, pack(v, f"{where}.{k}", tensors)] for k, v in value.items()]]
    if type(value) is dict and all(type(k) in (int, str) for k in value):
        return ["dict", [[k, pack(v, f"{where}.{k}", tensors)] for k, v in value.items()]]
    if type(value) in (list, tuple):
        values = cast(Sequence[object], value)
        return [type(value).__name__, [pack(v, f"{where}[{i}]", tensors) for i, v in enumerate(values)]]
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot keep, so the run could not be resumed. "
        f"Kept are numbers, text, arrays and lists and dictionaries of them."
    )


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `pack`."""
    if not isinstance(tree, list):
        return tree
    kind, content = tree
    return _UNPACK[kind](content, tensors)


_UNPACK: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "scalar": lambda name, tensors: tensors[name].numpy()[()],
    "array": lambda name, tensors: tensors[name].numpy().copy(),
    "Array": lambda tree, tensors: write_array(unpack(tree, tensors)),
    "ArrayRecord": lambda items, tensors: ArrayRecord({k: unpack(tree, tensors) for k, tree in items}),
    "dict": lambda items, tensors: {k: unpack(tree, tensors) for k, tree in items},
    "list": lambda trees, tensors: [unpack(tree, tensors) for tree in trees],
    "tuple": lambda trees, tensors: tuple(unpack(tree, tensors) for tree in trees),
}
