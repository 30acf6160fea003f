"""How long the training workers wait for one another before they give up: longer than the longest work of one alone.

Letters: N rows, K leaves, M fine leaves, C cells, D width.
"""

import math
from dataclasses import replace

from raydc.config import Config
from raydc.core.search.fine_leaves import num_fine_leaves
from raydc.core.search.starts import SAMPLE_FLOP, uses_tree
from raydc.core.search.tree_start import MOST_EXACT
from raydc.core.training.fit import BASELINE_ROWS_PER_LEAF
from raydc.core.training.kmeans_on_codes import start_rows
from raydc.core.training.settings import ClusterSettings

RAY_DEFAULT_SECONDS = 1800
"""Ray Train's own bound, below which no fit goes."""

_SLOW_CPU = 2e10
"""FLOP/s of a slow CPU that has other work beside; 165e9 were measured for FAISS on one thread of a server."""

_FAISS_PASSES = 26
"""25 iterations of a run, and the search that compares it with the other runs."""

_SEED_ROUNDS = 50
"""AFK-MC2, which seeds a FAISS run, looks at K^2 pairs as often."""

_FINE_PASSES = 9
"""Eight iterations of k-means inside the cells, and one search."""


def collective_timeout(config: Config, num_rows: int, dim: int, num_leaves: int | None = None) -> int:
    """Return after how many seconds a worker that waits for the others gives up; never below Ray's own bound.

    While rank 0 makes the start of k-means on its CPUs, the others wait for the centers. A fit that gave up before they
    come would be started again, and give up again. A worker that dies is seen by Ray at once, whatever the bound.

    Args:
        config: for the start, its sample and the CPUs of a worker.
        num_rows: about how many rows are trained on.
        dim: D of the rows.
        num_leaves: K, where it is not that of the settings.
    """
    seconds = waited_flop(config, num_rows, dim, num_leaves) / (_SLOW_CPU * config.fit.cpus_per_worker)
    return max(RAY_DEFAULT_SECONDS, math.ceil(seconds))


def waited_flop(config: Config, num_rows: int, dim: int, num_leaves: int | None = None) -> float:
    """Return the FLOPs of the longest work that rank 0 does alone; see `collective_timeout` for the arguments."""
    plan = replace(config.cluster, num_leaves=num_leaves or config.cluster.num_leaves)
    start = _start_flop(plan, min(num_rows, start_rows(plan)), config.encoder_widths(dim)[-1])
    if not config.learns:
        return start
    baseline = min(num_rows, max(config.evaluate.baseline_rows, BASELINE_ROWS_PER_LEAF * plan.num_leaves))
    # Its start, its moves and its iterations, whose searches are bounded one like the other.
    return max(start, _start_flop(plan, baseline, dim) + 2 * SAMPLE_FLOP)


def _start_flop(plan: ClusterSettings, num_rows: int, dim: int) -> float:
    """Return the FLOPs of `raydc.core.search.starts.first_centers` on a sample of this size."""
    leaves = plan.num_leaves
    faiss_run = 2.0 * dim * (_FAISS_PASSES * num_rows * leaves + _SEED_ROUNDS * leaves**2)
    if not uses_tree(plan.start, leaves):
        return plan.num_restarts * faiss_run
    fine = num_fine_leaves(num_rows, leaves)
    if not fine:
        return faiss_run
    cells = math.sqrt(fine)
    passes = _FINE_PASSES * 2.0 * num_rows * dim * (cells + fine / cells)
    # The exact tree looks at about 1.5 M^2 pairs; above MOST_EXACT the work of the cells grows like M.
    return passes + 3.0 * dim * fine * min(fine, MOST_EXACT)
