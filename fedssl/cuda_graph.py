"""A training step as one CUDA graph: a GPU then computes as fast as it can, not as fast as Python can launch.

A step is some hundred to a thousand kernels. In a small network each takes a few microseconds, and about ten to launch,
so the GPU waits for one core most of the time. After a few ordinary steps the next one is recorded, and from there on
the recording is replayed: the same kernels on the same memory, with random numbers that go on as they would have.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from fedssl.errors import FedSSLError

log = logging.getLogger(__name__)

ORDINARY = 3  # steps of a batch size before one is recorded: memory, kernels and the optimiser's state are there
SYNCHRONISES = "called a synchronizing CUDA operation"  # as torch.cuda.set_sync_debug_mode warns

# Images of a batch -> scalars that stay on the device, by name. All that it changes are tensors, in place: what Python
# remembers from step to step would be recorded as it was.
TakeStep = Callable[[Int64[Tensor, " b"]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One step for batches of one size: where it reads the images' positions, and where it leaves its results."""

    rows: Int64[Tensor, " b"]
    measures: dict[str, Tensor]
    replay: Callable[[], None]


class Replayed:
    """Takes steps; on a GPU, where that is possible, most of them as a replay of one that was recorded.

    What makes it impossible is noticed in an ordinary step: one that reads from the device, which the log names, or one
    that puts new tensors in the place of a network's, as queues do that still fill. Each size of batches has its own
    recording.

    Args:
        step: one step.
        networks: whose parameters and buffers the step changes.
        generators: on the device, that it draws from, beside torch's own.
        device: where it computes.
        wanted: whether to record at all.
    """

    def __init__(
        self,
        step: TakeStep,
        *,
        networks: Sequence[nn.Module],
        generators: Sequence[torch.Generator],
        device: torch.device,
        wanted: bool,
    ) -> None:
        self._step = step
        self._networks = networks
        self._generators = generators
        self._possible = wanted and device.type == "cuda" and hasattr(torch.cuda.CUDAGraph, "register_generator_state")
        self._taken: Counter[int] = Counter()  # ordinary steps, by images in the batch
        self._recordings: dict[int, Recording] = {}

    def __call__(self, rows: Int64[Tensor, " b"]) -> dict[str, Tensor]:
        """One step on the images `rows`; what it returned.

        Raises:
            FedSSLError: the recording failed, although an ordinary step looked as if it could be recorded.
        """
        if not self._possible:
            return self._step(rows)
        if (recording := self._recordings.get(len(rows))) is None:
            self._taken[len(rows)] += 1
            if self._taken[len(rows)] < ORDINARY:
                return self._step(rows)
            if self._taken[len(rows)] == ORDINARY:
                return self._watched(rows)
            recording = self._recordings[len(rows)] = self._record(rows)
        recording.rows.copy_(rows)
        recording.replay()
        return {name: value.clone() for name, value in recording.measures.items()}

    def _watched(self, rows: Int64[Tensor, " b"]) -> dict[str, Tensor]:
        """An ordinary step that shows whether it can be recorded."""
        before = list(self._addresses())
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                measures = self._step(rows)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any(SYNCHRONISES in str(warning.message) for warning in caught):
            self._give_up("it reads from the device")
        elif list(self._addresses()) != before:  # a queue that fills; the next step is watched again
            self._taken[len(rows)] -= 1
            log.debug("client.cuda_graphs: a step that replaces tensors, instead of changing them, is not recorded")
        return measures

    def _record(self, rows: Int64[Tensor, " b"]) -> Recording:
        """Of what happens here, the device does nothing yet."""
        rows = rows.clone()
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                measures = self._step(rows)
        except RuntimeError as error:  # torch's own generator is of no use in this process any more
            raise FedSSLError(
                f"a training step could not be recorded as a CUDA graph: {' '.join(str(error).split())[:300]}. Set "
                f"client.cuda_graphs=false, which launches every step as it is."
            ) from error
        return Recording(rows=rows, measures=measures, replay=graph.replay)

    def _give_up(self, why: str) -> None:
        log.warning("client.cuda_graphs: this step cannot be recorded (%s), so each is launched as it is.", why)
        self._possible = False

    def _addresses(self) -> Iterator[int]:
        for network in self._networks:
            yield from (tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers()))
