"""What the suite's run-time checks find, so that they cannot fall silent."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tests.typechecker import check, jaxtyped


def added(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return a + b[: len(a)]


def nested(a: Float[Tensor, "b d"], more: Sequence[tuple[Float[Tensor, " b"], int]] | None) -> int:
    return len(a) + len(more or ())


def later(a: 'Float[Tensor, "b d"]', b: 'Float[Tensor, "b d"]') -> int:
    return len(a) + len(b)


def named(name: str) -> str:
    return str(name)


TWO, THREE = torch.zeros(2, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        (added, (TWO, TWO), (TWO, THREE)),
        (nested, (TWO, [(TWO[:, 0], 1)]), (TWO, [(THREE[:, 0], 1)])),
        (later, (TWO, TWO), (TWO, THREE)),
        (named, ("a",), (1,)),
    ],
)
def test_what_is_wrong_is_a_type_error(function: Callable[..., Any], right: Any, wrong: Any) -> None:
    checked = jaxtyped(function, typechecker=check)
    checked(*right)
    function(*wrong)
    with pytest.raises(TypeError):
        checked(*wrong)


def test_the_package_is_checked() -> None:
    from fedssl.losses import nt_xent

    with pytest.raises(TypeError):
        nt_xent(TWO, THREE, temperature=0.5)
