"""Sums, gathers and broadcasts over the ranks of a fit; plain returns when there is one rank.

Only the trainer and its row sources call these; objectives return additive sums.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The group of ranks that fit together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all ranks, on the device it came from."""
        if self.world_size == 1:
            return values
        moved = values.to(self.device, copy=True).contiguous()
        dist.all_reduce(moved)
        return moved.to(values.device)

    def max(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over all ranks."""
        if self.world_size == 1:
            return values
        moved = values.to(self.device, copy=True).contiguous()
        dist.all_reduce(moved, op=dist.ReduceOp.MAX)
        return moved.to(values.device)

    def broadcast(self, values: Tensor) -> Tensor:
        """Return rank 0's values on every rank; the others pass a tensor of the same shape and type."""
        if self.world_size == 1:
            return values
        moved = values.to(self.device, copy=True).contiguous()
        dist.broadcast(moved, src=0)
        return moved.to(values.device)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, one below the other, on rank 0 (CPU); no rows on the others.

        Args:
            rows: (n_rank, ...) of the same width and type on each rank; n_rank may differ.
        """
        if self.world_size == 1:
            return rows.cpu()
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.sum(counts)
        padded = torch.zeros((int(counts.max()), *rows.shape[1:]), dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(padded, parts, dst=0)
        if parts is None:
            return rows[:0].cpu()
        return torch.cat([part[:n].cpu() for part, n in zip(parts, counts.tolist(), strict=True)])
