"""Fit an array in this process: no Ray, no files. Letters: N rows, D width of a row, K leaves, L width of the code.

>>> import numpy as np
>>> from raydc.core.api import fit_array
>>> generator = np.random.default_rng(0)
>>> centers = 10 * generator.normal(size=(3, 8))
>>> x = np.repeat(centers, 50, axis=0) + generator.normal(size=(150, 8))
>>> result = fit_array(x, num_clusters=3, objective="kmeans")
>>> np.bincount(result.labels).tolist()
[50, 50, 50]
>>> result.linkage.shape, result.predict(x[:2]).shape
((2, 4), (2,))
>>> sorted(np.bincount(result.levels([2])[2]).tolist())
[50, 100]
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raydc.core.models.preprocess import Moments, Preprocess
from raydc.core.objectives.table import ObjectiveName, info
from raydc.core.process import block_rows
from raydc.core.search.knn import Metric, Neighbors, Shard, prepare, search
from raydc.core.training import checkpoint
from raydc.core.training.collectives import Ranks
from raydc.core.training.context import LocalContext
from raydc.core.training.fit import Fitted, fit, pretrain
from raydc.core.training.neighbor_pairs import NeighborPairs
from raydc.core.training.rows import ResidentRows
from raydc.core.training.settings import AutoencoderSettings, FitSettings
from raydc.core.training.state import Clustering
from raydc.core.tree.levels import levels
from raydc.core.tree.linkage import agglomerate
from raydc.core.tree.order import in_tree_order

Array = npt.NDArray[Any] | Tensor

_CHECK_ROWS = 2**16
"""Rows looked at together for numbers that are not finite."""

_NO_CHECKPOINTS = 2**31 - 1
"""Epochs between two checkpoints of a fit that keeps none."""


@dataclass(frozen=True, kw_only=True)
class ArrayClustering:
    """Labels of N rows, the tree above their K leaves, and what labels other rows alike."""

    labels: npt.NDArray[np.int64]
    """(N,) leaf of each row, 0..K-1. Neighboring numbers are neighboring leaves of the tree."""

    confidence: npt.NDArray[np.float32]
    """(N,) soft assignment of each row to its leaf."""

    centers: npt.NDArray[np.float32]
    """(K, L) centers in the clustering space."""

    weights: npt.NDArray[np.float64]
    """(K,) weight of the rows of each leaf."""

    linkage: npt.NDArray[np.float64]
    """(K-1, 4) Ward tree of the leaves, as scipy.cluster.hierarchy has it."""

    history: list[dict[str, Any]]
    """One entry for each epoch, and one for the k-means between them."""

    clustering: Clustering
    """Encoder, centers and what decides a leaf."""

    preprocess: Preprocess
    """The map of raw rows."""

    dim: int
    """D."""

    @property
    def num_leaves(self) -> int:
        """K: at most `num_clusters`, since leaves without a row are left out."""
        return len(self.centers)

    def transform(self, x: Array) -> npt.NDArray[np.float32]:
        """Return the (n, L) float32 points of (n, D) raw rows in the clustering space.

        Raises:
            ValueError: x is not a matrix of the width of the fit, or holds a number that is not finite.
        """
        parts = [z.cpu().numpy() for z in self._blocks(x)]
        return np.concatenate(parts) if parts else np.empty((0, self.centers.shape[1]), np.float32)

    def predict(self, x: Array) -> npt.NDArray[np.int64]:
        """Return the (n,) leaf of raw rows; see `transform` for the argument and errors."""
        return self.predict_with_confidence(x)[0]

    def predict_with_confidence(self, x: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the (n,) leaf of raw rows and its (n,) soft assignment; see `transform`."""
        leaves, confidence = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for z in self._blocks(x):
            leaf, top = self.clustering.label(z)
            leaves.append(leaf.cpu().numpy())
            confidence.append(top.float().cpu().numpy())
        return np.concatenate(leaves), np.concatenate(confidence)

    def levels(self, sizes: Sequence[int], min_population: float | None = None) -> dict[int, npt.NDArray[np.int32]]:
        """Return coarser, nested labels of the rows of the fit: (N,) groups, by their number.

        Args:
            sizes: numbers of groups, each from 1 to K.
            min_population: smallest share of the total weight that a group may hold.

        Raises:
            ValueError: a size or the share is out of range.
        """
        groups = levels(self.linkage, sizes, self.weights, min_population)
        return {size: group_K[self.labels] for size, group_K in groups.items()}

    def _blocks(self, x: Array) -> Iterator[Tensor]:
        rows, device = _matrix(x), self.clustering.centers_KL.device
        if rows.shape[1] != self.dim:
            raise ValueError(f"x has rows of {rows.shape[1]} numbers, the fit had {self.dim}")
        _refuse_bad(rows, self.preprocess)
        size = block_rows(device, 8192)
        for start in range(0, len(rows), size):
            yield self.clustering.encode(self.preprocess(rows[start : start + size].to(device)))


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretrained autoencoder, from which several fits of the same rows may start."""

    autoencoder: AutoencoderSettings
    dim: int
    """D."""

    tensors: dict[str, Tensor]
    """State after pretraining, by name."""

    values: dict[str, Any]
    """The rest of the state, as JSON values."""


def fit_array(
    x: Array,
    num_clusters: int,
    *,
    objective: ObjectiveName = "dec",
    seed: int = 0,
    sample_weight: npt.ArrayLike | None = None,
    keys: npt.NDArray[np.int64] | None = None,
    preprocess: str | Preprocess = "none",
    settings: FitSettings | None = None,
    pretrained: Pretrained | None = None,
    num_neighbors: int = 10,
    neighbor_metric: Metric = "cosine",
    device: str | torch.device = "cpu",
    on_report: Callable[[dict[str, Any]], None] | None = None,
) -> ArrayClustering:
    """Return the clustering of the rows of an array, fitted in this process.

    The fit is that of a whole run: pretraining, k-means over all rows, training on the objective. The same array,
    settings and seed give the same labels. All rows stay in memory. temi and icon look up exact nearest neighbors,
    2 N^2 D operations.

    Args:
        x: (N, D) float16, float32 or float64 rows. float64 is converted to float32.
        num_clusters: K, at most N.
        objective: a name of raydc.core.objectives.table, such as `dec`, `idec`, `icon`, `autoencoder` or `kmeans`.
        seed: of every random choice.
        sample_weight: (N,) row weights, not negative; 1 each by default.
        keys: (N,) int64 rising names of the rows, whose hash makes random choices; 0..N-1 by default.
        preprocess: `none`, `l2`, `standardize` or `scale`, whose statistics come from x; or a map that is given.
        settings: everything else, such as epochs; the defaults if None. The arguments replace what it says of them.
        pretrained: an autoencoder from `pretrain_array`; by default one is trained.
        num_neighbors: neighbors of each row, for temi and icon.
        neighbor_metric: `cosine` or `l2` among the preprocessed rows, for temi and icon.
        device: where to compute, such as `cpu` or `cuda`.
        on_report: called with each entry of the history.

    Returns:
        Labels, confidence, centers, tree and history; `predict` labels other rows.

    Raises:
        ValueError: x or sample_weight does not fit, K exceeds N, or a name or setting is unknown.
        FloatingPointError: a loss was not finite; the message names the epoch and the step.
    """
    settings = _settings(settings, objective, num_clusters, seed)
    x = _matrix(x)
    rows, mapped = _rows(x, sample_weight, keys, preprocess, torch.device(device))
    pairs = None
    if settings.needs_pairs:
        rows.neighbors_NM = _neighbors(rows, mapped, num_neighbors, neighbor_metric)
        pairs = NeighborPairs(rows, rows.ranks)
    with tempfile.TemporaryDirectory(prefix="raydc-pretrained-") as folder:
        start_from = _start(pretrained, Path(folder), settings, rows.dim)
        context = LocalContext(device=rows.ranks.device, start_from=start_from, on_report=on_report)
        fitted = fit(rows, mapped, settings, context, pairs)
    unlabeled = _with_tree(fitted, mapped, rows.dim, settings.seed)
    labels, confidence = unlabeled.predict_with_confidence(x)
    return replace(unlabeled, labels=labels, confidence=confidence)


def pretrain_array(
    x: Array,
    *,
    seed: int = 0,
    sample_weight: npt.ArrayLike | None = None,
    keys: npt.NDArray[np.int64] | None = None,
    preprocess: str | Preprocess = "none",
    settings: FitSettings | None = None,
    device: str | torch.device = "cpu",
    on_report: Callable[[dict[str, Any]], None] | None = None,
) -> Pretrained:
    """Return an autoencoder pretrained on the rows of an array, for several calls of `fit_array` on the same rows.

    A fit from it is the same as one that pretrains by itself, with the same arguments.

    Args:
        x: (N, D) rows.
        seed: of every random choice.
        sample_weight: (N,) row weights.
        keys: (N,) int64 rising names of the rows.
        preprocess: as for `fit_array`.
        settings: its `autoencoder`, `pretrain` and `precision` are used.
        device: where to compute.
        on_report: called with each entry of the history.

    Raises:
        ValueError: x or sample_weight does not fit, or the objective of the settings trains no autoencoder.
        FloatingPointError: a loss was not finite.
    """
    chosen = settings if settings is not None else FitSettings()
    if not chosen.learns:
        raise ValueError(f"objective={chosen.objective} trains no autoencoder: there is nothing to pretrain")
    chosen = _settings(chosen, chosen.objective, chosen.cluster.num_leaves, seed)
    rows, mapped = _rows(x, sample_weight, keys, preprocess, torch.device(device))
    context = LocalContext(device=rows.ranks.device, on_report=on_report)
    tensors, values = pretrain(rows, mapped, chosen, context)
    return Pretrained(autoencoder=chosen.autoencoder, dim=rows.dim, tensors=tensors, values=values)


def _settings(settings: FitSettings | None, objective: str, num_clusters: int, seed: int) -> FitSettings:
    info(objective)
    settings = settings if settings is not None else FitSettings()
    return replace(
        settings,
        objective=objective,
        seed=seed,
        cluster=replace(settings.cluster, num_leaves=num_clusters),
        checkpoint_epochs=_NO_CHECKPOINTS,
        checkpoint_seconds=None,
        fingerprint="",
    )


def _matrix(x: Array) -> Tensor:
    """Return the rows as a float16 or float32 tensor; a view of x where its type allows that."""
    # Views and read-only memory are copied; torch takes neither.
    rows = x if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements=["C", "W"]))
    if rows.ndim != 2:
        raise ValueError(f"x must be a matrix (N, D), got shape {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise ValueError(f"x must hold float16, float32 or float64, got {rows.dtype}")
    rows = rows if rows.dtype in (torch.float16, torch.float32) else rows.float()
    starts = range(0, len(rows), _CHECK_ROWS)
    bad = torch.cat([torch.empty(0, dtype=torch.bool), *(_not_finite(rows[s : s + _CHECK_ROWS]) for s in starts)])
    if bool(bad.any()):
        first = int(torch.nonzero(bad)[0])
        raise ValueError(f"x has {int(bad.sum())} rows that are not finite, the first is row {first}: leave them out")
    return rows


def _not_finite(rows_ND: Tensor) -> Tensor:
    return ~torch.isfinite(rows_ND).all(dim=1).cpu()


def _refuse_bad(rows_ND: Tensor, preprocess: Preprocess) -> None:
    """Refuse rows that a run would call bad: too large for float32 distances, or under l2 of no usable norm."""
    guard = preprocess.guard(rows_ND.shape[1])
    for start in range(0, len(rows_ND), _CHECK_ROWS):
        block = rows_ND[start : start + _CHECK_ROWS].numpy(force=True)
        reasons = np.full(len(block), "", "U16")
        guard.mark(block, reasons)
        if len(bad := np.flatnonzero(reasons != "")):
            raise ValueError(
                f"x has rows that cannot be clustered, the first is row {start + bad[0]}: {reasons[bad[0]]}"
            )


def _rows(
    x: Array,
    sample_weight: npt.ArrayLike | None,
    keys: npt.NDArray[np.int64] | None,
    preprocess: str | Preprocess,
    device: torch.device,
) -> tuple[ResidentRows, Preprocess]:
    rows = _matrix(x)
    weights = torch.ones(len(rows))
    if sample_weight is not None:
        weights = torch.from_numpy(np.array(sample_weight, np.float32))
        if weights.shape != (len(rows),):
            raise ValueError(f"sample_weight must have shape ({len(rows)},), got {tuple(weights.shape)}")
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not bool(weights.sum() > 0):
            raise ValueError("sample_weight must be finite and not negative, and one of them positive")
    key_N = torch.arange(len(rows)) if keys is None else torch.from_numpy(np.array(keys, np.int64))
    if key_N.shape != (len(rows),) or bool((key_N[1:] <= key_N[:-1]).any()) or bool((key_N < 0).any()):
        raise ValueError(f"keys must be {len(rows)} rising numbers from 0 on")
    mapped = preprocess
    if isinstance(mapped, str):
        mapped = Preprocess.fit(mapped, [(0, rows.shape[1], 1.0)], _moments(rows))
    if mapped.method == "l2" and bool((zero := (rows == 0).all(dim=1)).any()):
        first = int(torch.nonzero(zero)[0])
        raise ValueError(f"x has {int(zero.sum())} rows of zeros, the first is row {first}: l2 needs a direction")
    _refuse_bad(rows, mapped)
    return ResidentRows(rows.to(device), key_N, weights, Ranks(device=device)), mapped


def _moments(rows_ND: Tensor) -> Moments:
    """Return the moments of all rows, block by block: in float64 they would take up to four times the memory."""
    moments = Moments.from_rows(rows_ND[:0].numpy(force=True))
    for start in range(0, len(rows_ND), 8192):
        moments = moments.merge(Moments.from_rows(rows_ND[start : start + 8192].numpy(force=True)))
    return moments


def _neighbors(rows: ResidentRows, preprocess: Preprocess, num: int, metric: Metric) -> Tensor:
    """Return the (N, M) keys of each row's nearest neighbors among the preprocessed rows."""
    if not 1 <= num < rows.num_rows:
        raise ValueError(f"num_neighbors must be from 1 to {rows.num_rows - 1}, the number of other rows, got {num}")
    x = torch.cat([preprocess(batch.x_ND).cpu() for batch in rows.blocks(8192)])
    keys, points = rows.keys_N.numpy(), prepare(x.numpy(), metric)
    nearest = search(keys, points, Shard.from_rows(keys, points), Neighbors.none(len(x), num), metric=metric)
    return torch.from_numpy(nearest.keys_QM)


