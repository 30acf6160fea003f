"""The words and tables of the report, by hand."""

import pytest

from raydc.report import findings

RAW = {"rows": 100, "acc": 0.70, "nmi": 0.60, "ami": 0.59, "ari": 0.5, "purity": 0.7, "silhouette": 0.2}


def metrics(objective="dec", ours=None, **baselines):
    """Return the content of a small metrics.json."""
    scores = dict(RAW, **(ours or {}))
    quality = {k: scores[k] for k in ("acc", "nmi", "ami", "ari", "purity") if scores[k] is not None}
    return {
        "rows": {"input": 103, "labels": 100, "rejects": 3},
        **({"quality": {"leaf": quality, "levels": {"2": quality}}} if quality else {}),
        "internal": {"leaf": {"silhouette": scores["silhouette"]}, "levels": {"2": {"silhouette": 0.1}}},
        "baselines": baselines,
        "fit": {"objective": objective},
    }


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
    found = findings.verdict(metrics(ours={"nmi": nmi, "acc": acc}, raw_kmeans=RAW))
    assert found.tone == tone
    assert words in found.sentence


def test_the_verdict_compares_on_the_baselines_sample_where_it_was_measured():
    found = findings.verdict(metrics(ours={"nmi": 0.9}, raw_kmeans=RAW, learned=dict(RAW, nmi=0.5, acc=0.5)))
    assert found.tone == "worse"


def test_the_verdict_says_what_refinement_added():
    ours = {"nmi": 0.8, "acc": 0.9}
    better = findings.verdict(metrics(ours=ours, raw_kmeans=RAW, autoencoder_kmeans=dict(RAW, nmi=0.7)))
    assert better.details == ["k-means on the autoencoder's code alone reaches NMI 0.700; DEC adds to it (+0.100)."]
    worse = findings.verdict(metrics(ours=ours, raw_kmeans=RAW, autoencoder_kmeans=dict(RAW, nmi=0.85)))
    assert "takes from it (\u22120.050)" in worse.details[0]


def test_without_labels_the_verdict_rests_on_the_silhouette_and_says_how_weak_that_is():
    unlabelled = dict.fromkeys(("acc", "nmi", "ami", "ari", "purity"))
    found = findings.verdict(
        metrics(ours={**unlabelled, "silhouette": 0.4}, raw_kmeans={"rows": 100, "silhouette": 0.2})
    )
    assert found.tone == "better"
    assert "Silhouette 0.400 against 0.200" in found.sentence
    assert "own space" in found.details[0]


def test_without_a_baseline_nothing_is_claimed():
    assert findings.verdict(metrics()).tone == "none"
    assert "No space was learned" in findings.verdict(metrics("kmeans", raw_kmeans=RAW)).sentence


def test_the_best_of_comparable_scores_is_marked_and_levels_stand_apart():
    table = findings.results(metrics(ours={"acc": 0.9}, raw_kmeans=RAW), num_leaves=10, levels=[2])
    assert [c.key for c in table.columns] == ["acc", "nmi", "ami", "ari", "purity", "silhouette"]
    leaves, levels = table.blocks
    assert [line.name for line in leaves.lines] == ["k-means on the raw rows", "DEC"]
    assert [line.best[0] for line in leaves.lines] == [False, True]
    # Ties are marked on both sides; the silhouette of another space is never ranked.
    assert [line.best[1] for line in leaves.lines] == [True, True]
    assert not any(line.best[5] for line in leaves.lines)
    assert [(line.name, line.groups) for line in levels.lines] == [("Level 2", "2")]


def test_scores_of_a_sample_and_of_all_rows_stand_in_blocks_of_their_own():
    sample = dict(RAW, rows=40)
    table = findings.results(metrics(raw_kmeans=sample, learned=sample), num_leaves=10, levels=[2])
    compared, everything = table.blocks
    assert [(line.name, line.rows) for line in compared.lines] == [("k-means on the raw rows", "40"), ("DEC", "40")]
    assert [(line.name, line.rows) for line in everything.lines] == [("DEC", "100"), ("Level 2", "100")]


def test_a_result_that_is_itself_the_baseline_stands_in_the_table_once():
    table = findings.results(metrics("kmeans", raw_kmeans=RAW), num_leaves=10, levels=[])
    assert [line.name for line in table.blocks[0].lines] == ["k-means"]


def test_rows_that_do_not_add_up_are_noticed():
    assert findings.accounts(metrics()).balanced
    assert not findings.Accounts(10, 8, 1).balanced


def test_the_summary_reads_as_a_sentence():
    found = metrics()
    assert findings.summary(found, 10, []) == "100 rows in 10 leaves, without coarser levels."
    assert findings.summary(found, 10, [2]) == "100 rows in 10 leaves, which the tree groups into 2."
    assert findings.summary(found, 10, [2, 3, 5]) == "100 rows in 10 leaves, which the tree groups into 2, 3 and 5."
