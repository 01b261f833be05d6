"""Independent work of one process at once on the CPU.

Small networks train faster side by side than one after the other on all cores: torch's threads wait for each other in
every layer. Distilling three students of 77 to 390 thousand parameters on two cores took 12.4 s so, and 16.5 s in turn.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

import torch

Result = TypeVar("Result")


def at_once(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each returns, in order. They begin in order, as many at once as torch has threads here, and share these.

    Each runs in a thread of Python's, so nothing that is local to one holds there (`torch.no_grad` outside, say), and
    of torch's global generators each must be content with `fedssl.seeding.seeded_init`.

    Raises:
        Exception: the first that one raised. The others end where they are, as they do when this thread is interrupted.
    """
    threads = torch.get_num_threads()
    number = min(threads, len(work))
    if number < 2:
        return [one() for one in work]
    waiting = deque(enumerate(work))
    results: dict[int, Result] = {}
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def begin() -> None:
        try:
            torch.set_num_threads(threads // number)
            while waiting:
                try:
                    position, one = waiting.popleft()
                except IndexError:  # another thread took the last
                    break
                results[position] = one()
        except BaseException as error:  # it is the caller's
            ended.put(error)
        else:
            ended.put(None)

    workers = [Thread(target=begin, daemon=True) for _ in range(number)]
    try:
        for worker in workers:
            worker.start()
        for _ in workers:
            if error := ended.get():
                raise error
    except BaseException:
        for worker in workers:
            _interrupt(worker)
        raise
    finally:
        for worker in workers:
            worker.join()
        torch.set_num_threads(threads)
    return [results[position] for position in range(len(work))]


def _interrupt(thread: Thread) -> None:
    """Raise SystemExit in it, when the operation that it is in has ended; Python offers it in C alone."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
