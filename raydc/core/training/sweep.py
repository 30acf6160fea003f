"""One pretraining, then k-means and refinement for each of several K, with the criteria of each.

Letters: N rows, K leaves, D width of a preprocessed row, L width of the code (D where there is no encoder).
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raydc.core.hashing import stream_seed
from raydc.core.metrics import scores as metrics
from raydc.core.metrics.choose_k import Loss, calinski_harabasz, generalizability, stability
from raydc.core.metrics.neighbor_agreement import Neighbors, agreement, nearest_neighbors
from raydc.core.metrics.partition_stats import Tally
from raydc.core.models.preprocess import Preprocess
from raydc.core.objectives.dec import divergence, log_target
from raydc.core.objectives.kernel import log_soft_assign
from raydc.core.objectives.snapshot import encode
from raydc.core.process import block_rows
from raydc.core.search.nearest import own_and_other
from raydc.core.training import checkpoint
from raydc.core.training.collectives import Ranks
from raydc.core.training.context import Context
from raydc.core.training.fit import Fitted, fit, pretrain
from raydc.core.training.rows import Rows
from raydc.core.training.settings import FitSettings, SweepSettings
from raydc.core.training.state import Clustering

_RESULTS = "sweep.json"
"""File of a checkpoint with the criteria of every K that is done."""

_BASELINE_ROWS_PER_LEAF = 20
"""Rows for each leaf of the k-means on raw rows, a baseline that every fit makes and a sweep has no use for."""


@dataclass(frozen=True)
class Sample:
    """Rows of all ranks on rank 0, in the order of their keys; no rows on the others."""

    x_ND: Tensor
    """(n, D) float32 preprocessed rows, on the CPU."""

    classes_N: npt.NDArray[np.int64] | None
    """A number for each known class, -1 for an unknown one; None where there are no classes."""


def sweep(
    rows: Rows,
    held_out: Rows,
    sample: Sample,
    preprocess: Preprocess,
    settings: FitSettings,
    plan: SweepSettings,
    context: Context,
) -> list[dict[str, Any]]:
    """Return the criteria of each K, in the order of `plan.num_leaves`, going on from the last checkpoint.

    A checkpoint holds the pretrained state and the criteria of every K that is done: an interrupted sweep does at most
    one K again. The kernel of each K is calibrated to `target_top_q` of that K, see there.

    Args:
        rows: this rank's share of the training rows.
        held_out: its share of the rows that are left out of pretraining, k-means and refinement.
        sample: of the training rows, for stability, neighbors and known classes.
        preprocess: the fixed map of raw rows.
        settings: the same on every rank; its number of leaves is that for which its target_top_q was set.
        plan: the K, and how the criteria are measured.
        context: the launcher.

    Raises:
        ValueError: fewer rows than leaves, or a checkpoint of other settings.
        FloatingPointError: a loss was not finite.
    """
    if rows.num_rows < max(plan.num_leaves):
        raise ValueError(f"{max(plan.num_leaves)} leaves need at least as many rows, {rows.num_rows} are trained on")
    last = context.latest_checkpoint()
    entries = _entries(last)
    state = pretrain(rows, preprocess, settings, _From(context, last))
    neighbors = _neighbors(sample, plan)
    with tempfile.TemporaryDirectory(prefix="raydc-sweep-") as name:
        base = Path(name)
        checkpoint.save(base, *state)
        for k in plan.num_leaves:
            if any(e["k"] == k for e in entries):
                continue
            started = time.perf_counter()
            fitted = fit(rows, preprocess, _settings_of(settings, k), _From(context, base, num_leaves=k))
            entry = _criteria(rows, held_out, fitted, preprocess, settings, context)
            if context.rank == 0:
                entry |= _on_sample(sample, neighbors, fitted, settings, plan, k)
            entries.append({"k": k, **entry, "seconds": time.perf_counter() - started})
            (base / _RESULTS).write_text(json.dumps(entries))
            context.report({"phase": "sweep", **entries[-1]}, base if context.rank == 0 else None)
    return sorted(entries, key=lambda e: plan.num_leaves.index(e["k"]))


def target_top_q(settings: FitSettings, num_leaves: int) -> float:
    """Return the mean largest q to which the kernel is calibrated at this K.

    A target of .28 for 10 leaves is 3.5 times the mean share of the other nine; the same number would be below the
    floor of 1/K at K = 3, and sharper than before at K = 100. So the ratio of the largest share to the mean of the
    others is what stays: r = t / [(1 - t) / (K0 - 1)] and t(K) = r / (r + K - 1), with t and K0 those of the settings.
    """
    t, k0 = settings.refine.target_top_q, settings.cluster.num_leaves
    ratio = t * (k0 - 1) / (1 - t)
    return ratio / (ratio + num_leaves - 1)


class _From:
    """The launcher's Context, with another last checkpoint; for one K, no checkpoints of the fit itself are kept."""

    def __init__(self, context: Context, last: Path | None, num_leaves: int | None = None) -> None:
        self.rank, self.world_size, self.device = context.rank, context.world_size, context.device
        self._context, self._last, self._num_leaves = context, last, num_leaves

    def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        """Pass the metrics on."""
        if self._num_leaves is None:
            self._context.report(metrics, checkpoint_dir)
        else:
            self._context.report(metrics | {"num_leaves": self._num_leaves})

    def latest_checkpoint(self) -> Path | None:
        """Return the checkpoint to go on from."""
        return self._last

    def should_checkpoint(self) -> bool:
        """Return whether the launcher wants one; never for one K, whose fit keeps none."""
        return self._num_leaves is None and self._context.should_checkpoint()


