"""What every codec is and what they share: types, unit rows, bounds, sizes, the first checks of a payload."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from fedssl.errors import ConfigError, PayloadError
from fedssl.similarity import INT8_ONE, AnchorMass, Similarity, row_blocks, to_float, unit_rows

DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
FP32_ERROR = 1e-6  # of a cosine that fp32 arithmetic computed


@runtime_checkable
class Codec(Protocol):
    """One wire format. The choices live in conf/codec/."""

    @property
    def name(self) -> str:
        """As in `codec=<name>`; travels in the header of every upload."""

    @property
    def bound(self) -> float:
        """The largest error that encoding and decoding may add to an entry of S."""

    def target_bound(self, temperature: float) -> float:
        """The largest total variation distance that encoding may add to a row of one client's target.

        That row is softmax(S[i, anchors] / temperature), whichever the anchors.
        """

    def encode(self, embeddings: Float[Tensor, "n d"], generator: torch.Generator) -> dict[str, np.ndarray]:
        """The arrays to upload. Raises PayloadError for embeddings without a direction (NaN, infinite or zero)."""

    def decode(self, arrays: Mapping[str, np.ndarray], num_samples: int) -> Similarity | AnchorMass:
        """What they say about the `num_samples` public images. Raises PayloadError for anything else."""

    def num_bytes(self, n: int, d: int) -> int:
        """Bytes of the arrays of one upload about n public images with embeddings of d dimensions."""

    def check_size(self, n: int, d: int) -> None:
        """Raise ConfigError where an upload would have more than `max_bytes`."""


# --- what the codecs state ---------------------------------------------------------------------------------------
def cosine_bound(dtype: str) -> float:
    """The error of a cosine that is computed in fp32, sent as `dtype` and read again.

    Rounding adds at most 2^-12 in fp16 to a number in [-1, 1] and half a step of 1/127 in int8; fp32 arithmetic
    stays below 1e-6, of which rounding to fp32 is a small part.
    """
    return {"fp32": 0.0, "fp16": 2.0**-12, "int8": 0.5 / INT8_ONE}[dtype] + FP32_ERROR


def softmax_bound(error: float, temperature: float) -> float:
    """tanh(error / (2 temperature)): how far softmax(s / temperature) moves, in total variation, if no s moves further.

    Logits move by at most r = error / temperature. Take any set of anchors A with probability x: its mass grows by at
    most e^r and that of the rest shrinks by at most e^-r, so A gains at most x e^2r / (x e^2r + 1 - x) - x. That is
    largest at x = 1 / (1 + e^r), where it is (e^r - 1) / (e^r + 1) = tanh(r / 2).
    """
    return math.tanh(error / (2 * temperature))


# --- what the codecs check about themselves ----------------------------------------------------------------------
def check_fields(dtype: str, max_bytes: int) -> None:
    """Raise ConfigError for an unknown `codec.dtype` or a `codec.max_bytes` below 1."""
    if dtype not in DTYPES:
        raise ConfigError(f"codec.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}. Set it in conf/codec/.")
    if max_bytes < 1:
        raise ConfigError(f"codec.max_bytes must be at least 1, got {max_bytes}. Set it in conf/codec/.")


def index_dtype(n: int) -> np.dtype[Any]:
    """The type of column indices of an n x n matrix: uint16 where it suffices, else uint32."""
    return np.dtype(np.uint16 if n <= 2**16 else np.uint32)


def check_size(codec: Codec, max_bytes: int, n: int, d: int) -> None:
    """See `Codec.check_size`. Names the smaller of `factor` and `topk` with 64 entries a row, both as fp16."""
    size = codec.num_bytes(n, d)
    if size <= max_bytes:
        return
    others = {
        "codec=factor codec.dtype=fp16": n * d * DTYPES["fp16"].itemsize,
        "codec=topk codec.k=64 codec.dtype=fp16": n * 64 * (DTYPES["fp16"].itemsize + index_dtype(n).itemsize),
    }
    smallest = min(others, key=lambda name: others[name])
    advice = "lower public.size or raise codec.max_bytes"
    if others[smallest] <= max_bytes:
        advice = f"{smallest} needs {_size(others[smallest])}. Or {advice}"
    raise ConfigError(
        f"codec={codec.name} needs {_size(size)} an upload for {n:,} public images with {d} dimensions; "
        f"codec.max_bytes allows {_size(max_bytes)}: {advice}."
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"


# --- encoding ----------------------------------------------------------------------------------------------------
def check_directions(embeddings: Float[Tensor, "n d"]) -> None:
    """Raise PayloadError for rows without a direction."""
    bad = torch.cat([_without_direction(embeddings[rows]) for rows in row_blocks(len(embeddings))])
    if bad.any():
        raise PayloadError(
            f"{int(bad.sum())} of {len(bad)} embeddings of the public set have no direction (NaN, infinite or all "
            f"zero), the first is that of image {int(bad.nonzero()[0])}: the local training diverged or the network "
            f"collapsed. Lower client.optimisation.lr."
        )


def _without_direction(embeddings: Float[Tensor, "b d"]) -> Tensor:
    norms = torch.linalg.vector_norm(exact_rows(embeddings), dim=1)
    bad: Tensor = (norms - 1).abs().nan_to_num(nan=1.0) > 0.5
    return bad


def exact_rows(embeddings: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Unit rows in fp64 on the CPU."""
    return unit_rows(embeddings.detach().cpu().double())


