"""Hetero-SSFL: the mean kernel, its two forms on the wire, and models that stay with their clients."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord
from torch import Tensor

from fedssl.data.images import ImageSet
from fedssl.ensemble import mean_kernel_factors
from fedssl.errors import ConfigError, PayloadError
from fedssl.federation import simulation
from fedssl.federation.client import MODELS
from fedssl.federation.embedding import embed, embed_batch
from fedssl.federation.records import Upload, model_state
from fedssl.federation.setup import Setup
from fedssl.federation.simulation import build_strategy
from fedssl.federation.store import ClientStore
from fedssl.losses import cka_loss
from fedssl.similarity import DenseSimilarity, FactorSimilarity, cosine_similarity
from strategies.hetero_ssfl import HeteroSSFL, HeteroSSFLClient, decode_kernel, encode_kernel
from tests.federation_helpers import FAMILIES, assert_same, first_round, numpy_of, open_in_process, rows, small

CPU = torch.device("cpu")


def embeddings(n: int = 9, dims: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(n, d, generator=rng) for d in dims]


def mean_kernel(zs: list[Tensor]) -> Tensor:
    """mean_k C S_k C / |C S_k C|_F entry by entry, in fp64."""
    n = len(zs[0])
    total = torch.zeros(n, n, dtype=torch.float64)
    for z in zs:
        s = [[F.cosine_similarity(a.double(), b.double(), dim=0).item() for b in z] for a in z]
        row = [sum(s[i]) / n for i in range(n)]
        centred = torch.tensor([[s[i][j] - row[i] - row[j] + sum(row) / n for j in range(n)] for i in range(n)])
        total += centred.double() / centred.double().norm()
    return total / len(zs)


def scaled(kernel: Tensor) -> Tensor:
    return kernel / kernel.norm()


# --- the mean kernel on the wire ---
def test_factors_side_by_side_are_the_mean_kernel() -> None:
    zs = embeddings()
    factors = mean_kernel_factors([FactorSimilarity(factors=z) for z in zs])
    assert factors.shape == (9, 5)
    torch.testing.assert_close((factors @ factors.T).double(), mean_kernel(zs), atol=1e-6, rtol=1e-5)


def test_a_collapsed_client_adds_nothing_but_counts() -> None:
    [z] = embeddings(dims=(2,))
    alone = mean_kernel_factors([FactorSimilarity(factors=z)])
    both = mean_kernel_factors([FactorSimilarity(factors=z), FactorSimilarity(factors=torch.ones(9, 3))])
    torch.testing.assert_close(both @ both.T, alone @ alone.T / 2)
    assert encode_kernel([FactorSimilarity(factors=torch.ones(9, 3))], "fp16") == {}
    assert encode_kernel([DenseSimilarity(matrix=torch.ones(9, 9))], "fp16") == {}


@pytest.mark.parametrize(("dims", "form", "size"), [((2, 2), "factors", 9 * 4), ((2, 3), "triangle", 45)])
@pytest.mark.parametrize(("dtype", "error"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_the_smaller_form_travels_and_gives_the_kernel_back(
    dims: tuple[int, ...], form: str, size: int, dtype: str, error: float
) -> None:
    """Up to scale, which CKA does not see: 9 images have 45 pairs, which 4 columns undercut and 5 do not."""
    zs = embeddings(dims=dims)
    sent = encode_kernel([FactorSimilarity(factors=z) for z in zs], dtype)
    assert {name: (array.size, str(array.dtype)) for name, array in sent.items()} == {
        form: (size, {"fp16": "float16", "fp32": "float32"}[dtype])
    }
    kernel, expected = decode_kernel(sent, 9, CPU), mean_kernel(zs)
    everyone, some = torch.arange(9), torch.tensor([7, 0, 3])
    assert (scaled(kernel(everyone).double()) - scaled(expected)).norm() < error
    torch.testing.assert_close(kernel(some), kernel(everyone)[some][:, some])


@pytest.mark.parametrize(("dims", "bound"), [((2, 2), 2.0**-10), ((2, 3), 2.0**-11)])
def test_the_error_of_fp16_is_the_stated_one(dims: tuple[int, ...], bound: float) -> None:
    """Of each entry: relative to |f_i| |f_j| for factors, to the entry or 2^-12 of the largest for the triangle."""
    sent = [FactorSimilarity(factors=z) for z in embeddings(200, (40, 50) if dims == (2, 2) else (60, 70))]
    everyone = torch.arange(200)
    exact, rounded = (decode_kernel(encode_kernel(sent, dtype), 200, CPU) for dtype in ("fp32", "fp16"))
    off = (exact(everyone) - rounded(everyone)).abs()
    if exact.factors is not None:
        lengths = exact.factors.norm(dim=1)
        assert (off <= 1.001 * bound * lengths[:, None] * lengths).all()
    else:
        assert (off <= (bound * exact(everyone).abs()).clamp_min(2.0**-24)).all()
        assert off.max() <= 2.0**-12
    assert off.max() > 0


def test_kernels_of_matrices_and_of_factors_agree() -> None:
    zs = embeddings(dims=(4, 5))
    dense = encode_kernel([DenseSimilarity(matrix=cosine_similarity(z)) for z in zs], "fp32")
    factors = encode_kernel([FactorSimilarity(factors=z) for z in zs], "fp32")
    np.testing.assert_allclose(dense["triangle"], factors["triangle"], atol=1e-5)


@pytest.mark.parametrize("arrays", [{"factors": (8, 2)}, {"triangle": (44,)}, {"loot": (9, 9)}, {"a": (1,), "b": (1,)}])
def test_something_else_is_no_kernel(arrays: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(PayloadError, match="a mean kernel of 9 public images was expected, got"):
        decode_kernel({name: np.zeros(shape, np.float16) for name, shape in arrays.items()}, 9, CPU)


# --- the client's term ---
@pytest.mark.parametrize("embedding", ["projector", "backbone"])
def test_a_batch_of_all_images_is_embedded_as_the_upload_is(embedding: str) -> None:
    setup = Setup(small(None))
    model = setup.build_model("tiny").eval()
    images: ImageSet = setup.public_set.images
    x = setup.views.plain(images.take(np.arange(len(images))))
    whole = embed(model, embedding, images, setup.views, batch_size=7, device=CPU)
    batch = embed_batch(model, embedding, x)
    varies = whole.abs().amax(dim=0) > 0
    assert varies.any()
    torch.testing.assert_close(batch[:, varies], whole[:, varies], atol=0.05, rtol=0.05)  # batch norm's epsilon
    batch.square().sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.backbone.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def kernel_of_round_one(tmp_path: Path, *overrides: str) -> tuple[HeteroSSFL, list[Upload]]:
    _, strategy, messages, replies = first_round(small(None, "strategy=hetero_ssfl", *overrides), tmp_path)
    assert isinstance(strategy, HeteroSSFL)
    assert all(len(message.content["arrays"]) == 0 for message in messages)
    assert strategy.aggregate_train(1, replies) == (None, None)
    return strategy, [Upload.from_message(reply) for reply in replies]


def test_the_penalty_begins_in_round_two_and_is_mu_times_one_minus_cka(tmp_path: Path) -> None:
    """At a learning rate of nothing the model stays, so the mean penalty is that of its own batches."""
    frozen = ("client.optimisation.lr=1e-12", "embedding=projector", "codec.dtype=fp32", "strategy.client.mu=3")
    config = small(None, "strategy=hetero_ssfl", "strategy.client.batch_size=24", *frozen)
    strategy, uploads = kernel_of_round_one(tmp_path, "strategy.client.batch_size=24", *frozen)
    assert all("penalty" not in upload.metrics for upload in uploads)
    setup, grid = Setup(config), open_in_process(config, tmp_path)
    messages = list(strategy.configure_train(2, setup.server().initial_arrays(), ConfigRecord(), grid))
    [upload] = [Upload.from_message(reply) for reply in grid.send_and_receive(messages[2:3])]
    model = setup.client(2, 1)
    model.memory = ClientStore(tmp_path / "clients").read(2, before=2)
    tiny = model.remembered("tiny").train()
    images = setup.public_set.images
    z = tiny(setup.views.plain(images.take(np.arange(24))))  # batch norm: the statistics of this one batch
    kernel = decode_kernel(strategy.kernel, 24, CPU)(torch.arange(24))
    expected = 3 * cka_loss(F.normalize(z, dim=1), kernel)
    assert upload.metrics["penalty"] == pytest.approx(expected.item(), rel=1e-3)
    assert 0.01 < upload.metrics["penalty"] < 3


def test_clients_come_to_agree_on_the_public_set(tmp_path: Path) -> None:
    """The point of it all: with mu the clients' CKA with their mean is larger than without."""
    agreement = {}
    for mu in (0, 10):
        overrides = ("strategy=hetero_ssfl", f"strategy.client.mu={mu}", "client.local_epochs=10", "evaluate.every=9")
        simulation.run(small(tmp_path / str(mu), *overrides, "federation.num_rounds=3"))
        last = [row["metrics"] for row in rows(tmp_path / str(mu), "client") if row["round"] == 3]
        config = small(tmp_path / str(mu), *overrides)
        setup = Setup(config)
        zs = []
        for partition in range(4):
            client = setup.client(partition, 4)
            client.memory = ClientStore(tmp_path / str(mu) / "clients").read(partition, before=4)
            zs.append(F.normalize(client.embed_public(client.remembered(client.family), "backbone"), dim=1))
        mean = mean_kernel(zs).float()
        agreement[mu] = float(np.mean([1 - cka_loss(z, mean).item() for z in zs]))
        assert len(last) == 4
    assert agreement[10] > agreement[0] + 0.02


