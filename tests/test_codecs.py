import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedssl import codecs
from fedssl.codecs import Codec, Dense, Factor, Sharpened, TopK, Triangle, factor, random_rotation
from fedssl.codecs.base import softmax_bound
from fedssl.ensemble import Median, RowMean, SharpenedMean, WholeRowMean
from fedssl.errors import ConfigError, PayloadError

MB = 1_000_000
DTYPES = ("fp32", "fp16", "int8")
CODECS: list[Any] = [codec(dtype=dtype, max_bytes=MB) for codec in (Dense, Triangle, Factor) for dtype in DTYPES]
TOP: list[Any] = [
    TopK(dtype=dtype, k=k, percent=40.0, floor=floor, max_bytes=MB)
    for dtype in DTYPES
    for k, floor in ((2, 0.0), (None, -1.0))
]
SHARPENED: list[Any] = [
    Sharpened(rule=rule, temperature=0.1, num_anchors=5, dtype=dtype, max_bytes=MB)
    for rule in (SharpenedMean(), RowMean(), WholeRowMean())
    for dtype in DTYPES
]


def label(codec: Any) -> str:
    words = [codec.name, codec.dtype]
    if codec.name == "topk":
        words.append(f"k{codec.k}")
    if codec.name == "sharpened":
        words.append(type(codec.rule).__name__)
    return "-".join(words)


whole_codec = pytest.mark.parametrize("codec", CODECS, ids=label)  # of all entries of S
each_codec = pytest.mark.parametrize("codec", CODECS + TOP + SHARPENED, ids=label)
N, D = 7, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(n: int = N, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed))


def exact(z: Tensor) -> Tensor:
    """S in double precision, written independently of the library."""
    z = z.double()
    return ((z @ z.T) / (z.norm(dim=1)[:, None] * z.norm(dim=1))).clamp(-1, 1)


def everything(codec: Any, arrays: dict[str, np.ndarray], n: int) -> Tensor:
    return codec.decode(arrays, n).block(torch.arange(n), torch.arange(n))


@st.composite
def embedded(draw: st.DrawFn) -> Tensor:
    """Embeddings of few or many dimensions, huge and tiny, collapsed or spread, with ties and exact zeros."""
    n, d = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3, 16, 128, 512]))
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([1e-20, 1.0, 1e20]))
    z = torch.ones(d) + draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0])) * embeddings(n, d, seed)
    if draw(st.booleans()):
        z = torch.where(torch.rand(n, d, generator=generator(seed)) < 0.8, 0.0, z.round())
        z[:, 0] += (z == 0).all(dim=1)
    z = scale * z
    return z + scale if (z.norm(dim=1) == 0).any() else z


def total_variation(p: Tensor, q: Tensor) -> float:
    return (p - q).abs().sum(dim=1).amax().item() / 2


