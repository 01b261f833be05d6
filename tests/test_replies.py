"""A run that is killed within a round trains nobody again whose reply was kept, and ends as one that was left alone."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

import fedssl
from fedssl.errors import ConfigError
from fedssl.federation import flower_compat, simulation
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload, num_bytes
from fedssl.federation.replies import KeptReplies, stated_seconds
from fedssl.federation.store import ClientStore
from tests.federation_helpers import ON_RAY, final_arrays, rows, small
from tests.federation_helpers import assert_same as assert_same_arrays
from tests.test_simulation import assert_same_run

KILLED = """
import json, os, signal, sys
import torch
from pathlib import Path
torch.set_num_threads(1)
from fedssl.federation import simulation
from fedssl.federation.replies import KeptReplies

keep = KeptReplies.keep
def keep_and_die(self, partition_id, message, reply):
    keep(self, partition_id, message, reply)
    if self.round_num == 2 and len(list(self.root.iterdir())) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
KeptReplies.keep = keep_and_die
simulation.run(json.loads(Path(sys.argv[1]).read_text()))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """A client half that writes down whom it has trained."""

    inner: Any
    path: str

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        with Path(self.path).open("a") as file:
            file.write(f"{client.round_num} {client.partition_id}\n")
        upload: Upload = self.inner(client, broadcast)
        return upload

    def evaluate(self, client: Client, broadcast: Broadcast) -> dict[str, float]:
        metrics: dict[str, float] = self.inner.evaluate(client, broadcast)
        return metrics


def counted(run_dir: Path, *overrides: str) -> dict[str, Any]:
    config = small(run_dir, "federation.keep_replies_after=0", *overrides)
    config["strategy"]["client"] = {
        "_target_": "tests.test_replies.Counted",
        "inner": config["strategy"]["client"],
        "path": str(run_dir.with_suffix(".trained")),
    }
    return config


def trained(run_dir: Path) -> list[tuple[int, int]]:
    lines = run_dir.with_suffix(".trained").read_text().split("\n")[:-1]
    return [(int(round_num), int(partition)) for round_num, partition in map(str.split, lines)]


def kill(config: dict[str, Any], after: int) -> list[int]:
    """Run until so many replies of round 2 are kept, then kill -9; whose they are."""
    run_dir = Path(config["run_dir"])
    described = run_dir.with_suffix(".json")
    described.write_text(json.dumps(config))
    command = [sys.executable, "-c", KILLED, str(described), str(after)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    names = sorted(path.name for path in (run_dir / "checkpoints" / "replies").iterdir())
    assert all(name.startswith("00002-") for name in names)
    return [int(name.removeprefix("00002-").removesuffix(".reply")) for name in names]


@pytest.mark.parametrize(
    ("strategy", "after"),
    [
        ("flesd", 1),
        pytest.param("fedavg", 3, marks=pytest.mark.slow),
        pytest.param("fedema", 2, marks=pytest.mark.slow),
    ],
)
def test_after_a_kill_the_round_goes_on_with_the_clients_that_had_not_answered(
    strategy: str, after: int, tmp_path: Path
) -> None:
    """FedEMA's clients have a memory beside their reply."""
    overrides = (f"strategy={strategy}",)
    config = counted(tmp_path / "killed", *overrides)
    assert kill(config, after) == list(range(after))
    before = len(trained(tmp_path / "killed"))
    simulation.resume(config, tmp_path / "killed")
    assert trained(tmp_path / "killed")[before:] == [(2, partition) for partition in range(after, 4)]

    fedssl.run(counted(tmp_path / "straight", *overrides))
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")  # the bytes, each client's once, no failures
    stores = [ClientStore(tmp_path / name / "clients") for name in ("killed", "straight")]
    for partition in range(4):
        left, right = ([*store.versions(partition)] for store in stores)
        assert left == right
        for version in left:
            left_memory, right_memory = (store.read(partition, before=version + 1) for store in stores)
            assert {k: v.numpy().tobytes() for k, v in left_memory.items()} == {
                k: v.numpy().tobytes() for k, v in right_memory.items()
            }
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == ["00001", "00002"]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("strategy", ["flesd", pytest.param("fedavg", marks=pytest.mark.slow)])
def test_after_a_kill_on_ray(strategy: str, tmp_path: Path) -> None:
    overrides = (f"strategy={strategy}",)
    waits = "grid.batch_seconds=60"  # an idle worker takes nothing over from another, who would do it nevertheless
    config = counted(tmp_path / "killed", *overrides, *ON_RAY, waits)
    answered = kill(config, 2)
    assert len(answered) == 2
    before = len(trained(tmp_path / "killed"))
    simulation.resume(config, tmp_path / "killed")
    others = {(2, partition) for partition in range(4) if partition not in answered}
    again = trained(tmp_path / "killed")[before:]
    assert {*again} == others
    assert len(again) <= len(others) + 2  # the killed run's two workers may begin one each before they end
    fedssl.run(counted(tmp_path / "straight", *overrides))
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")


def test_the_seconds_of_a_round_are_those_of_all_its_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path / "run", "strategy=fedavg", "federation.keep_replies_after=0", "evaluate.every=9")
    keep = KeptReplies.keep

    def keep_then_stop(self: KeptReplies, partition_id: int, message: Message, reply: Message) -> None:
        self.started -= 1000  # a long round
        keep(self, partition_id, message, reply)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptReplies, "keep", keep_then_stop)
        with pytest.raises(KeyboardInterrupt):
            fedssl.run(config)
    with monkeypatch.context() as patch:
        patch.setattr(KeptReplies, "keep", keep_then_stop)
        with pytest.raises(KeyboardInterrupt):
            simulation.resume(config, tmp_path / "run")
    summary = simulation.resume(config, tmp_path / "run")
    assert 2000 < summary["wall_seconds"] < 2100


