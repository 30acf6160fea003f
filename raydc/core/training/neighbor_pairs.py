"""A neighbor for each row of a step, wherever it lies. Letters: n rows of this rank's step, B of all ranks', M, D."""

import torch
from torch import Tensor

from raydc.core.hashing import hash_keys, stream_seed
from raydc.core.training.collectives import Ranks
from raydc.core.training.rows import Batch, ResidentRows


class NeighborPairs:
    """Draws one of its neighbors for each row, by hash of (row key, seed): the same one on any number of ranks.

    A neighbor may be resident on another rank. The ranks put together the keys that they look for, each fills in the
    rows that it has, and the sum of all is what everyone asked for: in each step two sums, of B and of B (D + 2)
    float32 numbers. One rank alone looks up its own rows.
    """

    def __init__(self, rows: ResidentRows, ranks: Ranks) -> None:
        """Serve the neighbors of resident rows that were collected with them.

        Raises:
            ValueError: the rows came without neighbors.
        """
        if rows.neighbors_NM is None:
            raise ValueError("the rows came without their neighbors")
        self._rows, self._ranks = rows, ranks
        self._keys, self._neighbors = rows.keys_N, rows.neighbors_NM

    def __call__(self, batch: Batch, seed: int) -> Batch:
        """Return the positive of each row, in their order.

        Raises:
            ValueError: a neighbor is no row of any rank.
        """
        assert batch.positions_N is not None
        choice = hash_keys(batch.keys_N, stream_seed(seed, 11)).remainder(self._neighbors.shape[1]).cpu()
        wanted = self._neighbors[batch.positions_N.cpu(), choice]
        if self._ranks.world_size == 1:
            places, is_mine = self._places(wanted)
            if not bool(is_mine.all()):
                raise _unknown_neighbors(wanted[~is_mine])
            positives = self._rows.take(places)
            return Batch(positives.keys_N, positives.x_ND, positives.weights_N)
        every, own = self._of_all_ranks(wanted)
        places, is_mine = self._places(every)
        filled = torch.zeros((len(every), self._rows.dim + 2), device=self._ranks.device)
        mine = self._rows.take(places[is_mine])
        filled[is_mine.to(filled.device)] = torch.cat(
            [mine.x_ND.float(), mine.weights_N[:, None], torch.ones_like(mine.weights_N)[:, None]], dim=1
        )
        filled = self._ranks.sum(filled)
        # Looked at on every rank alike, so that all stop together.
        if not bool((filled[:, -1] == 1.0).all()):
            raise _unknown_neighbors(every[(filled[:, -1] != 1.0).cpu()])
        filled = filled[own]
        return Batch(wanted.to(self._ranks.device), filled[:, :-2], filled[:, -2])

    def _places(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return where keys lie among this rank's, and which of them are there at all."""
        places = torch.searchsorted(self._keys, keys).clamp_max(max(len(self._keys) - 1, 0))
        is_mine = self._keys[places] == keys if len(self._keys) else torch.zeros(len(keys), dtype=torch.bool)
        return places, is_mine

    def _of_all_ranks(self, wanted: Tensor) -> tuple[Tensor, slice]:
        """Return the keys that all ranks look for, and which part of them is this rank's."""
        counts = torch.zeros(self._ranks.world_size, dtype=torch.int64)
        counts[self._ranks.rank] = len(wanted)
        counts = self._ranks.sum(counts)
        start = int(counts[: self._ranks.rank].sum())
        own = slice(start, start + len(wanted))
        every = torch.zeros(int(counts.sum()), dtype=torch.int64)
        every[own] = wanted
        return self._ranks.sum(every), own


def _unknown_neighbors(keys: Tensor) -> ValueError:
    return ValueError(
        f"{len(keys)} neighbors are no rows of the fit, such as key {int(keys[0])}: they were searched among other rows"
    )
