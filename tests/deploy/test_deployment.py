"""Real servers and nodes on loopback: the same result as in a simulation, and every fault named."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedssl.config import compose
from fedssl.deploy.processes import environment, family_tree, free_port
from fedssl.federation import simulation
from tests.deploy.harness import ROOT, TINY, Deployment, folder_of, kill, until
from tests.federation_helpers import assert_same, final_arrays, rows

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its log files to the garbage collector
]

FAULTY = "strategy.client._target_=tests.deploy.faulty.Faulty"
ALLOWED = "allow_targets=[fedssl.,strategies.,tests.deploy.faulty.Faulty]"


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path) as made:
        yield made


def simulated(folder: Path, *overrides: str) -> Path:
    """The run directory of the same run in this process."""
    simulation.run(compose([*TINY, "grid=in_process", f"run_dir={folder}", *overrides]))
    return folder


def faulty(folder: Path, *faults: str) -> list[str]:
    return [FAULTY, f"+strategy.client.faults=[{','.join(map(repr, faults))}]", f"+strategy.client.folder={folder}"]


def outcomes(run_dir: Path) -> dict[int, tuple[int, list[tuple[int, str]]]]:
    """Of each round the number of usable replies, and who failed how."""
    return {
        row["round"]: (row["metrics"]["num_ok"], [(f["partition"], f["kind"]) for f in row["metrics"]["failures"]])
        for row in rows(run_dir, "round")
    }


def reason(run_dir: Path, round_num: int) -> str:
    (row,) = [row for row in rows(run_dir, "round") if row["round"] == round_num]
    return " ".join(failure["reason"] for failure in row["metrics"]["failures"])


def test_same_weights_in_process_on_ray_in_flowers_engine_and_deployed(deployment: Deployment, tmp_path: Path) -> None:
    """Two rounds of FLESD with factors (rotated by the seed, as in every rehearsal), bit for bit."""
    rounds = "federation.num_rounds=2"
    for partition in range(3):
        deployment.start_node(partition)
    deployment.start_server(*TINY, rounds, f"run_dir={deployment.run_dir}")
    here = final_arrays(simulated(tmp_path / "in_process", rounds))
    simulated(tmp_path / "ray", rounds, "grid=ray", "grid.workers=2")
    assert_same(here, final_arrays(tmp_path / "ray"))
    assert deployment.finish() == 0, deployment.said("server")
    assert_same(here, final_arrays(deployment.run_dir))
    assert rows(deployment.run_dir, "eval") == rows(tmp_path / "in_process", "eval")
    assert_same(here, final_arrays(in_flowers_engine(tmp_path, rounds)))


def in_flowers_engine(tmp_path: Path, *overrides: str) -> Path:
    """The run directory of the same app under `flwr run` in Flower's simulation."""
    home, run_dir, bundle = tmp_path / "home", tmp_path / "engine", tmp_path / "bundle"
    home.mkdir()
    port = str(free_port())
    seen = {**environment(home), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port, "FLWR_LOCAL_CONTROL_API_PORT": port}
    (home / "config.toml").write_text('[superlink.local]\naddress = ":local:"\n')
    made = [
        sys.executable,
        "-m",
        "fedssl.deploy.command",
        "bundle",
        str(bundle),
        *TINY,
        *overrides,
        f"run_dir={run_dir}",
    ]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    flwr = ["flwr", "run", str(bundle), "local", "--run-config", f"{bundle}-run.toml", "--federation-config"]
    sized = "num-supernodes=3 client-resources-num-cpus=1"
    try:
        done = subprocess.run([*flwr, sized], cwd=ROOT, env=seen, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        until(lambda: (run_dir / "summary.json").exists(), seconds=180, what="the end of the run in Flower's engine")
    finally:  # its daemons stay
        for status in Path("/proc").glob("[0-9]*/environ"):
            try:
                mine = f"FLWR_HOME={home}\0".encode() in status.read_bytes()
            except OSError:
                continue
            if mine:
                kill(family_tree(int(status.parent.name)))
    return run_dir


def test_every_fault_of_a_client_is_named_and_the_round_goes_on(deployment: Deployment, tmp_path: Path) -> None:
    """One fault a round on partition 1; the others' replies are used, and it is asked again in the next round."""
    faults = [
        "1:1:raise",
        "2:1:wrong round",
        "3:1:wrong public set",
        "4:1:nan",
        "5:1:ten times",
        "6:1:late",
        "7:1:hang",
    ]
    run = [
        *TINY, *faulty(tmp_path, *faults), "federation.num_rounds=8", "federation.round_timeout=30",
        "federation.keep_checkpoints=1", f"run_dir={deployment.run_dir}",
    ]  # fmt: skip
    for partition in range(3):
        deployment.start_node(partition, ALLOWED)
    deployment.start_server(*run)
    assert deployment.finish(420) == 0, deployment.said("server")
    seen = outcomes(deployment.run_dir)
    assert seen[1] == (2, [(1, "failed")])
    assert "the camera is broken" in reason(deployment.run_dir, 1)
    assert [seen[r] for r in (2, 3, 4, 5)] == [(2, [(1, "refused")])] * 4
    assert "it is for round 3, this is round 2" in reason(deployment.run_dir, 2)
    assert "its public set (000000000000)" in reason(deployment.run_dir, 3)
    assert [seen[r] for r in (6, 7)] == [(2, [(1, "late")])] * 2
    assert "no reply within 30 s" in reason(deployment.run_dir, 7)
    assert json.loads((deployment.run_dir / "summary.json").read_text())["rounds"] == 8
    said = deployment.said("server")
    assert "client refused in round 4, partition 1" in said
    assert "round 1/8  ok 2/3" in said


def test_a_node_that_loses_power_is_one_failure_and_comes_back_with_its_state(
    deployment: Deployment, tmp_path: Path
) -> None:
    """As in a simulation in which that client fails in that round: it goes on from what it remembered before."""
    keeps_models = ("downlink=none", "federation.num_rounds=3")
    run = [*TINY, *keeps_models, *faulty(tmp_path, "2:1:wait"), f"run_dir={deployment.run_dir}"]
    for partition in range(3):
        deployment.start_node(partition, ALLOWED)
    deployment.start_server(*run)
    until((tmp_path / "working-2-1").exists, seconds=300, what="work in round 2")
    deployment.kill_node(1)
    deployment.start_node(1, ALLOWED)
    assert deployment.finish(300) == 0, deployment.said("server")
    assert outcomes(deployment.run_dir) == {1: (3, []), 2: (2, [(1, "failed")]), 3: (3, [])}
    with_failure = simulated(tmp_path / "sim", *keeps_models, *faulty(tmp_path / "sim", "2:1:raise"))
    assert_same(final_arrays(with_failure), final_arrays(deployment.run_dir))


def test_a_server_that_loses_power_goes_on_by_resume(deployment: Deployment, tmp_path: Path) -> None:
    """Its nodes stay; the end is that of a run that was left alone."""
    run = ["downlink=none", "federation.num_rounds=3"]
    for partition in range(3):
        deployment.start_node(partition, options=("--insecure", "--restarts", "5"))
    deployment.start_server(*TINY, *run, f"run_dir={deployment.run_dir}")
    metrics = deployment.run_dir / "metrics.jsonl"
    until(
        lambda: metrics.exists() and any(row["round"] == 1 for row in rows(deployment.run_dir, "server")),
        seconds=300,
        what="the end of round 1",
    )
    deployment.kill_server()
    deployment.start_server(f"resume={deployment.run_dir}")
    assert deployment.finish(300) == 0, deployment.said("server")
    assert_same(final_arrays(simulated(tmp_path / "sim", *run)), final_arrays(deployment.run_dir))
    assert [row["round"] for row in rows(deployment.run_dir, "server")] == [1, 2, 3]
    again = Deployment(tmp_path)
    again.start_server(f"resume={deployment.run_dir}")
    assert again.finish(60) == 0  # complete: its summary, and no SuperLink


def test_too_few_replies_end_with_3_and_lose_nothing(deployment: Deployment, tmp_path: Path) -> None:
    run = [*TINY, *faulty(tmp_path, "2:0:raise", "2:1:raise"), "federation.min_replies=2", "federation.num_rounds=2"]
    for partition in range(3):
        deployment.start_node(partition, ALLOWED)
    deployment.start_server(*run, f"run_dir={deployment.run_dir}")
    assert deployment.finish() == 3, deployment.said("server")
    assert "round 2 has 1 usable replies of 3, federation.min_replies asks for 2" in deployment.said("server")
    summary = json.loads((deployment.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("failed", 1)


def test_a_full_disk_at_a_client_is_its_failure(deployment: Deployment) -> None:
    """Its memory cannot be written: that client is named, the others go on."""
    for partition in range(3):
        deployment.start_node(partition, disk_kb=200 if partition == 1 else None)
    deployment.start_server(*TINY, "downlink=none", "federation.num_rounds=1", f"run_dir={deployment.run_dir}")
    assert deployment.finish() == 0, deployment.said("server")
    assert outcomes(deployment.run_dir) == {1: (2, [(1, "failed")])}
    assert "writing the client store" in reason(deployment.run_dir, 1)


def test_nodes_that_do_not_fit_are_named_and_the_run_does_not_start(deployment: Deployment) -> None:
    deployment.start_node(0)
    deployment.start_node(1, "family=perceptron")
    deployment.start_node(2, "data=digits", "public.data=digits")
    deployment.start_server(*TINY, f"run_dir={deployment.run_dir}", options=("--insecure", "--wait", "40"))
    assert deployment.finish(120) == 2
    said = deployment.said("server")
    assert "family=perceptron: the run knows" in said
    assert "this node has images of its own, and the run's public set (HeldOut) would be taken out of them" in said
    assert not (deployment.run_dir / "checkpoints").exists()


def test_nodes_with_images_of_their_own_serve_one_run_after_another(deployment: Deployment, tmp_path: Path) -> None:
    """The first is stopped by its time (4), the second by Ctrl-C (130) and goes on; nothing of a server is left."""
    folder_of(tmp_path / "public", 30, 1)
    folder_of(tmp_path / "probes", 40, 2, "cat", "dog")
    for partition, family in enumerate(("conv4_16", "resnet8")):
        mine = folder_of(tmp_path / f"mine{partition}", 20 + 10 * partition, 3 + partition)
        own = [
            "data=image_folder",
            f"data.root={mine}",
            "public.data=image_folder",
            f"public.root={tmp_path / 'public'}",
        ]
        deployment.start_node(partition, f"family={family}", *own, options=("--insecure", "--restarts", "9"))
    run = [
        *(o for o in TINY if o.split("=")[0] not in ("partition", "data.num_images", "federation.num_clients")),
        "partition=nodes", "federation.num_clients=2", "public=dataset", "public.data=image_folder",
        f"public.root={tmp_path / 'public'}", "data=image_folder", f"data.root={tmp_path / 'probes'}",
        "data.image_size=16", "federation.num_rounds=3",
    ]  # fmt: skip
    deployment.start_server(*run, "max_seconds=0", f"run_dir={tmp_path / 'first'}")
    assert deployment.finish() == 4, deployment.said("server")
    deployment.start_server(*run, f"run_dir={deployment.run_dir}")
    until(lambda: "round 1/3" in deployment.said("server"), seconds=240, what="the end of round 1")
    assert deployment.server is not None
    pids = family_tree(deployment.server.pid)
    deployment.server.send_signal(signal.SIGINT)
    assert deployment.finish(60) == 130
    assert [pid for pid in pids if family_tree(pid)] == []
    assert json.loads((deployment.run_dir / "summary.json").read_text())["status"] == "stopped"
    deployment.start_server(f"resume={deployment.run_dir}")
    assert deployment.finish() == 0, deployment.said("server")
    summary = json.loads((deployment.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["rounds"], set(summary["families"])) == ("completed", 3, {"conv4_16", "resnet8"})
    counts = [node["num_images"] for node in json.loads((deployment.run_dir / "deployment.json").read_text())["nodes"]]
    assert counts == [20, 30]
    assert (deployment.run_dir / "report.html").is_file()
