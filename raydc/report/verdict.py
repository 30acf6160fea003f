"""Whether learning a space has paid, against k-means on the raw rows, and by what evidence.

Two criteria, both measured on the same rows for both partitions:

- Known classes, where there are any: NMI and ACC.
- Agreement with the nearest neighbors among the raw rows (raydc.core.metrics.neighbor_agreement), which needs no
  classes and favors neither space. Silhouette, Davies-Bouldin and inertia are left out of this: each is measured in the
  space of its own method, and a space that was trained to be tight wins there whatever its groups are worth.

Known classes decide where both speak; the other criterion is told beside them, also when it disagrees.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from raydc.report.results import baseline_of, has, leaf_scores, objective_name
from raydc.report.text import change, score

# Differences below this are taken for noise: restarts of k-means alone move NMI and ACC by as much.
MARGIN = 0.005

# Below this share of the effective groups of k-means, a partition's agreement with its neighbors is not compared: few
# groups keep neighbors together with ease.
LEAST_GROUPS = 0.5

# Rows of the sample for each leaf and each neighbor asked for, below which a leaf is too small to hold the neighbors.
LEAST_ROWS_PER_NEIGHBOR = 2

Tone = Literal["better", "same", "worse", "none"]
_IS = {"better": "better", "worse": "worse", "same": "not better"}


@dataclass(frozen=True)
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
class Verdict:
    """Whether learning a space has paid."""

    tone: Tone
    sentence: str
    details: list[str]
    criteria: list[Criterion]

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as it stands in metrics.json."""
        return asdict(self)


def verdict(metrics: Mapping[str, Any]) -> Verdict:
    """Return whether the learned space beats k-means on the raw rows, from the content of metrics.json."""
    if baseline_of(metrics) == "raw_kmeans":
        return Verdict("none", "No space was learned: these are k-means clusters of the rows themselves.", [], [])
    baselines = metrics.get("baselines") or {}
    raw = baselines.get("raw_kmeans")
    # On the baselines' own sample where it was measured: the same rows on both sides.
    ours = baselines.get("learned") or leaf_scores(metrics)
    if not raw:
        text = "k-means on the raw rows was not measured, so there is nothing to compare with."
        return Verdict("none", text, [], [])
    by_labels = [_by_score(key, ours, raw) for key in ("nmi", "acc") if has(ours, key) and has(raw, key)]
    near, why_not = _by_neighbors(metrics, raw)
    criteria = [*by_labels, *([near] if near else [])]
    if by_labels:
        tone, sentence = _by_votes(by_labels)
        return Verdict(tone, sentence, [*_beside(tone, near, why_not), *_refinement(metrics, ours)], criteria)
    if near:
        return Verdict(near.vote, _sentence(near.vote, [near]), [_WHAT_IT_IS, *_before(metrics)], criteria)
    text = f"Nothing says whether the learned space is better than k-means on the raw rows: {why_not}."
    return Verdict("none", text, ["There are no known classes, and each space's own silhouette favors itself."], [])


_WHAT_IT_IS = (
    "Neighbor agreement: the share of a row's nearest neighbors, among the raw rows, that are in its leaf, corrected "
    "for chance. It needs no known classes and is measured alike for both partitions."
)


def _by_score(key: str, ours: Mapping[str, Any], raw: Mapping[str, Any]) -> Criterion:
    return _criterion(key.upper(), ours[key], raw[key], ours[key] - raw[key], MARGIN)


def _by_neighbors(metrics: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[Criterion | None, str]:
    """Return the comparison by neighbors, or None and the reason."""
    found = metrics.get("agreement") or {}
    methods = found.get("methods") or {}
    if "learned" not in methods or "raw_kmeans" not in methods:
        return None, "neighbors were not looked up"
    learned, other = methods["learned"], methods["raw_kmeans"]
    if learned["num_effective"] < LEAST_GROUPS * other["num_effective"]:
        return None, (
            f"its rows are in {learned['num_effective']:.1f} leaves in effect, those of k-means in "
            f"{other['num_effective']:.1f}, and few leaves keep neighbors together with ease"
        )
    leaves = found["num_leaves"]
    least = LEAST_ROWS_PER_NEIGHBOR * found["num_neighbors"] * leaves
    if found["rows"] < least:
        return None, (
            f"the {found['rows']} rows among which neighbors are looked up are too few for {leaves} leaves "
            f"(raise evaluate.neighbor_rows and evaluate.baseline_rows to {least})"
        )
    margin = max(MARGIN, 2 * learned["standard_error"])
    return _criterion("neighbor agreement", learned["score"], other["score"], learned["gain"], margin), ""


def _criterion(name: str, learned: float, raw: float, gain: float, margin: float) -> Criterion:
    vote: Tone = "better" if gain > margin else "worse" if gain < -margin else "same"
    return Criterion(name, learned, raw, gain, margin, vote)


def _by_votes(criteria: list[Criterion]) -> tuple[Tone, str]:
    votes = {c.vote for c in criteria}
    if {"better", "worse"} <= votes:
        text = "The learned space is not clearly better than k-means on the raw rows, the two scores disagree: "
        return "same", text + _numbers(criteria) + "."
    tone: Tone = "better" if "better" in votes else "worse" if "worse" in votes else "same"
    return tone, _sentence(tone, criteria)


def _sentence(tone: Tone, criteria: list[Criterion]) -> str:
    return f"The learned space is {_IS[tone]} than k-means on the raw rows: {_numbers(criteria)}."


def _numbers(criteria: Iterable[Criterion]) -> str:
    return ", ".join(f"{c.name} {score(c.learned)} against {score(c.raw)}" for c in criteria)


def _beside(tone: Tone, near: Criterion | None, why_not: str) -> list[str]:
    """Return what the criterion without classes says, beside a verdict by classes."""
    if near is None:
        return [f"Without the classes nothing could be said: {why_not}."]
    word = "says the same" if near.vote == tone else f"disagrees and says {_IS[near.vote]}"
    return [f"Without the classes, the agreement with nearest neighbors {word}: {_numbers([near])}."]


def _refinement(metrics: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return what the objective has added to the autoencoder alone, by known classes."""
    before = (metrics.get("baselines") or {}).get("autoencoder_kmeans")
    if baseline_of(metrics) == "autoencoder_kmeans" or not before or not has(before, "nmi"):
        return []
    gain = ours["nmi"] - before["nmi"]
    return [_added(metrics, f"reaches NMI {score(before['nmi'])}", gain)]


def _before(metrics: Mapping[str, Any]) -> list[str]:
    """Return what the objective has added to the autoencoder alone, by the neighbors."""
    methods = metrics["agreement"]["methods"]
    before = methods.get("autoencoder_kmeans")
    if baseline_of(metrics) == "autoencoder_kmeans" or before is None:
        return []
    gain = methods["learned"]["score"] - before["score"]
    return [_added(metrics, f"has a neighbor agreement of {score(before['score'])}", gain)]


def _added(metrics: Mapping[str, Any], reached: str, gain: float) -> str:
    base, name = f"k-means on the autoencoder's code alone {reached}", objective_name(metrics)
    if abs(gain) <= MARGIN:
        return f"{base}; {name} leaves it where it is."
    return f"{base}; {name} {'adds to it' if gain > 0 else 'takes from it'} ({change(gain)})."
