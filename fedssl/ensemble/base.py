"""What a rule is given and what it returns."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fedssl.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One client's part of one step.

    Args:
        cosines: S_k[i, a_j] of the batch's images i and the anchors a_j.
        num_images: private images of the client, > 0.
        log_mass: log sum_l exp(S_k[i, l] / temperature) over all n public images l; only for rules with `whole_rows`.
    """

    cosines: Float[Tensor, "b k"]
    num_images: float
    log_mass: Float[Tensor, " b"] | None


@runtime_checkable
class Rule(Protocol):
    """How clients are combined. The choices live in conf/ensemble/."""

    kernel: ClassVar[bool]  # the result is a kernel for `distill.loss=cka`, not rows that sum to 1
    whole_rows: ClassVar[bool]  # it needs every client's `log_mass`: one pass over all pairs of images a round

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """The target from one block a client, in client order."""
        ...


@runtime_checkable
class Summable(Rule, Protocol):
    """A rule that only needs a sum over the clients: p[i, j] = sum_k mass_k[i, j] / sum_l sum_k mass_k[i, l].

    So the clients can apply `mass` themselves (`codec=sharpened`) and the server never sees one alone.
    """

    def mass(self, block: Block, temperature: float) -> Float[Tensor, "b k"]:
        """What this client adds, at least 0."""
        ...


def check_temperature(key: str, temperature: float) -> None:
    """Raise ConfigError naming `key` unless the temperature is positive."""
    if not temperature > 0:
        raise ConfigError(f"{key} must be > 0, got {temperature}. 0.1 is the usual value; smaller is sharper.")


def distributions(blocks: Iterable[Block], temperature: float) -> Float[Tensor, "clients b k"]:
    """P_k[i, :] = softmax_j(S_k[i, j] / temperature) of every client: what most rules start from."""
    return torch.stack([F.softmax(block.cosines / temperature, dim=1) for block in blocks])


def normalised(mass: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Rows divided by their sums, however small; a row without any mass becomes uniform."""
    largest = mass.amax(dim=1, keepdim=True)
    relative = torch.where(largest > 0, mass / largest, 1.0)  # a sum of subnormal numbers divides to no distribution
    return relative / relative.sum(dim=1, keepdim=True)


NO_CONTRAST = 1e-6  # root mean square of centred cosines that is fp32's rounding of a constant


def unit_or_zero(centred: Float[Tensor, "*shape"], dim: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """Centred cosines divided by their Euclidean norm over `dim`; 0 where that is no more than rounding."""
    norm = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    noise = NO_CONTRAST * math.sqrt(math.prod(centred.shape[d] for d in dim))
    return torch.where(norm > noise, centred / norm, torch.zeros_like(centred))


def centred_unit_rows(rows: Float[Tensor, "*batch b k"]) -> Float[Tensor, "*batch b k"]:
    """Rows less their means, of length 1; a row without contrast becomes 0."""
    return unit_or_zero(rows - rows.mean(dim=-1, keepdim=True), dim=(-1,))


def entropies(p: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """H(p) = -sum_j p_j log p_j in nats, at most log k."""
    h: Tensor = torch.special.entr(p).sum(dim=-1)
    return h.clamp_max(math.log(p.shape[-1]))
