"""One process at a time in a folder, by a lock that the system releases when its holder ends, however it ends."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fedssl.errors import ConfigError

NAME = ".lock"  # it says who holds the folder; after a kill it stays, and holds nobody up
MAX_TRIES = 100  # to lock a file that others remove at the same time


@contextlib.contextmanager
def held(folder: Path, named: str, advice: str, *, name: str = NAME) -> Iterator[None]:
    """Inside, no other process holds `folder`. Processes that this one starts do not inherit it.

    The lock is advisory (`flock`). Where the filesystem has none, or the file cannot be made, it goes on without.

    Args:
        folder: exists.
        named: how the message calls it, e.g. "--work DIR".
        advice: what would work, for the message.
        name: of the lock's file; with another one, what is held is not `folder` but what the name says.

    Raises:
        ConfigError: another process holds it; the message says which.
    """
    path = folder / name
    file = _locked(path, named, advice)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                if _is_still_at(file, path):
                    path.unlink()  # before the lock goes: whoever has opened it meanwhile looks again
            file.close()


def check_free(folder: Path, named: str, advice: str) -> None:
    """Raise as `held` would; a folder in which nobody was stays as it is."""
    if (folder / NAME).is_file():
        with held(folder, named, advice):
            pass


def _locked(path: Path, named: str, advice: str) -> IO[bytes] | None:
    """The open file, with the lock; None where there can be none."""
    for _ in range(MAX_TRIES):
        try:
            file = path.open("ab+", buffering=0)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_at(file, path):
                with contextlib.suppress(OSError):  # the disk is full: held all the same
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}".encode())
                return file
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().decode() or "another process"
            raise ConfigError(f"{named} is in use by {holder}: {advice}") from None
        except OSError:
            file.close()
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        file.close()
    return None


def _is_still_at(file: IO[bytes], path: Path) -> bool:
    """Whether a process that opened `path` now would meet this file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
