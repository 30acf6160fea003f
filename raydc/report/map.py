"""Flat maps of latent rows: t-SNE with a fixed seed."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

# Below this many rows a map of neighborhoods says nothing.
LEAST_ROWS = 8

_PERPLEXITY = 30.0

# A third of scikit-learn's 1000 iterations, and coarser cells than its 0.5. On the 1797 rows of digits trustworthiness
# (10 neighbors) is 0.992 with them and with 500 iterations at 0.5, which take twice the time.
_NUM_ITERATIONS = 350
_ANGLE = 1.0
_WIDTH_BEFORE_PCA = 50


def project_all(spaces: list[npt.NDArray[np.floating]], *, seed: int) -> list[npt.NDArray[np.float64]]:
    """Return the map of each space of the same rows, so that they can be compared by eye, the same on every call.

    All start from the two main axes of the first space, in threads beside each other, and are turned onto its map.

    Args:
        spaces: (N, D) finite rows each; D may differ.
        seed: of the optimization.

    Raises:
        ValueError: fewer than LEAST_ROWS rows.
    """
    start = _two_main_axes(_centered(spaces[0]))
    with threadpool_limits(1), ThreadPoolExecutor(len(spaces)) as threads:
        first, *others = threads.map(lambda rows: project(rows, seed=seed, start_N2=start), spaces)
    return [first, *(_to_unit(other @ orthogonal_procrustes(other, first)[0]) for other in others)]


def project(
    rows_ND: npt.NDArray[np.floating], *, seed: int, start_N2: npt.NDArray[np.floating] | None = None
) -> npt.NDArray[np.float64]:
    """Return a t-SNE map of the rows, the same on every call.

    Wide rows are reduced to 50 dimensions by PCA first. Perplexity is 30, or a third of the rows where they are few.

    Args:
        rows_ND: (N, D) finite rows.
        seed: of the optimization.
        start_N2: (N, 2) places to start from; default the two main axes.

    Returns:
        (N, 2) float64 in the square from -1 to 1, its sides in proportion.

    Raises:
        ValueError: fewer than LEAST_ROWS rows.

    Source: van der Maaten, Hinton, "Visualizing data using t-SNE", JMLR 9, 2008.
    """
    if len(rows_ND) < LEAST_ROWS:
        raise ValueError(f"a map needs {LEAST_ROWS} rows, got {len(rows_ND)}")
    # Threads add in any order, and t-SNE turns the last bit into another map.
    with threadpool_limits(1):
        return _project(np.asarray(rows_ND, dtype=np.float64), seed, start_N2)


def _project(
    rows_ND: npt.NDArray[np.float64], seed: int, start_N2: npt.NDArray[np.floating] | None
) -> npt.NDArray[np.float64]:
    rows = _centered(rows_ND)
    if not rows.any():
        return np.zeros((len(rows), 2))
    if rows.shape[1] > _WIDTH_BEFORE_PCA and len(rows) > _WIDTH_BEFORE_PCA:
        rows = PCA(_WIDTH_BEFORE_PCA, svd_solver="full").fit_transform(rows)
    start = _two_main_axes(rows) if start_N2 is None else np.asarray(start_N2, dtype=np.float64)
    # A deviation of 1e-4 is what t-SNE expects of its start; a larger one freezes it.
    start = start * (1e-4 / max(float(start[:, 0].std()), 1e-12))
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    model = TSNE(
        2,
        perplexity=perplexity,
        init=start.astype(np.float32),
        learning_rate="auto",
        max_iter=_NUM_ITERATIONS,
        angle=_ANGLE,
        random_state=seed,
    )
    return _to_unit(model.fit_transform(rows.astype(np.float32)).astype(np.float64))


def _centered(rows_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    rows = np.asarray(rows_ND, dtype=np.float64)
    return rows - rows.mean(axis=0)


def _two_main_axes(rows_ND: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if rows_ND.shape[1] == 1:
        return np.hstack([rows_ND, np.zeros_like(rows_ND)])
    return PCA(2, svd_solver="full").fit_transform(rows_ND)


def _to_unit(points_N2: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    centered = points_N2 - (points_N2.max(axis=0) + points_N2.min(axis=0)) / 2
    return centered / max(float(np.abs(centered).max()), 1e-12)
