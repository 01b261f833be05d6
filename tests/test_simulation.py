"""A run from its configuration to its directory: what it leaves, how it fails, resumes and is replayed."""

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
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import fedssl
from fedssl.__main__ import main
from fedssl.data.federated import FederatedData
from fedssl.errors import ConfigError, DataError, TooFewRepliesError
from fedssl.evaluate import Evaluator, extract_features, principal_plane
from fedssl.federation import rounds, simulation
from fedssl.federation.checkpoint import Checkpoints
from fedssl.federation.setup import Setup
from fedssl.federation.store import ClientStore
from fedssl.lock import NAME as LOCK
from fedssl.report import compare
from fedssl.tracking import Progress
from tests.federation_helpers import (
    FAMILIES,
    ON_RAY,
    another_begins,
    assert_same,
    final_arrays,
    rows,
    sabotaged,
    small,
    tree_hash,
    without_clock,
)

FLESD = ("strategy=flesd",)


@pytest.fixture(scope="module")
def flesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a completed FLESD run of two rounds, in this process."""
    run_dir = tmp_path_factory.mktemp("runs") / "flesd"
    fedssl.run(small(run_dir, *FLESD))
    return run_dir


def summary_of(run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, rows and summary are equal, whatever happened on the way."""
    assert_same(final_arrays(a), final_arrays(b))
    assert [row for row in rows(a) if row["scope"] != "round"] == [row for row in rows(b) if row["scope"] != "round"]
    assert without_clock(summary_of(a)) == without_clock(summary_of(b))


# --- the run directory ---
def test_the_run_directory_holds_what_the_interface_names(flesd: Path) -> None:
    names = {path.name for path in flesd.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "partition.npz", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints",
        "models", "public_map.npz",
    }  # fmt: skip
    assert sorted(path.name for path in (flesd / "models").iterdir()) == sorted(f"{f}.safetensors" for f in FAMILIES)
    assert sorted(path.name for path in (flesd / "checkpoints").iterdir()) == ["00001", "00002"]
    config = yaml.safe_load((flesd / "config.yaml").read_text())
    asked = small(flesd, *FLESD)
    assert asked["federation"]["report_family"] is None
    asked["federation"]["report_family"] = summary_of(flesd)["report_family"]  # the one that was chosen, for readers
    assert config == asked
    manifest = json.loads((flesd / "manifest.json").read_text())
    assert set(manifest["data"]) == {"digits/train", "digits/test", "public set"}
    assert manifest["seed"] == 0


