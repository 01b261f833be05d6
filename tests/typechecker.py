"""The run-time type checker of the tests: beartype, with Python's implicit numeric tower; and jaxtyping for shapes.

jaxtyping's import hook decorates every function, and binds every call's arguments to their names to have the sizes of
their axes. A third of the suite's time went there. So it does where an annotation has a shape; elsewhere beartype
checks alone. What is defined within a function, without shapes, is not checked: each call would decorate it anew.
"""

import functools
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# As jaxtyping's errors are: code that catches a TypeError of bad input catches it in tests, too.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_jaxtyped = jaxtyping.jaxtyped


def jaxtyped(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """In the place of `jaxtyping.jaxtyped`, which the import hook writes above every class and function."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if not isinstance(function, types.FunctionType) or any(map(_has_shape, function.__annotations__.values())):
        return _jaxtyped(function, typechecker=typechecker)
    if "<locals>" in function.__qualname__:
        return function
    checked = typechecker(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

    return call


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, str):
        return True  # a name that is not known yet
    of_jaxtyping = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return of_jaxtyping or any(_has_shape(part) for part in typing.get_args(hint))
