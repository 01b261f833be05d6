"""Rules that average: what weight a client has in a row, and at what temperature it speaks.

Notation: S_k[i, j] cosines of client k, tau the target temperature, P_k[i, :] = softmax_j(S_k[i, j] / tau) over the
anchors of the step, n_k private images, H the entropy.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fedssl.ensemble.base import Block, centred_unit_rows, distributions, entropies, unit_or_zero
from fedssl.errors import ConfigError

NEWTON_STEPS = 10  # on log temperature, within a bracket; 4 to 6 usually end at rounding


@dataclass(frozen=True, kw_only=True)
class SharpenedMean:
    """`ensemble=none`, the paper: sharpen, average, normalise over the anchors only at the end.

    p[i, j] = M[i, j] / sum_l M[i, l] with M = mean_k exp((S_k - 1) / tau). FLESD, arXiv 2109.14611.

    A client's weight in row i is its share of the total mass sum_l exp((S_k[i, l] - 1) / tau). So the flatter a client,
    the more it counts: one collapsed client (all cosines near 1) outweighs the healthy ones; `row` repairs that.

    Computed as softmax_j(logsumexp_k (S_k - 1) / tau), the same number without underflow at small tau.
    """

    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        blocks = iter(blocks)
        log_mass = (next(blocks).cosines - 1) / temperature
        for block in blocks:
            log_mass = torch.logaddexp(log_mass, (block.cosines - 1) / temperature)
        return F.softmax(log_mass, dim=1)

    def mass(self, block: Block, temperature: float) -> Float[Tensor, "b k"]:
        """See `Summable`: at most 1, for the image itself; e^(-2 / tau) at least."""
        return ((block.cosines - 1) / temperature).exp()


@dataclass(frozen=True, kw_only=True)
class RowMean:
    """`ensemble=row`: each client's row becomes a distribution over the anchors of the step, then the mean.

    p[i, j] = mean_k P_k[i, j]. Every client has the same weight in every row. For one client, or for identical
    clients, it equals `none`. Ours, not the paper's.
    """

    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        blocks = iter(blocks)
        target, num_clients = self.mass(next(blocks), temperature), 1
        for block in blocks:
            target, num_clients = target.add_(self.mass(block, temperature)), num_clients + 1
        return target.div_(num_clients)

    def mass(self, block: Block, temperature: float) -> Float[Tensor, "b k"]:
        """See `Summable`: rows sum to 1 over the anchors that are sent, of which a step may use some only."""
        return F.softmax(block.cosines / temperature, dim=1)


@dataclass(frozen=True, kw_only=True)
class WholeRowMean:
    """`ensemble=row_all`: each client's row becomes a distribution over all n public images, then the mean.

    p[i, j] = normalised over the anchors of mean_k exp(S_k[i, j] / tau) / sum_l exp(S_k[i, l] / tau), l over all n.
    A client weighs in a row by the share of its mass that lies on the anchors: at these anchors, not in general, a
    client that says something counts more. One pass over all pairs of images a round. Ours.
    """

    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = True

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        blocks = iter(blocks)
        log_mass = self._log_mass(next(blocks), temperature)
        for block in blocks:
            log_mass = torch.logaddexp(log_mass, self._log_mass(block, temperature))
        return F.softmax(log_mass, dim=1)

    def mass(self, block: Block, temperature: float) -> Float[Tensor, "b k"]:
        """See `Summable`: rows sum to at most 1 over distinct anchors."""
        return self._log_mass(block, temperature).exp()

    @staticmethod
    def _log_mass(block: Block, temperature: float) -> Float[Tensor, "b k"]:
        assert block.log_mass is not None
        return block.cosines / temperature - block.log_mass[:, None]


@dataclass(frozen=True, kw_only=True)
class SizeMean:
    """`ensemble=size`: clients with more private images count more, as in FedAvg (arXiv 1602.05629).

    p[i, j] = sum_k n_k P_k[i, j] / sum_k n_k. Not `Summable`: a client that encodes is not asked for n_k.
    """

    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        blocks = iter(blocks)
        first = next(blocks)
        target, total = F.softmax(first.cosines / temperature, dim=1).mul_(first.num_images), first.num_images
        for block in blocks:
            target.add_(F.softmax(block.cosines / temperature, dim=1), alpha=block.num_images)
            total += block.num_images
        return target.div_(total)


@dataclass(frozen=True, kw_only=True)
class EntropyMatchedMean:
    """`ensemble=entropy`: every client speaks at its own temperature, so that all rows are equally sharp.

    p[i, :] = mean_k softmax_j(S_k[i, j] / tau_k(i)) with tau_k(i) such that each of these distributions has the entropy
    mean_k H(P_k[i]). A flat client is sharpened, a peaked one softened, before they are averaged. Ours.

    tau_k(i) lies between tau e^-8 and tau e^8 and is found by Newton's method, dH / d log tau = Var_p(S) / tau^2, with
    bisection where that would leave the bracket. A constant row has the largest entropy at every
    temperature and stays uniform; as it raises the mean, the others are softened.
    """

    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        cosines = torch.stack([block.cosines for block in blocks])  # (clients, b, k)
        cosines = cosines - cosines.amax(dim=2, keepdim=True)  # exact, while cosines / tau is rounded
        wanted = entropies(F.softmax(cosines / temperature, dim=2)).mean(dim=0)  # (b,)
        log_tau = torch.full(cosines.shape[:2], math.log(temperature), device=cosines.device)
        low, high = log_tau - 8, log_tau + 8
        for _ in range(NEWTON_STEPS):  # the entropy grows with the temperature
            tau = log_tau.exp()
            p = F.softmax(cosines / tau[..., None], dim=2)
            entropy, mean = entropies(p), (p * cosines).sum(dim=2)
            slope = ((p * cosines.square()).sum(dim=2) - mean.square()) / tau.square()
            low, high = torch.where(entropy < wanted, log_tau, low), torch.where(entropy < wanted, high, log_tau)
            newton = log_tau + (wanted - entropy) / slope.clamp_min(1e-12)
            log_tau = torch.where((low <= newton) & (newton <= high), newton, (low + high) / 2)
        return F.softmax(cosines / log_tau.exp()[..., None], dim=2).mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class CertaintyMean:
    """`ensemble=certainty`: in each row a client counts by how sure it is.

    p[i, :] = sum_k w_k(i) P_k[i, :] with w_k(i) proportional to 1 - H(P_k[i]) / log(anchors), and equal weights where
    all are 0. After the certainty weighting of FedAUX (arXiv 2102.02514) and the variance weighting of Fed-ET (arXiv
    2204.12703), whose scores need labels; the entropy takes their place.
    """

    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        p = distributions(blocks, temperature)
        certainty = (1 - entropies(p) / math.log(max(p.shape[2], 2))).clamp_min(0)  # (clients, b)
        total = certainty.sum(dim=0)
        sure = total > 1e-6  # below, the scores are rounding
        weights = torch.where(sure, certainty / total.clamp_min(1e-6), 1 / len(p))
        return (weights[..., None] * p).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class AttentionMean:
    """`ensemble=attention`: in each row a client counts by how well its view of that image agrees with everybody's.

    CreamFL (Yu et al. 2023, arXiv 2302.08888, global-local contrastive aggregation) weights the representation z_k(i)
    of image i by w_k(i) = softmax_k log [exp(z_k(i) . g(i)) / sum_j exp(z_k(i) . g(j))], g the global representations.
    Clients' spaces cannot be compared here, but their similarities can: z_k(i) is the row S_k[i, anchors], centred and
    of norm 1 (0 if constant), g(i) the mean of these rows over the clients, again of norm 1, and j runs over the batch.
    Then p[i, :] = sum_k w_k(i) P_k[i, :]. As there, no temperature: two clients' weights differ by less than e^4.
    """

    kernel: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`."""
        blocks = list(blocks)
        rows = centred_unit_rows(torch.stack([block.cosines for block in blocks]))
        shared = unit_or_zero(rows.mean(dim=0), dim=(1,))
        scores = rows @ shared.T  # (clients, b, b): this client's image i against everybody's image j
        log_odds = scores.diagonal(dim1=1, dim2=2) - scores.logsumexp(dim=2)
        weights = F.softmax(log_odds, dim=0)  # (clients, b)
        return (weights[..., None] * distributions(blocks, temperature)).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class MeanKernel:
    """`ensemble=cka_kernel`: the mean of the clients' kernels, for `distill.loss=cka|coordinates`.

    Kbar = mean_k C S_k C / |C S_k C|_F on the images of a batch, C = I - 11'/b. Hetero-SSFL (arXiv 2205.12493) and
    FedHeNN (arXiv 2202.00757) send the mean kernel; centred and of norm 1 every client counts alike, as CKA itself sees
    kernels. A collapsed client's kernel is centred to 0 and adds nothing. No temperature enters.
    """

    kernel: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = False

    def __call__(self, blocks: Iterable[Block], temperature: float) -> Float[Tensor, "b k"]:
        """See `Rule`; the anchors of every block are its rows."""
        blocks = iter(blocks)
        kernel, num_clients = self._unit(next(blocks)), 1
        for block in blocks:
            kernel, num_clients = kernel.add_(self._unit(block)), num_clients + 1
        return kernel.div_(num_clients)

    @staticmethod
    def _unit(block: Block) -> Float[Tensor, "b b"]:
        b, k = block.cosines.shape
        if b != k:
            raise ConfigError(
                f"ensemble=cka_kernel compares a batch with itself, and {b} images were held against {k} anchors: set "
                f"distill.loss=cka or coordinates, or choose an ensemble whose rows sum to 1."
            )
        rows = block.cosines - block.cosines.mean(dim=1, keepdim=True)
        return unit_or_zero(rows - rows.mean(dim=0, keepdim=True), dim=(0, 1))
