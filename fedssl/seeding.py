"""Every random draw has a named source, derived from the run's one seed. Nothing uses a global generator."""

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

GLOBAL_GENERATORS = threading.RLock()  # one thread at a time
MT19937_START, MT19937_WORDS = 24, 624  # bytes before its words in a generator's state; words of 32 bits, kept in 64


def derive_seed(seed: int, purpose: str, round_num: int = 0, partition_id: int = 0) -> int:
    """A 63-bit seed that depends on all four arguments and on nothing else.

    Args:
        seed: the run's seed (`seed=` on the command line).
        purpose: what the draws are for, e.g. "cohort" or "local training"; different purposes are independent.
        round_num: 0 before the first round.
        partition_id: 0 where no client is concerned.
    """
    text = f"{seed}/{purpose}/{round_num}/{partition_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(
    seed: int, purpose: str, round_num: int = 0, partition_id: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator on `device`, seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, round_num, partition_id))


def unforeseeable() -> torch.Generator:
    """A CPU generator that no seed leads to, for secrets: the operating system fills its whole state.

    `manual_seed` would leave 32 bits to guess: torch's generator (mt19937) takes no more of a seed.
    """
    made = torch.Generator()
    state = made.get_state().numpy()
    words = state[MT19937_START : MT19937_START + 8 * MT19937_WORDS].view(np.uint64)
    words[:] = np.frombuffer(os.urandom(4 * MT19937_WORDS), np.uint32)
    return made.set_state(torch.from_numpy(state))


def numpy_generator(seed: int, purpose: str, round_num: int = 0, partition_id: int = 0) -> np.random.Generator:
    """A numpy generator, seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(seed, purpose, round_num, partition_id))


@contextmanager
def seeded_init(seed: int, purpose: str, round_num: int = 0, partition_id: int = 0) -> Iterator[None]:
    """Inside, torch's global generators are seeded (layers and dropout use them); the CPU's is untouched outside.

    Of several threads one is inside at a time, for all have the same generators.
    `torch.manual_seed` would format a stack trace for a CUDA that has not started, 1 ms each time.
    """
    derived = derive_seed(seed, purpose, round_num, partition_id)
    with GLOBAL_GENERATORS, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(derived)
        yield


@contextmanager
def seeded_globals(seed: int, purpose: str, round_num: int = 0) -> Iterator[None]:
    """Inside, Python's and numpy's global generators are seeded, for code of others; outside, they are untouched."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
    derived = derive_seed(seed, purpose, round_num)
    random.seed(derived)
    np.random.seed(derived % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002
