"""Simulated devices: seconds by hand, the same draws for everybody, a deadline that drops exactly the slow ones."""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Message
from safetensors.torch import load_file, save_file

import fedssl
from fedssl.__main__ import main
from fedssl.config import compose, fill_in, instantiate
from fedssl.errors import ConfigError, PayloadError, TooFewRepliesError
from fedssl.federation import simulation
from fedssl.federation.checkpoint import Checkpoints
from fedssl.federation.devices import Devices
from fedssl.federation.records import Upload
from fedssl.federation.roster import Member
from fedssl.federation.rounds import Failure, gather
from fedssl.federation.setup import Setup
from fedssl.report.runs import read_run
from fedssl.seeding import numpy_generator
from tests.federation_helpers import (
    ONE_OF_EACH_KIND,
    WITH_CLIENTS,
    assert_same,
    final_arrays,
    open_in_process,
    rows,
    run_interrupted,
    sabotaged,
    slow_unless,
    small,
)
from tests.test_gather import Scripted, messages, partitions_of

DEVICES = Devices(
    uplink_mbps=2.0,
    downlink_mbps=8.0,
    latency_s=0.5,
    images_per_second=100.0,
    stragglers=0.0,
    straggler_slowdown=3.0,
    availability=1.0,
    deadline_s=None,
    idle_s=60.0,
)
NODE = "federation.devices."
QUICK = ("federation.num_clients=8", "data.num_images=200", "evaluate.every=9", "federation.num_rounds=3")


def raw_rows(run_dir: Path, scope: str) -> list[dict[str, Any]]:
    """Seconds included."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["scope"] == scope]


# --- seconds by hand ---
@pytest.mark.parametrize(
    ("straggler", "speed", "expected"),
    [
        (False, 100.0, 0.5 + (1 + 2 + 3)),  # 8 Mbit at 8, 4 Mbit at 2, 300 views at 100
        (True, 100.0, 0.5 + 3 * (1 + 2 + 3)),
        (False, None, 0.5 + (1 + 2 + 7)),  # as measured: 5 s and 2 s
        (False, {"tiny": 50.0, "conv4_4": 1.0}, 0.5 + (1 + 2 + 6)),
    ],
)
def test_seconds_are_latency_links_and_compute(straggler: bool, speed: Any, expected: float) -> None:
    metrics = {
        "image_passes": 200.0,
        "distill_image_passes": 100.0,
        "seconds": 5.0,
        "distill_seconds": 2.0,
        "report_seconds": 99.0,
        "report_image_passes": 99.0,
        "loss": 9.0,
    }
    devices = dataclasses.replace(DEVICES, images_per_second=speed)
    seconds = devices.seconds(
        downlink_bytes=1_000_000, uplink_bytes=500_000, metrics=metrics, family="tiny", straggler=straggler
    )
    assert seconds == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_seconds_that_cannot_be_are_refused(value: float) -> None:
    """A client could make the round's time NaN, or come early by a negative effort."""
    for speed, name in ((100.0, "distill_image_passes"), (None, "seconds")):
        devices = dataclasses.replace(DEVICES, images_per_second=speed)
        with pytest.raises(PayloadError, match=f"it declares {name}="):
            devices.seconds(downlink_bytes=1, uplink_bytes=1, metrics={name: value}, family="tiny", straggler=False)


@pytest.mark.parametrize(
    ("deadline_s", "asked", "answered", "expected"),
    [
        (None, 3, [1.0, 4.0, 2.0], 4.0),
        (None, 3, [1.0, 2.0], 2.0),  # one has crashed: until the others are done
        (None, 2, [], 60.0),
        (None, 0, [], 60.0),
        (3.0, 3, [1.0, 2.0, 3.0], 3.0),  # in time to the second
        (3.0, 2, [1.0, 2.0], 2.0),  # nobody is waited for any longer
        (3.0, 3, [1.0, 2.0, 4.0], 3.0),  # one is late
        (3.0, 3, [1.0, 2.0], 3.0),  # one has crashed, and nobody told the server
        (3.0, 2, [], 3.0),
        (3.0, 0, [], 60.0),  # no upload could come
    ],
)
def test_how_long_a_server_waits(
    deadline_s: float | None, asked: int, answered: Sequence[float], expected: float
) -> None:
    assert dataclasses.replace(DEVICES, deadline_s=deadline_s).wait(asked, answered) == expected


