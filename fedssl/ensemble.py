"""From the clients' similarities to one target distribution per public image, block by block.

For a batch of public images i and the anchors j in the queue, an ensembling rule turns each client's cosines S_k[i, j]
into one matrix p[i, j] whose rows sum to 1. An n x n matrix never exists. Shi et al. 2021,
https://arxiv.org/abs/2109.14611; formulas with the temperature tau = `distill.target_temperature`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.similarity import Similarity


@runtime_checkable
class Rule(Protocol):
    """How clients are combined. The choices live in conf/ensemble/."""

    def __call__(self, blocks: Iterable[Float[Tensor, "b k"]], temperature: float) -> Float[Tensor, "b k"]:
        """Targets from one block of cosines a client, in client order; rows of the result sum to 1."""


@dataclass(frozen=True, kw_only=True)
class SharpenedMean:
    """`ensemble=none`, the paper: sharpen, average, normalise over the anchors only at the end.

    p[i, j] = M[i, j] / sum_l M[i, l] with M = mean_k exp((S_k - 1) / tau).

    A client's weight in row i is its share of the total mass sum_l exp((S_k[i, l] - 1) / tau). So the flatter a client,
    the more it counts: one collapsed client (all cosines near 1) outweighs the healthy ones; `row` repairs that.

    Computed as softmax_j(logsumexp_k (S_k - 1) / tau), the same number without underflow at small tau.
    """

    def __call__(self, blocks: Iterable[Float[Tensor, "b k"]], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        blocks = iter(blocks)
        log_mass = (next(blocks) - 1) / temperature
        for block in blocks:
            log_mass = torch.logaddexp(log_mass, (block - 1) / temperature)
        return F.softmax(log_mass, dim=1)


@dataclass(frozen=True, kw_only=True)
class RowMean:
    """`ensemble=row`: each client's row becomes a distribution over the anchors of the step, then the mean.

    p[i, j] = mean_k softmax_j(S_k[i, j] / tau). Every client has the same weight in every row. For one client, or for
    identical clients, it equals `none`. Ours, not the paper's.
    """

    def __call__(self, blocks: Iterable[Float[Tensor, "b k"]], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        blocks = iter(blocks)
        target, num_clients = F.softmax(next(blocks) / temperature, dim=1), 1
        for block in blocks:
            target, num_clients = target + F.softmax(block / temperature, dim=1), num_clients + 1
        return target / num_clients


class EnsembleTarget:
    """The ensembled target of all clients, computed for the block that is asked for.

    Memory is what the similarities hold (clients x n x d for factors) and a few (b, k) blocks. Clients are summed in
    the order of the list, so a caller that sorts by partition gets the same bits every time.

    Args:
        similarities: at least one, all of the same n public images.
        rule: how they are combined.
        temperature: tau > 0.
    """

    def __init__(self, similarities: Sequence[Similarity], rule: Rule, temperature: float) -> None:
        sizes = {similarity.num_samples for similarity in similarities}
        if len(sizes) != 1:
            raise ConfigError(
                f"An ensemble needs one or more similarities of one public set, got sizes {sorted(sizes)}."
            )
        check_temperature("distill.target_temperature", temperature)
        self.similarities = tuple(similarities)
        self.rule = rule
        self.temperature = temperature
        self.num_samples: int = sizes.pop()

    def __call__(self, rows: Int64[Tensor, " b"], anchors: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """Targets of the images `rows` over the images `anchors` (public positions, repeats allowed), fp32.

        Each row sums to 1; an anchor that occurs twice gets its probability twice before the normalisation.
        """
        return self.rule((similarity.block(rows, anchors) for similarity in self.similarities), self.temperature)

    def to(self, device: torch.device) -> "EnsembleTarget":
        """The same target with all similarities on `device`."""
        return EnsembleTarget([s.to(device) for s in self.similarities], self.rule, self.temperature)


def check_temperature(key: str, temperature: float) -> None:
    """Raise ConfigError naming `key` unless the temperature is positive."""
    if not temperature > 0:
        raise ConfigError(f"{key} must be > 0, got {temperature}. 0.1 is the usual value; smaller is sharper.")
