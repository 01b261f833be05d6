"""Hetero-SSFL: every client trains a network of its own, and all learn to see the public set alike.

Makhija et al. 2022, https://arxiv.org/abs/2205.12493. One round:

1. broadcast: the mean kernel Kbar of the round before; in the first round nothing;
2. local training: the client goes on with its own model, on its method's loss + mu * (1 - CKA(K, Kbar)), where K is the
   kernel of its embeddings of a batch of public images;
3. upload: what its model makes of the whole public set, n x d (`codec`);
4. the server averages the clients' kernels, centred and of norm 1, as CKA sees them.

There is no global model. Every client keeps its own and evaluates it; a run reports means and ranges per family, each
over the clients of that family alone. (`local_only` trains the report family on every shard besides; here a client that
did would no longer be the paper's.)

Kbar comes down in whichever form is smaller: n x r factors, the clients' own side by side, or its upper triangle. CKA
does not see scale, so the numbers are divided by the largest. In fp16 an entry of the triangle moves by at most 2^-12
of the largest, and by 2^-11 of itself where it is not tiny; factors move an entry of Kbar by at most 2^-10 |f_i| |f_j|.

Departs from the paper: kernels are of cosines, which is what codecs carry, and of what `embedding` says; public images
are batches without augmentation, drawn anew in every step; they go through the network in train mode, so batch norm
sees them, too, and its running averages are of private views and public images; clients count alike in Kbar, whatever
they own.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from jaxtyping import Float, Int64
from torch import Tensor

from fedssl.codecs import Codec, Sharpened
from fedssl.ensemble import EnsembleTarget, MeanKernel, mean_kernel_factors
from fedssl.errors import ConfigError, PayloadError
from fedssl.federation.arrays import read_array, to_record
from fedssl.federation.client import Broadcast, Client
from fedssl.federation.embedding import check_embedding, embed_batch
from fedssl.federation.per_client import PerClient
from fedssl.federation.records import Upload
from fedssl.federation.server import Server, read_uploads
from fedssl.losses import cka_loss
from fedssl.models import Model
from fedssl.similarity import AnchorMass, FactorSimilarity, Similarity

log = logging.getLogger(__name__)

DTYPES = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True, kw_only=True)
class HeteroSSFLClient:
    """The client half. The numbers live in conf/strategy/hetero_ssfl.yaml."""

    local_epochs: int
    mu: float  # weight of the alignment, >= 0
    batch_size: int  # public images in a step, >= 2; all of them if there are fewer
    codec: Codec
    embedding: str  # what kernels are made of: projector | backbone

    def __post_init__(self) -> None:
        if not 0 <= self.mu < torch.inf:
            raise ConfigError(f"strategy.client.mu must be at least 0, got {self.mu}; 1 weighs both terms alike.")
        if self.batch_size < 2:
            raise ConfigError(
                f"strategy.client.batch_size must be at least 2, got {self.batch_size}: a kernel compares images."
            )

    def __call__(self, client: Client, broadcast: Broadcast) -> Upload:
        """One round of one client: go on with its own model."""
        model = client.remembered(client.family)
        images = client.public_set.images
        draws = client.generator("hetero_ssfl public batches")
        arrays = {name: read_array(name, array) for name, array in broadcast.arrays.items()}
        kernel = decode_kernel(arrays, len(images), client.device) if arrays else None

        def penalty(model: Model, x1: Tensor, x2: Tensor) -> Tensor:
            assert kernel is not None
            rows = torch.randperm(len(images), generator=draws)[: self.batch_size]
            x = client.views.plain(images.take(rows).to(client.device))
            cosines = F.normalize(embed_batch(model, self.embedding, x).float(), dim=1)
            return self.mu * cka_loss(cosines, kernel(rows.to(client.device)))

        metrics = client.train(model, epochs=self.local_epochs, penalty=penalty if kernel else None)
        client.remember(model, client.family)
        similarities, measures = client.similarities(model, embedding=self.embedding, codec=self.codec)
        return client.upload(similarities, metrics | measures, codec=self.codec.name)

    def evaluate(self, client: Client, broadcast: Broadcast) -> dict[str, float]:
        """Probe this client's model: `<family>/<metric>`."""
        metrics = client.evaluate(client.remembered(client.family))
        return {f"{client.family}/{name}": value for name, value in metrics.items()}


