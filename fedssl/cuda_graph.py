"""A training step as one CUDA graph: a GPU then computes as fast as it can, not as fast as Python can launch.

A step is some hundred to a thousand kernels. In a small network each takes a few microseconds, and about ten to launch,
so the GPU waits for one core most of the time. After a few ordinary steps the next one is recorded, and from there on
the recording is replayed: the same kernels on the same memory, with random numbers that go on as they would have.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor, nn

log = logging.getLogger(__name__)

ORDINARY = 3  # steps before one is recorded: after them memory, kernels and the optimiser's state are there
SYNCHRONISES = "synchronizing"  # in the warning of torch.cuda.set_sync_debug_mode

# Images of a batch -> scalars that stay on the device, by name. All that it changes are tensors, in place: what Python
# remembers from step to step would be recorded as it was.
TakeStep = Callable[[Int64[Tensor, " b"]], dict[str, Tensor]]


class Replayed:
    """Takes steps; on a GPU, where that is possible, most of them as a replay of one that was recorded.

    What makes it impossible is noticed in an ordinary step and named in the log: a step that reads from the device, or
    one that puts new tensors in the place of a network's. Batches of another size are ordinary steps as well.

    Args:
        step: one step.
        batch_size: images of the batches that are replayed.
        networks: whose parameters and buffers the step changes.
        generators: on the device, that it draws from, beside torch's own.
        device: where it computes.
        wanted: whether to record at all.
    """

    def __init__(
        self,
        step: TakeStep,
        *,
        batch_size: int,
        networks: Sequence[nn.Module],
        generators: Sequence[torch.Generator],
        device: torch.device,
        wanted: bool,
    ) -> None:
        self._step = step
        self._batch_size = batch_size
        self._networks = networks
        self._generators = generators
        self._possible = wanted and device.type == "cuda" and hasattr(torch.cuda.CUDAGraph, "register_generator_state")
        self._taken = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, rows: Int64[Tensor, " b"]) -> dict[str, Tensor]:
        """One step on the images `rows`; what it returned."""
        if not self._possible or len(rows) != self._batch_size:
            return self._step(rows)
        if self._replay is None:
            self._taken += 1
            if self._taken < ORDINARY:
                return self._step(rows)
            if self._taken == ORDINARY:
                return self._watched(rows)
            self._record(rows)
        if self._replay is None:
            return self._step(rows)
        self._rows.copy_(rows)
        self._replay()
        return {name: value.clone() for name, value in self._measures.items()}

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
        elif list(self._addresses()) != before:
            self._give_up("it replaces tensors instead of changing them")
        return measures

    def _record(self, rows: Int64[Tensor, " b"]) -> None:
        """Of what happens here, the device does nothing yet."""
        self._rows = rows.clone()
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._measures = self._step(self._rows)
        except RuntimeError as error:
            self._give_up(" ".join(str(error).split())[:300])
            return
        self._replay = graph.replay

    def _give_up(self, why: str) -> None:
        log.warning("client.cuda_graphs: this step cannot be recorded (%s), so each is launched as it is.", why)
        self._possible = False

    def _addresses(self) -> Iterator[int]:
        for network in self._networks:
            yield from (tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers()))