def test_who_comes_after_the_deadline_is_late() -> None:
    """Clients 1 to 4 would take 1 to 4 s; 2 raises, 3 is refused for another reason, 5 never answers."""

    def simulate(member: Member, sent: Message, reply: Message) -> float:
        assert sent.metadata.dst_node_id == member.node_id
        assert reply.metadata.reply_to_message_id == sent.metadata.message_id
        return float(member.partition_id)

    checked: list[int] = []

    def check(reply: Message) -> None:
        checked.extend(partitions_of([reply]))
        if checked[-1] == 3:
            raise PayloadError("no")

    def ask(asked: Sequence[int], deadline_s: float | None) -> Any:
        grid = Scripted([4, 3, 2, 1], errors=[2])
        return gather(grid, messages(grid, asked), check=check, timeout=0.2, simulate=simulate, deadline_s=deadline_s)

    everyone = ask([1, 2, 3, 4], None)
    assert everyone.simulated == {1: 1.0, 3: 3.0, 4: 4.0}
    assert [f.kind for f in everyone.failures] == ["failed", "refused"]
    assert everyone.unforeseen == everyone.failures

    checked.clear()
    late = ask([1, 2, 3, 4], 3.0)
    assert checked == [3, 1]  # nobody looks at what comes too late; in time is in time to the second
    reason = "4 simulated s, 3 are waited (federation.devices.deadline_s)"
    assert late.failures[2] == Failure(partition=4, kind="late", reason=reason)
    assert [f.partition for f in late.unforeseen] == [2, 3]
    assert late.count("late") == 1
    assert late.uplink_bytes == everyone.uplink_bytes  # it was sent
    assert [f.partition for f in ask([1, 5], 3.0).unforeseen] == [5]


@pytest.mark.parametrize(("speed", "name"), [(100.0, "image_passes"), (None, "seconds")])
def test_effort_that_is_not_stated_is_refused(speed: float | None, name: str) -> None:
    """It would be computed in no time."""
    devices = dataclasses.replace(DEVICES, images_per_second=speed)

    def seconds(metrics: dict[str, float]) -> float:
        return devices.seconds(downlink_bytes=0, uplink_bytes=0, metrics=metrics, family="tiny", straggler=False)

    for metrics in ({"loss": 1.0, f"report_{name}": 5.0}, {}):
        with pytest.raises(PayloadError, match=rf"it states no {name}, of which its simulated time is made"):
            seconds(metrics)
    assert seconds({name: 0.0}) == DEVICES.latency_s


