"""A rank's share of the rows: resident in memory, or streamed anew for each pass. Letters: N rows, D width.

Which rank holds which row changes from run to run, so the batches do not depend on it: an epoch has a random order of
the row keys, which each rank computes for its own rows, and its T steps are equal parts of that order. A step's loss is
divided by the global weight of the step.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from raydc.core.hashing import hash_keys, permuted
from raydc.core.training.collectives import Ranks

_CPU = torch.device("cpu")
"""Where rows are kept by default."""

_MARGIN = 1.1
"""Room for a worker's rows, as a multiple of its even share."""


@dataclass(frozen=True)
class Batch:
    """Some rows."""

    keys_N: Tensor
    """(n,) int64."""

    x_ND: Tensor
    """(n, D) float16 or float32 raw rows, on the training device."""

    weights_N: Tensor
    """(n,) float32."""

    _: KW_ONLY
    positions_N: Tensor | None = None
    """(n,) int64 places in the resident shard; None for streamed rows."""

    neighbors_NM: Tensor | None = None
    """(n, M) int64 keys of each row's neighbors, where the fit learns from them; kept by resident rows only."""

    def __len__(self) -> int:
        return len(self.keys_N)


@dataclass(frozen=True)
class Step:
    """This rank's rows of one training step; possibly none."""

    batch: Batch
    total_weight: Tensor
    """Float64 scalar: the weight of the step's rows on all ranks."""


class ResidentRows:
    """Rows kept in memory, and named in the order of their keys."""

    steps_are_fixed = True
    """A step of an epoch has the same rows each time, on any number of ranks: a fit may go on inside an epoch."""

    def __init__(
        self,
        x_ND: Tensor,
        keys_N: Tensor,
        weights_N: Tensor,
        ranks: Ranks,
        neighbors_NM: Tensor | None = None,
        order_N: Tensor | None = None,
    ) -> None:
        """Keep rows that lie in the order of their keys, or row i of that order at `x_ND[order_N[i]]`."""
        self._x, self._keys, self._weights, self.ranks = x_ND, keys_N, weights_N, ranks
        self.neighbors_NM = neighbors_NM
        self._order = None if order_N is None else order_N.to(x_ND.device)
        self.dim = x_ND.shape[1]
        self.num_local = len(x_ND)
        self.num_rows = int(ranks.sum(torch.tensor([self.num_local])))
        # Keys that are left out leave gaps, and steps of unequal sizes.
        self._size = 1 + int(ranks.max(keys_N[-1:] if self.num_local else torch.tensor([0]))[0])

    @property
    def keys_N(self) -> Tensor:
        """(N,) int64 keys of this rank's rows, rising, on the CPU."""
        return self._keys

    @classmethod
    def collect(
        cls, chunks: Iterable[Batch], dim: int, dtype: torch.dtype, ranks: Ranks, *, expected_rows: int = 0
    ) -> "ResidentRows":
        """Return the rows of chunks that arrive in any order.

        A row stays where it was put when it arrived, so the peak is one copy of the rows and one chunk, as long as they
        are not many more than expected. On a GPU the rows move there if they leave a quarter of its free memory, else
        they stay in pinned host memory.

        Args:
            chunks: this rank's rows.
            dim: D.
            dtype: float16 or float32, in which they are kept.
            ranks: of all workers.
            expected_rows: about how many there will be.
        """
        store = RowStore([dim], dtype, int(_MARGIN * expected_rows))
        keys, weights, neighbors = [torch.empty(0, dtype=torch.int64)], [torch.empty(0)], []
        for chunk in chunks:
            if not len(chunk):
                continue
            store.add(chunk.x_ND.to(dtype))
            keys.append(chunk.keys_N)
            weights.append(chunk.weights_N)
            if chunk.neighbors_NM is not None:
                neighbors.append(chunk.neighbors_NM)
        x, arrived = store.take(), torch.cat(keys)
        order = arrived.argsort(stable=True)
        if ranks.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(ranks.device)
            x = x.to(ranks.device) if x.nbytes < 0.75 * free else x.pin_memory()
        sorted_neighbors = torch.cat(neighbors)[order] if neighbors else None
        return cls(x, arrived[order], torch.cat(weights)[order], ranks, sorted_neighbors, order)

    def blocks(self, block_rows: int) -> Iterator[Batch]:
        """Yield every row of this rank once, in the order of the keys."""
        for start in range(0, self.num_local, block_rows):
            yield self.take(torch.arange(start, min(start + block_rows, self.num_local)))

    def steps(self, batch_rows: int, epoch_seed: int, first: int = 0) -> Iterator[Step]:
        """Yield the steps of one epoch from number `first` on: as many on every rank, every row in exactly one.

        Where the keys count the rows, all steps have as many rows, give or take one. The layers' kernels are made for a
        number of rows, and odd ones are slower.
        """
        num_steps = self.num_steps(batch_rows)
        step_of_row = permuted(self._keys, self._size, epoch_seed) * num_steps // self._size
        order = step_of_row.argsort(stable=True)
        sizes = torch.bincount(step_of_row, minlength=num_steps).tolist()
        local = torch.zeros(num_steps, dtype=torch.float64).index_add_(0, step_of_row, self._weights.double())
        totals = self.ranks.sum(local).to(self.ranks.device)
        # Not for the whole epoch.
        del step_of_row
        for rows, total in zip(order.split(sizes), totals, strict=True):
            # A step that got no row on any rank has nothing to learn from, and every rank sees that alike.
            if total > 0:
                if first == 0:
                    yield Step(self.take(rows), total)
                else:
                    first -= 1

    def num_steps(self, batch_rows: int) -> int:
        """Return the steps of an epoch."""
        return max(1, math.ceil(self.num_rows / batch_rows))

    def take(self, rows: Tensor) -> Batch:
        """Return some of this rank's rows by their places (CPU), on the training device."""
        device = self.ranks.device
        here = rows.to(self._x.device)
        x = self._x[here if self._order is None else self._order[here]].to(device, non_blocking=True)
        return Batch(self._keys[rows].to(device), x, self._weights[rows].to(device), positions_N=rows.to(device))