# --- the round ---
def test_what_travels_is_similarities_up_and_one_kernel_down(tmp_path: Path) -> None:
    strategy, uploads = kernel_of_round_one(tmp_path)
    assert all(upload.arrays.keys() == {"factors"} for upload in uploads)
    assert {upload.arrays["factors"].shape[0] for upload in uploads} == {24}
    config = small(None, "strategy=hetero_ssfl")
    arrays = Setup(config).server().initial_arrays()
    messages = list(strategy.configure_train(2, arrays, ConfigRecord(), open_in_process(config, tmp_path)))
    for message in messages:
        assert_same(numpy_of(message.content["arrays"]), strategy.kernel)
    assert strategy.kernel["triangle"].shape == (300,)


def test_the_mean_kernel_does_not_depend_on_the_order_of_replies(tmp_path: Path) -> None:
    _, strategy, _, replies = first_round(small(None, "strategy=hetero_ssfl"), tmp_path)
    assert isinstance(strategy, HeteroSSFL)
    kernels = []
    for order in list(permutations(range(4)))[::7]:
        strategy.aggregate_train(1, [replies[i] for i in order])
        kernels.append(strategy.kernel)
    for kernel in kernels:
        assert_same(kernel, kernels[0])
    strategy.aggregate_train(1, [])
    assert_same(strategy.kernel, kernels[0])  # nobody answered: the last one stays


