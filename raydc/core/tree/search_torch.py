"""The neighbor search on a torch device: the same candidates-and-floor contract as on the CPU, one product a tile.

A device sorts whole rows faster than a host sums chunks, so there are no chunks here. TF32 stays off: its products are
wrong in the fourth digit, and the floor's proof counts on float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raydc.core.tree.search import SENTINEL, Clusters, Engine, SearchOptions, frame

# Letters in this module: M clusters, X columns, D width, Q queries, B queries of a tile, L listed neighbors.

TILE_BYTES = 1 << 30
"""A tile of distances takes at most this much; a device wants larger ones than a cache does."""


@dataclass(kw_only=True)
class DeviceColumns:
    """The search side of all clusters on a device."""

    rows_XE: Tensor
    """(X, D + 2) [-2c, 1, |c|^2 + v]; with [q, |q|^2 + v, 1] one product gives the squared distance."""
    norm_X: Tensor
    inverse_weight_X: Tensor
    slot_X: np.ndarray
    column_M: np.ndarray
    block_cols: int
    origin_D: np.ndarray
    weight_unit: float
    length_unit: float
    num_stale: int = 0


def device_engine(device: str) -> Engine:
    """Return the engine that searches on a torch device."""
    return Engine(partial(lay_out, device=torch.device(device)), update, search)


def lay_out(
    clusters: Clusters, alive_M: np.ndarray, *, block_cols: int, dtype: type, device: torch.device
) -> DeviceColumns:
    """Return the columns of the live clusters on the device."""
    slot_X = np.flatnonzero(alive_M)
    origin_D, length_unit = frame(clusters, slot_X, dtype)
    column_M = np.full(len(alive_M), -1, dtype=np.int64)
    column_M[slot_X] = np.arange(len(slot_X))
    kind = torch.float32 if dtype == np.float32 else torch.float64
    columns = DeviceColumns(
        rows_XE=torch.ones((len(slot_X), clusters.center_MD.shape[1] + 2), dtype=kind, device=device),
        norm_X=torch.zeros(len(slot_X), dtype=kind, device=device),
        inverse_weight_X=torch.zeros(len(slot_X), dtype=kind, device=device),
        slot_X=slot_X,
        column_M=column_M,
        block_cols=block_cols,
        origin_D=origin_D,
        weight_unit=float(clusters.weight_M[slot_X].mean()),
        length_unit=length_unit,
    )
    _write(columns, clusters, slot_X)
    return columns


def _scaled(columns: DeviceColumns, clusters: Clusters, slot_B: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Return centers, squared norms and inverse weights in the layout's units, on the device."""
    center_BD = (clusters.center_MD[slot_B] - columns.origin_D) / columns.length_unit
    square_B = np.einsum("bd,bd->b", center_BD, center_BD) + clusters.spread_M[slot_B] / columns.length_unit**2
    inverse_B = columns.weight_unit / clusters.weight_M[slot_B]
    to = partial(torch.as_tensor, device=columns.rows_XE.device, dtype=columns.rows_XE.dtype)
    return to(center_BD), to(square_B), to(inverse_B)


def _write(columns: DeviceColumns, clusters: Clusters, slot_B: np.ndarray) -> None:
    center_BD, square_B, inverse_B = _scaled(columns, clusters, slot_B)
    at_B = torch.from_numpy(columns.column_M[slot_B]).to(columns.rows_XE.device)
    columns.rows_XE[at_B, :-2] = -2 * center_BD
    columns.rows_XE[at_B, -1] = square_B
    columns.norm_X[at_B] = square_B.sqrt()
    columns.inverse_weight_X[at_B] = inverse_B