class RowStore:
    """Rows in the order in which they are added, in memory that is taken as it fills.

    Kept one by one instead, small pieces would lie between the large ones that a pass frees, and these could not be
    used again: a pass over the rows would take several times the memory of what is kept.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, expected_rows: int, device: torch.device = _CPU):
        """Make room for the rows that are expected, each of a shape; for more, room is made as they come."""
        # Memory that was never written to costs nothing.
        self._pieces = [torch.empty((max(expected_rows, 1), *shape), dtype=dtype, device=device)]
        self._filled = [0]

    def add(self, x_ND: Tensor) -> None:
        """Copy some rows."""
        while len(x_ND):
            piece, start = self._pieces[-1], self._filled[-1]
            # Rows of a type that the piece cannot hold begin another one.
            fits = torch.promote_types(piece.dtype, x_ND.dtype) == piece.dtype
            taken = min(len(x_ND), len(piece) - start) if fits else 0
            piece[start : start + taken] = x_ND[:taken]
            self._filled[-1] += taken
            x_ND = x_ND[taken:]
            if len(x_ND):
                more = max(len(x_ND), sum(self._filled) // 2)
                self._pieces.append(torch.empty((more, *piece.shape[1:]), dtype=x_ND.dtype, device=piece.device))
                self._filled.append(0)

    def take(self) -> Tensor:
        """Return all rows as one tensor and keep none; they are copied if there were more than expected."""
        parts = [piece[:n] for piece, n in zip(self._pieces, self._filled, strict=True)]
        self._pieces, self._filled = [], []
        return parts[0] if len(parts) == 1 else joined(parts)


class StreamedRows:
    """Rows read anew for each pass, for a shard larger than memory.

    No rank knows beforehand how many rows it will get, so before each step the ranks add up how many they have; the
    epoch ends, on all ranks at once, when the sum is zero. No row is dropped and no rank waits for another's gradient.
    """

    steps_are_fixed = False
    """The rows of a step depend on how they arrive."""

    def __init__(
        self, open_stream: Callable[[], Iterator[Batch]], dim: int, ranks: Ranks, *, expected_rows: int, pool_rows: int
    ) -> None:
        """Stream from `open_stream`; `pool_rows` are mixed before they are cut into steps.

        `expected_rows`, over all ranks, only places the learning rate and the refreshes along an epoch.
        """
        self._open, self._ranks, self._pool_rows = open_stream, ranks, pool_rows
        self.dim, self.num_rows = dim, expected_rows
        self.num_local = 0
        """Not known beforehand."""

    def blocks(self, block_rows: int) -> Iterator[Batch]:
        """Yield every row of this rank's present share once."""
        for batch in self._open():
            for start in range(0, len(batch), block_rows):
                yield self._to_device(_slice(batch, slice(start, start + block_rows)))

    def steps(self, batch_rows: int, epoch_seed: int, first: int = 0) -> Iterator[Step]:
        """Yield the steps of one epoch: the same number on every rank, every row in exactly one.

        With `first` as many steps are passed over. So a fit whose rows were resident, and are streamed on fewer ranks,
        goes on inside an epoch: some of its rows are then seen twice in this epoch, and as many others not.
        """
        local_rows = math.ceil(batch_rows / self._ranks.world_size)
        own = self._batches(local_rows, epoch_seed)
        while True:
            batch = next(own, None)
            weight = 0.0 if batch is None else float(batch.weights_N.double().sum())
            total = self._ranks.sum(torch.tensor(weight, dtype=torch.float64))
            if float(total) == 0.0:
                return
            if first > 0:
                first -= 1
                continue
            yield Step(self._to_device(batch or self._empty()), total.to(self._ranks.device))

    def num_steps(self, batch_rows: int) -> int:
        """Return about how many steps an epoch has."""
        return max(1, math.ceil(self.num_rows / batch_rows))

    def _batches(self, local_rows: int, epoch_seed: int) -> Iterator[Batch]:
        pool: list[Batch] = []
        for batch in self._open():
            pool.append(batch)
            if sum(len(b) for b in pool) >= self._pool_rows:
                mixed = _mix(pool, epoch_seed)
                whole = len(mixed) // local_rows * local_rows
                yield from (_slice(mixed, slice(s, s + local_rows)) for s in range(0, whole, local_rows))
                pool = [_slice(mixed, slice(whole, None))]
        if pool and (mixed := _mix(pool, epoch_seed)):
            yield from (_slice(mixed, slice(s, s + local_rows)) for s in range(0, len(mixed), local_rows))

    def _empty(self) -> Batch:
        return Batch(torch.empty(0, dtype=torch.int64), torch.empty(0, self.dim), torch.empty(0))

    def _to_device(self, batch: Batch) -> Batch:
        device = self._ranks.device
        return Batch(batch.keys_N.to(device), batch.x_ND.to(device), batch.weights_N.to(device))


Rows = ResidentRows | StreamedRows


def joined(parts: list[Tensor]) -> Tensor:
    """Return the rows of all parts, in their order, as one tensor; the list is emptied, so that none is held twice."""
    rows = sum(len(part) for part in parts)
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    whole = torch.empty((rows, *parts[0].shape[1:]), dtype=dtype, device=parts[0].device)
    # From the end: what a process took last it can give back to the system.
    while parts:
        part = parts.pop()
        whole[rows - len(part) : rows] = part
        rows -= len(part)
    return whole


def _mix(pool: list[Batch], seed: int) -> Batch:
    keys = torch.cat([b.keys_N for b in pool])
    order = hash_keys(keys, seed).argsort()
    x, weights = torch.cat([b.x_ND for b in pool]), torch.cat([b.weights_N for b in pool])
    return Batch(keys[order], x[order], weights[order])


def _slice(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.keys_N[rows], batch.x_ND[rows], batch.weights_N[rows])
