"""`grid.address=`: a Ray cluster of two nodes with one core each, both on this machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedssl
from fedssl.errors import ConfigError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.grids.ray import Placement, Ray, RayGrid
from fedssl.federation.grids.ray_runtime import start_ray
from fedssl.federation.records import Upload
from tests import grid_apps
from tests.federation_helpers import assert_same, final_arrays, rows, small
from tests.test_grids import messages
from tests.test_grids_ray import facts, wait_for_workers

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its log files to the garbage collector
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """The head, on which the driver sits."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # of the tests before
    folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # nobody else's "auto" finds it
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    shutil.rmtree(folder)


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    """The other node; `kill_its_node` may end it before the test does."""
    node = cluster.add_node(num_cpus=1)
    yield node
    cluster.remove_node(node, allow_graceful=False)


def settings(cluster: Any, workers: int | None = None) -> Ray:
    return Ray(
        workers=workers,
        clients_per_gpu=1,
        max_clients_per_gpu=8,
        gpu_memory_share=0.9,
        gpus=None,
        address=cluster.address,
        max_retries=1,
        batch_seconds=0.1,
    )


@dataclass(frozen=True, kw_only=True)
class OnBothNodes:
    """A client half whose first task on any node but the head's waits there for its end.

    Args:
        inner: the client half that does the work.
        head: node id; a client there waits until the other node has its task.
        marker: a file that says so.
        kill: whether that task ends its whole node; else it goes on.
    """

    inner: Any
    head: str
    marker: str
    kill: bool

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        import ray

        marker = Path(self.marker)
        if ray.get_runtime_context().get_node_id() != self.head and not marker.exists():
            marker.write_text(str(client.partition_id))
            if self.kill:
                os.kill(os.getppid(), signal.SIGKILL)  # the raylet, which is the node
                time.sleep(120)
        deadline = time.monotonic() + 120
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        upload: Upload = self.inner(client, broadcast)
        return upload

    def evaluate(self, client: Client, broadcast: Broadcast) -> dict[str, float]:
        metrics: dict[str, float] = self.inner.evaluate(client, broadcast)
        return metrics


@pytest.mark.parametrize("workers", [None, 2])
def test_workers_sit_on_both_nodes(cluster: Any, second: Any, workers: int | None) -> None:
    with settings(cluster, workers).open(grid_apps.Behaviour, num_clients=6, threads=1, device="auto") as grid:
        wait_for_workers(grid)
        assert {slot.device.partition("/")[0] for slot in grid._slots} == {cluster.head_node.node_id, second.node_id}
        replies = grid.send_and_receive(messages(grid, list(range(6)), "sleep", seconds=0.3))
        assert facts(replies, "partition") == list(range(6))
        assert len(set(facts(replies, "pid"))) == 2


def test_a_cluster_without_room_is_named(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedssl.federation.grids.ray.START_SECONDS", 0.0)
    start_ray(cluster.address, None)
    placement = Placement(workers=1, num_cpus=64, num_gpus=0)
    with RayGrid(settings(cluster), grid_apps.Behaviour, num_clients=2, threads=1, placement=placement) as grid:
        grid.send_and_receive(messages(grid, [0]), timeout=1)
    (warning,) = caplog.messages
    assert "each asks Ray for 64 CPUs and 0 GPUs" in warning
    assert str(cluster.address) in warning


@pytest.mark.parametrize("kill", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_on_a_cluster_is_the_run_in_process(cluster: Any, second: Any, tmp_path: Path, kill: bool) -> None:
    """Weights, rows and the clients' memory; also where a node dies with a client on it, which the round names."""
    overrides = ("strategy=fedema", "evaluate.every=9")
    fedssl.run(small(tmp_path / "here", *overrides))
    on_cluster = ("grid=ray", f"grid.address={cluster.address}", f"client.store={tmp_path / 'memory'}")
    config = small(tmp_path / "run", *overrides, *on_cluster)
    config["strategy"]["client"] = {
        "_target_": "tests.test_grids_ray_cluster.OnBothNodes",
        "inner": config["strategy"]["client"],
        "head": cluster.head_node.node_id,
        "marker": str(tmp_path / "marker"),
        "kill": kill,
    }
    fedssl.run(config)

    assert_same(final_arrays(tmp_path / "run"), final_arrays(tmp_path / "here"))
    ours, theirs = (
        [row for row in rows(tmp_path / name) if row["scope"] in ("client", "server")] for name in ("run", "here")
    )
    assert ours == theirs
    memories = [
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.safetensors")}
        for root in (tmp_path / "memory", tmp_path / "here" / "clients")
    ]
    assert memories[0] == memories[1]
    assert len(memories[0]) >= 4
    unlucky = int((tmp_path / "marker").read_text())
    first, _ = (row["metrics"] for row in rows(tmp_path / "run", "round"))
    assert (first["num_ok"], first["num_failed"]) == (4, 0)
    assert [(failure["partition"], failure["kind"]) for failure in first["failures"]] == (
        [(unlucky, "worker_died")] if kill else []
    )
    assert all("died: its node has died" in failure["reason"] for failure in first["failures"])


# --- addresses that do not work --------------------------------------------------------------------------------------
@pytest.fixture
def mute() -> Iterator[str]:
    """A port that is open, and nobody speaks."""
    with socket.socket() as server:
        server.bind(("", 0))  # Ray takes 127.0.0.1 for the address that others see
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_without_a_cluster_is_refused(mute: str) -> None:
    for address in ("127.0.0.1:1", mute, "nobody.invalid:6379"):
        with pytest.raises(ConfigError, match=rf"grid\.address={address}, but no Ray cluster answers there"):
            start_ray(address, None)


@pytest.mark.parametrize("address", ["6379", "ray://127.0.0.1:10001", "local", ""])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"grid\.address must be auto or host:port .*, or null"):
        Ray(
            workers=None,
            clients_per_gpu=1,
            max_clients_per_gpu=8,
            gpu_memory_share=0.9,
            gpus=None,
            address=address,
            max_retries=1,
            batch_seconds=0.1,
        )


def test_the_command_ends_with_code_2(tmp_path: Path) -> None:
    overrides = ["data.num_images=140", "public.size=24", "grid.address=127.0.0.1:1", f"run_dir={tmp_path / 'run'}"]
    ended = subprocess.run(
        [sys.executable, "-m", "fedssl", *overrides], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2, ended
    assert ended.stderr.startswith("error: grid.address=127.0.0.1:1, but no Ray cluster answers there")
    assert "ray start --head" in ended.stderr
