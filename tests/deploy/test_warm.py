"""The process that forks for every message, and what happens without it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedssl.deploy.processes import end, environment
from tests.deploy.harness import until

WARM = [sys.executable, "-m", "fedssl.deploy.warm"]


@pytest.fixture
def seen(tmp_path: Path) -> dict[str, str]:
    return environment(tmp_path / "flower")


@pytest.fixture
def warm(tmp_path: Path, seen: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    path = tmp_path / "warm"
    process = subprocess.Popen([*WARM, str(path)], env=seen, start_new_session=True)
    until(path.exists, seconds=120, what="a warm process")
    yield process, path
    end(process)


def front(path: Path, seen: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedssl.deploy.front", str(path), *arguments]
    return subprocess.run(command, env=seen, capture_output=True, text=True, check=False, timeout=120)


def test_a_message_is_handed_over_with_its_output_and_its_exit_code(
    warm: tuple[subprocess.Popen[bytes], Path], seen: dict[str, str]
) -> None:
    _, path = warm
    for _ in range(2):
        helped = front(path, seen, "--help")
        assert helped.returncode == 0
        assert "--runtime-api-address" in helped.stdout
    refused = front(path, seen, "--no-such-option")
    assert refused.returncode == 2
    assert "usage: flwr-clientapp" in refused.stderr


def test_without_a_warm_process_the_command_works_itself(tmp_path: Path, seen: dict[str, str]) -> None:
    helped = front(tmp_path / "nobody", seen, "--help")
    assert helped.returncode == 0
    assert "--runtime-api-address" in helped.stdout


def test_a_warm_process_is_no_zombies_and_does_not_outlive_its_node(tmp_path: Path, seen: dict[str, str]) -> None:
    path, told = tmp_path / "warm", tmp_path / "pid"
    starter = (
        "import subprocess, sys, time; from pathlib import Path;"
        f"p = subprocess.Popen({[*WARM, str(path)]!r}); Path({str(told)!r}).write_text(str(p.pid)); time.sleep(600)"
    )
    node = subprocess.Popen([sys.executable, "-c", starter], env=seen)
    try:
        until(path.exists, seconds=120, what="a warm process")
        pid = int(told.read_text())
        assert front(path, seen, "--help").returncode == 0
        time.sleep(1.5)  # it looks every second
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children == []
    finally:
        os.kill(node.pid, signal.SIGKILL)
        node.wait()
    until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), seconds=20, what="its end")


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