@pytest.mark.parametrize("images_per_second", ["null", "1000"])
def test_a_client_half_that_states_no_effort(images_per_second: str, tmp_path: Path) -> None:
    """Measured seconds are those of its whole task; without image passes there is nothing to divide."""
    overrides = ("strategy=fedavg", "federation.num_rounds=1", "evaluate.every=9", "federation.min_replies=3")
    config = small(tmp_path / "run", *overrides, f"{NODE}images_per_second={images_per_second}")
    config["strategy"]["client"] = {"_target_": "tests.test_devices.Silent", "inner": config["strategy"]["client"]}
    fedssl.run(config)
    (row,) = rows(tmp_path / "run", "round")
    clients = {row["partition"]: row["metrics"] for row in raw_rows(tmp_path / "run", "client")}
    if images_per_second == "null":
        assert row["metrics"]["num_ok"] == 4
        assert clients[2]["simulated_seconds"] > 0.1 + clients[2]["seconds"] > 0.1
    else:
        assert (row["metrics"]["num_ok"], row["metrics"]["num_refused"]) == (3, 1)
        assert row["metrics"]["failures"][0]["reason"].startswith("it states no image_passes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silent:
    """A client half that on partition 2 says nothing of what it did."""

    inner: Any

    def __call__(self, client: Any, broadcast: Any) -> Upload:
        upload: Upload = self.inner(client, broadcast)
        kept = {"num-examples": upload.metrics["num-examples"]}
        return dataclasses.replace(upload, metrics=kept) if client.partition_id == 2 else upload


def test_a_lie_about_effort_is_a_refused_upload(tmp_path: Path) -> None:
    config = small(tmp_path / "run", "strategy=fedavg", "federation.num_rounds=1", "evaluate.every=9")
    inner = config["strategy"]["client"]
    config["strategy"]["client"] = {"_target_": "tests.test_devices.Boasts", "inner": inner}
    fedssl.run(config)
    (row,) = rows(tmp_path / "run", "round")
    assert (row["metrics"]["num_ok"], row["metrics"]["num_refused"]) == (3, 1)
    assert row["metrics"]["failures"][0]["reason"] == "it declares seconds=-1000.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boasts:
    """A client half that on partition 2 was done before it began."""

    inner: Any

    def __call__(self, client: Any, broadcast: Any) -> Upload:
        upload: Upload = self.inner(client, broadcast)
        lie = {"seconds": -1000.0} if client.partition_id == 2 else {}
        return dataclasses.replace(upload, metrics={**upload.metrics, **lie})


# --- draws ---
def test_stragglers_are_a_share_and_a_larger_share_adds_to_them() -> None:
    def among(share: float, partitions: Sequence[int], seed: int = 0) -> frozenset[int]:
        return dataclasses.replace(DEVICES, stragglers=share).stragglers_among(seed, partitions)

    assert [len(among(share, range(1, 11))) for share in (0, 0.04, 0.05, 0.25, 0.5, 1)] == [0, 0, 1, 3, 5, 10]
    assert among(0.2, range(1, 11)) < among(0.5, range(1, 11)) < among(1, range(1, 11)) == set(range(1, 11))
    assert among(0.5, range(10)) == among(0.5, [*reversed(range(10))])
    assert len({among(0.3, range(20), seed) for seed in range(10)}) > 5


def test_availability_is_its_probability_in_every_round_and_for_every_client() -> None:
    devices, surer = (dataclasses.replace(DEVICES, availability=p) for p in (0.3, 0.6))
    there = np.array([[devices.available(7, r, p) for p in range(60)] for r in range(60)])
    for mean in (there.mean(), there[::2].mean(), there[:, ::2].mean()):
        assert abs(mean - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 1800)
    assert there.any(axis=0).all()
    assert not there.all(axis=0).any()
    assert all(surer.available(7, r, p) for r in range(60) for p in range(60) if there[r, p])


def test_without_availability_cohorts_are_drawn_as_ever(tmp_path: Path) -> None:
    config = small(tmp_path, "strategy=fedavg", "federation.num_clients=8", "federation.cohort_size=3")
    setup, grid = Setup(config), open_in_process(config, tmp_path)
    for round_num in range(1, 6):
        cohort = [member.partition_id for member in setup.server().sample_cohort(round_num, grid)]
        chosen = numpy_generator(setup.seed, "cohort", round_num).choice(8, size=3, replace=False)
        assert cohort == sorted(chosen)


def test_a_cohort_has_only_those_who_are_there_and_all_of_them_if_they_are_few(tmp_path: Path) -> None:
    config = small(
        tmp_path, "strategy=fedavg", "federation.num_clients=8", "federation.cohort_size=3", f"{NODE}availability=0.4"
    )
    setup, grid = Setup(config), open_in_process(config, tmp_path)
    sizes = set()
    for round_num in range(1, 31):
        cohort = [member.partition_id for member in setup.server().sample_cohort(round_num, grid)]
        there = [p for p in range(8) if setup.federation.devices.available(setup.seed, round_num, p)]
        assert len(cohort) == len(set(cohort)) == min(3, len(there))
        assert cohort == sorted(cohort)
        assert set(cohort) <= set(there)
        sizes.add(len(there))
    assert min(sizes) < 3 < max(sizes)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of some strategies: round, partition and whether it was slow, of every client that was asked."""
    devices = (f"{NODE}availability=0.6", f"{NODE}stragglers=0.5", f"{NODE}straggler_slowdown=1000")
    found = {}
    for strategy in ("fedavg", "flesd", "local_only", "fedadam"):
        run_dir = tmp_path_factory.mktemp("runs") / strategy
        config = small(run_dir, *QUICK, f"strategy={strategy}", *devices, f"{NODE}images_per_second=1000")
        summary = fedssl.run(config)
        found[strategy] = [
            (row["round"], row["partition"], row["metrics"]["simulated_seconds"] > 10)
            for row in raw_rows(run_dir, "client")
        ]
        if strategy == "local_only":  # its models are evaluated by those who have them, there or not
            assert sum(f["num_clients"] for name, f in summary["families"].items() if name != "conv4_4") == 5
    return found


@pytest.mark.parametrize("strategy", ["flesd", "local_only", "fedadam"])
def test_every_strategy_meets_the_same_stragglers_and_misses_the_same_clients(
    asked: dict[str, list[Any]], strategy: str
) -> None:
    assert asked[strategy] == asked["fedavg"]


def test_the_draws_are_those_of_devices(asked: dict[str, list[Any]]) -> None:
    devices = dataclasses.replace(DEVICES, availability=0.6, stragglers=0.5)
    slow = devices.stragglers_among(0, range(8))
    assert len(slow) == 4
    assert asked["fedavg"] == [(r, p, p in slow) for r in (1, 2, 3) for p in range(8) if devices.available(0, r, p)]
    assert 0 < len(asked["fedavg"]) < 24


def test_draws_are_the_same_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = (f"{NODE}availability=0.6", "federation.cohort_size=3", f"{NODE}stragglers=0.3")
    fedssl.run(small(tmp_path / "straight", *QUICK, "strategy=fedavg", *devices))
    config = small(tmp_path / "resumed", *QUICK, "strategy=fedavg", *devices)
    run_interrupted(config, monkeypatch, before_round=2)
    simulation.resume(config, tmp_path / "resumed")
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")
    assert_same(final_arrays(tmp_path / "resumed"), final_arrays(tmp_path / "straight"))


# --- runs of earlier versions ---
def test_a_run_of_before_there_were_devices_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With devices that change nothing; what its first rounds would have taken stays unknown."""
    overrides = ("strategy=fedavg", "evaluate.every=9")
    fedssl.run(small(tmp_path / "straight", *overrides))
    run_dir = tmp_path / "run"
    run_interrupted(small(run_dir, *overrides), monkeypatch, before_round=2)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    del config["federation"]["devices"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    for path in run_dir.glob("checkpoints/*/progress.json"):
        progress = json.loads(path.read_text())
        del progress["simulated_seconds"]
        progress["server_row"].pop("simulated_seconds", None)
        path.write_text(json.dumps(progress))
    assert main([f"resume={run_dir}"]) == 0
    assert_same(final_arrays(run_dir), final_arrays(tmp_path / "straight"))
    assert json.loads((run_dir / "summary.json").read_text())["simulated_seconds"] is None
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["federation"]["devices"]["availability"] == 1
    run = read_run(run_dir)
    assert run.total("simulated_seconds") is run.spent("simulated_seconds") is None
    assert main([f"replay.run={run_dir}", "replay.round=2", "replay.partition=0"]) == 0


def test_what_is_filled_in_is_what_is_absent() -> None:
    saved = {"seed": 3, "federation": {"num_clients": 5, "devices": {"availability": 0.5}}}
    filled = fill_in(saved)
    assert saved["federation"] == {"num_clients": 5, "devices": {"availability": 0.5}}
    assert (filled["seed"], filled["federation"]["num_clients"]) == (3, 5)
    devices = filled["federation"]["devices"]
    assert (devices["availability"], devices["deadline_s"], devices["idle_s"]) == (0.5, None, 0)
    assert fill_in(filled) == filled
    now = compose([])
    assert fill_in(now) == now
    assert devices.keys() == now["federation"]["devices"].keys()


def test_views_of_an_older_run_are_computed_as_they_were_wherever_they_stand() -> None:
    now = compose(["data=cifar10", "views@distill.views=colour"])
    saved = copy.deepcopy(now)
    for views in (saved["views"], saved["distill"]["views"]):
        del views["kernel"]
    filled = fill_in(saved)
    assert filled["views"]["kernel"] == filled["distill"]["views"]["kernel"] == "torch"
    geometric = compose(["data=digits"])
    assert fill_in(geometric) == geometric


def test_models_under_the_names_of_an_earlier_version_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a word the client would start anew."""
    run_dir = tmp_path / "run"
    run_interrupted(small(run_dir, "strategy=local_only", "evaluate.every=9"), monkeypatch, before_round=2)
    for path in run_dir.glob("clients/3/*.safetensors"):
        save_file({name.removeprefix("models/"): value for name, value in load_file(path).items()}, path)
    for arguments in ([f"resume={run_dir}"], [f"replay.run={run_dir}", "replay.round=2", "replay.partition=3"]):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "holds a model as an earlier version of fedssl kept it (conv4_4/backbone." in said
        assert "begin a new run" in said
        assert "Traceback" not in said
    assert main([f"replay.run={run_dir}", "replay.round=2", "replay.partition=2"]) == 0


# --- nobody is there ---
def test_a_round_without_anybody_ends_the_run(tmp_path: Path) -> None:
    config = small(tmp_path / "run", "strategy=fedavg", f"{NODE}availability=1e-9")
    with pytest.raises(TooFewRepliesError) as caught:
        fedssl.run(config)
    message = str(caught.value)
    assert "round 1 has 0 usable replies of 0, federation.min_replies asks for 1" in message
    assert "no clients were there to be asked: raise federation.devices.availability=1e-09" in message
    assert [row["metrics"]["num_ok"] for row in rows(tmp_path / "run", "round")] == [0]


def test_min_replies_is_no_smaller_where_few_are_there(tmp_path: Path) -> None:
    config = small(tmp_path / "run", *QUICK, "strategy=fedavg", f"{NODE}availability=0.5", "federation.min_replies=7")
    with pytest.raises(TooFewRepliesError, match=r"usable replies of [1-6], federation.min_replies asks for 7"):
        fedssl.run(config)


@pytest.mark.parametrize("strategy", slow_unless(ONE_OF_EACH_KIND, WITH_CLIENTS))
def test_a_run_can_go_on_without_anybody(strategy: str, tmp_path: Path) -> None:
    """And every family keeps what it has, or learns without clients; the server waits."""
    overrides = (f"strategy={strategy}", f"{NODE}availability=1e-9", "federation.min_replies=0", "evaluate.every=9")
    summary = fedssl.run(small(tmp_path / "run", *overrides, "federation.num_rounds=1", f"{NODE}idle_s=500"))
    assert summary["status"] == "completed"
    assert 500 <= summary["simulated_seconds"] < 560


# --- the deadline ---
DEADLINE = (
    *QUICK, f"{NODE}stragglers=0.25", f"{NODE}straggler_slowdown=10", f"{NODE}images_per_second=1000",
    f"{NODE}deadline_s=0.4", "federation.keep_checkpoints=1",
)  # fmt: skip  # beside 0.1 s latency the others take 0.05 to 0.08 s, stragglers ten times that


@pytest.fixture(scope="module", params=["fedavg", "flesd"])
def with_deadline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A strategy, and the directory of its run."""
    run_dir = tmp_path_factory.mktemp("deadline") / request.param
    fedssl.run(small(run_dir, *DEADLINE, f"strategy={request.param}"))
    return request.param, run_dir


def test_a_deadline_drops_exactly_the_stragglers(with_deadline: tuple[str, Path]) -> None:
    strategy, run_dir = with_deadline
    setup = Setup(small(None, *DEADLINE, f"strategy={strategy}"))
    assert len(setup.stragglers) == 2
    for row in rows(run_dir, "round"):
        late = [failure for failure in row["metrics"]["failures"] if failure["kind"] == "late"]
        assert {failure["partition"] for failure in late} == setup.stragglers
        assert (row["metrics"]["num_ok"], row["metrics"]["num_late"]) == (6, 2)
        assert all("0.4 are waited (federation.devices.deadline_s)" in failure["reason"] for failure in late)
    in_time = raw_rows(run_dir, "client")
    assert {row["partition"] for row in in_time} == set(range(8)) - setup.stragglers
    assert all(0.1 < row["metrics"]["simulated_seconds"] < 0.2 for row in in_time)
    sent = sum(row["metrics"]["uplink_bytes"] for row in in_time)
    total = json.loads((run_dir / "summary.json").read_text())["uplink_bytes"]
    assert sent < total < 2 * sent  # theirs were sent
    assert Checkpoints(run_dir / "checkpoints", keep=1).rounds() == [3]  # nobody wants to replay who was only slow
    for row in raw_rows(run_dir, "server"):
        metrics = row["metrics"]
        assert 0.4 < metrics["simulated_seconds"] < 0.4 + metrics["seconds"]


def test_a_run_with_a_deadline_can_be_repeated_and_resumed(
    with_deadline: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, run_dir = with_deadline
    config = small(tmp_path / "resumed", *DEADLINE, f"strategy={strategy}")
    run_interrupted(config, monkeypatch, before_round=3)
    summary = simulation.resume(config, tmp_path / "resumed")
    assert rows(tmp_path / "resumed") == rows(run_dir)
    assert_same(final_arrays(tmp_path / "resumed"), final_arrays(run_dir))
    simulated = [row["metrics"]["simulated_seconds"] for row in raw_rows(run_dir, "client")]
    again = [row["metrics"]["simulated_seconds"] for row in raw_rows(tmp_path / "resumed", "client")]
    assert simulated == again  # no clock in them
    total = sum(row["metrics"]["simulated_seconds"] for row in raw_rows(tmp_path / "resumed", "server"))
    assert summary["simulated_seconds"] == pytest.approx(total)


@pytest.mark.parametrize("strategy", ["fedavg", "flesd"])
def test_who_is_late_is_not_merged(strategy: str, tmp_path: Path) -> None:
    """As if it had failed."""
    overrides = (*DEADLINE, f"strategy={strategy}", "federation.num_rounds=1")
    config = small(tmp_path / "late", *overrides)
    fedssl.run(config)
    slow = sorted(Setup(config).stragglers)
    failed = small(tmp_path / "failed", *overrides, f"{NODE}deadline_s=null")
    fedssl.run(sabotaged(failed, "raise", round_num=1, partitions=slow))
    assert_same(final_arrays(tmp_path / "late"), final_arrays(tmp_path / "failed"))


@pytest.mark.parametrize(("deadline_s", "expected"), [("50", 50), ("null", 0.1)])
def test_a_client_that_crashes_is_waited_for_until_the_deadline(
    deadline_s: str, expected: float, tmp_path: Path
) -> None:
    """Without one, until the others are done: 0.1 s of latency, and next to nothing at that speed."""
    speed = (f"{NODE}images_per_second=1e9", f"{NODE}uplink_mbps=inf", f"{NODE}downlink_mbps=inf")
    overrides = ("strategy=fedavg", "federation.num_rounds=1", "evaluate.every=9", f"{NODE}deadline_s={deadline_s}")
    fedssl.run(sabotaged(small(tmp_path / "run", *overrides, *speed), "raise", round_num=1, partitions=[1]))
    ((row, server),) = zip(rows(tmp_path / "run", "round"), raw_rows(tmp_path / "run", "server"), strict=True)
    assert (row["metrics"]["num_ok"], row["metrics"]["num_failed"]) == (3, 1)
    assert expected <= server["metrics"]["simulated_seconds"] < expected + server["metrics"]["seconds"]


def test_too_many_late_ones_end_the_run(tmp_path: Path) -> None:
    config = small(tmp_path / "run", *DEADLINE, "strategy=fedavg", f"{NODE}stragglers=0.75")
    with pytest.raises(TooFewRepliesError, match=r"2 usable replies of 8, federation.min_replies asks for 4"):
        fedssl.run(config)


# --- what a run says ---
def test_simulated_seconds_of_rounds_and_clients(tmp_path: Path) -> None:
    """Without a deadline: the slowest client, and what the server computed."""
    config = small(tmp_path / "run", "strategy=fedavg", "evaluate.every=9", f"{NODE}uplink_mbps=0.01")
    summary = fedssl.run(config)
    for round_num, row in enumerate(raw_rows(tmp_path / "run", "server"), start=1):
        clients = [r["metrics"] for r in raw_rows(tmp_path / "run", "client") if r["round"] == round_num]
        for metrics in clients:
            links = 8e-6 * metrics["uplink_bytes"] / 0.01
            rest = metrics["simulated_seconds"] - links - metrics["seconds"] - 0.1
            assert 0 < rest < 0.1  # the downlink: under 35 kB at 50 Mbit/s
        slowest, metrics = max(m["simulated_seconds"] for m in clients), row["metrics"]
        assert slowest + metrics["seconds_aggregation"] <= metrics["simulated_seconds"] < slowest + metrics["seconds"]
    total = sum(row["metrics"]["simulated_seconds"] for row in raw_rows(tmp_path / "run", "server"))
    assert summary["simulated_seconds"] == pytest.approx(total)


@pytest.mark.parametrize("strategy", ["public_only", "centralized"])
def test_without_clients_only_the_server_takes_time(strategy: str, tmp_path: Path) -> None:
    overrides = (f"strategy={strategy}", "evaluate.every=9", f"{NODE}latency_s=1000", f"{NODE}availability=0.5")
    fedssl.run(small(tmp_path / "run", *overrides))
    for row in raw_rows(tmp_path / "run", "server"):
        metrics = row["metrics"]
        assert metrics["seconds_aggregation"] <= metrics["simulated_seconds"] <= metrics["seconds"]


# --- bad input ---
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["uplink_mbps=0"], r"devices\.uplink_mbps is in megabits per second and must be > 0, got 0"),
        (["downlink_mbps=-1"], r"devices\.downlink_mbps .* got -1"),
        (["latency_s=-0.1"], r"devices\.latency_s is in seconds and must be >= 0, got -0\.1"),
        (["idle_s=-1"], r"devices\.idle_s is in seconds and must be >= 0, got -1"),
        (["images_per_second=0"], r"devices\.images_per_second must be a number > 0, a mapping"),
        (
            ["images_per_second=fast"],
            r"devices\.images_per_second must be a number or a mapping {name: a number} or null, got .fast",
        ),
        (["images_per_second={conv4_16: x}"], r"devices\.images_per_second must be a number or a mapping"),
        (["images_per_second={}"], r"devices\.images_per_second must be a number > 0"),
        (["images_per_second={conv4_16: 10}"], r"lacks conv4_32, resnet8: give every architecture"),
        (
            ["images_per_second={conv4_16: 1, conv4_32: 1, resnet8: 1, resnet9: 1}"],
            r"names resnet9, not in models: give every architecture",
        ),
        (["stragglers=1.5"], r"devices\.stragglers is a share of the clients, between 0 and 1, got 1\.5"),
        (["stragglers=0.01"], r"devices\.stragglers=0\.01 of 6 clients is less than half a client"),
        (["straggler_slowdown=0.5"], r"devices\.straggler_slowdown must be at least 1, got 0\.5"),
        (["availability=0"], r"devices\.availability is a probability above 0 and at most 1, got 0"),
        (["availability=1.1"], r"devices\.availability is a probability above 0 and at most 1, got 1\.1"),
        (["deadline_s=10"], r"deadline_s=10 needs federation\.devices\.images_per_second: with measured seconds"),
        (["deadline_s=0.1", "images_per_second=9"], r"deadline_s must be above federation\.devices\.latency_s=0\.1"),
        (["availability=often"], r"devices\.availability must be a number"),
        (["avialability=0.5"], r"Did you mean federation\.devices\.availability\?"),
    ],
)
def test_devices_that_cannot_be_are_refused(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [NODE + override for override in overrides]
    assert main([*given, "grid=in_process", f"run_dir={tmp_path / 'run'}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_the_defaults_are_devices_that_change_nothing() -> None:
    devices: Devices = instantiate(compose([])["federation"]["devices"])
    assert (devices.stragglers, devices.availability, devices.deadline_s) == (0, 1, None)
    with pytest.raises(ConfigError, match=r"needs federation\.devices\.images_per_second"):
        dataclasses.replace(devices, deadline_s=5.0)
