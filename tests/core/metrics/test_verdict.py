"""What is judged: classes first, neighbors beside them, and what stands against either."""

from typing import Any

from raydc.core.metrics.verdict import (
    ClassScores,
    Evidence,
    NeighborEvidence,
    NeighborScore,
    TooFewGroups,
    TooFewRows,
    judge,
)


def neighbors(learned: float = 0.8, **changes: Any) -> NeighborEvidence:
    fields: dict[str, Any] = {"rows": 1000, "num_neighbors": 5, "num_leaves": 10}
    ours = NeighborScore(learned, changes.pop("effective", 9.0), learned - 0.7, changes.pop("error", 0.01))
    return NeighborEvidence(learned=ours, raw=NeighborScore(0.7, 9.0), **(fields | changes))


def evidence(**changes: Any) -> Evidence:
    fields: dict[str, Any] = {"learns": True, "learned": ClassScores(), "raw": ClassScores(), "neighbors": neighbors()}
    return Evidence(**(fields | changes))


def test_without_a_learned_space_or_a_baseline_nothing_is_judged():
    assert judge(evidence(learns=False)).basis == "no_space"
    found = judge(evidence(raw=None))
    assert (found.tone, found.basis, found.criteria) == ("none", "no_baseline", [])


def test_classes_decide_and_neighbors_stand_beside_them():
    found = judge(
        evidence(
            learned=ClassScores(0.8, 0.9),
            raw=ClassScores(0.6, 0.7),
            autoencoder=ClassScores(0.7),
            neighbors=neighbors(0.5),
        )
    )
    assert (found.tone, found.basis) == ("better", "classes")
    assert [(c.name, c.vote) for c in found.criteria] == [
        ("NMI", "better"),
        ("ACC", "better"),
        ("neighbor agreement", "worse"),
    ]
    assert found.autoencoder == 0.7 and round(found.added or 0, 6) == 0.1


def test_scores_that_disagree_are_no_gain():
    assert judge(evidence(learned=ClassScores(0.8, 0.6), raw=ClassScores(0.6, 0.7))).tone == "same"


def test_a_score_that_one_side_lacks_is_left_out():
    found = judge(evidence(learned=ClassScores(None, 0.9), raw=ClassScores(0.6, 0.7), autoencoder=ClassScores(0.7)))
    assert [c.name for c in found.by_classes] == ["ACC"] and found.added is None


def test_neighbors_decide_beyond_two_standard_errors():
    assert judge(evidence()).tone == "better"
    assert judge(evidence(neighbors=neighbors(0.71))).tone == "same"
    found = judge(evidence(neighbors=neighbors(0.6), autoencoder_agreement=0.65))
    assert (found.tone, found.basis) == ("worse", "neighbors") and round(found.added or 0, 6) == -0.05


def test_few_groups_and_few_rows_stand_against_the_neighbors():
    assert judge(evidence(neighbors=neighbors(effective=3.0))).obstacle == TooFewGroups(3.0, 9.0)
    assert judge(evidence(neighbors=neighbors(rows=99))).obstacle == TooFewRows(99, 10, 100)
    found = judge(evidence(neighbors=None))
    assert (found.tone, found.basis, found.obstacle) == ("none", "nothing", None)
