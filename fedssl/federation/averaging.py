"""The weighted mean of clients' weights, the same bit for bit whoever adds them up, in whatever order and groups.

So it can be begun where the clients run: a worker that trains many short ones sends one sum instead of every upload
(`Summation`), and a server adds what still comes one by one.

A floating-point sum depends on its order because every addition rounds. Here each weight times its client's share is
rounded first, to a multiple of a spacing that the round has fixed, so coarse that a double holds any sum of the round
exactly; then additions round nothing. The idea is that of Demmel and Nguyen, Parallel Reproducible Summation, IEEE
Transactions on Computers 64 (2015), with one bin, because a bound is known: an upload that has grown beyond `GROWTH`
times what it was sent is none of the sum (it is added apart). A mean of k clients is off by at most k * 2^-48 of the
largest weight that was sent; a float32's own rounding is 2^-24 of each weight.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedssl.errors import PayloadError
from fedssl.federation.arrays import to_record
from fedssl.federation.flower_compat import mark_summed
from fedssl.federation.records import Upload, num_bytes
from fedssl.federation.weights import GROWTH, check_weights, has_grown, largest_entries

BITS = 51  # of a sum beyond the spacing: a double has 53, and a number rounded by adding 1.5 * 2^52 spacings at most 51
CHUNK = 1 << 15  # entries that are added at once: 256 KB of doubles, which a core's cache holds


@dataclass(frozen=True, kw_only=True)
class Summation:
    """A round's sum: who may be in it, and with which share. Workers get it with their clients' messages.

    Args:
        round_num: the round.
        public_fingerprint: the server's.
        weighted: a client counts by its number of images; otherwise all count the same.
        clients: the round's, by partition: family, and number of images as the client said before the first round.
    """

    round_num: int
    public_fingerprint: str
    weighted: bool
    clients: Mapping[int, tuple[str, int]]

    def share(self, num_images: float) -> float:
        """What a client with so many images counts."""
        return num_images if self.weighted else 1.0

    def capacity(self, family: str) -> float:
        """The most that the shares of a family's clients can add up to."""
        return max(1.0, math.fsum(self.share(images) for own, images in self.clients.values() if own == family))

    def admits(self, upload: Upload) -> bool:
        """Whether it states no more images than its client did before: the sum has no room for more."""
        family, images = self.clients.get(upload.header.partition_id, ("", 0))
        return upload.header.family == family and self.share(upload.num_images) <= self.share(images)


class ExactSum:
    """The sum of share times weights over clients of one family.

    Args:
        before: what the clients were sent, by `<family>/<parameter>`.
        capacity: at least the sum of all shares, > 0.
    """

    def __init__(self, before: ArrayRecord, capacity: float) -> None:
        self.largest = largest_entries(before)
        self.total: dict[str, np.ndarray] = {}  # doubles, as the weights are shaped
        self._capacity = capacity

    def holds(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether these weights, of the right names and shapes and finite, are within the bound."""
        return not has_grown(arrays, self.largest)

    def add(self, arrays: Mapping[str, np.ndarray], share: float) -> None:
        """Add weights that it `holds`."""
        scratch = np.empty(CHUNK)
        for name, value in arrays.items():
            total = self._total(name, value).reshape(-1)
            flat, anchor = value.reshape(-1), self._anchor(name)
            for start in range(0, flat.size, CHUNK):
                part = flat[start : start + CHUNK]
                part = np.multiply(part, share, out=scratch[: part.size], dtype=np.float64)
                part += anchor  # leaves a multiple of the spacing, the next line of the weights' own size
                part -= anchor
                total[start : start + CHUNK] += part

    def add_sum(self, sums: Mapping[str, np.ndarray]) -> None:
        """Add another sum with this `before` and capacity."""
        for name, value in sums.items():
            total = self._total(name, value)
            total += value

    def _total(self, name: str, like: np.ndarray) -> np.ndarray:
        if name not in self.total:
            self.total[name] = np.zeros(like.shape)
        return self.total[name]

    def _anchor(self, name: str) -> float:
        """1.5 * 2^52 spacings: among doubles of this size the spacing is the distance to the next one."""
        _, exponent = math.frexp(GROWTH * (self.largest[name] or 1.0) * self._capacity)  # all sums are below 2^exponent
        return math.ldexp(1.5, exponent - BITS + 52)


class Sums:
    """Takes weights out of replies and adds them up, where they are exactly what was asked for."""

    def __init__(self, summation: Summation) -> None:
        self._summation = summation
        self._of: dict[str, ExactSum] = {}  # by family
        self._carriers: dict[str, Message] = {}

    def take(self, partition_id: int, sent: Message, reply: Message) -> None:
        """Add the reply's weights and leave it without them; any other reply stays whole, for the server to judge.

        Args:
            partition_id: whose reply it is.
            sent: what it answers.
            reply: changed in place.
        """
        asked = self._summation
        if reply.has_error() or partition_id not in asked.clients:
            return
        try:
            upload = Upload.from_message(reply)
            upload.header.check(round_num=asked.round_num, codec="weights", public_fingerprint=asked.public_fingerprint)
            family = upload.header.family
            before = sent.content["arrays"]
            assert isinstance(before, ArrayRecord)
            if upload.header.partition_id != partition_id or not asked.admits(upload):
                return
            check_weights(upload.arrays, before, family)
        except PayloadError:
            return
        if family not in self._of:
            self._of[family] = ExactSum(before, asked.capacity(family))
        if not self._of[family].holds(upload.arrays):
            return
        self._of[family].add(upload.arrays, asked.share(upload.num_images))
        mark_summed(reply, num_bytes(reply))
        reply.content["arrays"] = ArrayRecord()
        self._carriers.setdefault(family, reply)

    def hand_over(self) -> None:
        """Give each family's sum to the first reply that is in it."""
        for family, reply in self._carriers.items():
            reply.content["arrays"] = to_record(self._of[family].total)


def mean_of(uploads: Iterable[Upload], summation: Summation, before: ArrayRecord) -> dict[str, Tensor]:
    """The weighted mean of one family's weights, by parameter name, as float32.

    Args:
        uploads: checked, in partition order; whole ones, and summed ones of which one a sum brings it.
        summation: the round's.
        before: what the clients were sent, by `<family>/<parameter>`.
    """
    uploads = list(uploads)
    family = uploads[0].header.family
    exact = ExactSum(before, summation.capacity(family))
    apart: dict[str, np.ndarray] = {}  # of those that the sum has no room for
    for upload in uploads:
        share = summation.share(upload.num_images)
        if upload.summed:
            exact.add_sum(upload.arrays)
        elif summation.admits(upload) and exact.holds(upload.arrays):
            exact.add(upload.arrays, share)
        else:
            for name, value in upload.arrays.items():
                apart[name] = apart.get(name, 0.0) + np.multiply(value, share, dtype=np.float64)
    shares = sum(summation.share(upload.num_images) for upload in uploads)
    mean = {}
    for name in before:
        total = exact.total.get(name, 0.0) + apart.get(name, 0.0)
        mean[name.split("/", 1)[1]] = torch.from_numpy(np.asarray(total / shares)).float()
    return mean
