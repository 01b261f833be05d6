"""Servers and nodes as processes of their own on loopback, and their end by process id."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from fedssl.deploy.processes import family_tree, free_port
from tests.federation_helpers import QUICK

ROOT = Path(__file__).parents[2]
TINY = (
    *QUICK,
    "data.num_images=140",
    "public.size=24",
    "partition=iid",
    "federation.num_clients=3",
    "federation.families=[conv4_16,conv4_32,resnet8]",
    "client.batch_size=16",
    "device=cpu",
)
COMMAND = [sys.executable, "-m", "fedssl.deploy.command"]


def folder_of(path: Path, num_images: int, seed: int, *classes: str) -> Path:
    """Image files of noise, in the layout of `image_folder`; without classes unlabelled."""
    pixels = np.random.default_rng(seed).integers(256, size=(num_images, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = path / classes[number % len(classes)] if classes else path
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:03}.png")
    return path


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def until(true: Callable[[], object], *, seconds: float, what: str) -> None:
    """Wait for `true()`, or fail with `what`."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds} s")
        time.sleep(0.1)


class Deployment:
    """One server and its nodes. A context manager: everything it started is gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.port = free_port()
        self.server: subprocess.Popen[bytes] | None = None
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}

    def start_server(self, *overrides: str, options: Sequence[str] = ("--insecure", "--wait", "120")) -> None:
        command = [*COMMAND, "server", *options, "--port", str(self.port), *overrides]
        self.server = self._start(command, "server")

    def start_node(
        self,
        partition: int,
        *overrides: str,
        options: Sequence[str] = ("--insecure", "--restarts", "0"),
        disk_kb: int | None = None,
    ) -> None:
        """A node; with `disk_kb` none of its files can become larger, as on a disk that is full."""
        own = [f"partition_id={partition}", f"store={self.folder / f'node{partition}'}", "device=cpu"]
        address = f"127.0.0.1:{self.port}"
        limit = [] if disk_kb is None else ["bash", "-c", f'ulimit -f {disk_kb}; exec "$@"', "bash"]
        command = [*limit, *COMMAND, "client", address, *options, *own, *overrides]
        self.nodes[partition] = self._start(command, f"node{partition}")

    def _start(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def finish(self, seconds: float = 240) -> int:
        """Wait for the server; its exit code."""
        assert self.server is not None
        try:
            return self.server.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end within {seconds} s:\n{self.said('server')}") from None

    def kill_node(self, partition: int) -> None:
        """The whole node, as when its machine loses power."""
        process = self.nodes.pop(partition)
        kill(family_tree(process.pid))
        process.wait()

    def kill_server(self) -> None:
        assert self.server is not None
        kill(family_tree(self.server.pid))
        self.server.wait()

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pids = {pid for process in self._all() for pid in family_tree(process.pid)}
        kill(sorted(pids))
        for process in self._all():
            process.wait()

    def _all(self) -> Iterator[subprocess.Popen[bytes]]:
        yield from self.nodes.values()
        if self.server is not None:
            yield self.server
