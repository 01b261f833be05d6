"""Orchestra: clients learn to agree with a clustering that all of them made together.

Lubana et al. 2022, https://arxiv.org/abs/2205.11506. Brings its own loss, so `method=` is not read, and the heads of
that method travel as they are. A client has an online network f, a target network t that follows it, and the unit
global centroids C; x3 is a view turned by a random multiple of 90 degrees, which it has to tell:

    loss = -sum softmax(t(x1) C / T) . log softmax(f(x2) C / T) + cross-entropy(rotation of x3)

1. broadcast: weights and global centroids;
2. local training; the client keeps its last target projections in a memory;
3. local clustering: k-means on the memory with clusters of equal size (Sinkhorn), of which only the centroids go up,
   so each sent vector is the mean of as many projections of views as `memory_size / num_local`;
4. the server averages the weights (FedAvg, by images) and clusters all local centroids into new global ones.

The upload is weights and local centroids and nothing else. (The authors' code sends its whole state, target network and
memory included: the single projections that the clusters were to hide.) The target network and the memory stay with
the client from round to round; theirs takes the average of all target networks.

The first round is the paper's round 0: clients cluster what the untrained network makes of their images and train
nothing. So is any round of a family that has no centroids yet.

Departs from the paper: every architecture family is a federation of its own. x3 is the first view turned, not a third
one; the online network sees the first view in no other form. The authors' clusters are the largest entries of the
balanced assignment, which need not have equal sizes, and an empty one becomes one image's projection; ours are rounded
to equal sizes, which is what the paper promises. Sinkhorn makes a fixed number of iterations (there: until the sums are
right to 1 %, at most 100). The first global centroids start from local ones (there: from noise).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fedssl.clustering import balanced_assignment, equal_kmeans
from fedssl.errors import ConfigError, PayloadError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.per_family import PerFamily
from fedssl.federation.records import Upload, family_arrays, family_state
from fedssl.federation.server import Server
from fedssl.federation.weights import check_weights, mean_weights
from fedssl.losses import cross_entropy
from fedssl.methods import Method
from fedssl.models import Model, TargetEncoder
from fedssl.seeding import generator

GLOBAL = "heads.orchestra_centroids.weight"  # comes down with the weights
LOCAL = "local_centroids"  # goes up beside them, instead


# --- the client's loss -------------------------------------------------------------------------------------------
class Centroids(nn.Module):
    """Unit global centroids; all 0 before there are any. No gradient moves them."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(num, dim))

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b g"]:
        """The cosine of each projection with each centroid, fp32 under autocast too."""
        with torch.autocast(z.device.type, enabled=False):
            return F.normalize(z.to(self.weight.dtype), dim=1) @ self.weight.T


def centroids_of(model: Model) -> Centroids:
    """The global centroids that a model holds."""
    centroids = model.heads["orchestra_centroids"]
    assert isinstance(centroids, Centroids)
    return centroids


class TargetAndMemory(nn.Module):
    """What stays with the client: the target network and its last unit projections, oldest first."""

    def __init__(self, model: Model, memory_size: int) -> None:
        super().__init__()
        self.target = TargetEncoder(model)
        self.memory: Tensor
        self.register_buffer("memory", torch.zeros(memory_size, centroids_of(model).weight.shape[1]))

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """The target's unit projections, which push the oldest out of the memory."""
        z = F.normalize(self.target(x).to(self.memory.dtype), dim=1)
        self.memory.copy_(torch.cat([self.memory, z])[-len(self.memory) :])
        return z


@dataclass(frozen=True, kw_only=True)
class ClusterAndRotate(Method):
    """Orchestra's local loss on a model with the heads of `OrchestraClient`."""

    temperature: float
    ema_decay: float
    memory_size: int
    rotations: torch.Generator  # CPU

    def new_state(self, model: Model) -> TargetAndMemory:
        """The target starts as a copy of the online network, the memory empty."""
        return TargetAndMemory(model, self.memory_size)

    def prepare(self, model: Model, state: nn.Module, views: Iterator[Float[Tensor, "b 3 s s"]]) -> None:
        """Fill a memory that is empty; a batch of one image, of which batch norm makes nothing, is left out."""
        assert isinstance(state, TargetAndMemory)
        missing = 0 if state.memory.any() else self.memory_size
        while missing > 0:
            if len(x := next(views)) > 1:
                missing -= len(state(x))

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """The module's formula."""
        centroids, rotation = centroids_of(model), model.heads["orchestra_rotation"]
        p = F.softmax(centroids(state(x1)) / self.temperature, dim=1)
        clustering = cross_entropy(centroids(model(x2)) / self.temperature, p)
        turns = torch.randint(4, (len(x1),), generator=self.rotations).to(x1.device)
        return clustering + F.cross_entropy(rotation(model(rotate(x1, turns))), turns)

    def after_step(self, model: Model, state: nn.Module) -> None:
        """The target follows."""
        assert isinstance(state, TargetAndMemory)
        state.target.follow(model, self.ema_decay)


