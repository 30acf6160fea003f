"""Criteria for the number of leaves, and the rule that makes a recommendation of them. No classes are used.

Letters: N rows, K leaves, L width of the space.

Criteria of different K can be compared only where they are measured in one space. A refined space is trained for its
own K and tightened around its own centers: on 10,000 rows of MNIST its silhouette was best at K = 2 and fell from
there. So the partitions are compared in the pretrained code, which is the same for every K and was trained for none.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raydc.core.hashing import stream_seed, uniform
from raydc.core.metrics.partition_stats import Tally
from raydc.core.metrics.scores import counted, external
from raydc.core.search.choices import Start
from raydc.core.search.nearest import nearest
from raydc.core.search.starts import sample_kmeans

STABILITY_MARGIN = 0.05
"""A stability that is below the best by less than this, or by less than its standard error, counts as the best."""

SPREAD = 1.5
"""The votes disagree where the largest is more than this many times the smallest."""

_RESTARTS = 3
"""Starts of each k-means on a half of the rows."""


def calinski_harabasz(tally: Tally, centers_KL: npt.NDArray[np.floating]) -> float | None:
    """Return the Calinski-Harabasz index, [B / (K - 1)] / [W / (N - K)], from per-group sums.

    B = sum_k n_k |c_k - c|^2 and W = sum of squared distances to the own center. Empty groups do not count. None with
    fewer than two groups, or without any scatter.

    Args:
        tally: the statistics of the partition.
        centers_KL: (K, L) means of the groups.

    Source: Calinski, Harabasz, "A dendrite method for cluster analysis", 1974.
    """
    used = np.flatnonzero(tally.rows_K > 0)
    rows, centers = tally.rows_K[used].astype(np.float64), centers_KL[used].astype(np.float64)
    within = float(tally.squared_K[used].sum())
    n, k = rows.sum(), len(used)
    if k < 2 or n <= k or within <= 0:
        return None
    middle = rows @ centers / n
    between = float(rows @ ((centers - middle) ** 2).sum(axis=1))
    return float((between / (k - 1)) / (within / (n - k)))


@dataclass(frozen=True)
class Loss:
    """Sums from which a mean loss and its standard error are made; additive."""

    weight: float
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """The weighted mean."""
        return self.total / self.weight

    @property
    def error(self) -> float:
        """Standard error of the mean, for rows of equal weight."""
        return float(np.sqrt(max(self.squares / self.weight - self.mean**2, 0.0) / self.weight))


def generalizability(train: Loss, held_out: Loss) -> tuple[float, float] | None:
    """Return G = L_train / L_validation and its standard error; None where a loss is not positive.

    G falls where leaves begin to fit the rows of the training rather than the data. The paper does not say how the
    target P of held-out rows is made; here it uses the leaf frequencies f_j of the training rows, so that nothing of
    the held-out rows enters but their own q.

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, section 5.
    """
    if not (train.weight > 0 and held_out.weight > 0 and train.mean > 0 and held_out.mean > 0):
        return None
    ratio = train.mean / held_out.mean
    relative = np.hypot(train.error / train.mean, held_out.error / held_out.mean)
    return ratio, float(ratio * relative)


def stability(
    code_NL: Tensor, num_leaves: int, *, num_repeats: int, seed: int, how: Start = "auto"
) -> tuple[float, float]:
    """Return how far k-means on two random halves of the rows agrees on all of them: mean ARI, and its standard error.

    Args:
        code_NL: (N, L) float32 rows of the space, on the CPU.
        num_leaves: K; each half needs as many rows.
        num_repeats: divisions into halves.
        seed: of the divisions and the starts.
        how: where k-means starts; see `raydc.core.search.starts.first_centers`.

    Raises:
        ValueError: a half has fewer rows than leaves.

    Source: after Tibshirani, Walther, "Cluster validation by prediction strength", 2005.
    """
    scores = []
    keys = torch.arange(len(code_NL))
    for repeat in range(num_repeats):
        half = uniform(keys, stream_seed(seed, 1, repeat)) < 0.5
        leaves = []
        for part, rows in enumerate((code_NL[half], code_NL[~half])):
            first = stream_seed(seed, 2, repeat, part) % 2**31
            centers = sample_kmeans(rows.contiguous(), num_leaves, how=how, num_restarts=_RESTARTS, seed=first)
            leaves.append(nearest(code_NL, centers)[0][:, 0].numpy())
        scores.append(external(counted(*leaves))["ari"])
    error = float(np.std(scores, ddof=1) / np.sqrt(num_repeats)) if num_repeats > 1 else 0.0
    return float(np.mean(scores)), error


@dataclass(frozen=True)
class Vote:
    """What one criterion says."""

    criterion: str
    num_leaves: int | None
    """None: it abstains."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A number of leaves, and how it came about."""

    num_leaves: int | None
    sentence: str
    votes: list[Vote]
    agree: bool
    """Whether the votes lie close together."""

    drop: int | None
    """The K before the largest fall of G, where there is one beyond its error."""


