"""One process at a time in a folder; the lock goes with its holder."""

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedssl.errors import ConfigError
from fedssl.lock import MAX_TRIES, NAME, check_free, held

ADVICE = ("--work mine", "name another")
HOLDER = """
import subprocess, sys
from pathlib import Path
from fedssl.lock import held
with held(Path(sys.argv[1]), "", ""):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    print(child.pid, flush=True)
    input()
"""


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught, held(folder, *ADVICE):
        pass
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with held(tmp_path, *ADVICE):
        said = f"--work mine is in use by process {os.getpid()} on {platform.node()}: name another"
        assert refused(tmp_path) == said
        with pytest.raises(ConfigError, match="--work mine is in use by process"):
            check_free(tmp_path, *ADVICE)
        with held(tmp_path.parent, *ADVICE):  # another folder is another matter
            pass
        assert refused(tmp_path) == said  # and still is
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path, *ADVICE):
        pass


def test_an_error_inside_ends_it_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), held(tmp_path, *ADVICE):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    check_free(tmp_path, *ADVICE)


def test_a_killed_holder_leaves_nothing_to_clean_up(tmp_path: Path) -> None:
    """Though a process that it started lives on."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    holder = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    child_lives = Path(f"/proc/{child}/cwd").exists
    try:
        assert f"in use by process {holder.pid} on " in refused(tmp_path)
        os.kill(child, signal.SIGSTOP)  # so that it does not end with its input
        holder.kill()
        holder.wait()
        assert child_lives()
        assert (tmp_path / NAME).is_file()
        with held(tmp_path, *ADVICE):
            assert f"process {os.getpid()} on " in refused(tmp_path)
        assert list(tmp_path.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
        assert holder.stdin is not None
        holder.stdin.close()


def test_what_a_kill_has_left_is_free(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("process 1 on another machine, and more of it than the next one writes" * 9)
    check_free(tmp_path, *ADVICE)
    with held(tmp_path, *ADVICE):
        assert (tmp_path / NAME).read_text() == f"process {os.getpid()} on {platform.node()}"


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EBADF])
def test_a_filesystem_without_locks_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path, *ADVICE), held(tmp_path, *ADVICE):
        (tmp_path / "result").write_text("there")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_folder_in_which_no_file_can_be_made_is_used_without(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with held(tmp_path, *ADVICE):
        pass
    assert (tmp_path / NAME).is_dir()


@pytest.mark.parametrize("times", [1, MAX_TRIES - 1])
def test_a_file_that_goes_while_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """As when the holder ends between our opening the file and our locking it."""
    flock, calls = fcntl.flock, []

    def late(file: Any, operation: int) -> None:
        calls.append(file)
        if len(calls) <= times:
            (tmp_path / NAME).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with held(tmp_path, *ADVICE):
        assert len(calls) == times + 1
        assert f"process {os.getpid()}" in refused(tmp_path)
