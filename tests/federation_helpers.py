"""A federation of seconds, ways to sabotage its clients, and how to read what a run left."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import signal
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.config import compose, conf_dir
from fedssl.federation import rounds, simulation
from fedssl.federation.checkpoint import Checkpoints
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.grids.in_process import InProcess
from fedssl.federation.records import Upload
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy, load_client_app
from fedssl.lock import held

torch.set_num_threads(1)  # these networks are too small for two: threads would only wait for each other

# Read and not composed: Ray's workers import this file, too.
_FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((conf_dir() / "strategy").glob("*.yaml"))}
STRATEGIES = list(_FILES)
WITH_CLIENTS = [name for name in STRATEGIES if _FILES[name]["client"] is not None]
SERVERS = {name: _FILES[name]["server"]["_target_"] for name in STRATEGIES}  # their server halves
STOCK = [name for name in STRATEGIES if SERVERS[name] == "fedssl.federation.stock.Stock"]
# Ours, and two of Flower's: with state, and without.
ONE_OF_EACH_KIND = {*STRATEGIES}.difference(STOCK) | {"fedadam", "krum"}

FAMILIES = ("conv4_4", "conv4_2", "tiny")  # of partitions 0 to 3: conv4_4, conv4_2, tiny, conv4_4
QUICK = (  # rounds and probes of next to no work
    "client.local_epochs=1",
    "distill.epochs=1",
    "distill.batch_size=8",
    "distill.queue_size=16",
    "evaluate.labels.per_class=[1]",
    "evaluate.labels.num_draws=2",
    "evaluate.linear.l2=[0.01]",
    "evaluate.logistic.max_iterations=5",
)
SMALL = (
    *QUICK,
    "grid=in_process",
    "device=cpu",
    "data.num_images=140",
    "public.size=24",
    "partition=iid",
    "federation.num_clients=4",
    "federation.num_rounds=2",
    f"federation.families=[{','.join(FAMILIES)}]",
    "+models.conv4_4={_target_: fedssl.models.backbones.Conv4, width: 4}",
    "+models.conv4_2={_target_: fedssl.models.backbones.Conv4, width: 2}",
    "+models.tiny={_target_: tests.federation_helpers.Tiny}",
    "projector.hidden_dim=16",
    "projector.out_dim=8",
    "client.batch_size=8",
)
NEEDS = {  # strategy -> what it asks of a federation: 3 clients a family; and of so few images: a short queue
    "bulyan": ("federation.families=[conv4_4]",),
    "fedmkd": ("strategy.server.queue_size=32",),
}
COHORTS = {"bulyan": 3}  # strategy -> the smallest cohort that is one to it; else 2
ON_RAY = ("grid=ray", "grid.workers=2", "grid.gpus=2")  # the Ray of test_grids_ray.py, which sees two GPUs: one start


class Tiny(nn.Module):
    """A user's own backbone: batch norm, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        return self.scale * torch.relu(self.norm(self.conv(x))).flatten(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sabotaged:
    """A client half that misbehaves in one round on some partitions.

    Args:
        inner: the client half that does the work otherwise.
        action: raise; raise in evaluation; kill or interrupt (its own process, the first time); or a lie about the
            upload.
        marker: a file that says that the kill has happened.
    """

    inner: Any
    action: str
    round_num: int
    partitions: list[int]
    marker: str | None = None

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        if client.round_num != self.round_num or client.partition_id not in self.partitions:
            upload: Upload = self.inner(client, broadcast)
            return upload
        if self.action == "raise":
            with client.doing("local training"):
                raise RuntimeError("the disk is full")
        upload = self.inner(client, broadcast)
        if self.action == "raise in evaluation":
            return upload
        if self.action in ("kill", "interrupt"):
            assert self.marker is not None
            if not Path(self.marker).exists():
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGINT)
            return upload
        return lie(upload, self.action)

    def evaluate(self, client: Client, broadcast: Broadcast) -> dict[str, float]:
        mine = client.round_num == self.round_num and client.partition_id in self.partitions
        if self.action == "raise in evaluation" and mine:
            raise RuntimeError("no memory left")
        metrics: dict[str, float] = self.inner.evaluate(client, broadcast)
        return metrics


