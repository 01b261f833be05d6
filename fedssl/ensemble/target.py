"""The clients' ensemble as a student sees it: a target for the block of images and anchors that is asked for."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.ensemble.base import Block, Rule, Summable, check_temperature, normalised
from fedssl.ensemble.coordinates import principal_coordinates
from fedssl.errors import ConfigError
from fedssl.similarity import AnchorMass, Similarity

SUMMABLE = ("none", "row", "row_all")  # files of conf/ensemble
ENTRIES = 2**22  # of S at a time, in a pass over all pairs of public images: 16 MB


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
        num_images: each client's private images, > 0; None: all alike. Looked at by `size` only.
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
        if len(self.num_images) != len(self.similarities) or not all(0 < n < math.inf for n in self.num_images):
            raise ConfigError(
                f"an ensemble of {len(self.similarities)} clients needs as many numbers of private images, all above 0 "
                f"and finite, got {list(self.num_images)}."
            )
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

    def coordinates(
        self, num_coordinates: int, generator: torch.Generator, *, whitening: float
    ) -> Float[Tensor, "n c"]:
        """`principal_coordinates` of the kernel over the whole public set; `rule.kernel` only."""
        assert self.rule.kernel
        return principal_coordinates(self.similarities, num_coordinates, generator, whitening=whitening)

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

    p[i, j] = M[i, j] / sum of M[i, l] over the anchors l asked for, M = sum_k mass_k; uniform where all of these are 0.
    Only the sum is kept: what secure summation would give the server. Clients of `row` normalised over all m anchors,
    so over some of them this is `row_all` of m images.

    Args:
        masses: at least one, all of the same n images and m anchors.
        temperature: at which the clients sharpened.
    """

    kernel = False

    def __init__(self, masses: Sequence[AnchorMass], temperature: float) -> None:
        check_temperature("distill.target_temperature", temperature)
        self.num_samples = _common_size(masses)
        if len(anchors := {mass.num_anchors for mass in masses}) != 1:
            raise ConfigError(f"Masses can be added over the same anchors only, got numbers of them {sorted(anchors)}.")
        self.num_anchors = anchors.pop()
        self.temperature = temperature
        total = masses[0].values.to(torch.float32, copy=True)
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
    """The target from what one codec decodes uploads to. Arguments as for `EnsembleTarget`.

    Raises:
        ConfigError: similarities and masses mixed, masses under a rule that is not `Summable`, different public sets.
    """
    masses = [content for content in contents if isinstance(content, AnchorMass)]
    if not masses:
        similarities = [content for content in contents if not isinstance(content, AnchorMass)]
        return EnsembleTarget(similarities, rule, temperature, num_images)
    if len(masses) != len(contents):
        raise ConfigError(
            f"{len(masses)} of {len(contents)} uploads hold masses (codec=sharpened) and the others similarities: all "
            f"clients of a round must use one codec."
        )
    check_summable(rule)
    return MassTarget(masses, temperature)


def check_summable(rule: Rule) -> None:
    """Raise ConfigError unless clients can send masses for this rule instead of cosines (`codec=sharpened`)."""
    if not isinstance(rule, Summable):
        raise ConfigError(
            f"codec=sharpened sends masses of which only the sum is used, and {type(rule).__name__} needs every "
            f"client's cosines: use ensemble={', '.join(SUMMABLE[:-1])} or {SUMMABLE[-1]}, or another codec "
            f"(codec=factor)."
        )


def check_cohort(rule: Rule, cohort_size: int) -> None:
    """Raise ConfigError if a rule cannot do what it promises with so many clients a round; for the start of a run.

    Where failures leave fewer in a round, a rule goes on as its docstring says.
    """
    if (check := getattr(rule, "check_cohort", None)) is not None:
        check(cohort_size)


def row_log_mass(similarity: Similarity, temperature: float) -> Float[Tensor, " n"]:
    """log sum_l exp(S[i, l] / temperature) over all n images l, for each i; by blocks of rows."""
    columns = torch.arange(similarity.num_samples, device=similarity.device)
    batches = torch.split(columns, max(1, ENTRIES // len(columns)))
    return torch.cat([(similarity.block(rows, columns) / temperature).logsumexp(dim=1) for rows in batches])


def _common_size(contents: Sequence[Similarity] | Sequence[AnchorMass]) -> int:
    sizes = {content.num_samples for content in contents}
    if len(sizes) != 1:
        raise ConfigError(f"An ensemble needs one or more similarities of one public set, got sizes {sorted(sizes)}.")
    return sizes.pop()
