"""What the clients' devices are like: links, speed, stragglers, who is there, and how long a round waits.

The simulation itself is not slowed down. What a round would have taken is computed from what it sent and did:

    seconds of a client = latency + slowdown * (downlink bytes / bandwidth + compute + uplink bytes / bandwidth)
    seconds of a round = those that the server waits for its clients (`Devices.wait`), and its own as measured

Every client has a link of its own; the server's is not the limit. A client computes what its upload states: its
training and, where it has one, its distillation. It embeds the public set, encodes and probes in no time. One that is
late keeps what it remembers, so a deadline costs `local_only` nothing.

A server cannot know that a client has crashed. With a deadline it waits for that client until then; without one it is
taken to give up when the others are done, since nothing says how long it would have waited.

Draws do not depend on the strategy: runs of several strategies with one seed and the same clients meet the same
stragglers and miss the same clients.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from fedssl.errors import ConfigError, PayloadError
from fedssl.federation.records import effort
from fedssl.seeding import numpy_generator


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The clients' devices. The numbers live in conf/federation/."""

    uplink_mbps: float  # megabits per second and client
    downlink_mbps: float
    latency_s: float  # seconds of a round in which a client waits for its link, both ways together
    images_per_second: float | Mapping[str, float] | None  # views in training, maybe by family; None: as measured
    stragglers: float  # share of the clients that train
    straggler_slowdown: float  # of their links and their compute
    availability: float  # probability that a client can be asked in a round
    deadline_s: float | None  # simulated seconds after which an upload is late; None: everybody is waited for
    idle_s: float  # of a round in which nobody can be asked or, without a deadline, nobody answers

    def __post_init__(self) -> None:
        for name in ("uplink_mbps", "downlink_mbps"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"federation.devices.{name} is in megabits per second and must be > 0, got {getattr(self, name)}. "
                    f"A link that takes no time has inf (in a YAML file: .inf)."
                )
        for name in ("latency_s", "idle_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"federation.devices.{name} is in seconds and must be >= 0, got {getattr(self, name)}."
                )
        speeds = self.images_per_second
        if speeds is not None:
            numbers = list(speeds.values()) if isinstance(speeds, Mapping) else [speeds]
            if not numbers or not all(number > 0 for number in numbers):
                raise ConfigError(
                    f"federation.devices.images_per_second must be a number > 0, a mapping of families to such numbers "
                    f"as in {{conv4_16: 400, resnet8: 300}}, or null for the seconds that clients measure, got "
                    f"{speeds}."
                )
        if not 0 <= self.stragglers <= 1:
            raise ConfigError(
                f"federation.devices.stragglers is a share of the clients, between 0 and 1, got {self.stragglers}."
            )
        if not 1 <= self.straggler_slowdown < math.inf:
            raise ConfigError(
                f"federation.devices.straggler_slowdown must be at least 1, got {self.straggler_slowdown}: "
                f"a straggler takes that many times as long as the others."
            )
        if not 0 < self.availability <= 1:
            raise ConfigError(
                f"federation.devices.availability is a probability above 0 and at most 1, got {self.availability}."
            )
        if self.deadline_s is None:
            return
        if not self.deadline_s > self.latency_s:
            raise ConfigError(
                f"federation.devices.deadline_s must be above federation.devices.latency_s={self.latency_s:g}, or null "
                f"to wait for everybody, got {self.deadline_s:g}: nobody could answer in time."
            )
        if speeds is None:
            raise ConfigError(
                f"federation.devices.deadline_s={self.deadline_s:g} needs federation.devices.images_per_second: with "
                f"measured seconds, who is late would differ from run to run. Give it a number, or set deadline_s to "
                f"null."
            )

    def check_families(self, families: Iterable[str], known: Iterable[str]) -> None:
        """Refuse speeds by family that miss one of the clients' `families`, or name one that is not `known`."""
        if not isinstance(self.images_per_second, Mapping):
            return
        missing = [family for family in dict.fromkeys(families) if family not in self.images_per_second]
        unknown = [family for family in self.images_per_second if family not in known]
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"names {', '.join(map(str, unknown))}, not in models"
            raise ConfigError(
                f"federation.devices.images_per_second={dict(self.images_per_second)} {wrong}: give every "
                f"architecture of federation.families its speed, or one number for all."
            )

    def available(self, seed: int, round_num: int, partition_id: int) -> bool:
        """Whether this client can be asked in this round."""
        if self.availability == 1:
            return True
        return float(numpy_generator(seed, "availability", round_num, partition_id).random()) < self.availability

    def stragglers_among(self, seed: int, partitions: Iterable[int]) -> frozenset[int]:
        """The stragglers among the clients that train, the same in every round; a larger share adds to them."""
        order = numpy_generator(seed, "stragglers").permutation(sorted(partitions))
        return frozenset(order[: math.floor(self.stragglers * len(order) + 0.5)].tolist())

    def seconds(
        self, *, downlink_bytes: int, uplink_bytes: int, metrics: Mapping[str, object], family: str, straggler: bool
    ) -> float:
        """Simulated seconds from the broadcast to a client's whole upload.

        Args:
            downlink_bytes: that it received.
            uplink_bytes: that it sent.
            metrics: of its upload: `seconds` and `image_passes` of its training, `distill_seconds` and the like.
            family: its architecture.
            straggler: whether it is one.

        Raises:
            PayloadError: of what `images_per_second` counts, image passes or else seconds, it states none, or some that
                are negative or not finite.
        """
        slowdown = self.straggler_slowdown if straggler else 1.0
        link = 8e-6 * downlink_bytes / self.downlink_mbps + 8e-6 * uplink_bytes / self.uplink_mbps
        return self.latency_s + slowdown * (link + self._compute_seconds(metrics, family))

    def check_stated(self, metrics: Mapping[str, object], family: str) -> None:
        """Raise `PayloadError` where `seconds` would."""
        self._compute_seconds(metrics, family)

    def wait(self, asked: int, answered: Collection[float]) -> float:
        """Simulated seconds until the server goes on in a round for which it needs clients.

        Args:
            asked: how many clients.
            answered: seconds of those whose upload came, late ones included.

        Returns:
            The slowest client's seconds. The deadline, where there is one and somebody was late or never answered.
            `idle_s` where nobody was asked, and without a deadline where nobody answered.
        """
        if self.deadline_s is None or asked == 0:
            return max(answered, default=self.idle_s)
        in_time = [seconds for seconds in answered if seconds <= self.deadline_s]
        return max(in_time) if len(in_time) == asked else self.deadline_s

    def _compute_seconds(self, metrics: Mapping[str, object], family: str) -> float:
        speed = self.images_per_second
        if speed is None:
            return _stated(metrics, "seconds")
        return _stated(metrics, "image_passes") / (speed[family] if isinstance(speed, Mapping) else speed)


def _stated(metrics: Mapping[str, object], name: str) -> float:
    """The sum of a client's `effort`."""
    found = {key: value for key, value in effort(metrics, name).items() if isinstance(value, int | float)}
    if not found:
        raise PayloadError(
            f"it states no {name}, of which its simulated time is made (federation.devices.images_per_second): its "
            f"client half must pass on what client.train returned, or {name}=0 where it trains nothing"
        )
    for key, value in found.items():
        if not 0 <= value < math.inf:
            raise PayloadError(f"it declares {key}={value}")
    return sum(found.values())
