"""Arrays on the wire, in numpy's own format, to the byte what Flower's `Array(ndarray)` writes and `numpy.load` reads.

A model has dozens of small arrays, and every client of every round sends the same shapes. So what their headers say is
worked out once a shape, and reading copies nothing; `numpy.load` parses each header anew, 0.1 ms an array.
"""

import io
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy

from fedssl.errors import PayloadError
from fedssl.federation import flower_compat

NUMPY = "numpy.ndarray"  # Flower's name for numpy's format
_HEADER_BYTES = 16_384  # numpy reads headers of up to 10,000 characters
_PARSERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Named arrays as a Flower record; each is copied once."""
    return flower_compat.array_record({name: _written(value) for name, value in arrays.items()})


def write_array(value: np.ndarray) -> Array:
    """The array as Flower sends it, equal to `Array(value)`."""
    return Array(*_written(value))


def _written(value: np.ndarray) -> tuple[str, tuple[int, ...], str, bytes]:
    if value.dtype.hasobject:
        raise ValueError(f"arrays of {value.dtype} cannot be sent: they hold Python objects")
    fortran_order = value.flags.f_contiguous and not value.flags.c_contiguous
    dtype, header = _header(value.dtype, value.shape, fortran_order)
    rows = value.T if fortran_order else np.ascontiguousarray(value)
    return dtype, value.shape, NUMPY, b"".join((header, rows.data))


def read_array(name: str, array: Array) -> np.ndarray:
    """The array that was sent, not copied and therefore read-only.

    Nothing is allocated for what a header claims: type and shape must account for the bytes that are there, to the
    last one. Types are booleans and real numbers, so no objects, whose reading would run the sender's code.

    Args:
        name: what an error calls it.
        array: from anybody; anything but a whole array in numpy's format is a `PayloadError`.
    """
    try:
        if array.stype != NUMPY:
            raise ValueError(f"its type is {array.stype!r}, not {NUMPY!r}")
        data = memoryview(array.data)
        shape, fortran_order, dtype, start = _parse(_head(data))
        if math.prod(shape) * dtype.itemsize != len(data) - start:
            raise ValueError(f"{len(data) - start} bytes of data cannot be {dtype}{shape}")
        return np.ndarray(shape, dtype, buffer=data, offset=start, order="F" if fortran_order else "C")
    except Exception as error:  # numpy's parser raises many kinds
        raise PayloadError(f"array {name!r} cannot be read: {error}") from error


def read_arrays(record: ArrayRecord) -> dict[str, np.ndarray]:
    """All of a record, by name; see `read_array`."""
    return {name: read_array(name, array) for name, array in record.items()}


@lru_cache(maxsize=64)
def dtype_name(dtype: np.dtype) -> str:
    """Flower's name of it; numpy works it out anew each time."""
    return str(dtype)


@lru_cache(maxsize=4096)
def _header(dtype: np.dtype, shape: tuple[int, ...], fortran_order: bool) -> tuple[str, bytes]:
    """Flower's name of the type, and the bytes before the data."""
    file = io.BytesIO()
    npy.write_array_header_1_0(
        file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": fortran_order, "shape": shape}
    )
    return dtype_name(dtype), file.getvalue()


def _head(data: memoryview) -> bytes:
    """The bytes before the data, by the length that they declare; the format is checked by `_parse`."""
    start = 12 if data[6] == 2 else 10  # magic, version, and the length in 4 or 2 bytes
    return bytes(data[: min(start + int.from_bytes(data[8:start], "little"), _HEADER_BYTES)])


@lru_cache(maxsize=4096)
def _parse(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, type and length of a header."""
    file = io.BytesIO(head)
    shape, fortran_order, dtype = _PARSERS[npy.read_magic(file)](file)
    if dtype.kind not in "biuf":
        raise ValueError(f"arrays of {dtype} are not accepted")
    if min(shape, default=0) < 0:
        raise ValueError(f"there is no shape {shape}")
    return shape, fortran_order, dtype, file.tell()
