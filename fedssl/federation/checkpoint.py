"""Checkpoints: everything the server needs to go on after a round, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from fedssl.errors import ConfigError, DataError
from fedssl.federation.arrays import read_array, to_record

T = TypeVar("T")


@dataclass(kw_only=True)
class Progressed:
    """The run's counters after a round, as a checkpoint keeps them."""

    round_num: int  # 0: initialised and evaluated
    uplink_bytes: int
    downlink_bytes: int
    wall_seconds: float
    simulated_seconds: float | None = None  # None: not known of the first rounds, of before it was counted
    metrics_offset: int  # bytes of metrics.jsonl that belong to this and earlier rounds
    server_row: dict[str, Any]  # the round's server row, written after the checkpoint
    failed_rounds: list[int]  # rounds with a failed client: their bases are kept for `replay`
    evaluation: dict[str, dict[str, float]]  # family -> the newest evaluation
    global_model: bool  # False: the clients hold the models, and were asked to evaluate them
    num_trained: dict[str, int]  # family -> number of clients


class Checkpoints:
    """`root/<round>/` with the global arrays, the strategy's own state and the counters.

    Args:
        root: the run's `checkpoints` folder.
        keep: how many of the newest to keep; the bases of failed rounds stay besides.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        if keep < 1:
            raise ConfigError(
                f"federation.keep_checkpoints must be at least 1, got {keep}: a run resumes from the last one"
            )
        self.root = root
        self.keep = keep

    def rounds(self) -> list[int]:
        """Rounds that can be resumed from or replayed on, ascending."""
        return sorted(int(path.name) for path in self.root.glob("[0-9]*") if path.name.isdigit())

    def save(self, arrays: ArrayRecord, strategy_state: Mapping[str, Tensor], progressed: Progressed) -> None:
        """Write the checkpoint of `progressed.round_num`."""
        final, partial = self._folder(progressed.round_num), self._partial(progressed.round_num)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(
            {name: np.asarray(read_array(name, array), order="C") for name, array in arrays.items()},
            partial / "arrays.safetensors",
        )
        save_tensors(dict(strategy_state), partial / "strategy.safetensors")
        (partial / "progress.json").write_text(json.dumps(asdict(progressed)))
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was resumed from an earlier round
        partial.replace(final)

    def load(self, round_num: int) -> tuple[ArrayRecord, dict[str, Tensor], Progressed]:
        """Arrays, the strategy's state and counters after `round_num`.

        Raises:
            DataError: a file is missing or damaged; the message names it.
        """
        folder = self._folder(round_num)
        arrays = _read(folder / "arrays.safetensors", load_file)
        strategy_state = _read(folder / "strategy.safetensors", load_tensors)
        progressed = _read(folder / "progress.json", lambda path: Progressed(**json.loads(path.read_text())))
        return to_record(arrays), strategy_state, progressed

    def prune(self, failed_rounds: list[int]) -> list[int]:
        """Delete what neither `resume` nor a replay of a failed round needs; returns the rounds kept."""
        rounds = self.rounds()
        kept = set(rounds[-self.keep :]) | {failed - 1 for failed in failed_rounds}
        for round_num in rounds:
            if round_num not in kept:
                self._folder(round_num).rename(self._partial(round_num))  # a half deleted one is no checkpoint
        for partial in self.root.glob(".partial-*"):
            shutil.rmtree(partial)
        return self.rounds()

    def _folder(self, round_num: int) -> Path:
        return self.root / f"{round_num:05d}"

    def _partial(self, round_num: int) -> Path:
        return self.root / f".partial-{round_num:05d}"


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise DataError(
            f"the checkpoint's file {path} is missing or damaged ({error}). Restore it, or delete {path.parent} to go "
            f"on from the checkpoint before it; without any, the run starts anew."
        ) from error
