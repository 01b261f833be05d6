"""Self-supervised methods: two views and a model in, a loss out. One method a file."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from fedssl.models import Model


@runtime_checkable
class Method(Protocol):
    """What `fedssl.train.train` minimises. `conf/method/` is the list of those that ship."""

    def loss(self, model: Model, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]) -> Float[Tensor, ""]:
        """The loss of one batch; row i of `x1` and of `x2` are two views of image i."""
        ...
