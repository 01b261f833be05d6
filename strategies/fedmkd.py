"""FedMKD: clients of any architecture teach a student on the public set, weighed by attention image by image.

Li et al. 2024, "Resource-Aware Federated Self-Supervised Learning with Global Class Representations", NeurIPS,
https://openreview.net/forum?id=Of4iNAIUSe. One round:

1. align: the client takes its own model of the last round and trains it on the public set for `align_epochs`, to find
   the projections of the student that was broadcast; that student is frozen;
2. local training with the run's method, and upload of the whole model: 4P bytes each way;
3. integrate: for a public view i, s_i the student's projection and z_ki client k's, both of length 1, P a small MLP to
   K numbers, all trained with the student and kept by the server from round to round:

       a_ki = softmax_k( (W_q P(s_i)) . (W_k P(z_ki)) / K )        t_i = sum_k a_ki z_ki

4. distil: `epochs` on two views of the public images, the queue with the student's latest projections:

       loss = method_weight * method + distill_weight * InfoNCE(t_i, s_i; queue)

Source: the formulas of 3 and 4 are read from the authors' released code (no text of the paper's method was at hand).

Departs from it: the code's W_q is K x 1, and its shapes cannot be multiplied; K x K is the nearest that can. It takes
the student's side of the InfoNCE without gradient, so that nothing but the attention learns from it; here the student
does, which is what it is for. Teachers are in eval mode and their projections of length 1, so that no client counts
more for its scale. The student is compared by its projections, there by BYOL's predictions of them: any method will do
here, and with another loss than BYOL's the weights .1 and .9 mean something else. The queue holds 1,024 keys, there
2,048 of which half stay noise; with fewer public images some keys are of the same image. The code aligns on the server,
with the client's predictor in between, and returns the aligned model as the client's target network; here the client
does it itself at the start of its next round, without predictor, and goes on from the result: what its method keeps is
made anew, so BYOL's target network starts as the aligned model. There one student teaches all architectures; here each
family has its own, so that the weights that come down fit. In the first round there is nothing yet to align to.

Projections of all families have one width (`projector.out_dim`). A family without clients
(`federation.server_families`) is a student like any other.

The server computes more than FLESD's: each student sees every view twice (in the method and in the InfoNCE), and each
client's model sees it once per student and epoch: `image_passes`. `public_only` does not match that. Clients train
`align_epochs` on the public set besides.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.per_family import Teachers
from fedssl.federation.records import Upload, model_state, to_arrays, to_metrics
from fedssl.federation.server import Server, read_uploads
from fedssl.losses import cosine_distance, momentum_contrast
from fedssl.methods import Method
from fedssl.models import Model, feature_dim
from fedssl.models.heads import MLP
from fedssl.seeding import derive_seed, seeded_init
from fedssl.similarity import unit_rows


# --- the client half ---
@dataclass(frozen=True, kw_only=True)
class Alignment(Method):
    """BYOL's regression without predictor and with a frozen target network: the anchor."""

    anchor: Model

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """(2 - 2 cos(z1, a2)) + (2 - 2 cos(z2, a1)), a the anchor's projections."""
        with torch.no_grad():
            a1, a2 = self.anchor(x1), self.anchor(x2)
        return 2 * (cosine_distance(model(x1), a2) + cosine_distance(model(x2), a1))


