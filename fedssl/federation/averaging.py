"""The weighted mean of clients' weights, the same bit for bit whoever adds them up, in whatever order and groups.

So uploads are added up as they come, and begun where the clients run: a worker that trains many short ones sends one
sum instead of every upload.

A floating-point sum depends on its order because every addition rounds. Here each weight times its client's share is
rounded first, to a multiple of a spacing that the round has fixed, so coarse that a double holds any sum of the round
exactly; then additions round nothing. The idea is that of Demmel and Nguyen, Parallel Reproducible Summation, IEEE
Transactions on Computers 64 (2015), with one bin, because a bound is known: an upload that has grown beyond `GROWTH`
times what it was sent is none of the sum, it is added apart.

The mean of k clients is off by at most k * 2^-47 * L * C / S: L the largest weight of its kind that was sent (1 where
all were 0), S the shares of those that answered, C those of all that were asked. A float32 itself rounds by 2^-24 of a
weight. So where nearly all shares are missing, the smallest weights lose digits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedssl.errors import FedSSLError, PayloadError
from fedssl.federation.arrays import read_arrays, to_record
from fedssl.federation.devices import Devices
from fedssl.federation.flower_compat import Summed, note_sum, noted_sum
from fedssl.federation.records import Upload, num_bytes
from fedssl.federation.replies import stated_seconds
from fedssl.federation.weights import GROWTH, check_weights, has_grown, largest_entries

BITS = 51  # of a sum beyond the spacing: a double has 53, and a number rounded by adding 1.5 * 2^52 spacings at most 51


@dataclass(frozen=True, kw_only=True)
class Summation:
    """A round's sum: who may be in it, and with which share. Workers get it with their clients' messages.

    Args:
        round_num: the round.
        public_fingerprint: the server's.
        weighted: a client counts by its number of images; otherwise all count the same.
        clients: the round's, by partition: family, and number of images as the client said before the first round.
        devices: of whose simulated time an upload must state enough.
        whole_after: seconds of work from which on a reply stays whole, because it may be kept (`replies`); None: none.
    """

    round_num: int
    public_fingerprint: str
    weighted: bool
    clients: Mapping[int, tuple[str, int]]
    devices: Devices
    whole_after: float | None = None

    def share(self, num_images: float) -> float:
        """What a client with so many images counts."""
        return num_images if self.weighted else 1.0

    def capacity(self, family: str) -> float:
        """The most that the shares of a family's clients can add up to."""
        return self._capacities.get(family) or 1.0

    @cached_property
    def _capacities(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for family, images in self.clients.values():
            found[family] = found.get(family, 0.0) + self.share(images)
        return found

    def admits(self, upload: Upload) -> bool:
        """Whether it states as many images as the sum has room and digits for: at least one, and at most those that
        its client had before.
        """
        family, images = self.clients.get(upload.header.partition_id, ("", 0))
        return upload.header.family == family and 1 <= self.share(upload.num_images) <= self.share(images)

    def check(self, upload: Upload, partition_id: int, before: ArrayRecord) -> dict[str, float]:
        """Raise `PayloadError` unless it is what this client was asked for, and nobody could refuse it later.

        Returns:
            Its `largest_entries`.
        """
        header = upload.header
        header.check(round_num=self.round_num, codec="weights", public_fingerprint=self.public_fingerprint)
        if header.partition_id != partition_id:
            raise PayloadError(f"it says it is of partition {header.partition_id}")
        largest = check_weights(upload.arrays, before, header.family)
        self.devices.check_stated(upload.metrics, header.family)
        return largest


class ExactSum:
    """The sum of share times weights over clients of one family.

    Args:
        before: what the clients were sent, by `<family>/<parameter>`.
        capacity: at least the sum of all shares, > 0.
    """

    def __init__(self, before: ArrayRecord, capacity: float) -> None:
        self.total: dict[str, np.ndarray] = {}  # doubles, as the weights are shaped
        self._largest = largest_entries(read_arrays(before))
        self._capacity = capacity

    def holds(self, largest: Mapping[str, float]) -> bool:
        """Whether weights whose `largest_entries` are these, finite ones, are within the bound."""
        return largest.keys() == self._largest.keys() and not has_grown(largest, self._largest)

    def add(self, arrays: Mapping[str, np.ndarray], share: float) -> None:
        """Add weights that it `holds`."""
        add_rounded = inner_loop()
        for name, value in arrays.items():
            known = value if value.dtype in (np.float32, np.float64) else value.astype(np.float64)
            total = self._total(name, value).reshape(-1)
            add_rounded(total, known.reshape(-1), float(share), self._anchor(name))

    def add_sum(self, sums: Mapping[str, np.ndarray]) -> None:
        """Add another sum with this `before` and capacity."""
        for name, value in sums.items():
            self.total[name] = self.total[name] + value if name in self.total else value

    def _total(self, name: str, like: np.ndarray) -> np.ndarray:
        """To be changed in place."""
        total = self.total.get(name)
        if total is None:
            total = np.zeros(like.shape)
        elif not total.flags.writeable:  # it came in a message
            total = total.copy()
        self.total[name] = total
        return total

    def _anchor(self, name: str) -> float:
        """1.5 * 2^52 spacings: among doubles of this size the spacing is the distance to the next one."""
        bound = GROWTH * (self._largest[name] or 1.0) * self._capacity
        _, exponent = math.frexp(bound)  # all sums are below 2^exponent
        return math.ldexp(1.5, exponent - BITS + 52)


@cache
def inner_loop() -> Callable[..., None]:
    """`add_rounded`, ready for weights as messages bring them; the first call in a process takes a second."""
    from fedssl.federation.rounded import add_rounded

    loop: Callable[..., None] = add_rounded
    weights = np.zeros(1, np.float32)
    weights.flags.writeable = False
    loop(np.zeros(1), weights, 1.0, 1.0)
    return loop


@dataclass(frozen=True, kw_only=True)
class PartialSum:
    """Weights of one family that were added up.

    Args:
        partitions: whose.
        arrays: the sum of share times weights, by `<family>/<parameter>`, in double precision.
    """

    partitions: tuple[int, ...]
    arrays: ArrayRecord

    def put_into(self, reply: Message) -> None:
        """Let the reply of one of `partitions`, whose own weights were taken, carry it."""
        note_sum(reply, Summed(num_bytes=num_bytes(reply), partitions=self.partitions))
        reply.content["arrays"] = self.arrays


class Adder:
    """Takes weights out of replies and adds them up by family, where they are exactly what was asked for."""

    def __init__(self, summation: Summation) -> None:
        self._summation = summation
        self._of: dict[str, ExactSum] = {}
        self._partitions: dict[str, list[int]] = {}

    def take(self, partition_id: int, sent: Message, reply: Message) -> None:
        """Add the reply's weights, or the sum that it carries, and leave it without.

        Any other reply stays whole, for the server to judge.

        Args:
            partition_id: whose reply it is.
            sent: what it answers.
            reply: changed in place.
        """
        asked, before, noted = self._summation, sent.content.get("arrays"), noted_sum(reply)
        if reply.has_error() or not isinstance(before, ArrayRecord) or (noted is not None and not noted.partitions):
            return
        try:
            upload = Upload.from_message(reply)
            largest = asked.check(upload, partition_id, before) if noted is None else {}
            admitted = asked.admits(upload)
        except PayloadError:
            return
        if not admitted or (asked.whole_after is not None and stated_seconds(reply) >= asked.whole_after):
            return
        family = upload.header.family
        exact = self._of.get(family) or ExactSum(before, asked.capacity(family))
        if noted is not None:
            exact.add_sum(upload.arrays)
        elif exact.holds(largest):
            exact.add(upload.arrays, asked.share(upload.num_images))
        else:
            return
        self._of[family] = exact
        self._partitions.setdefault(family, []).extend([partition_id] if noted is None else noted.partitions)
        note_sum(reply, Summed(num_bytes=num_bytes(reply)))
        reply.content["arrays"] = ArrayRecord()

    def all(self) -> list[PartialSum]:
        """One a family."""
        return [
            PartialSum(partitions=tuple(self._partitions[family]), arrays=to_record(exact.total))
            for family, exact in self._of.items()
        ]


def mean_of(uploads: Sequence[Upload], summation: Summation, before: ArrayRecord) -> dict[str, Tensor]:
    """The weighted mean of one family's weights, by parameter name, as float32.

    Args:
        uploads: checked, at least one, in partition order: whole ones, and those of sums, each of which one of its
            uploads carries.
        summation: the round's.
        before: what the clients were sent, by `<family>/<parameter>`.

    Raises:
        FedSSLError: a sum is there without an upload that is in it, or the other way round.
    """
    family = uploads[0].header.family
    exact = ExactSum(before, summation.capacity(family))
    apart: dict[str, np.ndarray] = {}  # of those that the sum has no room for
    for upload in uploads:
        share = summation.share(upload.num_images)
        if upload.summed is not None:
            exact.add_sum(upload.arrays)
        elif summation.admits(upload) and exact.holds(largest_entries(upload.arrays)):
            exact.add(upload.arrays, share)
        else:
            for name, value in upload.arrays.items():
                apart[name] = apart.get(name, 0.0) + np.multiply(value, share, dtype=np.float64)
    of_sums = sorted(upload.header.partition_id for upload in uploads if upload.summed is not None)
    if of_sums != sorted(partition for upload in uploads for partition in upload.summed or ()):
        raise FedSSLError(f"the sums of {family}'s weights are not of the clients {of_sums[:5]} that answered")
    shares = sum(summation.share(upload.num_images) for upload in uploads)
    mean = {}
    for name in dict.fromkeys([*before, *apart]):
        total = exact.total.get(name, 0.0) + apart.get(name, 0.0)
        mean[name.split("/", 1)[1]] = torch.from_numpy(np.asarray(total / shares)).float()
    return mean
