"""Multinomial logistic regression with an L2 penalty: one problem, or many of one shape at once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearClassifier:
    """Scores W x + b of c classes, for one problem or for many.

    Args:
        weight: W.
        bias: b.
    """

    weight: Float[Tensor, "*problems c d"]
    bias: Float[Tensor, "*problems c"]

    def scores(self, features: Float[Tensor, "*any n d"]) -> Float[Tensor, "*problems n c"]:
        """Logits, of the same images for every problem or of each problem's own."""
        return features @ self.weight.mT + self.bias.unsqueeze(-2)

    def predict(self, features: Float[Tensor, "*any n d"]) -> Int64[Tensor, "*problems n"]:
        """The class of largest score."""
        return self.scores(features).argmax(dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrincipalAxes:
    """Training features of one problem or many, in coordinates whose second moments are diagonal.

    Args:
        coordinates: the features along the axes; r = min(n, d), so a few images of many features become small.
        axes: orthonormal columns; features = coordinates @ axes.mT.
        spectrum: second moment of each coordinate.
    """

    coordinates: Float[Tensor, "*problems n r"]
    axes: Float[Tensor, "*problems d r"]
    spectrum: Float[Tensor, "*problems r"]

    @classmethod
    def of(cls, features: Float[Tensor, "*problems n d"]) -> "PrincipalAxes":
        """Rotate features onto their principal axes; they are not centred."""
        n, dim = features.shape[-2:]
        if n < dim:
            left, singular, right = torch.linalg.svd(features, full_matrices=False)
            return cls(coordinates=left * singular.unsqueeze(-2), axes=right.mT, spectrum=singular.square() / n)
        spectrum, axes = torch.linalg.eigh(features.mT @ features / n)  # much faster for n >> d
        return cls(coordinates=features @ axes, axes=axes, spectrum=spectrum.clamp_min(0))


@dataclass(frozen=True, kw_only=True)
class LogisticRegression:
    """Minimises mean cross-entropy + l2 / 2 |W|^2 (the bias is free) by full-batch L-BFGS: convex, nothing is drawn.

    In scikit-learn's terms C = 1 / (n l2). The Hessian is at most half the features' second moments plus l2 (Böhning
    1992, https://doi.org/10.1007/BF00048682). Along the principal axes that bound is diagonal; dividing each axis by
    its root saves most of the iterations and changes no solution. Nor does leaving out directions without any training
    image: there the best W is 0. Many problems are solved as one, as their sum is smallest where each of them is.

    Args:
        max_iterations: of L-BFGS.
        tolerance: stop where no entry of a problem's gradient is larger, after that division.
    """

    max_iterations: int
    tolerance: float

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise ConfigError(f"evaluate.logistic.max_iterations must be at least 1, got {self.max_iterations}.")
        if self.tolerance <= 0:
            raise ConfigError(f"evaluate.logistic.tolerance must be above 0, got {self.tolerance}; usual is 0.0001.")

    def fit(
        self,
        train: PrincipalAxes,
        labels: Int64[Tensor, "*problems n"],
        *,
        num_classes: int,
        l2: float,
        start: LinearClassifier | None = None,
    ) -> LinearClassifier:
        """The best classifier of each problem, for features as they were before the rotation.

        Args:
            train: the images of each problem.
            labels: their classes, 0..num_classes-1.
            num_classes: c; classes without an image are allowed.
            l2: > 0, strength of the penalty per training image.
            start: where to begin, e.g. the solution for another l2; None: at zero.
        """
        *problems, _, rank = train.coordinates.shape
        scale = (train.spectrum / 2 + l2).rsqrt().unsqueeze(-2)  # (*problems, 1, r)
        if start is None:
            scaled = train.coordinates.new_zeros(*problems, num_classes, rank)
            bias = train.coordinates.new_zeros(*problems, num_classes)
        else:
            scaled, bias = start.weight @ train.axes / scale, start.bias.clone()
        scaled.requires_grad_()
        bias.requires_grad_()
        num_problems = labels.numel() // labels.shape[-1]
        optimiser = torch.optim.LBFGS(
            [scaled, bias],
            max_iter=self.max_iterations,
            tolerance_grad=self.tolerance / num_problems,
            tolerance_change=torch.finfo(scaled.dtype).eps,  # the loss has no more digits
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            """The mean of the problems' losses, and its gradient."""
            optimiser.zero_grad()
            weight = scaled * scale
            logits = train.coordinates @ weight.mT + bias.unsqueeze(-2)
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
            loss = loss + l2 / 2 * weight.square().sum() / num_problems
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimiser.step(objective)  # type: ignore[no-untyped-call]
        return LinearClassifier(weight=(scaled.detach() * scale) @ train.axes.mT, bias=bias.detach())
