"""SwAV: cluster online; a view predicts the cluster of the other view. The prototypes are a head, so they travel.

Caron et al. 2020, https://arxiv.org/abs/2006.09882. Departs from the paper: two views, no smaller crops; prototypes are
normalised in the forward pass (the authors' code normalises the weights before each step, which an average of clients'
prototypes undoes) and are not frozen at first; one queue serves both views, whose roles are the same (theirs has one
each), and codes read it from the first step on (there from epoch 15 of 400, for small batches only).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.anchors import EmbeddingQueue
from fedssl.clustering import balanced_assignment
from fedssl.errors import ConfigError
from fedssl.losses import cosine_scores, cross_entropy
from fedssl.methods import Method
from fedssl.models import Model


@dataclass(frozen=True, kw_only=True)
class SwAV(Method):
    """Swapped prediction of balanced codes. The numbers live in conf/method/swav.yaml."""

    num_prototypes: int  # at least 2
    temperature: float  # of the predictions, > 0
    epsilon: float  # of the codes, > 0: smaller is sharper
    sinkhorn_iterations: int  # at least 1
    queue_size: int  # past projections that codes are balanced over beside the batch's; 0 for none

    def __post_init__(self) -> None:
        if self.num_prototypes < 2:
            raise ConfigError(
                f"method.num_prototypes must be at least 2, got {self.num_prototypes}; 3000 in the paper."
            )
        for name, usual in (("temperature", "0.1"), ("epsilon", "0.05")):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"method.{name} must be greater than 0, got {getattr(self, name)}; {usual} in the paper."
                )
        if self.sinkhorn_iterations < 1 or self.queue_size < 0:
            raise ConfigError(
                f"method.sinkhorn_iterations must be at least 1 and method.queue_size at least 0, "
                f"got {self.sinkhorn_iterations} and {self.queue_size}; 3 and 3840 in the paper."
            )

    def heads(self, dim: int) -> dict[str, nn.Module]:
        """The prototypes, rows of a weight whose length means nothing."""
        return {"prototypes": nn.Linear(dim, self.num_prototypes, bias=False)}

    def new_state(self, model: Model) -> EmbeddingQueue:
        """An empty queue."""
        return EmbeddingQueue(self.queue_size)

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """Eq. 1 and 2, each order's mean over the images. Both views go through the network as one batch."""
        assert isinstance(state, EmbeddingQueue)
        prototypes = model.heads["prototypes"].weight
        assert isinstance(prototypes, Tensor)
        z = model(torch.cat([x1, x2]))
        scores1, scores2 = cosine_scores(z, prototypes).chunk(2)
        past = cosine_scores(state.rows, prototypes.detach()) if len(state) else scores1[:0]
        codes1, codes2 = self.codes(scores1, past), self.codes(scores2, past)
        state.push(F.normalize(z.float(), dim=1))
        return cross_entropy(scores1 / self.temperature, codes2) + cross_entropy(scores2 / self.temperature, codes1)

    def codes(self, scores: Float[Tensor, "b k"], past: Float[Tensor, "q k"]) -> Float[Tensor, "b k"]:
        """The codes of a batch, balanced over it and the queue."""
        return balanced_assignment(torch.cat([scores, past]), self.epsilon, self.sinkhorn_iterations)[: len(scores)]
