"""Arrays on the wire: the bytes that Flower writes, and what numpy reads from them."""

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedssl.errors import PayloadError
from fedssl.federation.arrays import NUMPY, read_array, to_record, write_array

DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.uint8, np.int64, np.bool_, np.dtype(">f4")])
LAYOUTS = {
    "as it is": lambda value: value,
    "transposed": lambda value: value.T,
    "every other": lambda value: value[..., ::2] if value.ndim else value,
    "fortran": np.asfortranarray,
}


@given(
    hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
    st.sampled_from(sorted(LAYOUTS)),
)
def test_an_array_travels_as_flower_and_numpy_know_it(value: np.ndarray, layout: str) -> None:
    value = LAYOUTS[layout](value)
    written = write_array(value)
    assert written == Array(value)
    received = read_array("w", written)
    np.testing.assert_array_equal(received, written.numpy(), strict=True)
    assert received.dtype == value.dtype
    assert not received.flags.writeable


def test_a_second_array_of_a_shape_has_its_own_values() -> None:
    first, second = (write_array(np.full((2, 3), value, np.float32)) for value in (1, 2))
    assert read_array("w", first).sum() == 6
    assert read_array("w", second).sum() == 12


def test_reading_does_not_copy() -> None:
    written = write_array(np.zeros(1000))
    assert np.shares_memory(read_array("w", written), np.frombuffer(written.data, np.uint8))


def test_a_record_keeps_names_and_order() -> None:
    record = to_record({"b": np.zeros(2), "a": np.ones(1)})
    assert list(record) == ["b", "a"]
    assert record["a"] == Array(np.ones(1))
    assert vars(record["a"]) == vars(Array(np.ones(1)))  # Flower's own notes, too


def test_objects_are_not_sent() -> None:
    with pytest.raises(ValueError, match="hold Python objects"):
        write_array(np.array([{}]))


WHOLE = write_array(np.arange(6, dtype=np.float32).reshape(2, 3)).data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "index out of bounds"),
        (WHOLE[:7], "index out of bounds|magic"),
        (WHOLE[:40], "EOF"),
        (WHOLE[:-1], "23 bytes of data cannot be"),
        (WHOLE + b"\0", "25 bytes of data cannot be"),
        (b"\x93NUMPZ" + WHOLE[6:], "magic"),
        (WHOLE[:6] + b"\x03" + WHOLE[7:], "3, 0"),
        (WHOLE[:6] + b"\x02" + WHOLE[7:], "."),
        (WHOLE.replace(b"(2, 3)", b"(9, 9)"), "24 bytes of data cannot be"),
        (WHOLE.replace(b"(2, 3)", b"(-2,-3)", 1).replace(b" \n", b"\n", 1), "there is no shape"),
        (WHOLE.replace(b"'<f4'", b"'|O4'"), "."),
        (WHOLE.replace(b"'<f4'", b"'<M8'"), "are not accepted"),
    ],
)
def test_what_is_no_array_is_refused_by_name(data: bytes, message: str) -> None:
    for _ in range(2):  # a header that was refused once is refused again
        with pytest.raises(PayloadError, match=f"array 'w' cannot be read: .*({message})"):
            read_array("w", Array("float32", (2, 3), NUMPY, data))


def test_another_format_is_refused() -> None:
    with pytest.raises(PayloadError, match="its type is 'tensor'"):
        read_array("w", Array("float32", (2, 3), "tensor", WHOLE))
