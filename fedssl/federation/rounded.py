"""The inner loop of `fedssl.federation.averaging`, apart because numba takes a while to import."""

from typing import no_type_check

from fedssl.native import native


@native
@no_type_check
def add_rounded(total, values, share, anchor):
    """total (n,) += values (n,) * share in double precision, rounded to what `anchor` plus a number can tell apart."""
    for i in range(len(values)):
        total[i] += (values[i] * share + anchor) - anchor
