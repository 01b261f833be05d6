"""Weights that clients sent: checked against the family's, and averaged."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedssl.errors import PayloadError
from fedssl.federation.arrays import dtype_name

LARGEST = 1e10  # of a trained weight, so that a mean of them is finite; batch norm's averages follow what they get
GROWTH = 10.0  # of a weight's largest entry in one client's training: up to here nobody doubts that a network works


def check_weights(arrays: Mapping[str, np.ndarray], expected: ArrayRecord, family: str) -> dict[str, float]:
    """Refuse weights that do not fit the family's, or that no network can have.

    Args:
        arrays: what a client sent, by `<family>/<parameter>`.
        expected: the family's own weights.
        family: for the message.

    Returns:
        Their `largest_entries`.

    Raises:
        PayloadError: names the first weight that is wrong.
    """
    check_fit(arrays, expected, family)
    return check_values(arrays)


def check_fit(arrays: Mapping[str, np.ndarray], expected: ArrayRecord, family: str) -> None:
    """Names, shapes and dtypes; see `check_weights`."""
    if arrays.keys() != expected.keys():
        raise PayloadError(f"its weights are not those of {family}: {sorted(arrays.keys() ^ expected.keys())[:3]}")
    for name, value in arrays.items():
        own = expected[name]
        if (dtype_name(value.dtype), value.shape) != (own.dtype, tuple(own.shape)):
            raise PayloadError(f"weight {name!r} is {value.dtype}{value.shape}, not {own.dtype}{tuple(own.shape)}")


def check_values(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Finite numbers, trained ones of at most `LARGEST`, no negative variance; results as of `check_weights`."""
    largest = largest_entries(arrays)
    for name, value in largest.items():
        if not math.isfinite(value):
            raise PayloadError(f"weight {name!r} holds NaN or infinity")
        if "running_" not in name and value > LARGEST:
            raise PayloadError(f"weight {name!r} holds {value:.3g}, no trained network has beyond {LARGEST:g}")
        if name.endswith("running_var") and (least := arrays[name].min(initial=0)) < 0:
            raise PayloadError(f"weight {name!r} holds the negative variance {least:.3g}")
    return largest


def largest_entries(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The largest absolute entry of each."""
    return {name: _largest_entry(value) for name, value in arrays.items()}


def _largest_entry(value: np.ndarray) -> float:
    """Of the absolute values, which are not written down: 0 if there is none, NaN if one is."""
    return max(float(value.max()), -float(value.min())) if value.size else 0.0


def has_grown(largest: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Whether an entry is beyond `GROWTH` times the largest before, or beyond `GROWTH` where all were 0.

    If none is, no sum of products in a network that worked before comes near to float32's range of 1e38.

    Args:
        largest: `largest_entries` of what a client sent; what is not in `before` is not looked at.
        before: of what it was sent.
    """
    return any(name in before and value > GROWTH * (before[name] or 1.0) for name, value in largest.items())


def mean_weights(states: Sequence[Mapping[str, np.ndarray]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of one family's weights, by parameter name, summed in double precision and in this order.

    Args:
        states: at least one, by `<family>/<parameter>`.
        shares: each state's weight, > 0; they need not sum to 1.
    """
    mean = {}
    for name, first in states[0].items():
        total, scaled = np.zeros(first.shape), np.empty(first.shape)
        for share, state in zip(shares, states, strict=True):
            total += np.multiply(state[name], share, out=scaled, dtype=np.float64)
        mean[name.split("/", 1)[1]] = torch.from_numpy(np.asarray(total / sum(shares))).float()
    return mean
