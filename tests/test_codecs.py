from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedssl.codecs import Codec, Dense, Factor, random_rotation
from fedssl.errors import ConfigError, PayloadError

CODECS = [codec(dtype=dtype) for codec in (Dense, Factor) for dtype in ("fp16", "fp32")]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}-{codec.dtype}")
N, D = 7, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(n: int = N, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed))


def exact(z: Tensor) -> Tensor:
    """S in double precision, written independently of the library."""
    z = z.double()
    return (z @ z.T) / (z.norm(dim=1)[:, None] * z.norm(dim=1))


def everything(codec: Codec, arrays: dict[str, np.ndarray], n: int) -> Tensor:
    return codec.decode(arrays, n).block(torch.arange(n), torch.arange(n))


@each_codec
@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.sampled_from([1, 2, 3, 16, 128, 512]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),  # around a common mean: from collapsed to uniform
    sparse=st.booleans(),
)
def test_no_entry_moves_by_more_than_the_bound(
    codec: Codec, n: int, d: int, seed: int, scale: float, spread: float, sparse: bool
) -> None:
    z = torch.ones(d) + spread * embeddings(n, d, seed)
    if sparse:  # few directions, exact zeros and ties
        z = torch.where(torch.rand(n, d, generator=generator(seed)) < 0.8, 0.0, z.round())
        z[:, 0] += (z == 0).all(dim=1)
    z = scale * z
    if (z.norm(dim=1) == 0).any():
        z = z + scale
    decoded = everything(codec, codec.encode(z, generator(seed + 1)), n)
    assert decoded.dtype == torch.float32
    assert (decoded - exact(z)).abs().amax() <= codec.bound
    assert (decoded.diagonal() - 1).abs().amax() <= 1e-6


@each_codec
def test_the_bound_is_not_idle(codec: Codec) -> None:
    """Within a factor of 20 of what happens: a bound of 1 would hold too and say nothing."""
    errors = [
        (everything(codec, codec.encode(z, generator()), 60) - exact(z)).abs().amax() for z in [embeddings(60, 2)]
    ]
    assert max(errors) > codec.bound / 20