@dataclass(frozen=True, kw_only=True)
class FedMKDClient:
    """The client half: align its own model to the student, train, send all weights."""

    local_epochs: int
    align_epochs: int  # on the public set; 0 does not align

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client."""
        model = client.remembered(client.family)
        aligned: dict[str, float] = {}
        if self.align_epochs > 0 and client.round_num > 1:
            with client.doing("alignment"):
                aligned = self.align(client, model, client.load(broadcast))
            client.memory.clear()
        metrics = client.train(model, epochs=self.local_epochs)
        client.remember(model, client.family)
        metrics |= {f"align_{name}": value for name, value in aligned.items()}
        return client.upload(client.weights(model), metrics, codec="weights")

    def align(self, client: Client, model: Model, student: Model) -> dict[str, float]:
        """Train `model` in place on the public set, as on images of its own, with draws of their own."""
        method = Alignment(anchor=student.eval().requires_grad_(False))
        draws = derive_seed(client.seed, "alignment")
        on_public = replace(client, private_set=client.public_set.images, memory={}, seed=draws)
        return on_public.train(model, epochs=self.align_epochs, method=method)


# --- what a student learns ---
class Attention(nn.Module):
    """How much each client counts for an image, by what student and client make of it.

    Args:
        in_dim: width of projections.
        dim: K, of what is compared.
    """

    def __init__(self, *, in_dim: int, dim: int) -> None:
        super().__init__()
        self.embed = MLP(in_dim=in_dim, hidden_dim=None, out_dim=dim, batch_norm=True)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)

    def forward(self, s: Float[Tensor, "b d"], z: Float[Tensor, "b clients d"]) -> Float[Tensor, "b clients"]:
        """The weights a; rows sum to 1."""
        query = self.query(self.embed(s))
        key = self.key(self.embed(z.flatten(0, 1))).unflatten(0, z.shape[:2])
        return F.softmax((key * query[:, None]).sum(dim=2) / query.shape[1], dim=1)


@dataclass(frozen=True, kw_only=True)
class Integration(Method):
    """The student's loss. `model.heads["attention"]` is trained with it."""

    method: Method
    teachers: tuple[Model, ...]  # frozen, in eval mode
    method_weight: float
    distill_weight: float
    temperature: float
    queue_size: int

    def new_state(self, model: Model) -> nn.Module:
        """The method's own, and the queue, which no round hands to the next."""
        state = nn.Module()
        state.method = self.method.new_state(model)
        state.register_buffer("queue", torch.zeros(0), persistent=False)
        return state

    def prepare(self, model: Model, state: nn.Module, views: Iterator[Float[Tensor, "b 3 s s"]]) -> None:
        """Fill the queue."""
        self.method.prepare(model, state.method, views)  # type: ignore[arg-type]
        keys: list[Tensor] = []
        while sum(map(len, keys)) < self.queue_size:
            if len(x := next(views)) > 1:  # one image has no batch statistics
                keys.append(F.normalize(model(x).float(), dim=1))
        state.queue = torch.cat(keys)[: self.queue_size]

    def loss(
        self, model: Model, state: nn.Module, x1: Float[Tensor, "b 3 s s"], x2: Float[Tensor, "b 3 s s"]
    ) -> Float[Tensor, ""]:
        """See the module; both views of an image are distilled, then their projections join the queue."""
        own = self.method.loss(model, state.method, x1, x2)  # type: ignore[arg-type]
        x = torch.cat([x1, x2])
        s = F.normalize(model(x).float(), dim=1)
        with torch.no_grad():
            z = torch.stack([F.normalize(teacher(x).float(), dim=1) for teacher in self.teachers], dim=1)
            z = torch.nan_to_num(z, nan=0)  # of a teacher that overflows at this view, 0
        a = model.heads["attention"](s, z)
        t = (a[:, :, None] * z).sum(dim=1)
        distilled = momentum_contrast(t, s, state.queue, self.temperature)  # type: ignore[arg-type]
        state.queue = torch.cat([s.detach(), state.queue])[: self.queue_size]  # type: ignore[list-item]
        return self.method_weight * own + self.distill_weight * distilled

    def after_step(self, model: Model, state: nn.Module) -> None:
        """The method's."""
        self.method.after_step(model, state.method)  # type: ignore[arg-type]


