"""What crosses the wire: named arrays, a header, metrics. Explicit records, no pickle.

Down: ``{"arrays": ArrayRecord, "config": ConfigRecord}``, the record names of Flower's stock strategies.
Up:   ``{"arrays": ArrayRecord, "metrics": MetricRecord, "header": ConfigRecord}``.

Weights travel as ``<family>/<parameter>``, so that one record can hold the models of several architecture families.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fedssl.errors import PayloadError
from fedssl.federation.arrays import dtype_name, read_array, to_record
from fedssl.federation.flower_compat import noted_sum
from fedssl.models import recount_batches


# --- weights -----------------------------------------------------------------------------------------------------
def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that define the model: floats only (batch norm's batch counter defines nothing)."""
    return {name: value.detach() for name, value in model.state_dict().items() if value.is_floating_point()}


def load_state(model: nn.Module, state: Mapping[str, Tensor] | Mapping[str, np.ndarray]) -> None:
    """Load what `model_state` or `family_values` returned; an entry that is missing, unknown or misshapen is a
    `PayloadError`.
    """
    own = model_state(model)
    if own.keys() != state.keys():
        raise PayloadError(f"weights do not fit the model: differing entries {sorted(own.keys() ^ state.keys())[:4]}")
    with torch.no_grad():
        for name, value in own.items():
            given = state[name]
            if value.shape != given.shape:
                raise PayloadError(f"weight {name!r} has shape {tuple(given.shape)}, not {tuple(value.shape)}")
            if isinstance(given, Tensor):
                value.copy_(given)
            elif value.device.type == "cpu":
                np.copyto(value.numpy(), given)
            else:
                value.copy_(torch.from_numpy(given.copy()))  # torch wants no read-only arrays
    recount_batches(model)


def to_arrays(states: Mapping[str, Mapping[str, Tensor]]) -> ArrayRecord:
    """States of several families, by family name, as one record."""
    return to_record(
        {
            f"{family}/{name}": value.detach().cpu().numpy()
            for family, state in states.items()
            for name, value in state.items()
        }
    )


def family_arrays(arrays: ArrayRecord, family: str) -> ArrayRecord:
    """The part of `arrays` that belongs to `family`, names unchanged, data shared."""
    part = ArrayRecord()
    for name, array in arrays.items():
        if name.startswith(f"{family}/"):
            part[name] = array  # the constructor would copy, and refuse data that a worker maps
    return part


def family_state(arrays: ArrayRecord, family: str) -> dict[str, Tensor]:
    """The tensors of `family` in `arrays`, by parameter name; empty if the record holds none."""
    return {name: torch.from_numpy(value.copy()) for name, value in family_values(arrays, family).items()}


def family_values(arrays: ArrayRecord, family: str) -> dict[str, np.ndarray]:
    """The arrays of `family` by parameter name, not copied and therefore read-only."""
    prefix = f"{family}/"
    return {
        name.removeprefix(prefix): read_array(name, array) for name, array in arrays.items() if name.startswith(prefix)
    }


def to_metrics(metrics: Mapping[str, float]) -> MetricRecord:
    """Plain numbers by name as a Flower record."""
    return MetricRecord(dict(metrics))


def effort(metrics: Mapping[str, object], name: str) -> dict[str, object]:
    """What a client states as `name` (seconds, image_passes) of all its phases but `report_*`.

    That is the report family's model, which `local_only` trains for the comparison's sake.
    """
    return {
        key: value
        for key, value in metrics.items()
        if (key == name or key.endswith(f"_{name}")) and not key.startswith("report_")
    }


# --- headers -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Header:
    """Who sent an upload, for which round, about which public set."""

    round_num: int
    partition_id: int
    family: str
    codec: str  # the codec's name; "weights" for plain model weights, "none" where nothing is sent
    public_fingerprint: str

    def to_record(self) -> ConfigRecord:
        """As a Flower record."""
        return ConfigRecord(dict(vars(self)))

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "Header":
        """From a Flower record; `PayloadError` if a field is missing or has another type."""
        values = {name: record.get(name) for name in _HEADER}
        for name, kind in _HEADER.items():
            if type(values[name]) is not kind:
                raise PayloadError(f"header field {name!r} should be {kind}, got {values[name]!r}")
        return cls(**values)  # type: ignore[arg-type]

    def check(self, *, round_num: int, codec: str, public_fingerprint: str) -> None:
        """Raise `PayloadError` for another round, another wire format or another public set."""
        if self.round_num != round_num:
            raise PayloadError(f"it is for round {self.round_num}, this is round {round_num}")
        if self.codec != codec:
            raise PayloadError(f"it is encoded as {self.codec!r}, the server expects {codec!r} (codec=)")
        if self.public_fingerprint != public_fingerprint:
            raise PayloadError(
                f"its public set ({self.public_fingerprint[:12]}) is not the server's "
                f"({public_fingerprint[:12]}): same images, order and transform are needed (public=)"
            )


