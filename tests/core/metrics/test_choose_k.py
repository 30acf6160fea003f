"""Criteria for K beside scikit-learn, and the rule of the recommendation by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from raydc.core.metrics.choose_k import Loss, calinski_harabasz, generalizability, recommend, stability
from raydc.core.metrics.partition_stats import Tally
from raydc.core.metrics.scores import internal
from tests.core.ranks import blobs


def tally_of(x, groups, num_groups):
    """Return the statistics of a partition around its means, and the means."""
    centers = np.stack([x[groups == k].mean(axis=0) for k in range(num_groups)])
    apart = np.linalg.norm(x[:, None] - centers, axis=2)
    own = apart[np.arange(len(x)), groups].copy()
    apart[np.arange(len(x)), groups] = np.inf
    tally = Tally(num_groups=num_groups)
    tally.add(groups, own, apart.min(axis=1), None)
    return tally, centers


def test_calinski_harabasz_and_davies_bouldin_from_sums_are_scikit_learns():
    x, groups = blobs(300, 4, 5)
    x = x.astype(np.float64)
    tally, centers = tally_of(x, groups, 5)
    assert calinski_harabasz(tally, centers) == pytest.approx(calinski_harabasz_score(x, groups))
    assert internal(tally, centers)["davies_bouldin"] == pytest.approx(davies_bouldin_score(x, groups))
    two, centers_of_two = tally_of(np.array([[0.0], [2.0], [10.0]]), np.array([0, 0, 1]), 2)
    # a = 1, 1, 0; b = 10, 8 and 9: (10 - 1) / 10, (8 - 1) / 8 and 1.
    assert internal(two, centers_of_two)["silhouette"] == pytest.approx((0.9 + 0.875 + 1.0) / 3)
    one = Tally(num_groups=2)
    one.add(np.zeros(3, np.int64), np.ones(3), np.ones(3), None)
    assert calinski_harabasz(one, np.zeros((2, 1))) is None


def test_generalizability_by_hand():
    train, held_out = Loss(4.0, 8.0, 20.0), Loss(2.0, 5.0, 13.0)
    ratio, error = generalizability(train, held_out)
    assert ratio == pytest.approx(2.0 / 2.5)
    assert train.error == pytest.approx(np.sqrt((5 - 4) / 4))
    assert error == pytest.approx(0.8 * np.hypot(0.5 / 2.0, np.sqrt((6.5 - 6.25) / 2) / 2.5))
    assert generalizability(Loss(4.0, 0.0, 0.0), held_out) is None
    assert generalizability(train, Loss(0.0, 0.0, 0.0)) is None


def test_the_true_number_of_groups_is_stable_and_a_larger_one_is_not():
    x = torch.from_numpy(blobs(600, 6, 4)[0])
    true, error = stability(x, 4, num_repeats=4, seed=0)
    assert true > 0.99 and error < 0.01
    assert stability(x, 9, num_repeats=4, seed=0)[0] < 0.9
    assert stability(x, 9, num_repeats=4, seed=0) == stability(x, 9, num_repeats=4, seed=0)


def entry(k, **changes):
    """Return the criteria of one K: a hill with its top at 6, and a G that does not fall."""
    hill = -abs(k - 6) / 10
    return {
        "k": k,
        "empty": 0,
        "silhouette": hill,
        "davies_bouldin": -hill,
        "calinski_harabasz": 100 / k,
        "neighbor_agreement": hill,
        "stability": 0.95 if k <= 6 else 0.5,
        "stability_error": 0.01,
        "g": 0.95,
        "g_error": 0.001,
    } | changes


def test_the_median_of_the_votes_is_recommended_and_the_rest_abstain():
    found = recommend([entry(k) for k in (2, 4, 6, 8, 10)])
    assert (found.num_leaves, found.agree, found.drop) == (6, True, None)
    assert found.sentence == (
        "K = 6 is recommended, the median of 4 votes (silhouette 6, Davies-Bouldin 6, neighbor agreement 6, "
        "stability 6); Calinski-Harabasz, G abstain."
    )
    assert {v.criterion: v.reason for v in found.votes}["Calinski-Harabasz"] == "best at K = 2, an end of the range"


def test_the_vote_of_g_is_the_k_before_its_largest_fall_beyond_its_error():
    falling = {2: 0.95, 4: 0.95, 6: 0.94, 8: 0.80, 10: 0.78}
    found = recommend([entry(k, g=g, g_error=0.01) for k, g in falling.items()])
    assert found.drop == 6
    assert recommend([entry(k, g=g, g_error=0.2) for k, g in falling.items()]).drop is None


def test_criteria_that_disagree_are_said_to():
    found = recommend([entry(k, silhouette=-abs(k - 20), stability=0.9) for k in (2, 4, 6, 8, 10, 20, 30)])
    assert not found.agree
    assert "The criteria disagree, from 6 to 20" in found.sentence


def test_a_k_with_empty_leaves_is_not_recommended():
    found = recommend([entry(k, empty=int(k == 6)) for k in (2, 4, 6, 8, 10)])
    assert found.num_leaves in (4, 8)


def test_nothing_is_recommended_where_nothing_is_best_inside_the_range():
    rising = [entry(k, silhouette=k, davies_bouldin=-k, neighbor_agreement=k, stability=0.9) for k in (2, 4, 5)]
    found = recommend(rising)
    assert found.num_leaves is None and "no criterion has its best value inside the range" in found.sentence
    assert recommend(rising[:2]).num_leaves is None
