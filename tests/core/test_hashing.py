"""Randomness by hash: equal to the published generator, uniform, nested and free of the order of arrival."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydc.core.hashing import hash_keys, permuted, sample_mask, stream_seed, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


def splitmix64(key: int, seed: int) -> int:
    mask = 2**64 - 1
    state = (key * 0x9E3779B97F4A7C15 + seed) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


def test_hashes_are_the_published_ones():
    # The first outputs of splitmix64 from state 0 (the test vector of its reference implementation).
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [h % 2**64 for h in hash_keys(torch.tensor([1, 2, 3]), 0).tolist()] == expected


@given(st.lists(INT64, min_size=1, max_size=20), st.integers(0, 2**63 - 1))
def test_hashes_in_torch_equal_those_in_whole_numbers(keys, seed):
    assert hash_keys(torch.tensor(keys), seed).tolist() == [splitmix64(k, seed) for k in keys]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_a_permutation_gives_every_place_once_and_each_key_its_own_whatever_is_asked_with_it(size):
    places = permuted(torch.arange(size), size, 5)
    assert places.sort().values.tolist() == list(range(size))
    some = torch.arange(size)[::3]
    assert permuted(some, size, 5).tolist() == places[::3].tolist()


def test_permutations_of_other_seeds_are_unlike_and_no_place_is_favored():
    size = 1000
    places = torch.stack([permuted(torch.arange(size), size, stream_seed(seed)) for seed in range(200)]).double()
    # The mean place of a key over 200 orders has a deviation of size / sqrt(12 * 200); 1000 keys stay within five.
    assert float((places.mean(dim=0) - (size - 1) / 2).abs().max()) < 5 * size / (12 * 200) ** 0.5
    # So has the correlation of two orders one of 1 / sqrt(size), and of the places of neighboring keys.
    correlations = torch.corrcoef(places)
    assert float((correlations - torch.eye(200)).abs().max()) < 6 / size**0.5
    steps = places[:, 1:] - places[:, :-1]
    assert abs(float(steps.sign().mean())) < 0.01


@given(st.integers(2, 2**40), st.integers(0, 2**62))
def test_places_stay_below_any_size(size, seed):
    keys = torch.linspace(0, size - 1, 50, dtype=torch.float64).long().unique()
    places = permuted(keys, size, seed)
    assert len(places.unique()) == len(keys)
    assert bool(((places >= 0) & (places < size)).all())


@given(st.lists(INT64, min_size=1, max_size=20), st.integers(0, 2**63 - 1))
def test_uniform_numbers_are_in_the_unit_interval(keys, seed):
    u = uniform(torch.tensor(keys), seed)
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())


def test_consecutive_keys_give_uniform_numbers():
    u = uniform(torch.arange(100_000), 1).numpy()
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert abs(counts - 5000).max() < 5 * 5000**0.5
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("parts", [(), (0,), (1, 2), (2**63 - 1, 5), (3, 9, 40)])
def test_a_stream_seed_is_a_63_bit_number(parts):
    assert 0 <= stream_seed(*parts) < 2**63
    assert stream_seed(*parts) == stream_seed(*parts)


def test_stream_seeds_differ_by_part_order_and_length():
    seeds = [stream_seed(a, b) for a in range(30) for b in range(30)]
    seeds += [stream_seed(a) for a in range(30)] + [stream_seed(0, 0, a) for a in range(30)]
    assert len(set(seeds)) == len(seeds)


def test_a_sample_has_about_its_share_and_a_smaller_one_lies_within():
    keys = np.arange(50_000)
    tenth, half = sample_mask(keys, 3, 0.1), sample_mask(keys, 3, 0.5)
    assert abs(tenth.mean() - 0.1) < 0.01
    assert abs(half.mean() - 0.5) < 0.01
    assert half[tenth].all()
    assert sample_mask(keys, 3, 1.0).all()
    assert not sample_mask(keys, 3, 0.0).any()
    assert sample_mask(keys[:0], 3, 0.5).shape == (0,)


def test_a_row_is_sampled_whatever_rows_lie_beside_it():
    keys = np.arange(1000)
    whole = sample_mask(keys, 7, 0.3)
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(sample_mask(keys[order], 7, 0.3), whole[order])
    assert np.array_equal(sample_mask(keys[1::3], 7, 0.3), whole[1::3])
    assert not np.array_equal(sample_mask(keys, 8, 0.3), whole)