def rotate(x: Float[Tensor, "b 3 s s"], turns: Int64[Tensor, " b"]) -> Float[Tensor, "b 3 s s"]:
    """Each image turned to the left by its number (0 to 3) of quarter turns."""
    turned = torch.stack([torch.rot90(x, k, dims=(2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(x), device=x.device)]


# --- the client --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class OrchestraClient:
    """The client half. The numbers live in conf/strategy/orchestra.yaml."""

    local_epochs: int
    temperature: float  # T > 0 of assignments to global centroids
    ema_decay: float  # of the target network, per step: 0 copies the online one, 1 stays at its start
    num_global: int  # centroids of a family's federation
    num_local: int  # centroids that a client sends
    memory_size: int  # projections that a client clusters, a multiple of num_local
    cluster_iterations: int  # of local k-means
    sinkhorn_temperature: float  # of balanced assignments, > 0
    sinkhorn_iterations: int

    def __post_init__(self) -> None:
        for name in ("temperature", "sinkhorn_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"strategy.client.{name} must be greater than 0, got {getattr(self, name)}.")
        for name in ("num_global", "num_local", "cluster_iterations", "sinkhorn_iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"strategy.client.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.ema_decay <= 1:
            raise ConfigError(
                f"strategy.client.ema_decay must be between 0 (a copy of the online network) and 1 (frozen), "
                f"got {self.ema_decay}."
            )
        if self.memory_size < 2 * self.num_local or self.memory_size % self.num_local:
            raise ConfigError(
                f"strategy.client.memory_size must be a multiple of num_local={self.num_local} and at least twice as "
                f"large, got {self.memory_size}: local clusters have equal sizes, and a cluster of one would send what "
                f"it is there to hide."
            )

    def heads(self, dim: int) -> dict[str, nn.Module]:
        """The global centroids and the classifier of rotations."""
        return {"orchestra_centroids": Centroids(self.num_global, dim), "orchestra_rotation": nn.Linear(dim, 4)}

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.load(broadcast)
        method = ClusterAndRotate(
            temperature=self.temperature,
            ema_decay=self.ema_decay,
            memory_size=self.memory_size,
            rotations=client.generator("orchestra rotations"),
        )
        if centroids_of(model).weight.any():
            metrics = client.train(model, epochs=self.local_epochs, method=method)
            memory = client.memory[f"method/{client.family}/memory"]
        else:
            memory, metrics = first_memory(client, model, method)
        centroids = equal_kmeans(
            memory,
            self.num_local,
            temperature=self.sinkhorn_temperature,
            num_iterations=self.cluster_iterations,
            num_sinkhorn=self.sinkhorn_iterations,
            generator=client.generator("orchestra local clustering"),
        )
        arrays = client.weights(model)
        del arrays[f"{client.family}/{GLOBAL}"]
        arrays[LOCAL] = centroids.numpy()
        return client.upload(arrays, metrics, codec="weights")


def first_memory(
    client: Client, model: Model, method: ClusterAndRotate
) -> tuple[Float[Tensor, "m d"], dict[str, float]]:
    """The memory of a model that has not been trained, on the CPU; and `image_passes` and `seconds` of filling it."""
    with client.doing("filling the memory"):
        started = time.perf_counter()
        images, size = client.private_set, client.local.batch_size
        draws = generator(client.seed, "orchestra first views", client.round_num, client.partition_id, client.device)
        pixels = images.take(np.arange(len(images))).to(client.device)
        state = method.new_state(model).to(client.device).train()
        passed: list[int] = []

        def views() -> Iterator[Float[Tensor, "b 3 s s"]]:
            while True:
                for batch in torch.split(pixels, size):
                    passed.append(len(batch) if len(batch) > 1 else 0)  # `prepare` leaves one image out
                    yield client.views(batch, draws)

        method.prepare(model, state, views())
        memory = state.memory.cpu()
        return memory, {"image_passes": float(sum(passed)), "seconds": time.perf_counter() - started}


# --- the server --------------------------------------------------------------------------------------------------
class Orchestra(PerFamily):
    """The server half.

    Args:
        server: what the framework knows.
        num_local: centroids that a client sends.
        temperature: T > 0, as the clients'.
        sinkhorn_temperature: of balanced assignments, > 0.
        sinkhorn_iterations: likewise.
        lr: of the global centroids, SGD.
        momentum: likewise, at least 0 and below 1.
        steps: likewise, in each round.
    """

    def __init__(
        self,
        *,
        server: Server,
        num_local: int,
        temperature: float,
        sinkhorn_temperature: float,
        sinkhorn_iterations: int,
        lr: float,
        momentum: float,
        steps: int,
    ) -> None:
        super().__init__(server=server)
        if not (lr > 0 and 0 <= momentum < 1 and steps >= 1):
            raise ConfigError(
                f"strategy.server: lr must be greater than 0, momentum at least 0 and below 1 and steps at least 1, "
                f"got {lr}, {momentum} and {steps}."
            )
        self.num_local = num_local
        self.temperature = temperature
        self.sinkhorn_temperature = sinkhorn_temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.lr = lr
        self.momentum = momentum
        self.steps = steps

    def check_arrays(self, arrays: Mapping[str, np.ndarray], family: str) -> dict[str, float]:
        """The family's weights but for the global centroids, and `num_local` unit vectors beside them."""
        expected: ArrayRecord = family_arrays(self.arrays, family)
        dim = expected[f"{family}/{GLOBAL}"].shape[1]
        del expected[f"{family}/{GLOBAL}"]
        largest = check_weights({name: value for name, value in arrays.items() if name != LOCAL}, expected, family)
        centroids = arrays.get(LOCAL, np.empty(0))
        if (str(centroids.dtype), centroids.shape) != ("float32", (self.num_local, dim)):
            raise PayloadError(
                f"{LOCAL!r} must be float32{(self.num_local, dim)}, got {centroids.dtype}{centroids.shape}"
            )
        lengths = np.linalg.norm(centroids.astype(np.float64), axis=1)
        if not (np.abs(lengths - 1) < 1e-3).all():  # nor NaN
            raise PayloadError(
                f"{LOCAL!r} must be unit vectors, got lengths {lengths.min():.3g} to {lengths.max():.3g}"
            )
        return largest

    def state(self, upload: Upload) -> dict[str, Tensor]:
        """The model that a client sent, with the global centroids as they were broadcast."""
        state = super().state(upload)
        del state[LOCAL]
        return state | {GLOBAL: family_state(self.arrays, upload.header.family)[GLOBAL]}

    def merge(self, family: str, uploads: Sequence[Upload], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """FedAvg of the weights; the global centroids from all local ones."""
        states = [{name: value for name, value in u.arrays.items() if name != LOCAL} for u in uploads]
        weights = mean_weights(states, [upload.num_images for upload in uploads])
        local = torch.cat([torch.from_numpy(upload.arrays[LOCAL].copy()) for upload in uploads])
        start = before[GLOBAL]
        if not start.any():
            draws = generator(self.server.seed, f"orchestra first centroids/{family}", self.round_num)
            some = local[torch.randperm(len(local), generator=draws)]
            start = torch.cat([some, torch.randn(start.shape, generator=draws)])[: len(start)]
        return {**weights, GLOBAL: self.global_centroids(local, start)}

    def global_centroids(self, local: Float[Tensor, "m d"], start: Float[Tensor, "g d"]) -> Float[Tensor, "g d"]:
        """Unit centroids whose soft assignment of the local ones becomes a balanced one.

        Every step minimises -mean_i cos(S_i, softmax(z_i C / T)), S the balanced assignment by z C, which no gradient
        goes through; then centroids are made unit vectors again.
        """
        centroids = F.normalize(start, dim=1).requires_grad_()
        optimiser = torch.optim.SGD([centroids], lr=self.lr, momentum=self.momentum)
        for _ in range(self.steps):
            scores = local @ centroids.T
            wanted = balanced_assignment(scores, self.sinkhorn_temperature, self.sinkhorn_iterations)
            loss = -F.cosine_similarity(wanted, F.softmax(scores / self.temperature, dim=1), dim=1).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                centroids.copy_(F.normalize(centroids, dim=1))
        return centroids.detach()

    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        own = "clients train with Orchestra's own loss, whatever method= says, and not in the first round"
        return [*super().notes(), own]
