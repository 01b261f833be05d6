import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn

from fedssl.at_once import at_once
from fedssl.federation.grids.in_process import torch_threads
from fedssl.models import Model, draws_globally
from fedssl.seeding import seeded_init


def test_works_at_once_with_a_part_of_the_threads_each() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def work() -> int:
        meeting.wait()  # broken unless the other one is there
        return torch.get_num_threads()

    with torch_threads(5):
        assert at_once([work, work]) == [2, 2]
        assert torch.get_num_threads() == 5


def test_keeps_the_order_whoever_is_first_and_runs_as_many_as_there_are_threads() -> None:
    running: list[int] = []
    most: list[int] = []

    def work(number: int) -> int:
        running.append(number)
        most.append(len(running))
        time.sleep(0.05 * (3 - number % 4))
        running.remove(number)
        return number

    with torch_threads(2):
        assert at_once([lambda number=number: work(number) for number in range(6)]) == list(range(6))
    assert max(most) == 2


def wait(begun: list[int]) -> None:
    """For a minute, a moment at a time."""
    begun.append(1)
    with seeded_init(0, "test"):
        for _ in range(6000):
            time.sleep(0.01)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_is_the_caller_s_and_ends_the_others(threads: int) -> None:
    begun: list[int] = []

    def fail() -> None:
        time.sleep(0.1)
        raise ValueError("this one")

    started, before = time.monotonic(), torch.get_rng_state()
    with torch_threads(threads), pytest.raises(ValueError, match="this one"):
        at_once([fail, *[partial(wait, begun)] * 5])
    assert len(begun) == threads - 1
    assert time.monotonic() - started < 10
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupt_ends_all_of_them() -> None:
    begun: list[int] = []
    timer = threading.Timer(0.3, partial(os.kill, os.getpid(), signal.SIGINT))
    threads = threading.active_count()
    started = time.monotonic()
    timer.start()
    with torch_threads(2), pytest.raises(KeyboardInterrupt):
        at_once([partial(wait, begun)] * 3)
    timer.join()
    assert begun  # at least one, inside `seeded_init`, and maybe one that waited for it
    assert threading.active_count() == threads
    assert time.monotonic() - started < 10


def test_alone_it_has_all_threads() -> None:
    with torch_threads(2):
        assert at_once([torch.get_num_threads]) == [2]
    assert at_once([]) == []


def test_seeded_draws_of_several_threads_are_those_of_one() -> None:
    def draw(seed: int) -> list[float]:
        drawn = []
        with seeded_init(seed, "test"):
            for _ in range(20):
                drawn.append(float(torch.rand(())))
                time.sleep(0.001)  # for another thread to come between
        return drawn

    expected = [draw(seed) for seed in range(3)]
    with torch_threads(3):
        assert at_once([lambda seed=seed: draw(seed) for seed in range(3)]) == expected


class Functional(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x.flatten(1), 0.5, self.training)


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) + torch.rand(x[:, 0, 0, :1].shape, generator=torch.Generator())


def network(*layers: nn.Module) -> Model:
    return Model(nn.Sequential(*layers, nn.Flatten()), nn.Linear(3 * 8 * 8, 4))


@pytest.mark.parametrize(
    ("layers", "draws"),
    [
        ([nn.BatchNorm2d(3)], False),
        ([nn.Dropout(0.1)], True),
        ([nn.Dropout2d(0.1)], True),
        ([nn.RReLU()], True),
        ([Functional()], True),
        ([Own()], False),
    ],
)
def test_a_network_that_draws_globally_is_found_out(layers: list[nn.Module], draws: bool) -> None:
    model = network(*layers).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert draws_globally(model, 8) == draws
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