def test_clients_keep_their_own_model_and_report_it_per_family(tmp_path: Path) -> None:
    overrides = ("strategy=hetero_ssfl", "federation.num_rounds=2")
    summary = simulation.run(small(tmp_path / "run", *overrides))
    assert [summary["families"][family]["num_clients"] for family in FAMILIES] == [2, 1, 1]
    last = [row for row in rows(tmp_path / "run", "client") if row["round"] == 2]
    own = [row["metrics"]["conv4_4/linear_top1"] for row in last if row["family"] == "conv4_4"]
    assert len(own) == 2
    assert summary["linear_top1"] == pytest.approx(np.mean(own))
    assert (summary["linear_top1_min"], summary["linear_top1_max"]) == (min(own), max(own))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["report_family"] == "conv4_4"
    assert not (tmp_path / "run" / "models").exists()
    setup = Setup(small(None, *overrides))
    for partition in range(4):
        memory = ClientStore(tmp_path / "run" / "clients").read(partition, before=3)
        family = FAMILIES[partition % 3]
        initial = model_state(setup.build_model(family))
        assert {"/".join(name.split("/")[:2]) for name in memory} == {f"{MODELS}{family}"}
        assert any(not torch.equal(memory[f"{MODELS}{family}/{name}"], value) for name, value in initial.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("codec=sharpened", "ensemble=row"), "codec=sharpened sends masses"),
        (("strategy.server.dtype=int8",), "strategy.server.dtype must be one of fp16, fp32, got 'int8'"),
        (
            (
                "+models.wide={_target_: fedssl.models.backbones.Conv4, width: 6}",
                "federation.server_families=[wide]",
                "federation.report_family=wide",
            ),
            "no client is of federation.report_family=wide",
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_strategy(Setup(small(None, "strategy=hetero_ssfl", *overrides)))


def test_the_clients_numbers_are_checked() -> None:
    codec = Setup(small(None, "strategy=hetero_ssfl")).client_half.codec
    with pytest.raises(ConfigError, match=r"strategy\.client\.mu must be at least 0, got -1"):
        HeteroSSFLClient(local_epochs=1, mu=-1, batch_size=8, codec=codec, embedding="projector")
    with pytest.raises(ConfigError, match=r"strategy\.client\.batch_size must be at least 2, got 1"):
        HeteroSSFLClient(local_epochs=1, mu=1, batch_size=1, codec=codec, embedding="projector")