def test_the_saved_partition_is_the_one_that_was_used(flesd: Path) -> None:
    setup = Setup(small(None, *FLESD))
    saved = FederatedData.load(flesd / "partition.npz", setup.train)
    for ours, theirs in zip(saved.partitions, setup.data.partitions, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert Setup(small(None, *FLESD), flesd).public_set.fingerprint == setup.public_set.fingerprint


def test_rows_and_summary_tell_the_same_story(flesd: Path) -> None:
    summary, server, clients = summary_of(flesd), rows(flesd, "server"), rows(flesd, "client")
    assert (summary["status"], summary["rounds"], summary["strategy"]) == ("completed", 2, "flesd")
    assert [row["round"] for row in server] == [1, 2]
    assert [(row["round"], row["partition"]) for row in clients] == [(r, p) for r in (1, 2) for p in range(4)]
    assert [row["family"] for row in clients[:4]] == ["conv4_4", "conv4_2", "tiny", "conv4_4"]
    evals = {(row["round"], row["family"]): row["metrics"] for row in rows(flesd, "eval")}
    assert set(evals) == {(0, "raw_pixels")} | {(r, family) for r in (0, 1, 2) for family in FAMILIES}
    for family, num_clients in zip(FAMILIES, (2, 1, 1), strict=True):
        assert summary["families"][family] == {**evals[2, family], "num_clients": num_clients}
    assert summary["report_family"] == "conv4_4"
    assert {name: summary[name] for name in evals[2, "conv4_4"]} == evals[2, "conv4_4"]
    for name in ("uplink_bytes", "downlink_bytes"):
        assert summary[name] == sum(row["metrics"][name] for row in server) > 0
    assert summary["uplink_bytes"] == sum(row["metrics"]["uplink_bytes"] for row in clients)
    assert [row["metrics"]["failures"] for row in rows(flesd, "round")] == [[], []]
    assert [row["metrics"]["num_ok"] for row in rows(flesd, "round")] == [4, 4]
    seconds = [json.loads(line) for line in (flesd / "metrics.jsonl").read_text().splitlines()]
    phases = next(row["metrics"] for row in seconds if row["scope"] == "server")
    parts = sum(phases[f"seconds_{phase}"] for phase in ("clients", "aggregation", "evaluation"))
    assert 0 < parts <= phases["seconds"] <= summary["wall_seconds"]


def test_a_rounds_line_shows_accuracies_of_that_round_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    monkeypatch.setattr(Progress, "round_finished", lambda self, round_num, line: lines.append(dict(line)))
    fedssl.run(small(tmp_path / "run", "strategy=fedavg", "evaluate.every=2"))
    assert ["knn_top1" in line for line in lines] == [False, True]


def test_the_map_shows_public_images_before_and_after_training(flesd: Path) -> None:
    setup = Setup(small(None, *FLESD))
    with np.load(flesd / "public_map.npz", allow_pickle=False) as arrays:
        assert str(arrays["family"]) == summary_of(flesd)["report_family"] == "conv4_4"
        backbones = {"initial": setup.build_model("conv4_4").backbone, "trained": fedssl.load_encoder(flesd, None)}
        for name, backbone in backbones.items():
            features = extract_features(backbone, setup.public_set.images, setup.views, 24, setup.device)
            plane = principal_plane(features)
            assert plane is not None
            np.testing.assert_allclose(arrays[name], plane.coordinates.numpy(), atol=1e-4)
            np.testing.assert_allclose(arrays[f"{name}_shares"], plane.shares.numpy(), atol=1e-4)
        assert not np.allclose(arrays["initial"], arrays["trained"], atol=0.1)
        assert setup.train.labels is not None
        np.testing.assert_array_equal(arrays["labels"], setup.train.labels[setup.data.public_positions])
        assert tuple(arrays["classes"]) == setup.train.classes
    server = setup.server()
    assert server.public_set.images.labels is None  # the map alone has seen them
    assert server.public_set.images.classes == ()


def test_the_map_is_of_the_first_images_of_a_large_public_set(
    flesd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(small(None, *FLESD), flesd)
    checkpoints = Checkpoints(flesd / "checkpoints", keep=1)
    monkeypatch.setattr(simulation, "MAX_MAPPED", 10)
    simulation.save_public_map(setup, checkpoints.load(2)[0], tmp_path / "public_map.npz")
    with np.load(tmp_path / "public_map.npz") as arrays, np.load(flesd / "public_map.npz") as all_of_them:
        assert arrays["trained"].shape == (10, 2)
        np.testing.assert_array_equal(arrays["labels"], all_of_them["labels"][:10])
    assert [path.name for path in tmp_path.iterdir()] == ["public_map.npz"]


def test_the_encoders_that_a_run_leaves_are_those_it_evaluated(flesd: Path) -> None:
    setup = Setup(small(None, *FLESD))
    evaluator: Evaluator = setup.evaluator
    for family in FAMILIES:
        encoder = fedssl.load_encoder(flesd, family)
        assert not encoder.training
        assert evaluator(encoder) == {k: v for k, v in summary_of(flesd)["families"][family].items() if k[:3] != "num"}
        saved = load_file(flesd / "models" / f"{family}.safetensors")
        assert {name: value.numpy().shape for name, value in saved.items()} == {
            name.removeprefix(f"{family}/"): array.shape
            for name, array in final_arrays(flesd).items()
            if name.startswith(f"{family}/")
        }
    assert type(fedssl.load_encoder(flesd)).__name__ == "Conv4"  # the report family's
    with pytest.raises(ConfigError, match=r"no global model of 'resnet18'; it has \['conv4_2', 'conv4_4', 'tiny'\]"):
        fedssl.load_encoder(flesd, "resnet18")


# --- failures ---
def test_a_client_that_raises_is_named_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = sabotaged(small(tmp_path / "run", *FLESD), "raise", round_num=1, partitions=[2])
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fedssl").addHandler(handler)
    try:
        summary = fedssl.run(config)
    finally:
        logging.getLogger("fedssl").removeHandler(handler)
    assert summary["status"] == "completed"
    first, second = (row["metrics"] for row in rows(tmp_path / "run", "round"))
    assert (first["num_ok"], first["num_failed"], second["num_ok"]) == (3, 1, 4)
    (failure,) = first["failures"]
    assert (failure["partition"], failure["kind"]) == (2, "failed")
    assert failure["reason"] == "ClientError: during local training: RuntimeError: the disk is full"
    assert [row["partition"] for row in rows(tmp_path / "run", "client")] == [0, 1, 3, 0, 1, 2, 3]
    (warning,) = (text for text in warnings if "disk" in text)
    replay = f"fedssl replay.run={tmp_path / 'run'} replay.round=1 replay.partition=2"
    assert warning == (
        f"client failed in round 1, partition 2: {failure['reason']}\nReplay it in this process: {replay}"
    )
    with pytest.raises(RuntimeError, match="the disk is full"):  # the bare exception, with its own traceback
        simulation.replay(config, tmp_path / "run", round_num=1, partition_id=2)


def test_an_upload_that_lies_is_refused_by_name(tmp_path: Path) -> None:
    fedssl.run(sabotaged(small(tmp_path / "run", *FLESD), "wrong public set", round_num=2, partitions=[1]))
    second = rows(tmp_path / "run", "round")[1]["metrics"]
    assert (second["num_ok"], second["num_refused"]) == (3, 1)
    (failure,) = second["failures"]
    assert (failure["partition"], failure["kind"]) == (1, "refused")
    assert "its public set (000000000000) is not the server's" in failure["reason"]


def test_too_few_replies_end_the_run_which_can_be_resumed(flesd: Path, tmp_path: Path) -> None:
    """Once the cause is gone, the run ends as if it had never been."""
    run_dir = tmp_path / "run"
    config = sabotaged(small(run_dir, *FLESD), "raise", round_num=2, partitions=[0, 1, 3])
    with pytest.raises(TooFewRepliesError, match=r"round 2 has 1 usable replies of 4, .*asks for 2") as caught:
        fedssl.run(config)
    assert caught.value.exit_code == 3
    assert "  partition 3: failed: ClientError: during local training: RuntimeError" in str(caught.value)
    assert (summary_of(run_dir)["status"], summary_of(run_dir)["rounds"]) == ("failed", 1)
    assert Checkpoints(run_dir / "checkpoints", keep=2).rounds() == [0, 1]
    assert rows(run_dir, "round")[1]["metrics"]["num_failed"] == 3
    assert not (run_dir / "models").exists()
    simulation.resume(small(run_dir, *FLESD), run_dir)
    assert_same_run(run_dir, flesd)
    assert [row["metrics"]["num_failed"] for row in rows(run_dir, "round")] == [0, 0]


@pytest.mark.parametrize(("min_replies", "completes"), [(0, True), (1, True), (2, False)])
def test_min_replies_is_the_limit(min_replies: int, completes: bool, tmp_path: Path) -> None:
    overrides = (*FLESD, f"federation.min_replies={min_replies}", "federation.num_rounds=1", "evaluate.every=9")
    config = sabotaged(small(tmp_path / "run", *overrides), "nan", round_num=1, partitions=[0, 1, 2])
    if completes:
        assert fedssl.run(config)["status"] == "completed"
    else:
        with pytest.raises(TooFewRepliesError, match="asks for 2"):
            fedssl.run(config)


def test_the_bases_of_failed_rounds_are_kept_for_replay(tmp_path: Path) -> None:
    overrides = (*FLESD, "federation.num_rounds=5", "federation.keep_checkpoints=1", "evaluate.every=9")
    fedssl.run(sabotaged(small(tmp_path / "run", *overrides), "raise", round_num=2, partitions=[0]))
    assert Checkpoints(tmp_path / "run" / "checkpoints", keep=1).rounds() == [1, 5]


def test_a_failure_of_the_server_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise fedssl.errors.FedSSLError("the distillation loss became nan at step 3")

    monkeypatch.setattr("fedssl.federation.server.distill", diverge)
    with pytest.raises(fedssl.errors.FedSSLError, match="became nan"):
        fedssl.run(small(tmp_path / "run", *FLESD))
    assert (summary_of(tmp_path / "run")["status"], summary_of(tmp_path / "run")["rounds"]) == ("failed", 0)


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run_dir=.*run cannot be written: Not a directory"):
        fedssl.run(small(tmp_path / "file" / "run", *FLESD))


def test_a_read_only_run_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, and the run is as it was; whoever runs this test may be root, whom no mode stops."""
    run_dir = tmp_path / "run"
    fedssl.run(small(run_dir, "strategy=fedavg", "federation.num_rounds=1", "evaluate.every=9"))
    before = tree_hash(run_dir)

    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(simulation.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"resume=.*run cannot be written: Permission denied"):
        simulation.resume(small(run_dir, "strategy=fedavg"), run_dir)
    assert tree_hash(run_dir) == before


# --- kill and resume ---
KILLED = """
import json, os, signal, sys
import torch
from pathlib import Path
torch.set_num_threads(1)
from fedssl.federation import simulation, rounds

config = json.loads(Path(sys.argv[1]).read_text())
if sys.argv[2] == "after the checkpoint":  # and before the server's row, which belongs to it
    save = rounds.Checkpoints.save
    def save_and_die(self, arrays, state, progressed):
        save(self, arrays, state, progressed)
        if progressed.round_num == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    rounds.Checkpoints.save = save_and_die
if sys.argv[2] == "before the first checkpoint":
    rounds.Checkpoints.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "after the last row":
    rounds.ClientStore.prune = lambda *_: os.kill(os.getpid(), signal.SIGKILL) if rows() == 2 else []
    rows = lambda: (Path(config["run_dir"]) / "metrics.jsonl").read_text().count('"scope": "server"')
simulation.run(config)
"""


@pytest.mark.parametrize(
    "when", ["during round 2", "after the checkpoint", "after the last row", "before the first checkpoint"]
)
def test_kill_9_and_resume_equals_a_run_that_was_left_alone(when: str, flesd: Path, tmp_path: Path) -> None:
    """In round 2 the client of partition 2 kills the whole process."""
    run_dir = tmp_path / "run"
    config = small(run_dir, *FLESD)
    if when == "during round 2":
        config = sabotaged(config, "kill", round_num=2, partitions=[2], marker=str(tmp_path / "killed"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.json"), when]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (run_dir / "summary.json").exists()
    before = Checkpoints(run_dir / "checkpoints", keep=2).rounds()
    assert before == {"during round 2": [0, 1], "before the first checkpoint": []}.get(when, before)
    simulation.resume(config, run_dir)
    assert_same_run(run_dir, flesd)
    assert [row["round"] for row in rows(run_dir, "server")] == [1, 2]
    assert rows(run_dir) == rows(flesd)
    assert not list(run_dir.rglob("*partial*"))


HELD = """
import json, sys
import torch
from pathlib import Path
torch.set_num_threads(1)
from fedssl.federation import simulation, rounds

save = rounds.Checkpoints.save
def save_and_wait(self, arrays, state, progressed):
    save(self, arrays, state, progressed)
    if progressed.round_num == 1:
        print("round 1", flush=True)
        input()
rounds.Checkpoints.save = save_and_wait
config = json.loads(Path(sys.argv[1]).read_text())
if sys.argv[2] == "run":
    simulation.run(config)
else:
    simulation.resume(config, Path(config["run_dir"]))
"""


@pytest.mark.parametrize("how", ["run", "resume"])
def test_a_run_directory_is_one_process_at_a_time(
    how: str, flesd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a run nor a resume joins it; after a kill a resume ends as if nothing had been."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds to it
    run_dir = tmp_path / "run"
    config = small(run_dir, *FLESD)
    if how == "resume":  # of one that came no further than its configuration
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
        (run_dir / LOCK).write_text("process 1 on a machine that has gone")
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", HELD, str(tmp_path / "config.json"), how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin:
        try:
            assert any(line == "round 1\n" for line in process.stdout)
            before = tree_hash(run_dir)
            assert main([f"resume={run_dir}"]) == 2
            assert f"error: resume={run_dir} is in use by process {process.pid} on " in capsys.readouterr().err
            assert main(["grid=in_process", f"run_dir={run_dir}"]) == 2
            said = capsys.readouterr().err
            assert f"error: run_dir={run_dir} is in use by process {process.pid} on " in said
            assert f"go on with that run by resume={run_dir} when it has ended" in said
            assert tree_hash(run_dir) == before
            compare([run_dir], tmp_path / "report")  # one may look at it
            assert compare([run_dir], tmp_path / "report").broken == {}
        finally:
            process.kill()
    assert main([f"resume={run_dir}"]) == 0
    assert_same_run(run_dir, flesd)
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in flesd.iterdir()} | {"report.html"}


@pytest.mark.parametrize(("still_there", "said"), [(True, "is in use by process"), (False, "is not empty: choose")])
def test_a_run_does_not_begin_where_another_has_just_begun(still_there: bool, said: str, tmp_path: Path) -> None:
    """Both have found the directory empty, and then read their images for a while."""
    run_dir = tmp_path / "run"

    def write() -> None:
        (run_dir / "config.yaml").write_text("another's")

    refused = pytest.raises(ConfigError, match=f"run_dir={run_dir} {said}")
    with another_begins(run_dir, write, still_there=still_there), refused:
        fedssl.run(small(run_dir, *FLESD))
    assert [(path.name, path.read_text()) for path in run_dir.iterdir()] == [("config.yaml", "another's")]


def test_a_directory_that_a_kill_left_with_a_lock_alone_is_empty(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / LOCK).write_text("process 1 on a machine that has gone")
    assert fedssl.run(small(run_dir, "strategy=fedavg", "evaluate.every=9"))["status"] == "completed"
    assert not (run_dir / LOCK).exists()


def test_a_resumed_client_does_not_see_its_own_future(tmp_path: Path) -> None:
    """Partitions 0 and 1 have finished round 2 when Ctrl-C comes: their memory is there, and must not be read."""
    overrides = ("strategy=local_only", "evaluate.every=9")
    fedssl.run(small(tmp_path / "straight", *overrides))
    config = small(tmp_path / "run", *overrides)
    config = sabotaged(config, "interrupt", round_num=2, partitions=[2], marker=str(tmp_path / "interrupted"))
    with pytest.raises(KeyboardInterrupt):
        fedssl.run(config)
    assert (summary_of(tmp_path / "run")["status"], summary_of(tmp_path / "run")["rounds"]) == ("stopped", 1)
    assert [ClientStore(tmp_path / "run" / "clients").versions(p) for p in range(4)] == [[1, 2], [1, 2], [1], [1]]
    simulation.resume(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_max_seconds_stops_before_a_round_and_resume_goes_on(
    flesd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", *FLESD, "max_seconds=1000")
    one_round = rounds.Rounds.one_round

    def slow(self: rounds.Rounds, state: rounds.State, round_num: int) -> rounds.State:
        state = one_round(self, state, round_num)
        if round_num == 1:
            now = rounds.time.monotonic
            monkeypatch.setattr(rounds.time, "monotonic", lambda: now() + 2000)
        return state

    with monkeypatch.context() as patch:
        patch.setattr(rounds.Rounds, "one_round", slow)
        summary = fedssl.run(config)
    assert (summary["status"], summary["rounds"]) == ("stopped", 1)
    assert not (tmp_path / "run" / "models").exists()
    monkeypatch.undo()
    simulation.resume(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", flesd)


def test_a_longer_run_is_the_shorter_one_gone_on(flesd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its resume on it has not completed, whatever the shorter one did."""
    one = small(tmp_path / "run", *FLESD, "federation.num_rounds=1")
    assert fedssl.run(one)["rounds"] == 1
    assert summary_of(tmp_path / "run")["status"] == "completed"

    def broken(*_: Any, **__: Any) -> Any:
        assert not (tmp_path / "run" / "summary.json").exists()  # what a kill would leave
        raise fedssl.errors.FedSSLError("no grid today")

    with monkeypatch.context() as patch:
        patch.setattr("fedssl.federation.grids.in_process.InProcess.open", broken)
        with pytest.raises(fedssl.errors.FedSSLError, match="no grid today"):
            simulation.resume(small(tmp_path / "run", *FLESD), tmp_path / "run")
    assert (summary_of(tmp_path / "run")["status"], summary_of(tmp_path / "run")["rounds"]) == ("failed", 1)
    simulation.resume(small(tmp_path / "run", *FLESD), tmp_path / "run")
    assert_same_run(tmp_path / "run", flesd)


def test_later_sittings_are_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's entries stay, since the run is known by them."""
    monkeypatch.setattr("fedssl.tracking._git", lambda: {"commit": "first", "dirty": False})
    fedssl.run(small(tmp_path / "run", *FLESD, "federation.num_rounds=1", "evaluate.every=9"))
    first = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for num_rounds in (2, 3):
        later = {"commit": f"for round {num_rounds}", "dirty": True}
        monkeypatch.setattr("fedssl.tracking._git", lambda later=later: later)
        config = small(tmp_path / "run", *FLESD, f"federation.num_rounds={num_rounds}", "evaluate.every=9")
        simulation.resume(config, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    resumed = manifest.pop("resumed")
    assert manifest == first
    assert [sitting["git"]["commit"] for sitting in resumed] == ["for round 2", "for round 3"]
    assert all(set(sitting) == {"started", "command", "versions", "git", "hardware"} for sitting in resumed)


def test_a_run_with_other_images_is_not_resumed(tmp_path: Path) -> None:
    fedssl.run(small(tmp_path / "run", *FLESD, "federation.num_rounds=1", "evaluate.every=9"))
    with pytest.raises(DataError, match="partitions other images"):
        simulation.resume(small(tmp_path / "run", *FLESD, "data.num_images=139"), tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"digits/test": "', '"digits/test": "0'))
    with pytest.raises(ConfigError, match=r"not those that .* began with"):
        simulation.resume(small(tmp_path / "run", *FLESD), tmp_path / "run")


# --- replay ---
@pytest.mark.parametrize("strategy", ["flesd", "local_only"])
def test_a_replay_is_the_round_itself_and_leaves_no_trace(strategy: str, tmp_path: Path) -> None:
    """`local_only` needs the memory of the round's base, not the newest."""
    config = small(tmp_path / "run", f"strategy={strategy}", "evaluate.every=9", "federation.keep_checkpoints=3")
    inner = config["strategy"]["client"]
    config["strategy"]["client"] = {"_target_": "tests.federation_helpers.CountsThreads", "inner": inner}
    fedssl.run(config)
    before = tree_hash(tmp_path / "run")
    written = {(row["round"], row["partition"]): row["metrics"] for row in rows(tmp_path / "run", "client")}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for round_num, partition in ((1, 0), (2, 3), (2, 2)):
            metrics = simulation.replay(config, tmp_path / "run", round_num=round_num, partition_id=partition)
            expected = written[round_num, partition]
            assert without_clock(metrics) == {name: expected[name] for name in metrics if "seconds" not in name}
            assert metrics["loss"] > 0
            assert metrics["threads"] == 1  # client.threads, not this process's
    finally:
        torch.set_num_threads(threads)
    assert tree_hash(tmp_path / "run") == before


def test_what_cannot_be_replayed(flesd: Path, tmp_path: Path) -> None:
    before = tree_hash(flesd)
    with pytest.raises(ConfigError, match=r"replay\.round=1 would start from the state after round 0, which is not"):
        simulation.replay(small(flesd, *FLESD), flesd, round_num=1, partition_id=0)
    for beyond in (0, 3, 7):  # the state after round 2 is there, but the run has no round 3
        with pytest.raises(ConfigError, match=r"rounds that can be replayed: \[2\]"):
            simulation.replay(small(flesd, *FLESD), flesd, round_num=beyond, partition_id=0)
    with pytest.raises(ConfigError, match=r"partition=4 was not asked in round 2; asked were \[0, 1, 2, 3\]"):
        simulation.replay(small(flesd, *FLESD), flesd, round_num=2, partition_id=4)
    assert tree_hash(flesd) == before


def test_a_strategy_without_clients_has_no_task_to_replay(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="strategy=public_only asks no client to do anything"):
        simulation.replay(small(None, "strategy=public_only"), tmp_path, round_num=1, partition_id=0)


def test_a_damaged_checkpoint_is_named_on_resume(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fedssl.run(small(run_dir, "strategy=fedavg", "federation.num_rounds=1", "evaluate.every=9"))
    path = run_dir / "checkpoints" / "00001" / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"00001/arrays.safetensors is missing or damaged"):
        simulation.resume(small(run_dir, "strategy=fedavg"), run_dir)


# --- public sets ---
def test_a_clients_shard_as_public_set(tmp_path: Path) -> None:
    """Partition 0 counts among the four and never trains."""
    config = small(tmp_path / "run", *FLESD, "public=client_shard")
    summary = fedssl.run(config)
    assert {row["partition"] for row in rows(tmp_path / "run", "client")} == {1, 2, 3}
    assert [row["metrics"]["num_ok"] for row in rows(tmp_path / "run", "round")] == [3, 3]
    assert [summary["families"][family]["num_clients"] for family in FAMILIES] == [1, 1, 1]
    setup = Setup(config, tmp_path / "run")
    assert len(setup.data.partitions) == 4
    assert set(setup.public_set.images.indices) == set(setup.train.indices[setup.data.partitions[0]])
    with pytest.raises(ConfigError, match="only 3 clients train"):
        Setup(small(None, *FLESD, "public=client_shard", "federation.cohort_size=4")).check()


@pytest.mark.parametrize(("family", "refused"), [("conv4_4", True), ("conv4_2", False)])
def test_the_report_family_has_a_client_that_trains(family: str, refused: bool) -> None:
    """Under public=client_shard, three clients are too few for a second one of the largest family."""
    overrides = (*FLESD, "public=client_shard", "federation.num_clients=3")
    setup = Setup(small(None, *overrides))
    setup.check()
    assert setup.report_family == "conv4_2"
    named = Setup(small(None, *overrides, f"federation.report_family={family}"))
    if refused:
        with pytest.raises(ConfigError, match=r"report_family=conv4_4 has no client that trains.*are conv4_2, tiny"):
            named.check()
    else:
        named.check()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.num_images=30", "public.size=24"), r"partition 2 has 1 images.*data\.num_images=30.*num_clients=4"),
        (("public.size=1",), "the public set has 1 images.*Raise public.size"),
    ],
)
def test_one_image_is_too_few(overrides: tuple[str, ...], message: str) -> None:
    """Of a client, which compares images, and of the public set, whose similarities are what is learned from."""
    with pytest.raises(ConfigError, match=message):
        Setup(small(None, *FLESD, *overrides)).check()


def test_the_private_data_set_is_no_public_one() -> None:
    same = ("public=dataset", "public.data=digits", "public.image_size=16")
    with pytest.raises(ConfigError, match=r"public.data=digits is the private data set itself.*public=held_out"):
        Setup(small(None, *FLESD, *same)).check()


def test_another_data_set_as_public_set(tmp_path: Path) -> None:
    for number in range(24):
        pixels = np.full((16, 16, 3), 10 * number, np.uint8)
        path = tmp_path / "images" / "train" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    overrides = (*FLESD, "public=dataset", "public.data=image_folder", f"public.root={tmp_path / 'images'}")
    config = small(tmp_path / "run", *overrides, "public.image_size=16")
    summary = fedssl.run(config)
    assert summary["status"] == "completed"
    assert sum(row["metrics"]["num-examples"] for row in rows(tmp_path / "run", "client") if row["round"] == 1) == 140
    resumed = {**config, "federation": {**config["federation"], "num_rounds": 3}}
    assert simulation.resume(resumed, tmp_path / "run")["rounds"] == 3


# --- Ray ---
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files to the garbage collector
def test_kill_9_of_a_worker_costs_nothing_but_time(flesd: Path, tmp_path: Path) -> None:
    """Named with its partition, run again, and the sum is the same."""
    config = small(tmp_path / "run", *FLESD, *ON_RAY)
    fedssl.run(sabotaged(config, "kill", round_num=2, partitions=[1], marker=str(tmp_path / "killed")))
    assert (tmp_path / "killed").exists()
    assert_same_run(tmp_path / "run", flesd)
    first, second = (row["metrics"] for row in rows(tmp_path / "run", "round"))
    assert first["failures"] == []
    assert (second["num_ok"], second["num_failed"]) == (4, 0)
    assert {failure["kind"] for failure in second["failures"]} == {"worker_died"}
    assert 1 in [failure["partition"] for failure in second["failures"]]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_clients_memory_on_ray(tmp_path: Path) -> None:
    """What a worker wrote in round 1 another one reads in round 2; a client that raises is named there, too."""
    overrides = ("strategy=local_only", "evaluate.every=9")
    for name, more in (("ray", ON_RAY), ("here", ())):
        config = small(tmp_path / name, *overrides, *more)
        fedssl.run(sabotaged(config, "raise", round_num=2, partitions=[3]))
    assert_same_run(tmp_path / "ray", tmp_path / "here")
    (failure,) = rows(tmp_path / "ray", "round")[1]["metrics"]["failures"]
    assert failure == {
        "partition": 3,
        "kind": "failed",
        "reason": "ClientError: during local training: RuntimeError: the disk is full",
    }
