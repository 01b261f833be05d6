"""The clients' ensemble as a student sees it: a target for the block of images and anchors that is asked for."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.ensemble.base import Block, Rule, Summable, check_temperature, normalised
from fedssl.errors import ConfigError
from fedssl.similarity import AnchorMass, Similarity

ROWS = 256  # of a pass over all pairs of public images, at once


@runtime_checkable
class Target(Protocol):
    """What a student learns from: the ensembled knowledge of all clients about the public set."""

    num_samples: int  # n public images
    num_anchors: int  # anchors may be the public positions 0 .. num_anchors - 1
    kernel: bool  # the result is a kernel (`distill.loss=cka`), not rows that sum to 1

    def __call__(self, rows: Int64[Tensor, " b"], anchors: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """Targets of the images `rows` over the images `anchors` (public positions, repeats allowed), fp32."""
        ...

    def at(self, temperature: float) -> "Target":
        """The same clients at another target temperature."""
        ...

    def to(self, device: torch.device) -> "Target":
        """The same target with its tensors on `device`."""
        ...


class EnsembleTarget:
    """The ensemble of similarities, computed for the block that is asked for.

    Memory is what the similarities hold (clients x n x d for factors) and a few (b, k) blocks. Clients are combined in
    the order of the list, so a caller that sorts by partition gets the same bits every time.

    Args:
        similarities: at least one, all of the same n public images.
        rule: how they are combined.
        temperature: tau > 0.
        num_images: each client's private images; None: all alike. Looked at by `size` only.
    """

    def __init__(
        self,
        similarities: Sequence[Similarity],
        rule: Rule,
        temperature: float,
        num_images: Sequence[float] | None = None,
    ) -> None:
        check_temperature("distill.target_temperature", temperature)
        self.num_samples = _common_size(similarities)
        self.num_anchors = self.num_samples
        self.kernel = rule.kernel
        self.similarities = tuple(similarities)
        self.rule = rule
        self.temperature = temperature
        self.num_images = (1.0,) * len(self.similarities) if num_images is None else tuple(num_images)
        # One pass over all pairs: clients x n numbers are kept.
        self._log_masses = [row_log_mass(s, temperature) for s in self.similarities] if rule.whole_rows else None

    def __call__(self, rows: Int64[Tensor, " b"], anchors: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """See `Target`. An anchor that occurs twice gets its probability twice before the normalisation."""
        blocks = (
            Block(
                cosines=similarity.block(rows, anchors),
                num_images=self.num_images[client],
                log_mass=None if self._log_masses is None else self._log_masses[client][rows],
            )
            for client, similarity in enumerate(self.similarities)
        )
        return self.rule(blocks, self.temperature)

    def at(self, temperature: float) -> "EnsembleTarget":
        """See `Target`."""
        return EnsembleTarget(self.similarities, self.rule, temperature, self.num_images)

    def to(self, device: torch.device) -> "EnsembleTarget":
        """See `Target`."""
        moved = EnsembleTarget.__new__(EnsembleTarget)  # not to compute the masses again
        moved.__dict__ |= self.__dict__
        moved.similarities = tuple(similarity.to(device) for similarity in self.similarities)
        if self._log_masses is not None:
            moved._log_masses = [mass.to(device) for mass in self._log_masses]
        return moved


class MassTarget:
    """The sum of the masses that clients have sharpened themselves (`codec=sharpened`), over their m anchors.

    p[i, j] = M[i, j] / sum of M[i, l] over the anchors l asked for, M = sum_k mass_k. Only the sum is kept: what secure
    summation would give the server.

    Args:
        masses: at least one, all of the same n images and m anchors.
        temperature: at which the clients sharpened.
    """

    kernel = False

    def __init__(self, masses: Sequence[AnchorMass], temperature: float) -> None:
        self.num_samples = _common_size(masses)
        self.num_anchors = masses[0].num_anchors
        self.temperature = temperature
        total = masses[0].values.clone()
        for mass in masses[1:]:
            total += mass.values
        self.total: Float[Tensor, "n m"] = total

    def __call__(self, rows: Int64[Tensor, " b"], anchors: Int64[Tensor, " k"]) -> Float[Tensor, "b k"]:
        """See `Target`; anchors below `num_anchors` only."""
        return normalised(self.total[rows][:, anchors])

    def at(self, temperature: float) -> "MassTarget":
        """Only the temperature that the clients used."""
        if temperature != self.temperature:
            raise ConfigError(
                f"codec=sharpened: the clients sharpened at temperature {self.temperature}, the server cannot go to "
                f"{temperature} afterwards. Set distill.target_temperature_end=null, or another codec."
            )
        return self

    def to(self, device: torch.device) -> "MassTarget":
        """See `Target`."""
        moved = MassTarget.__new__(MassTarget)
        moved.__dict__ |= self.__dict__
        moved.total = self.total.to(device)
        return moved


def make_target(
    contents: Sequence[Similarity | AnchorMass],
    rule: Rule,
    temperature: float,
    num_images: Sequence[float] | None = None,
) -> Target:
    """The target from what one codec decodes uploads to. Arguments as for `EnsembleTarget`."""
    masses = [content for content in contents if isinstance(content, AnchorMass)]
    if not masses:
        similarities = [content for content in contents if not isinstance(content, AnchorMass)]
        return EnsembleTarget(similarities, rule, temperature, num_images)
    assert len(masses) == len(contents), "one codec decodes to one kind"
    if not isinstance(rule, Summable):
        raise ConfigError(
            "codec=sharpened sends masses of which only the sum is used, and this ensemble needs every client's "
            "cosines: use ensemble=none, row or row_all, or another codec."
        )
    return MassTarget(masses, temperature)


def row_log_mass(similarity: Similarity, temperature: float) -> Float[Tensor, " n"]:
    """log sum_l exp(S[i, l] / temperature) over all n images l, for each i; by blocks of rows."""
    columns = torch.arange(similarity.num_samples, device=similarity.device)
    return torch.cat(
        [(similarity.block(rows, columns) / temperature).logsumexp(dim=1) for rows in torch.split(columns, ROWS)]
    )


def _common_size(contents: Sequence[Similarity] | Sequence[AnchorMass]) -> int:
    sizes = {content.num_samples for content in contents}
    if len(sizes) != 1:
        raise ConfigError(f"An ensemble needs one or more similarities of one public set, got sizes {sorted(sizes)}.")
    return sizes.pop()
