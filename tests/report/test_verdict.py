"""Whether learning has paid: by known classes, by neighbors, and what is said where they disagree."""

import pytest

from raydc.report.verdict import verdict
from tests.report.test_results import RAW, metrics

UNKNOWN = dict.fromkeys(("acc", "nmi", "ami", "ari", "purity"))


def agreement(learned=0.8, raw=0.7, error=0.01, effective=9.0, rows=1000, autoencoder=None):
    """Return what assign has found of the neighbors."""
    methods = {
        "learned": {"score": learned, "gain": learned - raw, "standard_error": error, "num_effective": effective},
        "raw_kmeans": {"score": raw, "gain": 0.0, "standard_error": 0.0, "num_effective": 9.0},
    }
    if autoencoder is not None:
        methods["autoencoder_kmeans"] = {"score": autoencoder}
    return {"rows": rows, "queries": 500, "num_neighbors": 5, "num_leaves": 10, "methods": methods}


def unlabeled(**changes):
    """Return the metrics of a run without classes."""
    return metrics(ours=UNKNOWN, raw_kmeans={"rows": 100, "silhouette": 0.2}) | {"agreement": agreement(**changes)}


@pytest.mark.parametrize(
    ("nmi", "acc", "tone", "words"),
    [
        (
            0.80,
            0.90,
            "better",
            "is better than k-means on the raw rows: NMI 0.800 against 0.600, ACC 0.900 against 0.700",
        ),
        (0.50, 0.60, "worse", "is worse than k-means on the raw rows: NMI 0.500 against 0.600"),
        (0.602, 0.699, "same", "is not better than k-means on the raw rows"),
        (0.80, 0.60, "same", "is not clearly better than k-means on the raw rows, the two scores disagree"),
        (0.80, 0.699, "better", "is better"),
    ],
)
def test_the_verdict_says_plainly_whether_learning_has_paid(nmi, acc, tone, words):
    found = verdict(metrics(ours={"nmi": nmi, "acc": acc}, raw_kmeans=RAW))
    assert found.tone == tone
    assert words in found.sentence


def test_the_verdict_compares_on_the_baselines_sample_where_it_was_measured():
    found = verdict(metrics(ours={"nmi": 0.9}, raw_kmeans=RAW, learned=dict(RAW, nmi=0.5, acc=0.5)))
    assert found.tone == "worse"


def test_the_verdict_says_what_refinement_added():
    ours = {"nmi": 0.8, "acc": 0.9}
    better = verdict(metrics(ours=ours, raw_kmeans=RAW, autoencoder_kmeans=dict(RAW, nmi=0.7)))
    assert better.details[1:] == ["k-means on the autoencoder's code alone reaches NMI 0.700; DEC adds to it (+0.100)."]
    worse = verdict(metrics(ours=ours, raw_kmeans=RAW, autoencoder_kmeans=dict(RAW, nmi=0.85)))
    assert "takes from it (\u22120.050)" in worse.details[1]


@pytest.mark.parametrize(("learned", "tone"), [(0.80, "better"), (0.60, "worse"), (0.71, "same")])
def test_without_labels_the_neighbors_decide_beyond_two_standard_errors(learned, tone):
    found = verdict(unlabeled(learned=learned))
    assert found.tone == tone
    assert f"neighbor agreement {learned:.3f} against 0.700" in found.sentence
    assert [(c.name, c.vote) for c in found.criteria] == [("neighbor agreement", tone)]


def test_the_silhouette_decides_nothing():
    found = verdict(metrics(ours={**UNKNOWN, "silhouette": 0.9}, raw_kmeans={"rows": 100, "silhouette": 0.2}))
    assert found.tone == "none"
    assert found.sentence.endswith("neighbors were not looked up.")
    assert "favors itself" in found.details[0]


def test_a_space_that_left_most_leaves_empty_is_not_called_better_for_it():
    found = verdict(unlabeled(learned=0.99, effective=3.0))
    assert found.tone == "none"
    assert "in 3.0 leaves in effect, those of k-means in 9.0" in found.sentence


def test_leaves_too_small_for_their_neighbors_are_not_judged_by_them():
    found = verdict(unlabeled(rows=99))
    assert found.tone == "none"
    assert "raise evaluate.neighbor_rows and evaluate.baseline_rows to 100" in found.sentence


def test_classes_decide_and_the_neighbors_are_told_beside_them():
    labeled = metrics(ours={"nmi": 0.8, "acc": 0.9}, raw_kmeans=RAW)
    agree = verdict(labeled | {"agreement": agreement()})
    assert (agree.tone, [c.vote for c in agree.criteria]) == ("better", ["better"] * 3)
    assert "says the same: neighbor agreement 0.800 against 0.700" in agree.details[0]
    against = verdict(labeled | {"agreement": agreement(learned=0.5)})
    assert against.tone == "better"
    assert "disagrees and says worse" in against.details[0]


def test_without_labels_the_refinement_is_judged_by_neighbors_too():
    found = verdict(unlabeled(autoencoder=0.75))
    assert "has a neighbor agreement of 0.750; DEC adds to it (+0.050)" in found.details[1]


def test_without_a_baseline_nothing_is_claimed():
    assert verdict(metrics()).tone == "none"
    assert "No space was learned" in verdict(metrics("kmeans", raw_kmeans=RAW)).sentence
