"""A client's memory between rounds: files keyed by (partition, round), written atomically, never in the future.

A task of round r reads the newest version of a round before r and writes version r. A lost task can therefore run
again with the identical result, and a resumed run never sees a state that its checkpoint does not know.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class ClientStore:
    """Versions of every client's memory under `root/<partition>/<round>.safetensors`.

    Args:
        root: a folder; on a cluster a path that all machines share.
        writable: False for a replay, which must leave the run as it was.
    """

    def __init__(self, root: Path, *, writable: bool = True) -> None:
        self.root = root
        self.writable = writable

    def _path(self, partition_id: int, round_num: int) -> Path:
        return self.root / str(partition_id) / f"{round_num}.safetensors"

    def versions(self, partition_id: int) -> list[int]:
        """Rounds after which this client's memory was kept, ascending."""
        return sorted(int(path.stem) for path in (self.root / str(partition_id)).glob("[0-9]*.safetensors"))

    def read(self, partition_id: int, *, before: int) -> dict[str, Tensor]:
        """The newest memory written in a round < `before`; empty for a client that has none."""
        versions = [version for version in self.versions(partition_id) if version < before]
        return load_file(self._path(partition_id, versions[-1])) if versions else {}

    def names(self, partition_id: int, *, before: int) -> list[str]:
        """The entries of what `read` would read."""
        versions = [version for version in self.versions(partition_id) if version < before]
        if not versions:
            return []
        with safe_open(self._path(partition_id, versions[-1]), framework="pt") as file:
            return list(file.keys())

    def write(self, partition_id: int, round_num: int, memory: Mapping[str, Tensor]) -> None:
        """Keep `memory` as the state after `round_num`; either the whole file is there or none."""
        if not self.writable:
            return
        path = self._path(partition_id, round_num)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial{os.getpid()}")
        save_file({name: value.detach().cpu().contiguous() for name, value in memory.items()}, partial)
        partial.replace(path)

    def prune(self, bases: Collection[int], partition_ids: Iterable[int] | None = None) -> list[int]:
        """Delete the versions that no task can read, except a client's newest, and what a kill left.

        Args:
            bases: the rounds after which tasks may start, 0 for the initial state.
            partition_ids: whose; None: everybody's, which takes the longer the more clients there have been.

        Returns:
            Those of whom more than one version stays.
        """
        if partition_ids is None:
            partition_ids = [int(folder.name) for folder in self.root.glob("[0-9]*")]
        several = []
        for partition_id in partition_ids:
            if not (folder := self.root / str(partition_id)).is_dir():  # most methods keep nothing
                continue
            for partial in folder.glob("*.partial*"):
                partial.unlink(missing_ok=True)
            versions = self.versions(partition_id)
            unread = [v for v, newer in pairwise(versions) if not any(v <= base < newer for base in bases)]
            for version in unread:
                self._path(partition_id, version).unlink(missing_ok=True)
            if len(versions) - len(unread) > 1:
                several.append(partition_id)
        return several
