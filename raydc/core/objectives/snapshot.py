"""The frozen state from which DEC's target is made. Letters: N rows, K leaves, L latent width.

The target of a row depends on the data only through the row's own q and the K-vector f, so a refresh is one pass over
the rows and one all-reduce of K numbers. The latents of the pass are kept (N x L, sharded with the rows) where the rows
are resident; streamed rows are encoded again by the frozen encoder.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raydc.core.models.autoencoder import precision
from raydc.core.objectives.kernel import Kernel, log_soft_assign
from raydc.core.objectives.objective import Minibatch
from raydc.core.training.rows import RowStore

_PREFIX = "snapshot."


@dataclass
class Snapshot:
    """Encoder, centers and leaf frequencies at the last refresh."""

    encoder: nn.Module
    centers_KL: Tensor
    frequencies_K: Tensor
    """(K,) float64: f_j, the sum of w_i q_ij over all rows of all ranks."""

    z_NL: Tensor | None = None
    """(N, L) latents of this rank's resident rows, as `compact` keeps them."""

    leaves_N: Tensor | None = None
    """(N,) int64 hard assignment of this rank's resident rows."""

    @torch.no_grad()
    def codes(self, batch: Minibatch, arithmetic: str) -> Tensor:
        """Return the (n, L) float32 latents of a batch under the snapshot's encoder."""
        if self.z_NL is not None and batch.positions_N is not None:
            return self.z_NL[batch.positions_N].float()
        return encode(self.encoder, batch.x_ND, arithmetic)

    @torch.no_grad()
    def leaves(self, batch: Minibatch, kernel: Kernel, arithmetic: str) -> Tensor:
        """Return the (n,) int64 hard assignment of a batch under the snapshot."""
        if self.leaves_N is not None and batch.positions_N is not None:
            return self.leaves_N[batch.positions_N]
        return log_soft_assign(self.codes(batch, arithmetic), self.centers_KL, kernel).argmax(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Return what `from_tensors` needs; nothing of one rank alone."""
        encoder = {f"{_PREFIX}encoder.{name}": t for name, t in self.encoder.state_dict().items()}
        return encoder | {f"{_PREFIX}centers": self.centers_KL, f"{_PREFIX}frequencies": self.frequencies_K}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], encoder: nn.Module) -> "Snapshot":
        """Return the snapshot that `tensors` gave, on the device of an encoder of the same shape."""
        own = {name.removeprefix(_PREFIX): t for name, t in tensors.items()}
        frozen = copy.deepcopy(encoder).eval()
        frozen.load_state_dict({n.removeprefix("encoder."): t for n, t in own.items() if n.startswith("encoder.")})
        device = next(encoder.parameters()).device
        return cls(frozen, own["centers"].to(device), own["frequencies"].to(device))


@torch.no_grad()
def encode(encoder: nn.Module | None, x_ND: Tensor, arithmetic: str) -> Tensor:
    """Return the (n, L) float32 latents of preprocessed rows; the rows themselves where there is no encoder."""
    if encoder is None:
        return x_ND
    with precision(x_ND.device, arithmetic):
        z: Tensor = encoder(x_ND)
        return z.float()


def compact(z_NL: Tensor) -> Tensor:
    """Return latents in bf16 where they lose nothing by it, as those of layers that compute in bf16; else as they are.

    To be kept for all rows they take half the memory.
    """
    half = z_NL.bfloat16()
    return half if torch.equal(half.float(), z_NL) else z_NL


class Refresh:
    """The pass that makes a snapshot of encoder and centers, with f over all rows of all ranks.

    f_j = sum_i w_i q_ij in float64: a float32 sum stands still at 2^24 rows.
    """

    def __init__(
        self,
        encoder: nn.Module,
        centers_KL: Tensor,
        kernel: Kernel,
        previous: Snapshot | None,
        keep: Callable[[Snapshot], None],
        arithmetic: str,
        expected_rows: int = 0,
    ) -> None:
        """Make a pass under `encoder` and centers; `keep` is given the snapshot at its end.

        `expected_rows` are about as many as there will be to keep; 0 if that is not known.
        """
        self._encoder, self._centers, self._kernel = encoder, centers_KL.detach(), kernel
        self._previous, self._keep, self._arithmetic = previous, keep, arithmetic
        self._expected_rows = expected_rows
        self._f = torch.zeros(len(centers_KL), dtype=torch.float64, device=centers_KL.device)
        self._sizes = torch.zeros_like(self._f)
        # Weights of the rows, of the changed ones, and of the largest q.
        self._scalars = torch.zeros(3, dtype=torch.float64, device=centers_KL.device)
        self._kept_z: RowStore | None = None
        self._kept_leaves: RowStore | None = None
        self._resident = True

    def add(self, batch: Minibatch) -> None:
        """Count rows of this rank."""
        z = encode(self._encoder, batch.x_ND, self._arithmetic)
        q = log_soft_assign(z, self._centers, self._kernel).exp()
        top, leaves = q.max(dim=1)
        # In double before the product: f is a sum over all rows.
        weights = batch.weights_N.double()
        self._f += weights @ q.double()
        self._sizes.index_add_(0, leaves, weights)
        changed = weights
        if self._previous is not None:
            changed = weights * (self._previous.leaves(batch, self._kernel, self._arithmetic) != leaves)
            # Its codes are as large as those that take their place, and its leaves are known.
            self._previous.z_NL = None
        self._scalars += torch.stack([weights.sum(), changed.sum(), weights @ top.double()])
        self._resident = batch.positions_N is not None
        if self._resident:
            z = compact(z)
            if self._kept_z is None or self._kept_leaves is None:
                self._kept_z = RowStore(z.shape[1:], z.dtype, self._expected_rows, z.device)
                self._kept_leaves = RowStore([], leaves.dtype, self._expected_rows, z.device)
            self._kept_z.add(z)
            self._kept_leaves.add(leaves)

    def sums(self) -> Tensor:
        """Return f, the sizes of the leaves and the three scalars as one tensor."""
        return torch.cat([self._f, self._sizes, self._scalars])

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Keep the snapshot; return changed, top_q, empty and largest_share (see raydc.core.objectives.objective)."""
        num_leaves = len(self._f)
        f, sizes, (count, changed, top) = sums[:num_leaves], sums[num_leaves:-3], sums[-3:].tolist()
        snapshot = Snapshot(copy.deepcopy(self._encoder).eval(), self._centers.clone(), f)
        if self._resident:
            empty = torch.empty((0, self._centers.shape[1]), device=f.device)
            snapshot.z_NL = empty if self._kept_z is None else self._kept_z.take()
            snapshot.leaves_N = empty[:, 0].long() if self._kept_leaves is None else self._kept_leaves.take()
        self._keep(snapshot)
        return {
            "changed": changed / count,
            "top_q": top / count,
            "empty": int((sizes == 0).sum()),
            "largest_share": float(sizes.max()) / count,
        }
