"""Python functions as machine code, for inner loops that neither torch nor numpy has."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def native(function: Kernel) -> Kernel:
    """`function` compiled by numba, running without the interpreter's lock; sums and products are made as written.

    The first call in a process reads the code from numba's cache (`__pycache__` beside the module, or the user's cache
    folder where that cannot be written), and compiles it where it is not there.
    """
    try:
        kernel: Any = numba.njit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # no folder can be written: compiled in each process
        kernel = numba.njit(function, nogil=True, error_model="numpy")
    return cast(Kernel, kernel)