def test_short_work_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: KeptReplies, *_: Any) -> None:
        raise AssertionError("written")

    monkeypatch.setattr(flower_compat, "records_to_bytes", refuse)
    assert small(None)["federation"]["keep_replies_after"] == 30
    fedssl.run(small(tmp_path / "run", "strategy=fedavg", "federation.num_rounds=1", "evaluate.every=9"))
    fedssl.run(
        small(tmp_path / "none", "strategy=fedavg", "federation.keep_replies_after=null", "federation.num_rounds=1")
    )


def test_negative_seconds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation.keep_replies_after is in seconds and must be >= 0 .* got -1"):
        fedssl.run(small(tmp_path / "run", "federation.keep_replies_after=-1"))


# --- one reply --------------------------------------------------------------------------------------------------------
def message(value: float = 1.0, told: int = 3) -> Message:
    flower_compat.identify_process()
    arrays = ArrayRecord({"w": Array(np.full(5, value, np.float32))})
    return Message(RecordDict({"arrays": arrays, "config": ConfigRecord({"round": told})}), 1002, "train")


def reply_to(sent: Message, seconds: float = 40.0) -> Message:
    arrays = ArrayRecord({"half": Array(np.float16([1.5, -2])), "none": Array(np.zeros((0, 3)))})
    arrays["view"] = Array("float32", (2,), "numpy.ndarray", b"")
    arrays["view"].__dict__["data"] = memoryview(b"as Ray hands out large ones")
    metrics = MetricRecord({"seconds": seconds, "distill_seconds": 5.0, "num-examples": 7, "curve": [0.1, 1e300]})
    header = ConfigRecord({"family": "tiny", "round_num": 2, "ok": True, "raw": b"\x00\xff", "names": ["a", ""]})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics, "header": header}), reply_to=sent)


def kept(root: Path, after: float | None = 30, **changed: Any) -> KeptReplies:
    replies = KeptReplies(
        root / "replies", config=small(None) | changed, after=after, store=ClientStore(root / "clients")
    )
    replies.begin(2)
    return replies


def test_what_is_served_is_what_was_kept(tmp_path: Path) -> None:
    sent = message()
    reply = reply_to(sent)
    kept(tmp_path).keep(2, sent, reply)
    again = message()  # of another sitting
    served = kept(tmp_path).serve(2, again)
    assert served is not None
    assert served.metadata.src_node_id == 1002
    assert num_bytes(served) == num_bytes(reply)
    assert served.content.keys() == reply.content.keys()
    for name, record in reply.content.items():
        other = served.content[name]
        assert type(other) is type(record)
        assert list(other) == list(record)
        if not isinstance(record, ArrayRecord):
            assert repr(dict(other)) == repr(dict(record))
    for name, array in reply.content.array_records["arrays"].items():
        other = served.content.array_records["arrays"][name]
        assert (other.dtype, tuple(other.shape), other.stype) == (array.dtype, tuple(array.shape), array.stype)
        assert bytes(other.data) == bytes(array.data)


