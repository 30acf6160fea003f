"""The benchmark of methods: what they share, which rows an unequal sample keeps, and the page."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import methods
from benchmarks.methods_page import PUBLISHED, page

FOLDER = Path("somewhere")


def of(method, name="digits", seed=0):
    return methods.config_of(name, FOLDER, method).model_copy(update={"seed": seed})


@pytest.mark.parametrize("name", ["digits", "mnist"])
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_valid_settings(method, name):
    assert of(method, name).input.path == str(FOLDER)


def test_methods_share_an_autoencoder_if_it_is_pretrained_alike():
    def shared(method, **changes):
        return methods.pretraining_fingerprint(of(method, **changes), "input")

    assert shared("dec") == shared("idec") == shared("dcn") == shared("autoencoder_kmeans")
    assert shared("dec_layerwise") == shared("sae_kmeans") != shared("dec")
    assert shared("dec") != shared("dec", seed=1)
    assert shared("dec") != methods.pretraining_fingerprint(of("dec"), "other")


def test_a_fit_is_known_by_its_settings_and_its_input():
    def known(config, rows="input"):
        return methods.fit_fingerprint(config, rows)

    others = [of("idec"), of("dec", seed=1), of("dec", name="mnist")]
    assert known(of("dec")) == known(of("dec"))
    assert len({known(of("dec")), known(of("dec"), "other rows"), *map(known, others)}) == 5


def test_an_unequal_sample_keeps_the_first_class_least_and_the_last_one_whole():
    classes = np.repeat([str(c) for c in range(10)], 2000)
    kept = methods.imbalanced(torch.arange(20_000), classes, 0.1)
    shares = [float(kept[classes == str(c)].mean()) for c in range(10)]
    np.testing.assert_allclose(shares, 0.1 + 0.1 * np.arange(10), atol=0.04)
    assert shares[9] == 1.0
    order = np.random.default_rng(0).permutation(20_000)
    np.testing.assert_array_equal(methods.imbalanced(torch.from_numpy(order), classes[order], 0.1), kept[order])


def entry(method, seed, acc, data="mnist", **others):
    return {"data": data, "method": method, "seed": seed, "acc": acc, "nmi": 0.5, "ari": 0.25} | others


def test_the_page_has_means_spreads_seeds_and_what_was_published():
    book = [entry("dec", 0, 0.8, seconds=10.0), entry("dec", 1, 0.9, seconds=30.0), entry("idec", 1, 0.7)]
    text = page([*book, entry("dec", 0, 0.6, data="mnist r_min=0.1")])
    published = PUBLISHED["mnist"]["dec"]
    assert "| dec | 2 | 0.8500 (0.8000 - 0.9000) | 0.5000 (0.5000 - 0.5000) | 0.2500 " in text
    assert f" | 20 | {published} |" in text
    assert "| idec | 1 | 0.7000 | 0.5000 | 0.2500 |  |" in text
    # A seed that a method has no run of stays blank, under its own column.
    assert "| idec |  | 0.7000 |" in text and "| dec | 0.8000 | 0.9000 |" in text
    assert "| mnist r_min=0.1 | dec | 1 | 0.6000 |" in text


def test_the_page_says_which_bounds_are_reached_and_which_are_missed_by_how_much():
    book = [entry("autoencoder_kmeans", 0, 0.82), entry("dcn", 0, 0.81), entry("dec", 0, 0.83), entry("dec", 1, 0.89)]
    text = page(book)
    assert "- dec 0.8600, wanted at least 0.85: reached." in text
    assert (
        "- dcn 0.8100, wanted at least 0.80: reached. autoencoder_kmeans 0.8200, wanted not above: missed by 0.01"
        in text
    )
    assert "- idec" not in text and "wanted" not in page([entry("dec", 0, 0.5, data="digits")])


def test_the_page_compares_dec_on_unequal_classes_with_the_fits_of_the_same_rows_and_seed():
    pairs = [("mnist r_min=0.1", 0.6, 0.65), ("mnist r_min=0.3", 0.7, 0.73)]
    book = [entry("autoencoder_kmeans", 0, a, data=d) for d, a, _ in pairs]
    book += [entry("dec", 0, b, data=d) for d, _, b in pairs] + [entry("dec", 1, 0.1, data="mnist r_min=0.1")]
    assert "mean of 2 pairs: +0.0400 in ACC" in page(book)
