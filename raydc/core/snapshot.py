"""The frozen state from which DEC's target is made. Letters: N rows, K leaves, L latent width.

The target of a row depends on the data only through the row's own q and the K-vector f, so a refresh is one pass over
the rows and one all-reduce of K numbers. The latents of the pass are kept (N x L, sharded with the rows) where the rows
are resident; streamed rows are encoded again by the frozen encoder.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydc.core.autoencoder import precision
from raydc.core.collectives import Ranks
from raydc.core.objectives.dec import log_target
from raydc.core.objectives.kernel import Kernel, log_soft_assign
from raydc.core.preprocess import Preprocess
from raydc.core.rows import Batch, ResidentRows, Rows


@dataclass
class Snapshot:
    """Encoder, centres and leaf frequencies at the last refresh."""

    encoder: nn.Module
    centers_KL: Tensor
    frequencies_K: Tensor
    """(K,) float64: f_j, the sum of w_i q_ij over all rows of all ranks."""

    z_NL: Tensor | None = None
    """(N, L) float32 latents of this rank's resident rows."""

    leaves_N: Tensor | None = None
    """(N,) int64 hard assignment of this rank's resident rows."""

    @torch.no_grad()
    def log_target(self, batch: Batch, preprocess: Preprocess, kernel: Kernel, arithmetic: str) -> Tensor:
        """Return the (n, K) log target of a batch."""
        if self.z_NL is not None and batch.positions_N is not None:
            z = self.z_NL[batch.positions_N]
        else:
            z = encode(self.encoder, batch, preprocess, arithmetic)
        return log_target(log_soft_assign(z, self.centers_KL, kernel), self.frequencies_K)


@dataclass(frozen=True)
class Refreshed:
    """A new snapshot and what the pass over the rows showed."""

    snapshot: Snapshot
    changed: float
    """Share of the rows whose leaf is another than in the last snapshot; 1 where there was none."""

    mean_top_q: float
    num_empty: int
    """Leaves that are no row's first choice."""

    largest_share: float
    """Share of the rows in the largest leaf."""


@torch.no_grad()
def encode(encoder: nn.Module, batch: Batch, preprocess: Preprocess, arithmetic: str) -> Tensor:
    """Return the (n, L) float32 latents of a batch."""
    with precision(batch.x_ND.device, arithmetic):
        return encoder(preprocess(batch.x_ND)).float()


@torch.no_grad()
def refresh(
    rows: Rows,
    encoder: nn.Module,
    centers_KL: Tensor,
    previous: Snapshot | None,
    *,
    preprocess: Preprocess,
    kernel: Kernel,
    ranks: Ranks,
    arithmetic: str,
    block_rows: int,
) -> Refreshed:
    """Return a snapshot of the encoder and centres with f over all rows of all ranks.

    f_j = sum_i w_i q_ij in float64: a float32 sum stands still at 2^24 rows.
    """
    num_leaves = len(centers_KL)
    f = torch.zeros(num_leaves, dtype=torch.float64, device=centers_KL.device)
    sizes = torch.zeros_like(f)
    scalars = torch.zeros(3, dtype=torch.float64, device=centers_KL.device)  # rows, changed rows, sum of the top q
    kept_z, kept_leaves = [], []
    resident = isinstance(rows, ResidentRows)
    for batch in rows.blocks(block_rows):
        z = encode(encoder, batch, preprocess, arithmetic)
        q = log_soft_assign(z, centers_KL, kernel).exp()
        top, leaves = q.max(dim=1)
        # In double before the product: f is a sum over all rows.
        f += batch.weights_N.double() @ q.double()
        sizes += torch.bincount(leaves, minlength=num_leaves)
        before = _leaves_before(previous, batch, preprocess, kernel, arithmetic)
        changed = len(batch) if before is None else (before != leaves).sum()
        scalars += torch.stack([torch.as_tensor(v, device=f.device).double() for v in (len(batch), changed, top.sum())])
        if resident:
            kept_z.append(z)
            kept_leaves.append(leaves)
    packed = ranks.sum(torch.cat([f, sizes, scalars]))
    f, sizes, (count, changed_rows, top_sum) = packed[:num_leaves], packed[num_leaves:-3], packed[-3:].tolist()
    snapshot = Snapshot(copy.deepcopy(encoder).eval(), centers_KL.detach().clone(), f)
    if resident:
        empty = torch.empty((0, centers_KL.shape[1]), device=f.device)
        snapshot.z_NL = torch.cat(kept_z) if kept_z else empty
        snapshot.leaves_N = torch.cat(kept_leaves) if kept_leaves else torch.empty(0, dtype=torch.int64)
    return Refreshed(
        snapshot, changed_rows / count, top_sum / count, int((sizes == 0).sum()), float(sizes.max()) / count
    )


def _leaves_before(
    previous: Snapshot | None, batch: Batch, preprocess: Preprocess, kernel: Kernel, arithmetic: str
) -> Tensor | None:
    if previous is None:
        return None
    if previous.leaves_N is not None and batch.positions_N is not None:
        return previous.leaves_N[batch.positions_N]
    z = encode(previous.encoder, batch, preprocess, arithmetic)
    return log_soft_assign(z, previous.centers_KL, kernel).argmax(dim=1)
