"""A process that has imported everything and forks for every message: what a message costs beside its work, kept low.

A SuperNode starts a process for every message, and the imports of torch, Flower and fedssl take seconds each time. A
node of `fedssl-deploy client` keeps this process beside it instead; the command that the SuperNode starts is
`fedssl.deploy.front`, which hands its arguments and its output over and waits. Where this process is not there, or
not yet, the command does the work itself.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from fedssl.deploy import clientapp
from fedssl.federation.flower_compat import CLIENTAPP_COMMAND

BEFOREHAND = ("fedssl.data.views.fused", "numba", "PIL.Image", "sklearn.datasets", "torch.optim")  # a round needs them
GOODBYE_SECONDS = 5.0  # of a process whose command is gone
LOOK_SECONDS = 1.0  # between two looks whether the node is still there


def main(argv: Sequence[str] | None = None) -> int:
    """Serve at the socket that the first argument names, until the process that started this one is gone."""
    path = Path((sys.argv[1:] if argv is None else argv)[0])
    for name in BEFOREHAND:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if others := [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]:
        print(f"not forking beside the threads {', '.join(others)}: messages take longer", file=sys.stderr)
        return 1  # those of OpenBLAS and jemalloc are no Python threads, and know what to do when a process forks
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        partial = path.with_name("partial")
        listener.bind(str(partial))
        listener.listen()
        partial.rename(path)  # now it can be found
        listener.settimeout(LOOK_SECONDS)
        while os.getppid() == parent:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                _fork(connection, listener)
    return 0


def _fork(connection: socket.socket, listener: socket.socket) -> None:
    """One message in a process of its own, which says how it ended."""
    connection.setblocking(True)
    said, outputs, *_ = socket.recv_fds(connection, 1 << 16, 2)
    if len(outputs) == 2 and os.fork() == 0:
        code = 1
        try:
            listener.close()
            for output, standard in zip(outputs, (1, 2), strict=True):
                os.dup2(output, standard)
            threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
            sys.argv = [CLIENTAPP_COMMAND, *json.loads(said)]
            clientapp.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
                connection.sendall(str(code).encode())
            os._exit(code)  # with whatever hangs
    for output in outputs:
        os.close(output)


def _end_with(connection: socket.socket) -> None:
    """End this process when the command that waits for it has ended: nobody would take its answer."""
    with contextlib.suppress(OSError):
        connection.recv(1)  # nothing comes
    os.kill(os.getpid(), signal.SIGTERM)  # Flower's handler says goodbye
    time.sleep(GOODBYE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
