"""FLESD's client half with one fault a round, for the tests of a deployment."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedssl.federation.client import Broadcast, Client
from fedssl.federation.records import Upload
from strategies.flesd import FLESDClient
from tests.federation_helpers import lie


@dataclass(frozen=True, kw_only=True)
class Faulty(FLESDClient):
    """Does what `faults` say in their rounds, and FLESD's work in all others.

    Args:
        faults: "<round>:<partition>:<what>", where what is raise, hang, late, wait, full disk, ten times, or a lie.
        folder: of the files that tell a test when a client works.
    """

    faults: Sequence[str]
    folder: str

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        mine = f"{client.round_num}:{client.partition_id}:"
        fault = next((fault.removeprefix(mine) for fault in self.faults if fault.startswith(mine)), None)
        working = Path(self.folder) / f"working-{client.round_num}-{client.partition_id}"
        if fault == "raise":
            raise RuntimeError("the camera is broken")
        if fault == "hang":
            working.touch()
            time.sleep(3600)
        if fault == "wait" and not working.exists():  # the first time: a test kills it meanwhile
            working.touch()
            time.sleep(3600)
        working.touch()
        upload = super().__call__(client, broadcast)
        if fault == "late":
            time.sleep(38)
        if fault == "ten times":
            return replace(upload, arrays={n: np.concatenate([v] * 10) for n, v in upload.arrays.items()})
        if fault is None or fault in ("late", "wait", "hang"):
            return upload
        return lie(upload, fault)