def _entries(last: Path | None) -> list[dict[str, Any]]:
    if last is None or not (last / _RESULTS).exists():
        return []
    entries: list[dict[str, Any]] = json.loads((last / _RESULTS).read_text())
    return entries


def _settings_of(settings: FitSettings, num_leaves: int) -> FitSettings:
    return replace(
        settings,
        # The fit of one K keeps none.
        checkpoint_seconds=None,
        cluster=replace(settings.cluster, num_leaves=num_leaves),
        refine=replace(settings.refine, target_top_q=target_top_q(settings, num_leaves)),
        baseline_rows=min(settings.baseline_rows, max(2000, _BASELINE_ROWS_PER_LEAF * num_leaves)),
    )


def _shared_encoder(fitted: Fitted, device: torch.device) -> nn.Module | None:
    """Return the encoder as pretraining left it: the space in which every K is measured."""
    baseline = fitted.baselines.get("autoencoder_kmeans")
    return None if baseline is None or baseline.encoder is None else baseline.encoder.to(device)


@dataclass(frozen=True)
class _Spaces:
    """The rows in two spaces: that of a fitted clustering, and the one that every K shares."""

    clustering: Clustering
    shared: nn.Module | None
    preprocess: Preprocess
    block_rows: int

    def points(self, rows: Rows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the (n, L) points of rows in the fitted and in the shared space, and their (n,) weights."""
        for batch in rows.blocks(self.block_rows):
            x = self.preprocess(batch.x_ND)
            fitted, shared = encode(self.clustering.encoder, x, "float32"), encode(self.shared, x, "float32")
            yield fitted, shared, batch.weights_N.double()

    def leaves(self, rows: Rows, width: int, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        """Return f (K,), the rows of each leaf (K,) and their sum in the shared space (K, `width`), of all ranks."""
        clustering, num_leaves = self.clustering, len(self.clustering.centers_KL)
        f_K = torch.zeros(num_leaves, dtype=torch.float64, device=ranks.device)
        rows_K, sums_KL = torch.zeros_like(f_K), f_K.new_zeros((num_leaves, width))
        for z, code, weights in self.points(rows):
            leaf, _ = clustering.assign(z)
            f_K += weights @ log_soft_assign(z, clustering.centers_KL, clustering.kernel).exp().double()
            rows_K += torch.bincount(leaf, minlength=num_leaves)
            sums_KL.index_add_(0, leaf, code.double())
        return ranks.sum(f_K), ranks.sum(rows_K), ranks.sum(sums_KL)

    def loss(self, z_NL: Tensor, weights_N: Tensor, f_K: Tensor) -> Tensor:
        """Return the weight of rows, and the weighted sums of their KL(P || Q) and of its square, (3,)."""
        log_q = log_soft_assign(z_NL, self.clustering.centers_KL, self.clustering.kernel)
        kl = divergence(log_target(log_q, f_K), log_q).double()
        return torch.stack([weights_N.sum(), (weights_N * kl).sum(), (weights_N * kl * kl).sum()])


@torch.no_grad()
def _criteria(
    rows: Rows, held_out: Rows, fitted: Fitted, preprocess: Preprocess, settings: FitSettings, context: Context
) -> dict[str, Any]:
    """Return the criteria that are made from sums over all rows of all ranks."""
    ranks = Ranks(context.rank, context.world_size, context.device)
    clustering, shared = fitted.clustering, _shared_encoder(fitted, ranks.device)
    spaces = _Spaces(clustering, shared, preprocess, block_rows(ranks.device, settings.block_rows))
    f_K, rows_K, sums_KL = spaces.leaves(
        rows, settings.autoencoder.latent_dim if shared is not None else rows.dim, ranks
    )
    used = torch.nonzero(rows_K > 0)[:, 0]
    centers = (sums_KL[used] / rows_K[used, None]).float()
    place_K = torch.full((len(rows_K),), -1, device=ranks.device)
    place_K[used] = torch.arange(len(used), device=ranks.device)
    tally, losses = Tally(num_groups=len(used)), torch.zeros(2, 3, dtype=torch.float64, device=ranks.device)
    for z, code, weights in spaces.points(rows):
        group = place_K[clustering.assign(z)[0]]
        own, other = own_and_other(code, centers, group)
        tally.add(group.cpu().numpy(), own.cpu().numpy(), other.cpu().numpy(), None)
        losses[0] += spaces.loss(z, weights, f_K)
    for z, _, weights in spaces.points(held_out):
        losses[1] += spaces.loss(z, weights, f_K)
    tally = _summed(tally, ranks)
    inside = metrics.internal(tally, centers.cpu().numpy())
    train, apart = (Loss(*values) for values in ranks.sum(losses).tolist())
    g = generalizability(train, apart)
    return {
        "inertia": float(fitted.leaves.sse_K.sum()),
        "silhouette": inside["silhouette"] if len(used) > 1 else None,
        "davies_bouldin": inside["davies_bouldin"],
        "calinski_harabasz": calinski_harabasz(tally, centers.double().cpu().numpy()),
        "size_max_over_mean": float(rows_K.max() / rows_K.mean()),
        "empty": len(rows_K) - len(used),
        "train_loss": train.mean if train.weight else None,
        "held_out_loss": apart.mean if apart.weight else None,
        "g": None if g is None else g[0],
        "g_error": None if g is None else g[1],
        "alpha": clustering.kernel.alpha,
        "epochs": sum(h["phase"] == "refine" for h in fitted.history),
    }


def _summed(tally: Tally, ranks: Ranks) -> Tally:
    parts = [tally.rows_K.astype(np.float64), tally.distance_K, tally.squared_K, tally.silhouette_K]
    rows, distance, squared, silhouette = ranks.sum(torch.from_numpy(np.stack(parts))).numpy()
    return Tally(
        num_groups=tally.num_groups,
        rows_K=rows.round().astype(np.int64),
        distance_K=distance,
        squared_K=squared,
        silhouette_K=silhouette,
    )


def _neighbors(sample: Sample, plan: SweepSettings) -> Neighbors | None:
    """Return the neighbors among the first rows of the sample, on the rank that has it."""
    size = min(len(sample.x_ND), plan.neighbor_rows)
    if size <= plan.num_neighbors:
        return None
    picked = sample.x_ND[_spread(len(sample.x_ND), size)]
    return nearest_neighbors(picked.numpy(), num=plan.num_neighbors, max_queries=plan.neighbor_queries)


@torch.no_grad()
def _on_sample(
    sample: Sample,
    neighbors: Neighbors | None,
    fitted: Fitted,
    settings: FitSettings,
    plan: SweepSettings,
    num_leaves: int,
) -> dict[str, Any]:
    """Return the criteria that need rows side by side; on rank 0."""
    clustering = fitted.clustering
    device = clustering.centers_KL.device
    shared = _shared_encoder(fitted, device)
    leaf, code = _labeled(sample.x_ND, clustering, shared, settings.block_rows, device)
    entry: dict[str, Any] = {"sample_rows": len(leaf)}
    if neighbors is not None:
        picked = leaf[_spread(len(leaf), min(len(leaf), plan.neighbor_rows))]
        entry["neighbor_agreement"] = agreement(picked, neighbors).score
    few = code[_spread(len(code), min(len(code), plan.stability_rows))]
    if len(few) >= 8 * num_leaves:
        seed = stream_seed(settings.seed, 11)
        entry["stability"], entry["stability_error"] = stability(
            few, num_leaves, num_repeats=plan.num_repeats, seed=seed, how=settings.cluster.start
        )
    if sample.classes_N is not None and (sample.classes_N >= 0).any():
        known = sample.classes_N >= 0
        _, classes = np.unique(sample.classes_N[known], return_inverse=True)
        scores = metrics.external(metrics.counted(leaf[known], classes))
        entry |= {name: scores[name] for name in ("acc", "nmi", "ari")}
    return entry


def _labeled(
    x_ND: Tensor, clustering: Clustering, shared: nn.Module | None, most_rows: int, device: torch.device
) -> tuple[npt.NDArray[np.int64], Tensor]:
    leaves, codes = [], []
    for block in x_ND.split(block_rows(device, most_rows)):
        x = block.to(device)
        leaves.append(clustering.assign(encode(clustering.encoder, x, "float32"))[0].cpu())
        codes.append(encode(shared, x, "float32").cpu())
    return torch.cat(leaves).numpy(), torch.cat(codes)


def _spread(num_rows: int, size: int) -> Tensor:
    return torch.from_numpy(np.linspace(0, num_rows - 1, size).astype(np.int64))
