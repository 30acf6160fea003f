"""fit: what is told of a fit that changed its number of workers, and of one that failed."""

import pickle

from ray.train import ControllerError, WorkerGroupError

from raydc.runtime.session import in_one_line, root_cause
from raydc.stages.fit import resizes


def test_every_change_of_the_number_of_workers_is_told_with_its_place():
    places = [("pretrain", 0, 2), ("pretrain", 1, 1), ("kmeans", 0, 1), ("refine", 0, 1), ("refine", 1, 3)]
    history = [{"phase": phase, "epoch": epoch, "num_workers": n} for phase, epoch, n in places]
    assert resizes(history) == [
        {"phase": "pretrain", "epoch": 1, "num_workers": [2, 1]},
        {"phase": "refine", "epoch": 1, "num_workers": [1, 3]},
    ]
    assert resizes(history[:1]) == []


def test_a_failure_of_workers_or_controller_is_told_by_its_cause_on_one_line(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "only-for-this-test")
    cause = OSError(28, "No space left on\n  device\nfor only-for-this-test")
    for error in (ControllerError(cause), WorkerGroupError("[Rank 0]\nTraceback ...", {0: cause})):
        # As it comes from another process.
        found = root_cause(pickle.loads(pickle.dumps(error)))
        assert in_one_line(found) == "OSError: [Errno 28] No space left on device for ***"
