"""Everything internal of Flower that the simulation needs, in one place; tested against the pinned minor version.

Public Flower code creates messages inside a SuperLink or a SuperNode, which give every process an identity and every
message an id. Our grids play both roles, so they have to do the same by hand.
"""

import gc
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

RUN_ID = 1
SERVER_NODE_ID = 1  # what Flower calls the SuperLink

UNKNOWN = 0  # flwr.common.constant.ErrorCode.UNKNOWN: Flower's engine, of an actor that died
CLIENT_RAISED = 2  # CLIENT_APP_RAISED_EXCEPTION
NODE_UNAVAILABLE = 5  # of a node that left
CLIENT_CRASHED = 8  # CLIENT_APP_CRASHED: its process died

CLIENTAPP_COMMAND, SERVERAPP_COMMAND = "flwr-clientapp", "flwr-serverapp"  # what runs a task

LARGE_BYTES = 1 << 18  # arrays from this size on travel outside the pickle, without a copy

Record = ArrayRecord | MetricRecord | ConfigRecord


def identify_process() -> None:
    """Let this process create messages: without an identity, `Message(...)` raises. A set identity is kept."""
    for name, value in (("run_id", RUN_ID), ("task_id", RUN_ID), ("node_id", SERVER_NODE_ID)):
        if getattr(TaskIdentity, f"_{name}") is None:
            setattr(TaskIdentity, name, value)


def send_no_telemetry() -> None:
    """Where the environment does not say otherwise: Flower reads it once, when it is imported."""
    if "FLWR_TELEMETRY_ENABLED" not in os.environ:
        telemetry.FLWR_TELEMETRY_ENABLED = "0"


def empty_run() -> Run:
    """A run without an app bundle, with the id of this process."""
    return Run.create_empty(TaskIdentity.run_id)


def stamp(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will name in `metadata.reply_to_message_id`."""
    message.metadata.__dict__["_message_id"] = message_id


@dataclass(frozen=True, kw_only=True)
class Summed:
    """That a reply's weights were added to a sum.

    Args:
        num_bytes: of the whole reply.
        partitions: whose weights are in the sum, of the reply that carries it.
    """

    num_bytes: int
    partitions: tuple[int, ...] = ()


def note_sum(reply: Message, summed: Summed) -> None:
    """Note this at the reply.

    It is no part of the content: it goes from process to process of one simulation, and nobody can send it.
    """
    reply.__dict__["_summed"] = summed


def noted_sum(reply: Message) -> Summed | None:
    """What `note_sum` noted; None of a whole reply."""
    noted: Summed | None = reply.__dict__.get("_summed")
    return noted


def rebuild(metadata: Metadata, content: RecordDict) -> Message:
    """The message with exactly this metadata: what the receiver of a stamped message holds."""
    return Message(content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def error_reply(message: Message, code: int, reason: str) -> Message:
    """A reply that carries no content, only `code` and `reason`."""
    return Message(Error(code, reason), reply_to=message)


def array_record(arrays: Mapping[str, tuple[str, tuple[int, ...], str, bytes]]) -> ArrayRecord:
    """Arrays by name: dtype, shape, stype and data, of these types; `Array` takes 20 us to look at them."""
    record = ArrayRecord()
    for name, (dtype, shape, stype, data) in arrays.items():
        array = object.__new__(Array)
        array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data, _is_dirty=True)
        record[name] = array
    return record


def make_context(node_id: int, node_config: Mapping[str, Any], state: RecordDict) -> Context:
    """What a client app gets beside the message; `node_config` holds "partition-id" and "num-partitions"."""
    return Context(TaskIdentity.run_id, node_id, dict(node_config), state, {})


def private_copy(records: RecordDict) -> RecordDict:
    """New dictionaries around the same arrays and numbers: adding or replacing entries touches no other holder."""
    copy = records.copy()
    entries = copy.__dict__["_data"]  # past the type checks, which these records have already met
    for name, record in entries.items():
        entries[name] = record.copy()
    return copy


def records_to_bytes(records: RecordDict) -> bytes:
    """As Flower sends them, in protocol buffers: no pickle, for files that outlive the process; at most 2 GiB."""
    whole = RecordDict()
    for name, record in records.items():
        whole[name] = _with_bytes(record) if isinstance(record, ArrayRecord) else record
    data: bytes = recorddict_to_proto(whole).SerializeToString()
    return data


def records_from_bytes(data: bytes) -> RecordDict:
    """Undo `records_to_bytes`; `ValueError` for anything else."""
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(data))
    except (DecodeError, TypeError) as error:
        raise ValueError(f"these are no records of Flower's: {error}") from error


def _with_bytes(record: ArrayRecord) -> ArrayRecord:
    """Arrays whose data are bytes; what came through shared memory has views."""
    return array_record({name: (a.dtype, a.shape, a.stype, bytes(a.data)) for name, a in record.items()})


def num_bytes(record: Record) -> int:
    """Bytes of the arrays of a record; metrics and configuration values count as nothing."""
    return sum(len(array.data) for array in record.values()) if isinstance(record, ArrayRecord) else 0


def dumps(value: Any) -> tuple[bytes, list[np.ndarray]]:
    """Pickle records so that large arrays leave the pickle: `loads(*dumps(value)) == value`.

    Only for messages between processes of one simulation. Each large array is returned as a uint8 view of its
    buffer; what carries such views through shared memory (Ray does) copies nothing.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = BytesIO()
    pickler = pickle.Pickler(file, protocol=5, buffer_callback=buffers.append)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(value)
    return file.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def loads(data: bytes, buffers: Sequence[np.ndarray]) -> Any:
    """Undo `dumps`. The `data` of large arrays is then a read-only memoryview, of small ones bytes, as always."""
    collects = gc.isenabled()
    gc.disable()  # many new objects, no garbage among them: the collector made this six times slower
    try:
        return pickle.loads(data, buffers=buffers)
    finally:
        if collects:
            gc.enable()


def _reduce_array(array: Array) -> tuple[Any, ...]:
    data = array.data
    large = len(data) >= LARGE_BYTES
    return _restore_array, (array.dtype, array.shape, array.stype, pickle.PickleBuffer(data) if large else bytes(data))


def _restore_array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    array = Array.__new__(Array)  # past the constructor, which insists on bytes
    data = data if isinstance(data, bytes) else memoryview(data).toreadonly()
    array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return array


_REDUCERS: dict[type, Any] = {Array: _reduce_array}


def serve_installed_app(app: Any) -> None:
    """Make Flower's `flwr-clientapp` command of this process call `app`, and no code that a SuperLink sends.

    By itself it unpacks the bundle that comes with a run and imports what that names.
    """
    from flwr.supernode.runtime import run_clientapp

    vars(run_clientapp).update(
        install_from_fab=lambda *_, **__: None,
        get_load_client_app_fn=lambda **_: lambda *_: app,
    )


def task_commands() -> list[str]:
    """The commands that a SuperNode or a SuperLink starts for a task, found on the PATH."""
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    return sorted(set(TASK_TYPE_TO_COMMAND.values()))
