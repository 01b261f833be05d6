"""Self-supervised methods: two views and a model in, a loss out. One method a file."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn

from fedssl.models import Model


class Method(ABC):
    """What `fedssl.train.train` minimises: frozen numbers. `conf/method/` is the list of those that ship.

    What a method trains beside backbone and projector are the model's `heads`; they travel with its weights. What
    changes from step to step and is not trained (an average of the network, a queue) is its *state*: a module of
    tensors that is handed to every call, and that a client keeps between its rounds and sends to nobody. On a GPU a
    step is recorded and replayed (`fedssl.cuda_graph`): what changes from step to step must be such a tensor, changed
    in place; a number that Python counts up would stay as it was.
    """

    def heads(self, dim: int) -> dict[str, nn.Module]:
        """Further trained parts of the model by name, e.g. "predictor", for projections of width `dim`; here none.

        Each takes projections alone. Methods that share a name share the part, and must build it alike.
        """
        return {}

    def new_state(self, model: Model) -> nn.Module:
        """The state before the first step; by default empty. `model` holds the weights that training starts from."""
        return nn.Module()

    def prepare(self, model: Model, state: nn.Module, views: Iterator[Float[Tensor, "b 3 s s"]]) -> None:  # noqa: B027
        """Once before the first step of every training, without gradients.

        Args:
            model: in train mode.
            state: new, or as the client kept it.
            views: endless batches of views of the training images.
        """

    @abstractmethod
    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """The loss of one batch; row i of `x1` and of `x2` are two views of image i."""

    def after_step(self, model: Model, state: nn.Module) -> None:  # noqa: B027
        """Once after every optimiser step; by default nothing."""
