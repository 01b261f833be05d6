"""A training step as one CUDA graph: a GPU then computes as fast as it can, not as fast as Python can launch.

A step is some hundred to a thousand kernels. In a small network each takes a few microseconds, and about ten to launch,
so the GPU waits for one core most of the time. After a few ordinary steps the next one is recorded, and from there on
the recording is replayed: the same kernels on the same memory, with random numbers that go on as they would have.
"""

import functools
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from fedssl.errors import BrokenProcessError

log = logging.getLogger(__name__)

ORDINARY = 3  # steps of a batch size before one is recorded: memory, kernels and the optimiser's state are there
WORTH = 10  # steps of a batch size from which a recording pays
SYNCHRONISES = "called a synchronizing CUDA operation"  # as torch.cuda.set_sync_debug_mode warns

# Images of a batch -> scalars that stay on the device, by name. All that changes from step to step are tensors, in
# place: what Python remembers would be recorded as it was.
TakeStep = Callable[[Int64[Tensor, " b"]], dict[str, Tensor]]


def can_record(device: torch.device) -> bool:
    """Whether steps on this device can be recorded, with generators of their own, which older versions cannot."""
    return device.type == "cuda" and hasattr(torch.cuda.CUDAGraph, "register_generator_state")


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One step for batches of one size: where it reads the images' positions, and where it leaves its results."""

    rows: Int64[Tensor, " b"]
    measures: dict[str, Tensor]
    replay: Callable[[], None]


class Replayed:
    """Takes the steps of a training, most of them as a replay of one that was recorded.

    What makes that impossible is noticed in an ordinary step: one that reads from the device, which the log says, or
    one that puts new tensors in the place of a network's, as queues do that still fill. Each size of batches has its
    own recording. The step is handed to each call, not held: what it belongs to may hold this.

    Args:
        steps: how many there will be, by images in a batch; of a size of which there are too few, or none here, none is
            recorded.
        networks: whose parameters and buffers the step changes.
        generators: on the device, that it draws from, beside torch's own.
    """

    def __init__(
        self, *, steps: Mapping[int, int], networks: Sequence[nn.Module], generators: Sequence[torch.Generator]
    ) -> None:
        self._sizes = {size for size, count in steps.items() if count >= WORTH}
        self._networks = networks
        self._generators = generators
        self._taken: Counter[int] = Counter()  # ordinary steps, by images in the batch
        self._recordings: dict[int, Recording] = {}

    def __call__(self, step: TakeStep, rows: Int64[Tensor, " b"]) -> dict[str, Tensor]:
        """One `step`, the same in every call, on the images `rows`; what it returned.

        Raises:
            BrokenProcessError: the recording failed, although an ordinary step looked as if it could be recorded.
        """
        size = len(rows)
        if size not in self._sizes:
            return step(rows)
        if (recording := self._recordings.get(size)) is None:
            self._taken[size] += 1
            if self._taken[size] < ORDINARY:
                return step(rows)
            if self._taken[size] == ORDINARY:
                return self._watched(step, rows)
            recording = self._recordings[size] = self._record(step, rows)
        recording.rows.copy_(rows)
        recording.replay()
        return {name: value.clone() for name, value in recording.measures.items()}

    def end(self) -> None:
        """Give the memory of the recordings back: other processes on the GPU, and this one's next training, need it."""
        if self._recordings:
            self._recordings.clear()
            torch.cuda.empty_cache()

    def _watched(self, step: TakeStep, rows: Int64[Tensor, " b"]) -> dict[str, Tensor]:
        """An ordinary step that shows whether it can be recorded."""
        before = [tensor.detach() for tensor in self._tensors()]  # held, or a new one may lie where an old one did
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                measures = step(rows)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any(SYNCHRONISES in str(warning.message) for warning in caught):
            self._sizes.clear()
            _warn_of_reading()
        elif [tensor.data_ptr() for tensor in self._tensors()] != [tensor.data_ptr() for tensor in before]:
            self._taken[len(rows)] -= 1  # a queue that fills; the next step is watched again
            log.debug("client.cuda_graphs: a step that replaces tensors, instead of changing them, is not recorded")
        return measures

    def _record(self, step: TakeStep, rows: Int64[Tensor, " b"]) -> Recording:
        """Of what happens here, the device does nothing yet."""
        rows = rows.clone()
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                measures = step(rows)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a recording that failed is an error of its own
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            raise BrokenProcessError(
                f"a step could not be recorded as a CUDA graph: {' '.join(str(cause).split())[:300]}. Set "
                f"client.cuda_graphs=false, which launches every step as it is; this process is of no further use."
            ) from error
        return Recording(rows=rows, measures=measures, replay=graph.replay)

    def _tensors(self) -> Iterator[Tensor]:
        for network in self._networks:
            yield from network.parameters()
            yield from network.buffers()


@functools.cache
def _warn_of_reading() -> None:
    """Once a process."""
    log.warning("client.cuda_graphs: steps that read from the device are not recorded but launched as they are.")