_OPTIMA = (
    ("silhouette", "silhouette", True),
    ("Davies-Bouldin", "davies_bouldin", False),
    ("Calinski-Harabasz", "calinski_harabasz", True),
    ("neighbor agreement", "neighbor_agreement", True),
)
"""Criteria whose best value votes: (name, key of an entry, whether more is better)."""


def recommend(entries: Sequence[Mapping[str, Any]]) -> Recommendation:
    """Return the recommended K of a sweep.

    Each criterion has one vote, and the recommended K is the median of the votes (the lower middle one of an even
    number):

    - silhouette, Davies-Bouldin, Calinski-Harabasz and neighbor agreement vote for the K at which they are best;
    - stability votes for the largest K that is about as stable as the most stable one (within STABILITY_MARGIN or one
      standard error): coarse partitions of well-separated groups are stable, too, so the most stable K is only a bound;
    - G votes for the K before its largest fall between two neighboring K, if the fall exceeds two standard errors.

    A criterion abstains whose best K is the first or the last of the range: it was still rising there, so the range
    says nothing about its optimum. K that left leaves empty take no part. No weight or threshold was fitted to a data
    set's classes. Where the votes lie far apart the sentence says so: several K may be right, on different levels.

    Args:
        entries: one for each K: k, empty, and the criteria; a criterion may be None.
    """
    kept = sorted((e for e in entries if not e["empty"]), key=lambda e: e["k"])
    if len(kept) < 3:
        text = "No K is recommended: a best value inside the range needs at least three K without empty leaves."
        return Recommendation(num_leaves=None, sentence=text, votes=[], agree=False, drop=None)
    votes = [_optimum(kept, *criterion) for criterion in _OPTIMA] + [_stable(kept), _fall(kept)]
    said = sorted(v.num_leaves for v in votes if v.num_leaves is not None)
    drop = votes[-1].num_leaves
    low, high = kept[0]["k"], kept[-1]["k"]
    if not said:
        text = f"No K between {low} and {high} is recommended: no criterion has its best value inside the range."
        return Recommendation(num_leaves=None, sentence=text, votes=votes, agree=False, drop=drop)
    chosen = said[(len(said) - 1) // 2]
    agree = len(said) > 1 and said[-1] <= SPREAD * said[0]
    named = ", ".join(f"{v.criterion} {v.num_leaves}" for v in votes if v.num_leaves is not None)
    silent = [v.criterion for v in votes if v.num_leaves is None]
    text = f"K = {chosen} is recommended, the median of {len(said)} votes ({named})"
    text += f"; {', '.join(silent)} abstain{'s' if len(silent) == 1 else ''}." if silent else "."
    if len(said) == 1:
        text += " One vote is little to go by."
    elif not agree:
        text += (
            f" The criteria disagree, from {said[0]} to {said[-1]}: look at the figure, more than one K may be right."
        )
    return Recommendation(num_leaves=chosen, sentence=text, votes=votes, agree=agree, drop=drop)


def _optimum(entries: Sequence[Mapping[str, Any]], name: str, key: str, more: bool) -> Vote:
    points = [(e["k"], e[key]) for e in entries if e.get(key) is not None]
    if len(points) < 3:
        return Vote(name, None, "not measured")
    sign = 1.0 if more else -1.0
    best = max(range(len(points)), key=lambda i: sign * points[i][1])
    return _inside(name, [k for k, _ in points], best, f"{'largest' if more else 'smallest'} there")


def _inside(name: str, ks: Sequence[int], best: int, reason: str) -> Vote:
    if best in (0, len(ks) - 1):
        return Vote(name, None, f"best at K = {ks[best]}, an end of the range")
    return Vote(name, ks[best], reason)


def _stable(entries: Sequence[Mapping[str, Any]]) -> Vote:
    points = [(e["k"], e["stability"], e["stability_error"]) for e in entries if e.get("stability") is not None]
    if len(points) < 3:
        return Vote("stability", None, "not measured")
    most = max(points, key=lambda f: f[1])
    bound = most[1] - max(STABILITY_MARGIN, most[2])
    last = max(i for i, f in enumerate(points) if f[1] >= bound)
    reason = f"the largest K about as stable as the most stable, K = {most[0]}"
    return _inside("stability", [f[0] for f in points], last, reason)


def _fall(entries: Sequence[Mapping[str, Any]]) -> Vote:
    points = [(e["k"], e["g"], e["g_error"]) for e in entries if e.get("g") is not None]
    falls = []
    for (k, g, error), (_, later, later_error) in itertools.pairwise(points):
        if g - later > 2 * float(np.hypot(error, later_error)):
            falls.append((g - later, k))
    if not falls:
        return Vote("G", None, "no fall between neighboring K beyond two standard errors")
    fall, k = max(falls)
    return Vote("G", k, f"falls by {fall:.3f} to the next K")
