"""The words and tables of the report, by hand."""

from raydc.report import results

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


def test_the_best_of_comparable_scores_is_marked_and_levels_stand_apart():
    table = results.results(metrics(ours={"acc": 0.9}, raw_kmeans=RAW), num_leaves=10, levels=[2])
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
    table = results.results(metrics(raw_kmeans=sample, learned=sample), num_leaves=10, levels=[2])
    compared, everything = table.blocks
    assert [(line.name, line.rows) for line in compared.lines] == [("k-means on the raw rows", "40"), ("DEC", "40")]
    assert [(line.name, line.rows) for line in everything.lines] == [("DEC", "100"), ("Level 2", "100")]


def test_a_result_that_is_itself_the_baseline_stands_in_the_table_once():
    table = results.results(metrics("kmeans", raw_kmeans=RAW), num_leaves=10, levels=[])
    assert [line.name for line in table.blocks[0].lines] == ["k-means"]


def test_rows_that_do_not_add_up_are_noticed():
    assert results.accounts(metrics()).balanced
    assert not results.Accounts(10, 8, 1).balanced


def test_the_summary_reads_as_a_sentence():
    found = metrics()
    assert results.summary(found, 10, []) == "100 rows in 10 leaves, without coarser levels."
    assert results.summary(found, 10, [2]) == "100 rows in 10 leaves, which the tree groups into 2."
    assert results.summary(found, 10, [2, 3, 5]) == "100 rows in 10 leaves, which the tree groups into 2, 3 and 5."