@pytest.mark.parametrize(("after", "seconds", "stays"), [(45, 40.0, True), (46, 40.0, False), (None, 1e9, False)])
def test_the_threshold_is_the_work_that_the_client_states(
    after: float | None, seconds: float, stays: bool, tmp_path: Path
) -> None:
    reply = reply_to(message(), seconds)
    if seconds == 40.0:
        assert stated_seconds(reply) == 45
    kept(tmp_path, after).keep(2, message(), reply)
    assert (kept(tmp_path).serve(2, message()) is not None) == stays


def test_a_reply_without_metrics_states_nothing() -> None:
    sent = message()
    assert stated_seconds(Message(RecordDict({}), reply_to=sent)) == 0
    lies = MetricRecord({"seconds": float("nan"), "a_seconds": -1.0, "b_seconds": float("inf")})
    assert stated_seconds(Message(RecordDict({"metrics": lies}), reply_to=sent)) == 0


def test_a_reply_to_something_else_is_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(tmp_path).keep(2, message(), reply_to(message()))
    path = tmp_path / "replies" / "00002-2.reply"
    path.with_name("00002-3.reply").write_bytes(path.read_bytes())
    path.with_name("00003-2.reply").write_bytes(path.read_bytes())
    later = kept(tmp_path)
    later.begin(3)
    for replies, partition, sent in (
        (kept(tmp_path), 2, message(value=1.5)),
        (kept(tmp_path), 2, message(told=4)),
        (kept(tmp_path), 3, message()),
        (kept(tmp_path, seed=1), 2, message()),
        (later, 2, message()),
    ):
        caplog.clear()
        assert replies.serve(partition, sent) is None
        assert "it answers another message, or is of a run with other settings" in caplog.text
    assert kept(tmp_path, run_dir="moved", device="cuda", max_seconds=3).serve(2, message()) is not None
    caplog.clear()
    assert kept(tmp_path).serve(1, message()) is None
    assert caplog.text == ""  # there is none


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"\x80\x04K\x01.\n",
        lambda data: b"[1]\n" + data,
        lambda data: b"{}\n",
        lambda data: data[:-1],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b'"memory": false', b'"memory": "?"'),
        lambda data: data.replace(b"elapsed_seconds", b"elapsed"),
        lambda data: data.replace(b'"elapsed_seconds": ', b'"elapsed_seconds": 1000000'),
    ],
)
def test_a_damaged_file_is_named_and_not_used(damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(tmp_path).keep(2, message(), reply_to(message()))
    path = tmp_path / "replies" / "00002-2.reply"
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path).serve(2, message()) is None
    assert f"the kept reply {path} is not used, its client trains again" in caplog.text


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    kept(tmp_path).keep(2, message(), reply_to(message()))
    half = tmp_path / "replies" / ".00002-3.reply.4711"
    half.write_bytes(b"half")
    assert kept(tmp_path).serve(2, message()) is not None
    assert [path.name for path in half.parent.iterdir()] == ["00002-2.reply"]


def test_bytes_that_are_no_records() -> None:
    with pytest.raises(ValueError, match="no records of Flower's"):
        flower_compat.records_from_bytes(b"\xff\xff\xff")


def test_a_reply_without_the_memory_beside_it_is_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where client.store= was on a disk that is gone."""
    store = ClientStore(tmp_path / "clients")
    store.write(2, 2, {})
    kept(tmp_path).keep(2, message(), reply_to(message()))
    assert kept(tmp_path).serve(2, message()) is not None
    (tmp_path / "clients" / "2" / "2.safetensors").unlink()
    assert kept(tmp_path).serve(2, message()) is None
    assert "what its client kept beside it is not in" in caplog.text


def test_a_reply_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "replies").write_text("a file where the folder should be")
    kept(tmp_path).keep(2, message(), reply_to(message()))
    assert "the reply of partition 2 in round 2 is not kept" in caplog.text
    (tmp_path / "replies").unlink()
    monkeypatch.setattr("fedssl.federation.replies.MAX_BYTES", 10)
    kept(tmp_path).keep(2, message(), reply_to(message()))
    assert "at most 10 are kept" in caplog.text
    assert not (tmp_path / "replies").exists()


def test_no_reply_outlives_its_round(tmp_path: Path) -> None:
    fedssl.run(small(tmp_path / "run", "strategy=fedavg", "federation.keep_replies_after=0", "evaluate.every=9"))
    assert not (tmp_path / "run" / "checkpoints" / "replies").exists()
    fedssl.run(small(tmp_path / "plain", "strategy=fedavg", "evaluate.every=9"))
    assert_same_arrays(final_arrays(tmp_path / "run"), final_arrays(tmp_path / "plain"))
