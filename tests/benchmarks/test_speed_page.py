"""The page of the speed benchmark: what was wanted, and whether the figures reach it."""

from typing import Any

from benchmarks.speed_page import figure, page, verdicts

MADE = {"cpu": "a processor", "cores": 2, "commit": "abc", "date": "2026-01-01", "versions": {"python": "3.11"}}


def entry(name: str, work: str, **values: Any) -> dict[str, Any]:
    empty = {"peer": None, "peer_name": None, "ratio": None, "limit": None, "limit_ratio": None, "peaks": {}}
    return {"name": name, "work": work, "size": "some", "ours": 1.0, "unit": "s", "made": MADE, **empty, **values}


BOOK = [
    entry(
        "autoencoder_epoch", "autoencoder epoch", peer_name="ClustPy", peer=2.9, ratio=2.9, limit=0.95, limit_ratio=0.95
    ),
    entry("lloyd", "Lloyd iteration", peer_name="Spark MLlib", peer=20.0, ratio=20.0, limit=1.0, limit_ratio=1.0),
    entry("start_up", "from the command to the first epoch", ours=9.0, limit=5.0, limit_ratio=0.556),
    *(
        entry(
            "pipeline",
            "pretraining epoch, seconds per million rows",
            ours=ours,
            rows=rows,
            shard_mib=shard,
            peaks={"ours": {"driver": 650, "training worker": 2000}},
        )
        for ours, rows, shard in ((10.0, 100, 100), (12.0, 1000, 1000))
    ),
]


def test_each_bound_is_reached_or_missed_in_words():
    lines = "\n".join(verdicts(BOOK))
    work = "pretraining epoch, seconds per million rows"
    assert "autoencoder epoch beside ClustPy: 2.9, wanted at least 3: missed. The limit itself is 3.05 times" in lines
    assert "autoencoder epoch beside the limit: 0.95, wanted at least 0.909: reached." in lines
    assert "Lloyd iteration beside Spark MLlib: 20, wanted at least 15: reached." in lines
    assert "beyond bare Ray: 4 s, wanted at most 3 s: missed." in lines
    assert f"driver at 100 rows, {work}: 650 MiB, wanted at most 700 MiB: reached." in lines
    assert f"beyond its shard at 100 rows, {work}: 1,900 MiB, wanted at most 1,536 MiB: missed." in lines
    assert f"beyond its shard at 1,000 rows, {work}: 1,000 MiB, wanted at most 1,536 MiB: reached." in lines
    assert f"{work}: largest deviation from the middle: 9.09 %, wanted at most 10 %: reached." in lines


def test_what_a_stage_takes_before_its_first_row_is_told_apart():
    work = "assign stage, seconds per million rows"
    # Ten seconds to start, and 50 for each million rows.
    book = [entry("pipeline", work, ours=50 + 10e6 / rows, rows=rows) for rows in (100_000, 400_000, 1_000_000)]
    lines = "\n".join(verdicts(book))
    assert f"{work}: 10 s whatever the rows, then 50 and 50 s from one size to the next." in lines
    assert f"{work}: largest deviation from the middle: 42.9 %, wanted at most 10 %: missed." in lines
    assert f"{work}, from one size to the next: largest deviation from the middle: 0 %, wanted at most" in lines


def test_a_whole_job_is_judged_by_the_planted_clusters_of_each_level():
    one = {"acc": 0.5, "nmi": 0.75, "ami": 0.7, "ari": 0.4, "purity": 0.6}
    layers = [{"clusters": 1255, "noise": 0.186, "nmi": 0.908}]
    whole = entry(
        "pipeline",
        "the whole job",
        peer_name="EVoC",
        quality={"leaf": one, "level_10": one},
        baselines={"raw_kmeans": one | {"rows": 2000}},
        quality_of_peer={"chosen": layers[0], "layers": layers},
        verdict="Worse.",
    )
    text = page([whole])
    assert "| leaves, against 1000 planted clusters | 0.500 | 0.750 | 0.700 | 0.400 | 0.600 |" in text
    assert "| level 10, against as many above them | 0.500 |" in text
    assert "| k-means on the rows, on a sample of 2,000 rows | 0.500 |" in text
    assert "- The run's own words: Worse." in text
    assert "- EVoC: 1,255 clusters, 18.6 % of the rows in none, NMI 0.908" in text


def test_the_page_shows_every_row_and_the_figure_a_bar_for_each_ratio():
    text = page(BOOK)
    for e in BOOK:
        assert f"| {e['work']} | some |" in text
    assert "- autoencoder_epoch: a processor, 2 cores, commit abc, 2026-01-01, python 3.11." in text
    assert len(figure(BOOK).axes[0].patches) == 5