def lie(upload: Upload, action: str) -> Upload:
    """An upload that is wrong in one respect."""
    header, arrays, metrics = upload.header, dict(upload.arrays), dict(upload.metrics)
    first = next(iter(arrays))
    if action == "wrong round":
        header = dataclasses.replace(header, round_num=header.round_num + 1)
    elif action == "wrong codec":
        header = dataclasses.replace(header, codec="morse")
    elif action == "wrong public set":
        header = dataclasses.replace(header, public_fingerprint="0" * 64)
    elif action == "somebody else":
        header = dataclasses.replace(header, partition_id=header.partition_id - 1)
    elif action == "nan":
        arrays[first] = np.full_like(arrays[first], np.nan)
    elif action == "wrong dtype":
        arrays[first] = arrays[first].astype(np.float64)
    elif action == "wrong shape":
        arrays[first] = arrays[first][:-1]
    elif action == "other name":
        arrays["loot"] = arrays.pop(first)
    elif action == "infinite weight":
        metrics["num-examples"] = float("inf")
    elif action == "overflowing weight":
        metrics["num-examples"] = 1e308
    elif action == "a million images":
        metrics["num-examples"] = 1e6
    elif action == "huge":  # each weight passes for one of a network, together they do not
        own = f"{header.family}/"
        arrays = {name: np.full_like(value, 9e9) if name.startswith(own) else value for name, value in arrays.items()}
    elif action == "large":  # a network works with them in eval mode
        arrays = {name: np.full_like(value, 900) for name, value in arrays.items()}
    elif action == "no weight":
        del metrics["num-examples"]
    elif action == "collapsed":
        arrays[first] = np.broadcast_to(arrays[first][:1], arrays[first].shape).copy()
    else:
        raise AssertionError(action)
    return dataclasses.replace(upload, header=header, arrays=arrays, metrics=metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountsThreads:
    """A client half that reports torch's threads."""

    inner: Any

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        upload: Upload = self.inner(client, broadcast)
        return dataclasses.replace(upload, metrics={**upload.metrics, "threads": torch.get_num_threads()})

    def evaluate(self, client: Client, broadcast: Broadcast) -> dict[str, float]:
        metrics: dict[str, float] = self.inner.evaluate(client, broadcast)
        return metrics


def slow_unless(often: Container[str], names: Iterable[str]) -> list[Any]:
    """`names` as parameters of a test, of which those of `often` are in the default suite."""
    return [pytest.param(name, marks=[] if name in often else pytest.mark.slow) for name in names]


# --- making a run -------------------------------------------------------------------------------------------------
@lru_cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    sized = "public=client_shard" not in overrides  # a shard has the size it has
    needs = [need for o in overrides for need in NEEDS.get(o.removeprefix("strategy="), ())]
    return compose([*(o for o in SMALL if sized or not o.startswith("public.size=")), *needs, *overrides])


def small(run_dir: Path | None = None, *overrides: str) -> dict[str, Any]:
    """The resolved configuration of a small run in `run_dir`."""
    config = copy.deepcopy(_composed(overrides))
    config["run_dir"] = str(run_dir)
    return config


@contextlib.contextmanager
def another_begins(folder: Path, write: Callable[[], object], *, still_there: bool) -> Iterator[None]:
    """While a run builds its strategy, another holds `folder`, or has held it, and does `write`."""
    with contextlib.ExitStack() as other, pytest.MonkeyPatch.context() as patch:

        def build(setup: Setup) -> Strategy:
            folder.mkdir(exist_ok=True)
            if still_there:
                other.enter_context(held(folder, "", ""))
            write()
            return build_strategy(setup)

        patch.setattr(simulation, "build_strategy", build)
        yield


def sabotaged(config: dict[str, Any], action: str, *, round_num: int, partitions: list[int], **more: Any) -> Any:
    """`config` with a client half that misbehaves."""
    config = copy.deepcopy(config)
    config["strategy"]["client"] = {
        "_target_": "tests.federation_helpers.Sabotaged",
        "inner": config["strategy"]["client"],
        "action": action,
        "round_num": round_num,
        "partitions": partitions,
        **more,
    }
    return config


def open_in_process(config: Mapping[str, Any], run_dir: Path) -> Grid:
    """The clients of `config` on a grid in this process."""
    return InProcess().open(
        lambda: load_client_app(config, run_dir),
        num_clients=config["federation"]["num_clients"],
        threads=1,
        device="cpu",
    )


def first_round(config: Mapping[str, Any], run_dir: Path) -> tuple[Setup, Strategy, list[Message], list[Message]]:
    """Setup, strategy, messages and replies of round 1, before any aggregation."""
    setup = Setup(config)
    strategy = build_strategy(setup)
    grid = open_in_process(config, run_dir)
    messages = list(strategy.configure_train(1, setup.server().initial_arrays(), ConfigRecord(), grid))
    return setup, strategy, messages, list(grid.send_and_receive(messages))


def run_interrupted(config: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, *, before_round: int) -> None:
    """Run until Ctrl-C between two rounds."""
    one_round = rounds.Rounds.one_round

    def until(self: rounds.Rounds, state: rounds.State, round_num: int) -> rounds.State:
        if round_num == before_round:
            raise KeyboardInterrupt
        return one_round(self, state, round_num)

    with monkeypatch.context() as patch:
        patch.setattr(rounds.Rounds, "one_round", until)
        with pytest.raises(KeyboardInterrupt):
            simulation.run(config)


# --- reading what a run left --------------------------------------------------------------------------------------
Numpy = dict[str, np.ndarray]


def numpy_of(arrays: ArrayRecord) -> Numpy:
    """The arrays of a record by name."""
    return {name: array.numpy() for name, array in arrays.items()}


def final_arrays(run_dir: Path) -> Numpy:
    """The global arrays of a run's newest checkpoint."""
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=1)
    return numpy_of(checkpoints.load(checkpoints.rounds()[-1])[0])


def assert_same(a: Numpy, b: Numpy) -> None:
    """Equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())


def rows(run_dir: Path, scope: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [without_clock(line) for line in lines if scope in (None, line["scope"])]


def without_clock(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl or a summary without the names that speak of seconds."""
    return {
        name: without_clock(value) if isinstance(value, Mapping) else value
        for name, value in row.items()
        if "seconds" not in name
    }


def tree_hash(folder: Path) -> str:
    """Changes with the name, the content or the time of any file in `folder`."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        sha256.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}".encode())
        sha256.update(path.read_bytes() if path.is_file() else b"")
    return sha256.hexdigest()
