"""L-DAWA: average the clients' weights layer by layer, each scaled by how well it agrees with the global one.

Rehman et al. 2023, https://arxiv.org/abs/2307.07393. With w_k^l the layer l of client k and w_g^l that layer as it was
broadcast, the new layer is mean_k cos(w_k^l, w_g^l) * w_k^l. A layer that has turned away counts less; the mean is not
renormalised, so layers shrink while clients turn. The client half is FedAvg's (conf/strategy/l_dawa.yaml), any method.

Paper says: layers. The authors' code takes each tensor of the state dict for one, a bias as well as a kernel, leaves
out scalars, and scales batch norm's running averages, too. We do the first two and average the running averages as
FedAvg does: they are measured, not turned by anybody, and a mean has no direction. The code leaves a layer of zeros as
it is but divides by zero where the broadcast one is zero (biases start there); for us cos = 1 in both cases.

The code does plain FedAvg in its first three rounds (of 200), by number of images, and weights all clients equally
afterwards, as the formula does. Here both are settings; `weighted: true` weights by number of images afterwards, too.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.federation.per_family import PerFamily
from fedssl.federation.records import Upload
from fedssl.federation.server import Server
from fedssl.federation.weights import mean_weights


class LDAWA(PerFamily):
    """The server half.

    Args:
        server: what the framework knows.
        warmup_rounds: that many first rounds are FedAvg, by number of images.
        weighted: weight a client by its number of images after them; otherwise all count the same.
    """

    def __init__(self, *, server: Server, warmup_rounds: int, weighted: bool) -> None:
        super().__init__(server=server)
        if warmup_rounds < 0:
            raise ConfigError(f"strategy.server.warmup_rounds must be at least 0, got {warmup_rounds}.")
        self.warmup_rounds = warmup_rounds
        self.weighted = weighted

    def merge(self, family: str, uploads: Sequence[Upload], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean of the uploads, after the first rounds of scaled ones."""
        warming_up = self.round_num <= self.warmup_rounds
        shares = [upload.num_images if warming_up or self.weighted else 1.0 for upload in uploads]
        if warming_up:
            return mean_weights([upload.arrays for upload in uploads], shares)
        trained = {name for name, _ in self.server.build_model(family).named_parameters()}
        layers = {f"{family}/{name}": w_g.numpy() for name, w_g in before.items() if name in trained and w_g.ndim > 0}
        scaled = [
            {name: agreement(w_k, layers[name]) * w_k if name in layers else w_k for name, w_k in upload.arrays.items()}
            for upload in uploads
        ]
        return mean_weights(scaled, shares)

    def notes(self) -> list[str]:
        """Also that all rounds were the first ones."""
        idle = self.server.num_rounds <= self.warmup_rounds
        return super().notes() + (["every round was a warm-up round: here L-DAWA is FedAvg"] if idle else [])


def agreement(w_k: np.ndarray, w_g: np.ndarray) -> float:
    """The cosine between a client's layer and the global one, -1..1; 1 if either has no direction."""
    a, b = w_k.astype(np.float64).ravel(), w_g.astype(np.float64).ravel()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return 1.0 if norms == 0 else float(np.clip(a @ b / norms, -1, 1))