@whole_codec
@settings(max_examples=80, deadline=None)
@given(z=embedded(), seed=st.integers(0, 2**31))
def test_no_entry_and_no_target_moves_by_more_than_is_stated(codec: Any, z: Tensor, seed: int) -> None:
    n = len(z)
    decoded = everything(codec, codec.encode(z, generator(seed)), n)
    assert decoded.dtype == torch.float32
    assert (decoded - exact(z)).abs().amax() <= codec.bound
    assert (decoded.diagonal() - 1).abs().amax() <= 1e-6
    anchors = torch.randint(n, (max(2, n // 2),), generator=generator(seed))
    p, q = ((S.double()[:, anchors] / 0.1).softmax(dim=1) for S in (decoded, exact(z)))
    assert total_variation(p, q) <= codec.target_bound(0.1)


@whole_codec
def test_the_bound_is_not_idle(codec: Any) -> None:
    """Within a factor of 20 of what happens: a bound of 1 would hold too and say nothing."""
    z = embeddings(60, 2)
    assert (everything(codec, codec.encode(z, generator()), 60) - exact(z)).abs().amax() > codec.bound / 20


@pytest.mark.parametrize("error", [1e-3, 0.1, 1.0])
def test_the_target_bound_is_reached(error: float) -> None:
    """The worst case of the proof: logits of A rise by error / temperature, the others fall by as much."""
    r = error / 0.1
    before = 1 / (1 + math.exp(r))  # the probability of A
    after = before * math.exp(r) / (before * math.exp(r) + (1 - before) * math.exp(-r))
    assert after - before == pytest.approx(softmax_bound(error, 0.1), rel=1e-6)


@pytest.mark.parametrize("codec", TOP, ids=label)
@settings(max_examples=80, deadline=None)
@given(z=embedded())
def test_topk_sends_the_largest_cosines_of_each_row_within_its_bounds(codec: Any, z: Tensor) -> None:
    n, S = len(z), exact(z)
    arrays = codec.encode(z, generator())
    decoded, sent = everything(codec, arrays, n), torch.eye(n, dtype=torch.bool)
    assert (decoded - S).abs().amax() <= codec.bound
    k = codec.num_kept(n)
    for row in range(n):
        columns = arrays["indices"][row].astype(int).tolist()
        assert columns == sorted(set(columns) - {row})
        sent[row, columns] = True
        others = torch.cat([S[row, :row], S[row, row + 1 :]])
        if k:
            assert S[row, columns].amin() >= others.topk(k).values[-1] - 1e-6  # ties in fp32
    assert torch.where(sent, (decoded - S).abs(), 0).amax() <= codec.sent_bound
    assert (decoded[~sent] == codec.floor).all()
    p, q = ((M.double() / 0.1).softmax(dim=1) for M in (decoded, S))
    assert total_variation(p, q) <= codec.target_bound(0.1)


@pytest.mark.parametrize(
    ("k", "percent", "n", "kept"),
    [
        (20, 1.0, 1000, 20),
        (20, None, 10, 9),
        (None, 1.0, 1050, 10),
        (None, 1.0, 50, 1),
        (None, 100.0, 50, 49),
        (3, 1.0, 1, 0),
    ],
)
def test_topk_counts_entries_without_the_image_itself(k: int | None, percent: float | None, n: int, kept: int) -> None:
    assert TopK(dtype="fp16", k=k, percent=percent, floor=0.0, max_bytes=MB).num_kept(n) == kept


@pytest.mark.parametrize("codec", SHARPENED, ids=label)
@settings(max_examples=60, deadline=None)
@given(z=embedded())
def test_sharpened_sends_the_rule_s_masses_within_its_bounds(codec: Any, z: Tensor) -> None:
    S, m = exact(z), min(5, len(z))
    masses = codec.decode(codec.encode(z, generator()), len(z)).values.double()
    anchors = S[:, :m] / 0.1
    expected = {
        "SharpenedMean": (anchors - 10).exp(),
        "RowMean": anchors.softmax(dim=1),
        "WholeRowMean": (anchors - (S / 0.1).logsumexp(dim=1, keepdim=True)).exp(),
    }[type(codec.rule).__name__]
    assert (masses - expected).abs().amax() <= codec.bound
    if codec.target_bound(0.1) < 1:
        p, q = (M / M.sum(dim=1, keepdim=True) for M in (masses, expected))
        assert total_variation(p, q) <= codec.target_bound(0.1)


def test_sharpened_promises_a_target_only_where_it_can() -> None:
    bounds = {label(codec): codec.target_bound(0.1) for codec in SHARPENED}
    assert bounds["sharpened-fp32-SharpenedMean"] < 1e-4
    assert bounds["sharpened-fp16-RowMean"] < 1e-3
    assert bounds["sharpened-fp16-SharpenedMean"] == bounds["sharpened-int8-WholeRowMean"] == 1
    assert SHARPENED[0].target_bound(0.2) == 1  # sharpened at 0.1: another temperature is out of reach
    assert (
        Sharpened(rule=SharpenedMean(), temperature=0.02, num_anchors=5, dtype="fp32", max_bytes=MB).target_bound(0.02)
        == 1
    )  # e^-100 underflows


def test_sharpened_payloads_of_clients_add_up() -> None:
    """What secure summation computes on the integers is what the server would compute on each client's masses."""
    codec = Sharpened(rule=RowMean(), temperature=0.1, num_anchors=5, dtype="int8", max_bytes=MB)
    sent = [codec.encode(embeddings(seed=seed), generator()) for seed in range(3)]
    total = sum(arrays["masses"].astype(np.int32) for arrays in sent)
    alone = sum(codec.decode(arrays, N).values for arrays in sent)
    assert isinstance(alone, Tensor)
    np.testing.assert_allclose(np.asarray(total) / 127, alone.numpy(), atol=1e-6)


def test_sharpened_wants_a_rule_that_sums() -> None:
    with pytest.raises(
        ConfigError, match=r"codec=sharpened needs a rule that sums .* Median does not: use ensemble=none"
    ):
        Sharpened(rule=Median(), temperature=0.1, num_anchors=5, dtype="fp16", max_bytes=MB)


def test_factor_sends_unit_rows_whose_gram_matrix_is_what_dense_sends() -> None:
    z = embeddings()
    factors = Factor(dtype="fp32", max_bytes=MB).encode(z, generator())["factors"]
    matrix = Dense(dtype="fp32", max_bytes=MB).encode(z, generator())["similarity"]
    np.testing.assert_allclose(np.linalg.norm(factors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(factors @ factors.T, matrix, atol=1e-6)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", 1e-6), ("fp16", 5e-4), ("int8", 1e-2)])
def test_cosines_of_factors_are_usually_off_by_far_less_than_the_certain_bound(dtype: str, expected: float) -> None:
    centres = torch.randn(10, 128, generator=generator(1))
    z = centres.repeat(100, 1) + 0.3 * torch.randn(1000, 128, generator=generator(2))  # cosines from -0.3 to 0.95
    codec = Factor(dtype=dtype, max_bytes=MB)
    sent = everything(codec, codec.encode(z, generator(3)), 1000)
    assert (sent - exact(z)).abs().max() <= expected


def test_the_rotation_hides_the_axes_and_comes_from_the_generator() -> None:
    codec = Factor(dtype="fp32", max_bytes=MB)
    a, b, c = (codec.encode(embeddings(), generator(seed))["factors"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    assert np.abs(a - torch.nn.functional.normalize(embeddings()).numpy()).max() > 0.1


def test_a_rotation_is_orthogonal_and_uniform() -> None:
    """Uniform over O(2): each entry has mean 0, and both determinants occur equally often. QR alone fails this."""
    draws = torch.stack([random_rotation(2, generator(seed)) for seed in range(2000)])
    torch.testing.assert_close(draws @ draws.mT, torch.eye(2, dtype=torch.float64).expand(2000, 2, 2))
    assert draws.mean(dim=0).abs().amax() < 0.08  # standard deviation .016
    assert abs(float(torch.linalg.det(draws).mean())) < 0.1


def test_int8_rows_use_the_whole_range_and_are_drawn_again_until_they_keep_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row along an axis has one large entry, and the small ones round to nothing: the worst there is."""
    codec = Factor(dtype="int8", max_bytes=MB)
    z = torch.full((2, 512), 1e-2)
    z[:, 0] = 4.0
    z[1] *= -1
    assert (np.abs(codec.encode(z, generator())["factors"].astype(int)).max(axis=1) == 127).all()
    rotations = [torch.eye(512, dtype=torch.float64), random_rotation(512, generator(5))]
    monkeypatch.setattr(factor, "random_rotation", lambda dim, generator: rotations.pop(0))
    arrays = codec.encode(z, generator())
    assert not rotations
    assert (everything(codec, arrays, 2) - exact(z)).abs().amax() <= codec.bound
    monkeypatch.setattr(factor, "random_rotation", lambda dim, generator: torch.eye(512, dtype=torch.float64))
    with pytest.raises(PayloadError, match=r"after 10 rotations .* Set codec.dtype=fp16"):
        codec.encode(z, generator())


@each_codec
@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_bytes_are_those_of_the_arrays(codec: Any, n: int) -> None:
    arrays = codec.encode(embeddings(n), generator())
    assert sum(a.nbytes for a in arrays.values()) == codec.num_bytes(n, D)


def test_rows_in_several_blocks_decode_as_in_one() -> None:
    """300 rows are two blocks of 256 and 44."""
    z, rows, columns = embeddings(300), torch.tensor([0, 255, 256, 299]), torch.arange(300)
    for codec in CODECS:
        decoded = codec.decode(codec.encode(z, generator()), 300)
        assert (decoded.block(rows, columns) - exact(z)[rows]).abs().amax() <= codec.bound


def test_top_k_of_a_large_public_set_needs_wider_indices() -> None:
    codec = TopK(dtype="int8", k=2, percent=None, floor=0.0, max_bytes=MB)
    assert codec.num_bytes(65_536, 8) == 65_536 * 2 * (1 + 2)
    assert codec.num_bytes(65_537, 8) == 65_537 * 2 * (1 + 4)
    n = 65_537
    indices = np.zeros((n, 2), np.uint32) + np.array([n - 2, n - 1], np.uint32)
    indices[-2:] = 0, 1
    decoded = codec.decode({"values": np.full((n, 2), 64, np.int8), "indices": indices}, n)
    block = decoded.block(torch.tensor([0]), torch.tensor([0, 1, n - 2, n - 1]))
    torch.testing.assert_close(block, torch.tensor([[1, 0, 64 / 127, 64 / 127]]))


def test_what_would_not_fit_is_refused_with_the_size_and_an_alternative() -> None:
    dense = Dense(dtype="fp32", max_bytes=500 * MB)
    dense.check_size(10_000, 128)
    message = (
        r"codec=dense needs 10,000\.0 MB an upload for 50,000 public images with 128 dimensions; codec.max_bytes "
        r"allows 500\.0 MB: codec=factor codec.dtype=fp16 needs 12\.8 MB. Or lower public.size"
    )
    with pytest.raises(ConfigError, match=message):
        dense.check_size(50_000, 128)
    with pytest.raises(ConfigError, match=r"codec=topk codec.k=64 codec.dtype=fp16 needs 12\.8 MB"):
        dense.check_size(50_000, 2048)
    with pytest.raises(ConfigError, match=r"codec.max_bytes allows 100 bytes: lower public.size or raise"):
        Factor(dtype="fp16", max_bytes=100).check_size(100, 4)
    with pytest.raises(ConfigError, match=r"allows 1\.0 MB: lower public.size or raise"):  # 12.8 MB is too much, too
        Dense(dtype="fp32", max_bytes=MB).check_size(50_000, 128)


@each_codec
def test_read_only_arrays_decode(codec: Codec) -> None:
    arrays = {name: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for name, a in _payload(codec).items()}
    assert codec.decode(arrays, N).num_samples == N


@each_codec
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_embeddings_without_direction_are_not_sent(codec: Any, bad: float) -> None:
    z = embeddings()
    z[2] = bad
    with pytest.raises(PayloadError, match=r"1 of 7 embeddings .* that of image 2"):
        codec.encode(z, generator())


def _payload(codec: Any, seed: int = 0) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = codec.encode(embeddings(seed=seed), generator(seed))
    return arrays


def _change(codec: Any, change: Callable[[np.ndarray], np.ndarray], name: str | None = None) -> dict[str, np.ndarray]:
    """A valid payload but for one array, the first unless it is named."""
    arrays = _payload(codec)
    name = name or next(iter(arrays))
    return arrays | {name: change(arrays[name].copy())}


def _put(value: float, *where: int | slice) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[where] = value
        return array

    return change


@each_codec
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.astype(np.float64), "must have dtype"),
        (lambda a: a.view(f"u{a.itemsize}"), "must have dtype"),
        (lambda a: a[:-1], r"must have shape .* for 7 public images, got"),
        (lambda a: a[None], "must have shape"),
        (lambda a: a.reshape(-1, 1), "must have shape|rows of"),
    ],
)
def test_wrong_types_and_shapes_are_refused(
    codec: Any, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    with pytest.raises(PayloadError, match=message):
        codec.decode(_change(codec, change), N)


@pytest.mark.parametrize("codec", [c for c in CODECS + TOP + SHARPENED if c.dtype != "int8"], ids=label)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_none_are_refused(codec: Any, value: float) -> None:
    with pytest.raises(PayloadError, match="NaN or infinite"):
        codec.decode(_change(codec, _put(value, 1)), N)
    swapped = _change(codec, lambda a: a.astype(a.dtype.newbyteorder()))
    with pytest.raises(PayloadError, match="must have dtype float"):
        codec.decode(swapped, N)


@each_codec
def test_numbers_beyond_the_bound_are_refused(codec: Any) -> None:
    beyond = -128 if codec.dtype == "int8" else -1.01
    reason = {
        "factor": "rows of (length 1|a largest entry of 127)",
        "sharpened": "a mass is at least 0",
    }.get(codec.name, "a cosine is at most 1")
    with pytest.raises(PayloadError, match=reason):
        codec.decode(_change(codec, _put(beyond, 1)), N)


@pytest.mark.parametrize("codec", CODECS[:3] + CODECS[6:], ids=label)
def test_rows_without_direction_are_refused(codec: Any) -> None:
    with pytest.raises(PayloadError, match=r"diagonal entry|rows of (length 1|a largest entry of 127)"):
        codec.decode(_change(codec, _put(0, 1)), N)


@each_codec
def test_refuses_missing_extra_and_renamed_arrays(codec: Any) -> None:
    arrays = _payload(codec)
    first, *_ = arrays
    renamed = {("other" if name == first else name): array for name, array in arrays.items()}
    for wrong in ({}, arrays | {"more": arrays[first]}, renamed):
        with pytest.raises(PayloadError, match=f"codec {codec.name} sends .*'{first}'.*, got"):
            codec.decode(wrong, N)


@each_codec
def test_refuses_another_number_of_public_images(codec: Any) -> None:
    with pytest.raises(PayloadError, match="for 8 public images, got"):
        codec.decode(_payload(codec), N + 1)


def test_refuses_more_than_max_bytes() -> None:
    wide = {"factors": np.ones((N, 1000), np.float32)}
    with pytest.raises(PayloadError, match=r"hold 28,000 bytes, codec.max_bytes allows 20,000"):
        Factor(dtype="fp32", max_bytes=20_000).decode(wide, N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_refuses_asymmetry_and_a_wrong_diagonal(dtype: str) -> None:
    codec = Dense(dtype=dtype, max_bytes=MB)
    one = 127 if dtype == "int8" else 1
    with pytest.raises(PayloadError, match="not symmetric"):
        codec.decode(_change(codec, _put(0.99 * one, 0, 1)), N)
    with pytest.raises(PayloadError, match=r"diagonal entry"):
        codec.decode(_change(codec, _put(0.9 * one, 3, 3)), N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ((1, 7), "must lie between 0 and 6"),
        ((1, 65_535), "must lie between 0 and 6"),
        ((2, 1), "ascend within each row, without repeats"),
        ((3, 3), "ascend within each row, without repeats"),
        ((0, 3), "must not hold a row's own image"),
    ],
)
def test_topk_refuses_columns_that_are_none(dtype: str, columns: tuple[int, int], reason: str) -> None:
    codec = TopK(dtype=dtype, k=2, percent=None, floor=0.0, max_bytes=MB)

    def change(indices: np.ndarray) -> np.ndarray:
        indices[0] = columns
        return indices

    with pytest.raises(PayloadError, match=reason):
        codec.decode(_change(codec, change, "indices"), N)


def test_sharpened_refuses_rows_without_the_mass_that_the_rule_promises() -> None:
    codec = Sharpened(rule=RowMean(), temperature=0.1, num_anchors=5, dtype="fp16", max_bytes=MB)
    for value in (0.0, 1.0):
        with pytest.raises(PayloadError, match=r"the masses of row 3 sum to .*; RowMean makes them sum to 1"):
            codec.decode(_change(codec, _put(value, 3, slice(None))), N)
    with pytest.raises(PayloadError, match=r"a mass is at most 1"):
        codec.decode(_change(codec, _put(1.1, 3, 0)), N)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dense(dtype="int4", max_bytes=1), r"codec.dtype must be one of fp32, fp16, int8, got 'int4'"),
        (lambda: Factor(dtype="int8", max_bytes=0), r"codec.max_bytes must be at least 1, got 0"),
        (lambda: _topk(k=None, percent=None), r"needs codec.k .* or codec.percent, both are null"),
        (lambda: _topk(k=0), r"codec.k must be at least 1, got 0"),
        (lambda: _topk(percent=0.0), r"codec.percent must be above 0 and at most 100, got 0.0"),
        (lambda: _topk(floor=-1.5), r"codec.floor must be a cosine between -1 and 1, got -1.5"),
    ],
)
def test_wrong_settings_are_config_errors(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def _topk(**changes: Any) -> TopK:
    return TopK(**{"dtype": "fp16", "k": None, "percent": 1.0, "floor": 0.0, "max_bytes": MB} | changes)


@pytest.mark.parametrize("name", ["dense", "triangle", "topk", "factor", "sharpened"])
def test_the_yaml_lists_every_field_and_names_the_codec(name: str) -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / f"conf/codec/{name}.yaml").read_text())
    target: Any = getattr(codecs, config.pop("_target_").removeprefix("fedssl.codecs."))
    if name == "sharpened":
        assert config.pop("defaults") == [{"override /ensemble@_global_.ensemble": "row"}, "_self_"]
        assert (config["rule"], config["temperature"]) == ("${ensemble}", "${distill.target_temperature}")
        config |= {"rule": RowMean(), "temperature": 0.1}
    assert target(**config).name == name
    assert isinstance(target(**config), Codec)


def test_a_factor_of_absurd_width_is_refused() -> None:
    """It would fit `max_bytes`, and every step of the server would pay for it."""
    codec = Factor(dtype="fp16", max_bytes=10**9)
    factors = np.zeros((4, 8193), np.float16)
    factors[:, 0] = 1
    with pytest.raises(PayloadError, match="'factors' has 8193 dimensions, more than 8192 say nothing new"):
        codec.decode({"factors": factors}, 4)
    assert codec.decode({"factors": factors[:, :8192]}, 4).num_samples == 4