_HEADER = {field.name: field.type for field in fields(Header)}


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A client's answer to one round.

    Args:
        header: who and what for.
        arrays: named arrays, exactly as sent; read-only where a message brought them.
        metrics: plain numbers; `num-examples` is the number of private images, see `num_images`.
        summed: its weights were added to others' (`fedssl.federation.averaging`), and `arrays` are empty, or the sum
            of those of these partitions.
    """

    header: Header
    arrays: Mapping[str, np.ndarray]
    metrics: Mapping[str, float]
    summed: tuple[int, ...] | None = None

    @property
    def num_images(self) -> float:
        """The private images that the client declares (`num-examples`); `PayloadError` unless it can be a weight.

        Beyond 2^53 a float no longer counts, and the sum over clients could become infinite.
        """
        declared = self.metrics.get("num-examples")
        if declared is None or not 0 < declared <= 2**53:
            raise PayloadError(f"it declares num-examples={declared}")
        return declared

    def measured(self, seconds: float) -> "Upload":
        """With the `seconds` that the whole task took, where the client half states none of its own."""
        if effort(self.metrics, "seconds"):
            return self
        return replace(self, metrics={**self.metrics, "seconds": seconds})

    def to_content(self) -> RecordDict:
        """As the content of a Flower message; every metric is a float, so that no message's length tells a count."""
        return RecordDict(
            {
                "arrays": to_record(self.arrays),
                "metrics": MetricRecord({name: float(v) for name, v in self.metrics.items()}),
                "header": self.header.to_record(),
            }
        )

    @classmethod
    def from_message(cls, message: Message) -> "Upload":
        """Parse a reply; anything that is not an upload is a `PayloadError` that says what is wrong."""
        if message.has_error():
            raise PayloadError(f"the client answered with an error: {message.error.reason}")
        content = message.content
        if content.keys() != _UPLOAD.keys():
            raise PayloadError(f"an upload has the records arrays, metrics and header, got {sorted(content)}")
        for name, kind in _UPLOAD.items():
            if not isinstance(content[name], kind):
                raise PayloadError(
                    f"record {name!r} should be of type {kind.__name__}, got {type(content[name]).__name__}"
                )
        records: Mapping[str, Any] = content  # of the types just looked at; Flower's properties copy all records
        arrays = {}
        for name, array in records["arrays"].items():
            value = read_array(name, array)
            if (dtype_name(value.dtype), value.shape) != (array.dtype, tuple(array.shape)):
                raise PayloadError(
                    f"array {name!r} declares {array.dtype}{tuple(array.shape)} but holds {value.dtype}{value.shape}"
                )
            arrays[name] = value
        metrics = {name: float(v) for name, v in records["metrics"].items() if isinstance(v, int | float)}
        header, noted = Header.from_record(records["header"]), noted_sum(message)
        return cls(header=header, arrays=arrays, metrics=metrics, summed=None if noted is None else noted.partitions)


_UPLOAD = {"arrays": ArrayRecord, "metrics": MetricRecord, "header": ConfigRecord}


# --- bytes -------------------------------------------------------------------------------------------------------
def num_bytes(message: Message) -> int:
    """Size of a message's records: names, encoded arrays, 8 bytes a number, strings by length.

    Flower's own count, except that Flower's raises for an empty string or list, which anybody may send. Of a reply
    whose weights were added to a sum, what it had before.
    """
    if message.has_error():
        return 0
    if (summed := noted_sum(message)) is not None:
        return summed.num_bytes
    return sum(
        len(name) + sum(len(entry) + _num_bytes(value) for entry, value in record.items())
        for name, record in message.content.items()
    )


def _num_bytes(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, list):
        return sum(map(_num_bytes, value))
    if isinstance(value, str | bytes):
        return len(value)
    return 1 if isinstance(value, bool) else 8
