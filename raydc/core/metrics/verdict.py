"""Whether learning a space has paid, against k-means on the raw rows, and by what evidence.

Two criteria, both measured on the same rows for both partitions:

- Known classes, where there are any: NMI and ACC.
- Agreement with the nearest neighbors among the raw rows (raydc.core.metrics.neighbor_agreement), which needs no
  classes and favors neither space. Silhouette, Davies-Bouldin and inertia are left out of this: each is measured in the
  space of its own method, and a space that was trained to be tight wins there whatever its groups are worth.

Known classes decide where both speak; the other criterion is told beside them, also when it disagrees.
"""

from dataclasses import dataclass, field
from typing import Literal

MARGIN = 0.005
"""Smaller differences are taken for noise: restarts of k-means alone move NMI and ACC by as much."""

LEAST_GROUPS = 0.5
"""Below this share of the effective groups of k-means, a partition's agreement with its neighbors is not compared.

Few groups keep neighbors together with ease."""

LEAST_ROWS_PER_NEIGHBOR = 2
"""Rows of the sample per leaf and neighbor asked for: a smaller leaf cannot hold the neighbors of its rows."""

Tone = Literal["better", "same", "worse", "none"]
Basis = Literal["no_space", "no_baseline", "classes", "neighbors", "nothing"]


@dataclass(frozen=True)
class ClassScores:
    """Scores of a partition against known classes; None where they were not measured."""

    nmi: float | None = None
    acc: float | None = None


@dataclass(frozen=True)
class NeighborScore:
    """Agreement of a partition with nearest neighbors; see raydc.core.metrics.neighbor_agreement."""

    score: float
    num_effective: float
    """Effective number of groups."""

    gain: float = 0.0
    """Mean difference to k-means on the raw rows, over the same queries."""

    standard_error: float = 0.0
    """Standard error of the gain."""


@dataclass(frozen=True, kw_only=True)
class NeighborEvidence:
    """Agreement with nearest neighbors of both partitions, on one sample."""

    learned: NeighborScore
    raw: NeighborScore
    rows: int
    """Rows of the sample."""

    num_neighbors: int
    num_leaves: int


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The numbers that are judged."""

    learns: bool
    """False: the labels are k-means clusters of the raw rows themselves."""

    learned: ClassScores
    raw: ClassScores | None
    """Scores of k-means on the raw rows; None where it was not measured."""

    neighbors: NeighborEvidence | None
    """None where neighbors were not looked up."""

    autoencoder: ClassScores | None = None
    """Scores of k-means on the autoencoder's code; None without one, or where that is the run's own result."""

    autoencoder_agreement: float | None = None
    """Its agreement with nearest neighbors."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One comparison of the learned partition with that of k-means on the raw rows."""

    name: str
    learned: float
    raw: float
    gain: float
    margin: float
    """Gains of a smaller size count as none."""

    vote: Tone


@dataclass(frozen=True)
class TooFewGroups:
    """The learned partition leaves too many of its groups empty to be judged by neighbors."""

    learned: float
    raw: float


@dataclass(frozen=True)
class TooFewRows:
    """The sample holds too few rows for its leaves to be judged by neighbors."""

    rows: int
    num_leaves: int
    needed: int


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """Whether learning a space has paid, and why."""

    tone: Tone
    basis: Basis
    """What decides."""

    by_classes: list[Criterion] = field(default_factory=list)
    by_neighbors: Criterion | None = None
    obstacle: TooFewGroups | TooFewRows | None = None
    """Why neighbors decide nothing; None where they do, or were not looked up."""

    autoencoder: float | None = None
    """What k-means on the autoencoder's code alone reaches, by NMI or by neighbors; None where that says nothing."""

    added: float | None = None
    """What the objective has added to that."""

    @property
    def criteria(self) -> list[Criterion]:
        """Return every comparison that was made."""
        return [*self.by_classes, *([self.by_neighbors] if self.by_neighbors is not None else [])]


def judge(evidence: Evidence) -> Judgment:
    """Return whether the learned space beats k-means on the raw rows."""
    if not evidence.learns:
        return Judgment(tone="none", basis="no_space")
    if evidence.raw is None:
        return Judgment(tone="none", basis="no_baseline")
    by_classes = _by_classes(evidence.learned, evidence.raw)
    by_neighbors, obstacle = _by_neighbors(evidence.neighbors)
    if by_classes:
        before, ours = evidence.autoencoder, evidence.learned.nmi
        reached = before.nmi if before is not None and ours is not None else None
        return Judgment(
            tone=_by_votes(by_classes),
            basis="classes",
            by_classes=by_classes,
            by_neighbors=by_neighbors,
            obstacle=obstacle,
            autoencoder=reached,
            added=None if reached is None or ours is None else ours - reached,
        )
    if by_neighbors is None:
        return Judgment(tone="none", basis="nothing", obstacle=obstacle)
    reached = evidence.autoencoder_agreement
    return Judgment(
        tone=by_neighbors.vote,
        basis="neighbors",
        by_neighbors=by_neighbors,
        autoencoder=reached,
        added=None if reached is None else by_neighbors.learned - reached,
    )


def _by_classes(learned: ClassScores, raw: ClassScores) -> list[Criterion]:
    pairs = (("NMI", learned.nmi, raw.nmi), ("ACC", learned.acc, raw.acc))
    return [_criterion(n, a, b, a - b, MARGIN) for n, a, b in pairs if a is not None and b is not None]


def _by_neighbors(found: NeighborEvidence | None) -> tuple[Criterion | None, TooFewGroups | TooFewRows | None]:
    """Return the comparison by neighbors, or what stands against it."""
    if found is None:
        return None, None
    learned, raw = found.learned, found.raw
    if learned.num_effective < LEAST_GROUPS * raw.num_effective:
        return None, TooFewGroups(learned.num_effective, raw.num_effective)
    needed = LEAST_ROWS_PER_NEIGHBOR * found.num_neighbors * found.num_leaves
    if found.rows < needed:
        return None, TooFewRows(found.rows, found.num_leaves, needed)
    margin = max(MARGIN, 2 * learned.standard_error)
    return _criterion("neighbor agreement", learned.score, raw.score, learned.gain, margin), None


def _criterion(name: str, learned: float, raw: float, gain: float, margin: float) -> Criterion:
    vote: Tone = "better" if gain > margin else "worse" if gain < -margin else "same"
    return Criterion(name=name, learned=learned, raw=raw, gain=gain, margin=margin, vote=vote)


def _by_votes(criteria: list[Criterion]) -> Tone:
    votes = {c.vote for c in criteria}
    if {"better", "worse"} <= votes:
        return "same"
    return "better" if "better" in votes else "worse" if "worse" in votes else "same"
