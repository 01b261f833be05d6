"""A checkpoint within a round: replies of clients that worked long are kept until the round has its own.

A run that was killed in a round serves them instead of training again, and the round's result is the one of a run that
was left alone: a client's task is a pure function of the message, so its reply is the answer to the same message only.
This sits between the loop and the grid (`fedssl.federation.rounds.gather`), so it is the same on every grid.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, Message, MetricRecord

from fedssl.federation import flower_compat
from fedssl.federation.records import num_bytes
from fedssl.federation.store import ClientStore
from fedssl.settings import of_every_sitting

log = logging.getLogger(__name__)

MAX_BYTES = 2**31 - 2**20  # protocol buffers end at 2 GiB


class KeptReplies:
    """`root/<round>-<partition>.reply`: the sha256 of what follows; a line of JSON; the reply's records in Flower's
    protocol buffers.

    Args:
        root: a folder of its own.
        config: the run's; a reply of a run with other settings is not served.
        after: seconds of work, as the client states them, from which on a reply is kept; None: none is.
        store: the clients' memory. Where a client kept some in the round, its reply is served with it or not at all.
    """

    def __init__(self, root: Path, *, config: Mapping[str, Any], after: float | None, store: ClientStore) -> None:
        self.root = root
        self.settings = _settings(config)
        self.after = after
        self.store = store
        for partial in root.glob(".*.reply.*"):  # of a process that was killed
            with contextlib.suppress(OSError):
                partial.unlink()
        self.begin(0)

    def begin(self, round_num: int) -> None:
        """The messages that follow are of this round."""
        self.round_num = round_num
        self.started = time.monotonic()
        self.earlier_seconds = 0.0  # of this round, in sittings before, until the last reply that was served

    def serve(self, partition_id: int, message: Message) -> Message | None:
        """The reply to exactly this message, if it is kept; what is damaged, or of something else, is not used."""
        path = self._path(partition_id)
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file:
                digest, line, body = file.readline(), file.readline(), file.read()
            if digest != _sha256_of(line, body):
                raise ValueError("its content has another sha256 than its first line says")
            head = json.loads(line)
            if head["request"] != self._digest(partition_id, message):
                raise ValueError("it answers another message, or is of a run with other settings")
            if head["memory"] and self.round_num not in self.store.versions(partition_id):
                raise ValueError(f"what its client kept beside it is not in {self.store.root}")
            seconds = float(head["elapsed_seconds"])
            reply = Message(flower_compat.records_from_bytes(body), reply_to=message)
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("the kept reply %s is not used, its client trains again: %s", path, error)
            return None
        self.earlier_seconds = max(self.earlier_seconds, seconds)
        log.info("round %d: the reply of partition %d is of an earlier sitting", self.round_num, partition_id)
        return reply

    def keep(self, partition_id: int, message: Message, reply: Message) -> None:
        """Keep a usable reply if its client worked long enough; one that cannot be written is named and left out."""
        if self.after is None or stated_seconds(reply) < self.after:
            return
        path = self._path(partition_id)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            if (size := num_bytes(reply)) > MAX_BYTES:
                raise ValueError(f"it has {size} bytes, at most {MAX_BYTES} are kept")
            body = flower_compat.records_to_bytes(reply.content)
            head = {
                "request": self._digest(partition_id, message),
                "memory": self.round_num in self.store.versions(partition_id),
                "elapsed_seconds": self.earlier_seconds + time.monotonic() - self.started,
            }
            self.root.mkdir(parents=True, exist_ok=True)
            line = json.dumps(head).encode() + b"\n"
            with partial.open("wb") as file:
                file.writelines((_sha256_of(line, body), line, body))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            log.warning("the reply of partition %d in round %d is not kept: %s", partition_id, self.round_num, error)

    def clear(self) -> None:
        """Forget all: the round has its checkpoint."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _path(self, partition_id: int) -> Path:
        return self.root / f"{self.round_num:05d}-{partition_id}.reply"

    def _digest(self, partition_id: int, message: Message) -> str:
        """Of all that the reply is a function of: not of node and message ids and the order of arrays, which a resume
        changes."""
        sha256 = hashlib.sha256(
            f"{self.settings} {self.round_num} {partition_id} {message.metadata.message_type}".encode()
        )
        for name, record in sorted(message.content.items()):
            for key, value in sorted(record.items()):
                data = value.data if isinstance(value, Array) else repr(value).encode()
                described = (value.dtype, tuple(value.shape), value.stype) if isinstance(value, Array) else ()
                sha256.update(repr((name, type(record).__name__, key, described, len(data))).encode())
                sha256.update(data)
        return sha256.hexdigest()


def stated_seconds(reply: Message) -> float:
    """How long the client says that it trained and distilled, all its models together; 0 where it says nothing."""
    metrics = reply.content.metric_records.get("metrics", MetricRecord())
    stated = (v for k, v in metrics.items() if k == "seconds" or k.endswith("_seconds"))
    return sum(float(v) for v in stated if isinstance(v, int | float) and 0 < v < math.inf)


def _sha256_of(line: bytes, body: bytes) -> bytes:
    sha256 = hashlib.sha256(line)
    sha256.update(body)
    return sha256.hexdigest().encode() + b"\n"


def _settings(config: Mapping[str, Any]) -> str:
    kept = of_every_sitting(config)
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