# --- the server half ---
class FedMKD(Teachers):
    """The server half.

    Args:
        server: what the framework knows.
        epochs: of each student on the public set, per round.
        method_weight: of the run's method, >= 0.
        distill_weight: of the InfoNCE with the teacher, > 0.
        temperature: of the InfoNCE, > 0.
        queue_size: keys, >= 1.
        attention_dim: K, >= 1.

    Raises:
        ConfigError: a setting out of its range, or projections of different widths.
    """

    def __init__(
        self,
        *,
        server: Server,
        epochs: int,
        method_weight: float,
        distill_weight: float,
        temperature: float,
        queue_size: int,
        attention_dim: int,
    ) -> None:
        where = "set it under strategy.server"
        if min(epochs, queue_size, attention_dim) < 1:
            raise ConfigError(
                f"epochs, queue_size and attention_dim must be at least 1, got {epochs}, {queue_size} and "
                f"{attention_dim}; {where}."
            )
        if not (method_weight >= 0 and distill_weight > 0 and temperature > 0):
            raise ConfigError(
                f"method_weight must be at least 0, distill_weight and temperature greater than 0, got "
                f"{method_weight}, {distill_weight} and {temperature}; {where}."
            )
        size = server.public_set.images.image_size[0]
        widths = {family: feature_dim(server.build_model(family), size) for family in server.families}
        if len(set(widths.values())) > 1:
            raise ConfigError(
                f"strategy=fedmkd adds up projections of all families, and their widths differ: {widths}. Choose a "
                f"projector with a width of its own (projector=mlp, projector.out_dim), or strategy=feddf."
            )
        super().__init__(server=server)
        self.epochs = epochs
        self.method_weight = method_weight
        self.distill_weight = distill_weight
        self.temperature = temperature
        self.queue_size = queue_size
        self.attention_dim = attention_dim
        self.width = widths[server.report_family]
        self.kept: dict[str, Tensor] = {}  # attention and method's state by <family>/<part>/<name>, before this round
        self.learned: dict[str, Tensor] = {}  # the same after it

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Broadcast each family's student to this round's cohort."""
        self.kept = self.learned
        return super().configure_train(server_round, arrays, config, grid)

    def look(self, model: Model) -> Float[Tensor, "n d"]:
        """The model's projections of the whole public set, of length 1."""
        return unit_rows(self.server.embed_public(model, "projector"))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Every student learns from all clients."""
        received = read_uploads(replies, lambda reply: (self.check(reply), self.seen[reply]))
        self.learned = dict(self.kept)
        if not received:
            return self.arrays, None
        method = Integration(
            method=self.server.method,
            teachers=tuple(self.model(upload).eval().requires_grad_(False) for upload, _ in received),
            method_weight=self.method_weight,
            distill_weight=self.distill_weight,
            temperature=self.temperature,
            queue_size=self.queue_size,
        )
        plain = torch.stack([projections for _, projections in received], dim=1)
        students = {}
        metrics: dict[str, float] = {}
        for family in self.server.families:
            student, learned = self._distil(family, server_round, method, plain)
            students[family] = model_state(student)
            metrics |= {f"{family}/{name}": value for name, value in learned.items()}
        return to_arrays(students), to_metrics(metrics)

    def _distil(
        self, family: str, round_num: int, method: Integration, plain: Float[Tensor, "n clients d"]
    ) -> tuple[Model, dict[str, float]]:
        """The student of `family` and its metrics; `plain` are the clients' projections of the public images."""
        student = self.server.load(self.arrays, family)
        with seeded_init(self.server.seed, f"attention/{family}"):
            attention = Attention(in_dim=self.width, dim=self.attention_dim)
        if known := under(self.kept, f"{family}/attention/"):
            attention.load_state_dict(known)
        student.heads["attention"] = attention
        memory = under(self.kept, f"{family}/method/")
        metrics = self.server.train(
            student,
            self.server.public_set.images,
            batch_size=self.server.local.batch_size,
            epochs=self.epochs,
            purpose=f"FedMKD/{family}",
            round_num=round_num,
            method=method,
            memory=memory,
        )
        del student.heads["attention"]
        self.learned |= {f"{family}/method/{name}": value for name, value in memory.items()}
        self.learned |= {f"{family}/attention/{name}": v.cpu().clone() for name, v in attention.state_dict().items()}
        answers = unit_rows(self.server.embed_public(student, "projector"))
        with torch.no_grad():
            shares = attention.cpu()(answers, plain).mean(dim=0)
        metrics["image_passes"] = metrics["image_passes"] * (2 + len(method.teachers)) + self.queue_size
        return student, metrics | {"attention_max": shares.max().item(), "attention_min": shares.min().item()}

    def state_dict(self) -> dict[str, Tensor]:
        """What the server keeps of every student beside its weights, for a resume."""
        return self.learned

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As `state_dict` gave it."""
        self.learned = dict(state)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
