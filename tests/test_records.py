"""What crosses the wire: it comes back as it was, is counted by hand, and a lie is refused with a reason."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fedssl.errors import PayloadError
from fedssl.federation.flower_compat import error_reply, identify_process, stamp
from fedssl.federation.records import (
    Header,
    Upload,
    family_arrays,
    family_state,
    family_values,
    load_state,
    model_state,
    num_bytes,
    to_arrays,
)
from fedssl.models import calibrate_batch_norm
from tests.federation_helpers import Tiny

identify_process()

HEADER = Header(round_num=3, partition_id=1, family="tiny", codec="factor", public_fingerprint="ab" * 32)


def upload(**changes: Any) -> Upload:
    values: dict[str, Any] = {
        "header": HEADER,
        "arrays": {"factors": np.eye(3, 2, dtype=np.float16)},
        "metrics": {"loss": 0.5, "num-examples": 7},
    }
    return Upload(**values | changes)


def message(content: RecordDict) -> Message:
    return Message(content, 1, "train")


# --- weights ---
@pytest.mark.parametrize("of_family", [family_state, family_values])
def test_states_come_back_bit_for_bit(of_family: Callable[[ArrayRecord, str], Any]) -> None:
    torch.manual_seed(0)
    models = {"tiny": Tiny(), "line": nn.Linear(3, 2)}
    models["tiny"](torch.randn(4, 3, 16, 16))  # moves the running averages
    arrays = to_arrays({family: model_state(model) for family, model in models.items()})
    for family, model in models.items():
        fresh = Tiny().to(memory_format=torch.channels_last) if family == "tiny" else nn.Linear(3, 2)
        load_state(fresh, of_family(arrays, family))
        assert all(torch.equal(value, model_state(model)[name]) for name, value in model_state(fresh).items())
    assert "norm.running_var" in model_state(models["tiny"])


def test_a_state_in_a_record_is_a_copy() -> None:
    """Otherwise training on would change what was broadcast."""
    model = nn.Linear(2, 2)
    arrays = to_arrays({"line": model_state(model)})
    before = arrays["line/weight"].numpy().copy()
    with torch.no_grad():
        model.weight.add_(1)
    family_state(arrays, "line")["weight"].add_(1)
    load_state(model, family_values(arrays, "line"))
    with torch.no_grad():
        model.weight.add_(1)
    np.testing.assert_array_equal(arrays["line/weight"].numpy(), before)


def test_a_family_is_not_mistaken_for_one_that_begins_alike() -> None:
    states = {"conv4": {"w": torch.zeros(1)}, "conv4_2": {"w": torch.ones(1)}}
    arrays = to_arrays(states)
    assert list(family_arrays(arrays, "conv4")) == ["conv4/w"]
    assert family_state(arrays, "conv4_2")["w"].item() == 1
    assert family_state(arrays, "resnet8") == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("bias"), r"differing entries \['bias'\]"),
        (lambda state: state.update(extra=torch.zeros(1)), r"differing entries \['extra'\]"),
        (lambda state: state.update(bias=torch.zeros(1)), r"'bias' has shape \(1,\), not \(2,\)"),
    ],
)
def test_weights_of_another_model_are_refused(change: Callable[[Any], Any], reason: str) -> None:
    """A bias of one entry would otherwise be broadcast over two."""
    model = nn.Linear(3, 2)
    state = dict(model_state(model))
    change(state)
    with pytest.raises(PayloadError, match=reason):
        load_state(model, state)


# --- uploads ---
@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.int64]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
    )
)
def test_an_upload_comes_back_as_it_was(value: np.ndarray) -> None:
    sent = upload(arrays={"a": value, "b": np.float32([1, 2])})
    received = Upload.from_message(message(sent.to_content()))
    assert received.header == sent.header
    assert received.metrics == sent.metrics
    assert list(received.arrays) == ["a", "b"]
    assert (received.arrays["a"].dtype, received.arrays["a"].shape) == (value.dtype, value.shape)
    assert received.arrays["a"].tobytes() == value.tobytes()


@pytest.mark.parametrize(
    ("field", "value"), [("round_num", "3"), ("round_num", 3.0), ("partition_id", None), ("family", 5), ("codec", b"")]
)
def test_a_header_field_of_another_type_is_refused(field: str, value: Any) -> None:
    record = HEADER.to_record()
    if value is None:
        del record[field]
    else:
        record[field] = value
    with pytest.raises(PayloadError, match=f"header field '{field}' should be .*, got {value!r}"):
        Header.from_record(record)


def _without(name: str) -> RecordDict:
    content = upload().to_content()
    del content[name]
    return content


def _with(**records: Any) -> RecordDict:
    return RecordDict({**upload().to_content(), **records})


def _array(dtype: str, shape: tuple[int, ...], data: bytes | None = None, stype: str = "numpy.ndarray") -> RecordDict:
    true = Array(np.zeros((2, 3), np.float32))
    return _with(arrays=ArrayRecord({"a": Array(dtype, shape, stype, true.data if data is None else data)}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_without("arrays"), "records arrays, metrics and header, got"),
        (_without("header"), "records arrays, metrics and header, got"),
        (_with(more=MetricRecord()), "records arrays, metrics and header, got"),
        (_with(header=MetricRecord()), "'header' should be of type ConfigRecord, got MetricRecord"),
        (_with(metrics=ConfigRecord()), "'metrics' should be of type MetricRecord, got ConfigRecord"),
        (_with(arrays=MetricRecord()), "'arrays' should be of type ArrayRecord, got MetricRecord"),
        (_array("float64", (2, 3)), r"declares float64\(2, 3\) but holds float32\(2, 3\)"),
        (_array("float32", (3, 2)), r"declares float32\(3, 2\) but holds float32\(2, 3\)"),
        (_array("poetry", (2, 3)), r"declares poetry\(2, 3\) but holds float32\(2, 3\)"),
        (_array("float32", (2, 3), b"not numpy's"), "array 'a' cannot be read"),
        (_array("float32", (2, 3), stype="torch.Tensor"), "array 'a' cannot be read"),
        (_array("object", (1,), Array(np.zeros(1)).data[:-3]), "array 'a' cannot be read"),
    ],
)
def test_what_is_no_upload_is_refused(content: RecordDict, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        Upload.from_message(message(content))


def test_pickled_objects_are_not_loaded() -> None:
    """An array of objects would run the sender's code."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(PayloadError, match="array 'a' cannot be read"):
        Upload.from_message(message(_array("object", (1,), buffer.getvalue())))