def test_factor_sends_unit_rows_whose_gram_matrix_is_what_dense_sends() -> None:
    z = embeddings()
    factors = Factor(dtype="fp32").encode(z, generator())["factors"]
    matrix = Dense(dtype="fp32").encode(z, generator())["similarity"]
    np.testing.assert_allclose(np.linalg.norm(factors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(factors @ factors.T, matrix, atol=1e-6)


def test_the_rotation_hides_the_axes_and_comes_from_the_generator() -> None:
    codec = Factor(dtype="fp32")
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


@each_codec
def test_wire_size(codec: Codec) -> None:
    arrays = codec.encode(embeddings(), generator())
    itemsize = 2 if codec.dtype == "fp16" else 4  # type: ignore[attr-defined]
    assert sum(a.nbytes for a in arrays.values()) == N * (N if codec.name == "dense" else D) * itemsize


@each_codec
def test_read_only_arrays_decode(codec: Codec) -> None:
    arrays = {name: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for name, a in _payload(codec).items()}
    assert codec.decode(arrays, N).num_samples == N


@each_codec
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_embeddings_without_direction_are_not_sent(codec: Codec, bad: float) -> None:
    z = embeddings()
    z[2] = bad
    with pytest.raises(PayloadError, match=r"1 of 7 embeddings .* that of image 2"):
        codec.encode(z, generator())


def _payload(codec: Codec, seed: int = 0) -> dict[str, np.ndarray]:
    return codec.encode(embeddings(seed=seed), generator(seed))


def _change(codec: Codec, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    [(name, array)] = _payload(codec).items()
    return {name: change(array.copy())}


def _put(value: float, *where: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[where] = value
        return array

    return change


@each_codec
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.astype(np.float64), "must have dtype float"),
        (lambda a: a.view(np.int16 if a.itemsize == 2 else np.int32), "must have dtype float"),
        (lambda a: a.astype(a.dtype.newbyteorder()), "must have dtype float"),
        (lambda a: a[:-1], "must have shape"),
        (lambda a: a[None], "must have shape"),
        (lambda a: a.ravel(), "must have shape"),
        (_put(np.nan, 1, 2), "NaN or infinite"),
        (_put(-np.inf, 1, 2), "NaN or infinite"),
        (lambda a: a * a.dtype.type(1.01), "cosine is at most 1|rows of length 1"),
        (lambda a: a * a.dtype.type(0), "diagonal|rows of length 1"),
    ],
)
def test_refusals_name_the_reason(codec: Codec, change: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        codec.decode(_change(codec, change), N)


@each_codec
def test_refuses_missing_extra_and_renamed_arrays(codec: Codec) -> None:
    [(name, array)] = _payload(codec).items()
    for arrays in ({}, {name: array, "more": array}, {"other": array}):
        with pytest.raises(PayloadError, match=f"sends one array named '{name}'"):
            codec.decode(arrays, N)


@each_codec
def test_refuses_another_number_of_public_images(codec: Codec) -> None:
    with pytest.raises(PayloadError, match="for 8 public images, got"):
        codec.decode(_payload(codec), N + 1)


def test_dense_refuses_asymmetry_and_a_wrong_diagonal() -> None:
    codec = Dense(dtype="fp16")
    with pytest.raises(PayloadError, match="not symmetric"):
        codec.decode(_change(codec, _put(0.99, 0, 1)), N)
    with pytest.raises(PayloadError, match="diagonal entry"):
        codec.decode(_change(codec, _put(0.9, 3, 3)), N)


@st.composite
def mutations(draw: st.DrawFn, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A valid payload after one to three random changes of names, types, shapes, values or bytes."""
    arrays = dict(arrays)
    for _ in range(draw(st.integers(1, 3))):
        if not arrays:
            break
        name = draw(st.sampled_from(sorted(arrays)))
        array = arrays[name].copy()
        kind = draw(st.sampled_from(["drop", "rename", "extra", "dtype", "shape", "value", "bytes", "cut"]))
        if kind == "drop":
            del arrays[name]
        elif kind == "rename":
            arrays[draw(st.text(max_size=8))] = arrays.pop(name)
        elif kind == "extra":
            arrays[draw(st.text(max_size=8))] = array
        elif kind == "dtype":
            dtype = draw(st.sampled_from(["f2", "f4", "f8", "i8", "u1", "?", "c8", "S4", "O", "M8[s]", ">f4", ">f2"]))
            raw = np.zeros(array.shape, dtype)
            arrays[name] = raw
        elif kind == "shape":
            shapes = [(-1,), (1, *array.shape), (*array.shape, 1), array.shape[::-1], (array.size, 1)]
            arrays[name] = array.reshape(draw(st.sampled_from(shapes)))
        elif kind == "cut":
            rows, columns = draw(st.integers(0, N)), draw(st.integers(0, N))
            arrays[name] = array[:rows, :columns] if array.ndim == 2 else array[:rows]
        elif kind == "value" and array.size and array.dtype.kind == "f":
            value = draw(st.floats(width=16) if array.itemsize == 2 else st.floats(width=32))
            array.reshape(-1)[draw(st.integers(0, array.size - 1))] = value
            arrays[name] = array
        elif kind == "bytes" and array.size and array.dtype.kind == "f":
            raw_bytes = bytearray(array.tobytes())
            raw_bytes[draw(st.integers(0, len(raw_bytes) - 1))] = draw(st.integers(0, 255))
            arrays[name] = np.frombuffer(bytes(raw_bytes), array.dtype).reshape(array.shape)
    return arrays


@each_codec
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_whatever_arrives_decodes_to_cosines_or_is_refused(codec: Codec, data: st.DataObject) -> None:
    arrays = data.draw(mutations(_payload(codec)))
    try:
        decoded = everything(codec, arrays, N)
    except PayloadError:
        return
    assert decoded.abs().amax() <= 1
    assert (decoded.diagonal() - 1).abs().amax() <= 1e-6
    torch.testing.assert_close(decoded, decoded.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("codec", [Dense, Factor])
def test_an_unknown_dtype_is_a_config_error(codec: type[Dense] | type[Factor]) -> None:
    with pytest.raises(ConfigError, match=r"codec.dtype must be one of fp16, fp32, got 'int8'"):
        codec(dtype="int8")


@pytest.mark.parametrize("name", ["dense", "factor"])
def test_the_yaml_lists_every_field_and_names_the_codec(name: str) -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / f"conf/codec/{name}.yaml").read_text())
    target = {"fedssl.codecs.Dense": Dense, "fedssl.codecs.Factor": Factor}[config.pop("_target_")]
    assert target(**config).name == name
