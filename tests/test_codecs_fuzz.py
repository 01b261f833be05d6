"""10,000 damaged payloads a codec, through the whole way from a message: refused with a reason, or decoded soundly."""

import io
from collections.abc import Callable, Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fedssl.codecs import Codec, Dense, Factor, Sharpened, TopK, Triangle
from fedssl.ensemble import RowMean, SharpenedMean
from fedssl.errors import PayloadError
from fedssl.federation.flower_compat import identify_process
from fedssl.federation.records import Header, Upload
from fedssl.similarity import AnchorMass

identify_process()

N, D = 9, 5
PAYLOADS = 10_000  # a codec, over its dtypes
DTYPES = ("fp32", "fp16", "int8")
LIMIT = 10_000  # bytes
CODECS: dict[str, Callable[[str], Codec]] = {
    "dense": lambda dtype: Dense(dtype=dtype, max_bytes=LIMIT),
    "triangle": lambda dtype: Triangle(dtype=dtype, max_bytes=LIMIT),
    "topk": lambda dtype: TopK(dtype=dtype, k=3, percent=None, floor=-0.5, max_bytes=LIMIT),
    "factor": lambda dtype: Factor(dtype=dtype, max_bytes=LIMIT),
    "sharpened": lambda dtype: Sharpened(
        rule=RowMean() if dtype == "fp32" else SharpenedMean(),
        temperature=0.1,
        num_anchors=4,
        dtype=dtype,
        max_bytes=LIMIT,
    ),
}
WHERE = torch.arange(N)
HEADER = Header(round_num=1, partition_id=0, family="tiny", codec="any", public_fingerprint="").to_record()
OTHER_DTYPES = (
    "f2",
    "f4",
    "f8",
    ">f4",
    ">f2",
    "i1",
    "u1",
    "u2",
    "i4",
    "u4",
    "i8",
    "?",
    "c8",
    "S3",
    "U2",
    "M8[s]",
    "V4",
)
SPECIAL = (np.nan, np.inf, -np.inf, 2.0, -2.0, 1.001, -1.001, 1e-45, 6.0e4, -1e-8, 0.0, 1.0)
INTEGERS = (-128, 127, -127, 0, 1, 8, 9, 255, 65_535, 2**31, 2**32 - 1)