class HeteroSSFL(PerClient):
    """The server half.

    Args:
        server: what the framework knows.
        codec: the wire format of uploads; any but `sharpened`.
        embedding: what the clients' kernels are made of.
        dtype: of the mean kernel that comes down: "fp16" or "fp32".

    Raises:
        ConfigError: an upload would be larger than `codec.max_bytes`, or settings that do not go together.
    """

    def __init__(self, *, server: Server, codec: Codec, embedding: str, dtype: str) -> None:
        super().__init__(server=server)
        check_embedding(embedding)
        codec.check_size(len(server.public_set.images), server.embedding_dims[embedding])
        if isinstance(codec, Sharpened):
            raise ConfigError(
                "strategy=hetero_ssfl averages kernels, and codec=sharpened sends masses, which are none: choose "
                "codec=factor or another."
            )
        if dtype not in DTYPES:
            raise ConfigError(f"strategy.server.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if server.report_family not in server.trained_families:
            raise ConfigError(
                f"strategy=hetero_ssfl has no global model, and no client is of federation.report_family="
                f"{server.report_family}: choose one of {', '.join(server.trained_families)}."
            )
        self.codec = codec
        self.dtype = dtype
        self.kernel: dict[str, np.ndarray] = {}  # as it is sent; empty before the first round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the mean kernel to this round's cohort."""
        self.round_num = server_round
        cohort = self.server.sample_cohort(server_round, grid)
        return self.server.messages(server_round, cohort, config, None, common=to_record(self.kernel))

    def check(self, reply: Message) -> Similarity:
        """Parse and decode an upload."""
        upload = Upload.from_message(reply)
        self.server.check_header(upload, self.round_num, self.codec.name)
        similarity = self.codec.decode(upload.arrays, len(self.server.public_set.images))
        assert not isinstance(similarity, AnchorMass)
        return similarity

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the kernels; without any usable upload the kernel of the round before stays."""
        similarities = read_uploads(replies, self.check)
        if similarities:
            self.kernel = encode_kernel(similarities, self.dtype)
        return None, None

    def state_dict(self) -> dict[str, Tensor]:
        """The mean kernel, for a resume."""
        return {name: torch.from_numpy(array.copy()) for name, array in self.kernel.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As `state_dict` gave it."""
        self.kernel = {name: tensor.numpy() for name, tensor in state.items()}

    def summary(self) -> None:
        """Log what is exchanged."""
        log.info("Hetero-SSFL: codec %s up, the mean kernel down; clients keep their models", self.codec)


# --- the mean kernel on the wire ---------------------------------------------------------------------------------
class Kernel:
    """Kbar, times any constant, for the batch of public images that is asked for.

    Args:
        factors: (n, r), Kbar their Gram matrix; or None.
        matrix: (n, n); or None.
    """

    def __init__(
        self, *, factors: Float[Tensor, "n r"] | None = None, matrix: Float[Tensor, "n n"] | None = None
    ) -> None:
        self.factors = factors
        self.matrix = matrix

    def __call__(self, rows: Int64[Tensor, " b"]) -> Float[Tensor, "b b"]:
        """The kernel of these images, fp32 under autocast too."""
        if self.factors is not None:
            with torch.autocast(rows.device.type, enabled=False):
                return self.factors[rows] @ self.factors[rows].T
        assert self.matrix is not None
        return self.matrix[rows][:, rows]


def encode_kernel(similarities: Sequence[Similarity], dtype: str) -> dict[str, np.ndarray]:
    """The mean kernel in the smaller of its two forms, divided by its largest number; empty if no client tells images
    apart.

    Returns:
        `factors`, (n, r), where all clients sent factors and r < (n + 1) / 2 in sum; else `triangle`, the n (n + 1) / 2
        entries on and above the diagonal, row after row.
    """
    n = similarities[0].num_samples
    sent = [similarity for similarity in similarities if isinstance(similarity, FactorSimilarity)]
    if len(sent) == len(similarities) and sum(s.factors.shape[1] for s in sent) < (n + 1) / 2:
        name, values = "factors", mean_kernel_factors(sent)
    else:
        everyone = torch.arange(n)
        matrix = EnsembleTarget(similarities, MeanKernel(), 1.0)(everyone, everyone)
        name, values = "triangle", ((matrix + matrix.T) / 2)[torch.ones(n, n, dtype=torch.bool).triu()]
    if not values.any():
        return {}
    return {name: (values / values.abs().amax()).numpy().astype(DTYPES[dtype])}


def decode_kernel(arrays: Mapping[str, np.ndarray], n: int, device: torch.device) -> Kernel:
    """What `encode_kernel` made; anything else is a `PayloadError`."""
    [(name, array)] = arrays.items() if len(arrays) == 1 else [("several arrays", np.empty(0))]
    values = torch.from_numpy(array.astype(np.float32)).to(device)
    if name == "factors" and values.shape[:-1] == (n,):
        return Kernel(factors=values)
    if name == "triangle" and values.shape == (n * (n + 1) // 2,):
        matrix = torch.zeros(n, n, device=device)
        matrix[torch.ones(n, n, dtype=torch.bool, device=device).triu()] = values
        return Kernel(matrix=matrix + matrix.triu(1).T)
    raise PayloadError(f"a mean kernel of {n} public images was expected, got {name!r} of shape {array.shape}")
