"""What a network is compared with: queues of past embeddings."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class Queue:
    """The anchors: the newest keys, each with the public image it was made of. A ring of fixed size.

    Until it is full it cannot be read: the rest would be zeros.

    Args:
        size: number of anchors, at least 1.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pushed = 0  # as Python counts: of a step that is replayed only the recording

    @property
    def keys(self) -> Float[Tensor, "k d"]:
        """One key an anchor."""
        assert self._pushed >= self.size, f"the queue holds {self._pushed} of {self.size} keys"
        return self._keys

    @property
    def indices(self) -> Int64[Tensor, " k"]:
        """Positions in the public set; row i belongs to key i."""
        assert self._pushed >= self.size, f"the queue holds {self._pushed} of {self.size} keys"
        return self._indices

    def push(self, keys: Float[Tensor, "b d"], indices: Int64[Tensor, " b"]) -> None:
        """Overwrite the b <= size oldest entries, in order."""
        if self._pushed == 0:
            self._keys = keys.new_zeros(self.size, keys.shape[1])
            self._indices = indices.new_zeros(self.size)
            self._next = indices.new_zeros(())  # slot of the oldest
        slots = self._oldest(len(keys))
        self._keys[slots] = keys
        self._indices[slots] = indices
        self._next.add_(len(keys)).remainder_(self.size)
        self._pushed += len(keys)

    def oldest(self, count: int) -> Int64[Tensor, " count"]:
        """The public images of the `count` <= size oldest keys, oldest first."""
        return self.indices[self._oldest(count)]

    def _oldest(self, count: int) -> Int64[Tensor, " count"]:
        assert count <= self.size, f"{count} keys do not fit a queue of {self.size}"
        return (self._next + torch.arange(count, device=self._indices.device)) % self.size


class EmbeddingQueue(nn.Module):
    """The newest embeddings, oldest first, in a method's state: it grows up to `size` rows, then drops the oldest.

    Its one buffer has as many rows as there are embeddings, and no shape before the first: a state that is loaded
    brings its own.

    Args:
        size: rows at most, at least 0.
    """

    rows: Float[Tensor, "k d"]

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("rows", torch.zeros(0, 0))
        self.register_load_state_dict_pre_hook(_take_shape)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.rows)

    def push(self, embeddings: Float[Tensor, "b d"]) -> None:
        """Append a batch in float32, without its gradient. `rows` is another tensor until it is full."""
        new = embeddings.detach().float()
        kept = self.rows if len(self) else new[:0]
        rows = torch.cat([kept, new])[max(0, len(kept) + len(new) - self.size) :]
        if rows.shape == self.rows.shape:
            self.rows.copy_(rows)
        else:
            self.rows = rows


def _take_shape(queue: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    assert isinstance(queue, EmbeddingQueue)
    if (rows := state.get(f"{prefix}rows")) is not None:
        queue.rows = queue.rows.new_zeros(rows.shape)


def filling_order(n: int, size: int, rng: torch.Generator) -> Int64[Tensor, " k"]:
    """`size` of n images in random order, each once before any comes twice."""
    passes = [torch.randperm(n, generator=rng) for _ in range(math.ceil(size / n))]
    return torch.cat(passes)[:size]
