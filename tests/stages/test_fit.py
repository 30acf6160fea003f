"""fit: what is told of a fit that changed its number of workers."""

from raydc.stages.fit import resizes


def test_every_change_of_the_number_of_workers_is_told_with_its_place():
    places = [("pretrain", 0, 2), ("pretrain", 1, 1), ("kmeans", 0, 1), ("refine", 0, 1), ("refine", 1, 3)]
    history = [{"phase": phase, "epoch": epoch, "num_workers": n} for phase, epoch, n in places]
    assert resizes(history) == [
        {"phase": "pretrain", "epoch": 1, "num_workers": [2, 1]},
        {"phase": "refine", "epoch": 1, "num_workers": [1, 3]},
    ]
    assert resizes(history[:1]) == []