def test_metrics_that_are_no_numbers_are_left_out() -> None:
    content = _with(metrics=MetricRecord({"loss": 1, "curve": [1.0, 2.0]}))
    assert Upload.from_message(message(content)).metrics == {"loss": 1.0}


# --- bytes ---
def test_bytes_are_names_values_and_encoded_arrays() -> None:
    """Counted by hand: an array is numpy's own format, 128 bytes of header here."""
    content = upload().to_content()
    (array,) = content.array_records["arrays"].values()
    assert len(array.data) == 128 + 3 * 2 * 2
    array_bytes = len("factors") + len(array.data)
    metric_bytes = len("loss") + 8 + len("num-examples") + 8
    names = ("round_num", "partition_id", "family", "codec", "public_fingerprint")
    header_bytes = sum(map(len, names)) + 8 + 8 + len("tiny") + len("factor") + 64
    expected = len("arrays") + array_bytes + len("metrics") + metric_bytes + len("header") + header_bytes
    assert num_bytes(message(content)) == expected
    assert expected == sum(len(name) + record.count_bytes() for name, record in content.items())  # Flower agrees


def test_empty_values_of_a_stranger_are_counted_too() -> None:
    """Flower's own count raises for them, and a client must not end the run."""
    content = RecordDict({"h": ConfigRecord({"a": "", "b": [], "c": [True, False], "d": b"xy"})})
    assert num_bytes(message(content)) == 1 + 4 + 0 + 0 + 2 + 2


def test_an_error_weighs_nothing() -> None:
    sent = message(RecordDict())
    stamp(sent, "1")
    assert num_bytes(error_reply(sent, 2, "a long story")) == 0


def test_loaded_batch_norm_averages_are_kept_and_fresh_ones_are_not() -> None:
    """Counters do not travel: a layer with averages must not be calibrated again, one without must be."""
    x = torch.rand(8, 3, 4, 4) + 5
    trained, fresh, receiver = (nn.Sequential(nn.BatchNorm2d(3)) for _ in range(3))
    trained(x)
    load_state(receiver, model_state(trained))
    calibrate_batch_norm(receiver, x - 100)
    torch.testing.assert_close(receiver[0].running_mean, trained[0].running_mean)
    load_state(receiver, model_state(fresh))
    calibrate_batch_norm(receiver, x)
    torch.testing.assert_close(receiver[0].running_mean, x.mean(dim=(0, 2, 3)))
