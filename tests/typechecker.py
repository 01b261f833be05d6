"""The run-time type checker of the tests: beartype, with Python's implicit numeric tower."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
