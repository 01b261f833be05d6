"""Rounds of several engines in turn: each in processes of its own, frozen while another has the machine.

What an engine does between its rounds (daemons, polling) so costs the others nothing, and a pair of rounds is seconds
apart, not the minute that another start takes.
"""

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

LIMIT_S = 600  # of a round, start or end included


class Sitting:
    """One start of an engine.

    After each round but the last the engine prints LAP and waits for a byte from the pipe that it is told as `--turns`;
    after the last it prints RESULT and a JSON object.

    Args:
        name: of the engine, for its messages.
        command: what starts it.
        folder: for its pipe and its standard error.
        environment: its whole environment.
        crashes_at_its_end: an exit code after the result counts for nothing.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        crashes_at_its_end: bool = False,
    ) -> None:
        self.name = name
        self.result: dict[str, Any] = {}  # once it has ended; and its exit code
        self._crashes_at_its_end = crashes_at_its_end
        turns = folder / f"turns_{name}"
        turns.unlink(missing_ok=True)
        os.mkfifo(turns)
        self._turns = os.open(turns, os.O_RDWR)
        self._errors = (folder / f"errors_{name}").open("w+")
        self._frozen: list[psutil.Process] = []
        self._process = psutil.Popen(
            [*command, "--turns", str(turns)], env=environment, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def round(self) -> None:
        """Let it have one: the first with its start, the last with its end.

        Raises:
            RuntimeError: it ended without a result, or took longer than `LIMIT_S`.
        """
        limit = threading.Timer(LIMIT_S, self.kill)
        limit.start()
        try:
            self._round()
        finally:
            limit.cancel()

    def _round(self) -> None:
        if self._frozen:
            for process in self._frozen:
                process.resume()
            os.write(self._turns, b"\n")
        said = []
        for line in self._process.stdout:
            if line == "LAP\n":
                self._frozen = self._tree()
                for process in self._frozen:
                    process.suspend()
                return
            said.append(line)
        self._ended("".join(said))

    def _ended(self, said: str) -> None:
        code = self._process.wait()
        line = next((line for line in said.splitlines() if line.startswith("RESULT ")), None)
        if line is None or (code and not self._crashes_at_its_end):
            self._errors.seek(0)
            raise RuntimeError(f"{self.name} ended with {code}:\n{said[-2000:]}\n{self._errors.read()[-4000:]}")
        print(f"{self.name}: {line}", file=sys.stderr, flush=True)
        self.result = {**json.loads(line.removeprefix("RESULT ")), "exit": code}

    def _tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def kill(self) -> None:
        """End all its processes."""
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.wait()
        self._process.stdout.close()
        os.close(self._turns)
        self._errors.close()


def rounds_in_turn(start: Sequence[Any], later_rounds: int) -> dict[str, dict[str, Any]]:
    """Sittings that start one after the other, then a round of each in turn: their results, by name.

    Args:
        start: what makes each `Sitting`, without arguments.
        later_rounds: after the first one.
    """
    with ExitStack() as stack:
        sittings: list[Sitting] = []
        for make in start:
            sittings.append(stack.enter_context(make()))
            sittings[-1].round()
        for _ in range(later_rounds):
            for sitting in sittings:
                sitting.round()
    return {sitting.name: sitting.result for sitting in sittings}


def ratios(numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]]) -> list[float]:
    """One for each two sittings, of which the second has the engines in the opposite order.

    Of a sitting the median over its pairs of rounds, and of two the geometric mean: the engine that starts first takes
    longer for the whole sitting, by 2 to 4 % where both are the same one, and nobody knows why.

    Args:
        numerator: seconds of each round of each sitting, an even number of sittings.
        denominator: likewise.
    """
    of_sittings = [float(np.median(np.divide(a, b))) for a, b in zip(numerator, denominator, strict=True)]
    return [math.sqrt(a * b) for a, b in zip(of_sittings[::2], of_sittings[1::2], strict=True)]
