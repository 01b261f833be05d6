"""Jobs of a sweep at once, each in a process of its own with its share of the cores and GPUs."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError
from fedssl.outcome import BUG, INTERRUPTED, outcome_of, run

READER_SECONDS = 5.0  # for the last lines of a process that has ended; one that it left behind may keep them open


@dataclasses.dataclass(eq=False)
class Job:
    """The one run there is, or a job of a sweep; `config` and `note` (for after its summary) come from composing it."""

    run_dir: Path
    number: int = 0
    overrides: list[str] = dataclasses.field(default_factory=list)
    sweep_dir: Path | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def places(self) -> set[Path]:
        """Where it writes: no two jobs may at once."""
        store = self.config["client"].get("store")
        return {self.run_dir.resolve()} | ({Path(store).expanduser().resolve()} if store else set())

    def remove_empty_dir(self) -> None:
        """Hydra has made it."""
        if self.run_dir.is_dir() and not any(self.run_dir.iterdir()):
            self.run_dir.rmdir()


class _Process:
    """A job in a process of its own; its lines come out with its number before them.

    It has a process group of its own too: Ctrl-C reaches the sweep alone, which passes it on once.
    """

    def __init__(self, job: Job, argv: list[str], siblings: list[Path], environment: Mapping[str, str]) -> None:
        self.job = job
        self.channel, theirs = Pipe()
        self._outcome: tuple[int, str] | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # there too, until `serve` can end well
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from fedssl.sweep import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
            screens = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
            self._readers = [
                threading.Thread(target=_pass_on, args=(pipe, f"job {job.number} | ", screen), daemon=True)
                for pipe, screen in screens
            ]
            for reader in self._readers:
                reader.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        with contextlib.suppress(OSError):  # it has ended already
            self.channel.send((argv, job.config, job.note, job.run_dir, siblings))

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Wait for the process to end; the job's exit code, and the message that it printed."""
        with contextlib.suppress(EOFError, OSError):
            self._outcome = self._outcome or self.channel.recv()
        status = self._process.wait()
        for reader in self._readers:
            reader.join(READER_SECONDS)
        self.channel.close()
        if self._outcome is not None:
            return self._outcome
        if status == -signal.SIGINT:
            return INTERRUPTED, "interrupted"
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        message = (
            f"the process of job {self.job.number} {how}. If the memory ran out, lower sweep.jobs; the last "
            f"checkpoint is kept, resume={self.job.run_dir} goes on"
        )
        print(f"error: {message}", file=sys.stderr, flush=True)
        return BUG, message


def run_at_once(
    waiting: list[Job],
    at_once: int,
    argv: list[str],
    finished: Mapping[int, Path],
    ended: Callable[[Job, int, str], None],
) -> None:
    """Run jobs in processes of their own, `at_once` at a time, and tell `ended` of each. One interrupt ends all."""
    environments = shares_of_machine(min(at_once, len(waiting)))
    running: dict[int, _Process] = {}  # by the number of their share
    try:
        while waiting or running:
            for number in range(len(environments)):
                if number not in running and (job := _startable(waiting, running.values())) is not None:
                    waiting.remove(job)
                    print(f"job {job.number} | starts", flush=True)
                    running[number] = _Process(job, argv, in_order(finished), environments[number])
            over = wait([process.channel for process in running.values()])
            for number, process in list(running.items()):
                if process.channel in over:
                    code, message = process.end()
                    del running[number]
                    ended(process.job, code, message)
                    if code == INTERRUPTED:
                        raise KeyboardInterrupt
    except BaseException:
        for process in running.values():
            process.interrupt()
        for process in running.values():
            ended(process.job, *process.end())
        for job in waiting:
            job.remove_empty_dir()
        raise


def _startable(waiting: Iterable[Job], running: Iterable[_Process]) -> Job | None:
    """The first job that writes nowhere that a running job does, or a waiting one before it."""
    taken = {place for process in running for place in process.job.places}
    for job in waiting:
        if not job.places & taken:
            return job
        taken |= job.places
    return None


def shares_of_machine(at_once: int) -> list[dict[str, str]]:
    """The environments of as many processes: the cores that Ray finds, and the GPUs; with too few of them, they share.

    Threads are part of a result, and stay as configured.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    shares = []
    gpus = _gpus() if at_once else []
    for number in range(at_once):
        own = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": len(range(number, cores, at_once)) or 1})}
        share = {**own, **os.environ, "PYTHONPATH": path}
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number::at_once] or [gpus[number % len(gpus)]])
        shares.append(share)
    return shares


def _gpus() -> list[str]:
    """The names of the visible GPUs in CUDA_VISIBLE_DEVICES."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in named.split(",") if gpu]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _pass_on(pipe: io.TextIOBase, prefix: str, screen: io.TextIOBase) -> None:
    with pipe:
        for line in filter(str.strip, pipe):
            with contextlib.suppress(OSError):  # nobody reads any more: the job goes on
                screen.write(f"{prefix}{line.rstrip()}\n")
                screen.flush()


def serve(fd: int) -> None:
    """The main function of a job's process: do what comes through `fd`, and send back how it ended."""
    os.set_inheritable(fd, False)
    sweep = Connection(fd)
    sys.argv, config, note, run_dir, siblings = sweep.recv()
    threading.Thread(target=_interrupt_after, args=(sweep,), daemon=True).start()

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        asked, visible = config["grid"].get("gpus"), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if asked and visible != [""] and asked > len(visible):
            raise ConfigError(
                f"grid.gpus={asked}, but a job of this sweep has {len(visible)} (sweep.jobs= shares them out): leave "
                f"grid.gpus out, or lower sweep.jobs"
            )
        return run(config, note, run_dir, siblings)

    sweep.send(outcome_of(work))


def _interrupt_after(sweep: Connection) -> None:
    """A job does not outlive the process of its sweep."""
    with contextlib.suppress(EOFError, OSError):
        sweep.recv()  # nothing comes
    os.kill(os.getpid(), signal.SIGINT)


def in_order(finished: Mapping[int, Path]) -> list[Path]:
    """The run directories of finished jobs by the jobs' numbers."""
    return [finished[number] for number in sorted(finished)]
