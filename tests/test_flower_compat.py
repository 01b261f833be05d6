"""The internal Flower names that the grids rely on still mean what they meant."""

import importlib.metadata

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedssl.federation import flower_compat


@pytest.fixture(autouse=True)
def identity() -> None:
    flower_compat.identify_process()


def records(num_values: int) -> RecordDict:
    arrays = ArrayRecord({"w": Array(np.arange(num_values, dtype=np.float32)), "b": Array(np.float16([1.5]))})
    return RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord({"loss": [0.5, 1.5]}),
            "header": ConfigRecord({"round": 3, "x": b"1"}),
        }
    )


def test_the_installed_flower_is_one_that_was_checked() -> None:
    assert importlib.metadata.version("flwr").rsplit(".", 1)[0] in {"1.41", "1.42"}


def test_constants_are_flowers() -> None:
    assert flower_compat.UNKNOWN == ErrorCode.UNKNOWN
    assert flower_compat.CLIENT_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert flower_compat.CLIENT_CRASHED == ErrorCode.CLIENT_APP_CRASHED
    assert flower_compat.SERVER_NODE_ID == SUPERLINK_NODE_ID


def test_a_process_without_identity_cannot_create_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="not set"):
        Message(RecordDict(), 7, "train")
    flower_compat.identify_process()
    message = Message(RecordDict(), 7, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id) == (flower_compat.RUN_ID, SUPERLINK_NODE_ID)
    assert flower_compat.empty_run().run_id == flower_compat.RUN_ID


def test_an_identity_that_flower_gave_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskIdentity, "_run_id", 42)
    flower_compat.identify_process()
    assert TaskIdentity.run_id == 42


def test_replies_name_the_stamped_message() -> None:
    message = Message(records(4), 7, "train")
    flower_compat.stamp(message, "m1")
    received = flower_compat.rebuild(message.metadata, message.content)
    reply = Message(RecordDict(), reply_to=received)
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == ("m1", 7)
    failed = flower_compat.error_reply(received, flower_compat.CLIENT_RAISED, "ValueError: no")
    assert failed.has_error()
    assert (failed.error.code, failed.error.reason) == (2, "ValueError: no")
    assert failed.metadata.reply_to_message_id == "m1"


@pytest.mark.parametrize("num_values", [0, 10, flower_compat.LARGE_BYTES // 4, flower_compat.LARGE_BYTES])
def test_records_survive_the_way_between_processes(num_values: int) -> None:
    """Flower's content hash is the same, so nothing that Flower itself looks at has changed."""
    original = records(num_values)
    data, views = flower_compat.dumps(original)
    assert bool(views) == (num_values * 4 >= flower_compat.LARGE_BYTES)
    restored = flower_compat.loads(data, [np.frombuffer(view.tobytes(), np.uint8) for view in views])
    assert restored.object_id == original.object_id
    np.testing.assert_array_equal(restored["arrays"]["w"].numpy(), original["arrays"]["w"].numpy())
    assert len(restored["arrays"]["w"].data) == len(original["arrays"]["w"].data)
    again = flower_compat.loads(*flower_compat.dumps(restored))  # a client may send back what it got
    assert again.object_id == original.object_id


def test_large_arrays_are_not_copied() -> None:
    array = Array(np.zeros(flower_compat.LARGE_BYTES, np.uint8))
    data, views = flower_compat.dumps({"w": array})
    assert len(data) < 1000
    assert np.shares_memory(views[0], np.frombuffer(array.data, np.uint8))
    restored = flower_compat.loads(data, views)["w"]
    assert np.shares_memory(views[0], np.frombuffer(restored.data, np.uint8))
    assert not np.frombuffer(restored.data, np.uint8).flags.writeable


def test_a_private_copy_shields_the_original() -> None:
    original = records(4)
    copy = flower_compat.private_copy(original)
    copy["header"]["round"] = 9
    copy["arrays"]["more"] = Array(np.zeros(1))
    del copy["metrics"]
    assert original["header"]["round"] == 3
    assert set(original["arrays"]) == {"w", "b"}
    assert "metrics" in original
    assert copy["arrays"]["w"] is original["arrays"]["w"]  # the arrays themselves are shared


def test_bytes_are_those_of_flower() -> None:
    original = records(100)
    assert flower_compat.num_bytes(original["arrays"]) == original["arrays"].count_bytes() - len("w") - len("b")
    assert flower_compat.num_bytes(original["header"]) == 0
