"""Rules for clients that may lie: what most clients say counts, whatever the others send.

Notation as in `fedssl.ensemble.means`. The rules are those of robust aggregation, applied to one row at a time: the
vector of client k is P_k[i, :], its distribution over the anchors of the step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fedssl.ensemble.base import Block, distributions, normalised
from fedssl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Median:
    """`ensemble=median`: p[i, j] = median_k P_k[i, j], rows normalised again.

    Coordinate-wise median, Yin et al. 2018, arXiv 1803.01498. The median of an even number is the mean of the two in
    the middle.
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

    p[i, j] = mean of the P_k[i, j] that are left, rows normalised again. Yin et al. 2018, arXiv 1803.01498. With K
    clients floor(trim K) are cut at each end.
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
        cut = int(self.trim * len(p))
        return normalised(p[cut : len(p) - cut].mean(dim=0))


@dataclass(frozen=True, kw_only=True)
class Krum:
    """`ensemble=krum`: per image, the rows of the clients that are closest to their neighbours.

    Blanchard et al. 2017, arXiv 1703.02757. With K clients, f = `num_byzantine` and c = max(1, K - f - 2), the score of
    client k in row i is the sum of |P_k[i] - P_l[i]|^2 over its c nearest others; p[i, :] is the mean of the
    `num_selected` rows with the smallest scores (1: Krum, more: multi-Krum). Equal scores: the first client's row.

    Krum's guarantee asks for K > 2 f + 2. Where too many uploads failed for that, it goes on with what is there.
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
        nearest = min(max(1, len(p) - self.num_byzantine - 2), len(p) - 1)
        scores = distances.sort(dim=1).values[:, :nearest].sum(dim=1)  # (clients, b)
        chosen = scores.sort(dim=0, stable=True).indices[: self.num_selected]  # (selected, b)
        return p.gather(0, chosen[..., None].expand(-1, -1, p.shape[2])).mean(dim=0)


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
        rows = torch.stack([block.cosines for block in blocks])
        rows = F.normalize(rows - rows.mean(dim=2, keepdim=True), dim=2)
        agreement = torch.einsum("kba,lba->kl", rows, rows) / rows.shape[1]
        others = agreement[~torch.eye(len(p), dtype=torch.bool, device=p.device)].view(len(p), -1)
        scores = others.quantile(0.5, dim=1)
        kept = (scores > 0) & (scores >= self.share * scores.quantile(0.5))
        kept = torch.where(kept.any(), kept, torch.ones_like(kept))
        return torch.einsum("k,kba->ba", kept.to(p.dtype), p) / kept.sum()