def _start(pretrained: Pretrained | None, folder: Path, settings: FitSettings, dim: int) -> Path | None:
    """Return a folder with the pretrained state as a checkpoint; None where the fit pretrains by itself, or not at all.

    Raises:
        ValueError: it is that of another autoencoder.
    """
    if pretrained is None or not settings.learns:
        return None
    if (pretrained.autoencoder, pretrained.dim) != (settings.autoencoder, dim):
        raise ValueError(
            f"pretrained has rows of {pretrained.dim} numbers and {pretrained.autoencoder}, the fit {dim} and "
            f"{settings.autoencoder}: pretrain with the settings of the fit"
        )
    checkpoint.save(folder, pretrained.tensors, pretrained.values)
    return folder


def _with_tree(fitted: Fitted, preprocess: Preprocess, dim: int, seed: int) -> ArrayClustering:
    """Return the clustering with its leaves in the order of their tree, and no labels yet."""
    clustering, leaves = fitted.clustering, fitted.leaves
    weights, means = leaves.weights_K.cpu().numpy(), leaves.means(clustering.centers_KL).cpu().numpy()
    sse = leaves.sse_around_means(clustering.centers_KL).cpu().numpy()
    tree = agglomerate(means, weights, sse, seed=seed)
    linkage, places = in_tree_order(tree.merges, weights[tree.leaves])
    order = tree.leaves[places]
    ordered = clustering.reordered(torch.from_numpy(order))
    return ArrayClustering(
        labels=np.empty(0, np.int64),
        confidence=np.empty(0, np.float32),
        centers=ordered.centers_KL.cpu().numpy(),
        weights=weights[order],
        linkage=linkage,
        history=fitted.history,
        clustering=ordered,
        preprocess=preprocess,
        dim=dim,
    )
