"""Rules for clients that may lie: what most clients say counts, whatever the others send.

Notation as in `fedssl.ensemble.means`. The rules are those of robust aggregation, applied to one row at a time: the
vector of client k is P_k[i, :], its distribution over the anchors of the step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.ensemble.base import Block, centred_unit_rows, distributions, normalised
from fedssl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Median:
    """`ensemble=median`: p[i, j] = median_k P_k[i, j], rows normalised again.

    Coordinate-wise median, Yin et al. 2018, Definition 1, arXiv 1803.01498; of predictions on a public set: Cronus,
    arXiv 1912.11279. The median of an even number is the mean of the two in the middle.
    """

    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        p = distributions(blocks, temperature).sort(dim=0).values
        return normalised((p[(len(p) - 1) // 2] + p[len(p) // 2]) / 2)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean:
    """`ensemble=trimmed_mean`: per entry, the mean without the largest and the smallest `trim` of the clients.

    p[i, j] = mean of the P_k[i, j] that are left, rows normalised again. Yin et al. 2018, Definition 2, arXiv
    1803.01498.
    With K clients floor(trim K) are cut at each end, and as many that lie are borne: fewer where uploads failed.
    """

    trim: float  # share cut at each end, 0 <= trim < 0.5
    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ConfigError(
                f"ensemble.trim must be at least 0 and below 0.5, got {self.trim}: it is the share of the clients cut "
                f"at each end, and one has to be left."
            )

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        p = distributions(blocks, temperature).sort(dim=0).values
        cut = self._cut(len(p))
        return normalised(p[cut : len(p) - cut].mean(dim=0))

    def check_cohort(self, cohort_size: int) -> None:
        """See `fedssl.ensemble.check_cohort`."""
        if self.trim > 0 and self._cut(cohort_size) == 0:
            raise ConfigError(
                f"ensemble.trim={self.trim} of {cohort_size} clients is less than one, so none would be cut: raise it "
                f"to at least 1/{cohort_size} (below 0.5), raise federation.cohort_size, or use ensemble=row."
            )

    def _cut(self, num_clients: int) -> int:
        return math.floor(self.trim * num_clients + 1e-9)  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True, kw_only=True)
class Krum:
    """`ensemble=krum`: per image, the rows of the clients that are closest to their neighbours.

    Blanchard et al. 2017, section 4, arXiv 1703.02757. With K clients and f = `num_byzantine`, the score of client k in
    row i is the sum of |P_k[i] - P_l[i]|^2 over its K - f - 2 nearest others; p[i, :] is the mean of the `num_selected`
    rows with the smallest scores (1: Krum, more: multi-Krum), and of those that tie with the last of them.

    Krum's guarantee asks for K >= 2 f + 3; `check_cohort` refuses a smaller cohort. Where uploads failed, f is lowered
    to what the others bear. From 3 clients downwards that is 0, and the rows of the closest pair are averaged.
    """

    num_byzantine: int  # clients that may lie, >= 0
    num_selected: int  # rows that are averaged, >= 1; all where there are fewer clients
    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_byzantine < 0 or self.num_selected < 1:
            raise ConfigError(
                f"ensemble.num_byzantine must be at least 0 and ensemble.num_selected at least 1, got "
                f"{self.num_byzantine} and {self.num_selected}."
            )

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        p = distributions(blocks, temperature)
        if len(p) == 1:
            return p[0]
        distances = torch.stack([(p - row).square().sum(dim=2) for row in p])  # (clients, clients, b)
        distances.diagonal(dim1=0, dim2=1).fill_(torch.inf)  # a client is not its own neighbour
        borne = max(0, min(self.num_byzantine, (len(p) - 3) // 2))
        nearest = max(1, len(p) - borne - 2)
        scores = distances.sort(dim=1).values[:, :nearest].sum(dim=1)  # (clients, b)
        last = scores.sort(dim=0).values[min(self.num_selected, len(p)) - 1]
        chosen = (scores <= last).to(p.dtype)  # ties too: the order of the clients decides nothing
        return ((chosen / chosen.sum(dim=0))[..., None] * p).sum(dim=0)

    def check_cohort(self, cohort_size: int) -> None:
        """See `fedssl.ensemble.check_cohort`."""
        if cohort_size < 2 * self.num_byzantine + 3:
            raise ConfigError(
                f"ensemble=krum with num_byzantine={self.num_byzantine} needs {2 * self.num_byzantine + 3} clients "
                f"in a round (2 num_byzantine + 3), the cohort has {cohort_size}: lower ensemble.num_byzantine or "
                f"raise federation.cohort_size."
            )
        if self.num_selected > cohort_size - self.num_byzantine:
            raise ConfigError(
                f"ensemble.num_selected={self.num_selected} rows would include those of clients that lie: of "
                f"{cohort_size} clients and num_byzantine={self.num_byzantine}, at most "
                f"{cohort_size - self.num_byzantine} are honest."
            )


@dataclass(frozen=True, kw_only=True)
class AgreementMean:
    """`ensemble=agreement`: whole clients whose rows contradict most others' are left out, then `row`.

    c_kl = mean_i corr(S_k[i, anchors], S_l[i, anchors]) over the batch; the score of client k is median_l c_kl, l != k.
    Kept are clients with a score of at least `share` times the median score of all, and > 0; all of them where that
    leaves none. p[i, :] is the mean of P_k[i, :] over the kept. Ours, after EmInspector (arXiv 2405.13080), which finds
    poisoned clients by the similarities of their embeddings on inspection images.
    """

    share: float  # of the median score, between 0 and 1
    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"ensemble.share must be between 0 (keep all that agree at all) and 1, got {self.share}.")

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        blocks = list(blocks)
        p = distributions(blocks, temperature)
        if len(p) < 3:  # two that disagree: nobody can say who lies
            return p.mean(dim=0)
        rows = centred_unit_rows(torch.stack([block.cosines for block in blocks]))
        agreement = torch.einsum("kba,lba->kl", rows, rows) / rows.shape[1]
        others = agreement[~torch.eye(len(p), dtype=torch.bool, device=p.device)].view(len(p), -1)
        scores = others.quantile(0.5, dim=1)
        kept = (scores > 0) & (scores >= self.share * scores.quantile(0.5))
        kept = torch.where(kept.any(), kept, torch.ones_like(kept))
        return torch.einsum("k,kba->ba", kept.to(p.dtype), p) / kept.sum()