def directions(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Unit rows in fp32 on the CPU, rounded from fp64: what codecs of cosines start from."""
    check_directions(embeddings)
    z = torch.empty(embeddings.shape)
    for rows in row_blocks(len(z)):
        z[rows] = exact_rows(embeddings[rows]).float()
    return z


def quantise(values: Float[Tensor, "..."], dtype: str) -> Num[Tensor, "..."]:
    """Numbers in [-1, 1] in the wire's type; int8 is 127 times the number, rounded."""
    if dtype == "int8":
        return (values * INT8_ONE).round_().to(torch.int8)
    return values.to(torch.float16 if dtype == "fp16" else torch.float32)


def one(dtype: torch.dtype) -> int:
    """What stands for a cosine of 1."""
    return INT8_ONE if dtype == torch.int8 else 1


# --- decoding ----------------------------------------------------------------------------------------------------
def read(
    codec: str,
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]],
    num_samples: int,
    max_bytes: int,
) -> list[Num[Tensor, "..."]]:
    """Copies of the arrays `expected` (dtype, and shape with None for any) as tensors, in that order and as sent.

    uint16 and uint32 come as int16 and int32 of the same bits, the types that torch computes with. Copies, because
    what arrives may be read-only, mapped, unaligned or in Fortran's order.
    """
    if set(arrays) != set(expected):
        raise PayloadError(f"codec {codec} sends {_names(expected)}, got {sorted(map(str, arrays))}")
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype != dtype:
            raise PayloadError(f"{name!r} must have dtype {dtype} (see codec.dtype), got {array.dtype}")
        if array.ndim != len(shape) or any(
            want not in (None, got) for want, got in zip(shape, array.shape, strict=True)
        ):
            wanted = (
                "(" + ", ".join("*" if size is None else str(size) for size in shape) + ("," * (len(shape) == 1)) + ")"
            )
            raise PayloadError(f"{name!r} must have shape {wanted} for {num_samples} public images, got {array.shape}")
    size = sum(array.nbytes for array in arrays.values())
    if size > max_bytes:
        raise PayloadError(f"the arrays of codec {codec} hold {size:,} bytes, codec.max_bytes allows {max_bytes:,}")
    tensors = []
    for name, (dtype, _) in expected.items():
        copy = np.array(arrays[name], order="C")
        if dtype.kind == "u":
            copy = copy.view(f"i{dtype.itemsize}")
        tensor = torch.from_numpy(copy)
        if dtype.kind == "f" and not all(part.isfinite().all() for part in parts(tensor)):
            raise PayloadError(f"{name!r} holds NaN or infinite values")
        tensors.append(tensor)
    return tensors


def _names(expected: Mapping[str, object]) -> str:
    names = sorted(expected)
    return f"one array named {names[0]!r}" if len(names) == 1 else f"the arrays {names}"


def parts(values: Num[Tensor, "..."]) -> list[Num[Tensor, "..."]]:
    """The rows of `values` in blocks (of a vector: a million entries at a time), sharing its memory."""
    if values.ndim == 1:
        return list(torch.split(values, 2**20))
    return [values[rows] for rows in row_blocks(len(values))]


def clamp_cosines(name: str, values: Num[Tensor, "..."], bound: float) -> None:
    """Clamp to [-1, 1] in place, and raise PayloadError where rounding cannot explain what lies beyond."""
    for part in parts(values):
        largest = to_float(part).abs().amax().item() if part.numel() else 0.0
        if largest > 1 + bound:
            raise PayloadError(f"{name!r} holds {largest:.6g}; a cosine is at most 1 (+{bound:g} for rounding)")
        part.clamp_(-one(values.dtype), one(values.dtype))