class Damage:
    """Random damage to the arrays of a payload and to their encoding."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def choose(self, options: tuple[object, ...]) -> object:
        return options[self.random.integers(len(options))]

    def values(self, array: np.ndarray) -> np.ndarray:
        """One to three entries, or a whole row, become something else."""
        if not array.size or array.dtype.kind not in "fiu":
            return array
        array = array.copy()
        flat = array.reshape(-1)
        for _ in range(self.random.integers(1, 4)):
            value = self.choose(SPECIAL if array.dtype.kind == "f" else INTEGERS)
            at = self.random.integers(array.size)
            with np.errstate(over="ignore"):
                value = np.array(value).astype(array.dtype)
            if self.random.random() < 0.2:
                array[at % len(array)] = value
            elif self.random.random() < 0.3:
                flat[at] = flat[self.random.integers(array.size)]
            else:
                flat[at] = value
        return array

    def layout(self, array: np.ndarray) -> np.ndarray:
        """Another type, shape or order."""
        kind = self.random.integers(5)
        if kind == 0:
            return np.zeros(array.shape, str(self.choose(OTHER_DTYPES)))
        if kind == 1:
            shapes = ((-1,), (1, *array.shape), (*array.shape, 1), array.shape[::-1], (array.size, 1))
            return array.reshape(self.choose(shapes))  # type: ignore[arg-type]
        if kind == 2:
            return array[: self.random.integers(len(array) + 1)]
        if kind == 3:
            return array[..., : self.random.integers(array.shape[-1] + 1)]
        return np.asfortranarray(array)

    def encoded(self, data: bytes) -> bytes:
        """Bytes flipped, cut off, or added; in the header or in the data."""
        raw, kind = bytearray(data), self.random.integers(4)
        if kind == 0:
            del raw[self.random.integers(len(raw)) :]
        elif kind == 1:
            raw += self.random.bytes(self.random.integers(1, 20))
        elif kind == 2:
            raw[self.random.integers(min(len(raw), 90))] = self.random.integers(256)  # the header's text is here
        else:
            for _ in range(self.random.integers(1, 9)):
                raw[self.random.integers(len(raw))] = self.random.integers(256)
        return bytes(raw)

    def lie(self, data: bytes) -> bytes:
        """A header of numpy's format that promises something else."""
        buffer = io.BytesIO()
        shape = self.choose(((10**12,), (2**62, 4), (-1, N), (0, 10**30), (N, D + 1), (10**5, 10**5), (True,), ()))
        descr = self.choose(("<f2", "<f4", "|i1", "<f8", "|O", "|S0", "|V0", [("a", "<f4")], "nonsense", 7))
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": descr, "fortran_order": bool(self.random.integers(2)), "shape": shape}
        )
        return buffer.getvalue() + data[128:]

    def __call__(self, arrays: dict[str, np.ndarray], encoded: dict[str, Array]) -> dict[str, Array]:
        """The arrays of a message after one of six kinds of damage; `encoded` is what an honest client sends."""
        encoded = dict(encoded)
        name = str(self.choose(tuple(arrays)))
        own, kind = encoded[name], self.random.random()
        if kind < 0.4:
            encoded[name] = Array(self.values(arrays[name]))
        elif kind < 0.5:
            encoded[name] = Array(self.layout(arrays[name]))
        elif kind < 0.55:
            encoded[str(self.choose(("", "more", "Values", name + "\0")))] = own
            if self.random.random() < 0.7:
                del encoded[name]
        elif kind < 0.85:
            encoded[name] = Array(own.dtype, own.shape, own.stype, self.encoded(own.data))
        elif kind < 0.95:
            encoded[name] = Array(own.dtype, own.shape, own.stype, self.lie(own.data))
        else:
            lies: tuple[object, ...] = (
                ("poetry", own.shape, own.stype),
                (own.dtype, (N, 10**9), own.stype),
                (own.dtype, own.shape, "pickle"),
            )
            encoded[name] = Array(*self.choose(lies), own.data)  # type: ignore[call-overload,misc]
        return encoded


@pytest.fixture
def _as_in_production() -> Iterator[None]:
    """Without jaxtyping's checks of shapes at run time, which only tests have and which take half of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_as_in_production")
@pytest.mark.parametrize("name", CODECS)
def test_damaged_payloads_are_refused_or_decode_soundly(name: str) -> None:
    torch.set_num_threads(1)
    embeddings = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    codecs = [CODECS[name](dtype) for dtype in DTYPES]
    payloads = [codec.encode(embeddings, torch.Generator().manual_seed(0)) for codec in codecs]
    encoded = [{key: Array(array) for key, array in payload.items()} for payload in payloads]
    content = RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord(), "header": HEADER})
    message = Message(content, 1, "train")
    damage, refused = Damage(seed=0), 0
    for number in range(PAYLOADS):
        codec, which = codecs[number % 3], number % 3
        arrays = ArrayRecord()
        for key, array in damage(payloads[which], encoded[which]).items():
            arrays[key] = array
        message.content["arrays"] = arrays
        try:
            decoded = codec.decode(Upload.from_message(message).arrays, N)
        except PayloadError:
            refused += 1
            continue
        if isinstance(decoded, AnchorMass):
            assert decoded.values.shape == (N, 4)
            assert decoded.values.amin() >= 0
            assert decoded.values.amax() <= 1
        else:
            block = decoded.block(WHERE, WHERE)
            assert block.shape == (N, N)
            assert block.abs().amax() <= 1
            assert (block.diagonal() - 1).abs().amax() <= 1e-6
            assert all(map(np.isfinite, decoded.sums()))
    assert 0.4 * PAYLOADS < refused < 0.99 * PAYLOADS  # most damage shows, and some decodes