def update(columns: DeviceColumns, clusters: Clusters, grown_B: np.ndarray, gone_B: np.ndarray) -> None:
    """Bring merged slots up to date and take dead slots out, in place."""
    _write(columns, clusters, grown_B)
    gone_at = columns.column_M[gone_B]
    gone = torch.from_numpy(gone_at).to(columns.rows_XE.device)
    columns.rows_XE[gone, :-2] = 0
    columns.rows_XE[gone, -1] = SENTINEL
    columns.slot_X[gone_at] = -1
    columns.num_stale += len(grown_B) + len(gone_B)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in true float32, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def search(
    columns: DeviceColumns, clusters: Clusters, query_Q: np.ndarray, *, options: SearchOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Return candidate neighbors of each query slot and the floor under all other clusters, as on the CPU.

    Tiles are as tall as TILE_BYTES allows where the device is not the CPU; block_rows is the least.
    """
    rows_XE = columns.rows_XE
    num_neighbors, block_rows, block_cols = options.num_neighbors, options.block_rows, columns.block_cols
    if rows_XE.device.type != "cpu":
        block_cols = max(block_cols, 1 << 17)
        block_rows = max(block_rows, TILE_BYTES // (rows_XE.element_size() * min(block_cols, len(rows_XE))))
    slot_QL = np.full((len(query_Q), num_neighbors), -1, dtype=np.int64)
    floor_Q = np.full(len(query_Q), np.inf)
    with _full_precision():
        for start in range(0, len(query_Q), block_rows):
            rows = slice(start, start + block_rows)
            slot_QL[rows], floor_Q[rows] = _search_rows(columns, clusters, query_Q[rows], num_neighbors, block_cols)
    return slot_QL, floor_Q


def _search_rows(
    columns: DeviceColumns, clusters: Clusters, query_B: np.ndarray, num: int, block_cols: int
) -> tuple[np.ndarray, np.ndarray]:
    rows_XE = columns.rows_XE
    center_BD, square_B, inverse_B = _scaled(columns, clusters, query_B)
    query_BE = torch.cat([center_BD, square_B[:, None], torch.ones_like(square_B)[:, None]], dim=1)
    norm_B = square_B.sqrt()
    slack = (center_BD.shape[1] + 12) * torch.finfo(rows_XE.dtype).eps / 2
    own_B = torch.from_numpy(columns.column_M[query_B]).to(rows_XE.device)
    best_BL = torch.empty((len(query_B), 0), dtype=rows_XE.dtype, device=rows_XE.device)
    column_BL = torch.empty((len(query_B), 0), dtype=torch.int64, device=rows_XE.device)
    floor_B = torch.full_like(square_B, torch.inf)
    for first in range(0, len(rows_XE), block_cols):
        tile = slice(first, first + block_cols)
        low_BX = query_BE @ rows_XE[tile].T
        low_BX -= slack * (norm_B[:, None] + columns.norm_X[tile]) ** 2
        low_BX.clamp_(min=0)
        if clusters.kind == "ward":
            low_BX *= (1 - slack) / (inverse_B[:, None] + columns.inverse_weight_X[tile])
        inside_B = torch.nonzero((own_B >= first) & (own_B < first + low_BX.shape[1]))[:, 0]
        low_BX[inside_B, own_B[inside_B] - first] = torch.inf
        value_BL, at_BL = low_BX.topk(min(num + 1, low_BX.shape[1]), dim=1, largest=False)
        best_BL, column_BL = torch.cat([best_BL, value_BL], dim=1), torch.cat([column_BL, at_BL + first], dim=1)
        if best_BL.shape[1] > num:
            best_BL, order_BL = best_BL.sort(dim=1)
            column_BL = column_BL.gather(1, order_BL)[:, :num]
            floor_B = torch.minimum(floor_B, best_BL[:, num])
            best_BL = best_BL[:, :num]
    slot_BL = np.full((len(query_B), num), -1, dtype=np.int64)
    slot_BL[:, : column_BL.shape[1]] = columns.slot_X[column_BL.cpu().numpy()]
    slot_BL[slot_BL == query_B[:, None]] = -1
    unit = columns.length_unit**2 * (columns.weight_unit if clusters.kind == "ward" else 1.0)
    return slot_BL, floor_B.double().cpu().numpy() * unit
