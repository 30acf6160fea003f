"""Which start a k-means takes, and a whole k-means of a sample. Letters: N rows, K leaves, D width of a row."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from raydc.core.search.choices import Moves, Start
from raydc.core.search.fine_leaves import num_fine_leaves
from raydc.core.search.kmeans import lloyd, start
from raydc.core.search.merge_split import SEPARATED, merge_and_split
from raydc.core.search.tree_start import tree_start

log = logging.getLogger(__name__)

FEWEST_FOR_TREE = 50
"""Leaves from which the start is a tree's by itself. Restarts find the optimum of a few leaves, and of no more."""

_SAMPLE_ITERATIONS, _SAMPLE_ROUNDS = 10, 2
SAMPLE_FLOP = 2e13
"""What the passes over a sample may cost by themselves: some minutes of one core."""

_FAISS_ITERATIONS, _MOST_SEEDED = 25, 10_000

_BLOCK_ROWS = 16384


def uses_tree(how: Start, num_leaves: int) -> bool:
    """Return whether the start is a tree's."""
    return how == "tree" or (how == "auto" and num_leaves >= FEWEST_FOR_TREE)


def least_share(moves: Moves, how: Start, num_leaves: int) -> float | None:
    """Return `merge_and_split`'s bound on what it splits; None where no moves follow the start."""
    if moves == "auto":
        moves = "separated" if uses_tree(how, num_leaves) else "none"
    return {"separated": SEPARATED, "all": 0.0, "none": None}[moves]


def first_centers(
    sample_ND: Tensor,
    num_leaves: int,
    *,
    seed: int,
    how: Start = "auto",
    num_restarts: int = 1,
    weights_N: Tensor | None = None,
) -> Tensor:
    """Return the (K, D) float32 centers from which Lloyd's iterations start.

    A sample with fewer than eight rows for each leaf gives no tree worth the name; one FAISS start serves then.

    Args:
        sample_ND: (N, D) float32 on the CPU, N >= K.
        num_leaves: K.
        seed: of the start.
        how: a tree's start, or the best of some FAISS runs.
        num_restarts: FAISS runs, where it is these.
        weights_N: (N,) float32 row weights; None for 1 each.

    Raises:
        ValueError: fewer rows than leaves.
    """
    if uses_tree(how, num_leaves):
        size = len(sample_ND) if weights_N is None else int((weights_N > 0).sum())
        num_fine, threads = num_fine_leaves(size, num_leaves), torch.get_num_threads()
        centers = None
        if num_fine:
            centers = tree_start(
                sample_ND, num_leaves, num_fine=num_fine, seed=seed, weights_N=weights_N, num_threads=threads
            )
        if centers is not None:
            return centers
        log.info("k-means start: %d rows are too few for a tree above %d leaves, FAISS once", size, num_leaves)
        return _start_of_few(sample_ND, num_leaves, seed, weights_N)
    return start(sample_ND, num_leaves, num_restarts=num_restarts, seed=seed, weights_N=weights_N)


def _start_of_few(sample_ND: Tensor, num_leaves: int, seed: int, weights_N: Tensor | None) -> Tensor:
    """Return the centers of one FAISS run with few rows for each leaf, and not more work than a sample may cost."""
    return start(
        sample_ND,
        num_leaves,
        num_restarts=1,
        seed=seed,
        weights_N=weights_N,
        num_iterations=max(1, min(_FAISS_ITERATIONS, _num_passes(sample_ND, num_leaves))),
        # AFK-MC2 looks at K^2 pairs, fifty times.
        init="afk_mc2" if num_leaves <= _MOST_SEEDED else "random",
    )


def _num_passes(sample_ND: Tensor, num_leaves: int, most_flop: float = SAMPLE_FLOP) -> int:
    """Return how many searches of the nearest center a k-means of a sample may make."""
    return int(most_flop / (2.0 * len(sample_ND) * num_leaves * sample_ND.shape[1]))


def sample_kmeans(
    sample_ND: Tensor,
    num_leaves: int,
    *,
    seed: int,
    how: Start = "auto",
    moves: Moves = "auto",
    num_restarts: int = 1,
    weights_N: Tensor | None = None,
    most_flop: float = SAMPLE_FLOP,
) -> Tensor:
    """Return the (K, D) float32 centers of a whole k-means of a sample: what a baseline and a criterion compare with.

    After a tree's start come two rounds of moves and ten of Lloyd's iterations, or fewer: their cost has a bound, so
    that K = 100,000 leaves end. FAISS's own runs have their iterations already.

    Args:
        sample_ND: (N, D) float32 on the CPU, N >= K.
        num_leaves: K.
        seed: of the start and the moves.
        how: see `first_centers`.
        moves: which merge-and-split moves follow a tree's start.
        num_restarts: FAISS runs, where the start is not a tree's.
        weights_N: (N,) float32 row weights; None for 1 each.
        most_flop: what the passes after a tree's start may cost; a pass costs 2 N K D.

    Raises:
        ValueError: fewer rows than leaves.
    """
    centers = first_centers(sample_ND, num_leaves, seed=seed, how=how, num_restarts=num_restarts, weights_N=weights_N)
    if not uses_tree(how, num_leaves):
        return centers
    weights = torch.ones(len(sample_ND)) if weights_N is None else weights_N
    passes = _num_passes(sample_ND, num_leaves, most_flop)

    def blocks() -> Iterable[tuple[Tensor, Tensor]]:
        return zip(sample_ND.split(_BLOCK_ROWS), weights.split(_BLOCK_ROWS), strict=True)

    def alone(values: Tensor) -> Tensor:
        return values

    share = least_share(moves, how, num_leaves)
    if share is not None and passes >= _SAMPLE_ITERATIONS:
        centers = merge_and_split(
            blocks, centers, all_sum=alone, seed=seed, num_rounds=_SAMPLE_ROUNDS, least_share=share
        ).centers_KD
    num_iterations = min(passes, _SAMPLE_ITERATIONS)
    if not num_iterations:
        log.info("k-means of %d rows, %d leaves: too large for Lloyd's iterations", len(sample_ND), num_leaves)
        return centers
    generator = torch.Generator().manual_seed(seed)
    found = lloyd(blocks, centers, all_sum=alone, generator=generator, num_iterations=num_iterations, tolerance=1e-5)
    return found.centers_KD
