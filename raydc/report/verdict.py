"""The verdict in words: whether learning a space has paid, as it stands in metrics.json, on the page and in `show`.

What is judged, and how, is in raydc.core.metrics.verdict.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import cast

from raydc.core.metrics.verdict import (
    MARGIN,
    ClassScores,
    Criterion,
    Evidence,
    Judgment,
    NeighborEvidence,
    NeighborScore,
    TooFewGroups,
    TooFewRows,
    judge,
)
from raydc.data.metrics import AgreementRecord, CriterionRecord, Measured, Scores, Tone, VerdictRecord
from raydc.report.results import baseline_of, leaf_scores, objective_name
from raydc.report.text import change, score

_IS = {"better": "better", "worse": "worse", "same": "not better"}

_WHAT_IT_IS = (
    "Neighbor agreement: the share of a row's nearest neighbors, among the raw rows, that are in its leaf, corrected "
    "for chance. It needs no known classes and is measured alike for both partitions."
)


@dataclass(frozen=True)
class Verdict:
    """Whether learning a space has paid."""

    tone: Tone
    sentence: str
    details: list[str]
    criteria: list[Criterion]

    def to_json(self) -> VerdictRecord:
        """Return the verdict as it stands in metrics.json."""
        return {
            "tone": self.tone,
            "sentence": self.sentence,
            "details": self.details,
            "criteria": [cast(CriterionRecord, asdict(c)) for c in self.criteria],
        }


def verdict(metrics: Measured) -> Verdict:
    """Return whether the learned space beats k-means on the raw rows, from what was measured."""
    found = judge(evidence(metrics))
    sentence, details = _worded(found, objective_name(metrics))
    return Verdict(found.tone, sentence, details, found.criteria)


def evidence(metrics: Measured) -> Evidence:
    """Return the numbers that are judged; an earlier version may have left some of them out."""
    baselines, own = metrics.get("baselines") or {}, baseline_of(metrics)
    raw, before = baselines.get("raw_kmeans"), baselines.get("autoencoder_kmeans")
    agreement = metrics.get("agreement")
    methods = agreement["methods"] if agreement else {}
    alone = methods.get("autoencoder_kmeans")
    return Evidence(
        learns=own != "raw_kmeans",
        # On the baselines' own sample where it was measured: the same rows on both sides.
        learned=_classes(baselines.get("learned") or leaf_scores(metrics)),
        raw=_classes(raw) if raw else None,
        autoencoder=_classes(before) if before and own != "autoencoder_kmeans" else None,
        neighbors=_neighbors(agreement) if agreement and {"learned", "raw_kmeans"} <= methods.keys() else None,
        autoencoder_agreement=alone["score"] if alone and own != "autoencoder_kmeans" else None,
    )


def _classes(scores: Scores) -> ClassScores:
    return ClassScores(scores.get("nmi"), scores.get("acc"))


def _neighbors(found: AgreementRecord) -> NeighborEvidence:
    learned, raw = (
        NeighborScore(one["score"], one["num_effective"], one["gain"], one["standard_error"])
        for one in (found["methods"]["learned"], found["methods"]["raw_kmeans"])
    )
    return NeighborEvidence(
        learned=learned,
        raw=raw,
        rows=found["rows"],
        num_neighbors=found["num_neighbors"],
        num_leaves=found["num_leaves"],
    )


def _worded(found: Judgment, objective: str) -> tuple[str, list[str]]:
    """Return the sentence and what is told beside it."""
    if found.basis == "no_space":
        return "No space was learned: these are k-means clusters of the rows themselves.", []
    if found.basis == "no_baseline":
        return "k-means on the raw rows was not measured, so there is nothing to compare with.", []
    if found.basis == "classes":
        added = _added(found, objective, f"reaches NMI {score(found.autoencoder)}")
        return _by_classes(found), [_beside(found), *added]
    if found.basis == "neighbors":
        added = _added(found, objective, f"has a neighbor agreement of {score(found.autoencoder)}")
        return _sentence(found.tone, found.criteria), [_WHAT_IT_IS, *added]
    text = f"Nothing says whether the learned space is better than k-means on the raw rows: {_why_not(found)}."
    return text, ["There are no known classes, and each space's own silhouette favors itself."]


def _why_not(found: Judgment) -> str:
    """Return why neighbors decide nothing."""
    obstacle = found.obstacle
    if isinstance(obstacle, TooFewGroups):
        return (
            f"its rows are in {obstacle.learned:.1f} leaves in effect, those of k-means in {obstacle.raw:.1f}, and few "
            "leaves keep neighbors together with ease"
        )
    if isinstance(obstacle, TooFewRows):
        return (
            f"the {obstacle.rows} rows among which neighbors are looked up are too few for {obstacle.num_leaves} "
            f"leaves (raise evaluate.neighbor_rows and evaluate.baseline_rows to {obstacle.needed})"
        )
    return "neighbors were not looked up"


def _by_classes(found: Judgment) -> str:
    if {"better", "worse"} <= {c.vote for c in found.by_classes}:
        text = "The learned space is not clearly better than k-means on the raw rows, the two scores disagree: "
        return text + _numbers(found.by_classes) + "."
    return _sentence(found.tone, found.by_classes)


def _sentence(tone: Tone, criteria: Iterable[Criterion]) -> str:
    return f"The learned space is {_IS[tone]} than k-means on the raw rows: {_numbers(criteria)}."


def _numbers(criteria: Iterable[Criterion]) -> str:
    return ", ".join(f"{c.name} {score(c.learned)} against {score(c.raw)}" for c in criteria)


def _beside(found: Judgment) -> str:
    """Return what the criterion without classes says, beside a verdict by classes."""
    near = found.by_neighbors
    if near is None:
        return f"Without the classes nothing could be said: {_why_not(found)}."
    word = "says the same" if near.vote == found.tone else f"disagrees and says {_IS[near.vote]}"
    return f"Without the classes, the agreement with nearest neighbors {word}: {_numbers([near])}."


def _added(found: Judgment, objective: str, reached: str) -> list[str]:
    """Return what the objective has added to the autoencoder alone; nothing where that is not known."""
    if found.added is None:
        return []
    base = f"k-means on the autoencoder's code alone {reached}"
    if abs(found.added) <= MARGIN:
        return [f"{base}; {objective} leaves it where it is."]
    return [f"{base}; {objective} {'adds to it' if found.added > 0 else 'takes from it'} ({change(found.added)})."]
