"""Not the similarity but what the ensemble would make of it: masses over a few anchors that only need summing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.codecs import base
from fedssl.ensemble import Block, Rule, Summable, check_temperature
from fedssl.errors import ConfigError, PayloadError
from fedssl.similarity import AnchorMass, row_blocks, to_float

LOG_ERROR = 2e-6  # of temperature * log(mass), computed in fp32: of a cosine, of exp and of the normalisation


@dataclass(frozen=True, kw_only=True)
class Sharpened:
    """`codec=sharpened`: the rule's mass of every public image over the first m public images, n x m, as `masses`.

    For `ensemble=none` that is exp((S - 1) / tau), for `row` softmax(S / tau) over the m anchors. The server adds the
    masses of the clients and normalises, so it may as well be handed the sum alone. All clients use one scale (1, and
    in int8 round(127 mass)), which is what secure summation needs. Ours.

    A client here does not know its share of the images: each counts as one (`num_images` = 1).

    Error: on a mass, see `bound`. On the target, relative errors of masses count, and fp16 and int8 have none to
    promise: exp((S - 1) / 0.1) reaches down to e^-20, which both send as 0. Where a rule's masses sum to 1, an error of
    E in total on a row moves its target over all m anchors by at most E: E/2 by itself, E/2 by normalising again.
    """

    rule: Rule  # must be Summable
    temperature: float  # of the target, > 0
    num_anchors: int  # m; the whole public set where that is smaller
    dtype: str  # fp32 | fp16 | int8
    max_bytes: int  # of one upload
    name: ClassVar[str] = "sharpened"

    def __post_init__(self) -> None:
        base.check_fields(self.dtype, self.max_bytes)
        check_temperature("codec.temperature", self.temperature)
        if not isinstance(self.rule, Summable):
            raise ConfigError(
                f"codec=sharpened needs a rule that sums masses of the clients, {type(self.rule).__name__} does not: "
                f"use ensemble=none, row or row_all, or another codec."
            )
        if self.num_anchors < 2:
            raise ConfigError(f"codec.num_anchors must be at least 2, got {self.num_anchors}.")

    @property
    def bound(self) -> float:
        """The largest error of a mass, which lies in [0, 1]; no entry of S is sent."""
        rounding = {"fp32": 2.0**-25, "fp16": 2.0**-12, "int8": 0.5 / 127}[self.dtype]
        return rounding + LOG_ERROR / self.temperature

    def target_bound(self, temperature: float) -> float:
        """Over any of the m anchors for fp32, over all of them for fp16 and int8; 1 where nothing can be promised.

        fp32 keeps relative errors unless masses fall below its smallest normal number, 2^-126. Masses are at least
        e^(-2 / tau) or, of a rule that normalises, that over n.
        """
        if temperature != self.temperature:
            return 1.0
        if self.dtype == "fp32":
            normal = -2 / temperature - math.log(2**31) > math.log(2.0**-126)
            return base.softmax_bound(LOG_ERROR, temperature) if normal else 1.0
        return min(1.0, self._row_error) if self._sums_to_one else 1.0

    @property
    def _row_error(self) -> float:
        """Of the masses of one row in total, if they sum to 1. fp16 rounds by a relative 2^-11 or by 2^-25."""
        rounding = {
            "fp32": 2.0**-24,
            "fp16": 2.0**-11 + self.num_anchors * 2.0**-25,
            "int8": self.num_anchors * 0.5 / 127,
        }[self.dtype]
        return rounding + 2 * LOG_ERROR / self.temperature

    @property
    def _sums_to_one(self) -> bool:
        """Whether the rule's masses sum to 1 over the anchors: asked of it with two anchors among many images."""
        probe = Block(cosines=torch.tensor([[1.0, 0.0]]), num_images=1.0, log_mass=torch.tensor([100.0]))
        return abs(self._mass(probe).sum().item() - 1) < 1e-6

    def _mass(self, block: Block) -> Float[Tensor, "b m"]:
        assert isinstance(self.rule, Summable)
        return self.rule.mass(block, self.temperature)

    def num_bytes(self, n: int, d: int) -> int:
        """See `Codec.num_bytes`."""
        return n * min(self.num_anchors, n) * base.DTYPES[self.dtype].itemsize

    def check_size(self, n: int, d: int) -> None:
        """See `Codec.check_size`."""
        base.check_size(self, self.max_bytes, n, d)

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """See `Codec.encode`; nothing is drawn from `generator`."""
        z = base.directions(embeddings)
        anchors = z[: self.num_anchors]
        masses = np.empty((len(z), len(anchors)), base.DTYPES[self.dtype])
        for rows in row_blocks(len(z)):
            log_mass = None
            if self.rule.whole_rows:
                log_mass = ((z[rows] @ z.T).clamp_(-1, 1) / self.temperature).logsumexp(dim=1)
            block = Block(cosines=(z[rows] @ anchors.T).clamp_(-1, 1), num_images=1.0, log_mass=log_mass)
            masses[rows] = base.quantise(self._mass(block), self.dtype).numpy()
        return {"masses": masses}

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> AnchorMass:
        """See `Codec.decode`; masses are within [0, 1] and, of a rule that promises so, sum to 1 in each row."""
        shape = num_samples, min(self.num_anchors, num_samples)
        expected = {"masses": (base.DTYPES[self.dtype], shape)}
        [sent] = base.read(self.name, arrays, expected, num_samples, self.max_bytes)
        masses = torch.empty(shape)
        for rows in row_blocks(num_samples):
            masses[rows] = self._checked(to_float(sent[rows]), rows.start)
        return AnchorMass(values=masses)

    def _checked(self, masses: Float[Tensor, "b m"], first: int) -> Float[Tensor, "b m"]:
        smallest, largest = masses.amin().item(), masses.amax().item()
        if smallest < 0:
            raise PayloadError(f"'masses' holds {smallest:.6g}; a mass is at least 0")
        if largest > 1 + self.bound:
            raise PayloadError(f"'masses' holds {largest:.6g}; a mass is at most 1 (+{self.bound:g} for rounding)")
        if self._sums_to_one:
            off = masses.double().sum(dim=1) - 1
            row = int(off.abs().argmax())
            if off[row].abs() > self._row_error:
                raise PayloadError(
                    f"the masses of row {first + row} sum to {1 + off[row].item():.6g}; "
                    f"{type(self.rule).__name__} makes them sum to 1 (+-{self._row_error:g} for rounding)"
                )
        elif self.rule.whole_rows and (total := masses.sum(dim=1).amax().item()) > 1 + self._row_error:
            raise PayloadError(f"the masses of a row sum to {total:.6g}; {type(self.rule).__name__} makes at most 1")
        return masses.clamp_(max=1)


def num_anchors(codec: base.Codec, n: int) -> int:
    """How many of n public images a target that is made of this codec's uploads knows as anchors."""
    return min(codec.num_anchors, n) if isinstance(codec, Sharpened) else n
